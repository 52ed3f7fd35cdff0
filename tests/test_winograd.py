"""Convolutions of 3 × 3 taps by transforms: which ones are, and results like eager's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import tracejit
from tracejit.passes import optimize
from tracejit.schedule import schedule
from tracejit.schedule.cpu.lower import lower
from tracejit.schedule.cpu.plan import CpuKernel
from tracejit.schedule.cpu.text import parse_cpu_kernel
from tracejit.schedule.cpu.tiles import by_winograd
from tracejit.testing import assert_equal_to_eager

#: shapes of images and weights, and what else conv2d takes
CONVOLUTIONS = {
    "plain": ((8, 33, 8, 8), (32, 33, 3, 3), {"padding": 1}),
    "odd sizes": ((4, 32, 9, 11), (35, 32, 3, 3), {"padding": 1}),
    "odd lines": ((4, 32, 9, 12), (40, 32, 3, 3), {"padding": 1}),
    "odd columns": ((4, 40, 10, 11), (32, 40, 3, 3), {"padding": 1}),
    "unpadded": ((4, 32, 10, 12), (34, 32, 3, 3), {}),
    "more padding": ((8, 32, 6, 7), (34, 32, 3, 3), {"padding": 2}),
    "several strips": ((6, 32, 8, 8), (150, 32, 3, 3), {"padding": 1}),
    "several passes": ((5, 300, 8, 8), (32, 300, 3, 3), {"padding": 1}),
    "cropped": ((4, 32, 9, 10), (34, 32, 3, 3), {"padding": 3}),
    "small images": ((70, 32, 2, 2), (32, 32, 3, 3), {"padding": 1}),
    "long lines": ((1, 32, 5, 131), (32, 32, 3, 3), {"padding": (0, 1)}),
}
OTHERS = {
    "strides": ((8, 32, 16, 16), (32, 32, 3, 3), {"padding": 1, "stride": 2}),
    "dilation": ((8, 32, 16, 16), (32, 32, 3, 3), {"padding": 2, "dilation": 2}),
    "groups": ((8, 64, 16, 16), (64, 32, 3, 3), {"padding": 1, "groups": 2}),
    "five taps": ((8, 32, 16, 16), (32, 32, 5, 5), {"padding": 2}),
    "few channels": ((8, 3, 16, 16), (64, 3, 3, 3), {"padding": 1}),
    "few results": ((8, 64, 16, 16), (8, 64, 3, 3), {"padding": 1}),
    "few pieces": ((1, 32, 8, 8), (32, 32, 3, 3), {"padding": 1}),
    "wasted": ((80, 32, 3, 3), (32, 32, 3, 3), {"padding": 1}),
    "one line": ((8, 32, 1, 64), (32, 32, 3, 3), {"padding": 1}),
}


def tensors(name: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    image, weight, _ = (CONVOLUTIONS | OTHERS)[name]
    return [torch.randn(image, dtype=dtype), 0.1 * torch.randn(weight, dtype=dtype)]


def stepped(name: str) -> Callable:
    """Values and both gradients, with statements before and after the products."""
    options = (CONVOLUTIONS | OTHERS)[name][2]

    def step(x, w):
        y = F.conv2d(F.relu(x), w, **options)
        loss = (y * y.detach().cos()).sum()
        loss.backward()
        return y.detach().tanh(), loss.detach()

    return step


def kernels(step: Callable, *args: torch.Tensor) -> list[CpuKernel]:
    """The contractions of a step, as they are lowered."""
    graph = optimize(tracejit.capture(step, *args).graph)
    found = lower(schedule(graph), 32).kernels.values()
    return [kernel for kernel in found if kernel.tiling is not None]


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.sweep(1)
def test_values_and_gradients(name):
    def arguments():
        return [t.requires_grad_() for t in tensors(name)]

    ways = [kernel.tiling.way for kernel in kernels(stepped(name), *arguments())]
    assert ways == ["winograd"] * 3
    assert_equal_to_eager(stepped(name), arguments)


@pytest.mark.parametrize("name", ["plain", "odd sizes", "several strips"])
def test_channels_last(name):
    def arguments():
        found = [t.to(memory_format=torch.channels_last) for t in tensors(name)]
        return [t.requires_grad_() for t in found]

    assert {kernel.tiling.way for kernel in kernels(stepped(name), *arguments())} == {"winograd"}
    assert_equal_to_eager(stepped(name), arguments)


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[:, :, 1:-2, 2:-1],
        lambda x: x[:, :, ::2, 1:],
        lambda x: x[..., ::2],
        lambda x: x[:, ::2, 3:],
        lambda x: x[1::2, :, :-1],
        lambda x: x.transpose(2, 3),
        lambda x: x.flip(3),
        lambda x: x[:1].expand(8, 64, 20, 24),
    ],
)
@pytest.mark.sweep(1)
def test_images_that_are_parts_of_others(part):
    """Unpadded ones are read where they lie, line by line of the larger image."""
    torch.manual_seed(0)
    x = torch.randn(8, 64, 20, 24).requires_grad_()
    w = (0.1 * torch.randn(34, part(x).shape[1], 3, 3)).requires_grad_()

    def step(x, w):
        y = F.conv2d(part(x), w)
        loss = (y * y.detach().cos()).sum()
        loss.backward()
        return y.detach()

    assert_equal_to_eager(step, lambda: [x, w])


@pytest.mark.parametrize("padding", [3, (4, 1), (1, 4)])
def test_gradients_of_padding_beyond_the_taps(padding):
    """The image's gradient reads a part of the results' only, where they lie."""
    torch.manual_seed(0)
    x, w = torch.randn(4, 32, 10, 12), 0.1 * torch.randn(34, 32, 3, 3)
    g = torch.randn_like(F.conv2d(x, w, padding=padding))

    def step(x, w, g):
        return torch.autograd.grad(F.conv2d(x, w, padding=padding), (x, w), g)

    assert_equal_to_eager(step, lambda: [x.requires_grad_(), w.requires_grad_(), g])


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_none(name):
    args = [t.requires_grad_() for t in tensors(name)]
    assert "winograd" not in {kernel.tiling.way for kernel in kernels(stepped(name), *args)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_none(dtype):
    args = [t.requires_grad_() for t in tensors("plain", dtype)]
    assert "winograd" not in {kernel.tiling.way for kernel in kernels(stepped("plain"), *args)}


def test_texts_and_geometry():
    """Taps are digits of k, read against their direction where the image gets a gradient, and
    digits of the rows for the weight's gradient."""
    args = [t.requires_grad_() for t in tensors("odd sizes")]
    found = kernels(stepped("odd sizes"), *args)
    assert [parse_cpu_kernel(str(kernel)) for kernel in found] == found
    convolutions = [by_winograd(kernel.kernel) for kernel in found]
    told = {(w.in_k, w.flipped, w.channels, w.columns, w.width, w.height) for w in convolutions}
    assert told == {
        (True, (False, False), 32, 35, 11, 9),
        (True, (True, True), 35, 32, 11, 9),
        (False, (False, False), 32, 35, 11, 9),
    }


