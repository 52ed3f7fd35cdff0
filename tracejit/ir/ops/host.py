"""Host primitives: Python's own float arithmetic on runtime scalars, run on the host per call."""

from __future__ import annotations

import operator
from collections.abc import Callable

from tracejit.ir.ops.record import NO_GRAD, Op, Print, require
from tracejit.ir.types import HOST_SCALAR, Type


def _infer_host(*operands: Type) -> Type:
    on_host = all(t.is_host for t in operands if isinstance(t, Type))
    require(on_host, f"host arithmetic on tensors: {operands}")
    return HOST_SCALAR


def _host(name: str, eval: Callable, arity: int) -> Op:
    return Op(name, "host", _infer_host, eval, (NO_GRAD,) * arity, Print.HOST, Print.HOST)


host_add = _host("host_add", operator.add, 2)
host_sub = _host("host_sub", operator.sub, 2)
host_mul = _host("host_mul", operator.mul, 2)
host_div = _host("host_div", operator.truediv, 2)
host_floordiv = _host("host_floordiv", operator.floordiv, 2)
host_mod = _host("host_mod", operator.mod, 2)
host_pow = _host("host_pow", operator.pow, 2)
host_neg = _host("host_neg", operator.neg, 1)
host_abs = _host("host_abs", abs, 1)
