"""tracejit: compile a whole PyTorch training step into a few Triton kernels and replay it."""

__version__ = "0.1.0"

from tracejit.garbage import uncollected

with uncollected():  # what is imported stays; looking through it, and all of torch, finds nothing
    from tracejit import errors
    from tracejit.captured import CapturedStep, capture
    from tracejit.compile import CompiledStep, Stats, compile
    from tracejit.export.onnx.api import to_onnx
    from tracejit.numpy_front.gradient import grad
    from tracejit.runtime.prefetch import prefetch
    from tracejit.saved.loaded import LoadedStep, load
    from tracejit.static import Graph

__all__ = [
    "CapturedStep",
    "CompiledStep",
    "Graph",
    "LoadedStep",
    "Stats",
    "__version__",
    "capture",
    "compile",
    "errors",
    "grad",
    "load",
    "prefetch",
    "to_onnx",
]
