"""Runs of a step beside each other: eagerly, as it was observed, and in float64."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from threading import get_ident

import torch

from tracejit.equality import AllInFloat64, Magnitudes, array_of, tensors_in_float64
from tracejit.ir.graph import Graph
from tracejit.verify.before import Before
from tracejit.verify.outcome import Observer, Outcome

BESIDE: dict[int, int] = {}  # threads that run a step eagerly, beside its plan: how deeply


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Compiled steps that a step calls are its own Python here: what plans of theirs compute would
    be compared with itself."""
    thread = get_ident()
    BESIDE[thread] = BESIDE.get(thread, 0) + 1
    try:
        yield
    finally:
        BESIDE[thread] -= 1
        if not BESIDE[thread]:
            del BESIDE[thread]


def beside() -> bool:
    """Whether this thread is in such a run."""
    return get_ident() in BESIDE


class Observed:
    """Observes a run of a plan: its final graph, its inputs as they were, and where outputs lie."""

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self.inputs: list[torch.Tensor | float] = []
        self._magnitudes: Magnitudes | None = None
        self._outputs: list[torch.Tensor] = []
        self._tensors: list = []

    def __call__(self, graph: Graph, inputs: list, outputs: list[torch.Tensor]) -> Callable:
        self.graph, self._outputs = graph, [t.detach() for t in outputs]
        self._tensors = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
        self.inputs = [
            x.detach().clone() if isinstance(x, torch.Tensor) else x for x in self._tensors
        ]
        return lambda: None

    def norm_of(self, place: int, tensor: torch.Tensor) -> float:
        """The magnitude of what lies at an address after the run."""
        if self._magnitudes is None:
            self._magnitudes = Magnitudes()
            if self.graph is not None:
                arrays = [array_of(x) for x in self.inputs]
                self._magnitudes.of(self.graph, arrays, self._tensors, self._outputs)
        return self._magnitudes.norm_of(place, tensor)


def digest(graph: Graph) -> str:
    """A short name for a graph."""
    return hashlib.blake2b(str(graph).encode(), digest_size=6).hexdigest()


def in_float64(
    before: Before, observer: Observer, function: Callable, args: tuple, kwargs: dict
) -> Outcome | None:
    """What a call in float64 leaves behind, from the state that there is; None if it cannot be.
    That state is there again afterwards."""
    grads = {id(t.grad) for t in before.tensors if t.is_leaf}
    try:
        with tensors_in_float64([t for t in before.tensors if id(t) not in grads]):
            with AllInFloat64(), eagerly():
                returned = function(*args, **kwargs)
            return observer.outcome(returned)
    except Exception:  # it mixes dtypes that are the user's own
        return None
    finally:
        before.restore()
