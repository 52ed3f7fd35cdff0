"""Kernels that store where values say, in Triton's interpreter: programs look for their indices."""

import os

import numpy as np
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets, so it needs TRITON_INTERPRET=1", allow_module_level=True)

from support.interpret_checks import run
from tracejit.ir.interp import evaluate
from tracejit.ir.text import parse
from tracejit.ir.types import bf16, round_to

pytestmark = pytest.mark.interpret

TEXT = """
f(%0: {t}[{v},{d}], %1: i64[{n}], %2: {t}[{n},{d}]) {{
  %3: i64[{n},1] = reshape(%1, shape=({n}, 1))
  %4: i64[{n},{d}] = expand(%3, shape=({n}, {d}))
  %5: {t}[{v},{d}] = scatter(%0, %4, %2, axis=0, combine='{c}')
  return %5
}}"""


@pytest.mark.parametrize("combine", ["add", "last", "max"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("max_tile", [16, 8192])
@pytest.mark.sweep(2)
def test_programs_take_their_indices_in_order(combine, dtype, max_tile):
    for v, n, d in ((7, 40, 5), (9, 35, 20), (5, 3, 9), (20, 1, 3), (1, 20, 17)):
        rng = np.random.default_rng(v * n)
        before, rows = (rng.standard_normal(s).astype(np.float32) for s in ((v, d), (n, d)))
        ids = rng.integers(-1, v + 1, n)  # some have no place
        ids[: n // 2] = ids[0]  # and many the same
        if dtype == "bf16":
            before, rows = round_to(before, bf16), round_to(rows, bf16)
        graph, inputs = parse(TEXT.format(t=dtype, c=combine, v=v, n=n, d=d)), [before, ids, rows]
        (expected,), _ = evaluate(graph, inputs)
        (first,), _, loaded = run(graph, inputs, max_tile)
        assert [source.name.partition("_")[0] for source in loaded.sources] == ["scatter"]
        assert n == 1 or "tl.cumsum(" in loaded.sources[0].text
        exact = combine != "add"
        tolerance = 0.0 if exact else {"f32": 1e-5, "bf16": 2e-2}[dtype]
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(first, expected, rtol=tolerance, atol=tolerance * scale)
        (again,), _, _ = run(graph, inputs, max_tile // 2)  # other tiles, the same order
        np.testing.assert_array_equal(first, again)


def test_values_of_the_index_other_than_the_place():
    """What is stored may need more of an index than where it goes."""
    graph = parse("""
    f(%0: f32[9,6], %1: i64[14], %2: f32[14,6]) {
      %3: f32[14] = cast(%1, dtype=f32)
      %4: f32[14,1] = reshape(%3, shape=(14, 1))
      %5: f32[14,6] = expand(%4, shape=(14, 6))
      %6: f32[14,6] = mul(%2, %5)
      %7: i64[14] = add(%1, 1)
      %8: i64[14,1] = reshape(%7, shape=(14, 1))
      %9: i64[14,6] = expand(%8, shape=(14, 6))
      %10: f32[9,6] = scatter(%0, %9, %6, axis=0, combine="add")
      return %10
    }""")
    rng = np.random.default_rng(0)
    inputs = [np.zeros((9, 6), np.float32), rng.integers(0, 8, 14), np.ones((14, 6), np.float32)]
    (expected,), _ = evaluate(graph, inputs)
    (result,), _, _ = run(graph, inputs, 8)
    np.testing.assert_array_equal(result, expected)
