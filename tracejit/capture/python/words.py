"""The metadata of many tensors at once, read where torch keeps it: in the words of their memory.

A guard asks of each tensor its shape, strides, dtype, device, bits, and where it lies: ten calls of
about 50 ns. Of 800 tensors that is half of what a replay may cost. The same facts stand in some
twenty words of memory, and numpy gathers those of all tensors in one loop.

Where the words are is not promised by torch or CPython. So nothing is taken for granted: when this
module is first asked, every fact is looked for in tensors that have it and tensors that have not,
and all is given up (`Group.of` returns None) if one is not found where it should be. What is equal
here is then equal for torch too; what differs is asked of torch, in the guard's own lines.

    group = Group.of(tensors)            # what they are now; None where the words cannot tell
    addresses = group.addresses(others)  # of tensors that are all like them; None if one is not

All of a tensor's facts are in the words of its Python object (its class, attributes and hooks), of
its TensorImpl (sizes and strides up to five axes, dtype, device, dispatch keys), of its StorageImpl
(where its data is, who frees it) and of its AutogradMeta (whether it requires grad, and its node).
Each is read only when the one that leads there has been compared or, as for storages, is alive
because what leads there is.
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from ctypes import c_double, c_float
from operator import itemgetter

import numpy as np
import torch

MANY = 24  # tensors or dicts, from which on they are looked at together
_BASE = 16  # where arrays of all memory start: not at NULL
_TUPLE = 3  # words of a tuple before its items
_CLASS, _IMPL, _HOOKS = 1, 2, (3, 4)  # of a tensor's object
_VALUES, _DICT = -4, -3  # before it: its attributes, or a dict of them
_USED, _STATE = 2, 3  # of a dict: how many items it has, the number of its state
_STORAGE, _META, _EXTRA, _AXES, _SIZES, _STRIDES, _OFFSET, _FLAGS = 2, 3, 4, 7, 8, 13, 18, (20, 21)
_COUNTER, _WRITES = 5, 4  # of a TensorImpl; and there the count of writes, 4 bytes a step
_DATA, _DELETER = 2, 3  # of a StorageImpl
_UNUSED = np.int64(-(1 << 63))  # the one bit of the flags that holds nothing, whatever it is
_KIND, _NODE, _REQUIRES = 0, 6, 16  # of an AutogradMeta; the last in its lowest byte
_MAX_AXES = 5  # which a TensorImpl has room for
_EQUAL = (_CLASS, _VALUES, *_HOOKS)  # what must be the same words
_LEARNS = 4  # before a group is given up, whose tensors change all the time
_NO_ITEMS = np.zeros(0, np.int64)
_ONE = np.uint32(1)


class _Memory:
    """All memory of the process, as an array of some type. Only what is alive may be used."""

    def __init__(self, kind: str, *, writable: bool = True):
        shape = ((1 << 47) // np.dtype(kind).itemsize - _BASE,)
        at = {"data": (_BASE, not writable), "shape": shape}
        self.__array_interface__ = {**at, "typestr": kind, "version": 3}


_words = np.asarray(_Memory("<i8", writable=False))
_counts = np.asarray(_Memory("<u4"))
_ELEMENTS = {c_float: np.asarray(_Memory("<f4")), c_double: np.asarray(_Memory("<f8"))}


@functools.cache
def _column(offsets: tuple[int, ...]) -> np.ndarray:
    return (np.array(offsets) - (_BASE >> 3))[:, None]


def _index(addresses: np.ndarray, offsets: tuple[int, ...]) -> np.ndarray:
    """Where the words at some offsets behind addresses are: a row for each offset."""
    return (addresses >> 3) + _column(offsets)


def _at(addresses: np.ndarray, offsets: tuple[int, ...]) -> np.ndarray:
    """These words."""
    return _words[_index(addresses, offsets)]


def _objects(items: tuple) -> np.ndarray:
    """The addresses of the items of a tuple, as long as it is alive."""
    if not items:
        return _NO_ITEMS
    first = (id(items) - _BASE) // 8 + _TUPLE
    return _words[first : first + len(items)]


class Group:
    """Tensors with some metadata; others are compared with it."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._learns = _LEARNS
        self._last: _Same | None = None
        self._seen = b""  # which objects there were
        self._found: list[int] = []
        self._take((*tensors,))

    def _take(self, items: tuple) -> None:
        axes = range(max((t.dim() for t in items), default=0))
        self._facts_at = (_EXTRA, *_FLAGS, _AXES)  # as `_facts` takes them
        self._facts_at += (*(_SIZES + i for i in axes), *(_STRIDES + i for i in axes))
        self._itemsizes = np.array([t.element_size() for t in items], np.int64)
        classes, impls = _at(_objects(items), (_CLASS, _IMPL))
        own = np.zeros((len(_EQUAL), len(items)), np.int64)  # no attributes, no hooks
        own[0] = classes
        self._own = own.tobytes()
        self._facts = _facts(_at(impls, self._facts_at))
        storages, metas = _at(impls, (_STORAGE, _META))
        some = metas != 0
        self._with_meta, self._where = some.tobytes(), np.flatnonzero(some)
        self._metas = _meta(_at(metas[self._where], (_KIND, _NODE, _REQUIRES)))
        self._deleters = _at(storages, (_DELETER,)).tobytes()

    def learn(self, tensors: tuple) -> None:
        """These are right too, by what a guard's own lines say: compare with them from now on."""
        self._learns, self._last = max(self._learns - 1, 0), None
        if self._learns and all(map(_plain, tensors)):
            self._take(tensors)

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Group | None:
        """Of tensors as they are now; None where their words cannot tell what they are."""
        native()  # is loaded now, not in the middle of a call
        if not (known() and all(map(_plain, tensors))):
            return None
        group, items = cls(tensors), (*tensors,)
        found = group.addresses(items)
        return group if found == [t.data_ptr() for t in items] else None

    def addresses(self, tensors: tuple) -> list[int] | None:
        """Where the data of tensors is that are like those of the group, one by one; None if some
        are not, or if that cannot be told."""
        if not self._learns:
            return None
        objects = _objects(tensors)
        seen, last = objects.tobytes(), self._last
        if last is not None and seen == self._seen and last.holds():
            return last.addresses
        own = _at(objects, (*_EQUAL, _IMPL, _DICT))
        if own[: len(_EQUAL)].tobytes() != self._own:
            return None
        impls, dicts = own[len(_EQUAL) :]
        with_dict = dicts[dicts != 0]
        unused = _at(with_dict, (_USED,))
        if unused.any():
            return None
        words = _at(impls, (_STORAGE, _META, _OFFSET, *self._facts_at))
        storages, metas, offsets = words[:3]
        if _facts(words[3:]) != self._facts or (metas != 0).tobytes() != self._with_meta:
            return None
        with_meta = metas[self._where]
        of_metas = _at(with_meta, (_KIND, _NODE, _REQUIRES))
        if _meta(of_metas) != self._metas:
            return None
        data, deleters = _at(storages, (_DATA, _DELETER))
        if deleters.tobytes() != self._deleters:
            return None
        found = (data + offsets * self._itemsizes).tolist()
        if found == self._found:
            found = self._found  # the same list says that nothing has moved
        self._found, self._last = found, None
        if seen == self._seen:  # for the second time: what is new in each call is not kept
            tables = [(objects, (*_EQUAL, _IMPL, _DICT), own), (with_dict, (_USED,), unused)]
            tables.append((impls, (_STORAGE, _META, _OFFSET, *self._facts_at), words))
            tables.append((storages, (_DATA, _DELETER), np.array([data, deleters])))
            tables.append((with_meta, (_KIND, _NODE, _REQUIRES), of_metas))
            self._last = _Same(tables, found)
        self._seen = seen
        return found


