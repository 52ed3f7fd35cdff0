"""The primitive that says when a value is wanted, and computes nothing.

`after(x, y)` is x; what is computed of it waits until y is there. So what a backward computes once
more of x is no part of what the forward pass has computed of it: merging the two would keep the
latter all the time in between.
"""

from __future__ import annotations

import numpy as np

from tracejit.ir.ops.record import BITS, NO_GRAD, Op, require_tensor
from tracejit.ir.types import Type


def _infer_after(x: Type, y: Type) -> Type:
    require_tensor("after", x)
    require_tensor("after", y)
    return x


def _eval_after(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x


after = Op(
    "after",
    "order",
    _infer_after,
    _eval_after,
    (lambda b, g, out, x, y: g, NO_GRAD),
    cost=0,
    exact=BITS,
    rounds=False,
    host=None,
)
