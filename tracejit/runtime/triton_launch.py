"""A launch of a generated Triton kernel, ready: what the executor hands to those who run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tracejit.codegen.geometry import Geometry
from tracejit.codegen.triton import Source
from tracejit.ir.types import contiguous_strides
from tracejit.records import dataclass
from tracejit.schedule.plan import Launch, Plan, PlanBuffer

TRITON_NAME = {
    "f64": "fp64",
    "f32": "fp32",
    "f16": "fp16",
    "bf16": "bf16",
    "i64": "i64",
    "i32": "i32",
    "i16": "i16",
    "i8": "i8",
    "u8": "u8",
    "b1": "i1",
}


@dataclass(frozen=True, slots=True)
class DevicePointer:
    """What Triton needs of a tensor argument."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class LoadedLaunch:
    """One launch, ready: the jit function, which plan buffers it takes, its constants.

    source is what people see; `seen` is the same as Triton sees it, without the user's lines."""

    launch: Launch
    source: Source
    seen: Source
    function: object
    buffers: tuple[int, ...]  # positions in the plan's list of buffers
    memory: tuple[PlanBuffer, ...]  # these buffers
    first_scalar: int  # position of its first scalar in the loaded plan's table
    geometry: Geometry
    constants: Mapping[str, int]
    workspace: int = 0  # where its piece of the plan's workspace starts, in bytes
    # the pointers to buffers that its first argument, a table, holds, and whether they are aligned
    through: tuple[tuple[int, bool], ...] = ()
    # how many programs each phase has, where it runs in phases (`codegen/triton_phases.py`)
    phases: tuple[int, ...] = ()

    def options(self) -> dict[str, object]:
        """The constants, and the options that the numerics need. Programs that wait for each other
        are on the GPU at the same time, one on each multiprocessor, with all of its registers."""
        together = {"launch_cooperative_grid": True, "maxnreg": 255} if self.phases else {}
        return {
            **together,
            **self.constants,
            "num_warps": self.geometry.num_warps,
            "num_stages": self.geometry.num_stages,
            "enable_fp_fusion": False,
            "enable_reflect_ftz": False,
        }


Positions = Mapping[str, tuple[int, PlanBuffer]]


def positions(plan: Plan) -> Positions:
    """The buffers of a plan by name, each with its position."""
    return {buffer.name: (i, buffer) for i, buffer in enumerate(plan.buffers)}


def workspace_bytes(launches: Sequence[LoadedLaunch]) -> int:
    """Of all launches: each has its piece, where its counters rest at 0 between calls."""
    return max((one.workspace + one.geometry.workspace for one in launches), default=0)


def memory_bytes(buffer: PlanBuffer) -> int:
    """Bytes from a buffer's first element to the end of its last."""
    shape = buffer.type.shape
    if 0 in shape:
        return 0
    strides = buffer.strides or contiguous_strides(shape)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return (last + 1) * buffer.type.dtype.itemsize
