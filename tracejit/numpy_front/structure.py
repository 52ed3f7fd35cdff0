"""Arrays of a call as tensors of the same memory, and tensors of its result as arrays again.

In: arguments and variables of the user's. Out: the same with tensors in place of arrays, in new
containers where there are such inside, and a *form* that says what cannot be seen of them: scalars
of numpy's, and arrays that are only for reading. A result is told as leaves and a Layout.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tracejit.numpy_front.core import TO_TORCH
from tracejit.records import dataclass

ARRAY, SCALAR, READ_ONLY = "array", "scalar", "read-only"
_FLOATS = (np.float16, np.float32, np.float64)
_DEEP = 20


class Given:
    """The arrays of one call: the tensors that stand for them, and the other way round."""

    def __init__(self, place: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        """place: copies a tensor to the device of the step, if that is not where arrays are."""
        self._place = place
        self._there: list[tuple[np.ndarray, torch.Tensor, int]] = []  # and versions
        self.tensors: dict[int, torch.Tensor] = {}  # by the identity of the array
        self.arrays: dict[int, tuple[object, str]] = {}  # by the identity of the tensor
        self.form: list[object] = []
        self._copies: dict[int, object] = {}  # by the identity of a list or dict of arrays
        self.problem: tuple[str, np.ndarray] | None = None  # what no tensor can stand for

    def convert(self, x: object, depth: int = 0) -> object:
        """The same with tensors in place of arrays."""
        kind = type(x)
        if kind is np.ndarray:
            return self._array(x)
        if kind in _FLOATS:
            return self._tensor(x, torch.tensor(x.item(), dtype=TO_TORCH[x.dtype]), SCALAR)
        if kind in (tuple, list, dict) and depth < _DEEP:
            if id(x) in self._copies:
                return self._copies[id(x)]
            items = [*x.values()] if kind is dict else x
            found = [self.convert(item, depth + 1) for item in items]
            if any(a is not b for a, b in zip(found, items, strict=True)):
                made = dict(zip(x, found, strict=True)) if kind is dict else kind(found)
                if kind is not tuple:
                    self._copies[id(x)] = made  # x is held by the call
                return made
        return x

    def _array(self, x: np.ndarray) -> object:
        known = self.tensors.get(id(x))
        if known is not None:
            return known
        if x.dtype not in TO_TORCH or not x.dtype.isnative:
            return self._no(f"an array of dtype {x.dtype}", x)
        size = x.itemsize
        for stride in x.strides:
            if stride < 0 or stride % size:
                what = "an array that lies backwards in memory, or between its elements"
                return self._no(what, x)
        if self._place is not None:
            if any(np.may_share_memory(x, other) for other, _, _ in self._there):
                return self._no("an array that may share memory with another, on a device", x)
            if 0 in x.strides:
                return self._no("an array whose elements share memory, on a device", x)
        if x.flags.writeable:
            return self._tensor(x, torch.from_numpy(x), ARRAY)
        return self._tensor(x, torch.from_numpy(_writeable(x)), READ_ONLY)

    def brought_back(self) -> None:
        """Copy what the step has written from its device to the arrays."""
        for x, tensor, version in self._there:
            if tensor._version != version:
                np.copyto(x, tensor.detach().cpu().numpy())

    def _no(self, what: str, x: np.ndarray) -> np.ndarray:
        self.problem = self.problem or (what, x)
        return x

    def _tensor(self, x: object, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        if self._place is not None:
            tensor = self._place(tensor)
            if kind is not SCALAR:
                self._there.append((x, tensor, tensor._version))
        if kind is not SCALAR:
            self.tensors[id(x)] = tensor
        if kind is not ARRAY:
            self.form.append((len(self.arrays), kind))
        self.arrays[id(tensor)] = x, kind
        return tensor


def _writeable(x: np.ndarray) -> np.ndarray:
    """The memory of an array that is only for reading, as one that torch takes without a word."""

    class Memory:
        __array_interface__ = {
            "version": 3,
            "typestr": x.dtype.str,
            "shape": x.shape,
            "strides": x.strides,
            "data": (x.ctypes.data, False),
        }
        held = x

    return np.asarray(Memory())


@dataclass(frozen=True)
class Layout:
    """The structure of a result: "array", "scalar", "other", or a container of such.

    keys: of a dict.
    """

    kind: str
    parts: tuple[Layout, ...] = ()
    keys: tuple = ()


def told(x: object, is_array: Callable, look: Callable, arrays: list, leaves: list) -> Layout:
    """The layout of a result; its arrays and leaves go into lists. `look` sees each container."""
    if is_array(x):
        arrays.append(x)
        leaves.append(x.t)
        return Layout(SCALAR if x.scalar else ARRAY)
    if type(x) in (tuple, list, dict) and has(x, is_array, 0):
        look(x)
        items = x.values() if type(x) is dict else x
        parts = tuple([told(item, is_array, look, arrays, leaves) for item in items])
        return Layout(type(x).__name__, parts, tuple(x) if type(x) is dict else ())
    leaves.append(x)
    return Layout("other")


def has(x: object, is_array: Callable, depth: int) -> bool:
    """Whether something is such an array, or a container with one in it."""
    if type(x) in (tuple, list, dict) and depth < _DEEP:
        return any(has(i, is_array, depth + 1) for i in (x.values() if type(x) is dict else x))
    return is_array(x)


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy() if tensor.is_cpu else tensor.cpu().numpy()


def rebuilt(layout: Layout, leaves: list, given: Given, made: dict[int, np.ndarray]) -> object:
    """The result of a call, from its leaves, last first."""
    kind = layout.kind
    if kind == "other":
        return leaves.pop()
    if kind == SCALAR:
        return _on_host(leaves.pop())[()]
    if kind == ARRAY:
        tensor = leaves.pop()
        if id(tensor) in given.arrays:
            return given.arrays[id(tensor)][0]
        found = made.get(id(tensor))
        if found is None:
            found = made[id(tensor)] = _on_host(tensor)
        return found
    parts = [rebuilt(part, leaves, given, made) for part in layout.parts]
    if kind == "dict":
        return dict(zip(layout.keys, parts, strict=True))
    return parts if kind == "list" else tuple(parts)
