"""All primitives, by name; importing a family registers it."""

from tracejit.ir.ops import (
    attention,
    collectives,
    elementwise,
    host,
    indexing,
    loop,
    matrices,
    movement,
    order,
    rare,
    running,
    structured,
)
from tracejit.ir.ops.record import BITS, EDGES, NO_GRAD, OPS, ULPS, Exact, Op

__all__ = [
    "BITS",
    "EDGES",
    "NO_GRAD",
    "OPS",
    "ULPS",
    "Exact",
    "Op",
    "attention",
    "collectives",
    "elementwise",
    "host",
    "indexing",
    "loop",
    "matrices",
    "movement",
    "order",
    "rare",
    "running",
    "structured",
]
