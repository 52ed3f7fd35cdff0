"""Attention that keeps no scores: its result, the log-sum of each row of scores, and its gradients.

All have q (…, m, c), k (…, n, c), v (…, n, d) and a `bias` of scores, (…, m, n) or the literal 0.
The scores are scale·q·kᵀ + bias, and -inf behind the diagonal if `causal`: key n is seen by query m
if n <= m. Half types are computed in float32, also their bias and what is kept of a row, and
rounded once at the end. A row that sees no key has the log-sum 0 and the result 0.

The gradients of a cotangent g (…, m, d) recompute the weights p = exp(scores - lse), given
delta = sum(g·result) of each row (Dao et al. 2022, https://arxiv.org/abs/2205.14135):

    ds = p·(g·vᵀ - delta)    dq = scale·ds·k    dk = scale·dsᵀ·q    dv = pᵀ·g

A last operand, which may be left out, is the `noise` of dropout, (…, m, n): weights are multiplied
by it before they weigh values. Log-sums know nothing of it, and delta is what it is without:

    result = (p·noise)·v    ds = p·(noise·(g·vᵀ) - delta)    dv = (p·noise)ᵀ·g

They are primitives of one result each, with the same operands: the schedule computes in one kernel
what it finds of them. Their own derivatives are those of the written-out formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tracejit.ir.ops.movement import transpose
from tracejit.ir.ops.record import NO_GRAD, ULPS, Op, require, require_tensor
from tracejit.ir.types import DType, Type, f32, i64

FORWARD = ("attention", "attention_lse")
GRADIENTS = ("attention_dq", "attention_dk", "attention_dv")


def wide(dtype: DType) -> DType:
    """What half types are computed in; other dtypes as they are."""
    return f32 if dtype.narrow else dtype


def fits(device: str, dtype: DType, width: int) -> bool:
    """Whether there are kernels for heads of a width. On a GPU blocks must fit the registers, which
    those of float64 and wide float32 do not, as no tensor cores multiply all their bits."""
    return device == "cpu" or width <= (256 if dtype.narrow else 64 if dtype is f32 else 0)


def _infer_lse(q: Type, k: Type, bias: object, *, causal: bool, scale: float) -> Type:
    for x in (q, k):
        require_tensor("attention", x)
    *batch, m, c = q.shape if len(q.shape) >= 2 else (0, 0)
    fits = len(k.shape) == len(q.shape) >= 2 and k.shape == (*batch, k.shape[-2], c)
    require(fits and q.dtype.is_float, f"attention of {q} and {k}")
    require((q.dtype, q.device) == (k.dtype, k.device), f"attention of {q} and {k}")
    require(0 not in (*q.shape, *k.shape), f"attention of nothing: {q} and {k}")
    scores = Type(wide(q.dtype), (*batch, m, k.shape[-2]), q.device)
    known = bias == scores if isinstance(bias, Type) else bias == 0
    require(known, f"attention with the bias {bias}, which is neither 0 nor {scores}")
    require(isinstance(causal, bool) and isinstance(scale, float), f"{causal=}, {scale=}")
    return Type(scores.dtype, (*batch, m), q.device)


def _infer(
    q: Type,
    k: Type,
    v: Type,
    bias: object,
    noise: Type | None = None,
    *,
    causal: bool,
    scale: float,
) -> Type:
    rows = _infer_lse(q, k, bias, causal=causal, scale=scale)
    require_tensor("attention", v)
    fits = v.shape[:-1] == k.shape[:-1] and len(v.shape) == len(k.shape) and v.shape[-1] > 0
    require(fits and (v.dtype, v.device) == (k.dtype, k.device), f"attention of {k} and {v}")
    scores = Type(rows.dtype, (*rows.shape, k.shape[-2]), q.device)
    require(noise is None or noise == scores, f"attention with {noise} as noise, not {scores}")
    return Type(q.dtype, (*rows.shape, v.shape[-1]), q.device)


def _infer_gradient(position: int) -> Callable[..., Type]:
    def infer(q, k, v, bias, lse, delta, g, noise=None, *, causal: bool, scale: float) -> Type:
        out = _infer(q, k, v, bias, noise, causal=causal, scale=scale)
        rows = Type(wide(q.dtype), out.shape[:-1], q.device)
        require(lse == delta == rows, f"a gradient of attention with {lse} and {delta}")
        require(g == out, f"a gradient of attention from {g}")
        return (q, k, v)[position]

    return infer


# ---- by numpy


def scores_of(q, k, bias, causal: bool, scale: float) -> np.ndarray:
    """The scores, by numpy."""
    scores = np.matmul(q, k.swapaxes(-1, -2)) * np.asarray(scale, q.dtype) + bias
    if causal:
        seen = np.tri(*scores.shape[-2:], dtype=np.bool_)
        scores = np.where(seen, scores, np.asarray(-np.inf, scores.dtype))
    return scores.astype(q.dtype, copy=False)


def _eval_lse(q, k, bias, *, causal: bool, scale: float) -> np.ndarray:
    scores = scores_of(q, k, bias, causal, scale)
    top = np.max(scores, axis=-1)
    top = np.where(top == -np.inf, 0, top).astype(scores.dtype)
    total = np.sum(np.exp(scores - top[..., None]), axis=-1)
    return top + np.log(np.where(total == 0, 1, total).astype(scores.dtype))


def _eval(q, k, v, bias, noise=None, *, causal: bool, scale: float) -> np.ndarray:
    lse = _eval_lse(q, k, bias, causal=causal, scale=scale)
    p = np.exp(scores_of(q, k, bias, causal, scale) - lse[..., None])
    return np.matmul(p if noise is None else p * noise, v)


def _eval_gradient(name: str) -> Callable[..., np.ndarray]:
    def gradient(
        q, k, v, bias, lse, delta, g, noise=None, *, causal: bool, scale: float
    ) -> np.ndarray:
        p = np.exp(scores_of(q, k, bias, causal, scale) - lse[..., None])
        if name == "attention_dv":
            return np.matmul((p if noise is None else p * noise).swapaxes(-1, -2), g)
        mixed = np.matmul(g, v.swapaxes(-1, -2))
        slopes = p * ((mixed if noise is None else mixed * noise) - delta[..., None])
        slopes = slopes * np.asarray(scale, p.dtype)
        if name == "attention_dq":
            return np.matmul(slopes, k)
        return np.matmul(slopes.swapaxes(-1, -2), q)

    return gradient


# ---- written out, for derivatives


def _wide(b, x):
    dtype = wide(x.type.dtype)
    return x if dtype is x.type.dtype else b.cast(x, dtype=dtype)


def _per_row(b, x, like):
    """A number of each row, for each of its elements."""
    return b.expand(b.reshape(x, shape=(*x.type.shape, 1)), shape=like.type.shape)


def written_scores(b, q, k, bias, *, causal: bool, scale: float):
    """The scores, in primitives."""
    scores = b.mul(b.matmul(_wide(b, q), transpose(b, _wide(b, k))), scale)
    if not isinstance(bias, int | float):
        scores = b.add(scores, bias)
    if causal:
        kind, rank = scores.type, len(scores.type.shape)
        row, column = (
            b.iota(axis=a, shape=kind.shape, dtype=i64, device=kind.device)
            for a in (rank - 2, rank - 1)
        )
        scores = b.where(b.le(column, row), scores, -math.inf)
    return scores


def written_lse(b, q, k, bias, **attrs):
    """The log-sums of the scores' rows, in primitives."""
    scores = written_scores(b, q, k, bias, **attrs)
    axes = (len(scores.type.shape) - 1,)
    top = b.reduce_max(scores, axes=axes)
    top = b.where(b.eq(top, -math.inf), 0.0, top)
    total = b.reduce_sum(b.exp(b.sub(scores, _per_row(b, top, scores))), axes=axes)
    return b.add(top, b.log(b.where(b.eq(total, 0.0), 1.0, total)))


