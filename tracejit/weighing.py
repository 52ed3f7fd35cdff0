"""Whether calls that can only be rerun are faster in eager.

    2·N reruns are timed → N eager calls are timed → the medians of the last N of both decide

A rerun runs the user's Python under the tracer, which costs more than a small step wins by its
kernels. If eager is faster, the next 1024 calls are eager ones, or so many that they take a hundred
times as long as what follows: N reruns are timed again. If it is not, calls stay reruns, and are
timed no more.
"""

from __future__ import annotations

import statistics

_N = 8
_AHEAD = 0.95  # of a rerun's time, at which eager counts as faster
_EAGER = 1024  # eager calls at least before reruns are timed again
_SHARE = 100  # times as long as those reruns eager calls take at least


class Weighing:
    """The times of the calls of one kind, in seconds, and what they say."""

    __slots__ = ("_reruns", "_eagers", "_why", "_over", "verdict")

    def __init__(self) -> None:
        self._reruns: list[float] = []
        self._eagers: list[float] = []
        self._why = ""
        self._over = False
        self.verdict = ""  # why eager is the better one, once it is

    @property
    def wants_eager(self) -> bool:
        """Whether eager calls are to be timed."""
        return len(self._reruns) >= 2 * _N and len(self._eagers) < _N

    def reran(self, seconds: float, why: str) -> None:
        """A call was rerun, because of `why`."""
        if not self._over:
            self._reruns.append(seconds)
            self._why = why

    def close(self) -> None:
        """No more calls are timed."""
        self._over = True

    def ran_eagerly(self, seconds: float) -> None:
        """A call ran eagerly."""
        self._eagers.append(seconds)

    def eager_calls(self) -> int:
        """How many calls are to run eagerly now."""
        self.verdict = ""
        if self.wants_eager:
            return _N - len(self._eagers)
        if self._over or not self._eagers or len(self._reruns) < _N:
            return 0
        rerun, eager = (statistics.median(x[-_N:]) * 1e6 for x in (self._reruns, self._eagers))
        self._reruns.clear()
        self._over = eager >= _AHEAD * rerun
        if self._over:
            return 0
        self.verdict = (
            f"an eager call takes {eager:.0f} µs, a rerun {rerun:.0f}, and its Python has to run "
            f"on every call: {self._why}"
        )
        return max(_EAGER, round(_SHARE * _N * rerun / eager))
