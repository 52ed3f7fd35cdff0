"""The C printer: literals, indices, loops, micro-kernels, and the prelude's vector functions."""

from __future__ import annotations

import ctypes
import math
from textwrap import dedent

import numpy as np
import pytest

from support.c_text import printed
from tracejit.codegen.c import emit_kernel
from tracejit.codegen.c_body import Body, is_independent
from tracejit.codegen.c_prelude import C_PRELUDE, prelude_for
from tracejit.codegen.c_text import literal
from tracejit.codegen.language import comment, strip
from tracejit.errors import BackendUnavailable
from tracejit.ir.types import b1, f32, f64, i64
from tracejit.runtime.c_compiler import find_compiler, load_library
from tracejit.schedule.cpu.access import vector_axis
from tracejit.schedule.cpu.lower import lower_kernel
from tracejit.schedule.cpu.plan import CpuKernel
from tracejit.schedule.cpu.registers import accumulators, blocking
from tracejit.schedule.kernel import Axis, FloorDiv, Index, Kernel, Load, Mod, Store, Var
from tracejit.schedule.kernel_text import parse_kernel

CHAIN = """
step(%0: f32[5000], %1: f32[5000]) {
  %2: f32[5000] = maximum(%0, 0.0)      # step.py:1
  %3: f32[5000] = sub(%2, %1)
  %4: f32[5000] = mul(%3, %3)
  %5: f32[] = reduce_sum(%4, axes=(0,)) # step.py:2
  return %5, %3
}"""


@pytest.fixture(scope="module", autouse=True)
def compiler() -> tuple[str, ...]:
    try:
        return find_compiler()
    except BackendUnavailable as error:
        pytest.skip(str(error))


def test_literals():
    assert literal(0.1, f32) == "0.1f"
    assert literal(2, f32) == "2.0f"
    assert literal(1e30, f32) == "1e+30f"
    assert literal(1e300, f32) == "INFINITY"
    assert literal(0.1, f64) == "0.1"
    assert literal(-math.inf, f32) == "-INFINITY"
    assert literal(-0.0, f32) == "-0.0f"
    assert literal(1 << 40, i64) == "INT64_C(1099511627776)"
    assert literal(-(1 << 63), i64) == "INT64_MIN"
    assert literal(1, b1) == "true"


def test_text_helpers():
    assert strip("(a + b)") == "a + b"
    assert strip("(a) + (b)") == "(a) + (b)"
    assert comment("c:\\x */ y\n") == "c:/x * / y "


def test_a_unit_reads_like_the_plan():
    text = printed(CHAIN)
    assert "const float v2 = (0.0f > v0) | (0.0f != 0.0f) ? 0.0f : v0;" in text
    assert "// step.py:1" in text and "// step.py:2" in text
    assert "#pragma omp simd reduction(+:t5)" in text
    assert ".b0 = buffers[0]" in text
    assert text == printed(CHAIN)


def index(*terms, offset: int = 0) -> Index:
    return Index(tuple(terms), offset)


def test_indices_divide_in_32_bits_where_nothing_is_negative():
    body = Body(Kernel((), (), (), (), ()), {"i0": 100})
    quotient = FloorDiv(index(("i0", 1)), 7)
    assert body.index(index((quotient, 3))) == "(int64_t)((uint32_t)(i0) / 7) * 3"
    below = Mod(index(("i0", 1), offset=-3), 7)
    assert body.index(index((below, 1))) == "tj_mod_int(i0 - 3, 7)"


def test_conditions_that_ranges_imply_are_left_out():
    from tracejit.schedule.kernel import Bound

    body = Body(Kernel((), (), (), (), ()), {"i0": 100})
    assert body.condition((Bound(index(("i0", 1)), 100),)) == "true"
    assert body.condition((Bound(index(("i0", 1), offset=-1), 90),)) == (
        "(i0 - 1 >= 0) & (i0 - 1 < 90)"
    )


def test_loops_are_vectorised_only_where_independent():
    load = Load(Var(1, f32), "b0", index(("i0", 1)))
    same = Store("b0", index(("i0", 1)), Var(1, f32))
    shifted = Store("b0", index(("i0", 1), offset=1), Var(1, f32))
    fixed = Store("b1", index(), Var(1, f32))
    assert is_independent((load, same), "i0")
    assert not is_independent((load, shifted), "i0")
    assert not is_independent((load, fixed), "i0")


def test_the_contiguous_axis_is_the_vector_loop():
    rows, columns = Axis("i0", 8), Axis("i1", 9)
    across = Load(Var(1, f32), "b0", index(("i0", 1), ("i1", 8)))
    along = Load(Var(1, f32), "b0", index(("i0", 9), ("i1", 1)))
    assert vector_axis((rows, columns), (across,)) is rows
    assert vector_axis((rows, columns), (along,)) is columns


@pytest.mark.parametrize("shape", [(64, 100), (1, 1), (1000, 10), (7, 300), (512, 512)])
@pytest.mark.parametrize("vectors", [16, 32, 64])
def test_micro_kernels_fit_the_registers(shape, vectors):
    most = accumulators(vectors)
    rows, wide, tile_rows, tile_columns = blocking(*shape, vectors // 4, most, 4)
    assert rows * wide <= most
    assert tile_rows % rows == 0
    assert tile_columns % (vectors // 4) == 0


def test_prelude_holds_what_is_used():
    assert "tj_expf" not in prelude_for("x + y")
    text = prelude_for("tj_tanhf(x) tj_store_f16(x)")
    assert "tj_exp_core" in text and "tj_bits_f64" in text and "tj_sinf" not in text


# --- vector functions --------------------------------------------------------------------------

FUNCTIONS = ("exp", "log", "expm1", "log1p", "erf", "tanh", "sin", "cos")
COUNT = 1_000_000
SPECIALS = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 0.5, -0.5, 2, -2, 3, -3, 1e-45, -1e-45, 1e-38]
    + [3.4e38, -3.4e38, 88.7, 88.8, -87.3, -103.9, -104.0, 1e-4, 9.9e-5, 0.99999994, -0.99999994],
    np.float32,
)


