"""Custom autograd functions in a step: as eager, in forward, gradient, and what is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction, once_differentiable

import tracejit
from examples import custom_relu
from support.oracle import call
from tracejit.errors import AutogradError, UnsupportedOperation
from tracejit.testing import assert_equal_to_eager, assert_trains_like_eager

relu = custom_relu.MyReLU.apply


class Scaled(Function):
    """setup_context style, a number among the inputs, a result saved."""

    @staticmethod
    def forward(x, k):
        return (x * k).exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.k = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y * ctx.k, None


class SplitSigns(Function):
    """Several outputs, one of them not differentiable, one an integer tensor, one no tensor."""

    @staticmethod
    def forward(ctx, x, w):
        mask = x > 0
        sign = torch.where(mask, 1.0, -1.0)
        ctx.mark_non_differentiable(sign)
        ctx.save_for_backward(x, w, mask)
        ctx.materialized = []
        return x * w, x + w, sign, mask, "text"

    @staticmethod
    def backward(ctx, g_mul, g_add, g_sign, g_mask, g_text):
        x, w, mask = ctx.saved_tensors
        assert g_text is None and g_sign.shape == x.shape
        return torch.where(mask, g_mul * w + g_add, 0.5 * g_add), g_mul * x + g_add


class Doubled(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Once(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * x**2


class Sparse(Function):
    """Gradients are not materialized; some are None."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.set_materialize_grads(False)
        return x * 2, y * 3

    @staticmethod
    def backward(ctx, gx, gy):
        return None if gx is None else gx * 20, None if gy is None else gy * 30


