"""What functions of torch do for a whole batch under vmap: calls on the tensors behind.

A rule takes the `Batch`, then the arguments as the function sees them, and returns the tensors
behind its results, with the batch as their first axis. Each element of a batch may have weights of
its own, as in gradients by sample: products become products of batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch.utils._pytree import tree_map

from tracejit.capture.trace.table import RULES, spellings

Tensor = torch.Tensor
functional = torch.nn.functional


class Batch(Protocol):
    """What rules ask of a vmap (`python/vmaps.py`)."""

    size: int
    randomness: str  # "error", "different" or "same"

    def is_own(self, x: object) -> bool:
        """Whether a tensor has an element for each of the batch."""

    def behind(self, x: Tensor) -> Tensor:
        """The tensor behind x if x is one of this batch, else x itself."""

    def rank(self, x: Tensor) -> int:
        """How many axes the function sees."""

    def spread(self, x: Tensor) -> Tensor:
        """The tensor behind x, or x once for each element of the batch."""


class NoRule(Exception):
    """There is none for these arguments: the function is called for each element."""


BATCHED: dict[Callable, Callable[..., object]] = {}


def registered(rules: dict[Callable, Callable[..., object]], *names: str) -> Callable:
    """Register a rule for the functions of these names, among such rules."""

    def register(rule: Callable) -> Callable:
        for name in names:
            rules.update({f: rule for f in spellings(name) if f in RULES})
        return rule

    return register


batched = partial(registered, BATCHED)


def aligned(b: Batch, x: Tensor, rank: int) -> Tensor:
    """The tensor behind x with axes of size 1 after that of the batch, up to a rank; another tensor
    as it is."""
    if not b.is_own(x):
        return x
    held = b.behind(x)
    missing = rank + 1 - held.dim()
    return held.reshape(b.size, *(1,) * missing, *held.shape[1:]) if missing > 0 else held


def behind(rank: int, axis: int) -> int:
    """An axis that the function sees, of the tensor behind it."""
    if not -rank <= axis < rank:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but got "
            f"{axis})"
        )
    return axis % rank + 1


# ---- products


@batched("linear")
def linear(b: Batch, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not b.is_own(weight) and (bias is None or not b.is_own(bias)):
        return functional.linear(b.behind(input), weight, bias)
    x, rank = b.spread(input), b.rank(input)
    rows = x.reshape(b.size, -1, x.shape[-1]) if rank != 2 else x
    # the gradient of the weights, the largest of all, is laid out as they are then
    y = (b.spread(weight) @ rows.transpose(1, 2)).transpose(1, 2)
    y = y.reshape(*x.shape[:-1], y.shape[-1]) if rank != 2 else y
    return y if bias is None else y + aligned(b, bias, rank)


@batched("matmul", "__matmul__", "mm", "bmm", "mv", "dot")
def matmul(b: Batch, input: Tensor, other: Tensor) -> Tensor:
    if min(b.rank(input), b.rank(other)) < 1:
        raise NoRule
    if not b.is_own(other) and b.rank(input) > 1 and b.rank(other) == 2:
        return b.behind(input) @ other
    rank = max(b.rank(input), b.rank(other), 2)
    x, y = b.spread(input), b.spread(other)
    row, column = b.rank(input) == 1, b.rank(other) == 1
    x = x.unsqueeze(1) if row else x
    y = y.unsqueeze(2) if column else y
    x = x.reshape(b.size, *(1,) * (rank + 1 - x.dim()), *x.shape[1:])
    y = y.reshape(b.size, *(1,) * (rank + 1 - y.dim()), *y.shape[1:])
    z = x @ y
    z = z.squeeze(-1) if column else z
    return z.squeeze(-1 if column else -2) if row else z


@batched("outer")
def outer(b: Batch, input: Tensor, vec2: Tensor) -> Tensor:
    return b.spread(input).unsqueeze(2) * b.spread(vec2).unsqueeze(1)


@batched("einsum")
def einsum(b: Batch, equation: str, *operands: object) -> Tensor:
    """With one more letter."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        raise NoRule
    letter = next(
        c for c in "zyxwvutsrqponmlkjihgfedcbaZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in equation
    )
    terms, out = equation.replace(" ", "").split("->")
    given = zip(terms.split(","), operands, strict=True)
    terms = ",".join(letter + term if b.is_own(x) else term for term, x in given)
    return torch.einsum(f"{terms}->{letter}{out}", *map(b.behind, operands))


