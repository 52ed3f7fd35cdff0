"""Optimizers inside the step: every one of torch.optim, against eager over 50 calls."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch

import tracejit
from support.optimizer_checks import (
    FOREACH,
    OPTIMIZERS,
    Training,
    lockstep,
    loss_of,
    training,
    update_of,
    weights,
)
from support.oracle import call, captured_of

TABLE = [
    pytest.param(name, options, plans, foreach, id=f"{name}{i}-{foreach}")
    for name, rows in OPTIMIZERS.items()
    for i, (options, plans) in enumerate(rows)
    for foreach in FOREACH
    if i == 0 or foreach is not None  # which is False on the CPU
]


@pytest.mark.parametrize(("name", "options", "plans", "foreach"), TABLE)
@pytest.mark.sweep(5)
def test_fifty_steps(name, options, plans, foreach):
    """The Python runs on every call; where `foreach` is left open, it is replayed."""
    make = training(lambda p: getattr(torch.optim, name)(p, foreach=foreach, **options))
    step = lockstep(make, compiles=plans, mode="auto" if foreach is None else "rerun")
    assert foreach is not None or step.stats.replays >= 40, step.explain_mode()


@pytest.mark.parametrize(
    ("name", "options", "plans"),
    [
        ("SGD", {"lr": 0.1}, 1),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "maximize": True}, 2),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, 2),
        ("Adam", {"weight_decay": 0.1, "maximize": True}, 2),
        ("Adam", {"amsgrad": True}, 2),
        ("AdamW", {"lr": torch.tensor(0.01)}, 2),
        ("Adagrad", {"lr_decay": 0.01, "weight_decay": 0.1}, 1),
    ],
)
def test_fused(name, options, plans):
    make = training(lambda p: getattr(torch.optim, name)(p, fused=True, **options))
    lockstep(make, compiles=plans, calls=20)


def test_capturable_is_for_gpus_as_in_eager():
    """On the CPU eager refuses it; the compiled step raises the same."""
    make = training(lambda p: torch.optim.Adam(p, capturable=True))
    eager, ours = make(torch.float32), make(torch.float32)
    with pytest.raises(AssertionError, match="capturable") as theirs:
        eager.step()
    with pytest.raises(AssertionError, match="capturable") as mine:
        tracejit.compile(ours.step)()
    assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_the_c_backend(name):
    make = training(lambda p: getattr(torch.optim, name)(p, lr=0.01, foreach=True))
    lockstep(make, compiles=2, calls=20, backend="c")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    """Parameters of another dtype; the step counters stay float32."""

    def make(precision: torch.dtype) -> Training:
        precision = dtype if precision is torch.float32 else precision
        return training(lambda p: torch.optim.Adam(p, lr=0.01, foreach=True))(precision)

    lockstep(make, compiles=2, calls=10)


# ---- what happens to gradients around the update


def clipped(clip: Callable, *, lr: float = 0.1) -> Callable:
    """A training whose gradients are clipped: `clip(parameters)` returns a tensor or None."""

    def make(dtype: torch.dtype) -> Training:
        w, v, x, y = weights(dtype)
        optimizer = torch.optim.SGD([w, v], lr=lr, momentum=0.9, nesterov=True, foreach=True)

        def step():
            optimizer.zero_grad()
            loss = loss_of(w, v, x, y)
            loss.backward()
            norm = clip([w, v])
            optimizer.step()
            return loss.detach(), norm

        return Training(step, [w, v], [optimizer])

    return make


@pytest.mark.parametrize("foreach", FOREACH)
@pytest.mark.parametrize("kind", [2.0, 1.0, float("inf"), 3.0])
@pytest.mark.parametrize("limit", [0.05, 100.0])
@pytest.mark.sweep(2)
def test_clip_grad_norm(limit, kind, foreach):
    clip = torch.nn.utils.clip_grad_norm_
    lockstep(clipped(lambda p: clip(p, limit, kind, foreach=foreach)), compiles=2, calls=5)


@pytest.mark.parametrize("foreach", FOREACH)
def test_clip_grad_value(foreach):
    clip = torch.nn.utils.clip_grad_value_
    lockstep(clipped(lambda p: clip(p, 0.02, foreach=foreach)), compiles=2, calls=5)


def test_clipping_in_two_parts():
    def clip(parameters):
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        torch.nn.utils.clip_grads_with_norm_(parameters, 0.05, norm)
        return norm

    lockstep(clipped(clip), compiles=2, calls=5)


def test_a_limit_that_changes():
    w, v, x, y = weights(torch.float32)

    def step(limit):
        w.grad = v.grad = None
        loss_of(w, v, x, y).backward()
        return torch.nn.utils.clip_grad_norm_([w, v], limit)

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    for limit in (0.1, 0.2, 0.05):
        compiled(limit)
        total = torch.stack([w.grad.norm(), v.grad.norm()]).norm()
        torch.testing.assert_close(total, torch.tensor(limit), rtol=1e-4, atol=0)
    assert compiled.stats.compiles == 1


def accumulated(micro: int, every: int, *, set_to_none: bool) -> Callable:
    """Gradients of `micro` batches a call are added up over `every` calls before an update."""

    def make(dtype: torch.dtype) -> Training:
        w, v, x, y = weights(dtype)
        optimizer = torch.optim.Adam([w, v], lr=0.01, foreach=True)
        calls = iter(range(1000))

        def step():
            total = 0.0
            for k in range(micro):
                loss = loss_of(w, v, x * (1 + k), y) / micro
                loss.backward()
                total = total + loss.detach()
            if next(calls) % every == every - 1:
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
            return total

        return Training(step, [w, v], [optimizer])

    return make


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    ("micro", "every", "plans"),
    [(3, 1, 3), (1, 3, 5), (2, 2, 4)],  # .grad is None or set, state is new or not
)
def test_accumulation(micro, every, plans, set_to_none):
    lockstep(accumulated(micro, every, set_to_none=set_to_none), compiles=plans, calls=14)


def test_closure():
    """`optimizer.step(closure)`: the closure runs in the step, with gradients on."""

    def make(dtype: torch.dtype) -> Training:
        w, v, x, y = weights(dtype)
        optimizer = torch.optim.RMSprop([w, v])

        def closure():
            optimizer.zero_grad()
            loss = loss_of(w, v, x, y)
            loss.backward()
            return loss

        def step():
            return optimizer.step(closure).detach()

        return Training(step, [w, v], [optimizer])

    lockstep(make, compiles=2, calls=5)


# ---- the optimizer's life between the calls


def test_state_is_real_after_every_call():
    make = training(lambda p: torch.optim.Adam(p, lr=0.01))
    ours = make(torch.float32)
    compiled = tracejit.compile(ours.step, mode="rerun", backend="numpy")
    steps, versions = None, []
    for calls in range(1, 4):
        compiled()
        state = [ours.optimizers[0].state[p] for p in ours.parameters]
        for s in state:
            assert s.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(type(t) is torch.Tensor for t in s.values())
            assert s["step"].item() == calls and s["step"].dtype is torch.float32
        if steps is not None:  # written in place, and autograd knows
            assert all(a is b["step"] for a, b in zip(steps, state, strict=True))
            assert [s["step"]._version for s in state] == [v + 1 for v in versions]
        steps, versions = [s["step"] for s in state], [s["step"]._version for s in state]


@pytest.mark.parametrize("name", ["Adam", "SGD", "ASGD", "NAdam"])
def test_saving_and_loading_between_calls(name):
    """A run that is saved and loaded goes on as if nothing had happened, on the same plans."""
    options = {"lr": 0.01, "foreach": True} | ({"momentum": 0.9} if name == "SGD" else {})
    make = training(lambda p: getattr(torch.optim, name)(p, **options))
    straight, resumed = make(torch.float32), make(torch.float32)
    one, two = (tracejit.compile(t.step, backend="numpy") for t in (straight, resumed))
    for k in range(8):
        one()
        two()
        if k == 4:
            file = io.BytesIO()
            torch.save([resumed.parameters, resumed.optimizers[0].state_dict()], file)
            for _ in range(2):
                two()
            file.seek(0)
            parameters, state = torch.load(file)
            with torch.no_grad():
                for p, saved in zip(resumed.parameters, parameters, strict=True):
                    p.copy_(saved)
            resumed.optimizers[0].load_state_dict(state)
    assert two.stats.compiles == one.stats.compiles
    for a, b in zip(straight.parameters, resumed.parameters, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(straight.state(), resumed.state(), strict=True):
        assert torch.equal(a, b)


def test_a_counter_edited_outside_is_noticed():
    """Adam's bias correction follows the counter in memory."""
    make = training(lambda p: torch.optim.Adam(p, lr=0.01))
    eager, ours = make(torch.float32), make(torch.float32)
    compiled = tracejit.compile(ours.step, backend="numpy")
    for k in range(6):
        eager.step()
        compiled()
        if k == 3:
            for t in (eager, ours):
                for p in t.parameters:
                    t.optimizers[0].state[p]["step"].fill_(100.0)
    assert compiled.stats.compiles == 2
    for a, b in zip(eager.parameters, ours.parameters, strict=True):
        torch.testing.assert_close(a, b)
    assert [t.item() for t in ours.state() if not t.shape] == [102.0, 102.0]


