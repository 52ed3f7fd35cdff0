"""A captured step as pure data, and its commit to the user's objects.

The raw Graph, which tensor feeds which input, and the effects: fresh tensors to return or to set as
`.grad`, tensors written in place, host values in the result. `Captured.commit` applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from tracejit.capture.effects.hyperparameters import Callback, Held
from tracejit.capture.effects.outside import Outside, Run, attach
from tracejit.capture.trace.bounds import Bound
from tracejit.capture.trace.scalars import Path, Predicate
from tracejit.capture.trace.tensor import Ints, TracedTensor
from tracejit.errors import LeakedTracer
from tracejit.ir import host_memory
from tracejit.ir.graph import Arg, Graph, Node, Value

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
    leaf_grads: tuple[tuple[int, int], ...]  # (made index of a new leaf, of its .grad)
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
    end: object | None = None  # what an earlier trace of the same is remembered by

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
        for index, source in self.leaf_grads:
            made[index].grad = made[source]
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
        taken: set[int] = set()
        for i, m in enumerate(self.made):
            if i in later or m.kind == "view":
                made.append(None)
                continue
            tensor = _materialize(m, reals, hosts if m.kind == "host" else outputs)
            if id(tensor) in taken:  # another tensor of the same memory and geometry
                tensor = tensor.detach()
            taken.add(id(tensor))
            if m.is_leaf:
                tensor = tensor.detach().requires_grad_()
            elif m.requires_grad:
                tensor = _mark(tensor, reasons.get(i))
            made.append(tensor)
        for node, run in zip(nodes, backwards, strict=bool(nodes)):
            plain = _materialize(self.made[node.made], reals, outputs).detach()
            made[node.made] = attach(node, plain, reals, made, outputs, host_results, run)
        for i, m in enumerate(self.made):
            if m.kind == "view":
                with torch.enable_grad():
                    made[i] = made[m.index].as_strided(m.shape, m.strides, m.offset)
        return made

    @property
    def memo(self) -> dict:
        """What the driver has found out about this path before; empty on a path of its own."""
        return {} if self.end is None else self.end.cache

    def release(self) -> None:
        """Forget the tensors of this trace, keeping what a replay needs."""
        self.reals = []
        self.escaped = ()
        self.undo = nothing


def nothing() -> None:
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


def _mark(tensor: torch.Tensor, reason: str | None) -> torch.Tensor:
    """Let a tensor require grad, with a node that raises when backward reaches it."""
    with torch.enable_grad():
        return refusal(reason)(tensor.detach().requires_grad_())


def refusal(reason: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gives a tensor a node, which raises when backward reaches it and says why."""
    return torch._C._functions.DelayedError(_AFTERWARDS.format(reason=reason or _NO_NODE), 1)


def _make_real(escaped: Sequence[tuple[TracedTensor, int]], made: list[torch.Tensor]) -> None:
    """Turn proxies that user objects hold into the tensors they stand for, in place."""
    for proxy, index in escaped:
        real = made[index]
        proxy.__dict__.pop("handle", None)
        proxy.__dict__.pop("trace", None)
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


def slots(tree: object) -> Iterator[int]:
    """The made tensors in a returned structure."""
    match tree:
        case Slot(index):
            yield index
        case Sequenced(_, items):
            for item in items:
                yield from slots(item)
        case Mapped(items):
            for _, item in items:
                yield from slots(item)


def is_plain(tree: object) -> bool:
    """Whether a returned structure holds only tensors, host values, numbers, strings and None."""
    match tree:
        case Sequenced(_, items):
            return all(map(is_plain, items))
        case Mapped(items):
            return all(isinstance(k, (str, int)) and is_plain(v) for k, v in items)
        case Constant(value):
            return value is None or type(value) in (bool, int, float, str, torch.dtype)
    return True


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
