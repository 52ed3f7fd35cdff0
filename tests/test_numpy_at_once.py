"""Replays over numpy arrays that make no tensors: what they take, and what they leave to others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

import tracejit
from benchmarks.numpy_front import SHAPES, two_layer
from tracejit.numpy_front import at_once
from tracejit.numpy_front.at_once import NOT_SO, AtOnce

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::tracejit.errors.TracejitWarning"),
    pytest.mark.skipif(at_once._reads() is None, reason="there is no C compiler"),
]
FACTOR = 2.0


def counted(monkeypatch) -> list[bool]:
    """Which calls were made at once."""
    made: list[bool] = []
    call = AtOnce.__call__

    def counting(self: AtOnce, args: tuple) -> object:
        returned = call(self, args)
        made.append(returned is not at_once.NOT_SO)
        return returned

    monkeypatch.setattr(AtOnce, "__call__", counting)
    return made


@pytest.fixture
def made(monkeypatch) -> Iterator[list[bool]]:
    return counted(monkeypatch)


def ready(step: Callable, *args: object) -> Callable:
    """A compiled step that makes such calls at once."""
    compiled = tracejit.compile(step, backend="numpy", on_unsupported="eager")
    for _ in range(6):
        compiled(*[x.copy() if isinstance(x, np.ndarray) else x for x in args])
    assert any(compiled._at_once.values())
    return compiled


def scaled(x: np.ndarray, w: np.ndarray, rate: float = 0.5) -> np.ndarray:
    w -= rate * np.tanh(x) * FACTOR
    return (x * w).sum(axis=0)


def operands(dtype: str = "float64") -> list[np.ndarray]:
    r = np.random.default_rng(3)
    return [r.standard_normal((4, 6)).astype(dtype) for _ in range(2)]


def agree(step: Callable, compiled: Callable, *args: object) -> None:
    """The same result and the same writes. The first argument is given as it is."""
    mine = [args[0], *(x.copy() if isinstance(x, np.ndarray) else x for x in args[1:])]
    found, wanted = compiled(*mine), step(*args)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    for a, b in zip(mine[1:], args[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_two_layer_program(made: list[bool]):
    r = np.random.default_rng(0)
    arrays = [r.standard_normal([-(-n // 10) for n in shape]) for shape in SHAPES]
    theirs = [x.copy() for x in arrays]
    step = tracejit.compile(two_layer, backend="numpy", on_unsupported="raise")
    for k in range(50):
        loss, wanted = step(*arrays, 1e-6 * k), two_layer(*theirs, 1e-6 * k)
        np.testing.assert_allclose(loss, wanted, rtol=1e-12)
        assert type(loss) is np.float64
    for a, b in zip(arrays, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert sum(made) > 40 and step.stats.replays >= sum(made)


def test_arrays_may_be_others_in_each_call(made: list[bool]):
    compiled = ready(scaled, *operands(), 0.25)
    made.clear()
    for k in range(4):
        x, w = operands()
        agree(scaled, compiled, x + k, w * k, 0.1 * k)
    assert made == [True] * 4


def misaligned(x: np.ndarray) -> np.ndarray:
    memory = np.zeros(x.nbytes + 16, np.uint8)
    start = (8 - memory.ctypes.data) % 16
    found = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    found[...] = x
    return found


OTHERS = {
    "shape": lambda x: np.tile(x, (2, 1)),
    "axes": lambda x: x[0],
    "strides": np.asfortranarray,
    "gaps": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "backwards": lambda x: x[::-1],
    "dtype": lambda x: x.astype(np.float32),
    "integers": lambda x: (9 * x).astype(np.int64),
    "order of bytes": lambda x: x.astype(">f8"),
    "misaligned": misaligned,
    "subclass": lambda x: x.view(np.recarray),
    "a list": np.ndarray.tolist,
    "a number": lambda x: 0.75,
    "numpy's number": lambda x: np.float32(0.75),
}


@pytest.mark.parametrize("name", OTHERS)
def test_arrays_of_another_kind(name: str, made: list[bool]):
    compiled = ready(scaled, *operands(), 0.25)
    made.clear()
    x, w = operands()
    x = OTHERS[name](x)
    agree(scaled, compiled, x, np.tile(w, (2, 1)) if name == "shape" else w, 0.1)
    assert made == [False]
    agree(scaled, compiled, *operands(), 0.1)


def test_a_dtype_of_its_own_is_held(made: list[bool]):
    """Dtypes are told by their identity, and some are objects that come and go."""
    x, w = operands()
    x = x.astype(np.dtype("f8", metadata={"unit": "m"}))
    compiled = ready(scaled, x, w, 0.25)
    at_once = compiled._at_once[compiled._replays[0]]
    assert x.dtype in [d for d in at_once._dtypes if d.metadata]
    others = [np.dtype(">f8", metadata={"n": k}) for k in range(50)]
    made.clear()
    for dtype in others:
        assert at_once((x.astype(dtype), w, 0.25)) is NOT_SO
    agree(scaled, compiled, *operands(), 0.1)


def test_numbers(made: list[bool]):
    compiled = ready(scaled, *operands(), 0.25)
    made.clear()
    for rate in (0.75, 3, True, np.float64(0.75), np.float32(0.75), np.array(0.75)):
        agree(scaled, compiled, *operands(), rate)
    assert made[0] and not any(made[1:4])


def test_memory(made: list[bool]):
    compiled = ready(scaled, *operands(), 0.25)
    made.clear()
    x, w = operands()
    for rows in (slice(0, 4), slice(2, 6), slice(4, 8)):
        ours, theirs = np.concatenate([x, w]), np.concatenate([x, w])
        found = compiled(ours[:4], ours[rows], 0.1)
        np.testing.assert_allclose(found, scaled(theirs[:4], theirs[rows], 0.1))
        np.testing.assert_allclose(ours, theirs)
    assert made[:2] == [False, False]  # the others may be plans of their own by then
    w.flags.writeable = False
    before = w.copy()
    with pytest.raises(ValueError, match="read-only"):
        compiled(x, w, 0.1)
    np.testing.assert_array_equal(w, before)


def test_an_array_that_was_given_another_shape_in_place(made: list[bool]):
    def total(x: np.ndarray) -> np.ndarray:
        return np.cos(x).sum(axis=0)

    x = operands()[0]
    compiled = ready(total, x)
    for shape in ((6, 4), (24,), (2, 2, 6), (4, 6)):
        x.shape = shape
        np.testing.assert_allclose(compiled(x), total(x))
    x.resize((400, 600), refcheck=False)
    np.testing.assert_allclose(compiled(x), total(x))
    assert any(made)


def test_variables_and_the_function_itself(made: list[bool], monkeypatch):
    def plain(x: np.ndarray, w: np.ndarray, rate: float = 0.5) -> np.ndarray:
        return scaled.__code__ and x * FACTOR * rate + w

    def closed(x: np.ndarray) -> np.ndarray:
        return np.sin(x) * held

    held = 3.0
    step, other = ready(scaled, *operands()), ready(closed, operands()[0])
    for factor in (5.0, 2, True, operands()[1], np.float64(3), 2.0):
        monkeypatch.setitem(scaled.__globals__, "FACTOR", factor)
        agree(scaled, step, *operands())
    for held in (4.0, operands()[1], np.float32(2), 3.0):  # noqa: B007
        x = operands()[0]
        np.testing.assert_allclose(other(x), closed(x))
    for defaults in ((1,), (0.25,), (np.float64(2),), (0.5,)):
        monkeypatch.setattr(scaled, "__defaults__", defaults)
        agree(scaled, step, *operands())
    monkeypatch.setattr(scaled, "__code__", plain.__code__)
    agree(scaled, step, *operands())


def test_errors_that_numpy_is_to_raise(made: list[bool]):
    def divided(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return x / w

    x, w = operands()
    compiled = tracejit.compile(divided, backend="numpy", on_unsupported="eager")
    for _ in range(6):
        compiled(x, w)
    made.clear()
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        np.testing.assert_equal(compiled(x, 0 * w), None)
    assert made == [False]
    np.testing.assert_allclose(compiled(x, w), x / w)
    assert made == [False, True]


def test_what_needs_tensors_makes_them(made: list[bool]):
    def returned(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        w += x
        return w

    def read(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return x * 2 if w.sum() > 0 else x * 3

    for step in (returned, read):
        compiled = tracejit.compile(step, backend="numpy", on_unsupported="raise")
        for sign in (1, 1, 1, 1, -1, 1):
            x, w = operands()
            w = sign * abs(w)
            mine = w.copy()
            found, wanted = compiled(x, mine), step(x, w)
            np.testing.assert_allclose(found, wanted)
            assert (found is mine) is (wanted is w)
        assert compiled.stats.replays
    assert not any(made)


def test_results_are_the_callers(made: list[bool]):
    compiled = ready(scaled, *operands(), 0.25)
    found = []
    for k in range(4):
        x, w = operands()
        found.append((compiled(x, w + k, 0.5), scaled(x, w + k, 0.5)))
    assert made[-4:] == [True] * 4
    for ours, theirs in found:
        np.testing.assert_allclose(ours, theirs)
