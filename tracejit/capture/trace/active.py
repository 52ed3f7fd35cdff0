"""The trace that is going on on this thread, if any."""

from __future__ import annotations

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack


class TraceMode(TorchFunctionMode):
    """A mode whose torch calls belong to a trace."""

    trace: object


def current() -> object | None:
    """The trace whose mode is innermost on this thread, or None. (Inside a rule there is none:
    torch takes the mode off while it handles a call.)"""
    modes = _get_current_function_mode_stack()
    return next((m.trace for m in reversed(modes) if isinstance(m, TraceMode)), None)
