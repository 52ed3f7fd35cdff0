"""The scheduler: what becomes one kernel, what is stored, and that plans compute the graph."""

from __future__ import annotations

import numpy as np
import pytest

from support.graph_texts import (
    ADDED,
    FRESH,
    KEPT,
    PROGRAM_3,
    ZEROS,
    convolution,
    softmax,
    two_layers,
)
from support.plan_checks import both, check
from support.random_graphs import RandomProgram
from tracejit.ir.graph import Builder, Result
from tracejit.ir.text import parse
from tracejit.ir.types import Type, f32
from tracejit.schedule import bytes_moved, parametrize, schedule, substitute
from tracejit.schedule.index import (
    ZERO,
    add,
    bounds,
    divmod_index,
    extents_of,
    flatten,
    identity,
    invert,
    reindex,
    scale,
    unflatten,
)
from tracejit.schedule.kernel import Compute, FloorDiv, Index, Mod
from tracejit.schedule.memory import Lifetime, plan_arena

I0, I1, I2 = (Index(((f"i{k}", 1),)) for k in range(3))


def value_of(index: Index, point: dict[str, int]) -> int:
    """An index evaluated at one point."""
    total = index.offset
    for atom, c in index.terms:
        if isinstance(atom, str):
            part = point[atom]
        else:
            below = value_of(atom.index, point)
            part = below // atom.by if isinstance(atom, FloorDiv) else below % atom.by
        total += part * c
    return total


def test_quotients_split_by_ranges():
    extents = {"i0": 5, "i1": 4, "i2": 3}
    flat = add([scale(I0, 12), scale(I1, 3), I2])
    assert divmod_index(flat, 3, extents) == (add([scale(I0, 4), I1]), I2)
    assert divmod_index(flat, 12, extents) == (I0, add([scale(I1, 3), I2]))
    assert divmod_index(flat, 6, extents) == (
        add([scale(I0, 2), Index(((FloorDiv(I1, 2), 1),))]),
        add([Index(((Mod(I1, 2), 3),)), I2]),
    )
    assert divmod_index(I2, 3, extents) == (ZERO, I2)


def test_quotient_and_remainder_join_again():
    extents = {"i0": 24}
    assert flatten(unflatten(I0, (2, 3, 4), extents), (12, 4, 1)) == I0
    assert flatten(unflatten(I0, (6, 4), extents), (4, 1)) == I0


def test_index_arithmetic_is_exact():
    rng = np.random.default_rng(1)
    for _ in range(400):
        extents = {f"i{k}": int(rng.integers(2, 5)) for k in range(3)}
        parts = [scale(axis, int(rng.integers(-3, 13))) for axis in (I0, I1, I2)]
        index = add(parts, int(rng.integers(-5, 6)))
        by, again = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        quotient, remainder = divmod_index(index, by, extents)
        second = divmod_index(quotient, again, extents)
        for _ in range(10):
            point = {name: int(rng.integers(0, n)) for name, n in extents.items()}
            whole = value_of(index, point)
            assert (value_of(quotient, point), value_of(remainder, point)) == divmod(whole, by)
            assert tuple(value_of(i, point) for i in second) == divmod(whole // by, again)
            low, high = bounds(remainder, extents)
            assert low <= value_of(remainder, point) <= high


def test_reindex_leaves_untouched_dimensions():
    shape = (5, 4, 3)
    assert reindex(identity(shape), shape, (5, 12), extents_of(shape)) == (
        I0,
        add([scale(I1, 3), I2]),
    )
    assert reindex(identity((5, 12)), (5, 12), (5, 1, 4, 3), extents_of((5, 12))) == (
        I0,
        ZERO,
        Index(((FloorDiv(I1, 3), 1),)),
        Index(((Mod(I1, 3), 1),)),
    )


def test_invert_permutations_and_merges():
    extents = extents_of((6, 5))
    assert invert((I1, I0), (5, 6), (6, 5), identity((5, 6)), extents_of((5, 6))) == (I1, I0)
    merged = (add([scale(I0, 5), I1]),)
    assert invert(merged, (30,), (6, 5), (I0,), {"i0": 30}) == unflatten(I0, (6, 5), {"i0": 30})
    assert invert((I0,), (6,), (6, 5), (I0,), extents) is None


def test_arena_reuses_dead_memory():
    lives = [Lifetime(100, 0, 1), Lifetime(300, 1, 2), Lifetime(100, 2, 3)]
    offsets, total = plan_arena(lives)
    assert offsets == [384, 0, 384]
    assert total == 512


def test_program_3_is_one_kernel_of_12_bytes_an_element():
    plan, unfused = both(PROGRAM_3)
    assert bytes_moved(plan) == (12 * 40000 + 4,)
    assert (
        str(plan.launches[0].kernel)
        == """\
kernel(b0: f32 r, b1: f32 r, b2: f32 w, b3: f32 w; n0) over () {
  stage (i0: n0) {
    v0: f32 = load b0[i0]
    v2: f32 = maximum(v0, 0.0)  # step.py:1
    v1: f32 = load b1[i0]
    v3: f32 = sub(v2, v1)
    v4: f32 = mul(v3, v3)
    v5: f32 = reduce_sum v4     # step.py:2
    v6: b1 = ge(v0, 0.0)
    v7: f32 = mul(v3, 2.0)
    v8: f32 = where(v6, v7, 0.0)
    store b2[i0] <- v8
  }
  stage () {
    store b3[0] <- v5           # step.py:2
  }
}"""
    )
    assert len(unfused.launches) == 7


@pytest.mark.parametrize("gradients", [FRESH, ADDED], ids=["fresh", "added"])
@pytest.mark.parametrize("kept", [ZEROS, KEPT], ids=["zeroed", "kept"])
def test_two_layer_step_is_five_matmuls_in_four_launches(gradients, kept):
    plan, _ = both(two_layers(gradients, kept))
    kernels = [alone for launch in plan.launches for alone in launch.alone()]
    assert (len(kernels), len(plan.launches)) == (5, 4)  # both updates at once
    assert all(one.kernel.stages[0].dot is not None for one in kernels)
    arena = [b for b in plan.buffers if b.kind == "arena"]
    assert [b.type.shape for b in arena] == [(64, 100), (64, 10), (64, 100)]  # h, gy, gh
    order = [set(launch.buffers) for launch in plan.launches]
    w2_update = max(i for i, names in enumerate(order) if "t2" in names)
    launch = plan.launches[w2_update]
    assert launch.kernel.buffers[launch.buffers.index("t2")].access == "rw"


def launches(text: str) -> int:
    return len(both(text)[0].launches)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("rows", "columns"), [(5, 123), (123, 5), (700, 300)])
