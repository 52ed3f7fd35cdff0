"""View chains: how a tensor's value is read from its storage's, and written back to it.

A step is a movement primitive and its attributes, or a *stretch*: the elements of an axis from a
place on that is known only when the plan runs, as in `buffer[self.n]`, or a *pick*: the elements of
a row at fixed places, as `as_strided` has them, or the *bits* as numbers of another dtype, or of
complex numbers the *conjugates*. In: the storage's value and the steps. Out: the value of the view;
or, once the view was written to, the storage's new value.

The value of a complex tensor has one more axis, the last one: its real and imaginary parts.
"""

from __future__ import annotations

from tracejit.capture.trace.state import TraceState
from tracejit.capture.trace.tensor import Ints, Step
from tracejit.ir import types
from tracejit.ir.graph import Builder, Value
from tracejit.ir.ops.rare import BITS_OF
from tracejit.ir.types import DType, i8, i16, i32, i64

STRETCH = "stretch"
PICK = "pick"
BITS = "bits"
CONJ: Step = ("conj", ())
_CONJ = CONJ[0]


def stretch(axis: int, size: int, at: Value) -> Step:
    """`size` elements of an axis from the place `at` on, an i64 of no axes; all are inside."""
    return STRETCH, (("axis", axis), ("size", size), ("at", at))


def pick(shape: Ints, strides: Ints, start: int) -> Step:
    """The elements start + Σ i·stride of a row, for all i below `shape`; all are inside."""
    return PICK, (("shape", shape), ("strides", strides), ("start", start))


def bits(dtype: DType) -> Step:
    """The same bytes as numbers of a dtype; of another size, the last axis is longer or shorter."""
    return BITS, (("dtype", dtype),)


def of_pairs(step: Step) -> Step:
    """A step of a complex tensor, as one of the pairs that it consists of."""
    name, attrs = step
    attrs = dict(attrs)
    if name in ("reshape", "expand"):
        attrs["shape"] = (*attrs["shape"], 2)
    elif name == "permute":
        attrs["axes"] = (*attrs["axes"], len(attrs["axes"]))
    elif name == "slice":
        more = {"starts": 0, "stops": 2, "steps": 1}
        attrs = {key: (*at, more[key]) for key, at in attrs.items()}
    else:
        assert name in (STRETCH, _CONJ), name
    return name, tuple(attrs.items())


def is_conjugate(steps: tuple[Step, ...]) -> bool:
    """Whether a view shows the conjugates of what lies in memory."""
    return steps.count(CONJ) % 2 == 1


def conjugates(b: Builder, pairs: Value) -> Value:
    """The imaginary parts negated."""
    shape = pairs.type.shape
    part = b.iota(axis=len(shape) - 1, shape=shape, dtype=i64, device=pairs.type.device)
    return b.where(b.lt(part, 1), pairs, b.neg(pairs))


def reads_bits(steps: tuple[Step, ...]) -> bool:
    """Whether a view has another dtype than what it is a view of."""
    return any(name == BITS for name, _ in steps)


def repeats(steps: tuple[Step, ...]) -> bool:
    """Whether several elements of a view may be one in memory."""
    picks = (dict(attrs) for name, attrs in steps if name == PICK)
    expanded = any(name == "expand" for name, _ in steps)
    return expanded or any(_meet(p["shape"], p["strides"]) for p in picks)


