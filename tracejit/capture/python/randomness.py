"""The states of random generators, to draw the same numbers once more."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch

_cpu = torch.default_generator


def _numpy_state(x: np.random.Generator) -> dict:
    return x.bit_generator.state


def _set_numpy_state(x: np.random.Generator, state: dict) -> None:
    x.bit_generator.state = state


# class -> (its state, to set it); states are compared by their text where that is all there is
_ACCESS: tuple[tuple[type, Callable, Callable], ...] = (
    (random.SystemRandom, lambda x: None, lambda x, state: None),  # has none
    (random.Random, random.Random.getstate, random.Random.setstate),
    (np.random.Generator, _numpy_state, _set_numpy_state),
    (np.random.RandomState, np.random.RandomState.get_state, np.random.RandomState.set_state),
    (
        np.random.BitGenerator,
        lambda x: x.state,
        lambda x, state: setattr(x, "state", state),
    ),
    (torch.Generator, torch.Generator.get_state, torch.Generator.set_state),
)
GENERATORS = tuple(cls for cls, *_ in _ACCESS)


def saved(x: object) -> Callable[[], None]:
    """A function that puts a random generator back as it is now."""
    _, get, put = next(access for access in _ACCESS if isinstance(x, access[0]))
    state = get(x)
    return lambda: put(x, state)


def saved_globally() -> list[Callable[[], None]]:
    """The same for the generators of the process: Python's, numpy's, torch's on each device."""
    state, numpys = random.getstate(), np.random.get_state()
    found = [
        saved(_cpu),
        lambda: random.setstate(state),
        lambda: np.random.set_state(numpys),
    ]
    if torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        found.append(lambda: torch.cuda.set_rng_state_all(states))
    return found
