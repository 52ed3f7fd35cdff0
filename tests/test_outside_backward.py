"""Backward called outside a compiled function: our program behind torch's own engine."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

import tracejit
from examples import loss_outside
from examples.custom_relu import MyReLU
from tracejit.testing import losses_agree


def leaf(*shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.linspace(-1, 2, count).reshape(shape).requires_grad_()


def both(function: Callable, use: Callable, *shapes: tuple, calls: int = 4, **options):
    """Run `use(function, *leaves)` on the plain and on the compiled function; equal each call."""
    ours, theirs = [leaf(*s) for s in shapes], [leaf(*s) for s in shapes]
    compiled = tracejit.compile(function, **options)
    for _ in range(calls):
        mine, his = use(compiled, *ours), use(function, *theirs)
        torch.testing.assert_close(mine, his)
        for a, b in zip(ours, theirs, strict=True):
            assert (a.grad is None) == (b.grad is None)
            if b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad)
                assert a.grad.stride() == b.grad.stride()
    return compiled


def loss_of(w, v):
    return ((w @ v).tanh() * (w @ v).exp()).mean()


def run(f, *leaves):
    loss = f(*leaves)
    loss.backward()
    return loss.detach()


def test_gradients_accumulate_and_replay_arms():
    step = both(loss_of, run, (4, 3), (3, 5), calls=6)
    assert step.explain_mode().startswith("replay") and step.stats.replays == 4
    assert step.stats.compiles == 2 and len(step.backward_plans) == 1


def test_program_8_trains_like_eager():
    sizes = {"d_in": 50, "h": 20, "d_out": 5}
    batch = loss_outside.make_batch(n=16, d_in=50, d_out=5)
    loss_fn, parameters = loss_outside.make_loss(**sizes)
    eager = loss_outside.train(loss_fn, parameters, batch, 25)
    loss_fn, ours = loss_outside.make_loss(**sizes)
    compiled = tracejit.compile(loss_fn)
    losses = loss_outside.train(compiled, ours, batch, 25)
    assert all(losses_agree(a, b, eager[0]) for a, b in zip(losses, eager, strict=True))
    torch.testing.assert_close(ours, parameters)
    assert compiled.stats.replays > 20


def test_example():
    loss_outside.main(steps=3)


def test_a_module_outside_and_a_module_inside():
    torch.manual_seed(0)
    inside, outside = torch.nn.Linear(4, 3), torch.nn.Linear(5, 4)
    x = torch.randn(6, 5)
    criterion = torch.nn.MSELoss()

    def loss_fn(h):
        return criterion(inside(h), torch.ones(6, 3))

    compiled = tracejit.compile(loss_fn)
    parameters = [*inside.parameters(), *outside.parameters()]
    for _ in range(4):
        expected = torch.autograd.grad(loss_fn(outside(x)), parameters)
        found = torch.autograd.grad(compiled(outside(x)), parameters)
        torch.testing.assert_close(found, expected)


def test_a_number_that_changes():
    w = leaf(5)
    compiled = tracejit.compile(lambda k: (w * k).exp().sum() * k)
    for k in (0.5, 0.7, 1.5, -2.0, 3.0):
        (found,) = torch.autograd.grad(compiled(k), w)
        torch.testing.assert_close(found, (w * k).exp().detach() * k * k)
    assert compiled.stats.replays == 3


def two_results(w, v):
    h = (w @ v).tanh()
    return h, (h * h).sum(), h.detach(), w


def use_both(f, w, v):
    h, loss, plain, same = f(w, v)
    assert same is w and not plain.requires_grad
    (loss + h.mean()).backward()
    return h.detach(), loss.detach(), plain


def use_one(f, w, v):
    h, loss, *_ = f(w, v)
    h.retain_grad()
    loss.backward()
    return h.grad


def use_grad(f, w, v):
    h, loss, *_ = f(w, v)
    return torch.autograd.grad(loss, (h, w))


def use_hook(f, w, v):
    h, loss, *_ = f(w, v)
    h.register_hook(lambda g: g * 10)
    loss.backward()
    return loss.detach()


def use_write(f, w, v):
    h, _, plain, _ = f(w, v)
    h = h + 0
    h.mul_(3)
    h.sum().backward()
    return h.detach(), plain


@pytest.mark.parametrize("use", [use_both, use_one, use_grad, use_hook, use_write])
def test_several_results(use):
    both(two_results, use, (4, 3), (3, 5))


def test_a_result_with_infinite_slope_does_not_disturb_another():
    def function(w):
        return (w * w).sum(), w.abs().log().sum() * 0

    def use(f, w):
        with torch.no_grad():
            w.zero_()
        loss, other = f(w)
        loss.backward()
        return other.isnan()

    both(function, use, (3,))


def test_views_of_one_result():
    def function(w):
        y = w.exp()
        return y, y.t(), y[0]

    def use(f, w):
        y, turned, row = f(w)
        assert turned.data_ptr() == y.data_ptr()
        ((turned * 2).sum() + (row * row).sum() + y.mean()).backward()
        return turned.detach()

    both(function, use, (4, 3))


SIBLINGS = {  # results that share the memory of a tensor that is not returned
    "chunk": lambda y: (y.mean(), *y.chunk(2, 1)),
    "split": lambda y: y.split((1, 3), 1),
    "unbind": lambda y: y.unbind(0)[1:3],
    "rows": lambda y: (y[0], y[1]),
    "overlapping": lambda y: (y[:3], y[1:], y.t()),
    "reshaped": lambda y: (y.view(-1), y.t(), (y * y).sum()),
    "twice": lambda y: (y, y.view_as(y), y[:, 0]),
    "expanded": lambda y: (y[:1].expand(3, 4), y[2:]),
    "transposed": lambda y: (y.t().contiguous().t()[0], (y + 0).t()[1], y[:, 2]),
    "written": lambda y: (y[0].mul_(2), y[1]),
    "used": lambda y: (y[0], y[1], (y[0] * y[1]).sum()),
}


@pytest.mark.parametrize("name", SIBLINGS)
@pytest.mark.sweep(2)
def test_results_that_share_memory(name):
    """Backward through each, through all, and after a write through one of them, as in eager."""

    def function(w, x):
        return SIBLINGS[name]((w * x).tanh() * 2)

    def use_one(k, write):
        def use(f, w, x):
            results = f(w, x)
            strides, leaves = [[y.stride(), y.is_leaf] for y in results], w.is_leaf
            if write:
                with torch.no_grad():
                    results[0].mul_(3)
            (results[k] * results[k]).sum().backward()
            return [y.detach() for y in results], strides, leaves

        return use

    def use_all(f, w, x):
        results = f(w, x)
        sum((i + 2) * (y * y).sum() for i, y in enumerate(results)).backward()
        return [y.detach() for y in results]

    def use_write(f, w, x):
        results = f(w, x)
        results[1].mul_(x[0, 0].detach())
        sum((y * y).sum() for y in results).backward()
        return [y.detach() for y in results]

    for use in (use_all, use_write, *(use_one(k, w) for k in (0, 1) for w in (False, True))):
        outcomes = []
        for how in (lambda f: f, tracejit.compile):
            w, x = leaf(3, 4), leaf(1, 4)
            f, rounds = how(function), []
            for _ in range(3):
                try:
                    rounds.append((use(f, w, x), w.grad.clone(), x.grad.clone()))
                except RuntimeError:
                    rounds.append(-1)
            outcomes.append(rounds)
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-4)
        assert use is not use_all or type(outcomes[0][-1]) is tuple


def test_a_view_of_a_parameter():
    def use(f, w):
        turned = f(w)
        assert turned.data_ptr() == w.data_ptr()
        (turned * turned).sum().backward()
        return turned.detach()

    both(lambda w: w.t(), use, (4, 3))


def test_a_leaf_made_inside():
    def function(x):
        inner = x.detach().exp().requires_grad_()
        return inner, (inner * inner).sum()

    def use(f, x):
        inner, loss = f(x)
        assert inner.is_leaf
        loss.backward()
        return inner.grad

    both(function, use, (3,))


def test_a_transposed_parameter_gets_a_gradient_laid_out_like_it():
    ours = torch.arange(6.0).reshape(2, 3).t().requires_grad_()
    theirs = torch.arange(6.0).reshape(2, 3).t().requires_grad_()

    def function(w):
        return (w * w).sum()

    tracejit.compile(function)(ours).backward()
    function(theirs).backward()
    assert torch.equal(ours.grad, theirs.grad) and ours.grad.stride() == theirs.grad.stride()


def test_custom_function_inside():
    both(lambda w, v: MyReLU.apply(w @ v).pow(2).sum(), run, (4, 3), (3, 5))


def test_a_cotangent_that_is_not_contiguous():
    def use(f, w):
        y = f(w)
        y.sum().backward(retain_graph=True)
        y.t().matmul(torch.ones(4, 2)).sum().backward()
        return y.detach()

    both(lambda w: w.exp(), use, (4, 3))


def test_written_input_is_saved_as_it_was():
    x = torch.ones(3)

    def function(w):
        y = (w * x).exp()
        x.add_(1)
        return y.sum()

    w = leaf(3)
    compiled = tracejit.compile(function)
    loss = compiled(w)
    assert x.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # as in eager


def test_backward_twice_as_eager():
    for f in (loss_of, tracejit.compile(loss_of)):
        w, v = leaf(4, 3), leaf(3, 5)
        loss = f(w, v)
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@pytest.mark.parametrize("which", ["parameter", "result"])
def test_saved_tensors_are_checked_as_eager(which):
    def function(w):
        y = (w * w).exp()
        return y

    for f in (function, tracejit.compile(function)):
        w = leaf(4)
        y = f(w)
        with torch.no_grad():
            (w if which == "parameter" else y).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_second_order_is_refused():
    w, v = leaf(4, 3), leaf(3, 5)
    loss = tracejit.compile(loss_of)(w, v)
    (g,) = torch.autograd.grad((loss * loss), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_a_gradient_penalty_outside_is_refused():
    """The cotangent of a loss requires no grad, and the penalty is not dropped silently."""
    w, v = leaf(4, 3), leaf(3, 5)
    loss = tracejit.compile(loss_of)(w, v)
    (g,) = torch.autograd.grad(loss, w, create_graph=True)
    assert g.requires_grad
    with pytest.raises(RuntimeError, match="second derivative inside the step"):
        g.pow(2).sum().backward()


def test_backward_inside_keeps_the_error():
    w = leaf(3)

    def function():
        loss = (w * w).sum()
        loss.backward()
        return loss

    loss = tracejit.compile(function)()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_that_would_leave_a_step_are_refused():
    h = leaf(3) * 2

    def function():
        loss = (h * h).sum()
        loss.backward()

    with pytest.raises(tracejit.errors.UnsupportedOperation, match="computed outside the step"):
        tracejit.compile(function)()


def test_shared_memory_is_refused_clearly():
    """Memory that two histories share: one wrote to it where the other does not see it."""

    def function(w):
        y = w.exp()
        d = y.detach()
        d.mul_(w)
        return y, d

    first, _ = tracejit.compile(function)(leaf(2, 3))
    with pytest.raises(RuntimeError, match="share memory"):
        first.sum().backward()


def test_an_outside_tensor_that_would_require_grad_is_refused():
    total, w = torch.zeros(3), leaf(3)
    with pytest.raises(tracejit.errors.SideEffectError, match="would require grad"):
        tracejit.compile(lambda: total.add_(w))()
    assert total.tolist() == [0, 0, 0]


def test_without_grad_nothing_is_saved():
    w, v = leaf(4, 3), leaf(3, 5)
    compiled = tracejit.compile(loss_of)
    with torch.no_grad():
        assert not compiled(w, v).requires_grad
    assert len(compiled.graph.results) == 1


def test_what_is_kept_by_an_object_can_go_backward():
    class Holder:
        loss = None

    holder, w = Holder(), leaf(3)

    def function():
        holder.loss = (w * w).sum()

    compiled = tracejit.compile(function)
    for _ in range(3):
        w.grad = None
        compiled()
        holder.loss.backward()
        torch.testing.assert_close(w.grad, 2 * w.detach())


def test_unfused():
    both(loss_of, run, (4, 3), (3, 5), fuse=False)


class Scribbling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        x.data.mul_(2)
        return g


def test_a_backward_that_writes_is_refused_clearly():
    w = leaf(3)
    loss = tracejit.compile(lambda: Scribbling.apply(w).sum())()
    assert torch.equal(w, leaf(3))
    with pytest.raises(RuntimeError, match="writes to a tensor of the step"):
        loss.backward()


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        raise KeyError("my own mistake")


def test_a_backward_that_fails_fails_when_it_is_called():
    loss = tracejit.compile(lambda w: Broken.apply(w).sum())(leaf(3))
    with pytest.raises(RuntimeError, match="my own mistake"):
        loss.backward()


def test_a_tensor_that_only_backward_reads():
    scale = torch.tensor([1.0, 2.0, 3.0])

    class Scaling(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g * scale

    scaling = Scaling.apply
    step = both(lambda w: scaling(w).sum(), run, (3,), calls=5)
    assert step.explain_mode().startswith("replay")


def test_results_of_other_dtypes():
    def function(w):
        h = w.double().exp()
        return h.half(), h.sum(), (h > 1), h.long()

    def use(f, w):
        half, total, mask, whole = f(w)
        (half.float().sum() + total).backward()
        return mask, whole

    both(function, use, (4,))


def test_a_batch_of_another_size_gets_a_plan_of_its_own():
    w = leaf(3, 2)
    compiled = tracejit.compile(lambda x: (x @ w).tanh().sum())
    for n in (4, 4, 4, 7, 7, 7, 4):
        x = torch.ones(n, 3)
        (found,) = torch.autograd.grad(compiled(x), w)
        (expected,) = torch.autograd.grad((x @ w).tanh().sum(), w)
        torch.testing.assert_close(found, expected)
    assert compiled.stats.compiles == 4 and compiled.stats.replays == 3


def test_a_result_may_be_written_to():
    def use(f, w):
        y = f(w)
        y.mul_(2)
        y[0] = 5.0
        y.sum().backward()
        return y.detach()

    both(lambda w: w * 3, use, (4,))


def test_backward_in_another_thread():
    w = leaf(4, 3)
    loss = tracejit.compile(lambda: (w * w).sum())()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    torch.testing.assert_close(w.grad, 2 * w.detach())


def test_a_gradient_comes_from_the_line_of_what_it_is_of():
    """Not from the line of the call: a plan's text, and its place in the cache, do not depend on
    who called first."""
    compiled, texts = tracejit.compile(loss_of, backend="numpy"), []
    calls = [
        lambda *leaves: compiled(*leaves),
        lambda *leaves: compiled(*leaves),
    ]
    for call in calls:
        compiled.reset()
        call(leaf(3, 4), leaf(4, 2)).backward()
        texts.append(str(compiled._last.backwards[0].graph))
    line = loss_of.__code__.co_firstlineno + 1
    assert texts[0] == texts[1] and f"test_outside_backward.py:{line}" in texts[0]
