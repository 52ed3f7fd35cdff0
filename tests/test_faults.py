"""Planted faults: each is found by `verify`, withdrawn, and named to the line.

`support/faults.py` has the table of them.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import tracejit
from support.faults import FAULTS, STEPS, Fault
from tracejit.errors import TracejitWarning
from tracejit.runtime.c_compiler import find_compiler
from tracejit.verify.evidence import again, read

CALLS = 8


def copies(step: str) -> tuple:
    made, args, *between = STEPS[step]()
    return made, args, between[0] if between else lambda call: None


def results(step, args: tuple, between) -> list:
    found = []
    for call in range(CALLS):
        between(call)
        found.append(step(*args))
    return found


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_verify_finds_it_and_keeps_eager_s_results(fault: Fault, tmp_path, monkeypatch):
    if fault.backend == "c" and find_compiler() is None:
        pytest.skip("there is no C compiler")
    plain, args, between = copies(fault.step)
    torch.manual_seed(0)
    wanted = results(plain, args, between)
    step, args, between = copies(fault.step)
    torch.manual_seed(0)
    with fault.plant(), warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        step = tracejit.compile(step, verify=3, backend=fault.backend, on_unsupported="eager")
        found = results(step, args, between)
    certificate = step.certificate()
    assert len(certificate.withdrawn) == 1 and not certificate.unverified
    text = certificate.withdrawn[0]
    text, _, evidence = text.rpartition("\nevidence: ")
    assert fault.token in text.rpartition("\n")[2]
    assert not fault.stage or f". {fault.stage}: " in text
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if fault.stage in ("kernels", "passes"):
        with fault.plant():
            blame = again(read(Path(evidence)))
        assert blame.stage == fault.stage
        monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path / "other"))  # of a version that is right
        assert again(read(Path(evidence))) is None


@pytest.mark.parametrize("name", STEPS)
def test_without_a_fault_nothing_is_said(name: str):
    step, args, between = copies(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TracejitWarning)
        step = tracejit.compile(step, verify=3, backend="numpy")
        results(step, args, between)
    assert step.certificate().holds and step.stats.eager == 0


def test_most_are_named_to_the_line():
    assert len(FAULTS) >= 30
    assert sum(bool(fault.token) for fault in FAULTS) >= 25
