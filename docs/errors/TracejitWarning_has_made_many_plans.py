import torch

import tracejit


@tracejit.compile
def step(x):
    return x * 2


for n in range(12):
    step(torch.ones(n + 2))  # each size has a plan
