"""The kernel report: its figures, its limits and the command line.

What whole programs compile to: test_report_programs.py.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without the interpreter", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

import tracejit
from examples import fused_chain, two_layer_autograd
from support.command_line import status
from tracejit.aot import TARGETS, disassemble, parse_sass
from tracejit.codegen.triton_forms import form_of
from tracejit.errors import BackendUnavailable
from tracejit.gpus import ARCHES, occupancy
from tracejit.ir.torch_types import TO_TORCH
from tracejit.report import Report, report
from tracejit.rows import limits, stream_share_of
from tracejit.runtime.select import executor_for
from tracejit.runtime.triton_launch import DevicePointer, positions
from tracejit.schedule.plan import Plan

ROOT = Path(__file__).parents[1]
PROGRAMS = {"zero_": two_layer_autograd.make_step, "chain": fused_chain.make_step}

each_target = pytest.mark.parametrize("target", TARGETS)


def plan_of(step, *args, calls=3) -> Plan:
    compiled = tracejit.compile(step)
    for _ in range(calls):
        compiled(*args)
    return compiled.plans[-1]


@functools.cache
def program(name: str) -> Plan:
    return plan_of(PROGRAMS[name]()[0])


@functools.cache
def reported(name: str, target: int) -> Report:
    return report(program(name), target=target)


# --- a stream ---------------------------------------------------------------------------------


@each_target
@pytest.mark.sweep(1)
def test_the_chain_streams_in_128_bits(target):
    (row,) = reported("chain", target).rows
    assert row.form == "reduce" and row.stream_share == 1.0
    assert row.minimum_bytes == 12 * fused_chain.ELEMENTS + 4
    assert row.lines == ("fused_chain.py:27", "fused_chain.py:28")


# --- bad on purpose ---------------------------------------------------------------------------


def bad_chain() -> Report:
    """The chain over every second element: 8 bytes between neighbours, so no 128-bit loads."""

    def step(x, y):
        return (x[::2].clamp(min=0) - y).pow(2).sum()

    return report(plan_of(step, torch.randn(1 << 19), torch.randn(1 << 18)))


def test_a_strided_chain_breaks_the_limit():
    (violation,) = limits(bad_chain())
    assert "of a contiguous fp32 stream move 128 bits, limit 90%" in violation
    assert "on sm_90 (test_report.py:" in violation


@pytest.mark.slow
def test_a_spilling_kernel_breaks_the_limit(monkeypatch):
    choice = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16, "GROUP_M": 8}
    choice |= {
        "SPLITS": 1,
        "GROUP": 1,
        "num_warps": 1,
        "num_stages": 1,
    }  # 256 accumulators a thread
    monkeypatch.setattr("tracejit.codegen.geometry.tiles", lambda *args: choice)
    found = report(plan_of(torch_mm, torch.randn(128, 64), torch.randn(64, 128)))
    (violation,) = limits(found)
    assert "spill instructions, limit 0" in violation


def torch_mm(a, b):
    return a.mm(b)


def test_shared_memory_is_limited_by_the_target():
    (row,) = reported("chain", 80).rows
    for target, broken in ((80, True), (90, False)):
        facts = replace(row.facts, target=target, shared_bytes=200_000)
        found = Report("step", target, "ieee", "", (replace(row, facts=facts),))
        assert bool(limits(found)) == broken


def test_tables_of_sin_are_no_spills():
    found = report(plan_of(lambda x: x.sin(), torch.randn(1 << 18)))
    (row,) = found.rows
    assert row.has_tables and row.facts.spills > 0 and limits(found) == []
    assert row.stream_share == 1.0
    deep = replace(row, facts=replace(row.facts, stack_bytes=96))
    assert "spill" in limits(replace(found, rows=(deep,)))[0]


def test_what_is_no_contiguous_stream():
    x, y = torch.randn(1024, 1024), torch.randn(1 << 20)
    (facts,) = (row.facts for row in reported("chain", 90).rows)
    cases = {
        "too short": (lambda x: x * 2.0, y[:1000].clone()),
        "two axes": (lambda x: x + x.t(), x),
        "a strided tensor": (lambda x: x * 2.0, y[::2]),
        "another dtype": (lambda x: x * 2.0, y.double()),
        "a shifted start": (lambda x: x[1:] * 2.0, y),
    }
    for what, (step, argument) in cases.items():
        plan = plan_of(step, argument)
        (launch,) = plan.launches
        share = stream_share_of(plan, launch, form_of(launch.kernel), facts)
        assert share is None, what


# --- the figures ------------------------------------------------------------------------------


def test_a_step_and_its_plan_report_the_same():
    step = tracejit.compile(torch_mm)
    with pytest.raises(ValueError, match="torch_mm has no plan yet"):
        report(step)
    step(torch.randn(64, 32), torch.randn(32, 48))
    named = report(step)
    assert [row.inputs for row in named.rows] == [("a", "b")]
    assert "inputs of each launch:\n0: a, b" in str(named)
    rows = tuple(replace(row, inputs=()) for row in named.rows)
    assert replace(named, rows=rows) == report(step.plans[-1])
    with pytest.raises(ValueError, match="target is one of 80, 90, 100, not 70"):
        report(step, target=70)
    with pytest.raises(TypeError, match="takes a compiled step or a Plan, not function"):
        report(torch_mm)


def test_an_interpreting_process_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(BackendUnavailable, match="interprets Triton kernels"):
        report(program("chain"))


def test_precision_is_the_users():
    plan = plan_of(torch_mm, torch.randn(512, 256), torch.randn(256, 512))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        found = report(plan)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.precision == "tf32" and report(plan).precision == "ieee"
    assert found.rows[0].facts.wgmma + found.rows[0].facts.mma > 0
    assert report(plan).rows[0].facts.ffma > 0


def test_launches_of_an_empty_grid_have_no_row():
    found = report(plan_of(lambda x: x * 2.0, torch.randn(0, 5)))
    assert found.rows == () and limits(found) == [] and "0 launches" in str(found)


def test_odd_scalars_are_not_aligned(monkeypatch):
    """The second launch's scalars start 8 bytes into the table."""
    (facts,) = (row.facts for row in reported("chain", 90).rows)
    unaligned = []

    def compile_launch(*arguments, **named):
        unaligned.append(named["unaligned"])
        return facts

    monkeypatch.setattr("tracejit.report.compile_launch", compile_launch)

    def step(x, y, a, b):
        return x * a + 1.0, y * b + 1.0  # kernels that no other test reports

    plan = plan_of(step, torch.randn(1 << 21), torch.randn(77), 2.0, 3.0)  # a stream stays alone
    assert len(plan.launches) == 2 and all(len(launch.scalars) == 1 for launch in plan.launches)
    report(plan)
    assert unaligned == [set(), {"scalars"}]


