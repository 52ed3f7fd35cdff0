"""What stands for `torch.vmap` while a step is traced: the function runs once, on whole batches.

Each vmap is a mode above the tracer. What the function is given are `Batched` tensors: of the shape
that it may see, each with the tensor behind it, whose first axis is the batch. The mode turns a
call on them into calls on these, which reach the tracer, or the mode of a vmap further out, like
any others. So rules and traces know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import EllipsisType

import torch
from torch._functorch import vmap as torch_vmap
from torch.overrides import TorchFunctionMode, handle_torch_function
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from tracejit.capture.python import batched_axes as batched_axes  # its rules
from tracejit.capture.python.batched_draws import DRAWN, Anew, different
from tracejit.capture.python.batching import BATCHED, NoRule, aligned, behind
from tracejit.capture.trace.active import current
from tracejit.capture.trace.table import RULES
from tracejit.capture.trace.tensor import TracedTensor

Tensor = torch.Tensor
MANY = 64  # a function without a rule is called for each element of a batch, of up to so many

# of these families a function takes each element by itself, and broadcasts
_ELEMENTWISE = frozenset({"activation", "arithmetic", "comparison", "unary", "extrema"})
_ALIKE = frozenset(
    f
    for name in ("where", "to", "type", "float", "double", "half", "bfloat16", "int", "long")
    + (
        "bool",
        "clone",
        "detach",
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "masked_fill",
        "type_as",
    )
    for f in (getattr(torch, name, None), getattr(Tensor, name, None))
    if f in RULES
)
# told by shape, dtype and strides alone
_TOLD = frozenset(
    (*(Tensor.shape.__get__, Tensor.size, Tensor.dim, Tensor.ndim.__get__, Tensor.numel),)
    + (Tensor.stride, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.is_floating_point)
    + (Tensor.__len__, Tensor.layout.__get__, torch.is_floating_point, torch.numel)
)
_OF_HELD = frozenset({Tensor.requires_grad.__get__})
# where the number of results, or what is done, depends on more than one element of the batch
_NEVER = frozenset(
    {"values", "autograd", "hooks", "sampling", "dropout", "distinct", "masks", "custom", "writes"}
)
_FILLED = frozenset({Tensor.fill_, Tensor.zero_})
_ASSIGNED = frozenset({Tensor.__setitem__, Tensor.__delitem__})


def _sizes(sizes: tuple) -> tuple:
    """Sizes or axes given as f(2, 3) or f((2, 3))."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _expanded(x: Tensor, *sizes: object) -> Tensor:
    sizes = _sizes(sizes)
    new = len(sizes) + 1 - x.dim()
    return x.reshape(x.shape[0], *(1,) * new, *x.shape[1:]).expand(-1, *sizes)


def _new(name: str) -> Callable[..., Tensor]:
    """A tensor like x, of some shape for each element."""

    def new(x: Tensor, *sizes: object, **options: object) -> Tensor:
        return getattr(x, name)((x.shape[0], *_sizes(sizes)), **options)

    return new


# functions of a shape, or that give a view: of the tensor behind, so that writes to it arrive
_SHAPES: dict[str, Callable[..., Tensor]] = {
    "expand": _expanded,
    "expand_as": lambda x, other: _expanded(x, *other.shape),
    "view": lambda x, *sizes: x.view(x.shape[0], *_sizes(sizes)),
    "reshape": lambda x, *sizes: x.reshape(x.shape[0], *_sizes(sizes)),
    "contiguous": lambda x: x.contiguous(),
    "t": lambda x: x.transpose(1, 2) if x.dim() == 3 else x,
    "transpose": lambda x, dim0, dim1: x.transpose(
        behind(x.dim() - 1, dim0), behind(x.dim() - 1, dim1)
    ),
    "unsqueeze": lambda x, dim: x.unsqueeze(behind(x.dim(), dim)),
    "select": lambda x, dim, index: x.select(behind(x.dim() - 1, dim), index),
    "permute": lambda x, *axes: x.permute(0, *(behind(x.dim() - 1, axis) for axis in _sizes(axes))),
    "new_full": lambda x, size, fill, **options: x.new_full((x.shape[0], *size), fill, **options),
    **{name: _new(name) for name in ("new_ones", "new_zeros", "new_empty")},
}
_SHAPED = {
    f: run
    for name, run in _SHAPES.items()
    for f in (getattr(torch, name, None), getattr(Tensor, name, None))
    if f in RULES
}
_SHAPED[Tensor.T.__get__] = _SHAPES["t"]
_SHAPED[Tensor.mT.__get__] = lambda x: x.mT


