import torch

import tracejit


@tracejit.compile
def step(x):
    return x.view(torch.int32) * 2  # the bits of floats


tracejit.to_onnx(step, "step.onnx", torch.ones(3))