class _Same:
    """All words of some tensors, as they were compared, in tables of objects of one kind: what the
    words of one lead to is read when they are what they were."""

    def __init__(self, tables: Sequence[tuple], addresses: list[int]):
        self.addresses = addresses
        self._native = native()
        if self._native is None:
            self._tables = [
                (_index(objects, offsets).ravel(), words.tobytes())
                for objects, offsets, words in tables
            ]
            return
        rows: list[int] = []
        self._kept: list[np.ndarray] = []  # what the rows point to
        for objects, offsets, words in tables:
            kept = (objects.copy(), np.array(offsets), np.ascontiguousarray(words.T))
            self._kept += kept
            at, which, what = (x.ctypes.data for x in kept)
            rows += [at, len(objects), which, len(offsets), what]
        self._rows = np.array(rows)
        self._given = self._rows.ctypes.data, len(tables)

    def holds(self) -> bool:
        """Whether they are all the same still."""
        if self._native is not None:
            return self._native[0](*self._given) == 1
        return all(_words.take(at).tobytes() == words for at, words in self._tables)


class Bump:
    """Counts a write to some of the tensors of a tuple, as torch's `increment_version` does."""

    def __init__(self, indices: Sequence[int]):
        self._at = np.array(indices)
        self._given = self._at.ctypes.data, len(indices), _IMPL, _COUNTER, 4 * _WRITES
        self._get = itemgetter(*indices)
        self._known, self._native = counted(), native()  # found out now, not in a replay

    def __call__(self, tensors: tuple) -> None:
        if not (type(tensors) is tuple and self._known and self._counts(tensors)):
            torch._C._increment_version(self._get(tensors))

    def _counts(self, tensors: tuple) -> bool:
        """Count in memory, if all have a counter: those of inference mode have none."""
        if self._native is not None:
            return self._native[1](id(tensors) + 8 * _TUPLE, *self._given) == 1
        (impls,) = _at(_objects(tensors).take(self._at), (_IMPL,))
        (counters,) = _at(impls, (_COUNTER,))
        if not counters.all():
            return False
        at = _writes_at(counters)
        _counts[at] = _counts.take(at) + _ONE
        return True


