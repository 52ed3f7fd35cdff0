"""Samples of attention; importing this adds them to the table."""

from __future__ import annotations

import torch

from support.function_samples import (
    S,
    Sample,
    b1,
    bf16,
    f16,
    f64,
    i64,
    inf,
    nan,
    r,
    restart,
    row,
    v,
)

restart()

B, H, L, K, D = 2, 3, 4, 5, 6  # rows, heads, queries, keys, width


def qkv(*batch: int, queries: int = L, keys: int = K, width: int = D, **kind) -> tuple:
    """A query, a key and a value."""
    shapes = (queries, width), (keys, width), (keys, width)
    return tuple(r(*batch, *shape, **kind) for shape in shapes)


def turned(*batch: int, **kind) -> tuple:
    """As they come from a projection: the heads stand behind the positions in memory."""
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(*batch, **kind))


MASK = v(1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1).reshape(L, K) > 0.5
FLOATS = torch.where(MASK, r(L, K), -inf)  # the third query sees nothing
ODD = FLOATS.clone()
ODD[0, 0], ODD[1, 1] = nan, inf
whole, fused = qkv(B, H), qkv(B, H)

row(
    "scaled_dot_product_attention",
    [
        S(*whole),
        S(*qkv(H), smooth=True),
        S(*qkv(), smooth=True),
        S(*qkv(2, B, H)),
        *(S(*qkv(B, H, dtype=d)) for d in (f64, bf16, f16)),
        *(S(*qkv(H, dtype=d)) for d in (f64, bf16, f16)),
        S(*turned(B, H)),
        S(*turned(B, H), is_causal=True),
        S(*turned(B, H, dtype=bf16), attn_mask=MASK),
        S(*qkv(B, H, queries=7, keys=4), is_causal=True),
        S(*qkv(B, H, queries=3, keys=8), is_causal=True, scale=0.7),
        S(*qkv(H, queries=5, keys=5), is_causal=True, smooth=True),
        S(*whole, scale=0.3),
        S(*whole, scale=-0.3),
        S(*whole, scale=0.0),
        S(*whole, scale=2),
        # masks
        S(*fused, MASK),
        S(*fused, attn_mask=FLOATS),
        S(*fused, attn_mask=ODD),
        S(*fused, attn_mask=r(L, K)),
        S(*fused, attn_mask=r(B, 1, L, K, dtype=b1)),
        S(*fused, attn_mask=r(B, 1, 1, K, dtype=b1)),
        S(*fused, attn_mask=r(1, H, L, 1)),
        S(*fused, attn_mask=r(L, 1, dtype=b1)),
        S(*fused, attn_mask=r(B, H, L, K)),
        S(*fused, attn_mask=r(K, L).t()),
        S(*fused, attn_mask=r(H, L, K, dtype=b1)),
        S(*fused, attn_mask=r(K, dtype=b1)),
        S(*fused, attn_mask=torch.zeros(L, K, dtype=b1)),
        S(*fused, attn_mask=r(L, K), is_causal=True),
        S(*fused, attn_mask=r(L, K, dtype=f64)),
        S(*fused, attn_mask=r(L, K, dtype=i64)),
        S(*fused, attn_mask=r(L, 3)),
        S(*fused, attn_mask=r(2, B, H, L, K)),
        S(*qkv(), attn_mask=MASK, smooth=True),
        S(*qkv(H), attn_mask=r(1, L, K), smooth=True),
        S(*qkv(H), attn_mask=r(B, H, L, K)),
        S(*qkv(H), attn_mask=r(L, K), is_causal=True),
        S(*qkv(B, H, dtype=bf16), attn_mask=r(L, K)),
        S(*qkv(B, H, dtype=f16), attn_mask=r(L, K, dtype=f16)),
        S(*qkv(B, H, dtype=f64), attn_mask=r(L, K)),
        S(*qkv(H, dtype=bf16), attn_mask=r(L, K, dtype=bf16)),
        # dropout of the weights
        S(*whole, dropout_p=0.3),
        S(*whole, MASK, 0.5),
        S(*qkv(), dropout_p=0.5, smooth=True),
        S(*turned(B, H, queries=9, keys=17), dropout_p=0.2, is_causal=True),
        *(S(*qkv(B, H, dtype=d), dropout_p=0.5) for d in (f64, bf16, f16)),
        *(S(*whole, dropout_p=p) for p in (1.0, 1.1)),
        # shapes
        S(whole[0], whole[1][:1], whole[2][:1]),
        S(whole[0][:1], *whole[1:]),
        S(whole[0], whole[1][0], whole[2][0]),
        S(whole[0], whole[1], r(B, H, K, 2)),
        S(whole[0], whole[1], r(2, B, H, K, D)),
        S(r(B, 6, L, D), *whole[1:], enable_gqa=True),
        S(r(B, 6, L, D), *whole[1:], attn_mask=MASK, enable_gqa=True),
        S(r(B, 6, L, D), *whole[1:], dropout_p=0.5, enable_gqa=True),
        S(r(B, 6, L, D), whole[1], r(B, 2, K, D), enable_gqa=True),
        S(r(6, L, D), whole[1][0], whole[2][0], enable_gqa=True, smooth=True),
        S(r(B, 5, L, D), *whole[1:], enable_gqa=True),
        S(r(B, 6, L, D), *whole[1:]),
        S(r(B, 6, L, D), r(B, 1, K, D), r(B, 1, K, D)),
        S(*qkv(), enable_gqa=True),
        S(*(x.transpose(2, 3).contiguous().transpose(2, 3) for x in whole)),
        S(*(x[:, ::2] for x in qkv(B, 5))),
        S(*(x[..., 1:5] for x in whole)),
        S(*qkv(B, H, queries=0)),
        S(*qkv(B, H, keys=0)),
        S(*qkv(B, H, width=0)),
        S(*qkv(0, H)),
        S(*qkv(1, 1, queries=1, keys=1, width=1)),
        S(*qkv(1, 2, queries=33, keys=40, width=5), is_causal=True),
        S(r(D), r(K, D), r(K, D)),
        S(whole[0], whole[1].double(), whole[2]),
        S(*qkv(B, H, dtype=i64)),
        S(whole[0], whole[1][..., :4], whole[2]),
        S(torch.where(whole[0] > 1.9, inf, whole[0]), -whole[1].abs(), whole[2]),
    ],
    exact=False,
)

