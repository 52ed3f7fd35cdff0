"""The record of one primitive, and the registry of all of them.

A primitive is one `Op` holding every rule about it:

infer   types (and literals) in, result type out; raises InvalidGraph on a malformed use
eval    numpy arrays in compute dtypes (and literals) in, array out; the reference semantics
vjp     one function per argument, `(b, g, y, *args, **attrs) -> cotangent`, written in primitives
        with the builder `b`; or NO_GRAD where the derivative is zero almost everywhere
triton  how it prints in Triton: a template over its operands, one per dtype kind, or a marker
c       how it prints in C, likewise
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from tracejit.errors import InvalidGraph
from tracejit.ir.types import Type


class Print(Enum):
    """How primitives without a template of their own reach generated code."""

    INDEX = "becomes an index map of the loads below it"
    STAGE = "printed by the stage that it reduces"
    TEMPLATE = "a hand-written kernel takes it as its core"
    HOST = "runs on the host, as Python arithmetic"


Template = str | dict[str, str] | Print
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
    triton: Template
    c: Template

    def __post_init__(self) -> None:
        for rule in ("infer", "eval", "vjp", "triton", "c"):
            if getattr(self, rule) in (None, ""):
                raise InvalidGraph(reason=f"primitive {self.name} has no rule {rule!r}")
        if self.name in OPS:
            raise InvalidGraph(reason=f"primitive {self.name} is registered twice")
        OPS[self.name] = self

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple:
        return op_named, (self.name,)

    def result_type(self, operands: tuple, attrs: dict[str, object]) -> Type:
        """`infer`, with the number of operands and the names of attributes checked as well."""
        if len(operands) != len(self.vjp):
            raise InvalidGraph(
                reason=f"{self.name} takes {len(self.vjp)} operands, not {len(operands)}"
            )
        try:
            return self.infer(*operands, **attrs)
        except TypeError as error:
            raise InvalidGraph(reason=f"{self.name} with attributes {attrs}: {error}") from error

    def template(self, language: str, kind: str) -> str:
        """The template of this op in "triton" or "c" for operands of dtype kind f, i, u or b."""
        template = getattr(self, language)
        if isinstance(template, dict):
            order = (kind, "i", "f") if kind in "ub" else (kind, "f")
            template = next((template[k] for k in order if k in template), None)
        if not isinstance(template, str):
            raise InvalidGraph(reason=f"{self.name} has no {language} template for kind {kind!r}")
        return template


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
