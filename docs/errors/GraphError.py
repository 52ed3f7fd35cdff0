import torch

import tracejit


@tracejit.compile(require_graph=True)
def step(x):
    return x * 2


step(torch.ones(3))  # on the CPU
