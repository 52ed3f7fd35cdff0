"""The oracle: evaluate a Graph with numpy, one primitive at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracejit.ir.graph import Arg, Graph, Value
from tracejit.ir.types import round_to


def evaluate(graph: Graph, inputs: Sequence[np.ndarray | float]) -> tuple[list, list]:
    """Run a graph; returns (results, written values), each in the order of the graph.

    `inputs` are arrays in compute dtype (bf16 and f16 as representable float32) in the shapes of
    the params, and Python floats for host scalars.
    """
    env: dict[Value, object] = {}
    for param, given in zip(graph.params, inputs, strict=True):
        kind = param.value.type
        env[param.value] = float(given) if kind.is_host else np.asarray(given, kind.dtype.compute)

    def read(arg: Arg) -> object:
        return env[arg] if isinstance(arg, Value) else arg

    with np.errstate(all="ignore"):
        for node in graph.nodes:
            out = node.op.eval(*map(read, node.args), **runnable(dict(node.attrs)))
            env[node.out] = out if node.out.type.is_host else round_to(out, node.out.type.dtype)
    return [env[r.value] for r in graph.results], [env[w.value] for w in graph.writes]


def runnable(attrs: dict[str, object]) -> dict[str, object]:
    """A node's attributes, with a graph among them as a function from its inputs to its results."""

    def changed(value: object) -> object:
        return (lambda inputs: evaluate(value, inputs)[0]) if isinstance(value, Graph) else value

    return {name: changed(value) for name, value in attrs.items()}
