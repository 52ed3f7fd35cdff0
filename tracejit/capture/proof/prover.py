"""When a step may be replayed: the proof over its first traces.

A replay is armed when two traces agree, all that ran is known to be pure, all that it read is
guarded, and it changed nothing of that. `Prover` keeps what is known between the calls of a step.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from types import FunctionType

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import Call
from tracejit.capture.effects.fields import has_float_fields
from tracejit.capture.effects.hyperparameters import has_floats
from tracejit.capture.effects.variables import Record, Variable, is_remade, same
from tracejit.capture.proof.guards import (
    Armed,
    arm,
    doubtful,
    pinned_arguments,
    pinned_stores,
    reasons_against,
    survey,
)
from tracejit.capture.proof.heap import Walk
from tracejit.capture.proof.kept_texts import read_texts
from tracejit.capture.proof.looks import APPENDED, LOOKED_AT, only_keyed_by_texts, only_used_so
from tracejit.capture.proof.watch import Seen, origin
from tracejit.capture.python.bytecode import line_of
from tracejit.capture.trace.scalars import Path, Scalars
from tracejit.errors import ReplayNotArmed

PROOFS = 4  # traces of each new program that are watched, to arm a replay
_SEARCHES = 8  # traces that may tell more about a step's state variables
# In a row for the same reasons, after which only new programs are watched, less long; in a step of
# which no path can be replayed, or where the reasons may pass.
_REFUSALS = 3
_LINE = re.compile(r"(^|\bat )\S+:\d+")  # of a file
_FEW = 4  # numbers that a plan may be good for one of
_WAIT = 8  # traces after that, until one is watched once more; each time four times as many
_AGREE = "two traces have to agree first"


class Prover:
    """What is known of a step that may be replayed, and why it is not yet.

    programs: how many the step may have at a time.
    """

    def __init__(self, function: FunctionType, mode: str, programs: int):
        self.function, self.mode = function, mode
        self.why = "it has not been called"
        self.warning = ""  # what keeps the step in rerun for good, once
        self._most = PROOFS * programs
        self._ran: Seen | None = None  # what watched traces ran
        self._left = PROOFS
        self._refused = 0  # how often in a row, for the same reasons
        self._asked = False  # whether this trace is to be watched
        self._wait, self._waits = 0, _WAIT  # traces to go until one is watched again, and next time
        self.variables: list[Variable] = []  # places that the step is known to assign
        self._plain: set[tuple] = set()  # those whose numbers it takes as plain ones
        self._shown: set[tuple] = set()  # of these, those of traces that are refused anyway
        self._replayable = False  # whether there was one that is not
        # numbers that it takes as plain ones and has computed of a variable
        self._derived: defaultdict[tuple, set] = defaultdict(set)
        self._remade: set[str] = set()  # the paths of lists and dicts that it makes anew
        # in an earlier call, by what the place is called, or as an argument
        self._numbers: dict[str | Path, float] = {}
        self.integers: set[Path] = set()  # arguments that vary, and are runtime scalars
        self.records: list[Record] = []  # lists that it only appends to
        self.aliases: list[Variable] = []  # where functions of math are by other names
        self.tables: list[Variable] = []  # where a number may be looked up
        self._searches = _SEARCHES

    @property
    def watching(self) -> bool:
        """Whether the next trace is watched."""
        return self.mode != "rerun" and self._left > 0

    @property
    def places(self) -> tuple[list[Variable], list[Record], list[Variable], list[Variable]]:
        """The state variables, records, aliases of functions of math, and tables, as `bind.run`
        takes them."""
        return self.variables, self.records, self.aliases, self.tables

    def survey(self, args: tuple, kwargs: dict) -> Walk | None:
        """The guard lines about Python state before a watched trace, if they can be written."""
        self._asked = self.watching
        if self._wait and not self._asked:  # what grows at first, such as a deque, stays at last
            self._wait -= 1
            self._left = 0 if self._wait else 2
            return None
        first = self._ran is None and self.mode != "replay"
        if self.watching and first and has_float_fields((*args, *kwargs.values())):
            walk = self._survey(args, kwargs)
            self.variables = [v for v, x in walk.held if _is_field(v, x)]
        if self.watching and not first:
            walk = self._survey(args, kwargs)
            self.variables, self.records = _here(self.variables, walk), walk.records
            self.aliases, self.tables = walk.aliases, walk.looked_up
            return walk
        return None

    def _survey(self, args: tuple, kwargs: dict) -> Walk:
        return survey(self.function, args, kwargs, self._ran, self.records, self._remade)

    def missed(self) -> None:
        """Replays are there, and none takes a call: what they ask may have become a variable since.
        A number that only a rare path assigns is seen to vary late."""
        if self.mode != "rerun" and not self._left and not self._wait:
            self._wait, self._waits = self._waits, 4 * self._waits

    def over(self) -> None:
        """A trace is over: what was this call's only is let go."""
        self.variables = [variable.released() for variable in self.variables]
        self.records = [record.released() for record in self.records]
        self.aliases = [place for place in self.aliases if place.lasting]
        self.tables = [place for place in self.tables if place.lasting]

    def leave_integers(self, scalars: Scalars) -> None:
        """Integers stay plain in a trace: user code keeps them in places that nobody watches."""
        scalars.pins_integers = True
        integers = {v.id for v in self.variables if v.holds_integer()}
        self._plain |= integers | self.integers
        self.integers = set()
        self.variables = [v for v in self.variables if v.id not in integers]

    def built(self) -> None:
        """A program was built: some more traces are watched."""
        more = 2 if self._refused >= _REFUSALS else PROOFS
        self._left = min(self._left + more, self._most)

    def prove(
        self,
        walk: Walk | None,
        ran: Seen | None,
        args: tuple,
        kwargs: dict,
        captured: Captured,
        call: Call,
        traced: int,
    ) -> Armed | None:
        """A replay's guard, or None, and then `why` says what is missing.

        traced: how often the same was captured, this time included.
        Raises ReplayNotArmed in mode "replay".
        """
        if self.mode == "rerun":
            self.why = 'mode="rerun" was asked for'
            return None
        if ran is None:
            if self._asked:
                self.why = "another profiler is active (sys.setprofile)"
            return None
        self._left -= 1
        before = self._ran
        self._ran = ran if before is None else before.joined(ran)
        if walk is None:
            self.why = _AGREE
            return None
        reasons, lines = reasons_against(walk, ran, captured), walk.lines
        reasons += read_texts(walk, ran, captured, call)
        if self._learns(walk, ran, captured, call, refused=bool(reasons)):
            self.why = _AGREE
            return None
        armed = None
        if not reasons:
            armed = arm(walk, self.function, captured, call)
            reasons = [armed] if isinstance(armed, str) else _changes(armed, args, kwargs, ran)
        reasons = [*map(self._located, reasons)]
        incomplete = before is not None and not (
            before.covers(ran) or self._survey(args, kwargs).lines == lines
        )
        if reasons and not incomplete:
            lasting = bool(ran.refusals or walk.refusals or doubtful(walk, ran))
            self._refuse(reasons, lasting=lasting)
            if lasting:
                self.warning = self.why
            return None
        if reasons or incomplete or (traced < 2 and self.mode != "replay"):
            self.why = _AGREE
            return None
        return armed

    def _learns(
        self, walk: Walk, ran: Seen, captured: Captured, call: Call, *, refused: bool
    ) -> bool:
        """Whether this trace has told more about the state variables: then two more have to agree.

        What a trace has changed of what it reads, is one from now on, and a number that is another
        one than in an earlier call. But one that a trace takes as a plain number, and changes, is
        none: there would be a plan for each value. What is computed of it, such as its remainder,
        may be one of a few numbers. What a trace does that is `refused` anyway, such as to print
        the number, says nothing of those that can be replayed, once there are such.
        """
        if not refused and not self._replayable:
            self._replayable = True
            self._plain -= self._shown
        pinned, derived = pinned_stores(captured, call)
        if refused and self._replayable:
            pinned, derived = set(), set()
        for id_, number in derived:
            self._derived[id_].add(number)
        pinned |= {id_ for id_, _ in derived if len(self._derived[id_]) > _FEW}
        if refused:
            self._shown |= pinned - self._plain
        self._plain.update(pinned)
        known = {v.id for v in self.variables}
        self.variables = [v for v in self.variables if v.id not in pinned]
        found = [
            variable
            for variable, before in walk.held
            if variable.id not in known | self._plain
            and not (id(variable.holder) in walk.groups and has_floats(before))
            and (
                variable.changed(before)
                or self._varies(variable, before)
                or _is_field(variable, before)
            )
        ]
        vary = {path for path, x in walk.integers.items() if self._numbers.get(path, x) != x}
        taken = self.integers & pinned_arguments(captured)
        new = vary - self.integers - self._plain
        self.integers = (self.integers | new) - taken
        self._plain |= taken
        self._numbers = {v.path: x for v, x in walk.held if type(x) in (int, float)}
        self._numbers |= walk.integers
        grown = [record for record, before in walk.lists if _grown(record, before, walk, ran)]
        read = [r for r in walk.records if not _is_record(r, walk, ran, looked_at=r.looked_at)]
        if read:
            self.records = [r for r in self.records if all(r.items is not x.items for x in read)]
        remade = [place for place, x in walk.containers if _is_remade(place, x)]
        anew = {place.path for place in remade} - self._remade
        if self._searches and (found or pinned or grown or read or anew or new or taken):
            self._searches -= 1
            self._left = max(self._left, 2)
            self.variables += {v.id: v for v in found}.values()
            self.records += grown
            self._remade |= anew
            self.variables += [p for p in remade if type(p.get()) is not defaultdict]
            return True
        return False

    def _located(self, why: str) -> str:
        """A reason with a line of the user's: that of the step, if it names none."""
        code = self.function.__code__
        at = f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}: "
        return why if _LINE.search(why) else at + why

    def _varies(self, variable: Variable, number: object) -> bool:
        """Whether a place held another number in an earlier call."""
        earlier = self._numbers.get(variable.path)
        return type(earlier) is type(number) and not same(earlier, number)

    def _refuse(self, reasons: list[str], *, lasting: bool) -> None:
        more = f"; and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        why = "; ".join(reasons[:4]) + more
        alike = re.sub(r"\d+", "#", why) == re.sub(r"\d+", "#", self.why)
        self.why, self._refused = why, self._refused + 1 if alike else 1
        # The traces of a path that prints in every tenth call say nothing of the other nine.
        if self._refused >= _REFUSALS and not (lasting and self._replayable):
            self._left = 0
            if not lasting and not self._wait:
                self._wait, self._waits = self._waits, 4 * self._waits
        if self.mode == "replay":
            raise ReplayNotArmed(reason=self.why)


