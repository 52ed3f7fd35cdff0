"""Faults that are planted in rules, derivatives, passes, schedules, printers and runs.

Each `Fault` says how it is planted (a context), and has a step in `STEPS` that meets it. `token`
stands in the line that is to blame. tests/test_faults.py finds all of them by `verify`, and says
which other layers of tests do.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch.nn import functional as F

from tracejit import passes
from tracejit.capture.proof.guard_text import GuardText
from tracejit.capture.trace.table import RULES
from tracejit.capture.trace.views import put_through
from tracejit.codegen.c_table import TEMPLATES
from tracejit.ir.graph import Node
from tracejit.ir.ops import OPS
from tracejit.schedule import index, memory
from tracejit.schedule.donate import Donors
from tracejit.support import operations

Context = contextlib.AbstractContextManager


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    kind:    as the table of the document has it.
    step:    the key of a step in STEPS that meets it.
    plant:   makes the context in which it is there.
    token:   what stands in the guilty line; "" where no line can be named.
    stage:   the stage that is to blame.
    backend: on which it is looked for.
    """

    name: str
    kind: str
    step: str
    plant: Callable[[], Context]
    token: str
    stage: str
    backend: str = "numpy"


# ---- how faults are planted


@contextlib.contextmanager
def field(record: object, name: str, value: object) -> Iterator[None]:
    """A field of a frozen record is something else."""
    before = getattr(record, name)
    object.__setattr__(record, name, value)
    try:
        yield
    finally:
        object.__setattr__(record, name, before)


def slope(function: str, wrong: Callable, place: int = 0) -> Callable[[], Context]:
    """The derivative in the row of a function."""

    def plant() -> Context:
        row = next(o.row for o in operations() if o.row is not None and o.row.name == function)
        slopes = list(row.slopes)
        slopes[place] = wrong
        return field(row, "slopes", tuple(slopes))

    return plant


def value(function: str, wrong: Callable) -> Callable[[], Context]:
    """The value in the row of a function."""

    def plant() -> Context:
        row = next(o.row for o in operations() if o.row is not None and o.row.name == function)
        return field(row, "value", wrong)

    return plant


def vjp(op: str, wrong: Callable, place: int = 0) -> Callable[[], Context]:
    """The derivative of a primitive."""

    def plant() -> Context:
        rules = list(OPS[op].vjp)
        rules[place] = wrong
        return field(OPS[op], "vjp", tuple(rules))

    return plant


def printed(op: str, text: object) -> Callable[[], Context]:
    """How a primitive prints in C."""
    return lambda: patch.dict(TEMPLATES, {op: text})


def a_pass(change: Callable) -> Callable[[], Context]:
    """One more pass, which is wrong."""

    def wrong_pass(graph):
        return change(graph)

    return lambda: patch.object(passes, "PIPELINE", (*passes.PIPELINE, wrong_pass))


def nodes(change: Callable[[Node], Node]) -> Callable:
    """A pass that changes each node."""
    return lambda graph: replace(graph, nodes=tuple(map(change, graph.nodes)))


def swapped(name: str) -> Callable[[Node], Node]:
    """The operands of a primitive change places."""

    def change(node: Node) -> Node:
        return replace(node, args=node.args[::-1]) if node.op.name == name else node

    return change


def renamed(name: str, other: str) -> Callable[[Node], Node]:
    """A primitive becomes another one."""

    def change(node: Node) -> Node:
        return replace(node, op=OPS[other]) if node.op.name == name else node

    return change


def map_of(name: str, change: Callable) -> Callable[[], Context]:
    """Where the schedule reads the operand of a movement."""
    own = index.operand_indices

    def wrong(node, indices, extents):
        if node.op.name != name:
            return own(node, indices, extents)
        return change(own, node, indices, extents)

    return lambda: _everywhere("operand_indices", own, wrong)


@contextlib.contextmanager
def _everywhere(name: str, own: object, wrong: object) -> Iterator[None]:
    """A function is another one in all modules of the schedule that have it."""
    with contextlib.ExitStack() as stack:
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("tracejit.") and vars(module).get(name) is own:
                stack.enter_context(patch.object(module, name, wrong))
        yield


def in_run(change: Callable) -> Callable[[], Context]:
    """What a replay does: `change(function)` is another one."""
    module = sys.modules["tracejit.compile"]
    own = module.generate

    def generate(captured, program, final, backwards, hooks, armed=None, *args, **kwargs):
        run = own(captured, program, final, backwards, hooks, armed, *args, **kwargs)
        return run if armed is None else replace(run, function=change(run.function))

    return lambda: patch.object(module, "generate", generate)


