"""Products of tensors beyond matmul: tensordot, kron, inner, cross, multi_dot, bilinear, …"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import FrameType

import torch

from tracejit.capture.functions.common import normal_axis
from tracejit.capture.functions.composites import composed
from tracejit.capture.trace.table import BY_CALLER
from tracejit.capture.trace.tensor import Ints, broadcast_shape
from tracejit.capture.trace.trace import Trace
from tracejit.ir.types import b1

Tensor = torch.Tensor
_C = torch._C._VariableFunctions


# --- sums over pairs of axes -------------------------------------------------------------------


@composed(_C.tensordot)
def tensordot(
    t: Trace, self: Tensor, other: Tensor, dims_self: Sequence[int], dims_other: Sequence[int]
) -> Tensor:
    """One matrix product: the axes that are summed come last in one, and first in the other."""
    a, b = t.lift(self).shape, t.lift(other).shape
    if len(dims_self) != len(dims_other):
        raise t.shape_error("both dimension lists should have same length")
    if t.lift(self).dtype is not t.lift(other).dtype:
        raise t.shape_error("both inputs should have same dtype")
    over_a = [normal_axis(t, k, len(a)) for k in dims_self]
    over_b = [normal_axis(t, k, len(b)) for k in dims_other]
    if len(set(over_a)) < len(over_a) or len(set(over_b)) < len(over_b):
        raise t.shape_error("dim appears multiple times in the list of dims")
    for i, k in zip(over_a, over_b, strict=True):
        if a[i] != b[k] and 1 not in (a[i], b[k]):
            raise t.shape_error(
                f"contracted dimensions need to match, but first has size {a[i]} in dim {i} and "
                f"second has size {b[k]} in dim {k}"
            )
        if a[i] == 1 != b[k]:
            other = other.sum(k, keepdim=True)
        elif b[k] == 1 != a[i]:
            self = self.sum(i, keepdim=True)
    free_a = [k for k in range(len(a)) if k not in over_a]
    free_b = [k for k in range(len(b)) if k not in over_b]
    shape = tuple(a[k] for k in free_a) + tuple(b[k] for k in free_b)
    summed = math.prod(min(a[i], b[k]) for i, k in zip(over_a, over_b, strict=True))
    one = self.permute((*free_a, *over_a)).reshape(math.prod(a[k] for k in free_a), summed)
    two = other.permute((*over_b, *free_b)).reshape(summed, math.prod(b[k] for k in free_b))
    return one.mm(two).reshape(shape)


@composed(torch.inner, Tensor.inner)
def inner(t: Trace, input: Tensor, other: Tensor) -> Tensor:
    a, b = t.lift(input).shape, t.lift(other).shape
    if not a or not b:
        return input * other
    if a[-1] != b[-1]:
        raise t.shape_error(
            "inner() the last dimension must match on both input tensors but got shapes "
            f"{list(a)} and {list(b)}"
        )
    if len(a) == len(b) == 1:
        return input.dot(other)
    return torch.tensordot(input, other, dims=([-1], [-1]))


@composed(torch.bilinear)
def bilinear(
    t: Trace, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x1·W[o]·x2 + bias[o] for each o."""
    (*lead, n), (*others, m), w = (t.lift(x).shape for x in (input1, input2, weight))
    if len(lead) != len(others) or lead != others:
        raise t.shape_error(f"bilinear(): input dimensions do not match: got {lead} and {others}")
    if len(w) != 3 or (n, m) != w[1:]:
        raise t.shape_error(f"bilinear(): the weight {list(w)} does not fit inputs of {n} and {m}")
    if bias is not None and t.lift(bias).shape != w[:1]:
        raise t.shape_error("bilinear(): bias size does not match weight size")
    one, two = input1.reshape(math.prod(lead), n), input2.reshape(math.prod(lead), 1, m)
    rows = one.mm(weight.permute(1, 0, 2).reshape(n, w[0] * m)).reshape(-1, w[0], m)
    out = (rows * two).sum(-1, dtype=input1.dtype).reshape(*lead, w[0])
    return out if bias is None else out + bias


# --- products without a sum --------------------------------------------------------------------


@composed(torch.kron, Tensor.kron)
def kron(t: Trace, input: Tensor, other: Tensor) -> Tensor:
    """Each element of one times the whole other; a view of a product, which torch lays out as its
    factors: that of transposed ones has none."""
    a, b = t.lift(input).shape, t.lift(other).shape
    rank = max(len(a), len(b))
    a, b = ((1,) * (rank - len(s)) + s for s in (a, b))
    apart = [tuple(x for n in s for x in pair(n)) for s, pair in ((a, _before), (b, _behind))]
    whole = tuple(n * m for n, m in zip(a, b, strict=True))
    return (input.reshape(apart[0]) * other.reshape(apart[1])).view(whole)


def _before(n: int) -> Ints:
    return n, 1


def _behind(n: int) -> Ints:
    return 1, n


def _cross(t: Trace, x: Tensor, y: Tensor, axis: int, shape: Ints) -> Tensor:
    """Each component from the next two, in turn."""
    if shape[axis] != 3:
        raise t.shape_error(
            f"linalg.cross: inputs dimension {axis} must have length 3. Got {shape[axis]}"
        )
    if x.dtype is torch.bool:
        raise t.not_implemented("cross", b1)
    x, y = x.expand(shape), y.expand(shape)
    return x.roll(-1, axis) * y.roll(-2, axis) - x.roll(-2, axis) * y.roll(-1, axis)


