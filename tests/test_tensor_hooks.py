"""Hooks of tensors: in the step's backward they see and change what eager's see and change.

Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import Function

import tracejit
from support.worlds import Case, Trainer, X, check, on_trainer, same, table, trainer
from support.worlds import picture as pictured
from tracejit.errors import AutogradError, ShapeError, SideEffectError

CASES: dict[str, Case] = {}
case = table(CASES)


def leaf(*shape: int) -> torch.Tensor:
    return torch.linspace(0.5, 2, torch.Size(shape).numel()).reshape(shape).requires_grad_()


def noted(seen: list, name: str, factor: float | None = None):
    """A hook that takes down what it gets, and scales it."""

    def hook(gradient):
        seen.append((name, gradient.detach().clone()))
        return None if factor is None else gradient * factor

    return hook


def plus(parameter):
    parameter.grad.add_(0.1)


# ---- intermediates


@case("replay")
def doubles_an_intermediate(w):
    w.x = x = leaf(3)

    def step():
        x.grad = None
        y = x * 2
        y.register_hook(lambda g: g * 2)
        (y * y).sum().backward()

    return step


@case("rerun")
def several_uses_and_several_hooks(w):
    """A gradient is complete before the first hook; each hook sees what the one before left."""
    w.x, w.seen = leaf(3), []

    def step():
        w.x.grad = None
        y = w.x * 2
        z = y.sin()
        y.register_hook(noted(w.seen, "y", 3.0))
        z.register_hook(noted(w.seen, "z"))
        y.register_hook(noted(w.seen, "y again"))
        z.register_hook(noted(w.seen, "z again", 0.5))
        (z * y + y.exp()).sum().backward()

    return step


@case("rerun")
def in_the_order_of_the_engine(w):
    torch.manual_seed(0)
    w.net, w.seen = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), []
    for name, p in w.net.named_parameters():
        p.register_hook(noted(w.seen, name))
        p.register_post_accumulate_grad_hook(lambda p, name=name: w.seen.append((name, p.grad + 0)))

    def step():
        w.net.zero_grad()
        hidden = w.net[0](X)
        hidden.register_hook(noted(w.seen, "hidden"))
        after = w.net[1](hidden)
        after.register_hook(noted(w.seen, "after"))
        loss = w.net[2](after).pow(2).mean()
        loss.register_hook(noted(w.seen, "loss", 2.0))
        loss.backward()

    return step


@case("replay")
def before_and_after_a_write(w):
    """A hook stays with the value that the tensor had when it was registered."""
    w.x = x = leaf(3)

    def step():
        x.grad = None
        y = x * 2
        y.register_hook(lambda g: g + 1)
        y.mul_(3)
        y.register_hook(lambda g: g * 5)
        y.retain_grad()
        (y * y).sum().backward()
        return y.grad

    return step


@case("replay")
def views_have_hooks_of_their_own(w):
    w.x = x = leaf(2, 3)

    def step():
        x.grad = None
        y = x * 2
        row, turned, same_again = y[0], y.t(), y.view_as(y)
        y.register_hook(lambda g: g * 2)
        row.register_hook(lambda g: g + 10)
        turned.register_hook(lambda g: g * -1)
        same_again.register_hook(lambda g: g * 7)
        whole = y[:]
        (row.sum() + (turned * turned).sum() + same_again.sum() + (whole * y).sum()).backward()

    return step


@case("replay")
def removed_before_the_backward(w):
    w.x = x = leaf(3)

    def step():
        x.grad = None
        y = x * 2
        first = y.register_hook(lambda g: g * 2)
        y.register_hook(lambda g: g + 1)
        first.remove()
        with y.register_hook(lambda g: g * 100):
            pass
        y.sum().backward()

    return step


@case("replay")
def retained_after_the_hooks(w):
    w.x = x = leaf(3)

    def step():
        x.grad = None
        y = x * 2
        y.register_hook(lambda g: g * 2)
        y.retain_grad()
        y.register_hook(lambda g: g * 5)
        y.sum().backward()
        return y.grad

    return step


@case("replay")
def gradients_asked_for(w):
    """autograd.grad runs hooks of tensors, of those that it asks for too, and none after it. What
    it returns for an intermediate that it also goes through is from before the hooks."""
    w.x = x = leaf(3)
    x.register_hook(lambda g: g * 3)
    x.register_post_accumulate_grad_hook(lambda p: p.missing)

    def step():
        y = x * 2
        z = y * y
        y.register_hook(lambda g: g + 1)
        z.register_hook(lambda g: g * 2)
        both = torch.autograd.grad(z.sum(), (x, y), retain_graph=True)
        return both, torch.autograd.grad(z.sum(), y)

    return step


@case("replay")
def second_derivatives_through_hooks(w):
    w.x = x = leaf(3)
    x.register_hook(lambda g: g * g)

    def step():
        x.grad = None
        y = x * x
        y.register_hook(lambda g: g * x)
        (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        g.sum().backward()

    return step


@case("replay")
def gradient_kept_by_a_hook(w):
    """As Grad-CAM does it."""
    w.t = Trainer()

    class Cam:
        gradient = None

        def save(self, gradient):
            self.gradient = gradient

    w.cam = Cam()

    def step():
        w.t.opt.zero_grad()
        features = w.t.model[0](X)
        features.register_hook(w.cam.save)
        w.t.model[2](w.t.model[1](features)).pow(2).mean().backward()

    return step


@case("replay")
def root_with_a_hook(w):
    w.x = x = leaf(3)

    def step():
        x.grad = None
        loss = (x * 2).sum()
        loss.register_hook(lambda g: g * 3)
        loss.backward()

    return step


@case("replay")
def through_a_custom_function(w):
    class Scale(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 3

    w.x = x = leaf(3)

    def step():
        x.grad = None
        y = Scale.apply(x)
        y.register_hook(lambda g: g + 1)
        z = Scale.apply(y)
        z.register_hook(lambda g: g * 0.5)
        z.sum().backward()

    return step


@case("replay")
def mixed_dtypes(w):
    w.x = x = leaf(4)
    x.register_hook(lambda g: g * 0.5)

    def step():
        x.grad = None
        y = x.double() * 2
        y.register_hook(lambda g: g * 3)
        h = x.bfloat16()
        h.register_hook(lambda g: g * 2)
        (y.float() * h.float()).sum().backward()

    return step


@case("replay")
def on_what_reaches_no_leaf_asked_for(w):
    """A hook beside the way to the gradients asked for is not called."""
    w.x, w.y = leaf(3), leaf(3)

    def step():
        a, b = w.x * 2, w.y * 3
        b.register_hook(lambda g: g.no_such_attribute)
        return torch.autograd.grad((a * b).sum(), w.x)

    return step


# ---- leaves


@case("replay")
def clipped_parameters(w):
    w.t = Trainer()
    for p in w.t.model.parameters():
        p.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return w.t.step


@case(
    "replay",
    changes={3: on_trainer(lambda t: t.model[0].weight.register_hook(lambda g: g * 2))},
    calls=9,
)
def hook_added(w):
    return trainer(w)


@case("replay", changes={4: lambda w: w.first(), 8: lambda w: w.second()}, calls=12)
def hooks_removed(w):
    step = trainer(w, momentum=0.9)
    weight = w.t.model[0].weight
    first = weight.register_hook(lambda g: g * 2)
    second = weight.register_post_accumulate_grad_hook(plus)
    w.first, w.second = (lambda: first.remove()), (lambda: second.remove())
    return step


@case(
    "replay", changes={4: lambda w: w.factor.__setitem__(0, 3.0), 7: lambda w: w.swap()}, calls=12
)
def what_a_hook_reads_changes(w):
    step = trainer(w)
    w.factor = [2.0]
    weight = w.t.model[0].weight
    handles = [weight.register_hook(lambda g: g * w.factor[0])]

    def swap():
        handles.pop().remove()
        weight.register_hook(lambda g: g - 0.01)

    w.swap = lambda: swap()
    return step


@case("rerun")
def hooks_of_parameters_that_print(w):
    w.t = Trainer()
    w.t.model[0].bias.register_hook(lambda g: print("bias", tuple(g.shape)))
    w.t.model[0].bias.register_post_accumulate_grad_hook(lambda p: print("post", p.requires_grad))
    return w.t.step


@case("replay", changes={5: lambda w: w.slower()}, calls=10)
def optimizer_in_the_backward(w):
    """As the tutorial does it: no gradient outlives its hook."""
    torch.manual_seed(0)
    w.net = net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    w.opts = opts = {p: torch.optim.Adam([p], lr=0.05, foreach=False) for p in net.parameters()}

    def hook(parameter):
        opts[parameter].step()
        opts[parameter].zero_grad()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(hook)

    def slower():
        for opt in opts.values():
            opt.param_groups[0]["lr"] *= 0.5

    w.slower = lambda: slower()

    def step():
        loss = net(X).pow(2).mean()
        loss.backward()
        return loss.detach()

    return step


@case(
    "replay",
    changes={
        4: lambda w: w.remove(),
        8: lambda w: setattr(w.y, "tag", 3.0),
        11: lambda w: w.again(),
    },
    calls=15,
)
def parameters_that_are_keys_first(w):
    """A walk that meets a tensor as the key of a dict looks at its hooks and attributes too."""
    w.x, w.y = leaf(3), leaf(3)
    w.y.tag = 1.0
    rates = {w.x: 0.5, w.y: 0.25}
    handle = w.x.register_hook(lambda g: g * 3)
    w.remove = lambda: handle.remove()

    def again():
        w.y.register_post_accumulate_grad_hook(plus)

    w.again = lambda: again()

    def step():
        for p in rates:
            p.grad = None
        sum((p * p * rate).sum() for p, rate in rates.items()).backward()
        with torch.no_grad():
            for p, rate in rates.items():
                p.sub_(p.grad, alpha=rate * getattr(p, "tag", 1.0) * 0.1)

    return step


@case("replay")
def registered_under_no_grad(w):
    w.x = x = leaf(4)

    def step():
        x.grad = None
        view = (x * 2)[1:]
        with torch.no_grad():
            view.register_hook(lambda g: g * 5)
            view.retain_grad()
        loss = (view * view).sum()[None][0]
        with torch.no_grad():
            loss.backward()
        return view.grad

    return step


@case("replay")
def accumulated_before_the_hook(w):
    """The `.grad` from before is there when a hook runs, and added to before the later one."""
    w.x = x = leaf(3)
    x.grad = torch.ones(3)
    x.register_hook(lambda g: g + x.grad)
    x.register_post_accumulate_grad_hook(plus)

    def step():
        (x * 2).sum().backward()
        x.sum().backward()

    return step


@case("replay")
def several_paths_to_a_leaf(w):
    """Tied weights, also through a value from before an update."""
    w.x = x = leaf(3, 3)
    x.register_hook(lambda g: g.clamp(max=2.0))

    def step():
        x.grad = None
        y = (x @ x).sum() + x.t().sum()
        with torch.no_grad():
            early = x * 2
        y.backward()
        with torch.no_grad():
            x.mul_(0.9)
        (x * early).sum().backward()

    return step


@case("replay")
def leaves_of_the_step(w):
    w.x = x = torch.ones(3)

    def step():
        y = x.clone().requires_grad_()
        handle = y.register_hook(lambda g: g * 2)
        other = y.register_post_accumulate_grad_hook(plus)
        (y * 3).sum().backward()
        handle.remove()
        other.remove()
        return y.grad

    return step


@case("replay")
def registered_and_removed_on_a_parameter(w):
    w.x = x = leaf(3)

    def step():
        x.grad = None
        handle = x.register_hook(lambda g: g * 2)
        (x * 3).sum().backward()
        handle.remove()
        x.sum().backward()

    return step


@case("rerun", calls=4)
def registered_on_a_parameter_and_left(w):
    """One more on each call, as in eager."""
    w.x = x = leaf(3)

    def step():
        x.grad = None
        x.register_hook(lambda g: g * 2)
        (x * 3).sum().backward()

    return step


@case("replay")
def frozen_with_hooks(w):
    w.t = Trainer()
    for p in w.t.model[0].parameters():
        p.register_hook(lambda g: g * 2)
        p.requires_grad_(False)
    return w.t.step


@case("replay", changes={4: lambda w: w.opt.zero_grad(set_to_none=False)}, calls=9)
def inputs_of_the_backward(w):
    """Only those that are asked for have their hooks called."""
    w.x, w.y = leaf(3), leaf(3)
    w.opt = torch.optim.SGD([w.x, w.y], lr=0.1)
    w.x.register_hook(lambda g: g * 2)
    w.y.register_hook(lambda g: g.no_such_attribute)

    def step():
        w.opt.zero_grad()
        (w.x * w.y).sum().backward(inputs=[w.x])
        w.opt.step()

    return step


@pytest.mark.parametrize("mode", ["all", "any"])
@pytest.mark.parametrize("unused", [False, True])
def test_hooks_of_several_tensors(mode, unused):
    """ "all" waits for those that this backward reaches, and gives None for the others."""

    def run(compiled: bool) -> list:
        x, y, seen = leaf(3), leaf(3), []

        def hook(gradients):
            gradients = [gradients] if mode == "any" else gradients
            seen.append([None if g is None else g * 1 for g in gradients])

        def step():
            x.grad = y.grad = None
            a, b, c = x * 2, y * 3, x * y
            register = torch.autograd.graph.register_multi_grad_hook
            handle = register((a, x, b, y, c), hook, mode=mode)
            (a * b if not unused else a).sum().backward(retain_graph=True)
            (a * c).sum().backward()
            if mode == "any":
                torch.autograd.grad((x * x).sum(), x)
            handle.remove()

        step = tracejit.compile(step) if compiled else step
        for _ in range(4):
            step()
        return [seen, x.grad, y.grad]

    ours, theirs = run(True), run(False)
    same(pictured(ours), pictured(theirs), mode)
    assert theirs[0]


@case("rerun")
def hooks_of_several_parameters(w):
    w.t, w.seen = Trainer(), []
    parameters = list(w.t.model.parameters())
    torch.autograd.graph.register_multi_grad_hook(
        parameters, lambda gradients: w.seen.extend([g.sum() for g in gradients])
    )
    return w.t.step


@case("refused: one of several results", says="one of several results")
def one_of_several_results(w):
    w.x = leaf(4)

    def step():
        a, b = (w.x * 2).chunk(2)
        a.register_hook(lambda g: g * 2)
        (a + b).sum().backward()

    return step


@case("refused: eager may write to other gradients", says="return a new tensor")
def writes_to_its_gradient(w):
    w.x = leaf(4)

    def step():
        y, z = w.x * 2, w.x * 3
        y.register_hook(lambda g: g.mul_(2))
        ((y + z) * w.x.detach()).sum().backward()

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.sweep(2)
def test_as_eager(name):
    check(CASES[name])


def test_hooks_of_several_leaves_and_autograd_grad():
    """Which eager does not take."""
    x, y = leaf(3), leaf(3)

    def step():
        with torch.autograd.graph.register_multi_grad_hook((x, y), print):
            return torch.autograd.grad((x * y).sum(), x)

    for run in (step, tracejit.compile(step)):
        with pytest.raises(RuntimeError, match=r"currently running autograd.grad"):
            run()


# ---- errors


def _double(g):
    return g.double()


def _sum(g):
    return g.sum()


def _number(g):
    return 3


@pytest.mark.parametrize(
    "hook, kind", [(_double, ShapeError), (_sum, ShapeError), (_number, TypeError)]
)
@pytest.mark.parametrize("on_leaf", [True, False])
def test_a_wrong_gradient_is_refused_as_in_eager(hook, kind, on_leaf):
    x = leaf(3)

    def step():
        y = x if on_leaf else x * 2
        handle = y.register_hook(hook)
        try:
            (y * 2).sum().backward()
        finally:
            handle.remove()

    with pytest.raises((RuntimeError, TypeError)) as theirs:
        step()
    with pytest.raises(kind) as ours:
        tracejit.compile(step)()
    assert str(theirs.value).partition(" value")[0] in str(ours.value)
    assert isinstance(ours.value, type(theirs.value)) and x.grad is None


def test_what_has_no_gradient_takes_no_hook():
    for register in (
        lambda x: (x.detach() * 2).register_hook(print),
        lambda x: x.detach().register_hook(print),
        lambda x: x.detach().register_post_accumulate_grad_hook(print),
        lambda x: (x * 2).register_post_accumulate_grad_hook(print),
    ):
        with pytest.raises(RuntimeError) as theirs:
            register(leaf(3))
        with pytest.raises(AutogradError) as ours:
            tracejit.compile(register)(leaf(3))
        assert str(theirs.value) in str(ours.value)


def test_hooks_of_a_step_that_fails_are_taken_off():
    x = leaf(3)

    def step():
        x.register_hook(lambda g: g * 2)
        x.register_post_accumulate_grad_hook(lambda p: None)
        (x * 2).sum().backward()
        raise ValueError

    with pytest.raises(ValueError):
        tracejit.compile(step)()
    assert not x._backward_hooks and not x._post_accumulate_grad_hooks and x.grad is None


def test_hooks_that_would_be_lost_after_the_step():
    x = leaf(3)

    def returned():
        y = x.detach().clone().requires_grad_()
        y.register_hook(lambda g: g * 2)
        return y

    with pytest.raises(SideEffectError, match="would lose them"):
        tracejit.compile(returned)()

    def intermediate():
        y = x * 2
        y.register_hook(lambda g: g * 2)
        return y.sum()

    loss = tracejit.compile(intermediate)()
    with pytest.raises(RuntimeError, match="hooks on intermediates.*inside the step"):
        loss.backward()
    assert x.grad is None


def test_hooks_on_parameters_run_in_a_backward_outside():
    def run(compiled: bool) -> torch.Tensor:
        x = leaf(3)
        x.register_hook(lambda g: g * 2)
        step = lambda: (x * x).sum()  # noqa: E731
        step = tracejit.compile(step) if compiled else step
        for _ in range(4):
            step().backward()
        return x.grad

    torch.testing.assert_close(run(True), run(False))


def test_the_whole_of_a_tensor_as_a_view():
    """It has a gradient of its own, without what reaches the tensor by another way."""

    def run(compiled, retain):
        x = leaf(3)

        def step():
            y = x * 2
            whole = y[:]
            whole.retain_grad() if retain else whole.register_hook(lambda g: g * 2)
            (whole * y).sum().backward()
            return whole.grad if retain else x.grad

        step = tracejit.compile(step) if compiled else step
        return [step().clone() for _ in range(3)], x.grad

    for retain in (True, False):
        torch.testing.assert_close(run(True, retain), run(False, retain))


def test_a_hook_outside_of_all_that_was_guarded():
    """The comparison with eager would see a hook that a replay ignores."""
    x = leaf(3)

    @tracejit.compile
    def step():
        x.grad = None
        (x * 2).sum().backward()

    for _ in range(4):
        step()
    assert step.stats.replays and x.grad.tolist() == [2.0] * 3
    handle = x.register_hook(lambda g: g * 5)
    for _ in range(4):
        step()
        assert x.grad.tolist() == [10.0] * 3
    handle.remove()
    replays = step.stats.replays
    step()
    assert x.grad.tolist() == [2.0] * 3 and step.stats.replays == replays + 1
    assert "_backward_hooks" in str(step.explain_retraces()) or step.explain_retraces()
