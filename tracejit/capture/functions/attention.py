"""Attention: `scaled_dot_product_attention`, and what nn.MultiheadAttention makes of it.

On the CPU eager picks one of two implementations, which differ in the layout of the result and in
what they refuse; so the conditions of the fused one stand here. Dropout of the weights is drawn as
F.dropout draws, by both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from types import FrameType

import torch

from tracejit.capture.functions.arrangement import each_as_often
from tracejit.capture.functions.common import cast, expand, literal
from tracejit.capture.functions.composites import run_body
from tracejit.capture.functions.derived import require_float, widen, widened
from tracejit.capture.functions.movement import preserved_strides
from tracejit.capture.functions.softmax import softmax_value
from tracejit.capture.functions.values import bool_
from tracejit.capture.trace import location
from tracejit.capture.trace.table import BY_CALLER, RULES, rule
from tracejit.capture.trace.tensor import TO_TORCH, Handle, Ints, TracedTensor, broadcast_shape
from tracejit.capture.trace.trace import Trace
from tracejit.errors import AxisError
from tracejit.ir.graph import Builder, Value
from tracejit.ir.ops.attention import GRADIENTS, fits, row_products
from tracejit.ir.ops.movement import transpose
from tracejit.ir.types import DType, b1, f32, i64

Tensor = torch.Tensor
functional = torch.nn.functional


@rule(functional.scaled_dot_product_attention)
def attention(
    t: Trace,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    masked: bool = True,
    may_fuse: bool = True,
) -> TracedTensor:
    """softmax(query·keyᵀ·scale + mask)·value; a row whose scores are all -inf is 0 if `masked`,
    else NaN."""
    q, k, v = (t.lift(x) for x in (query, key, value))
    mask = None if attn_mask is None else t.lift(attn_mask)
    fused = may_fuse and _is_fused(t, q, k, v, mask, dropout_p, enable_gqa)
    _check(t, q, k, v, mask)
    if mask is not None and is_causal and not fused:
        raise t.shape_error("Explicit attn_mask should not be set when is_causal=True")
    strides = preserved_strides(q) if fused else None
    if enable_gqa:
        key, value = (_repeated(t, x, q) for x in (key, value))
    x, y, z = (t.read(t.lift(a)) for a in (query, key, value))
    batch = _batch(t, x, y, z, mask)
    narrow = x.type.dtype
    x, y, z = (expand(t, a, batch + a.type.shape[-2:]) for a in (x, y, z))
    if masked and _keeps_no_scores(t, x, y, z, mask, dropout_p):
        noise = _noise(t, x, y, dropout_p) if dropout_p else ()
        out = _without_scores(t, x, y, z, mask, is_causal, scale, noise)
        result = t.fresh(out, strides)
        if fused:
            t.saves(out, *map(t.read, (q, k, v, result.handle)))
        return result
    x, y, z = (widen(t, a) for a in (x, y, z))
    if not y.type.shape[-2]:  # no keys
        shape = (*batch, x.type.shape[-2], z.type.shape[-1])
        out = t.b.full(0.0, shape=shape, dtype=narrow, device=q.device)
        for h in (q, k, v):
            out = t.unread(out, t.read(h))
        return t.fresh(out)
    weights = _weights(t, x, y, mask, is_causal, scale, masked)
    if dropout_p:
        dropped = RULES[torch.dropout].run(t, t.fresh(weights), dropout_p, True)
        weights = t.read(t.lift(dropped))
    out = cast(t, t.b.matmul(weights, z), narrow)
    result = t.fresh(out, strides)
    if fused:
        t.saves(out, *map(t.read, (q, k, v, result.handle)))
    return result


def _backends(caller: FrameType) -> dict[str, object]:
    """Whether the fused implementation has been turned off."""
    return {} if torch.backends.cuda.flash_sdp_enabled() else {"may_fuse": False}


BY_CALLER[functional.scaled_dot_product_attention] = _backends


def _weights(
    t: Trace,
    q: Value,
    k: Value,
    mask: Handle | None,
    is_causal: bool,
    scale: float | None,
    masked: bool,
) -> Value:
    """What each query takes of each key: rows of numbers that sum to 1."""
    b, rank = t.b, len(q.type.shape)
    scale = _scale(q, scale)
    scores = b.mul(b.matmul(q, transpose(b, k)), literal(scale, q.type.dtype))
    shape, dtype = scores.type.shape, scores.type.dtype
    if mask is not None:
        scores = b.add(scores, _bias(t, mask, shape, dtype))
    if is_causal:
        row, column = (
            b.iota(axis=a, shape=shape, dtype=i64, device=q.type.device)
            for a in (rank - 2, rank - 1)
        )
        scores = b.where(b.le(column, row), scores, -math.inf)
    return softmax_value(t, scores, rank - 1, masked=masked)


def _scale(q: Value, scale: float | None) -> float:
    """What the products of queries and keys are multiplied by."""
    if scale is not None:
        return scale
    width = q.type.shape[-1]
    return 1 / math.sqrt(width) if width else 1.0


def _bias(t: Trace, mask: Handle, shape: Ints, dtype: DType) -> Value:
    """What a mask adds to scores."""
    added = t.read(mask)
    if added.type.dtype is b1:
        none = t.b.full(0.0, shape=added.type.shape, dtype=dtype, device=mask.device)
        added = t.b.where(added, none, -math.inf)
    return expand(t, cast(t, added, dtype), shape)


# ---- the primitive


def _keeps_no_scores(
    t: Trace, q: Value, k: Value, v: Value, mask: Handle | None, dropout_p: float
) -> bool:
    """Whether the primitive serves: there is something to attend to, no gradient of a mask, and
    kernels of the heads' width. With dropout on a CPU it pays for many scores only, of which a pass
    finds out (`passes/attention.py`)."""
    if dropout_p and q.type.device == "cpu":
        return False
    if mask is not None and t.grad_on and t.requires_grad(mask):
        return False
    if not fits(q.type.device, q.type.dtype, max(q.type.shape[-1], v.type.shape[-1])):
        return False
    return not any(0 in x.type.shape for x in (q, k, v))


def _noise(t: Trace, q: Value, k: Value, dropout_p: float) -> tuple[Value]:
    """What dropout multiplies weights by."""
    shape, dtype = (*q.type.shape[:-1], k.type.shape[-2]), widened(q.type.dtype)
    with t.untaped():
        ones = t.fresh(t.b.full(1.0, shape=shape, dtype=dtype, device=q.type.device))
        return (t.read(t.lift(RULES[torch.dropout].run(t, ones, dropout_p, True))),)


def _without_scores(
    t: Trace,
    q: Value,
    k: Value,
    v: Value,
    mask: Handle | None,
    is_causal: bool,
    scale: float | None,
    noise: tuple[Value, ...],
) -> Value:
    """Attention as one primitive, whose gradients recompute the scores from their log-sums."""
    narrow, dtype = q.type.dtype, widened(q.type.dtype)
    shape, factor = (*q.type.shape[:-1], k.type.shape[-2]), literal(_scale(q, scale), dtype)
    if isinstance(factor, Value):  # a number that may change from call to call
        q, k, v = (widen(t, x) for x in (q, k, v))
        q, factor = t.b.mul(q, factor), 1.0
    how = {"causal": bool(is_causal), "scale": float(factor)}
    with t.untaped():
        bias = 0.0 if mask is None else _bias(t, mask, shape, dtype)
        out = t.b.attention(q, k, v, bias, *noise, **how)
        kept = t.b.attention_lse(q, k, bias, **how)

    def vjp(b: Builder, cts: tuple[Value, ...], need: tuple[bool, ...]) -> list[Value | None]:
        g = cts[0]
        lse = b.attention_lse(q, k, bias, **how) if t.grad_on else kept  # has derivatives itself
        delta = row_products(b, g, out)
        names = zip(need, GRADIENTS, strict=True)
        emitted = (getattr(b, name) if wanted else None for wanted, name in names)
        return [emit and emit(q, k, v, bias, lse, delta, g, *noise, **how) for emit in emitted]

    return cast(t, t.derive("scaled_dot_product_attention", (q, k, v), out, vjp), narrow)


# ---- what eager takes


def _is_fused(
    t: Trace,
    q: Handle,
    k: Handle,
    v: Handle,
    mask: Handle | None,
    dropout_p: float,
    grouped: bool,
) -> bool:
    """Whether eager takes its fused implementation on the CPU (aten/native/transformers)."""
    if any(len(h.shape) != 4 for h in (q, k, v)):
        return False
    if mask is not None:
        if len(mask.shape) < 2:
            raise AxisError(where=location.full(), reason="attn_mask has less than 2 dimensions")
        if len(mask.shape) not in (2, 4) or (t.grad_on and t.requires_grad(mask)):
            return False
        aligned = zip(reversed(mask.shape), (k.shape[2], q.shape[2], *q.shape[1::-1]), strict=False)
        if any(n not in (1, full) for n, full in aligned):
            return False
    heads = k.shape[1] == v.shape[1]
    heads &= bool(k.shape[1]) and q.shape[1] % k.shape[1] == 0 if grouped else heads
    same = heads and q.shape[0] == k.shape[0] == v.shape[0]
    same &= grouped or q.shape[1] == k.shape[1]
    same &= q.shape[3] == k.shape[3] == v.shape[3] > 0
    dense = all(h.strides[3] == 1 and h.numel for h in (q, k, v))
    return same and dense and q.dtype.is_float and not dropout_p


def _check(t: Trace, q: Handle, k: Handle, v: Handle, mask: Handle | None) -> None:
    """Ranks and dtypes that eager rejects."""
    if any(len(h.shape) < 2 for h in (q, k, v)):
        dims = ", ".join(str(len(h.shape)) for h in (q, k, v))
        raise t.shape_error(
            "Expected query, key, and value to all be at least 2 dimensional, but they have "
            f"{dims} dimensions"
        )
    if not q.dtype is k.dtype is v.dtype:
        raise t.shape_error(
            "Expected query, key, and value to have the same dtype, but got "
            f"{', '.join(str(TO_TORCH[h.dtype]) for h in (q, k, v))}"
        )
    require_float(t, "scaled_dot_product_attention", t.read(q), checked=True)
    if len({h.device for h in (q, k, v, mask) if h is not None}) > 1:
        raise t.shape_error("Expected query, key, value and attn_mask on one device")
    if mask is not None and mask.dtype not in (b1, f32, q.dtype):
        raise t.shape_error(
            "Expected attn_mask dtype to be bool or float or to match query dtype, but got "
            f"{TO_TORCH[mask.dtype]} and {TO_TORCH[q.dtype]}"
        )


def _repeated(t: Trace, x: Tensor, q: Handle) -> Tensor:
    """Heads of keys or values, each repeated for the queries that share it."""
    shape = t.lift(x).shape
    if len(shape) < 3 or len(q.shape) < 3:
        raise AxisError(where=location.full(), reason="enable_gqa needs an axis of heads, -3")
    heads, wanted = shape[-3], q.shape[-3]
    if not heads or wanted % heads:
        raise t.shape_error(
            "Number of heads in key and value must divide the number of heads in query, but got "
            f"{heads} and {wanted}"
        )
    return x if heads == wanted else each_as_often(t, x, wanted // heads, -3)


def _batch(t: Trace, q: Value, k: Value, v: Value, mask: Handle | None) -> Ints:
    """The batch axes that all broadcast to; what does not fit is refused as eager refuses it."""
    (queries, width), (keys, k_width) = q.type.shape[-2:], k.type.shape[-2:]
    if width != k_width or keys != v.type.shape[-2]:
        raise t.shape_error(
            f"query, key and value of shapes {list(q.type.shape)}, {list(k.type.shape)} and "
            f"{list(v.type.shape)} do not fit"
        )
    scores = broadcast_shape([x.type.shape[:-2] for x in (q, k)])
    batch = None if scores is None else broadcast_shape([scores, v.type.shape[:-2]])
    if batch is None:
        raise t.shape_error("the batch dimensions of query, key and value do not broadcast")
    if mask is not None:
        whole = (*scores, queries, keys)
        if broadcast_shape([mask.shape, whole]) != whole:
            raise t.shape_error(
                f"attn_mask of shape {list(mask.shape)} does not expand to {list(whole)}"
            )
    return batch


# ---- nn.MultiheadAttention and nn.TransformerEncoder


_INTERCEPTED = "some Tensor argument has_torch_function"


def _past_native(caller: FrameType) -> dict[str, object]:
    """Whether a module's forward would have gone another way in eager, where nobody intercepts its
    calls: in evaluation without gradients it calls one native function. nn.MultiheadAttention asks
    for itself, and nn.TransformerEncoderLayer before it."""
    seen = _locals_with("why_not_fast_path", caller)
    if not seen or seen["self"].in_proj_bias is None:
        return {}
    module = seen["self"]
    if seen["why_not_fast_path"] == _INTERCEPTED:
        params = module.in_proj_weight, module.in_proj_bias, *module.out_proj.parameters()
        return {} if _records(seen["query"], *params) else {"native": True}
    above = _locals_with("why_not_sparsity_fast_path", caller)
    if above.get("why_not_sparsity_fast_path") != _INTERCEPTED:
        return {}
    layer = above["self"]
    if getattr(layer, "self_attn", None) is not module or _records(above["src"], *_params(layer)):
        return {}
    return {"native": True}


def _locals_with(name: str, frame: FrameType | None) -> dict[str, object]:
    """The variables of the nearest caller that has one of that name: there are frames of torch's
    own between, of functions that hand themselves over and of modules that are called."""
    for _ in range(12):
        if frame is None or name in frame.f_locals:
            break
        frame = frame.f_back
    return frame.f_locals if frame is not None and name in frame.f_locals else {}


def _records(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed with these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _params(layer: torch.nn.Module) -> Iterator[Tensor]:
    """The parameters that an encoder layer asks about."""
    for part in (layer.self_attn, layer.norm1, layer.norm2, layer.linear1, layer.linear2):
        yield from part.parameters()


@rule(functional.multi_head_attention_forward)
def multi_head(
    t: Trace, *args: object, native: bool = False, **kwargs: object
) -> tuple[Tensor, Tensor | None]:
    """As it is written; where eager's module calls its native function instead, a row that sees no
    key is NaN, and the result is row-major with the batch in front."""
    instead = {}
    if native:
        instead["scaled_dot_product_attention"] = partial(attention, t, masked=False)
    out, weights = run_body(t, functional.multi_head_attention_forward, args, kwargs, instead)
    if native:
        h = t.lift(out)
        length, rows, width = h.shape
        out = t.fresh(t.b.alias(t.read(h)), (width, length * width, 1))
    return out, weights


BY_CALLER[functional.multi_head_attention_forward] = _past_native


def _encoder_without_gradients(caller: FrameType) -> dict[str, object]:
    """Whether eager's TransformerEncoder would go on with a nested tensor."""
    seen = _locals_with("why_not_sparsity_fast_path", caller)
    if "why_not_sparsity_fast_path" not in seen or seen.get("mask") is not None:
        return {}
    if _records(seen["src"], *_params(seen["first_layer"])):
        return {}
    return {"nested": True}


@rule(torch._nested_tensor_from_mask_left_aligned)
def left_aligned(t: Trace, input: Tensor, mask: Tensor, nested: bool = False) -> bool:
    """Whether all that a mask lets through stands in front in its row."""
    with t.untaped():
        kept = t.read(t.lift(mask))
        rows, length = kept.type.shape
        first, last = (
            t.b.slice(kept, starts=(0, k), stops=(rows, length - 1 + k), steps=(1, 1))
            for k in (0, 1)
        )
        follows = t.fresh(t.b.or_(first, t.b.not_(last)))
        yes = bool_(t, RULES[torch.all].run(t, follows))
    if yes and nested:
        raise t.unsupported(
            "Without gradients nn.TransformerEncoder makes nested tensors of a padded batch, which "
            "have no rule; make it with enable_nested_tensor=False"
        )
    return yes


BY_CALLER[torch._nested_tensor_from_mask_left_aligned] = _encoder_without_gradients
