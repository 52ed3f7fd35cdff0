"""Who hears of a trace's events, and may answer them from earlier traces.

A trace tells its journal everything that reaches it from outside: runtime scalars, arithmetic and
decisions on them, `.grad`s that were there before. This one forgets it all; `follow.trail.Trail`
compares it with earlier traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from tracejit.ir.graph import Arg, Node, Value


class Journal:
    """Hears of events and answers none."""

    given: Mapping[int, torch.Tensor] = {}  # proxies that user code has already, by their number

    def scalar(self, path: tuple, number: float) -> Value | None:
        """The value of a runtime scalar as an earlier trace numbered it; None if rules run."""

    def arithmetic(self, op: str, args: Sequence[Arg]) -> Value | None:
        """The value of arithmetic on runtime scalars as an earlier trace numbered it, or None."""

    def decision(self, predicate: object) -> bool:
        """Whether an earlier trace took this decision here."""
        return False

    def many_texts(self, place: tuple, number: float) -> bool:
        """Whether the text that Python makes of a number, at a place of its code, is one of many
        that traces have made there: no plan is good for it."""
        return False

    def keeps_text(self, place: tuple) -> bool:
        """Whether the text that Python makes at a place may be followed to where it is kept."""
        return False

    def lost_text(self, place: tuple) -> None:
        """The text that was made at a place was not found where it was to be kept."""

    def known_number(self) -> float | None:
        """The number that Python has read here already, where rules run late."""

    def found_values(self, cut: object, convert: Callable, values: object) -> object:
        """Python reads the values of a tensor, as `convert` makes them; returns them."""
        return values

    def found_tensors(self, cut: object) -> None:
        """The step asks for tensors that are to be found in a value."""

    def found_draw(self, event: object, generator: torch.Generator) -> None:
        """The step has done something with a random generator."""

    def found_plain(self, value: Value, number: float) -> float:
        """Python gets a number that it has read as a plain float; returns that."""
        return number

    def found_scalar(self, path: tuple, kind: type, value: Value) -> None:
        """A runtime scalar has come in."""

    def found_arithmetic(self, node: Node) -> None:
        """Arithmetic on runtime scalars was emitted."""

    def found_decision(self, predicate: object) -> None:
        """A decision was taken on a runtime scalar."""

    def found_grad(self, owner: torch.Tensor, grad: torch.Tensor | None) -> None:
        """A rule has read the `.grad` that an outside tensor had before the step."""

    def forget(self) -> None:
        """The trace does something that cannot be compared with another one."""

    def over(self) -> None:
        """The user's code has returned."""

    def holds(self) -> Iterable[int]:
        """The ids of the tensors that the journal itself holds."""
        return ()

    def proxies(self) -> list[torch.Tensor]:
        """The proxies that user code holds although no rule has made them."""
        return []

    def release(self) -> None:
        """Let go of all tensors."""
