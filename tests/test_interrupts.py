"""Ctrl-C and other signals during a call: a step is done wholly or not at all."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys

import pytest
import torch
from torch.overrides import _pop_mode

import tracejit
from tracejit.capture.tracer import Tracer


@pytest.mark.parametrize("mode", ["auto", "rerun"])
def test_a_call_does_all_or_nothing_wherever_it_is_interrupted(mode):
    """KeyboardInterrupt before each line of a replay, or of what ends a rerun, in turn: with some
    state, or the next."""

    def world() -> tuple:
        w = torch.ones(3, requires_grad=True)
        optimizer = torch.optim.Adam([w], lr=0.1)

        def step():
            optimizer.zero_grad()
            loss = (w * w).sum()
            loss.backward()
            optimizer.step()
            return loss

        def state() -> list[float]:
            held = optimizer.state[w]
            tensors = (held["step"], w, w.grad, held["exp_avg"], held["exp_avg_sq"])
            return [x for t in tensors for x in t.flatten().tolist()]

        return step, state

    eager, right = world()
    plain, ours = world()
    step = tracejit.compile(plain, mode=mode)
    for _ in range(5):
        eager(), step()
    assert step.stats.replays == (2 if mode == "auto" else 0), step.explain_mode()
    outcomes: list[str] = []
    while outcomes[-1:] != ["finished"]:
        before = ours()
        with interrupted_at(len(outcomes) + 1):
            try:
                step()
                outcomes.append("finished")
            except KeyboardInterrupt:
                outcomes.append("before" if ours() == before else "after")
        if outcomes[-1] == "before":
            step()
        eager()
        assert ours() == pytest.approx(right(), rel=1e-4, abs=1e-6), outcomes
    assert step.stats.retraces == 0
    first = outcomes.index("after")
    assert first > 3 and len(outcomes) > first + 4
    assert set(outcomes[:first]) == {"before"} and set(outcomes[first:-1]) == {"after"}


def test_a_signal_handler_may_call_the_step_that_it_interrupts():
    """The call in the handler comes before the plan or after it, never between its halves."""
    x = torch.zeros(4)

    def step(y: torch.Tensor) -> torch.Tensor:
        x.add_(1.0)
        return y + 1.0

    compiled = tracejit.compile(step)
    for _ in range(5):
        compiled(torch.ones(4))
    assert compiled.stats.replays >= 2, compiled.explain_mode()
    inner = compiled._replays[0].run.function.__globals__
    pack, inside = inner["pack"], []

    def packed(*words: object) -> bytes:
        found = pack(*words)
        if not inside:  # as if a signal came at the end of this call
            inside.append(True)
            inside.append(compiled(torch.full((4,), 10.0)))
        return found

    inner["pack"] = packed
    outer = compiled(torch.full((4,), 20.0))
    assert outer.tolist() == [21.0] * 4 and inside[1].tolist() == [11.0] * 4
    assert x.tolist() == [7.0] * 4


@contextlib.contextmanager
def interrupted_at(line: int):
    """Raise KeyboardInterrupt before the line that a replay or rerun runs as its `line`-th."""
    left = line

    def in_replay(frame, event, arg):
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return in_replay

    def trace(frame, event, arg):
        return in_replay if frame.f_code.co_filename == "<tracejit run>" else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_interrupt_while_writing_is_deferred():
    """Ctrl-C during the plan: the step goes to its end, then KeyboardInterrupt is raised."""
    w = torch.zeros(3)

    def step():
        w.add_(1.0)

    compiled = tracejit.compile(step, backend="numpy")
    compiled()
    (made,) = compiled._programs.kept[0].runs.values()
    names = made.function.__globals__
    inner = names["loaded"]

    def interrupted(*args):
        _thread.interrupt_main()
        inner(*args)

    names["loaded"] = interrupted
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            compiled()
    finally:
        signal.signal(signal.SIGINT, before)
    names["loaded"] = inner
    assert torch.equal(w, torch.full((3,), 2.0))
    compiled()
    assert torch.equal(w, torch.full((3,), 3.0))


@pytest.mark.parametrize("late", [False, True])
def test_a_trace_that_is_interrupted_leaves_no_mode_behind(late, monkeypatch):
    """KeyboardInterrupt while torch has taken the mode off, or before `__exit__` has."""
    x = torch.arange(3.0)
    interrupted = False

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    def step() -> torch.Tensor:
        y = x * 2
        if interrupted and not late:
            _pop_mode()
            raise KeyboardInterrupt
        return y

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    for _ in range(4):
        compiled()
    interrupted = True
    with monkeypatch.context() as patch:
        if late:
            patch.setattr(Tracer, "__exit__", leave)
        with pytest.raises(KeyboardInterrupt):
            compiled()
    interrupted = False
    assert torch._C._len_torch_function_stack() == 0
    assert compiled().tolist() == [0.0, 2.0, 4.0]
