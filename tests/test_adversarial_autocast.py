"""Autocast in and around steps that are called several times, with changes between the calls.

Each case is compared with eager after every call; see `support/worlds.py`. Its numbers are such
that products in bf16 and f16 come out alike however they are summed.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tracejit
from support.worlds import Case, check, setting, table
from tracejit.errors import UnsupportedOperation

CASES: dict[str, Case] = {}
case = table(CASES)
BF16, F16 = torch.bfloat16, torch.float16

X = torch.arange(-6.0, 6).reshape(3, 4) / 4


@pytest.fixture(autouse=True)
def modes():
    yield
    reset()


def reset():
    for device, dtype in (("cpu", BF16), ("cuda", F16)):
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(True)
    torch.clear_autocast_cache()


def auto(dtype=BF16, **options):
    return torch.autocast("cpu", dtype=dtype, **options)


class Small:
    """A linear layer, with weights that bf16 holds, and its training."""

    def __init__(self, **options):
        self.model = nn.Linear(4, 2, bias=False)  # eager rounds a product and its bias once
        with torch.no_grad():
            self.model.weight.copy_(torch.arange(8.0).reshape(2, 4) / 8)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=2.0**-7, **options)

    def train(self, loss, scaler=None):
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return loss.detach()


@case("replay", changes={4: setting(on=False), 7: setting(on=True)}, calls=11)
def autocast_by_a_flag(w):
    w.s, w.on = Small(), True

    def step():
        with auto(enabled=w.on):
            out = w.s.model(X)
        return out.dtype, w.s.train(out.float().sum())

    return step


@case("replay", changes={4: setting(dtype=F16), 7: setting(dtype=BF16)}, calls=11)
def precision_by_an_attribute(w):
    w.s, w.dtype = Small(), BF16

    def step():
        with torch.amp.autocast("cpu", w.dtype):
            out = w.s.model(X)
        return out, w.s.train(out.float().sum())

    return step


def around(device, enabled, dtype=None):
    """A change: autocast around the calls from now on."""

    def change(w):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype or torch.get_autocast_dtype(device))

    return change


AMBIENT = {
    3: around("cpu", True, BF16),
    6: around("cpu", True, F16),
    9: around("cpu", False),
    12: around("cpu", True, BF16),
}


@case("replay", changes=AMBIENT, calls=15)
def autocast_around_the_calls(w):
    w.m = nn.Linear(4, 2, bias=False).requires_grad_(False)
    with torch.no_grad():
        w.m.weight.copy_(torch.arange(8.0).reshape(2, 4) / 8)
    return lambda: (w.m(X), torch.is_autocast_enabled("cpu"), X @ X.t(), X.exp())


@case("replay", changes=AMBIENT, calls=15)
def gradients_under_autocast_around_the_calls(w):
    w.p = nn.Parameter(torch.arange(8.0).reshape(4, 2) / 8)

    def step():
        torch.clear_autocast_cache()
        w.p.grad = None
        out = (X @ w.p).float().sum()
        with torch.autocast("cpu", enabled=False):
            out.backward()
        return out.detach()

    return step


@case("replay", changes=AMBIENT, calls=15)
def regions_that_are_off_within_autocast_around_the_calls(w):
    def step():
        with torch.autocast("cpu", enabled=False):
            a = X @ X.t()
            with torch.autocast("cpu", enabled=True):
                b = X @ X.t()
        return a, b, X @ X.t()

    return step


@case("replay", changes={4: around("cpu", False, F16)}, calls=9)
def the_default_precision(w):
    def step():
        with torch.autocast("cpu"):
            return X @ X.t(), torch.get_autocast_dtype("cpu")

    return step


@case("replay", changes={4: lambda w: torch.set_autocast_cache_enabled(False)}, calls=9)
def the_cache_switched_off(w):
    w.p = nn.Parameter(torch.eye(4) / 2)

    def step():
        w.p.grad = None
        with auto():
            out = X @ w.p @ w.p
            on = torch.is_autocast_cache_enabled()
        out.float().sum().backward()
        return out.detach(), on

    return step


@case("replay")
def decorated_functions(w):
    w.s = Small()

    @torch.autocast("cpu", dtype=BF16)
    def forward(x):
        return w.s.model(x)

    @torch.amp.autocast("cpu", enabled=False)
    def loss_of(out):
        return out.float() @ out.float().t()

    def step():
        return w.s.train(loss_of(forward(X)).sum())

    return step


@case("replay")
def nested_regions(w):
    w.s = Small()

    def step():
        with auto():
            a = w.s.model(X)
            with auto(enabled=False):
                b = X @ X.t()
            with auto(cache_enabled=False):
                c = w.s.model(X) + 1
            d = torch.cat([a, c.float()])
        return a.dtype, b.dtype, d.dtype, w.s.train((a + c).float().sum() + d.sum())

    return step


@case("replay")
def autocast_for_a_gpu_that_is_not_there(w):
    def step():
        torch.set_autocast_enabled("cuda", True)
        try:
            return X @ X.t(), torch.is_autocast_enabled("cuda")
        finally:
            torch.set_autocast_enabled("cuda", False)

    return step


@case("replay", calls=9)
def a_cast_that_is_used_after_an_update_in_its_region(w):
    w.s = Small()

    def step():
        with auto():
            first = w.s.train(w.s.model(X).float().sum())
            second = w.s.model(X)  # with eager's old cast
        return first, second.detach()

    return step


class Cube(torch.autograd.Function):
    """As torch.amp's documentation writes functions that need float32."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x @ x.t() * x.sum()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad @ x


