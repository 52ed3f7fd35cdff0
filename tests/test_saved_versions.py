"""What torch saves may not be written to before a backward: of the functions in the table we raise
where eager raises, and nowhere else; and the table is what eager saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import tracejit
from support.function_checks import parameters
from support.function_samples import bare_name, each_function, samples_of
from support.oracle import traced
from support.scope import sampled
from support.version_checks import (
    SAVED,
    Case,
    Run,
    cases,
    ended,
    in_eager,
    inside,
    is_same,
    listed,
)
from tracejit.capture.trace.table import function_name
from tracejit.capture.trace.versions import saved_by

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LISTED = [f for f in each_function() if saved_by(f, (), {}) is not None]
POWERS = [f for f in each_function() if bare_name(f) in ("pow", "__pow__", "__rpow__")]


def some_cases(function: Callable, of: float, step: int = 1) -> Iterator[tuple[Case, tuple]]:
    """Cases of a function with how they end in eager: of the first sample and of one in so many."""
    name = function_name(function)
    for i, sample in enumerate(samples_of(function)[::step]):
        if i == 0 or sampled(f"{name} {i}", of):
            for case in cases(function, sample):
                eager = in_eager(case)
                if eager is not None:
                    yield case, eager


def told(case: Case, ours: object, eager: object) -> str:
    return (
        f"{function_name(case.function)}{case.sample}: of those that require grad {case.grads}, "
        f"tensor {case.written} is written to {case.how}: eager {eager}, ours {ours}"
    )


@pytest.mark.parametrize("function", parameters(LISTED))
@pytest.mark.sweep(2)
def test_the_table(function: Callable):
    """What torch saves by our table is what eager minds to be written to."""
    wrong = []
    for case, eager in some_cases(function, 5):
        run = Run(case)
        run.call()
        ours = listed(saved_by(function, run.args, run.kwargs), run)
        if eager[0] in ("ok", "saved") and ours != (eager[0] == "saved"):
            wrong.append(told(case, ours, eager))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("function", parameters(LISTED + POWERS))
@pytest.mark.sweep(8)
def test_backward_inside(function: Callable):
    wrong = []
    for case, eager in some_cases(function, 5, step=3):
        ours = ended(lambda case=case: traced(inside(Run(case))))
        if not is_same(ours, eager):
            wrong.append(told(case, ours, eager))
    assert not wrong, "\n".join(wrong)


def test_power_saves_its_result():
    """Seed 1001162 of `make fuzz`."""

    def step(w, x):
        y = (w.abs() + 0.5) ** x
        z = y.reshape(7, 1)
        z.masked_fill_(z > 0, 0.25)
        z.square().sum().backward()

    both_refuse(step, torch.arange(7.0).requires_grad_(), torch.ones(7))


def test_a_loss_saves_its_target():
    """Seed 1009343."""

    def step(w, x):
        loss = torch.nn.functional.mse_loss(x.expand(3, 7), w.expand(3, 7))
        with torch.no_grad():
            x.add_(x)
        loss.backward()

    both_refuse(step, torch.arange(7.0).requires_grad_(), torch.ones(7))


def both_refuse(step: Callable, *args: torch.Tensor) -> None:
    for run in (step, tracejit.compile(step, backend="numpy", on_unsupported="raise")):
        with pytest.raises(RuntimeError, match=SAVED):
            run(*args)


def test_mode_saves_its_indices_alone():
    """Neither its operand nor its values. The samples of `mode` give no case above."""

    def values_written(w):
        x = w * 1
        values, _ = x.mode(1)
        with torch.no_grad():
            values.add_(1)
            x.add_(1)
        values.sum().backward()
        return w.grad

    def indices_written(w):
        values, indices = (w * 1).mode(1)
        indices.add_(0)
        values.sum().backward()

    w = torch.tensor([[1.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    ours, eager = (
        run(w.clone().requires_grad_())
        for run in (tracejit.compile(values_written, backend="numpy"), values_written)
    )
    assert torch.equal(ours, eager)
    both_refuse(indices_written, w.requires_grad_())


FLAGGED = {
    **{name: {} for name in ("relu", "leaky_relu", "elu", "selu", "celu", "relu6", "hardtanh")},
    **{name: {} for name in ("hardswish", "hardsigmoid", "silu", "mish", "rrelu")},
    **{name: {"p": 0.3} for name in ("dropout", "dropout2d", "dropout3d")},
    **{name: {"p": 0.3} for name in ("alpha_dropout", "feature_alpha_dropout")},
    "threshold": {"threshold": 0.1, "value": 0.2},
}


@pytest.mark.parametrize("then", ["nothing", "operand", "result"])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("name", FLAGGED)
def test_functions_with_a_flag(name: str, inplace: bool, then: str):
    """DCGAN's LeakyReLU(0.2, inplace=True): in place torch saves the result, or a copy."""
    function, options = getattr(torch.nn.functional, name), FLAGGED[name]

    def step(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = x * w
        y = function(h, **options, inplace=inplace)
        if then != "nothing":
            (h if then == "operand" else y).mul_(2)
        return torch.autograd.grad(y.square().sum() * 2, w)[0]

    x = torch.randn(2, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    w = torch.ones(3, requires_grad=True)
    found = []
    for run in (step, tracejit.compile(step, on_unsupported="raise")):
        torch.manual_seed(1)
        try:
            found.append(run(x, w))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            found.append(None)
    eager, ours = found
    assert (eager is None) == (ours is None)
    assert eager is None or torch.allclose(eager, ours, rtol=1e-4)
