"""`step.save` and `tracejit.load`: what a loaded step takes, does and keeps; what is refused."""

from __future__ import annotations

import gc
import json
import math
import random
import weakref
import zipfile
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tracejit
from support.fake import FAKE
from support.programs import PROGRAMS
from support.saved_steps import STEPS, rich
from tracejit.errors import (
    ArgumentError,
    AxisError,
    CallError,
    CannotSave,
    SavedFileError,
    SideEffectError,
    TracejitError,
)
from tracejit.saved import archive
from tracejit.saved.devices import devices_of_state, moved
from tracejit.saved.manifest import entries_of, step_of
from tracejit.saved.plans import plan_entries
from tracejit.saved.soundness import check_step
from tracejit.testing import fake_device

Pair = namedtuple("Pair", "loss rate")


@dataclass
class Batch:
    x: torch.Tensor


def compiled(step: Callable, *calls: tuple, times: int = 4, **options: object):
    """A step that is replayed for these calls."""
    step = tracejit.compile(step, backend="numpy", **options)
    for args in calls:
        for _ in range(times):
            step(*args)
    return step


@pytest.fixture
def reload(tmp_path) -> Callable:
    """Saves a step and loads it."""

    def saved_and_loaded(step):
        step.save(tmp_path / "a.step")
        return tracejit.load(tmp_path / "a.step", backend="numpy")

    return saved_and_loaded


