"""CPU lowering: each pass by texts; whole plans by golden files, and by what holds of all."""

from __future__ import annotations

import itertools
from textwrap import dedent

import pytest

from support.graph_texts import softmax_gradient, weight_gradients
from support.random_graphs import RandomProgram
from tracejit.errors import InvalidGraph
from tracejit.ir.text import parse
from tracejit.schedule import schedule
from tracejit.schedule.cpu.columns import fuse_columns
from tracejit.schedule.cpu.digits import extents_of, over_digits, taken_apart
from tracejit.schedule.cpu.layout import place, scratch_bytes
from tracejit.schedule.cpu.loops import choose_loops
from tracejit.schedule.cpu.lower import lower, lower_kernel
from tracejit.schedule.cpu.phases import write_out_phases
from tracejit.schedule.cpu.plan import CpuKernel, CpuLaunch, CpuPlan
from tracejit.schedule.cpu.planes import copy_planes
from tracejit.schedule.cpu.registers import ROW_BYTES, accumulators, keeps_b
from tracejit.schedule.cpu.rows import cache_rows
from tracejit.schedule.cpu.taps import write_out_taps
from tracejit.schedule.cpu.text import (
    identity,
    parse_cpu_kernel,
    parse_cpu_plan,
)
from tracejit.schedule.cpu.tiles import ROW_DEPTH, STRIP_BYTES, Contraction, orient, tile
from tracejit.schedule.cpu.unpack import unpack
from tracejit.schedule.cpu.windows import windows_of
from tracejit.schedule.kernel import Axis, Compute, FloorDiv, Index, Load, Reduce, Store
from tracejit.schedule.kernel_text import parse_kernel
from tracejit.schedule.plan import Plan

VECTORS = (16, 32, 64)  # bytes


def check(change, before: str, after: str) -> None:
    """A pass over a kernel, text in and text out."""
    found = str(change(parse_cpu_kernel(dedent(before))))
    assert found == dedent(after).strip()


def planned(text: str) -> Plan:
    return schedule(parse(text))


# --- the passes --------------------------------------------------------------------------------


def test_unpack_takes_launches_apart_and_substitutes_sizes():
    plan = planned("""
    step(%0: f32[5,7], %1: f32[3]) {
      %2: f32[5] = reduce_sum(%0, axes=(1,))
      %3: f32[3] = exp(%1)
      return %2, %3
    }""")
    assert len(plan.launches) == 1 and plan.launches[0].kernel.parts
    rows, exponential = unpack(plan)
    assert rows.buffers == ("t0", "t2") and exponential.buffers == ("t1", "t3")
    assert str(exponential.kernel) == dedent("""\
        kernel(b0: f32 r, b1: f32 w) over (i0: 3) {
          stage () {
            v1: f32 = load b0[i0]
            v3: f32 = exp(v1)
            store b1[i0] <- v3
          }
        }""")
    assert "load b0[i0 * 7 + i1]" in str(rows.kernel)


def test_columns_of_the_same_elements_are_fused_into_the_rows_before():
    rows = """
    kernel(b0: f32 r, b1: f32 w; ; s0) over (i0: 64) {
      stage (i1: 9) {
        v1: f32 = load b0[i0 * 9 + i1]
        v2: f32 = reduce_sum v1
      }
      stage () {
        v3: f32 = mul(v2, s0)
        store b1[i0] <- v3
      }
    }"""
    columns = """
    kernel(b0: f32 r, b1: f32 r, b2: f32 w; ; s0) over (i0: 9) {
      stage (i1: 64) {
        v1: f32 = load b0[i1 * 9 + i0]
        v2: f32 = load b1[i1]
        v3: f32 = mul(v1, v2)
        v4: f32 = reduce_sum v3
      }
      stage () {
        v5: f32 = add(v4, s0)
        store b2[i0] <- v5
      }
    }"""
    first = CpuLaunch(CpuKernel(parse_kernel(rows)), ("t0", "t1"), (3,))
    second = CpuLaunch(CpuKernel(parse_kernel(columns)), ("t0", "t1", "t2"), (4,))
    (fused,) = fuse_columns([first, second])
    assert fused.buffers == ("t0", "t1", "t2") and fused.scalars == (3, 4)
    assert str(fused.kernel) == dedent("""\
        outer: points in 1 chunks
        partials part0
        kernel(b0: f32 r, b1: f32 rw, b2: f32 w, part0: f32 rw; ; s0, s1) over (i0: 64) {
          stage (i1: 9) {
            v1: f32 = load b0[i0 * 9 + i1]
            v2: f32 = reduce_sum v1
          }
          stage () {
            v3: f32 = mul(v2, s0)
            store b1[i0] <- v3
          }
          stage (i1: 9) {
            v5: f32 = load b0[i0 * 9 + i1]
            v6: f32 = load b1[i0]
            v7: f32 = mul(v5, v6)
            v8: f32 = reduce_sum v7
          }
        }
        columns {
          kernel(b0: f32 r, b1: f32 r, b2: f32 w, part0: f32 rw; ; s1) over (i0: 9) {
            stage (i1: 1) {
              v6: f32 = load part0[i1 * 9 + i0]
              v4: f32 = reduce_sum v6
            }
            stage () {
              v5: f32 = add(v4, s1)
              store b2[i0] <- v5
            }
          }
        }""")
    assert fuse_columns([second, first]) == [second, first]