row(
    "_nested_tensor_from_mask_left_aligned",
    [
        S(r(3, 4, 6), v(1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1).reshape(3, 4) > 0),
        S(r(2, 4, 6), v(1, 0, 1, 0, 1, 0, 0, 0).reshape(2, 4) > 0),
    ],
)


def heads(
    *,
    queries: int = L,
    keys: int = K,
    rows: int | None = B,
    count: int = 2,
    bias: bool = True,
    **kind,
) -> tuple:
    """The arguments of multi_head_attention_forward until `training`."""
    batch, width = () if rows is None else (rows,), D
    small = {"low": -0.5, "high": 0.5} | kind
    return (
        r(queries, *batch, width, **kind),
        *((r(keys, *batch, width, **kind),) * 2),
        width,
        count,
        r(3 * width, width, **small),
        r(3 * width, **small) if bias else None,
        None,
        None,
        False,
        0.0,
        r(width, width, **small),
        r(width, **small) if bias else None,
    )


def changed(args: tuple, **at: object) -> tuple:
    """Arguments with others in some places."""
    places = {"bias_k": 7, "bias_v": 8, "zero": 9, "p": 10, "weight": 5}
    found = list(args)
    for name, x in at.items():
        found[places[name]] = x
    return tuple(found)


def apart() -> dict[str, object]:
    """Weights of query, key and value apart, for keys of width 3 and values of width 2."""
    widths = {"q": D, "k": 3, "v": 2}
    weights = {f"{x}_proj_weight": r(D, n, low=-0.5, high=0.5) for x, n in widths.items()}
    return weights | {"use_separate_proj_weight": True}


PADDING = v(0, 0, 0, 1, 1, 0, 0, 0, 0, 1).reshape(B, K) > 0.5
plain = heads()
FORWARD: list[Sample] = [
    S(*plain, smooth=True),
    S(*plain, need_weights=False),
    S(*plain, average_attn_weights=False, smooth=True),
    S(*heads(dtype=f64)),
    S(*heads(dtype=bf16), need_weights=False),
    S(*heads(rows=None), smooth=True),
    S(*heads(bias=False)),
    S(*heads(count=3)),
    S(*plain, key_padding_mask=PADDING, smooth=True),
    S(*plain, key_padding_mask=PADDING, need_weights=False),
    S(*plain, key_padding_mask=r(B, K)),
    S(*plain, attn_mask=~MASK),
    S(*plain, attn_mask=~MASK, need_weights=False),
    S(*plain, attn_mask=r(L, K), need_weights=False),
    S(*plain, attn_mask=r(2 * B, L, K), smooth=True),
    S(*plain, attn_mask=~MASK, key_padding_mask=PADDING, need_weights=False),
    S(*heads(queries=4, keys=4), attn_mask=r(4, 4), is_causal=True, need_weights=False),
    S(*heads(queries=4, keys=4), attn_mask=r(4, 4), is_causal=True),
    S(*heads(rows=None), attn_mask=r(L, K), key_padding_mask=PADDING[0]),
    S(*changed(plain, bias_k=r(1, 1, D), bias_v=r(1, 1, D)), smooth=True),
    S(*changed(plain, bias_k=r(1, 1, D), bias_v=r(1, 1, D)), key_padding_mask=PADDING),
    S(*changed(plain, zero=True), attn_mask=~MASK),
    S(*changed(plain, zero=True, bias_k=r(1, 1, D), bias_v=r(1, 1, D)), need_weights=False),
    S(*changed(plain, p=0.5)),
    S(*changed(plain, p=0.5), need_weights=False),
    S(*changed(plain, p=0.5), training=False),
    S(r(L, B, D), r(K, B, 3), r(K, B, 2), *changed(plain, weight=None)[3:], **apart()),
    S(*plain, static_k=r(2 * B, 7, 3), static_v=r(2 * B, 7, 3)),
    S(*plain, attn_mask=r(L, 3)),
    S(*plain, is_causal=True),
]
row("multi_head_attention_forward", FORWARD, exact=False)
