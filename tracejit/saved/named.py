"""Classes of tuples with names, which a step returns: their names and fields, in a file.

A class of the user's comes back as a namedtuple of the same name and fields; torch's own as itself.
"""

from __future__ import annotations

from collections import namedtuple

import torch

from tracejit.saved.fields import Item
from tracejit.saved.sound_graphs import NAME

_MOST = 1000


def kind_json(kind: type) -> dict[str, object]:
    """A class for the manifest."""
    if hasattr(kind, "_fields"):
        return {"named": kind.__name__, "fields": list(kind._fields)}
    return {"of_torch": kind.__name__}


def read_kind(item: Item) -> type:
    """A class of a manifest. Raises Damaged, and ValueError for names that no field has."""
    if item.value.keys() == {"of_torch"}:
        name = item["of_torch"].text()
        kind = vars(torch.return_types).get(name)
        if not (isinstance(kind, type) and issubclass(kind, tuple)):
            raise item.wrong("a class of results of torch")
        return kind
    said = item.table("named", "fields")
    names = [said["named"].text(), *(x.text() for x in said["fields"].rows())]
    if len(names) > _MOST or not all(map(NAME.fullmatch, names)):
        raise item.wrong("a class of tuples with names")
    return namedtuple(names[0], names[1:])


def width(kind: type) -> int:
    """How many items a tuple of such a class has."""
    return len(kind._fields) if hasattr(kind, "_fields") else kind.n_fields
