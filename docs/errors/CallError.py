import torch

import tracejit


@tracejit.compile
def step(x):
    return x * 2


for _ in range(3):
    step(torch.ones(3))
step.save("double.step")
tracejit.load("double.step")(torch.ones(4))
