"""Running the user's function under a tracer, with its floats replaced by runtime scalars.

The floats among the arguments, closure cells, globals and defaults of the step itself become
TracedFloats. The function is rebuilt around substituted cells and globals, so no user object is
touched and other threads see nothing.
"""

from __future__ import annotations

import dis
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType

import torch

from tracejit.capture.custom import intercepted
from tracejit.capture.tracer import Tracer
from tracejit.errors import SideEffectError

Path = (
    tuple  # ("arg", i, …), ("kwarg", name, …), ("cell", name), ("global", name), ("default", i), …
)


@dataclass
class Bound:
    """A call ready to be traced, and where each runtime scalar came from, in order."""

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


def bind(tracer: Tracer, function: FunctionType, args: tuple, kwargs: dict) -> Bound:
    """Substitute runtime scalars for the floats that the step reads directly."""
    paths: list[Path] = []

    def scalar(x: float, path: Path) -> float:
        paths.append(path)
        return tracer.scalar(x)

    def replace(x: object, path: Path) -> object:
        if type(x) is float:
            return scalar(x, path)
        if type(x) is tuple and any(type(item) in (float, tuple) for item in x):
            return tuple(replace(item, (*path, i)) for i, item in enumerate(x))
        return x

    args = tuple(replace(x, ("arg", i)) for i, x in enumerate(args))
    kwargs = {name: replace(x, ("kwarg", name)) for name, x in kwargs.items()}
    code = function.__code__
    stored = _stored_names(function)
    cells = []
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        number = _contents(cell)
        if type(number) is float and name not in stored:
            cell = CellType(scalar(number, ("cell", name)))
        cells.append(cell)
    namespace = function.__globals__
    floats = [n for n in _global_names(function) if type(namespace.get(n)) is float]
    if floats and not stored & set(_global_names(function)):
        namespace = dict(namespace)
        for name in floats:
            namespace[name] = scalar(namespace[name], ("global", name))
    rebuilt = FunctionType(code, namespace, function.__name__, None, tuple(cells))
    rebuilt.__defaults__ = replace(function.__defaults__, ("default",))
    if function.__kwdefaults__:
        rebuilt.__kwdefaults__ = {
            name: replace(x, ("kwdefault", name)) for name, x in function.__kwdefaults__.items()
        }
    rebuilt.__qualname__ = function.__qualname__
    return Bound(rebuilt, args, kwargs, paths)


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _global_names(function: FunctionType) -> list[str]:
    return sorted(_names(function, ("LOAD_GLOBAL", "LOAD_NAME")))


def _stored_names(function: FunctionType) -> set[str]:
    return _names(function, ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"))


_cache: dict[tuple, set[str]] = {}


def _names(function: FunctionType, opcodes: tuple[str, ...]) -> set[str]:
    key = (function.__code__, opcodes)
    if key not in _cache:
        found: set[str] = set()
        pending = [function.__code__]
        while pending:
            code = pending.pop()
            pending += [c for c in code.co_consts if isinstance(c, type(code))]
            found |= {i.argval for i in dis.get_instructions(code) if i.opname in opcodes}
        _cache[key] = found
    return _cache[key]


def run(tracer: Tracer, bound: Bound, original: FunctionType) -> object:
    """Call the function under the tracer; the interpreter's modes must be as they were after it."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        raise SideEffectError(
            where=_where(original),
            reason="hooks on saved tensors are active, and a compiled step would ignore them",
            remedy="Call the step outside `saved_tensors_hooks`",
        )
    grad_mode, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    before = [original.__globals__.get(path[1]) for path in bound.scalars if path[0] == "global"]
    try:
        with intercepted(), tracer:
            returned = bound.function(*bound.args, **bound.kwargs)
    finally:
        changed = (torch.is_grad_enabled(), torch.get_default_dtype()) != (grad_mode, dtype)
        if changed:
            torch._C._set_grad_enabled(grad_mode)
            torch.set_default_dtype(dtype)
    if changed:
        raise SideEffectError(
            where=_where(original),
            reason="the step leaves grad mode or the default dtype changed",
            remedy="Use `with torch.no_grad():` (or enable_grad), which restores it",
        )
    after = [original.__globals__.get(path[1]) for path in bound.scalars if path[0] == "global"]
    if any(a is not b for a, b in zip(before, after, strict=True)):
        raise SideEffectError(
            where=_where(original),
            reason="a function called by the step rebinds a global float that the step reads",
            remedy="Pass the number as an argument, or rebind it outside the step",
        )
    return returned


def _where(function: FunctionType) -> str:
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
