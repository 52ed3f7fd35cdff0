"""Every capture rule in every spelling against eager: values, layout, errors, gradients."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch

import tracejit
from support.function_checks import (
    check_gradients,
    check_runtime_scalars,
    check_values,
    is_logic_in_place,
    on_each_sample,
    parameters,
    runtime_floats,
    tensors_of,
)
from support.function_samples import (
    ELSEWHERE,
    ROWS,
    SPELLED,
    bare_name,
    each_function,
    samples_of,
)
from support.function_samples_indexing import is_indexing  # its samples: test_functions_indexing
from support.function_samples_nn import is_nn  # its samples have their tests in test_functions_nn
from support.function_samples_random import draws  # its samples: test_draws
from support.oracle import call
from tracejit.capture.trace.table import RULES, Row, function_name, rule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # eager's deprecations


OTHERS = [f for f in each_function() if not (is_nn(f) or is_indexing(f) or draws(f))]


def test_every_function_has_samples():
    assert [function_name(f) for f in each_function() if not samples_of(f)] == []
    names = {bare_name(f) for f in RULES}
    assert set(ROWS) <= names, set(ROWS) - names
    assert names >= ELSEWHERE, ELSEWHERE - names


def test_every_function_has_odd_shapes():
    """test_support runs the samples in every dtype."""
    for function in each_function():
        shapes = {x.shape for sample in samples_of(function) for x in tensors_of(sample.args)}
        odd = any(n % 2 for shape in shapes for n in shape)
        assert odd or not shapes, function_name(function)


def test_a_second_rule_is_an_error():
    first = RULES[torch.exp]
    with pytest.raises(
        ValueError, match=r"exp has two rules: tracejit\.\S*unary\S* and test_functions"
    ):
        rule(torch.exp)(lambda t, x: x)
    assert RULES[torch.exp] is first
    rule(torch.exp)(first.run)  # the same again is none


def test_a_rule_says_what_it_is_derived_from():
    plain, written = RULES[torch.exp2], RULES[torch.exp2_]
    assert (plain.family, plain.form, plain.of, plain.row.name) == ("unary", "", None, "exp2")
    assert (written.form, written.of) == ("in place", plain)
    flagged = RULES[torch.nn.functional.leaky_relu]
    assert (flagged.form, flagged.family, flagged.own.form) == ("signature", "activation", "")
    assert RULES[torch._foreach_abs_].of is RULES[torch.Tensor.abs_]


def test_a_row_has_a_slope_for_each_input():
    with pytest.raises(ValueError, match="hypot has 2 inputs and 1 slopes"):
        Row("hypot", lambda t, x, y: x, (lambda t, g, y, *xs: g,), arity=2)


def test_empty():
    """Memory as it comes, of the shape, dtype and layout that eager gives it."""

    def step(x):
        made = (torch.empty(2, 3), torch.empty((0,), dtype=torch.int8), torch.empty_like(x))
        made += x.new(5, 3), x.new(x.shape)
        return *made, x.new_empty(4), x.new_empty((2, 1), dtype=torch.float64)

    for x in (torch.ones(3, 2).t(), torch.ones(5, dtype=torch.bfloat16)):
        for mine, his in zip(call(step, x), step(x), strict=True):
            assert (mine.shape, mine.dtype, mine.stride()) == (his.shape, his.dtype, his.stride())


@pytest.mark.parametrize("function", parameters(OTHERS))
@pytest.mark.sweep(2)
def test_values(function: Callable):
    """Result, layout, aliasing, and what is left of the arguments equal eager's."""
    on_each_sample(check_values, function, samples_of(function))


SCALED = [f for f in OTHERS if any(runtime_floats(s) for s in samples_of(f))]


