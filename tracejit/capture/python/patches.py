"""Every process-wide patch, for the time of a trace.

`intercepted` patches the innermost globals that reach C code without passing a TorchFunctionMode,
the `step` of LR schedulers, the initialization of lazy modules, the functions of `math`, and
builtins that torch's own Python calls on runtime scalars. Only threads that are tracing see another
behaviour, and nothing stays patched after the trace.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import wraps

import torch
from torch._functorch import eager_transforms as torch_transforms
from torch.amp import GradScaler
from torch.autograd import function as torch_function
from torch.autograd.function import Function, _SingleLevelFunction
from torch.nn.modules import batchnorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel.distributed import _DDPSink
from torch.nn.utils import clip_grad
from torch.optim import LBFGS, _adafactor
from torch.optim.lr_scheduler import LRScheduler
from torch.overrides import handle_torch_function
from torch.utils.checkpoint import CheckpointFunction

from tracejit.capture.functions import hooks
from tracejit.capture.functions.custom import call, once_differentiable
from tracejit.capture.python import (
    checkpoints,
    data_parallel,
    generators,
    mathematics,
    sharded,
    transforms,
    vmaps,
)
from tracejit.capture.python.plain_code import reads_of
from tracejit.capture.python.saved_hooks import Hooks as SavedHooks
from tracejit.capture.python.seeding import TracedGenerator
from tracejit.capture.trace.active import current
from tracejit.capture.trace.scalars import is_runtime, to_float
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.forks import own_lock

Tensor = torch.Tensor


# ---- schedulers


def scheduler_classes() -> list[type]:
    """Every class of LR schedulers with a `step` of its own; the same list while they are so."""
    global _schedulers
    classes, below, stepping, found = _schedulers
    if (
        not classes
        or [c.__subclasses__() for c in classes] != below
        or ["step" in c.__dict__ for c in classes] != stepping
    ):
        classes, below = [LRScheduler], []
        for c in classes:  # which grows
            below.append(c.__subclasses__())
            classes += [x for x in below[-1] if x not in classes]
        stepping = ["step" in c.__dict__ for c in classes]
        found = [c for c, own in zip(classes, stepping, strict=True) if own]
        _schedulers = classes, below, stepping, found
    return found


# of the latest trace: all classes, those right below each, whether each has a step, the result
_schedulers: tuple[list[type], list[list[type]], list[bool], list[type]] = [], [], [], []


def as_callback(step: Callable) -> Callable:
    """A scheduler's `step` that runs as a callback of the trace on this thread, if there is one."""

    @wraps(step)
    def wrapper(self: LRScheduler, *args: object, **kwargs: object) -> None:
        t = current()
        if t is None or t.hyperparameters is None or t.hyperparameters.inside:
            return step(self, *args, **kwargs)
        return t.hyperparameters.call_back(step, self, args, kwargs)

    return wrapper


# ---- lazy modules


def _lazy_classes() -> list[type]:
    """Every class of lazy modules with an `initialize_parameters` of its own."""
    global _lazy
    below = LazyModuleMixin.__subclasses__()
    if _lazy[0] != below:
        found, pending = [], [*below]
        while pending:
            kind = pending.pop()
            pending += kind.__subclasses__()
            if "initialize_parameters" in kind.__dict__ and kind not in found:
                found.append(kind)
        _lazy = below, found
    return _lazy[1]


_lazy: tuple[list[type], list[type]] = [], []  # those right below the mixin, and the result


