"""Which tensors eager keeps for the derivative of one torch call, in the order in which it does.

In: a function, and arguments of shapes only. Out: for each tensor that is kept an argument or a
result, or how it was computed of them; and in which order a backward asks for them. The function
runs in eager on the "meta" device, where tensors have no numbers; where torch keeps other tensors
there than on the CPU, on zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tracejit.capture.trace.tensor import TO_TORCH, extent, is_dense
from tracejit.ir.types import DType
from tracejit.records import dataclass

Tensor = torch.Tensor
# not as they are patched while a trace runs
_push = torch._C._autograd._push_saved_tensors_default_hooks
_pop = torch._C._autograd._pop_saved_tensors_default_hooks


@dataclass(frozen=True, slots=True)
class Computed:
    """One call of an operator on tensors of shapes only."""

    name: str  # of the operator, without namespace and overload
    args: tuple
    kwargs: dict
    result: object


@dataclass(frozen=True, slots=True)
class Saves:
    """What eager keeps for the derivative of a call.

    `result` is what the call returned, of shapes only; `asked` has positions in `tensors`, in the
    order of a backward."""

    tensors: tuple[Tensor, ...]
    at: tuple[int, ...]  # how many of `calls` were over when each was saved
    asked: tuple[int, ...]
    result: object
    calls: tuple[Computed, ...]

    def is_result(self, which: int) -> bool:
        """Whether it is saved as what the latest operator returned."""
        x, n = self.tensors[which], self.at[which]
        latest = tensors_in(self.calls[n - 1].result) if n else ()
        earlier = zip(self.tensors[:which], self.at, strict=False)
        return any(y is x for y in latest) and not any(y is x and m == n for y, m in earlier)

    def before(self, which: int) -> Computed | None:
        """The operator for which it is saved, if it is no result."""
        n = self.at[which]
        return self.calls[n] if n < len(self.calls) else None

    def maker(self, x: Tensor, before: int) -> tuple[int, int] | None:
        """Of so many operator calls the latest that returned a tensor, and as which result."""
        for n in reversed(range(before)):
            for i, made in enumerate(tensors_in(self.calls[n].result)):
                if made is x:
                    return n, i
        return None


class _Log(TorchDispatchMode):
    """Notes each operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Computed] = []

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls.append(Computed(name, args, kwargs or {}, result))
        return result


def of_shape(
    dtype: DType, shape: tuple, strides: tuple, *, requires_grad: bool, device: str
) -> Tensor:
    """A tensor of a shape, with a history if it requires grad; its numbers do not matter."""
    size = extent(shape, strides)
    row = torch.zeros(size, dtype=TO_TORCH[dtype], device=device, requires_grad=requires_grad)
    if not requires_grad:
        return row.as_strided(shape, strides)
    if is_dense(shape, strides):
        return row.as_strided(shape, strides).clone()  # which is no view
    return row.clone().as_strided(shape, strides)


def saves_of(func: Callable, args: tuple, kwargs: dict) -> Saves:
    """Run a torch function. Raises what torch raises where it cannot."""
    if not any(x.device.type == "cpu" for x in tensors_in((args, kwargs))):
        args, kwargs = tree_map(_to_meta, (args, kwargs))
    kept: list[Tensor] = []
    at: list[int] = []
    asked: list[int] = []

    def pack(x: Tensor) -> int:
        kept.append(x)
        at.append(len(log.calls))
        return len(kept) - 1

    def unpack(i: int) -> Tensor:
        if i not in asked:
            asked.append(i)
        return kept[i]

    generator = torch.default_generator  # on the CPU a dropout draws, which is none of the step's
    state = generator.get_state()
    with torch._C.DisableTorchFunction(), torch.enable_grad(), _Log() as log:
        _push(pack, unpack)
        try:
            result = func(*args, **kwargs)
        finally:
            _pop()
            generator.set_state(state)
        calls = tuple(log.calls)
        roots = [x for x in tensors_in(result) if x.requires_grad]
        if kept and roots:
            torch.autograd.backward(roots, [torch.empty_like(x) for x in roots])
    return Saves(tuple(kept), tuple(at), tuple(asked), result, calls)


def _to_meta(x: object) -> object:
    return torch.device("meta") if isinstance(x, torch.device) else x


def tensors_in(x: object) -> Iterable[Tensor]:
    """The tensors in nested containers."""
    return (leaf for leaf in tree_flatten(x)[0] if isinstance(leaf, Tensor))
