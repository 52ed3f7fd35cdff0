"""torch's default generator as the functions of `torch.random` see it while a step is traced.

`torch.manual_seed`, `fork_rng`, `get_rng_state` and `set_rng_state` reach it by one name. A trace
takes down what they do with it, so that a replay does the same at its place among the draws.
"""

from __future__ import annotations

import torch

from tracejit.capture.trace.active import current
from tracejit.capture.trace.draws import Event, Keep, Restore, Seed

Generator = torch.Generator


class TracedGenerator:
    """Stands for a generator; does what it does, and tells the trace on this thread."""

    def __init__(self, generator: Generator):
        self._generator = generator

    def __getattr__(self, name: str) -> object:
        return getattr(self._generator, name)

    def manual_seed(self, seed: int) -> Generator:
        """As of the generator."""
        if current() is None:
            return self._generator.manual_seed(seed)
        _do(Seed((int(seed),), _position(self._generator)), (int(seed),))
        return self._generator

    def get_state(self) -> torch.Tensor:
        """As of the generator."""
        if current() is None:
            return self._generator.get_state()
        return _do(Keep(_position(self._generator)))

    def set_state(self, state: torch.Tensor) -> Generator:
        """As of the generator. A replay can set only what the step itself has read."""
        t = current()
        if t is None:
            return self._generator.set_state(state)
        kept = next((k for k, x in enumerate(t.draws.given) if x is state), None)
        if kept is None:
            t.scalars.taken("it sets the state of a random generator that it has not read itself")
            t.journal.forget()
            return self._generator.set_state(state)
        _do(Restore(kept, _position(self._generator)))
        return self._generator

    def seed(self) -> int:
        """As of the generator: another one each time."""
        return _unforeseen(self._generator.seed, "seeds a random generator by chance")

    def initial_seed(self) -> int:
        """As of the generator."""
        return _unforeseen(self._generator.initial_seed, "asks how a random generator was seeded")


def _position(generator: Generator) -> int:
    t = current()
    t.journal.forget()  # no torch call, by which traces are compared
    return t.draws.position(generator)


def _do(event: Event, numbers: tuple = ()) -> torch.Tensor | None:
    return current().draws.do(event, numbers)


def _unforeseen(function: object, what: str) -> int:
    t = current()
    if t is not None:
        t.scalars.taken(f"it {what}")
        t.journal.forget()
    return function()