def network(**options):
    """A step of a small network with Adam, two batches, and the step's objects."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, **options)

    def step(x, y):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    x, y = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    return step, (x, y), model, optimizer


def alike(loaded, step: Callable, *calls: tuple, rel: float = 1e-12) -> None:
    """Two steps return the same in these calls."""
    for args in calls:
        torch.testing.assert_close(loaded(*args), step(*args), rtol=rel, atol=rel)


# ---- numbers


def test_numbers_are_keywords_with_defaults(reload):
    step, batch, model, optimizer = network()
    loaded = reload(compiled(step, batch))
    assert loaded.numbers["optimizer.param_groups[0].lr"] == 0.01
    for i in range(6):
        rate = optimizer.param_groups[0]["lr"] = 0.02 / (1 + i)
        torch.testing.assert_close(loaded(*batch, lr=rate), step(*batch))
    optimizer.param_groups[0].update(lr=0.01, betas=(0.8, 0.999))
    alike(lambda *args: loaded(*args, **{"optimizer.param_groups[0].betas[0]": 0.8}), step, batch)
    loaded.numbers["optimizer.param_groups[0].lr"] = 0.5
    optimizer.param_groups[0].update(lr=0.5, betas=(0.9, 0.999))
    alike(loaded, step, batch, batch)
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(loaded.state_dict()[f"model.{name}"], tensor.detach())
    with pytest.raises(CallError, match="no argument and no number speed"):
        loaded(*batch, speed=1.0)
    with pytest.raises(CallError, match="lr is a float, not 'fast'"):
        loaded(*batch, lr="fast")


def test_a_short_name_of_two_numbers_is_refused(reload):
    torch.manual_seed(0)
    a, b = (torch.randn(3).requires_grad_() for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1)

    def step(x):
        optimizer.zero_grad()
        loss = (a * x + b).pow(2).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    x = torch.ones(3)
    loaded = reload(compiled(step, (x,)))
    with pytest.raises(CallError, match=r"lr may be one of .*groups\[0\].lr, .*groups\[1\].lr"):
        loaded(x, lr=0.1)
    alike(lambda x: loaded(x, **{"optimizer.param_groups[1].lr": 0.5}), step, (x,), (x,))


TIMES = 0


def test_variables_of_the_step(reload):
    """Numbers that the step assigns are kept by the loaded one; those it reads are keywords."""

    class Trainer:
        def __init__(self):
            self.calls, self.scale = 0, 2.0

        def step(self, x, power=3.0):
            global TIMES
            self.calls += 1
            TIMES += 2
            return (x * self.calls + TIMES) * self.scale**power

    trainer = Trainer()
    x = torch.ones(3).double()
    loaded = reload(compiled(trainer.step, (x,), times=8))
    assert loaded.numbers == {"self.calls": 8, "TIMES": 16, "power": 3.0}
    alike(loaded, trainer.step, (x,), (x,))
    torch.testing.assert_close(loaded(x, power=1.0), trainer.step(x, 1.0))
    assert loaded.numbers["self.calls"] == trainer.calls == 11
    assert loaded.numbers["TIMES"] == TIMES


def test_a_method_that_is_compiled_in_its_class(reload):
    class Trainer:
        def __init__(self):
            self.w = torch.ones(3).double()
            self.calls = 0

        @tracejit.compile(backend="numpy")
        def step(self, x):
            self.calls += 1
            self.w.mul_(0.5)
            return x * self.w * self.calls

    trainer, x = Trainer(), torch.ones(3).double()
    for _ in range(8):
        trainer.step(x)
    loaded = reload(Trainer.step)
    assert [*loaded.state_dict()] == ["self.w"] and [*loaded.numbers] == ["self.calls"]
    alike(loaded, trainer.step, (x,), (x,))


def test_a_decision_on_a_number_picks_a_plan(reload):
    def step(x, lr):
        return x * lr if lr > 0.5 else x - lr

    x = torch.ones(3).double()
    loaded = reload(compiled(step, (x, 0.7), (x, 0.1)))
    alike(loaded, step, (x, 0.6), (x, 0.4), (x, 0.9))
    loaded = reload(compiled(step, (x, 0.7)))
    with pytest.raises(CallError, match="lr gt 0.5 is not True"):
        loaded(x, 0.1)


def test_numbers_that_are_read_are_returned(reload):
    step, batch, *_ = network()

    def reading(x, y):
        loss = step(x, y)
        return {"loss": loss.item(), "twice": 2 * loss.item(), "kind": "mse", "shape": x.shape}

    loaded = reload(compiled(reading, batch))
    found, expected = loaded(*batch), reading(*batch)
    assert found.keys() == expected.keys() and found["shape"] == expected["shape"]
    assert found["loss"] == pytest.approx(expected["loss"])
    assert found["twice"] == 2 * found["loss"] and found["kind"] == "mse"


def test_numbers_that_the_step_computes_with(reload):
    """Python reads a value in the middle, and what the rest computes depends on it."""
    w = torch.ones(3).double()

    def step(x):
        y = (x * w).exp()
        first = y.sum().item()
        second = (y * math.sqrt(first)).sum().item()
        w.add_(0.1)
        return y * second + F.dropout(x, 0.5), first

    x = torch.arange(3.0).double()
    loaded = reload(compiled(step, (x,)))
    for i in range(3):
        torch.manual_seed(i)
        ours = loaded(x + i)
        torch.manual_seed(i)
        torch.testing.assert_close(ours, step(x + i))
        w.sub_(0.1)
        loaded.state_dict()["w"].sub_(0.1)


def test_branches_on_values(reload):
    """A plan for each way that Python went; another way is an error, with nothing changed."""
    w = torch.ones(3).double().requires_grad_()

    def step(x):
        w.grad = None
        loss = (x * w).sum()
        if loss > 10:
            loss = loss * 0.1
        elif loss < -10:
            return loss.detach()
        loss.backward()
        with torch.no_grad():
            w.sub_(w.grad * 0.01)
        return loss.detach()

    x = torch.ones(3).double()
    torch.manual_seed(0)
    loaded = reload(compiled(step, (x,), (9 * x,)))
    for scale in (1, 9, 9, 1, 8):
        torch.testing.assert_close(loaded(scale * x), step(scale * x))
    before = loaded.state_dict()["w"].clone()
    generator = torch.get_rng_state()
    with pytest.raises(CallError, match=r"decides by values that it reads at test_saved.py:\d+"):
        loaded(-9 * x)
    assert torch.equal(before, loaded.state_dict()["w"])
    assert torch.equal(generator, torch.get_rng_state())
    torch.testing.assert_close(loaded(x), step(x))


# ---- arguments


def test_plain_errors_for_other_arguments(reload):
    step, (x, y), *_ = network()
    loaded = reload(compiled(step, (x, y), (x[:3], y[:3])))
    before = loaded.state_dict()["model.0.weight"].clone()
    for args, kwargs, why in (
        ((x[:2], y[:2]), {}, r"x is f64\[2,4\], and the plan takes f64\[3,4\]"),
        ((x.float(), y), {}, r"x is f32\[5,4\], and the plan takes f64\[5,4\]"),
        ((x, y[:3]), {}, r"y is f64\[3,2\], and the plan takes f64\[5,2\]"),
        ((x.t().contiguous().t(), y), {}, r"x is f64\[5,4\] strides \(1, 5\)"),
        ((x.clone().requires_grad_(), y), {}, r"that requires grad, and the plan takes"),
        ((x,), {}, "its argument y is missing"),
        ((x, y, 3), {}, r"it takes 2 arguments by place \(x, y\), and was given 3"),
        ((x, y), {"y": y}, "y is given twice"),
        ((x, 5.0), {}, "y is a tensor, not 5.0"),
        ((x, y.to_sparse()), {}, "layout|sparse"),
    ):
        with pytest.raises(CallError, match=why) as raised:
            loaded(*args, **kwargs)
        several = len(args) == 2 and not kwargs  # else both plans say the same
        assert ("none of its 2 plans takes this call" in str(raised.value)) == several
    assert torch.equal(before, loaded.state_dict()["model.0.weight"])
    alike(loaded, step, (x, y), (x[:3], y[:3]))
    assert "step(x: f64[3,4], y: f64[3,2], lr=0.01" in repr(loaded)


def test_arguments_in_containers_and_objects(reload):
    class Config:
        scale = 2.0

    def step(config, batch, pair, *rest, name="mean", **more):
        x = batch["x"] * config.scale + pair[0] * pair[1] + rest[0]
        return (getattr(x, name)(), [x, more["z"] - 1])

    x, config = torch.arange(4.0), Config()
    step = tracejit.compile(step, backend="numpy")
    for _ in range(4):
        step(config, {"x": x, "n": 3}, (x + 1, 2.0), x + 2, z=x + 3)
        step(config, {"x": x, "n": 3}, (x + 1, 2.0), x + 2, z=x + 3, name="sum")
    loaded, plain = reload(step), step.__wrapped__
    for name in ({}, {"name": "sum"}):
        given = {"x": x, "n": 3}, (x + 1, 3.0), x + 2
        ours, theirs = loaded(*given, z=x + 3, **name), plain(config, *given, z=x + 3, **name)
        torch.testing.assert_close(ours, theirs)
    for batch, why in (
        ({"x": x, "n": 4}, r"batch\['n'\] is 3, not 4"),
        ({"n": 3, "x": x}, "batch is a dict of 'x', 'n' in this order"),
        ([x, 3], "batch is a dict"),
    ):
        with pytest.raises(CallError, match=why):
            loaded(batch, (x, 3.0), x, z=x)
    with pytest.raises(CallError, match=r"pair is a tuple of 2, not a tuple of 3"):
        loaded({"x": x, "n": 3}, (x, 3.0, 1), x, z=x)


def test_places_of_arguments_are_those_of_the_step(reload):
    """After one that is left to its default, arguments are given by name."""

    def step(x, flag=True, y=None):
        return x - y if flag else x + y

    x, y = torch.ones(3), torch.arange(3.0)
    step = tracejit.compile(step, backend="numpy")
    for _ in range(4):
        step(x, y=y)
        step(x, False, y)
    loaded = reload(step)
    assert torch.equal(loaded(x, y=y), x - y) and torch.equal(loaded(x, False, y), x + y)
    with pytest.raises(CallError, match=r"by place \(x\), and was given 2"):
        loaded(x, y)


def test_arguments_of_any_kind_are_replayed(tmp_path):
    """Those that a file cannot keep are no matter until one is asked for."""
    x, odd = torch.ones(3), torch.eye(3).to_sparse()
    step = compiled(lambda x, unused: x * 2, (x, odd))
    assert step.stats.replays and torch.equal(step(x, odd), 2 * x)
    with pytest.raises(CannotSave, match="an argument of it is a Tensor of layout torch.sparse"):
        step.save(tmp_path / "a.step")


def test_modules_among_the_arguments_are_state(reload):
    step, batch, model, optimizer = network()

    def stepped(model, optimizer, x, y):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    loaded = reload(compiled(stepped, (model, optimizer, *batch)))
    assert {"model.0.weight", "model.2.bias"} <= loaded.state_dict().keys()
    alike(loaded, step, batch, batch)


def test_what_a_replay_keeps_of_its_arguments():
    """No tensors: a batch that was given once is free again."""
    x = torch.ones(1000)
    seen = weakref.ref(x)
    step = compiled(lambda pair, batch: pair[0] + batch.x, (Pair(x, 1.0), Batch(x)))
    assert step.stats.replays
    del x
    gc.collect()
    assert seen() is None


def test_a_tensor_that_is_two_arguments(reload, tmp_path):
    x = torch.ones(3)
    with pytest.raises(CannotSave, match="one tensor is two arguments"):
        compiled(lambda a, b: a + b, (x, x)).save(tmp_path / "a.step")
    loaded = reload(compiled(lambda a, b: a + b, (x, x.clone())))
    with pytest.raises(CallError, match="share memory"):
        loaded(x, x)


def test_arguments_that_are_updated(reload):
    """Weights that are passed are changed in place; their gradients are theirs."""

    def step(x, w):
        w.grad = None
        loss = (x @ w).pow(2).sum()
        loss.backward()
        with torch.no_grad():
            w -= 0.1 * w.grad
        return loss.detach()

    torch.manual_seed(0)
    x, w = torch.randn(3, 2).double(), torch.randn(2).double().requires_grad_()
    loaded = reload(compiled(step, (x, w)))
    ours, theirs = (w.detach().clone().requires_grad_() for _ in range(2))
    ours.grad, theirs.grad = torch.ones(2).double(), torch.ones(2).double()
    for _ in range(3):
        torch.testing.assert_close(loaded(x, ours), step(x, theirs))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert loaded.state_dict() == {}
    shared = torch.zeros(8).double()
    a, b = shared[:6].view(3, 2), shared[4:6].requires_grad_()
    with pytest.raises(CallError, match="share memory"):
        loaded(a, b.detach().requires_grad_())


def test_memory_of_the_state_is_no_argument(reload):
    step, (x, y), model, _ = network()
    loaded = reload(compiled(step, (x, y)))
    with torch.no_grad():
        loaded(x, y)
    own = loaded.state_dict()["model.0.weight"]  # 3 x 4
    wide = own.as_strided((5, 4), (0, 1))
    with pytest.raises(CallError):
        loaded(wide, y)
    other = compiled(lambda x: model[0](x).sum().detach(), (torch.ones(3, 4).double(),))
    loaded = reload(other)
    with pytest.raises(CallError, match="share memory"):
        loaded(loaded.state_dict()["model.0.weight"])


def test_inputs_of_another_alignment(reload):
    step, (x, y), *_ = network()
    loaded = reload(compiled(step, (x, y)))
    shifted = torch.empty(21).double()[1:].view(5, 4).copy_(x)
    assert shifted.data_ptr() % 16
    alike(loaded, step, (x, y), (shifted, y), (x, y))


# ---- state


def test_state_goes_out_and_in(reload, tmp_path):
    step, batch, model, optimizer = network()
    loaded = reload(compiled(step, batch))
    state = {name: x.clone() for name, x in loaded.state_dict().items()}
    assert {"model.0.weight", "optimizer.state[model.2.bias].exp_avg"} <= state.keys()
    assert state["optimizer.state[model.2.bias].step"] == 4
    assert {f"model.{name}.grad" for name, _ in model.named_parameters()} <= state.keys()
    first = [loaded(*batch) for _ in range(3)]
    loaded.save(tmp_path / "later.step")
    loaded.load_state_dict(state)
    assert [loaded(*batch) for _ in range(3)] == first
    later = tracejit.load(tmp_path / "later.step", backend="numpy")
    assert later(*batch) == loaded(*batch)
    loaded.zero_grad()
    assert not any(name.endswith(".grad") for name in loaded.state_dict())
    bad = state | {"model.0.weight": torch.zeros(3, 5).double()}
    for given, why in (
        ({"model.0.bias": state["model.0.bias"]}, "model.0.weight is missing"),
        (state | {"more": torch.ones(1)}, "there is no more"),
        (bad, r"model.0.weight: torch.float64\[3, 5\] and torch.float64\[3, 4\] do not match"),
    ):
        with pytest.raises(CallError, match=why):
            loaded.load_state_dict(given)
    loaded.load_state_dict({"model.0.bias": torch.ones(3).double(), "x": batch[0]}, strict=False)
    assert torch.equal(loaded.state_dict()["model.0.bias"], torch.ones(3).double())


def test_gradients_are_state(reload):
    """Accumulated over calls; a step that starts without a gradient says so."""
    w = torch.ones(3).double().requires_grad_()

    def step(x):
        (w * x).pow(2).sum().backward()

    x = torch.arange(3.0).double()
    loaded = reload(compiled(step, (x,)))
    step(x)
    loaded(x)
    torch.testing.assert_close(loaded.state_dict()["w.grad"], w.grad)
    loaded.zero_grad()
    with pytest.raises(CallError, match=r"w.grad is None.*load_state_dict\({'w.grad'"):
        loaded(x)


def test_gradients_that_are_cleared_outside(reload):
    w = torch.ones(3).double().requires_grad_()

    def step(x):
        (w * x).pow(2).sum().backward()

    x, compiled_step = torch.arange(3.0).double(), tracejit.compile(step, backend="numpy")
    for _ in range(4):
        w.grad = None
        compiled_step(x)
    loaded = reload(compiled_step)
    with pytest.raises(CallError, match="w.grad is set"):
        loaded(x)
    loaded.zero_grad()
    for _ in range(2):
        loaded(x)
        torch.testing.assert_close(loaded.state_dict()["w.grad"], 2 * x * x)
        with pytest.raises(CallError, match="w.grad is set"):
            loaded(x)
        loaded.zero_grad()


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_accumulated(reload, to_none):
    """A counter decides when to update: there is a plan for each way, wherever it stands."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = {"batches": 0}

    def step(x):
        loss = model(x).pow(2).mean()
        loss.backward()
        seen["batches"] += 1
        if seen["batches"] % 3 == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        return loss.detach()

    x = torch.randn(4, 3).double()
    trained = compiled(step, (x,), times=24)
    for _ in range(3):  # saved at each place of the cycle
        assert trained.explain_mode().startswith("replay"), trained.explain_mode()
        loaded = reload(trained)
        ours, theirs = [], []
        for i in range(7):
            rate = optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)
            ours.append(loaded(x, lr=rate))  # which only one of the plans reads
            theirs.append(step(x))
        torch.testing.assert_close(ours, theirs)
        assert loaded.numbers["seen['batches']"] == seen["batches"]


