"""Interpolation, patches, unpooling and sampling by a grid: like eager on each executor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tracejit
from support.function_samples import r
from support.image_checks import check
from tracejit.capture.functions.resampling import Line
from tracejit.ir.types import f32

BACKENDS = ["numpy", "c"]
IMAGE = (2, 3, 7, 5)
RESIZED = {
    "nearest": {"scale_factor": 2},
    "nearest down": {"size": (3, 4)},
    "nearest exact": {"size": (10, 3), "mode": "nearest-exact"},
    "bilinear": {"scale_factor": 2, "mode": "bilinear"},
    "bilinear corners": {"scale_factor": 2.3, "mode": "bilinear", "align_corners": True},
    "bilinear down": {"size": (3, 2), "mode": "bilinear"},
    "bilinear antialias": {"size": (3, 2), "mode": "bilinear", "antialias": True},
    "bicubic": {"scale_factor": 1.5, "mode": "bicubic"},
    "bicubic antialias": {"size": (3, 8), "mode": "bicubic", "antialias": True},
    "area": {"size": (3, 5), "mode": "area"},
    "wide": {"size": (29, 1), "mode": "bilinear"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RESIZED)
def test_interpolate(name, backend):
    check(lambda x: F.interpolate(x, **RESIZED[name]), backend, r(*IMAGE))


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic antialias"])
def test_interpolate_interpreted(name):
    test_interpolate(name, "interpret")


def test_lines_and_volumes():
    check(lambda x: F.interpolate(x, scale_factor=1.6, mode="linear"), "c", r(2, 3, 7))
    check(lambda x: F.interpolate(x, scale_factor=1.6, mode="trilinear"), "c", r(1, 2, 3, 5, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last(backend):
    x = r(*IMAGE).to(memory_format=torch.channels_last)
    check(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), backend, x)


def test_a_module_and_its_old_names():
    for up in (nn.Upsample(scale_factor=2, mode="bilinear"), nn.UpsamplingNearest2d((9, 11))):
        check(up, "c", r(*IMAGE))


def test_what_is_not_finite_stays_among_its_neighbours():
    x = r(1, 1, 9, 9)
    x[0, 0, 4, 4] = torch.inf
    step = tracejit.compile(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"))
    assert torch.equal(
        step(x).isfinite(), F.interpolate(x, scale_factor=2, mode="bilinear").isfinite()
    )


def test_a_factor_that_varies_decides_a_shape():
    """Each value has a plan of its own; none is taken for another."""

    def step(x, factor):
        return F.interpolate(x, scale_factor=factor, mode="bilinear")

    compiled, x = tracejit.compile(step, on_unsupported="raise"), r(*IMAGE)
    for factor in (2.0, 1.5, 2.0, 1.6, 1.5, 2.0):
        torch.testing.assert_close(compiled(x, factor), step(x, factor))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear", "cubic"])
@pytest.mark.parametrize("n, m", [(5, 7), (7, 5), (64, 128), (97, 41), (1, 6), (6, 1), (300, 299)])
def test_few_elements_of_the_result_are_asked_who_has_read_one(n, m, mode):
    """As many as may have, and one or two for the fractions."""
    line = Line(n, m, mode, n / m, f32)
    reach = 1 if mode.startswith("nearest") else 2 * line.reach
    assert line.readers <= reach * max(m / n, 1) + 3
