"""Steps over numpy arrays: equal to numpy, replayed, never stale, refused at the user's line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tracejit
from benchmarks.numpy_front import SHAPES, two_layer
from support.numpy_samples import OPERANDS, PROGRAMS
from tracejit.errors import CannotSave, TracejitWarning, UnsupportedOperation
from tracejit.numpy_front.array import METHODS
from tracejit.numpy_front.functions import FUNCTIONS
from tracejit.numpy_front.reductions import INSTEAD
from tracejit.numpy_front.table import END, START, markdown, names
from tracejit.numpy_front.ufuncs import UFUNCS

ROOT = Path(__file__).parents[1]
TOLERANCES = {"float16": 1e-2, "float32": 1e-5, "float64": 1e-12}
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning", "error::tracejit.errors.TracejitWarning"
)


def same(ours: object, theirs: object) -> None:
    """The same types, dtypes, shapes and, up to rounding, numbers."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs, strict=True):
            same(x, y)
    elif isinstance(theirs, dict):
        assert [*ours] == [*theirs]
        same([*ours.values()], [*theirs.values()])
    elif isinstance(theirs, (np.ndarray, np.generic)):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        near = TOLERANCES.get(theirs.dtype.name)
        if near is None:
            np.testing.assert_array_equal(ours, theirs)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=near, atol=near)
    else:
        assert ours == theirs


