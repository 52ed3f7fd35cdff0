"""What a step may do that no ONNX model can: found before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import CellType

from tracejit.capture.effects.effects import Given, HostSlot
from tracejit.capture.trace.draws import Called, Draw, Together
from tracejit.errors import CannotExport
from tracejit.export.onnx.step import Traced
from tracejit.export.onnx.translate import REFUSED
from tracejit.ir.graph import Node, Value
from tracejit.saved.save import entry_of

FIRST = "Call the step once or twice before you export it"


def refuse_operations(nodes: Iterable[Node]) -> None:
    """Raise CannotExport for the first primitive without a counterpart."""
    for node in nodes:
        if node.op.name in REFUSED:
            reason, remedy = REFUSED[node.op.name]
            where = node.where or "<unknown>"
            raise CannotExport(where=where, what=node.op.name, reason=reason, remedy=remedy)


def refuse_what_no_file_keeps(t: Traced) -> None:
    """Raise CannotExport for such effects."""
    c, effects = t.captured, t.captured.effects
    if any(x.is_complex() for x in t.call.reals) or effects.has_complex:
        raise t.refuse(
            "it reads or returns complex tensors", "Give it and return torch.view_as_real of them"
        )
    for cut in c.cuts:
        if cut.search is not None:
            raise t.refuse(
                "the shapes of what it computes depend on which elements it finds there",
                cut.search.remedy or "Draw outside of the step",
                cut.where,
            )
    if c.opaque:
        raise t.refuse(c.opaque[0], "A file keeps no Python")
    if effects.callbacks:
        raise t.refuse(
            "it steps a learning-rate scheduler, which is Python",
            "Step the scheduler outside, and give its rate to the model",
        )
    if effects.escaped:
        raise t.refuse(
            "it puts a tensor that it has computed into an object of yours, as the first call of a "
            "step does that makes the state of an optimizer",
            f"{FIRST}; return the tensor, if it is another one",
        )
    if effects.flags:
        raise t.refuse("it changes the requires_grad of a tensor from outside", "Do that outside")
    for event in c.draws:
        if isinstance(event, Called):
            module = t.call.generators[event.generator].module
            raise t.refuse(
                f"it draws a number by {module}.{event.function}",
                "Draw it outside and pass it as an argument",
            )
        if not isinstance(event, (Draw, Together)):
            raise t.refuse("it sets the state of a random generator", "Do that outside")
    stored_numbers(t)


def stored_numbers(t: Traced) -> list[tuple[int, int]]:
    """The runtime scalars that the step itself changes, and the host results that they become."""
    found, c = [], t.captured
    for holder, key, tree in c.effects.stores:
        path = "entry", holder, key
        now = None if key is ... else entry_of(t.call.holders[holder], key)
        if isinstance(tree, HostSlot) and type(now) in (int, float):
            if path in c.paths:  # else the step reads it nowhere
                found.append((c.paths.index(path), tree.index))
        elif not isinstance(tree, Given) or key is ... or c.given[tree.index] != now:
            at = "a variable" if isinstance(t.call.holders[holder], CellType) else repr(key)
            raise t.refuse(
                f"it stores something in an object of yours ({at})",
                f"{FIRST}; return what it stores, and store it outside",
            )
    return found


def frozen_numbers(t: Traced, changed: Collection[int]) -> frozenset[int]:
    """The runtime scalars that decisions of the Python depend on: a model, which goes one way, has
    them as constants."""
    c = t.captured
    producers = {node.out: node for node in c.host_nodes}
    scalars = {value: k for k, value in enumerate(c.scalars)}
    found: set[int] = set()
    pending = [x for p in c.predicates for x in (p.left, p.right) if isinstance(x, Value)]
    seen: set[Value] = set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in producers:
            pending += producers[value].inputs
        elif value in scalars:
            found.add(scalars[value])
    stored = {k for k, _ in stored_numbers(t)}
    for k in found:
        path = c.paths[k]
        if path[0] == "cut":
            where = c.cuts[path[1]].where
            raise t.refuse(
                "its Python decides by a value that it reads there, and a model goes one way",
                "Compute both, and choose by torch.where",
                where,
            )
        is_item = path[0] == "item"
        varies = is_item and (path[1] in changed or t.is_argument(t.call.reals[path[1]]))
        if varies or k in stored:
            name = t.tensor_name(path[1]) if is_item else t.names.scalar(path, t.call)
            raise t.refuse(
                f"its Python decides by {name}, which varies, and a model goes one way",
                "Compute both, and choose by torch.where",
            )
    return frozenset(found)
