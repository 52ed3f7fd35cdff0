"""The benchmarked steps, as a table: how to make one, and what no version of it can avoid."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks import steps
from examples import fused_chain, transformer_block, two_layer_autograd, two_layer_manual

Gemm = tuple[float, int, int, int]  # how often, m, k, n


@dataclass(frozen=True)
class Case:
    """One step.

    make_step: (**small, device=…, fused=…) -> (step, tensors that it changes); the step has no
        arguments and returns a tensor, a float or None. `fused` only where its optimizer has it.
    small:  sizes for a smoke test.
    gemms:  the matrix products that no version avoids.
    bytes:  what a version must read and write at least, where that is more than caches hold.
    grads:  the step's results are the tensors' gradients; the tensors stay.
    """

    make_step: Callable
    small: Mapping[str, object]
    gemms: tuple[Gemm, ...] = ()
    bytes: int = 0
    grads: bool = False

    @property
    def fused(self) -> bool:
        return "fused" in inspect.signature(self.make_step).parameters


def linear(n: int, d_in: int, d_out: int, count: float = 1, first: bool = False) -> list[Gemm]:
    """Products of a linear layer: forward, weight gradient and, unless it is first, the input's."""
    passes = [(count, n, d_in, d_out), (count, d_in, n, d_out)]
    return passes if first else [*passes, (count, n, d_out, d_in)]


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
_ELEMENTS = 4096 * 1024

CASES: dict[str, Case] = {
    "two_layer_manual": Case(two_layer_manual.make_step, _NET, _TWO_LAYER),
    "two_layer_autograd": Case(two_layer_autograd.make_step, _NET, _TWO_LAYER),
    "nn_adam": Case(steps.nn_adam, _NET, _TWO_LAYER),
    "chain_4m": Case(
        fused_chain.make_step, {"n": 1001}, bytes=12 * fused_chain.ELEMENTS, grads=True
    ),
    "mlp": Case(steps.mlp, {"batch": 9, "sizes": (33, 20, 5)}, _MLP),
    "adam_5m": Case(steps.adam, {"count": 3, "shape": (5, 7)}, bytes=28 * 5_000_000),
    "softmax": Case(steps.softmax, _ROWS, bytes=16 * _ELEMENTS, grads=True),
    "layer_norm": Case(steps.layer_norm, _ROWS, bytes=16 * _ELEMENTS, grads=True),
    "transformer_block": Case(
        transformer_block.make_step, {"batch": 2, "length": 5, "width": 24, "heads": 4}, _BLOCK
    ),
    "mlp_dropout": Case(steps.mlp_dropout, {"batch": 9, "sizes": (33, 20, 5)}, _MLP),
    "block_dropout": Case(
        steps.block_dropout, {"batch": 2, "length": 5, "width": 24, "heads": 4}, _BLOCK
    ),
    "loss_item": Case(steps.loss_item, _NET, _TWO_LAYER),
    "nan_check": Case(steps.nan_check, _NET, _TWO_LAYER),
    "norm_logged": Case(steps.norm_logged, _NET, _TWO_LAYER),
    "early_exit": Case(steps.early_exit, _NET, _TWO_LAYER * 3),
    "grad_scaler": Case(steps.grad_scaler, _NET, _TWO_LAYER),
    "own_adam": Case(steps.own_adam, _NET, _TWO_LAYER),
    "dynamic_net": Case(
        steps.dynamic_net,
        _NET,
        (*_TWO_LAYER, *linear(64, 100, 100, 1.5)),  # the middle layer runs 1.5 times on average
    ),
}


def arrays_of(step: Callable) -> dict[str, np.ndarray]:
    """Copies of the tensors in a step's closure: what contenders without torch start from.

    Named as in the closure, functions in it included; the parameters of a module or an optimizer
    are "p0", "p1", …, and those with a gradient have it as "g0", "g1", ….
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
        found |= {k: t.detach().numpy().copy() for k, t in tensors.items() if t is not None}
    return found
