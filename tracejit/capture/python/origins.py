"""Whose code runs: the user's, torch's, the library's or ours."""

from __future__ import annotations

import os
from types import CodeType

import numpy as np
import torch

from tracejit.capture.trace.location import ByCode

_HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_NUMPY = os.path.dirname(os.path.abspath(np.__file__)) + os.sep
_STDLIB = os.path.dirname(os.__file__) + os.sep


def origin(code: CodeType) -> str:
    """Whose code this is: "tracejit", "torch", "stdlib" (and its like) or "user"."""
    found = _KNOWN.get(id(code))
    if found is not None:
        return found[1]
    if (known := ORIGINS.get(code)) is None:
        name = code.co_filename
        if name.startswith((_HERE, "<tracejit ")):  # or generated
            known = "tracejit"
        elif name.startswith(_TORCH):
            known = "torch"
        elif (
            name.startswith("<frozen")
            or name.startswith(_NUMPY)
            or name.endswith(os.sep + "typing_extensions.py")
            or (name.startswith(_STDLIB) and "site-packages" not in name[len(_STDLIB) :])
        ):
            known = "stdlib"
        else:
            known = "user"
        ORIGINS[code] = known
    _KNOWN.keep(code, known)
    return known


def belongs(code: CodeType, whose: str) -> None:
    """Say whose code this is, which its file does not tell."""
    ORIGINS[code] = whose
    _KNOWN.keep(code, whose)


ORIGINS: dict[CodeType, str] = {}
_KNOWN = ByCode()