def test_a_new_group_in_the_middle():
    def make(dtype: torch.dtype) -> Training:
        w, v, x, y = weights(dtype)
        optimizer = torch.optim.AdamW([w], lr=0.01)

        def between(call: int) -> None:
            if call == 5:
                optimizer.add_param_group({"params": [v], "lr": 0.1, "amsgrad": True})

        return Training(update_of(optimizer, w, v, x, y), [w, v], [optimizer], [], between)

    lockstep(make, compiles=4, calls=10)


def test_two_optimizers_found_in_objects():
    """A trainer that keeps them in a dict and steps them in a method."""

    class Trainer:
        def __init__(self, dtype):
            self.w, self.v, self.x, self.y = weights(dtype)
            self.parts = {
                "w": torch.optim.Adam([self.w], lr=0.01),
                "v": [torch.optim.SGD([self.v], lr=0.1)],
            }

        def update(self):
            self.parts["w"].step()
            self.parts["v"][0].step()

        def step(self):
            self.w.grad = self.v.grad = None
            loss = loss_of(self.w, self.v, self.x, self.y)
            loss.backward()
            self.update()
            return loss.detach()

    def make(dtype: torch.dtype) -> Training:
        t = Trainer(dtype)
        adam, sgd = t.parts["w"], t.parts["v"][0]

        def between(call: int) -> None:
            for group in (*adam.param_groups, *sgd.param_groups):
                group["lr"] *= 0.9

        return Training(t.step, [t.w, t.v], [adam, sgd], [], between)

    lockstep(make, compiles=2, calls=10)


