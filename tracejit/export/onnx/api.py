"""`tracejit.to_onnx`: a step as an ONNX model in a file.

    step(*args) → step.py → Traced → export.py → a model, checked → a file

What the step changes is an input and an output; `run.py` has the runner that feeds it back. Nothing
of the exporter, nor the package onnx, is loaded before it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from os import PathLike

from tracejit.errors import MissingPackage


def to_onnx(step: Callable, path: str | PathLike, /, *args: object, **kwargs: object):
    """Write `step(*args, **kwargs)` to a file as an ONNX model, which is also returned.

    step: a compiled step, a function or a module. What it computes for arguments of these shapes
        and dtypes, in the state that it is in now, is written: forward, backward and optimizer, in
        operators of opset 20 of the default domain. Weights, optimizer state and whatever else it
        changes are inputs, with their values of now as defaults, and outputs, named `….next`;
        floats such as a learning rate are inputs with defaults; what it returns are outputs
        named `result…`. `tracejit.export.onnx.run.OnnxStep` runs it and feeds the state back.

    Its Python runs twice or more; no tensor, optimizer or scheduler is changed. Raises
    CannotExport, with the user's line, for what ONNX has no counterpart of, MissingPackage where
    onnx is not installed, and what a compiled step raises.
    """
    try:
        import onnx
    except ImportError as error:
        needed = {"package": "onnx", "extra": "onnx"}
        raise MissingPackage(what="tracejit.to_onnx", **needed) from error
    from tracejit.export.onnx.export import exported
    from tracejit.export.onnx.step import traced

    model = exported(traced(step, args, kwargs), version("tracejit"))
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path, format="protobuf")
    return model