def _writes_at(counters: np.ndarray) -> np.ndarray:
    """Where counters have their numbers."""
    return (counters >> 2) + (_WRITES - _BASE // 4)


class Elements:
    """The one element of each of some CPU tensors, which lie at these addresses."""

    def __init__(self, addresses: np.ndarray, kind: type):
        self._memory, self._kind = _ELEMENTS[kind], kind
        size = self._memory.itemsize
        self._at = addresses // size - _BASE // size
        aligned = not (addresses % size).any()  # else numpy cannot take them
        self._cells = [] if aligned else [kind.from_address(x) for x in addresses.tolist()]

    @staticmethod
    def known(kind: type | None) -> bool:
        """Whether elements of a ctypes type can be read so."""
        return kind in _ELEMENTS

    def read(self) -> list[float]:
        """The numbers; where they are all the same it is one object."""
        if self._cells:
            return [cell.value for cell in self._cells]
        found = self._memory.take(self._at)
        words, size = found.tobytes(), found.itemsize
        if words == words[:size] * len(found):
            return [found.item(0)] * len(found)
        return found.tolist()

    def fill(self, number: float) -> None:
        """Set all of them to a number, which is rounded to their type."""
        for cell in self._cells:
            cell.value = number
        if not self._cells:
            self._memory[self._at] = self._kind(number).value


class Dicts:
    """Dicts, and whether they were changed: CPython numbers their states, and uses no number twice.
    `kept` is for whoever asks: the numbers, and what was found in the dicts then."""

    def __init__(self, dicts: Sequence[dict]):
        self._dicts = dicts  # which stay alive
        self._at = (np.array([*map(id, dicts)]) >> 3) - (_BASE >> 3) + _STATE
        self.kept: tuple[bytes, tuple] | None = None

    @classmethod
    def of(cls, dicts: Sequence[dict]) -> Dicts | None:
        """None where these numbers are not to be found."""
        return cls(dicts) if numbered() else None

    def now(self) -> bytes:
        """The numbers of their states."""
        return _words.take(self._at).tobytes()


def _facts(found: np.ndarray) -> bytes:
    """What TensorImpls say, from `_facts_at`."""
    flags = found[1] & ~_UNUSED
    return found[:1].tobytes() + flags.tobytes() + found[2:].tobytes()


def _meta(found: np.ndarray) -> bytes:
    """What AutogradMetas say: of what kind they are (a view's is another), their nodes, and whether
    grad is required."""
    return found[:2].tobytes() + (found[2] & 0xFF).tobytes()


def _plain(t: torch.Tensor) -> bool:
    """Whether the words of a tensor say all: it has data and few axes, and no attributes or hooks
    that would have to be looked into."""
    return (
        type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.layout is torch.strided
        and t.dim() <= _MAX_AXES
        and t.numel() > 0
        and t.is_leaf
        and not t._is_view()
        and not t.__dict__
        and not t._backward_hooks
        and not getattr(t, "_post_accumulate_grad_hooks", None)
    )


# ---- the same in C

Functions = tuple[Callable[..., int], Callable[..., int]]  # of codegen/c_words.py

_loader: list[Callable[[], Functions | None]] = []


def load_with(loader: Callable[[], Functions | None]) -> None:
    """Say what loads the C functions, when they are needed first; it gives None if it cannot."""
    _loader[:] = [loader]
    native.cache_clear()


@functools.cache
def native() -> Functions | None:
    """The C functions; None where numpy has to do."""
    return _loader[0]() if _loader else None


# ---- is all of that so?


def _zeros(*shape: int, **options: object) -> torch.Tensor:
    """Whatever the defaults are."""
    return torch.zeros(*shape, **{"dtype": torch.float32, "device": "cpu"} | options)


@functools.cache
def known() -> bool:
    """Whether the words are where they should be, in this process. Found out once, so what modes
    are active then does not matter."""
    if sys.implementation.name != "cpython" or sys.maxsize != (1 << 63) - 1:
        return False
    try:
        with (
            torch._C.DisableTorchFunction(),
            torch._C._DisableTorchDispatch(),
            torch.enable_grad(),
            torch.inference_mode(False),
        ):
            return _pointers_are_there() and _facts_are_seen()
    except Exception:
        return False


@functools.cache
def numbered() -> bool:
    """Whether dicts have a number that is another one after each change."""
    if not known():
        return False
    one, other = [1], [1]  # equal, not the same
    changes: list[Callable[[dict], object]] = [
        lambda d: d.__setitem__("a", other),
        lambda d: d.__setitem__("b", one),
        lambda d: d.__delitem__("b"),
        lambda d: d.update(a=one),
        lambda d: d.pop("a"),
        lambda d: d.setdefault("a", one),
        lambda d: d.popitem(),
        lambda d: d.__ior__({"a": other, "b": one}),
        lambda d: d.pop("a"),
        lambda d: d.clear(),
    ]
    for d in ({"a": one}, defaultdict(list, a=one), vars(_Memory("<i8"))):
        d["a"] = one
        asked = Dicts([d])
        for change in changes:
            before = asked.now()
            if asked.now() != before:  # nothing has changed yet
                return False
            change(d)
            if asked.now() == before:
                return False
    return True


@functools.cache
def counted() -> bool:
    """Whether counts of writes are where they should be."""
    if not known():
        return False
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        with torch.inference_mode():
            without = _zeros(2)
        if _at(np.array([without._cdata]), (_COUNTER,)).any():
            return False
        with torch.inference_mode(False):
            one, other = _zeros(3, 4), torch.nn.Parameter(_zeros(2))
        for count in (0, 3):
            while one._version < count:
                torch._C._increment_version((one,))
            impls = np.array([x._cdata for x in (one, one.view(12), other, other.detach())])
            (counters,) = _at(impls, (_COUNTER,))
            one_at, same_at, other_at, again_at = counters.tolist()
            apart = one_at == same_at != other_at == again_at
            if not (
                apart and all(x % 8 == 0 and 1 << 16 < x < 1 << 47 for x in (one_at, other_at))
            ):
                return False  # no pointers
            at = _writes_at(counters)
            if _counts.take(at).tolist() != [count, count, 0, 0]:
                return False
    return True


def _pointers_are_there() -> bool:
    """What leads from one object to the next; each is only followed when it was found."""
    t, other = _behind(_zeros(3, 4)), {"a": 1}
    items = (other, t)
    if _objects(items).tolist() != [id(other), id(t)]:
        return False
    attributes = t.__dict__
    of = np.array([id(t)])
    impl, values, at = _at(of, (_IMPL, _VALUES, _DICT))[:, 0].tolist()
    if (impl, values, at) != (t._cdata, 0, id(attributes)):
        return False
    if _at(np.array([id(attributes), id(other)]), (_USED,)).tolist() != [[0, 1]]:
        return False
    impl = np.array([impl])
    storage, meta, offset = _at(impl, (_STORAGE, _META, _OFFSET))[:, 0].tolist()
    if (storage, meta, offset) != (t.untyped_storage()._cdata, 0, 4):
        return False
    (data,) = _at(np.array([storage]), (_DATA,))[:, 0].tolist()
    t.requires_grad_()
    (meta,) = _at(impl, (_META,))[:, 0].tolist()
    return data == t.untyped_storage().data_ptr() and meta != 0


def _behind(x: torch.Tensor) -> torch.Tensor:
    """A tensor of the memory behind a row of 4, which is no view."""
    return _zeros(0).set_(x.untyped_storage(), 4, (x.shape[0] - 1, 4), (4, 1))


def _facts_are_seen() -> bool:
    """Tensors that differ in one fact differ here, and others do not."""
    weight = lambda *shape: torch.nn.Parameter(_zeros(*shape or (3, 4)))  # noqa: E731
    trained, plain = Group((weight(),)), Group((_zeros(3, 4),))

    def changed(change: Callable[[torch.Tensor], object]) -> torch.Tensor:
        x = weight()
        change(x)
        return x

    class Weight(torch.nn.Parameter):
        pass

    def renamed(x: torch.Tensor) -> None:
        x.__class__ = Weight

    others = [
        (trained, x)
        for x in (
            *(
                weight(4, 3),
                weight(3, 4, 1),
                weight(3),
                weight(4, 3).data.t(),
                weight(3, 8)[:, ::2],
            ),
            torch.nn.Parameter(_zeros(4, 3).t()),
            torch.nn.Parameter(_zeros(3, 4, dtype=torch.float64)),
            torch.nn.Parameter(_zeros(3, 4, dtype=torch.float16)),
            torch.nn.Parameter(_zeros(3, 4, device="meta")),
            *(weight().data, weight() * 2, weight().view(3, 4)),
            changed(lambda x: x.requires_grad_(False)),
            changed(lambda x: x.register_hook(lambda g: g)),
            changed(lambda x: x.register_post_accumulate_grad_hook(lambda p: None)),
            changed(lambda x: setattr(x, "note", 1)),
            changed(renamed),
            changed(lambda x: setattr(x, "data", _zeros(4, 3).t())),
        )
    ]
    others += [
        (plain, x)
        for x in (
            _zeros(3, 4, dtype=torch.int32),
            _zeros(3, 4, requires_grad=True),
            torch._neg_view(_zeros(3, 4)),
            _zeros(4, 3).t(),
            torch._lazy_clone(_zeros(3, 4)),
        )
    ]
    same = [(trained, weight()), (trained, changed(lambda x: x.data.add_(1)))]
    same += [(plain, _behind(_zeros(4, 4))), (plain, _zeros(3, 4).add_(1))]
    return all(group.addresses((x,)) is None for group, x in others) and all(
        group.addresses((x,)) == [x.data_ptr()] for group, x in same
    )
