"""Which calls of a step are verified, and what a verified call does.

    the state before → eager → put back → the compiled step → both compared

A plan is found by a trace; before it commits, a trace of a plan that is due is undone, and the call
begins anew as a verified one. A replay that is due stands among the replays with another function,
which makes a verified call; after these its own function is back, and nothing is in its way.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

import torch

from tracejit.capture.effects.effects import Call
from tracejit.capture.names import Names
from tracejit.errors import OF_EAGER, TracejitError, WrongResult
from tracejit.ir.graph import Graph
from tracejit.options import verified_calls
from tracejit.records import dataclass
from tracejit.run import OTHERWISE, Replay, Run
from tracejit.verify import evidence
from tracejit.verify.before import Before
from tracejit.verify.blame import Blame, of_graphs, of_inputs
from tracejit.verify.certificate import Certificate, Verified
from tracejit.verify.compare import Comparison, Difference, compare
from tracejit.verify.outcome import Observer, Outcome, is_short_of_memory
from tracejit.verify.rules import of_rules
from tracejit.verify.runs import Observed, digest, eagerly, in_float64

if TYPE_CHECKING:
    from tracejit.fallback import Attempt
    from tracejit.programs import Compiled

TRACE, REPLAY = "trace", "replay"
_MISSING = "is not implemented"  # in the words of torch's errors
_REMEMBERED = 256  # plans, with their effects


class Due(BaseException):
    """A trace has found a plan that is to be verified; nothing is committed."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run


class Peeked(BaseException):
    """A trace has found its plan, which is all that it was made for."""

    def __init__(self, run: Run, call: Call):
        super().__init__()
        self.run, self.call = run, call


class Step(Protocol):
    """What a verifier needs of a compiled step."""

    __name__: str
    observer: Callable | None


@dataclass(frozen=True)
class Ran:
    """A call of the compiled step: what it returned, and by which plan, if by any."""

    returned: object
    compiled: Compiled | None
    how: str
    run: Run | None


@dataclass(frozen=True)
class Made:
    """The same with what it left behind, and the run of its plan."""

    outcome: Outcome
    run: Observed
    ran: Ran