def test_softmax_is_one_kernel_of_three_stages(rows, columns, axis):
    plan, _ = both(softmax(rows, columns, axis))
    assert len(plan.launches) == 1
    kernel = plan.launches[0].kernel
    assert len(kernel.stages) == 3
    assert all(stage.axes for stage in kernel.stages)


def test_softmax_of_a_single_row_is_one_program_if_it_is_short():
    assert launches(softmax(1, 123, 1)) == 1
    assert launches(softmax(1, 5000, 1)) == 3  # else many programs, and others after them


def test_mean_and_norm_are_tails_of_their_reduction():
    assert (
        launches("""
    step(%0: f32[37,11]) {
      %1: f32[] = reduce_sum(%0, axes=(0, 1))
      %2: f32[] = mul(%1, 0.002457)
      %3: f32[37,11] = mul(%0, %0)
      %4: f32[] = reduce_sum(%3, axes=(0, 1))
      %5: f32[] = sqrt(%4)
      return %2, %5
    }""")
        == 1
    )


def test_linear_layer_update_through_a_transpose_is_an_epilogue():
    plan, _ = both("""
    step(%0: f32[64,128], %1: f32[64,100], %2: f32[100,128]) {
      %3: f32[128,64] = permute(%0, axes=(1, 0))
      %4: f32[128,100] = matmul(%3, %1)
      %5: f32[100,128] = permute(%4, axes=(1, 0))
      %6: f32[100,128] = mul(%5, 0.1)
      %7: f32[100,128] = sub(%2, %6)
      write %2 <- %7
    }""")
    assert len(plan.launches) == 1


def test_siblings_share_a_kernel_through_a_reshape():
    assert (
        launches("""
    step(%0: f32[6,4], %1: f32[6,4], %2: f32[24]) {
      %3: f32[6,4] = add(%0, %1)
      %4: f32[6,4] = mul(%0, %1)
      %5: f32[24] = reshape(%4, shape=(24,))
      %6: f32[24] = sub(%5, %2)
      return %3, %4, %6
    }""")
        == 1
    )


def test_value_read_at_two_places_is_stored():
    plan, _ = both("""
    step(%0: f32[8,8], %1: f32[8,8]) {
      %2: f32[8,8] = mul(%0, %1)
      %3: f32[8,8] = permute(%2, axes=(1, 0))
      %4: f32[8,8] = add(%2, %3)
      return %4
    }""")
    assert len(plan.launches) == 2
    assert sum(b.kind == "arena" for b in plan.buffers) == 1


