"""Samples of numpy's functions on arrays: programs of x and y, and operands for them.

A sample of an element-wise function is run on all operands that numpy takes for it, the others on
arrays of floats. Names are those of the tables of `tracejit.numpy_front`.
"""

from __future__ import annotations

import numpy as np

_R = np.random.default_rng(7)


def _floats(*shape: int, dtype: type = np.float64) -> np.ndarray:
    return _R.standard_normal(shape).astype(dtype)


OPERANDS = {
    "float64": (_floats(5, 3), _floats(5, 3)),
    "float32": (_floats(5, 123, dtype=np.float32), _floats(123, dtype=np.float32)),
    "float32 and float64": (_floats(4, 1, dtype=np.float32), _floats(1, 5)),
    "int64 and float32": (_R.integers(-5, 6, (3, 4)), _floats(3, 4, dtype=np.float32)),
    "int32": (_R.integers(1, 6, (5,), dtype=np.int32), _R.integers(1, 6, (2, 5), dtype=np.int32)),
    "int8 and uint8": (np.arange(-3, 4, dtype=np.int8), np.arange(1, 8, dtype=np.uint8)),
    "bool": (np.array([True, False, True]), np.array([[True, True, False]])),
    "bool and float64": (np.array([True, False, True]), _floats(2, 3)),
    "no axes": (np.array(1.5), np.array([0.5, -2.0])),
    "empty": (_floats(0, 3), _floats(3)),
    "views": (_floats(6, 8)[::2, 1:7:2].T, _floats(3, 3).T),
    "numbers": (np.array([np.nan, np.inf, -np.inf, -0.0, 2.5]), np.array([1.0, np.nan, 0, 3, -2])),
}

