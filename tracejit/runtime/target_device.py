"""A GPU that is not here, to build for: kernels are compiled as on it and stored, none is launched.

What Triton is told of the GPU is what its driver would tell there. So the machine code lies in
Triton's cache under the key that a run on such a GPU looks for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from tracejit.ir.types import contiguous_strides
from tracejit.runtime.device import LoadedKernel, Properties
from tracejit.runtime.fake_launch import fake_driver
from tracejit.runtime.triton_api import active, load_kernel, require_compiler
from tracejit.runtime.triton_launch import DevicePointer, LoadedLaunch

# Multiprocessors, and bytes of shared memory that one program may use: of an A100, an H200, a B200.
TARGETS = {"sm_80": (108, 166912), "sm_90": (132, 232448), "sm_100": (148, 232448)}
_FIRST_NUMBER = 2000  # of such devices, for what Triton remembers of devices


class TargetDevice:
    """The GPU of a target; see `Device`. It has no memory and no time.

    meta: whether tensors of it are on torch's meta device; else they are zeros on the CPU.
    """

    def __init__(self, target: str, *, meta: bool):
        require_compiler(target)
        multiprocessors, shared = TARGETS[target]
        arch = int(target.removeprefix("sm_"))
        self.name, self.number, self._meta = target, _FIRST_NUMBER + arch, meta
        self.kernels = 0  # loaded so far, for each launch and each way in which buffers are aligned
        self.ahead = True  # kernels of graphs are loaded though no graph is made
        self._properties = Properties(target, arch, multiprocessors, shared)
        self._driver = fake_driver(self.number, arch, shared)
        self.current_stream = int  # 0
        self.capturing = bool  # False

    def properties(self) -> Properties:
        """Those of the target."""
        return self._properties

    def here(self) -> int:
        """It is always the current one."""
        return self.number

    def entered(self) -> contextlib.AbstractContextManager:
        """It is always the current one."""
        return contextlib.nullcontext()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Nothing: no address of it is used."""
        return torch.empty(0, dtype=torch.uint8)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Memory of the host."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def empty_strided(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """A tensor that stands for one of the GPU's. Its zeros take no memory until somebody looks
        at them."""
        if self._meta or 0 in shape:
            device = "meta" if self._meta else "cpu"
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)
        count = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        flat = torch.zeros(count, dtype=dtype)
        standard = tuple(strides) == contiguous_strides(tuple(shape))
        return flat.view(tuple(shape)) if standard else flat.as_strided(shape, strides)

    def upload(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Nothing."""

    def download(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Values that were computed for the host are on the host."""
        target.copy_(source)

    def duplicate(self, target: torch.Tensor, address: int) -> None:
        """Nothing."""

    def aside(self) -> contextlib.AbstractContextManager:
        """There is one stream."""
        return contextlib.nullcontext()

    def beside(self) -> contextlib.AbstractContextManager:
        """There is one stream."""
        return contextlib.nullcontext()

    def graph_of(self, give: Callable[[], None]) -> Callable[[], None]:
        """A graph of nothing."""
        give()
        return _launch

    def communicate(self, what: str, begin: object, reads: object, result: object) -> _Event:
        """Nothing."""
        return _Event()

    def event(self) -> _Event:
        """An event, which has passed."""
        return _Event()

    def load(self, launch: LoadedLaunch, pointers: Sequence[DevicePointer]) -> LoadedKernel:
        """Compile for the target and store; `run` does nothing."""
        with active(self._driver):
            loaded = load_kernel(launch, pointers)
        self.kernels += 1
        return LoadedKernel(_launch, loaded.function, loaded.packed)


class _Event:
    """An event of no device."""

    def record(self) -> None: ...

    def wait(self) -> None: ...

    def hold(self) -> None: ...


def _launch(*given: object) -> None:
    pass
