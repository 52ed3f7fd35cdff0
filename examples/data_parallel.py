"""Train on several processes: forward, backward, reduction and update in one compiled step.

    torchrun --nproc-per-node=2 examples/data_parallel.py [--eager]

Over gloo on CPUs, over NCCL where each process has a GPU. Each process takes its own part of the
data; DistributedDataParallel averages the gradients, in buckets that are reduced while others are
still computed.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as distributed
from torch.nn.parallel import DistributedDataParallel

import tracejit

WIDTH, CLASSES, BATCH, STEPS = 256, 10, 64, 200


def main() -> None:
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(32, WIDTH),
        torch.nn.ReLU(),
        torch.nn.Linear(WIDTH, WIDTH),
        torch.nn.ReLU(),
        torch.nn.Linear(WIDTH, CLASSES),
    )
    net, teacher = net.to(device), torch.randn(32, CLASSES, device=device)
    model = DistributedDataParallel(net, bucket_cap_mb=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    if "--eager" not in sys.argv:
        step = tracejit.compile(step)
    torch.manual_seed(1 + rank)  # each rank has data of its own
    started = 0.0
    for n in range(STEPS):
        if n == 10:
            distributed.barrier()
            started = time.perf_counter()
        x = torch.randn(BATCH, 32, device=device)
        loss = step(x, (x @ teacher).argmax(1))
        if n % 50 == 0 or n == STEPS - 1:
            mean = loss.detach().clone()
            distributed.all_reduce(mean)
            if rank == 0:
                print(f"step {n}: loss {mean / world:.4f}")
    if rank == 0:
        seconds = (time.perf_counter() - started) / (STEPS - 10)
        print(f"{seconds * 1e3:.2f} ms a step on each of {world} processes")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
