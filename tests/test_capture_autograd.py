"""Capture against eager: `.grad`, and autograd inside the step."""

from __future__ import annotations

import pytest
import torch

from support.capture_checks import leaf, loss_of, randn, same
from support.oracle import call

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of eager


# --- .grad -------------------------------------------------------------------------------------


def _none(w, x):
    w.grad = None
    loss_of(w, x).backward()
    return w.grad


def _accumulate(w, x):
    loss_of(w, x).backward()
    loss_of(w, 2 * x).backward()


def _zero(w, x):
    loss_of(w, x).backward()
    w.grad.zero_()


def _zero_data(w, x):
    loss_of(w, x).backward()
    w.grad.data.zero_()
    loss_of(w, x).backward()


def _update(w, x):
    loss = loss_of(w, x)
    loss.backward()
    with torch.no_grad():
        w -= 0.1 * w.grad
        w.grad.zero_()
    return loss.detach()


def _update_data(w, x):
    loss_of(w, x).backward()
    w.data -= 0.1 * w.grad.data
    w.grad = None


def _update_data_assigned(w, x):
    loss_of(w, x).backward()
    w.data = w.data - 0.1 * w.grad
    w.grad = None


def _assign(w, x):
    w.grad = x * 2
    loss_of(w, x).backward()


def _delete(w, x):
    loss_of(w, x).backward()
    del w.grad
    assert w.grad is None


def _is_none(w, x):
    had = w.grad is None
    loss_of(w, x).backward()
    return had, w.grad is None


def _read_before(w, x):
    loss_of(w, x).backward()
    kept = w.grad
    loss_of(w, x).backward()
    return kept, w.grad is kept


def _scaled(w, x):
    loss_of(w, x).backward()
    w.grad.mul_(0.5)
    w.grad += 1
    norm = w.grad.pow(2).sum().sqrt()
    w.grad *= torch.where(norm > 1.0, 1.0 / norm, 1.0)
    return norm


def _shared_grad(w, x):
    w.grad = x
    w.grad.add_(1)


def _swap(w, x):
    loss_of(w, x).backward()
    w.grad = w.grad.clone() if w.grad is not None else None


STEPS_WITH_GRAD = [
    _none,
    _accumulate,
    _zero,
    _zero_data,
    _update,
    _update_data,
    _update_data_assigned,
    _assign,
    _delete,
    _is_none,
    _read_before,
    _scaled,
    _shared_grad,
    _swap,
]


@pytest.mark.parametrize("step", STEPS_WITH_GRAD)
@pytest.mark.parametrize("had", [False, True], ids=["no .grad", ".grad"])
def test_grad_attribute(step, had):
    w, x = leaf(3), randn(3)
    if had:
        w.grad = torch.ones(3)
    same(step, w, x)
    same(step, w, x, calls=3)


def test_grad_of_a_transposed_leaf_has_its_layout():
    w = randn(4, 3).t().requires_grad_()
    same(lambda w: (w * w).sum().backward(), w, calls=2)


def test_grad_keeps_its_object():
    w, x = leaf(3), randn(3)
    w.grad = torch.zeros(3)
    kept = w.grad
    call(_accumulate, w, x)
    assert w.grad is kept


# --- autograd ----------------------------------------------------------------------------------


def _unused(w, x):
    return torch.autograd.grad(
        loss_of(w, x), (w, torch.ones(2, requires_grad=True)), allow_unused=True
    )


def _materialized(w, x):
    other = torch.ones(2, requires_grad=True)
    return torch.autograd.grad(loss_of(w, x), [w, other], materialize_grads=True)


def _higher(w, x):
    (g,) = torch.autograd.grad(loss_of(w, x), w, create_graph=True)
    (h,) = torch.autograd.grad(g.pow(2).sum(), w, create_graph=True)
    (h.sum() + loss_of(w, x)).backward()
    return g, h


