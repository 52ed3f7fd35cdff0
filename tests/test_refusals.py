"""What a compiled step refuses, each with the function, the user's line and a remedy; and what it
only seems to have to refuse."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad

import tracejit
from support.oracle import call
from tracejit.errors import TracejitError, UnsupportedOperation

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # TorchScript, quantization
]

X = torch.linspace(-1, 2, 9).reshape(3, 3)


def refusal(step: Callable, *args: torch.Tensor) -> str:
    """The message of the refusal, which names this file's line; all is left as it was."""
    plain = [a for a in args if a.layout is torch.strided and not (a.is_meta or a.is_quantized)]
    before = [a.clone() for a in plain]
    with pytest.raises(UnsupportedOperation) as caught:
        tracejit.compile(step)(*args)
    text = caught.value.text
    assert re.match(rf"{re.escape(__file__)}:\d+: \S+.* is not supported inside a compiled", text)
    assert re.search(r"\)\. \S.*\.$", text, re.DOTALL), f"no remedy: {text}"
    assert re.search(r"^    \S.*\n +\^+$", str(caught.value)[len(text) + 1 :]), str(caught.value)
    assert all(torch.equal(now, then) for now, then in zip(plain, before, strict=True))
    return text


# --- kinds of tensors -------------------------------------------------------------------------