# ---- steps, each a function that makes (step, arguments) anew


def _numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activations() -> tuple[Callable, tuple]:
    w = _numbers(6, 5, seed=1).requires_grad_()

    def step(x):
        h = x @ w
        a = torch.tanh(h)
        b = torch.sigmoid(h * 2.0)
        c = torch.exp(b - 0.25)
        d = torch.log(h * h + 1.5)
        e = torch.relu(h - 0.2)
        total = (a * b + c + d * e).sum(dim=1)
        loss = total.mean()
        (grad,) = torch.autograd.grad(loss, w)
        with torch.no_grad():
            w.sub_(grad)
        return loss.detach()

    return step, (_numbers(7, 6),)


def movement() -> tuple[Callable, tuple]:
    w = _numbers(4, 6, 5, seed=2).requires_grad_()

    def step(x, rows):
        a = x.permute(2, 0, 1) * w
        b = a[:, 1:5, ::2] + 1.0
        c = torch.flip(b, (1,)) * 3.0
        d = F.pad(c, (1, 2)) - 0.5
        e = d[:, :, rows] * 2.0
        g = torch.tril(e.sum(0)) + 1.0
        k = torch.where(g > 0.7, g * g, g)
        loss = k.sum()
        (grad,) = torch.autograd.grad(loss, w)
        with torch.no_grad():
            w.sub_(0.01 * grad)
        return loss.detach()

    return step, (_numbers(6, 5, 4), torch.tensor([0, 2, 5, 1]))


def views() -> tuple[Callable, tuple]:
    table, seen = torch.zeros(4, 5), torch.zeros(5)

    def step(x):
        row = table[1]
        row.add_(x)
        table[2:, ::2] = x[:3] * 2.0
        seen.mul_(0.5).add_(x * x)
        return table.sum() + seen.sum()

    return step, (_numbers(5),)


def chain() -> tuple[Callable, tuple]:
    """Intermediates of one size, whose memory is used again, and weights that change in place."""
    u, v = ((0.2 * _numbers(16, 16, seed=s)).requires_grad_() for s in (3, 4))

    def step(x):
        a = torch.tanh(x @ u)
        b = torch.tanh(a @ v)
        c = torch.tanh(b @ u)
        loss = (c - a).square().sum() + (b * a).sum()
        grads = torch.autograd.grad(loss, (u, v))
        with torch.no_grad():
            u.sub_(0.1 * grads[0])
            v.sub_(0.1 * grads[1])
        return loss.detach()

    return step, (_numbers(16, 16),)


def training() -> tuple[Callable, tuple]:
    torch.manual_seed(5)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)
    )
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x, y):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.param_groups[0]["lr"] *= 0.5
        return loss.detach()

    return step, (_numbers(9, 6), torch.arange(9) % 3)


def numbers() -> tuple[Callable, tuple]:
    def step(x, y):
        a = x.to(torch.int64)
        b = torch.tanh(y)
        c = torch.maximum(b, y * 0.3)
        d = torch.where(c < 0.0, c - 1.0, c + 2.0)
        e = d / (y * y + 1.0)
        return a, e, (e < 0.2).sum()

    return step, (_numbers(31) * 9, _numbers(31, seed=1).double())


class Mode:
    """What a step decides by."""

    scale = 1.0
    wide = True


def decisions() -> tuple:
    m = Mode()

    def step(x, m):
        out = x * 3.0 if m.wide else x - 1.0
        return out.sum()

    return step, (_numbers(5), m), lambda call: setattr(m, "wide", call < 4)


def scaled() -> tuple:
    m = Mode()

    def step(x, m):
        return (x * m.scale).sum()

    return step, (_numbers(5), m), lambda call: setattr(m, "scale", 1.0 + call)


STEPS = {
    f.__name__: f
    for f in (activations, movement, views, chain, training, numbers, decisions, scaled)
}


# ---- the faults


def _double(own: Callable) -> Callable:
    return lambda b, g, *rest, **attrs: b.mul(own(b, g, *rest, **attrs), 2.0)


def _off_by_one(own, node, indices, extents):
    found, mask = own(node, indices, extents)
    starts = node.attr("starts")
    moved = tuple(
        index.add([i], -1) if low > 0 else i for i, low in zip(found, starts, strict=True)
    )
    return moved, mask


def _unmasked(own, node, indices, extents):
    found, mask = own(node, indices, extents)
    return found, mask[:0]


def _as_it_stands(own, node, indices, extents):
    return tuple(indices), ()


