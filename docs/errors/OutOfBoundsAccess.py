import torch

from tracejit.runtime.interpreter import Pointer, prepare, run

prepare()  # before triton is imported
import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def kernel(x):
    tl.store(x + tl.arange(0, 8), 1.0)  # without a mask


x = torch.zeros(5)
run(kernel, (1,), [Pointer.of(x)], buffers=[(x.data_ptr(), 4 * 5)])
