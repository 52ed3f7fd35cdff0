import torch

import tracejit

w = torch.ones(3, requires_grad=True)


@tracejit.compile
def step():
    y = w.exp()
    y += 1
    y.sum().backward()


step()