def test_tensors_that_the_step_replaces(reload):
    w, ema = torch.ones(3).double(), torch.zeros(3).double()
    held = {"ema": ema}

    def step(x):
        nonlocal w
        w = w * 0.5 + x
        held["ema"] = 0.9 * held["ema"] + 0.1 * w
        return w.sum()

    x = torch.arange(3.0).double()
    loaded = reload(compiled(step, (x,), times=6))
    alike(loaded, step, *[(x,)] * 4)
    torch.testing.assert_close(loaded.state_dict()["w"], w)
    torch.testing.assert_close(loaded.state_dict()["held['ema']"], held["ema"])


def test_data_of_tensors_that_is_replaced(reload):
    w = torch.ones(3).double().requires_grad_()

    def step(x):
        w.grad = None
        (w * x).sum().backward()
        w.data = w.data - 0.1 * w.grad
        return w.detach().sum()

    x = torch.arange(3.0).double()
    loaded = reload(compiled(step, (x,)))
    alike(loaded, step, *[(x,)] * 4)


def test_layouts_and_dtypes(reload):
    torch.manual_seed(0)
    kernel = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    low, count = torch.randn(3).bfloat16(), torch.tensor([3], dtype=torch.int32)
    empty, mask = torch.empty(0, 3), torch.tensor([True, False, True])

    def step(x):
        count.add_(1)
        low.mul_(2)
        kernel.mul_(0.5)
        y = F.conv2d(x, kernel).sum() + empty.sum() + torch.where(mask, low.float(), 0.0).sum()
        return y * count, kernel

    x = torch.randn(1, 3, 4, 4)
    loaded = reload(compiled(step, (x,)))
    alike(loaded, step, (x,), (x,), rel=1e-5)
    found = loaded.state_dict()
    assert found["kernel"].stride() == kernel.stride()
    assert torch.equal(found["low"], low) and torch.equal(found["count"], count)


