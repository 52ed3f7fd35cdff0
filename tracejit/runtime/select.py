"""Which executor runs a plan: by backend, by the device of the step, by what the machine has."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings

import torch

from tracejit.errors import BackendUnavailable
from tracejit.runtime.executor import Executor

# torch.get_float32_matmul_precision() → how fp32 contractions are computed on a GPU
_PRECISION = {"highest": "ieee", "high": "tf32", "medium": "tf32"}


@functools.cache
def executor_for(backend: str, device: str, precision: str = "highest") -> Executor:
    """The executor that runs plans of a device under a backend."""
    on_cpu = device == "cpu"
    if backend == "auto":
        return _cpu_executor() if on_cpu else executor_for("triton", device, precision)
    if (backend == "triton") == on_cpu:
        raise BackendUnavailable(
            backend=backend,
            reason=f"the step's tensors are on {device}",
            remedy="Use backend='auto', or move the tensors",
        )
    if backend == "c":
        from tracejit.runtime.c_executor import CExecutor

        return CExecutor(torch.get_num_threads)
    if backend == "numpy":
        from tracejit.runtime.numpy_executor import NumpyExecutor

        return NumpyExecutor()
    from tracejit.runtime.triton_executor import TritonExecutor

    return TritonExecutor(backend, precision=_PRECISION[precision])


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
        return executor_for("c", "cpu")
    except BackendUnavailable as error:
        warnings.warn(f"tracejit: {error} Steps run on numpy until then.", stacklevel=2)
        return executor_for("numpy", "cpu")
