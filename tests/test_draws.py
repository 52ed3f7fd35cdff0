"""Random numbers in a compiled step: eager's, drawn anew in each call, with eager's state after."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tracejit
from support.function_checks import (
    check_gradients,
    check_runtime_scalars,
    check_values,
    on_each_sample,
    parameters,
    runtime_floats,
)
from support.function_samples import each_function, samples_of
from support.function_samples_random import draws
from tracejit.compile import CompiledStep
from tracejit.errors import ArgumentError
from tracejit.ir.ops.philox import philox, random_bits
from tracejit.ir.types import b1
from tracejit.runtime import streams
from tracejit.runtime.streams import Stream
from tracejit.testing import assert_equal_to_eager, fake_device, losses_agree

FUNCTIONS = [f for f in each_function() if draws(f)]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # eager's deprecations


@pytest.mark.parametrize("function", parameters(FUNCTIONS))
@pytest.mark.sweep(2)
def test_values(function: Callable):
    on_each_sample(check_values, function, samples_of(function))


UNDIFFERENTIABLE = (torch._sample_dirichlet, torch.binomial)
DIFFERENTIABLE = [f for f in FUNCTIONS if f not in UNDIFFERENTIABLE]


@pytest.mark.parametrize("function", parameters(DIFFERENTIABLE))
@pytest.mark.sweep(0.34)
def test_gradients(function: Callable):
    on_each_sample(check_gradients, function, samples_of(function))


SCALED = [f for f in FUNCTIONS if any(runtime_floats(s) for s in samples_of(f))]


@pytest.mark.parametrize("function", parameters(SCALED))
@pytest.mark.sweep(0.34)
def test_runtime_scalars(function: Callable):
    rows = [s for s in samples_of(function) if runtime_floats(s) and not s.refused]
    on_each_sample(check_runtime_scalars, function, rows)


# ---- whole programs, from one seed


def build_mlp(make: Callable = torch.optim.AdamW) -> Callable:
    net = nn.Sequential(
        *(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3)),
    )
    optimizer = make(net.parameters(), lr=1e-3)
    x, y = torch.randn(32, 20), torch.randn(32, 3)

    def step():
        optimizer.zero_grad()
        loss = (net(x) - y).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


class Block(nn.Module):
    """A transformer's block with dropout where GPT-2 has it, written out."""

    def __init__(self, width: int = 24, heads: int = 3):
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop, self.attention_drop = nn.Dropout(0.1), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        split = self.qkv(self.before(x)).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) / (width // self.heads) ** 0.5
        mixed = self.attention_drop(scores.softmax(-1)) @ v
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(n, length, width)))
        return x + self.drop(self.narrow(F.gelu(self.wide(self.after(x)))))


