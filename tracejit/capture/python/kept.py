"""Texts of runtime scalars that a step keeps or returns: `self.tag = f"step {self.n}"`.

C puts a text together without asking its parts. But where code does nothing with a text but to put
it in one place (`texts.py`), its parts are known: those that the code spells, and those that the
runtime scalars gave. While a trace runs, `Kept` notes these. When it is over, a text that is found
in that place is a `Joint` of them, which a replay makes again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field, replace
from types import (
    CodeType,
    FrameType,
    FunctionType,
    MemberDescriptorType,
    ModuleType,
    SimpleNamespace,
)

import torch

from tracejit.capture.python.doubts import led_to
from tracejit.capture.python.texts import (
    CALL,
    Piece,
    Sink,
    Site,
    returns_text,
    sites_of_calls,
)
from tracejit.capture.trace import location
from tracejit.capture.trace.scalars import TracedFloat, TracedInt, TracedText, plain
from tracejit.records import dataclass

RETURNED = ("returned", None)
APPEND = ...  # in place of a key
KEYED = "by keys", None  # in place of a key: the text is one
_BIND = "tracejit.capture.bind"  # whose frame calls the step
# how a number comes out wherever the process is: not with "n", which asks the locale
_SPEC = re.compile(r"[-+ 0-9<>=^.,_]*[bdoxXeEfFgG%]?")
_PLAIN_SETTERS = tuple(
    kind.__setattr__ for kind in (object, torch.nn.Module, SimpleNamespace, ModuleType)
)
_PLAIN_GETTERS = tuple(kind.__getattribute__ for kind in (object, torch.nn.Module, SimpleNamespace))

Target = tuple[object, object]  # what tells a place apart: see `variables.identity`


class Joint(tuple):
    """A text as its parts: strings, and texts of runtime scalars."""

    __slots__ = ()


class Keyed(dict):
    """Stands for a dict that the step only puts something into, and notes what."""

    __slots__ = ("assigned", "before", "of")

    def __init__(self, of: dict):
        super().__init__(of)
        self.of, self.before = of, of.copy()
        self.assigned: list[tuple[object, object]] = []

    def __setitem__(self, key: object, x: object) -> None:
        dict.__setitem__(self, key, x)
        self.of[key] = x
        self.assigned.append((key, x))

    def over(self) -> None:
        """The trace is over: it holds nothing any more."""
        self.clear()
        self.assigned.clear()

    @property
    def is_alone(self) -> bool:
        """Whether the dict holds what was put in by way of this, and nothing else: it may have
        another name."""
        same = len(self) == len(self.of) and [*self] == [*self.of]
        return same and all(self[key] is x for key, x in self.of.items())

    def put_back(self) -> None:
        """The dict holds what it held before."""
        self.of.clear()
        self.of.update(self.before)

    def stores(self, texts: Sequence[Kept]) -> list[tuple[object, object]]:
        """The keys and what was put there; keys that are these texts as their parts. Nothing if
        they cannot be told from others."""
        if not texts or len(texts) != len(self.assigned):
            plain_keys = not texts and all(type(key) is str for key, _ in self.assigned)
            return [*self.assigned] if plain_keys else []
        keys = [text.joint(key) for text, (key, _) in zip(texts, self.assigned, strict=True)]
        found = zip(keys, (x for _, x in self.assigned), strict=True)
        return [] if None in keys else [*found]


@dataclass(slots=True)
class Kept:
    """A text that the step puts in a place, and what the runtime scalars in it have given."""

    code: CodeType
    site: Site
    frame: int  # the id of that which makes it
    target: Target
    where: str  # the user's line
    found: dict[Piece, TracedText] = field(default_factory=dict)

    def joint(self, whole: object) -> Joint | None:
        """The parts of what is in its place, if that is this text, and can be this text in one way
        only. Of one part it need not be known what it is."""
        if type(whole) is not str:
            return None
        ways = [x for parts in self._ways() if (x := _completed(parts, whole)) is not None]
        return Joint([x for x in ways[0] if x != ""]) if len(ways) == 1 else None

    def _ways(self) -> Iterator[list[str | TracedText | None]]:
        """Which values may have given which parts; None is a part that none of these has. Of
        several that one instruction formats, the others may be any."""
        parts = self.site.text.parts
        several = Counter(x.at for x in parts if type(x) is Piece)
        missing = [x for x in parts if type(x) is Piece and x not in self.found]
        if not missing or several[missing[0].at] == 1:
            yield [self.found.get(x) if type(x) is Piece else x for x in parts]
        elif len(missing) == 1:
            group = [x for x in parts if type(x) is Piece and x.at == missing[0].at]
            given = [self.found[x] for x in group if x in self.found]
            for i in range(len(group)):
                mine = dict(zip([*group[:i], *group[i + 1 :]], given, strict=True))
                found = {**self.found, group[i]: None, **mine}
                yield [found.get(x) if type(x) is Piece else x for x in parts]


def _completed(parts: list[str | TracedText | None], whole: str) -> list | None:
    """The parts of a text, of which one may be unknown."""
    unknown = [i for i, x in enumerate(parts) if x is None]
    if len(unknown) > 1:
        return None
    for i in unknown:
        start, end = map(len, (_whole(parts[:i]), _whole(parts[i + 1 :])))
        if start + end > len(whole):
            return None
        parts = [*parts[:i], whole[start : len(whole) - end], *parts[i + 1 :]]
    return parts if _whole(parts) == whole else None


def _whole(parts: Iterable[str | TracedText]) -> str:
    return "".join([x if type(x) is str else x.text for x in parts])


def keep(
    number: TracedFloat | TracedInt, frame: FrameType, site: Site, by: str, spec: str
) -> str | None:
    """Take note of text that is made of a number, by the method of this name; returns it. None
    where it cannot be followed."""
    live = number.live
    pieces = [x for x in site.text.pieces if x.at == site.at and x.by == by]
    if site.sink is None or not pieces or not live.journal.keeps_text((frame.f_code, site.at)):
        return None
    maker = frame
    while site.sink.how == "return" and not _is_step(maker):
        site, maker = _taken_by_caller(maker, site)
        if site is None:
            return None
    target = _target(maker, site.sink)
    if target is None or not _in_order(live.texts, site, target):
        return None

    def goes_on(kept: Kept) -> bool:
        same = kept.code is frame.f_code and kept.frame == id(frame) and kept.target == target
        return same and kept.site.text == site.text

    kept = next(filter(goes_on, reversed(live.texts)), None)
    piece = next((x for x in pieces if kept is None or x not in kept.found), None)
    anew = kept is None or piece is None  # the next one of a loop
    piece = pieces[0] if anew else piece
    spec = piece.spec if by == "__int__" else spec
    if not _SPEC.fullmatch(spec):
        return None
    try:
        text = format(plain(number), spec)
    except ValueError:
        return None
    if anew:
        kept = Kept(frame.f_code, site, id(frame), target, location.short())
        live.texts.append(kept)
    value = live.arithmetic("host_format", number.value, spec)
    live.numbers[value] = text
    kept.found[piece] = TracedText(text, live, value)
    return text


def _is_step(frame: FrameType) -> bool:
    """Whether a frame is that of the step."""
    return bool(frame.f_back) and frame.f_back.f_globals.get("__name__") == _BIND


def _taken_by_caller(frame: FrameType, site: Site) -> tuple[Site | None, FrameType]:
    """What takes the text that a frame's function returns, in the code that calls it, and the frame
    of that; None where that is not known."""
    caller = frame.f_back
    outer = None if caller is None else sites_of_calls(caller.f_code).get(caller.f_lasti)
    if outer is None or outer.sink is None:
        return None, frame
    inside = site.sink.name == "in"  # a container, which the caller has to return as it is
    if outer.sink != Sink("return") if inside else not returns_text(frame.f_code):
        return None, frame
    if _called(caller, outer.text.callee) is not frame.f_code:  # but something that calls it
        return None, frame
    parts = [x for x in outer.text.parts if type(x) is not Piece or x.by != CALL]
    stored = site.text.stored + outer.text.stored
    text = None if parts else replace(site.text, stored=stored, callee=outer.text.callee)
    sink = site.sink if inside else outer.sink
    return (None if text is None else Site(site.at, text, sink)), caller


def _called(frame: FrameType, names: tuple[str, ...]) -> CodeType | None:
    """The code of the user's function that names lead to in a frame, also one of a class."""
    x = led_to(frame, names)
    if type(x) is FunctionType:
        return x.__code__
    if len(names) < 2:
        return None
    of, name = led_to(frame, names[:-1]), names[-1]
    if type(of).__getattribute__ not in _PLAIN_GETTERS or name in getattr(of, "__dict__", ()):
        return None
    found = next((vars(c)[name] for c in type(of).__mro__ if name in vars(c)), None)
    found = found.__func__ if type(found) is staticmethod else found
    return found.__code__ if type(found) is FunctionType else None


