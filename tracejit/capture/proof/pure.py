"""What is known to be pure: functions of C, and modules of Python, torch and numpy, by name.

Pure functions are listed, not impure ones. A function listed here computes from its arguments and
from state that the guard sees; what it changes is a container that the heap's check sees.
"""

from __future__ import annotations

import builtins
import re
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from contextvars import ContextVar
from types import FunctionType, MappingProxyType, MethodType, ModuleType

import numpy as np
import torch

from tracejit.capture.python import mathematics
from tracejit.capture.python.classes import is_heap_type

PURE_BUILTINS = frozenset(
    getattr(builtins, name)
    for name in (
        *("range", "len", "zip", "enumerate", "abs", "min", "max", "sum", "tuple", "list"),
        *("dict", "set", "frozenset", "float", "int", "bool", "isinstance", "issubclass"),
        *("reversed", "sorted", "any", "all", "round", "slice", "map", "filter", "pow", "divmod"),
        *("iter", "next", "type", "str", "callable", "NotImplementedError", "ValueError", "repr"),
        *("TypeError", "RuntimeError", "AssertionError", "IndexError", "KeyError", "Exception"),
        *("AttributeError", "StopIteration", "NotImplemented", "super", "property", "bytes"),
        *(
            "getattr",
            "hasattr",
            "setattr",
            "vars",
            "object",
            "format",
            "ord",
            "chr",
            "staticmethod",
        ),
        *("classmethod", "ArithmeticError", "ZeroDivisionError", "LookupError", "Ellipsis"),
        *("bin", "hex", "oct", "ascii", "bytearray", "delattr"),
    )
)
# Whose methods compute, or change the container that they belong to (which the heap's check sees).
_PURE_RECEIVERS = (
    *(dict, list, tuple, set, frozenset, str, bytes, int, float, OrderedDict, defaultdict, deque),
    *(range, slice, type(None), type({}.keys()), type({}.values()), type({}.items()), bytearray),
    *(torch.Tensor, torch.Size, torch.dtype, torch.device, type(_ for _ in ()), property),
    *(MappingProxyType, MethodType, FunctionType, Counter, re.Pattern, re.Match, struct.Struct),
    *(np.ndarray, np.generic, np.dtype, np.ufunc, np.broadcast, np.flatiter),
)
_OF_ARRAYS = frozenset({"tofile", "dump"})  # methods of these that are not pure
_LIBRARY_RECEIVERS = (ContextVar, type(__import__("threading").RLock()))  # of numpy, of logging
_PURE_MODULES = frozenset(
    {
        *("functools", "contextlib", "collections", "collections.abc", "_collections_abc", "abc"),
        *("typing", "enum", "dataclasses", "operator", "types", "numbers", "copy", "itertools"),
        *("copyreg", "typing_extensions", "weakref", "_weakrefset", "keyword", "reprlib"),
        *("inspect", "bisect", "heapq", "struct", "statistics", "fractions", "string", "textwrap"),
        *("re", "re._compiler", "re._parser", "re._casefix", "sre_compile", "sre_parse"),
        *("json", "json.encoder", "json.decoder", "json.scanner", "base64"),
        *("numpy", "numpy._core", "numpy.lib", "numpy.linalg", "numpy.linalg._linalg"),
        *(f"numpy._core.{m}" for m in ("fromnumeric", "_methods", "numeric", "function_base")),
        *(f"numpy._core.{m}" for m in ("shape_base", "einsumfunc", "multiarray", "umath")),
        *(f"numpy._core.{m}" for m in ("numerictypes", "_dtype", "_ufunc_config", "getlimits")),
        *(f"numpy._core.{m}" for m in ("_machar", "_type_aliases", "overrides", "_internal")),
        *(
            f"numpy.lib.{m}"
            for m in (
                *(
                    "_arraypad_impl",
                    "_arraysetops_impl",
                    "_function_base_impl",
                    "_array_utils_impl",
                ),
                *("_histograms_impl", "_index_tricks_impl", "_nanfunctions_impl", "mixins"),
                *("_polynomial_impl", "_shape_base_impl", "_stride_tricks_impl", "array_utils"),
                *("_twodim_base_impl", "_type_check_impl", "_ufunclike_impl", "_scimath_impl"),
            )
        ),
    }
)
# Of modules that also have functions which are not.
_PURE_FUNCTIONS = {
    "posixpath": frozenset(
        {
            *("join", "split", "basename", "dirname", "splitext", "isabs", "normpath"),
            *("_get_sep", "normcase", "splitdrive"),
        }
    ),
    "genericpath": frozenset({"_splitext", "commonprefix", "_check_arg_types"}),
    "logging": frozenset(
        {
            *("debug", "info", "warning", "error", "critical", "log"),
            *("Logger.debug", "Logger.info", "Logger.warning", "Logger.error", "Logger.critical"),
            *("Logger.log", "Logger.isEnabledFor", "Logger.getEffectiveLevel", "Manager.disable"),
            *("_acquireLock", "_releaseLock"),
        }
    ),
}
READ_ALL = frozenset({"copy", "copyreg", "dataclasses"})  # of the objects given to them
_PURE_TORCH_MODULES = (
    *("torch", "torch._C", "torch._VF", "torch._classes", "torch._compile", "torch._dynamo"),
    *("torch._functorch.autograd_function", "torch._functorch.pyfunctorch"),
    *("torch._functorch.utils", "torch._higher_order_ops", "torch._jit_internal"),
    *("torch._functorch.functional_call", "torch._functorch.apis", "torch._functorch.vmap"),
    *("torch._functorch.eager_transforms",),
    *("torch._linalg_utils", "torch._lowrank", "torch._namedtensor_internals", "torch._ops"),
    *("torch._tensor", "torch._utils", "torch._vendor", "torch.accelerator", "torch.amp"),
    *("torch.autograd", "torch.backends", "torch.compiler", "torch.cuda", "torch.functional"),
    *("torch.jit", "torch.nn", "torch.optim", "torch.overrides", "torch.profiler"),
    *("torch.return_types", "torch.torch_version", "torch.types", "torch.version"),
    *("torch.utils._contextlib", "torch.utils._device", "torch.utils._foreach_utils"),
    *("torch.utils._python_dispatch", "torch.utils._pytree", "torch.utils.checkpoint"),
    *("torch.distributions", "torch.random", "torch.nn.init"),
    *("torch.distributed.nn.functional", "torch.distributed.algorithms.join"),
    *("torch.utils.hooks", "torch.utils._config_module", "torch._refs", "torch.fx.experimental"),
)
# What has rules, and what tells of process groups: these are guarded, see `settings.py`.
_PURE_DISTRIBUTED = {
    "torch.nn.parallel.distributed": frozenset(
        {
            *("forward", "_pre_forward", "_post_forward", "_run_ddp_forward", "no_sync"),
            *("_inside_ddp_forward", "_check_sync_bufs_pre_fwd", "_check_sync_bufs_post_fwd"),
            *("will_sync_module_buffers", "_sync_buffers", "_assign_modules_buffers"),
            *("_sync_module_buffers", "_default_broadcast_coalesced", "_clear_grad_buffer"),
            *("_distributed_broadcast_coalesced", "_lazy_init", "_setup_in_backward_optimizers"),
            *("_find_tensors", "_tree_flatten_with_rref", "_tree_unflatten_with_rref", "train"),
            *("<genexpr>", "<listcomp>", "<dictcomp>", "<lambda>", "broadcast_buffers"),
        }
    ),
    "torch.distributed.c10d_logger": frozenset({"wrapper"}),
    "torch.distributed.optim.zero_redundancy_optimizer": frozenset(
        {
            *("step", "_local_step", "_sync_params", "_sync_param_groups", "zero_grad"),
            *("_broadcast_params_from_rank", "_get_broadcast_work", "_device_to_params_per_rank"),
            *("_partition_parameters", "_param_to_rank", "_param_to_index", "_index_to_param"),
            *("_bucket_assignments_per_rank", "_check_overlap_initialized", "_is_trainable"),
            *("_get_is_trainable_mask", "_get_min_index", "_get_assigned_rank"),
            *("<genexpr>", "<listcomp>", "<dictcomp>", "<lambda>"),
        }
    ),
    "torch.distributed.distributed_c10d": frozenset(
        {
            *("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_single", "barrier"),
            *("all_gather_into_tensor", "_all_gather_base", "reduce_scatter", "all_to_all"),
            *("reduce_scatter_single", "reduce_scatter_tensor", "_reduce_scatter_base"),
            *("all_to_all_single", "gather", "scatter", "is_initialized", "get_rank"),
            *("get_world_size", "get_backend", "get_group_rank", "get_global_rank"),
            *("get_process_group_ranks", "_get_group_size", "_get_default_group", "WORLD"),
            *("default_pg", "pg_map", "pg_group_ranks", "pg_names", "pg_coalesce_state"),
            *("_rank_not_in_group", "_group_or_default_group", "_canonicalize_group_rank"),
            *("_get_object_coll_device", "_device_capability", "_get_pg_default_device"),
            *("get_backend_config", "pg_backend_config", "get_device_backend_map", "__repr__"),
            *("_check_op", "_check_single_tensor", "_check_tensor_list", "__new__", "Backend"),
        }
    ),
}
_IMPURE_TORCH_MODULES = ("torch.nn.parallel", "torch.cuda.random")
# C functions of these modules, by name.
_PURE_C = {
    "builtins": frozenset({f.__name__ for f in PURE_BUILTINS if callable(f)} | {"__build_class__"}),
    "functools": frozenset({"reduce"}),
    "_functools": frozenset({"reduce", "cmp_to_key"}),
    "_operator": None,  # None: all of them
    "_abc": None,
    "math": None,
    "itertools": None,
    "_collections": None,
    "_bisect": None,
    "_heapq": None,
    "_struct": None,
    "_sre": None,
    "_json": None,
    "_statistics": None,
    "binascii": None,
    "_string": None,
    "_warnings": frozenset({"warn"}),  # `warnings` is Python where it is shown
    "posix": frozenset({"fspath"}),
    "_thread": frozenset({"get_ident"}),
    "_weakref": frozenset({"proxy", "getweakrefcount"}),
    "sys": frozenset({"getrecursionlimit", "intern", "getsizeof", "_getframe"}),
    "numpy": frozenset(
        {
            *("arange", "array", "asanyarray", "asarray", "ascontiguousarray", "asfortranarray"),
            *("empty", "frombuffer", "fromiter", "fromstring", "zeros", "promote_types"),
            *("may_share_memory",),
        }
    ),
}
_OF_NUMPY = ("numpy._core", "numpy.lib", "numpy.linalg")  # all but what sets something
_PURE_TYPE_METHODS = frozenset(
    {"mro", "__prepare__", "__new__", "__init__", "__call__", "fromkeys"}
)
_PURE_CLASS_METHODS = frozenset({"from_bytes", "fromhex", "maketrans", "from_iterable"})
# object's own methods, of instances of Python classes
_OBJECT_METHODS = frozenset(
    {
        *("__init__", "__new__", "__setattr__", "__getattribute__", "__init_subclass__"),
        *("__delattr__", "__format__", "__enter__", "__exit__", "__reduce_ex__"),
    }
)
BY_NAME = (getattr, hasattr, setattr, delattr)
_LIBRARY_ONLY = frozenset(
    {*("id", "dir", "locals", "globals", "hash"), *("_getframe", "getsizeof", "get_ident")}
)
_IMPURE_TORCH_C = frozenset(
    {
        *("manual_seed", "seed", "_cuda_synchronize", "_cuda_setDevice", "set_num_threads"),
        *("set_default_dtype", "_set_default_dtype", "set_flush_denormal"),
        *("get_rng_state", "set_state", "initial_seed", "fork", "wait"),
    }
)


