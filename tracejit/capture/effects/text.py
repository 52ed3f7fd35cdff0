"""Reads the text form of Effects: parse_effects(str(effects)) == effects, graphs in canonical form.

Raises InvalidGraph, which names the line, for any other text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from types import EllipsisType

from tracejit.capture.effects.effects import (
    Effects,
    Given,
    HostSlot,
    Joined,
    Made,
    Mapped,
    Outside,
    Sequenced,
    Slot,
    Tree,
)
from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Arg, Value
from tracejit.ir.literals import parse_literal
from tracejit.ir.text import parse
from tracejit.ir.types import DTYPES, HOST_SCALAR, dtype_named

_TUPLE = r"(\([^()]*\))"
_MADE = re.compile(
    rf"made \d+ = (\w+) (\d+)"
    rf"(?: {_TUPLE} strides {_TUPLE} offset (h?\d+)( requires_grad)?( leaf)?"
    r"(?: bits (\w+) as (\w+))?)?"
)
_NODE = re.compile(r"node (\d+) inputs (\(.*\)) saved (\(.*\)) hosts (\(.*\)) \{")
_PAIRS = {
    "host_writes": re.compile(r"write real (\d+) <- host (\d+)"),
    "datas": re.compile(r"data (\d+) <- made (\d+)"),
    "grads": re.compile(r"grad (\d+) <- (?:none|made (\d+))"),
    "leaf_grads": re.compile(r"leaf grad (\d+) <- made (\d+)"),
}
_STORE = re.compile(r"store (\d+) (text\(.*?\)|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\S+) <- (.*)")
_NUMBER = re.compile(r"number \d+ = (\w+) host (\d+)")
_REASON = re.compile(r"no node (\d+) because (.*)")
_SLOTS = {"m": Slot, "h": HostSlot, "g": Given}


def parse_effects(text: str) -> Effects:
    """Read the text of Effects."""
    lines = iter(text.strip().splitlines())
    if next(lines, "") != "effects {":
        raise InvalidGraph(reason="the text of effects begins with `effects {`")
    found: dict[str, list] = {name: [] for name in Effects.__dataclass_fields__}
    for line in lines:
        code = line.strip()
        if code == "}":
            break
        try:
            _line(code, lines, found)
        except (KeyError, ValueError, SyntaxError, StopIteration) as error:
            raise InvalidGraph(reason=f"cannot read the effect {code!r} ({error})") from error
    else:
        raise InvalidGraph(reason="the closing brace of effects is missing")
    if len(found["returned"]) != 1 or next(lines, "").strip():
        raise InvalidGraph(reason="effects end with one `return` and a brace of their own")
    returned = found.pop("returned")[0]
    return Effects(**{name: tuple(items) for name, items in found.items()}, returned=returned)


def _line(code: str, lines: Iterator[str], found: dict[str, list]) -> None:
    word, _, rest = code.partition(" ")
    for name, pattern in _PAIRS.items():
        if pair := pattern.fullmatch(code):
            second = pair[2]
            found[name].append((int(pair[1]), None if second is None else int(second)))
            return
    match word:
        case "host":
            found["host"] += map(_arg, rest.split(", "))
        case "written" | "escaped":
            found[word] += map(int, rest.split(", "))
        case "flag":
            index, _, how = rest.partition(" ")
            found["flags"].append((int(index), how))
        case "store" if m := _STORE.fullmatch(code):
            key = ast.parse(m[2], mode="eval").body
            found["stores"].append((int(m[1]), _key(key), _tree(m[3])))
        case "number" if m := _NUMBER.fullmatch(code):
            found["hosts"].append((DTYPES[m[1]], int(m[2])))
        case "made" if m := _MADE.fullmatch(code):
            found["made"].append(_made(m))
        case "node" if m := _NODE.fullmatch(code):
            places = (ast.literal_eval(m[k]) for k in (2, 3, 4))
            found["outside"].append(Outside(int(m[1]), *places, _graph(lines)))
        case "no" if m := _REASON.fullmatch(code):
            found["reasons"].append((int(m[1]), ast.literal_eval(m[2])))
        case "callback":
            found["callbacks"].append(tuple(map(_operand, filter(None, rest.split(", ")))))
        case "return":
            found["returned"].append(_tree(rest))
        case _:
            raise ValueError("no such effect")


def _operand(text: str) -> tuple[int | str, int]:
    at, host = text.split(" <- host ")
    return ast.literal_eval(at), int(host)


def _graph(lines: Iterator[str]):
    """The graph of a node, whose closing brace is followed by the node's."""
    own = []
    while True:
        own.append(next(lines).strip())
        if own[-1] == "}":
            break
    if next(lines).strip() != "}":
        raise ValueError("a node ends with a brace of its own")
    return parse("\n".join(own))


def _made(m: re.Match[str]) -> Made:
    kind, index = m[1], int(m[2])
    if m[3] is None:
        return Made(kind, index)
    shape, strides = ast.literal_eval(m[3]), ast.literal_eval(m[4])
    offset = HostSlot(int(m[5][1:])) if m[5].startswith("h") else int(m[5])
    bits = None if m[8] is None else (dtype_named(m[8]), dtype_named(m[9]))
    return Made(kind, index, shape, strides, offset, m[6] is not None, m[7] is not None, bits)


def _arg(text: str) -> Arg:
    if text.startswith("%"):
        return Value(int(text[1:]), HOST_SCALAR)
    return parse_literal(ast.parse(text, mode="eval").body)


def _tree(text: str) -> Tree:
    return _structure(ast.parse(text, mode="eval").body)


def _structure(tree: ast.expr) -> Tree:
    match tree:
        case ast.Name(name):
            return _SLOTS[name[0]](int(name[1:]))
        case ast.List(items) | ast.Tuple(items):
            kind = "list" if isinstance(tree, ast.List) else "tuple"
            return Sequenced(kind, tuple(map(_structure, items)))
        case ast.Call(ast.Name("text"), items):
            parts = (x.value if isinstance(x, ast.Constant) else _structure(x) for x in items)
            return Joined(tuple(parts))
        case ast.Call(function, items):
            return Sequenced(_structure(function), tuple(map(_structure, items)))
        case ast.Dict(keys, values):
            return Mapped(tuple(zip(map(_key, keys), map(_structure, values), strict=True)))
    raise ValueError(ast.unparse(tree))


def _key(key: ast.expr) -> str | int | Given | Slot | Joined | EllipsisType | None:
    return _structure(key) if isinstance(key, (ast.Name, ast.Call)) else ast.literal_eval(key)
