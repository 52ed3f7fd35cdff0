"""The draws of a step as lines of Python: what a call does with random generators before its plan.

In: the events of a captured step, in order. Out: lines that leave the numbers of the k-th event in
`draw{k}`. A traced call has drawn already. A replay draws anew; it first takes the states of the
generators, so that a call that fails, or turns out to go another way, leaves them as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import groupby

from torch import Generator, Tensor

from tracejit.capture.trace.draws import Called, Draw, Event, Restore, Sampled, Seed, Together
from tracejit.capture.trace.tensor import is_dense
from tracejit.ir.graph import Arg, Value
from tracejit.ir.types import b1, f32, f64
from tracejit.runtime import streams
from tracejit.runtime.streams import Stream

Expressions = Callable[[Sequence[Arg]], list[str]]  # of numbers that are operands of the graph


class DrawLines:
    """Writes the lines; `names` is their namespace, which grows here.

    replayed: whether they draw.
    streamed: whether C of ours may draw; see `runtime/streams.py`.
    """

    def __init__(
        self, events: Sequence[Event], names: dict[str, object], *, replayed: bool, streamed: bool
    ):
        self.events, self.names = events, names
        self.streamed = streamed and replayed and bool(events) and streams.available()
        self._rows = {
            k: (whole, row)
            for whole, event in enumerate(events)
            if isinstance(event, Together)
            for row, k in enumerate(event.rows)
        }
        self._done = 0 if replayed else len(events)
        self._used = sorted({event.generator for event in events}) if replayed else []

    def drawn(self, alone: Collection[int]) -> list[str]:
        """The lines of a traced call. Some draws are read alone, whether they are rows or not."""
        lines = []
        for k, event in enumerate(self.events):
            if isinstance(event, (Called, Draw)) and (k in alone or k not in self._rows):
                lines.append(f"draw{k} = call.drawn[{k}]")
            elif isinstance(event, Together):
                self.names[f"put_together{k}"] = event.prepared()
                lines.append(f"draw{k} = put_together{k}(call.drawn)")
        return lines

    def begin(self) -> list[str]:
        """Before anything is drawn."""
        lines = []
        for k in self._used:
            lines += [f"rng{k} = call.generators[{k}]", f"state{k} = rng{k}.get_state()"]
        return lines

    def undo(self) -> list[str]:
        """Put the generators back."""
        return [f"rng{k}.set_state(state{k})" for k in self._used]

    def otherwise(self, condition: str) -> list[str]:
        """Leave with nothing changed if a condition holds."""
        leave = "; ".join([*self.undo(), "return OTHERWISE"])
        return [f"if {condition}: {leave}"]

    def lines(self, count: int | None, numbers: Expressions) -> Iterator[str]:
        """The lines that do the events up to a number of them, or all, that none does yet."""
        last = len(self.events) if count is None else count
        while self._done < last:
            first = self._done
            rows = self._run_of_rows(last)
            if len(rows) > 1:
                self._done += len(rows)
                yield self._all_rows(first, rows)
                continue
            run = self._run(last) if self.streamed else []
            if sum(event.type.numel for event in run) >= streams.WORTH:
                self._done += len(run)
                yield self._stream(first, run, numbers)
                continue
            event = self.events[first]
            self._done += 1
            if first in self._rows:
                yield from self._row(first, event, numbers)
            elif not isinstance(event, (Sampled, Together)):  # a cut's, and what rows have filled
                yield self._alone(first, event, numbers)

    def _alone(self, k: int, event: Event, numbers: Expressions) -> str:
        self.names[f"do{k}"] = event.prepared()
        kept = [f"draw{event.kept}"] if isinstance(event, Restore) else numbers(event.numbers)
        line = f"do{k}({', '.join((f'rng{event.generator}', *kept))})"
        return line if isinstance(event, (Restore, Seed)) else f"draw{k} = {line}"

    def _row(self, k: int, event: Draw, numbers: Expressions) -> Iterator[str]:
        """The lines of a draw that fills its row."""
        whole, row = self._rows[k]
        given = [f"rng{event.generator}", *numbers(event.numbers)]
        if event.type.device == "cpu":
            self.names[f"do{k}"] = event.filling(self._into(k, event))
        else:  # new memory in each call
            if row == 0:
                self.names[f"memory{whole}"] = self.events[whole].buffer
                yield f"draw{whole} = memory{whole}()"
            self.names[f"do{k}"] = _filling(event)
            given.insert(0, f"draw{whole}[{row}]")
        yield f"draw{k} = do{k}({', '.join(given)})"

    def _into(self, k: int, event: Draw) -> Tensor:
        """The memory of a draw, which all calls use."""
        if k in self._rows:
            whole, row = self._rows[k]
            name = f"draw{whole}"
            if name not in self.names:
                self.names[name] = self.events[whole].buffer()
            return self.names[name][row]
        return event.buffer()

    def _run_of_rows(self, last: int) -> list[Draw]:
        """The next events that are rows, of one generator, and the same in each call."""
        found: list[Draw] = []
        for k, event in enumerate(self.events[self._done : last], self._done):
            plain = k in self._rows and not any(isinstance(x, Value) for x in event.numbers)
            if not plain or event.type.device != "cpu":
                break
            if found and event.generator != found[0].generator:
                break
            found.append(event)
        return found

    def _all_rows(self, first: int, rows: Sequence[Draw]) -> str:
        """The line that fills all of them: as many as C can at once, in turn with the others."""
        fills: list[Callable[[Generator], object]] = []
        for of_c, several in groupby(enumerate(rows, first), lambda x: self._is_streamed(x[1])):
            several = [(self._into(k, event), event) for k, event in several]
            if of_c and sum(memory.numel() for memory, _ in several) >= streams.WORTH:
                made = [Stream(x, e.numbers[0] if e.type.dtype is b1 else 0.0) for x, e in several]
                fills.append(streams.filler(made))
                continue
            for memory, event in several:
                fills.append(partial(_fill, event.filling(memory), event.numbers))
        self.names |= {f"draw{k}": self._into(k, event) for k, event in enumerate(rows, first)}

        def fill_all(generator: Generator) -> None:
            for fill in fills:
                fill(generator)

        self.names[f"fill{first}"] = fill_all
        return f"fill{first}(rng{rows[0].generator})"

    def _is_streamed(self, event: Event) -> bool:
        return self.streamed and _streams(event)

    def _run(self, last: int) -> list[Draw]:
        """The next events that are draws of one generator which C can make."""
        found: list[Draw] = []
        for event in self.events[self._done : last]:
            if not _streams(event) or (found and event.generator != found[0].generator):
                break
            found.append(event)
        return found

    def _stream(self, first: int, run: Sequence[Draw], numbers: Expressions) -> str:
        """The line that makes several draws at once."""
        made, given = [], []
        for k, event in enumerate(run, first):
            chance = event.numbers[0] if event.type.dtype is b1 else 0.0
            if isinstance(chance, Value):
                given += numbers([chance])
                chance = None
            self.names[f"draw{k}"] = self._into(k, event)
            made.append(Stream(self.names[f"draw{k}"], chance))
        self.names[f"fill{first}"] = streams.filler(made)
        return f"fill{first}({', '.join((f'rng{run[0].generator}', *given))})"


def _fill(
    fill: Callable[..., Tensor], numbers: Sequence[float | int], generator: Generator
) -> None:
    fill(generator, *numbers)


def _filling(event: Draw) -> Callable[..., Tensor]:
    return lambda memory, *given: event.filling(memory)(*given)


def _streams(event: Event) -> bool:
    """Whether C can make a draw: a mask, or numbers in [0, 1), in memory without gaps."""
    if not isinstance(event, Draw) or event.type.device != "cpu":
        return False
    if not is_dense(event.type.shape, event.strides):
        return False
    if event.fill == "bernoulli_":
        chance = event.numbers[0]
        return event.type.dtype is b1 and (isinstance(chance, Value) or 0 <= chance <= 1)
    plain = not any(isinstance(x, Value) for x in event.numbers)
    return (
        event.fill == "uniform_"
        and event.type.dtype in (f32, f64)
        and plain
        and (event.numbers == (0, 1))
    )
