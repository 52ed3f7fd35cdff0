"""What a call has left behind, as data that stays when the call is undone.

    what was returned or raised, each tensor's elements and .grad, what Python objects hold now
    → Outcome: a tree per place

Objects that were there before are themselves, so only what a call has changed is looked into.
Tuples are what they hold: a replay makes a new one where eager leaves one that is equal.
"""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import field

import numpy as np
import torch

from tracejit.capture.python.copies import UNSET, cell_value, read_slot
from tracejit.capture.trace.scalars import plain
from tracejit.records import dataclass
from tracejit.verify.before import Before, Looked

_DEPTH = 12  # of new objects that are looked into
_GONE = "<gone>"
_ATOMS = (int, float, complex, bool, str, bytes, type(None))
# what eager notes for itself
_NOTES = frozenset({"__warningregistry__", "_opt_called", "__builtins__", "__dynamo_disable"})


@dataclass(frozen=True)
class Seen:
    """A tensor as it was after a call. `place` is where it lay, for magnitudes."""

    data: torch.Tensor
    requires_grad: bool
    place: int

    @classmethod
    def of(cls, t: torch.Tensor) -> Seen:
        """As it is now."""
        return cls(t.detach().clone(), t.requires_grad, t.data_ptr())


@dataclass(frozen=True)
class Known:
    """An object that was there before the call."""

    id: int


@dataclass(frozen=True)
class Made:
    """A new object, by its class and what it holds."""

    cls: str
    parts: tuple


@dataclass
class Outcome:
    """What a call has left behind. `parts`: a tree by the name of each place that it may have
    changed; a place that has none is as before. `was`: what places held then. `error`: what it
    raised."""

    parts: dict[str, object] = field(default_factory=dict)
    error: Exception | None = None
    was: dict[str, object] = field(default_factory=dict)


