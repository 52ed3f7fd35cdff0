"""Attention with dropout, written out or by torch's function: no scores, and no mask but a draw."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tracejit
from support.attention_forms import (
    EMPTY,
    OF_HEADS,
    PADDED,
    PRIMITIVES,
    SOME,
    B,
    D,
    Form,
    H,
    T,
    graph_of,
    lowest,
    primitives,
    scores,
    training,
)
from support.capture_checks import randn
from support.plan_checks import make_inputs
from tracejit.capture.trace.posing import posing
from tracejit.ir.interp import evaluate
from tracejit.passes import attention
from tracejit.report import limits, report
from tracejit.schedule import schedule

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few scores are left out as well."""
    monkeypatch.setattr(attention, "LARGE", 1)


class Rate:
    of = 0.3


RATES = Rate()
DROPPED: dict[str, Form] = {
    "dropout": lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.5) @ v,
    "a rate that may change": lambda q, k, v: F.dropout(scores(q, k).softmax(-1), RATES.of) @ v,
    "causal": lambda q, k, v: (
        F.dropout(
            scores(q, k).masked_fill(torch.ones(T, T).tril() == 0, -math.inf).softmax(-1), 0.3
        )
        @ v
    ),
    "padded": lambda q, k, v: (
        F.dropout(scores(q, k).masked_fill(~PADDED[:, None, None], -math.inf).softmax(-1), 0.3) @ v
    ),
    "a query of no keys": lambda q, k, v: (
        F.dropout(scores(q, k).masked_fill(~SOME, -math.inf).softmax(-1), 0.3) @ v
    ),
    "a query of no keys, finite": lambda q, k, v: (
        F.dropout(scores(q, k).masked_fill(~SOME, -1e9).softmax(-1), 0.3) @ v
    ),
    "by torch's function": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, dropout_p=0.3, is_causal=True
    ),
    "by torch's function, masked": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, SOME, dropout_p=0.3
    ),
    "added infinity": lambda q, k, v: (
        F.dropout((scores(q, k) + torch.zeros(T, T).masked_fill(~SOME, -math.inf)).softmax(-1), 0.3)
        @ v
    ),
    "a bias of heads": lambda q, k, v: F.dropout((scores(q, k) + OF_HEADS).softmax(-1), 0.3) @ v,
    "a mask of numbers": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, lowest(PADDED), dropout_p=0.3
    ),
    "numbers that leave nothing of a sequence": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, lowest(EMPTY), dropout_p=0.3
    ),
    "such numbers, written out": lambda q, k, v: (
        F.dropout((scores(q, k) + lowest(EMPTY)).softmax(-1), RATES.of) @ v
    ),
    "such numbers for some keys": lambda q, k, v: (
        F.dropout((scores(q, k) + torch.where(SOME, 0.3, -1e9) + lowest(PADDED)).softmax(-1), 0.3)
        @ v
    ),
    "numbers, and a query of no keys": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.where(SOME, OF_HEADS, -math.inf), dropout_p=0.3
    ),
    "numbers, and a query of no keys, written out": lambda q, k, v: (
        F.dropout((scores(q, k) + torch.where(SOME, OF_HEADS, -math.inf)).softmax(-1), 0.3) @ v
    ),
    "most of it": lambda q, k, v: F.dropout((scores(q, k) * 4).softmax(-1), 0.95) @ v,
}


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.sweep(1)
def test_dropout(name):
    """With eager's numbers, also where nothing is left of a row; only the mask has their size."""
    step = training(DROPPED[name])
    compiled = tracejit.compile(step, on_unsupported="raise")
    for call in range(4):
        torch.manual_seed(call)
        eager = [x.clone() for x in step()]
        torch.manual_seed(call)
        found = compiled()
        torch.testing.assert_close([*found], eager, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert compiled.stats.replays
    assert primitives(graph_of(step)) == PRIMITIVES
    buffers = [b for b in compiled.plans[-1].buffers if b.type.numel >= B * H * T * T]
    assert [(b.kind, b.type.dtype.name) for b in buffers] == [("input", "b1")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_dropout_of_half_types(dtype):
    q, k, v = (randn(B, H, T, D, i + 1)[..., i].requires_grad_() for i in range(3))

    def step():
        with torch.autocast("cpu", dtype):
            out = F.dropout(scores(q, k).softmax(-1), 0.3) @ v
        return out.detach(), *torch.autograd.grad(out.float().square().sum(), [q, k, v])

    assert primitives(graph_of(step)) == PRIMITIVES
    torch.manual_seed(0)
    eager = step()
    torch.manual_seed(0)
    found = tracejit.compile(step)()
    eps = torch.finfo(dtype).eps
    for ours, his in zip(found, eager, strict=True):
        assert (ours - his).norm() <= 4 * eps * his.norm()


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.sweep(1)
def test_dropout_whose_mask_is_computed(name, monkeypatch):
    """In mode fast nothing of the scores' size is stored, and results are those that the same
    numbers give where scores are written out."""

    def run() -> tuple:
        compiled = tracejit.compile(training(DROPPED[name]), randomness="fast")
        torch.manual_seed(3)
        return compiled(), compiled.plans[-1]

    found, plan = run()
    assert str(plan).count("attend ") == 2
    assert all(b.type.numel < B * H * T * T for b in plan.buffers)
    monkeypatch.setattr(attention, "LARGE", 1 << 40)
    written, plan = run()
    assert "attend" not in str(plan)
    torch.testing.assert_close(found, written, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("heads", [1, H])
def test_dropout_at_its_edges(p, heads):
    """Also of heads that share keys; all weights, some of them, or none are left."""
    q, k, v = (randn(B, n, T, D).requires_grad_() for n in (H, heads, heads))
    other = randn(B, H, T, D)

    def step():
        out = F.scaled_dot_product_attention(q, k, v, SOME, dropout_p=p, enable_gqa=True)
        return out.detach(), *torch.autograd.grad((out * other).sum(), (q, k, v))

    compiled = tracejit.compile(step, on_unsupported="raise")
    for call in range(4):
        torch.manual_seed(call)
        eager = step()
        after = torch.rand(3)
        torch.manual_seed(call)
        torch.testing.assert_close(compiled(), eager, rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.rand(3), after)
    assert compiled.stats.replays
    if p < 1:
        large = [b for b in compiled.plans[-1].buffers if b.type.numel >= B * H * T * T]
        assert [b.type.dtype.name for b in large] == ["b1"] * (p > 0)


def test_dropout_in_evaluation():
    """A module that is switched to and fro."""
    attend = nn.MultiheadAttention(12, H, dropout=0.4, batch_first=True)
    x = randn(B, T, 12)

    def step():
        attend.zero_grad()
        loss = attend(x, x, x, need_weights=False)[0].square().mean()
        loss.backward()
        return loss.detach(), attend.in_proj_weight.grad

    compiled = tracejit.compile(step, on_unsupported="raise")
    for call in range(8):
        attend.train(call // 2 % 2 == 0)
        torch.manual_seed(call)
        eager = [y.clone() for y in step()]
        torch.manual_seed(call)
        torch.testing.assert_close([*compiled()], eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_on_a_gpu_keeps_no_scores_however_few(causal, monkeypatch):
    monkeypatch.setattr(attention, "LARGE", 1 << 40)
    q, k, v = (randn(B, n, T, D).requires_grad_() for n in (H, 1, 1))
    other = randn(B, H, T, D)

    def step():
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=0.3, is_causal=causal, enable_gqa=True
        )
        return out.detach(), *torch.autograd.grad((out * other).sum(), (q, k, v))

    on_cpu = graph_of(step)
    with posing(lambda x: "cuda:0"):
        graph = graph_of(step)
    assert primitives(graph) == PRIMITIVES and not primitives(on_cpu)
    buffers = [b for b in schedule(graph, gpu=True).buffers if b.type.numel >= B * H * T * T]
    assert [(b.kind, b.type.dtype.name) for b in buffers] == [("input", "b1")]
    inputs = make_inputs(on_cpu)
    for mine, right in zip(*(evaluate(g, inputs)[0] for g in (graph, on_cpu)), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("randomness", ["eager", "fast"])
def test_kernels_keep_the_limits(target, randomness):
    """Half types with dropout on tensor cores, forward and backward, without spills."""
    pytest.importorskip("triton")
    q, k, v = (randn(2, 4, 128, 64).bfloat16().requires_grad_() for _ in range(3))

    def step():
        a = (q @ k.mT * 0.125).masked_fill(torch.ones(128, 128).tril() == 0, -math.inf)
        y = F.dropout(a.softmax(-1), 0.1) @ v
        return y.detach(), *torch.autograd.grad(y.float().square().sum(), (q, k, v))

    compiled = tracejit.compile(step, randomness=randomness)
    compiled()
    found = report(compiled, target=target)
    assert not list(limits(found))
    rows = [row for row in found.rows if row.form == "attention"]
    tensor = {80: "mma", 90: "wgmma", 100: "wgmma"}[target]
    assert len(rows) == 2 and all(getattr(row.facts, tensor) for row in rows)
    assert not sum(row.facts.spills for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
@pytest.mark.parametrize("target", [80, 90, 100])
def test_kernels_in_float32_spill_nothing(target):
    pytest.importorskip("triton")
    q, k, v = (randn(2, 4, 128, 64).requires_grad_() for _ in range(3))

    def step():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (q, k, v))

    compiled = tracejit.compile(step)
    compiled()
    rows = [row for row in report(compiled, target=target).rows if row.form == "attention"]
    assert len(rows) == 2 and not sum(row.facts.spills for row in rows)


def test_few_scores_that_are_dropped_stay(monkeypatch):
    monkeypatch.setattr(attention, "LARGE", B * H * T * T + 1)
    assert not primitives(graph_of(training(DROPPED["dropout"])))