class Verifier:
    """The verified calls of one step.

    plain:    runs a call eagerly.
    trace:    makes a call by a trace: (args, kwargs) -> what it returns.
    withdraw: takes a plan out of use: (compiled, args, kwargs, error).
    say:      warns, once for each key.
    """

    def __init__(
        self,
        step: Step,
        function: Callable,
        asked: object,
        *,
        trace: Callable[[tuple, dict], tuple[object, Compiled | None]],
        withdraw: Callable[[Compiled | None, tuple, dict, WrongResult], None],
        say: Callable[[str, str], None],
        keep_grads: bool,
        raises: bool,
    ):
        self._step, self._function, self._trace = step, function, trace
        self._withdraw, self._say = withdraw, say
        self._keep_grads, self._raises = keep_grads, raises
        self.calls, self.share = verified_calls(asked)
        self.certificate = Certificate(step.__name__, asked)
        self.errors: list[WrongResult] = []
        self._counts: dict[int, tuple[Run, int]] = {}  # by their ids: calls that were verified
        self._entries: dict[tuple[str, str], Verified] = {}
        self._verifying = self._forced = self._peeking = False
        self._random = random.Random(0x7261636A)
        self.thorough = True  # whether the next trace may have to be undone

    # ---- which calls

    def admit(self, compiled: Compiled, run: Run, attempt: Attempt | None, call: Call) -> None:
        """A trace has found its plan. Raises Due, or the error of a plan that was withdrawn."""
        if self._peeking:
            raise Peeked(run, call)
        if compiled.wrong is not None:
            self._step._forget(compiled)
            raise compiled.wrong
        if self._verifying:
            return
        due = (self._left(run) > 0 or self._drawn()) and not compiled.program.capturing()
        if due and attempt is not None and self.thorough:
            why = self._refusal(compiled) or attempt.obstacles()
            why += ["it initializes lazy modules"] if attempt.initializes else []
            if not why:
                raise Due(run)
            self._cannot(run, why[0])
            due = False
        self.thorough = due or self.share > 0

    def hold(self, replay: Replay) -> None:
        """Put in place what verifies the calls of an armed replay that are due."""
        why = self._refusal(replay.compiled)
        if why:
            self._cannot(replay.run, why[0])
        elif self._left(replay.run) > 0:
            self._hold(replay)
        elif self.share:
            self._sample(replay)

    def _hold(self, replay: Replay) -> None:
        own = replay.guard, replay.run

        def guard(args: tuple, kwargs: dict, **asked: bool) -> tuple | str:
            found = own[0](args, kwargs, **asked)
            return found if asked or type(found) is str else (args, kwargs)  # asked: not of a call

        def function(args: tuple, kwargs: dict, call: object) -> object:
            returned = self._replayed(replay, own, args, kwargs)
            if replay.compiled.wrong is None and self._left(own[1]) <= 0:
                replay.guard, replay.run = own
                self.hold(replay)
            return returned

        replay.guard, replay.run = guard, replace(replay.run, function=function)

    def _sample(self, replay: Replay) -> None:
        """Verify a call of a replay now and then."""
        own = replay.guard, replay.run
        left, plain, due = self._wait(), replay.run.function, []

        def guard(args: tuple, kwargs: dict, **asked: bool) -> tuple | str:
            nonlocal left
            found = own[0](args, kwargs, **asked)
            if type(found) is not str and not asked:
                left -= 1
                if left < 0:
                    left = self._wait()
                    due.append((args, kwargs))
            return found

        def function(*found: object) -> object:
            return self._replayed(replay, own, *due.pop()) if due else plain(*found)

        replay.guard, replay.run = guard, replace(replay.run, function=function)

    def _wait(self) -> int:
        """Calls until the next one that is verified."""
        return int(self._random.expovariate(self.share))

    def _drawn(self) -> bool:
        return bool(self.share) and self._random.random() < self.share

    def _left(self, run: Run) -> int:
        """How many calls of a plan, with these effects, are to be verified."""
        if self._forced and not self._verifying:
            return 1
        return self.calls - self._counts.get(id(run), (run, 0))[1]

    def _refusal(self, compiled: Compiled) -> list[str]:
        """Why calls of a plan are not compared."""
        if compiled.program.agreement is not None:
            return ["other ranks take part in it"]
        if any(node.op.name == "philox" for node in compiled.final.nodes):
            return ['randomness="fast" draws other numbers than eager']
        return []

    def _cannot(self, run: Run, why: str) -> None:
        """Calls of a plan cannot be verified."""
        self._count(run, self.calls)
        self.not_compared(why)

    def _count(self, run: Run, calls: int) -> None:
        self._counts[id(run)] = run, self.calls - self._left(run) + calls
        if len(self._counts) > _REMEMBERED:
            del self._counts[next(iter(self._counts))]

    def not_compared(self, why: str) -> None:
        """Keep why calls are not compared, and say it."""
        if why not in self.certificate.unverified:
            self.certificate.unverified.append(why)
            self._say(f"unverified {why}", f"cannot be verified: {why}")

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """A context in which each call is verified, and raises what differs."""
        before = self._raises
        self._forced = self._raises = self.thorough = True
        held = [(replay, replay.guard, replay.run) for replay in self._step._replays]
        try:
            for replay, *_ in held:
                self.hold(replay)
            yield
        finally:
            self._forced, self._raises = False, before
            for replay, guard, run in held:
                if replay.compiled.wrong is None:
                    replay.guard, replay.run = guard, run

    # ---- a verified call

    def traced(self, run: Run, args: tuple, kwargs: dict) -> object:
        """Verify a call that is traced, and goes as one that found this plan."""

        def make() -> Ran:
            return self._ran_by_trace(args, kwargs)

        return self._verified(args, kwargs, make, run)

    def _ran_by_trace(self, args: tuple, kwargs: dict) -> Ran:
        returned, compiled = self._trace(args, kwargs)
        return Ran(returned, compiled, TRACE, None if compiled is None else self._step._last_run)

    def _replayed(self, replay: Replay, own: tuple, args: tuple, kwargs: dict) -> object:
        """Verify a call of a replay that its own guard accepts."""
        guard, run = own

        def make() -> Ran:
            found = guard(args, kwargs)
            if type(found) is str:
                return self._ran_by_trace(args, kwargs)
            returned = run.function(*found, replay.call)
            return Ran(returned, replay.compiled, REPLAY, run)

        if replay.compiled.program.capturing():  # eager would be captured too, and nothing runs
            return self._made(make).returned
        return self._verified(args, kwargs, make, run)

    def _verified(self, args: tuple, kwargs: dict, make: Callable, plan: Run) -> object:
        before = Before((self._function, args, kwargs))
        why = before.obstacles()
        if why:
            self._cannot(plan, why[0])
            return self._made(make).returned
        observer = Observer(before, dict(Names(self._function, args, kwargs).tensors))
        self._verifying = True
        try:
            eager, returned = self._eager(observer, args, kwargs)
            if _MISSING in str(eager.error) or is_short_of_memory(eager.error):
                before.restore()
                self._cannot(plan, f"eager cannot do it: {eager.error}")
                return self._made(make).returned
            why = before.obstacles()
            if why:  # it was a call of eager's, which is as right
                self._cannot(plan, why[0])
                if eager.error is not None:
                    raise eager.error
                return returned
            before.restore()
            made = self._ours(observer, make)
            if is_short_of_memory(made.outcome.error):
                raise made.outcome.error
            if made.ran.returned is OTHERWISE and made.outcome.error is None:
                return OTHERWISE
            if made.ran.compiled is None:  # it was run eagerly, or refused
                if made.outcome.error is not None:
                    raise made.outcome.error
                return made.ran.returned
            found = self._compared(before, observer, made, eager, args, kwargs)
            if found.differences:
                before.restore()
                blame = self._blame(made, before, observer.names, args, kwargs)
                if blame is not None and blame.free:
                    self._cannot(plan, blame.free)
                else:
                    error = self._error(made, found.differences, blame)
                    self._drop(made, error, args, kwargs)
                    if self._raises:
                        raise error
                # a replay's place is looked for in the list of replays afterwards
                return OTHERWISE if made.ran.how == REPLAY else self._plain(args, kwargs)
            self._note(made, found)
            if made.outcome.error is not None:
                raise made.outcome.error
            return made.ran.returned
        except BaseException as error:
            # an interrupt, or no memory: as if the call had not been made
            if not isinstance(error, Exception) or is_short_of_memory(error):
                before.restore()
            raise
        finally:
            self._verifying = False

    def _made(self, make: Callable) -> Ran:
        self._verifying = True
        try:
            return make()
        finally:
            self._verifying = False

    def _plain(self, args: tuple, kwargs: dict) -> object:
        with eagerly():
            return self._function(*args, **kwargs)

    def _eager(self, observer: Observer, args: tuple, kwargs: dict) -> tuple[Outcome, object]:
        try:
            returned = self._plain(args, kwargs)
        except Exception as error:
            return observer.outcome(None, error), None
        return observer.outcome(returned), returned

    def _ours(self, observer: Observer, make: Callable) -> Made:
        run, outer = Observed(), self._step.observer

        def both(*given: object) -> Callable:
            after = [seen(*given) for seen in (run, outer) if seen is not None]
            return lambda: [each() for each in after]

        self._step.observer = both
        try:
            ran = make()
        except Exception as error:
            ours = not isinstance(error, TracejitError) or isinstance(error, OF_EAGER)
            known = self._step._last if ours else None, TRACE, self._step._last_run
            return Made(observer.outcome(None, error), run, Ran(None, *known))
        finally:
            self._step.observer = outer
        if ran.returned is OTHERWISE:
            return Made(Outcome(), run, ran)
        return Made(observer.outcome(ran.returned), run, ran)

    def _compared(
        self,
        before: Before,
        observer: Observer,
        made: Made,
        eager: Outcome,
        args: tuple,
        kwargs: dict,
    ) -> Comparison:
        """The comparison of both calls; a float64 run decides where it must. The state is that
        after the compiled step's call."""

        def compared(exact: Outcome | None) -> Comparison:
            given = made.outcome, eager, exact, made.run.norm_of
            return compare(*given, keep_grads=self._keep_grads)

        found = compared(None)
        if not found.open:
            return found
        after = Before((self._function, args, kwargs))
        before.restore()
        exact = in_float64(before, observer, self._function, args, kwargs)
        after.restore()
        return compared(exact)

    def _note(self, made: Made, found: Comparison) -> None:
        """Keep that a call was equal."""
        compiled, now = made.ran.compiled, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
        key = digest(compiled.final), made.ran.how
        self._count(made.ran.run, 1)
        entry = self._entries.get(key)
        if entry is None:
            params = [p.value.type for p in compiled.final.params]
            named = compiled.names or tuple(f"input_{i}" for i in range(len(params)))
            inputs = {n: str(t) for n, t in zip(named, params, strict=False)}
            entry = Verified(*key, inputs, first=now)
            self._entries[key] = entry
            self.certificate.verified.append(entry)
        entry.calls, entry.last = entry.calls + 1, now
        entry.tensors, entry.exactly, entry.places = found.tensors, found.exactly, found.places
        if found.error > entry.error:
            entry.error, entry.at = found.error, found.at

    def _drop(self, made: Made, error: WrongResult, args: tuple, kwargs: dict) -> None:
        """Take a plan out of use."""
        self.errors.append(error)
        self.certificate.withdrawn.append(str(error))
        made.ran.compiled.wrong = error
        self._withdraw(made.ran.compiled, args, kwargs, error)
        for replay in self._step._replays:
            if replay.compiled is made.ran.compiled:
                replay.guard = lambda args, kwargs, **asked: "its plan was withdrawn"
        if not self._raises:
            key = f"wrong {digest(made.ran.compiled.final)}"
            self._say(key, f"IS WRONG, and runs eagerly: {error}")

    def _fresh(
        self, before: Before, args: tuple, kwargs: dict
    ) -> tuple[Graph, list[torch.Tensor | float | None]] | None:
        """The graph of a trace of a call, and its inputs, as far as it has not drawn them."""
        self._peeking = True
        try:
            self._trace(args, kwargs)
        except Peeked as peeked:
            captured, call = peeked.run.captured, peeked.call
            lists = {"tensor": call.reals, "scalar": call.scalars}
            inputs = [lists[kind][i] if kind in lists else None for kind, i in captured.sources]
            return captured.graph, [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        except Exception:
            return None
        finally:
            self._peeking = False
            before.restore()
        return None

    def _error(self, made: Made, differences: list[Difference], found: Blame | None) -> WrongResult:
        said = "; ".join(map(str, differences[:3]))
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        return WrongResult(
            step=self._step.__name__,
            how=f"a {made.ran.how} of plan {digest(made.ran.compiled.final)}",
            differences=said + more,
            blame="" if found is None else f". {found}",
            evidence=self._evidence(made, said + more, found),
            line="" if found is None else found.line,
        )

    def _evidence(self, made: Made, said: str, blame: Blame | None) -> str:
        """Write a file of evidence; what is said of it."""
        compiled, run = made.ran.compiled, made.run
        if run.graph is None:
            return ""
        graphs = made.ran.run.captured.graph, compiled.final
        given = self._step.__name__, made.ran.how, said, blame, graphs, run.inputs, compiled.backend
        try:
            return f"\nevidence: {evidence.write(*given)}"
        except OSError as error:  # the disk is full, or may not be written to
            return f"\nno evidence was written: {error}"

    def _blame(
        self, made: Made, before: Before, names: dict[int, str], args: tuple, kwargs: dict
    ) -> Blame | None:
        """Where a call went wrong. The state is that before the call, and is so afterwards."""
        run, compiled = made.run, made.ran.compiled
        if run.graph is not None:
            captured = made.ran.run.captured
            pipeline = self._step._programs.pipeline
            executor = pipeline.executor(captured.graph)
            found = of_graphs(captured.graph, compiled.program, executor, run.inputs)
            if found is None and made.ran.how == REPLAY:
                fresh = functools.partial(self._fresh, before, args, kwargs)
                found = of_inputs(fresh, captured.graph, run.inputs, compiled.names)
            if found is not None:
                return found
        return of_rules(before, names, self._function, args, kwargs)
