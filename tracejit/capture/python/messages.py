"""Messages that a logger does not take: the text of a runtime scalar in them is nobody's.

`log.debug(f"step {self.n}")` makes the text whether or not it is wanted. Text of a runtime scalar
is good for its number only; but where code does nothing with it but to hand it to a logger whose
level is above that, it may be any. What loggers take is guarded (`proof/kinds.py`).
"""

from __future__ import annotations

import dis
import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType

from tracejit.capture.python.doubts import chain_to, led_to
from tracejit.capture.python.uses import Reader
from tracejit.capture.trace.scalars import TracedFloat, TracedInt, plain

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_LOGGERS = frozenset({logging.Logger, type(logging.getLogger())})


@dataclass(frozen=True, slots=True)
class _Text:
    """A text, and where parts of it are formatted."""

    made_at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Bound:
    """A method, and the names that lead to the object."""

    name: str
    chain: tuple[str, ...]


class _Messages(Reader):
    """Finds which methods the texts that code formats are handed to."""

    def __init__(self, code: CodeType):
        super().__init__(code)
        self.instructions = [*dis.get_instructions(code)]
        self.handed: dict[int, _Bound] = {}  # by the place where a part is formatted

    def _step(self, x: dis.Instruction) -> bool:
        if x.opname == "LOAD_METHOD" and x.argval in _LEVELS:
            last = self.instructions[self.instructions.index(x) - 1]
            super()._step(x)
            self.stack[-2] = _Bound(x.argval, chain_to(self.instructions, last))
            return True
        if x.opname in ("FORMAT_VALUE", "BUILD_STRING"):
            made_at = [x.offset] if x.opname == "FORMAT_VALUE" else []
            for part in self.stack[-x.arg :] if x.opname == "BUILD_STRING" and x.arg else ():
                made_at += part.made_at if type(part) is _Text else ()
            super()._step(x)
            self.stack[-1] = _Text(tuple(made_at))
            return True
        return super()._step(x)

    def _call(self, count: int) -> None:
        arguments = self.stack[len(self.stack) - count :] if count else []
        bound = self.stack[-count - 2] if len(self.stack) > count + 1 else None
        if type(bound) is _Bound:
            for part in arguments:
                for offset in part.made_at if type(part) is _Text else ():
                    self.handed[offset] = bound
        super()._call(count)


@functools.lru_cache(1000)
def handed(code: CodeType) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Where code formats text that it hands to a method of a logger's and does nothing else with:
    which one, and the names that lead to that logger."""
    found = _Messages(code)
    found.all()
    return {offset: (bound.name, bound.chain) for offset, bound in found.handed.items()}


def _is_dropped(frame: FrameType) -> bool:
    """Whether the text that a frame formats now is for a logger that does not take it."""
    found = handed(frame.f_code).get(frame.f_lasti)
    if found is None:
        return False
    method, chain = found
    logger = led_to(frame, chain)
    own = type(logger) in _LOGGERS and method not in vars(logger)
    return own and not logger.isEnabledFor(_LEVELS[method])


def _asking(kind: type, name: str) -> Callable:
    """A method that makes text, which asks first whether anybody gets it."""
    pinned = getattr(kind, name)
    of_plain = getattr(float if kind is TracedFloat else int, name)

    def method(self: TracedFloat | TracedInt, *args: object) -> str:
        if self.live is not None and _is_dropped(sys._getframe(1)):
            return of_plain(plain(self), *args)
        return pinned(self, *args)

    return method


for _kind in (TracedFloat, TracedInt):
    for _name in ("__format__", "__str__", "__repr__"):
        setattr(_kind, _name, _asking(_kind, _name))
