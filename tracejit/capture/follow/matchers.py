"""From a recorded torch call to a function that tells whether a call is the same, and answers it.

A followed trace spends its time here, once per torch call. So each recorded call gets a Python
function of its own: straight lines, compiled once for all calls of one form.

    match(trail, args, kwargs) -> what the call returns, or UNKNOWN with nothing changed
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from tracejit.capture.follow.events import (
    UNKNOWN,
    Call,
    Known,
    Match,
    New,
    Number,
    Outside,
    Same,
    same,
)
from tracejit.capture.follow.trail import Trail
from tracejit.capture.trace import autocast
from tracejit.capture.trace.tensor import TracedTensor

_NAMES = {
    "UNKNOWN": UNKNOWN,
    "autocast": torch._C._is_any_autocast_enabled,
    "autocast_state": autocast.state,
    "blank": TracedTensor.blank,
    "default_dtype": torch.get_default_dtype,
    "grad_on": torch.is_grad_enabled,
    "same": same,
}

# what these return depends on no mode of torch
_WHATEVER_MODE = [
    torch.Tensor.grad.__get__,
    torch.Tensor.grad.__set__,
    *(getattr(torch.Tensor, name).__get__ for name in ("device", "dtype", "shape", "is_sparse")),
]


def matcher(call: Call) -> Match:
    """The function for a call, which it keeps."""
    call.match = _Lines(call).function()
    return call.match


class _Lines:
    """The lines of one function. What differs among calls of one form is a parameter: p0, p1, …"""

    def __init__(self, call: Call):
        self.call = call
        self.values: list[object] = []
        self.lines: list[str] = []
        self.met = False  # whether the lines so far may have taken note of a tensor

    def function(self) -> Match:
        call = self.call
        count = len(call.args) - len(call.names)
        given = f"len(args) != {count}"
        if call.names:
            given += f" or not kwargs or len(kwargs) != {len(call.names)}"
        else:
            given += " or kwargs"
        if call.func not in _WHATEVER_MODE:
            given += f" or grad_on() is not {call.grad_on}"
            if call.casts is None:
                given += " or autocast()"
            else:
                given += (
                    f" or (autocast_state(), trail.t.casts.region) != {self._value(call.casts)}"
                )
            given += f" or default_dtype() is not {self._value(call.dtype)}"
        self._unless(given)
        self.lines.append("objects = trail.objects")
        for i, recorded in enumerate(call.args):
            x = f"args[{i}]"
            if i >= count:
                x = f"kwargs.get({self._value(call.names[i - count])}, UNKNOWN)"
            if not isinstance(recorded, Known):  # which is looked at once
                self.lines.append(f"x = {x}")
                x = "x"
            self._compare(recorded, x)
        for kind, *what in call.found:
            if kind == "grad":
                owner, recorded = what
                self.lines.append(f"x = objects[{self._value(owner)}].grad")
                self._compare(Same(None) if recorded is None else recorded, "x")
            else:
                if not self.met:
                    self._begin(None)
                self._unless(f"not trail.finds({self._value((kind, *what))})")
        answer = self._answer(call.result)
        self.lines.append(f"return {answer}")
        return _maker("\n".join(f"        {x}" for x in self.lines), len(self.values))(*self.values)

    def _value(self, x: object) -> str:
        self.values.append(x)
        return f"p{len(self.values) - 1}"

    def _begin(self, first: int | None) -> None:
        """From here on a failure has something to take back: objects from the first one noted on,
        and numbers that were read."""
        self.met = True
        at = "len(objects)" if first is None else self._value(first)
        self.lines.append(f"first, scalars = {at}, len(trail.scalars)")

    def _unless(self, condition: str) -> None:
        back = "trail.back(first, scalars)" if self.met else "UNKNOWN"
        self.lines.append(f"if {condition}: return {back}")

    def _compare(self, recorded: object, x: str) -> None:
        kind = type(recorded)
        if kind is Known:
            self._unless(f"{x} is not objects[{self._value(recorded.at)}]")
        elif kind is Same and (recorded.x is None or type(recorded.x) is bool):
            self._unless(f"{x} is not {recorded.x}")
        elif kind is Same:
            c = self._value(recorded.x)
            self._unless(f"{x} is not {c} and not same({c}, {x})")
        elif kind is Outside:
            if not self.met:
                self._begin(recorded.at)
            self._unless(f"not trail.meet({x}, {self._value(recorded.meta)})")
        else:
            if not self.met:
                self._begin(None)
            self._unless(f"not trail.matches({self._value(recorded)}, {x})")

    def _answer(self, recorded: object) -> str:
        kind = type(recorded)
        if kind is Known:
            return f"objects[{self._value(recorded.at)}]"
        if kind is Same:
            plain = recorded.x is None or type(recorded.x) is bool
            return repr(recorded.x) if plain else self._value(recorded.x)
        if kind is Number:
            v = self._value(recorded.value)
            return f"trail.t.scalars.traced(trail.t.scalars.numbers[{v}], {v})"
        if kind is New and recorded.rows is None:
            new, at = self._value(recorded), self._value(recorded.at)
            self.lines += [
                f"proxy = {new}.spare",
                "if proxy is None:",
                f"    proxy = blank({new}.geometry)",
                "else:",
                f"    {new}.spare = None",
                "objects.append(proxy)",
                f"trail.ids[id(proxy)] = {at}",
            ]
            return "proxy"
        return f"trail.give({self._value(recorded)})"


@functools.lru_cache(1024)
def _maker(body: str, count: int) -> Callable[..., Match]:
    """A function that makes the functions of one form. What differs is a default: near at hand."""
    values = "".join(f", p{i}" for i in range(count))
    given = "".join(f", p{i}=p{i}" for i in range(count))
    head = f"def make({values[2:]}):\n    def match(trail, args, kwargs{given}):\n"
    made: dict[str, Callable] = {}
    exec(compile(f"{head}{body}\n    return match\n", "<tracejit matcher>", "exec"), _NAMES, made)
    return made["make"]


def follow(trail: Trail, func: Callable, args: tuple, kwargs: dict | None) -> object:
    """The answer to a torch call as an earlier trace got it here; UNKNOWN if none did."""
    for event in trail.point.events:
        # `Tensor.grad.__get__` is another object each time
        if event.__class__ is Call and (event.func is func or event.func == func):
            answer = (event.match or matcher(event))(trail, args, kwargs)
            if answer is not UNKNOWN:
                trail.events.append(event)
                trail.point = event.then
                return answer
    return UNKNOWN
