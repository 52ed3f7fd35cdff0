"""Runs a Plan's generated Triton kernels: on CUDA memory, or interpreted on CPU memory.

    executor = TritonExecutor("interpret")        # or "triton"
    loaded = executor.load(plan)                  # emit, store as files, import, compile
    loaded(addresses, scalars)                    # run every launch in order

`addresses` are memory addresses, one per plan buffer in order; `scalars` the values of the plan's
scalar slots. Kernels are shared by all plans of the process: `COUNTERS` says how often one was
compiled or found. Triton is imported by `load`, so that importing this module decides nothing.
"""

from __future__ import annotations

import linecache
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType

import numpy as np

from tracejit.codegen.geometry import MAX_TILE, Geometry, variants
from tracejit.codegen.triton import Source, emit
from tracejit.errors import BackendUnavailable
from tracejit.ir.types import contiguous_strides
from tracejit.runtime.cache import DiskCache, pack, sha256
from tracejit.schedule.kernel_text import canonical
from tracejit.schedule.plan import Launch, Plan, PlanBuffer
from tracejit.schedule.traffic import bytes_moved

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
TORCH_NAME = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "b1": "bool",
}
MAX_KERNELS = 1024  # kernels kept in memory, the least recently used goes first


@dataclass
class Counters:
    """Kernels emitted and imported, and kernels found in memory, since the process started."""

    compiles: int = 0
    hits: int = 0


COUNTERS = Counters()
DISK = DiskCache()

_kernels: OrderedDict[tuple, tuple[Source, object]] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True)
class LoadedLaunch:
    """One launch, ready: the jit function, which plan buffers it takes, its constants."""

    source: Source
    function: object
    buffers: tuple[int, ...]  # positions in the plan's list of buffers
    first_scalar: int  # position of its first scalar in the loaded plan's table
    geometry: Geometry
    constants: Mapping[str, int]
    workspace: int = 0  # where its piece of the plan's workspace starts, in bytes


class LoadedPlan:
    """A plan whose kernels are ready to run; `sources` holds one Source per launch."""

    def __init__(
        self, plan: Plan, launches: Sequence[LoadedLaunch], run: Callable, clock: Callable
    ):
        self.plan = plan
        self._ran = [launch.geometry.grid[0] > 0 for launch in launches]
        self._clock = clock
        self.sources = tuple(launch.source for launch in launches)
        self._slots = [slot for launch in plan.launches for slot in launch.scalars]
        self._run = run

    def __call__(self, addresses: Sequence[int], scalars: Sequence[float]) -> None:
        """Run every launch in order; returns when they are issued (CUDA) or done (interpret)."""
        self._run(addresses, [scalars[slot] for slot in self._slots])

    def timed(self, addresses: Sequence[int], scalars: Sequence[float]) -> list[float]:
        """Run every launch; the seconds that each took, 0 for one without programs."""
        clock = self._clock(self.plan)
        self._run(addresses, [scalars[slot] for slot in self._slots], clock.mark)
        seconds = iter(clock.seconds())
        return [next(seconds) if ran else 0.0 for ran in self._ran]

    def bytes_moved(self) -> tuple[int, ...]:
        """Of each launch, the bytes of unique addresses loaded plus those stored."""
        return bytes_moved(self.plan)


