"""Convolution and pooling in compiled steps: values and gradients like eager's on each executor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import tracejit
from support.function_samples import r
from support.image_checks import check
from tracejit.testing import assert_equal_to_eager

BACKENDS = ["numpy", "c"]
# Triton's interpreter takes seconds for each
INTERPRETED = {"padded", "strided", "patches", "grouped", "depthwise", "overlapping"}
INTERPRETED |= {"max overlapping", "mean"}
SHAPES = {
    "plain": ((2, 3, 9, 8), (5, 3, 3, 3), {}),
    "padded": ((2, 3, 9, 8), (5, 3, 3, 3), {"padding": 1}),
    "strided": ((2, 3, 9, 8), (5, 3, 3, 3), {"stride": 2, "padding": 1}),
    "wide stride": ((2, 3, 9, 8), (5, 3, 2, 2), {"stride": 3, "padding": 1}),
    "patches": ((2, 3, 9, 8), (5, 3, 2, 2), {"stride": 2}),
    "dilated": ((2, 3, 9, 8), (5, 3, 3, 3), {"dilation": (1, 2), "padding": (0, 2)}),
    "one by one": ((3, 4, 5, 5), (7, 4, 1, 1), {}),
    "grouped": ((2, 4, 7, 6), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((2, 4, 7, 6), (4, 1, 3, 3), {"groups": 4, "stride": 2, "padding": 1}),
    "several strips": ((3, 5, 11, 10), (37, 5, 3, 3), {"padding": 1}),
    "several panels": ((2, 33, 5, 6), (14, 33, 3, 3), {"padding": 1}),
    "wide": ((2, 11, 9, 7), (13, 11, 3, 3), {"padding": 1}),
    "wide, strided": ((2, 9, 9, 8), (30, 9, 3, 3), {"stride": (2, 1), "padding": 1}),
    "strides, dilated": ((2, 3, 13, 11), (5, 3, 3, 4), {"stride": 2, "dilation": (3, 2)}),
    "strides of three": ((2, 3, 13, 11), (5, 3, 4, 5), {"stride": 3, "padding": (5, 2)}),
    "wide, dilated": ((2, 9, 9, 8), (26, 9, 3, 2), {"dilation": (1, 2), "padding": (0, 2)}),
    "wide, unpadded": ((3, 33, 9, 8), (17, 33, 3, 3), {}),
    "wide, one by one": ((3, 14, 5, 5), (17, 14, 1, 1), {}),
    "one pixel": ((2, 3, 3, 3), (5, 3, 3, 3), {}),
    "line": ((2, 3, 19), (4, 3, 4), {"stride": 2, "padding": 3}),
    "volume": ((2, 3, 4, 5, 6), (4, 3, 2, 3, 2), {"padding": 1, "stride": (1, 2, 1)}),
    "no images": ((0, 3, 9, 8), (5, 3, 3, 3), {"padding": 1}),
}
TRANSPOSED = {
    "up": ((2, 3, 4, 3), (3, 5, 2, 2), {"stride": 2}),
    "overlapping": ((2, 4, 4, 3), (4, 5, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "grouped": ((2, 4, 4, 3), (4, 3, 3, 3), {"groups": 2, "dilation": 2}),
    "grouped, strided": ((2, 4, 4, 3), (4, 3, 4, 3), {"groups": 2, "stride": (3, 2)}),
}
POOLED = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max dilated": lambda x: F.max_pool2d(x, 2, 2, 1, 3, True),
    "mean": lambda x: F.avg_pool2d(x, 3, 2, 1, True, False),
    "adaptive mean": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (4, 3)),
}


@pytest.mark.parametrize("kernel", [(3, 1), (3, 3), (1, 2)])
def test_the_gradient_of_a_plain_sum(kernel):
    """Its cotangent is a constant, but no element is in as many windows as another."""

    def step(x, w):
        loss = F.conv2d(x, w).sum() + F.avg_pool2d(x, 3, 1).sum()
        loss.backward()
        return loss

    def arguments():
        torch.manual_seed(0)
        return [torch.randn(s).requires_grad_() for s in ((1, 2, 5, 5), (1, 2, *kernel))]

    assert_equal_to_eager(step, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.sweep(4)
def test_convolution(name, backend):
    x, w, options = SHAPES[name]
    f = getattr(F, f"conv{len(x) - 2}d")
    check(lambda x, w, b: f(x, w, b, **options), backend, r(*x), r(*w), r(w[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.sweep(2)
def test_transposed(name, backend):
    x, w, options = TRANSPOSED[name]
    check(lambda x, w: F.conv_transpose2d(x, w, **options), backend, r(*x), r(*w))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", POOLED)
@pytest.mark.sweep(2)
def test_pooling(name, backend):
    check(POOLED[name], backend, r(2, 3, 9, 8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["padded", "strided", "depthwise", "one by one"])
@pytest.mark.sweep(2)
def test_channels_last(name, backend):
    x, w, options = SHAPES[name]
    x = r(*x).to(memory_format=torch.channels_last)
    check(lambda x, w: F.conv2d(x, w, **options), backend, x, r(*w))


def test_gradients_lie_as_in_eager():
    """Those of images and weights that have their channels last, returned or kept."""

    def layouts(call):
        shapes = (2, 3, 4, 5, 6), (4, 3, 1, 3, 2)
        x, w = (r(*s).to(memory_format=torch.channels_last_3d).requires_grad_() for s in shapes)

        def step(x, w):
            loss = F.conv3d(x, w, padding=1).relu().pow(2).sum()
            found = torch.autograd.grad(loss, (x, w), retain_graph=True)
            loss.backward()
            return found

        return [g.stride() for g in (*call(step)(x, w), x.grad, w.grad)]

    wanted = layouts(lambda step: step)
    assert wanted[0] == (360, 1, 90, 18, 3)
    assert layouts(lambda step: tracejit.compile(step, on_unsupported="raise")) == wanted


@pytest.mark.interpret
@pytest.mark.parametrize("name", sorted(INTERPRETED & SHAPES.keys()))
def test_convolution_interpreted(name):
    test_convolution(name, "interpret")


@pytest.mark.interpret
@pytest.mark.parametrize("name", sorted(INTERPRETED & TRANSPOSED.keys()))
def test_transposed_interpreted(name):
    test_transposed(name, "interpret")


@pytest.mark.interpret
@pytest.mark.parametrize("name", sorted(INTERPRETED & POOLED.keys()))
def test_pooling_interpreted(name):
    test_pooling(name, "interpret")


@pytest.mark.parametrize("name", ["padded", "strided", "grouped", "depthwise", "wide"])
def test_what_stands_before_a_convolution_is_computed_while_it_is_packed(name):
    """A relu, beside which nothing is padded but zeros."""
    x, w, options = SHAPES[name]
    check(lambda x, w: F.conv2d(F.relu(x + 0.5), w, **options), "c", r(*x), r(*w))


@pytest.mark.parametrize("n, out, side", [(12, 20, 50), (24, 17, 64), (144, 24, 33), (16, 5, 47)])
def test_weights_that_many_places_share(n, out, side):
    """Their gradient has few results and long sums: slices of these, each of which packs a part of
    its operands at a time. Forward, a tile packs the pixels that it needs."""
    x, w, g = r(4, n, side, side), r(out, n, 1, 1), r(4, out, side, side)

    def step(x, w, g):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = F.conv2d(F.relu6(x + 0.5), w)
        return y, *torch.autograd.grad(y, (x, w), g)

    compiled = tracejit.compile(step, on_unsupported="raise")
    exact = step(x.double(), w.double(), g.double())
    for ours, eager, right in zip(compiled(x, w, g), step(x, w, g), exact, strict=True):
        off = [(found.double() - right).norm() for found in (ours, eager)]
        assert off[0] <= 2 * off[1] + 1e-6 * right.norm()
    text = "\n".join(compiled.kernels)
    assert all(way in text for way in ("way='slices'", "way='panels'", "deep=True"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [(3, 5), (9, 21)])
def test_dtypes(dtype, channels):
    n, out = channels
    x, w = r(2, n, 9, 8, dtype=dtype), r(out, n, 3, 3, dtype=dtype)

    def step(x, w):
        return F.conv2d(x, w, padding=1)

    ours = tracejit.compile(step, on_unsupported="raise")(x, w)
    exact = step(x.double(), w.double())
    allowed = 2 * (step(x, w).double() - exact).norm() + 1e-15 * exact.norm()
    assert (ours.double() - exact).norm() <= allowed


LINES = {
    "mean": lambda x: F.avg_pool1d(x, 2),
    "largest": lambda x: F.max_pool1d(x, 2),
    "places": lambda x: F.max_pool1d(x, 2, return_indices=True),
    "adaptive mean": lambda x: F.adaptive_avg_pool1d(x, 3),
    "uneven mean": lambda x: F.adaptive_avg_pool1d(x, 5),
    "adaptive largest": lambda x: F.adaptive_max_pool1d(x, 5),
    "power": lambda x: F.lp_pool1d(x, 2.0, 2),
    "area": lambda x: F.interpolate(x, scale_factor=2, mode="area"),
}


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("name", LINES)
def test_pooled_lines_lie_as_in_eager(name, wanted):
    """Channels last, if they lie so; what is not batched is row-major."""
    last = torch.randn(2, 9, 3).transpose(1, 2)
    given = [last, last[:1], last[0], torch.randn(2, 3, 9), torch.randn(2, 9, 1).transpose(1, 2)]
    for x in given if name != "area" else given[:2]:
        x = x.detach().requires_grad_(wanted)
        eager = tree_leaves(LINES[name](x))
        compiled = tracejit.compile(LINES[name], on_unsupported="raise", backend="numpy")
        for mine, theirs in zip(tree_leaves(compiled(x)), eager, strict=True):
            torch.testing.assert_close(mine, theirs, check_stride=True)


IMAGES = {
    "mean": lambda x: x.dim() == 5 and F.avg_pool3d(x, (1, 2, 2)),
    "largest": lambda x: x.dim() == 5 and F.max_pool3d(x, (1, 2, 2)),
    "adaptive mean": lambda x: x.dim() == 5 and F.adaptive_avg_pool3d(x, (1, 2, 2)),
    "mean of all": lambda x: x.dim() == 5 and F.adaptive_avg_pool3d(x, 1),
    "adaptive largest": lambda x: x.dim() == 5 and F.adaptive_max_pool3d(x, (1, 2, 2)),
    "groups": lambda x: F.group_norm(x, 1),
    "batch": lambda x: F.batch_norm(x, None, None, training=True),
    "instances": lambda x: F.instance_norm(x),
    "larger": lambda x: F.interpolate(x, scale_factor=2),
    "element-wise": lambda x: torch.sin(x) * 2,
}


@pytest.mark.parametrize("name", IMAGES)
def test_results_lie_as_in_eager(name):
    """Of images whose channels lie last, in the plane and in space, and of others."""
    compiled = tracejit.compile(IMAGES[name], on_unsupported="raise", backend="numpy")
    for n, c, rank in ((1, 4, 4), (2, 4, 4), (2, 4, 5), (1, 3, 5), (2, 1, 5)):
        last = torch.channels_last if rank == 4 else torch.channels_last_3d
        x = torch.randn(n, c, *(4,) * (rank - 2))
        for given in (x, x.contiguous(memory_format=last), x.transpose(0, 1)):
            eager = IMAGES[name](given)
            if eager is not False:
                torch.testing.assert_close(compiled(given), eager, check_stride=True)
