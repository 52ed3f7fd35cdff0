"""Kinds of calls: those that agree in what decides whether a step can be compiled.

Their arguments agree in types, shapes and dtypes, and grad mode, autocast and the training flags of
the step's networks are the same. A call that runs eagerly waits for the answer, and what ran before
has emptied the processor's caches. So the test for one kind is written as one short function:

    (x, y) of (8, 20) and (8, 5) → grad_enabled() is True and len(args) == 2 and type(a0) is …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

_grad_enabled, _Tensor = torch.is_grad_enabled, torch.Tensor
_autocast = torch._C._is_any_autocast_enabled
_TEXT = """\
def takes(args, kwargs):
    if {tests}:
        counter.left -= 1
        return True
    return False
"""


def kind_of(args: tuple, kwargs: dict, networks: Sequence[dict]) -> tuple:
    """What tells kinds of calls apart. `networks` are the attributes of modules."""
    parts = [_grad_enabled(), _autocast(), *map(_part, args)]
    parts += [network["training"] for network in networks]
    for name, x in kwargs.items():
        parts += (name, _part(x))
    return tuple(parts)


def _part(x: object) -> object:
    """What of an argument tells kinds of calls apart."""
    if isinstance(x, _Tensor):
        return x.shape, x.dtype
    return x if x is None or x is True or x is False else type(x)


class Counter(Protocol):
    """What counts calls down."""

    left: int


def counted(
    counter: Counter, args: tuple, kwargs: dict, networks: Sequence[dict]
) -> Callable[[tuple, dict], bool]:
    """A function of (args, kwargs) that tells calls of this call's kind while there are any left,
    and counts them. It knows those whose tensors are of the same classes as this call's."""
    given: dict[str, object] = {"counter": counter}
    given |= {"grad_enabled": _grad_enabled, "autocast": _autocast}
    tests = [f"counter.left > 0 and grad_enabled() is {_grad_enabled()}"]
    tests += [f"autocast() is {_autocast()}", f"len(args) == {len(args)}"]
    for i, x in enumerate(args):
        tests += _tests(f"args[{i}]", x, given)
    tests.append(f"list(kwargs) == {list(kwargs)!r}" if kwargs else "not kwargs")
    for name, x in kwargs.items():
        tests += _tests(f"kwargs[{name!r}]", x, given)
    for i, network in enumerate(networks):
        given |= {f"network{i}": network, f"training{i}": network["training"]}
        tests.append(f"network{i}['training'] is training{i}")
    exec(_TEXT.format(tests=" and ".join(tests)), given)
    return given["takes"]


def _tests(at: str, x: object, given: dict[str, object]) -> list[str]:
    """The tests of one argument, in text; what they compare with is added to `given`."""
    if x is None or x is True or x is False:
        return [f"{at} is {x}"]
    i = len(given)
    given[f"type{i}"] = type(x)
    tests = [f"type({at}) is type{i}"]
    if isinstance(x, _Tensor):
        given |= {f"shape{i}": x.shape, f"dtype{i}": x.dtype}
        tests += [f"{at}.shape == shape{i}", f"{at}.dtype is dtype{i}"]
    return tests
