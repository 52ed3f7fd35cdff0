import torch

import tracejit
from tracejit.runtime import fake_device
from tracejit.testing import fake_device as a_gpu_that_is_not_there

fake_device._SHARED[86] = 16  # bytes of shared memory: too little for any product

with a_gpu_that_is_not_there("sm_86") as device:

    @tracejit.compile(backend=device.name, on_unsupported="raise")
    def step(x):
        return x @ x

    step(torch.ones(64, 64))
