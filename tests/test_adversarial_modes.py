"""The modes around a step, the memory of its tensors, threads, copies, and calls that fail.

Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import tracejit
from support.worlds import Case, Trainer, X, Y, check, on_trainer, picture, same, table, trainer
from tracejit.capture.trace.tensor import TracedTensor

CASES: dict[str, Case] = {}
case = table(CASES)


@pytest.fixture(autouse=True)
def modes():
    yield
    reset()


def reset():
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.mha.set_fastpath_enabled(True)
    torch.backends.opt_einsum.enabled = torch.backends.opt_einsum.is_available()


def switch(function, *values):
    """Set a mode of torch before these calls."""
    return {3 * (i + 1): lambda w, v=v: function(v) for i, v in enumerate(values)}


@case("replay", changes=switch(torch.set_grad_enabled, False, True), calls=10)
def grad_mode(w):
    w.x = x = torch.ones(3, requires_grad=True)
    return lambda: (x * 2).requires_grad


@case("replay", changes=switch(torch.set_default_dtype, torch.float64), calls=8)
def default_dtype(w):
    return lambda: torch.ones(3) / 2 + torch.arange(3) / 2


@case("replay", changes=switch(torch.set_float32_matmul_precision, "high"), calls=8)
def matmul_precision(w):
    return lambda: X @ X.t()


@case("replay", changes={4: lambda w: setattr(w, "on", False)}, calls=9)
def grad_mode_by_a_flag(w):
    w.on = True
    w.x = x = torch.ones(3, requires_grad=True)

    def step():
        with torch.set_grad_enabled(w.on):
            y = x * 2
        return y.requires_grad, y.detach()

    return step


@case("replay", changes={4: lambda w: w.t.model.train(False)}, calls=9)
def dropout_switched_off(w):
    w.t = Trainer()
    w.t.model[1] = nn.Dropout(0.0)
    return w.t.step


@case("replay")
def devices_as_contexts(w):
    w.device = device = torch.device("cpu")

    def step():
        with torch.device("cpu"):
            y = torch.ones(3) * 2
        with device:
            z = torch.arange(3.0) + torch.zeros(3, device="cpu")
        return y + z, torch.full((2,), 3.0)

    return step


@case("refused: it has no memory on the CPU", says="meta")
def another_device_as_a_context(w):
    def step():
        with torch.device("meta"):
            return torch.ones(3)

    return step


@case("refused: a mode is left on", says="default device")
def default_device_set_in_the_step(w):
    def step():
        torch.set_default_device("cpu")
        return torch.ones(3)

    return step


@case("replay")
def grad_modes_as_functions_and_decorators(w):
    w.x = x = torch.ones(3, requires_grad=True)

    @torch.no_grad()
    def frozen(y):
        return y * 3

    @torch.enable_grad()
    def learning(y):
        return y * 5

    @torch.inference_mode()
    def measured(y):
        return float(y.shape[0]), torch.is_inference_mode_enabled()

    @torch.set_grad_enabled(False)
    def switched(y):
        return y * 7

    def step():
        x.grad = None
        torch.set_grad_enabled(False)
        y = learning(x) + frozen(x)
        torch.set_grad_enabled(True)
        z = learning(x) + frozen(x) + switched(x)
        z.sum().backward()
        return y.requires_grad, z.detach(), measured(x)

    return step


@case("replay")
def evaluated_in_inference_mode(w):
    w.t = Trainer()

    def step():
        loss = w.t.step()
        with torch.inference_mode():
            inner = w.t.model(X)
            flags = inner.is_inference(), inner.requires_grad, X.is_inference()
        with torch.inference_mode(), torch.inference_mode(False):
            copied = inner.clone()
        return loss, flags, copied.is_inference(), copied * 2

    return step


@case("refused: it would be an ordinary tensor", says="made in inference mode")
def returned_from_inference_mode(w):
    def step():
        with torch.inference_mode():
            return X * 2

    return step


@case("replay")
def contexts_that_change_nothing(w):
    w.x = x = torch.linspace(0.5, 2, 12).reshape(3, 4).requires_grad_()

    def step():
        x.grad = None
        with contextlib.nullcontext(), torch.autocast("cpu", enabled=False):
            y = x * 2
        with torch.autograd.graph.save_on_cpu(), torch.profiler.record_function("part"):
            y = y.exp() * x
        with torch.backends.cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            y = y + x
        with torch.autograd.set_detect_anomaly(False):
            y.sum().backward()
        return y.detach()

    return step


def _fused_attention(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The layout of its result is the query's; without the fused implementation it is row-major."""
    y = nn.functional.scaled_dot_product_attention(x, x, x)
    return y, y.stride()


