"""Kernels → loaded C functions, through the disk cache.

A kernel is compiled once for all plans that have it with these sizes. Kernels that are missing are
compiled together in a few units, side by side on the machine's cores. An entry of the cache says in
which unit a kernel is, and under which name, so a cached kernel need not be printed to find it.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tracejit.runtime.c_compiler import (
    address_of,
    cached_library,
    load_libraries,
    toolchain,
    vector_bytes,
)
from tracejit.runtime.c_plans import Lowered
from tracejit.runtime.cache import DiskCache, digest_of, sha256
from tracejit.schedule.cpu.plan import CpuKernel

WORTH_A_UNIT = 6_000  # characters of C; starting a compiler costs as much as some thousand
_MICRO = re.compile(r"^TJ_FUSED .*?^\}$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*|^ +", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel in memory: the address of its function."""

    address: int
    library: ctypes.CDLL  # holds the function


def load_kernels(lowered: Lowered, apart: Collection[str] = frozenset()) -> dict[str, LoadedKernel]:
    """The functions of a plan's kernels, by the kernels' names, but of some."""
    cache = DiskCache()
    made_by = sha256(f"{toolchain()}\n{digest_of('codegen', 'ir', 'schedule')}\n{vector_bytes()}")
    keys = {
        name: f"{made_by}\n{digest}"
        for name, digest in lowered.digests.items()
        if name not in apart
    }
    loaded: dict[str, LoadedKernel] = {}
    missing: dict[str, CpuKernel] = {}
    libraries: dict[str, ctypes.CDLL | None] = {}
    for name, key in keys.items():
        if key in loaded or key in missing:
            continue
        digest, symbol = (cache.get("kernel", key) or "- -").split()
        if digest not in libraries:
            libraries[digest] = None if digest == "-" else _provided(cached_library(digest))
        library = libraries[digest]
        if library is None:
            missing[key] = lowered.plan.kernels[name]
        else:
            loaded[key] = _loaded(library, symbol)
    if missing:
        loaded |= _compiled(missing, cache)
    return {name: loaded[key] for name, key in keys.items()}


def _compiled(missing: Mapping[str, CpuKernel], cache: DiskCache) -> dict[str, LoadedKernel]:
    """Compile kernels that are not in the cache, and put them there. In and out: by key."""
    from tracejit.codegen.c import emit_kernel, unit  # a warm start prints nothing

    emitted = {key: emit_kernel(kernel, i) for i, (key, kernel) in enumerate(missing.items())}
    batches = _batches({key: _cost(function.text) for key, function in emitted.items()})
    sources = [unit([emitted[key] for key in batch], vector_bytes()) for batch in batches]
    loaded = {}
    libraries = map(_provided, load_libraries(sources))
    for batch, source, library in zip(batches, sources, libraries, strict=True):
        for key in batch:
            name = emitted[key].name
            cache.put("kernel", key, f"{sha256(source)} {name}")
            loaded[key] = _loaded(library, name)
    return loaded


def _cost(text: str) -> int:
    """What compiling a kernel takes, in characters of C. A micro-kernel is one straight loop, which
    compiles four times as fast as other code of its length."""
    code = _COMMENT.sub("", text)
    return len(code) - sum(map(len, _MICRO.findall(code))) * 3 // 4


def _provided(library: ctypes.CDLL | None) -> ctypes.CDLL | None:
    """A library of kernels, with the routines of LAPACK if they call any."""
    if hasattr(library, "tj_lapack"):
        from tracejit.runtime.lapack import provide  # few plans have such kernels

        provide(library)
    return library


def _loaded(library: ctypes.CDLL, symbol: str) -> LoadedKernel:
    return LoadedKernel(address_of(library, symbol), library)


def _batches(costs: Mapping[str, int]) -> list[list[str]]:
    """The kernels in as many units as can be compiled at once, which take about the same."""
    count = 1 + sum(costs.values()) // WORTH_A_UNIT
    count = min(count, len(costs), len(os.sched_getaffinity(0)))
    batches: list[list[str]] = [[] for _ in range(count)]
    filled = [0] * count
    for key in sorted(costs, key=costs.__getitem__, reverse=True):
        least = filled.index(min(filled))
        batches[least].append(key)
        filled[least] += costs[key]
    return batches
