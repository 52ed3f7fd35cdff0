"""Dropout in all its forms: of elements, of whole channels, and alpha dropout.

The mask is drawn where eager draws it; what eager does with it is repeated, rounding by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from tracejit.capture.functions.common import cast
from tracejit.capture.functions.derived import argument_error
from tracejit.capture.functions.movement import preserved_strides, squeeze, unsqueeze
from tracejit.capture.functions.sampling import drawn, sampled, sampling
from tracejit.capture.trace.scalars import is_runtime
from tracejit.capture.trace.table import RULES, rule
from tracejit.capture.trace.tensor import Handle
from tracejit.capture.trace.trace import Trace
from tracejit.ir.types import Type, b1, f32, f64

Tensor = torch.Tensor
functional = torch.nn.functional
_ALPHA = 1.7580993408473766  # of SELU: its least value, negated


def _mask(t: Trace, h: Handle, p: float, *, feature: bool) -> Tensor:
    """Ones with probability p and zeros, of a tensor's dtype: one per element, or per channel."""
    if not feature:
        strides = preserved_strides(h)
        value = drawn(t, "bernoulli_", Type(b1, h.shape, h.device), strides, p=p)
        return t.fresh(cast(t, value, h.dtype), strides)
    if len(h.shape) < 2:
        raise t.shape_error("Feature dropout requires at least 2 dimensions in the input")
    shape = (*h.shape[:2], *(1,) * (len(h.shape) - 2))
    return t.fresh(cast(t, drawn(t, "bernoulli_", Type(b1, shape, h.device), p=p), h.dtype))


def scaled(t: Trace, mask: Tensor, keep: float) -> Tensor:
    """The mask divided by the probability that an element is kept."""
    h = t.lift(mask)
    if is_runtime(keep) or h.dtype not in (f32, f64):
        return RULES[Tensor.div].run(t, mask, keep)
    with np.errstate(divide="ignore"):
        scale = float(np.divide(1, keep, dtype=h.dtype.compute))
    return t.fresh(t.b.mul(t.read(h), scale), h.strides)


def dropout(
    t: Trace,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    feature: bool = False,
    alpha: bool = False,
) -> Tensor:
    """The input with some elements zeroed and the others scaled."""
    if not 0 <= p <= 1:
        raise argument_error(t, f"dropout probability has to be between 0 and 1, but got {p}")
    h = t.lift(input)
    if not training or p == 0 or not h.numel:
        return input
    multiply = RULES[Tensor.mul_ if inplace else Tensor.mul].run
    if p == 1:
        return multiply(t, input, 0.0 if h.dtype.is_float else 0)
    if not h.dtype.is_float:
        raise t.unsupported("Dropout of integers has no rule")
    with t.untaped():
        mask = _mask(t, h, 1 - p, feature=feature)
        if not alpha:
            noise = scaled(t, mask, 1 - p)
        else:
            a = 1.0 / math.sqrt((_ALPHA * _ALPHA * p + 1) * (1 - p))
            add, mul = RULES[Tensor.add].run, RULES[Tensor.mul].run
            shift = add(t, mul(t, add(t, mask, -1), _ALPHA * a), _ALPHA * a * p)
            noise = mul(t, mask, a)
    out = multiply(t, input, noise)
    return RULES[Tensor.add_].run(t, out, shift) if alpha else out


def _by_name(functions: tuple[Callable, ...], *, inplace: bool = False, **kind: bool) -> None:
    """The rule of torch's own functions: (input, p, train)."""

    @rule(*functions)
    def of_torch(t: Trace, input: Tensor, p: float, train: bool) -> Tensor:
        if not 0 <= p <= 1:
            raise t.shape_error(f"dropout probability has to be between 0 and 1, but got {p}")
        return dropout(t, input, p, train, inplace, **kind)


for _kind in ({}, {"alpha": True}, {"feature": True}, {"feature": True, "alpha": True}):
    _name = "".join(f"{k}_" for k in _kind) + "dropout"
    _by_name((getattr(torch, _name),), **_kind)
    _by_name((getattr(torch, f"{_name}_"),), inplace=True, **_kind)

rule(functional.dropout)(dropout)


def _off(**kind: bool) -> Callable:
    """Alpha dropout, which is off unless asked for."""

    def off(
        t: Trace, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        return dropout(t, input, p, training, inplace, alpha=True, **kind)

    return off


rule(functional.alpha_dropout)(_off())
rule(functional.feature_alpha_dropout)(_off(feature=True))


def _of_batches(rank: int, name: str, *, strict: bool) -> Callable:
    """Dropout of whole channels: without a batch axis, one is put in front and taken away again."""

    def of_batch(
        t: Trace, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        axes = len(t.lift(input).shape)
        if strict and axes not in (rank - 1, rank):
            raise t.shape_error(f"{name}: Expected {rank - 1}D or {rank}D input")
        if axes == rank or name == "dropout2d":
            return dropout(t, input, p, training, inplace, feature=True)
        batch = dropout(t, unsqueeze(t, input, 0), p, training, inplace, feature=True)
        return input if inplace else squeeze(t, batch, 0)

    return of_batch


rule(functional.dropout1d)(_of_batches(3, "dropout1d", strict=True))
rule(functional.dropout2d)(_of_batches(4, "dropout2d", strict=False))
rule(functional.dropout3d)(_of_batches(5, "dropout3d", strict=False))


# --- rrelu ---------------------------------------------------------------------------------------


def rrelu(
    t: Trace,
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Leaky ReLU whose slope is drawn for each element that is not positive."""
    if not training:
        leaky = functional.leaky_relu
        return RULES[leaky].run(t, input, (lower + upper) / 2, inplace)
    h = t.lift(input)
    if h.dtype.narrow:  # eager's product is of the slope before it is rounded
        raise t.unsupported("rrelu of bf16 and f16 has no rule in training")
    with t.untaped():
        found = sampled(t, input, h.shape, sampling(t, h, "rrelu", generator, lower, upper))
        slopes = t.fresh(found)
    if inplace:
        return RULES[Tensor.mul_].run(t, input, slopes)
    return RULES[Tensor.contiguous].run(t, RULES[Tensor.mul].run(t, input, slopes))


def _of_torch(*, inplace: bool) -> Callable:
    """The signature of torch.rrelu."""

    def of_torch(
        t: Trace,
        input: Tensor,
        lower: float = 1.0 / 8,
        upper: float = 1.0 / 3,
        training: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return rrelu(t, input, lower, upper, training, inplace, generator)

    return of_torch


rule(functional.rrelu)(rrelu)
rule(torch.rrelu)(_of_torch(inplace=False))
rule(torch.rrelu_)(_of_torch(inplace=True))
