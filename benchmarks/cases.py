"""The benchmarked steps, as a table: how to make one, and what no version of it can avoid."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from benchmarks import image_steps, language_steps, steps
from examples import fused_chain, transformer_block, two_layer_autograd, two_layer_manual

Gemm = tuple[float, int, int, int]  # how often, m, k, n


@dataclass(frozen=True)
class Case:
    """One step.

    make_step: (**sizes, device=…, **options) -> (step, tensors that it changes); the step has no
        arguments and returns a tensor, a float or None. It takes options of its `optimizer`.
    small:  sizes for a smoke test.
    gemms:  the matrix products that no version avoids.
    bytes:  what a version must read and write at least, where that is more than caches hold.
    grads:  the step's results are the tensors' gradients; the tensors stay.
    optimizer:  torch's, whose options are given: "SGD" has `fused`, "Adam" `capturable` too.
    reads:  Python reads values or draws numbers in it, so that no graph holds a whole call.
    sizes:  where they are not the defaults of make_step.
    images: whether the step may have its images channels last.
    like:   the case that it is a larger one of.
    jax:    whether there is a version in JAX.
    """

    make_step: Callable
    small: Mapping[str, object]
    gemms: tuple[Gemm, ...] = ()
    bytes: int = 0
    grads: bool = False
    optimizer: str = ""
    reads: bool = False
    sizes: Mapping[str, object] = field(default_factory=dict)
    images: bool = False
    like: str = ""
    jax: bool = False

    def made(self, device: str, contender: str = "", *, small: bool = False) -> tuple:
        """(a step, the tensors that it changes) for a contender."""
        options = {"fused": True} if "fused" in contender else {}
        if "graph" in contender and self.optimizer == "Adam":
            options["capturable"] = True
        if "channels_last" in contender:
            options["channels_last"] = True
        sizes = self.small if small else self.sizes
        return self.make_step(device=device, **sizes, **options)


def linear(n: int, d_in: int, d_out: int, count: float = 1, first: bool = False) -> list[Gemm]:
    """Products of a linear layer: forward, weight gradient and, unless it is first, the input's."""
    passes = [(count, n, d_in, d_out), (count, d_in, n, d_out)]
    return passes if first else [*passes, (count, n, d_out, d_in)]


def convolution(
    batch: int, side: int, c: int, o: int, k: int, count: int = 1, first: bool = False
) -> list[Gemm]:
    """Products of a convolution whose result has this side, as those of a linear layer."""
    return linear(batch * side * side, c * k * k, o, count, first)


