"""The levels of `torch.func`: where one begins and ends, and what has a history outside of it.

What a function is differentiated by is seen through new leaves. When its level is over, a result
has a history only as far as it depends on what was differentiated outside of it already. The three
questions are calls of this rule, which `python/transforms.py` makes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tracejit.autodiff import Entry, reaches
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Handle, is_dense
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value

Tensor = torch.Tensor


@rule(torch.func.grad)
def level(t: Trace, which: str, x: Tensor, *leaves: Tensor) -> object:
    """Of "enter" a leaf that stands for x; "close": it does so no more. "history": whether x has
    one outside of the level of these leaves; "leave": x as it is outside of it, where the second
    half of `leaves` is what the others stand for. "along": x, with the history of another
    tensor."""
    h = t.lift(x)
    if which == "enter":
        return _entered(t, h)
    if which == "close":
        return _closed(t, h)
    if which == "along":
        return t.fresh(t.unread(t.read(h), t.read(t.lift(leaves[0]))), h.strides)
    if which == "leave":
        half = len(leaves) // 2
        for leaf, given in zip(leaves[:half], leaves[half:], strict=True):
            if h is t.lift(leaf) and leaf is not given:
                return given
            view = _of_given(t, h, t.lift(leaf), t.lift(given))
            if view is not None:
                return view
        leaves = leaves[:half]
    outside = t.base(h.family) in _outside(t, [t.lift(leaf) for leaf in leaves])
    if which == "history":
        return outside
    return x if outside or not t.requires_grad(h) else t.detached(h, share_version=True)


def _entered(t: Trace, h: Handle) -> Tensor:
    if not h.dtype.is_float:
        raise t.autograd_error("only Tensors of floating point dtype can require gradients")
    x = t.read_with_history(h)
    with t.untaped():
        made = t.fresh(t.b.alias(x), h.strides if is_dense(h.shape, h.strides) else None)
    leaf = made.handle
    t.make_leaf(leaf)
    if x in t.tape.tracked:
        t.tape.add(Entry((x,), (leaf.family.value,), lambda b, cts, need: cts, "data"))
    t.entered[leaf] = h.storage, h.storage.writes
    return made


def _of_given(t: Trace, h: Handle, leaf: Handle, given: Handle) -> Tensor | None:
    """A view of a leaf as one of what that stands for."""
    count = len(leaf.steps)
    if given is leaf or h.storage is not leaf.storage or h.steps[:count] != leaf.steps:
        return None
    if leaf.strides != given.strides or h.dtype != leaf.dtype:
        return None
    offset = given.offset + h.offset - leaf.offset
    return t.view(given, h.steps[count:], h.shape, h.strides, offset)


def _closed(t: Trace, leaf: Handle) -> None:
    for value in [v for v, h in t.leaf_of.items() if h is leaf]:
        del t.leaf_of[value]
    storage, writes = t.entered.pop(leaf)
    if leaf.storage.writes or storage.writes != writes:
        raise t.unsupported(
            "The function writes to what it is differentiated by; write to a clone of it"
        )


def _outside(t: Trace, leaves: Sequence[Handle]) -> set[Value]:
    """The values that have a history without that of these leaves."""
    made = {v for entry in t.tape.entries for v in entry.outputs}
    own = {leaf.family.value for leaf in leaves}
    return reaches(t.tape, t.tape.tracked - made - own)
