"""Complex numbers in real arithmetic: a complex tensor is pairs of real numbers.

The handle of a complex tensor stands on the memory of a real one, whose last axis is the real and
the imaginary part; `Trace.read` gives these pairs. Its views are views of them (`trace/views.py`),
so what moves numbers needs no rule of its own. Where a complex tensor or number is among the
arguments of a torch call, `Trace.apply` asks `OF_COMPLEX`; what does not stand there is refused.

torch's gradient of a complex tensor is ∂/∂re + i·∂/∂im of a real result: that of the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import EllipsisType

import torch

from tracejit.capture.functions import assembly as assembly  # its rules
from tracejit.capture.functions import autograd as autograd
from tracejit.capture.functions import metadata as metadata
from tracejit.capture.functions import movement
from tracejit.capture.functions.advanced import is_advanced
from tracejit.capture.functions.common import (
    expand,
    normal_axes,
    normal_axis,
    size_args,
)
from tracejit.capture.functions.factories import device_name
from tracejit.capture.functions.layouts import strides_in
from tracejit.capture.functions.movement import preserved_strides
from tracejit.capture.trace.inputs import in_parts
from tracejit.capture.trace.scalars import is_runtime
from tracejit.capture.trace.table import OF_COMPLEX, RULES, rule, spellings
from tracejit.capture.trace.tensor import (
    COMPLEX_TO_IR,
    TO_TORCH,
    Handle,
    Ints,
    TracedTensor,
    broadcast_shape,
    elementwise_strides,
)
from tracejit.capture.trace.trace import Trace
from tracejit.capture.trace.views import CONJ, conjugates, is_conjugate
from tracejit.ir.graph import Builder, Value
from tracejit.ir.types import COMPLEX, PARTS, i64

Tensor = torch.Tensor

# ---- pairs


def part(b: Builder, pairs: Value, k: int) -> Value:
    """The real (0) or imaginary (1) part of each pair, twice: as wide as the pairs."""
    shape = pairs.type.shape
    lead = (0,) * (len(shape) - 1)
    ones = (1,) * len(shape)
    one = b.slice(pairs, starts=(*lead, k), stops=(*shape[:-1], k + 1), steps=ones)
    return b.expand(one, shape=shape)


def pair(b: Builder, re: Value, im: Value) -> Value:
    """The pairs of two values that are as wide as pairs: the first of one, the second of the
    other."""
    shape = re.type.shape
    part = b.iota(axis=len(shape) - 1, shape=shape, dtype=i64, device=re.type.device)
    return b.where(b.lt(part, 1), re, im)


def wide(b: Builder, x: Value) -> Value:
    """A value of no pairs, each element twice."""
    shape = x.type.shape
    return b.expand(b.reshape(x, shape=(*shape, 1)), shape=(*shape, 2))


def narrow(b: Builder, x: Value) -> Value:
    """The first of each pair."""
    shape = x.type.shape
    lead = (0,) * (len(shape) - 1)
    one = b.slice(x, starts=(*lead, 0), stops=(*shape[:-1], 1), steps=(1,) * len(shape))
    return b.reshape(one, shape=shape[:-1])


def product(b: Builder, x: Value, y: Value) -> Value:
    """(a + bi)·(c + di) = (ac - bd) + (ad + bc)i"""
    p, q, c, d = part(b, x, 0), part(b, x, 1), part(b, y, 0), part(b, y, 1)
    re = b.sub(b.mul(p, c), b.mul(q, d))
    return pair(b, re, b.add(b.mul(p, d), b.mul(q, c)))


def dot(b: Builder, x: Value, y: Value) -> Value:
    """Re(conj(x)·y), of no pairs."""
    return b.reduce_sum(b.mul(x, y), axes=(len(x.type.shape) - 1,))


def length_of(t: Trace, pairs: Value) -> Value:
    """|z|, of no pairs."""
    re, im = (narrow(t.b, part(t.b, pairs, k)) for k in (0, 1))
    return RULES[torch.hypot].row.value(t, re, im)


def sign_of(t: Trace, pairs: Value) -> Value:
    """z / |z|, 0 at 0."""
    b, length = t.b, wide(t.b, length_of(t, pairs))
    return b.where(b.eq(length, 0.0), 0.0, b.div(pairs, length))


# ---- tensors


def _as_complex(t: Trace, h: Handle) -> TracedTensor:
    """The complex view of a tensor of pairs that lie together."""
    strides = tuple(s // 2 for s in h.strides[:-1])
    return t.view(h, (), h.shape[:-1], strides, h.offset // 2, COMPLEX[h.dtype])


def _as_pairs(t: Trace, h: Handle) -> TracedTensor:
    """The real view of a complex tensor."""
    offset = h.offset * 2
    return t.view(h, (), (*h.shape, 2), in_parts(h.strides), offset, PARTS[h.dtype])


def made(t: Trace, pairs: Value, strides: Ints | None = None) -> TracedTensor:
    """A new complex tensor of these pairs."""
    return _as_complex(t, t.fresh(pairs, None if strides is None else in_parts(strides)).handle)


def _resolved(t: Trace, z: Tensor) -> Tensor:
    """A tensor in whose memory its elements lie as they are, not conjugated."""
    h = t.lift(z)
    return made(t, t.read(h), preserved_strides(h)) if is_conjugate(h.steps) else z


def _pairs_of(t: Trace, z: Tensor) -> TracedTensor:
    """The real view of a complex tensor, or of a copy where that shows conjugates."""
    return _as_pairs(t, t.lift(_resolved(t, z)))


# ---- making complex tensors, and taking them apart


@rule(torch.view_as_complex)
def view_as_complex(t: Trace, input: Tensor) -> TracedTensor:
    h = t.lift(input)
    if h.dtype not in COMPLEX:
        if h.dtype.narrow and h.dtype.name == "f16":
            raise t.unsupported("complex32 is not supported")
        raise t.shape_error(
            "view_as_complex is only supported for half, float and double tensors, but got a "
            f"tensor of scalar type: {TO_TORCH[h.dtype]}"
        )
    if not h.shape:
        raise t.shape_error("Input tensor must have one or more dimensions")
    if h.shape[-1] != 2:
        raise t.shape_error("Tensor must have a last dimension of size 2")
    if h.strides[-1] != 1:
        raise t.shape_error("Tensor must have a last dimension with stride 1")
    if any(s % 2 for s in h.strides[:-1]):
        raise t.shape_error("Tensor must have a stride divisible by 2 for all but last dimension")
    if not is_runtime(h.offset) and h.offset % 2:
        raise t.shape_error("Tensor must have a storage_offset divisible by 2")
    return _as_complex(t, h)


@rule(torch.view_as_real)
def _view_as_real_of_real(t: Trace, input: Tensor) -> TracedTensor:
    raise t.shape_error("view_as_real is only supported for complex tensors")


@rule(torch.imag, Tensor.imag.__get__)
def _imag_of_real(t: Trace, input: Tensor) -> TracedTensor:
    raise t.shape_error("imag is not implemented for tensors with non-complex dtypes.")


@rule(Tensor.real.__get__)
def _real_of_real(t: Trace, input: Tensor) -> Tensor:
    t.lift(input)
    return input


@rule(torch.complex)
def complex_(t: Trace, real: Tensor, imag: Tensor) -> TracedTensor:
    return _of_two(t, real, imag, lambda x, y: pair(t.b, wide(t.b, x), wide(t.b, y)))


@rule(torch.polar)
def polar(t: Trace, abs: Tensor, angle: Tensor) -> TracedTensor:
    """torch's derivative is by the sign of the result, which a negative length turns."""
    b = t.b

    def emit(x: Value, y: Value) -> Value:
        with t.untaped():
            length, turn = wide(b, x), wide(b, y)
            out = pair(b, b.mul(length, b.cos(turn)), b.mul(length, b.sin(turn)))

        def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
            (g,) = cts
            turned = times_i(b, out)
            return (
                dot(b, g, sign_of(t, out)) if need[0] else None,
                dot(b, g, turned) if need[1] else None,
            )

        return t.derive("polar", (x, y), out, vjp)

    return _of_two(t, abs, angle, emit)