@case("replay", changes=switch(torch.backends.cuda.enable_flash_sdp, False), calls=9)
def implementations_of_attention(w):
    w.x = x = torch.linspace(-1, 1, 24).reshape(1, 4, 2, 3).transpose(1, 2)
    return lambda: _fused_attention(x)


@case("replay")
def an_implementation_of_attention_in_the_step(w):
    w.x = x = torch.linspace(-1, 1, 24).reshape(1, 4, 2, 3).transpose(1, 2)

    def step():
        with sdpa_kernel(SDPBackend.MATH):
            inside = _fused_attention(x)
        return inside, _fused_attention(x)

    return step


@case("replay", changes=switch(torch.backends.mha.set_fastpath_enabled, False), calls=9)
def native_attention_of_modules(w):
    torch.manual_seed(0)
    w.module = nn.TransformerEncoderLayer(4, 2, 3, batch_first=True).eval()
    x, blind = torch.linspace(-1, 1, 24).reshape(2, 3, 4), torch.tensor([[True] * 3, [False] * 3])

    def step():
        with torch.no_grad():
            return w.module(x, src_key_padding_mask=blind)

    return step


def _order_products(by_cost: bool) -> None:
    torch.backends.opt_einsum.enabled = by_cost


@case("replay", changes=switch(_order_products, False), calls=9)
def the_order_of_products(w):
    """By cost the result's memory has another order of axes."""
    a, b, c = (torch.linspace(-1, 1, m * n).reshape(m, n) for m, n in ((5, 4), (4, 3), (5, 3)))

    def step():
        y = torch.einsum("ab,bc,ac->bca", a, b, c)
        return y, y.stride()

    return step


@case("replay", changes=switch(torch.set_float32_matmul_precision, "medium"), calls=9)
def precision_set_in_the_step(w):
    def step():
        torch.set_float32_matmul_precision("high")
        return X @ X.t(), torch.get_float32_matmul_precision()

    return step


@case("rerun")
def forked_generators_and_profilers(w):
    w.x = x = torch.ones(3, requires_grad=True)

    def step():
        x.grad = None
        with torch.random.fork_rng(devices=[]), torch.autograd.profiler.profile(use_kineto=False):
            (x * 3).sum().backward()
        return torch.initial_seed()

    return step


@case("replay")
def saved_tensors_packed(w):
    w.x = x = torch.ones(3, requires_grad=True)

    def step():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
            (x * x).sum().backward()

    return step


@case("refused: a backward does not look for NaN", says="look for NaN")
def anomalies_looked_for_in_the_step(w):
    w.x = x = torch.ones(3, requires_grad=True)

    def step():
        with torch.autograd.set_detect_anomaly(True):
            x.sqrt().mul(x).sum().backward()

    return step


@case("refused: there are no rules for tangents", says="make_dual|forward")
def forward_mode_in_the_step(w):
    def step():
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(forward_ad.make_dual(X, X) * 2).tangent

    return step


# ---- memory


@case("replay", changes={4: lambda w: setattr(w.x, "data", w.x.data.t().contiguous().t())}, calls=9)
def strides_changed(w):
    w.x = x = torch.arange(6.0).reshape(2, 3)
    return lambda: x * 2


@case("replay", changes={4: lambda w: setattr(w.x, "data", w.y.data)}, calls=9)
def two_tensors_share_memory_later(w):
    w.x, w.y = torch.ones(3), torch.ones(3)

    def step():
        w.x.add_(1.0)
        return w.y * 2

    return step


@case("replay", changes={4: lambda w: setattr(w.y, "data", torch.full((3,), 7.0))}, calls=9)
def two_tensors_part_later(w):
    w.x = torch.ones(3)
    w.y = w.x.detach()

    def step():
        w.x.add_(1.0)
        return w.y * 2

    return step


@case("replay", changes={4: lambda w: w.x.resize_(2, 3)}, calls=9)
def tensor_resized(w):
    w.x = x = torch.ones(6)
    return lambda: x * 2


@case("replay", changes={4: lambda w: setattr(w.x, "data", w.x.data.double())}, calls=9)
def dtype_of_data_changed(w):
    w.x = x = torch.ones(6)
    return lambda: x * 2


