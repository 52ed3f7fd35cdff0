import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import tracejit


def rank(number, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=2)
    model = DistributedDataParallel(torch.nn.Linear(3, 1))

    @tracejit.compile
    def step(x):
        model(x).sum().backward()

    with model.join(throw_on_early_termination=True):
        for _ in range(2 - number):
            step(torch.ones(2, 3))


if __name__ == "__main__":
    folder = tempfile.mkdtemp()
    other = mp.get_context("spawn").Process(target=rank, args=(1, f"{folder}/ranks"))
    other.start()
    try:
        rank(0, f"{folder}/ranks")
    finally:
        other.join()
