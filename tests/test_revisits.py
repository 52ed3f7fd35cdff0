"""What a backward reads of checkpointed functions is computed again, and kept nowhere between."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tracejit
from examples.gpt import GPT
from support.plan_checks import check
from support.random_graphs import RandomProgram
from tracejit.compile import CompiledStep
from tracejit.ir.graph import Builder, Graph, Node, Value, next_id, verify
from tracejit.ir.ops import OPS
from tracejit.ir.text import parse
from tracejit.passes import optimize
from tracejit.passes.checkpoints import Revisit, computed_again, kept
from tracejit.schedule import schedule
from tracejit.testing import losses_agree

Tensor = torch.Tensor
Run = Callable[..., Tensor]
PLAIN = partial(checkpoint, use_reentrant=False)
REENTRANT = partial(checkpoint, use_reentrant=True)


# ---- graphs


FORWARD = """
    f(%0: f32[8], %1: f32[8]) {
      %2: f32[8] = mul(%0, %1)
      %3: f32[8] = sin(%2)
      %4: f32[8] = exp(%3)
      %5: f32[8] = cos(%4)
      %6: f32[8] = neg(%5)
"""


def revisited(text: str, *revisits: Revisit, weights: tuple[int, ...] = ()) -> Graph:
    graph = parse(text)
    params = [p.value for p in graph.params]
    new = Builder(next_id(graph.values())).value
    nodes, _ = computed_again(graph.nodes, revisits, [params[k] for k in weights], new)
    found = Graph(graph.name, graph.params, tuple(nodes), graph.results, graph.writes)
    verify(found)
    return found


def value_of(text: str, number: int) -> Value:
    return next(v for v in parse(text).values() if v.id == number)


def test_copies_stand_before_the_backward_and_read_what_comes_in_late():
    """%3 to %5 are the function's; %7 is the cotangent, %8 and %9 are its backward."""
    text = f"""{FORWARD}
      %7: f32[8] = sin(%6)
      %8: f32[8] = mul(%7, %4)
      %9: f32[8] = mul(%8, %3)
      %10: f32[8] = add(%9, %5)
      return %10
    }}"""
    after = f"""{FORWARD}
      %7: f32[8] = sin(%6)
      %8: f32[8] = after(%2, %7)
      %9: f32[8] = sin(%8)
      %10: f32[8] = exp(%9)
      %11: f32[8] = mul(%7, %10)
      %12: f32[8] = mul(%11, %9)
      %13: f32[8] = add(%12, %5)
      return %13
    }}"""
    found = revisited(text, Revisit(3, 6, 6, 8, value_of(text, 7)))
    assert str(found) == str(parse(after))
    assert str(optimize(found)) == str(parse(after))  # nothing is merged
    before = str(optimize(parse(text)))
    assert sorted(str(optimize(kept(found)))) == sorted(before)


def test_weights_and_their_casts_are_there_anyway():
    text = """
    f(%0: f32[8], %1: f32[8]) {
      %2: bf16[8] = cast(%1, dtype=bf16)
      %3: bf16[8] = cast(%0, dtype=bf16)
      %4: bf16[8] = mul(%2, %3)
      %5: bf16[8] = sin(%4)
      %6: bf16[8] = mul(%5, %4)
      %7: bf16[8] = mul(%6, %2)
      return %7
    }"""
    after = """
    f(%0: f32[8], %1: f32[8]) {
      %2: bf16[8] = cast(%1, dtype=bf16)
      %3: bf16[8] = cast(%0, dtype=bf16)
      %4: bf16[8] = mul(%2, %3)
      %5: bf16[8] = sin(%4)
      %6: f32[8] = after(%0, %5)
      %7: bf16[8] = cast(%6, dtype=bf16)
      %8: bf16[8] = mul(%2, %7)
      %9: bf16[8] = mul(%5, %8)
      %10: bf16[8] = mul(%9, %2)
      return %10
    }"""
    found = revisited(text, Revisit(2, 5, 4, 6, value_of(text, 5)), weights=(1,))
    assert str(found) == str(parse(after))


def test_of_nested_functions_the_inner_one_reads_the_copies_of_the_outer_one():
    """%2 to %5 are the outer function's, %3 and %4 the inner one's."""
    text = f"""{FORWARD}
      %7: f32[8] = sin(%6)
      %8: f32[8] = mul(%7, %4)
      %9: f32[8] = mul(%8, %2)
      return %9
    }}"""
    trigger = value_of(text, 7)
    found = revisited(text, Revisit(2, 6, 6, 8, trigger), Revisit(3, 5, 6, 7, trigger))
    names = [(n.op.name, [a.id for a in n.inputs]) for n in found.canonical().nodes]
    assert names[5:] == [
        ("sin", [6]),
        ("after", [0, 7]),
        ("after", [1, 7]),
        ("mul", [8, 9]),  # the outer one's
        ("after", [10, 7]),
        ("sin", [11]),  # the inner one's
        ("exp", [12]),
        ("mul", [7, 13]),
        ("mul", [14, 10]),
    ]


def test_a_copy_runs_after_the_cotangent():
    """Though its operands are there from the start, and its original reads the same."""
    kind = "f32[300,300]"
    text = f"""
    step(%0: {kind}, %1: {kind}) {{
      %2: {kind} = matmul(%0, %1)
      %3: {kind} = matmul(%2, %1)
      %4: {kind} = after(%0, %3)
      %5: {kind} = matmul(%4, %1)
      %6: {kind} = mul(%5, %3)
      return %6
    }}"""
    graph = parse(text)
    plan = schedule(graph)
    assert len(plan.launches) == 3
    check(graph, plan)
    assert plan.arena_bytes < 2 * 300 * 300 * 4 + 256  # two values at a time


@pytest.mark.parametrize("seed", range(24))
def test_random_graphs_in_which_values_wait(seed):
    """Any value may wait for any that was there before: results are the same."""
    graph = RandomProgram(seed).graph()
    rng, nodes = np.random.default_rng(seed), []
    new = Builder(next_id(graph.values())).value
    tensors = [p.value for p in graph.params if not p.value.type.is_host]
    for node in graph.nodes:
        args = list(node.args)
        for k, arg in enumerate(args):
            if isinstance(arg, Value) and not arg.type.is_host and rng.random() < 0.3:
                out = new(arg.type)
                other = tensors[int(rng.integers(len(tensors)))]
                nodes.append(Node(OPS["after"], (arg, other), (), (out,)))
                args[k] = out
        nodes.append(Node(node.op, tuple(args), node.attrs, node.outs, node.where))
        tensors += [v for v in node.outs if not v.type.is_host]
    found = Graph(graph.name, graph.params, tuple(nodes), graph.results, graph.writes)
    verify(found)
    for one in (found, optimize(found)):
        for fuse in (True, False):
            check(one, schedule(one, fuse=fuse), seed)


# ---- steps


def trained(run: Run | None, layers: int = 2, *, dropout: float = 0.0, bf16: bool = False):
    """A step of a GPT whose blocks run as told, and its model."""
    torch.manual_seed(0)
    model = GPT(64, 48, layers, 32, 4, dropout)
    for block in model.blocks:
        if run is not None:
            block.forward = partial(run, block.forward)
    x, y = torch.randint(64, (4, 48)), torch.randint(64, (4, 48))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(model(x).view(-1, 64), y.view(-1))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, model


def losses(step: Run, calls: int = 5) -> list[float]:
    torch.manual_seed(1)
    return [step().item() for _ in range(calls)]


@cache
def compiled(run: Run | None, layers: int = 2, remat: str = "auto", **how) -> CompiledStep:
    """The step, which is replayed and has eager's losses."""
    eager = losses(trained(run, layers, **how)[0])
    step = tracejit.compile(trained(run, layers, **how)[0], on_unsupported="raise", remat=remat)
    for mine, theirs in zip(losses(step), eager, strict=True):
        near = abs(mine - theirs) <= 2**-8 * theirs if how.get("bf16") else None
        assert losses_agree(mine, theirs, eager[0]) if near is None else near
    assert step.stats.replays >= 2, step.explain_mode()
    return step


def arena(step: CompiledStep) -> int:
    return step.explain(measure=False).memory.arena


@pytest.mark.parametrize(
    ("run", "how"),
    [
        pytest.param(PLAIN, {}, marks=pytest.mark.slow),
        pytest.param(REENTRANT, {"dropout": 0.1}, marks=pytest.mark.slow),
        pytest.param(PLAIN, {"dropout": 0.1, "bf16": True}, marks=pytest.mark.slow),
    ],
)
def test_checkpointed_blocks_take_less(run, how):
    """A further block adds what comes into it, not what is in it. Masks are drawn before."""
    plain = compiled(None, **how), compiled(None, 3, **how)
    less = compiled(run, **how), compiled(run, 3, **how)
    assert arena(less[0]) < 0.75 * arena(plain[0])
    width = 4 * 48 * 32 * (2 if how.get("bf16") else 4)
    grown, grown_plain = (arena(b) - arena(a) for a, b in (less, plain))
    assert grown <= grown_plain / 2 and grown <= 6 * width
    memory = less[0].explain(measure=False).memory
    assert memory.computed_again > 2 * 10 * width and memory.eager_saved < memory.computed_again
    assert "of checkpointed functions" in str(less[0].explain(measure=False))


@pytest.mark.slow
def test_nothing_is_computed_again_with_remat_none():
    plain, none = compiled(None), compiled(PLAIN, remat="none")
    assert arena(none) == pytest.approx(arena(plain), rel=0.1)  # another order
    assert none.explain(measure=False).memory.computed_again == 0


@pytest.mark.slow
def test_fast_masks_are_computed_again_too():
    step = tracejit.compile(trained(PLAIN, dropout=0.1)[0], randomness="fast")
    kept_ones = tracejit.compile(trained(None, dropout=0.1)[0], randomness="fast")
    assert losses(step) == pytest.approx(losses(kept_ones), rel=1e-5)
    assert arena(step) < 0.75 * arena(kept_ones)


@pytest.mark.slow
def test_nested_ones():
    """Pairs of blocks, checkpointed as a pair and alone: one block is kept at a time."""

    class Pair(nn.Module):
        def __init__(self, *blocks: nn.Module, inner: Run):
            super().__init__()
            self.blocks, self.inner = nn.ModuleList(blocks), inner

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = self.inner(block, x)
            return x

    def step_of(outer: Run, inner: Run) -> Run:
        step, model = trained(None, 4)
        pairs = zip(model.blocks[::2], model.blocks[1::2], strict=True)
        model.blocks = nn.ModuleList(Pair(*pair, inner=inner) for pair in pairs)
        for pair in model.blocks:
            pair.forward = partial(outer, pair.forward)
        return step

    def plainly(f: Run, x: Tensor) -> Tensor:
        return f(x)

    found = {}
    eager = losses(step_of(plainly, plainly))
    for name, runs in {"outer": (PLAIN, plainly), "both": (PLAIN, PLAIN)}.items():
        step = tracejit.compile(step_of(*runs), on_unsupported="raise")
        for mine, theirs in zip(losses(step), eager, strict=True):
            assert losses_agree(mine, theirs, eager[0])
        found[name] = arena(step)
    assert found["both"] < 0.85 * found["outer"] < 0.85 * arena(compiled(None, 4))


def test_what_the_loss_follows_is_kept():
    """A checkpointed loss over a large vocabulary: its backward comes next, and nothing would be
    gained. So its logits are computed part by part as ever."""

    def made(run: Run) -> Run:
        torch.manual_seed(0)
        words, first = nn.Embedding(20000, 16), nn.Linear(16, 16)
        x = torch.randint(20000, (256,))

        def loss_of(h: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(h @ words.weight.T, y)

        def step() -> Tensor:
            words.weight.grad = first.weight.grad = first.bias.grad = None
            loss = run(loss_of, first(words(x)).tanh(), x.roll(1))
            (loss * 0.5).backward()
            return loss.detach()

        return step

    steps = [tracejit.compile(made(run)) for run in (PLAIN, lambda f, *x: f(*x))]
    for step in steps:
        torch.testing.assert_close(step(), made(PLAIN)())
    assert arena(steps[0]) == arena(steps[1]) < 2 * 256 * 20000 * 4


def test_selected_products_are_kept():
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    some = compiled(partial(PLAIN, context_fn=contexts))
    assert arena(compiled(PLAIN)) < arena(some) < arena(compiled(None))


def test_a_backward_outside_keeps_what_comes_in():
    """The loss is returned with its history: of the function only its input is kept for that."""

    def made(run: Run) -> tuple[Run, nn.Module]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 64), *[nn.Linear(64, 64), nn.Tanh()] * 3)
        first, last = nn.Linear(8, 8), nn.Linear(64, 1)
        x = torch.randn(32, 8)
        return lambda: last(run(net, first(x)).sin()).square().mean(), net

    kept_bytes, gradients = [], []
    for run in (lambda f, x: f(x), PLAIN):
        step, net = made(run)
        step().backward()
        eager = [p.grad.clone() for p in net.parameters()]
        step, net = made(run)
        ours = tracejit.compile(step, on_unsupported="raise")
        for _ in range(3):
            net.zero_grad()
            loss = ours()
            loss.backward()
        gradients = [p.grad for p in net.parameters()]
        torch.testing.assert_close(gradients, eager, rtol=1e-5, atol=1e-7)
        kept_bytes.append(ours.explain(measure=False).memory.outputs)
    assert kept_bytes[1] < kept_bytes[0] / 2


