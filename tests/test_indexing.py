"""flip and gather below capture: their kernels, as text and on the numpy executor and Triton's."""

from __future__ import annotations

import os

import pytest

from support.plan_checks import both
from tracejit.ir.text import parse
from tracejit.schedule import bytes_moved, schedule
from tracejit.schedule.kernel_text import canonical, parse_kernel

PROGRAMS = {
    "flip": """step(%0: f32[3,5], %1: f32[5,3]) {
        %2: f32[3,5] = flip(%0, axes=(0, 1))
        %3: f32[3,5] = permute(%1, axes=(1, 0))
        %4: f32[3,5] = add(%2, %3)
        return %4
    }""",
    "flip of a pad": """step(%0: f32[5]) {
        %1: f32[6] = pad(%0, low=(1,), high=(0,), interior=(0,), value=3.0)
        %2: f32[6] = flip(%1, axes=(0,))
        return %2
    }""",
    "pad so wide that only the first element is left": """step(%0: f32[1], %1: f32[6]) {
        %2: f32[6] = pad(%0, low=(5,), high=(0,), interior=(0,), value=3.0)
        %3: f32[6] = flip(%2, axes=(0,))
        %4: f32[6] = add(%3, %1)
        return %4
    }""",
    "flip of a reshape": """step(%0: f32[4,6]) {
        %1: f32[3,8] = reshape(%0, shape=(3, 8))
        %2: f32[3,8] = flip(%1, axes=(1,))
        %3: f32[24] = reshape(%2, shape=(24,))
        %4: f32[24] = flip(%3, axes=(0,))
        return %3, %4
    }""",
    "flip in place": """step(%0: f32[7]) {
        %1: f32[7] = flip(%0, axes=(0,))
        write %0 <- %1
    }""",
    "rows": """step(%0: f32[4,6], %1: i64[5], %2: f32[5,6]) {
        %4: i64[5,1] = reshape(%1, shape=(5, 1))
        %5: i64[5,6] = expand(%4, shape=(5, 6))
        %8: f32[5,6] = gather(%0, %5, axis=0)
        %9: f32[5,6] = mul(%8, %2)
        %10: f32[5] = reduce_sum(%9, axes=(1,))
        return %10, %9
    }""",
    "through views": """step(%0: f32[12], %1: i64[3,9]) {
        %2: f32[4,3] = reshape(%0, shape=(4, 3))
        %3: f32[3,4] = permute(%2, axes=(1, 0))
        %4: f32[3,4] = flip(%3, axes=(1,))
        %5: f32[3,6] = pad(%4, low=(0, 1), high=(0, 1), interior=(0, 0), value=0.5)
        %6: f32[3,9] = gather(%5, %1, axis=1)
        return %6
    }""",
    "through a merging reshape": """step(%0: f32[2,3], %1: i64[40]) {
        %2: f32[6] = reshape(%0, shape=(6,))
        %3: f32[40] = gather(%2, %1, axis=0)
        return %3
    }""",
    "of positions": """step(%0: i64[40]) {
        %1: f32[5] = iota(axis=0, shape=(5,), dtype=f32, device='cpu')
        %2: f32[5] = mul(%1, 0.5)
        %3: f32[40] = gather(%2, %0, axis=0)
        return %3
    }""",
    "of a computed value": """step(%0: f32[5,7], %1: f32[7,6], %2: i64[5,6]) {
        %3: f32[5,6] = matmul(%0, %1)
        %4: f32[5,6] = gather(%3, %2, axis=1)
        %5: f32[5,6] = gather(%4, %2, axis=0)
        %6: f32[5,6] = add(%5, %3)
        return %6
    }""",
    "at a reduced index": """step(%0: i64[5,6], %1: f32[5,6]) {
        %2: i64[5] = reduce_max(%0, axes=(1,))
        %3: i64[5,1] = reshape(%2, shape=(5, 1))
        %4: f32[5,1] = gather(%1, %3, axis=1)
        %5: f32[5,6] = expand(%4, shape=(5, 6))
        %6: f32[5,6] = sub(%1, %5)
        %7: f32[5] = reduce_sum(%6, axes=(1,))
        return %7, %6
    }""",
    "in an epilogue": """step(%0: f32[5,7], %1: f32[7,6], %2: i64[5], %3: f32[4,6]) {
        %4: f32[5,6] = matmul(%0, %1)
        %5: i64[5,1] = reshape(%2, shape=(5, 1))
        %6: i64[5,6] = expand(%5, shape=(5, 6))
        %7: f32[5,6] = gather(%3, %6, axis=0)
        %8: f32[5,6] = add(%4, %7)
        return %8
    }""",
    "padded afterwards": """step(%0: f32[5], %1: i64[6]) {
        %2: f32[6] = gather(%0, %1, axis=0)
        %3: f32[9] = pad(%2, low=(1,), high=(2,), interior=(0,), value=0)
        return %3
    }""",
    "overwritten source": """step(%0: f32[5], %1: i64[5], %2: f32[5]) {
        %3: f32[5] = gather(%0, %1, axis=0)
        %4: f32[5] = add(%3, %2)
        write %0 <- %4
    }""",
    "overwritten index": """step(%0: f32[5], %1: i64[5]) {
        %2: f32[5] = gather(%0, %1, axis=0)
        %3: i64[5] = add(%1, 1)
        return %2
        write %1 <- %3
    }""",
    "scattered over a kept tensor": """step(%0: f32[40,3], %1: i64[7], %2: f32[7,3]) {
        %3: i64[7,1] = reshape(%1, shape=(7, 1))
        %4: i64[7,3] = expand(%3, shape=(7, 3))
        %5: f32[7,3] = mul(%2, 2.0)
        %6: f32[40,3] = scatter(%0, %4, %5, axis=0, combine="add")
        %7: f32[40,3] = mul(%6, %6)
        return %6, %7
    }""",
    "scattered in place": """step(%0: f32[40,3], %1: i64[7], %2: f32[7,3]) {
        %3: i64[7,1] = reshape(%1, shape=(7, 1))
        %4: i64[7,3] = expand(%3, shape=(7, 3))
        %6: f32[40,3] = scatter(%0, %4, %2, axis=0, combine="last")
        write %0 <- %6
    }""",
    "scattered in place, the old value read": """step(%0: f32[9,2], %1: i64[5,2], %2: f32[5,2]) {
        %6: f32[9,2] = scatter(%0, %1, %2, axis=0, combine="add")
        %7: f32[2] = reduce_sum(%0, axes=(0,))
        return %7
        write %0 <- %6
    }""",
    "a scatter's source is its target": """step(%0: f32[6,2], %1: i64[6,2]) {
        %6: f32[6,2] = scatter(%0, %1, %0, axis=0, combine="add")
        write %0 <- %6
    }""",
    "one scatter over another": """step(%0: f32[9,2], %1: i64[5,2], %2: f32[5,2]) {
        %3: f32[9,2] = exp(%0)
        %4: f32[9,2] = scatter(%3, %1, %2, axis=0, combine="add")
        %5: f32[9,2] = scatter(%4, %1, %2, axis=0, combine="last")
        %6: f32[9,2] = mul(%4, %5)
        return %6
    }""",
    "scattered along rows": """step(%0: f32[4,9], %1: i64[4,12], %2: f32[4,12]) {
        %3: f32[4,9] = full(0, shape=(4, 9), dtype=f32, device="cpu")
        %4: f32[4,12] = exp(%2)
        %5: f32[4,9] = scatter(%3, %1, %4, axis=1, combine="add")
        %6: f32[4,9] = add(%5, %0)
        %7: f32[] = reduce_sum(%6, axes=(0, 1))
        return %6, %7
    }""",
    "scattered along one axis alone": """step(%0: f32[9], %1: i64[12], %2: f32[12]) {
        %5: f32[9] = scatter(%0, %1, %2, axis=0, combine="add")
        return %5
    }""",
    "scattered twice to results": """step(%0: f32[9], %1: i64[12], %2: f32[12]) {
        %5: f32[9] = scatter(%0, %1, %2, axis=0, combine="add")
        return %5, %5
        write %0 <- %5
    }""",
    "scattered through views": """step(%0: f32[12], %1: i64[3,5], %2: f32[5,3]) {
        %3: f32[4,3] = reshape(%0, shape=(4, 3))
        %4: f32[3,4] = permute(%3, axes=(1, 0))
        %5: f32[3,5] = permute(%2, axes=(1, 0))
        %6: f32[3,4] = scatter(%4, %1, %5, axis=1, combine="add")
        %7: f32[4,3] = permute(%6, axes=(1, 0))
        %8: f32[12] = reshape(%7, shape=(12,))
        return %7
        write %0 <- %8
    }""",
    "running sums": """step(%0: f32[40,3], %1: f32[4,50], %2: f64[70]) {
        %3: f32[40,3] = mul(%0, 2.0)
        %4: f32[40,3] = cumsum(%3, axis=0)
        %5: f32[40,3] = mul(%4, %0)
        %6: f32[4,50] = flip(%1, axes=(1,))
        %7: f32[4,50] = cumsum(%6, axis=1)
        %8: f64[70] = cumsum(%2, axis=0)
        return %5, %7, %8
    }""",
    "sorted": """step(%0: f32[40,3], %1: f64[4,50], %2: i64[700], %3: bf16[6,2,5], %4: b1[9]) {
        %10: f32[40,3] = mul(%0, %0)
        %11: i64[40,3] = argsort(%10, axis=0, count=40, descending=False)
        %12: f32[40,3] = gather(%10, %11, axis=0)
        %13: i64[4,7] = argsort(%1, axis=1, count=7, descending=True)
        %14: f64[4,7] = gather(%1, %13, axis=1)
        %15: i64[1] = argsort(%2, axis=0, count=1, descending=False)
        %16: i64[6,2,5] = argsort(%3, axis=1, count=2, descending=True)
        %17: i64[9] = argsort(%4, axis=0, count=9, descending=True)
        return %12, %11, %14, %15, %16, %17
    }""",
    "a sort through views": """step(%0: f32[12,6], %1: f32[]@host) {
        %2: f32[6,12] = permute(%0, axes=(1, 0))
        %3: f32[6,12] = mul(%2, %1)
        %4: i64[6,1] = argsort(%3, axis=1, count=1, descending=True)
        %5: i64[6] = reshape(%4, shape=(6,))
        %6: f32[6,12] = full(1.0, shape=(6, 12), dtype=f32, device="cpu")
        %7: i64[6,5] = argsort(%6, axis=1, count=5, descending=True)
        %8: i64[5,6] = permute(%7, axes=(1, 0))
        return %5, %8
    }""",
    "a running sum in place": """step(%0: f32[40,3]) {
        %1: f32[40,3] = cumsum(%0, axis=0)
        write %0 <- %1
    }""",
    "running results": """step(%0: f32[40,3], %1: f64[4,50], %2: i64[70], %3: bf16[9,2]) {
        %4: f32[40,3] = mul(%0, 0.5)
        %5: f32[40,3] = accumulate(%4, axis=0, combine="mul")
        %6: f32[40,3] = accumulate(%5, axis=1, combine="logaddexp")
        %7: f64[4,50] = accumulate(%1, axis=1, combine="max")
        %8: f64[4,50] = recurrence(%1, %7, axis=1)
        %9: i64[70] = accumulate(%2, axis=0, combine="min")
        %10: bf16[9,2] = accumulate(%3, axis=0, combine="max")
        %11: f32[40,3] = recurrence(%4, %6, axis=0)
        return %5, %6, %8, %9, %10, %11
    }""",
    "narrow, scattered": """step(%0: bf16[4,6], %1: i64[15,6], %2: bf16[15,6]) {
        %3: bf16[4,6] = scatter(%0, %1, %2, axis=0, combine="last")
        return %3
    }""",
    "nothing to read": """step(%0: f32[0,3], %1: i64[2,3]) {
        %2: f32[2,3] = gather(%0, %1, axis=0)
        return %2
    }""",
    "narrow": """step(%0: bf16[4,6], %1: i64[5,6]) {
        %2: bf16[5,6] = gather(%0, %1, axis=0)
        %3: bf16[5,6] = mul(%2, 3.0)
        return %2, %3
    }""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_on_numpy(name: str):
    both(PROGRAMS[name])


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_parse_back(name: str):
    for launch in schedule(parse(PROGRAMS[name])).launches:
        kernel = launch.kernel
        assert parse_kernel(str(kernel)) == kernel
        assert parse_kernel(str(canonical(kernel))) == canonical(kernel)


@pytest.mark.interpret
@pytest.mark.sweep(0.34)
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", PROGRAMS)
def test_on_triton(name: str, fuse: bool):
    from support.interpret_checks import check

    check(PROGRAMS[name], fuse=fuse)


def test_a_scatter_in_place_touches_its_rows_only():
    (launch,) = schedule(parse(PROGRAMS["scattered in place"])).launches
    (stage,) = launch.kernel.stages
    assert stage.in_order and stage.axes[0].extent == "n1"
    assert str(launch.kernel).count("store") == 1
    assert sum(bytes_moved(schedule(parse(PROGRAMS["scattered in place"])))) == 7 * (8 + 3 * 8)


def test_bytes_of_a_gather():
    """Rows are counted once per reader, up to the whole table."""
    few, many = (
        schedule(parse(PROGRAMS["rows"].replace("f32[4,6]", f"f32[{n},6]"))) for n in (2, 1000)
    )
    rest = 5 * 8 + 5 * 6 * 4 + 5 * 6 * 4 + 5 * 4  # index, factor, two results
    assert sum(bytes_moved(few)) == rest + 2 * 6 * 4
    assert sum(bytes_moved(many)) == rest + 5 * 6 * 4


def machine_code(text: str, target: int):
    """The form of a program's kernel, and facts of what it becomes on a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("compiles, so it needs a process without the interpreter")
    pytest.importorskip("triton")
    from support.machine_code import facts

    return facts(text, target)


def test_rows_of_a_table_move_128_bits():
    """An embedding's loads are as wide as copies: the index is one per row, the rows are dense."""
    form, found = machine_code(
        """step(%0: f32[50000,768], %1: i64[4096]) {
            %2: i64[4096,1] = reshape(%1, shape=(4096, 1))
            %3: i64[4096,768] = expand(%2, shape=(4096, 768))
            %4: f32[4096,768] = gather(%0, %3, axis=0)
            return %4
        }""",
        90,
    )
    assert form == "pointwise" and not found.spills
    assert found.loads[128] == found.stores[128] == 2 and set(found.loads) == {64, 128}


@pytest.mark.parametrize("target", [80, 90, 100])
def test_the_gradient_of_an_embedding_spills_nothing(target: int):
    form, found = machine_code(
        """step(%1: i64[1024], %2: f32[1024,512]) {
            %3: i64[1024,1] = reshape(%1, shape=(1024, 1))
            %4: i64[1024,512] = expand(%3, shape=(1024, 512))
            %5: f32[32000,512] = full(0, shape=(32000, 512), dtype=f32, device="cpu")
            %6: f32[32000,512] = scatter(%5, %4, %2, axis=0, combine="add")
            return %6
        }""",
        target,
    )
    assert form == "scatter" and not found.spills


@pytest.mark.parametrize("target", [80, 90, 100])
def test_sorting_spills_nothing(target: int):
    form, found = machine_code(
        """step(%0: f32[64,1000]) {
            %1: i64[64,1000] = argsort(%0, axis=1, count=1000, descending=True)
            return %1
        }""",
        target,
    )
    assert form == "sort_network" and not found.spills
