"""What a step's Python can change, as it is before a trace, to run the same call once more.

In: the step's function and the arguments of a call. `Snapshot` follows them, and torch's global
hooks, to containers, attributes, closures, globals of user modules, iterators and generators, and
copies each, shallowly. `obstacles` says what has changed since that cannot be put back, `restore`
puts the rest back. Modules of libraries are not looked into. A trace changes no tensor.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from threading import local
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)

import numpy as np
import torch

from tracejit.capture.python import iterators, randomness
from tracejit.capture.python.bytecode import codes, names_in
from tracejit.capture.python.classes import is_heap_type, module_of
from tracejit.capture.python.copies import (
    UNSET,
    Copies,
    Spaces,
    base_of,
    cell_value,
    checksum,
    copy_of,
    held_by,
    identical,
    make_so,
    read_slot,
    refill,
    saved_array,
    saved_cache,
    slots_of,
)
from tracejit.capture.python.global_hooks import global_hooks
from tracejit.capture.python.words import attributes

MOST = 1_000_000  # objects looked at
_MOST_AGAIN = 500  # on each rerun, besides what is known
_COPIED = 64 << 20  # bytes of numpy arrays that are copied
_COPIED_AGAIN = 1 << 20  # and on each rerun
_PRUNED = 32  # calls after which what is dropped elsewhere is dropped here
_COMPARED = 1 << 30  # and those of which a checksum is taken
_ATOMS = frozenset(
    {
        *(int, float, str, bool, complex, bytes, type(None), range, slice, type(Ellipsis)),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
        *(CodeType, GetSetDescriptorType, MemberDescriptorType),
    }
)
_LIBRARIES = frozenset({"torch", "numpy", "tracejit", "builtins"})
# whose objects lead to all of a program, and are not what a step changes
_CLOSED = frozenset({"logging", "threading", "importlib", "concurrent", "multiprocessing"})
# whose types of C do nothing but what can be seen
_SEEN_THROUGH = frozenset({"torch", "numpy", "builtins", "types", "collections", "datetime", "re"})
# code that names one of these may store a global of any name
_BY_NAME = frozenset({"globals", "exec", "eval", "vars", "setattr", "delattr", "__dict__"})


def library(name: str) -> bool:
    """Whether a module is Python's own, torch, numpy, or this package."""
    root = name.partition(".")[0]
    return root in _LIBRARIES or root in sys.stdlib_module_names and root != "__main__"


