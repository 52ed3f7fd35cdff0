import torch

import tracejit


@tracejit.compile(target="sm_90")
def step(x):
    return x * 2


step(torch.ones(3))