@pytest.fixture
def unwarned():
    """Of many plans, or of calls that run as the plain function, there may be warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        yield


def compiled(step: Callable, **options: object) -> Callable:
    return tracejit.compile(step, **{"on_unsupported": "raise", "backend": "numpy"} | options)


# ---- functions


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.sweep(0.34)
def test_programs(name: str):
    program, (x, y) = PROGRAMS[name], OPERANDS["float64"]
    step = compiled(program)
    for k in (1, 1, 1, -2):  # the last one may take a replay
        same(step(k * x, y), program(k * x, y))
    assert step.stats.replays or name in ("item", "tolist", "selected", "allclose", "items")


def test_every_function_has_a_program():
    missing = [x for x in names([*FUNCTIONS, *INSTEAD]) if x not in PROGRAMS]
    assert not missing
    code = (ROOT / "tests" / "support" / "numpy_samples.py").read_text()
    assert not [name for name in METHODS if f".{name}(" not in code]


@pytest.mark.sweep(8)
@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("ufunc", UFUNCS, ids=lambda x: x.__name__)
def test_elementwise(ufunc: np.ufunc, operands: str):
    args = OPERANDS[operands][: ufunc.nin]
    try:
        theirs = ufunc(*args)
    except TypeError:
        with pytest.raises(TypeError):
            compiled(lambda *args: ufunc(*args))(*args)
        return
    try:
        ours = compiled(lambda *args: ufunc(*args))(*args)
    except UnsupportedOperation:
        assert theirs.dtype.kind != "f" or args[0].dtype.kind == "b"
        assert ufunc.__name__ in ("floor_divide", "remainder", "fmod", "power", "reciprocal")
        return
    same(ours, theirs)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int32", "uint8", "bool"])
def test_promotion_with_python_numbers(dtype: str):
    def program(x: np.ndarray, lr: float) -> tuple:
        return x + lr, x * 2, x / 2, 1.5 * x, x + True, x + np.float32(1), np.maximum(x, 0), x > 1

    x = np.array([[0, 1, 3], [1, 0, 2]]).astype(dtype)
    step = compiled(program)
    for lr in (0.5, 0.5, 0.5, 0.25):
        same(step(x, lr), program(x, lr))
    assert step.stats.replays


def test_division_of_integers_by_numbers():
    x = np.array([-7, -1, 0, 5, 9], dtype=np.int32)
    same(compiled(lambda x: (x // 2, x % 3, x % -4, x**3))(x), (x // 2, x % 3, x % -4, x**3))


def test_an_integer_out_of_range_is_refused_as_numpy_refuses_it():
    x = np.arange(3, dtype=np.uint8)
    with pytest.raises(UnsupportedOperation, match="out of range"):
        compiled(lambda x: x + 300)(x)


# ---- the classic program


def data(seed: int = 0, dtype: type = np.float64) -> list[np.ndarray]:
    r = np.random.default_rng(seed)
    return [r.standard_normal(shape).astype(dtype) for shape in SHAPES]


@pytest.mark.parametrize("calls", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_the_two_layer_program(calls):
    """The free run of DESIGN.md, §9."""
    theirs, ours = data(), data()
    step = compiled(two_layer, backend="auto")
    first = None
    for t in range(calls):
        rate = 1e-6 if t < 0.6 * calls else 5e-7
        wanted, found = two_layer(*theirs, rate), step(*ours, rate)
        first = first or wanted
        assert type(found) is np.float64
        assert abs(found - wanted) <= 1e-3 * abs(wanted) + 1e-9 * first
    for w, v in zip(ours[2:], theirs[2:], strict=True):
        assert np.linalg.norm(w - v) <= 1e-5 * np.linalg.norm(v)
    assert (step.stats.replays, step.stats.compiles) == (calls - 2, 1)


def test_variables_of_the_step_are_written_in_place():
    x, y, w1, w2 = data(1, np.float32)
    kept = w1
    lr = np.float32(1e-6)

    def step() -> np.float32:
        r = np.maximum(x @ w1, 0)
        d = r @ w2 - y
        loss = np.square(d).sum()
        w2[...] -= lr * (r.T @ d)
        w1[...] -= lr * (x.T @ ((d @ w2.T) * (r > 0)))
        return loss

    fast = compiled(step)
    before = [w1.copy(), w2.copy()]
    losses = [fast() for _ in range(5)]
    after = [w1.copy(), w2.copy()]
    w1[...], w2[...] = before
    same(losses[0], step())
    for loss in losses[1:]:
        assert abs(step() - loss) <= 1e-4 * loss
    np.testing.assert_allclose(w1, after[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(w2, after[1], rtol=1e-4, atol=1e-4)
    assert kept is w1
    assert fast.stats.replays == 3


SHARED = np.ones(3)


def total() -> np.float64:
    return SHARED.sum()


WEIGHT = np.array([1.0, 2.0, 3.0])
RATE = 0.5


def test_globals_are_read_anew():
    global WEIGHT, RATE

    def step(x: np.ndarray) -> np.ndarray:
        return x * WEIGHT * RATE

    fast, x = compiled(step), np.ones(3)
    for k in range(8):
        if k == 4:
            WEIGHT = np.array([5.0, 6.0, 7.0])
        if k == 5:
            RATE = 0.25
        if k == 6:
            WEIGHT = np.arange(6.0).reshape(2, 3)
        if k == 7:
            WEIGHT = 2.0
        same(fast(x), step(x))
    assert fast.stats.replays


# ---- what changes between calls


@pytest.mark.usefixtures("unwarned")
def test_calls_are_never_stale():
    def step(x: np.ndarray, lr: object) -> np.ndarray:
        x *= 2
        return x - lr

    fast, r = compiled(step), np.random.default_rng(0)
    calls = [
        *((np.zeros(3), 0.5), (np.ones(3), 0.5), (np.ones(3), 0.25), (np.ones(3), 0.75)),
        *((np.ones(4), 0.5), (np.ones((2, 3)), 0.5), (np.ones(3, np.float32), 0.5)),
        *((np.ones(3, np.float32), np.float32(2)), (np.ones(3, np.float32), np.float64(2))),
        *((np.ones(3), np.arange(3.0)), (np.ones(3), np.array(2.0)), (np.ones(3), np.float64(2))),
        *((np.ones(3), 2), (np.ones(3), 3), (np.ones(3), True), (np.arange(12.0)[::4], 1.5)),
        *((r.standard_normal((4, 6)).T, 0.5), (np.asfortranarray(np.ones((3, 2))), 0.5)),
    ]
    for x, lr in calls * 2:
        mine, theirs = x.copy("K"), x.copy("K")
        same(fast(mine, lr), step(theirs, lr))
        same(mine, theirs)


class Counts:
    def __init__(self) -> None:
        self.calls, self.rate = 0, 0.5

    def step(self, x: np.ndarray) -> np.float32:
        self.calls += 1
        x *= self.rate
        return x.sum() * self.calls


def test_numbers_that_the_step_keeps():
    """Counters are runtime integers."""
    mine, theirs = Counts(), Counts()
    fast = compiled(mine.step)
    for k in range(10):
        if k == 8:
            mine.rate = theirs.rate = 0.25
        x = np.full(3, 1.0 + k, np.float32)
        y = x.copy()
        same(fast(x), theirs.step(y))
        same(x, y)
        assert mine.calls == theirs.calls
    assert fast.stats.replays


def test_numbers_that_numpy_has_made_are_not_weak():
    def step(x: np.ndarray, lr: float) -> tuple:
        return np.sqrt(lr) * x, x * lr, x + np.exp(lr), np.maximum(x, np.sqrt(lr)), x // lr

    x, fast = np.ones(3, np.float32), compiled(step)
    for lr in (0.5, 0.5, 0.5, 0.75):
        same(fast(x, lr), step(x, lr))
    assert fast.stats.replays == 2


def test_variables_that_others_bind_anew():
    w = np.ones(3)

    def step(x: np.ndarray) -> np.ndarray:
        return x * w

    fast, x = compiled(step), np.arange(3.0)
    for k in range(8):
        if k > 3:
            w = np.full(3, float(k)) if k != 6 else 2.0
        same(fast(x), step(x))
    assert fast.stats.replays


def test_an_array_that_a_helper_reads_is_never_read_too_early():
    """The step's write is in it when the helper reads it."""

    def step(x: np.ndarray) -> np.float64:
        x += 1
        return total()

    fast, shared = compiled(step), SHARED
    shared[...] = 1
    assert [fast(shared) for _ in range(4)] == [6.0, 9.0, 12.0, 15.0]
    assert fast.stats.replays


