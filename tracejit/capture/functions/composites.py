"""Functions of torch's own Python that reach a trace as one call, and are run as they are written.

Under a mode that intercepts, such a function hands itself over. Its body is run once more, under
the trace, told that nobody intercepts; so the functions that it calls arrive by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType, MappingProxyType

import torch

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
    with t.user_code(grad=torch.is_grad_enabled()):
        return body(*args, **kwargs)


_COMPOSITES: tuple[Callable, ...] = (
    torch.nn.functional.affine_grid,
    torch.nn.functional.fold,
    torch.nn.functional.grid_sample,
    torch.nn.functional.gumbel_softmax,
    torch.nn.functional.interpolate,
    torch.nn.functional.local_response_norm,
    torch.nn.functional.lp_pool1d,
    torch.nn.functional.lp_pool2d,
    torch.nn.functional.lp_pool3d,
    torch.nn.functional.max_unpool1d,
    torch.nn.functional.max_unpool2d,
    torch.nn.functional.max_unpool3d,
    torch.nn.functional.unfold,
    torch.nn.init.constant_,
    torch.nn.init.kaiming_uniform_,
    torch.nn.init.normal_,
    torch.nn.init.uniform_,
)
for _function in _COMPOSITES:
    composite(_function)
