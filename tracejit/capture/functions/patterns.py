"""What is told from positions: eye, tril, triu, diag, one_hot, linspace, and small constants."""

from __future__ import annotations

import math

import torch

from tracejit.capture.functions.assembly import movedim
from tracejit.capture.functions.common import (
    as_number,
    by_rule,
    cast,
    check_range,
    default_dtype,
    expand,
    literal,
    normal_axis,
    number_dtype,
    promote_two,
    register,
)
from tracejit.capture.functions.factories import Number, Options, filled, made, options_of
from tracejit.capture.functions.movement import clone, slice_steps
from tracejit.capture.functions.reduction import sum_
from tracejit.capture.trace import cuts
from tracejit.capture.trace.bounds import within
from tracejit.capture.trace.integers import held
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import TO_TORCH, Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Builder, Value
from tracejit.ir.ops.indexing import FEW
from tracejit.ir.types import DType, b1, f64, i32, i64

Tensor = torch.Tensor
SMALL = 4096  # elements that are compared with an index sooner than written one by one
LARGEST_CONSTANT = 64  # elements of a torch.tensor([…]): each costs a comparison where it is read


def scattered(b: Builder, x: Value, at: Value, rows: Value, axis: int, combine: str) -> Value:
    """`scatter`, or the same by comparing each of a few indices with every place of a small tensor:
    that fuses with what is computed before and after. The sum of bools is their `or`."""
    taken, shape = at.type.shape[axis], x.type.shape
    if x.type.dtype is b1 and combine == "add":
        counts, more = b.cast(x, dtype=i32), b.cast(rows, dtype=i32)
        return b.ne(scattered(b, counts, at, more, axis, combine), 0)
    extremum = combine in ("max", "min", "mul")  # whose derivative knows of all indices at once
    if extremum or taken > FEW or x.type.numel > SMALL:
        return b.scatter(x, at, rows, axis=axis, combine=combine)
    place = b.iota(axis=axis, shape=shape, dtype=i64, device=x.type.device)
    for k in range(taken):
        ends = [(k, k + 1) if a == axis else (0, n) for a, n in enumerate(at.type.shape)]
        starts, stops = zip(*ends, strict=True)
        one = {"starts": starts, "stops": stops, "steps": (1,) * len(ends)}
        hit = b.eq(b.expand(b.slice(at, **one), shape=shape), place)
        given = b.expand(b.slice(rows, **one), shape=shape)
        x = b.where(hit, b.add(x, given) if combine == "add" else given, x)
    return x


def along(t: Trace, index: Value, shape: Ints, axis: int) -> Value:
    """A vector of indices as an index at every point of `shape`, along an axis."""
    thin = tuple(n if k == axis else 1 for k, n in enumerate(shape))
    return expand(t, t.b.reshape(index, shape=thin), shape)


def from_end(t: Trace, index: Value, size: int) -> Value:
    """An index whose negative values count from the end."""
    return t.b.where(t.b.lt(index, 0), t.b.add(index, size), index)


def position(t: Trace, axis: int, shape: Ints, device: str, dtype: DType = i64) -> Value:
    """The index along an axis, at every point of a shape."""
    return t.b.iota(axis=axis, shape=shape, dtype=dtype, device=device)


# ---- triangles and diagonals


def _selected(t: Trace, name: str, x: Value, related: str, offset: int) -> Value:
    """x where column - row is `related` to an offset, else zero; torch saves no mask for that."""
    shape, last, device = x.type.shape, len(x.type.shape) - 1, x.type.device
    with t.untaped():
        ahead = t.b.sub(position(t, last, shape, device), position(t, last - 1, shape, device))
        out = t.b.where(getattr(t.b, related)(ahead, offset), x, literal(0, x.type.dtype))

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        return (_selected(t, name, cts[0], related, offset),)

    return t.derive(name, (x,), out, vjp)


def _triangle(name: str, related: str):
    def rule(t: Trace, input: Tensor, diagonal: int = 0) -> TracedTensor:
        h = t.lift(input)
        if len(h.shape) < 2:
            raise t.shape_error(f"{name}: input tensor must have at least 2 dimensions")
        return t.fresh(_selected(t, name, t.read(h), related, int(diagonal)))

    return rule


