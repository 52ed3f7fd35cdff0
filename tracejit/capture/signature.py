"""The arguments of a call without its tensors, and a call like it.

In: the arguments that a replay was armed for. Out: a `Signature`, which holds no memory of the
user's tensors; it makes tensors that stand for them, in the same places. So a guard can be asked,
long after the call, whether such a call would be replayed now, and from which tensors it would read
its inputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field

import torch

from tracejit.capture.effects.effects import is_named_tuple
from tracejit.capture.effects.fields import (
    MANY,
    PLAIN,
    attributes_of,
    holds_tensors,
    is_its_attributes,
)
from tracejit.capture.python.classes import slots
from tracejit.capture.trace.tensor import extent
from tracejit.records import dataclass

_LINE = 16  # elements: a tensor that starts so many further is aligned alike


@dataclass(frozen=True, eq=False, slots=True)
class TensorLike:
    """What a tensor was like; each object is one tensor, in whatever places it was given."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # in its memory, modulo a line
    requires_grad: bool
    is_parameter: bool
    grad: TensorLike | None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorLike:
        geometry = tuple(tensor.shape), tensor.stride(), tensor.storage_offset() % _LINE
        grad = tensor.grad if tensor.is_leaf else None
        kind = tensor.requires_grad, isinstance(tensor, torch.nn.Parameter)
        grad = None if grad is None else cls.of(grad)
        return cls(tensor.dtype, tensor.device, *geometry, *kind, grad)

    def tensor(self) -> torch.Tensor:
        """A tensor like it."""
        count = self.offset + extent(self.shape, self.strides)
        new = torch.zeros if count == self.offset + 1 else torch.empty
        memory = new(count, dtype=self.dtype, device=self.device)
        made = memory.as_strided(self.shape, self.strides, self.offset)
        if self.is_parameter:
            made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
        elif self.requires_grad:
            made.requires_grad_()
        if self.grad is not None:
            made.grad = self.grad.tensor()
        return made


@dataclass(frozen=True, eq=False, slots=True)
class Thing:
    """An argument that is neither a tensor, a container, nor a plain value: the object itself."""

    value: object


@dataclass(frozen=True, slots=True)
class Left:
    """What nothing is kept of, since it may hold tensors: a container of another kind or too large,
    an object with tensors in it. There is no call like this one."""

    what: str


@dataclass(frozen=True, slots=True)
class Listed:
    """A list or tuple."""

    kind: type
    items: tuple


@dataclass(frozen=True, slots=True)
class Keyed:
    """A dict."""

    items: tuple[tuple[object, object], ...]


@dataclass(frozen=True, slots=True)
class Fielded:
    """A tuple with names, or an object that is no more than its attributes, as a batch is: what
    each of them is."""

    kind: type | str  # the class; in a file its name
    items: tuple[tuple[str, object], ...]
    listed: bool  # a tuple


