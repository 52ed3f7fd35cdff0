"""Matrix products: mm, matmul, @, bmm, dot, mv, linear, addmm."""

from __future__ import annotations

import torch

from tracejit.capture.functions.arithmetic import add, scaled
from tracejit.capture.functions.common import expand, register
from tracejit.capture.trace.scalars import TracedFloat
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Handle, TracedTensor, broadcast_shape
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Value
from tracejit.ir.types import b1

Tensor = torch.Tensor


def _check(t: Trace, a: Handle, b: Handle) -> None:
    if a.dtype is not b.dtype:
        raise t.shape_error(
            f"expected m1 and m2 to have the same dtype, but got: {a.dtype} != {b.dtype}"
        )
    if a.dtype is b1:
        raise t.not_implemented("addmm_impl_cpu_", b1)
    if a.device != b.device:
        raise t.shape_error(
            f"Expected all tensors to be on the same device, but found {a.device} and {b.device}"
        )


def _mismatch(t: Trace, a: Handle, b: Handle) -> Exception:
    rows = "x".join(map(str, a.shape[-2:]))
    columns = "x".join(map(str, b.shape[-2:]))
    return t.shape_error(f"mat1 and mat2 shapes cannot be multiplied ({rows} and {columns})")


def mm(t: Trace, input: Tensor, mat2: Tensor) -> TracedTensor:
    a, b = t.lift(input), t.lift(mat2)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise t.shape_error(f"{'self' if len(a.shape) != 2 else 'mat2'} must be a matrix")
    return matmul(t, input, mat2)


def bmm(t: Trace, input: Tensor, mat2: Tensor) -> TracedTensor:
    a, b = t.lift(input), t.lift(mat2)
    if len(a.shape) != 3 or len(b.shape) != 3 or a.shape[0] != b.shape[0]:
        raise t.shape_error("batch1 and batch2 must be 3D tensors of one batch size")
    return matmul(t, input, mat2)


def matmul(t: Trace, input: Tensor, other: Tensor) -> TracedTensor:
    """torch.matmul: vectors gain an axis that the result loses, batch axes broadcast."""
    a, b = t.lift(input), t.lift(other)
    _check(t, a, b)
    if not a.shape or not b.shape:
        raise t.shape_error("both arguments to matmul need to be at least 1D")
    x, y = t.read(a), t.read(b)
    if len(a.shape) == 1:
        x = t.b.reshape(x, shape=(1, *a.shape))
    if len(b.shape) == 1:
        y = t.b.reshape(y, shape=(*b.shape, 1))
    if x.type.shape[-1] != y.type.shape[-2]:
        raise _mismatch(t, a, b)
    out = _product(t, x, y)
    shape = list(out.type.shape)
    if len(b.shape) == 1:
        del shape[-1]
    if len(a.shape) == 1:
        del shape[-1 if len(b.shape) == 1 else -2]
    if tuple(shape) != out.type.shape:
        out = t.b.reshape(out, shape=tuple(shape))
    return t.fresh(out)


def _product(t: Trace, x: Value, y: Value) -> Value:
    """Matrices with batch axes to broadcast. One matrix on the right folds the batch into rows."""
    if len(y.type.shape) == 2 and len(x.type.shape) > 2:
        *batch, m, k = x.type.shape
        rows = m
        for n in batch:
            rows *= n
        out = t.b.matmul(t.b.reshape(x, shape=(rows, k)), y)
        return t.b.reshape(out, shape=(*batch, m, y.type.shape[-1]))
    batch = broadcast_shape([x.type.shape[:-2], y.type.shape[:-2]])
    if batch is None:
        raise t.shape_error("the batch dimensions do not broadcast")
    x = expand(t, x, batch + x.type.shape[-2:])
    y = expand(t, y, batch + y.type.shape[-2:])
    return t.b.matmul(x, y)


def mv(t: Trace, input: Tensor, vec: Tensor) -> TracedTensor:
    if len(t.lift(input).shape) != 2 or len(t.lift(vec).shape) != 1:
        raise t.shape_error("vector + matrix @ vector expected")
    return matmul(t, input, vec)


def dot(t: Trace, input: Tensor, tensor: Tensor) -> TracedTensor:
    a, b = t.lift(input), t.lift(tensor)
    if len(a.shape) != 1 or len(b.shape) != 1:
        raise t.shape_error("1D tensors expected")
    if a.shape != b.shape:
        raise t.shape_error("inconsistent tensor size, expected tensor and src of one length")
    return matmul(t, input, tensor)


@rule(torch.nn.functional.linear, torch._C._nn.linear)
def linear(t: Trace, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> TracedTensor:
    """input @ weight.T + bias"""
    w = t.lift(weight)
    x = t.lift(input)
    if len(w.shape) == 1:
        out = matmul(t, input, weight)
        return out if bias is None else add(t, out, bias)
    _check(t, x, w)
    if x.shape[-1:] != w.shape[-1:]:
        raise t.shape_error(
            f"mat1 and mat2 shapes cannot be multiplied ({'x'.join(map(str, x.shape))} and "
            f"{'x'.join(map(str, reversed(w.shape)))})"
        )
    transposed = t.b.permute(t.read(w), axes=tuple(reversed(range(len(w.shape)))))
    a = t.read(x)
    if len(x.shape) == 1:
        a = t.b.reshape(a, shape=(1, *x.shape))
    out = _product(t, a, transposed)
    if len(x.shape) == 1:
        out = t.b.reshape(out, shape=w.shape[:1])
    result = t.fresh(out)
    return result if bias is None else add(t, result, bias)


def vdot(t: Trace, input: Tensor, other: Tensor) -> TracedTensor:
    """As of real numbers."""
    return dot(t, input, other)


def plus(t: Trace, input: Tensor, product: TracedTensor, beta: float, alpha: float) -> TracedTensor:
    """beta * input + alpha * product, the factors in their dtype; an input times 0 is not read."""
    shape, given = product.handle.shape, t.lift(input).shape
    if broadcast_shape([given, shape]) != shape:
        raise t.shape_error(f"input of shape {list(given)} does not expand to {list(shape)}")
    dtype = product.handle.dtype
    if not dtype.is_float:
        if isinstance(alpha, TracedFloat) or isinstance(beta, TracedFloat):
            raise t.unsupported("Give int factors for int tensors")
        number = bool if dtype is b1 else int
        beta, alpha = number(beta), number(alpha)
    if isinstance(alpha, float) or alpha != 1:
        product = scaled(t, product, alpha)
    if not isinstance(beta, TracedFloat) and beta == 0:
        return t.fresh(t.unread(t.read(product.handle), t.read(t.lift(input))))
    if isinstance(beta, float) or beta != 1:
        input = scaled(t, input, beta)
    return add(t, product, input)


def addmm(
    t: Trace, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> TracedTensor:
    return plus(t, input, mm(t, mat1, mat2), beta, alpha)


for _names, _implementation in (
    (("mm",), mm),
    (("bmm",), bmm),
    (("matmul", "__matmul__"), matmul),
    (("mv",), mv),
    (("dot",), dot),
    (("vdot",), vdot),
):
    register(_names, _implementation, inplace=False)
register(("addmm",), addmm)


rule(torch.linalg.matmul)(matmul)


@rule(torch.Tensor.__rmatmul__)
def rmatmul(t: Trace, self: Tensor, other: Tensor) -> TracedTensor:
    return matmul(t, other, self)
