"""`step.run(k, data)`: many calls are one launch on a GPU where they can be, and always the same
calls."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

import tracejit
from support.fake import FAKE
from support.foreach_steps import Updates, close
from tracejit.aot import TARGETS, compile_launch
from tracejit.runtime import many_steps, waiting
from tracejit.runtime.fake_clock import Fault
from tracejit.runtime.fake_device import FakeDevice
from tracejit.testing import fake_device

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without the interpreter", allow_module_level=True)

WARM = 4


class Net:
    """A small network that is trained by batches; the same one each time."""

    def __init__(self, make: Callable = torch.optim.SGD, hidden: int = 17, **options: object):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(9, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 3)
        )
        self.optimizer = make(self.model.parameters(), **{"lr": 0.05} | options)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.7)
        self.seen = 0

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = (self.model(x) - y).pow(2).mean()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.seen += 1
        return loss.detach()

    def state(self) -> list[torch.Tensor]:
        """Parameters, gradients and what the optimizer keeps."""
        parameters = [*self.model.parameters()]
        found = [p.detach() for p in parameters] + [p.grad for p in parameters]
        kept = self.optimizer.state_dict()["state"].values()
        return found + [t for one in kept for t in one.values() if torch.is_tensor(t)]


def batches(count: int, rows: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 9, generator=generator), torch.randn(rows, 3, generator=generator))
        for _ in range(count)
    ]


def launches(device: FakeDevice) -> list[str]:
    return [x.partition(": ")[2] for x in device.log if "launch" in x]


def check(net: Net, losses: list, data: list, eager: Net) -> None:
    """It is where eager is after the same batches."""
    expected = [eager.step(*batch) for batch in data]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    for ours, theirs in zip(net.state(), eager.state(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert net.seen == eager.seen
    assert net.schedule.state_dict() == eager.schedule.state_dict()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_many_calls_are_one_launch(make):
    data = batches(WARM + 20 + 3)
    with fake_device(compiled=False) as device:
        net = Net(make)
        step = tracejit.compile(net.step, backend=FAKE)
        losses = [step(*batch) for batch in data[:WARM]]
        device.log.clear()
        losses += step.run(20, data[WARM:])
        assert len(launches(device)) == 1 and "phases" in launches(device)[0]
        losses += [step(*batch) for batch in data[WARM + 20 :]]
        device.synchronize()
        check(net, losses, data, Net(make))


@pytest.mark.parametrize("name, clip", [("Adam", None), ("SGD", None), ("AdamW", 0.5)])
def test_updates_of_many_parameters(name, clip):
    """Their kernels are a launch through a table when alone, with numbers that they share."""
    with fake_device(compiled=False) as device:
        ours, eager = Updates(name, clip=clip), Updates(name, clip=clip)
        step = tracejit.compile(ours.step, backend=FAKE)
        for _ in range(WARM):
            step()
        assert any(x.kernel.foreach for x in step.plans[-1].launches)
        device.log.clear()
        step.run(6, [()] * 6)
        assert len(launches(device)) == 1 and "phases" in launches(device)[0]
        device.synchronize()
        for _ in range(WARM + 6):
            eager.step()
        assert close(ours.tensors, eager.tensors)


def test_run_again_uses_the_same_kernel_and_another_number_of_calls():
    data = batches(WARM + 8 + 8 + 5)
    with fake_device(compiled=False) as device:
        net = Net(torch.optim.Adam)
        step = tracejit.compile(net.step, backend=FAKE)
        losses = [step(*batch) for batch in data[:WARM]]
        device.log.clear()
        for first, count in ((WARM, 8), (WARM + 8, 8), (WARM + 16, 5)):
            losses += step.run(count, iter(data[first:]))
        assert len(launches(device)) == 3
        device.synchronize()
        check(net, losses, data, Net(torch.optim.Adam))


def test_calls_before_the_replay_is_armed_are_single_ones():
    data = batches(9)
    with fake_device(compiled=False) as device:
        net = Net()
        step = tracejit.compile(net.step, backend=FAKE)
        losses = step.run(9, data)
        device.synchronize()
        check(net, losses, data, Net())
        assert step.stats.replays > 0


def test_another_shape_in_between():
    """What waits is launched before the trace of the call that differs, and in order."""
    data = [*batches(WARM + 5), *batches(1, rows=7), *batches(6)]
    with fake_device(compiled=False) as device:
        net = Net(torch.optim.SGD, momentum=0.9)
        step = tracejit.compile(net.step, backend=FAKE)
        losses = [step(*batch) for batch in data[:WARM]]
        losses += step.run(12, data[WARM:])
        device.synchronize()
        check(net, losses, data, Net(torch.optim.SGD, momentum=0.9))


def test_an_error_in_between_leaves_the_calls_before_it():
    data = batches(WARM + 4)
    with fake_device(compiled=False) as device:
        net = Net()
        step = tracejit.compile(net.step, backend=FAKE)
        losses = [step(*batch) for batch in data[:WARM]]
        wrong = [*data[WARM:], (torch.randn(12, 8), torch.randn(12, 3)), *batches(2)]
        with pytest.raises(RuntimeError, match="shape"):
            step.run(7, wrong)
        device.synchronize()
        eager = Net()
        for batch in data:
            eager.step(*batch)
        for ours, theirs in zip(net.state(), eager.state(), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert losses and net.schedule.last_epoch == eager.schedule.last_epoch


def test_values_that_python_reads_are_those_of_their_call():
    data, said = batches(WARM + 6), []

    def build() -> tuple[Net, Callable]:
        net = Net()

        def step(x: torch.Tensor, y: torch.Tensor) -> float:
            loss = net.step(x, y).item()
            return loss

        return net, step

    with fake_device(compiled=False):
        net, function = build()
        step = tracejit.compile(function, backend=FAKE)
        said += [step(*batch) for batch in data[:WARM]]
        said += step.run(6, data[WARM:])
        eager = build()[1]
        assert said == pytest.approx([eager(*batch) for batch in data], rel=1e-5)


def test_random_numbers_do_not_wait():
    data = batches(WARM + 6)

    def build() -> Callable:
        net = Net()

        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return net.step(torch.nn.functional.dropout(x, 0.3), y)

        return step

    with fake_device(compiled=False) as device:
        step = tracejit.compile(build(), backend=FAKE)
        torch.manual_seed(4)
        losses = [step(*batch) for batch in data[:WARM]]
        losses += step.run(6, data[WARM:])
        device.synchronize()
        eager = build()
        torch.manual_seed(4)
        expected = [eager(*batch) for batch in data]
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected))


def test_steps_of_many_programs_are_launched_one_by_one(monkeypatch):
    monkeypatch.setattr(many_steps, "ROUNDS", 3 / 132)
    data = batches(WARM + 3)
    with fake_device(compiled=False) as device:
        net = Net()
        step = tracejit.compile(net.step, backend=FAKE)
        losses = [step(*batch) for batch in data[:WARM]]
        device.log.clear()
        losses += step.run(3, data[WARM:])
        assert not any("phases" in x for x in device.log) and len(launches(device)) >= 3
        device.synchronize()
        check(net, losses, data, Net())


def test_a_parameter_that_lies_elsewhere():
    data = batches(WARM + 10)
    with fake_device(compiled=False) as device:
        net, eager = Net(), Net()
        step = tracejit.compile(net.step, backend=FAKE)
        losses = [step(*batch) for batch in data[:WARM]]
        losses += step.run(5, data[WARM:])
        weight = net.model[0].weight
        weight.data = weight.data.clone()
        losses += step.run(5, data[WARM + 5 :])
        device.synchronize()
        check(net, losses, data, eager)


def test_outputs_are_not_given_away_before_the_launch(monkeypatch):
    """Without being held, a gradient that the next call replaces is written when it is gone."""
    data = [*batches(WARM + 6), (torch.randn(12, 8), torch.randn(12, 3))]

    def run() -> None:
        with fake_device(compiled=False):
            step = tracejit.compile(Net().step, backend=FAKE)
            for batch in data[:WARM]:
                step(*batch)
            step.run(7, data[WARM:])

    with pytest.raises(RuntimeError, match="shape"):
        run()
    monkeypatch.setattr(waiting.Waiting, "hold", lambda self, tensor: None)
    with pytest.raises(Fault, match="that was given back"):
        run()


def test_a_method_and_what_k_and_data_may_be():
    class Trainer(Net):
        @tracejit.compile
        def train(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.step(x, y)

    data, trainer = batches(6), Trainer()
    losses = (
        trainer.train.run(4, data) + trainer.train.run(0, data) + trainer.train.run(1, data[4:])
    )
    check(trainer, losses, data[:5], Net())
    double = tracejit.compile(lambda x: x * 2)
    assert [x.tolist() for x in double.run(2, torch.arange(3.0))] == [0.0, 2.0]
    with pytest.raises(ValueError, match=r"data has 2 items"):
        double.run(3, [torch.ones(1)] * 2)
    with pytest.raises(ValueError, match=r"k is -1"):
        double.run(-1, [])


@pytest.mark.parametrize(
    "target", [t if t == 90 else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS]
)
def test_machine_code(target):
    """The two-layer step with Adam: no spills, wide accesses."""
    from tracejit.runtime.triton_executor import TritonExecutor

    torch.manual_seed(0)
    x, y = torch.randn(64, 256), torch.randn(64, 16)
    model = torch.nn.Sequential(
        torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 16)
    )
    optimizer = torch.optim.Adam(model.parameters())

    def train() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    with fake_device(f"sm_{target}", compiled=False):
        step = tracejit.compile(train, backend=f"fake:sm_{target}")
        for _ in range(WARM):
            step()
        plan = step.plans[-1]
    loaded = TritonExecutor("triton").load_phases(plan, [True] * len(plan.buffers))
    pointers = {"table": "*i64", "workspace": "*i8"}
    facts = compile_launch(loaded.function, pointers, loaded.options(), target=target)
    assert facts.spills == 0 and facts.atomics > 0
    wide = facts.loads.get(128, 0) + facts.stores.get(128, 0)
    assert wide > 0
