import torch

import tracejit


@tracejit.compile(backend="triton")
def step(x):
    return x * 2


step(torch.ones(3))  # on the CPU
