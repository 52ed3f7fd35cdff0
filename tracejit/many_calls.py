"""`step.run(k, data)`: many calls, whose launches are one where the step is small."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from tracejit.run import Replay
from tracejit.runtime import waiting


class ManyCalls:
    """The part of a compiled step that makes many calls."""

    _lock: object
    _replays: list[Replay]
    _verifier: object
    observer: Callable | None
    __call__: Callable

    def run(self, k: int, data: Iterable, *, of: tuple = ()) -> list:
        """What k calls return, in order: the same as `[step(*x) for x in data]`.

        data: the arguments of each call, at least k: a tuple, or one argument. A loader's batches
            are taken before the first call. (`of`: the object, where the step is a method.)

        On a GPU, calls that are replayed and whose kernels are small (no phase has more than four
        programs for each multiprocessor) are one launch: a cooperative kernel that goes through
        the steps, with a barrier across the GPU between kernels. Values are those of single calls
        up to rounding, as sums may be grouped otherwise. All that a call does in Python (schedules,
        counters, `.grad`) is done as ever. Other steps, and steps on a CPU, are called one by one.
        """
        if k < 0:
            raise ValueError(f"step.run: k is {k}; it is the number of calls, 0 or more")
        found = list(islice(data, k))
        if len(found) < k:
            raise ValueError(
                f"step.run({k}, data): data has {len(found)} items; give the arguments of each call"
            )
        calls = [x if type(x) is tuple else (x,) for x in found]
        with self._lock, waiting.together(k if self._may_wait() else 0):
            return [self(*of, *args) for args in calls]

    def _may_wait(self) -> bool:
        """Whether launches of replays may wait for later calls. Numbers that a call draws may not:
        they are copied for its launches alone."""
        alone = self._verifier is not None or self.observer is not None
        return not alone and not any(r.captured.draws for r in self._replays)
