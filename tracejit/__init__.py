"""tracejit: compile a whole PyTorch training step into a few Triton kernels and replay it."""

__version__ = "0.1.0"

from tracejit import errors
from tracejit.compile import CompiledStep, Stats, compile

__all__ = ["CompiledStep", "Stats", "__version__", "compile", "errors"]
