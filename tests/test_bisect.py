"""`python -m tracejit bisect`: planted faults and crashes are shrunk to a call, and a step that is
right is left alone."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tracejit
from support.faults import FAULTS
from tracejit.__main__ import main
from tracejit.bisecting import bisected
from tracejit.equality import array_of
from tracejit.ir.text import parse
from tracejit.runtime.c_compiler import find_compiler
from tracejit.verify.children import in_child
from tracejit.verify.recording import Program, recorded
from tracejit.verify.shrink import (
    Judge,
    fewer_calls,
    graph_of,
    is_refusal,
    smaller_sizes,
    smallest_graph,
    symptom,
)

TESTS = Path(__file__).parent
STEP = """\
import sys

sys.path.insert(0, {tests!r})
from support.planted import planted_step


def make():
    return planted_step({fault!r})
"""
RUN = """\
import runpy, sys

sys.path.insert(0, {tests!r})
from support.planted import plant

if {fault!r}:
    plant({fault!r})
runpy.run_path("small.py", run_name="__main__")
"""


def run(folder: Path, *command: str, cache: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRACEJIT_CACHE": str(folder / cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=400,
    )


def bisect(folder: Path, fault: str, *more: str) -> subprocess.CompletedProcess:
    (folder / "steps.py").write_text(STEP.format(tests=str(TESTS), fault=fault))
    return run(
        folder,
        "-m",
        "tracejit",
        "bisect",
        "steps.py:make",
        "-o",
        "small.py",
        *more,
        cache="planted",
    )


# ---- the command. Each case: a fault, how it ends, what stands in the program, nodes of the graph.

slow = pytest.mark.slow
CASES = [
    pytest.param("a - b is b - a", "differs", r"a\.sub\(0\.25\)", 1, marks=slow),
    pytest.param("tanh's derivative is 1 + y²", "differs", r"torch\.tanh\(a\)", 7, marks=slow),
    pytest.param(
        "a kernel reads at address 8", "dies by SIGSEGV", r"torch\.tanh\(a\)", 1, marks=slow
    ),
    pytest.param(
        "sums print as differences", "differs", r"torch\.\w+\(a\)|a\.\w+\(", 1, marks=slow
    ),
    pytest.param("tril keeps one diagonal more", "differs", r"torch\.tril\(a\)", 12, marks=slow),
    pytest.param("slices begin one too early", "differs", r"a\[.*:.*\]", 1, marks=slow),
    pytest.param("the last write is dropped", "differs", r"a\.\w+_\(|a = ", 3, marks=slow),
    pytest.param(
        *("a view's write does not reach its base", "differs", r"\.\w+_\(|\] = "), 3, marks=slow
    ),
    pytest.param("a lowering fails", "raises KeyError", r"torch\.tanh\(a\)", 1, marks=slow),
    pytest.param("a kernel is no C", "raises CompilationFailed", r"tanh\(a\)", 1, marks=slow),
]


@pytest.mark.parametrize("fault, ends, pattern, nodes", CASES)
def test_a_planted_fault_becomes_a_program_of_a_call(fault, ends, pattern, nodes, tmp_path):
    if find_compiler() is None:
        pytest.skip("there is no C compiler")
    done = bisect(tmp_path, fault)
    assert done.returncode == 1, done.stdout + done.stderr
    text = (tmp_path / "small.py").read_text()
    assert text in done.stdout and f"Compiled, this {ends}" in text
    body = text.partition("def step(")[2].partition("    return")[0]
    calls = body.splitlines()[1:]
    assert 1 <= len(calls) <= 3 and re.search(pattern, body), body
    assert all(re.search(r"  # faults\.py:\d+$", call) for call in calls), "the user's lines"
    shown = re.search(r"the graph, (\d+) of \d+ nodes:\n(.*?\n\})\n", done.stdout, re.DOTALL)
    assert len(parse(shown[2]).nodes) == int(shown[1]) <= nodes, shown[0]
    assert all(int(n) <= 6 for n in re.findall(r"randn\((\d+)", text)), "small tensors"

    wrong = run(tmp_path, "-c", RUN.format(tests=str(TESTS), fault=fault), cache="again")
    if ends.startswith("dies"):
        assert wrong.returncode == -signal.SIGSEGV
    else:
        kind = "AssertionError" if ends == "differs" else ends.split()[1]
        assert wrong.returncode == 1 and kind in wrong.stderr.splitlines()[-1] + wrong.stderr
    right = run(tmp_path, "-c", RUN.format(tests=str(TESTS), fault=""), cache="right")
    assert right.returncode == 0 and right.stdout == "equal to eager\n", right.stderr


def test_a_fault_in_a_small_step(tmp_path):
    """The same in this process, from which children are forked."""
    fault = next(f for f in FAULTS if f.name == "a - b is b - a")
    x, w = torch.arange(6.0).reshape(2, 3), torch.ones(3, 3, requires_grad=True)

    def step() -> torch.Tensor:
        loss = (x @ w - 0.25).exp().sum()
        loss.backward()
        return loss.detach()

    path = tmp_path / "small.py"
    with fault.plant():
        found = bisected(tracejit.compile(step, backend="numpy"), 60.0, path)
    assert found.wrong.symptom == "differs" and found.wrong.call == 0 and found.calls[1] == 1
    assert re.search(r"b = a\.sub\(0\.25\)  # test_bisect\.py:\d+", found.program)
    assert [node.op.name for node in parse(found.graph).nodes] == ["sub"]
    path.write_text(found.program)

    def run_it() -> None:
        runpy.run_path(str(path), run_name="__main__")

    assert in_child(run_it, 60).raised is None
    with fault.plant():
        assert symptom(in_child(run_it, 60)) == "differs"


def test_of_a_step_that_is_right_nothing_differs(tmp_path, monkeypatch, capsys):
    (tmp_path / "steps.py").write_text(STEP.format(tests=str(TESTS), fault=""))
    monkeypatch.chdir(tmp_path)
    assert main(["bisect", "steps.py:make", "-o", "small.py"]) == 0
    assert capsys.readouterr().out == "nothing differs\n"
    assert not (tmp_path / "small.py").exists()


@pytest.mark.slow
def test_a_fault_of_replays_is_told_and_not_shrunk(tmp_path):
    done = bisect(tmp_path, "a replay draws one number more", "--seconds", "10")
    assert done.returncode == 1 and "was not shrunk" in done.stdout, done.stdout + done.stderr
    assert "a replay of plan" in done.stdout and not (tmp_path / "small.py").exists()


def test_a_refused_step_and_one_that_raises_by_itself(tmp_path, monkeypatch, capsys):
    text = """\
