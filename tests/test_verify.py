"""`tracejit.compile(verify=k)`: eager beside the compiled step, both compared, and what follows."""

from __future__ import annotations

import operator
import random
import warnings
import zipfile
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tracejit
from tracejit.__main__ import main
from tracejit.errors import TracejitWarning, WrongResult


class Trainer:
    """A step with all that a call may change: parameters, buffers, optimizer and scheduler state,
    random numbers, and Python's own."""

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(8, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.Tanh(),
            torch.nn.Dropout(0.25),
            torch.nn.Linear(16, 3),
        )
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.opt, 3, gamma=0.5)
        self.n, self.last = 0, None
        self.x, self.y = torch.randn(12, 8), torch.randint(0, 3, (12,))

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.opt.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.opt.step()
        self.schedule.step()
        self.n += 1
        self.last = loss.detach()
        return loss.detach()

    def state(self) -> list:
        held = [*self.model.parameters(), *self.model.buffers()]
        moments = [v for s in self.opt.state.values() for v in s.values()]
        grads = [p.grad for p in self.model.parameters()]
        return [t.detach().clone() for t in (*held, *moments, *grads, self.last)]


def trained(calls: int, **options: object) -> tuple[Trainer, object]:
    t = Trainer()
    step = tracejit.compile(t.step, **options)
    for _ in range(calls):
        step(t.x, t.y)
    return t, step


@pytest.mark.parametrize("mode", ["auto", "rerun"])
@pytest.mark.sweep(1)
def test_a_verified_step_trains_as_one_that_is_not(mode: str):
    """To the bit: what eager did beside it is undone, generators and Python's state too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", TracejitWarning)
        a, step = trained(9, verify=2, mode=mode)
        after = torch.rand(3)
    b, plain = trained(9, mode=mode)
    assert torch.equal(after, torch.rand(3))
    assert all(map(torch.equal, a.state(), b.state()))
    assert (a.n, a.opt.param_groups[0]["lr"]) == (b.n, b.opt.param_groups[0]["lr"])
    assert step.stats.eager == 0 and step.explain_mode() == plain.explain_mode()
    found = step.certificate()
    assert found.holds and not found.unverified
    hows = {entry.how for entry in found.verified}
    assert hows == ({"trace"} if mode == "rerun" else {"trace", "replay"})
    for entry in found.verified:
        assert 1 <= entry.calls <= 4 and entry.tensors > 20 and entry.error < 1e-5
        assert entry.inputs["x"] == "f32[12,8]" and entry.first <= entry.last
    assert sum(entry.calls for entry in found.verified) == (3 if mode == "rerun" else 6)
    assert step._last_run.text == plain._last_run.text  # as it was verified, so it is run


def test_nothing_is_left_in_the_way_after_the_verified_calls():
    """A replay has the guard and the function that it would have had."""
    _, step = trained(9, verify=2)
    (replay,) = step._replays
    assert replay.guard.__code__.co_filename == "<tracejit guard>"
    assert replay.run.function.__code__.co_filename == "<tracejit run>"
    assert replay.run.function.__globals__["hooks"] is step._hooks
    assert step.observer is None


def test_every_plan_is_verified():
    """Another shape is another plan."""
    t = Trainer()
    step = tracejit.compile(t.step, verify=1)
    for rows in (12, 7):
        for _ in range(5):
            step(t.x[:rows], t.y[:rows])
    shapes = {entry.inputs["x"] for entry in step.certificate().verified}
    assert shapes == {"f32[12,8]", "f32[7,8]"}


def swapped():
    """C's where takes the wrong side."""
    from tracejit.codegen.c_table import TEMPLATES

    return patch.dict(TEMPLATES, {"where": "({0} ? {2} : {1})"})


class Masked:
    """Two weights, of which a mask decides what is learned."""

    def __init__(self):
        torch.manual_seed(1)
        self.w = torch.randn(6, 4, requires_grad=True)
        self.calls = []

    def step(self, x: torch.Tensor) -> torch.Tensor:
        h = x @ self.w
        kept = torch.where(h > 0.5, h * 2.0, h)  # the line to blame
        loss = (kept * kept).sum()
        (g,) = torch.autograd.grad(loss, self.w)
        with torch.no_grad():
            self.w -= 0.01 * g
        self.calls.append(1)
        return loss


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("mode", ["auto", "rerun"])
def test_a_wrong_plan_is_withdrawn_and_eager_s_result_kept(mode: str, fresh):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    wanted = Masked()
    losses = [wanted.step(x).detach() for _ in range(5)]
    with swapped():
        m = Masked()
        step = tracejit.compile(m.step, verify=2, backend="c", mode=mode, on_unsupported="eager")
        with pytest.warns(TracejitWarning, match="IS WRONG") as said:
            found = [step(x).detach() for _ in range(5)]
    assert all(map(torch.equal, found, losses))
    assert torch.equal(m.w, wanted.w) and m.calls == wanted.calls
    assert step.stats.replays == 0 and step.explain_mode().startswith("eager")
    certificate = step.certificate()
    assert not certificate.holds and len(certificate.withdrawn) == 1
    text = str(said[0].message)
    assert "the printer for c gets where wrong" in text and "launch" in text
    assert "kept = torch.where(h > 0.5, h * 2.0, h)  # the line to blame" in text


