"""Purity by argument: C functions called with plain values and with runtime scalars.

A runtime scalar that reaches C code must be neither lost nor baked into a plan: each function of
the math module is tried with one that changes between calls, against eager.
"""

from __future__ import annotations

import bisect
import cProfile
import fractions
import functools
import heapq
import itertools
import json
import logging
import math
import random
import re
import statistics
import struct
import sys
import textwrap
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from math import sqrt
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tracejit
from support.worlds import Case, check, table
from tracejit.capture.proof.watch import Seen
from tracejit.capture.python import mathematics
from tracejit.capture.python.origins import origin
from tracejit.capture.python.patches import intercepted
from tracejit.errors import TracejitWarning

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
@pytest.mark.sweep(2)
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
@pytest.mark.sweep(0.34)
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


@case("replay", args=rates)
def an_alias_with_a_runtime_scalar(w):
    return lambda a: X * sqrt(a)


@case("replay", args=rates)
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


@case("replay", args=rates)
def an_alias_in_a_table(w):
    table = {"root": sqrt}
    return lambda a: X * sum(map(table["root"], [a]))


@case("replay", args=rates, changes={5: lambda w: setattr(w, "root", math.exp)})
def an_alias_as_an_attribute(w):
    w.root, roots = math.sqrt, [math.log2, math.sqrt]

    def step(a):
        return X * w.root(a) + sum(root(a + 1) for root in roots)

    return step


@case("replay", args=rates, changes={5: lambda w: w.rebind()})
def an_alias_in_a_closure(w):
    root = math.sqrt

    def rebind():
        nonlocal root
        root = math.cos

    w.rebind = rebind
    return lambda a: X * root(a)


@case("rerun", args=rates)
def an_alias_as_a_default(w):
    def step(a, root=sqrt):
        return X * sum(map(root, [a]))

    return step


@case("replay", args=lambda i: (float("nan") if i == 4 else RATES[i],))
def a_decision_by_isnan(w):
    return lambda a: X if math.isnan(a) or not math.isfinite(a) else X * a


# ---- numpy, the standard library, and settings of the process

KEPT = functools.lru_cache(lambda n: n * 2.0)
LOG = logging.getLogger("tests.purity")
LAYER = re.compile(r"layer(\d+)")


def numpy_case(call, mode="replay"):
    """A case whose step multiplies by a number that numpy makes of a rate."""
    name = f"numpy_{len(CASES)}"

    def build(w):
        return lambda a: X * float(call(a))

    build.__name__ = name
    case(mode, args=rates)(build)


for _call in (
    *(lambda a: np.sqrt(a), lambda a: np.log(a), lambda a: 0.5 * (1 + np.cos(np.pi * a))),
    *(lambda a: np.maximum(a, 0.6), lambda a: np.clip(a, 0.3, 0.7), lambda a: np.power(a, 2)),
    *(lambda a: np.mean([a, 1.0]), lambda a: np.float64(a), lambda a: np.float64(2) * a),
    *(lambda a: np.floor(a * 3), lambda a: np.prod([a, a]), lambda a: np.array([a, 1]).sum()),
    *(lambda a: np.isnan(a) + 1, lambda a: np.sqrt(a).item() / 2, lambda a: 1 / np.exp(-a)),
    *(lambda a: np.complex128(a).real, lambda a: np.float64(1) - np.log(a - a + 1e-9)),
    *(lambda a: statistics.mean([a, 1.0]), lambda a: heapq.nlargest(1, [a, 0.6])[0]),
    *(lambda a: bisect.bisect([0.3, 0.6], a), lambda a: KEPT(a)),
):
    numpy_case(_call)
for _call in (
    lambda a: struct.unpack("d", struct.pack("d", a))[0],
    lambda a: json.loads(json.dumps([a]))[0],
    lambda a: np.interp(0.5, [0.6, 1.0], [0.0, 1.0], left=a),
    lambda a: statistics.fmean([a, 1.0]),
):
    numpy_case(_call, "rerun")


@case("replay")
def the_standard_library_on_plain_values(w):
    def step():
        n = int(LAYER.match("layer3").group(1)) + len(json.dumps({"a": [1, 2.5]}))
        n += len(textwrap.dedent("  a")) + statistics.mean([1.0, 2.0]) + KEPT(3)
        return X * n * float(fractions.Fraction(1, 4)) * int(np.prod(X.shape))

    return step


@case("replay", changes={4: lambda w: torch.set_num_threads(torch.get_num_threads() % 2 + 1)})
def the_number_of_threads(w):
    return lambda: X * torch.get_num_threads()


def set_overwrite(w):
    torch.__future__.set_overwrite_module_params_on_conversion(True)


@pytest.fixture(autouse=True)
def _settings():
    threads, dtype = torch.get_num_threads(), torch.get_autocast_dtype("cpu")
    yield
    reset()
    torch.set_num_threads(threads)
    torch.set_autocast_dtype("cpu", dtype)


def reset():
    torch.set_num_threads(2)
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False
    torch.set_autocast_dtype("cpu", torch.bfloat16)
    LOG.setLevel(logging.WARNING)


@case("replay", changes={4: set_overwrite})
def a_flag_of_the_future(w):
    asked = torch.__future__.get_overwrite_module_params_on_conversion
    return lambda: X * (2 if asked() else 3)


@case("replay", changes={4: lambda w: torch.use_deterministic_algorithms(True)})
def deterministic_algorithms(w):
    return lambda: X * (2 if torch.are_deterministic_algorithms_enabled() else 3)


