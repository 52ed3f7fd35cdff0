"""The part of a compiled step that verifies its calls."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from types import FunctionType

from tracejit.errors import WrongResult
from tracejit.fallback import Attempt, Fallback
from tracejit.options import Options
from tracejit.pipeline import Stats
from tracejit.programs import Compiled
from tracejit.remarks import Remarks
from tracejit.run import Replay, Run
from tracejit.verify.certificate import Certificate
from tracejit.verify.verifier import Due, Verifier

_NUMPY = "its arguments are numpy arrays"


class Verifying:
    """What a compiled step does to be verified. `compile.py` has the rest, which keeps these."""

    __name__: str
    stats: Stats
    options: Options
    _function: FunctionType
    _bound_to: tuple
    _lock: threading.RLock
    _last: Compiled | None
    _replays: list[Replay]
    _fallback: Fallback | None
    _remarks: Remarks
    _verifier: Verifier | None
    _trace: Callable
    _trace_or_fall_back: Callable
    _traced_or_plain: Callable
    __call__: Callable
    _comparable = True  # whether eager can run beside it

    def verify(self, /, *args: object, **kwargs: object) -> object:
        """A call of which eager runs beside the compiled step, from the same state; returns what
        the call returns, or raises WrongResult, with everything as it was before the call.

        The step's plan is compared as it would run now, whether calls of it were verified before or
        not; `certificate()` tells of it. Where the call cannot be compared, such as one that runs
        eagerly or writes to a file, the certificate says why.
        """
        with self._lock:
            if not self._comparable:
                raise ValueError(f"{self.__name__} cannot be verified: {_NUMPY}")
            if self._verifier is None:
                self._verifier = self._new_verifier(asked=True)
            verifier, eager = self._verifier, self.stats.eager
            with verifier.forced():
                returned = self(*args, **kwargs)
            if self.stats.eager > eager:
                verifier.not_compared("it runs eagerly")
            return returned

    def certificate(self) -> Certificate:
        """What was verified of the step: which plans, when, on what shapes, to what error; what
        could not be compared, and what differed."""
        if self._verifier is None:
            why = [_NUMPY] if self.options.verify else []
            return Certificate(self.__name__, self.options.verify, unverified=why)
        return self._verifier.certificate

    def _new_verifier(self, *, asked: bool = False) -> Verifier | None:
        """What verifies calls, if that was asked for."""
        if not self._comparable or not (self.options.verify or asked):
            return None
        step = weakref.proxy(self)
        return Verifier(
            step,
            self._function,
            self.options.verify,
            trace=functools.partial(_traced, step),
            withdraw=functools.partial(_withdraw, step),
            say=self._remarks.warn,
            keep_grads=self.options.keep_grads,
            raises=not self.options.falls_back,
        )

    def _traced(self, verifier: Verifier | None, args: tuple, kwargs: dict, failed: str) -> object:
        """Trace a call where none is run eagerly."""
        if verifier is None:
            return self._trace(args, kwargs, failed)
        lasting = self._function, self._bound_to
        attempt = Attempt(None, (self._function, args, kwargs), lasting)
        try:
            return self._trace(args, kwargs, failed, attempt)
        except WrongResult:  # of a plan that was withdrawn
            attempt.put_back()
            raise
        except Due as due:
            plan = due.run
        return self._verified(plan, attempt, args, kwargs)

    def _verified(self, plan: Run, attempt: Attempt, args: tuple, kwargs: dict) -> object:
        """Undo a trace that has found a plan which is due, and verify the call."""
        attempt.put_back()
        self.stats.traces -= 1
        attempt.trace = None  # which holds proxies that the next one uses again
        return self._verifier.traced(plan, args, kwargs)


def _traced(step: Verifying, args: tuple, kwargs: dict) -> tuple[object, Compiled | None]:
    """Make a call by a trace; the plan that it ran, or None where it ran eagerly."""
    eager = step.stats.eager
    returned = step._traced_or_plain(step._fallback, args, kwargs, "")
    return returned, step._last if step.stats.eager == eager else None


def _withdraw(
    step: Verifying, plan: Compiled, args: tuple, kwargs: dict, error: WrongResult
) -> None:
    """Let calls like this one run eagerly from now on."""
    if step._fallback is not None:
        step._fallback.withdrawn(args, kwargs, str(error))
