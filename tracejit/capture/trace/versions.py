"""What torch saves of the arguments and results of each function, for its derivative.

In: a call of a torch function. Out: the tensors that nobody may write to before a backward goes
through it, each with the version that it has. Our formulas often read other values than torch's, so
what they read does not say it. `tests/test_saved_versions.py` asks eager.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache

import torch

from tracejit.capture.trace.saves import SAVES
from tracejit.capture.trace.state import TraceState
from tracejit.capture.trace.table import RULES, function_name
from tracejit.capture.trace.tensor import Handle, Ints, Origin, TracedTensor, tensors_of
from tracejit.records import dataclass

Tensor = torch.Tensor

RESULT = -1  # the place of all that is returned; that of the second result is -3
# entries of these are of views and casts of the operands, which save nothing
_MOVED = frozenset(
    {"alias", "cast", "data", "expand", "flip", "permute", "reshape", "slice", "stretch"}
)


@dataclass(frozen=True, slots=True)
class Saved:
    """What torch saves for a function: the places of its tensors, each with the argument that must
    require grad for it, or None where any may."""

    places: tuple[tuple[int, int | None], ...]
    function: Callable

    def argument(self, place: int, args: tuple, kwargs: dict) -> object:
        """An argument of a call."""
        if place < len(args):
            return args[place]
        params = parameters(self.function) if kwargs else ()
        return kwargs.get(params[place]) if place < len(params) else None


def saved_by(function: Callable, args: tuple, kwargs: dict) -> Saved | None:
    """What torch saves for a call of a function, if that is known."""
    form = form_of(args, kwargs) if function in _OF_FORMS else ""
    return _saved_by(function, is_inplace(function, args, kwargs), form)


@cache
def _saved_by(function: Callable, inplace: bool, form: str) -> Saved | None:
    """`inplace`: if the function was told to write to its first argument."""
    name, base = function_name(function) + form, name_in_place(function)
    if inplace:
        name, base = f"{name}_", name.rpartition(".")[2]
    written = next((_LISTED[n] for n in (name, name.rpartition(".")[2]) if n in _LISTED), None)
    if written is None and base in _LISTED:
        written = in_place(_LISTED[base])
    return None if written is None else Saved(tuple(map(_place, written.split())), function)


def form_of(args: tuple, kwargs: dict) -> str:
    """How the form of a call of `max` is written in the table: of two tensors, along an axis, or of
    all elements."""
    if any(isinstance(x, Tensor) for x in (*args[1:], kwargs.get("other"))):
        return "(other)"
    return "(dim)" if len(args) > 1 or "dim" in kwargs or "axis" in kwargs else ""


def is_inplace(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a call sets the flag `inplace` of a function that has one."""
    if kwargs.get("inplace"):
        return True
    place = _place_of_flag(function)
    return place is not None and place < len(args) and bool(args[place])


@cache
def _place_of_flag(function: Callable) -> int | None:
    names = parameters(function) if inspect.isfunction(function) else ()
    return names.index("inplace") if "inplace" in names else None


def name_in_place(function: Callable) -> str | None:
    """The name of the function whose result this one writes into its first argument."""
    name = function_name(function).rpartition(".")[2]
    if re.fullmatch(r"__i\w+__", name) and name != "__invert__":
        return f"__{name[3:]}"
    return name[:-1] if name.endswith("_") and not name.endswith("__") else None


def in_place(written: str) -> str:
    """What is saved in place: a copy of the operand, and the result in its memory."""
    return " ".join(word for word in written.split() if word.partition("<")[0] != "0")


@cache
def parameters(function: Callable) -> tuple[str, ...]:
    """The names of a function's arguments, those that may be given by position first."""
    if inspect.isfunction(function) and not hasattr(function, "__wrapped__"):
        return tuple(inspect.signature(function).parameters)
    return tuple(inspect.signature(RULES[function].run).parameters)[1:]


def _place(word: str) -> tuple[int, int | None]:
    """One word of `SAVES`: "1<0" is the second argument, if the first requires grad; "r" all that
    is returned, "r1" its second part."""
    what, _, when = word.partition("<")
    if what.startswith("r"):
        return RESULT if what == "r" else -2 - int(what[1:]), None
    return int(what), int(when) if when else None


# functions that save other tensors in each of their forms
_OF_FORMS = frozenset(
    getattr(of, name) for of in (torch, Tensor) for name in ("max", "min", "median", "nanmedian")
)
_LISTED = {name: written for written, names in SAVES.items() for name in names.split()}


class Call:
    """A call that is differentiated, before its rule runs."""

    __slots__ = ("t", "saved", "args", "kwargs", "first", "given")

    def __init__(self, t: TraceState, saved: Saved, args: tuple, kwargs: dict):
        self.t, self.saved, self.args, self.kwargs = t, saved, args, kwargs
        self.first = len(t.tape.entries)
        # arguments that are saved, as they are before the function writes to one
        self.given = [
            (x, self._noted(x))
            for place, when in saved.places
            if place >= 0 and (when is None or self._any_requires_grad(when))
            for x in tensors_of(self._argument(place))
        ]

    def over(self, result: object) -> None:
        """The rule has run: its entries may be gone through as long as nothing is written to what
        torch has saved."""
        entries = self.t.tape.entries[self.first :]
        if not entries:
            return
        # what the trace had not met was not written to before
        found = [then or self._noted(x) for x, then in self.given]
        for place, _ in self.saved.places:
            if place < 0:
                found += map(self._noted, tensors_of(_returned(result, place)))
        noted = tuple(then for then in found if then is not None)
        # all that is left of the maximum of a number along its axis is a reshape
        for entry in [e for e in entries if e.name not in _MOVED] or entries:
            entry.noted = noted

    def _argument(self, place: int) -> object:
        return self.saved.argument(place, self.args, self.kwargs)

    def _handle(self, x: Tensor) -> Handle | None:
        return x.handle if type(x) is TracedTensor else self.t.inputs.by_id.get(id(x))

    def _noted(self, x: Tensor) -> tuple[Ints, Origin] | None:
        """A tensor as it is now; None of one that the trace has not met."""
        h = self._handle(x)
        return None if h is None else (h.shape, Origin.of(h))

    def _any_requires_grad(self, place: int) -> bool:
        for x in tensors_of(self._argument(place)):
            h = self._handle(x)
            with torch._C.DisableTorchFunction():
                if x.requires_grad if h is None else self.t.requires_grad(h):
                    return True
        return False


def _returned(result: object, place: int) -> object:
    parts = result if isinstance(result, tuple | list) else (result,)
    return result if place == RESULT else parts[-2 - place] if -2 - place < len(parts) else None
