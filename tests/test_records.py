"""Our dataclasses behave as those of `dataclasses`, whose text is the same."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from dataclasses import FrozenInstanceError, field

import pytest

from tracejit import records

HOW = [
    {},
    {"frozen": True},
    {"slots": True},
    {"frozen": True, "slots": True},
    {"eq": False},
    {"frozen": True, "eq": False, "slots": True},
]


def defined(dataclass: Callable, how: dict) -> tuple[type, type, type]:
    @dataclass(**how)
    class Base:
        a: int
        b: str = "b"
        c: list = field(default_factory=list, repr=False)
        d: float = field(default=0.5, compare=False)
        e: int = field(default=3, kw_only=True)
        f: int = field(default=7, init=False)

    @dataclass(**how)
    class Derived(Base):
        a: int = 1
        g: tuple = ()
        h: list = field(init=False, default_factory=lambda: ["h"])

        def __post_init__(self):
            self.c.append(self.a)

    @dataclass(**how)
    class Own:
        """It has methods of its own."""

        a: int

        def __repr__(self):
            return "own"

        def __eq__(self, other):
            return isinstance(other, int) and self.a == other

        def __hash__(self):
            return 5

    return Base, Derived, Own


def outcome(function: Callable, *args: object, **kwargs: object) -> object:
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error).replace("defined.<locals>.", "")


def delete(x: object) -> None:
    del x.a


def assign(name: str) -> Callable[[object], None]:
    return lambda x: setattr(x, name, 9)


ASKED = {
    "repr": repr,
    "fields": lambda x: [(f.name, f.type, f.init, f.kw_only) for f in dataclasses.fields(x)],
    "asdict": dataclasses.asdict,
    "replaced": lambda x: repr(dataclasses.replace(x, a=8)),
    "copied": lambda x: (repr(copy.copy(x)), repr(copy.deepcopy(x))),
    "equal": lambda x: (x == copy.copy(x), x == dataclasses.replace(x, a=-1), x == 1, x != 1),
    "hashed": lambda x: hash(x) == hash(copy.copy(x)),
    "assigned": lambda x: (assign("a")(x), x.a),
    "another attribute": lambda x: (assign("z")(x), x.z),
    "deleted": delete,
    "a dict": lambda x: getattr(x, "__dict__", None) is not None,
    "a pattern": lambda x: type(x).__match_args__,
}
GIVEN = [
    ((), {}),
    ((1,), {}),
    ((1, "x"), {"d": 2.0, "e": 4}),
    ((1, "x", [2], 3.0, 4, 5, 6), {}),
    ((1,), {"f": 2}),
    ((1,), {"unknown": 2}),
    ((1,), {"a": 2}),
]


@pytest.mark.parametrize("how", HOW, ids=lambda how: " ".join(how) or "plain")
@pytest.mark.parametrize("asked", ASKED)
def test_they_are_as_the_standard_ones(how, asked):
    ours, theirs = defined(records.dataclass, how), defined(dataclasses.dataclass, how)
    for mine, its in zip(ours, theirs, strict=True):
        for args, kwargs in GIVEN:
            x, y = outcome(mine, *args, **kwargs), outcome(its, *args, **kwargs)
            if isinstance(y, tuple):
                assert x == y
                continue
            if asked == "another attribute" and {"frozen", "slots"} <= how.keys():
                with pytest.raises(FrozenInstanceError):  # theirs is a TypeError about super()
                    x.z = 9
                continue
            got, expected = outcome(ASKED[asked], x), outcome(ASKED[asked], y)
            assert str(got) == str(expected), (asked, args, kwargs)
        assert (mine.__doc__ is None) == (its.__doc__ is None)
        assert mine.__qualname__ == its.__qualname__


@records.record
class Point:
    x: int
    y: int = 0


@records.dataclass(slots=True)
class Cell:
    """A cell."""

    inside: object = None


@pytest.mark.parametrize("made", [Point(1, y=2), Cell([1]), Cell(Point(3))])
def test_they_are_pickled(made):
    assert pickle.loads(pickle.dumps(made)) == made


def test_a_record_stays_as_it_is():
    point = Point(1)
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'x'"):
        point.x = 2
    with pytest.raises(FrozenInstanceError, match="cannot delete field 'y'"):
        del point.y
    assert point == Point(1, 0) and len({point, Point(1)}) == 1


def test_what_holds_itself_is_shown():
    cell = Cell()
    cell.inside = cell
    assert repr(cell) == "Cell(inside=...)"


def test_first_objects_in_threads():
    for _ in range(50):

        @records.record
        class Fresh:
            x: int
            y: list = field(default_factory=list)

        found, barrier = [], threading.Barrier(4)

        def make(i: int, cls=Fresh, found=found, barrier=barrier):
            barrier.wait()
            found.append(cls(i))

        threads = [threading.Thread(target=make, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(f.x for f in found) == [0, 1, 2, 3]
