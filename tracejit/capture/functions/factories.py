"""New tensors from nothing, and casts: zeros, ones, full, arange, *_like, to, float, …"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tracejit.capture.functions.common import (
    as_number,
    cast,
    check_range,
    common_shape,
    default_dtype,
    literal,
    moved,
    number_dtype,
    operand,
    register,
    size_args,
)
from tracejit.capture.functions.derived import argument_error
from tracejit.capture.functions.layouts import is_channels_last, strides_in
from tracejit.capture.functions.movement import clone, expand_, preserved_strides
from tracejit.capture.trace.integers import held
from tracejit.capture.trace.posing import current_gpu
from tracejit.capture.trace.scalars import pinned
from tracejit.capture.trace.table import RULES, rule
from tracejit.capture.trace.tensor import TO_IR, Handle, Ints, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.types import DType, f64, i64

Tensor = torch.Tensor
Number = int | float | bool


def device_name(device: object) -> str:
    """A device argument as the IR names devices: "cpu", "cuda:0"."""
    found = torch.get_default_device() if device is None else torch.device(device)
    if found.type == "cuda" and found.index is None:
        return f"cuda:{current_gpu()}"
    return "cpu" if found.type == "cpu" else str(found)


@rule(torch.device)
def device(t: Trace, *args: object, **kwargs: object) -> torch.device:
    """A device; as a context manager it is a mode above the tracer, which names it in each call."""
    return torch.device(*args, **kwargs)


def ir_dtype(t: Trace, dtype: torch.dtype) -> DType:
    """A torch dtype as an IR dtype; unsupported ones are refused."""
    if dtype not in TO_IR:
        raise t.unsupported(f"{dtype} is not supported")
    return TO_IR[dtype]


class Options(NamedTuple):
    """What every factory takes by keyword."""

    dtype: DType | None  # None: what the function chooses
    device: str
    requires_grad: bool
    packed: bool  # row-major, however the tensor that is copied is laid out


HARMLESS = {
    "layout": (None, torch.strided),
    "pin_memory": (None, False),
    "memory_format": (None, torch.preserve_format, torch.contiguous_format),
    "out": (None,),
    "names": (None,),
}


def options_of(t: Trace, options: dict, like: Handle | None = None) -> Options:
    """The keywords of a factory, by default as those of a tensor that it is made like.

    Those that would change the result otherwise are refused.
    """
    given = {"dtype": None, "device": None, "requires_grad": False} | options
    dtype, device, requires_grad = (given.pop(k) for k in ("dtype", "device", "requires_grad"))
    for name, value in given.items():
        if name not in HARMLESS or value not in HARMLESS[name]:
            raise t.unsupported(f"The option {name}={value!r} has no rule")
    kept = like is not None and dtype is None
    return Options(
        like.dtype if kept else None if dtype is None else ir_dtype(t, dtype),
        like.device if like is not None and device is None else device_name(device),
        bool(requires_grad),
        given.get("memory_format") is torch.contiguous_format,
    )


def made(
    t: Trace, value: Value, requires_grad: bool = False, strides: Ints | None = None
) -> TracedTensor:
    """A new tensor of a value, a leaf if it requires grad."""
    out = t.fresh(value, strides)
    if requires_grad:
        t.make_leaf(out.handle)
    return out


def filled(
    t: Trace,
    value: Number,
    shape: Ints,
    dtype: DType,
    options: Options,
    strides: Ints | None = None,
) -> TracedTensor:
    """A new tensor of one number."""
    if any(n < 0 for n in shape):
        raise t.shape_error(f"Trying to create tensor with negative dimension: {list(shape)}")
    value = held(value, dtype)
    check_range(t, value, dtype)
    full = t.b.full(literal(value, dtype), shape=shape, dtype=dtype, device=options.device)
    return made(t, full, options.requires_grad, strides)


def _size(t: Trace, size: tuple, options: dict) -> Ints:
    return size_args(t, (options.pop("size"),) if "size" in options else size)


def _constant(value: Number):
    def factory(t: Trace, *size: object, **options: object) -> TracedTensor:
        shape = _size(t, size, options)
        o = options_of(t, options)
        return filled(t, value, shape, o.dtype or default_dtype(), o)

    return factory


def _constant_like(value: Number):
    def factory(t: Trace, input: Tensor, **options: object) -> TracedTensor:
        return full_like(t, input, value, **options)

    return factory


def full(t: Trace, size: object, fill_value: Number, **options: object) -> TracedTensor:
    o = options_of(t, options)
    if isinstance(fill_value, Tensor):
        raise t.unsupported("A fill value that is a tensor has no rule; use expand")
    return filled(t, fill_value, size_args(t, (size,)), o.dtype or number_dtype(fill_value), o)


def full_like(t: Trace, input: Tensor, fill_value: Number, **options: object) -> TracedTensor:
    h = t.lift(input)
    o = options_of(t, options, h)
    return filled(t, fill_value, h.shape, o.dtype, o, None if o.packed else preserved_strides(h))


def _new_constant(value: Number):
    def method(t: Trace, self: Tensor, *size: object, **options: object) -> TracedTensor:
        return _new_full(t, self, _size(t, size, options), value, **options)

    return method


def _new_full(
    t: Trace, self: Tensor, size: object, fill_value: Number, **options: object
) -> TracedTensor:
    o = options_of(t, options, t.lift(self))
    return filled(t, fill_value, size_args(t, (size,)), o.dtype, o)


@rule(torch.arange)
def arange(
    t: Trace,
    start: Number = 0,
    end: Number | None = None,
    step: Number = 1,
    **options: object,
) -> TracedTensor:
    """start, start + step, … below end."""
    o = options_of(t, options)
    if end is None:
        start, end = 0, start
    start, end, step = (pinned(as_number(t, x)) for x in (start, end, step))  # they decide a shape
    if any(isinstance(x, Tensor) for x in (start, end, step)):
        raise t.unsupported("The bounds of arange decide a shape; a tensor's values do not")
    integral = not any(isinstance(x, float) for x in (start, end, step))
    chosen = o.dtype or (i64 if integral else default_dtype())
    if not step:
        raise t.shape_error("step must be nonzero")
    count, towards = math.ceil((end - start) / step), (end - start) * step
    if chosen.kind in "iu":
        start, end, step = int(start), int(end), int(step)
        if chosen is i64:  # which torch counts by the whole numbers
            if not step:
                raise argument_error(t, "step must be nonzero")
            count = -((start - end) // step)
    if ((end - start) * step if step else towards) < 0:
        raise t.shape_error("upper bound and lower bound inconsistent with step sign")
    shape = (count,)
    inner = f64 if chosen.is_float and o.device == "cpu" else chosen  # where torch counts
    value = t.b.iota(axis=0, shape=shape, dtype=inner, device=o.device)
    if step != 1:
        value = t.b.mul(value, literal(step, inner))
    if start != 0:
        value = t.b.add(value, literal(start, inner))
    return made(t, cast(t, value, chosen), o.requires_grad)


for _name, _value in (("zeros", 0), ("ones", 1), ("empty", 0)):
    register((_name,), _constant(_value), inplace=False)
    register((f"{_name}_like",), _constant_like(_value), inplace=False)
    register((f"new_{_name}",), _new_constant(_value), inplace=False)


@rule(Tensor.new)
def new(t: Trace, self: Tensor, *size: object, device: object = None) -> TracedTensor:
    """Memory as it comes, of a size."""
    sizes = size[0] if len(size) == 1 and isinstance(size[0], torch.Size) else size
    if not all(isinstance(n, int) for n in sizes):
        raise t.unsupported("Use torch.tensor, or new_tensor")
    return _new_full(t, self, tuple(sizes), 0, device=device)


register(("full",), full, inplace=False)
register(("full_like",), full_like, inplace=False)
register(("new_full",), _new_full, inplace=False)


def converted(
    t: Trace,
    input: Tensor,
    dtype: DType,
    copy: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """The tensor itself when it has the dtype already, and torch takes it to lie in the memory
    format that is asked for; else a cast copy."""
    h: Handle = t.lift(input)
    same = h.dtype is dtype
    if memory_format in (None, torch.preserve_format):
        if same:
            return clone(t, input) if copy else input
        return t.fresh(cast(t, t.read(h), dtype), preserved_strides(h))
    row_major = memory_format is torch.contiguous_format
    if same and not copy and row_major != is_channels_last(h.shape, h.strides):
        return input
    value = t.b.alias(t.read(h)) if same else cast(t, t.read(h), dtype)
    return t.fresh(value, strides_in(t, h, memory_format))


@rule(Tensor.to)
def to(t: Trace, input: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Tensor.to: dtype changes have a rule; a change of device does not."""
    h = t.lift(input)
    dtype, device = kwargs.pop("dtype", None), kwargs.pop("device", None)
    copy = kwargs.pop("copy", False)
    memory_format = kwargs.pop("memory_format", torch.preserve_format)
    kwargs.pop("non_blocking", None)
    flags = [arg for arg in args if isinstance(arg, bool)]
    if len(flags) == 2:
        copy = flags[1]
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, Tensor):
            other = t.lift(arg)
            if other.device != h.device:
                input = moved(t, h, other.device)
            return converted(t, input, other.dtype, bool(copy), memory_format)
        elif isinstance(arg, (str, torch.device)):
            device = arg
        elif arg is not None and not isinstance(arg, bool):
            raise t.unsupported(f"Tensor.to({arg!r}) has no rule")
    if kwargs:
        raise t.unsupported(f"The options {sorted(kwargs)} have no rule")
    if device is not None and device_name(device) != h.device:
        input = moved(t, h, device_name(device))
    chosen = h.dtype if dtype is None else ir_dtype(t, dtype)
    return converted(t, input, chosen, bool(copy), memory_format)


