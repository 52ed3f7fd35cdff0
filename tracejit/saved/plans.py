"""One plan of a saved step as JSON and texts, and back.

    SavedPlan  →  plan_entries  →  a table of JSON; name → text  →  read_plan  →  SavedPlan

Numbers of the host are operands `%0`, `%1`, …: the runtime scalars in order, then the results of
host.txt in order.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from tracejit import errors
from tracejit.capture.effects.captured import Captured, Checks, Key
from tracejit.capture.effects.text import parse_effects
from tracejit.capture.signature import Fielded, Keyed, Listed
from tracejit.capture.trace.bounds import Bound
from tracejit.capture.trace.cuts import Cut, Source
from tracejit.capture.trace.draws import Draw, Event, Keep, Restore, Seed, Together
from tracejit.capture.trace.scalars import RELATIONS, Predicate
from tracejit.errors import TracejitError
from tracejit.ir.graph import Arg, Graph, Param, Result, Value, print_arg
from tracejit.ir.literals import parse_literal
from tracejit.ir.text import parse
from tracejit.ir.types import DTYPES, HOST_SCALAR, parse_type
from tracejit.passes.cone import cone
from tracejit.passes.dce import dce
from tracejit.saved.archive import Damaged
from tracejit.saved.fields import Item, number_text, read_json
from tracejit.saved.named import kind_json, read_kind
from tracejit.saved.record import (
    Argument,
    GivenNumber,
    GivenTensor,
    GivenValue,
    Place,
    SavedPlan,
    Spec,
)
from tracejit.saved.schedules import SavedCallback
from tracejit.saved.searches import read_search, search_json

_TEXTS = ("graph.txt", "effects.txt", "host.txt", "checks.txt")
_NO_GRAPH = Graph("value", (), (), (), ())
_OF_TORCH = {
    str(x).removeprefix("torch."): x for x in vars(torch).values() if type(x) is torch.dtype
}
Json = dict[str, object]
Sources = tuple[Source, ...]


# ---- writing


def plan_entries(plan: SavedPlan) -> tuple[Json, dict[str, str]]:
    """The table of a plan for the manifest, and its texts by name."""
    c, number = plan.captured, {}
    for value in (*c.scalars, *(out for node in c.host_nodes for out in node.outs)):
        number[value] = Value(len(number), HOST_SCALAR)

    def arg(x: Arg) -> Arg:
        return number[x] if isinstance(x, Value) else x

    host = Graph("host", tuple(map(Param, c.scalars)), c.host_nodes, (), ())
    effects = replace(c.effects, host=tuple(map(arg, c.effects.host)))
    graph, sources = _with_cuts(c)
    texts = {"graph.txt": str(graph), "host.txt": str(host), "effects.txt": str(effects)}
    if c.checks is not None:
        texts["checks.txt"] = str(c.checks.graph)
    return {
        "arguments": [
            {"name": a.name, "positional": a.positional, "tree": _tree(a.tree)}
            for a in plan.arguments
        ],
        "tensors": [{"from": _place(place), **_spec(spec)} for place, spec in plan.tensors],
        "scalars": [_place(place) for place in plan.scalars],
        "generators": list(plan.generators),
        "sources": [list(source) for source in sources],
        "decisions": [
            [p.relation, print_arg(arg(p.left)), print_arg(arg(p.right)), p.outcome]
            for p in c.predicates
        ],
        "bounds": list(map(_bound, c.bounds)),
        "checks": None if c.checks is None else _checks(c.checks),
        "grads_read": [list(pair) for pair in c.grads_read],
        "given": list(map(_given, c.given)),
        "numbers_read": list(map(_cut, c.cuts)),
        "late": list(c.late),
        "draws": [_event(event, arg) for event in c.draws],
        **({"callbacks": list(map(_callback, plan.callbacks))} if plan.callbacks else {}),
    }, texts


def check_text(plan: SavedPlan) -> None:
    """Raise an error unless a plan is the same when it is read again."""
    said, texts = plan_entries(plan)
    written = json.dumps(said, allow_nan=False).encode()
    if plan_entries(read_plan(read_json(written, "a plan"), texts)) != (said, texts):
        raise Damaged("a plan is another one when it is read again")


def _with_cuts(c: Captured) -> tuple[Graph, Sources]:
    """The graph of a step together with what computes the values that Python reads before the rest
    of it: these are its last results."""
    early = [c.cuts[k] for k in c.early]
    if not early:
        return c.graph, c.sources
    step, sources = _without_unread(dce(c.graph), c.sources)
    params = dict(zip(step.params, sources, strict=True))
    nodes = {node.out: node for node in step.nodes}
    for cut in early:
        params |= zip(cut.graph.params, cut.sources, strict=True)
        nodes |= {node.out: node for node in cut.graph.nodes}
    results = c.graph.results + tuple(Result(cut.value) for cut in early)
    ordered = sorted(nodes.values(), key=lambda node: node.out.id)
    graph = replace(step, params=(*params,), nodes=tuple(ordered), results=results)
    return graph, tuple(params.values())


def _without_cuts(
    graph: Graph, sources: Sources, cuts: Sequence[Cut], late: Collection[int]
) -> tuple[Graph, Sources]:
    """The graph of a step, of one together with cuts; these get theirs."""
    early = [cut for k, cut in enumerate(cuts) if k not in late]
    if not early:
        return graph, sources
    if len(sources) != len(graph.params) or len(early) > len(graph.results):
        raise Damaged("a graph and its inputs, or the numbers that are read, do not match")
    count = len(graph.results) - len(early)
    for cut, result in zip(early, graph.results[count:], strict=True):
        cut.graph, kept = cone(graph, [result.value], "value")
        cut.sources = tuple(sources[i] for i in kept)
    return _without_unread(dce(replace(graph, results=graph.results[:count])), sources)


def _without_unread(graph: Graph, sources: Sources) -> tuple[Graph, Sources]:
    """The graph without the params that nothing reads or writes."""
    read = {x for node in graph.nodes for x in node.inputs} | {*graph.outputs()}
    read |= {write.target for write in graph.writes}
    kept = [i for i, p in enumerate(graph.params) if p.value in read]
    params = tuple(graph.params[i] for i in kept)
    return replace(graph, params=params), tuple(sources[i] for i in kept)


def _tree(tree: object) -> object:
    match tree:
        case GivenTensor(index):
            return {"tensor": index}
        case GivenNumber(index, whole):
            return {"number": index, "whole": whole}
        case GivenValue(value):
            return {"value": _value(value)}
        case Listed(kind, items):
            return {kind.__name__: list(map(_tree, items))}
        case Keyed(items):
            return {"dict": [[_value(key), _tree(item)] for key, item in items]}
        case Fielded(kind, items, listed):
            fields = [[name, _tree(item)] for name, item in items]
            return {"fields": fields, "of": kind, "listed": listed}
    raise AssertionError(tree)


def _value(x: object) -> object:
    """A plain value; floats by their kind, since JSON has one kind of number."""
    return {"float": number_text(x)} if type(x) is float else x


def _place(place: Place) -> list:
    if place.kind == "after":
        return [place.kind, *place.key]
    return [place.kind, number_text(place.key) if place.kind == "constant" else place.key]


def _cut(cut: Cut) -> Json:
    said = {"where": cut.where, "drawn": cut.drawn}
    if cut.search is None:
        return said
    return said | {"search": search_json(cut.search), "found": cut.found, "count": cut.count}


def _callback(callback: SavedCallback) -> Json:
    kwargs = {name: _value(x) for name, x in callback.kwargs.items()}
    args = list(map(_value, callback.args))
    return {"scheduler": callback.scheduler, "args": args, "kwargs": kwargs}


def _spec(spec: Spec) -> Json:
    shape, strides = list(spec.shape), list(spec.strides)
    kind = {"dtype": spec.dtype.name, "shape": shape, "strides": strides}
    return kind | {"device": spec.device, "requires_grad": spec.requires_grad}


def _bound(b: Bound) -> Json:
    where = {"tensor": b.index, "shape": list(b.shape), "strides": list(b.strides)}
    values = {"offset": b.offset, "low": b.low, "high": b.high, "ignore": b.ignore}
    return where | values | {"error": _error(b.error)}


def _checks(checks: Checks) -> Json:
    errors_ = list(map(_error, checks.errors))
    sources = [list(source) for source in checks.sources]
    return {"sources": sources, "shown": list(checks.shown), "errors": errors_}


def _error(error: TracejitError) -> Json:
    fields = {name: str(x) for name, x in error.fields.items()}
    if "where" in fields:  # the folders of who saved it are nobody's business
        fields["where"] = os.path.basename(fields["where"])
    return {"class": type(error).__name__, "fields": fields}


def _given(x: object) -> object:
    match x:
        case torch.dtype():
            return {"dtype": str(x).removeprefix("torch.")}
        case torch.Size():
            return {"size": list(x)}
        case torch.device():
            return {"device": str(x)}
        case type():
            return kind_json(x)
    return _value(x)


def _event(event: Event, arg: Callable[[Arg], Arg]) -> Json:
    numbers = [print_arg(arg(x)) for x in event.numbers]
    of = {"generator": event.generator, "numbers": numbers}
    match event:
        case Draw(fill, names, _, type, strides):
            kind = {"names": list(names), "type": str(type), "strides": list(strides)}
            return {"do": fill, **of, **kind}
        case Together(rows, type, strides):
            kind = {"rows": list(rows), "type": str(type), "strides": list(strides)}
            return {"do": "together", **of, **kind}
        case Restore(kept):
            return {"do": "restore", **of, "kept": kept}
    return {"do": "seed" if isinstance(event, Seed) else "keep", **of}


# ---- reading


def read_plan(item: Item, texts: Mapping[str, str]) -> SavedPlan:
    """A plan of a manifest. Raises Damaged and InvalidGraph."""
    said = item.table(
        *("arguments", "tensors", "scalars", "generators", "sources", "decisions", "bounds"),
        *("checks", "grads_read", "given", "numbers_read", "late", "draws"),
        more=("callbacks",),
    )
    has_checks = said["checks"].value is not None
    if texts.keys() != {*(_TEXTS if has_checks else _TEXTS[:3])}:
        raise Damaged(f"{item.at} has the texts {sorted(texts)}")
    cuts, late = tuple(map(_read_cut, said["numbers_read"].rows())), said["late"].wholes()
    whole, host = parse(texts["graph.txt"]), parse(texts["host.txt"])
    sources = tuple(map(_read_source, said["sources"].rows()))
    graph, sources = _without_cuts(whole, sources, cuts, late)
    checks = None
    if has_checks:
        table = said["checks"].table("sources", "shown", "errors")
        checks = Checks(
            graph=parse(texts["checks.txt"]),
            sources=tuple(map(_read_source, table["sources"].rows())),
            shown=tuple(x.flag() for x in table["shown"].rows()),
            errors=tuple(map(_read_error, table["errors"].rows())),
        )
    captured = Captured(
        graph=graph,
        sources=sources,
        paths=(),
        scalars=tuple(p.value for p in host.params),
        host_nodes=host.nodes,
        predicates=tuple(map(_read_decision, said["decisions"].rows())),
        bounds=tuple(map(_read_bound, said["bounds"].rows())),
        checks=checks,
        grads_read=tuple(map(_read_grad, said["grads_read"].rows())),
        given=tuple(map(_read_given, said["given"].rows())),
        effects=parse_effects(texts["effects.txt"]),
        key=Key((), (), ()),
        cuts=cuts,
        late=late,
        draws=tuple(map(_read_event, said["draws"].rows())),
    )
    return SavedPlan(
        captured=captured,
        arguments=tuple(map(_read_argument, said["arguments"].rows())),
        tensors=tuple(map(_read_tensor, said["tensors"].rows())),
        scalars=tuple(map(_read_place, said["scalars"].rows())),
        generators=said["generators"].wholes(),
        callbacks=tuple(
            map(_read_callback, said["callbacks"].rows() if "callbacks" in said else ())
        ),
    )


def _read_cut(item: Item) -> Cut:
    said = item.table("where", "drawn", more=("search", "found", "count"))
    cut = Cut(_NO_GRAPH, (), said["where"].text(), drawn=said["drawn"].whole())
    if len(said) > 2:
        said = item.table("where", "drawn", "search", "found", "count")
        cut.search, cut.found = read_search(said["search"]), said["found"].whole(5, 1)
        cut.count = said["count"].whole()
    return cut


def _read_callback(item: Item) -> SavedCallback:
    said = item.table("scheduler", "args", "kwargs")
    args = tuple(map(_read_value, said["args"].rows()))
    kwargs = {name: _read_value(x) for name, x in said["kwargs"].items().items()}
    return SavedCallback(said["scheduler"].whole(), args, kwargs)


def _read_argument(item: Item) -> Argument:
    said = item.table("name", "positional", "tree")
    return Argument(said["name"].text(), said["positional"].flag(), _read_tree(said["tree"]))


def _read_tree(item: Item, depth: int = 0) -> object:
    if depth > 50:
        raise item.wrong("containers in containers, fifty at most")
    table = item.items()
    match sorted(table):
        case ["tensor"]:
            index = table["tensor"]
            return GivenTensor(None if index.value is None else index.whole())
        case ["number", "whole"]:
            return GivenNumber(table["number"].whole(), table["whole"].flag())
        case ["value"]:
            return GivenValue(_read_value(table["value"]))
        case ["list"] | ["tuple"] as kind:
            rows = table[kind[0]].rows()
            items = tuple(_read_tree(row, depth + 1) for row in rows)
            return Listed(list if kind == ["list"] else tuple, items)
        case ["dict"]:
            pairs = [pair.rows(2) for pair in table["dict"].rows()]
            return Keyed(tuple((_read_value(k), _read_tree(v, depth + 1)) for k, v in pairs))
        case ["fields", "listed", "of"]:
            pairs = [pair.rows(2) for pair in table["fields"].rows()]
            fields = tuple((k.text(), _read_tree(v, depth + 1)) for k, v in pairs)
            return Fielded(table["of"].text(), fields, table["listed"].flag())
    raise item.wrong("a tensor, a number, a value, or a container")


def _read_value(item: Item) -> bool | int | float | str | None:
    if type(item.value) in (bool, int, str, type(None)):
        return item.value
    return float(item.table("float")["float"].number())


def _read_place(item: Item) -> Place:
    if type(item.value) is list and item.value[:1] == ["after"]:
        _, n, name = item.rows(3)
        return Place("after", (n.whole(), name.text()))
    kind, key = item.rows(2)
    match kind.text("argument", "state", "grad", "number", "item", "cut", "constant"):
        case "argument" | "state" | "number" as name:
            return Place(name, key.text())
        case "constant" as name:
            return Place(name, key.number())
        case name:
            return Place(name, key.whole())


def _read_tensor(item: Item) -> tuple[Place, Spec]:
    said = item.table("from", "dtype", "shape", "strides", "device", "requires_grad")
    dtype = DTYPES[said["dtype"].text(*DTYPES)]
    geometry = said["shape"].wholes(), said["strides"].wholes()
    spec = Spec(dtype, *geometry, said["device"].text(), said["requires_grad"].flag())
    return _read_place(said["from"]), spec


def _read_source(item: Item) -> Source:
    kind, index = item.rows(2)
    return kind.text("tensor", "scalar", "draw", "found"), index.whole()


def _read_grad(item: Item) -> tuple[int, int | None]:
    index, grad = item.rows(2)
    return index.whole(), None if grad.value is None else grad.whole(least=-1)


def _read_arg(item: Item) -> Arg:
    """An operand: `%3`, or a number."""
    text = item.text()
    if text.startswith("%") and text[1:].isdecimal() and len(text) < 12:
        return Value(int(text[1:]), HOST_SCALAR)
    if len(text) < 60:
        literal = parse_literal(ast.parse(text, mode="eval").body)
        if type(literal) in (bool, int, float):
            return literal
    raise item.wrong("an operand")


def _read_decision(item: Item) -> Predicate:
    relation, left, right, outcome = item.rows(4)
    operands = _read_arg(left), _read_arg(right)
    return Predicate(relation.text(*RELATIONS), *operands, outcome.flag())


def _read_bound(item: Item) -> Bound:
    said = item.table("tensor", "shape", "strides", "offset", "low", "high", "ignore", "error")
    ignore = said["ignore"]
    return Bound(
        index=said["tensor"].whole(),
        shape=said["shape"].wholes(),
        strides=said["strides"].wholes(),
        offset=said["offset"].whole(),
        low=said["low"].whole(1 << 63, -(1 << 63)),
        high=said["high"].whole(1 << 63, -(1 << 63)),
        ignore=None if ignore.value is None else ignore.whole(1 << 63, -(1 << 63)),
        error=_read_error(said["error"]),
    )


def _read_error(item: Item) -> TracejitError:
    """An error that mirrors one of eager's."""
    said = item.table("class", "fields")
    known = {kind.__name__: kind for kind in errors.OF_EAGER}
    kind = known[said["class"].text(*known)]
    fields = {name: x.text() for name, x in said["fields"].items().items()}
    try:
        return kind(**fields)
    except KeyError as error:
        raise item.wrong(f"a {kind.__name__} with {error}") from error


