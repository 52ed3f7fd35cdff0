"""A model of ONNX: a graph with its inputs, outputs, constants and metadata, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tracejit.export.onnx.writer import IR_VERSION, OPSET, Named, Writer, info


def model_of(
    w: Writer,
    name: str,
    inputs: Named,
    outputs: Named,
    weights: Sequence = (),
    metadata: Mapping[str, str] | None = None,
    version: str = "",
):
    """The model of what has been written: `weights` are tensors, those of an input its default."""
    from onnx import helper

    graph = helper.make_graph(
        w.nodes,
        name,
        [info(n, kind) for n, kind in inputs],
        [info(n, kind) for n, kind in outputs],
        initializer=[*weights, *w.constants.values()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="tracejit",
        producer_version=version,
    )
    helper.set_model_props(model, dict(metadata or {}))
    return model
