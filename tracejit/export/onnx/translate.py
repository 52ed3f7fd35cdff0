"""From nodes of the IR to nodes of ONNX: a table with an entry for each primitive.

In: nodes in order, and the names of what they read. Out: nodes in a `Writer`, and the names of
their results. `refusals.py` has refused primitives without a counterpart, which are in `REFUSED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from tracejit.export.onnx.elementwise import ELEMENTWISE, cast
from tracejit.export.onnx.host import HOST
from tracejit.export.onnx.movement import MOVEMENT
from tracejit.export.onnx.structured import STRUCTURED
from tracejit.export.onnx.writer import Writer, body_of, held, is_narrower
from tracejit.ir.graph import Arg, Builder, Node, Value
from tracejit.ir.ops import OPS
from tracejit.ir.ops.attention import WRITTEN
from tracejit.ir.types import DType, Type, f32, f64, round_to

_OF_LAPACK = "it is a decomposition of LAPACK, or a solution by one, and ONNX has none"
_LAPACK_REMEDY = "Compute it outside of what you export, and pass its result"
REFUSED = {  # what ONNX has no counterpart of, and what to do
    "nextafter": ("ONNX has no operator on the bits of a float", "Add a small number instead"),
    "host_format": ("ONNX has no text", "Return the number, and make text of it outside"),
    "host_np_nextafter": ("ONNX has no operator on the bits of a float", "Add a small number"),
    **{name: (_OF_LAPACK, _LAPACK_REMEDY) for name, op in OPS.items() if op.family == "matrices"},
}
_FIRST = 1 << 40  # numbers of values that no graph has


class Translator:
    """Writes nodes; `env` has the names of values, and grows."""

    def __init__(self, w: Writer, env: Mapping[Value, str]):
        self.w = w
        self.env = dict(env)
        self._next = _FIRST

    def run(self, nodes: Iterable[Node]) -> None:
        """Translate nodes in order."""
        for node in nodes:
            self.node(node)

    def node(self, node: Node) -> None:
        """Translate one node."""
        self.w.line = node.where or self.w.line
        self.env[node.out] = TABLE[node.op.name](self, node)

    def name(self, value: Value) -> str:
        """The name of a value."""
        return self.env[value]

    def operand(self, arg: Arg, dtype: DType) -> str:
        """A tensor, or a literal or host value beside tensors of a dtype."""
        if not isinstance(arg, Value):
            return self.w.constant(arg, held(dtype))
        name = self.name(arg)
        return self.w.cast(name, held(dtype)) if arg.type.is_host and dtype is not f64 else name


def _operand_dtype(node: Node) -> DType:
    """The dtype of an element-wise primitive's tensors; of `where`, of what it chooses from."""
    if node.op.name == "where":
        return node.out.type.dtype
    return next(a.type.dtype for a in node.inputs if not a.type.is_host)


def _elementwise(t: Translator, node: Node) -> str:
    kind, to = _operand_dtype(node), node.out.type.dtype
    operands = [t.operand(a, kind) for a in node.args]
    found = ELEMENTWISE[node.op.name](t.w, kind, *operands)
    if is_narrower(to) and (node.op.rounds or not to.is_float) and node.op.name != "alias":
        return t.w.rounded(found, to)
    return found


def _cast(t: Translator, node: Node) -> str:
    (x,) = node.inputs
    return cast(t.w, t.name(x), x.type.dtype, node.out.type.dtype)


def _on_tensors(table: Mapping[str, Callable[..., str]]) -> Callable[[Translator, Node], str]:
    """An entry of a table whose operands are tensors."""

    def translated(t: Translator, node: Node) -> str:
        found = table[node.op.name](t.w, node, *map(t.name, node.inputs))
        rounds = node.op.rounds and is_narrower(node.out.type.dtype)
        return t.w.rounded(found, node.out.type.dtype) if rounds else found

    return translated


def _full(t: Translator, node: Node) -> str:
    (value,), kind = node.args, node.out.type
    if isinstance(value, Value):
        x = cast(t.w, t.name(value), f64, kind.dtype)
    else:
        x = t.w.constant(round_to(np.asarray(value), kind.dtype), held(kind.dtype))
    return t.w.full(x, kind.shape)


def _host(t: Translator, node: Node) -> str:
    return HOST[node.op.name](t.w, *(t.operand(a, f64) for a in node.args))


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
    **{"cast": _cast, "full": _full, "scan": _scan},
}
