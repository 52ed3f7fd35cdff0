"""Random small graphs for the scheduler and the executors."""

from __future__ import annotations

import numpy as np

from tracejit.ir.graph import Builder, Graph, Result, Value, Write, verify
from tracejit.ir.types import HOST_SCALAR, Type, bf16, f32, i64

UNARY = ("neg", "abs", "exp", "tanh", "floor", "sign")
BINARY = ("add", "sub", "mul", "maximum", "minimum")


class RandomProgram:
    """A random small graph: element-wise, movement, reductions, matmuls, results and writes."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.b = Builder()
        self.dtype = bf16 if self.rng.random() < 0.1 else f32
        self.values: list[Value] = []

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def shape(self) -> tuple[int, ...]:
        sizes = (1, 2, 3, 4, 6) if self.rng.random() < 0.95 else (0, 1, 5)
        return tuple(self.pick(sizes) for _ in range(int(self.rng.integers(0, 4))))

    def param(self) -> Value:
        shape = self.shape()
        if self.values and self.rng.random() < 0.6:
            shape = self.pick(self.values).type.shape
        strides = None
        if len(shape) > 1 and self.rng.random() < 0.3:
            order = self.rng.permutation(len(shape))
            step, found = 1, [0] * len(shape)
            for k in order:
                found[k] = step
                step *= max(shape[k], 1) + int(self.rng.integers(0, 2))
            strides = tuple(found)
        value = self.b.param(Type(self.dtype, shape), strides)
        self.values.append(value)
        return value

    def same_shape(self, x: Value) -> Value:
        return self.pick([v for v in self.values if v.type == x.type])

    def windows(self, x: Value) -> Value:
        """Sliding windows along one axis: read, reduced, or added up where they overlap."""
        b, shape = self.b, x.type.shape
        axis = int(self.rng.integers(len(shape)))
        stride, dilation, taps = (self.pick((1, 1, 2)) for _ in range(3))
        count = (shape[axis] - (taps - 1) * dilation - 1) // stride + 1
        if count <= 0:
            return x
        layers = b.expand(b.reshape(x, shape=(*shape, 1)), shape=(*shape, taps))
        where = {"axes": (axis, len(shape)), "stride": stride, "dilation": dilation}
        found = b.window(layers, **where, count=count)
        kind = self.pick(("read", "reduced", "added"))
        if kind == "read":
            return found
        if kind == "added":
            found = b.unwindow(b.mul(found, 0.5), **where, length=shape[axis])
        return b.reduce_sum(found, axes=(len(shape),))

    def step(self) -> Value:
        b, x = self.b, self.pick(self.values[-8:])
        shape, rank = x.type.shape, len(x.type.shape)
        kind = self.pick(
            ["unary", "binary", "binary", "binary", "literal", "host", "where"]
            + ["permute", "reshape", "expand", "slice", "pad", "reduce", "reduce", "matmul"]
            + ["source", "broadcast", "broadcast", "alias", "matmul", "window"]
        )
        if kind == "unary":
            return getattr(b, self.pick(UNARY))(x)
        if kind == "binary":
            return getattr(b, self.pick(BINARY))(x, self.same_shape(x))
        if kind == "literal":
            return getattr(b, self.pick(BINARY))(x, float(self.rng.normal()))
        if kind == "host":
            return b.mul(x, self.host)
        if kind == "where":
            return b.where(b.ge(x, self.same_shape(x)), self.same_shape(x), 0.0)
        if kind == "alias":
            return b.alias(x)
        if kind == "permute":
            return b.permute(x, axes=tuple(int(a) for a in self.rng.permutation(rank)))
        if kind == "reshape":
            sizes = [n for s in shape for n in ((2, s // 2) if s % 2 == 0 and s else (s,))]
            while len(sizes) > 1 and self.rng.random() < 0.6:
                k = int(self.rng.integers(len(sizes) - 1))
                sizes[k : k + 2] = [sizes[k] * sizes[k + 1]]
            if self.rng.random() < 0.3:
                sizes.insert(int(self.rng.integers(len(sizes) + 1)), 1)
            return b.reshape(x, shape=tuple(sizes))
        if kind == "expand":
            wide = tuple(self.pick((2, 3)) if s == 1 else s for s in shape)
            return b.expand(x, shape=wide)
        if kind == "slice":
            lows = tuple(int(self.rng.integers(0, s + 1)) for s in shape)
            stops = tuple(
                int(self.rng.integers(lo, s + 1)) for lo, s in zip(lows, shape, strict=True)
            )
            steps = tuple(self.pick((1, 1, 2)) for _ in shape)
            return b.slice(x, starts=lows, stops=stops, steps=steps)
        if kind == "pad":
            low, high, gap = (tuple(self.pick((0, 0, 1, 2)) for _ in shape) for _ in range(3))
            return b.pad(x, low=low, high=high, interior=gap, value=self.pick((0, 0.0, 1.5)))
        if kind == "window" and rank and 0 not in shape:
            return self.windows(x)
        if kind == "reduce":
            axes = tuple(k for k in range(rank) if self.rng.random() < 0.6)
            op = self.pick((b.reduce_sum, b.reduce_sum, b.reduce_max, b.reduce_min))
            if any(shape[k] == 0 for k in axes):
                op = b.reduce_sum
            return op(x, axes=axes)
        if kind == "broadcast":
            axes = tuple(k for k in range(rank) if self.rng.random() < 0.5)
            kept = tuple(1 if k in axes else s for k, s in enumerate(shape))
            reduce = b.reduce_sum if 0 in shape else self.pick((b.reduce_sum, b.reduce_max))
            y = b.expand(b.reshape(reduce(x, axes=axes), shape=kept), shape=shape)
            return self.pick((b.sub, b.mul))(self.same_shape(x), b.mul(y, 0.1))
        if kind == "matmul" and rank >= 2:
            other = self.same_shape(x)
            axes = (*range(rank - 2), rank - 1, rank - 2)
            pair = (x, b.permute(other, axes=axes))
            if self.rng.random() < 0.5:
                pair = (b.permute(x, axes=axes), other)
            return b.mul(b.matmul(*pair), 0.1)
        if kind == "source" and rank:
            row = b.iota(axis=rank - 1, shape=shape, dtype=i64, device="cpu")
            return b.add(x, b.cast(row, dtype=self.dtype))
        return b.full(0.3, shape=shape, dtype=self.dtype, device="cpu")

    def bounded(self, x: Value) -> Value:
        """Now and then a tanh, so that values stay small."""
        return self.b.tanh(x) if self.rng.random() < 0.15 else x

    def graph(self) -> Graph:
        """The program; about half of the inputs are overwritten."""
        for _ in range(int(self.rng.integers(1, 4))):
            self.param()
        self.host = self.b.param(HOST_SCALAR)
        params = list(self.values)
        for _ in range(int(self.rng.integers(1, 24))):
            self.values.append(self.bounded(self.step()))
        results = []
        for _ in range(int(self.rng.integers(1, 4))):
            value = self.pick(self.values[-6:])
            rank = len(value.type.shape)
            strides = None
            if rank > 1 and self.rng.random() < 0.2:
                strides = tuple(
                    np.cumprod((1, *(max(s, 1) for s in value.type.shape[:-1]))).tolist()
                )
            results.append(Result(value, strides))
        writes = []
        for param in params:
            fitting = [v for v in self.values if v.type == param.type]
            if self.rng.random() < 0.5:
                writes.append(Write(param, self.pick(fitting)))
        graph = self.b.graph("step", tuple(results), tuple(writes))
        verify(graph)
        return graph
