"""Steps saved in this process go on in another one, where the modules that define them are not."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

import tracejit
from support.fake import FAKE
from support.saved_steps import STEPS
from support.scope import WHOLE
from tracejit.testing import fake_device, losses_agree

CALLS = 20
QUICK = ("by_hand", "two_layers", "classifier", "custom_function", "dynamic")
QUICK += ("deciding", "scheduled", "selecting", "noting")

ELSEWHERE = """
import importlib.util, sys
import torch, tracejit
from tracejit.runtime import c_compiler

for module in ("support", "examples", "benchmarks", "test_saved_elsewhere"):
    assert importlib.util.find_spec(module) is None, module
level, *paths = sys.argv[1:]
c_compiler.FLAGS = (level, *c_compiler.FLAGS[1:])
for path in paths:
    given = torch.load(path + ".calls")
    step = tracejit.load(path, backend=given["backend"])
    torch.manual_seed(1)
    returned = [step(*args) for args in given["calls"]]
    returned = [tuple(x) if hasattr(x, "_fields") else x for x in returned]
    torch.save({"returned": returned, "state": step.state_dict()}, path + ".done")
    assert step.stats.traces == 0
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> dict[str, tuple]:
    """By name: what went on here in eager, and what went on in the other process."""
    folder = tmp_path_factory.mktemp("saved")
    here, paths = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACEJIT_CACHE", str(folder / "cache"))
        for name in STEPS if WHOLE else QUICK:
            case = STEPS[name]()
            step = tracejit.compile(case.step, backend="numpy")
            for i in range(4 * case.kinds):
                step(*case.args(i))
            path = str(folder / f"{name}.step")
            step.save(path)
            calls = [case.args(i) for i in range(CALLS)]
            given = [tuple(map(without_class, args)) for args in calls]
            backend = "auto" if WHOLE or name == QUICK[0] else "numpy"  # which compiles nothing
            torch.save({"backend": backend, "calls": given}, f"{path}.calls")
            torch.manual_seed(1)
            here[name] = [case.step(*args) for args in calls], case.state()
            paths.append(path)
        environment = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, "-O3" if WHOLE else "-O0", *paths],
            cwd=folder,
            env=environment | {"TRACEJIT_CACHE": str(folder / "other cache")},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return {Path(p).stem: (*here[Path(p).stem], torch.load(f"{p}.done")) for p in paths}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in STEPS]
)
def test_a_step_goes_on_elsewhere(name, elsewhere):
    eager, state, done = elsewhere[name]
    ours = done["returned"]
    assert len(ours) == len(eager) == CALLS
    exact = next(iter(state.values())).dtype is torch.float64
    for mine, theirs in zip(map(flat, ours), map(flat, eager), strict=True):
        assert [type(x) for x in mine] == [type(x) for x in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert abs(a - b) <= 1e-9 * abs(b) if exact else losses_agree(a, b, flat(eager[0])[0])
    for key, expected in state.items():
        found = done["state"][key]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        difference = (found.double() - expected.double()).norm()
        assert difference <= (1e-9 if exact else 1e-4) * (1e-3 + expected.double().norm()), key


def without_class(x: object) -> object:
    """A batch as it is given where its class is not."""
    if is_dataclass(x):
        return {field.name: getattr(x, field.name) for field in fields(x)}
    return x._asdict() if hasattr(x, "_fields") else x


def flat(x: object) -> list:
    """The numbers in what a step returned."""
    if isinstance(x, dict):
        return [number for item in x.values() for number in flat(item)]
    if isinstance(x, tuple):
        return [number for item in x for number in flat(item)]
    return [x.item() if isinstance(x, torch.Tensor) else x]


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_file_of_a_gpu_that_is_not_here(name, tmp_path):
    """Saved on the fake sm_90, a step goes on there and on the CPU."""
    pytest.importorskip("triton")
    case = STEPS[name]()
    with fake_device(compiled=False):
        step = tracejit.compile(case.step, backend=FAKE)
        for i in range(4 * case.kinds):
            step(*case.args(i))
        step.save(tmp_path / "a.step")
        there = tracejit.load(tmp_path / "a.step", backend=FAKE)
        here = tracejit.load(tmp_path / "a.step", backend="numpy")
        for i in range(CALLS):
            returned = []
            for each in (there, here, case.step):
                torch.manual_seed(i)
                returned.append(flat(each(*case.args(i))))
            *ours, eager = returned
            for found in ours:
                assert found == pytest.approx(eager, rel=1e-3)


AGAIN = """
import sys
import tracejit
from support.fake import FAKE
from support.saved_steps import STEPS
from tracejit.testing import fake_device

case = STEPS["two_layers"]()
with fake_device():
    loaded = tracejit.load(sys.argv[1], backend=FAKE)
    for i in range(8):
        loaded(*case.args(i))
"""


@pytest.mark.slow
def test_caches_spare_a_gpu_the_compiling(tmp_path):
    """A second process that loads the file makes no machine code, with the caches of the first."""
    pytest.importorskip("triton")
    case = STEPS["two_layers"]()
    with fake_device(compiled=False):
        step = tracejit.compile(case.step, backend=FAKE)
        for i in range(4 * case.kinds):
            step(*case.args(i))
        step.save(tmp_path / "a.step")
    caches = {"TRACEJIT_CACHE": "tracejit", "TRITON_CACHE_DIR": "triton"}
    caches = {name: str(tmp_path / folder) for name, folder in caches.items()}
    here = Path(__file__).parent
    caches["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here)])
    made = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", AGAIN, str(tmp_path / "a.step")],
            env=os.environ | caches,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        made.append({p for p in (tmp_path / "triton").rglob("*") if p.suffix == ".cubin"})
    assert made[0] and made[0] == made[1]
