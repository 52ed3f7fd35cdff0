"""One trace of a step, from its Python to what it leaves behind.

In: a function and the arguments of a call. Out: what `finish` gives: the Captured step and its
Call. Nothing has run on tensors; `Call.undo` puts optimizers and schedulers back.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

from tracejit.capture import functions  # noqa: F401  fills the table of rules
from tracejit.capture.bind import bind, run
from tracejit.capture.effects.collect import Finished, finish
from tracejit.capture.trace.trace import Trace
from tracejit.capture.tracer import Tracer
from tracejit.garbage import uncollected
from tracejit.interrupts import held


@held
def capture_call(
    function: FunctionType,
    args: tuple,
    kwargs: dict,
    *,
    keep_grads: bool = True,
    listener: Callable[[Trace], None] | None = None,
) -> Finished:
    """Trace `function(*args, **kwargs)`, once and without a memory of earlier traces.

    listener: is given the trace, before it begins, to be told of what happens in it.
    """
    tracer = Tracer()
    if listener is not None:
        listener(tracer.trace)
    bound = bind(tracer.trace, function, args, kwargs)
    with uncollected() as young:
        returned = [run(tracer, bound, function)]
        del bound  # which holds runtime scalars
        return finish(tracer.trace, function.__name__, returned, young, keep_grads=keep_grads)
