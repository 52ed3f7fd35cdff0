"""The fake device itself: what it calls a fault, and that it does what a GPU does otherwise."""

from __future__ import annotations

import gc
import os
import random

import pytest
import torch

import tracejit
from support.fake import FAKE, trained, warm
from tracejit.runtime.fake_clock import HOST, Clocks, Fault
from tracejit.runtime.fake_device import FakeDevice
from tracejit.testing import fake_device

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without the interpreter", allow_module_level=True)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice(compiled=False)


def tensor_of(device: FakeDevice, *values: float) -> torch.Tensor:
    found = device.empty_strided((len(values),), (1,), torch.float32)
    found.copy_(torch.tensor(values))
    return found


# ---- clocks


def test_spans_are_cut_where_work_ends():
    """Against a model with one entry a byte."""
    rng = random.Random(0)
    clocks, written, read = Clocks(), {}, {}
    for _ in range(400):
        actor, start = rng.randrange(3), rng.randrange(64)
        end, writes = start + rng.randrange(1, 20), rng.random() < 0.4
        now, at = clocks.tick(actor), range(start, end)
        before = [written[i] for i in at if i in written]
        if writes:
            before += [x for i in at for x in read.get(i, {}).items()]
        act = clocks.writes if writes else clocks.reads
        if not all(clocks.knows(actor, *x) for x in before):
            with pytest.raises(Fault):
                act(actor, start, end - start, "work")
            for other in range(3):
                clocks.learn(actor, clocks.times(other))
        act(actor, start, end - start, "work")
        for i in at:
            if writes:
                written[i], read[i] = (actor, now), {}
            else:
                read.setdefault(i, {})[actor] = now
        spans = clocks._spans
        assert clocks._starts == [span.start for span in spans]
        assert all(a.end <= b.start for a, b in zip(spans, spans[1:], strict=False))


def test_an_event_orders_all_that_is_known_at_it():
    clocks = Clocks()
    for actor in "abc":
        clocks.tick(actor)
    clocks.writes("a", 0, 8, "first")
    clocks.learn("b", clocks.times("a"))
    clocks.tick("b")
    clocks.learn("c", clocks.times("b"))  # what b knows of a, too
    clocks.tick("c")
    clocks.writes("c", 4, 8, "last")
    clocks.tick("a")
    with pytest.raises(Fault, match=r"overwrites|may still write"):
        clocks.writes("a", 0, 8, "again")
    assert not clocks.knows(HOST, "a", 1)


# ---- faults


def test_memory_used_on_two_streams_needs_an_event(device):
    x, side, event = tensor_of(device, 1.0, 2.0), device.stream(), device.event()
    device.uses(x, writes=True)
    with device.on(side), pytest.raises(Fault, match="may still write: no event"):
        device.uses(x)
    event.record()
    with device.on(side):
        event.hold()
        device.uses(x)
    with pytest.raises(Fault, match="may still read: no event"):
        device.uses(x, writes=True)
    device.synchronize()
    device.uses(x, writes=True)


def test_a_copy_to_the_host_arrives_when_the_host_waits(device):
    x, at, event = tensor_of(device, 3.5), device.pinned(4).view(torch.float32), device.event()
    device.download(at, x)
    event.record()
    assert at.isnan().all()
    event.wait()
    assert at.item() == 3.5
    with pytest.raises(Fault, match="not pinned"):
        device.download(torch.empty(1), x)


def test_pinned_memory_is_left_alone_until_its_copy_is_over(device):
    target, source, event = device.allocate(8), device.pinned(8), device.event()
    source.zero_()
    device.upload(target, source)
    event.record()
    event.wait()
    source.fill_(1)  # the copy is over
    device.upload(target, source)
    source.fill_(2)
    with pytest.raises(Fault, match="changed pinned memory"):
        device.uses(target)


def test_memory_of_a_pool_is_not_given_to_another_stream(device):
    first = device.allocate(64)
    address = first.data_ptr()
    del first
    with device.on(device.stream()):
        assert device.allocate(64).data_ptr() != address
    assert device.allocate(64).data_ptr() == address


