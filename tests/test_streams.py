"""Steps that name standard streams: what they show is treated as what `print` shows."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import tracejit

pytestmark = pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")


class Trainer:
    def __init__(self):
        torch.manual_seed(0)
        self.w = torch.randn(4, 2, requires_grad=True)
        self.x = torch.randn(8, 4)
        self.opt = torch.optim.SGD([self.w], lr=0.1)
        self.n, self.out = 0, sys.stdout

    def train(self) -> torch.Tensor:
        self.n += 1
        self.opt.zero_grad()
        loss = (self.x @ self.w).square().mean()
        loss.backward()
        self.opt.step()
        return loss.detach()


def printed(t: Trainer, loss: torch.Tensor) -> None:
    print("step", t.n, f"{loss.item():.3f}", file=sys.stdout)


def written(t: Trainer, loss: torch.Tensor) -> None:
    sys.stdout.write(f"step {t.n}: {loss.item():.3f}\n")


def flushed(t: Trainer, loss: torch.Tensor) -> None:
    print(f"step {t.n}")
    sys.stdout.flush()


def to_the_other(t: Trainer, loss: torch.Tensor) -> None:
    print(f"step {t.n}", loss, file=sys.stderr, flush=True)


def imported(t: Trainer, loss: torch.Tensor) -> None:
    from sys import stdout

    stdout.write(f"{t.n} ")


def of_an_attribute(t: Trainer, loss: torch.Tensor) -> None:
    t.out.write(f"{t.n} ")


SHOWS = (printed, written, flushed, to_the_other, imported, of_an_attribute)


def shown(show: Callable, calls: int, every: int, compiled: bool) -> tuple[list, str, object]:
    """Losses, all that was shown, and the step."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        t = Trainer()

        def step() -> torch.Tensor:
            loss = t.train()
            if t.n % every == 0:
                show(t, loss)
            return loss

        f = tracejit.compile(step, on_unsupported="raise") if compiled else step
        return [f().item() for _ in range(calls)], out.getvalue(), f


@pytest.mark.parametrize("show", SHOWS, ids=lambda show: show.__name__)
def test_calls_that_show_nothing_are_replayed(show):
    losses, text, _ = shown(show, 40, 5, compiled=False)
    ours, mine, step = shown(show, 40, 5, compiled=True)
    assert ours == pytest.approx(losses, rel=1e-5) and mine == text
    assert step.stats.replays >= 24, step.explain_mode()


@pytest.mark.parametrize("show", SHOWS, ids=lambda show: show.__name__)
def test_calls_that_show_go_as_earlier_ones(show):
    """Nothing is traced anew because of another number in a text."""
    losses, text, _ = shown(show, 30, 1, compiled=False)
    ours, mine, step = shown(show, 30, 1, compiled=True)
    assert ours == pytest.approx(losses, rel=1e-5) and mine == text
    assert step.stats.replays == 0 and step._recall.kept >= 12, step.explain_mode()
    assert step.stats.compiles == 1


def test_another_stream_is_noticed():
    """What a step decides by the stream itself is guarded."""
    t = Trainer()
    first = sys.stdout

    def step() -> torch.Tensor:
        return t.train() * (1.0 if sys.stdout is first else 2.0)

    compiled = tracejit.compile(step, on_unsupported="raise")
    for _ in range(6):
        before = compiled()
    assert compiled.stats.replays >= 2, compiled.explain_mode()
    with redirect_stdout(io.StringIO()):
        after = compiled()
    assert after.item() > 1.2 * before.item()


def test_what_a_stream_tells_of_itself_is_not_replayed():
    t = Trainer()
    stream = io.StringIO()

    def step() -> torch.Tensor:
        return t.train() * (2.0 if sys.stdout.closed else 1.0)

    compiled = tracejit.compile(step, on_unsupported="raise")
    with redirect_stdout(stream):
        for _ in range(6):
            before = compiled()
        stream.close()
        after = compiled()
    assert after.item() > 1.2 * before.item()
