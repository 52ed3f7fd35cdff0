"""Logits of a large vocabulary, which are computed some rows at a time: what matches, what it
gives, and that no buffer of their size is in a plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tracejit
from support.capture_checks import randn
from support.fake import warm
from tracejit.capture.trace.posing import posing
from tracejit.ir.graph import verify
from tracejit.ir.text import parse
from tracejit.passes import optimize, vocabulary
from tracejit.passes.vocabulary import split_rows
from tracejit.schedule import schedule
from tracejit.schedule.plan import Plan
from tracejit.testing import assert_equal_to_eager, assert_trains_like_eager, fake_device

B, T, C, V = 2, 8, 12, 64
Tensor = torch.Tensor
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of h, w, bias and targets


@pytest.fixture
def small(monkeypatch):
    """Small logits are split as well."""
    monkeypatch.setattr(vocabulary, "LARGE", 1 << 10)
    monkeypatch.setattr(vocabulary, "ON_GPU", 1 << 10)
    monkeypatch.setattr(vocabulary, "ROWS", 4)
    monkeypatch.setattr(vocabulary, "LEAST", 2)


def logits(h, w, bias):
    return F.linear(h, w, bias).view(-1, V)


def entropy(**how: object) -> Loss:
    return lambda h, w, bias, y: F.cross_entropy(logits(h, w, bias), y.view(-1), **how)


def autocast(h, w, bias, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.cross_entropy(F.linear(h, w, bias).view(-1, V), y.view(-1))


def capped(h, w, bias, y):
    """By a number that may change from call to call."""
    return F.cross_entropy(SCALE.cap * torch.tanh(logits(h, w, bias) / SCALE.cap), y.view(-1))


def regularized(h, w, bias, y):
    z = logits(h, w, bias)
    return F.cross_entropy(z, y.view(-1)) + 0.01 * z.logsumexp(-1).square().mean()


def divergence(h, w, bias, y):
    logs = F.log_softmax(logits(h, w, bias), -1)
    return F.kl_div(logs, PROBABILITIES, reduction="batchmean")


def one_hot(h, w, bias, y):
    logs = F.log_softmax(logits(h, w, bias), -1)
    return -(logs * F.one_hot(y.view(-1).clamp(min=0), V)).sum(-1).mean()


class Scale:
    cap = 5.0


SCALE = Scale()
PROBABILITIES = randn(B * T, V).softmax(-1)
OF_CLASSES = torch.rand(V, generator=torch.Generator().manual_seed(1))

SPLIT: dict[str, Loss] = {
    "mean": entropy(),
    "sum": entropy(reduction="sum"),
    "each": lambda h, w, b, y: entropy(reduction="none")(h, w, b, y).square().mean(),
    "smoothed": entropy(label_smoothing=0.1),
    "weighted": entropy(weight=OF_CLASSES),
    "weighted and smoothed": entropy(weight=OF_CLASSES, label_smoothing=0.1),
    "another index ignored": lambda h, w, b, y: F.cross_entropy(
        logits(h, w, b), y.view(-1).clamp(min=0), ignore_index=0
    ),
    "no bias": lambda h, w, b, y: F.cross_entropy(logits(h, w, None), y.view(-1)) + 0 * b.sum(),
    "a product": lambda h, w, b, y: F.cross_entropy((h @ w.T + b).view(-1, V), y.view(-1)),
    "by the weight": lambda h, w, b, y: F.cross_entropy(
        (w @ h.view(-1, C).T).T + b, y.view(-1), reduction="sum"
    ),
    "einsum": lambda h, w, b, y: F.cross_entropy(
        (torch.einsum("btc,vc->btv", h, w) + b).view(-1, V), y.view(-1)
    ),
    "shifted": lambda h, w, b, y: F.cross_entropy(
        F.linear(h, w, b)[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)
    ),
    "classes in the middle": lambda h, w, b, y: F.cross_entropy(
        F.linear(h, w, b).transpose(1, 2), y
    ),
    "nll": lambda h, w, b, y: F.nll_loss(F.log_softmax(logits(h, w, b), -1), y.view(-1)),
    "double": lambda h, w, b, y: F.cross_entropy(
        logits(h.double(), w.double(), b.double()), y.view(-1)
    ),
    "linear_cross_entropy": lambda h, w, b, y: F.linear_cross_entropy(
        h.view(-1, C), w, y.view(-1), linear_bias=b
    ),
    "autocast": autocast,
    "capped": capped,
    "regularized": regularized,
    "one hot": one_hot,
}


def inputs() -> tuple[Tensor, ...]:
    y = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    y[0, 1] = y[1, 5] = -100
    return *(randn(*s).requires_grad_() for s in ((B, T, C), (V, C), (V,))), y


def training(loss: Loss) -> Callable:
    h, w, bias, y = inputs()

    def step():
        for x in (h, w, bias):
            x.grad = None
        value = loss(h, w, bias, y)
        value.backward()
        return value.detach(), h.grad, w.grad, bias.grad

    return step


def large(plan: Plan, elements: int) -> list[str]:
    """The buffers of as many elements that the plan has for itself."""
    found = (b for b in plan.buffers if b.kind in ("arena", "row"))
    return [str(b.type) for b in found if b.type.numel >= elements]


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.sweep(0.34)
def test_losses(name, small):
    """Equal to eager in replay; the largest buffer has the rows of a part."""
    step = training(SPLIT[name])
    eager = [x.clone() for x in step()]
    compiled = tracejit.compile(step, on_unsupported="raise")
    for _ in range(5):
        found = compiled()
    assert compiled.stats.replays
    wide = name == "autocast"
    torch.testing.assert_close(
        [*found], eager, rtol=2**-7 if wide else 1e-5, atol=2**-7 if wide else 1e-6
    )
    plan = compiled.plans[-1]
    assert plan.loops and "in loop" in str(plan)
    assert not large(plan, B * (T - 1) * V)


@pytest.mark.parametrize("name", ["mean", "weighted and smoothed", "autocast", "shifted", "double"])
def test_losses_in_lockstep(name, small):
    h, w, bias, y = inputs()

    def step(h, w, bias):
        value = SPLIT[name](h, w, bias, y)
        value.backward()
        return value.detach()

    def arguments():
        return tuple(x.detach().clone().requires_grad_() for x in (h, w, bias))

    assert_equal_to_eager(step, arguments)


STAYS: dict[str, Loss] = {
    "probabilities": lambda h, w, b, y: F.cross_entropy(logits(h, w, b), PROBABILITIES),
    "divergence": divergence,
    "what comes back depends on all rows": lambda h, w, b, y: entropy()(h, w, b, y).square(),
    "no number of parts": lambda h, w, b, y: F.cross_entropy(logits(h, w, b)[:13], y.view(-1)[:13]),
    "a softmax of columns": lambda h, w, b, y: logits(h, w, b).log_softmax(0).square().mean(),
    "no softmax": lambda h, w, b, y: logits(h, w, b).square().mean(),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name, small):
    step = training(STAYS[name])
    eager = [x.clone() for x in step()]
    compiled = tracejit.compile(step, on_unsupported="raise")
    for _ in range(4):
        found = compiled()
    torch.testing.assert_close([*found], eager, rtol=1e-5, atol=1e-6)
    assert not compiled.plans[-1].loops


def test_logits_that_are_returned_stay(small):
    h, w, bias, y = inputs()

    def step(h, w, bias):
        z = logits(h, w, bias)
        loss = F.cross_entropy(z, y.view(-1))
        loss.backward()
        return loss.detach(), z.detach()

    assert not schedule(optimize(tracejit.capture(step, h, w, bias).graph)).loops


def test_without_gradients(small):
    """What is kept of a part is the losses of its rows."""
    h, w, bias, y = inputs()

    @torch.no_grad()
    def step():
        return F.cross_entropy(logits(h, w, bias), y.view(-1))

    compiled = tracejit.compile(step)
    for _ in range(4):
        found = compiled()
    torch.testing.assert_close(found, step())
    plan = compiled.plans[-1]
    assert plan.loops == (2,) and not large(plan, B * T * V)


class Tied(nn.Module):
    """Its first weight is its last one."""

    def __init__(self, vocabulary: int = 96, width: int = 16):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.tokens(x))))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tied_weights_train_like_eager(accumulate, small):
    def make_step():
        torch.manual_seed(0)
        model, x = Tied(), torch.randint(0, 96, (2, 2, 16))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

        def step():
            optimizer.zero_grad()
            for part in x[:accumulate]:
                z = model(part)
                loss = F.cross_entropy(z.view(-1, z.size(-1)), part.flatten()) / accumulate
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        return step, list(model.parameters())

    compiled, _, _ = assert_trains_like_eager(make_step, calls=12)
    plan = compiled.plans[-1]
    assert compiled.stats.replays and len(plan.loops) == accumulate
    assert not large(plan, 32 * 96)


def test_by_numpy(small):
    step = training(SPLIT["smoothed"])
    eager = [x.clone() for x in step()]
    compiled = tracejit.compile(step, backend="numpy")
    for _ in range(3):
        found = compiled()
    torch.testing.assert_close([*found], eager, rtol=1e-5, atol=1e-6)
    assert compiled.plans[-1].loops


def test_on_the_fake_device(small):
    step = training(SPLIT["mean"])
    eager = [x.clone() for x in step()]
    with fake_device(compiled=False):
        again = warm(training(SPLIT["mean"]), calls=5)
        torch.testing.assert_close([*again()], eager, rtol=1e-5, atol=1e-6)
        assert again.plans[-1].loops


def test_the_gradient_of_the_weight_is_added_up_where_it_belongs(small):
    """In the memory of the result, which is no arena; so it is in memory once."""
    h, w, bias, y = inputs()

    def step(h, w, bias):
        loss = entropy()(h, w, bias, y)
        loss.backward()
        return loss.detach()

    plan = schedule(optimize(tracejit.capture(step, h, w, bias).graph))
    assert not large(plan, V * C)
    fused = schedule(optimize(tracejit.capture(step, h, w, bias).graph), fuse=False)
    assert fused.loops == plan.loops


# ---- sizes


def plan_of(rows: int, classes: int) -> Plan:
    """Of the last layer of a language model, as many rows and classes."""
    h, w = torch.zeros(rows, 16, requires_grad=True), torch.zeros(classes, 16, requires_grad=True)
    y = torch.zeros(rows, dtype=torch.int64)

    def step(h, w, y):
        loss = F.cross_entropy(F.linear(h, w), y)
        loss.backward()
        return loss.detach()

    return schedule(optimize(tracejit.capture(step, h, w, y).graph))


@pytest.mark.parametrize(
    ("rows", "classes", "parts"),
    [(512, 8192, None), (512, 16384, 2), (512, 50257, 2), (2048, 32000, 8), (1000, 50257, 4)],
)
def test_which_sizes_are_split(rows, classes, parts):
    plan = plan_of(rows, classes)
    assert plan.loops == (() if parts is None else (parts,))
    assert bool(large(plan, rows * classes)) == (parts is None)
    if parts:
        assert f"f32[{rows},{classes}]" not in str(plan)
        assert plan.arena_bytes < 1.1 * rows * classes * 4 / parts + (1 << 20)


def test_rows_of_several_axes():
    """Of a graph's text: rows in the middle of what is computed, a bool beside them."""
    text = """
    f(%0: f32[512,8], %1: f32[8,20000], %2: b1[512]) {
      %3: f32[512,20000] = matmul(%0, %1)
      %4: f32[4,128,20000] = reshape(%3, shape=(4, 128, 20000))
      %5: f32[128,4,20000] = permute(%4, axes=(1, 0, 2))
      %6: f32[4,128] = reduce_max(%4, axes=(2,))
      %7: f32[512] = reshape(%6, shape=(512,))
      %8: f32[512] = where(%2, %7, 0.0)
      return %8
    }"""
    graph = parse(text)
    split = split_rows(graph)
    verify(split)
    (loop,) = (n for n in split.nodes if n.op.name == "scan")
    assert loop.attr("steps") == 2 and split.nodes[-1].op.name == "where"
    moved = text.replace("reduce_max(%4, axes=(2,))", "reduce_max(%9, axes=(2,))").replace(
        "      %6", "      %9: f32[4,128,20000] = permute(%5, axes=(1, 0, 2))\n      %6"
    )
    verify(split_rows(parse(moved)))
    returned = text.replace("return %8", "return %8, %4")
    assert split_rows(parse(returned)) == parse(returned)


@pytest.mark.parametrize("rows, on_cpu, on_gpu", [(4096, (16,), (2,)), (1024, (4,), ())])
def test_parts_are_larger_on_a_gpu(rows, on_cpu, on_gpu):
    """Each part reads the weight twice and adds to its gradient. Nothing is computed here."""
    h, w, y = torch.zeros(rows, 8), torch.zeros(32768, 8), torch.zeros(rows, dtype=torch.int64)
    w.requires_grad_()

    def step():
        w.grad = None
        F.cross_entropy(h @ w.T, y).backward()

    for place, parts in (("cpu", on_cpu), ("cuda:0", on_gpu)):
        with posing(lambda _, place=place: place):
            graph = tracejit.capture(step).optimized().graph
        assert schedule(graph).loops == parts