def test_an_array_that_is_given_another_shape_in_place():
    x = np.arange(6.0)
    fast = compiled(lambda: x * x.shape[0])
    for shape in ((6,), (6,), (6,), (2, 3), (3, 2), (6,)):
        x = x.reshape(shape)
        same(fast(), x * shape[0])


def test_scalars_and_arrays_without_axes_are_told_apart():
    def step(x: np.ndarray, s: object) -> tuple:
        before = s
        s += 1
        return x * s, before

    fast, x = compiled(step), np.ones(2)
    for s in (np.float64(3), np.float64(4), np.float64(5), 0.0, np.array(3.0), np.float64(6)):
        mine, theirs = s if np.isscalar(s) else s.copy(), s
        same(fast(x, mine), step(x, theirs))
        same(mine, theirs)


def test_lists_and_dicts_of_arrays():
    params = {"w": np.ones((3, 2)), "b": [np.zeros(2)], "rate": 0.5}

    def step(x: np.ndarray) -> np.ndarray:
        params["w"] -= params["rate"] * np.outer(x, x[:2])
        params["b"][0] += 1
        return x @ params["w"] + params["b"][0]

    fast, x = compiled(step), np.arange(3.0)
    for k in range(6):
        if k == 4:
            params["w"] = np.full((3, 2), 7.0)
        params["rate"] = 0.5 + (k == 5)
        w, b = params["w"].copy(), params["b"][0].copy()
        found, after = fast(x), (params["w"].copy(), params["b"][0].copy())
        params["w"][...], params["b"][0][...] = w, b
        same(found, step(x))
        same(after, (params["w"], params["b"][0]))
    assert fast.stats.replays


