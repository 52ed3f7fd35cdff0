"""Plans on raw memory against the evaluator: every result, every write, not a byte beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tracejit.ir.graph import Graph
from tracejit.ir.interp import evaluate
from tracejit.ir.text import parse
from tracejit.ir.types import DType, bf16, bits_to_float, contiguous_strides, f16, float_to_bits
from tracejit.runtime.executor import Executor, LoadedPlan, inlined, memory_of
from tracejit.runtime.numpy_executor import NumpyExecutor
from tracejit.schedule import schedule
from tracejit.schedule.memory import Layout
from tracejit.schedule.plan import Plan, PlanBuffer

GUARD = 77  # bytes before and after every buffer, which no kernel may touch


@dataclass
class Memory:
    """A buffer's bytes from `start` to `end` between two guards, and the view of its elements."""

    raw: np.ndarray
    view: np.ndarray
    start: int
    end: int

    @property
    def address(self) -> int:
        return self.view.__array_interface__["data"][0]


def stored(dtype: DType) -> np.dtype:
    """The numpy dtype of a dtype's elements in memory."""
    storage = {bf16: np.dtype(np.uint16), f16: np.dtype(np.float16)}
    return storage.get(dtype, dtype.compute)


def allocate(buffer: PlanBuffer) -> Memory:
    """Fresh memory of a buffer's shape and strides, filled with a pattern."""
    shape = buffer.type.shape
    strides = contiguous_strides(shape) if buffer.strides is None else buffer.strides
    dtype = stored(buffer.type.dtype)
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else -1
    raw = np.full((last + 1) * dtype.itemsize + 2 * 128, GUARD, np.uint8)
    aligned = 64 if buffer.kind == "output" else 16  # torch's own memory, and what it may be handed
    start = 128 - (raw.__array_interface__["data"][0] % aligned)
    view = np.ndarray(shape, dtype, raw.data, start, tuple(s * dtype.itemsize for s in strides))
    return Memory(raw, view, start, start + (last + 1) * dtype.itemsize)


def write(memory: Memory, buffer: PlanBuffer, value: np.ndarray) -> None:
    memory.view[...] = float_to_bits(value) if buffer.type.dtype is bf16 else value


def read(memory: Memory, buffer: PlanBuffer) -> np.ndarray:
    if buffer.type.dtype is bf16:
        return bits_to_float(memory.view)
    return memory.view.astype(buffer.type.dtype.compute)


def make_inputs(graph: Graph, seed: int = 0) -> list:
    """Random inputs of a graph's params, representable in their dtypes."""
    rng = np.random.default_rng(seed)
    out = []
    for param in graph.params:
        kind = param.value.type
        if kind.is_host:
            out.append(float(rng.uniform(0.1, 1.0)))
        elif kind.dtype.kind == "f":
            value = rng.normal(size=kind.shape).astype(kind.dtype.compute)
            for k, stride in enumerate(param.strides or ()):
                if stride == 0:
                    value = np.broadcast_to(np.take(value, [0], k), kind.shape)
            if kind.dtype is bf16:
                value = bits_to_float(float_to_bits(value))
            if kind.dtype is f16:
                value = value.astype(np.float16).astype(np.float32)
            out.append(value)
        elif kind.dtype.kind == "b":
            out.append(rng.random(kind.shape) < 0.5)
        else:
            out.append(rng.integers(0, 9, kind.shape).astype(kind.dtype.compute))
    return out


TOLERANCE = {"f64": 1e-12, "f32": 2e-5, "f16": 4e-3, "bf16": 4e-2}


def other_order(plan: Plan) -> Plan:
    """The plan with the kernels that share a launch the other way round."""
    launches = (
        replace(one, kernel=replace(one.kernel, parts=one.kernel.parts[::-1]))
        for one in plan.launches
    )
    return replace(plan, launches=tuple(launches))