_TENSORS = (torch.Tensor, torch.nn.Parameter)
CONTAINERS = (list, tuple, dict)
Tree = TensorLike | Thing | Left | Listed | Keyed | Fielded | bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of a call."""

    args: tuple[Tree, ...]
    kwargs: dict[str, Tree]
    # tensors whose .grad the step looks at, and what it was like
    gradients: tuple[tuple[weakref.ref[torch.Tensor], TensorLike | None], ...] = ()

    @contextmanager
    def gradients_as_they_were(self) -> Iterator[None]:
        """A context in which these tensors have gradients like those of the call, or none."""
        now = [(owner, owner.grad) for of, _ in self.gradients if (owner := of()) is not None]
        try:
            for of, like in self.gradients:
                owner = of()
                if owner is not None and (owner.grad is None) != (like is None):
                    owner.grad = None if like is None else like.tensor()
            yield
        finally:
            for owner, grad in now:
                owner.grad = grad


@dataclass(slots=True)
class Standing:
    """A call like that of a signature: its arguments, and which tensor stands for what."""

    args: tuple
    kwargs: dict[str, object]
    of: dict[int, TensorLike] = field(default_factory=dict)  # by the id of the tensor
    tensors: dict[TensorLike, torch.Tensor] = field(default_factory=dict)


def signature_of(
    args: tuple,
    kwargs: dict[str, object],
    bound: int = 0,
    owners: Sequence[torch.Tensor] = (),
) -> Signature:
    """The signature of a call, before it is made.

    bound:   so many first arguments, which a method is bound to, are kept as they are.
    owners:  the tensors whose .grad the step looks at.
    """
    known: dict[int, TensorLike] = {}
    around: list[object] = []  # containers

    def tree(x: object) -> Tree:
        if isinstance(x, CONTAINERS):
            known_kind = type(x) in CONTAINERS or is_named_tuple(type(x))
            if not known_kind or len(x) > MANY or any(x is other for other in around):
                return Left(f"{type(x).__name__} of {len(x)} items")
        around.append(x)
        try:
            return parts(x)
        finally:
            around.pop()

    def parts(x: object) -> Tree:
        if isinstance(x, torch.Tensor):
            if type(x) not in _TENSORS or x.layout is not torch.strided:
                return Left(f"{type(x).__name__} of layout {x.layout}")
            if id(x) not in known:
                known[id(x)] = TensorLike.of(x)
            return known[id(x)]
        if isinstance(x, tuple) and type(x) is not tuple:
            names = type(x)._fields
            fields = tuple((name, tree(item)) for name, item in zip(names, x, strict=True))
            return Fielded(type(x), fields, listed=True)
        if isinstance(x, (list, tuple)):
            return Listed(type(x), tuple(map(tree, x)))
        if isinstance(x, dict):
            return Keyed(tuple((key, tree(item)) for key, item in x.items()))
        if type(x) in PLAIN:
            return x
        if not holds_tensors(x):
            return Thing(x)
        if not is_its_attributes(x) or any(x is other for other in around[:-1]):
            return Left(f"{type(x).__name__} with tensors in it")
        fields = tuple((name, tree(item)) for name, item in attributes_of(x).items())
        return Fielded(type(x), fields, listed=False)

    given = (*map(Thing, args[:bound]), *map(tree, args[bound:]))
    named = {name: tree(x) for name, x in kwargs.items()}
    gradients = [
        (weakref.ref(x), None if x.grad is None else TensorLike.of(x.grad))
        for x in owners
        if id(x) not in known and x.is_leaf
    ]
    return Signature(given, named, tuple(gradients))


def standing(signature: Signature) -> Standing:
    """A call like that of a signature; the contents of its tensors are undefined."""
    made = Standing((), {})

    def build(x: Tree) -> object:
        match x:
            case TensorLike():
                if x not in made.tensors:
                    made.tensors[x] = x.tensor()
                    made.of[id(made.tensors[x])] = x
                return made.tensors[x]
            case Thing(value):
                return value
            case Left():
                return None
            case Listed(kind, items):
                return kind(map(build, items))
            case Keyed(items):
                return {key: build(item) for key, item in items}
            case Fielded(kind, items, listed):
                fields = {name: build(item) for name, item in items}
                if listed:
                    return kind._make(fields.values())
                like = kind.__new__(kind)
                for name, item in fields.items():
                    if name in slots(kind):
                        object.__setattr__(like, name, item)
                    else:
                        vars(like)[name] = item
                return like
        return x

    made.args = tuple(map(build, signature.args))
    made.kwargs = {name: build(x) for name, x in signature.kwargs.items()}
    return made


def leaves(tree: Tree) -> Iterator[Tree]:
    """What is in no container any more."""
    match tree:
        case Listed(_, items):
            for item in items:
                yield from leaves(item)
        case Keyed(items) | Fielded(_, items, _):
            for _, item in items:
                yield from leaves(item)
        case _:
            yield tree