ACROSS = """
    kernel(b0: f32 r, b1: f32 r, b2: f32 w) over () {
      stage (i0: 8, i1: 9) {
        dot v1: f32 over (k: 5) {
          v2: f32 = load b0[i0 * 5 + k]
          |
          v3: f32 = load b1[i1 + k * 9]
        } v2, v3
        store b2[i0 + i1 * 8] <- v1
      }
    }"""


def test_orient_lets_the_result_be_written_along_memory():
    after = """
    kernel(b0: f32 r, b1: f32 r, b2: f32 w) over () {
      stage (i1: 9, i0: 8) {
        dot v1: f32 over (k: 5) {
          v3: f32 = load b1[i1 + k * 9]
          |
          v2: f32 = load b0[i0 * 5 + k]
        } v3, v2
        store b2[i0 + i1 * 8] <- v1
      }
    }"""
    check(orient, ACROSS, after)
    along = ACROSS.replace("i0 + i1 * 8", "i0 * 9 + i1")
    check(orient, along, along)


ROWS = """
    kernel(b0: f32 r, b1: f32 w) over (i0: 300) {
      stage (i1: 2000) {
        v1: f32 = load b0[i0 * 2000 + i1]
        v2: f32 = exp(v1)
        v3: f32 = reduce_sum v2
      }
      stage (i1: 2000) {
        v4: f32 = load b0[i0 * 2000 + i1]
        v5: f32 = exp(v4)
        v6: f32 = div(v5, v3)
        store b1[i0 * 2000 + i1] <- v6
      }
    }"""


def test_loops_go_along_memory():
    after = """
        outer: points in {chunks} chunks
        stage 0: i1 by 1024 in 1 chunks
        stage 1: i1 by 1024 in 1 chunks
    """
    found = choose_loops(parse_cpu_kernel(dedent(ROWS)))
    lines = str(found).splitlines()
    assert lines[:3] == dedent(after.format(chunks=128)).strip().splitlines()
    across = ROWS.replace("i0 * 2000 + i1", "i0 + i1 * 300")
    lines = str(choose_loops(parse_cpu_kernel(dedent(across)))).splitlines()
    assert lines[0] == "outer: i0 by 256 in 2 chunks"  # 300 of them, in blocks
    assert lines[1].startswith("kernel(")


def test_taps_are_no_vector_loop():
    """A window of 3 is summed for a whole line at a time."""
    taps = """
    kernel(b0: f32 r, b1: f32 r, b2: f32 w) over (i0: 4, i1: {n}) {{
      stage (i2: 3) {{
        v1: f32 = load b0[i0 * 40 + i1 + i2]
        v2: f32 = load b1[i0 * 3 + i2]
        v3: f32 = mul(v1, v2)
        v4: f32 = reduce_sum v3
      }}
      stage () {{
        store b2[i0 * {n} + i1] <- v4
      }}
    }}"""
    for n, first in ((32, "outer: i1 by 256 in 1 chunks"), (2, "outer: points in 1 chunks")):
        found = choose_loops(parse_cpu_kernel(dedent(taps.format(n=n))))
        assert str(found).splitlines()[0] == first


DEPTHWISE = """
kernel(b0: f32 r, b1: f32 r, b2: f32 w) over (i0: 8, i1: 6, i2: 5) {
  stage (i3: 3, i4: 2) {
    v1: f32 = load b0[i0 * 6 + i3 * 2 + i4]
    v2: f32 = load b1[i0 * 130 + i1 * 20 + i2 * 2 + i3 * 10 + i4 + -11] if MASK
    v3: f32 = mul(v1, v2)
    v4: f32 = reduce_sum v3
  }
  stage () {
    store b2[i0 * 30 + i1 * 5 + i2] <- v4
  }
}"""
MASK = "0 <= i1 * 2 + i3 + -1 < 13 and 0 <= i2 * 2 + i4 + -1 < 10"


def test_windows_with_strides_read_padded_planes():
    """12 lines of a padded plane: from -1 to 10 + 3 - 1; and the columns from -1 to 8."""
    found = copy_planes(parse_cpu_kernel(DEPTHWISE.replace("MASK", MASK)))
    fill, results = found.kernel.stages
    assert [a.extent for a in fill.axes] == [13, 10] and found.rows == ("plane0",)
    assert [a.name for a in found.kernel.axes] == ["i0"]
    assert [a.name for a in results.axes] == ["i1", "i2"]
    loads = [s for s in results.body if isinstance(s, Load) and s.buffer == "plane0"]
    assert [s.index.offset for s in loads] == [0, 1, 10, 11, 20, 21]
    assert all(s.index.terms == (("i1", 20), ("i2", 2)) and not s.mask for s in loads)
    assert parse_cpu_kernel(str(found)) == found


