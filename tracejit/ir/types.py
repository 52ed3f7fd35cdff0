"""Types of IR values: dtype, shape, device. Text form `f32[64,1000]`, `f32[64]@cuda:0`."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from tracejit.errors import InvalidGraph
from tracejit.records import dataclass


@dataclass(frozen=True, eq=False, slots=True)
class DType:
    """An element type; there is one object of each. `compute` is the numpy dtype of its values.

    bf16 and f16 are computed in float32 and rounded once per operation; numpy holds such values
    as float32 arrays whose elements are representable in the narrow type.
    """

    name: str
    kind: str  # "f" float, "i" signed, "u" unsigned, "b" bool; "c" complex, of tensors in capture
    itemsize: int  # bytes in memory
    compute: np.dtype

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple:
        return dtype_named, (self.name,)

    @property
    def is_float(self) -> bool:
        return self.kind == "f"

    @property
    def narrow(self) -> bool:
        """Whether values are computed in a wider type and rounded after each operation."""
        return self.kind == "f" and self.itemsize == 2


f64 = DType("f64", "f", 8, np.dtype(np.float64))
f32 = DType("f32", "f", 4, np.dtype(np.float32))
f16 = DType("f16", "f", 2, np.dtype(np.float32))
bf16 = DType("bf16", "f", 2, np.dtype(np.float32))
i64 = DType("i64", "i", 8, np.dtype(np.int64))
i32 = DType("i32", "i", 4, np.dtype(np.int32))
i16 = DType("i16", "i", 2, np.dtype(np.int16))
i8 = DType("i8", "i", 1, np.dtype(np.int8))
u8 = DType("u8", "u", 1, np.dtype(np.uint8))
b1 = DType("b1", "b", 1, np.dtype(np.bool_))

# Graphs are real. A complex tensor of a trace is the pairs of its parts, numbers of another dtype.
c64 = DType("c64", "c", 8, np.dtype(np.complex64))
c128 = DType("c128", "c", 16, np.dtype(np.complex128))
COMPLEX = {f32: c64, f64: c128}  # by the dtype of the parts
PARTS = {c: f for f, c in COMPLEX.items()}

DTYPES = {d.name: d for d in (f64, f32, f16, bf16, i64, i32, i16, i8, u8, b1)}


def dtype_named(name: str) -> DType:
    """The dtype of a name, of tensors too; what copies and pickles of a dtype call."""
    return DTYPES.get(name) or next(c for c in PARTS if c.name == name)


def round_to(array: np.ndarray, dtype: DType) -> np.ndarray:
    """Round a compute-dtype array to the values `dtype` can represent (nearest even)."""
    if dtype is bf16:
        return bits_to_float(float_to_bits(array))
    if dtype is f16:
        with np.errstate(over="ignore"):
            return np.asarray(array, np.float32).astype(np.float16).astype(np.float32)
    return np.asarray(array).astype(dtype.compute, copy=False)


def float_to_bits(array: np.ndarray) -> np.ndarray:
    """float32 → bf16 bit patterns (uint16), round to nearest even, NaN kept quiet."""
    array = np.asarray(array, np.float32, order="C")
    bits = array.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(array), np.uint32(0x7FC0), rounded).astype(np.uint16)


def bits_to_float(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) → float32."""
    wide = np.asarray(bits, np.uint32, order="C") << 16
    return np.asarray(wide, np.uint32).view(np.float32)


@dataclass(frozen=True, slots=True)
class Type:
    """The type of a value. `device` is a torch device string, or "host" for runtime scalars."""

    dtype: DType
    shape: tuple[int, ...]
    device: str = "cpu"

    def __str__(self) -> str:
        place = "" if self.device == "cpu" else f"@{self.device}"
        return f"{self.dtype.name}[{','.join(map(str, self.shape))}]{place}"

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def is_host(self) -> bool:
        return self.device == "host"


HOST_SCALAR = Type(f64, (), "host")

_TYPE = re.compile(r"(\w+)\[([\d,]*)\](?:@([\w:]+))?\Z")


def parse_type(text: str) -> Type:
    """Read the text form of a type."""
    match = _TYPE.match(text.strip())
    if match is None or match[1] not in DTYPES:
        raise InvalidGraph(reason=f"not a type: {text!r}")
    shape = tuple(int(s) for s in match[2].split(",") if s)
    return Type(DTYPES[match[1]], shape, match[3] or "cpu")


@lru_cache(10_000)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements; a size-0 axis counts as 1, as torch does."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
