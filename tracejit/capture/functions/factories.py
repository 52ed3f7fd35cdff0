"""New tensors from nothing, and casts: zeros, ones, full, arange, tensor, *_like, to, float, …"""

from __future__ import annotations

import math

import torch

from tracejit.capture.functions.common import (
    cast,
    check_range,
    common_shape,
    default_dtype,
    literal,
    number_dtype,
    operand,
    register,
    size_args,
)
from tracejit.capture.functions.movement import clone, expand_, preserved_strides
from tracejit.capture.scalars import TracedFloat
from tracejit.capture.table import rule
from tracejit.capture.tensor import TO_IR, Handle, Ints, TracedTensor
from tracejit.capture.tracer import Tracer
from tracejit.ir.types import DType, f64, i64

Tensor = torch.Tensor
Number = int | float | bool


def device_name(device: object) -> str:
    """A device argument as the IR names devices: "cpu", "cuda:0"."""
    found = torch.get_default_device() if device is None else torch.device(device)
    if found.type == "cuda" and found.index is None:
        return f"cuda:{torch.cuda.current_device()}"
    return "cpu" if found.type == "cpu" else str(found)


def ir_dtype(t: Tracer, dtype: torch.dtype) -> DType:
    """A torch dtype as an IR dtype; unsupported ones are refused."""
    if dtype not in TO_IR:
        raise t.unsupported(f"{dtype} is not supported")
    return TO_IR[dtype]


def _plain(t: Tracer, options: dict) -> None:
    """Refuse factory options that would change the result."""
    for name, value in options.items():
        harmless = {
            "layout": (None, torch.strided),
            "pin_memory": (None, False),
            "memory_format": (None, torch.preserve_format, torch.contiguous_format),
            "out": (None,),
            "names": (None,),
        }
        if name not in harmless or value not in harmless[name]:
            raise t.unsupported(f"The option {name}={value!r} has no rule")


def _make(
    t: Tracer,
    value: Number,
    shape: Ints,
    dtype: DType,
    device: str,
    requires_grad: bool,
    strides: Ints | None = None,
) -> TracedTensor:
    if any(n < 0 for n in shape):
        raise t.shape_error(f"Trying to create tensor with negative dimension: {list(shape)}")
    check_range(t, value, dtype)
    made = t.b.full(literal(value, dtype), shape=shape, dtype=dtype, device=device)
    made = t.fresh(made, strides)
    if requires_grad:
        t.make_leaf(made.handle)
    return made


def _constant(value: Number):
    def factory(
        t: Tracer,
        *size: object,
        dtype: torch.dtype | None = None,
        device: object = None,
        requires_grad: bool = False,
        **options: object,
    ) -> TracedTensor:
        given = (options.pop("size"),) if "size" in options else size
        _plain(t, options)
        chosen = default_dtype() if dtype is None else ir_dtype(t, dtype)
        shape = size_args(t, given)
        return _make(t, value, shape, chosen, device_name(device), requires_grad)

    return factory


def _constant_like(value: Number):
    def factory(
        t: Tracer,
        input: Tensor,
        *,
        dtype: torch.dtype | None = None,
        device: object = None,
        requires_grad: bool = False,
        **options: object,
    ) -> TracedTensor:
        return full_like(
            t, input, value, dtype=dtype, device=device, requires_grad=requires_grad, **options
        )

    return factory


def full(
    t: Tracer,
    size: object,
    fill_value: Number,
    *,
    dtype: torch.dtype | None = None,
    device: object = None,
    requires_grad: bool = False,
    **options: object,
) -> TracedTensor:
    _plain(t, options)
    if isinstance(fill_value, Tensor):
        raise t.unsupported("A fill value that is a tensor has no rule; use expand")
    chosen = number_dtype(fill_value) if dtype is None else ir_dtype(t, dtype)
    return _make(t, fill_value, size_args(t, (size,)), chosen, device_name(device), requires_grad)


def full_like(
    t: Tracer,
    input: Tensor,
    fill_value: Number,
    *,
    dtype: torch.dtype | None = None,
    device: object = None,
    requires_grad: bool = False,
    **options: object,
) -> TracedTensor:
    _plain(t, options)
    h = t.lift(input)
    chosen = h.dtype if dtype is None else ir_dtype(t, dtype)
    place = h.device if device is None else device_name(device)
    packed = options.get("memory_format") is torch.contiguous_format
    strides = None if packed else preserved_strides(h)
    return _make(t, fill_value, h.shape, chosen, place, requires_grad, strides)


def _new_constant(value: Number):
    def method(
        t: Tracer,
        self: Tensor,
        *size: object,
        dtype: torch.dtype | None = None,
        device: object = None,
        requires_grad: bool = False,
        **options: object,
    ) -> TracedTensor:
        given = (options.pop("size"),) if "size" in options else size
        return _new_full(
            t, self, size_args(t, given), value, dtype, device, requires_grad, **options
        )

    return method


def _new_full(
    t: Tracer,
    self: Tensor,
    size: object,
    fill_value: Number,
    dtype: torch.dtype | None = None,
    device: object = None,
    requires_grad: bool = False,
    **options: object,
) -> TracedTensor:
    _plain(t, options)
    h = t.lift(self)
    chosen = h.dtype if dtype is None else ir_dtype(t, dtype)
    place = h.device if device is None else device_name(device)
    return _make(t, fill_value, size_args(t, (size,)), chosen, place, requires_grad)


