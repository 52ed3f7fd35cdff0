"""Generated Triton kernels on CPU memory, in Triton's interpreter, repaired and checked.

In: a jit function, a grid, pointers to CPU memory and the buffers they may touch. Out: the stores
it made and, on request, which bytes it read and wrote. Where the interpreter differs from a GPU
(bf16, libdevice, NaN in min and max) `interpreter_repairs` corrects it; on top of that
  * every unmasked lane of a load, store or atomic must lie in a registered buffer,
  * lanes masked off without `other` read as NaN, or as garbage integers, never as 0,
  * programs run in a shuffled order, so that a dependence between them shows.

Triton decides between compiling and interpreting when it is imported, so a process does one or
the other: call `prepare()` before anything imports triton.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import os
import random
import sys
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from tracejit.errors import BackendUnavailable, TracejitError
from tracejit.records import dataclass

Accesses = dict[int, tuple[int, int]]  # buffer index -> (unique bytes read, unique bytes written)

_lock = threading.Lock()  # the interpreter's program id and memory are global to the process


class OutOfBoundsAccess(TracejitError):
    """An unmasked lane of a kernel touched memory outside the buffers it was given."""

    message = (
        "{kernel}, program {program}: {operation} of {itemsize} bytes at {where}, "
        "outside every buffer of the launch ({lanes} of {total} unmasked lanes)"
    )
    advice = (
        "Mask the lanes of your kernel that lie outside. In a kernel that was generated it is a "
        "fault of tracejit: please report it."
    )


@dataclass(frozen=True)
class Pointer:
    """A typed address in CPU memory; `dtype` is Triton's name of the element (fp32, bf16, i64, …).

    The memory must stay alive and in place for as long as the pointer is used.
    """

    address: int
    dtype: str

    @classmethod
    def of(cls, array) -> Pointer:
        """Pointer to the first element of a numpy array or CPU tensor."""
        if isinstance(array, np.ndarray):
            return cls(array.ctypes.data, _TRITON_NAME[array.dtype.name])
        return cls(array.data_ptr(), _TRITON_NAME[str(array.dtype).removeprefix("torch.")])


_TRITON_NAME = {
    "bool": "i1",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
}


class Memory:
    """The buffers of one launch: checks every access, and records it if asked to.

    Bytes are recorded per region, a maximal run of overlapping buffers, so that views of one
    storage may be registered side by side.
    """

    def __init__(self, kernel: str, buffers: Sequence[tuple[int, int]], record: bool):
        self.kernel = kernel
        self.buffers = buffers
        self.program = (0, 0, 0)
        regions: list[list[int]] = []
        for start, nbytes in sorted(buffers):
            if regions and start < regions[-1][1]:
                regions[-1][1] = max(regions[-1][1], start + nbytes)
            elif nbytes:
                regions.append([start, start + nbytes])
        self.starts = np.array([start for start, _ in regions], dtype=np.int64)
        self.ends = np.array([end for _, end in regions], dtype=np.int64)
        shape = [end - start for start, end in regions] if record else []
        self.was_read = [np.zeros(n, dtype=bool) for n in shape]
        self.was_written = [np.zeros(n, dtype=bool) for n in shape]

    def access(self, pointers, mask, itemsize: int, reads: bool, writes: bool) -> None:
        """Check, and record, the lanes of one load, store or atomic."""
        pointers, mask = np.broadcast_arrays(pointers, mask)
        address = pointers[mask.astype(bool)].astype(np.int64)
        if not address.size:
            return
        region = np.searchsorted(self.starts, address, side="right") - 1
        inside = region >= 0
        inside[inside] = address[inside] + itemsize <= self.ends[region[inside]]
        if not inside.all():
            raise self._out_of_bounds(address, inside, itemsize, reads, writes)
        if self.was_read:
            for index in np.unique(region):
                offset = address[region == index] - self.starts[index]
                for byte in range(itemsize):
                    if reads:
                        self.was_read[index][offset + byte] = True
                    if writes:
                        self.was_written[index][offset + byte] = True

    def accesses(self) -> Accesses:
        """Unique bytes read and written, by the index of the buffer."""
        counts = {}
        for index, (start, nbytes) in enumerate(self.buffers):
            region = int(np.searchsorted(self.starts, start, side="right")) - 1
            if nbytes == 0:
                counts[index] = (0, 0)
                continue
            first = start - int(self.starts[region])
            part = slice(first, first + nbytes)
            read, written = self.was_read[region][part], self.was_written[region][part]
            counts[index] = (int(read.sum()), int(written.sum()))
        return counts

    def _out_of_bounds(self, address, inside, itemsize, reads, writes) -> OutOfBoundsAccess:
        """The error for the first lane outside, placed relative to the nearest buffer."""
        bad = int(address[~inside][0])
        where = f"address {bad:#x}"
        if self.buffers:
            distance = [max(s - bad, bad + itemsize - s - n) for s, n in self.buffers]
            nearest = int(np.argmin(distance))
            start, nbytes = self.buffers[nearest]
            where = f"byte {bad - start} of buffer {nearest}, which has {nbytes}"
        return OutOfBoundsAccess(
            kernel=self.kernel,
            program=self.program,
            operation="atomic" if reads and writes else "load" if reads else "store",
            itemsize=itemsize,
            where=where,
            lanes=int((~inside).sum()),
            total=address.size,
        )


def prepare() -> None:
    """Set this process up to interpret kernels; call it before triton is imported. Idempotent."""
    if "triton" not in sys.modules:
        if importlib.util.find_spec("triton") is None:
            raise BackendUnavailable(
                backend="interpret",
                reason="Triton is not installed",
                remedy="Install it, or use the numpy backend",
            )
        os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.sum, InterpretedFunction):
        raise BackendUnavailable(
            backend="interpret",
            reason="triton was imported to compile, and a process either compiles or interprets",
            remedy="Set TRITON_INTERPRET=1, or call prepare() before triton is imported",
        )
    # Kernels decorated from now on must be interpreted too.
    os.environ["TRITON_INTERPRET"] = "1"
    from tracejit.runtime import interpreter_repairs

    interpreter_repairs.install()


def run(
    jit_fn,
    grid: Sequence[int],
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    buffers: Sequence[tuple[int, int]],
    order: str = "shuffled",
    seed: int = 0,
    record: bool = False,
) -> Accesses | None:
    """Run every program of `grid` in this thread; returns the accesses if `record`.

    Arguments are `Pointer`s, numbers, tuples of these, and the values of constexpr parameters.
    `buffers` lists (address, bytes) of all memory that the kernel may touch. `order` is "forward",
    "reversed" or "shuffled" (by `seed`). Raises `OutOfBoundsAccess`; an error inside the kernel
    passes through, and leaves behind the stores made until then.
    """
    prepare()
    from triton.runtime.interpreter import interpreter_builder as builder

    parameters = _bind(jit_fn, args, kwargs or {})
    programs = _ordered(grid, order, seed)
    function = jit_fn.rewrite()
    with _lock, np.errstate(all="ignore"):
        memory = Memory(jit_fn.fn.__name__, list(buffers), record)
        builder.set_grid_dim(*_three(grid))
        builder.memory = memory
        try:
            for program in programs:
                memory.program = program
                builder.set_grid_idx(*program)
                function(**parameters)
        finally:
            builder.memory = None
    return memory.accesses() if record else None


def _bind(jit_fn, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """Arguments by name, those of non-constexpr parameters as the interpreter's tensors."""
    bound = inspect.getcallargs(jit_fn.fn, *args, **kwargs)
    annotations = jit_fn.fn.__annotations__
    return {
        name: value if "constexpr" in str(annotations.get(name, "")) else _to_tensor(value)
        for name, value in bound.items()
    }


def _to_tensor(value: object) -> object:
    """One runtime argument as the interpreter holds it."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, _implicit_cvt

    if isinstance(value, tuple):
        return tl.tuple([_to_tensor(item) for item in value])
    if isinstance(value, Pointer):
        kind = tl.str_to_ty("*" + value.dtype, None)
        return tl.tensor(TensorHandle(np.array([value.address], dtype=np.uint64), kind), kind)
    return _implicit_cvt(value)


def _three(grid: Sequence[int]) -> tuple[int, int, int]:
    """The grid with all three dimensions."""
    return (*grid, *(1,) * (3 - len(grid)))


def _ordered(grid: Sequence[int], order: str, seed: int) -> list[tuple[int, int, int]]:
    """The program ids of a grid in the order in which they run."""
    programs = list(itertools.product(*map(range, _three(grid))))
    if order == "reversed":
        programs.reverse()
    elif order == "shuffled":
        random.Random(seed).shuffle(programs)
    elif order != "forward":
        raise ValueError(f"order is {order!r}, not forward, reversed or shuffled")
    return programs