@case("replay", changes={4: lambda w: setattr(torch.backends.cudnn, "benchmark", True)})
def a_flag_of_a_backend(w):
    return lambda: X * (2 if torch.backends.cudnn.benchmark else 3)


@case("replay", changes={4: lambda w: torch.set_autocast_dtype("cpu", torch.float16)})
def the_dtype_of_autocast(w):
    return lambda: X.to(torch.get_autocast_dtype("cpu"))


@case("replay", changes={4: lambda w: LOG.setLevel(logging.DEBUG)}, calls=4)
def a_message_below_the_level(w):
    return lambda: (LOG.debug("x"), X * 2)[1]


@case("rerun", changes={0: lambda w: LOG.setLevel(logging.DEBUG)})
def a_message_that_is_shown(w):
    return lambda: (LOG.debug("x"), X * 2)[1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(0.17)
def test_case(name):
    check(CASES[name], reset)


def test_a_cache_that_was_cleared():
    box = {"scale": 1.0}
    kept = functools.lru_cache(lambda n: n * box["scale"])
    compiled = tracejit.compile(lambda: X * kept(2), backend="numpy")
    for i in range(9):
        if i == 4:
            box["scale"] = 3.0  # the cache still has what was computed before
        if i == 6:
            kept.cache_clear()
        expected = X * (6.0 if i >= 6 else 2.0)
        torch.testing.assert_close(compiled(), expected)


def test_the_reason_names_the_line_and_the_remedy():
    compiled = tracejit.compile(lambda x, a, root=sqrt: x * root(a), backend="numpy")
    for _ in range(4):
        compiled(X, 0.5)
    why = compiled.explain_mode()
    assert "test_purity.py:" in why and "math.sqrt by another name" in why
    assert "call it as an attribute of math" in why


def test_an_alias_is_itself_again_after_a_trace():
    def step(x, a):
        if a < 0:
            raise ValueError
        return x * sqrt(a)

    compiled = tracejit.compile(step, backend="numpy")
    for a in (0.5, 0.5, 0.25, -1.0, 0.75):
        if a < 0:
            with pytest.raises(ValueError):
                compiled(X, a)
        else:
            assert torch.equal(compiled(X, a), step(X, a))
        assert sqrt is math.sqrt and mathematics.is_function(sqrt)
    assert compiled.stats.replays


def _iterator_of_an_object(w):
    w.numbers = itertools.count()
    return lambda: X * next(w.numbers)


def _a_size_that_changes(w):
    w.n, w.table = 1, torch.ones(9)

    def step():
        w.n = w.n % 8 + 1
        return w.table[: w.n]

    return step


def _an_item_that_changes(w):
    w.state, w.table = {"n": 1}, torch.ones(9)

    def step():
        w.state["n"] = w.state["n"] % 8 + 1
        return w.table[: w.state["n"]]

    return step


def _an_intermediate_in_a_set(w):
    w.kept = set()

    def step():
        w.kept.add(X * 2)
        return X + 1

    return step


def _an_unknown_function(w):
    return lambda: X * len(str(time.localtime()))


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (_iterator_of_an_object, 1),
        (_a_size_that_changes, 3),
        (_an_item_that_changes, 3),
        (_an_intermediate_in_a_set, 3),
        (_an_unknown_function, 1),
    ],
)
def test_every_reason_names_a_line_of_the_user(build, line):
    compiled = tracejit.compile(build(SimpleNamespace()), backend="numpy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        for _ in range(9):
            compiled()
    first = build.__code__.co_firstlineno
    lines = re.findall(r"test_purity\.py:(\d+): ", compiled.explain_mode())
    assert lines, compiled.explain_mode()
    assert min(abs(int(found) - first - line) for found in lines) <= 2, compiled.explain_mode()


def test_a_profile_in_c_goes_on():
    """`cProfile` cannot be put back by Python once it is off: it stays on while values are read."""
    x = torch.ones(3)
    compiled = tracejit.compile(lambda x: x * 2 if x.sum() > 1 else x, backend="numpy")
    profile = cProfile.Profile()
    with profile:
        for _ in range(3):
            assert torch.equal(compiled(x), x * 2)
        assert sys.getprofile() is profile
    assert profile.getstats()


# ---- what rules run


def drawn() -> float:
    return 2.0 + 0 * random.choice([1, 2])


def hooked():
    w = torch.ones(3, requires_grad=True)
    w.register_hook(lambda grad: grad * drawn())

    def step(x):
        (w * x).sum().backward()

    return step


def of_a_function():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * drawn()

    w = torch.ones(3, requires_grad=True)

    def step(x):
        Doubled.apply(w * x).sum().backward()

    return step


@pytest.mark.parametrize("build", [hooked, of_a_function])
def test_code_of_the_user_is_watched_inside_a_rule(build):
    step = tracejit.compile(build(), backend="numpy", on_unsupported="raise")
    for _ in range(6):
        step(torch.ones(3))
    assert step.stats.replays == 0
    assert "it calls random" in step.explain_mode(), step.explain_mode()


def test_rules_are_not_watched(monkeypatch):
    """Which is nearly all that runs in a trace."""
    noted = Counter()
    profile = Seen.profile

    def counted(self, frame, event, arg):
        noted[origin(frame.f_code)] += 1
        profile(self, frame, event, arg)

    monkeypatch.setattr(Seen, "profile", counted)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(20)))
    optimizer = torch.optim.Adam(model.parameters())

    @tracejit.compile(backend="numpy")
    def step(x):
        model(x).sum().backward()
        optimizer.step()

    for _ in range(2):
        noted.clear()
        step(torch.ones(2, 4))
    assert noted["torch"] > 1000
    assert noted["tracejit"] < 40 * noted["torch"]
