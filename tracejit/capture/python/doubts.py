"""Instructions that keep a step from being replayed if they run, and whether they did.

Code may hold what no replay can account for: an import of what is not there yet, `%` on a string, a
class that is defined. That is a reason only for calls that come by there. While a trace is watched,
`Passed` notes the lines of such instructions that ran, by the interpreter's tracing of lines. Where
a debugger has taken that, they all count.
"""

from __future__ import annotations

import dis
import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType, SimpleNamespace

import torch

from tracejit.capture.python.origins import origin
from tracejit.capture.trace.scalars import is_traced
from tracejit.records import dataclass

_UNSAFE_ATTRIBUTES = frozenset(
    {
        *("__globals__", "__code__", "__closure__", "__defaults__", "__subclasses__"),
        *("f_locals", "f_globals", "f_back", "f_code", "gi_frame", "tb_frame", "cell_contents"),
    }
)
_IMPORTS = frozenset({"IMPORT_NAME", "IMPORT_FROM", "IMPORT_STAR"})
# C formats these without asking the float for its number; the other conversions ask
_UNASKED = re.compile(r"%(\([^)]*\))?[-+ #0]*(\*|\d+)?(\.(\*|\d+)?)?[hlL]?[eEfFgG]")
_STARTED = re.compile(r"%[-+ #0-9.*]*$")  # what may become such a one with more text behind it


@dataclass(frozen=True, slots=True)
class Doubt:
    """A line that keeps a step from being replayed if it runs, and why. offset: of the one
    instruction that counts, if it is looked at by itself. sure: whatever its operands are."""

    code: CodeType
    line: int
    why: str
    offset: int | None = None
    sure: bool = True


@functools.cache
def doubts(code: CodeType) -> tuple[Doubt, ...]:
    """Those of one code object, but for imports, which depend on what there is to import."""
    found, line = [], code.co_firstlineno
    instructions = list(dis.get_instructions(code))
    for i, x in enumerate(instructions):
        line = x.starts_line or line
        if x.opname == "LOAD_CONST" and isinstance(x.argval, complex):
            found.append(Doubt(code, line, "it computes with complex numbers"))
        elif x.opname == "BINARY_OP" and x.argrepr in ("%", "%="):
            left = left_of(instructions, i)
            sure = left is not None and left.opname == "LOAD_CONST"
            if not sure or (isinstance(left.argval, (str, bytes)) and may_read(left.argval)):
                found.append(Doubt(code, line, "it may format a string with %", x.offset, sure))
        elif x.opname == "LOAD_BUILD_CLASS":
            found.append(Doubt(code, line, "it defines a class"))
        elif x.opname in ("LOAD_ATTR", "LOAD_METHOD") and x.argval in _UNSAFE_ATTRIBUTES:
            found.append(Doubt(code, line, f"it reads {x.argval}"))
    return tuple(found)


def may_read(template: str | bytes) -> bool:
    """Whether `template % x` reads the number of a float x without asking it."""
    return _UNASKED.search(_text(template)) is not None


def template(x: object) -> bool:
    """Whether a value may be such a template, or the beginning of one."""
    return isinstance(x, (str, bytes)) and (may_read(x) or _STARTED.search(_text(x)) is not None)


def _text(template: str | bytes) -> str:
    return template.decode("latin1") if isinstance(template, bytes) else template


def left_of(instructions: list[dis.Instruction], i: int) -> dis.Instruction | None:
    """The last instruction of the left operand of a binary operation; None where jumps hide it."""
    depth = 0
    for k in range(i - 1, 0, -1):
        x = instructions[k]
        if x.is_jump_target or x.opcode in dis.hasjrel or x.opcode in dis.hasjabs:
            return None
        depth += dis.stack_effect(x.opcode, x.arg, jump=False)
        if depth == 1:
            return instructions[k - 1]
    return None


