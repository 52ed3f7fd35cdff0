"""The functions that are written in C vectors: each against its formula, for each width."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from support.c_text import printed
from tracejit.codegen.c import CFunction, unit
from tracejit.codegen.c_vectors import FUNCTIONS
from tracejit.runtime.c_compiler import load_library

WIDTHS = (16, 32, 64)
B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)  # Bᵀ
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
A = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)  # Aᵀ
PLANE = 1000


def called(name: str, width: int, *arguments: object) -> None:
    """Call a function with arrays, integers and flags."""
    kinds = {np.ndarray: ("float *", ctypes.c_void_p), bool: ("bool ", ctypes.c_bool)}
    kinds[int] = "int64_t ", ctypes.c_int64
    given = [kinds[type(x)] for x in arguments]
    params = ", ".join(f"{kind}a{i}" for i, (kind, _) in enumerate(given))
    passed = ", ".join(f"a{i}" for i in range(len(given)))
    text = f"void run({params}) {{ {name}({passed}); }}\n"
    function = load_library(unit([CFunction("run", text)], width).text)["run"]
    function.argtypes = [kind for _, kind in given]
    function.restype = None
    function(*(x.ctypes.data if isinstance(x, np.ndarray) else x for x in arguments))


def numbers(*shape: int) -> np.ndarray:
    """Of few bits: sums and halves of them are exact."""
    count = int(np.prod(shape))
    return ((np.arange(count) * 37 % 101 - 50) / 8).astype(np.float32).reshape(shape)


def planes() -> np.ndarray:
    return np.full((16, PLANE), np.nan, np.float32)


def test_every_function_is_tested():
    tested = {"tj_turn_tile", "tj_turn_strip", "tj_pieces", "tj_kernels", "tj_pixels"}
    tested |= {"tj_results", "tj_taps"}
    assert set(FUNCTIONS) == tested | {"tj_turn"}  # which the first two are made of


@pytest.mark.parametrize("width", WIDTHS)
def test_squares_are_turned(width):
    lanes = width // 4
    rows, columns = 2 * lanes, 3 * lanes
    tile, turned = numbers(rows, columns), np.zeros((columns, rows), np.float32)
    called("tj_turn_tile", width, turned, rows, tile, columns, rows, columns)
    assert (turned == tile.T).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("missing", [0, 1, 5])
def test_a_strip_is_turned_and_filled_up(width, missing):
    lanes = width // 4
    deep, wide = 2 * lanes + 3, 2 * lanes
    there = max(wide - missing, 1)
    lines, strip = numbers(there, deep + 2), np.full((deep, wide), np.nan, np.float32)
    called("tj_turn_strip", width, strip, wide, lines, deep + 2, deep, there)
    assert (strip[:, :there] == lines[:, :deep].T).all() and (strip[:, there:] == 0).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("count", "odd"), [(0, True), (1, False), (7, True), (16, False), (31, True)]
)
def test_pieces(width, count, odd):
    lines, to = numbers(4, 2 * count + 2 + odd), planes()
    called("tj_pieces", width, to, PLANE, lines, lines.shape[1], lines[3:], count, odd)
    filled = np.pad(lines, ((0, 0), (0, 2)))
    if odd:
        filled[:, 2 * count + 3 :] = 0
    for x in range(count + odd):
        piece = filled[:, 2 * x : 2 * x + 4]
        assert (to[:, x].reshape(4, 4) == B @ piece @ B.T).all()
    assert np.isnan(to[:, count + odd :]).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("flipped", [False, True])
def test_kernels_and_taps(width, flipped):
    strip, channels = 2 * width // 4, 3
    down, along, first = (-3, -1, 8) if flipped else (3, 1, 0)
    kernels, to = numbers(channels, 9, strip), planes()
    steps = down * strip, along * strip
    called("tj_kernels", width, to, PLANE, kernels[0, first:], strip, channels, *steps)
    products, taps = numbers(16, PLANE), np.full((channels, 9, strip), np.nan, np.float32)
    called("tj_taps", width, taps[0, first:], strip, products, PLANE, strip, channels, *steps)
    for i in range(channels):
        for j in range(strip):
            of = kernels[i, :, j][::-1] if flipped else kernels[i, :, j]
            made = to[:, i * strip + j].reshape(4, 4)
            assert (made == G @ of.reshape(3, 3) @ G.T).all()
            found = taps[i, :, j][::-1] if flipped else taps[i, :, j]
            wanted = G.T @ products[:, i * strip + j].reshape(4, 4) @ G
            assert (found.reshape(3, 3) == wanted).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("below", "beside"), [(True, True), (True, False), (False, True)])
def test_results_and_pixels(width, below, beside):
    strip = 2 * width // 4
    count = 3 if beside else 1
    across = 2 * count
    gradients, to = numbers(2, across, strip), planes()
    line, flags = across * strip, (below, beside)
    called("tj_results", width, to, PLANE, gradients, line, strip, count, *flags)
    products, pixels = numbers(16, PLANE), np.full((2, across, strip), np.nan, np.float32)
    called("tj_pixels", width, pixels, strip, line, products, PLANE, strip, count, *flags)
    for i in range(count):
        for j in range(strip):
            piece = gradients[:, 2 * i : 2 * i + 2, j] * np.outer([1, below], [1, beside])
            made = to[:, i * strip + j].reshape(4, 4)
            assert (made == A.T @ piece.astype(np.float32) @ A).all()
            wanted = A @ products[:, i * strip + j].reshape(4, 4) @ A.T
            found = pixels[:, 2 * i : 2 * i + 2, j]
            there = np.outer([True, below], [True, beside])
            assert (found[there] == wanted[there]).all() and np.isnan(found[~there]).all()


def test_a_unit_has_equal_functions_once():
    """Two products of other sizes along k and of the result, and with other epilogues."""
    text = printed("""step(%0: f32[40,512], %1: f32[512,192], %2: f32[512,384]) {
  %3: f32[40,192] = matmul(%0, %1)
  %4: f32[40,192] = exp(%3)
  %5: f32[40,384] = matmul(%0, %2)
  return %4, %5
}""")
    functions = [line for line in text.splitlines() if line.startswith("TJ_FUSED void")]
    assert functions and len(functions) == len(set(functions))
    names = [line.split("(")[0] for line in functions]
    assert len(names) == len(set(names))
    calls = [line for line in text.splitlines() if " tj_micro_" in line and line not in functions]
    assert len(calls) > len(functions)