KINDS = {
    "a complex leaf": (
        lambda: torch.ones(3, dtype=torch.complex64, requires_grad=True),
        "complex tensor that requires a gradient",
    ),
    "sparse": (lambda: X.to_sparse(), "dense strided"),
    "sparse rows": (lambda: X.to_sparse_csr(), "dense strided"),
    "quantized": (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), "dense strided"),
    "meta": (lambda: torch.ones(3, device="meta"), "meta is not supported"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_given(kind):
    make, said = KINDS[kind]
    assert said in refusal(lambda x: x * 2, make())


@pytest.mark.skipif(not hasattr(torch.Tensor, "rename"), reason="this torch has no named tensors")
def test_named_tensors():
    assert "named" in refusal(lambda x: x * 2, torch.ones(3).rename("a"))
    refusal(lambda x: x.rename("a"), torch.ones(3))


MADE = {
    "complex halves": lambda x: torch.complex(x.half(), x.half()),
    "fft": lambda x: torch.fft.fft(x),
    "a cast to complex": lambda x: x.to(torch.complex64),
    "complex numbers from a list": lambda x: torch.tensor([1j]),
    "to_sparse": lambda x: x.to_sparse(),
    "sparse_coo_tensor": lambda x: torch.sparse_coo_tensor(x[:1].long(), x[0], (3,)),
    "quantize": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("what", MADE)
def test_tensors_made_inside(what):
    refusal(MADE[what], X)
    refusal(lambda x: MADE[what](x + 1), X)


# --- code that a trace cannot see into --------------------------------------------------------


@torch.jit.script
def scripted(x: torch.Tensor):
    return x * 2


def script_modules() -> list[torch.nn.Module]:
    model = torch.nn.Linear(3, 3)
    return [torch.jit.script(model), torch.jit.trace(model, X)]


def test_torchscript():
    said = "call the Python function that was scripted"
    assert said in refusal(lambda x: scripted(x), X)
    assert said in refusal(lambda x: scripted(x + 1), X)
    for module in script_modules():
        assert said in refusal(lambda x, module=module: module(x), X)
        assert said in refusal(lambda x, module=module: module(x * 2).sum().backward(), X)
        module(X)  # as ever outside a step
    assert torch.equal(scripted(X), X * 2)
    with pytest.raises(TypeError, match="not ScriptFunction"):
        tracejit.compile(scripted)


@pytest.fixture(scope="module")
def one_process():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=distributed.HashStore(), pg_options=None
    )
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    """What it would average after the step; see test_data_parallel for what has a rule."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
    assert "call backward inside the step" in refusal(lambda x: model(x), X)
    tracejit.compile(lambda x: model(x).sum().backward())(X)
    assert model.module.weight.grad is not None
    model.register_comm_hook(None, lambda state, bucket: None)
    assert "a communication hook" in refusal(lambda x: model(x + 1).sum().backward(), X)


def differentiates_what_is_reduced(x):
    w = x.clone().requires_grad_()
    y = w * 2
    torch.distributed.all_reduce(y)
    y.sum().backward()


def test_collectives(one_process):
    """What has no rule, and what no plan could do again."""
    distributed = torch.distributed
    for step, remedy in (
        (lambda x: distributed.send(x, 0), "Messages between two ranks have no rule"),
        (lambda x: distributed.recv(x, 0), "send and receive outside the step"),
        (lambda x: distributed.isend(x, 0).wait(), "such as broadcast"),
        (lambda x: distributed.irecv(x, 0).wait(), "such as broadcast"),
        (lambda x: distributed.group.WORLD.allreduce([x]), "one tensor at a time"),
        (differentiates_what_is_reduced, "torch.distributed.nn.functional"),
        (lambda x: distributed.all_reduce(x, async_op=True).get_future(), "call wait()"),
    ):
        assert remedy in refusal(step, X)


def test_sharded_modules(one_process):
    """FSDP2 is refused before its hooks change anything: the module still runs eagerly."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("torch without FSDP2")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    plain = torch.nn.Linear(3, 3)
    model = copy.deepcopy(plain)
    fsdp.fully_shard(model, mesh=mesh)
    x = torch.ones(2, 3)

    def step(x):
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        said = refusal(step, x)
        assert "fully_shard" in said and "DTensors" in said and "ZeroRedundancyOptimizer" in said
        before = torch.autograd.grad(plain(x).square().sum(), plain.weight)[0]
        model.zero_grad()
        step(x)
        torch.testing.assert_close(model.weight.grad.full_tensor(), before)
    weight = model.weight
    said = refusal(lambda x: weight * 2, x)
    assert "A DTensor has no rule" in said
    assert "DistributedDataParallel" in said
    compiled = tracejit.compile(step, on_unsupported="eager")
    with pytest.raises(tracejit.errors.CannotFallBack, match="fully_shard"):
        compiled(x)  # torch's wrapper of the hook has run, and may not run twice
    assert torch.equal(compiled(x), step(x)) and compiled.stats.eager == 1
    assert "fully_shard" in compiled.explain_mode()


def pushed(x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(forward_ad.make_dual(x, x).sin()).tangent


TRANSFORMS = {
    "linearize": lambda x: torch.func.linearize(torch.sin, x)[0],
    "functionalize": lambda x: torch.func.functionalize(torch.sin)(x),
    "forward mode": pushed,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    refusal(TRANSFORMS[name], X)
    refusal(lambda x: TRANSFORMS[name](x * 2), X)


# --- hooks ------------------------------------------------------------------------------------


def hooked(*registered: str) -> torch.nn.Module:
    model = torch.nn.Linear(3, 3)
    hooks = {"forward": lambda module, args, out: out * 2, "forward_pre": lambda module, args: None}
    for name in registered:
        hook = hooks.get(name, lambda module, *rest: None)
        getattr(model, f"register_{name}_hook")(hook)
    return model


@pytest.mark.parametrize("also", [(), ("forward",), ("forward", "forward_pre")], ids=str)
def test_old_backward_hooks_of_modules(also):
    model = hooked("backward", *also)
    said = refusal(lambda x: model(x).sum().backward(), X)
    assert "use register_full_backward_hook" in said
    assert model.weight.grad is None


def test_forward_hooks_run():
    model = hooked("forward", "forward_pre")
    step = tracejit.compile(lambda x: model(x).sum())
    for _ in range(4):
        torch.testing.assert_close(step(X).detach(), model(X).sum().detach())


# --- autograd as eager has it -----------------------------------------------------------------


def both(step: Callable, *shapes: tuple[int, ...]) -> None:
    """Equal returned values and gradients, on four calls."""
    ours = [torch.linspace(-1, 2, torch.Size(s).numel()).reshape(s) for s in shapes]
    theirs = [x.clone().requires_grad_() for x in ours]
    ours = [x.requires_grad_() for x in ours]
    compiled = tracejit.compile(step)
    for _ in range(4):
        torch.testing.assert_close(compiled(*ours), step(*theirs))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_retain_grad():
    def step(w):
        h = w.exp()
        h.retain_grad()
        (h * h).sum().backward()
        return h.grad, h.retains_grad, w.retains_grad

    both(step, (4,))


def test_requires_grad_in_the_step():
    def step(w):
        x = (w.detach() * 2).requires_grad_()
        (x * x * w).sum().backward()
        return x.grad, x.is_leaf, x.requires_grad

    both(step, (4,))

    def hooked(x):
        x.requires_grad_().register_hook(lambda g: g * 2)

    assert "A hook after requires_grad_()" in refusal(hooked, X.clone())


def test_grad_modes():
    def step(w):
        flags = [torch.is_grad_enabled()]
        with torch.no_grad():
            flags += [torch.is_grad_enabled(), (w * 2).requires_grad]
            with torch.enable_grad():
                flags += [torch.is_grad_enabled(), (w * 2).requires_grad]
        with torch.set_grad_enabled(False):
            flags.append(torch.is_grad_enabled())
        flags.append(torch.is_inference_mode_enabled())
        (w * w).sum().backward()
        return flags

    both(step, (4,))


@pytest.mark.parametrize("outer", [True, False])
def test_the_grad_mode_around_a_step(outer):
    step = tracejit.compile(lambda w: (torch.is_grad_enabled(), (w * 2).requires_grad))
    w = X.clone().requires_grad_()
    for _ in range(4):
        with torch.set_grad_enabled(outer):
            assert step(w) == (outer, outer)
        with torch.set_grad_enabled(not outer):
            assert step(w) == (not outer, not outer)


# --- compiled functions within compiled functions ---------------------------------------------


def test_nested_compiled_functions_are_inlined():
    inner = tracejit.compile(lambda x: (x * 2).tanh())
    twice = tracejit.compile(lambda x: inner(inner(x)))

    def step(w):
        loss = (twice(w) * inner(w)).sum()
        loss.backward()
        return loss.detach()

    outer = tracejit.compile(step)
    ours, theirs = (X.clone().requires_grad_() for _ in range(2))
    for _ in range(4):
        torch.testing.assert_close(outer(ours), step(theirs))
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert len(outer.plans[-1].launches) == 1


def test_a_nested_compiled_function_runs_nothing_of_its_own():
    inner = tracejit.compile(lambda x: x * 2)
    outer = tracejit.compile(lambda x: inner(x) + 1)
    for _ in range(4):
        assert torch.equal(outer(X), X * 2 + 1)
    assert inner.stats.traces == inner.stats.compiles == inner.stats.replays == 0
    assert inner.plans == [] and outer.stats.compiles == 1


def test_an_error_within_a_nested_function_names_its_line():
    inner = tracejit.compile(lambda x: torch.linalg.eig(x))
    with pytest.raises(TracejitError, match=rf"{re.escape(os.path.basename(__file__))}:\d+"):
        tracejit.compile(lambda x: inner(x + 1))(X)


def test_a_refusal_is_the_same_through_the_oracle():
    with pytest.raises(UnsupportedOperation, match="scripted"):
        call(lambda x: scripted(x), X)
