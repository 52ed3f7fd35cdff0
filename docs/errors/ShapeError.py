import torch

import tracejit


@tracejit.compile
def step(x, w):
    return (x @ w).sum()


step(torch.ones(2, 3), torch.ones(2, 3))
