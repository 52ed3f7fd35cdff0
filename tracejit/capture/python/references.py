"""Reference counts of CPython, calibrated when this module is imported.

How many references a value has that nobody else holds depends on where it is counted. Each number
here is measured on an object in just that position, not written down.
"""

from __future__ import annotations

import sys

import torch

count = sys.getrefcount


def _parameter(x: object) -> int:
    return count(x)


def _item() -> int:
    held = [object()]
    return count(held[0])


def _looped() -> int:
    held = [object()]
    return [count(x) for x in held][0]


def _in_variable() -> int:
    x = object()
    return _parameter(x)


def _in_loop() -> int:
    held = [object()]
    return [_parameter(x) for x in held][0]


def _in_item() -> int:
    held = {0: object()}
    return [_parameter(held[k]) for k in held][0]


def _passed(x: object) -> int:
    return _parameter(x)


def _in_store() -> int:
    held = [(object(),)]
    return [_passed(*items) for items in held][0]


ALONE = _item()  # `count(a_list[i])` of what nobody but the list holds
LOOPED = _looped()  # `count(x)` in a comprehension over the list
# `count(x)` of a function's parameter that nobody holds but
IN_VARIABLE = _in_variable()  # a variable of the caller
IN_LOOP = _in_loop()  # a container that the caller loops over, and the loop's variable
IN_STORE = _in_store()  # a tuple that the caller loops over, and a parameter of the caller
IN_ITEM = _in_item()  # a container of the caller, which passes an item of it


def _gradient() -> tuple[int, int]:
    owner = torch.zeros(1, requires_grad=True)
    owner.grad = torch.zeros(1)
    grad = owner.grad
    return count(grad), grad._use_count()


# `(count(grad), grad._use_count())` of a local that is a `.grad` which only its owner holds
GRADIENT = _gradient()
