"""Convolutions of 3 × 3 taps with 16 products for every 2 × 2 results instead of 36.

In: a contraction that reads one operand through windows. Out: what of it is taps, image and
channels, if it is such a convolution: forward and for the image's gradient the taps are digits of
k, for the weight's gradient digits of the result's rows. Every 4 × 4 piece d of an image, every
kernel g, and every 2 × 2 piece y of the results is transformed,

    y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A        dg = Gᵀ [(A dy Aᵀ) ⊙ (Bᵀ d B)] G

(Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016, F(2×2, 3×3)), and ⊙ over
all channels and pieces is 16 products of matrices. Their entries are sums of 4 elements, of halves
and of quarters, so that results differ from plain sums by a few roundings more.
"""

from __future__ import annotations

import math
from functools import cached_property

from tracejit.ir.types import f32
from tracejit.records import dataclass
from tracejit.schedule.cpu.digits import Digits
from tracejit.schedule.cpu.plan import LINE
from tracejit.schedule.cpu.windows import Windows
from tracejit.schedule.kernel import Dot, Index

LEAST = 32  # channels on both sides, for which transforms pay
LEAST_PIECES = 64  # of images, likewise
WASTED = 1.4  # times as many results as there are, at most, where sizes are odd
PIECES = 64  # of images that are transformed at a time
MOST_PIECES = 128  # in two lines of an image
CHUNKS = 16  # at most: each works in memory of its own
BLOCK = 16  # channels whose weight gradients are one unit of work
UNITS = 16  # of them at most, where blocks grow
COLLIDE = 512  # bytes between planes of which 16 do not fit a cache side by side


@dataclass(frozen=True)
class Winograd:
    """A convolution of 3 × 3 taps whose step and dilation are 1.

    in_k:    whether the taps are digits of k; else of the result's rows.
    taps:    the axis with the channels and the taps. image: the axis of the pixels.
    steps:   from one column, and from one line, to the next, of what windows read.
    flipped: whether columns, and lines, are read against the taps.
    channels: how many there are beside the taps. columns: of the result, all of n.
    """

    in_k: bool
    taps: Digits
    image: Digits
    steps: tuple[int, int]
    flipped: tuple[bool, bool]
    channels: int
    columns: int

    def steps_as_in(self, index: Index) -> bool:
        """Whether windows that read at an index, not in a copy, step as they do in the copy: an
        image that is part of a larger one has longer lines in memory."""
        return _steps(self.image, self.taps, index) == (self.steps, self.flipped)

    @property
    def width(self) -> int:
        return self.image.digits[0].extent

    @property
    def height(self) -> int:
        return self.image.digits[1].extent

    @property
    def images(self) -> int:
        return self.image.axis.extent // (self.width * self.height)

    @property
    def across(self) -> int:
        """Pieces side by side in an image."""
        return -(-self.width // 2)

    @property
    def down(self) -> int:
        """Pairs of lines in an image."""
        return -(-self.height // 2)

    @property
    def pairs(self) -> int:
        """Pairs of lines in all images."""
        return self.images * self.down

    @cached_property
    def pairs_at_once(self) -> int:
        """Pairs of lines whose pieces are transformed at a time."""
        return max(1, min(PIECES // self.across, self.pairs))

    @property
    def pieces(self) -> int:
        """Pieces that are transformed at a time."""
        return self.pairs_at_once * self.across

    @cached_property
    def channels_at_once(self) -> int:
        """Channels that are transformed at a time: all, or those of a unit of weight gradients."""
        if self.in_k:
            return self.channels
        block = BLOCK
        while self.channels > UNITS * block:
            block *= 2
        return min(block, self.channels)

    @property
    def units(self) -> int:
        """Of work: pairs of lines, or channels of the weight's gradient."""
        if self.in_k:
            return -(-self.pairs // self.pairs_at_once)
        return -(-self.channels // self.channels_at_once)

    @property
    def chunks(self) -> int:
        return min(self.units, CHUNKS)

    @property
    def rows(self) -> int:
        """Rows of the result in a unit, at most."""
        return self.pairs_at_once * 2 * self.width if self.in_k else 9 * self.channels_at_once

    @property
    def products(self) -> tuple[int, int]:
        """Rows and depth of a product of matrices within a unit."""
        sizes = self.pieces, self.channels_at_once
        return sizes if self.in_k else sizes[::-1]

    # --- memory, in elements: 16 planes of each kind

    @property
    def piece_plane(self) -> int:
        """Of the transformed pieces of an image."""
        return _apart(self.pieces * self.channels_at_once)

    def kernel_plane(self, columns: int) -> int:
        """Of the transformed kernels for so many columns of the result."""
        return _apart(self.channels * columns)

    def result_plane(self, strip: int) -> int:
        """Of the transformed pieces of a strip of the results' gradients."""
        return _apart(self.pieces * strip)

    def product_plane(self, strip: int) -> int:
        """Of the products of a strip."""
        return _apart(self.products[0] * strip)

    def shared_elements(self, strips: int, strip: int) -> int:
        """What all units read."""
        return 16 * self.kernel_plane(strips * strip) if self.in_k else 0

    def chunk_elements(self, strips: int, strip: int) -> int:
        """What a chunk works in."""
        if self.in_k:
            return 16 * (self.piece_plane + self.product_plane(strip))
        others = self.result_plane(strip) + strips * self.product_plane(strip)
        return 16 * (self.piece_plane + others)


def _apart(elements: int) -> int:
    """The elements from one plane to the next: not such that all planes fall on the same lines of
    a cache."""
    return elements + LINE // 4 if elements * 4 % COLLIDE == 0 else elements


def winograd_of(windows: Windows, dot: Dot, columns: int) -> Winograd | None:
    """The convolution that a contraction is; None where it is none, or not worth it."""
    for taps, image, in_k in (
        (windows.depth, windows.rows, True),
        (windows.rows, windows.depth, False),
    ):
        found = _convolution(windows, taps, image, in_k, columns)
        if found is not None and dot.out.dtype is f32 and _pays(found):
            return found
    return None


def _convolution(
    windows: Windows, taps: Digits, image: Digits, in_k: bool, columns: int
) -> Winograd | None:
    if len(image.digits) < 2 or [(d.unit, d.extent) for d in taps.digits[:2]] != [(1, 3), (3, 3)]:
        return None
    found = _steps(image, taps, windows.place)
    if found is None:
        return None
    channels = math.prod(d.extent for d in taps.digits[2:])
    return Winograd(in_k, taps, image, *found, channels, columns)


def _steps(
    image: Digits, taps: Digits, place: Index
) -> tuple[tuple[int, int], tuple[bool, bool]] | None:
    """The steps from one column, and one line, to the next, and whether taps go against them; None
    where taps have other steps."""
    moves = dict(place.terms)
    steps = tuple(moves.get(d.name, 0) for d in image.digits[:2])
    of_taps = tuple(moves.get(d.name, 0) for d in taps.digits[:2])
    if not all(s > 0 and abs(t) == s for s, t in zip(steps, of_taps, strict=True)):
        return None
    return steps, tuple(t < 0 for t in of_taps)


def _pays(w: Winograd) -> bool:
    wasted = 4 * w.across * w.down > WASTED * w.width * w.height
    many = w.images * w.across * w.down >= LEAST_PIECES and w.across <= MOST_PIECES
    return min(w.channels, w.columns) >= LEAST and many and not wasted