def test_state_with_gaps(reload):
    """Parts of larger tensors, and expanded ones."""
    torch.manual_seed(0)
    part = torch.randn(8, 6)[::2, :3].t().requires_grad_()
    row, column = torch.randn(1, 4).expand(3, 4), torch.randn(4, 9)[:, 2]
    empty = torch.empty(0, 4).t()

    def step(x):
        loss = ((x @ part) * row * column).square().mean() + empty.sum()
        loss.backward()
        with torch.no_grad():
            part.sub_(0.1 * part.grad)
            part.grad = None
            column.mul_(0.9)
        return loss.detach()

    x = torch.randn(3, 3)
    loaded = reload(compiled(step, (x,)))
    alike(loaded, step, (x,), (x,), (x,), rel=1e-5)
    for name, tensor in {"part": part, "row": row, "column": column}.items():
        assert loaded.state_dict()[name].stride() == tensor.stride()
    loaded.load_state_dict({name: t + 1 for name, t in loaded.state_dict().items()})
    for name, tensor in {"part": part, "row": row}.items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor.detach() + 1)


@pytest.mark.parametrize("state", [torch.ones(9).unfold(0, 3, 1), torch.ones(2, 500)[:, 3]])
def test_state_of_overlaps_and_large_gaps_is_refused(state, tmp_path):
    step = compiled(lambda x: (x * state).sum(), (torch.ones(()),))
    with pytest.raises(CannotSave, match=r"state has strides .*overlaps or large gaps"):
        step.save(tmp_path / "a.step")


