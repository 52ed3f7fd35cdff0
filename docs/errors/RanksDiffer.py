import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tracejit


def rank(number, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=2)

    @tracejit.compile
    def step(x):
        if number == 0:
            dist.all_reduce(x)
        else:
            dist.broadcast(x, 0)
        return x

    step(torch.ones(3))


if __name__ == "__main__":
    folder = tempfile.mkdtemp()
    other = mp.get_context("spawn").Process(target=rank, args=(1, f"{folder}/ranks"))
    other.start()
    try:
        rank(0, f"{folder}/ranks")
    finally:
        other.join()
