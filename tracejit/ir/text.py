"""The Graph's text form, which parses back: print_graph(parse(text)) is the canonical text."""

from __future__ import annotations

import ast
import math
import re

from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Arg, Graph, Node, Param, Result, Value, Write
from tracejit.ir.ops import OPS
from tracejit.ir.types import DTYPES, DType, parse_type

_NAMES = {"nan": math.nan, "inf": math.inf} | DTYPES


def print_literal(value: object) -> str:
    """A literal or attribute as text that `parse_literal` reads back."""
    if isinstance(value, DType):
        return value.name
    if isinstance(value, tuple):
        inner = ", ".join(map(print_literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def parse_literal(tree: ast.expr) -> object:
    """Inverse of print_literal on a parsed expression."""
    if isinstance(tree, ast.Name) and tree.id in _NAMES:
        return _NAMES[tree.id]
    if isinstance(tree, ast.Tuple):
        return tuple(map(parse_literal, tree.elts))
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -parse_literal(tree.operand)
    if isinstance(tree, ast.Constant):
        return tree.value
    raise InvalidGraph(reason=f"not a literal: {ast.unparse(tree)}")


def print_graph(graph: Graph) -> str:
    """Text of a graph, values numbered by definition, the user's lines as comments."""
    graph = graph.canonical()

    def layout(strides: tuple[int, ...] | None) -> str:
        return "" if strides is None else f" strides {print_literal(strides)}"

    def arg(a: Arg) -> str:
        return repr(a) if isinstance(a, Value) else print_literal(a)

    params = ", ".join(f"{p.value}: {p.value.type}{layout(p.strides)}" for p in graph.params)
    rows = []
    for node in graph.nodes:
        operands = [arg(a) for a in node.args]
        operands += [f"{k}={print_literal(v)}" for k, v in node.attrs]
        left = ", ".join(f"{out}: {out.type}" for out in node.outs)
        rows.append((f"  {left} = {node.op.name}({', '.join(operands)})", node.where))
    width = min(max((len(row) for row, _ in rows), default=0), 72)
    lines = [f"{graph.name}({params}) {{"]
    lines += [f"{row:<{width}}  # {where}" if where else row for row, where in rows]
    if graph.results:
        results = ", ".join(f"{r.value}{layout(r.strides)}" for r in graph.results)
        lines.append(f"  return {results}")
    lines += [f"  write {w.target} <- {w.value}" for w in graph.writes]
    return "\n".join([*lines, "}"])


_HEADER = re.compile(r"([\w<>]+)\((.*)\)\s*\{\Z")
_PARAM = re.compile(r"%(\d+):\s*(\w+\[[\d,]*\](?:@[\w:]+)?)(?:\s+strides\s+(\([^)]*\)))?")
_OUT = re.compile(r"%(\d+):\s*(\w+\[[\d,]*\](?:@[\w:]+)?)")
_NODE = re.compile(r"(%\d+:[^=]*?)\s*=\s*(\w+)(\(.*\))\Z")
_RESULT = re.compile(r"%(\d+)(?:\s+strides\s+(\([^)]*\)))?")
_WRITE = re.compile(r"write\s+%(\d+)\s*<-\s*%(\d+)\Z")


def parse(text: str) -> Graph:
    """Read a graph's text. The result is canonical: equal texts give equal graphs."""
    lines = [line.strip() for line in text.strip().splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    header = _HEADER.match(lines[0]) if lines else None
    if header is None or lines[-1] != "}":
        raise InvalidGraph(reason="a graph's text is `name(params) {`, its lines, then `}`")
    values: dict[str, Value] = {}

    def define(number: str, type_text: str) -> Value:
        if number in values:
            raise InvalidGraph(reason=f"%{number} is defined twice")
        values[number] = Value(int(number), parse_type(type_text))
        return values[number]

    def use(number: str) -> Value:
        if number not in values:
            raise InvalidGraph(reason=f"%{number} is read before its definition")
        return values[number]

    def strides(found: str | None) -> tuple[int, ...] | None:
        return ast.literal_eval(found) if found else None

    params = tuple(Param(define(m[1], m[2]), strides(m[3])) for m in _PARAM.finditer(header[2]))
    nodes: list[Node] = []
    results: tuple[Result, ...] = ()
    writes: list[Write] = []
    for line in lines[1:-1]:
        code, _, where = line.partition("#")
        code = code.strip()
        if code.startswith("return"):
            results = tuple(Result(use(m[1]), strides(m[2])) for m in _RESULT.finditer(code))
        elif found := _WRITE.match(code):
            writes.append(Write(use(found[1]), use(found[2])))
        elif found := _NODE.match(code):
            nodes.append(_parse_node(found, where.strip(), define, use))
        else:
            raise InvalidGraph(reason=f"cannot read the line {line!r}")
    return Graph(header[1], params, tuple(nodes), results, tuple(writes)).canonical()


def _parse_node(found: re.Match[str], where: str, define, use) -> Node:
    name, operands = found[2], found[3]
    if name not in OPS:
        raise InvalidGraph(reason=f"no primitive named {name!r}")
    try:  # `and`, `or`, `not` are keywords to Python, so the call is read under another name
        call = ast.parse("op" + re.sub(r"%(\d+)", r"v\1", operands), mode="eval").body
    except SyntaxError as error:
        raise InvalidGraph(reason=f"cannot read {name}{operands}: {error.msg}") from error
    assert isinstance(call, ast.Call)

    def arg(tree: ast.expr) -> Arg:
        if isinstance(tree, ast.Name) and re.fullmatch(r"v\d+", tree.id):
            return use(tree.id[1:])
        return parse_literal(tree)

    args = tuple(map(arg, call.args))
    attrs = tuple((k.arg, parse_literal(k.value)) for k in call.keywords)
    outs = tuple(define(m[1], m[2]) for m in _OUT.finditer(found[1]))
    return Node(OPS[name], args, attrs, outs, where)
