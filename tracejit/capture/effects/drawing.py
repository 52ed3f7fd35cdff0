"""The draws of a step as lines of Python: what a call does with random generators before its plan.

In: the events of a captured step, in order. Out: lines that leave the numbers of the k-th event in
`draw{k}`. A traced call has drawn already. A replay draws anew; it first takes the states of the
generators, so that a call that fails, or turns out to go another way, leaves them as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tracejit.capture.trace.draws import Draw, Event, Restore, Sampled, Seed


class DrawLines:
    """Writes the lines; `names` is their namespace, which grows here."""

    def __init__(self, events: Sequence[Event], names: dict[str, object], *, replayed: bool):
        self.events, self.names, self.replayed = events, names, replayed
        self._done = 0 if replayed else len(events)
        self._used = sorted({event.generator for event in events}) if replayed else []

    def drawn(self) -> list[str]:
        """The lines of a traced call."""
        numbers = (k for k, event in enumerate(self.events) if isinstance(event, Draw))
        return [f"draw{k} = call.drawn[{k}]" for k in numbers]

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

    def missing(self, count: int | None) -> Iterator[Event]:
        """The events up to a number of them, or all, that no line does yet; `do` is called for
        each."""
        last = len(self.events) if count is None else count
        while self._done < last:
            if isinstance(self.events[self._done], Sampled):  # its cut draws
                self._done += 1
            else:
                yield self.events[self._done]

    def do(self, numbers: Sequence[str]) -> str:
        """The line that does the next event with its numbers, which are expressions."""
        k, event = self._done, self.events[self._done]
        self._done += 1
        self.names[f"do{k}"] = event.prepared()
        if isinstance(event, Restore):
            numbers = [f"draw{event.kept}"]
        line = f"do{k}({', '.join((f'rng{event.generator}', *numbers))})"
        return line if isinstance(event, (Restore, Seed)) else f"draw{k} = {line}"
