"""The garbage collector during a trace, or an import: what is made meanwhile stays young."""

from __future__ import annotations

import gc


class uncollected:
    """Without the collector's own collections, so that what is made inside stays young."""

    __slots__ = ("_enabled", "_collections")

    def __enter__(self) -> uncollected:
        self._enabled = gc.isenabled()
        gc.disable()
        self._collections = [stats["collections"] for stats in gc.get_stats()]
        return self

    def __exit__(self, *exception: object) -> None:
        if self._enabled:
            gc.enable()

    def collect_young(self) -> None:
        """Let go of cycles that were made inside: they are young, unless a collection went by."""
        for generation, stats in enumerate(gc.get_stats()):
            if stats["collections"] == self._collections[generation]:
                break
        gc.collect(generation)
