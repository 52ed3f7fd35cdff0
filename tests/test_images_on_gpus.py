"""Convolutions in plans for GPUs: channels last from one to the next, and products tap by tap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tracejit
from support.function_samples import r
from support.image_checks import check
from support.plan_checks import PlanChecks
from support.random_check import IllConditioned, run_program
from support.random_images import generate_images
from support.scope import WHOLE
from tracejit.ir.graph import Graph
from tracejit.runtime.numpy_executor import NumpyExecutor
from tracejit.schedule import images, layouts, parts, schedule
from tracejit.schedule.kernel import Load
from tracejit.schedule.plan import Plan
from tracejit.schedule.plan_text import parse_plan

# x, w, options of a convolution
SHAPES = {
    "padded": ((2, 16, 5, 6), (32, 16, 3, 3), {"padding": 1}),
    "odd channels": ((2, 19, 5, 4), (17, 19, 3, 2), {"padding": (1, 0)}),
    "strided": ((2, 16, 7, 6), (32, 16, 3, 3), {"padding": 1, "stride": 2}),
    "dilated": ((1, 16, 9, 7), (16, 16, 3, 3), {"dilation": (2, 1)}),
    "grouped": ((2, 32, 5, 4), (48, 16, 3, 3), {"padding": 1, "groups": 2}),
    "depthwise": ((2, 32, 5, 4), (32, 1, 3, 3), {"padding": 1, "groups": 32}),
    "one by one": ((2, 32, 4, 5), (16, 32, 1, 1), {}),
    "patches": ((2, 16, 4, 6), (32, 16, 2, 2), {"stride": 2}),
    "few channels": ((2, 3, 6, 5), (16, 3, 3, 3), {"padding": 1}),
    "few results": ((2, 16, 6, 5), (5, 16, 3, 3), {"padding": 1}),
    "one image": ((1, 16, 8, 8), (16, 16, 3, 3), {"padding": 1}),
    "one pixel": ((2, 16, 3, 3), (16, 16, 3, 3), {}),
    "line": ((2, 16, 9), (32, 16, 3), {"padding": 1}),
    "volume": ((1, 16, 3, 4, 5), (16, 16, 2, 3, 2), {"padding": 1}),
}
BATCHES = ((2, 16), (2, 32))
INTERPRETED = ("padded", "strided", "grouped", "odd channels")


def convolved(name: str, dtype: torch.dtype = torch.float32, last: bool = False) -> Graph:
    """A convolution of one that stands before, batch norm and relu, and all gradients."""
    shape, weight, options = SHAPES[name]
    rank, channels = len(shape) - 2, shape[1]
    conv = getattr(F, f"conv{rank}d")

    def step(x, first, w, b, scale):
        y = conv(x, first, padding="same")
        y = F.relu(F.batch_norm(y, None, None, scale, None, training=True))
        z = conv(y, w, b, **options)
        return z, *torch.autograd.grad((z * z).sum(), (x, first, w, b, scale))

    shapes = [shape, (channels, channels, *(3,) * rank), weight, weight[:1], (channels,)]
    tensors = [torch.zeros(s, dtype=dtype) for s in shapes]
    if last:
        form = torch.channels_last if rank == 2 else torch.channels_last_3d
        tensors = [t.to(memory_format=form) if t.ndim == rank + 2 else t for t in tensors]
    return tracejit.capture(step, *(t.requires_grad_() for t in tensors)).optimized().graph


def check_plan(graph: Graph, plan: Plan) -> None:
    PlanChecks(NumpyExecutor()).check(graph, plan)
    assert parse_plan(str(plan)) == plan


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.sweep(0.17)
def test_plans_compute_what_graphs_say(name, fuse):
    graph = convolved(name)
    check_plan(graph, schedule(graph, fuse=fuse, gpu=True))


@pytest.mark.parametrize("name", ["padded", "strided", "depthwise", "volume"])
def test_of_images_that_lie_channels_last(name):
    graph = convolved(name, last=True)
    check_plan(graph, schedule(graph, gpu=True))


def test_half_types():
    graph = convolved("one image", torch.bfloat16)
    check_plan(graph, schedule(graph, gpu=True))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """However few the channels and places are."""
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))  # plans of other thresholds
    for module, name, value in (
        *((module, "LEAST", 2) for module in (images, layouts, parts)),
        *((parts, "SUMS", 64), (parts, "SHORT", 2)),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["padded", "strided", "grouped", "few channels", "volume"])
def test_sums_in_parts(small, name, dtype):
    """Those of batch norm and of the bias; parts are not rounded."""
    graph = convolved(name, dtype)
    plan = schedule(graph, gpu=True)
    check_plan(graph, plan)


@pytest.mark.parametrize("first", range(700, 760 if WHOLE else 706, 6))
def test_random_programs(small, first, monkeypatch):
    monkeypatch.setattr(NumpyExecutor, "gpu", True)
    refused = 0
    for seed in range(first, first + 6):
        try:
            refused += bool(run_program(generate_images(seed), ({"backend": "numpy"},)))
        except IllConditioned:
            refused += 1
    assert refused <= 2


# --- layouts ----------------------------------------------------------------------------------


def laid_out(plan: Plan) -> list[str]:
    """How images of the arena lie: "last" or "rows"."""
    arena = [b for b in plan.buffers if b.kind == "arena" and b.type.shape[:2] in BATCHES]
    arena = [b for b in arena if len(b.type.shape) == 4]
    return ["rows" if b.strides is None else "last" for b in arena]


def test_channels_are_last_from_one_convolution_to_the_next():
    graph = convolved("padded")
    assert set(laid_out(schedule(graph, gpu=True))) == {"last"}
    assert set(laid_out(schedule(graph))) == {"rows"}


def test_what_is_made_of_a_stored_gradient_is_not_stored_in_float32():
    """The gradient of a sum behind batch norm is stored, and in bfloat16; that of the norm's result
    is a number of it for each channel, but all that it is made of would be too much."""

    def step(x, skip, w, scale, g):
        y = F.batch_norm(F.conv2d(x, w, padding=1), None, None, scale, None, training=True)
        z = F.relu(y + skip)
        return z, *torch.autograd.grad(z, (x, skip, w, scale), g)

    image, weight = (4, 32, 16, 16), (32, 32, 3, 3)
    tensors = [torch.zeros(s, dtype=torch.bfloat16) for s in (image, image, weight, (32,), image)]
    graph = tracejit.capture(step, *(t.requires_grad_() for t in tensors)).optimized().graph
    plan = schedule(graph, gpu=True)
    large = [b for b in plan.buffers if b.kind == "arena" and b.type.numel == 4 * 32 * 16 * 16]
    assert large and {b.type.dtype.name for b in large} == {"bf16"}
    check_plan(graph, plan)


def test_a_tile_of_k_lies_within_one_tap():
    """And what it reads of images and of weights side by side; the weights are copied once."""
    plan, along = schedule(convolved("one image"), gpu=True), []
    for one in (x for launch in plan.launches for x in launch.alone()):
        sizes = dict(zip(one.kernel.sizes, one.sizes, strict=True))
        buffers = dict(zip((b.name for b in one.kernel.buffers), one.buffers, strict=True))
        for stage in (s for s in one.kernel.stages if s.dot is not None):
            for s in (s for s in (*stage.dot.a, *stage.dot.b) if isinstance(s, Load)):
                if plan.buffer(buffers[s.buffer]).kind == "arena":
                    (unit,) = (atom for atom, c in s.index.terms if c == 1)
                    along.append("axis" if isinstance(unit, str) else sizes[unit.by])
    assert set(along) == {"axis", 16} and len(along) >= 8
    copies = [b for b in plan.buffers if b.kind == "arena" and b.type.shape == (16, 3, 3, 16)]
    assert len(copies) == 2


def test_weights_that_lie_channels_last_are_not_copied():
    plan = schedule(convolved("one image", last=True), gpu=True)
    assert not [b for b in plan.buffers if b.kind == "arena" and b.type.shape == (16, 3, 3, 16)]


def test_what_the_user_gets_lies_as_in_eager(small, monkeypatch):
    monkeypatch.setattr(NumpyExecutor, "gpu", True)
    x, w, options = SHAPES["strided"]
    for last in (False, True):
        x_, w_ = r(*x), r(*w)
        if last:
            x_ = x_.to(memory_format=torch.channels_last)
        check(lambda x, w: F.conv2d(F.relu(x), w, **options), "numpy", x_, w_)


@pytest.mark.interpret
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name):
    x, w, options = SHAPES[name]
    check(lambda x, w, b: F.conv2d(F.relu(x), w, b, **options), "interpret", r(*x), r(*w), r(w[0]))
