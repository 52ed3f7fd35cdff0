"""What optimizers call: addcmul, addcdiv, lerp, and the `_foreach_` functions of lists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tracejit.capture.functions import arithmetic, selection, statistics, unary  # noqa: F401
from tracejit.capture.functions.common import (
    Number,
    as_number,
    in_place,
    literal,
    pointwise,
    register,
)
from tracejit.capture.functions.derived import derived, require_float, widen
from tracejit.capture.functions.statistics import vector_norm
from tracejit.capture.trace.table import RULES, Rule, family_of
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Arg, Value
from tracejit.ir.types import b1

Tensor = torch.Tensor


def _added(name: str):
    """input + value·tensor1·tensor2, or with a quotient; rounded once."""

    def function(
        t: Trace,
        input: Tensor,
        tensor1: Tensor,
        tensor2: Tensor,
        *,
        value: Number = 1,
        wrap: Callable = pointwise,
    ) -> TracedTensor | Value:
        b = t.b

        def emit(x: Value, y: Value, z: Value, *factors: Value) -> Value:
            dtype = widen(t, x).type.dtype
            if dtype is b1:
                raise t.not_implemented("addcmul_cpu_out", dtype)

            def forward(x: Value, y: Value, z: Value, factor: Arg = 1) -> Value:
                scaled = b.mul(y, factor)
                return b.add(x, b.mul(scaled, z) if name == "addcmul" else b.div(scaled, z))

            if factors:
                out = derived(t, name, (x, y, z, *factors), forward)
            else:
                out = derived(t, name, (x, y, z), partial(forward, factor=literal(value, dtype)))
            saved = [y] if z in t.tape.tracked else []
            if name == "addcdiv" or y in t.tape.tracked:
                saved.append(z)
            return t.saves(out, *saved) if saved else out

        if name == "addcdiv" and not any(t.lift(x).dtype.is_float for x in (tensor1, tensor2)):
            raise t.shape_error("Integer division with addcdiv is no longer supported")
        value = as_number(t, value)
        factors = (value,) if isinstance(value, Tensor) else ()
        return wrap(t, emit, (input, tensor1, tensor2, *factors))

    return function


addcmul, addcdiv = _added("addcmul"), _added("addcdiv")


def lerp(
    t: Trace,
    input: Tensor,
    end: Tensor,
    weight: Tensor | Number,
    *,
    wrap: Callable = pointwise,
) -> TracedTensor | Value:
    """input + w·(end - input), from the nearer end; the gradients are (1 - w)·g and w·g."""
    b = t.b
    if t.lift(input).dtype is not t.lift(end).dtype:
        raise t.shape_error("expected dtype of `end` to be that of `input`")

    def near(x: Value, z: Value, w: Value) -> Value:
        return b.add(x, b.mul(b.sub(z, x), w))

    def far(x: Value, z: Value, rest: Value) -> Value:
        return b.sub(z, b.mul(b.sub(z, x), rest))

    def emit(x: Value, z: Value) -> Value:
        require_float(t, "lerp", x)
        dtype = widen(t, x).type.dtype
        w, rest = literal(weight, dtype), literal(1.0 - weight, dtype)
        close = abs(weight) < 0.5
        return derived(
            t,
            "lerp",
            (x, z),
            lambda x, z: near(x, z, w) if close else far(x, z, rest),
            (lambda g, y, x, z: b.mul(g, rest), lambda g, y, x, z: b.mul(g, w)),
        )

    def emit_tensor(x: Value, z: Value, w: Value) -> Value:
        require_float(t, "lerp", x)
        out = derived(
            t,
            "lerp",
            (x, z, w),
            lambda x, z, w: b.where(b.lt(b.abs(w), 0.5), near(x, z, w), far(x, z, b.sub(1.0, w))),
            (
                lambda g, y, x, z, w: b.mul(g, b.sub(1.0, w)),
                lambda g, y, x, z, w: b.mul(g, w),
                lambda g, y, x, z, w: b.mul(g, b.sub(z, x)),
            ),
        )
        return t.saves(out, w)

    if isinstance(weight, Tensor):
        return wrap(t, emit_tensor, (input, end, weight))
    return wrap(t, emit, (input, end))


register(("addcmul",), addcmul)
register(("addcdiv",), addcdiv)
register(("lerp",), lerp)


# --- lists of tensors --------------------------------------------------------------------------


def _each(one: Callable, keyword: str | None, *, inplace: bool) -> Callable:
    """Apply a rule to every tensor of a list, with its own element of the lists beside it.

    `keyword` is what the single function calls the last argument, when the list form has it by
    position.
    """

    def rule(t: Trace, self: object, *args: object, **kwargs: object) -> object:
        lists = [x for x in (self, *args) if isinstance(x, (list, tuple))]
        if len({len(x) for x in lists}) != 1:
            raise t.shape_error("Tensor lists must have the same number of tensors")

        def item(x: object, i: int) -> object:
            return x[i] if isinstance(x, (list, tuple)) else x

        out = []
        for i in range(len(lists[0])):
            given, named = [item(x, i) for x in (self, *args)], dict(kwargs)
            if keyword is not None and len(given) == 4:
                named[keyword] = given.pop()
            out.append(one(t, *given, **named))
        return list(self) if inplace else tuple(out)

    return rule


def _maximum(name: str) -> Callable:
    """Of two tensors, or of a tensor and a number."""
    number = "clamp_min" if name == "maximum" else "clamp_max"

    def rule(t: Trace, input: Tensor, other: object) -> Tensor:
        return getattr(selection, name if isinstance(other, Tensor) else number)(t, input, other)

    return rule


_KEYWORDS = {"addcmul": "value", "addcdiv": "value"}
_SINGLE: dict[str, Callable] = {
    "norm": lambda t, x, ord=2, dtype=None: vector_norm(t, x, ord, dtype=dtype),
    "pow": arithmetic.power,
    "maximum": _maximum("maximum"),
    "minimum": _maximum("minimum"),
    "maximum_": in_place(_maximum("maximum")),
    "minimum_": in_place(_maximum("minimum")),
}


def _register_lists() -> None:
    """Every `_foreach_` function whose single form has a rule."""
    for name in dir(torch):
        base = name.removeprefix("_foreach_")
        if base == name:
            continue
        plain, inplace = base.removesuffix("_"), base.endswith("_")
        one = RULES.get(getattr(Tensor, base, None)) or RULES.get(getattr(torch, base, None))
        run = _SINGLE.get(base) or (one and one.run)
        if run is not None:
            each = _each(run, _KEYWORDS.get(plain), inplace=inplace)
            RULES[getattr(torch, name)] = Rule(each, family_of(each), of=one, form="list")


_register_lists()
