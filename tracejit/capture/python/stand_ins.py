"""Tensors of a trace for what eager saves: arguments, results, and what lies between.

In: the tensors on the "meta" device that eager saves for a call (`eager_saves.py`). Out: for each a
tensor of the trace with its value. What is neither an argument nor a result is computed once more,
operator by operator, by the rules of the torch functions of the same name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map

from tracejit.capture.python.eager_saves import Saves, of_shape, tensors_in
from tracejit.capture.trace.table import RULES, spellings
from tracejit.capture.trace.tensor import Step, TracedTensor, by_memory, is_dense
from tracejit.capture.trace.trace import Trace
from tracejit.errors import UnsupportedOperation
from tracejit.ir.graph import Value
from tracejit.records import dataclass

Tensor = torch.Tensor
functional = torch.nn.functional

UNKNOWN = (
    "Hooks on saved tensors are active, and which tensors eager would save for it is not known; "
    "leave this call out of the hooks"
)
_NOISE = ("bernoulli_", "div_")  # the operators that make what dropout multiplies by
# arguments whose values the derivatives do not use: their shapes do, or nothing
_IDLE = {"native_batch_norm": (3, 4), "nll_loss_forward": (0,)}


@dataclass(frozen=True, slots=True)
class StandIn:
    """A tensor of the trace for one that eager saves.

    `within`: where it is another form of an argument or a result, the value of that, and the
    movement from this form back to it."""

    tensor: Tensor
    within: tuple[Value, tuple[Step, ...]] | None
    is_idle: bool  # eager's derivative does not use its values


class Shapes:
    """The tensors of a call, and what stands for them on the "meta" device."""

    def __init__(self, t: Trace, device: str):
        self.t, self.device = t, device
        self.on_cpu = True  # all tensors are
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.any_requires_grad = False

    def of(self, x: object) -> object:
        """An argument of the call, as it is given to torch on the "meta" device."""
        if not isinstance(x, Tensor):
            return x
        for meta, known in self.pairs:
            if known is x:
                return meta
        h = self.t.lift(x)
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            differentiated = self.t.requires_grad(h)
            how = {"requires_grad": differentiated, "device": self.device}
            meta = of_shape(h.dtype, h.shape, h.strides, **how)
        self.on_cpu &= h.device == "cpu"
        self.any_requires_grad |= differentiated
        self.pairs.append((meta, x))
        return meta

    def returned(self, metas: object, results: object) -> None:
        """What the call returned, on both sides."""
        if isinstance(metas, Tensor) and isinstance(results, Tensor):
            if self.known(metas) is None:
                self.pairs.append((metas, results))
        elif isinstance(metas, (tuple, list)) and isinstance(results, (tuple, list)):
            for meta, result in zip(metas, results, strict=True):
                self.returned(meta, result)

    def known(self, meta: Tensor) -> Tensor | None:
        """The tensor that one on the "meta" device stands for."""
        return next((x for m, x in self.pairs if m is meta), None)

    def sharing(self, meta: Tensor) -> Tensor | None:
        """The argument or result in whose memory a tensor on the "meta" device lies."""
        memory = meta.untyped_storage()._cdata
        return next((m for m, _ in self.pairs if m.untyped_storage()._cdata == memory), None)


class StandIns:
    """For tensors that eager saves, tensors of the trace that have their values."""

    def __init__(self, t: Trace, given: Shapes, saves: Saves):
        self.t, self.given, self.saves = t, given, saves
        self.made: list[TracedTensor] = []  # by the rule of the call
        self._early: dict[int, bool] = {}  # by operator call
        self._computed: dict[tuple[int, int], Tensor] = {}  # by operator call and result

    def is_early(self, which: int) -> bool:
        """Whether eager saves it before it computes the results."""
        return self._is_early(self.saves.tensors[which], self.saves.at[which])

    def _is_early(self, meta: Tensor, at: int) -> bool:
        if any(x is meta for x in tensors_in(self.saves.result)):
            return False
        if self.given.known(meta) is not None:
            return True
        found = self.saves.maker(meta, at)
        if found is None:
            return False
        n = found[0]
        if n not in self._early:
            call = self.saves.calls[n]
            given = tensors_in((call.args, call.kwargs))
            self._early[n] = call.name not in _NOISE and all(self._is_early(x, n) for x in given)
        return self._early[n]

    def of(self, which: int) -> StandIn:
        meta, at = self.saves.tensors[which], self.saves.at[which]
        try:
            tensor = self._tensor(meta, at)
        except UnsupportedOperation:
            raise
        except Exception as error:  # an operator is called in another way than its function
            raise self.t.unsupported(UNKNOWN) from error
        return StandIn(tensor, self._within(meta), self._is_idle(which))

    def _is_idle(self, which: int) -> bool:
        if self.saves.is_result(which):
            return False
        call = self.saves.before(which)
        idle = () if call is None else _IDLE.get(call.name, ())
        if idle and call.name == "native_batch_norm" and not call.args[5]:  # in evaluation
            idle = ()
        meta = self.saves.tensors[which]
        return any(call.args[i] is meta for i in idle)

    def _tensor(self, meta: Tensor, at: int) -> Tensor:
        """The stand-in for a tensor as it is once so many operators are over."""
        x = self.given.known(meta)
        if x is not None:
            return x
        found = self.saves.maker(meta, at)
        if found is None:
            raise self.t.unsupported(UNKNOWN)
        if found in self._computed:
            return self._computed[found]
        n, which = found
        x = self._noise(meta) if self.saves.calls[n].name in _NOISE else self._run(n, which)
        if not isinstance(x, Tensor) or self.t.lift(x).shape != tuple(meta.shape):
            raise self.t.unsupported(UNKNOWN)
        if not meta.requires_grad and self.t.requires_grad(self.t.lift(x)):
            x = self._call(Tensor.detach, x)
        self._computed[found] = x
        return x

    def _run(self, n: int, which: int) -> object:
        """A result of an operator."""
        call = self.saves.calls[n]
        args, kwargs = tree_map(
            lambda x: self._tensor(x, n) if isinstance(x, Tensor) else x, (call.args, call.kwargs)
        )
        special = _OPERATORS.get(call.name)
        if special is not None:
            return special(self._call, which, *args, **kwargs)
        name = call.name.removesuffix("_")  # what is written to has a stand-in before and after
        named = [*spellings(name), getattr(torch.linalg, name.removeprefix("linalg_"), None)]
        function = next((f for f in named if f in RULES), None)
        if function is None:
            raise self.t.unsupported(UNKNOWN)
        result = self._call(function, *args, **kwargs)
        return result[which] if isinstance(result, tuple) else result

    def _call(self, function: Callable, *args: object, **kwargs: object) -> object:
        return RULES[function].run(self.t, *args, **kwargs)

    def _noise(self, meta: Tensor) -> Tensor:
        """What dropout multiplies by: its rule has made it, before the result."""
        result = {id(x) for _, x in self.given.pairs}
        shape = tuple(meta.shape)
        found = [x for x in self.made if id(x) not in result and x.handle.shape == shape]
        if not found:
            raise self.t.unsupported(UNKNOWN)
        return found[-1]

    def _within(self, meta: Tensor) -> tuple[Value, tuple[Step, ...]] | None:
        base = self.given.sharing(meta)
        if base is None or base is meta:
            return None
        h = self.t.lift(self.given.known(base))
        dense = is_dense(h.shape, h.strides) and is_dense(tuple(meta.shape), meta.stride())
        if not dense or h.numel != meta.numel():
            return None
        order = by_memory(h.shape, h.strides)
        back = [order.index(k) for k in range(len(order))]
        steps = (
            ("permute", (("axes", by_memory(tuple(meta.shape), meta.stride())),)),
            ("reshape", (("shape", tuple(h.shape[k] for k in order)),)),
            ("permute", (("axes", tuple(back)),)),
        )
        return self.t.read_with_history(h), steps


# ---- operators that are no torch function by another name: (call, which result, *arguments)


def _along(function: Callable) -> Callable:
    """A function along an axis, whose operator is given a dtype besides."""

    def operator(call: Callable, which: int, x: Tensor, axis: int, *dtype: object) -> Tensor:
        return call(function, x, axis)

    return operator


def _layer_norm(
    call: Callable,
    which: int,
    x: Tensor,
    shape: list[int],
    weight: object,
    bias: object,
    eps: float,
) -> Tensor:
    """1: the means, 2: the inverses of the deviations, both of the axes before `shape`."""
    axes = [*range(-len(shape), 0)]
    return _statistics(call, which, x, axes, eps, keepdim=True)


def _batch_norm(
    call: Callable,
    which: int,
    x: Tensor,
    weight: object,
    bias: object,
    mean: object,
    var: object,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor | None:
    """1: the means, 2: the inverses of the deviations, both by channel."""
    if not training:
        return None
    axes = [i for i in range(x.dim()) if i != 1]
    return _statistics(call, which, x, axes, eps, keepdim=False)


def _statistics(
    call: Callable, which: int, x: Tensor, axes: list[int], eps: float, *, keepdim: bool
) -> Tensor:
    if x.dtype.itemsize < 4:
        x = call(Tensor.float, x)
    if which == 1:
        return call(torch.mean, x, axes, keepdim)
    var = call(torch.var, x, axes, unbiased=False, keepdim=keepdim)
    return call(torch.rsqrt, call(torch.add, var, eps))


def _nll_loss(
    call: Callable,
    which: int,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    how: int,
    ignored: int,
) -> Tensor | None:
    """1: by what the mean is divided."""
    if not how or x.dim() != 2:
        return None
    counts = call(torch.ne, target, ignored)
    if weight is not None:
        clean = call(torch.where, counts, target, 0)
        counts = call(torch.mul, call(torch.take, weight, clean), counts)
    return call(torch.sum, call(Tensor.to, counts, x.dtype))


def _max_pool2d(call: Callable, which: int, x: Tensor, *args: object) -> Tensor:
    return call(functional.max_pool2d_with_indices, x, *args)[which]


def _to(
    call: Callable, which: int, x: Tensor, *, dtype: torch.dtype | None = None, **layout: object
) -> Tensor:
    return x if dtype is None else call(Tensor.to, x, dtype)


def _group_norm(
    call: Callable,
    which: int,
    x: Tensor,
    weight: object,
    bias: object,
    count: int,
    channels: int,
    size: int,
    groups: int,
    eps: float,
) -> Tensor:
    """1: the means, 2: the inverses of the deviations, both by sample and group."""
    rows = call(Tensor.reshape, x, count, groups, -1)
    return _statistics(call, which, rows, [2], eps, keepdim=False)


def _attention(
    call: Callable,
    which: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor | None:
    """0: what is attended to, 1: the logarithms of the sums of exponentials."""
    if dropout:
        return None
    if which == 0:
        how = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale}
        return call(functional.scaled_dot_product_attention, q, k, v, **how)
    scores = call(torch.matmul, q, call(Tensor.transpose, k, -2, -1))
    scores = call(torch.mul, scores, q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        ones = call(torch.ones, q.shape[-2], k.shape[-2], dtype=torch.bool)
        scores = call(torch.where, call(torch.tril, ones), scores, float("-inf"))
    if attn_mask is not None:
        scores = call(torch.add, scores, attn_mask)
    return call(torch.logsumexp, scores, -1)


_OPERATORS = {
    "_log_softmax": _along(functional.log_softmax),
    "_softmax": _along(functional.softmax),
    "_safe_softmax": _along(functional.softmax),
    "native_layer_norm": _layer_norm,
    "native_batch_norm": _batch_norm,
    "nll_loss_forward": _nll_loss,
    "max_pool2d_with_indices": _max_pool2d,
    "_to_copy": _to,
    "native_group_norm": _group_norm,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_unsafe_view": lambda call, which, x, shape: call(Tensor.reshape, x, shape),
}
