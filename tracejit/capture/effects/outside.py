"""Backward called outside: returned tensors that require grad carry our backward program.

`nodes` runs after a trace, for each returned tensor whose history a backward may still go through.
It emits the gradients from the tape and cuts them off as a Graph of their own. Its inputs are the
cotangent and the residuals: outside tensors, outputs, and further results that the forward graph
gets for this purpose. `attach` makes the autograd node of one call.

The tape is cut at returned tensors: a node's inputs are the leaves and the returned tensors that it
depends on, so hooks on them, `retain_grad` and `torch.autograd.grad` work as in eager. A custom
function's backward runs here, when the step is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from tracejit.autodiff import Arrival, Tape, backward, total_of
from tracejit.capture.effects.effects import Outside, Place
from tracejit.capture.functions.autograd import leaf_values
from tracejit.capture.python.patches import intercepted
from tracejit.capture.trace import location
from tracejit.capture.trace.tensor import Handle, Storage, is_dense
from tracejit.capture.trace.trace import Trace
from tracejit.errors import SideEffectError, TracejitError
from tracejit.ir.graph import Arg, Graph, Node, Param, Result, Value
from tracejit.ir.types import contiguous_strides
from tracejit.records import dataclass

_RECOMPUTED = frozenset(
    {"alias", "reshape", "permute", "expand", "slice", "flip", "window", "full", "iota"}
)  # views and constants: computed again rather than saved
_TWICE = (
    "trying to differentiate twice through the result of a compiled step, which is "
    "once_differentiable: take the second derivative inside the step"
)
_WRITES = "the backward of a custom function writes to a tensor of the step"
_SHARED = "two returned tensors that require grad share memory; clone one"
_RETAINED = "the step called retain_grad(); call backward inside it, or retain_grad outside"
_HOOKED = (
    "the step registers hooks on intermediates, which a backward after it would not call; call "
    "backward inside the step"
)
_COMPLEX = (
    "a complex tensor leaves the step, and a backward goes on from real ones only; return "
    "torch.view_as_real of it"
)
_NOTHING = "no tensor that the step returns or was given would get a gradient"

Run = Callable[[list], list[torch.Tensor]]


@dataclass(slots=True)
class Nodes:
    """All nodes of a step, and what they ask of the forward graph."""

    outside: list[Outside]
    views: dict[int, tuple[str, int]]  # made tensors that are views of one: their kind, and which
    reasons: dict[int, str]  # made tensors without a node, and why
    saved: list[Value]  # further results of the forward graph


def nodes(
    t: Trace,
    handles: Sequence[Handle],
    roots: Sequence[int],
    made_of: dict[Handle, int],
    outputs: dict[Storage, int],
    host: list[Arg],
    name: str,
) -> Nodes:
    """Nodes for the `roots` among the made tensors; `host` grows by the scalars they read."""
    found = Nodes([], {}, {}, [])
    values: dict[int, Value] = {}
    for one in (*t.contexts, *t.held):
        one.over = True
    with torch.enable_grad():
        for i in _one_per_storage(t, handles, roots, found):
            if t.retained:
                found.reasons[i] = _RETAINED
            else:
                values[i] = t.read(handles[i])
    forward = len(t.b.nodes)
    drafts = _gradients(t, handles, values, made_of, found) if values else []
    late, t.b.nodes[forward:] = t.b.nodes[forward:], []
    cotangents = {draft.cotangent for draft in drafts}
    t.b.params[:] = [p for p in t.b.params if p.value not in cotangents]
    t.b.nodes += [n for n in late if n.out.type.is_host]
    if not drafts:
        return found
    cutter = _Cutter(t, late, outputs, host, found)
    for draft in drafts:
        found.outside.append(cutter.cut(draft, handles, name))
    return found


def _one_per_storage(
    t: Trace, handles: Sequence[Handle], roots: Sequence[int], found: Nodes
) -> Iterator[int]:
    """Roots that get a node; others are views of one of them, or share memory beyond that."""
    groups: dict[Storage, list[int]] = {}
    for i in roots:
        if handles[i].is_complex:
            found.reasons[i] = _COMPLEX
        else:
            groups.setdefault(handles[i].storage, []).append(i)
    for storage, members in groups.items():
        whole = [
            i
            for i in members
            if not handles[i].steps and handles[i].shape == storage.value.type.shape
        ]
        if len(members) == 1 or all(handles[i].family.leaf is not None for i in members):
            yield from members  # views of a leaf, which none of them lets be written to
        elif whole and all(handles[i].family is handles[whole[0]].family for i in members):
            for i in members:
                if i != whole[0]:
                    several = handles[i].fixed is not None
                    found.views[i] = "part" if several else "view", whole[0]
            yield whole[0]
        else:
            found.reasons |= dict.fromkeys(members, _SHARED)


@dataclass(frozen=True, slots=True)
class _Draft:
    """Gradients of one root, before they are cut off the builder."""

    made: int
    cotangent: Value
    inputs: tuple[tuple[Place, Handle, Value], ...]


def _gradients(
    t: Trace,
    handles: Sequence[Handle],
    values: dict[int, Value],
    made_of: dict[Handle, int],
    found: Nodes,
) -> list[_Draft]:
    """Emit every root's gradients behind the forward nodes."""
    position = {v: n for n, e in enumerate(t.tape.entries) for v in e.outputs}
    targets: list[tuple[Place, Handle, list[Value]]] = []
    for leaf, stands_for in leaf_values(t).items():
        if leaf.is_real:
            targets.append((("real", t.inputs.handles.index(leaf)), leaf, stands_for))
        elif leaf in made_of:
            if not leaf.requires_grad_leaf:
                raise SideEffectError(
                    where=location.of_node(t.producers.get(leaf.storage.value)),
                    reason="a tensor that the step made leaves it with requires_grad taken back, "
                    "and so does what was computed of it before",
                    remedy="Return tensor.detach() instead",
                )
            targets.append((("made", made_of[leaf]), leaf, stands_for))
    targets += [(("made", i), handles[i], [v]) for i, v in values.items()]
    drafts, drawn = [], len(t.draws.events)
    held = [(s, s.value, s.writes) for s in {*t.inputs.storages, *(h.storage for h in made_of)}]
    refusals = [Arrival((v,), _refuse_hooks, leaf=False) for v, x in t.hooked.items() if x]
    t.begin(torch.autograd.backward, ())
    with t.resumed():
        for i, value in sorted(values.items(), key=lambda item: position.get(item[1], -1)):
            cut = set(values.values()) - {value}
            entries = [
                e for e in t.tape.entries if value in e.outputs or not cut.intersection(e.outputs)
            ]
            wanted = [v for _, _, group in targets for v in group if v != value]
            cotangent = t.b.param(value.type)
            root = t.producers.get(value)  # whose line it is, wherever the step is called
            t.b.line = "" if root is None else root.where
            try:
                with intercepted(), t.untaped(), t.formulas() as enter:
                    got = backward(
                        Tape(entries, t.tape.tracked),
                        t.b,
                        [(value, cotangent)],
                        wanted,
                        retain_graph=True,
                        enter=enter,
                        arrivals=refusals,
                    )
                with t.untaped():
                    totals = [(p, h, total_of(t.b, got, group)) for p, h, group in targets]
                if any(s.writes != writes for s, _, writes in held):
                    raise TracejitError(reason=_WRITES)
            except Exception as error:
                t.b.params[:] = [p for p in t.b.params if p.value != cotangent]
                reason = error.fields.get("reason") if isinstance(error, TracejitError) else None
                found.reasons[i] = str(reason or error)
                continue
            finally:
                for s, value_then, writes in held:  # back to the end of the forward
                    s.value, s.writes = value_then, writes
            if len(t.draws.events) > drawn:
                raise SideEffectError(
                    where=location.of_node(root),
                    reason="the backward of a custom Function draws random numbers, and would be "
                    "called after the step, which cannot draw them before",
                    remedy="Call backward inside the step, or return the loss detached",
                )
            inputs = tuple(x for x in totals if x[2] is not None and x[0] != ("made", i))
            if inputs:
                drafts.append(_Draft(i, cotangent, inputs))
            else:
                t.b.params[:] = [p for p in t.b.params if p.value != cotangent]
                found.reasons[i] = _NOTHING
    return drafts


