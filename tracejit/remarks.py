"""What a compiled step says of itself: warnings, and why calls were not replayed."""

from __future__ import annotations

from collections import deque

from tracejit.capture.trace import location
from tracejit.errors import TracejitWarning
from tracejit.pipeline import Stats
from tracejit.quotes import quote

_MANY_PLANS = 9  # from this number of plans on, a step is told that it makes many
_MANY_RETRACES = 20  # or of failed guards, where these are more than the replays


class Remarks:
    """The remarks on one step."""

    def __init__(self, name: str, stats: Stats):
        self._name, self._stats = name, stats
        self.retraces: deque[str] = deque(maxlen=100)  # why calls were not replayed
        self._warned: set[str] = set()

    def retraced(self, why: str) -> None:
        """A call was not replayed although a replay was armed."""
        self.retraces.append(why)
        self._stats.retraces += 1

    def warn_of_many(self, varying: str) -> None:
        """Warn of a step that keeps making plans. `varying`: what makes it do so, where known."""
        stats = self._stats
        often = stats.retraces >= _MANY_RETRACES and stats.retraces > stats.replays
        if varying or stats.compiles >= _MANY_PLANS or often:
            last = "; ".join(list(self.retraces)[-3:]) or "its Python takes another path"
            self.warn(
                "plans",
                varying
                or f"has made {stats.compiles} plans and was traced again {stats.retraces} times "
                f"because something that it reads changed. Latest causes: {last}. Pass what "
                "changes as a float argument or a tensor, and keep shapes to a few sizes",
            )

    def warn(self, kind: str, what: str, where: str = "") -> None:
        """Warn, once for each kind of warning, and quote the user's line."""
        if kind not in self._warned:
            self._warned.add(kind)
            location.warn(f"tracejit: {self._name} {what}.{quote(where)}", TracejitWarning)
