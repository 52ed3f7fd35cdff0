"""Runtime scalars: as Python's floats while tracing, recomputed on the host for new values."""

from __future__ import annotations

import copy
import json
import math
import operator
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch

from support.oracle import call, captured_of, host_function, traced
from tracejit.capture.effects.effects import Given
from tracejit.capture.trace.scalars import RELATIONS, TracedFloat, same_number

INF, NAN = math.inf, math.nan
VALUES = (0.0, -0.0, 1.0, -1.5, 2.5, 1e-300, 1e300, INF, -INF, NAN, 0.1)
ARITHMETIC = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
ERRORS = (ArithmeticError, ValueError, TypeError)


def outcome(run: Callable, *args: object) -> object:
    """The result, or the type of the error."""
    try:
        return run(*args)
    except ERRORS as error:
        return type(error)


def same(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return same_number(float(a), float(b))
    return type(a) is type(b) and (a == b or a != a)


def all_on_host(captured, values: list[float]) -> list[float]:
    """The host results of a trace for other values of its runtime scalars."""
    host = host_function(captured.host_nodes, captured.scalars, captured.effects.host)
    return host(values)


def on_host(captured, values: list[float]) -> float:
    """The only one of them."""
    (result,) = all_on_host(captured, values)
    return result


@pytest.mark.parametrize("symbol", ARITHMETIC)
@pytest.mark.parametrize("other", [3, 0, -2, True, 2.5, 0.0, -0.5, 10**20, INF, NAN], ids=repr)
@pytest.mark.sweep(2)
def test_arithmetic_with_numbers(symbol, other):
    function, box = ARITHMETIC[symbol], [other]  # a float in a list is a literal
    for step in (lambda x: function(x, box[0]), lambda x: function(box[0], x)):
        for value in VALUES:
            expected = outcome(step, value)
            found = outcome(call, step, value)
            assert same(found, expected), (value, found, expected)
        captured = outcome(captured_of, step, 1.5)
        if isinstance(captured, type) or not captured.host_nodes:
            continue
        for value in VALUES:
            expected = outcome(step, value)
            found = outcome(on_host, captured, [value])
            assert same(found, expected), (value, found, expected)


@pytest.mark.parametrize("symbol", ARITHMETIC)
def test_arithmetic_of_two(symbol):
    function = ARITHMETIC[symbol]
    captured = captured_of(lambda a, b: function(a, b), 1.5, 2.5)
    assert len(captured.host_nodes) == 1 and captured.predicates == ()
    for a in VALUES:
        for b in VALUES:
            expected = outcome(function, a, b)
            assert same(outcome(on_host, captured, [a, b]), expected), (a, b)


def test_unary():
    def step(x):
        return -x, abs(x), +x, x

    captured = captured_of(step, -2.0)
    assert captured.predicates == ()
    for x in VALUES:
        assert all(map(same, all_on_host(captured, [x]), step(x)))


def test_long_expressions_are_recomputed():
    def step(lr, beta, n):
        return lr * (1 - beta**n) / (1 - beta) + abs(-lr) // 0.3 % 7 - 2**lr

    captured = captured_of(step, 0.1, 0.9, 3.0)
    for values in ([0.1, 0.9, 3.0], [0.01, 0.5, 4.0], [3.0, 0.25, 10.0]):
        assert same(on_host(captured, values), step(*values))


_TO_INTEGERS = {
    "round": lambda x: round(x),
    "floor": lambda x: math.floor(x),
    "ceil": lambda x: math.ceil(x) * 3 // 2,
    "trunc": lambda x: 2 ** math.trunc(x),
    "negative power": lambda x: math.floor(x) ** -2,
    "divmod": lambda x: divmod(round(x), 3),
    "rdivmod": lambda x: divmod(7, x),
    "quotient": lambda x: -round(x) / 3 + abs(round(-x)) * 0.5,
    "remainder": lambda x: (7 % round(x), round(x) - 4),
}


@pytest.mark.parametrize("name", _TO_INTEGERS)
def test_integers_are_arithmetic_too(name):
    step = _TO_INTEGERS[name]
    captured = captured_of(step, 2.5)
    assert all(p.relation == "lt" for p in captured.predicates)  # the sign of an exponent
    for x in (2.5, 3.5, 17.9, 1.2):
        expected = step(x)
        results = expected if isinstance(expected, tuple) else (expected,)
        assert same_structure(tuple(all_on_host(captured, [x])), results)
        assert same_structure(call(step, x), expected)


_USES_OF_INTEGERS = {
    "index": (lambda n: [1, 2, 3, 4][n], 1),
    "range": (lambda n: len(range(n)), 1),
    "%": (lambda n: "%d" % n, 1),  # noqa: UP031
    "format": (lambda n: f"{n:03d}", 1),
    "hash": (lambda n: {3: "three"}.get(n), 1),
    "bits": (lambda n: (n & 1, n << 2, 5 | n, n.bit_length()), 1),
    "numpy": (lambda n: (np.int64(2) * n, np.sqrt(n), np.array([n, 1]).sum()), 1),
    "isinstance": (lambda n: (isinstance(n, int), isinstance(n, float), n.__class__), 0),
    "type": (lambda n: (type(n) is int, type(n)), 0),
    "even": (lambda n: n % 2 == 0, 1),
    "none": (lambda n: (n.real, +n, n.imag), 0),
    "copy": (lambda n: copy.deepcopy(n), 1),
    "complex": (lambda n: n * 1j, 1),
    "modular": (lambda n: pow(n, 2, 5), 1),
    "text": (lambda n: str(n) + repr(n), 1),
    "float32 of numpy": (lambda n: np.float32(2) / n, 1),
}


@pytest.mark.parametrize("name", _USES_OF_INTEGERS)
def test_what_python_asks_of_integers(name):
    use, decisions = _USES_OF_INTEGERS[name]
    captured = captured_of(lambda x: (use(math.floor(x)), 0)[1], 3.25)
    assert bool(captured.predicates) == bool(decisions)
    found = call(lambda x: use(math.floor(x)), 3.25)
    assert same_structure(found, use(3))


def test_zero_division_raises_as_python():
    for step in (
        lambda x: 1 / x,
        lambda x: 1 // x,
        lambda x: 1 % x,
        lambda x: 0.0**-x if x else 1 / x,
    ):
        with pytest.raises(ZeroDivisionError):
            call(step, 0.0)
    captured = captured_of(lambda x: 1 / x, 2.0)
    with pytest.raises(ZeroDivisionError):
        on_host(captured, [0.0])


def test_overflow_raises_as_python():
    with pytest.raises(OverflowError):
        call(lambda x: x**1000, 1e300)
    with pytest.raises(OverflowError):
        call(lambda x: x * 10**400, 2.0)


def test_complex_results_pin_the_value():
    captured = captured_of(lambda x: ((x**0.5).imag, 3), -4.0)
    assert [p.relation for p in captured.predicates] == ["is"]
    assert call(lambda x: x**0.5, -4.0) == (-4.0) ** 0.5
    captured = captured_of(lambda x: x + 1j, 2.0)
    assert [p.relation for p in captured.predicates] == ["is"]
    assert call(lambda x: x + 1j, 2.0) == 2 + 1j


@pytest.mark.parametrize("relation", ["lt", "le", "eq", "ne", "gt", "ge"])
def test_comparisons_are_predicates(relation):
    function = getattr(operator, relation)
    box = [None]  # a float in a list is a literal
    for other in (2, 2.5, 1.0, INF, NAN, True):
        box[0] = other
        for value in VALUES:
            captured = captured_of(lambda x: bool(function(x, box[0])), value)
            (predicate,) = captured.predicates
            assert predicate.outcome is function(value, other)
            assert RELATIONS[predicate.relation](value, other) is predicate.outcome
    captured = captured_of(lambda a, b: function(a * 2, b), 1.0, 2.0)
    assert len(captured.predicates) == 1
    assert captured_of(lambda x: function(3, x), 1.0).predicates[0].outcome is function(3, 1.0)


def test_comparison_with_something_else():
    assert call(lambda x: (x == "s", x != "s", x == None), 1.0) == (False, True, False)  # noqa: E711
    with pytest.raises(TypeError):
        call(lambda x: x < "s", 1.0)


_DECISIONS = {
    "bool": lambda x: bool(x),
    "if": lambda x: 1 if x else 2,
    "not": lambda x: not x,
    "int": lambda x: int(x),
    "round 1": lambda x: round(x, 1),
    "hash": lambda x: hash(x),
    "repr": lambda x: repr(x),
    "str": lambda x: str(x),
    "format": lambda x: f"{x:.3f}",
    "is_integer": lambda x: x.is_integer(),
    "ratio": lambda x: x.as_integer_ratio(),
    "hex": lambda x: x.hex(),
    "float": lambda x: float(x) * 2,
    "dict": lambda x: {2.5: "found"}.get(x),
    "set": lambda x: x in {2.5, 3.5},
    "in": lambda x: x in [1.0, 2.5],
    "max": lambda x: max(x, 1.0) is x,
    "min": lambda x: min(1.0, x),
    "sorted": lambda x: sorted([3.0, x, 1.0])[0],
    "range": lambda x: list(range(int(x))),
    "real": lambda x: x.real,
    "complex": lambda x: complex(x),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "copy": lambda x: float(copy.copy(x)),
}


@pytest.mark.parametrize("name", _DECISIONS)
def test_decisions_are_predicates(name):
    step = _DECISIONS[name]
    captured = captured_of(step, 2.5)
    assert captured.predicates, f"{name} decided on the value and left no predicate"
    assert same_structure(call(step, 2.5), step(2.5))


def same_structure(a: object, b: object) -> bool:
    return a == b and str(a) == str(b)


_MATH = [
    *(math.sqrt, math.exp, math.log, math.log2, math.log10, math.log1p, math.expm1, math.sin),
    *(math.cos, math.tan, math.tanh, math.atan, math.fabs, math.isnan, math.isfinite, math.isinf),
    *(math.degrees, math.erf, math.gamma, math.frexp, math.modf),
]


@pytest.mark.parametrize("function", _MATH, ids=lambda f: f.__name__)
def test_math_sees_the_true_value(function):
    assert call(lambda x: function(x), 0.75) == function(0.75)
    assert call(lambda x: math.copysign(x, -1) + math.fmod(x, 0.5) + math.pow(x, 2), 0.75) == (
        math.copysign(0.75, -1) + math.fmod(0.75, 0.5) + math.pow(0.75, 2)
    )


def test_sum_and_nested_arguments():
    captured = captured_of(lambda betas, eps: sum(betas) + eps, (0.9, 0.99), 1e-8)
    assert len(captured.scalars) == 3
    assert on_host(captured, [1.0, 2.0, 3.0]) == 6.0


def test_ints_and_bools_are_not_runtime_scalars():
    captured = captured_of(lambda n, flag, x: x * n if flag else x, 3, True, torch.ones(2))
    assert captured.scalars == ()


def test_floats_of_closures_globals_and_defaults():
    lr = 0.5

    def step(x, momentum=0.9, *, eps=1e-3):
        return x * lr + momentum * GLOBAL + eps

    _, made = traced(step, torch.ones(2))
    assert sorted(made.scalars) == sorted([0.5, 0.9, 1e-3, GLOBAL])
    torch.testing.assert_close(call(step, torch.ones(2)), step(torch.ones(2)))


GLOBAL = 0.25


def test_tensors_next_to_runtime_scalars():
    x = torch.linspace(-2, 2, 5)

    def step(x, a, b):
        y = a * x + x / b - a**2 + (a - x) / (x + 3 * b)
        y = torch.where(y > a, y, b).clamp(min=-a, max=b * 9)
        z = torch.full((5,), a) + torch.full_like(x, b) + x.new_full((5,), a * b)
        return torch.add(y, z, alpha=a), y**a, a**z, x.masked_fill(x > 0, a), x.abs().pow(b)

    assert captured_of(step, x, 0.5, 2.5).predicates == ()
    for mine, theirs in zip(call(step, x, 0.5, 2.5), step(x, 0.5, 2.5), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_gradients_next_to_runtime_scalars():
    def step(w, a):
        loss = ((w * a - a / (w + 5)).clamp(max=a) ** a).sum() + (a**w).mean()
        loss.backward()
        with torch.no_grad():
            w -= a * w.grad
        return loss.detach()

    assert captured_of(step, torch.ones(5, requires_grad=True), 1.5).predicates == ()
    ours = torch.linspace(0.5, 2, 5).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    torch.testing.assert_close(call(step, ours, 1.5), step(theirs, 1.5))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("made", [lambda n: torch.zeros(int(n * 2)), torch.arange])
def test_a_size_pins_the_value(made):
    assert captured_of(lambda n: made(n), 1.5).predicates[0].relation == "is"


def test_after_the_trace_it_is_a_plain_float():
    kept = []

    def step(x):
        kept.append(x * 2)
        return x

    captured = captured_of(step, 1.25)
    nodes, predicates = len(captured.host_nodes), len(captured.predicates)
    x = kept[0]
    assert type(x) is TracedFloat and isinstance(x, float)
    assert type(x + 1) is float and type(-x) is float and type(abs(x)) is float
    assert type(1 / x) is float and x == 2.5 and x < 3 and hash(x) == hash(2.5)
    assert repr(x) == "2.5" and f"{x:.2f}" == "2.50" and json.dumps(x) == "2.5"
    assert type(pickle.loads(pickle.dumps(x))) is float
    assert type(copy.deepcopy(x)) is float and copy.deepcopy(x) == 2.5
    assert math.sqrt(x) == math.sqrt(2.5) and round(x) == 2 and int(x) == 2
    torch.testing.assert_close(torch.ones(2) * x, torch.ones(2) * 2.5)
    assert (len(captured.host_nodes), len(captured.predicates)) == (nodes, predicates)


def test_a_scalar_of_another_trace_is_its_value():
    kept = []

    def first(x):
        kept.append(x)

    captured_of(first, 2.5)
    captured = captured_of(lambda x: x * kept[0], 2.0)
    assert on_host(captured, [3.0]) == 7.5
    torch.testing.assert_close(call(lambda t: t * kept[0], torch.ones(2)), torch.ones(2) * 2.5)


# ---- numbers in tensors


ITEMS: dict[str, Callable] = {
    "as it is": lambda t: t.item(),
    "counted": lambda t: (t + 1).item(),
    "arithmetic": lambda t: ((t * 3 - 0.1) / (2 + t)).item(),
    "powers": lambda t: (t.abs().sqrt() + t**2 - 0.9**t).item(),
    "in place": lambda t: t.clone().mul_(0.3).sub_(t).neg_().item(),
    "a view": lambda t: t.detach().reshape(1, 1).add_(0.5).squeeze().item(),
    "with constants": lambda t: (t * torch.tensor(0.3) + torch.ones_like(t)).item(),
    "cast": lambda t: (t.double() / 3).float().item() + t.half().item(),
    "filled": lambda t: torch.full((), t.item() * 2).copy_(t).item(),
    "as a float": lambda t: 2 * t.item() + abs(t.item()),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ITEMS)
@pytest.mark.sweep(0.17)
def test_items(name, dtype):
    """`.item()` of what is computed from CPU numbers: eager's value, for other numbers too."""
    step = ITEMS[name]
    captured = captured_of(step, torch.tensor(1.5, dtype=dtype))
    assert captured.graph.params == captured.graph.nodes == ()  # all on the host
    for number in (1.5, -0.7, 3.0, 100.1):
        tensor = torch.tensor(number, dtype=dtype)
        expected = step(tensor.clone())
        assert math.isclose(call(step, tensor.clone()), expected, rel_tol=1e-6), number
        found = all_on_host(captured, [tensor.item()])[0]
        assert math.isclose(found, expected, rel_tol=1e-6), number


@pytest.mark.parametrize(
    ("step", "outcome"),
    [
        (lambda t: 1 if t else 0, 1),
        (lambda t: 1 if t > 1 else 0, 1),
        (lambda t: 1 if t + 1 <= 2.5 else 0, 1),
        (lambda t: 1 if t.item() == 2 else 0, 0),
        (lambda t: int(t), 1),
        (lambda t: float(t), 1.5),
    ],
)
def test_decisions_on_items_are_predicates(step, outcome):
    captured = captured_of(step, torch.tensor(1.5))
    assert (
        captured.effects.returned == Given(0)
        and captured.given == (outcome,)
        and len(captured.predicates) == 1
    )


def test_a_number_read_after_a_write_is_written_by_the_host():
    count, total = torch.tensor(3.0), torch.tensor(1.0, dtype=torch.float64)

    def step(x):
        count.add_(1)
        total.add_(count.item() * 0.5)
        x.mul_(total)
        return total.item(), x.sum()

    captured = captured_of(step, torch.ones(2))
    assert (
        len(captured.effects.host_writes) == 2 and len(captured.graph.writes) == 1
    )  # the plan's: x
    x = torch.ones(2)
    assert call(step, x)[0] == 3.0 and count.item() == 4.0 and total.item() == 3.0
    assert call(step, x)[0] == 5.5 and x.tolist() == [16.5, 16.5]


def test_a_float_kept_from_an_earlier_call_is_a_number():
    kept = []

    def step(x, rate):
        kept.append(rate * 2)
        return x * kept[0] + rate, kept[0] + rate, rate > kept[0]

    first, second = call(step, torch.ones(2), 0.25), call(step, torch.ones(2), 0.75)
    assert first[0].tolist() == [0.75, 0.75] and second[0].tolist() == [1.25, 1.25]
    assert second[1:] == (1.25, True) and type(second[1]) is float
    assert kept[0].live is None and kept[0].scalars.journal is None
