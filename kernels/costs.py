"""What a tiled product costs on a GPU, by its tile and into how many stretches its K is cut.

A model, not a measurement: it only has to tell good choices from bad ones. It knows a GPU by the
number of its SMs, each as fast as one of `REFERENCE`. Plain Python without Triton.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tracejit.gpus import ARCHES, BALANCE, GPUS, IN_FLIGHT, L2_WIDTH, LATENCY, LONG

REFERENCE = GPUS["H200"]
SMS = REFERENCE.sms  # where no GPU is known
MOST_SPLITS = 64
MOST_BYTES = 64 << 20  # of partial tiles
GAIN = 0.95  # of the time without splits that one with splits may take
SLACK = 0.4  # more time for each limit of reports that a choice does not keep
STEPS, PATIENCE = 64, 0.1  # of a split: fewer steps for so much more time

_PER_SM = L2_WIDTH * REFERENCE.clock  # bytes a second from the L2 cache
_ALONE = 2  # times its share of them that an SM takes while others are idle: an assumption
# Half of the peak is reached by tiles that use each operand so often: an assumption, by which
# 64 × 64 tiles of FMAs reach 0.73 of it, those of tensor cores 0.4.
_REUSE = {True: 48, False: 12}


class Tile(NamedTuple):
    """A choice of `tiles.py`; `weight`: the largest weight of an epilogue without spills, which
    goes over the tile in so many `pieces`."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    weight: int
    pieces: int = 1


@dataclass(frozen=True)
class Product:
    """Products of m × k and k × n matrices. `itemsize` of operands, `total` of accumulators;
    `peak`: operations a second of the reference; `tensor`: on tensor cores."""

    batch: int
    m: int
    n: int
    k: int
    itemsize: int
    total: int
    peak: float
    tensor: bool
    ahead: bool  # whether tiles of operands are loaded ahead
    windows: bool = False  # whose addresses leave no registers for a fold in two levels


class Splits(NamedTuple):
    """Into how many stretches K is cut, and how many partial tiles are added up at a time."""

    splits: int
    group: int


def splits_of(product: Product, tile: Tile) -> Iterator[int]:
    """The numbers of stretches that are worth a look: each takes fewer steps than the one before,
    and none is without work. With two accumulators there is one, and where registers are short:
    of a large tile whose k has masks."""
    trips, fewest = cdiv(product.k, tile.k), math.inf
    tiles = _tiles(product, tile)
    short = tile.m * tile.n > 128 * 128 and product.k % tile.k
    most = 1 if short or accumulators(tile.n) > 1 else MOST_SPLITS
    for splits in range(1, min(most, trips) + 1):
        steps = cdiv(trips, splits)
        room = tiles * splits * tile.m * tile.n * product.total <= MOST_BYTES
        if steps < fewest and cdiv(trips, steps) == splits and (room or splits == 1):
            fewest = steps
            yield splits


def cheapest(product: Product, tile: Tile, sms: int) -> tuple[float, Splits]:
    """The time of a tile with the best number of splits, in seconds, and that number. A tile that
    keeps a GPU too idle counts as slower."""
    whole, found = seconds(product, tile, 1, sms), []
    for splits in splits_of(product, tile):
        if splits > 1:
            group, fold = _fold(product, tile, splits)
            time = seconds(product, tile, splits, sms) + fold
            if time < GAIN * whole:
                long = cdiv(product.k, tile.k * splits) > STEPS
                found.append((time * (1 + PATIENCE * long), time, Splits(splits, group)))
    time, best = min(found)[1:] if found else (whole, Splits(1, 1))
    return time * (1 + SLACK * _idle(product, tile, best.splits, sms)), best


def seconds(product: Product, tile: Tile, splits: int, sms: int) -> float:
    """The longest of what loops over K take: products, loads, waiting for them. Partial tiles are
    stored and loaded too."""
    programs = _tiles(product, tile) * splits
    steps = cdiv(product.k, tile.k * splits)
    slots = sms * _per_sm(product, tile)
    busiest = cdiv(programs, sms) * steps  # of the SMs: so many times a tile's depth
    reuse = tile.m * tile.n / (tile.m + tile.n)
    peak = product.peak / SMS * reuse / (reuse + _REUSE[product.tensor])
    ahead = max(1, min(tile.stages - 1, steps)) if product.ahead else 1
    loaded = (tile.m + tile.n) * tile.k * product.itemsize
    issued = programs * (loaded * steps + (splits > 1) * 2 * tile.m * tile.n * product.total)
    times = (
        2 * tile.m * tile.n * tile.k * busiest / peak,
        max(issued / sms, loaded * busiest / _ALONE) / _PER_SM,
        LATENCY * steps / ahead * max(1.0, programs / slots),
        (product.m + product.n)
        * product.k
        * product.batch
        * product.itemsize
        / (REFERENCE.bandwidth / SMS * sms),
    )
    return max(times)


def _idle(product: Product, tile: Tile, splits: int, sms: int) -> int:
    """How many of the limits of reports a choice does not keep; two tiles are loaded ahead."""
    programs = _tiles(product, tile) * splits
    loaded = (tile.m + tile.n) * tile.k * product.itemsize
    slots = sms * _per_sm(product, tile)
    waiting = min(programs, slots) * loaded * (1 + product.ahead) / sms
    balance = programs / (sms * cdiv(programs, sms))
    long = cdiv(product.k, tile.k * splits) >= LONG
    return long * ((waiting < IN_FLIGHT) + (balance < BALANCE))


def _fold(product: Product, tile: Tile, splits: int) -> tuple[int, float]:
    """How many partial tiles are added up at a time, and how long a tile waits for its sum."""
    nbytes = tile.m * tile.n * product.total
    found = []
    for group in {splits} if product.windows else {splits, math.isqrt(splits - 1) + 1}:
        levels = [group] if group == splits else [group, cdiv(splits, group)]
        # the partial is stored; the counter; then loads
        waits = sum(1 + cdiv(n, at_once(tile.m * tile.n)) for n in levels)
        time = waits * LATENCY + (len(levels) + sum(levels)) * nbytes / _PER_SM
        found.append((time, group))
    time, group = min(found)
    return group, time


def at_once(size: int) -> int:
    """How many partial tiles of so many elements are loaded at a time, as `fold_tiles` does."""
    return min(8, 16384 // size) if size <= 4096 else 1


def _tiles(product: Product, tile: Tile) -> int:
    return product.batch * cdiv(product.m, tile.m) * cdiv(product.n, tile.n)


def _per_sm(product: Product, tile: Tile) -> int:
    """Programs that an SM holds, by an estimate of their registers and shared memory."""
    threads = 32 * tile.warps
    registers = min(255, 50 + 3 * tile.m * tile.n * product.total // (8 * threads))
    shared = (tile.m + tile.n) * tile.k * product.itemsize * tile.stages + 1024
    return max(1, min(65536 // (registers * threads), ARCHES[90].shared_per_sm // shared))


def accumulators(columns: int) -> int:
    """How many accumulators a tile has. One of 3/4 of a power of two columns has two: two thirds
    and one third of them."""
    return 2 if columns % 3 == 0 else 1


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)
