"""A call of the host: what a library does in a launch, such as LAPACK or torch.distributed."""

from __future__ import annotations

from tracejit.ir.literals import print_literal
from tracejit.ir.ops import Op
from tracejit.records import dataclass


@dataclass(frozen=True, slots=True)
class HostCall:
    """The last buffer = op(the others, **attrs), each of its shape, whole and row-major.

    A collective is two calls, of the `phase` "start" and "wait": in between its operands are read,
    and its result is written.
    """

    op: Op
    attrs: tuple[tuple[str, object], ...]
    shapes: tuple[tuple[int, ...], ...]
    where: str = ""
    phase: str = ""

    @property
    def is_collective(self) -> bool:
        """Whether the ranks of a process group make it together."""
        return self.op.family == "collective"

    @property
    def matrices(self) -> tuple[int, ...]:
        """The shape of the matrices that the call is about."""
        shape = self.shapes[0]
        if self.op.name == "lu_solve":
            shape = (*self.shapes[1][:-1], self.shapes[1][-2])
        return shape

    def __str__(self) -> str:
        attrs = "".join(f" {key}={print_literal(value)}" for key, value in self.attrs)
        *operands, result = map(str, self.shapes)
        word = self.phase or "call"
        return f"{word} {' '.join([self.op.name, *operands])} -> {result}{attrs}"
