"""Host primitives: Python's own arithmetic on runtime scalars, run on the host per call."""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Callable

import numpy as np

from tracejit.ir.ops.record import BITS, NO_GRAD, ULPS, Exact, Op, require
from tracejit.ir.types import HOST_SCALAR, Type, bf16, f16, round_to


def _infer_host(*operands: Type) -> Type:
    on_host = all(t.is_host for t in operands if isinstance(t, Type))
    require(on_host, f"host arithmetic on tensors: {operands}")
    return HOST_SCALAR


def _host(name: str, eval: Callable, host: str, exact: Exact = BITS) -> Op:
    arity = 2 if "{1}" in host else 1
    return Op(
        name,
        "host",
        _infer_host,
        eval,
        (NO_GRAD,) * arity,
        cost=0,
        exact=exact,
        rounds=False,
        host=host,
    )


host_add = _host("host_add", operator.add, "{0} + {1}")
host_sub = _host("host_sub", operator.sub, "{0} - {1}")
host_mul = _host("host_mul", operator.mul, "{0} * {1}")
host_div = _host("host_div", operator.truediv, "{0} / {1}")
host_floordiv = _host("host_floordiv", operator.floordiv, "{0} // {1}")
host_mod = _host("host_mod", operator.mod, "{0} % {1}")
host_pow = _host("host_pow", operator.pow, "{0} ** {1}", ULPS)
host_neg = _host("host_neg", operator.neg, "-{0}")
host_abs = _host("host_abs", abs, "abs({0})")
host_round = _host("host_round", round, "round({0})")  # to an int
host_format = _host(
    "host_format", format, "format({0}, {1})"
)  # a text, by a spec, which is a literal
host_float = _host("host_float", float, "float({0})")  # of an int


def _of_table(name: str, eval: Callable, host: str) -> None:
    """An operation on a number and the entries of a table, which are literals."""
    rules = (NO_GRAD, NO_GRAD, ...)
    Op(name, "host", _infer_host, eval, rules, cost=0, exact=BITS, rounds=False, host=host)


def _find(x: float, *table: float) -> int:
    """The place of a number in a table; -1 if it is not there."""
    return table.index(x) if x in table else -1


_of_table("host_pick", lambda i, *table: table[int(i)], "({rest},)[{0}]")
_of_table("host_find", _find, "(({rest},).index({0}) if {0} in ({rest},) else -1)")


def round_f32(x: float) -> float:
    """A float rounded to float32, as a 0-d tensor of that dtype holds it."""
    return ctypes.c_float(x).value


def round_f16(x: float) -> float:
    """A float rounded to float16."""
    return float(round_to(np.float64(x), f16))


def round_bf16(x: float) -> float:
    """A float rounded to bfloat16."""
    return float(round_to(np.float64(x), bf16))


host_f32 = _host("host_f32", round_f32, "round_f32({0})")
host_f16 = _host("host_f16", round_f16, "round_f16({0})")
host_bf16 = _host("host_bf16", round_bf16, "round_bf16({0})")


# Functions of the math module, by their name there. The lines of host arithmetic call
# them by `math_<name>`; these are the module's own, whatever stands in it while a step is traced.
MATH: dict[str, Callable] = {}


def _math(name: str, exact: Exact = ULPS, arity: int = 1) -> Op:
    MATH[name] = getattr(math, name)
    operands = ", ".join(f"{{{i}}}" for i in range(arity))
    return _host(f"host_{name}", MATH[name], f"math_{name}({operands})", exact)


for _name in ("sqrt", "fabs", "floor", "ceil", "trunc"):
    _math(_name, BITS)
for _name in (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "cbrt", "erf", "erfc"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("asinh", "acosh", "atanh", "degrees", "radians"),
):
    _math(_name)
for _name in ("fmod", "copysign"):
    _math(_name, BITS, 2)
for _name in ("atan2", "hypot"):
    _math(_name, ULPS, 2)
# `x ** y` is another function: it may be complex, and raises other errors
host_math_pow = _host("host_math_pow", math.pow, "math_pow({0}, {1})", ULPS)
MATH["pow"] = math.pow


# Functions of numpy on float64, by their name there: with numpy's bits, and its answers where those
# of `math` raise. The lines of host arithmetic call them by `np_<name>`.
NUMPY: dict[str, Callable] = {}


def _numpy(name: str, exact: Exact = ULPS, arity: int = 1) -> None:
    of_numpy = getattr(np, name)
    if arity == 1:
        NUMPY[name] = lambda x: float(of_numpy(x))
    else:
        NUMPY[name] = lambda x, z: float(of_numpy(x, z))
    operands = ", ".join(f"{{{i}}}" for i in range(arity))
    _host(f"host_np_{name}", NUMPY[name], f"np_{name}({operands})", exact)


for _name in (
    *("sqrt", "square", "reciprocal", "absolute", "fabs", "negative", "positive", "sign"),
    *("floor", "ceil", "trunc", "rint"),
):
    _numpy(_name, BITS)
for _name in (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "cbrt", "sin", "cos", "tan"),
    *("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "arcsinh", "arccosh", "arctanh"),
    *("deg2rad", "rad2deg", "degrees", "radians"),
):
    _numpy(_name)
for _name in (
    *("add", "subtract", "multiply", "divide", "maximum", "minimum", "fmax", "fmin"),
    *("fmod", "remainder", "floor_divide", "copysign", "heaviside", "nextafter"),
):
    _numpy(_name, BITS, 2)
for _name in ("power", "float_power", "hypot", "arctan2", "logaddexp", "logaddexp2"):
    _numpy(_name, ULPS, 2)
