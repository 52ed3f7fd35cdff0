"""What the tests of capture share: a step does in eager what it does through the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from support.oracle import call


def leaf(*shape: int) -> torch.Tensor:
    return randn(*shape).requires_grad_()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 7 * len(shape)))


def flat(x: object, path: str = "result") -> list[tuple[str, object]]:
    """The leaves of a structure with their paths."""
    if isinstance(x, dict):
        return [p for k, v in x.items() for p in flat(v, f"{path}[{k!r}]")]
    if isinstance(x, (tuple, list)):
        return [p for i, v in enumerate(x) for p in flat(v, f"{path}[{i}]")]
    return [(path, x)]


def assert_equal(ours: object, eager: object, path: str) -> None:
    """Equal kinds; tensors of equal dtype, layout and requires_grad, and close values."""
    if not isinstance(eager, torch.Tensor):
        assert type(ours) is type(eager), f"{path}: {type(ours)}, eager {type(eager)}"
        assert ours == eager or (ours != ours and eager != eager), f"{path}: {ours}, eager {eager}"
        return
    assert type(ours) in (torch.Tensor, torch.nn.Parameter), f"{path} is a {type(ours)}"
    mine = (ours.dtype, ours.shape, ours.stride(), ours.storage_offset(), ours.requires_grad)
    his = (eager.dtype, eager.shape, eager.stride(), eager.storage_offset(), eager.requires_grad)
    assert mine == his, f"{path}: {mine}, eager {his}"
    assert ours.is_leaf == eager.is_leaf, f"{path}: is_leaf {ours.is_leaf}"
    torch.testing.assert_close(
        ours.detach(), eager.detach(), equal_nan=True, msg=lambda m: f"{path}: {m}"
    )


def sharing(tensors: list[torch.Tensor]) -> list[int]:
    """For each tensor, the first that shares its memory."""
    first: dict[int, int] = {}
    return [first.setdefault(t.untyped_storage()._cdata, i) for i, t in enumerate(tensors)]


def same(step: Callable, *args: object, calls: int = 1) -> object:
    """Check that a step does the same in eager and through the oracle; returns our result."""
    ours, theirs = copy.deepcopy(args), copy.deepcopy(args)
    tensors = [[t for _, t in flat(a) if isinstance(t, torch.Tensor)] for a in (ours, theirs)]
    for mine, his, given in zip(
        *tensors, [t for _, t in flat(args) if isinstance(t, torch.Tensor)], strict=True
    ):
        if given.grad is not None:
            mine.grad, his.grad = given.grad.clone(), given.grad.clone()
    versions = [t._version for t in tensors[0]]
    before = [t.grad for t in tensors[0]], [t.grad for t in tensors[1]]
    for i in range(calls):
        expected = step(*theirs)
        found = call(step, *ours)
        pairs = list(zip(flat(found), flat(expected), strict=True))
        for (path, mine), (_, his) in pairs:
            assert_equal(mine, his, f"call {i}: {path}")
        everything = [], []
        for k, (mine, his) in enumerate(zip(*tensors, strict=True)):
            assert_equal(mine, his, f"call {i}: argument {k}")
            assert (mine.grad is None) == (his.grad is None), f"argument {k}: .grad {mine.grad}"
            if his.grad is not None:
                assert_equal(mine.grad, his.grad, f"call {i}: argument {k}.grad")
                kept = (mine.grad is before[0][k]) == (his.grad is before[1][k])
                assert kept, f"call {i}: argument {k}.grad is another object, or still the same"
                everything[0].append(mine.grad)
                everything[1].append(his.grad)
            if his._version > versions[k]:  # writes through .data count too
                assert mine._version > versions[k], f"call {i}: version of argument {k}"
        for (_, mine), (_, his) in pairs:
            if isinstance(his, torch.Tensor):
                everything[0].append(mine)
                everything[1].append(his)
        groups = [sharing(e + t) for e, t in zip(everything, tensors, strict=True)]
        assert groups[0] == groups[1], f"call {i}: sharing of memory"
    assert torch.is_grad_enabled()
    return found


def loss_of(w, x):
    return ((w * x).tanh() ** 2).sum()
