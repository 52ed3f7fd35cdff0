"""No false alarm: steps that are right, of which a verified call once said that they are not."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import examples
import tracejit
from support.faults import rule_of
from tracejit.capture.trace.active import current
from tracejit.errors import TracejitWarning, WrongResult
from tracejit.verify.verifier import Verifier


def verified(step: Callable, calls: int = 8, between: Callable | None = None, **options: object):
    """The certificate of some calls, none of which may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", TracejitWarning)
        step = tracejit.compile(step, **{"verify": 2, "backend": "numpy"} | options)
        for call in range(calls):
            if between is not None:
                between(call)
            step(torch.full((3,), 1.0 + call))
    certificate = step.certificate()
    assert certificate.holds and not certificate.withdrawn, certificate
    return step


class Record:
    """What a step keeps in tuples."""

    def __init__(self):
        self.n, self.best = 0, (0.5, 0)
        self.pairs = collections.deque([(0.0, 0)] * 3, maxlen=3)


def best_of_all(r: Record, x: torch.Tensor) -> torch.Tensor:
    loss = (x * 2.0).sum()
    r.best = min(r.best, (loss.item(), r.n))
    return loss


def last_pairs(r: Record, x: torch.Tensor) -> torch.Tensor:
    r.pairs.append((0.5 * r.n, r.n))
    return x * sum(a for a, _ in r.pairs)


def the_same_again(r: Record, x: torch.Tensor) -> torch.Tensor:
    r.best = (*r.best[:1], 0 * r.n)
    return x * r.best[0]


@pytest.mark.parametrize("change", [best_of_all, last_pairs, the_same_again])
def test_a_tuple_is_what_it_holds(change):
    """Eager keeps the tuple that was there, a replay makes an equal one."""
    r = Record()

    def step(x: torch.Tensor) -> torch.Tensor:
        r.n += 1
        return change(r, x)

    verified(step)


def test_another_tuple_is_found():
    """In one that is compared by what it holds."""
    from support.faults import in_run

    r = Record()

    def step(x: torch.Tensor) -> torch.Tensor:
        r.n += 1
        r.best = (0.5, r.n)
        return x * 2.0

    def wrong(function: Callable) -> Callable:
        def perform(*given: object) -> object:
            returned = function(*given)
            r.best = (0.5, -1)
            return returned

        return perform

    with in_run(wrong)():
        compiled = tracejit.compile(step, verify=2, backend="numpy", on_unsupported="eager")
        with pytest.warns(TracejitWarning, match=r"best.*-1, in eager"):
            for _ in range(8):
                compiled(torch.ones(3))
    assert r.best == (0.5, 8)