@case("replay", changes={4: lambda w: setattr(w.x, "requires_grad", True)}, calls=9)
def constant_becomes_a_parameter(w):
    w.x = x = torch.ones(3)

    def step():
        y = (x * 2).sum()
        if y.requires_grad:
            y.backward()
        return y.detach()

    return step


@case("replay", changes={4: lambda w: setattr(w.x, "grad", None)}, calls=9)
def missing_gradient_asked_for(w):
    w.x = x = torch.ones(3, requires_grad=True)
    x.grad = torch.ones(3)
    return lambda: X.sum() * (1 if x.grad is None else 2)


@case("replay", args=lambda i: (torch.full((3,), float(i)),))
def result_that_is_an_argument(w):
    return lambda x: (x, x.view(3, 1), x + 1)


@case("replay", backend="c")
def views_and_aliases_returned(w):
    w.x = x = torch.arange(6.0)

    def step():
        y = x * 2
        return y, y.view(2, 3), y[::2], x, x.view(3, 2).t()

    return step


@case(
    "replay",
    changes={
        3: lambda w: setattr(w.x, "data", torch.full((3,), 5.0)),
        5: lambda w: w.x.data.mul_(10.0),
        7: lambda w: setattr(w.x, "data", torch.full((2, 2), 5.0)),
    },
    calls=12,
    backend="c",
)
def data_edited_and_replaced(w):
    w.x = x = torch.ones(3)

    def step():
        x.add_(1.0)
        return x * 2

    return step


@case("replay")
def views_kept_between_calls(w):
    w.x = torch.ones(6)

    def step():
        w.part = w.x[:3]
        w.x.add_(1.0)
        return w.part.sum()

    return step


# ---- modules made in the step


@case("replay")
def layer_made_lazily(w):
    class Lazy(Trainer):
        def loss(self, x, y):
            if not hasattr(self, "gain"):
                self.gain = 2.0
            self.gain = self.gain + 1.0
            return super().loss(x, y) * self.gain

    w.t = Lazy()
    return w.t.step


@case("replay")
def cache_filled_once(w):
    class Lazy(Trainer):
        table = None

        def loss(self, x, y):
            if self.table is None:
                self.table = [i * 2.0 for i in range(3)]
            return super().loss(x, y) * self.table[1]

    w.t = Lazy()
    return w.t.step


@case("replay")
def mask_cached_once(w):
    w.masks = masks = {}

    def step():
        if 3 not in masks:
            masks[3] = torch.ones(3, 3).tril()
        return X[:3, :3] * masks[3]

    return step


@case("replay", backend="c", changes={3: on_trainer(lambda t: t.model[0].requires_grad_(False))})
def frozen_on_the_c_backend(w):
    return trainer(w, momentum=0.9)


@case("replay", backend="c", changes={3: on_trainer(lambda t: setattr(t, "weight", 3.0))})
def attribute_on_the_c_backend(w):
    return trainer(w)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.sweep(2)
def test_modes(name):
    check(CASES[name], reset)


def around(mode):
    """A step called before, inside and after a mode of its caller: the modes that are refused."""
    step = tracejit.compile(lambda: X @ X.t(), backend="numpy")
    for _ in range(4):
        step()
    with mode, pytest.raises(tracejit.errors.TracejitError) as caught:
        step()
    found = step()
    assert found.dtype is torch.float32 and not found.is_inference()
    return caught.value


def test_inference_mode_around_the_call_is_refused():
    error = around(torch.inference_mode())
    assert type(error) is tracejit.errors.SideEffectError and "inference" in str(error)


def test_anomaly_mode_around_the_call_is_refused():
    error = around(torch.autograd.detect_anomaly(check_nan=False))
    assert type(error) is tracejit.errors.SideEffectError and "look for NaN" in str(error)
    assert not torch.is_anomaly_enabled()


def test_forward_mode_around_the_call_is_refused():
    error = around(forward_ad.dual_level())
    assert type(error) is tracejit.errors.SideEffectError and "tangents" in str(error)


# ---- several steps, threads, copies


def test_two_steps_of_the_same_world():
    """A training step and an evaluation step, in turn, over one model."""

    def run(compiled):
        torch.manual_seed(0)
        t = Trainer(momentum=0.9)
        train, measure = t.step, lambda: t.loss(X, Y).detach()
        if compiled:
            train, measure = (tracejit.compile(f, backend="numpy") for f in (train, measure))
        seen = [picture((train(), measure(), t)) for _ in range(10)]
        return seen, (train, measure)

    (theirs, _), (ours, steps) = run(False), run(True)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        same(a, b, f"call {i}")
    assert all(step.stats.replays >= 6 for step in steps)


