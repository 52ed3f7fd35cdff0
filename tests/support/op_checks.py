"""Primitives on their samples: a test of each op, and how near its numbers must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Signature, signature

import numpy as np
import pytest

from support.op_samples import ATTENTION, Sample, Tensor
from tracejit.ir.graph import Graph
from tracejit.ir.interp import evaluate
from tracejit.ir.ops import OPS, Exact

EPS = {"f64": 2.0**-52, "f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}
INEXACT = {n for n, op in OPS.items() if op.family == "elementwise" and op.exact is Exact.ULPS}
ACCUMULATING = {"reduce_sum", "matmul", "scatter", "cumsum", *ATTENTION}  # error grows with sums
ACCUMULATING |= {"accumulate", "recurrence"}
ZERO_SIGN_OPEN = {"maximum", "minimum", "reduce_max", "reduce_min"}


def assert_same_numbers(ours, theirs, *, zero_sign: bool = True) -> None:
    """Equal shapes and elements; NaN equals NaN, and 0.0 differs from -0.0."""
    np.testing.assert_array_equal(ours, theirs)
    if zero_sign and np.asarray(ours).dtype.kind == "f":
        known = ~np.isnan(theirs)
        np.testing.assert_array_equal(np.signbit(ours)[known], np.signbit(theirs)[known])


def assert_within(ours, theirs, allowed) -> None:
    """|ours - theirs| <= allowed, element by element; NaN and infinities stand at equal places."""
    assert np.shape(ours) == np.shape(theirs)
    with np.errstate(all="ignore"):
        close = np.abs(np.asarray(ours, np.float64) - theirs) <= allowed
        equal = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    wrong = ~(close | equal)
    assert not wrong.any(), f"{np.asarray(ours)[wrong][:5]} != {np.asarray(theirs)[wrong][:5]}"


def summed_magnitude(name: str, arrays: Sequence[np.ndarray], attrs: dict) -> np.ndarray:
    """What an op that accumulates gives for the absolute values of its operands."""
    sizes = [x if name == "scatter" and k == 1 else np.abs(x) for k, x in enumerate(arrays)]
    if (
        name in ATTENTION
    ):  # delta, the sixth, is taken off; the weights are of scores, not their size
        sizes[5:6] = [-x for x in sizes[5:6]]
        return 1 + OPS[name].eval(*sizes, **attrs)
    return OPS[name].eval(*sizes, **attrs)


def on_samples(rows: list[tuple[str, Sample]]) -> Callable:
    """Make `check(name, sample, **fixtures)` a test of each op; it names the samples that fail."""
    samples: dict[str, list[Sample]] = {}
    for name, sample in rows:
        samples.setdefault(name, []).append(sample)

    def decorate(check: Callable) -> Callable:
        def test(name: str, **fixtures: object) -> None:
            failures = []
            for sample in samples[name]:
                try:
                    check(name, sample, **fixtures)
                except Exception as error:
                    failures.append(f"{name}: {sample}: {error!r}")
            assert not failures, "\n\n".join(failures)

        given = signature(check).parameters
        names = [p for p in given.values() if p.name != "sample"]
        test.__name__, test.__doc__ = check.__name__, check.__doc__
        test.__module__, test.__signature__ = check.__module__, Signature(names)
        return pytest.mark.parametrize("name", [*samples])(test)

    return decorate


def run(graph: Graph, *inputs) -> np.ndarray:
    return evaluate(graph, inputs)[0][0]


def tensors_of(sample: Sample, arrays: list) -> list:
    """The arrays that are inputs of the sample's graph."""

    def is_input(x: object) -> bool:
        return isinstance(x, Tensor) or (sample.host and type(x) is not str)

    return [a for x, a in zip(sample.operands, arrays, strict=True) if is_input(x)]
