import torch

import tracejit
from tracejit.testing import fake_device

with fake_device("sm_90") as device:

    @tracejit.compile(backend=device.name, on_unsupported="raise")
    def step(x):
        return x * 2

    with device.capture():  # on a GPU: torch.cuda.graph(torch.cuda.CUDAGraph())
        step(torch.ones(3))
