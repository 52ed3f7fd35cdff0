"""What the nodes of a graph know of where they come from: line, function, module, phase."""

from __future__ import annotations

import torch
from torch import nn

import tracejit
from tracejit.capture.trace.location import Line
from tracejit.ir.graph import Graph


class Twice(nn.Module):
    """One linear layer that is called two times, with an activation in between."""

    def __init__(self):
        super().__init__()
        self.layer, self.act = nn.Linear(3, 3), nn.Sequential(nn.Tanh())

    def forward(self, x):
        return self.layer(self.act(self.layer(x)))


def graph_of(step, *args, calls: int = 1) -> Graph:
    compiled = tracejit.compile(step)
    for _ in range(calls):
        compiled(*args)
    return compiled.graph


def found(graph: Graph, what: str) -> list[object]:
    """A field of the nodes' lines, without repetitions next to each other."""
    values = [getattr(node.where, what) for node in graph.nodes]
    return [v for i, v in enumerate(values) if not i or v != values[i - 1]]


def test_a_line_knows_file_function_and_module():
    model = Twice()
    graph = graph_of(lambda x: model(x).sum(), torch.randn(2, 3))
    ways = ["layer", "act.0", "layer", None]
    assert [m and m[2] for m in found(graph, "module")] == ways
    assert {m[:2] for m in found(graph, "module") if m} == {(0, "Twice")}
    assert [m and m[3] for m in found(graph, "module")] == ["Linear", "Tanh", "Linear", None]
    assert set(found(graph, "file")) == {__file__}
    functions = [f.rpartition(".")[2] for f in found(graph, "function")]
    assert functions == ["forward", "<lambda>"]


def test_a_derivative_stands_in_the_module_of_what_it_is_of():
    model = Twice()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x):
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    for calls in (1, 4):  # the lines are those of the first trace
        graph = graph_of(step, torch.randn(2, 3), calls=calls)
        phases = found(graph, "phase")
        assert phases == ["", "backward", "update"]
        late = [n.where for n in graph.nodes if n.where.phase == "backward"]
        ways = [line.module and line.module[2] for line in late]
        changes = [w for i, w in enumerate(ways) if not i or w != ways[i - 1]]
        assert changes == [None, "layer", "act.0", "layer"]  # that of the sum stands in no module
        assert {*late} == {late[0]} and late[0].function.endswith("step")  # the backward's line


def test_models_are_told_apart():
    one, other = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3))
    graph = graph_of(lambda x: other(one(x)), torch.randn(2, 3))
    modules = found(graph, "module")
    assert modules == [(k, "Sequential", "0", "Linear") for k in (0, 1)]


def test_what_is_called_outside_the_step_is_no_module_of_it():
    inner = tracejit.compile(lambda x: x.exp())

    class Outer(nn.Module):
        def forward(self, x):
            return inner(x)

    Outer()(torch.randn(3))
    assert found(inner.graph, "module") == [None]


def test_a_line_is_its_text():
    line = Line("step.py:3").changed(phase="backward")
    assert line == "step.py:3" and hash(line) == hash("step.py:3") and f"{line}" == "step.py:3"
    assert line.phase == "backward" and line.module is None and Line("a").phase == ""
