"""A Program: a Plan loaded by an executor, with its memory; a run of it as lines of Python.

Fresh outputs belong to the caller for as long as anyone holds them; the arena
is shared with other programs (`memory.py`). All allocation comes before the executor's first write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tracejit import knobs
from tracejit.errors import GraphError
from tracejit.ir import host_memory
from tracejit.ir.graph import Graph
from tracejit.ir.hostcode import HostCode, host_names
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import contiguous_strides
from tracejit.runtime.agreement import Agreement
from tracejit.runtime.executor import Executor, Inlined, inlined, memory_of
from tracejit.runtime.memory import Memory
from tracejit.runtime.profile import ProfiledPlan
from tracejit.schedule.plan import Plan


class Program:
    """One compiled plan. Programs that share a Memory run one after another. GraphError is raised
    where a graph is required and there can be none."""

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        memory: Memory | None = None,
        *,
        require_graph: bool = False,
        agreement: Agreement | None = None,
    ):
        self.agreement = agreement  # of the ranks, where the plan has collectives
        self.plan, self.executor = plan, executor.name
        self.graph: Graph | None = None  # that it was scheduled from, if somebody may ask for it
        self.computes = getattr(executor, "computes", True)  # not for a GPU that is not here
        loaded = executor.load(plan)
        if require_graph:
            if not hasattr(loaded, "require_graph"):
                raise GraphError(step=plan.name, reason=f"it runs on {plan.device}")
            if knobs.debug() >= 2:
                raise GraphError(step=plan.name, reason="TRACEJIT_DEBUG=2 times each launch")
            loaded.require_graph()
        profiled = knobs.debug() >= 2 and self.computes
        self.loaded = ProfiledPlan(plan, loaded) if profiled else loaded
        memory = memory or Memory()
        outputs = sorted((b for b in plan.buffers if b.kind == "output"), key=lambda b: b.index)
        device = getattr(self.loaded, "device", None)  # of a GPU
        self.on_cpu = device is None
        self.capturing = bool if device is None else device.capturing  # asks: into a CUDA graph
        self._outputs = memory.outputs(outputs, device)
        position = {b.name: i for i, b in enumerate(outputs)}
        self._results = [position[name] for name in plan.results]
        self._inputs: list[tuple[int, int]] = []  # (buffer, graph param)
        self._placed: list[tuple[int, int]] = []  # (buffer, output)
        for i, buffer in enumerate(plan.buffers):
            if buffer.kind == "input":
                self._inputs.append((i, buffer.index))
            elif buffer.kind == "output":
                self._placed.append((i, position[buffer.name]))
        layout = memory_of(self.loaded, plan)
        self._count = layout.count  # of addresses
        self._rooms = [  # (address, the one that it is in, bytes from there)
            (i, layout.count if place.room is None else place.room, place.offset)
            for i, place in layout.places.items()
        ]
        some = any(place.room is None for place in layout.places.values())
        self.arena_bytes = max(layout.arena_bytes, int(some))
        self._arena = memory.arena(device)
        # the one element of a result, of any dtype
        self.read = getattr(self.loaded, "read", host_memory.read)
        # says that a call will come soon
        self.expect = getattr(self.loaded, "expect", lambda: None)

    def inlined(
        self, params: Sequence[str], reusable: str, code: HostCode
    ) -> tuple[Inlined, list[str]]:
        """A run as lines of Python, and the expressions of the graph's results, for many runs.

        params:   per graph param an expression: of an address where it is a tensor, or of a float.
        reusable: an expression of the storages where an output may be written (see memory.py).
        code:     the host arithmetic goes there; its lines come before the run's.
        """
        table = [("0", 0)] * self._count + [("arena", 0)]
        for i, k in self._inputs:
            table[i] = params[k], 0
        for i, k in self._placed:
            table[i] = f"place{k}", 0
        for i, room, offset in self._rooms:
            table[i] = table[room][0], offset
        given = {v: params[i] for v, i in self.plan.host_params}
        scalars = code.add(self.plan.host, self.plan.scalars, given)
        run = inlined(self.loaded, table[:-1], scalars)
        if self.agreement is not None or run.undone:
            reusable = "()"  # a step that fails leaves the gradients as they were
        gather = [
            f"fresh{k}, place{k} = output{k}.take({reusable})" for k in range(len(self._outputs))
        ]
        names = {f"output{k}": output for k, output in enumerate(self._outputs)}
        if self.arena_bytes:
            gather += [f"held = take({self.arena_bytes})", "arena = held[0]"]
            names |= {"take": self._arena.take, "give": self._arena.give}
            run = replace(run, run=f"{run.run}; give(held)")
        if self.agreement is not None:
            numbers = ", ".join(params[i] for i in self.agreement.positions)
            gather.append(f"agree({numbers})")
            names["agree"] = self.agreement.begin
        whole = replace(run, gather=[*gather, *run.gather], names=run.names | names)
        return whole, [f"fresh{k}" for k in self._results]

    def rehearse(self) -> None:
        """Make a call with memory that stands for the inputs, where nothing is computed: what it
        needs is loaded."""
        device, inputs = self.loaded.device, {}
        for buffer in self.plan.buffers:
            if buffer.kind == "input":
                shape, dtype = buffer.type.shape, TO_TORCH[buffer.type.dtype]
                strides = buffer.strides or contiguous_strides(shape)
                inputs[buffer.index] = device.empty_strided(shape, strides, dtype)
        inputs |= {i: 1.0 for _, i in self.plan.host_params}
        self.function()([inputs.get(i) for i in range(1 + max(inputs, default=-1))])

    def function(self) -> Callable[[list], list[torch.Tensor]]:
        """A run as a function from the graph's inputs (a tensor, or a float where it is a host
        scalar) to the tensor of each of its results."""
        tensors = {k for _, k in self._inputs}
        count = 1 + max((*tensors, *(i for _, i in self.plan.host_params)), default=-1)
        params = [f"inputs[{i}]{'.data_ptr()' * (i in tensors)}" for i in range(count)]
        code = HostCode()
        run, results = self.inlined(params, "()", code)
        lines = [*code.lines, *run.gather, run.run, f"return [{', '.join(results)}]"]
        text = "".join(f"    {line}\n" for line in lines)
        names = host_names() | dict(run.names)
        exec(compile(f"def perform(inputs):\n{text}", "<tracejit run>", "exec"), names)
        return names.pop("perform")