def test_a_step_without_gradients():
    w, v, x, y = weights(torch.float32)
    optimizer = torch.optim.Adam([w, v])
    compiled = tracejit.compile(lambda: optimizer.step(), mode="rerun", backend="numpy")
    compiled()
    assert not optimizer.state and w.grad is None


def test_hooks_of_the_optimizer_run():
    make = training(lambda p: torch.optim.SGD(p, lr=0.1))
    ours = make(torch.float32)
    seen = []
    ours.optimizers[0].register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    ours.optimizers[0].register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    compiled = tracejit.compile(ours.step, mode="rerun", backend="numpy")
    compiled()
    compiled()
    assert seen == ["before", "after"] * 2


# ---- on a GPU: what is captured can be checked without one


def on_device(device: str, name: str, options: dict) -> Callable:
    """Eight updates of a parameter that the step itself makes."""

    def step():
        w = torch.full((5, 3), 0.3, device=device, requires_grad=True)
        optimizer = getattr(torch.optim, name)([w], **options)
        for k in range(8):
            optimizer.zero_grad()
            (w - 0.7 * (k + 1)).pow(2).sum().backward()
            torch.nn.utils.clip_grad_norm_([w], 1.0)
            optimizer.step()
        return w.detach(), optimizer.state[w].get("step")

    return step


def variants() -> list:
    found = []
    for name, rows in OPTIMIZERS.items():
        options = rows[0][0]
        ways = [{"foreach": True}, {"foreach": False}]
        if name not in ("SGD", "Adagrad", "Adafactor"):
            ways += [{**way, "capturable": True} for way in ways]
        if name in ("SGD", "Adam", "AdamW", "Adagrad"):
            ways.append({"fused": True})
        found += [pytest.param(name, options, way, id=f"{name}-{way}") for way in ways]
    return found


@pytest.mark.parametrize(("name", "options", "way"), variants())
@pytest.mark.sweep(3)
def test_counters_of_a_gpu_step_stay_on_the_host(name, options, way):
    """The plan has tensors of the GPU only; evaluated, it is what eager computes on the CPU."""
    captured = captured_of(on_device("cuda:0", name, options | way))
    values = [*(p.value for p in captured.graph.params), *(n.out for n in captured.graph.nodes)]
    assert {v.type.device for v in values} - {"host"} == {"cuda:0"}
    w, count = call(on_device("cuda:0", name, options | way))
    eager_w, eager_count = on_device("cpu", name, options)()
    torch.testing.assert_close(w, eager_w, rtol=1e-5, atol=1e-6)
    assert count is eager_count is None or count.item() == eager_count.item()


def test_a_cpu_number_in_a_gpu_step():
    """It is a runtime scalar, and is written back to its memory."""
    count, rate = torch.tensor(3.0), torch.tensor(0.5, dtype=torch.float64)

    def step():
        x = torch.ones(4, device="cuda:0")
        count.add_(1)
        x.mul_(count).add_(x, alpha=rate)
        return x, x.new_zeros(()).copy_(count), count.to("cuda:0") * 2, rate * 2

    captured = captured_of(step)
    assert captured.paths == (("item", 0), ("item", 1))
    assert {n.out.type.device for n in captured.graph.nodes} - {"host"} == {"cuda:0"}
    version = count._version
    x, copied, doubled, half = call(step)
    assert x.tolist() == [6.0] * 4 and copied.item() == 4.0 and doubled.item() == 8.0
    assert half.item() == 1.0 and half.dtype is torch.float64 and half.device.type == "cpu"
    assert count.item() == 4.0 and count._version == version + 1
