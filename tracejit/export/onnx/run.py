"""Runs an exported model. Needs onnxruntime and numpy: copy this file to where the model goes."""

import ctypes
import json

import numpy as np
import onnxruntime

BFLOAT16 = 16  # of onnx.TensorProto


def array(value):
    """A value of onnxruntime in numpy."""
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    shape = value.shape()
    bits = np.empty(shape, np.uint16)
    ctypes.memmove(bits.ctypes.data, value.data_ptr(), bits.nbytes)
    return (bits.astype(np.uint32) << 16).view(np.float32)


class OnnxStep:
    """`step = OnnxStep("step.onnx")`, then `loss = step(x, y)`: what the step changes is fed back.

    Arguments by place or by name; any other input by name: `step(x, y, **{"lr": 0.01})`.
    Of bfloat16, which numpy lacks, results are float32, and what is given is rounded.
    """

    def __init__(self, path, **options):
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3  # it warns of each input that has a default
        options = {"providers": ["CPUExecutionProvider"], "sess_options": settings} | options
        self.session = onnxruntime.InferenceSession(path, **options)
        about = json.loads(self.session.get_modelmeta().custom_metadata_map["tracejit"])
        self.arguments, self.pairs, self.tree = (about[k] for k in ("arguments", "state", "result"))
        self.outputs = [o.name for o in self.session.get_outputs()]
        inputs = (*self.session.get_inputs(), *self.session.get_overridable_initializers())
        self.types = {i.name: i.type for i in inputs}
        self.state = {}  # what has changed: onnxruntime's values, by the names of inputs

    def __call__(self, *args, **named):
        if len(args) > len(self.arguments):
            raise TypeError(f"the model takes {self.arguments}, not {len(args)} arguments")
        given = dict(zip(self.arguments, args, strict=False)) | named
        feeds = self.state | {name: self._value(name, x) for name, x in given.items()}
        results = self.session.run_with_ort_values(self.outputs, feeds)
        found = dict(zip(self.outputs, results, strict=True))
        self.state |= {name: found[output] for name, output in self.pairs.items()}
        return self._result(self.tree, found)

    def _value(self, name, x):
        if isinstance(x, onnxruntime.OrtValue):
            return x
        if self.types.get(name) == "tensor(bfloat16)":
            x = np.asarray(x.float() if hasattr(x, "float") else x, np.float32)
            bits = x.view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            x = np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16, order="C")
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(x, BFLOAT16)
        x = np.asarray(x, np.float64 if self.types.get(name) == "tensor(double)" else None)
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x).reshape(x.shape))

    def _result(self, tree, found):
        ((kind, x),) = tree.items()
        match kind:
            case "output":
                return array(found[x])
            case "value":
                return x
            case "dict":
                return {key: self._result(item, found) for key, item in x}
        return {"list": list, "tuple": tuple}[kind](self._result(item, found) for item in x)
