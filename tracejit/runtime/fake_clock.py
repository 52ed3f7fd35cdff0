"""Which work on memory is known to come before which: a clock for each stream and for the host.

A stream's clock counts its own work, and remembers how far it knows the others to be: since it
waited for an event, or since the host had waited before it gave the work. Two pieces of work on the
same memory, one of which writes, must know each other; else they may run in either order, and that
is a `Fault`, whatever order they have run in here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import field

from tracejit.records import dataclass

HOST = "the host"
Times = dict[
    object, int
]  # per actor (a stream or the host), how much of its work is known to be over


class Fault(BaseException):
    """The order of some work is left to chance. It derives from no Exception, so that nothing on
    its way takes it for something else."""


@dataclass
class _Span:
    """Memory from `start` to `end`, and the latest work on it."""

    start: int
    end: int
    written: tuple[object, int, str] | None = None  # by whom, when, by what
    read: dict[object, tuple[int, str]] = field(default_factory=dict)  # by whom: when, by what

    def upto(self, end: int) -> _Span:
        """A part of it."""
        return _Span(self.start, end, self.written, dict(self.read))


class Clocks:
    """The clocks of a device, and what was done to its memory."""

    def __init__(self) -> None:
        self._times: dict[object, Times] = {}
        self._starts: list[int] = []
        self._spans: list[_Span] = []

    def times(self, actor: object) -> Times:
        """What an actor knows; a copy."""
        return dict(self._times.get(actor, {}))

    def tick(self, actor: object) -> int:
        """The actor does the next piece of work."""
        times = self._times.setdefault(actor, {})
        times[actor] = times.get(actor, 0) + 1
        return times[actor]

    def learn(self, actor: object, times: Mapping[object, int]) -> None:
        """From now on an actor knows what these times say."""
        mine = self._times.setdefault(actor, {})
        for other, time in times.items():
            mine[other] = max(mine.get(other, 0), time)

    def knows(self, actor: object, other: object, time: int) -> bool:
        """Whether the other's work of that time is over before the actor's next."""
        return actor == other or self._times.get(actor, {}).get(other, 0) >= time

    def reads(self, actor: object, start: int, nbytes: int, what: str) -> None:
        """The actor's present work reads memory."""
        now = self._times[actor][actor]
        for span in self._over(start, start + nbytes):
            self._check_written(actor, span, what, "reads")
            span.read[actor] = now, what

    def writes(self, actor: object, start: int, nbytes: int, what: str) -> None:
        """The actor's present work overwrites memory."""
        now = self._times[actor][actor]
        for span in self._over(start, start + nbytes):
            self._check_written(actor, span, what, "writes")
            for other, (time, reader) in span.read.items():
                if not self.knows(actor, other, time):
                    raise Fault(
                        f"{what} on {named(actor)} overwrites memory at {span.start:#x} that "
                        f"{reader} on {named(other)} may still read: no event between them"
                    )
            span.written, span.read = (actor, now, what), {}

    def _check_written(self, actor: object, span: _Span, what: str, does: str) -> None:
        if span.written is not None:
            other, time, writer = span.written
            if not self.knows(actor, other, time):
                raise Fault(
                    f"{what} on {named(actor)} {does} memory at {span.start:#x} that {writer} on "
                    f"{named(other)} may still write: no event between them"
                )

    def _over(self, start: int, end: int) -> list[_Span]:
        """The spans that make up [start, end): those there are are cut, gaps are filled."""
        if start >= end:
            return []
        first = max(0, bisect_right(self._starts, start) - 1)
        while first < len(self._spans) and self._spans[first].end <= start:
            first += 1
        last = bisect_left(self._starts, end)
        new: list[_Span] = []
        inside: list[_Span] = []
        at = start
        for span in self._spans[first:last]:
            if span.start < start:
                new.append(span.upto(start))
                span.start = start
            if at < span.start:
                inside.append(_Span(at, span.start))
                new.append(inside[-1])
            at = span.end
            if span.end > end:
                inside.append(span.upto(end))
                new.append(inside[-1])
                span.start = end
            else:
                inside.append(span)
            new.append(span)
        if at < end:
            inside.append(_Span(at, end))
            new.append(inside[-1])
        self._spans[first:last] = new
        self._starts[first:last] = [span.start for span in new]
        return inside


def named(actor: object) -> str:
    """An actor in a message."""
    return actor if isinstance(actor, str) else f"stream {actor}"
