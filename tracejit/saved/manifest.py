"""A SavedStep as the entries of a file, and back: a manifest, texts of graphs, tensors.

    manifest.json             what there is, where inputs come from, a digest of every other entry
    plans/0/graph.txt         the graph as captured
    plans/0/effects.txt       what a call does besides
    plans/0/host.txt          the arithmetic of runtime scalars, as a graph
    plans/0/checks.txt        what must not hold of computed values, as a graph, if there is such
    state.safetensors         parameters, buffers, gradients, optimizer state
    generators.safetensors    the states of the user's own random generators
    objects/…                 what was compiled of it, if that was asked for (`objects.py`)
    signature.txt             an HMAC of the manifest, where there are objects
    shown/…                   plans and kernels as they were, for people: nothing of it is read

`read` believes nothing: it parses, and `soundness.py` looks at what it makes of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial

import torch

from tracejit.errors import TracejitError
from tracejit.runtime.cache import Bodies
from tracejit.saved import objects
from tracejit.saved.archive import Damaged
from tracejit.saved.fields import Item, number_text, read_json
from tracejit.saved.plans import plan_entries, read_plan
from tracejit.saved.record import VERSION, SavedGenerator, SavedStep
from tracejit.saved.schedules import SavedSchedules, read_schedules, schedules_json
from tracejit.saved.soundness import check_step
from tracejit.saved.tensors import can_lie, laid_out, pack, unpack

FORMAT = "tracejit saved step"
MANIFEST, STATE, GENERATORS, SHOWN = (
    *("manifest.json", "state.safetensors", "generators.safetensors"),
    "shown/",
)


def entries_of(step: SavedStep, made_by: str, compiled: Bodies | None = None) -> dict[str, bytes]:
    """The entries of a file; with what was `compiled` of it, and then with a signature."""
    entries: dict[str, bytes] = {}
    plans = []
    for i, plan in enumerate(step.plans):
        said, texts = plan_entries(plan)
        plans.append(said)
        entries |= {f"plans/{i}/{name}": text.encode() for name, text in texts.items()}
    entries[STATE] = pack(step.tensors)
    own = {f"{k}": g.state for k, g in enumerate(step.generators) if g.state is not None}
    entries[GENERATORS] = pack(own)
    entries |= {SHOWN + name: text.encode() for name, text in step.texts.items()}
    listed, more = objects.entries_of(compiled or {})
    entries |= more
    generators = [{"device": g.device, "own": g.state is not None} for g in step.generators]
    manifest = {
        "format": FORMAT,
        "version": list(VERSION),
        "made_by": made_by,
        "name": step.name,
        "options": dict(step.options),
        "numbers": {name: number_text(x) for name, x in step.numbers.items()},
        "state": {
            name: {
                "strides": list(t.stride()),
                "requires_grad": t.requires_grad,
                "grad": step.gradients.get(name),
            }
            for name, t in step.tensors.items()
        },
        "generators": generators,
        **({"schedules": schedules_json(step.schedules)} if step.schedules.schedulers else {}),
        **({"lists": list(step.lists)} if step.lists else {}),
        **({"asked": dict(step.asked)} if step.asked else {}),
        "plans": plans,
        **({"objects": listed} if listed else {}),
        "entries": {name: _digest(content) for name, content in entries.items()},
    }
    content = _lines(manifest).encode()
    signed = objects.signature(content, create=True) if listed else None
    with_signature = {} if signed is None else {objects.SIGNATURE: signed}
    return {MANIFEST: content, **entries, **with_signature}


def _lines(manifest: dict[str, object]) -> str:
    """JSON with a line for each item of what the manifest has."""
    written = partial(json.dumps, ensure_ascii=False, allow_nan=False)
    parts = []
    for name, value in manifest.items():
        text = written(value)
        if name != "version" and isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(written, value)) + "\n ]"
        elif isinstance(value, dict) and value:
            items = (f"{written(key)}: {written(x)}" for key, x in value.items())
            text = "{\n  " + ",\n  ".join(items) + "\n }"
        parts.append(f" {written(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def objects_of(entries: Mapping[str, bytes], *, trust: bool) -> tuple[Bodies, str]:
    """What was compiled of the step of a file that `step_of` has read, if it is to be used; else
    why not, where there is such."""
    said = read_json(entries[MANIFEST], MANIFEST).items()
    if "objects" not in said:
        return {}, ""
    names = objects.names_of(said["objects"])
    why = objects.why_not_trusted(entries[MANIFEST], entries.get(objects.SIGNATURE))
    if why and not trust:
        return {}, why
    return objects.bodies_of(names, entries), ""


def step_of(entries: Mapping[str, bytes]) -> SavedStep:
    """The step that a file keeps. Raises Damaged, or InvalidGraph where a text is no graph."""
    signed = objects.SIGNATURE
    entries = {name: content for name, content in entries.items() if name != signed}
    if MANIFEST not in entries:
        raise Damaged(f"it has no {MANIFEST}: it is no saved step")
    item = read_json(entries[MANIFEST], MANIFEST)
    _check_version(item)
    said = item.table(
        *("format", "version", "made_by", "name", "options", "numbers", "state"),
        *("generators", "plans", "entries"),
        more=("schedules", "objects", "lists", "asked"),
    )
    _check_entries(said["entries"], entries)
    names = [x for _, _, x in objects.names_of(said["objects"])] if "objects" in said else []
    if names != objects.only_objects(entries):
        raise Damaged("it has other objects than the manifest")
    state = unpack(entries[STATE])
    listed = said["state"].items()
    if listed.keys() != state.keys():
        raise Damaged(f"{STATE} has other tensors than the manifest")
    tensors = {name: _laid_out(state[name], entry) for name, entry in listed.items()}
    options = said["options"].table("fuse", "remat", "precision")
    numbers = {name: x.number() for name, x in said["numbers"].items().items()}
    schedules = SavedSchedules()
    if "schedules" in said:
        schedules = read_schedules(said["schedules"], numbers)
    step = SavedStep(
        name=said["name"].text(),
        options={
            "fuse": options["fuse"].flag(),
            "remat": options["remat"].text("auto", "none"),
            "precision": options["precision"].text("highest", "high", "medium"),
        },
        numbers=numbers,
        schedules=schedules,
        lists=tuple(x.text() for x in said["lists"].rows()) if "lists" in said else (),
        asked=_texts(said["asked"]) if "asked" in said else {},
        tensors=tensors,
        gradients={
            name: entry["grad"].text(*tensors)
            for name, entry in listed.items()
            if entry["grad"].value is not None
        },
        generators=_generators(said["generators"], unpack(entries[GENERATORS])),
        plans=tuple(
            read_plan(plan, _texts_of(i, entries)) for i, plan in enumerate(said["plans"].rows())
        ),
        texts={
            name.removeprefix(SHOWN): content.decode()
            for name, content in entries.items()
            if name.startswith(SHOWN)
        },
    )
    try:
        check_step(step)
    except TracejitError as error:
        raise Damaged(str(error)) from error
    return step


def _texts(item: Item) -> dict[str, str]:
    return {name: x.text() for name, x in item.items().items()}


def _check_version(manifest: Item) -> None:
    """Raise an error for what no version of this format is, and for later ones."""
    table = manifest.items()
    if "format" not in table or table["format"].value != FORMAT:
        raise Damaged("it is no saved step: its manifest names another format")
    if "version" not in table:
        raise Damaged("it does not say which version of the format it has")
    major, minor = (x.whole() for x in table["version"].rows(2))
    if (major, minor) > VERSION:
        raise Damaged(
            f"it has version {major}.{minor} of the format, and this tracejit reads up to "
            f"{VERSION[0]}.{VERSION[1]}: load it with the tracejit that wrote it, or a later one"
        )
    if major != VERSION[0]:
        raise Damaged(f"there is no version {major}.{minor} of the format")


def _check_entries(listed: Item, entries: Mapping[str, bytes]) -> None:
    """Every entry is as it was when the file was written, and there is no other."""
    digests = listed.items()
    if digests.keys() | {MANIFEST} != entries.keys():
        odd = sorted(digests.keys() ^ entries.keys() ^ {MANIFEST})
        raise Damaged(f"its manifest lists other entries than it has: {', '.join(odd)[:200]}")
    for name in (STATE, GENERATORS):
        if name not in entries:
            raise Damaged(f"it has no {name}")
    for name, digest in digests.items():
        if _digest(entries[name]) != digest.value:
            raise Damaged(f"{name} is another one than the manifest was written for")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _texts_of(index: int, entries: Mapping[str, bytes]) -> dict[str, str]:
    prefix = f"plans/{index}/"
    return {
        name.removeprefix(prefix): content.decode()
        for name, content in entries.items()
        if name.startswith(prefix)
    }


def _laid_out(tensor: torch.Tensor, entry: Item) -> torch.Tensor:
    """A tensor with the strides and the requires_grad that it had."""
    said = entry.table("strides", "requires_grad", "grad")
    strides = said["strides"].wholes()
    if strides != tensor.stride():
        if len(strides) != tensor.dim() or not can_lie(tensor.shape, strides):
            raise entry.wrong(f"the strides of a tensor of shape {list(tensor.shape)}")
        tensor = laid_out(tensor, strides)
    wants = said["requires_grad"].flag()
    if wants and not tensor.is_floating_point():
        raise entry.wrong("a tensor of floats, if it requires grad")
    return tensor.requires_grad_(wants)


def _generators(listed: Item, states: Mapping[str, torch.Tensor]) -> tuple[SavedGenerator, ...]:
    found = []
    for k, item in enumerate(listed.rows()):
        said = item.table("device", "own")
        own = said["own"].flag()
        if own != (f"{k}" in states):
            raise item.wrong("a generator whose state is in the file if it is one's own")
        found.append(SavedGenerator(said["device"].text(), states[f"{k}"] if own else None))
    if len(states) != sum(g.state is not None for g in found):
        raise Damaged(f"{GENERATORS} has other generators than the manifest")
    return tuple(found)
