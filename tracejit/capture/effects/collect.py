"""From a trace that is over to what it leaves behind: a Captured step, and the Call that it was.

`finish` reads a trace after the user's function returned and freezes everything in pure data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch

from tracejit.capture.effects.captured import OPAQUE, Captured, Checks, Key, cut_key, graph_key
from tracejit.capture.effects.eager import eager_cost
from tracejit.capture.effects.effects import (
    Call,
    Effects,
    HostSlot,
    Made,
    is_attributes,
    is_named,
)
from tracejit.capture.effects.late import late_cuts
from tracejit.capture.effects.outside import Nodes, nodes
from tracejit.capture.effects.structure import Structure
from tracejit.capture.effects.together import draws_together
from tracejit.capture.functions.data_parallel import check_over
from tracejit.capture.python.references import LOOPED, count
from tracejit.capture.trace import location
from tracejit.capture.trace.bounds import Bound, Check
from tracejit.capture.trace.cuts import Source, sources_of
from tracejit.capture.trace.numbers import for_the_plan, mixed_devices, settled
from tracejit.capture.trace.scalars import TracedFloat, TracedInt, TracedText, is_traced
from tracejit.capture.trace.tensor import Handle, Storage, TracedTensor, Version
from tracejit.capture.trace.trace import Trace
from tracejit.capture.trace.views import is_conjugate
from tracejit.errors import SideEffectError
from tracejit.garbage import uncollected
from tracejit.ir.graph import Arg, Graph, Result, Write
from tracejit.ir.types import COMPLEX, DType, contiguous_strides
from tracejit.passes.cone import cone
from tracejit.records import dataclass

_PLAIN = frozenset(
    {bool, int, float, str, type(None), torch.dtype, torch.Size, torch.device, torch.memory_format}
)


class Collector(Structure):
    """Numbers the tensors to make, the outputs they stand on, and the host results."""

    def __init__(self, t: Trace):
        super().__init__(t.scalars.texts)
        self.t = t
        self.made: list[Made] = []
        self.of_handle: dict[Handle, int] = {}
        self.outputs: dict[Storage, int] = {}
        self.hosts: dict[Storage, tuple[DType, int]] = {}
        self.host: list[Arg] = []
        self.mixed = mixed_devices(t)

    def real(self, tensor: torch.Tensor) -> int:
        """The position of an outside tensor among the inputs, which may grow here."""
        self.t.lift(tensor)
        return self.t.inputs.position(tensor)

    def tensor(self, tensor: torch.Tensor) -> int:
        return self.tensor_of(self.t.lift(tensor))

    def tensor_of(self, handle: Handle) -> int:
        """The position of the tensor of a handle among those that are made."""
        if handle not in self.of_handle:
            self.of_handle[handle] = len(self.made)
            self.made.append(self._made(handle))
        return self.of_handle[handle]

    def _made(self, h: Handle) -> Made:
        if h.is_real:
            return Made("real", self.real(h.tensor))
        storage = h.storage
        if storage in self.t.inference:
            raise SideEffectError(
                where=location.of_node(self.t.producers.get(storage.value)),
                reason="a tensor that was made in inference mode leaves the step, and would be an "
                "ordinary tensor",
                remedy="Use torch.no_grad() in the step, or clone the tensor outside inference "
                "mode",
            )
        if storage in self.t.copied:
            raise SideEffectError(
                where=location.of_node(self.t.producers.get(storage.value)),
                reason="x[i] with a tensor i of no axes leaves the step: a view of x, whose place "
                "depends on a value",
                remedy="Return x[i].clone() instead",
            )
        if is_conjugate(h.steps):
            raise SideEffectError(
                where=location.full(),
                reason="a tensor leaves the step that shows the conjugates of what lies in memory",
                remedy="Return x.resolve_conj() instead",
            )
        leaf = h.requires_grad_leaf
        offset = h.offset
        if is_traced(offset):
            offset = HostSlot(self.host_result(offset))
        held = storage.value.type.dtype
        if storage.real is not None and storage.real.is_complex():
            held = COMPLEX[held]
        bits = None if h.dtype is held else (held, h.dtype)
        geometry = (h.shape, h.strides, offset, self.t.requires_grad(h), leaf, bits)
        if storage.real is not None:
            return Made("alias", self.real(storage.real), *geometry)
        if self.on_host(storage):
            return Made("host", list(self.hosts).index(storage), *geometry)
        return Made("output", self.output(storage), *geometry)

    def output(self, storage: Storage) -> int:
        """The position of a storage among the fresh outputs of the plan."""
        return self.outputs.setdefault(storage, len(self.outputs))

    def on_host(self, storage: Storage) -> bool:
        """Whether a new tensor is made on the host: its one number is known there."""
        if storage not in self.hosts and storage not in self.outputs:
            number = settled(self.t, storage, self.mixed)
            if number is not None:
                self.hosts[storage] = storage.value.type.dtype, self.host_result(number)
        return storage in self.hosts

    def host_result(self, number: float | TracedText) -> int:
        if not (is_traced(number) or type(number) is TracedText):
            self.host.append(number)
        elif number.value in self.host:
            return self.host.index(number.value)
        else:
            self.host.append(number.value)
        return len(self.host) - 1

    def is_mine(self, number: TracedFloat | TracedInt) -> bool:
        return number.scalars is self.t.scalars


@dataclass(frozen=True, slots=True)
class Finished:
    """What a trace leaves behind, and what of it user code could still see."""

    captured: Captured
    call: Call
    made_of: dict[Handle, int]  # the tensors made


def finish(
    t: Trace, name: str, returned: list[object], young: uncollected, *, keep_grads: bool = True
) -> Finished:
    """Freeze a trace. `returned` is a one-element list, emptied here, so that references to
    intermediates can be counted. If it raises, optimizers are as they were before the trace.

    Without `keep_grads`, a `.grad` that the step made is None afterwards.
    """
    try:
        return _finish(t, name, returned, young, keep_grads)
    except BaseException:
        t.forget()
        t.hyperparameters.abort()
        t.draws.undo()
        raise


def _finish(
    t: Trace, name: str, returned: list[object], young: uncollected, keep_grads: bool
) -> Finished:
    t.call, t.complexes = None, True
    t.journal.over()
    t.drop_hooks()
    hyper = t.hyperparameters
    collect = Collector(t)
    tree = collect.returned(returned)
    hyper.lose(collect.lost)
    stores = tuple(collect.store(*store) for store in hyper.stores)
    callbacks = tuple(map(collect.operands, hyper.operands))
    hyper.stores = []  # which held intermediates
    grads, grads_read, moved = [], [], []
    for i, h in enumerate(tuple(t.inputs.handles)):
        if h.grad_read:
            at_start = h.grad_at_start
            lifted = (k for k, r in enumerate(t.inputs.tensors) if r is at_start)
            grads_read.append((i, None if at_start is None else next(lifted, -1)))
        assigned = h.is_real and h.grad_known
        if assigned and (h.grad is not h.grad_at_start or not h.grad_read):
            kept = h.grad is not None and (keep_grads or not _is_new(h.grad))
            grads.append((i, collect.tensor(h.grad) if kept else None))
        if h.storage.real is None:
            moved.append((i, h))
    datas = tuple((i, _data_of(collect, h)) for i, h in moved)
    escaped = [(p, collect.tensor(p)) for p in _escapes(t, collect, young)]
    hooked = next((h for h in collect.of_handle if any(t.hooks_of_leaf.get(h, ()))), None)
    if hooked is not None:
        raise SideEffectError(
            where=location.of_node(t.producers.get(hooked.storage.value)),
            reason="a tensor with hooks that the step has made would lose them",
            remedy="Register the hooks outside the step, or remove them before it returns",
        )
    leaf_grads = tuple(
        (i, collect.tensor(h.grad))
        for h, i in tuple(collect.of_handle.items())
        if keep_grads and not h.is_real and h.grad is not None and t.is_leaf(h)
    )
    found = _nodes(collect, name)
    if t.armed or t.unsynced or t.joins:
        check_over(t, bool(found.outside))
    writes, host_writes, written = _writes(collect)
    results = tuple(
        Result(s.value, None if s.strides == contiguous_strides(s.value.type.shape) else s.strides)
        for s in collect.outputs
    )
    results += tuple(map(Result, found.saved))
    made = tuple(
        replace(m, kind=found.views[i][0], index=found.views[i][1]) if i in found.views else m
        for i, m in enumerate(collect.made)
    )
    effects = Effects(
        host=tuple(collect.host),
        written=written,
        host_writes=host_writes,
        stores=stores,
        hosts=tuple(collect.hosts.values()),
        made=made,
        outside=tuple(found.outside),
        reasons=tuple(sorted(found.reasons.items())),
        datas=datas,
        flags=_flags(collect, bool(found.outside)),
        grads=tuple(grads),
        leaf_grads=leaf_grads,
        escaped=tuple(index for _, index in escaped),
        returned=tree,
        callbacks=callbacks,
    )
    late = late_cuts(t, effects)
    results += tuple(Result(t.cuts[k].value) for k in late)
    graph = for_the_plan(t.b.graph(name, results, writes))
    checks = None if collect.mixed else _checks(t, name)
    captured = _captured(t, graph, checks, effects, tuple(grads_read), collect.given, late)
    proxies = [p for p, _ in escaped]
    call = Call(
        reals=t.inputs.tensors,
        scalars=[number for _, number in t.scalars.params],
        holders=hyper.holders,
        given=collect.given,
        escaped=proxies,
        callbacks=tuple(hyper.callbacks),
        found=[tensor for _, tensor in t.found],
        drawn=t.draws.given,
        generators=t.draws.generators,
        undo=undoing(t, hyper.undo, proxies),
    )
    t.forget()
    return Finished(captured, call, collect.of_handle)


def undoing(t: Trace, undo: Callable[[list], None], proxies: list) -> Callable[[], None]:
    """`undo` of these proxies, and of what a trace has drawn."""
    draws = t.draws

    def undo_all() -> None:
        draws.undo()
        undo(proxies)

    return undo_all


def _checks(t: Trace, name: str) -> Checks | None:
    """The checks on computed values, but for those of a backward that runs outside."""
    checks = [b for b in t.bounds if isinstance(b, Check)]
    defined = {out for node in t.b.nodes for out in node.outs} if checks else set()
    checks = [b for b in checks if b.bad in defined]
    if not checks:
        return None
    with t.untaped():
        failed = checks[0].bad
        for check in checks[1:]:
            failed = t.b.or_(failed, check.bad)
    values = [failed]
    for check in checks:
        values += [check.bad] if check.shown is None else [check.bad, check.shown]
    graph, _ = cone(t.b.graph(name, ()), values, f"{name}_checks")
    shown = tuple(check.shown is not None for check in checks)
    return Checks(graph, _sources(t, graph), shown, tuple(check.error for check in checks))


def _sources(t: Trace, graph: Graph) -> tuple[Source, ...]:
    """Where each param of a graph comes from."""
    found = sources_of(t)
    return tuple(found[p.value] for p in graph.params)


def _captured(
    t: Trace,
    graph: Graph,
    checks: Checks | None,
    effects: Effects,
    grads_read: tuple,
    given: list[object],
    late: tuple[int, ...],
) -> Captured:
    scalars = tuple(value for value, _ in t.scalars.params)
    sources, events = _sources(t, graph), tuple(t.draws.events)
    host_nodes = tuple(n for n in t.b.nodes if n.op.family == "host")
    if len(late) == len(t.cuts):  # else segments share values with the graph
        whole = graph, sources, events, host_nodes
        graph, sources, events = draws_together(*whole, t.b.next_id)
    paths, predicates = tuple(t.scalars.paths), tuple(t.scalars.predicates)
    plain_ones = tuple(x if _is_plain(x) else OPAQUE for x in given)
    effects_key = (
        sources,
        paths,
        repr(replace(effects, outside=())),
        tuple((graph_key(o.graph), o.made, o.inputs, o.saved, o.hosts) for o in effects.outside),
        tuple(f"{n.outs}{n.op.name}{n.args}" for n in host_nodes),
        repr(predicates),
        grads_read,
        tuple((cut_key(cut), cut.sources, cut.drawn) for cut in t.cuts),
        repr(events),
        late,
        None if checks is None else (graph_key(checks.graph), checks.sources),
    )
    given_key = tuple(
        id(x) if p is OPAQUE or isinstance(p, type) else repr(p)
        for p, x in zip(plain_ones, given, strict=True)
    )
    return Captured(
        graph=graph,
        sources=sources,
        paths=paths,
        scalars=scalars,
        host_nodes=host_nodes,
        predicates=predicates,
        bounds=tuple(b for b in t.bounds if isinstance(b, Bound)),
        checks=checks,
        grads_read=grads_read,
        given=plain_ones,
        effects=effects,
        key=Key(graph_key(graph), effects_key, given_key),
        cuts=tuple(t.cuts),
        late=late,
        draws=events,
        opaque=tuple(dict.fromkeys(t.scalars.opaque)),
        eager=eager_cost(t, graph.outputs()),
    )


def _is_plain(x: object) -> bool:
    """Whether an object is the same in each call: a plain value, or a class of which the step
    returns an object that each call makes anew."""
    return type(x) in _PLAIN or (isinstance(x, type) and (is_named(x) or is_attributes(x)))


def _is_new(grad: torch.Tensor) -> bool:
    """Whether a `.grad` is a tensor that the step made."""
    return type(grad) is TracedTensor and grad.handle.storage.real is None


def _writes(
    collect: Collector,
) -> tuple[tuple[Write, ...], tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Outside memory that the step overwrites: by the plan, by the host, and whose it is."""
    t = collect.t
    writes, host_writes, written = [], [], []
    moved: dict[Storage, list[int]] = {}
    for i, h in enumerate(t.inputs.handles):
        if h.version.count:  # writes through .data do not count
            moved.setdefault(h.storage, []).append(i)
    for s in t.inputs.storages:
        if s.value is s.param:
            continue
        number = settled(t, s, collect.mixed)
        if number is None:
            writes.append(Write(s.param, s.value))
        else:
            host_writes.append((collect.real(s.real), collect.host_result(number)))
        written += moved.get(s, ())
    return tuple(writes), tuple(host_writes), tuple(written)


