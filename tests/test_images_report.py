"""What a step of convolutions becomes on GPUs: machine code, bytes against the minimum, goldens."""

from __future__ import annotations

import functools
import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so it needs a process without the interpreter", allow_module_level=True)

import torch
import triton
from torch import nn

import tracejit
from support.machine_code import mostly_90
from tracejit.report import COLUMNS, Report, report
from tracejit.rows import Row, limits
from tracejit.schedule import schedule
from tracejit.schedule.plan import Plan
from tracejit.tables import table

# dtype, precision of float32, whether the user's images lie channels last
CASES = {
    "bf16": (torch.bfloat16, "highest", True),
    "bf16, in rows": (torch.bfloat16, "highest", False),
    "tf32": (torch.float32, "high", True),
    "f32": (torch.float32, "highest", True),
}
VERSION = triton.__version__
SHOWN = ("form", "regs", "spills", "shared", "CTAs/SM", "128-bit", "wgmma", "mma", "min bytes")
SHOWN += ("issued", "steps", "in flight/SM", "balance")


def images(dtype: torch.dtype, last: bool):
    """Two convolutions with batch norm between: values, and gradients of weights and images."""
    layers = [nn.Conv2d(64, 128, 3, 1, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(128, 128, 3, 1, 1)).to(dtype)
    x = torch.zeros(16, 64, 28, 28, dtype=dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)

    def step():
        model.zero_grad()
        loss = model(x).float().pow(2).mean()
        loss.backward()
        return loss.detach()

    return step


@functools.cache
def plan_of(name: str, gpu: bool = True) -> Plan:
    dtype, _, last = CASES[name]
    return schedule(tracejit.capture(images(dtype, last)).optimized().graph, gpu=gpu)


@functools.cache
def reported(name: str, target: int) -> Report:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(CASES[name][1])
    try:
        return report(plan_of(name), target=target)
    finally:
        torch.set_float32_matmul_precision(before)


def reads_wide(row: Row) -> bool:
    """Whether operands are read in 128-bit accesses: all others are the few of a bias and of
    partial sums, however long the pipeline of operands is."""
    narrow = sum(n for width, n in row.facts.loads.items() if width < 128)
    return narrow <= 3 and row.facts.wide_share >= 0.85


each_case = pytest.mark.parametrize("name", CASES)
pytestmark = pytest.mark.slow  # `make test` compiles the programs of test_report_programs.py


@mostly_90
@each_case
def test_limits(name, target):
    found = reported(name, target)
    assert limits(found) == [] and all(row.facts.spills == 0 for row in found.rows)


@mostly_90
@each_case
def test_products_on_tensor_cores(name, target):
    """Two forward, two of weights, and one of the images between."""
    rows = reported(name, target).rows
    products = [r for r in rows if r.facts.wgmma + r.facts.mma > 0]
    works = [w for r in products for w in r.works if w.products]  # two may share a launch
    if name == "f32":
        assert products == []
        return
    assert len(works) == 5 and all(r.facts.copies > 0 for r in products)  # a pipeline
    assert target < 90 or all(r.facts.wgmma > 0 for r in products)
    if name == "bf16" and target >= 90:  # others are turned in registers
        assert all(reads_wide(r) for r in products)


def test_channels_last_is_what_makes_loads_wide():
    """The same step in rows, with channels before taps, on machine code alone."""
    ours, before = reported("bf16", 90), report(plan_of("bf16", False), target=90)
    assert all(reads_wide(r) for r in ours.rows if r.facts.wgmma)
    assert not any(reads_wide(r) for r in before.rows if r.facts.wgmma)
    seconds = [sum(r.predicted["H200"].seconds for r in found.rows) for found in (ours, before)]
    assert seconds[0] < 0.75 * seconds[1]


@mostly_90
@each_case
def test_golden(golden, name, target):
    case = name.replace(", ", "_").replace(" ", "_")
    file = f"report_images_{case}_sm_{target}_triton_{VERSION}.txt"
    accepting = os.environ.get("TRACEJIT_ACCEPT") == "1"
    if not accepting and not (golden.folder / file).exists():
        pytest.skip(f"no golden report for Triton {VERSION}; `make accept` writes it")
    golden(file, "\n".join(table(reported(name, target).rows, {n: COLUMNS[n] for n in SHOWN})))


def test_a_step_on_the_cpu_is_reported_as_a_gpu_would_get_it():
    step = tracejit.compile(images(torch.float32, False), backend="numpy")
    step()
    strides = [b.strides for b in step.plan_on_gpu.buffers if b.kind == "arena"]
    assert any(strides) and not any(b.strides for b in step.plans[-1].buffers if b.kind == "arena")