def times_i(b: Builder, pairs: Value) -> Value:
    """i·z"""
    return pair(b, b.neg(part(b, pairs, 1)), part(b, pairs, 0))


def _of_two(
    t: Trace, first: Tensor, second: Tensor, emit: Callable[[Value, Value], Value]
) -> TracedTensor:
    """A complex tensor of two real ones of one dtype."""
    x, y = t.lift(first), t.lift(second)
    if x.dtype.name == "f16" and y.dtype is x.dtype:
        raise t.unsupported("complex32 is not supported")
    if x.dtype not in COMPLEX or y.dtype is not x.dtype:
        kinds = f"{TO_TORCH[x.dtype]} and {TO_TORCH[y.dtype]}"
        raise t.shape_error(
            f"Expected both inputs to be Half, Float or Double tensors, got {kinds}"
        )
    shape = common_shape(t, (x, y))
    strides = elementwise_strides(shape, [(h.shape, h.strides) for h in (x, y)])
    return made(t, emit(*(expand(t, t.read(h), shape) for h in (x, y))), strides)


def common_shape(t: Trace, handles: Sequence[Handle]) -> Ints:
    shape = broadcast_shape([h.shape for h in handles])
    if shape is None:
        raise t.shape_error(f"shapes {[list(h.shape) for h in handles]} do not broadcast")
    if len({h.device for h in handles}) > 1:
        raise t.shape_error("Expected all tensors to be on the same device")
    return shape


