"""Frozen dataclasses with slots of which a step makes ten thousands: nodes, values, indices.

That of `dataclasses` sets each field through `object.__setattr__`, which looks its name up. Here
the slots' own setters do, in less than half of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """`dataclass(frozen=True, slots=True)`, for fields with and without plain defaults."""
    made = dataclass(frozen=True, slots=True)(cls)
    made.__init__ = _init(made)
    return made


def _init(cls: type) -> Callable[..., None]:
    known: dict[str, object] = {"__name__": cls.__module__}
    params, lines = ["self"], []
    for field in fields(cls):
        if field.kw_only or not field.init or field.default_factory is not MISSING:
            raise TypeError(f"{cls.__qualname__}.{field.name} is no field of a record")
        known[f"set_{field.name}"] = getattr(cls, field.name).__set__
        known[f"default_{field.name}"] = field.default
        given = "" if field.default is MISSING else f"=default_{field.name}"
        params.append(f"{field.name}{given}")
        lines.append(f"set_{field.name}(self, {field.name})")
    exec(f"def __init__({', '.join(params)}):\n    " + "\n    ".join(lines or ["pass"]), known)
    init = known["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__annotations__ = dict(cls.__annotations__)
    return init
