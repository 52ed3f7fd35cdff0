"""Equal to eager, as a check that anyone can run on a step of their own.

`assert_equal_to_eager` compares in lockstep: each call starts from the state that eager is in, and
a float64 run of the same step tells how much of a difference is rounding.
`assert_trains_like_eager` lets both run free for many calls. `equality.py` has the rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from tracejit.capture.bind import names_of_globals, unwrap
from tracejit.capture.effects.hyperparameters import within_reach
from tracejit.capture.proof.heap import Walk
from tracejit.compile import CompiledStep, compile
from tracejit.equality import (
    PARAMETER_RELATIVE,
    AllInFloat64,
    Magnitudes,
    difference,
    losses_agree,
    tensors_in_float64,
)
from tracejit.ir.magnitudes import magnitudes
from tracejit.records import dataclass
from tracejit.runtime.select import registered

if TYPE_CHECKING:
    from tracejit.runtime.fake_device import FakeDevice


@dataclass
class _Saved:
    """A tensor and its .grad as they were."""

    tensor: torch.Tensor
    data: torch.Tensor
    grad: torch.Tensor | None
    grad_data: torch.Tensor | None


def assert_equal_to_eager(
    step: Callable,
    make_args: Callable[[], Sequence[object]] = tuple,
    *,
    calls: int = 3,
    state: Iterable[torch.Tensor] = (),
    **options: object,
) -> CompiledStep:
    """Check a compiled step against eager over several calls in lockstep; returns it.

    step:      the plain function, or an already compiled step.
    make_args: returns its arguments; called once, the same objects are used on every call.
    calls:     how many calls to compare; replay is armed from the third on.
    state:     tensors that the step changes and that are neither arguments nor read by name.
    options:   passed to `tracejit.compile`.

    The parameters of modules and the state of optimizers that the step can reach are found, set
    back between the runs, and compared. Python state that the step itself changes (a counter, an LR
    scheduler's) is not set back: give such a step two copies and `assert_trains_like_eager`.

    For every floating-point tensor t (returned values, arguments, state, `.grad`):
    ‖ours - f64‖ ≤ 4·‖eager - f64‖ + 16·eps·‖t recomputed with absolute values‖; other dtypes must
    be equal, and so must shapes, dtypes, `requires_grad` and which `.grad` are None.
    Raises AssertionError naming the call and the tensor.
    """
    compiled = step if isinstance(step, CompiledStep) else compile(step, **options)
    plain = compiled.__wrapped__
    args = tuple(make_args())
    function, bound_to = unwrap(plain)
    reached = within_reach([function, *bound_to, *args], names_of_globals)
    optimizers = [x for x in reached if isinstance(x, Optimizer)]
    generator = torch.default_generator
    for call in range(calls):
        drawn_from = generator.get_state()
        tensors = _unique([*_tensors(args), *_read_tensors(plain), *state])
        before = [_save(t) for t in tensors]
        held = [_Held.of(o) for o in optimizers]
        exact = _in_float64(plain, args, tensors, optimizers)
        _restore(before, held)
        generator.set_state(drawn_from)
        returned = plain(*args)
        eager = _visible((returned, _state_of(optimizers)), tensors)
        after_eager, drawn_until = [_save(t) for t in tensors], generator.get_state()
        _restore(before, held)
        generator.set_state(drawn_from)
        magnitudes = Magnitudes()
        compiled.observer = magnitudes
        try:
            ours_returned = compiled(*args)
        finally:
            compiled.observer = None
        ours = _visible((ours_returned, _state_of(optimizers)), tensors)
        _compare(call, ours, eager, exact, magnitudes)
        if not torch.equal(generator.get_state(), drawn_until):
            raise AssertionError(f"call {call}: torch's generator is in another state than eager's")
        _restore(after_eager)
    return compiled


def assert_trains_like_eager(
    make_step: Callable[[], tuple[Callable, Sequence[torch.Tensor]]],
    *,
    calls: int = 500,
    **options: object,
) -> tuple[CompiledStep, list[float], list[float]]:
    """Let eager and compiled train freely from the same start and compare every loss.

    make_step: builds a fresh (step, parameters); the step takes no arguments and returns its loss.
    Losses agree when |Δ| ≤ 1e-3·|loss| + 1e-9·|first loss|, parameters when within 1e-5 by norm.
    Returns the compiled step and both lists of losses.
    """
    plain, parameters = make_step()
    eager = [plain().item() for _ in range(calls)]
    other, ours_parameters = make_step()
    compiled = compile(other, **options)
    ours = [compiled().item() for _ in range(calls)]
    for call, (a, b) in enumerate(zip(ours, eager, strict=True)):
        if not losses_agree(a, b, eager[0]):
            raise AssertionError(f"call {call}: loss {a!r}, eager has {b!r}")
    for i, (p, q) in enumerate(zip(ours_parameters, parameters, strict=True)):
        distance = float((p.detach().double() - q.detach().double()).norm())
        norm = float(q.detach().double().norm())
        if not distance <= PARAMETER_RELATIVE * norm:
            raise AssertionError(f"parameter {i} is off by {distance / norm:.2e} of its norm")
    return compiled, ours, eager


@contextlib.contextmanager
def fake_device(target: str = "sm_90", *, compiled: bool = True) -> Iterator[FakeDevice]:
    """Within this context, `backend="fake:sm_90"` runs steps on CPU tensors as on a GPU.

    Everything on the way is what runs on a GPU, Triton's compiler included (`compiled`), up to the
    launches, which numpy carries out. `Fault` is raised where the order of launches, copies and
    events leaves to chance what a step computes. The device's `log` tells that order.
    """
    from tracejit.runtime.fake_device import FakeDevice

    device = FakeDevice(target, compiled=compiled)
    with registered(device):
        yield device


def _unique(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(t): t for t in tensors}.values())


def _tensors(x: object) -> list[torch.Tensor]:
    """The tensors of a nested structure, in order."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, (tuple, list)):
        return [t for item in x for t in _tensors(item)]
    if isinstance(x, dict):
        return [t for item in x.values() for t in _tensors(item)]
    return []


def _read_tensors(step: Callable) -> list[torch.Tensor]:
    """Every tensor that a step can reach, and the objects that it is bound to."""
    function, bound_to = unwrap(step)
    w = Walk(None, None)
    for i, x in enumerate(bound_to):
        w.visit(x, f"bound[{i}]", f"bound {i}")
    if function is not None:
        w.function(function, function.__qualname__)
    return w.all_tensors


def _save(t: torch.Tensor) -> _Saved:
    grad = t.grad if t.is_leaf else None
    return _Saved(t, t.detach().clone(), grad, None if grad is None else grad.detach().clone())


@dataclass
class _Held:
    """An optimizer with its state and param groups as they were."""

    optimizer: Optimizer
    state: dict
    groups: list[dict]

    @classmethod
    def of(cls, optimizer: Optimizer) -> _Held:
        state = {p: (s, dict(s)) for p, s in optimizer.state.items()}
        return cls(optimizer, state, [dict(group) for group in optimizer.param_groups])

    def restore(self) -> None:
        self.optimizer.state.clear()
        for p, (inner, saved) in self.state.items():  # the same dicts, which guards know
            inner.clear()
            inner.update(saved)
            self.optimizer.state[p] = inner
        for group, saved in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.update(saved)


def _state_of(optimizers: Sequence[Optimizer]) -> list[torch.Tensor]:
    """The tensors of the optimizers' state, in order."""
    return [
        value
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        for _, value in sorted(optimizer.state.get(p, {}).items())
        if isinstance(value, torch.Tensor)
    ]


def _restore(saved: Sequence[_Saved], optimizers: Sequence[_Held] = ()) -> None:
    for held in optimizers:
        held.restore()
    for s in saved:
        s.tensor.data = s.tensor.data.to(s.data.dtype)
        if not torch._debug_has_internal_overlap(s.tensor):  # else nobody can write to it
            s.tensor.data.copy_(s.data)
        if s.tensor.is_leaf:
            if s.grad is not None:
                s.grad.data.copy_(s.grad_data)
            s.tensor.grad = s.grad


def _in_float64(
    plain: Callable, args: tuple, tensors: list[torch.Tensor], optimizers: Sequence[Optimizer]
) -> list:
    """The visible tensors after the step in float64, from the same state."""
    with tensors_in_float64(tensors):
        with AllInFloat64():
            returned = plain(*args)
        return _visible((returned, _state_of(optimizers)), tensors)


def _visible(returned: object, tensors: list[torch.Tensor]) -> list:
    """(name, requires_grad, pointer, copy or None) of everything that the user can see."""
    found = [(f"returned tensor {i}", t) for i, t in enumerate(_tensors(returned))]
    found += [(f"tensor {i} of shape {list(t.shape)}", t) for i, t in enumerate(tensors)]
    found += [
        (f"the .grad of tensor {i} of shape {list(t.shape)}", t.grad if t.is_leaf else None)
        for i, t in enumerate(tensors)
    ]
    return [
        (name, None, 0, None)
        if t is None
        else (name, t.requires_grad, t.data_ptr(), t.detach().clone())
        for name, t in found
    ]


def _compare(call: int, ours: list, eager: list, exact: list, magnitudes: Magnitudes) -> None:
    if len(ours) != len(eager):
        raise AssertionError(f"call {call}: {len(ours)} tensors, eager has {len(eager)}")
    for (name, grad, pointer, a), (_, eager_grad, _, b), (*_, reference) in zip(
        ours, eager, exact, strict=True
    ):
        at = f"call {call}: {name}"
        if (a is None) != (b is None):
            raise AssertionError(f"{at} is {'None' if a is None else 'set'}, in eager it is not")
        if a is None:
            continue
        if (a.shape, a.dtype, grad) != (b.shape, b.dtype, eager_grad):
            raise AssertionError(
                f"{at}: {list(a.shape)} {a.dtype} requires_grad={grad}, eager has "
                f"{list(b.shape)} {b.dtype} requires_grad={eager_grad}"
            )
        floats = a.is_floating_point() or a.is_complex()
        wrong = difference(a, b, reference, magnitudes.norm_of(pointer, b) if floats else 0.0)
        if wrong is not None:
            raise AssertionError(f"{at}: {wrong}" if floats else f"{at} {wrong}")


__all__ = [
    "assert_equal_to_eager",
    "assert_trains_like_eager",
    "fake_device",
    "losses_agree",
    "magnitudes",
]
