"""`out=`: each function that takes it in eager takes it in a step, and fills the same tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from support.function_checks import assert_close, is_in_place, outcome
from support.function_samples import Sample, each_function, function_name, samples_of
from support.function_samples_random import draws
from support.oracle import call
from tracejit.capture.trace.tensor import tensors_of


def blank(result: object) -> object:
    """Empty tensors of the kind of a result."""
    if isinstance(result, torch.Tensor):
        return torch.empty_like(result)
    return tuple(torch.empty_like(x) for x in result)


def with_out(function: Callable, sample: Sample) -> tuple[object, object] | None:
    """What a function gives in eager, and what it gives into `out=`; None where it takes none."""
    args, kwargs = sample.fresh()
    result, error = outcome(lambda: function(*args, **kwargs))
    if error is not None or not tensors_of(result):
        return None
    args, kwargs = sample.fresh()
    filled, error = outcome(lambda: function(*args, **kwargs, out=blank(result)))
    return None if error is not None or not tensors_of(filled) else (result, filled)


def of_torch(function: Callable) -> bool:
    """Whether it is no method: these take no `out=`."""
    return not hasattr(function, "__objclass__") and not is_in_place(function)


SIGNLESS = {"torch.svd", "torch._C._linalg.linalg_svd"}  # whose vectors may have either sign
NAMES = sorted({function_name(f) for f in each_function() if of_torch(f)} - SIGNLESS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.sweep(8)
@pytest.mark.parametrize("name", NAMES)
def test_out(name: str):
    function = next(f for f in each_function() if function_name(f) == name and of_torch(f))
    samples = (s for s in samples_of(function) if not s.refused and "out" not in s.kwargs)
    for sample in list(samples)[:3]:
        with torch.no_grad():
            eager = with_out(function, sample)
            if eager is None or draws(function):
                continue
            result, filled = eager
            given, (args, kwargs) = blank(result), sample.fresh()
            ours = call(lambda *_, a=args, k=kwargs, o=given: function(*a, **k, out=o))
        for mine, into, theirs in zip(*map(tensors_of, (ours, given, filled)), strict=True):
            assert mine is into
            assert_close(mine, theirs, exact=False, what="result")
