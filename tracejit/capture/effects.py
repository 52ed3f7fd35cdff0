"""What a trace leaves behind: the Captured step, and its commit to the user's objects.

`finish` reads a tracer after the user's function returned and freezes everything in pure data:
the raw Graph, which tensor feeds which input, and the effects: fresh tensors to return or to set as
`.grad`, tensors written in place, host values in the result. `Captured.commit` applies them.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tracejit.capture import location
from tracejit.capture.bounds import Bound
from tracejit.capture.host import for_the_plan, mixed_devices, settled
from tracejit.capture.outside import Nodes, Outside, Run, attach, nodes
from tracejit.capture.scalars import Path, Predicate, TracedFloat, plain
from tracejit.capture.state import Callback, Held
from tracejit.capture.tensor import TO_TORCH, Handle, Ints, Storage, TracedTensor
from tracejit.capture.tracer import Tracer
from tracejit.errors import LeakedTracer, SideEffectError
from tracejit.ir import host_memory
from tracejit.ir.graph import Arg, Graph, Node, Result, Value, Write
from tracejit.ir.types import contiguous_strides

_AFTERWARDS = "backward through the result of a compiled step is not possible: {reason}"
_NO_NODE = "the step keeps no graph for it. Call backward inside the step"


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor to hand out after the plan has run.

    kind "real": the `index`-th outside tensor itself; "output": a view of the `index`-th fresh
    output; "alias": a view of the memory of the `index`-th outside tensor; "view": a view of the
    `index`-th tensor made, with its history; "host": a view of the `index`-th of `hosts`.
    """

    kind: str
    index: int
    shape: Ints = ()
    strides: Ints = ()
    offset: int = 0
    requires_grad: bool = False
    is_leaf: bool = False


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the returned structure that holds the `index`-th made tensor."""

    index: int


@dataclass(frozen=True, slots=True)
class HostSlot:
    """A place in the returned structure that holds a host value, by its position."""

    index: int


@dataclass(frozen=True, slots=True)
class Sequenced:
    """A tuple, list or namedtuple in the returned structure."""

    kind: type
    items: tuple


@dataclass(frozen=True, slots=True)
class Mapped:
    """A dict in the returned structure."""

    items: tuple[tuple[object, object], ...]


@dataclass(frozen=True, slots=True)
class Constant:
    """Anything else that was returned."""

    value: object


@dataclass(slots=True)
class Captured:
    """One traced step."""

    graph: Graph
    reals: list[torch.Tensor]  # outside tensors, in the order of first use
    sources: tuple[tuple[str, int], ...]  # per param: ("tensor", reals index) or ("scalar", k)
    scalars: tuple[float, ...]  # the runtime scalars' values in this trace
    paths: tuple[Path, ...]  # where each comes from
    scalar_values: tuple[Value, ...]
    host_nodes: tuple[Node, ...]  # the arithmetic on them
    predicates: tuple[Predicate, ...]
    made: tuple[Made, ...]
    tree: object
    host_results: tuple[Arg, ...]
    grads: tuple[tuple[int, int | None], ...]  # (reals index, made index or None: cleared)
    datas: tuple[tuple[int, int], ...]  # (reals index, made index): `.data = …`
    written: tuple[int, ...]  # reals whose memory is overwritten
    hosts: tuple[tuple[torch.dtype, int], ...]  # new CPU tensors of one element: host results index
    host_writes: tuple[tuple[int, int], ...]  # (reals index, host results index): its one element
    stores: tuple[tuple[Held, str, object], ...]  # dict entries rebound to a tree of host results
    callbacks: tuple[Callback, ...]  # calls that the trace ran as they are
    grads_read: tuple[tuple[int, int | None], ...]  # (reals index, reals index of .grad or None)
    escaped: tuple[tuple[TracedTensor, int], ...]  # proxies kept by user objects, made index
    outside: tuple[Outside, ...]  # autograd nodes of made tensors, in order of dependence
    reasons: tuple[tuple[int, str], ...]  # made tensors that no backward can go through, and why
    key: tuple  # equal keys: the same graph and the same effects
    bounds: tuple[Bound, ...]  # what the values of index tensors must be
    undo: Callable[[], None]  # before the commit: put optimizers and schedulers back as they were

    def commit(
        self,
        reals: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        host_results: Sequence[float],
        backwards: Sequence[Run] = (),
    ) -> object:
        """Apply the effects once the plan has run; returns what the step returns.

        `backwards` run the graphs of `outside`; without them no backward goes through the results.
        """
        if self.written:
            torch.autograd.graph.increment_version([reals[i] for i in self.written])
        for index, source in self.host_writes:
            host_memory.write(reals[index], host_results[source])
        for held, key, tree in self.stores:
            held.holder[key] = rebuild(tree, [], host_results)
        made = self._make(reals, outputs, host_results, backwards)
        for index, source in self.datas:
            reals[index].data = made[source]
        for index, source in self.grads:
            reals[index].grad = None if source is None else made[source]
        _make_real(self.escaped, made)
        return rebuild(self.tree, made, host_results)

    def _make(
        self,
        reals: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        host_results: Sequence[float],
        backwards: Sequence[Run],
    ) -> list[torch.Tensor]:
        """The tensors to hand out. Those with an autograd node come after what they depend on."""
        nodes = self.outside if backwards else ()
        later = {node.made for node in nodes}
        reasons = dict(self.reasons)
        hosts = [_host_tensor(dtype, host_results[i]) for dtype, i in self.hosts]
        made: list[torch.Tensor | None] = []
        for i, m in enumerate(self.made):
            if i in later or m.kind == "view":
                made.append(None)
                continue
            tensor = _materialize(m, reals, hosts if m.kind == "host" else outputs)
            if m.is_leaf:
                tensor = tensor.detach().requires_grad_()
            elif m.requires_grad:
                tensor = _mark(tensor, reasons.get(i, _NO_NODE))
            made.append(tensor)
        for node, run in zip(nodes, backwards, strict=bool(nodes)):
            plain = _materialize(self.made[node.made], reals, outputs).detach()
            made[node.made] = attach(node, plain, reals, made, outputs, host_results, run)
        for i, m in enumerate(self.made):
            if m.kind == "view":
                with torch.enable_grad():
                    made[i] = made[m.index].as_strided(m.shape, m.strides, m.offset)
        return made

    def release(self) -> None:
        """Forget the tensors of this trace, keeping what a replay needs."""
        self.reals = []
        self.escaped = ()
        self.undo = _nothing


def _nothing() -> None:
    """What is committed is not undone."""


def _materialize(
    made: Made, reals: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    if made.kind == "real":
        return reals[made.index]
    base = (reals if made.kind == "alias" else outputs)[made.index]
    geometry = (made.shape, made.strides, made.offset)
    if made.kind == "alias":
        base = base.detach()
    if geometry != (tuple(base.shape), base.stride(), base.storage_offset()):
        base = base.as_strided(*geometry)
    return base


def _host_tensor(dtype: torch.dtype, number: float) -> torch.Tensor:
    tensor = torch.empty((), dtype=dtype, device="cpu")
    host_memory.write(tensor, number)
    return tensor


def _mark(tensor: torch.Tensor, reason: str) -> torch.Tensor:
    """Let a tensor require grad, with a node that raises when backward reaches it."""
    with torch.enable_grad():
        leaf = tensor.detach().requires_grad_()
        return torch._C._functions.DelayedError(_AFTERWARDS.format(reason=reason), 1)(leaf)


def _make_real(escaped: Sequence[tuple[TracedTensor, int]], made: list[torch.Tensor]) -> None:
    """Turn proxies that user objects hold into the tensors they stand for, in place."""
    for proxy, index in escaped:
        real = made[index]
        del proxy.handle, proxy.tracer
        proxy.__class__ = torch.Tensor
        try:
            torch._C._swap_tensor_impl(proxy, real)
        except RuntimeError as error:
            raise LeakedTracer(
                where="after the step",
                function="storing an intermediate in a Python object",
                reason=f"which cannot be made real ({error})",
                remedy="Return the tensor from the step and store it outside",
            ) from error
        made[index] = proxy  # the other object is an empty shell now


def rebuild(tree: object, made: Sequence[torch.Tensor], host: Sequence[float]) -> object:
    """The structure that a tree describes."""
    match tree:
        case Slot(index):
            return made[index]
        case HostSlot(index):
            return host[index]
        case Sequenced(kind, items):
            parts = [rebuild(x, made, host) for x in items]
            if kind in (list, tuple):
                return kind(parts)
            return kind(*parts)  # a namedtuple
        case Mapped(items):
            return {k: rebuild(v, made, host) for k, v in items}
        case Constant(value):
            return value
    raise AssertionError(tree)


class _Collector:
    """Numbers the tensors to make and the outputs they stand on."""

    def __init__(self, tracer: Tracer):
        self.tracer = tracer
        self.made: list[Made] = []
        self.of_handle: dict[Handle, int] = {}
        self.outputs: dict[Storage, int] = {}
        self.hosts: dict[Storage, tuple[torch.dtype, int]] = {}
        self.host: list[Arg] = []
        self.mixed = mixed_devices(tracer)

    def real(self, tensor: torch.Tensor) -> int:
        """The position of an outside tensor in `tracer.reals`, which may grow here."""
        self.tracer.lift(tensor)
        return next(i for i, r in enumerate(self.tracer.reals) if r is tensor)

    def tensor(self, tensor: torch.Tensor) -> int:
        handle = self.tracer.lift(tensor)
        if handle not in self.of_handle:
            self.of_handle[handle] = len(self.made)
            self.made.append(self._made(handle))
        return self.of_handle[handle]

    def _made(self, h: Handle) -> Made:
        if h.is_real:
            return Made("real", self.real(h.tensor))
        storage = h.storage
        leaf = h.requires_grad_leaf
        geometry = (h.shape, h.strides, h.offset, self.tracer.requires_grad(h), leaf)
        if storage.real is not None:
            return Made("alias", self.real(storage.real), *geometry)
        if self.on_host(storage):
            return Made("host", list(self.hosts).index(storage), *geometry)
        return Made("output", self.outputs.setdefault(storage, len(self.outputs)), *geometry)

    def on_host(self, storage: Storage) -> bool:
        """Whether a new tensor is made on the host: its one number is known there."""
        if storage not in self.hosts and storage not in self.outputs:
            number = settled(self.tracer, storage, self.mixed)
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
            mine = x.link is self.tracer.link  # or kept from an earlier call
            return HostSlot(self.host_result(x)) if mine else Constant(plain(x))
        inner = 4  # its container and the loop's variable too
        if type(x) in (tuple, list) or (isinstance(x, tuple) and hasattr(x, "_fields")):
            return Sequenced(type(x), tuple([self.tree(item, inner) for item in x]))
        if type(x) is dict:
            return Mapped(tuple([(k, self.tree(x[k], inner - 1)) for k in x]))
        return Constant(x)


def finish(
    tracer: Tracer, name: str, returned: list[object], *, keep_grads: bool = True
) -> Captured:
    """Freeze a trace. `returned` is a one-element list, emptied here, so that references to
    intermediates can be counted. If it raises, optimizers are as they were before the trace.

    Without `keep_grads`, a `.grad` that the step made is None afterwards.
    """
    try:
        return _finish(tracer, name, returned, keep_grads)
    except BaseException:
        tracer.forget()
        tracer.state.undo()
        raise


def _finish(tracer: Tracer, name: str, returned: list[object], keep_grads: bool) -> Captured:
    tracer._call = None
    collect = _Collector(tracer)
    tree = collect.tree(returned.pop())
    stores = tuple((Held(d), key, collect.tree(x)) for d, key, x in tracer.state.stores)
    grads, grads_read, datas = [], [], []
    for i, h in enumerate(tuple(tracer.handles)):
        if h.grad_read:
            at_start = h.grad_at_start
            lifted = (k for k, r in enumerate(tracer.reals) if r is at_start)
            found = None if at_start is None else next(lifted, -1)
            grads_read.append((i, found))
        assigned = h.is_real and h.grad_known
        if assigned and (h.grad is not h.grad_at_start or not h.grad_read):
            kept = h.grad is not None and (keep_grads or not _is_new(h.grad))
            grads.append((i, collect.tensor(h.grad) if kept else None))
        if h.storage.real is None:
            datas.append((i, h))
    datas = [(i, _data_of(collect, h)) for i, h in datas]
    escaped = tuple((p, collect.tensor(p)) for p in _escapes(tracer, collect))
    found = _nodes(collect, name)
    writes, host_writes, written = _writes(collect)
    tracer.forget()
    results = tuple(
        Result(s.value, None if s.strides == contiguous_strides(s.value.type.shape) else s.strides)
        for s in collect.outputs
    )
    results += tuple(map(Result, found.saved))
    host_nodes = tuple(n for n in tracer.b.nodes if n.op.family == "host")
    graph = for_the_plan(tracer.b.graph(name, results, writes))
    scalar_index = {value: k for k, (value, _) in enumerate(tracer.scalars)}
    position = {id(r): i for i, r in enumerate(tracer.reals)}
    of_param = {s.param: position[id(s.real)] for s in tracer.storages}
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
        repr(tree) if _plain(tree) else id(tree),
        tuple(grads),
        tuple(grads_read),
        tuple(datas),
        tuple(written),
        tuple(repr(p) for p in tracer.predicates),
        tuple((graph_key(o.graph), o.made, o.inputs, o.saved, o.hosts) for o in found.outside),
        tuple(sorted(found.reasons.items())),
        tuple(f"{n.outs}{n.op.name}{n.args}" for n in host_nodes),
        tuple(map(repr, collect.host)),
        tuple(tracer.paths),
        (hosts, host_writes, tuple((d, key, repr(x)) for d, key, x in stores)),
        len(tracer.state.callbacks),
    )
    return Captured(
        graph=graph,
        reals=tracer.reals,
        sources=sources,
        scalars=tuple(number for _, number in tracer.scalars),
        paths=tuple(tracer.paths),
        scalar_values=tuple(value for value, _ in tracer.scalars),
        host_nodes=host_nodes,
        predicates=tuple(tracer.predicates),
        made=made,
        tree=tree,
        host_results=tuple(collect.host),
        grads=tuple(grads),
        datas=tuple(datas),
        written=tuple(written),
        hosts=hosts,
        host_writes=host_writes,
        stores=stores,
        callbacks=tuple(tracer.state.callbacks),
        grads_read=tuple(grads_read),
        escaped=escaped,
        outside=tuple(found.outside),
        reasons=tuple(sorted(found.reasons.items())),
        key=key,
        bounds=tuple(tracer.bounds),
        undo=tracer.state.undo,
    )


def _is_new(grad: torch.Tensor) -> bool:
    """Whether a `.grad` is a tensor that the step made."""
    return type(grad) is TracedTensor and grad.handle.storage.real is None


def _writes(
    collect: _Collector,
) -> tuple[tuple[Write, ...], tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Outside memory that the step overwrites: by the plan, by the host, and whose it is."""
    t = collect.tracer
    writes, host_writes, written = [], [], []
    for s in t.storages:
        if s.value is s.param:
            continue
        number = settled(t, s, collect.mixed)
        if number is None:
            writes.append(Write(s.param, s.value))
        else:
            host_writes.append((collect.real(s.real), collect.host_result(number)))
        written += [
            i
            for i, h in enumerate(t.handles)
            if h.storage is s and h.version.count  # writes through .data do not count
        ]
    return tuple(writes), tuple(host_writes), tuple(written)


