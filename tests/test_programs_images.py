"""Networks for images, whole: ten steps like eager, nearly all of them replays.

Through several batch norms the bound of the lockstep rule says nothing any more, so most networks
run freely: every loss is compared, and with SGD the parameters. (What Adam makes of a gradient that
is nothing but rounding is no rounding.)
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

import tracejit
from examples.images import digits, stripes
from support.image_nets import NETS, make_step, step_of
from support.whole_image_nets import WHOLE
from tracejit.testing import assert_equal_to_eager, assert_trains_like_eager, losses_agree

CALLS = 10
SMALL = ("lenet", "residual", "vgg", "mobile", "unet")


def check_training(net: str, backend: str, calls: int = CALLS, **options: bool) -> None:
    """Losses and parameters after free training with SGD with momentum."""

    def make() -> tuple:
        step, state = make_step(net, "sgd", **options)
        return step, [t for t in state if t.requires_grad]

    compiled, ours, _ = assert_trains_like_eager(
        make, calls=calls, backend=backend, on_unsupported="raise"
    )
    assert compiled.stats.replays >= max(calls - 3, 0)
    assert len(set(ours)) == calls


@pytest.mark.parametrize("net", NETS)
@pytest.mark.sweep(8)
def test_sgd(net):
    check_training(net, "c")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.sweep(6)
def test_sgd_numpy(net):
    check_training(net, "numpy", 5)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.sweep(10)
def test_adamw(net):
    plain, compiled = (make_step(net, "adamw")[0] for _ in range(2))
    compiled = tracejit.compile(compiled, on_unsupported="raise")
    losses = [(compiled().item(), plain().item()) for _ in range(CALLS)]
    for ours, eager in losses:
        assert losses_agree(ours, eager, losses[0][1])
    assert compiled.stats.replays >= CALLS - 3


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd, slow", "adamw"])
@pytest.mark.parametrize("net", WHOLE)
def test_whole_nets(net, optimizer):
    """As deep as people train them; in float64, since float32's rounding grows through 50 batch
    norms until losses say nothing any more."""
    compiled, ours, _ = assert_trains_like_eager(
        lambda: (step_of(*WHOLE[net], optimizer, dtype=torch.float64)[0], []),
        calls=CALLS,
        on_unsupported="raise",
    )
    assert compiled.stats.replays >= CALLS - 3
    assert len(set(ours)) == CALLS


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("net", ["lenet", "residual", "unet", "alexnet", "googlenet", "convnext"])
@pytest.mark.sweep(8)
def test_lockstep(net, optimizer):
    step, state = make_step(net, optimizer)
    compiled = assert_equal_to_eager(step, calls=4, state=state, on_unsupported="raise")
    assert compiled.stats.replays


@pytest.mark.parametrize("net", ["residual", "mobile"])
@pytest.mark.sweep(2)
def test_channels_last(net):
    check_training(net, "c", 5, channels_last=True)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("net", SMALL)
def test_interpret(net):
    check_training(net, "interpret", 3)


EXAMPLES = {
    "mnist_cnn": {"images": 24, "batch": 8, "size": 12, "width": 4},
    "unet": {"images": 16, "batch": 4, "size": 16, "width": 2},
    "alexnet": {"images": 16, "batch": 4, "size": 64, "width": 2},
    "vgg16": {"images": 12, "batch": 4, "size": 32, "width": 2},
    "resnet_finetune": {"images": 32, "batch": 4, "size": 12, "width": 2},
}
LONG = {"alexnet", "vgg16", "resnet_finetune"}  # to build


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in EXAMPLES]
)
def test_examples_run(name, capsys):
    """Each trains compiled, with eager beside it, from the same start to the same losses."""
    found = importlib.import_module(f"examples.{name}").main(epochs=1, eager=True, **EXAMPLES[name])
    lines = capsys.readouterr().out.replace("\r", "\n").splitlines()
    last = [line.split("loss")[1].split()[0] for line in lines if "accuracy" in line]
    ours, eager = last[: len(last) // 2], last[len(last) // 2 :]
    assert 0 <= found <= 1 and len(ours) == len(eager) > 0
    assert [float(x) for x in ours] == pytest.approx([float(x) for x in eager], rel=1e-3)


@pytest.mark.parametrize("there", [True, False])
def test_digits_come_from_torchvision_where_it_has_them(there, monkeypatch):
    """A stand-in for torchvision, which need not be installed; without files it raises."""

    def mnist(root: str, train: bool) -> SimpleNamespace:
        if not there:
            raise RuntimeError("Dataset not found.")
        full = torch.full((9, 28, 28), 255 if train else 0, dtype=torch.uint8)
        return SimpleNamespace(data=full, targets=torch.arange(9))

    datasets = SimpleNamespace(MNIST=mnist)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=datasets))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    x, y = digits(5, 14).tensors
    assert x.shape == (5, 1, 14, 14) and len(y) == 5
    other = digits(5, 14, seed=1).tensors[0]
    if there:
        assert y.tolist() == [*range(5)] and x.max() == x.min() > 2.8 and other.max() < 0
    else:
        assert torch.equal(x, stripes(5, 14, 1).tensors[0])