class Snapshot:
    """Copies of all that a step can reach and its Python can change."""

    def __init__(self, roots: Sequence[object], known: Known | None = None):
        """`known`: containers that an earlier snapshot found; they are not looked for again."""
        self.modules: dict[int, ModuleType] = {}  # of libraries, which the step's code names
        self.named: set[str] = set()  # all that the user functions' code names
        self.foreign: set[type] = set()  # types of C of objects that were not looked into
        self.networks: list[torch.nn.Module] = []
        self.tensors: list[torch.Tensor] = []  # from outside of a trace
        self._unseen: list[str] = []  # what cannot be put back if it has changed
        # functions that save something, and those that put it back
        self._save: list[Callable[[], Callable[[], None]]] = []
        self._put_back: list[Callable[[], None]] = []
        self._empty: list[object] = []
        self._bare: list[weakref.ref[torch.Tensor]] = []  # without attributes
        self._dicts: list[tuple[dict, dict]] = []
        self._ordered: list[tuple[OrderedDict, dict, list]] = []  # with their own order
        self._sequences: list[tuple[list | deque | bytearray | array, object]] = []
        self._sets: list[tuple[set, set]] = []
        self._cells: list[tuple[CellType, object]] = []
        self._slots: list[tuple[object, list]] = []
        self._classes: list[tuple[type, dict]] = []
        self._spaces: dict[int, tuple[dict, dict]] = Spaces()  # of user modules
        self._looked: set[tuple[int, CodeType]] = set()
        self._steps: list[tuple[object, dict]] = []  # compiled ones, and what is the user's of them
        self._checksums: list[tuple[np.ndarray, int]] = []
        self._progress: list[iterators.Progress] = []
        self._bytes = 0
        pending, ids = [*roots, *global_hooks()], frozenset()
        for name in _COPIES:
            setattr(self, name, Copies())
        if known is not None:
            pending += (filled := self._take(known))
            ids = known.ids - {*map(id, filled)} if filled else known.ids
        self._walk(pending, ids)
        if known is None or "random" in self.named:
            self._put_back += randomness.saved_globally()
        else:  # nothing that the step's code names draws from the others
            self._put_back.append(randomness.saved(torch.default_generator))

    def _take(self, known: Known) -> list[object]:
        """Copy what is known already; returns what was empty and is no more."""
        of = known.of
        self.named |= known.named
        self.foreign, self.modules = {*known.foreign}, {**known.modules}
        self._dicts = [(x, dict.copy(x)) for x in of["_dicts"]]
        self._empty, self._bare = [*of["_empty"]], [*of["_bare"]]
        self._sets = [(x, set.copy(x)) for x in of["_sets"]]
        self._cells = [(x, cell_value(x)) for x in of["_cells"]]
        self._sequences = [(x, copy_of(x)) for x in of["_sequences"]]
        self._classes = [(x, dict(vars(x))) for x in of["_classes"]]
        self._spaces = Spaces({id(x): (x, x.copy()) for x in of["_spaces"]})
        for x in of["_ordered"]:
            self._keep_order(x)
        for x in of["_slots"]:
            self._slots.append((x, [(m, read_slot(m, x)) for m in slots_of(type(x))]))
        for x in of["_steps"]:
            self._steps.append((x, {k: x.__dict__[k] for k in x.user_attributes()}))
        self._progress = [iterators.Progress(x) for x in of["_progress"]]
        for name in _COPIES:
            setattr(self, name, Copies(getattr(self, name)))
        self._put_back = [save() for save in known.save]
        self._save = [*known.save]
        filled = [x for x in (*self._empty, *self._of_bare()) if len(x)]
        if filled:
            self._empty = [x for x in self._empty if not len(x)]
            self._bare = [
                ref for ref in self._bare if (x := ref()) is not None and not attributes(x)
            ]
        return filled

    def _of_bare(self) -> list[dict]:
        """The attributes, by now, of the tensors that had none."""
        return [attributes(x) for ref in self._bare if (x := ref()) is not None]

    # ---- what there is

    def _walk(self, pending: list[object], known: frozenset[int]) -> None:
        seen: set[int] = set()
        most = _MOST_AGAIN if known else MOST
        self._keep = keep = []  # ids stay unique
        while pending:
            x = pending.pop()
            cls = x.__class__ if type(x) is weakref.ProxyType else type(x)
            if cls in _ATOMS or id(x) in seen or id(x) in known:
                continue
            if len(seen) >= most:
                self._unseen.append(f"it can reach more than {most} objects")
                return
            seen.add(id(x))
            keep.append(x)
            if cls is dict:
                self._dict(x, pending)
            elif cls is list:
                self._list(x, pending)
            elif cls is tuple or cls is BuiltinFunctionType:
                pending += x if cls is tuple else held_by(x)
            elif cls is OrderedDict and not x:
                self._empty.append(x)
            else:
                getattr(self, _kind(cls))(x, cls, pending)

    def _dict(self, x: dict, pending: list[object]) -> None:
        if not dict.__len__(x):
            self._empty.append(x)
            return
        self._dicts.append((x, dict.copy(x)))
        pending += [v for v in dict.values(x) if type(v) not in _ATOMS]
        pending += [k for k in dict.keys(x) if type(k) not in _ATOMS]

    def _list(self, x: list, pending: list[object]) -> None:
        if not list.__len__(x):
            self._empty.append(x)
            return
        copy = list.__getitem__(x, slice(None))
        self._sequences.append((x, copy))
        pending += [v for v in copy if type(v) not in _ATOMS]

    def _tensor(self, x: torch.Tensor, cls: type, pending: list[object]) -> None:
        if module_of(cls).startswith("tracejit"):
            return  # of the trace that is going on
        self.tensors.append(x)
        if there := attributes(x):
            return pending.append(there)
        self._bare.append(weakref.ref(x))

    def _saved(self, save: Callable[[], Callable[[], None]]) -> None:
        self._save.append(save)
        self._put_back.append(save())

    def _parts(self, x: object, cls: type, pending: list[object]) -> None:
        pending += [getattr(x, name, None) for name in _PARTS]

    def _nothing(self, x: object, cls: type, pending: list[object]) -> None:
        pass

    def _module(self, x: ModuleType, cls: type, pending: list[object]) -> None:
        if library(x.__name__):
            self.modules[id(x)] = x

    def _random(self, x: object, cls: type, pending: list[object]) -> None:
        self._saved(functools.partial(randomness.saved, x))

    def _cached(self, x: Callable, cls: type, pending: list[object]) -> None:
        self._saved(functools.partial(saved_cache, x))
        pending.append(x.__wrapped__)

    def _weak(self, x: weakref.ref, cls: type, pending: list[object]) -> None:
        pending.append(x())

    def _function(self, x: FunctionType, cls: type, pending: list[object]) -> None:
        pending += x.__closure__ or ()
        pending += (x.__defaults__, x.__kwdefaults__, x.__dict__)
        namespace = x.__globals__
        if library(namespace.get("__name__") or ""):
            return
        for code in codes(x.__code__):
            self.named.update(code.co_names)
        self._namespace(namespace, names_in(x.__code__).globals, x.__code__, pending)

    def _namespace(
        self, namespace: dict, names: Iterable[str], code: CodeType, pending: list[object]
    ) -> None:
        """What code names of a user module."""
        if id(namespace) not in self._spaces:
            self._spaces[id(namespace)] = namespace, namespace.copy()
        for name in names:
            found = namespace.get(name)
            if type(found) is ModuleType and not library(found.__name__):
                if (id(found), code) not in self._looked:
                    self._looked.add((id(found), code))
                    self._namespace(vars(found), code.co_names, code, pending)
            else:
                pending.append(found)

    def _class(self, x: type, cls: type, pending: list[object]) -> None:
        for base in x.__mro__:
            if is_heap_type(base) and not library(module_of(base)):
                held = dict(vars(base))
                self._classes.append((base, held))
                pending += held.values()

    def _cell(self, x: CellType, cls: type, pending: list[object]) -> None:
        try:
            value = x.cell_contents
        except ValueError:
            value = UNSET
        self._cells.append((x, value))
        pending.append(value)

    def _array(self, x: np.ndarray, cls: type, pending: list[object]) -> None:
        if x.dtype == object:
            pending += x.flat if x.size < MOST else ()
        if not x.flags.writeable:
            return
        self._bytes += x.nbytes
        if self._bytes <= _COPIED:
            self._saved(functools.partial(saved_array, x))
        elif self._bytes <= _COMPARED:
            self._checksums.append((x, checksum(x)))
        else:
            self._unseen.append(f"it can reach numpy arrays of more than {_COMPARED >> 30} GiB")

    def _iterator(self, x: object, cls: type, pending: list[object]) -> None:
        if getattr(x, "gi_running", False) or x in (sys.stdout, sys.stderr):
            return
        progress = iterators.Progress(x)
        self._progress.append(progress)
        pending += progress.within()

    def _compiled(self, x: object, cls: type, pending: list[object]) -> None:
        copy = {k: x.__dict__[k] for k in x.user_attributes()}
        self._steps.append((x, copy))
        pending += (x._step, *copy.values())

    def _keep_order(self, x: OrderedDict) -> list[object]:
        copy = dict(zip(dict.keys(x), dict.values(x), strict=True))
        self._ordered.append((x, copy, [*OrderedDict.keys(x)]))
        return [*copy.keys(), *copy.values()]

    def _object(self, x: object, cls: type, pending: list[object]) -> None:
        module = module_of(cls)
        if issubclass(cls, OrderedDict) and OrderedDict.__len__(x):
            pending += self._keep_order(x)
        elif issubclass(cls, dict):
            self._dict(x, pending)
        elif issubclass(cls, list):
            self._list(x, pending)
        elif issubclass(cls, tuple):
            pending += tuple.__iter__(x)
        elif issubclass(cls, (set, frozenset)):
            if issubclass(cls, set):
                self._sets.append((x, set.copy(x)))
            pending += (set if issubclass(cls, set) else frozenset).__iter__(x)
        elif issubclass(cls, deque):
            self._sequences.append((x, copy_of(x)))
            pending += self._sequences[-1][1]
        elif issubclass(cls, (bytearray, array)):
            self._sequences.append((x, copy_of(x)))
        elif not is_heap_type(cls) and hasattr(cls, "__next__"):
            self._unseen.append(f"it can reach an iterator of type {cls.__name__}")
        elif not is_heap_type(cls) and module.partition(".")[0] not in _SEEN_THROUGH:
            self.foreign.add(cls)
        if cls.__dictoffset__ or issubclass(cls, local):  # that of this thread
            attributes = x.__dict__
            if type(attributes) is dict:
                pending.append(attributes)
        members = slots_of(cls)
        if members:
            values = [(m, read_slot(m, x)) for m in members]
            self._slots.append((x, values))
            pending += [v for _, v in values]
        if issubclass(cls, torch.nn.Module):
            self.networks.append(x)
        if is_heap_type(cls) and not library(module):
            pending.append(cls)

    @property
    def is_cheap(self) -> bool:
        """Whether it can be taken on every call: no large arrays, and all could be copied."""
        return self._bytes <= _COPIED_AGAIN and not self._unseen

    def of(self) -> dict[str, list]:
        """All that was copied, by the list that it is in."""
        found = {name: [item[0] for item in getattr(self, name)] for name in _COPIES}
        found |= {"_empty": [*self._empty], "_bare": [*self._bare]}
        found["_spaces"] = [x for x, _ in self._spaces.values()]
        found["_progress"] = [p.of for p in self._progress]
        return found

    # ---- what became of it

    def obstacles(self) -> list[str]:
        """What may have changed since and cannot be put back."""
        lost = [p for p in self._progress if p.lost]
        names = sorted({type(p.of).__name__ for p in lost})
        found = [f"it advances a {name}, which cannot be set back" for name in names]
        if any(checksum(x) != before for x, before in self._checksums):
            found.append("it writes to a numpy array that is too large to be copied")
        return self._unseen + found

    def restore(self) -> None:
        """Put all back as it was."""
        for progress in self._progress:
            progress.rewind()
        for x, copy, order in self._ordered:
            kept = len(copy) == OrderedDict.__len__(x) and identical([*dict.keys(x)], [*copy])
            if not kept or not identical([*OrderedDict.keys(x)], order):
                OrderedDict.clear(x)
                for key, value in copy.items():
                    OrderedDict.__setitem__(x, key, value)
                for key in order:
                    OrderedDict.move_to_end(x, key)
            elif not identical([*dict.values(x)], [*copy.values()]):
                for key, value in copy.items():
                    OrderedDict.__setitem__(x, key, value)
        for x, copy in self._sequences:
            if not identical(x, copy):
                refill(x, copy)
        for x, copy in self._sets:
            if x != copy:
                set.clear(x)
                set.update(x, copy)
        for x in (*self._empty, *self._of_bare()):
            if len(x):
                (OrderedDict if isinstance(x, OrderedDict) else base_of(x)).clear(x)
        for x, copy in self._dicts:
            make_so(dict.__setitem__, dict.__delitem__, x, x, copy)
            if not identical([*dict.keys(x)], [*copy]):  # in another order
                dict.clear(x)
                dict.update(x, copy)
        for x, copy in self._steps:
            now = {name: x.__dict__[name] for name in x.user_attributes()}
            make_so(setattr, delattr, x, now, copy)
        every = not self.named.isdisjoint(_BY_NAME)
        for x, copy in self._spaces.values():  # other threads may be at work there too
            names = (x.keys() | copy.keys()) if every else self.named
            names = [k for k in names if k != "__warningregistry__"]
            now, before = ({k: d[k] for k in names if k in d} for d in (x, copy))
            make_so(dict.__setitem__, dict.__delitem__, x, now, before)
        for cell, value in self._cells:
            if value is not UNSET:
                cell.cell_contents = value
            elif cell_value(cell) is not UNSET:
                del cell.cell_contents
        for x, values in self._slots:
            for member, value in values:
                with contextlib.suppress(AttributeError):  # it is readonly, and has not changed
                    if value is not UNSET:
                        member.__set__(x, value)
                    elif read_slot(member, x) is not UNSET:
                        member.__delete__(x)
        for cls, held in self._classes:
            now = {k: v for k, v in vars(cls).items() if not k.startswith("__")}
            before = {k: v for k, v in held.items() if not k.startswith("__")}
            make_so(type.__setattr__, type.__delattr__, cls, now, before)
        for put_back in self._put_back:
            put_back()


