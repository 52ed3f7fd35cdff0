"""Which values of a trace are computed alike: the same primitives of the same values."""

from __future__ import annotations

from tracejit.ir.graph import Node, Value


class Keys:
    """A number for each value; two have the same one if they are computed alike, and hence equal.

    An alias has the number of what it is an alias of."""

    def __init__(self, producers: dict[Value, Node]):
        self._producers = producers
        self._known: dict[Value, int] = {}
        self._numbers: dict[tuple, int] = {}

    def of(self, value: Value) -> int:
        pending = [value]
        while pending:
            v = pending[-1]
            if v in self._known:
                pending.pop()
                continue
            node = self._producers.get(v)
            missing = [] if node is None else [a for a in node.inputs if a not in self._known]
            if missing:
                pending += missing
            else:
                self._known[v] = self._number(v, node)
        return self._known[value]

    def _number(self, value: Value, node: Node | None) -> int:
        if node is None or len(node.outs) > 1:
            return self._new(("itself", value))
        if node.op.name == "alias":
            return self._known[node.args[0]]
        args = [self._known[a] if type(a) is Value else (type(a), repr(a)) for a in node.args]
        try:
            return self._new((node.op.name, repr(node.attrs), value.type, *args))
        except TypeError:  # what has no hash
            return self._new(("itself", value))

    def _new(self, key: tuple) -> int:
        return self._numbers.setdefault(key, len(self._numbers))
