"""The CTC loss: how likely labels are, whatever the steps at which they and the blanks stand.

Labels with a blank before, between and behind them are the W = 2·S + 1 states of a sequence. A loop
over the steps carries what the paths up to a state weigh (alpha), another one goes back over them
(beta); both are logarithms. Lengths become masks, so that no value of theirs is read.

Source: Graves et al., 2006, equations (6) to (16), with torch's treatment of -inf and its gradient,
which takes log_probs for the result of a log_softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tracejit.capture.functions.arithmetic import div
from tracejit.capture.functions.common import cast, expand
from tracejit.capture.functions.composites import composite
from tracejit.capture.functions.derived import require_float, underived
from tracejit.capture.functions.loss import reduced
from tracejit.capture.functions.patterns import along, constant, position
from tracejit.capture.trace.bounds import require, within
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Handle, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Builder, Graph, Result, Value
from tracejit.ir.ops.movement import part
from tracejit.ir.types import Type, i64
from tracejit.records import dataclass

Tensor = torch.Tensor
Lengths = Tensor | Sequence[int]
_NONE = -math.inf  # the logarithm of no path at all


@dataclass(frozen=True, slots=True)
class _States:
    """The states of a batch of sequences.

    label: [N, W], the class of each, and `known`, whether the sequence has it.
    last:  [N], the state behind the last label.
    scores: [T, N, W], log_probs of the states' classes; -inf where a sequence has no such state.
    alive: [T, N, 1], whether a sequence goes on at a step.
    """

    label: Value
    known: Value
    last: Value
    scores: Value
    alive: Value


composite(torch.nn.functional.ctc_loss)


@rule(torch.ctc_loss)
def ctc_loss(
    t: Trace,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Lengths,
    target_lengths: Lengths,
    blank: int = 0,
    reduction: int = 0,
    zero_infinity: bool = False,
) -> TracedTensor:
    """log_probs [T, N, C] or [T, C]; targets [N, S], or those of all sequences in a row. Called by
    this name torch reduces nothing unless it is asked to. A label that is no class gives NaN."""
    h, z = t.lift(log_probs), t.lift(targets)
    if len(h.shape) not in (2, 3) or not h.numel:
        raise t.shape_error(f"log_probs of 2 or 3 axes expected, not empty, got {list(h.shape)}")
    x = t.read(h)
    require_float(t, "ctc_loss_cpu", x)
    if h.dtype.narrow:
        raise t.not_implemented("ctc_loss_cpu", h.dtype)
    if len(h.shape) == 2:
        x = t.b.reshape(x, shape=(h.shape[0], 1, h.shape[1]))
    steps, batch, classes = x.type.shape
    if not 0 <= blank < classes:
        raise t.shape_error("blank must be in label range")
    if z.device != h.device:
        raise t.unsupported("Put the targets and their lengths on the device of log_probs")
    lasts = _lengths(t, "input_lengths", input_lengths, h, batch, steps)
    width = z.shape[1] if len(z.shape) == 2 else sum(z.shape)
    counts = _lengths(t, "target_lengths", target_lengths, h, batch, width)
    with t.untaped():
        labels = _labels(t, z, target_lengths, counts, steps, batch)
        states = _states(t, x, labels, lasts, counts, blank)
    losses = t.fresh(t.saves(_loss(t, x, states, lasts, zero_infinity), t.read(z)))
    if zero_infinity:
        y = t.read(t.lift(losses))
        losses = t.fresh(t.b.where(t.b.eq(y, math.inf), 0.0, y))
    if reduction == 1:
        with t.untaped():
            each = t.fresh(cast(t, t.b.maximum(counts, 1), h.dtype))
        losses = div(t, losses, each)
    if reduction not in (1, 2) and len(h.shape) == 2:
        return t.fresh(t.b.reshape(t.read(t.lift(losses)), shape=()))
    return reduced(t, losses, {1: "mean", 2: "sum"}.get(reduction, "none"))


# ---- lengths and labels


def _lengths(t: Trace, name: str, given: Lengths, of: Handle, batch: int, most: int) -> Value:
    """Lengths as a value: [N]. Those in a tensor are checked on every call."""
    reason = f"Expected {name} to have values from 0 to {most}, but got value {{value}}"
    if isinstance(given, Tensor):
        h = t.lift(given)
        if h.dtype.kind not in "iu":
            raise t.shape_error(f"{name} must be integral")
        count = h.numel
    else:
        given = [int(n) for n in given]
        count = len(given)
    if count != batch:
        raise t.shape_error(f"{name} must be of size batch_size")
    if not isinstance(given, Tensor):
        for n in given:
            if not 0 <= n <= most:
                raise t.shape_error(reason.format(value=n))
        if len(set(given)) == 1:
            return t.b.full(given[0], shape=(batch,), dtype=i64, device=of.device)
        return constant(t, given, (batch,), i64, of.device)
    if h.device != of.device:
        raise t.unsupported(f"Put {name} on the device of log_probs")
    within(t, given, 0, most + 1, t.shape_error(reason))
    return t.b.reshape(cast(t, t.read(h), i64), shape=(batch,))


def _labels(t: Trace, z: Handle, given: Lengths, counts: Value, steps: int, batch: int) -> Value:
    """The labels of each sequence: [N, S]. What is behind them is anything."""
    b, labels = t.b, cast(t, t.read(z), i64)
    if len(z.shape) == 2:
        if z.shape[0] != batch:
            raise t.shape_error(f"Expected targets of {batch} rows, but got {z.shape[0]}")
        return labels
    if len(z.shape) != 1:
        raise t.shape_error(f"Expected targets of 1 or 2 axes, but got {list(z.shape)}")
    total = z.shape[0]
    reason = f"Expected targets of as many elements as target_lengths say, but got {total}"
    if isinstance(given, Tensor):  # a sequence of more labels than steps has no path
        width = min(total, steps)
        require(t, b.ne(b.reduce_sum(counts, axes=(0,)), total), t.shape_error(reason))
    else:
        width = max(int(n) for n in given)
        if sum(int(n) for n in given) != total:
            raise t.shape_error(reason)
    shape = (batch, width)
    start = b.sub(b.cumsum(counts, axis=0), counts)
    place = b.add(along(t, start, shape, 0), position(t, 1, shape, z.device))
    if not width:
        return place
    found = b.gather(labels, b.reshape(place, shape=(batch * width,)), axis=0)
    return b.reshape(found, shape=shape)


def _states(t: Trace, x: Value, labels: Value, lasts: Value, counts: Value, blank: int) -> _States:
    b, device = t.b, x.type.device
    steps, batch, _ = x.type.shape
    width = labels.type.shape[1]
    shape = (batch, 2 * width + 1)
    if width:
        has = b.lt(position(t, 1, (batch, width), device), along(t, counts, (batch, width), 0))
        labels = b.where(has, labels, blank)
        label = b.pad(labels, low=(0, 1), high=(0, 1), interior=(0, 1), value=blank)
    else:
        label = b.full(blank, shape=shape, dtype=i64, device=device)
    last = b.mul(counts, 2)
    known = b.le(position(t, 1, shape, device), along(t, last, shape, 0))
    whole = (steps, *shape)
    scores = b.gather(x, expand(t, label, whole), axis=2)
    scores = b.where(expand(t, known, whole), scores, _NONE)
    rows = (steps, batch, 1)
    alive = b.lt(position(t, 0, rows, device), along(t, lasts, rows, 1))
    return _States(label, known, last, scores, alive)


# ---- the loops


def _moved(b: Builder, x: Value, by: int, fill: float) -> Value:
    """What stands `by` states before (behind, if negative) each of them."""
    n, width = x.type.shape
    by = max(min(by, width), -width)
    low, high = max(by, 0), max(-by, 0)
    kept = part(b, x, 1, high, width - low - high)
    return b.pad(kept, low=(0, low), high=(0, high), interior=(0, 0), value=fill)


def _paths(b: Builder, x: Value, skips: Value, by: int) -> Value:
    """What the paths weigh that come to each state: from itself, from the state next to it, and
    from the one after that where a blank may be left out."""
    first, second = _moved(b, x, by, _NONE), _moved(b, x, 2 * by, _NONE)
    second = b.where(skips, second, _NONE)
    most = b.maximum(b.maximum(x, first), second)
    most = b.where(b.eq(most, _NONE), 0.0, most)  # -inf less -inf is no number
    total = b.add(b.exp(b.sub(x, most)), b.exp(b.sub(first, most)))
    return b.add(b.log(b.add(total, b.exp(b.sub(second, most)))), most)


def _rows(t: Trace, s: _States, start: Value, *, back: bool) -> Value:
    """What the paths weigh up to each step, or from it on: [T + 1, N, W], with `start` at the end
    where they start. Backwards a sequence starts at its own last step."""
    kind, (steps, *shape) = s.scores.type, s.scores.type.shape
    by = -1 if back else 1
    with t.untaped():
        skips = t.b.ne(s.label, _moved(t.b, s.label, 2 * by, -1))
        inside = Builder()
        now, scores = (inside.param(Type(kind.dtype, tuple(shape), kind.device)) for _ in range(2))
        alive = inside.param(Type(s.alive.type.dtype, s.alive.type.shape[1:], kind.device))
        may = inside.param(skips.type)
        after = inside.add(_paths(inside, now, may, by), scores)
        after = inside.where(inside.expand(alive, shape=tuple(shape)), after, now)
        body: Graph = inside.graph("body", (Result(after),)).canonical()
        loop = {"carried": 1, "sliced": 2, "steps": steps, "reverse": back}
        flat = t.b.scan(start, s.scores, s.alive, skips, body=body, **loop)
        return t.b.reshape(flat, shape=(steps + 1, *shape))


def _start(t: Trace, s: _States, at: Value | int) -> Value:
    """One path, at a state of each sequence."""
    kind, shape = s.scores.type, s.label.type.shape
    at = at if isinstance(at, int) else along(t, at, shape, 0)
    hit = t.b.eq(position(t, 1, shape, kind.device), at)
    nothing = t.b.full(_NONE, shape=shape, dtype=kind.dtype, device=kind.device)
    return t.b.where(hit, 0.0, nothing)


def _loss(t: Trace, x: Value, s: _States, lasts: Value, zero_infinity: bool) -> Value:
    """-log of what all paths weigh that end with the last label or the blank behind it: [N]."""
    b, (batch, width) = t.b, s.label.type.shape
    steps = x.type.shape[0]
    with t.untaped():
        alpha = _rows(t, s, _start(t, s, 0), back=False)
        end = b.reshape(part(b, alpha, 0, steps, 1), shape=(batch, width))
        place = b.reshape(s.last, shape=(batch, 1))
        one = b.reshape(b.gather(end, place, axis=1), shape=(batch,))
        other = b.gather(end, b.maximum(b.sub(place, 1), 0), axis=1)
        other = b.where(b.gt(s.last, 0), b.reshape(other, shape=(batch,)), _NONE)
        most = b.maximum(one, other)
        most = b.where(b.eq(most, _NONE), 0.0, most)
        total = b.add(b.exp(b.sub(one, most)), b.exp(b.sub(other, most)))
        loss = b.neg(b.add(b.log(total), most))
        loss = b.where(b.ge(s.last, width), math.inf, loss)

    def vjp(b: Builder, cts: Sequence[Value], need: Sequence[bool]) -> list[Value]:
        with t.untaped():
            slope = _slope(t, x, s, alpha, loss, lasts, cts[0], zero_infinity)
        return [underived(t, "_ctc_loss_backward", (cts[0], x), slope)]

    return t.derive("ctc_loss", (x,), loss, vjp)


def _slope(
    t: Trace,
    x: Value,
    s: _States,
    alpha: Value,
    loss: Value,
    lasts: Value,
    g: Value,
    zero_infinity: bool,
) -> Value:
    """exp(x) less the share of the paths that are in a state of the class: [T, N, C]. NaN where
    there is no path, or the class cannot be. Where the last label is a blank itself, torch forgets
    the blank behind it at the last step."""
    b, shape, kind = t.b, x.type.shape, x.type
    steps = shape[0]
    states = s.scores.type.shape
    beta = part(b, _rows(t, s, _start(t, s, s.last), back=True), 0, 0, steps)
    both = b.add(part(b, alpha, 0, 1, steps), beta)
    share = b.exp(b.sub(b.add(both, along(t, loss, states, 1)), s.scores))
    share = b.where(expand(t, s.known, states), share, 0.0)
    here = b.eq(position(t, 1, states[1:], kind.device), along(t, s.last, states[1:], 0))
    same = b.and_(here, b.eq(s.label, _moved(b, s.label, 1, -1)))
    at_end = b.eq(position(t, 0, states, kind.device), along(t, b.sub(lasts, 1), states, 1))
    share = b.where(b.and_(at_end, expand(t, same, states)), 0.0, share)
    nothing = b.full(0, shape=shape, dtype=kind.dtype, device=kind.device)
    label = expand(t, s.label, states)
    share = b.scatter(nothing, label, share, axis=2, combine="add")
    loss = along(t, loss, shape, 1)
    never = b.or_(b.not_(b.lt(loss, math.inf)), b.eq(x, _NONE))
    slope = b.sub(b.exp(x), b.where(never, math.nan, share))
    slope = b.mul(slope, along(t, g, shape, 1))
    slope = b.where(expand(t, s.alive, shape), slope, 0.0)
    return b.where(b.eq(loss, math.inf), 0.0, slope) if zero_infinity else slope