def run_once(loaded: LoadedPlan, addresses: list[int], scalars: list[float]) -> None:
    """Run a loaded plan by the lines that a call is made of."""
    places = [(f"addresses[{i}]", 0) for i in range(len(addresses))]
    run = inlined(loaded, places, [f"scalars[{i}]" for i in range(len(scalars))])
    names = dict(run.names) | {"addresses": addresses, "scalars": scalars}
    exec("\n".join([*run.gather, run.run]), names)


@dataclass(frozen=True)
class PlanChecks:
    """Plans run by one executor on fresh memory: `allocate` gives a buffer's, `layout` says where
    the arena's pieces lie."""

    executor: Executor
    allocate: Callable[[PlanBuffer], Memory] = allocate
    layout: Callable[[LoadedPlan, Plan], Layout] = memory_of

    def run(self, plan: Plan, graph: Graph, inputs: list) -> tuple[list, list]:
        """Run a plan on fresh memory; returns (results, final values of all written inputs)."""
        loaded = self.executor.load(plan)
        layout = self.layout(loaded, plan)
        arena = np.full(layout.arena_bytes + 128 + 64, GUARD, np.uint8)
        base = -(-arena.__array_interface__["data"][0] // 64) * 64
        memory: dict[str, Memory] = {}
        addresses = [base] * layout.count
        for i, buffer in enumerate(plan.buffers):
            if buffer.kind not in ("input", "output"):
                continue
            memory[buffer.name] = self.allocate(buffer)
            if buffer.kind == "input":
                write(memory[buffer.name], buffer, inputs[buffer.index])
            addresses[i] = memory[buffer.name].address
        for i, place in layout.places.items():
            addresses[i] = place.offset + (base if place.room is None else addresses[place.room])
        env = {value: float(inputs[position]) for value, position in plan.host_params}
        for node in plan.host:
            args = [env.get(a, a) for a in node.args]
            env[node.out] = node.op.eval(*args, **dict(node.attrs))
        run_once(loaded, addresses, [env.get(s, s) for s in plan.scalars])
        for m in memory.values():
            assert (m.raw[: m.start] == GUARD).all() and (m.raw[m.end :] == GUARD).all()
        edge = base - arena.__array_interface__["data"][0]
        assert (arena[:edge] == GUARD).all() and (arena[edge + layout.arena_bytes :] == GUARD).all()
        results = [read(memory[name], plan.buffer(name)) for name in plan.results]
        by_param = {b.index: b for b in plan.buffers if b.kind == "input"}
        position = {p.value: i for i, p in enumerate(graph.params)}
        written = [by_param[position[w.target]] for w in graph.writes]
        targets = [read(memory[b.name], b) for b in written]
        untouched = set(by_param.values()) - {plan.buffer(name) for name in plan.writes}
        for buffer in untouched:
            np.testing.assert_array_equal(
                read(memory[buffer.name], buffer),
                np.asarray(inputs[buffer.index], buffer.type.dtype.compute),
            )
        return results, targets

    def check(self, graph: Graph, plan: Plan, seed: int = 0) -> None:
        """A plan computes what the evaluator does, in whatever order what is side by side runs."""
        inputs = make_inputs(graph, seed)
        expected, written = evaluate(graph, inputs)
        for order in dict.fromkeys((plan, other_order(plan))):
            results, targets = self.run(order, graph, inputs)
            found = zip([*results, *targets], [*expected, *written], graph.outputs(), strict=True)
            for mine, right, value in found:
                tolerance = TOLERANCE.get(value.type.dtype.name, 0)
                size = max(1.0, float(np.max(np.abs(right), initial=0))) if tolerance else 1
                np.testing.assert_allclose(
                    mine,
                    right,
                    rtol=tolerance,
                    atol=tolerance * size,
                    err_msg=f"{value}\n{plan.launches}",
                )

    def both(self, text: str, seed: int = 0) -> tuple[Plan, Plan]:
        """Check a graph fused and unfused; returns both plans."""
        graph = parse(text)
        plans = schedule(graph), schedule(graph, fuse=False)
        for plan in plans:
            self.check(graph, plan, seed)
        return plans


ON_NUMPY = PlanChecks(NumpyExecutor())
run_plan, check, both = ON_NUMPY.run, ON_NUMPY.check, ON_NUMPY.both
