"""The one table from torch functions to capture rules, filled by `capture/functions/`.

A rule is called as `rule(trace, *args, **kwargs)` with the arguments that the user gave, and
returns what the user gets. A family module registers its rules with `rule(torch.f, Tensor.f, …)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FrameType

import torch

Rule = Callable[..., object]


class Rules(dict[Callable, Rule]):
    """The rule of each torch function; ValueError at a second one, as one would hide the other."""

    def __setitem__(self, function: Callable, implementation: Rule) -> None:
        first = self.setdefault(function, implementation)
        if first is not implementation:
            places = " and ".join(
                f"{f.__module__}.{f.__qualname__}" for f in (first, implementation)
            )
            raise ValueError(f"{function_name(function)} has two rules: {places}")


RULES = Rules()

# functions whose call does not say all: from the caller's frame to further keyword arguments
BY_CALLER: dict[Callable, Callable[[FrameType], dict[str, object]]] = {}


def rule(*functions: Callable) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of these torch functions."""

    def register(implementation: Rule) -> Rule:
        for function in functions:
            RULES[function] = implementation
        return implementation

    return register


def spellings(name: str) -> Iterator[Callable]:
    """The torch functions of a name: torch.<name>, Tensor.<name>, special and functional ones."""
    seen: list[Callable] = []
    for namespace in (torch, torch.Tensor, torch._C._nn, torch.nn.functional, torch.special):
        function = getattr(namespace, name, None)
        if callable(function) and function not in seen:
            seen.append(function)
            yield function


def function_name(function: Callable) -> str:
    """A torch function's name as a user would write it."""
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", None) or repr(function)
    if name in ("__get__", "__set__", "__delete__"):
        return f"Tensor.{getattr(owner, '__name__', '?')}"
    objclass = getattr(function, "__objclass__", None)
    qualified = getattr(function, "__qualname__", name)
    if objclass is not None or qualified.startswith(("Tensor.", "TensorBase.")):
        return f"Tensor.{name}"
    module = getattr(function, "__module__", None) or "torch"
    return f"{module}.{name}".replace("torch._C._nn.", "torch.nn.functional.")
