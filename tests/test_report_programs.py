"""What whole programs compile to: launches, bytes and machine code, by limits and by goldens.

A golden says what is; the limits say what may be, and accepting a golden does not lift them.
"""

from __future__ import annotations

import functools
import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without the interpreter", allow_module_level=True)

import torch
import triton

import tracejit
from support.function_checks import outcome, step_of
from support.function_samples import each_function, samples_of
from support.golden import Golden
from support.kernel_cases import CASES, plan_of
from support.machine_code import mostly_90
from support.programs import PROGRAMS, Program, plans_of
from support.scope import WHOLE
from support.shortfalls import Known, found_in
from tracejit.aot import TARGETS
from tracejit.capture.trace.table import function_name
from tracejit.report import COLUMNS, Report, precompile, report
from tracejit.rows import limits, shortfalls
from tracejit.schedule.plan import Plan
from tracejit.schedule.traffic import bytes_moved
from tracejit.tables import table

# These have golden reports. The kernels of few are compiled in every run of the tests; those of the
# others, and of cases that are only scheduled, in `test-all`.
FIXED = ("2 zero_", "3 chain", "5 sgd", "6 recurrence", "7 linear fit", "7 classifier")
FIXED += ("softmax", "layer norm", "bf16")
QUICK = ("3 chain", "5 sgd", "softmax")
REPORTED = FIXED if WHOLE or os.environ.get("TRACEJIT_ACCEPT") == "1" else QUICK
COMPILED = (*FIXED, *CASES) if WHOLE else REPORTED

# Kernels that may break a limit: the program or function, a part of the sentence, and why.
EXCEPTIONS: tuple[tuple[str, str, str], ...] = ()

STABLE = ("kernel", "form", "regs", "spills", "shared", "CTAs/SM", "128-bit", "stream", "wgmma")
STABLE += ("mma", "bars", "atomics", "min bytes", "issued", "operations", "steps", "in flight/SM")
STABLE += ("waves", "balance")


@functools.cache
def plans(name: str) -> tuple[Plan, ...]:
    """Of a program, or of a case that is only scheduled."""
    return (plan_of(name),) if name in CASES else plans_of(name)


def broken(name: str, found: list[Report]) -> list[str]:
    """The violations that no exception covers."""
    known = [part for program, part, _ in EXCEPTIONS if program == name]
    violations = [v for one in found for v in limits(one)]
    return [v for v in violations if not any(part in v for part in known)]


def cost(found: tuple[Plan, ...]) -> tuple[int, int]:
    """Launches of a call, and the bytes that they move."""
    return sum(len(p.launches) for p in found), sum(sum(bytes_moved(p)) for p in found)


def check_cost(name: str, program: Program, found: tuple[Plan, ...]) -> None:
    launches, moved = cost(found)
    assert launches <= program.launches, f"{name}: {launches} launches, limit {program.launches}"
    assert moved <= program.bytes, f"{name}: {moved:,} bytes, limit {program.bytes:,}"


# --- launches and bytes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.sweep(2)
def test_launches_and_bytes(name):
    check_cost(name, PROGRAMS[name], plans(name))


@pytest.mark.slow
def test_golden_launches(golden):
    lines = [f"{'program':16}  launches         bytes"]
    for name, program in PROGRAMS.items():
        check_cost(name, program, plans(name))
        launches, moved = cost(plans(name))
        lines.append(f"{name:16}  {launches:8}  {moved:12,}")
    golden("launches.txt", "\n".join(lines))


# --- machine code -----------------------------------------------------------------------------


@functools.cache
def compiled(target: int) -> None:
    if WHOLE:  # processes that import torch take longer than the few kernels of the others
        precompile([plan for name in COMPILED for plan in plans(name)], targets=(target,))


@functools.cache
def reports(name: str, target: int) -> list[Report]:
    compiled(target)
    return [report(plan, target=target) for plan in plans(name)]


@mostly_90
@pytest.mark.parametrize("name", REPORTED)
def test_kernels_keep_the_limits(name, target):
    found = reports(name, target)
    assert broken(name, found) == []
    for row in (row for one in found for row in one.rows):
        assert row.occupancy > 0 and row.minimum_bytes > 0 and row.lines


