"""Which layers of tests find which planted faults.

    PYTHONPATH=tests python -m support.blindness [--fault NAME …] [--out FILE]

Each layer is a fixed, small choice of its tests, and finds a fault if one of them fails while it is
planted. Collected once; each fault is planted in a process of its own, forked from there, in which
a layer ends with its first failure. Without a fault all of them pass, or an error says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: threads outlive no fork
TESTS = Path(__file__).parents[1]
_OPS = "tanh|exp|log|mul|matmul|reduce_sum|sub|add|where|cast|lt|div|maximum|slice|flip|permute|pad"
_IN_C = "where|cast|tanh|lt|div|maximum|add"
_FUNCTIONS = "tanh|sigmoid|exp|log|tril|flip|permute|where|maximum|sub|mul|matmul|Tensor.add_"

# Layer: what it looks at, files, and which of their tests.
LAYERS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "primitives": (
        "each rule of each primitive on samples",
        ("test_ops.py",),
        rf"test_(eval_against_torch|vjp_against_autograd)\[({_OPS})\]|test_c_templates\w*\[({_IN_C})\]",
    ),
    "functions": (
        "torch functions on samples, against eager",
        ("test_functions.py", "test_functions_indexing.py", "test_functions_nn.py"),
        rf"test_(values|gradients)\[((torch\.)?({_FUNCTIONS})|(torch\.)?nn\.functional\.(relu|pad))\]",
    ),
    "passes": (
        "passes, text in and text out, and on random graphs",
        ("test_passes.py",),
        r"test_",
    ),
    "plans": (
        "plans on raw memory against the evaluator, by numpy and C",
        ("test_donate.py", "test_schedule.py", "test_executors.py"),
        r"test_(an_activation|a_gradient|rows_are|hazards|layouts|pads|two_layer_step"
        r"|random_programs\[[01]\]|softmax|large_domain|padding|matmul|movement|statements|against)",
    ),
    "memory": (
        "the static check of plans' memory",
        ("test_sound.py", "test_memory.py"),
        r"test_(it_says_no|the_layout|what_kernels|pieces_alive|sound)",
    ),
    "goldens": (
        "stored texts of graphs, plans, kernels and guards",
        ("test_programs.py", "test_schedule_cpu.py", "test_proof.py"),
        r"test_golden",
    ),
    "programs": (
        "whole training steps in lockstep with eager, in C",
        ("test_programs.py", "test_draws.py"),
        r"test_(lockstep\[(grad|zero_)-|masks_of_a_replay)",
    ),
    "random": (
        "random programs of images against eager, in C",
        ("test_random_programs.py",),
        r"test_programs_of_images_agree_in_c\[500\]",
    ),
    "changes": (
        "steps whose state changes between calls, and random sequences of these",
        ("test_between_calls.py", "test_adversarial_state.py"),
        r"test_(decisions_by_values\[0\]|case)",
    ),
    "fake GPU": (
        "whole steps on the fake device",
        ("test_programs_fake.py", "test_launch_path.py"),
        r"test_(programs\[|a_schedule_of|accumulated|results_are)",
    ),
}
MOST = {"primitives": 60, "functions": 30}  # tests of one function, spread over its cases
ELSE = 3


class Planted:
    """The plugin of the process that collects, and forks for each fault."""

    def __init__(self, faults: Sequence[str], into: Path):
        self.faults, self.into = faults, into
        self.found: set[str] = set()  # layers, in a child
        self.counts: dict[str, int] = {}

    def pytest_collection_modifyitems(self, config, items) -> None:
        chosen: dict[tuple[str, str, str], list] = {}
        for item in items:
            layer = layer_of(item)
            if layer and not any(item.get_closest_marker(m) for m in ("slow", "interpret", "gpu")):
                chosen.setdefault((layer, item.path.name, item.originalname), []).append(item)
        order = {layer: k for k, layer in enumerate(LAYERS)}
        kept = []
        for (layer, *_), cases in sorted(chosen.items(), key=lambda pair: order[pair[0][0]]):
            step = -(-len(cases) // MOST.get(layer, ELSE))
            kept += [(layer, case) for case in cases[::step]]
        self.kept = kept
        items[:] = [item for _, item in kept]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session) -> bool:
        lines: dict[str, list[str]] = {}
        for name in self.faults:
            lines[name] = self._forked(session, name)
            self.into.write_text(json.dumps(lines))
        return True

    def _forked(self, session, name: str) -> list[str]:
        with tempfile.NamedTemporaryFile("r") as file:
            child = os.fork()
            if not child:
                code = 1
                try:
                    self._child(session, name)
                    Path(file.name).write_text(json.dumps(sorted(self.found)))
                    code = 0
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            return json.loads(file.read()) if status == 0 else ["died"]

    def _child(self, session, name: str) -> None:
        from support.faults import FAULTS

        cache = tempfile.mkdtemp(prefix="tracejit-planted-")
        os.environ["TRACEJIT_CACHE"] = cache
        planted = {fault.name: fault for fault in FAULTS}
        fault = planted[name].plant() if name else nullcontext()
        fault.__enter__()  # a variable holds it: one that is dropped is taken out at once
        for module in {item.module for _, item in self.kept}:
            if getattr(module, "WHOLE", None) is True:
                module.WHOLE = False  # of what a test loops over
        began: dict[str, float] = {}
        for k, (layer, item) in enumerate(self.kept):
            if layer in self.found:
                continue
            began.setdefault(layer, time.monotonic())
            following = self.kept[k + 1][1] if k + 1 < len(self.kept) else None
            self.layer = layer
            session._setupstate.teardown_exact(item)  # of what was left out
            if os.environ.get("SHOW"):
                spent = time.monotonic() - began[layer]
                print(f"{spent:.1f} {layer} {item.nodeid}", file=sys.stderr, flush=True)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        subprocess.run(["rm", "-rf", cache], check=False)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.found.add(self.layer)
            if os.environ.get("SHOW"):
                print(self.layer, report.nodeid, str(report.longrepr)[-300:], file=sys.stderr)


def layer_of(item) -> str:
    """The layer that a test belongs to; "" for none."""
    for layer, (_, files, pattern) in LAYERS.items():
        if item.path.name in files and re.match(pattern, item.name):
            return layer
    return ""


def measure(names: Iterable[str]) -> dict[str, list[str]]:
    """Of each fault, the layers that find it. Raises where a layer fails without one."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "found.json"
        command = [sys.executable, "-m", "support.blindness", "--out", str(into)]
        for name in ("", *names):
            command += ["--fault", name]
        environment = os.environ | {"PYTHONPATH": str(TESTS), "TRACEJIT_TEST_ALL": "1"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not into.exists():
            raise RuntimeError(f"{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}")
        found = json.loads(into.read_text())
    if found.pop(""):
        raise AssertionError("some layers fail without a fault")
    return found


def main() -> int:
    from support.faults import FAULTS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fault", action="append", help="by name; all, if none is given")
    parser.add_argument("--out", type=Path, default=Path("blindness.json"))
    options = parser.parse_args()
    names = options.fault or ["", *(fault.name for fault in FAULTS)]
    files = sorted({str(TESTS / name) for _, many, _ in LAYERS.values() for name in many})
    given = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", *files]
    pytest.main(given, plugins=[Planted(names, options.out)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