def pure_python(module: str, name: str) -> bool:
    """Whether a function of Python's library or numpy, by its module and qualified name, is known
    to be pure."""
    return (
        module in _PURE_MODULES
        or module.startswith("importlib")
        or name in _PURE_FUNCTIONS.get(module, ())
    )


def pure_torch(module: str, name: str = "") -> bool:
    """Whether a function of torch, by its module and name, is known to be pure."""
    if module in _PURE_DISTRIBUTED:
        return name in _PURE_DISTRIBUTED[module]
    return within(module, _PURE_TORCH_MODULES) and not within(module, _IMPURE_TORCH_MODULES)


def within(module: str, roots: tuple[str, ...]) -> bool:
    """Whether a module is one of some modules, or in one of them."""
    return any(
        module == root or (root != "torch" and module.startswith(root + ".")) for root in roots
    )


def pure_c(function: object, owner: object, by_user: bool) -> bool:
    """Whether a function of C is known to be pure. `owner`: what it is a method of."""
    name = function.__name__
    if owner is None or isinstance(owner, ModuleType):
        module = function.__module__ or getattr(owner, "__name__", "")
        if module.startswith("torch"):
            return name not in _IMPURE_TORCH_C
        if within(module, _OF_NUMPY):
            return not name.lstrip("_").startswith("set")
        if name in _LIBRARY_ONLY:
            return not by_user
        names = _PURE_C.get(module, frozenset())
        return names is None or name in names
    if isinstance(owner, type):
        if issubclass(owner, BaseException) or name in _PURE_TYPE_METHODS:
            return True
        if owner in PURE_BUILTINS or owner.__module__ == "itertools":
            return name in _PURE_CLASS_METHODS
        return owner.__module__.startswith("torch") and name not in _IMPURE_TORCH_C
    if isinstance(owner, torch.Generator):  # what its functions draw is seen by the trace
        return name == "device"
    if isinstance(owner, (*_PURE_RECEIVERS, BaseException)):
        return name not in _OF_ARRAYS
    if isinstance(owner, _LIBRARY_RECEIVERS) or within(type(owner).__module__, _OF_NUMPY):
        return not by_user
    if (function.__module__ or type(owner).__module__).startswith("torch"):
        return name not in _IMPURE_TORCH_C
    return name in _OBJECT_METHODS and is_heap_type(type(owner))


