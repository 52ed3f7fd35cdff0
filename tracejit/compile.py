"""`tracejit.compile`: the driver, and the only file that knows all stages.

    step(*args) → capture → passes → schedule → load → replay

A call first looks for an armed replay whose guard accepts it; else it reruns the Python under the
tracer, finds or builds the program for the captured graph, runs it, and commits the effects.
"""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import tracejit
from tracejit import knobs
from tracejit.capture import functions  # noqa: F401  fills the table of rules
from tracejit.capture.bind import Bound, bind, run, unwrap
from tracejit.capture.effects import Captured, finish, graph_key
from tracejit.capture.guards import Guard, arm, proof
from tracejit.capture.tracer import Tracer, current
from tracejit.codegen.triton import emit
from tracejit.errors import BackendUnavailable, ReplayNotArmed, TracejitError, UnsupportedOperation
from tracejit.ir.graph import Graph, verify
from tracejit.ir.hostcode import host_function
from tracejit.passes import optimize
from tracejit.runtime.cache import DiskCache
from tracejit.runtime.executor import Executor
from tracejit.runtime.interrupts import uninterrupted
from tracejit.runtime.program import Program
from tracejit.schedule import schedule
from tracejit.schedule.plan import Plan

MODES = ("auto", "rerun", "replay")
BACKENDS = ("auto", "c", "numpy", "triton", "interpret")
_MAX_PROGRAMS = 64  # per step; the least recently used goes first


@dataclass
class Stats:
    """Counters of one compiled step. `seconds` has the total per stage."""

    traces: int = 0  # times the Python body ran
    compiles: int = 0  # programs built
    replays: int = 0  # calls served without running the Python body
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

    guard: Guard
    compiled: _Compiled
    captured: Captured
    host_results: Callable[[list[float]], list[float]]
    misses: int = 0


