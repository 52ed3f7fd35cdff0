"""Losses of margins and of distributions, as torch composes them of its own functions."""

from __future__ import annotations

import math

import torch

from tracejit.capture.functions.composites import composed
from tracejit.capture.functions.derived import argument_error
from tracejit.capture.functions.loss import constant_weight, reduced
from tracejit.capture.trace.bounds import between, within
from tracejit.capture.trace.tensor import Ints
from tracejit.capture.trace.trace import Trace
from tracejit.ir.types import f32, f64, i64

Tensor = torch.Tensor
functional = torch.nn.functional
NONE, MEAN = 0, 1  # how torch numbers the reductions


def _require_floats(t: Trace, *xs: Tensor) -> None:
    """Of integers, torch's in-place arithmetic and ours differ in the dtype."""
    if not all(t.lift(x).dtype.is_float for x in xs):
        raise t.unsupported("This loss has a rule for floats; cast the input")


def _reduced(t: Trace, losses: Tensor, reduction: int) -> Tensor:
    return reduced(t, losses, {NONE: "none", MEAN: "mean"}.get(reduction, "sum"))


# --- pairs -------------------------------------------------------------------------------------


@composed(torch.margin_ranking_loss)
def margin_ranking_loss(
    t: Trace,
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0.0,
    reduction: int = MEAN,
) -> Tensor:
    """margin - z·(x1 - x2), not below 0."""
    _require_floats(t, input1, input2)
    return _reduced(t, (-target * (input1 - input2) + margin).clamp_min(0), reduction)


@composed(torch.hinge_embedding_loss)
def hinge_embedding_loss(
    t: Trace, self: Tensor, target: Tensor, margin: float = 1.0, reduction: int = MEAN
) -> Tensor:
    """x where z is 1; margin - x, not below 0, where it is -1; the sum of both elsewhere."""
    _require_floats(t, self)
    zeros = torch.zeros_like(self)
    far = torch.where(target != 1, (margin - self).clamp_min(0), zeros)
    return _reduced(t, far + torch.where(target != -1, self, zeros), reduction)


@composed(torch.cosine_embedding_loss)
def cosine_embedding_loss(
    t: Trace,
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0.0,
    reduction: int = MEAN,
) -> Tensor:
    """1 - cos where z is 1; cos - margin, not below 0, where it is -1."""
    axis = len(t.lift(target).shape)
    if axis > 1:
        raise t.shape_error("0D or 1D target tensor expected, multi-target not supported")
    if any(len(t.lift(x).shape) != axis + 1 for x in (input1, input2)):
        raise t.shape_error(f"{axis}D target tensor expects {axis + 1}D input tensors")
    tiny = 1e-12
    product = (input1 * input2).sum(axis)
    squares = [(x * x).sum(axis) + tiny for x in (input1, input2)]
    cosine = product / (squares[0] * squares[1]).sqrt()
    zeros = torch.zeros_like(cosine)
    near = torch.where(target == 1, 1 - cosine, zeros)
    far = torch.where(target == -1, (cosine - margin).clamp_min(0), zeros)
    return _reduced(t, near + far, reduction)


@composed(torch.triplet_margin_loss)
def triplet_margin_loss(
    t: Trace,
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: int = MEAN,
) -> Tensor:
    """margin + ‖a - p‖ - ‖a - n‖, not below 0; `swap`: ‖p - n‖ where that is smaller."""
    if len({len(t.lift(x).shape) for x in (anchor, positive, negative)}) > 1:
        raise t.shape_error(
            "The anchor, positive, and negative tensors are expected to have the same number of "
            "dimensions"
        )
    near = torch.pairwise_distance(anchor, positive, p, eps)
    far = torch.pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = torch.min(far, torch.pairwise_distance(positive, negative, p, eps))
    return _reduced(t, (margin + near - far).clamp_min(0), reduction)


# --- classes -----------------------------------------------------------------------------------


def _rows(t: Trace, input: Tensor, target: Tensor, of_each: bool) -> Ints:
    """How many samples and classes; the target holds one class of each sample, or a row."""
    x, z = t.lift(input).shape, t.lift(target).shape
    if not 1 <= len(x) <= 2 or x[-1] == 0:
        raise t.shape_error(
            f"Expected non-empty vector or matrix with optional 0-dim batch size, but got {list(x)}"
        )
    if t.lift(input).dtype not in (f32, f64):
        raise t.not_implemented(t.calling.__name__, t.lift(input).dtype)
    samples, classes = (1, *x)[-2:]
    fits = z == x if of_each else len(z) <= 1 and math.prod(z) == samples
    if not fits or (of_each and t.lift(target).dtype is not i64):
        raise t.shape_error(f"inconsistent target size: {list(z)} for input of size: {list(x)}")
    return samples, classes


