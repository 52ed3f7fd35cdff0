"""Which places of Python's state hold something else than a snapshot has of them."""

from __future__ import annotations

from tracejit.capture.python.snapshot import Snapshot, cell_value, read_slot


class Compared(Snapshot):
    """A snapshot to compare with what became of the state."""

    def replaced(self, kind: type) -> list[str]:
        """The keys of places that held an instance of a class, or hold one now, and no longer hold
        the same object; a variable of a closure has none."""
        found = []
        for then, now in self._pairs():
            for key in then.keys() | now.keys():
                a, b = then.get(key), now.get(key)
                if a is not b and (isinstance(a, kind) or isinstance(b, kind)):
                    found.append(getattr(key, "__name__", str(key)) or "a variable")
        return sorted(found)

    def _pairs(self) -> list[tuple[dict, dict]]:
        """What was in each container, by key, and what is now; keys of slots are descriptors."""
        spaces = [
            [{k: d[k] for k in self.named if k in d} for d in x] for x in self._spaces.values()
        ]
        found = [(before, dict.copy(x)) for x, before, *_ in (*self._dicts, *self._ordered)]
        found += [(before, now) for now, before in spaces]
        found += [(before, dict(vars(x))) for x, before in self._classes]
        found += [(dict(enumerate(y)), dict(enumerate(x))) for x, y in self._sequences]
        found += [({}, x if isinstance(x, dict) else dict(enumerate(x))) for x in self._empty]
        found += [({"": value}, {"": cell_value(cell)}) for cell, value in self._cells]
        found += [(dict(y), {m: read_slot(m, x) for m, _ in y}) for x, y in self._slots]
        return found