def build_block() -> Callable:
    net = nn.Sequential(nn.Dropout(0.1), Block(), Block())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    x, y = torch.randn(3, 7, 24), torch.randn(3, 7, 24)

    def step():
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def build_vae() -> Callable:
    encode, decode = nn.Linear(12, 8), nn.Linear(4, 12)
    optimizer = torch.optim.Adam([*encode.parameters(), *decode.parameters()], lr=1e-2)
    x = torch.rand(9, 12)

    def step():
        optimizer.zero_grad()
        mean, log_variance = encode(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        loss = F.binary_cross_entropy_with_logits(decode(z), x, reduction="sum")
        loss = loss - 0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def build_policy() -> Callable:
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rewards = torch.randn(4)

    def step():
        states = torch.randn(11, 5)
        policy = torch.distributions.Categorical(logits=net(states), validate_args=False)
        actions = policy.sample()
        loss = -(policy.log_prob(actions) * rewards[actions]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), actions

    return step


def build_noise() -> Callable:
    net = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    x, level = torch.randn(8, 6), 0.1

    def step():
        optimizer.zero_grad()
        loss = net(x + level * torch.randn_like(x)).pow(2).mean()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p.grad.add_(torch.empty_like(p).normal_(std=0.01))
        optimizer.step()
        return loss.detach()

    return step


def build_gumbel() -> Callable:
    logits = nn.Parameter(torch.randn(7, 5))
    values = torch.randn(5)

    def step():
        logits.grad = None
        soft, hard = F.gumbel_softmax(logits, tau=0.7), F.gumbel_softmax(logits, hard=True)
        loss = (soft @ values).mean() + (hard @ values).pow(2).mean()
        loss.backward()
        with torch.no_grad():
            logits.sub_(logits.grad, alpha=0.1)
        return loss.detach(), hard.detach()

    return step


def build_distributions() -> Callable:
    w = nn.Parameter(torch.randn(5, 3))
    of = torch.distributions

    def step():
        w.grad = None
        drawn = [
            of.Normal(w, w.exp()).rsample(),
            of.Bernoulli(logits=w).sample() * w,
            of.Uniform(w, w + 1).rsample(),
            of.Exponential(w.exp()).rsample(),
            of.Gumbel(w, w.exp()).rsample(),
            of.Laplace(w, w.exp()).rsample(),
            of.RelaxedBernoulli(torch.tensor(0.5), logits=w).rsample(),
            of.OneHotCategorical(logits=w).sample() * w,
            of.Gamma(w.detach().exp(), w.detach().exp()).sample(),
        ]
        loss = sum(x.pow(2).mean() for x in drawn)
        loss.backward()
        return loss.detach(), [x.detach() for x in drawn], w.grad.clone()

    return step


def build_initialization() -> Callable:
    net = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 3))

    def step():
        for layer in net:
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5)
            nn.init.normal_(layer.bias, std=0.02)
        nn.init.trunc_normal_(net[0].weight, std=0.02)
        nn.init.xavier_normal_(net[1].weight)
        return net(torch.ones(2, 5)).detach()

    return step


def build_generators() -> Callable:
    own, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)

    def step(generator=other):
        a = torch.rand(5, generator=own)
        b = torch.randn(20)
        c = torch.empty(3, 7).exponential_(generator=generator) + torch.rand(3, 7, generator=own)
        return a, b, c, torch.randperm(9, generator=generator)

    return step


def build_seeds() -> Callable:
    def step():
        a = torch.rand(3)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            b = torch.rand(3)
        state = torch.get_rng_state()
        c = torch.randn(17)
        torch.set_rng_state(state)
        return a, b, c, torch.randn(17)

    return step


PROGRAMS = (
    *(build_mlp, build_block, build_vae, build_policy, build_noise, build_gumbel),
    *(build_distributions, build_initialization, build_generators, build_seeds),
)


def tensors(x: object) -> list[torch.Tensor]:
    return [x] if isinstance(x, torch.Tensor) else [t for item in x for t in tensors(item)]


def results(build: Callable, compiled: Callable, calls: int) -> tuple[list, list, Callable]:
    """What some calls return from one seed, the state of the generator after each, and the step."""
    torch.manual_seed(1)
    step = compiled(build())
    found, states = [], []
    for _ in range(calls):
        found.append(tensors(step()))
        states.append(torch.get_rng_state())
    return found, states, step


def check_program(build: Callable, calls: int = 12, **options: object) -> CompiledStep:
    """The compiled step returns what eager returns, call by call, and leaves the same state."""
    theirs, states, _ = results(build, lambda step: step, calls)
    ours, our_states, step = results(build, lambda s: tracejit.compile(s, **options), calls)
    for i, (mine, his) in enumerate(zip(ours, theirs, strict=True)):
        for a, b in zip(mine, his, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=f"call {i}: {a}, {b}")
        assert torch.equal(our_states[i], states[i]), f"state after call {i}"
    return step


@pytest.mark.parametrize("build", PROGRAMS)
@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.sweep(4)
def test_programs(build: Callable, backend: str):
    step = check_program(build, backend=backend)
    assert step.stats.replays >= 4, (step.explain_mode(), step.explain_retraces())
    step = check_program(build, 5, backend=backend, mode="rerun")
    assert step.stats.replays == 0


