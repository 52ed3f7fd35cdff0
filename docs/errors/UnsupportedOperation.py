import torch

import tracejit


@tracejit.compile(on_unsupported="raise")  # else the call runs eagerly, with a warning
def step(x):
    return torch.linalg.eig(x).eigenvalues.abs()


step(torch.eye(3))