def _refuse_hooks(cotangent: Value) -> Value:
    raise TracejitError(reason=_HOOKED)


class _Cutter:
    """Cuts gradients off the builder's nodes, and decides what the forward saves for them."""

    def __init__(
        self,
        t: Trace,
        late: Iterable[Node],
        outputs: dict[Storage, int],
        host: list[Arg],
        found: Nodes,
    ):
        self.late = {n.out: i for i, n in enumerate(late)}  # in the order in which they stand
        self.producers = {n.out: n for n in (*t.b.nodes, *late)}
        self.host, self.found = host, found
        self.count = len(outputs)
        self.places: dict[Value, tuple[Place, tuple[int, ...] | None]] = {}
        strides = {p.value: p.strides for p in t.b.params}
        for s in t.inputs.storages:
            if s.value is s.param:
                index = t.inputs.position(s.real)
                self.places[s.param] = ("real", index), strides[s.param]
        for s, index in outputs.items():
            standard = s.strides == contiguous_strides(s.value.type.shape)
            place = ("output", index), None if standard else s.strides
            self.places.setdefault(self._behind_aliases(s.value), place)

    def _behind_aliases(self, value: Value) -> Value:
        node = self.producers.get(value)
        while node is not None and node.op.name == "alias":
            value = node.inputs[0]
            node = self.producers.get(value)
        return value

    def cut(self, draft: _Draft, handles: Sequence[Handle], name: str) -> Outside:
        """The graph of one draft, and where its inputs come from."""
        wanted, read = self._behind([value for _, _, value in draft.inputs], draft.cotangent)
        saved, hosts, params = [], [], [Param(draft.cotangent)]
        for value in sorted((v for v in read if not v.type.is_host), key=lambda v: v.id):
            place, strides = self._saved(value)
            saved.append(place)
            params.append(Param(value, strides))
        for value in sorted((v for v in read if v.type.is_host), key=lambda v: v.id):
            hosts.append(self._host(value))
            params.append(Param(value))
        results = tuple(
            Result(value, h.strides if _unusual(h) else None) for _, h, value in draft.inputs
        )
        ordered = sorted(wanted, key=lambda n: (self.late.get(n.out, -1), n.out.id))
        graph = Graph(f"{name}_backward", tuple(params), tuple(ordered), results, ())
        places = tuple(place for place, _, _ in draft.inputs)
        return Outside(draft.made, places, tuple(saved), tuple(hosts), graph)

    def _behind(self, targets: list[Value], cotangent: Value) -> tuple[list[Node], set[Value]]:
        """The nodes to run backward, and the values that they read from the forward."""
        wanted: list[Node] = []
        read: set[Value] = set()
        seen = {cotangent}
        pending = list(targets)
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            node = self.producers.get(value)
            again = node is not None and (value in self.late or node.op.name in _RECOMPUTED)
            if value.type.is_host or value in self.places or not again:
                read.add(value)
            else:
                wanted.append(node)
                pending += node.inputs
        return wanted, read

    def _saved(self, value: Value) -> tuple[Place, tuple[int, ...] | None]:
        if value not in self.places:
            self.places[value] = ("output", self.count + len(self.found.saved)), None
            self.found.saved.append(value)
        return self.places[value]

    def _host(self, value: Value) -> int:
        if value not in self.host:
            self.host.append(value)
        return self.host.index(value)


