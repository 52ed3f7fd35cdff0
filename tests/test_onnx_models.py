"""What is exported of modules and functions: names, operators, inputs, results; what is refused."""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tracejit
from examples.gpt import GPT
from support.command_line import status
from support.image_nets import UNet, alexnet, mobile, residual
from support.onnx_checks import assert_near, flat
from tracejit.errors import CannotExport, MissingPackage

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


def runner(path):
    from tracejit.export.onnx.run import OnnxStep

    return OnnxStep(path)


def about(model) -> dict:
    """What a model says of itself."""
    return json.loads(model.metadata_props[0].value)


def names_of(values) -> list[str]:
    return [x.name for x in values]


def kinds_of(model) -> Counter:
    return Counter(node.op_type for node in model.graph.node)


# ---- forward


MODELS = {
    "linear": (lambda: nn.Linear(3, 4), (2, 3), {"Gemm": 1}),
    "linear of rows": (lambda: nn.Linear(3, 4, bias=False), (2, 5, 3), {"MatMul": 1}),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, 2, (1, 0), 2, 2), (2, 4, 9, 11), {"Conv": 1}),
    "same": (lambda: nn.Conv1d(3, 4, 4, padding="same"), (2, 3, 9), {"Conv": 1}),
    "volumes": (lambda: nn.Conv3d(2, 4, 3, padding=1), (1, 2, 5, 6, 7), {"Conv": 1}),
    "softmax": (lambda: nn.Softmax(1), (3, 5, 2), {"Softmax": 1}),
    "log softmax": (lambda: nn.LogSoftmax(-1), (3, 5), {"LogSoftmax": 1}),
    "layer norm": (lambda: nn.LayerNorm((3, 5)), (2, 3, 5), {"LayerNormalization": 1}),
    "plain norm": (
        lambda: nn.LayerNorm(5, elementwise_affine=False),
        (3, 5),
        {"LayerNormalization": 1},
    ),
    "batch norm": (lambda: nn.BatchNorm2d(3), (2, 3, 4, 5), {"BatchNormalization": 1}),
    "gelu": (nn.GELU, (3, 5), {"Gelu": 1}),
    "tanh gelu": (lambda: nn.GELU("tanh"), (3, 5), {"Gelu": 1}),
    "relu": (nn.ReLU, (3, 5), {"Relu": 1}),
    "sigmoid": (nn.Sigmoid, (3, 5), {"Sigmoid": 1}),
    "max pool": (lambda: nn.MaxPool2d(3, 2, 1), (2, 3, 8, 9), {"MaxPool": 3}),
    "max pool of taps": (lambda: nn.MaxPool1d(3, 1, 0, 2), (2, 3, 9), {"MaxPool": 3}),
    "mean pool": (lambda: nn.AvgPool2d((2, 3), padding=1), (2, 3, 8, 9), {"AveragePool": 1}),
    "mean pool of what is there": (
        lambda: nn.AvgPool3d(2, 1, 1, count_include_pad=False),
        (1, 2, 3, 4, 5),
        {"AveragePool": 1},
    ),
    "residual": (residual, (2, 3, 16, 16), {"Conv": 8, "BatchNormalization": 8, "Relu": 7}),
    "mobile": (mobile, (2, 3, 16, 16), {"Conv": 7}),
    "alexnet": (alexnet, (2, 3, 31, 31), {"Conv": 3, "Gemm": 2, "Relu": 4}),
    "unet": (UNet, (1, 3, 8, 8), {"Conv": 3}),
    "gru": (lambda: nn.GRU(3, 4, bidirectional=True), (5, 2, 3), {}),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (2, 5, 8),
        {"LayerNormalization": 2, "Relu": 1},
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.sweep(0.34)
def test_a_module_in_onnxruntime(name, path):
    """Operators of ONNX's own where there are, and weights under their names in the module."""
    torch.manual_seed(0)
    make, shape, kinds = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    exported = tracejit.to_onnx(model, path, x)
    with torch.no_grad():
        expected = model(x.clone())
    assert_near(expected, runner(path)(x.numpy()), 1e-4)
    found = kinds_of(exported)
    assert {kind: found[kind] for kind in kinds} == kinds
    weights = names_of(exported.graph.initializer)
    assert {n for n in weights if not n.startswith("constant")} <= model.state_dict().keys()
    assert len(exported.graph.input) == 1  # weights are constants