@pytest.mark.parametrize(
    "old, new",
    [
        (f" if {MASK}", ""),  # nothing stands outside
        (MASK, MASK.partition(" and")[0]),  # one tap axis is no direction of a window
        (MASK, MASK.replace("i3", "i3 * 2")),  # lines are not in step with the load
        ("i2 * 2 + i3", "i2 * 3 + i3"),
        ("f32", "bf16"),
        ("i4: 2", "i4: 20"),  # too many to be written out
        ("i2: 5", "i2: 3"),  # rows too short
        ("over (i0: 8, ", "over ("),  # one plane
        ("i1 * 20", "i1 * 20000"),
        ("i1: 6", "i1: 6000"),  # more than a cache holds
    ],
)
def test_other_windows_stay(old, new):
    text = DEPTHWISE.replace("MASK", MASK)
    if old.startswith("over"):
        text = text.replace("i0 * 6 + ", "").replace("i0 * 130 + ", "").replace("i0 * 30 + ", "")
    assert old in text
    kernel = parse_cpu_kernel(text.replace(old, new))
    assert copy_planes(kernel) is kernel


def test_gradients_of_taps_read_planes_of_all_images():
    check(
        copy_planes,
        """
        kernel(b0: f32 r, b1: f32 r, b2: f32 rw; ; s0) over (i0: 8, i1: 2) {
          stage (i2: 3, i3: 9) {
            v1: f32 = load b0[i0 * 9 + i2 * 72 + i3]
            v2: f32 = load b1[i0 * 9 + i1 + i2 * 72 + i3 + -1] if 0 <= i1 + i3 + -1 < 9
            v3: f32 = mul(v1, v2)
            v4: f32 = reduce_sum v3
          }
          stage () {
            v5: f32 = load b2[i0 * 2 + i1]
            v6: f32 = mul(v4, s0)
            v7: f32 = sub(v5, v6)
            store b2[i0 * 2 + i1] <- v7
          }
        }""",
        """
        rows plane0
        kernel(b0: f32 r, b1: f32 r, b2: f32 rw, plane0: f32 rw; ; s0) over (i0: 8) {
          stage (i2: 3, i500: 10) {
            v2: f32 = load b1[i0 * 9 + i2 * 72 + i500 + -1] if 0 <= i500 + -1 < 9
            store plane0[i2 * 10 + i500] <- v2
          }
          stage (i2: 3, i3: 9) {
            v1: f32 = load b0[i0 * 9 + i2 * 72 + i3]
            v8: f32 = load plane0[i2 * 10 + i3]
            v9: f32 = mul(v1, v8)
            v10: f32 = reduce_sum v9
            v14: f32 = load plane0[i2 * 10 + i3 + 1]
            v15: f32 = mul(v1, v14)
            v16: f32 = reduce_sum v15
          }
          stage () {
            v11: f32 = load b2[i0 * 2]
            v12: f32 = mul(v10, s0)
            v13: f32 = sub(v11, v12)
            store b2[i0 * 2] <- v13
            v17: f32 = load b2[i0 * 2 + 1]
            v18: f32 = mul(v16, s0)
            v19: f32 = sub(v17, v18)
            store b2[i0 * 2 + 1] <- v19
          }
        }""",
    )


REMAINDERS = """
kernel(b0: f32 r, b1: f32 w) over (i0: 6) {
  stage (i1: 12) {
    v1: f32 = load b0[i0 * 4 + i1 // 3] if 0 <= i1 % 3 + -1 < 2
    v2: f32 = reduce_max v1
  }
  stage () {
    store b1[i0] <- v2
  }
}"""


POOLED = """
    kernel(b0: f32 r, b1: f32 w, b2: i64 w) over (i0: 3, i1: 4) {
      stage (i2: 2, i3: 2) {
        v1: f32 = load b0[i0 * 16 + i1 * 2 + i2 * 8 + i3]
        v2: f32 = reduce_max v1
      }
      stage (i2: 2, i3: 2) {
        v3: f32 = load b0[i0 * 16 + i1 * 2 + i2 * 8 + i3]
        v4: b1 = eq(v3, v2)
        v5: i64 = position i2 * 8 + i3
        v6: i64 = where(v4, v5, 64)
        v7: i64 = reduce_min v6
      }
      stage () {
        store b1[i0 * 4 + i1] <- v2
        store b2[i0 * 4 + i1] <- v7
      }
    }"""


def test_taps_of_several_stages_are_loaded_once():
    found = write_out_taps(parse_cpu_kernel(dedent(POOLED))).kernel
    (stage,) = found.stages
    assert not found.axes and [a.name for a in stage.axes] == ["i0", "i1"]
    loads = [s for s in stage.body if isinstance(s, Load)]
    assert [s.index.offset for s in loads] == [0, 1, 8, 9]
    folds = [s.op.name for s in stage.body if isinstance(s, Compute) and s.op.name != "where"]
    assert folds.count("maximum") == folds.count("minimum") == 3 and folds.count("eq") == 4
    assert not any(isinstance(s, Reduce) for s in stage.body)
    stores = {s.buffer: s.value.id for s in stage.body if isinstance(s, Store)}
    assert stores == {"b1": 2, "b2": 7}


