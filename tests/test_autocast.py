"""Autocast: which arguments each function casts, as the running torch does, and whole programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tracejit
from support.capture_checks import same
from support.function_checks import (
    assert_close,
    outcome,
    parameters,
    step_of,
    tensors_of,
)
from support.function_samples import Sample, bare_name, each_function, samples_of
from support.function_samples_matrices import signless
from support.oracle import call, traced
from support.scope import WHOLE, sampled
from tracejit.capture.trace.autocast import POLICIES
from tracejit.capture.trace.posing import posing
from tracejit.capture.trace.table import RULES, function_name, spellings
from tracejit.errors import UnsupportedOperation
from tracejit.testing import assert_equal_to_eager

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # eager's deprecations

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHIFTS = {"as given": {}, "wide": {F64: F32}, "narrow": {F64: BF16, F32: BF16}}
LISTED = {f for policies in POLICIES.values() for f in policies}


def under(function: Callable, device: str, dtype: torch.dtype) -> Callable:
    """The function, called under autocast."""

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        with torch.autocast(device, dtype):
            return function(*args, **kwargs)

    return run


def moved(x: object, dtypes: dict, device: str = "cpu") -> object:
    """A sample's argument with other dtypes."""
    if isinstance(x, torch.Tensor):
        made = x.to(dtypes.get(x.dtype, x.dtype))
        return made if device == "cpu" else torch.empty_like(made, device=device)
    if type(x) in (list, tuple):
        return type(x)([moved(item, dtypes, device) for item in x])
    return {k: moved(v, dtypes, device) for k, v in x.items()} if type(x) is dict else x


def some_samples(function: Callable) -> list[Sample]:
    samples = [s for s in samples_of(function) if not s.refused]
    if WHOLE:
        return samples[:9]
    return samples[:1] if function in LISTED or sampled(function_name(function), 12) else []


OF_CPU = [f for f in each_function() if some_samples(f)]


@pytest.mark.parametrize("function", parameters(OF_CPU))
@pytest.mark.sweep(3)
def test_casts_on_the_cpu(function):
    """Dtypes and values of results, and of the gradients of functions that are listed."""
    cast = under(signless(function), "cpu", BF16)
    for sample in some_samples(function):
        for shift in SHIFTS.values():
            given = Sample(*(moved(x, shift) for x in (sample.args, sample.kwargs)))
            if function in LISTED:
                results = [outcome(how, step_of(cast, given)) for how in (lambda s: s(), call)]
            else:
                results = []
                for how in (lambda s: s(), call):
                    args, kwargs = given.fresh()
                    results.append(outcome(how, lambda a=args, k=kwargs: cast(*a, **k)))
            (theirs, error), (ours, our_error) = results
            if error is not None:
                assert our_error is not None, f"eager raises {error!r} of {given}"
                continue
            if isinstance(our_error, UnsupportedOperation) and says_so(function):
                continue
            assert our_error is None, f"{given}: {our_error!r}"
            pairs = list(zip(tensors_of(ours), tensors_of(theirs), strict=True))
            ulps = 32 if function in LISTED or is_recurrent(function) else 8  # of gradients too
            for mine, his in pairs:
                alike = mine.stride() == his.stride() or function in LISTED
                assert alike, f"{given}: {mine.stride()} {his.stride()}"
                assert_close(mine, his, exact=False, what=str(given), eps=2**-8, ulps=ulps)


def is_recurrent(function: Callable) -> bool:
    return RULES[function].family == "recurrent"


def says_so(function: Callable) -> bool:
    """Whether a function is one of those that are refused under autocast, or of bf16."""
    return bare_name(function) in REFUSED


REFUSED = {"lstm", "rrelu", "rrelu_", "_foreach_mm", "matrix_exp", "linalg_matrix_exp"}
REFUSED |= {"histogramdd"}
REFUSED_ON_GPUS = {"pairwise_distance", "rnn_tanh", "rnn_relu", "lstm", "gru"}
REFUSED_ON_GPUS |= {"binary_cross_entropy", "triplet_margin_with_distance_loss"}
REFUSED_ON_GPUS |= {"linalg_matrix_norm", "pca_lowrank", "svd_lowrank"}  # by singular values
# what these are composed of gives; torch's fake tensors do not run it
UNSEEN = {"ldexp": F32, "affine_grid_generator": F16, "affine_grid": F16}
ON_GPUS = [f for f in each_function() if f in POLICIES["cuda"] or sampled(function_name(f), 12)]