def test_losses_of_20_steps():
    ours, theirs = (
        [x.item() for (x,) in results(build_mlp, how, 20)[0]]
        for how in (tracejit.compile, lambda step: step)
    )
    for mine, his in zip(ours, theirs, strict=True):
        assert losses_agree(mine, his, theirs[0])
    assert len({*ours}) == 20


# ---- values that Python reads, branches, other ways through the step


def build_branch() -> Callable:
    w = torch.ones(3)

    def step():
        x = torch.rand(3)
        if torch.rand(()).item() > 0.5:
            x = x + torch.randn(20).sum()
        if (F.dropout(x) > 0).any():
            w.add_(torch.rand(3))
        return x, w.clone()

    return step


def build_read() -> Callable:
    """A drawn number is the deviation of another draw; a count decides a shape."""

    def step():
        scale = torch.rand(()).item()
        x = torch.empty(5).normal_(0.0, scale)
        kept = x[torch.rand(5) < 0.9]
        return x, kept, F.dropout(kept, 0.5), torch.rand(2).mul(scale)

    return step


def build_numbers() -> Callable:
    """Numbers for Python: returned, as a list, and as an index."""
    table = torch.randn(6, 2)

    def step():
        i = torch.randint(6, ()).item()
        return table[i], table[torch.randint(0, 6, (4,))], torch.rand(1).item() * torch.ones(1)

    return step


def build_alternating() -> Callable:
    calls = []

    def step():
        calls.append(1)
        x = torch.rand(3)
        if len(calls) % 3 == 0:
            x = x + torch.randn(3)
        return x, torch.rand(2)

    return step


def build_accumulation() -> Callable:
    net = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.4), nn.Linear(7, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = torch.randn(3, 4, 5)

    def step():
        optimizer.zero_grad()
        losses = []
        for x in batches:
            loss = net(x).pow(2).mean() / len(batches)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        return losses

    return step


class Noisy(torch.autograd.Function):
    """Draws in its forward and in its backward."""

    @staticmethod
    def forward(ctx, x):
        return x + torch.rand_like(x)

    @staticmethod
    def backward(ctx, g):
        return g * torch.rand_like(g)


def build_custom() -> Callable:
    w = torch.ones(4, requires_grad=True)

    def step():
        w.grad = None
        (Noisy.apply(w) * F.dropout(w)).sum().backward()
        return w.grad.clone(), torch.rand(1)

    return step


def build_outside() -> Callable:
    """Backward outside the step goes through the same mask."""
    net = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.4), nn.Linear(7, 1))
    x = torch.randn(4, 5)

    def step():
        return net(x).pow(2).mean()

    def outer(inner=step):
        net.zero_grad()
        loss = inner()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in net.parameters())]

    outer.inner = step
    return outer


WAYS = (build_branch, build_read, build_numbers, build_alternating, build_accumulation)


@pytest.mark.parametrize("build", [*WAYS, build_custom])
@pytest.mark.sweep(2)
def test_ways_through_a_step(build: Callable):
    for mode in ("auto", "rerun"):
        step = check_program(build, 30, backend="numpy", mode=mode)
    step = check_program(build, 30, backend="c")
    if build not in (build_alternating, build_read):  # counters that grow, and counts that vary
        assert step.stats.replays > 10, step.explain_mode()


def test_backward_outside():
    def compiled(outer: Callable) -> Callable:
        step = tracejit.compile(outer.inner)
        return lambda: outer(step)

    theirs, states, _ = results(build_outside, lambda outer: outer, 8)
    ours, our_states, _ = results(build_outside, compiled, 8)
    for mine, his in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, his)
    assert all(map(torch.equal, our_states, states))


