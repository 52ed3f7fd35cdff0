import torch

import tracejit

total, w = torch.zeros(3), torch.ones(3, requires_grad=True)


@tracejit.compile(on_unsupported="raise")
def step():
    total.add_(w)  # in eager, total requires grad from now on


step()
