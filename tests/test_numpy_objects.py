"""Steps over numpy arrays that lie in objects, in variables of helpers, and on a device."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

import tracejit
from support.fake import FAKE
from tracejit.errors import BackendUnavailable, TracejitWarning, UnsupportedOperation
from tracejit.numpy_front.places import Reached, leads_nowhere
from tracejit.numpy_front.step import NumpyStep
from tracejit.testing import fake_device

SCALE = np.full(4, 2.0)
TABLES = {"bias": np.zeros(4), "many": [np.ones(4), np.ones(4)]}


def compiled(step: Callable, **options: object) -> NumpyStep:
    return tracejit.compile(step, **{"backend": "numpy", "on_unsupported": "raise", **options})


def scaled(p: np.ndarray) -> np.ndarray:
    return p * SCALE + TABLES["bias"] + TABLES["many"][0]


class Layer:
    def __init__(self, rng: np.random.Generator, wide: int, out: int):
        self.params = {"w": rng.normal(size=(wide, out)) * 0.3, "b": np.zeros(out)}
        self.grads = {"w": None, "b": None}
        self.x: np.ndarray | None = None

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.x = x
        return x @ self.params["w"] + self.params["b"]

    def backward(self, g: np.ndarray) -> np.ndarray:
        self.grads["w"], self.grads["b"] = self.x.T @ g, g.sum(0)
        return g @ self.params["w"].T


class Net:
    """A network as people write it in numpy: layers, what a backward needs, momentum, a counter."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.layers = [Layer(rng, 10, 16), Layer(rng, 16, 4)]
        self.velocity = [{k: np.zeros_like(p) for k, p in x.params.items()} for x in self.layers]
        self.calls, self.loss = 0, None

    def train(self, x: np.ndarray, y: np.ndarray, lr: float) -> np.float64:
        h = self.layers[0].forward(x)
        self.active = h > 0
        p = scaled(self.layers[1].forward(np.where(self.active, h, 0)))
        d = p - y
        self.loss = np.mean(d**2)
        g = self.layers[1].backward(2 * d / d.size * SCALE)
        self.layers[0].backward(g * self.active)
        for layer, velocity in zip(self.layers, self.velocity, strict=True):
            for k in layer.params:
                velocity[k] = 0.9 * velocity[k] + layer.grads[k]
                layer.params[k] -= lr * velocity[k]
        self.calls += 1
        return self.loss


def held(net: Net) -> list:
    """All that a network holds."""
    found = [net.calls, net.loss, net.active]
    for layer, velocity in zip(net.layers, net.velocity, strict=True):
        found += [layer.x, *layer.params.values(), *layer.grads.values(), *velocity.values()]
    return found


def alike(ours: object, theirs: object) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, np.ndarray):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"backend": "auto"}])
def test_a_network_of_objects(options):
    """Its arrays are the user's own after each call, changed in place where numpy changes them."""
    ours, theirs = Net(), Net()
    fast = compiled(lambda net, x, y, lr: net.train(x, y, lr), **options)
    own = ours.layers[0].params["w"]
    rng = np.random.default_rng(1)
    for i in range(20):
        x, y = rng.normal(size=(8, 10)), rng.normal(size=(8, 4))
        alike(fast(ours, x, y, 0.1 / (1 + i)), theirs.train(x, y, 0.1 / (1 + i)))
        for a, b in zip(held(ours), held(theirs), strict=True):
            alike(a, b)
        if i == 10:  # what somebody does between the calls
            for net in (ours, theirs):
                net.layers[1].params["b"] = np.full(4, 0.5)
                net.layers[0].params["w"][0] = 1.0
    assert ours.layers[0].params["w"] is own
    assert fast.stats.replays >= 8 and not fast.stats.eager


def test_a_method_that_is_compiled_in_its_class():
    class Compiled(Net):
        train = tracejit.compile(Net.train, backend="numpy", on_unsupported="raise")

    ours, theirs = Compiled(), Net()
    x, y = np.ones((3, 10)), np.ones((3, 4))
    for _ in range(8):
        alike(ours.train(x, y, 0.1), theirs.train(x, y, 0.1))
    assert type(Compiled.train) is NumpyStep and Compiled.train.stats.replays