import torch, tracejit

@tracejit.compile(backend="numpy")
def refused():
    return torch.linalg.eig(torch.eye(2))

@tracejit.compile(backend="numpy")
def raises():
    raise LookupError("mine")
"""
    (tmp_path / "steps.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for name, said in {
        "refused": "the step is refused, and runs eagerly",
        "raises": "the step itself raises LookupError: mine",
    }.items():
        assert main(["bisect", f"steps.py:{name}"]) == 0
        assert said in capsys.readouterr().out


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["bisect", "--help"])
    assert "python -m tracejit bisect examples/two_layer_autograd.py:make_step" in (
        capsys.readouterr().out
    )


# ---- children


def test_how_children_end():
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    assert in_child(lambda: [1, torch.ones(2)], 20).value[0] == 1
    assert in_child(kill, 20).died == "dies by SIGSEGV"
    assert in_child(lambda: os._exit(3), 20).died == "ends with status 3"
    started = time.monotonic()
    assert in_child(lambda: time.sleep(60), 0.3).died == "hangs"
    assert time.monotonic() - started < 20
    error = in_child(lambda: {}["absent"], 20).raised
    assert (error.kind, error.function, error.module) == ("KeyError", "", "")
    assert error.trace.rstrip().endswith("KeyError: 'absent'")
    assert symptom(in_child(lambda: parse("nothing"), 20)) == "raises InvalidGraph in _parse"


def test_a_child_changes_nothing_here():
    seen = []
    assert in_child(lambda: seen.append(1) or len(seen), 20).value == 1
    assert not seen


def test_refusals_are_no_crashes():
    assert is_refusal("UnsupportedOperation") and is_refusal("ShapeError")
    assert not is_refusal("InvalidGraph") and not is_refusal("CompilationFailed")


# ---- programs


def without_places(program: Program) -> str:
    """A program's text without the lines of this file."""
    return re.sub(r"  # test_bisect.py:\d+", "", program.text())


def recorded_program() -> Program:
    w = torch.arange(6.0).reshape(2, 3).requires_grad_()
    x = torch.ones(4, 2)

    def step():
        h = torch.relu(x @ w)
        a, b = h.split([1, 2], dim=1)
        table = torch.zeros(4)
        table[1:3] = a[::2, 0].detach()
        loss = (b.sum() * 2.0).mean()
        (g,) = torch.autograd.grad(loss, w)
        with torch.no_grad():
            w.sub_(g * 0.5)
        return loss.item() if h.shape[0] == 4 else None

    return recorded(step)


def test_a_program_is_what_the_step_does():
    program = recorded_program()
    text = without_places(program)
    assert text == (
        "def step(a, b):\n"
        "    c = a.matmul(b)\n"
        "    d = torch.relu(c)\n"
        "    e, f = d.split([1, 2], dim=1)\n"
        "    g = torch.zeros(4)\n"
        "    h = e[::2, 0]\n"
        "    i = h.detach()\n"
        "    g[1:3] = i\n"
        "    j = f.sum()\n"
        "    k = j.mul(2.0)\n"
        "    l = k.mean()\n"
        "    (m,) = torch.autograd.grad((l,), (b,), allow_unused=False)\n"
        "    with torch.no_grad():\n"
        "        n = m.mul(0.5)\n"
        "        b.sub_(n)\n"
        "    return g\n"
    )
    space = {"torch": torch}
    exec(text, space)
    x, w = program.arguments()
    assert w.requires_grad and not x.requires_grad
    space["step"](x, w)
    assert torch.equal(w, torch.arange(6.0).reshape(2, 3) - torch.tensor([0.0, 4.0, 4.0]))


