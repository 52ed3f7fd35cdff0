"""What calls give to a GPU, on the fake one: the exact sequence, streams, captures, errors. And the
tests would see it if something were left out: faults are planted."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

import tracejit
from examples import two_layer_autograd
from support.fake import FAKE, log_of, trained, trained_on_streams, warm
from support.programs import PROGRAMS
from tracejit.errors import CaptureError, LaunchError
from tracejit.runtime import launched_plan
from tracejit.runtime.fake_clock import Fault
from tracejit.runtime.fake_device import FakeDevice, FakeEvent
from tracejit.runtime.fake_launch import FakeLaunch
from tracejit.runtime.launched_plan import LaunchedPlan
from tracejit.runtime.memory import FreshMemory, StreamArenas
from tracejit.testing import fake_device

SMALL = PROGRAMS["2 zero_"].small


@pytest.fixture
def device(monkeypatch) -> Iterator[FakeDevice]:
    monkeypatch.setenv("TRACEJIT_GRAPHS", "0")  # test_graphs.py has those
    with fake_device(compiled=False) as found:
        yield found


# ---- the sequence


def test_golden_sequences(device, golden):
    """One replay where nothing changed, and one where a number did."""
    texts = []

    def tell(name: str, call: Callable[[], object]) -> None:
        texts.append("\n".join([f"# {name}", *log_of(device, call), ""]))

    step, _, optimizer = trained()
    step = warm(step)
    tell("SGD", step)
    optimizer.param_groups[0]["lr"] = 0.01
    tell("SGD with another learning rate", step)
    tell("SGD with the same again", step)
    step, *_ = trained(torch.optim.Adam)
    tell("Adam, whose counters count", warm(step))
    step, *_ = trained()
    reading = warm(lambda: step().item())
    tell("SGD, whose loss is read", reading)
    two_layer, _ = two_layer_autograd.make_step("zero_", **SMALL)
    tell("two layers", warm(two_layer))
    golden("launch_sequences.txt", "\n".join(texts))


def test_two_layers_are_four_launches_and_no_copy(device):
    step, _ = two_layer_autograd.make_step("zero_")
    found = log_of(device, warm(step))
    assert len(found) == 4 and all("launch" in line for line in found)


def test_one_copy_a_step_and_none_when_nothing_changed(device):
    step, _, optimizer = trained(torch.optim.SGD, momentum=0.9)
    step = warm(step, 6)
    for call in range(10):
        if call % 2:
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.param_groups[0]["momentum"] *= 0.99
        copies = [line for line in log_of(device, step) if "copy" in line]
        assert len(copies) == call % 2 and all("pinned" in line for line in copies)


def test_a_replay_allocates_no_more_than_its_results(device, monkeypatch):
    step, *_ = trained(torch.optim.Adam)
    step, allocated = warm(step), []
    plain = FakeDevice.allocate
    monkeypatch.setattr(
        FakeDevice, "allocate", lambda self, n: (allocated.append(n), plain(self, n))[1]
    )
    step()
    assert len(allocated) == len(step.plans[-1].results)


# ---- streams


def test_two_streams_in_turn_give_the_same_bits(device):
    """Each stream trains a network of its own with one plan, as if it were alone."""
    apart, alone = (
        trained_on_streams(device, streams)
        for streams in ([device.stream(), device.stream()], [0, 0])
    )
    for a, b in zip(apart, alone, strict=True):
        assert torch.equal(a, b)


def test_launches_follow_the_callers_stream(device):
    step, *_ = trained()
    step, side, event = warm(step), device.stream(), device.event()
    event.record()
    with device.on(side):
        event.hold()
        found = log_of(device, step)
    assert found and all(line.startswith(f"stream {side}: ") for line in found)


def test_launches_go_to_the_device_of_the_tensors(device):
    step, *_ = trained()
    step = warm(step)
    with device.elsewhere():
        assert "launch" in log_of(device, step)[0]
        assert device.here() != device.number


@pytest.mark.parametrize("graphs", ["0", "1"])
def test_devices_of_one_process_stay_apart(monkeypatch, graphs):
    """Each has launches, memory and numbers of its own, whichever is the current one."""
    monkeypatch.setenv("TRACEJIT_GRAPHS", graphs)
    first, second = (fake_device(target, compiled=False) for target in ("sm_90", "sm_80"))
    with first as first, second as second:
        devices = {first: second, second: first}
        eager, *_, optimizer = trained(torch.optim.SGD, momentum=0.9)
        optimizers, steps = [optimizer], {}
        for device in devices:
            step, *_, optimizer = trained(torch.optim.SGD, momentum=0.9)
            optimizers.append(optimizer)
            steps[device] = tracejit.compile(step, backend=device.name)
        for call in range(10):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.05 * 0.9**call
            loss = eager()
            for device, other in devices.items():
                device.log.clear()
                other.log.clear()
                with device.elsewhere() if call % 2 else other.elsewhere():
                    torch.testing.assert_close(steps[device](), loss)
                assert device.log and not other.log
        for device, step in steps.items():
            assert step.stats.replays >= 6, step.explain_mode()
            tables = [s.table for s in step._last.program.loaded._states.values()]
            assert {*tables} <= device._blocks.keys()


def test_a_stream_that_is_new_has_its_own_counters_and_numbers(device):
    x = torch.randn(40_000)

    def step(scale: float) -> torch.Tensor:
        return (x * scale).sum()

    compiled = tracejit.compile(step, backend=FAKE)
    for _ in range(4):
        compiled(2.0)
    device.synchronize()
    loaded = compiled._last.program.loaded
    with device.on(device.stream()):
        found = log_of(device, lambda: compiled(2.0))
    assert [line.partition(": ")[2].partition(" (")[0] for line in found[:-1]] == [
        f"copy {loaded._work_bytes} bytes to the device",
        "copy 8 bytes to the device",
        "event",
    ]
    first, second = loaded._states.values()
    assert first.work != second.work and first.table != second.table


def test_no_more_streams_are_remembered_than_some(device):
    step, *_ = trained()
    step = warm(step)
    device.synchronize()
    loaded = step._last.program.loaded
    for _ in range(3 * launched_plan.MAX_STREAMS):
        with device.on(device.stream()):
            step()
        device.synchronize()
    assert len(loaded._states) == launched_plan.MAX_STREAMS
    assert len(step._programs._memory._arenas[device.name]._free) <= StreamArenas.MAX_STREAMS


def test_a_result_that_another_stream_reads_is_not_written_over(device):
    """The reader says so by `record_stream`, as it would to torch's allocator."""
    step, side = tracejit.compile(lambda x: x * 2, backend=FAKE), device.stream()
    x = torch.randn(300)
    for _ in range(12):
        y, event = step(x), device.event()
        event.record()
        with device.on(side):
            event.hold()
            device.uses(y)
        device.record_stream(y, side)
        del y
    assert step.stats.replays


