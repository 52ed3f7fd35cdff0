"""Kernels over rows in few passes, and from a multiple of 16 bytes on, in Triton's interpreter."""

import os

import numpy as np
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets, so it needs TRITON_INTERPRET=1", allow_module_level=True)

import torch
import torch.nn.functional as F

import tracejit
from support.graph_texts import softmax
from support.interpret_checks import check, fill, run
from tracejit.codegen import geometry
from tracejit.ir.interp import evaluate
from tracejit.ir.text import parse

pytestmark = pytest.mark.interpret

WIDTHS = (5, 64, 65, 66, 67, 123, 131)


@pytest.fixture
def peeled(monkeypatch):
    """Rows of these tests are long."""
    monkeypatch.setattr(geometry, "LONG_ROW", 60)
    monkeypatch.setattr(geometry, "SMALL", 60)


def forms(loaded):
    return [source.name.rpartition("_")[0] for source in loaded.sources]


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
@pytest.mark.parametrize("max_tile", [64, 8192])
def test_softmax_of_rows_of_any_length(dtype, max_tile, peeled):
    for c in WIDTHS:
        loaded = check(
            softmax(9, c, 1).replace("f32", dtype),
            max_tile=max_tile,
            tolerance={"bf16": 2e-2, "f16": 2e-3}.get(dtype, 1e-5),
        )
        looped, odd = c > max_tile, c >= 60 and c % {"f64": 2, "f32": 4}.get(dtype, 8)
        assert forms(loaded) == ["rows" + "_looped" * looped + "_peeled" * bool(odd)]


@pytest.mark.parametrize("c", [67, 131])
def test_a_sum_of_exponentials_goes_with_its_maximum(c, peeled):
    loaded = check(softmax(5, c, 1))
    (text,) = (source.text for source in loaded.sources)
    assert text.count("for start in") == 2 and "online_sum(" in text


@pytest.mark.parametrize("c", [128, 131])
def test_sums_of_exponentials_keep_what_is_not_finite(c, peeled):
    graph = parse(softmax(8, c, 1))
    (x,) = fill(graph)
    x[0] = -np.inf
    x[1, ::2] = -np.inf
    x[2, 3] = np.inf
    x[3, 3], x[3, 70] = np.inf, -np.inf
    x[4, c - 1] = np.nan
    x[5] = 3e38
    x[6, :-1] = -np.inf
    x[7] = np.linspace(-300, 300, c)
    with np.errstate(invalid="ignore", over="ignore"):
        (expected,), _ = evaluate(graph, [x])
    (result,), _, _ = run(graph, [x])
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-7)


def plan_and_inputs(function, *inputs):
    graph = tracejit.capture(lambda: function(*inputs)).optimized().graph
    return graph, [x.detach().numpy() for x in inputs]


def agrees(function, *inputs, max_tile=64):
    """The plan of a function gives what eager gives; its sources."""
    graph, arrays = plan_and_inputs(function, *inputs)
    expected = function(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    results, _, loaded = run(graph, arrays, max_tile)
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5, atol=2e-6)
    return loaded.sources


def with_gradient(function):
    def step(x, *rest):
        x.grad = None
        y = function(x, *rest)
        y.backward()
        return y.detach(), x.grad

    return step


@pytest.mark.parametrize("c", [67, 131, 260])
def test_cross_entropy_reads_the_logits_twice(c, peeled):
    torch.manual_seed(0)
    x = torch.randn(7, c, requires_grad=True)
    labels = torch.randint(0, c, (7,))
    labels[2] = -100
    sources = agrees(with_gradient(F.cross_entropy), x, labels)
    passes = [source.text.count("for start in") for source in sources if "rows" in source.name]
    assert sum(passes) == 2


@pytest.mark.parametrize("c", [67, 260])
def test_log_sum_exp_and_log_softmax(c, peeled):
    torch.manual_seed(0)
    x = torch.randn(5, c)
    x[1] = -torch.inf
    x[2, 4] = torch.inf
    x[3, 5] = torch.nan
    x[4, 1:] = -torch.inf
    agrees(lambda x: torch.logsumexp(x, -1), x)
    agrees(lambda x: torch.log_softmax(x[4:], -1), x)


@pytest.mark.parametrize("c", [67, 131])
@pytest.mark.parametrize("max_tile", [64, 8192])
def test_norms_of_rows_of_any_length(c, max_tile, peeled):
    torch.manual_seed(0)
    x, w, b = torch.randn(9, c, requires_grad=True), torch.randn(c), torch.randn(c)

    def norm(x, w, b):
        return F.layer_norm(x, (c,), w, b).pow(2).sum() + F.rms_norm(x, (c,), w).abs().sum()

    agrees(with_gradient(norm), x, w, b, max_tile=max_tile)
