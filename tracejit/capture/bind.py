"""Running the user's function under a tracer, with its floats replaced by runtime scalars.

The floats among the arguments, closure cells, globals and defaults of the step itself become
TracedFloats. The function is rebuilt around substituted cells and globals, so no user object is
touched and other threads see nothing.
"""

from __future__ import annotations

import builtins
from collections.abc import Collection, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType

import numpy as np
import torch
from torch.autograd import forward_ad
from torch.overrides import _pop_mode

from tracejit.capture.effects.aliases import aliased, looked_up
from tracejit.capture.effects.fields import has_numbers
from tracejit.capture.effects.hyperparameters import Hyperparameters, within_reach
from tracejit.capture.effects.variables import Record, Variable
from tracejit.capture.names import name_of_tensor
from tracejit.capture.python import messages  # noqa: F401  what asks for text
from tracejit.capture.python.bytecode import contents, names_in
from tracejit.capture.python.patches import intercepted
from tracejit.capture.python.standins import standins
from tracejit.capture.trace import autocast, location
from tracejit.capture.trace.inputs import meet, span
from tracejit.capture.trace.scalars import Path, plain
from tracejit.capture.trace.trace import Trace
from tracejit.capture.tracer import Tracer
from tracejit.errors import OF_EAGER, SideEffectError, TracejitError
from tracejit.interrupts import interruptible, raised_by_handler
from tracejit.records import dataclass

_FUNCTIONS = 200  # looked at before each trace


@dataclass
class BoundCall:
    """A call ready to be traced, and where each runtime scalar came from, in order.

    `scalars` is the trace's own list: what the step reads of its state is added while it runs.
    """

    function: FunctionType
    args: tuple
    kwargs: dict
    scalars: list[Path]


def unwrap(step: object) -> tuple[FunctionType | None, tuple]:
    """The plain function of a step and the arguments that it is bound to."""
    if isinstance(step, FunctionType):
        return step, ()
    if isinstance(step, MethodType) and isinstance(step.__func__, FunctionType):
        return step.__func__, (step.__self__,)
    call = getattr(type(step), "__call__", None)  # noqa: B004
    if isinstance(call, FunctionType):
        return call, (step,)
    return None, ()


def bind(
    t: Trace,
    function: FunctionType,
    args: tuple,
    kwargs: dict,
    integers: Collection[Path] = (),
) -> BoundCall:
    """Substitute runtime scalars for the floats that the step reads directly, and for these
    integers among its arguments."""

    t.name_of = partial(name_of_tensor, function, args, kwargs)

    def replace(x: object, path: Path) -> object:
        x = plain(x)  # a float kept from an earlier call
        if type(x) is float or (type(x) is int and path in integers):
            return t.scalar(x, path)
        if has_numbers(x):
            items = [replace(item, (*path, i)) for i, item in enumerate(x)]
            return tuple(items) if type(x) is tuple else type(x)._make(items)
        return x

    called = _called(function)
    if any(names_in(f.__code__).asks_for_float for f in called):  # where TracedFloat is no float
        return BoundCall(function, tuple(map(plain, args)), kwargs, t.scalars.paths)
    args = tuple(replace(x, ("arg", i)) for i, x in enumerate(args))
    kwargs = {name: replace(x, ("kwarg", name)) for name, x in kwargs.items()}
    code = function.__code__
    stored = names_in(code).stored
    rebound = {id(cell) for f in called for cell in _stored_cells(f)}
    cells = list(function.__closure__ or ())
    changed = False
    for i, cell in enumerate(cells):
        number, name = contents(cell), code.co_freevars[i]
        if type(number) is float and name not in stored and id(cell) not in rebound:
            cells[i] = CellType(t.scalar(number, ("cell", name)))
            changed = True
    namespace = function.__globals__
    kept = {x for f in called if f.__globals__ is namespace for x in names_in(f.__code__).stored}
    names = (name for name in names_of_globals(function) if name not in kept)
    floats = [name for name in names if type(namespace.get(name)) is float]
    if floats and not names_in(code).stores_globals:
        found = {name: t.scalar(namespace[name], ("global", name)) for name in floats}
        namespace = _Overlay(namespace, found)
    elif not changed and function.__defaults__ is None and not function.__kwdefaults__:
        return BoundCall(function, args, kwargs, t.scalars.paths)
    rebuilt = FunctionType(code, namespace, function.__name__, None, tuple(cells))
    rebuilt.__defaults__ = replace(function.__defaults__, ("default",))
    if function.__kwdefaults__:
        rebuilt.__kwdefaults__ = {
            name: replace(x, ("kwdefault", name)) for name, x in function.__kwdefaults__.items()
        }
    rebuilt.__qualname__ = function.__qualname__
    return BoundCall(rebuilt, args, kwargs, t.scalars.paths)


class _Overlay(dict):
    """A namespace in which some names stand for something else. (The interpreter asks a dict that
    is none exactly through `__getitem__`.)"""

    def __init__(self, namespace: dict, instead: dict):
        super().__init__(instead, __builtins__=namespace.get("__builtins__", builtins))
        self._namespace = namespace

    def __missing__(self, name: str) -> object:
        return self._namespace[name]


def _called(function: FunctionType) -> list[FunctionType]:
    """A step and the user functions that its variables lead to."""
    found, seen, pending = [], set(), [function]
    while pending and len(found) < _FUNCTIONS:
        f = pending.pop()
        if f in seen or (f.__module__ or "").startswith("torch"):
            continue
        seen.add(f)
        found.append(f)
        namespace = f.__globals__
        for x in (
            *map(contents, f.__closure__ or ()),
            *map(namespace.get, names_of_globals(f)),
        ):
            if type(x) is FunctionType:
                pending.append(x)
    return found