def test_numbers_are_those_of_the_arguments():
    """The probability is a runtime scalar, and a generator may be another one in each call."""
    x = torch.randn(30)

    def step(p, generator):
        return F.dropout(x, p), torch.rand(3, generator=generator)

    compiled = tracejit.compile(step)
    for i in range(12):
        torch.manual_seed(i)
        given = torch.Generator().manual_seed(i)
        expected = step(0.05 * i + 0.1, given)
        torch.manual_seed(i)
        given.manual_seed(i)
        for mine, his in zip(compiled(0.05 * i + 0.1, given), expected, strict=True):
            assert torch.equal(mine, his)
    assert compiled.stats.compiles == 1
    one, compiled = torch.Generator().manual_seed(3), tracejit.compile(step)
    for i in range(6):
        torch.manual_seed(i)
        state = one.get_state()
        expected = step(0.1 * i + 0.1, one)
        torch.manual_seed(i)
        one.set_state(state)
        for mine, his in zip(compiled(0.1 * i + 0.1, one), expected, strict=True):
            assert torch.equal(mine, his)
    assert compiled.stats.replays >= 3 and compiled.stats.compiles == 1


def test_states_that_come_from_outside_keep_the_step_in_rerun():
    state = torch.Generator().manual_seed(7).get_state()

    def restored():
        torch.set_rng_state(state)
        return torch.rand(3)

    generator = torch.Generator()

    def seeded():
        generator.manual_seed(4)
        return torch.rand(3, generator=generator)

    def by_chance():
        torch.seed()
        return torch.rand(3)

    for step, says in ((restored, "sets the state"), (seeded, "manual_seed"), (by_chance, "seed")):
        compiled = tracejit.compile(step)
        expected = step()
        for _ in range(6):
            assert torch.equal(compiled(), expected) or step is by_chance
        assert compiled.stats.replays == 0 and says in compiled.explain_mode()


# ---- failures


def left_by(step: Callable, *args: object) -> torch.Tensor:
    """The state of the generator after a call that fails."""
    with pytest.raises((ArithmeticError, IndexError)):
        step(*args)
    return torch.get_rng_state()


def test_an_exception_of_the_step_leaves_the_generator_as_eager_does():
    def step(fails):
        x = torch.rand(3)
        if fails:
            raise ArithmeticError
        return x + torch.rand(3)

    torch.manual_seed(0)
    theirs = left_by(step, True)
    for calls in (0, 5):
        compiled = tracejit.compile(step)
        for _ in range(calls):
            compiled(False)
        torch.manual_seed(0)
        assert torch.equal(left_by(compiled, True), theirs)


@pytest.mark.parametrize("mode", ["auto", "rerun"])
def test_a_call_that_is_refused_before_it_writes_has_drawn_nothing(mode):
    """A check of what was drawn fails, in a first trace, a rerun and a replay."""
    table, most = torch.randn(5, 2), torch.tensor([5])

    def step():
        i = (torch.rand(4) * most).long()
        return table[i] + torch.rand(4, 2)

    compiled = tracejit.compile(step, mode=mode)
    for calls in (0, 1, 5):
        most.fill_(5)
        for _ in range(calls):
            compiled()
        most.fill_(500)
        torch.manual_seed(0)
        before = torch.get_rng_state()
        assert torch.equal(left_by(compiled), before)
    assert (compiled.stats.replays > 0) == (mode == "auto")


def test_an_observer_that_fails():
    """Whatever stops a call before its plan runs."""

    def observer(*_):
        raise ArithmeticError

    compiled = tracejit.compile(lambda: F.dropout(torch.ones(9)))
    for _ in range(6):
        for watching in (None, observer):
            compiled.observer = watching
            before = torch.get_rng_state()
            if watching is None:
                compiled()
                assert not torch.equal(torch.get_rng_state(), before)
            else:
                assert torch.equal(left_by(compiled), before)
    assert compiled.stats.replays > 2
    tracejit.capture(compiled.__wrapped__)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("build", [build_mlp, build_block, build_noise, build_accumulation])
@pytest.mark.sweep(4)
def test_the_public_check_draws_the_same_in_float64(build):
    torch.manual_seed(2)
    assert_equal_to_eager(build(), calls=4)