_DISPATCHERS = {  # numpy's functions that C calls, of which no profiler sees the call
    id(x): x
    for holder in (np, np.linalg, np.lib.stride_tricks)
    for x in vars(holder).values()
    if isinstance(x, (np.ufunc, type(np.mean)))
}


def pure_numpy(x: object) -> bool:
    """Whether x is an element-wise function of numpy, or one whose Python a profiler sees."""
    return _DISPATCHERS.get(id(x)) is x


# ---- runtime scalars

# C functions that read the number of a runtime scalar without asking it: by module, of some names
_UNASKED = {
    "_struct": None,
    "_json": None,
    "_statistics": None,
    "numpy._core._multiarray_umath": frozenset(
        {"interp", "interp_complex", "dragon4_positional", "dragon4_scientific", "format_longfloat"}
    ),
}


def unasked(function: object, owner: object) -> str:
    """What a C function is called that would take a runtime scalar for a constant; else empty."""
    name = function.__name__
    if isinstance(owner, struct.Struct):
        return f"struct.Struct.{name}" if name.startswith("pack") else ""
    if owner is not None and not isinstance(owner, ModuleType):
        return f"json.{type(owner).__name__}" if type(owner).__module__ == "_json" else ""
    module = function.__module__ or ""
    if mathematics.is_function(function):  # by math's name it is a wrapper while a step is traced
        return f"math.{name} by another name"
    names = _UNASKED.get(module, frozenset())
    return f"{module.lstrip('_')}.{name}" if names is None or name in names else ""