@pytest.mark.parametrize("function", parameters(SCALED))
@pytest.mark.sweep(2)
def test_runtime_scalars(function: Callable):
    """Floats that reach a function as arguments of the step give what literals give."""
    rows = [s for s in samples_of(function) if runtime_floats(s) and not s.refused]
    if SPELLED[bare_name(function)] == "pow":  # eager's rsqrt(-inf) is nan, its pow(-inf, -0.5) 0
        rows = [s for s in rows if runtime_floats(s) != [-0.5]]
    on_each_sample(check_runtime_scalars, function, rows)


DIFFERENTIABLE = [f for f in OTHERS if not is_logic_in_place(f)]


@pytest.mark.parametrize("function", parameters(DIFFERENTIABLE))
@pytest.mark.sweep(8)
def test_gradients(function: Callable):
    on_each_sample(check_gradients, function, samples_of(function))


SHARES = (0.5, 0.69, 0.71, 0.875, 0.96875, 1.0, 1.0078125, 1.125, 1.28125, 1.3125, 1.5, 2.0)


def _poisson(a: int, x: float) -> float:
    """Q(a, x) of a whole a: the chance of less than a events where x are expected."""
    with localcontext() as context:
        context.prec = 60
        mean = Decimal(x)
        term = total = (-mean).exp()
        for k in range(1, a):
            term = term * mean / k
            total += term
    return float(total)


@pytest.mark.parametrize("wrap", [torch.tensor, float])
def test_degrees_of_polynomials_are_those_of_the_call(wrap: Callable):
    """How far a recurrence goes is decided by values, which another call has others of."""
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    function = torch.special.hermite_polynomial_h
    step = tracejit.compile(lambda x, n: function(x, n), on_unsupported="raise")
    for n in (2.0, 5.0, 1.0, 5.0, 7.0, 7.0, 7.0, 9.0, 3.0, 40.0):
        torch.testing.assert_close(step(x, wrap(n)), function(x, wrap(n)))


def test_incomplete_gamma_functions_of_large_arguments():
    """Near x = a torch's own float64 is exact to nine digits only."""
    places = [(a, a * share) for a in (21, 50, 199, 200, 201, 1000) for share in SHARES]
    upper = torch.tensor([_poisson(a, x) for a, x in places], dtype=torch.float64)
    a = torch.tensor([a for a, _ in places], dtype=torch.float64)
    x = torch.tensor([x for _, x in places], dtype=torch.float64)
    step = tracejit.compile(
        lambda a, x: (torch.igammac(a, x), torch.igamma(a, x)), on_unsupported="raise"
    )
    ours, lower = step(a, x)
    torch.testing.assert_close(ours, upper, rtol=2e-12, atol=1e-300)
    torch.testing.assert_close(lower, 1 - upper, rtol=0, atol=1e-14)
    ours, lower = step(a.float(), x.float())
    torch.testing.assert_close(ours, upper.float(), rtol=0, atol=4e-6)
    torch.testing.assert_close(lower, 1 - upper.float(), rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", ["igamma", "igammac", "zeta"])
def test_slopes_by_one_argument(name: str):
    """Eager has a derivative by the second argument alone, here with a first that has its own."""
    function = getattr(torch.special, name.replace("igamma", "gammainc"))
    first = torch.tensor([1.25, 2.0, 3.5, 9.0, 40.0], dtype=torch.float64)

    def step(x, first):
        (slope,) = torch.autograd.grad(function(first.detach(), x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((slope * slope).sum(), x)
        return slope.detach(), second

    def x():
        return torch.tensor([0.3, 2.5, 1.0, 12.0, 38.0], dtype=torch.float64, requires_grad=True)

    compiled = tracejit.compile(step, on_unsupported="raise")
    for ours, eager in zip(compiled(x(), first), step(x(), first), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-15)

    def by_first(first, x):
        return torch.autograd.grad(function(first, x).sum(), first)

    with pytest.raises(RuntimeError, match="is not implemented"):
        by_first(first.requires_grad_(), x())
    with pytest.raises(RuntimeError, match="is not implemented"):
        tracejit.compile(by_first, on_unsupported="raise")(first, x())
