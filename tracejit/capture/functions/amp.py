"""What `torch.amp.GradScaler` calls: gradients unscaled and looked through, the scale renewed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tracejit.capture.functions.common import by_rule
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.trace import Trace

Tensor = torch.Tensor


@rule(torch._amp_foreach_non_finite_check_and_unscale_)
def unscale(t: Trace, self: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """Multiply gradients by `inv_scale`; `found_inf` becomes 1 if any element is not finite."""
    for grad in self:
        finite = by_rule(t, torch.all, by_rule(t, torch.isfinite, grad))
        found = by_rule(t, torch.where, finite, found_inf, 1.0)
        by_rule(t, Tensor.copy_, found_inf, found)
        by_rule(t, Tensor.mul_, grad, inv_scale)


@rule(torch._amp_update_scale_)
def update_scale(
    t: Trace,
    self: Tensor,
    growth_tracker: Tensor,
    found_inf: Tensor,
    scale_growth_factor: float,
    scale_backoff_factor: float,
    growth_interval: int,
) -> Tensor:
    """A smaller scale after a gradient that was not finite, a larger one after `growth_interval`
    calls without."""
    failed = by_rule(t, torch.ne, found_inf, 0.0)
    count = by_rule(t, torch.add, growth_tracker, 1)
    due = by_rule(t, torch.eq, count, growth_interval)
    larger = by_rule(t, torch.mul, self, scale_growth_factor)
    grows = by_rule(t, torch.logical_and, due, by_rule(t, torch.isfinite, larger))
    kept = by_rule(t, torch.where, grows, larger, self)
    smaller = by_rule(t, torch.mul, self, scale_backoff_factor)
    restart = by_rule(t, torch.logical_or, failed, due)
    by_rule(t, Tensor.copy_, growth_tracker, by_rule(t, torch.where, restart, 0, count))
    by_rule(t, Tensor.copy_, self, by_rule(t, torch.where, failed, smaller, kept))
    return self
