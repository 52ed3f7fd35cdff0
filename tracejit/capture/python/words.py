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

import contextlib
import ctypes
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from tracejit.capture.python import memory
from tracejit.capture.python.memory import BASE, TUPLE, at, index, objects, words
from tracejit.records import dataclass

_CLASS, IMPL, _HOOKS = 1, 2, (3, 4)  # of a tensor's object
_VALUES, _DICT = -4, -3  # before it: its attributes, or a dict of them
_USED = 2  # of a dict: how many items it has
_STORAGE, _META, _EXTRA, _OBJECT, _AXES, _SIZES, _STRIDES, _OFFSET = 2, 3, 4, 6, 7, 8, 13, 18
_FLAGS = (20, 21)  # of a TensorImpl, as the line above
_DATA, _DELETER = 2, 3  # of a StorageImpl
_UNUSED = np.int64(-(1 << 63))  # the one bit of the flags that holds nothing, whatever it is
_KIND, _GRAD, _NODE, _REQUIRES = 0, 5, 6, 16  # of an AutogradMeta; the last in its lowest byte
_MAX_AXES = 5  # which a TensorImpl has room for
_EQUAL = (_CLASS, _VALUES, *_HOOKS)  # what must be the same words
_OWN = frozenset((IMPL, _DICT))  # what is another one for each tensor's object
_OWN_OF_IMPL = frozenset((_STORAGE, _META, _OFFSET, _OBJECT))
_PLAIN = torch.Tensor, torch.nn.Parameter
_LEARNS = 4  # before a group is given up, whose tensors change all the time


@dataclass(frozen=True)
class _Table:
    """Objects of one kind, and some of their words: a row for each word. What stands at `own` is
    another one for each object."""

    objects: np.ndarray
    offsets: tuple[int, ...]
    words: np.ndarray
    own: frozenset[int] = frozenset()

    def part(self, which: np.ndarray) -> _Table:
        """Some of the objects."""
        return _Table(self.objects[which], self.offsets, self.words[:, which], self.own)

    def by_kinds(self) -> Iterator[tuple[np.ndarray, int, np.ndarray, np.ndarray, tuple]]:
        """For objects that have the same words besides their own: these, the first of the words
        that they have in common, masks of those that are asked, the words; and their own, by
        offset."""
        own = [k for k, offset in enumerate(self.offsets) if offset in self.own]
        common = [k for k in range(len(self.offsets)) if k not in own]
        places = np.array([self.offsets[k] for k in common], np.int64)
        first = int(places.min(initial=0))
        masks = np.zeros(int(places.max(initial=-1)) + 1 - first, np.int64)
        masks[places - first] = -1
        kinds, of = np.unique(self.words[common], axis=1, return_inverse=True)
        for k, kind in enumerate(kinds.T):
            which = np.flatnonzero(of.ravel() == k)
            row = np.zeros_like(masks)
            row[places - first] = kind
            mine = np.ascontiguousarray(self.words[own][:, which].T)
            at_own = np.array([self.offsets[i] for i in own], np.int64)
            yield self.objects[which], first, masks, row, (at_own, mine)


