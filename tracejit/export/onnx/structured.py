"""Reductions and products as ONNX operators.

Entries of `STRUCTURED` are functions `(w, node, *operands) -> name`, as those of `movement`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tracejit.export.onnx.writer import Writer, held
from tracejit.ir.graph import Node
from tracejit.ir.types import b1


def _reduce_sum(w: Writer, node: Node, x: str) -> str:
    axes, kind = node.attr("axes"), node.out.type
    if not axes:
        return x
    if kind.dtype is b1:  # whether any
        count = w.ReduceSum(w.cast(x, np.int32), w.ints(*axes), keepdims=0)
        return w.Greater(count, w.constant(0, np.int32))
    if kind.dtype.is_float:
        return w.ReduceSum(x, w.ints(*axes), keepdims=0)
    # whole numbers by a product with ones: onnxruntime adds them up in float64
    shape = node.args[0].type.shape
    kept = [k for k in range(len(shape)) if k not in axes]
    count = math.prod(shape[a] for a in axes)
    if not count:
        return w.filled(0, kind.shape, held(kind.dtype))
    x = w.Transpose(x, perm=[*kept, *axes])
    ones = w.filled(1, (count, 1), held(kind.dtype))
    return w.reshape(w.MatMul(w.reshape(x, (kind.numel, count)), ones), kind.shape)


def _extremum(operator: str) -> Callable[..., str]:
    """Of numbers, NaN if there is one among them, which the operator leaves open."""

    def translated(w: Writer, node: Node, x: str) -> str:
        axes, kind = node.attr("axes"), node.out.type
        if not axes:
            return x
        if not kind.numel:
            return w.constant(np.zeros(kind.shape), held(kind.dtype))

        def reduced(name: str, x: str) -> str:
            return getattr(w, name)(x, w.ints(*axes), keepdims=0)

        if kind.dtype is b1:
            return w.cast(reduced(operator, w.cast(x, np.int32)), np.bool_)
        found = reduced(operator, x)
        if not kind.dtype.is_float:
            return found
        odd = w.cast(reduced("ReduceMax", w.cast(w.IsNaN(x), np.int32)), np.bool_)
        return w.Where(odd, w.constant(np.nan, held(kind.dtype)), found)

    return translated


def _matmul(w: Writer, node: Node, x: str, z: str) -> str:
    return w.MatMul(x, z)


STRUCTURED: dict[str, Callable[..., str]] = {
    **{"reduce_sum": _reduce_sum, "matmul": _matmul},
    **{"reduce_max": _extremum("ReduceMax"), "reduce_min": _extremum("ReduceMin")},
}