@composed(torch.linalg.cross, kernel=True)
def linalg_cross(t: Trace, input: Tensor, other: Tensor, *, dim: int = -1) -> Tensor:
    a, b = t.lift(input).shape, t.lift(other).shape
    if len(a) != len(b):
        raise t.shape_error("linalg.cross: inputs must have the same number of dimensions.")
    shape = broadcast_shape([a, b])
    if shape is None:
        raise t.shape_error(f"linalg.cross: the shapes {list(a)} and {list(b)} do not broadcast")
    return _cross(t, input, other, normal_axis(t, dim, len(shape)), shape)


@composed(torch.cross, Tensor.cross)
def cross(t: Trace, input: Tensor, other: Tensor, dim: int | None = None) -> Tensor:
    """As linalg.cross, along the first axis of extent 3 if none is given."""
    if dim is None:
        shape = t.lift(input).shape
        if 3 not in shape:
            raise t.shape_error("no dimension of size 3 in input")
        dim = shape.index(3)
    return linalg_cross(t, input, other, dim=dim)


@composed(torch.linalg.vecdot)
def vecdot(t: Trace, x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
    for h in (t.lift(x), t.lift(y)):
        if not h.dtype.is_float:
            raise t.shape_error("linalg.vecdot: Expected a floating point or complex tensor")
    return (x * y).sum(dim)


# --- chains of matrices ------------------------------------------------------------------------


def _cheapest(sizes: Ints) -> dict[tuple[int, int], int]:
    """Where to split each part of a chain of matrices, sizes[k] × sizes[k + 1], for the fewest
    multiplications."""
    n = len(sizes) - 1
    cost = {(i, i): 0 for i in range(n)}
    split = {}
    for length in range(1, n):
        for i in range(n - length):
            j = i + length
            costs = [
                cost[i, k] + cost[k + 1, j] + sizes[i] * sizes[k + 1] * sizes[j + 1]
                for k in range(i, j)
            ]
            cost[i, j] = min(costs)
            split[i, j] = i + costs.index(cost[i, j])
    return split


def _chained(t: Trace, matrices: Sequence[Tensor]) -> Tensor:
    shapes = [t.lift(x).shape for x in matrices]
    for (_, n), (m, _) in zip(shapes, shapes[1:], strict=False):
        if n != m:
            raise t.shape_error(f"the shapes {[list(s) for s in shapes]} cannot be multiplied")
    split = _cheapest((shapes[0][0], *(s[1] for s in shapes)))

    def product(i: int, j: int) -> Tensor:
        if i == j:
            return matrices[i]
        k = split[i, j]
        return product(i, k).mm(product(k + 1, j))

    return product(0, len(matrices) - 1)


@composed(torch.linalg.multi_dot)
def multi_dot(t: Trace, tensors: Sequence[Tensor]) -> Tensor:
    """The product of a chain of matrices; the first and the last may be vectors."""
    if len(tensors) < 2:
        raise t.shape_error("multi_dot(): expected at least 2 tensors")
    ranks = [len(t.lift(x).shape) for x in tensors]
    ends = ranks[0], ranks[-1]
    if not set(ends) <= {1, 2} or any(k != 2 for k in ranks[1:-1]):
        raise t.shape_error(f"multi_dot(): expected matrices between 1D or 2D ends, got {ranks}")
    matrices = list(tensors)
    if ends[0] == 1:
        matrices[0] = matrices[0].unsqueeze(0)
    if ends[1] == 1:
        matrices[-1] = matrices[-1].unsqueeze(1)
    out = _chained(t, matrices)
    shape = tuple(n for n, rank in zip(t.lift(out).shape, ends, strict=True) if rank == 2)
    return out if ends == (2, 2) else out.reshape(shape)


@composed(_C.chain_matmul)
def chain_matmul(t: Trace, matrices: Sequence[Tensor]) -> Tensor:
    if not matrices or any(len(t.lift(x).shape) != 2 for x in matrices):
        raise t.shape_error("chain_matmul(): Expected one or more matrices")
    return matrices[0].clone() if len(matrices) == 1 else _chained(t, matrices)


def _unpassed_out(frame: FrameType | None) -> dict[str, object]:
    """`out`, which torch's own wrapper does not hand on.

    Without this, test_out[torch.functional.chain_matmul] fails.
    """
    while frame is not None and frame.f_code is not torch.functional.chain_matmul.__code__:
        frame = frame.f_back
    out = None if frame is None else frame.f_locals.get("out")
    return {} if out is None else {"out": out}


BY_CALLER[torch.functional.chain_matmul] = _unpassed_out


@composed(torch.matrix_power, Tensor.matrix_power, torch.linalg.matrix_power)
def matrix_power(t: Trace, input: Tensor, n: int) -> Tensor:
    """By squaring, as eager."""
    shape = t.lift(input).shape
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise t.shape_error(f"linalg.matrix_power: {list(shape)} is not a batch of square matrices")
    if t.lift(input).dtype is b1:
        raise t.not_implemented("matrix_power", b1)
    if n == 0:
        eye = torch.eye(shape[-1], dtype=input.dtype, device=input.device)
        h = t.lift(eye.expand(shape).clone(memory_format=torch.contiguous_format))
        return t.fresh(t.unread(t.read(h), t.read(t.lift(input)))) if h.dtype.is_float else h.tensor
    if n == 1:
        return input.clone()
    if n == 3:
        return input.matmul(input).matmul(input)
    if n < 0:
        input, n = torch.linalg.inv(input), -n
    power, out = input, None
    while n:
        if n % 2:
            out = power if out is None else out.matmul(power)
        n //= 2
        power = power.matmul(power) if n else power
    return out
