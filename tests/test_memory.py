"""The memory plans work in: places by liveness, in outputs not yet written, shared by plans."""

from __future__ import annotations

import random
import threading

import pytest
import torch

import tracejit
from benchmarks.worker import allocated_peak
from support.plan_checks import PlanChecks
from tracejit.ir.text import parse
from tracejit.runtime.c_executor import CExecutor
from tracejit.runtime.memory import Arena, Memory
from tracejit.schedule import schedule
from tracejit.schedule.memory import Lifetime, Place, Room, layout_of, plan_memory


def overlaps(pieces: list[Lifetime], places: list[Place]) -> list[tuple[int, int]]:
    """Pairs of pieces that share a byte at one time."""
    found = []
    for i, (a, at) in enumerate(zip(pieces, places, strict=True)):
        for j in range(i):
            b, there = pieces[j], places[j]
            at_once = a.first <= b.last and b.first <= a.last
            apart = at.offset + a.nbytes <= there.offset or there.offset + b.nbytes <= at.offset
            if at.room == there.room and at_once and not apart:
                found.append((j, i))
    return found


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.sweep(0.34)
def test_pieces_alive_at_one_time_do_not_overlap(seed):
    rng = random.Random(seed)
    pieces = []
    for _ in range(rng.randint(0, 25)):
        first = rng.randint(0, 12)
        pieces.append(
            Lifetime(rng.choice((0, 4, 100, 128, 4000)), first, first + rng.randint(0, 5))
        )
    rooms = [
        Room(rng.choice((0, 4, 128, 5000)), rng.randint(0, 18)) for _ in range(rng.randint(0, 5))
    ]
    places, total = plan_memory(pieces, rooms)
    assert overlaps(pieces, places) == []
    for piece, place in zip(pieces, places, strict=True):
        assert place.offset % 128 == 0
        end = place.offset + piece.nbytes
        if place.room is None:
            assert end <= total
        else:
            assert end <= rooms[place.room].nbytes and piece.last < rooms[place.room].until


def test_a_room_is_left_before_it_is_written():
    piece = Lifetime(1000, 0, 3)
    assert plan_memory([piece], [Room(1000, 4)]) == ([Place(0, 0)], 0)
    assert plan_memory([piece], [Room(1000, 3)]) == ([Place(None, 0)], 1024)
    assert plan_memory([piece], [Room(999, 4)]) == ([Place(None, 0)], 1024)


def test_what_made_the_arena_large_is_placed_first():
    """Largest first puts the long one beside both others; placed first, it leaves them a gap."""
    pieces = [Lifetime(512, 0, 0), Lifetime(384, 0, 2), Lifetime(512, 2, 2), Lifetime(896, 1, 1)]
    places, total = plan_memory(pieces, [])
    assert overlaps(pieces, places) == [] and total == 896 + 384


CHAIN = """
step(%0: f32[48,96], %1: f32[96,96]) {
  %2: f32[48,96] = matmul(%0, %1)
  %3: f32[48,96] = exp(%2)
  %4: f32[48,96] = matmul(%3, %1)
  %5: f32[96,48] = permute(%0, axes=(1,0))
  %6: f32[96,96] = matmul(%5, %4)
  return %6
}"""


def test_intermediates_lie_in_an_output_until_it_is_written():
    graph = parse(CHAIN)
    plan = schedule(graph)
    executor = CExecutor(2)
    layout = executor.load(plan).layout
    assert any(place.room is not None for place in layout.places.values())
    assert layout.arena_bytes < layout_of(plan).arena_bytes
    PlanChecks(executor).check(graph, plan)


def test_an_arena_grows_and_is_not_shared_while_it_is_used():
    arena = Arena()
    first = arena.take(100)
    second = arena.take(100)
    assert first[0] != second[0]
    arena.give(second)
    assert arena.take(50) is second
    arena.give(second)
    larger = arena.take(200)
    assert larger[1] == 200 and larger is not second
    arena.give(larger)
    assert arena.take(100) is larger


def test_steps_share_what_they_work_in_but_not_their_outputs():
    a, b = Memory(), Memory()
    assert a.arena(None) is b.arena(None)
    buffers = schedule(parse(CHAIN)).buffers[2:3]
    assert a.outputs(buffers, None) == a.outputs(buffers, None) != b.outputs(buffers, None)
    twice = a.outputs([*buffers, *buffers], None)
    assert twice[0] is not twice[1] and twice[0] is a.outputs(buffers, None)[0]


def net(width: int, depth: int) -> tuple:
    """A step of some depth, with its parameters."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, width) for _ in range(depth)]
    x = torch.randn(32, width)
    parameters = [p for layer in layers for p in layer.parameters()]

    def step() -> torch.Tensor:
        for p in parameters:
            p.grad = None
        hidden = x
        for layer in layers:
            hidden = layer(hidden).tanh()
        loss = hidden.square().sum()
        loss.backward()
        with torch.no_grad():
            for p in parameters:
                p -= 1e-3 * p.grad
        return loss

    return step, parameters


def test_steps_in_threads_do_not_disturb_each_other():
    """All of them work in memory of the process."""
    makers = [lambda d=d: net(64, d) for d in (2, 3, 4)]
    wanted = []
    for make in makers:
        step, parameters = make()
        wanted.append(([step().item() for _ in range(40)], [p.clone() for p in parameters]))
    made = [make() for make in makers]
    found: list = [None] * len(made)

    def run(i: int) -> None:
        step = tracejit.compile(made[i][0])
        found[i] = [step().item() for _ in range(40)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (losses, after), ours, (_, parameters) in zip(wanted, found, made, strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses), rtol=1e-4, atol=1e-5)
        for p, q in zip(parameters, after, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def branching() -> object:
    """A step whose Python takes one of three ways, each with a plan of its own."""
    torch.manual_seed(0)
    w = torch.randn(128, 128, requires_grad=True)
    x = torch.randn(8, 128)
    rng = random.Random(0)

    def step() -> torch.Tensor:
        w.grad = None
        hidden = x
        for _ in range(rng.randint(1, 3)):
            hidden = (hidden @ w).tanh()
        loss = hidden.square().sum()
        loss.backward()
        return loss

    return step


def test_plans_of_one_step_share_the_memory_of_a_gradient():
    """The gradient of the last call gives way to the next one's, whichever plan made it."""
    calls = 40
    gradient = 128 * 128 * 4
    step = tracejit.compile(branching())
    peak = allocated_peak(step, calls)
    assert len(step.plans) == 3 and step.explain_mode().startswith("rerun")
    works = max(c.program.arena_bytes for c in step._programs.kept)
    assert gradient <= peak <= gradient + works + 4096