def _forward_axes(own, node, indices, extents):
    axes = node.attr("axes")
    back = [indices[axes[i]] for i in range(len(axes))]
    shape = node.args[0].type.shape
    return tuple(index.divmod_index(i, n, extents)[1] for i, n in zip(back, shape, strict=True)), ()


def _without_last_write(graph):
    if not graph.writes:
        return graph
    *first, last = graph.writes
    return replace(graph, writes=(*first, replace(last, value=last.target)))


_fitted = memory._fitted


def _too_early(lifetimes, rooms, order):
    """Lifetimes end a launch too early."""
    short = [replace(x, last=max(x.first, x.last - 1)) for x in lifetimes]
    return _fitted(short, rooms, order)


def _all_at_once(lifetimes, rooms, order):
    """Every piece of memory lies at the beginning of the arena."""
    places, total = _fitted(lifetimes, (), order)
    return [replace(place, room=None, offset=0) for place in places], total


def _first_scalars(function):
    kept: list = []

    def perform(reals, scalars, *rest):
        kept[:] = kept or [list(scalars)]
        return function(reals, list(kept[0]), *rest)

    return perform


def _one_more_draw(function):
    def perform(*given):
        torch.rand(1)
        return function(*given)

    return perform


def _same_draw(function):
    kept: list = []

    def perform(*given):
        now = torch.get_rng_state()
        kept[:] = kept or [now]
        torch.set_rng_state(kept[0])
        try:
            return function(*given)
        finally:
            if not torch.equal(torch.get_rng_state(), kept[0]):
                torch.set_rng_state(now)
                torch.rand(1)

    return perform


def _blind_guard() -> Context:
    """No guard looks at a flag."""

    def without(own: Callable) -> Callable:
        def add(self, condition, *rest):
            if not re.search(r" is (True|False|None)$", condition):
                own(self, condition, *rest)

        return add

    stack = contextlib.ExitStack()
    for name in ("check", "expect"):
        own = getattr(GuardText, name)
        stack.enter_context(patch.object(GuardText, name, without(own)))
    return stack


def _no_view(t, base, steps, new):
    return base if steps else put_through(t, base, steps, new)


def _tril(own):
    return lambda t, input, diagonal=0: own(t, input, diagonal + 1)


def _rows() -> list[tuple]:
    return [
        *_derivatives(),
        *_values(),
        *_of_the_schedule(),
        *_of_runs(),
        *_of_printers(),
    ]


def _derivatives() -> list[tuple]:
    kind, at = "a derivative rule", "activations"
    doubled, summed = OPS["matmul"].vjp[1], OPS["reduce_sum"].vjp[0]
    tanh = vjp("tanh", lambda b, g, y, x: b.mul(g, b.add(b.mul(y, y), 1.0)))
    sigmoid = slope("sigmoid", lambda t, g, y, x: t.b.mul(g, y))
    log = vjp("log", lambda b, g, y, x: b.mul(g, y))
    relu = slope("relu", lambda t, g, y, x: g)
    return [
        ("tanh's derivative is 1 + y²", kind, at, tanh, "torch.tanh", "rules"),
        ("sigmoid's derivative lacks 1 - y", kind, at, sigmoid, "torch.sigmoid", "rules"),
        ("exp's derivative is 1", kind, at, vjp("exp", lambda b, g, y, x: g), "torch.exp", "rules"),
        ("log's derivative is y", kind, at, log, "torch.log", "rules"),
        ("relu's derivative is 1 everywhere", kind, at, relu, "torch.relu", "rules"),
        ("a product's is twice", kind, at, vjp("matmul", _double(doubled), 1), "x @ w", "rules"),
        ("a sum's is twice", kind, at, vjp("reduce_sum", _double(summed)), ".mean(", "rules"),
        (
            *("that of a * b by b is 1", kind, "movement"),
            *(vjp("mul", lambda b, g, y, x, z: g, 1), "g * g", "rules"),
        ),
    ]


