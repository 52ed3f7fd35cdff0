"""No false alarm: steps that are right, of which a verified call once said that they are not."""

from __future__ import annotations

import collections
import importlib
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import examples
import tracejit
from support.faults import rule_of
from tracejit.errors import TracejitWarning, WrongResult
from tracejit.verify.verifier import Verifier


def verified(step: Callable, calls: int = 8, between: Callable | None = None, **options: object):
    """The certificate of some calls, none of which may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", TracejitWarning)
        step = tracejit.compile(step, **{"verify": 2, "backend": "numpy"} | options)
        for call in range(calls):
            if between is not None:
                between(call)
            step(torch.full((3,), 1.0 + call))
    certificate = step.certificate()
    assert certificate.holds and not certificate.withdrawn, certificate
    return step


class Record:
    """What a step keeps in tuples."""

    def __init__(self):
        self.n, self.best = 0, (0.5, 0)
        self.pairs = collections.deque([(0.0, 0)] * 3, maxlen=3)


def best_of_all(r: Record, x: torch.Tensor) -> torch.Tensor:
    loss = (x * 2.0).sum()
    r.best = min(r.best, (loss.item(), r.n))
    return loss


def last_pairs(r: Record, x: torch.Tensor) -> torch.Tensor:
    r.pairs.append((0.5 * r.n, r.n))
    return x * sum(a for a, _ in r.pairs)


def the_same_again(r: Record, x: torch.Tensor) -> torch.Tensor:
    r.best = (*r.best[:1], 0 * r.n)
    return x * r.best[0]


@pytest.mark.parametrize("change", [best_of_all, last_pairs, the_same_again])
def test_a_tuple_is_what_it_holds(change):
    """Eager keeps the tuple that was there, a replay makes an equal one."""
    r = Record()

    def step(x: torch.Tensor) -> torch.Tensor:
        r.n += 1
        return change(r, x)

    verified(step)


def test_another_tuple_is_found():
    """In one that is compared by what it holds."""
    from support.faults import in_run

    r = Record()

    def step(x: torch.Tensor) -> torch.Tensor:
        r.n += 1
        r.best = (0.5, r.n)
        return x * 2.0

    def wrong(function: Callable) -> Callable:
        def perform(*given: object) -> object:
            returned = function(*given)
            r.best = (0.5, -1)
            return returned

        return perform

    with in_run(wrong)():
        compiled = tracejit.compile(step, verify=2, backend="numpy", on_unsupported="eager")
        with pytest.warns(TracejitWarning, match=r"best.*-1, in eager"):
            for _ in range(8):
                compiled(torch.ones(3))
    assert r.best == (0.5, 8)


def test_the_place_of_a_mode_is_open():
    """Of rows of more than 16 elements eager's depends on how the C++ library sorts."""
    x = torch.arange(600).reshape(2, 300) % 7
    step = tracejit.compile(lambda x: x.mode(1), verify=2, backend="numpy")
    assert not torch.equal(x.mode(1).indices, tracejit.compile(lambda x: x.mode(1))(x)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        for _ in range(6):
            values, places = step(x)
            assert torch.equal(values, x.mode(1).values)
            assert torch.equal(x.gather(1, places[:, None])[:, 0], values)
        step.verify(x)
    found = step.certificate()
    assert not found.withdrawn and step.stats.eager == 0 and step.stats.replays
    assert found.unverified == ["torch leaves open at which of equal elements it finds a mode"]


def test_the_value_of_a_mode_is_not():
    x = torch.arange(600).reshape(2, 300) % 7
    step = tracejit.compile(lambda x: x.mode(1), verify=2, backend="numpy")
    fault = rule_of(torch.Tensor.mode, lambda own: lambda t, x, dim: own(t, x.flip(0), dim))
    with fault, pytest.raises(WrongResult, match="mode is computed otherwise than by eager"):
        step(x + torch.tensor([[0], [1]]))
    assert step.certificate().withdrawn


def test_attributes_of_a_thread_are_put_back():
    own = threading.local()
    own.n = 0

    def step(x: torch.Tensor) -> torch.Tensor:
        own.n += 1
        return x * own.n

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        compiled = tracejit.compile(step, verify=2, backend="numpy")
        assert [compiled(torch.ones(())).item() for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]
    assert own.n == 4 and not compiled.certificate().withdrawn


IMAGES = {"images": 16, "batch": 4, "width": 2, "epochs": 1}
EXAMPLES: dict[str, dict[str, int]] = {
    "alexnet": IMAGES | {"size": 64},
    "classifier": {"steps": 6},
    "custom_relu": {"steps": 6},
    "demo": {"steps": 20},
    "fused_chain": {"steps": 4, "n": 10_001},
    "gpt": {"steps": 8, "batch": 4, "layers": 1, "width": 16},
    "loss_outside": {"steps": 6},
    "mnist_cnn": IMAGES | {"size": 12},
    "modules": {"steps": 6},
    "recurrence": {"steps": 6},
    "resnet_finetune": IMAGES | {"size": 12},
    "save_and_load": {"steps": 6},
    "static_graph": {"steps": 6},
    "transformer_block": {"steps": 3},
    "two_layer_autograd": {"steps": 6},
    "two_layer_manual": {"steps": 6},
    "unet": IMAGES | {"size": 16},
    "vgg16": IMAGES | {"size": 32},
}
QUICK = {"demo", "loss_outside", "recurrence"}
RANKS = {"data_parallel"}  # other processes take part in its steps, which are not compared
PARTS = {"images", "__init__"}  # of other examples


def test_every_example_is_listed():
    names = {path.stem for path in Path(examples.__path__[0]).glob("*.py")}
    assert names - PARTS - RANKS == EXAMPLES.keys()


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EXAMPLES]
)
def test_an_example_to_its_end(name, monkeypatch, capsys):
    """A difference would be raised."""
    verifiers: list[Verifier] = []
    own = Verifier.__init__

    def init(self, step, *args, **kwargs):
        own(self, step, *args, **kwargs)
        verifiers.append(self)

    monkeypatch.setattr(Verifier, "__init__", init)
    monkeypatch.setenv("TRACEJIT_VERIFY_CALLS", "2")
    importlib.import_module(f"examples.{name}").main(**EXAMPLES[name])
    certificates = [verifier.certificate for verifier in verifiers]
    assert not any(found.withdrawn for found in certificates)
    assert any(found.verified for found in certificates), [c.unverified for c in certificates]