@composed(torch._C._nn.multi_margin_loss)
def multi_margin_loss(
    t: Trace,
    self: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1,
    weight: Tensor | None = None,
    reduction: int = MEAN,
) -> Tensor:
    """The mean over the classes of w·(margin - x_z + x_c)^p, not below 0, and 0 for c = z."""
    samples, classes = _rows(t, self, target, False)
    if p not in (1, 2):
        raise t.shape_error("only p == 1 and p == 2 supported")
    if weight is not None and t.lift(weight).shape != (classes,):
        raise t.shape_error(f"inconsistent weight size: {list(t.lift(weight).shape)}")
    within(t, target, 0, classes, t.shape_error("target out of range"))
    weight = constant_weight(t, "multi_margin_loss", weight)
    x, z = self.reshape(samples, classes), target.reshape(samples, 1)
    other = torch.arange(classes, device=self.device) != z
    losses = torch.where(other, functional.relu(margin - x.gather(1, z) + x), 0.0)
    if p == 2:
        losses = losses * losses
    if weight is not None:
        losses = losses * weight[z]
    losses = losses.sum(1) / classes
    return _reduced(t, losses.reshape(target.shape) if self.dim() == 1 else losses, reduction)


@composed(torch._C._nn.multilabel_margin_loss)
def multilabel_margin_loss(t: Trace, self: Tensor, target: Tensor, reduction: int = MEAN) -> Tensor:
    """The sum over classes y of the target, which end before the first -1, and classes c that are
    not of it, of 1 - x_y + x_c, not below 0, over the number of classes."""
    samples, classes = _rows(t, self, target, True)
    within(t, target, -1, classes, t.shape_error("target out of range"))
    x, z = self.reshape(samples, classes), target.reshape(samples, classes)
    given = (z < 0).cumsum(1) == 0
    chosen = z.clamp_min(0)
    number = torch.arange(classes, device=self.device)
    own = (given[:, :, None] & (chosen[:, :, None] == number)).any(1)
    pairs = functional.relu(1 - x.gather(1, chosen)[:, :, None] + x[:, None, :])
    losses = torch.where(given[:, :, None] & ~own[:, None, :], pairs, 0.0).sum((1, 2)) / classes
    return _reduced(t, losses.reshape(()) if self.dim() == 1 else losses, reduction)


# --- distributions -----------------------------------------------------------------------------


@composed(torch.poisson_nll_loss)
def poisson_nll_loss(
    t: Trace,
    input: Tensor,
    target: Tensor,
    log_input: bool,
    full: bool,
    eps: float,
    reduction: int,
) -> Tensor:
    """exp(x) - z·x, or x - z·log(x + eps); `full` adds Stirling's approximation where z > 1."""
    losses = input.exp() - target * input if log_input else input - target * (input + eps).log()
    if full:
        stirling = target * target.log() - target + 0.5 * (2 * math.pi * target).log()
        losses = losses + stirling.masked_fill(target <= 1, 0)
    return _reduced(t, losses, reduction)


@composed(functional.gaussian_nll_loss)
def gaussian_nll_loss(
    t: Trace,
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """(log(v) + (x - z)²/v)/2, v not below eps; its gradient ignores that bound."""
    shape = t.lift(input).shape
    negative = argument_error(t, "var has negative entry/entries")
    if reduction not in ("none", "mean", "sum"):
        raise argument_error(t, f"{reduction} is not valid")
    if not isinstance(var, Tensor):
        if var < 0:
            raise negative
        var = var * torch.ones_like(input)
    else:
        size = t.lift(var).shape
        differ = sum(a != b for a, b in zip(shape, size, strict=False))
        thin = size != shape and size == shape[:-1]
        if size != shape and not thin and (len(size) != len(shape) or differ != 1):
            raise argument_error(t, "var is of incorrect size")
        between(t, var, 0.0, math.inf, negative)
        var = var.unsqueeze(-1) if thin else var
    var = var.clone()
    with torch.no_grad():
        var.clamp_(min=eps)
    losses = 0.5 * (var.log() + (input - target) ** 2 / var)
    if full:
        losses = losses + 0.5 * math.log(2 * math.pi)
    return reduced(t, losses, reduction)
