"""A user's line of code as messages show it: its text, and carets under the call.

In: a code object and the offset of an instruction in it, which is all that a trace notes. Out: two
lines of text, which are made when a message is asked for. Where the source is not there, or is not
what was compiled, there is no text; where CPython keeps no columns, there are no carets.
"""

from __future__ import annotations

import ast
import linecache
import os
import textwrap
import unicodedata
from collections.abc import Iterator
from itertools import islice
from types import CodeType, FrameType

_INDENT = "    "


class Place(str):
    """A place in the user's code, as text (`/home/me/step.py:12`); equal if the text is.

    code, offset: the code object, and the instruction in it, in bytes; None where not known.
    text: how it is quoted, of a place that came from another process.
    """

    code: CodeType | None = None
    offset: int = -1
    text: str | None = None

    def __reduce__(self) -> tuple:
        return _with_text, (str(self), quote(self))


def place(frame: FrameType) -> Place:
    """Where a frame is now."""
    return at(frame.f_code, frame.f_lasti, frame.f_lineno)


def at(code: CodeType, offset: int, line: int) -> Place:
    """An instruction of some code, in a line."""
    file = code.co_filename
    found = Place(f"{file if file.startswith('<') else os.path.abspath(file)}:{line}")
    found.code, found.offset = code, offset
    return found


def _with_text(where: str, text: str) -> Place:
    found = Place(where)
    found.text = text
    return found


def quote(where: object) -> str:
    """The user's line with carets under the call, each in a line of its own; "" where there is no
    such text, or `where` is just a string."""
    code = getattr(where, "code", None)
    if code is None:
        return getattr(where, "text", None) or ""
    found = next(islice(code.co_positions(), max(where.offset, 0) // 2, None), None)
    if found is None or found[0] is None:
        return ""
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename)
    line, end, start, stop = found
    if not 0 < line <= len(lines):
        return ""
    text = lines[line - 1].rstrip()
    shown = f"\n{_INDENT}{text.lstrip()}"
    if None in found:
        return shown
    used = [x.rstrip("\n") for x in lines[line - 1 : end]]
    first, last = used[0].encode(), used[-1].encode()
    if stop > len(last) or start > len(first):
        return ""
    above, below = first[:start].decode(errors="replace"), last[:stop].decode(errors="replace")
    used[-1] = below
    used[0] = used[0][len(above) :]
    if not _is_of(code, "\n".join(used)):
        return ""
    marked = text if end > line else below  # of several lines only the first one is shown
    carets = "^" * max(_width(marked[len(above) :]), 1)
    return f"{shown}\n{_INDENT}{_blank(above.lstrip())}{carets}"


def quoted(line: str) -> str:
    """The source of a line that is only known as text, file:line, in a line of its own."""
    file, _, number = line.rpartition(":")
    text = linecache.getline(file, int(number)).strip() if number.isdigit() else ""
    return f"\n{_INDENT}{text}" if text else ""


def _is_of(code: CodeType, text: str) -> bool:
    """Whether a piece of source can be what code was compiled from: files change meanwhile."""
    tree = None
    for source in (f"({text}\n)", textwrap.dedent(text)):
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        break
    if tree is None:
        return False
    known = set(_names(code))
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    used |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    mangled = {name for name in used if name.startswith("__")}
    return used - mangled <= known and all(any(k.endswith(m) for k in known) for m in mangled)


def _names(code: CodeType) -> Iterator[str]:
    """All names that some code uses, and those of functions within."""
    yield from (*code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _width(text: str) -> int:
    """How many columns of a terminal some text takes."""
    return sum(1 + (unicodedata.east_asian_width(x) in "WF") for x in text)


def _blank(text: str) -> str:
    """Spaces as wide as some text; tabs stay."""
    return "".join(x if x == "\t" else " " * _width(x) for x in text)