@rule(torch.scalar_tensor)
def scalar_tensor(t: Tracer, s: Number, **options: object) -> TracedTensor:
    return tensor(t, s, **{"dtype": torch.get_default_dtype(), **options})


@rule(torch.tensor)
def tensor(
    t: Tracer,
    data: object,
    *,
    dtype: torch.dtype | None = None,
    device: object = None,
    requires_grad: bool = False,
    **options: object,
) -> TracedTensor:
    """torch.tensor of one number; a list would be a constant array, which has no rule yet."""
    _plain(t, options)
    if not isinstance(data, (bool, int, float)):
        raise t.unsupported("Only torch.tensor(number) has a rule; build larger constants outside")
    chosen = number_dtype(data) if dtype is None else ir_dtype(t, dtype)
    return _make(t, data, (), chosen, device_name(device), requires_grad)


@rule(torch.arange)
def arange(
    t: Tracer,
    start: Number = 0,
    end: Number | None = None,
    step: Number = 1,
    *,
    dtype: torch.dtype | None = None,
    device: object = None,
    requires_grad: bool = False,
    **options: object,
) -> TracedTensor:
    """start, start + step, … below end."""
    _plain(t, options)
    if end is None:
        start, end = 0, start
    if any(isinstance(x, (Tensor, TracedFloat)) for x in (start, end, step)):
        raise t.unsupported("The bounds of arange decide a shape and must be plain numbers")
    if step == 0 or (end - start) * step < 0:
        raise t.shape_error("upper bound and lower bound inconsistent with step sign")
    integral = not any(isinstance(x, float) for x in (start, end, step))
    chosen = ir_dtype(t, dtype) if dtype is not None else (i64 if integral else default_dtype())
    shape = (math.ceil((end - start) / step),)
    place = device_name(device)
    inner = f64 if chosen.is_float and place == "cpu" else chosen  # where torch counts
    value = t.b.iota(axis=0, shape=shape, dtype=inner, device=place)
    if step != 1:
        value = t.b.mul(value, literal(step, inner))
    if start != 0:
        value = t.b.add(value, literal(start, inner))
    made = t.fresh(cast(t, value, chosen))
    if requires_grad:
        t.make_leaf(made.handle)
    return made


for _name, _value in (("zeros", 0), ("ones", 1)):
    register((_name,), _constant(_value), inplace=False)
    register((f"{_name}_like",), _constant_like(_value), inplace=False)
    register((f"new_{_name}",), _new_constant(_value), inplace=False)
register(("full",), full, inplace=False)
register(("full_like",), full_like, inplace=False)
register(("new_full",), _new_full, inplace=False)


def converted(t: Tracer, input: Tensor, dtype: DType, copy: bool = False) -> Tensor:
    """The tensor itself when it has the dtype already, else a cast copy."""
    h: Handle = t.lift(input)
    if h.dtype is dtype:
        return clone(t, input) if copy else input
    return t.fresh(cast(t, t.read(h), dtype), preserved_strides(h))


@rule(Tensor.to)
def to(t: Tracer, input: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Tensor.to: dtype changes have a rule; a change of device does not."""
    h = t.lift(input)
    dtype, device = kwargs.pop("dtype", None), kwargs.pop("device", None)
    copy = kwargs.pop("copy", False)
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
                raise t.unsupported("Copies between devices have no rule; do them outside")
            return converted(t, input, other.dtype)
        elif isinstance(arg, (str, torch.device)):
            device = arg
        elif arg is not None and not isinstance(arg, bool):
            raise t.unsupported(f"Tensor.to({arg!r}) has no rule")
    if kwargs:
        raise t.unsupported(f"The options {sorted(kwargs)} have no rule")
    if device is not None and device_name(device) != h.device:
        raise t.unsupported("Copies between devices have no rule; do them outside the step")
    chosen = h.dtype if dtype is None else ir_dtype(t, dtype)
    return converted(t, input, chosen, bool(copy))


@rule(Tensor.type)
def type_(t: Tracer, input: Tensor, dtype: object = None, non_blocking: bool = False) -> object:
    if not isinstance(dtype, torch.dtype):
        raise t.unsupported("Use Tensor.dtype, or pass a torch.dtype")
    return converted(t, input, ir_dtype(t, dtype))


@rule(Tensor.type_as)
def type_as(t: Tracer, input: Tensor, other: Tensor) -> Tensor:
    return to(t, input, other)


def _cast_method(dtype: torch.dtype):
    def method(
        t: Tracer, input: Tensor, memory_format: torch.memory_format = torch.preserve_format
    ) -> Tensor:
        return converted(t, input, TO_IR[dtype])

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


@rule(torch.broadcast_tensors)
def broadcast_tensors(t: Tracer, *tensors: object) -> tuple[Tensor, ...]:
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    shape = common_shape(t, [operand(t, x) for x in given])
    return tuple(x if t.lift(x).shape == shape else expand_(t, x, shape) for x in given)
