import torch

import tracejit


@tracejit.compile
def step(x):
    print(x.sum())
    return x * 2


for _ in range(3):
    step(torch.ones(3))
step.save("a.step")