def test_variables_of_helpers_are_read_anew():
    fast, x = compiled(lambda x: scaled(x).sum()), np.ones(4)
    before = TABLES["bias"]
    try:
        for i in range(10):
            SCALE[0] = i
            TABLES["bias"] = np.full(4, float(i))
            alike(fast(x), scaled(x).sum())
    finally:
        SCALE[0], TABLES["bias"] = 2.0, before
    assert fast.stats.replays >= 5
    assert type(SCALE) is type(TABLES["bias"]) is np.ndarray


def test_variables_of_closures_of_helpers():
    def made(w: np.ndarray) -> Callable:
        def inner(x: np.ndarray) -> np.ndarray:
            return x @ w

        return inner

    w = np.eye(3)
    helper = made(w)
    fast, x = compiled(lambda x: helper(x) + 1), np.arange(6.0).reshape(2, 3)
    for _ in range(6):
        alike(fast(x), helper(x) + 1)
        w *= 1.5
    assert fast.stats.replays >= 2 and helper.__closure__[0].cell_contents is w


def test_one_array_in_several_places():
    """A write by one name is there by the other."""
    holder = Net()
    shared = holder.layers[0].params["b"]

    def step(b, net):
        b += 1
        return net.layers[0].params["b"].sum()

    fast = compiled(step)
    assert [float(fast(shared, holder)) for _ in range(5)] == [16.0, 32.0, 48.0, 64.0, 80.0]
    assert fast.stats.replays and holder.layers[0].params["b"] is shared


def test_a_call_that_fails_leaves_arrays_where_they_were():
    net, x = Net(), np.ones((3, 10))
    fast = compiled(lambda net, x, y: net.train(x, y, 0.1))
    before = [*map(id, net.layers[0].params.values())]
    for y in (np.ones((3, 4)), np.ones((3, 5)), np.ones((2, 4)), np.ones((3, 4))):
        if y.shape == (3, 4):
            fast(net, x, y)
            continue
        with pytest.raises(ValueError, match="broadcast"):
            fast(net, x, y)
        assert [*map(id, net.layers[0].params.values())] == before
        assert all(type(p) is np.ndarray for p in net.layers[0].params.values())
        assert not isinstance(net.loss, torch.Tensor) and type(SCALE) is np.ndarray


def test_what_runs_as_the_plain_function_sees_arrays():
    net, theirs, x, y = Net(), Net(), np.ones((3, 10)), np.ones((3, 4))

    def step(net, x, y):
        net.order = np.argsort(net.layers[0].params["w"][0])  # it has no rule
        return net.train(x, y, 0.1)

    fast = compiled(step, on_unsupported="eager")
    with pytest.warns(TracejitWarning, match="np.argsort"):
        for _ in range(5):
            alike(fast(net, x, y), step(theirs, x, y))
    for a, b in zip(held(net), held(theirs), strict=True):
        alike(a, b)


class Losses:
    def __init__(self) -> None:
        self.w, self.seen = np.ones(3), []

    def step(self, x: np.ndarray) -> np.float64:
        loss = (self.w * x).sum()
        self.seen.append(loss)
        return loss


def test_scalars_that_are_appended():
    ours, theirs, x = Losses(), Losses(), np.arange(3.0)
    fast = compiled(lambda o, x: o.step(x), on_unsupported="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        for i in range(6):
            alike(fast(ours, x + i), theirs.step(x + i))
    assert [*map(type, ours.seen)] == [*map(type, theirs.seen)] and ours.seen == theirs.seen


def test_objects_of_torch_stay_what_they_are():
    """A step that reaches numpy arrays and tensors through objects is one of torch's."""

    class Mixed:
        def __init__(self):
            self.mean, self.model = np.ones(2), torch.nn.Linear(2, 1)

    mixed = Mixed()

    def step():
        return mixed.model(torch.ones(2) if mixed.mean is None else torch.zeros(2))

    fast = tracejit.compile(step, backend="numpy")
    fast()
    assert type(fast) is not NumpyStep


def test_grad_through_objects_and_helpers():
    net = Net()

    def loss(w: np.ndarray, x: np.ndarray) -> np.float64:
        return np.mean(scaled(np.tanh(x @ w) @ net.layers[1].params["w"]) ** 2)

    gradient = tracejit.grad(loss, backend="numpy")
    x, w = np.random.default_rng(0).normal(size=(5, 10)), net.layers[0].params["w"]
    direction = np.random.default_rng(1).normal(size=w.shape)
    for _ in range(4):
        found = (gradient(w, x) * direction).sum()
        e = 1e-6
        numeric = (loss(w + e * direction, x) - loss(w - e * direction, x)) / (2 * e)
        assert found == pytest.approx(numeric, rel=1e-6)
        net.layers[1].params["w"] *= 1.1
    assert type(net.layers[1].params["w"]) is np.ndarray


# ---- on a device


def test_a_gradient_on_a_device():
    pytest.importorskip("triton")
    w, x = np.arange(3.0), np.ones((4, 3))
    with fake_device(compiled=False):
        gradient = tracejit.grad(lambda w, x: ((x @ w) ** 2).sum(), backend=FAKE, device="cuda")
        for _ in range(4):
            found = gradient(w, x)
            assert type(found) is np.ndarray
            np.testing.assert_allclose(found, 2 * x.T @ (x @ w))
            w = w - 0.1 * found
    assert gradient.stats.replays
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="torch finds no GPU"):
            tracejit.grad(lambda w: (w * w).sum(), device="cuda")(w)


