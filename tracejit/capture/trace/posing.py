"""Where the tensors of a trace are said to be.

A step is built for a GPU that is not here (`build.py`) with tensors that stand for those of the
GPU. Within `posing`, traces take them to be there: their graphs are those of tensors on the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

Place = Callable[[torch.Tensor], str]  # the name of a device: "cuda:0"

_place: ContextVar[Place | None] = ContextVar("place", default=None)


@contextlib.contextmanager
def posing(place: Place) -> Iterator[None]:
    """A context in which traces take each tensor from outside to be at a place."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def device_of(tensor: torch.Tensor) -> str:
    """Where a tensor from outside is, or poses to be."""
    place = _place.get()
    return str(tensor.device) if place is None else place(tensor)


def really(device: str) -> str:
    """Where memory is that stands for memory of a device: on the CPU, where tensors pose."""
    return device if _place.get() is None else "cpu"


def current_gpu() -> int:
    """The number of the current GPU; of the first one, where tensors pose to be there."""
    return torch.cuda.current_device() if _place.get() is None else 0
