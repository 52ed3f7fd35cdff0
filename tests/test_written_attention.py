"""Attention that is written out, and becomes a primitive: spellings, masks, and what must stay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tracejit
from support.attention_forms import (
    EMPTY,
    LOWEST,
    OF_HEADS,
    PADDED,
    PRIMITIVES,
    SCALE,
    SOME,
    TRIANGLE,
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
    weighed,
)
from support.capture_checks import randn
from support.fake import warm
from tracejit.passes import attention
from tracejit.schedule import schedule
from tracejit.testing import assert_equal_to_eager, assert_trains_like_eager, fake_device

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few scores are left out as well."""
    monkeypatch.setattr(attention, "LARGE", 1)


class Scale:
    of = 0.3


NUMBERS = Scale()


def nano(q, k, v):
    a = scores(q, k).masked_fill(TRIANGLE[:, :, :T, :T] == 0, -math.inf)
    return weighed(F.dropout(a, 0.1, False), v)


def bmm(q, k, v):
    q, k, v = (x.reshape(B * H, -1, D) for x in (q, k, v))
    return torch.bmm(torch.bmm(q * SCALE, k.transpose(1, 2)).softmax(-1), v).view(B, H, -1, D)


def einsum(q, k, v):
    a = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(D)
    return torch.einsum("bhqk,bhkd->bhqd", a.softmax(-1), v)


def heads_last(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    a = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D)
    return torch.einsum("bhqk,bkhd->bqhd", a.softmax(-1), v).transpose(1, 2)


def inline_triangle(q, k, v):
    mask = torch.tril(torch.ones(T, T, device=q.device))
    return weighed(scores(q, k).masked_fill(mask == 0, -math.inf), v)


def compared_positions(q, k, v):
    i = torch.arange(T)
    return weighed(torch.where(i[:, None] >= i, scores(q, k), -1e9), v)


def added_triangle(q, k, v):
    return weighed(scores(q, k) + torch.full((T, T), -math.inf).triu(1), v)


def hidden(mask: Tensor, number: float) -> Form:
    return lambda q, k, v: weighed(scores(q, k).masked_fill(~mask, number), v)


def added(bias: Tensor) -> Form:
    return lambda q, k, v: weighed(torch.matmul(q, k.mT) / math.sqrt(D) + bias, v)


FORMS: dict[str, Form] = {
    "plain": lambda q, k, v: weighed(scores(q, k), v),
    "no scale": lambda q, k, v: weighed(q @ k.mT, v),
    "scaled before": lambda q, k, v: weighed((q * SCALE) @ k.mT, v),
    "both scaled": lambda q, k, v: weighed((q * 0.7) @ (k * 0.7).mT, v),
    "divided": lambda q, k, v: weighed(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D), v),
    "a number that may change": lambda q, k, v: weighed(q @ k.mT * NUMBERS.of, v),
    "divided by such a number": lambda q, k, v: weighed(q @ k.mT / NUMBERS.of, v),
    "nano": nano,
    "bmm": bmm,
    "einsum": einsum,
    "heads last": heads_last,
    "inline triangle": inline_triangle,
    "compared positions": compared_positions,
    "added triangle": added_triangle,
    "where": lambda q, k, v: weighed(
        torch.where(PADDED[:, None, None], scores(q, k), -math.inf), v
    ),
    "padded": hidden(PADDED[:, None, None], -math.inf),
    "padded, finite": hidden(PADDED[:, None, None], -1e9),
    "padded, lowest": hidden(PADDED[:, None, None], LOWEST),
    "a sequence of no keys": hidden(EMPTY[:, None, None], -math.inf),
    "a sequence of no keys, finite": hidden(EMPTY[:, None, None], -1e9),
    "a query of no keys": hidden(SOME, -math.inf),
    "a query of no keys, finite": hidden(SOME, -1e9),
    "added": added(lowest(PADDED)),
    "added, no keys": added(lowest(EMPTY)),
    "added infinity": added(torch.zeros(T, T).masked_fill(~SOME, -math.inf)),
    "a bias of heads": added(OF_HEADS),
    "two masks": lambda q, k, v: weighed(
        (scores(q, k) + lowest(PADDED)).masked_fill(TRIANGLE == 0, -math.inf), v
    ),
    "scaled after the mask": lambda q, k, v: weighed((q @ k.mT + OF_HEADS) * SCALE, v),
    "shared heads": lambda q, k, v: weighed(
        scores(q, k[:, :1].expand_as(k)), v[:, :1].repeat_interleave(H, 1)
    ),
    "values of another width": lambda q, k, v: weighed(scores(q, k), torch.cat((v, v), -1))[
        ..., 1 : 1 + D
    ],
    "fewer queries": lambda q, k, v: F.pad(weighed(scores(q[:, :, :5], k), v), (0, 0, 0, T - 5)),
    "one head": lambda q, k, v: weighed(scores(q[0, 0], k[0, 0]), v[0, 0]).expand(B, H, T, D),
    "double": lambda q, k, v: weighed(scores(q.double(), k.double()), v.double()).float(),
    "the same for all": lambda q, k, v: weighed(scores(q, q), q) + k + v,
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.sweep(2)
def test_forms(name):
    """Equal to eager in replay, also where a row sees no key; nothing of the scores' size."""
    step = training(FORMS[name])
    eager = [x.clone() for x in step()]
    graph = graph_of(step)
    assert primitives(graph) == PRIMITIVES
    compiled = tracejit.compile(step, on_unsupported="raise")
    for _ in range(4):
        found = compiled()
    assert compiled.stats.replays
    torch.testing.assert_close([*found], eager, equal_nan=True, rtol=1e-4, atol=1e-5)
    one = "one head" in name
    size = (1 if one else B * H) * (5 if name == "fewer queries" else T) * T
    plan = compiled.plans[-1]
    assert all(b.type.numel < size for b in plan.buffers if b.kind == "arena")
    if "triangle" in name and "added" not in name or name == "compared positions":
        (node,) = (n for n in graph.nodes if n.op.name == "attention")
        assert node.attr("causal") and node.args[3] == 0.0