class FakeDriver:
    """What Triton asks of a GPU's driver before it compiles for a launch."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 1234  # of no other test: functions remember what they compiled for a device

    def get_current_stream(self, device):
        return 0


@pytest.mark.slow
def test_kernels_are_what_a_launch_compiles(monkeypatch):
    """Triton's own specialization of the executor's arguments gives the machine code reported."""
    monkeypatch.setattr(type(triton.runtime.driver), "active", FakeDriver())
    plan = program("zero_")
    executor = executor_for("triton", "cuda")
    position = positions(plan)
    rows = {row.name: row for row in reported("zero_", 90).rows}
    with_workspace, with_scalars = plan.launches[1], plan.launches[-1]
    for launch in (with_workspace, with_scalars):
        loaded = executor.load_launch(launch, position, 0, 132)
        assert loaded.geometry.workspace or launch is with_scalars and launch.scalars
        types = [TO_TORCH[b.dtype] for b in launch.kernel.buffers]
        types += [torch.float64] * bool(launch.kernel.scalars)
        types += [torch.int8] * bool(loaded.geometry.workspace)
        compiled = loaded.function.warmup(
            *(DevicePointer(0, dtype) for dtype in types),
            grid=loaded.geometry.grid,
            **loaded.options(),
        )
        sass = disassemble(compiled.asm["cubin"])
        facts = parse_sass(sass, loaded.source.name, 90, compiled.metadata.shared)
        assert facts == rows[loaded.source.name].facts


def test_occupancy():
    assert occupancy(90, registers=32, warps=4, shared_bytes=0) == 16
    assert occupancy(90, registers=33, warps=4, shared_bytes=0) == 12
    assert occupancy(90, registers=16, warps=1, shared_bytes=0) == 32
    assert occupancy(90, registers=255, warps=8, shared_bytes=0) == 1
    assert occupancy(90, registers=255, warps=16, shared_bytes=0) == 0
    assert occupancy(80, registers=32, warps=4, shared_bytes=16384) == 9
    assert occupancy(90, registers=32, warps=4, shared_bytes=16384) == 13
    assert occupancy(80, registers=32, warps=4, shared_bytes=163 << 10) == 1
    assert occupancy(80, registers=32, warps=4, shared_bytes=(163 << 10) + 1) == 0
    assert occupancy(100, registers=32, warps=4, shared_bytes=0, tensor_memory=256) == 2


OCCUPANCY_C = """
#include <limits.h>
#include <stdio.h>
#include "cuda_occupancy.h"
int main(void) {
  int major, perBlock, perSm, regs, threads, shared;
  while (scanf("%d %d %d %d %d %d", &major, &perBlock, &perSm, &regs, &threads, &shared) == 6) {
    cudaOccDeviceProp p = {0};
    p.computeMajor = major; p.maxThreadsPerBlock = 1024; p.maxThreadsPerMultiprocessor = 2048;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536; p.warpSize = 32; p.numSms = 132;
    p.sharedMemPerBlock = 49152; p.sharedMemPerBlockOptin = perBlock;
    p.sharedMemPerMultiprocessor = perSm; p.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes f = {0};
    f.maxThreadsPerBlock = INT_MAX; f.numRegs = regs; f.numBlockBarriers = 1;
    f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; f.maxDynamicSharedSizeBytes = shared;
    cudaOccDeviceState s = {0};
    s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult r;
    cudaOccError e = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &s, threads, shared);
    printf("%d\\n", e ? -1 : r.activeBlocksPerMultiprocessor);
  }
  return 0;
}
"""


def test_occupancy_agrees_with_the_cuda_toolkit(tmp_path):
    """Every count of registers and warps, many sizes of shared memory, against NVIDIA's header."""
    header = Path(triton.__file__).parent / "backends/nvidia/include/cuda_occupancy.h"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not header.exists():
        pytest.skip("needs a C compiler and the cuda_occupancy.h that Triton ships")
    (tmp_path / "occupancy.c").write_text(OCCUPANCY_C)
    program = tmp_path / "occupancy"
    build = [compiler, "-w", f"-I{header.parent}", "-o", program, tmp_path / "occupancy.c", "-lm"]
    subprocess.run(build, check=True)
    cases = [
        (target, registers, warps, shared)
        for target in TARGETS
        for registers in range(16, 256, 3)
        for warps in (1, 2, 4, 8, 16)
        for shared in (0, 16, 1000, 1024, 8192, 40_000, 100_000, 166_912, 166_913, 232_448)
    ]
    lines = [
        f"{t // 10} {ARCHES[t].shared_per_block} {ARCHES[t].shared_per_sm} {r} {32 * w} {s}\n"
        for t, r, w, s in cases
    ]
    out = subprocess.run([program], input="".join(lines), capture_output=True, text=True).stdout
    ours = [occupancy(t, r, w, s) for t, r, w, s in cases]
    assert ours == [int(line) for line in out.split()]


