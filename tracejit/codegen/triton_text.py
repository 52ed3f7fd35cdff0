"""Words of generated Triton: types, literals, the language made of them, tiles, reductions.

A `Dim` is one dimension of the tile that a program works on; it stands for one or more loop axes,
flattened row-major.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from tracejit.codegen.language import Language, Line, strip
from tracejit.codegen.triton_table import TEMPLATES
from tracejit.ir.types import DType, b1
from tracejit.records import dataclass
from tracejit.schedule.kernel import Axis, Reduce, Size

MEMORY_TYPE = {
    "f64": "tl.float64",
    "f32": "tl.float32",
    "f16": "tl.float16",
    "bf16": "tl.bfloat16",
    "i64": "tl.int64",
    "i32": "tl.int32",
    "i16": "tl.int16",
    "i8": "tl.int8",
    "u8": "tl.uint8",
    "b1": "tl.int1",
}


def compute_type(dtype: DType) -> str:
    """The Triton type that values of a dtype are computed in."""
    return "tl.float32" if dtype.narrow else MEMORY_TYPE[dtype.name]


def rounded(text: str, dtype: DType) -> str:
    """An fp32 expression rounded to a half type, other dtypes as they are."""
    return f"tj.round_to({strip(text)}, {MEMORY_TYPE[dtype.name]})" if dtype.narrow else text


def literal(value: object, dtype: DType, typed: bool) -> str:
    """A Python number as Triton text; `typed` where Triton would guess the type from the value."""
    if dtype.kind == "f":
        number = float(value)
        text = repr(number) if math.isfinite(number) else f'float("{number}")'
        if number == 0.0 and math.copysign(1.0, number) < 0:
            return f"(-1.0 * tl.full((), 0.0, {compute_type(dtype)}))"  # -0.0 is taken for 0
    elif dtype is b1:
        text = repr(bool(value))
    else:
        text = repr(int(np.array(int(value)).astype(dtype.compute)))
    return f"tl.full((), {text}, {compute_type(dtype)})" if typed else text


TRITON = Language(
    name="Triton",
    templates=TEMPLATES,
    type_of=compute_type,
    literal=literal,
    rounded=rounded,
    true="tl.full((), True, tl.int1)",
    margin="    ",
    remark="#",
    remark_column=72,
)


@dataclass(frozen=True)
class Dim:
    """One tile dimension: its name, the axes it flattens, its block's name, its place in a tile.

    `place` is "" in a 1-D tile, else "[:, None]" or "[None, :]"; a `full` one needs no mask, and
    one that is not `counted` is printed again with a mask.
    """

    name: str
    axes: tuple[Axis, ...]
    block: str = "BLOCK"
    place: str = ""
    full: bool = False
    counted: bool = True

    @property
    def real_axes(self) -> tuple[Axis, ...]:
        """The axes that run: an extent of the literal 1 is index 0."""
        return tuple(a for a in self.axes if a.extent != 1)

    @property
    def variable(self) -> str:
        """The name of the flat index: the axis's own where there is only one."""
        axes = self.real_axes
        return axes[0].name if len(axes) == 1 else self.name

    @property
    def mask(self) -> str:
        return f"in_{self.name}"

    @property
    def extent(self) -> str:
        """The product of the extents, as an expression."""
        return product([a.extent for a in self.real_axes])


def product(factors: Sequence[Size]) -> str:
    """`n0 * n1`, or 1 when there are none."""
    return " * ".join(str(f) for f in factors if f != 1) or "1"


def unravel(axes: Sequence[Axis], flat: str, wanted: Iterable[str]) -> list[Line]:
    """Definitions of the wanted axes' indices from a flat row-major index."""
    lines = []
    for position, axis in enumerate(axes):
        if axis.name not in wanted or axis.name == flat:
            continue
        below = product([a.extent for a in axes[position + 1 :]])
        text = (
            flat
            if below == "1"
            else f"{flat} // ({below})"
            if "*" in below
            else f"{flat} // {below}"
        )
        if position > 0:
            text += f" % {axis.extent}"
        lines.append(Line(f"{axis.name} = {text}"))
    return lines


@dataclass(frozen=True)
class Fold:
    """How a reduction is computed: in which type, from which start, by which functions."""

    kind: str  # sum, max or min
    type: str
    neutral: str
    dtype: DType

    @property
    def tile(self) -> str:
        """The function that reduces a tile."""
        return f"tj.reduce_{self.kind}"

    @property
    def collect(self) -> str:
        """The function that folds the partials of all programs."""
        return f"collect_{self.kind}"

    def combine(self, total: str, value: str) -> str:
        """The statement that takes one more tile into the total."""
        if self.kind == "sum":
            return f"{total} += {value}"
        return f"{total} = {self._larger}({total}, {value})"

    def both(self, total: str, more: str) -> str:
        """Two totals as one."""
        if self.kind == "sum":
            return f"{total} + {more}"
        return f"{self._larger}({total}, {more})"

    @property
    def _larger(self) -> str:
        return {"max": "tj.maximum", "min": "tj.minimum"}[self.kind]

    def finish(self, total: str) -> str:
        """The total as a value of the reduction's dtype."""
        if self.dtype is b1:
            return f"{total} != 0"
        if self.dtype.narrow:
            return rounded(total, self.dtype) if self.kind == "sum" else total
        return (
            total
            if self.type == compute_type(self.dtype)
            else f"{total}.to({compute_type(self.dtype)})"
        )


def fold_of(reduce: Reduce) -> Fold:
    """How to compute a reduction. The sum of bools is their `or`, as their addition is."""
    dtype, kind = reduce.out.dtype, reduce.op.name.removeprefix("reduce_")
    if dtype is b1:
        return Fold("min" if kind == "min" else "max", "tl.int32", str(int(kind == "min")), dtype)
    if kind == "sum":
        wide = compute_type(dtype) if dtype.is_float else "tl.int64"
        return Fold(kind, wide, "0.0" if dtype.is_float else "0", dtype)
    if dtype.is_float:
        neutral = 'float("-inf")' if kind == "max" else 'float("inf")'
    else:
        limits = np.iinfo(dtype.compute)
        neutral = str(limits.min if kind == "max" else limits.max)
    return Fold(kind, compute_type(dtype), neutral, dtype)