def _nodes(collect: _Collector, name: str) -> Nodes:
    """Autograd nodes for the made tensors that require grad and have a history."""
    t = collect.tracer
    handles: list[Handle | None] = [None] * len(collect.made)
    for h, i in collect.of_handle.items():
        handles[i] = h
    for h in t.handles:
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


def _data_of(collect: _Collector, h: Handle) -> int:
    """The made tensor for `.data = …`: the whole of the storage that the handle took over."""
    storage = h.storage
    index = collect.outputs.setdefault(storage, len(collect.outputs))
    collect.made.append(Made("output", index, h.shape, h.strides, 0, False))
    return len(collect.made) - 1


def _plain(tree: object) -> bool:
    """Whether a returned structure holds only tensors, host values, numbers, strings and None."""
    match tree:
        case Sequenced(_, items):
            return all(map(_plain, items))
        case Mapped(items):
            return all(isinstance(k, (str, int)) and _plain(v) for k, v in items)
        case Constant(value):
            return value is None or type(value) in (bool, int, float, str, torch.dtype)
    return True


def _escapes(tracer: Tracer, collect: _Collector) -> list[TracedTensor]:
    """Intermediates that user objects still hold, found by counting references."""

    def suspects() -> list[TracedTensor]:
        contexts = tracer.contexts  # of custom autograd functions; they go with the trace
        held = Counter(id(x) for context in contexts for x in context.references())
        for h in (*tracer.handles, *(p.handle for p in tracer.proxies)):
            for grad in (h.grad, h.grad_at_start):
                if grad is not None:
                    held[id(grad)] += 1
        # known holders: tracer.proxies, handle.tensor, the loop variable, getrefcount's argument
        return [p for p in tracer.proxies if sys.getrefcount(p) > 4 + held[id(p)]]

    if not suspects():
        return []
    # what the trace made is young, unless a collection of the middle generation went by
    young = gc.get_stats()[1]["collections"] == tracer.collections
    gc.collect(1 if young else 2)
    return suspects()


def graph_key(graph: Graph) -> tuple:
    """A hashable identity of what a graph computes, its user's lines included.

    It tells 1, 1.0 and True, and 0.0 and -0.0, apart.
    """
    number = {p.value: k for k, p in enumerate(graph.params)}
    lines = []
    for node in graph.nodes:
        args = [f"%{number[a]}" if isinstance(a, Value) else repr(a) for a in node.args]
        lines.append(f"{node.op.name}{args}{node.attrs}{node.where}")
        number |= {out: len(number) + k for k, out in enumerate(node.outs)}
    return (
        tuple((str(p.value.type), p.strides) for p in graph.params),
        tuple(lines),
        tuple((number[r.value], r.strides) for r in graph.results),
        tuple((number[w.target], number[w.value]) for w in graph.writes),
    )
