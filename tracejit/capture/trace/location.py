"""Where in the user's code a call comes from."""

from __future__ import annotations

import os
import sys
import warnings
from types import CodeType

import torch

_OURS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_is_user: dict[CodeType, bool] = {}


def user_frame():
    """The innermost frame that belongs neither to tracejit nor to torch, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        known = _is_user.get(code)
        if known is None:
            name = code.co_filename
            known = not name.startswith((_OURS, _TORCH, "<frozen")) and name != "<string>"
            _is_user[code] = known
        if known:
            return frame
        frame = frame.f_back
    return None


def short() -> str:
    """The user's line as the IR prints it: `two_layer_net.py:12`."""
    frame = user_frame()
    if frame is None:
        return ""
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


def warn(text: str, category: type[Warning]) -> None:
    """Warn at the user's line."""
    frame = user_frame()
    if frame is None:
        warnings.warn(text, category, stacklevel=2)
        return
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__", "<unknown>")
    warnings.warn_explicit(
        text, category, frame.f_code.co_filename, frame.f_lineno, module, registry
    )


def full() -> str:
    """The user's line for an error: the whole path and the line number."""
    frame = user_frame()
    return "<unknown>" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
