"""Host arithmetic as generated Python: the runtime scalars of one call, in microseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tracejit.ir.graph import Arg, Node, Value
from tracejit.ir.ops import host

_OPERATORS = {
    "host_add": "+",
    "host_sub": "-",
    "host_mul": "*",
    "host_div": "/",
    "host_floordiv": "//",
    "host_mod": "%",
    "host_pow": "**",
}
_FUNCTIONS = {
    "host_abs": "abs",
    "host_f32": "round_f32",
    "host_f16": "round_f16",
    "host_bf16": "round_bf16",
}
# what generated host code calls by name, besides builtins
NAMES = {name: getattr(host, name) for name in ("round_f32", "round_f16", "round_bf16")}


def host_lines(
    nodes: Sequence[Node], wanted: list[Arg], names: dict[Value, str]
) -> tuple[list[str], list[str]]:
    """Python lines that compute host values, and the expressions of the wanted ones.

    `names` maps host inputs to expressions; only nodes that `wanted` depends on are printed. The
    lines call the functions of NAMES.
    """
    producers = {node.out: node for node in nodes if node.op.family == "host"}
    needed: set[Value] = set()
    pending = [a for a in wanted if isinstance(a, Value)]
    while pending:
        value = pending.pop()
        if value not in needed and value in producers:
            needed.add(value)
            pending += producers[value].inputs

    def text(arg: Arg) -> str:
        if isinstance(arg, Value):
            return names.get(arg, f"h{arg.id}")
        if isinstance(arg, float) and (arg != arg or arg in (float("inf"), float("-inf"))):
            return f"float({str(arg)!r})"
        return f"({arg!r})"

    lines = []
    for node in nodes:
        if node.out not in needed:
            continue
        args = [text(a) for a in node.args]
        if node.op.name == "host_neg":
            body = f"-{args[0]}"
        elif node.op.name in _FUNCTIONS:
            body = f"{_FUNCTIONS[node.op.name]}({args[0]})"
        else:
            body = f" {_OPERATORS[node.op.name]} ".join(args)
        lines.append(f"h{node.out.id} = {body}")
    return lines, [text(a) for a in wanted]


def host_function(
    nodes: Sequence[Node], params: Sequence[Value], wanted: Sequence[Arg]
) -> Callable[[list[float]], list[float]]:
    """A Python function from the values of host inputs to those of `wanted`."""
    names = {v: f"scalars[{i}]" for i, v in enumerate(params)}
    lines, found = host_lines(nodes, list(wanted), names)
    body = "\n".join(f"    {line}" for line in [*lines, f"return [{', '.join(found)}]"])
    namespace: dict[str, object] = dict(NAMES)
    exec(compile(f"def host(scalars):\n{body}\n", "<tracejit host>", "exec"), namespace)
    return namespace["host"]