@functools.lru_cache(10_000)
def _kind(cls: type) -> str:
    """The method of Snapshot for objects of a class."""
    module = module_of(cls)
    for bases, method in _KINDS:
        if issubclass(cls, bases):
            return method
    if module.partition(".")[0] in _CLOSED:
        return "_nothing"
    if module.startswith("tracejit"):
        return "_compiled" if hasattr(cls, "user_attributes") else "_nothing"
    return "_object"


_PARTS = ("__self__", "__func__", "func", "args", "keywords", "fget", "fset", "fdel")
_KINDS = (
    (torch.Tensor, "_tensor"),
    (FunctionType, "_function"),
    (ModuleType, "_module"),
    (type, "_class"),
    (CellType, "_cell"),
    (randomness.GENERATORS, "_random"),
    (np.ndarray, "_array"),
    (iterators.KINDS, "_iterator"),
    ((MethodType, functools.partial, functools.partialmethod), "_parts"),
    ((staticmethod, classmethod, property, functools.cached_property), "_parts"),
    (functools._lru_cache_wrapper, "_cached"),
    (weakref.ref, "_weak"),
    ((int, float, str, bytes), "_nothing"),
)


_COPIES = ("_dicts", "_ordered", "_sequences", "_sets", "_cells", "_slots", "_classes", "_steps")


