"""Samples and a reference for every primitive, which the op tests and others go through.

A Sample is a recipe: operands (literals, or tensors by dtype, shape and filling) and attributes.
`build(seed)` makes its arrays, in compute dtypes as the reference evaluator wants them.
"""

from __future__ import annotations

import itertools
import math
import operator
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from tracejit.ir.graph import Builder, Graph, Result, Value
from tracejit.ir.ops import OPS
from tracejit.ir.ops.attention import FORWARD, GRADIENTS
from tracejit.ir.ops.host import MATH, NUMPY
from tracejit.ir.text import parse
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import (
    DType,
    Type,
    b1,
    bf16,
    f16,
    f32,
    f64,
    i8,
    i16,
    i32,
    i64,
    round_to,
    u8,
)

FLOATS = (f32, f64, bf16, f16)
INTS = (i64, i32, i16, i8, u8)
SHAPES = ((), (0,), (1,), (5,), (123,), (3, 5), (2, 3, 4), (3, 0, 2))

ATTENTION = (*FORWARD, *GRADIENTS)
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 3.0, 7.0, -4.0, 1e4)
SMALL_INTS = (0, 1, -1, 2, -3, 5, 7, -8)


@dataclass(frozen=True)
class Tensor:
    """A tensor operand. `fill` names how it is filled:

    normal    smooth floats away from 0, integers from -4 to 5 (0 to 5 if unsigned), either bool
    positive  floats from 0.2 to 3, integers from 1 to 5
    ties      floats among -1, 0, 0.5, 1; integers among 0, 1
    edges     the dtype's extreme integers among small ones
    left, right   the two sides of every pair of SPECIAL values (as many as fit the shape)
    spd       symmetric positive definite matrices
    triangle  matrices whose triangles are far from singular
    factors   what `lu` gives for square matrices
    """

    dtype: DType
    shape: tuple[int, ...]
    fill: str = "normal"

    def build(self, rng: np.random.Generator) -> np.ndarray:
        if self.fill in ("left", "right"):
            return self._pairs()
        if self.fill in ("spd", "triangle", "factors"):
            return round_to(self._matrices(rng), self.dtype)
        if self.dtype is b1:
            return rng.random(self.shape) < 0.5
        if self.dtype.is_float:
            return round_to(self._floats(rng), self.dtype)
        low = {"normal": -4, "positive": 1, "ties": 0, "edges": -4}[self.fill]
        low = max(low, 0) if self.dtype.kind == "u" else low
        values = rng.integers(low, 2 if self.fill == "ties" else 6, self.shape)
        if self.fill == "edges":
            info = np.iinfo(self.dtype.compute)
            extremes = rng.choice(np.array([info.min, info.max, info.max // 2], object), self.shape)
            values = np.where(rng.random(self.shape) < 0.5, extremes, values)
        return values.astype(self.dtype.compute)

    def _floats(self, rng: np.random.Generator) -> np.ndarray:
        if self.fill == "positive":
            return rng.uniform(0.2, 3.0, self.shape)
        if self.fill == "ties":
            return rng.choice([-1.0, 0.0, 0.5, 1.0], self.shape)
        return rng.uniform(0.2, 2.0, self.shape) * rng.choice([-1.0, 1.0], self.shape)

    def _matrices(self, rng: np.random.Generator) -> np.ndarray:
        *batch, n = self.shape
        if self.fill == "factors":
            n = math.isqrt(n + 1) - 1
            return OPS["lu"].eval(rng.standard_normal((*batch, n, n)) + np.eye(n))
        x = rng.standard_normal(self.shape)
        if self.fill == "triangle":
            return 0.3 * x + 2.0 * np.eye(n)
        return x @ x.swapaxes(-1, -2) / n + np.diag(1.0 + np.arange(n))

    def _pairs(self) -> np.ndarray:
        pool = SPECIAL if self.dtype.is_float else SMALL_INTS
        if self.dtype.kind == "u":
            pool = tuple(abs(v) for v in pool)
        if self.dtype is b1:
            pool = (False, True)
        left, right = zip(*itertools.product(pool, repeat=2), strict=True)
        values = np.resize(left if self.fill == "left" else right, self.shape)
        return round_to(values.astype(self.dtype.compute), self.dtype)


PAIRS = len(SPECIAL) ** 2


@dataclass(frozen=True)
class Sample:
    """One use of a primitive; `host` operands are Python floats declared as host scalars. A string
    is a literal."""

    operands: tuple[Tensor | int | float | bool | str, ...]
    attrs: dict[str, object] = field(default_factory=dict)
    host: bool = False

    def __str__(self) -> str:
        words = [
            f"{x.dtype.name}[{','.join(map(str, x.shape))}]{'' if x.fill == 'normal' else x.fill}"
            if isinstance(x, Tensor)
            else str(x)
            for x in self.operands
        ]
        words += [f"{k}={v}" for k, v in self.attrs.items() if k not in ("device", "body")]
        return " ".join(words) or "()"

    def build(self, seed: int = 0) -> list:
        """Arrays for tensors, literals as they are."""
        rng = np.random.default_rng((seed, zlib.crc32(str(self).encode())))
        return [x.build(rng) if isinstance(x, Tensor) else x for x in self.operands]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for x in self.operands if isinstance(x, Tensor))

    @property
    def is_float(self) -> bool:
        """Whether there are tensor operands, and all are of a floating-point dtype."""
        return bool(self.tensors) and all(t.dtype.is_float for t in self.tensors)

    def emit(self, b: Builder, name: str, dtype: DType | None = None) -> tuple[list, Value]:
        """Declare the operands as inputs and emit the primitive: (its arguments, its result).

        `dtype` replaces the dtype of floating-point operands.
        """
        args = []
        for x in self.operands:
            if isinstance(x, Tensor):
                kind = dtype if dtype is not None and x.dtype.is_float else x.dtype
                args.append(b.param(Type(kind, x.shape)))
            elif self.host and type(x) is not str:
                args.append(b.param(Type(f64, (), "host")))
            else:
                args.append(x)
        return args, b.emit(OPS[name], *args, **self.attrs)

    def graph(self, name: str) -> Graph:
        """The graph of this one primitive."""
        b = Builder()
        b.line = "model.py:12"
        return b.graph(name, (Result(self.emit(b, name)[1]),))


def unary(*dtypes: DType, fill: str = "normal") -> list[Sample]:
    """Every shape in the first dtype, one in the others, special values in all."""
    rows = [Sample((Tensor(dtypes[0], shape, fill),)) for shape in SHAPES]
    rows += [Sample((Tensor(d, (123,), fill),)) for d in dtypes[1:]]
    rows += [Sample((Tensor(d, (PAIRS,), "left"),)) for d in dtypes]
    return rows + [Sample((Tensor(d, (40,), "edges"),)) for d in dtypes if d.kind in "iu"]


def binary(*dtypes: DType, fill: str = "normal", edges: bool = True) -> list[Sample]:
    """As `unary`, with all pairs of special values, ties, and a literal on either side."""

    def two(dtype: DType, shape: tuple[int, ...], x: str, z: str) -> Sample:
        return Sample((Tensor(dtype, shape, x), Tensor(dtype, shape, z)))

    rows = [two(dtypes[0], shape, fill, fill) for shape in SHAPES]
    for d in dtypes:
        rows.append(two(d, (4, 31), fill, fill))
        rows.append(two(d, (PAIRS,), "left", "right"))
        rows.append(two(d, (40,), "ties", "ties"))
        literals = (2.5, -2.0, 0.5) if d.is_float else (True,) if d is b1 else (2, 3)
        for x in literals:
            rows += [Sample((Tensor(d, (3, 5), fill), x)), Sample((x, Tensor(d, (3, 5), fill)))]
        if d.kind in "iu" and edges:
            rows.append(two(d, (40,), "edges", "edges"))
    return rows


def selections() -> list[Sample]:
    rows = []
    for d in (*FLOATS, i64, i32, u8, b1):
        two = Tensor(d, (5, 5), "left"), Tensor(d, (5, 5), "right")
        literal = 0.5 if d.is_float else True if d is b1 else 3
        c = Tensor(b1, (5, 5))
        rows += [Sample((c, *two)), Sample((c, two[0], literal)), Sample((c, literal, two[1]))]
    for shape in SHAPES:
        rows.append(Sample((Tensor(b1, shape), Tensor(f32, shape), Tensor(f32, shape))))
    return rows


def casts() -> list[Sample]:
    rows = []
    for a, b in itertools.product((*FLOATS, i64, i32, u8, b1), repeat=2):
        fill = "positive" if b is u8 else "normal"
        rows.append(Sample((Tensor(a, (40,), fill),), {"dtype": b}))
        if a.is_float and (b.is_float or b is b1):
            rows.append(Sample((Tensor(a, (PAIRS,), "left"),), {"dtype": b}))
    rows += [Sample((Tensor(i64, (40,), "edges"),), {"dtype": d}) for d in (i32, u8, f32, b1)]
    rows += [Sample((Tensor(a, (40,)),), {"dtype": b}) for a in FLOATS for b in (u8, i8, i16)]
    return rows + [Sample((Tensor(f32, shape),), {"dtype": bf16}) for shape in SHAPES]


def bits() -> list[Sample]:
    """Of floats, and of integers of their size, some of which are NaN. Eager has several NaN of
    bf16."""
    pairs = ((f32, i32), (f64, i64), (bf16, i16), (f16, i16))
    rows = [Sample((Tensor(f32, shape),), {"of": f32, "dtype": i32}) for shape in SHAPES]
    for a, b in pairs:
        rows.append(Sample((Tensor(a, (123,)),), {"of": a, "dtype": b}))
        if a is not bf16:
            rows.append(Sample((Tensor(a, (PAIRS,), "left"),), {"of": a, "dtype": b}))
        for fill in ("positive", "normal", "edges"):
            rows.append(Sample((Tensor(b, (40,), fill),), {"of": b, "dtype": a}))
    return rows


def moves(attr: str, *rows: tuple[tuple[int, ...], tuple[int, ...]]) -> list[Sample]:
    """(operand shape, attribute) in several dtypes."""
    dtypes = (f32, f64, bf16, i64, u8, b1)
    return [Sample((Tensor(d, shape),), {attr: value}) for shape, value in rows for d in dtypes]


def slices() -> list[Sample]:
    rows = (
        ((5,), (1,), (4,), (1,)),
        ((5,), (0,), (5,), (2,)),
        ((5,), (3,), (3,), (1,)),
        ((123,), (7,), (120,), (10,)),
        ((3, 5), (1, 0), (3, 5), (1, 3)),
        ((2, 3, 4), (0, 1, 1), (2, 2, 4), (2, 1, 2)),
        ((0, 3), (0, 1), (0, 3), (1, 1)),
        ((), (), (), ()),
    )
    return [
        Sample((Tensor(d, shape),), {"starts": lo, "stops": hi, "steps": step})
        for shape, lo, hi, step in rows
        for d in (f32, f64, i32)
    ]


def pads() -> list[Sample]:
    rows = (
        ((5,), (1,), (2,), (0,), 0),
        ((5,), (0,), (0,), (2,), 1.5),
        ((1,), (3,), (0,), (4,), -0.0),
        ((0,), (2,), (1,), (3,), math.nan),
        ((3, 5), (0, 1), (2, 0), (1, 0), -math.inf),
        ((2, 3, 4), (1, 0, 0), (0, 0, 2), (0, 2, 1), 0.0),
        ((), (), (), (), 2),
    )
    samples = [
        Sample((Tensor(d, shape),), {"low": lo, "high": hi, "interior": gap, "value": value})
        for shape, lo, hi, gap, value in rows
        for d in (f32, f64, bf16)
    ]
    attrs = {"low": (1,), "high": (2,), "interior": (1,), "value": 3}
    samples += [Sample((Tensor(d, (5,)),), attrs) for d in (i64, u8)]
    return [*samples, Sample((Tensor(b1, (5,)),), attrs | {"value": True})]


WINDOWS = (  # shape, axes, stride, dilation, count
    ((5, 3), (0, 1), 1, 1, 3),
    ((7, 2), (0, 1), 2, 3, 2),
    ((3, 2, 9), (2, 0), 3, 2, 2),
    ((2, 3, 4), (1, 2), 1, 1, 0),
    ((0, 5, 2), (1, 2), 1, 1, 4),
    ((4, 1), (0, 1), 3, 1, 2),
    ((123, 5), (0, 1), 4, 2, 28),
)


def windows() -> list[Sample]:
    return [
        Sample(
            (Tensor(d, shape),),
            {"axes": axes, "stride": stride, "dilation": dilation, "count": count},
        )
        for shape, axes, stride, dilation, count in WINDOWS
        for d in (f32, f64, bf16, i64)
    ]


def unwindows() -> list[Sample]:
    samples = []
    for shape, axes, stride, dilation, count in WINDOWS:
        attrs = {"axes": axes, "stride": stride, "dilation": dilation}
        given = tuple(count if k == axes[0] else n for k, n in enumerate(shape))
        attrs["length"] = shape[axes[0]]
        samples += [Sample((Tensor(d, given),), attrs) for d in (f32, f64, bf16, i64)]
    return samples


def gathers() -> list[Sample]:
    """(operand shape, index shape, axis, filling of the index); "normal" is out of range too."""
    rows = (
        ((2,), (5,), 0, "ties"),
        ((6,), (123,), 0, "positive"),
        ((3, 6), (3, 4), 1, "positive"),
        ((6, 3), (1, 3), 0, "positive"),
        ((2, 6, 4), (2, 9, 4), 1, "positive"),
        ((2, 3, 2), (2, 3, 2), 2, "ties"),
        ((3, 0, 2), (3, 0, 2), 1, "ties"),
        ((0, 2), (0, 3), 1, "ties"),
        ((4, 3), (40, 3), 0, "normal"),
        ((0, 3), (2, 3), 0, "normal"),
    )
    samples = [
        Sample((Tensor(d, shape), Tensor(i64, index, fill)), {"axis": axis})
        for shape, index, axis, fill in rows
        for d in (f32, f64)
    ]
    for d in (bf16, f16, i64, i32, u8, b1):
        samples.append(Sample((Tensor(d, (4, 3)), Tensor(i64, (40, 3), "normal")), {"axis": 0}))
    return samples


def scatters() -> list[Sample]:
    """(target shape, index shape, axis, filling of the index); "normal" is out of range too."""
    rows = (
        ((5,), (123,), 0, "ties"),
        ((6,), (1,), 0, "positive"),
        ((1,), (7,), 0, "ties"),
        ((123, 5), (8, 5), 0, "positive"),
        ((3, 6), (3, 9), 1, "ties"),
        ((2, 6, 4), (2, 9, 4), 1, "positive"),
        ((2, 3, 2), (2, 3, 2), 2, "ties"),
        ((3, 4, 2), (3, 0, 2), 1, "ties"),
        ((0, 2), (0, 3), 1, "ties"),
        ((4, 3), (40, 3), 0, "normal"),
        ((0, 3), (2, 3), 0, "normal"),
    )
    samples = []
    for shape, index, axis, fill in rows:
        for d in (f32, f64, bf16, i64):
            operands = Tensor(d, shape), Tensor(i64, index, fill), Tensor(d, index)
            for combine in ("add", "mul", "last", "max", "min"):
                samples.append(Sample(operands, {"axis": axis, "combine": combine}))
    for d in (f16, i32, u8):
        operands = Tensor(d, (4, 3)), Tensor(i64, (9, 3), "normal"), Tensor(d, (9, 3))
        samples.append(Sample(operands, {"axis": 0, "combine": "add"}))
    bools = Tensor(b1, (4, 3)), Tensor(i64, (9, 3), "normal"), Tensor(b1, (9, 3))
    return [*samples, Sample(bools, {"axis": 0, "combine": "last"})]


def running_sums() -> list[Sample]:
    shapes = (((5,), 0), ((1,), 0), ((123,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 9, 4), 1))
    rows = [(*row, d) for row in (*shapes, ((3, 0), 1), ((3000,), 0)) for d in (f32, f64, i64)]
    return [Sample((Tensor(d, shape),), {"axis": axis}) for shape, axis, d in rows]


def running(*kinds: DType, combine: str) -> list[Sample]:
    """Running products, extrema or log-sums, which take ties and long axes."""
    shapes = (((5,), 0), ((1,), 0), ((123,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 9, 4), 1))
    more = (((3, 0), 1), ((3, 1), 1)) + ((((3000,), 0),) if combine != "mul" else ())
    attrs = {"combine": combine}
    found = [
        Sample((Tensor(d, shape),), {"axis": axis, **attrs})
        for d in kinds
        for shape, axis in (*shapes, *more)
    ]
    if combine != "mul":
        special = [(f32, "left"), (f64, "right")]
        special += [] if combine == "logaddexp" else [(f32, "ties"), (i64, "edges"), (bf16, "left")]
        found += [Sample((Tensor(d, (60,), f),), {"axis": 0, **attrs}) for d, f in special]
    return found


def accumulations() -> list[Sample]:
    found = running(f32, f64, i64, combine="mul")
    for combine in ("max", "min"):
        found += running(f32, f64, i64, u8, bf16, combine=combine)
    return found + running(f32, f64, combine="logaddexp")


def recurrences() -> list[Sample]:
    shapes = (((5,), 0), ((1,), 0), ((123,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 9, 4), 1))
    return [
        Sample((Tensor(d, shape), Tensor(d, shape)), {"axis": axis})
        for shape, axis in (*shapes, ((3, 0), 1))
        for d in (f32, f64)
    ]


def sorts() -> list[Sample]:
    """(shape, axis, how many, filling)."""
    rows = (
        ((5,), 0, 5, "normal"),
        ((1,), 0, 1, "normal"),
        ((123,), 0, 123, "ties"),
        ((3, 5), 0, 3, "ties"),
        ((3, 5), 1, 2, "ties"),
        ((3, 1), 1, 1, "normal"),
        ((2, 9, 4), 1, 1, "ties"),
        ((2, 9, 4), 1, 9, "normal"),
        ((0, 5), 1, 5, "normal"),
        ((5, 0), 1, 0, "normal"),
        ((5, 3), 1, 0, "normal"),
        ((100,), 0, 100, "left"),
        ((2, 300), 1, 300, "normal"),
        ((3000,), 0, 20, "ties"),
    )
    dtypes = (f32, f64, bf16, i64, u8)
    found = [
        Sample((Tensor(d, shape, fill),), {"axis": axis, "count": count, "descending": down})
        for shape, axis, count, fill in rows
        for d in (dtypes if len(shape) == 1 and shape[0] < 3000 else (f32, i64))
        for down in (False, True)
    ]
    chosen = {"axis": 0, "count": 9, "descending": True, "topk": "sorted"}  # without ties
    found += [Sample((Tensor(d, (40, 2)),), chosen) for d in (f32, f64)]
    return found + [Sample((Tensor(b1, (40,)),), {"axis": 0, "count": 40, "descending": True})]


def reductions(*, empty: bool) -> list[Sample]:
    rows = [
        ((5,), (0,)),
        ((123,), (0,)),
        ((1,), (0,)),
        ((3, 5), (0,)),
        ((3, 5), (1,)),
        ((3, 5), (1, 0)),
        ((3, 5), ()),
        ((2, 3, 4), (0, 2)),
        ((2, 1, 4), (1,)),
        ((3, 0, 2), (0,)),
        ((), ()),
    ]
    if empty:
        rows += [((0,), (0,)), ((3, 0, 2), (1,)), ((3, 0, 2), (0, 1, 2))]
    samples = [
        Sample((Tensor(d, shape),), {"axes": axes}) for shape, axes in rows for d in (f32, f64)
    ]
    for d in (*FLOATS, i64, i32, u8, b1):
        samples.append(Sample((Tensor(d, (7, 11), "ties"),), {"axes": (1,)}))
    for d in FLOATS:
        samples.append(Sample((Tensor(d, (13, 13), "left"),), {"axes": (0,)}))
        samples.append(Sample((Tensor(d, (13, 13), "left"),), {"axes": (1,)}))
    return [*samples, Sample((Tensor(i64, (40,), "edges"),), {"axes": (0,)})]


def matmuls() -> list[Sample]:
    rows = (
        ((3, 5), (5, 4)),
        ((1, 123), (123, 1)),
        ((5, 1), (1, 5)),
        ((3, 0), (0, 4)),
        ((0, 3), (3, 2)),
        ((2, 3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (2, 1, 4, 2)),
    )
    dtypes = (f32, f64, bf16, f16, i64, i32)
    return [Sample((Tensor(d, x), Tensor(d, z))) for x, z in rows for d in dtypes]


def scans() -> list[Sample]:
    """Both ways; one value is carried, two, or none; rows, none of them, or no elements; sums."""

    def one(dtype: DType, steps: int, rows: int, reverse: bool) -> Sample:
        kind = f"{dtype.name}[{rows},3]"
        body = parse(f"""
            body(%0: {kind}, %1: {kind}, %2: {dtype.name}[3,3]) {{
              %3: {kind} = matmul(%0, %2)
              %4: {kind} = add(%3, %1)
              %5: {kind} = mul(%4, 0.25)
              %6: {kind} = mul(%5, %0)
              return %5, %6
            }}""")
        operands = (dtype, (rows, 3)), (dtype, (steps, rows, 3)), (dtype, (3, 3))
        attrs = {"body": body, "carried": 1, "sliced": 1, "steps": steps, "reverse": reverse}
        return Sample(tuple(Tensor(*x) for x in operands), attrs)

    def two(steps: int, reverse: bool) -> Sample:
        body = parse("""
            body(%0: f32[4], %1: f32[2]) {
              %2: f32[2] = slice(%0, starts=(1,), stops=(3,), steps=(1,))
              %3: f32[2] = maximum(%1, %2)
              %4: f32[4] = mul(%0, 0.5)
              return %4, %3
            }""")
        attrs = {"body": body, "carried": 2, "sliced": 0, "steps": steps, "reverse": reverse}
        return Sample((Tensor(f32, (4,)), Tensor(f32, (2,))), attrs)

    def sums(dtype: DType, steps: int, carried: int) -> Sample:
        kind = f"{dtype.name}[2,3]"
        body = parse(f"""
            body(%0: {kind}, %1: {kind}) {{
              %2: {kind} = mul(%0, 0.5)
              %3: {kind} = mul(%2, %1)
              %4: {dtype.name}[3] = reduce_sum(%3, axes=(0,))
              %5: {dtype.name}[3,2] = permute(%3, axes=(1, 0))
              return %2, %3, %5, %4
            }}""")
        attrs = {"body": body, "carried": carried, "sliced": 1, "steps": steps}
        rows = Tensor(dtype, (2, 3)) if carried else Tensor(dtype, (steps, 2, 3))
        other = Tensor(dtype, (steps, 2, 3)) if carried else Tensor(dtype, (2, 3))
        return Sample((rows, other), attrs | {"reverse": False, "summed": 2})

    kinds = [(f32, 5, 2), (f32, 1, 2), (f64, 4, 1), (bf16, 3, 2), (f16, 2, 2), (f32, 3, 0)]
    found = [one(*kind, reverse) for kind in kinds for reverse in (False, True)]
    summed = [sums(*kind) for kind in ((f32, 4, 1), (f64, 3, 0), (f32, 1, 0))]
    return [*found, two(3, False), two(1, True), *summed]


def attentions(name: str) -> list[Sample]:
    """Of attention; the log-sums and deltas of gradients are any numbers."""
    samples = []
    rows = (((), 3, 5, 4, 2), ((2,), 5, 3, 1, 6), ((2, 3), 1, 1, 5, 5), ((1,), 12, 23, 3, 4))
    for i, (batch, m, n, c, d) in enumerate(rows):
        for dtype in FLOATS:
            acc = f32 if dtype.narrow else dtype
            q, k, v = (Tensor(dtype, (*batch, *s)) for s in ((m, c), (n, c), (n, d)))
            bias = Tensor(acc, (*batch, m, n)) if i % 2 else 0.0
            operands = (q, k, bias) if name == "attention_lse" else (q, k, v, bias)
            if name not in ("attention", "attention_lse"):
                row = Tensor(acc, (*batch, m))
                operands += (Tensor(acc, (*batch, m), "positive"), row)
                operands += (Tensor(dtype, (*batch, m, d)),)
            if name != "attention_lse" and i != 1:
                operands += (Tensor(acc, (*batch, m, n)),)
            samples.append(Sample(operands, {"causal": bool(i // 2), "scale": 0.4}))
    return samples


def square_matrices(fill: str, *dtypes: DType, **attrs: object) -> list[Sample]:
    """Of several sizes and batches."""
    shapes = ((1, 1), (5, 5), (2, 3, 3), (2, 1, 4, 4), (33, 33))
    return [Sample((Tensor(d, shape, fill),), attrs) for d in dtypes for shape in shapes]


def rectangles(*dtypes: DType, wide: bool = False, **attrs: object) -> list[Sample]:
    """Matrices of either form, or those that are not tall."""
    shapes = ((1, 1), (4, 4), (2, 3, 5), (1, 7), (23, 40))
    shapes += () if wide else ((2, 5, 3), (7, 1), (40, 23))
    return [Sample((Tensor(d, shape),), attrs) for d in dtypes for shape in shapes]


def triangular_solutions() -> list[Sample]:
    flags = itertools.product((False, True), repeat=3)
    return [
        Sample(
            (Tensor(d, (*batch, n, n), "triangle"), Tensor(d, (*batch, n, k))),
            {"upper": upper, "transposed": transposed, "unit": unit},
        )
        for upper, transposed, unit in flags
        for batch, n, k in (((), 5, 2), ((2, 3), 3, 1), ((), 1, 4), ((2,), 17, 19))
        for d in (f32, f64)
    ]


def lu_solutions() -> list[Sample]:
    return [
        Sample(
            (Tensor(d, (*batch, n * n + 2 * n), "factors"), Tensor(d, (*batch, n, k))),
            {"transposed": transposed},
        )
        for transposed in (False, True)
        for batch, n, k in (((), 5, 2), ((2, 3), 3, 1), ((), 1, 4))
        for d in (f32, f64)
    ]


def constants() -> list[Sample]:
    rows = [(0.1, f32), (0.1, bf16), (0.1, f16), (-0.0, f64), (math.nan, f32), (1e4, f16)]
    rows += [(-math.inf, bf16), (3, i64), (-1, i32), (255, u8), (True, b1), (2, f32)]
    samples = [Sample((x,), {"shape": (3, 5), "dtype": d, "device": "cpu"}) for x, d in rows]
    attrs = {"shape": (5,), "dtype": f32, "device": "cpu"}
    samples += [Sample((2.5,), attrs | {"shape": shape}) for shape in SHAPES]
    return [*samples, Sample((0.1,), attrs, host=True)]


def iotas() -> list[Sample]:
    rows = [(0, (5,)), (0, (0,)), (0, (123,)), (1, (3, 5)), (0, (3, 5)), (2, (2, 3, 4)), (0, (1,))]
    return [
        Sample((), {"axis": axis, "shape": shape, "dtype": d, "device": "cpu"})
        for axis, shape in rows
        for d in (i64, i32, f32, bf16)
    ]


def host(*rows: tuple[float, ...]) -> list[Sample]:
    return [Sample(row, host=True) for row in rows]


HOST_MATH = {  # where a function is defined
    **dict.fromkeys(("acosh",), (1.0, 3.5)),
    **dict.fromkeys(("asin", "acos", "atanh"), (0.5, -0.25)),
    **dict.fromkeys(("sqrt", "log", "log2", "log10", "log1p"), (0.1, 3.0)),
}


def _rows_of_numpy(name: str) -> tuple[tuple[float, ...], ...]:
    """Arguments of one of numpy's functions on floats: some where those of math raise."""
    if getattr(np, name).nin == 2:
        return ((3.0, 2.0), (7.25, -0.5), (0.1, 3.0), (0.0, 2.0))
    return ((0.5,), (0.25,), (0.0,)) if name not in ("arccosh", "reciprocal") else ((1.5,), (3.0,))


HOST_PAIRS = ((3.0, 2.0), (-3.5, 2.0), (7.25, -0.5), (0.1, 3.0))


def collectives() -> dict[str, list[Sample]]:
    """Of a group of one rank, where nothing is communicated; test_collectives has several."""
    numbers = itertools.count()

    def alone() -> dict[str, object]:
        return {"group": "0", "ranks": 1, "number": next(numbers)}

    def of(*types: DType, count: int = 1, **attrs: object) -> list[Sample]:
        shapes = [(3, 5), (4,), ()][:count]
        return [Sample(tuple(Tensor(t, s) for s in shapes), attrs | alone()) for t in types]

    return {
        "all_reduce": [*of(f32, f64, i64, by="SUM"), *of(f32, count=3, by="MAX")],
        "broadcast": [*of(f32, u8, root=0), *of(f64, count=2, root=0)],
        "reduce_to": of(f32, i32, by="SUM", root=0),
        "all_gather": of(f32, i64),
        "reduce_scatter": of(f32, f64, by="SUM"),
        "all_to_all": of(f32, i64, sent="15", received="15"),
        "gather_ranks": of(f32, root=0, here=True),
        "scatter_ranks": of(f32, root=0, here=True),
        "barrier": [Sample((), alone())],
    }


SAMPLES: dict[str, list[Sample]] = {
    "neg": unary(*FLOATS, *INTS),
    "abs": unary(*FLOATS, *INTS),
    "sign": unary(*FLOATS, *INTS, b1),
    "exp": unary(*FLOATS),
    "log": unary(*FLOATS, fill="positive"),
    "expm1": unary(*FLOATS),
    "log1p": unary(*FLOATS, fill="positive"),
    "erf": unary(*FLOATS),
    "erfc": unary(*FLOATS),
    "sqrt": unary(*FLOATS, fill="positive"),
    "tanh": unary(*FLOATS),
    "sin": unary(*FLOATS),
    "cos": unary(*FLOATS),
    "floor": unary(*FLOATS),
    "trunc": unary(*FLOATS),
    "round": unary(*FLOATS),
    "not": unary(i64, i32, i8, u8, b1),
    "add": binary(*FLOATS, *INTS, b1),
    "sub": binary(*FLOATS, *INTS),
    "mul": binary(*FLOATS, *INTS, b1),
    "div": binary(*FLOATS),
    "floordiv": binary(*FLOATS, *INTS),
    "mod": binary(*FLOATS, *INTS),
    "fmod": binary(*FLOATS, *INTS),
    # eager's NaNs of bf16 have either sign
    "copysign": [
        *binary(f32, f64, f16),
        *(s for s in binary(bf16) if not any(t.fill == "right" for t in s.tensors)),
    ],
    "atan2": binary(*FLOATS),
    "pow": binary(*FLOATS, i64, i32, u8, fill="positive", edges=False),
    "maximum": binary(*FLOATS, *INTS, b1),
    "minimum": binary(*FLOATS, *INTS, b1),
    "and": binary(i64, i32, i8, u8, b1),
    "or": binary(i64, i32, i8, u8, b1),
    "xor": binary(i64, i32, i8, u8, b1),
    "shl": binary(i64, i32, i8, u8),
    "shr": binary(i64, i32, i8, u8),
    "philox": binary(i64),
    "gcd": binary(*INTS, edges=False),
    "nextafter": binary(f32, f64),
    "bitcast": bits(),
    **{name: binary(*FLOATS, i64, i32, u8, b1) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "where": selections(),
    "cast": casts(),
    "alias": unary(*FLOATS, i64, u8, b1),
    "after": [
        Sample((Tensor(kind, shape), Tensor(i64, other)))
        for kind, shape, other in ((f32, (3, 5), ()), (bf16, (5,), (2, 3)), (i64, (), (4,)))
    ],
    "host_add": host(*HOST_PAIRS),
    "host_sub": host(*HOST_PAIRS),
    "host_mul": host(*HOST_PAIRS),
    "host_div": host(*HOST_PAIRS),
    "host_floordiv": host(*HOST_PAIRS),
    "host_mod": host(*HOST_PAIRS),
    "host_pow": host((3.0, 2.0), (0.9, 100.0), (2.0, -0.5)),
    "host_neg": host((3.0,), (-0.0,)),
    "host_abs": host((3.0,), (-0.5,)),
    **{
        f"host_{name}": host(*((x,) for x in HOST_MATH.get(name, (0.1, -3.0))))
        for name in MATH
        if name not in ("pow", "fmod", "copysign", "atan2", "hypot")
    },
    **{f"host_{name}": host(*HOST_PAIRS) for name in ("fmod", "copysign", "atan2", "hypot")},
    "host_math_pow": host((3.0, 2.0), (0.9, 100.0), (2.0, -0.5)),
    "host_round": host((0.5,), (-1.5,), (2.5,), (7,)),
    "host_float": host((3,), (-(2**60),), (0,)),
    "host_format": host((7.0, "03.0f"), (0.5, ".3f"), (-0.0, "")),
    "host_pick": host((1, 0.5, 0.25), (-1, 0.5, 0.25, -0.0), (0, 7)),
    "host_find": host((4, 8, 4, 2), (5, 8, 4), (0.5, 1, 0.5)),
    **{f"host_np_{name}": host(*_rows_of_numpy(name)) for name in NUMPY},
    "host_f32": host((0.1,), (-0.0,), (1e300,), (1e-42,)),
    "host_f16": host((0.1,), (-0.0,), (1e6,), (1e-7,)),
    "host_bf16": host((0.1,), (-0.0,), (1e300,), (1.00390625,)),
    "reshape": moves(
        "shape", ((6,), (2, 3)), ((2, 3, 4), (4, 6)), ((), (1, 1)), ((0, 3), (5, 0)), ((1, 1), ())
    ),
    "permute": moves("axes", ((3, 5), (1, 0)), ((2, 3, 4), (2, 0, 1)), ((), ()), ((5, 0), (1, 0))),
    "expand": moves(
        "shape", ((1,), (5,)), ((3, 1), (3, 5)), ((1, 3, 1), (2, 3, 4)), ((1,), (0,)), ((5,), (5,))
    ),
    "slice": slices(),
    "flip": moves(
        "axes", ((5,), (0,)), ((2, 3, 4), (0, 2)), ((3, 5), ()), ((), ()), ((0, 3), (1,))
    ),
    "gather": gathers(),
    "scatter": scatters(),
    "cumsum": running_sums(),
    "accumulate": accumulations(),
    "recurrence": recurrences(),
    "argsort": sorts(),
    "pad": pads(),
    "window": windows(),
    "unwindow": unwindows(),
    "reduce_sum": reductions(empty=True),
    "reduce_max": reductions(empty=False),
    "reduce_min": reductions(empty=False),
    "matmul": matmuls(),
    **{name: attentions(name) for name in ATTENTION},
    "cholesky": square_matrices("spd", f32, f64),
    "triangular_solve": triangular_solutions(),
    "lu": rectangles(f32, f64),
    "lu_solve": lu_solutions(),
    "qr": [*rectangles(f32, f64, complete=False), *rectangles(f32, f64, wide=True, complete=True)],
    "geqrf": rectangles(f32, f64),
    # in float32 numpy computes in float64, which may turn vectors round
    "eigh": [
        *square_matrices("spd", f64, lower=True, vectors=True),
        *square_matrices("spd", f64, lower=False, vectors=True),
        *square_matrices("spd", f32, f64, lower=True, vectors=False),
    ],
    "svd": [
        *rectangles(f64, full=False, vectors=True),
        *rectangles(f64, full=True, vectors=True),
        *rectangles(f32, f64, full=False, vectors=False),
    ],
    "expm": square_matrices("normal", f32, f64),
    "full": constants(),
    "iota": iotas(),
    "scan": scans(),
    **collectives(),
}


COLLECTIVES = [name for name, op in OPS.items() if op.family == "collective"]


def each_sample(*names: str, where=lambda name, sample: True) -> list[tuple[str, Sample]]:
    """(op name, sample) of the named ops (all if none is named) that pass the filter."""
    return [
        (name, sample)
        for name in names or SAMPLES
        for sample in SAMPLES[name]
        if where(name, sample)
    ]


def _collective(*xs: torch.Tensor, **attrs: object) -> torch.Tensor:
    """Of one rank alone: what it sends."""
    if not xs:
        return torch.zeros(1, dtype=torch.uint8)
    return torch.cat([x.reshape(-1) for x in xs])


def _axes(function: Callable) -> Callable:
    """A torch reduction; axes () reduces nothing."""
    return lambda x, axes: function(x, axes) if axes else x.clone()


def _on_tensors(function: Callable) -> Callable:
    """A torch function of two tensors; a literal becomes a tensor."""

    # torch.div too: 2.0 / x itself is x.reciprocal() * 2.0
    def applied(x, z):
        dtype = (x if isinstance(x, torch.Tensor) else z).dtype
        return function(*(torch.as_tensor(t, dtype=dtype) for t in (x, z)))

    return applied


def _pad(x: torch.Tensor, low, high, interior, value) -> torch.Tensor:
    shape = [
        lo + hi + n + max(n - 1, 0) * gap
        for n, lo, hi, gap in zip(x.shape, low, high, interior, strict=True)
    ]
    out = torch.full(shape, value, dtype=x.dtype)
    places = (
        slice(lo, lo + n * (gap + 1) - gap if n else lo, gap + 1)
        for n, lo, gap in zip(x.shape, low, interior, strict=True)
    )
    out[tuple(places)] = x
    return out


def _window(x: torch.Tensor, axes, stride, dilation, count) -> torch.Tensor:
    layers = []
    for k, layer in enumerate(x.unbind(axes[1])):
        axis = axes[0] - (axes[1] < axes[0])
        places = [k * dilation + o * stride for o in range(count)]
        layers.append(layer.index_select(axis, torch.tensor(places, dtype=torch.int64)))
    return torch.stack(layers, axes[1])


def _unwindow(x: torch.Tensor, axes, stride, dilation, length) -> torch.Tensor:
    layers = []
    for k, layer in enumerate(x.unbind(axes[1])):
        axis = axes[0] - (axes[1] < axes[0])
        places = [k * dilation + o * stride for o in range(layer.shape[axis])]
        shape = [length if i == axis else n for i, n in enumerate(layer.shape)]
        out = torch.zeros(shape, dtype=x.dtype)
        index = torch.tensor(places, dtype=torch.int64)
        layers.append(out.index_copy(axis, index, layer))
    return torch.stack(layers, axes[1])


def _iota(axis, shape, dtype, device) -> torch.Tensor:
    row = torch.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return row.expand(shape).to(TO_TORCH[dtype])


def _gather(x: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    inside = (index >= 0) & (index < x.shape[axis])
    if not x.shape[axis] and index.numel():
        return (x.sum(axis, keepdim=True) + math.nan).expand(index.shape)
    found = torch.gather(x, axis, index.where(inside, 0))
    return torch.where(inside, found, math.nan if x.dtype.is_floating_point else 0).to(x.dtype)


def _accumulate(x, axis, combine):
    if combine in ("max", "min"):
        return getattr(torch, f"cum{combine}")(x, axis).values
    return (torch.cumprod if combine == "mul" else torch.logcumsumexp)(x, axis)


def _recurrence(factor, term, axis):
    rows = []
    for a, b in zip(factor.unbind(axis), term.unbind(axis), strict=True):
        rows.append(a * rows[-1] + b if rows else b)
    return torch.stack(rows, axis) if rows else term.clone()


def _scatter(
    x: torch.Tensor, index: torch.Tensor, source: torch.Tensor, axis: int, combine: str
) -> torch.Tensor:
    out = list(x.unbind(axis))
    for at, given in zip(index.unbind(axis), source.unbind(axis), strict=True):
        for k, old in enumerate(out):
            new = {"add": old + given, "mul": old * given, "last": given}.get(combine)
            if new is None:
                new = getattr(torch, f"{combine}imum")(old, given)
            out[k] = torch.where(at == k, new, old)
    return torch.stack(out, axis) if out else x * 1


def _scan(
    *operands: torch.Tensor,
    body: Graph,
    carried: int,
    sliced: int,
    steps: int,
    reverse: bool,
    summed: int = 0,
) -> torch.Tensor:
    """Step by step; every node of the body by its own reference."""
    state, rows = operands[:carried], operands[carried : carried + sliced]
    kept: dict[int, list] = {k: [x] for k, x in enumerate(state)}
    for step in range(steps)[:: -1 if reverse else 1]:
        given = (*state, *(x[step] for x in rows), *operands[carried + sliced :])
        env = dict(zip((p.value for p in body.params), given, strict=True))
        for node in body.nodes:
            args = [env.get(x, x) if isinstance(x, Value) else x for x in node.args]
            env[node.out] = REFERENCE[node.op.name](*args, **dict(node.attrs))
        found = [env[r.value] for r in body.results]
        state = found[:carried]
        for k, x in enumerate(found):
            kept.setdefault(k, []).append(x)
    for k in range(len(kept) - summed, len(kept)):
        kept[k] = [torch.stack(kept[k]).sum(0)]
    lists = (xs[::-1] if reverse else xs for xs in kept.values())
    return torch.cat([x.flatten() for xs in lists for x in xs])


def _flat(a: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    """Parts of each matrix of a batch one after another."""
    batch = a.shape[:-2]
    return torch.cat([x.reshape(*batch, -1).to(a.dtype) for x in parts], -1)


def _triangular_solve(a, b, upper, transposed, unit) -> torch.Tensor:
    a, upper = (a.mT, not upper) if transposed else (a, upper)
    return torch.linalg.solve_triangular(a, b, upper=upper, unitriangular=unit)


def _lu(a: torch.Tensor) -> torch.Tensor:
    both, pivots = torch.linalg.lu_factor(a)
    return _flat(a, both, pivots, torch.lu_unpack(both, pivots)[0].argmax(-2))


def _lu_solve(factors: torch.Tensor, b: torch.Tensor, transposed: bool) -> torch.Tensor:
    n = b.shape[-2]
    both = factors[..., : n * n].reshape(*b.shape[:-1], n)
    pivots = factors[..., n * n : n * n + n].to(torch.int32)
    return torch.linalg.lu_solve(both, pivots, b, adjoint=transposed)


def _eigh(a: torch.Tensor, lower: bool, vectors: bool) -> torch.Tensor:
    half = "L" if lower else "U"
    return _flat(a, *torch.linalg.eigh(a, half)) if vectors else torch.linalg.eigvalsh(a, half)


def _svd(a: torch.Tensor, full: bool, vectors: bool) -> torch.Tensor:
    return _flat(a, *torch.linalg.svd(a, full)) if vectors else torch.linalg.svdvals(a)


def _widened(x: object) -> object:
    half = isinstance(x, torch.Tensor) and x.dtype.itemsize == 2
    return x.float() if half else x


def _scores(q: torch.Tensor, k: torch.Tensor, bias: object, causal: bool, scale: float):
    scores = _widened(q) @ _widened(k).mT * scale + bias
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1) & causal
    return scores.masked_fill(hidden, -math.inf)


def _log_sums(q, k, bias, causal, scale) -> torch.Tensor:
    return _scores(q, k, bias, causal, scale).logsumexp(-1)


def _attention(q, k, v, bias, noise=1.0, *, causal, scale) -> torch.Tensor:
    weights = _scores(q, k, bias, causal, scale).softmax(-1) * noise
    return (weights @ _widened(v)).to(q.dtype)


def _slopes(name, q, k, v, bias, lse, delta, g, noise=1.0, *, causal, scale) -> torch.Tensor:
    weights = (_scores(q, k, bias, causal, scale) - lse[..., None]).exp()
    if name == "attention_dv":
        return ((weights * noise).mT @ _widened(g)).to(q.dtype)
    slopes = weights * (noise * (_widened(g) @ _widened(v).mT) - delta[..., None]) * scale
    found = slopes @ _widened(k) if name == "attention_dq" else slopes.mT @ _widened(q)
    return found.to(q.dtype)


def _sum(x: torch.Tensor, axes) -> torch.Tensor:
    if not axes:
        return x + 0 if x.dtype is not torch.bool else x
    return torch.sum(x, axes, dtype=x.dtype) if x.dtype is not torch.bool else x.any(*axes)


def _philox(counter: object, key: object) -> torch.Tensor:
    counter, key = torch.broadcast_tensors(torch.as_tensor(counter), torch.as_tensor(key))
    low, high = (1 << 32) - 1, lambda x: (x >> 32) & ((1 << 32) - 1)
    left, right, key = counter & low, high(counter) ^ high(key), key & low
    for _ in range(10):
        product = left * 0xD256D193
        left, right = high(product) ^ key ^ right, product & low
        key = (key + 0x9E3779B9) & low
    return left >> 1


def _argsort(x: torch.Tensor, axis: int, count: int, descending: bool, topk: str = ""):
    if topk:
        return torch.topk(x, count, axis, descending, topk == "sorted").indices
    found = torch.sort(x, dim=axis, descending=descending, stable=True).indices
    return found.narrow(axis, 0, count)


# The primitives as eager torch says them.
REFERENCE: dict[str, Callable] = {
    **{name: getattr(torch, name) for name in ("neg", "abs", "sign", "exp", "log", "sqrt")},
    **{name: getattr(torch, name) for name in ("tanh", "sin", "cos", "floor", "trunc")},
    **{name: getattr(torch, name) for name in ("expm1", "log1p", "erf", "erfc", "round")},
    "not": torch.bitwise_not,
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "pow")},
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "xor")},
    **{name: _on_tensors(getattr(torch, name)) for name in ("div", "maximum", "minimum")},
    "floordiv": _on_tensors(torch.floor_divide),
    **{name: _on_tensors(getattr(torch, name)) for name in ("fmod", "copysign", "atan2")},
    "mod": _on_tensors(torch.remainder),
    **{name: getattr(operator, f"{name}_") for name in ("and", "or")},
    **{f"sh{side}": getattr(operator, f"{side}shift") for side in "lr"},
    "philox": _philox,
    **{name: _on_tensors(getattr(torch, name)) for name in ("gcd", "nextafter")},
    "bitcast": lambda x, of, dtype: x.view(TO_TORCH[dtype]),
    "where": torch.where,
    "cast": lambda x, dtype: x.to(TO_TORCH[dtype]),
    "alias": lambda x: x * 1 if x.dtype is not torch.bool else x,
    "after": lambda x, y: x.clone(),
    "reshape": lambda x, shape: x.reshape(shape),
    "permute": lambda x, axes: x.permute(axes),
    "expand": lambda x, shape: x.expand(shape),
    "slice": lambda x, starts, stops, steps: (
        x[tuple(map(slice, starts, stops, steps))] if x.dim() else x.clone()
    ),
    "pad": _pad,
    "flip": lambda x, axes: x.flip(axes),
    "window": _window,
    "unwindow": _unwindow,
    "gather": _gather,
    "scatter": _scatter,
    "cumsum": lambda x, axis: torch.cumsum(x, axis),
    "accumulate": _accumulate,
    "recurrence": _recurrence,
    "argsort": _argsort,
    "reduce_sum": _sum,
    "reduce_max": _axes(torch.amax),
    "reduce_min": _axes(torch.amin),
    "matmul": torch.matmul,
    "scan": _scan,
    "attention": _attention,
    "attention_lse": _log_sums,
    **{name: partial(_slopes, name) for name in GRADIENTS},
    "cholesky": torch.linalg.cholesky,
    "triangular_solve": _triangular_solve,
    "lu": _lu,
    "lu_solve": _lu_solve,
    "qr": lambda a, complete: _flat(a, *torch.linalg.qr(a, "complete" if complete else "reduced")),
    "geqrf": lambda a: _flat(a, *torch.geqrf(a)),
    "eigh": _eigh,
    "svd": _svd,
    "expm": torch.linalg.matrix_exp,
    **dict.fromkeys(("all_reduce", "broadcast", "reduce_to", "all_gather"), _collective),
    **dict.fromkeys(("reduce_scatter", "all_to_all", "gather_ranks"), _collective),
    **{"scatter_ranks": _collective, "barrier": _collective},
    "full": lambda x, shape, dtype, device: torch.full(shape, x, dtype=TO_TORCH[dtype]),
    "iota": _iota,
    **{f"host_{name}": getattr(operator, name) for name in ("add", "sub", "mul", "pow")},
    **{f"host_{name}": getattr(operator, name) for name in ("floordiv", "mod", "neg", "abs")},
    "host_div": operator.truediv,
    **{f"host_{name}": getattr(math, name) for name in MATH if name != "pow"},
    "host_math_pow": math.pow,
    "host_round": round,
    "host_float": float,
    "host_format": format,
    "host_pick": lambda i, *table: table[int(i)],
    "host_find": lambda x, *table: next((i for i, y in enumerate(table) if x == y), -1),
    **{f"host_np_{name}": getattr(np, name) for name in NUMPY},
    "host_f32": lambda x: torch.tensor(x, dtype=torch.float64).float().item(),
    "host_f16": lambda x: torch.tensor(x, dtype=torch.float64).half().item(),
    "host_bf16": lambda x: torch.tensor(x, dtype=torch.float64).bfloat16().item(),
}
