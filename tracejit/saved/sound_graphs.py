"""Whether a graph that was read from a file is one, and lies where it says.

In: a graph as it was parsed, layouts, views. Out: nothing, or an error. Types are inferred anew,
and all numbers are of a size that memory can have.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping

from tracejit.capture.trace.tensor import extent, is_dense
from tracejit.ir.graph import Graph, Param, Result, Value, verify
from tracejit.ir.types import DType, Type, contiguous_strides
from tracejit.saved.archive import Damaged
from tracejit.saved.fields import LIMIT

MOST_STEPS = 1 << 20  # of a loop
MOST_AXES = 64
DEVICE = re.compile(r"cpu|cuda:\d{1,3}", re.ASCII)
NAME = re.compile(r"[A-Za-z_]\w{0,99}|<lambda>", re.ASCII)
_WORD = re.compile(r"[a-z_:0-9]{1,20}", re.ASCII)


def need(condition: object, what: str) -> None:
    """Raise Damaged unless a condition holds."""
    if not condition:
        raise Damaged(what)


_KINDS: Mapping[str, Callable[[object], bool]] = {  # of attributes, as the ops annotate them
    "bool": lambda x: type(x) is bool,
    "int": lambda x: type(x) is int and abs(x) < LIMIT,
    "float": lambda x: type(x) in (int, float, bool),  # what a pad of truth values puts in
    "Ints": lambda x: type(x) is tuple and all(type(i) is int and abs(i) < LIMIT for i in x),
    "str": lambda x: type(x) is str and _WORD.fullmatch(x) is not None,
    "DType": lambda x: isinstance(x, DType),
    "object": lambda x: isinstance(x, Graph),
}


def check_graph(graph: Graph, *, body: bool = False) -> None:
    """Raise Damaged or InvalidGraph for a graph that no capture could have made."""
    need(body or NAME.fullmatch(graph.name), f"no graph is named {graph.name[:50]!r}")
    for value in (p.value for p in graph.params):
        _check_type(value.type)
    for node in graph.nodes:
        for arg in node.args:
            plain = type(arg) in (bool, int, float) and (type(arg) is float or abs(arg) < 1 << 64)
            need(isinstance(arg, Value) or plain, f"{node.op.name} of {str(arg)[:50]!r}")
        kinds = inspect.signature(node.op.infer).parameters if node.attrs else {}
        for name, value in node.attrs:
            kind = kinds.get(name)
            known = kind is not None and _KINDS.get(str(kind.annotation))
            need(known and known(value), f"{node.op.name} with {name}={str(value)[:50]}")
            if isinstance(value, Graph):
                check_graph(value, body=True)
            if name == "steps" and type(value) is int:
                need(value <= MOST_STEPS, f"a loop of {value} steps")
        for out in node.outs:
            _check_type(out.type)
    verify(graph)
    for place in (*graph.params, *graph.results):
        type_, strides = layout(place)
        if not type_.is_host:
            check_layout(type_, strides)
    for result in graph.results:
        type_, strides = layout(result)
        need(not type_.is_host and is_dense(type_.shape, strides), "a result with gaps")
    devices = {v.type.device for v in _values(graph)} - {"host"}
    need(len(devices) <= 1, f"a graph on several devices: {', '.join(sorted(devices))}")


def _values(graph: Graph) -> Iterator[Value]:
    yield from (p.value for p in graph.params)
    for node in graph.nodes:
        yield from node.outs


def _check_type(type: Type) -> None:
    if type.is_host:
        need((type.dtype.name, type.shape) == ("f64", ()), f"a number of the host of type {type}")
    else:
        check_layout(type, contiguous_strides(type.shape))


def _is_row(x: object) -> bool:
    """Whether something is a row of sizes."""
    return type(x) is tuple and all(type(i) is int and 0 <= i < LIMIT for i in x)


def layout(place: Param | Result) -> tuple[Type, tuple[int, ...]]:
    """The type and strides of a param or result."""
    type = place.value.type
    return type, contiguous_strides(type.shape) if place.strides is None else place.strides


def check_layout(type: Type, strides: tuple[int, ...]) -> None:
    """A tensor of a type with these strides can be: it is of a size, somewhere."""
    need(DEVICE.fullmatch(type.device), f"no device is named {type.device[:50]!r}")
    fits = _is_row(strides) and len(strides) == len(type.shape) <= MOST_AXES
    need(fits and all(size < LIMIT for size in type.shape), f"strides {strides} of {type}")
    need(type.numel < LIMIT and extent(type.shape, strides) < LIMIT, f"{type} is too large")


def check_view(shape: tuple[int, ...], strides: tuple[int, ...], offset: int, room: int) -> None:
    """A view is within memory of so many elements."""
    whole = _is_row(shape) and _is_row(strides) and _is_row((offset,))
    need(whole and len(shape) == len(strides) <= MOST_AXES, f"a view {shape} of strides {strides}")
    need(offset + extent(shape, strides) <= room, f"a view {shape} lies outside of its memory")