@pytest.mark.parametrize(
    "old, new",
    [
        ("i3: 2", "i3: 9"),  # a loop for vectors
        ("i3: 2", "i3: 5"),  # ten taps
        ("f32", "bf16"),
        ("i2 * 8 + i3]", "(i2 // 2) * 8 + i3]"),
        ("        store b1", "        v8: f32 = load b1[i0 * 4]\n        store b1"),
        ("over (i0: 3, i1: 4)", "over ()"),
    ],
)
def test_other_reductions_stay(old, new):
    assert old in POOLED
    text = POOLED.replace(old, new)
    if new == "over ()":
        text = text.replace("i0 * 16 + i1 * 2 + ", "").replace("[i0 * 4 + i1]", "[0]")
    kernel = parse_cpu_kernel(dedent(text))
    assert write_out_taps(kernel) is kernel


def test_remainders_are_folded():
    check(
        write_out_phases,
        REMAINDERS,
        """
        kernel(b0: f32 r, b1: f32 w) over (i0: 6) {
          stage (i1: 4) {
            v3: f32 = load b0[i0 * 4 + i1]
            v4: f32 = load b0[i0 * 4 + i1]
            v5: f32 = maximum(0.0, v3)
            v6: f32 = maximum(v5, v4)
            v2: f32 = reduce_max v6
          }
          stage () {
            store b1[i0] <- v2
          }
        }""",
    )


def test_sums_with_zeros_of_other_remainders_are_left_out():
    """All but the first: it may turn -0.0 into 0.0."""
    kernel = """
        kernel(b0: f32 r, b1: f32 r, b2: f32 w) over (i0: 6) {
          stage (i1: 12) {
            v0: f32 = load b0[i0 * 4 + i1 // 3] if 0 <= i1 % 3 < 1
            v1: f32 = load b1[i0 * 4 + i1 // 3] if 0 <= i1 % 3 + -1 < 1
            v2: f32 = add(v0, v1)
            v3: f32 = add(0.0, v2)
            v4: f32 = add(v3, v3)
            v5: f32 = add(v4, 0.0)
            store b2[i0 * 12 + i1] <- v5
          }
        }"""
    check(
        write_out_phases,
        kernel,
        """
        kernel(b0: f32 r, b1: f32 r, b2: f32 w) over (i0: 6) {
          stage (i1: 4) {
            v6: f32 = load b0[i0 * 4 + i1]
            v7: f32 = add(v6, 0.0)
            v9: f32 = add(v7, v7)
            store b2[i0 * 12 + i1 * 3] <- v9
            v11: f32 = load b1[i0 * 4 + i1]
            v12: f32 = add(0.0, v11)
            v14: f32 = add(v12, v12)
            store b2[i0 * 12 + i1 * 3 + 1] <- v14
            store b2[i0 * 12 + i1 * 3 + 2] <- 0.0
          }
        }""",
    )


@pytest.mark.parametrize(
    "old, new",
    [
        ("i1 % 3", "i1"),  # no remainder is asked for
        ("i1: 12", "i1: 13"),  # the last one is not whole
        ("// 3", "// 2"),
        ("i1 % 3", "(i1 + 1) % 3"),
        ("i1 // 3] if 0 <= i1 % 3", "i1 // 6] if 0 <= i1 % 6"),  # too many
        ("f32", "bf16"),  # which rounds a sum once
    ],
)
def test_other_remainders_stay(old, new):
    kernel = parse_cpu_kernel(REMAINDERS.replace(old, new))
    assert write_out_phases(kernel) == kernel


def test_what_is_the_same_along_the_row_does_not_choose_the_loop():
    """Means of channels are loaded once for each; images lie along the inner axes."""
    text = """
    kernel(b0: f32 r, b1: f32 r, b2: f32 r, b3: f32 w) over (i0: 1280) {
      stage (i1: 32, i2: 16) {
        v1: f32 = load b0[i0 * 512 + i1 * 16 + i2]
        v2: f32 = load b1[i0]
        v3: f32 = sub(v1, v2)
        v4: f32 = load b2[i0]
        v5: f32 = mul(v3, v4)
        v6: f32 = reduce_sum v5
      }
      stage () {
        store b3[i0] <- v6
      }
    }"""
    assert "outer: points" in str(choose_loops(parse_cpu_kernel(text)))


def test_a_kernel_without_outer_axes_is_a_loop_nest_per_stage():
    before = """
        kernel(b0: f32 r, b1: f32 w) over () {{
          stage (i0: {n}) {{
            v1: f32 = load b0[i0]
            v2: f32 = reduce_sum v1
          }}
          stage () {{
            store b1[0] <- v2
          }}
        }}"""
    for n, chunks in ((5, 1), (40_000, 2), (1_000_000, 61)):
        text = before.format(n=n)
        head = f"\n        stage 0: i0 by 1024 in {chunks} chunks"
        check(choose_loops, text, head + text)