def _is_field(variable: Variable, x: object) -> bool:
    """Whether a place is a field of an argument, as that of a batch, and holds a float: a runtime
    scalar, as floats are that are arguments themselves."""
    return type(x) is float and not variable.lasting


def _is_remade(place: Variable, before: object) -> bool:
    try:
        return is_remade(before, place.get())
    except (LookupError, ValueError):
        return False


def _grown(record: Record, before: list | dict, walk: Walk, ran: Seen) -> bool:
    """Whether a trace has appended to a list, or put something new into a dict, and does nothing
    else with it."""
    now, was = (_flat(x) for x in (record.items, before))
    if len(now) <= len(was) or any(a is not b for a, b in zip(was, now, strict=False)):
        return False
    return _is_record(record, walk, ran, looked_at=True)


def _flat(x: list | dict) -> list:
    return x if type(x) is list else [part for pair in x.items() for part in pair]


def _is_record(record: Record, walk: Walk, ran: Seen, *, looked_at: bool) -> bool:
    """Whether all code of the user's that ran does no more than append to a list, or look at it; or
    than put something into a dict."""
    if type(record.items) is dict:
        return only_keyed_by_texts(record.place, walk.places, ran.codes)
    allowed = LOOKED_AT if looked_at else APPENDED
    return only_used_so(record.place, walk.places, ran.codes, allowed)


def _here(variables: list[Variable], walk: Walk) -> list[Variable]:
    """The places of variables in this call: they may be in other objects now."""
    same = {variable.id: variable for variable, _ in walk.held}
    alike = {variable.path: variable for variable, _ in walk.held}
    return [same.get(v.id) or alike.get(v.path, v) for v in variables]


def _changes(armed: Armed, args: tuple, kwargs: dict, ran: Seen) -> list[str]:
    """What the step changed although it reads it: the guard describes the state before the trace,
    and fails now."""
    found: list[int] = []
    after = armed.guard(args, kwargs, found)
    if type(after) is str:
        mine = [code for code in ran.codes if origin(code) == "user"]
        line = line_of(after.partition(" was ")[0], mine, stored=True)
        return [f"{line}it changes what it reads: {after}"]
    return [] if found == armed.found else ["it puts a tensor where another was"]
