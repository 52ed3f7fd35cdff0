"""What rules share: operands, broadcasting, in-place forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, wraps
from inspect import isfunction
from types import MappingProxyType

import numpy as np
import torch

from tracejit.capture.functions.promotion import Number as Number
from tracejit.capture.functions.promotion import Operand as Operand
from tracejit.capture.functions.promotion import as_float as as_float
from tracejit.capture.functions.promotion import as_it_is as as_it_is
from tracejit.capture.functions.promotion import can_cast as can_cast
from tracejit.capture.functions.promotion import default_dtype as default_dtype
from tracejit.capture.functions.promotion import number_dtype as number_dtype
from tracejit.capture.functions.promotion import promote_two as promote_two
from tracejit.capture.functions.promotion import result_dtype as result_dtype
from tracejit.capture.trace import location, numbers
from tracejit.capture.trace.overlaps import check_operands
from tracejit.capture.trace.scalars import TracedFloat, is_runtime
from tracejit.capture.trace.table import RULES, Row, Rule, family_of, spellings
from tracejit.capture.trace.tensor import (
    TO_IR,
    TO_TORCH,
    Handle,
    Ints,
    TracedTensor,
    broadcast_shape,
    elementwise_strides,
    is_dense,
)
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.graph import Arg, Value
from tracejit.ir.types import DType, b1, round_to


def operand(t: Trace, x: object) -> Operand:
    """Read an argument as an operand; anything but a tensor or number is unsupported.

    Next to an operator it is a TypeError, so that Python asks the other operand's class.
    """
    if isinstance(x, torch.Tensor):
        return Operand(t.lift(x))
    if isinstance(x, (bool, int, float)):
        return Operand(None, t.number(x))
    if isinstance(x, np.generic) and x.dtype.kind in "biuf":
        return Operand(None, x.item())
    if getattr(t.calling, "__name__", "").startswith("__"):
        raise TypeError(f"unsupported operand type: {type(x).__name__}")
    raise t.unsupported(f"An operand of type {type(x).__name__} has no rule")


def as_number(t: Trace, x: object) -> object:
    """A 0-d tensor given for a number: the number where the host knows it, else the tensor."""
    if not isinstance(x, torch.Tensor):
        return x
    if t.lift(x).shape:
        raise t.shape_error("a number is expected, or a tensor with 0 dimensions")
    number = numbers.item(t, t.lift(x))
    return x if number is None else number


def literal(x: Number, dtype: DType) -> Arg:
    """A number as an IR operand next to tensors of `dtype`; runtime scalars stay host values."""
    if is_runtime(x):
        return x.value
    if dtype.is_float:
        return float.__pos__(x) if isinstance(x, TracedFloat) else float(x)
    if dtype is b1:
        return bool(x)
    if isinstance(x, float) and not math.isfinite(x):
        x = 0
    number = int(x)
    if dtype.kind in "iu":  # wrap as C does
        bits = dtype.itemsize * 8
        number &= (1 << bits) - 1
        if dtype.kind == "i" and number >= 1 << (bits - 1):
            number -= 1 << bits
    return number


def cast(t: Trace, value: Value, dtype: DType) -> Value:
    """Cast unless the dtype is already that."""
    return value if value.type.dtype is dtype else t.b.cast(value, dtype=dtype)


def check_range(t: Trace, x: Number, dtype: DType) -> None:
    """Refuse a number that a new tensor of `dtype` cannot hold, as eager does.

    Runtime scalars are not checked: their values change.
    """
    if is_runtime(x) or isinstance(x, TracedFloat):
        return
    number = float(x)
    if dtype is b1 or (dtype.is_float and math.isinf(number)):
        return
    low, high = _range(dtype)
    if not (low <= number <= high or (dtype.is_float and number != number)):
        raise t.shape_error(f"value cannot be converted to {TO_TORCH[dtype]} without overflow")


@cache
def _range(dtype: DType) -> tuple[float, float]:
    """The least and the greatest number that a new tensor of a dtype may be given."""
    info = (torch.finfo if dtype.is_float else torch.iinfo)(TO_TORCH[dtype])
    return -info.max if dtype.kind == "u" else info.min, info.max


def is_tensor(x: Arg) -> bool:
    """Whether an operand is a tensor: neither a number nor a runtime scalar."""
    return isinstance(x, Value) and not x.type.is_host


def by_rule(t: Trace, function: Callable, *args: object) -> torch.Tensor:
    """What a torch function returns, by its rule; nothing of it is differentiated."""
    with t.untaped():
        return RULES[function].run(t, *args)


def truth(t: Trace, value: Value) -> Value:
    """Whether each element differs from zero."""
    dtype = value.type.dtype
    return value if dtype is b1 else t.b.ne(value, literal(0, dtype))


def expand(t: Trace, value: Value, shape: Ints) -> Value:
    """Broadcast a value to a shape it is known to broadcast to."""
    if value.type.shape == shape:
        return value
    missing = len(shape) - len(value.type.shape)
    if missing:
        value = t.b.reshape(value, shape=(1,) * missing + value.type.shape)
    return value if value.type.shape == shape else t.b.expand(value, shape=shape)


def common_shape(t: Trace, operands: Sequence[Operand]) -> Ints:
    """The broadcast shape of the tensors among operands; torch's RuntimeError if there is none."""
    shapes = [x.handle.shape for x in operands if x.handle is not None]
    shape = broadcast_shape(shapes)
    if shape is None:
        raise t.shape_error(_broadcast_reason(shapes))
    devices = {x.handle.device for x in operands if x.handle is not None}
    if len(devices) > 1:
        raise t.shape_error(
            f"Expected all tensors to be on the same device, but found {sorted(devices)}"
        )
    return shape


