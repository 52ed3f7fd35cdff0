"""Networks for images, whole: lockstep with eager over ten steps, nearly all of them replays."""

from __future__ import annotations

import pytest

from support.image_nets import NETS, OPTIMIZERS, make_step
from tracejit.testing import assert_equal_to_eager


def check(net: str, optimizer: str, backend: str, calls: int, **options: bool) -> None:
    step, state = make_step(net, optimizer, **options)
    compiled = assert_equal_to_eager(
        step, calls=calls, state=state, backend=backend, on_unsupported="raise"
    )
    assert compiled.stats.replays >= calls - 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", NETS)
def test_lockstep(net, optimizer):
    check(net, optimizer, "c", 10)


@pytest.mark.parametrize("net", NETS)
def test_lockstep_numpy(net):
    check(net, "sgd", "numpy", 4)


@pytest.mark.parametrize("net", ["residual", "mobile"])
def test_channels_last(net):
    check(net, "sgd", "c", 4, channels_last=True)


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_interpret(net):
    check(net, "sgd", "interpret", 3)
