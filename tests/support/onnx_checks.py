"""Graphs of the IR in onnxruntime: what the tests of the ONNX export share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tracejit.export.onnx.model import model_of
from tracejit.export.onnx.translate import Translator
from tracejit.export.onnx.writer import Writer, held
from tracejit.ir.graph import Graph
from tracejit.ir.types import Type, b1, f32, f64, i32, i64

_PLAIN = {np.dtype(t.compute): t for t in (f64, f32, i64, i32, b1)}


def as_model(graph: Graph):
    """A graph as an ONNX model whose inputs and outputs are held: bf16 as float32, and so on."""
    w = Writer()
    inputs = [(w.name(f"input_{k}"), p.value.type) for k, p in enumerate(graph.params)]
    t = Translator(w, zip((p.value for p in graph.params), (n for n, _ in inputs), strict=True))
    t.run(graph.nodes)
    results = [(w.Identity(t.name(r.value)), r.value.type) for r in graph.results]
    return model_of(w, "graph", *([(n, _held(k)) for n, k in x] for x in (inputs, results)))


def _held(kind: Type) -> Type:
    return Type(_PLAIN[held(kind.dtype)], kind.shape)


def in_onnxruntime(graph: Graph, inputs: Sequence[np.ndarray | float]) -> list[np.ndarray]:
    """The results of a graph there, whose model the checker accepts."""
    import onnx
    import onnxruntime

    model = as_model(graph)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = [p.value.type for p in graph.params]
    feeds = {
        f"input_{k}": np.asarray(x, held(kind.dtype))
        for k, (x, kind) in enumerate(zip(inputs, kinds, strict=True))
    }
    return session.run(None, feeds)


def flat(x: object) -> list:
    """The numbers and tensors in a result, or in arguments, in order; tensors as arrays."""
    if isinstance(x, dict):
        return [part for item in x.values() for part in flat(item)]
    if isinstance(x, (list, tuple)):
        return [part for item in x for part in flat(item)]
    return [x.detach().numpy() if isinstance(x, torch.Tensor) else x]


def assert_near(ours: object, theirs: object, near: float) -> None:
    """As many numbers of equal shapes, which differ by at most a share of the largest."""
    assert len(flat(ours)) == len(flat(theirs))
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert np.shape(a) == np.shape(b)
        size = np.abs(np.asarray(b, np.float64)).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=near, atol=near * (size + 1e-3))
