"""Exported steps in onnxruntime: 20 calls, with the state fed back, beside our own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tracejit
from support.onnx_checks import assert_near, flat
from support.onnx_steps import STEPS
from support.random_check import loaded
from support.random_programs import generate

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

CALLS = 20
RANDOM = 60  # programs


@pytest.mark.sweep(0.17)
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow) if x in ("resnet18", "gpt") else x for x in STEPS],
)
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
    files = ("onnx_steps.py:", "saved_steps.py:")
    assert any(node.doc_string.startswith(files) for node in model.graph.node)
    theirs = OnnxStep(path)
    for i in range(CALLS):
        args = made.args(i)
        given = [x for x in flat(args) if type(x) is not int]
        assert_near(step(*args), theirs(*given), made.near)
    now = tracejit.to_onnx(step, tmp_path / "now.onnx", *made.args(0))
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in now.graph.initializer}
    assert theirs.state
    for state, found in theirs.state.items():
        assert_near(found.numpy(), weights[state], 10 * made.near)


@pytest.mark.parametrize("name", ["by_hand", "classifier", "alex"])
def test_the_reference_evaluator_of_onnx_agrees(name, tmp_path):
    """What a model says does not hang on how onnxruntime takes it."""
    from onnx.reference import ReferenceEvaluator

    from tracejit.export.onnx.run import OnnxStep

    made = STEPS[name]()
    for i in range(2):
        made.step(*made.args(i))
    model = tracejit.to_onnx(made.step, tmp_path / "step.onnx", *made.args(0))
    theirs, given = OnnxStep(tmp_path / "step.onnx"), flat(made.args(0))
    theirs(*given)
    defaults = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    feeds = {x.name: defaults.get(x.name) for x in model.graph.input}
    feeds |= {name: np.asarray(x) for name, x in zip(theirs.arguments, given, strict=True)}
    found = dict(zip(theirs.outputs, ReferenceEvaluator(model).run(None, feeds), strict=True))
    for state, output in theirs.pairs.items():
        assert_near(found[output], theirs.state[state].numpy(), 1e-4)


ELSEWHERE = """
import sys
sys.modules["torch"] = sys.modules["tracejit"] = None  # not there
import numpy as np
from onnx_step import OnnxStep
step = OnnxStep("step.onnx")
x, y = np.load("x.npy"), np.load("y.npy")
print([step(x, y)["loss"].item() for _ in range(20)])
"""


def test_a_model_runs_where_nothing_of_ours_is(tmp_path):
    """The runner's file alone, in another process, without torch."""
    made = STEPS["modules_adam"]()
    step, args = tracejit.compile(made.step), made.args(0)
    for _ in range(3):
        step(*args)
    tracejit.to_onnx(step, tmp_path / "step.onnx", *args)
    shutil.copy(Path(tracejit.__file__).parent / "export/onnx/run.py", tmp_path / "onnx_step.py")
    for name, x in zip("xy", args, strict=True):
        np.save(tmp_path / f"{name}.npy", x.numpy())
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    losses = [step(*args)["loss"].item() for _ in range(20)]
    assert_near(losses, json.loads(done.stdout), made.near)
    assert losses[-1] < losses[0]


def test_bfloat16_goes_in_and_comes_out(tmp_path):
    """numpy has none: it is float32 on both sides, rounded as torch rounds."""
    from tracejit.export.onnx.run import OnnxStep, array

    torch.manual_seed(0)
    w = torch.randn(5, 3, dtype=torch.bfloat16, requires_grad=True)

    @tracejit.compile
    def step(x):
        loss = (x @ w).float().square().mean()
        loss.backward()
        with torch.no_grad():
            w.sub_(0.1 * w.grad)
            w.grad = None
        return x * 1, loss.detach()

    x = torch.randn(4, 5)
    x[0, :2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # in the middle between two
    step(x.bfloat16())
    tracejit.to_onnx(step, tmp_path / "a.onnx", x.bfloat16())
    model = OnnxStep(tmp_path / "a.onnx")
    for given in (x.bfloat16(), x.numpy(), x):
        copied, loss = model(given)
        expected, expected_loss = step(x.bfloat16())
        assert np.array_equal(copied, expected.float().numpy())
        assert loss == pytest.approx(expected_loss.item(), rel=1e-2)
        assert np.allclose(
            array(model.state["w"]), w.detach().float().numpy(), rtol=0.02, atol=0.02
        )
    special = np.float32([[np.nan, np.inf, -np.inf, 3.4e38, 1e-40]] * 4)
    copied, _ = model(special)
    assert np.array_equal(copied, torch.tensor(special).bfloat16().float().numpy(), equal_nan=True)


@pytest.mark.sweep(6)
@pytest.mark.parametrize("seed", range(RANDOM))
@pytest.mark.filterwarnings("ignore")
def test_a_random_program_in_onnxruntime(seed, tmp_path):
    from tracejit.export.onnx.run import OnnxStep

    program = generate(seed)
    if program.dtype is torch.bfloat16:
        pytest.skip("numpy has no bfloat16 for the arguments")
    make_args, step = loaded(str(program), "program")
    args = make_args(torch.Tensor.to)
    for _ in range(2):
        step(*args)
    tracejit.to_onnx(step, tmp_path / "program.onnx", *args)
    model = OnnxStep(tmp_path / "program.onnx")
    leaves = [x for x in args if isinstance(x, (torch.Tensor, float))]
    given = [x.detach().numpy().copy() if isinstance(x, torch.Tensor) else x for x in leaves]
    for _ in range(3):
        fed = [model.state.get(n, x) for n, x in zip(model.arguments, given, strict=True)]
        returned = model(*fed)
        assert_near(step(*args), returned, 1e-3)
        for name, tensor in zip(model.arguments, leaves, strict=True):
            if name in model.state:
                assert_near(tensor, model.state[name].numpy(), 1e-3)
