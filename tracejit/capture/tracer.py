"""The tracer: a mode that intercepts every torch call of a step.

In: torch calls, as torch hands them to a TorchFunctionMode. A call that goes as in an earlier trace
is answered by the trail (`follow/`), any other by its rule, which works on the `Trace`. While the
mode is on, real tensors are their own proxies and intermediates are TracedTensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from tracejit.capture.follow.events import CONSTANTS
from tracejit.capture.follow.matchers import UNKNOWN, follow
from tracejit.capture.follow.recall import Recall
from tracejit.capture.follow.trail import Trail
from tracejit.capture.python import profiler
from tracejit.capture.trace.active import TraceMode
from tracejit.capture.trace.draws import Draws
from tracejit.capture.trace.scalars import Scalars, TracedFloat, TracedInt
from tracejit.capture.trace.state import Casts
from tracejit.capture.trace.table import BY_CALLER, RULES
from tracejit.capture.trace.tensor import TracedTensor
from tracejit.capture.trace.trace import Trace

# torch takes these names of numpy wherever it takes its own
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "x2": "other"}
# what torch's own Python reports to a profiler concerns no tensor
_PASSED_ON = frozenset(
    {
        torch.ops.profiler._record_function_enter_new,
        torch.ops.profiler._record_function_exit,
        torch.ops.profiler._record_function_exit._RecordFunction,
    }
)
_UNRECORDED = object()  # in place of a profiler's record, while no profiler is on
# these answer by the Python object or change Python's state, and emit nothing
_OF_PYTHON = frozenset({torch.Tensor.__hash__, torch._C._set_grad_enabled})


_PLAIN = frozenset(
    {*CONSTANTS, torch.Tensor, torch.nn.Parameter, TracedTensor, TracedFloat, TracedInt}
)


def _runs_nothing(x: object) -> bool:
    """Whether an argument of a torch call is such that its rule runs no code of the user's for
    it."""
    if type(x) is slice:
        x = (x.start, x.stop, x.step)
    return all(map(_runs_nothing, x)) if type(x) in (list, tuple) else type(x) in _PLAIN


class Tracer(TraceMode):
    """One trace of a step's Python. Enter it as a context manager around the user's function."""

    def __init__(self, recall: Recall | None = None, *, follow: bool = False) -> None:
        """`recall`: what the step remembers of its traces; `follow`: answer calls from there."""
        super().__init__()
        self.trace = Trace()
        self.trace.mode, self.trace.heard = self, profiler.heard
        self._start(recall, follow=follow)

    def _start(self, recall: Recall | None, *, follow: bool) -> None:
        t = self.trace
        self.trail = t.journal = Trail(t, recall, follow=follow)
        t.scalars, t.draws, t.casts = Scalars(t.b, self.trail), Draws(), Casts()
        t.scalars.pause, t.scalars.go_on = profiler.pause, profiler.go_on
        t.unsynced, t.shards = [], False

    def again(self, recall: Recall) -> None:
        """Start another trace, after one that was followed to its end: no rule has run."""
        self._start(recall, follow=True)

    def rest(self) -> None:
        """Let go of all that is the user's, after a trace that was followed to its end."""
        self.trail.release()
        t = self.trace
        t.scalars.close()
        t.journal = t.hyperparameters = t.draws = None  # and with the trail what the step remembers
        del self.trail

    def __enter__(self) -> Tracer:
        self.trace.scalars.active = True
        self._below = torch._C._len_torch_function_stack()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        self.trace.scalars.active = False
        if torch._C._len_torch_function_stack() > self._below:  # no interrupt has taken it off
            super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        trail = self.trail
        by_caller = BY_CALLER.get(func)
        if trail.following and not trail.modes and by_caller is None:  # nearly all calls
            answer = follow(trail, func, args, kwargs)
            if answer is not UNKNOWN:
                return answer
        if func in _PASSED_ON:
            return self._passed_on(func, args, kwargs or {})
        kwargs = {_NUMPY_NAMES.get(k, k): v for k, v in kwargs.items()} if kwargs else {}
        if by_caller is not None:
            kwargs = by_caller(sys._getframe(1)) | kwargs
        if func in _OF_PYTHON:
            return RULES[func].run(self.trace, *args, **kwargs)
        if trail.following:
            with torch._C.DisableTorchFunction():
                answer = follow(trail, func, args, kwargs)
            if answer is not UNKNOWN:
                return answer
            trail.leave()
        if profiler.pause():
            try:
                if all(map(_runs_nothing, (*args, *kwargs.values()))):
                    return self._by_rule(func, args, kwargs)
            finally:
                profiler.go_on()
        return self._by_rule(func, args, kwargs)

    def compared(self, func: Callable, args: tuple) -> object:
        """The answer of a function among COMPARED: known from an earlier trace, or its own."""
        if self.trail.following:
            with torch._C.DisableTorchFunction():
                answer = follow(self.trail, func, args, {})
            if answer is not UNKNOWN:
                return answer
            self.trail.leave()
        return self._by_rule(func, args, {})

    def _by_rule(self, func: Callable, args: tuple, kwargs: dict) -> object:
        trail = self.trail
        self.trace.b.line = self.trace.lines.here()
        call = trail.begin(func, args, kwargs)
        try:
            result = self.trace.apply(func, args, kwargs)
        except BaseException:
            trail.forget()
            raise
        if call is not None:
            trail.end(call, result)
        return result

    def _passed_on(self, func: Callable, args: tuple, kwargs: dict) -> object:
        """What torch's own Python reports to a profiler."""
        about = args[0] if args else None
        if about is _UNRECORDED:
            return None
        if self.trace.hyperparameters is not None:
            self.trace.hyperparameters.profiled(args)
        of_optimizer = type(about) is str and about.startswith("Optimizer.")
        if of_optimizer and not torch.autograd._profiler_enabled():  # nobody asks, in microseconds
            return _UNRECORDED
        return func(*args, **kwargs)
