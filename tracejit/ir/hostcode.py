"""Host arithmetic as generated Python: the runtime scalars of one call, in microseconds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from tracejit.ir.graph import Arg, Node, Value
from tracejit.ir.ops import Op, host


def host_names() -> dict[str, object]:
    """What lines of host arithmetic call by name, besides builtins: a fresh namespace.

    `f32` is a ctypes cell: storing a number rounds it, three times as fast as calling round_f32.
    """
    names = {name: getattr(host, name) for name in ("round_f16", "round_bf16")}
    names |= {f"math_{name}": function for name, function in host.MATH.items()}
    names |= {f"np_{name}": function for name, function in host.NUMPY.items()}
    return names | {"f32": ctypes.c_float()}


@cache
def arithmetic(op: Op) -> Callable:
    """The function of Python's floats that `op.host` writes."""
    parameters = ["x", "z"][: len(op.vjp)]
    text = f"lambda {', '.join(parameters)}: {op.host.format(*parameters)}"
    return eval(compile(text, "<tracejit host>", "eval"), host_names())


class HostCode:
    """Python lines that compute host values; equal expressions are computed once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._known: dict[tuple[str, str], str] = {}  # (expression, operand) -> the local
        self._rounded: set[str] = set()  # the locals that are float32 already

    def add(
        self, nodes: Sequence[Node], wanted: Sequence[Arg], names: Mapping[Value, str]
    ) -> list[str]:
        """The expressions of the wanted values, which the lines written so far compute.

        `names` maps host inputs to expressions; only nodes that `wanted` depends on are printed.
        """
        producers = {node.out: node for node in nodes if node.op.family == "host"}
        needed: set[Value] = set()
        pending = [a for a in wanted if isinstance(a, Value)]
        while pending:
            value = pending.pop()
            if value not in needed and value in producers:
                needed.add(value)
                pending += producers[value].inputs
        found = dict(names)
        for node in nodes:
            if node.out in needed and node.out not in names:
                found[node.out] = self._node(node.op, [_text(a, found) for a in node.args])
        return [_text(a, found) for a in wanted]

    def _node(self, op: Op, args: list[str]) -> str:
        """The local that holds the result of an operation."""
        if op is host.host_f32 and args[0] in self._rounded:
            return args[0]
        rest = ", ".join(args[1:])
        body = "f32.value" if op is host.host_f32 else op.host.format(*args, rest=rest)
        key = (body, args[0])
        name = self._known.get(key)
        if name is None:
            name = self._known[key] = f"h{len(self._known)}"
            if op is host.host_f32:
                self._rounded.add(name)
                self.lines.append(f"f32.value = {args[0]}")
            self.lines.append(f"{name} = {body}")
        return name


def _text(arg: Arg, names: Mapping[Value, str]) -> str:
    if isinstance(arg, Value):
        return names[arg]
    if isinstance(arg, float) and (arg != arg or arg in (float("inf"), float("-inf"))):
        return f"float({str(arg)!r})"
    return f"({arg!r})"
