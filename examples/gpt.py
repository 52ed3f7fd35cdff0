"""A small GPT that learns sums of two numbers, character by character.

python -m examples.gpt [--steps 600] [--layers 3] [--width 96] [--bf16] [--eager]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import tracejit

CHARACTERS = "0123456789+=. "
LENGTH = 12  # of "73+48=121.  "


class Attention(nn.Module):
    """Causal attention of several heads."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropped = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropped)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Norm, attention, residual; norm, MLP, residual."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Tokens [batch, length] → logits [batch, length, vocabulary]; embedding and head are tied."""

    def __init__(
        self,
        vocabulary: int = len(CHARACTERS),
        length: int = LENGTH,
        layers: int = 3,
        width: int = 96,
        heads: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        x = self.drop(self.tokens(x) + self.places(places))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def adamw(model: nn.Module, lr: float, **options: bool) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices only, as GPTs are trained."""
    parameters = [*model.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), **options)


def make_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    bf16: bool = False,
) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """One step on (tokens, targets), both [batch, length]; returns the loss as a number."""

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            logits = model(x)
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1), ignore_index=-1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.item()

    return step


def sums(count: int, rng: torch.Generator) -> Iterator[str]:
    """Random sums of numbers below 100, as lines of LENGTH characters."""
    for a, b in torch.randint(100, (count, 2), generator=rng).tolist():
        yield f"{a}+{b}={a + b}.".ljust(LENGTH)


def batch_of(count: int, rng: torch.Generator, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Lines as tokens, and the token after each; what is asked for are the digits of the result
    and the point behind them, -1 elsewhere."""
    lines = [*sums(count, rng)]
    codes = torch.tensor([[CHARACTERS.index(c) for c in line] for line in lines])
    targets = torch.full_like(codes, -1)
    for row, line in enumerate(lines):
        start, end = line.index("="), line.index(".")
        targets[row, start:end] = codes[row, start + 1 : end + 1]
    return codes.to(device), targets.to(device)


def solved(model: nn.Module, count: int, device: str) -> float:
    """The share of new sums that the model writes down right, each character the likeliest."""
    model.eval()
    x, y = batch_of(count, torch.Generator().manual_seed(1), device)
    with torch.no_grad():
        right = (model(x).argmax(-1) == y) | (y < 0)
    model.train()
    return right.all(1).float().mean().item()


def main(
    steps: int = 600,
    batch: int = 128,
    layers: int = 3,
    width: int = 96,
    dropout: float = 0.0,
    bf16: bool = False,
    eager: bool = False,
) -> list[list[float]]:
    """Train compiled, then eagerly from the same seed if asked; returns the losses of each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for name in ("tracejit", "eager")[: 1 + eager]:
        torch.manual_seed(0)
        model = GPT(layers=layers, width=width, dropout=dropout).to(device)
        optimizer = adamw(model, lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
        step = make_step(model, optimizer, schedule, bf16)
        step = tracejit.compile(step) if name == "tracejit" else step
        rng, losses, spent = torch.Generator().manual_seed(0), [], 0.0
        print(name)
        for k in range(steps):
            x, y = batch_of(batch, rng, device)
            start = time.perf_counter()
            losses.append(step(x, y))
            spent += time.perf_counter() - start if k > 3 else 0.0
            if k % 20 == 0 or k == steps - 1:
                print(f"\r  step {k}  loss {losses[-1]:.4f}", end="", flush=True)
        each = 1e3 * spent / max(1, steps - 4)
        print(f"  {each:.1f} ms per step  {100 * solved(model, 500, device):.1f} % of sums right")
        if name == "tracejit":
            print(f"  {step.explain_mode()}; {step.stats.compiles} compilations")
        found.append(losses)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for option, value in (("steps", 600), ("batch", 128), ("layers", 3), ("width", 96)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--eager", action="store_true", help="train eagerly beside it")
    main(**vars(parser.parse_args()))
