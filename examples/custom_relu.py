"""Program 4: the two-layer net with a ReLU of its own, a custom `torch.autograd.Function`.

python -m examples.custom_relu
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import tracejit

N, D_IN, H, D_OUT = 64, 1000, 100, 10
LEARNING_RATE = 1e-6


class MyReLU(torch.autograd.Function):
    """max(x, 0), with its derivative written by hand."""

    @staticmethod
    def forward(ctx, input: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input)
        return input.clamp(min=0)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> torch.Tensor:
        (input,) = ctx.saved_tensors
        grad_input = grad_output.clone()
        grad_input[input < 0] = 0
        return grad_input


class MyReLUSetup(torch.autograd.Function):
    """The same, with the context filled by setup_context."""

    @staticmethod
    def forward(input: torch.Tensor) -> torch.Tensor:
        return input.clamp(min=0)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    backward = MyReLU.backward


STYLES = {"ctx": MyReLU, "setup_context": MyReLUSetup}


def make_step(
    style: str = "ctx",
    n: int = N,
    d_in: int = D_IN,
    h: int = H,
    d_out: int = D_OUT,
    device: str = "cpu",
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A fresh training step and the parameters that it updates."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d_in, generator=generator).to(device)
    y = torch.randn(n, d_out, generator=generator).to(device)
    w1 = torch.randn(d_in, h, generator=generator).to(device).requires_grad_()
    w2 = torch.randn(h, d_out, generator=generator).to(device).requires_grad_()
    relu = STYLES[style].apply
    lr = LEARNING_RATE

    def step() -> torch.Tensor:
        y_pred = relu(x.mm(w1)).mm(w2)
        loss = (y_pred - y).pow(2).sum()
        loss.backward()
        with torch.no_grad():
            w1.sub_(lr * w1.grad)
            w2.sub_(lr * w2.grad)
            w1.grad.zero_()
            w2.grad.zero_()
        return loss

    return step, [w1, w2]


def main(steps: int = 500) -> float:
    """Train both styles; returns the last loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for style in STYLES:
        step, _ = make_step(style, device=device)
        step = tracejit.compile(step)
        for _ in range(steps):
            loss = step()
        print(f"{style:14s} loss {loss.item():.6g}   {step.explain_mode()}")
    return loss.item()


if __name__ == "__main__":
    main()
