"""What a trace leaves behind: a Captured step.

`finish` reads a tracer after the user's function returned and freezes everything in pure data.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import torch

from tracejit.capture.effects.captured import (
    Captured,
    Constant,
    HostSlot,
    Made,
    Mapped,
    Sequenced,
    Slot,
    graph_key,
    is_plain,
    slots,
)
from tracejit.capture.effects.hyperparameters import Held
from tracejit.capture.effects.outside import Nodes, nodes
from tracejit.capture.python.garbage import uncollected
from tracejit.capture.python.references import LOOPED, count
from tracejit.capture.trace import location
from tracejit.capture.trace.numbers import for_the_plan, mixed_devices, settled
from tracejit.capture.trace.scalars import TracedFloat, plain
from tracejit.capture.trace.tensor import TO_TORCH, Handle, Storage, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import SideEffectError
from tracejit.ir.graph import Arg, Result, Write
from tracejit.ir.types import contiguous_strides


class Collector:
    """Numbers the tensors to make and the outputs they stand on."""

    def __init__(self, t: Trace):
        self.t = t
        self.made: list[Made] = []
        self.of_handle: dict[Handle, int] = {}
        self.outputs: dict[Storage, int] = {}
        self.hosts: dict[Storage, tuple[torch.dtype, int]] = {}
        self.host: list[Arg] = []
        self.mixed = mixed_devices(t)

    def real(self, tensor: torch.Tensor) -> int:
        """The position of an outside tensor in the inputs, which may grow here."""
        self.t.lift(tensor)
        return self.t.inputs.position(tensor)

    def tensor(self, tensor: torch.Tensor) -> int:
        handle = self.t.lift(tensor)
        if handle not in self.of_handle:
            self.of_handle[handle] = len(self.made)
            self.made.append(self._made(handle))
        return self.of_handle[handle]

    def _made(self, h: Handle) -> Made:
        if h.is_real:
            return Made("real", self.real(h.tensor))
        storage = h.storage
        leaf = h.requires_grad_leaf
        geometry = (h.shape, h.strides, h.offset, self.t.requires_grad(h), leaf)
        if storage.real is not None:
            return Made("alias", self.real(storage.real), *geometry)
        if self.on_host(storage):
            return Made("host", list(self.hosts).index(storage), *geometry)
        return Made("output", self.outputs.setdefault(storage, len(self.outputs)), *geometry)

    def on_host(self, storage: Storage) -> bool:
        """Whether a new tensor is made on the host: its one number is known there."""
        if storage not in self.hosts and storage not in self.outputs:
            number = settled(self.t, storage, self.mixed)
            if number is not None:
                dtype = TO_TORCH[storage.value.type.dtype]
                self.hosts[storage] = dtype, self.host_result(number)
        return storage in self.hosts

    def host_result(self, number: float) -> int:
        """The position of a number among the host results."""
        self.host.append(number.value if isinstance(number, TracedFloat) else number)
        return len(self.host) - 1

    def tree(self, x: object, holders: int = 2) -> object:
        """What is returned, by structure. A list or dict that somebody else holds too, besides
        `holders`, is returned itself. (2: `x` and getrefcount's argument.)"""
        if type(x) in (list, dict) and sys.getrefcount(x) > holders:
            return Constant(x)
        if isinstance(x, torch.Tensor):
            return Slot(self.tensor(x))
        if isinstance(x, TracedFloat):
            mine = x.scalars is self.t.scalars  # or kept from an earlier call
            return HostSlot(self.host_result(x)) if mine else Constant(plain(x))
        inner = 4  # its container and the loop's variable too
        if type(x) in (tuple, list) or (isinstance(x, tuple) and hasattr(x, "_fields")):
            return Sequenced(type(x), tuple([self.tree(item, inner) for item in x]))
        if type(x) is dict:
            return Mapped(tuple([(k, self.tree(x[k], inner - 1)) for k in x]))
        return Constant(x)


def finish(
    t: Trace, name: str, returned: list[object], young: uncollected, *, keep_grads: bool = True
) -> Captured:
    """Freeze a trace. `returned` is a one-element list, emptied here, so that references to
    intermediates can be counted. If it raises, optimizers are as they were before the trace.

    Without `keep_grads`, a `.grad` that the step made is None afterwards.
    """
    try:
        return _finish(t, name, returned, young, keep_grads)
    except BaseException:
        t.forget()
        t.hyperparameters.undo()
        raise


def _finish(
    t: Trace, name: str, returned: list[object], young: uncollected, keep_grads: bool
) -> Captured:
    t.call = None
    t.journal.over()
    collect = Collector(t)
    tree = collect.tree(returned.pop())
    stores = tuple((Held(d), key, collect.tree(x)) for d, key, x in t.hyperparameters.stores)
    grads, grads_read, datas = [], [], []
    for i, h in enumerate(tuple(t.inputs.handles)):
        if h.grad_read:
            at_start = h.grad_at_start
            lifted = (k for k, r in enumerate(t.inputs.tensors) if r is at_start)
            found = None if at_start is None else next(lifted, -1)
            grads_read.append((i, found))
        assigned = h.is_real and h.grad_known
        if assigned and (h.grad is not h.grad_at_start or not h.grad_read):
            kept = h.grad is not None and (keep_grads or not _is_new(h.grad))
            grads.append((i, collect.tensor(h.grad) if kept else None))
        if h.storage.real is None:
            datas.append((i, h))
    datas = [(i, _data_of(collect, h)) for i, h in datas]
    escaped = tuple((p, collect.tensor(p)) for p in _escapes(t, collect, young))
    leaf_grads = tuple(
        (i, collect.tensor(h.grad))
        for h, i in tuple(collect.of_handle.items())
        if keep_grads and not h.is_real and h.grad is not None and t.is_leaf(h)
    )
    found = _nodes(collect, name)
    writes, host_writes, written = _writes(collect)
    results = tuple(
        Result(s.value, None if s.strides == contiguous_strides(s.value.type.shape) else s.strides)
        for s in collect.outputs
    )
    results += tuple(map(Result, found.saved))
    host_nodes = tuple(n for n in t.b.nodes if n.op.family == "host")
    graph = for_the_plan(t.b.graph(name, results, writes))
    scalar_index = {value: k for k, (value, _) in enumerate(t.scalars.params)}
    position = {id(r): i for i, r in enumerate(t.inputs.tensors)}
    of_param = {s.param: position[id(s.real)] for s in t.inputs.storages}
    sources = tuple(
        ("scalar", scalar_index[p.value])
        if p.value in scalar_index
        else ("tensor", of_param[p.value])
        for p in graph.params
    )
    made = tuple(
        replace(m, kind="view", index=found.views[i]) if i in found.views else m
        for i, m in enumerate(collect.made)
    )
    hosts = tuple(collect.hosts.values())
    key = (
        graph_key(graph),
        sources,
        made,
        repr(tree) if is_plain(tree) else id(tree),
        tuple(grads),
        tuple(grads_read),
        leaf_grads,
        tuple(datas),
        tuple(written),
        tuple(repr(p) for p in t.scalars.predicates),
        tuple((graph_key(o.graph), o.made, o.inputs, o.saved, o.hosts) for o in found.outside),
        tuple(sorted(found.reasons.items())),
        tuple(f"{n.outs}{n.op.name}{n.args}" for n in host_nodes),
        tuple(map(repr, collect.host)),
        tuple(t.scalars.paths),
        (hosts, host_writes, tuple((d, key, repr(x)) for d, key, x in stores)),
        len(t.hyperparameters.callbacks),
    )
    captured = Captured(
        graph=graph,
        reals=t.inputs.tensors,
        sources=sources,
        scalars=tuple(number for _, number in t.scalars.params),
        paths=tuple(t.scalars.paths),
        scalar_values=tuple(value for value, _ in t.scalars.params),
        host_nodes=host_nodes,
        predicates=tuple(t.scalars.predicates),
        made=made,
        tree=tree,
        host_results=tuple(collect.host),
        grads=tuple(grads),
        leaf_grads=leaf_grads,
        datas=tuple(datas),
        written=tuple(written),
        hosts=hosts,
        host_writes=host_writes,
        stores=stores,
        callbacks=tuple(t.hyperparameters.callbacks),
        grads_read=tuple(grads_read),
        escaped=escaped,
        outside=tuple(found.outside),
        reasons=tuple(sorted(found.reasons.items())),
        key=key,
        bounds=tuple(t.bounds),
        undo=t.hyperparameters.undo,
    )
    t.forget()
    t.journal.close(captured, collect.of_handle, frozenset(slots(tree)))
    return captured


def _is_new(grad: torch.Tensor) -> bool:
    """Whether a `.grad` is a tensor that the step made."""
    return type(grad) is TracedTensor and grad.handle.storage.real is None


def _writes(
    collect: Collector,
) -> tuple[tuple[Write, ...], tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Outside memory that the step overwrites: by the plan, by the host, and whose it is."""
    t = collect.t
    writes, host_writes, written = [], [], []
    for s in t.inputs.storages:
        if s.value is s.param:
            continue
        number = settled(t, s, collect.mixed)
        if number is None:
            writes.append(Write(s.param, s.value))
        else:
            host_writes.append((collect.real(s.real), collect.host_result(number)))
        written += [
            i
            for i, h in enumerate(t.inputs.handles)
            if h.storage is s and h.version.count  # writes through .data do not count
        ]
    return tuple(writes), tuple(host_writes), tuple(written)


def _nodes(collect: Collector, name: str) -> Nodes:
    """Autograd nodes for the made tensors that require grad and have a history."""
    t = collect.t
    handles: list[Handle | None] = [None] * len(collect.made)
    for h, i in collect.of_handle.items():
        handles[i] = h
    for h in t.inputs.handles:
        if t.requires_grad(h) and not (h.requires_grad_leaf or h in t.foreign or h.family.quiet):
            raise SideEffectError(
                where=location.full(),
                reason=f"a tensor of shape {list(h.shape)} from outside the step was modified in "
                "place by an operation that is differentiated, so it would require grad from now "
                "on",
                remedy="Modify it under torch.no_grad(), or with a detached value",
            )
    roots = [
        i
        for i, (h, m) in enumerate(zip(handles, collect.made, strict=True))
        if h is not None
        and m.requires_grad
        and not m.is_leaf
        and m.kind != "real"
        and not h.family.quiet
    ]
    return nodes(t, handles, roots, collect.of_handle, collect.outputs, collect.host, name)


def _data_of(collect: Collector, h: Handle) -> int:
    """The made tensor for `.data = …`: the whole of the storage that the handle took over."""
    storage = h.storage
    index = collect.outputs.setdefault(storage, len(collect.outputs))
    collect.made.append(Made("output", index, h.shape, h.strides, 0, False))
    return len(collect.made) - 1


def _escapes(t: Trace, collect: Collector, young: uncollected) -> list[TracedTensor]:
    """Intermediates that user objects still hold, found by counting references."""

    def suspects() -> list[TracedTensor]:
        contexts = t.contexts  # of custom autograd functions; they go with the trace
        held = Counter(id(x) for context in contexts for x in context.references())
        for h in (*t.inputs.handles, *(p.handle for p in t.proxies)):
            for grad in (h.grad, h.grad_at_start):
                if grad is not None:
                    held[id(grad)] += 1
        held.update(t.journal.holds())
        # besides `t.proxies`, its handle holds a proxy
        return [p for p in t.proxies if count(p) > LOOPED + 1 + held[id(p)]]

    if not suspects():
        return []
    young.collect_young()
    return suspects()
