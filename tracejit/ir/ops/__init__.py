"""All primitives, by name; importing a family registers it."""

from tracejit.ir.ops import elementwise, host, indexing, movement, structured
from tracejit.ir.ops.record import NO_GRAD, OPS, Op, Print

__all__ = [
    "NO_GRAD",
    "OPS",
    "Op",
    "Print",
    "elementwise",
    "host",
    "indexing",
    "movement",
    "structured",
]
