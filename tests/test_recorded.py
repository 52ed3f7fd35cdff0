"""What a step remembers of its traces as text: events, where traces part, and the matchers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from support.proof_text import calls_of, matcher_text, remembered, source

TREES: dict[str, Callable] = {}
MATCHERS: dict[str, Callable] = {}


def tensors() -> SimpleNamespace:
    """x, a parameter w, and a counter."""
    return SimpleNamespace(
        x=torch.ones(5, 4),
        w=torch.ones(4, 3, requires_grad=True),
        count=torch.tensor(1.0),
        flag=False,
        kept=None,
    )


def tree(build: Callable) -> Callable:
    """A function of some tensors that returns the traces to remember: a step with its arguments,
    or something to call between two of them."""
    TREES[build.__name__] = build
    return build


def matcher(build: Callable) -> Callable:
    """A function of some tensors that returns a step; its last torch call is the one looked at."""
    MATCHERS[build.__name__] = build
    return build


@pytest.mark.parametrize("name", TREES)
def test_golden_trees(name, golden):
    build = TREES[name]
    golden(f"trail/tree_{name}.txt", source(build) + remembered(build(tensors())))


@pytest.mark.parametrize("name", MATCHERS)
def test_golden_matchers(name, golden):
    build = MATCHERS[name]
    call = calls_of(build(tensors()))[-1]
    golden(f"trail/matcher_{name}.txt", source(build) + matcher_text(call))


# ---- the events of a trace, and where two part


@tree
def a_training_step(s):
    def step():
        loss = (s.x @ s.w).pow(2).sum()
        loss.backward()
        with torch.no_grad():
            s.w -= 0.1 * s.w.grad
        s.w.grad = None
        return loss.detach()

    return [(step,), (step,)]


@tree
def a_branch(s):
    def step(more):
        h = s.x @ s.w
        if more:
            h = h.tanh()
        return h * 2

    return [(step, False), (step, True), (step, False)]


@tree
def another_literal(s):
    def step(n):
        return (s.x * n).sum()

    return [(step, 2), (step, 3), (step, True)]


@tree
def a_decision_on_a_float(s):
    def step(rate):
        half = rate * 0.5
        return s.x * half if half < 1 else s.x * 2

    return [(step, 0.5), (step, 0.75), (step, 4.0)]


@tree
def another_shape(s):
    def step(x):
        return -x

    return [(step, torch.ones(3)), (step, torch.ones(4)), (step, torch.ones(3))]


@tree
def memory_that_is_shared(s):
    def step(a, b):
        return a + b

    x = torch.ones(4)
    return [(step, x, torch.ones(4)), (step, x, x.view(4)), (step, x, x)]


@tree
def grad_mode(s):
    def step(on):
        with torch.set_grad_enabled(on):
            return (s.x @ s.w).sum()

    return [(step, True), (step, False)]


@tree
def a_gradient_that_is_there(s):
    def step():
        (s.x @ s.w).sum().backward()

    def fill():
        s.w.grad = torch.ones(4, 3)

    return [(step,), fill, (step,)]


@tree
def the_number_of_a_tensor(s):
    def step():
        s.count += 1
        return s.x * (1 - 0.5 ** s.count.item())

    return [(step,)]


@tree
def what_is_kept_and_returned(s):
    def step(keep):
        h = s.x * 2
        s.kept = h if keep else None
        return {"h": h} if keep else [h, h.shape]

    return [(step, False), (step, True)]


@tree
def several_results(s):
    def step():
        a, b = s.x.split(2, dim=1)
        values, indices = a.max(dim=0)
        return torch.stack([b[:, 0], values.sum().expand(5)])

    return [(step,)]


@tree
def a_write_through_a_view(s):
    def step():
        s.x[0].mul_(2)
        return s.x.sum()

    return [(step,)]


# ---- matchers


@matcher
def tensors_from_outside(s):
    return lambda: s.x @ s.w


@matcher
def an_intermediate_and_a_number(s):
    return lambda: (s.x * 2) * 3


@matcher
def an_intermediate_twice(s):
    def step():
        h = s.x * 2
        return h + h

    return step


@matcher
def keyword_arguments(s):
    return lambda: torch.sum(s.x, dim=1, keepdim=True)


@matcher
def containers(s):
    return lambda: torch.cat([s.x, s.x], 1)


@matcher
def an_index(s):
    return lambda: s.x[1:, None]


@matcher
def a_plain_result(s):
    return lambda: (s.x * 2).shape


@matcher
def its_argument_as_the_result(s):
    return lambda: s.x.mul_(2)


@matcher
def several_new_tensors(s):
    return lambda: s.x.max(dim=0)


@matcher
def a_gradient(s):
    return lambda: (s.x @ s.w).sum().backward()


@matcher
def a_number_of_a_tensor(s):
    return lambda: s.count.item()


@matcher
def without_gradients(s):
    def step():
        with torch.no_grad():
            return s.x @ s.w

    return step