SCALE = 3.0


def scaled(x):
    return x * SCALE


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, more: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3 + more

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return scaled(x * x) * g, None  # a comment


def test_custom_functions_and_autocast_are_written_down():
    w = torch.ones(2, 2, requires_grad=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            h = w @ w
        loss = Cubed.apply(h.float(), 1.0).sum()
        loss.backward()
        return loss

    program = recorded(step)
    text = without_places(program)
    assert text == (
        "SCALE = 3.0\n\n\n"
        "def scaled(x):\n    return x * SCALE\n\n\n"
        "class Cubed(torch.autograd.Function):\n\n"
        "    @staticmethod\n"
        "    def forward(ctx, x, more):\n"
        "        ctx.save_for_backward(x)\n"
        "        return x ** 3 + more\n\n"
        "    @staticmethod\n"
        "    @torch.autograd.function.once_differentiable\n"
        "    def backward(ctx, g):\n"
        "        x, = ctx.saved_tensors\n"
        "        return (scaled(x * x) * g, None)\n\n\n"
        "def step(a):\n"
        '    with torch.autocast("cpu", torch.bfloat16):\n'
        "        b = a.matmul(a)\n"
        "    c = b.float()\n"
        "    d = Cubed.apply(c, 1.0)\n"
        "    e = d.sum()\n"
        "    e.backward()\n"
        "    return e\n"
    )
    wanted, w.grad = w.grad, None
    space = {"torch": torch}
    exec(text, space)
    (a,) = program.arguments()
    space["step"](a)
    assert torch.equal(a.grad, wanted)
    small = program.of([call for call in program.calls if "float" in call.text])
    assert small.text().startswith("def step(") and small.classes


def test_a_function_that_has_no_text_is_an_input_of_what_follows():
    by = object()

    class Local(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2 if by else x

        @staticmethod
        def backward(ctx, g):
            return g * 2

    w = torch.ones(2, requires_grad=True)
    program = recorded(lambda: Local.apply(w).exp().sum())
    assert [call.text for call in program.calls] == ["{0}.exp()", "{0}.sum()"]
    assert program.arguments()[0].tolist() == [2.0, 2.0] and program.arguments()[0].requires_grad


class Told(Judge):
    """Judges a program by its text, and a graph by its text, without running them."""

    def __init__(self, needed: tuple[str, ...]):
        super().__init__({"backend": "numpy", "fuse": True}, float("inf"), None)
        self.__dict__.update(needed=needed, asked=[])

    def of_program(self, program, arguments=None) -> str:
        self.asked.append(1)
        return "differs" if all(x in program.text() for x in self.needed) else ""

    def of_graph(self, graph, inputs) -> str:
        self.asked.append(1)
        return "differs" if all(f"= {x}(" in str(graph) for x in self.needed) else ""


@pytest.mark.parametrize("needed", [("relu",), ("matmul", ".mul(2.0)"), ("split", "[1:3]", "sub_")])
def test_calls_that_are_not_needed_are_left_out(needed):
    judge = Told(needed)
    small = fewer_calls(recorded_program(), "differs", judge)
    assert len(small.calls) == len(needed) and all(x in small.text() for x in needed)
    assert len(judge.asked) < 80
    compile(small.text(), "small", "exec")


def test_sizes_become_small():
    judge = Told(("matmul",))
    small = smaller_sizes(recorded_program(), "differs", judge)
    assert all(n == 1 for x in small.arguments() for n in x.shape)


def test_a_graph_loses_nodes():
    def step(x, y):
        return (x * y).exp().sum() + (x - y).tanh().sum(), (x + 1).log()

    x, y = torch.ones(3, 2), torch.full((3, 2), 0.5)
    text, inputs = graph_of(lambda: step(x, y))
    judge = Told(("tanh",))
    small, few, what = smallest_graph(text, inputs, judge)
    (node,) = parse(small).nodes
    assert what == "differs" and node.op.name == "tanh"
    assert few[0].tolist() == [[0.5, 0.5]] * 3
    assert smallest_graph(text, inputs, Told(("sin",))) == (text, inputs, "")
    two, _, _ = smallest_graph(text, inputs, Told(("tanh", "reduce_sum")))
    assert {n.op.name for n in parse(two).nodes} == {"tanh", "reduce_sum"}
    assert array_of(x).shape == (3, 2)
