"""When a step may be replayed: the proof over its first traces.

A replay is armed when two traces agree, all that ran is known to be pure, all that it read is
guarded, and it changed nothing of that. `Prover` keeps what is known between the calls of a step.
"""

from __future__ import annotations

import re
from types import FunctionType

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import Call
from tracejit.capture.proof.guards import Armed, arm, reasons_against, survey
from tracejit.capture.proof.heap import Walk
from tracejit.capture.proof.watch import Seen
from tracejit.errors import ReplayNotArmed

PROOFS = 4  # traces of each new program that are watched, to arm a replay
_REFUSALS = 3  # in a row for the same reasons, after which only new programs are watched, less long
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

    @property
    def watching(self) -> bool:
        """Whether the next trace is watched."""
        return self.mode != "rerun" and self._left > 0

    def survey(self, args: tuple, kwargs: dict) -> Walk | None:
        """The guard lines about Python state before a watched trace, if they can be written."""
        if self.watching and (self._ran is not None or self.mode == "replay"):
            return survey(self.function, args, kwargs, self._ran)
        return None

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
            if self._left > 0:
                self.why = "another profiler is active (sys.setprofile)"
            return None
        self._left -= 1
        before = self._ran
        self._ran = ran if before is None else before.joined(ran)
        if walk is None:
            self.why = _AGREE
            return None
        reasons, lines = reasons_against(walk, ran, captured), walk.lines
        armed = None
        if not reasons:
            armed = arm(walk, self.function, captured, call)
            reasons = [armed] if isinstance(armed, str) else _changes(armed, args, kwargs)
        incomplete = before is not None and not (
            before.covers(ran) or survey(self.function, args, kwargs, self._ran).lines == lines
        )
        if reasons and not incomplete:
            self._refuse(reasons)
            if ran.refusals or walk.refusals:
                self.warning = self.why
            return None
        if reasons or incomplete or (traced < 2 and self.mode != "replay"):
            self.why = _AGREE
            return None
        return armed

    def _refuse(self, reasons: list[str]) -> None:
        more = f"; and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        why = "; ".join(reasons[:4]) + more
        alike = re.sub(r"\d+", "#", why) == re.sub(r"\d+", "#", self.why)
        self.why, self._refused = why, self._refused + 1 if alike else 1
        if self._refused >= _REFUSALS:
            self._left = 0
        if self.mode == "replay":
            raise ReplayNotArmed(reason=self.why)


def _changes(armed: Armed, args: tuple, kwargs: dict) -> list[str]:
    """What the step changed although it reads it: the guard describes the state before the trace,
    and fails now."""
    found: list[int] = []
    after = armed.guard(args, kwargs, found)
    if type(after) is str:
        return [f"it changes what it reads: {after}"]
    return [] if found == armed.found else ["it puts a tensor where another was"]
