import torch

import tracejit


@tracejit.compile(on_unsupported="raise")  # else the call runs eagerly, with a warning
def step(x):
    torch.set_grad_enabled(False)
    return x * 2


step(torch.ones(3))
