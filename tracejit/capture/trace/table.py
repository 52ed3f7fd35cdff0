"""The one table from torch functions to capture rules, filled by `capture/functions/`.

A `Rule` is called as `rule.run(trace, *args, **kwargs)` with the arguments that the user gave, and
returns what the user gets; its record says what it is derived from. A family module registers its
rules with `rule(torch.f, Tensor.f, …)`, and element-wise functions as one `Row` each (`rows.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FrameType
from typing import Literal

import torch

from tracejit.ir.graph import Value
from tracejit.records import dataclass

Formula = Callable[..., Value]


def no_numbers() -> tuple:
    """The signature of a function that takes tensors only."""
    return ()


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """An element-wise torch function: its formulas in primitives, and how torch computes it.

    `value(t, *inputs, *numbers)` is the result; `slopes` hold torch's derivative for each input,
    `slope(t, g, y, *inputs, *numbers)` of the cotangent g and the result y. Without any, the
    primitives' own derivatives serve.
    """

    names: str  # "neg negative __neg__": all of torch's names; the first stands in errors
    value: Formula
    slopes: tuple[Formula, ...] = ()
    # torch's signature after the inputs, giving the numbers of the formulas
    numbers: Callable[..., tuple] = no_numbers
    arity: int = 1  # how many inputs: tensors, or numbers next to a tensor
    # what becomes of dtypes: all stay as they are; integers become floats; only floats are taken
    dtypes: Literal["any", "to_float", "floats"] = "any"
    # bf16 and f16 are computed in f32 and rounded once; if not, or without slopes, each primitive
    # rounds
    wide: bool = True
    flat: bool = False  # the slopes do not vary with the inputs: straight lines between kinks
    row_major: bool = False  # the result's strides, whatever those of the inputs are

    def __post_init__(self) -> None:
        if len(self.slopes) not in (0, self.arity):
            raise ValueError(f"{self.name} has {self.arity} inputs and {len(self.slopes)} slopes")

    @property
    def name(self) -> str:
        return self.names.split()[0]


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """What is called in place of a torch function, and what it is derived from."""

    run: Callable[..., object]
    family: str  # the module of capture/functions that it belongs to
    of: Rule | None = None  # the rule that it is another form of, and how it differs
    form: Literal["", "in place", "signature", "list"] = ""
    row: Row | None = None  # its formulas, if it is element-wise

    @property
    def own(self) -> Rule:
        """The rule that it is an in-place form or another signature of; else itself."""
        return self.of.own if self.form in ("in place", "signature") else self


class Rules(dict[Callable, Rule]):
    """The rule of each torch function; ValueError at a second one, as one would hide the other."""

    def __setitem__(self, function: Callable, rule: Rule) -> None:
        first = self.setdefault(function, rule)
        if first.run is not rule.run:
            places = " and ".join(f"{f.__module__}.{f.__qualname__}" for f in (first.run, rule.run))
            raise ValueError(f"{function_name(function)} has two rules: {places}")


RULES = Rules()

# what is called in their place if a complex tensor or number is among the arguments
OF_COMPLEX: dict[Callable, Callable[..., object]] = {}

# functions of a trace and further arguments, for what reaches it by another way than a torch call:
# later traces compare these as they compare torch calls
COMPARED: set[Callable] = set()

# functions whose call does not say all: from the caller's frame to further keyword arguments
BY_CALLER: dict[Callable, Callable[[FrameType], dict[str, object]]] = {}


def family_of(implementation: Callable) -> str:
    """The module of capture/functions that an implementation stands in."""
    return implementation.__module__.rpartition(".")[2]


def rule(*functions: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated function as the rule of these torch functions."""

    def register(implementation: Callable) -> Callable:
        made = Rule(implementation, family_of(implementation))
        for function in functions:
            RULES[function] = made
        return implementation

    return register


def spellings(name: str) -> Iterator[Callable]:
    """The torch functions of a name: torch.<name>, Tensor.<name>, special and functional ones."""
    seen: list[Callable] = []
    everywhere = (torch, torch.Tensor, torch._C._nn, torch.nn.functional, torch.special)
    for namespace in (torch.Tensor,) if name.startswith("__") else everywhere:
        function = getattr(namespace, name, None)  # torch.__eq__ is the module's own
        if callable(function) and function not in seen:
            seen.append(function)
            yield function


def function_name(function: Callable) -> str:
    """A torch function's name as a user would write it."""
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", None) or repr(function)
    if name in ("__get__", "__set__", "__delete__"):
        return f"Tensor.{getattr(owner, '__name__', '?')}"
    objclass = getattr(function, "__objclass__", None)
    qualified = getattr(function, "__qualname__", name)
    if objclass is not None or qualified.startswith(("Tensor.", "TensorBase.")):
        return f"Tensor.{name}"
    module = getattr(function, "__module__", None) or "torch"
    return f"{module}.{name}".replace("torch._C._nn.", "torch.nn.functional.")
