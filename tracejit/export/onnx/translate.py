"""From nodes of the IR to nodes of ONNX: a table with an entry for each primitive.

In: nodes in order, and the names of what they read. Out: nodes in a `Writer`, and the names of
their results. `refusals.py` has refused primitives without a counterpart, which are in `REFUSED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from tracejit.export.onnx.elementwise import ELEMENTWISE, cast
from tracejit.export.onnx.host import HOST
from tracejit.export.onnx.movement import MOVEMENT, window_of_all
from tracejit.export.onnx.structured import STRUCTURED
from tracejit.export.onnx.writer import Writer, body_of, held, is_narrower
from tracejit.ir.graph import Arg, Builder, Node, Value
from tracejit.ir.ops import OPS
from tracejit.ir.ops.attention import WRITTEN
from tracejit.ir.types import DType, Type, f32, f64, round_to

_OF_LAPACK = "it is a decomposition of LAPACK, or a solution by one, and ONNX has none"
_LAPACK_REMEDY = "Compute it outside of what you export, and pass its result"
_OF_RANKS = "the ranks of a process group do it together, and a model runs alone"
_RANKS_REMEDY = "Export a step without collectives"
REFUSED = {  # what ONNX has no counterpart of, and what to do
    "nextafter": ("ONNX has no operator on the bits of a float", "Add a small number instead"),
    "bitcast": ("ONNX has no operator on the bits of a float", "Compute with the number instead"),
    "host_format": ("ONNX has no text", "Return the number, and make text of it outside"),
    "host_np_nextafter": ("ONNX has no operator on the bits of a float", "Add a small number"),
    **{name: (_OF_LAPACK, _LAPACK_REMEDY) for name, op in OPS.items() if op.family == "matrices"},
    **{name: (_OF_RANKS, _RANKS_REMEDY) for name, op in OPS.items() if op.family == "collective"},
}
_FIRST = 1 << 40  # numbers of values that no graph has


Small = tuple[str, tuple[int, ...]]  # a name, and its shape, which broadcasts to a value's


class Translator:
    """Writes nodes. A value that is spread over axes is written small, and spread out where it is
    read by something that does not broadcast."""

    def __init__(self, w: Writer, env: Mapping[Value, str]):
        """`env` has the names of values, and grows."""
        self.w = w
        self.env = dict(env)
        self.small: dict[Value, Small] = {}
        self._next = _FIRST

    def run(self, nodes: Iterable[Node]) -> None:
        """Translate nodes in order."""
        for node in nodes:
            self.node(node)

    def node(self, node: Node) -> None:
        """Translate one node."""
        self.w.line = node.where or self.w.line
        found = TABLE[node.op.name](self, node)
        if isinstance(found, tuple) and found[1] != node.out.type.shape:
            self.small[node.out] = found
        else:
            self.env[node.out] = found[0] if isinstance(found, tuple) else found

    def name(self, value: Value) -> str:
        """The name of a value."""
        if value not in self.env:
            self.env[value] = self.w.full(self.small[value][0], value.type.shape)
        return self.env[value]

    def spread(self, value: Value) -> Small:
        """A value as it is written; its shape broadcasts to the value's."""
        if value in self.small and value.type.numel:
            return self.small[value]
        return self.name(value), value.type.shape

    def operand(self, arg: Arg, dtype: DType) -> Small:
        """A tensor, or a literal or host value beside tensors of a dtype."""
        if not isinstance(arg, Value):
            return self.w.constant(arg, held(dtype)), ()
        if arg.type.is_host:
            name = self.name(arg)
            return (name if dtype is f64 else self.w.cast(name, held(dtype))), ()
        return self.spread(arg)


def _operand_dtype(node: Node) -> DType:
    """The dtype of an element-wise primitive's tensors; of `where`, of what it chooses from."""
    if node.op.name == "where":
        return node.out.type.dtype
    return next(a.type.dtype for a in node.inputs if not a.type.is_host)


def _elementwise(t: Translator, node: Node) -> Small:
    kind, to = _operand_dtype(node), node.out.type.dtype
    operands = [t.operand(a, kind) for a in node.args]
    found = ELEMENTWISE[node.op.name](t.w, kind, *(name for name, _ in operands))
    shape = np.broadcast_shapes(*(shape for _, shape in operands))
    if is_narrower(to) and (node.op.rounds or not to.is_float) and node.op.name != "alias":
        found = t.w.rounded(found, to)
    return found, shape


def _cast(t: Translator, node: Node) -> Small:
    (x,) = node.inputs
    name, shape = t.spread(x)
    return cast(t.w, name, x.type.dtype, node.out.type.dtype), shape


def _expand(t: Translator, node: Node) -> Small | str:
    if not node.out.type.numel:
        return t.w.constant(np.zeros(node.out.type.shape), held(node.out.type.dtype))
    return t.spread(node.args[0])


def _after(t: Translator, node: Node) -> Small:
    return t.spread(node.args[0])


def _permute(t: Translator, node: Node) -> Small | str:
    name, shape = t.spread(node.args[0])
    axes = node.attr("axes")
    if axes == (*range(len(axes)),) or not shape:
        return name, shape
    return t.w.Transpose(name, perm=axes), tuple(shape[a] for a in axes)


