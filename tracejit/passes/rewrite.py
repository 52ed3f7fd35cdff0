"""The engine of rewriting: a Graph and tables of rules in, the Graph in normal form out.

A rule is a named function `(node, made) -> Node | Value | None`: the node that does the same work
(same results), a value that equals its result, or None where the rule does not apply. `made` gives
the producer of each value. Nodes are visited in order, so a node's operands are in normal form
already when its rules see it, and they are tried until none applies: one sweep reaches the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain

from tracejit.ir.graph import Arg, Graph, Node, Result, Value, Write
from tracejit.ir.ops import OPS, Op

Made = Mapping[Value, Node]
Rule = Callable[[Node, Made], Node | Value | None]
Rules = Mapping[Op, tuple[Rule, ...]]


def table(*parts: Mapping[str, tuple[Rule, ...]]) -> Rules:
    """Rules by op name, of several tables, as one table by op."""
    names = dict.fromkeys(chain.from_iterable(parts))
    return {OPS[name]: tuple(r for part in parts for r in part.get(name, ())) for name in names}


def rewrite(graph: Graph, rules: Rules) -> Graph:
    """Bring every node to normal form and merge equal ones; the first one's `where` is kept."""
    made: dict[Value, Node] = {}  # in the new graph
    instead: dict[Value, Value] = {}  # what a value of the old graph became, where it changed
    first: dict[tuple, Node] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        if instead:
            node = substituted(node, instead)
        form = normal_form(node, made, rules)
        if isinstance(form, Value):
            instead[node.out] = form
            continue
        key = identity(form)
        same = first.setdefault(key, form)
        if same is not form:
            instead.update(zip(node.outs, same.outs, strict=True))
            continue
        nodes.append(form)
        for out in form.outs:
            made[out] = form
    return with_nodes(graph, nodes, instead)


def normal_form(node: Node, made: Made, rules: Rules) -> Node | Value:
    """Apply the rules of a node's op, and of what becomes of it, until none applies."""
    while True:
        for rule in rules.get(node.op, ()):
            form = rule(node, made)
            if form is not None:
                break
        else:
            return node
        if isinstance(form, Value):
            return form
        node = form


def identity(node: Node) -> tuple:
    """A key that equal nodes share: op, operands and attributes, telling 0.0 from -0.0."""
    args, attrs = node.args, node.attrs
    for arg in args:
        if arg.__class__ is float:
            args = tuple([repr(a) if a.__class__ is float else a for a in args])
            break
    if len(attrs) > 1:  # in any order
        attrs = frozenset([(k, repr(v) if v.__class__ is float else v) for k, v in attrs])
    return node.op, args, attrs


def with_nodes(graph: Graph, nodes: Iterable[Node], instead: Mapping[Value, Value]) -> Graph:
    """A graph with other nodes, whose outputs are these values instead of its own."""
    results = tuple(Result(instead.get(r.value, r.value), r.strides) for r in graph.results)
    writes = tuple(Write(w.target, instead.get(w.value, w.value)) for w in graph.writes)
    return Graph(graph.name, graph.params, tuple(nodes), results, writes)


def substituted(node: Node, instead: Mapping[Value, Value]) -> Node:
    """A node that reads these values instead of its own."""
    for arg in node.args:
        if arg.__class__ is Value and arg in instead:
            args: tuple[Arg, ...] = tuple(
                [instead.get(a, a) if a.__class__ is Value else a for a in node.args]
            )
            return Node(node.op, args, node.attrs, node.outs, node.where)
    return node
