"""Arrays that a step reaches through objects and helpers: their places, with tensors in them.

In: what a step reads: arguments, closure variables, globals. Out: `Places`: for the time of a call
tensors stand where arrays were, in attributes of objects, in the globals and closures of functions
that the step may call; while it is traced, Arrays. What the call has put there is an array again
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace

import numpy as np
import torch

from tracejit.capture.python.bytecode import contents, names_in
from tracejit.numpy_front.core import ArrayData
from tracejit.records import dataclass

_MOST = 2000  # objects that are looked at
_WIDE = 200  # items of a container
_DEEP = 5  # containers in each other, one more
_ROOT = -4  # of what is in containers that the step names, until there would be too many
_OF_TORCH = (torch.Tensor, torch.nn.Module, torch.optim.Optimizer)
_PLAIN = (str, bytes, int, type(None))
_LEAVES = (*_PLAIN, float, complex, np.generic)
_ENDS = frozenset((*_PLAIN, bool, float, complex, np.ndarray, np.float32, np.float64))
_LIBRARIES = ("numpy", "tracejit", "torch", "builtins")


@dataclass(slots=True)
class Slot:
    """A place that holds an array, or a container of such, and what stands for it in this call."""

    holder: dict | list | CellType
    key: object  # None for a cell
    array: object
    tensor: object

    def put(self, x: object) -> None:
        """Let it hold something."""
        if self.key is None:
            self.holder.cell_contents = x
        else:
            self.holder[self.key] = x

    @property
    def held(self) -> object:
        """What it holds."""
        if self.key is None:
            return self.holder.cell_contents
        try:
            return self.holder[self.key]
        except LookupError:
            return None


class Reached:
    """What a step reaches: the `__dict__`s of objects of the user's, lists and dicts in these or in
    variables of functions, and these variables. `of_torch`: whether there is something of torch's
    among it."""

    def __init__(self, roots: Iterable[object], own: FunctionType | None = None):
        self.holders: list[dict | list] = []
        self.variables: list[tuple[dict | CellType, str | None]] = []  # of functions
        self.of_torch = False
        self._own = own  # the step's function, whose variables are seen to elsewhere
        self._seen: dict[tuple[int, bool], object] = {}
        self._pending: list[tuple[object, int]] = [(x, _ROOT) for x in roots]
        if own is not None:
            self._pending += [(x, 1 if is_holder(x) else _ROOT) for x in variables_of(own)]
        while self._pending and len(self._seen) < _MOST:
            self._look(*self._pending.pop())

    def _look(self, x: object, depth: int) -> None:
        if isinstance(x, _LEAVES) or type(x) is np.ndarray:
            return
        root = depth <= 0 and type(x) in (list, tuple, dict)  # which a call has copies of
        if (id(x), root) in self._seen:
            return
        self._seen[id(x), root] = x
        if isinstance(x, _OF_TORCH):
            self.of_torch = True
        elif isinstance(x, ModuleType):
            self.of_torch |= x.__name__.partition(".")[0] == "torch"
        elif type(x) in (list, tuple, dict):
            items = [*x.values()] if type(x) is dict else x
            if depth in (0, _DEEP) or not (len(x) <= _WIDE or is_holder(x)):
                return
            self._pending += [(item, depth + 1) for item in items[:_WIDE]]
            if not root and type(x) is not tuple:
                self.holders.append(x)
        elif isinstance(x, MethodType):
            self._pending += [(x.__func__, 1), (x.__self__, 1)]
        elif isinstance(x, FunctionType):
            self._function(x)
        elif isinstance(x, type):
            self._class(x)
        elif _is_object(x):
            self.holders.append(vars(x))
            self._pending += [(item, 1) for item in vars(x).values()]
            self._pending.append((type(x), 1))

    def _function(self, f: FunctionType) -> None:
        if _of_library(f):
            return
        names, cells = names_in(f.__code__).globals, f.__closure__ or ()
        if f is not self._own:
            self._pending += [(x, 1) for x in variables_of(f)]
            self.variables += [(f.__globals__, name) for name in names if name in f.__globals__]
            self.variables += [(cell, None) for cell in cells]

    def _class(self, kind: type) -> None:
        for each in kind.__mro__:
            if not _of_library(each):
                found = (getattr(x, "__func__", x) for x in vars(each).values())
                self._pending += [(x, 1) for x in found if isinstance(x, FunctionType)]


def variables_of(f: FunctionType) -> list[object]:
    """What the globals that a function names hold, and its closure."""
    names = names_in(f.__code__).globals
    return [*map(f.__globals__.get, names), *map(contents, f.__closure__ or ())]


def is_holder(x: object) -> bool:
    """Whether a variable of the step holds a list or dict that stays what it is: tensors stand in
    it for the time of a call. Of a long list that is what is appended to it."""
    if type(x) is dict or (type(x) is list and len(x) <= _WIDE):
        return len(x) <= _WIDE
    return type(x) is list and not any(isinstance(item, np.ndarray) for item in x[:_WIDE])


def _of_library(x: object) -> bool:
    return (getattr(x, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _is_object(x: object) -> bool:
    """Whether something is an object of a class of the user's that is no more than attributes."""
    kind = type(x)
    plain = kind.__new__ is object.__new__ and kind.__dictoffset__ and not _of_library(kind)
    return (kind is SimpleNamespace or bool(plain)) and type(getattr(x, "__dict__", None)) is dict