def of_complex(*functions: Callable) -> Callable[[Callable], Callable]:
    """Register what is called in place of torch functions with complex arguments."""

    def register(implementation: Callable) -> Callable:
        for function in functions:
            OF_COMPLEX[function] = implementation
        return implementation

    return register


@of_complex(torch.view_as_complex)
def _complex_of_complex(t: Trace, input: Tensor) -> TracedTensor:
    raise t.shape_error(
        "view_as_complex is only supported for half, float and double tensors, but got a tensor "
        f"of scalar type: {TO_TORCH[t.lift(input).dtype]}"
    )


@of_complex(torch.view_as_real)
def view_as_real(t: Trace, input: Tensor) -> TracedTensor:
    h = t.lift(input)
    if is_conjugate(h.steps):
        raise t.shape_error(
            "view_as_real doesn't work on unresolved conjugated tensors.  To resolve the conjugate "
            "tensor so you can view it as real, use self.resolve_conj(); however, be warned that "
            "the resulting tensor will NOT alias the original."
        )
    return _as_pairs(t, h)


@of_complex(torch.real, Tensor.real.__get__)
def real(t: Trace, input: Tensor) -> TracedTensor:
    return movement.select(t, _as_pairs(t, t.lift(input)), -1, 0)


@of_complex(torch.imag, Tensor.imag.__get__)
def imag(t: Trace, input: Tensor) -> TracedTensor:
    return movement.select(t, _as_pairs(t, t.lift(input)), -1, 1)


@of_complex(torch.conj, Tensor.conj)
def conj(t: Trace, input: Tensor) -> TracedTensor:
    h = t.lift(input)
    return t.view(h, (CONJ,), h.shape, h.strides, h.offset)


@of_complex(torch.conj_physical, Tensor.conj_physical)
def conj_physical(t: Trace, input: Tensor) -> TracedTensor:
    h = t.lift(input)
    return made(t, conjugates(t.b, t.read(h)), preserved_strides(h))


