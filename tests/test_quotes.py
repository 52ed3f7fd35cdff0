"""Messages quote the user's line, with carets under the call."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref
from pathlib import Path
from types import FunctionType

import pytest
import torch

import tracejit
from tracejit import errors, quotes
from tracejit.errors import ShapeError, TracejitError, TracejitWarning, UnsupportedOperation

BINARY = """\
import torch

def step(x):
    y = x * 2.0
    return (y.exp() + torch.ones(7)).sum()
"""
LINES = """\
import torch

def step(x):
    return torch.cat(
        [x, torch.ones(2, 2)],
        dim=0,
    )
"""
ATTRIBUTE = """\
import torch

def step(x):
    \tä = "漢字"; return x.view(5)
"""
IN_PLACE = """\
def step(x):
    x += x.new_ones(9)
"""
INDEX = """\
def step(x):
    return [x[i] for i in (0, 1, 8)]
"""
ALONE = """\
def step(x):
    x.reshape(77)
"""
LATER = """\
def step(x):
    return x.new_zeros(2, 2).index_select(0, x.new_ones(1).mul(7).long())
"""
OUTSIDE = """\
import torch

total, w = torch.zeros(3), torch.ones(3, requires_grad=True)

def step(x):
    total.add_(w)
    with torch.no_grad():
        total.mul_(2)
    return x * 2
"""
OF_A_VALUE = """\
import torch

def step(x):
    y = x.exp().reshape(3, 1)[x.sum().long().clamp(0, 2)]
    return (y, x * 2)
"""
HOOKED = """\
def step(x):
    y = x.detach().clone().requires_grad_()
    y.register_hook(lambda g: g * 2)
    z = x * 2
    return y
"""
# A step, and the two lines that its message ends with.
QUOTED = {
    "an operator": (
        BINARY,
        "    return (y.exp() + torch.ones(7)).sum()\n            ^^^^^^^^^^^^^^^^^^^^^^^",
    ),
    "a call of several lines": (LINES, "    return torch.cat(\n           ^^^^^^^^^^"),
    "wide characters": (
        ATTRIBUTE,
        '    ä = "漢字"; return x.view(5)\n                       ^^^^^^^^^',
    ),
    "in place": (IN_PLACE, "    x += x.new_ones(9)\n    ^^^^^^^^^^^^^^^^^^"),
    "an index": (INDEX, "    return [x[i] for i in (0, 1, 8)]\n            ^^^^"),
    "a whole line": (ALONE, "    x.reshape(77)\n    ^^^^^^^^^^^^^"),
    "a write, when the step is over": (OUTSIDE, "    total.add_(w)\n    ^^^^^^^^^^^^^"),
    "a view, when the step is over": (
        OF_A_VALUE,
        "    y = x.exp().reshape(3, 1)[x.sum().long().clamp(0, 2)]\n"
        "        ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^",
    ),
    "a leaf, when the step is over": (
        HOOKED,
        "    y = x.detach().clone().requires_grad_()\n        ^^^^^^^^^^^^^^^^^^",
    ),
    "a check of values": (
        LATER,
        "    return x.new_zeros(2, 2).index_select(0, x.new_ones(1).mul(7).long())\n"
        "           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^",
    ),
}


def load(text: str, path: Path) -> FunctionType:
    path.write_text(text)
    names: dict = {}
    exec(compile(text, str(path), "exec"), names)
    return names["step"]


def raised(step: FunctionType) -> TracejitError:
    step = tracejit.compile(step, backend="numpy", on_unsupported="raise")
    with pytest.raises(TracejitError) as caught:
        step(torch.ones(3))
    return caught.value


@pytest.mark.parametrize("name", QUOTED)
def test_messages_end_with_the_line_and_carets(name: str, tmp_path):
    text, wanted = QUOTED[name]
    error = raised(load(text, tmp_path / "user.py"))
    said, *shown = str(error).split("\n", 1)
    assert said == error.text and f"{tmp_path / 'user.py'}:" in said
    assert shown == [wanted]


def test_the_carets_are_those_of_python_where_it_has_any(tmp_path):
    """Python's own traceback of the same program, in eager, points at the same columns."""
    import traceback

    for name in ("an operator", "a call of several lines", "an index"):
        step = load(QUOTED[name][0], tmp_path / f"{len(name)}.py")
        with pytest.raises((RuntimeError, IndexError)) as caught:
            step(torch.ones(3))
        frame = traceback.extract_tb(caught.value.__traceback__)[-1]
        text = "".join(traceback.StackSummary.from_list([frame]).format())
        own = text.splitlines()[1:3]
        ours = str(raised(step)).splitlines()[-2:]
        assert own[0].strip() == ours[0].strip()
        if len(own) > 1:
            assert len(own[1].rstrip()) == len(ours[1]) and len(own[1].strip()) == len(
                ours[1].strip()
            )