def _weights(b, q, k, bias, lse, **attrs):
    scores = written_scores(b, q, k, bias, **attrs)
    return b.exp(b.sub(scores, _per_row(b, lse, scores)))


def _noisy(b, x, noise):
    return x if noise is None else b.mul(x, noise)


def _mixed(b, v, g):
    """The cotangent of weights that weigh values."""
    return b.matmul(_wide(b, g), transpose(b, _wide(b, v)))


def _slopes(b, q, k, v, bias, lse, delta, g, noise=None, **attrs):
    """The cotangent of the scores."""
    p = _weights(b, q, k, bias, lse, **attrs)
    mixed = _noisy(b, _mixed(b, v, g), noise)
    return b.mul(p, b.sub(mixed, _per_row(b, delta, mixed)))


def _narrowed(b, x, like):
    return b.cast(x, dtype=like.type.dtype) if like.type.dtype.narrow else x


def _written_dq(b, q, k, v, bias, lse, delta, g, noise=None, **attrs):
    slopes = _slopes(b, q, k, v, bias, lse, delta, g, noise, **attrs)
    return _narrowed(b, b.mul(b.matmul(slopes, _wide(b, k)), attrs["scale"]), q)


def _written_dk(b, q, k, v, bias, lse, delta, g, noise=None, **attrs):
    slopes = _slopes(b, q, k, v, bias, lse, delta, g, noise, **attrs)
    return _narrowed(b, b.mul(b.matmul(transpose(b, slopes), _wide(b, q)), attrs["scale"]), k)


