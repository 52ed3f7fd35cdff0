"""The C executor: a Plan becomes a table of compiled kernels.

Running a plan is one foreign call with one block of bytes: the number of threads, the addresses,
the scalars. What calls the kernels, and the pool of threads that they share, is compiled once for
all plans.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tracejit.codegen.c import pieces
from tracejit.codegen.c_pool import POOL_SOURCE
from tracejit.runtime.c_compiler import find_compiler, load_library, version
from tracejit.runtime.c_kernels import load_kernels
from tracejit.runtime.executor import Inlined
from tracejit.schedule.plan import Plan

ALIGNMENT = 64  # bytes, of scratch memory


class _Launch(ctypes.Structure):
    """struct tj_launch of the pool's source."""

    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("buffers", ctypes.c_int64),
        ("scalars", ctypes.c_int64),
    ]


class _Plan(ctypes.Structure):
    """struct tj_plan of the pool's source."""

    _fields_ = [
        ("addresses", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
        ("launches", ctypes.c_int64),
        ("launch", ctypes.POINTER(_Launch)),
        ("slots", ctypes.POINTER(ctypes.c_int64)),
        ("buffers", ctypes.c_void_p),
        ("scalars", ctypes.c_void_p),
    ]


class CExecutor:
    """Executes plans on the CPU as compiled C.

    threads: how many threads a call uses, or a function that says so at each call; by default the
        CPUs that this process may run on. Results do not depend on it.

    Raises BackendUnavailable where there is no C compiler.
    """

    name = "c"

    def __init__(self, threads: int | Callable[[], int] | None = None):
        if threads is None:
            threads = len(os.sched_getaffinity(0))
        self.threads = threads if callable(threads) else lambda: threads
        version(find_compiler())

    def load(self, plan: Plan) -> LoadedCPlan:
        """Compile a plan, or find it in the disk cache."""
        return LoadedCPlan(plan, self.threads)


class LoadedCPlan:
    """A plan as compiled kernels. Calls must not overlap: the memory for them is its own."""

    def __init__(self, plan: Plan, threads: Callable[[], int]):
        parts = pieces(plan)
        launches = [piece.launch for piece in parts]
        with ThreadPoolExecutor(1) as beside:
            beside.submit(_pool)
            self._kernels = load_kernels(parts)
        position = {b.name: i for i, b in enumerate(plan.buffers)}
        slots: list[int] = []
        for launch in launches:
            slots += [*(position[name] for name in launch.buffers), *launch.scalars]
        self._threads = threads
        self._pack = struct.Struct(f"2q{len(plan.buffers)}Q{len(plan.scalars)}d").pack
        scratch = max((kernel.scratch for kernel in self._kernels), default=0)
        self._scratch = bytearray(scratch + ALIGNMENT)
        self._buffers = bytearray(8 * max((len(x.buffers) for x in launches), default=0) + 8)
        self._scalars = bytearray(8 * max((len(x.scalars) for x in launches), default=0) + 8)
        self._plan = _Plan(
            len(plan.buffers),
            -(-_address(self._scratch) // ALIGNMENT) * ALIGNMENT,
            len(launches),
            (_Launch * len(launches))(
                *(
                    (kernel.address, len(launch.buffers), len(launch.scalars))
                    for kernel, launch in zip(self._kernels, launches, strict=True)
                )
            ),
            (ctypes.c_int64 * len(slots))(*slots),
            _address(self._buffers),
            _address(self._scalars),
        )
        self._at = ctypes.c_void_p(ctypes.addressof(self._plan))
        self._run = _pool()["tj_run_plan"]
        self._run.restype = None

    def __call__(self, addresses: Sequence[int], scalars: Sequence[float]) -> None:
        self._run(self._at, self._pack(0, self._threads(), *addresses, *scalars))

    def inlined(self, addresses: Sequence[str], scalars: Sequence[str]) -> Inlined:
        """The lines of a call. C code is not interrupted, and says in the first word that it ran.
        Each call has words of its own: a signal handler may call the step before they are used."""
        given = "".join(f", {x}" for x in (*addresses, *scalars))
        names = {
            "pack": self._pack,
            "threads": self._threads,
            "run": self._run,
            "at": self._at,
            "loaded": self,  # whose memory is used
        }
        return Inlined([f"call = pack(0, threads(){given})"], "run(at, call)", "call[0]", names)


_pool_lock = threading.Lock()


@functools.cache
def _load_pool() -> ctypes.CDLL:
    return load_library(POOL_SOURCE)


def _pool() -> ctypes.CDLL:
    """What runs plans, with the process's thread pool."""
    with _pool_lock:
        return _load_pool()


def _address(memory: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
