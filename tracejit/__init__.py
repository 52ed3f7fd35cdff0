"""tracejit: compile a whole PyTorch training step into a few Triton kernels and replay it."""

__version__ = "0.1.0"

from tracejit import errors
from tracejit.captured import CapturedStep, capture
from tracejit.compile import CompiledStep, Stats, compile

__all__ = [
    "CapturedStep",
    "CompiledStep",
    "Stats",
    "__version__",
    "capture",
    "compile",
    "errors",
]