class Known:
    """What a snapshot found, to be copied again on later calls without looking for it."""

    def __init__(self, found: Snapshot):
        self.of = found.of()
        self._note_ids()
        self.save, self.named = found._save, found.named
        self.foreign, self.modules = found.foreign, found.modules
        self._calls = 0

    def again(self, roots: Sequence[object]) -> Snapshot:
        """A snapshot of it, and of what a call brings."""
        self._calls += 1
        if self._calls % _PRUNED == 0:
            self._let_go()
        return Snapshot(roots, self)

    def _let_go(self) -> None:
        """Drop what nobody else holds any more."""
        for name, held in self.of.items():
            if name == "_bare":
                self.of[name] = [ref for ref in held if ref() is not None]
            else:
                self.of[name] = [x for x in held if sys.getrefcount(x) > 3]
        self._note_ids()

    def _note_ids(self) -> None:
        copied = (held for name, held in self.of.items() if name != "_bare")
        self.ids = frozenset(id(x) for held in copied for x in held)

    def unknown(self, found: Snapshot, roots: Sequence[object]) -> bool:
        """Whether the step can reach something now that a snapshot of this has no copy of; for
        after `restore`. The snapshot gets to know the names that the step's code has."""
        now = Snapshot(roots)
        mine = {id(x) for held in found.of().values() for x in held}
        found.named |= now.named
        found.foreign |= now.foreign
        found.modules |= now.modules
        theirs = now.of()
        theirs["_bare"] = []
        return any(id(x) not in mine for held in theirs.values() for x in held)
