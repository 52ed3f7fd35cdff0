"""The cases in NumPy, gradients by hand: name → maker of (step, state) from the case's arrays.

The arrays are `cases.arrays_of`; the maker may keep and change them. `step` returns the loss or
None, `state` what the case compares. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Arrays = dict[str, np.ndarray]
Made = tuple[Callable[[], object], Callable[[], list[np.ndarray]]]


def two_layer(a: Arrays) -> Made:
    x, y, w1, w2 = a["x"], a["y"], a["w1"], a["w2"]
    lr = np.float32(1e-6)

    def step() -> np.float32:
        h = x @ w1
        r = np.maximum(h, 0)
        d = r @ w2 - y
        loss = np.square(d).sum()
        d *= 2
        g2 = r.T @ d
        gh = d @ w2.T
        gh[h < 0] = 0
        w1[...] -= lr * (x.T @ gh)
        w2[...] -= lr * g2
        return loss

    return step, lambda: [w1, w2]


def chain(a: Arrays) -> Made:
    x, y = a["x"], a["y"]
    grads: list[np.ndarray] = []

    def step() -> np.float32:
        d = np.maximum(x, 0)
        d -= y
        loss = np.square(d).sum()
        d *= 2
        d *= x >= 0
        grads[:] = [d]
        return loss

    return step, lambda: grads


def numbered(a: Arrays, prefix: str) -> list[np.ndarray]:
    """The arrays p0, p1, … in order."""
    count = sum(name.startswith(prefix) and name[len(prefix) :].isdigit() for name in a)
    return [a[f"{prefix}{i}"] for i in range(count)]


def adam_update(parameters: Sequence[np.ndarray], lr: float) -> Callable[[Sequence], None]:
    """torch.optim.Adam with its default betas and eps, in place."""
    m, v = ([np.zeros_like(p) for p in parameters] for _ in range(2))
    scratch = [np.empty_like(p) for p in parameters]
    calls = 0

    def update(grads: Sequence[np.ndarray]) -> None:
        nonlocal calls
        calls += 1
        step_size = lr / (1 - 0.9**calls)
        root = (1 - 0.999**calls) ** 0.5
        for p, g, mi, vi, s in zip(parameters, grads, m, v, scratch, strict=True):
            np.subtract(g, mi, out=s)
            s *= 0.1
            mi += s
            vi *= 0.999
            np.multiply(g, g, out=s)
            s *= 0.001
            vi += s
            np.sqrt(vi, out=s)
            s /= root
            s += 1e-8
            np.divide(mi, s, out=s)
            s *= step_size
            p -= s

    return update


def nn_adam(a: Arrays) -> Made:
    x, y, parameters = a["x"], a["y"], numbered(a, "p")
    w1, b1, w2, b2 = parameters
    update = adam_update(parameters, 1e-4)

    def step() -> np.float32:
        r = np.maximum(x @ w1.T + b1, 0)
        d = r @ w2.T + b2 - y
        loss = np.square(d).sum()
        d *= 2
        gh = (d @ w2) * (r > 0)
        update([gh.T @ x, gh.sum(0), d.T @ r, d.sum(0)])
        return loss

    return step, lambda: parameters


def mlp(a: Arrays) -> Made:
    x, labels, parameters = a["x"], a["labels"], numbered(a, "p")
    velocities = [np.zeros_like(p) for p in parameters]
    rows = np.arange(len(labels))

    def step() -> np.float32:
        inputs = [x]
        for w, b in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
            inputs.append(np.maximum(inputs[-1] @ w.T + b, 0))
        z = inputs[-1] @ parameters[-2].T + parameters[-1]
        z -= z.max(1, keepdims=True)
        e = np.exp(z)
        total = e.sum(1, keepdims=True)
        loss = (np.log(total[:, 0]) - z[rows, labels]).mean()
        g = e / total
        g[rows, labels] -= 1
        g /= np.float32(len(labels))
        grads: list[np.ndarray] = []
        for i in reversed(range(len(inputs))):
            grads[:0] = [g.T @ inputs[i], g.sum(0)]
            if i:
                g = (g @ parameters[2 * i]) * (inputs[i] > 0)
        for p, v, gp in zip(parameters, velocities, grads, strict=True):
            v *= 0.9
            v += gp
            p -= np.float32(0.1) * v
        return loss

    return step, lambda: parameters


def adam(a: Arrays) -> Made:
    parameters, grads = numbered(a, "p"), numbered(a, "g")
    update = adam_update(parameters, 1e-3)
    return lambda: update(grads), lambda: parameters


STEPS: dict[str, Callable[[Arrays], Made]] = {
    "two_layer_manual": two_layer,
    "two_layer_autograd": two_layer,
    "nn_adam": nn_adam,
    "chain_4m": chain,
    "mlp": mlp,
    "adam_5m": adam,
}