def test_without_a_fallback_a_wrong_result_is_raised_with_all_as_before(fresh):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    with swapped():
        m = Masked()
        before = m.w.detach().clone()
        step = tracejit.compile(m.step, verify=2, backend="c", on_unsupported="raise")
        for _ in range(3):
            with pytest.raises(WrongResult, match="printer for c"):
                step(x)
    assert torch.equal(m.w, before) and not m.calls


def test_verify_checks_a_replay_that_was_right_before():
    """A fault that comes later, as in memory that went bad: what `verify` and samples are for."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    m = Masked()
    step = tracejit.compile(m.step)
    for _ in range(5):
        step(x)
    step.verify(x)
    assert step.certificate().holds and len(m.calls) == 6
    (replay,) = step._replays
    own = replay.run

    def wrong(*given):
        returned = own.function(*given)
        m.w.data.mul_(1.001)
        return returned

    before = m.w.detach().clone()
    replay.run = replace(own, function=wrong)
    with pytest.raises(WrongResult, match=r"self\.w"):
        step.verify(x)
    assert torch.equal(m.w, before) and len(m.calls) == 6
    with pytest.raises(WrongResult):  # that plan is not used again
        step(x)


def test_a_sample_of_the_calls_is_verified():
    t, step = trained(120, verify="sample:0.2")
    (entry,) = (e for e in step.certificate().verified if e.how == "replay")
    assert 8 <= entry.calls <= 45
    b, _ = trained(120)
    assert all(map(torch.equal, t.state(), b.state()))


def test_what_verify_takes():
    for wrong in (-1, "sample:2", "sample:", "often", 1.5):
        with pytest.raises(ValueError, match="verify is a number of calls"):
            tracejit.compile(lambda x: x, verify=wrong)
    step = tracejit.compile(lambda x: x * 2, verify=True)
    step(torch.ones(2))
    assert step.certificate().verified[0].calls == 1
    assert "nothing was verified" in str(tracejit.compile(lambda x: x).certificate())


def test_a_call_that_cannot_be_made_twice_is_not_verified(tmp_path):
    path = tmp_path / "log"
    w = torch.ones(3, requires_grad=True)

    def step(x):
        with open(path, "a") as f:
            f.write("called\n")
        return (w * x).sum()

    step = tracejit.compile(step, verify=3)
    with pytest.warns(TracejitWarning, match="cannot be verified"):
        for _ in range(4):
            step(torch.ones(3))
    assert path.read_text() == "called\n" * 4
    assert step.certificate().unverified and not step.certificate().verified


def test_what_eager_raises_is_compared_too():
    def step(x, i):
        if i == 1:
            raise KeyError("by the user")
        return x[torch.tensor([i])] * 2

    step = tracejit.compile(step, verify=2)
    x = torch.arange(4.0)
    for _ in range(3):
        assert step(x, 3).item() == 6.0
        with pytest.raises(IndexError):
            step(x, 7)
        with pytest.raises(KeyError, match="by the user"):
            step(x, 1)
    assert not step.certificate().withdrawn


def test_python_s_own_state_is_compared(fresh):
    """A store into an attribute that the plan does not make."""
    from tracejit.capture.effects import commit

    class Counter:
        n = 0

    c, w = Counter(), torch.ones(3)

    def step(x):
        c.n += 2
        return x * w

    own = commit.commit_lines

    def forgetful(*args, **kwargs):
        return [line for line in own(*args, **kwargs) if "holders" not in line]

    step = tracejit.compile(step, verify=2, on_unsupported="eager")
    with (
        patch("tracejit.run.commit_lines", forgetful),
        pytest.warns(TracejitWarning, match=r"Counter\['n'\]"),
    ):
        for call in range(6):
            step(torch.ones(3))
            assert c.n == 2 * (call + 1)


def test_generators_of_python_and_numpy_are_put_back():
    w = torch.ones(4)

    def step(x):
        return F.dropout(x * w, 0.5) * random.random()

    step = tracejit.compile(step, verify=3)
    torch.manual_seed(0), random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        found = [step(torch.ones(4)) for _ in range(4)]
    torch.manual_seed(0), random.seed(0)
    assert all(torch.equal(t, F.dropout(torch.ones(4) * w, 0.5) * random.random()) for t in found)
    assert not step.certificate().withdrawn


def test_an_interrupt_leaves_all_as_before():
    t = Trainer()
    armed = []
    own = t.schedule.step

    def interrupted():
        if armed:
            raise KeyboardInterrupt
        own()

    step = tracejit.compile(t.step, verify=9)
    step(t.x, t.y)
    before = t.state(), t.n
    t.schedule.step = interrupted
    armed.append(1)
    with pytest.raises(KeyboardInterrupt):
        step(t.x, t.y)
    assert all(map(torch.equal, before[0], t.state())) and t.n == before[1]


def test_the_memory_for_copies_is_bounded():
    t = Trainer()
    step = tracejit.compile(t.step, verify=2)
    with (
        patch("tracejit.verify.before._free_bytes", lambda: 1000),
        pytest.warns(TracejitWarning, match="copies of its tensors"),
    ):
        step(t.x, t.y)
    assert t.n == 1


def test_steps_over_numpy_arrays_say_that_they_are_not_verified():
    step = tracejit.compile(lambda x: np.tanh(x) * 2, verify=2)
    x = np.ones(4, np.float32)
    assert np.allclose(step(x), np.tanh(x) * 2)
    assert step.certificate().unverified == ["its arguments are numpy arrays"]
    with pytest.raises(ValueError, match="numpy arrays"):
        step.verify(x)


def test_what_a_trace_left_in_a_class_is_undone():
    """The intermediate that the trace puts there goes, and no copy is lost by that."""

    class Model:
        calls, last = 0, None

        def __call__(self, x):
            type(self).calls += 1
            Model.last = x * self.calls
            return self.last + 1.0

    m = Model()
    step = tracejit.compile(lambda x: m(x), verify=2)
    for call in range(5):
        assert step(torch.ones(2)).tolist() == [call + 2.0] * 2
        assert Model.calls == call + 1 and Model.last.tolist() == [call + 1.0] * 2
    assert step.certificate().holds


def test_evidence_from_the_command_line(fresh, capsys):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    with swapped():
        step = tracejit.compile(Masked().step, verify=2, backend="c", on_unsupported="eager")
        with pytest.warns(TracejitWarning, match="evidence: ") as said:
            step(x)
        file = str(said[0].message).rpartition("evidence: ")[2].rstrip(".")
        assert main(["replay-evidence", file]) == 1
        assert capsys.readouterr().out.count("printer for c gets where wrong") == 2
    for damage in (b"", b"no zip"):
        other = fresh / "damaged"
        other.write_bytes(damage)
        assert main(["replay-evidence", str(other)]) == 2
    with zipfile.ZipFile(file) as given, zipfile.ZipFile(other, "w") as made:
        for name in given.namelist():
            data = given.read(name)
            made.writestr(name, data.replace(b'"digest": "', b'"digest": "0', 1))
    assert main(["replay-evidence", str(other)]) == 2
    assert "another digest" in capsys.readouterr().err


def test_the_result_is_eager_s_where_no_evidence_can_be_written(fresh):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    wanted = Masked().step(x)
    (fresh / "evidence").write_text("a file where the directory would be")
    with swapped(), pytest.warns(TracejitWarning, match="no evidence was written"):
        m = Masked()
        found = tracejit.compile(m.step, verify=2, backend="c", on_unsupported="eager")(x)
    assert torch.equal(found, wanted) and m.calls == [1]


def test_a_call_that_initializes_lazy_modules_is_not_verified_and_later_ones_are():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Tanh(), torch.nn.LazyLinear(1))
    step = tracejit.compile(lambda x: model(x).sum(), verify=2)
    with pytest.warns(TracejitWarning, match="initializes lazy modules"):
        first = step(torch.ones(3, 5))
    assert torch.equal(first, model(torch.ones(3, 5)).sum())
    for _ in range(4):
        step(torch.ones(3, 5))
    assert step.certificate().holds


def test_an_object_with_a_readonly_slot_is_within_reach():
    get = operator.attrgetter("real", "imag")
    step = tracejit.compile(lambda x: x * get(2.0)[0], verify=2)
    for _ in range(4):
        assert step(torch.ones(2)).tolist() == [2.0, 2.0]
    assert step.certificate().holds


def test_one_element_with_any_stride():
    x = torch.arange(6.0).as_strided((1,), (2,), 1)
    step = tracejit.compile(lambda: x * 2 + x.add_(1.0), verify=2)
    for call in range(4):
        assert step().tolist() == [3.0 * (1 + call) + 1.0]
    assert step.certificate().holds


def test_results_that_a_step_keeps_and_a_backward_may_not_reach():
    """Spectral norm keeps a weight that the step has computed, with the history of its results."""
    torch.manual_seed(0)
    layer = torch.nn.utils.spectral_norm(torch.nn.Linear(4, 3))
    opt = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(5, 4)

    def train() -> torch.Tensor:
        opt.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        opt.step()
        return loss

    step = tracejit.compile(train, verify=2)
    for _ in range(6):
        step()
    found = step.certificate()
    assert found.holds and not found.unverified
    assert [v.calls for v in found.verified if v.how == "replay"] == [2]