def test_every_exception_is_needed():
    names = {name for name, _, _ in EXCEPTIONS}
    assert names <= set(FIXED) and all(reason for _, _, reason in EXCEPTIONS)
    for name, part, _ in EXCEPTIONS:
        assert any(
            part in v for target in TARGETS for one in reports(name, target) for v in limits(one)
        )


@mostly_90
def test_golden_reports(golden, target):
    check_golden(golden, target, {name: reports(name, target) for name in REPORTED})


def check_golden(golden, target: int, found: dict[str, list[Report]]) -> None:
    """Compare the rows of programs with the golden; the limits hold whatever the golden says."""
    assert [v for name, some in found.items() for v in broken(name, some)] == []
    name = f"report_sm_{target}_triton_{triton.__version__}.txt"
    accepting = os.environ.get("TRACEJIT_ACCEPT") == "1"
    if not accepting and not (golden.folder / name).exists():
        pytest.skip(f"no golden report for Triton {triton.__version__}; `make accept` writes it")
    parts = []
    for program, some in found.items():
        rows = [row for one in some for row in one.rows]
        parts.append("\n".join([f"--- {program}", *table(rows, {n: COLUMNS[n] for n in STABLE})]))
    if accepting or set(found) == set(FIXED):
        golden(name, "\n".join(parts))
    else:
        known = (golden.folder / name).read_text()
        assert [part for part in parts if f"{part}\n---" not in f"{known}---"] == []


