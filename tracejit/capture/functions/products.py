"""Products and running sums: outer, einsum, baddbmm and its kin, prod, cumsum, diff."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FrameType

import numpy as np
import torch

from tracejit.autodiff import zeros
from tracejit.capture.functions.arithmetic import mul, sub
from tracejit.capture.functions.assembly import cat
from tracejit.capture.functions.common import cast, in_place_along, normal_axis, register
from tracejit.capture.functions.contraction import bmm, mv, plus
from tracejit.capture.functions.derived import derived, spread, widened
from tracejit.capture.functions.movement import narrow, permute, reshape
from tracejit.capture.functions.patterns import diagonal
from tracejit.capture.functions.reduction import sum_
from tracejit.capture.trace.autocast import casted
from tracejit.capture.trace.table import BY_CALLER, rule
from tracejit.capture.trace.tensor import TO_IR, TO_TORCH, Ints, TracedTensor, broadcast_shape
from tracejit.capture.trace.trace import Trace
from tracejit.ir.graph import Builder, Value
from tracejit.ir.ops.movement import part
from tracejit.ir.types import b1, i64

Tensor = torch.Tensor
SHORT = 16  # elements along an axis


# ---- products of vectors and matrices, and sums with them


def outer(t: Trace, input: Tensor, vec2: Tensor) -> TracedTensor:
    a, b = t.lift(input), t.lift(vec2)
    if len(a.shape) != 1 or len(b.shape) != 1:
        raise t.shape_error("outer: Expected 1-D arguments")
    return mul(t, reshape(t, input, (a.numel, 1)), vec2)


def baddbmm(
    t: Trace, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> TracedTensor:
    return plus(t, input, bmm(t, batch1, batch2), beta, alpha)


def addbmm(
    t: Trace, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> TracedTensor:
    product = bmm(t, batch1, batch2)
    total = sum_(t, product, 0, dtype=TO_TORCH[product.handle.dtype])
    return plus(t, input, total, beta, alpha)


def addmv(
    t: Trace, input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1
) -> TracedTensor:
    return plus(t, input, mv(t, mat, vec), beta, alpha)


def addr(
    t: Trace, input: Tensor, vec1: Tensor, vec2: Tensor, *, beta: float = 1, alpha: float = 1
) -> TracedTensor:
    product = outer(t, vec1, vec2)
    if not product.handle.dtype.is_float and not t.lift(input).dtype.is_float:
        for name, factor in (("beta", beta), ("alpha", alpha)):
            if isinstance(factor, float):
                raise t.shape_error(
                    f"For integral input tensors, argument {name} must not be a floating point "
                    "number."
                )
    return plus(t, input, product, beta, alpha)


# ---- einsum


def _ordered(caller: FrameType) -> dict[str, object]:
    """What torch's settings say of the order of products; None is from left to right."""
    backend = torch.backends.opt_einsum
    chosen = backend.strategy if backend.enabled and backend.is_available() else None
    return {} if chosen == "auto" else {"strategy": chosen}


BY_CALLER[torch.einsum] = _ordered


def einsum(
    t: Trace, equation: object, *operands: object, strategy: str | None = "auto"
) -> TracedTensor:
    """Sums of products by labels, two operands at a time, in torch's order.

    Each operand gets one axis per label (results first, then what is summed), in the order in which
    torch lays them out; each pair is then one batched matrix product.
    """
    if not isinstance(equation, str):
        raise t.unsupported("Pass einsum an equation string")
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    terms, result = _labels(t, equation, operands)
    summed = [k for k in sorted({k for term in terms for k in term}, key=str) if k not in result]
    order = [*result, *summed]
    aligned = [_align(t, x, term, order) for x, term in zip(operands, terms, strict=True)]
    sizes = broadcast_shape([t.lift(x).shape for x in aligned])
    if sizes is None:
        raise t.shape_error("einsum(): operands do not broadcast with remapped shapes")
    kept = len(result)
    if len(aligned) == 1:
        axes = tuple(range(kept, len(order)))
        return sum_(t, aligned[0], axes) if axes else aligned[0]
    # of each axis to be summed: how many of the operands that are left have it
    counts = {k: sum(t.lift(x).shape[k] != 1 for x in aligned) for k in range(kept, len(order))}
    path = _path(t, equation, operands, strategy)
    while len(aligned) > 1:
        i, j = sorted(path.pop(0)) if path else (0, 1)
        b, a = aligned.pop(j), aligned.pop(i)
        aligned.insert(len(aligned) if path is not None else 0, _pair(t, a, b, counts))
    (out,) = aligned
    return reshape(t, out, t.lift(out).shape[:kept]) if len(order) > kept else out


