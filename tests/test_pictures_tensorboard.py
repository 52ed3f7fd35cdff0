"""The graph of a step as TensorBoard's own readers and its graph plugin see it."""

from __future__ import annotations

import pytest
import torch

import tracejit
from support.pictures import made_up, net_step
from tracejit.pictures.tensorboard import names

pytest.importorskip("tensorboard", reason="needs TensorBoard, of the extra `tensorboard`")

from google.protobuf import text_format
from tensorboard.backend.event_processing import (
    data_provider,
    event_accumulator,
    plugin_event_multiplexer,
)
from tensorboard.compat.proto import graph_pb2, types_pb2
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.graph import graphs_plugin


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A step's picture, the folder that it was written to, and the graph as it is read there."""
    step, _ = net_step()
    logs = tmp_path_factory.mktemp("logs")
    step.to_tensorboard(logs)
    found = event_accumulator.EventAccumulator(str(logs))
    found.Reload()
    return step._picture("H200", measure=False), logs, found.Graph()


def test_the_graph_is_read_back(logged):
    picture, _, graph = logged
    assert len(graph.node) == len(picture.nodes)
    called = [n.name for n in graph.node]
    assert len({*called}) == len(called)
    for shown, node in zip(graph.node, picture.nodes, strict=True):
        (shape,) = shown.attr["_output_shapes"].list.shape
        assert tuple(d.size for d in shape.dim) == node.shape
        assert shown.device == "/device:CPU:0"
        assert list(shown.input) == [called[k] for k in node.operands]
        assert shown.attr["line"].s.decode() == str(node.line)
        if node.dtype == "f32":
            assert shown.attr["dtype"].type == types_pb2.DT_FLOAT


def test_scopes_are_modules(logged):
    _, _, graph = logged
    scopes = {n.name.rpartition("/")[0] for n in graph.node}
    assert {
        "model/blocks/0/0",
        "model/blocks/0/1",
        "model/head",
        "backward/model/blocks/1/0",
        "backward/model/head",
        "update/model/head/weight",
    } <= scopes
    ops = {n.name.rpartition("/")[2]: n.op for n in graph.node if n.name.startswith("model/head/")}
    assert ops["weight"] == ops["bias"] == "Placeholder" and "MatMul" in ops.values()
    names_of_nodes = {n.name for n in graph.node}
    parts = {"/".join(s.split("/")[:k]) for s in scopes for k in range(1, 9)}
    assert not names_of_nodes & parts  # else TensorBoard draws a node as a scope


def test_the_graph_tab_shows_it(logged):
    """What the tab's page asks the plugin for."""
    _, logs, graph = logged
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logs))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(logs))
    context = base_plugin.TBContext(logdir=str(logs), data_provider=provider)
    plugin = graphs_plugin.GraphsPlugin(context)
    (run,) = plugin.info_impl(RequestContext(), "").values()
    assert run["run_graph"]
    body, kind = plugin.graph_impl(RequestContext(), run["run"], None, False, "")
    shown = text_format.Parse(body, graph_pb2.GraphDef())
    assert kind == "text/x-protobuf" and [n.name for n in shown.node] == [
        n.name for n in graph.node
    ]


def test_names_are_valid_and_unique():
    import re

    found = names(made_up(400))
    assert len({*found}) == 400
    assert all(re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9_.\\/-]*", name) for name in found)


def test_the_command_writes_it(tmp_path, capsys):
    from support.command_line import status

    file = tmp_path / "steps.py"
    file.write_text("import torch\nx = torch.ones(3)\ndef step():\n    return (x * 2).exp()\n")
    logs = tmp_path / "logs"
    assert status("draw", f"{file}:step", "--tensorboard", logs) == 0
    assert capsys.readouterr().out == f"written to {logs}\n"
    found = event_accumulator.EventAccumulator(str(logs))
    found.Reload()
    assert {n.op for n in found.Graph().node} >= {"mul", "exp", "Placeholder"}


def test_a_step_without_modules(tmp_path):
    w = torch.randn(3, requires_grad=True)

    @tracejit.compile
    def step(x):
        loss = (x * w).sum()
        loss.backward()
        return loss

    step(torch.randn(3))
    step.to_tensorboard(tmp_path)
    found = event_accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    assert {n.name for n in found.Graph().node} >= {"x", "w"}
