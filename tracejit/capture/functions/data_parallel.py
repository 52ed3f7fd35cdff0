"""DistributedDataParallel inside a step: gradients averaged over the ranks, in buckets.

A forward pass of such a module arms it (`python/data_parallel.py` makes the call). The backward
that has computed the gradients of all its parameters then reduces them: each bucket is an
all_reduce of several gradients, which the schedule starts as soon as the last of them is written.
Buckets hold gradients in the order in which they come, up to the sizes that the module was given,
as eager's do from its second step on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as distributed

from tracejit.capture.functions.collectives import communicate, group_of, receive
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Handle
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value

Tensor = torch.Tensor
WRAPPER = torch.nn.parallel.DistributedDataParallel


@dataclass(eq=False, slots=True)
class Armed:
    """A module whose next backward averages its gradients. `unused`: parameters may get none."""

    parameters: Sequence[Handle]
    group: object
    first: int  # bytes of the first bucket, of each other one
    other: int
    unused: bool
    names: Sequence[str]
    ready: dict[Handle, None] = field(default_factory=dict)  # have a gradient, in order


@rule(WRAPPER.forward)
def arm(
    t: Trace,
    parameters: Sequence[Tensor],
    group: object,
    first: int,
    other: int,
    unused: bool,
    names: str,
) -> None:
    """The forward pass of a module is over; its gradients are to be averaged."""
    handles = [t.lift(p) for p in parameters]
    t.armed[:] = [a for a in t.armed if a.parameters != handles]
    t.armed.append(Armed(handles, group, first, other, unused, names.split(" ")))


if distributed.is_available():

    @rule(distributed._broadcast_coalesced)
    def broadcast_coalesced(
        t: Trace, group: object, tensors: Sequence[Tensor], size: int, root: int = 0
    ) -> None:
        """Take tensors as one rank has them, those of a dtype together."""
        group = group_of(group)
        handles = [t.lift(x) for x in tensors]
        for kind in dict.fromkeys((h.dtype, h.device) for h in handles):
            mine = [h for h in handles if (h.dtype, h.device) == kind]
            flat = communicate(t, "broadcast", group, [t.read(h) for h in mine], root=root)
            for h, value in zip(mine, parts_of(t, flat, mine), strict=True):
                receive(t, h, value)
                h.version.count -= 1  # eager hides it from autograd


def parts_of(t: Trace, flat: Value, handles: Sequence[Handle]) -> list[Value]:
    """What a flat value holds for tensors that lie in it one after another."""
    found, at = [], 0
    with t.untaped(), t.unchecked():
        for h in handles:
            part = flat
            if flat.type.shape != (h.numel,):
                part = t.b.slice(flat, starts=(at,), stops=(at + h.numel,), steps=(1,))
            found.append(t.b.reshape(part, shape=h.shape))
            at += h.numel
    return found


def came(t: Trace, leaves: Sequence[Handle]) -> None:
    """A backward has accumulated the gradients of leaves: average those that are complete."""
    reached = {h for h in leaves if h.grad is not None}
    for armed in tuple(t.armed):
        mine = [h for h in armed.parameters if h in reached]
        if not mine:
            continue
        twice = [h for h in mine if h in armed.ready]
        if twice:
            raise t.autograd_error(
                "Expected to mark a variable ready only once: two backwards reach the parameter "
                f"{_named(armed, twice)} after one forward pass of DistributedDataParallel; call "
                "backward once, or the first ones under no_sync()"
            )
        order = {h: t.read(t.lift(h.grad)).id for h in mine}
        armed.ready.update(dict.fromkeys(sorted(mine, key=order.__getitem__)))
        if armed.unused or len(armed.ready) == len(armed.parameters):
            t.armed.remove(armed)
            _average(t, armed)


def check_over(t: Trace, leaves: bool) -> None:
    """At the end of a trace no average may be left to be done. `leaves`: a backward may follow."""
    for armed in t.armed:
        missing = [h for h in armed.parameters if h not in armed.ready]
        if armed.ready and missing:
            raise t.autograd_error(
                "Expected to have finished reduction in the prior iteration before starting a new "
                f"one: the parameters {_named(armed, missing)} of a DistributedDataParallel got no "
                "gradient; pass find_unused_parameters=True, or use all of them in the loss"
            )
        if leaves:
            t.called(WRAPPER.forward, ())
            raise t.unsupported(
                "A result with history leaves the step, and its backward would not average the "
                "gradients; call backward inside the step, or run the forward pass under no_grad"
            )


def _named(armed: Armed, some: Sequence[Handle]) -> str:
    names = dict(zip(armed.parameters, armed.names, strict=True))
    return ", ".join(names[h] for h in some)


def _average(t: Trace, armed: Armed) -> None:
    ranks = armed.group.size()
    number = {h: i for i, h in enumerate(armed.parameters)}
    with torch.no_grad():
        for bucket in _buckets(armed):
            grads = [t.lift(h.grad) for h in bucket]
            with t.untaped(), t.unchecked():
                scaled = [t.b.mul(t.read(g), 1.0 / ranks) for g in grads]
            which = ",".join(str(number[h]) for h in bucket)
            flat = communicate(t, "all_reduce", armed.group, scaled, by="SUM", of=which)
            for g, value in zip(grads, parts_of(t, flat, grads), strict=True):
                receive(t, g, value)


def _buckets(armed: Armed) -> list[list[Handle]]:
    """Gradients that are reduced together: of one dtype and device, a bucket being full when it has
    reached its size."""
    found: list[list[Handle]] = []
    open_: dict[tuple, tuple[list[Handle], int]] = {}
    limit = armed.first
    for h in armed.ready:
        kind = h.dtype, h.device
        bucket, size = open_.get(kind, ([], 0))
        if not bucket:
            found.append(bucket)
        bucket.append(h)
        size += h.numel * h.dtype.itemsize
        if size >= limit:
            open_.pop(kind, None)
            limit = armed.other
        else:
            open_[kind] = bucket, size
    return found