# ---- what is returned, drawn and checked


def test_backward_outside(reload):
    w = torch.ones(3).double().requires_grad_()
    step = lambda x, scale: ((w * x) ** 2).sum() * scale  # noqa: E731
    x = torch.arange(3.0).double()
    loaded = reload(compiled(step, (x, 2.0)))
    loss = loaded(x, 3.0)
    loss.backward()
    torch.testing.assert_close(loaded.state_dict()["w.grad"], 6.0 * x * x)
    optimizer_like = loaded.state_dict()["w"]  # shares memory with the step's own
    optimizer_like -= 1
    assert loaded(x, 3.0) == 0


def test_random_numbers(reload):
    """From torch's own generator, or from one whose state is in the file."""
    own = torch.Generator().manual_seed(3)

    def step(x):
        noise = torch.randn(4, generator=own).double()
        return F.dropout(x, 0.5) + noise, torch.rand(2)

    x = torch.ones(4).double()
    loaded = reload(compiled(step, (x,)))
    again = torch.Generator()
    again.set_state(own.get_state())
    torch.manual_seed(5)
    expected = [step(x) for _ in range(3)]
    torch.manual_seed(5)
    for each in expected:
        torch.testing.assert_close(loaded(x), each, rtol=0, atol=0)
    own.set_state(again.get_state())
    fast = reload(compiled(step, (x,), randomness="fast"))
    torch.manual_seed(5)
    (a, _), (b, _) = fast(x), fast(x)
    assert not torch.equal(a, b)
    torch.manual_seed(5)


