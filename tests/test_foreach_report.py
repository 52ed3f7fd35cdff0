"""What updates of many parameters become on GPUs: launches, machine code, bytes, goldens."""

from __future__ import annotations

import functools
import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without the interpreter", allow_module_level=True)

import triton

from support.foreach_steps import large, plan_of
from support.machine_code import mostly_90
from tracejit.report import COLUMNS, Report, report
from tracejit.rows import limits, shortfalls
from tracejit.schedule.plan import Plan
from tracejit.tables import table

VERSION = triton.__version__
CASES = {"adam_200": None, "adam_200_clipped": 1.0}  # the benchmark's, and with a clipped norm
SHOWN = ("form", "regs", "spills", "shared", "CTAs/SM", "stream", "bars", "atomics", "min bytes")
SHOWN += ("issued", "operations", "steps", "in flight/SM", "waves", "balance")


@functools.cache
def plan(name: str) -> Plan:
    return plan_of(large(clip=CASES[name]))


@functools.cache
def reported(name: str, target: int) -> Report:
    return report(plan(name), target=target)


@mostly_90
@pytest.mark.parametrize("name", CASES)
def test_limits(name, target):
    found = reported(name, target)
    rows = [row for row in found.rows if row.form == "foreach"]
    assert limits(found) == [] and len(found.rows) == (1 if CASES[name] is None else 3)
    assert all(row.stream_share >= 0.9 and row.facts.spills == 0 for row in rows)
    assert all(row.facts.registers <= 80 for row in rows)
    assert not [s for s in shortfalls(found) if "foreach" in s.kernel]


@mostly_90
def test_adam_takes_the_time_of_its_bytes(target):
    """28 bytes an element are to be moved, and little else is; the GPU waits for memory alone."""
    (row,) = reported("adam_200", target).rows
    assert row.minimum_bytes == 28 * 200 * 500 * 500
    assert row.issued_bytes < 1.001 * row.minimum_bytes
    assert {p.bound for p in row.predicted.values()} == {"memory"}
    if target == 90:
        assert row.predicted["H200"].seconds < 1.05 * row.minimum_bytes / 4.8e12


def test_it_is_one_short_kernel():
    """A launch of 16 parameters side by side, of which there were 13, had 7,538 instructions and
    took 1.5 s to compile."""
    (row,) = reported("adam_200", 90).rows
    assert row.facts.instructions < 1000 and row.facts.compile_seconds < 5


@mostly_90
@pytest.mark.parametrize("name", CASES)
def test_golden(golden, name, target):
    file = f"report_{name}_sm_{target}_triton_{VERSION}.txt"
    accepting = os.environ.get("TRACEJIT_ACCEPT") == "1"
    if not accepting and not (golden.folder / file).exists():
        pytest.skip(f"no golden report for Triton {VERSION}; `make accept` writes it")
    golden(file, "\n".join(table(reported(name, target).rows, {n: COLUMNS[n] for n in SHOWN})))
