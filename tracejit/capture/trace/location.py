"""Where in the user's code a call comes from: the line, the function, the module that is called."""

from __future__ import annotations

import os
import sys
import warnings
from types import CodeType, FrameType

import torch
from torch.nn import Module

from tracejit.ir.graph import Node
from tracejit.quotes import Place, at, place

_OURS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_OPTIMIZERS = os.path.join(_TORCH, "optim", "")
_CALL = Module._call_impl.__code__  # its frame has the module that is called
_outermost: dict[int, CodeType] = {}  # by id, as in `ByCode`


class ByCode(dict):
    """What is known of code objects, by their ids, with the objects: hashing one costs as much as a
    call. All is forgotten where there are many, as of codes that are made anew in each call."""

    MOST = 20_000

    def keep(self, code: CodeType, known: object) -> None:
        """From now on this is known."""
        if len(self) > self.MOST:
            self.clear()
        self[id(code)] = code, known


_INNER, _USER, _CALLING, _OUTERMOST = range(4)


class _Kinds(ByCode):
    """What codes are to a walk along the frames of a call. `inner`: the ids of those that are inner
    ones, nearly all frames of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: set[int] = set()

    def clear(self) -> None:
        super().clear()
        self.inner.clear()


_kinds = _Kinds()


def user_frame():
    """The innermost frame that belongs neither to tracejit nor to torch, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        if _belongs_to_user(frame.f_code):
            return frame
        frame = frame.f_back
    return None


def _belongs_to_user(code: CodeType) -> bool:
    known = _kinds.get(id(code))
    return (_kind(code) if known is None else known[1]) == _USER


def _kind(code: CodeType) -> int:
    """What code is to a walk along the frames of a call, from the inside."""
    name = code.co_filename
    if code is _CALL:
        kind = _CALLING
    elif id(code) in _outermost:
        kind = _OUTERMOST
    elif name.startswith((_OURS, _TORCH, "<frozen")) or name == "<string>":
        kind = _INNER
    else:
        kind = _USER
    _kinds.keep(code, kind)
    if kind == _INNER:
        _kinds.inner.add(id(code))
    return kind


def short() -> str:
    """The user's line as the IR prints it: `two_layer_net.py:12`."""
    frame = user_frame()
    return "" if frame is None else _text(frame)


def _text(frame) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


class Line(Place):
    """The user's line as the IR prints it, which knows more of itself: equal if the text is.

    file, function: of the line; code, offset: the instruction there.
    phase: "backward" of what derivative formulas emit, "update" of what an optimizer of torch's
        calls, else "".
    module: what is called there: how many of the step's outermost modules were called first before
        this one's, that one's class, the way from there (`blocks.0.norm1`), and its own class.
    """

    file: str = ""
    function: str = ""
    phase: str = ""
    module: tuple[int, str, str, str] | None = None

    def changed(self, **fields: object) -> Line:
        """The same text, otherwise with other fields."""
        line = Line(self)
        line.__dict__ = self.__dict__ | fields
        return line


class Lines:
    """The lines of one trace, and the modules that it calls."""

    def __init__(self):
        self.phase = ""  # of the user's code that runs inside of a derivative formula
        self._known: dict[tuple, Line] = {}
        self._codes: list[CodeType] = []  # of the users' lines, whose ids are theirs
        self._roots: list[tuple[Module, dict[int, tuple[str, str]]]] = []  # ids are theirs

    def here(self) -> Line:
        """The line of the innermost user frame."""
        frame = sys._getframe(1)
        user, inner, calls = None, None, []
        known_inner = _kinds.inner
        while frame is not None:
            code = frame.f_code
            if id(code) not in known_inner:
                known = _kinds.get(id(code))
                kind = _kind(code) if known is None else known[1]
                if kind == _USER:
                    user = frame if user is None else user
                elif kind == _CALLING:
                    calls.append(frame)
                elif kind == _OUTERMOST:
                    break
            if user is None:
                inner = code
            frame = frame.f_back
        if user is None:
            return _NOWHERE
        phase = self.phase or ("update" if inner.co_filename.startswith(_OPTIMIZERS) else "")
        module = self._module(calls) if calls else None
        key = id(user.f_code), user.f_lasti, module, phase
        line = self._known.get(key)
        if line is None:
            line = self._known[key] = Line(_text(user))
            self._codes.append(user.f_code)
            line.file, line.function = user.f_code.co_filename, user.f_code.co_qualname
            line.phase, line.module = phase, module
            line.code, line.offset = user.f_code, user.f_lasti
        return line

    def backward(self, at: str, forward: str) -> Line:
        """The line of the derivative of something, in a backward that is called `at` a line."""
        module = getattr(forward, "module", None)
        key = at, getattr(at, "file", ""), module
        line = self._known.get(key)
        if line is None:
            at = at if isinstance(at, Line) else Line(at)
            line = self._known[key] = at.changed(module=module, phase="backward")
        return line

    def _module(self, calls: list[FrameType]) -> tuple[int, str, str, str]:
        """The innermost of the modules that are called, seen from the outermost one in whose tree
        it stands; the first in the list is the innermost. To ask a frame for its variables takes
        longer than all else here."""
        inner = id(calls[0].f_locals["self"])
        for frame in reversed(calls):
            outer = frame.f_locals["self"]
            number, names = self._root(outer)
            found = names.get(inner)
            if found is not None:
                return number, type(outer).__name__, *found
        raise AssertionError("a module is in its own tree")

    def _root(self, module: Module) -> tuple[int, dict[int, tuple[str, str]]]:
        """The number of an outermost module, and the modules of its tree: their names in it, and
        their classes."""
        for number, (root, names) in enumerate(self._roots):
            if root is module:
                return number, names
        names = {id(m): (name, type(m).__name__) for name, m in module.named_modules()}
        self._roots.append((module, names))
        return len(self._roots) - 1, names


_NOWHERE = Line()


def traced_from(code: CodeType) -> None:
    """Frames from that of this function outward call no modules of a step."""
    _outermost[id(code)] = code
    _kinds.pop(id(code), None)
    _kinds.inner.discard(id(code))


def warn(text: str, category: type[Warning]) -> None:
    """Warn at the user's line."""
    frame = user_frame()
    if frame is None:
        warnings.warn(text, category, stacklevel=2)
        return
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__", "<unknown>")
    warnings.warn_explicit(
        text, category, frame.f_code.co_filename, frame.f_lineno, module, registry
    )


def full() -> str:
    """The user's line for an error: the whole path, the line number, and the call there."""
    frame = user_frame()
    return "<unknown>" if frame is None else place(frame)


def of_line(line: str) -> str:
    """A line that a trace has noted, for an error when the step's Python is over; that of the call
    where none is known."""
    code = getattr(line, "code", None)
    return full() if code is None else at(code, line.offset, int(line.rpartition(":")[2]))


def of_node(node: Node | None) -> str:
    """The same of the line that a node comes from."""
    return of_line("" if node is None else node.where)
