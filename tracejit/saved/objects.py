"""What was compiled of a step, in its file: plans and libraries, for one kind of machine.

    SavedStep → `gathered` → Bodies ↔ entries of the file;  Bodies → the disk cache's `provide`

They are entries of the disk cache, which are found by digests of all that they depend on: the
kernel's text, the compiler and its flags, the CPU and its features, the sources of this package. On
another machine there are none by these keys, and kernels are compiled as for any file.

An address in a plan is code, and so is a library. So they are looked at only in a file that is
signed by a key of this user's, or where the caller says that it is to be trusted. A signature is an
HMAC of the manifest, which has a digest of every other entry.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterator, Mapping

import torch

from tracejit.ir.torch_types import TO_TORCH
from tracejit.pipeline import Pipeline
from tracejit.runtime.cache import Bodies, DiskCache, noting
from tracejit.runtime.memory import Memory
from tracejit.saved.fields import Item
from tracejit.saved.loaded_plan import LoadedPlan

SIGNATURE = "signature.txt"
FOLDER = "objects/"
_KEY = "signing.key"
_SUFFIX = {"plan": ".txt", "cpu": ".txt", "kernel": ".txt", "c": ".so"}
_HEX = frozenset("0123456789abcdef")


def gathered(plans: list[LoadedPlan], pipeline: Pipeline, precision: str) -> Bodies:
    """What the cache has, or has got, of all that these plans need: they are compiled."""
    with noting() as found:
        for plan in plans:
            for stage in plan.prepared(_like(plan)):
                stage.build()
            c = plan.captured
            executor = pipeline.executor(c.graph, precision)
            checks = () if c.checks is None else (c.checks.graph,)
            for graph in (*checks, *(node.graph for node in c.effects.outside)):
                pipeline.build(graph, executor, Memory(), counted=False)
    return {at: body for at, body in found.items() if at[0] in _SUFFIX}


def _like(plan: LoadedPlan) -> list[torch.Tensor]:
    """Tensors that are like the inputs of a plan."""
    made = []
    for _, spec in plan.plan.tensors:
        kind = {"dtype": TO_TORCH[spec.dtype], "device": spec.device}
        made.append(torch.empty_strided(spec.shape, spec.strides, **kind))
    return made


def entries_of(bodies: Bodies) -> tuple[list[list[str]], dict[str, bytes]]:
    """What the manifest says of objects, and their entries."""
    listed, entries = [], {}
    for i, ((kind, key), body) in enumerate(bodies.items()):
        name = f"{FOLDER}{i}{_SUFFIX[kind]}"
        listed.append([kind, key, name])
        entries[name] = base64.b64decode(body) if kind == "c" else body.encode()
    return listed, entries


def names_of(listed: Item) -> list[tuple[str, str, str]]:
    """The objects that a manifest lists: kind, key, entry. Raises Damaged."""
    found = []
    for row in listed.rows():
        kind, key, name = (x.text() for x in row.rows(3))
        known = kind in _SUFFIX and len(key) == 64 and {*key} <= _HEX
        if not known or name != f"{FOLDER}{len(found)}{_SUFFIX[kind]}":
            raise row.wrong("an object")
        found.append((kind, key, name))
    return found


def bodies_of(names: list[tuple[str, str, str]], entries: Mapping[str, bytes]) -> Bodies:
    """The objects of a file that is trusted."""
    return {(kind, key): _body(kind, entries[name]) for kind, key, name in names}


def _body(kind: str, content: bytes) -> str:
    return base64.b64encode(content).decode() if kind == "c" else content.decode()


def signature(manifest: bytes, *, create: bool) -> bytes | None:
    """The signature of a manifest by this user's key; None where there is no key."""
    key = DiskCache().secret(_KEY, create=create)
    if key is None:
        return None
    return hmac.new(key, manifest, hashlib.sha256).hexdigest().encode()


def why_not_trusted(manifest: bytes, signed: bytes | None) -> str:
    """Why the objects of a file are not used; nothing if its signature is this user's."""
    if signed is None:
        return "it is not signed"
    expected = signature(manifest, create=False)
    if expected is None:
        return "there is no key in the cache directory to tell who signed it"
    return "" if hmac.compare_digest(signed, expected) else "it is signed by another key"


def only_objects(names: Iterator[str]) -> list[str]:
    """The names of entries that are objects."""
    return [name for name in names if name.startswith(FOLDER)]
