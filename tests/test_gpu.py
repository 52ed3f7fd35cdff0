"""Programs 1–3 on a CUDA device, compiled kernels against eager. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from examples import fused_chain, two_layer_autograd, two_layer_manual
from support.optimizer_checks import OPTIMIZERS, lockstep, training
from tracejit.testing import assert_equal_to_eager, assert_trains_like_eager

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("variant", ["zero_", "none", "data", "grad"])
def test_two_layer_autograd(variant):
    step, _ = two_layer_autograd.make_step(variant, device="cuda")
    assert_equal_to_eager(step, calls=10)


def test_two_layer_manual():
    step, _ = two_layer_manual.make_step(device="cuda")
    assert_equal_to_eager(step, calls=10)


@pytest.mark.parametrize("n", [100_003, 4_000_000])
def test_fused_chain(n):
    step, _ = fused_chain.make_step(n, device="cuda")
    compiled = assert_equal_to_eager(step, calls=10)
    assert len(compiled.kernels) == 1


def test_free_run():
    assert_trains_like_eager(lambda: two_layer_autograd.make_step(device="cuda"), calls=500)


def test_same_inputs_same_bits():
    step, (x,) = fused_chain.make_step(1_000_003, device="cuda")
    import tracejit

    step = tracejit.compile(step)
    first = step().item()
    gradient = x.grad.clone()
    for _ in range(5):
        assert step().item() == first
        assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, foreach):
    for options, plans in OPTIMIZERS[name]:
        make = training(
            lambda p, o=options: getattr(torch.optim, name)(p, foreach=foreach, **o), "cuda"
        )
        lockstep(make, compiles=plans, calls=20, backend="auto")


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "ASGD", "Rprop"])
def test_capturable_optimizers(name):
    make = training(lambda p: getattr(torch.optim, name)(p, capturable=True), "cuda")
    lockstep(make, compiles=2, calls=20, backend="auto")


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_optimizers(name):
    make = training(lambda p: getattr(torch.optim, name)(p, lr=0.01, fused=True), "cuda")
    lockstep(make, compiles=2, calls=20, backend="auto")
