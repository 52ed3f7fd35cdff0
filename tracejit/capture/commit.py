"""The commit of a replay as generated code: the effects of one Captured, in microseconds.

`Captured.commit` interprets its tables on every call. A replay does the same effects each time, so
they are written out once as straight lines; what is rare is left to `Captured.commit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from sys import getrefcount

import torch

from tracejit.capture.effects import (
    Captured,
    Constant,
    HostSlot,
    Made,
    Mapped,
    Sequenced,
    Slot,
    rebuild,
)
from tracejit.ir import host_memory
from tracejit.ir.types import contiguous_strides

# (outside tensors, results of the plan, host results, runs of backward graphs) -> what is returned
Commit = Callable[[Sequence, Sequence, Sequence, Sequence], object]


WORTH = 4096  # elements of a gradient from which its memory is looked after


def leaver(captured: Captured) -> Callable[[Sequence[torch.Tensor]], list[int]]:
    """A function of the outside tensors: the storages of the gradients that the commit replaces and
    that nobody else can see, so that the plan may write new ones there, as eager does when a step
    drops its gradients first."""
    owners = [
        index
        for index, source in captured.grads
        if source is not None and prod(captured.made[source].shape) >= WORTH
    ]

    def leaving(reals: Sequence[torch.Tensor]) -> list[int]:
        return [storage for i in owners if (storage := _sole(reals[i]))]

    return leaving


def _sole(owner: torch.Tensor) -> int:
    """The storage of a `.grad` that only its owner holds, in Python and in C++; else 0."""
    grad = owner.grad
    if grad is None or (getrefcount(grad), grad._use_count()) != _ALONE:
        return 0
    if type(grad) is not torch.Tensor or grad.layout is not torch.strided:
        return 0
    return grad.untyped_storage()._cdata


def _counts() -> tuple[int, int]:
    """The two counts in `_sole` for a gradient that nobody else holds; they vary with torch."""
    owner = torch.zeros(1, requires_grad=True)
    owner.grad = torch.zeros(1)
    grad = owner.grad
    return getrefcount(grad), grad._use_count()


_ALONE = _counts()


def committer(captured: Captured) -> Commit:
    """What `captured.commit` does, for many calls."""
    odd = captured.outside or captured.reasons or captured.datas or captured.escaped
    if odd or not all(_simple(m) for m in captured.made):
        return captured.commit
    names: dict[str, object] = {
        "bump": torch._C._increment_version,
        "write": host_memory.write,
        "rebuild": rebuild,
    }

    def constant(x: object) -> str:
        names[f"k{len(names)}"] = x
        return f"k{len(names) - 1}"

    lines = []
    if captured.written:
        lines.append(f"bump([{', '.join(f'reals[{i}]' for i in captured.written)}])")
    for index, source in captured.host_writes:
        lines.append(f"write(reals[{index}], host[{source}])")
    for held, key, tree in captured.stores:
        target = f"{constant(held.holder)}[{key!r}]"
        lines.append(f"{target} = rebuild({constant(tree)}, (), host)")
    for i, m in enumerate(captured.made):
        lines.append(f"m{i} = {_made(m, captured)}")
    for index, source in captured.grads:
        lines.append(f"reals[{index}].grad = {'None' if source is None else f'm{source}'}")
    lines.append(f"return {_tree(captured.tree, constant)}")
    body = "\n".join(f"    {line}" for line in lines)
    text = f"def commit(reals, outputs, host, backwards):\n{body}\n"
    exec(compile(text, "<tracejit commit>", "exec"), names)
    return names["commit"]


def _simple(m: Made) -> bool:
    return m.kind == "real" or (m.kind in ("output", "alias") and not m.requires_grad)


def _made(m: Made, captured: Captured) -> str:
    if m.kind == "real":
        return f"reals[{m.index}]"
    if m.kind == "alias":
        return f"reals[{m.index}].detach().as_strided({m.shape}, {m.strides}, {m.offset})"
    result = captured.graph.results[m.index]
    shape = result.value.type.shape
    strides = result.strides or contiguous_strides(shape)
    if (m.shape, m.strides, m.offset) == (shape, strides, 0):
        return f"outputs[{m.index}]"
    return f"outputs[{m.index}].as_strided({m.shape}, {m.strides}, {m.offset})"


def _tree(tree: object, constant: Callable[[object], str]) -> str:
    """The returned structure as an expression."""
    match tree:
        case Slot(index):
            return f"m{index}"
        case HostSlot(index):
            return f"host[{index}]"
        case Sequenced(kind, items):
            parts = [_tree(x, constant) for x in items]
            if kind is list:
                return f"[{', '.join(parts)}]"
            if kind is tuple:
                return f"({''.join(f'{p}, ' for p in parts)})"
            return f"{constant(kind)}({', '.join(parts)})"  # a namedtuple
        case Mapped(items):
            parts = [f"{constant(k)}: {_tree(v, constant)}" for k, v in items]
            return f"{{{', '.join(parts)}}}"
        case Constant(value):
            return constant(value)
    raise AssertionError(tree)