# ---- many numbers at once, by C


needs_c = pytest.mark.skipif(not streams.available(), reason="no C compiler, or torch has its own")
SIZES = (0, 1, 2, 311, 312, 313, 623, 624, 625, 1024, 1025, 4999)


@needs_c
@pytest.mark.parametrize("ahead", [0, 1, 7, 623, 624, 625])
def test_a_stream_is_torchs(ahead: int):
    """The same numbers and the same state, wherever in its 624 words the generator stands."""
    its = torch.Generator().manual_seed(ahead)
    torch.empty(ahead, dtype=torch.int32).random_(generator=its)
    torch.empty(1).normal_(generator=its)  # keeps a second number for the next call
    mine = torch.Generator()
    mine.set_state(its.get_state())
    asked, expected = [], []
    for n in SIZES:
        for chance in (0.0, 0.3, 1 / 3, 1.0):
            asked.append(Stream(torch.empty(n, dtype=torch.bool), chance))
            expected.append(torch.empty(n, dtype=torch.bool).bernoulli_(chance, generator=its))
        for dtype in (torch.float32, torch.float64):
            asked.append(Stream(torch.empty(n, dtype=dtype)))
            expected.append(torch.empty(n, dtype=dtype).uniform_(generator=its))
    streams.filler(asked)(mine)
    assert all(torch.equal(a.into, b) for a, b in zip(asked, expected, strict=True))
    assert torch.equal(mine.get_state(), its.get_state())
    again = torch.empty(5).normal_(generator=its)
    assert torch.equal(torch.empty(5).normal_(generator=mine), again)


@needs_c
def test_the_chance_of_a_stream_may_be_another_one_in_each_call():
    mask, generator = torch.empty(3, 400, dtype=torch.bool), torch.Generator()
    fill = streams.filler([Stream(mask, None)])
    for chance in (0.1, 0.9):
        fill(generator.manual_seed(3), chance)
        drawn = torch.empty(3, 400, dtype=torch.bool)
        assert torch.equal(mask, drawn.bernoulli_(chance, generator=generator.manual_seed(3)))
    before = generator.get_state()
    for chance in (1.1, -0.1, float("nan")):
        with pytest.raises(RuntimeError, match="p to be in"):
            fill(generator, chance)
    assert torch.equal(generator.get_state(), before)


@needs_c
def test_masks_of_a_replay_are_one_stream():
    """Also those in the order of memory that is not row-major; others are drawn by torch."""
    x, odd = torch.randn(40, 30).t(), torch.randn(40, 30)[:, ::2]

    def step(p):
        return F.dropout(x, p), F.dropout(odd, 0.5), torch.rand(300), torch.randn(300)

    compiled = tracejit.compile(step, backend="c")
    for i in range(8):
        torch.manual_seed(i)
        expected = step(0.1 * i + 0.1)
        torch.manual_seed(i)
        for mine, his in zip(compiled(0.1 * i + 0.1), expected, strict=True):
            torch.testing.assert_close(mine, his)
    assert compiled.stats.replays >= 4
    lines = [x.strip() for x in compiled._replays[0].run.text.splitlines()]
    assert sum(x.startswith("fill0(rng0, ") for x in lines) == 1
    assert [x.partition(" = ")[0] for x in lines if " = do" in x] == ["draw3"]


# ---- randomness="fast"


