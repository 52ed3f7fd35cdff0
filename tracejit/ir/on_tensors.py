"""A graph evaluated on tensors by numpy, one primitive at a time: for a value needed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tracejit.ir.graph import Graph
from tracejit.ir.interp import evaluate
from tracejit.ir.torch_types import TO_TORCH


def on_numpy(graph: Graph, inputs: Sequence[torch.Tensor | float]) -> torch.Tensor:
    """The first result of a graph without writes, in new memory on the CPU."""
    return results_on_numpy(graph, inputs)[0]


def results_on_numpy(graph: Graph, inputs: Sequence[torch.Tensor | float]) -> list[torch.Tensor]:
    """All results of a graph without writes, in new memory on the CPU."""
    arrays = [_array(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    found = evaluate(graph, arrays)[0]
    dtypes = [TO_TORCH[result.value.type.dtype] for result in graph.results]
    return [torch.from_numpy(np.array(x)).to(t) for x, t in zip(found, dtypes, strict=True)]


def _array(x: torch.Tensor) -> np.ndarray:
    """The elements of a tensor, as the numpy rules of primitives take them."""
    x = x.detach().cpu()
    if x.is_complex():  # a graph reads the pairs that it is
        x = torch.view_as_real(x)
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return (x.float() if narrow else x).numpy()
