"""What functions of torch that work along axes do for a whole batch under vmap.

Rules as in `batching.py`: an axis that the function sees is the next one of the tensor behind.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from tracejit.capture.python.batching import BATCHED, Batch, NoRule, batched, behind

Tensor = torch.Tensor


def _axes(b: Batch, x: Tensor, dim: object) -> tuple[int, ...]:
    """Axes of the tensor behind; all that the function sees, if none is given."""
    rank = b.rank(x)
    if not rank:
        raise NoRule
    if dim is None or dim == () or dim == []:
        return tuple(range(1, rank + 1))
    return tuple(behind(rank, d) for d in ((dim,) if isinstance(dim, int) else dim))


def _reduction(name: str) -> None:
    @batched(name)
    def reduction(
        b: Batch, input: Tensor, dim: object = None, *args: object, **kwargs: object
    ) -> Tensor:
        if not b.is_own(input) or isinstance(dim, bool):
            raise NoRule
        return getattr(torch, name)(b.behind(input), _axes(b, input, dim), *args, **kwargs)


for _name in ("sum", "mean", "amax", "amin", "logsumexp", "nansum"):
    _reduction(_name)


def _spread_out(name: str) -> None:
    @batched(name)
    def spread_out(b: Batch, input: Tensor, dim: object = None, **kwargs: object) -> Tensor:
        if not b.is_own(input) or isinstance(dim, bool):
            raise NoRule
        return getattr(torch, name)(b.behind(input), dim=_axes(b, input, dim), **kwargs)


for _name in ("var", "std"):
    _spread_out(_name)


def _along(name: str, position: int, default: int | None) -> None:
    """A function whose argument at a position, `dim`, is an axis or several."""

    @batched(name)
    def along(b: Batch, input: Tensor, *args: object, **kwargs: object) -> object:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        rank = b.rank(input)
        if not rank or any(b.rank(x) != rank for x in tensors):
            raise NoRule
        named = "dims" if "dims" in kwargs else "dim"
        place = position - 1
        given = kwargs.pop(named) if named in kwargs else None
        if given is None and len(args) > place:
            given, args = args[place], args[:place] + args[place + 1 :]
        dim = default if given is None else given
        if dim is None or (tensors and not isinstance(dim, int)):
            raise NoRule
        kwargs.pop("_stacklevel", None)
        if isinstance(dim, (tuple, list)) or name == "flip":
            axis: object = _axes(b, input, dim)
        else:
            axis = behind(rank, dim)
        args = [b.spread(x) if isinstance(x, Tensor) else x for x in args]
        kwargs = {k: b.spread(x) if isinstance(x, Tensor) else x for k, x in kwargs.items()}
        return getattr(torch, name)(b.spread(input), *args[:place], axis, *args[place:], **kwargs)


for _name, _position, _default in (
    *(("softmax", 1, None), ("log_softmax", 1, None)),
    *(("cumsum", 1, None), ("cumprod", 1, None), ("logcumsumexp", 1, None)),
    *(("argmax", 1, None), ("argmin", 1, None), ("argsort", 1, -1), ("sort", 1, -1)),
    *(("chunk", 2, 0), ("split", 2, 0), ("unbind", 1, 0), ("flip", 1, None)),
    *(("narrow", 1, None), ("topk", 2, -1), ("gather", 1, None), ("unflatten", 1, None)),
):
    _along(_name, _position, _default)


def _extreme(name: str) -> None:
    _along(name, 1, None)
    along = BATCHED[getattr(torch, name)]

    @batched(name)
    def extreme(b: Batch, input: Tensor, *args: object, **kwargs: object) -> object:
        if args or kwargs:
            return along(b, input, *args, **kwargs)
        return getattr(torch, f"a{name}")(b.behind(input), _axes(b, input, None))


_extreme("max")
_extreme("min")


@batched("normalize")
def normalize(
    b: Batch,
    input: Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: None = None,
) -> Tensor:
    return functional.normalize(b.behind(input), p, behind(b.rank(input), dim), eps)


@batched("squeeze")
def squeeze(b: Batch, input: Tensor, dim: object = None) -> Tensor:
    x = b.behind(input)
    if dim is None:
        return x.squeeze([k for k in range(1, x.dim()) if x.shape[k] == 1])
    return x.squeeze(list(_axes(b, input, dim)))


@batched("diagonal")
def diagonal(b: Batch, input: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    rank = b.rank(input)
    return b.behind(input).diagonal(offset, behind(rank, dim1), behind(rank, dim2))


@batched("flatten")
def flatten(b: Batch, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    rank = b.rank(input)
    if not rank:
        return b.behind(input).unsqueeze(1)
    return b.behind(input).flatten(behind(rank, start_dim), behind(rank, end_dim))


@batched("movedim")
def movedim(b: Batch, input: Tensor, source: object, destination: object) -> Tensor:
    both = (_axes(b, input, d) for d in (source, destination))
    return b.behind(input).movedim(*both)


@batched("cat", "concat", "concatenate")
def cat(b: Batch, tensors: object, dim: int = 0) -> Tensor:
    rank = max(map(b.rank, tensors))
    if any(b.rank(x) != rank for x in tensors):
        raise NoRule
    return torch.cat([b.spread(x) for x in tensors], behind(rank, dim))


@batched("stack")
def stack(b: Batch, tensors: object, dim: int = 0) -> Tensor:
    return torch.stack([b.spread(x) for x in tensors], behind(b.rank(tensors[0]) + 1, dim))


@batched("pad")
def pad(
    b: Batch, input: Tensor, pad: object, mode: str = "constant", value: float | None = None
) -> Tensor:
    if mode != "constant":
        raise NoRule
    return functional.pad(b.behind(input), pad, mode, value)


@batched("one_hot")
def one_hot(b: Batch, tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        raise NoRule
    return functional.one_hot(b.behind(tensor), num_classes)


@batched("linalg_vector_norm")
def vector_norm(
    b: Batch, x: Tensor, ord: float = 2, dim: object = None, keepdim: bool = False, **kind: object
) -> Tensor:
    return torch.linalg.vector_norm(b.behind(x), ord, _axes(b, x, dim), keepdim, **kind)


@batched("norm")
def norm(
    b: Batch,
    input: Tensor,
    p: object = "fro",
    dim: object = None,
    keepdim: bool = False,
    **kind: object,
) -> Tensor:
    if p == "nuc" or isinstance(p, bool) or p is None:
        raise NoRule
    ord = 2.0 if p == "fro" else p
    axes = _axes(b, input, dim)
    return torch.linalg.vector_norm(b.behind(input), ord, axes, keepdim, **kind)
