"""Runs a Plan's generated Triton kernels: on CUDA memory, or interpreted on CPU memory.

    executor = TritonExecutor("interpret")        # or "triton"
    loaded = executor.load(plan)                  # emit, store as files, import, compile
    loaded(addresses, scalars)                    # run every launch in order

`addresses` are memory addresses, one per plan buffer in order; `scalars` the values of the plan's
scalar slots. Kernels are shared by all plans of the process: `COUNTERS` says how often one was
compiled or found. Triton is imported by `load`, so that importing this module decides nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

from tracejit.codegen.geometry import MAX_TILE, Geometry, variants
from tracejit.codegen.triton import Source, emit
from tracejit.codegen.triton_phases import emit_phases
from tracejit.errors import UnsupportedOperation
from tracejit.kernels.costs import SMS
from tracejit.records import dataclass
from tracejit.runtime import interpreter
from tracejit.runtime.device import Device
from tracejit.runtime.executor import CallText
from tracejit.runtime.interpreted_plan import InterpretedPlan
from tracejit.runtime.launched_plan import LaunchedPlan
from tracejit.runtime.triton_launch import LoadedLaunch, Positions, positions
from tracejit.runtime.triton_source import import_source
from tracejit.schedule.kernel_text import canonical
from tracejit.schedule.phases import phases_of
from tracejit.schedule.plan import Launch, Plan, unrolled

MAX_KERNELS = 1024  # kernels kept in memory, the least recently used goes first


@dataclass
class Counters:
    """Kernels emitted and imported, and kernels found in memory, since the process started."""

    compiles: int = 0
    hits: int = 0


COUNTERS = Counters()

_kernels: OrderedDict[tuple, tuple[Source, Source, object]] = OrderedDict()
_lock = threading.Lock()


class TritonExecutor:
    """Loads plans for one backend: "triton" (CUDA), a fake device, or "interpret" (CPU).

    `precision` of fp32 contractions is "ieee", "tf32" or "tf32x3". `max_tile` bounds the elements
    of a program's tile (small tiles make many programs of little data). `device_of` gives the
    device of a name ("cuda:0"); without one, kernels are interpreted. `computes` is False for a
    device that is not here.
    """

    gpu = True

    def __init__(
        self,
        backend: str,
        *,
        precision: str = "ieee",
        max_tile: int = MAX_TILE,
        device_of: Callable[[str], Device] | None = None,
        computes: bool = True,
    ):
        self.name = backend
        self.computes = computes
        self.precision = precision
        self.max_tile = max_tile
        self.device_of = device_of

    def load(self, plan: Plan) -> LaunchedPlan | InterpretedPlan:
        """Emit, import and (for a GPU) compile the plan's kernels; raises BackendUnavailable. Loops
        are launched step by step."""
        plan = unrolled(plan)
        if self.device_of is None:
            interpreter.prepare()  # before Triton is imported
            return InterpretedPlan(plan, self.launches(plan))
        device = self.device_of(plan.device)
        return LaunchedPlan(plan, self.launches(plan), device, partial(self.load_phases, plan))

    def launches(self, plan: Plan) -> list[LoadedLaunch]:
        """The launches of a plan, those without programs too."""
        position, sms = positions(plan), SMS
        if self.device_of is not None:
            sms = self.device_of(plan.device).properties().multiprocessors
        launches, first_scalar, workspace = [], 0, 0
        for launch in plan.launches:
            loaded = self.load_launch(launch, position, first_scalar, sms)
            launches.append(replace(loaded, workspace=workspace))
            first_scalar += len(launch.scalars)
            workspace += -(-loaded.geometry.workspace // 16) * 16
        return launches

    def load_launch(
        self, launch: Launch, position: Positions, first_scalar: int, sms: int
    ) -> LoadedLaunch:
        """Make one launch ready for a GPU of so many SMs; its scalars start at `first_scalar` of
        the loaded table."""
        if launch.kernel.call is not None:
            return self._host_call(launch, position, first_scalar)
        source, seen, function = load_kernel(self, launch, sms)
        geometry = source.geometry(launch.sizes, self.max_tile)
        sizes = dict(zip(launch.kernel.sizes, launch.sizes, strict=True))
        buffers, memory = zip(*(position[name] for name in launch.buffers), strict=True)
        return LoadedLaunch(
            launch,
            source,
            seen,
            function,
            buffers,
            memory,
            first_scalar,
            geometry,
            sizes | geometry.constants,
        )

    def load_phases(self, plan: Plan, aligned: Sequence[bool]) -> LoadedLaunch | None:
        """All launches of a plan without loops as one, for many steps (`many_steps.py`); None where
        that cannot be. `aligned`: per buffer of the plan, whether it lies at a multiple of 16."""
        phases = phases_of(plan.launches)
        if phases is None:
            return None
        launch, position = phases.launch, positions(plan)
        buffers, memory = zip(*(position[name] for name in launch.buffers), strict=True)
        options = {"precision": self.precision, "max_tile": self.max_tile}
        source = emit_phases(phases, [aligned[i] for i in buffers], **options)
        shape = source.geometry(launch.sizes, self.max_tile)
        total = shape.grid[0]
        starts = [shape.constants[f"FIRST_{i}"] for i in (0, *accumulate(phases.counts[:-1]))]
        counts = tuple([b - a for a, b in pairwise([*starts, total])])
        sizes = dict(zip(launch.kernel.sizes, launch.sizes, strict=True))
        return LoadedLaunch(
            *(launch, source, source, import_source(source), buffers, memory, 0),
            replace(shape, grid=(max(counts),)),
            sizes | shape.constants | {"TOTAL": total},
            through=tuple([(i, aligned[buffers[i]]) for i in range(len(buffers))]),
            phases=counts,
        )

    def _host_call(self, launch: Launch, position: Positions, first_scalar: int) -> LoadedLaunch:
        """A call of the host: numpy makes it between kernels that are interpreted. On a GPU it can
        only be a collective."""
        call = launch.kernel.call
        if self.device_of is not None and not call.is_collective:
            raise UnsupportedOperation(
                where=call.where or "(no line)",
                function=f"{call.op.name}, a decomposition or solution by LAPACK on the host,",
                shapes=", ".join(str(list(shape)) for shape in call.shapes[:-1]),
                remedy="It is compiled for the CPU only. Run the step eagerly there "
                '(on_unsupported="eager"), or do this part outside the step.',
            )
        source = CallText(launch.kernel)
        buffers, memory = zip(*(position[name] for name in launch.buffers), strict=True)
        shape = Geometry((1,), {}, 1)
        return LoadedLaunch(launch, source, source, None, buffers, memory, first_scalar, shape, {})


def load_kernel(
    executor: TritonExecutor, launch: Launch, sms: int
) -> tuple[Source, Source, object]:
    """The source of a launch's kernel, what Triton sees of it, and its jit function, from memory
    where possible.

    Kernels that differ only in the user's lines are one kernel, shown as it came first. What Triton
    gets to see says nothing of lines, and its names are the same in all plans: its cache of machine
    code is by that text.
    """
    shaped = {"precision": executor.precision, "max_tile": executor.max_tile, "sms": sms}
    found = variants(launch.kernel, launch.sizes, **shaped)
    interpreted = executor.device_of is None
    plain = canonical(launch.kernel)
    key = (interpreted, str(plain), executor.precision, sms, found)
    with _lock:
        if key in _kernels:
            COUNTERS.hits += 1
            _kernels.move_to_end(key)
        else:
            COUNTERS.compiles += 1
            source = emit(launch.kernel, launch.sizes, **shaped)
            seen = source if interpreted else emit(plain, launch.sizes, **shaped)
            _kernels[key] = (source, seen, import_source(seen))
            while len(_kernels) > MAX_KERNELS:
                _kernels.popitem(last=False)
        return _kernels[key]
