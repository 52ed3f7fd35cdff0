"""What `torch.amp.GradScaler` calls: gradients unscaled and looked through, the scale renewed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tracejit.capture.trace.table import RULES, rule
from tracejit.capture.trace.trace import Trace

Tensor = torch.Tensor


def _call(t: Trace, function: Callable, *args: object) -> Tensor:
    """What a torch function returns, by its rule."""
    return RULES[function].run(t, *args)


@rule(torch._amp_foreach_non_finite_check_and_unscale_)
def unscale(t: Trace, self: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """Multiply gradients by `inv_scale`; `found_inf` becomes 1 if any element is not finite."""
    with t.untaped():
        for grad in self:
            finite = _call(t, torch.all, _call(t, torch.isfinite, grad))
            found = _call(t, torch.where, finite, found_inf, 1.0)
            _call(t, Tensor.copy_, found_inf, found)
            _call(t, Tensor.mul_, grad, inv_scale)


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
    with t.untaped():
        failed = _call(t, torch.ne, found_inf, 0.0)
        count = _call(t, torch.add, growth_tracker, 1)
        due = _call(t, torch.eq, count, growth_interval)
        larger = _call(t, torch.mul, self, scale_growth_factor)
        grows = _call(t, torch.logical_and, due, _call(t, torch.isfinite, larger))
        kept = _call(t, torch.where, grows, larger, self)
        smaller = _call(t, torch.mul, self, scale_backoff_factor)
        restart = _call(t, torch.logical_or, failed, due)
        _call(t, Tensor.copy_, growth_tracker, _call(t, torch.where, restart, 0, count))
        _call(t, Tensor.copy_, self, _call(t, torch.where, failed, smaller, kept))
    return self