class AsIs(Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return g * 7


class View(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x[1:].t()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        out = torch.zeros(4, 3)
        out[1:] = g.t() * 3
        return out * x


class Broadcast(Function):
    """A gradient of a wider shape is summed, one of another dtype is cast."""

    @staticmethod
    def forward(ctx, x):
        return x.double()

    @staticmethod
    def backward(ctx, g):
        return g.expand(5, *g.shape)


class Inner(Function):
    """A gradient taken inside backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = x.tanh()
        return torch.autograd.grad(y, x, g)


class Nested(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return relu(x) + 1

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return relu(g) * Scaled.apply(x, 0.5)


class NeedsGrad(Function):
    @staticmethod
    def forward(ctx, x, y):
        assert not torch.is_grad_enabled()
        ctx.save_for_backward(x, y)
        ctx.needs = ctx.needs_input_grad
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        assert ctx.needs == ctx.needs_input_grad
        gx = g * y if ctx.needs_input_grad[0] else None
        return gx, g * x if ctx.needs_input_grad[1] else None


def leaf(*shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.linspace(-1, 2, count).reshape(shape).requires_grad_()


def split_signs(x):
    a, b, sign, mask, text = SplitSigns.apply(x, x.exp())
    assert text == "text"
    (a * sign + b * mask + b).sum().backward()
    return a, sign, mask, sign.requires_grad, mask.requires_grad


def one_output_used(x):
    a, *_ = SplitSigns.apply(x, x + 2)
    a.sum().backward()


def doubled(x):
    y = x * 3
    z = Doubled.apply(y)
    assert z is y
    (y * y).sum().backward()
    return y.detach()


def doubled_view(x):
    y = x * 3
    Doubled.apply(y[0])
    (y * y).sum().backward()
    return y.detach()


def doubled_without_grad(x):
    y = x.detach() * 3
    assert Doubled.apply(y) is y
    return y


def second_order(x):
    (g,) = torch.autograd.grad(Scaled.apply(x, 0.7).sum(), x, create_graph=True)
    (g * g).sum().backward()
    return g.detach()


def second_order_relu(x):
    (g,) = torch.autograd.grad((relu(x) ** 3).sum(), x, create_graph=True)
    g.sum().backward()


def not_materialized(x):
    a, b = Sparse.apply(x, x.exp())
    (a * 2).sum().backward(retain_graph=True)
    b.sum().backward()


def as_is(x):
    y = AsIs.apply(x)
    assert y is not x
    (y * y).sum().backward()


def as_is_of_an_intermediate(x):
    h = x * 2
    y = AsIs.apply(h)
    (y * h).sum().backward()


def with_no_grad(x):
    with torch.no_grad():
        y = relu(x)
        z = AsIs.apply(x)
    return y, y.requires_grad, z.detach(), z.requires_grad


STEPS = {
    "relu": lambda x: (relu(x) * x).sum().backward(),
    "relu twice": lambda x: relu(relu(x) - 0.5).sum().backward(),
    "setup_context": lambda x: Scaled.apply(x, 0.3).sum().backward(),
    "split signs": split_signs,
    "one output used": one_output_used,
    "doubled": doubled,
    "doubled view": doubled_view,
    "doubled without grad": doubled_without_grad,
    "once": lambda x: Once.apply(x).sum().backward(),
    "second order": second_order,
    "second order relu": second_order_relu,
    "not materialized": not_materialized,
    "as is": as_is,
    "as is of an intermediate": as_is_of_an_intermediate,
    "view": lambda x: (View.apply(x) * View.apply(x * 2)).sum().backward(),
    "broadcast": lambda x: Broadcast.apply(x).pow(2).sum().backward(),
    "inner": lambda x: (Inner.apply(x) ** 2).sum().backward(),
    "nested": lambda x: (Nested.apply(x) ** 2).sum().backward(),
    "integer gradient": lambda x: failing(lambda g: (g.long(), None))(x),
    "needs grad": lambda x: NeedsGrad.apply(x, x.detach() + 1).sum().backward(),
    "needs both": lambda x: NeedsGrad.apply(x, x).sum().backward(),
    "no grad": with_no_grad,
    "twice with retain_graph": lambda x: [
        (relu(x) * x).sum().backward(retain_graph=True) for _ in range(2)
    ],
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.sweep(0.17)
def test_as_eager(name):
    ours, theirs = leaf(4, 3), leaf(4, 3)
    mine, his = call(STEPS[name], ours), STEPS[name](theirs)
    torch.testing.assert_close(mine, his)
    assert (ours.grad is None) == (theirs.grad is None)
    if theirs.grad is not None:
        torch.testing.assert_close(ours.grad, theirs.grad)


# ---- what eager refuses


def failing(returned):
    """A Function whose backward returns what it is told."""

    class Failing(Function):
        @staticmethod
        def forward(ctx, x, k):
            return x * k

        @staticmethod
        def backward(ctx, g):
            return returned(g)

    return lambda x: Failing.apply(x, 2).sum().backward()


def saved_then_written(x):
    h = x * 2
    y = relu(h)
    h.add_(1)
    y.sum().backward()


def twice(x):
    y = relu(x).sum()
    y.backward()
    y.backward()


def once_twice(x):
    (g,) = torch.autograd.grad(Once.apply(x).pow(2).sum(), x, create_graph=True)
    g.sum().backward()


class DirtyNotReturned(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2) + 1

    @staticmethod
    def backward(ctx, g):
        return g


class NoBackward(Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1


class SavesNumber(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(3)
        return x * 1


def write_to_as_is(x):
    AsIs.apply(x * 1).add_(1)


REFUSED = {
    "too few": (failing(lambda g: g), "incorrect number of gradients"),
    "too many": (failing(lambda g: (g, None, g)), "incorrect number of gradients"),
    "for a number": (failing(lambda g: (g, g)), "gradient different than None at position 2"),
    "wrong shape": (failing(lambda g: (g[:2], None)), "invalid gradient at index 0"),
    "saved, then written": (saved_then_written, "modified by an inplace operation"),
    "twice": (twice, "backward through the graph a second time"),
    "once differentiable, twice": (once_twice, "marked with @once_differentiable"),
    "dirty, not returned": (lambda x: DirtyNotReturned.apply(x * 1), "marked as dirty"),
    "dirty leaf": (lambda x: Doubled.apply(x), "leaf Variable that requires grad"),
    "written view": (write_to_as_is, "custom Function"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_eager(name):
    step, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=message):
        step(leaf(4, 3))
    with pytest.raises(AutogradError, match=message):
        call(step, leaf(4, 3))


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (failing(lambda g: (3.0, None)), RuntimeError),
        (lambda x: SavesNumber.apply(x), TypeError),
        (lambda x: NoBackward.apply(x).sum().backward(), NotImplementedError),
        (lambda x: relu(x, x=1), TypeError),
    ],
)
def test_other_errors_as_eager(step, error):
    with pytest.raises(error):
        step(leaf(3))
    with pytest.raises(error):
        call(step, leaf(3))


class Vmapped(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g * 2


def test_a_function_under_vmap_is_refused():
    with pytest.raises(UnsupportedOperation):
        call(lambda x: torch.vmap(Vmapped.apply)(x), leaf(3))
    call(lambda x: Vmapped.apply(x).sum().backward(), leaf(3))


# ---- patches


def test_nothing_stays_patched():
    group = torch._C._group_tensors_by_device_and_dtype

    def failing_step(x):
        assert "apply" in vars(_SingleLevelFunction)
        raise KeyError

    with pytest.raises(KeyError):
        call(failing_step, leaf(3))
    assert "apply" not in vars(_SingleLevelFunction)
    assert torch._C._group_tensors_by_device_and_dtype is group
    x = leaf(3)
    relu(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1]


def test_other_threads_see_nothing():
    seen = []

    def other():
        x = leaf(3)
        y = relu(x)
        y.sum().backward()
        seen.append((type(y), x.grad.tolist()))

    def step(x):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return relu(x) * 2

    assert call(step, leaf(3)).tolist() == [0, 1, 4]
    assert seen == [(torch.Tensor, [0, 1, 1])]


# ---- whole steps


def test_program_4_in_lockstep():
    step, parameters = custom_relu.make_step(n=16, d_in=20, h=10, d_out=5)
    assert_equal_to_eager(step, calls=20, state=parameters)


@pytest.mark.parametrize("style", ["ctx", "setup_context"])
def test_program_4_trains_like_eager(style):
    small = {"n": 16, "d_in": 20, "h": 10, "d_out": 5}
    step, _, _ = assert_trains_like_eager(
        lambda: custom_relu.make_step(style=style, **small), calls=25
    )
    assert step.stats.compiles == 2  # the first call sets .grad, the others add to it


def test_example():
    custom_relu.main(steps=3)


def test_shares_one_plan_with_the_plain_step():
    x, w = torch.ones(2, 3), leaf(3, 4)

    @tracejit.compile
    def step():
        relu(x @ w).sum().backward()

    for _ in range(4):
        step()
    assert step.stats.compiles == 2  # the first call sets .grad, the others add to it


# ---- replay


FACTOR = 2.0


class Factored(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.factor = FACTOR
        return x * FACTOR

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor


factored = Factored.apply


def test_replay_follows_custom_functions(monkeypatch):
    def step(x):
        y = factored(x) + Scaled.apply(x, 0.5)
        (g,) = torch.autograd.grad(y.sum(), x)
        return y.detach(), g

    compiled = tracejit.compile(step)
    x = leaf(4)
    for i in range(11):
        if i == 4:
            monkeypatch.setitem(globals(), "FACTOR", 3.0)
        if i == 9:
            monkeypatch.setattr(Factored, "backward", staticmethod(lambda ctx, g: g * 100))
        torch.testing.assert_close(compiled(x), step(x))
    assert compiled.explain_mode().startswith("replay") and compiled.stats.replays >= 3


def test_a_setup_context_added_later_is_noticed(monkeypatch):
    class Late(Function):
        @staticmethod
        def forward(*args):  # with or without ctx
            return args[-1] * len(args)

        @staticmethod
        def backward(ctx, g):
            return g

    late = Late.apply

    def step(x):
        return late(x).detach()

    compiled, x = tracejit.compile(step), leaf(4)
    for i in range(6):
        if i == 3:
            monkeypatch.setattr(Late, "setup_context", staticmethod(lambda *args: None))
        torch.testing.assert_close(compiled(x), step(x))
    assert compiled.stats.replays > 0


class Counting(Function):
    calls = 0

    @staticmethod
    def forward(ctx, x):
        Counting.calls += 1
        return x * Counting.calls

    @staticmethod
    def backward(ctx, g):
        return g


def test_a_custom_function_that_counts_on_its_class_is_replayed():
    x = leaf(4)
    compiled = tracejit.compile(lambda: Counting.apply(x).detach())
    before = Counting.calls
    for i in range(9):
        assert torch.equal(compiled(), x.detach() * (before + i + 1))
        assert Counting.calls == before + i + 1
    assert compiled.explain_mode().startswith("replay"), compiled.explain_mode()


def test_what_a_context_and_the_user_both_hold_is_made_real():
    kept = []

    class Keeping(Function):
        @staticmethod
        def forward(ctx, x):
            y = x * 2
            kept.append(y)
            ctx.kept, ctx.y = kept, y
            ctx.save_for_backward(y)
            return x * 3

        @staticmethod
        def backward(ctx, g):
            return g + ctx.y + ctx.kept[-1]

    compiled, x = tracejit.compile(lambda: Keeping.apply(x).sum().backward()), leaf(4)
    for _ in range(3):
        compiled()
    assert [type(y) for y in kept] == [torch.Tensor] * 3
    assert torch.equal(kept[0], 2 * x)
    torch.testing.assert_close(x.grad, 3 * (1 + 4 * x).detach())
