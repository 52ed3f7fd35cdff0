import torch

import tracejit


@tracejit.compile(on_unsupported="raise")  # else the call runs eagerly, with a warning
def step(x):
    return (x * 2).data_ptr()


step(torch.ones(3))
