"""Random numbers under vmap: as its `randomness` says, anew for each element or the same for all.

Eager's numbers: those for a whole batch are one draw, with the batch as the first axis; dropout
draws its mask densely, whatever the strides of its input.

A rule takes the `Batch`, the function, and the arguments as the function sees them, and returns the
tensor behind the result, as `Anew`, or a tensor that all elements share.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

from tracejit.capture.python.batching import Batch, NoRule, aligned, registered
from tracejit.records import dataclass

Tensor = torch.Tensor
functional = torch.nn.functional

DRAWN: dict[Callable, Callable[..., object]] = {}


@dataclass(frozen=True)
class Anew:
    """What is behind a result that has an element for each of the batch."""

    held: Tensor


drawn = partial(registered, DRAWN)


def different(b: Batch) -> bool:
    """Whether numbers are drawn anew for each element; they may not be drawn in mode "error"."""
    if b.randomness == "error":
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode. Please either use the "
            "'same' or 'different' randomness flags on vmap or perform the randomness operation "
            "out of vmap"
        )
    return b.randomness == "different"


def _not_the_same() -> Exception:
    return RuntimeError(
        "Vmap does not currently support same randomness with a batched tensor input. Please file "
        "an issue with functorch"
    )


def _shape(b: Batch, x: Tensor) -> tuple[int, ...]:
    """As the function sees it."""
    return tuple(b.behind(x).shape[1:] if b.is_own(x) else x.shape)


# ---- dropout


def _dropped(b: Batch, input: Tensor, p: float, inplace: bool, axes: int | None) -> object:
    """The input times a noise of its shape, or of its first axes if whole channels are dropped."""
    shape, held = _shape(b, input), b.behind(input)
    if axes is not None:
        shape = (*shape[:axes], *(1,) * (len(shape) - axes))
    anew = 0 < p < 1 and different(b)
    shape = (b.size, *shape) if anew else shape
    noise = functional.dropout(torch.ones(shape, dtype=held.dtype, device=held.device), p)
    if inplace:
        if anew and not b.is_own(input):
            raise NoRule
        held.mul_(noise)
        return input
    out = held * noise
    return Anew(out) if anew or b.is_own(input) else out


@drawn("dropout")
def dropout(
    b: Batch, f: object, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> object:
    """Also `torch.dropout(input, p, train)`."""
    return _dropped(b, input, p, inplace, None) if training and p else input


def _of_channels(rank: int) -> None:
    @drawn(f"dropout{rank}d")
    def dropout(
        b: Batch,
        f: object,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> object:
        seen = b.rank(input)
        if seen not in (rank + 1, rank + 2):
            raise NoRule
        axes = 2 if seen == rank + 2 or rank == 2 else 1  # two-dimensional input is not unbatched
        return _dropped(b, input, p, inplace, axes) if training and p else input


for _rank in (1, 2, 3):
    _of_channels(_rank)


# ---- numbers of some shape


@drawn("rand", "randn")
def of_sizes(b: Batch, f: Callable, *sizes: object, **kwargs: object) -> object:
    if not different(b):
        return f(*sizes, **kwargs)
    size = kwargs.pop("size") if "size" in kwargs else sizes
    size = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
    return Anew(f((b.size, *size), **kwargs))


@drawn("randint", "normal")
def of_a_size(b: Batch, f: Callable, *args: object, **kwargs: object) -> object:
    """The size is the last argument that stands by its place."""
    if any(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
        raise NoRule
    if not different(b):
        return f(*args, **kwargs)
    if "size" in kwargs:
        return Anew(f(*args, **{**kwargs, "size": (b.size, *kwargs["size"])}))
    if not args or not isinstance(args[-1], (tuple, list)):
        raise NoRule
    return Anew(f(*args[:-1], (b.size, *args[-1]), **kwargs))


@drawn("randperm")
def randperm(b: Batch, f: Callable, *args: object, **kwargs: object) -> object:
    if not different(b):
        return f(*args, **kwargs)
    return Anew(torch.stack([f(*args, **kwargs) for _ in range(b.size)]))


@drawn("rand_like", "randn_like", "randint_like")
def like(b: Batch, f: Callable, input: Tensor, *args: object, **kwargs: object) -> object:
    held = b.behind(input)
    if different(b) and b.is_own(input):
        return Anew(f(held, *args, **kwargs))
    shape, strides = _shape(b, input), held.stride()[1:] if b.is_own(input) else ()
    if any(a < z for a, z in pairwise(strides)):  # eager draws them as they lie
        raise NoRule
    shape = (b.size, *shape) if different(b) else shape
    out = f(torch.empty(shape, dtype=held.dtype, device=held.device), *args, **kwargs)
    return Anew(out) if different(b) else out


# ---- numbers that values say something of


@drawn("bernoulli", "multinomial")
def by_chances(b: Batch, f: Callable, input: Tensor, *args: object, **kwargs: object) -> object:
    anew, rank = different(b), b.rank(input)
    if not anew:
        if b.is_own(input):
            raise _not_the_same()
        return f(input, *args, **kwargs)
    if f not in (torch.multinomial, Tensor.multinomial):
        if args or "p" in kwargs:
            raise NoRule
        return Anew(f(b.spread(input).contiguous(), **kwargs))
    if rank not in (1, 2):
        raise NoRule
    rows = b.spread(input)
    found = f(rows.reshape(-1, rows.shape[-1]), *args, **kwargs)
    return Anew(found if rank == 1 else found.reshape(b.size, -1, found.shape[-1]))


@drawn("normal_", "uniform_", "exponential_", "log_normal_", "cauchy_")
def filled(b: Batch, f: Callable, input: Tensor, *args: object, **kwargs: object) -> object:
    anew, own = different(b), b.is_own(input)
    if anew and not own:
        raise RuntimeError(
            "vmap: Cannot ask for different inplace randomness on an unbatched tensor. This will "
            "appear like same randomness. If this is necessary for your usage, please file an "
            "issue with functorch."
        )
    if anew or not own:
        f(b.behind(input), *args, **kwargs)
        return input
    held = b.behind(input)
    one = torch.empty(held.shape[1:], dtype=held.dtype, device=held.device)
    held.copy_(aligned(b, f(one, *args, **kwargs), b.rank(input)))
    return input
