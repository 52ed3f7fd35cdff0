"""Exported steps in onnxruntime: 20 calls, with the state fed back, beside our own."""

from __future__ import annotations

import pytest

import tracejit
from support.onnx_checks import assert_near, flat
from support.onnx_steps import STEPS

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

CALLS = 20


@pytest.mark.parametrize("name", STEPS)
def test_a_step_trains_in_onnxruntime(name, tmp_path):
    from tracejit.export.onnx.run import OnnxStep

    made = STEPS[name]()
    step = tracejit.compile(made.step)
    for i in range(3):  # so that there is all the state there will be
        step(*made.args(i))
    path = tmp_path / "step.onnx"
    model = tracejit.to_onnx(step, path, *made.args(0))
    onnx.checker.check_model(path, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    kinds = {node.op_type for node in model.graph.node}
    assert made.operators <= kinds and {node.domain for node in model.graph.node} == {""}
    assert any(node.doc_string.startswith("onnx_steps.py:") for node in model.graph.node)
    theirs = OnnxStep(path)
    for i in range(CALLS):
        args = made.args(i)
        assert_near(step(*args), theirs(*flat(args)), made.near)
    now = tracejit.to_onnx(step, tmp_path / "now.onnx", *made.args(0))
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in now.graph.initializer}
    assert theirs.state
    for state, found in theirs.state.items():
        assert_near(found.numpy(), weights[state], 10 * made.near)
