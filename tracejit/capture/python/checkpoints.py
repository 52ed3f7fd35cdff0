"""What stands for `torch.utils.checkpoint` while a step is traced: the function runs once.

See `functions/checkpointing.py`, which refuses functions that may not run once only. Selective
checkpointing asks of each of torch's operations whether its result is kept; here all products of
matrices are, which is what people have it for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch.overrides import handle_torch_function
from torch.utils import checkpoint as torch_checkpoint

from tracejit.capture.python import profiler
from tracejit.capture.python.twice import Run
from tracejit.capture.trace.active import current
from tracejit.capture.trace.trace import Trace

Tensor = torch.Tensor
# contexts whose part in the backward is only to choose what is kept
_OF_TORCH = (
    nullcontext,
    torch_checkpoint._CachingTorchDispatchMode,
    torch_checkpoint._CachedTorchDispatchMode,
)


class _Region:
    """What runs within is checkpointed: two calls of a rule say so, for later traces too."""

    def __init__(self, preserve: bool, products: bool = False) -> None:
        self._said, self._run = (bool(preserve), products), Run()
        self._profile = profiler.profiled(self._run.profile) if profiler.is_free() else None

    def __enter__(self) -> None:
        handle_torch_function(torch_checkpoint.checkpoint, (), "begin", *self._said)
        if self._profile is not None:
            self._profile.__enter__()

    def __exit__(self, kind: type | None, *error: object) -> None:
        effect = "or may: a profiler is on"
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            effect = self._run.effect()
        which = "end" if kind is None else "left"
        handle_torch_function(torch_checkpoint.checkpoint, (), which, *self._said, effect)


def without_reentrant(original: Callable) -> Callable:
    """`torch.utils.checkpoint._checkpoint_without_reentrant_generator`, within which a function
    runs."""

    def generator(
        function: Callable,
        preserve: bool = True,
        context_fn: Callable = torch_checkpoint.noop_context_fn,
        determinism_check: str = torch_checkpoint._DEFAULT_DETERMINISM_MODE,
        debug: bool = False,
        early_stop: bool = True,
        *args: object,
        **kwargs: object,
    ) -> Iterator[None]:
        t = current()
        if t is None:
            given = preserve, context_fn, determinism_check, debug, early_stop
            yield from original(function, *given, *args, **kwargs)
            return
        known = torch_checkpoint._allowed_determinism_checks_to_fns
        if determinism_check not in known:
            raise ValueError(
                f"determinism_check should be one of {[*known]}, but got {determinism_check}"
            )
        forward, again = context_fn()
        if not isinstance(forward, _OF_TORCH) or not isinstance(again, _OF_TORCH):
            t.begin(torch_checkpoint.checkpoint, ())
            raise t.unsupported(
                "A context_fn of its own would not be entered in the backward; leave it out"
            )
        with _Region(preserve, not isinstance(forward, nullcontext)):
            yield

    return generator


def reentrant(t: Trace, function: Callable, preserve: bool, *args: object) -> object:
    """`checkpoint(…, use_reentrant=True)`: differentiated only if a tensor that is given is."""
    needed = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in args
    )
    with torch.set_grad_enabled(needed), _Region(preserve):
        out = function(*args)
    for x in out if isinstance(out, tuple) else (out,):
        given = isinstance(x, Tensor) and any(x is y for y in args)
        without = isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad
        if needed and (given or without):
            t.begin(torch_checkpoint.checkpoint, ())
            raise t.unsupported(
                "A result of it has no history, or is what was given, and eager would make it "
                "require grad; use use_reentrant=False"
            )
    return out