def test_memory_that_another_stream_uses_waits_for_it(device):
    side, x = device.stream(), device.allocate(64)
    address = x.data_ptr()
    with device.on(side):
        device.uses(x)
    device.record_stream(x, side)
    del x
    assert device.allocate(64).data_ptr() != address
    device.synchronize()
    assert device.allocate(64).data_ptr() == address


@pytest.mark.parametrize(
    "what",
    [
        lambda d: d.pinned(8),
        lambda d: d.synchronize(),
        lambda d: d.event().record(),
        lambda d: d.upload(d.allocate(8), torch.zeros(8, dtype=torch.uint8)),
    ],
    ids=["pinned memory", "waiting", "an event for the host", "a pageable copy"],
)
def test_what_a_capture_does_not_take(device, what):
    with device.capture(), pytest.raises(Fault, match="while a graph is captured"):
        what(device)


def test_a_graph_runs_when_it_is_replayed(device):
    x, ran = tensor_of(device, 1.0), []
    with device.capture() as graph:
        device.uses(x, writes=True, work=lambda: ran.append(1))
    assert not ran
    device.replay(graph)
    device.replay(graph)
    assert len(ran) == 2


# ---- as a backend


def test_the_backend_is_there_for_tests_only():
    with pytest.raises(ValueError, match="backend is one of"):
        tracejit.compile(lambda: None, backend=FAKE)
    with fake_device(compiled=False):
        tracejit.compile(lambda: None, backend=FAKE)
    with pytest.raises(ValueError, match="backend is one of"):
        tracejit.compile(lambda: None, backend=FAKE)


def test_steps_go_through_tritons_compiler():
    with fake_device() as device:
        x = torch.randn(1000)
        step = tracejit.compile(lambda: (x * 2).sum(), backend=FAKE)
        torch.testing.assert_close(step(), (x * 2).sum())
        (kernel,) = step._last.program.loaded._kernels.values()
        assert "on 1090" in kernel.function and hasattr(kernel.packed, "__len__")
        assert device.log[-1] == "stream 0: launch reduce of 4 programs"


def test_a_kernel_that_does_not_fit_the_gpu_is_refused_before_anything_is_written(monkeypatch):
    from tracejit.errors import LaunchError
    from tracejit.runtime import fake_device as module

    monkeypatch.setitem(module._SHARED, 86, 16)  # of no other test: Triton remembers it
    with fake_device("sm_86") as device:
        w, x = torch.randn(64, 64), torch.randn(64, 64)
        before = w.clone()

        def step() -> None:
            w.sub_(x @ x)

        compiled = tracejit.compile(step, backend="fake:sm_86")
        with pytest.raises(LaunchError, match=r"test_fake_device.py:\d+.*could not be loaded") as e:
            compiled()
        assert "launch 1 of 1 (matmul" in str(e.value) and "shared memory" in str(e.value)
        assert torch.equal(w, before) and not device.log


def test_what_launches_are_checked_for(monkeypatch):
    with fake_device(compiled=False):
        step, _, _ = trained()
        compiled = warm(step)
        kernels = compiled._last.program.loaded._kernels
        run = next(iter(kernels.values())).run
        launch = run._launch
        pointers = [0] * len(run._aligned)
        head = (launch.geometry.grid[0], 1, 1, 0, *run._handles, None, None, None)
        with pytest.raises(Fault, match="constants"):
            run(*head, *pointers)
        with pytest.raises(Fault, match="was compiled for aligned pointers"):
            run(*head, 8, *pointers[1:], *run._constants)
        with pytest.raises(Fault, match="no integer"):
            run(*head, None, *pointers[1:], *run._constants)
        with pytest.raises(Fault, match="the grid"):
            run(0, *head[1:], *pointers, *run._constants)
        with pytest.raises(Fault, match="another kernel's function"):
            run(*head[:4], object(), *head[5:], *pointers, *run._constants)


def test_memory_that_was_given_back_is_not_launched_on(device):
    x = device.allocate(256)
    address = x.data_ptr()
    device.check_memory(address, 256, "a launch")
    with pytest.raises(Fault, match="8 bytes beyond"):
        device.check_memory(address + 8, 256, "a launch")
    del x
    gc.collect()
    with pytest.raises(Fault, match="was given back"):
        device.check_memory(address, 256, "a launch")
