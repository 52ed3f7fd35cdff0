"""What tensors are, and what dicts hold, in a guard: of many it is asked at once.

In: the lines of a walk, and the tensors that the graph reads. Out: lines that ask of each; where
there are many, and words of memory can tell whether anything has changed (`words.py`), these lines
run only if something has.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import attrgetter

import torch

from tracejit.capture.proof.guard_text import differs
from tracejit.capture.proof.heap import HOOKS_OF_TENSORS, Walk
from tracejit.capture.python.words import MANY, Dicts, Group

_NONE = "a .grad that the step reads is None"


def guard_grads(w: Walk, owners: dict[str, str]) -> list[str]:
    """Fetch the gradients of tensors, by the names that they get: of many at once. Returns the
    lines that ask whether they are there."""
    there = [f"if not ({at} is not None): return {_NONE!r}" for at in owners]
    if len(owners) < MANY:
        for (at, owner), line in zip(owners.items(), there, strict=True):
            w.lines += [f"{at} = {owner}.grad", line]
        return []
    w.names["grad_of"] = attrgetter("grad")
    w.lines.append(f"{', '.join(owners)} = map(grad_of, ({', '.join(owners.values())}))")
    return there


def guard_dicts(w: Walk, assigned: Collection[int]) -> None:
    """Ask what dicts hold only where one of many was changed (`words.py`). Those that the step or
    a schedule assigns to, by identity, are asked each time."""
    lines = [line for line in w.lines if line in w.of_dicts]
    lines = [line for line in lines if id(w.of_dicts[line]) not in assigned]
    dicts = {id(w.of_dicts[line]): w.of_dicts[line] for line in lines}
    known = Dicts.of([*dicts.values()]) if len(dicts) >= MANY else None
    if known is None:
        return
    first, covered = w.lines.index(lines[0]), set(lines)
    names = [line.partition(" = ")[0] for line in lines if not line.startswith("if ")]
    found = f"({''.join(f'{name}, ' for name in names)})"
    w.names["dicts"] = known
    before = [line for line in w.lines[:first] if line not in covered]
    after = [line for line in w.lines[first:] if line not in covered]
    w.lines = [
        *before,
        "now, kept = dicts.now(), dicts.kept",
        "if kept is not None and kept[0] == now:",
        f"    {found} = kept[1]" if names else "    pass",
        "else:",
        *(f"    {line}" for line in lines),
        f"    dicts.kept = now, {found}",
        *after,
    ]


def guard_metadata(w: Walk, reals: Sequence[torch.Tensor], there: Sequence[str]) -> str:
    """Guard what each tensor is, and find where it lies: of many at once (`words.py`), and one by
    one where these are not what they were. `there` are lines that ask whether gradients are there.
    Returns an expression of all tensors."""
    at = [w.tensors[id(t)] for t in reals]
    lines = [_metadata_line(w, x, t) for x, t in zip(at, reals, strict=True)]
    found = f"addresses = [{', '.join(f'{x}.data_ptr()' for x in at)}]"
    group = Group.of(reals) if len(reals) >= MANY else None
    if group is None:
        w.lines += [*there, *lines, found]
        return f"[{', '.join(at)}]"
    bare = [line for t in reals for line in w.bare.get(id(t), ())]
    covered = set(bare)
    w.lines = [line for line in w.lines if line not in covered]
    w.names["group"] = group
    w.lines += [f"reals = ({', '.join(at)})", "addresses = group.addresses(reals)"]
    one_by_one = (*there, *bare, *lines, found, "group.learn(reals)")
    w.lines += ["if addresses is None:", *(f"    {line}" for line in one_by_one)]
    return "reals"


def _metadata_line(w: Walk, at: str, tensor: torch.Tensor) -> str:
    k = w.constant
    layout = (
        f"{at}.is_contiguous()" if tensor.is_contiguous() else f"{at}.stride() == {tensor.stride()}"
    )
    device = f"{at}.is_cpu" if tensor.is_cpu else f"{at}.device == {k(tensor.device)}"
    same = (
        f"{at}.shape == {k(tensor.shape)} and {layout} and {at}.dtype is {k(tensor.dtype)} and "
        f"{device} and {at}.requires_grad is {tensor.requires_grad} and not {at}.is_neg()"
    )
    if tensor.requires_grad:
        same += f" and {at}.is_leaf is {tensor.is_leaf}"
        for name in HOOKS_OF_TENSORS:  # the walk has told which, if there are some
            if not getattr(tensor, name):
                same += f" and not {at}.{name}"
    w.names |= {"differs": differs, "described": _described}
    path, old = w.path_of(tensor), k(_described(tensor))
    return f"if not ({same}): return differs({path!r}, {old}, described({at}))"


def _described(x: object) -> str:
    """The metadata of a tensor that a guard compares."""
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    dtype = str(x.dtype).removeprefix("torch.")
    text = f"{dtype}{list(x.shape)}, strides {list(x.stride())}, on {x.device}"
    if x.requires_grad:
        text += ", a leaf that requires grad" if x.is_leaf else ", requires grad"
    if x._backward_hooks or getattr(x, "_post_accumulate_grad_hooks", None):
        text += ", with a hook"
    return text + (", negated" if x.is_neg() else "")