def on_one_device(t: Trace, operands: Sequence[Operand]) -> Sequence[Operand]:
    """Operands with 0-d tensors of the CPU moved to the device of the others, as eager allows."""
    devices = {x.handle.device for x in operands if x.handle is not None}
    if len(devices) == 1:
        return operands
    alone = [x.handle is not None and not x.handle.shape for x in operands]
    alone = [yes and x.handle.device == "cpu" for yes, x in zip(alone, operands, strict=True)]
    others = devices - {"cpu"}
    if len(others) != 1:
        return operands
    (device,) = others
    return [
        Operand(moved(t, x.handle, device).handle) if yes else x
        for yes, x in zip(alone, operands, strict=True)
    ]


def moved(t: Trace, h: Handle, device: str) -> TracedTensor:
    """A copy on another device of a tensor of one element, whose number the host knows."""
    number = numbers.item(t, h)
    if number is None or (t.grad_on and t.requires_grad(h)):
        raise t.unsupported("Copies between devices have no rule; do them outside the step")
    value = literal(number, h.dtype)
    return t.fresh(t.b.full(value, shape=h.shape, dtype=h.dtype, device=device))


def _broadcast_reason(shapes: list[Ints]) -> str:
    rank = max(map(len, shapes))
    for axis in reversed(range(rank)):
        sizes = [s[axis - rank + len(s)] for s in shapes if axis - rank + len(s) >= 0]
        wide = [n for n in sizes if n != 1]
        if len(set(wide)) > 1:
            return (
                f"The size of tensor a ({wide[0]}) must match the size of tensor b ({wide[1]}) at "
                f"non-singleton dimension {axis}"
            )
    return "shapes do not broadcast"


def rounded(t: Trace, x: Number, dtype: DType, device: str) -> Arg:
    """A number rounded to a narrow dtype before it takes part in an operation."""
    if is_runtime(x):
        return t.b.full(x.value, shape=(), dtype=dtype, device=device)
    return float(round_to(np.asarray(x, np.float32), dtype))


def operands_as(
    t: Trace, operands: Sequence[Operand], dtype: DType, shape: Ints, *, wide: bool = False
) -> tuple[Arg, ...]:
    """Operands cast and broadcast for one element-wise primitive.

    Next to bf16 and f16 tensors eager rounds numbers to the tensor's dtype, except in the functions
    that keep the second operand `wide`, in float32.
    """
    out: list[Arg] = []
    for x in operands:
        if x.handle is None and dtype.narrow and not (wide and out):
            device = next(y.handle.device for y in operands if y.handle is not None)
            number = rounded(t, x.number, dtype, device)
            out.append(expand(t, number, shape) if isinstance(number, Value) else number)
        elif x.handle is None:
            out.append(literal(x.number, dtype))
        else:
            out.append(expand(t, cast(t, t.read(x.handle), dtype), shape))
    return tuple(out)


