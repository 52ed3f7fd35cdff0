"""Graphs of attention: forward with the log-sums, and all gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tracejit.ir.graph import Builder, Graph, Result, Value
from tracejit.ir.ops.attention import GRADIENTS, row_products, wide
from tracejit.ir.types import DType, Type, b1, bf16, f16, f32, f64, i64

WHOLE = ("attention", "attention_lse", *GRADIENTS)


@dataclass(frozen=True)
class Case:
    """Sizes: batch and heads, queries, keys, width, width of values. `heads`: how many heads of
    queries share one of keys. `fused`: q, k and v are slices of one tensor. `noise`: "mask", of
    what was drawn, "key", computed of a key, or "float", any numbers."""

    sizes: tuple[int, ...]
    dtype: DType = f32
    bias: str = ""  # "bool" or "float"
    causal: bool = False
    results: tuple[str, ...] = WHOLE
    heads: int = 1
    fused: bool = False
    noise: str = ""

    def graph(self) -> Graph:
        b, (batch, heads, m, n, c, d) = Builder(), self.sizes
        acc, dtype = wide(self.dtype), self.dtype
        if self.fused:  # one projection of all three, heads last
            qkv = b.param(Type(dtype, (batch, m, 3 * heads * c)))
            parts = b.reshape(qkv, shape=(batch, m, 3, heads, c))
            parts = b.permute(parts, axes=(2, 0, 3, 1, 4))
            q, k, v = (
                b.reshape(
                    b.slice(
                        parts,
                        starts=(i, 0, 0, 0, 0),
                        stops=(i + 1, batch, heads, m, c),
                        steps=(1, 1, 1, 1, 1),
                    ),
                    shape=(batch, heads, m, c),
                )
                for i in range(3)
            )
        else:
            q = b.permute(b.param(Type(dtype, (batch, m, heads, c))), axes=(0, 2, 1, 3))
            few = heads // self.heads
            k, v = (b.param(Type(dtype, (batch, few, n, w))) for w in (c, d))
            if self.heads > 1:
                k, v = (
                    b.reshape(
                        b.expand(
                            b.reshape(x, shape=(batch, few, 1, n, x.type.shape[-1])),
                            shape=(batch, few, self.heads, n, x.type.shape[-1]),
                        ),
                        shape=(batch, heads, n, x.type.shape[-1]),
                    )
                    for x in (k, v)
                )
        bias = 0.0
        if self.bias:
            bias = b.param(Type(b1 if self.bias == "bool" else acc, (m, n)))
            if self.bias == "bool":
                none = b.full(0.0, shape=(m, n), dtype=acc, device="cpu")
                bias = b.where(bias, none, -math.inf)
            bias = b.expand(b.reshape(bias, shape=(1, 1, m, n)), shape=(batch, heads, m, n))
        how = {"causal": self.causal, "scale": 1 / math.sqrt(c)}
        noise = self._noise(b, Type(acc, (batch, heads, m, n)))
        found = {"attention": b.attention(q, k, v, bias, *noise, **how)}
        found["attention_lse"] = b.attention_lse(q, k, bias, **how)
        if set(self.results) & set(GRADIENTS):
            g = b.param(Type(dtype, (batch, heads, m, d)))
            delta = row_products(b, g, found["attention"])
            for name in GRADIENTS:
                emit = getattr(b, name)
                found[name] = emit(q, k, v, bias, found["attention_lse"], delta, g, *noise, **how)
        return b.graph("step", tuple(Result(found[name]) for name in self.results))

    def _noise(self, b: Builder, scores: Type) -> tuple[Value, ...]:
        """What dropout of 0.25 multiplies weights by."""
        if not self.noise:
            return ()
        if self.noise == "float":
            return (b.param(scores),)
        if self.noise == "mask":
            mask = b.param(Type(b1, scores.shape))
        else:
            flat = {"shape": (scores.numel,), "dtype": i64, "device": "cpu"}
            key = b.expand(b.param(Type(i64, (1,))), shape=(scores.numel,))
            bits = b.philox(b.iota(axis=0, **flat), key)
            mask = b.reshape(b.lt(bits, round(0.75 * 2**31)), shape=scores.shape)
        return (b.mul(b.cast(mask, dtype=scores.dtype), 1 / 0.75),)


CASES = {
    "plain": Case((2, 3, 5, 7, 4, 6)),
    "one of each": Case((1, 1, 1, 1, 1, 1)),
    "causal": Case((2, 2, 123, 123, 8, 8), causal=True),
    "more keys, causal": Case((1, 2, 5, 200, 3, 5), causal=True),
    "more queries, causal": Case((2, 1, 150, 70, 9, 16), causal=True),
    "a bool mask": Case((2, 2, 70, 5, 4, 4), bias="bool"),
    "a float mask, causal": Case((1, 3, 66, 66, 16, 16), bias="float", causal=True),
    "f64": Case((1, 2, 33, 65, 5, 7), f64, bias="bool", causal=True),
    "bf16": Case((2, 2, 70, 70, 16, 16), bf16, causal=True),
    "f16": Case((2, 1, 40, 90, 8, 24), f16, bias="bool"),
    "heads that share keys": Case((2, 4, 33, 20, 8, 8), heads=2, causal=True),
    "one projection": Case((2, 3, 65, 65, 8, 8), fused=True),
    "forward alone": Case((1, 2, 70, 70, 8, 8), causal=True, results=("attention",)),
    "log-sums alone": Case((1, 2, 70, 33, 8, 8), bias="bool", results=("attention_lse",)),
    "dq alone": Case((1, 2, 70, 70, 8, 8), causal=True, results=("attention_dq",)),
    "dk alone": Case((1, 2, 70, 33, 8, 8), bias="bool", results=("attention_dk",)),
    "dv alone": Case((1, 2, 70, 33, 8, 8), results=("attention_dv",)),
    "dropout": Case((2, 2, 70, 70, 8, 8), causal=True, noise="mask"),
    "dropout, a bool mask": Case((2, 3, 5, 70, 8, 4), bias="bool", noise="mask"),
    "dropout of a key": Case((1, 2, 70, 66, 8, 8), bias="float", noise="key"),
    "dropout, bf16": Case((2, 4, 40, 70, 16, 16), bf16, heads=2, noise="mask"),
    "dropout, f64": Case((1, 2, 33, 65, 5, 7), f64, causal=True, noise="float"),
    "dropout, forward alone": Case((1, 2, 9, 70, 8, 8), noise="key", results=("attention",)),
    "dropout, dq alone": Case((1, 2, 9, 70, 8, 8), noise="mask", results=("attention_dq",)),
    "dropout, dk alone": Case((1, 2, 9, 70, 8, 8), noise="mask", results=("attention_dk",)),
    "dropout, dv alone": Case((1, 2, 9, 70, 8, 8), noise="mask", results=("attention_dv",)),
}
