"""`tracejit.compile`: the driver of calls.

    step(*args) → capture → a program (`programs.py`) → what a call does (`run.py`)

A call first looks for an armed replay whose guard accepts it; else it runs the Python under the
tracer and finds or builds the program for the captured graph. Either way one generated function
runs the plan and commits the effects.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable

import torch

from tracejit import knobs
from tracejit.build import TargetedStep
from tracejit.capture import functions  # noqa: F401  fills the table of rules
from tracejit.capture.bind import BoundCall, bind, run, unwrap
from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.collect import finish
from tracejit.capture.effects.effects import Call
from tracejit.capture.follow.followed import followed
from tracejit.capture.follow.recall import End, Recall
from tracejit.capture.follow.trail import Trail
from tracejit.capture.names import names_of_inputs
from tracejit.capture.proof.guards import Armed
from tracejit.capture.proof.prover import Prover
from tracejit.capture.proof.watch import watch
from tracejit.capture.python import memory
from tracejit.capture.signature import Signature, signature_of
from tracejit.capture.trace.active import current
from tracejit.capture.trace.trace import Trace
from tracejit.capture.tracer import Tracer
from tracejit.closures import Closures
from tracejit.errors import OF_RANKS, InputsExhausted
from tracejit.fallback import Attempt, Fallback
from tracejit.forks import own_lock
from tracejit.garbage import uncollected
from tracejit.inspection import BoundStep, Inspected
from tracejit.interrupts import held, interruptible, uninterrupted
from tracejit.ir import exchange
from tracejit.options import Options
from tracejit.parts import Parts, Values
from tracejit.pipeline import Stats
from tracejit.programs import MAX_PROGRAMS, Compiled, Programs
from tracejit.progress import stage, telling
from tracejit.remarks import Remarks
from tracejit.run import OTHERWISE, Hooks, Replay, Run, generate
from tracejit.runtime import joining, waiting
from tracejit.runtime.native_words import load_words
from tracejit.runtime.select import start_early
from tracejit.verify.runs import BESIDE, beside
from tracejit.verify.step import Verifying
from tracejit.verify.verifier import Due

memory.load_with(load_words)
_OF_ALL = *OF_RANKS, InputsExhausted  # raised on all ranks
_tracing = torch._C._len_torch_function_stack  # not zero when a trace is going on
_precision = torch._C._get_float32_matmul_precision


def compile(
    step: Callable | None = None,
    *,
    mode: str = "auto",
    backend: str = "auto",
    fuse: bool = True,
    keep_grads: bool = True,
    on_unsupported: str | None = None,
    require_graph: bool = False,
    randomness: str = "eager",
    remat: str = "auto",
    target: str | None = None,
    device: str | None = None,
    verify: int | str | None = None,
) -> Callable:
    """Compile a training step.

    Use as `@tracejit.compile`, `@tracejit.compile(mode=…)`, or `tracejit.compile(step)`; the step
    is a function or bound method that calls torch: forward, backward, updates, or any part.

    mode:     "auto" reruns the Python until a replay is proven safe, "rerun" always runs it;
              "replay" raises ReplayNotArmed if that cannot be proven at the first call, or a few
              later where the step assigns Python state.
    backend:  "auto" (c on CPU tensors, numpy without a C compiler; triton on CUDA), "c", "numpy",
              "triton", or "interpret" (the generated Triton in Triton's interpreter, to check it).
    fuse:     False compiles one kernel per primitive, for ablation and for hunting faults.
    keep_grads:  False leaves None in the `.grad` that the step computes, instead of the gradient:
              an update that is fused with its gradient then need not write it to memory.
    on_unsupported:  "eager" (default; TRACEJIT_ON_UNSUPPORTED is another) runs a call that cannot
              be compiled as the plain function, from the Python state, random generators and
              optimizers that were there before it, with one warning for each cause and a count in
              `stats.eager`. After that 1, 2, 4, … and at last 1024 calls with such arguments
              (types, shapes, dtypes), grad mode and training flags run so at once, before one is
              tried again. `print` may be seen twice. CannotFallBack is raised, once, where that
              call has done before what must not be done twice: it has written to a file, or used up
              a generator. "raise" raises the refusal; so does mode="replay".
    require_graph:  True raises GraphError where a plan cannot become a CUDA graph; else its kernels
              are launched one by one, with a warning if a capture has failed.
    randomness:  "eager" draws eager's numbers; "fast" computes dropout's masks, uniform, normal and
              exponential numbers in the kernels that read them, from a key that each draws from
              torch's generator in each call: a seed gives the same numbers again, other ones than
              in eager.
    remat:    "auto" computes again what costs fewer bytes than to store it for other kernels, and
              for a backward what is checkpointed; "none" stores both. `explain().memory` says what
              a call takes. Attention and logits of a large vocabulary keep no scores either way.
    target:   a GPU that need not be here, "sm_90": what is returned is not run but built for it,
              with `build(*args)` on tensors of the CPU, or meta tensors: see `TargetedStep`.
    device:   "cuda" or "cuda:1", for a step over numpy arrays: each call copies them there, and
              back what it has written to. Tensors say themselves where they are.
    verify:   in how many first calls of each plan eager runs beside it, and all that both leave
              behind is compared (docs/trust.md); "sample:0.001": also in that share of later ones.
    """
    options = Options(
        *(mode, backend, fuse, keep_grads, on_unsupported, require_graph, randomness, remat),
        *(device, verify),
    )
    of = CompiledStep.of
    if target is not None:
        of = functools.partial(TargetedStep.of, CompiledStep, target)
    return functools.partial(of, options) if step is None else of(options, step)


# asked before the first trace of a step whether they make it one of another kind (`numpy_front/`)
FRONTS: list[Callable[[CompiledStep, tuple, dict], bool]] = []


class CompiledStep(Verifying, Inspected):
    """A step that is traced on its first calls and replayed afterwards. Safe to call from several
    threads; calls run one after another."""

    def __init__(self, step: Callable, options: Options):
        functools.update_wrapper(self, step)
        self._step = step
        self._function, self._bound_to = unwrap(step)
        if self._function is None:
            raise TypeError(
                f"tracejit.compile takes a Python function or method, not {type(step).__name__}"
            )
        self.options = options
        joining.install()
        self._hooks = Hooks()
        own_lock(self, "_lock", threading.RLock)
        self._own: frozenset[str] = frozenset()
        self.reset()
        self._own = frozenset(vars(self)).difference(
            vars(step) if hasattr(step, "__dict__") else ()
        )

    @classmethod
    def of(cls, options: Options, step: Callable) -> CompiledStep:
        """A step with all options."""
        if not callable(step):
            raise TypeError(f"tracejit.compile takes a function, not {type(step).__name__}")
        return cls(step, options)

    @property
    def observer(self) -> Callable | None:
        """Sees (final graph, inputs, outputs) before a run; what it returns is called after it."""
        return self._hooks.observer

    @observer.setter
    def observer(self, observer: Callable | None) -> None:
        self._hooks.observer = observer

    def user_attributes(self) -> list[str]:
        """The attributes that are the user's: `step.calls = 0`, and what the function had."""
        return [name for name in [*vars(self)] if name not in self._own]

    def __reduce__(self) -> object:
        """Copied and pickled like the step itself, without plans; by its name, if it has one."""
        if getattr(sys.modules.get(self.__module__), self.__qualname__, None) is self:
            return self.__qualname__
        return CompiledStep, (self._step, self.options)

    def reset(self) -> None:
        """Forget every plan, replay and count."""
        with self._lock:
            self.stats = Stats()
            forget = weakref.WeakMethod(self._forget)  # autograd nodes of results hold programs
            plain, options = weakref.WeakMethod(self._plain), self.options
            self._programs = Programs(self._function, self.stats, options, lambda x: forget()(x))
            by_numpy = options.backend in ("auto", "c", "numpy")
            self._values = Values(self._programs.part, on_numpy=by_numpy)
            self._recall = Recall()
            self._replays: list[Replay] = []
            # whether a call runs eagerly and needs no more, asked until a call is traced
            self._quick: Callable[[tuple, dict], bool] | None = None
            self._last: Compiled | None = None
            self._last_run: Run | None = None
            self._resting: Tracer | None = None  # of the latest trace, to be used again
            self._prover = Prover(self._function, options.mode, MAX_PROGRAMS)
            self._remarks = Remarks(self.__name__, self.stats)
            self._closures = Closures(self._function, lambda f: CompiledStep(f, options))
            self._fallback = (
                Fallback(
                    self._function,
                    self._bound_to,
                    lambda *args, **kwargs: plain()(*args, **kwargs),
                    asked=options.mode == "rerun",
                )
                if options.falls_back
                else None
            )
            self._verifier = self._new_verifier()

    def __get__(self, instance: object, owner: type | None = None) -> object:
        if instance is None:
            return self
        return BoundStep(self, instance)

    # ---- calls

    def __call__(self, /, *args: object, **kwargs: object) -> object:
        if _tracing() and current() is not None:  # inside another compiled step: part of its trace
            return self._step(*args, **kwargs)
        if BESIDE and beside():  # or of the eager run that this is compared with
            return self._step(*args, **kwargs)
        with self._lock:
            if exchange.answers:
                exchange.begin_call()
            args = self._bound_to + args
            if self._quick is not None and self._quick(args, kwargs):
                self.stats.eager += 1
                return self._plain(*args, **kwargs)
            failed = ""
            for replay in self._replays:
                found = replay.guard(args, kwargs)
                if type(found) is str:
                    failed = failed or found
                    continue
                returned = replay.run.function(*found, replay.call)
                if returned is OTHERWISE:
                    return self._otherwise(replay, args, kwargs)
                self.stats.replays += 1
                if replay is not self._replays[0]:
                    self._replays.remove(replay)
                    self._replays.insert(0, replay)
                if replay.run is not self._last_run:
                    self._ran_last(replay.compiled, replay.run)
                return returned
            waiting.settle()
            fallback = self._fallback
            if fallback is not None and fallback.eager_at_once(args, kwargs):
                self.stats.eager += 1
                if self._programs.agreement is not None:
                    self._programs.say_to_ranks(exchange.EAGERLY)
                elif not self._replays:
                    self._quick = fallback.quick(args, kwargs)
                return fallback.eagerly(args, kwargs, self._remarks.warn)
            if self.stats.traces:
                return self._trace_or_fall_back(fallback, args, kwargs, failed)
            if any(front(self, args, kwargs) for front in FRONTS):
                return self(*args[len(self._bound_to) :], **kwargs)
            with uninterrupted(), telling(self.__name__), interruptible():
                return self._trace_or_fall_back(fallback, args, kwargs, failed)

    def _trace_or_fall_back(
        self, fallback: Fallback | None, args: tuple, kwargs: dict, failed: str
    ) -> object:
        """Trace a call; run it eagerly if the trace is refused."""
        told = exchange.told()
        try:
            return self._traced_or_plain(fallback, args, kwargs, failed)
        except Exception as error:
            if exchange.awaited(told) and not isinstance(error, _OF_ALL):
                what = f"has left the step with {type(error).__name__}: {error}"
                self._programs.say_to_ranks(what, fails=True)
            raise

    def _traced_or_plain(
        self, fallback: Fallback | None, args: tuple, kwargs: dict, failed: str
    ) -> object:
        self._quick, verifier = None, self._verifier
        if fallback is None:
            return self._traced(verifier, args, kwargs, failed)
        attempt, compiles = fallback.attempt(args, kwargs), self.stats.compiles
        try:
            returned = self._trace(args, kwargs, failed, attempt)
        except Due as due:
            plan = due.run
        except BaseException as error:
            plan = None
            refusal = fallback.refused(attempt, error, args, kwargs)
        else:
            fallback.served(attempt, args, kwargs, built=self.stats.compiles > compiles)
            if self._only_reruns() and verifier is None:
                seconds = time.perf_counter() - attempt.started
                fallback.reran(seconds, self._prover.why, args, kwargs, self._remarks.warn)
            return returned
        if plan is not None:
            return self._verified(plan, attempt, args, kwargs)
        said = f"runs eagerly, which is slower: {refusal.text}"
        if refusal.sure:
            self._remarks.warn(refusal.key, said, refusal.where)
        self._closures.wanted |= "lbfgs" in said
        self.stats.eager += 1
        self._programs.say_to_ranks(exchange.EAGERLY)
        stage("run")
        returned = self._plain(*args, **kwargs)
        if not refusal.sure:  # eager does not raise it
            fallback.disagreed(refusal, attempt, args, kwargs)
            self._remarks.warn(refusal.key, said, refusal.where)
        return returned

    def _bind(self, trace: Trace, args: tuple, kwargs: dict) -> BoundCall:
        return bind(trace, self._function, args, kwargs, self._prover.integers)

    def _plain(self, *args: object, **kwargs: object) -> object:
        """Run the step itself, in eager, but for the closures that an optimizer asks many times."""
        with self._closures:
            return self._function(*args, **kwargs)

    def _only_reruns(self) -> bool:
        """Whether calls are rerun for good, and could as well run eagerly."""
        settled = not self._replays and not self._prover.watching
        return settled and self.observer is None and self._last.program.on_cpu

    def _otherwise(self, replay: Replay, args: tuple, kwargs: dict) -> object:
        """A replay has found that Python would decide otherwise: try those behind it, then trace.
        What its stages have computed is kept meanwhile."""
        first = self._replays.index(replay) + 1
        tried = [replay]
        try:
            for other in self._replays[first:]:
                found = other.guard(args, kwargs)
                if type(found) is str:
                    continue
                tried.append(other)
                returned = other.run.function(*found, other.call)
                if returned is not OTHERWISE:
                    self.stats.replays += 1
                    self._replays.remove(other)
                    self._replays.insert(0, other)
                    self._ran_last(other.compiled, other.run)
                    return returned
        finally:
            for each in tried:
                for part in each.stages:
                    part.kept = None
        waiting.settle()
        why = "a decision on a value of a tensor came out otherwise"
        return self._trace_or_fall_back(self._fallback, args, kwargs, why)

    def _ran_last(self, compiled: Compiled, run: Run) -> None:
        self._last, self._last_run = compiled, run
        self._programs.used(compiled)

    def _forget(self, compiled: Compiled) -> None:
        """A program is dropped: so are its replays."""
        self._replays = [r for r in self._replays if r.compiled is not compiled]

    @held
    def _trace(
        self, args: tuple, kwargs: dict, failed: str, attempt: Attempt | None = None
    ) -> object:
        """Run the Python under a tracer, then the plan. `failed`: why no replay took the call."""
        started = time.perf_counter()
        if not self.stats.traces:
            start_early(self.options.backend)
        prover = self._prover
        if failed:
            prover.missed()
        watched, walk = prover.watching, prover.survey(args, kwargs)
        tracer, self._resting = self._resting, None
        if watched or tracer is None:
            tracer = Tracer(self._recall, follow=not watched)
        else:
            tracer.again(self._recall)
        tracer.trace.evaluate = self._values
        tracer.trace.fast_random = self.options.randomness == "fast"
        trace, trail, suspect = tracer.trace, tracer.trail, False
        if self._recall.keeps_numbers:
            prover.leave_integers(trace.scalars)
        trace.falls_back = attempt is not None and self._fallback is not None
        verifier = self._verifier
        if attempt is not None:
            quick = trail.following and not (verifier is not None and verifier.thorough)
            suspect = attempt.begin(trace, following=quick)
        bound = self._bind(trace, args, kwargs)
        self.stats.traces += 1
        with uncollected() as young:
            with watch(watched or suspect) as ran:
                if attempt is not None:
                    attempt.ran = ran
                returned = [run(tracer, bound, self._function, *prover.places)]
            del bound  # which holds runtime scalars
            if self._last is not None:
                self._last.program.expect()
            way = followed(trace, trail, returned, young)
            if way is None:
                name = self._programs.name
                done = finish(trace, name, returned, young, keep_grads=self.options.keep_grads)
        self.stats.add("capture", started)
        call = done.call if way is None else way.call
        names = functools.partial(names_of_inputs, self._function, args, kwargs)
        armed = signature = None
        try:
            if way is None:
                compiled, what, captured = self._found(done.captured, call, failed, names)
                if verifier is not None:
                    verifier.admit(compiled, what, attempt, call)
                trail.close(done.captured, done.call, done.made_of)  # not if it cannot be built
                ran, traced = ran if watched else None, compiled.traced(captured)
                armed = prover.prove(walk, ran, args, kwargs, captured, call, traced)
                if armed is not None:
                    owners = [call.reals[i] for i, _ in captured.grads_read]
                    signature = signature_of(args, kwargs, self._count_bound(args), owners)
                prover.over()
                self._warn_of_rerun()
            else:
                compiled, what = self._known(way.end, trail, call, failed, names)
                if verifier is not None:
                    verifier.admit(compiled, what, attempt, call)
            self._recall.make_plain(trace.scalars.given)
            trace.release()  # nobody else holds a gradient that goes now
            addresses = [t.data_ptr() for t in call.reals]
        except BaseException:
            call.undo()
            raise
        if attempt is not None:
            attempt.commit(followed=way is not None)
        stage("run")
        result = what.function(call.reals, call.scalars, addresses, call.holders, call)
        if what is not self._last_run:
            self._ran_last(compiled, what)
        if way is not None:
            tracer.rest()
            self._resting = tracer
        if armed is not None:
            self._arm(armed, compiled, captured, call, signature)
        return result

    def _count_bound(self, args: tuple) -> int:
        """How many first arguments the step is bound to, as a method, here or in its class."""
        of_class = bool(args) and getattr(type(args[0]), self.__name__, None) is self
        return len(self._bound_to) or int(of_class)

    def _found(
        self, captured: Captured, call: Call, failed: str, names: Callable
    ) -> tuple[Compiled, Run, Captured]:
        """The program of a captured step, found or built, and what a call does."""
        compiles = self.stats.compiles
        compiled, captured = self._programs.find(captured, call, names)
        self._note(failed, built=self.stats.compiles > compiles)
        return compiled, compiled.run_of(captured, self._hooks), captured

    def _known(
        self, end: End, trail: Trail, call: Call, failed: str, names: Callable
    ) -> tuple[Compiled, Run]:
        """The same for a trace that has come to a known end."""
        key = _precision(), tuple([t.data_ptr() % 16 == 0 for t in call.reals])
        known = end.runs.get(key)
        if known is not None and known[0].kept:
            self.stats.reruns += 1
            self._note(failed, built=False)
        else:
            known = self._found_again(end, call, failed, names)
            if known[3] is end.captured:  # else literals of its own are scalars now
                end.runs[key] = known
        compiled, what, parts, _ = known
        if parts is not None:
            call.parts = trail.staged(parts.stages)
        return compiled, what

    def _found_again(
        self, end: End, call: Call, failed: str, names: Callable
    ) -> tuple[Compiled, Run, Parts | None, Captured]:
        """The program of a known end, in segments where Python reads values."""
        compiled, what, captured = self._found(end.captured, call, failed, names)
        parts = self._programs.parts(compiled, captured, range(len(captured.cuts)))
        if parts is not None:
            given = compiled.program, compiled.final, compiled.backwards, self._hooks
            what = generate(captured, *given, None, parts, checking=compiled.checking)
        return compiled, what, parts, captured

    def _arm(
        self, armed: Armed, compiled: Compiled, captured: Captured, call: Call, signature: Signature
    ) -> None:
        """From now on calls that a guard accepts are replayed."""
        parts = self._programs.parts(compiled, captured, captured.early)
        given = compiled.program, compiled.final, compiled.backwards, self._hooks
        what = generate(captured, *given, armed, parts, checking=compiled.checking)
        if knobs.debug() >= 4:
            print(what.text)
        replay = Replay(armed.guard, armed.text, what, compiled, call.kept(), captured, signature)
        self._replays.insert(0, replay)
        del self._replays[MAX_PROGRAMS:]
        if self._verifier is not None:
            self._verifier.hold(replay)
        self.stats.branches = sum(r.decides for r in self._replays)
        self.stats.cuts = len(captured.cuts)
