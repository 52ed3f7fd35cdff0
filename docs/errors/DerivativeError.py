import torch

import tracejit

w = torch.ones(3, requires_grad=True)


@tracejit.compile
def step():
    torch.floor_divide(w, 2.0).sum().backward()


step()
