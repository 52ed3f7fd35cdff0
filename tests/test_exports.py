"""The programs of the table through every export: each file is read by what it was made for, and
trains on as the step does.

Saved steps of these in another process are in test_saved_elsewhere.py, ONNX models in test_onnx.py.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from xml.etree import ElementTree

import pytest
import torch

import tracejit
from support.browser import check_drawing, chromium, opened
from support.pictures import overlapping
from support.saved_steps import STEPS, Saved
from tracejit.testing import losses_agree

CALLS = 20
QUICK = ("by_hand", "two_layers", "classifier", "custom_function", "dynamic", "block")
QUICK += ("recurrent",)
SLOW = ("gpt", "alex", "resnet18")
PROGRAMS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]

IN_A_BROWSER = [
    name if name == "classifier" else pytest.param(name, marks=pytest.mark.slow)
    for name in (*QUICK, *SLOW)
]


@dataclass
class Ready:
    """A step that is replayed, and the arguments of its n-th call from here; all of one kind."""

    case: Saved
    step: Callable
    args: Callable[[int], tuple]


@pytest.fixture(params=PROGRAMS, scope="module")
def ready(request) -> Ready:
    case = STEPS[request.param]()
    args = lambda i: case.args(case.kinds * i + case.kinds - 1)  # noqa: E731
    step = tracejit.compile(case.step)
    for i in range(5):
        step(*args(i))
    assert step.stats.replays
    return Ready(case, step, args)


def flat(x: object) -> list:
    """The numbers in what a step is given, or returns."""
    if isinstance(x, dict):
        x = tuple(x.values())
    return [leaf for item in x for leaf in flat(item)] if isinstance(x, tuple) else [x]


@pytest.mark.sweep(0.34)
def test_saved_and_loaded(ready, tmp_path):
    ready.step.save(tmp_path / "a.step")
    loaded = tracejit.load(tmp_path / "a.step")
    first = None
    for i in range(CALLS):
        torch.manual_seed(i)
        theirs = flat(ready.case.step(*ready.args(i)))
        torch.manual_seed(i)
        ours = flat(loaded(*ready.args(i)))
        first = theirs if first is None else first
        for a, b, one in zip(ours, theirs, first, strict=True):
            assert losses_agree(float(a), float(b), float(one))
    found = loaded.state_dict()
    for name, expected in ready.case.state().items():
        difference = (found[name].double() - expected.double()).norm()
        assert difference <= 1e-4 * (1e-3 + expected.double().norm()), name


@pytest.mark.sweep(0.34)
def test_ejected(ready, tmp_path):
    """The bits are the step's, for twenty calls."""
    ready.step.eject(tmp_path / "ejected.py")
    ready.step.save(tmp_path / "a.step")
    spec = importlib.util.spec_from_file_location("ejected", tmp_path / "ejected.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    other = module.Step(tracejit.load(tmp_path / "a.step").state_dict())
    for i in range(CALLS):
        torch.manual_seed(i)
        ours = flat(ready.step(*ready.args(i)))
        torch.manual_seed(i)
        found = flat(other(*ready.args(i)))
        for a, b in zip(ours, found, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for name, tensor in ready.case.state().items():
        assert torch.equal(other.state[name], tensor), name


@pytest.mark.sweep(0.34)
def test_drawn(ready, tmp_path):
    """The page has every node, with its place and the kernels that compute it; the drawing for a
    paper is XML, whose boxes lie apart."""
    ready.step.draw(tmp_path / "step.html", measure=False)
    ready.step.draw(tmp_path / "step.svg", measure=False)
    picture = ready.step._picture("H200", measure=False)
    text = (tmp_path / "step.html").read_text()
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1]
    said = json.loads(data)
    assert len(said["nodes"]) == len(picture.nodes) > 10
    assert len(said["kernels"]) == len(picture.kernels)
    host = [n for n in picture.nodes if n.type.endswith("@host")]
    computed = [n for n in picture.nodes if not (n.is_input or n.free or n in host)]
    assert all(n.kernels and n.line.number for n in computed)
    assert {n.lane for n in picture.nodes} == {"forward", "backward", "update"}
    space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(tmp_path / "step.svg").getroot()
    boxes = [
        tuple(float(r.get(key)) for key in ("x", "y", "width", "height"))
        for r in root.iter(f"{space}rect")
        if r.get("class") == "box"
    ]
    assert len(boxes) >= 10 and not overlapping(boxes)


@pytest.mark.parametrize("ready", IN_A_BROWSER, indirect=True)
def test_in_a_browser(ready, tmp_path):
    """No script fails, and nothing overlaps; with all groups open too."""
    chromium()
    ready.step.draw(tmp_path / "step.html", measure=False)
    check_drawing(opened(tmp_path / "step.html"))
    script = "document.getElementById('open').click();"
    check_drawing(opened(tmp_path / "step.html", script))


@pytest.mark.sweep(0.34)
def test_in_tensorboard(ready, tmp_path):
    """Its own reader finds each node, its operands, and no name that is a scope too."""
    needed = "tensorboard.backend.event_processing.event_accumulator"
    reader = pytest.importorskip(needed, reason="the extra tensorboard is not installed")
    ready.step.to_tensorboard(tmp_path)
    found = reader.EventAccumulator(str(tmp_path))
    found.Reload()
    graph, picture = found.Graph(), ready.step._picture("H200", measure=False)
    called = [n.name for n in graph.node]
    assert len({*called}) == len(called) == len(picture.nodes)
    scopes = {"/".join(n.split("/")[:k]) for n in called for k in range(1, n.count("/") + 1)}
    assert not scopes & {*called}
    for shown, node in zip(graph.node, picture.nodes, strict=True):
        assert list(shown.input) == [called[k] for k in node.operands]
        (shape,) = shown.attr["_output_shapes"].list.shape
        assert tuple(d.size for d in shape.dim) == node.shape
