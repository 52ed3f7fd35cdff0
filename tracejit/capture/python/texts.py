"""Where code makes text of values, and what takes that text.

In: a code object. Out: for each instruction that formats values, `f"step {n}"`, `str(n)`,
`"%03d" % n`, `"{}".format(n)`, how the whole text is put together and the one thing that takes it:
a function that shows it, an attribute, a list. What becomes of text that is handed to anything
else, or to two things, is not known.
"""

from __future__ import annotations

import dis
import functools
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

from tracejit.capture.python.doubts import chain_to, left_of
from tracejit.capture.python.uses import Named, Reader, _Constant


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of one value: the `k`-th that the instruction `at` an offset formats, by calling its
    method `by` that name. spec: how it comes out, where the method is not told."""

    at: int
    k: int
    by: str
    spec: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A text in parts; None is one that the code does not tell."""

    parts: tuple[str | Piece | None, ...]

    @property
    def pieces(self) -> Iterator[Piece]:
        """The values in it."""
        return (x for x in self.parts if type(x) is Piece)


@dataclass(frozen=True, slots=True)
class Sink:
    """What takes a text. how: "print"; "write", the method of what the names `chain` lead to;
    "log", a method of that name there; "append", to the list there; "attribute" or "item", of that
    name or key there; "key", by which something is put into the dict there; "return", as what the
    code returns, or in a container that it returns."""

    how: str
    name: str | int = ""
    chain: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Site:
    """The text that the instruction `at` an offset makes a part of, and what takes it; None where
    that is not known."""

    at: int
    text: Text
    sink: Sink | None


@dataclass(frozen=True, slots=True)
class _Bound:
    """A method, and what it is of: names that lead there, or a template."""

    name: str
    of: tuple[str, ...] | str


@dataclass(frozen=True, slots=True)
class _Holding:
    """A new container with texts in it."""

    texts: tuple[Text, ...]


LOGS = frozenset({"debug", "info", "warning", "error"})
_FORMATS = {"str": "__str__", "repr": "__repr__", "ascii": "__repr__"}
_CONVERSIONS = ("__format__", "__str__", "__repr__", "__repr__")
_PERCENT = re.compile(r"%(?:%|(0?)(\d*)([dis]))")


@functools.lru_cache(1000)
def sites(code: CodeType) -> dict[int, Site]:
    """What becomes of the text that instructions make, by their offsets."""
    found = _Texts(code)
    found.all()
    result = {}
    for at, taken in found.taken.items():
        site = next(iter(taken))
        site = site if len(taken) == 1 else Site(at, site.text, None)
        result |= dict.fromkeys((at, found.started.get(at, at)), site)
    return result


@functools.lru_cache(1000)
def stores_otherwise(code: CodeType) -> frozenset[str | int]:
    """The names of attributes, and the keys of items, to which code assigns something else than
    text whose parts are known."""
    found = _Texts(code)
    found.all()
    return frozenset(found.stores_otherwise)


@functools.lru_cache(1000)
def keyed_otherwise(code: CodeType) -> frozenset[Named]:
    """What code assigns items of by keys that are no text whose parts are known."""
    found = _Texts(code)
    found.all()
    return frozenset(found.keyed_otherwise)


