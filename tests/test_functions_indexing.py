"""Functions that assemble, take apart and index tensors against eager, and in whole steps."""

from __future__ import annotations

import math

import pytest
import torch

import tracejit
from support.function_checks import (
    check_gradients,
    check_runtime_scalars,
    check_values,
    on_each_sample,
    parameters,
    runtime_floats,
)
from support.function_samples import each_function, samples_of
from support.function_samples_indexing import is_indexing
from support.oracle import call
from tracejit.errors import UnsupportedOperation
from tracejit.testing import assert_equal_to_eager

nan = math.nan
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # eager's deprecations

CHOSEN = [f for f in each_function() if is_indexing(f)]


@pytest.mark.parametrize("function", parameters(CHOSEN))
@pytest.mark.sweep(2)
def test_values(function):
    on_each_sample(check_values, function, samples_of(function))


@pytest.mark.parametrize("function", parameters(CHOSEN))
@pytest.mark.sweep(2)
def test_gradients(function):
    on_each_sample(check_gradients, function, samples_of(function))


@pytest.mark.parametrize(
    "function",
    parameters([f for f in CHOSEN if any(runtime_floats(s) for s in samples_of(f))]),
)
@pytest.mark.sweep(0.34)
def test_runtime_scalars(function):
    rows = [s for s in samples_of(function) if runtime_floats(s) and not s.refused]
    on_each_sample(check_runtime_scalars, function, rows)


# --- whole steps -------------------------------------------------------------------------------


def bag_of_words(table, weight, tokens, labels):
    """Embedding, running sums, a classifier, and the accuracy; plain SGD."""
    rows = torch.nn.functional.embedding(tokens, table, padding_idx=0)
    context = rows.cumsum(1).flip(1).roll(1, 0)
    features = torch.cat([rows, context], -1).mean(1)
    scores = torch.einsum("bd,dk->bk", features, weight)
    shifted = scores - scores.max(1, keepdim=True).values
    loss = shifted.exp().sum(1).log() - shifted.gather(1, labels[:, None])[:, 0]
    loss.sum().backward()
    with torch.no_grad():
        for p in (table, weight):
            p -= 0.1 * p.grad
            p.grad = None
    return loss, (scores.argmax(1) == labels).sum()


def bag_of_words_arguments():
    torch.manual_seed(0)
    table = torch.randn(11, 6, requires_grad=True)
    weight = torch.randn(12, 5, requires_grad=True)
    return table, weight, torch.randint(0, 11, (7, 9)), torch.randint(0, 5, (7,))


def attention(x, w, mask_value=-1e9):
    """Heads by chunk and unflatten, a causal mask by tril, a relative bias by an index grid."""
    q, k, v = (x @ w).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (2, -1)).movedim(1, 0) for y in (q, k, v))
    n = x.shape[0]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    place = torch.arange(n)
    bias = w[0][(place[:, None] - place).clamp(min=0)]
    scores = torch.einsum("hqd,hkd->hqk", q, k) + bias
    scores = scores.masked_fill(~causal, mask_value)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.stack([(weights @ v)[0], (weights @ v)[1]], 1).flatten(1)
    loss = (torch.nn.functional.pad(out, (1, 0), value=0.5) ** 2).sum()
    loss.backward()
    return loss, out.detach()


def attention_arguments():
    torch.manual_seed(1)
    return torch.randn(10, 8), torch.randn(8, 24, requires_grad=True)


def replay_memory(memory, values, where):
    """A ring buffer: reads, and overwrites rows (one of them twice) in place."""
    with torch.no_grad():
        old = memory[where]
        memory[where] = values
        memory[:, [0, 2]] += 1.0
        memory[where[:2], 1] = 7.0
    return old, memory.diagonal().prod(), torch.tensor([0.5, 2.0, 1.0]).outer(memory[0])


def replay_memory_arguments():
    torch.manual_seed(2)
    return torch.randn(6, 3), torch.randn(4, 3), torch.tensor([5, 0, 5, -2])


def mixture_of_experts(x, gate, experts):
    """The two best of four experts for each row, and how often each was chosen."""
    weights, chosen = (x @ gate).softmax(-1).topk(2)
    out = torch.zeros_like(x)
    for k in range(4):
        share = (weights * (chosen == k)).sum(-1, keepdim=True)
        out = out + share * (x @ experts[k]).tanh()
    taken = torch.zeros(4).index_add(0, chosen.flatten(), torch.ones(chosen.numel()))
    loss = (out - x).pow(2).mean() + 0.1 * out.sort(0).values[2].sum() + out.median()
    loss.backward()
    with torch.no_grad():
        for p in (gate, experts):
            p -= 0.1 * p.grad
            p.grad = None
    return loss.detach(), taken


def mixture_of_experts_arguments():
    torch.manual_seed(3)
    gate, experts = torch.randn(6, 4), torch.randn(4, 6, 6)
    return torch.randn(10, 6), gate.requires_grad_(), experts.requires_grad_()


STEPS = {
    "mixture of experts": (mixture_of_experts, mixture_of_experts_arguments),
    "bag of words": (bag_of_words, bag_of_words_arguments),
    "attention": (attention, attention_arguments),
    "replay memory": (replay_memory, replay_memory_arguments),
}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", STEPS)
def test_whole_step(name: str, fuse: bool):
    step, arguments = STEPS[name]
    compiled = assert_equal_to_eager(step, arguments, calls=4, backend="numpy", fuse=fuse)
    assert compiled.explain_mode().startswith("replay")


@pytest.mark.interpret
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.sweep(3)
def test_whole_step_on_triton(name: str):
    step, arguments = STEPS[name]
    assert_equal_to_eager(step, arguments, calls=2, backend="interpret")


def test_what_is_refused():
    x = torch.randn(3, 4)
    for function in (
        lambda: torch.fft.rfft(x),
        lambda: torch.tensor([0.0] * 65),
    ):
        with pytest.raises(UnsupportedOperation):
            call(function)


@pytest.mark.parametrize(
    "index, shape, fits",
    [
        ((slice(None, None, 2), slice(None, None, 2)), (4,), False),
        ((0,), (2, 2), False),
        ((slice(0, 2),), (8,), False),
        ((slice(0, 2),), (4, 2), False),
        ((slice(0, 2),), (1, 1, 2, 4), True),
        ((slice(0, 1),), (4,), True),
        ((slice(0, 2),), (2, 1), True),
        ((0, 0), (1, 1), True),
    ],
)
def test_what_is_assigned_fits_as_in_eager(index, shape, fits):
    """As many elements are not enough."""

    def step(x, v):
        x[index] = v
        return x + 1

    compiled = tracejit.compile(step, on_unsupported="raise")
    x, v = torch.zeros(4, 4), torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    if fits:
        assert torch.equal(compiled(x.clone(), v), step(x.clone(), v))
        return
    for either in (step, compiled):
        with pytest.raises(RuntimeError, match="size"):
            either(x, v)
    assert not x.any()