class Batched(Tensor):
    """A tensor as a function under vmap sees it."""

    held: Tensor  # with the batch as its first axis
    of: Batching

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} has reached a tensor under vmap past its mode")


class Batching(TorchFunctionMode):
    """One vmap over a batch of some size."""

    def __init__(self, size: int, randomness: str = "error") -> None:
        super().__init__()
        self.size, self.randomness = size, randomness

    def wrap(self, held: Tensor) -> Batched:
        """The tensor that the function sees for one with the batch as its first axis."""
        made = Tensor._make_wrapper_subclass(
            Batched,
            held.shape[1:],
            strides=held.stride()[1:],
            dtype=held.dtype,
            device=held.device,
        )
        made.held, made.of = held, self
        return made

    def is_own(self, x: object) -> bool:
        return type(x) is Batched and x.of is self

    def behind(self, x: Tensor) -> Tensor:
        """The tensor behind x if x is one of this batch, else x itself."""
        return x.held if self.is_own(x) else x

    def rank(self, x: Tensor) -> int:
        """How many axes the function sees."""
        return x.held.dim() - 1 if self.is_own(x) else x.dim()

    def spread(self, x: Tensor) -> Tensor:
        """The tensor behind x, or x once for each element of the batch."""
        return x.held if self.is_own(x) else x.expand(self.size, *x.shape)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        own = [x for x in tree_leaves((args, kwargs)) if self.is_own(x)]
        if func in _TOLD:
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        if func is torch.func.grad:  # only by its rule
            return self._level(*args)
        if func in DRAWN:
            return self._drawn(func, args, kwargs)
        if not own:
            return self._alone(func, args, kwargs)
        rule = RULES.get(func)
        if func in _OF_HELD:
            return func(args[0].held)
        if func is torch.autograd.grad:
            return self._gradients(*args, **kwargs)
        if func is Tensor.__getitem__:
            return self._item(*args)
        if func in _SHAPED and args and self.is_own(args[0]):
            return self._shaped(func, args[0].held, args[1:], kwargs)
        if func in BATCHED:
            try:
                return tree_map(self._wrapped, BATCHED[func](self, *args, **kwargs))
            except NoRule:
                pass
        if rule is not None and (rule.own.family in _ELEMENTWISE or func in _ALIKE):
            return self._elementwise(func, args, kwargs, in_place=rule.form == "in place")
        if func in _FILLED:
            return self._elementwise(func, args, kwargs, in_place=True)
        never = rule is None or rule.own.family in _NEVER or func in _ASSIGNED
        if never or rule.form == "in place":
            raise self._refused(func, "has no rule under vmap")
        return self._one_by_one(func, args, kwargs)

    def _level(self, which: str, x: Tensor, *leaves: Tensor) -> object:
        """The border of a transform within: each element of the batch is differentiated by what is
        its own."""
        alike = which == "along" and any(map(self.is_own, leaves))
        held = self.spread(x) if which == "enter" or alike else self.behind(x)
        given = held, *map(self.spread if alike else self.behind, leaves)
        found = handle_torch_function(torch.func.grad, given, which, *given)
        own = which == "enter" or alike or (which in ("leave", "along") and self.is_own(x))
        return self.wrap(found) if own else found

    def _gradients(
        self,
        outputs: Tensor | Sequence[Tensor],
        inputs: Tensor | Sequence[Tensor],
        grad_outputs: Tensor | Sequence[Tensor] | None = None,
        **options: object,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of all elements of the batch at once, as each depends on what is its own."""
        outputs, inputs, given = map(tuple_of, (outputs, inputs, grad_outputs))
        if not any(map(self.is_own, (*outputs, *inputs))):
            options["retain_graph"] = True
            return self._one_by_one(torch.autograd.grad, (outputs, inputs, given), options)
        if not all(map(self.is_own, inputs)):
            reason = "differentiates by a tensor that is not of the batch"
            raise self._refused(torch.autograd.grad, reason)
        if not given and any(self.rank(x) for x in outputs):
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        given = given or tuple(torch.ones_like(self.behind(x)) for x in outputs)
        pairs = zip(outputs, map(self.spread, given), strict=True)
        pairs = [(x.held, g) for x, g in pairs if self.is_own(x)]
        found = torch.autograd.grad(
            [x for x, _ in pairs], [x.held for x in inputs], [g for _, g in pairs], **options
        )
        return tuple(None if x is None else self.wrap(x) for x in found)

    def _shaped(self, func: Callable, held: Tensor, args: tuple, kwargs: dict) -> Tensor:
        try:
            return self.wrap(_SHAPED[func](held, *args, **kwargs))
        except TypeError as error:
            reason = f"has no rule under vmap for these arguments ({error})"
            raise self._refused(func, reason) from None

    def _refused(self, func: Callable, reason: str) -> Exception:
        t = current()
        t.begin(func, ())
        return t.unsupported(f"It {reason}; write the batch out, or call it outside of vmap")

    def _alone(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """A call on no tensor of this batch; eager draws numbers as it was told to."""
        with self._drawing_nothing(func):
            return func(*args, **kwargs)

    @contextmanager
    def _drawing_nothing(self, func: Callable) -> Iterator[None]:
        """Around a call that would draw numbers otherwise than eager's vmap does."""
        draws = current().draws
        before = len(draws.events)
        yield
        if len(draws.events) > before:
            different(self)  # raises as eager does where nothing may be drawn
            raise self._refused(func, "draws numbers under vmap, which has no rule")

    def _drawn(self, func: Callable, args: tuple, kwargs: dict) -> object:
        try:
            found = DRAWN[func](self, func, *args, **kwargs)
        except NoRule:
            raise self._refused(func, "draws numbers under vmap, which has no rule") from None
        return self.wrap(found.held) if isinstance(found, Anew) else found

    def _elementwise(self, func: Callable, args: tuple, kwargs: dict, *, in_place: bool) -> object:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        rank = max(map(self.rank, tensors))
        if in_place and not (self.is_own(args[0]) and self.rank(args[0]) == rank):
            raise self._refused(func, "writes elements of a batch to a tensor that has none")

        def of_all(x: object) -> object:
            return aligned(self, x, rank) if isinstance(x, Tensor) else x

        out = func(*tree_map(of_all, args), **tree_map(of_all, kwargs))
        return args[0] if in_place else tree_map(self._wrapped, out)

    def _wrapped(self, x: object) -> object:
        return self.wrap(x) if isinstance(x, Tensor) else x

    def _item(self, x: Tensor, index: object) -> Tensor:
        """x[index]: of the tensor behind x, by the batch as well if the index has one."""
        index = index if isinstance(index, tuple) else (index,)
        tensors = [i for i in index if isinstance(i, Tensor)]
        if any(self.behind(i).dtype in (torch.bool, torch.uint8) for i in tensors):
            raise self._refused(Tensor.__getitem__, "selects by a mask under vmap")
        if not any(map(self.is_own, tensors)):
            plain = all(isinstance(i, (int, slice, EllipsisType, type(None))) for i in index)
            if plain or len(index) == 1:
                return self.wrap(x.held[(slice(None), *index)])
        elif all(isinstance(i, (int, Tensor)) for i in index):
            rank = max(map(self.rank, tensors))
            places = [aligned(self, i, rank) if isinstance(i, Tensor) else i for i in index]
            if not self.is_own(x):
                return self.wrap(x[tuple(places)])
            rows = torch.arange(self.size, device=x.held.device).reshape(self.size, *(1,) * rank)
            return self.wrap(x.held[(rows, *places)])
        return self._one_by_one(Tensor.__getitem__, (x, index), {})

    def _one_by_one(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """A function that has no rule for batches, for each of their elements."""
        if self.size > MANY:
            raise self._refused(func, f"has a rule under vmap for batches of up to {MANY}")
        found = []
        for k in range(self.size):

            def at(x: object, k: int = k) -> object:
                return x.held.select(0, k) if self.is_own(x) else x

            given = tree_map(at, (args, kwargs))
            with self._drawing_nothing(func):
                found.append(tree_flatten(func(*given[0], **given[1])))
            memory = {m for x in tree_leaves(given) if (m := _memory(x)) is not None}
            if any(_memory(x) in memory for x in found[-1][0]):
                raise self._refused(func, "gives a view, which has no rule under vmap")
        leaves, spec = zip(*(leaves for leaves, _ in found), strict=True), found[0][1]
        stacked = [
            self.wrap(torch.stack(xs)) if isinstance(xs[0], Tensor) else xs[0] for xs in leaves
        ]
        return tree_unflatten(stacked, spec)

    def unwrap(self, x: object, out_dim: int | None, name: str) -> object:
        """What a function under vmap returns, with the batch along an axis."""
        if out_dim is None:
            if self.is_own(x):
                raise ValueError(
                    f"vmap({name}, ...): `{name}` can not return a BatchedTensor when out_dim is "
                    "None"
                )
            return x
        if not isinstance(x, Tensor):
            raise ValueError(
                f"vmap({name}, ...): `{name}` must only return Tensors, got type {type(x)}. Did "
                "you mean to set out_dims= to None for output?"
            )
        held = self.spread(x)
        return held if out_dim == 0 else held.movedim(0, out_dim)


def tuple_of(x: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """One tensor, several or none."""
    return (x,) if isinstance(x, Tensor) else tuple(x or ())


def _memory(x: object) -> object | None:
    """Where the elements of a tensor of the step lie, if a rule has made it now."""
    while type(x) is Batched:
        x = x.held
    handle = getattr(x, "handle", None) if type(x) is TracedTensor else None
    return None if handle is None else handle.storage


def vmap(original: Callable) -> Callable:
    """`torch._functorch.apis.vmap_impl`, by which all vmaps run."""

    def vmap_impl(
        func: Callable,
        in_dims: object,
        out_dims: object,
        randomness: str,
        chunk_size: int | None,
        *args: object,
        **kwargs: object,
    ) -> object:
        if current() is None:
            return original(func, in_dims, out_dims, randomness, chunk_size, *args, **kwargs)
        torch_vmap._check_out_dims_is_int_or_int_pytree(out_dims, func)
        size, dims, given, spec = torch_vmap._process_batched_inputs(in_dims, args, func)
        mode, name = Batching(size, randomness), torch_vmap._get_name(func)
        batches = [
            x if dim is None else mode.wrap(x if dim == 0 else x.movedim(dim, 0))
            for x, dim in zip(given, dims, strict=True)
        ]
        with mode:
            out = func(*tree_unflatten(batches, spec), **kwargs)
        leaves, out_spec = tree_flatten(out)
        if isinstance(out, Tensor) and isinstance(out_dims, tuple) and len(out_dims) == 1:
            axes: list | None = list(out_dims)
        else:
            axes = torch_vmap._broadcast_to_and_flatten(out_dims, out_spec)
        if axes is None:
            raise ValueError(
                f"vmap({name}, ..., out_dims={out_dims})(<inputs>): out_dims is not compatible "
                "with the structure of `outputs`."
            )
        found = [mode.unwrap(x, axis, name) for x, axis in zip(leaves, axes, strict=True)]
        return tree_unflatten(found, out_spec)

    return vmap_impl