# --- the command line -------------------------------------------------------------------------

PROGRAM = """
import torch
import tracejit

x = torch.randn(1 << 18)

@tracejit.compile
def compiled():
    print("noise")
    return x * 2.0

def plain():
    return x * 2.0, x.sum()

def strided():
    return x[::2] * 2.0

def make_step():
    return plain, [x]

def takes(x, y):
    return x

def fails():
    raise RuntimeError("of its own")

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "steps.py"
    path.write_text(PROGRAM)
    return path


def command(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tracejit", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_command_line(file):
    """In processes of their own, at once: a good one and a wrong step."""
    example = "examples/two_layer_autograd.py:make_step"
    good = command("report", example, "--target", "sm_90")
    wrong = command("report", f"{file}:typo")
    out, err = good.communicate()
    assert good.returncode == 0 and err == "", err
    assert out.startswith("step for sm_90 (Triton ") and "two_layer_autograd.py:66" in out
    launches = len(program("zero_").launches)
    rows = out.splitlines()
    named = rows.index("inputs of each launch:")
    assert named == 2 + launches + 1 and "w1" in rows[named + launches]  # after the table
    short = rows[named + launches + 2 :]
    assert short[0] == "what keeps launches from using the GPU:"
    assert short[1].startswith("0: matmul_") and short[1].endswith("limit 16,384 bytes per SM")
    out, err = wrong.communicate()
    assert wrong.returncode == 2 and out == ""
    assert "has no typo" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "step, said",
    [
        ("{folder}/none.py:make_step", "there is no file {folder}/none.py"),
        ("{file}", "is not of the form FILE:STEP"),
        ("{file}:typo", "has no typo; it defines compiled, plain, strided, make_step"),
        ("{file}:number", "number in {file} is no function but of type int"),
        ("{file}:takes", "takes takes arguments (x, y); write a function without any"),
        ("{file}:fails", "RuntimeError: of its own"),
    ],
)
def test_what_cannot_be_reported(file, step, said, capsys):
    places = {"file": file, "folder": file.parent}
    assert status("report", step.format(**places)) == 2
    captured = capsys.readouterr()
    assert said.format(**places) in captured.err and captured.out == ""


@pytest.mark.parametrize("name", ["compiled", "plain", "make_step"])
def test_what_a_step_may_be(file, name, capsys):
    assert status("report", f"{file}:{name}", "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["target"] == "sm_90" and found["violations"] == []
    (launch,) = found["launches"]
    assert launch["minimum_bytes"] >= 8 << 18 and launch["spills"] == 0
    assert ("noise" in captured.err) == (name == "compiled")


def test_a_broken_limit_is_exit_status_1(file, capsys):
    assert status("report", f"{file}:strided") == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("strided for sm_90")
    assert captured.err.startswith("limit broken: pointwise_")


def test_help_and_targets(capsys):
    assert status("--help") == 0 and "report" in capsys.readouterr().out
    assert status("report", "--help") == 0
    assert "exit status" in capsys.readouterr().out
    assert status("report", f"{__file__}:x", "--target", "sm_70") == 2
    assert "sm_70 is not one of sm_80, sm_90, sm_100" in capsys.readouterr().err
    assert status() == 2
