"""The benchmarked steps: name → (make_step, floor in seconds given measured machine rates)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from examples import fused_chain, two_layer_autograd, two_layer_manual


@dataclass(frozen=True)
class Case:
    """One step. `gemms` are (m, k, n) products it cannot avoid, `bytes` what it must move."""

    make_step: Callable
    gemms: tuple[tuple[int, int, int], ...]
    bytes: int


N, D, H, O = 64, 1000, 100, 10  # noqa: E741
_GEMMS = ((N, D, H), (N, H, O), (H, N, O), (N, O, H), (D, N, H))

CASES = {
    "two_layer_manual": Case(two_layer_manual.make_step, _GEMMS, 0),
    "two_layer_autograd": Case(two_layer_autograd.make_step, _GEMMS, 0),
    "fused_chain_4m": Case(fused_chain.make_step, (), 12 * fused_chain.ELEMENTS),
}
