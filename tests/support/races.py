"""Races of two streams, and orders that are wrong, planted in what runs plans on a GPU.

Each is run on the fake device: `device` says whether its clocks see it, `verify` whether a verified
call does while the clocks are off. Only numbers show to verify what a wrong order has done, and the
fake device does everything at once.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch

import tracejit
from support.fake import FAKE, trained
from tracejit.errors import LaunchError, TracejitWarning
from tracejit.runtime import prefetch, ring
from tracejit.runtime.fake_clock import Clocks, Fault
from tracejit.runtime.fake_device import FakeDevice, FakeEvent
from tracejit.runtime.launched_plan import LaunchedPlan
from tracejit.runtime.launches import STREAM, Calls
from tracejit.runtime.memory import FreshMemory, StreamArenas
from tracejit.runtime.ring import Ring
from tracejit.testing import fake_device

Context = contextlib.AbstractContextManager


@dataclass(frozen=True)
class Race:
    """A planted race: a program that meets it, and who finds it."""

    name: str
    plant: Callable[[], Context]
    program: Callable[..., tracejit.CompiledStep | None]
    device: bool
    verify: bool


# ---- programs: (device, options) -> the step


def two_streams(device: FakeDevice, **options: object) -> tracejit.CompiledStep:
    """One plan trains two networks, each on a stream of its own, with rates that change."""
    torch.manual_seed(3)
    nets = [(torch.randn(9, 7), torch.randn(8, 9), torch.randn(8, 7)) for _ in range(2)]

    def train(w, x, y, lr: float) -> torch.Tensor:
        with torch.enable_grad():
            w.requires_grad_()
            loss = (x @ w - y).pow(2).mean()
            (g,) = torch.autograd.grad(loss, w)
        with torch.no_grad():
            w.sub_(g * lr)
        return loss.detach()

    for w, *_ in nets:
        w.requires_grad_()
    step = tracejit.compile(train, backend=FAKE, **options)
    streams = device.stream(), device.stream()
    for call in range(14):
        for net, stream in zip(nets, streams, strict=True):
            with device.on(stream):
                step(*net, 0.01 + 0.001 * call)
    return step


def layers(device: FakeDevice, **options: object) -> tracejit.CompiledStep:
    """A chain of launches, whose intermediates lie in the arena, on two streams."""
    step = tracejit.compile(
        lambda x: (torch.softmax(x @ x, 0) @ x).sum(), backend=FAKE, fuse=False, **options
    )
    inputs, streams = [torch.randn(30, 30), torch.randn(30, 30)], [0, device.stream()]
    for _ in range(6):
        for x, stream in zip(inputs, streams, strict=True):
            with device.on(stream):
                step(x)
    return step


def reading(device: FakeDevice, **options: object) -> tracejit.CompiledStep:
    """A step that reads its loss."""
    step, *_ = trained()
    compiled = tracejit.compile(lambda: step().item(), backend=FAKE, **options)
    for _ in range(8):
        compiled()
    return compiled


def results(device: FakeDevice, **options: object) -> tracejit.CompiledStep:
    """What a step returns is read on another stream, which says so."""
    step, side = tracejit.compile(lambda x: x * 2, backend=FAKE, **options), device.stream()
    x = torch.randn(300)
    for _ in range(12):
        found, event = step(x), device.event()
        event.record()
        with device.on(side):
            event.hold()
            device.uses(found)
        device.record_stream(found, side)
        del found
    return step


def batches(device: FakeDevice, **options: object) -> tracejit.CompiledStep:
    """A step on batches that are copied ahead of it."""
    step = tracejit.compile(lambda x: (x * 2.0).sum(), backend=FAKE, **options)
    for x in tracejit.prefetch([torch.full((3, 5), float(i)) for i in range(12)], FAKE):
        step(x)
        device.uses(x, writes=True)
        del x
    return step


# ---- what is planted


def _shared_state() -> Context:
    enter = LaunchedPlan._enter

    def shared(self: LaunchedPlan) -> object:
        for state in self._states.values():
            state.stream = self.device.current_stream()
            state.calls.clear()
            return state
        return enter(self)

    return patch.object(LaunchedPlan, "_enter", shared)


def _shared_arena() -> Context:
    take = StreamArenas.take

    def shared(self: StreamArenas, nbytes: int) -> tuple:
        free = next((free for free in self._free.values() if free), None)
        return free[0] if free else take(self, nbytes)

    return patch.object(StreamArenas, "take", shared)


def _no_wait_for_slots() -> Context:
    def upload(self: Ring, target: torch.Tensor, words: bytes) -> None:
        slot = self._slots[0]
        self._slots.rotate(-1)
        slot.fill(words)
        self._device.upload(target, slot.memory)
        slot.event.record()

    return patch.object(Ring, "upload", upload)


def _numbers_elsewhere() -> Context:
    upload = Ring.upload

    def other(self: Ring, target: torch.Tensor, words: bytes) -> None:
        with self._device.beside():
            upload(self, target, words)

    return patch.object(Ring, "upload", other)


def _read_at_once() -> Context:
    own = ring.read_element

    def read(device, tensor):
        with patch.object(FakeEvent, "wait", lambda self: None):
            return own(device, tensor)

    return patch("tracejit.runtime.launched_plan.read_element", read)


def _same_results() -> Context:
    kept: dict[FreshMemory, tuple] = {}
    take = FreshMemory.take
    return patch.object(
        FreshMemory, "take", lambda self, given: kept.setdefault(self, take(self, given))
    )


def _without_hold(on_side: bool) -> Context:
    hold = FakeEvent.hold

    def careless(event: FakeEvent) -> None:
        if (event._device.current_stream() != 0) != on_side:
            hold(event)

    return patch.object(FakeEvent, "hold", careless)


def _staging_at_once() -> Context:
    def land(flight, staging) -> None:
        staging.give(flight.staged.memory)

    return patch.object(prefetch, "_land", land)


def _swapped() -> Context:
    def call(self: Calls, state, words, bases) -> None:
        if words != state.words:
            state.upload(words)
        self._move(bases)
        pairs = [*zip(self._launches.runs, self._arguments, strict=True)]
        for run, given in (*pairs[:-2], *reversed(pairs[-2:])):
            run(*given)

    return patch.object(Calls, "__call__", call)


def _default_stream() -> Context:
    own = Calls.__init__

    def init(self: Calls, *given: object) -> None:
        own(self, *given)
        for arguments in self._arguments:
            arguments[STREAM] = 0

    return patch.object(Calls, "__init__", init)


RACES = [
    Race("two streams share counters and numbers", _shared_state, two_streams, True, False),
    Race("two streams share an arena", _shared_arena, layers, True, False),
    Race(
        "numbers come by another stream, without an event",
        _numbers_elsewhere,
        two_streams,
        True,
        False,
    ),
    Race(
        "a slot of numbers is filled while it is copied",
        _no_wait_for_slots,
        two_streams,
        True,
        False,
    ),
    Race("a value is read before it has arrived", _read_at_once, reading, False, True),
    Race("a result is written while another stream reads it", _same_results, results, True, False),
    Race(
        "a batch is copied over one that is in use",
        lambda: _without_hold(True),
        batches,
        True,
        False,
    ),
    Race("a step does not wait for its batch", lambda: _without_hold(False), batches, True, False),
    Race("staging memory is filled while it is copied", _staging_at_once, batches, True, False),
    Race("two launches change places", _swapped, layers, False, True),
    Race("launches go to the default stream", _default_stream, two_streams, True, False),
]


def seen_by_device(race: Race | None, program: Callable) -> bool:
    """Whether the device's clocks and checks see it."""
    with fake_device(compiled=False) as device, race.plant() if race else contextlib.nullcontext():
        try:
            program(device)
        except (Fault, LaunchError) as error:
            return isinstance(error, Fault) or isinstance(error.__cause__, Fault)
    return False


def seen_by_verify(race: Race | None, program: Callable) -> bool:
    """Whether a verified call differs from eager, on a device that checks no order."""
    with (
        fake_device(compiled=False) as device,
        _unclocked(),
        race.plant() if race else contextlib.nullcontext(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", TracejitWarning)
        step = program(device, verify=3, on_unsupported="eager")
        return bool(step.certificate().withdrawn)


@contextlib.contextmanager
def _unclocked() -> Iterator[None]:
    """The fake device does everything at once, and checks no order."""
    with (
        patch.object(Clocks, "writes", lambda *given: None),
        patch.object(Clocks, "reads", lambda *given: None),
        patch.object(FakeDevice, "_check_sources", lambda self: None),
        patch.object(
            FakeDevice, "give_launch", lambda self, text, stream, work: self._give(text, work)
        ),
    ):
        yield