def _retained(w, x):
    loss = loss_of(w, x)
    (a,) = torch.autograd.grad(loss, w, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    return a


def _inputs(w, x):
    other = torch.ones(3, requires_grad=True)
    (loss_of(w, x) * other).sum().backward(inputs=[other])
    return other.grad, w.grad is None


def _gradient(w, x):
    (w * x).backward(gradient=torch.ones(3) * 2)
    (w[0] * 2).backward(torch.tensor(0.5))
    torch.autograd.backward([w * x, w.sum()], [x, None])


def _intermediate(w, x):
    h = w * x
    loss = (h * h).sum()
    (g,) = torch.autograd.grad(loss, h)
    return g, h.grad_fn is None if False else h.is_leaf


def _inner_leaf(w, x):
    inner = torch.zeros(3, requires_grad=True)
    (w * inner + inner).sum().backward()
    return inner.grad, inner.is_leaf


def _late_leaf(w, x):
    y = (x * 2).requires_grad_()
    (y * w).sum().backward()
    return y.grad, y.requires_grad, y.is_leaf


def _modes(w, x):
    flags = []
    with torch.no_grad():
        flags.append((w * x).requires_grad)
        with torch.enable_grad():
            flags.append((w * x).requires_grad)
        with torch.set_grad_enabled(True):
            y = w * x
    with torch.set_grad_enabled(False):
        flags.append(torch.is_grad_enabled())
    y.sum().backward()
    return flags, w.requires_grad, y.is_leaf, w.is_leaf


@torch.no_grad()
def _decorated(w, x):
    return (w * x).sum()


def _inplace_on_intermediate(w, x):
    h = w * x
    h.add_(1.0).mul_(x)
    h[0] = 5.0
    h[h > 0.3] = 0.0
    h.clamp_(min=-1.0)
    (h * w).sum().backward()


def _inplace_on_view(w, x):
    h = w * 1.0
    v = h[1:]
    v.mul_(x[1:])
    v[0] += 2 * w[0]
    h.sum().backward()
    return h, v


def _write_into_constant(w, x):
    buffer = torch.zeros(2, 3)
    buffer[0] = w * x
    buffer[1, 1:] = w[:2]
    buffer.pow(2).sum().backward()
    return buffer


def _detached_update(w, x):
    h = w * x
    h.detach().add_(1.0)
    h.sum().backward()
    return h


def _relu_inplace(w, x):
    h = torch.nn.functional.relu(w * x, inplace=True)
    h.sum().backward()
    return h


def _exp_then_inplace(w, x):
    y = (w * x).exp()
    z = y + 1
    z.mul_(2)
    z.sum().backward()


def _views_in_no_grad(w, x):
    with torch.no_grad():
        w[0] = 2.0
        w.view(3)[1:].add_(1.0)
    (w * x).sum().backward()


def _loop_over_elements(w, x):
    total = 0
    for v in w:
        total = total + v * v
    total.backward()
    for v in x:
        v.mul_(3)


def _views_of_views_in_place(w, x):
    h = (w * x).view(1, 3)
    v = h.t()[1:]
    v.mul_(w[1:].view(2, 1))
    h.sum().backward()
    return h, v


def _grad_assigned_with_strides(w, x):
    w.grad = torch.zeros(6)[::2]
    (w * x).sum().backward()
    return w.grad.stride()


def _new_parameter(w, x):
    p = torch.nn.Parameter(x * 2)
    (p * w).sum().backward()
    return p.grad


def _create_graph_backward(w, x):
    (w**3).sum().backward(create_graph=True)
    g = w.grad
    w.grad = None
    g.sum().backward()


def _masked_intermediate(w, x):
    h = w * 1
    h[x > 0] = 0
    h[x < -1] = w[0]
    h.sum().backward()
    return h


def _quiet_view(w, x):
    h = w * x
    with torch.no_grad():
        views = w[0], h.view(3, 1), w.detach()[1]
    y = views[0] * 2 + views[1].sum()
    y.backward()
    (views[0] + h).sum().backward()
    flags = [(v.requires_grad, v.is_leaf) for v in views]
    return flags, y.requires_grad, w.grad is None


def _through_leaf_after_write(w, x):
    loss_of(w, x).backward()
    with torch.no_grad():
        w.mul_(0.5)
    loss_of(w, x).backward()


def _non_float(w, x):
    hit = (w > x).float()
    (hit * w).sum().backward()
    return hit.requires_grad, (w > 0).sum(), w.long()


def _broadcast_everywhere(w, x):
    m = torch.ones(4, 1) * w
    (m @ m.t() + m.sum(0, keepdim=True).mean() + m.amax()).sum().backward()


def _detached_in_place(w, x):
    h, total = torch.zeros(3), 0
    for _ in range(3):  # truncated backpropagation through time
        h = (h * w + x).tanh()
        total = total + h.sum()
        assert h.detach_() is h
    total.backward()
    y = (w * 2).detach_().requires_grad_()
    y.square().sum().backward()
    return h, x.detach_().add(1), y.grad, h.requires_grad, h.is_leaf, y.is_leaf


AUTOGRAD = [
    _detached_in_place,
    _unused,
    _materialized,
    _higher,
    _retained,
    _inputs,
    _gradient,
    _intermediate,
    _inner_leaf,
    _late_leaf,
    _modes,
    _decorated,
    _inplace_on_intermediate,
    _inplace_on_view,
    _write_into_constant,
    _detached_update,
    _relu_inplace,
    _exp_then_inplace,
    _views_in_no_grad,
    _quiet_view,
    _loop_over_elements,
    _views_of_views_in_place,
    _grad_assigned_with_strides,
    _new_parameter,
    _create_graph_backward,
    _masked_intermediate,
    _through_leaf_after_write,
    _non_float,
    _broadcast_everywhere,
]


def test_detaching_in_place_what_cannot_be():
    """Views, as in eager; and what has views has no rule."""
    for step, says in (
        (lambda w: (w * 2)[0].detach_(), "Can't detach views in-place"),
        (lambda w: [y := w * 2, y[0], y.detach_()], "has views"),
        (lambda w: (w * 2)[0].detach().requires_grad_(), "of a view"),
    ):
        with pytest.raises(RuntimeError, match=says):
            call(step, leaf(3))


@pytest.mark.parametrize("step", AUTOGRAD)
def test_autograd(step):
    same(step, leaf(3), randn(3))
    same(step, leaf(3), randn(3), calls=2)