@functools.cache
def _watched(code: CodeType) -> tuple[frozenset[int], dict[int, tuple[str, ...]]]:
    """The lines of code that are asked about, and the instructions that are looked at by
    themselves: by their offset, the chain of names that leads to their left operand."""
    lines, looked_at, line = set(), {}, code.co_firstlineno
    instructions = list(dis.get_instructions(code))
    own = {d.offset for d in doubts(code)}
    for i, x in enumerate(instructions):
        line = x.starts_line or line
        if x.opname in _IMPORTS:
            lines.add(line)
        if x.offset in own:
            looked_at[x.offset] = chain_to(instructions, left_of(instructions, i))
    lines |= {d.line for d in doubts(code) if d.offset is None}
    return frozenset(lines), looked_at


def chain_to(instructions: list[dis.Instruction], last: dis.Instruction | None) -> tuple[str, ...]:
    """The names `a.b.c` by which code loads a value; none if it does so in another way."""
    names: list[str] = []
    k = instructions.index(last) if last is not None else -1
    while k >= 0:
        x = instructions[k]
        names.append(x.argval)
        if x.opname in ("LOAD_FAST", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME"):
            return tuple(reversed(names))
        if x.opname != "LOAD_ATTR":
            break
        k -= 1
    return _ANY


_ANY: tuple[str, ...] = ()


class Passed:
    """What a trace has come by: see the module."""

    def __init__(self) -> None:
        self.known = False  # whether lines were traced at all
        self.outermost: FrameType | None = None  # of the calls in progress that are traced
        self._lines: set[tuple[CodeType, int]] = set()
        self._offsets: set[tuple[CodeType, int]] = set()

    def has(self, doubt: Doubt) -> bool:
        """Whether a doubtful line ran, as far as is known."""
        if not self.known:
            return True
        if doubt.offset is None:
            return (doubt.code, doubt.line) in self._lines
        return (doubt.code, doubt.offset) in self._offsets

    def enter(self, frame: FrameType) -> bool:
        """A call begins, and none is traced: trace it, and what it calls, if its code has doubtful
        lines; says whether it has. Tracing takes time of each instruction, of whatever code."""
        if origin(frame.f_code) != "user" or not any(_watched(frame.f_code)):
            return False
        if self.known:
            self.outermost, frame.f_trace = frame, self._calls(frame, "call", None)
            sys.settrace(self._calls)
        return True

    def leave(self) -> None:
        """The outermost of the calls that are traced is over."""
        self.outermost = None
        sys.settrace(None)

    def _calls(self, frame: FrameType, event: str, arg: object) -> object:
        code = frame.f_code
        if origin(code) != "user":
            return None
        lines, looked_at = _watched(code)
        if looked_at:
            frame.f_trace_opcodes = True
        return self._steps if lines or looked_at else None

    def _steps(self, frame: FrameType, event: str, arg: object) -> object:
        if event == "line":
            self._lines.add((frame.f_code, frame.f_lineno))
        elif event == "opcode":
            chain = _watched(frame.f_code)[1].get(frame.f_lasti)
            if chain is not None and _may_be_text(frame, chain):
                self._offsets.add((frame.f_code, frame.f_lasti))
        return self._steps

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Note what this thread comes by inside, in the calls that `enter` is told of."""
        self.known = sys.gettrace() is None
        try:
            yield
        finally:
            if self.outermost is not None:
                self.leave()


def _may_be_text(frame: FrameType, chain: tuple[str, ...]) -> bool:
    """Whether a left operand of % may be a string, as far as its names tell."""
    x = led_to(frame, chain)
    if x is _UNKNOWN:
        return True
    if type(x) in (str, bytes):
        return may_read(x)
    return not (type(x) in (int, float, bool) or is_traced(x) or isinstance(x, torch.Tensor))


_UNKNOWN = object()


def led_to(frame: FrameType, chain: tuple[str, ...]) -> object:
    """What names lead to in a frame; an object of no use if that cannot be told. No code of the
    user's runs for that."""
    if chain == _ANY:
        return _UNKNOWN
    first, *rest = chain
    if first in frame.f_locals:
        x = frame.f_locals[first]
    elif first in frame.f_globals:
        x = frame.f_globals[first]
    else:
        return _UNKNOWN
    for name in rest:
        held = getattr(x, "__dict__", None) if type(x).__getattribute__ in _PLAIN else None
        if type(held) is not dict or name not in held:
            return _UNKNOWN
        x = held[name]
    return x


_PLAIN = tuple(kind.__getattribute__ for kind in (object, FunctionType, SimpleNamespace))