def test_rows_are_cached_only_where_loops_go_along_them():
    after = """
        outer: points in 128 chunks
        stage 0: i1 by 1024 in 1 chunks
        stage 1: i1 by 1024 in 1 chunks
        rows row0
        kernel(b0: f32 r, b1: f32 w, row0: f32 rw) over (i0: 300) {
          stage (i1: 2000) {
            v1: f32 = load b0[i0 * 2000 + i1]
            v2: f32 = exp(v1)
            v3: f32 = reduce_sum v2
            store row0[i1] <- v2
          }
          stage (i1: 2000) {
            v5: f32 = load row0[i1]
            v6: f32 = div(v5, v3)
            store b1[i0 * 2000 + i1] <- v6
          }
        }"""
    check(lambda kernel: cache_rows(choose_loops(kernel)), ROWS, after)
    across = choose_loops(parse_cpu_kernel(dedent(ROWS.replace("i0 * 2000 + i1", "i0 + i1 * 300"))))
    assert cache_rows(across) == across


def product(m: int, n: int, k: int) -> CpuKernel:
    return parse_cpu_kernel(f"""
    kernel(b0: f32 r, b1: f32 r, b2: f32 w) over () {{
      stage (i0: {m}, i1: {n}) {{
        dot v1: f32 over (k: {k}) {{
          v2: f32 = load b0[i0 * {k} + k]
          |
          v3: f32 = load b1[k * {n} + i1]
        }} v2, v3
        store b2[i0 * {n} + i1] <- v1
      }}
    }}""")


@pytest.mark.parametrize("vector_bytes", VECTORS)
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (5, 123, 7), (0, 3, 4), (300, 513, 600), (9, 9, 0)])
def test_tiles_fit_registers_and_hold_the_result(m, n, k, vector_bytes):
    t = tile(product(m, n, k), vector_bytes).tiling
    lanes = vector_bytes // 4
    if t.way == "tiles":
        assert 1 <= t.rows * t.vectors <= accumulators(vector_bytes)
        assert t.tile_rows % t.rows == 0 and t.tile_columns % lanes == 0
    assert t.chunks >= 1 and t.pack_chunks >= 1


def test_ways_of_a_contraction():
    ways = {
        (300, 513, 600): "tiles",
        (33, 65, 21_000): "slices",  # little of a result, much of operands
        (1, 300, 770): "tiles",  # B lies across
    }
    for shape, way in ways.items():
        assert tile(product(*shape), 64).tiling.way == way
    (vector,) = lower(
        planned("""
        step(%0: f32[1,300], %1: f32[200,300]) {
          %2: f32[300,200] = permute(%1, axes=(1,0))
          %3: f32[1,200] = matmul(%0, %2)
          return %3
        }"""),
        64,
    ).kernels.values()
    assert vector.tiling.way == "dots" and scratch_bytes(vector) == 200 * 4


WINDOWS = """
    kernel(b0: f32 r, b1: f32 r, b2: f32 w) over () {
      stage (i0: 5, i1: 84) {
        dot v3: f32 over (k: 27) {
          v1: f32 = load b0[i0 * 27 + k]
          |
          v2: f32 = load b1[(i1 // 42) * 192 + (k // 9) * 64 + i1 % 6 + k % 3 + ((i1 // 6) % 7) * 8 + ((k // 3) % 3) * 8 + -9] if 0 <= (i1 // 6) % 7 + (k // 3) % 3 + -1 < 8 and 0 <= i1 % 6 + k % 3 + -1 < 8
        } v1, v2
        store b2[i0 * 42 + (i1 // 42) * 210 + i1 % 42] <- v3
      }
    }"""  # noqa: E501


def test_windows_are_packed_tile_by_tile():
    """What lies at quotients and remainders of the axes; nothing of B is in scratch memory."""
    kernel = tile(CpuKernel(parse_kernel(dedent(WINDOWS))), 32)
    assert kernel.tiling.way == "panels" and scratch_bytes(kernel) == 0
    assert kernel.tiling.tile_rows >= 5


def test_wide_results_read_windows_through_tables():
    """The images are A then, copied once with their margins, and the weights are packed."""
    wide = orient(CpuKernel(parse_kernel(dedent(WINDOWS.replace("i0: 5", "i0: 9")))))
    kernel = tile(wide, 32)
    assert (kernel.tiling.way, kernel.tiling.a) == ("windows", "copied")
    assert [a.name for a in kernel.kernel.stages[0].axes] == ["i1", "i0"]
    inner = WINDOWS[: WINDOWS.index(" if ")].replace("i0: 5", "i0: 9").replace("+ -9", "")
    inside = parse_kernel(dedent(inner + WINDOWS[WINDOWS.index("\n        } v1") :]))
    assert tile(orient(CpuKernel(inside)), 32).tiling.a == "direct"


