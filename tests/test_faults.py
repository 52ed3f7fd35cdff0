"""Planted faults: each is found by `verify`, withdrawn, and named to the line.

`support/faults.py` has the table of them.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

import tracejit
from support.blindness import LAYERS, measure
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
    monkeypatch.setenv("TRACEJIT_VERIFY", "0")  # a static check would come before


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
@pytest.mark.sweep(0.34)
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
    quoted = [line for line in text.splitlines() if line.strip(" ^")]  # above its carets
    assert fault.token in quoted[-1]
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


DOCUMENT = Path(__file__).parents[1] / "docs" / "faults.md"
HEAD = """\
# Planted faults, and who finds them

Each of these faults is planted by `tests/support/faults.py` in a rule, a derivative, a pass, the
schedule, a printer, or the run of a replay, and looked for by `verify=3` on a step that meets it
(`tests/test_faults.py`). "Stage" is what is blamed; "line": whether the user's line is named. The
last columns say on which executor a verified call differs: a printer of C is not seen by numpy, so
steps that run in C are to be verified in C; where memory is laid out anew for C, a fault of the
first layout is not met there. Generated: `TRACEJIT_ACCEPT=1 pytest tests/test_faults.py -k table`.

| fault | kind | stage | line | numpy | C |
|---|---|---|---|---|---|
"""


@pytest.mark.slow
def test_the_table_of_faults(monkeypatch, tmp_path):
    rows = []
    for number, fault in enumerate(FAULTS):
        found = {}
        for backend in ("numpy", "c"):
            monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path / f"{number}{backend}"))
            step, args, between = copies(fault.step)
            torch.manual_seed(0)
            with fault.plant(), warnings.catch_warnings():
                warnings.simplefilter("ignore", TracejitWarning)
                step = tracejit.compile(step, verify=3, backend=backend, on_unsupported="eager")
                results(step, args, between)
            found[backend] = bool(step.certificate().withdrawn)
        assert found[fault.backend]
        said = [fault.name, fault.kind, fault.stage or "-", "yes" if fault.token else "no"]
        said += ["found" if found[backend] else "blind" for backend in ("numpy", "c")]
        rows.append(f"| {' | '.join(x.replace('|', '/') for x in said)} |")
    check_part(0, HEAD + "\n".join(rows) + "\n")


def parts() -> list[str]:
    """The sections of the document: faults and verify, layers of tests, races."""
    return DOCUMENT.read_text().split("\n## ")


def check_part(number: int, text: str) -> None:
    """A section is what is stored; or it is stored now."""
    stored = parts()
    if os.environ.get("TRACEJIT_ACCEPT") == "1":
        stored[number] = text
        DOCUMENT.write_text("\n## ".join(stored))
    assert parts()[number] == text


LAYERS_HEAD = """\
By which other layers of tests

The same faults, and a small fixed choice of the tests of each layer
(`tests/support/blindness.py`): one of them fails, or the layer is blind to the fault. What a layer
cannot see is no gap: goldens are texts, and say nothing of what a kernel computes; primitives know
nothing of a plan's memory or of a replay. "?" has not been measured. Generated:
`TRACEJIT_ACCEPT=1 pytest tests/test_faults.py -k table_of_layers`; every run of the tests measures
some of the measured rows again.

"""


def layers_row(name: str, found: list[str] | None) -> str:
    """The row of a fault; None for one that has not been measured."""
    cells = ["?" if found is None else "found" if layer in found else "-" for layer in LAYERS]
    said = [name.replace("|", "/"), *cells]
    return f"| {' | '.join(said)} |"


@pytest.mark.slow
def test_the_table_of_layers():
    """All of it: some minutes."""
    check_layers(measure([fault.name for fault in FAULTS]))


def check_layers(found: dict[str, list[str]]) -> None:
    """The table of what was measured is the stored one."""
    lines = [f"- {layer}: {what}." for layer, (what, *_) in LAYERS.items()]
    table = [f"| fault | {' | '.join(LAYERS)} |", "|---" * (len(LAYERS) + 1) + "|"]
    table += [layers_row(fault.name, found.get(fault.name)) for fault in FAULTS]
    check_part(1, LAYERS_HEAD + "\n".join([*lines, "", *table]) + "\n")


@pytest.mark.sweep(20)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_row_of_layers(fault: Fault):
    """The layers that are said to find a fault do, and no others."""
    if layers_row(fault.name, None) in parts()[1].splitlines():
        pytest.skip("this row has not been measured yet")
    assert layers_row(fault.name, measure([fault.name])[fault.name]) in parts()[1].splitlines()


def test_each_fault_is_found_by_a_layer_besides_verify():
    rows = [line.split(" | ") for line in parts()[1].splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [f.name for f in FAULTS]
    blind = [row[0] for row in rows if not any("found" in x or "?" in x for x in row[1:])]
    assert blind == []


RACES_HEAD = """\
Races of two streams on the fake device

Planted in what runs plans on a GPU (`tests/support/races.py`, `tests/test_races.py`). The fake
device does all work at once, and checks by clocks that its order was certain; "verify" is a
verified call with these clocks off, which sees only what has come out as other numbers. So races
are the clocks' to find, and wrong numbers are verify's. Generated:
`TRACEJIT_ACCEPT=1 pytest tests/test_faults.py -k table_of_races`.

| fault | clocks | verify |
|---|---|---|
"""


def test_the_table_of_races():
    pytest.importorskip("triton")
    from support.races import RACES

    rows = [
        f"| {race.name} | {'found' if race.device else 'blind'} "
        f"| {'found' if race.verify else 'blind'} |"
        for race in RACES
    ]
    check_part(2, RACES_HEAD + "\n".join(rows) + "\n")


def test_the_table_has_every_fault():
    rows = [line.split(" | ") for line in parts()[0].splitlines() if "| " in line][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [f.name for f in FAULTS]
