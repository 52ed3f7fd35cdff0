"""Other forms of functions that have rules: copies in place of views, what torch has for complex
numbers said of real ones, what torch's own Python calls by its inner names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from tracejit.autodiff import zeros
from tracejit.capture.functions.common import normal_axis, register
from tracejit.capture.functions.composites import composed, in_torch
from tracejit.capture.functions.derived import underived
from tracejit.capture.functions.rows import elementwise
from tracejit.capture.trace.table import Row, rule
from tracejit.capture.trace.tensor import TO_TORCH
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.types import b1, f32

Tensor = torch.Tensor

# --- copies of views ---------------------------------------------------------------------------


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _copied(view: Callable) -> Callable:
    """What a function of views gives, as copies."""

    def body(t: Trace, *args: object, **kwargs: object) -> object:
        kwargs.pop("implicit", None)
        found = view(*args, **kwargs)
        return _copy(found) if isinstance(found, Tensor) else tuple(_copy(x) for x in found)

    return body


def _slice(
    input: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    axis = dim % max(input.dim(), 1)
    return input[(*(slice(None),) * axis, slice(start, end, step))]


def _reshaped(
    input: Tensor, size: Sequence[int] | torch.dtype | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    if dtype is not None or isinstance(size, torch.dtype):
        return input.view(dtype or size)
    return input.reshape(size)


_VIEWS: dict[str, Callable] = {
    "alias_copy": lambda input: input,
    "as_strided_copy": torch.as_strided,
    "diagonal_copy": torch.diagonal,
    "expand_copy": lambda input, size: input.expand(size),
    "permute_copy": torch.permute,
    "select_copy": torch.select,
    "slice_copy": _slice,
    "split_copy": torch.split,
    "split_with_sizes_copy": torch.split_with_sizes,
    "squeeze_copy": torch.squeeze,
    "t_copy": torch.t,
    "transpose_copy": torch.transpose,
    "unbind_copy": torch.unbind,
    "unfold_copy": lambda input, dimension, size, step: input.unfold(dimension, size, step),
    "unsqueeze_copy": torch.unsqueeze,
    "view_copy": _reshaped,
}
for _name, _view in _VIEWS.items():
    register((_name,), in_torch(_copied(_view)), inplace=False)


@rule(torch.detach_copy)
def detach_copy(t: Trace, input: Tensor) -> Tensor:
    """A copy whose derivative eager does not know."""
    x = t.read(t.lift(input))
    return t.fresh(underived(t, "detach_copy", (x,), x))


@composed(torch.unsafe_chunk, Tensor.unsafe_chunk)
def unsafe_chunk(t: Trace, input: Tensor, chunks: int, dim: int = 0) -> object:
    return input.chunk(chunks, dim)


@composed(torch.unsafe_split, Tensor.unsafe_split)
def unsafe_split(t: Trace, tensor: Tensor, split_size: int, dim: int = 0) -> object:
    return tensor.split(split_size, dim)


@composed(torch.unsafe_split_with_sizes, Tensor.unsafe_split_with_sizes)
def unsafe_split_with_sizes(
    t: Trace, input: Tensor, split_sizes: Sequence[int], dim: int = 0
) -> object:
    return input.split_with_sizes(split_sizes, dim)


@composed(torch.ravel, Tensor.ravel)
def ravel(t: Trace, input: Tensor) -> Tensor:
    return input.contiguous().view(-1)


@composed(torch.diagflat, Tensor.diagflat)
def diagflat(t: Trace, input: Tensor, offset: int = 0) -> Tensor:
    return input.contiguous().view(-1).diag(offset)


@composed(torch._C._linalg.linalg_diagonal)
def linalg_diagonal(
    t: Trace, A: Tensor, *, offset: int = 0, dim1: int = -2, dim2: int = -1
) -> Tensor:
    return A.diagonal(offset, dim1, dim2)


@composed(torch.fill)
def fill(t: Trace, input: Tensor, value: object) -> Tensor:
    return torch.empty_like(input).copy_(input).fill_(value)


@composed(Tensor.sum_to_size)
def sum_to_size(t: Trace, input: Tensor, *size: object) -> Tensor:
    """The sum over the axes along which a tensor of this size would be repeated."""
    size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    shape = tuple(input.shape)
    lead = len(shape) - len(size)
    fits = lead >= 0 and all(n in (1, m) for n, m in zip(size, shape[lead:], strict=True))
    if not fits:
        raise t.shape_error(f"size {{{list(size)}}} is not expandable to size {{{list(shape)}}}.")
    axes = [k for k, n in enumerate(shape) if k < lead or (size[k - lead] == 1 and n != 1)]
    if not size:
        return input.sum()
    return input.sum(axes, keepdim=True).reshape(tuple(size)) if axes else input


# --- real tensors where torch has complex ones -------------------------------------------------


def _itself(t: Trace, input: Tensor) -> Tensor:
    t.lift(input)
    return input


for _name in ("conj", "conj_physical", "resolve_conj", "resolve_neg", "real"):
    register((_name,), _itself, inplace=False)


@rule(torch.conj_physical_, Tensor.conj_physical_)
def conj_physical_(t: Trace, input: Tensor) -> Tensor:
    """Each element as it is; to autograd that is a write."""
    h = t.lift(input)
    if 0 in h.strides:
        raise t.unsupported("Eager writes nothing where elements share memory; leave the call out")
    t.write(h, t.b.alias(t.read(h)))
    return input


@composed(Tensor.adjoint, torch.adjoint)
def adjoint(t: Trace, input: Tensor) -> Tensor:
    if len(t.lift(input).shape) == 1:
        raise t.shape_error(
            "tensor.adjoint() is only supported on matrices or batches of matrices. Got 1-D tensor."
        )
    return input.transpose(-2, -1) if t.lift(input).shape else input


@composed(torch.isreal, Tensor.isreal)
def isreal(t: Trace, input: Tensor) -> Tensor:
    return torch.ones_like(input, dtype=torch.bool)


def _angle(t: Trace, x: Value) -> Value:
    b = t.b
    return b.where(b.lt(x, 0.0), math.pi, b.where(b.ne(x, x), x, 0.0))


elementwise(
    Row("angle", _angle, (lambda t, g, y, x: zeros(t.b, x),), dtypes="to_float"),
    __name__,
    inplace=False,
)

# --- extrema that look past NaN ----------------------------------------------------------------


def _past_nan(name: str, wins: str, extremum: str) -> Row:
    def value(t: Trace, x: Value, z: Value) -> Value:
        b, kind = t.b, x.type.dtype
        if kind is b1:
            return b.or_(x, z) if extremum == "maximum" else b.and_(x, z)
        y = getattr(b, extremum)(x, z)
        if not kind.is_float:
            return y
        return b.where(b.ne(x, x), z, b.where(b.ne(z, z), x, y))

    def mine(t: Trace, x: Value, z: Value) -> Value:
        return t.b.or_(getattr(t.b, wins)(x, z), t.b.ne(z, z))

    return Row(
        name,
        value,
        (
            lambda t, g, y, x, z: t.b.where(mine(t, x, z), g, 0.0),
            lambda t, g, y, x, z: t.b.where(mine(t, x, z), 0.0, g),
        ),
        arity=2,
    )


for _row in (_past_nan("fmax", "ge", "maximum"), _past_nan("fmin", "le", "minimum")):
    elementwise(_row, __name__, inplace=False)

# --- powers of two and others ------------------------------------------------------------------


def _ldexp(t: Trace, input: Tensor, other: Tensor) -> Tensor:
    x, exponent = t.lift(input), t.lift(other)
    if t.grad_on and t.requires_grad(x) and not exponent.dtype.is_float:
        raise t.unsupported(
            "Eager's gradient of ldexp by integers is zero where they are negative; give floats"
        )
    return input * torch.pow(2.0, other)


register(("ldexp",), in_torch(_ldexp))


@composed(torch._C._linalg.linalg_vander)
def vander(t: Trace, x: Tensor, *, N: int | None = None) -> Tensor:
    """Powers 0 … N - 1 of each element, as running products."""
    x = x if x.dim() else x.unsqueeze(0)
    n = x.shape[-1] if N is None else N
    if n <= 1:
        raise t.shape_error("N must be greater than 1.")
    if t.lift(x).dtype.narrow or x.dtype is torch.bool:
        raise t.shape_error(f"linalg.vander does not support {x.dtype}")
    if not x.is_floating_point():
        x = x.to(torch.int64)
    powers = x.unsqueeze(-1).expand(*x.shape, n - 1).cumprod(-1)
    return torch.cat([torch.ones_like(x).unsqueeze(-1), powers], -1)


@composed(torch.vander)
def vander_down(t: Trace, x: Tensor, N: int | None = None, increasing: bool = False) -> Tensor:
    """Powers of each element of a vector, the highest first unless `increasing`."""
    if x.dim() != 1:
        raise t.shape_error("x must be a one-dimensional tensor.")
    n = len(x) if N is None else N
    if n < 0:
        raise t.shape_error("N must be non-negative.")
    with torch.no_grad():
        first = x.detach() if x.is_floating_point() else x.to(torch.int64)
        powers = torch.ones_like(first).unsqueeze(-1)[:, :n]
        if n > 1:
            products = first.unsqueeze(-1).expand(-1, n - 1).cumprod(-1)
            powers = torch.cat([powers, products.to(first.dtype)], -1)  # autocast widens products
        found = powers.clone() if increasing else powers.flip(-1)
    if n < 2:
        return found
    return t.fresh(underived(t, "vander", (t.read(t.lift(x)),), t.read(t.lift(found))))


# --- roots of the plane: what torch.fft has that needs no complex numbers ------------------------


def _shifted(sign: int) -> Callable:
    def rule(t: Trace, input: Tensor, dim: object = None) -> Tensor:
        rank = input.dim()
        if dim is None:
            axes = list(range(rank))
        else:
            axes = [normal_axis(t, d, rank) for d in ((dim,) if isinstance(dim, int) else dim)]
        sizes = [input.shape[k] for k in axes]
        return input.roll([n // 2 if sign > 0 else (n + 1) // 2 for n in sizes], axes)

    return rule


composed(torch.fft.fftshift)(_shifted(1))
composed(torch.fft.ifftshift)(_shifted(-1))

# --- what torch's own decompositions call --------------------------------------------------------


@composed(torch._softmax_backward_data, kernel=True)
def softmax_backward_data(
    t: Trace, grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype
) -> Tensor:
    """In the dtype of the gradient; on a GPU of a float16 input, whose softmax was float32."""
    g, y = t.lift(grad_output), t.lift(output)
    cpu, mixed = g.device == "cpu", TO_TORCH[g.dtype] is not input_dtype
    widened = g.dtype is f32 and input_dtype is torch.float16
    if g.dtype is not y.dtype or (mixed and (widened if cpu else not widened)):
        kinds = TO_TORCH[g.dtype], TO_TORCH[y.dtype], input_dtype
        raise t.shape_error(
            "_softmax_backward_data is not implemented for {}, {}, {}".format(*kinds)
        )
    product = grad_output * output
    out = product - output * product.sum(dim, keepdim=True)
    return out.half() if widened else out


@composed(torch.grid_sampler_2d, torch.grid_sampler_3d)
def grid_sampler(
    t: Trace,
    input: Tensor,
    grid: Tensor,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
) -> Tensor:
    return torch.grid_sampler(input, grid, interpolation_mode, padding_mode, align_corners)


@composed(torch.native_layer_norm, kernel=True)
def native_layer_norm(
    t: Trace,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple:
    axes = list(range(input.dim() - len(normalized_shape), input.dim()))
    out = torch.layer_norm(input, normalized_shape, weight, bias, eps)
    seen = input.detach()  # eager has no gradient of the rest
    dtype = _dtype_of_moments(t, input, weight, wide=t.lift(input).device != "cpu")
    return out, *_moments(seen, axes, eps, dtype)


def _dtype_of_moments(t: Trace, x: Tensor, weight: Tensor | None, wide: bool) -> torch.dtype:
    """float32 next to float32 parameters, or where it is `wide`; else as the input."""
    mixed = weight is not None and t.lift(weight).dtype is not t.lift(x).dtype
    return (
        torch.float32 if t.lift(x).dtype.narrow and (mixed or wide) else TO_TORCH[t.lift(x).dtype]
    )


def _moments(x: Tensor, axes: list[int], eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean, and one over the deviation, rounded once."""
    wide = x if x.dtype is torch.float64 else x.float()
    deviation = (wide.var(axes, correction=0, keepdim=True) + eps).rsqrt()
    return wide.mean(axes, keepdim=True).to(dtype), deviation.to(dtype)


@composed(torch.native_group_norm, kernel=True)
def native_group_norm(
    t: Trace,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> tuple:
    out = torch.group_norm(input, group, weight, bias, eps)
    dtype = _dtype_of_moments(t, input, weight, wide=False)
    moments = _moments(input.reshape(N, group, C // group * HxW), [2], eps, dtype)
    return out, *(x.squeeze(-1) for x in moments)
