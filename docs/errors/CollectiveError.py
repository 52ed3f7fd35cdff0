import torch
import torch.distributed as dist

import tracejit


def start():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@tracejit.compile
def step(x):
    dist.all_reduce(x)


start()
for _ in range(3):
    step(torch.ones(3))
dist.destroy_process_group()
start()  # another group, which the step was not compiled for
step(torch.ones(3))