def test_values_that_eager_refuses(reload):
    """Raise as in eager, and change nothing: classes from outside, indices that are computed."""
    w = torch.zeros(3, 4).double().requires_grad_()

    def step(x, labels, at):
        w.grad = None
        loss = F.cross_entropy(x @ w, labels) + x[:, at + 1].sum()
        loss.backward()
        return loss.detach()

    x = torch.ones(2, 3).double()
    good, at = torch.tensor([0, 3]), torch.tensor([0, 1])
    loaded = reload(compiled(step, (x, good, at)))
    alike(loaded, step, (x, good, at))
    before = {name: t.clone() for name, t in loaded.state_dict().items()}
    with pytest.raises((IndexError, TracejitError)) as raised:
        loaded(x, torch.tensor([0, 4]), at)
    assert isinstance(raised.value, (AxisError, ArgumentError)) and "4" in str(raised.value)
    with pytest.raises(IndexError, match="3"):
        loaded(x, good, torch.tensor([0, 2]))
    assert all(torch.equal(before[name], t) for name, t in loaded.state_dict().items())


def test_where_it_cannot_be_called(reload):
    step, batch, *_ = network()
    loaded = reload(compiled(step, batch))
    with torch.inference_mode(), pytest.raises(CallError, match="inference mode"):
        loaded(*batch)
    inside = tracejit.compile(lambda x, y: loaded(x, y), backend="numpy")
    with pytest.raises(SideEffectError, match="inside a step that is being traced"):
        inside(*batch)
    with torch.no_grad():  # as in grad mode
        alike(loaded, lambda *args: torch.enable_grad()(step)(*args), batch, batch)


# ---- the file


def test_a_file_is_a_zip_that_others_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    step, batch, model, _ = network()
    path = tmp_path / "a.step"
    compiled(step, batch).save(path)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        manifest = json.loads(file.read("manifest.json"))
        state = safetensors.load(file.read("state.safetensors"))
        assert "backward" not in file.read("plans/0/graph.txt").decode()
    assert manifest["format"] == "tracejit saved step" and manifest["version"] == [1, 3]
    for name, tensor in model.named_parameters():
        assert torch.equal(state[f"model.{name}"], tensor)
    assert path.stat().st_mode & 0o777 == 0o600


