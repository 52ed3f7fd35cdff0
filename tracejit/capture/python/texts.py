"""Where code makes text of values, and what takes that text.

In: a code object. Out: for each instruction that formats values, `f"step {n}"`, `str(n)`,
`"%03d" % n`, `"{}".format(n)`, how the whole text is put together and the one thing that takes it:
a function that shows it, an attribute, a list. What becomes of text that is handed to anything
else, or to two things, is not known.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import re
import string
from collections.abc import Iterator
from dataclasses import field, replace
from types import CodeType

from tracejit.capture.python.doubts import chain_to, left_of
from tracejit.capture.python.patterns import apart
from tracejit.capture.python.uses import Named, Reader, _Constant
from tracejit.capture.python.ways import always
from tracejit.records import dataclass


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
    # the offsets at which it was put into variables and dicts of the function, on its way
    stored: tuple[int, ...] = ()
    callee: tuple[str, ...] = ()  # the names of the function that made it, which is called there

    @property
    def pieces(self) -> Iterator[Piece]:
        """The values in it."""
        return (x for x in self.parts if type(x) is Piece)


@dataclass(frozen=True, slots=True)
class Sink:
    """What takes a text. how: "print"; "write", the method of what the names `chain` lead to;
    "log", a method of that name there; "append", to the list there; "attribute" or "item", of that
    name or key there; "key", by which something is put into the dict there; "return", as what the
    code returns, or ("in", …) in a container that it returns."""

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


@dataclass(eq=False, slots=True)
class _Dict:
    """A new dict: its keys, and the texts among these and its values."""

    texts: list[Text] = field(default_factory=list)
    keys: list[object] = field(default_factory=list)
    closed: bool = False  # nothing more may be put into it
    lost: bool = False  # it is used otherwise


_BUILDS = frozenset({"BUILD_TUPLE", "BUILD_LIST", "BUILD_MAP", "BUILD_CONST_KEY_MAP"})
CALL = "call"  # in place of a method's name: a function makes the text, which is called there
_OF_PYTHON = frozenset(vars(builtins))
LOGS = frozenset({"debug", "info", "warning", "error"})
_NOT_AT_ONCE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_FORMATS = {"str": "__str__", "repr": "__repr__", "ascii": "__repr__"}
_CONVERSIONS = ("__format__", "__str__", "__repr__", "__repr__")
_PERCENT = re.compile(r"%(?:%|(0?)(\d*)([dis]))")


@functools.lru_cache(1000)
def _read(code: CodeType) -> _Texts:
    found = _Texts(code)
    found.all()
    return found


@functools.lru_cache(1000)
def sites(code: CodeType) -> dict[int, Site]:
    """What becomes of the text that instructions make, by their offsets."""
    return _sites(_read(code), _read(code).taken)


@functools.lru_cache(1000)
def sites_of_calls(code: CodeType) -> dict[int, Site]:
    """What becomes of what functions return that code calls, if these are texts, by the offsets of
    the calls, and of the caches behind these: there a frame stands that waits."""
    found = _sites(_read(code), _read(code).called)
    caches = 2 * dis._inline_cache_entries[dis.opmap["CALL"]]
    waiting = {at + k: found[at] for at in _read(code).called for k in range(2, caches + 2, 2)}
    return found | waiting


def _sites(read: _Texts, found: dict[int, set[Site]]) -> dict[int, Site]:
    result = {}
    for at, taken in found.items():
        site = next(iter(taken))
        stored, ends = site.text.stored, read.ends.get(at, set())
        once = len(taken) == 1 and all(always(read.code, start, ends) for start in stored)
        site = site if once else Site(at, site.text, None)
        result |= dict.fromkeys((at, read.started.get(at, at)), site)
    return result


def stores_otherwise(code: CodeType) -> frozenset[str | int]:
    """The names of attributes, and the keys of items, to which code assigns something else than
    text whose parts are known, or than what a function returns."""
    return frozenset(_read(code).stores_otherwise)


def stored_of_calls(code: CodeType, key: str | int) -> frozenset[str]:
    """The functions, by their names, whose results code assigns to attributes of a name, or to
    items under a key."""
    return frozenset(_read(code).stores_called.get(key, ()))


def keyed_otherwise(code: CodeType) -> frozenset[Named]:
    """What code assigns items of by keys that are no text whose parts are known."""
    return frozenset(_read(code).keyed_otherwise)


def returns_text(code: CodeType) -> bool:
    """Whether a function returns nothing but text whose parts are known."""
    return not code.co_flags & _NOT_AT_ONCE and _read(code).returned == {True}


class _Texts(Reader):
    def __init__(self, code: CodeType):
        super().__init__(code)
        self.instructions = [*dis.get_instructions(code)]
        self.taken: dict[int, set[Site]] = {}
        self.started: dict[int, int] = {}  # by the offset of a call, where it may run already
        self.stores_otherwise: set[str | int] = set()
        self.keyed_otherwise: set[Named] = set()
        self.called: dict[int, set[Site]] = {}
        self.stores_called: dict[str | int, set[str]] = {}
        self.returned: set[bool] = set()  # whether what is returned is text
        self.ends: dict[int, set[int]] = {}  # where text of an instruction is taken
        self._locals: dict[str, Text | _Holding | _Dict] = {}
        self._once = _assigned_once(code, self.instructions)
        self._position = {x.offset: i for i, x in enumerate(self.instructions)}
        self._at = 0  # the position of this instruction

    # ---- what takes text

    def _give(self, item: object, sink: Sink | None) -> None:
        """A sink takes an item from the stack, if it is text; None: nobody knows what becomes of
        it."""
        inside = type(item) in (_Holding, _Dict)
        if inside and sink is not None:
            sink = Sink(sink.how, "in", sink.chain)
        for text in item.texts if inside else (item,):
            for piece in text.pieces if type(text) is Text else ():
                found = self.called if piece.by == CALL else self.taken
                found.setdefault(piece.at, set()).add(Site(piece.at, text, sink))
                self.ends.setdefault(piece.at, set()).add(self.instructions[self._at].offset)
        if type(item) is _Dict and sink is None:
            item.lost = True

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
        if name == "STORE_FAST" and x.argval in self._once and stack and _is_held(stack[-1]):
            self._locals[x.argval] = _stored(stack.pop(), x.offset)
            return True
        if name == "LOAD_FAST" and x.argval in self._locals:
            self._push(self._locals[x.argval])
            return True
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
            if any(map(_is_made, stack[-2:])) and all(map(_is_text, stack[-2:])):
                stack[-2:] = [_joined(stack[-2:])]
                return True
        elif name == "BINARY_OP" and x.argrepr == "%" and len(stack) > 1:
            if (text := self._percent(stack[-2], x.offset)) is not None:
                self._take(2)
                self._push(text)
                return True
        elif name in _BUILDS and (x.arg or name == "BUILD_MAP"):
            return self._build(x)
        elif name == "LOAD_METHOD" and stack:
            of = stack[-1]
            bound = _Bound("", (*self._chain(1), x.argval)) if self._chain(1) else None
            if type(of) is _Constant and type(of.value) is str and x.argval == "format":
                bound = _Bound("format", of.value)
            elif x.argval in LOGS or x.argval in ("append", "write"):
                bound = _Bound(x.argval, self._chain(1))
            super()._step(x)
            stack[-2:] = [bound, bound] if bound is not None else stack[-2:]
            return True
        elif name == "STORE_ATTR" and len(stack) > 1 and type(stack[-2]) is Text:
            if stack[-2].callee:
                self.stores_called.setdefault(x.argval, set()).add(stack[-2].callee[-1])
            self._pop_to(Sink("attribute", x.argval, self._chain(1)), 2)
        elif name == "STORE_ATTR":
            self.stores_otherwise.add(x.argval)
        elif name == "RETURN_VALUE" and stack:
            self.returned.add(type(stack[-1]) is Text and not stack[-1].callee)
            if type(stack[-1]) in (Text, _Holding, _Dict):
                self._pop_to(Sink("return"))
        return super()._step(x)

    def _chain(self, back: int) -> tuple[str, ...]:
        """The names that lead to what the instruction so far back loads."""
        return chain_to(self.instructions, self.instructions[self._at - back])

    def _format(self, x: dis.Instruction) -> None:
        conversion, with_spec = x.arg & 3, bool(x.arg & 4)
        inner = self.stack[-1] if self.stack else None
        if type(inner) is Text and not inner.callee and not with_spec and conversion < 2:
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
        n = x.arg or 0
        pops = 2 * n if x.opname == "BUILD_MAP" else n + (x.opname == "BUILD_CONST_KEY_MAP")
        if len(self.stack) < pops:
            return super()._step(x)
        start = len(self.stack) - pops
        items = self.stack[start:]
        if x.opname == "BUILD_MAP":
            made, keys, values = _Dict(), items[::2], items[1::2]
        elif x.opname == "BUILD_CONST_KEY_MAP":
            keys = (
                [_Constant(key) for key in items[-1].value] if _is_tuple(items[-1]) else items[:n]
            )
            made, values = _Dict(), items[:n]
        else:
            made, keys, values = _Dict(), [None] * n, items
        for key, value in zip(keys, values, strict=True):
            self._put(made, key, value, of_dict=x.opname not in ("BUILD_TUPLE", "BUILD_LIST"))
        self.stack[start:] = [None if _is_held(item) else item for item in items]
        super()._step(x)
        self.stack[-1] = made if x.opname.endswith("MAP") else _Holding(tuple(made.texts))
        if made.lost:
            self.stack[-1] = None
        return True

    def _put(
        self,
        into: _Dict,
        key: object,
        value: object,
        at: int | None = None,
        *,
        of_dict: bool = True,
    ) -> None:
        """Something is put into a new container. Keys that may be equal would hide one another."""
        if of_dict:
            known = _is_made(key) or (type(key) is _Constant and type(key.value) is str)
            alone = type(key) is Text and not into.keys
            differs = known and all(_apart(key, other) for other in into.keys)
            into.lost |= into.closed or not (alone or differs)
            into.closed |= type(key) is Text and bool(key.callee)
            into.keys.append(key)
        for item in (key, value):
            inner = item.texts if type(item) in (_Holding, _Dict) else (item,)
            found = [text for text in inner if type(text) is Text]
            into.texts += found if at is None else [_stored(text, at) for text in found]
            if type(item) is _Dict:
                item.closed = True
                into.lost |= item.lost
        if into.lost:
            self._give(into, None)

    def _store_item(self) -> None:
        stack = self.stack
        if len(stack) > 2 and type(stack[-2]) is _Dict:
            self._put(stack[-2], stack[-1], stack[-3], self.instructions[self._at].offset)
            stack[-3:] = [None, None, None]
        elif len(stack) > 2 and type(stack[-3]) is Text:
            key, load = stack[-1], self.instructions[self._at - 1]
            plain = type(key) is _Constant and type(key.value) in (str, int)
            if plain and load.opname == "LOAD_CONST":
                if stack[-3].callee:
                    self.stores_called.setdefault(key.value, set()).add(stack[-3].callee[-1])
                self._pop_to(Sink("item", key.value, self._chain(2)), 3)
        elif len(stack) > 1 and type(stack[-1]) is Text and not stack[-1].callee:
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
        callee = bound.of if type(bound) is _Bound and not bound.name else ()
        if made is None and type(function) is Named and function.kind in ("global", "cell"):
            callee = (function.name,) if function.key is None and name not in _OF_PYTHON else ()
        if made is None and callee:
            made = Text((Piece(at, 0, CALL),), (), callee)
        if name == "str" and count == 1 and type(stack[-1]) is Text:
            made, stack[-1] = stack[-1], None  # text as it is
        super()._call(count)
        if made is not None:
            self.stack[-1] = made


def _assigned_once(code: CodeType, instructions: list[dis.Instruction]) -> frozenset[str]:
    """The variables of a function that it assigns to in one place, before all others where it is
    named."""
    if not {"locals", "eval", "exec", "vars"}.isdisjoint(code.co_names):
        return frozenset()
    named: dict[str, list[str]] = {}
    for x in instructions:
        if x.opname.endswith("_FAST"):
            named.setdefault(x.argval, []).append(x.opname)
    once = (n for n, of in named.items() if of[0] == "STORE_FAST" and set(of[1:]) <= {"LOAD_FAST"})
    return frozenset(once)


def _is_held(item: object) -> bool:
    """Whether a variable may hold an item that is followed."""
    return type(item) in (Text, _Holding, _Dict)


def _stored(item: Text | _Holding | _Dict, at: int) -> Text | _Holding | _Dict:
    """An item that is put into a variable."""
    if type(item) is Text:
        return replace(item, stored=(*item.stored, at))
    texts = [replace(text, stored=(*text.stored, at)) for text in item.texts]
    if type(item) is _Holding:
        return _Holding(tuple(texts))
    item.texts = texts
    return item


def _is_tuple(item: object) -> bool:
    return type(item) is _Constant and type(item.value) is tuple


def _apart(a: Text | _Constant, b: object) -> bool:
    """Whether two keys are never equal."""
    if type(b) not in (Text, _Constant):
        return False
    return apart(*(x.parts if type(x) is Text else (x.value,) for x in (a, b)))


def _is_made(item: object) -> bool:
    return type(item) is Text and not item.callee


def _is_text(item: object) -> bool:
    return _is_made(item) or (type(item) is _Constant and type(item.value) is str)


def _joined(items: list) -> Text:
    parts: list[str | Piece | None] = []
    stored: tuple[int, ...] = ()
    for item in items:
        if _is_made(item):
            parts += item.parts
            stored += item.stored
        else:
            parts.append(item.value if _is_text(item) else None)
    return Text(tuple(parts), stored)


def _of_template(template: str, at: int, count: int) -> Text | None:
    """The text of `template.format(…)` with so many values, in their order."""
    parts: list[str | Piece | None] = []
    try:
        fields = [*string.Formatter().parse(template)]
    except ValueError:
        return None
    for literal, named, spec, conversion in fields:
        parts.append(literal)
        if named is None:
            continue
        if named or "{" in spec or (conversion and spec):
            return None
        by = {"s": "__str__", "r": "__repr__", "a": "__repr__"}.get(conversion, "__format__")
        parts.append(Piece(at, sum(type(x) is Piece for x in parts), by))
    return Text(tuple(parts)) if sum(type(x) is Piece for x in parts) == count else None
