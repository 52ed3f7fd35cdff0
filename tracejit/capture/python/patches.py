"""Every process-wide patch, for the time of a trace.

`intercepted` patches the innermost globals that reach C code without passing a TorchFunctionMode,
the `step` of LR schedulers, the functions of `math`, and builtins that torch's own Python calls on
runtime scalars. Only threads that are tracing see another behaviour, and nothing stays patched
after the trace.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps

import torch
from torch.autograd import function as torch_function
from torch.autograd.function import Function, _SingleLevelFunction
from torch.nn.utils import clip_grad
from torch.optim import _adafactor
from torch.optim.lr_scheduler import LRScheduler

from tracejit.capture.functions.custom import call, once_differentiable
from tracejit.capture.python import mathematics
from tracejit.capture.trace.active import current
from tracejit.capture.trace.scalars import is_runtime

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


# ---- builtins that torch's own Python calls on hyperparameters and state


def _float(x: object) -> float:
    """`float`, except that runtime scalars stay what they are."""
    return x if is_runtime(x) else float(x)


def _max(a: object, b: object) -> object:
    """`max` of two; of a number and a tensor, what Adafactor asks of a value on the device."""
    if isinstance(b, torch.Tensor):
        return torch.clamp(b, min=a)
    return max(a, b)


# (module, name, what shadows the builtin of that name there while a step is traced)
SHADOWS = ((clip_grad, "float", _float), (_adafactor, "max", _max))


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
    return call(t, cls, args)


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


_SCRIPT = "TorchScript would run outside the trace; call the Python function that was scripted"
REFUSED = (
    (
        torch._C._autograd,
        "_push_saved_tensors_default_hooks",
        "Hooks on saved tensors would be ignored; use them outside the step",
    ),
    (torch._C.ScriptFunction, "__call__", _SCRIPT),
    (torch._C.ScriptMethod, "__call__", _SCRIPT),
    (
        torch.nn.parallel.DistributedDataParallel,
        "forward",
        "Its gradients would not be averaged over the processes; compile a step on its `.module` "
        "and reduce the gradients outside",
    ),
)


_lock = threading.Lock()
_tracing = 0
# (owner, name, the original, its replacement while any thread traces), of the latest trace
_replaced: list[tuple[object, str, object, object]] = []
# names that exist only while any thread traces; `apply` is inherited from C
_added = [(_SingleLevelFunction, "apply", classmethod(_apply)), *SHADOWS]


def _replacements() -> list[tuple[object, str, Callable[[object], object]]]:
    """(owner, name, a function from the original to its replacement) for all that is patched."""
    return [
        (torch._C, "_group_tensors_by_device_and_dtype", lambda original: _group),
        (torch_function, "_functions", lambda original: _DelayedErrors()),
        *((owner, name, _refuse(owner, remedy)) for owner, name, remedy in REFUSED),
        *((scheduler, "step", as_callback) for scheduler in scheduler_classes()),
    ]


def _install() -> None:
    global _replaced, _of
    schedulers = scheduler_classes()
    if _of is not schedulers or any(getattr(o, name) is not x for o, name, x, _ in _replaced):
        _of = schedulers
        there = [(o, name, getattr(o, name), wrap) for o, name, wrap in _replacements()]
        _replaced = [(o, name, original, wrap(original)) for o, name, original, wrap in there]
    for owner, name, _, instead in _replaced:
        setattr(owner, name, instead)
    for owner, name, new in _added:
        setattr(owner, name, new)
    mathematics.install()


_of: object = None  # the list of schedulers that `_replaced` was made for


def _remove() -> None:
    mathematics.remove()
    for owner, name, original, _ in _replaced:
        setattr(owner, name, original)
    for owner, name, _ in _added:
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
