"""Running a captured step through the numpy oracle: capture tested without schedule or kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tracejit.capture.bind import unwrap
from tracejit.capture.capture import capture_call
from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import Call
from tracejit.capture.trace.tensor import TO_IR, TO_TORCH
from tracejit.ir.graph import Arg, Graph, Node, Value, verify
from tracejit.ir.hostcode import HostCode, host_names
from tracejit.ir.interp import evaluate
from tracejit.run import Hooks, generate
from tracejit.runtime.executor import Inlined


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array in its compute dtype."""
    return tensor.detach().to(torch.float32 if TO_IR[tensor.dtype].narrow else tensor.dtype).numpy()


def traced(step, *args, **kwargs) -> tuple[Captured, Call]:
    """Trace a step."""
    function, bound_to = unwrap(step)
    done = capture_call(function, bound_to + args, kwargs)
    verify(done.captured.graph)
    return done.captured, done.call


def captured_of(step, *args, **kwargs) -> Captured:
    """What tracing a step leaves behind."""
    return traced(step, *args, **kwargs)[0]


def call(step, *args, **kwargs):
    """What `tracejit.compile(step)(*args)` does, with the oracle in place of compiled kernels."""
    captured, made = traced(step, *args, **kwargs)
    oracle = OracleProgram(captured.graph)
    backwards = [OracleProgram(node.graph).run for node in captured.effects.outside]

    def checking(inputs: list, errors: Sequence[Exception]) -> None:
        results = OracleProgram(captured.checks.graph).run(inputs)
        if results[0]:
            raise captured.checks.refusal(results, errors)

    parts = captured, oracle, captured.graph, backwards, Hooks()
    what = generate(*parts, checking=checking)
    return what.function(made.reals, made.scalars, made.reals, made.holders, made)


class OracleProgram:
    """Stands for a compiled program: evaluates the raw graph. Its addresses are the tensors."""

    def __init__(self, graph: Graph):
        self.graph = graph

    def inlined(self, params: Sequence[str], reusable: str, code: object) -> tuple:
        """The line that runs the graph."""
        tensors = [p.removesuffix(".data_ptr()") for p in params]
        line = f"outputs = oracle([{', '.join(tensors)}])"
        results = [f"outputs[{k}]" for k in range(len(self.graph.results))]
        return Inlined((), line, None, {"oracle": self.run}), results

    def run(self, inputs: Sequence[torch.Tensor | float]) -> list[torch.Tensor]:
        """The results of the graph; what it writes is written."""
        arrays = [to_numpy(x).copy() if isinstance(x, torch.Tensor) else x for x in inputs]
        results, written = evaluate(self.graph, arrays)
        outputs = []
        for result, array in zip(self.graph.results, results, strict=True):
            kind = result.value.type
            out = torch.empty_strided(
                kind.shape,
                result.strides or torch.empty(kind.shape).stride(),
                dtype=TO_TORCH[kind.dtype],
            )
            out.copy_(torch.from_numpy(np.array(array)))
            outputs.append(out)
        of_param = dict(zip((p.value for p in self.graph.params), inputs, strict=True))
        with torch.no_grad():
            for write, array in zip(self.graph.writes, written, strict=True):
                of_param[write.target].data.copy_(torch.from_numpy(np.array(array)))
        return outputs


def host_function(
    nodes: Sequence[Node], params: Sequence[Value], wanted: Sequence[Arg]
) -> Callable[[list[float]], list[float]]:
    """A Python function from the values of host inputs to those of `wanted`."""
    code = HostCode()
    found = code.add(nodes, wanted, {v: f"scalars[{i}]" for i, v in enumerate(params)})
    body = "\n".join(f"    {line}" for line in [*code.lines, f"return [{', '.join(found)}]"])
    namespace = host_names()
    exec(compile(f"def host(scalars):\n{body}\n", "<tracejit host>", "exec"), namespace)
    return namespace["host"]
