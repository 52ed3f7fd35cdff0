"""Every capture rule in every spelling against eager: values, layout, errors, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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
