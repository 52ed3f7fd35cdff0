"""One table of whole programs: the examples, and small networks that the examples leave out.

Several tests run over all of it: equality with eager, texts that parse back, kernel reports. A
`make` gives a fresh step without arguments and the tensors that it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

import tracejit
from examples import (
    classifier,
    custom_relu,
    fused_chain,
    loss_outside,
    modules,
    recurrence,
    transformer_block,
    two_layer_autograd,
    two_layer_manual,
)
from tracejit.schedule.plan import Plan

Made = tuple[Callable[[], object], Sequence[torch.Tensor]]
TWO_LAYER = {"n": 37, "d_in": 70, "h": 45, "d_out": 33}  # several tiles a side, none full


@dataclass(frozen=True)
class Program:
    """`make(**small)` is of sizes for Triton's interpreter. The limits are those of one call."""

    make: Callable[..., Made]
    launches: int
    bytes: int
    small: Mapping[str, object] = field(default_factory=dict)


def loss_and_backward(**sizes: int) -> Made:
    """Program 8: only the loss is compiled, and `plans_of` calls its backward outside."""
    n = sizes.pop("n", loss_outside.N)
    loss_fn, parameters = loss_outside.make_loss(**sizes)
    d_in, d_out = parameters[0].shape[0], parameters[1].shape[1]
    x, y = loss_outside.make_batch(n, d_in, d_out)

    def step() -> torch.Tensor:
        return loss_fn(x, y)

    return step, parameters


def rows(function: Callable, n: int = 512, width: int = 1000, **options: object) -> Made:
    """Forward and backward of one function of rows."""
    torch.manual_seed(0)
    x, g = torch.randn(n, width, requires_grad=True), torch.randn(n, width)

    def step() -> torch.Tensor:
        x.grad = None
        y = function(x, **options)
        y.backward(g)
        return y.detach()

    return step, [x]


def layer_norm(n: int = 512, width: int = 1000) -> Made:
    """Forward and backward of a layer norm with weight and bias."""
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(width)
    x, g = torch.randn(n, width, requires_grad=True), torch.randn(n, width)
    leaves = [x, *norm.parameters()]

    def step() -> torch.Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = norm(x)
        y.backward(g)
        return y.detach()

    return step, leaves


def trained(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor], lr: float = 0.01) -> Made:
    """A step of SGD, and parameters and buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss

    return step, [*model.parameters(), *model.buffers()]


def batch_norm(n: int = 128, width: int = 96, classes: int = 10) -> Made:
    """A classifier with batch norms of two ranks, whose running statistics are written."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(width, width),
        torch.nn.BatchNorm1d(width),
        torch.nn.SiLU(),
        torch.nn.Unflatten(1, (-1, 4)),
        torch.nn.BatchNorm1d(width // 4, affine=False, momentum=0.3),
        torch.nn.Flatten(),
        torch.nn.Linear(width, classes),
    )
    x, labels = torch.randn(n, width), torch.randint(0, classes, (n,))
    return trained(model, lambda: F.cross_entropy(model(x), labels, label_smoothing=0.1))


class Language(torch.nn.Module):
    """Embedding, rms norm, attention by einsum under a causal mask, and logits."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.words = torch.nn.Embedding(words, width)
        self.norm = torch.nn.RMSNorm(width)
        self.all = torch.nn.Linear(width, 3 * width, bias=False)
        self.logits = torch.nn.Linear(2 * width, words)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.words(x)
        q, k, v = self.all(self.norm(h)).chunk(3, dim=-1)
        scores = torch.einsum("bid,bjd->bij", q, k) * h.shape[-1] ** -0.5
        future = torch.ones(x.shape[1], x.shape[1]).triu(1) > 0
        mixed = torch.einsum("bij,bjd->bid", scores.masked_fill(future, -1e9).softmax(-1), v)
        return self.logits(torch.cat([h, mixed], dim=-1))


def language(batch: int = 4, length: int = 32, words: int = 100, width: int = 64) -> Made:
    """One word from those before it."""
    torch.manual_seed(0)
    model = Language(words, width)
    text = torch.randint(0, words, (batch, length + 1))

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    return trained(model, loss)


def narrow(dtype: torch.dtype = torch.bfloat16, n: int = 64, width: int = 128) -> Made:
    """A network of bf16 or f16 throughout."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(width, width),
        torch.nn.GELU(),
        torch.nn.LayerNorm(width),
        torch.nn.Linear(width, width),
    ).to(dtype)
    x, y = torch.randn(n, width, dtype=dtype), torch.randn(n, width, dtype=dtype)
    return trained(model, lambda: F.mse_loss(model(x), y))