def _unusual(h: Handle) -> bool:
    return h.strides != contiguous_strides(h.shape) and is_dense(h.shape, h.strides)


# ---- a call


class CompiledStep(torch.autograd.Function):
    """The node of one returned tensor in one call."""

    @staticmethod
    def forward(ctx, box: list, saved: list, hosts: list[float], run: Run, *inputs: torch.Tensor):
        ctx.save_for_backward(*saved)
        ctx.hosts, ctx.run = hosts, run
        return box.pop()

    @staticmethod
    def backward(ctx, cotangent: torch.Tensor) -> tuple:
        """With create_graph the gradients raise when a second backward reaches them, whatever
        requires grad: torch's once_differentiable would drop their history for a plain cotangent.
        """
        with torch.no_grad():
            cotangent = cotangent.contiguous()
            if cotangent.data_ptr() % 16:
                cotangent = cotangent.clone()
            gradients = ctx.run([cotangent, *ctx.saved_tensors, *ctx.hosts])
        if torch.is_grad_enabled():
            refuse = torch._C._functions.DelayedError(_TWICE, 1)
            gradients = [refuse(g.detach().requires_grad_()) for g in gradients]
        return (None, None, None, None, *gradients)


def attach(
    tensor: torch.Tensor,
    inputs: list[torch.Tensor],
    saved: list[torch.Tensor],
    hosts: list[float],
    run: Run,
) -> torch.Tensor:
    """A tensor with its autograd node, see `Outside`."""
    with torch.enable_grad():
        return CompiledStep.apply([tensor], [x.detach() for x in saved], hosts, run, *inputs)
