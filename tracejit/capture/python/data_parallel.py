"""DistributedDataParallel while a step is traced: torch's own Python runs, its reducer does not.

The module's forward reads its settings itself, so guards see them. What it asks of the reducer and
the logger, objects of C, is nothing to do here, but for one thing: that the next backward is to
average the gradients, which becomes a call of a rule.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import handle_torch_function

from tracejit.capture.trace.active import current
from tracejit.capture.trace.trace import Trace
from tracejit.ir.process_groups import JOINS, THROWS, last_active

_AVAILABLE = torch.distributed.is_available()
_running = threading.local()
_forward = DistributedDataParallel.forward
if _AVAILABLE:
    from torch.distributed.algorithms.join import Join


def replacements() -> list[tuple[object, str, Callable]]:
    """(owner, name, a function from the original to its replacement)."""
    if not _AVAILABLE:
        return []
    reducer, logger = torch.distributed.Reducer, torch.distributed.Logger
    return [
        (DistributedDataParallel, "forward", _forwarded),
        (DistributedDataParallel, "_assign_modules_buffers", _assigned),
        (DistributedDataParallel, "_check_sync_bufs_post_fwd", _wrapping),
        (DistributedDataParallel, "_find_common_rank", _common),
        (DistributedDataParallel, "_check_global_requires_backward_grad_sync", _nothing),
        (Join, "notify_join_context", _notified),
        (torch.distributed, "_broadcast_coalesced", _broadcast),
        (torch.autograd, "_unsafe_preserve_version_counter", _preserved),
        (reducer, "prepare_for_forward", _nothing),
        (reducer, "_rebuild_buckets", _nothing),
        (reducer, "prepare_for_backward", _armed),
        (logger, "set_runtime_stats_and_log", _nothing),
    ]


def _nothing(original: Callable) -> Callable:
    """What concerns eager's own reduction alone."""

    def nothing(self: object, *args: object, **kwargs: object) -> object:
        return original(self, *args, **kwargs) if current() is None else False

    return nothing


def _forwarded(original: Callable) -> Callable:
    def forward(self: DistributedDataParallel, *args: object, **kwargs: object) -> object:
        t = current()
        if t is None:
            return original(self, *args, **kwargs)
        _refuse(t, self)
        before = getattr(_running, "module", None)
        _running.module = self
        try:
            returned = original(self, *args, **kwargs)
        finally:
            _running.module, t.wrapping = before, False
        if torch.is_grad_enabled() and not self.require_backward_grad_sync:
            t.unsynced.append(self)
        return returned

    return forward


def _refuse(t: Trace, module: DistributedDataParallel) -> None:
    """Raise for what a plan does not honour."""
    early = any(hasattr(p, "_in_backward_optimizers") for p in _given(module))
    found = {
        "a communication hook": getattr(module, "_comm_hooks", ()),
        "a hook for buffers": hasattr(module, "buffer_hook"),
        "mixed_precision": module.mixed_precision is not None,
        "delay_all_reduce_named_params": module._delay_all_reduce_params,
        "an optimizer in backward": early,
        "torch.compile's reducer": module._use_python_reducer,
    }
    for what, there in found.items():
        if there:
            t.begin(_forward, ())
            raise t.unsupported(
                f"A DistributedDataParallel with {what} has no rule; leave that out, or compile a "
                "step on its `.module` and reduce the gradients by torch.distributed.all_reduce"
            )


def _given(module: DistributedDataParallel) -> list[torch.nn.Parameter]:
    """The parameters whose gradients are averaged."""
    return [p for _, p in _named(module)]


def _named(module: DistributedDataParallel) -> list[tuple[str, torch.nn.Parameter]]:
    ignored = module.parameters_to_ignore
    found = module.module.named_parameters()
    return [(name, p) for name, p in found if p.requires_grad and name not in ignored]


def _armed(original: Callable) -> Callable:
    def prepare_for_backward(self: object, outputs: object) -> None:
        t = current()
        if t is None:
            return original(self, outputs)
        module = _running.module
        t.unsynced[:] = [x for x in t.unsynced if x is not module]
        buckets = module._bucket_config
        named = _named(module)
        unused = "static" if module.static_graph else "none"
        if module.find_unused_parameters and not module.static_graph:
            unused = "vary"
        sizes = buckets.first_bucket_bytes_cap, buckets.bucket_bytes_cap
        names = " ".join(name for name, _ in named)
        parameters = [p for _, p in named]
        config = module._join_config
        join = ""
        if config.enable:
            throws = config.throw_on_early_termination
            join = f"{THROWS if throws else JOINS} {module._divide_by_initial_world_size:d}"
        given = parameters, module.process_group, *sizes, unused, names, join
        return handle_torch_function(_forward, (), *given)

    return prepare_for_backward


def _wrapping(original: Callable) -> Callable:
    """What is asked first once the wrapped module has returned, before torch's own Python looks at
    that."""

    def check_sync_bufs_post_fwd(self: DistributedDataParallel) -> bool:
        if (t := current()) is not None:
            t.wrapping = True
        return original(self)

    return check_sync_bufs_post_fwd


def _notified(original: Callable) -> Callable:
    """`Join.notify_join_context`, by which a rank says that it has not joined."""

    def notify_join_context(joinable: object) -> object:
        t = current()
        if t is None:
            return original(joinable)
        config = joinable._join_config
        if not config.enable:
            return None
        if not isinstance(joinable, DistributedDataParallel):
            t.shards = True  # a ZeroRedundancyOptimizer
            return None
        first = next(iter(_given(joinable)), None)
        throws = config.throw_on_early_termination
        return handle_torch_function(original, (), joinable.process_group, first, throws)

    return notify_join_context


def _common(original: Callable) -> Callable:
    """Which rank's buffers all take: the last one of those that have not joined."""

    def find_common_rank(self: DistributedDataParallel, rank: int, condition: bool) -> int:
        if current() is None:
            return original(self, rank, condition)
        return last_active(throws=self._join_config.throw_on_early_termination)

    return find_common_rank


def _assigned(original: Callable) -> Callable:
    """`_assign_modules_buffers`, which makes a new list each time, where that is another one."""

    def assign(self: DistributedDataParallel) -> None:
        if current() is not None and hasattr(self, "modules_buffers"):
            ignored = self.parameters_to_ignore
            now = [b for name, b in self.module.named_buffers() if name not in ignored]
            known = self.modules_buffers
            if len(now) == len(known) and all(a is b for a, b in zip(now, known, strict=True)):
                return
        original(self)

    return assign


def _preserved(original: Callable) -> Callable:
    """The context in which buffers are written behind autograd's back, as the rule does it."""
    return lambda tensors: original(tensors) if current() is None else nullcontext()


def _broadcast(original: Callable) -> Callable:
    def broadcast_coalesced(group: object, tensors: object, size: int, root: int = 0) -> None:
        if current() is None:
            return original(group, tensors, size, root)
        return handle_torch_function(original, (), group, list(tensors), size, root)

    return broadcast_coalesced