@pytest.mark.parametrize("function", parameters(ON_GPUS))
@pytest.mark.sweep(3)
def test_casts_on_a_gpu(function):
    """Dtypes of results: torch's own on tensors without memory, ours of a trace. Functions that
    are not listed may call some that are."""
    for sample in [s for s in samples_of(function) if not s.refused][:3]:
        for shift in ({F64: F32, BF16: F32}, {F64: F16, F32: F16, BF16: F16}):

            def given(shift=shift, sample=sample):
                return (moved(x, shift) for x in sample.fresh())

            try:
                expected = dtypes_on_gpu(function, *given())
            except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
                continue  # torch's fake tensors cannot do it
            ours, error = outcome(traced_on_gpu, function, *given())
            if error is None:
                expected = [UNSEEN.get(bare_name(function), dtype) for dtype in expected]
                assert ours == expected, f"{sample}: {ours}, torch {expected}"
                continue
            known = bare_name(function) in REFUSED_ON_GPUS
            if not known:  # what is not compiled, or has no kernel, matters where torch casts
                plain = dtypes_on_gpu(function, *given(), enabled=False)
                assert plain == expected and function not in POLICIES["cuda"], f"{error!r}"


def dtypes_on_gpu(
    function: Callable, args: tuple, kwargs: dict, *, enabled: bool = True
) -> list[torch.dtype]:
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(enabled=enabled):
        args, kwargs = moved(args, {}, "cuda"), moved(kwargs, {}, "cuda")
        return [x.dtype for x in tensors_of(function(*args, **kwargs))]


def traced_on_gpu(function: Callable, args: tuple, kwargs: dict) -> list[torch.dtype]:
    found: list[torch.dtype] = []

    def step() -> object:
        with cuda_autocast():
            out = function(*args, **kwargs)
        found[:] = [x.dtype for x in tensors_of(out)]
        return out

    with posing(lambda t: "cuda:0"):
        traced(step)
    return found


@contextmanager
def cuda_autocast(*, enabled: bool = True):
    """Autocast for GPUs, where there is none: `torch.autocast` would leave it off."""
    dtype = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", F16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", dtype)


# what torch lists and casts further in, where it arrives under another of the names here
COMPOSED = {"nll_loss2d", "convolution", "cross_entropy_loss"}


@pytest.mark.parametrize("device", POLICIES)
def test_the_lists_are_whole(device):
    """Each function that the running torch casts for, and that has a rule, is listed."""
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device]
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    names = {name.removeprefix("aten::").partition(".")[0] for name in registered}
    assert len(names) > 80
    missing = [
        function_name(f)
        for name in sorted(names - COMPOSED)
        for f in spellings(name)
        if f in RULES and f not in POLICIES[device]
    ]
    assert missing == []