def test_the_place_of_a_mode_is_open():
    """Of rows of more than 16 elements eager's depends on how the C++ library sorts."""
    x = torch.arange(600).reshape(2, 300) % 7
    step = tracejit.compile(lambda x: x.mode(1), verify=2, backend="numpy")
    ours = tracejit.compile(lambda x: x.mode(1), verify=0)(x)[1]
    assert not torch.equal(x.mode(1).indices, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        for _ in range(6):
            values, places = step(x)
            assert torch.equal(values, x.mode(1).values)
            assert torch.equal(x.gather(1, places[:, None])[:, 0], values)
        step.verify(x)
    found = step.certificate()
    assert not found.withdrawn and step.stats.eager == 0 and step.stats.replays
    assert found.unverified == ["torch leaves open at which of equal elements it finds a mode"]


def test_a_build_computes_nothing_to_compare():
    """Its kernels are for a GPU that is not here; eager beside them would be another result."""
    pytest.importorskip("triton")
    step = tracejit.compile(lambda x: (x * 2.0).exp(), target="sm_90", verify=2)
    assert step.build(torch.randn(40, 3)).plans


def test_the_value_of_a_mode_is_not():
    x = torch.arange(600).reshape(2, 300) % 7
    step = tracejit.compile(lambda x: x.mode(1), verify=2, backend="numpy")
    fault = rule_of(torch.Tensor.mode, lambda own: lambda t, x, dim: own(t, x.flip(0), dim))
    with fault, pytest.raises(WrongResult, match="mode is computed otherwise than by eager"):
        step(x + torch.tensor([[0], [1]]))
    assert step.certificate().withdrawn


@pytest.mark.parametrize("name", ["igamma", "igammac"])
def test_eager_is_less_exact_near_the_bend_of_incomplete_gamma_functions(name):
    """So is torch's own float64, which is the measure. What is further off than that is found."""
    function = getattr(torch, name)
    a = torch.full((3,), 201.0, dtype=torch.float64)
    x = a * torch.tensor([0.97, 1.0, 1.03], dtype=torch.float64)
    step = tracejit.compile(lambda a, x: function(a, x), verify=2, backend="numpy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        ours = [step(a, x) for _ in range(4)][-1]
    assert 0.0 < (ours - function(a, x)).norm() < 1e-8 and step.stats.replays
    (why,) = step.certificate().unverified
    assert "is exact to 1e-08 only" in why and not step.certificate().withdrawn

    wrong = rule_of(function, lambda own: lambda t, a, x: own(t, a, x * (1.0 + 1e-6)))
    step = tracejit.compile(lambda a, x: function(a, x), verify=2, backend="numpy")
    with wrong, pytest.raises(WrongResult, match=f"{name} is computed otherwise than by eager"):
        step(a, x)
    assert step.certificate().withdrawn


def test_a_derivative_that_eager_lacks():
    """That of its fused attention's backward is not implemented."""

    def step(q: torch.Tensor) -> torch.Tensor:
        y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        (first,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    q = torch.randn(1, 2, 70, 8, dtype=torch.float64).requires_grad_()
    with pytest.raises(RuntimeError, match="is not implemented"):
        step(q)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        right = step(q)
    compiled = tracejit.compile(step, verify=2, backend="numpy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        for _ in range(3):
            torch.testing.assert_close(compiled(q), right)
    (why,) = compiled.certificate().unverified
    assert "eager cannot do it" in why and not compiled.certificate().withdrawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "running",
    [
        lambda x: x.cumsum(0),
        lambda x: (x / 4).cumprod(0),
        lambda x: x.logcumsumexp(0),
        lambda x: (x * 50).logcumsumexp(0),
        lambda x: (x * x).cummax(0).values,
        lambda x: (x * x).cummin(0).values,
    ],
)
def test_the_magnitudes_of_running_results(running, dtype):
    """Eager adds and multiplies in another order than ours."""

    def step(x: torch.Tensor) -> tuple:
        x = x.detach().requires_grad_()
        y = running(x)
        (g,) = torch.autograd.grad((y * y).sum(), x)
        return y.detach(), g

    compiled = tracejit.compile(step, verify=2, backend="numpy")
    x = torch.linspace(-2, 3, 333, dtype=dtype).sin() * 3
    for n in range(4):
        compiled(x * (1 + n / 7))
    assert compiled.certificate().verified and not compiled.certificate().unverified


def test_a_wrong_running_sum_is_found():
    """By its magnitude it is not right."""
    fault = rule_of(torch.cumsum, lambda own: lambda t, x, dim: own(t, x * (1 + 1e-5), dim))
    step = tracejit.compile(lambda x: x.cumsum(0), verify=2, backend="numpy")
    with fault, pytest.raises(WrongResult, match="differs from eager in what is returned"):
        step(torch.linspace(-2, 3, 333).sin())


def test_what_torch_keeps_on_a_function_of_its_own():
    """At the first call of one that Dynamo is not to look into."""
    checkpoint = torch.utils.checkpoint.checkpoint
    vars(checkpoint).pop("__dynamo_disable", None)
    run = functools.partial(checkpoint, use_reentrant=False)
    w = torch.ones(3, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(run(lambda x: (x * w).tanh(), x).sum(), w)[0]

    assert verified(step).certificate().verified


def test_a_step_is_saved_before_its_calls_are_verified(tmp_path):
    """The replay is asked what it would do, as it will be."""
    step = tracejit.compile(lambda x: torch.tanh(x) * 2.0, verify=1000, backend="c")
    x = torch.linspace(-1, 2, 5)
    for _ in range(4):
        step(x)
    step.save(tmp_path / "step.tracejit")
    assert torch.equal(tracejit.load(tmp_path / "step.tracejit")(x), step(x))


@pytest.mark.parametrize("method", ("append", "extend", "update", "add"))
def test_what_a_kept_method_of_a_container_changes_is_put_back(method):
    """`append = kept.append` leads to the list: eager's run beside the step is undone there too."""
    kept = {"append": [0], "extend": [0], "update": {0: 0}, "add": {0}}[method]
    change = getattr(kept, method)

    def step(x):
        change({"append": 0, "extend": [0], "update": {len(kept): 0}, "add": len(kept)}[method])
        return x * 2

    verified(step, calls=5)
    assert len(kept) == 6


def test_attributes_of_a_thread_are_put_back():
    own = threading.local()
    own.n = 0

    def step(x: torch.Tensor) -> torch.Tensor:
        own.n += 1
        return x * own.n

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        compiled = tracejit.compile(step, verify=2, backend="numpy")
        assert [compiled(torch.ones(())).item() for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]
    assert own.n == 4 and not compiled.certificate().withdrawn


GLOBAL = nn.modules.module
KINDS: dict[str, tuple[Callable, Callable]] = {
    "forward": (GLOBAL.register_module_forward_hook, lambda act: lambda m, args, y: act(y)),
    "before": (GLOBAL.register_module_forward_pre_hook, lambda act: lambda m, args: act(args[0])),
    "backward": (
        GLOBAL.register_module_full_backward_hook,
        lambda act: lambda m, of_in, of_out: act(of_out[0]),
    ),
    "before backward": (
        GLOBAL.register_module_full_backward_pre_hook,
        lambda act: lambda m, of_out: act(of_out[0]),
    ),
    "optimizer": (
        register_optimizer_step_post_hook,
        lambda act: lambda opt, args, kwargs: act(opt.param_groups[0]["params"][0]),
    ),
}


@contextlib.contextmanager
def hooked(kind: str, act: Callable):
    """Hooks of one kind on all modules or optimizers."""
    register, made = KINDS[kind]
    handle = register(made(act))
    try:
        yield
    finally:
        handle.remove()


def by_hooks(kind: str, *, compiled: bool):
    """Training steps in which a hook of the process counts, keeps and writes."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    seen, totals, mean = [], {"calls": 0}, torch.zeros(())

    def act(x: torch.Tensor) -> None:
        totals["calls"] += 1
        with torch.no_grad():
            mean.mul_(0.5).add_(x.sum() * totals["calls"])
            seen.append(x.clone())

    def step(x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    own = tracejit.compile(step, backend="numpy", verify=2) if compiled else step
    with hooked(kind, act), warnings.catch_warnings():
        warnings.simplefilter("error", TracejitWarning)
        losses = [own(torch.ones(3) * n).detach() for n in range(5)]
    return [*losses, *net.parameters(), mean, *seen], totals, own


@pytest.mark.parametrize("kind", KINDS)
def test_what_hooks_of_the_process_change_is_put_back(kind):
    """torch calls them in a step that names none of them."""
    want, totals, _ = by_hooks(kind, compiled=False)
    found, counted, step = by_hooks(kind, compiled=True)
    assert counted == totals == {"calls": 5} and step.certificate().verified
    assert not step.certificate().unverified
    torch.testing.assert_close(found, want)


def test_what_hooks_of_the_process_keep_is_compared():
    totals = {"calls": 0}

    def act(x: torch.Tensor) -> None:
        totals["calls"] += 1 if current() is None else 2  # another number in a trace

    net = nn.Linear(3, 2)
    with hooked("forward", act):
        step = tracejit.compile(lambda x: net(x).sum(), verify=2, backend="numpy")
        with pytest.raises(WrongResult, match=r"calls.*2, in eager 1"):
            step(torch.ones(3))
    assert totals == {"calls": 0}


def test_steps_that_a_step_calls_are_its_python_in_eager():
    """Else a wrong plan of theirs would be compared with itself."""
    inner = tracejit.compile(lambda x: torch.tanh(x) * 2.0, verify=0, backend="numpy")
    outer = tracejit.compile(lambda x: inner(x).sum(), verify=2, backend="numpy")
    x = torch.linspace(-1, 2, 5)
    fault = rule_of(torch.tanh, lambda own: lambda t, x: own(t, x * 0.5))
    with fault, pytest.raises(WrongResult, match="tanh is computed otherwise than by eager"):
        outer(x)
    assert inner.stats.traces == 0 and outer.certificate().withdrawn
    torch.testing.assert_close(inner(x), torch.tanh(x) * 2.0)
    assert inner.stats.traces == 1  # it is a step of its own afterwards


IMAGES = {"images": 16, "batch": 4, "width": 2, "epochs": 1}
EXAMPLES: dict[str, dict[str, int]] = {
    "alexnet": IMAGES | {"size": 64},
    "classifier": {"steps": 6},
    "custom_relu": {"steps": 6},
    "demo": {"steps": 20},
    "fused_chain": {"steps": 4, "n": 10_001},
    "gpt": {"steps": 8, "batch": 4, "layers": 1, "width": 16},
    "loss_outside": {"steps": 6},
    "mnist_cnn": IMAGES | {"size": 12},
    "modules": {"steps": 6},
    "recurrence": {"steps": 6},
    "resnet_finetune": IMAGES | {"size": 12},
    "save_and_load": {"steps": 6},
    "static_graph": {"steps": 6},
    "transformer_block": {"steps": 3},
    "two_layer_autograd": {"steps": 6},
    "two_layer_manual": {"steps": 6},
    "unet": IMAGES | {"size": 16},
    "vgg16": IMAGES | {"size": 32},
}
QUICK = {"demo", "loss_outside", "recurrence"}
RANKS = {"data_parallel"}  # other processes take part in its steps, which are not compared
PARTS = {"images", "__init__"}  # of other examples


def test_every_example_is_listed():
    names = {path.stem for path in Path(examples.__path__[0]).glob("*.py")}
    assert names - PARTS - RANKS == EXAMPLES.keys()


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EXAMPLES]
)
def test_an_example_to_its_end(name, monkeypatch, capsys):
    """A difference would be raised."""
    verifiers: list[Verifier] = []
    own = Verifier.__init__

    def init(self, step, *args, **kwargs):
        own(self, step, *args, **kwargs)
        verifiers.append(self)

    monkeypatch.setattr(Verifier, "__init__", init)
    monkeypatch.setenv("TRACEJIT_VERIFY_CALLS", "2")
    importlib.import_module(f"examples.{name}").main(**EXAMPLES[name])
    certificates = [verifier.certificate for verifier in verifiers]
    assert not any(found.withdrawn for found in certificates)
    assert any(found.verified for found in certificates), [c.unverified for c in certificates]
