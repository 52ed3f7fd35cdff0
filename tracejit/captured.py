"""`tracejit.capture`: the graph of a step, with inputs named as the user's code calls them.

    step(*args) → one trace, undone afterwards → CapturedStep

In: a step and the arguments of a call. Out: pure data, to print and to look at. Nothing is compiled
or run, and no tensor, optimizer or scheduler is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import FunctionType

from tracejit.capture.bind import unwrap
from tracejit.capture.capture import capture_call
from tracejit.capture.effects.effects import Effects
from tracejit.capture.names import names_of_inputs
from tracejit.capture.trace import location
from tracejit.capture.trace.active import current
from tracejit.compile import CompiledStep
from tracejit.errors import SideEffectError
from tracejit.ir.graph import Graph
from tracejit.passes import optimize
from tracejit.records import dataclass


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """What a step computes and does, for the shapes, dtypes and Python state of one call.

    graph:    the IR, as captured; `str(graph)` is its text, which `ir.text.parse` reads.
    effects:  what a call does besides: what it returns, sets and clears.
    names:    one per parameter of the graph, unique.

    `str()` is the text of the graph with the names in place of the parameters' numbers; all other
    values keep theirs.
    """

    graph: Graph
    effects: Effects
    names: tuple[str, ...]

    def __str__(self) -> str:
        return self.graph.text(self.names)

    def optimized(self) -> CapturedStep:
        """The same with the final graph: the one that is scheduled."""
        return replace(self, graph=optimize(self.graph))


def capture(step: Callable, /, *args: object, **kwargs: object) -> CapturedStep:
    """Trace `step(*args, **kwargs)` once, without compiling or running anything on tensors.

    The step is what `tracejit.compile` takes, or what that returned. Its Python runs once; what it
    does by itself (print, append a number) stays, as it does in a call that fails. Optimizers,
    their state, schedulers, gradients and parameters are as before. Raises what a compiled step
    raises, and SideEffectError inside of one.
    """
    refuse_inside("tracejit.capture")
    function, args, kwargs, keep_grads = plain_step(step, args, kwargs, "tracejit.capture")
    done = capture_call(function, args, kwargs, keep_grads=keep_grads)
    done.call.undo()
    names = names_of_inputs(function, args, kwargs, done.captured, done.call)
    return CapturedStep(done.captured.graph, done.captured.effects, names)


def refuse_inside(caller: str) -> None:
    """Raise SideEffectError inside of a step that is being traced."""
    if current() is not None:
        raise SideEffectError(
            where=location.full(),
            reason=f"{caller} is called inside a step that is being traced",
            remedy="Call it outside the compiled step",
        )


def plain_step(
    step: Callable, args: tuple, kwargs: dict, caller: str
) -> tuple[FunctionType, tuple, dict, bool]:
    """The Python function of a step, the arguments that it takes, and whether it keeps gradients.
    Raises TypeError where there is no such function."""
    if isinstance(step, partial) and isinstance(step.func, CompiledStep):  # a compiled method
        step, args, kwargs = step.func, step.args + args, step.keywords | kwargs
    keep_grads = True
    if isinstance(step, CompiledStep):
        keep_grads, step = step.options.keep_grads, step.__wrapped__
    function, bound_to = unwrap(step)
    if function is None or (function.__module__ or "").partition(".")[0] == "tracejit":
        raise TypeError(f"{caller} takes a Python function or method, not {type(step).__name__}")
    return function, bound_to + args, kwargs, keep_grads
