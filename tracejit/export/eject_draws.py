"""The draws of an ejected step, as lines that call torch's own functions."""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.capture.trace.draws import Draw, Event, Keep, Restore, Seed
from tracejit.export.eject_text import quoted
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import contiguous_strides


def draw_line(k: int, event: Event, numbers: Sequence[str]) -> str:
    """The line of the k-th event; `numbers` are expressions of its numbers."""
    match event:
        case Seed():
            return f"torch.manual_seed({numbers[0]})"
        case Keep():
            return f"draw{k} = torch.get_rng_state()"
        case Restore(kept):
            return f"torch.set_rng_state(draw{kept})"
        case Draw():
            return f"draw{k} = {_drawn(event, numbers)}"
    raise AssertionError(event)


def _drawn(event: Draw, numbers: Sequence[str]) -> str:
    shape, strides = tuple(event.type.shape), tuple(event.strides)
    kind = f"dtype={TO_TORCH[event.type.dtype]}"
    if event.type.device != "cpu":
        kind += f", device={quoted(event.type.device)}"
    if event.fill == "randperm":
        return f"torch.randperm({numbers[0]}, {kind})"
    if event.names == ("from", "to"):  # one of which is a word of Python's
        given = ", ".join(numbers)
    else:
        given = ", ".join(f"{name}={x}" for name, x in zip(event.names, numbers, strict=True))
    if strides == contiguous_strides(shape):
        return f"torch.empty({shape}, {kind}).{event.fill}({given})"
    return f"torch.empty_strided({shape}, {strides}, {kind}).{event.fill}({given})"