def double(n: int = 32, width: int = 48) -> Made:
    """float64, group norm, smooth losses and statistics."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.Tanh(), torch.nn.GroupNorm(4, width)
    ).double()
    x, y = torch.randn(n, width, dtype=torch.float64), torch.randn(n, width, dtype=torch.float64)

    def loss() -> torch.Tensor:
        out = model(x)
        spread = out.var(0).sum() + out.logsumexp(1).mean() + torch.linalg.vector_norm(out)
        return F.huber_loss(out, y) + F.smooth_l1_loss(out, y) + 0.01 * spread

    return trained(model, loss)


def indexing(n: int = 64, width: int = 50) -> Made:
    """Elements picked, moved and put together, and the gradients back to where they came from."""
    torch.manual_seed(0)
    w = torch.randn(n, width, requires_grad=True)
    at, rows = torch.randint(0, width, (n, 7)), torch.randint(0, n, (n // 2,))

    def step() -> torch.Tensor:
        w.grad = None
        top, where = w.max(dim=1)
        parts = [w.gather(1, at), w.flip(1)[:, :5], w.roll(2, 0)[:, 3:9], top[:, None]]
        picked = torch.cat([torch.cat(parts, 1), F.pad(w[:, :4], (6, 9))])
        chosen = w.index_select(0, rows).cumsum(1) + w[rows, where[rows]][:, None]
        loss = picked.pow(2).sum() + chosen.tanh().sum() + w.tril().amax()
        loss.backward()
        return loss.detach() + w.argmin()

    return step, [w]


_ROWS = {"n": 9, "width": 33}
_BLOCK = {"batch": 2, "length": 5, "width": 24, "heads": 2}

# Limits: what is promised of these programs, else what they take now and some room.
PROGRAMS = {
    "1 manual": Program(two_layer_manual.make_step, 6, 2_400_000, TWO_LAYER),
    **{
        f"2 {v}": Program(partial(two_layer_autograd.make_step, v), 6, 3_400_000, TWO_LAYER)
        for v in (*two_layer_autograd.UPDATES, "grad")
    },
    "3 chain": Program(fused_chain.make_step, 1, 48_000_004, {"n": 40_001}),
    **{
        f"4 {style}": Program(partial(custom_relu.make_step, style), 6, 3_400_000, TWO_LAYER)
        for style in custom_relu.STYLES
    },
    **{
        f"5 {v}": Program(partial(modules.make_step, v), 6, 2_900_000, TWO_LAYER)
        for v in modules.VARIANTS
    },
    "6 recurrence": Program(recurrence.make_step, 1, 36_004, {"n": 300}),
    "7 linear fit": Program(classifier.make_linear_fit, 2, 1_700),
    "7 classifier": Program(
        classifier.make_step, 10, 25_000_000, {"batch": 9, "sizes": (33, 20, 5)}
    ),
    "8 loss outside": Program(loss_and_backward, 6, 2_000_000, TWO_LAYER),
    "9 transformer": Program(transformer_block.make_step, 24, 25_000_000, _BLOCK),
    "softmax": Program(partial(rows, torch.softmax, dim=-1), 2, 8_192_000, _ROWS),
    "log softmax": Program(partial(rows, torch.log_softmax, dim=-1), 2, 8_192_000, _ROWS),
    "layer norm": Program(layer_norm, 3, 16_000_000, _ROWS),
    "batch norm": Program(batch_norm, 12, 2_200_000, {"n": 9, "width": 12, "classes": 5}),
    "language": Program(
        language, 20, 3_500_000, {"batch": 2, "length": 5, "words": 11, "width": 8}
    ),
    "bf16": Program(narrow, 8, 1_200_000, {"n": 9, "width": 20}),
    "f16": Program(partial(narrow, torch.float16), 8, 1_200_000, {"n": 9, "width": 20}),
    "double": Program(double, 9, 620_000, {"n": 9, "width": 12}),
    "indexing": Program(indexing, 10, 290_000, {"n": 10, "width": 12}),
}

CALLS = 3  # until the plan is the one that stays


def plans_of(name: str, *, small: bool = False, **options: object) -> tuple[Plan, ...]:
    """The plans that a call of a program runs once it is warm, backward outside included."""
    program = PROGRAMS[name]
    step, parameters = program.make(**(program.small if small else {}))
    compiled = tracejit.compile(step, **options)
    for _ in range(CALLS):
        out = compiled()
        if name.startswith("8"):
            for w in parameters:
                w.grad = None
            out.backward()
    return (compiled.plans[-1], *compiled.backward_plans)
