"""Which ways code may go from an instruction.

In: a code object and offsets of instructions. Out: whether what a variable was given there is taken
on every way, and once.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Collection
from types import CodeType


def always(code: CodeType, start: int, ends: Collection[int]) -> bool:
    """Whether each way from an instruction to where the code returns passes one of `ends`, with
    nothing on it that catches exceptions, and none leads back to it."""
    following, caught = _ways(code)
    if start in _from(following, start, ()):
        return False
    between = _from(following, start, ends)
    if any(not following[at] for at in between):  # it returns; what raises ends the trace
        return False
    return not any(a <= at < b for at in (start, *between) for a, b in caught)


def _from(following: dict[int, list[int]], start: int, ends: Collection[int]) -> set[int]:
    """What may come after an instruction, before one of `ends`."""
    seen: set[int] = set()
    pending = [*following[start]]
    while pending:
        at = pending.pop()
        if at not in seen and at not in ends:
            seen.add(at)
            pending += following[at]
    return seen


@functools.lru_cache(1000)
def _ways(code: CodeType) -> tuple[dict[int, list[int]], list[tuple[int, int]]]:
    """What may come after each instruction, by offsets; and the ranges in which the code catches
    exceptions, but for what `with` does."""
    instructions = [*dis.get_instructions(code)]
    following: dict[int, list[int]] = {}
    for x, after in zip(instructions, [*instructions[1:], None], strict=True):
        found = []
        if x.opcode in dis.hasjrel or x.opcode in dis.hasjabs:
            found.append(x.argval)
        ends = x.opname == "RETURN_VALUE"
        if x.opname in ("RAISE_VARARGS", "RERAISE"):
            found.append(_RAISES)
        elif not ends and x.opname not in _JUMPS_ALWAYS and after is not None:
            found.append(after.offset)
        following[x.offset] = found
    following[_RAISES] = [_RAISES]
    at = {x.offset: i for i, x in enumerate(instructions)}
    caught = []
    for entry in dis._parse_exception_table(code):
        names = [x.opname for x in instructions[at[entry.target] :][:2]]
        of_with = names == ["PUSH_EXC_INFO", "WITH_EXCEPT_START"] or names[:1] == ["COPY"]
        if not of_with:
            caught.append((entry.start, entry.end))
    return following, caught


_RAISES = -1  # in place of an offset
_JUMPS_ALWAYS = frozenset(
    {"JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE"}
)
