"""Values of tensors that Python reads in the step: returned, computed with, decided by, printed.

Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

import copy
import math
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tracejit
import tracejit.pipeline
from support.worlds import Case, Trainer, X, Y, check, table

CASES: dict[str, Case] = {}
case = table(CASES)


def batches(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Another batch on each call."""
    return X * (1 + 0.25 * i) - 0.1 * i, Y + 0.1 * i


def loss_then(finish, **options):
    """A trainer's step that ends with `finish(trainer, loss)`."""

    def build(w):
        w.t = t = Trainer(**options)

        def step(x, y):
            t.opt.zero_grad()
            loss = t.loss(x, y)
            loss.backward()
            t.opt.step()
            return finish(t, loss)

        return step

    return build


def norm_of_gradients(t: Trainer) -> torch.Tensor:
    return nn.utils.get_total_norm([p.grad for p in t.model.parameters()])


def value(mode: str, name: str, finish, **options) -> None:
    build = loss_then(finish, **options)
    build.__name__ = name
    case(mode, args=batches, calls=6)(build)


# ---- only returned: read after the plan

value("replay", "item", lambda t, loss: loss.item())
value("replay", "item_of_an_expression", lambda t, loss: (loss * 2 + 1).item())
value("replay", "arithmetic_of_items", lambda t, loss: 2 * loss.item() - loss.item() * loss.item())
value("replay", "item_and_the_tensor", lambda t, loss: (loss.detach(), loss.item()))
value(
    "replay",
    "items_in_a_dict",
    lambda t, loss: {"loss": loss.item(), "lr": t.opt.param_groups[0]["lr"]},
)
value("replay", "item_of_a_parameter", lambda t, loss: t.model[0].weight.sum().item())
value("replay", "item_of_a_gradient", lambda t, loss: t.model[0].weight.grad.norm().item())
value("replay", "item_in_double", lambda t, loss: loss.double().item())
value("replay", "item_in_half", lambda t, loss: loss.bfloat16().item())
value(
    "replay",
    "norm_of_gradients",
    lambda t, loss: nn.utils.get_total_norm([p.grad for p in t.model.parameters()]).item(),
)
value("replay", "the_same_twice", lambda t, loss: (loss.item(), loss.item()))
value("replay", "with_adam", lambda t, loss: loss.item(), make=torch.optim.Adam, lr=1e-2)
value("replay", "root_of_an_item", lambda t, loss: loss.item() ** 0.5)
value("replay", "quotient_of_items", lambda t, loss: loss.item() / (1 + loss.item()))
value("replay", "plain_float", lambda t, loss: float(loss))
value("replay", "sum_of_floats", lambda t, loss: {"twice": float(loss) + float(loss.item())})
value("replay", "text", lambda t, loss: f"{loss.item():.4f}")
value("rerun", "text_of_the_tensor", lambda t, loss: f"{loss:.4f}")
value("rerun", "printed", lambda t, loss: print(round(loss.item(), 3)))
value("rerun", "array", lambda t, loss: t.model(X).detach().numpy().copy())
value("replay", "list_of", lambda t, loss: t.model(X).tolist())
value("replay", "list_of_items", lambda t, loss: [float(p.sum()) for p in t.model.parameters()])


# ---- in named tuples

Pair = namedtuple("Pair", "first second")
value("replay", "named_tuple", lambda t, loss: Pair(loss.detach(), loss.item()))
value("replay", "torch_result", lambda t, loss: t.model(X).detach().max(1))
value("replay", "shape", lambda t, loss: (t.model(X).shape, [loss.shape], loss.device, loss.dtype))
value("replay", "sorted_by_torch", lambda t, loss: {"low": t.model(X).detach().min(0), "n": [1, 2]})


# ---- decisions


@case("replay", args=batches)
def skips_when_not_finite(w):
    w.t = t = Trainer()

    def step(x, y):
        t.opt.zero_grad()
        loss = t.loss(x, y)
        loss.backward()
        if torch.isfinite(loss):
            t.opt.step()
        return loss.detach()

    return step


@case("replay", args=lambda i: (X * (float("nan") if i in (3, 6) else 1.0), Y), calls=8)
def skips_at_times(w):
    w.t = t = Trainer()

    def step(x, y):
        t.opt.zero_grad()
        loss = t.loss(x, y)
        if torch.isnan(loss):
            return None
        loss.backward()
        t.opt.step()
        return loss.item()

    return step