# ---- half types

HALF = [n for n in FORMS if n not in ("double", "a number that may change")]
HALF = [n for n in HALF if n not in ("divided by such a number", "both scaled", "scaled before")]
# what is added is float32, which eager takes under autocast only
WIDE = [n for n in HALF if n.startswith("added") or n in ("a bias of heads", "two masks")]
WIDE.append("scaled after the mask")
# numbers that are not of these types
TOO_LARGE = {
    torch.bfloat16: ("padded, lowest",),
    torch.float16: ("padded, lowest", "padded, finite", "compared positions")
    + ("a query of no keys, finite", "a sequence of no keys, finite"),
}


def exact(form: Form, q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> list[Tensor]:
    """The result and the gradients in float64."""
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = form(*wide)
    return [out.detach(), *torch.autograd.grad((out * other).sum(), wide)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("auto", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", HALF)
@pytest.mark.sweep(6)
def test_half_types(name, auto, dtype):
    """No less exact than eager, and still the primitives; they round results only."""
    if name in TOO_LARGE[dtype] or (name in WIDE and not auto):
        pytest.skip("eager does not take it")
    kind = torch.float32 if auto else dtype
    q, k, v = (randn(B, H, T, D, i + 1)[..., i].to(kind).requires_grad_() for i in range(3))
    other = randn(B, H, T, D)

    def step():
        with torch.autocast("cpu", dtype, enabled=auto):
            out = FORMS[name](q, k, v)
        return out.detach(), *torch.autograd.grad((out.float() * other).sum(), [q, k, v])

    assert primitives(graph_of(step)) == PRIMITIVES
    eager, compiled = step(), tracejit.compile(step, on_unsupported="raise")
    for _ in range(3):
        found = compiled()
    assert compiled.stats.replays
    eps = torch.finfo(dtype).eps
    for ours, his, right in zip(found, eager, exact(FORMS[name], q, k, v, other), strict=True):
        assert ours.dtype is his.dtype
        assert torch.equal(ours.isnan(), his.isnan())
        ours, his, right = (x.double().nan_to_num() for x in (ours, his, right))
        wrong, allowed = (ours - right).norm(), (his - right).norm()
        assert wrong <= 1.5 * allowed + 4 * eps * right.norm()


def test_a_half_product_of_wide_scores_stays():
    """Weights are rounded where the user says so."""

    def step(q, k, v):
        return scores(q, k).softmax(-1).bfloat16() @ v.bfloat16()

    assert not primitives(graph_of(step, *(randn(B, H, T, D) for _ in range(3))))


# ---- in lockstep, and some gradients


@pytest.mark.parametrize("name", ["nano", "einsum", "padded, finite", "added", "bmm"])
def test_forms_in_lockstep(name):
    def step(q, k, v):
        out = FORMS[name](q, k, v)
        loss = out.square().sum()
        loss.backward()
        return loss.detach(), out.detach()

    def arguments():
        return tuple(torch.randn(B, H, T, D).requires_grad_() for _ in range(3))

    assert_equal_to_eager(step, arguments)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv", ""])
@pytest.mark.sweep(0.34)
def test_some_gradients(wanted):
    tensors = {name: randn(B, H, T, D + i)[..., :D] for i, name in enumerate("qkv")}

    def step(q, k, v):
        out = nano(q, k, v)
        if wanted:
            out.square().sum().backward()
        return out.detach()

    def arguments():
        return [x.clone().requires_grad_(name in wanted) for name, x in tensors.items()]

    found = primitives(graph_of(step, *arguments()))
    assert found == sorted(
        ["attention", *(f"attention_d{x}" for x in wanted), *["attention_lse"] * bool(wanted)]
    )
    ours, eager = arguments(), arguments()
    compiled = tracejit.compile(step)
    torch.testing.assert_close(compiled(*ours), step(*eager))
    for mine, his in zip(ours, eager, strict=True):
        if his.requires_grad:
            torch.testing.assert_close(mine.grad, his.grad)


def returned_weights(q, k, v):
    w = scores(q, k).softmax(-1)
    return w @ v + w.sum()


STAYS: dict[str, Form] = {
    "weights that are used": returned_weights,
    "scores that are used": lambda q, k, v: (lambda a: weighed(a, v) + a.mean())(scores(q, k)),
    "a softmax of columns": lambda q, k, v: scores(q, k).softmax(-2) @ v,
    "a bias with a gradient": lambda q, k, v: weighed(scores(q, k) + k.sum(-1)[..., None], v),
    "a number that hides little": hidden(PADDED[:, None, None], -2.0),
    "a negative scale": lambda q, k, v: weighed(q @ k.mT * -0.5, v),
    "one row of scores": lambda q, k, v: F.softmax(k[0, 0] @ q[0, 0, 0], -1) @ v[0, 0] + q + k + v,
    "a cap": lambda q, k, v: weighed(torch.tanh(scores(q, k)), v),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name):
    step = training(STAYS[name])
    torch.manual_seed(0)
    eager = [x.clone() for x in step()]
    assert not primitives(graph_of(step))
    compiled = tracejit.compile(step)
    for _ in range(3):
        torch.manual_seed(0)
        found = compiled()
    torch.testing.assert_close([*found], eager, rtol=1e-4, atol=1e-5)


def test_weights_that_are_returned_stay():
    def step(q, k, v):
        w = scores(q, k).softmax(-1)
        return w @ v, w

    assert not primitives(graph_of(step, *(randn(B, H, T, D) for _ in range(3))))


def test_few_scores_stay(monkeypatch):
    monkeypatch.setattr(attention, "LARGE", B * H * T * T + 1)
    assert not primitives(graph_of(training(nano)))


class Block(nn.Module):
    """nanoGPT's attention without its flash implementation, two layers of it."""

    def __init__(self, width: int = 24, heads: int = 3):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def forward(self, x):
        b, t, c = x.size()
        parts = self.c_attn(self.norm(x)).split(c, dim=2)
        q, k, v = (p.view(b, t, self.heads, c // self.heads).transpose(1, 2) for p in parts)
        a = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        a = a.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        y = (F.softmax(a, dim=-1) @ v).transpose(1, 2).contiguous().view(b, t, c)
        return x + self.c_proj(y)


def blocks():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(24, 5))
    x, y = torch.randn(2, 17, 24), torch.randint(5, (34,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).view(-1, 5), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, list(model.parameters())


def test_layers_train_like_eager():
    compiled, _, _ = assert_trains_like_eager(blocks, calls=20)
    assert compiled.stats.replays
    assert primitives(graph_of(blocks()[0])) == sorted(2 * PRIMITIVES)


def test_on_the_fake_device():
    """With kernels of Triton; they read no scores either."""
    step = training(FORMS["padded, finite"])
    eager = [x.clone() for x in step()]
    with fake_device(compiled=False):
        again = warm(training(FORMS["padded, finite"]), calls=5)
        torch.testing.assert_close([*again()], eager, rtol=1e-4, atol=1e-5)
        assert "attend" in str(again.plans[-1])


def test_plans_hold_no_scores():
    q, k, v = (torch.zeros(1, 2, 300, D, requires_grad=True) for _ in range(3))

    mask = torch.ones(1, 1, 1, 300, dtype=torch.bool)

    def step(q, k, v, mask):
        out = weighed(scores(q, k).masked_fill(~mask, -math.inf), v)
        out.sum().backward()
        return out.detach()

    assert "300,300" not in str(schedule(graph_of(step, q, k, v, mask)))