EQUATIONS = {
    "ij,jk->ik": ((4, 5), (5, 6)),
    "ij,jk,kl->il": ((4, 5), (5, 6), (6, 3)),
    "...ij,...jk->...ik": ((2, 4, 5), (2, 5, 6)),
    "...d,de->...e": ((2, 3, 5), (5, 4)),
    "b...,b...->b": ((3, 4), (3, 4)),
    "...,...->...": ((3,), (3,)),
    "i,i,i->i": ((3,), (3,), (3,)),
    "ab,cd,ef->acf": ((4, 5), (5, 6), (6, 3)),
    "bn,anm,bm->ba": ((2, 3), (4, 3, 5), (2, 5)),
    "ij,jk->ik ": ((4, 1), (1, 6)),
    "ijk,jl->il": ((2, 3, 4), (3, 5)),
    "ii": ((4, 4),),
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_casts_what_it_multiplies_as_matrices(equation, dtype):
    """Pairs with a common index that is summed are; others keep the dtypes of their operands."""
    operands = weights(*EQUATIONS[equation])
    last = operands[-1].detach().to(dtype).requires_grad_()

    def step(*operands):
        with auto():
            out = torch.einsum(equation, *operands)
        return out, *torch.autograd.grad(out.float().square().sum(), operands)

    compiled = tracejit.compile(step, on_unsupported="raise", backend="numpy")
    for factor in (1, 2):
        given = [(x.detach() * factor).requires_grad_() for x in (*operands[:-1], last)]
        ours, right = compiled(*given), step(*given)
        assert ours[0].stride() == right[0].stride()
        for mine, his in zip(ours, right, strict=True):
            assert mine.dtype == his.dtype
            assert_close(mine, his, exact=False, what=equation, eps=2**-8, ulps=32)


@pytest.mark.parametrize("by_cost", [True, False])
@pytest.mark.parametrize(
    "equation",
    ["bn,anm,bm->ba", "ij,jk,kl,lm->im", "ab,cd,ef->acf", "ai,bi,ci->abc", "ij,j,jk,k->i"],
)
def test_einsum_multiplies_in_the_order_of_torch(equation, by_cost):
    """It is seen in what is rounded to bfloat16: all sums of these numbers are exact in float32.
    With opt_einsum the order is the cheapest one, without from left to right."""
    backend = torch.backends.opt_einsum
    if by_cost and not backend.is_available():
        pytest.skip("opt_einsum is not installed")
    sizes = {k: 4 + n for n, k in enumerate(sorted(set(equation) - set(",->")))}
    terms = equation.partition("->")[0].split(",")
    operands = weights(*(tuple(sizes[k] for k in term) for term in terms))

    def step(*operands):
        with auto():
            out = torch.einsum(equation, *operands)
        return out, *torch.autograd.grad(out.float().square().sum(), operands)

    with backend.flags(enabled=by_cost):
        right = step(*operands)
        ours = tracejit.compile(step, on_unsupported="raise", backend="numpy")(*operands)
    assert ours[0].stride() == right[0].stride()
    for mine, his in zip(ours, right, strict=True):
        assert mine.dtype == his.dtype and torch.equal(mine, his)


@pytest.mark.parametrize("options", [{"proj_size": 2}, {"proj_size": 2, "bias": False}, {}])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.sweep(0.34)
def test_an_lstm_that_onednn_does_not_compute(options, both):
    """With projections, and of a packed sequence, torch casts the products; else it is refused."""
    torch.manual_seed(0)
    net = torch.nn.LSTM(6, 4, bidirectional=both, **options)
    x, lengths = torch.randn(5, 3, 6), torch.tensor([5, 3, 2])

    def step(x):
        net.zero_grad()
        with auto():
            if options:
                y, states = net(x)
            else:
                y, states = net(torch.nn.utils.rnn.pack_padded_sequence(x, lengths))
                y, _ = torch.nn.utils.rnn.pad_packed_sequence(y)
        y.float().square().sum().backward()
        return y, *states, *(p.grad for p in net.parameters())

    compiled = tracejit.compile(step, on_unsupported="raise", backend="numpy")
    for factor in (1, 2):
        found = [tensor.clone() for tensor in compiled(x * factor)]
        for mine, his in zip(found, step(x * factor), strict=True):
            assert mine.dtype == his.dtype
            torch.testing.assert_close(mine, his, rtol=0.05, atol=0.02 * float(his.abs().max()))

    def whole(x):
        with auto():
            return torch.nn.LSTM(6, 4)(x)

    with pytest.raises(UnsupportedOperation, match="oneDNN"):
        tracejit.compile(whole, on_unsupported="raise", backend="numpy")(x)


# ---- the cache of casts


def weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(4)
    return [torch.randint(-4, 5, s, generator=made).mul(0.25).requires_grad_() for s in shapes]


def auto(**options: object) -> torch.autocast:
    return torch.autocast("cpu", dtype=BF16, **options)


def casts_of(step: Callable, *args: object) -> int:
    """How many weights are cast down."""
    graph = call_graph(step, *args)
    params = {p.value for p in graph.params}
    return sum(
        n.op.name == "cast" and n.out.type.dtype.narrow and root(graph, n.args[0]) in params
        for n in graph.nodes
    )


def call_graph(step: Callable, *args: object):
    return traced(step, *args)[0].graph


def root(graph: object, value: object) -> object:
    by = {n.out: n for n in graph.nodes}
    while value in by and by[value].op.name == "alias":
        value = by[value].args[0]
    return value


def test_a_weight_is_cast_once_in_a_region():
    def step(w, x):
        with auto():
            loss = ((x @ w) @ w).float().sum()
        loss.backward()
        return loss

    w, x = weights((3, 3), (3, 3))
    x.requires_grad_(False)
    same(step, w, x)
    assert casts_of(step, *weights((3, 3)), x) == 2  # of the weight, of the input

    def twice(w, x):
        with auto():
            y = x @ w
        with auto():
            return y, x @ w

    assert casts_of(twice, *weights((3, 3)), x) == 4

    def uncached(w, x):
        with auto(cache_enabled=False):
            loss = ((x @ w) @ w).float().sum()
        loss.backward()
        return loss

    same(uncached, w, x)
    assert casts_of(uncached, *weights((3, 3)), x) == 3


def test_a_cast_outlives_what_is_written_to_its_weight():
    def step(w, x):
        with auto():
            a = x @ w
            with torch.no_grad():
                w.add_(1)
            b = x @ w
        with auto():
            return a, b, x @ w

    found = same(step, *weights((3, 3), (2, 3)))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_cast_made_under_no_grad_has_its_history():
    def step(w, x):
        with auto():
            with torch.no_grad():
                a = x @ w
            b = x @ w
            with torch.no_grad():
                c = x @ w
        (b * 2).float().sum().backward()
        return a, b.requires_grad, c.requires_grad

    same(step, *weights((3, 3), (2, 3)))


def test_a_cast_in_another_precision_is_as_eager():
    """Eager's cache knows no dtype: it hands out the first cast."""

    def step(w, x):
        with auto():
            a = x @ w
            with torch.autocast("cpu", dtype=F16):
                return a, x @ w

    for how in (lambda step, *args: step(*args), call):
        w, x = weights((3, 3), (2, 3))
        with pytest.raises(RuntimeError, match="same dtype"):
            how(step, w, x.detach())


def test_a_backward_under_autocast():
    """Products that were float32 would be differentiated in bf16: refused. Others are the same."""

    def step(w, x):
        with auto():
            with auto(enabled=False):
                loss = (x @ w).square().sum()
            loss.backward()

    with pytest.raises(UnsupportedOperation, match="after the region"):
        call(step, *weights((3, 3), (2, 3)))

    def narrow(w, x):
        with auto():
            loss = (x @ w).float().sum()
            loss.backward()
        return loss

    same(narrow, *weights((3, 3), (2, 3)))


def test_a_step_that_leaves_autocast_on():
    def step(x):
        torch.set_autocast_enabled("cpu", True)
        return x * 2

    with pytest.raises(Exception, match="autocast"):
        call(step, torch.ones(3))
    assert not torch.is_autocast_enabled("cpu")


# ---- whole programs


class Block(nn.Module):
    """A transformer block, its attention written out. It is checkpointed."""

    def __init__(self, width: int = 16, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)

    def block(self, x):
        n, t, width = x.shape
        q, k, v = (
            part.view(n, t, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.first(x)).chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
        hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
        weights = F.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.second(x))


def mlp():
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))
    return net, torch.randn(6, 12), torch.randint(4, (6,))


def images():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return net, torch.randn(2, 3, 8, 8), torch.randint(4, (2,))


def transformer():
    net = nn.Sequential(nn.Embedding(11, 16), Block(), nn.Linear(16, 11), nn.Flatten(0, 1))
    return net, torch.randint(11, (2, 5)), torch.randint(11, (10,))


PROGRAMS = {f.__name__: f for f in (mlp, images, transformer)}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.sweep(2)
def test_programs_in_bf16(program):
    """With gradients accumulated over two halves of the work."""
    torch.manual_seed(0)
    net, x, y = PROGRAMS[program]()
    opt = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)  # Adam magnifies rounding

    def step():
        for _ in range(2):
            with torch.autocast("cpu", dtype=BF16):
                loss = F.cross_entropy(net(x), y) / 2
            loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    step_ = assert_equal_to_eager(
        step, calls=8, state=[*net.buffers()], on_unsupported="raise", backend="c"
    )
    assert step_.stats.replays >= 5
