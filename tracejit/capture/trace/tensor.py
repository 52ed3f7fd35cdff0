"""Tensors of a trace: storages, handles on them, and the proxies that user code holds.

A `Storage` is a region of memory with a current IR value. A `Handle` stands for one torch tensor
object: a chain of movement primitives from its storage's value, with torch's geometry beside it.
Handles that differentiate together share a `Family`; `.data` and `.detach()` start a new one on the
same storage. A real tensor is its own proxy; intermediates are `TracedTensor`s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from functools import lru_cache
from typing import NamedTuple

import torch

from tracejit.capture.trace import location
from tracejit.capture.trace.active import current
from tracejit.capture.trace.posing import device_of
from tracejit.capture.trace.scalars import plain
from tracejit.errors import LeakedTracer
from tracejit.ir import types
from tracejit.ir.graph import Value
from tracejit.ir.torch_types import COMPLEX_TO_IR as COMPLEX_TO_IR
from tracejit.ir.torch_types import TO_IR as TO_IR
from tracejit.ir.torch_types import TO_TORCH as TO_TORCH
from tracejit.ir.types import DType
from tracejit.records import dataclass

Step = tuple[str, tuple[tuple[str, object], ...]]  # of a view chain, with its attributes: views.py
Ints = tuple[int, ...]
Geometry = tuple[Ints, Ints, int, DType, str]  # shape, strides, offset, dtype, device


@dataclass(eq=False, slots=True)
class Version:
    """torch's version counter: shared by a tensor, its views and its detached aliases."""

    count: int = 0


@dataclass(eq=False, slots=True)
class Storage:
    """A region of memory. `value` is what it holds now; `shape`, `strides` lay it out.

    `real` is the tensor outside the trace whose memory this is, `param` the graph input for it.
    """

    value: Value
    strides: Ints
    real: torch.Tensor | None = None
    param: Value | None = None
    writes: int = 0


@dataclass(eq=False, slots=True)
class Family:
    """Handles that share autograd history: the tracked value of a storage as they see it."""

    storage: Storage
    value: Value
    seen: int = 0  # the storage's write count that `value` belongs to
    leaf: Handle | None = None  # the leaf that requires grad, when this family's base is one
    quiet: bool = False  # views made under no_grad: they require grad, and no gradient leaves them
    written: str = ""  # the line of the first write that is differentiated


@dataclass(eq=False, slots=True)
class Ragged:
    """Rows of a packed sequence, of which it depends on values how many there are.

    padded: the same rows as [steps, sequences, …]; what lies past a sequence's end is unknown.
    sizes:  how many sequences each step has, i64[steps].
    count:  makes them the value of the handle; from then on their number is part of the step.
    like:   a tensor that has as many rows; None if the call that made these found out how many.
    """

    padded: Value
    sizes: Value
    count: Callable[[Handle], None]
    like: Handle | None = None


@dataclass(eq=False, slots=True)
class Handle:
    """One torch tensor of a trace."""

    family: Family
    steps: tuple[Step, ...]
    shape: Ints
    strides: Ints
    offset: int  # a runtime scalar where it depends on one
    dtype: DType
    device: str
    version: Version
    tensor: torch.Tensor | None = None  # the object user code holds: real, or a TracedTensor
    requires_grad_leaf: bool = False
    grad: torch.Tensor | None = None
    grad_at_start: torch.Tensor | None = None  # a real tensor's .grad before the step
    grad_read: bool = False  # whether the step depends on the .grad that was there before
    grad_known: bool = True  # False until a real tensor's .grad has been read or assigned
    fixed: int | None = None  # the version at which its history was fixed: one of several views
    memo: tuple | None = field(default=None, repr=False)  # (base value, grad mode, value)
    # the view that it is a view of, and the base value then: until a write it is computed of that
    of: tuple[Handle, Value] | None = field(default=None, repr=False)
    ragged: Ragged | None = None  # until somebody asks for more than what its rows are

    @property
    def storage(self) -> Storage:
        return self.family.storage

    @property
    def is_real(self) -> bool:
        return self.tensor is not None and not isinstance(self.tensor, TracedTensor)

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def geometry(self) -> Geometry:
        return self.shape, self.strides, plain(self.offset), self.dtype, self.device

    @property
    def is_complex(self) -> bool:
        """Whether its value is pairs, with one more axis than `shape` says."""
        return self.dtype.kind == "c"

    @property
    def is_contiguous(self) -> bool:
        return is_contiguous(self.shape, self.strides)