def _path(
    t: Trace, equation: str, operands: tuple, strategy: str | None
) -> list[tuple[int, ...]] | None:
    """Which pairs torch multiplies one after another, if opt_einsum says so: what a product gives
    comes last then. None is from left to right."""
    if len(operands) <= 2 or strategy is None:
        return None
    shapes = [np.broadcast_to(np.float32(0), t.lift(x).shape) for x in operands]
    chosen = torch.backends.opt_einsum.get_opt_einsum().contract_path
    return list(chosen(equation, *shapes, optimize=strategy)[0])


def _labels(t: Trace, equation: str, operands: tuple) -> tuple[list[list], list]:
    """The labels of each operand and of the result; an axis of "..." is a negative number."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    words = left.split(",")
    if len(words) != len(operands):
        raise t.shape_error(
            f"einsum(): {len(words)} terms in the equation for {len(operands)} operands"
        )
    terms, widest = [], 0
    for word, x in zip(words, operands, strict=True):
        rank, named = len(t.lift(x).shape), len(word.replace("...", ""))
        hidden = rank - named if "..." in word else 0
        if hidden < 0 or named + hidden != rank:
            raise t.shape_error(f"einsum(): the subscripts {word!r} do not match {rank} axes")
        widest = max(widest, hidden)
        terms.append(_spelled(t, word, hidden))
    if arrow:
        if "..." not in right:
            widest = 0
        result = _spelled(t, right, widest)
        known = {k for term in terms for k in term}
        if len(set(result)) != len(result) or any(k not in known for k in result):
            raise t.shape_error(f"einsum(): the output subscripts {right!r} are not well formed")
        return terms, result
    every = [k for term in terms for k in term if isinstance(k, str)]
    once = sorted(k for k in set(every) if every.count(k) == 1)
    return terms, [*range(-widest, 0), *once]


def _spelled(t: Trace, word: str, hidden: int) -> list:
    before, dots, after = word.partition("...")
    if not all(c.isascii() and c.isalpha() for c in before + after):
        raise t.shape_error(f"einsum(): invalid subscripts {word!r}")
    return [*before, *(range(-hidden, 0) if dots else ()), *after]


def _align(t: Trace, x: Tensor, term: list, order: list) -> Tensor:
    """An operand with one axis per label of `order`, of extent 1 where it has none."""
    term = list(term)
    for label in list(dict.fromkeys(term)):
        while term.count(label) > 1:
            a = term.index(label)
            b = term.index(label, a + 1)
            if t.lift(x).shape[a] != t.lift(x).shape[b]:
                raise t.shape_error(f"einsum(): subscript {label} is repeated with other sizes")
            x = diagonal(t, x, 0, a, b)
            term = [k for i, k in enumerate(term) if i not in (a, b)] + [label]
    there = [k for k in order if k in term]
    x = permute(t, x, *(term.index(k) for k in there)) if there else x
    if len(there) == len(order):
        return x
    h = t.lift(x)
    sizes = iter(zip(h.shape, h.strides, strict=True))
    # eager adds these axes behind all others: their stride is 1, which orders the result's memory
    shape, strides = zip(*(next(sizes) if k in term else (1, 1) for k in order), strict=True)
    return t.view(h, (("reshape", (("shape", shape),)),), shape, strides, h.offset)


def _pair(t: Trace, a: Tensor, b: Tensor, counts: dict[int, int]) -> TracedTensor:
    """The product of two operands, summed over the axes that no other one has, which keep extent
    1."""
    over, x, y = set(), t.lift(a).shape, t.lift(b).shape
    for k, count in counts.items():
        in_a, in_b = x[k] != 1, y[k] != 1
        if in_a and in_b:
            counts[k] = count - 1 if count > 2 else 0
            over |= {k} if count == 2 else set()
        elif count == 1 and in_a:
            a, counts[k] = sum_(t, a, k, True), 0
        elif count == 1 and in_b:
            b, counts[k] = sum_(t, b, k, True), 0
    x, y = t.lift(a).shape, t.lift(b).shape
    if not over:  # laid out as an element-wise product, not as a matrix product
        return mul(t, a, b)
    free = [k for k in range(len(x)) if k not in over]
    both = [k for k in free if x[k] != 1 and y[k] != 1]
    left = [k for k in free if x[k] != 1 and y[k] == 1]
    right = [k for k in free if x[k] == 1]
    if left and right and right[-1] < left[-1]:  # the last axis of the result is the contiguous one
        a, b, x, y, left, right = b, a, y, x, right, left
    if any(x[k] != y[k] for k in (*both, *over)):
        raise t.shape_error("einsum(): operands do not broadcast with remapped shapes")
    summed = sorted(over)
    one = _grouped(t, a, (both, left, summed, right))
    two = _grouped(t, b, (both, summed, right, left))
    axes = [*both, *left, *right, *summed]
    sizes = [*(x[k] for k in (*both, *left)), *(y[k] for k in right), *(1 for _ in summed)]
    (one, two), _ = casted(t, torch.bmm, (one, two), {})
    product = reshape(t, bmm(t, one, two), tuple(sizes))
    return permute(t, product, *(axes.index(k) for k in range(len(axes))))


def _grouped(t: Trace, x: Tensor, groups: tuple[list[int], ...]) -> TracedTensor:
    """An operand of a batched matrix product: three groups of axes, as one axis each."""
    shape = t.lift(x).shape
    moved = permute(t, x, *(k for group in groups for k in group))
    return reshape(t, moved, tuple(math.prod(shape[k] for k in g) for g in groups[:3]))


# ---- along an axis


def _spread(t: Trace, x: Value, axis: int) -> tuple[Value, Ints]:
    """x with an axis of its own extent before `axis`, along which it does not vary."""
    shape = x.type.shape
    wide = (*shape[:axis], shape[axis], *shape[axis:])
    return spread(t, x, wide, (axis,)), wide


def cumsum(t: Trace, input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> TracedTensor:
    """Each element is a sum over those up to it: along a short axis each is added up by itself,
    which fuses with what is computed before and after."""
    h = t.lift(input)
    into = TO_IR[dtype] if dtype is not None else h.dtype if h.dtype.is_float else i64
    axis = normal_axis(t, dim, len(h.shape))
    x = cast(t, t.read(h), into)
    if not h.shape:
        return t.fresh(t.b.alias(x))
    zero = 0.0 if into.is_float else 0

    def running(x: Value, related: Callable) -> Value:
        if h.shape[axis] > SHORT:
            back, wide = related is t.b.ge, cast(t, x, widened(into))
            wide = t.b.flip(wide, axes=(axis,)) if back else wide
            total = t.b.cumsum(wide, axis=axis)
            return cast(t, t.b.flip(total, axes=(axis,)) if back else total, into)
        terms, wide = _spread(t, x, axis)
        to = t.b.iota(axis=axis, shape=wide, dtype=i64, device=h.device)
        of = t.b.iota(axis=axis + 1, shape=wide, dtype=i64, device=h.device)
        return t.b.reduce_sum(t.b.where(related(of, to), terms, zero), axes=(axis + 1,))

    total = derived(
        t,
        "cumsum",
        (x,),
        lambda x: running(x, t.b.le),
        (lambda g, y, x: running(g, t.b.ge),),
    )
    return t.fresh(total)


def prod(
    t: Trace,
    input: Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> TracedTensor:
    """A product by halves: log2(n) element-wise products, whose gradients know about zeros."""
    h = t.lift(input)
    into = TO_IR[dtype] if dtype is not None else h.dtype if h.dtype.is_float else i64
    x = cast(t, t.read(h), into)
    if dim is None:
        axis, kept = 0, ()
        factors = t.b.reshape(x, shape=(h.numel,))
    else:
        axis, factors = normal_axis(t, dim, len(h.shape)), x
        kept = h.shape[:axis] + (1,) * keepdim + h.shape[axis + 1 :] if h.shape else ()
    if not h.shape:
        value = t.b.alias(x)
    elif factors.type.shape[axis] > 1:
        value = t.b.reshape(halved(t, factors, axis), shape=kept)
    else:
        value = _of_one(t, factors, axis, kept)
    return t.fresh(t.saves(value, x, value))


def _of_one(t: Trace, x: Value, axis: int, kept: Ints) -> Value:
    """The product of one factor or none, whose constant derivative depends on it for torch."""
    with t.untaped():
        value = t.b.alias(t.b.reshape(halved(t, x, axis), shape=kept))

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        slope = b.reshape(cts[0], shape=x.type.shape) if x.type.shape[axis] else zeros(b, x)
        return (t.unread(slope, x),)

    return t.derive("prod", (x,), value, vjp)


def halved(t: Trace, x: Value, axis: int) -> Value:
    """The product along an axis, of extent 1 in the end."""
    zeros = (0,) * len(x.type.shape)
    one = 1.0 if x.type.dtype.is_float else 1

    def at(k: int) -> Ints:
        return tuple(k if i == axis else 0 for i in range(len(zeros)))

    while (n := x.type.shape[axis]) != 1:
        if n % 2 or n == 0:
            x = t.b.pad(x, low=zeros, high=at(1), interior=zeros, value=one)
            continue
        x = t.b.mul(part(t.b, x, axis, 0, n // 2), part(t.b, x, axis, n // 2, n // 2))
    return x


def diff(
    t: Trace,
    input: Tensor,
    n: int = 1,
    dim: int = -1,
    prepend: Tensor | None = None,
    append: Tensor | None = None,
) -> TracedTensor:
    h = t.lift(input)
    if not h.shape:
        raise t.shape_error("diff expects input to be at least one-dimensional")
    axis = normal_axis(t, dim, len(h.shape))
    if n < 0:
        raise t.shape_error(f"order must be non-negative but got {n}")
    parts = [x for x in (prepend, input, append) if x is not None]
    x = cat(t, parts, axis) if len(parts) > 1 else input
    for _ in range(n):
        size = t.lift(x).shape[axis]
        if not size:
            break
        later, earlier = narrow(t, x, axis, 1, size - 1), narrow(t, x, axis, 0, size - 1)
        if h.dtype is b1:
            x = t.fresh(t.b.xor(t.read(t.lift(later)), t.read(t.lift(earlier))))
        else:
            x = sub(t, later, earlier)
    if x is input and not n:
        return t.fresh(t.b.alias(t.read(h)))
    return x  # without elements along the axis: the very tensor that was given


for _names, _implementation in (
    (("outer", "ger"), outer),
    (("einsum",), einsum),
    (("cumsum",), cumsum),
    (("prod",), prod),
    (("diff",), diff),
):
    register(_names, _implementation, inplace=False)
for _implementation in (baddbmm, addbmm, addmv, addr):
    register((_implementation.__name__,), _implementation)


rule(Tensor.cumsum_)(in_place_along(cumsum))
