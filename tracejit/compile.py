"""`tracejit.compile`: the driver of calls.

    step(*args) → capture → a program (`programs.py`) → run and commit → replay (`replay.py`)

A call first looks for an armed replay whose guard accepts it; else it reruns the Python under the
tracer, finds or builds the program for the captured graph, runs it, and commits the effects.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable

import torch

from tracejit import knobs
from tracejit.capture import functions  # noqa: F401  fills the table of rules
from tracejit.capture.bind import bind, run, unwrap
from tracejit.capture.captured import Captured
from tracejit.capture.commit import leaver
from tracejit.capture.effects import finish, uncollected
from tracejit.capture.followed import Followed, followed
from tracejit.capture.guards import Armed, arm, reasons_against, survey
from tracejit.capture.heap import Walk
from tracejit.capture.recall import Recall
from tracejit.capture.tracer import Tracer, current
from tracejit.capture.watch import Seen, watch
from tracejit.errors import ReplayNotArmed, TracejitWarning
from tracejit.ir.graph import Graph
from tracejit.ir.hostcode import host_function
from tracejit.programs import MAX_PROGRAMS, Compiled, Programs, Stats
from tracejit.replay import Replay, Rerun, replay, rerun
from tracejit.runtime.interrupts import uninterrupted
from tracejit.runtime.program import Prepared
from tracejit.runtime.select import start_early
from tracejit.schedule.plan import Plan

MODES = ("auto", "rerun", "replay")
BACKENDS = ("auto", "c", "numpy", "triton", "interpret")
_PROOFS = 4  # traces of each new program that are watched, to arm a replay
_REFUSALS = 3  # in a row for the same reasons, after which only new programs are watched, less long
_tracing = torch._C._len_torch_function_stack  # not zero when a trace is going on
_precision = torch._C._get_float32_matmul_precision
_MANY_PLANS = 9  # from this number of plans on, a step is told that it makes many
_MANY_RETRACES = 20  # or of failed guards, where these are more than the replays


def compile(
    step: Callable | None = None,
    *,
    mode: str = "auto",
    backend: str = "auto",
    fuse: bool = True,
    keep_grads: bool = True,
) -> Callable:
    """Compile a training step.

    Use as `@tracejit.compile`, `@tracejit.compile(mode=…)`, or `tracejit.compile(step)`; the step
    is a function or bound method that calls torch: forward, backward, updates, or any part.

    mode:     "auto" reruns the Python until a replay is proven safe, "rerun" always runs it,
              "replay" arms at the first call and raises ReplayNotArmed if that cannot be proven.
    backend:  "auto" (c for CPU tensors, or numpy where there is no C compiler; triton for CUDA
              tensors), "c", "numpy", "triton", or "interpret" (the generated Triton under Triton's
              interpreter, for checking).
    fuse:     False compiles one kernel per primitive, for ablation and for hunting faults.
    keep_grads:  False leaves None in the `.grad` that the step computes, instead of the gradient:
              an update that is fused with its gradient then need not write it to memory.
    """
    if mode not in MODES:
        raise ValueError(f"mode is one of {MODES}, not {mode!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend is one of {BACKENDS}, not {backend!r}")
    if step is None:
        return functools.partial(
            compile, mode=mode, backend=backend, fuse=fuse, keep_grads=keep_grads
        )
    if not callable(step):
        raise TypeError(f"tracejit.compile takes a function, not {type(step).__name__}")
    return CompiledStep(step, mode, backend, fuse, keep_grads)


class CompiledStep:
    """A step that is traced on its first calls and replayed afterwards. Safe to call from several
    threads; calls run one after another."""

    def __init__(self, step: Callable, mode: str, backend: str, fuse: bool, keep_grads: bool):
        functools.update_wrapper(self, step)
        self._step = step
        self._function, self._bound_to = unwrap(step)
        if self._function is None:
            raise TypeError(
                f"tracejit.compile takes a Python function or method, not {type(step).__name__}"
            )
        self.mode, self.backend, self.fuse, self.keep_grads = mode, backend, fuse, keep_grads
        self.observer: Callable | None = None  # sees (graph, inputs, outputs) before a run
        self._lock = threading.RLock()
        self._own: frozenset[str] = frozenset()
        self.reset()
        self._own = frozenset(vars(self)).difference(
            vars(step) if hasattr(step, "__dict__") else ()
        )

    def user_attributes(self) -> list[str]:
        """The attributes that are the user's: `step.calls = 0`, and what the function had."""
        return [name for name in vars(self) if name not in self._own]

    def __reduce__(self) -> object:
        """Copied and pickled like the step itself, without plans; by its name, if it has one."""
        if getattr(sys.modules.get(self.__module__), self.__qualname__, None) is self:
            return self.__qualname__
        return CompiledStep, (self._step, self.mode, self.backend, self.fuse, self.keep_grads)

    def reset(self) -> None:
        """Forget every plan, replay and count."""
        with self._lock:
            self.stats = Stats()
            forget = weakref.WeakMethod(self._forget)  # autograd nodes of results hold programs
            self._programs = Programs(
                self._function, self.stats, self.backend, self.fuse, lambda x: forget()(x)
            )
            self._recall = Recall()
            self._replays: list[Replay] = []
            self._last: Compiled | None = None
            self._resting: Tracer | None = None  # of the latest trace, to be used again
            self._why = "it has not been called"
            self._ran: Seen | None = None  # what the last watched trace ran
            self._proofs_left = _PROOFS
            self._refused = 0  # how often in a row, for the same reasons
            self._retraces: deque[str] = deque(maxlen=100)
            self._warned: set[str] = set()

    def __get__(self, instance: object, owner: type | None = None) -> object:
        if instance is None:
            return self
        return functools.partial(self, instance)

    # ---- what was compiled

    @property
    def graph(self) -> Graph | None:
        """The final IR of the plan that ran last."""
        return None if self._last is None else self._last.final

    @property
    def plans(self) -> list[Plan]:
        """Every plan, the one that ran last at the end."""
        return [c.program.plan for c in self._programs.kept]

    @property
    def backward_plans(self) -> list[Plan]:
        """The plans that backward outside the step has run, of the plan that ran last."""
        if self._last is None:
            return []
        return [b.program.plan for b in self._last.backwards if b.program is not None]

    @property
    def kernels(self) -> list[str]:
        """The source of each kernel of the plan that ran last, as its executor runs it: C, Triton,
        or for numpy the kernel itself."""
        if self._last is None:
            return []
        return [source.text for source in self._last.program.loaded.sources]

    @property
    def guards(self) -> list[str]:
        """The source of the guard of each armed replay, the one that ran last first."""
        return [armed.guard_text for armed in self._replays]

    def explain_mode(self) -> str:
        """Whether calls are replayed, and if not, why."""
        if self._replays:
            return f"replay: {len(self._replays)} plan(s) armed"
        return f"rerun: {self._why}"

    def explain_retraces(self) -> list[str]:
        """Why calls were not replayed although a replay was armed, the latest last: what changed,
        from what to what, and whether a plan was found or built."""
        return list(self._retraces)

    # ---- calls

    def __call__(self, *args: object, **kwargs: object) -> object:
        if _tracing() and current() is not None:  # inside another compiled step: part of its trace
            return self._step(*args, **kwargs)
        with self._lock:
            args = self._bound_to + args
            failed = ""
            for armed in self._replays:
                found = armed.guard(args, kwargs)
                if type(found) is str:
                    failed = failed or found
                    continue
                returned = armed.run(*found)
                self.stats.replays += 1
                if armed is not self._replays[0]:
                    self._replays.remove(armed)
                    self._replays.insert(0, armed)
                if armed.compiled is not self._last:
                    self._ran_last(armed.compiled)
                return returned
            return self._rerun(args, kwargs, failed)

    def _ran_last(self, compiled: Compiled) -> None:
        self._last = compiled
        self._programs.used(compiled)

    def _forget(self, compiled: Compiled) -> None:
        """A program is dropped: so are its replays."""
        self._replays = [r for r in self._replays if r.compiled is not compiled]

    def _run(
        self, compiled: Compiled, captured: Captured, prepared: Prepared, inputs: list, host: list
    ) -> object:
        """Run a program for which all is prepared, and commit the effects."""
        after = self.observer(compiled.final, inputs, prepared.outputs) if self.observer else None
        with uninterrupted():
            returned = captured.commit(captured.reals, prepared.run(), host, compiled.backwards)
        if after is not None:
            after()
        if self._last is not compiled:
            self._ran_last(compiled)
        return returned

    def _rerun(self, args: tuple, kwargs: dict, failed: str) -> object:
        """Run the Python under a tracer. `failed`: why a replay did not accept the call."""
        started = time.perf_counter()
        if not self.stats.traces:
            start_early(self.backend)
        walk = None
        watched = self.mode != "rerun" and self._proofs_left > 0
        if watched and (self._ran is not None or self.mode == "replay"):
            walk = survey(self._function, args, kwargs, self._ran)
        tracer, self._resting = self._resting, None
        if watched or tracer is None:
            tracer = Tracer(self._recall, follow=not watched)
        else:
            tracer.again(self._recall)
        bound = bind(tracer, self._function, args, kwargs)
        self.stats.traces += 1
        with uncollected():
            with watch(watched) as ran:
                returned = [run(tracer, bound, self._function)]
            if self._last is not None:
                self._last.program.expect()
            way = followed(tracer, returned)
            if way is None:
                captured = finish(tracer, self._programs.name, returned, keep_grads=self.keep_grads)
        self.stats.add("capture", started)
        if way is not None:
            addresses = [t.data_ptr() for t in way.reals]
            key = "rerun", _precision(), tuple([a % 16 == 0 for a in addresses])
            known = way.end.cache.get(key)
            if known is not None and known.compiled.kept:
                return self._follow(way, known, addresses, failed)
            captured = way.captured()
        try:
            compiles = self.stats.compiles
            compiled = self._programs.find(captured)
            self._note(failed, built=self.stats.compiles > compiles)
            inputs = [
                captured.reals[index] if kind == "tensor" else captured.scalars[index]
                for kind, index in captured.sources
            ]
            memo = captured.memo
            host_results = memo.get("host") or host_function(
                captured.host_nodes, captured.scalar_values, captured.host_results
            )
            memo["host"] = host_results
            host = host_results(list(captured.scalars))
            for bound in captured.bounds:
                bound.check(captured.reals)
            armed = None
            if captured.end is None:
                armed = self._prove(walk, ran, args, kwargs, captured, compiled)
            if "leaver" not in memo:
                memo["leaver"] = leaver(captured, noted=True)
            leaving = memo["leaver"](captured.reals) if memo["leaver"] else ()
            prepared = compiled.program.prepare(inputs, leaving)
        except BaseException:
            captured.undo()
            raise
        returned = self._run(compiled, captured, prepared, inputs, host)
        if way is not None and not way.escaped and captured.graph is way.end.captured.graph:
            program, final = compiled.program, compiled.final
            step = weakref.proxy(self)  # which holds what it remembers
            way.end.cache[key] = rerun(compiled, way.end.captured, program, final, step)
        captured.release()
        tracer.release()
        if armed is not None:
            self._replays.insert(0, self._replay(armed, compiled, captured))
            del self._replays[MAX_PROGRAMS:]
        return returned

    def _follow(self, way: Followed, known: Rerun, addresses: list[int], failed: str) -> object:
        """Run the plan of a trace that went as earlier ones."""
        self.stats.reruns += 1
        tracer, undo = way.tracer, way.tracer.state.undo
        try:
            self._note(failed, built=False)
        except BaseException:  # a warning may be an error
            undo()
            raise
        tracer.trail.release()  # nobody else holds a gradient that goes now
        returned = known.run(way.reals, way.scalars, addresses, way.tree, way.stores, undo)
        if known.compiled is not self._last:
            self._ran_last(known.compiled)
        tracer.rest()
        self._resting = tracer
        return returned

    def _replay(self, armed: Armed, compiled: Compiled, captured: Captured) -> Replay:
        program, final, backwards = compiled.program, compiled.final, compiled.backwards
        made = replay(armed, compiled, captured, program, final, backwards, self)
        if knobs.debug() >= 4:
            print(made.text)
        return made

    def _note(self, failed: str, *, built: bool) -> None:
        """Keep why a call was not replayed, and warn of a step that keeps making plans."""
        if failed:
            text = f"{failed}; {'a new plan was built' if built else 'its plan was there'}"
            self._retraces.append(text)
            self.stats.retraces += 1
            self._programs.report(f"not replayed: {text}")
        if built:
            more = 2 if self._refused >= _REFUSALS else _PROOFS
            self._proofs_left = min(self._proofs_left + more, _PROOFS * MAX_PROGRAMS)
        often = self.stats.retraces >= _MANY_RETRACES and self.stats.retraces > self.stats.replays
        if self.stats.compiles >= _MANY_PLANS or often:
            last = "; ".join(list(self._retraces)[-3:]) or "its Python takes another path"
            self._warn(
                "plans",
                f"has made {self.stats.compiles} plans and was traced again "
                f"{self.stats.retraces} times because something that it reads changed. Latest "
                f"causes: {last}. Pass what changes as a float argument or a tensor, and keep "
                "shapes to a few sizes",
            )

    def _warn(self, kind: str, what: str) -> None:
        """Warn, once for each kind of warning."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"tracejit: {self.__name__} {what}.", TracejitWarning, stacklevel=5)

    def _prove(
        self,
        walk: Walk | None,
        ran: Seen | None,
        args: tuple,
        kwargs: dict,
        captured: Captured,
        compiled: Compiled,
    ) -> Armed | None:
        """A replay's guard, once two traces agree, all that ran is known to be pure, all that
        it read is guarded, and it changed nothing of that. A reason is kept otherwise."""
        if self.mode == "rerun":
            self._why = 'mode="rerun" was asked for'
            return None
        count = compiled.seen.pop(captured.key, 0) + 1
        compiled.seen[captured.key] = count
        if len(compiled.seen) > MAX_PROGRAMS:
            del compiled.seen[next(iter(compiled.seen))]
        if ran is None:
            if self._proofs_left > 0:
                self._why = "another profiler is active (sys.setprofile)"
            return None
        self._proofs_left -= 1
        before = self._ran
        self._ran = ran if before is None else before.joined(ran)
        if walk is None:
            self._why = "two traces have to agree first"
            return None
        reasons, walk_lines = reasons_against(walk, ran, captured), walk.lines
        if not reasons:
            armed = arm(walk, self._function, captured)
            if isinstance(armed, str):
                reasons = [armed]
            else:
                found: list[int] = []
                after = armed.guard(args, kwargs, found)
                if type(after) is str:
                    reasons = [f"it changes what it reads: {after}"]
                elif found != armed.found:
                    reasons = ["it puts a tensor where another was"]
        incomplete = before is not None and not (
            before.covers(ran)
            or survey(self._function, args, kwargs, self._ran).lines == walk_lines
        )
        if reasons and not incomplete:
            more = f"; and {len(reasons) - 4} more" if len(reasons) > 4 else ""
            why = "; ".join(reasons[:4]) + more
            alike = re.sub(r"\d+", "#", why) == re.sub(r"\d+", "#", self._why)
            self._why, self._refused = why, self._refused + 1 if alike else 1
            if self._refused >= _REFUSALS:
                self._proofs_left = 0
            if self.mode == "replay":
                raise ReplayNotArmed(reason=self._why)
            if ran.refusals or walk.refusals:
                self._warn(
                    "rerun", f"reruns its Python on every call, which is slower: {self._why}"
                )
            return None
        if reasons or incomplete or (count < 2 and self.mode != "replay"):
            self._why = "two traces have to agree first"
            return None
        return armed
