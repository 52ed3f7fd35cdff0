"""The ledger of a compiled step: what it costs, beside what it has to cost, and what holds it back.

A `Ledger` is data that `explain.py` makes. It prints (`str`), is plain data (`as_dict`, whose keys
docs/ledger.md lists), or a page (`html`). What runs on this machine is shown as it runs; beside it
stands how the same plans are launched on a GPU, and how long that should take (`roofline.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tracejit.gpus import EAGER
from tracejit.ledger_page import page
from tracejit.records import dataclass
from tracejit.tables import Columns, duration, joined, micro, size, table

Table = tuple[str, Sequence[object], Columns]  # title, rows, columns


@dataclass(frozen=True)
class LaunchCost:
    """A launch on the GPU: user lines, bytes at least and issued, steps, the predicted seconds and
    what they are spent on; `measured` where this GPU, or another one, runs it. In a loop it is made
    `times` times, for which all figures are but `steps`."""

    kernel: str
    lines: tuple[str, ...]
    bytes: int
    issued_bytes: int
    operations: int
    steps: int
    seconds: float
    bound: str
    measured: float | None = None
    times: int = 1


@dataclass(frozen=True)
class KernelCost:
    """A kernel that runs on the CPU, as its executor runs it; `measured` in seconds, if it was."""

    kernel: str
    lines: tuple[str, ...]
    bytes: int
    measured: float | None


@dataclass(frozen=True)
class CollectiveCost:
    """A collective: user lines, ranks of its group, the bytes that it is about, those that a rank
    sends, and the predicted seconds on the wire; the launches between its start and its wait, their
    seconds, and the share of its own that is hidden behind them."""

    collective: str
    lines: tuple[str, ...]
    ranks: int
    bytes: int
    sent: int
    seconds: float
    beside: int
    beside_seconds: float
    hidden: float


@dataclass(frozen=True)
class Efficiency:
    """What so many ranks should make of the step: the slowest link of a ring among `links`, the
    time of the launches alone over that of the step, and the share of the reduction hidden."""

    links: str
    ranks: int
    link: str
    efficiency: float
    hidden: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes: of the step's inputs, of what it returns or leaves behind in new tensors, of what its
    kernels work in; `peak` is what a call takes beyond its inputs; `eager_saved`: intermediates
    that eager would keep from forward to backward, beside its outputs; `computed_again`: those of
    checkpointed functions that are not kept until then."""

    inputs: int
    outputs: int
    arena: int
    peak: int
    eager_saved: int
    computed_again: int = 0


