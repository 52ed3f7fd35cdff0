"""Settings of the process that a step may ask for: number of threads, backends' flags, …

A function that answers for one is pure as long as the setting is the same: a guard asks it again.
A function that changes one is known by the function that asks: a step that leaves a setting as it
was before may be replayed as long as it is so before the call.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType

import numpy as np
import torch

from tracejit.records import dataclass


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked, as a person would write it, and how. answers: nothing else is asked by the
    function of Python that it stands for."""

    text: str
    function: Callable
    args: tuple = ()
    answers: bool = True

    def now(self) -> object:
        """The value that the setting has."""
        try:
            return self.function(*self.args)
        except (RuntimeError, ValueError) as error:  # of a backend that is not there
            return type(error)


_C = torch._C
# the words of torch's functions that change a setting, and of those that ask for it
_SDP = {
    "_set_sdp_use_flash": "_get_flash_sdp_enabled",
    "_set_sdp_use_math": "_get_math_sdp_enabled",
    "_set_sdp_use_mem_efficient": "_get_mem_efficient_sdp_enabled",
    "_set_sdp_use_cudnn": "_get_cudnn_sdp_enabled",
    "_set_sdp_use_fa3": "_get_fa3_sdp_enabled",
    "_set_sdp_use_overrideable": "_get_overrideable_sdp_enabled",
    "_set_deterministic_algorithms": "_get_deterministic_algorithms_warn_only",
}
# by `_modes` of guards.py, for all steps; or of what the interpreter of a trace does itself
_GUARDED = frozenset(
    {
        *("_get_tracing_state", "_get_torch_function_state", "_get_dispatch_mode", "_get_schema"),
        *("_get_data_attr", "_get_creation_meta", "_get_tensor_metadata", "_get_value_trace"),
    }
)
_ASKED_OF_TORCH = (
    frozenset(
        {
            *("get_num_threads", "get_num_interop_threads", "_get_deterministic_algorithms"),
            *("_get_deterministic_algorithms_warn_only", "_get_autograd_fallback_mode"),
            *("is_autocast_cache_enabled", "is_anomaly_check_nan_enabled"),
            *_SDP.values(),
            *(
                name
                for name in vars(_C)
                if name.startswith("_get_") and hasattr(_C, f"_set_{name.removeprefix('_get_')}")
            ),
        }
    )
    - _GUARDED
)
_OF_DEVICES = {  # asked with the type of a device
    "get_autocast_dtype": ("cpu", "cuda"),
    "get_autocast_cpu_dtype": ("cpu",),
    "get_autocast_gpu_dtype": ("cuda",),
}
_PRECISIONS = tuple(
    (backend, what)
    for backend in ("generic", "cuda", "mkldnn")
    for what in ("all", "matmul", "conv", "rnn")
    if not (backend == "generic" and what != "all")
)


def _of_torch() -> dict[str, tuple[Setting, ...]]:
    found = {}
    for name in sorted(_ASKED_OF_TORCH):
        if asked := getattr(_C, name, None):
            setting = (Setting(f"torch._C.{name}()", asked),)
            found[name] = setting
            found.setdefault(f"_set_{name.removeprefix('_get_')}", setting)
            found.setdefault(f"set_{name.removeprefix('get_')}", setting)
    for setter, name in _SDP.items():
        found[setter] = found.get(name, ())
    dtype = _C.get_autocast_dtype
    for name, kinds in _OF_DEVICES.items():
        found[name] = tuple(Setting(f"torch.get_autocast_dtype({k!r})", dtype, (k,)) for k in kinds)
        found[f"set_{name.removeprefix('get_')}"] = found[name]
    asked = _C._get_fp32_precision_getter
    found["_get_fp32_precision_getter"] = found["_set_fp32_precision_setter"] = tuple(
        Setting(f"torch._C._get_fp32_precision_getter{x}", asked, x) for x in _PRECISIONS
    )
    return found


def of_c(function: object, owner: object) -> tuple[Setting, ...]:
    """The settings that a function of C asks for, or changes."""
    if owner is not None and not isinstance(owner, ModuleType):
        return ()
    module = function.__module__ or getattr(owner, "__name__", "")
    if module.startswith("torch"):
        return _TORCH.get(function.__name__, ())
    return _FILTERS if module == "_warnings" else ()


def of_python(code: CodeType) -> Setting | None:
    """The setting that a function of Python asks for."""
    return _PYTHON.get(code)


_TORCH = _of_torch()
_FILTERS = (Setting("warnings.filters", lambda: (id(warnings.filters), [*warnings.filters])),)


def _logs(level: int) -> Setting:
    """Whether the root logger takes a message. Without a handler it would be given one."""
    root = logging.root
    return Setting(
        f"logging.root.isEnabledFor({logging.getLevelName(level)})",
        lambda: bool(root.handlers) and root.isEnabledFor(level),
        answers=False,
    )


# the group of all processes: which one it is says also how many ranks there are, and which is this
_WORLD = Setting(
    "torch.distributed.group.WORLD", lambda: torch.distributed.group.WORLD, answers=False
)


# of the products of an einsum of three operands and more
_ORDER = Setting(
    "torch.backends.opt_einsum",
    lambda: (torch.backends.opt_einsum.enabled, torch.backends.opt_einsum.strategy),
)


def _of_world() -> list[CodeType]:
    """What asks for the group of all processes: among it the wrapper that all collectives have."""
    c10d = torch.distributed.distributed_c10d
    asked = [c10d.all_reduce, c10d._get_default_group, type(c10d.GroupMember).WORLD.fget]
    asked.append(torch.nn.parallel.DistributedDataParallel.forward)
    return [f.__code__ for f in asked if isinstance(f, FunctionType)]


def _python() -> dict[CodeType, Setting]:
    future, distributed, cuda = torch.__future__, torch.distributed, torch.cuda
    asked: list[tuple[str, Callable]] = [
        (f"torch.__future__.{name}()", getattr(future, name))
        for name in dir(future)
        if name.startswith("get_")
    ]
    asked += [
        ("torch.distributed.is_available()", distributed.is_available),
        ("torch.backends.mha.get_fastpath_enabled()", torch.backends.mha.get_fastpath_enabled),
        ("torch.cuda.is_available()", cuda.is_available),
        ("torch.cuda.device_count()", cuda.device_count),
        ("numpy.geterr()", np.geterr),
    ]
    if distributed.is_available():
        asked.append(("torch.distributed.is_initialized()", distributed.is_initialized))
    found = {}
    for text, function in asked:
        plain = getattr(function, "__wrapped__", function)  # from under a cache
        if isinstance(plain, FunctionType):
            found[plain.__code__] = Setting(text, function)
    if distributed.is_available():
        found |= dict.fromkeys(_of_world(), _WORLD)
    found[torch.functional.einsum.__code__] = _ORDER
    for name in ("debug", "info", "warning", "error", "critical"):
        found[getattr(logging, name).__code__] = _logs(getattr(logging, name.upper()))
    return found


_PYTHON = _python()
NUMPY_ERRORS = Setting("numpy.geterr()", np.geterr)
