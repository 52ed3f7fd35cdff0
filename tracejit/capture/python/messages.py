"""Text of runtime scalars, where nobody gets it or a person does.

`log.debug(f"step {self.n}")` makes the text whether or not it is wanted. Text of a runtime scalar
is good for its number only; but where code does nothing with it but to hand it to a logger whose
level is above that, it may be any. What loggers take is guarded (`proof/kinds.py`).

Text that is printed is another one in each call, and a call that prints is not replayed. It pins no
number: a rerun makes its own text, and goes as the last call that printed. So it is with text of
which one place has made more than a few.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import FrameType

from tracejit.capture.python.classes import is_stream
from tracejit.capture.python.doubts import led_to
from tracejit.capture.python.kept import keep
from tracejit.capture.python.texts import Sink, sites
from tracejit.capture.trace import location
from tracejit.capture.trace.scalars import TracedFloat, TracedInt, plain

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_LOGGERS = frozenset({logging.Logger, type(logging.getLogger())})


def _is_dropped(frame: FrameType, sink: Sink) -> bool:
    """Whether the text that a frame formats now is for a logger that does not take it."""
    logger = led_to(frame, sink.chain)
    own = type(logger) in _LOGGERS and sink.name not in vars(logger)
    return own and not logger.isEnabledFor(_LEVELS[sink.name])


def _is_shown(frame: FrameType, sink: Sink) -> bool:
    """Whether text that a frame formats now is printed: `print` means Python's own in it, or what
    it writes to is a standard stream."""
    if sink.how == "write":
        return is_stream(led_to(frame, sink.chain))
    if sink.how != "print":
        return False
    return "print" not in frame.f_globals and frame.f_builtins.get("print") is print


def _asking(kind: type, name: str) -> Callable:
    """A method that makes text, which asks first who gets it."""
    pinned = getattr(kind, name)
    of_plain = getattr(float if kind is TracedFloat else int, name)

    def method(self: TracedFloat | TracedInt, *args: object) -> object:
        live = self.live
        if live is None:
            return of_plain(plain(self), *args)
        frame = sys._getframe(1)
        site = sites(frame.f_code).get(frame.f_lasti)
        if site is None and name == "__int__":  # not for a text
            return pinned(self, *args)
        sink = site and site.sink
        if sink and sink.how == "log" and _is_dropped(frame, sink):
            return of_plain(plain(self), *args)
        if site is not None:
            text = keep(self, frame, site, name, *(args or ("",)))
            if text is not None:
                return plain(self) if name == "__int__" else text
        place = frame.f_code, frame.f_lasti
        if (sink and _is_shown(frame, sink)) or live.journal.many_texts(place, plain(self)):
            live.taken(
                f"it makes text of a number that is another one in each call, at "
                f"{location.short()}; return the number, and make text of it after the call"
            )
            return of_plain(plain(self), *args)
        return pinned(self, *args)

    return method


for _kind in (TracedFloat, TracedInt):
    for _name in ("__format__", "__str__", "__repr__"):
        setattr(_kind, _name, _asking(_kind, _name))
TracedInt.__int__ = _asking(TracedInt, "__int__")  # "%d" % n