def test_the_accept_switch_cannot_lift_the_limits(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACEJIT_ACCEPT", "1")

    @tracejit.compile
    def strided(x, y):
        return (x[::2].clamp(min=0) - y).pow(2).sum()

    strided(torch.randn(1 << 19), torch.randn(1 << 18))
    with pytest.raises(AssertionError, match="contiguous fp32 stream"):
        check_golden(Golden(tmp_path), 90, {"strided": [report(strided)]})
    for limit in ({"launches": 0}, {"bytes": 1000}):
        program = Program(PROGRAMS["3 chain"].make, **({"launches": 9, "bytes": 10**9} | limit))
        with pytest.raises(AssertionError, match=f"{next(iter(limit))}, limit"):
            check_cost("3 chain", program, plans("3 chain"))
    assert not list(tmp_path.iterdir())
    check_golden(Golden(tmp_path), 90, {"3 chain": reports("3 chain", 90)})
    assert list(tmp_path.iterdir())


@pytest.mark.slow
def test_kernels_compiled_in_processes_are_those_compiled_here(monkeypatch):
    here, there = {}, {}
    for facts, compile_ahead in ((here, False), (there, True)):
        monkeypatch.setattr("tracejit.report._FACTS", facts)
        if compile_ahead:
            precompile(plans("2 zero_"), targets=(90,), processes=1)
            assert len(facts) == len(here)
        report(*plans("2 zero_"), target=90)
    assert here == there and here


# --- what keeps launches from using the GPU -----------------------------------------------------


def check_shortfalls(names: tuple[str, ...], target: int) -> None:
    """No accepting makes the list longer, or a number on it worse: see support/shortfalls.py."""
    if Known().triton() != triton.__version__:
        pytest.skip(f"the list of shortfalls is of Triton {Known().triton()}")
    found: dict = {}
    for name in names:
        found |= found_in(name, reports(name, target))
    wrong = Known().check(found, names, f"sm_{target}")
    assert not wrong, "\n".join(wrong)


@mostly_90
def test_golden_shortfalls(target):
    check_shortfalls(COMPILED, target)


@pytest.mark.slow
def test_golden_shortfalls_of_all_programs():
    others = tuple(name for name in PROGRAMS if name not in FIXED)
    precompile([plan for name in others for plan in plans(name)], targets=(90,))
    check_shortfalls(others, 90)


def test_the_list_of_shortfalls_is_strict(monkeypatch, tmp_path):
    known = Known(tmp_path / "list.txt")
    head = "# Triton 1\n# target program | launch form | what number\n"
    lines = ["sm_90 a | 0 rows | issued 7.5", "sm_90 a | 1 rows | in flight 1000"]
    text = head + "\n".join([*lines, "sm_80 a | 0 rows | issued 9", "sm_90 b | 0 x | spills 2\n"])
    first, second = (("sm_90", "a", "0 rows", "issued"), ("sm_90", "a", "1 rows", "in flight"))

    def check(found, accept):
        known.path.write_text(text)
        monkeypatch.setenv("TRACEJIT_ACCEPT", "1" if accept else "")
        return known.check(found, ("a",), "sm_90"), known.path.read_text()

    same = {first: 7.5, second: 1000.0}
    assert check(same, False) == check(same, True) == ([], text)
    worse = {
        "not on the list": same | {("sm_90", "a", "2 rows", "balance"): 0.5},
        "is 7.6, on the list 7.5": same | {first: 7.6},
        "is 999, on the list 1000": same | {second: 999.0},
    }
    for said, found in worse.items():
        for accept in (False, True):  # accepting cannot lift a limit
            (wrong,), after = check(found, accept)
            assert said in wrong and after == text
    (wrong,), _ = check({second: 1000.0}, False)
    assert "0 rows | issued no longer falls short" in wrong
    (wrong,), _ = check(same | {first: 5.0}, False)
    assert "is better now: 5" in wrong
    wrong, after = check({second: 2000.0}, True)
    assert wrong == [] and after == text.replace(f"{lines[0]}\n", "").replace("1000", "2000")


# --- all kernels ------------------------------------------------------------------------------


@pytest.mark.slow
def test_kernels_of_all_programs_keep_the_limits():
    names = [name for name in PROGRAMS if name not in FIXED]
    precompile([plan for name in names for plan in plans(name)])
    check_all({name: plans(name) for name in names})


def check_all(found: dict[str, tuple[Plan, ...]]) -> None:
    failures = []
    for name, some in found.items():
        for target in TARGETS:
            failures += broken(name, [report(plan, target=target) for plan in some])
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_kernels_of_functions_keep_the_limits(part):
    """The first sample of each function that has a gradient, forward and backward; else forward."""
    found = {}
    for function in each_function()[part::8]:
        for sample in samples_of(function):
            plan = plan_of_sample(function, sample)
            if plan is not None:
                found[function_name(function)] = (plan,)
                break
    assert found
    precompile([plan for some in found.values() for plan in some])
    check_all(found)


def plan_of_sample(function, sample) -> Plan | None:
    step = tracejit.compile(step_of(function, sample))
    _, error = outcome(step)
    return None if error or not step.plans or not step.plans[-1].launches else step.plans[-1]


def test_the_gradient_of_an_embedding_visits_few_elements():
    """Of the ids and the table: not each row of the one with each of the other."""
    n, words, width = 1024, 32000, 512
    found = report(plan_of("embedding 32000x512, 1024 ids"), target=90)
    visited = sum(row.issued_bytes for row in found.rows) / 4
    assert visited <= 4 * (n + words) * width


def test_cross_entropy_reads_its_logits_twice():
    """Forward and backward together, in accesses of 128 bits though no row begins with one."""
    n, words = 1024, 50257
    found = report(plan_of("cross entropy 1024x50257"), target=90)
    assert limits(found) == []
    assert sum(row.issued_bytes for row in found.rows) <= 4 * (2 + 1) * n * words * 1.001
    shares = [row.stream_share for row in found.rows if row.form.startswith("rows")]
    assert len(shares) == 2 and min(shares) >= 0.9


@pytest.mark.parametrize("name", ["sort 64x4096", "topk 50 of 64x50257"])
def test_rows_are_sorted_in_few_comparisons(name):
    """Not each element with each other one: with as many as a network has steps, 91 for 8192."""
    n, width = (64, 4096) if name.startswith("sort") else (64, 50257)
    found = report(plan_of(name), target=90)
    assert limits(found) == [] and shortfalls(found) == []
    assert sum(row.operations for row in found.rows) <= 91 * 8 * n * width
