"""Running a captured step through the numpy oracle: capture tested without schedule or kernels."""

from __future__ import annotations

import numpy as np
import torch

from tracejit.capture import functions  # noqa: F401
from tracejit.capture.bind import bind, run, unwrap
from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.collect import finish
from tracejit.capture.python.garbage import uncollected
from tracejit.capture.trace.tensor import TO_IR, TO_TORCH
from tracejit.capture.tracer import Tracer
from tracejit.ir.graph import verify
from tracejit.ir.hostcode import host_function
from tracejit.ir.interp import evaluate


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array in its compute dtype."""
    return tensor.detach().to(torch.float32 if TO_IR[tensor.dtype].narrow else tensor.dtype).numpy()


def captured_of(step, *args, **kwargs) -> Captured:
    """Trace a step."""
    function, bound_to = unwrap(step)
    tracer = Tracer()
    bound = bind(tracer.trace, function, bound_to + args, kwargs)
    with uncollected() as young:
        returned = [run(tracer, bound, function)]
        captured = finish(tracer.trace, function.__name__, returned, young)
    verify(captured.graph)
    return captured


def call(step, *args, **kwargs):
    """What `tracejit.compile(step)(*args)` does, with the oracle in place of compiled kernels."""
    captured = captured_of(step, *args, **kwargs)
    inputs = [
        to_numpy(captured.reals[i]).copy() if kind == "tensor" else captured.scalars[i]
        for kind, i in captured.sources
    ]
    results, written = evaluate(captured.graph, inputs)
    outputs = []
    for result, array in zip(captured.graph.results, results, strict=True):
        kind = result.value.type
        out = torch.empty_strided(
            kind.shape,
            result.strides or torch.empty(kind.shape).stride(),
            dtype=TO_TORCH[kind.dtype],
        )
        out.copy_(torch.from_numpy(np.array(array)))
        outputs.append(out)
    by_param = {p.value: captured.reals[i] for p, (_, i) in _tensors(captured)}
    with torch.no_grad():
        for write, array in zip(captured.graph.writes, written, strict=True):
            by_param[write.target].data.copy_(torch.from_numpy(np.array(array)))
    host = host_function(captured.host_nodes, captured.scalar_values, captured.host_results)
    return captured.commit(captured.reals, outputs, host(list(captured.scalars)))


def _tensors(captured: Captured):
    for param, source in zip(captured.graph.params, captured.sources, strict=True):
        if source[0] == "tensor":
            yield param, source
