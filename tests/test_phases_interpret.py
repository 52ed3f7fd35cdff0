"""Several steps in one kernel, run phase by phase in Triton's interpreter: as single launches."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets, so it needs TRITON_INTERPRET=1", allow_module_level=True)

from support.interpret_checks import empty_memory, to_memory
from support.op_samples import Tensor
from support.programs import plans_of
from tracejit.codegen.triton_phases import HEADER
from tracejit.runtime import interpreter
from tracejit.runtime.triton_executor import TritonExecutor
from tracejit.runtime.triton_launch import LoadedLaunch
from tracejit.schedule.plan import Plan, unrolled

pytestmark = pytest.mark.interpret

STEPS = 3
PROGRAMS = 3  # fewer than phases have, so that they go round
NAMES = ("1 manual", "2 zero_", "5 sgd", "7 classifier", "layer norm", "6 recurrence", "bf16")


class Memory:
    """Buffers of a plan with the same values each time."""

    def __init__(self, plan: Plan):
        rng = np.random.default_rng(0)
        self.arena = np.full(plan.arena_bytes, 0xAB, np.uint8)
        self.arrays, self.addresses, self.places = {}, [], []
        for buffer in plan.buffers:
            if buffer.kind == "arena":
                self.addresses.append(self.arena.ctypes.data + buffer.offset)
                continue
            array, view = empty_memory(buffer)
            if buffer.kind == "input":
                dtype = buffer.type.dtype
                values = Tensor(dtype, buffer.type.shape).build(rng)
                if dtype.is_float:
                    values = np.abs(values)
                view[...] = to_memory(values, dtype)
            self.arrays[buffer.name] = array
            self.addresses.append(array.ctypes.data)
            self.places.append((array.ctypes.data, array.nbytes))
        self.places.append((self.arena.ctypes.data, self.arena.nbytes))


def in_phases(
    loaded: LoadedLaunch, memory: Memory, scalars: Sequence[float], order: str, seed: int
) -> None:
    """One step, as the kernel does it: a launch for each phase, without barriers."""
    kernel = loaded.launch.kernel
    row = [memory.addresses[i] for i in loaded.buffers]
    work = np.zeros(loaded.geometry.workspace, np.uint8)
    for phase in range(len(loaded.phases)):
        words = struct.pack(f"4q{len(row)}Q", 0, 1, phase, phase + 1, *row)
        words += struct.pack(f"{len(kernel.scalars)}d", *scalars)
        table = np.frombuffer(words, np.uint8).copy()
        assert len(table) == 8 * (HEADER + len(row) + len(scalars))
        pointers = [interpreter.Pointer(table.ctypes.data, "i64")]
        places = [*memory.places, (table.ctypes.data, table.nbytes)]
        if work.nbytes:
            pointers.append(interpreter.Pointer(work.ctypes.data, "i8"))
            places.append((work.ctypes.data, work.nbytes))
        interpreter.run(
            loaded.function,
            (PROGRAMS,),
            pointers,
            loaded.constants,
            buffers=places,
            order=order,
            seed=seed + phase,
        )


@pytest.mark.sweep(0.17)
@pytest.mark.parametrize("name", NAMES)
def test_phases_are_the_launches(name):
    plan = unrolled(plans_of(name, small=True, backend="interpret")[-1])
    executor = TritonExecutor("interpret", max_tile=64)
    alone, together = Memory(plan), Memory(plan)
    scalars = [0.5 + 0.125 * i for i in range(len(plan.scalars))]
    plain = executor.load(plan)
    loaded = executor.load_phases(plan, [True] * len(plan.buffers))
    assert len(loaded.phases) == len(plan.launches) and max(loaded.phases) > PROGRAMS
    slots = [scalars[i] for launch in plan.launches for i in launch.scalars]
    for step in range(STEPS):
        plain(alone.addresses, scalars)
        in_phases(loaded, together, slots, ("shuffled", "reversed", "forward")[step], step)
    for buffer in plan.buffers:
        if buffer.kind == "arena":
            continue
        ours, theirs = (m.arrays[buffer.name] for m in (together, alone))
        if buffer.type.dtype.name in ("f32", "f64"):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=buffer.name)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=buffer.name)
    assert any(np.any(m != 0) for m in together.arrays.values())
