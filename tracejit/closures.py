"""Steps of an optimizer that asks a closure again and again, and decides by what it returns: LBFGS.

No two of its steps go one way, and each would be a plan as long as all its closures. So such a call
is refused, and runs eagerly; but the closure, which is nearly all of the work, is a compiled step
of its own, in each of its calls a replay.

    the step, eagerly → LBFGS.step(closure) → LBFGS.step(a call of the compiled closure)
"""

from __future__ import annotations

import dis
import sys
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from types import CellType, CodeType, FunctionType, MethodType

from torch.optim import LBFGS

from tracejit.capture.trace.active import current
from tracejit.forks import own_lock

_MOST = 8  # closures that a step has at one time; others are called as they are
_STORES = ("STORE_DEREF", "DELETE_DEREF")

_active = threading.local()
_lock = own_lock(sys.modules[__name__], "_lock", threading.Lock)
_inside = 0
_original = LBFGS.step


class Closures:
    """The closures of one step, compiled. A context: within it LBFGS calls them on this thread."""

    def __init__(self, function: FunctionType, compile: Callable[[Callable], Callable]) -> None:
        """`function` is the step's; `compile` makes a compiled step of a closure."""
        self._function, self._compile = function, compile
        self._known: dict[object, _Twin | Callable | None] = {}
        self.wanted = False  # an optimizer asks them, which a call was refused for

    def __enter__(self) -> None:
        global _inside, _original
        if not self.wanted:
            return
        self._before = getattr(_active, "closures", None)
        _active.closures = self
        with _lock:
            _inside += 1
            if _inside == 1:
                _original = LBFGS.step
                LBFGS.step = _asking(_original)

    def __exit__(self, *exception: object) -> None:
        global _inside
        if not self.wanted:
            return
        _active.closures = self._before
        with _lock:
            _inside -= 1
            if _inside == 0:
                LBFGS.step = _original

    def of(self, closure: Callable) -> Callable:
        """What is called in place of a closure: itself, where it cannot be compiled by itself."""
        if (
            isinstance(closure, FunctionType)
            and closure.__code__ in self._function.__code__.co_consts
        ):
            key = closure.__code__
        elif isinstance(closure, FunctionType):
            key = closure
        elif isinstance(closure, MethodType) and isinstance(closure.__func__, FunctionType):
            key = closure.__func__, id(closure.__self__)
        else:
            return closure
        if key not in self._known:
            if len(self._known) >= _MOST:
                return closure
            self._known[key] = self._made(closure, key)
        found = self._known[key]
        if type(found) is _Twin:
            return found.like(closure)
        return closure if found is None else found

    def _made(self, closure: Callable, key: object) -> _Twin | Callable | None:
        """What stands for a closure; None for one that is called as it is."""
        if key is not getattr(closure, "__code__", None):
            return self._compile(closure)
        if not _is_quiet(self._function.__code__, closure.__code__):
            return None
        return _Twin(self._function, closure, self._compile)


class _Twin:
    """A closure that each call of the step defines anew, as one function: it has cells of its own
    for the variables of the step's calls."""

    def __init__(
        self, step: FunctionType, closure: FunctionType, compile: Callable[[Callable], Callable]
    ) -> None:
        code = closure.__code__
        kept = dict(zip(step.__code__.co_freevars, step.__closure__ or (), strict=True))
        self._kept = [kept.get(name) for name in code.co_freevars]
        self._cells = tuple(CellType() if cell is None else cell for cell in self._kept)
        self._function = FunctionType(
            code, closure.__globals__, closure.__name__, closure.__defaults__, self._cells
        )
        self._function.__qualname__ = closure.__qualname__
        self._compiled = compile(self._function)

    def like(self, closure: FunctionType) -> Callable:
        """A call of the compiled function, in place of one of the closure."""

        def call() -> object:
            given = closure.__closure__ or ()
            for kept, own, cell in zip(self._kept, self._cells, given, strict=True):
                if kept is None:
                    own.cell_contents = cell.cell_contents
            return self._compiled()

        plain = closure.__defaults__ or closure.__kwdefaults__ or vars(closure)
        given = closure.__closure__ or ()
        same = all(k in (None, c) for k, c in zip(self._kept, given, strict=True))
        return closure if plain or not same or not all(map(_is_full, given)) else call


def _is_full(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # nothing is assigned yet
        return False
    return True


def _is_quiet(step: CodeType, closure: CodeType) -> bool:
    """Whether no function that the step defines assigns to variables of the closure: these are the
    same while it runs."""
    own = {name for name in closure.co_freevars if name not in step.co_freevars}
    return own.isdisjoint(_assigned(step))


def _assigned(code: CodeType) -> Iterator[str]:
    """The variables that the functions within a function share with it and assign to."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for instruction in dis.get_instructions(inner):
                if instruction.opname in _STORES:
                    yield instruction.argval
            yield from _assigned(inner)


def _asking(original: Callable) -> Callable:
    """`LBFGS.step` while a step runs eagerly that has compiled closures."""

    @wraps(original)
    def step(self: LBFGS, closure: Callable) -> object:
        closures = getattr(_active, "closures", None)
        if closures is not None and current() is None:
            closure = closures.of(closure)
        return original(self, closure)

    return step
