"""`tracejit.compile`: the driver, and the only file that knows all stages.

    step(*args) → capture → passes → schedule → load → replay

A call first looks for an armed replay whose guard accepts it; else it reruns the Python under the
tracer, finds or builds the program for the captured graph, runs it, and commits the effects.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tracejit import knobs
from tracejit.capture import functions  # noqa: F401  fills the table of rules
from tracejit.capture.bind import bind, run, unwrap
from tracejit.capture.commit import Commit, committer, leaver
from tracejit.capture.effects import Captured, finish, graph_key
from tracejit.capture.guards import Armed, arm, reasons_against, survey
from tracejit.capture.heap import Walk
from tracejit.capture.literals import Literals
from tracejit.capture.tracer import Tracer, current
from tracejit.capture.watch import Seen, watch
from tracejit.codegen.triton import emit
from tracejit.errors import (
    ReplayNotArmed,
    TracejitError,
    TracejitWarning,
    UnsupportedOperation,
)
from tracejit.ir.graph import Graph, verify
from tracejit.ir.hostcode import host_function
from tracejit.passes import optimize
from tracejit.runtime.cache import DiskCache, digest_of
from tracejit.runtime.executor import Executor
from tracejit.runtime.interrupts import uninterrupted
from tracejit.runtime.program import Prepared, Program
from tracejit.runtime.select import executor_for
from tracejit.schedule import schedule
from tracejit.schedule.plan import Plan

MODES = ("auto", "rerun", "replay")
BACKENDS = ("auto", "c", "numpy", "triton", "interpret")
_MAX_PROGRAMS = 64  # per step; the least recently used goes first
_PROOFS = 4  # traces of each new program that are watched, to arm a replay
_tracing = torch._C._len_torch_function_stack  # not zero when a trace is going on
_MANY_PLANS = 9  # from this number of plans on, a step is told that it makes many
_MANY_RETRACES = 20  # or of failed guards, where these are more than the replays


@dataclass
class Stats:
    """Counters of one compiled step. `seconds` has the total per stage."""

    traces: int = 0  # times the Python body ran
    compiles: int = 0  # programs built
    replays: int = 0  # calls served without running the Python body
    retraces: int = 0  # calls that an armed replay did not accept, and no other did
    reruns: int = 0  # calls that ran the Python body on a program built before
    cache_hits: int = 0  # plans found in the disk cache
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, started: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


@dataclass
class _Compiled:
    """A program with the graphs that it came from."""

    key: tuple
    program: Program
    final: Graph
    backwards: list[_Backward] = field(default_factory=list)
    seen: dict[tuple, int] = field(default_factory=dict)  # captured key -> times traced


class _Backward:
    """Runs the backward graph of a returned tensor, which is compiled when it is first needed."""

    def __init__(self, step: CompiledStep, graph: Graph, executor: Executor):
        self.step, self.graph, self.executor = step, graph, executor
        self.program: Program | None = None
        self.lock = threading.Lock()

    def __call__(self, inputs: list) -> list[torch.Tensor]:
        with self.lock:
            if self.program is None:
                self.program = self.step._backward_program(self.graph, self.executor)
            return self.program.prepare(inputs).run()


@dataclass
class _Replay:
    """An armed replay: the guard, the program, and what to commit."""

    armed: Armed
    compiled: _Compiled
    captured: Captured
    host_results: Callable[[list[float]], list[float]]
    commit: Commit

    def __post_init__(self) -> None:
        # per graph param: whether it is a runtime scalar, and its position among these or the reals
        self.sources = [(kind == "scalar", index) for kind, index in self.captured.sources]
        self.leaving = leaver(self.captured)


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
            self._programs: OrderedDict[tuple, _Compiled] = OrderedDict()
            self._literals = Literals()
            self._replays: list[_Replay] = []
            self._last: _Compiled | None = None
            self._why = "it has not been called"
            self._ran: Seen | None = None  # what the last watched trace ran
            self._proofs_left = _PROOFS
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
        return [c.program.plan for c in self._programs.values()]

    @property
    def backward_plans(self) -> list[Plan]:
        """The plans that backward outside the step has run, of the plan that ran last."""
        if self._last is None:
            return []
        return [b.program.plan for b in self._last.backwards if b.program is not None]

    @property
    def kernels(self) -> list[str]:
        """The Triton source of each launch of the plan that ran last."""
        if self._last is None:
            return []
        return [
            emit(launch.kernel, launch.sizes).text for launch in self._last.program.plan.launches
        ]

    @property
    def guards(self) -> list[str]:
        """The source of the guard of each armed replay, the one that ran last first."""
        return [replay.armed.text for replay in self._replays]

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
            for i, replay in enumerate(self._replays):
                found = replay.armed.guard(args, kwargs)
                if type(found) is not str:
                    if i:
                        self._replays.insert(0, self._replays.pop(i))
                    return self._replay(replay, *found)
                failed = failed or found
            return self._rerun(args, kwargs, failed)

    def _replay(
        self,
        replay: _Replay,
        reals: list[torch.Tensor],
        scalars: list[float],
        addresses: list[int],
    ) -> object:
        captured, compiled = replay.captured, replay.compiled
        for bound in captured.bounds:
            bound.check(reals)
        if replay.armed.after is not None:
            replay.armed.after(scalars)
        inputs = None
        if self.observer is not None:
            inputs = [
                reals[index] if kind == "tensor" else scalars[index]
                for kind, index in captured.sources
            ]
        host = replay.host_results(scalars)
        both = addresses, scalars
        given = [both[is_scalar][index] for is_scalar, index in replay.sources]
        prepared = compiled.program.start(given, given, replay.leaving(reals))
        returned = self._run(compiled, replay.commit, prepared, inputs, reals, host)
        self.stats.replays += 1
        return returned

    def _run(
        self,
        compiled: _Compiled,
        commit: Commit,
        prepared: Prepared,
        inputs: list | None,
        reals: list[torch.Tensor],
        host: list[float],
    ) -> object:
        """Run a program for which all is prepared, and commit the effects."""
        after = self.observer(compiled.final, inputs, prepared.outputs) if self.observer else None
        with uninterrupted():
            returned = commit(reals, prepared.run(), host, compiled.backwards)
        if after is not None:
            after()
        if self._last is not compiled:
            self._last = compiled
            self._programs.move_to_end(compiled.key)
        return returned

    def _rerun(self, args: tuple, kwargs: dict, failed: str) -> object:
        """Run the Python under a tracer. `failed`: why a replay did not accept the call."""
        started = time.perf_counter()
        walk = None
        watched = self.mode != "rerun" and self._proofs_left > 0
        if watched and (self._ran is not None or self.mode == "replay"):
            walk = survey(self._function, args, kwargs, self._ran)
        tracer = Tracer()
        bound = bind(tracer, self._function, args, kwargs)
        self.stats.traces += 1
        with watch(watched) as ran:
            returned = [run(tracer, bound, self._function)]
        name = _identifier(self._function.__name__)
        captured = finish(tracer, name, returned, keep_grads=self.keep_grads)
        self.stats.add("capture", started)
        try:
            compiles = self.stats.compiles
            compiled = self._program_for(captured)
            self._note(failed, built=self.stats.compiles > compiles)
            inputs = [
                captured.reals[index] if kind == "tensor" else captured.scalars[index]
                for kind, index in captured.sources
            ]
            host_results = host_function(
                captured.host_nodes, captured.scalar_values, captured.host_results
            )
            host = host_results(list(captured.scalars))
            for bound in captured.bounds:
                bound.check(captured.reals)
            armed = self._prove(walk, ran, args, kwargs, captured, compiled)
            commit = committer(captured) if armed is not None else None
            prepared = compiled.program.prepare(inputs)
        except BaseException:
            captured.undo()
            raise
        returned = self._run(compiled, captured.commit, prepared, inputs, captured.reals, host)
        captured.release()
        tracer.release()
        if armed is not None:
            self._replays.insert(0, _Replay(armed, compiled, captured, host_results, commit))
            del self._replays[_MAX_PROGRAMS:]
        return returned

    def _note(self, failed: str, *, built: bool) -> None:
        """Keep why a call was not replayed, and warn of a step that keeps making plans."""
        if failed:
            text = f"{failed}; {'a new plan was built' if built else 'its plan was there'}"
            self._retraces.append(text)
            self.stats.retraces += 1
            _report(self, f"not replayed: {text}")
        if built:
            self._proofs_left = min(self._proofs_left + _PROOFS, _PROOFS * _MAX_PROGRAMS)
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
        compiled: _Compiled,
    ) -> Armed | None:
        """A replay's guard, once two traces agree, all that ran is known to be pure, all that
        it read is guarded, and it changed nothing of that. A reason is kept otherwise."""
        if self.mode == "rerun":
            self._why = 'mode="rerun" was asked for'
            return None
        count = compiled.seen.pop(captured.key, 0) + 1
        compiled.seen[captured.key] = count
        if len(compiled.seen) > _MAX_PROGRAMS:
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
            self._why = "; ".join(reasons[:4]) + more
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

    # ---- building programs

    def _program_for(self, captured: Captured) -> _Compiled:
        executor = self._executor(captured)
        aligned = tuple(t.data_ptr() % 16 == 0 for t in captured.reals)
        backward = tuple(graph_key(node.graph) for node in captured.outside)
        key = (captured.key[0], backward, aligned, executor)
        found = self._programs.get(key)
        if found is None and self._literals.generalize(captured):
            key = (captured.key[0], *key[1:])
            found = self._programs.get(key)
        if found is not None:
            self._programs.move_to_end(key)
            self.stats.reruns += 1
            return found
        final = self._optimized(captured.graph)
        plan = self._plan(final)
        started = time.perf_counter()
        backwards = [_Backward(self, node.graph, executor) for node in captured.outside]
        compiled = _Compiled(key, Program(plan, executor), final, backwards)
        self.stats.add("load", started)
        self.stats.compiles += 1
        _report(self, f"compiled {len(plan.launches)} launch(es) for {executor.name}")
        self._dump(captured.graph, final, plan)
        self._programs[key] = compiled
        while len(self._programs) > _MAX_PROGRAMS:
            _, dropped = self._programs.popitem(last=False)
            self._replays = [r for r in self._replays if r.compiled is not dropped]
        return compiled

    def _backward_program(self, graph: Graph, executor: Executor) -> Program:
        final = self._optimized(graph)
        plan = self._plan(final)
        program = Program(plan, executor)
        self.stats.compiles += 1
        _report(self, f"compiled {len(plan.launches)} launch(es) of backward for {executor.name}")
        self._dump(graph, final, plan)
        return program

    def _optimized(self, graph: Graph) -> Graph:
        started = time.perf_counter()
        if knobs.verify():
            verify(graph)

        def on_pass(name: str, result: Graph) -> None:
            if knobs.debug() >= 5:
                print(f"# after {name}\n{result}")

        final = optimize(graph, on_pass)
        self.stats.add("passes", started)
        if knobs.debug() >= 3:
            print(final)
        return final

    def _plan(self, graph: Graph) -> Plan:
        """The schedule of a graph, from the disk cache when it is there."""
        from tracejit.schedule.plan_text import parse_plan

        started = time.perf_counter()
        cache = DiskCache()
        made_by = digest_of("ir", "passes", "schedule")
        key = f"{made_by} fuse={self.fuse}\n{graph}"
        text = cache.get("plan", key)
        plan = None
        if text is not None:
            try:
                plan = parse_plan(text)
                self.stats.cache_hits += 1
            except TracejitError:
                plan = None  # written by another version: rebuilt below
        if plan is None:
            plan = schedule(graph, fuse=self.fuse)
            cache.put("plan", key, str(plan))
        self.stats.add("schedule", started)
        if knobs.debug() >= 4:
            for launch in plan.launches:
                print(emit(launch.kernel, launch.sizes).text)
        return plan

    def _executor(self, captured: Captured) -> Executor:
        graph = captured.graph
        devices = {p.value.type.device for p in graph.params}
        devices = (devices | {n.out.type.device for n in graph.nodes}) - {"host"}
        if len(devices) > 1:
            raise UnsupportedOperation(
                where=_where(self._function),
                function="a step over several devices",
                shapes=", ".join(sorted(devices)),
                remedy="Move every tensor that the step uses to one device.",
            )
        device = devices.pop() if devices else "cpu"
        precision = "highest" if device == "cpu" else torch.get_float32_matmul_precision()
        return executor_for(self.backend, device, precision)

    def _dump(self, raw: Graph, final: Graph, plan: Plan) -> None:
        directory = knobs.dump_dir()
        if directory is None:
            return
        at = Path(directory) / f"{_identifier(self.__name__)}_{self.stats.compiles}"
        at.mkdir(parents=True, exist_ok=True)
        (at / "0_captured.txt").write_text(str(raw))
        (at / "1_final.txt").write_text(str(final))
        (at / "2_plan.txt").write_text(str(plan))
        for i, launch in enumerate(plan.launches):
            source = emit(launch.kernel, launch.sizes)
            (at / f"3_kernel_{i}_{source.name}.py").write_text(source.text)


def _identifier(name: str) -> str:
    return name if name.isidentifier() else "step"


def _where(function) -> str:
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"


def _report(step: CompiledStep, what: str) -> None:
    if knobs.debug() >= 1:
        print(f"tracejit: {step.__name__}: {what}")
