"""Primitives in onnxruntime, on all their samples, beside the reference evaluator."""

from __future__ import annotations

import numpy as np
import pytest

from support.onnx_checks import in_onnxruntime
from support.op_checks import (
    ACCUMULATING,
    EPS,
    ZERO_SIGN_OPEN,
    assert_same_numbers,
    assert_within,
    run,
    summed_magnitude,
    tensors_of,
)
from support.op_samples import SAMPLES, Sample
from support.scope import sampled
from tracejit.errors import CannotExport
from tracejit.export.onnx.refusals import refuse_operations
from tracejit.export.onnx.translate import REFUSED, TABLE
from tracejit.ir.ops import OPS, Exact

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

FAR = 64  # ulps: onnxruntime's own functions of float32, and formulas of several of them
SMALL = 1e-15  # of sines and cosines near their zeros


def test_every_primitive_is_translated_or_refused():
    assert TABLE.keys() | REFUSED.keys() == OPS.keys()
    assert not TABLE.keys() & REFUSED.keys()


def cases() -> list:
    """(name, sample); of those that go the same way, some are left to `make test-all`."""
    found = []
    for name in TABLE:
        for k, sample in enumerate(SAMPLES[name]):
            if k == 0 or sampled(f"{name}-{k}", 12):
                found.append(pytest.param(name, sample, id=f"{name}-{k}"))
    return found


@pytest.mark.parametrize("name, sample", cases())
def test_a_primitive_has_the_same_results(name: str, sample: Sample):
    arrays, graph = sample.build(), sample.graph(name)
    given, kind = tensors_of(sample, arrays), graph.results[0].value.type
    theirs = np.asarray(run(graph, *given))
    (ours,) = in_onnxruntime(graph, given)
    assert ours.shape == theirs.shape
    op = OPS[name]
    if op.exact is not Exact.ULPS:
        signed = name not in ZERO_SIGN_OPEN and op.exact is Exact.BITS
        assert_same_numbers(ours, theirs, zero_sign=signed)
        return
    size = np.abs(theirs.astype(np.float64))
    if name in ACCUMULATING:
        size = np.abs(summed_magnitude(name, arrays, sample.attrs))
    elif name == "scan":
        size = size + 1
    eps = EPS.get(kind.dtype.name, EPS["f64"])
    assert_within(ours, theirs, FAR * eps * size + (SMALL if name in ("sin", "cos") else 0))


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_names_the_operation_and_the_line(name: str):
    graph = SAMPLES[name][0].graph(name)
    with pytest.raises(CannotExport, match=rf"model\.py:12: {name} cannot be exported"):
        refuse_operations(graph.nodes)
