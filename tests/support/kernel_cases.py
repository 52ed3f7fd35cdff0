"""Steps that are known to be hard for kernels, as plans: captured, and scheduled, but never run.

Small programs say little about a GPU. These have the sizes of real ones, so each stands for a kind
of launch: long reductions of columns, few tiles and many steps, rows of odd length, large streams.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import tracejit
from tracejit.schedule import schedule
from tracejit.schedule.plan import Plan


def zeros(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    """Memory that nobody touches costs nothing."""
    return torch.zeros(shape, dtype=dtype, requires_grad=grad)


def of_loss(function: Callable, *leaves: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A step: fresh gradients of a function's sum of squares."""

    def step() -> torch.Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = function(*leaves).pow(2).sum()
        loss.backward()
        return loss.detach()

    return step


def embedding(words: int = 32000, width: int = 512, n: int = 1024) -> Callable:
    ids = torch.zeros(n, dtype=torch.int64)
    return of_loss(lambda w: F.embedding(ids, w), zeros(words, width, grad=True))


def column_sums(n: int = 4096, width: int = 768) -> Callable:
    x = zeros(n, width)
    return lambda: x.sum(0)


def product(m: int, k: int, n: int, *batch: int) -> Callable:
    a, b = zeros(*batch, m, k), zeros(*batch, k, n)
    return lambda: a @ b


def chain(n: int = 1 << 26) -> Callable:
    x, y = zeros(n), zeros(n)
    return lambda: (x.clamp(min=0) - y).pow(2).sum()


def cross_entropy(n: int = 1024, words: int = 50257) -> Callable:
    labels = torch.zeros(n, dtype=torch.int64)
    logits = zeros(n, words, grad=True)
    return of_loss(lambda x: F.cross_entropy(x, labels), logits)


def softmax(n: int = 1024, width: int = 50257) -> Callable:
    return of_loss(lambda x: torch.softmax(x, -1), zeros(n, width, grad=True))


def ordered(n: int, width: int, first: int) -> Callable:
    """The first elements of rows, or all of them in order."""
    x = zeros(n, width)
    return lambda: x.topk(first) if first < width else x.sort(-1)


def layer_norm(n: int = 1024, width: int = 4096) -> Callable:
    w, b = zeros(width, grad=True), zeros(width, grad=True)
    x = zeros(n, width, grad=True)
    return of_loss(lambda x, w, b: F.layer_norm(x, (width,), w, b), x, w, b)


def perceptron(width: int, n: int, dtype: torch.dtype) -> Callable:
    w1 = zeros(width, width, dtype=dtype, grad=True)
    w2 = zeros(width, width, dtype=dtype, grad=True)
    x = zeros(n, width, dtype=dtype)
    return of_loss(lambda a, b: F.linear(F.relu(F.linear(x, a)), b), w1, w2)


CASES: dict[str, Callable[[], Callable]] = {
    "embedding 32000x512, 1024 ids": embedding,
    "column sums 4096x768": column_sums,
    "product 512x50257x256": partial(product, 512, 50257, 256),
    "attention 96 of 512x64x512": partial(product, 512, 64, 512, 96),
    "chain and sum of 64M": chain,
    "cross entropy 1024x50257": cross_entropy,
    "layer norm 1024x4096": layer_norm,
    "softmax 1024x50257": softmax,
    "sort 64x4096": partial(ordered, 64, 4096, 4096),
    "topk 50 of 64x50257": partial(ordered, 64, 50257, 50),
    "two layers of 4096, bf16": partial(perceptron, 4096, 4096, torch.bfloat16),
}


def plan_of(name: str) -> Plan:
    """The plan of a case, for a GPU."""
    return schedule(tracejit.capture(CASES[name]()).optimized().graph, gpu=True)
