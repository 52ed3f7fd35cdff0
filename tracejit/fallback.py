"""The fallback: a call that a trace refuses is run eagerly, as a whole, from the state before it.

    trace → refused → Python, random generators and optimizers put back → the plain step, in eager

A trace changes no tensor, so putting Python's state back is enough (`Snapshot`). After that, calls
of the same kind run eagerly at once; now and then one is traced again, since another branch of the
step may be one that can be compiled. The same is done where every trace makes another plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FunctionType

from torch.nn.parameter import is_lazy

from tracejit.capture.proof.repeat import suspect
from tracejit.capture.proof.watch import Seen, origin
from tracejit.capture.python.snapshot import Known, Snapshot
from tracejit.capture.trace.trace import Trace
from tracejit.errors import (
    OF_EAGER,
    OF_RANKS,
    BackendUnavailable,
    CannotFallBack,
    GraphError,
    ReplayNotArmed,
    TracejitError,
)
from tracejit.interrupts import raised_by_handler
from tracejit.kinds import counted, kind_of
from tracejit.quotes import at as place_at
from tracejit.records import dataclass
from tracejit.weighing import Weighing

# not about the step
_NOT_OF_THE_STEP = (BackendUnavailable, GraphError, ReplayNotArmed)
_LONGEST = 1024  # calls of a kind that run eagerly before one is traced again, unless it is dear
_DEAR = 1e-6  # seconds of a refused trace that each of those calls pays for
_KINDS = 64  # that are told apart
_NETWORKS = 8  # whose training flags tell kinds apart
_FOREVER = 1 << 62
_MANY_BUILT = 9  # traces in a row that made a plan each, after which calls run eagerly as well
_EACH_BUILDS = (
    "each trace makes another plan, which costs far more than the step: its Python takes another "
    "path on every call, or computes with numbers that are part of the plan"
)


class Attempt:
    """One trace that may turn out to be refused.

    lasting: of the roots, what the step itself keeps alive.
    known: what earlier traces could reach from there. A trace that is answered from an earlier one
        copies that, since it happens on every call; `put_back` finds out whether it was all.
    """

    __slots__ = ("known", "roots", "lasting", "snapshot", "ran", "trace", "committing", "quick")
    __slots__ += ("started", "initializes")

    def __init__(self, known: Known | None, roots: tuple, lasting: tuple) -> None:
        self.known, self.roots, self.lasting = known, roots, lasting
        self.snapshot: Snapshot | None = None
        self.ran: Seen | None = None  # what the trace ran, where it was watched
        self.trace: Trace | None = None
        self.committing = False  # the plan is about to run: there is no way back
        self.quick = False
        self.started = time.perf_counter()
        self.initializes = False  # parameters of lazy modules, which get their shapes

    def begin(self, trace: Trace, *, following: bool) -> bool:
        """A trace begins. Returns whether it is to be watched."""
        self.trace, self.quick = trace, following
        if following:
            self.snapshot = None if self.known is None else self._taken(self.known.again)
            return False
        self.snapshot = self._taken(Snapshot)
        if self.snapshot is not None:
            self.initializes = any(map(is_lazy, self.snapshot.tensors))
        return self.snapshot is not None and bool(suspect(self.snapshot))

    def _taken(self, take: Callable[[tuple], Snapshot]) -> Snapshot | None:
        try:
            return take(self.roots)
        except Exception:  # a user's object cannot be looked into; without a copy a refusal raises
            return None

    def commit(self, *, followed: bool) -> None:
        """The trace has become a plan, which runs now."""
        self.committing = True
        self.snapshot = self.trace = None
        if not followed:
            found = self._taken(lambda roots: Snapshot(self.lasting))
            self.known = None if found is None or not found.is_cheap else Known(found)

    def cause(self, error: Exception) -> Exception:
        """What was refused, if the trace ended in this error: the step may have caught a refusal
        and raised something else."""
        refused = None if self.trace is None else self.trace.refused
        return error if refused is None else refused

    def obstacles(self) -> list[str]:
        """What keeps the call from being run again, of a trace that copies all that it reaches."""
        if self.snapshot is None:
            return ["it changes objects of which it has no copy"]
        found = self.snapshot.obstacles()
        if self.ran is not None:
            found += self.ran.unrepeatable
        elif suspect(self.snapshot):
            found.append(f"it may have used {suspect(self.snapshot)}, and a profiler is active")
        return found

    def put_back(self) -> list[str]:
        """Put all back as it was before the trace; or what keeps the call from being run again."""
        snapshot = self.snapshot
        if self.trace is not None:
            self.trace.draws.undo()
        if snapshot is None or not self.quick:
            found = self.obstacles()
        else:
            found = snapshot.obstacles()
            snapshot.restore()
            if self.known.unknown(snapshot, self.roots):
                found.append("it changes objects that it made itself")
            may = suspect(snapshot)
            found += [f"it may have used {may}"] if may else []
        if not found:
            snapshot.restore()
        return found


@dataclass(frozen=True)
class Refusal:
    """Why a call was not compiled: what, where, what to do; and what tells causes apart."""

    text: str
    key: str
    where: str = ""  # the user's line
    sure: bool = False  # it is a refusal of ours; else eager may raise the error too


class _Rest:
    """How long calls of one kind stay in eager."""

    __slots__ = ("left", "next", "quick", "weighing")

    def __init__(self) -> None:
        self.left = 0  # calls until one is traced again
        self.next = 1  # that many after the next refusal
        self.quick: Callable[[tuple, dict], bool] | None = None
        self.weighing = Weighing()


class Fallback:
    """What one compiled step has refused, and which of its calls run eagerly at once.

    Calls are told apart by kinds (`kinds.py`). After a refusal 1, 2, 4, … and at last 1024 calls of
    the kind run eagerly before one is traced again, or so many that a trace costs each of them a
    microsecond; a trace that is not refused halves that number.
    Calls that are only ever rerun are weighed against eager ones (`weighing.py`); where reruns were
    asked for, it is only said which are slower.
    """

    def __init__(
        self, function: FunctionType, bound_to: tuple, plain: Callable, *, asked: bool = False
    ):
        """`plain` runs a call eagerly. `asked`: reruns were asked for, whatever they cost."""
        self.asked, self._plain = asked, plain
        self.function, self.lasting = function, (function, bound_to)
        self.why = ""  # the latest call ran eagerly because of this
        self.ever = ""  # some call did
        self.known: Known | None = None  # what the latest trace could reach
        self._built = 0  # traces in a row that made a plan
        self._rests: dict[tuple | None, _Rest] = {}  # None: of kinds above a number
        self._latest: tuple[tuple, _Rest | None] = (), None  # the kind of the latest call
        self._current: _Rest | None = None  # of the latest call that is run eagerly at once
        self._networks: list[dict] = []

    def eager_at_once(self, args: tuple, kwargs: dict) -> bool:
        """Whether a call is run eagerly without being traced."""
        if not self._rests:
            return False
        rest = self._known_rest(args, kwargs)
        if rest is None or rest.left <= 0:
            return False
        rest.left -= 1
        self._current = rest
        return True

    def quick(self, args: tuple, kwargs: dict) -> Callable[[tuple, dict], bool] | None:
        """After `eager_at_once`: which of the next calls are run eagerly as this one is, and counts
        them; None if it is to be timed. Not to be asked after a trace."""
        rest = self._current
        if rest.weighing.wants_eager:
            return None
        if rest.quick is None:
            rest.quick = counted(rest, args, kwargs, self._networks)
        return rest.quick

    def eagerly(self, args: tuple, kwargs: dict, warn: Callable[[str, str], None]) -> object:
        """Run a call that is run eagerly at once. `warn` is told of a step that is faster so."""
        rest = self._current
        if not rest.weighing.wants_eager:
            return self._plain(*args, **kwargs)
        started = time.perf_counter()
        returned = self._plain(*args, **kwargs)
        rest.weighing.ran_eagerly(time.perf_counter() - started)
        self._settle(rest, warn)
        return returned

    def reran(
        self,
        seconds: float,
        why: str,
        args: tuple,
        kwargs: dict,
        warn: Callable[[str, str], None],
    ) -> None:
        """A call was rerun, as all of its kind are, because of `why`."""
        rest = self._rest(args, kwargs)
        rest.weighing.reran(seconds, why)
        self._settle(rest, warn)

    def _settle(self, rest: _Rest, warn: Callable[[str, str], None]) -> None:
        """Let calls of a kind run eagerly, to be timed or because they are faster so."""
        rest.left = rest.weighing.eager_calls()
        if rest.weighing.verdict and self.asked:
            rest.left = 0
            rest.weighing.close()
            why = f"is rerun, as was asked for, which is slower: {rest.weighing.verdict}"
            warn("slow trace", why)
        elif rest.weighing.verdict:
            self.why = self.ever = rest.weighing.verdict
            warn("slow trace", f"runs eagerly: {self.why}")

    def attempt(self, args: tuple, kwargs: dict) -> Attempt:
        """A trace may begin."""
        return Attempt(self.known, (self.function, args, kwargs), self.lasting)

    def served(self, attempt: Attempt, args: tuple, kwargs: dict, *, built: bool) -> None:
        """A call was traced and not refused; `built` if that made a plan. Where each of many traces
        in a row made one, the next calls of this kind run eagerly, as after a refusal."""
        self.known = attempt.known
        self._built = self._built + 1 if built else 0
        if self._built >= _MANY_BUILT:
            self.why = self.ever = _EACH_BUILDS
            self._find_networks(attempt)
            self._eager_next(attempt, args, kwargs)
        elif self._rests:
            self.why = ""
            rest = self._known_rest(args, kwargs)
            if rest is not None:
                rest.next = max(1, rest.next // 2)

    def refused(self, attempt: Attempt, error: Exception, args: tuple, kwargs: dict) -> Refusal:
        """A trace ended in an error: put everything back, for an eager run. Raises what the call
        raises if there is none: an error of eager's, that of a call that cannot be repeated, or
        what a signal's handler has raised."""
        if not attempt.committing and raised_by_handler(error):
            attempt.put_back()
        if not isinstance(error, Exception) or raised_by_handler(error):
            raise error
        cause = attempt.cause(error)
        if attempt.committing or isinstance(cause, _NOT_OF_THE_STEP + OF_EAGER):
            raise error
        obstacles = attempt.put_back()
        if isinstance(cause, OF_RANKS):
            raise error
        refusal = _refusal(cause)
        if obstacles and not refusal.sure:
            raise error
        if refusal.sure:
            self.why = self.ever = refusal.text
            self._find_networks(attempt)
        if obstacles:
            self._rest(args, kwargs).left = _FOREVER
            reason = "; ".join(obstacles[:3])
            raise CannotFallBack(cause=refusal.text, reason=reason, where=refusal.where) from error
        if refusal.sure:
            self._eager_next(attempt, args, kwargs)
        return refusal

    def disagreed(self, refusal: Refusal, attempt: Attempt, args: tuple, kwargs: dict) -> None:
        """A trace ended in an error that eager did not raise."""
        self.why = self.ever = refusal.text
        self._eager_next(attempt, args, kwargs)

    def withdrawn(self, args: tuple, kwargs: dict, why: str) -> None:
        """Calls of this kind run eagerly for good."""
        self.why = self.ever = why
        self._rest(args, kwargs).left = _FOREVER

    def _eager_next(self, attempt: Attempt, args: tuple, kwargs: dict) -> None:
        """The next calls of this kind are run eagerly."""
        rest = self._rest(args, kwargs)
        longest = max(_LONGEST, int((time.perf_counter() - attempt.started) / _DEAR))
        rest.left, rest.next = rest.next, min(2 * rest.next, longest)

    def _rest(self, args: tuple, kwargs: dict) -> _Rest:
        kind = kind_of(args, kwargs, self._networks)
        if kind not in self._rests and len(self._rests) >= _KINDS:
            kind = None  # all others together
        if kind not in self._rests:
            self._rests[kind] = _Rest()
            self._latest = (), None  # that kind may have one now
        return self._rests[kind]

    def _known_rest(self, args: tuple, kwargs: dict) -> _Rest | None:
        """That of calls of this kind, if one was refused."""
        kind = kind_of(args, kwargs, self._networks)
        latest, rest = self._latest
        if kind != latest:  # else there is no need to hash shapes
            rest = self._rests.get(kind)
            self._latest = kind, rest
        return self._rests.get(None) if rest is None else rest

    def _find_networks(self, attempt: Attempt) -> None:
        if self._networks or attempt.snapshot is None or self._rests:
            return
        found = attempt.snapshot.networks
        below = {id(m) for n in found for m in n._modules.values()}
        self._networks = [vars(n) for n in found if id(n) not in below][:_NETWORKS]


def _refusal(error: Exception) -> Refusal:
    """What a trace that ended in an error says of the step."""
    kind = type(error).__name__
    if isinstance(error, TracejitError):
        where = error.fields.get("where", "")
        key = f"{kind} {where} {error.fields.get('function')}"
        return Refusal(error.text.rstrip("."), key, where, sure=True)
    at, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if origin(code) == "user":
            at = place_at(code, trace.tb_lasti, trace.tb_lineno)
        trace = trace.tb_next
    text = f"{at}: its trace raised {kind} ({error}), which eager does not. Make that line"
    return Refusal(f"{text} independent of what kind of object a tensor is", f"{kind} {at}", at)
