"""The text of a guard while it is being written: lines, the names in them, and reasons.

A guard is generated Python, one line per condition; a line that fails returns what changed, from
what to what.
"""

from __future__ import annotations

from types import BuiltinFunctionType, CellType, FunctionType, MethodType

import numpy as np
import torch

from tracejit.capture.proof.kinds import CONTAINERS
from tracejit.capture.python.bytecode import is_value
from tracejit.capture.trace.scalars import same_number
from tracejit.records import dataclass


@dataclass
class NumberLine:
    """The check of a number, a string, or a tuple of such in a state variable, to be decided when
    it is known which numbers are runtime scalars, and which strings the step makes of such.

    keys: what the place is called as an argument or variable of the step, and as a state variable.
    """

    at: str
    value: float | str | tuple
    path: str
    keys: tuple[tuple | None, tuple | None]

    def items(self, at: str) -> list[NumberLine]:
        """The checks of the items of a tuple, which is what the expression `at` says."""
        of = self.keys[1]
        return [
            NumberLine(f"{at}[{i}]", x, f"{self.path}[{i}]", (None, (*of, i)))
            for i, x in enumerate(self.value)
        ]


def short(x: object) -> str:
    """A value as a reason shows it."""
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {list(x.shape)}"
    if is_value(x):
        text = repr(x)
        return text if len(text) <= 40 else text[:37] + "…"
    if isinstance(x, CONTAINERS):
        return f"a {type(x).__name__} of {len(x)}"
    if isinstance(x, (type, FunctionType, MethodType, BuiltinFunctionType)):
        return x.__qualname__
    return f"a {type(x).__name__}"


def same_value(a: object, b: object) -> bool:
    """Whether two plain values are the same: 1, 1.0 and True are not."""
    of_text = type(a) is tuple or isinstance(a, np.generic)  # 0.0 is not -0.0
    return type(a) is type(b) and (repr(a) == repr(b) if of_text else a == b)


def differs(path: str, old: str, new: str) -> str:
    """The reason of a guard that failed."""
    if new == old:
        return f"{path} is another {new.removeprefix('a ')} now"
    return f"{path} was {old} and is {new} now"


def changed(path: str, old: str, new: object) -> str:
    """The reason of a guard that failed, with the value that is there now."""
    return differs(path, old, short(new))


def unbound(cell: CellType) -> bool:
    """Whether a closure's variable has no value."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


class GuardText:
    """Lines of a guard, the objects that they name, and why there can be no guard."""

    def __init__(self) -> None:
        self.lines: list[str | NumberLine] = []
        self.names: dict[str, object] = {"same_number": same_number, "changed": changed}
        self.refusals: list[str] = []
        self.about: dict[str, str] = {}  # the path that a refusal is about
        self._constants: dict[int, str] = {}
        self._keep: list[object] = []  # ids stay unique as long as the objects live
        self._locals = self._constant_count = 0
        self._visited: set[object] = set()  # ids, and keys of variables

    def constant(self, value: object) -> str:
        """A name for an object in the guard's namespace."""
        name = self._constants.get(id(value))
        if name is None:
            name = self._constants[id(value)] = f"k{self._constant_count}"
            self._constant_count += 1
            self.names[name] = value
            self._keep.append(value)
        return name

    def local(self, expression: str) -> str:
        """A local of the guard that holds what an expression gives."""
        name = self.local_name()
        self.lines.append(f"{name} = {expression}")
        return name

    def local_name(self) -> str:
        """A name for a local."""
        self._locals += 1
        return f"x{self._locals}"

    def check(self, condition: str, reason: str) -> None:
        """Fail unless `condition`."""
        self.lines.append(f"if not ({condition}): return {reason!r}")

    def expect(self, condition: str, path: str, old: object, now: str) -> None:
        """Fail unless `condition`, saying what was at `path` and what is there now."""
        self.lines.append(f"if not ({condition}): return changed({path!r}, {short(old)!r}, {now})")

    def number(self, x: object, at: str, path: str) -> None:
        """Fail unless a plain value is x."""
        k = self.constant(x)
        if type(x) is float:
            at = self.local(at)
            same = f"{at} is {k} or type({at}) is float and same_number({at}, {k})"
        else:
            self.names["same_value"] = same_value
            same = f"{at} is {k} or same_value({at}, {k})"
        self.expect(same, path, x, at)

    def refuse(self, why: str, path: str = "") -> None:
        """There can be no guard, because of what is found at a path."""
        if why not in self.refusals:
            self.refusals.append(why)
            self.about[why] = path

    def seen(self, kind: type) -> list:
        """The objects of a class that were looked at."""
        return [x for x in self._keep if type(x) is kind]

    def _was_seen(self, x: object) -> bool:
        return id(x) in self._visited

    def _seen(self, x: object) -> bool:
        """Whether x was visited before; it is from now on."""
        if id(x) in self._visited:
            return True
        self._visited.add(id(x))
        self._keep.append(x)
        return False