@case("replay", args=lambda i: (X * (3.0 if i % 2 else 0.1), Y), calls=10)
def two_branches_in_turn(w):
    w.t = t = Trainer(lr=0.01)

    def step(x, y):
        t.opt.zero_grad()
        loss = t.loss(x, y)
        if loss > 1.0:
            loss = loss.sqrt()
        loss.backward()
        t.opt.step()
        return loss.detach()

    return step


@case("replay", args=lambda i: (X * (1.5**i), Y), calls=9)
def clipped_by_hand(w):
    w.t = t = Trainer(lr=0.001)

    def step(x, y):
        t.opt.zero_grad()
        loss = t.loss(x, y)
        loss.backward()
        total = sum(p.grad.norm().item() ** 2 for p in t.model.parameters()) ** 0.5
        if total > 2.0:
            for p in t.model.parameters():
                p.grad.mul_(2.0 / total)
        t.opt.step()
        return total

    return step


@case("replay", args=batches)
def early_exit(w):
    w.t = t = Trainer(lr=0.05)

    def step(x, y):
        for _ in range(3):
            t.opt.zero_grad()
            loss = t.loss(x, y)
            if loss.item() < 1e-6:
                break
            loss.backward()
            t.opt.step()
        return loss.detach()

    return step


@case("replay", args=lambda i: (X * 2.0 ** (i % 3),), calls=14)
def halved_until_small(w):
    def step(x):
        n = 0
        while x.abs().sum() > 10:
            x, n = x / 2, n + 1
        return x, n

    return step


