"""Attention that is written out: masks, and a step and its graph for each spelling."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

import tracejit
from support.capture_checks import randn
from tracejit.ir.graph import Graph
from tracejit.passes import optimize

B, H, T, D = 2, 3, 11, 4
SCALE = 1 / math.sqrt(D)
Tensor = torch.Tensor
Form = Callable[[Tensor, Tensor, Tensor], Tensor]
PRIMITIVES = ["attention", "attention_dk", "attention_dq", "attention_dv", "attention_lse"]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def weighed(a: Tensor, v: Tensor) -> Tensor:
    return F.softmax(a, dim=-1) @ v


TRIANGLE = torch.ones(T, T).tril().view(1, 1, T, T)
PADDED = torch.arange(T) < torch.tensor([7, 11])[:, None]  # of B, T
EMPTY = torch.arange(T) < torch.tensor([0, 9])[:, None]  # the first one sees no key
SOME = torch.ones(T, T, dtype=torch.bool).tril(-1)  # the first query sees no key
OF_HEADS = randn(1, H, T, T)
LOWEST = torch.finfo(torch.float32).min


def lowest(mask: Tensor) -> Tensor:
    return (1.0 - mask[:, None, None].float()) * LOWEST


def training(form: Form) -> Callable:
    q, k, v = (randn(B, H, T, D, i + 1)[..., i].requires_grad_() for i in range(3))
    other = randn(B, H, T, D)

    def step():
        q.grad = k.grad = v.grad = None
        out = form(q, k, v)
        (out * other).sum().backward()
        return out.detach(), q.grad, k.grad, v.grad

    return step


def graph_of(step: Callable, *args: object) -> Graph:
    return optimize(tracejit.capture(step, *args).graph)


def primitives(graph: Graph) -> list[str]:
    return sorted(n.op.name for n in graph.nodes if n.op.family == "attention")
