"""Hooks on the tensors that autograd saves: `torch.autograd.graph.saved_tensors_hooks` in a step.

After each torch call that is differentiated, the user's `pack` gets the tensors that eager saves
for it, in eager's order (`eager_saves.py`, `stand_ins.py`); what it returns is held. In a backward
the user's `unpack` gets that, and the derivative formula reads what comes back in the place of what
was saved. Both run as user code inside a rule.

Formulas of ours may read other values than eager's. That makes no difference as long as what is
unpacked is what was packed. Where it is not (`x.half()`), a formula must read those that eager
saves, all of them and no others; else the call is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import field

import torch
from torch.utils._pytree import tree_map

from tracejit.autodiff import Entry
from tracejit.capture.functions.hooks import packed_by, unpacked_by
from tracejit.capture.python.eager_saves import saves_of
from tracejit.capture.python.stand_ins import UNKNOWN, Shapes, StandIn, StandIns
from tracejit.capture.trace.table import RULES
from tracejit.capture.trace.tensor import Step
from tracejit.capture.trace.trace import Trace
from tracejit.capture.trace.views import apply_steps
from tracejit.errors import TracejitError
from tracejit.ir.graph import Value
from tracejit.records import dataclass

Tensor = torch.Tensor
functional = torch.nn.functional

_OVER = (
    "hooks on saved tensors were active in the step, and a backward after it would not call them; "
    "call backward inside the step"
)
_OTHER = (
    "Hooks on saved tensors give back other values than were saved, and the derivative of ours "
    "reads others than eager's; leave this call out of the hooks, or keep the values as they are"
)
# eager keeps other tensors for these on the "meta" device than on the CPU, and others on a GPU
_BY_DEVICE = frozenset(
    {functional.scaled_dot_product_attention, functional.multi_head_attention_forward}
)
# of which eager keeps what a rule does not show
_HIDDEN = frozenset(
    {
        *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
        *(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell),
    }
)
# which save nothing, and cannot run on the "meta" device
_WITHOUT = frozenset({Tensor.to, Tensor.cpu, Tensor.backward, torch.autograd.backward})
# a value that was read before a movement is read as well behind it
_MOVED = frozenset({"alias", "cast", "expand", "permute", "reshape", "slice"})


class Hooks:
    """The hooks of one `with`; `Trace.apply` runs each torch call through `around`."""

    def __init__(self, pack: Callable, unpack: Callable):
        self.pack, self.unpack = pack, unpack

    def around(self, t: Trace, func: Callable, args: tuple, kwargs: dict) -> object:
        """The result of a call, whose derivative will read what is unpacked."""
        given = Shapes(t, "cpu" if func in _BY_DEVICE else "meta")
        shapes = tree_map(given.of, (args, kwargs))
        if not given.any_requires_grad or func in _WITHOUT:
            return self._run(t, func, args, kwargs)
        if func in _HIDDEN or func in _BY_DEVICE and not given.on_cpu:
            raise t.unsupported(UNKNOWN)
        try:
            saves = saves_of(func, *shapes)
        except Exception as error:
            raise t.unsupported(UNKNOWN) from error
        if not saves.tensors:
            return self._run(t, func, args, kwargs)
        held, stand_ins = Held(t, self.unpack, saves.asked), StandIns(t, given, saves)
        late = [i for i in range(len(saves.tensors)) if not stand_ins.is_early(i)]
        early = late[0] if late else len(saves.tensors)
        for i in range(early):
            held.take(self.pack, stand_ins.of(i))
        first, made = len(t.tape.entries), len(t.proxies)
        result = self._run(t, func, args, kwargs)
        held.entries = tuple(t.tape.entries[first:])
        given.returned(saves.result, result)
        stand_ins.made = t.proxies[made:]
        for i in range(early, len(saves.tensors)):
            held.take(self.pack, stand_ins.of(i))
        t.held.append(held)
        for entry in held.entries:
            entry.held = held
        return result

    def _run(self, t: Trace, func: Callable, args: tuple, kwargs: dict) -> object:
        t.saving.append(None)  # for torch calls that the rule makes
        try:
            return RULES[func].run(t, *args, **kwargs)
        finally:
            t.saving.pop()


@dataclass(slots=True)
class _Item:
    """A tensor that was packed: its value, that of the tensor in whose memory it lies with the way
    back to it, what `pack` made of it, and what `unpack` last made of that."""

    value: Value
    within: tuple[Value, tuple[Step, ...]] | None
    is_idle: bool  # eager's derivative does not use its values
    packed: object
    unpacked: Value | None = None
    is_same: bool = False  # what is unpacked is what was packed
    is_read: bool = False


@dataclass(slots=True, eq=False)
class Held:
    """What hooks hold for the derivative of one torch call."""

    t: Trace
    unpack: Callable
    asked: tuple[int, ...]  # in which order a backward unpacks
    entries: tuple[Entry, ...] = ()
    items: list[_Item] = field(default_factory=list)
    over: bool = False  # the step has returned
    changed: bool = False  # what is unpacked is not what was packed
    replaced: dict[int, tuple[list[_Item], tuple[Step, ...]]] = field(default_factory=dict)

    def take(self, pack: Callable, stand_in: StandIn) -> None:
        """Pack what eager saves."""
        t, x = self.t, stand_in.tensor
        value = t.read_with_history(t.lift(x))
        packed = packed_by(t, pack, x)
        self.items.append(_Item(value, stand_in.within, stand_in.is_idle, packed))

    def references(self) -> Iterator[object]:
        """What this alone holds of the user's objects."""
        return (item.packed for item in self.items)

    def open(self) -> None:
        """A backward comes to the call: unpack what it saved."""
        t = self.t
        if self.over:
            raise TracejitError(reason=_OVER)
        self.changed = False
        self.replaced.clear()
        for i in self.asked:
            item = self.items[i]
            got = unpacked_by(t, self.unpack, item.packed)
            with t.untaped():
                item.unpacked, item.is_read = t.read(t.lift(got)), item.is_idle
            self._replace(item)

    def _replace(self, item: _Item) -> None:
        t, keys = self.t, self.t.keys
        if item.unpacked.type != item.value.type:
            raise t.unsupported(
                "Hooks on saved tensors give back another shape, dtype or device than was saved, "
                "which has no rule"
            )
        item.is_same = keys.of(item.unpacked) == keys.of(item.value)
        if item.is_same:
            item.is_read = True
        elif not item.is_idle:
            self.changed = True
        places = [(item.value, ())] if item.within is None else [(item.value, ()), item.within]
        for value, back in places:
            self.replaced.setdefault(keys.of(value), ([], back))[0].append(item)

    def read(self, value: Value, *, is_new: bool) -> Value:
        """What a formula reads in the place of a value: from before, or one that it has computed
        (`is_new`) as eager has computed one that it saves."""
        if not self.changed or value.type.is_host:
            return value
        t = self.t
        found = self.replaced.get(t.keys.of(value))
        if found is not None:
            items, back = found
            if all(item.is_same for item in items):
                return value
            for item in items:
                item.is_read = True
            with t.unchecked(), t.untaped():
                out = t.b.alias(apply_steps(t, items[-1].unpacked, back))
            return t.derive("saved", (value,), out, lambda b, cotangents, needed: cotangents)
        if is_new or self._follows(value):
            return value
        node = t.producers.get(value)
        if node is None or node.op.name not in _MOVED or len(node.inputs) != 1:
            raise t.unsupported(_OTHER)
        moved = self.read(node.args[0], is_new=False)
        with t.unchecked():
            return t.b.emit(node.op, moved, *node.args[1:], **dict(node.attrs))

    def _follows(self, value: Value) -> bool:
        """Whether a value is computed of nothing but what is unpacked as it was packed."""
        t, pending, seen = self.t, [value], set()
        while pending:
            v = pending.pop()
            if v in seen or v.type.is_host:
                continue
            seen.add(v)
            found = self.replaced.get(t.keys.of(v))
            node = t.producers.get(v)
            if found is not None:
                if not all(item.is_same for item in found[0]):
                    return False
            elif node is None:
                return False
            else:
                pending += node.inputs
        return True

    def close(self) -> None:
        """A backward has gone through the call."""
        if self.changed and not all(self.items[i].is_read for i in self.asked):
            raise self.t.unsupported(_OTHER)
        if all(entry.freed for entry in self.entries):
            self.items.clear()
            self.replaced.clear()
