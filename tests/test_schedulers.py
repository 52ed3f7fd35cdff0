"""Learning rates that change: every torch.optim.lr_scheduler, stepped inside and outside the step.

One plan serves the whole schedule (two where the optimizer makes its state on the first call).
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

import tracejit
from support.optimizer_checks import Training, lockstep, loss_of, update_of, weights


def sgd(parameters: list, **options) -> torch.optim.Optimizer:
    """Two groups with hyperparameters of their own."""
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.05}]
    return torch.optim.SGD(groups, lr=0.1, **options)


def momentum(parameters: list) -> torch.optim.Optimizer:
    return sgd(parameters, momentum=0.9)


def adam(parameters: list) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, foreach=True)


def _sequential(optimizer):
    parts = [ConstantLR(optimizer, 0.1, 5), ExponentialLR(optimizer, 0.9)]
    return SequentialLR(optimizer, parts, milestones=[10])


def _chained(optimizer):
    return ChainedScheduler([ConstantLR(optimizer, 0.1, 5), ExponentialLR(optimizer, 0.9)])


SCHEDULERS: dict[type, tuple[Callable, Callable, int]] = {  # optimizer, scheduler, plans
    LambdaLR: (sgd, lambda o: LambdaLR(o, lambda epoch: 0.95**epoch), 1),
    MultiplicativeLR: (sgd, lambda o: MultiplicativeLR(o, lambda epoch: 0.9 + epoch / 1000), 1),
    StepLR: (sgd, lambda o: StepLR(o, 7, 0.5), 1),
    MultiStepLR: (sgd, lambda o: MultiStepLR(o, [3, 20, 21], 0.3), 1),
    ConstantLR: (sgd, lambda o: ConstantLR(o, 0.5, 9), 1),
    LinearLR: (sgd, lambda o: LinearLR(o, 0.1, 0.9, 30), 1),
    ExponentialLR: (adam, lambda o: ExponentialLR(o, 0.97), 2),
    SequentialLR: (sgd, _sequential, 1),
    PolynomialLR: (sgd, lambda o: PolynomialLR(o, 40, 2.0), 1),
    CosineAnnealingLR: (adam, lambda o: CosineAnnealingLR(o, 20, 1e-4), 2),
    ChainedScheduler: (sgd, _chained, 1),
    ReduceLROnPlateau: (sgd, lambda o: ReduceLROnPlateau(o, patience=2, factor=0.5), 1),
    CyclicLR: (momentum, lambda o: CyclicLR(o, 0.01, 0.1, 5, mode="triangular2"), 2),
    OneCycleLR: (adam, lambda o: OneCycleLR(o, 0.1, total_steps=60), 2),
    CosineAnnealingWarmRestarts: (sgd, lambda o: CosineAnnealingWarmRestarts(o, 8, 2), 1),
    SWALR: (sgd, lambda o: SWALR(o, 0.02, 10), 1),
}


def test_every_scheduler_is_in_the_table():
    known = {
        kind
        for module in (lr_scheduler, swa_utils)
        for name, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, LRScheduler) and kind is not LRScheduler and not name.startswith("_")
    }
    assert known == SCHEDULERS.keys()


def scheduled(kind: type, *, inside: bool, first: bool = False, alias: bool = False) -> Callable:
    """A training whose scheduler is stepped in the step (first or last), or between the calls.

    `alias`: by a bound method that was made before, which no patch of the class reaches.
    """
    make_optimizer, make_scheduler, _ = SCHEDULERS[kind]

    def make(dtype: torch.dtype) -> Training:
        w, v, x, y = weights(dtype)
        optimizer = make_optimizer([w, v])
        scheduler = make_scheduler(optimizer)
        metrics = iter([*range(50, 25, -1), *[26.0] * 25])

        def watch():
            scheduler.step(next(metrics))

        def plain():
            scheduler.step()

        update = update_of(optimizer, w, v, x, y)
        advance = watch if kind is ReduceLROnPlateau else scheduler.step if alias else plain

        def step():
            if inside and first:
                advance()
            loss = update()
            if inside and not first:
                advance()
            return loss

        def between(call: int) -> None:
            if not inside and call:
                advance()

        return Training(step, [w, v], [optimizer], [scheduler], between)

    return make


@pytest.mark.parametrize("place", ["inside", "inside, first", "by another name", "outside"])
@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
@pytest.mark.sweep(3)
def test_schedule(kind, place):
    first, alias = place == "inside, first", place == "by another name"
    make = scheduled(kind, inside=place != "outside", first=first, alias=alias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a scheduler that is stepped first
        warnings.simplefilter("ignore", FutureWarning)
        mode = "auto" if place == "outside" else "rerun"
        calls = 20 if first or alias else 50
        lockstep(make, compiles=SCHEDULERS[kind][2], calls=calls, mode=mode)


@pytest.mark.parametrize(
    "kind", [k for k in SCHEDULERS if k is not ReduceLROnPlateau], ids=lambda kind: kind.__name__
)  # ReduceLROnPlateau is given a value: test_plateaus.py
@pytest.mark.sweep(0.34)
def test_a_schedule_in_the_step_is_replayed(kind):
    """Betas that a scheduler cycles are a tuple that is another one in each call."""
    make = scheduled(kind, inside=True)
    ours, eager = make(torch.float32), make(torch.float32)
    step = tracejit.compile(ours.step)
    for _ in range(8):
        torch.testing.assert_close(step(), eager.step())
    numbers = [
        [{k: v for k, v in g.items() if k != "params"} for g in t.optimizers[0].param_groups]
        for t in (ours, eager)
    ]
    assert numbers[0] == numbers[1]
    assert step.stats.replays >= 4, step.explain_mode()


# ---- a learning rate that is a tensor


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("make_scheduler", "foreach"),
    [
        (lambda o: ExponentialLR(o, 0.9), False),
        (lambda o: CosineAnnealingLR(o, 20), False),
        (lambda o: CosineAnnealingLR(o, 20), True),
        (lambda o: LambdaLR(o, lambda epoch: 0.95**epoch), None),
    ],
)
@pytest.mark.sweep(2)
def test_schedule_of_a_tensor(make_scheduler, foreach, inside):
    def make(dtype: torch.dtype) -> Training:
        w, v, x, y = weights(dtype)
        optimizer = torch.optim.SGD([w, v], lr=torch.tensor(0.1), momentum=0.9, foreach=foreach)
        scheduler = make_scheduler(optimizer)
        update = update_of(optimizer, w, v, x, y)

        def step():
            loss = update()
            if inside:
                scheduler.step()
            return loss

        def between(call: int) -> None:
            if not inside and call:
                scheduler.step()

        return Training(step, [w, v], [optimizer], [scheduler], between)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lockstep(make, compiles=2, calls=20)


# ---- hyperparameters edited by hand


def edited(edit: Callable, *, inside: bool, make_optimizer: Callable = adam) -> Callable:
    """A training whose param_groups change: `edit(groups, call)`, in the step or outside."""

    def make(dtype: torch.dtype) -> Training:
        w, v, x, y = weights(dtype)
        optimizer = make_optimizer([w, v])
        calls = iter(range(1000))
        update = update_of(optimizer, w, v, x, y)

        def step():
            if inside:
                edit(optimizer.param_groups, next(calls))
            return update()

        def between(call: int) -> None:
            if not inside:
                edit(optimizer.param_groups, call)

        return Training(step, [w, v], [optimizer], [], between)

    return make


def decay(groups: list[dict], call: int) -> None:
    for group in groups:
        group["lr"] *= 0.95


def computed(groups: list[dict], call: int) -> None:
    for group in groups:
        group["lr"] = 0.1 / (1 + call)
        group["betas"] = 0.9 - call / 1000, 0.99


def replaced(groups: list[dict], call: int) -> None:
    groups[0].update(eps=1e-8 * (1 + call), weight_decay=0.001 * (1 + call))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("edit", [decay, computed, replaced])
def test_edited_groups(edit, inside):
    lockstep(edited(edit, inside=inside), compiles=2, calls=20)


def test_an_edit_that_decides_is_another_plan():
    """Without weight decay the optimizer runs other code."""

    def switch(groups: list[dict], call: int) -> None:
        groups[0]["weight_decay"] = 0.1 if call >= 5 else 0.0

    lockstep(edited(switch, inside=False, make_optimizer=sgd), compiles=2, calls=10)


def test_rates_as_floats_in_the_step():
    """What the step sees in param_groups has the true value, and computes like a float."""
    w, v, x, y = weights(torch.float32)
    optimizer = sgd([w, v])
    scheduler = StepLR(optimizer, 2, 0.5)
    seen = []

    def step():
        lr = optimizer.param_groups[0]["lr"]
        (loss_of(w, v, x, y) * lr).backward()
        optimizer.step()
        scheduler.step()
        seen.append((lr, scheduler.get_last_lr()[0], f"{lr:.4f}"))
        return optimizer.param_groups[1]["lr"], 2 * lr

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    returned = [compiled() for _ in range(4)]
    assert [type(x) for pair in returned for x in pair] == [float] * 8
    assert returned == [(0.05, 0.2), (0.025, 0.2), (0.025, 0.1), (0.0125, 0.1)]
    assert seen == [(0.1, 0.1, "0.1000"), (0.1, 0.05, "0.1000"), (0.05, 0.05, "0.0500")] + [
        (0.05, 0.025, "0.0500")
    ]
    assert compiled.stats.compiles == 2  # the first makes .grad, the others add to it


# ---- failures


def test_a_failed_call_changes_nothing():
    w, v, x, y = weights(torch.float32)
    optimizer = adam([w, v])
    scheduler = ChainedScheduler([ExponentialLR(optimizer, 0.9), StepLR(optimizer, 1)])
    fail = [True]

    def step():
        loss = loss_of(w, v, x, y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.param_groups[0]["eps"] *= 2
        optimizer.add_param_group({"params": [torch.zeros(2)]})
        if fail[0]:
            loss.data_ptr()

    before = optimizer.state_dict(), scheduler.state_dict(), w.detach().clone()
    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    for _ in range(2):
        with pytest.raises(tracejit.errors.TracejitError, match=r"data_ptr"):
            compiled()
        after = optimizer.state_dict(), scheduler.state_dict(), w.detach()
        assert after[:2] == before[:2] and torch.equal(after[2], before[2])
        assert w.grad is None and not optimizer.state
    fail[0] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        compiled()
    assert len(optimizer.param_groups) == 2 and len(optimizer.state) == 2


def test_a_plan_that_cannot_be_built_changes_nothing():
    """The trace is over and fine, but there is no Triton for the CPU."""
    make = scheduled(ExponentialLR, inside=True)
    ours = make(torch.float32)
    before = ours.numbers()
    for _ in range(2):
        with pytest.raises(tracejit.errors.BackendUnavailable):
            tracejit.compile(ours.step, backend="triton")()
        assert ours.numbers() == before and not ours.optimizers[0].state


# ---- numbers that Python computes by itself


def by_hand(rate: Callable[[int], float]) -> Callable:
    """Adam as people write it: a counter of Python, and `math` on it."""

    def make(dtype: torch.dtype) -> Training:
        w, v, x, y = weights(dtype)
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (w, v)]
        count = 0

        def step():
            nonlocal count
            count += 1
            w.grad = v.grad = None
            loss = loss_of(w, v, x, y)
            loss.backward()
            with torch.no_grad():
                for p, (first, second) in zip((w, v), moments, strict=True):
                    first.mul_(0.9).add_(p.grad, alpha=0.1)
                    second.mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                    size = rate(count) * math.sqrt(1 - 0.99**count) / (1 - 0.9**count)
                    p.addcdiv_(first, second.sqrt().add_(1e-8), value=-size)
            return loss.detach()

        return Training(step, [w, v, *(m for pair in moments for m in pair)], [])

    return make


def test_a_counter_of_python_makes_few_plans():
    """Three with the value in them; then one that takes it as a runtime scalar."""
    step = lockstep(by_hand(lambda count: 0.1 * 0.9**count), compiles=4, calls=12)
    assert step.stats.compiles == 4


def test_two_values_are_two_plans():
    x = torch.ones(3)
    compiled = tracejit.compile(lambda n: x * (0.5 * n), mode="rerun", backend="numpy")
    found = [compiled(n).tolist()[0] for n in (1, 2, 1, 2, 3, 3, 4, 5, 4, 1)]
    assert found == [0.5, 1.0, 0.5, 1.0, 1.5, 1.5, 2.0, 2.5, 2.0, 0.5]
    assert compiled.stats.compiles == 4
    assert compiled.plans[0].scalars == () and len(compiled.plans[-2].scalars) == 1


def test_literals_that_stay_the_same_stay_literals():
    x = torch.ones(3)
    compiled = tracejit.compile(
        lambda n: (x * 0.25 + 0.5 * n).clamp(min=-0.0) * 2.0, mode="rerun", backend="numpy"
    )
    assert [compiled(n).tolist()[0] for n in range(6)] == [0.5 + n for n in range(6)]
    assert compiled.stats.compiles == 4
    assert [len(plan.scalars) for plan in compiled.plans] == [0, 0, 0, 1]


# ---- where optimizers are looked for


def reads_rate(optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    return x * optimizer.param_groups[0]["lr"]


class Owner:
    def __init__(self, optimizer, x):
        self.parts, self.x = {"optimizers": [optimizer]}, x

    def step(self):
        return reads_rate(self.parts["optimizers"][0], self.x)


def _in_globals(optimizer, x):
    namespace = {"optimizer": optimizer, "x": x, "reads_rate": reads_rate}
    exec("def helper(): return reads_rate(optimizer, x)\ndef step(): return helper()", namespace)
    return namespace["step"]


REACHED: dict[str, Callable] = {
    "closure": lambda o, x: lambda: reads_rate(o, x),
    "closure of a function": lambda o, x: (lambda f: lambda: f())(lambda: reads_rate(o, x)),
    "partial": lambda o, x: (lambda f: lambda: f())(partial(reads_rate, o, x)),
    "default": lambda o, x: lambda o=o: reads_rate(o, x),
    "globals of a function": _in_globals,
    "method": lambda o, x: Owner(o, x).step,
    "attribute of a scheduler": lambda o, x: (lambda s: lambda: reads_rate(s.optimizer, x))(
        StepLR(o, 1)
    ),
}


@pytest.mark.parametrize("how", REACHED)
def test_rates_are_scalars_wherever_the_optimizer_is(how):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    compiled = tracejit.compile(
        REACHED[how](optimizer, torch.ones(2)), mode="rerun", backend="numpy"
    )
    for rate in (0.5, 0.25):
        optimizer.param_groups[0]["lr"] = rate
        assert compiled().tolist() == [rate, rate]
        assert optimizer.param_groups[0]["lr"] is rate
    assert compiled.stats.compiles == 1


@pytest.mark.parametrize("key", ["weight_decay", "lr"])
def test_a_hyperparameter_set_before_the_scheduler_steps_is_set_by_every_call(key):
    def world() -> tuple:
        w = torch.ones(3, requires_grad=True)
        opt = torch.optim.SGD([w], lr=0.01)
        schedule = StepLR(opt, 1)

        def step(x: torch.Tensor, number: float) -> None:
            opt.zero_grad()
            (w * x).square().sum().backward()
            opt.param_groups[0][key] = number
            opt.step()
            schedule.step()

        return w, opt, step

    (w, opt, step), (v, right, eager) = world(), world()
    compiled = tracejit.compile(step)
    for i in range(8):
        number = (i + 1) / 100
        compiled(torch.ones(3), number), eager(torch.ones(3), number)
        torch.testing.assert_close(w, v)
        assert opt.param_groups[0][key] == right.param_groups[0][key]
    if key == "lr":  # which the scheduler reads
        assert "after it has set a hyperparameter" in compiled.explain_mode()
    else:
        assert compiled.stats.replays >= 4, compiled.explain_mode()


@pytest.mark.parametrize("reads", [False, True])
def test_a_lambda_beside_a_counter(reads):
    """What is accumulated over two calls has a counter, which a rate's own function may read."""

    def made(wrap):
        torch.manual_seed(0)
        net, seen, warm = torch.nn.Linear(3, 2), {"calls": 0}, 4
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        plain = lambda n: min(1.0, (n + 1) / warm) * math.cos(n / 50)  # noqa: E731
        own = lambda n: 0.9 ** seen["calls"]  # noqa: E731
        scheduler = LambdaLR(optimizer, own if reads else plain)

        @wrap
        def step(x):
            loss = net(x).square().mean()
            loss.backward()
            seen["calls"] += 1
            if seen["calls"] % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            return loss

        return step, optimizer, net

    ours, eager = made(tracejit.compile), made(lambda f: f)
    for i in range(14):
        x = torch.full((4, 3), 0.1 * i)
        assert torch.allclose(ours[0](x), eager[0](x))
        assert ours[1].param_groups[0]["lr"] == eager[1].param_groups[0]["lr"]
    assert torch.allclose(ours[2].weight, eager[2].weight)
    assert (ours[0].stats.replays >= 8) is not reads
