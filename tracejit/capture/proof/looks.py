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
from tracejit.capture.python.uses import Named, used_only

APPENDED = frozenset({"append"})  # what may be done with a record
# where dicts are, by identity; None: in more than one place, or where code has no name for it
Places = Mapping[int, Variable | None]
LOOKED_AT = APPENDED | LOOKS  # and with one that a history stands for


def only_used_so(
    place: Variable,
    places: Places,
    codes: Collection[CodeType],
    allowed: Collection[str],
) -> bool:
    """Whether code that is not torch's does nothing with what is in a place but what is `allowed`
    (see `used_only`). An item of a dict is under the dict's name."""
    key = None
    if id(place.holder) in places:
        above, key = places[id(place.holder)], place.key
        if above is None or id(above.holder) in places:
            return False
        place = above
    name = place.path if place.is_cell else place.key
    if type(name) is not str or type(key) not in (str, int, type(None)):
        return False
    kinds = ("global", "attribute") if place.kind == "global" else (place.kind,)
    mine = [code for code in codes if origin(code) not in ("torch", "tracejit")]
    return not any(map(dynamic, mine)) and all(
        used_only(code, Named(kind, name, key), allowed) for code in mine for kind in kinds
    )


def tables_among(
    tables: Iterable[Sequence[Variable | None]], of_dicts: Places, codes: Collection[CodeType]
) -> list[Variable]:
    """Of the places of each table, those of tables that code only looks something up in, by all
    names that they have."""

    def looked_up(place: Variable | None) -> bool:
        may_stand = place is not None and type(place.holder) in ASSIGNED
        return may_stand and only_used_so(place, of_dicts, codes, SHOWS_NOTHING)

    return [place for places in tables if all(map(looked_up, places)) for place in places]


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
