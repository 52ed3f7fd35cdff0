"""The C executor: a Plan becomes one C function, compiled by the system's compiler.

Running a plan is one foreign call with the table of addresses and the table of scalars; the pool of
threads is shared by all plans of the process.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable, Sequence

from tracejit.codegen.c import emit_plan
from tracejit.codegen.c_blocking import Target
from tracejit.codegen.c_pool import POOL_SOURCE
from tracejit.runtime.c_compiler import find_compiler, load_library, vector_bytes, version
from tracejit.schedule.plan import Plan

ALIGNMENT = 64  # bytes, of scratch memory


class _Run(ctypes.Structure):
    """struct tj_run of the generated units."""

    _fields_ = [("launch", ctypes.c_void_p), ("threads", ctypes.c_int64)]


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
    """A plan as a C function. Calls must not overlap: the tables and the scratch are its own."""

    def __init__(self, plan: Plan, threads: Callable[[], int]):
        source = emit_plan(plan, Target(vector_bytes()))
        self._library = load_library(source.text)
        self._threads = threads
        self._addresses = bytearray(8 * max(len(plan.buffers), 1))
        self._scalars = bytearray(8 * max(len(plan.scalars), 1))
        self._scratch = bytearray(source.scratch_bytes + ALIGNMENT)
        self._run = _Run(ctypes.cast(_pool().tj_pool_launch, ctypes.c_void_p).value, 1)
        self._put_addresses = struct.Struct(f"{len(plan.buffers)}Q").pack_into
        self._put_scalars = struct.Struct(f"{len(plan.scalars)}d").pack_into
        scratch = _address(self._scratch)
        self._arguments = (
            ctypes.c_void_p(_address(self._addresses)),
            ctypes.c_void_p(_address(self._scalars)),
            ctypes.c_void_p(-(-scratch // ALIGNMENT) * ALIGNMENT),
            ctypes.c_void_p(ctypes.addressof(self._run)),
        )
        self._step = self._library.step
        self._step.restype = None

    def __call__(self, addresses: Sequence[int], scalars: Sequence[float]) -> None:
        self._put_addresses(self._addresses, 0, *addresses)
        self._put_scalars(self._scalars, 0, *scalars)
        self._run.threads = self._threads()
        self._step(*self._arguments)


_pool_lock = threading.Lock()


@functools.cache
def _load_pool() -> ctypes.CDLL:
    return load_library(POOL_SOURCE)


def _pool() -> ctypes.CDLL:
    """The process's thread pool."""
    with _pool_lock:
        return _load_pool()


def _address(memory: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