def result_strides(operands: Sequence[Operand], shape: Ints, as_tensors: bool = True) -> Ints:
    """The strides that torch gives an element-wise result. Numbers are tensors without axes to it,
    unless the function has parameters for them (not `as_tensors`)."""
    given = [(x.handle.shape, x.handle.strides) for x in operands if x.handle is not None]
    if as_tensors and len(given) < len(operands):
        given.append(((), ()))
    return elementwise_strides(shape, given)


def kept_strides(h: Handle) -> Ints:
    """The strides that torch.empty_like gives: those of a dense tensor stay."""
    dense = is_dense(h.shape, h.strides)
    return h.strides if dense else elementwise_strides(h.shape, [(h.shape, h.strides)])


def pointwise(
    t: Trace,
    emit: Callable[..., Value],
    xs: Sequence[object],
    *,
    to: Callable[[DType], DType] = as_it_is,
    wide: bool = False,
    row_major: bool = False,
    as_tensors: bool = True,
) -> TracedTensor:
    """One element-wise torch function: promote, broadcast, emit, wrap.

    `emit(*operands)` gets IR operands of the promoted dtype, passed through `to`. The result has
    the strides that torch gives it, or is `row_major`; `as_tensors`: see `result_strides`.
    """
    value, operands = _emitted(t, emit, xs, to, wide)
    strides = None if row_major else result_strides(operands, value.type.shape, as_tensors)
    return t.fresh(value, strides)


def pointwise_value(
    t: Trace,
    emit: Callable[..., Value],
    xs: Sequence[object],
    *,
    to: Callable[[DType], DType] = as_it_is,
    wide: bool = False,
) -> Value:
    """`pointwise` without the tensor: for a result that goes into another one."""
    return _emitted(t, emit, xs, to, wide)[0]


def _emitted(
    t: Trace,
    emit: Callable[..., Value],
    xs: Sequence[object],
    to: Callable[[DType], DType],
    wide: bool,
) -> tuple[Value, Sequence[Operand]]:
    operands = on_one_device(t, [operand(t, x) for x in xs])
    shape = common_shape(t, operands)
    dtype = to(result_dtype(operands))
    return emit(*operands_as(t, operands, dtype, shape, wide=wide)), operands


def normal_axis(t: Trace, axis: int, rank: int) -> int:
    """An axis counted from the front; IndexError as torch's when out of range."""
    axis, span = int(axis), max(rank, 1)
    if not -span <= axis < span:
        raise AxisError(
            where=location.full(),
            reason=f"Dimension out of range (expected to be in range of [{-span}, {span - 1}], "
            f"but got {axis})",
        )
    return axis % span


def normal_axes(t: Trace, axes: object, rank: int) -> Ints:
    """One axis, several, or None (all), counted from the front and sorted."""
    if axes is None or axes == () or axes == []:
        return tuple(range(rank))
    if isinstance(axes, int):
        axes = (axes,)
    out = tuple(normal_axis(t, a, rank) for a in axes)
    if len(set(out)) != len(out):
        raise t.shape_error("dim appears multiple times in the list of dims")
    return tuple(sorted(out)) if rank else ()


def size_args(t: Trace, sizes: tuple) -> Ints:
    """Sizes given as f(2, 3) or f((2, 3))."""
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return tuple(_size(t, s) for s in sizes)


def _size(t: Trace, size: object) -> int:
    """A size; that in a tensor is part of the step."""
    if not isinstance(size, torch.Tensor):
        return int(size)
    h = t.lift(size)
    if h.shape or h.dtype.is_float:
        raise TypeError("only integer tensors of a single element can be converted to an index")
    return int(RULES[torch.Tensor.item].run(t, size))


def sized(name: str, implementation: Callable) -> Callable:
    """A rule of sizes, f(2, 3) or f((2, 3)), that takes them by name too."""

    @wraps(implementation)
    def rule(t: Trace, input: torch.Tensor, *sizes: object, **named: object) -> object:
        if name in named:
            sizes = (named.pop(name),)
        return implementation(t, input, *sizes, **named)

    return rule