def compile(
    step: Callable | None = None,
    *,
    mode: str = "auto",
    backend: str = "auto",
    fuse: bool = True,
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
    """
    if mode not in MODES:
        raise ValueError(f"mode is one of {MODES}, not {mode!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend is one of {BACKENDS}, not {backend!r}")
    if step is None:
        return functools.partial(compile, mode=mode, backend=backend, fuse=fuse)
    if not callable(step):
        raise TypeError(f"tracejit.compile takes a function, not {type(step).__name__}")
    return CompiledStep(step, mode, backend, fuse)


class CompiledStep:
    """A step that is traced on its first calls and replayed afterwards. Safe to call from several
    threads; calls run one after another."""

    def __init__(self, step: Callable, mode: str, backend: str, fuse: bool):
        functools.update_wrapper(self, step)
        self._step = step
        self._function, self._bound_to = unwrap(step)
        if self._function is None:
            raise TypeError(
                f"tracejit.compile takes a Python function or method, not {type(step).__name__}"
            )
        self.mode, self.backend, self.fuse = mode, backend, fuse
        self.observer: Callable | None = None  # sees (graph, inputs, outputs) before a run
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forget every plan, replay and count."""
        with self._lock:
            self.stats = Stats()
            self._programs: OrderedDict[tuple, _Compiled] = OrderedDict()
            self._replays: list[_Replay] = []
            self._last: _Compiled | None = None
            self._why = "it has not been called"

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

    def explain_mode(self) -> str:
        """Whether calls are replayed, and if not, why."""
        if self._replays:
            return f"replay: {len(self._replays)} plan(s) armed"
        return f"rerun: {self._why}"

    # ---- calls

    def __call__(self, *args: object, **kwargs: object) -> object:
        if current() is not None:  # inside another compiled step: part of its trace
            return self._step(*args, **kwargs)
        with self._lock:
            args = self._bound_to + args
            for i, replay in enumerate(self._replays):
                found = replay.guard(args, kwargs)
                if type(found) is not str:
                    if i:
                        self._replays.insert(0, self._replays.pop(i))
                    return self._replay(replay, *found)
            return self._rerun(args, kwargs)

    def _replay(self, replay: _Replay, reals: list[torch.Tensor], scalars: list[float]) -> object:
        captured, compiled = replay.captured, replay.compiled
        inputs = [
            reals[index] if kind == "tensor" else scalars[index] for kind, index in captured.sources
        ]
        host = replay.host_results(scalars)
        returned = self._execute(compiled, captured, inputs, reals, host)
        self.stats.replays += 1
        return returned

    def _execute(
        self,
        compiled: _Compiled,
        captured: Captured,
        inputs: list,
        reals: list[torch.Tensor],
        host: list[float],
    ) -> object:
        """Run a program and commit the effects. What can fail comes before the first write."""
        prepared = compiled.program.prepare(inputs)
        after = self.observer(compiled.final, inputs, prepared.outputs) if self.observer else None
        with uninterrupted():
            returned = captured.commit(reals, prepared.run(), host, compiled.backwards)
        if after is not None:
            after()
        self._last = compiled
        self._programs.move_to_end(compiled.key)
        return returned

    def _rerun(self, args: tuple, kwargs: dict) -> object:
        started = time.perf_counter()
        tracer = Tracer()
        bound = bind(tracer, self._function, args, kwargs)
        self.stats.traces += 1
        returned = [run(tracer, bound, self._function)]
        captured = finish(tracer, _identifier(self._function.__name__), returned)
        self.stats.add("capture", started)
        compiled = self._program_for(captured)
        inputs = [
            captured.reals[index] if kind == "tensor" else captured.scalars[index]
            for kind, index in captured.sources
        ]
        host_results = host_function(
            captured.graph.nodes, captured.scalar_values, captured.host_results
        )
        host = host_results(list(captured.scalars))
        replay = self._try_to_arm(bound, captured, compiled, host_results)
        returned = self._execute(compiled, captured, inputs, captured.reals, host)
        captured.release()
        if replay is not None:
            self._replays.insert(0, replay)
            del self._replays[_MAX_PROGRAMS:]
        return returned

    def _try_to_arm(
        self, bound: Bound, captured: Captured, compiled: _Compiled, host_results: Callable
    ) -> _Replay | None:
        """An armed replay, once two traces agree and everything the step reads is guarded."""
        count = compiled.seen.pop(captured.key, 0) + 1
        compiled.seen[captured.key] = count
        if len(compiled.seen) > _MAX_PROGRAMS:
            del compiled.seen[next(iter(compiled.seen))]
        if self.mode == "rerun":
            self._why = 'mode="rerun" was asked for'
            return None
        reads, reasons = proof(self._function, bound, captured)
        if not reasons and (count >= 2 or self.mode == "replay"):
            guard, text = arm(self._function, bound, captured, reads)
            if guard is not None:
                return _Replay(guard, compiled, captured, host_results)
            reasons = [text]
        self._why = "; ".join(reasons) or "two traces have to agree first"
        if self.mode == "replay" and reasons:
            raise ReplayNotArmed(reason=self._why)
        return None

    # ---- building programs

    def _program_for(self, captured: Captured) -> _Compiled:
        executor = self._executor(captured)
        aligned = tuple(t.data_ptr() % 16 == 0 for t in captured.reals)
        backward = tuple(graph_key(node.graph) for node in captured.outside)
        key = (captured.key[0], backward, aligned, executor)
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
        key = f"{tracejit.__version__} fuse={self.fuse}\n{graph}"
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
        devices = {str(t.device) for t in captured.reals}
        devices |= {n.out.type.device for n in captured.graph.nodes} - {"host"}
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


# torch.get_float32_matmul_precision() → how fp32 contractions are computed on a GPU
_PRECISION = {"highest": "ieee", "high": "tf32", "medium": "tf32"}


@functools.cache
def executor_for(backend: str, device: str, precision: str = "highest") -> Executor:
    """The executor that runs plans of a device under a backend."""
    on_cpu = device == "cpu"
    if backend == "auto":
        return _cpu_executor() if on_cpu else executor_for("triton", device, precision)
    if (backend == "triton") == on_cpu:
        raise BackendUnavailable(
            backend=backend,
            reason=f"the step's tensors are on {device}",
            remedy="Use backend='auto', or move the tensors",
        )
    if backend == "c":
        from tracejit.runtime.c_executor import CExecutor

        return CExecutor(torch.get_num_threads)
    if backend == "numpy":
        from tracejit.runtime.numpy_executor import NumpyExecutor

        return NumpyExecutor()
    from tracejit.runtime.triton_executor import TritonExecutor

    return TritonExecutor(backend, precision=_PRECISION[precision])


def _cpu_executor() -> Executor:
    """The C executor, or numpy with a warning where there is no C compiler."""
    try:
        return executor_for("c", "cpu")
    except BackendUnavailable as error:
        warnings.warn(f"tracejit: {error} Steps run on numpy until then.", stacklevel=2)
        return executor_for("numpy", "cpu")


def _identifier(name: str) -> str:
    return name if name.isidentifier() else "step"


def _where(function) -> str:
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"


def _report(step: CompiledStep, what: str) -> None:
    if knobs.debug() >= 1:
        print(f"tracejit: {step.__name__}: {what}")
