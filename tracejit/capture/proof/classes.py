"""What a guard says of classes: the attributes that code which ran names, and the bases."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import CodeType, FunctionType

from torch.autograd.function import Function

from tracejit.capture.effects.variables import Attributes, Variable
from tracejit.capture.proof.guard_text import GuardText
from tracejit.capture.proof.kinds import CLASS_NOISE, SLOT, WRAPPERS, library_module
from tracejit.capture.proof.watch import origin
from tracejit.capture.python.classes import is_heap_type, module_of

_DEEP = 25  # functions and classes that lead to each other; some seven frames of Python each


class Classes(GuardText):
    """The lines of a guard about classes.

    names: the attributes that code names, or None for all; ran: the code that ran, if known.
    """

    def __init__(self, names: frozenset[str] | None, ran: Iterable[CodeType] | None):
        super().__init__()
        self.wanted = names
        self.ran = None if ran is None else frozenset(ran)
        self._depth = 0  # how many functions and classes have led to what is looked at
        self._later: deque[Callable[[], None]] = deque()  # what they lead to, in its turn

    def visit(self, x: object, at: str, path: str, *, place: Variable | None = None) -> None:
        """Guard x, the value of the expression `at`, which the step may assign to `place`."""
        raise NotImplementedError

    def _in_turn(self, look: Callable[[], None]) -> None:
        """Look at a function or a class: now, or where many have led here, when those have been
        looked at. One that leads to the next can go on for longer than Python's stack is deep."""
        if self._depth == _DEEP:
            self._later.append(look)
            return
        self._depth += 1
        try:
            look()
            while self._depth == 1 and self._later:
                self._later.popleft()()
        finally:
            self._depth -= 1

    def _class(self, cls: type) -> None:
        """What is named of a class and its bases; of library classes, the functions that ran."""
        for base in cls.__mro__:
            if is_heap_type(base) and ("class", id(base)) not in self._visited:
                self._visited.add(("class", id(base)))
                if type(base) is not type:
                    self._class(type(base))
                self._in_turn(partial(self._of_class, base))

    def _of_class(self, base: type) -> None:
        held = vars(base)
        place = self.constant(held)
        mine = any(
            isinstance(f, FunctionType) and origin(f.__code__) == "user" for f in held.values()
        ) or not library_module(module_of(base))
        inside = Attributes(base)
        for name in [*held]:
            x = held[name]
            if base.__module__ == "logging" and not _is_function(x):  # see `kinds.logs`
                continue
            at = f"{place}[{name!r}]"
            if self._by_identity(x, mine=mine):
                self.expect(f"{at} is {self.constant(x)}", f"{base.__name__}.{name}", x, at)
            elif mine and not isinstance(x, SLOT) and name not in CLASS_NOISE:
                dunder = name.startswith("__") and isinstance(x, (FunctionType, *WRAPPERS))
                if dunder or issubclass(base, Function) or self._named([name]):
                    shown = f"{base.__qualname__}.{name}"
                    self.visit(x, at, shown, place=Variable(inside, name, shown))
        self.check(f"len({place}) == {len(held)}", f"the class {base.__qualname__} changed")
        if mine:
            bases = f"{self.constant(base)}.__bases__ == {self.constant(base.__bases__)}"
            self.check(bases, f"the class {base.__qualname__} has other bases now")

    def _by_identity(self, x: object, *, mine: bool) -> bool:
        """Whether something in a class is a function that is guarded by its identity alone. In a
        library class: one that ran. In a user's class: one made by namedtuple or dataclasses."""
        if not isinstance(x, FunctionType):
            return False
        if mine:
            return origin(x.__code__) == "stdlib"
        return self.ran is not None and x.__code__ in self.ran

    def _named(self, attributes: Iterable[str]) -> list[str]:
        if self.wanted is None:
            return list(attributes)
        return [name for name in attributes if name in self.wanted]


def _is_function(x: object) -> bool:
    """Whether something in a class is a function, perhaps under a cache."""
    return isinstance(getattr(x, "__wrapped__", x), FunctionType)
