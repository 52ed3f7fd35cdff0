"""`type(x)` and `x.__class__` of intermediates say what eager says, also in libraries."""

from __future__ import annotations

import sys
import textwrap
from types import ModuleType

import pytest
import torch
from torch import nn

import tracejit

LIBRARY = """
import torch
from torch import nn

def checked(x):
    assert type(x) is torch.Tensor and type(x) in (torch.Tensor, nn.Parameter)
    return {torch.Tensor: 2.0, nn.Parameter: 3.0}[type(x)] * x

class Layer(nn.Module):
    def forward(self, x):
        assert type(self) is Layer and type(x) == torch.Tensor and x.__class__ is torch.Tensor
        return checked(x + 1)
"""


@pytest.fixture
def library(monkeypatch):
    """A module that is imported by another one, which the tests use."""
    inner, outer = ModuleType("inner_library"), ModuleType("outer_library")
    for module in (inner, outer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(textwrap.dedent(LIBRARY), "inner_library.py", "exec"), vars(inner))
    outer.build = lambda: nn.Sequential(nn.Linear(3, 3), outer.Layer())
    outer.build.__module__ = outer.__name__
    outer.Layer = inner.Layer
    return outer


def test_in_the_step():
    names = []

    def step(x, scale=0.5):
        y = x * 2
        assert type(y) is torch.Tensor and y.__class__ is torch.Tensor and type(x) is torch.Tensor
        assert type(scale) is float and type(type(y)) is type(torch.Tensor)
        assert isinstance(torch.Tensor, type) and not isinstance(y, type) and type == type  # noqa
        assert issubclass(type(torch.Tensor), type) and type(y)(2).shape == (2,)
        names.append(type("Named", (), {"a": 1}).a)
        return y * scale

    compiled = tracejit.compile(step)
    x = torch.randn(3)
    for _ in range(4):
        assert torch.equal(compiled(x), step(x))
    assert "type" not in globals()


def test_in_a_library(library):
    torch.manual_seed(0)
    globals()["build"] = library.build  # as an import at the top would
    try:
        model = build()  # noqa: F821

        def step(x):
            return model(x).sum(), checked_weight(model[0].weight)

        compiled = tracejit.compile(step)
        for _ in range(4):
            x = torch.randn(2, 3)
            torch.testing.assert_close(compiled(x), step(x))
        assert compiled.stats.replays > 0
    finally:
        del globals()["build"]
    assert all("type" not in vars(sys.modules[name]) for name in ("inner_library", __name__))


def checked_weight(w):
    if type(w) is nn.Parameter and w.__class__ is nn.Parameter and type(w.data) is torch.Tensor:
        return w.sum()
    raise TypeError


def test_it_goes_when_the_step_raises():
    @tracejit.compile
    def step(x):
        assert type(x * 2) is torch.Tensor
        raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError):
            step(torch.ones(2))
        assert "type" not in globals()


def test_a_name_of_the_users_stays():
    namespace = {"torch": torch}
    exec("def type(x):\n    return 'mine'\ndef step(x):\n    return x * len(type(x))", namespace)
    mine = namespace["type"]
    assert tracejit.compile(namespace["step"])(torch.ones(1)).item() == 4
    assert namespace["type"] is mine


def test_a_step_inside_a_step():
    inner = tracejit.compile(lambda x: x + (type(x * 1) is torch.Tensor))

    @tracejit.compile
    def outer(x):
        return inner(x) + (type(x) is torch.Tensor) + (type(x * 1) is torch.Tensor)

    for _ in range(3):
        assert outer(torch.zeros(1)).item() == 3
    assert inner(torch.zeros(1)).item() == 1 and "type" not in globals()


def test_what_is_imported_does_not_count():
    """An imported class that uses `type` and `float` leaves `float` of a module as it is replaced:
    the number that the step makes of a value is followed."""
    library = ModuleType("library")
    exec(
        "class Kind:\n    def of(self, x):\n        return float if type(x) is float else x\n",
        library.__dict__,
    )
    module = ModuleType("user_of_library")
    module.Kind = library.Kind
    code = "def step(x, y):\n    n = float((x * y).sum())\n    return x * n\n"
    exec(code, module.__dict__)
    step = tracejit.compile(module.step)
    for k in range(5):
        y = torch.full((3,), float(k))
        assert step(torch.ones(3), y).tolist() == [3.0 * k] * 3
    assert step.stats.replays >= 2
