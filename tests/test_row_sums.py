"""Sums of everything, first of rows that have numbers; the first elements of long rows in order."""

import numpy as np
import pytest

from tracejit.ir.interp import evaluate
from tracejit.ir.text import parse
from tracejit.schedule import row_sums, schedule, stretches
from tracejit.schedule.row_sums import sums_of_rows
from tracejit.schedule.stretches import stretched

CENTRED = """
f(%0: {t}[300,200]) {{
  %1: {t}[300] = reduce_sum(%0, axes=(1,))
  %2: {t}[300,1] = reshape(%1, shape=(300, 1))
  %3: {t}[300,200] = expand(%2, shape=(300, 200))
  %4: {t}[300,200] = sub(%0, %3)
  %5: {t}[{shape}] = reshape(%4, shape=({shape}))
  %6: {t}[] = reduce_sum(%5, axes={axes})
  return %6
}}"""


def names(graph):
    return [node.op.name for node in graph.nodes]


@pytest.mark.parametrize("shape, axes", [("300,200", (0, 1)), ("15,20,200", (0, 1, 2))])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_sum_of_everything_is_first_one_of_rows(shape, axes, dtype):
    graph = parse(CENTRED.format(t=dtype, shape=shape, axes=axes))
    two = sums_of_rows(graph)
    assert names(two).count("reduce_sum") == 3
    assert two.results[0].value.type == graph.results[0].value.type
    x = np.random.default_rng(0).integers(-3, 4, (300, 200)).astype(np.float32)
    assert evaluate(graph, [x])[0] == evaluate(two, [x])[0]


def test_sums_without_rows_stay_as_they_are(monkeypatch):
    graph = parse("f(%0: f32[300,200]) {\n%1: f32[] = reduce_sum(%0, axes=(0, 1))\nreturn %1\n}")
    assert sums_of_rows(graph) == graph
    few = parse(CENTRED.format(t="f32", shape="300,200", axes=(0, 1)))
    monkeypatch.setattr(row_sums, "ROWS", 301)
    assert sums_of_rows(few) == few


def test_the_rows_kernel_adds_up_its_rows():
    """What a GPU would read once more is at hand there."""
    graph = parse(CENTRED.format(t="f32", shape="300,200", axes=(0, 1)))
    readers = [
        launch for launch in schedule(graph, gpu=True).launches if launch.buffers.count("t0")
    ]
    assert len(readers) == 1
    assert len([x for x in schedule(graph).launches if x.buffers.count("t0")]) == 2


# --- the first elements of long rows --------------------------------------------------------------

FIRST = """
f(%0: {t}[{shape}]) {{
  %1: i64[{found}] = argsort(%0, axis={axis}, count={k}, descending={falling}, topk="")
  return %1
}}"""


@pytest.mark.parametrize("dtype", ["f32", "f64", "i64", "u8", "b1"])
@pytest.mark.parametrize("falling", [True, False])
@pytest.mark.parametrize("shape, axis", [((5, 131), 1), ((3, 64, 2), 1), ((259,), 0)])
def test_the_first_of_long_rows_are_those_of_stretches(dtype, falling, shape, axis, monkeypatch):
    monkeypatch.setattr(stretches, "SORTED", 8)
    monkeypatch.setattr(stretches, "SORTED_AT_ONCE", 16)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, shape).astype({"f32": np.float32, "f64": float}.get(dtype, np.int64))
    if dtype.startswith("f"):
        x = np.where(rng.random(shape) < 0.2, np.nan, np.where(x == 3, np.inf, x))
        x = np.where(rng.random(shape) < 0.2, -np.inf, x).astype(x.dtype)
    x = x.astype(np.uint8) if dtype == "u8" else x > 4 if dtype == "b1" else x
    for k in (1, 3, 5):
        found = ",".join(str(k if i == axis else n) for i, n in enumerate(shape))
        sizes = ",".join(map(str, shape))
        text = FIRST.format(t=dtype, shape=sizes, found=found, axis=axis, k=k, falling=falling)
        graph = parse(text)
        two = stretched(graph)
        assert names(two).count("argsort") >= 2
        np.testing.assert_array_equal(evaluate(two, [x])[0][0], evaluate(graph, [x])[0][0])


def test_rows_that_a_program_sorts_are_not_cut():
    for shape, k in (("5,8000", 3), ("5,9000", 0), ("5,9000", 9000)):
        rows = shape.split(",")[0]
        text = FIRST.format(t="f32", shape=shape, found=f"{rows},{k}", axis=1, k=k, falling=True)
        assert stretched(parse(text)) == parse(text)
