"""A step's torch calls as a program of one call a line, which can be run, cut and printed.

    the step, eagerly, under a `Recorder` → a Program: inputs with their values, calls as text

A call is text with places for variables, so that a program crosses processes, and what is printed
is what was run. A call that cannot be written down, such as one that is given an object of the
user's, is left out: what it gives is an input of what follows. A custom autograd function is one
call, and its class stands before the program.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import field, replace
from unittest.mock import patch

import torch
from torch.autograd.function import _SingleLevelFunction
from torch.overrides import TorchFunctionMode, resolve_name

from tracejit.capture.trace import location
from tracejit.capture.trace.tensor import tensors_of
from tracejit.records import dataclass
from tracejit.verify.definitions import CannotDefine, definitions

_MOST = 2000  # calls
_MODES = ("_set_grad_enabled", "_set_grad_enabled_by_guard")  # what calls say themselves
_BYTES = 256 << 20  # of values that are kept to cut a program anywhere


class CannotRecord(Exception):
    """A step of which there is no program."""


@dataclass(frozen=True)
class Call:
    """One torch call.

    text:   how it is written, with {3} for variable 3; "" for one that gives what it took.
    uses:   the variables that it takes, and gives: those that it gives, None for other results.
    many:   whether it gives a tuple.
    grad:   whether grad mode is on.
    line:   the user's line.
    cast:   the region of autocast that it stands in, as it is written.
    of:     the custom autograd function that it applies.
    """

    text: str
    uses: tuple[int, ...]
    gives: tuple[int | None, ...]
    many: bool = False
    grad: bool = True
    line: str = ""
    cast: str = ""
    of: str = ""

    @property
    def within(self) -> str:
        """What it stands in, as it is written."""
        return ", ".join(["torch.no_grad()"] * (not self.grad) + [self.cast] * bool(self.cast))


@dataclass(frozen=True)
class Program:
    """Calls in order. `values` has what each variable holds when it is first there, `leaves` are
    variables that require grad where they are inputs, and `classes` has the texts that define each
    custom autograd function."""

    calls: tuple[Call, ...]
    values: dict[int, torch.Tensor]
    leaves: frozenset[int]
    classes: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def inputs(self) -> list[int]:
        """The variables that no call gives before another takes them."""
        made: set[int] = set()
        found: dict[int, None] = {}
        for call in self.calls:
            found.update((v, None) for v in call.uses if v not in made)
            made.update(v for v in call.gives if v is not None)
        return list(found)

    @property
    def ends(self) -> list[int]:
        """The variables that no later call takes, or that one has changed in place."""
        left: dict[int, None] = {}
        for call in self.calls:
            for v in call.uses:
                left.pop(v, None)
            changed = call.uses[:1] if not call.gives else ()  # in place
            left.update((v, None) for v in (*call.gives, *changed) if v is not None)
        given = set(self.inputs)
        return [v for v in left if v not in given]

    def of(self, calls: Iterable[Call]) -> Program:
        """The program of these calls."""
        return replace(self, calls=tuple(calls))

    def arguments(self) -> list[torch.Tensor]:
        """Copies of the inputs."""
        return [
            self.values[v].clone().requires_grad_(v in self.leaves and _floats(self.values[v]))
            for v in self.inputs
        ]

    def text(self) -> str:
        """The program as a function of its inputs."""
        names = {v: _name(i) for i, v in enumerate(self.inputs)}
        lines, within = [], ""
        for call in self.calls:
            for v in call.gives:
                if v is not None and v not in names:
                    names[v] = _name(len(names))
            shown = call.text.format(*(names[v] for v in call.uses))
            if call.gives:
                left = ", ".join("_" if v is None else names[v] for v in call.gives)
                left = f"({left},)" if call.many and len(call.gives) == 1 else left
                shown = f"{left} = {shown}"
            if call.within != within:
                within = call.within
                lines += [f"    with {within}:"] if within else []
            indent = "        " if within else "    "
            lines.append(f"{indent}{shown}" + (f"  # {call.line}" if call.line else ""))
        ends = [names[v] for v in self.ends]
        lines.append(f"    return {', '.join(ends)}" if ends else "    return None")
        given = ", ".join(names[v] for v in self.inputs)
        defined: dict[str, str] = {}
        for call in self.calls:
            defined |= self.classes.get(call.of, {})
        return "\n".join([*_defining(defined), f"def step({given}):", *lines, ""])


def _defining(texts: dict[str, str]) -> list[str]:
    """Lines that define what stands before a program."""
    found = list(dict.fromkeys(texts.values()))
    imports = [x for x in found if x != "import torch as torch" and "\n" not in x]
    return [*imports, *(f"\n\n{x}" for x in found if "\n" in x), *["\n"] * bool(found)]


def _name(number: int) -> str:
    """a, b, …, z, a1, …"""
    return chr(ord("a") + number % 26) + (str(number // 26) if number >= 26 else "")


def _floats(t: torch.Tensor) -> bool:
    return t.is_floating_point()


def recorded(function: Callable) -> Program:
    """The program of one call of a step, made eagerly. CannotRecord where there is none."""
    recorder = Recorder()

    def apply(cls: type, *args: object) -> object:
        return recorder.applied(cls, super(_SingleLevelFunction, cls).apply, args)

    with patch.object(_SingleLevelFunction, "apply", classmethod(apply), create=True), recorder:
        function()
    program = Program(tuple(recorder.calls), recorder.values, frozenset(recorder.leaves))
    return replace(program, classes=recorder.classes)


@dataclass
class Recorder(TorchFunctionMode):
    """Writes down each torch call."""

    calls: list[Call] = field(default_factory=list)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    leaves: set[int] = field(default_factory=set)
    classes: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._known: dict[int, int] = {}  # id of a tensor -> its variable
        self._kept: list[torch.Tensor] = []
        self._bytes = 0
        self._inside = False  # of a custom function's forward

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        return self._noted(
            lambda use: _written(func, args, kwargs, use), lambda: func(*args, **kwargs)
        )

    def applied(self, cls: type, apply: Callable, args: tuple) -> object:
        """A custom autograd function is applied."""
        if self._inside:
            return apply(*args)

        def written(use: Callable[[torch.Tensor], int]) -> str | None:
            try:
                found = definitions(cls)
                given = [_shown(x, use) for x in args]
            except (CannotDefine, CannotRecord):
                return None
            if self.classes.setdefault(cls.__name__, found) != found:
                return None
            return f"{cls.__name__}.apply({', '.join(given)})"

        self._inside = True  # this is no torch call: the mode is on
        try:
            return self._noted(written, lambda: apply(*args), cls.__name__)
        finally:
            self._inside = False

    def _noted(self, written: Callable, run: Callable, of: str = "") -> object:
        """Make a call, and write it down."""
        if len(self.calls) >= _MOST:
            raise CannotRecord(f"it makes more than {_MOST} torch calls")
        known = len(self.values)
        uses: list[int] = []
        text = written(lambda t: self._use(t, uses))
        line, grad, cast = location.short(), torch.is_grad_enabled(), _cast()
        out = run()
        if text is None:  # what it gives is an input of what follows
            return out
        made = tensors_of(out)
        if out is not None and not made:  # a number, a shape: nothing is computed
            for v in range(known, len(self.values)):
                del self.values[v]
            self._known = {k: v for k, v in self._known.items() if v < known}
            self.leaves = {v for v in self.leaves if v < known}
            return out
        if isinstance(out, torch.Tensor) and id(out) in self._known:
            gives: tuple[int | None, ...] = ()  # in place, or an attribute that was asked before
        elif isinstance(out, torch.Tensor):
            gives = (self._variable(out),)
        elif isinstance(out, (tuple, list)):
            gives = tuple(self._variable(x) if isinstance(x, torch.Tensor) else None for x in out)
        elif out is None:
            gives = ()
        else:
            return out
        self.calls.append(
            Call(
                text,
                tuple(uses),
                gives,
                not isinstance(out, torch.Tensor) and out is not None,
                grad,
                line,
                cast,
                of,
            )
        )
        return out

    def _use(self, t: torch.Tensor, uses: list[int]) -> int:
        """The place of a tensor among those that a call takes."""
        v = self._known.get(id(t))
        if v is None:
            v = self._variable(t)
        if v not in uses:
            uses.append(v)
        return uses.index(v)

    def _variable(self, t: torch.Tensor) -> int:
        if id(t) in self._known:
            return self._known[id(t)]
        v = self._known[id(t)] = len(self.values)
        self._kept.append(t)
        self._bytes += t.numel() * t.element_size()
        if t.layout is not torch.strided or t.is_meta or self._bytes > _BYTES:
            raise CannotRecord("its tensors are too large, or have no memory of their own")
        with torch._C.DisableTorchFunction():
            self.values[v] = t.detach().clone()
        if t.requires_grad:
            self.leaves.add(v)
        return v


def _cast() -> str:
    """The region of autocast that is on, as it is written; "" where none is."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            return f'torch.autocast("{device}", {torch.get_autocast_dtype(device)})'
    return ""


