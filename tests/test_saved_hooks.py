"""Hooks on saved tensors in a step: each function under hooks that look, and under lossy ones.

What is packed, and what a backward asks for in which order, is eager's; so are gradients, also
where hooks give back other values than were saved. What cannot be so is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import tracejit
from support.function_checks import (
    is_in_place,
    is_logic_in_place,
    outcome,
    parameters,
    tensors_of,
    weights,
    writes_its_leaf,
)
from support.function_samples import Sample, each_function, samples_of
from support.function_samples_matrices import signless
from support.function_samples_random import draws
from support.oracle import call
from support.scope import sampled
from tracejit.capture.trace.table import function_name
from tracejit.errors import UnsupportedOperation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

hooked = torch.autograd.graph.saved_tensors_hooks
FUNCTIONS = [f for f in each_function() if not (draws(f) or is_logic_in_place(f))]


class Looking:
    """Hooks that note what they are given, and change nothing."""

    def __init__(self):
        self.seen: list[tuple] = []

    def pack(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        self.seen.append(("pack", tuple(x.shape), x.dtype, x.stride(), x.requires_grad))
        return x, len(self.seen)

    def unpack(self, packed: tuple[torch.Tensor, int]) -> torch.Tensor:
        self.seen.append(("unpack", packed[1]))
        return packed[0]


class Lossy:
    """Hooks that keep three bits of each number."""

    seen = ()

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 8).round() / 8 if x.is_floating_point() else x

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        return packed


def step_under(hooks: Looking | Lossy, function: Callable, sample: Sample) -> Callable:
    args, kwargs = sample.fresh()
    floats = [x for x in tensors_of(args) if x.is_floating_point()]
    if not writes_its_leaf(function, args, kwargs):
        for x in floats:
            x.requires_grad_()
    written, function = is_in_place(function), signless(function)

    def step():
        leaves = [x for x in tensors_of(args) if x.requires_grad]
        given = (args[0].clone(), *args[1:]) if written else args
        with hooked(hooks.pack, hooks.unpack):
            out = function(*given, **kwargs)
        outs = [x for x in tensors_of(given[0] if written else out) if x.is_floating_point()]
        roots = [x for x in outs if x.requires_grad]
        if not roots:
            return []
        cotangents = [weights(x).contiguous() for x in roots]
        return list(torch.autograd.grad(roots, leaves, cotangents, allow_unused=True))

    return step


def compare(function: Callable, sample: Sample, make: Callable) -> str:
    """How a sample ends: "equal" or "refused"; AssertionError where it is neither."""
    theirs, ours = make(), make()
    expected, error = outcome(step_under(theirs, function, sample))
    if error is not None:
        return "refused"
    got, error = outcome(lambda: call(step_under(ours, function, sample)))
    if isinstance(error, UnsupportedOperation):
        return "refused"
    if error is not None:
        raise AssertionError("raises") from error
    assert list(ours.seen) == list(theirs.seen), f"{ours.seen}\neager:\n{theirs.seen}"
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            where = b.abs() < 1e30
            loose = 2e-2 if b.dtype.itemsize == 2 else 1e-4
            torch.testing.assert_close(a[where], b[where], rtol=loose, atol=loose)
    return "equal"


@pytest.mark.parametrize("function", parameters(FUNCTIONS))
@pytest.mark.sweep(12)
def test_each_function(function: Callable):
    failures = []
    for i, sample in enumerate(samples_of(function)):
        if sample.refused or is_in_place(function) and isinstance(sample.args[0], list):
            continue  # lists of leaves, which eager does not let be written to
        if i and not sampled(f"{function_name(function)} {i}", 5):
            continue
        for make in (Looking, Lossy):
            try:
                compare(function, sample, make)
            except AssertionError as error:
                failures.append(
                    f"{make.__name__} {function_name(function)}{sample}: {error!r:.600}"
                )
    assert not failures, "\n\n".join(failures)


# ---- whole steps


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.batch = nn.BatchNorm1d(3)

    def forward(self, x):
        h = functional.dropout(functional.gelu(self.norm(self.first(x))), 0.25, self.training)
        return self.batch(self.last(h))


Y = torch.tensor([0, 2, 1, 0, 2])


class Training:
    """A net, an optimizer, and hooks that count."""

    def __init__(self, net: Callable = Net):
        torch.manual_seed(0)
        self.net = net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.packed, self.bytes, self.unpacked = 0, 0, 0

    def pack(self, x):
        self.packed += 1
        self.bytes += x.numel() * x.element_size()
        return x

    def unpack(self, x):
        self.unpacked += 1
        return x

    def step(self, x, pack, unpack):
        self.optimizer.zero_grad()
        with hooked(pack, unpack):
            loss = functional.cross_entropy(self.net(x), Y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def told(self):
        return self.packed, self.bytes, self.unpacked


def lockstep(make: Callable[[], Training], step: Callable, calls: int = 7) -> tracejit.compile:
    """Calls of both from one seed, with other data in each; the compiled step."""
    ours, right = make(), make()
    compiled = tracejit.compile(lambda x: step(ours, x), on_unsupported="raise")
    for i in range(calls):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(i))
        results = []
        for run in (compiled, lambda x: step(right, x)):
            torch.manual_seed(i)
            results.append(run(x.clone()))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        assert ours.told() == right.told()
    for p, q in zip(ours.net.parameters(), right.net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    return compiled


def plain() -> Training:
    return Training(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))


def test_hooks_that_count_are_replayed():
    compiled = lockstep(Training, lambda w, x: w.step(x, w.pack, w.unpack), calls=9)
    assert compiled.stats.replays >= 3, compiled.explain_mode()


def to_half(x):
    return (x.half(), x.dtype) if x.is_floating_point() else (x, None)


def from_half(packed):
    x, dtype = packed
    return x if dtype is None else x.to(dtype)


def test_activations_in_half_precision():
    compiled = lockstep(plain, lambda w, x: w.step(x, to_half, from_half))
    assert compiled.stats.replays >= 3, compiled.explain_mode()


def test_parameters_stay_as_they_are():
    """A hook sees whether it is given a parameter."""

    def pack(x):
        return x if isinstance(x, nn.Parameter) or not x.is_floating_point() else x.bfloat16()

    def unpack(x):
        return x.float() if x.dtype is torch.bfloat16 else x

    compiled = lockstep(plain, lambda w, x: w.step(x, pack, unpack))
    assert compiled.stats.replays >= 3, compiled.explain_mode()


def test_quantized_activations():
    """Eight bits and a scale: what activation-compressed training keeps."""

    def pack(x):
        if not x.is_floating_point() or x.dim() < 2 or isinstance(x, nn.Parameter):
            return (x,)
        scale = x.abs().amax().clamp(min=1e-8) / 127
        return (x / scale).round().to(torch.int8), scale

    def unpack(packed):
        return packed[0] if len(packed) == 1 else packed[0].float() * packed[1]

    compiled = lockstep(plain, lambda w, x: w.step(x, pack, unpack))
    assert compiled.stats.replays >= 3, compiled.explain_mode()


def test_the_innermost_hooks_apply():
    def step(w, x):
        w.optimizer.zero_grad()
        with hooked(w.pack, w.unpack):
            h = w.net[0](x).relu()
            with hooked(lambda x: x, lambda x: x):
                h = w.net[1](h)
            with torch.autograd.graph.save_on_cpu():
                h = h.exp()
            loss = functional.cross_entropy(w.net[2](h), Y)
        loss.backward()
        w.optimizer.step()
        return loss.detach()

    lockstep(plain, step)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x * x
        ctx.save_for_backward(x, None, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, nothing, y = ctx.saved_tensors
        assert nothing is None
        return 2 * g * x + 0 * ctx.saved_tensors[2]


@pytest.mark.parametrize("lossy", [False, True])
def test_custom_functions(lossy):
    def step(w, x):
        w.optimizer.zero_grad()
        pack, unpack = (to_half, from_half) if lossy else (w.pack, w.unpack)
        with hooked(pack, unpack):
            loss = functional.cross_entropy(w.net[2](Square.apply(w.net[0](x))), Y)
        loss.backward()
        w.optimizer.step()
        return loss.detach()

    lockstep(plain, step)


def test_what_is_held_may_be_written_to():
    """With hooks autograd does not look at versions: what is unpacked is what counts."""

    def run(x):
        w = x.detach().requires_grad_()
        h = w * 2
        with hooked(lambda x: x, lambda x: x):
            y = (h * h).sum()
        with torch.no_grad():
            h.mul_(3)
        return torch.autograd.grad(y, w)

    def copied(x):
        w = x.detach().requires_grad_()
        h = w * 2
        with hooked(lambda x: x.clone(), lambda x: x):
            y = (h * h).sum()
        with torch.no_grad():
            h.mul_(3)
        return torch.autograd.grad(y, w)

    for step in (run, copied):
        x = torch.arange(5.0)
        torch.testing.assert_close(call(step, x), step(x))


def test_second_derivatives_go_on_past_the_hooks():
    def step(x):
        w = x.detach().requires_grad_()
        with hooked(lambda x: (x * 4).round() / 4, lambda x: x):
            y = (w * w.sin()).sum()
        (g,) = torch.autograd.grad(y, w, create_graph=True)
        return torch.autograd.grad((g * g).sum(), w)

    x = torch.linspace(-1, 1, 7)
    torch.testing.assert_close(call(step, x), step(x))


def test_a_backward_twice_unpacks_twice():
    def step(w, x):
        with hooked(w.pack, w.unpack):
            loss = functional.cross_entropy(w.net(x), Y)
        loss.backward(retain_graph=True)
        loss.backward()
        w.optimizer.step()
        w.optimizer.zero_grad()
        return loss.detach()

    lockstep(plain, step)


def test_random_numbers_stay_the_steps():
    """What eager saves for attention is asked of eager on the CPU, where its dropout draws."""

    def step(q):
        with hooked(lambda x: x, lambda x: x):
            y = functional.scaled_dot_product_attention(q, q, q, dropout_p=0.25)
        y.sum().backward()
        return torch.rand(2)

    compiled = tracejit.compile(step, on_unsupported="eager")
    for i in range(4):
        results = []
        for run in (compiled, step):
            torch.manual_seed(i)
            results.append(run(torch.randn(1, 2, 5, 4, requires_grad=True)))
        assert torch.equal(*results)


def test_errors_of_hooks_are_eagers():
    def not_a_tensor(x):
        with hooked(lambda x: x, lambda x: 3):
            y = (x * x).sum()
        y.backward()

    def written(x):
        with hooked(lambda x: x.mul_(2), lambda x: x):
            (x * 1).exp().pow(2).sum()

    for step, error in ((not_a_tensor, TypeError), (written, RuntimeError)):
        for run in (step, lambda x, step=step: call(step, x)):
            with pytest.raises(error, match="hook"):
                run(torch.ones(3, requires_grad=True))


def test_a_backward_after_the_step_is_told():
    step = tracejit.compile(hooked_loss)
    loss = step(torch.ones(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="hooks on saved tensors were active in the step"):
        loss.backward()


def hooked_loss(x):
    with hooked(lambda x: x, lambda x: x):
        return (x * x).sum()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.layer_norm(x, (3,)),
        lambda x: functional.scaled_dot_product_attention(x, x, x),
    ],
)
def test_what_cannot_be_eagers_is_refused(function):
    def step(x):
        with hooked(lambda x: x.half(), lambda x: x.float()):
            y = function(x).sum()
        y.backward()

    with pytest.raises(UnsupportedOperation, match="Hooks on saved tensors"):
        call(step, torch.randn(4, 3, requires_grad=True))
