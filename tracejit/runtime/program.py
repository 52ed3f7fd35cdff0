"""A Program: a Plan loaded by an executor, with its memory; running it is one call.

Fresh outputs belong to the caller for as long as anyone holds them; the arena
belongs to the program. All allocation comes before the executor's first write.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from sys import getrefcount

import torch

from tracejit import knobs
from tracejit.ir.hostcode import HostCode, host_function
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import contiguous_strides
from tracejit.runtime.executor import Executor, Inlined, inlined
from tracejit.runtime.profile import ProfiledPlan
from tracejit.schedule.plan import Plan, PlanBuffer

_users = torch._C._storage_Use_Count


class Program:
    """One compiled plan. Not safe for concurrent calls: the arena is shared between them."""

    def __init__(self, plan: Plan, executor: Executor):
        self.plan = plan
        profiled = knobs.debug() >= 2
        self.loaded = ProfiledPlan(plan, executor) if profiled else executor.load(plan)
        self._host = host_function(plan.host, [v for v, _ in plan.host_params], plan.scalars)
        self._host_positions = [position for _, position in plan.host_params]
        outputs = sorted((b for b in plan.buffers if b.kind == "output"), key=lambda b: b.index)
        self._outputs = [_Fresh(b) for b in outputs]
        position = {b.name: i for i, b in enumerate(outputs)}
        self._results = [position[name] for name in plan.results]
        self._inputs: list[tuple[int, int]] = []  # (buffer, graph param)
        self._placed: list[tuple[int, int]] = []  # (buffer, output)
        for i, buffer in enumerate(plan.buffers):
            if buffer.kind == "input":
                self._inputs.append((i, buffer.index))
            elif buffer.kind == "output":
                self._placed.append((i, position[buffer.name]))
        self._runs = 0
        self._arena: torch.Tensor | None = None  # kept from the second run on, as outputs are
        self._addresses: list[int] = []  # of the buffers in the arena; the others' change per run

    def prepare(self, inputs: Sequence[torch.Tensor | float]) -> Prepared:
        """Allocate a run's outputs and gather its addresses; nothing is written yet.

        `inputs` has one entry per graph param: a tensor, or a float where it is a host scalar.
        """
        arena = self._arena
        if arena is None:
            arena = self._allocate()
        table, again = self._addresses.copy(), self._runs > 0
        for i, k in self._inputs:
            table[i] = inputs[k].data_ptr()
        fresh = [output.take((), again) for output in self._outputs]
        for i, k in self._placed:
            table[i] = fresh[k][1]
        outputs = [fresh[k][0] for k in self._results]
        scalars = self._host([inputs[i] for i in self._host_positions])
        self._runs += 1
        return Prepared(self, table, scalars, outputs, arena)

    def inlined(
        self, params: Sequence[str], leaving: str, code: HostCode
    ) -> tuple[Inlined, list[str]]:
        """A run as lines of Python, and the expressions of the graph's results, for many runs.

        params:   per graph param an expression: of an address where it is a tensor, or of a float.
        leaving:  an expression of the storages that each have one holder outside, which lets go
            once the plan has run and until then is not read: an output may be written there.
        code:     the host arithmetic goes there; its lines come before the run's.
        """
        self._runs += 1
        if self._arena is None:
            self._allocate()
        table = [str(address) for address in self._addresses]
        for i, k in self._inputs:
            table[i] = params[k]
        for i, k in self._placed:
            table[i] = f"place{k}"
        given = {v: params[i] for v, i in self.plan.host_params}
        scalars = code.add(self.plan.host, self.plan.scalars, given)
        run = inlined(self.loaded, table, scalars)
        takes = [
            f"fresh{k}, place{k} = output{k}.take({leaving}, True)"
            for k in range(len(self._outputs))
        ]
        names = {f"output{k}": output for k, output in enumerate(self._outputs)}
        names["arena"] = self._arena  # its address is in the lines
        whole = replace(run, gather=[*takes, *run.gather], names=run.names | names)
        return whole, [f"fresh{k}" for k in self._results]

    def _allocate(self) -> torch.Tensor:
        some = any(b.kind == "arena" for b in self.plan.buffers)
        size = max(self.plan.arena_bytes, int(some))
        arena = torch.empty(size, dtype=torch.uint8, device=self.plan.device)
        start = arena.data_ptr()
        self._addresses = [start + b.offset if b.kind == "arena" else 0 for b in self.plan.buffers]
        if self._runs:
            self._arena = arena
        return arena


class _Fresh:
    """Memory for one output, which the caller keeps: reused when nobody holds it any more."""

    KEPT = 2  # a gradient of the last step is held while the next one is written

    def __init__(self, buffer: PlanBuffer):
        self.shape = buffer.type.shape
        self.strides = buffer.strides or contiguous_strides(buffer.type.shape)
        self.options = {
            "dtype": TO_TORCH[buffer.type.dtype],
            "device": torch.device(buffer.type.device),
        }
        self.kept: list[_Kept] = []

    def take(self, leaving: Collection[int], keep: bool) -> tuple[torch.Tensor, int]:
        """A tensor that shares memory with no other that the caller could hold, and its address.

        Without `keep` the memory is the caller's alone: many plans run just once, such as the one
        that makes an optimizer's state.
        """
        for kept in self.kept:
            held = _users(kept.number) + getrefcount(kept.storage) - kept.alone
            if held <= 0:
                return kept.memory.data, kept.address
            if held == 1 and kept.number in leaving:
                self.kept = [kept]  # one is enough from now on
                return kept.memory.data, kept.address
        memory = torch.empty_strided(self.shape, self.strides, **self.options)
        if not keep or len(self.kept) >= self.KEPT:
            return memory, memory.data_ptr()
        self.kept.append(_Kept(memory))
        return memory.data, memory.data_ptr()


class _Kept:
    """Memory that may be handed out again."""

    __slots__ = ("memory", "address", "storage", "number", "alone")

    def __init__(self, memory: torch.Tensor):
        self.memory, self.address = memory, memory.data_ptr()
        self.storage = memory.untyped_storage()
        self.number = self.storage._cdata
        # tensors on the storage, and references to the Python object that stands for it
        self.alone = _users(self.number) + getrefcount(self.storage)


class Prepared:
    """A run with everything in place: `run` writes, and goes to its end."""

    __slots__ = ("program", "addresses", "scalars", "outputs", "arena")

    def __init__(
        self,
        program: Program,
        addresses: list[int],
        scalars: list[float],
        outputs: list[torch.Tensor],
        arena: torch.Tensor,
    ):
        self.program = program
        self.addresses = addresses
        self.scalars = scalars
        self.outputs = outputs
        self.arena = arena

    def run(self) -> list[torch.Tensor]:
        """Execute; returns the tensor of each graph result."""
        self.program.loaded(self.addresses, self.scalars)
        return self.outputs