def _shown(x: object, use: Callable[[torch.Tensor], int]) -> str:
    """An argument as text."""

    def shown(x: object) -> str:
        if isinstance(x, torch.Tensor):
            return f"{{{use(x)}}}"
        if isinstance(x, (torch.Size, tuple)) and type(x) in (torch.Size, tuple):
            return f"({', '.join(map(shown, x))}{',' * (len(x) == 1)})"
        if type(x) is list:
            return f"[{', '.join(map(shown, x))}]"
        if type(x) is dict:
            return "{{" + ", ".join(f"{shown(k)}: {shown(v)}" for k, v in x.items()) + "}}"
        if type(x) is slice:
            return f"slice({shown(x.start)}, {shown(x.stop)}, {shown(x.step)})"
        if type(x) is float and (x != x or x in (float("inf"), float("-inf"))):
            return f'float("{x}")'
        if x is Ellipsis:
            return "..."
        if isinstance(x, torch.device):
            return f'torch.device("{x}")'
        if x is None or type(x) in (bool, int, float, complex, str):
            return repr(x).replace("{", "{{").replace("}", "}}")
        if isinstance(x, (torch.dtype, torch.memory_format, torch.layout)):
            return str(x)
        raise CannotRecord(f"a torch call is given an object of type {type(x).__name__}")

    return shown(x)


