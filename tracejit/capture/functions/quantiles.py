"""What describes numbers: quantile, mode, aminmax, count_nonzero, cov, sums without NaN."""

from __future__ import annotations

import torch

from tracejit.capture.functions.common import normal_axes, normal_axis
from tracejit.capture.functions.composites import composed
from tracejit.capture.functions.derived import derived
from tracejit.capture.functions.extrema import require_elements
from tracejit.capture.functions.movement import preserved_strides
from tracejit.capture.functions.reduction import sum_
from tracejit.capture.trace.bounds import between, require
from tracejit.capture.trace.tensor import Ints
from tracejit.capture.trace.trace import Trace
from tracejit.ir.types import b1, f32, f64

Tensor = torch.Tensor


# --- without NaN -------------------------------------------------------------------------------


def _numbers(t: Trace, input: Tensor) -> Tensor:
    """0 in place of NaN, whose derivative is g·0."""
    h, b = t.lift(input), t.b
    if not h.dtype.is_float:
        return input
    value = derived(
        t,
        "nansum",
        (t.read(h),),
        lambda x: b.where(b.ne(x, x), 0.0, x),
        (lambda g, y, x: b.mul(g, b.cast(b.eq(x, x), dtype=x.type.dtype)),),
    )
    return t.fresh(value, preserved_strides(h))


