"""Records: frozen dataclasses with slots that are made quickly."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace

import pytest

from tracejit.records import record


@record
class Pair:
    left: int
    right: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reference:
    left: int
    right: tuple[int, ...] = ()


def test_a_record_is_a_frozen_dataclass():
    for made in (Pair(1, (2,)), Pair(left=1, right=(2,)), replace(Pair(3, (2,)), left=1)):
        assert made == Pair(1, (2,))
        assert hash(made) == hash(Reference(1, (2,)))
        assert repr(made) == "Pair(left=1, right=(2,))"
        assert copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made
    assert Pair(1).right == ()
    assert [f.name for f in fields(Pair)] == ["left", "right"]
    assert not hasattr(Pair(1), "__dict__")
    with pytest.raises(FrozenInstanceError):
        Pair(1).left = 2


def test_a_record_asks_for_its_fields():
    for args in ((), (1, 2, 3)):
        with pytest.raises(TypeError, match=r"Pair.__init__\(\)"):
            Pair(*args)


def test_a_record_has_no_fields_that_are_made_anew():
    with pytest.raises(TypeError, match="items is no field of a record"):

        @record
        class Wrong:
            items: list = field(default_factory=list)