class Group:
    """Tensors with some metadata; others are compared with it. `gradients`: where the owner is of
    each of them that is a gradient, if it is found by that."""

    def __init__(self, tensors: Sequence[torch.Tensor], gradients: Mapping[int, int] | None = None):
        self._learns = _LEARNS
        self._last: _Same | None = None
        self._from: tuple | None = None  # where the tensors are from that are asked next
        pairs = [*(gradients or {}).items()]
        self._gradients, self._owners = np.array(pairs, np.int64).reshape(-1, 2).T
        self._seen = b""  # which objects there were
        self._found: list[int] = []
        self._take((*tensors,))

    def _take(self, items: tuple) -> None:
        axes = range(max((t.dim() for t in items), default=0))
        self._facts_at = (_EXTRA, *_FLAGS, _AXES)  # as `_facts` takes them
        self._facts_at += (*(_SIZES + i for i in axes), *(_STRIDES + i for i in axes))
        self._itemsizes = np.array([t.element_size() for t in items], np.int64)
        classes, impls = at(objects(items), (_CLASS, IMPL))
        own = np.zeros((len(_EQUAL), len(items)), np.int64)  # no attributes, no hooks
        own[0] = classes
        self._own = own.tobytes()
        self._facts = _facts(at(impls, self._facts_at))
        storages, metas = at(impls, (_STORAGE, _META))
        some = metas != 0
        self._with_meta, self._where = some.tobytes(), np.flatnonzero(some)
        self._metas = _meta(at(metas[self._where], (_KIND, _NODE, _REQUIRES)))
        self._deleters = at(storages, (_DELETER,)).tobytes()

    def learn(self, tensors: tuple) -> None:
        """These are right too, by what a guard's own lines say: compare with them from now on."""
        self._learns, self._last = max(self._learns - 1, 0), None
        if self._learns and all(map(_plain, tensors)):
            self._take(tensors)

    @classmethod
    def of(
        cls, tensors: Sequence[torch.Tensor], gradients: Mapping[int, int] | None = None
    ) -> Group | None:
        """Of tensors as they are now; None where their words cannot tell what they are."""
        if not (known() and all(map(_plain, tensors))):
            return None
        if (native := memory.native()) is not None and gradients:
            fetched(native)  # is found out now, not in the middle of a call
        group, items = cls(tensors, gradients), (*tensors,)
        found = group.addresses(items)
        return group if found == [t.data_ptr() for t in items] else None

    def again(self, states: bytes, roots: tuple) -> tuple[tuple, list[int]] | None:
        """The tensors that were asked last, and their addresses, if they have stayed as they were;
        else None, and `addresses` is to be asked. They are found from objects that always are the
        same, from dicts whose states have these numbers, and from `roots`, but for gradients, which
        their owners have."""
        self._from = states, objects(roots).tobytes()
        last = self._last
        if last is None or last.items is None or last.found_from != self._from:
            return None
        tensors = last.tensors()
        if tensors is None:
            self._last = None
            return None
        return tensors, last.addresses

    def addresses(self, tensors: tuple) -> list[int] | None:
        """Where the data of tensors is that are like those of the group, one by one; None if some
        are not, or if that cannot be told."""
        found_from, self._from = self._from, None
        if not self._learns:
            return None
        seen, last = objects(tensors).tobytes(), self._last
        if last is not None and seen == self._seen and last.holds():
            last.found_from = found_from
            return last.addresses
        tables = self._compared(tensors)
        if tables is None:
            return None
        of_impls, of_storages = tables[2:4]
        found = (of_storages.words[0] + of_impls.words[2] * self._itemsizes).tolist()
        stays = found == self._found
        if stays:
            found = self._found  # the same list says that nothing has moved
        self._found, self._last = found, None
        if stays and seen == self._seen:  # what is new in each call is not kept
            self._last = _Same(*self._in_turn(tables), found, found_from)
        self._seen = seen
        return found

    def _compared(self, tensors: tuple) -> list[_Table] | None:
        """The words of tensors: of their objects, of the attributes of those that have a dict, of
        their TensorImpls, StorageImpls and AutogradMetas; None if some are not as they should."""
        at_objects = objects(tensors).copy()
        own = at(at_objects, (*_EQUAL, IMPL, _DICT))
        if own[: len(_EQUAL)].tobytes() != self._own:
            return None
        impls, dicts = own[len(_EQUAL) :]
        with_dict = dicts[dicts != 0]
        unused = at(with_dict, (_USED,))
        if unused.any():
            return None
        offsets = _STORAGE, _META, _OFFSET, *self._facts_at
        of_impls = at(impls, offsets)
        storages, metas = of_impls[:2]
        if _facts(of_impls[3:]) != self._facts or (metas != 0).tobytes() != self._with_meta:
            return None
        with_meta = metas[self._where]
        of_metas = at(with_meta, (_KIND, _NODE, _REQUIRES))
        if _meta(of_metas) != self._metas:
            return None
        of_storages = at(storages, (_DATA, _DELETER))
        if of_storages[1].tobytes() != self._deleters:
            return None
        return [
            _Table(at_objects, (*_EQUAL, IMPL, _DICT), own, _OWN),
            _Table(with_dict, (_USED,), unused),
            _Table(impls, offsets, of_impls, _OWN_OF_IMPL),
            _Table(storages, (_DATA, _DELETER), of_storages, frozenset((_DATA,))),
            _Table(with_meta, (_KIND, _NODE, _REQUIRES), of_metas, frozenset((_NODE, _REQUIRES))),
        ]

    def _in_turn(self, tables: list[_Table]) -> tuple[list[_Table], np.ndarray | None]:
        """The tables in an order in which each object is led to by those before it: gradients come
        after what their owners say of them. Then the objects of all tensors; None where gradients
        are not to be found so."""
        of_objects, _, of_impls, *_ = tables
        at_objects, impls, metas = of_objects.objects, of_impls.objects, of_impls.words[1]
        if not len(self._gradients):
            return tables, at_objects
        owners, gradients = metas[self._owners], impls[self._gradients]
        native = memory.native()
        if native is None or not (owners.all() and fetched(native)):
            return tables, None
        says = _Table(owners, (_GRAD,), at(owners, (_GRAD,)), frozenset((_GRAD,)))
        leads = _Table(gradients, (_OBJECT,), at(gradients, (_OBJECT,)), frozenset((_OBJECT,)))
        if (says.words[0] != gradients).any():
            return tables, None
        if (leads.words[0] != at_objects[self._gradients]).any():
            return tables, None
        late = np.zeros(len(at_objects), bool)
        late[self._gradients] = True
        of = [late, late[of_objects.words[-1] != 0], late, late, late[self._where]]
        first = [table.part(~which) for table, which in zip(tables, of, strict=True)]
        then = [table.part(which) for table, which in zip(tables, of, strict=True)]
        return [*first, says, leads, *then], at_objects


