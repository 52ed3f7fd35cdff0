"""Program 9: a pre-norm transformer block with softmax attention written out, and plain SGD.

python -m examples.transformer_block
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import tracejit


class Block(torch.nn.Module):
    """Layer norm, attention, residual; layer norm, gelu MLP, residual; dropout if asked for."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = torch.nn.LayerNorm(width)
        self.norm2 = torch.nn.LayerNorm(width)
        self.query = torch.nn.Linear(width, width)
        self.key = torch.nn.Linear(width, width)
        self.value = torch.nn.Linear(width, width)
        self.out = torch.nn.Linear(width, width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        h = self.norm1(x)

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        q, k, v = split(self.query(h)), split(self.key(h)), split(self.value(h))
        scores = q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5
        mixed = F.dropout(torch.softmax(scores, dim=-1), self.dropout, self.training) @ v
        out = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + F.dropout(out, self.dropout, self.training)
        out = self.down(F.gelu(self.up(self.norm2(x))))
        return x + F.dropout(out, self.dropout, self.training)


def make_step(
    batch: int = 4, length: int = 64, width: int = 128, heads: int = 4, device: str = "cpu"
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A fresh training step (the block learns to reproduce a target) and its parameters."""
    torch.manual_seed(0)
    block = Block(width, heads).to(device)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
    x = torch.randn(batch, length, width).to(device)
    target = torch.randn(batch, length, width).to(device)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(block(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return step, list(block.parameters())


def main(steps: int = 20) -> float:
    """Train; returns the last loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step, _ = make_step(device=device)
    step = tracejit.compile(step)
    for _ in range(steps):
        loss = step()
    print(f"loss {loss.item():.6g}, {len(step.plans[-1].launches)} launches per step")
    return loss.item()


if __name__ == "__main__":
    main()
