"""Rows that a program sorts by a network, in Triton's interpreter: the order is to the bit."""

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
f(%0: {t}[{r},{n}]) {{
  %1: i64[{r},{k}] = argsort(%0, axis=1, count={k}, descending={falling}, topk="")
  return %1
}}"""
SPECIAL = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 3e38, 2.0, -2.0]


def rows_of(dtype: str, r: int, n: int) -> np.ndarray:
    """Many equal values, and all special ones."""
    rng = np.random.default_rng(n)
    if dtype == "b1":
        return rng.random((r, n)) < 0.5
    if dtype.startswith(("i", "u")):
        kind = {"i64": np.int64, "i32": np.int32, "u8": np.uint8, "i8": np.int8}[dtype]
        x = rng.integers(0, 9, (r, n)).astype(kind)
        x[:, ::7], x[:, 1::9] = np.iinfo(kind).min, np.iinfo(kind).max
        return x
    x = rng.choice(SPECIAL, (r, n)).astype(np.float64 if dtype == "f64" else np.float32)
    return round_to(x, bf16) if dtype == "bf16" else x


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "i64", "i32", "u8", "i8", "b1"])
@pytest.mark.parametrize("falling", [True, False])
@pytest.mark.sweep(2)
def test_rows_are_sorted_by_a_network(dtype, falling):
    for r, n, k in ((3, 129, 129), (2, 200, 7), (1, 256, 1), (2, 300, 300)):
        graph = parse(TEXT.format(t=dtype, r=r, n=n, k=k, falling=falling))
        x = rows_of(dtype, r, n)
        (expected,), _ = evaluate(graph, [x])
        (result,), _, loaded = run(graph, [x], 8192)
        assert loaded.sources[0].name.startswith("sort_network_")
        np.testing.assert_array_equal(result, expected)


def test_what_is_sorted_may_be_computed():
    graph = parse("""
    f(%0: f32[3,150], %1: f32[150]) {
      %2: f32[1,150] = reshape(%1, shape=(1, 150))
      %3: f32[3,150] = expand(%2, shape=(3, 150))
      %4: f32[3,150] = mul(%0, %3)
      %5: i64[3,150] = argsort(%4, axis=1, count=150, descending=True, topk="")
      %6: f32[3,150] = gather(%4, %5, axis=1)
      return %5, %6
    }""")
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((3, 150)).astype(np.float32), np.ones(150, np.float32)]
    expected, _ = evaluate(graph, inputs)
    results, _, _ = run(graph, inputs, 8192)
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