def test_a_line_without_source_is_not_quoted():
    names: dict = {}
    exec(compile("def step(x):\n    return x.view(5)\n", "<cell 1>", "exec"), names)
    error = raised(names["step"])
    assert str(error) == error.text and error.text.startswith("<cell 1>:2: ")


def test_a_changed_file_is_not_quoted(tmp_path):
    path = tmp_path / "user.py"
    step = load(ALONE, path)
    path.write_text("def other(y):\n    y.flatten()\n")
    assert "\n" not in str(raised(step))
    path.write_text("# gone\n")
    assert "\n" not in str(raised(step))
    path.unlink()
    assert "\n" not in str(raised(step))


def test_a_private_name_and_columns_that_are_missing(tmp_path):
    text = "class A:\n    def __f(self, x):\n        return x.view(5)\n"
    text += "    def f(self, x):\n        return self.__f(x).view(1, 1, 8)\n"
    step = load(text + "def step(x):\n    return A().f(x)\n", tmp_path / "user.py")
    assert str(raised(step)).endswith("\n    return x.view(5)\n           ^^^^^^^^^")
    code = load("def step(x):\n    return x.view(5)\n", tmp_path / "b.py").__code__
    place = quotes.at(code, 0, 2)
    assert quotes.quote(place).count("\n") in (0, 2)

    class Known:  # as code is that was compiled with -X no_debug_ranges
        co_filename = code.co_filename

        def co_positions(self):
            yield (2, None, None, None)

    place.code, place.offset = Known(), 0
    assert quotes.quote(place) == "\n    return x.view(5)"


def test_warnings_quote_it_too(tmp_path):
    text = "import torch\n\ndef step(x):\n    return torch.linalg.eig(x.view(1, 1)) and x\n"
    step = tracejit.compile(
        load(text, tmp_path / "user.py"), backend="numpy", on_unsupported="eager"
    )
    with pytest.warns(TracejitWarning) as caught:
        step(torch.ones(1))
    wanted = "\n    return torch.linalg.eig(x.view(1, 1)) and x\n           ^^^^^^^^^^^^^^^^^^"
    assert wanted in str(caught[0].message)
    assert "\n" not in step.explain_mode()


def test_errors_can_be_pickled_and_quote_their_line_elsewhere(tmp_path):
    error = raised(load(BINARY, tmp_path / "user.py"))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ShapeError and str(again) == str(error) and again.text == error.text
    (tmp_path / "user.py").unlink()
    assert str(again).endswith("^^^") and "\n" not in str(error)
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, TracejitError):
            error = kind.__new__(kind)
            error.fields, error.args = {}, ("what was said",)
            assert "what was said" in str(error)


def test_an_error_that_nobody_asks_reads_no_file(monkeypatch):
    """Steps that look up class targets make an error in each trace, to be raised by later calls."""
    asked = []
    monkeypatch.setattr(errors, "quote", lambda where: asked.append(where) or quotes.quote(where))

    def step(x, y):
        return torch.nn.functional.cross_entropy(x, y)

    step = tracejit.compile(step, backend="numpy")
    for _ in range(4):
        step(torch.ones(2, 3), torch.tensor([0, 2]))
    with pytest.raises(tracejit.errors.AxisError) as caught:
        step(torch.ones(2, 3), torch.tensor([0, 7]))
    assert step.stats.replays and not asked
    wanted = f"\n    return torch.nn.functional.cross_entropy(x, y)\n{' ' * 11}{'^' * 39}"
    assert str(caught.value).endswith(wanted) and asked


def test_an_error_holds_no_frame(tmp_path):
    """A place keeps code, so that tensors of a failed call are free once the traceback is."""

    def step(x):
        return x.view(5)

    step = tracejit.compile(step, backend="numpy", on_unsupported="raise")
    x = torch.ones(3)
    seen = weakref.ref(x)
    with pytest.raises(TracejitError) as caught:
        step(x)
    error = caught.value.with_traceback(None)
    del x, caught
    error.__context__ = error.__cause__ = None
    gc.collect()
    assert seen() is None and "x.view(5)" in str(error)


def test_unsupported_operations_name_the_call_among_several_of_a_line(tmp_path):
    text = "import torch\n\ndef step(x):\n    return x.exp(), torch.fft.fft(x.exp()), x.log()\n"
    error = raised(load(text, tmp_path / "user.py"))
    assert type(error) is UnsupportedOperation
    shown, carets = str(error).splitlines()[-2:]
    assert shown[carets.index("^") : carets.index("^") + carets.count("^")] == (
        "torch.fft.fft(x.exp())"
    )


def test_nothing_is_warned_where_nothing_is_refused():
    step = tracejit.compile(lambda x: x + 1, backend="numpy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(torch.ones(2))
