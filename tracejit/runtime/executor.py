"""The interface that all executors share: a Plan in, something callable on memory out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

from tracejit.records import dataclass
from tracejit.schedule.kernel import Kernel
from tracejit.schedule.memory import Layout, layout_of
from tracejit.schedule.plan import Plan


class Source(Protocol):
    """The text of what a loaded plan runs: a name, and how a file of its language ends."""

    name: str
    suffix: str
    text: str


@dataclass(frozen=True)
class CallText:
    """A call of the host where others have a source."""

    kernel: Kernel
    suffix: ClassVar[str] = ".txt"

    @property
    def name(self) -> str:
        call = self.kernel.call
        return "_".join(["host", call.op.name, *([call.phase] if call.phase else [])])

    @property
    def text(self) -> str:
        return str(self.kernel)


class LoadedPlan(Protocol):
    """A plan ready to run, by the lines of `inlined`. Everything that does not depend on addresses
    has been done.

    sources: of each launch, as the executor launches: what it really runs.

    Addresses are of element 0 of every buffer, in the order of `plan.buffers` (for arena buffers
    where the layout has them), then of memory that the kernels work in, if the layout has any.
    Scalars are the table, one float64 per slot. An executor that places memory in its own way says
    how: `layout`.
    """

    sources: Sequence[Source]

    def timed(self, addresses: Sequence[int], scalars: Sequence[float]) -> list[float]:
        """Run all launches, and say how many seconds each source's took."""

    def bytes_moved(self) -> Sequence[int]:
        """Of each source, the bytes of unique addresses loaded plus those stored."""

    def lines(self) -> Sequence[Sequence[str]]:
        """Of each source, the user's lines that it computes, as file:line."""


def memory_of(loaded: LoadedPlan, plan: Plan) -> Layout:
    """Where a loaded plan's kernels work."""
    return getattr(loaded, "layout", None) or layout_of(plan)


@dataclass(frozen=True)
class Inlined:
    """A run of a plan as lines of Python.

    gather: puts everything in place; nothing of the caller's is written.
    run:    the line that runs the plan.
    ran:    an expression: whether it has, for a `run` that goes to its end whatever happens; None
            where an interrupt may stop it halfway.
    names:  what the lines refer to.
    undone: a run that raises has put back what it had written.
    """

    gather: Sequence[str]
    run: str
    ran: str | None
    names: Mapping[str, object]
    undone: bool = False


def inlined(
    loaded: LoadedPlan, addresses: Sequence[tuple[str, int]], scalars: Sequence[str]
) -> Inlined:
    """The lines that run a loaded plan: its own, or else a call with all addresses and scalars.
    An address is an expression, and bytes from there; a scalar is an expression."""
    if hasattr(loaded, "inlined"):
        return loaded.inlined(addresses, scalars)
    places = [f"{base} + {offset}" if offset else base for base, offset in addresses]
    run = f"loaded([{', '.join(places)}], [{', '.join(scalars)}])"
    return Inlined((), run, None, {"loaded": loaded}, getattr(loaded, "undoes", False))


class Executor(Protocol):
    """Turns plans into loaded plans. One for a GPU that is not here says so (`computes` is False):
    its plans come as far as their launches, which are nothing. `gpu`: plans are those of a GPU."""

    name: str
    gpu: bool

    def load(self, plan: Plan) -> LoadedPlan:
        """Prepare a plan's kernels; they may be shared with plans loaded earlier."""
