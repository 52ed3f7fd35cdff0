"""`view(dtype)` in whole steps: the same bits as in eager, in the same memory, written from either
side; never differentiated."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

import tracejit
from support.capture_checks import sharing
from support.scope import sampled
from tracejit.errors import CannotExport, UnsupportedOperation
from tracejit.report import report

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
NARROW = (torch.float16, torch.bfloat16)
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def tensors(tree: object) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def check(step: Callable, *args: torch.Tensor, backend: str, calls: int = 2) -> None:
    """A step gives the bits of eager, laid out alike, in memory that is shared alike."""
    compiled = tracejit.compile(step, backend=backend, on_unsupported="raise")
    for _ in range(calls):
        both = []
        for run in (step, compiled):
            given = [x.detach().clone().requires_grad_(x.requires_grad) for x in args]
            both.append(tensors((run(*given), given, [x.grad for x in given])))
        assert sharing(both[0]) == sharing(both[1])
        for theirs, ours in zip(*both, strict=True):
            for what in ("dtype", "shape", "requires_grad", "is_leaf"):
                assert getattr(ours, what) == getattr(theirs, what), what
            assert (ours.stride(), ours.storage_offset()) == (
                *(theirs.stride(),),
                theirs.storage_offset(),
            )
            integer = INTEGER[theirs.itemsize]
            assert torch.equal(ours.detach().view(integer), theirs.detach().view(integer))


def given(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.empty(3, 8).uniform_(-2, 2).to(dtype)


PAIRS = [(a, b) for a, b in product(DTYPES, DTYPES) if b is not torch.bool or a is torch.bool]


def some_pairs(backend: str) -> list[tuple[torch.dtype, torch.dtype]]:
    """The pairs that `make test` runs: those of a kernel to compile are the dearest."""
    return [p for p in PAIRS if sampled(f"{backend} {p}", of=1)]


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_each_pair_of_dtypes(backend: str):
    def computed(a, b):
        return lambda x: (x.logical_not() if a is torch.bool else x + x).view(b)

    def outside(b):
        return lambda x: x.view(b)[:, 2:6] if x.itemsize <= b.itemsize else x.view(b)[1:]

    for a, b in some_pairs(backend):
        check(computed(a, b), given(a), backend=backend)
        check(outside(b), given(a), backend=backend)


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_writes_through_each_pair(backend: str):
    def step(a, b):
        def computed(x):
            y = x + x
            view = y.view(b)
            view[0] = view[1]
            return y, view

        def outside(x):
            view = x.view(b)[:, :2]
            view[0] = view[1]
            return x * 1

        return outside if a is torch.bool else computed

    for a, b in some_pairs(backend):
        if b in NARROW and a is not b:
            with pytest.raises(UnsupportedOperation, match="another NaN"):
                check(step(a, b), given(a), backend=backend)
        else:
            check(step(a, b), given(a), backend=backend)


def back_and_forth(x):
    return ((x * 3).view(torch.int32) + 1).view(torch.float32) * x


def inverse_root(x):
    """The well-known approximation."""
    i = 0x5F3759DF - ((x * x + 0.1).view(torch.int32) >> 1)
    y = i.view(torch.float32)
    return y * (1.5 - 0.5 * x * y * y)


def both_ways(x):
    y = x.detach() * 2
    bits = y.view(torch.int32)
    y.mul_(2)
    floats = bits.view(torch.float32)
    bits.bitwise_and_(-65536)
    return y, bits, floats, bits.t(), bits[1:], bits + 1


def of_a_leaf(x):
    x.view(torch.int32).add_(1)
    return x * 2


def halves(x):
    y = x.detach() * 2
    y.view(torch.int16)[:, 1::2].zero_()
    return y


def behind_autograd(x):
    y = x * 2
    y.detach().view(torch.int32).bitwise_and_(-65536)
    (y * 3).sum().backward()
    return y.detach()


def of_one_number(x):
    bits = x[1, 1].view(torch.int32)
    return torch.tensor(bits.item() * 2), bits


def strided(x):
    y = x.detach() + 1
    column = y[:, :1].clone()
    return y[1:, 2:].view(torch.float64), y[1:, 2:].view(torch.int16), column.view(torch.uint8)


def forms(x):
    y = x.detach() * 2
    copies = torch.view_copy(y, torch.int32), torch.view_copy(y, dtype=torch.int16)
    return (
        *copies,
        y.view(dtype=torch.int64),
        y.view(torch.int16).view(torch.int64),
        x.view(x.dtype),
    )


STEPS = {
    f.__name__.replace("_", " "): f
    for f in (
        *(back_and_forth, inverse_root, both_ways, of_a_leaf, halves, behind_autograd),
        *(of_one_number, strided, forms),
    )
}


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.sweep(0.34)
def test_steps(name: str, backend: str):
    torch.manual_seed(4)
    check(STEPS[name], torch.randn(3, 8, requires_grad=True), backend=backend, calls=4)


def kept(x):
    y = x.detach() * 2
    z = y.clone().t_()
    first = torch.topk(y, 2, 1, True, False)[1]
    return y.view(torch.int32), y[1:].view(torch.int16)[:, 1:], x.view(torch.int64), first, z


@pytest.mark.parametrize("way", ["saved", "ejected"])
def test_steps_in_files(way: str, tmp_path: Path):
    """A saved step and an ejected one give the same views."""
    x = torch.randn(4, 6)
    step = tracejit.compile(kept, backend="c", on_unsupported="raise")
    for _ in range(3):
        step(x)
    if way == "saved":
        step.save(tmp_path / "kept.step")
        run = tracejit.load(tmp_path / "kept.step")
    else:
        step.eject(tmp_path / "kept.py")
        run = runpy.run_path(str(tmp_path / "kept.py"))["Step"]({})
    for ours, theirs in zip(run(x), kept(x), strict=True):
        assert ours.dtype is theirs.dtype and torch.equal(ours, theirs)
        assert (ours.stride(), ours.storage_offset()) == (theirs.stride(), theirs.storage_offset())


@pytest.mark.parametrize("computed", [True, False])
def test_onnx_has_no_bits(computed: bool, tmp_path: Path):
    def step(x):
        return (x * 2).view(torch.int32) + 1 if computed else x.view(torch.int32)

    with pytest.raises(CannotExport, match="bits"):
        tracejit.to_onnx(tracejit.compile(step), tmp_path / "a.onnx", torch.randn(4, 6))


REJECTED = {
    "no axes": lambda x: x.sum().view(torch.int16),
    "columns": lambda x: x.t().view(torch.int16),
    "a row that is too short": lambda x: x[:, :7].view(torch.float64),
    "an offset between two": lambda x: x[:, 1:3].view(torch.float64),
    "rows between two": lambda x: x.flatten()[:21].view(3, 7)[:, :6].view(torch.float64),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_eager_rejects(name: str):
    for run in (REJECTED[name], tracejit.compile(REJECTED[name])):
        with pytest.raises(RuntimeError, match="different element sizes"):
            run(torch.randn(3, 8))


def history_on_bits(x):
    bits = (x * 7).to(torch.int32)
    bits.view(torch.float32).mul_(x)
    return bits


REFUSED = {
    "a value with history": (history_on_bits, "with history"),
    "other numbers as bools": (lambda x: x.detach().view(torch.bool), "as bools"),
    "complex numbers": (lambda x: x.detach().view(torch.complex64), "complex64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str):
    step, reason = REFUSED[name]
    with pytest.raises(UnsupportedOperation, match=reason):
        tracejit.compile(step, on_unsupported="raise")(torch.randn(3, 8, requires_grad=True))


def of_each_size(x, y, i, j):
    """Floats to integers of their size, of smaller and larger ones, and back."""
    x, y = x * 2, y * 3
    halves = [y.to(d) for d in NARROW]
    return (
        *(x.view(d) for d in (torch.int64, torch.int16, torch.uint8)),
        *(y.view(d) for d in (torch.int32, torch.int8, torch.float64, torch.bfloat16)),
        *(h.view(torch.int16) + 1 for h in halves),
        *((i + 1).view(d) for d in (torch.float64, torch.float16)),
        *((j + 1).view(d) for d in (torch.float32, torch.bfloat16, torch.int64)),
    )


@pytest.mark.parametrize("target", [80, 90, 100])
def test_kernels_for_gpus_do_not_spill(target: int):
    shape, dtypes = (64, 32), (torch.float64, torch.float32, torch.int64, torch.int32)
    compiled = tracejit.compile(of_each_size, backend="numpy", on_unsupported="raise")
    compiled(*(torch.ones(shape, dtype=d) for d in dtypes))
    rows = report(compiled.plans[-1], target=target).rows
    assert rows and not sum(row.facts.spills for row in rows)
