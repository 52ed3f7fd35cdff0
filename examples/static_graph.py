"""A two-layer network as a static graph: written down first, then run many times by feeds.

python -m examples.static_graph [FILE]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import tracejit


def build(rows: int = 64, d_in: int = 100, hidden: int = 50, d_out: int = 10) -> tuple:
    """The graph, and its step: (x, y) → loss. Nothing is computed here."""
    with tracejit.Graph() as graph:
        x = graph.placeholder("x", (rows, d_in))
        y = graph.placeholder("y", (rows, d_out))
        w1 = graph.variable("w1", torch.randn(d_in, hidden) / d_in**0.5)
        w2 = graph.variable("w2", torch.randn(hidden, d_out) / hidden**0.5)
        loss = F.mse_loss((x @ w1).clamp(min=0) @ w2, y)
        graph.minimize(loss, torch.optim.SGD, lr=0.5, momentum=0.9)
    return graph, graph.compile(loss)


def main(path: str | None = None, steps: int = 200) -> tuple[float, float]:
    """Train, save, and go on from the file; returns the first and the last loss."""
    torch.manual_seed(0)
    graph, run = build()
    print(graph.code)
    x, y = torch.randn(64, 100), torch.randn(64, 10)
    losses = [run(x=x, y=y).item() for _ in range(steps)]
    print(f"loss {losses[0]:.4f} → {losses[-1]:.4f}; {run.explain_mode()}")
    folder = tempfile.TemporaryDirectory()
    path = path or str(Path(folder.name) / "graph.step")
    run.save(path)
    loaded = tracejit.load(path)
    last = loaded(x=x, y=y, lr=0.1).item()
    print(f"from {path}: loss {last:.4f}, variables {', '.join(loaded.state_dict())}")
    return losses[0], last


if __name__ == "__main__":
    main(*sys.argv[1:2])
