"""Functions that only call others: torch's own Python run as it is written, and `composed` rules.

Under a mode that intercepts, a Python function of torch hands itself over. Its body is run once
more, under the trace, told that nobody intercepts; so the functions that it calls arrive by
themselves. What torch composes in C++ is written here in the same way, in torch's functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import FunctionType, MappingProxyType

import torch

from tracejit.capture.trace import autocast
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.trace import Trace


def _nobody(*args: object) -> bool:
    """Whether somebody intercepts a call."""
    return False


class _Shadow:
    """A module with other values for some names."""

    def __init__(self, module: object, **instead: object):
        self.__dict__.update(instead)
        self._module = module

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)


_ASKED = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_NOBODY = dict.fromkeys(_ASKED, _nobody)
_INSTEAD = _NOBODY | {
    "torch": _Shadow(torch, overrides=_Shadow(torch.overrides, **_NOBODY)),
    "_sym_int": int,  # sizes are plain
}


def composite(function: FunctionType) -> None:
    """Register the body of a function as its rule."""

    @rule(function)
    def run(t: Trace, *args: object, **kwargs: object) -> object:
        return run_body(t, function, args, kwargs)


def composed(*functions: Callable, kernel: bool = False) -> Callable[[Callable], Callable]:
    """Register a rule that is written in torch's functions: body(trace, *arguments).

    It may call rules as well. Errors that it raises itself are of the call of the user's. What
    torch composes too is cast inside by autocast; of a `kernel` torch has an own one, without.
    """

    def register(body: Callable) -> Callable:
        rule(*functions)(in_torch(body, kernel=kernel))
        return body

    return register


def in_torch(body: Callable, *, kernel: bool = False) -> Callable:
    """The rule that a function of torch's functions, body(trace, *arguments), makes."""

    @wraps(body)
    def run(t: Trace, *args: object, **kwargs: object) -> object:
        with _inside(t, kernel=kernel):
            return body(t, *args, **kwargs)

    return run


@contextmanager
def _inside(t: Trace, *, kernel: bool = False) -> Iterator[None]:
    """Calls of torch's functions arrive. Where autocast has cast the arguments of the one that is
    running, or in a kernel of torch's, it casts nothing inside."""
    off = [d for d, listed in autocast.POLICIES.items() if kernel or t.calling in listed]
    off = [d for d in off if torch.is_autocast_enabled(d)]
    for device in off:
        torch.set_autocast_enabled(device, False)
    try:
        with t.user_code(grad=t.grad_on):
            yield
    finally:
        for device in off:
            torch.set_autocast_enabled(device, True)


def run_body(
    t: Trace,
    function: FunctionType,
    args: tuple,
    kwargs: Mapping[str, object],
    instead: Mapping[str, object] = MappingProxyType({}),
) -> object:
    """Run the body of a function under the trace, with other values for some global names."""
    namespace = {**function.__globals__, **_INSTEAD, **instead}
    body = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__)
    body.__kwdefaults__ = function.__kwdefaults__
    with _inside(t):
        return body(*args, **kwargs)


_COMPOSITES: tuple[Callable, ...] = (
    torch.functional.block_diag,
    torch.functional.cartesian_prod,
    torch.functional.cdist,
    torch.functional.chain_matmul,
    torch.functional.tensordot,
    torch.functional.unravel_index,
    torch.nn.functional.affine_grid,
    torch.nn.functional.cosine_embedding_loss,
    torch.nn.functional.fold,
    torch.nn.functional.grid_sample,
    torch.nn.functional.gumbel_softmax,
    torch.nn.functional.hinge_embedding_loss,
    torch.nn.functional.interpolate,
    torch.nn.functional.local_response_norm,
    torch.nn.functional.lp_pool1d,
    torch.nn.functional.lp_pool2d,
    torch.nn.functional.lp_pool3d,
    torch.nn.functional.margin_ranking_loss,
    torch.nn.functional.max_unpool1d,
    torch.nn.functional.max_unpool2d,
    torch.nn.functional.max_unpool3d,
    torch.nn.functional.multi_margin_loss,
    torch.nn.functional.multilabel_margin_loss,
    torch.nn.functional.multilabel_soft_margin_loss,
    torch.nn.functional.poisson_nll_loss,
    torch.nn.functional.triplet_margin_loss,
    torch.nn.functional.triplet_margin_with_distance_loss,
    torch.nn.functional.unfold,
    torch.nn.init.constant_,
    torch.nn.init.kaiming_uniform_,
    torch.nn.init.normal_,
    torch.nn.init.uniform_,
    torch.pca_lowrank,
    torch.svd_lowrank,
)
for _function in _COMPOSITES:
    composite(_function)
