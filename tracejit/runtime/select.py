"""Which executor runs a plan: by backend, by the device of the step, by what the machine has."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from tracejit.errors import BackendUnavailable
from tracejit.runtime.executor import Executor

if TYPE_CHECKING:
    from tracejit.runtime.device import Device
    from tracejit.runtime.triton_executor import TritonExecutor

# torch.get_float32_matmul_precision() → how fp32 contractions are computed on a GPU
_PRECISION = {"highest": "ieee", "high": "tf32", "medium": "tf32"}


# executors of tests and of targets, by backend, for a precision: see testing.py and build.py
FAKES: dict[str, Callable[[str], Executor]] = {}


def executor_for(backend: str, device: str, precision: str = "highest") -> Executor:
    """The executor that runs plans of a device under a backend."""
    if backend == "auto":
        backend = "cpu" if device == "cpu" else "triton"
    if backend in FAKES:
        return FAKES[backend](_PRECISION[precision])
    if (backend == "triton") == (device == "cpu"):
        raise BackendUnavailable(
            backend=backend,
            reason=f"the step's tensors are on {device}",
            remedy="Use backend='auto', or move the tensors",
        )
    if backend == "triton":
        return _on_cuda(_PRECISION[precision])
    return _on_cpu(backend)


@functools.cache
def _on_cuda(precision: str) -> TritonExecutor:
    from tracejit.runtime.cuda_device import cuda_device
    from tracejit.runtime.triton_executor import TritonExecutor

    return TritonExecutor("triton", precision=precision, device_of=cuda_device)


@functools.cache
def _on_cpu(backend: str) -> Executor:
    if backend == "cpu":
        return _cpu_executor()
    if backend == "c":
        from tracejit.runtime.c_executor import CExecutor

        return CExecutor(torch.get_num_threads)
    if backend == "numpy":
        from tracejit.runtime.numpy_executor import NumpyExecutor

        return NumpyExecutor()
    from tracejit.runtime.triton_executor import TritonExecutor

    return TritonExecutor("interpret")


@contextlib.contextmanager
def registered(device: Device, *, computes: bool = True) -> Iterator[str]:
    """A context in which there is a backend, of the device's name, whose plans are for a device."""
    from tracejit.runtime.triton_executor import TritonExecutor

    @functools.cache
    def executor_of(precision: str) -> TritonExecutor:
        return TritonExecutor(
            device.name, precision=precision, device_of=lambda name: device, computes=computes
        )

    before = FAKES.get(device.name)
    FAKES[device.name] = executor_of
    try:
        yield device.name
    finally:
        if before is None:
            del FAKES[device.name]
        else:
            FAKES[device.name] = before


def gpu(name: str) -> Device:
    """The device of a name: "cuda", "cuda:1", or one that is registered."""
    if name in FAKES:
        return FAKES[name](_PRECISION["highest"]).device_of(name)
    kind = torch.device(name).type
    if kind != "cuda":
        raise BackendUnavailable(
            backend=name,
            reason=f"it is of type {kind}",
            remedy='Use device="cuda", or "cpu"',
        )
    from tracejit.runtime.cuda_device import cuda_device

    number = torch.device(name).index
    return cuda_device(f"cuda:{torch.cuda.current_device()}" if number is None else name)


def start_early(backend: str) -> None:
    """Begin what the executor of CPU steps needs, beside the first trace, where the step's device
    is known already."""
    if torch.version.cuda is None and torch.version.hip is None and backend in ("auto", "c"):
        _started()


@functools.cache
def _started() -> None:
    threading.Thread(target=_prepared, daemon=True).start()


def _prepared() -> None:
    with contextlib.suppress(Exception):  # it is said where the executor is needed
        from tracejit.runtime.pool import load_pool

        load_pool()


def _cpu_executor() -> Executor:
    """The C executor, or numpy with a warning where there is no C compiler."""
    try:
        return _on_cpu("c")
    except BackendUnavailable as error:
        warnings.warn(f"tracejit: {error} Steps run on numpy until then.", stacklevel=2)
        return _on_cpu("numpy")
