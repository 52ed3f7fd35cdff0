"""What code does with the value under a name: `self.rates` is subscripted, `losses` is appended to.

In: a code object. Out: for each place where it loads an attribute, a global, or a variable of a
closure, and for each item of such a one under a constant key, what takes that value from the
stack. The stack is followed as the instructions stand, through jumps forward; what is lost sight of
is a use of a kind that nobody asks for.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Collection
from types import CodeType

from tracejit.records import dataclass

KINDS = {
    "LOAD_ATTR": "attribute",
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
    "LOAD_DEREF": "cell",
    "LOAD_CLASSDEREF": "cell",
    "LOAD_FAST": "local",
}
UNKNOWN = "unknown"  # what becomes of a value that is lost sight of


@dataclass(frozen=True, slots=True)
class Named:
    """What is under a name, or there under a constant key."""

    kind: str  # one of those in KINDS
    name: str
    key: str | int | None = None


@dataclass(frozen=True, slots=True)
class _Constant:
    value: object


_Item = Named | _Constant | None  # on the stack
Uses = dict[Named, set[str]]


def used_only(code: CodeType, named: Named, allowed: Collection[str]) -> bool:
    """Whether code does nothing but what is `allowed` with what is under a name.

    What it may do: "append" (and any other method, by its name), "subscript", "contains",
    "len()" (and any other global function, called with nothing else), "test", "is None", "iterate",
    "assigned" (of an item), "key assigned" (by a key that is computed).
    A variable of a function that it is put in is looked at too. An attribute may also be reached by
    a constant that spells its name (`getattr(x, "rates")`), which is not allowed.
    """
    found = uses(code)
    if named.key is not None:
        whole = Named(named.kind, named.name)
        if not found.get(whole, set()) <= {"item", "item assigned"}:  # by a key that is computed
            return False
    if named.kind == "attribute" and _spells(code, named.name):
        return False
    return _allowed(found, named, frozenset(allowed), set())


def _allowed(found: Uses, named: Named, allowed: frozenset[str], seen: set[Named]) -> bool:
    if named in seen:
        return True
    seen.add(named)
    for use in found.get(named, ()):
        if use.startswith("store "):  # in a variable of the function
            if not _allowed(found, Named("local", use[6:]), allowed, seen):
                return False
        elif use not in allowed:
            return False
    return True


@functools.cache
def _spells(code: CodeType, name: str) -> bool:
    pending = [*code.co_consts]
    while pending:
        x = pending.pop()
        if x == name and type(x) is str:
            return True
        if type(x) is tuple:
            pending += x
    return False


@functools.cache
def uses(code: CodeType) -> Uses:
    """What becomes of each thing that code loads."""
    return Reader(code).all()


class Reader:
    """Follows the stack of one code object."""

    def __init__(self, code: CodeType):
        self.code = code
        self.found: Uses = {}
        self.stack: list[_Item] = []
        self.at_target: dict[int, list[_Item]] = {}  # the stack at jumps forward, by their target

    def all(self) -> Uses:
        live = True
        for x in dis.get_instructions(self.code):
            if x.is_jump_target:
                self._arrive(x.offset, live)
                live = True
            live = self._step(x)
        self._lose()
        for stack in self.at_target.values():
            self.stack = stack
            self._lose()
        return self.found

    def _arrive(self, offset: int, live: bool) -> None:
        """Instructions that jumps lead to: the stack is what all ways have in common."""
        there = self.at_target.pop(offset, None)
        if not live:
            self.stack = there or []
        elif there is not None:
            ours = self.stack
            n = min(len(ours), len(there))
            # the items of both ways, from the top; what they do not share is not seen again
            pairs = [*zip(reversed(ours), reversed(there), strict=False)]
            merged = [a if a == b else None for a, b in pairs][::-1]
            for a, b in pairs:
                if a != b:
                    self._use(a, UNKNOWN)
                    self._use(b, UNKNOWN)
            for a in (*ours[: len(ours) - n], *there[: len(there) - n]):
                self._use(a, UNKNOWN)
            self.stack = merged

    def _lose(self) -> None:
        for item in self.stack:
            self._use(item, UNKNOWN)
        self.stack = []

    def _use(self, item: _Item, how: str) -> None:
        if type(item) is Named:
            self.found.setdefault(item, set()).add(how)

    def _pop(self) -> _Item:
        return self.stack.pop() if self.stack else None

    def _take(self, count: int, how: str = UNKNOWN) -> None:
        for _ in range(count):
            self._use(self._pop(), how)

    def _push(self, *items: _Item) -> None:
        self.stack += items

    def _jump(self, x: dis.Instruction) -> None:
        if x.argval > x.offset:
            there = self.at_target.get(x.argval)
            if there is None:
                self.at_target[x.argval] = [*self.stack]
            elif there != self.stack:  # the third way to it: nothing of them is followed
                for item in (*there, *self.stack):
                    self._use(item, UNKNOWN)
                self.at_target[x.argval] = [None] * min(len(there), len(self.stack))

    def _step(self, x: dis.Instruction) -> bool:
        """Follow an instruction; returns whether the next one comes after it."""
        name, arg = x.opname, x.arg
        if name in _NOTHING:
            return True
        if name in KINDS:
            if name == "LOAD_ATTR":
                self._take(1, "attribute")
            elif name == "LOAD_GLOBAL" and arg & 1:
                self._push(None)
            self._push(Named(KINDS[name], x.argval))
        elif name == "LOAD_CONST":
            self._push(_Constant(x.argval))
        elif name == "LOAD_METHOD":
            self._take(1, x.argval)
            self._push(None, None)
        elif name == "STORE_FAST":
            self._take(1, f"store {x.argval}")
        elif name == "BINARY_SUBSCR":
            self._subscript()
        elif name == "STORE_SUBSCR":
            self._store_item()
        elif name == "CONTAINS_OP":
            self._take(1, "contains")
            self._take(1, "sought")
            self._push(None)
        elif name == "IS_OP":
            right, left = self._pop(), self._pop()
            for item, other in ((left, right), (right, left)):
                self._use(item, "is None" if other == _Constant(None) else UNKNOWN)
            self._push(None)
        elif name == "CALL":
            self._call(arg)
        elif name == "COPY":
            self._push(self.stack[-arg] if arg <= len(self.stack) else None)
        elif name == "SWAP":
            self._swap(arg)
        elif name == "GET_ITER":
            self._take(1, "iterate")
            self._push(None)
        elif name == "UNPACK_SEQUENCE":
            self._take(1, "iterate")
            self._push(*[None] * arg)
        elif name in _JUMPS_BY_VALUE:
            self._take(1, "is None" if name.endswith(("_NONE", "_NOT_NONE")) else "test")
            self._jump(x)
        elif name in ("JUMP_IF_FALSE_OR_POP", "JUMP_IF_TRUE_OR_POP"):
            self._jump(x)
            self._take(1, "test")
        elif name == "JUMP_FORWARD":
            self._jump(x)
            self.stack = []
            return False
        elif name == "FOR_ITER":
            self._jump_past_loop(x)
            self._push(None)
        elif name in _EFFECTS:
            pops, pushes = _EFFECTS[name](arg)
            self._take(pops)
            self._push(*[None] * pushes)
            if name in ("RETURN_VALUE", "RAISE_VARARGS"):
                self._lose()
                return False
        elif name.startswith("JUMP_BACKWARD"):
            self._lose()
            return False
        else:
            self._lose()
            return name != "RERAISE"
        return True

    def _jump_past_loop(self, x: dis.Instruction) -> None:
        iterator, rest = self.stack[-1:], self.stack[:-1]
        self.stack = rest
        self._jump(x)
        self.stack = rest + iterator

    def _subscript(self) -> None:
        index, of = self._pop(), self._pop()
        self._use(index, "index")
        item = _item(of, index)
        self._use(of, "item" if item else "subscript")
        self._push(item)

    def _store_item(self) -> None:
        index, of = self._pop(), self._pop()
        self._take(1)  # what is stored
        self._use(index, "index")
        item = _item(of, index)
        self._use(of, "item assigned" if item else "key assigned")
        self._use(item, "assigned")

    def _call(self, count: int) -> None:
        """`count` arguments; below them a function and what it is bound to, or nothing."""
        if count == 1 and len(self.stack) > 1 and type(self.stack[-2]) is Named:
            function = self.stack[-2]
            how = f"{function.name}()" if function.kind == "global" else UNKNOWN
            self._take(1, how)
        else:
            self._take(count)
        self._take(2, "call")
        self._push(None)

    def _swap(self, n: int) -> None:
        if n > len(self.stack):
            self.stack = [None] * (n - len(self.stack)) + self.stack
        self.stack[-1], self.stack[-n] = self.stack[-n], self.stack[-1]


def _item(of: _Item, index: _Item) -> Named | None:
    """What is in something named, under a constant key."""
    spelled = type(index) is _Constant and type(index.value) in (str, int)
    if not spelled or type(of) is not Named or of.key is not None:
        return None
    return Named(of.kind, of.name, index.value)


_NOTHING = frozenset(
    {
        *("NOP", "RESUME", "CACHE", "EXTENDED_ARG", "PRECALL", "KW_NAMES", "MAKE_CELL"),
        *("COPY_FREE_VARS", "DELETE_FAST", "DELETE_GLOBAL", "SETUP_ANNOTATIONS"),
    }
)
_JUMPS_BY_VALUE = frozenset(
    f"POP_JUMP_{way}_IF_{what}"
    for way in ("FORWARD", "BACKWARD")
    for what in ("TRUE", "FALSE", "NONE", "NOT_NONE")
)
# how many items an instruction takes from the stack, and puts there, by its argument
_EFFECTS = {
    "PUSH_NULL": lambda n: (0, 1),
    "LOAD_CLOSURE": lambda n: (0, 1),
    "LOAD_ASSERTION_ERROR": lambda n: (0, 1),
    "POP_TOP": lambda n: (1, 0),
    "RETURN_VALUE": lambda n: (1, 0),
    "RAISE_VARARGS": lambda n: (n, 0),
    "STORE_ATTR": lambda n: (2, 0),
    "DELETE_SUBSCR": lambda n: (2, 0),
    "DELETE_ATTR": lambda n: (1, 0),
    "STORE_DEREF": lambda n: (1, 0),
    "STORE_GLOBAL": lambda n: (1, 0),
    "STORE_NAME": lambda n: (1, 0),
    "BINARY_OP": lambda n: (2, 1),
    "COMPARE_OP": lambda n: (2, 1),
    "UNARY_NOT": lambda n: (1, 1),
    "UNARY_NEGATIVE": lambda n: (1, 1),
    "UNARY_POSITIVE": lambda n: (1, 1),
    "UNARY_INVERT": lambda n: (1, 1),
    "BUILD_TUPLE": lambda n: (n, 1),
    "BUILD_LIST": lambda n: (n, 1),
    "BUILD_SET": lambda n: (n, 1),
    "BUILD_STRING": lambda n: (n, 1),
    "BUILD_SLICE": lambda n: (n, 1),
    "BUILD_MAP": lambda n: (2 * n, 1),
    "BUILD_CONST_KEY_MAP": lambda n: (n + 1, 1),
    "FORMAT_VALUE": lambda n: (2 if n & 4 else 1, 1),
    "LIST_EXTEND": lambda n: (1, 0),
    "SET_UPDATE": lambda n: (1, 0),
    "DICT_UPDATE": lambda n: (1, 0),
    "DICT_MERGE": lambda n: (1, 0),
    "LIST_APPEND": lambda n: (1, 0),
    "SET_ADD": lambda n: (1, 0),
    "MAP_ADD": lambda n: (2, 0),
    "LIST_TO_TUPLE": lambda n: (1, 1),
    "CALL_FUNCTION_EX": lambda n: (3 + (n & 1), 1),
    "MAKE_FUNCTION": lambda n: (1 + n.bit_count(), 1),
    "BEFORE_WITH": lambda n: (1, 2),
    "IMPORT_NAME": lambda n: (2, 1),
    "IMPORT_FROM": lambda n: (0, 1),
}