@composed(torch.nansum, Tensor.nansum, kernel=True)
def nansum(
    t: Trace,
    input: Tensor,
    dim: object = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return sum_(t, _numbers(t, input), dim, keepdim, dtype=dtype)


@composed(torch.nanmean, Tensor.nanmean)
def nanmean(
    t: Trace,
    input: Tensor,
    dim: object = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if not t.lift(input).dtype.is_float:
        raise t.shape_error("nanmean(): expected input to have floating point or complex dtype")
    count = input.isnan().logical_not().sum(dim, keepdim)
    return sum_(t, _numbers(t, input), dim, keepdim, dtype=dtype) / count


# --- quantiles ---------------------------------------------------------------------------------

_BETWEEN = ("linear", "lower", "higher", "midpoint", "nearest")


def _quantile(name: str, *, ignore: bool):
    def rule(
        t: Trace,
        input: Tensor,
        q: Tensor | float,
        dim: int | None = None,
        keepdim: bool = False,
        *,
        interpolation: str = "linear",
    ) -> Tensor:
        """The value below which a share q of the numbers lies, between the two that are next."""
        h = t.lift(input)
        if not h.numel:
            raise t.shape_error(f"{name}() input tensor must be non-empty")
        if h.dtype not in (f32, f64):
            raise t.shape_error(f"{name}() input tensor must be either float or double dtype")
        if interpolation not in _BETWEEN:
            raise t.shape_error(f"{name}() interpolation must be one of {', '.join(_BETWEEN)}")
        outside = t.shape_error(f"{name}() q values must be in the range [0, 1]")
        if not isinstance(q, Tensor):
            if not 0 <= q <= 1:
                raise outside
            q = torch.scalar_tensor(q, dtype=input.dtype, device=input.device)
        else:
            if len(t.lift(q).shape) > 1:
                raise t.shape_error(f"{name}() q must be a scalar or 1D tensor")
            if t.lift(q).dtype is not h.dtype:
                raise t.shape_error(f"{name}() q tensor must be same dtype as the input tensor")
            between(t, q, 0.0, 1.0, outside)
        rows = _sorted_rows(t, input, dim, keepdim, h.shape)
        found = _at(t, rows, q, interpolation, ignore)
        if not t.lift(q).shape:
            return found.squeeze(-1)
        return found.unsqueeze(0).transpose(0, -1).squeeze(-1)

    return rule


def _sorted_rows(t: Trace, x: Tensor, dim: int | None, keepdim: bool, shape: Ints) -> Tensor:
    """The numbers in order along the last axis, behind the axes of the result."""
    if dim is None:
        kept = (1,) * len(shape) * keepdim
        return x.flatten().sort().values.reshape(*kept, -1)
    axis = normal_axis(t, dim, len(shape))
    if not shape:
        return x.reshape(1)
    rows = x.movedim(axis, -1).sort().values
    return rows.unsqueeze(axis) if keepdim else rows


def _at(t: Trace, rows: Tensor, q: Tensor, interpolation: str, ignore: bool) -> Tensor:
    last = t.lift(rows).shape[-1] - 1
    if ignore:
        ranks = q * (rows.isnan().logical_not().sum(-1, keepdim=True) - 1)
        ranks = ranks.masked_fill(ranks < 0, 0)
    else:
        ranks, spoiled = torch.broadcast_tensors(q * last, rows.isnan().any(-1, keepdim=True))
        ranks = ranks.masked_fill(spoiled, last)
    rounded = {"lower": torch.floor, "higher": torch.ceil, "nearest": torch.round}
    if interpolation in rounded:
        ranks = rounded[interpolation](ranks)
    below = _index(t, ranks, last)
    values = rows.gather(-1, below)
    if interpolation not in ("linear", "midpoint"):
        return values
    share = torch.full_like(ranks, 0.5) if interpolation == "midpoint" else ranks - below
    return torch.lerp(values, rows.gather(-1, _index(t, torch.ceil(ranks), last)), share)


def _index(t: Trace, ranks: Tensor, last: int) -> Tensor:
    index = ranks.long()
    t.ranges[t.read(t.lift(index))] = 0, last
    return index


for _name, _ignore in (("quantile", False), ("nanquantile", True)):
    _functions = getattr(torch, _name), getattr(Tensor, _name)
    composed(*_functions)(_quantile(_name, ignore=_ignore))


@composed(torch.mode, Tensor.mode, kernel=True)
def mode(t: Trace, input: Tensor, dim: int = -1, keepdim: bool = False) -> object:
    """The value that occurs most often along an axis, the smallest of several; its last place."""
    h = t.lift(input)
    axis = normal_axis(t, dim, len(h.shape))
    if not h.shape:
        return torch.return_types.mode((input.clone(), torch.zeros((), dtype=torch.long)))
    n = h.shape[axis]
    require_elements(t, h, axis, "mode()")
    with torch.no_grad():
        order = input.argsort(axis)
        found = input.gather(axis, order)
        changes = found.narrow(axis, 1, n - 1) != found.narrow(axis, 0, n - 1)
        at = torch.arange(n, device=input.device).reshape([-1] + [1] * (len(h.shape) - 1 - axis))
        # where the run of equal elements begins that an element stands in
        starts = torch.where(changes, at[1:], 0)
        first = torch.zeros_like(found.narrow(axis, 0, 1), dtype=torch.long)
        starts = torch.cat([first, starts], axis).cummax(axis).values
        last = (at - starts).argmax(axis, keepdim=True)  # the end of the first longest run
        t.ranges[t.read(t.lift(last))] = 0, n - 1
        index = order.gather(axis, last)
    t.ranges[t.read(t.lift(index))] = 0, n - 1
    values = input.gather(axis, index)
    if not keepdim:
        values, index = values.squeeze(axis), index.squeeze(axis)
    return torch.return_types.mode((values, index))


# --- extrema and counts ------------------------------------------------------------------------


@composed(torch.aminmax, Tensor.aminmax, kernel=True)
def aminmax(t: Trace, input: Tensor, *, dim: int | None = None, keepdim: bool = False) -> object:
    shape = t.lift(input).shape
    if dim is None and 0 in shape:
        raise t.shape_error(
            "aminmax(): cannot compute aminmax over an empty dimension as the operation has no "
            "identity."
        )
    axes = () if dim is None else dim
    return torch.return_types.aminmax((input.amin(axes, keepdim), input.amax(axes, keepdim)))


@composed(torch.count_nonzero, Tensor.count_nonzero, kernel=True)
def count_nonzero(t: Trace, input: Tensor, dim: object = None) -> Tensor:
    normal_axes(t, dim, len(t.lift(input).shape))
    return (input != 0).sum(dim)


# --- covariances -------------------------------------------------------------------------------


@composed(torch.cov, Tensor.cov)
def cov(
    t: Trace,
    input: Tensor,
    *,
    correction: int = 1,
    fweights: Tensor | None = None,
    aweights: Tensor | None = None,
) -> Tensor:
    """(x - mean)·(x - mean)ᵀ over the number of observations, less a correction."""
    h = t.lift(input)
    if len(h.shape) > 2:
        raise t.shape_error(f"cov(): expected input to have two or fewer dimensions: {h.shape}")
    if h.dtype is b1:
        raise t.shape_error("cov(): bool dtype is not supported for input")
    x = input if len(h.shape) == 2 else input.reshape(1, -1)
    n = t.lift(x).shape[1]
    if not n:
        raise t.unsupported("cov of no observations has no rule")
    weights = _weights(t, n, fweights, aweights)
    if weights is None:
        x = x - (x.sum(1) / n).unsqueeze(1)
        return (x.mm(x.t()) / max(n - correction, 0)).squeeze()
    total = weights.sum()
    mean = (x * weights).sum(1) / total
    if aweights is not None and correction:
        count = total - correction * (weights * aweights).sum() / total
    else:
        count = total - correction
    x = x - mean.unsqueeze(1)
    return (x.mm((x * weights).t()) / count.clamp(min=0)).squeeze()


def _weights(t: Trace, n: int, fweights: Tensor | None, aweights: Tensor | None) -> Tensor | None:
    """The weights of observations: how often each was made, times how much each counts."""
    found = None
    for name, weight in (("fweights", fweights), ("aweights", aweights)):
        if weight is None:
            continue
        h = t.lift(weight)
        if h.shape != (n,):
            raise t.shape_error(f"cov(): expected {name} to have one number for each of {n}")
        if h.dtype.is_float != (name == "aweights") or h.dtype is b1:
            raise t.shape_error(f"cov(): expected {name} to have another dtype than {h.dtype}")
        negative = t.shape_error(f"cov(): {name} cannot be negative")
        with torch.no_grad():
            require(t, t.read(t.lift(weight < 0)), negative)
        found = weight if found is None else found * weight
    return found


@composed(torch.corrcoef, Tensor.corrcoef)
def corrcoef(t: Trace, input: Tensor) -> Tensor:
    if len(t.lift(input).shape) > 2:
        raise t.shape_error("corrcoef(): expected input to have two or fewer dimensions")
    c = input.cov()
    if not t.lift(c).shape:
        return c / c
    deviation = c.diagonal().sqrt()
    c = c / deviation.reshape(-1, 1) / deviation.reshape(1, -1)
    return c.clip(-1, 1)
