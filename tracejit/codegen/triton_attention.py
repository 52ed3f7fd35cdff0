"""Attention: generated loads, scores and stores around the hand-written kernels.

Printed are the functions that `tracejit.kernels.attention` asks for, and the kernel itself, which
names its sizes and calls one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.codegen.language import Line
from tracejit.codegen.triton_body import Body
from tracejit.codegen.triton_forms import Function, MakeBody
from tracejit.codegen.triton_matmul import batch_axes, plain_load, tile_function, tuple_text
from tracejit.codegen.triton_text import MEMORY_TYPE, Dim, compute_type, product, rounded
from tracejit.errors import InvalidGraph
from tracejit.ir.types import DType
from tracejit.kernels.tiles import dot_path
from tracejit.records import dataclass
from tracejit.schedule.kernel import Attend, Axis, Kernel, Stage, axes_of_result

TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_C", "BLOCK_D")
FORWARD = ("attention", "attention_lse")
GRADIENTS = ("attention_dq", "attention_dk", "attention_dv")


@dataclass(frozen=True)
class Attention:
    """The parts of a kernel of attention."""

    stage: Stage
    attend: Attend
    batch: tuple[Axis, ...]

    @property
    def dtype(self) -> DType:
        """The dtype of q, k and v."""
        return self.attend.side("q").value.dtype

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that are read as tiles, in the order in which the kernels take them."""
        has_v = bool(self.attend.side("v").body)
        return tuple(n for n in self.attend.names if n != "bias" and (n != "v" or has_v))

    def dims(self, axes: Sequence[Axis]) -> tuple[Dim, ...]:
        """Dims of a tile over some of the axes m, n, c, d, and the ranges that functions get."""
        names = {id(a): name for a, name in zip(self.attend.axes, "mncd", strict=True)}
        return tuple(Dim(n := names[id(a)], (a,), f"r{n}.shape[0]") for a in axes)


def attention_of(kernel: Kernel) -> Attention:
    """Take a kernel of attention apart; raise InvalidGraph if it has another form."""
    first, *rest = kernel.stages
    if first.attend is None or kernel.axes or rest:
        raise InvalidGraph(reason="attention is a kernel's only stage")
    return Attention(first, first.attend, first.axes)


def attention(
    kernel: Kernel, precision: str, part: str = "", make: MakeBody = Body
) -> tuple[Function, list[str]]:
    """The kernel's function, and the text of the functions that it hands over."""
    a = attention_of(kernel)
    attend, functions = a.attend, {}
    printers = {"load": _load, "store": _store}
    for function in functions_of(a):
        kind, _, name = function.partition("_")
        body = make(kernel)
        text = printers[kind](body, a, name, part) if name else _score(body, a, part)
        functions[function] = text

    def handed(*names: str) -> str:
        return ", ".join(f"{n}{part}" if n in functions else "None" for n in names) + ","

    b, m, n = (product([x.extent for x in axes]) for axes in (a.batch, [attend.m], [attend.n]))
    arguments = [
        f"{tuple_text([b.name for b in kernel.buffers])},",
        "scalars," if kernel.scalars else "None,  # no runtime scalars",
        f"{tuple_text(kernel.sizes)},",
        handed("load_q", "load_k", "load_v", "score", "load_noise"),
    ]
    if attend.is_forward:
        called = "attend_forward"
        arguments += [handed(*(f"store_{name}" for name in FORWARD)), f"{m}, {n},"]
    else:
        called = "attend_gradients"
        arguments.append(handed("load_lse", "load_delta", "load_g"))
        arguments += [handed(*(f"store_{name}" for name in GRADIENTS)), f"{b}, {m}, {n},"]
    types = f"{compute_type(a.dtype)}, {MEMORY_TYPE[a.dtype.name]},"
    arguments += [
        f"{', '.join(TILE)},",
        f'{attend.causal}, {attend.scale!r}, "{precision}", "{dot_path(a.dtype.name)}",',
        types + (" FIRST," if part else ""),
    ]
    lines = [Line(f"{called}("), *(Line(f"    {text}") for text in arguments), Line(")")]
    return Function(tuple(lines), TILE), list(functions.values())


def functions_of(a: Attention) -> tuple[str, ...]:
    """The functions that are printed, in their order."""
    loads = (f"load_{name}" for name in a.sides)
    return (*loads, "score", *(f"store_{op.name}" for op, _ in a.attend.results))


def _head(name: str, dims: Sequence[Dim], part: str, first: str = "") -> str:
    ranges = ", ".join(f"r{d.name}" for d in dims)
    return f"def {name}{part}({first}bufs, scalars, SIZES, b, {ranges}):"


def _enter(body: Body, a: Attention, axes: Sequence[Axis]) -> tuple[Dim, ...]:
    dims = a.dims(axes)
    body.enter(*dims)
    batch_axes(body, a.batch)
    return dims


def _load(body: Body, a: Attention, name: str, part: str) -> str:
    """The function that loads a tile of an operand, zero outside."""
    at = a.attend.names.index(name)
    side, dims = a.attend.sides[at], _enter(body, a, a.attend.over[at])
    everywhere = frozenset(body.dims)
    dtype = a.dtype if name in ("q", "k", "v", "g") else side.value.dtype
    result = plain_load(body, side.body, side.value, everywhere)
    if result is None:
        body.emit(side.body)
        text = body.operand(side.value, dtype, typed=True)
        result = f"tl.where({body.mask(everywhere)}, {text}, 0.0)"
        if dtype.narrow:
            result += f".to({MEMORY_TYPE[dtype.name]})"
    body.lines.append(Line(f"return {result}"))
    head = _head(f"load_{name}", dims, part)
    return tile_function(body, a.batch, head, f"A tile of {name}, zero outside.", dims)


def _score(body: Body, a: Attention, part: str) -> str:
    """The function that adds the bias to scaled products, and hides keys."""
    side, dims = a.attend.side("bias"), _enter(body, a, (a.attend.m, a.attend.n))
    body.emit(side.body)
    if side.body or side.value != 0:
        bias = body.operand(side.value, a.dtype, typed=True)
        body.lines.append(Line(f"s = s + {bias}", a.attend.where))
    seen = body.mask(frozenset(body.dims))  # no query either: gradients sum over them
    if a.attend.causal:
        seen += " & (rn[None, :] <= rm[:, None])"
    body.lines.append(Line(f'return tl.where({seen}, s, float("-inf"))'))
    doc = "The scores of scaled products: with their bias, -inf where a key is hidden."
    return tile_function(body, a.batch, _head("score", dims, part, "s, "), doc, dims)


def _store(body: Body, a: Attention, name: str, part: str) -> str:
    """The function that stores a tile of a result."""
    dims = _enter(body, a, axes_of_result(a.attend, name))
    out = a.attend.result(name)
    everywhere = frozenset(body.dims)
    if out.dtype.narrow:
        text = rounded("acc", out.dtype)
        body.lines.append(Line(f"{body.define(out, everywhere)} = {text}", a.attend.where))
    else:
        body.define(out, everywhere, "acc")
    body.emit(s for s in a.stage.body if s.value == out)
    head = _head(f"store_{name}", dims, part, "acc, ")
    return tile_function(body, a.batch, head, f"Stores a tile of {out!r}.", dims)
