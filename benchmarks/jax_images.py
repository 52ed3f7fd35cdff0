"""The networks for images in JAX: name → maker of (step, state) from the case's arrays.

Images are NHWC and weights HWIO, which XLA's convolutions on a CPU are faster with. Its own
gradient of the weights takes several times as long as the other two products there, and so do its
depthwise convolutions: both are written as a product for each tap. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.jax_steps import differentiated, trained
from benchmarks.numpy_steps import Arrays, Made, numbered

AXES = ("NHWC", "HWIO", "NHWC")
FEW = 9  # taps that are written out


def taps(x: jax.Array, side: Sequence[int], size: Sequence[int], stride: int, pad: int) -> list:
    """For each tap of a window the elements of x that results of this size multiply by it."""
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    (h, w), (rows, columns) = side, size
    return [
        x[:, i : i + (h - 1) * stride + 1 : stride, j : j + (w - 1) * stride + 1 : stride]
        for i in range(rows)
        for j in range(columns)
    ]


def product(x: jax.Array, w: jax.Array, stride: int, pad: int) -> jax.Array:
    return lax.conv_general_dilated(x, w, (stride, stride), ((pad, pad),) * 2, None, None, AXES)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(x: jax.Array, w: jax.Array, stride: int, pad: int) -> jax.Array:
    return product(x, w, stride, pad)


def _forward(x: jax.Array, w: jax.Array, stride: int, pad: int) -> tuple:
    return product(x, w, stride, pad), (x, w)


def _backward(stride: int, pad: int, kept: tuple, g: jax.Array) -> tuple:
    x, w = kept
    if w.shape[0] * w.shape[1] > FEW:
        return jax.vjp(lambda x, w: product(x, w, stride, pad), x, w)[1](g)
    (gx,) = jax.vjp(lambda x: product(x, w, stride, pad), x)[1](g)
    read = taps(x, g.shape[1:3], w.shape[:2], stride, pad)
    return gx, jnp.stack([jnp.einsum("nhwi,nhwo->io", t, g) for t in read]).reshape(w.shape)


convolution.defvjp(_forward, _backward)


def depthwise(x: jax.Array, w: jax.Array, stride: int, pad: int) -> jax.Array:
    """A convolution of each channel alone."""
    side = [(n + 2 * pad - k) // stride + 1 for n, k in zip(x.shape[1:3], w.shape, strict=False)]
    read = taps(x, side, w.shape[:2], stride, pad)
    return sum(t * a for t, a in zip(read, w.reshape(-1, w.shape[-1]), strict=True))


class Layers:
    """Parameters, statistics and strides of a network, which its layers take one by one, in the
    module's order. `after` has the statistics that they leave."""

    def __init__(self, parameters: Sequence, statistics: Sequence, strides: Sequence[int]):
        self.parameters = iter(parameters)
        self.statistics, self.strides = iter(statistics), iter(strides)
        self.after: list[jax.Array] = []

    def conv(self, x: jax.Array, pad: int | None = None, bias: bool = False) -> jax.Array:
        w, stride = next(self.parameters), next(self.strides)
        pad = w.shape[0] // 2 if pad is None else pad
        alone = w.shape[2] == 1 != x.shape[-1]
        y = (depthwise if alone else convolution)(x, w, stride, pad)
        return y + next(self.parameters) if bias else y

    def up(self, x: jax.Array) -> jax.Array:
        """A transposed convolution whose windows do not meet."""
        w, k = next(self.parameters), next(self.strides)
        y = jnp.einsum("nhwi,aboi->nhawbo", x, w)
        n, h, _, width, _, o = y.shape
        return y.reshape(n, h * k, width * k, o) + next(self.parameters)

    def norm(self, x: jax.Array, affine: bool = True) -> jax.Array:
        mean = x.mean((0, 1, 2))
        variance = jnp.square(x - mean).mean((0, 1, 2))
        count = x.size // x.shape[-1]
        means, variances, calls = (next(self.statistics) for _ in range(3))
        self.after += [0.9 * means + 0.1 * mean]
        self.after += [0.9 * variances + 0.1 * variance * count / (count - 1), calls + 1]
        y = (x - mean) * lax.rsqrt(variance + 1e-5)
        return y * next(self.parameters) + next(self.parameters) if affine else y

    def linear(self, x: jax.Array) -> jax.Array:
        return x @ next(self.parameters).T + next(self.parameters)