def test_saving_replaces_a_file_and_fails_as_a_whole(tmp_path):
    step, batch, *_ = network()
    step = compiled(step, batch)
    path = tmp_path / "a.step"
    path.write_text("something else")
    step.save(str(path))
    assert path.read_bytes()[:2] == b"PK"
    with pytest.raises(FileNotFoundError):
        step.save(tmp_path / "nowhere" / "a.step")
    assert [p.name for p in tmp_path.iterdir()] == ["a.step"]
    with pytest.raises(FileNotFoundError):
        tracejit.load(tmp_path / "b.step")


# ---- what cannot be saved


def grows():
    losses = []

    def step(x):
        more = x * sum(losses)
        losses.append(x.sum().item())
        return more

    return step


def steps_a_schedule():
    w = torch.ones(3).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    rates = optimizer.param_groups[0]

    def step(x):
        optimizer.zero_grad()
        (w * x).sum().backward()
        optimizer.step()
        schedule.step()
        return rates["lr"] * 2

    return step


def returns_text():
    count = 0

    def step(x):
        nonlocal count
        count += 1
        return x * 2, f"step {count}"

    return step


class Made:
    """An object whose class makes it in a way of its own."""

    def __new__(cls, x):
        made = super().__new__(cls)
        made.x = x
        return made


class Counted:
    def __init__(self, x):
        self.x, self.times = x, 0.0


def assigns_to_a_field(batch):
    batch.times += 1
    return batch.x * batch.times


def draws_by_value(x):
    return torch.multinomial(x.softmax(0), 2) + x.sum()


