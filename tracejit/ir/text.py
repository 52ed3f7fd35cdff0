"""Reads the text form of a Graph: str(parse(text)) is the canonical text."""

from __future__ import annotations

import ast
import re
from dataclasses import replace

from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Arg, Graph, Node, Param, Result, Value, Write
from tracejit.ir.literals import parse_literal
from tracejit.ir.ops import OPS
from tracejit.ir.types import parse_type

_HEADER = re.compile(r"([\w<>]+)\((.*)\)\s*\{\Z")
_PARAM = re.compile(r"%(\d+):\s*(\w+\[[\d,]*\](?:@[\w:]+)?)(?:\s+strides\s+(\([^)]*\)))?")
_OUT = re.compile(r"%(\d+):\s*(\w+\[[\d,]*\](?:@[\w:]+)?)")
_NODE = re.compile(r"(%\d+:[^=]*?)\s*=\s*(\w+)(\(.*\))\Z")
_RESULT = re.compile(r"%(\d+)(?:\s+strides\s+(\([^)]*\)))?")
_WRITE = re.compile(r"write\s+%(\d+)\s*<-\s*%(\d+)\Z")


def parse(text: str) -> Graph:
    """Read a graph's text. The result is canonical: equal texts give equal graphs."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return _parse([line for line in lines if line and not line.startswith("#")])


def _parse(lines: list[str]) -> Graph:
    lines, bodies = _without_bodies(lines)
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
            nodes.append(_parse_node(found, where.strip(), define, use, bodies))
        else:
            raise InvalidGraph(reason=f"cannot read the line {line!r}")
    return Graph(header[1], params, tuple(nodes), results, tuple(writes)).canonical()


def _without_bodies(lines: list[str]) -> tuple[list[str], dict[str, Graph]]:
    """The lines that are not of a loop's body, and the bodies by name."""
    rest: list[str] = []
    bodies: dict[str, Graph] = {}
    inside: list[str] = []
    depth = 0
    for line in lines:
        if depth or line.startswith("body "):
            inside.append(line)
            depth += line.endswith("{") - (line == "}")
            if not depth:
                inside[0] = inside[0].removeprefix("body ")
                body = _parse(inside)
                bodies[body.name], inside = body, []
        else:
            rest.append(line)
    return rest, {name: replace(body, name="body") for name, body in bodies.items()}


def _parse_node(found: re.Match[str], where: str, define, use, bodies) -> Node:
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

    def attribute(tree: ast.expr) -> object:
        if isinstance(tree, ast.Name) and tree.id in bodies:
            return bodies[tree.id]
        return parse_literal(tree)

    attrs = tuple((k.arg, attribute(k.value)) for k in call.keywords)
    outs = tuple(define(m[1], m[2]) for m in _OUT.finditer(found[1]))
    return Node(OPS[name], args, attrs, outs, where)
