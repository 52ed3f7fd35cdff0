"""What one step remembers of its traces: a tree of events with a Captured step at each end."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import field

import torch

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import slots
from tracejit.capture.follow.events import Call, Event, New, Point, news
from tracejit.capture.python import leftovers
from tracejit.capture.trace.scalars import TracedInt
from tracejit.ir.graph import Node, Value
from tracejit.records import dataclass

_LEFTOVERS = 4  # traces after which integers are searched for
_MAX_ENDS = 64  # paths remembered by one step
_MAX_BRANCHES = 16  # calls remembered that follow one call
_PATIENCE = 32  # once so many more traces left the tree than stayed on it, it is not followed
_FEW = 4  # numbers that one place makes text of, each of which may have a path
_LOST = 6  # texts of one place that were not found, after which none is looked for
_PAUSE = 256  # traces until following is tried again


@dataclass(eq=False, slots=True)
class End:
    """The end of a path: what was captured, and at which positions of the path its tensors are."""

    captured: Captured
    reals: tuple[int, ...]  # the captured step's outside tensors, by position
    made: dict[int, int]  # position -> the tensor made for it
    escaped: tuple[tuple[int, int], ...]  # (position, made tensor)
    items: tuple[tuple[int, Value], ...]  # tensors whose number was read after the user's code
    hosted: tuple[Node, ...]  # and the arithmetic on runtime scalars that came up then
    news: tuple[New, ...] = ()  # the proxies of the way
    # what calls do, by precision of products and alignment of the outside tensors; the driver's
    runs: dict[tuple, object] = field(default_factory=dict)
    holding: frozenset[int] = frozenset()  # positions of tensors that somebody holds afterwards

    def __post_init__(self) -> None:
        self.holding = frozenset(at for at, _ in self.escaped)

    @property
    def key(self) -> tuple:
        """What tells the ends of one path apart."""
        effects = self.captured.effects
        trees = (effects.returned, *(tree for *_, tree in effects.stores))
        wanted = {index for tree in trees for index in slots(tree)}
        returned = frozenset(at for at, index in self.made.items() if index in wanted)
        done = effects.host, effects.returned, effects.stores, effects.callbacks
        return returned, self.holding, *done


class Recall:
    """The traces that one step remembers."""

    def __init__(self) -> None:
        self._leftovers = 0  # traces after which user code had integers that are runtime scalars
        self._searches = 2 * _LEFTOVERS
        self.kept = self.left = 0  # traces that stayed on a known path to its end, or left it
        self._roots: dict[tuple, Point] = {}
        self._texts: defaultdict[tuple, set[float]] = defaultdict(set)  # numbers, by place
        self.lost_texts: Counter[tuple] = Counter()  # by the place that made them
        self._ends = 0
        self._patience = _PATIENCE
        self._paused = 0

    @property
    def useful(self) -> bool:
        """Whether it is worth comparing calls with those of earlier traces."""
        return self.left - self.kept < self._patience

    def make_plain(self, numbers: list) -> None:
        """Take runtime scalars out of what user code has kept: floats, which are floats for
        everybody, after the first few traces only."""
        left = leftovers.kept(numbers)
        integers = any(type(x) is TracedInt for x in left)
        if integers or (left and self._searches):
            numbers.clear()
            self._searches -= bool(self._searches)
            self._leftovers += integers
            leftovers.make_plain(left)
            if self.keeps_numbers:
                self._roots.clear()  # traces that gave it others

    @property
    def keeps_numbers(self) -> bool:
        """Whether user code keeps integers again and again."""
        return self._leftovers >= _LEFTOVERS

    def many_texts(self, place: tuple, number: float) -> bool:
        """Whether a place of the user's code makes text of more than a few numbers, this one
        included."""
        numbers = self._texts[place]
        if len(numbers) <= _FEW:
            numbers.add(number)
        return len(numbers) > _FEW

    def keeps_text(self, place: tuple) -> bool:
        """Whether text that a place makes is looked for where it is kept."""
        return self.lost_texts[place] < _LOST

    def begin(self) -> bool:
        """Whether a new trace is compared: if that is useful, or was not for a long time."""
        if not self.useful:
            self._paused += 1
            if self._paused == _PAUSE:  # one trace to learn the way, one to go it
                self._paused, self._patience = 0, self.left - self.kept + 2
        return self.useful

    def root(self) -> Point:
        """Where traces begin in the present state of torch."""
        modes = torch._C._len_torch_function_stack()
        world = torch.get_default_dtype(), torch.get_default_device() if modes else None, modes
        found = self._roots.get(world)
        if found is None:
            found = self._roots[world] = Point()
        return found

    def add(self, root: Point, events: list[Event], end: End) -> None:
        """Remember a trace."""
        if self._ends >= _MAX_ENDS:
            self._roots.clear()
            self._ends, root = 0, self.root()
        point, way = root, []
        for event in events:
            key = event.key
            found = next((e for e in point.events if e is event or e.key == key), None)
            if found is None:
                if len(point.events) >= _MAX_BRANCHES:
                    del point.events[0]
                found = event
                point.events.append(event)
            point = found.then
            if type(found) is Call:
                way += news(found.result)
        end.news = tuple(way)
        if not any(e.key == end.key for e in point.ends):
            point.ends.append(end)
            self._ends += 1