class TritonExecutor:
    """Loads plans for one backend: "triton" (CUDA) or "interpret" (CPU).

    `precision` of fp32 contractions is "ieee", "tf32" or "tf32x3". `max_tile` bounds the elements
    of a program's tile (small tiles make many programs of little data).
    """

    def __init__(self, backend: str, *, precision: str = "ieee", max_tile: int = MAX_TILE):
        self.name = backend
        self.precision = precision
        self.max_tile = max_tile

    def load(self, plan: Plan) -> LoadedPlan:
        """Emit, import and (on CUDA) compile the plan's kernels; raises BackendUnavailable."""
        prepare, runner, clock = _BACKENDS[self.name]
        prepare()
        position = {buffer.name: i for i, buffer in enumerate(plan.buffers)}
        launches, first_scalar, workspace = [], 0, 0
        for launch in plan.launches:
            loaded = self.load_launch(launch, position, first_scalar)
            launches.append(replace(loaded, workspace=workspace))
            first_scalar += len(launch.scalars)
            workspace += -(-loaded.geometry.workspace // 16) * 16
        not_empty = [launch for launch in launches if launch.geometry.grid[0] > 0]
        return LoadedPlan(plan, launches, runner(plan, not_empty, first_scalar), clock)

    def load_launch(
        self, launch: Launch, position: Mapping[str, int], first_scalar: int
    ) -> LoadedLaunch:
        """Make one launch ready; its scalars start at `first_scalar` of the loaded table."""
        source, function = load_kernel(self, launch)
        geometry = source.geometry(launch.sizes, self.max_tile)
        sizes = dict(zip(launch.kernel.sizes, launch.sizes, strict=True))
        buffers = tuple(position[name] for name in launch.buffers)
        constants = sizes | geometry.constants
        return LoadedLaunch(source, function, buffers, first_scalar, geometry, constants)


def load_kernel(executor: TritonExecutor, launch: Launch) -> tuple[Source, object]:
    """The source of a launch's kernel and its jit function, from memory where possible.

    Kernels that differ only in the user's lines are one kernel, printed as it came first.
    """
    found = variants(launch.kernel, launch.sizes, executor.max_tile)
    key = (executor.name, str(canonical(launch.kernel)), executor.precision, found)
    with _lock:
        if key in _kernels:
            COUNTERS.hits += 1
            _kernels.move_to_end(key)
        else:
            COUNTERS.compiles += 1
            source = emit(
                launch.kernel,
                launch.sizes,
                precision=executor.precision,
                max_tile=executor.max_tile,
            )
            _kernels[key] = (source, import_source(source))
            while len(_kernels) > MAX_KERNELS:
                _kernels.popitem(last=False)
        return _kernels[key]


def import_source(source: Source) -> object:
    """Store a source as a file, run it as a module, return its kernel.

    Triton reads a function's text back through linecache, which is told here, so that the file may
    go at any time.
    """
    key = f"{source.name} {sha256(source.text)}"
    path = DISK.put("triton", key, source.text)
    text = pack(key, source.text).decode()
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    module = ModuleType(source.name)
    module.__file__ = str(path)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return getattr(module, source.name)


# --- interpret --------------------------------------------------------------------------------


def _prepare_interpreter() -> None:
    from tracejit.runtime import interpreter

    interpreter.prepare()


def _interpreted(plan: Plan, launches: Sequence[LoadedLaunch], scalar_count: int) -> Callable:
    """Run launches one program after another, in shuffled order, with every access checked."""
    from tracejit.runtime import interpreter
    from tracejit.runtime.interpreter import Pointer

    workspace = np.zeros(_workspace_bytes(launches), np.int8)
    sizes = [memory_bytes(buffer) for buffer in plan.buffers]

    def run(addresses: Sequence[int], scalars: Sequence[float], mark: Callable = _unmarked) -> None:
        table = np.array(scalars, np.float64)
        mark()
        for number, launch in enumerate(launches):
            kernel = launch.source.kernel
            places = [addresses[i] for i in launch.buffers]
            memory = [
                (address, sizes[i]) for address, i in zip(places, launch.buffers, strict=True)
            ]
            pointers = [
                Pointer(address, TRITON_NAME[buffer.dtype.name])
                for address, buffer in zip(places, kernel.buffers, strict=True)
            ]
            if kernel.scalars:
                first = table.ctypes.data + 8 * launch.first_scalar
                pointers.append(Pointer(first, "fp64"))
                memory.append((first, 8 * len(kernel.scalars)))
            if launch.geometry.workspace:
                place = workspace.ctypes.data + launch.workspace
                pointers.append(Pointer(place, "i8"))
                memory.append((place, launch.geometry.workspace))
            try:
                interpreter.run(
                    launch.function,
                    launch.geometry.grid,
                    pointers,
                    launch.constants,
                    buffers=memory,
                    seed=number,
                )
            except BaseException:
                workspace[:] = 0  # the counter of a launch that was cut off
                raise
            mark()

    return run


def _workspace_bytes(launches: Sequence[LoadedLaunch]) -> int:
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


# --- triton (CUDA) ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DevicePointer:
    """What Triton needs of a tensor argument."""

    address: int
    dtype: object  # torch.dtype

    def data_ptr(self) -> int:
        return self.address


def _prepare_cuda() -> None:
    import torch

    try:
        import triton
    except ImportError:
        raise BackendUnavailable(
            backend="triton", reason="Triton is not installed", remedy="Install it"
        ) from None
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            backend="triton",
            reason="there is no CUDA device",
            remedy='Move the tensors to a GPU, or use backend="interpret"',
        )
    if triton.knobs.runtime.interpret:
        raise BackendUnavailable(
            backend="triton",
            reason="this process interprets Triton kernels (TRITON_INTERPRET=1)",
            remedy="Use a process without TRITON_INTERPRET",
        )


