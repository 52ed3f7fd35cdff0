"""The rules by family; importing this package fills the table."""

from tracejit.capture.functions import (
    arithmetic,
    autograd,
    contraction,
    factories,
    metadata,
    movement,
    reduction,
    unary,
)

__all__ = [
    "arithmetic",
    "autograd",
    "contraction",
    "factories",
    "metadata",
    "movement",
    "reduction",
    "unary",
]
