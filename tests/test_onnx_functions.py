"""Torch functions on their samples, exported, in onnxruntime, beside eager."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import tracejit
from support.function_checks import ERRORS, assert_close
from support.function_samples import Sample, each_function, samples_of
from tracejit.capture.trace.table import function_name
from tracejit.capture.trace.tensor import tensors_of
from tracejit.errors import CannotExport, UnsupportedOperation

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

ULPS = 256  # of a typical element; onnxruntime adds up in other orders, and has its own functions
KNOWN = {torch.float32, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8}
KNOWN |= {torch.int16, torch.bool}  # which numpy has, and eager computes as such


def first_taken(function) -> Sample | None:
    """The first sample that eager takes whose only inputs are tensors, of dtypes of numpy's."""
    for sample in samples_of(function):
        args, kwargs = sample.fresh()
        try:
            expected = function(*args, **kwargs)
        except ERRORS:
            continue
        found = tensors_of((*sample.args, *sample.kwargs.values(), expected))
        floats = any(type(x) is float for x in (*sample.args, *sample.kwargs.values()))
        if found and not floats and {t.dtype for t in found} <= KNOWN:
            return sample
    return None


@pytest.mark.sweep(12)
@pytest.mark.parametrize("function", each_function(), ids=function_name)
@pytest.mark.filterwarnings("ignore")
def test_a_function_has_the_values_of_eager(function, tmp_path):
    from tracejit.export.onnx.run import OnnxStep

    sample = first_taken(function)
    if sample is None:
        pytest.skip("no sample that eager takes has tensors as its only inputs")
    args, kwargs = sample.fresh()
    given = [x.detach().numpy().copy() for x in tensors_of((*args, *kwargs.values()))]

    def step(*args, **kwargs):
        return function(*args, **kwargs)

    try:
        tracejit.to_onnx(step, tmp_path / "model.onnx", *args, **kwargs)
    except (CannotExport, UnsupportedOperation) as error:
        pytest.skip(f"refused: {error}")
    model = OnnxStep(tmp_path / "model.onnx")
    if any(i.name.startswith("draw.") for i in model.session.get_inputs()):
        pytest.skip("it draws random numbers, which are inputs")
    found = model(*given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = function(*args, **kwargs)
    ours = leaves_of(found)
    numbers = [torch.as_tensor(x) for x in leaves_of(expected)]
    for mine, theirs in zip(ours, numbers, strict=True):
        mine = torch.as_tensor(np.asarray(mine))
        mine = mine if theirs.dim() else mine.to(theirs.dtype)  # numbers of Python are float64
        assert_close(mine, theirs, exact=False, what=str(sample), ulps=ULPS)


def leaves_of(x: object) -> list:
    """The tensors, arrays and numbers in a result, in order."""
    if isinstance(x, dict):
        return [a for item in x.values() for a in leaves_of(item)]
    if isinstance(x, (list, tuple)):
        return [a for item in x for a in leaves_of(item)]
    return [x] if isinstance(x, (np.ndarray, torch.Tensor, int, float)) else []
