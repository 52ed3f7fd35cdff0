"""What is said of a long call: a line on a terminal, one entry in the log elsewhere, or nothing."""

from __future__ import annotations

import io
import logging
import sys

import pytest
import torch

import tracejit
from tracejit import progress
from tracejit.progress import Line, stage, telling


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_line_on_a_terminal_appears_after_two_seconds_and_goes():
    now, out = [10.0], Terminal()
    line = Line("step", lambda: now[0], out)
    now[0] = 11.9
    line.tick()
    assert out.getvalue() == ""
    now[0], line.stage = 12.2, "schedule"
    line.tick()
    line.stage, line.detail, now[0] = "load", "of 3 launches", 15.0
    line.tick()
    line.wipe()
    first, second, last = out.getvalue().split("\r\033[K")[1:]
    assert first == "tracejit: step [###..] schedule, 2 s"
    assert second == "tracejit: step [####.] load of 3 launches, 5 s" and last == ""


def test_elsewhere_one_entry_in_the_log(caplog):
    now, out = [0.0], io.StringIO()
    line = Line("step", lambda: now[0], out)
    with caplog.at_level(logging.INFO, "tracejit"):
        for now[0] in (1.0, 3.0, 4.0, 5.0):
            line.tick()
        line.wipe()
    assert caplog.messages == ["tracejit: step [#....] capture, 3 s"] and out.getvalue() == ""


def slow_step(monkeypatch) -> list[str]:
    """Stages of the first call of a step that seems to take long."""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    seen = []
    monkeypatch.setattr(Line, "tick", lambda self: seen.append(self.name))
    monkeypatch.setattr(
        "tracejit.pipeline.stage", lambda *x: (stage(*x), seen.append(progress._here.line.stage))
    )

    def step(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    tracejit.compile(step, backend="numpy")(torch.ones(3))
    return seen


def test_a_first_call_goes_through_the_stages(monkeypatch):
    seen = slow_step(monkeypatch)
    assert [s for s in seen if s != "step"] == ["passes", "schedule", "load"]


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("TRACEJIT_PROGRESS", "0")
    monkeypatch.setattr(progress, "Line", None)
    with telling("step"):
        stage("load")
    tracejit.compile(lambda x: x + 1, backend="numpy")(torch.ones(2))


@pytest.mark.parametrize("error", [None, ValueError])
def test_nothing_is_left_of_a_call(error, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", out)
    with pytest.raises(error or ZeroDivisionError), telling("step"):
        line = progress._here.line
        with telling("inner"):
            assert progress._here.line is line
        line.tick()
        raise error or ZeroDivisionError
    assert out.getvalue().endswith("\r\033[K") and progress._here.line is None
