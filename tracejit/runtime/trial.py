"""A loaded plan timed on memory of its own, so that nothing of the user's is read or written.

Floats are 1, and so are integers and runtime scalars: an index is in range, or masked off, and no
division is by 0. Kernels take the same time for other values, but for a branch here and there.
"""

from __future__ import annotations

import os

import torch

from tracejit.ir.process_groups import silent
from tracejit.ir.torch_types import TO_TORCH
from tracejit.runtime.executor import LoadedPlan, memory_of
from tracejit.runtime.triton_launch import memory_bytes
from tracejit.schedule.plan import Plan

_RUNS = 5  # of which the best one counts; one goes before
_SHARE = 0.25  # of the memory that is free, at most
_SECONDS = 2.0  # after which no further run begins


def trial(plan: Plan, loaded: LoadedPlan) -> list[float] | None:
    """The seconds of each source, the least of several runs; None where memory is short."""
    device, layout = torch.device(plan.device), memory_of(loaded, plan)
    if scratch_bytes(plan, layout.arena_bytes) > _SHARE * _free_bytes(device):
        return None
    addresses = [0] * layout.count
    kept = [torch.ones(layout.arena_bytes, dtype=torch.uint8, device=device)]
    for i, buffer in enumerate(plan.buffers):
        if buffer.kind in ("input", "output"):
            dtype = TO_TORCH[buffer.type.dtype]
            count = memory_bytes(buffer) // buffer.type.dtype.itemsize
            kept.append(torch.ones(count, dtype=dtype, device=device))
            addresses[i] = kept[-1].data_ptr()
    for i, place in layout.places.items():
        room = kept[0].data_ptr() if place.room is None else addresses[place.room]
        addresses[i] = room + place.offset
    scalars, best, spent = [1.0] * len(plan.scalars), None, 0.0
    for n in range(_RUNS + 1):
        with silent():  # no other rank may be there
            seconds = loaded.timed(addresses, scalars)
        spent += sum(seconds)
        if n:
            best = seconds if best is None else list(map(min, best, seconds))
        if best is not None and spent > _SECONDS:
            break
    return best


def scratch_bytes(plan: Plan, arena_bytes: int) -> int:
    """What a trial allocates."""
    return arena_bytes + sum(memory_bytes(b) for b in plan.buffers if b.kind in ("input", "output"))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
