"""The loop: one primitive whose attribute is the graph of a step, run once for each row.

    %5: f32[88] = scan(%0, %1, %2, body=body0, carried=1, sliced=1, steps=10, reverse=False)
    body body0(%0: f32[2,4], %1: f32[2,4], %2: f32[4,4]) { … return %6, %7 }

Operands are the first values of what is carried, then what the steps read row by row (its first
axis is the step), then what all steps read whole. The body takes them without that axis, and gives
the next values of what is carried, then what is kept of the step. All results lie one after another
in one flat value: of what is carried `steps + 1` rows (the first value, and that after each step;
the other way round in a loop that goes backwards), of what is kept `steps` rows. `sections` says
where. A slice of the flat value is one of them, and costs nothing.

    %5: f32[24] = scan(%0, %1, body=body0, carried=0, sliced=1, steps=4, reverse=False, summed=1)

Of the last `summed` results of the body, the sum over all steps is in the flat value: one row, to
which each step adds. So a large one, such as a weight's gradient, is in memory once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tracejit.errors import InvalidGraph
from tracejit.ir.ops.record import ULPS, Op, require, require_tensor
from tracejit.ir.types import Type
from tracejit.records import dataclass


@dataclass(frozen=True, slots=True)
class Section:
    """Rows of one shape in the flat result: where they start, and how many there are."""

    start: int
    rows: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.rows * math.prod(self.shape)


def sections(
    shapes: Sequence[tuple[int, ...]], carried: int, steps: int, summed: int = 0
) -> list[Section]:
    """Where the results of these shapes lie: what is carried first, what is summed last."""
    found: list[Section] = []
    for number, shape in enumerate(shapes):
        start = found[-1].stop if found else 0
        rows = 1 if number >= len(shapes) - summed else steps + (number < carried)
        found.append(Section(start, rows, shape))
    return found


def _infer_scan(
    *operands: Type,
    body: object,
    carried: int,
    sliced: int,
    steps: int,
    reverse: bool,
    summed: int = 0,
) -> Type:
    for operand in operands:
        require_tensor("scan", operand)
    require(steps > 0 and 0 <= carried <= len(operands) - sliced, "scan of nothing")
    require(len(body.results) > 0 and carried + summed <= len(body.results), "scan of nothing")
    inside = [p.value.type for p in body.params]
    outside = [
        Type(x.dtype, x.shape[1:], x.device) if carried <= i < carried + sliced else x
        for i, x in enumerate(operands)
    ]
    rows = [x.shape[:1] for x in operands[carried : carried + sliced]]
    require(all(n == (steps,) for n in rows), f"scan of {steps} steps over rows {rows}")
    require(inside == outside, f"scan's body takes {inside}, not {outside}")
    results = [r.value.type for r in body.results]
    require(results[:carried] == outside[:carried], "what a scan carries changes its type")
    kinds = {(t.dtype, t.device) for t in results}
    narrow = any(t.dtype.narrow for t in results[len(results) - summed :])
    require(not narrow, "a sum over the steps of a scan has a wide dtype")
    require(len(kinds) == 1 and not body.writes, "scan's results are of one dtype and device")
    ((dtype, device),) = kinds
    last = sections([t.shape for t in results], carried, steps, summed)[-1]
    return Type(dtype, (last.stop,), device)


def _eval_scan(
    *operands: np.ndarray,
    body: Callable[[list], list],
    carried: int,
    sliced: int,
    steps: int,
    reverse: bool,
    summed: int = 0,
) -> np.ndarray:
    """`body` is a function of arrays here: the evaluator knows how to run a graph."""
    now, rows = list(operands[:carried]), operands[carried : carried + sliced]
    kept: list[list[np.ndarray]] = [[x] for x in now]
    for step in reversed(range(steps)) if reverse else range(steps):
        found = body([*now, *(x[step] for x in rows), *operands[carried + sliced :]])
        now = found[:carried]
        kept += [[] for _ in range(len(found) - len(kept))]
        for section, row in zip(kept, found, strict=True):
            section.append(row)
    for section in kept[len(kept) - summed :]:
        section[:] = [np.sum(section, axis=0, dtype=_wide(section[0]))]
    return np.concatenate([x.ravel() for rows in kept for x in (rows[::-1] if reverse else rows)])


def _wide(x: np.ndarray) -> np.dtype:
    """What sums are taken in, as those of a reduction."""
    return np.dtype(np.float64) if x.dtype.kind == "f" else x.dtype


def _no_rule(b: object, g: object, y: object, *operands: object, **attrs: object) -> None:
    raise InvalidGraph(reason="scan has no derivative of its own: who emits it differentiates it")


scan = Op(
    "scan",
    "loop",
    _infer_scan,
    _eval_scan,
    (_no_rule, ...),
    cost=1,
    exact=ULPS,
    rounds=True,
    host=None,
)