@batched("scaled_dot_product_attention")
def attention(
    b: Batch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **options: object,
) -> Tensor:
    tensors = [query, key, value] + ([] if attn_mask is None else [attn_mask])
    rank = max(map(b.rank, tensors))
    if any(b.rank(x) != rank for x in tensors[:3]) or (dropout_p and b.randomness != "different"):
        raise NoRule
    mask = None if attn_mask is None else aligned(b, attn_mask, rank)
    of_each = map(b.spread, (query, key, value))
    return functional.scaled_dot_product_attention(*of_each, mask, dropout_p, **options)


def _folded(b: Batch, x: Tensor) -> Tensor:
    """The batch that the function sees and that of vmap as one."""
    return b.spread(x).flatten(0, 1)


def _convolution(rank: int) -> None:
    function = getattr(torch, f"conv{rank}d")

    @batched(f"conv{rank}d")
    def convolution(
        b: Batch,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: object = 1,
        padding: object = 0,
        dilation: object = 1,
        groups: int = 1,
    ) -> Tensor:
        """With weights of their own, the elements of the batch are groups of channels."""
        single = b.rank(input) == rank + 1
        how = stride, padding, dilation
        if not b.is_own(weight) and (bias is None or not b.is_own(bias)):
            x = b.spread(input) if single else _folded(b, input)
            y = function(x, weight, bias, *how, groups)
            return y if single else y.unflatten(0, (b.size, -1))
        x, w = b.spread(input), b.spread(weight)
        x = x.unsqueeze(1) if single else x
        images = x.transpose(0, 1).flatten(1, 2)  # [images, batch·channels, …]
        y = function(images, w.flatten(0, 1), None, *how, groups * b.size)
        y = y.unflatten(1, (b.size, -1)).transpose(0, 1)
        if bias is not None:
            y = y + b.spread(bias).reshape(b.size, 1, -1, *(1,) * rank)
        return y.squeeze(1) if single else y


for _rank in (1, 2, 3):
    _convolution(_rank)


def _pooling(name: str, rank: int) -> None:
    """Functions of images [channels, …] or of batches of them, which take each by itself."""
    function = getattr(functional, f"{name}{rank}d")

    def pooling(b: Batch, input: Tensor, *args: object, **kwargs: object) -> object:
        if b.rank(input) == rank + 1:
            return function(b.spread(input), *args, **kwargs)
        found = function(_folded(b, input), *args, **kwargs)
        return tree_map(lambda y: y.unflatten(0, (b.size, -1)), found)

    batched(f"{name}{rank}d")(pooling)
    if function in RULES:
        BATCHED[function] = pooling


for _name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"):
    for _rank in (1, 2, 3):
        _pooling(_name, _rank)


