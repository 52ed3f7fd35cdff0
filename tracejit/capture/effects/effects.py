"""What a step does to the user's objects besides running its plan: pure data.

`Effects` says what to return, write, set, clear and run on the host, in terms of positions: of
outside tensors, of fresh outputs of the plan, of host results, and of what a `Call` brings. They
have a text form that parses back (`text.py`). `commit.py` turns them into lines of Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType, SimpleNamespace

import torch

from tracejit.capture.python.classes import slots as slots_of
from tracejit.capture.python.kept import Joint
from tracejit.capture.trace.tensor import Ints, TracedTensor, extent
from tracejit.ir.graph import Arg, Graph, print_arg
from tracejit.ir.types import DType
from tracejit.records import dataclass

Place = tuple[str, int]  # ("real" | "made" | "output", position)


# ---- tensors to hand out


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor to hand out after the plan has run.

    kind "real": the `index`-th outside tensor itself; "output": a view of the `index`-th fresh
    output; "alias": a view of the memory of the `index`-th outside tensor; "view": a view of the
    `index`-th tensor made, with its history; "part": the same, one of several that one function
    returned, which autograd lets nobody write to; "host": a view of the `index`-th of `hosts`.
    """

    kind: str
    index: int
    shape: Ints = ()
    strides: Ints = ()
    offset: int | HostSlot = 0
    requires_grad: bool = False
    is_leaf: bool = False
    bits: tuple[DType, DType] | None = None  # the dtype of that memory, and as which it is read

    def view(self, offset: int | str, dtype: str) -> str:
        """The method calls that make this view, from text for its offset and its dtype."""
        own = f"as_strided({self.shape}, {self.strides}, {offset})"
        if self.bits is None:
            return own
        of, to = (d.itemsize for d in self.bits)
        first, rest = divmod(offset * to, of)
        count = -(-(rest + extent(self.shape, self.strides) * to) // of)
        return f"as_strided(({count},), (1,), {first}).view({dtype}).{own}"


@dataclass(frozen=True, slots=True)
class Outside:
    """The autograd node of a returned tensor."""

    made: int  # which of the made tensors
    inputs: tuple[Place, ...]  # real or made tensors that get a gradient, per result of the graph
    saved: tuple[Place, ...]  # real tensors and outputs that the graph reads
    hosts: tuple[int, ...]  # host results that it reads
    graph: Graph  # (cotangent, *saved, *hosts) -> gradients


# ---- the returned structure


@dataclass(frozen=True, slots=True)
class Slot:
    """The `index`-th made tensor."""

    index: int


@dataclass(frozen=True, slots=True)
class HostSlot:
    """The `index`-th host result."""

    index: int


@dataclass(frozen=True, slots=True)
class Joined:
    """A text, in parts: host results that are texts, and what stands between them."""

    items: tuple[str | HostSlot, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """The `index`-th object of the call: what the step returned or stored that is no tensor."""

    index: int


@dataclass(frozen=True, slots=True)
class Sequenced:
    """A tuple, a list, or an instance of the class that `kind` gives: of tuples, or of objects of
    attributes, whose one item is a dict of them."""

    kind: str | Given
    items: tuple


@dataclass(frozen=True, slots=True)
class Mapped:
    """A dict, as pairs of keys (each a string or int, given, or a text in parts) and items."""

    items: tuple[tuple[str | int | Given | Joined, object], ...]


Tree = Slot | HostSlot | Joined | Given | Sequenced | Mapped


# a value that goes into the n-th holder of the call: where; None into a variable of a closure, ...
# at the end of a list
Store = tuple[int, str | int | Slot | Joined | EllipsisType | None, Tree]


def slots(tree: Tree) -> Iterator[int]:
    """The made tensors in a structure."""
    match tree:
        case Slot(index):
            yield index
        case Sequenced(_, items):
            for item in items:
                yield from slots(item)
        case Mapped(items):
            for _, item in items:
                yield from slots(item)


def is_named(kind: type) -> bool:
    """Whether a class is one of tuples with names: a namedtuple, or one of torch's own results."""
    return issubclass(kind, tuple) and (hasattr(kind, "_make") or hasattr(kind, "n_fields"))


def is_named_tuple(kind: type) -> bool:
    """Whether a class is one that `collections.namedtuple` or `typing.NamedTuple` makes."""
    names = kind.__dict__.get("_fields")
    return (
        kind.__bases__ == (tuple,)
        and type(names) is tuple
        and all(type(name) is str for name in names)
        and hasattr(kind, "_make")
    )


def is_attributes(kind: type) -> bool:
    """Whether objects of a class have all that they have in their `__dict__`, as those of a
    dataclass do, so that another one with the same attributes is like it."""
    if kind is SimpleNamespace:
        return True
    return has_plain_objects(kind) and bool(kind.__dictoffset__) and not slots_of(kind)


def has_plain_objects(kind: type) -> bool:
    """Whether objects of a class have all that they have in their `__dict__` and its slots."""
    return kind.__new__ is object.__new__ and not hasattr(kind, "__del__")


def instance_of(kind: type, items: Sequence[object]) -> object:
    """A tuple of such a class, or an object of the attributes that its one item has."""
    if not issubclass(kind, tuple):
        made = kind.__new__(kind)
        vars(made).update(items[0])
        return made
    return kind._make(items) if hasattr(kind, "_make") else kind(items)


def rebuilt(
    tree: Tree, made: Sequence[torch.Tensor], host: Sequence[float], given: Sequence[object]
) -> object:
    """The structure that a tree describes."""
    match tree:
        case Slot(index):
            return made[index]
        case HostSlot(index):
            return host[index]
        case Joined(items):
            return Joint([x if type(x) is str else host[x.index] for x in items])
        case Given(index):
            return given[index]
        case Sequenced(kind, items):
            parts = [rebuilt(x, made, host, given) for x in items]
            if isinstance(kind, Given):
                return instance_of(given[kind.index], parts)
            return parts if kind == "list" else tuple(parts)
        case Mapped(items):
            return {
                rebuilt(k, made, host, given) if isinstance(k, (Given, Joined)) else k: rebuilt(
                    v, made, host, given
                )
                for k, v in items
            }
    raise AssertionError(tree)


# ---- all of them


@dataclass(frozen=True, slots=True)
class Effects:
    """All effects of a step, in the order of their commit."""

    host: tuple[Arg, ...] = ()  # host results: runtime scalars, their arithmetic, numbers
    written: tuple[int, ...] = ()  # outside tensors whose memory the plan or the host overwrites
    host_writes: tuple[tuple[int, int], ...] = ()  # (outside tensor, host result): its one element
    stores: tuple[Store, ...] = ()
    hosts: tuple[tuple[DType, int], ...] = ()  # new CPU tensors of one element: of a host result
    made: tuple[Made, ...] = ()
    outside: tuple[Outside, ...] = ()  # autograd nodes of made tensors, in order of dependence
    reasons: tuple[tuple[int, str], ...] = ()  # made tensors that no backward can go through: why
    datas: tuple[tuple[int, int], ...] = ()  # (outside tensor, made): `.data = …`
    flags: tuple[tuple[int, str], ...] = ()  # (outside tensor, what is done to its requires_grad)
    grads: tuple[tuple[int, int | None], ...] = ()  # (outside tensor, made or None: cleared)
    leaf_grads: tuple[tuple[int, int], ...] = ()  # (made: a new leaf, made: its .grad)
    escaped: tuple[int, ...] = ()  # made tensors that user objects hold already, as proxies
    returned: Tree = Given(0)
    # calls that a replay makes again, on the real objects: which of their arguments, by position or
    # name, are which host results
    callbacks: tuple[tuple[tuple[int | str, int], ...], ...] = ()

    @property
    def has_complex(self) -> bool:
        """Whether a complex tensor is among what is handed out."""
        return any(m.bits is not None and m.bits[1].kind == "c" for m in self.made)

    def __str__(self) -> str:
        """One line per effect, in the order of the commit; `text.py` reads it back."""
        lines = []
        if self.host:
            lines.append(f"host {', '.join(map(print_arg, self.host))}")
        if self.written:
            lines.append(f"written {', '.join(map(str, self.written))}")
        lines += [f"write real {i} <- host {k}" for i, k in self.host_writes]
        for i, key, tree in self.stores:
            where = (
                _expression(key)
                if isinstance(key, (Slot, Joined))
                else "..."
                if key is ...
                else repr(key)
            )
            lines.append(f"store {i} {where} <- {_expression(tree)}")
        lines += [f"number {i} = {d.name} host {k}" for i, (d, k) in enumerate(self.hosts)]
        lines += [f"made {i} = {_made(m)}" for i, m in enumerate(self.made)]
        for node in self.outside:
            head = f"node {node.made} inputs {node.inputs} saved {node.saved} hosts {node.hosts} {{"
            lines += [head, *(f"  {line}" for line in str(node.graph).splitlines()), "}"]
        lines += [f"no node {i} because {why!r}" for i, why in self.reasons]
        lines += [f"data {i} <- made {k}" for i, k in self.datas]
        lines += [f"flag {i} {how}" for i, how in self.flags]
        lines += [f"grad {i} <- {'none' if k is None else f'made {k}'}" for i, k in self.grads]
        lines += [f"leaf grad {i} <- made {k}" for i, k in self.leaf_grads]
        if self.escaped:
            lines.append(f"escaped {', '.join(map(str, self.escaped))}")
        for places in self.callbacks:
            lines.append(
                f"callback {', '.join(f'{at!r} <- host {k}' for at, k in places)}".rstrip()
            )
        lines.append(f"return {_expression(self.returned)}")
        return "\n".join(["effects {", *(f"  {line}" for line in lines), "}"])


def _made(m: Made) -> str:
    if m.kind == "real":
        return f"real {m.index}"
    marks = " requires_grad" * m.requires_grad + " leaf" * m.is_leaf
    offset = f"h{m.offset.index}" if isinstance(m.offset, HostSlot) else m.offset
    marks += "" if m.bits is None else f" bits {m.bits[0].name} as {m.bits[1].name}"
    return f"{m.kind} {m.index} {m.shape} strides {m.strides} offset {offset}{marks}"


def _expression(tree: Tree) -> str:
    """A structure as a Python expression of m0 (made tensors), h0 (host results), g0 (given)."""
    match tree:
        case Slot(index):
            return f"m{index}"
        case HostSlot(index):
            return f"h{index}"
        case Joined(items):
            parts = (repr(x) if type(x) is str else f"h{x.index}" for x in items)
            return f"text({', '.join(parts)})"
        case Given(index):
            return f"g{index}"
        case Sequenced("list", items):
            return f"[{', '.join(map(_expression, items))}]"
        case Sequenced("tuple", items):
            return f"({''.join(f'{_expression(x)}, ' for x in items)})"
        case Sequenced(kind, items):
            return f"{_expression(kind)}({', '.join(map(_expression, items))})"
        case Mapped(items):
            pairs = (
                f"{_expression(k) if isinstance(k, (Given, Joined)) else repr(k)}: {_expression(v)}"
                for k, v in items
            )
            return f"{{{', '.join(pairs)}}}"
    raise AssertionError(tree)


@dataclass(frozen=True, slots=True)
class Callback:
    """A call that the trace ran as it is: a scheduler's step. A replay puts other numbers in the
    place of arguments that are runtime scalars."""

    function: Callable
    args: tuple
    kwargs: dict
    of_torch_alone: bool = True  # it runs no code of the user's


def arguments_of(
    args: tuple, kwargs: dict, places: Sequence[int | str], numbers: Sequence[float]
) -> tuple[list, dict]:
    """The arguments of a call that is made again, with these numbers at these places."""
    args, kwargs = [*args], {**kwargs}
    for at, number in zip(places, numbers, strict=True):
        if type(at) is int:
            args[at] = number
        else:
            kwargs[at] = number
    return args, kwargs


def nothing() -> None:
    """What is committed is not undone."""


@dataclass(slots=True)
class Call:
    """What one call brings: its tensors, numbers and objects, by the positions in the Effects."""

    reals: list[torch.Tensor]  # outside tensors, in the order of first use
    scalars: list[float]  # the runtime scalars
    holders: Sequence[object] = ()  # param groups, and what holds state variables
    given: Sequence[object] = ()
    escaped: Sequence[TracedTensor] = ()
    callbacks: Sequence[Callback] = ()
    found: Sequence[torch.Tensor] = ()  # inputs that the cuts with a count have found
    drawn: Sequence[torch.Tensor | None] = ()  # the random numbers, per draw
    generators: Sequence[torch.Generator] = ()  # that the step draws from
    parts: Sequence[list] = ()  # the results of each stage of the step that has run already
    # puts optimizers, schedulers and random generators back, before the commit
    undo: Callable[[], None] = nothing

    def kept(self) -> Call:
        """What a replay needs of the call that it was traced in."""
        kept = {"given": self.given, "callbacks": self.callbacks, "generators": self.generators}
        return Call([], [], **kept)
