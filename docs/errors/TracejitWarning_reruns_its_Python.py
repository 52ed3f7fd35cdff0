import random

import torch

import tracejit


@tracejit.compile
def step(x):
    return x * random.choice([1.0, 2.0])


for _ in range(3):
    step(torch.ones(3))
