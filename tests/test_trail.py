"""Traces that go as earlier ones went: what is compared, where they leave, what they let go of."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

import tracejit
from support.verified import VERIFYING
from support.worlds import picture, same
from tracejit.errors import TracejitError
from tracejit.runtime.memory import OutputMemory

CALLS = 8


def parameters(seed: int = 0) -> SimpleNamespace:
    torch.manual_seed(seed)
    return SimpleNamespace(
        w=torch.randn(4, 3, requires_grad=True),
        x=torch.randn(5, 4),
        count=torch.tensor(0.0),
        rate=0.1,
        flag=False,
        kept=[],
        last=None,
    )


def trained(s: SimpleNamespace, h: torch.Tensor) -> torch.Tensor:
    loss = h.pow(2).sum()
    loss.backward()
    with torch.no_grad():
        s.w -= 0.01 * s.w.grad
        s.w.grad = None
    return loss


# (step, change before each call, how many of the calls stay on a known path to its end)

CASES: dict[str, tuple] = {}


def case(kept: int):
    def register(make):
        CASES[make.__name__] = make, kept
        return make

    return register


@case(7)
def the_same_again(s):
    return lambda: trained(s, torch.tanh(s.x @ s.w)), None


@case(6)
def a_branch_in_the_middle(s):
    def step():
        h = s.x @ s.w
        g = h.relu()
        if s.flag:
            g = g + h
        return trained(s, g * 2)

    return step, lambda i: setattr(s, "flag", i in (3, 4))  # 3 is new; 4 is known


@case(6)
def gradients_that_stay(s):
    def step():
        loss = (s.x @ s.w).sum()
        loss.backward()
        return loss

    return step, None  # the first finds None


@case(7)
def a_float_that_changes(s):
    def step(rate):
        return trained(s, (s.x @ s.w) * rate * 2)

    return step, lambda i: (0.1 * (i + 1),)


@case(6)
def a_decision_on_a_float(s):
    def step(rate):
        h = s.x @ s.w
        return trained(s, h if rate < 0.45 else h * 3)

    return step, lambda i: (0.1 * (i + 1),)


@case(7)
def a_number_of_a_tensor(s):
    def step():
        s.count += 1
        return trained(s, (s.x @ s.w) * (1 - 0.5 ** s.count.item()))

    return step, None


@case(6)
def a_decision_on_a_number(s):
    def step():
        s.count += 1
        h = s.x @ s.w
        if s.count.item() > 3:
            h = h + 1
        return trained(s, h)

    return step, None


@case(7)
def an_intermediate_is_kept(s):
    def step():
        s.last = torch.tanh(s.x @ s.w)
        return trained(s, s.last)

    return step, None


@case(6)
def an_intermediate_is_kept_sometimes(s):
    def step():
        h = torch.tanh(s.x @ s.w)
        if s.flag:
            s.last = h
        return trained(s, h)

    return step, lambda i: setattr(s, "flag", i in (3, 4, 5))


@case(6)
def what_it_returns_changes(s):
    def step():
        h = torch.tanh(s.x @ s.w)
        loss = trained(s, h)
        return {"loss": loss, "h": h.detach()} if s.flag else [loss]

    return step, lambda i: setattr(s, "flag", i > 3)


@case(7)
def a_number_returned_changes(s):
    def step():
        s.kept.append(1)
        return trained(s, s.x @ s.w), len(s.kept), None

    return step, None


@case(6)
def other_strides(s):
    def change(i):
        if i == 3:
            s.x = torch.randn(4, 5).t()

    return lambda: trained(s, s.x @ s.w), change


@case(6)
def another_dtype(s):
    def change(i):
        if i == 3:
            s.x = torch.arange(20).reshape(5, 4)

    return lambda: trained(s, s.x.float() @ s.w), change


@case(6)
def memory_is_shared(s):
    s.y = torch.randn(5, 4)

    def step():
        s.x.mul_(0.5)
        return trained(s, (s.x + s.y) @ s.w)

    def change(i):
        if i == 3:
            s.y = s.x.view(5, 4)

    return step, change


@case(6)
def one_object_instead_of_two(s):
    s.y = torch.randn(5, 4)

    def change(i):
        if i == 3:
            s.y = s.x

    return lambda: trained(s, (s.x.clone().add_(1) + s.y) @ s.w), change


@case(6)
def no_gradient_wanted(s):
    s.v = torch.randn(3, requires_grad=True)

    def step():
        loss = ((s.x @ s.w) * s.v).sum()
        loss.backward()
        s.w.grad = None
        grad, s.v.grad = s.v.grad, None
        return loss, grad

    def change(i):
        if i == 3:
            s.v.requires_grad_(False)

    return step, change


@case(6)
def another_grad_mode(s):
    def step():
        with torch.set_grad_enabled(not s.flag):
            h = torch.tanh(s.x @ s.w)
        return h, h.requires_grad

    return step, lambda i: setattr(s, "flag", i in (3, 5))


@case(6)
def another_default_dtype(s):
    def step():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if s.flag else torch.float32)
        h = torch.ones(3) + 1
        torch.set_default_dtype(before)
        return h, trained(s, s.x @ s.w)

    return step, lambda i: setattr(s, "flag", i > 3)


@case(7)
def attributes_of_an_intermediate(s):
    def step():
        h = s.x @ s.w
        seen = hasattr(h, "mark")
        h.mark = [h]
        return trained(s, h), seen

    return step, None


@case(7)
def intermediates_as_keys(s):
    def step():
        h, g = s.x @ s.w, s.x.sum()
        found = {h: 1, g: 2}
        return trained(s, h * found[h] + found[g])

    return step, None


@case(7)
def several_results(s):
    s.y = torch.zeros(5, 2)

    def step():
        a, b = s.x.split(2, dim=1)
        values, indices = (s.x @ s.w).max(dim=0)
        rows = sum(row.sum() for row in s.x)
        torch.add(a, b, out=s.y)
        return trained(s, s.x @ s.w * values.detach()), indices, rows, tuple(a.shape)

    return step, None


@case(6)
def another_default_dtype_before_a_branch(s):
    def step():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        h = torch.ones(3) + 1
        torch.set_default_dtype(before)
        return h * 3 if s.flag else h * 2

    return step, lambda i: setattr(s, "flag", i == 3)


@case(6)
def a_decision_under_autocast(s):
    def step(rate):
        h = s.x @ s.w.detach()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            large = rate > 0.35
        return h * 2 if large else h

    return step, lambda i: (0.1 * (i + 1),)


@case(5)
def a_scheduler_with_a_rate_on_the_device(s):
    rate = torch.tensor(0.1)
    opt = torch.optim.SGD([s.w], lr=rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    opt.step()

    def step(factor):
        h = (s.x @ s.w) * 0.5 + 0.25
        factor = factor * 2
        if s.flag:
            schedule.step()
        return trained(s, h * factor) * (factor * 3), opt.param_groups[0]["lr"].clone()

    return step, lambda i: (setattr(s, "flag", i in (3, 5)), (0.1 * (i + 1),))[1]


@case(6)
def a_counter_that_reaches_zero(s):
    s.count, s.inverse = torch.tensor(4.0), torch.tensor(1.0)

    def step():
        s.inverse.item()
        s.count -= 1
        s.inverse.copy_(1 / s.count)
        return trained(s, s.x @ s.w)

    return step, None  # of 1 / 0 only the plan knows what it is


@case(6)
def a_counter_whose_root_is_taken(s):
    s.count, s.root = torch.tensor(3.0), torch.tensor(1.0)

    def step():
        s.root.item()
        s.count -= 1
        s.root.copy_(s.count.sqrt())
        return s.x * 2

    return step, None


@case(7)
def a_rate_that_is_stored_and_returned(s):
    opt = torch.optim.SGD([s.w], lr=0.1)

    def step():
        group = opt.param_groups[0]
        group["lr"] *= 0.9
        loss = (s.x @ s.w).pow(2).sum() * 0.01
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss, group["lr"], group["lr"]

    return step, None


@case(6)
def what_is_stored_beside_a_rate(s):
    opt = torch.optim.SGD([s.w], lr=0.1)

    def step():
        group = opt.param_groups[0]
        group["pair"] = group["lr"] * 2, s.last
        s.kept[:] = [group]
        return s.x * 2

    return step, lambda i: setattr(s, "last", [1, 1, 2, True, None, "a", 1, False][i])


@case(6)
def an_intermediate_is_returned_and_sometimes_kept(s):
    def step():
        h = torch.tanh(s.x @ s.w.detach())
        s.last = h if s.flag else None
        return h

    return step, lambda i: setattr(s, "flag", i % 2 == 1)


@case(7)
def an_intermediate_is_kept_and_an_alias_returned(s):
    def step():
        s.last = (s.x @ s.w).detach()
        return s.last.detach()

    return step, None


@case(7)
def another_optimizer(s):
    used = []

    def step():
        used[0].zero_grad()
        loss = (s.x @ s.w).pow(2).mean()
        loss.backward()
        used[0].step()
        return loss

    def change(i):
        used[:] = [torch.optim.SGD([s.w], lr=0.1 / (i + 1))]

    s.w.grad = torch.zeros(4, 3)
    return step, change


@case(6)
def a_mode_of_the_users(s):
    class Counted(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            s.rate += 1
            return func(*args, **(kwargs or {}))

    def step():
        with Counted():
            h = s.x @ s.w.detach()
            h = h + 1 if s.flag else h
        return h * 2

    return step, lambda i: setattr(s, "flag", i in (3, 5))


@case(6)
def an_intermediate_in_an_exception(s):
    def step():
        h = s.x @ s.w.detach()
        try:
            if s.flag:
                raise KeyError(h)
            return h * 2
        except KeyError as error:
            s.last = error.args[0]
            return h

    return step, lambda i: setattr(s, "flag", i in (2, 3, 5))


@case(0)
def a_new_literal_on_every_call(s):
    def step():
        s.kept.append(1)
        return trained(s, (s.x @ s.w) * len(s.kept))

    return step, None


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(0.17)
def test_calls_are_like_eager(name):
    make, kept = CASES[name]
    ours, eager = parameters(), parameters()
    torch.manual_seed(0)
    theirs, change_theirs = make(eager)
    torch.manual_seed(0)
    mine, change_mine = make(ours)
    step = tracejit.compile(mine, mode="rerun", backend="numpy")
    for i in range(CALLS):
        torch.manual_seed(i)
        args = (change_theirs or (lambda i: None))(i) or ()
        torch.manual_seed(i)
        assert ((change_mine or (lambda i: None))(i) or ()) == args
        expected, found = picture((theirs(*args), eager)), picture((step(*args), ours))
        same(found, expected, f"call {i}")
    recall = step._recall
    assert VERIFYING or (recall.kept, recall.kept + recall.left) == (kept, CALLS - 1)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_an_exception_on_a_known_path(at):
    s = parameters()

    def step(fail: bool) -> torch.Tensor:
        h = s.x @ s.w
        s.kept.append(h)
        if fail and at == 0:
            raise KeyError("mine")
        loss = h.pow(2).sum()
        loss.backward()
        if fail and at == 1:
            raise KeyError("mine")
        with torch.no_grad():
            s.w -= 0.1 * s.w.grad
        s.w.grad = None
        if fail and at == 2:
            torch.ones(3) @ torch.ones(4)
        if fail and at == 3:
            loss.unknown_attribute  # noqa: B018
        del s.kept[:]
        return loss

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    compiled(False)
    compiled(False)
    before = s.w.detach().clone()
    with pytest.raises((KeyError, TracejitError, RuntimeError, AttributeError)):
        compiled(True)
    assert torch.equal(s.w, before) and s.w.grad is None and s.kept == []
    ours = compiled(False)
    torch.testing.assert_close(ours.detach(), (s.x @ before).pow(2).sum())
    assert compiled._recall.kept >= 2


def test_autocast_makes_another_path():
    s = parameters()
    on, dtype, again = False, torch.bfloat16, True

    def step() -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=on):
            h = s.x @ s.w
            if again:
                torch.clear_autocast_cache()
            return (s.x @ s.w - h).detach(), h.detach()

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    for _ in range(2):  # learnt, and followed
        for on, dtype, again in (  # noqa: B007
            (False, torch.bfloat16, True),
            (True, torch.bfloat16, True),
            (True, torch.float16, True),
            (True, torch.float16, False),
        ):
            for ours, eager in zip(compiled(), step(), strict=True):
                assert ours.dtype is eager.dtype
                torch.testing.assert_close(ours, eager)
    assert compiled._recall.kept >= 4


def test_nothing_of_the_users_is_kept_alive():
    s = parameters()
    seen: list[weakref.ref] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(x @ s.w.detach())
        seen.append(weakref.ref(h))
        return h.sum()

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    given = []
    for _ in range(4):
        x = torch.randn(5, 4)
        given.append(weakref.ref(x))
        compiled(x)
        del x
    assert compiled._recall.kept == 3
    assert [r() for r in given[1:]] == [None] * 3  # at once, without the collector
    gc.collect()
    assert [r() for r in given + seen] == [None] * 8


def test_what_is_put_on_an_intermediate_is_not_kept_alive():
    seen: list[weakref.ref] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        h.made_of = x
        return h.sum()

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    for _ in range(4):
        x = torch.randn(3)
        seen.append(weakref.ref(x))
        compiled(x)
        del x
    gc.collect()
    assert compiled._recall.kept == 3
    assert [r() for r in seen] == [None] * 4


def test_models_and_optimizers_are_not_kept_alive():
    x = torch.randn(5, 4)
    seen: list[weakref.ref] = []

    def step(model: torch.nn.Module, opt: torch.optim.Optimizer) -> torch.Tensor:
        opt.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        opt.step()
        return loss.detach()

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    for _ in range(3):
        model = torch.nn.Linear(4, 3)
        opt = torch.optim.Adam(model.parameters(), lr=0.01)
        seen += [weakref.ref(model), weakref.ref(model.weight), weakref.ref(opt)]
        for _ in range(3):
            compiled(model, opt)
        del model, opt
    gc.collect()
    assert [r() for r in seen] == [None] * 9
    assert (compiled._recall.kept, compiled._recall.left) == (7, 1)  # the others go the same way


def test_each_number_of_selected_elements_is_a_way_of_its_own():
    compiled = tracejit.compile(lambda x: x[x > 0] * 2, mode="rerun", backend="numpy")
    for i in range(12):
        x = torch.arange(5.0) - i % 3
        assert torch.equal(compiled(x), x[x > 0] * 2)
    assert (compiled._recall.kept, compiled._recall.left) == (9, 2)


def test_an_intermediate_with_history_does_not_keep_the_step_alive():
    class Owner:
        def __init__(self):
            self.w = torch.ones(3, requires_grad=True)
            self.run = tracejit.compile(self.step, mode="rerun", backend="numpy")

        def step(self) -> torch.Tensor:
            self.hidden = torch.tanh(self.w)
            return self.hidden.sum()

    owner = Owner()
    for _ in range(3):
        owner.run()
    seen = weakref.ref(owner)
    del owner
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("mode", ["rerun", "auto"])
def test_an_alias_is_a_tensor_of_its_own(mode):
    def step(x: torch.Tensor) -> tuple:
        h = x * 2
        return h, h.detach(), h.view(3)

    compiled = tracejit.compile(step, mode=mode, backend="numpy")
    for _ in range(4):
        a, b, c = compiled(torch.ones(3))
        assert a is not b and a is not c and b is not c
        assert a.data_ptr() == b.data_ptr() == c.data_ptr()


def test_proxies_are_used_again_only_when_nobody_has_them():
    s = parameters()
    ids: list[int] = []
    held: list[object] = []

    def step() -> torch.Tensor:
        h = s.x @ s.w.detach()
        ids.append(id(h))
        if len(ids) == 4:
            held.append(lambda: h)  # a closure's variable
        return h.sum()

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    for _ in range(6):
        compiled()
    assert ids[1] == ids[2] == ids[3] != ids[4]
    torch.testing.assert_close(held[0](), s.x @ s.w.detach())


def test_steps_that_only_leave_are_not_compared_any_more():
    s = parameters()

    def step() -> torch.Tensor:
        s.kept.append(1)
        return (s.x * len(s.kept)).sum()

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    for _ in range(60):
        found = compiled()
        torch.testing.assert_close(found, (s.x * len(s.kept)).sum())
    assert not compiled._recall.useful and compiled._recall.left < 40


def test_the_tree_is_followed_again_once_calls_are_the_same():
    s = parameters()

    def step() -> torch.Tensor:
        s.kept.append(1)
        return (s.x * min(len(s.kept), 40)).sum()

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    for _ in range(400):
        found = compiled()
    torch.testing.assert_close(found, (s.x * 40).sum())
    assert compiled._recall.useful and compiled._recall.kept > 50


def test_an_index_out_of_range_is_told_where_it_was_used():
    index, branch = torch.tensor([0, 1]), False

    def step(x: torch.Tensor) -> torch.Tensor:
        chosen = x[index]
        return chosen + 1 if branch else chosen

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    compiled(torch.ones(3))
    index[0], branch = 9, True
    line = step.__code__.co_firstlineno + 1
    with pytest.raises(TracejitError, match=f"test_trail.py:{line}: index 9 is out of bounds"):
        compiled(torch.ones(3))


@pytest.mark.parametrize("stepping", [False, True])
def test_a_rate_that_every_call_sets_is_set_whatever_it_was(stepping):
    def world() -> tuple:
        w = torch.ones(3, requires_grad=True)
        opt = torch.optim.SGD([w], lr=0.05)

        def step(x: torch.Tensor) -> torch.Tensor:
            opt.param_groups[0]["lr"] = 0.05
            opt.zero_grad()
            loss = (x * w).sum()
            if stepping:
                loss.backward()
                opt.step()
            return loss.detach()

        return w, opt, step

    (w, opt, step), (v, other, eager) = world(), world()
    compiled = tracejit.compile(step, backend="numpy")
    for i in range(8):
        if i == 6:
            opt.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.3
        torch.testing.assert_close(compiled(torch.ones(3)), eager(torch.ones(3)))
        assert opt.param_groups[0]["lr"] == 0.05
        torch.testing.assert_close(w, v)


def test_a_step_goes_with_its_last_holder_without_the_collector():
    compiled = tracejit.compile(lambda x: x * 2 + 1, mode="rerun", backend="numpy")
    for _ in range(5):
        compiled(torch.ones(3))
    seen = weakref.ref(compiled._programs.kept[0].program), weakref.ref(compiled._recall)
    gc.collect()
    gc.disable()
    try:
        del compiled
        assert [r() for r in seen] == [None, None]
    finally:
        gc.enable()


def steps_with_a_large_gradient(kept: list[torch.Tensor]) -> tuple:
    torch.manual_seed(0)
    w, x = torch.randn(80, 60, requires_grad=True), torch.randn(5, 80)
    opt = torch.optim.SGD([w], lr=0.01)

    def step(keep: bool) -> torch.Tensor:
        if keep:
            kept.append(w.grad)
        opt.zero_grad()
        loss = (x @ w).pow(2).mean()
        loss.backward()
        opt.step()
        return loss.detach()

    return w, step


@pytest.mark.parametrize("backend", ["numpy", "c"])
def test_the_memory_of_a_gradient_that_is_dropped_is_used_for_the_next(backend):
    """numpy, which may fail in the middle of a plan, leaves the last one alone: two take turns."""
    w, step = steps_with_a_large_gradient([])
    compiled = tracejit.compile(step, mode="rerun", backend=backend)
    for _ in range(6):
        compiled(False)
    addresses = set()
    for _ in range(6):
        compiled(False)
        addresses.add(w.grad.data_ptr())
    assert len(addresses) == {"c": 1, "numpy": 2}[backend]


@pytest.mark.parametrize("inside", [False, True])
def test_a_gradient_that_somebody_holds_is_never_written_to(inside):
    """Held by the step's own Python, or by the caller alone."""
    found: list[torch.Tensor] = []
    right: list[torch.Tensor] = []
    w, step = steps_with_a_large_gradient(found if inside else [])
    v, eager = steps_with_a_large_gradient(right if inside else [])
    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    for i in range(20):
        keep = i in (5, 8, 9, 13, 14, 15)  # after an even and an odd number of others
        compiled(keep and inside), eager(keep and inside)
        if keep and not inside:
            found.append(w.grad)
            right.append(v.grad)
    assert compiled._recall.kept >= 8
    for ours, theirs in zip([*found, w], [*right, v], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_rerun_that_fails_before_its_plan_leaves_everything_as_it_was(monkeypatch):
    w = torch.ones(3, requires_grad=True)
    opt = torch.optim.Adam([w], lr=0.1)

    def step() -> torch.Tensor:
        opt.param_groups[0]["lr"] *= 0.5
        opt.zero_grad()
        loss = w.pow(2).sum()
        loss.backward()
        opt.step()
        return loss.detach()

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    for _ in range(4):
        compiled()
    rate, count = opt.param_groups[0]["lr"], opt.state[w]["step"].item()
    before, grad = w.detach().clone(), w.grad

    def full(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(OutputMemory, "take", full)
        with pytest.raises(MemoryError):
            compiled()
    assert (opt.param_groups[0]["lr"], opt.state[w]["step"].item()) == (rate, count)
    assert torch.equal(w, before) and w.grad is grad
    compiled()
    assert (opt.param_groups[0]["lr"], opt.state[w]["step"].item()) == (rate / 2, count + 1)


def test_a_step_that_runs_inside_itself_on_a_known_path():
    """A signal handler or a hook may call the step while it is traced: each has its own proxies."""
    x = torch.arange(3.0)
    again: list[bool] = []

    def step(scale: float) -> torch.Tensor:
        h = x * scale
        if again:
            again.clear()
            modes = []
            while torch._C._len_torch_function_stack():  # as if it came in the middle of a rule
                modes.append(_pop_mode())
            inner.append(compiled(10.0))
            while modes:
                _push_mode(modes.pop())
        return h + 1

    inner: list[torch.Tensor] = []
    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    for i in range(6):
        if i > 3:
            again.append(True)
        torch.testing.assert_close(compiled(float(i)), x * i + 1)
    assert [t.tolist() for t in inner] == [[1.0, 11.0, 21.0]] * 2


def test_a_weight_that_torch_hides_from_its_overrides_is_another_path():
    """torch does not hand `weight` of l1_loss on: the call looks the same."""

    def step(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is None:
            return functional.l1_loss(x, y)
        return functional.l1_loss(x, y, weight=weight)

    compiled = tracejit.compile(step, mode="rerun", backend="numpy")
    x, y, w = torch.arange(4.0), torch.ones(4), torch.tensor([1.0, 0.0, 5.0, 2.0])
    for weight in [None] * 6 + [w] * 6 + [None, w] * 3:
        torch.testing.assert_close(compiled(x, y, weight), step(x, y, weight))
    assert compiled.stats.compiles == 2


def test_an_int_in_the_place_of_a_float_is_another_path(capsys):
    """Next to integers it makes another dtype."""

    def build() -> tuple:
        w = SimpleNamespace(k=2.0)

        def step(x):
            w.k = w.k + 1
            print("printed, and so rerun")
            return x * w.k

        return w, step

    ours, theirs = build(), build()
    step = tracejit.compile(ours[1], backend="numpy", on_unsupported="raise")
    for i in range(30):
        if i in (20, 25):
            ours[0].k = theirs[0].k = 2 if i == 20 else 2.0
        same(picture(step(torch.arange(3))), picture(theirs[1](torch.arange(3))), f"call {i}")