def pool(x: jax.Array, size: int, stride: int) -> jax.Array:
    windows, steps = (1, size, size, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, windows, steps, "VALID")


def flat(x: jax.Array) -> jax.Array:
    """Rows in torch's order."""
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


def adaptive(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Means over `size` stretches of an axis, as torch cuts it."""
    n = x.shape[axis]
    if n == size:
        return x
    weights = np.zeros((size, n), np.float32)
    for i in range(size):
        first, last = i * n // size, -(-(i + 1) * n // size)
        weights[i, first:last] = 1 / (last - first)
    return jnp.moveaxis(jnp.tensordot(weights, x, (1, axis)), 0, axis)


def residual(net: Layers, x: jax.Array, widths: Sequence[int]) -> jax.Array:
    """The widths are those of the results of the blocks."""
    x = jax.nn.relu(net.norm(net.conv(x)))
    for width in widths:
        y = net.norm(net.conv(jax.nn.relu(net.norm(net.conv(x)))))
        x = jax.nn.relu(y + (x if x.shape[-1] == width else net.norm(net.conv(x))))
    return net.linear(x.mean((1, 2)))


def vgg(net: Layers, x: jax.Array, pairs: int) -> jax.Array:
    for _ in range(pairs):
        for _ in range(2):
            x = jax.nn.relu(net.norm(net.conv(x)))
        x = pool(x, 2, 2)
    return net.linear(flat(x))


def alexnet(net: Layers, x: jax.Array) -> jax.Array:
    x = pool(jax.nn.relu(net.conv(x, 2, bias=True)), 3, 2)
    x = pool(jax.nn.relu(net.conv(x, bias=True)), 3, 2)
    for _ in range(3):
        x = jax.nn.relu(net.conv(x, bias=True))
    x = flat(adaptive(adaptive(pool(x, 3, 2), 1, 6), 2, 6))
    return net.linear(jax.nn.relu(net.linear(jax.nn.relu(net.linear(x)))))


def mobilenet(net: Layers, x: jax.Array, blocks: Sequence[tuple[bool, bool]]) -> jax.Array:
    """Of each block: whether it makes more channels first, and whether its input is added."""

    def layer(x: jax.Array) -> jax.Array:
        return jnp.clip(net.norm(net.conv(x)), 0, 6)

    x = layer(x)
    for wide, adds in blocks:
        y = layer(layer(x) if wide else x)
        y = net.norm(net.conv(y), affine=False)
        x = x + y if adds else y
    return net.linear(layer(x).mean((1, 2)))


def unet(net: Layers, x: jax.Array, depth: int) -> jax.Array:
    def pair(x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = jax.nn.relu(net.norm(net.conv(x)))
        return x

    before = [pair(x)]
    for _ in range(depth):
        before.append(pair(pool(before[-1], 2, 2)))
    x = before.pop()
    for beside in reversed(before):
        x = pair(jnp.concatenate([net.up(x), beside], -1))
    return net.conv(x, bias=True).mean((1, 2))


def turned(parameters: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Weights of convolutions as HWIO."""
    return [p.transpose(2, 3, 1, 0) if p.ndim == 4 else p for p in parameters]


def classified(
    a: Arrays, net: Callable[[Layers, jax.Array], jax.Array], head: bool = False
) -> Made:
    """Training with cross-entropy and SGD with momentum; compared are parameters and statistics,
    or the head's parameters."""
    x, labels = jnp.array(a["x"].transpose(0, 2, 3, 1)), jnp.array(a["y"])
    strides = [int(s) for s in numbered(a, "stride")]

    def loss_of(parameters: list, statistics: list) -> tuple:
        layers = Layers(parameters, statistics, strides)
        logs = jax.nn.log_softmax(net(layers, x))
        return -jnp.take_along_axis(logs, labels[:, None], axis=1).mean(), layers.after

    def update(state: tuple) -> tuple:
        parameters, velocities, statistics = state
        (loss, statistics), grads = jax.value_and_grad(loss_of, has_aux=True)(
            parameters, statistics
        )
        pairs = zip(parameters, velocities, grads, strict=True)
        velocities = [0.9 * v + g + 5e-4 * p for p, v, g in pairs]
        parameters = [p - 1e-4 * v for p, v in zip(parameters, velocities, strict=True)]
        return loss, (parameters, velocities, statistics)

    def kept(state: tuple) -> list:
        parameters = [np.asarray(p) for p in state[0]]
        weights = [p.transpose(3, 2, 0, 1) if p.ndim == 4 else p for p in parameters]
        return weights[-2:] if head else [*weights, *state[2]]

    parameters = turned(numbered(a, "p"))
    zeros = [np.zeros_like(p) for p in parameters]
    return trained(update, (parameters, zeros, numbered(a, "b")), kept)


def of_residual(a: Arrays) -> Made:
    """The second convolution of a block tells its width; what follows a stem of one are blocks."""
    kernels = [p for p in numbered(a, "p") if p.ndim == 4 and p.shape[2:] == (3, 3)]
    return classified(a, partial(residual, widths=[len(w) for w in kernels[2::2]]))


def of_vgg(a: Arrays) -> Made:
    return classified(a, partial(vgg, pairs=len(numbered(a, "stride")) // 2))


def of_alexnet(a: Arrays) -> Made:
    return classified(a, alexnet)


def of_mobilenet(a: Arrays) -> Made:
    weights = [p for p in numbered(a, "p") if p.ndim == 4]
    strides = [int(s) for s in numbered(a, "stride")]
    blocks, at, inputs = [], 1, len(weights[0])
    while at < len(weights) - 1:
        wide = weights[at].shape[2] == 1  # 1×1 up, or the depthwise one at once
        outputs = len(weights[at + 1 + wide])
        blocks.append((wide, strides[at + wide] == 1 and inputs == outputs))
        at, inputs = at + 2 + wide, outputs
    return classified(a, partial(mobilenet, blocks=blocks), head=True)


def of_unet(a: Arrays) -> Made:
    # two convolutions at the top and the last one; five for each step down and up
    return classified(a, partial(unet, depth=(len(numbered(a, "stride")) - 3) // 5))


def block(a: Arrays) -> Made:
    """Convolution, batch norm and ReLU: the result, and gradients of all that goes in."""
    x, g = (a[name].transpose(0, 2, 3, 1) for name in "xg")

    def result(x: jax.Array, *parameters: jax.Array) -> jax.Array:
        net = Layers(parameters, [jnp.zeros(())] * 3, [1])
        return jax.nn.relu(net.norm(net.conv(x)))

    def function(g: jax.Array, *inputs: jax.Array) -> tuple:
        y, pull = jax.vjp(result, *inputs)
        return y, pull(g)

    step, grads = differentiated(function, [g, x, *turned(numbered(a, "p"))])

    def state() -> list:
        gx, gw, *rest = grads()
        return [gx.transpose(0, 3, 1, 2), gw.transpose(3, 2, 0, 1), *rest]

    return step, state


STEPS: dict[str, Callable[[Arrays], Made]] = {
    "conv_block": block,
    "depthwise_block": block,
    "resnet": of_residual,
    "vgg": of_vgg,
    "alexnet": of_alexnet,
    "mobilenet": of_mobilenet,
    "unet": of_unet,
}
