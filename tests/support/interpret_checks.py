"""Plans in Triton's interpreter against the evaluator."""

import numpy as np

from support.op_samples import Tensor
from tracejit.ir.interp import evaluate
from tracejit.ir.text import parse
from tracejit.ir.types import bits_to_float, contiguous_strides, float_to_bits
from tracejit.runtime.triton_executor import TritonExecutor
from tracejit.runtime.triton_launch import memory_bytes
from tracejit.schedule import schedule


def to_memory(array, dtype):
    """Compute-dtype values as they lie in memory."""
    if dtype.name == "bf16":
        return float_to_bits(array).reshape(np.shape(array))
    if dtype.name == "f16":
        return np.asarray(array).astype(np.float16)
    return np.array(array, dtype.compute, order="C")


def from_memory(array, dtype):
    """Inverse of to_memory."""
    if dtype.name == "bf16":
        return bits_to_float(array).reshape(array.shape)
    return array.astype(dtype.compute)


def empty_memory(buffer):
    """A buffer's memory, and the view of it that has the buffer's shape and strides."""
    storage = {"bf16": np.dtype(np.uint16), "f16": np.dtype(np.float16)}
    dtype = storage.get(buffer.type.dtype.name, buffer.type.dtype.compute)
    memory = np.zeros(memory_bytes(buffer) // dtype.itemsize, dtype)
    shape = buffer.type.shape
    strides = buffer.strides or contiguous_strides(shape)
    view = np.lib.stride_tricks.as_strided(memory, shape, [s * dtype.itemsize for s in strides])
    return memory, view


def run(graph, inputs, max_tile=64, fuse=True, plan=None, gpu=None):
    """Schedule a graph and run its plan; returns (results, written values, the loaded plan)."""
    plan = plan or schedule(graph, fuse=fuse, gpu=gpu)
    arena = np.full(plan.arena_bytes, 0xAB, np.uint8)
    memory, views, addresses = [], {}, []
    for buffer in plan.buffers:
        if buffer.kind == "arena":
            addresses.append(arena.ctypes.data + buffer.offset)
            continue
        array, views[buffer.name] = empty_memory(buffer)
        if buffer.kind == "input":
            views[buffer.name][...] = to_memory(inputs[buffer.index], buffer.type.dtype)
        memory.append(array)
        addresses.append(array.ctypes.data)
    slots = {value.id: inputs[position] for value, position in plan.host_params}
    for node in plan.host:
        args = [slots[a.id] if hasattr(a, "id") else a for a in node.args]
        slots[node.out.id] = node.op.eval(*args)
    loaded = TritonExecutor("interpret", max_tile=max_tile).load(plan)
    loaded(addresses, [slots[s.id] for s in plan.scalars])

    def read(name):
        return from_memory(views[name], plan.buffer(name).type.dtype)

    by_param = {b.index: b.name for b in plan.buffers if b.kind == "input"}
    position = {p.value: i for i, p in enumerate(graph.params)}
    written = [read(by_param[position[w.target]]) for w in graph.writes]
    return [read(name) for name in plan.results], written, loaded


def fill(graph, seed=0):
    """Inputs for a graph: floats of magnitude around 1, small integers, bools."""
    rng = np.random.default_rng(seed)
    inputs = []
    for param in graph.params:
        kind = param.value.type
        if kind.is_host:
            inputs.append(float(rng.uniform(0.1, 1.0)))
        else:
            inputs.append(Tensor(kind.dtype, kind.shape).build(rng))
    return inputs


def check(graph, *, max_tile=64, forms=None, tolerance=1e-5, seed=0, fuse=True, gpu=None):
    """The plan of a graph, or of its text, gives what the evaluator gives; `forms` are the kernels'
    forms, in order."""
    graph = parse(graph) if isinstance(graph, str) else graph
    inputs = fill(graph, seed)
    expected = evaluate(graph, inputs)
    results, written, loaded = run(graph, inputs, max_tile, fuse, gpu=gpu)
    for ours, theirs in zip([*results, *written], [*expected[0], *expected[1]], strict=True):
        assert ours.shape == theirs.shape
        if theirs.dtype.kind == "f":
            scale = max(1.0, float(np.abs(theirs).max(initial=0.0)))
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale)
        else:
            np.testing.assert_array_equal(ours, theirs)
    if forms is not None:
        assert [source.name.rpartition("_")[0] for source in loaded.sources] == forms
    return loaded