def diagonal(
    t: Trace, input: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> TracedTensor:
    """A view of the elements (i, i + offset): a square, flattened, in steps of its side and 1."""
    h = t.lift(input)
    rank = len(h.shape)
    a, b = normal_axis(t, dim1, rank), normal_axis(t, dim2, rank)
    if a == b:
        raise t.shape_error(f"diagonal dimensions cannot be identical {dim1}, {dim2}")
    row, column = max(-offset, 0), max(offset, 0)
    n = max(min(h.shape[a] - row, h.shape[b] - column), 0)
    row, column = (row, column) if n else (0, 0)
    rest = tuple(k for k in range(rank) if k not in (a, b))
    kept = tuple(h.shape[k] for k in rest)
    steps = (
        slice_steps(h, a, row, row + n, 1),
        ("slice", _square(h.shape, a, b, n, column)),
        ("permute", (("axes", (*rest, a, b)),)),
        ("reshape", (("shape", (*kept, n * n)),)),
        ("slice", _strided(kept, n)),
    )
    strides = (*(h.strides[k] for k in rest), h.strides[a] + h.strides[b])
    at = h.offset + row * h.strides[a] + column * h.strides[b]
    return t.view(h, steps, (*kept, n), strides, at)


def _square(shape: Ints, a: int, b: int, n: int, column: int) -> tuple:
    """The slice along axis b, once axis a has extent n."""
    extents = [n if k == a else m for k, m in enumerate(shape)]
    starts = tuple(column if k == b else 0 for k in range(len(shape)))
    stops = tuple(column + n if k == b else m for k, m in enumerate(extents))
    return (("starts", starts), ("stops", stops), ("steps", (1,) * len(shape)))


def _strided(kept: Ints, n: int) -> tuple:
    rank = len(kept) + 1
    return (
        ("starts", (0,) * rank),
        ("stops", (*kept, n * n)),
        ("steps", (1,) * (rank - 1) + (n + 1,)),
    )


def diag_embed(
    t: Trace, input: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1
) -> TracedTensor:
    """The last axis along a diagonal of two new axes, zero elsewhere."""
    h = t.lift(input)
    if not h.shape:
        raise t.shape_error("diag_embed needs a tensor with at least one dimension")
    rank, n = len(h.shape) + 1, h.shape[-1] + abs(offset)
    a, b = normal_axis(t, dim1, rank), normal_axis(t, dim2, rank)
    if a == b:
        raise t.shape_error(f"diagonal dimensions cannot be identical {dim1}, {dim2}")
    lead = h.shape[:-1]
    low, high = (max(-offset, 0), max(offset, 0))
    none = (0,) * len(lead)
    zero = literal(0, h.dtype)
    rows = t.b.pad(t.read(h), low=(*none, low), high=(*none, high), interior=(*none, 0), value=zero)
    shape = (*lead, n, n)
    spread = expand(t, t.b.reshape(rows, shape=(*lead, n, 1)), shape)
    out = t.fresh(_selected(t, "diag_embed", spread, "eq", int(offset)))
    if (a, b) == (rank - 2, rank - 1):
        return out
    moved = movedim(t, out, (-2, -1), (a, b))
    return clone(t, moved, memory_format=torch.contiguous_format)


def diag(t: Trace, input: Tensor, diagonal: int = 0) -> TracedTensor:
    """A vector as a diagonal matrix; the diagonal of a matrix, copied."""
    rank = len(t.lift(input).shape)
    if rank not in (1, 2):
        raise t.shape_error(f"diag(): Supports 1D or 2D tensors. Got {rank}D")
    if rank == 1:
        return diag_embed(t, input, diagonal)
    return clone(t, _diagonal(t, input, diagonal), memory_format=torch.contiguous_format)


_diagonal = diagonal


def trace(t: Trace, input: Tensor) -> TracedTensor:
    if len(t.lift(input).shape) != 2:
        raise t.shape_error("trace: expected a matrix")
    if t.lift(input).dtype is b1:
        raise t.not_implemented("trace", b1)
    return sum_(t, diagonal(t, input))


# ---- constants


@rule(torch.eye)
def eye(t: Trace, n: int, m: int | None = None, **options: object) -> TracedTensor:
    o = options_of(t, options)
    shape = (n, n if m is None else m)
    if min(shape) < 0:
        raise t.shape_error(f"n and m must be greater or equal to 0, got {shape}")
    same = t.b.eq(position(t, 0, shape, o.device), position(t, 1, shape, o.device))
    return made(t, cast(t, same, o.dtype or default_dtype()), o.requires_grad)


@rule(torch.linspace)
def linspace(t: Trace, start: float, end: float, steps: int, **options: object) -> TracedTensor:
    """From both ends towards the middle, as torch counts."""
    o = options_of(t, options)
    chosen = o.dtype or default_dtype()
    return made(t, cast(t, _spaced(t, start, end, steps, chosen, o), chosen), o.requires_grad)


@rule(torch.logspace)
def logspace(
    t: Trace, start: float, end: float, steps: int, base: float = 10.0, **options: object
) -> TracedTensor:
    """Powers of a base, in float64."""
    o = options_of(t, options)
    chosen = o.dtype or default_dtype()
    if not chosen.is_float:
        raise t.unsupported("logspace of integers has no rule")
    exponent = cast(t, _spaced(t, start, end, steps, chosen, o), f64)
    powers = t.b.full(literal(base, f64), shape=(steps,), dtype=f64, device=o.device)
    return made(t, cast(t, t.b.pow(powers, exponent), chosen), o.requires_grad)


@rule(torch.fft.fftfreq)
def fftfreq(t: Trace, n: int, d: float = 1.0, **options: object) -> TracedTensor:
    """The frequencies of an fft of n samples at distance d: those below 0 behind the others."""
    return _frequencies(t, n, n, (n + 1) // 2, d, options)


@rule(torch.fft.rfftfreq)
def rfftfreq(t: Trace, n: int, d: float = 1.0, **options: object) -> TracedTensor:
    """Those that are not below 0."""
    return _frequencies(t, n, n // 2 + 1, n // 2 + 1, d, options)


def _frequencies(
    t: Trace, n: int, count: int, positive: int, d: float, options: dict[str, object]
) -> TracedTensor:
    o = options_of(t, options)
    chosen = o.dtype or default_dtype()
    if not chosen.is_float:
        raise t.shape_error("frequencies require a floating-point dtype")
    place = position(t, 0, (count,), o.device, chosen)
    turned = t.b.where(t.b.lt(place, float(positive)), place, t.b.sub(place, float(n)))
    scale = literal(1.0 / (n * d) if n * d else math.inf, chosen)
    return made(t, t.b.mul(turned, scale), o.requires_grad)


def _spaced(t: Trace, start: object, end: object, steps: int, chosen: DType, o: Options) -> Value:
    """Numbers at equal distances, before they are rounded to a dtype: those of integers in float64.
    The ends may be tensors of one element."""
    if steps < 0:
        raise t.shape_error("number of steps must be non-negative")
    if chosen is b1:
        raise t.shape_error("linspace is not implemented for bools")
    inner = f64 if chosen is f64 or not chosen.is_float else default_dtype()
    start, end = as_number(t, start), as_number(t, end)
    if isinstance(start, Tensor) or isinstance(end, Tensor):
        start, end = (_end(t, x, steps, o.device) for x in (start, end))
        step = t.b.div(t.b.sub(end, start), float(max(steps - 1, 1)))
        start, end, step = (cast(t, x, inner) for x in (start, end, step))
    else:
        step = (end - start) / (steps - 1) if steps > 1 else 0.0
        start, end, step = (literal(x, inner) for x in (start, end, step))
    i = position(t, 0, (steps,), o.device, inner)
    up = t.b.add(t.b.mul(i, step), start)
    down = t.b.sub(end, t.b.mul(t.b.sub(float(steps - 1), i), step))
    return t.b.where(t.b.lt(i, float(steps // 2 or 1)), up, down)


def _end(t: Trace, x: object, steps: int, device: str) -> Value:
    """An end of equal distances at each of them, in float64."""
    if not isinstance(x, Tensor):
        return t.b.full(literal(x, f64), shape=(steps,), dtype=f64, device=device)
    h = t.lift(x)
    if h.shape:
        raise t.shape_error("linspace only supports 0-dimensional start and end tensors")
    with t.untaped():
        value = cast(t, t.read(h), f64)
        return expand(t, t.b.reshape(value, shape=(1,)), (steps,))


def _flat(t: Trace, data: object) -> tuple[list, Ints]:
    """The numbers of nested lists in order, and their shape."""
    if not isinstance(data, (list, tuple)):
        if not isinstance(data, (bool, int, float)):
            raise t.unsupported("torch.tensor has a rule for numbers and nested lists of numbers")
        return [data], ()
    parts = [_flat(t, item) for item in data]
    shapes = {shape for _, shape in parts}
    if len(shapes) > 1:
        raise ValueError("expected sequence of equal length at each depth of a nested list")
    inner = shapes.pop() if shapes else ()
    return [x for numbers, _ in parts for x in numbers], (len(parts), *inner)


def constant(t: Trace, numbers: list, shape: Ints, dtype: DType, device: str) -> Value:
    """A small array of given numbers: a chain of selections by position."""
    if len(numbers) > LARGEST_CONSTANT:
        raise t.unsupported(
            f"A constant of {len(numbers)} elements has no rule (at most {LARGEST_CONSTANT}); "
            "build it outside the step"
        )
    numbers = [held(x, dtype) for x in numbers]
    for x in numbers:
        check_range(t, x, dtype)
    values = [literal(x, dtype) for x in numbers]
    flat = (len(values),)
    value = t.b.full(values[0] if values else 0, shape=flat, dtype=dtype, device=device)
    place = position(t, 0, flat, device)
    for k, x in enumerate(values):
        if k and isinstance(x, Value) and not dtype.is_float:
            x = t.b.full(x, shape=flat, dtype=dtype, device=device)
        if k:
            value = t.b.where(t.b.eq(place, k), x, value)
    return value if flat == shape else t.b.reshape(value, shape=shape)


@rule(torch.tensor)
def tensor(t: Trace, data: object, **options: object) -> TracedTensor:
    """torch.tensor of a number, or of nested lists of a few numbers."""
    o = options_of(t, options)
    numbers, shape = _flat(t, data)
    if not isinstance(data, (list, tuple)):
        return filled(t, data, (), o.dtype or number_dtype(data), o)
    chosen = default_dtype() if not numbers else number_dtype(numbers[0])
    for x in numbers:
        chosen = promote_two(chosen, number_dtype(x))
    value = constant(t, numbers, shape, o.dtype or chosen, o.device)
    return made(t, value, o.requires_grad)


@rule(Tensor.new_tensor)
def new_tensor(t: Trace, self: Tensor, data: object, **options: object) -> TracedTensor:
    """torch.tensor of the dtype and on the device of another one, unless options say otherwise."""
    h = t.lift(self)
    return tensor(t, data, **({"dtype": TO_TORCH[h.dtype], "device": h.device} | options))


@rule(torch.scalar_tensor)
def scalar_tensor(t: Trace, s: Number, **options: object) -> TracedTensor:
    return tensor(t, s, **{"dtype": torch.get_default_dtype(), **options})


def one_hot(t: Trace, tensor: Tensor, num_classes: int = -1) -> TracedTensor:
    h = t.lift(tensor)
    if h.dtype is not i64:
        raise t.shape_error("one_hot is only applicable to index tensor of type LongTensor")
    if num_classes == -1:
        if not h.numel:
            raise t.shape_error("Can not infer total number of classes from empty tensor.")
        largest = by_rule(t, torch.max, tensor)
        num_classes = int(cuts.number_of(t, t.lift(largest))) + 1
    if num_classes < 1:
        raise t.shape_error("num_classes should be positive")
    reason = "Class values must be non-negative and smaller than num_classes, not {value}"
    within(t, tensor, 0, int(num_classes), t.shape_error(reason))
    shape = (*h.shape, int(num_classes))
    index = expand(t, t.b.reshape(t.read(h), shape=(*h.shape, 1)), shape)
    hit = t.b.eq(index, position(t, len(h.shape), shape, h.device))
    return t.fresh(cast(t, hit, i64))


for _names, _implementation, _inplace in (
    (("tril",), _triangle("tril", "le"), True),
    (("triu",), _triangle("triu", "ge"), True),
    (("diag_embed",), diag_embed, False),
    (("diag",), diag, False),
    (("diagonal",), diagonal, False),
    (("trace",), trace, False),
    (("one_hot",), one_hot, False),
):
    register(_names, _implementation, inplace=_inplace)