def write_back(t: Trace, target: torch.Tensor, result: TracedTensor | Value) -> torch.Tensor:
    """Finish an in-place form: cast the result to the target's dtype and write it."""
    into = t.lift(target)
    got = result.type if isinstance(result, Value) else result.handle
    if got.shape != into.shape:
        raise t.shape_error(
            f"output with shape {list(into.shape)} doesn't match the broadcast shape "
            f"{list(got.shape)}"
        )
    if not can_cast(got.dtype, into.dtype):
        raise t.shape_error(
            f"result type {TO_TORCH[got.dtype]} can't be cast to the desired output type "
            f"{TO_TORCH[into.dtype]}"
        )
    value = result if isinstance(result, Value) else t.read(got)
    t.write(into, cast(t, value, into.dtype))
    return target


def in_place(out_of_place: Callable) -> Callable:
    """The in-place form of a rule: its first argument is overwritten and returned.

    Where gradients are recorded, the rule reads a copy, which its derivative may read again. Where
    none are, a rule that takes `wrap` makes no tensor of its result.
    """
    wraps_itself = "wrap" in _arguments(out_of_place)

    @wraps(out_of_place)
    def rule(t: Trace, self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        source = self
        others = *args, *kwargs.values()
        if not t.grad_on:
            if wraps_itself:
                kwargs["wrap"] = pointwise_value
        elif t.tape.tracked:
            h = t.lift(self)
            source = t.fresh(t.b.alias(t.read(h)), h.strides)
        result = out_of_place(t, source, *args, **kwargs)
        if others:
            check_operands(t, t.lift(self), *others)
        return write_back(t, self, result)

    return rule


def in_place_along(out_of_place: Callable) -> Callable:
    """The in-place form of a rule of (input, dim, dtype), whose dtype may only be what is there."""
    write = in_place(out_of_place)

    @wraps(out_of_place)
    def rule(
        t: Trace, self: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        if t.lift(self).dtype is b1:
            raise t.not_implemented(f"{out_of_place.__name__}_out_cpu", b1)
        if dtype is not None and TO_IR[dtype] is not t.lift(self).dtype:
            raise t.shape_error(f"Bad in-place call: the tensor does not have the dtype {dtype}")
        return write(t, self, dim)

    return rule


def with_inplace(implementation: Callable, position: int) -> Callable:
    """A rule of torch.nn.functional: an `inplace` flag stands after `position` arguments."""

    overwriting = in_place(implementation)

    @wraps(implementation)
    def rule(t: Trace, input: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        inplace = kwargs.pop("inplace", args[position] if len(args) > position else False)
        run = overwriting if inplace else implementation
        return run(t, input, *args[:position], **kwargs)

    return rule


def register(
    names: Sequence[str],
    implementation: Callable,
    *,
    inplace: bool = True,
    others: Mapping[Callable, Callable] = MappingProxyType({}),
    row: Row | None = None,
) -> None:
    """Register a rule for every spelling of these names, and of their in-place forms.

    `others` are the rules of the spellings that take their arguments in another way; Python
    functions of torch.nn.functional may take a flag `inplace` as well.
    """
    rule = Rule(implementation, family_of(implementation), row=row)
    overwriting = replace(rule, run=in_place(implementation), of=rule, form="in place")
    for name in names:
        for function in spellings(name):
            run = others.get(function) or _with_its_flag(function, implementation)
            same = run is implementation
            RULES[function] = rule if same else replace(rule, run=run, of=rule, form="signature")
        if inplace:
            for function in spellings(f"__i{name[2:]}" if name.startswith("__") else f"{name}_"):
                RULES[function] = overwriting


def _with_its_flag(function: Callable, implementation: Callable) -> Callable:
    """An implementation that takes `inplace` where a Python function of torch has it."""
    names = _arguments(function)
    if "inplace" not in names:
        return implementation
    return with_inplace(implementation, names.index("inplace") - 1)


def _arguments(function: Callable) -> tuple[str, ...]:
    """The names of a Python function's arguments, as its code has them; of others none."""
    code = function.__code__ if isfunction(function) else None
    return () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