class Origin(NamedTuple):
    """A tensor as it was when its value was read: the writes to it, and to its memory, so far."""

    version: Version
    count: int
    storage: Storage
    writes: int

    @staticmethod
    def of(h: Handle) -> Origin:
        return Origin(h.version, h.version.count, h.storage, h.storage.writes)


class TracedTensor(torch.Tensor):
    """An intermediate of a trace. It has shape, dtype and device, and no data.

    All torch functions on it are intercepted while its trace runs; any that slips through, or that
    comes after the trace, ends in `__torch_dispatch__`, which always raises.
    """

    handle: Handle
    owner: object = None  # the trace that it belongs to, from when rules are run

    @property
    def __class__(self) -> type:
        """What eager would have here; for `type(x)` see `python/standins.py`."""
        return torch.Tensor

    @__class__.setter
    def __class__(self, kind: type) -> None:
        object.__dict__["__class__"].__set__(self, kind)

    @staticmethod
    def blank(geometry: Geometry) -> TracedTensor:
        """A tensor of this geometry that has no handle yet."""
        shape, strides, offset, dtype, device = geometry
        return torch.Tensor._make_wrapper_subclass(
            TracedTensor,
            shape,
            strides=strides,
            storage_offset=offset,
            dtype=TO_TORCH[dtype],
            device=device,
        )

    @staticmethod
    def make(handle: Handle, trace: object, made: TracedTensor | None = None) -> TracedTensor:
        """The tensor of a handle; `made` if user code has it already."""
        if made is None:
            made = TracedTensor.blank(handle.geometry)
        made.handle = handle
        made.owner = trace
        handle.tensor = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        error = LeakedTracer(
            where=location.full(),
            function=str(func),
            reason="which has no data",
            remedy="Use it only inside the step, through torch functions, or return it",
        )
        for x in args:
            trace = (x.owner or current()) if type(x) is cls else None
            if trace is not None:
                trace.refuse(error)
        raise error


def is_contiguous(shape: Ints, strides: Ints) -> bool:
    """Row-major, axes of extent 1 aside; empty tensors are contiguous."""
    if 0 in shape:
        return True
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True


def is_dense(shape: Ints, strides: Ints) -> bool:
    """Non-overlapping and dense: a permutation of a row-major layout."""
    step = 1
    for stride, size in sorted((st, sz) for st, sz in zip(strides, shape, strict=True) if sz != 1):
        if size == 0:
            return True
        if stride != step:
            return False
        step *= size
    return True


def by_memory(shape: Ints, strides: Ints) -> Ints:
    """The axes of a dense tensor from the longest stride to the shortest: the order of memory."""
    return tuple(sorted(range(len(shape)), key=lambda k: (shape[k] != 1, strides[k]), reverse=True))


def elementwise_strides(shape: Ints, operands: list[tuple[Ints, Ints]]) -> Ints:
    """Strides that torch gives the result of an element-wise op on (shape, strides) operands.

    Source: TensorIterator's rule; axes are ordered by the operands' strides, ties by position.
    """
    return _elementwise_strides(shape, tuple(operands))


@lru_cache(10_000)
def _elementwise_strides(shape: Ints, operands: tuple[tuple[Ints, Ints], ...]) -> Ints:
    if all(s == shape and is_contiguous(s, st) for s, st in operands):
        return types.contiguous_strides(shape)
    if all(s == shape and _has_channels_innermost(s, st) for s, st in operands):
        return _strides_by(shape, (1, 3, 2, 0))
    if set(operands) == {(shape, operands[0][1])} and is_dense(*operands[0]):
        return operands[0][1]
    rank = len(shape)
    aligned = []
    for s, st in operands:
        pad = rank - len(s)
        own = zip(shape[pad:], s, st, strict=True)
        aligned.append((0,) * pad + tuple(0 if n != m else x for m, n, x in own))

    def order(i: int, j: int) -> int:
        for row in aligned:
            if row[i] == 0 or row[j] == 0:
                continue
            if row[i] != row[j]:
                return -1 if row[i] < row[j] else 1
            if shape[i] > shape[j]:
                return 1
        return 0

    axes = list(reversed(range(rank)))
    for i in range(1, rank):
        at = i
        for j in reversed(range(i)):
            verdict = order(axes[j], axes[at])
            if verdict > 0:
                axes[j], axes[at] = axes[at], axes[j]
                at = j
            elif verdict < 0:
                break
    in_order = axes == list(reversed(range(rank)))
    return types.contiguous_strides(shape) if in_order else _strides_by(shape, axes)