def _flags(collect: Collector, with_nodes: bool) -> tuple[tuple[int, str], ...]:
    """What becomes of requires_grad of outside tensors. With nodes, a leaf that had it for a while
    has it while they are made."""
    t = collect.t
    flags = []
    for h in t.flagged:
        i, before, now = collect.real(h.tensor), _requires_grad(h.tensor), t.requires_grad(h)
        if before == "computed":
            flags.append((i, "detached"))
            continue
        used = with_nodes and any(leaf is h for leaf in t.leaf_of.values())
        if not before and (now or used):
            flags.append((i, "requires grad"))
        if not now and (before or used):
            flags.append((i, "frozen"))
    return tuple(flags)


def _requires_grad(tensor: torch.Tensor) -> str:
    """Whether a tensor from outside requires grad: as a leaf, or computed; else empty."""
    with torch._C.DisableTorchFunction():
        if not tensor.requires_grad:
            return ""
        return "leaf" if tensor.is_leaf else "computed"


def _nodes(collect: Collector, name: str) -> Nodes:
    """Autograd nodes for the made tensors that require grad and have a history."""
    t = collect.t
    for h in t.inputs.handles:
        if t.requires_grad(h) and not (h.requires_grad_leaf or h in t.foreign or h.family.quiet):
            raise SideEffectError(
                where=location.of_line(h.family.written),
                reason=f"{t.described_input(h.tensor)} from outside the step was modified in "
                "place by an operation that is differentiated, so it would require grad from now "
                "on",
                remedy="Modify it under torch.no_grad(), or with a detached value",
            )
    _add_bases(collect)
    handles: list[Handle | None] = [None] * len(collect.made)
    for h, i in collect.of_handle.items():
        handles[i] = h
    roots = [i for h, i in collect.of_handle.items() if _is_root(h, collect.made[i])]
    return nodes(t, handles, roots, collect.of_handle, collect.outputs, collect.host, name)


