"""Whether the code that is known of uses what is in a place only in certain ways, by its name.

So it is told what may stand in the place of a list while a step is traced (`python/tables.py`,
`python/histories.py`), and which lists a step only appends to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import CodeType

from tracejit.capture.effects.variables import ASSIGNED, Record, Variable
from tracejit.capture.python.bytecode import dynamic
from tracejit.capture.python.histories import LOOKS
from tracejit.capture.python.origins import origin
from tracejit.capture.python.tables import SHOWS_NOTHING
from tracejit.capture.python.texts import keyed_otherwise
from tracejit.capture.python.uses import Named, used_only, uses

APPENDED = frozenset({"append"})  # what may be done with a record
# where dicts are, by identity; None: in more than one place, or where code has no name for it
Places = Mapping[int, Variable | None]
KEYED = frozenset({"key assigned"})  # with a dict that is one
LOOKED_AT = APPENDED | LOOKS  # and with one that a history stands for


def only_used_so(
    place: Variable,
    places: Places,
    codes: Collection[CodeType],
    allowed: Collection[str],
) -> bool:
    """Whether code that is not torch's does nothing with what is in a place but what is `allowed`
    (see `used_only`)."""
    mine = _of_the_user(codes)
    return not any(map(dynamic, mine)) and _allow(mine, _names(place, places), allowed)


def only_keyed_by_texts(place: Variable, places: Places, codes: Collection[CodeType]) -> bool:
    """Whether code does nothing with the dict in a place but to put something into it by keys that
    are texts whose parts are known."""
    names = {*_names(place, places)}
    others = (keyed_otherwise(code) for code in _of_the_user(codes))
    return only_used_so(place, places, codes, KEYED) and all(map(names.isdisjoint, others))


def _of_the_user(codes: Iterable[CodeType]) -> list[CodeType]:
    return [code for code in codes if origin(code) not in ("torch", "tracejit")]


def _allow(codes: Iterable[CodeType], names: Sequence[Named], allowed: Collection[str]) -> bool:
    """Whether there are names, and code does only what is allowed with what is under them."""
    return bool(names) and all(used_only(c, name, allowed) for c in codes for name in names)


def _names(place: Variable, places: Places) -> list[Named]:
    """What code may call what is in a place; nothing if that cannot be told. An item of a dict is
    under the dict's name."""
    key = None
    if id(place.holder) in places:
        above, key = places[id(place.holder)], place.key
        if above is None or id(above.holder) in places:
            return []
        place = above
    name = place.path if place.is_cell else place.key
    if type(name) is not str or type(key) not in (str, int, type(None)):
        return []
    kinds = ("global", "attribute") if place.kind == "global" else (place.kind,)
    return [Named(kind, name, key) for kind in kinds]


def tables_among(
    tables: Iterable[Sequence[Variable | None]], of_dicts: Places, codes: Collection[CodeType]
) -> list[Variable]:
    """Of the places of each table, those of tables that code looks something up in, and does
    nothing else, by all names that they have."""
    mine = _of_the_user(codes)
    if any(map(dynamic, mine)):
        return []
    loaded = frozenset[Named]().union(*map(uses, mine))

    def may_stand(places: Sequence[Variable | None]) -> bool:
        if any(place is None or type(place.holder) not in ASSIGNED for place in places):
            return False
        names = [_names(place, of_dicts) for place in places]
        used = any(not loaded.isdisjoint(some) for some in names)
        return used and all(_allow(mine, some, SHOWS_NOTHING) for some in names)

    return [place for places in tables if may_stand(places) for place in places]


def looked_at(
    records: Sequence[Record],
    of_dicts: Places,
    codes: Collection[CodeType],
    remade: Collection[str],
) -> list[Record]:
    """The records, and whether code looks at them, in ways that can be followed only. One that the
    step makes anew is a state variable too."""

    def looks(place: Variable) -> bool:
        if place.path in remade or only_used_so(place, of_dicts, codes, APPENDED):
            return False
        return only_used_so(place, of_dicts, codes, LOOKED_AT)

    return [replace(record, looked_at=looks(record.place)) for record in records]
