"""One call of a step as pure data for the export: what it reads, computes and changes, with names.

In: a step and the arguments of a call. Out: a `Traced` step. Its Python runs at least twice, and
what two runs decide differently is refused, as a file keeps no Python. No tensor, optimizer or
scheduler is changed.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType

import torch

from tracejit.capture.capture import capture_call
from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import Call
from tracejit.capture.names import Names
from tracejit.capture.python.changes import Compared
from tracejit.capture.python.leftovers import kept, make_plain
from tracejit.capture.trace.scalars import Path
from tracejit.captured import plain_step, refuse_inside
from tracejit.errors import CannotExport
from tracejit.export.onnx.composites import Composite, Listener
from tracejit.ir.graph import Node, Value
from tracejit.records import dataclass

TRACES = 4  # of which two in succession have to agree


@dataclass
class Traced:
    """A captured call, its names, and its arguments: tensors and floats."""

    name: str
    where: str  # the step's line
    captured: Captured
    call: Call
    names: Names
    composites: dict[Value, Composite]
    arguments: list[tuple[Path, torch.Tensor | float]]
    of_module: bool

    def refuse(self, reason: str, remedy: str, where: str = "") -> CannotExport:
        """The error that a file cannot have this."""
        return CannotExport(where=where or self.where, what=self.name, reason=reason, remedy=remedy)

    def shown(self, name: str | None, otherwise: str) -> str:
        """A name as the model has it: of a module, those of its own parameters and arguments."""
        if name is None:
            return otherwise
        if not self.of_module:
            return name
        return re.sub(r"^kwargs\['(\w+)'\]", r"\1", name.removeprefix("self."))

    def is_argument(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is an argument of the call."""
        return any(tensor is x for _, x in self.arguments)

    def tensor_name(self, index: int) -> str:
        """Of the `index`-th tensor from outside."""
        known = self.names.tensors.get(id(self.call.reals[index]))
        return self.shown(known, f"input_{index}")

    def nodes(self) -> list[Node]:
        """All nodes, of the step, of what Python reads in it, and of the host's arithmetic."""
        c = self.captured
        found = {node.out: node for node in (*c.host_nodes, *c.graph.nodes)}
        for cut in c.cuts:
            found |= {node.out: node for node in cut.graph.nodes}
        return sorted(found.values(), key=lambda node: node.out.id)

    def params(self) -> dict[Value, tuple[str, int]]:
        """Where every input comes from: of the graph, and of the values that Python reads."""
        c = self.captured
        found = dict(zip((p.value for p in c.graph.params), c.sources, strict=True))
        for cut in c.cuts:
            found |= zip((p.value for p in cut.graph.params), cut.sources, strict=True)
        found |= {value: ("scalar", k) for k, value in enumerate(c.scalars)}
        return found


def traced(step: Callable, args: tuple, kwargs: dict) -> Traced:
    """Trace a call until two traces agree. Raises CannotExport where they do not, and what a
    compiled step raises."""
    refuse_inside("tracejit.to_onnx")
    of_module = isinstance(step, torch.nn.Module)
    if of_module:
        args, kwargs = _by_name(step, args, kwargs)
    function, args, kwargs, keep_grads = plain_step(step, args, kwargs, "tracejit.to_onnx")
    name = type(step).__name__ if of_module else function.__name__
    where = _where(type(step).forward if of_module else function)
    refuse = partial(CannotExport, where=where, what=name)
    objects = [*_objects((args, kwargs))]
    held = Compared((function, *objects))
    places = [(("arg", i), x) for i, x in enumerate(args) if i or not of_module]
    places += [(("kwarg", key), x) for key, x in kwargs.items()]
    arguments = [leaf for path, x in places for leaf in _leaves(x, path)]
    _refuse_held(held, arguments, refuse)
    before = None
    for _ in range(TRACES):
        listener = Listener()
        done = capture_call(function, args, kwargs, keep_grads=keep_grads, listener=listener.of)
        done.call.undo()
        _refuse_kept(held, listener, refuse)
        if before is not None and before == done.captured.key:
            break
        before = done.captured.key
    else:
        raise refuse(
            reason="its Python computes something else in each call, and a file keeps no Python",
            remedy="Pass what varies as an argument, a float or a tensor",
        )
    return Traced(
        name=name,
        where=where,
        captured=done.captured,
        call=done.call,
        names=Names(function, args, kwargs),
        composites=listener.found,
        arguments=arguments,
        of_module=of_module,
    )


def _refuse_held(held: Compared, arguments: list, refuse: Callable[..., CannotExport]) -> None:
    """Refuse an argument that the step's own objects hold, as they do where a step remembers what
    it was given last: an input it would be, and a weight."""
    known = {id(x) for x in held.tensors}
    if any(id(x) in known for _, x in arguments if isinstance(x, torch.Tensor)):
        raise refuse(
            reason="an argument of it is also in its variables or objects, which another call need "
            "not have",
            remedy="Pass another tensor, such as a clone",
        )


def _refuse_kept(held: Compared, listener: Listener, refuse: Callable[..., CannotExport]) -> None:
    """Refuse what a trace has left in objects of the user's for the next call to find."""
    numbers = listener.trace.scalars.given
    if kept(numbers):
        gc.collect()  # what the trace itself has left in circles
    left = kept(numbers)
    others = held.replaced(torch.Tensor)
    if left:
        make_plain(left)
        what = "a number that it has read or computed"
    elif others:
        what = f"another tensor ({', '.join(others)})"
    else:
        return
    raise refuse(
        reason=f"it puts {what} into an object of yours, where its next call may find it",
        remedy="Return it, and pass it as an argument; or write to the tensor that is there",
    )


def _objects(x: object) -> Iterator[object]:
    """What is in arguments and their containers besides tensors and plain values."""
    if isinstance(x, (list, tuple)):
        for item in x:
            yield from _objects(item)
    elif isinstance(x, dict):
        for item in x.values():
            yield from _objects(item)
    elif not isinstance(x, (torch.Tensor, int, float, str, bytes, type(None))):
        yield x


def _where(function: FunctionType) -> str:
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else "<unknown>"


def _by_name(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a module by the names that its forward has for them, if it has."""
    code = getattr(type(module).forward, "__code__", None)
    names = code.co_varnames[1 : code.co_argcount] if code and code.co_posonlyargcount < 2 else ()
    if len(args) > len(names):
        return args, kwargs
    return (), dict(zip(names, args, strict=False)) | kwargs


def _leaves(x: object, path: Path) -> Iterator[tuple[Path, torch.Tensor | float]]:
    """The tensors and floats in an argument and its containers, and the path of each."""
    if isinstance(x, (torch.Tensor, float)):
        yield path, x
    elif isinstance(x, (list, tuple)):
        for i, item in enumerate(x):
            yield from _leaves(item, (*path, i))
    elif isinstance(x, dict):
        for key, item in x.items():
            yield from _leaves(item, (*path, key))