def _values() -> list[tuple]:
    tanh = value("tanh", lambda t, x: t.b.tanh(t.b.neg(x)))
    sigmoid = value("sigmoid", lambda t, x: t.b.div(1.0, t.b.add(t.b.exp(x), 1.0)))
    alias = lambda: _everywhere("put_through", put_through, _no_view)  # noqa: E731
    return [
        ("tanh of -x", "a sign", "activations", tanh, "torch.tanh", "rules"),
        ("sigmoid of -x", "a sign", "activations", sigmoid, "torch.sigmoid", "rules"),
        (
            *("tril keeps one diagonal more", "a mask", "movement"),
            *(lambda: rule_of(torch.tril, _tril), "torch.tril", "rules"),
        ),
        ("a view's write does not reach its base", "an alias", "views", alias, "row.add_", "rules"),
        (
            *("a - b is b - a", "a sign", "activations"),
            *(a_pass(nodes(swapped("sub"))), "b - 0.25", "passes"),
        ),
        (
            *("products become sums", "a pass", "movement"),
            *(a_pass(nodes(renamed("mul", "add"))), "* w", "passes"),
        ),
        (
            *("sums become maxima", "a pass", "activations"),
            *(a_pass(nodes(renamed("reduce_sum", "reduce_max"))), ".sum(", "passes"),
        ),
        (
            *("the last write is dropped", "a missed write", "training"),
            *(a_pass(_without_last_write), "model(x)", "passes"),
        ),
        (
            *("the last write of a buffer is dropped", "a missed write", "views"),
            *(a_pass(_without_last_write), "seen.mul_", "passes"),
        ),
    ]


def _of_the_schedule() -> list[tuple]:
    taken = lambda self, origin, value, store: value.type == store.value.type  # noqa: E731
    return [
        (
            *("slices begin one too early", "an index map", "movement"),
            *(map_of("slice", _off_by_one), "a[:, 1:5", "kernels"),
        ),
        (
            *("flip reads as it stands", "an index map", "movement"),
            *(map_of("flip", _as_it_stands), "torch.flip", "kernels"),
        ),
        (
            *("permute reads by the inverse axes", "an index map", "movement"),
            *(map_of("permute", _forward_axes), "x.permute", "kernels"),
        ),
        (
            *("padding is not masked", "a mask", "movement"),
            *(map_of("pad", _unmasked), "F.pad", "kernels"),
        ),
        (
            *("memory ends a launch too early", "a donated buffer", "chain"),
            *(lambda: patch.object(memory, "_fitted", _too_early), "", "kernels"),
        ),
        (
            *("memory is handed on while it is read", "a donated buffer", "chain"),
            *(lambda: patch.object(Donors, "_ends", taken), "", "kernels"),
        ),
        (
            *("a write comes before the last reader", "a fusion order", "chain"),
            *(lambda: patch.object(memory, "_fitted", _all_at_once), "", "kernels"),
        ),
    ]


def _of_runs() -> list[tuple]:
    return [
        (
            *("a replay keeps the first learning rate", "a scalar baked", "training"),
            *(in_run(_first_scalars), "opt.step()", "inputs"),
        ),
        (
            *("a replay keeps the first number of an attribute", "a scalar baked", "scaled"),
            *(in_run(_first_scalars), "x * m.scale", "inputs"),
        ),
        (
            *("a flag is not looked at again", "a stale guard", "decisions"),
            *(_blind_guard, "x * 3.0 if", "inputs"),
        ),
        (
            *("a replay draws one number more", "an RNG offset", "training"),
            *(in_run(_one_more_draw), "", ""),
        ),
        (
            *("a replay draws the numbers of the call before", "an RNG offset", "training"),
            *(in_run(_same_draw), "", ""),
        ),
    ]


def _of_printers() -> list[tuple]:
    to_i64 = {**TEMPLATES["cast"], "f to i64": "llrint({0})"}
    precedence, rounding = "a printer's operator precedence", "a dtype rounding"
    rows = [
        ("where takes the other side", "a mask", "where", "({0} ? {2} : {1})", "torch.where"),
        ("floats are rounded to integers", rounding, "cast", to_i64, "x.to(torch.int64)"),
        ("doubles go through float", rounding, "tanh", "tj_tanhf((float){0})", "torch.tanh"),
        ("!a < b is (!a) < b", precedence, "lt", "(!({0} < {1}))", "c < 0.0"),
        ("a / b binds the next sum", precedence, "div", "({0} / {1} + 1)", "d / ("),
        ("the larger is the smaller", "a sign", "maximum", "({0} < {1} ? {0} : {1})", "maximum"),
    ]
    found = [
        (name, kind, "numbers", printed(op, text), token, "kernels", "c")
        for name, kind, op, text, token in rows
    ]
    added = printed("add", "({0} - {1})")
    found.append(
        ("sums print as differences", "a sign", "activations", added, "sigmoid", "kernels", "c")
    )
    return found


@contextlib.contextmanager
def rule_of(function: Callable, change: Callable) -> Iterator[None]:
    """The rule of a torch function is another one."""
    rule = RULES[function]
    with field(rule, "run", change(rule.run)):
        yield


FAULTS = [Fault(*row) for row in _rows()]
