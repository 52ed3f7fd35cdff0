"""torch's interpolation: the functions that F.interpolate and nn.Upsample choose from by mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tracejit.capture.functions.common import cast
from tracejit.capture.functions.derived import widen, widened
from tracejit.capture.functions.layouts import like
from tracejit.capture.functions.resampling import Line
from tracejit.capture.trace.scalars import pinned
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.types import DType, f32, u8
from tracejit.records import dataclass

Tensor = torch.Tensor
builtin = torch._C._nn


@dataclass(frozen=True, slots=True)
class Resampling:
    """The last axes of an image, each resampled by its line."""

    lines: tuple[Line, ...]

    def made(self, t: Trace, x: Value) -> Value:
        """x[…, *n] → […, *m]"""

        def vjp(b, cts, need):
            return (self.back(t, cts[0]),)

        with t.untaped():
            y = widen(t, x)
            for axis, line in self._axes(x):
                y = line.made(t, y, axis)
            y = t.b.alias(cast(t, y, x.type.dtype))
        return t.derive("upsample", (x,), y, vjp)

    def back(self, t: Trace, g: Value) -> Value:
        """The gradient of x, given that of y."""

        def vjp(b, cts, need):
            return (self.made(t, cts[0]),)

        with t.untaped():
            x = widen(t, g)
            for axis, line in reversed(self._axes(g)):
                x = line.back(t, x, axis)
            x = cast(t, x, g.type.dtype)
        return t.derive("upsample_backward", (g,), x, vjp)

    def _axes(self, x: Value) -> list[tuple[int, Line]]:
        """The axes that change, those first of which the fewest elements are left."""
        first = len(x.type.shape) - len(self.lines)
        found = [(first + k, line) for k, line in enumerate(self.lines)]
        return sorted(
            ((axis, line) for axis, line in found if not line.same),
            key=lambda pair: pair[1].m / pair[1].n,
        )


def _resampled(
    t: Trace,
    input: Tensor,
    rank: int,
    output_size: Sequence[int] | None,
    scales: Sequence[float | None],
    mode: str,
    *,
    corners: bool = False,
    antialias: bool = False,
) -> TracedTensor:
    h = t.lift(input)
    length = h.shape[2:]
    if len(h.shape) != rank + 2:
        raise t.shape_error(
            f"It is expected input_size equals to {rank + 2}, but got size {len(h.shape)}"
        )
    scales = [None if s is None else float(pinned(s)) for s in scales] or [None] * rank
    if output_size is None:
        if len(scales) != rank or None in scales:
            raise t.shape_error(f"It is expected {rank} scale factors, but got {len(scales)}")
        size = tuple(int(n * s) for n, s in zip(length, scales, strict=True))
    else:
        size = tuple(int(n) for n in output_size)
    if len(size) != rank or len(scales) != rank:
        raise t.shape_error(f"It is expected output_size equals to {rank}, but got {len(size)}")
    if min(*length, *size) <= 0:
        raise t.shape_error(
            "Input and output sizes should be greater than 0, but got input "
            f"{list(length)} output {list(size)}"
        )
    if 0 in h.shape[1:]:
        raise t.shape_error(f"Non-empty {rank + 2}D data tensor expected but got {list(h.shape)}")
    nearest = mode.startswith("nearest")
    if not h.dtype.is_float and not (h.dtype is u8 and nearest):
        if h.dtype is u8:
            raise t.unsupported(f"Interpolation of uint8 has a rule for modes nearest, not {mode}")
        raise t.not_implemented("upsample", h.dtype)
    if antialias and h.dtype.narrow:
        raise t.not_implemented("upsample_aa", h.dtype)
    dtype = f32 if nearest or not h.dtype.is_float else widened(h.dtype)
    x = t.read(h)
    if antialias and x.type.device == "cpu" and _reads_other_rows(h.shape, h.strides, size):
        raise t.unsupported(
            "With antialias=True and a result of one column torch's kernel for the CPU reads other "
            "rows than it should, and so do its results: give it images with channels last, or "
            "resize the rows by themselves"
        )
    lines = tuple(
        Line(n, m, mode, _scale(n, m, s, dtype, corners), dtype, corners, antialias)
        for n, m, s in zip(length, size, scales, strict=True)
    )
    y = Resampling(lines).made(t, x)
    return t.fresh(y, like(h, y.type.shape))


def _reads_other_rows(shape: Sequence[int], strides: Sequence[int], size: Sequence[int]) -> bool:
    """Whether torch's antialiasing takes an image of one column to lie otherwise than it does: it
    goes along the columns first, and is wrong along the rows then."""
    channels_last = shape[1] > 1 and strides[1] == 1
    return not channels_last and size[-1] == 1 < size[0] != shape[2]


def _scale(n: int, m: int, factor: float | None, dtype: DType, corners: bool) -> float:
    """How many elements of the image one of the result stands for, rounded as torch rounds it."""
    kind = dtype.compute.type
    if corners:
        return float(kind(n - 1) / kind(m - 1)) if m > 1 else 0.0
    return float(kind(1.0 / factor) if factor is not None and factor > 0 else kind(n) / kind(m))


def _scales(given: tuple, named: dict) -> Sequence[float | None]:
    """The scale factors, which torch's functions take as a list or one by one."""
    listed = named.get("scale_factors")
    if listed is not None:
        return listed
    if len(given) == 1 and (given[0] is None or isinstance(given[0], (tuple, list))):
        return given[0] or ()
    names = ("scales_d", "scales_h", "scales_w", "scales")
    return (*given, *(named[name] for name in names if name in named))


def _nearest(rank: int, mode: str):
    def run(
        t: Trace, input: Tensor, output_size: object, *scales: object, **named: object
    ) -> TracedTensor:
        return _resampled(t, input, rank, output_size, _scales(scales, named), mode)

    return run


def _smooth(rank: int, mode: str, antialias: bool):
    def run(
        t: Trace,
        input: Tensor,
        output_size: object,
        align_corners: bool,
        *scales: object,
        **named: object,
    ) -> TracedTensor:
        options = {"corners": bool(align_corners), "antialias": antialias}
        scales = _scales(scales, named)
        return _resampled(t, input, rank, output_size, scales, mode, **options)

    return run


for _rank in (1, 2, 3):
    rule(getattr(builtin, f"upsample_nearest{_rank}d"))(_nearest(_rank, "nearest"))
    rule(getattr(builtin, f"_upsample_nearest_exact{_rank}d"))(_nearest(_rank, "nearest-exact"))
for _name, _rank, _mode in (
    ("upsample_linear1d", 1, "linear"),
    ("upsample_bilinear2d", 2, "linear"),
    ("upsample_trilinear3d", 3, "linear"),
    ("upsample_bicubic2d", 2, "cubic"),
    ("_upsample_bilinear2d_aa", 2, "linear"),
    ("_upsample_bicubic2d_aa", 2, "cubic"),
):
    rule(getattr(builtin, _name))(_smooth(_rank, _mode, _name.endswith("_aa")))
