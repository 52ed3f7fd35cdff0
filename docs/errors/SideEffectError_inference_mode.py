import torch

import tracejit


@tracejit.compile(on_unsupported="raise")
def step(x):
    return x * 2


with torch.inference_mode():
    step(torch.ones(3))
