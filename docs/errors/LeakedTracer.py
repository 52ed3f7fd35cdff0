import torch

import tracejit


@tracejit.compile(on_unsupported="raise")  # else the call runs eagerly, with a warning
def step(x):
    x.set_(x * 2)  # in C, past torch's functions


step(torch.ones(3))
