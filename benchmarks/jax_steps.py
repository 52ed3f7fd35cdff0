"""The cases in JAX: name → maker of (step, state) from the case's arrays, as in numpy_steps.

Each step is one jitted function of its state, which it is given to reuse (donated). No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.numpy_steps import Arrays, Made, numbered


def trained(update: Callable, state: object, kept: Callable[[object], list]) -> Made:
    """A step that hands its state on: update(state) -> (loss or None, state)."""
    update = jax.jit(update, donate_argnums=0)
    state = jax.tree.map(jnp.array, state)

    def step() -> object:
        nonlocal state
        loss, state = update(state)
        return state if loss is None else loss

    return step, lambda: [np.asarray(p) for p in kept(state)]


def two_layer(a: Arrays) -> Made:
    x, y = jnp.array(a["x"]), jnp.array(a["y"])

    def loss_of(weights: list) -> jax.Array:
        w1, w2 = weights
        return jnp.square(jnp.maximum(x @ w1, 0) @ w2 - y).sum()

    def update(weights: list) -> tuple:
        loss, grads = jax.value_and_grad(loss_of)(weights)
        return loss, [w - 1e-6 * g for w, g in zip(weights, grads, strict=True)]

    return trained(update, [a["w1"], a["w2"]], lambda weights: weights)


def differentiated(function: Callable, inputs: list[np.ndarray]) -> Made:
    """A step that computes function(*inputs) -> (result, gradients) from unchanged inputs."""
    function, inputs = jax.jit(function), [jnp.array(x) for x in inputs]
    last: list = []

    def step() -> object:
        last[:] = function(*inputs)
        return last[0]

    return step, lambda: [np.asarray(g) for g in last[1]]


def chain(a: Arrays) -> Made:
    def function(x: jax.Array, y: jax.Array) -> tuple:
        loss, g = jax.value_and_grad(lambda x: jnp.square(jnp.maximum(x, 0) - y).sum())(x)
        return loss, [g]

    return differentiated(function, [a["x"], a["y"]])


def softmax(a: Arrays) -> Made:
    def function(x: jax.Array, g: jax.Array) -> tuple:
        y, pull = jax.vjp(partial(jax.nn.softmax, axis=-1), x)
        return y, pull(g)

    return differentiated(function, [a["x"], a["g"]])


def norm_of(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * w + b


def layer_norm(a: Arrays) -> Made:
    def function(x: jax.Array, w: jax.Array, b: jax.Array, g: jax.Array) -> tuple:
        y, pull = jax.vjp(norm_of, x, w, b)
        return y, pull(g)

    return differentiated(function, [a["x"], a["p0"], a["p1"], a["g"]])


def adam_state(parameters: list[np.ndarray]) -> tuple:
    zeros = [np.zeros_like(p) for p in parameters]
    return parameters, zeros, [z.copy() for z in zeros], np.float32(0)


def adam_update(lr: float, state: tuple, grads: list) -> tuple:
    """torch.optim.Adam with its default betas and eps."""
    parameters, m, v, calls = state
    calls = calls + 1
    m = [0.9 * mi + 0.1 * g for mi, g in zip(m, grads, strict=True)]
    v = [0.999 * vi + 0.001 * g * g for vi, g in zip(v, grads, strict=True)]
    step_size, root = lr / (1 - 0.9**calls), jnp.sqrt(1 - 0.999**calls)
    moved = [
        p - step_size * mi / (jnp.sqrt(vi) / root + 1e-8)
        for p, mi, vi in zip(parameters, m, v, strict=True)
    ]
    return moved, m, v, calls


def forward(parameters: list, x: jax.Array) -> jax.Array:
    """Linear layers with relu between."""
    for w, b in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        x = jnp.maximum(x @ w.T + b, 0)
    return x @ parameters[-2].T + parameters[-1]


def nn_adam(a: Arrays) -> Made:
    x, y = jnp.array(a["x"]), jnp.array(a["y"])

    def update(state: tuple) -> tuple:
        loss, grads = jax.value_and_grad(lambda ps: jnp.square(forward(ps, x) - y).sum())(state[0])
        return loss, adam_update(1e-4, state, grads)

    return trained(update, adam_state(numbered(a, "p")), lambda state: state[0])


def mlp(a: Arrays) -> Made:
    x, labels = jnp.array(a["x"]), jnp.array(a["labels"])

    def loss_of(parameters: list) -> jax.Array:
        logs = jax.nn.log_softmax(forward(parameters, x))
        return -jnp.take_along_axis(logs, labels[:, None], axis=1).mean()

    def update(state: tuple) -> tuple:
        parameters, velocities = state
        loss, grads = jax.value_and_grad(loss_of)(parameters)
        velocities = [0.9 * v + g for v, g in zip(velocities, grads, strict=True)]
        return loss, (
            [p - 0.1 * v for p, v in zip(parameters, velocities, strict=True)],
            velocities,
        )

    parameters = numbered(a, "p")
    state = (parameters, [np.zeros_like(p) for p in parameters])
    return trained(update, state, lambda state: state[0])


def adam(a: Arrays) -> Made:
    grads = [jnp.array(g) for g in numbered(a, "g")]
    state = adam_state(numbered(a, "p"))
    return trained(
        lambda state: (None, adam_update(1e-3, state, grads)), state, lambda state: state[0]
    )


def block_of(p: list, x: jax.Array) -> jax.Array:
    """examples.transformer_block.Block of 4 heads, its parameters in the module's order."""
    batch, length, width = x.shape
    heads = 4

    def split(h: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return (h @ w.T + b).reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)

    h = norm_of(x, p[0], p[1])
    q, k, v = (split(h, p[i], p[i + 1]) for i in (4, 6, 8))
    scores = q @ k.transpose(0, 1, 3, 2) * (width // heads) ** -0.5
    mixed = jax.nn.softmax(scores, axis=-1) @ v
    x = x + mixed.transpose(0, 2, 1, 3).reshape(batch, length, width) @ p[10].T + p[11]
    h = jax.nn.gelu(norm_of(x, p[2], p[3]) @ p[12].T + p[13], approximate=False)
    return x + h @ p[14].T + p[15]


def transformer_block(a: Arrays) -> Made:
    x, target = jnp.array(a["x"]), jnp.array(a["target"])

    def update(parameters: list) -> tuple:
        def loss_of(ps: list) -> jax.Array:
            return jnp.square(block_of(ps, x) - target).mean()

        loss, grads = jax.value_and_grad(loss_of)(parameters)
        return loss, [w - 0.01 * g for w, g in zip(parameters, grads, strict=True)]

    return trained(update, numbered(a, "p"), lambda parameters: parameters)


STEPS: dict[str, Callable[[Arrays], Made]] = {
    "two_layer_manual": two_layer,
    "two_layer_autograd": two_layer,
    "nn_adam": nn_adam,
    "chain_4m": chain,
    "mlp": mlp,
    "adam_5m": adam,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "transformer_block": transformer_block,
}
