"""Signals during a call: handlers of Python's wait while a plan writes, and while a trace is begun
or ended. A step is done wholly or not at all, whatever a handler raises.

Python runs handlers in the main thread between any two of its instructions. Held back are those of
signals that people handle, and of others that had a handler when a trace was last made.
"""

from __future__ import annotations

import os

# the C functions themselves: signal.signal() spends microseconds on enums
from _signal import getsignal, signal, valid_signals
from collections.abc import Callable
from functools import partial, wraps
from threading import get_ident, main_thread
from types import CodeType, FrameType, MethodType

from tracejit.forks import enter, leave

_USUAL = (2, 14, 15, 10, 12, 1, 3, 24, 26, 27, 17)  # INT ALRM TERM USR1 USR2 HUP QUIT XCPU …

_main = main_thread().ident
_known = _USUAL
_depth = 0  # of blocks that hold them back
_handlers: dict[int, object] = {}  # in whose place `_defer` stands
_pending: dict[int, FrameType | None] = {}


def hold() -> None:
    """Hold all handlers back until `let_go`. One that runs meanwhile may raise, and none is held
    back then."""
    global _depth
    if get_ident() == _main:
        if _depth == 0:
            _take()
        _depth += 1


def let_go() -> None:
    """The end of what `hold` began: handlers of signals that have come run now."""
    global _depth
    if get_ident() == _main:
        _depth -= 1
        if _depth == 0:
            _put_back()
            _deliver()


class uninterrupted:
    """Between `hold` and `let_go`."""

    __slots__ = ()

    def __enter__(self) -> None:
        hold()

    def __exit__(self, *exception: object) -> None:
        let_go()


class interruptible:
    """Inside of `uninterrupted`: handlers run meanwhile."""

    __slots__ = ("_depth",)

    def __enter__(self) -> None:
        global _depth
        self._depth = 0
        if get_ident() == _main and _depth:
            self._depth, _depth = _depth, 0
            try:
                _put_back()
                _deliver()
            except BaseException:
                self.__exit__()
                raise

    def __exit__(self, *exception: object) -> None:
        global _depth
        if self._depth:
            try:
                _take()
            finally:
                _depth = self._depth


def held(function: Callable) -> Callable:
    """A function that runs between `hold` and `let_go`, and that a fork waits for."""

    @wraps(function)
    def wrapper(*args: object, **kwargs: object) -> object:
        hold()
        enter()
        try:
            return function(*args, **kwargs)
        finally:
            leave()
            let_go()

    return wrapper


def look_around() -> None:
    """Hold back from now on what has a handler."""
    global _known
    more = [n for n in valid_signals() if n not in _known and callable(getsignal(n))]
    if more:
        _known = (*_known, *map(int, more))


def raised_by_handler(error: BaseException) -> bool:
    """Whether a signal's handler has raised an exception, and not the code that it stopped."""
    if isinstance(error, KeyboardInterrupt):
        return True
    handlers = [*map(getsignal, valid_signals()), *_handlers.values()]
    codes = {_code(handler) for handler in handlers if callable(handler)} - {None}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


def _code(handler: object) -> CodeType | None:
    while isinstance(handler, partial):
        handler = handler.func
    if isinstance(handler, MethodType):
        handler = handler.__func__
    if not hasattr(handler, "__code__"):
        handler = getattr(type(handler), "__call__", None)  # noqa: B004
    return getattr(handler, "__code__", None)


def _take() -> None:
    try:
        for number in _known:
            handler = getsignal(number)
            if callable(handler):  # else ignored, default, or not installed from Python
                _handlers[number] = handler
                signal(number, _defer)
    except BaseException:
        _put_back()
        raise


def _put_back() -> None:
    try:
        while _handlers:
            number = next(iter(_handlers))
            signal(number, _handlers[number])
            del _handlers[number]
    except BaseException:  # of one that is back already
        _put_back()
        raise


def _defer(number: int, frame: FrameType | None) -> None:
    _pending[number] = frame


def _deliver() -> None:
    """Run the handlers of signals that have come, all of them."""
    try:
        while _pending:
            number, frame = _pending.popitem()
            handler = getsignal(number)
            if callable(handler):
                handler(number, frame)
    finally:
        if _pending:
            _deliver()


def _forked() -> None:
    """In a child made by fork, its one thread is the main one."""
    global _main, _depth
    if get_ident() != _main:  # what the main thread holds back goes on in the parent only
        _main, _depth = get_ident(), 0
        _pending.clear()
        _put_back()


os.register_at_fork(after_in_child=_forked)
