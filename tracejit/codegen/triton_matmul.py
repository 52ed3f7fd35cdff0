"""Kernels with a contraction: generated loads and epilogue around the hand-written matmul.

Printed are `load_a`, `load_b` and `epilogue`, in the forms that `tracejit.kernels.matmul` asks
for, and the kernel itself, which names its sizes and calls that matmul with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tracejit.codegen.language import Line
from tracejit.codegen.triton_body import NO_DIMS, Body
from tracejit.codegen.triton_forms import Function, MakeBody, last_program
from tracejit.codegen.triton_text import (
    MEMORY_TYPE,
    TRITON,
    Dim,
    compute_type,
    fold_of,
    product,
    rounded,
    unravel,
)
from tracejit.errors import InvalidGraph
from tracejit.ir.types import DType
from tracejit.kernels.tiles import dot_path
from tracejit.records import dataclass
from tracejit.schedule.kernel import Axis, Dot, Kernel, Load, Operand, Stage, Statement, Var

TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")
SPLIT = ("SPLITS", "GROUP", "COUNTERS", "PARTIALS")  # of a product whose k is cut
PIECES = ("PIECES",)  # of one whose epilogue goes over a tile in several


@dataclass(frozen=True)
class Contraction:
    """The parts of a matmul kernel."""

    stage: Stage
    dot: Dot
    batch: tuple[Axis, ...]
    m: Axis
    n: Axis
    tail: tuple[Stage, ...]

    @property
    def dtype(self) -> DType:
        """The dtype of both operands."""
        values = (self.dot.a_value, self.dot.b_value, self.dot.out)
        return next(v.dtype for v in values if isinstance(v, Var))

    @property
    def total(self) -> int:
        """Bytes of an accumulator."""
        return self.dtype.compute.itemsize if self.dtype.is_float else 8

    def tile_dims(self, names: str, even: str = "") -> tuple[Dim, Dim]:
        """Two of the dims m, n, k, over the ranges rm, rn, rk that the functions get; of the `even`
        ones tiles end where the matrix does."""
        axes = {"m": self.m, "n": self.n, "k": self.dot.k}
        return tuple(
            Dim(name, (axes[name],), f"r{name}.shape[0]", full=name in even) for name in names
        )


def contraction(kernel: Kernel) -> Contraction:
    """Take a matmul kernel apart; raise InvalidGraph if it has another form."""
    first, *tail = kernel.stages
    if first.dot is None or kernel.axes or any(s.axes or s.dot for s in tail):
        raise InvalidGraph(reason="a contraction is a kernel's first stage, alone with its axes")
    *batch, m, n = first.axes
    return Contraction(first, first.dot, tuple(batch), m, n, tuple(tail))


def variant_of(even: str, split: bool, pieces: bool) -> str:
    """What the sizes demand of the text, in words."""
    words = [f"even_{even}"] if even else []
    return "_".join([*words, *(["split"] if split else []), *(["pieces"] if pieces else [])])


def matmul(
    kernel: Kernel, precision: str, variant: str = "", part: str = "", make: MakeBody = Body
) -> tuple[Function, list[str]]:
    """The kernel's function, and the text of the functions that it hands to the matmul."""
    c, words = contraction(kernel), variant.split("_")
    even = words[1] if words[0] == "even" else ""
    split = "split" in words
    loads = [_load(make(kernel), c, side, part, even) for side in ("a", "b")]
    epilogue, imports = _epilogue(make(kernel), c, part, even)
    functions = [*loads, epilogue]
    b, m, n, k = (product([a.extent for a in axes]) for axes in (c.batch, [c.m], [c.n], [c.dot.k]))
    dtype = c.dtype
    total = compute_type(dtype) if dtype.is_float else "tl.int64"
    arguments = [
        f"{tuple_text([b.name for b in kernel.buffers])},",
        "scalars," if kernel.scalars else "None,  # no runtime scalars",
        "workspace," if imports or split else "None,  # no full reductions",
        f"{tuple_text(kernel.sizes)},",
        f"load_a{part}, load_b{part}, epilogue{part},",
        f"{b}, {m}, {n}, {k},",
        f"{', '.join(TILE)},",
        f'"{precision}", "{dot_path(dtype.name)}", {total},',
    ]
    more = (SPLIT if split else ()) + (PIECES if "pieces" in words else ())
    constants = (*TILE, *more)
    named = [f"{name}={name}" for name in (*more, *(["FIRST"] if part else []))]
    arguments += [f"{', '.join(named)},"] if named else []
    lines = [Line("matmul("), *(Line(f"    {text}") for text in arguments), Line(")")]
    return Function(tuple(lines), constants, imports, has_workspace=split), functions


def tuple_text(names: Sequence[str]) -> str:
    """A tuple of names as text."""
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"