class _Same:
    """All words of some tensors, as they were compared: what the words of one table lead to is read
    when they are what they were. `found_from` says where the tensors came from; `at_objects` where
    they are, if that is known from it."""

    def __init__(
        self,
        tables: Sequence[_Table],
        at_objects: np.ndarray | None,
        addresses: list[int],
        found_from: tuple | None,
    ):
        self.addresses, self.found_from = addresses, found_from
        self.items: np.ndarray | None = None  # what C makes the tuple of tensors from
        self._native = memory.native()
        if self._native is None:
            self._tables = [
                (index(x.objects, x.offsets).ravel(), x.words.tobytes()) for x in tables
            ]
            return
        rows: list[int] = []
        self._kept: list[np.ndarray] = []  # what the rows point to
        for table in tables:
            for at_some, first, masks, common, own in table.by_kinds():
                self._kept += (at_some, masks, common, *own)
                places = [x.ctypes.data for x in (at_some, masks, common, *own)]
                rows += [places[0], len(at_some), first, len(masks), *places[1:4]]
                rows += [len(own[0]), places[4]]
        self._rows = np.array(rows)
        self._given = self._rows.ctypes.data, len(rows) // _ROW
        if at_objects is not None:
            self._kept.append(at_objects)
            self.items = _items(*self._given, at_objects)

    def holds(self) -> bool:
        """Whether they are all the same still."""
        if self._native is not None:
            return self._native.same(*self._given) == 1
        return all(words.take(places).tobytes() == wanted for places, wanted in self._tables)

    def tensors(self) -> tuple[torch.Tensor, ...] | None:
        """The tensors, if all is the same still."""
        return self._native.again(self.items.ctypes.data)


_ROW = 9  # words of `struct rows` in C


def _items(tables: int, count: int, at_objects: np.ndarray) -> np.ndarray:
    """`struct items` in C: the addresses of objects, and what a tuple is made with."""
    functions = ctypes.pythonapi.PyTuple_New, ctypes.pythonapi.Py_IncRef
    made_with = (ctypes.cast(f, ctypes.c_void_p).value for f in functions)
    given = tables, count, at_objects.ctypes.data, len(at_objects), *made_with, TUPLE, id(None)
    return np.array(given, np.int64)


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
        type(t) in _PLAIN
        and t.layout is torch.strided
        and t.dim() <= _MAX_AXES
        and t.numel() > 0
        and t.is_leaf
        and not t._is_view()
        and not attributes(t)
        and not t._backward_hooks
        and not getattr(t, "_post_accumulate_grad_hooks", None)
    )


def attributes(x: torch.Tensor) -> dict[str, object]:
    """The attributes of a tensor. Most have none, and get no dict for them here: it would have to
    be looked into in each call."""
    if type(x) in _PLAIN and known():
        place = (id(x) - BASE) // 8
        if words.item(place + _VALUES) == words.item(place + _DICT) == 0:
            return {}
    return x.__dict__


# ---- is all of that so?