UNASKED_MODULES = frozenset({"json.encoder"})  # of Python, which call such functions from C


# ---- what to do

_REMEDIES = {
    "time": "take the time outside the step",
    "datetime": "take the time outside the step",
    "random": "draw the number outside the step and pass it as an argument",
    "numpy.random": "draw the numbers outside the step and pass them as an argument",
    "print": "return what is to be shown, and print it after the call",
    "input": "ask before the call",
    "open": "read and write files outside the step",
    "io": "read and write files outside the step",
    "logging": "log after the call, from what the step returns",
    "warnings": "filter the warning, or warn outside the step",
    "os": "read it once, outside the step, and keep it in a variable",
    "threading": "start and join threads outside the step",
    "uuid": "make it outside the step and pass it as an argument",
    "gc": "call it outside the step",
    "torch.distributed": "communicate outside the step",
}
_OF_C = {"posix": "os", "_io": "io", "_random": "random", "_datetime": "datetime"}


def remedy(module: str, name: str) -> str:
    """What to write instead of a call that is not known to be pure."""
    root = module.partition(".")[0]
    for known in (name if root == "builtins" else "", module, _OF_C.get(root, root).lstrip("_")):
        for m, text in _REMEDIES.items():
            if known == m or known.startswith(f"{m}."):
                return text
    return "call it outside the step and pass what it returns"
