"""Where fresh outputs lie: memory that nobody can see any more is used again, all other is not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import tracejit
from benchmarks.worker import allocated_peak
from tracejit.capture.effects.commit import WORTH

CALLS = 5  # until a replay is armed and has settled


def trained(n: int = WORTH) -> tuple:
    """A compiled step that drops the gradient of x first, in replay; and x."""
    x = torch.randn(n, requires_grad=True)

    def step(scale: float) -> torch.Tensor:
        x.grad = None
        loss = (x * x * scale).sum()
        loss.backward()
        return loss

    compiled = tracejit.compile(step)
    for _ in range(CALLS):
        compiled(1.0)
    assert compiled.stats.replays >= 2, compiled.explain_mode()
    return compiled, x


def test_a_dropped_gradient_is_written_in_place():
    step, x = trained()
    address, before = x.grad.data_ptr(), x.grad.clone()
    step(2.0)
    assert x.grad.data_ptr() == address
    assert torch.equal(x.grad, 2 * before)


def as_other_gradient(x: torch.Tensor) -> torch.Tensor:
    other = torch.zeros_like(x, requires_grad=True)
    other.grad = x.grad
    return other


HOLDERS = {
    "the tensor": lambda x: (x.grad, lambda held: held),
    "a view": lambda x: (x.grad[3:], lambda held: held),
    "detached": lambda x: (x.grad.detach(), lambda held: held),
    "an array": lambda x: (x.grad.numpy(), torch.from_numpy),
    "its storage": lambda x: (x.grad.untyped_storage(), torch.tensor([]).set_),
    "another parameter": lambda x: (as_other_gradient(x), lambda held: held.grad),
    "a capsule": lambda x: (torch.utils.dlpack.to_dlpack(x.grad), torch.utils.dlpack.from_dlpack),
    "autograd": lambda x: (
        x.grad * torch.ones_like(x, requires_grad=True),
        lambda held: held.grad_fn._saved_self,
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_gradient_that_someone_holds_is_left_alone(holder):
    step, x = trained()
    address, before = x.grad.data_ptr(), x.grad.clone()
    held, read = HOLDERS[holder](x)
    for scale in (2.0, 3.0):
        step(scale)
        assert x.grad.data_ptr() != address
        assert torch.equal(x.grad, scale * before)
    found = read(held)
    assert found.data_ptr() in (address, address + 12)  # the view starts at its third element
    assert torch.equal(found, before[-found.numel() :])


def test_a_result_whose_storage_is_held_is_left_alone():
    step = tracejit.compile(lambda: torch.ones(5) * counter)
    held = []
    for value in range(CALLS + 3):
        counter = torch.full((5,), float(value))
        held.append(step().untyped_storage())
    assert [torch.tensor([]).set_(s)[0].item() for s in held] == list(range(CALLS + 3))


def test_a_gradient_of_another_layout_is_replaced():
    step, x = trained()
    x.grad = torch.zeros(len(x)).to_sparse()
    step(1.0)
    assert torch.equal(x.grad, 2 * x.detach())


def test_a_failure_before_the_plan_leaves_the_gradient(monkeypatch):
    step, x = trained()
    before = x.grad.clone()
    program = step._replays[0].compiled.program

    def fails(*args):
        raise MemoryError("no memory")

    monkeypatch.setattr(program._outputs[-1], "take", fails)
    with pytest.raises(MemoryError):
        step(5.0)
    assert torch.equal(x.grad, before)


def test_a_warm_step_allocates_no_more_than_eager():
    def make() -> tuple:
        x = torch.randn(1 << 18, requires_grad=True)
        g = torch.randn(1 << 18)

        def step() -> torch.Tensor:
            x.grad = None
            y = torch.tanh(x)
            y.backward(g)
            return y.detach()

        return step

    eager = allocated_peak(make(), CALLS)
    ours = allocated_peak(tracejit.compile(make()), CALLS)
    assert 2 << 20 <= ours <= eager


def test_a_trace_does_not_hold_what_the_step_dropped():
    x = torch.randn(WORTH, requires_grad=True)

    def step() -> torch.Tensor:
        x.grad = None
        loss = (x * x).sum()
        loss.backward()
        return loss

    step = tracejit.compile(step, mode="rerun")
    gc.disable()
    try:
        step()
        held = weakref.ref(x.grad)
        step()
        assert held() is None
    finally:
        gc.enable()