@of_complex(torch.resolve_conj, Tensor.resolve_conj)
def resolve_conj(t: Trace, input: Tensor) -> Tensor:
    return _resolved(t, input)


@of_complex(Tensor.is_complex, torch.is_complex)
def is_complex(t: Trace, input: Tensor) -> bool:
    return t.lift(input).is_complex


@of_complex(Tensor.is_conj, torch.is_conj)
def is_conj(t: Trace, input: Tensor) -> bool:
    return is_conjugate(t.lift(input).steps)


# ---- what moves numbers

_AS_THEY_ARE = (
    *("expand", "expand_as", "broadcast_to", "unsqueeze", "squeeze", "permute", "transpose"),
    *("swapaxes", "swapdims", "t", "T", "mT", "select", "narrow", "unbind", "split", "chunk"),
    *("movedim", "moveaxis", "unflatten", "view_as", "detach", "split_with_sizes"),
    *("shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "__len__", "dtype"),
    *("device", "stride", "storage_offset", "is_contiguous", "element_size", "itemsize", "nbytes"),
    *("requires_grad", "is_leaf", "is_cpu", "is_cuda", "layout", "is_sparse", "is_quantized"),
    *("is_nested", "is_meta", "is_floating_point", "is_same_size", "is_inference", "__iter__"),
)
for _name in _AS_THEY_ARE:
    _own = getattr(Tensor, _name)
    for _function in (*spellings(_name), *(() if callable(_own) else (_own.__get__,))):
        if _function in RULES:
            OF_COMPLEX[_function] = RULES[_function].run


@of_complex(Tensor.view)
def view(t: Trace, input: Tensor, *size: object, dtype: torch.dtype | None = None) -> TracedTensor:
    if dtype is not None or isinstance(size[0], torch.dtype):
        raise t.unsupported("The bits of complex numbers have no rule; use torch.view_as_real")
    return movement.view(t, input, *size)


def _viewable(t: Trace, input: Tensor, shape: Ints) -> Tensor:
    """A tensor, or a copy of it, of which there is a view of a shape."""
    h = t.lift(input)
    sizes = movement.infer_size(t, h, shape)
    if movement.view_strides(h.shape, h.strides, sizes) is None:
        return made(t, t.read(h))
    return input


@of_complex(Tensor.reshape)
def reshape(t: Trace, input: Tensor, *shape: object) -> TracedTensor:
    sizes = size_args(t, shape)
    return movement.reshape(t, _viewable(t, input, sizes), sizes)


@of_complex(torch.reshape)
def _reshape(t: Trace, input: Tensor, shape: object) -> TracedTensor:
    return reshape(t, input, *shape)


@of_complex(Tensor.reshape_as)
def _reshape_as(t: Trace, input: Tensor, other: Tensor) -> TracedTensor:
    return reshape(t, input, t.lift(other).shape)


@of_complex(Tensor.flatten, torch.flatten)
def flatten(t: Trace, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> TracedTensor:
    shape = t.lift(input).shape
    if not shape:
        return reshape(t, input, 1)
    first, last = (normal_axis(t, d, len(shape)) for d in (start_dim, end_dim))
    if first > last:
        raise t.shape_error("flatten() has invalid args: start_dim cannot come after end_dim")
    if first == last:
        return input
    return reshape(t, input, (*shape[:first], -1, *shape[last + 1 :]))


@of_complex(Tensor.clone, torch.clone)
def clone(
    t: Trace, input: Tensor, *, memory_format: torch.memory_format = torch.preserve_format
) -> TracedTensor:
    h = t.lift(input)
    kept = memory_format is torch.preserve_format
    strides = preserved_strides(h) if kept else strides_in(t, h, memory_format)
    return made(t, t.b.alias(t.read(h)), strides)


@of_complex(Tensor.contiguous)
def contiguous(
    t: Trace, input: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    if movement.lies_in(t, t.lift(input), memory_format):
        return input
    return clone(t, input, memory_format=memory_format)


@of_complex(Tensor.to)
def to(t: Trace, input: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Itself, where it is there and of that dtype already."""
    h, asked = t.lift(input), [*args, kwargs.pop("dtype", None), kwargs.pop("device", None)]
    kwargs.pop("non_blocking", None)
    if kwargs.pop("copy", False) or kwargs or sum(x is True for x in args) > 1:
        raise t.unsupported("A copy of a complex tensor has a rule as Tensor.clone")
    for x in asked:
        if isinstance(x, Tensor):
            asked += [TO_TORCH[t.lift(x).dtype], t.lift(x).device]
        elif isinstance(x, torch.dtype) and COMPLEX_TO_IR.get(x) is not h.dtype:
            raise t.unsupported("A complex tensor has no rule for other dtypes")
        elif isinstance(x, (str, torch.device)) and device_name(x) != h.device:
            raise t.unsupported("Copies between devices have no rule; do them outside the step")
    return input


@of_complex(Tensor.cpu)
def cpu(t: Trace, input: Tensor) -> Tensor:
    return to(t, input, "cpu")


@of_complex(Tensor.__getitem__)
def getitem(t: Trace, input: Tensor, index: object) -> Tensor:
    if not is_advanced(index):
        return movement.getitem(t, input, index)
    items = index if isinstance(index, tuple) else (index,)
    if any(isinstance(item, EllipsisType) for item in items):
        items = (*items, slice(None))
    return _joined(t, RULES[Tensor.__getitem__].run(t, _pairs_of(t, input), items))


def _joined(t: Trace, pairs: Tensor) -> TracedTensor:
    """A new real tensor of pairs as a complex one."""
    return _as_complex(t, movement.contiguous(t, pairs).handle)


@of_complex(torch.cat, torch.concat, torch.concatenate)
def cat(t: Trace, tensors: Sequence[Tensor], dim: int = 0) -> TracedTensor:
    axis = normal_axis(t, dim, len(t.lift(tensors[0]).shape))
    return _joined(t, RULES[torch.cat].run(t, [_pair_operand(t, x) for x in tensors], axis))


@of_complex(torch.stack)
def stack(t: Trace, tensors: Sequence[Tensor], dim: int = 0) -> TracedTensor:
    axis = normal_axis(t, dim, len(t.lift(tensors[0]).shape) + 1)
    return _joined(t, RULES[torch.stack].run(t, [_pair_operand(t, x) for x in tensors], axis))


def _pair_operand(t: Trace, z: Tensor) -> TracedTensor:
    if not t.lift(z).is_complex:
        raise t.unsupported("It has a rule for complex tensors, or for real ones; not for both")
    return _pairs_of(t, z)


@of_complex(torch.index_select, Tensor.index_select)
def index_select(t: Trace, input: Tensor, dim: int, index: Tensor) -> TracedTensor:
    axis = normal_axis(t, dim, len(t.lift(input).shape))
    return _joined(t, RULES[torch.index_select].run(t, _pairs_of(t, input), axis, index))


@of_complex(Tensor.repeat)
def repeat(t: Trace, input: Tensor, *sizes: object) -> TracedTensor:
    sizes = (*size_args(t, sizes), 1)
    return _joined(t, RULES[Tensor.repeat].run(t, _pairs_of(t, input), *sizes))


def _along(function: Callable) -> Callable:
    def rule(
        t: Trace, input: Tensor, dim: object = None, keepdim: bool = False, **options: object
    ) -> TracedTensor:
        if options:
            raise t.unsupported(f"The options {sorted(options)} have no rule")
        axes = normal_axes(t, dim, len(t.lift(input).shape))
        pairs = _pairs_of(t, input)
        return _joined(t, RULES[function].run(t, pairs, axes, keepdim) if axes else pairs)

    return rule


of_complex(torch.sum, Tensor.sum)(_along(torch.sum))
of_complex(torch.mean, Tensor.mean)(_along(torch.mean))
