"""What a user is told and promised around replays: reasons, warnings, gradients, memory."""

from __future__ import annotations

import functools
import itertools
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tracejit
from tracejit.errors import ReplayNotArmed, TracejitWarning


def network(seed: int = 0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    return model, torch.randn(4, 5), torch.randn(4, 3)


def trainer(optimizer=torch.optim.Adam, **options):
    """(model, optimizer, step) of a small regression."""
    model, x, y = network()
    opt = optimizer(model.parameters(), lr=0.01, **options)

    def step():
        opt.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        opt.step()
        return loss.detach()

    return model, opt, step


# ---- reasons


def test_a_retrace_names_the_path_with_the_old_and_the_new_value():
    config, x = SimpleNamespace(act="tanh", name="a"), torch.ones(3)
    step = tracejit.compile(lambda: x.tanh() if config.act == "tanh" else x.exp())
    for _ in range(4):
        step()
    assert step.explain_retraces() == []
    config.act = "exp"
    for _ in range(4):
        assert torch.equal(step(), x.exp())
    reasons = step.explain_retraces()  # two traces have to agree before the new plan is replayed
    assert all("config.act was 'tanh' and is 'exp' now" in reason for reason in reasons)
    assert ["new plan" in reason for reason in reasons] == [True, False]
    config.act = "tanh"
    assert torch.equal(step(), x.tanh()) and len(step.explain_retraces()) == 2  # armed before


@pytest.mark.parametrize("values", [(2, 3, 5, 7, 9, -1), (2.0, 0.5, 1.5, 0.25, -1.0)])
def test_a_number_that_varies_is_a_runtime_scalar_from_then_on(values):
    config, x = SimpleNamespace(scale=values[0]), torch.ones(3)
    step = tracejit.compile(lambda: x * config.scale)
    for _ in range(4):
        step()
    config.scale = values[1]
    for _ in range(4):
        assert torch.equal(step(), x * values[1])
    reasons = step.explain_retraces()
    known = len(reasons)
    assert f"config.scale was {values[0]} and is {values[1]} now" in reasons[0]
    for value in values[2:]:
        config.scale = value
        assert torch.equal(step(), x * value)
    assert len(step.explain_retraces()) == known and step.stats.compiles <= 3


def test_a_number_that_varies_and_is_a_size_is_named_where_it_changes():
    config, x = SimpleNamespace(turns=1), torch.ones(3)

    @tracejit.compile
    def step():
        y = x
        for _ in range(config.turns):
            y = y + 1
        return y

    for turns in (1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 1, 2, 3):
        config.turns = turns
        assert torch.equal(step(), x + turns)
    reasons = step.explain_retraces()
    assert any("config.turns was 2 and is 3 now" in reason for reason in reasons), reasons
    assert step.stats.replays >= 3


def test_a_retrace_for_a_tensor_describes_it():
    step = tracejit.compile(lambda x: x * 2)
    for n in (3, 3, 3, 4):
        step(torch.ones(n))
    (reason,) = step.explain_retraces()
    assert "float32[3]" in reason and "float32[4]" in reason


def test_retraces_are_reported_at_debug_level_1(monkeypatch, capsys):
    monkeypatch.setenv("TRACEJIT_DEBUG", "1")
    config, x = {"power": 2}, torch.ones(3)
    step = tracejit.compile(lambda: x ** config["power"])
    for _ in range(3):
        step()
    config["power"] = 3
    step()
    assert "config['power'] was 2 and is 3 now" in capsys.readouterr().out


def test_a_guard_is_readable_source():
    _, _, step = trainer()
    compiled = tracejit.compile(step)
    for _ in range(4):
        compiled()
    (text,) = compiled.guards
    assert text.startswith("def guard(args, kwargs") and "param_groups[0]['lr']" in text


# ---- warnings


def test_a_step_that_cannot_replay_warns_once_with_the_line():
    x = torch.ones(3)

    def step():
        time.time()
        return x * 2

    compiled = tracejit.compile(step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            compiled()
    (warning,) = [w for w in caught if w.category is TracejitWarning]
    line = step.__code__.co_firstlineno + 1
    assert f"test_contract.py:{line}" in str(warning.message) and "time" in str(warning.message)


def test_a_step_that_keeps_making_plans_warns_once_with_the_cause():
    config, x = SimpleNamespace(size=0), torch.ones(3)
    step = tracejit.compile(lambda: x * torch.ones(config.size, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(40):
            config.size = i // 3
            assert len(step()) == i // 3
    (warning,) = [w for w in caught if w.category is TracejitWarning]
    assert "plans" in str(warning.message) and "config.size" in str(warning.message)


@pytest.mark.parametrize(
    ("find", "remedy"),
    [
        (lambda x: x[x > 0].sum(), "torch.where(mask, x, 0)"),
        (lambda x: torch.unique(x).sum(), "one_hot"),
        (lambda x: torch.bincount(x.clamp(min=0)).sum(), "minlength"),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "rerun"])
@pytest.mark.sweep(2)
def test_a_number_of_elements_that_varies_is_told_once_with_a_remedy(find, remedy, mode):
    step = tracejit.compile(lambda x: find(x), mode=mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(24):
            x = (torch.arange(12) - i % 12).clamp(min=-1)
            assert torch.equal(step(x), find(x))
    (warning,) = [w for w in caught if w.category is TracejitWarning]
    said = str(warning.message)
    assert remedy in said and "test_contract.py" in said and "so far" in said


def test_replay_mode_raises_where_a_proof_is_impossible():
    counter = itertools.count()
    x = torch.ones(3)
    compiled = tracejit.compile(lambda: x * next(counter), mode="replay")
    with pytest.raises(ReplayNotArmed, match="counter"):
        compiled()


def test_replay_mode_learns_what_a_step_assigns():
    counter, x = SimpleNamespace(n=0), torch.ones(3)

    @functools.partial(tracejit.compile, mode="replay")
    def step():
        counter.n += 1
        return x * counter.n

    for i in range(1, 6):
        assert torch.equal(step(), x * i)
    assert step.stats.replays == 3


# ---- gradients


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_without_keep_grads_nothing_but_the_gradients_differs(backend):
    model, _, step = trainer()
    other, _, eager = trainer()
    compiled = tracejit.compile(step, backend=backend, keep_grads=False)
    for _ in range(10):
        torch.testing.assert_close(compiled(), eager())
        assert all(p.grad is None for p in model.parameters())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    outputs = [b for b in compiled.plans[-1].buffers if b.kind == "output"]
    assert len(outputs) == 1  # the loss


def test_without_keep_grads_accumulation_into_existing_gradients_goes_on():
    w = torch.ones(3, requires_grad=True)
    w.grad = torch.zeros(3)
    grad = w.grad
    step = tracejit.compile(lambda: (w * w).sum().backward(), keep_grads=False)
    for i in range(4):
        step()
        assert w.grad is grad and torch.equal(grad, torch.full((3,), 2.0 * (i + 1)))


@pytest.mark.parametrize("mode", ["rerun", "auto"])
def test_a_leaf_made_inside_is_returned_with_its_gradient(mode):
    x = torch.randn(2)

    @tracejit.compile(mode=mode, backend="numpy")
    def step(scale: float) -> torch.Tensor:
        made = torch.zeros(2, requires_grad=True)
        ((made * x).sum() * scale).backward()
        return made

    for i in range(6):
        made = step(i + 1.0)
        assert made.is_leaf and made.requires_grad
        torch.testing.assert_close(made.grad, x * (i + 1))
    assert (step.stats.replays > 0) == (mode == "auto"), step.explain_mode()


# ---- memory


def test_what_a_step_returned_is_the_callers_to_keep():
    x = torch.zeros(3)

    def step():
        x.add_(1)
        return x * 2, (x * 3).view(3, 1)

    compiled = tracejit.compile(step)
    kept = [compiled() for _ in range(12)]
    arrays = [compiled()[0].numpy() for _ in range(5)]  # numpy holds the memory, not the tensor
    views = [compiled()[0][1:] for _ in range(5)]
    for i, (double, triple) in enumerate(kept, 1):
        assert torch.equal(double, torch.full((3,), 2.0 * i))
        assert torch.equal(triple, torch.full((3, 1), 3.0 * i))
    for i, array in enumerate(arrays, 13):
        assert (array == 2.0 * i).all()
    for i, view in enumerate(views, 18):
        assert torch.equal(view, torch.full((2,), 2.0 * i))


def test_a_gradient_that_the_user_kept_is_not_written_again():
    model, _, step = trainer()
    other, _, eager = trainer()
    compiled = tracejit.compile(step)
    kept, wanted = [], []
    for _ in range(8):
        compiled()
        eager()
        kept.append([p.grad for p in model.parameters()])
        wanted.append([p.grad.clone() for p in other.parameters()])
    for ours, eagers in zip(kept, wanted, strict=True):
        for a, b in zip(ours, eagers, strict=True):
            torch.testing.assert_close(a, b)


def test_what_autograd_saved_of_a_result_is_not_written_again():
    x, w = torch.zeros(3), torch.ones(3, requires_grad=True)

    def step():
        x.add_(1)
        return x * 2

    compiled = tracejit.compile(step)
    outside = [(compiled() * w).sum() for _ in range(8)]  # each saved a result for its backward
    for i, loss in enumerate(outside, 1):
        (g,) = torch.autograd.grad(loss, w)
        assert torch.equal(g, torch.full((3,), 2.0 * i))


# ---- exceptions


@pytest.mark.parametrize("where", ["after the update", "a check"])
def test_a_step_that_raises_leaves_tensors_as_they_were(where):
    """Eager keeps what was written before; then the next call goes on as if nothing had been."""
    results = []
    for fails in (False, True):
        model, opt, train = trainer()
        seen, log = torch.zeros(2), []

        def step(number, classes, opt=opt, train=train, seen=seen, log=log):
            seen.add_(1)
            loss = train()
            log.append(number)
            opt.zero_grad()
            if number < 0:
                raise KeyError(number)
            return loss, nn.functional.one_hot(classes + 1, 4)

        compiled, good = tracejit.compile(step), torch.tensor([0, 2])
        for i in range(4):
            compiled(i, good)
            if fails:
                tensors = [*model.parameters(), seen, *opt.state[model[0].weight].values()]
                before = [t.detach().clone() for t in tensors]
                with pytest.raises((KeyError, RuntimeError)):
                    compiled(*((-1, good) if where != "a check" else (i, good + 1)))
                assert all(map(torch.equal, tensors, before)) and len(log) == 2 * (i + 1)
        results.append([compiled(9, good), *model.parameters(), seen, opt.state_dict()["state"]])
    torch.testing.assert_close(*results, rtol=0, atol=0)


# ---- counts of traces and plans


def test_a_changed_float_never_retraces():
    x = torch.ones(3)
    step = tracejit.compile(lambda lr: x * lr)
    for i in range(50):
        assert torch.allclose(step(0.01 * i), x * (0.01 * i))
    assert step.stats.traces == 2 and step.stats.compiles == 1
