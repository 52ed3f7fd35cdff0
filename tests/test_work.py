"""What launches issue: counted by printing, against what Triton's interpreter loads and stores."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from support.attention_graphs import CASES as ATTENTION
from support.foreach_steps import Updates, plan_of
from support.programs import PROGRAMS, plans_of
from tracejit.codegen.geometry import MAX_TILE
from tracejit.codegen.triton import emit
from tracejit.codegen.work import Work, work
from tracejit.ir.text import parse
from tracejit.runtime import interpreter
from tracejit.runtime.triton_executor import TritonExecutor
from tracejit.runtime.triton_launch import memory_bytes
from tracejit.schedule import schedule
from tracejit.schedule.plan import Plan


def works(text: str, max_tile: int = MAX_TILE, *, gpu: bool = True) -> list[Work]:
    """The work of each kernel of a graph's plan, or of its plan for the CPU."""
    found = []
    for launch in schedule(parse(text), gpu=gpu).launches:
        source = emit(launch.kernel, launch.sizes, max_tile=max_tile)
        found += work(source, launch.sizes, source.geometry(launch.sizes, max_tile))
    return found


# --- by hand ------------------------------------------------------------------------------------


def test_a_stream():
    (found,) = works("""
        f(%0: f32[1000000], %1: f32[1000000]) {
          %2: f32[1000000] = exp(%0)
          %3: f32[1000000] = add(%2, %1)
          return %3
        }""")
    tiles = -(-1_000_000 // 1024)
    assert (found.form, found.programs, found.steps, found.ahead) == ("pointwise", tiles, 1, 1)
    assert (found.loaded, found.stored) == (8_000_000, 4_000_000)
    assert found.operations == 21 * 1024 * tiles  # exp is 20; masked lanes compute too
    assert found.waiting == 8_000_000 / tiles and found.products == 0


def test_rows_with_numbers_for_each_column():
    """Which are loaded once for a tile of 16 rows."""
    (found,) = works("""
        f(%0: f32[4000,500], %1: f32[500]) {
          %2: f32[1,500] = reshape(%1, shape=(1, 500))
          %3: f32[4000,500] = expand(%2, shape=(4000, 500))
          %4: f32[4000,500] = add(%0, %3)
          return %4
        }""")
    tiles = 250 * 4
    assert (found.form, found.programs, found.steps) == ("pointwise", tiles, 1)
    assert found.loaded == 4 * (4000 * 500 + 250 * 500) and found.stored == 4 * 4000 * 500
    assert found.operations == tiles * 16 * 128


def test_a_full_reduction():
    (found,) = works("""
        f(%0: f32[10000000]) {
          %1: f32[] = reduce_sum(%0, axes=(0,))
          return %1
        }""")
    blocks = -(-10_000_000 // 1024)
    trips = -(-blocks // 1024)
    assert found.programs == -(-blocks // trips)
    folds = -(-found.programs // 256)
    assert found.steps == trips + folds
    # the elements; the partials, and the counter, which each program adds to and the last resets
    assert found.loaded == 40_000_000 + 8 * found.programs
    assert found.stored == 8 * found.programs + 4 + 4
    assert found.waiting == 40_000_000 / found.programs / trips


def test_columns_walked_block_by_block():
    text = """
        f(%0: f32[4096,768]) {
          %1: f32[768] = reduce_sum(%0, axes=(0,))
          return %1
        }"""
    (found,) = works(text, gpu=False)
    assert found.form == "rows" and found.programs == 96 and found.steps == 64
    assert found.issued == 4 * (4096 * 768 + 768) and found.waiting == 4 * 64 * 8
    first, second = works(text)  # in two steps
    assert (first.programs, first.steps) == (768, 1) and second.steps == 1


def test_a_contraction():
    (found,) = works("""
        f(%0: f32[64,120], %1: f32[120,100]) {
          %2: f32[64,100] = matmul(%0, %1)
          %3: f32[64,100] = add(%2, 1.0)
          return %3
        }""")
    assert found.programs == 2 * 4 and found.operands == "f32"  # tiles of 32 × 32 × 32
    assert found.loaded == 4 * (4 * 64 * 120 + 2 * 120 * 100)  # each tile reads its own
    assert found.stored == 4 * 64 * 100 and found.operations == 8 * 32 * 32
    assert found.products == 2 * 8 * 4 * (32 * 32 * 32)
    assert (found.steps, found.ahead) == (4, 4)
    assert found.waiting == found.loaded / 8 / 4


def test_a_contraction_with_two_accumulators():
    """Tiles of 128 × 192, the epilogue of which goes over 128 and then over 64 columns."""
    (found,) = works("""
        f(%0: bf16[4096,768], %1: bf16[768,768], %2: bf16[1,768]) {
          %3: bf16[4096,768] = matmul(%0, %1)
          %4: bf16[4096,768] = expand(%2, shape=(4096, 768))
          %5: bf16[4096,768] = add(%3, %4)
          return %5
        }""")
    programs = 32 * 4
    assert found.programs == programs and (found.steps, found.ahead) == (12 + 2, 3)
    assert found.loaded == 2 * programs * (128 * 768 + 768 * 192 + 192)
    assert found.stored == 2 * 4096 * 768 and found.operations == 4096 * 768
    assert found.products == 2 * 4096 * 768 * 768


def test_a_contraction_whose_k_is_split():
    (found,) = works("""
        f(%0: f32[64,1000], %1: f32[1000,100]) {
          %2: f32[64,100] = matmul(%0, %1)
          return %2
        }""")
    partials = 8 * 8 * 4096  # 8 splits of each tile take four steps each, and are loaded at a time
    assert found.programs == 8 * 8 and (found.steps, found.ahead) == (4 + 2, 4)
    assert found.loaded == 4 * (4 * 64 * 1000 + 2 * 1000 * 100) + partials + 4 * 64
    assert found.stored == 4 * 64 * 100 + partials + 4 * (64 + 8)
    assert found.products == 2 * 8 * 32 * (32 * 32 * 32)


def test_loads_that_wait_for_each_other():
    (found,) = works("""
        f(%0: f32[50,8], %1: i64[64,8]) {
          %2: f32[64,8] = gather(%0, %1, axis=0)
          return %2
        }""")
    assert found.steps == 2 and found.loaded == 64 * 8 * (8 + 4)


def test_kernels_side_by_side():
    """Each part has its own work, and programs from the number on where the one before ends."""
    parts = works("""
        f(%0: f32[64,32], %1: f32[32,48], %2: f32[64,48]) {
          %3: f32[64,48] = matmul(%0, %1)
          %4: f32[48] = reduce_sum(%2, axes=(0,))
          return %3, %4
        }""")
    assert [(p.form, p.programs) for p in parts] == [("matmul", 4), ("rows", 6)]
    assert parts[1].issued == 4 * (64 * 48 + 48) and parts[0].stored == 4 * 64 * 48


# --- the interpreter, which counts each lane ----------------------------------------------------


def interpreted(plan: Plan, max_tile: int, monkeypatch) -> list[Counter]:
    """Bytes that the lanes of each launch load and store, of a plan that runs on zeros."""
    counts: list[Counter] = []
    launches: list[int] = []
    access = interpreter.Memory.access

    def counting(self, pointers, mask, itemsize, reads, writes):
        nbytes = itemsize * int(np.count_nonzero(np.broadcast_arrays(pointers, mask)[1]))
        counts[-1]["loaded"] += nbytes * reads
        counts[-1]["stored"] += nbytes * writes
        access(self, pointers, mask, itemsize, reads, writes)

    run = interpreter.run

    def beginning(*args, **kwargs):
        if kwargs["seed"] not in launches:  # a foreach runs twice where some rows are not wide
            launches.append(kwargs["seed"])
            counts.append(Counter())
        return run(*args, **kwargs)

    monkeypatch.setattr(interpreter.Memory, "access", counting)
    monkeypatch.setattr(interpreter, "run", beginning)
    arena = np.zeros(plan.arena_bytes + 1, np.uint8)
    kept, addresses = [arena], []
    for buffer in plan.buffers:
        if buffer.kind == "arena":
            addresses.append(arena.ctypes.data + buffer.offset)
        else:
            kept.append(np.zeros(memory_bytes(buffer) + 1, np.uint8))
            addresses.append(kept[-1].ctypes.data)
    loaded = TritonExecutor("interpret", max_tile=max_tile).load(plan)
    loaded(addresses, [1.0] * len(plan.scalars))
    monkeypatch.undo()
    return counts


def check(plan: Plan, max_tile: int, monkeypatch) -> None:
    counted = []
    for launch in plan.launches:
        source = emit(launch.kernel, launch.sizes, max_tile=max_tile)
        shape = source.geometry(launch.sizes, max_tile)
        if shape.grid[0]:
            parts = work(source, launch.sizes, shape)
            assert sum(part.programs for part in parts) == shape.grid[0]
            counted.append((sum(p.loaded for p in parts), sum(p.stored for p in parts)))
    found = [(c["loaded"], c["stored"]) for c in interpreted(plan, max_tile, monkeypatch)]
    assert counted == found


# Values decide which lanes of these load: an index that is put to its place as a condition.
DECIDED = ("indexing",)


@pytest.mark.interpret
@pytest.mark.parametrize("k", [509, 5001])
def test_splits_move_what_the_interpreter_moves(k, monkeypatch):
    text = f"""f(%0: f32[19,{k}], %1: f32[{k},33]) {{
      %2: f32[19,33] = matmul(%0, %1)
      %3: f32[19,33] = add(%2, 1.0)
      %4: f32[] = reduce_sum(%3, axes=(0, 1))
      return %3, %4
    }}"""
    plan = schedule(parse(text))
    (launch,) = plan.launches
    shape = emit(launch.kernel, launch.sizes).geometry(launch.sizes)
    splits, group = shape.constants["SPLITS"], shape.constants["GROUP"]
    assert splits > 1 and (splits > group) == (k > 5000)
    check(plan, MAX_TILE, monkeypatch)


@pytest.mark.interpret
@pytest.mark.parametrize("max_tile", [MAX_TILE, 64])
@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in DECIDED])
@pytest.mark.sweep(4)
def test_issued_bytes_are_what_the_interpreter_moves(name, max_tile, monkeypatch):
    for plan in plans_of(name, small=True):
        check(plan, max_tile, monkeypatch)


@pytest.mark.interpret
@pytest.mark.parametrize("max_tile", [MAX_TILE, 64])
def test_what_values_decide_is_counted_in_full(max_tile, monkeypatch):
    """Whether a lane of these loads is known only when it runs: it counts as one that does."""
    (plan,) = plans_of("indexing", small=True)
    counts = interpreted(plan, max_tile, monkeypatch)
    total = Counter()
    for launch in plan.launches:
        source = emit(launch.kernel, launch.sizes, max_tile=max_tile)
        for part in work(source, launch.sizes, source.geometry(launch.sizes, max_tile)):
            total += Counter(loaded=part.loaded, stored=part.stored)
    found = sum(counts, Counter())
    assert total["stored"] == found["stored"]
    assert found["loaded"] <= total["loaded"] <= 1.5 * found["loaded"]


GRAPHS = {
    "a ragged flat domain": """
        f(%0: f32[131075]) {
          %1: f32[131075] = mul(%0, 2.0)
          return %1
        }""",
    "a maximum of many programs": """
        f(%0: f32[300001], %1: f64[]@host) {
          %2: f32[300001] = mul(%0, %1)
          %3: f32[] = reduce_max(%2, axes=(0,))
          return %3
        }""",
    "padding": """
        f(%0: bf16[7,5]) {
          %1: bf16[17,9] = pad(%0, low=(1, 4), high=(3, 0), interior=(1, 0), value=0.0)
          %2: bf16[17,9] = exp(%1)
          return %2
        }""",
    "a scatter of rows": """
        f(%0: f32[900,300], %1: i64[50], %2: f32[50,300]) {
          %3: i64[50,1] = reshape(%1, shape=(50, 1))
          %4: i64[50,300] = expand(%3, shape=(50, 300))
          %5: f32[900,300] = scatter(%0, %4, %2, axis=0, combine="add")
          return %5
        }""",
    "running sums": """
        f(%0: f32[70,300]) {
          %1: f32[70,300] = exp(%0)
          %2: f32[70,300] = cumsum(%1, axis=0)
          return %2
        }""",
    "running log-sums": """
        f(%0: f32[70,300]) {
          %1: f32[70,300] = accumulate(%0, axis=0, combine="logaddexp")
          return %1
        }""",
    "sorted rows": """
        f(%0: f32[5,300]) {
          %1: f32[5,300] = exp(%0)
          %2: i64[5,70] = argsort(%1, axis=1, count=70, descending=True)
          return %2
        }""",
    "a scatter along rows": """
        f(%0: bf16[70,30], %1: i64[70,9], %2: bf16[70,9]) {
          %3: bf16[70,30] = scatter(%0, %1, %2, axis=1, combine="last")
          return %3
        }""",
    "a broadcast row": """
        f(%0: f64[6,1], %1: f64[4]) {
          %2: f64[6,4] = expand(%0, shape=(6,4))
          %3: f64[1,4] = reshape(%1, shape=(1,4))
          %4: f64[6,4] = expand(%3, shape=(6,4))
          %5: f64[6,4] = add(%2, %4)
          %6: f64[6] = reduce_sum(%5, axes=(1,))
          return %5, %6
        }""",
    "a batch of products": """
        f(%0: f32[3,40,50], %1: f32[3,50,70]) {
          %2: f32[3,40,70] = matmul(%0, %1)
          return %2
        }""",
    "nothing": """
        f(%0: f32[0,3]) {
          %1: f32[0,3] = exp(%0)
          return %1
        }""",
}


@pytest.mark.interpret
@pytest.mark.parametrize("max_tile", [MAX_TILE, 64])
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.sweep(3)
def test_issued_bytes_of_graphs(name, max_tile, monkeypatch):
    check(schedule(parse(GRAPHS[name])), max_tile, monkeypatch)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.sweep(3)
def test_issued_bytes_of_attention(name, monkeypatch):
    check(schedule(ATTENTION[name].graph()), MAX_TILE, monkeypatch)


@pytest.mark.interpret
@pytest.mark.parametrize("clip", [None, 0.5])
def test_issued_bytes_of_a_foreach(clip, monkeypatch):
    plan = plan_of(Updates(clip=clip).step)
    assert any(launch.kernel.foreach for launch in plan.launches)
    check(plan, MAX_TILE, monkeypatch)