def test_differentiated_twice():
    """A gradient penalty through a checkpointed function, and two backwards over one graph."""

    def made(run: Run) -> Run:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        x = torch.randn(8, 4, requires_grad=True)

        def step() -> list[Tensor]:
            y = run(net, x.sin()).square().sum()
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            again = torch.autograd.grad(y, x, retain_graph=True)
            loss = y + g.square().sum()
            return [loss.detach(), *again, *torch.autograd.grad(loss, [*net.parameters()])]

        return step

    eager = made(PLAIN)()
    ours = tracejit.compile(made(PLAIN), on_unsupported="raise")
    for _ in range(3):
        found = ours()
    torch.testing.assert_close([*found], eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [4, 12])
def test_each_step_of_a_loop_over_time(steps):
    """Long ones become loops."""

    def made(run: Run) -> tuple[Run, nn.Module]:
        torch.manual_seed(0)
        cell = nn.GRUCell(8, 16)
        x = torch.randn(steps, 4, 8)

        def step() -> Tensor:
            cell.zero_grad()
            h = torch.zeros(4, 16)
            for t in range(steps):
                h = run(cell, x[t], h)
            loss = h.square().mean()
            loss.backward()
            return loss.detach()

        return step, cell

    plain, theirs = made(PLAIN)
    step, mine = made(PLAIN)
    ours = tracejit.compile(step, on_unsupported="raise")
    for _ in range(3):
        torch.testing.assert_close(ours(), plain())
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)
