"""Compiled steps where processes fork and spawn, among data loaders, and with other threads."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

import tracejit
from support.children import forked
from support.small_training import Training, near, states_of_eager
from tracejit.capture.proof.kinds import cached_values
from tracejit.runtime import pool

WIDE = 512  # of a network whose plans are run by several threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def compiled(seed: int = 0, width: int = 8, **options: object) -> tuple[Training, Callable]:
    training = Training(seed, width)
    options = {"backend": "c", "on_unsupported": "raise", **options}
    return training, tracejit.compile(training.step, **options)


def trained(calls: int = 6, seed: int = 0, width: int = 8) -> list[float]:
    """The state after some compiled calls."""
    training, step = compiled(seed, width)
    for _ in range(calls):
        step()
    return training.state()


def right(calls: int = 6, seed: int = 0, width: int = 8) -> list[float]:
    return states_of_eager(calls, lambda: Training(seed, width))[-1]


# ---- fork and spawn


def test_a_step_of_the_parent_goes_on_in_a_child(two_threads):
    """And a child of that child; the parent's own goes on as well. The pool's threads are gone."""
    expected = [right(n, width=WIDE) for n in (6, 9, 12)]
    training, step = compiled(width=WIDE)
    for _ in range(6):
        step()
    assert step.stats.replays and near(training.state(), expected[0])

    def child() -> tuple:
        for _ in range(3):
            step()
        first = training.state()
        inner = forked(lambda: [step() for _ in range(3)] and training.state()).result()
        return first, inner, step.stats.traces, trained()

    first, inner, traces, fresh = forked(child).result()
    assert near(first, expected[1]) and near(inner, expected[2])
    assert traces == step.stats.traces  # the child traces nothing anew
    assert near(fresh, right())
    for _ in range(3):
        step()
    assert near(training.state(), expected[1])


def test_fork_while_other_threads_call_steps(two_threads):
    """The child has no such threads: what they have locked, and what they trace, is no obstacle."""
    expected, over = right(), threading.Event()
    running = [compiled(seed) for seed in (1, 2)]

    def calls(step: Callable) -> None:
        while not over.is_set():
            step()

    def traces() -> None:
        while not over.is_set():
            tracejit.compile(lambda x: (x * 2).sum(), backend="numpy")(torch.ones(3))

    threads = [threading.Thread(target=calls, args=(step,)) for _, step in running]
    threads.append(threading.Thread(target=traces))
    for thread in threads:
        thread.start()

    def child() -> bool:
        with torch.no_grad():
            torch.nn.functional.softmax(torch.randn(3), 0)  # nothing of a trace is in the way
        mine = trained()
        for _, step in running:
            step(), step()
        return near(mine, expected)

    try:
        for _ in range(8):
            assert forked(child).result()
            time.sleep(0.01)
    finally:
        over.set()
        for thread in threads:
            thread.join()


def held_elsewhere(lock: object, held: threading.Event, over: threading.Event) -> None:
    with lock:
        held.set()
        over.wait()


def test_locks_that_another_thread_holds_at_the_fork():
    """Each lock of ours in turn; the child would wait for ever."""
    from tracejit.capture.python import patches
    from tracejit.runtime import private

    training, step = compiled()
    for _ in range(3):
        step()
    expected = right(4)
    for lock in (step._lock, pool._lock, private._lock, patches._lock):
        held, over = threading.Event(), threading.Event()
        thread = threading.Thread(target=held_elsewhere, args=(lock, held, over))
        thread.start()
        held.wait()

        def child() -> list[float]:
            pool._loaded.cache_clear()
            step()
            private.private_folder()
            return training.state()

        outcome = forked(child, deadline=60)
        over.set()
        thread.join()
        assert near(outcome.result(), expected)


@pytest.mark.slow
def test_a_spawned_process_trains_like_this_one():
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as workers:
        (found,) = workers.map(trained, [6])
    assert near(found, right())


# ---- data loaders


class Computed(torch.utils.data.Dataset):
    """Items that a compiled step computes, in whatever process."""

    def __init__(self, step: Callable | None):
        self.step = step

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> torch.Tensor:
        x = torch.full((4,), float(i))
        return x if self.step is None else self.step(x)


def scaled(x: torch.Tensor) -> torch.Tensor:
    return (x * 0.5 + 1).tanh()


@pytest.mark.parametrize("where", ["trainer", "worker", "both", "worker, compiled before"])
def test_data_loaders_with_two_workers(where, two_threads):
    """A compiled step of the trainer, of the workers, which are forked meanwhile, or of both."""
    step = tracejit.compile(scaled, backend="c") if where != "trainer" else None
    if where.endswith("before"):
        for _ in range(4):
            step(torch.ones(4))
    loader = torch.utils.data.DataLoader(Computed(step), batch_size=8, num_workers=2)
    ours, theirs = Training(), Training()
    train = tracejit.compile(ours.step, backend="c") if where in ("trainer", "both") else ours.step
    seen = []
    for _ in range(2):
        for batch in loader:
            seen.append(batch)
            for training, call in ((ours, train), (theirs, theirs.step)):
                training.x = torch.cat([batch, batch])
                call()
    items = torch.stack([torch.full((4,), float(i)) for i in range(32)])
    torch.testing.assert_close(torch.cat(seen[:4]), items if step is None else scaled(items))
    assert near(ours.state(), theirs.state())


# ---- threads


@pytest.mark.parametrize("steps", [1, 4])
def test_first_calls_at_the_same_time(steps, two_threads):
    """Four threads, at one step or at one each: each call is done once."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        made = [compiled(seed, WIDE if seed else 8) for seed in range(steps)]
        gate, failed = threading.Barrier(4), []

        def calls(i: int) -> None:
            try:
                gate.wait()
                for _ in range(6):
                    made[i % steps][1]()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=calls, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not failed and not any(thread.is_alive() for thread in threads), failed
    finally:
        sys.setswitchinterval(before)
    for seed, (training, _) in enumerate(made):
        assert near(training.state(), right(6 * 4 // steps, seed, WIDE if seed else 8))
    from support.interrupting import check_process
    from tracejit.capture.python import patches

    check_process()
    assert not patches._tracing


def test_a_traced_step_among_threads_that_run_eagerly():
    """Patches are for the thread that traces; the collector is on again."""
    failed, over = [], threading.Event()

    def eagerly() -> None:
        try:
            expected = right(3)
            while not over.is_set():
                assert near(right(3), expected)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=eagerly)
    seeds = range(6)
    expected = [right(seed=seed) for seed in seeds]
    thread.start()
    try:
        assert all(near(trained(seed=seed), expected[seed]) for seed in seeds)
    finally:
        over.set()
        thread.join()
    assert not failed, failed


def test_backwards_outside_of_a_step_in_threads(two_threads):
    """Several results of one step, whose backward runs in several threads at once."""
    weight = torch.randn(WIDE, WIDE, generator=torch.Generator().manual_seed(0)).double()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return ((x @ weight).tanh() @ weight).square().sum()

    step = tracejit.compile(forward, backend="c")
    xs = [torch.randn(16, WIDE).double().requires_grad_() for _ in range(4)]
    for _ in range(5):
        losses = [step(x) for x in xs]
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for x in xs:
            (g,) = torch.autograd.grad(forward(x), x)
            torch.testing.assert_close(x.grad, g)
            x.grad = None


# ---- the number of threads


def test_the_number_of_threads_is_changed_between_calls():
    """1, 2, 1, and far too many: the very same bits, and no more threads than the largest number
    that was asked for."""
    before = torch.get_num_threads()
    numbers = [1, 2, 1, 3, 2, 300, 1]
    states = []
    try:
        for change in (False, True):
            training, step = compiled(width=WIDE)
            for number in numbers:
                torch.set_num_threads(number if change else 1)
                step(), step()
            states.append(training.state())
            if change:
                assert step.stats.traces <= 5 and step.stats.compiles <= 3
    finally:
        torch.set_num_threads(before)
    assert states[0] == states[1]
    assert near(states[0], right(14, width=WIDE))
    assert threads_of_this_process() < 700  # torch's own are among them


def threads_of_this_process() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("number", ["2", pytest.param("1", marks=pytest.mark.slow)])
def test_omp_num_threads_is_followed(number):
    """In a process of its own: torch reads it when it is loaded, and so do we."""
    import subprocess

    script = (
        "import torch, tracejit\n"
        "x = torch.arange(1 << 20, dtype=torch.float32)\n"
        "step = tracejit.compile(lambda x: (x * 2 + 1).sum(), backend='c')\n"
        "found = [step(x).item() for _ in range(4)]\n"
        "used = step._programs.kept[0].program.loaded._threads()\n"
        "print(torch.get_num_threads(), used, found[0] == found[-1])\n"
    )
    env = os.environ | {"OMP_NUM_THREADS": number}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.stdout.split() == [number, number, "True"], done.stderr


def test_a_cache_that_another_thread_fills_while_it_is_read():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    @functools.cache
    def double(n: int) -> int:
        return 2 * n

    done = threading.Event()

    def fill() -> None:
        for n in range(60_000):
            if done.is_set():
                return
            double(n)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        for _ in range(40):
            cached_values(double)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)