def _in_order(texts: Sequence[Kept], site: Site, target: Target) -> bool:
    """Whether texts are made in the order in which they are put at the end of a list, or into a
    dict: not where one of several waits in a variable."""
    if target[1] not in (APPEND, KEYED):
        return True
    others = [kept for kept in texts if kept.target == target and kept.site.text != site.text]
    return not others or not (site.text.stored or any(k.site.text.stored for k in others))


def _target(frame: FrameType, sink: Sink) -> Target | None:
    """The place that a text goes to, if storing it there runs no code of the user's."""
    if sink.how == "return":
        return RETURNED if _is_step(frame) else None
    if sink.how not in ("attribute", "item", "append", "key"):
        return None
    x = led_to(frame, sink.chain) if sink.chain else None
    if sink.how == "append":
        return (id(x), APPEND) if type(x) is list else None
    if sink.how == "key":
        x = x.of if type(x) is Keyed else x
        return (id(x), KEYED) if type(x) is dict else None
    if sink.how == "item":
        return (id(x), sink.name) if type(x) in (dict, list) else None
    return _of_attribute(x, sink.name)


def _of_attribute(x: object, name: str) -> Target | None:
    if type(x) is type:
        return id(x), name
    held = getattr(x, "__dict__", None)
    if type(x).__setattr__ not in _PLAIN_SETTERS:
        return None
    for cls in type(x).__mro__:
        if name in vars(cls):
            if type(vars(cls)[name]) is MemberDescriptorType:  # a slot
                return id(x), name
            if hasattr(type(vars(cls)[name]), "__set__"):
                return None
            break
    return (id(held), name) if type(held) is dict else None