def _meet(shape: Ints, strides: Ints) -> bool:
    """Whether two places may be one: no axis goes past all that those of shorter strides reach."""
    reach = 0
    for stride, n in sorted((st, n) for st, n in zip(strides, shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += (n - 1) * stride
    return False


def apply_steps(t: TraceState, value: Value, steps: tuple[Step, ...]) -> Value:
    """Follow a view chain from a storage's value."""
    for name, attrs in steps:
        if name == STRETCH:
            value = _read(t, value, **dict(attrs))
        elif name == PICK:
            index = places(t, value, **dict(attrs))
            picked = t.b.gather(value, index, axis=0)
            value = t.b.reshape(picked, shape=dict(attrs)["shape"])
        elif name == BITS:
            value = as_bits(t.b, value, **dict(attrs))
        elif name == _CONJ:
            value = conjugates(t.b, value)
        else:
            value = getattr(t.b, name)(value, **dict(attrs))
    return value


def put_through(t: TraceState, base: Value, steps: tuple[Step, ...], new: Value) -> Value:
    """The base's value after `new` was written through a view chain."""
    if not steps:
        return new
    (name, attrs), rest = steps[0], steps[1:]
    attrs = dict(attrs)
    if rest:
        new = put_through(t, apply_steps(t, base, steps[:1]), rest, new)
    b, shape = t.b, base.type.shape
    if name == STRETCH:
        return _write(t, base, new, **attrs)
    if name == PICK:
        row = b.reshape(new, shape=(new.type.numel,))
        return b.scatter(base, places(t, base, **attrs), row, axis=0, combine="last")
    if name == BITS:
        return as_bits(b, new, base.type.dtype)
    if name == _CONJ:
        return conjugates(b, new)
    if name == "reshape":
        return b.reshape(new, shape=shape)
    if name == "permute":
        axes = attrs["axes"]
        return b.permute(new, axes=tuple(sorted(range(len(axes)), key=axes.__getitem__)))
    assert name == "slice", name  # writes through expand are refused before
    starts, steps_ = attrs["starts"], attrs["steps"]
    if new.type.shape == shape:
        return new
    rows = list(zip(shape, starts, new.type.shape, steps_, strict=True))
    ends = [lo + (n - 1) * st + 1 if n else lo for _, lo, n, st in rows]
    pads = {
        "low": starts,
        "high": tuple(size - end for (size, *_), end in zip(rows, ends, strict=True)),
        "interior": tuple(st - 1 for st in steps_),
    }
    inside = b.full(True, shape=new.type.shape, dtype=types.b1, device=new.type.device)
    inside = b.pad(inside, **pads, value=False)
    return b.where(inside, b.pad(new, **pads, value=0), base)


def _read(t: TraceState, x: Value, *, axis: int, size: int, at: Value) -> Value:
    """The elements in a stretch."""
    with t.untaped():
        out = _taken(t.b, x, axis, size, at)

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        inside, rows = _spread(b, cts[0], axis, x.type.shape[axis], at)
        return (b.where(inside, rows, 0.0),)

    return t.derive(STRETCH, (x,), out, vjp)


def _write(t: TraceState, x: Value, new: Value, *, axis: int, size: int, at: Value) -> Value:
    """`x` with other elements in a stretch."""
    with t.untaped():
        inside, rows = _spread(t.b, new, axis, x.type.shape[axis], at)
        out = t.b.where(inside, rows, x)

    def vjp(b: Builder, cts: tuple, need: tuple) -> tuple:
        (g,) = cts
        return (
            b.where(inside, 0.0, g) if need[0] else None,
            _taken(b, g, axis, size, at) if need[1] else None,
        )

    return t.derive("copy_", (x, new), out, vjp)


def _taken(b: Builder, x: Value, axis: int, size: int, at: Value) -> Value:
    shape = tuple(size if k == axis else n for k, n in enumerate(x.type.shape))
    index = b.expand(b.reshape(at, shape=(1,) * len(shape)), shape=shape)
    if size != 1:
        index = b.add(index, b.iota(axis=axis, shape=shape, dtype=i64, device=x.type.device))
    return b.gather(x, index, axis=axis)


def _spread(b: Builder, x: Value, axis: int, extent: int, at: Value) -> tuple[Value, Value]:
    """The elements of a stretch over all places of its axis, and which of these are inside it."""
    size, device = x.type.shape[axis], x.type.device
    shape = tuple(extent if k == axis else n for k, n in enumerate(x.type.shape))
    place = b.iota(axis=axis, shape=shape, dtype=i64, device=device)
    at = b.expand(b.reshape(at, shape=(1,) * len(shape)), shape=shape)
    if size == 1:
        return b.eq(place, at), b.expand(x, shape=shape)
    place = b.sub(place, at)
    inside = b.and_(b.ge(place, 0), b.lt(place, size))
    return inside, b.gather(x, place, axis=axis)


def places(t: TraceState, row: Value, *, shape: Ints, strides: Ints, start: int) -> Value:
    """Where in a row the elements stand that are picked: a row as well."""
    b, device = t.b, row.type.device
    total = b.full(start, shape=shape, dtype=i64, device=device)
    for axis, stride in enumerate(strides):
        if shape[axis] > 1 and stride:
            place = b.iota(axis=axis, shape=shape, dtype=i64, device=device)
            total = b.add(total, b.mul(place, stride))
    return b.reshape(total, shape=(total.type.numel,))


_INTEGER = {1: i8, 2: i16, 4: i32, 8: i64}  # by size


def as_bits(b: Builder, x: Value, dtype: DType) -> Value:
    """The bytes of a value as numbers of a dtype. The first of several in one is its low part."""
    of = x.type.dtype
    if of is dtype:
        return x
    if of in BITS_OF:
        x = b.bitcast(x, of=of, dtype=BITS_OF[of])
    size, wanted = of.itemsize, dtype.itemsize
    if size > wanted:
        x = _taken_apart(b, x, size // wanted, _INTEGER[wanted])
    elif size < wanted:
        x = _put_together(b, x, wanted // size, _INTEGER[wanted])
    if dtype in BITS_OF:
        return b.bitcast(x, of=BITS_OF[dtype], dtype=dtype)
    return x if x.type.dtype is dtype else b.cast(x, dtype=dtype)


def _taken_apart(b: Builder, x: Value, count: int, to: DType) -> Value:
    """Each integer of a row as `count` smaller ones, in the place of it."""
    *batch, n = x.type.shape
    kind, shape = x.type.dtype, (*batch, n, count)
    wide = b.expand(b.reshape(x, shape=(*batch, n, 1)), shape=shape)
    place = b.iota(axis=len(shape) - 1, shape=shape, dtype=kind, device=x.type.device)
    parts = b.cast(b.shr(wide, b.mul(place, 8 * to.itemsize)), dtype=to)
    return b.reshape(parts, shape=(*batch, n * count))


def _put_together(b: Builder, x: Value, count: int, to: DType) -> Value:
    """Each `count` integers of a row as a larger one."""
    *batch, n = x.type.shape
    size, shape = 8 * x.type.dtype.itemsize, (*batch, n // count, count)
    parts = b.and_(b.cast(b.reshape(x, shape=shape), dtype=to), (1 << size) - 1)
    place = b.iota(axis=len(shape) - 1, shape=shape, dtype=to, device=x.type.device)
    return b.reduce_sum(b.shl(parts, b.mul(place, size)), axes=(len(shape) - 1,))