class Observer:
    """Looks at what calls leave behind, from one state."""

    def __init__(self, before: Before, names: dict[int, str]):
        """`names` are those of tensors, by id."""
        self.before, self.names = before, names
        copied = before.snapshot.of()
        self._old = {id(x) for held in copied.values() for x in held} | set(before.index)
        s = before.snapshot
        self._old |= {id(x) for x in s._keep}
        self._copies = {id(x): copy for x, copy in (*s._dicts, *s._sequences)}
        self._copies |= {id(x): copy for x, copy, _ in s._ordered} | {id(x): () for x in s._empty}

    def outcome(self, returned: object, error: Exception | None = None) -> Outcome:
        """What there is now."""
        found = Outcome(error=error)
        if error is None:
            found.parts["what is returned"] = self._seen(returned, 0)
        for i, t in enumerate(self.before.tensors):
            name = self.names.get(id(t), f"tensor {i} of shape {list(t.shape)}")
            found.parts[name] = Seen.of(t)
            grad = t.grad if t.is_leaf else None
            found.parts[f"{name}.grad"] = None if grad is None else Seen.of(grad)
        for name, place, was in self._changed():
            while name in found.parts:
                name += "'"
            found.parts[name] = place
            found.was[name] = None if was is UNSET else self._as_before(was, 0)
        for i, x in enumerate(self.before.snapshot.generators):
            found.parts[f"generator {i}"] = _digest_of(x)
        found.parts["torch's generator"] = _digest(torch.default_generator.get_state().numpy())
        found.parts["Python's generator"] = hash(random.getstate())
        found.parts["numpy's generator"] = _digest(np.random.get_state()[1])
        return found

    def _as_before(self, x: object, depth: int) -> object:
        """What a container held before; what else there is, as it is."""
        if id(x) not in self._copies or depth > _DEPTH:
            return self._seen(x, depth)
        copy = self._copies[id(x)]
        if isinstance(x, dict):
            parts = ((self._key(k), self._as_before(v, depth + 1)) for k, v in dict(copy).items())
        else:
            parts = (self._as_before(v, depth + 1) for v in copy)
        return Made(type(x).__name__, tuple(parts))

    def _alive(self) -> set[int]:
        """What the step can reach now."""
        return {id(x) for x in Looked(self.before.roots)._keep}

    def _changed(self) -> Iterator[tuple[str, object, object]]:
        """The places that hold something else than before."""
        s, alive = self.before.snapshot, self._alive()
        every = [*s._dicts, *((x, copy) for x, copy, _ in s._ordered)]
        for n, (x, copy) in enumerate(every):
            if id(x) not in alive:  # nobody asks what it holds
                continue
            yield from self._items(s.owners.get(id(x), f"dict {n}"), x, copy)
        for x, copy in s._spaces.values():
            names = (x.keys() | copy.keys()) & s.named
            now, then = ({k: d[k] for k in names if k in d} for d in (x, copy))
            yield from self._items(f"module {x.get('__name__')}", now, then)
        for n, x in enumerate((*s._empty, *s._of_bare())):
            if len(x) and id(x) in alive and not (isinstance(x, dict) and _NOTES.issuperset(x)):
                yield s.owners.get(id(x), f"container {n}"), self._seen(x, 0, inside=True), UNSET
        for n, (x, copy) in enumerate(s._sequences):
            if id(x) not in alive:
                continue
            if len(x) != len(copy) or any(a is not b for a, b in zip(x, copy, strict=True)):
                yield (
                    s.owners.get(id(x), f"{type(x).__name__} {n}"),
                    self._seen(x, 0, inside=True),
                    copy,
                )
        for n, (x, copy) in enumerate(s._sets):
            if x != copy:
                yield f"set {n}", len(x), len(copy)
        for n, (x, value) in enumerate(s._cells):
            if cell_value(x) is not value:
                yield f"variable of a function {n}", self._seen(cell_value(x), 0), value
        for n, (x, values) in enumerate(s._slots):
            for member, value in values:
                now = read_slot(member, x)
                if now is not value:
                    name = f"{type(x).__name__}.{member.__name__} ({n})"
                    yield name, self._seen(now, 0), value
        for cls, held in s._classes:
            yield from self._items(f"class {cls.__name__}", dict(vars(cls)), held)
        for x, held in s._steps:
            now = {name: x.__dict__[name] for name in x.user_attributes()}
            yield from self._items(f"step {x.__name__}", now, held)

    def _items(self, name: str, now: dict, then: dict) -> Iterator[tuple[str, object, object]]:
        for key, value in dict.items(now):
            if then.get(key, UNSET) is not value and key not in _NOTES:
                was = then.get(key, UNSET)
                yield f"{name}[{self._key(key)}]", self._seen(value, 0), was
        for key in then:
            if key not in now and key not in _NOTES:
                yield f"{name}[{self._key(key)}]", _GONE, then[key]

    def _key(self, key: object) -> str:
        if isinstance(key, torch.Tensor):
            return self.names.get(id(key), "a tensor")
        return repr(key) if isinstance(key, _ATOMS) else type(key).__name__

    def _seen(self, x: object, depth: int, *, inside: bool = False) -> object:
        """A tree of what an object is. `inside`: it is looked into though it was there before."""
        x = plain(x)  # a runtime scalar that is kept
        if type(x) in _ATOMS:
            return x
        if id(x) in self.before.index:
            return Known(id(x))
        if isinstance(x, torch.Tensor):
            return Seen.of(x)
        known = id(x) in self._old and not inside and not isinstance(x, (tuple, frozenset))
        if known or depth > _DEPTH:
            return Known(id(x)) if id(x) in self._old else Made(type(x).__name__, ())
        if isinstance(x, dict):
            pairs = OrderedDict.items(x) if isinstance(x, OrderedDict) else dict.items(x)
            parts = tuple((self._key(k), self._seen(v, depth + 1)) for k, v in pairs)
        elif isinstance(x, (list, tuple, deque)):
            parts = tuple(self._seen(v, depth + 1) for v in x)
        elif isinstance(x, (set, frozenset)):
            parts = (len(x),)
        elif isinstance(x, np.ndarray) and x.dtype != object:
            parts = (Seen(torch.from_numpy(np.array(x)), False, 0),) if _has(x) else ()
        elif isinstance(x, np.generic):
            return x.item()
        else:
            held = getattr(x, "__dict__", None)
            inner = held.items() if type(held) is dict else ()
            parts = tuple((k, self._seen(v, depth + 1)) for k, v in inner)
        return Made(type(x).__name__, parts)


def _has(x: np.ndarray) -> bool:
    """Whether torch has a dtype for an array."""
    return x.dtype.kind in "biuf" and x.dtype.isnative and x.dtype.itemsize <= 8


def _digest(x: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(x).tobytes(), digest_size=8).hexdigest()


def _digest_of(x: object) -> object:
    if isinstance(x, torch.Generator):
        return _digest(x.get_state().numpy())
    state = getattr(x, "getstate", None) or getattr(x, "get_state", None)
    if state is not None:
        return hashlib.blake2b(repr(state()).encode(), digest_size=8).hexdigest()
    return repr(getattr(x, "bit_generator", x).state)


def is_short_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory is short, as Python, torch or a GPU says it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
