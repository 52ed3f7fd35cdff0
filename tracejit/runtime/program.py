"""A Program: a Plan loaded by an executor, with its memory; running it is one call.

Fresh outputs are allocated by torch and belong to the caller; the arena belongs to the program and
is reused. All allocation comes before the executor's first write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tracejit import knobs
from tracejit.ir.hostcode import host_function
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import contiguous_strides
from tracejit.runtime.executor import Executor
from tracejit.runtime.profile import ProfiledPlan
from tracejit.schedule.plan import Plan


class Program:
    """One compiled plan. Not safe for concurrent calls: the arena is shared between them."""

    def __init__(self, plan: Plan, executor: Executor):
        self.plan = plan
        profiled = knobs.debug() >= 2
        self.loaded = ProfiledPlan(plan, executor) if profiled else executor.load(plan)
        self._host = host_function(plan.host, [v for v, _ in plan.host_params], plan.scalars)
        self._host_positions = [position for _, position in plan.host_params]
        outputs = sorted((b for b in plan.buffers if b.kind == "output"), key=lambda b: b.index)
        self._outputs = [
            (
                b.type.shape,
                b.strides or contiguous_strides(b.type.shape),
                TO_TORCH[b.type.dtype],
                torch.device(b.type.device),
            )
            for b in outputs
        ]
        position = {b.name: i for i, b in enumerate(outputs)}
        self._results = [position[name] for name in plan.results]
        self._buffers = [(b.kind, b.offset if b.kind == "arena" else b.index) for b in plan.buffers]
        self._arena: torch.Tensor | None = None

    def prepare(self, inputs: Sequence[torch.Tensor | float]) -> Prepared:
        """Allocate a run's outputs and gather its addresses; nothing is written yet.

        `inputs` has one entry per graph param: a tensor, or a float for a host scalar.
        """
        outputs = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for shape, strides, dtype, device in self._outputs
        ]
        if self._arena is None:
            size = max(self.plan.arena_bytes, 1)
            self._arena = torch.empty(size, dtype=torch.uint8, device=self.plan.device)
        arena = self._arena.data_ptr()
        addresses = []
        for kind, number in self._buffers:
            if kind == "input":
                addresses.append(inputs[number].data_ptr())
            elif kind == "output":
                addresses.append(outputs[number].data_ptr())
            else:
                addresses.append(arena + number)
        scalars = self._host([inputs[i] for i in self._host_positions])
        return Prepared(self, addresses, scalars, [outputs[i] for i in self._results])


class Prepared:
    """A run with everything in place: `run` writes, and goes to its end."""

    __slots__ = ("program", "addresses", "scalars", "outputs")

    def __init__(
        self,
        program: Program,
        addresses: list[int],
        scalars: list[float],
        outputs: list[torch.Tensor],
    ):
        self.program = program
        self.addresses = addresses
        self.scalars = scalars
        self.outputs = outputs

    def run(self) -> list[torch.Tensor]:
        """Execute; returns the tensor of each graph result."""
        self.program.loaded(self.addresses, self.scalars)
        return self.outputs
