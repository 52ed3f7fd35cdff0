import sys

import torch

import tracejit

sys.modules["onnx"] = None  # as where it is not installed


@tracejit.compile
def step(x):
    return x * 2


tracejit.to_onnx(step, "step.onnx", torch.ones(3))
