"""`tracejit.prefetch`: batches ahead of the step, in order, whatever happens on the way."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import tracejit
from support.fake import FAKE
from tracejit.errors import BackendUnavailable
from tracejit.runtime.fake_clock import Fault
from tracejit.runtime.fake_device import FakeEvent
from tracejit.testing import fake_device

Pair = namedtuple("Pair", "x y")


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "tracejit prefetch"]


def until(condition: Callable[[], bool]) -> bool:
    """Whether something comes true, within some seconds."""
    ends = time.monotonic() + 10
    while not condition() and time.monotonic() < ends:
        time.sleep(0.002)
    return condition()


class Counted:
    """A loader that notes how many batches were asked for, and whether it was left in order."""

    def __init__(self, count: int, fails: bool = False):
        self.count, self.fails, self.asked, self.closed = count, fails, 0, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        try:
            for i in range(self.count):
                self.asked += 1
                yield torch.full((3, 5), float(i))
            if self.fails:
                raise KeyError("of the loader")
        finally:
            self.closed += 1


def devices() -> list[str]:
    return ["cpu", FAKE]


@pytest.fixture(params=devices())
def device(request):
    with fake_device(compiled=False):
        yield request.param


# --- on any device --------------------------------------------------------------------------------


def test_batches_come_in_order_as_often_as_the_loader_gives_them(device):
    data = TensorDataset(torch.arange(20.0).reshape(10, 2), torch.arange(10))
    loader = DataLoader(data, batch_size=3)
    batches = tracejit.prefetch(loader, device)
    assert len(batches) == 4
    for _ in range(2):
        for (x, y), (a, b) in zip(batches, loader, strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)
    assert until(lambda: not threads())


def test_structures_layouts_and_other_objects(device):
    wide = torch.arange(24.0).reshape(2, 3, 4)
    batch = {
        "pair": Pair(torch.ones(2, dtype=torch.bfloat16), [torch.tensor(3), "text"]),
        "more": OrderedDict(a=wide.transpose(0, 2), b=wide[:, ::2], c=torch.empty(0, 4)),
        "none": None,
        "image": torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "mask": torch.tensor([True, False]),
    }
    (found,) = tracejit.prefetch([batch], device)
    assert type(found["pair"]) is Pair and found["pair"].y[1] == "text" and found["none"] is None
    assert type(found["more"]) is OrderedDict and found["pair"].x.dtype is torch.bfloat16
    for x, a in (
        (found["pair"].x, batch["pair"].x),
        (found["pair"].y[0], torch.tensor(3)),
        (found["more"]["a"], batch["more"]["a"]),
        (found["more"]["b"], batch["more"]["b"]),
        (found["more"]["c"], batch["more"]["c"]),
        (found["image"], batch["image"]),
        (found["mask"], batch["mask"]),
    ):
        assert torch.equal(x, a) and x.shape == a.shape
    assert found["more"]["a"].stride() == batch["more"]["a"].stride()
    assert found["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["more"]["a"].data_ptr() == wide.data_ptr()  # the loader's own is as it was


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_no_more_batches_are_ahead_than_asked_for(device, depth):
    loader = Counted(12)
    batches = iter(tracejit.prefetch(loader, device, depth=depth))
    for taken in range(1, 13):
        assert next(batches)[0, 0] == taken - 1
        expected = min(taken + depth, 12)
        assert until(lambda n=expected: loader.asked == n)
    time.sleep(0.02)
    assert loader.asked == 12
    assert next(batches, None) is None and loader.closed == 1


def test_an_exception_comes_where_its_batch_would_be(device):
    loader = Counted(5, fails=True)
    seen = []
    with pytest.raises(KeyError, match="of the loader") as caught:
        for x in tracejit.prefetch(loader, device, depth=3):
            seen.append(x[0, 0].item())
    assert seen == [0, 1, 2, 3, 4] and loader.closed == 1
    assert any(entry.name == "__iter__" for entry in caught.traceback)  # the loader's own line
    assert until(lambda: not threads())


@pytest.mark.parametrize("way", ["break", "error", "close"])
def test_an_early_exit_stops_the_thread(device, way):
    loader = Counted(1000)
    batches = tracejit.prefetch(loader, device)
    if way == "break":
        for x in batches:
            if x[0, 0] == 3:
                break
    elif way == "error":
        with pytest.raises(ZeroDivisionError):
            for x in batches:
                1 / (3 - x[0, 0].item())
    else:
        found = iter(batches)
        next(found)
        found.close()
    assert until(lambda: not threads()) and loader.asked <= 7
    assert until(lambda: loader.closed == 1)


def test_an_iterator_that_is_never_asked_starts_nothing(device):
    loader = Counted(3)
    iter(tracejit.prefetch(loader, device))
    assert loader.asked == 0 and not threads()


def test_what_is_refused(device):
    with pytest.raises(ValueError, match="depth is at least 1, not 0"):
        tracejit.prefetch([], device, depth=0)
    with pytest.raises(TypeError):
        iter(tracejit.prefetch(3, device))
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="no CUDA device"):
            tracejit.prefetch([], "cuda:0")
    with pytest.raises(BackendUnavailable, match="of type mps"):
        tracejit.prefetch([], "mps")


def test_it_says_what_it_does():
    assert "nothing is copied" in str(tracejit.prefetch([], "cpu"))
    with fake_device(compiled=False):
        text = str(tracejit.prefetch([], FAKE, depth=1))
        assert "1 batch ahead" in text and "a stream of their own" in text


def test_the_loader_overlaps_with_the_step():
    """While the step waits, the next batch is made: the loader's wait is only paid once."""
    made, go = [], threading.Event()

    def loader():
        for i in range(3):
            made.append(i)
            if i == 2:
                go.set()
            yield torch.tensor(i)

    for x in tracejit.prefetch(loader(), "cpu"):
        if x == 0:
            assert go.wait(10) and made == [0, 1, 2]  # while batch 0 is in use


