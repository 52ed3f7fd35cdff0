"""Program 3: clamp → sub → pow → sum with its gradient, over 4M elements: one kernel.

python -m examples.fused_chain
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import tracejit

ELEMENTS = 4_000_000


def make_step(
    n: int = ELEMENTS, device: str = "cpu"
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """The step and the tensor that it leaves a gradient on."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator).to(device).requires_grad_()
    y = torch.randn(n, generator=generator).to(device)

    def step() -> torch.Tensor:
        x.grad = None
        loss = (x.clamp(min=0) - y).pow(2).sum()
        loss.backward()
        return loss

    return step, [x]


def main(steps: int = 20, n: int = ELEMENTS) -> float:
    """Run; prints the kernel and the bytes that it moves."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step, (x,) = make_step(n, device)
    step = tracejit.compile(step)
    for _ in range(steps):
        loss = step()
    print(f"loss {loss.item():.6g}, gradient of norm {x.grad.norm().item():.6g}")
    print(f"{len(step.plans[-1].launches)} launch per step; {step.explain_mode()}")
    print(step.kernels[0])
    return loss.item()


if __name__ == "__main__":
    main()