@pytest.mark.usefixtures("unwarned")
def test_arrays_that_share_memory():
    base = np.arange(10.0)

    def step(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x += 1
        return x * y

    fast = compiled(step, on_unsupported="eager")
    for low in (5, 5, 5, 0, 2, 3, 5):
        mine, theirs = base.copy(), base.copy()
        x, y = mine[:5], mine[low : low + 5]
        same(fast(x, y), step(theirs[:5], theirs[low : low + 5]))
        same(mine, theirs)
    assert fast.stats.replays and fast.stats.eager
    mine, theirs = base.copy(), base.copy()
    same(compiled(step)(mine, mine), step(theirs, theirs))
    same(mine, theirs)


def test_what_is_returned():
    w = np.ones((2, 3))
    fast = compiled(lambda x: (w, x, w[0], x.sum(), [x, x]))
    for _ in range(4):
        x = np.arange(3.0)
        mine, given, row, total, (first, second) = fast(x)
        assert mine is w and given is x and first is second is x
        assert np.shares_memory(row, w) and type(total) is np.float64


def test_results_are_the_callers_to_keep():
    fast = compiled(lambda x: x * 2)
    kept = [(k, fast(np.full(1000, float(k)))) for k in range(6)]
    for k, result in kept:
        same(result, np.full(1000, 2.0 * k))


# ---- values


def test_decisions_on_values():
    def step(x: np.ndarray) -> np.ndarray:
        if x.sum() > 0:
            return x * 2
        return -x

    fast = compiled(step)
    for k in (1, 1, 1, -1, -2, 3, -4):
        same(fast(k * np.ones(3)), step(k * np.ones(3)))


def test_numbers_that_python_keeps():
    losses: list[float] = []

    def step(x: np.ndarray) -> None:
        losses.append(float(x.sum()))

    fast = compiled(step)
    for k in range(5):
        fast(np.full(3, float(k)))
    assert losses == [0.0, 3.0, 6.0, 9.0, 12.0]


def test_text_of_values():
    fast = compiled(lambda x: f"{x.sum():.2f} {x} {x[0]}")
    for k in range(4):
        x = np.array([k, 0.1])
        assert fast(x) == f"{x.sum():.2f} {x} {x[0]}"


# ---- what is refused


KEPT: list = []


class Keeper:
    """An object of slots."""

    __slots__ = ("kept",)


KEEPER = Keeper()


class Holder:
    __slots__ = ("small", "w")

    def __init__(self) -> None:
        self.w, self.small = np.ones(5000), np.ones(3)


HOLDER = Holder()


def rebinds(x):
    global WEIGHT
    WEIGHT = WEIGHT + x
    return x


def in_list(x, items):
    items[0] = items[0] + x
    return x


def asks_type(x):
    return x if type(x) is np.ndarray else -x


def read_back(x):
    y = x[::-1]
    x += 1
    return y * 1


REFUSED = {
    "no rule": (lambda x: np.median(x), "np.median is not supported"),
    "no method": (lambda x: x.byteswap(), "ndarray.byteswap"),
    "random": (lambda x: x + np.random.standard_normal(3), "np.random"),
    "kept": (lambda x: setattr(KEEPER, "kept", x * 2), "keeping an array"),
    "list kept": (lambda x: CALLED.append(PAIR), "binding an item or attribute"),
    "list kept in another": (lambda x: CALLED.append((1, [PAIR])), "binding an item or attribute"),
    "view returned": (lambda x: x[::-1], "returning what is a view in numpy"),
    "views returned": (lambda x: (y := x * 1, y[::-1]), "returning what is a view in numpy"),
    "list returned": (lambda x: (x, PAIR), "returning a list"),
    "function kept": (lambda x: CALLED.append(lambda: WEIGHT), "keeping an array, or a function"),
    "object": (lambda x: x * HOLDER.small, "an array in an object"),
    "rebound": (rebinds, "binding the global WEIGHT"),
    "in a list": (lambda x: in_list(x, PAIRS[0]), "binding an item of a list"),
    "type": (asks_type, "type\\(x\\)"),
    "reversed": (read_back, "write to a copy"),
    "argsort": (lambda x: np.argsort(x), "kind='stable'"),
    "complex": (lambda x: x * 1j, "complex"),
    "where": (lambda x: np.add(x, 1, where=True), "np.add with where"),
    "array": (lambda x: np.bincount(np.asarray(x, int)), "np.bincount"),
}
PAIR = [np.ones(3), np.ones(3)]
PAIRS = (PAIR,)  # of which a call has copies
CALLED: list = []


@pytest.fixture
def anew() -> Callable:
    """Puts the variables of this module back as they were."""

    def put_back() -> None:
        globals()["WEIGHT"] = np.ones(3)
        PAIR[:] = [np.ones(3), np.ones(3)]
        KEPT.clear()
        KEEPER.kept = None
        CALLED.clear()
        np.random.seed(3)

    put_back()
    yield put_back
    put_back()


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_line_and_run_as_the_plain_function(name: str, anew: Callable):
    step, text = REFUSED[name]
    x = np.array([3.0, 1.0, 2.0])
    theirs = step(x.copy())
    theirs = (theirs, WEIGHT, [*map(np.copy, KEPT)], [*map(np.copy, PAIR)], len(CALLED))
    anew()
    weight = WEIGHT
    with pytest.raises(UnsupportedOperation, match=text) as caught:
        compiled(step)(x.copy())
    assert re.search(rf"{re.escape(__file__)}:\d+", str(caught.value))
    assert not KEPT and not CALLED
    assert WEIGHT is weight
    anew()
    fast = compiled(step, on_unsupported="eager")
    with pytest.warns(TracejitWarning) as told:
        found = fast(x.copy())
    assert len(told) == 1
    same((found, WEIGHT, KEPT, PAIR, len(CALLED)), theirs)
    assert fast.stats.eager == 1
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        fast(x.copy())


@pytest.mark.parametrize(
    "x",
    [np.ones(3, complex), np.ones(3)[::-1], np.ones(3, ">f8"), np.array(["a"]), np.ones(3, "u4")],
    ids=str,
)
def test_arrays_that_no_tensor_can_stand_for(x: np.ndarray):
    def step(x: np.ndarray) -> object:
        return x[:1]

    with pytest.raises(UnsupportedOperation, match="an array"):
        compiled(step)(x)
    with pytest.warns(TracejitWarning, match="runs as the plain function"):
        same(compiled(step, on_unsupported="eager")(x), step(x))


def test_arrays_for_reading():
    def step(x: np.ndarray, write: bool) -> np.ndarray:
        if write:
            x += 1
        return x * 2

    x = np.broadcast_to(np.arange(3.0), (2, 3))
    fast = compiled(step)
    for _ in range(3):
        same(fast(x, False), x * 2)
    with pytest.raises(ValueError, match="read-only"):
        fast(x, True)
    y = np.ones((2, 3))
    for _ in range(3):
        y.flags.writeable = True
        fast(y, True)
        y.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            fast(y, True)
    same(y, np.full((2, 3), 4.0))


def test_errors_are_those_of_numpy():
    def assigns(x: np.ndarray, y: np.ndarray) -> None:
        x[::2, ::2] = y

    with pytest.raises(ValueError, match="could not broadcast"):
        compiled(assigns)(np.ones((4, 4)), np.ones(4))
    fast = compiled(lambda x, y: x + y, on_unsupported="eager")
    with pytest.raises(ValueError, match="could not be broadcast"):
        fast(np.ones(3), np.ones(4))
    with pytest.raises(np.exceptions.AxisError):
        compiled(lambda x: x.sum(2), on_unsupported="eager")(np.ones(3))
    with np.errstate(divide="raise"), pytest.raises(UnsupportedOperation, match="errstate"):
        compiled(lambda x: 1 / x)(np.zeros(3))


def test_steps_of_torch_stay_what_they_are():
    import torch

    table = np.arange(3.0)
    step = tracejit.compile(lambda x: x * 2 + torch.from_numpy(table), backend="numpy")
    assert type(step(torch.ones(3))) is torch.Tensor
    assert type(step) is tracejit.CompiledStep
    fast = compiled(lambda x: x + 1)
    fast(np.ones(3))
    with pytest.raises(CannotSave):
        fast.save("nowhere")


# ---- gradients


def loss_of(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.float64:
    return np.square(np.tanh(x @ w) - y).mean()


def test_grad_is_that_of_finite_differences():
    r = np.random.default_rng(0)
    w, x, y = (r.standard_normal(shape) for shape in ((4, 2), (7, 4), (7, 2)))
    direction, step = r.standard_normal(w.shape), 1e-6
    dloss = tracejit.grad(loss_of, backend="numpy")
    for _ in range(4):
        g = dloss(w, x, y)
        assert type(g) is np.ndarray and g.shape == w.shape
        ahead, behind = (loss_of(w + s * step * direction, x, y) for s in (1, -1))
        assert abs((ahead - behind) / (2 * step) - (g * direction).sum()) < 1e-8
        w = w + 0.5
    assert dloss.stats.replays == 2
    both = tracejit.grad(loss_of, (0, 2), backend="numpy")(w, x, y)
    assert [g.shape for g in both] == [w.shape, y.shape]


GRADIENT = tracejit.grad(loss_of)


def test_grad_within_a_step():
    r = np.random.default_rng(0)
    w, x, y = (r.standard_normal(shape) for shape in ((4, 2), (7, 4), (7, 2)))

    def train(w: np.ndarray, lr: float) -> np.float64:
        w -= lr * GRADIENT(w, x, y)
        return loss_of(w, x, y)

    fast, theirs = compiled(train), w.copy()
    for k in range(5):
        theirs -= 0.1 * (1 + k) * GRADIENT(theirs, x, y)
        same(fast(w, 0.1 * (1 + k)), loss_of(theirs, x, y))
        same(w, theirs)
    assert fast.stats.replays == 3


def test_grad_refuses():
    with pytest.raises(UnsupportedOperation, match="one float"):
        tracejit.grad(lambda w: w * 2, backend="numpy")(np.ones(3))
    with pytest.raises(UnsupportedOperation, match="array of floats"):
        tracejit.grad(lambda w: w.sum(), backend="numpy")(np.arange(3))
    with pytest.raises(RuntimeError, match="in-place"):
        tracejit.grad(lambda w: np.add(w, 1, out=w).sum(), backend="numpy")(np.ones(3))


# ---- the page


def test_the_table_is_current():
    """docs/numpy.md has what `python -m tracejit.numpy_front.table` prints."""
    text = (ROOT / "docs" / "numpy.md").read_text()
    assert text.partition(START)[2].partition(END)[0] == markdown()