def test_digits_that_move_together_are_one():
    """Line and column of an image that is read without a margin; not with one."""
    axis, text = Axis("i0", 84), "i0 % 6 + ((i0 // 6) % 7) * {} + (i0 // 42) * 500"
    for step, units in ((6, [1, 42]), (8, [1, 6, 42])):
        kernel = parse_kernel(f"""
    kernel(b0: f32 r, b1: f32 w) over (i0: 84) {{
      stage () {{
        v0: f32 = load b0[{text.format(step)}]
        store b1[i0] <- v0
      }}
    }}""")
        (digits,) = taken_apart((axis,), kernel.stages[0].body[:1])
        assert [d.unit for d in digits.digits] == units


def test_planes_of_windows():
    """A digit of the row and one of k, with which all indices move in one ratio, are one plane."""
    kernel = orient(CpuKernel(parse_kernel(dedent(WINDOWS.replace("i0: 5", "i0: 9"))))).kernel
    (stage,) = kernel.stages
    found = windows_of(stage.axes[0], stage.dot.k, stage.dot.a)
    assert [p.extent for p in found.planes] == [2 * 3, 9, 8]  # image and channel, line, column
    images, lines, columns = (p.name for p in found.planes)
    (load,) = found.statements
    assert load.index == Index(((images, 64), (lines, 8), (columns, 1)), -9)
    assert [b.index for b in load.mask] == [Index(((x, 1),), -1) for x in (lines, columns)]
    (apart,) = found.apart
    digits = extents_of((found.rows, found.depth))
    for at in itertools.product(*map(range, digits.values())):
        point = dict(zip(digits, at, strict=True))
        place = value_at(found.place, point)
        over = {}
        for plane in reversed(found.planes):
            place, over[plane.name] = divmod(place, plane.extent)
        assert place == 0 and value_at(load.index, over) == value_at(apart.index, point)


def value_at(index: Index, at: dict[str, int]) -> int:
    """An index at a point."""

    def value(atom: object) -> int:
        if isinstance(atom, str):
            return at[atom]
        inner = value_at(atom.index, at)
        return inner // atom.by if isinstance(atom, FloorDiv) else inner % atom.by

    return index.offset + sum(value(atom) * c for atom, c in index.terms)


