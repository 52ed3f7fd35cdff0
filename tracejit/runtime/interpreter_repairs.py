"""What Triton's interpreter does unlike a GPU, done right; installed by `interpreter.prepare`.

Repaired: bf16 (stored as its bits, computed in fp32, rounded to nearest even), dtypes of
comparisons, conversions between floats and integers, maximum and minimum of NaN, fma, tf32 dots,
libdevice, block reductions, scans (as trees), and runtime loop bounds. Added: the checks of
`interpreter.Memory`.
Importing this module needs triton in interpreter mode.
"""

from __future__ import annotations

import math
from types import FunctionType

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.extra import libdevice
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from tracejit.kernels import device

# --- bf16 and tf32 as bits --------------------------------------------------------------------


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """The values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of the nearest bf16 values, ties to even."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)


def f32_to_tf32(values: np.ndarray) -> np.ndarray:
    """fp32 with the 13 mantissa bits cleared that a tf32 tensor core ignores."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def numbers(handle: TensorHandle) -> np.ndarray:
    """The values of a handle as a numpy array that computes: bf16 as fp32."""
    if handle.dtype.scalar == tl.bfloat16:
        return bf16_to_f32(handle.data)
    return handle.data


def wrap(values: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """A handle of a scalar dtype that holds `values`, rounded to it."""
    if dtype == tl.bfloat16:
        return TensorHandle(f32_to_bf16(values), dtype)
    return TensorHandle(values.astype(triton_interpreter._get_np_dtype(dtype), copy=False), dtype)


def poison(shape: tuple[int, ...], dtype: tl.dtype) -> np.ndarray:
    """What a masked-off lane reads: NaN, or an integer that is far out of any index range."""
    kind = triton_interpreter._get_np_dtype(dtype)
    if dtype == tl.bfloat16:
        return np.full(shape, 0x7FC0, dtype=kind)
    if kind.kind == "f":
        return np.full(shape, np.nan, dtype=kind)
    return np.full(shape, np.frombuffer(b"\xa5" * kind.itemsize, dtype=kind)[0])


# --- the builder ------------------------------------------------------------------------------

_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


class RepairedBuilder(InterpreterBuilder):
    """Triton's interpreter builder with a GPU's arithmetic, and with checked memory."""

    memory = None  # the interpreter.Memory of the launch that is running

    # Memory.

    def create_masked_load(self, ptrs, mask, other, *hints):
        dtype = ptrs.get_element_ty()
        self._check(ptrs, mask.data, reads=True)
        if other is None:
            other = TensorHandle(poison(ptrs.data.shape, dtype), dtype)
        return super().create_masked_load(ptrs, mask, other, *hints)

    def create_masked_store(self, ptrs, value, mask, *hints):
        self._check(ptrs, mask.data, writes=True)
        return super().create_masked_store(ptrs, value, mask, *hints)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        self._check(ptr, mask.data, reads=True, writes=True)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        self._check(ptr, np.ones_like(ptr.data, dtype=bool), reads=True, writes=True)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def _check(self, ptrs, mask, reads=False, writes=False):
        itemsize = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        if self.memory is not None:  # None where somebody else launches
            self.memory.access(ptrs.data, mask, itemsize, reads, writes)

    # Arithmetic.

    def binary_op(self, lhs, rhs, op):
        values = op(numbers(lhs), numbers(rhs))
        return wrap(values, tl.int1 if op in _COMPARISONS else lhs.dtype.scalar)

    def unary_op(self, arg, op):
        return wrap(op(numbers(arg)), arg.dtype.scalar)

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(self, arg, lo, hi, propagate_nans):
        if propagate_nans == ir.PROPAGATE_NAN.ALL:
            return self.create_minimumf(self.create_maximumf(arg, lo), hi)
        return self.create_minnumf(self.create_maxnumf(arg, lo), hi)

    def create_fma(self, x, y, z):
        # fp32 products are exact in fp64; fp64 falls back on the widest type there is.
        wide = np.longdouble if z.dtype.scalar == tl.float64 else np.float64
        x_, y_, z_ = (numbers(h).astype(wide) for h in (x, y, z))
        return wrap(x_ * y_ + z_, z.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = numbers(a), numbers(b)
        if a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            left, right = f32_to_tf32(left), f32_to_tf32(right)
        product = np.matmul(left, right, dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    # Conversions.

    def cast_impl(self, src, dst_type):
        dtype = dst_type.scalar
        values = numbers(src)
        if values.dtype.kind == "f" and dtype.is_int():
            return wrap(float_to_int(values, dtype), dtype)
        return wrap(values, dtype)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode not in (None, ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError("the interpreter rounds to nearest even only")
        return self.cast_impl(src, dst_type)


def float_to_int(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Truncate as a GPU converts: out-of-range values saturate; NaN is 0, as int64 its minimum."""
    bits = 64 if dtype.int_bitwidth == 64 else 32
    unsigned = bits == dtype.int_bitwidth and dtype.is_int_unsigned()
    info = np.iinfo(f"{'u' if unsigned else ''}int{bits}")
    high = values >= float(info.max)
    low = values <= float(info.min)
    inside = np.where(high | low | np.isnan(values), 0, values)
    result = np.where(high, info.max, np.where(low, info.min, inside.astype(info.dtype)))
    if bits == 64:
        result = np.where(np.isnan(values), 1 << 63 if unsigned else info.min, result)
    return result.astype(info.dtype)


# --- libdevice --------------------------------------------------------------------------------

LIBDEVICE = {
    "abs": np.abs,
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "copysign": np.copysign,
    "cos": np.cos,
    "cosh": np.cosh,
    "div_rn": np.divide,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "erfc": np.vectorize(math.erfc, otypes=[np.float64]),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "fmod": np.fmod,
    "hypot": np.hypot,
    "log": np.log,
    "log10": np.log10,
    "log1p": np.log1p,
    "log2": np.log2,
    "nextafter": np.nextafter,
    "nearbyint": np.rint,
    "pow": np.power,
    "rint": np.rint,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "sqrt_rn": np.sqrt,
    "tan": np.tan,
    "tanh": np.tanh,
    "trunc": np.trunc,
}


def libdevice_function(name: str, compute):
    """A libdevice function computed in fp64 and rounded to the operands' dtype."""

    def function(*args, _semantic=None):
        semantic = triton_interpreter.interpreter_semantic
        tensors = [semantic.to_tensor(arg) for arg in args]
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) != 1 or not dtypes <= {tl.float32, tl.float64}:
            raise TypeError(f"libdevice.{name} takes fp32 or fp64 operands of one dtype: {dtypes}")
        if len(tensors) == 2:
            tensors = semantic.broadcast_impl_value(*tensors)
        values = compute(*(t.handle.data.astype(np.float64) for t in tensors))
        return tl.tensor(wrap(values, tensors[0].dtype), tensors[0].type)

    return function


# --- reductions -------------------------------------------------------------------------------

# Combine function -> the numpy reduction that a GPU's result equals.
REDUCTIONS = {
    tl.standard._sum_combine: np.add.reduce,
    tl.standard._elementwise_max: np.fmax.reduce,  # tl.max drops NaN
    tl.standard._elementwise_min: np.fmin.reduce,
    device.maximum: np.maximum.reduce,
    device.minimum: np.minimum.reduce,
}


def reduce_block(self, inputs):
    """`ReduceOps.apply_impl` with the reductions above, else Triton's own."""
    operand = inputs[0]
    if operand.dtype == tl.bfloat16:
        raise TypeError("a GPU accumulates a bf16 reduction in bf16: reduce in fp32")
    if self.combine_fn not in REDUCTIONS:
        return _triton_reduce(self, inputs)
    compute = REDUCTIONS[self.combine_fn]
    values = compute(operand.handle.data, axis=self.axis, keepdims=self.keep_dims)
    return self.to_tensor(values, operand.dtype)


_triton_reduce = triton_interpreter.ReduceOps.apply_impl


def scan_block(self, inputs):
    """`ScanOps.apply_impl` as a tree, as a GPU has one: results are combined with those that end
    1, 2, 4, … places before them."""
    if self.reverse or any(x.dtype == tl.bfloat16 for x in inputs):
        raise TypeError("scans go forward, and are in fp32 or wider")
    parts = [np.moveaxis(x.handle.data, self.axis, -1).copy() for x in inputs]
    kinds = [x.dtype for x in inputs]
    reach = 1
    while reach < parts[0].shape[-1]:
        sides = [np.roll(part, reach, -1) for part in parts] + parts
        made = self.combine_fn.fn(*map(self.to_tensor, sides, kinds * 2))
        for part, new in zip(parts, made if isinstance(made, tuple) else (made,), strict=True):
            part[..., reach:] = new.handle.data[..., reach:]
        reach *= 2
    pairs = zip(parts, inputs, strict=True)
    return [self.to_tensor(np.moveaxis(part, -1, self.axis), x.dtype) for part, x in pairs]


# --- installation -----------------------------------------------------------------------------


def call_device_function(self, *args, **kwargs):
    """Call a jit function from a kernel; the language stays patched, so there is nothing to do."""
    return self.rewrite()(*args, **kwargs)


def install() -> None:
    """Patch the language once, for good: a process that interprets never compiles. Idempotent."""
    builder = triton_interpreter.interpreter_builder
    if isinstance(builder, RepairedBuilder):
        return
    # _patch_lang patches the language modules that it finds among a function's globals.
    anchor = FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    triton_interpreter._patch_lang(anchor)
    # Triton 3.6 calls int() on an array of one element, which numpy >= 2.4 refuses.
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    triton_interpreter.ReduceOps.apply_impl = reduce_block
    triton_interpreter.ScanOps.apply_impl = scan_block
    InterpretedFunction.__call__ = call_device_function
    builder.__class__ = RepairedBuilder
    # Integer overflow wraps around, as in a kernel that was compiled without debug=True.
    builder.options = triton_interpreter.InterpreterOptions(sanitize_overflow=False)
    for name, compute in LIBDEVICE.items():
        setattr(libdevice, name, libdevice_function(name, compute))