def test_wide_graph_is_split_by_the_number_of_buffers():
    b = Builder()
    results = []
    x = b.param(Type(f32, (64,)))
    for _ in range(40):
        results.append(Result(b.mul(x, b.param(Type(f32, (64,))))))
    graph = b.graph("step", tuple(results))
    plan = schedule(graph)
    check(graph, plan)
    kernels = [alone for launch in plan.launches for alone in launch.alone()]
    assert 4 <= len(kernels) <= 5 and all(len(kernel.buffers) <= 25 for kernel in kernels)
    assert len(plan.launches) == 2 and all(len(one.buffers) <= 64 for one in plan.launches)


HAZARDS = {
    "transpose in place": (
        "%0: f32[4,4]",
        "%1: f32[4,4] = permute(%0, axes=(1, 0))",
        "write %0 <- %1",
    ),
    "shift in place": (
        "%0: f32[9]",
        """%1: f32[8] = slice(%0, starts=(1,), stops=(9,), steps=(1,))
           %2: f32[9] = pad(%1, low=(0,), high=(1,), interior=(0,), value=0)
           %3: f32[9] = add(%0, %2)""",
        "return %3\n write %0 <- %3",
    ),
    "swap": ("%0: f32[7], %1: f32[7]", "", "write %0 <- %1\n write %1 <- %0"),
    "swap transposed": (
        "%0: f32[4,4], %1: f32[4,4]",
        """%2: f32[4,4] = permute(%0, axes=(1, 0))
           %3: f32[4,4] = permute(%1, axes=(1, 0))""",
        "write %0 <- %3\n write %1 <- %2",
    ),
    "old value read later": (
        "%0: f32[5,6], %1: f32[6,5]",
        """%2: f32[5,6] = mul(%0, 0.5)
           %3: f32[5,5] = matmul(%0, %1)
           %4: f32[5,5] = matmul(%2, %1)
           %5: f32[6,5] = add(%1, 1.0)""",
        "return %3, %4\n write %0 <- %2\n write %1 <- %5",
    ),
    "old value read after the new one": (
        "%0: f32[5,5], %1: f32[5,5]",
        """%2: f32[5,5] = mul(%0, %1)
           %3: f32[5,5] = matmul(%2, %2)
           %4: f32[5,5] = matmul(%3, %0)""",
        "return %4\n write %0 <- %2",
    ),
    "one value, several places": (
        "%0: f32[5], %1: f32[5], %2: f32[5]",
        "%3: f32[5] = mul(%0, %1)",
        "return %3, %3, %0\n write %0 <- %3\n write %1 <- %3\n write %2 <- %0",
    ),
    "normalise in place": (
        "%0: f32[6,7]",
        """%1: f32[6] = reduce_sum(%0, axes=(1,))
           %2: f32[6,1] = reshape(%1, shape=(6, 1))
           %3: f32[6,7] = expand(%2, shape=(6, 7))
           %4: f32[6,7] = sub(%0, %3)
           %5: f32[6] = reduce_max(%4, axes=(1,))""",
        "return %5\n write %0 <- %4",
    ),
    "rotation of three": (
        "%0: f32[5], %1: f32[5], %2: f32[5]",
        "",
        "write %0 <- %1\n write %1 <- %2\n write %2 <- %0",
    ),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_hazards_of_writes_in_place(name):
    params, body, end = HAZARDS[name]
    both(f"step({params}) {{\n{body}\n{end}\n}}")


LAYOUTS = {
    "strided param": ("%0: f32[5,7] strides (1, 5)", "return %1"),
    "expanded param": ("%0: f32[5,7] strides (0, 1)", "return %1"),
    "write to strides": ("%0: f32[5,7] strides (1, 6)", "write %0 <- %1"),
    "strided result": ("%0: f32[5,7]", "return %1 strides (1, 5), %1"),
    "copy of an input": ("%0: f32[5,7] strides (1, 5)", "return %0, %0"),
}
EMPTY = {
    "reduction": """step(%0: f32[0,7]) {
        %1: f32[7] = reduce_sum(%0, axes=(0,))
        return %0, %1
    }""",
    "matmul": """step(%0: f32[3,0], %1: f32[0,4]) {
        %2: f32[3,4] = matmul(%0, %1)
        return %2
    }""",
    "pad": """step(%0: f32[0]) {
        %1: f32[3] = pad(%0, low=(1,), high=(2,), interior=(0,), value=2.5)
        return %1
    }""",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    param, end = LAYOUTS[name]
    both(f"step({param}) {{\n%1: f32[5,7] = mul(%0, 2.0)\n{end}\n}}")


@pytest.mark.parametrize("name", EMPTY)
def test_empty_tensors(name):
    both(EMPTY[name])


def test_zero_size_results_launch_nothing():
    assert launches("step(%0: f32[0,3]) {\n%1: f32[0,3] = exp(%0)\nreturn %1\n}") == 0


def test_host_values_are_scalars_of_the_table():
    plan, _ = both("""
    step(%0: f32[5], %1: f64[]@host, %2: f64[]@host) {
      %3: f64[]@host = host_mul(%1, 2.0)
      %4: f32[5] = mul(%0, %3)
      %5: f32[5] = full(%1, shape=(5,), dtype=f32, device='cpu')
      return %4, %5
    }""")
    assert len(plan.launches) == 1
    assert [repr(s) for s in plan.scalars] == ["%3", "%1"]
    assert [node.op.name for node in plan.host] == ["host_mul"]
    assert [position for _, position in plan.host_params] == [1]


def test_pads_with_zero_need_no_select():
    plan, _ = both("""
    step(%0: f32[5]) {
      %1: f32[14] = pad(%0, low=(2,), high=(3,), interior=(1,), value=0)
      return %1
    }""")
    (stage,) = plan.launches[0].kernel.stages
    assert not any(isinstance(s, Compute) for s in stage.body)


def test_index64_where_memory_is_large():
    graph = parse("""
    step(%0: u8[70000,70000]) {
      %1: u8[70000,70000] = add(%0, 1)
      return %1
    }""")
    assert schedule(graph).launches[0].kernel.index64
    assert not schedule(parse(PROGRAM_3)).launches[0].kernel.index64


@pytest.mark.parametrize(
    ("n", "wide"),
    [(2**31 - 1, True), (2**31 - 500, True), (2**31 - (1 << 23) - 1, False)],
)
def test_index64_where_the_last_tile_reaches_beyond_32_bits(n, wide):
    graph = f"step(%0: u8[{n}]) {{\n %1: u8[{n}] = add(%0, 1)\n return %1\n}}"
    assert schedule(parse(graph)).launches[0].kernel.index64 == wide
    total = f"step(%0: u8[{n}]) {{\n %1: i64[] = reduce_sum(%0, axes=(0,))\n return %1\n}}"
    assert schedule(parse(total)).launches[0].kernel.index64 == wide


def test_index64_where_a_domain_is_larger_than_the_memory_it_reads():
    kernel = (
        schedule(
            parse("""
    step(%0: f32[65536,1], %1: f32[1,65536]) {
      %2: f32[65536,65536] = expand(%0, shape=(65536, 65536))
      %3: f32[65536,65536] = expand(%1, shape=(65536, 65536))
      %4: f32[65536,65536] = mul(%2, %3)
      %5: f32[65536,65536] = exp(%4)
      %6: f32[] = reduce_sum(%5, axes=(0, 1))
      return %6
    }""")
        )
        .launches[0]
        .kernel
    )
    assert kernel.index64


def test_named_sizes_and_back():
    plan = schedule(parse(two_layers(ADDED, ZEROS)))
    for launch in (alone for together in plan.launches for alone in together.alone()):
        sizes = dict(zip(launch.kernel.sizes, launch.sizes, strict=True))
        assert parametrize(substitute(launch.kernel, sizes)) == (launch.kernel, launch.sizes)


def test_one_kernel_serves_many_shapes():
    text = softmax(50, 123, 1)
    other = text.replace("123", "77")
    a, b = schedule(parse(text)), schedule(parse(other))
    assert a.launches[0].kernel == b.launches[0].kernel


@pytest.mark.parametrize("block", range(8))
@pytest.mark.sweep(2)
def test_random_programs(block):
    for seed in range(block * 60, block * 60 + 60):
        graph = RandomProgram(seed).graph()
        try:
            for fuse in (True, False):
                plan = schedule(graph, fuse=fuse)
                check(graph, plan, seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}:\n{graph}") from error


def test_a_convolution_is_one_launch_that_reads_the_image_where_it_lies():
    """Windows and borders are indices; bias and relu are the epilogue, in the image's layout."""
    plan = schedule(parse(convolution()))
    (launch,) = plan.launches
    assert [b.kind for b in plan.buffers] == ["input"] * 3 + ["output"]
    (stage,) = launch.kernel.stages
    assert stage.dot is not None and [s.op.name for s in stage.body if isinstance(s, Compute)] == [
        "add",
        "maximum",
    ]


def test_reshapes_of_permuted_values_do_not_pile_up():
    """Each splits the index of an element in two: after some, the value is stored."""
    lines = ["f(%0: f32[5,7]) {"]
    for k in range(0, 32, 2):
        lines.append(f"  %{k + 1}: f32[7,5] = permute(%{k}, axes=(1, 0))")
        lines.append(f"  %{k + 2}: f32[5,7] = reshape(%{k + 1}, shape=(5, 7))")
    plan = schedule(parse("\n".join([*lines, "  return %32", "}"])))
    assert 3 <= len(plan.launches) <= 4
    assert max(len(str(launch.kernel)) for launch in plan.launches) < 5000