def test_a_model_of_float64_is_as_exact(path):
    torch.manual_seed(0)
    convolutions = nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.LayerNorm(32)
    model = nn.Sequential(*convolutions, nn.Linear(32, 5), nn.Softmax(1)).double()
    x = torch.randn(2, 1, 6, 6).double()
    tracejit.to_onnx(model, path, x)
    assert_near(model(x), runner(path)(x.numpy()), 1e-13)


def test_a_language_model_with_tokens(path):
    model, tokens = GPT(layers=1, width=16, heads=2).eval(), torch.randint(0, 14, (2, 12))
    exported = tracejit.to_onnx(model, path, tokens)
    assert names_of(exported.graph.input) == ["x"] and kinds_of(exported)["Gather"] >= 1
    assert_near(model(tokens), runner(path)(tokens.numpy()), 1e-4)


def test_autocast_stays_in_its_dtype(path):
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 16)

    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    tracejit.to_onnx(step, path, x)
    # it rounds where eager does, but adds in another order
    assert_near(step(x), runner(path)(x.numpy()), 2.0**-6)
    onnx.checker.check_model(path, full_check=True)


def test_half_inputs_and_outputs_have_their_own_dtype(path):
    model = nn.Linear(3, 4).half()
    exported = tracejit.to_onnx(model, path, x := torch.randn(2, 3).half())
    types = {v.type.tensor_type.elem_type for v in (*exported.graph.input, *exported.graph.output)}
    assert types == {onnx.TensorProto.FLOAT16}
    assert_near(model(x).float(), runner(path)(x.numpy()).astype(np.float32), 1e-2)


def test_integers_and_bools(path):
    def step(ids, mask, small):
        return ids // 3 - (ids << 2), ~mask & (ids > 1), small * small, mask.sum(), ids.sum(0)

    given = torch.tensor([[7, -8, 2**53 + 1]]), torch.tensor([[True, False, True]])
    given += (torch.tensor([100, -3], dtype=torch.int8),)
    tracejit.to_onnx(step, path, *given)
    for ours, theirs in zip(step(*given), runner(path)(*flat(given)), strict=True):
        assert theirs.dtype == ours.numpy().dtype
        np.testing.assert_array_equal(theirs, ours.numpy())