@case("replay", args=lambda i: (X + (i // 3), X + 1), calls=9)
def compared_whole(w):
    def step(a, b):
        if torch.equal(a, b):
            return a * 2
        return a - b if torch.allclose(a, b, atol=1.5) else b

    return step


@case("replay", args=lambda i: (X.long() + i % 2, 2), calls=10)
def contains_a_number(w):
    return lambda x, n: x.float() * (2 if n in x else 3)


@case("replay", args=lambda i: (0.5 * i < X,), calls=8)
def any_of_a_mask(w):
    return lambda mask: mask.float() if mask.any() else None


@case("replay", args=lambda i: (X, i % 2 == 0), calls=8)
def truth_of_a_flag(w):
    w.flag = torch.tensor(True)

    def step(x, on):
        w.flag.fill_(on)
        return x * 2 if w.flag else x * 3

    return step


@case("replay", args=batches)
def assertion_on_values(w):
    def step(x, y):
        out = torch.softmax(x, 1)
        if not torch.allclose(out.sum(1), torch.ones(5)) or (out < 0).any():
            raise AssertionError("rows sum to one")
        return out

    return step


@case("replay", args=lambda i: (X[: 2 + i % 2],), calls=10)
def integer_as_a_loop_count(w):
    def step(x):
        total = x
        for _ in range(int((x > 0.5).any(1).sum())):
            total = total + x
        return total

    return step


@case("replay", args=batches)
def number_in_the_graph(w):
    def step(x, y):
        scale = x.abs().max().item()
        return (x / scale).sum(), y * scale

    return step


@case("replay", args=batches)
def learning_rate_from_the_loss(w):
    w.t = t = Trainer()

    def step(x, y):
        t.opt.zero_grad()
        loss = t.loss(x, y)
        loss.backward()
        for group in t.opt.param_groups:
            group["lr"] = 0.1 / (1 + loss.item())
        t.opt.step()
        return loss.detach()

    return step


@case("replay", args=batches)
def value_under_no_grad(w):
    w.t = t = Trainer()

    def step(x, y):
        with torch.no_grad():
            before = t.loss(x, y).item()
        t.opt.zero_grad()
        loss = t.loss(x, y)
        loss.backward()
        t.opt.step()
        with torch.no_grad():
            after = t.loss(x, y).item()
        return before, after, before - after

    return step


@case("replay", args=batches)
def value_of_a_running_mean(w):
    w.mean = torch.zeros(())

    def step(x, y):
        w.mean.mul_(0.9).add_(x.mean(), alpha=0.1)
        return w.mean.item()

    return step


@case("replay", args=batches, calls=8)
def restored_when_worse(w):
    w.t = t = Trainer(lr=0.5)

    def step(x, y):
        saved = [p.detach().clone() for p in t.model.parameters()]
        before = t.loss(x, y)
        t.opt.zero_grad()
        before.backward()
        t.opt.step()
        with torch.no_grad():
            if t.loss(x, y) > before:
                for p, old in zip(t.model.parameters(), saved, strict=True):
                    p.copy_(old)
        return before.detach()

    return step


@case("replay", args=batches, changes={3: lambda w: setattr(w, "limit", 0.0)}, calls=8)
def limit_changed_outside(w):
    w.limit = 1e9

    def step(x, y):
        total = (x * y.sum()).abs().sum()
        return total * 2 if total > w.limit else total.item()

    return step


@case("replay", args=batches, backend="c")
def branches_on_the_c_backend(w):
    w.t = t = Trainer(lr=0.01)

    def step(x, y):
        t.opt.zero_grad()
        loss = t.loss(x, y)
        if loss > 0.9:
            loss = loss * 0.5
        loss.backward()
        t.opt.step()
        return loss.item()

    return step


# ---- places that depend on values


@case("replay", args=lambda i: (torch.tensor(i % 5 - 1), torch.tensor(i % 3)), calls=9)
def rows_at_a_tensor_of_no_axes(w):
    w.t = t = Trainer(lr=0.01)
    w.table = table = torch.linspace(0.5, 1.5, 5)

    def step(k, j):
        out = t.model(X)
        loss = (out[k] * table[k] + out[k, j] + out[0, j] - Y[k]).pow(2).mean()
        t.opt.zero_grad()
        loss.backward()
        t.opt.step()
        return loss.detach(), out[out[k].argmax()].clone().detach()

    return step


@case("refused: in eager it is a view", says="is written to", args=lambda i: (torch.tensor(i % 3),))
def row_at_a_tensor_written(w):
    w.memory = memory = torch.zeros(3, 4)

    def step(k):
        memory[k].add_(1)
        return memory.sum()

    return step


@case("refused: in eager it is a view", says="is written to", args=lambda i: (torch.tensor(i % 3),))
def row_at_a_tensor_of_what_is_written_later(w):
    w.memory = memory = torch.zeros(3, 4)

    def step(k):
        row = memory[k]
        memory.add_(1)
        return row * 2

    return step


@case(
    "refused: in eager it is a view", says="leaves the step", args=lambda i: (torch.tensor(i % 3),)
)
def row_at_a_tensor_returned(w):
    return lambda k: (X * 2)[k]


# ---- shapes that depend on values


def shifted(i: int) -> tuple[torch.Tensor]:
    """One of two batches."""
    return (X + i % 2 - 1,)


value("replay", "loss_of_some_rows", lambda t, loss: t.model(X)[X[:, 0] > 0].sum().detach())


@case("replay", args=lambda i: (X * (1 + i), torch.tensor([0, -1, 2, 1, -1])))
def rows_with_a_label(w):
    w.t = t = Trainer(lr=0.01)

    def step(x, y):
        out = t.model(x)
        kept = y != -1
        loss = F.cross_entropy(out[kept], y[kept])
        t.opt.zero_grad()
        loss.backward()
        t.opt.step()
        return loss.item(), int(kept.sum())

    return step


@case("replay", args=shifted, calls=12)
def experts(w):
    """Each takes the rows that chose it as one of two, in the trainings of sparse mixtures."""
    w.gate, w.net = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    w.opt = torch.optim.SGD([*w.gate.parameters(), *w.net.parameters()], lr=1e-4)

    def step(x):
        weights, chosen = torch.topk(w.gate(x), 2)
        weights, out = weights.softmax(-1), torch.zeros_like(x)
        for i, net in enumerate(w.net):
            rows, k = torch.where(chosen == i)
            if rows.numel():
                out.index_add_(0, rows, weights[rows, k, None] * net(x[rows]))
        loss = out.square().mean()
        w.opt.zero_grad()
        loss.backward()
        w.opt.step()
        return loss.detach()

    return step


@case("replay", args=shifted, calls=9)
def where_it_is_positive(w):
    return lambda x: (
        torch.nonzero(x > 0),
        (x > 0).nonzero(as_tuple=True),
        torch.argwhere(x),
        torch.where(x > 0),
    )


@case("replay", args=shifted, calls=9)
def selected_and_put_back(w):
    def step(x):
        chosen = torch.masked_select(x, x > 0)
        out = x.clone()
        out[x > 0] = chosen / chosen.sum()
        out[:, x[0] > 0] = 0.0
        return out

    return step


@case("replay", args=shifted, calls=9, backend="c")
def hardest_examples(w):
    w.t = t = Trainer(lr=0.01)

    def step(x):
        losses = (t.model(x) - Y).pow(2).mean(1)
        loss = losses[losses > losses.mean()].sum()
        t.opt.zero_grad()
        loss.backward()
        t.opt.step()
        return loss.detach()

    return step


def labelled(i: int) -> tuple[torch.Tensor]:
    """Labels of which two, three or all four occur."""
    return (torch.tensor([[0, 1, 1, 0, 1], [2, 0, 2, 1, 1], [0, 1, 2, 3, 3]][i % 3]),)


@case("replay", args=labelled, calls=14)
def mean_of_each_class_that_occurs(w):
    w.t = t = Trainer(lr=0.01)

    def step(y):
        out = t.model(X)
        classes, inverse, counts = torch.unique(y, return_inverse=True, return_counts=True)
        members = F.one_hot(inverse, len(classes)).float()
        centers = members.T @ out / counts[:, None]
        loss = (out - centers[inverse]).pow(2).mean()
        t.opt.zero_grad()
        loss.backward()
        t.opt.step()
        return loss.detach(), classes, centers.detach()

    return step


@case("replay", args=labelled, calls=14, backend="c")
def as_often_as_labels_say(w):
    w.t = t = Trainer(lr=0.01)

    def step(y):
        rows = t.model(X.repeat_interleave(y, 0))
        loss = (rows * torch.bincount(y, minlength=3)[:3]).sum() + F.one_hot(y).sum()
        t.opt.zero_grad()
        loss.backward()
        t.opt.step()
        runs, lengths = torch.unique_consecutive(y, return_counts=True)
        return loss.detach(), runs, lengths, y.bincount(rows.detach().new_ones(5))

    return step


@case("replay", args=lambda i: ((X * (1 + i % 2)).round(),), calls=10)
def distinct_values_that_are_computed(w):
    def step(x):
        return (x.abs() + 1).unique(dim=1, return_counts=True), x.unique().numel()

    return step


@case("rerun", args=lambda i: (X[: 2 + i % 3],), calls=9)
def nothing_selected(w):
    def step(x):
        print("empty")
        return x[x > 100], torch.nonzero(x > 100), x[x < 100].sum()

    return step


def spiked(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch that overflows at times."""
    return X * (float("inf") if i in (2, 6) else 1.0), Y


@case("replay with cuts", args=lambda i: (i,), calls=9)
def number_beside_a_literal_that_varies(w):
    """The literal becomes a runtime scalar, which is none of those that the step has."""
    w.t = t = Trainer()
    w.best = 1e9

    def step(i):
        loss = t.loss(torch.full((5, 4), 0.1 * (i + 1)), Y)
        t.opt.zero_grad()
        loss.backward()
        t.opt.step()
        if loss.item() < w.best:
            w.best = float(loss.item())
        return loss.item(), w.best

    return step


@case("replay with cuts", args=spiked, calls=9)
def scaled_gradients(w):
    w.t = t = Trainer()
    w.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    def step(x, y):
        t.opt.zero_grad()
        loss = t.loss(x, y)
        scaler.scale(loss).backward()
        scaler.unscale_(t.opt)
        nn.utils.clip_grad_norm_(t.model.parameters(), 1.0)
        scaler.step(t.opt)
        scaler.update()
        return loss.detach()

    return step


@case("replay", args=lambda i: (X, float(i % 2)), calls=8)
def truth_of_numbers(w):
    def step(x, gain):
        if gain and x.sum().item():
            x = x * gain
        return x if not x.max().item() else x + 1

    return step


@case("rerun", args=batches)
def printed_every_time(w):
    w.t = t = Trainer()

    def step(x, y):
        t.opt.zero_grad()
        loss = t.loss(x, y)
        print(f"loss {loss.item():.3f}")
        loss.backward()
        t.opt.step()
        return loss.detach()

    return step


@case("rerun", args=batches, calls=8)
def choice_in_numpy(w):
    def step(x, y):
        order = x.sum(1).numpy().argsort()
        return x * float(order[0] + 1)

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(6)
def test_values(name):
    check(CASES[name], rel=2e-5)


# ---- what is particular about them


def test_an_array_of_the_step_cannot_be_written_to():
    def step(x):
        x.mul(2).numpy()[0] = 1.0

    with pytest.raises(ValueError, match="read-only"):
        tracejit.compile(step)(torch.ones(3))


@pytest.mark.parametrize(
    "step, error",
    [
        (lambda x: x.item(), "3 elements cannot be converted to Scalar"),
        (lambda x: bool(x), "more than one value is ambiguous"),
        (lambda x: bool(x[:0]), "no values is ambiguous"),
        (lambda x: (x * torch.nn.Parameter(x)).numpy(), "requires grad"),
    ],
)
def test_what_eager_rejects(step, error):
    for run in (step, tracejit.compile(step, backend="numpy")):
        with pytest.raises(RuntimeError, match=error):
            run(torch.ones(3))


def test_an_exception_after_a_value_leaves_everything_as_it_was():
    w = torch.ones(3, requires_grad=True)
    opt = torch.optim.SGD([w], lr=0.1)

    def step(x, limit):
        opt.zero_grad()
        loss = (w * x).sum()
        loss.backward()
        opt.step()
        if loss > limit:
            raise KeyError("too large")
        return loss.item()

    compiled = tracejit.compile(step, backend="numpy")
    for i in range(6):
        before = w.detach().clone(), copy.copy(w.grad)
        limit = 1e9 if i % 3 else -1e9
        if limit > 0:
            assert compiled(torch.ones(3), limit) == pytest.approx(before[0].sum().item(), rel=1e-5)
        else:
            with pytest.raises(KeyError, match="too large"):
                compiled(torch.ones(3), limit)
            assert torch.equal(w, before[0])
    assert compiled.stats.replays > 0


def test_one_plan_for_a_value_that_is_returned():
    w = torch.ones(3, requires_grad=True)
    compiled = tracejit.compile(lambda x: F.mse_loss(w * x, x).item(), backend="numpy")
    for _ in range(5):
        compiled(torch.rand(3))
    assert compiled.stats.compiles == 1 and compiled.stats.replays > 0


def test_what_ran_is_shown():
    w = torch.ones(3, requires_grad=True)

    def step(x):
        loss = (w * x).sum()
        w.grad = None
        (loss * 2 if loss > 0 else loss).backward()
        return loss.detach(), loss.item()

    compiled = tracejit.compile(step, backend="numpy")
    for i in range(8):
        compiled(torch.ones(3) * (-1) ** i)
    assert (compiled.stats.cuts, compiled.stats.branches) == (2, 2)
    assert compiled.explain_mode() == (
        "replay: 2 plan(s) armed; values read: 1 before the rest, 1 after it; "
        "branches that values decide: 2"
    )
    first, rest = compiled.segments
    assert len(first.results) == 2 and len(rest.results) == 1  # the decision, the loss; the .grad
    assert len(compiled.kernels) == len(first.launches) + len(rest.launches)


def test_what_a_stage_has_computed_is_forgotten_when_the_call_fails():
    """Python raises on a value that it has read; then the same tensor holds another one."""

    def step(x):
        return x * 2 if math.sqrt(x.sum().item()) > 1 else x * 3

    x = torch.ones(3)
    compiled = tracejit.compile(step, backend="numpy")
    for _ in range(4):
        compiled(x)
    assert compiled.stats.replays
    x.fill_(-1)
    with pytest.raises(ValueError):
        compiled(x)
    x.fill_(2)
    assert torch.equal(compiled(x), x * 2)


def test_branches_share_what_they_begin_with(monkeypatch):
    made = []
    first = tracejit.pipeline.Pipeline.build

    def build(self, graph, *args, **kwargs):
        made.append(str(graph))
        return first(self, graph, *args, **kwargs)

    monkeypatch.setattr(tracejit.pipeline.Pipeline, "build", build)
    w = torch.ones(3, requires_grad=True)

    def step(x):
        y = (w * x).exp()
        w.grad = None
        loss = y.sum()
        if loss > 4:
            loss = (y * y).sum()
        loss.backward()
        return loss.detach()

    compiled = tracejit.compile(step, backend="numpy")
    for i in range(10):
        compiled(torch.ones(3) * (-1) ** i)
    assert compiled.stats.replays > 4
    stages = {id(stage) for replay in compiled._replays for stage in replay.stages}
    assert len(stages) == 1
    assert len([text for text in made if text.startswith("value(")]) <= 3


@pytest.mark.parametrize("k", [5, -6])
def test_a_place_out_of_bounds_raises_as_in_eager(k):
    step = tracejit.compile(lambda k: X[k] * 2, backend="numpy")
    for i in range(5):
        assert torch.equal(step(torch.tensor(i)), X[i] * 2)
    assert step.stats.replays
    with pytest.raises(IndexError, match="out of bounds"):
        step(torch.tensor(k))
