"""Whether the effects of a plan that was read from a file are such: what they are about is there.

In: a SavedStep and one of its plans. Out: nothing, or an error. What a tensor of the state is
replaced by is of its kind, and what is handed out lies within its memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from tracejit.capture.effects.effects import (
    Given,
    HostSlot,
    Made,
    Mapped,
    Sequenced,
    Slot,
    Tree,
)
from tracejit.capture.trace.tensor import extent
from tracejit.ir.torch_types import TO_IR
from tracejit.ir.types import Type, contiguous_strides
from tracejit.saved.archive import Damaged
from tracejit.saved.fields import LIMIT
from tracejit.saved.named import width
from tracejit.saved.record import LISTS, NUMBERS, TENSORS, SavedPlan, SavedStep
from tracejit.saved.sound_graphs import check_graph, check_view, layout, need


def check_effects(step: SavedStep, plan: SavedPlan) -> None:
    """Raise Damaged or InvalidGraph unless the effects of a plan fit what it has."""
    _Effects(step, plan).check()


class _Effects:
    def __init__(self, step: SavedStep, plan: SavedPlan):
        self.step, self.plan = step, plan
        self.specs = [spec for _, spec in plan.tensors]
        self.captured, self.effects = plan.captured, plan.captured.effects
        self.results = [layout(r) for r in plan.captured.graph.results]

    def check(self) -> None:
        e = self.effects
        reals, hosts = len(self.specs), len(e.host)
        need(not e.escaped and not e.flags, "effects that no file can keep")
        self._all_below(reals, e.written, [i for i, _ in e.host_writes], [i for i, _ in e.datas])
        self._all_below(reals, [i for i, _ in e.grads])
        self._all_below(hosts, [k for _, k in e.host_writes], [k for _, k in e.hosts])
        for i, _ in e.host_writes:
            one = self.specs[i]
            need(one.shape.count(1) == len(one.shape) and one.device == "cpu", "a host's number")
            need(one.dtype.name != "b1", "the host writes a truth value")
        for index, m in enumerate(e.made):
            self._made(index, m)
        self._nodes()
        made = len(e.made)
        self._all_below(made, [k for _, k in e.datas], [i for i, _ in e.reasons])
        self._all_below(made, [k for _, k in e.grads if k is not None])
        self._all_below(made, [k for pair in e.leaf_grads for k in pair])
        for i, k in (*e.datas, *((i, k) for i, k in e.grads if k is not None)):
            need(self._kind(k) == self._kind_of_real(i), "a tensor is replaced by another kind")
        for holder, key, tree in e.stores:
            self._store(holder, key, tree)
        self._tree(e.returned)

    def _all_below(self, count: int, *rows: Iterable[int]) -> None:
        for row in rows:
            need(all(0 <= i < count for i in row), "effects and what they are about do not match")

    def _kind_of_real(self, index: int) -> tuple:
        spec = self.specs[index]
        return spec.dtype, spec.shape, spec.device

    def _kind(self, index: int) -> tuple:
        """The dtype, shape and device of a tensor that is made."""
        dtype, shape, device = self._memory_of(index)
        bits = self.effects.made[index].bits
        return dtype if bits is None else bits[1], shape, device

    def _memory_of(self, index: int) -> tuple:
        """The same, with the dtype of the memory."""
        m = self.effects.made[index]
        if m.kind == "real":
            return self._kind_of_real(m.index)
        if m.kind == "output":
            type = self.results[m.index][0]
            return type.dtype, m.shape, type.device
        if m.kind == "alias":
            dtype, _, device = self._kind_of_real(m.index)
            return dtype, m.shape, device
        if m.kind == "host":
            return self.effects.hosts[m.index][0], m.shape, "cpu"
        dtype, _, device = self._kind(m.index)
        return dtype, m.shape, device

    def _made(self, index: int, m: Made) -> None:
        if m.kind == "real":
            need(m.index < len(self.specs), "there is no such tensor")
            return
        whole = type(m.offset) is int
        need(whole or m.offset.index < len(self.effects.host), "there is no such offset")
        offset = m.offset if whole else 0  # torch looks at the others
        if m.kind == "output":
            need(m.index < len(self.results), "there is no such output")
            room = extent(self.results[m.index][0].shape, self.results[m.index][1])
        elif m.kind == "alias":
            need(m.index < len(self.specs), "there is no such tensor")
            room = extent(self.specs[m.index].shape, self.specs[m.index].strides)
        elif m.kind == "host":
            need(m.index < len(self.effects.hosts), "there is no such number")
            room = 1
        else:
            need(m.kind in ("view", "part"), f"no tensor is made as {m.kind}")
            need(m.index < len(self.effects.made), "there is no such tensor")
            of = self.effects.made[m.index]
            need(of.kind in ("output", "alias", "host"), "a view of a view")
            room = offset + extent(m.shape, m.strides)
            if of.kind == "output":
                room = extent(self.results[of.index][0].shape, self.results[of.index][1])
        if m.bits is not None:
            of, to = m.bits
            need(whole and m.kind in ("output", "alias", "host"), "bits of no memory")
            need(self._memory_of(index)[0] is of, f"bits of {of}, which the memory does not hold")
            room = room * of.itemsize // to.itemsize
        check_view(m.shape, m.strides, offset, room)

    def _nodes(self) -> None:
        """The graphs of backward outside."""
        e, done = self.effects, set()
        with_node = [node.made for node in e.outside]
        self._all_below(len(e.made), with_node)
        need(len({*with_node}) == len(with_node), "two nodes of one tensor")
        for node in e.outside:
            need(e.made[node.made].kind == "output", "a node of no output")
            check_graph(node.graph)
            graph = node.graph
            need(not graph.writes, "a backward writes nothing")
            self._all_below(len(e.host), node.hosts)
            wanted = [(self._whole(node.made), None)]
            wanted += [(place, place) for place in node.saved]
            need(
                len(graph.params) == 1 + len(node.saved) + len(node.hosts)
                and len(graph.results) == len(node.inputs),
                "a backward and its inputs",
            )
            first = graph.params[0]
            need(layout(first) == self._whole(node.made), "a backward of another kind")
            for place, param in zip(node.saved, graph.params[1:], strict=False):
                need(self._saved(place) == layout(param), "a backward reads another kind")
            for param in graph.params[1 + len(node.saved) :]:
                need(param.value.type.is_host, "a backward takes a number of the host")
            for place, result in zip(node.inputs, graph.results, strict=True):
                self._gets_gradient(place, result.value.type, done)
            done.add(node.made)

    def _whole(self, made: int) -> tuple[Type, tuple[int, ...]]:
        """The type of a made tensor, and the strides of a contiguous one."""
        dtype, shape, device = self._kind(made)
        return Type(dtype, shape, device), contiguous_strides(shape)

    def _saved(self, place: object) -> tuple[Type, tuple[int, ...]]:
        kind, index = _place(place)
        if kind == "real":
            self._all_below(len(self.specs), [index])
            spec = self.specs[index]
            return Type(spec.dtype, spec.shape, spec.device), spec.strides
        need(kind == "output", "a backward reads what is made")
        self._all_below(len(self.results), [index])
        return self.results[index]

    def _gets_gradient(self, place: object, type: Type, done: Collection[int]) -> None:
        kind, index = _place(place)
        if kind == "real":
            self._all_below(len(self.specs), [index])
            found = self._kind_of_real(index)
            need(self.specs[index].requires_grad, "a gradient of what requires none")
        else:
            need(kind == "made", "a gradient of an output")
            self._all_below(len(self.effects.made), [index])
            leaf = self.effects.made[index].is_leaf
            need(leaf or index in done, "a node comes before what it depends on")
            found = self._kind(index)
        need(found == (type.dtype, type.shape, type.device), "a gradient of another kind")

    def _store(self, holder: int, key: object, tree: Tree) -> None:
        if holder >= LISTS:
            need(key is ... and holder - LISTS < len(self.step.lists), "there is no such list")
            self._tree(tree)
            return
        need(type(key) is str, "a store goes to a name")
        if holder == NUMBERS:
            need(key in self.step.numbers, f"there is no number {key!r}")
            need(isinstance(tree, HostSlot), "a number that is stored")
            self._all_below(len(self.effects.host), [tree.index])
            return
        need(holder == TENSORS and key in self.step.tensors, f"there is no tensor {key!r}")
        need(isinstance(tree, Slot), "a tensor that is stored")
        self._all_below(len(self.effects.made), [tree.index])
        old = self.step.tensors[key]
        kind = self._kind(tree.index)[:2]
        need(kind == (TO_IR[old.dtype], tuple(old.shape)), f"{key!r} is replaced by another kind")

    def _tree(self, tree: Tree) -> None:
        """What is returned."""
        match tree:
            case Slot(index):
                self._all_below(len(self.effects.made), [index])
            case HostSlot(index):
                self._all_below(len(self.effects.host), [index])
            case Given(index):
                self._all_below(len(self.captured.given), [index])
                need(not isinstance(self.captured.given[index], type), "a class is returned")
            case Sequenced(kind, items):
                if isinstance(kind, Given):
                    self._all_below(len(self.captured.given), [kind.index])
                    of = self.captured.given[kind.index]
                    need(isinstance(of, type) and width(of) == len(items), "a tuple of some class")
                else:
                    need(kind in ("list", "tuple"), "a tuple of some class")
                for item in items:
                    self._tree(item)
            case Mapped(items):
                for key, item in items:
                    need(type(key) in (str, int, Given), "a key that is returned")
                    if isinstance(key, Given):
                        self._tree(key)
                    self._tree(item)
            case _:
                raise Damaged("nothing is returned")


def _place(place: object) -> tuple[str, int]:
    """A place that was read from a text, as one."""
    whole = type(place) is tuple and len(place) == 2
    need(whole and type(place[0]) is str and type(place[1]) is int, f"no place: {place}")
    need(0 <= place[1] < LIMIT, f"no place: {place}")
    return place