VIEWS = {
    "whole": lambda x: x,
    "flat": lambda x: x.view(-1),
    "transposed": lambda x: x.transpose(0, 2),
    "row": lambda x: x[1],
    "strided": lambda x: x.T[1:, ::2],
    "spread": lambda x: x[0, 0].expand(2, 5),
    "parts": lambda x: x.unbind(1),
    "twice": lambda x: (y := x * 2, y[1:], y.permute(2, 0, 1)),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_views_are_returned(name, path):
    x = torch.randn(3, 4, 5)
    tracejit.to_onnx(VIEWS[name], path, x)
    assert_near(VIEWS[name](x), runner(path)(x.numpy()), 1e-6)


def test_weights_in_any_layout(path):
    """As the columns of others, of one element, of none."""
    whole = torch.arange(12.0).view(3, 4)
    parts = whole[:, :3].T, whole[0, ::3][:1], torch.zeros(0, 3), torch.tensor(2.0)

    def step(x):
        return [x * part.sum() + part.numel() for part in parts], parts[0] * x

    tracejit.to_onnx(step, path, x := torch.randn(3))
    assert_near(step(x), runner(path)(x.numpy()), 1e-6)


def test_structures_and_plain_values(path):
    def step(batch, scale: float, twice: bool):
        y = batch["x"] * scale
        return {"y": y, "rest": [3, None, "text", (y.sum(), scale * 2)], "k": 2 if twice else 1}

    given = {"x": torch.randn(2, 3), "unread": torch.zeros(4)}
    model = tracejit.to_onnx(step, path, given, 0.5, True)
    assert names_of(model.graph.input) == ["batch['x']", "batch['unread']", "scale"]
    assert names_of(model.graph.output) == ["result['y']", "result['rest'][3][0]"] + [
        "result['rest'][3][1]"
    ]
    with pytest.raises(TypeError, match="the model takes .* not 4 arguments"):
        runner(path)(given["x"].numpy(), given["unread"].numpy(), 0.25, True)
    found = runner(path)(given["x"].numpy(), given["unread"].numpy(), 0.25)
    assert found["k"] == 2 and found["rest"][:3] == [3, None, "text"]
    assert_near(step(given, 0.25, True)["y"], found["y"], 1e-6)
    assert found["rest"][3][1] == 0.5


def test_extremes_of_windows(path):
    """onnxruntime's MaxPool alone drops NaN, and makes a large number of -inf."""
    x = torch.randn(1, 1, 6, 6)
    x[0, 0, 0, 0], x[0, 0, 2, 2], x[0, 0, 5, 5] = math.nan, math.inf, -math.inf
    x[0, 0, 3:, :3] = -math.inf
    pool = nn.MaxPool2d(3, 1, 1)
    tracejit.to_onnx(pool, path, x)
    np.testing.assert_array_equal(runner(path)(x.numpy()), pool(x).numpy())


# ---- state


def test_numbers_are_inputs_with_defaults(path):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        return loss.detach()

    step(x := torch.randn(4, 3))
    exported = tracejit.to_onnx(step, path, x)
    rate = "optimizer.param_groups[0].lr"
    assert about(exported)["state"][rate] == f"{rate}.next"
    first, second = runner(path), runner(path)
    for k in range(5):
        assert_near(step(x), first(x.numpy()), 1e-5)
        second(x.numpy(), **{rate: 0.0})
        assert second.state[rate].numpy() == 0 and first.state[rate].numpy() == 0.05 / 2 ** (k + 1)
    assert_near(second.state["model.weight"].numpy(), weight_in(exported, "model.weight"), 1e-9)


def weight_in(model, name: str) -> np.ndarray:
    """The default of an input."""
    found = {x.name: x for x in model.graph.initializer}
    return onnx.numpy_helper.to_array(found[name])


OPTIMIZERS = {
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adamax": (torch.optim.Adamax, {"weight_decay": 0.1}),
    "AMSGrad": (torch.optim.Adam, {"amsgrad": True, "foreach": True}),
    "a rate in a tensor": (torch.optim.Adam, {"lr": torch.tensor(0.01)}),
    "NAdam": (torch.optim.NAdam, {}),
    "RMSprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "Rprop": (torch.optim.Rprop, {}),
}


def trained_by(kind: type, options: dict):
    """A step of an optimizer that has its state, and its argument."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = kind(model.parameters(), **options)

    def step(x):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    x = torch.randn(4, 6)
    for _ in range(2):
        step(x)
    return step, x


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.sweep(0.34)
def test_optimizers(name, path):
    step, x = trained_by(*OPTIMIZERS[name])
    tracejit.to_onnx(step, path, x)
    theirs = runner(path)
    for _ in range(8):
        assert_near(step(x), theirs(x.numpy()), 1e-4)


@pytest.mark.parametrize("kind", [torch.optim.RAdam, torch.optim.Adafactor, torch.optim.ASGD])
def test_an_optimizer_that_decides_by_its_state_is_refused(kind, path):
    step, x = trained_by(kind, {})
    with pytest.raises(CannotExport, match=r"decides by optimizer\.state\[model\.0\.weight\]"):
        tracejit.to_onnx(step, path, x)


def test_a_number_that_decides_is_a_constant(path):
    def step(x, rate, power):
        return x * rate if rate > 0.5 else x**power

    x = torch.rand(3)
    exported = tracejit.to_onnx(step, path, x, 0.25, 2.0)
    assert names_of(exported.graph.input) == ["x", "power"]
    assert about(exported)["constants"] == {"rate": 0.25}
    assert_near(x**3, runner(path)(x.numpy(), 3.0), 1e-6)


def test_running_statistics_and_a_number_that_is_read(path):
    torch.manual_seed(0)
    norm, total = nn.BatchNorm1d(3), torch.zeros(())

    def step(x):
        total.add_(x.sum())
        y = norm(x)
        return y * (1 / (1 + y.abs().max().item()))

    step(x := torch.randn(6, 3))
    exported = tracejit.to_onnx(step, path, x)
    expected = {"total", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert about(exported)["state"].keys() == expected
    theirs = runner(path)
    for _ in range(4):
        assert_near(step(x), theirs(x.numpy()), 1e-4)
    for name, ours in (("total", total), ("norm.running_var", norm.running_var)):
        assert_near(ours, theirs.state[name].numpy(), 1e-4)
    assert theirs.state["norm.num_batches_tracked"].numpy() == norm.num_batches_tracked


def test_gradients_that_a_step_leaves(path):
    w = torch.randn(3, 2, requires_grad=True)

    def step(x):
        w.grad = None
        loss = (x @ w).pow(2).sum()
        loss.backward()
        return loss

    step(x := torch.randn(4, 3))
    exported = tracejit.to_onnx(step, path, x)
    assert names_of(exported.graph.output) == ["result", "w.grad"] and not about(exported)["state"]
    step(x)
    found = runner(path).session.run(["w.grad"], {"x": x.numpy()})
    assert_near(w.grad, found[0], 1e-5)


def test_random_numbers_are_inputs(path):
    """The generator of eager, a Mersenne twister of 624 words, is no operator of ONNX."""
    drop = nn.Dropout(0.25)
    exported = tracejit.to_onnx(drop, path, x := torch.randn(50))
    assert names_of(exported.graph.input) == ["input", "draw.0"]
    (draw,) = about(exported)["draws"]
    assert draw == {"input": "draw.0", "fill": "bernoulli_", "numbers": {"p": 0.75}}
    torch.manual_seed(1)
    mask = torch.empty(50).bernoulli_(0.75)
    torch.manual_seed(1)
    assert_near(drop(x), runner(path)(x.numpy(), **{"draw.0": mask.bool().numpy()}), 1e-6)
    with pytest.raises(ValueError, match="draw.0"):
        runner(path)(x.numpy())


def test_the_export_changes_nothing(path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    optimizer = torch.optim.Adam(model.parameters())

    @tracejit.compile
    def step(x):
        optimizer.zero_grad()
        loss = model(x).pow(2).sum()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(2):
        step(x := torch.randn(4, 3))

    def all_state() -> list:
        held = [s[k] for s in optimizer.state.values() for k in s]
        grads = [p.grad for p in model.parameters()]
        return [*model.state_dict().values(), *held, *grads, torch.get_rng_state()]

    before = [x.clone() for x in all_state()]
    tracejit.to_onnx(step, path, x)
    assert all(torch.equal(a, b) for a, b in zip(before, all_state(), strict=True))


# ---- refused


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * float(self.calls)


def decides(x):
    return x if x.sum() > 0 else -x


def selects(x):
    return x[x > 0]


def solves(x):
    return torch.linalg.solve(x, x)


def texts(x):
    return f"{x.sum().item():.3f}"


def says_nothing(x):
    x.sum()


def reads_all(x):
    return x * max(x.repeat(1, 9).tolist()[0])  # too many to be read one by one


def draws(x):
    return x * random.random()


def seeds(x):
    torch.manual_seed(0)
    return x + torch.rand(3, 3)


def first_of_all():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())

    def step(x):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    return step


def accumulates():
    w = torch.ones(3, 2, requires_grad=True)

    def step(x):
        (x @ w).sum().backward()

    return step


def branches_on_state():
    calls = torch.zeros(())

    def step(x):
        calls.add_(1)
        return x * 2 if calls.item() > 3 else x

    return step


class Held:
    """What a step may find, and leave."""

    def __init__(self) -> None:
        self.last, self.calls, self.log = 1.0, 0, []
        self.before, self.a, self.b = torch.zeros(3, 3), torch.zeros(3, 3), torch.ones(3, 3)


held = Held()


def keeps_a_number(x):
    y = x * held.last
    held.last = x.sum().item()
    return y


def keeps_its_argument(x):
    y = x - held.before
    held.before = x
    return y


def swaps(x):
    held.a, held.b = held.b, held.a
    return x * held.b


def keeps_in_a_variable():
    kept = torch.zeros(3, 3)

    def step(x):
        nonlocal kept
        y, kept = x * kept, x
        return y

    return step


REFUSED = {
    "a number that is kept": (keeps_a_number, "a number that it has read or computed into an obj"),
    "a tensor that is kept": (keeps_its_argument, r"another tensor \(before\) into an object of y"),
    "tensors that are swapped": (swaps, r"puts another tensor \(a, b\) into an object of yours"),
    "a variable": (keeps_in_a_variable(), r"puts another tensor \(a variable\) into an object"),
    "a decision": (decides, "its Python decides by a value that it reads"),
    "elements": (selects, "depend on which elements it finds there. Compute with all elements"),
    "a solution": (solves, "lu(_solve)? cannot be exported to ONNX: it is a decomposition of"),
    "text": (texts, "it makes text or a plain float of a number"),
    "nothing": (says_nothing, "returns no tensor and changes none"),
    "values": (reads_all, "it reads a tensor as a list"),
    "Python's random": (draws, "draws a number by random.random.* outside"),
    "a seed": (seeds, "sets the state of a random generator"),
    "a count": (Counts(), "computes something else in each call"),
    "a first call": (first_of_all(), "Call the step once or twice before you export it"),
    "a first gradient": (accumulates(), "the gradient of w is there in some calls.* once or twice"),
    "a state": (branches_on_state(), "decides by calls, which varies"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_model_says_is_refused_with_the_line(name, path):
    step, said = REFUSED[name]
    with pytest.raises(CannotExport, match=said) as caught:
        tracejit.to_onnx(step, path, torch.eye(3))
    assert "test_onnx_models.py:" in str(caught.value) and not path.exists()


def test_an_argument_that_the_step_holds_already_is_refused(path):
    """Its model would have one tensor for two: here x - x."""
    x = torch.ones(3, 3)
    keeps_its_argument(x)
    with pytest.raises(CannotExport, match="an argument of it is also in its variables or objects"):
        tracejit.to_onnx(keeps_its_argument, path, x)


def test_a_counter_that_nothing_reads_is_left_out(path):
    def step(x):
        held.calls += 1
        return x * 2

    tracejit.to_onnx(step, path, x := torch.ones(3))
    assert_near(step(x), runner(path)(x.numpy()), 0)


def test_what_is_no_step_is_refused(path):
    with pytest.raises(TypeError, match="tracejit.to_onnx takes a Python function or method"):
        tracejit.to_onnx(math.sin, path, torch.eye(3))

    targeted = tracejit.compile(decides, target="sm_90")
    with pytest.raises(TypeError, match="not TargetedStep"):
        tracejit.to_onnx(targeted, path, torch.eye(3))

    @tracejit.compile(on_unsupported="raise")
    def inside(x):
        tracejit.to_onnx(F.relu, path, x)

    with pytest.raises(tracejit.errors.SideEffectError, match="inside a step that is being traced"):
        inside(torch.eye(3))


def test_what_is_too_large_is_refused(path, monkeypatch):
    monkeypatch.setattr("tracejit.export.onnx.inputs.LIMIT", 100)
    with pytest.raises(CannotExport, match="more than 2 GB"):
        tracejit.to_onnx(nn.Linear(5, 5), path, torch.randn(2, 5))


def test_without_the_package_its_name_is_said(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackage, match=r"pip install 'tracejit\[onnx\]'"):
        tracejit.to_onnx(nn.ReLU(), path, torch.randn(3))


# ---- from a shell


PROGRAM = """
import torch

def make_step():
    w = torch.randn(4, 3, requires_grad=True)
    optimizer = torch.optim.Adam([w])
    x = torch.randn(5, 4)

    def step():
        optimizer.zero_grad()
        loss = (x @ w).pow(2).sum()
        loss.backward()
        optimizer.step()
        return loss

    return step

def decides():
    x = torch.ones(3)
    return x if x.sum() > 0 else -x
"""


def test_the_command_writes_a_model(tmp_path, capsys):
    file, path = tmp_path / "steps.py", tmp_path / "step.onnx"
    file.write_text(PROGRAM)
    assert status("onnx", f"{file}:make_step", "-o", path) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"written to {path}: ") and "opset 20" in said
    assert "outputs: result, w.next, optimizer.state[w].exp_avg.next" in said
    step = runner(path)
    losses = [float(step()) for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert status("onnx", f"{file}:make_step", "-o", tmp_path / "none" / "step.onnx") == 2
    assert "the file cannot be written: " in capsys.readouterr().err
    assert status("onnx", f"{file}:decides", "-o", tmp_path / "no.onnx") == 2
    captured = capsys.readouterr()
    assert "steps.py:20: decides cannot be exported to ONNX" in captured.err
    assert "Traceback" not in captured.err
