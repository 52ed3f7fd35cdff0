"""What an ejected call does once its kernels have run: the Effects of the step as plain lines.

They do what `capture/effects/commit.py` does, for tensors without history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import (
    Given,
    HostSlot,
    Joined,
    Made,
    Mapped,
    Sequenced,
    Slot,
    Tree,
)
from tracejit.export.eject_text import quoted
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import contiguous_strides
from tracejit.saved.record import LISTS, NUMBERS

_FLAGS = {
    "requires grad": "requires_grad_()",
    "frozen": "requires_grad_(False)",
    "detached": "detach_()",
}


class Commit:
    """The lines; `inputs` are what outside tensors are called, `outputs` results, `host` the host
    results."""

    def __init__(
        self,
        captured: Captured,
        inputs: Sequence[str],
        outputs: Sequence[str],
        host: Sequence[str],
        kinds: Mapping[int, str],
        lists: Sequence[str],
    ):
        self.captured = captured
        self.inputs, self.outputs, self.host = inputs, outputs, host
        self.kinds = kinds  # of tuples with names: what each is called
        self.lists = lists  # that are appended to
        self.made: dict[int, str] = {}

    def lines(self) -> Iterator[str]:
        """All of them, `return` the last."""
        effects, inputs = self.captured.effects, self.inputs
        for index, source in effects.host_writes:
            yield f"{inputs[index]}.fill_({self.host[source]})"
        for index, how in effects.flags:
            yield f"{inputs[index]}.{_FLAGS[how]}"
        for i, m in enumerate(effects.made):
            yield from self._make(i, m)
        for index, source in effects.datas:
            yield f"{inputs[index]}.data = {self.made[source]}"
        for index, source in effects.grads:
            yield f"{inputs[index]}.grad = {'None' if source is None else self.made[source]}"
        for index, source in effects.leaf_grads:
            yield f"{self.made[index]}.grad = {self.made[source]}"
        for holder, key, tree in effects.stores:
            if holder >= LISTS:
                of = f"self.lists[{quoted(self.lists[holder - LISTS])}]"
                yield f"{of}.append({self._tree(tree)})"
                continue
            of = "numbers" if holder == NUMBERS else "state"
            yield f"{of}[{quoted(key)}] = {self._tree(tree)}"
        returned = self._tree(effects.returned)
        if returned != "None":
            yield f"return {returned}"

    def _make(self, i: int, m: Made) -> Iterator[str]:
        """A tensor to hand out: under its own name where it is more than an output."""
        text = self._tensor(m)
        again = text in self.made.values() and m.kind in ("output", "host")
        text += ".detach()" * again
        if m.is_leaf:
            text += ".requires_grad_()"
        if text.isidentifier():
            self.made[i] = text
        else:
            self.made[i] = f"result{i}"
            yield f"result{i} = {text}"

    def _tensor(self, m: Made) -> str:
        offset = self.host[m.offset.index] if isinstance(m.offset, HostSlot) else m.offset
        view = m.view(offset, "" if m.bits is None else str(TO_TORCH[m.bits[1]]))
        match m.kind:
            case "real":
                return self.inputs[m.index]
            case "alias":
                return f"{self.inputs[m.index]}.detach().{view}"
            case "host":
                dtype, source = self.captured.effects.hosts[m.index]
                text = f"torch.tensor({self.host[source]}, dtype={TO_TORCH[dtype]})"
                whole = (m.shape, m.strides, m.offset, m.bits) == ((), (), 0, None)
                return text if whole else f"{text}.{view}"
            case "view" | "part":
                return f"{self.made[m.index]}.{view}"
        result = self.captured.graph.results[m.index]
        shape = result.value.type.shape
        strides = result.strides or contiguous_strides(shape)
        if (m.shape, m.strides, m.offset, m.bits) == (shape, strides, 0, None):
            return self.outputs[m.index]
        return f"{self.outputs[m.index]}.{view}"

    def _tree(self, tree: Tree) -> str:
        """A structure as an expression."""
        match tree:
            case Slot(index):
                return self.made[index]
            case HostSlot(index):
                return self.host[index]
            case Joined(items):
                return " + ".join(
                    quoted(x) if type(x) is str else self.host[x.index] for x in items
                )
            case Given(index):
                return plain_text(self.captured.given[index])
            case Sequenced(Given(index), items):
                inner = ", ".join(map(self._tree, items))
                if index in self.kinds:
                    return f"{self.kinds[index]}({inner})"
                name = self.captured.given[index].__name__
                return f"torch.return_types.{name}(({inner},))"
            case Sequenced(kind, items):
                inner = ", ".join(map(self._tree, items))
                return f"[{inner}]" if kind == "list" else f"({inner}{',' * (len(items) == 1)})"
            case Mapped(items):
                pairs = ", ".join(f"{self._key(k)}: {self._tree(v)}" for k, v in items)
                return f"{{{pairs}}}"
        raise AssertionError(tree)

    def _key(self, key: str | int | Given) -> str:
        return self._tree(key) if isinstance(key, Given) else repr(key)


def plain_text(x: object) -> str:
    """A plain value as an expression."""
    match x:
        case torch.device():
            return f"torch.device({str(x)!r})"
        case float() if x != x or x in (float("inf"), float("-inf")):
            return f"float({str(x)!r})"
        case torch.Size():
            return f"torch.Size({list(x)})"
    return repr(x)