def zeros(*shape: int, **options: object) -> torch.Tensor:
    """Whatever the defaults are."""
    return torch.zeros(*shape, **{"dtype": torch.float32, "device": "cpu"} | options)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A context in which no mode of torch changes what its functions do."""
    with (
        torch._C.DisableTorchFunction(),
        torch._C._DisableTorchDispatch(),
        torch.enable_grad(),
        torch.inference_mode(False),
    ):
        yield


@functools.cache
def known() -> bool:
    """Whether the words are where they should be, in this process. Found out once, so what modes
    are active then does not matter."""
    if sys.implementation.name != "cpython" or sys.maxsize != (1 << 63) - 1:
        return False
    try:
        with undisturbed():
            return _pointers_are_there() and _facts_are_seen()
    except Exception:
        return False


@functools.cache
def fetched(native: memory.Native) -> bool:
    """Whether the objects of gradients, which nobody but their owners may have, are found from
    these, and C gives them as torch does."""
    with undisturbed():
        owner = torch.nn.Parameter(zeros(2))
        owner.grad = zeros(2)
        at_objects = np.array([id(owner), id(owner.grad)])
        (metas,) = at(np.array([owner._cdata]), (_META,))
        (impls,) = at(metas, (_GRAD,))
        if impls[0] != owner.grad._cdata or at(impls, (_OBJECT,))[0, 0] != at_objects[1]:
            return False
        gone = weakref.ref(owner.grad)
        held = native.again(_items(0, 0, at_objects).ctypes.data)
        if not (held[0] is owner and held[1] is owner.grad):
            return False
        owner.grad = None
        if gone() is None or held[1].tolist() != [0, 0]:
            return False
        del held
        return gone() is None


def _pointers_are_there() -> bool:
    """What leads from one object to the next; each is only followed when it was found."""
    t, other = _behind(zeros(3, 4)), {"a": 1}
    items = (other, t)
    if objects(items).tolist() != [id(other), id(t)]:
        return False
    attributes = t.__dict__
    of = np.array([id(t)])
    impl, values, place = at(of, (IMPL, _VALUES, _DICT))[:, 0].tolist()
    if (impl, values, place) != (t._cdata, 0, id(attributes)):
        return False
    if at(np.array([id(attributes), id(other)]), (_USED,)).tolist() != [[0, 1]]:
        return False
    impl = np.array([impl])
    storage, meta, offset = at(impl, (_STORAGE, _META, _OFFSET))[:, 0].tolist()
    if (storage, meta, offset) != (t.untyped_storage()._cdata, 0, 4):
        return False
    (data,) = at(np.array([storage]), (_DATA,))[:, 0].tolist()
    t.requires_grad_()
    (meta,) = at(impl, (_META,))[:, 0].tolist()
    return data == t.untyped_storage().data_ptr() and meta != 0


def _behind(x: torch.Tensor) -> torch.Tensor:
    """A tensor of the memory behind a row of 4, which is no view."""
    return zeros(0).set_(x.untyped_storage(), 4, (x.shape[0] - 1, 4), (4, 1))


def _facts_are_seen() -> bool:
    """Tensors that differ in one fact differ here, and others do not."""
    weight = lambda *shape: torch.nn.Parameter(zeros(*shape or (3, 4)))  # noqa: E731
    trained, plain = Group((weight(),)), Group((zeros(3, 4),))

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
            torch.nn.Parameter(zeros(4, 3).t()),
            torch.nn.Parameter(zeros(3, 4, dtype=torch.float64)),
            torch.nn.Parameter(zeros(3, 4, dtype=torch.float16)),
            torch.nn.Parameter(zeros(3, 4, device="meta")),
            *(weight().data, weight() * 2, weight().view(3, 4)),
            changed(lambda x: x.requires_grad_(False)),
            changed(lambda x: x.register_hook(lambda g: g)),
            changed(lambda x: x.register_post_accumulate_grad_hook(lambda p: None)),
            changed(lambda x: setattr(x, "note", 1)),
            changed(renamed),
            changed(lambda x: setattr(x, "data", zeros(4, 3).t())),
        )
    ]
    others += [
        (plain, x)
        for x in (
            zeros(3, 4, dtype=torch.int32),
            zeros(3, 4, requires_grad=True),
            torch._neg_view(zeros(3, 4)),
            zeros(4, 3).t(),
            torch._lazy_clone(zeros(3, 4)),
        )
    ]
    same = [(trained, weight()), (trained, changed(lambda x: x.data.add_(1)))]
    same += [(plain, _behind(zeros(4, 4))), (plain, zeros(3, 4).add_(1))]
    return all(group.addresses((x,)) is None for group, x in others) and all(
        group.addresses((x,)) == [x.data_ptr()] for group, x in same
    )
