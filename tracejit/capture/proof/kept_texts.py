"""Texts of runtime scalars that a step keeps (`python/kept.py`): whether nobody reads them.

A replay makes such a text anew, and what was in its place before is not asked. That is right if no
code that ran reads the place, and if nothing is put there but such texts.
"""

from __future__ import annotations

import dis
import functools
from types import CodeType, SimpleNamespace

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import Call, Joined
from tracejit.capture.effects.variables import Variable
from tracejit.capture.proof.heap import Walk
from tracejit.capture.proof.looks import APPENDED, only_keyed_by_texts, only_used_so
from tracejit.capture.proof.watch import Seen, origin
from tracejit.capture.python.texts import returns_text, stored_of_calls, stores_otherwise

_ASSIGNED = frozenset({"assigned"})


def kept_texts(captured: Captured, call: Call) -> list[Variable]:
    """The places, but for ends of lists and dicts, where a step keeps text of runtime scalars."""
    stores = captured.effects.stores
    joined = [(i, key) for i, key, tree in stores if type(tree) is Joined]
    joined = [(i, key) for i, key in joined if key is not ... and type(key) is not Joined]
    return [Variable(call.holders[i], key, repr(key)) for i, key in joined]


def read_texts(walk: Walk, ran: Seen, captured: Captured, call: Call) -> list[str]:
    """Why a replay cannot make the texts of runtime scalars that a step keeps."""
    mine = [code for code in ran.codes if origin(code) == "user"]
    spaces = [x.__dict__ for x in walk.seen(SimpleNamespace)]

    def is_alone(place: Variable) -> bool:
        if any(place.key in stores_otherwise(code) for code in mine):
            return False
        called = {name for code in mine for name in stored_of_calls(code, place.key)}
        made_by = [code for code in mine if code.co_name in called]
        if {code.co_name for code in made_by} != called or not all(map(returns_text, made_by)):
            return False
        if any(place.holder is x for x in spaces) and any(map(_compares, mine)):
            return False  # which reads all of it
        return only_used_so(place, walk.places, ran.codes, _ASSIGNED)

    def is_record(items: object) -> bool:
        found = [record.place for record in walk.records if record.items is items]
        if type(items) is dict:
            return any(only_keyed_by_texts(x, walk.places, ran.codes) for x in found)
        return any(only_used_so(x, walk.places, ran.codes, APPENDED) for x in found)

    places = [place for place in kept_texts(captured, call) if not is_alone(place)]
    stores = captured.effects.stores
    ends = [i for i, key, tree in stores if type(tree) is Joined and key is ...]
    ends += [i for i, key, _ in stores if type(key) is Joined]
    if not all(is_record(call.holders[i]) for i in ends):
        return ["it puts text of a number into a list or dict that it also reads"]
    return [
        f"it makes text of a number for {place.path}, and uses what is there" for place in places
    ]


@functools.cache
def _compares(code: CodeType) -> bool:
    """Whether code may ask if two objects are equal."""
    return any(
        x.opname == "CONTAINS_OP" or (x.opname == "COMPARE_OP" and x.argval in ("==", "!="))
        for x in dis.get_instructions(code)
    )