def test_batches_of_the_cpu_are_the_loaders_own():
    given = [torch.ones(3), torch.ones(2, requires_grad=True)]
    found = list(tracejit.prefetch(given, "cpu"))
    assert len(found) == 2 and found[0] is given[0] and found[1] is given[1]


# --- copies ---------------------------------------------------------------------------------------


def test_copies_stand_beside_the_step_and_before_its_next_use():
    with fake_device(compiled=False) as device:
        loader = Counted(6)
        seen = []
        for x in tracejit.prefetch(loader, FAKE):
            assert until(lambda: loader.asked == min(len(seen) + 3, 6))
            device.log.append(f"batch {len(seen)}")
            device.uses(x, work=lambda x=x: seen.append(x.clone()))
            device.uses(x, writes=True, work=x.zero_)  # a step may
            del x
        device.synchronize()
    assert [x[0, 0].item() for x in seen] == [0, 1, 2, 3, 4, 5]
    log = device.log
    copies = [i for i, line in enumerate(log) if "copy 60 bytes to the device (pinned)" in line]
    assert len(copies) == 6
    side = log[copies[0]].partition(":")[0]
    assert side != "stream 0" and all(log[i].startswith(side) for i in copies)
    for k, i in enumerate(copies[2:], 2):  # given before the batch before it is used
        assert i < log.index(f"batch {k - 1}")
    for i in copies:  # behind what was given before, as its memory may be in use
        assert log[i - 1] == f"{side}: waits for an event" and log[i + 1] == f"{side}: event"


@pytest.mark.parametrize("waits", ["the step", "the copy"])
def test_a_wait_that_is_left_out_is_found(monkeypatch, waits):
    """The fake device sees what a missing event would leave to chance."""
    hold = FakeEvent.hold

    def careless(event: FakeEvent) -> None:
        on_side = event._device.current_stream() != 0
        if on_side == (waits == "the step"):
            hold(event)

    with fake_device(compiled=False) as device, pytest.raises(Fault):
        monkeypatch.setattr(FakeEvent, "hold", careless)
        for x in tracejit.prefetch(Counted(8), FAKE):
            device.uses(x)
            device.uses(x, writes=True)
            del x


def test_staging_memory_is_used_again_when_its_copy_is_over(monkeypatch):
    with fake_device(compiled=False) as device:
        pinned, sizes = device.pinned, []

        def noted(nbytes: int) -> torch.Tensor:
            sizes.append(nbytes)
            return pinned(nbytes)

        monkeypatch.setattr(device, "pinned", noted)
        for depth in (1, 2, 3):
            sizes.clear()
            total = [x.sum().item() for x in tracejit.prefetch(Counted(40), FAKE, depth=depth)]
            assert total == [15.0 * i for i in range(40)]
            assert len(sizes) <= 2 * depth + 1 and set(sizes) == {128}
        monkeypatch.setattr(FakeEvent, "wait", lambda event: None)
        with pytest.raises(Fault, match="changed pinned memory"):
            list(tracejit.prefetch(Counted(40), FAKE))


def test_growing_batches_get_larger_staging_memory():
    given = [torch.arange(float(n)) for n in (3, 500, 4, 5000, 2, 5000)]
    with fake_device(compiled=False):
        for x, y in zip(tracejit.prefetch(given, FAKE), given, strict=True):
            assert torch.equal(x, y)


def test_an_early_exit_leaves_no_copy_to_memory_that_is_given_back():
    with fake_device(compiled=False) as device:
        for x in tracejit.prefetch(Counted(9), FAKE):
            device.uses(x)
            break
        del x
        again = [device.empty_strided((3, 5), (5, 1), torch.float32) for _ in range(6)]
        for y in again:
            device.uses(y, writes=True)  # memory of copies that were under way


def test_tensors_with_a_history_are_refused():
    given = [torch.ones(2), torch.ones(2, requires_grad=True) * 2]
    with fake_device(compiled=False):
        batches = iter(tracejit.prefetch(given, FAKE))
        assert torch.equal(next(batches), given[0])
        with pytest.raises(TypeError, match=r"of shape \[2\] that requires grad.*detach"):
            next(batches)
        with pytest.raises(TypeError, match="sparse"):
            list(tracejit.prefetch([torch.eye(3).to_sparse()], FAKE))


def test_a_step_trains_on_prefetched_batches_as_on_others():
    data = TensorDataset(torch.randn(30, 4), torch.randn(30, 2))

    def trained(batches) -> tuple[list[float], torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step(x, y):
            optimizer.zero_grad()
            loss = (model(x) - y).pow(2).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = tracejit.compile(step, backend=FAKE)
        losses = [step(x, y) for _ in range(3) for x, y in batches]
        assert step.stats.replays > 5
        device.synchronize()
        return [loss.item() for loss in losses], model.weight.detach().clone()

    loader = DataLoader(data, batch_size=5)
    with fake_device(compiled=False) as device:
        losses, weight = trained(tracejit.prefetch(loader, FAKE))
    with fake_device(compiled=False) as device:
        plain, same = trained(loader)
    assert losses == plain and torch.equal(weight, same)