KAT = (  # Random123's known answers of philox2x32-10: counter, key, result
    ((0, 0), 0, (0xFF1DAE59, 0x6CD10DF2)),
    ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
    ((0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
)


@pytest.mark.parametrize("counter, key, found", KAT)
def test_philox_is_philox(counter, key, found):
    words = [np.uint64(x) for x in (*counter, key)]
    assert tuple(map(int, philox(*words))) == found
    whole = np.array([counter[0] | counter[1] << 32], np.uint64).view(np.int64)
    assert random_bits(whole, np.array([key])) == found[0] >> 1


def fast(step: Callable, **options: object) -> CompiledStep:
    return tracejit.compile(step, randomness="fast", **options)


def many():
    n = 40_000
    mask = F.dropout(torch.ones(n), 0.3) * 0.7
    return torch.rand(n), torch.randn(n), torch.empty(n).exponential_(2.0), mask, torch.rand(n)


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_fast_numbers(backend: str):
    """Moments within five deviations, streams of sites and calls not correlated, seeds reproduce,
    each replay draws anew, and the generator has moved."""
    compiled = fast(many, backend=backend)
    drawn = []
    for seed in (0, 1, 2, 3, 4, 0):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        drawn.append([x.double() for x in compiled()])
        assert not torch.equal(torch.get_rng_state(), before)
    assert compiled.stats.replays >= 3
    for a, b in zip(drawn[0], drawn[5], strict=True):
        torch.testing.assert_close(a, b)
    drawn.append([x.double() for x in compiled()])  # from the state that the last call left
    columns = []
    for call in (*drawn[:5], drawn[6]):
        for x, mean, variance in zip(
            call, (0.5, 0, 0.5, 0.7, 0.5), (1 / 12, 1, 0.25, 0.21, 1 / 12), strict=True
        ):
            n = len(x)
            assert abs(x.mean() - mean) < 5 * (variance / n) ** 0.5
            fourth = (x - mean).pow(4).mean()
            assert abs((x - mean).pow(2).mean() - variance) < 5 * (fourth / n) ** 0.5
            columns.append((x - mean) / variance**0.5)
            lag = (columns[-1][1:] * columns[-1][:-1]).mean()
            assert abs(lag) < 5 / n**0.5
    table = torch.stack(columns)
    correlation = table @ table.T / table.shape[1]
    off = correlation - torch.diag(correlation.diagonal())
    assert off.abs().max() < 5.5 / table.shape[1] ** 0.5


def test_fast_numbers_are_the_same_on_all_backends():
    torch.manual_seed(0)
    ours = fast(many, backend="c")()
    torch.manual_seed(0)
    for a, b in zip(ours, fast(many, backend="numpy")(), strict=True):
        torch.testing.assert_close(a, b)
    torch.manual_seed(0)
    for a, b in zip(ours, fast(many, backend="numpy", mode="rerun")(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("build", [build_mlp, build_block, build_accumulation, build_custom])
@pytest.mark.sweep(2)
def test_fast_masks_are_computed_again_and_not_stored(build: Callable):
    """The gradient has the mask of the forward: as in eager with the same mask."""
    torch.manual_seed(1)
    compiled = fast(build())
    first = [tensors(compiled()) for _ in range(8)]
    assert compiled.stats.replays >= 3
    kinds = [b.type for plan in compiled.plans for b in plan.buffers]
    assert not [k for k in kinds if k.dtype is b1 and k.numel > 1 and build is not build_mlp]
    torch.manual_seed(1)
    again = fast(build())
    for mine in first:
        for a, b in zip(mine, tensors(again()), strict=True):
            torch.testing.assert_close(a, b)


def test_the_fast_gradient_is_of_the_same_mask():
    x = torch.randn(500, 30, requires_grad=True)

    def step(p):
        x.grad = None
        y = F.dropout(x, p)
        y.pow(2).sum().backward()
        return y.detach(), x.grad

    compiled = fast(step)
    for i in range(6):
        p = 0.1 + 0.1 * i
        y, grad = compiled(p)
        mask = y != 0
        torch.testing.assert_close(y, torch.where(mask, x.detach() / (1 - p), 0.0))
        torch.testing.assert_close(grad, 2 * y / (1 - p))
        assert abs(mask.float().mean() - (1 - p)) < 0.02
    assert compiled.stats.compiles == 1
    with pytest.raises((ValueError, ArgumentError)):
        compiled(1.5)


def test_an_unknown_kind_of_randomness():
    with pytest.raises(ValueError, match="randomness is one of"):
        tracejit.compile(many, randomness="slow")


@pytest.mark.parametrize("randomness", ["eager", "fast"])
def test_on_the_fake_device(randomness: str):
    """The launches of a GPU: the same numbers as on the CPU."""
    losses = []
    with fake_device(compiled=False) as device:
        for backend in (device.name, "numpy"):
            torch.manual_seed(4)
            step = tracejit.compile(build_noise(), backend=backend, randomness=randomness)
            losses.append([step() for _ in range(6)])
            assert step.stats.replays >= 2
    for mine, his in zip(*losses, strict=True):
        torch.testing.assert_close(mine, his)


# ---- drawn from values that do not lie row by row


FROM_VALUES = {
    "multinomial": lambda x: torch.multinomial(x.t(), 3),
    "multinomial of what is computed": lambda x: torch.multinomial((x * 2).t(), 3),
    "multinomial of a part": lambda x: torch.multinomial(x[:, ::2].t(), 3),
    "multinomial of two": lambda x: (torch.multinomial(x.t(), 2), torch.multinomial(x.t()[1], 3)),
    "with replacement": lambda x: torch.multinomial(x.t(), 3, True),
    "one": lambda x: torch.multinomial(x.t(), 1),
    "rrelu": lambda x: torch.nn.functional.rrelu(0.5 - x.t(), training=True),
    "rrelu of an argument": lambda x: torch.nn.functional.rrelu(x.sub(0.5).t(), training=True),
    "poisson": lambda x: torch.poisson(x.t()),
    "gamma": lambda x: torch._standard_gamma(x.t()),
    "dirichlet": lambda x: torch._sample_dirichlet(x.t()),
}


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("name", FROM_VALUES)
def test_numbers_drawn_from_transposed_values(name, backend):
    """The first call computes them by views of their memory, later ones as a plan lays them out."""
    x = torch.rand(40, 6) + 0.1
    compiled = tracejit.compile(FROM_VALUES[name], backend=backend, on_unsupported="raise")
    torch.manual_seed(4)
    eager = [FROM_VALUES[name](x) for _ in range(5)]
    torch.manual_seed(4)
    for expected in eager:
        torch.testing.assert_close(compiled(x), expected)
    assert compiled.stats.replays


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_a_mask_without_axes_chooses_all_or_nothing(backend):
    """As samples of `Wishart` ask which of them are singular."""

    def step(x, mask):
        return x[mask], mask[mask]

    compiled = tracejit.compile(step, backend=backend, on_unsupported="raise")
    x = torch.randn(3, 4)
    for i in range(8):
        mask = torch.tensor(i % 3 != 0)
        for mine, theirs in zip(compiled(x, mask), step(x, mask), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert compiled.stats.replays


DRAWN_TWICE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "multinomial": lambda x: torch.multinomial(x, 5),
    "binomial": lambda x: torch.binomial(torch.full_like(x, 9.0), x),
    "categorical": lambda x: torch.distributions.Categorical(x).sample((4,)),
    "bernoulli": torch.bernoulli,
    "rrelu": lambda x: torch.rrelu(0.5 - x, training=True),
    "poisson": lambda x: torch.poisson(9 * x),
}


@pytest.mark.parametrize("name", DRAWN_TWICE)
def test_what_is_drawn_twice_of_the_same_values(name):
    """Two draws are two draws: the second of the same values gave what the first had drawn."""
    draw = DRAWN_TWICE[name]

    def step(x):
        first, second = draw(x), draw(x)
        return first, second, draw(x)

    x = torch.rand(30, generator=torch.Generator().manual_seed(0))
    compiled = tracejit.compile(step, on_unsupported="raise")
    for call in range(4):
        torch.manual_seed(call)
        eager = step(x)
        torch.manual_seed(call)
        ours = compiled(x)
        assert not torch.equal(eager[0], eager[1])
        for a, b in zip(ours, eager, strict=True):
            assert torch.equal(a, b)
