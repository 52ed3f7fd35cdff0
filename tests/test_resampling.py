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
@pytest.mark.sweep(2)
def test_interpolate(name, backend):
    check(lambda x: F.interpolate(x, **RESIZED[name]), backend, r(*IMAGE))


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic antialias"])
@pytest.mark.sweep(2)
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


OTHERS = {
    "unfold": lambda x: F.unfold(x, 3, padding=1, stride=2),
    "unfold apart": lambda x: F.unfold(x, 2, stride=2),
    "fold": lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1),
    "windows": lambda x: x.unfold(2, 3, 2).unfold(3, 2, 1).amax((-1, -2)),
    "lp": lambda x: F.lp_pool2d(x.abs() + 0.1, 3, 2),
    "local response": lambda x: F.local_response_norm(x, 2, 0.1),
    "unpool": lambda x: F.max_unpool2d(
        *F.max_pool2d(x, 2, return_indices=True), 2, output_size=(7, 5)
    ),
    "shuffle": lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2),
    "unshuffle": lambda x: F.pixel_unshuffle(F.pad(x, (0, 1, 0, 1)), 2),
    "channels": lambda x: F.channel_shuffle(x, 3) * torch.arange(3.0).view(3, 1, 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.sweep(2)
def test_patches_and_shuffles(name, backend):
    check(OTHERS[name], backend, r(*IMAGE))


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["windows", "fold", "unpool"])
@pytest.mark.sweep(2)
def test_patches_interpreted(name):
    test_patches_and_shuffles(name, "interpret")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.sweep(2)
def test_an_image_that_an_affine_map_moves(padding, mode, backend):
    """A spatial transformer: gradients of the image and of the map."""

    def moved(x, theta):
        grid = F.affine_grid(theta, (2, 3, 4, 6), align_corners=False)
        return F.grid_sample(x, grid, mode, padding, align_corners=False)

    if mode == "nearest":  # there is no gradient of the map
        theta = r(2, 2, 3)
        check(lambda x: moved(x, theta), backend, r(*IMAGE))
    else:
        check(moved, backend, r(*IMAGE), torch.eye(2, 3).repeat(2, 1, 1) + 0.2 * r(2, 2, 3))


@pytest.mark.interpret
def test_an_image_that_an_affine_map_moves_interpreted():
    test_an_image_that_an_affine_map_moves("zeros", "bilinear", "interpret")


def test_windows_are_a_view():
    """What is written through windows that do not meet is in the tensor; where they meet, the step
    runs eagerly, which refuses."""

    def step(x):
        pairs = x.unfold(0, 2, 3)
        pairs.mul_(2)
        x[0] = 7
        return pairs

    ours, eager = torch.arange(9.0), torch.arange(9.0)
    found, expected = tracejit.compile(step, on_unsupported="raise")(ours), step(eager)
    assert torch.equal(ours, eager) and torch.equal(found, expected)
    assert found.stride() == expected.stride() and found.data_ptr() == ours.data_ptr()
    with pytest.raises(RuntimeError):
        tracejit.compile(lambda x: x.unfold(0, 3, 1).mul_(2))(ours)


def test_an_unpooling_to_nowhere_raises():
    x, at = r(1, 1, 2, 2), torch.tensor([[[[0, 3], [12, 99]]]])
    step = tracejit.compile(lambda x, at: F.max_unpool2d(x, at, 2))
    with pytest.raises(RuntimeError, match="99"):
        step(x, at)


def test_dropout_of_channels_is_off_in_evaluation():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(0.5)).eval()
    x = r(*IMAGE)
    ours = tracejit.compile(model.__call__, on_unsupported="raise")(x)
    torch.testing.assert_close(ours, model(x))