def test_accuracy():
    """The transforms' roundings are few: no error is larger than some times that of eager."""
    x, w = tensors("several passes")
    exact = F.conv2d(x.double(), w.double(), padding=1)
    eager = F.conv2d(x, w, padding=1)
    ours = tracejit.compile(lambda x, w: F.conv2d(x, w, padding=1), on_unsupported="raise")(x, w)
    errors = [float((y.double() - exact).norm() / exact.norm()) for y in (ours, eager)]
    assert errors[0] <= 6 * errors[1] + 1e-7


def test_what_lies_beyond_an_odd_image_takes_no_part():
    """The last pieces reach over the ends of lines and images: what is not finite there stays where
    it is."""
    x, w = tensors("odd sizes")
    x[1] = torch.inf
    step = tracejit.compile(lambda x, w: F.conv2d(x, w, padding=1), on_unsupported="raise")
    y = step(x, w)
    assert y[0].isfinite().all() and y[2:].isfinite().all() and not y[1].isfinite().any()


def test_the_number_of_threads_changes_no_bit():
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            args = [t.requires_grad_() for t in tensors("several strips")]
            step = tracejit.compile(stepped("several strips"), on_unsupported="raise")
            y, _ = step(*args)
            found.append([y, *(t.grad for t in args)])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