@dataclass(frozen=True)
class Ledger:
    """What a step costs. Times in seconds; None for what was not measured or cannot be said."""

    step: str
    mode: str
    device: str
    backend: str
    gpu: str
    precision: str
    launches: tuple[LaunchCost, ...]
    kernels: tuple[KernelCost, ...]  # on the CPU
    collectives: tuple[CollectiveCost, ...]
    scaling: tuple[Efficiency, ...]
    launches_before_fusion: int
    bytes_moved: int
    bytes_minimum: int
    bytes_issued: int
    flops: int
    sent_bytes: int
    hidden: float | None
    predicted_seconds: float
    measured_seconds: float | None
    eager_operations: int
    eager_seconds: float
    eager_given: bool
    compile_seconds: Mapping[str, float]
    pays_back_after: int | None
    memory: Memory
    holds_back: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """The ledger as plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = list(self.summary())
        width = max(len(name) for name, _ in rows)
        lines = [f"step {self.step}", *(f"  {name:<{width}}  {text}" for name, text in rows)]
        for title, rows, columns in self.tables():
            lines += ["", title, *table(rows, columns)]
        return "\n".join(lines)

    def html(self, path: str | Path) -> None:
        """Write a page that needs nothing else, no network either."""
        text = page(f"step {self.step}", list(self.summary()), self.tables(), "µs")
        Path(path).write_text(text, "utf-8")

    @property
    def launched(self) -> int:
        """How many launches a call has; those of a loop count in each of its steps."""
        return sum(x.times for x in self.launches)

    def summary(self) -> Iterator[tuple[str, str]]:
        """The lines of the ledger: a name, and what there is to say."""
        yield "mode", self.mode
        if not self.launches:
            return
        before, m = self.launches_before_fusion, self.memory
        yield "launches", f"{self.launched}; {before} before fusion"
        more = self.bytes_moved / max(1, self.bytes_minimum)
        yield (
            "bytes",
            f"{size(self.bytes_moved)} moved, {more:.2f} times the minimum of "
            f"{size(self.bytes_minimum)}; {size(self.bytes_issued)} issued on a GPU",
        )
        yield "flops", f"{self.flops:,}"
        yield f"on {self.gpu}", f"{duration(self.predicted_seconds)} predicted ({self.precision})"
        if self.measured_seconds is not None:
            where = f"on {self.device} by {self.backend}"
            yield "here", f"{duration(self.measured_seconds)} measured {where}, kernels alone"
        if self.collectives:
            yield "wire", self._wire()
        if self.eager_given:
            yield "eager", f"{duration(self.eager_seconds)}, as given"
        else:
            each = f"{self.eager_operations} operations of at least {duration(EAGER)} each"
            yield "eager", f"{duration(self.eager_seconds)} predicted on {self.gpu}: {each}"
        parts = ", ".join(f"{name} {duration(s)}" for name, s in self.compile_seconds.items())
        total = duration(sum(self.compile_seconds.values()))
        yield "compiling", f"{total} so far: {parts}"
        after = self.pays_back_after
        measured = self.eager_given and self.measured_seconds is not None
        by = "measured" if measured else "predicted"
        said = "never" if after is None else f"after {after:,} calls"
        if self.mode.startswith("replay"):
            yield "pays back", f"{said}, by {by} times"
        else:
            yield "pays back", "not known: each call runs the step's Python, which was not timed"
        yield (
            "memory",
            f"{size(m.peak)} beyond inputs of {size(m.inputs)}: outputs {size(m.outputs)}, arena "
            f"{size(m.arena)}; eager keeps {size(m.eager_saved)} for its backward beside outputs",
        )
        if m.computed_again:
            yield (
                "again",
                f"{size(m.computed_again)} of checkpointed functions, not kept until then",
            )
        for text in self.holds_back:
            yield "holds back", text

    def _wire(self) -> str:
        """What the collectives send, and how it scales."""
        count, took = len(self.collectives), sum(x.seconds for x in self.collectives)
        share = "" if self.hidden is None else f", {self.hidden:.0%} of it hidden"
        last = max(x.ranks for x in self.scaling)
        most = "; ".join(f"{x.efficiency:.0%} by {x.link}" for x in self.scaling if x.ranks == last)
        return (
            f"{size(self.sent_bytes)} sent by a rank in {count} collective{'s' * (count != 1)}, "
            f"{duration(took)} predicted{share}; efficiency with {last:,} ranks: {most}"
        )

    def tables(self) -> list[Table]:
        """Of the launches on a GPU, and of the kernels that run here."""
        found: list[Table] = []
        if self.launches:
            columns = dict(_LAUNCHES)
            if all(x.measured is None for x in self.launches):
                del columns["measured µs"]
            found.append((f"launches on {self.gpu}, as predicted", self.launches, columns))
        if self.collectives:
            title = "collectives, and what runs beside them"
            found.append((title, self.collectives, _COLLECTIVES))
            for links in dict.fromkeys(x.links for x in self.scaling):
                rows = [x for x in self.scaling if x.links == links]
                found.append((f"more ranks, by {links}, as predicted", rows, _SCALING))
        if self.kernels:
            title = f"kernels that run here, on {self.device} by {self.backend}"
            found.append((title, self.kernels, _KERNELS))
        return found


_LAUNCHES = {
    "kernel": lambda x: x.kernel if x.times == 1 else f"{x.times} × {x.kernel}",
    "bytes": lambda x: f"{x.bytes:,}",
    "issued": lambda x: f"{x.issued_bytes:,}",
    "operations": lambda x: f"{x.operations:,}",
    "steps": lambda x: f"{x.steps}",
    "µs": lambda x: micro(x.seconds),
    "bound": lambda x: x.bound,
    "measured µs": lambda x: micro(x.measured),
    "lines": lambda x: joined(x.lines),
}
_KERNELS = {
    "kernel": lambda x: x.kernel,
    "bytes": lambda x: f"{x.bytes:,}",
    "µs": lambda x: micro(x.measured),
    "lines": lambda x: joined(x.lines),
}
_COLLECTIVES = {
    "kernel": lambda x: x.collective,
    "ranks": lambda x: f"{x.ranks}",
    "bytes": lambda x: f"{x.bytes:,}",
    "sent": lambda x: f"{x.sent:,}",
    "µs": lambda x: micro(x.seconds),
    "launches beside": lambda x: f"{x.beside}",
    "their µs": lambda x: micro(x.beside_seconds),
    "hidden": lambda x: f"{x.hidden:.0%}",
    "lines": lambda x: joined(x.lines),
}
_SCALING = {
    "ranks": lambda x: f"{x.ranks:,}",
    "efficiency": lambda x: f"{x.efficiency:.1%}",
    "hidden": lambda x: "" if x.hidden is None else f"{x.hidden:.0%}",
    "bound": lambda x: x.link,
}
