"""The hooks of the whole process: of all modules, of all optimizers.

A step names none of them, and torch calls them in it all the same.
"""

from __future__ import annotations

import sys

from torch.nn import Module
from torch.optim import Optimizer

_MODULES, _OPTIMIZERS = sys.modules[Module.__module__], sys.modules[Optimizer.__module__]
CALLED = (  # dicts by the ids of hooks, which are never used again
    (_MODULES, "_global_backward_hooks"),
    (_MODULES, "_global_backward_pre_hooks"),
    (_MODULES, "_global_forward_hooks"),
    (_MODULES, "_global_forward_pre_hooks"),
    (_OPTIMIZERS, "_global_optimizer_post_hooks"),
    (_OPTIMIZERS, "_global_optimizer_pre_hooks"),
)
_OTHER = (  # what torch notes of some, and hooks of what is given to a module
    (_MODULES, "_global_forward_hooks_always_called"),
    (_MODULES, "_global_forward_hooks_with_kwargs"),
    (_MODULES, "_global_buffer_registration_hooks"),
    (_MODULES, "_global_module_registration_hooks"),
    (_MODULES, "_global_parameter_registration_hooks"),
)


def global_hooks() -> list[dict]:
    """The dicts in which torch holds them."""
    return [getattr(module, name) for module, name in (*CALLED, *_OTHER)]
