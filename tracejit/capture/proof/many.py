"""What tensors are, and what dicts hold, in a guard: of many it is asked at once.

In: the lines of a walk, and the tensors that the graph reads. Out: lines that ask of each; where
there are many, and words of memory can tell whether anything has changed (`words.py`), these lines
run only if something has.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from operator import attrgetter

import torch

from tracejit.capture.proof.guard_text import differs
from tracejit.capture.proof.heap import HOOKS_OF_TENSORS, Walk
from tracejit.capture.python.counters import Containers
from tracejit.capture.python.memory import MANY
from tracejit.capture.python.words import Group
from tracejit.records import dataclass

_NONE = "a .grad that the step reads is None"


@dataclass(eq=False)
class _Kept:
    """Lines that ask what many dicts, or long lists, hold, and the locals that they set."""

    lines: list[str]
    locals: list[str]

    def everything(self) -> str:
        return f"({', '.join(self.locals)},)" if self.locals else "()"


@dataclass(eq=False)
class _Gradients:
    """The gradients of many tensors: their locals, and those of their owners."""

    owners: dict[str, str]

    def line(self) -> str:
        of = ", ".join(self.owners.values())
        return f"{', '.join(self.owners)} = map(grad_of, ({of}))"


@dataclass(eq=False)
class _Tensors:
    """All tensors, by their names, where they are many; lines that ask of each; and lines that ask
    where they are in their memory."""

    at: list[str]
    one_by_one: list[str]
    places: list[str]


FOUND = "if found is not None: "  # how a line begins that only the first call comes to
_OF_LIST = re.compile(
    r"if not \(len\((k\d+)\) == \d+\): |(?:x\d+ = |if not \()(k\d+)\[\d+\](?:$| is k\d+\): )"
)
_TEXT = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_ASSIGNED = re.compile(r"\(?x\d+(?:, x\d+)*,?\)? = ")
_LOCAL = re.compile(r"\bx\d+\b")


def guard_grads(w: Walk, owners: dict[str, str]) -> list[str]:
    """Fetch the gradients of tensors, by the names that they get: of many at once. Returns the
    lines that ask whether they are there."""
    there = [f"if not ({at} is not None): return {_NONE!r}" for at in owners]
    if len(owners) < MANY:
        for (at, owner), line in zip(owners.items(), there, strict=True):
            w.lines += [f"{at} = {owner}.grad", line]
        return []
    w.names["grad_of"] = attrgetter("grad")
    w.lines.append(_Gradients(owners))
    return there


def guard_containers(w: Walk, assigned: Collection[int]) -> None:
    """Ask what dicts and long lists hold only where one of many was changed (`counters.py`). Those
    that the step or a schedule assigns to, by identity, are asked each time."""
    of = {line: _container(w, line) for line in w.lines if type(line) is str}
    lines = [line for line, x in of.items() if x is not None and id(x) not in assigned]
    found = {id(of[line]): of[line] for line in lines}.values()
    dicts, lists = ([x for x in found if isinstance(x, kind)] for kind in (dict, list))
    known = Containers.of(dicts, lists) if len(dicts) >= MANY or lists else None
    if known is None:
        return
    first, covered = w.lines.index(lines[0]), set(lines)
    names = [line.partition(" = ")[0] for line in lines if not line.startswith("if ")]
    w.names["containers"] = known
    before = [line for line in w.lines[:first] if line not in covered]
    after = [line for line in w.lines[first:] if line not in covered]
    w.lines = [*before, _Kept(lines, names), *after]


def _container(w: Walk, line: str) -> dict | list | None:
    """What a line asks about, if it holds as long as nobody changes that: a dict or a long list."""
    if line in w.of_dicts:
        return w.of_dicts[line]
    of_list = _OF_LIST.match(line)
    found = w.names[of_list[1] or of_list[2]] if of_list else None
    return found if type(found) is list and len(found) >= MANY else None


def guard_metadata(w: Walk, reals: Sequence[torch.Tensor], there: Sequence[str]) -> str:
    """Guard what each tensor is, and find where it lies: of many at once (`words.py`), and one by
    one where these are not what they were. `there` are lines that ask whether gradients are there.
    Returns an expression of all tensors."""
    at = [w.tensors[id(t)] for t in reals]
    lines = [_metadata_line(w, x, t) for x, t in zip(at, reals, strict=True)]
    found = f"addresses = [{', '.join(f'{x}.data_ptr()' for x in at)}]"
    group = Group.of(reals, _owners(w, at)) if len(reals) >= MANY else None
    if group is None:
        w.lines += [*there, *lines, found]
        return f"[{', '.join(at)}]"
    bare = [line for t in reals for line in w.bare.get(id(t), ())]
    covered = set(bare)
    w.lines = [line for line in w.lines if line not in covered]
    w.names["group"] = group
    w.lines.append(_Tensors(at, [*there, *bare, *lines, found, "group.learn(reals)"], []))
    return "reals"


def guard_place(w: Walk, condition: str, reason: str) -> None:
    """Fail unless a condition holds that is about nothing but where tensors are in which memory."""
    places = next((x.places for x in w.lines if type(x) is _Tensors), w.lines)
    places.append(f"if not ({condition}): return {reason!r}")


def _owners(w: Walk, at: Sequence[str]) -> dict[int, int]:
    """Where the owner of each gradient is among the tensors, if it is asked for that."""
    places = {name: i for i, name in enumerate(at)}
    of = [x for x in w.lines if type(x) is _Gradients]
    pairs = of[0].owners.items() if len(of) == 1 else ()
    return {places[gradient]: places[owner] for gradient, owner in pairs}


def written_out(w: Walk) -> tuple[list[str], str]:
    """The lines of a guard, which is complete, with those that ask of many at once; and the text of
    functions that these call.

    Where all tensors are as they were in the last call, which one call of C tells, they need not be
    fetched: not from dicts that are as they were, and not from their owners. What has a local for
    each of many tensors stands in a function of its own: CPython makes room for all locals in each
    call, by asking the system for memory where they are more than a thousand or so.
    """
    by_type = {type(x): x for x in w.lines if type(x) is not str}
    kept, tensors = by_type.get(_Kept), by_type.get(_Tensors)
    gradients = [x for x in w.lines if type(x) is _Gradients]
    first = [x for x in w.lines if type(x) is str and x.startswith(FOUND)]
    used = {*_locals_in([x for x in w.lines if type(x) is str and x not in first])}
    apart = tensors is not None and len(gradients) < 2
    apart = apart and all(used.isdisjoint(x.owners) for x in gradients)
    lines: list[str] = []
    functions = ""
    for x in w.lines:
        if type(x) is _Kept:
            function, call = _function("contents", x.lines, x.everything())
            functions += function
            lines += _of_containers(x, call, used if apart else None)
        elif type(x) is _Gradients:
            lines += [] if apart else [x.line()]
        elif type(x) is _Tensors and apart:
            unpacked = [f"{kept.everything()} = kept"] if kept and kept.locals else []
            fetch = [*unpacked, *(g.line() for g in gradients), *_asked(x), *first]
            function, call = _function("fetched", fetch, "reals, addresses", "kept", "found")
            functions += function
            known = {*(kept.locals if kept else ()), *(at for g in gradients for at in g.owners)}
            roots = [at for at in _locals_in(x.at) if at not in known]
            lines += _of_tensors(roots, call, kept)
        elif type(x) is _Tensors:
            lines += _asked(x)
        elif not (apart and x in first):
            lines.append(x)
    return lines, functions


def _function(name: str, lines: Sequence[str], result: str, *given: str) -> tuple[str, str]:
    """The text of a function of these lines, and a call of it: it returns a result, or a reason."""
    made = {x for line in lines if (to := _ASSIGNED.match(line)) for x in _LOCAL.findall(to[0])}
    asked = [x for x in _locals_in(lines) if x not in made]
    parameters = ", ".join((*given, *asked))
    body = "\n".join(f"    {line}" for line in (*lines, f"return {result}"))
    return f"def {name}({parameters}):\n{body}\n", f"{name}({parameters})"


def _locals_in(lines: Sequence[str]) -> list[str]:
    """The locals that lines name, outside of texts."""
    return [*dict.fromkeys(_LOCAL.findall(_TEXT.sub("", "\n".join(lines))))]


def _of_containers(kept: _Kept, call: str, used: Collection[str] | None) -> list[str]:
    """Lines that set `kept`, and those locals that are used, or all, to what containers hold."""
    lines = [
        "now, kept = containers.now(), containers.kept",
        "if kept is not None and kept[0] == now: kept = kept[1]",
        "else:",
        f"    kept = {call}",
        "    if type(kept) is str: return kept",
        "    containers.kept = now, kept",
    ]
    if used is None:
        return [*lines, f"{kept.everything()} = kept"] if kept.locals else lines
    return lines + [f"{x} = kept[{i}]" for i, x in enumerate(kept.locals) if x in used]


def _asked(tensors: _Tensors) -> list[str]:
    """Lines that ask of tensors which were fetched."""
    one_by_one = [f"    {line}" for line in tensors.one_by_one]
    asked = [f"reals = ({', '.join(tensors.at)})", "addresses = group.addresses(reals)"]
    return [*asked, "if addresses is None:", *one_by_one, *tensors.places]


def _of_tensors(roots: Sequence[str], call: str, kept: _Kept | None) -> list[str]:
    """Lines that have tensors fetched, and asked of, if they are not all as they were."""
    states = "now" if kept else "b''"
    return [
        *([] if kept else ["kept = ()"]),
        f"again = group.again({states}, ({''.join(f'{x}, ' for x in roots)}))",
        f"if again is None or found is not None: again = {call}",
        "if type(again) is str: return again",
        "reals, addresses = again",
    ]


def _metadata_line(w: Walk, at: str, tensor: torch.Tensor) -> str:
    k = w.constant
    layout = (
        f"{at}.is_contiguous()" if tensor.is_contiguous() else f"{at}.stride() == {tensor.stride()}"
    )
    device = f"{at}.is_cpu" if tensor.is_cpu else f"{at}.device == {k(tensor.device)}"
    same = (
        f"{at}.shape == {k(tensor.shape)} and {layout} and {at}.dtype is {k(tensor.dtype)} and "
        f"{device} and {at}.requires_grad is {tensor.requires_grad} and not {at}.is_neg()"
    )
    if tensor.requires_grad:
        same += f" and {at}.is_leaf is {tensor.is_leaf}"
        for name in HOOKS_OF_TENSORS:  # the walk has told which, if there are some
            if not getattr(tensor, name):
                same += f" and not {at}.{name}"
    w.names |= {"differs": differs, "described": _described}
    path, old = w.path_of(tensor), k(_described(tensor))
    return f"if not ({same}): return differs({path!r}, {old}, described({at}))"


def _described(x: object) -> str:
    """The metadata of a tensor that a guard compares."""
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    dtype = str(x.dtype).removeprefix("torch.")
    text = f"{dtype}{list(x.shape)}, strides {list(x.stride())}, on {x.device}"
    if x.requires_grad:
        text += ", a leaf that requires grad" if x.is_leaf else ", requires grad"
    if x._backward_hooks or getattr(x, "_post_accumulate_grad_hooks", None):
        text += ", with a hook"
    return text + (", negated" if x.is_neg() else "")