def _written_dv(b, q, k, v, bias, lse, delta, g, noise=None, **attrs):
    p = _noisy(b, _weights(b, q, k, bias, lse, **attrs), noise)
    return _narrowed(b, b.matmul(transpose(b, p), _wide(b, g)), v)


def _written(b, q, k, v, bias, noise=None, **attrs):
    p = _weights(b, q, k, bias, written_lse(b, q, k, bias, **attrs), **attrs)
    return _narrowed(b, b.matmul(_noisy(b, p, noise), _wide(b, v)), q)


WRITTEN = {  # each of these primitives in others
    **{"attention": _written, "attention_lse": written_lse, "attention_dq": _written_dq},
    **{"attention_dk": _written_dk, "attention_dv": _written_dv},
}


def _through(write: Callable, position: int) -> Callable:
    """The derivative of a written-out formula by one operand: reverse mode over its primitives."""

    def vjp(b, g, y, *args, **attrs):
        own = [b.alias(a) if hasattr(a, "type") else a for a in args]  # one value may stand twice
        first = len(b.nodes)
        out = write(b, *own, **attrs)
        nodes, found, of = b.nodes[first:], {out: g}, own[position]
        reached = {of}
        for node in nodes:
            if reached.intersection(node.inputs):
                reached.add(node.out)
        for node in reversed(nodes):
            cotangent = found.get(node.out)
            for arg, rule in zip(node.args, node.op.rules(len(node.args)), strict=True):
                known = hasattr(arg, "type") and arg in reached and rule is not NO_GRAD
                if cotangent is None or not known:
                    continue
                new = rule(b, cotangent, node.out, *node.args, **dict(node.attrs))
                found[arg] = b.add(found[arg], new) if arg in found else new
        kind = of.type
        return found.get(of) or b.full(0.0, shape=kind.shape, dtype=kind.dtype, device=kind.device)

    return vjp


# ---- the derivative of attention itself


def row_products(b, x, y):
    """sum(x·y) of each row, wide."""
    return b.reduce_sum(b.mul(_wide(b, x), _wide(b, y)), axes=(len(x.type.shape) - 1,))


def _kept(b, g, y, q, k, bias, attrs):
    return b.attention_lse(q, k, bias, **attrs), row_products(b, g, y)


def _vjp_by(name: str) -> Callable:
    def vjp(b, g, y, q, k, v, bias, *noise, **attrs):
        lse, delta = _kept(b, g, y, q, k, bias, attrs)
        return getattr(b, name)(q, k, v, bias, lse, delta, g, *noise, **attrs)

    return vjp


def _vjp_bias(b, g, y, q, k, v, bias, *noise, **attrs):
    lse, delta = _kept(b, g, y, q, k, bias, attrs)
    return _slopes(b, q, k, v, bias, lse, delta, g, *noise, **attrs)


def _vjp_noise(b, g, y, q, k, v, bias, noise, **attrs):
    p = _weights(b, q, k, bias, b.attention_lse(q, k, bias, **attrs), **attrs)
    return b.mul(p, _mixed(b, v, g))


def _primitive(name: str, infer: Callable, eval: Callable, vjp: tuple) -> Op:
    return Op(name, "attention", infer, eval, vjp, cost=1, exact=ULPS, rounds=True, host=None)


attention = _primitive(
    "attention", _infer, _eval, (*map(_vjp_by, GRADIENTS), _vjp_bias, _vjp_noise, ...)
)
attention_lse = _primitive(
    "attention_lse", _infer_lse, _eval_lse, tuple(_through(written_lse, i) for i in range(3))
)
for _position, (_name, _write) in enumerate(
    zip(GRADIENTS, map(WRITTEN.get, GRADIENTS), strict=True)
):
    _primitive(
        _name,
        _infer_gradient(_position),
        _eval_gradient(_name),
        (*(_through(_write, i) for i in range(8)), ...),
    )