@rule(Tensor.type)
def type_(t: Trace, input: Tensor, dtype: object = None, non_blocking: bool = False) -> object:
    if not isinstance(dtype, torch.dtype):
        raise t.unsupported("Use Tensor.dtype, or pass a torch.dtype")
    return converted(t, input, ir_dtype(t, dtype))


@rule(Tensor.type_as)
def type_as(t: Trace, input: Tensor, other: Tensor) -> Tensor:
    return to(t, input, other)


def _cast_method(dtype: torch.dtype):
    def method(
        t: Trace, input: Tensor, memory_format: torch.memory_format = torch.preserve_format
    ) -> Tensor:
        return converted(t, input, TO_IR[dtype], False, memory_format)

    return method


for _name, _dtype in (
    ("double", torch.float64),
    ("float", torch.float32),
    ("half", torch.float16),
    ("bfloat16", torch.bfloat16),
    ("long", torch.int64),
    ("int", torch.int32),
    ("short", torch.int16),
    ("char", torch.int8),
    ("byte", torch.uint8),
    ("bool", torch.bool),
):
    rule(getattr(Tensor, _name))(_cast_method(_dtype))


@rule(torch.as_tensor)
def as_tensor(
    t: Trace, data: object, dtype: torch.dtype | None = None, device: object = None
) -> Tensor:
    """The tensor itself, or a copy of another dtype; of numbers, a new tensor."""
    if isinstance(data, Tensor):
        return to(t, data, dtype=dtype, device=device)
    return RULES[torch.tensor].run(t, data, dtype=dtype, device=device)


@rule(torch.broadcast_tensors)
def broadcast_tensors(t: Trace, *tensors: object) -> tuple[Tensor, ...]:
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    shape = common_shape(t, [operand(t, x) for x in given])
    return tuple(x if t.lift(x).shape == shape else expand_(t, x, shape) for x in given)
