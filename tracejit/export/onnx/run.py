"""Runs an exported model. Needs onnxruntime and numpy: copy this file to where the model goes."""

import json

import numpy as np
import onnxruntime


class OnnxStep:
    """`step = OnnxStep("step.onnx")`, then `loss = step(x, y)`: what the step changes is fed back.

    Arguments by place or by name; any other input by name: `step(x, y, **{"lr": 0.01})`.
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
        self.doubles = {i.name for i in inputs if i.type == "tensor(double)"}
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
        x = np.asarray(x, np.float64 if name in self.doubles else None)
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x).reshape(x.shape))

    def _result(self, tree, found):
        ((kind, x),) = tree.items()
        match kind:
            case "output":
                return found[x].numpy()
            case "value":
                return x
            case "dict":
                return {key: self._result(item, found) for key, item in x}
        return {"list": list, "tuple": tuple}[kind](self._result(item, found) for item in x)
