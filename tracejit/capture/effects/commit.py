"""The commit of a replay as lines of code: the effects of one Captured, in microseconds.

`Captured.commit` interprets its tables on every call. A replay does the same effects each time, so
they are written out once as straight lines; what is rare is left to `Captured.commit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from sys import getrefcount

import torch

from tracejit.capture.effects.captured import (
    Captured,
    Constant,
    HostSlot,
    Made,
    Mapped,
    Sequenced,
    Slot,
    rebuild,
    refusal,
)
from tracejit.capture.proof.guards import Places
from tracejit.ir import host_memory
from tracejit.ir.types import contiguous_strides

WORTH = 4096  # elements of a gradient from which its memory is looked after


def leaver(
    captured: Captured, *, noted: bool = False, listed: bool = False
) -> Callable[[Sequence[torch.Tensor]], list[int]] | None:
    """A function of the outside tensors: the storages of the gradients that the commit replaces and
    that nobody else can see, so that the plan may write new ones there, as eager does when a step
    drops its gradients first. None if there are none.

    noted:  the trace holds the gradients that were looked at.
    listed: the outside tensors hold those of them that were lifted. Whoever else holds one, it is
        not left: here are just the holders that are known to be there.
    """
    owners = [
        index
        for index, source in captured.grads
        if source is not None and prod(captured.made[source].shape) >= WORTH
    ]
    if not owners:
        return None
    looked_at = _only_looked_at(captured) if noted or listed else {}
    wanted = []
    for index in owners:
        grad = looked_at.get(index)
        more = 0 if grad is None else noted + (listed and grad >= 0)
        wanted.append((index, more))

    def leaving(reals: Sequence[torch.Tensor]) -> list[int]:
        return [storage for i, more in wanted if (storage := _sole(reals[i], more))]

    return leaving


def _only_looked_at(captured: Captured) -> dict[int, int]:
    """The outside tensors whose `.grad` was looked at and serves for nothing, and where it is among
    them: -1 if it is not."""
    if captured.outside or captured.bounds:
        return {}
    used = {index for kind, index in captured.sources if kind == "tensor"}
    used.update(m.index for m in captured.made if m.kind in ("real", "alias"))
    used.update(captured.written, (i for i, _ in captured.host_writes))
    used.update(i for pairs in (captured.grads, captured.datas) for i, _ in pairs)
    return {i: grad for i, grad in captured.grads_read if grad is not None and grad not in used}


def _sole(owner: torch.Tensor, more: int) -> int:
    """The storage of a `.grad` that only its owner holds, in Python and in C++, and `more` that let
    go; else 0."""
    grad = owner.grad
    if grad is None or (getrefcount(grad) - more, grad._use_count()) != _ALONE:
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


def is_odd(captured: Captured) -> bool:
    """Whether the effects are rare ones, which only `captured.commit` does."""
    rare = captured.outside or captured.datas or captured.escaped
    return bool(rare) or any(m.kind in ("view", "host") for m in captured.made)


def commit_lines(
    captured: Captured,
    outputs: Sequence[str],
    host: Sequence[str],
    places: Places | None,
    names: dict[str, object],
) -> list[str]:
    """What `captured.commit` does, as lines of Python that set `returned`; to do it twice is as
    good as once. They read `reals`, and `cells` at the outside tensors' addresses.

    outputs, host: expressions of the plan's results and of the host results.
    places:        of the replay that has the cells. None for a rerun, whose own `tree` and `stores`
        the lines read.
    names:         the namespace of the lines, which grows here.
    """

    def constant(x: object) -> str:
        names[f"k{len(names)}"] = x
        return f"k{len(names) - 1}"

    if is_odd(captured):
        names["commit"] = captured.commit
        results, numbers = ", ".join(outputs), ", ".join(host)
        return [f"returned = commit(reals, [{results}], [{numbers}], backwards)"]
    lines = []
    if captured.written:
        names["bump"] = torch._C._increment_version
        lines.append(f"bump([{', '.join(f'reals[{i}]' for i in captured.written)}])")
    for index, source in captured.host_writes:
        cell = None if places is None else places.cell(index)
        if cell is not None:
            lines.append(f"cells[{cell}].value = {host[source]}")
        else:
            names["write"] = host_memory.write
            lines.append(f"write(reals[{index}], {host[source]})")
    if places is None:
        names["rebuild"] = rebuild
        lines += [
            f"numbers = [{', '.join(host)}]",
            "for entry, key, stored in stores:",
            "    entry.holder[key] = rebuild(stored, (), numbers)",
        ]
    for held, key, tree in captured.stores if places is not None else ():
        target = f"{constant(held.holder)}[{key!r}]"
        lines.append(f"{target} = {_tree(tree, host, constant)}")
    reasons, taken = dict(captured.reasons), set()
    for i, m in enumerate(captured.made):
        tensor = _made(m, captured, outputs)
        again = tensor in taken and m.kind == "output"  # another tensor of the same memory
        taken.add(tensor)
        lines.append(f"m{i} = {tensor}{'.detach()' * again}")
        if m.is_leaf:
            lines.append(f"m{i} = m{i}.data.requires_grad_()")
        elif m.requires_grad:
            mark = f"m{i} = {constant(refusal(reasons.get(i)))}(m{i}.data.requires_grad_())"
            names["enable_grad"] = torch.enable_grad
            # as in every call that the guard accepts
            grad_on = places is not None and torch.is_grad_enabled()
            lines.append(mark if grad_on else f"with enable_grad(): {mark}")
    for index, source in captured.grads:
        lines.append(f"reals[{index}].grad = {'None' if source is None else f'm{source}'}")
    for index, source in captured.leaf_grads:
        lines.append(f"m{index}.grad = m{source}")
    if places is None:
        made = "".join(f"m{i}, " for i in range(len(captured.made)))
        lines.append(f"returned = rebuild(tree, ({made}), numbers)")
    else:
        lines.append(f"returned = {_tree(captured.tree, host, constant)}")
    return lines


def _made(m: Made, captured: Captured, outputs: Sequence[str]) -> str:
    if m.kind == "real":
        return f"reals[{m.index}]"
    if m.kind == "alias":
        return f"reals[{m.index}].detach().as_strided({m.shape}, {m.strides}, {m.offset})"
    result = captured.graph.results[m.index]
    shape = result.value.type.shape
    strides = result.strides or contiguous_strides(shape)
    if (m.shape, m.strides, m.offset) == (shape, strides, 0):
        return outputs[m.index]
    return f"{outputs[m.index]}.as_strided({m.shape}, {m.strides}, {m.offset})"


def _tree(tree: object, host: Sequence[str], constant: Callable[[object], str]) -> str:
    """The returned structure as an expression."""
    match tree:
        case Slot(index):
            return f"m{index}"
        case HostSlot(index):
            return host[index]
        case Sequenced(kind, items):
            parts = [_tree(x, host, constant) for x in items]
            if kind is list:
                return f"[{', '.join(parts)}]"
            if kind is tuple:
                return f"({''.join(f'{p}, ' for p in parts)})"
            return f"{constant(kind)}({', '.join(parts)})"  # a namedtuple
        case Mapped(items):
            parts = [f"{constant(k)}: {_tree(v, host, constant)}" for k, v in items]
            return f"{{{', '.join(parts)}}}"
        case Constant(value):
            return constant(value)
    raise AssertionError(tree)
