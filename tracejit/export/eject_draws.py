"""The draws of an ejected step, as lines that call torch's own functions."""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.capture.trace.draws import Draw, Event, Keep, Restore, Seed, Together
from tracejit.export.eject_text import quoted
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import contiguous_strides


def memory_line(k: int, event: Together) -> str:
    """The line that takes memory for the rows of the k-th event, which draws fill."""
    return f"draw{k} = {_empty(event)}"


def draw_line(k: int, event: Event, numbers: Sequence[str], into: str = "") -> str:
    """The line of the k-th event; `numbers` are expressions of its numbers, `into` one of the
    memory that it fills, where that is there already."""
    match event:
        case Seed():
            return f"torch.manual_seed({numbers[0]})"
        case Keep():
            return f"draw{k} = torch.get_rng_state()"
        case Restore(kept):
            return f"torch.set_rng_state(draw{kept})"
        case Draw():
            return f"draw{k} = {_drawn(event, numbers, into)}"
    raise AssertionError(event)


def _kind(event: Draw | Together) -> str:
    kind = f"dtype={TO_TORCH[event.type.dtype]}"
    if event.type.device != "cpu":
        kind += f", device={quoted(event.type.device)}"
    return kind


def _empty(event: Draw | Together) -> str:
    shape, strides = tuple(event.type.shape), tuple(event.strides)
    if strides == contiguous_strides(shape):
        return f"torch.empty({shape}, {_kind(event)})"
    return f"torch.empty_strided({shape}, {strides}, {_kind(event)})"


def _drawn(event: Draw, numbers: Sequence[str], into: str) -> str:
    if event.fill == "randperm":
        return f"torch.randperm({numbers[0]}, {_kind(event)})"
    if event.names == ("from", "to"):  # one of which is a word of Python's
        given = ", ".join(numbers)
    else:
        given = ", ".join(f"{name}={x}" for name, x in zip(event.names, numbers, strict=True))
    return f"{into or _empty(event)}.{event.fill}({given})"