def _load(body: Body, c: Contraction, side: str, part: str, even: str) -> str:
    """load_a or load_b: a tile of one operand, zero outside the matrix."""
    if side == "a":
        first, second = c.tile_dims("mk", even)
        statements, value, ranges = c.dot.a, c.dot.a_value, ("rm", "rk")
    else:
        first, second = c.tile_dims("kn", even)
        statements, value, ranges = c.dot.b, c.dot.b_value, ("rk", "rn")
    body.enter(first, second)
    batch_axes(body, c.batch)
    everywhere = frozenset(body.dims)
    result = plain_load(body, statements, value, everywhere)
    if result is None:
        body.emit(statements)
        text = body.operand(value, c.dtype, typed=True)
        zero = "0.0" if c.dtype.is_float else "0"
        result = body.where_inside(text, zero, everywhere, body.value_dims(value))
        if c.dtype.narrow:
            result += f".to({MEMORY_TYPE[c.dtype.name]})"
    head = f"def load_{side}{part}(bufs, scalars, SIZES, b, {', '.join(ranges)}):"
    shape = f"[BLOCK_{first.name.upper()}, BLOCK_{second.name.upper()}]"
    doc = f"A {shape} tile of operand {side}, zero outside."
    body.lines.append(Line(f"return {result}"))
    return tile_function(body, c.batch, head, doc, (first, second))


def plain_load(
    body: Body, statements: tuple[Statement, ...], value: Operand, everywhere: frozenset[str]
) -> str | None:
    """The load of an operand that is nothing but a load over the whole tile, else None."""
    if len(statements) != 1 or not isinstance(statements[0], Load) or statements[0].out != value:
        return None
    if body.load_dims(statements[0]) != everywhere:
        return None
    before, text = body.load_text(statements[0], zero_outside=True)
    body.lines += before
    return text


def _epilogue(body: Body, c: Contraction, part: str, even: str) -> tuple[str, tuple[str, ...]]:
    """The epilogue, and what it imports from tracejit.kernels.reduce."""
    m, n = c.tile_dims("mn", even)
    body.enter(m, n)
    batch_axes(body, c.batch)
    out, dtype = c.dot.out, c.dot.out.dtype
    everywhere = frozenset(body.dims)
    if dtype.narrow or not dtype.is_float:
        text = rounded("acc", dtype) if dtype.narrow else f"acc.to({compute_type(dtype)})"
        body.lines.append(Line(f"{body.define(out, everywhere)} = {text}", c.dot.where))
    else:
        body.define(out, everywhere, "acc")
    reductions = body.emit(c.stage.body)
    totals = {}
    for r in reductions:
        totals[r] = f"{r.out!r}_{fold_of(r).kind}"
        body.lines.append(Line(f"{totals[r]} = {body.reduced_value(r, everywhere)}", r.where))
    lines, imports = body.lines, ()
    if reductions:
        body.lines = []
        body.leave(m)
        body.leave(n)
        last, imports = last_program(body, reductions, totals, list(c.tail), "num_tiles")
        lines = [*lines, *last]
    elif c.tail:
        raise InvalidGraph(reason="a contraction's tail follows a full reduction")
    body.lines = lines
    head = f"def epilogue{part}(acc, bufs, scalars, workspace, SIZES, b, rm, rn, pid, num_tiles):"
    doc = f"What follows from the accumulated tile of {out!r}."
    return tile_function(body, c.batch, head, doc, (m, n)), imports


def batch_axes(body: Body, batch: Sequence[Axis]) -> None:
    """The batch axes are scalars, the same for a whole tile."""
    for axis in batch:
        body.axis_text[axis.name] = ("0" if axis.extent == 1 else axis.name, NO_DIMS)


def tile_function(
    body: Body, batch: Sequence[Axis], head: str, doc: str, dims: Sequence[Dim]
) -> str:
    """A jit function around the body's lines, of the batch `b` and a range for each dim (`rm` of
    m): it unpacks what it uses of bufs and SIZES."""
    wide = ".to(tl.int64)" if body.kernel.index64 else ""
    places = ("[:, None]", "[None, :]") if len(dims) == 2 else ("",)
    lines = unravel(batch, f"b{wide}", {a.name for a in batch} & body.used)
    for dim, place in zip(dims, places, strict=True):
        lines += body.prelude(dim, f"r{dim.name}{place}{wide}")
    lines += [*body.scalar_lines(), *body.lines]
    names = set(re.findall(r"\w+", " ".join(line.text for line in lines)))
    unpack = [
        Line(f"{size}: tl.constexpr = SIZES[{i}]")
        for i, size in enumerate(body.kernel.sizes)
        if size in names
    ]
    unpack += [
        Line(f"{buffer.name} = bufs[{i}]")
        for i, buffer in enumerate(body.kernel.buffers)
        if buffer.name in names
    ]
    text = [
        Line("@triton.jit"),
        Line(head),
        *TRITON.indent([Line(f'"""{doc}"""'), *unpack, *lines]),
    ]
    return TRITON.render(text)