def test_a_call_in_the_middle_of_another(device, monkeypatch):
    """As a signal handler may make it: on the same stream, with other tensors and numbers."""

    def step(x: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.softmax(x @ x, 0) * scale

    compiled = tracejit.compile(step, backend=FAKE, fuse=False)
    first, second = torch.randn(20, 20), torch.randn(20, 20)
    for _ in range(5):
        compiled(first, 1.0)
    call, within = FakeLaunch.__call__, []

    def calls(self: FakeLaunch, *given: object) -> None:
        call(self, *given)
        if len(within) == 0:
            within.append(None)
            within.append(compiled(second, 3.0))

    with monkeypatch.context() as patched:
        patched.setattr(FakeLaunch, "__call__", calls)
        found = compiled(first, 2.0)
    torch.testing.assert_close(within[1], step(second, 3.0))
    torch.testing.assert_close(compiled(first, 2.0), step(first, 2.0))
    torch.testing.assert_close(found, step(first, 2.0))


def test_a_plan_goes_with_its_step(device):
    """Without the garbage collector: it holds memory of the GPU."""
    step, *_ = trained()
    step = warm(step)
    held = weakref.ref(step._last.program.loaded)
    gc.collect()
    gc.disable()
    try:
        step.reset()
        assert held() is None
    finally:
        gc.enable()


# ---- planted faults: what would be wrong is seen


def on_two_streams(device: FakeDevice) -> None:
    """Two streams run one plan with a number and a reduction, on tensors of their own."""
    step = tracejit.compile(lambda x, scale: (x * scale).tanh().sum(), backend=FAKE)
    inputs = [torch.randn(40_000), torch.randn(40_000)]
    streams = [device.stream(), device.stream()]
    for call in range(8):
        for x, stream in zip(inputs, streams, strict=True):
            with device.on(stream):
                step(x, 1.0 + call)


def test_without_faults_two_streams_are_fine(device):
    on_two_streams(device)


def test_shared_counters_are_seen(device, monkeypatch):
    enter = LaunchedPlan._enter

    def shared(self: LaunchedPlan) -> object:
        for state in self._states.values():
            state.stream = self.device.current_stream()
            state.calls.clear()
            return state
        return enter(self)

    monkeypatch.setattr(LaunchedPlan, "_enter", shared)
    with pytest.raises(Fault, match="no event between"):
        on_two_streams(device)


def test_a_shared_arena_is_seen(device, monkeypatch):
    step = tracejit.compile(lambda x: (torch.softmax(x @ x, 0) @ x).sum(), backend=FAKE, fuse=False)
    inputs, streams = [torch.randn(30, 30), torch.randn(30, 30)], [0, device.stream()]

    def run() -> None:
        for _ in range(4):
            for x, stream in zip(inputs, streams, strict=True):
                with device.on(stream):
                    step(x)

    run()
    take = StreamArenas.take

    def shared(self: StreamArenas, nbytes: int) -> tuple:
        for free in self._free.values():
            if free:
                return free[0]
        return take(self, nbytes)

    monkeypatch.setattr(StreamArenas, "take", shared)
    step.reset()
    with pytest.raises(Fault, match="no event between"):
        run()


def test_a_slot_that_is_used_again_too_early_is_seen(device, monkeypatch):
    on_two_streams(device)
    monkeypatch.setattr(FakeEvent, "wait", lambda self: None)
    with pytest.raises(Fault, match="changed pinned memory"):
        on_two_streams(device)


def test_a_result_that_is_used_again_too_early_is_seen(device, monkeypatch):
    kept: dict[FreshMemory, tuple] = {}
    take = FreshMemory.take
    monkeypatch.setattr(FreshMemory, "take", lambda self, r: kept.setdefault(self, take(self, r)))
    with pytest.raises(Fault, match="may still read: no event between"):
        test_a_result_that_another_stream_reads_is_not_written_over(device)


def test_a_read_that_does_not_wait_is_seen(device, monkeypatch):
    step, *_ = trained()
    reading = tracejit.compile(lambda: step().item(), backend=FAKE)
    numbers = [reading() for _ in range(8)]
    assert reading.stats.replays and all(a == a for a in numbers)
    monkeypatch.setattr(FakeEvent, "wait", lambda self: None)
    number = reading()
    assert number != number  # it has not arrived


def test_a_pageable_copy_in_a_capture_is_seen(device, monkeypatch):
    monkeypatch.setattr(FakeDevice, "_is_pinned", lambda self, tensor: False)
    step, *_ = trained()
    step = warm(step)
    assert not [line for line in log_of(device, step) if "copy" in line]
    with device.capture(), pytest.raises(Fault, match="a pageable copy while a graph"):
        step()


# ---- graphs of the caller's


def test_a_step_joins_the_graph_that_the_caller_captures(device):
    """As eager would: memory of the graph's own, numbers as they were at the capture."""
    x, out = torch.randn(40_000), torch.zeros(1)

    def step(scale: float) -> torch.Tensor:
        total = (x * scale).sum()
        out.copy_(total.reshape(1))
        return total

    compiled = tracejit.compile(step, backend=FAKE)
    for _ in range(5):
        compiled(1.0)
    before = out.clone()
    with device.capture() as graph:
        kept = compiled(3.0)
    assert torch.equal(out, before) and kept.isnan()
    for _ in range(2):
        x.add_(1)
        device.replay(graph)
        torch.testing.assert_close(out[0], (x * 3).sum())
        torch.testing.assert_close(kept, out[0])
        torch.testing.assert_close(compiled(1.0), x.sum())  # in memory of its own
        torch.testing.assert_close(kept, (x * 3).sum())


def test_a_graph_outlives_the_step(device):
    x, out = torch.randn(40_000), torch.zeros(1)

    def step(scale: float) -> None:
        out.copy_((x * scale).sum().reshape(1))

    compiled = tracejit.compile(step, backend=FAKE)
    for _ in range(5):
        compiled(1.0)
    with device.capture() as graph:
        compiled(3.0)
    compiled.reset()
    gc.collect()
    device.replay(graph)
    torch.testing.assert_close(out[0], (x * 3).sum())


def test_what_cannot_join_a_graph_says_so(device):
    step, *_ = trained()
    compiled = tracejit.compile(step, backend=FAKE, on_unsupported="raise")
    with device.capture(), pytest.raises(CaptureError, match="has not been compiled"):
        compiled()
    reading = warm(lambda: step().item())
    with device.capture(), pytest.raises(CaptureError, match="reads a value of a tensor"):
        reading()


def test_many_graphs_with_numbers_are_refused(device):
    x = torch.randn(30)
    step = tracejit.compile(lambda scale: x * scale, backend=FAKE)
    for _ in range(5):
        step(1.0)
    with pytest.raises(CaptureError, match="more than 16 graphs"):
        for call in range(20):
            with device.capture():
                step(float(call))
    torch.testing.assert_close(step(2.0), x * 2)


# ---- errors


def test_a_launch_that_fails_names_itself_and_the_users_line(device, monkeypatch):
    step, *_ = trained()
    step = warm(step)
    call, launches = FakeLaunch.__call__, []

    def fails(self: FakeLaunch, *given: object) -> None:
        launches.append(self)
        if len(launches) == 3:
            raise RuntimeError("out of luck")
        call(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(FakeLaunch, "__call__", fails)
        with pytest.raises(LaunchError, match=r"fake.py:\d+") as error:
            step()
    text = str(error.value)
    assert "launch 3 of" in text and "of step 'step' failed on fake:sm_90" in text
    assert "RuntimeError: out of luck" in text
    found = log_of(device, step)  # on a stream that starts afresh
    assert "copy" in found[0] and "launch" in found[-1]
