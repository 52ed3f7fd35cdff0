"""DistributedDataParallel inside a step: gradients averaged over the ranks, in buckets.

A forward pass of such a module arms it (`python/data_parallel.py` makes the call). The backward
that has computed the gradients of all its parameters then reduces them: each bucket is an
all_reduce of several gradients, which the schedule starts as soon as the last of them is written.
Buckets hold gradients in the order in which they come, up to the sizes that the module was given,
as eager's do from its second step on.

Where a module may leave parameters out, and others in each call, the ranks ask each other which
they use (`Uses`). What one rank uses all of them get the average for, and what none does is left
alone. The answer is a part of the step: another one leads to another plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import ClassVar

import torch
import torch.distributed as distributed

from tracejit.capture.functions.collectives import communicate, group_of, receive
from tracejit.capture.trace.cuts import searched
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Handle, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir import exchange, process_groups
from tracejit.ir.graph import Value
from tracejit.ir.types import f32, f64
from tracejit.records import dataclass

Tensor = torch.Tensor
WRAPPER = torch.nn.parallel.DistributedDataParallel


@dataclass(eq=False, slots=True)
class Armed:
    """A module whose next backward averages its gradients. `unused`: which parameters may get none:
    "none", a "static" choice, the same on all ranks, or what may "vary"."""

    parameters: Sequence[Handle]
    group: object
    first: int  # bytes of the first bucket, of each other one
    other: int
    unused: str
    names: Sequence[str]
    join: str  # under which kind of `join()`
    by_all: (
        bool  # gradients are divided by how many ranks there are, whether they have joined or not
    )
    ready: dict[Handle, None] = field(default_factory=dict)  # have a gradient, in order


@rule(WRAPPER.forward)
def arm(
    t: Trace,
    parameters: Sequence[Tensor],
    group: object,
    first: int,
    other: int,
    unused: str,
    names: str,
    join: str,
) -> None:
    """The forward pass of a module is over; its gradients are to be averaged."""
    handles = [t.lift(p) for p in parameters]
    t.armed[:] = [a for a in t.armed if a.parameters != handles]
    join, _, by_all = join.rpartition(" ")
    sizes = first, other
    t.armed.append(Armed(handles, group, *sizes, unused, names.split(" "), join, by_all != "0"))


if distributed.is_available():
    from torch.distributed.algorithms.join import Join

    @rule(Join.notify_join_context)
    def notify(t: Trace, group: object, like: Tensor | None, throws: bool) -> None:
        """A module is called under `join()`. Nothing reads this count, so it is a part of what a
        call runs last: ranks that have joined know by it when that is."""
        if group not in t.joins:
            mark = process_groups.THROWS if throws else process_groups.JOINS
            device = "cpu" if like is None else t.lift(like).device
            t.joins[group] = None
            _active(t, group, mark, device)

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


def _active(t: Trace, group: object, mark: str, device: str) -> Value:
    """How many ranks have not joined."""
    with t.untaped(), t.unchecked():
        one = t.b.full(1.0, shape=(1,), dtype=f32, device=device)
    return communicate(t, "all_reduce", group, [one], by="SUM", of=mark)


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


@dataclass(frozen=True, slots=True)
class Uses:
    """The search for which parameters the ranks use, the `number`-th of a trace: it finds as many
    elements as the answer's number among all answers that this process has got. What it is given
    says nothing."""

    group: str
    mine: str
    number: int
    join: str  # under which kind of `join()`
    device: str
    remedy: ClassVar[str] = (
        "Each choice of parameters that the ranks use together is a plan of its own: let all of "
        "them use all parameters, or average the gradients by torch.distributed.all_reduce"
    )

    def __call__(self, value: torch.Tensor) -> tuple[torch.Tensor]:
        """As many elements."""
        group = process_groups.group_named(self.group)
        if self.join:
            throws = self.join == process_groups.THROWS
            exchange.announce(group, process_groups.place(self.device), throws=throws)
        answer = exchange.used(group, "the step", self.mine, self.number)
        if answer not in _ANSWERS:
            _ANSWERS.append(answer)
        return (torch.empty(_ANSWERS.index(answer), dtype=torch.bool),)


_ANSWERS: list[str] = []  # their numbers are this process's own


def _used(t: Trace, armed: Armed) -> str:
    """For each parameter "1" if all ranks use it in this call, "x" if some do, "0" if none does."""
    mine = "".join("1" if _is_used(t, armed, h) else "0" for h in armed.parameters)
    if armed.group.size() == 1:
        return mine
    number = sum(isinstance(search, Uses) for _, search in t.searched)
    device = armed.parameters[0].device
    search = Uses(process_groups.name_of(armed.group), mine, number, armed.join, device)
    with t.untaped(), t.unchecked():
        nothing = t.b.full(0.0, shape=(1,), dtype=f32, device=device)
    searched(t, nothing, search)
    return _ANSWERS[t.cuts[-1].count]


def _is_used(t: Trace, armed: Armed, h: Handle) -> bool:
    """Whether a gradient of a parameter came in this step, also from a backward before."""
    if h in armed.ready or not h.grad_known or h.grad is None:
        return h in armed.ready
    return type(h.grad) is TracedTensor or t.lift(h.grad).storage.writes > 0


def came(
    t: Trace, leaves: Sequence[Handle], accumulate: Callable[[Trace, Handle, Value], None]
) -> None:
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
        if armed.unused != "none" or len(armed.ready) == len(armed.parameters):
            t.armed.remove(armed)
            if armed.unused == "vary":
                _complete(t, armed, accumulate)
            _average(t, armed)


def _complete(t: Trace, armed: Armed, accumulate: Callable[[Trace, Handle, Value], None]) -> None:
    """Give a gradient to what other ranks use. Gradients come in another order on each of them
    then: that of the parameters, from the last one, is the same on all."""
    used = _used(t, armed)
    if used.strip("01") == "" and used.count("1") == len(armed.ready):
        return
    wanted = [h for h, who in zip(armed.parameters, used, strict=True) if who != "0"]
    for h in wanted:
        if h not in armed.ready:
            with t.untaped(), t.unchecked():
                nothing = t.b.full(0.0, shape=h.shape, dtype=h.dtype, device=h.device)
                accumulate(t, h, nothing)
    armed.ready = dict.fromkeys(reversed(wanted))


def check_over(t: Trace, leaves: bool) -> None:
    """At the end of a trace no average may be left to be done. `leaves`: a backward may follow."""
    if any(m.find_unused_parameters and not m.static_graph for m in t.unsynced):
        t.called(WRAPPER.forward, ())
        raise t.unsupported(
            "Gradients are accumulated under no_sync() of a DistributedDataParallel with "
            "find_unused_parameters, and averaged by a later call, which cannot know what has a "
            "part in them; accumulate and average in one call of the step"
        )
    if t.joins and t.alone and not (t.shards and len(t.alone) == t.collectives - t.alone[0]):
        t.called(WRAPPER.forward, ())
        raise t.unsupported(
            "Under join() a rank that has no more inputs does for the others what modules and "
            "optimizers under it communicate, and no more: make other collectives outside of it, "
            "and call optimizers under it last"
        )
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
    if not armed.by_all and t.joins[armed.group] is None:
        device = armed.parameters[0].device
        t.joins[armed.group] = _active(t, armed.group, armed.join, device)
    with torch.no_grad():
        for bucket in _buckets(armed):
            grads = [t.lift(h.grad) for h in bucket]
            with t.untaped(), t.unchecked():
                if armed.by_all:
                    scaled = [t.b.mul(t.read(g), 1.0 / ranks) for g in grads]
                else:
                    scaled = [_shared(t, t.read(g), t.joins[armed.group]) for g in grads]
            which = ",".join(str(number[h]) for h in bucket)
            which = f"{which},{armed.join}" if armed.join else which
            flat = communicate(t, "all_reduce", armed.group, scaled, by="SUM", of=which)
            for g, value in zip(grads, parts_of(t, flat, grads), strict=True):
                receive(t, g, value)


def _shared(t: Trace, grad: Value, count: Value) -> Value:
    """A gradient divided by how many ranks have not joined."""
    kind = grad.type.dtype
    wide = f64 if kind is f64 else f32
    factor = t.b.div(1.0, t.b.cast(count, dtype=wide) if wide is f64 else count)
    factor = t.b.reshape(factor, shape=(1,) * len(grad.type.shape))
    factor = t.b.expand(factor, shape=grad.type.shape)
    if kind is wide:
        return t.b.mul(grad, factor)
    return t.b.cast(t.b.mul(t.b.cast(grad, dtype=wide), factor), dtype=kind)


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
