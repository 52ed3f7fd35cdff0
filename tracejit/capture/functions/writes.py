"""What overwrites a whole tensor: copy_, fill_, zero_."""

from __future__ import annotations

import torch

from tracejit.capture.functions.common import (
    check_range,
    common_shape,
    literal,
    moved,
    operand,
    operands_as,
)
from tracejit.capture.trace.overlaps import check_copy
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.trace import Trace

Tensor = torch.Tensor


@rule(Tensor.copy_)
def copy_(t: Trace, self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(src, Tensor):
        return fill_(t, self, src)
    into, source = t.lift(self), t.lift(src)
    if into.device != source.device:
        src = moved(t, source, into.device)
        source = src.handle
    if common_shape(t, (operand(t, self), operand(t, src))) != into.shape:
        raise t.shape_error(
            f"output with shape {list(into.shape)} doesn't match the shape {list(source.shape)}"
        )
    mine, its = ((h.storage, h.offset, h.shape, h.strides) for h in (into, source))
    if mine == its and 0 in into.strides:  # an expanded tensor may be copied to itself only
        return self
    check_copy(t, into, source)
    (value,) = operands_as(t, (operand(t, src),), into.dtype, into.shape)
    new = t.b.alias(value)
    if t.grad_on and t.requires_grad(into):
        new = t.unread(new, t.read(into))
    t.write(into, new)
    return self


@rule(Tensor.fill_)
def fill_(t: Trace, self: Tensor, value: object) -> Tensor:
    into = t.lift(self)
    x = operand(t, value)
    if x.handle is not None:
        if x.handle.shape:
            raise t.shape_error("fill_ only supports a 0-dimensional value tensor")
        return copy_(t, self, value)
    check_range(t, x.number, into.dtype)
    filled = literal(x.number, into.dtype)
    t.write(into, t.b.full(filled, shape=into.shape, dtype=into.dtype, device=into.device))
    return self


@rule(Tensor.zero_, torch.zero_)
def zero_(t: Trace, self: Tensor) -> Tensor:
    h = t.lift(self)
    if any(st == 0 and n > 1 for st, n in zip(h.strides, h.shape, strict=True)):
        raise t.unsupported("Write to the tensor that was expanded")
    return fill_(t, self, 0)
