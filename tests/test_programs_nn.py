"""Programs 7 and 9: a classifier, a linear fit and a transformer block, with SGD in the step."""

from __future__ import annotations

import importlib

import pytest
import torch

from examples import classifier, transformer_block
from tracejit.testing import assert_equal_to_eager, assert_trains_like_eager


@pytest.mark.parametrize(
    "make", [classifier.make_linear_fit, classifier.make_step, transformer_block.make_step]
)
@pytest.mark.parametrize("backend", ["numpy", "c"])
def test_lockstep(make, backend):
    step, parameters = make()
    compiled = assert_equal_to_eager(step, calls=20, state=parameters, backend=backend)
    assert compiled.stats.compiles <= 2


# Not the classifier: a unit within rounding of its relu's kink moves parameters by 1e-4, in eager
# against float64 as much as here.
@pytest.mark.parametrize("make", [classifier.make_linear_fit, transformer_block.make_step])
def test_free_run(make):
    assert_trains_like_eager(make, calls=20)


@pytest.mark.interpret
@pytest.mark.parametrize(
    "make",
    [
        lambda: classifier.make_step(batch=9, sizes=(33, 20, 5)),
        lambda: transformer_block.make_step(batch=2, length=5, width=24, heads=2),
    ],
    ids=["classifier", "transformer_block"],
)
def test_interpret(make):
    step, parameters = make()
    assert_equal_to_eager(step, calls=2, state=parameters, backend="interpret")


@pytest.mark.parametrize("name", ["classifier", "transformer_block"])
def test_examples_run(name, capsys):
    loss = importlib.import_module(f"examples.{name}").main(steps=3)
    assert torch.isfinite(torch.tensor(loss))
    assert "launches" in capsys.readouterr().out