def test_a_step_on_a_device(monkeypatch):
    """On the fake GPU: each call copies arrays there, and back what it has written to."""
    pytest.importorskip("triton")
    copies: list[torch.Tensor] = []
    empty_strided = torch.empty_strided

    def noted(*args, **kwargs):
        copies.append(empty_strided(*args, **kwargs))
        return copies[-1]

    monkeypatch.setattr("tracejit.numpy_front.step.torch.empty_strided", noted)
    ours, theirs = Net(), Net()
    rng = np.random.default_rng(1)
    with fake_device(compiled=False):
        fast = compiled(lambda net, x, y, lr: net.train(x, y, lr), backend=FAKE, device="cuda")
        own = ours.layers[0].params["w"]
        for i in range(6):
            x, y = rng.normal(size=(8, 10)), rng.normal(size=(8, 4))
            x.flags.writeable = i > 8
            np.testing.assert_allclose(fast(ours, x, y, 0.1), theirs.train(x, y, 0.1), rtol=1e-9)
            for a, b in zip(held(ours), held(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
        assert ours.layers[0].params["w"] is own and fast.stats.replays
        assert copies and not any(c.untyped_storage().data_ptr() == own.ctypes.data for c in copies)


def test_what_has_no_place_on_a_device():
    """Arrays that share memory would not share it there: such a call runs as the plain function."""
    pytest.importorskip("triton")
    x = np.arange(6.0)

    def step(a, b):
        a += 1
        return b.sum()

    with fake_device(compiled=False):
        fast = compiled(step, backend=FAKE, device="cuda")
        with pytest.raises(UnsupportedOperation, match="may share memory with another"):
            fast(x[:4], x[2:])
        with pytest.raises(UnsupportedOperation, match="whose elements share memory"):
            fast(np.ones(3), np.broadcast_to(np.ones(1), (3,)))
        eager = compiled(step, backend=FAKE, device="cuda", on_unsupported="eager")
        with pytest.warns(TracejitWarning, match="may share memory"):
            assert eager(x[:4], x[2:]) == 16.0
        before = x.sum()
        assert fast(x, x) == before + 6  # one array is one tensor


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BackendUnavailable, match="torch finds no GPU"):
        tracejit.compile(lambda x: x * 2, device="cuda")(np.ones(3))
    with pytest.raises(ValueError, match="tensors are where they are"):
        tracejit.compile(lambda x: x * 2, device="cuda")(torch.ones(3))


def test_what_plainly_leads_nowhere_is_not_looked_at():
    """The quick answer is yes only where the whole search finds nothing."""

    def of_arrays(x, y):
        return np.maximum(x, 0.0) @ y

    def by_helper(x, y):
        return scaled(x) @ y

    def by_table(x, y):
        return x * TABLES["bias"] @ y

    x = np.ones((4, 4))
    layer = Layer(np.random.default_rng(0), 4, 4)
    quick = [(of_arrays, (x, x)), (of_arrays, (x, 1e-6)), (of_arrays, (np.float32(1), None))]
    for step, roots in quick:
        assert leads_nowhere(roots, step)
        reached = Reached(roots, step)
        assert not reached.holders and not reached.variables
    others = [(by_helper, (x, x)), (by_table, (x, x)), (of_arrays, (layer, x))]
    others += [(of_arrays, ([x], x)), (of_arrays, (torch.ones(2), x))]
    for step, roots in others:
        assert not leads_nowhere(roots, step)


def test_a_global_that_becomes_a_table_is_found():
    space = {"np": np, "table": 2.0}
    exec("def step(x):\n    return x * (table['w'] if isinstance(table, dict) else table)", space)
    step = tracejit.compile(space["step"], backend="numpy")
    x = np.arange(3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        assert np.array_equal(step(x), x * 2)
        for weight in (np.full(3, 3.0), np.full(3, 4.0)):
            space["table"] = {"w": weight}
            assert np.array_equal(step(x), x * weight)
            assert space["table"]["w"] is weight


def test_other_threads_see_arrays_after_a_call():
    """Tensors stand in objects for the time of a call only."""
    net, x, y = Net(), np.ones((3, 10)), np.ones((3, 4))
    fast = compiled(lambda net, x, y: net.train(x, y, 0.1))
    for _ in range(4):
        thread = threading.Thread(target=fast, args=(net, x, y))
        thread.start()
        thread.join()
        assert all(type(p) is np.ndarray for layer in net.layers for p in layer.params.values())


def test_items_of_variables_are_put_anew():
    """Moments in dicts and lists, as Adam is written; losses are appended to a list."""

    def made():
        rng = np.random.default_rng(0)
        params = {"w": rng.normal(size=(5, 3)), "b": np.zeros(3)}
        m = {k: np.zeros_like(p) for k, p in params.items()}
        v = [np.zeros_like(p) for p in params.values()]
        state, losses, last = {"t": 0, "loss": None}, [], [None]

        def step(x, y):
            e = x @ params["w"] + params["b"] - y
            loss = np.mean(e**2)
            grads = {"w": 2 * x.T @ e / e.size, "b": 2 * e.sum(0) / e.size}
            state["t"] += 1
            for i, k in enumerate(params):
                m[k] = 0.9 * m[k] + 0.1 * grads[k]
                v[i] = 0.999 * v[i] + 0.001 * grads[k] ** 2
                hat = m[k] / (1 - 0.9 ** state["t"])
                params[k] -= 0.01 * hat / (np.sqrt(v[i] / (1 - 0.999 ** state["t"])) + 1e-8)
            losses.append(loss)
            state["loss"], last[0] = loss, e
            return loss

        return step, (params, m, v, state, losses, last)

    def same(ours, theirs):
        if isinstance(ours, (dict, list, tuple)):
            assert type(ours) is type(theirs) and len(ours) == len(theirs)
            items = (ours.values(), theirs.values()) if isinstance(ours, dict) else (ours, theirs)
            for a, b in zip(*items, strict=True):
                same(a, b)
        elif ours is not None:
            alike(ours, theirs)

    (step, ours), (plain, theirs) = made(), made()
    fast = compiled(step)
    own = ours[0]["w"]
    rng = np.random.default_rng(1)
    for i in range(230):  # past the length up to which lists are looked at whole
        x, y = rng.normal(size=(4, 5)), rng.normal(size=(4, 3))
        same(fast(x, y), plain(x, y))
        if i < 20 or i > 190:
            same(ours, theirs)
        if i == 9:  # what somebody does between the calls
            for params, m, _, _, losses, _ in (ours, theirs):
                m["b"] = np.ones(3)
                params["w"][0] = 0.5
                losses.clear()
    same(ours, theirs)
    assert ours[0]["w"] is own and fast.stats.replays > 200 and not fast.stats.eager


def test_a_list_that_is_looked_at_is_not_stale():
    losses: list = []

    def step(x):
        loss = (x * x).sum()
        if losses:
            loss = loss + losses[-1] * 0.5
        losses.append(loss)
        return loss

    fast, mine = compiled(step, on_unsupported="eager"), losses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [fast(np.full(2, float(k))) for k in range(12)]
    assert [type(x) for x in mine] == [np.float64] * 12
    mine.clear()
    np.testing.assert_allclose(found, [step(np.full(2, float(k))) for k in range(12)])


def test_arrays_in_namespaces():
    from types import SimpleNamespace

    def made():
        held = SimpleNamespace(w=np.ones((3, 2)), cache=None)

        def step(x):
            held.cache = x @ held.w
            held.w -= 0.1 * x.T @ held.cache
            return held.cache.sum()

        return step, held

    (step, ours), (plain, theirs) = made(), made()
    fast = compiled(step)
    for k in range(8):
        alike(fast(np.full((2, 3), 0.1 * k)), plain(np.full((2, 3), 0.1 * k)))
        alike(ours.w, theirs.w)
        alike(ours.cache, theirs.cache)
    assert fast.stats.replays
