"""A step on the CUDA device with Triton's own C launcher, over a stub of libcuda, which prints what
is launched; then where the tensors are. A program, to be run with TRITON_LIBCUDA_PATH set."""

from __future__ import annotations

import contextlib

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

import tracejit
from tracejit.runtime.cuda_device import CudaDevice
from tracejit.runtime.select import FAKES
from tracejit.runtime.triton_executor import TritonExecutor

STREAM = 0x77


def main() -> None:
    torch._C._cuda_getDevice = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda number: STREAM
    torch._C._cuda_isCurrentStreamCapturing = lambda: False
    torch.cuda.device = lambda number: contextlib.nullcontext()
    driver = CudaDriver.__new__(CudaDriver)  # whose __init__ asks torch for a GPU
    driver.utils, driver.launcher_cls = CudaUtils(), CudaLauncher
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: STREAM
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(driver)
    device = CudaDevice(0)
    device._device, device.pinned = torch.device("cpu"), device.allocate
    executor = TritonExecutor("stub", device_of=lambda name: device)
    FAKES["stub"] = lambda precision: executor
    w, x = torch.randn(64, 64), torch.randn(50_000)

    def step() -> torch.Tensor:
        w.sub_(torch.tanh(w))
        return x * 2

    compiled = tracejit.compile(step, backend="stub", on_unsupported="raise")
    for _ in range(5):
        y = compiled()
    print("tensors", *(hex(t.data_ptr()) for t in (w, x, y)), compiled.stats.replays)


if __name__ == "__main__":
    main()