def _has_channels_innermost(shape: Ints, strides: Ints) -> bool:
    """Whether an image is contiguous with its channels innermost."""
    if len(shape) != 4:
        return False
    rows = [(shape[axis], strides[axis]) for axis in (0, 2, 3, 1)]
    return is_contiguous(*zip(*rows, strict=True))


def _strides_by(shape: Ints, axes: Sequence[int]) -> Ints:
    """The strides of dense memory, with its axes from the innermost to the outermost. Those of the
    axes around an empty one are 0, as in torch."""
    strides = [0] * len(shape)
    step = 1
    for axis in axes:
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def tensors_of(x: object) -> list[torch.Tensor]:
    """The tensors in nested tuples and lists, in order."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, (tuple, list)):
        return [t for item in x for t in tensors_of(item)]
    return []


_NEVER = frozenset({int, float, bool, str, type(None), slice, torch.dtype, torch.Size})


def has_complex(xs: Iterable[object]) -> bool:
    """Whether there are complex tensors or numbers among arguments; asked at each call."""
    for x in xs:
        kind = type(x)
        if kind is TracedTensor:
            if x.owner is not None and x.handle.dtype.kind == "c":
                return True
        elif kind is tuple or kind is list:
            if has_complex(x):
                return True
        elif kind not in _NEVER and (
            kind is complex or (isinstance(x, torch.Tensor) and x.is_complex())
        ):
            return True
    return False


def extent(handle_shape: Ints, strides: Ints) -> int:
    """Elements spanned from the first to the last, 0 when empty."""
    if 0 in handle_shape:
        return 0
    return 1 + sum((n - 1) * abs(st) for n, st in zip(handle_shape, strides, strict=True))


def broadcast_shape(shapes: list[Ints]) -> Ints | None:
    """torch's broadcast of several shapes, or None if they do not broadcast."""
    if shapes and shapes.count(shapes[0]) == len(shapes):
        return tuple(shapes[0])
    out: list[int] = []
    for sizes in itertools.zip_longest(*(reversed(s) for s in shapes), fillvalue=1):
        wide = {n for n in sizes if n != 1}
        if len(wide) > 1:
            return None
        out.append(wide.pop() if wide else 1)
    return tuple(reversed(out))


# why a tensor from outside cannot take part in a trace
PROBLEMS = {
    "transform": "tensors of functionalize and of forward-mode differentiation have no rules",
    "subclass": "a tensor subclass ({kind}) is not supported",
    "DTensor": "a DTensor has no rule: leave a step on parameters sharded by fully_shard eager, or "
    "use DistributedDataParallel, with ZeroRedundancyOptimizer to shard the optimizer's state",
    "layout": "only dense strided tensors are supported",
    "dtype": "{dtype} is not supported",
    "complex": "a complex tensor that requires a gradient is not supported: let its real and "
    "imaginary parts require one, and make it of them by torch.view_as_complex in the step",
    "device": "device {device} is not supported",
    "flags": "conjugate, negative-bit and named tensors are not supported",
    "inference": "inference tensors are not supported",
    "hooks": "a tensor with hooks that was computed outside the step is not supported; remove them",
}

_DEVICES = ("cpu", "cuda")


def problem_with(tensor: torch.Tensor) -> str | None:
    """Why a tensor from outside cannot take part in a trace, if it cannot."""
    problem = _problem_with(tensor)
    if problem is None:
        return None
    kind = type(tensor).__name__
    return PROBLEMS[problem].format(kind=kind, dtype=tensor.dtype, device=tensor.device)


def _problem_with(tensor: torch.Tensor) -> str | None:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "transform"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return "DTensor" if type(tensor).__name__ == "DTensor" else "subclass"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return "layout"
    if tensor.dtype not in TO_IR and tensor.dtype not in COMPLEX_TO_IR:
        return "dtype"
    if tensor.is_complex() and tensor.requires_grad:
        return "complex"
    if tensor.device.type not in _DEVICES and device_of(tensor).partition(":")[0] not in _DEVICES:
        return "device"
    if tensor.is_conj() or tensor.is_neg() or any(getattr(tensor, "names", ())):
        return "flags"
    if tensor.is_inference():
        return "inference"
    if tensor._backward_hooks and not tensor.is_leaf:
        return "hooks"
    return None