class _Texts(Reader):
    def __init__(self, code: CodeType):
        super().__init__(code)
        self.instructions = [*dis.get_instructions(code)]
        self.taken: dict[int, set[Site]] = {}
        self.started: dict[int, int] = {}  # by the offset of a call, where it may run already
        self.stores_otherwise: set[str | int] = set()
        self.keyed_otherwise: set[Named] = set()
        self._position = {x.offset: i for i, x in enumerate(self.instructions)}
        self._at = 0  # the position of this instruction

    # ---- what takes text

    def _give(self, item: object, sink: Sink | None) -> None:
        """A sink takes an item from the stack, if it is text; None: nobody knows what becomes of
        it."""
        for text in item.texts if type(item) is _Holding else (item,):
            for piece in text.pieces if type(text) is Text else ():
                self.taken.setdefault(piece.at, set()).add(Site(piece.at, text, sink))

    def _use(self, item: object, how: str) -> None:
        self._give(item, None)
        super()._use(item, how)

    def _pop_to(self, sink: Sink, depth: int = 1) -> None:
        """Give an item of the stack to a sink."""
        self._give(self.stack[-depth], sink)
        self.stack[-depth] = None

    # ---- what makes it

    def _step(self, x: dis.Instruction) -> bool:
        self._at = self._position[x.offset]
        name, stack = x.opname, self.stack
        if name == "FORMAT_VALUE":
            self._format(x)
            return True
        if name == "BUILD_STRING":
            parts = [None] * (x.arg - len(stack)) + stack[-x.arg :]
            del stack[-x.arg :]
            self._push(_joined(parts))
            return True
        if name == "PRECALL":
            self.started[self.instructions[self._at + 1].offset] = x.offset
        elif name == "BINARY_OP" and x.argrepr in ("+", "+=") and len(stack) > 1:
            if any(type(part) is Text for part in stack[-2:]) and all(map(_is_text, stack[-2:])):
                stack[-2:] = [_joined(stack[-2:])]
                return True
        elif name == "BINARY_OP" and x.argrepr == "%" and len(stack) > 1:
            if (text := self._percent(stack[-2], x.offset)) is not None:
                self._take(2)
                self._push(text)
                return True
        elif name in ("BUILD_TUPLE", "BUILD_LIST", "BUILD_MAP", "BUILD_CONST_KEY_MAP") and x.arg:
            return self._build(x)
        elif name == "LOAD_METHOD" and stack:
            of = stack[-1]
            bound = None
            if type(of) is _Constant and type(of.value) is str and x.argval == "format":
                bound = _Bound("format", of.value)
            elif x.argval in LOGS or x.argval in ("append", "write"):
                bound = _Bound(x.argval, self._chain(1))
            super()._step(x)
            stack[-2:] = [bound, bound] if bound is not None else stack[-2:]
            return True
        elif name == "STORE_ATTR" and len(stack) > 1 and type(stack[-2]) is Text:
            self._pop_to(Sink("attribute", x.argval, self._chain(1)), 2)
        elif name == "STORE_ATTR":
            self.stores_otherwise.add(x.argval)
        elif name == "RETURN_VALUE" and stack and type(stack[-1]) in (Text, _Holding):
            self._pop_to(Sink("return"))
        return super()._step(x)

    def _chain(self, back: int) -> tuple[str, ...]:
        """The names that lead to what the instruction so far back loads."""
        return chain_to(self.instructions, self.instructions[self._at - back])

    def _format(self, x: dis.Instruction) -> None:
        conversion, with_spec = x.arg & 3, bool(x.arg & 4)
        inner = self.stack[-1] if self.stack else None
        if type(inner) is Text and not with_spec and conversion < 2:
            return  # text as it is
        self._take(1 + with_spec)
        plain = not (conversion and with_spec)
        piece = Piece(x.offset, 0, _CONVERSIONS[conversion]) if plain else None
        self._push(Text((piece,)))

    def _percent(self, template: object, at: int) -> Text | None:
        """The text of `template % values`, of ints and what has a text."""
        if type(template) is not _Constant or type(template.value) is not str:
            return None
        parts, end, count = [], 0, 0
        for found in _PERCENT.finditer(template.value):
            parts.append(template.value[end : found.start()])
            end = found.end()
            if found[3] is None:
                parts.append("%")
            elif found[3] == "s":
                if found[1] or found[2]:
                    return None
                parts.append(Piece(at, count, "__str__"))
                count += 1
            else:
                parts.append(Piece(at, count, "__int__", f"{found[1]}{found[2]}d"))
                count += 1
        parts.append(template.value[end:])
        if any(type(part) is str and "%" in part and part != "%" for part in parts) or not count:
            return None  # of a kind that is not known here
        return Text(tuple(parts))

    def _build(self, x: dis.Instruction) -> bool:
        n = x.arg
        pops = 2 * n if x.opname == "BUILD_MAP" else n + (x.opname == "BUILD_CONST_KEY_MAP")
        if len(self.stack) < pops:
            return super()._step(x)
        items = self.stack[-pops:]
        values = items[1::2] if x.opname == "BUILD_MAP" else items[:n]
        texts = [t for t in values if type(t) is Text]
        texts += [t for v in values if type(v) is _Holding for t in v.texts]
        for i, item in enumerate(items):
            is_value = i % 2 == 1 if x.opname == "BUILD_MAP" else i < n
            if is_value and type(item) in (Text, _Holding):
                self.stack[i - pops] = None
        super()._step(x)
        if texts:
            self.stack[-1] = _Holding(tuple(texts))
        return True

    def _store_item(self) -> None:
        stack = self.stack
        if len(stack) > 2 and type(stack[-3]) is Text:
            key, load = stack[-1], self.instructions[self._at - 1]
            plain = type(key) is _Constant and type(key.value) in (str, int)
            if plain and load.opname == "LOAD_CONST":
                self._pop_to(Sink("item", key.value, self._chain(2)), 3)
        elif len(stack) > 1 and type(stack[-1]) is Text:
            last = left_of(self.instructions, self._at)
            self._pop_to(Sink("key", "", chain_to(self.instructions, last)))
        elif len(stack) > 1 and type(stack[-1]) is _Constant:
            self.stores_otherwise.add(stack[-1].value)
        elif len(stack) > 1 and type(stack[-2]) is Named:
            self.keyed_otherwise.add(stack[-2])
        super()._store_item()

    def _call(self, count: int) -> None:
        stack, at = self.stack, self.instructions[self._at].offset
        if len(stack) < count + 2:
            super()._call(count)
            return
        function, bound = stack[-count - 1], stack[-count - 2]
        name = function.name if type(function) is Named and function.kind == "global" else ""
        made = None
        if name == "print":
            for k in range(1, count + 1):
                self._pop_to(Sink("print"), k)
            alone = Text((Piece(at, 0, "__str__"),))
            self.taken.setdefault(at, set()).add(Site(at, alone, Sink("print")))
        elif name in _FORMATS and count == 1:
            made = Text((Piece(at, 0, _FORMATS[name]),))
        elif name == "format" and count in (1, 2):
            made = Text((Piece(at, 0, "__format__"),))
        elif type(bound) is _Bound and bound.name in LOGS:
            for k in range(1, count + 1):
                self._pop_to(Sink("log", bound.name, bound.of), k)
        elif type(bound) is _Bound and bound.name in ("append", "write") and count == 1:
            self._pop_to(Sink(bound.name, "", bound.of))
        elif type(bound) is _Bound and bound.name == "format":
            made = _of_template(bound.of, at, count)
        if name == "str" and count == 1 and type(stack[-1]) is Text:
            made, stack[-1] = stack[-1], None  # text as it is
        super()._call(count)
        if made is not None:
            self.stack[-1] = made


def _is_text(item: object) -> bool:
    return type(item) is Text or (type(item) is _Constant and type(item.value) is str)


def _joined(items: list) -> Text:
    parts: list[str | Piece | None] = []
    for item in items:
        if type(item) is Text:
            parts += item.parts
        else:
            parts.append(item.value if _is_text(item) else None)
    return Text(tuple(parts))


def _of_template(template: str, at: int, count: int) -> Text | None:
    """The text of `template.format(…)` with so many values, in their order."""
    parts: list[str | Piece | None] = []
    try:
        fields = [*string.Formatter().parse(template)]
    except ValueError:
        return None
    for literal, field, spec, conversion in fields:
        parts.append(literal)
        if field is None:
            continue
        if field or "{" in spec or (conversion and spec):
            return None
        by = {"s": "__str__", "r": "__repr__", "a": "__repr__"}.get(conversion, "__format__")
        parts.append(Piece(at, sum(type(x) is Piece for x in parts), by))
    return Text(tuple(parts)) if sum(type(x) is Piece for x in parts) == count else None