def _stored_cells(function: FunctionType) -> list[CellType]:
    """The closure's variables that a function rebinds."""
    stored = names_in(function.__code__).stored
    if not stored:
        return []
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return [cell for name, cell in cells if name in stored]


def names_of_globals(function: FunctionType) -> tuple[str, ...]:
    """The globals that a function's code names."""
    return names_in(function.__code__).globals


def run(
    tracer: Tracer,
    bound: BoundCall,
    original: FunctionType,
    variables: Sequence[Variable] = (),
    records: Sequence[Record] = (),
    aliases: Sequence[Variable] = (),
    tables: Sequence[Variable] = (),
) -> object:
    """Call the function under the tracer; the interpreter's modes must be as they were after it.

    While it runs, the floats in optimizers' param_groups and the numbers in its state `variables`
    are runtime scalars; in `aliases` are wrappers of functions of math, and copies stand for
    `tables`. A failure leaves optimizers, schedulers and variables as they were.
    """
    t = tracer.trace
    state = t.hyperparameters = Hyperparameters(t, variables, records)
    try:
        roots = [original, *bound.args, *bound.kwargs.values()]
        reach = within_reach(roots, names_of_globals)
        state.start(reach)
        looked_at = any(record.looked_at for record in records)
        instead = standins(reach, with_histories=looked_at)
        with instead, aliased(aliases), looked_up(tables):
            returned = _run(tracer, bound, original)
        if t.refused is not None:
            raise t.refused
        _check_arrays(t, reach, original)
        state.finish()
    except BaseException as error:
        t.forget()
        state.abort()
        refused = isinstance(error, TracejitError) and not isinstance(error, OF_EAGER)
        if refused or raised_by_handler(error):
            t.draws.undo()
        raise
    return returned


_byte_bounds = getattr(np.lib, "array_utils", np).byte_bounds  # it has moved in NumPy 2


def _check_arrays(t: Trace, reach: list[object], original: FunctionType) -> None:
    """Refuse a step that writes to memory of NumPy whose array its Python may read: the writes come
    at the end, and the array would hold what was there before."""
    written = [h for h in t.inputs.borrowed if h.storage.writes and h.numel]
    arrays = [x for x in reach if isinstance(x, np.ndarray) and x.size] if written else ()
    for h in written:
        with torch._C.DisableTorchFunction():
            here = span(h.tensor)
        for x in arrays:
            if meet(here, range(*_byte_bounds(x))):
                raise SideEffectError(
                    where=_where(original),
                    reason=f"it can reach an array of shape {list(x.shape)} whose memory a tensor "
                    "shares that it writes to, and the array would be read too early",
                    remedy="Read the tensor instead of the array in the step, or the array after "
                    "it",
                )


def _run(tracer: Tracer, bound: BoundCall, original: FunctionType) -> object:
    if torch.is_inference_mode_enabled():
        raise SideEffectError(
            where=_where(original),
            reason="inference mode is on, and a compiled step would return ordinary tensors",
            remedy="Use torch.no_grad() around the step",
        )
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise SideEffectError(
            where=_where(original),
            reason="hooks on saved tensors are active, and a compiled step would ignore them",
            remedy="Call the step outside `saved_tensors_hooks`",
        )
    if forward_ad._current_level >= 0:
        raise SideEffectError(
            where=_where(original),
            reason="forward-mode differentiation is on, and a compiled step would drop tangents",
            remedy="Call the step outside `dual_level`",
        )
    if torch.is_anomaly_enabled():
        raise SideEffectError(
            where=_where(original),
            reason="anomaly mode is on, and a compiled step would not look for NaN in its backward",
            remedy="Call the step itself, uncompiled, to find where a NaN comes from",
        )
    grad_mode, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    casts = autocast.full_state()
    if autocast.state() is not None or autocast.is_nested():
        tracer.trace.casts.region = -1
    device = _default_device()
    modes = torch._C._len_torch_function_stack()
    before = [original.__globals__.get(path[1]) for path in bound.scalars if path[0] == "global"]
    try:
        with intercepted(), tracer, interruptible():
            returned = bound.function(*bound.args, **bound.kwargs)
    finally:
        other_device = _default_device() is not device
        if other_device:
            torch.set_default_device(device and device.device)
        while torch._C._len_torch_function_stack() > modes:  # an interrupt cut an `__exit__` off
            _pop_mode()
        after = torch.is_grad_enabled(), torch.get_default_dtype(), autocast.full_state()
        changed = after != (grad_mode, dtype, casts)
        if changed:
            autocast.set_state(casts)
            torch._C._set_grad_enabled(grad_mode)
            torch.set_default_dtype(dtype)
    if changed or other_device:
        raise SideEffectError(
            where=_where(original),
            reason="the step leaves grad mode, autocast, the default dtype or the default device "
            "changed",
            remedy="Use `with torch.no_grad():` (or autocast, or a device), which restores it",
        )
    after = [original.__globals__.get(path[1]) for path in bound.scalars if path[0] == "global"]
    if any(a is not b for a, b in zip(before, after, strict=True)):
        raise SideEffectError(
            where=_where(original),
            reason="a function called by the step rebinds a global float that the step reads",
            remedy="Pass the number as an argument, or rebind it outside the step",
        )
    return returned


location.traced_from(_run.__code__)


def _default_device() -> object:
    """The mode that `torch.set_default_device` has put in place, if any."""
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def _where(function: FunctionType) -> str:
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
