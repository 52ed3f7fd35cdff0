"""Signals whose handlers raise, at any moment of a call: tensors are as before it or as after it,
the next call is right, and nothing is left in the process."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch

import tracejit
from support.children import forked
from support.interrupting import Interrupt, at_place, check_process, handling
from support.scope import WHOLE
from support.small_training import Training, near
from tracejit import interrupts

WORLDS = {
    "plain": lambda: Training(),
    "draws": lambda: Training(dropout=0.5),
    "schedule": lambda: Training(dropout=0.5, rate=True),
}


class Twins:
    """A compiled training and an eager one, which makes the calls that the other has made."""

    def __init__(self, make: Callable[[], Training], **options: object):
        self.make = make
        self.reset(**options)

    def reset(self, **options: object) -> None:
        self.ours, self.eager = self.make(), self.make()
        options = {"on_unsupported": "raise", **options}
        self.step = tracejit.compile(self.ours.step, **options)
        self.outcomes: Counter[str] = Counter()
        start = torch.get_rng_state()
        self.of_ours = self.of_eager = start

    def eagerly(self) -> None:
        torch.set_rng_state(self.of_eager)
        self.eager.step()
        self.of_eager = torch.get_rng_state()

    def call(self, interrupted: Callable[[Callable], object]) -> str:
        """One call, which a signal may cut off; how the tensors are then."""
        torch.set_rng_state(self.of_ours)
        before = self.ours.state()[1:]
        try:
            interrupted(self.step)
            cut = ""
        except Interrupt:
            cut = " cut"
        check_process()
        after = self.ours.state()[1:]
        if after == before:
            how = f"before{cut}"
        else:
            self.of_ours = torch.get_rng_state()
            self.eagerly()
            torch.set_rng_state(self.of_ours)
            how = f"after{cut}"
        torch.set_rng_state(self.of_ours)
        right = near(self.ours.state()[1 : None if not self.ours.drop else -64], self.right())
        self.outcomes[how] += 1
        assert right, (how, self.outcomes, self.ours.differences(self.eager))
        self.eager.take(self.ours)  # rounding errors do not add up
        return how

    def places(self) -> int:
        """A call in peace, and in how many places it could have been interrupted."""
        found = []

        def counted(step: Callable) -> None:
            with at_place(0) as places:
                step()
            found.append(places.count)

        assert self.call(counted) == "after"
        return found[0]

    def right(self) -> list[float]:
        return self.eager.state()[1 : None if not self.eager.drop else -64]

    def plainly(self) -> None:
        """A call in peace: wherever the last one was cut off, it is done once."""
        assert self.call(lambda step: step()) == "after"


CASES = [("plain", "c"), ("schedule", "c"), ("draws", "numpy"), ("plain", "numpy")]


@pytest.mark.parametrize("world, backend", CASES)
@pytest.mark.parametrize("mode", ["auto", "rerun"])
@pytest.mark.sweep(1)
def test_each_place_of_a_replay_and_of_a_rerun(world, backend, mode):
    """A handler that raises wherever one may run in our code."""
    twins = Twins(WORLDS[world], backend=backend, mode=mode)
    for _ in range(7):
        twins.plainly()
    assert (twins.step.stats.replays > 0) == (mode == "auto"), twins.step.explain_mode()
    count = twins.places()
    assert count > 50
    with handling(signal.SIGALRM):
        few = [*range(1, count - 8, max(1, count // 16)), *range(count - 8, count)]
        for n in range(1, count) if WHOLE else few:

            def interrupted(step: Callable, n: int = n) -> None:
                with at_place(n):
                    step()

            twins.call(interrupted)
            twins.plainly()
    assert twins.outcomes["before cut"] and twins.outcomes["after cut"], twins.outcomes
    assert twins.step.stats.traces < 12 or mode == "rerun"


@pytest.mark.parametrize("fallback", ["raise", "eager"])
@pytest.mark.sweep(1)
def test_places_of_a_first_call(fallback):
    """Tracing, compiling, arming. What a handler raises is no refusal, which would be run eagerly;
    where calls may run eagerly, what Python has counted is put back too."""
    options = {"backend": "c", "on_unsupported": fallback}
    twins = Twins(WORLDS["plain"], **options)
    twins.plainly()  # what is done once in a process, such as imports
    twins.reset(**options)
    count = twins.places()
    rng = random.Random(0)
    with handling(signal.SIGALRM):
        for _ in range(300 if WHOLE else 3):
            twins.reset(**options)
            n = rng.randrange(1, count)

            def interrupted(step: Callable, n: int = n) -> None:
                with at_place(n):
                    step()

            how = twins.call(interrupted)
            assert how in ("before cut", "after cut"), (how, n)
            if fallback == "eager":
                assert twins.ours.calls == twins.eager.calls
            for _ in range(4):
                twins.plainly()
            assert not twins.step.stats.eager


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGINT])
@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.sweep(1)
def test_signals_at_random_moments(backend, number):
    """Sent by a clock, over many calls: the first, reruns, replays."""
    rng = random.Random(1)
    twins = Twins(WORLDS["schedule"], backend=backend)

    def alarmed(delay: float) -> Callable:
        def interrupted(step: Callable) -> None:
            timer = None
            if number == signal.SIGALRM:
                signal.setitimer(signal.ITIMER_REAL, delay)
            else:
                main = threading.main_thread().ident
                timer = threading.Timer(delay, signal.pthread_kill, (main, number))
                timer.start()
            try:
                step()
            finally:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    if timer is not None:
                        timer.cancel()
                        timer.join()
                except Interrupt:
                    if timer is not None:
                        timer.join()
                    raise

        return interrupted

    with handling(number):
        started = time.perf_counter()
        twins.plainly()
        first = time.perf_counter() - started
        for _ in range(40 if WHOLE else 2):
            twins.reset(backend=backend)
            twins.call(alarmed(rng.uniform(1e-4, first)))
            for _ in range(3):
                twins.call(alarmed(rng.uniform(1e-4, first / 8)))
                twins.plainly()
        started = time.perf_counter()
        for _ in range(5):
            twins.plainly()
        usual = (time.perf_counter() - started) / 10
        for _ in range(3000 if WHOLE else 100):
            twins.call(alarmed(rng.uniform(1e-6, usual)))
        for _ in range(3):
            twins.plainly()


def test_a_handler_that_sets_a_flag_is_always_called():
    """As one that asks for a checkpoint: each signal once, and no call is lost."""
    seen: Counter[int] = Counter()
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGALRM, signal.SIGRTMIN + 3)
    before = [signal.signal(n, lambda number, _: seen.update([number])) for n in numbers]
    try:
        twins = Twins(WORLDS["schedule"], backend="numpy")
        for _ in range(30):

            def interrupted(step: Callable) -> None:
                for number in numbers:
                    threading.Timer(2e-4, signal.raise_signal, (number,)).start()
                step()

            assert twins.call(interrupted) == "after"
        time.sleep(0.1)
        assert sorted(seen) == sorted(numbers)
        assert not interrupts._pending and not interrupts._handlers and not interrupts._depth
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_held_back_in_turn():
    """Handlers run where the innermost block that lets them ends, or begins."""
    seen: list[str] = []
    at = ["nowhere"]
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(at[0]))
    try:
        with interrupts.uninterrupted():
            at[0] = "held"
            signal.raise_signal(signal.SIGALRM)
            with interrupts.uninterrupted():
                signal.raise_signal(signal.SIGALRM)
            assert seen == []
            at[0] = "let"
            with interrupts.interruptible():
                assert seen == ["let"]
                signal.raise_signal(signal.SIGALRM)
                assert seen == ["let", "let"]
            at[0] = "held again"
            signal.raise_signal(signal.SIGALRM)
            assert len(seen) == 2
            at[0] = "over"
        assert seen == ["let", "let", "over"]
        assert signal.getsignal(signal.SIGALRM).__name__ == "<lambda>"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_handler_that_raises_while_another_waits():
    seen: list[int] = []

    def fails(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, fails)
    other = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        with pytest.raises(Interrupt), interrupts.uninterrupted():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGALRM)
        assert seen == [1] and signal.getsignal(signal.SIGALRM) is fails
        with pytest.raises(Interrupt) as found, interrupts.uninterrupted():
            signal.raise_signal(signal.SIGALRM)
        assert interrupts.raised_by_handler(found.value)
        assert not interrupts.raised_by_handler(Interrupt())
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGUSR1, other)


def test_a_child_of_another_thread_gets_its_signals():
    """Forked by a thread while the main one holds signals back: the child's handlers are there."""
    found: list = []

    def child() -> bool:
        try:
            signal.raise_signal(signal.SIGALRM)
        except Interrupt:
            with pytest.raises(Interrupt), interrupts.uninterrupted():
                signal.raise_signal(signal.SIGALRM)
            return True
        return False

    with handling(signal.SIGALRM), interrupts.uninterrupted():
        thread = threading.Thread(target=lambda: found.append(forked(child)))
        thread.start()
        thread.join()
    assert found[0].result()


def test_ctrl_c_does_not_stop_the_c_compiler(tmp_path, monkeypatch):
    """It goes to all processes of the terminal. A handler that only takes note of it is to find a
    step compiled."""
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))

    def child() -> bool:
        import os

        os.setpgid(0, 0)
        seen = []
        signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        for i in range(1, 40):
            threading.Timer(0.02 * i, os.killpg, (os.getpgid(0), signal.SIGINT)).start()
        step = tracejit.compile(
            lambda x: (x * 2 + 1).sin().sum(), backend="c", on_unsupported="raise"
        )
        return step(torch.ones(10)).item() > 0 and len(seen) > 0

    assert forked(child).result()
