import torch

import tracejit


@tracejit.compile
def step(x):
    return x.sum(dim=2)


step(torch.ones(4, 5))