def transformer(
    batch: int, length: int, width: int, heads: int, layers: int, vocabulary: int, seen: int = 0
) -> tuple[Gemm, ...]:
    """Products of a language model; a query sees `seen` keys (half of them: causal attention)."""
    n, keys = batch * length, seen or length
    attention = [(batch * heads, length, width // heads, keys)] * 3
    attention += [(batch * heads, length, keys, width // heads)] * 3
    per_layer = [
        *linear(n, width, width, 4),
        *linear(n, width, 4 * width),
        *linear(n, 4 * width, width),
        *attention,
    ]
    return tuple((layers * times, *sizes) for times, *sizes in per_layer) + tuple(
        linear(n, width, vocabulary)
    )


_NET = {"n": 9, "d_in": 20, "h": 12, "d_out": 5}
_ROWS = {"n": 9, "width": 33}
_TWO_LAYER = (*linear(64, 1000, 100, first=True), *linear(64, 100, 10))
_MLP = (*linear(256, 784, 512, first=True), *linear(256, 512, 512), *linear(256, 512, 10))
_BLOCK = (
    *linear(256, 128, 128, 4),
    *linear(256, 128, 512),
    *linear(256, 512, 128),
    *((16, 64, 32, 64),) * 3,  # attention, 16 heads in all: scores, and two gradients of the mix
    *((16, 64, 64, 32),) * 3,
)
_RESNET = (
    *convolution(32, 32, 3, 64, 3, first=True),
    *convolution(32, 32, 64, 64, 3, 4),
    *(
        gemm
        for side, c in ((16, 64), (8, 128), (4, 256))
        for gemm in (
            *convolution(32, side, c, 2 * c, 3),
            *convolution(32, side, c, 2 * c, 1),
            *convolution(32, side, 2 * c, 2 * c, 3, 3),
        )
    ),
)
_VGG = (
    *convolution(32, 32, 3, 64, 3, first=True),
    *convolution(32, 32, 64, 64, 3),
    *(
        gemm
        for side, c in ((16, 64), (8, 128), (4, 256))
        for gemm in (
            *convolution(32, side, c, 2 * c, 3),
            *convolution(32, side, 2 * c, 2 * c, 3),
        )
    ),
)
_ALEXNET = (
    *convolution(4, 55, 3, 64, 11, first=True),
    *convolution(4, 27, 64, 192, 5),
    *convolution(4, 13, 192, 384, 3),
    *convolution(4, 13, 384, 256, 3),
    *convolution(4, 13, 256, 256, 3),
    *linear(4, 9216, 4096),
    *linear(4, 4096, 4096),
    *linear(4, 4096, 10),
)
_UNET = (
    *convolution(4, 64, 3, 32, 3, first=True),
    *convolution(4, 64, 32, 32, 3, 2),
    *convolution(4, 64, 64, 32, 3),
    *(
        gemm
        for side, c in ((32, 32), (16, 64), (8, 128))
        for gemm in (
            *convolution(4, side, c, 2 * c, 3),
            *convolution(4, side, 2 * c, 2 * c, 3, 1 if side == 8 else 2),
            *linear(4 * side * side, 2 * c, 4 * c),  # the transposed convolution
        )
    ),
    *convolution(4, 32, 128, 64, 3),
    *convolution(4, 16, 256, 128, 3),
)
_LSTM = (*linear(4096, 64, 256, first=True), *linear(4096, 64, 256, 3))
_GRU = (
    *linear(4096, 64, 192, 2, first=True),
    *linear(4096, 64, 192, 4),  # of the states
    *linear(4096, 128, 192, 2),
)
_STEPS = {"steps": 7, "batch": 3, "width": 5}
# Queries see half of the keys.
_ATTENTION = (*((64, 512, 64, 256),) * 3, *((64, 512, 256, 64),) * 3)
_IMAGES = {"batch": 2, "side": 9}
_TOKENS = {"layers": 1, "width": 8, "heads": 2, "vocabulary": 11, "batch": 2, "length": 6}
_ELEMENTS = 4096 * 1024


def _net(make_step: Callable, gemms: Sequence[Gemm] = (), **small: object) -> Case:
    """A network for images."""
    sizes = {**_IMAGES, **small}
    return Case(make_step, sizes, tuple(gemms), optimizer="SGD", images=True, jax=True)


CASES: dict[str, Case] = {
    "two_layer_manual": Case(two_layer_manual.make_step, _NET, _TWO_LAYER, jax=True),
    "two_layer_autograd": Case(two_layer_autograd.make_step, _NET, _TWO_LAYER, jax=True),
    "nn_adam": Case(steps.nn_adam, _NET, _TWO_LAYER, optimizer="Adam", jax=True),
    "chain_4m": Case(
        fused_chain.make_step, {"n": 1001}, bytes=12 * fused_chain.ELEMENTS, grads=True, jax=True
    ),
    "mlp": Case(steps.mlp, {"batch": 9, "sizes": (33, 20, 5)}, _MLP, optimizer="SGD", jax=True),
    "adam_5m": Case(
        steps.adam, {"count": 3, "shape": (5, 7)}, bytes=28 * 5_000_000, optimizer="Adam", jax=True
    ),
    "softmax": Case(steps.softmax, _ROWS, bytes=16 * _ELEMENTS, grads=True, jax=True),
    "layer_norm": Case(steps.layer_norm, _ROWS, bytes=16 * _ELEMENTS, grads=True, jax=True),
    "attention": Case(
        steps.attention, {"batch": 2, "heads": 3, "length": 9, "width": 5}, _ATTENTION, grads=True
    ),
    "transformer_block": Case(
        transformer_block.make_step,
        {"batch": 2, "length": 5, "width": 24, "heads": 4},
        _BLOCK,
        jax=True,
    ),
    "mlp_dropout": Case(
        steps.mlp_dropout, {"batch": 9, "sizes": (33, 20, 5)}, _MLP, optimizer="Adam"
    ),
    "block_dropout": Case(
        steps.block_dropout, {"batch": 2, "length": 5, "width": 24, "heads": 4}, _BLOCK
    ),
    "loss_item": Case(steps.loss_item, _NET, _TWO_LAYER, optimizer="SGD", reads=True),
    "nan_check": Case(steps.nan_check, _NET, _TWO_LAYER, optimizer="SGD", reads=True),
    "norm_logged": Case(steps.norm_logged, _NET, _TWO_LAYER, optimizer="SGD", reads=True),
    "early_exit": Case(steps.early_exit, _NET, _TWO_LAYER * 3, optimizer="SGD", reads=True),
    "grad_scaler": Case(steps.grad_scaler, _NET, _TWO_LAYER, optimizer="SGD", reads=True),
    "own_adam": Case(steps.own_adam, _NET, _TWO_LAYER),
    "conv_block": Case(
        image_steps.conv_block,
        {**_IMAGES, "channels": 4},
        tuple(convolution(32, 32, 64, 64, 3)),
        grads=True,
        images=True,
        jax=True,
    ),
    "depthwise_block": Case(
        image_steps.depthwise_block, {**_IMAGES, "channels": 4}, grads=True, images=True, jax=True
    ),
    "resnet": _net(image_steps.resnet, _RESNET, widths=(4, 8), blocks=1),
    "vgg": _net(image_steps.vgg, _VGG, widths=(4, 8)),
    "alexnet": _net(image_steps.alexnet, _ALEXNET, side=63, width=4, hidden=12),
    "mobilenet": _net(image_steps.mobilenet, stages=((1, 8, 1, 1), (2, 8, 2, 2)), last=12),
    "unet": _net(image_steps.unet, _UNET, side=8, width=4, depth=1),
    "lstm_256": Case(steps.recurrent, _STEPS, _LSTM, optimizer="Adam"),
    "gru_both_256": Case(
        steps.recurrent,
        {**_STEPS, "kind": "GRU", "both": True},
        _GRU,
        optimizer="Adam",
        sizes={"kind": "GRU", "both": True},
    ),
    "lstm_cells_256": Case(
        language_steps.cells,
        {"steps": 12, "batch": 3, "features": 5, "hidden": 4},
        (*linear(8, 64, 256, 256, first=True), *linear(8, 64, 256, 256)),
        optimizer="Adam",
    ),
    "gpt": Case(
        language_steps.gpt, _TOKENS, transformer(4, 64, 128, 4, 4, 512, 32), optimizer="Adam"
    ),
    "gpt_384": Case(
        language_steps.gpt,
        _TOKENS,
        transformer(4, 128, 384, 6, 6, 8192, 64),
        optimizer="Adam",
        sizes={"layers": 6, "width": 384, "heads": 6, "vocabulary": 8192, "length": 128},
    ),
    "bert_tiny": Case(
        language_steps.bert, _TOKENS, transformer(8, 64, 128, 2, 2, 30522), optimizer="Adam"
    ),
    "dynamic_net": Case(
        steps.dynamic_net,
        _NET,
        (*_TWO_LAYER, *linear(64, 100, 100, 1.5)),  # the middle layer runs 1.5 times on average
        reads=True,
    ),
}


def _larger(like: str, gemms: Sequence[Gemm] = (), bytes: int = 0, jax: bool = True, **sizes):
    return replace(CASES[like], like=like, gemms=tuple(gemms), bytes=bytes, sizes=sizes, jax=jax)


# The same in sizes that fill a GPU.
LARGE: dict[str, Case] = {
    "chain_64m": _larger("chain_4m", bytes=12 << 26, n=1 << 26),
    "adam_200": _larger("adam_5m", bytes=28 * 50_000_000, count=200),
    "nn_adam_4k": _larger(
        "nn_adam",
        (*linear(8192, 4096, 4096, first=True), *linear(8192, 4096, 1024)),
        **{"n": 8192, "d_in": 4096, "h": 4096, "d_out": 1024},
    ),
    "mlp_4k": _larger(
        "mlp",
        (
            *linear(8192, 4096, 4096, first=True),
            *linear(8192, 4096, 4096),
            *linear(8192, 4096, 1000),
        ),
        batch=8192,
        sizes=(4096, 4096, 4096, 1000),
    ),
    "softmax_16k": _larger("softmax", bytes=16 << 26, n=1 << 14, width=1 << 12),
    "softmax_50257": _larger("softmax", bytes=16 * 2048 * 50257, n=2048, width=50257),
    "layer_norm_16k": _larger("layer_norm", bytes=16 << 26, n=1 << 14, width=1 << 12),
    "transformer_768": _larger(
        "transformer_block",
        (
            *linear(4096, 768, 768, 4),
            *linear(4096, 768, 3072),
            *linear(4096, 3072, 768),
            *((96, 512, 64, 512),) * 3,
            *((96, 512, 512, 64),) * 3,
        ),
        jax=False,  # written for 4 heads
        **{"batch": 8, "length": 512, "width": 768, "heads": 12},
    ),
}
ALL = CASES | LARGE

# What tells most about a GPU comes first.
TELLING = (
    *("two_layer_autograd", "chain_64m", "adam_200", "mlp_4k", "transformer_768"),
    *("layer_norm_16k", "nn_adam", "softmax_50257", "nn_adam_4k", "softmax_16k"),
    *("mlp", "transformer_block", "loss_item", "dynamic_net"),
)


def cases_of(device: str) -> tuple[str, ...]:
    """The names of a device's cases, in their order."""
    return tuple(dict.fromkeys((*TELLING, *ALL))) if device == "cuda" else tuple(CASES)


def arrays_of(step: Callable) -> dict[str, np.ndarray]:
    """Copies of the tensors in a step's closure: what contenders without torch start from.

    Named as in the closure, functions in it included; the parameters of a module or an optimizer
    are "p0", "p1", …, and those with a gradient have it as "g0", "g1", …. The buffers of a module
    are "b0", "b1", …, the strides of its convolutions "stride0", "stride1", ….
    """
    found: dict[str, np.ndarray] = {}
    for name, value in inspect.getclosurevars(step).nonlocals.items():
        tensors: dict[str, torch.Tensor | None] = {}
        if isinstance(value, torch.Tensor):
            tensors = {name: value}
        elif inspect.isfunction(value):
            found |= arrays_of(value)
        elif isinstance(value, (torch.nn.Module, torch.optim.Optimizer)):
            module = isinstance(value, torch.nn.Module)
            parameters = value.parameters() if module else value.param_groups[0]["params"]
            for i, p in enumerate(parameters):
                tensors |= {f"p{i}": p, f"g{i}": p.grad}
            if module:
                tensors |= {f"b{i}": b for i, b in enumerate(value.buffers())}
                strides = [m.stride[0] for m in value.modules() if hasattr(m, "transposed")]
                found |= {f"stride{i}": np.array(s) for i, s in enumerate(strides)}
        found |= {k: t.detach().numpy().copy() for k, t in tensors.items() if t is not None}
    return found