class Product(torch.autograd.Function):
    """Its products are in the precision of the region, also in backward."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.t(), x.t() @ grad


@case("replay", changes={4: setting(on=False)}, calls=9)
def custom_functions(w):
    w.on = True
    w.p, w.q = nn.Parameter(torch.eye(4) / 2), nn.Parameter(torch.ones(4, 4) / 4)

    def step():
        w.p.grad = w.q.grad = None
        with auto(enabled=w.on):
            out = Cube.apply(Product.apply(X @ w.p, w.q))
        out.sum().backward()
        return out.detach()

    return step


@case("replay", changes={5: setting(factor=float("inf")), 6: setting(factor=1.0)}, calls=11)
def scaled_gradients_with_a_skipped_step(w):
    w.s, w.factor = Small(momentum=0.5), 1.0
    w.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)

    def step():
        w.s.opt.zero_grad()
        with auto(F16):
            loss = w.s.model(X).float().sum() * w.factor
        w.scaler.scale(loss).backward()
        w.scaler.step(w.s.opt)
        w.scaler.update()
        return w.scaler.get_scale()

    return step


@case("replay")
def a_scaler_that_is_off(w):
    """As scripts have it where they train in float32."""
    w.s, w.scaler = Small(momentum=0.5), torch.amp.GradScaler("cpu", enabled=False)

    def step():
        loss = w.s.model(X).sum()
        w.scaler.scale(loss).backward()
        w.scaler.unscale_(w.s.opt)
        w.scaler.step(w.s.opt)
        w.scaler.update()
        w.s.opt.zero_grad()
        return loss.detach()

    return step


@case("replay", calls=9)
def accumulated_gradients(w):
    w.s = Small()

    def step():
        w.s.opt.zero_grad(set_to_none=False)
        for part in X.chunk(3):
            with auto():
                loss = w.s.model(part).float().sum() / 4
            loss.backward()
        w.s.opt.step()
        return loss.detach()

    return step


@case("refused: eager would go on using the old cast", says="under autocast and writes")
def an_update_under_autocast_around_the_call(w):
    w.s = Small()

    def step():
        with torch.autocast("cpu", enabled=False):  # so that backward is not the reason
            return w.s.train(loss)

    def whole():
        nonlocal loss
        loss = w.s.model(X).float().sum()
        return step()

    loss = None
    torch.set_autocast_enabled("cpu", True)
    return whole


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.sweep(2)
def test_autocast(name):
    check(CASES[name], reset)


def test_the_fallback_is_right_under_autocast_around_the_call():
    """A training loop within one region: eager's casts are those of the first call."""

    def losses(how):
        torch.manual_seed(0)
        s = Small()
        step = how(lambda: s.train(s.model(X).float().sum()))
        with auto():
            return [step() for _ in range(4)]

    eager = losses(lambda step: step)
    with pytest.warns(tracejit.errors.TracejitWarning, match="autocast"):
        ours = losses(lambda step: tracejit.compile(step, on_unsupported="eager"))
    assert ours == eager
    s = Small()
    step = tracejit.compile(lambda: s.train(s.model(X).float().sum()), on_unsupported="eager")
    with auto(), pytest.warns(tracejit.errors.TracejitWarning, match="autocast"):
        for _ in range(3):
            step()
    assert step.stats.eager == 3
    for _ in range(4):
        step()
    assert step.stats.eager == 3  # calls without autocast are of another kind
    with pytest.raises(UnsupportedOperation, match="autocast around the forward pass"):
        losses(lambda step: tracejit.compile(step, on_unsupported="raise"))