@pytest.fixture(scope="module")
def vectors() -> ctypes.CDLL:
    """Loops over the prelude's functions."""
    head = "(const float *restrict x, const float *restrict y, float *restrict o, int64_t n)"
    loop = "{\n#pragma omp simd\nfor (int64_t i = 0; i < n; i++) o[i] = "
    texts = [f"void v_{f}{head} {loop}tj_{f}f(x[i]);\n}}\n" for f in FUNCTIONS]
    texts.append(f"void v_erfc{head} {loop}tj_erfcf(x[i]);\n}}\n")
    for f in ("pow", "atan2"):
        texts.append(f"void v_{f}{head} {loop}tj_{f}f(x[i], y[i]);\n}}\n")
    return load_library(C_PRELUDE + "".join(texts))


def run_vector(library: ctypes.CDLL, name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, y, out)]
    getattr(library, f"v_{name}")(*pointers, ctypes.c_int64(x.size))
    return out


def worst_ulps(ours: np.ndarray, right: np.ndarray) -> float:
    """The largest error in units of the float32 result; NaN and infinities must be the same."""
    with np.errstate(all="ignore"):
        nearest = right.astype(np.float32)
        same = (ours == nearest) | (np.isnan(ours) & np.isnan(nearest))
        unit = np.spacing(np.abs(np.where(np.isfinite(nearest), nearest, 1)))
        errors = np.abs(ours.astype(np.float64) - right) / unit
    errors = np.where(same, 0, np.where(np.isnan(errors), np.inf, errors))
    return float(errors.max())


def patterns(seed: int) -> np.ndarray:
    """Random bit patterns, numbers around 1, and special ones."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, COUNT, np.uint32).view(np.float32)
    near = (rng.normal(size=COUNT // 4) * 10.0 ** rng.integers(-3, 3, COUNT // 4)).astype("f4")
    return np.concatenate([bits, near, SPECIALS])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vector_functions_are_within_one_ulp(name, vectors):
    x = patterns(1)
    with np.errstate(all="ignore"):
        if name == "erf":
            x = np.concatenate([x[COUNT:], x[: COUNT // 10]])
            right = np.vectorize(math.erf, otypes=[np.float64])(x.astype(np.float64))
        else:
            right = getattr(np, name)(x.astype(np.longdouble)).astype(np.float64)
    assert worst_ulps(run_vector(vectors, name, x, x), right) <= 1


def test_vector_erfc_is_within_its_fit(vectors):
    """A relative error of 1.2e-7 is two units at most, and the rounding half a unit."""
    x = np.concatenate([patterns(1)[COUNT:], np.linspace(-6, 12, COUNT // 10, dtype=np.float32)])
    right = np.vectorize(math.erfc, otypes=[np.float64])(x.astype(np.float64))
    assert worst_ulps(run_vector(vectors, "erfc", x, x), right) <= 2.5


@pytest.mark.parametrize(("name", "of_numpy"), [("pow", np.power), ("atan2", np.arctan2)])
def test_vector_functions_of_two_are_within_one_ulp(name, of_numpy, vectors):
    x, y = patterns(2), patterns(3)[::-1].copy()
    pairs = [a.ravel() for a in np.meshgrid(SPECIALS, SPECIALS)]
    x = np.concatenate([x, np.abs(x), pairs[0]])
    y = np.concatenate([y, y, pairs[1]])
    with np.errstate(all="ignore"):
        right = of_numpy(x.astype(np.longdouble), y.astype(np.longdouble)).astype(np.float64)
    assert worst_ulps(run_vector(vectors, name, x, y), right) <= 1


IMAGES = """
    kernel(b0: f32 r, b1: f32 r, b2: f32 w) over () {
      stage (i1: 84, i0: 9) {
        dot v3: f32 over (k: 27) {
          v2: f32 = load b1[(i1 // 42) * 192 + (k // 9) * 64 + i1 % 6 + k % 3 + ((i1 // 6) % 7) * 8 + ((k // 3) % 3) * 8]
          |
          v1: f32 = load b0[i0 * 27 + k]
        } v2, v1
        store b2[STORED] <- v3
      }
    }"""  # noqa: E501


@pytest.mark.parametrize(
    ("stored", "turned"),
    [
        ("i0 * 42 + (i1 // 42) * 378 + i1 % 42", True),  # channel by channel
        ("i0 + i1 * 9", False),  # channels last
    ],
)
def test_tiles_are_turned_where_images_lie_channel_by_channel(stored, turned):
    """The rest of the body then goes along memory, without a division for each element."""
    kernel = lower_kernel(CpuKernel(parse_kernel(dedent(IMAGES.replace("STORED", stored)))), 32)
    text = emit_kernel(kernel).text
    assert ("tj_turn_tile(turned" in text) is turned
    (store,) = [line for line in text.splitlines() if "= v3;" in line]
    assert "%" not in store and "/ " not in store.partition("//")[0]