def _on_cuda(plan: Plan, launches: Sequence[LoadedLaunch], scalar_count: int) -> Callable:
    """Launch compiled kernels on the current stream of the plan's device.

    Everything is compiled and loaded onto the device here, for pointers aligned to 16 bytes; a call
    with others compiles for those before its first launch. So nothing fails between two writes.
    """
    import torch

    device = torch.device(plan.device)
    workspace = torch.zeros(_workspace_bytes(launches), dtype=torch.int8, device=device)
    table = torch.zeros(scalar_count, dtype=torch.float64, device=device)
    dtypes = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAME.items()}
    prepared: set[tuple[bool, ...]] = set()

    def arguments(launch: LoadedLaunch, addresses: Sequence[int]) -> list[object]:
        kernel = launch.source.kernel
        pointers: list[object] = [
            DevicePointer(addresses[i], dtypes[buffer.dtype.name])
            for i, buffer in zip(launch.buffers, kernel.buffers, strict=True)
        ]
        if kernel.scalars:
            first = table.data_ptr() + 8 * launch.first_scalar
            pointers.append(DevicePointer(first, torch.float64))
        if launch.geometry.workspace:
            pointers.append(DevicePointer(workspace.data_ptr() + launch.workspace, torch.int8))
        return pointers

    def compile_all(addresses: Sequence[int]) -> None:
        for launch in launches:
            compiled = launch.function.warmup(
                *arguments(launch, addresses), grid=launch.geometry.grid, **options(launch)
            )
            _ = compiled.run  # loads the binary onto the device

    def run(addresses: Sequence[int], scalars: Sequence[float], mark: Callable = _unmarked) -> None:
        with torch.cuda.device(device):
            alignment = tuple(address % 16 == 0 for address in addresses)
            if alignment not in prepared:
                compile_all(addresses)
                prepared.add(alignment)
            if scalar_count:
                table.copy_(torch.tensor(scalars, dtype=torch.float64))
            mark()
            for launch in launches:
                launch.function[launch.geometry.grid](
                    *arguments(launch, addresses), **options(launch)
                )
                mark()

    with torch.cuda.device(device):
        compile_all([0] * len(plan.buffers))
    prepared.add((True,) * len(plan.buffers))
    return run


def options(launch: LoadedLaunch) -> dict[str, object]:
    """The constants of a launch, and the options that its numerics need."""
    return {
        **launch.constants,
        "num_warps": launch.geometry.num_warps,
        "num_stages": launch.geometry.num_stages,
        "enable_fp_fusion": False,
        "enable_reflect_ftz": False,
    }


# --- clocks -----------------------------------------------------------------------------------


def _unmarked() -> None:
    """Where no time is taken."""


class HostClock:
    """The time between marks on the host, which waits for what it runs."""

    def __init__(self, plan: Plan):
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [b - a for a, b in pairwise(self._marks)]


class EventClock:
    """The time between marks on the current stream of a plan's device."""

    def __init__(self, plan: Plan):
        self._marks: list = []

    def mark(self) -> None:
        import torch

        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record()

    def seconds(self) -> list[float]:
        self._marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self._marks)]


_BACKENDS = {
    "interpret": (_prepare_interpreter, _interpreted, HostClock),
    "triton": (_prepare_cuda, _on_cuda, EventClock),
}