# on one array, or two, of floats: what, and a program
PROGRAMS = {
    "operators": lambda x, y: (x + y, x - y, x * y, x / y, -x, abs(x), +x, x // y, x % y),
    "numbers": lambda x, y: (x + 1, 2 * x, 1 - x, x / 3, 1.5 / x, x**2, x**3, 2**x, 1 + x * 0.5),
    "relations": lambda x, y: (x < y, x <= 0, x > y, x >= 1.5, x == y, x != 0, ~(x < y)),
    "masks": lambda x, y: ((x < 0) & (y < 0), (x < 0) | (y < 0), (x < 0) ^ (y < 0)),
    "np.reshape": lambda x, y: (x.reshape(3, 5), np.reshape(x, -1), x.reshape((1, -1, 1))),
    "np.ravel": lambda x, y: (x.ravel(), np.ravel(x.T) + 1, x.T.flatten()),
    "np.copy": lambda x, y: (x.copy(), np.copy(x.T), x[::2].copy()),
    "np.transpose": lambda x, y: (x.T, x.transpose(1, 0), np.transpose(x), x.mT),
    "np.permute_dims": lambda x, y: np.permute_dims(x, (1, 0)),
    "np.swapaxes": lambda x, y: (x.swapaxes(0, 1), np.swapaxes(x, -1, 0)),
    "np.moveaxis": lambda x, y: np.moveaxis(x, 0, -1),
    "np.expand_dims": lambda x, y: (np.expand_dims(x, 1), np.expand_dims(x, (0, -1)), x[:, None]),
    "np.squeeze": lambda x, y: (np.squeeze(x[:, :1]), x[None].squeeze(0)),
    "np.broadcast_to": lambda x, y: np.broadcast_to(x, (2, 5, 3)) + 1,
    "np.diagonal": lambda x, y: (np.diagonal(x) + 1, x.diagonal(1).sum()),
    "np.diag": lambda x, y: (np.diag(x) + 1, np.diag(x[0]), np.diag(x[0], 1)),
    "np.atleast_1d": lambda x, y: (np.atleast_1d(x), np.atleast_1d(x.sum())),
    "np.atleast_2d": lambda x, y: (np.atleast_2d(x[0]), np.atleast_2d(x)),
    "np.flip": lambda x, y: (
        np.flip(x) + 0,
        np.flip(x, 1) * 2,
        -x[::-1],
        x[:, ::-2].copy(),
        1 - x[3:0:-1, 1],
    ),
    "np.flipud": lambda x, y: np.flipud(x) * 1,
    "np.fliplr": lambda x, y: np.fliplr(x) * 1,
    "np.pad": lambda x, y: (
        np.pad(x, 1),
        np.pad(x, ((0, 2), (1, 0)), constant_values=-1.5),
        *(np.pad(y, (2, 1), mode=mode) for mode in ("edge", "reflect", "symmetric", "wrap")),
        np.pad(x > 0, (1, 2)),
    ),
    "np.lib.stride_tricks.sliding_window_view": lambda x, y: (
        np.lib.stride_tricks.sliding_window_view(x, 2, axis=0).sum(-1),
        np.lib.stride_tricks.sliding_window_view(x, (2, 2)).max(axis=(2, 3)),
        np.tensordot(np.lib.stride_tricks.sliding_window_view(x, (2,), axis=(1,)), [1.0, -1.0], 1),
    ),
    "np.roll": lambda x, y: (np.roll(x, 2), np.roll(x, -1, 0)),
    "np.concatenate": lambda x, y: (
        np.concatenate([x, y]),
        np.concatenate((x, y), 1),
        np.concatenate([x, y], axis=None),
    ),
    "np.stack": lambda x, y: (np.stack([x, y]), np.stack([x, y], axis=-1)),
    "np.vstack": lambda x, y: (np.vstack([x, y]), np.vstack([x[0], y[1]])),
    "np.hstack": lambda x, y: (np.hstack([x, y]), np.hstack([x[0], y[1]])),
    "np.column_stack": lambda x, y: np.column_stack([x[:, 0], y]),
    "np.split": lambda x, y: (np.split(x, [2, 4]), np.split(x, 3, axis=1)),
    "np.array_split": lambda x, y: np.array_split(x, [1]),
    "np.tile": lambda x, y: (np.tile(x, 2), np.tile(x, (2, 1, 3))),
    "np.repeat": lambda x, y: (np.repeat(x, 2), x.repeat(3, axis=1)),
    "np.where": lambda x, y: (np.where(x < 0, x, y), np.where(x < y, 0, x), np.where(x, 1.0, 2)),
    "np.clip": lambda x, y: (np.clip(x, 0, None), x.clip(-0.5, 0.5), np.clip(x, y - 1, y + 1)),
    "np.take": lambda x, y: (np.take(x, [0, 2, 2]), x.take([1, 0], axis=1)),
    "np.sort": lambda x, y: (np.sort(x), np.sort(x, 0), np.sort(x, axis=None)),
    "np.argsort": lambda x, y: np.argsort(x, kind="stable"),
    "np.tril": lambda x, y: (np.tril(x), np.tril(x, -1)),
    "np.triu": lambda x, y: (np.triu(x), np.triu(x, 1)),
    "np.dot": lambda x, y: (
        x.dot(y.T),
        np.dot(x[0], y[1]),
        x.dot(y[0]),
        np.dot(x, 2.0),
        np.dot(x, np.stack([y.T, y.T])),
    ),
    "np.matmul": lambda x, y: (x @ y.T, np.matmul(x[0], y.T), x[0] @ y[1], np.stack([x, y]) @ y.T),
    "np.vdot": lambda x, y: np.vdot(x, y),
    "np.inner": lambda x, y: (np.inner(x, y), np.inner(x[0], y[0])),
    "np.outer": lambda x, y: (np.outer(x[0], y), np.multiply.outer(x[0], y[1])),
    "np.tensordot": lambda x, y: (np.tensordot(x, y, ([1], [1])), np.tensordot(x, y)),
    "np.einsum": lambda x, y: (np.einsum("ij,kj->ik", x, y), np.einsum("ij,ij->", x, y)),
    "np.sum": lambda x, y: (
        x.sum(),
        np.sum(x, 0),
        x.sum(axis=1, keepdims=True),
        x.sum((0, 1)),
        (x < 0).sum(),
        np.sum(x, dtype=np.float32),
        np.add.reduce(x),
    ),
    "np.prod": lambda x, y: (np.prod(x), x.prod(0), (x > 0).prod()),
    "np.mean": lambda x, y: (
        x.mean(),
        np.mean(x, axis=0),
        (x < 0).mean(),
        x.mean(-1, keepdims=True),
    ),
    "np.var": lambda x, y: (x.var(), np.var(x, axis=1), np.var(x, 0, ddof=1)),
    "np.std": lambda x, y: (x.std(), np.std(x, axis=(0, 1), keepdims=True)),
    "np.max": lambda x, y: (x.max(), np.max(x, axis=1), x.max(0, keepdims=True)),
    "np.amax": lambda x, y: np.amax(x, axis=0),
    "np.min": lambda x, y: (x.min(), np.min(x, axis=(0, 1)), np.minimum.reduce(x, axis=1)),
    "np.amin": lambda x, y: np.amin(x),
    "np.ptp": lambda x, y: np.ptp(x, axis=0),
    "np.any": lambda x, y: ((x > 2).any(), np.any(x < 0, axis=0), np.any(x, axis=(0, 1))),
    "np.all": lambda x, y: ((x > -9).all(), np.all(x, axis=1, keepdims=True)),
    "np.count_nonzero": lambda x, y: (np.count_nonzero(x < 0), np.count_nonzero(x > 0, axis=1)),
    "np.argmax": lambda x, y: (x.argmax(), np.argmax(x, 1), np.argmax(x < 0), x.argmax(0)),
    "np.argmin": lambda x, y: (x.argmin(), np.argmin(x, axis=0), np.argmin(x, keepdims=True)),
    "np.cumsum": lambda x, y: (x.cumsum(), np.cumsum(x, 0), (x < 0).cumsum(1)),
    "np.cumprod": lambda x, y: (x.cumprod(), np.cumprod(x, axis=1)),
    "np.diff": lambda x, y: (np.diff(x), np.diff(x, 2, axis=0)),
    "np.trace": lambda x, y: (np.trace(x), x.trace(1)),
    "np.round": lambda x, y: (np.round(x), x.round()),
    "np.around": lambda x, y: np.around(x),
    "np.isclose": lambda x, y: np.isclose(x, x + 1e-9 * y),
    "np.allclose": lambda x, y: (np.allclose(x, y), np.allclose(x, x)),
    "np.array_equal": lambda x, y: (np.array_equal(x, y), np.array_equal(x, x)),
    "np.linalg.norm": lambda x, y: (
        np.linalg.norm(x),
        np.linalg.norm(x, axis=1),
        np.linalg.norm(x[0], 1),
        np.linalg.norm(x, np.inf, axis=0),
    ),
    "np.zeros_like": lambda x, y: (np.zeros_like(x), np.zeros_like(x < 0)),
    "np.ones_like": lambda x, y: np.ones_like(x, dtype=np.int32),
    "np.empty_like": lambda x, y: np.empty_like(x) * 0,
    "np.full_like": lambda x, y: (np.full_like(x, 2), np.full_like(x, x.sum(), dtype=np.float32)),
    "np.zeros": lambda x, y: (np.zeros(3) + x, np.zeros((2, 0)), np.zeros(x.shape, np.int32)),
    "np.empty": lambda x, y: np.empty(x.shape) * 0 + x,
    "np.ones": lambda x, y: (np.ones(3) + x, np.ones((5, 1), dtype=np.float32)),
    "np.full": lambda x, y: (np.full(3, 0.5) + x, np.full((2, 2), 7)),
    "np.eye": lambda x, y: (np.eye(3), x @ np.eye(3, dtype=np.float32), np.eye(2, 4)),
    "np.identity": lambda x, y: np.identity(3) + x[:3],
    "np.array": lambda x, y: (
        np.array([1, 2, 3]) * x,
        np.array([x[0, 0], y[0, 0], 1]),
        np.array(x),
    ),
    "np.asarray": lambda x, y: (np.asarray(x) + 1, np.asarray([1.5, 2, 3], dtype=np.float32) * x),
    "np.asanyarray": lambda x, y: np.asanyarray(y) * 2,
    "np.ascontiguousarray": lambda x, y: np.ascontiguousarray(x.T) + 1,
    "constants": lambda x, y: (
        x + np.arange(3),
        x * np.float32(0.1),
        x + np.linspace(0, 1, 3),
        x * np.pi,
        x + np.int64(2),
        x + [1, 2, 3],
    ),
    "astype": lambda x, y: (
        x.astype(np.float32),
        x.astype(int),
        (x * 3).astype("int8"),
        (x < 0).astype(float),
        x.astype(bool),
    ),
    "attributes": lambda x, y: (x.shape, x.ndim, x.size, len(x), x.T.shape, x.itemsize),
    "rows": lambda x, y: [row.sum() * i for i, row in enumerate(x)],
    "items": lambda x, y: (
        x[0, 1],
        x[-1],
        x[1:3],
        x[..., 0],
        x[:, [0, 2]],
        x[[0, 1], [1, 2]],
        x[np.array([3, 0])],
        x[2, ::2],
        x[:, None, 0],
        x[x[:, 0].argmax()],
    ),
    "selected": lambda x, y: x[x < 0],
    "selected rows": lambda x, y: x[x[:, 0] > 0],
    "types": lambda x, y: (
        isinstance(x, np.ndarray),
        isinstance(x.sum(), float),
        x.sum() + 1,
        isinstance(x.sum(), np.ndarray),
        x.dtype == np.float64,
    ),
    "results": lambda x, y: {"a": x + 1, "b": [x.sum(), 3, "text", None], "c": (x * 2,)},
    "scalars": lambda x, y: (x.sum() / y.sum(), x[0, 0] * 2, np.exp(x.mean()), x.max() < 3),
    "views": lambda x, y: (x.view() + 1, x.all(), x.any(), x.cumsum(0), x.var(), x.argmin(0)),
    "item": lambda x, y: (x.sum().item(), float(x[0, 0]), int(x.size)),
    "tolist": lambda x, y: x.tolist(),
}


def _assigned(x: np.ndarray, y: np.ndarray) -> tuple:
    a = x.copy()
    a[a < 0] = 0
    a[0] = y[0]
    a[:, 1] += 2
    a[[1, 2], [0, 2]] = -1
    a[::-1, 0] = a[:, 1] + 1
    a[3, 2] = y.sum()
    b = np.zeros((4, 3))
    b[1:3] = x[:2]
    b[..., 2] = 7
    b[x[:4, 0] > 0] *= 2
    return a, b


def _in_place(x: np.ndarray, y: np.ndarray) -> tuple:
    a = x.copy()
    rows = a[1:3]
    rows *= 2  # a view
    a += y
    a -= 1
    a /= 2
    np.add(a, y, out=a)
    np.exp(y, out=a)
    s = a.sum()
    t = s
    s += 1  # another scalar
    a.T[0] = 3
    a.reshape(-1)[4] = 9
    rows[1].fill(4)
    b = y.copy()
    b.sort()
    return a, rows, s, t, b


def _added_at(x: np.ndarray, y: np.ndarray) -> tuple:
    """Elements that are there twice count twice."""
    rows, flat, one = np.zeros((4, 3)), np.zeros(5, np.float32), np.ones(3, np.int64)
    np.add.at(rows, np.array([0, 2, 0, -1]), np.arange(12.0).reshape(4, 3))
    np.add.at(rows, [1, 1], x[0, :3])
    np.add.at(rows, (np.array([0, 0, 3]), np.array([1, 1, 2])), 0.5)
    np.add.at(rows, 2, 1.0)
    np.subtract.at(flat, np.array([[0, 1], [1, 4]]), np.array([0.5, 2.0]))
    np.add.at(one, np.array([2, 2, 0]), 3)
    np.subtract.at(one, slice(1), 1)
    return rows, flat, one


PROGRAMS |= {"assignment": _assigned, "in place": _in_place, "added at": _added_at}
