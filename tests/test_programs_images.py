"""Networks for images, whole: ten steps like eager, nearly all of them replays.

Through several batch norms the bound of the lockstep rule says nothing any more, so most networks
run freely: every loss is compared, and with SGD the parameters. (What Adam makes of a gradient that
is nothing but rounding is no rounding.)
"""

from __future__ import annotations

import pytest

import tracejit
from support.image_nets import NETS, make_step
from tracejit.testing import assert_equal_to_eager, assert_trains_like_eager, losses_agree

CALLS = 10


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
def test_sgd(net):
    check_training(net, "c")


@pytest.mark.parametrize("net", NETS)
def test_sgd_numpy(net):
    check_training(net, "numpy", 5)


@pytest.mark.parametrize("net", NETS)
def test_adamw(net):
    plain, compiled = (make_step(net, "adamw")[0] for _ in range(2))
    compiled = tracejit.compile(compiled, on_unsupported="raise")
    losses = [(compiled().item(), plain().item()) for _ in range(CALLS)]
    for ours, eager in losses:
        assert losses_agree(ours, eager, losses[0][1])
    assert compiled.stats.replays >= CALLS - 3


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("net", ["lenet", "residual", "unet"])
@pytest.mark.sweep(4)
def test_lockstep(net, optimizer):
    step, state = make_step(net, optimizer)
    compiled = assert_equal_to_eager(step, calls=4, state=state, on_unsupported="raise")
    assert compiled.stats.replays


@pytest.mark.parametrize("net", ["residual", "mobile"])
def test_channels_last(net):
    check_training(net, "c", 5, channels_last=True)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("net", NETS)
def test_interpret(net):
    check_training(net, "interpret", 3)
