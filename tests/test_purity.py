"""Purity by argument: C functions called with plain values and with runtime scalars.

A runtime scalar that reaches C code must be neither lost nor baked into a plan: each function of
the math module is tried with one that changes between calls, against eager.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable
from math import sqrt

import pytest
import torch

import tracejit
from support.worlds import Case, check, table
from tracejit.capture.python import mathematics
from tracejit.capture.python.patches import intercepted

X = torch.linspace(-1, 2, 6)
CASES: dict[str, Case] = {}
case = table(CASES)
RATES = (0.25, 0.25, 0.25, 0.5, 0.75, 0.25, 1.0)


def rates(i: int) -> tuple[float]:
    return (RATES[i],)


# ---- each function of math, with a runtime scalar

# How a step calls each function that takes one float; others have a row of their own.
CALLS: dict[str, Callable[[float], object]] = {
    **{
        name: eval(compile(f"lambda a: math.{name}(a)", __file__, "eval"))
        for name in (
            *("sqrt", "fabs", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "cbrt"),
            *("erf", "erfc", "gamma", "lgamma", "sin", "cos", "tan", "asin", "acos", "atan"),
            *("sinh", "cosh", "tanh", "asinh", "degrees", "radians", "floor", "ceil", "trunc"),
            *("ulp", "isnan", "isinf", "isfinite"),
        )
    },
    "acosh": lambda a: math.acosh(a + 1),
    "atanh": lambda a: math.atanh(a / 2),
    "pow": lambda a: math.pow(a, 3) + math.pow(2, a),
    "fmod": lambda a: math.fmod(7.5, a) + math.fmod(a, -2),
    "copysign": lambda a: math.copysign(a, -1) + math.copysign(2, a),
    "atan2": lambda a: math.atan2(a, -2.0),
    "hypot": lambda a: math.hypot(a, 3) + math.hypot(a, a, 2),
    "dist": lambda a: math.dist([a, 1.0], (2.0, a)),
    "fsum": lambda a: math.fsum(x * a for x in range(3)),
    "prod": lambda a: math.prod([a, 2, a], start=3) + math.prod(iter([a])),
    "isclose": lambda a: math.isclose(a, 0.5) + 2 * math.isclose(0.75, a, rel_tol=0.4),
    "frexp": lambda a: math.frexp(a)[0],
    "modf": lambda a: math.modf(a * 3)[0],
    "ldexp": lambda a: math.ldexp(a, 2),
    "remainder": lambda a: math.remainder(a, 0.3),
    "nextafter": lambda a: math.nextafter(a, 9.0) - a,
    "gcd": lambda a: a * math.gcd(12, int(a * 8)),
    "lcm": lambda a: a * math.lcm(2, int(a * 8)),
    "comb": lambda a: math.comb(5, int(a * 4)),
    "perm": lambda a: math.perm(5, int(a * 4)),
    "factorial": lambda a: math.factorial(int(a * 4)),
    "isqrt": lambda a: math.isqrt(int(a * 16)),
}


def test_each_function_of_math_has_a_row():
    assert CALLS.keys() == mathematics.ORIGINALS.keys()


@pytest.mark.parametrize("mode", ["auto", "rerun"])
@pytest.mark.parametrize("name", CALLS)
def test_a_runtime_scalar_is_not_baked(name, mode):
    call = CALLS[name]

    def step(x, a):
        return x.double() * call(a)

    compiled = tracejit.compile(step, mode=mode, backend="numpy")
    for i in range(7):
        (a,) = rates(i)
        torch.testing.assert_close(compiled(X, a), step(X, a), rtol=1e-12, atol=0)
    if mode == "auto":
        assert compiled.explain_mode().startswith("replay"), compiled.explain_mode()


@pytest.mark.parametrize("name", [*mathematics.MATH])
def test_a_function_of_floats_makes_no_plan_for_each_value(name):
    call = CALLS[name]
    if name == "hypot":
        call = lambda a: math.hypot(a, 3)  # noqa: E731  more than two are pinned
    compiled = tracejit.compile(lambda x, a: x * call(a), backend="numpy")
    for i in range(7):
        compiled(X, 0.1 + i / 10)
    assert compiled.stats.compiles == 1 and compiled.stats.replays == 5


@pytest.mark.parametrize("number", [0.0, -1.0])
def test_an_error_of_a_function_is_eagers(number):
    compiled = tracejit.compile(lambda x, a: x * math.log(a), backend="numpy")
    for _ in range(4):
        compiled(X, 0.5)
    assert compiled.stats.replays
    with pytest.raises(ValueError, match="math domain error"):
        compiled(X, number)
    torch.testing.assert_close(compiled(X, 2.0), X * math.log(2.0))


def test_other_threads_and_later_code_see_plain_functions():
    found = []
    with intercepted():
        thread = threading.Thread(target=lambda: found.append((math.sqrt(4.0), math.fsum([1, 2]))))
        thread.start()
        thread.join()
    assert found == [(2.0, 3.0)]
    assert math.sqrt is sqrt and math.floor is mathematics.ORIGINALS["floor"]


# ---- whole steps; how each ends


@case("replay")
def attention_with_math_sqrt(w):
    return lambda: (X / math.sqrt(X.size(0))).softmax(0)


@case("replay", args=rates)
def cosine_schedule(w):
    return lambda t: X * 0.5 * (1 + math.cos(math.pi * t))


@case("replay", args=rates)
def a_function_of_math_given_to_map(w):
    return lambda a: X * sum(map(math.sqrt, [a, 2.0]))


@case("replay")
def an_alias_without_runtime_scalars(w):
    return lambda: X / sqrt(X.size(0))


@case("rerun", args=rates)
def an_alias_with_a_runtime_scalar(w):
    return lambda a: X * sqrt(a)


@case("rerun", args=rates)
def an_alias_given_to_map(w):
    """C calls it, which no profiler sees: this was replayed with the value of the trace."""
    return lambda a: X * sum(map(sqrt, [a]))


@case("rerun", args=rates)
def an_alias_in_a_partial(w):
    root = functools.partial(sqrt)
    return lambda a: X * root(a)


@case("rerun", args=rates)
def a_slot_of_float_in_a_partial(w):
    twice = functools.partial(float.__mul__, 2.0)
    return lambda a: X * twice(a)


@case("rerun")
def a_clock_in_a_partial(w):
    clock = functools.partial(time.perf_counter)
    return lambda: X if clock() > 0 else X * 2


@case("rerun", args=rates)
def an_alias_in_a_table(w):
    table = {"root": sqrt}
    return lambda a: X * sum(map(table["root"], [a]))


@case("rerun", args=rates)
def an_alias_as_a_default(w):
    def step(a, root=sqrt):
        return X * sum(map(root, [a]))

    return step


@case("replay", args=lambda i: (float("nan") if i == 4 else RATES[i],))
def a_decision_by_isnan(w):
    return lambda a: X if math.isnan(a) or not math.isfinite(a) else X * a


@pytest.mark.parametrize("name", CASES)
def test_case(name):
    check(CASES[name])


def test_the_reason_names_the_line_and_the_remedy():
    compiled = tracejit.compile(lambda x, a: x * sqrt(a), backend="numpy")
    for _ in range(4):
        compiled(X, 0.5)
    why = compiled.explain_mode()
    assert "test_purity.py:" in why and "math.sqrt by another name" in why
    assert "call it as an attribute of math" in why