def _is_root(h: Handle, m: Made) -> bool:
    """Whether a backward may go on from a made tensor."""
    return m.requires_grad and not m.is_leaf and m.kind != "real" and not h.family.quiet


def _add_bases(collect: Collector) -> None:
    """Made tensors that nobody gets, for those that share memory and history to be views of:
    the two halves of a `chunk`."""
    families = Counter(
        h.family
        for h, i in collect.of_handle.items()
        if collect.made[i].kind == "output" and _is_root(h, collect.made[i])
    )
    for family, members in families.items():
        if members > 1:
            kind, strides = family.storage.value.type, family.storage.strides
            geometry = kind.shape, strides, 0, kind.dtype, kind.device
            collect.tensor_of(Handle(family, (), *geometry, Version()))


def _data_of(collect: Collector, h: Handle) -> int:
    """The made tensor for `.data = …`: the whole of the storage that the handle took over."""
    storage = h.storage
    index = collect.output(storage)
    collect.made.append(Made("output", index, h.shape, h.strides, 0, False))
    return len(collect.made) - 1


def _escapes(t: Trace, collect: Collector, young: uncollected) -> list[TracedTensor]:
    """Intermediates that user objects still hold, found by counting references."""

    def suspects() -> list[TracedTensor]:
        contexts = t.contexts  # of custom autograd functions; they go with the trace
        held = Counter(id(x) for one in (*contexts, *t.held) for x in one.references())
        for h in (*t.inputs.handles, *(p.handle for p in t.proxies)):
            for grad in (h.grad, h.grad_at_start):
                if grad is not None:
                    held[id(grad)] += 1
        held.update(t.journal.holds())
        # besides `t.proxies`, its handle holds a proxy
        return [p for p in t.proxies if count(p) > LOOPED + 1 + held[id(p)]]

    found = suspects()
    if not found or {id(p) for p in found} <= t.hyperparameters.kept_in_state():
        return found
    young.collect_young()
    return suspects()
