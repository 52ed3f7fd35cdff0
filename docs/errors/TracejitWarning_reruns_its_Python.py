import random

import torch

import tracejit


@tracejit.compile
def step(x):
    return x * random.random()


for _ in range(3):
    step(torch.ones(3))