def test_digits_of_windows():
    """Axes fall into digits over which every index is a sum of strides, and the same number."""
    (stage,) = parse_kernel(dedent(WINDOWS)).stages
    n, k, (load,) = stage.axes[1], stage.dot.k, stage.dot.b
    of_n, of_k = axes = taken_apart((n, k), [load])
    assert [(d.unit, d.extent) for d in of_n.digits] == [(1, 6), (6, 7), (42, 2)]
    assert [(d.unit, d.extent) for d in of_k.digits] == [(1, 3), (3, 3), (9, 3)]
    (apart,) = over_digits([load], axes, {"i0": 5})
    pairs = [(load.index, apart.index)]
    pairs += [(a.index, b.index) for a, b in zip(load.mask, apart.mask, strict=True)]
    for old, new in pairs:
        assert all(isinstance(atom, str) for atom, _ in new.terms)
        for i in range(n.extent):
            for j in range(k.extent):
                at = {d.name: i // d.unit % d.extent for d in of_n.digits}
                at |= {d.name: j // d.unit % d.extent for d in of_k.digits}
                assert value_at(new, at) == value_at(old, {"i1": i, "k": j})


def test_divisors_that_do_not_divide_each_other_stay():
    load = parse_kernel(dedent(WINDOWS.replace("i1 // 42", "i1 // 40"))).stages[0].dot.b[0]
    (of_n,) = taken_apart([Axis("i1", 84)], [load])
    assert [(d.unit, d.extent) for d in of_n.digits] == [(1, 84)]


@pytest.mark.parametrize("vector_bytes", VECTORS)
def test_the_registers_hold_the_sums_and_b(vector_bytes):
    """Of all sizes the chosen micro-kernel keeps B in registers, or has one row or few sums."""
    most = accumulators(vector_bytes)
    for m in (2, 3, 5, 64, 128, 513):
        for n in (16, 40, 512, 4097):
            t = tile(product(m, n, 700), vector_bytes).tiling
            if t.way == "tiles" and t.rows > 3:
                assert keeps_b(t.rows, t.vectors, most), (m, n, t)


def test_what_must_be_packed_is_scratch_memory():
    narrow, wide = product(33, 64, 100), product(33, 65, 100)
    assert scratch_bytes(tile(narrow, 64)) == 0  # whole vectors are read where they lie
    assert scratch_bytes(tile(wide, 64)) > 0


def test_micro_kernels_of_16_registers_are_not_bound_by_their_loads():
    """A load and a product start as often: with sums of 12 vectors one row of them needs 13 loads,
    the textbook's 6 × 2 and 4 × 3 eight and seven. With 32 registers the choice is another one."""
    for dtype in ("f32", "f64"):
        for shape in ((1000, 100, 64), (512, 512, 512), (512, 784, 256)):
            kernel = parse_cpu_kernel(str(product(*shape)).replace("f32", dtype))
            few, many = (tile(kernel, wide).tiling for wide in (32, 64))
            assert (few.rows, few.vectors) in ((6, 2), (4, 3))
            assert 16 < many.rows * many.vectors <= accumulators(64)


def test_slices_of_k_are_summed_in_passes():
    """A strip of B, two lines a row where rows do not start lines, stays in the first cache; the
    sums of the slices are dealt to threads."""
    for vector_bytes, passes in ((16, True), (32, True), (64, False)):
        kernel = product(64, 100, 1000)
        t = tile(kernel, vector_bytes).tiling
        c = Contraction(kernel.kernel, t)
        assert t.way == "slices" and not t.deep and t.chunks > 1
        assert t.chunks % 2 == 0  # for two threads
        assert c.passes is passes
        if passes:
            assert c.depth * (c.strip * c.size + 64) <= STRIP_BYTES


@pytest.mark.parametrize("vector_bytes", VECTORS)
def test_one_row_reads_long_stretches_of_b(vector_bytes: int):
    """Nothing of B is read twice: a few of its rows are read side by side, and of each as much as a
    tile has; several rows of A keep their strips of B in the first cache instead."""
    kernel = product(1, 3000, 784)
    c = Contraction(kernel.kernel, tile(kernel, vector_bytes).tiling)
    assert c.passes and c.depth == ROW_DEPTH
    assert c.tiling.tile_columns * c.size == ROW_BYTES and c.tiling.chunks > 1
    several = product(4, 3000, 784)
    other = Contraction(several.kernel, tile(several, vector_bytes).tiling)
    assert other.depth > 2 * ROW_DEPTH and other.tiling.tile_columns * other.size < ROW_BYTES


def test_what_is_packed_with_few_registers():
    """An A along m is read where it lies if its lines stay in the first cache; a B that many rows
    read is packed if its rows do not start lines."""
    for kernel, wide, a, packed in (
        (transposed(1000, 100, 64), 32, "direct", True),
        (transposed(1000, 100, 64), 64, "strips", False),
        (transposed(1000, 96, 64), 32, "direct", False),
        (transposed(1024, 100, 64), 32, "strips", True),  # lines collide
        (transposed(1000, 100, 130), 32, "strips", True),
        (product(200, 100, 64), 32, "direct", False),
        (product(1000, 112, 64), 32, "direct", False),
    ):
        t = tile(kernel, wide).tiling
        assert (t.a, t.packed_from == 0) == (a, packed), kernel


def transposed(m: int, n: int, k: int, dtype: str = "f32") -> CpuKernel:
    """A product whose A lies along m."""
    text = str(product(m, n, k)).replace(f"b0[i0 * {k} + k]", f"b0[k * {m} + i0]")
    return parse_cpu_kernel(text.replace("f32", dtype))


@pytest.mark.parametrize("vector_bytes", VECTORS)
def test_rows_of_a_are_packed_where_they_lie_apart(vector_bytes):
    """In strips where m is contiguous, and with a gap where rows would be at the same place of a
    cache; few products of each element are not worth it."""
    for kernel, a in (
        (product(300, 512, 1000), "direct"),
        (product(300, 512, 1024), "rows"),
        (product(300, 48, 1024), "direct"),
        (transposed(301, 512, 1000), "strips"),
        (transposed(301, 512, 48), "direct"),
        (transposed(301, 40, 1000), "direct"),
    ):
        found = tile(kernel, vector_bytes)
        c = Contraction(found.kernel, found.tiling)
        assert c.tiling.a == a
        if a == "rows":
            assert c.a_step == 1024 + 16 and c.a_elements == 300 * c.a_step
        if a == "strips":
            assert c.a_elements >= -(-301 // c.tiling.rows) * c.tiling.rows * 1000


@pytest.mark.parametrize("vector_bytes", VECTORS)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("k", [100, 384, 1000, 4097])
def test_a_strip_of_b_stays_in_the_first_cache(k, dtype, vector_bytes):
    """What a micro-kernel sums at once; passes over k are equal, and together all of it."""
    kernel = transposed(300, 520, k, dtype)
    t = tile(kernel, vector_bytes).tiling
    c = Contraction(kernel.kernel, t)
    depth = c.depth if t.deep else k
    assert depth * c.strip * c.size <= STRIP_BYTES
    passes = -(-k // depth)
    assert (passes - 1) * depth < k and passes * depth - k < passes


def test_memory_is_shared_in_turn():
    """Both intermediates of a chain lie in the output until it is written."""
    plan = planned("""
    step(%0: f32[48,96], %1: f32[96,96]) {
      %2: f32[48,96] = matmul(%0, %1)
      %3: f32[48,96] = exp(%2)
      %4: f32[48,96] = matmul(%3, %1)
      %5: f32[96,48] = permute(%0, axes=(1,0))
      %6: f32[96,96] = matmul(%5, %4)
      return %6
    }""")
    kernels = [CpuLaunch(lower_kernel(x.kernel, 64), x.buffers, x.scalars) for x in unpack(plan)]
    found = place(plan, kernels, ())
    text = "\n".join(line for line in str(found).splitlines() if "place" in line or "works" in line)
    assert any(p.room == "t2" for p in found.places), text
    assert found.arena_bytes < plan.arena_bytes


# --- whole plans -------------------------------------------------------------------------------

TWO_LAYERS = """
step(%0: f32[64,100], %1: f32[100,30], %2: f32[64,30]) {
  %3: f32[64,30] = matmul(%0, %1)        # net.py:3
  %4: f32[64,30] = maximum(%3, 0.0)      # net.py:4
  %5: f32[64,30] = sub(%4, %2)
  %6: f32[64,30] = mul(%5, %5)
  %7: f32[] = reduce_sum(%6, axes=(0,1)) # net.py:5
  %8: f32[100,64] = permute(%0, axes=(1,0))
  %9: f32[100,30] = matmul(%8, %5)
  %10: f32[100,30] = mul(%9, 0.1)
  %11: f32[100,30] = sub(%1, %10)
  return %7
  write %1 <- %11
}"""

GOLDEN = {
    "two_layers": TWO_LAYERS,
    "softmax_gradient": softmax_gradient(300, 1000),
    "weight_gradients": weight_gradients(1000, 300),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_cpu_plans(golden, name):
    golden(f"cpu_{name}.txt", str(lower(planned(GOLDEN[name]), 64)))


def plans() -> list[Plan]:
    """Of random programs and odd shapes."""
    found = [schedule(RandomProgram(seed).graph(), fuse=seed % 3 > 0) for seed in range(40)]
    for rows, columns in ((5, 1), (1, 5), (7, 123), (0, 4), (33, 5000), (200_000, 3)):
        found.append(planned(weight_gradients(rows, columns)))
        found.append(planned(softmax_gradient(rows, columns, "bf16")))
    return found


@pytest.fixture(scope="module")
def lowered() -> list[tuple[Plan, CpuPlan]]:
    return [(plan, lower(plan, bytes_)) for plan in plans() for bytes_ in VECTORS]


def test_texts_parse_back(lowered):
    for _, found in lowered:
        text = str(found)
        assert parse_cpu_plan(text) == found
        assert str(parse_cpu_plan(text)) == text


def test_every_loop_is_decided(lowered):
    for _, found in lowered:
        for kernel in found.kernels.values():
            for part in (kernel, kernel.columns):
                if part is None:
                    continue
                by_points = part.outer is None or not part.outer.vector
                for stage, nest in zip(part.kernel.stages, part.inner, strict=True):
                    walked = bool(stage.axes) and stage.dot is None and by_points
                    assert (nest is not None) == walked
                    assert nest is None or nest.vector in {a.name for a in stage.axes}
                assert (part.outer is not None) == bool(part.kernel.axes)


def test_what_is_alive_at_one_time_lies_apart(lowered):
    for plan, found in lowered:
        size = {b.name: b.type.nbytes for b in plan.buffers} | dict(found.working)
        at = {p.memory: p for p in found.places}
        touched: dict[str, list[int]] = {}
        for number, call in enumerate(found.calls):
            for name in (*call.buffers, *([call.working] if call.working else [])):
                touched.setdefault(name, []).append(number)
        placed = sorted(at.keys() & touched.keys())
        for i, a in enumerate(placed):
            if at[a].room in touched:
                assert touched[a][-1] < touched[at[a].room][0]
            for b in placed[:i]:
                at_once = touched[a][0] <= touched[b][-1] and touched[b][0] <= touched[a][-1]
                if at_once and at[a].room == at[b].room:
                    first, second = sorted((a, b), key=lambda x: at[x].offset)
                    assert at[first].offset + size[first] <= at[second].offset or not size[first]


def test_kernels_with_other_lines_and_numbers_are_one():
    other = TWO_LAYERS.replace("net.py", "other.py").replace("%3", "%33").replace("%9", "%99")
    a, b = (lower(planned(text), 64) for text in (TWO_LAYERS, other))
    assert list(map(identity, a.kernels.values())) == list(map(identity, b.kernels.values()))
    wide, narrow = (lower(planned(TWO_LAYERS), n).kernels["k0"] for n in (64, 16))
    assert identity(wide) != identity(narrow)


@pytest.mark.parametrize(
    "old, new",
    [
        ("cpu plan", "plan"),
        ("arena", "arenas"),
        ("  call k0", "  call k9"),
        ("  works", "  work"),
        ("\n}", ""),
    ],
)
def test_a_damaged_text_is_refused(old, new):
    text = str(lower(planned(TWO_LAYERS), 64))
    assert old in text
    with pytest.raises(InvalidGraph):
        parse_cpu_plan(new.join(text.rsplit(old, 1)))


@pytest.mark.parametrize(
    "old, new", [("tiling ", "tilings "), ("way=", "ways="), ("kernel(", "colonel("), ("}", "")]
)
def test_a_damaged_kernel_is_refused_when_it_is_looked_at(old, new):
    text = str(lower(planned(TWO_LAYERS), 64).kernels["k0"])
    assert old in text
    with pytest.raises(InvalidGraph):
        parse_cpu_kernel(new.join(text.rsplit(old, 1)))