def _read_given(item: Item) -> object:
    table = item.value
    if type(table) is dict and table.keys() == {"dtype"}:
        return _OF_TORCH[item["dtype"].text(*_OF_TORCH)]
    if type(table) is dict and table.keys() == {"size"}:
        return torch.Size(item["size"].wholes())
    if type(table) is dict and table.keys() == {"device"}:
        return torch.device(item["device"].text())
    if type(table) is dict and table.keys() != {"float"}:
        return read_kind(item)
    return _read_value(item)


def _read_event(item: Item) -> Event:
    do = item.items().get("do", item).value
    common = ("do", "generator", "numbers")
    more = {"seed": (), "keep": (), "restore": ("kept",), "together": ("rows", "type", "strides")}
    more = more.get(do, ("names", "type", "strides"))
    said = item.table(*common, *more)
    generator = said["generator"].whole()
    numbers = tuple(map(_read_arg, said["numbers"].rows()))
    match said["do"].text():
        case "seed":
            return Seed(numbers, generator)
        case "keep":
            return Keep(generator, numbers)
        case "restore":
            return Restore(said["kept"].whole(), generator, numbers)
        case "together":
            geometry = parse_type(said["type"].text()), said["strides"].wholes()
            return Together(said["rows"].wholes(), *geometry, generator, numbers)
        case fill:
            names = tuple(x.text() for x in said["names"].rows())
            geometry = parse_type(said["type"].text()), said["strides"].wholes()
            return Draw(fill, names, numbers, *geometry, generator)


def operands(captured: Captured) -> Iterator[Arg]:
    """The numbers of the host that a plan refers to, outside of its texts."""
    for predicate in captured.predicates:
        yield from (predicate.left, predicate.right)
    yield from captured.effects.host
    for event in captured.draws:
        yield from event.numbers
