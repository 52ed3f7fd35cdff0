"""Whole programs on a CUDA device, compiled kernels against eager. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

import tracejit
from examples import fused_chain, two_layer_autograd, two_layer_manual
from support.optimizer_checks import OPTIMIZERS, lockstep, training
from support.programs import PROGRAMS
from tracejit.testing import assert_equal_to_eager, assert_trains_like_eager

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("variant", ["zero_", "none", "data", "grad"])
def test_two_layer_autograd(variant):
    step, _ = two_layer_autograd.make_step(variant, device="cuda")
    assert_equal_to_eager(step, calls=10)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name):
    with torch.device("cuda"):
        step, state = PROGRAMS[name].make()
        assert all(t.is_cuda for t in state)
        assert_equal_to_eager(step, calls=4, state=state)


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


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_many_calls_in_one_launch(make):
    """`step.run` against single calls of eager, 200 batches."""

    def build() -> tuple:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(100, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
        ).cuda()
        optimizer = make(model.parameters(), lr=0.01)

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).pow(2).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step, model

    data = [
        (torch.randn(64, 100, device="cuda"), torch.randn(64, 10, device="cuda"))
        for _ in range(200)
    ]
    (function, model), (eager, other) = build(), build()
    step = tracejit.compile(function)
    losses = [*step.run(10, data), *step.run(90, data[10:]), *step.run(100, data[100:])]
    expected = [eager(*batch) for batch in data]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_same_inputs_same_bits():
    step, (x,) = fused_chain.make_step(1_000_003, device="cuda")
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


def trained_on(stream: torch.cuda.Stream, calls: int, compiled: dict) -> list[torch.Tensor]:
    """Losses and weights of a network that trains on a stream, all with one compiled step."""
    generator = torch.Generator("cuda").manual_seed(stream.cuda_stream % 1000)
    shapes = (65, 33), (400, 65), (400, 33)
    w, x, y = (torch.randn(*s, generator=generator, device="cuda") for s in shapes)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        losses = [compiled["step"](w, x, y, 0.01 + 0.0001 * (call // 7)) for call in range(calls)]
    return [*losses, w]


def sgd(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor, lr: float) -> torch.Tensor:
    difference = x @ w - y
    w.sub_(x.T @ difference * (lr / len(x)))
    return difference.pow(2).sum()


def test_two_streams_give_the_bits_of_one():
    compiled = {"step": tracejit.compile(sgd)}
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    alone = []
    for stream in streams:
        alone.append(trained_on(stream, 100, compiled))
        torch.cuda.synchronize()
    together = [trained_on(stream, 100, compiled) for stream in streams]
    torch.cuda.synchronize()
    for first, second in zip(alone, together, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


def test_a_step_joins_a_graph():
    x, out = torch.randn(40_000, device="cuda"), torch.zeros(1, device="cuda")

    def step(scale: float) -> torch.Tensor:
        total = (x * scale).sum()
        out.copy_(total.reshape(1))
        return total

    compiled = tracejit.compile(step, on_unsupported="raise")
    for _ in range(5):
        compiled(1.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = compiled(3.0)
    for _ in range(3):
        x.add_(1)
        graph.replay()
        torch.testing.assert_close(kept, (x * 3).sum())
        torch.testing.assert_close(out[0], kept)
        torch.testing.assert_close(compiled(1.0), x.sum())
        torch.testing.assert_close(kept, (x * 3).sum())


def test_values_are_read_when_they_are_there():
    x = torch.randn(1 << 22, device="cuda")
    compiled = tracejit.compile(lambda scale: (x * scale).sum().item(), on_unsupported="raise")
    for call in range(20):
        assert compiled(float(call)) == pytest.approx((x.double() * call).sum().item(), rel=1e-4)


def test_prefetched_batches_are_the_loaders():
    batches = [(torch.randn(1000, 1001), torch.full((7,), k)) for k in range(30)]
    w = torch.randn(1001, 1000, device="cuda")
    sums = []
    for k, (x, y) in enumerate(tracejit.prefetch(batches, "cuda")):
        assert x.is_cuda and y.is_cuda
        for _ in range(20):  # work that is still under way when the next batch is copied
            x = (x @ w)[:, :1000] @ w.T * 1e-3
        sums.append((y.sum(), x.isfinite().all()))
        assert len(sums) == k + 1
    assert all(y.item() == 7 * k and fine.item() for k, (y, fine) in enumerate(sums))
    given = [x for x, _ in batches]
    found = [x for x, _ in tracejit.prefetch(batches, "cuda", depth=3)]
    for x, y in zip(found, given, strict=True):
        assert torch.equal(x.cpu(), y)


def test_a_step_is_drawn_with_its_kernels(tmp_path):
    step, _ = two_layer_autograd.make_step(device="cuda")
    compiled = tracejit.compile(step)
    for _ in range(4):
        compiled()
    compiled.draw(tmp_path / "step.html")
    picture = compiled._picture("H200", measure=True)
    assert picture.device.startswith("cuda")
    assert all("time here" in dict(k.cost) and k.language == "Triton" for k in picture.kernels)
    assert {k for n in picture.nodes for k in n.kernels} == {*range(len(picture.kernels))}