REFUSED = {
    "random": (lambda x: x * random.random(), "draws a number by random of random .*outside"),
    "choice": (lambda x: x * random.choice([1, 2]), "it is not replayed .*random"),
    "drawn": (draws_by_value, r"which elements it finds at test_saved.py:\d+.*Draw outside"),
    "list": (grows(), r"appends to a list of yours \(losses\) and looks.*where the step is called"),
    "text": (returns_text(), "it makes text of a number.*after the call"),
    "schedule": (steps_a_schedule(), "reads .*lr after a scheduler .*at the end of the step"),
    "items": (lambda pair: pair["loss"] * 2, "an argument of it is a OrderedDict of 1 items"),
    "object": (lambda batch: batch.x * 2, "an argument of it is a Made with tensors in it"),
    "field": (assigns_to_a_field, r"assigns to a field of its argument \(batch.times\)"),
    "keys": (lambda batch: batch[0, 1] * 2, r"fits no file \(.*\[0, 1\].*report"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_saved_says_why(what, tmp_path):
    function, why = REFUSED[what]
    x = torch.ones(3)
    given = {
        "items": OrderedDict(loss=x),
        "object": Made(x),
        "keys": {(0, 1): x},
        "field": Counted(x),
    }.get(what, x)
    step = compiled(function, (given,), times=8)
    with pytest.raises(CannotSave, match=why) as raised:
        step.save(tmp_path / "a.step")
    assert f"test_saved.py:{function.__code__.co_firstlineno}" in str(raised.value)
    assert not any(tmp_path.iterdir())


def test_state_that_shares_memory_is_refused(tmp_path):
    whole = torch.ones(4)
    half = whole[:2]
    step = compiled(lambda x: x + whole.sum() + half.sum(), (torch.ones(2),))
    with pytest.raises(CannotSave, match="whole and half share memory|half and whole share"):
        step.save(tmp_path / "a.step")


def test_a_step_has_to_be_called(tmp_path):
    step = tracejit.compile(lambda x: x * 2)
    with pytest.raises(CannotSave, match="not been called.*Call it until it is replayed"):
        step.save(tmp_path / "a.step")


def test_what_would_not_be_replayed_is_not_saved(reload):
    """A plan of another Python state than there is now."""

    class Net:
        double = True

    net = Net()

    def step(x):
        return x * 2 if net.double else x * 3

    x, few = torch.ones(3), torch.ones(2)
    step = compiled(step, (x,), (few,))
    net.double = False
    for _ in range(4):
        step(few)
    loaded = reload(step)
    assert torch.equal(loaded(few), few * 3)
    with pytest.raises(CallError, match=r"x is f32\[3\], and the plan takes f32\[2\]"):
        loaded(x)
    net.double = None
    with pytest.raises(CannotSave, match="no plan that it has would be replayed now: .*double"):
        reload(step)


def test_all_steps_of_the_table_are_small_files(tmp_path):
    case = STEPS["by_hand"]()
    step = compiled(case.step, case.args(0))
    step.save(tmp_path / "a.step")
    assert (tmp_path / "a.step").stat().st_size < 40_000


# ---- other devices


def test_a_step_moves_to_another_device(tmp_path):
    """As data: there is no GPU to run it on. It comes back as it was, but for what only a CPU
    looks at."""
    case = STEPS["two_layers"]()
    step = compiled(case.step, case.args(0), case.args(1))
    step.save(tmp_path / "a.step")
    with (tmp_path / "a.step").open("rb") as file:
        saved = step_of(archive.read(file))
    there = moved(saved, "cuda")
    check_step(there)
    devices = devices_of_state(there)
    counters = {name for name in devices if name.endswith(".step")}
    assert counters and all((devices[name] == "cpu") == (name in counters) for name in devices)
    assert "@cuda:0" in str(there.plans[0].captured.graph)
    back = moved(there, "cpu")
    for old, new in zip(saved.plans, back.plans, strict=True):
        assert plan_entries(old) == plan_entries(new)
    assert str(moved(saved, "cuda:0").plans[0].captured.graph).count("@cpu") == 0
    if not torch.cuda.is_available():
        archive.write(tmp_path / "b.step", entries_of(there, "a test"))
        with pytest.raises(SavedFileError, match="on a GPU.*device='cpu'"):
            tracejit.load(tmp_path / "b.step")
        loaded = tracejit.load(tmp_path / "b.step", backend="numpy", device="cpu")
        alike(loaded, case.step, case.args(0), case.args(1))
    with pytest.raises(SavedFileError, match="no plan is for meta"):
        tracejit.load(tmp_path / "a.step", device="meta")


def test_a_generator_of_ones_own_stays_where_it_is(tmp_path):
    case = rich()
    compiled(case.step, case.args(0)).save(tmp_path / "a.step")
    with pytest.raises(SavedFileError, match="a generator of one's own on cpu"):
        tracejit.load(tmp_path / "a.step", device="cuda:0")


def test_a_file_of_the_fake_device(tmp_path):
    """A step of a GPU that is not here, saved and loaded there, and loaded on the CPU."""
    pytest.importorskip("triton")
    step, batch, *_ = network()
    with fake_device(compiled=False):
        on_fake = tracejit.compile(step, backend=FAKE)
        for _ in range(4):
            on_fake(*batch)
        on_fake.save(tmp_path / "a.step")
        loaded = tracejit.load(tmp_path / "a.step", backend=FAKE)
        other = tracejit.load(tmp_path / "a.step", backend="numpy")
        for _ in range(3):
            expected = step(*batch)
            for each in (loaded, other):
                torch.testing.assert_close(each(*batch), expected, rtol=1e-9, atol=1e-12)
    with zipfile.ZipFile(tmp_path / "a.step") as file:
        assert "triton.jit" in file.read("shown/plans/0/kernels/0.py").decode()


# ---- programs and optimizers

OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam", "Adamax")
OPTIMIZERS += ("ASGD", "Rprop", "Adafactor")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name, reload):
    program = PROGRAMS[name]
    step, _ = program.make(**program.small)
    trained = tracejit.compile(step, backend="numpy")
    for _ in range(5):
        returned = trained()
        if name.startswith("8"):
            returned.backward()
    loaded, near = reload(trained), 2e-2 if "16" in name else 1e-3
    for _ in range(3):
        ours, theirs = loaded(), step()
        if name.startswith("8"):
            ours.backward(), theirs.backward()
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, reload):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)

    def step(x):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    x = torch.randn(5, 4).double()
    loaded = reload(compiled(step, (x,), times=8))
    alike(loaded, step, *[(x,)] * 5, rel=1e-9)
    for key, tensor in model.named_parameters():
        torch.testing.assert_close(loaded.state_dict()[f"model.{key}"], tensor.detach())


def test_a_loop_in_time_that_was_rolled_up(tmp_path):
    weight = torch.ones(2, 2, requires_grad=True)

    @tracejit.compile
    def step(x):
        h, out = torch.zeros(2), torch.zeros(x.shape[0], 2)
        for t in range(x.shape[0]):
            h = torch.tanh(x[t] + h @ weight)
            out[t] = h
        weight.grad = None
        out.sum().backward()
        return out.detach()

    x = torch.linspace(-1, 1, 48).view(24, 2)
    for _ in range(3):
        right = step(x)
    assert "scan" in str(step.graph)
    step.save(tmp_path / "loop.step")
    assert torch.equal(tracejit.load(tmp_path / "loop.step")(x=x), right)
