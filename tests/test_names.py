"""`tracejit.capture`: the names of a step's inputs, its text, and that nothing is changed."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch
from torch import nn

import tracejit
from support.golden import Golden
from tracejit.errors import SideEffectError, TracejitError, UnsupportedOperation
from tracejit.ir.text import parse

SCALE = 3.0
WEIGHT = torch.ones(3)


def names(step, *args, **kwargs) -> tuple[str, ...]:
    """The names of a captured step, which are unique."""
    found = tracejit.capture(step, *args, **kwargs)
    assert len({*found.names}) == len(found.names) == len(found.graph.params)
    return found.names


def two_layers(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, **options)

    def step(x, y):
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return model, optimizer, step, (torch.randn(5, 4), torch.randn(5, 2))


# ---- names


def test_arguments():
    def step(x, xs, batch, *rest, scale, more=2.0, **others):
        y = x + xs[0] + xs[1][0] + batch["ids"] + rest[0] + others["z"]
        return y * scale * more

    one = torch.ones
    found = names(step, one(3), [one(3), (one(3),)], {"ids": one(3)}, one(3), scale=2.0, z=one(3))
    assert set(found) == {
        *("x", "xs[0]", "xs[1][0]", "batch['ids']", "rest[0]", "others['z']", "scale", "more")
    }


def test_positional_defaults_and_tuples_of_floats():
    def step(x, betas, eps=0.5):
        return x * betas[0] + betas[1] + eps

    assert set(names(step, torch.ones(2), (1.0, 2.0))) == {"x", "betas[0]", "betas[1]", "eps"}
    assert set(names(step, torch.ones(2), (1.0, 2.0), eps=3.0)) == {
        *("x", "betas[0]", "betas[1]", "eps")
    }


def test_closure_variables_and_globals():
    w1, lr = torch.ones(3), 0.1

    def step(x):
        return x * w1 * lr + WEIGHT * SCALE

    assert set(names(step, torch.ones(3))) == {"x", "w1", "lr", "WEIGHT", "SCALE"}


def test_variables_of_called_functions():
    w = torch.ones(3)

    def helper(x):
        return x * w + WEIGHT

    def step(x):
        return helper(x)

    assert set(names(step, torch.ones(3))) == {"x", "helper.w", "WEIGHT"}


def test_modules_buffers_and_attributes():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].extra = [torch.ones(3)]

    def step(x):
        return model(x) + model[0].extra[0]

    assert set(names(step, torch.ones(2, 3))) == {
        *("x", "model.0.weight", "model.0.bias", "model.0.running_mean", "model.0.running_var"),
        *("model.0.num_batches_tracked", "model.0.extra[0]"),
    }


def test_a_module_and_a_method_as_the_step():
    assert set(names(nn.Linear(2, 2), torch.ones(1, 2))) == {
        *("self.weight", "self.bias", "args[0]")
    }

    class Trainer:
        def __init__(self):
            self.w = torch.ones(2)

        def step(self, x):
            return x * self.w

        compiled = tracejit.compile(step)

    trainer = Trainer()
    assert set(names(trainer.step, torch.ones(2))) == {"x", "self.w"}
    assert set(names(trainer.compiled, torch.ones(2))) == {"x", "self.w"}


def test_gradients_optimizer_state_and_hyperparameters():
    model, optimizer, step, batch = two_layers()
    step(*batch)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    found = names(step, *batch)
    of_optimizer = ("lr", "betas[0]", "betas[1]", "eps")
    expected = {"x", "y", *(f"optimizer.param_groups[0].{key}" for key in of_optimizer)}
    for name, _ in model.named_parameters():
        state = f"optimizer.state[model.{name}]"
        expected |= {f"model.{name}", f"model.{name}.grad"}
        expected |= {f"{state}.exp_avg", f"{state}.exp_avg_sq", f"{state}.step.item()"}
    assert set(found) == expected


def test_parameters_that_only_the_optimizer_knows():
    optimizer = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)

    def step():
        optimizer.step()

    assert set(names(step)) == {
        *("optimizer.param_groups[0].lr", "optimizer.param_groups[0].params[0]"),
        "optimizer.param_groups[0].params[0].grad",
    }


def test_a_scheduler_changes_the_rate():
    w = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def step():
        (w * w).sum().backward()
        optimizer.step()
        scheduler.step()
        return w * optimizer.param_groups[0]["lr"]

    found = names(step)
    assert {"w", "optimizer.param_groups[0].lr", "optimizer.param_groups[0].lr.after_0"} <= {*found}
    assert (optimizer.param_groups[0]["lr"], scheduler.last_epoch) == (0.1, 0)


def test_tied_weights_have_their_first_name():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    again = model[0].weight

    def step(x):
        return model(x) @ again

    assert set(names(step, torch.ones(1, 2))) == {"x", "again"}
    assert set(names(model, torch.ones(1, 2))) == {"self.0.weight", "args[0]"}


def test_what_nothing_leads_to_has_a_number():
    hidden = iter([torch.ones(2), torch.zeros(2)])

    def step(x):
        return x + next(hidden)

    assert names(step, torch.ones(2)) == ("x", "input_1")


def test_a_name_that_is_taken():
    hidden = iter([torch.ones(2)])

    def step(input_1):
        return next(hidden) + input_1

    assert names(step, torch.ones(2)) == ("input_0", "input_1")


def test_names_are_the_same_every_time():
    _, _, step, batch = two_layers()
    assert names(step, *batch) == names(step, *batch) == names(tracejit.compile(step), *batch)


# ---- text


def test_text_of_a_training_step():
    _, _, step, batch = two_layers()
    step(*batch)
    text = str(tracejit.capture(step, *batch).optimized())
    Golden()("captured_step.txt", re.sub(r" +# .*", "", text))  # lines of this file move


def test_text_with_names_is_the_text_of_the_graph():
    def step(x, w):
        return (x @ w).relu()

    found = tracejit.capture(step, torch.ones(2, 3), torch.ones(3, 4))
    assert str(found).startswith("step(x: f32[2,3], w: f32[3,4]) {\n")
    text = str(found).replace("(x:", "(%0:").replace("w:", "%1:").replace("(x, w)", "(%0, %1)")
    assert str(parse(text)) == str(found.graph)


def test_effects():
    w = torch.ones(3, requires_grad=True)

    def step(x):
        (x * w).sum().backward()

    assert len(tracejit.capture(step, torch.ones(3)).effects.grads) == 1
    compiled = tracejit.compile(step, keep_grads=False)
    assert tracejit.capture(compiled, torch.ones(3)).effects.grads[0][1] is None


def test_reasons_of_retraces_name_the_tensor():
    w1 = torch.ones(3)

    def step(x, batch):
        return x * w1 + batch["ids"]

    compiled = tracejit.compile(step, backend="numpy", mode="replay")
    args = torch.ones(3), {"ids": torch.ones(3)}
    compiled(*args)
    compiled(args[0], {"ids": torch.ones(1, 3)})
    w1.data = torch.ones(2, 3)
    compiled(*args)
    first, second = compiled.explain_retraces()
    assert first.startswith("argument batch['ids'] was float32[3]")
    assert second.startswith("w1 was float32[3]")


# ---- nothing is changed


def test_nothing_is_changed():
    model, optimizer, step, batch = two_layers()
    kept = []

    def keeping(x, y):
        kept.append(model(x))
        optimizer.param_groups[0]["lr"] *= 0.5
        return step(x, y)

    for calls in range(2):
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        grads = [p.grad for p in model.parameters()]
        random = torch.get_rng_state()
        tracejit.capture(keeping, *batch)
        after = model.state_dict(), optimizer.state_dict()
        assert str(after) == str(before)
        assert len(optimizer.state) == 4 * calls
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        assert torch.equal(torch.get_rng_state(), random)
        group = optimizer.param_groups[0]
        assert {type(x) for x in (group["lr"], *group["betas"], group["eps"])} == {float}
        assert kept == []
        step(*batch)


def test_a_compiled_step_goes_on_as_before():
    model, _, step, batch = two_layers()
    other, _, eager, _ = two_layers()
    compiled = tracejit.compile(step, backend="numpy")
    for _ in range(5):
        tracejit.capture(compiled, *batch)
        torch.testing.assert_close(compiled(*batch), eager(*batch))
    assert compiled.stats.replays
    assert compiled.stats.compiles == 2
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_compiled_step_names_the_inputs_of_its_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACEJIT_DUMP", str(tmp_path))
    _, _, step, batch = two_layers()
    compiled = tracejit.compile(step, backend="numpy")
    compiled(*batch)
    assert "model.0.weight" in compiled.input_names
    assert len(compiled.input_names) == len(compiled.graph.params)
    (text,) = (p.read_text() for p in tmp_path.rglob("0_captured.txt"))
    at = compiled.input_names.index("model.0.weight")
    assert f"# %{at} is model.0.weight\n" in text
    assert str(parse(text)) in text  # the names are comments


def test_errors_name_the_tensor():
    ids = torch.tensor([1.0]).to_sparse()
    with pytest.raises(UnsupportedOperation, match=r"batch\['ids'\], a tensor of shape \[1\]"):
        tracejit.capture(lambda batch: batch["ids"] + 1, {"ids": ids})


def test_nothing_of_the_user_is_held():
    import gc
    import weakref

    x = torch.ones(2)
    found = tracejit.capture(lambda x: x * 2, x)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
    assert found.names == ("x",)


# ---- errors


def test_errors_are_those_of_a_compiled_step():
    model, optimizer, step, batch = two_layers()

    def bad(x, y):
        step(x, y)
        return torch.linalg.eigvals(x @ x.T)

    with pytest.raises(TracejitError) as ours:
        tracejit.capture(bad, *batch)
    with pytest.raises(TracejitError) as theirs:
        tracejit.compile(bad)(*batch)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)
    assert not optimizer.state


def test_what_is_no_step():
    with pytest.raises(TypeError, match="takes a Python function or method, not int"):
        tracejit.capture(3)
    with pytest.raises(TypeError, match="not partial"):
        tracejit.capture(partial(max, 3))


def test_capture_inside_a_compiled_step():
    def step(x):
        tracejit.capture(lambda x: x, x)
        return x

    for call in (tracejit.compile(step), partial(tracejit.capture, step)):
        with pytest.raises(SideEffectError, match="inside a step that is being traced"):
            call(torch.ones(2))


def test_the_package_beside_the_function():
    import tracejit.capture.trace.trace
    from tracejit.capture.names import names_of_inputs

    assert callable(tracejit.capture)
    assert callable(names_of_inputs)
