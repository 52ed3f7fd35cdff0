"""Kernels → loaded C functions, through the disk cache.

A kernel is compiled once for all plans that have it with these sizes. Kernels that are missing are
compiled together in a few units, side by side on the machine's cores; the first units while the
later kernels of the plan are still being lowered. Then all units become one library, and what their
kernels share is compiled in the first unit that needs it. An entry of the cache says in which
library a kernel is, and under which name, so a cached kernel need not be printed to find it.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from tracejit.records import dataclass
from tracejit.runtime.c_compiler import (
    address_of,
    cached_library,
    compiled_object,
    linked,
    load_library,
    toolchain,
    vector_bytes,
)
from tracejit.runtime.c_plans import Lowered
from tracejit.runtime.cache import DiskCache, digest_of, sha256
from tracejit.schedule.cpu.plan import CpuKernel

if TYPE_CHECKING:
    from tracejit.codegen.c import CFunction

# Characters of C in the first unit that is compiled before all kernels are there, and at most.
EARLY = (12_000, 40_000)
GROWTH = 1.5  # from one such unit to the next: each costs the start of a compiler
WORTH_A_UNIT = 6_000  # characters of C; starting a compiler costs as much as some thousand
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*|^ +", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel in memory: the address of its function."""

    address: int
    library: ctypes.CDLL  # holds the function


_Made = ctypes.CDLL | bytes  # a library, or an object


@dataclass(frozen=True)
class _Unit:
    """Kernels, by digest, the C program that they are, and what becomes of it."""

    batch: list[str]
    source: str
    made: Future[_Made]


class Kernels:
    """Compiled kernels on their way: `add` them as they come, then ask for `loaded`.

    Used as a context, whose end waits for the compilers.
    """

    def __init__(self):
        self._cache = DiskCache()
        made_by = f"{toolchain()}\n{digest_of('codegen', 'ir', 'schedule')}\n{vector_bytes()}"
        self._made_by = sha256(made_by)
        self._loaded: dict[str, LoadedKernel] = {}  # by digest, as are the next two
        self._printed: dict[str, CFunction] = {}
        self._waiting: dict[str, int] = {}  # printed, not in a unit yet: what compiling it takes
        self._units: list[_Unit] = []
        self._declared: frozenset[str] = frozenset()  # functions of the units
        self._room = EARLY[0]
        self._libraries: dict[str, ctypes.CDLL | None] = {}
        self._compilers = ThreadPoolExecutor(_cores())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._compilers.shutdown(cancel_futures=True)

    def add(self, kernel: CpuKernel, digest: str) -> None:
        """A kernel of the plan, and its digest. Unless it is there, it is printed at once, and
        the first ones that wait are compiled when there are enough for a unit and for the other
        cores, which are not to be idle at the end."""
        call = kernel.kernel.call
        if not (call is not None and call.is_collective) and not self._found(digest):
            self._print(kernel, digest)
            if sum(self._waiting.values()) >= self._room * _cores():
                batch, filled = [], 0
                for first, cost in self._waiting.items():
                    if filled >= self._room:
                        break
                    batch.append(first)
                    filled += cost
                self._start(batch, compiled_object)
                self._room = min(EARLY[1], int(self._room * GROWTH))

    def loaded(
        self, lowered: Lowered, apart: Collection[str] = frozenset()
    ) -> dict[str, LoadedKernel]:
        """The functions of a plan's kernels, by the kernels' names, but of some."""
        digests = {name: x for name, x in lowered.digests.items() if name not in apart}
        for name, digest in digests.items():
            if not self._found(digest):
                self._print(lowered.plan.kernels[name], digest)
        whole = not self._units  # each unit is a library
        for batch in _batches(self._waiting):
            self._start(batch, load_library if whole else compiled_object)
        if whole:
            for unit in self._units:
                self._keep([unit], sha256(unit.source), unit.made.result())
        else:
            digest = sha256("".join(unit.source for unit in self._units))
            objects = [unit.made.result() for unit in self._units]
            self._keep(self._units, digest, linked(digest, objects))
        self._units, self._declared = [], frozenset()
        return {name: self._loaded[digest] for name, digest in digests.items()}

    def _key(self, digest: str) -> str:
        return f"{self._made_by}\n{digest}"

    def _found(self, digest: str) -> bool:
        """Whether a kernel need not be printed: it was, or is in the disk cache."""
        if digest in self._printed or digest in self._loaded:
            return True
        unit, symbol = (self._cache.get("kernel", self._key(digest)) or "- -").split()
        if unit not in self._libraries:
            self._libraries[unit] = None if unit == "-" else _provided(cached_library(unit))
        library = self._libraries[unit]
        if library is not None:
            self._loaded[digest] = _loaded(library, symbol)
        return library is not None

    def _print(self, kernel: CpuKernel, digest: str) -> None:
        from tracejit.codegen.c import emit_kernel  # a warm start prints nothing

        function = emit_kernel(kernel, len(self._printed))
        self._printed[digest], self._waiting[digest] = function, _cost(function.own)

    def _start(self, batch: list[str], compiler: Callable[[str], _Made]) -> None:
        """Compile some of what waits, in one unit."""
        from tracejit.codegen.c import unit

        functions = [self._printed[digest] for digest in batch]
        made = unit(functions, vector_bytes(), self._declared)
        if compiler is compiled_object:
            self._declared |= made.declared
        self._units.append(_Unit(batch, made.text, self._compilers.submit(compiler, made.text)))
        for digest in batch:
            del self._waiting[digest]

    def _keep(self, units: Sequence[_Unit], digest: str, library: ctypes.CDLL) -> None:
        """The kernels of units, in their library, whose digest is this."""
        provided = _provided(library)
        for kernel in (kernel for unit in units for kernel in unit.batch):
            name = self._printed[kernel].name
            self._cache.store("kernel", self._key(kernel), f"{digest} {name}")
            self._loaded[kernel] = _loaded(provided, name)


def _cost(text: str) -> int:
    """What compiling the functions of a kernel's own takes, in characters of C."""
    return len(_COMMENT.sub("", text))


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
    if not costs:
        return []
    count = 1 + sum(costs.values()) // WORTH_A_UNIT
    count = min(count, len(costs), _cores())
    batches: list[list[str]] = [[] for _ in range(count)]
    filled = [0] * count
    for key in sorted(costs, key=costs.__getitem__, reverse=True):
        least = filled.index(min(filled))
        batches[least].append(key)
        filled[least] += costs[key]
    return batches


def _cores() -> int:
    return len(os.sched_getaffinity(0))
