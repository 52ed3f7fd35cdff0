"""Dataclasses that are cheap to define and to make.

`import tracejit` defines some three hundred. `dataclasses` compiles up to six methods of each, and
that takes as long as all else of the import; here an `__init__` is compiled for the first object,
and the other methods are closures. Of some classes a step makes ten thousands: nodes, values,
indices. Their fields are set by the slots' own setters, in less than half of the time of
`object.__setattr__`, which looks names up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, Field, FrozenInstanceError
from operator import attrgetter
from reprlib import recursive_repr
from types import MemberDescriptorType
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(field_specifiers=(dataclasses.field,))
def dataclass(
    cls: type[T] | None = None, *, frozen: bool = False, slots: bool = False, eq: bool = True
) -> type[T] | Callable[[type[T]], type[T]]:
    """`dataclasses.dataclass` with these arguments; `fields`, `replace`, `asdict` and patterns take
    its classes."""
    if cls is None:
        return lambda cls: dataclass(cls, frozen=frozen, slots=slots, eq=eq)
    cls.__doc__ = cls.__doc__ or cls.__name__  # else one is made of the signature
    own = frozenset(vars(cls))
    hashed = vars(cls).get("__hash__") is not None
    made = dataclasses.dataclass(init=False, repr=False, eq=False, slots=slots)(cls)
    fields = dataclasses.fields(made)
    methods: list[Callable] = [_repr(fields), _first_init(made, frozen)]
    if eq:
        key = _key([f.name for f in fields if f.compare])
        methods.append(_eq(key))
        if frozen and not hashed:
            made.__hash__ = _hash(key)
        elif not hashed:
            made.__hash__ = None
    if frozen:
        methods += _refusals(made, frozenset(f.name for f in fields))
        methods += [_getstate, _setstate] if slots else []
    for method in methods:
        if method.__name__ not in own:
            method.__qualname__ = f"{made.__qualname__}.{method.__name__}"
            setattr(made, method.__name__, method)
    return made


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """`dataclass(frozen=True, slots=True)`."""
    return dataclass(cls, frozen=True, slots=True)


# ---- __init__


def _first_init(cls: type, frozen: bool) -> Callable[..., None]:
    """What compiles the `__init__` of a class when it is called, and puts it in its own place."""

    def __init__(self: object, *args: object, **kwargs: object) -> None:
        cls.__init__ = init = _init(cls, frozen)
        init(self, *args, **kwargs)

    return __init__


def _init(cls: type, frozen: bool) -> Callable[..., None]:
    known: dict[str, object] = {"__name__": cls.__module__, "MISSING": MISSING}
    fields = dataclasses.fields(cls)
    params = [_param(f, known) for f in fields if f.init and not f.kw_only]
    named = [_param(f, known) for f in fields if f.init and f.kw_only]
    lines = [line for f in fields for line in _lines(cls, f, frozen, known)]
    lines += ["self.__post_init__()"] * hasattr(cls, "__post_init__")
    head = ", ".join(["self", *params, *["*"] * bool(named), *named])
    exec(f"def __init__({head}):\n    " + "\n    ".join(lines or ["pass"]), known)
    init = known["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__annotations__ = {f.name: f.type for f in fields if f.init}
    return init


def _param(field: Field, known: dict[str, object]) -> str:
    if field.default is not MISSING:
        known[f"default_{field.name}"] = field.default
        return f"{field.name}=default_{field.name}"
    return field.name if field.default_factory is MISSING else f"{field.name}=MISSING"


def _lines(cls: type, field: Field, frozen: bool, known: dict[str, object]) -> list[str]:
    """Lines that set a field."""
    name, lines = field.name, []
    if field.default_factory is not MISSING:
        known[f"make_{name}"] = field.default_factory
        made = f"{name} = make_{name}()"
        lines.append(f"if {name} is MISSING: {made}" if field.init else made)
    elif not field.init:
        if field.default is MISSING:
            return []
        known[f"default_{name}"] = field.default
        lines = [f"{name} = default_{name}"]
    if not frozen:
        return [*lines, f"self.{name} = {name}"]
    slot = getattr(cls, name, None)
    if isinstance(slot, MemberDescriptorType):
        known[f"set_{name}"] = slot.__set__
        return [*lines, f"set_{name}(self, {name})"]
    known["set"] = object.__setattr__
    return [*lines, f"set(self, {name!r}, {name})"]


# ---- the other methods


def _key(names: list[str]) -> Callable[[object], object]:
    return attrgetter(*names) if names else lambda self: ()


def _eq(key: Callable[[object], object]) -> Callable[[object, object], bool]:
    def __eq__(self: object, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return key(self) == key(other)

    return __eq__


def _hash(key: Callable[[object], object]) -> Callable[[object], int]:
    def __hash__(self: object) -> int:
        return hash(key(self))

    return __hash__


def _repr(fields: tuple[Field, ...]) -> Callable[[object], str]:
    names = [f.name for f in fields if f.repr]

    @recursive_repr()
    def __repr__(self: object) -> str:
        shown = ", ".join([f"{name}={getattr(self, name)!r}" for name in names])
        return f"{self.__class__.__qualname__}({shown})"

    return __repr__


def _refusals(cls: type, names: frozenset[str]) -> list[Callable]:
    """What keeps objects as they are. As in `dataclasses` those of a subclass may have more."""

    def __setattr__(self: object, name: str, value: object) -> None:
        if type(self) is cls or name in names:
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super(cls, self).__setattr__(name, value)

    def __delattr__(self: object, name: str) -> None:
        if type(self) is cls or name in names:
            raise FrozenInstanceError(f"cannot delete field {name!r}")
        super(cls, self).__delattr__(name)

    return [__setattr__, __delattr__]


def _getstate(self: object) -> list[object]:
    return [getattr(self, f.name) for f in dataclasses.fields(self)]


def _setstate(self: object, state: list[object]) -> None:
    for f, value in zip(dataclasses.fields(self), state, strict=True):
        object.__setattr__(self, f.name, value)


_getstate.__name__, _setstate.__name__ = "__getstate__", "__setstate__"