def leads_nowhere(roots: Iterable[object], own: FunctionType) -> bool:
    """Whether a step whose function is `own` plainly reaches nothing but its arrays: known in a
    fraction of the time that it takes to look."""
    variables = [type(x) for x in variables_of(own) if x is not np]
    return {*map(type, roots), *variables} <= _ENDS


class Places:
    """The places of one call. `convert` makes tensors of arrays and their containers."""

    def __init__(self, reached: Reached, convert: Callable[[object], object]):
        self._holders = reached.holders
        self.known = {*map(id, reached.holders)}  # which stay what they are
        self._starts = {id(x): len(x) for x in reached.holders if len(x) > _WIDE}
        self._inner: dict[tuple[int, object], int] = {}  # which containers holders have where
        self.slots: list[Slot] = []
        seen: set[tuple[int, object]] = set()
        for holder, key in self._all(reached):
            at = id(holder), key
            value = contents(holder) if key is None else holder[key]
            if type(value) in (list, dict, tuple):
                self._inner[at] = id(value)
            if at in seen or isinstance(value, _PLAIN) or type(value) in (list, dict):
                continue
            if type(holder) is list and isinstance(value, np.generic):
                continue  # as of losses: good for its value, if anything reads it
            seen.add(at)
            found = convert(value)
            if found is not value:
                self.slots.append(Slot(holder, key, value, found))

    def _all(self, reached: Reached) -> Iterator[tuple[dict | list | CellType, object]]:
        for holder in reached.holders:
            yield from ((holder, key) for key in self._keys(holder))
        yield from reached.variables

    def _keys(self, holder: dict | list) -> list:
        if isinstance(holder, dict):
            return [*holder]
        return [*range(self._starts.get(id(holder), 0), len(holder))]

    def put(self, see: Callable[[object], object] | None = None) -> None:
        """Let tensors stand there, or what is seen of them."""
        for slot in self.slots:
            slot.put(slot.tensor if see is None else see(slot.tensor))

    def traced(self, see: Callable[[object], object]) -> str:
        """Let tensors stand there again, after the user's code has run on what is seen of them;
        what it has put into attributes too. Says what cannot be: a variable that was rebound."""
        for slot in self.slots:
            now = slot.held
            if now is see(slot.tensor):
                slot.put(slot.tensor)
            elif not any(slot.holder is holder for holder in self._holders):
                return f"the variable {slot.key or ''} of a function".replace("  ", " ")
        for holder in self._holders:
            for key in self._keys(holder):
                x = holder[key]
                if self._inner.get((id(holder), key)) != id(x) and self.leads_back(x):
                    return "an item or attribute (a list or dict that was there before)"
                holder[key] = self._deep(x, ArrayData, lambda a: a.t)
        return ""

    def leads_back(self, x: object, depth: int = 0) -> bool:
        """Whether x is, or has in it, a list or dict that was there before: a later call would put
        another one of the same items in its place."""
        if type(x) not in (tuple, list, dict) or depth > _DEEP:
            return False
        items = [*x.values()] if type(x) is dict else x
        return id(x) in self.known or any(self.leads_back(i, depth + 1) for i in items[:_WIDE])

    def take_back(self, array: Callable[[torch.Tensor], object]) -> None:
        """Let arrays stand there: those that did, or what the call has put there."""
        for slot in self.slots:
            if slot.held is slot.tensor:
                slot.put(slot.array)
        for holder in self._holders:
            for key in self._keys(holder):
                found = self._deep(holder[key], torch.Tensor, array)
                if found is not holder[key]:
                    holder[key] = found

    def _deep(self, x: object, kind: type, change: Callable, depth: int = 0) -> object:
        """The same with what is of a kind changed; in new containers where there is such inside."""
        if isinstance(x, kind):
            return change(x)
        if type(x) not in (tuple, list, dict) or id(x) in self.known:
            return x
        if depth < _DEEP and len(x) <= _WIDE:
            items = [*x.values()] if type(x) is dict else x
            found = [self._deep(item, kind, change, depth + 1) for item in items]
            if any(a is not b for a, b in zip(found, items, strict=True)):
                return dict(zip(x, found, strict=True)) if type(x) is dict else type(x)(found)
        return x

    def restore(self) -> None:
        """Let the arrays stand there that did, whatever has happened since."""
        for slot in self.slots:
            slot.put(slot.array)


NOWHERE = Places(Reached(()), lambda x: x)  # of a step that reaches nothing
