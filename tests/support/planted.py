"""Faults by name, planted for the life of a process: those of `faults.py`, and crashes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest.mock import patch

from support.faults import FAULTS, STEPS
from tracejit.codegen.c_table import TEMPLATES
from tracejit.schedule import values

_kept = contextlib.ExitStack()


def _fails_to_lower() -> contextlib.AbstractContextManager:
    own = values.Compute

    def compute(out, op, *rest):
        if op.name == "tanh":
            raise KeyError("tanh")
        return own(out, op, *rest)

    return patch.object(values, "Compute", compute)


CRASHES: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "a kernel reads at address 8": lambda: patch.dict(
        TEMPLATES, {"tanh": "(*(volatile float *)(size_t)8 + {0})"}
    ),
    "a kernel does not end": lambda: patch.dict(
        TEMPLATES, {"tanh": "({{ volatile int on = 1; while (on); {0}; }})"}
    ),
    "a kernel is no C": lambda: patch.dict(TEMPLATES, {"tanh": "(tanh({0})"}),
    "a lowering fails": _fails_to_lower,
}


def plant(name: str) -> tuple[str, str]:
    """Plant a fault for good; the step that meets it, and its backend."""
    if name in CRASHES:
        _kept.enter_context(CRASHES[name]())
        return "activations", "numpy" if name == "a lowering fails" else "c"
    fault = next(f for f in FAULTS if f.name == name)
    _kept.enter_context(fault.plant())
    return fault.step, fault.backend


def planted_step(name: str) -> Callable:
    """A step without arguments that meets a fault, which is planted; "" for one that meets none."""
    import tracejit

    which, backend = plant(name) if name else ("activations", "numpy")
    step, args, *_ = STEPS[which]()
    return tracejit.compile(lambda: step(*args), backend=backend)