@batched("embedding")
def embedding(
    b: Batch,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NoRule
    if not b.is_own(weight):
        return functional.embedding(b.behind(input), weight, padding_idx)
    ids, tables = b.spread(input), b.spread(weight)
    words = tables.shape[1]
    first = torch.arange(b.size, device=ids.device) * words
    rows = functional.embedding(
        ids + first.reshape(b.size, *(1,) * (ids.dim() - 1)), tables.flatten(0, 1)
    )
    if padding_idx is None:
        return rows
    return torch.where((ids == padding_idx % words).unsqueeze(-1), rows.detach(), rows)


# ---- normalization


@batched("layer_norm")
def layer_norm(
    b: Batch,
    input: Tensor,
    normalized_shape: object,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    given = [x for x in (weight, bias) if x is not None]
    if not any(map(b.is_own, given)):
        return functional.layer_norm(b.behind(input), normalized_shape, weight, bias, eps)
    y, rank = (
        functional.layer_norm(b.spread(input), normalized_shape, None, None, eps),
        b.rank(input),
    )
    y = y if weight is None else y * aligned(b, weight, rank)
    return y if bias is None else y + aligned(b, bias, rank)


@batched("rms_norm")
def rms_norm(
    b: Batch,
    input: Tensor,
    normalized_shape: object,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    if weight is None or not b.is_own(weight):
        return functional.rms_norm(b.behind(input), normalized_shape, weight, eps)
    y = functional.rms_norm(b.spread(input), normalized_shape, None, eps)
    return y * aligned(b, weight, b.rank(input))


@batched("group_norm")
def group_norm(
    b: Batch,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    x = _folded(b, input)
    y = functional.group_norm(x, num_groups, None, None, eps).unflatten(0, (b.size, -1))

    def of_channels(p: Tensor) -> Tensor:
        return b.spread(p).reshape(b.size, 1, -1, *(1,) * (x.dim() - 2))

    y = y if weight is None else y * of_channels(weight)
    return y if bias is None else y + of_channels(bias)


# ---- losses


def _reduced(b: Batch, x: Tensor, reduction: str) -> Tensor:
    """A loss of each element, [batch, …], for each element of the batch."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if reduction == "none" or x.dim() == 1:
        return x
    axes = tuple(range(1, x.dim()))
    return x.mean(axes) if reduction == "mean" else x.sum(axes)


def _elementwise_loss(name: str) -> None:
    function = getattr(functional, name)

    @batched(name)
    def loss(
        b: Batch,
        input: Tensor,
        target: Tensor,
        *args: object,
        reduction: str = "mean",
        **kwargs: object,
    ) -> Tensor:
        more = [*args, *kwargs.values()]
        if any(isinstance(x, (str, Tensor)) for x in more) or None in args:
            raise NoRule
        rank = max(b.rank(input), b.rank(target))
        x, y = torch.broadcast_tensors(*(aligned(b, v, rank) for v in (input, target)))
        return _reduced(b, function(x, y, *args, reduction="none", **kwargs), reduction)


for _name in (
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy"),
    *("binary_cross_entropy_with_logits", "soft_margin_loss"),
):
    _elementwise_loss(_name)


def _class_loss(name: str) -> None:
    function = getattr(functional, name)

    @batched(name)
    def loss(
        b: Batch,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: None = None,
        ignore_index: int = -100,
        reduce: None = None,
        reduction: str = "mean",
        **smoothing: float,
    ) -> Tensor:
        """Of logits [classes], [rows, classes] or [rows, classes, …] and classes."""
        plain = weight is None or not (b.is_own(weight) or smoothing.get("label_smoothing"))
        if size_average is not None or reduce is not None or not plain:
            raise NoRule
        x, y = b.spread(input), b.spread(target)
        if y.is_floating_point() or b.rank(input) < 1:
            raise NoRule
        if b.rank(input) > 1:
            x, y = x.flatten(0, 1), y.flatten(0, 1)
        named = {"weight": weight, "ignore_index": ignore_index, "reduction": "none", **smoothing}
        losses = function(x, y, **named)
        if b.rank(input) > 1:
            losses, y = losses.unflatten(0, (b.size, -1)), y.unflatten(0, (b.size, -1))
        if reduction != "mean":
            return _reduced(b, losses, reduction)
        counted = y != ignore_index
        if weight is not None:
            counts = torch.where(counted, weight[torch.where(counted, y, 0)], 0.0)
        else:
            counts = counted.to(losses.dtype)
        return _reduced(b, losses, "sum") / _reduced(b, counts, "sum")


for _name in ("cross_entropy", "nll_loss"):
    _class_loss(_name)


@batched("dropout")
def dropout(
    b: Batch, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Where it drops nothing."""
    if training and p:
        raise NoRule
    return b.behind(input)