def _window(t: Translator, node: Node) -> Small | str:
    """Of what is spread over the taps, without spreading it."""
    (x,), (axis, taps) = node.args, node.attr("axes")
    name, shape = t.spread(x)
    if len(shape) != len(x.type.shape) or shape[taps] != 1 or shape[axis] != x.type.shape[axis]:
        return MOVEMENT["window"](t.w, node, t.name(x))
    return window_of_all(t.w, node, name, shape)


def _iota(t: Translator, node: Node) -> Small:
    kind, axis = node.out.type, node.attr("axis")
    row = t.w.row(np.arange(kind.shape[axis]).astype(held(kind.dtype)), axis, len(kind.shape))
    shape = tuple(n if k == axis else 1 for k, n in enumerate(kind.shape))
    return t.w.rounded(row, kind.dtype), shape


def _on_tensors(table: Mapping[str, Callable[..., str]]) -> Callable[[Translator, Node], str]:
    """An entry of a table whose operands are tensors."""

    def translated(t: Translator, node: Node) -> str:
        found = table[node.op.name](t.w, node, *map(t.name, node.inputs))
        rounds = node.op.rounds and is_narrower(node.out.type.dtype)
        return t.w.rounded(found, node.out.type.dtype) if rounds else found

    return translated


def _full(t: Translator, node: Node) -> Small | str:
    (value,), kind = node.args, node.out.type
    if isinstance(value, Value):
        x = cast(t.w, t.name(value), f64, kind.dtype)
    else:
        x = t.w.constant(round_to(np.asarray(value), kind.dtype), held(kind.dtype))
    return (x, ()) if kind.numel else t.w.full(x, kind.shape)


def _host(t: Translator, node: Node) -> str:
    return HOST[node.op.name](t.w, *(t.operand(a, f64)[0] for a in node.args))


def _written_out(t: Translator, node: Node) -> str:
    """Attention, by the primitives that it stands for."""
    b = Builder(t._next)
    b.line = node.where
    out = WRITTEN[node.op.name](b, *node.args, **dict(node.attrs))
    t._next = b.next_id
    t.run(b.nodes)
    return t.name(out)


def _scan(t: Translator, node: Node) -> str:
    """Scan: what is carried goes round, and so do sums; the rest is stacked. Then all lies flat."""
    w, body, attrs = t.w, node.attr("body"), dict(node.attrs)
    carried, sliced, steps = (attrs[name] for name in ("carried", "sliced", "steps"))
    summed, backward = attrs.get("summed", 0), int(attrs["reverse"])
    operands = [*map(t.name, node.args)]
    kinds = [result.value.type for result in body.results]
    kept, sums = kinds[: len(kinds) - summed], kinds[len(kinds) - summed :]
    states = [*kinds[:carried], *sums]
    read = [p.value.type for p in body.params[carried : carried + sliced]]
    given = [
        *operands[:carried],
        *(w.filled(0, kind.shape, held(kind.dtype)) for kind in sums),
        *operands[carried : carried + sliced],
    ]
    if not read:  # ONNX counts the steps by what is read row by row
        read = [Type(f32, ())]
        given.append(w.constant(np.zeros(steps), np.float32))
    inner = Writer(w)
    going = [inner.name("carried") for _ in states]
    rows = [inner.name("row") for _ in read]
    inside = [*going[:carried], *rows[:sliced], *operands[carried + sliced :]]
    of_body = Translator(inner, zip((p.value for p in body.params), inside, strict=True))
    of_body.run(body.nodes)
    found = [of_body.name(result.value) for result in body.results]
    totals = zip(going[carried:], found[len(kept) :], strict=True)
    results = [
        *(inner.Identity(x) for x in found[:carried]),
        *(inner.Add(*total) for total in totals),
        *(inner.Identity(x) for x in found[: len(kept)]),
    ]
    graph = body_of(
        inner,
        [*zip(going + rows, states + read, strict=True)],
        [*zip(results, states + kept, strict=True)],
    )
    directions = {
        "scan_input_directions": [backward] * len(read),
        "scan_output_directions": [backward] * len(kept),
    }
    made = w.several(
        "Scan", given, len(results), body=graph, num_scan_inputs=len(read), **directions
    )
    flat: list[tuple[str, int]] = []
    for k, (rows_of, kind) in enumerate(zip(made[len(states) :], kept, strict=True)):
        first = [(operands[k], kind.numel)] if k < carried else []
        row = rows_of, steps * kind.numel
        flat += [row, *first] if backward else [*first, row]
    flat += zip(made[carried : len(states)], (kind.numel for kind in sums), strict=True)
    parts = [w.reshape(x, (size,)) for x, size in flat]
    return w.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]


TABLE: dict[str, Callable[[Translator, Node], str]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(MOVEMENT, _on_tensors(MOVEMENT)),
    **dict.fromkeys(STRUCTURED, _on_tensors(STRUCTURED)),
    **{name: _host for name in HOST if name in OPS},
    **dict.fromkeys(WRITTEN, _written_out),
    **{"cast": _cast, "full": _full, "scan": _scan, "expand": _expand, "permute": _permute},
    **{"window": _window, "iota": _iota, "after": _after},
}