def _written(
    func: Callable, args: tuple, kwargs: dict, use: Callable[[torch.Tensor], int]
) -> str | None:
    """A call as text; None where it is none, such as one that is given an object of the user's."""

    def shown(x: object) -> str:
        return _shown(x, use)

    name = _name_of(func)
    if name.rpartition(".")[2] in _MODES:
        return None
    try:
        if name.endswith(("Tensor.__getitem__", "Tensor.__setitem__")):
            found = f"{shown(args[0])}[{_index(args[1], shown)}]"
            return found + "".join(f" = {shown(x)}" for x in args[2:])
        given = [shown(x) for x in args]
        given += [f"{k}={shown(x)}" for k, x in kwargs.items() if not _is_default(func, k, x)]
    except CannotRecord:
        return None
    if not name:
        return None
    method = name.removeprefix("torch.Tensor.")
    if method == name:
        return f"{name}({', '.join(given)})"
    first, *rest = given
    if method.endswith(".__get__"):
        return f"{first}.{method.removesuffix('.__get__')}"
    if method.endswith(".__set__"):
        return f"{first}.{method.removesuffix('.__set__')} = {rest[0]}"
    return f"{first}.{method}({', '.join(rest)})"


def _index(x: object, shown: Callable[[object], str]) -> str:
    """An index as it is written in brackets."""
    if type(x) is tuple and x:
        return ", ".join(_index(i, shown) for i in x) + "," * (len(x) == 1)
    if type(x) is not slice:
        return shown(x)
    first, last, step = ("" if i is None else shown(i) for i in (x.start, x.stop, x.step))
    return f"{first}:{last}" + (f":{step}" if step else "")


def _is_default(func: Callable, name: str, x: object) -> bool:
    """Whether an argument is what it would be anyway."""
    try:
        default = inspect.signature(func).parameters[name].default
    except (TypeError, ValueError, KeyError):
        return x is None
    return x is default or (type(x) is type(default) and isinstance(x, (int, str)) and x == default)


def _name_of(func: Callable) -> str:
    """The name by which a torch function is found."""
    try:
        name = resolve_name(func)
    except Exception:
        name = None
    if name is None:
        name = f"{getattr(func, '__module__', '')}.{getattr(func, '__qualname__', '')}"
        found: object = torch
        for part in name.split(".")[1:]:
            found = getattr(found, part, None)
        name = name if found is func else ""
    return name if name.startswith("torch.") else ""
