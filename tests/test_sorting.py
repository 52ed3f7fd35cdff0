"""Sorting on the CPU: rows short and long, all kinds of keys, the first few and all of them."""

from __future__ import annotations

import pytest
import torch

import tracejit

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
# around the lengths from which on rows are merged, sorted by digits, and first thinned out
LENGTHS = (2, 15, 16, 17, 33, 255, 256, 257, 3000)


def rows(dtype: torch.dtype, n: int, seed: int) -> torch.Tensor:
    """Numbers with many equal ones, and all that order in ways of their own."""
    torch.manual_seed(seed)
    if not dtype.is_floating_point:
        low, high = (0, 2) if dtype is torch.bool else (0, 256)
        if dtype.is_signed:
            info = torch.iinfo(dtype)
            low, high = max(info.min, -(10**12)), min(info.max, 10**12)
        x = torch.randint(low, high, (3, n))
        x[:, ::3] = x[:, :1]
        if dtype is torch.int64:
            x[0, 0], x[0, 1] = -(2**63), 2**63 - 1
        return x.to(dtype)
    x = torch.randn(3, n).mul(3).round(decimals=1)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40])
    where = torch.randint(0, n, (3, max(1, n // 3)))
    x.scatter_(1, where, special[torch.randint(0, 7, where.shape)])
    return x.to(dtype)


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.sweep(2)
def test_sorts_as_eager(dtype: torch.dtype, backend: str):
    """Values and places of all, and of the first few."""

    def step(x: torch.Tensor) -> list[torch.Tensor]:
        n = x.shape[1]
        found = []
        for down in (False, True):
            found += x.sort(dim=1, descending=down, stable=True)
            for count in {1, min(5, n), n // 2}:
                found.append(x.argsort(dim=1, descending=down, stable=True)[:, :count])
        found += x.t().sort(dim=0, stable=True)
        return found

    for n in LENGTHS:
        x = rows(dtype, n, n)
        compiled = tracejit.compile(step, backend=backend, on_unsupported="raise")
        for eager, ours in zip(step(x), compiled(x), strict=True):
            assert torch.equal(eager.nan_to_num(0.25), ours.nan_to_num(0.25))
            assert eager.isnan().equal(ours.isnan())


@pytest.mark.parametrize("k", [1, 7, 200, 1500])
def test_the_first_of_many(k: int):
    """What topk finds are the largest, wherever most of the numbers are alike."""
    torch.manual_seed(0)
    x = torch.cat([torch.rand(1500).add(1), torch.randn(1500), torch.zeros(3000)])
    x = torch.stack([x[torch.randperm(6000)], torch.full((6000,), 2.0), x])
    step = tracejit.compile(lambda x: x.topk(k, dim=1), on_unsupported="raise")
    values, places = step(x)
    assert torch.equal(values, x.topk(k, dim=1).values)
    assert torch.equal(x.gather(1, places), values)
    assert all(len(set(row.tolist())) == k for row in places)


def test_a_long_row_in_many_chunks():
    """One row of a million, and many rows dealt to threads."""
    torch.manual_seed(1)
    long, many = torch.randn(1_000_000), torch.randint(-50, 50, (300, 700))
    step = tracejit.compile(
        lambda x, y: (x.sort(stable=True), y.sort(dim=0, stable=True)), on_unsupported="raise"
    )
    for ours, eager in zip(
        step(long, many), (long.sort(stable=True), many.sort(dim=0, stable=True)), strict=True
    ):
        assert torch.equal(ours.values, eager.values) and torch.equal(ours.indices, eager.indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
def test_the_mode_of_a_long_row(dtype: torch.dtype):
    """The smallest of the most frequent values, and a place where it stands; in linear work after
    the sort: comparing each with each would take 10¹⁰ elements."""
    torch.manual_seed(2)
    x = torch.randint(0, 200, (2, 100_001)).to(dtype)
    x[1, 1::2] = 77
    step = tracejit.compile(lambda x: x.mode(1), on_unsupported="raise")
    values, places = step(x)
    assert torch.equal(values, x.mode(1).values) and values[1] == 77
    assert torch.equal(x.gather(1, places[:, None])[:, 0], values)


def structured(n: int) -> list[torch.Tensor]:
    """Rows on which a selection by partitions does badly, or comes to the end in other ways."""
    up = torch.arange(n)
    pipe = torch.minimum(up, n - 1 - up)
    half = n // 2
    killer = torch.empty(n, dtype=torch.int64)  # of a median of three (Musser 1997)
    killer[: 2 * half : 2] = torch.arange(half) * 2 + 1
    killer[1 : 2 * half : 2] = torch.arange(half) + half
    return [up, up.flip(0), pipe, -pipe, killer, killer.flip(0), up % 2, up * 7 % 5, up * 0]


def best(*rows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for x in rows:
        for k in (1, 2, 5, 16, 17, 18, 100, 250, 1000):
            for largest in (True, False) if k <= x.shape[-1] else ():
                for in_order in (True, False):
                    found.append(tuple(torch.topk(x, k, -1, largest, in_order)))
    return found


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16], ids=str)
@pytest.mark.sweep(1)
def test_topk_takes_equal_elements_as_eager(dtype: torch.dtype, backend: str):
    """Among equal elements, those that eager takes, in its order: gradients go where they come
    from."""
    torch.manual_seed(1)
    given = []
    for n in (5, 17, 64, 300, 1500):
        given += [torch.randint(0, m, (2, n)).to(dtype) for m in (3, n)]
    if dtype.is_floating_point:
        for x in given:
            x[:, ::7] = float("nan")
    given.append(torch.stack(structured(280)).to(dtype))
    ours = tracejit.compile(best, backend=backend, on_unsupported="raise")(*given)
    for (value, place), (values, places) in zip(ours, best(*given), strict=True):
        assert torch.equal(place, places)
        torch.testing.assert_close(value, values, equal_nan=True, rtol=0, atol=0)