def _initialized(initialize: Callable) -> Callable:
    """A lazy module's initialization, which runs as in eager: its parameters, drawn at random, come
    from outside then. It is given tensors of the inputs' shapes, whose numbers it may not use."""

    @wraps(initialize)
    def wrapper(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        t = current()
        if t is None or not self.has_uninitialized_params():
            return initialize(self, *args, **kwargs)
        t.journal.forget()
        with torch._C.DisableTorchFunction():
            given = [_unknown(x) for x in args]
            return initialize(self, *given, **{k: _unknown(x) for k, x in kwargs.items()})

    return wrapper


def _unknown(x: object) -> object:
    """For an intermediate a tensor of its shape on the "meta" device, which has no numbers."""
    if type(x) is not TracedTensor:
        return x
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


# ---- GradScaler


def _updated(update: Callable) -> Callable:
    """`GradScaler.update`, which drops what the scaler knew of its optimizers: also what the trace
    still holds of that, to put it back if it fails, lets go of the tensors."""

    @wraps(update)
    def wrapper(self: GradScaler, *args: object, **kwargs: object) -> None:
        before = vars(self).get("_per_optimizer_states")  # none of a scaler that is not enabled
        update(self, *args, **kwargs)
        if current() is not None and vars(self).get("_per_optimizer_states") is not before:
            before.clear()

    return wrapper


# ---- builtins that torch's own Python calls on hyperparameters and state


def _float(x: object) -> float:
    """`float`, except that runtime scalars, and the numbers of tensors, stay runtime scalars."""
    if isinstance(x, torch.Tensor) and current() is not None:
        x = x.item()
    return to_float(x) if is_runtime(x) else float(x)


def _max(a: object, b: object) -> object:
    """`max` of two; of a number and a tensor, what Adafactor asks of a value on the device."""
    if isinstance(b, torch.Tensor):
        return torch.clamp(b, min=a)
    return max(a, b)


# (module, name, what shadows the builtin of that name there while a step is traced)
SHADOWS = (
    (clip_grad, "float", _float),
    (batchnorm, "float", _float),
    (_adafactor, "max", _max),
)


# ---- C entry points


class _DelayedErrors:
    """`torch._C._functions` as `once_differentiable` sees it while a step is traced."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch._C._functions, name)

    def DelayedError(self, message: bytes, count: int) -> Callable:
        """Tensors that raise when backward reaches them."""
        t = current()
        if t is None:
            return torch._C._functions.DelayedError(message, count)

        def mark(*tensors: Tensor | None) -> object:
            out = tuple(None if x is None else once_differentiable(t, x) for x in tensors)
            return out[0] if count == 1 else out

        return mark


def _apply(cls: type[Function], *args: object) -> object:
    t = current()
    if t is None:
        return super(_SingleLevelFunction, cls).apply(*args)
    if cls is CheckpointFunction:
        return checkpoints.reentrant(t, *args)
    if cls is _DDPSink:  # its backward concerns eager's own reduction
        return tuple(x.clone() if isinstance(x, Tensor) else x for x in args[1:])
    if (cls.__module__, cls.__name__) == _MOD_INDEX:  # x[i, j] under TransformGetItemToIndex
        return args[0][tuple(args[1])]
    return call(t, cls, args, reads_of(cls))


_MOD_INDEX = "torch._dynamo._trace_wrapped_higher_order_op", "ModIndex"
_group_in_c = torch._C._group_tensors_by_device_and_dtype


def _group(lists: list[list], with_indices: bool = False) -> dict:
    """Lists of tensors grouped by the device and dtype of the first list's."""
    if current() is None:
        return _group_in_c(lists, with_indices)
    found: dict[tuple, tuple[list[list], list[int]]] = {}
    for i, first in enumerate(lists[0]):
        rows, indices = found.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for row, tensors in zip(rows, lists, strict=True):
            if tensors:
                row.append(tensors[i])
        if with_indices:
            indices.append(i)
    return found


def _node(original: Callable) -> Callable:
    """`torch.autograd.graph._get_grad_fn_or_grad_acc`, by which hooks of several tensors ask what
    a backward will reach."""

    def node(tensor: object) -> object:
        t = current()
        return original(tensor) if t is None else hooks.node_of(t, tensor)

    return node


def _number_of_backward(original: Callable) -> Callable:
    def number() -> int:
        t = current()
        return original() if t is None or t.backward is None else t.backward.number

    return number


def _will_reach(original: Callable) -> Callable:
    def reached(node: object) -> bool:
        t = current()
        if t is None or t.backward is None:
            return original(node)
        return hooks.is_reached(t, node)

    return reached


def _saves(pack: Callable) -> bool:
    """Whether hooks on saved tensors are those of `save_on_cpu`: in values, the identity."""
    return getattr(pack, "__module__", "") == torch.autograd.graph.__name__ and (
        pack.__qualname__.startswith("save_on_cpu.")
    )


def _push_saved(original: Callable) -> Callable:
    def push(pack: Callable, unpack: Callable) -> None:
        t = current()
        if t is None:
            return original(pack, unpack)
        if not _saves(pack):
            t.begin(torch.autograd.graph.saved_tensors_hooks, ())
        t.saving.append(None if _saves(pack) else SavedHooks(pack, unpack))

    return push


def _pop_saved(original: Callable) -> Callable:
    def pop() -> None:
        t = current()
        if t is None:
            return original()
        t.saving.pop()

    return pop


def _anomaly(original: Callable) -> Callable:
    """`torch.set_anomaly_enabled`, which may only say that anomaly mode is off."""

    def set_anomaly_enabled(enabled: bool, check_nan: bool = True) -> None:
        t = current()
        if t is not None and enabled:
            t.begin(torch.autograd.set_detect_anomaly, ())
            raise t.unsupported(
                "A compiled step does not look for NaN in its backward; call the step itself, "
                "uncompiled, to find where a NaN comes from"
            )
        original(enabled, check_nan)

    return set_anomaly_enabled


def _cleared(original: Callable) -> Callable:
    """`torch.clear_autocast_cache`, by which a region of autocast ends."""

    def clear_autocast_cache() -> None:
        t = current()
        if t is not None:
            t.casts.clear()
        original()

    return clear_autocast_cache


def _refuse(owner: object, remedy: str) -> Callable[[Callable], Callable]:
    """A wrapper for functions that a trace cannot see into: they raise while one runs here."""

    def wrap(original: Callable) -> Callable:
        def refused(*args: object, **kwargs: object) -> object:
            t = current()
            if t is None:
                return original(*args, **kwargs)
            t.begin(owner if isinstance(owner, type) else original, ())
            raise t.unsupported(remedy)

        return refused

    return wrap


def _deciding(original: Callable) -> Callable:
    """What LBFGS calls in each step, no two of which go one way (see `tracejit/closures.py`)."""

    @wraps(original)
    def wrapper(self: LBFGS, *args: object) -> object:
        t = current()
        if t is not None and t.falls_back:
            t.begin(LBFGS.step, ())
            raise t.unsupported(
                "It decides by values how often it calls its closure, so each step would be a plan "
                'of its own. The closure is compiled by itself; on_unsupported="raise" makes plans'
            )
        return original(self, *args)

    return wrapper


_SCRIPT = "TorchScript would run outside the trace; call the Python function that was scripted"
REFUSED = (
    (torch, "save", "It would write tensors that are not computed yet; call it outside"),
    (torch._C.ScriptFunction, "__call__", _SCRIPT),
    (torch._C.ScriptMethod, "__call__", _SCRIPT),
)


def _barrier(original: Callable) -> Callable:
    """`ProcessGroup.barrier`, which no TorchFunctionMode sees."""

    def barrier(self: object, *args: object, **kwargs: object) -> object:
        if current() is None:
            return original(self, *args, **kwargs)
        return handle_torch_function(torch.distributed.barrier, (), self)

    return barrier


_DISTRIBUTED = torch.distributed.is_available()  # asked here: a step that asks is guarded by it
_SENT = "send recv recv_anysource monitored_barrier"
_GROUPED = (
    "allreduce allreduce_coalesced allgather _allgather_base all_gather_single allgather_coalesced "
    "all_gather_single_coalesced allgather_into_tensor_coalesced broadcast reduce gather scatter "
    "reduce_scatter _reduce_scatter_base reduce_scatter_single reduce_scatter_single_coalesced "
    "reduce_scatter_tensor_coalesced alltoall alltoall_base all_to_all_single _start_coalescing"
)


def _of_process_groups() -> list[tuple[object, str, Callable]]:
    """The methods by which a process group communicates, beside the functions that have rules."""
    if not _DISTRIBUTED:
        return []
    kind = torch.distributed.ProcessGroup
    sent = "Messages between single ranks have no rule; send and receive outside the step"
    grouped = "Call torch.distributed's function for one tensor at a time in its place"
    found = [(kind, "barrier", _barrier)]
    for names, remedy in ((_SENT, sent), (_GROUPED, grouped)):
        found += [(kind, x, _refuse(kind, remedy)) for x in names.split() if hasattr(kind, x)]
    return found


_CHECKPOINT = torch.utils.checkpoint, "_checkpoint_without_reentrant_generator"

_lock = own_lock(sys.modules[__name__], "_lock", threading.Lock)
_tracing = 0
# (owner, name, the original, its replacement while any thread traces, and what stands in the
# owner's dict), of the latest trace
_replaced: list[tuple[object, str, object, object, object]] = []
# names that exist only while any thread traces; `apply` is inherited from C
_added = [(_SingleLevelFunction, "apply", classmethod(_apply)), *SHADOWS]
_sharded: list[tuple[object, str, object]] = []  # likewise, of the latest trace


def _replacements() -> list[tuple[object, str, Callable[[object], object]]]:
    """(owner, name, a function from the original to its replacement) for all that is patched."""
    return [
        (torch._C, "_group_tensors_by_device_and_dtype", lambda original: _group),
        (torch_function, "_functions", lambda original: _DelayedErrors()),
        (torch, "set_anomaly_enabled", _anomaly),
        (torch, "clear_autocast_cache", _cleared),
        (*_CHECKPOINT, checkpoints.without_reentrant),
        (torch._functorch.apis, "vmap_impl", vmaps.vmap),
        (torch_transforms, "grad_and_value_impl", transforms.grad_and_value),
        (torch_transforms, "_vjp_with_argnums", transforms.vjp),
        (torch_transforms, "_jvp_with_argnums", transforms.jvp),
        (torch._C._autograd, "_push_saved_tensors_default_hooks", _push_saved),
        (torch._C._autograd, "_pop_saved_tensors_default_hooks", _pop_saved),
        (torch.autograd.graph, "_get_grad_fn_or_grad_acc", _node),
        (torch._C, "_current_graph_task_id", _number_of_backward),
        (torch._C, "_will_engine_execute_node", _will_reach),
        (GradScaler, "update", _updated),
        (torch.random, "default_generator", TracedGenerator),
        (LBFGS, "step", _deciding),
        (LBFGS, "_gather_flat_grad", _deciding),
        *((owner, name, _refuse(owner, remedy)) for owner, name, remedy in REFUSED),
        *_of_process_groups(),
        *data_parallel.replacements(),
        *((scheduler, "step", as_callback) for scheduler in scheduler_classes()),
        *((lazy, "initialize_parameters", _initialized) for lazy in _lazy_classes()),
    ]


def _install() -> None:
    global _replaced, _of
    kinds = scheduler_classes(), _lazy_classes()
    known = all(a is b for a, b in zip(_of, kinds, strict=True))
    if not known or any(getattr(o, name) is not x for o, name, x, *_ in _replaced):
        _of = kinds
        there = [(o, name, getattr(o, name), wrap) for o, name, wrap in _replacements()]
        _replaced = [
            (o, name, original, wrap(original), vars(o).get(name, original))
            for o, name, original, wrap in there
        ]
    for owner, name, _, instead, _ in _replaced:
        setattr(owner, name, instead)
    _sharded[:] = sharded.added()
    for owner, name, new in (*_added, *_sharded):
        setattr(owner, name, new)
    mathematics.install()
    generators.install()


# the lists of schedulers and lazy modules that `_replaced` was made for
_of: tuple[object, object] = None, None


def _remove() -> None:
    generators.remove()
    mathematics.remove()
    for owner, name, _, _, before in _replaced:
        setattr(owner, name, before)
    for owner, name, _ in (*_added, *_sharded):
        delattr(owner, name)


class intercepted:
    """While any thread is inside, C entry points that bypass interception are patched."""

    __slots__ = ()

    def __enter__(self) -> None:
        global _tracing
        with _lock:
            _tracing += 1
            if _tracing == 1:
                _install()

    def __exit__(self, *exception: object) -> None:
        global _tracing
        with _lock:
            _tracing -= 1
            if _tracing == 0:
                _remove()
