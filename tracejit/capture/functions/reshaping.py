"""In-place views, `t_`, `squeeze_`, …: the tensor object lies otherwise in the same memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

from tracejit.capture.functions.movement import squeeze, t_, transpose, unsqueeze
from tracejit.capture.functions.strided import as_strided
from tracejit.capture.trace.rejections import check_differentiable_write
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.trace import Trace

Tensor = torch.Tensor


def rearranged(view: Callable) -> Callable:
    """The in-place form of a view: the handle becomes what the view is. Other views stay as they
    are; autograd counts a write."""

    @wraps(view)
    def body(t: Trace, self: Tensor, *args: object, **kwargs: object) -> Tensor:
        h = t.lift(self)
        if h.is_real:
            raise t.unsupported(
                "It would change the shape of a tensor from outside; make a view inside the step, "
                "as in x = x.t()"
            )
        if h in t.retained:
            raise t.unsupported("After retain_grad() it has no rule; use the form that is a view")
        if t.grad_on:
            check_differentiable_write(t, h, t.base(h.family))
        elif t.requires_grad(h):
            raise t.unsupported(
                "Eager's gradient would have another shape than the tensor; do it in grad mode"
            )
        t.rearrange(h, view(t, self, *args, **kwargs).handle)
        return self

    return body


rule(Tensor.t_)(rearranged(t_))
rule(Tensor.transpose_, Tensor.swapaxes_, Tensor.swapdims_)(rearranged(transpose))
rule(Tensor.squeeze_)(rearranged(squeeze))
rule(Tensor.unsqueeze_)(rearranged(unsqueeze))
rule(torch.as_strided_, Tensor.as_strided_)(rearranged(as_strided))
