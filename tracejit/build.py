"""A step built for a GPU that need not be here: compiled and stored, and not run.

    step = tracejit.compile(train_step, target="sm_90")
    built = step.build(x, y)                      # tensors on the CPU or on the meta device

In: a step and the arguments of a call. Its first calls are made as they would be on the GPU, up to
the launches: traced, with tensors that pose to be there, scheduled, printed, compiled. In the disk
caches, tracejit's and Triton's, is afterwards what these calls look for on such a GPU. Out: a
`Built` that says what there is. All that the calls have changed is put back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Protocol

import torch
from torch.optim import Optimizer

from tracejit.capture.bind import names_of_globals, unwrap
from tracejit.capture.effects.hyperparameters import within_reach
from tracejit.capture.python.saved_tensors import SavedTensor
from tracejit.capture.python.snapshot import Snapshot
from tracejit.capture.trace.posing import posing
from tracejit.errors import SideEffectError, TargetError
from tracejit.options import Options
from tracejit.records import dataclass
from tracejit.runtime.select import registered
from tracejit.runtime.target_device import TARGETS, TargetDevice
from tracejit.runtime.triton_api import compilations
from tracejit.schedule.plan import Plan

GPU = "cuda:0"  # where tensors pose to be
MOST_CALLS = 8  # that are made; fewer where a replay is armed, or the third and later make no plan
_SURE = 3
COUNTERS = ("step", "mu_product")  # what torch's optimizers keep on the CPU unless capturable


@dataclass(frozen=True)
class Built:
    """What there is in the disk caches for a step on a GPU.

    target:    "sm_90".
    plans:     those of the step's first calls, the last one at the end.
    kernels:   how many are loaded with them, those of graphs and of other alignments too.
    compiled:  the names of the kernels that were compiled now; others had been there.
    mode:      what the step is after these calls; "replay: …", or what keeps it from that.
    """

    target: str
    plans: tuple[Plan, ...]
    kernels: int
    compiled: tuple[str, ...]
    mode: str
    seconds: float

    def __str__(self) -> str:
        name = self.plans[-1].name if self.plans else "step"
        launches = " and ".join(str(len(plan.launches)) for plan in self.plans) or "no"
        return (
            f"{name} for {self.target}: {len(self.plans)} plan(s) of {launches} launch(es), "
            f"{self.kernels} kernel(s), of which {len(self.compiled)} compiled now, in "
            f"{self.seconds:.1f} s; {self.mode}"
        )


class Dry(Protocol):
    """A compiled step: what building needs of it."""

    plans: list[Plan]
    guards: list[str]
    stats: object

    def __call__(self, *args: object, **kwargs: object) -> object: ...

    def explain_mode(self) -> str: ...


class TargetedStep:
    """A step that is built for a target, and never run. `tracejit.compile(step, target=…)` makes
    it.

    make:     (step, options) -> a fresh compiled step, to make calls of.
    """

    def __init__(self, make: Callable[..., Dry], target: str, options: Options, step: Callable):
        self.__wrapped__, self.target = step, target
        self._make, self._options = make, options
        self._name = getattr(step, "__name__", type(step).__name__)
        self._function, self._bound_to = unwrap(step)
        if self._function is None:
            raise TypeError(f"tracejit.compile takes a Python function or method, not {self._name}")

    @classmethod
    def of(cls, make: Callable[..., Dry], target: str, options: Options, step: Callable) -> object:
        """A step for a target, after a look at both."""
        if target not in TARGETS:
            raise ValueError(f"target is one of {tuple(TARGETS)}, not {target!r}")
        if options.backend not in ("auto", "triton"):
            raise ValueError(
                f'with a target, backend is "auto" or "triton", not {options.backend!r}'
            )
        return cls(make, target, options, step)

    def __get__(self, instance: object, owner: type | None = None) -> TargetedStep:
        if instance is None:
            return self
        step = self.__wrapped__.__get__(instance, owner)
        return TargetedStep(self._make, self.target, self._options, step)

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise TargetError(
            reason=f"{self._name} is compiled for {self.target}, which is not run here",
            remedy="Call its `build` with these arguments; to run it, compile it without a target",
        )

    def build(self, *args: object, **kwargs: object) -> Built:
        """Build what calls with such arguments need, and store it.

        The arguments, and all tensors that the step reads, stand for those of the run on the GPU:
        the same shapes, dtypes and strides, on the CPU, or on the meta device, where they take no
        memory. On the CPU they all pose to be on the GPU, save the counters that torch's optimizers
        keep on the CPU; where one of them is on the meta device, only those there do. Values that
        the step's Python reads (`loss.item()`, a mask) are computed by numpy, from the tensors as
        they are: that takes tensors on the CPU.

        The step's Python runs a few times; nothing runs on tensors, and modules, optimizers,
        gradients, random generators and Python state are as before. What it prints or writes to
        files is not undone. Raises what tracing and compiling raise, SideEffectError where the step
        can reach what could not be put back, and BackendUnavailable where Triton cannot compile.
        """
        started, compiled = time.perf_counter(), []
        function, bound_to = self._function, self._bound_to
        with _as_before(function, bound_to + args, kwargs) as tensors:
            place = Posed(function, (*bound_to, *args, *kwargs.values()), tensors)
            device = TargetDevice(self.target, meta=place.meta)
            backend = registered(device, computes=False)
            with backend as name, compilations(compiled.append), posing(place):
                options = replace(self._options, backend=name, on_unsupported="raise", verify=0)
                step = self._make(self.__wrapped__, options)
                _call(step, args, kwargs)
            found, plans = step.explain_mode(), tuple(step.plans)
            del step  # before what it holds is put back
        seconds = time.perf_counter() - started
        return Built(self.target, plans, device.kernels, tuple(compiled), found, seconds)


def _call(step: Dry, args: tuple, kwargs: dict) -> None:
    """Make the first calls of a step: until a replay is armed, or nothing new comes."""
    for call in range(MOST_CALLS):
        before = step.stats.compiles
        step(*args, **kwargs)
        if step.guards or (call + 1 >= _SURE and step.stats.compiles == before):
            return


class Posed:
    """Which tensors pose to be on the GPU; a `Place`.

    meta: whether it is those on the meta device; else those on the CPU, save optimizers' counters.
    """

    def __init__(self, function: FunctionType, args: Sequence, tensors: Sequence[torch.Tensor]):
        self.meta = any(x.is_meta for x in tensors)
        reached = within_reach([function, *args], names_of_globals)
        self._optimizers = [x for x in reached if isinstance(x, Optimizer)]

    def __call__(self, tensor: torch.Tensor) -> str:
        poses = tensor.is_meta if self.meta else tensor.is_cpu and not self._counts(tensor)
        return GPU if poses else str(tensor.device)

    def _counts(self, tensor: torch.Tensor) -> bool:
        """Whether it is a counter that an optimizer keeps on the CPU."""
        if tensor.numel() != 1:
            return False
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if not (group.get("capturable") or group.get("fused")):
                    states = (optimizer.state.get(p) for p in group["params"])
                    if any(s and any(s.get(name) is tensor for name in COUNTERS) for s in states):
                        return True
        return False


@contextlib.contextmanager
def _as_before(
    function: FunctionType, args: tuple, kwargs: dict
) -> Iterator[Sequence[torch.Tensor]]:
    """A context after which all that a step can reach is as it was; gives the tensors among it."""
    snapshot = Snapshot((function, args, kwargs))
    _refuse(snapshot, function, "can change")
    tensors = snapshot.tensors
    saved = [SavedTensor(x) for t in tensors for x in (t, t.grad) if x is not None]
    try:
        yield tensors
    finally:
        lost = snapshot.obstacles()
        for x in saved:
            x.restore()
        snapshot.restore()
        if lost:
            _refuse(snapshot, function, "has changed")


def _refuse(snapshot: Snapshot, function: FunctionType, verb: str) -> None:
    """Raise an error where there is what cannot be put back."""
    found = snapshot.obstacles()
    if found:
        code = function.__code__
        raise SideEffectError(
            where=f"{code.co_filename}:{code.co_firstlineno}",
            reason=f"the step {verb} what cannot be put back after it is built: {found[0]}",
            remedy="Build it with arguments and variables that it may change",
        )
