import torch

import tracejit


@tracejit.compile
def step(x):
    return torch.linalg.inv(x)


for _ in range(3):
    step(torch.eye(3))
step.eject("step.py")