def test_threads_call_one_step():
    """Each of 60 calls takes its turn: the sum of updates is eager's."""
    total = torch.zeros(3)
    step = tracejit.compile(lambda x: total.add_(x), backend="numpy")

    def work():
        for _ in range(15):
            step(torch.ones(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total.tolist() == [60.0] * 3 and step.stats.replays > 50


@tracejit.compile(backend="numpy")
def decorated(x, gain=2.0):
    return x * gain


class Stepper:
    def __init__(self):
        self.t = Trainer()
        self.step = tracejit.compile(self.t.step, backend="numpy")


def test_compiled_steps_are_pickled_and_copied():
    """A decorated function by its name; a compiled method with its object, without plans."""
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    assert copy.deepcopy(decorated) is decorated
    first = Stepper()
    for _ in range(4):
        first.step()
    second = copy.deepcopy(first)
    third = pickle.loads(pickle.dumps(first))
    for other in (second, third):
        assert other.step.stats.traces == 0 and other.step.options.backend == "numpy"
        weight = first.t.model[0].weight.clone()
        other.step()
        assert torch.equal(first.t.model[0].weight, weight)
    for _ in range(5):
        losses = {s.step().item() for s in (second, third)}
    assert len(losses) == 1 and second.step.explain_mode().startswith("replay")


# ---- calls that fail


class Stop(BaseException):
    pass


POINTS = ("forward", "backward", "update", "end")


class Fragile(Trainer):
    """Raises at one point of its step, after putting intermediates wherever users do."""

    def __init__(self):
        super().__init__(lr=0.1, momentum=0.9)
        self.error = self.point = self.hidden = None
        self.losses, self.by_name, self.nested = [], {"old": 1}, [(1, [2])]
        self.model.register_buffer("last", torch.zeros(3))
        self.namespace = SimpleNamespace(h=0.5)

    def at(self, point):
        if point == self.point:
            raise self.error

    def step(self):
        self.opt.zero_grad()
        hidden = self.model[0](X)
        self.hidden, self.namespace.h = hidden, hidden * 2
        self.by_name["old"], self.by_name["new"] = hidden.sum(), hidden.mean()
        self.model.last = hidden[0, :3].detach()
        self.nested.append((hidden, [hidden.detach()]))
        self.at("forward")
        loss = self.loss(X, Y)
        self.losses += [loss.detach()]
        loss.backward()
        self.at("backward")
        self.opt.step()
        self.at("update")
        with torch.no_grad():
            self.model[0].weight.mul_(0.9)
        self.at("end")
        return loss.detach()


def proxies() -> list[TracedTensor]:
    """Those that are alive."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is TracedTensor]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), Stop()])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("earlier", [0, 3])
@pytest.mark.sweep(4)
def test_an_exception_leaves_everything_as_it_was(error, point, earlier):
    torch.manual_seed(0)
    t, twin = Fragile(), Fragile()
    twin.model.load_state_dict(t.model.state_dict())
    step = tracejit.compile(t.step, backend="numpy")
    for _ in range(earlier):
        step()
        twin.step()
    before = picture(t.__dict__)
    left = proxies()  # by earlier tests: torch.func keeps the traceback of what is refused in it
    t.error, t.point = error, point
    with pytest.raises(type(error)) as caught:
        step()
    assert caught.value is error
    t.error = t.point = None
    same(picture(t.__dict__), before, f"after {point}")
    del caught
    error.__traceback__ = None
    assert not {*map(id, proxies())} - {*map(id, left)}
    for _ in range(3):
        step()
        twin.step()
    same(picture(t.model.state_dict()), picture(twin.model.state_dict()), "three calls later")


def test_a_failure_in_a_closure_variable_and_a_cycle():
    last, tree = 1.0, {"self": None}
    tree["self"] = tree

    def step(fail):
        nonlocal last
        last = X * 2
        tree["x"] = [last]
        if fail:
            raise ValueError
        return last.sum()

    compiled = tracejit.compile(step, backend="numpy")
    with pytest.raises(ValueError):
        compiled(True)
    assert last == 1.0 and list(tree) == ["self"]
    compiled(False)
    with pytest.raises(ValueError):
        compiled(True)
    assert torch.equal(last, X * 2) and torch.equal(tree["x"][0], X * 2)
