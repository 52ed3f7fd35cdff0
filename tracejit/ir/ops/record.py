"""The record of one primitive, and the registry of all of them.

A primitive is one `Op` holding every rule and every fact about it; none has a default:

infer   types (and literals) in, result type out; raises InvalidGraph on a malformed use
eval    numpy arrays in compute dtypes (and literals) in, array out; the reference semantics
vjp     one function per argument, `(b, g, y, *args, **attrs) -> cotangent`, written in primitives
        with the builder `b`; or NO_GRAD where the derivative is zero almost everywhere. `...` at
        the end: the same function for each further argument; the last argument may be left out
cost    of one element of the largest operand or result, in a vector loop on a CPU: an addition,
        or a load from a cache, is 1; 0 where nothing runs on the device
exact   whether all machines compute the same bits
rounds  whether a result may be no number of the operands' dtype, even where they are
host    the same on Python's floats, as an expression over {0} and {1}; None where only the device
        computes it. It is in float64; rounding it to a narrow dtype gives what the primitive gives

How a primitive prints in a language stands in the language's table beside its printer.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from tracejit.errors import InvalidGraph
from tracejit.ir.types import Type
from tracejit.records import dataclass


class Exact(Enum):
    """Whether all machines compute the same bits."""

    BITS = "yes, IEEE arithmetic fixes them: constants are folded"
    EDGES = "but for what C leaves open or eager refuses: the sign of a zero, x // 0, x << 64"
    ULPS = "no, the last bits differ"


BITS, EDGES, ULPS = Exact
NO_GRAD = None
OPS: dict[str, Op] = {}


@dataclass(frozen=True, eq=False, slots=True)
class Op:
    """One primitive; creating it registers it."""

    name: str
    family: str
    infer: Callable
    eval: Callable
    vjp: tuple[Callable | None, ...]
    cost: int
    exact: Exact
    rounds: bool
    host: str | None

    def __post_init__(self) -> None:
        for rule in ("infer", "eval", "vjp", "cost", "exact", "rounds"):
            if getattr(self, rule) is None:
                raise InvalidGraph(reason=f"primitive {self.name} has no rule {rule!r}")
        if self.name in OPS:
            raise InvalidGraph(reason=f"primitive {self.name} is registered twice")
        OPS[self.name] = self

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple:
        return op_named, (self.name,)

    def rules(self, operands: int) -> tuple[Callable | None, ...]:
        """`vjp`, for so many operands where their number is free."""
        if self.vjp and self.vjp[-1] is ...:
            first = self.vjp[:-1]
            return (*first, *first[-1:] * (operands - len(first)))[:operands]
        return self.vjp

    def result_type(self, operands: tuple, attrs: dict[str, object]) -> Type:
        """`infer`, with the number of operands and the names of attributes checked as well."""
        if len(operands) != len(self.rules(len(operands))):
            raise InvalidGraph(
                reason=f"{self.name} takes {len(self.vjp)} operands, not {len(operands)}"
            )
        try:
            return self.infer(*operands, **attrs)
        except TypeError as error:
            raise InvalidGraph(reason=f"{self.name} with attributes {attrs}: {error}") from error


def op_named(name: str) -> Op:
    """The primitive of a name; what copies and pickles of an Op call."""
    return OPS[name]


def require_tensor(name: str, x: object) -> None:
    """Raise InvalidGraph unless an operand is a tensor (no literal, no host scalar)."""
    if not isinstance(x, Type) or x.is_host:
        raise InvalidGraph(reason=f"{name} needs a tensor operand, not {x}")


def require(condition: bool, reason: str) -> None:
    """Raise InvalidGraph unless the condition holds."""
    if not condition:
        raise InvalidGraph(reason=reason)
