"""Every capture rule in every spelling against eager: values, layout, errors, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from function_samples import (
    ELSEWHERE,
    EXACT,
    ROWS,
    Sample,
    bare_name,
    each_function,
    samples_of,
)
from oracle import call

from tracejit.capture.table import RULES, function_name
from tracejit.errors import UnsupportedOperation

EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
ULPS = 8  # of the larger of the element and a typical element, where rounding may differ
ERRORS = (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError)


def assert_close(ours: torch.Tensor, eager: torch.Tensor, *, exact: bool, what: str) -> None:
    """The one comparison of numbers: to the bit (any NaN equals any NaN), or within ULPS."""
    assert ours.dtype is eager.dtype, f"{what}: dtype {ours.dtype}, eager {eager.dtype}"
    assert ours.shape == eager.shape, f"{what}: shape {ours.shape}, eager {eager.shape}"
    ours, eager = ours.detach(), eager.detach()
    if exact or not eager.dtype.is_floating_point:
        same = (ours == eager) | (ours != ours) & (eager != eager)
    else:
        a, b = ours.double(), eager.double()
        finite = b[b.isfinite()].abs()
        typical = finite.median() if finite.numel() else torch.tensor(0.0)
        tolerance = ULPS * EPS[eager.dtype] * torch.maximum(b.abs(), typical)
        same = (a == b) | ((a - b).abs() <= tolerance) | (a != a) & (b != b)
    assert same.all(), f"{what}:\n{ours}\neager:\n{eager}"


def tensors_of(x: object) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, (tuple, list)):
        return [t for item in x for t in tensors_of(item)]
    return []


def is_in_place(function: Callable) -> bool:
    name = bare_name(function)
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name != "__invert__")
    return name.endswith("_")


def outcome(run: Callable[[], object]) -> tuple[object, Exception | None]:
    try:
        return run(), None
    except ERRORS as error:
        return None, error


def same_error(ours: Exception | None, eager: Exception) -> bool:
    if isinstance(ours, UnsupportedOperation):
        return True
    kinds = [k for k in (TypeError, IndexError, ValueError, RuntimeError) if isinstance(eager, k)]
    return ours is not None and any(isinstance(ours, k) for k in kinds)


def parameters(functions: list[Callable]) -> list:
    return [pytest.param(f, id=function_name(f)) for f in sorted(functions, key=function_name)]


def chosen(function: Callable) -> list[Sample]:
    return samples_of(function)


def test_every_function_has_samples():
    assert [function_name(f) for f in each_function() if not samples_of(f)] == []
    names = {bare_name(f) for f in RULES}
    assert set(ROWS) <= names, set(ROWS) - names
    assert ELSEWHERE <= names, ELSEWHERE - names


@pytest.mark.parametrize("function", parameters(each_function()))
def test_values(function: Callable):
    """Result, layout, aliasing, and what is left of the arguments equal eager's."""
    failures = []
    for sample in chosen(function):
        try:
            check_values(function, sample)
        except AssertionError as error:
            failures.append(f"{function_name(function)}{sample}: {error}")
    assert not failures, "\n\n".join(failures)


def check_values(function: Callable, sample: Sample) -> None:
    args, kwargs = sample.fresh()
    versions = [x._version for x in tensors_of(args)]
    expected, error = outcome(lambda: function(*args, **kwargs))
    our_args, kwargs = sample.fresh()
    ours, our_error = outcome(lambda: call(lambda *tensors: function(*our_args, **kwargs)))
    if error is not None:
        assert same_error(our_error, error), f"eager raises {error!r}, we {our_error!r} ({ours})"
        return
    if our_error is not None and isinstance(our_error, UnsupportedOperation):
        assert (bare_name(function), str(sample)) in REFUSED or refused(function, sample), our_error
        return
    if our_error is not None:
        raise AssertionError("raises") from our_error
    exact = bare_name(function) in EXACT
    assert type(ours) is type(expected) or isinstance(expected, torch.Tensor)
    assert len(tensors_of(ours)) == len(tensors_of(expected))
    for mine, theirs in zip(tensors_of(ours), tensors_of(expected), strict=True):
        assert_close(mine, theirs, exact=exact, what="result")
        assert mine.stride() == theirs.stride(), f"strides {mine.stride()}, eager {theirs.stride()}"
        assert mine.requires_grad == theirs.requires_grad
        for x, y in zip(tensors_of(our_args), tensors_of(args), strict=True):
            assert (mine is x) == (theirs is y), "returns its argument"
            assert shares(mine, x) == shares(theirs, y), "shares memory with its argument"
            if shares(mine, x):
                assert mine.storage_offset() == theirs.storage_offset()
    for x, y, version in zip(tensors_of(our_args), tensors_of(args), versions, strict=True):
        assert_close(x, y, exact=exact, what="argument afterwards")
        assert (x._version > version) == (y._version > version), "version"


def shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


REFUSED: set = set()
def refused(function, sample): return False


@pytest.mark.parametrize("function", parameters(each_function()))
def test_gradients(function: Callable):
    failures = []
    for sample in chosen(function):
        try:
            check_gradients(function, sample)
        except AssertionError as error:
            failures.append(f"{function_name(function)}{sample}: {error}")
    assert not failures, "\n\n".join(failures)


def gradient_step(function: Callable, args: tuple, kwargs: dict, second: bool) -> Callable:
    """A step that differentiates the sum of the results times fixed cotangents, twice if asked."""
    inplace = is_in_place(function)

    def step():
        leaves = [x for x in tensors_of(args) if x.requires_grad]
        given = (args[0].clone(), *args[1:]) if inplace else args
        out = function(*given, **kwargs)
        outs = [x for x in tensors_of(given[0] if inplace else out) if x.is_floating_point()]
        flags = [x.requires_grad for x in outs]
        total = sum((x * weights(x)).sum() for x in outs if x.requires_grad)
        if not any(flags):
            return out, flags, []
        grads = torch.autograd.grad(total, leaves, create_graph=second, allow_unused=True)
        if second:
            inner = sum((g * weights(g)).sum() for g in grads if g is not None and g.requires_grad)
            if isinstance(inner, torch.Tensor):
                inner.backward()
            return out, flags, [None if g is None else g.detach() for g in grads]
        total = sum((x * weights(x)).sum() for x in outs if False)
        return out, flags, list(grads)

    return step


_WEIGHTS = torch.linspace(-1.3, 1.7, 400, dtype=torch.float64)


def weights(x: torch.Tensor) -> torch.Tensor:
    """A fixed cotangent of a tensor's shape and dtype."""
    return WEIGHTS[x.dtype][: x.numel()].reshape(x.shape)


WEIGHTS = {dtype: _WEIGHTS.to(dtype) for dtype in EPS}


def check_gradients(function: Callable, sample: Sample) -> None:
    results = []
    for run in (lambda step: step(), call):
        args, kwargs = sample.fresh()
        floats = [x for x in tensors_of(args) if x.is_floating_point()]
        if not floats or kwargs.get("inplace") or True in args[1:2] and bare_name(function) == "relu":
            return
        for x in floats:
            x.requires_grad_()
        step = gradient_step(function, args, kwargs, sample.smooth)
        results.append((*outcome(lambda: run(step)), floats))
    (theirs, error, leaves), (ours, our_error, our_leaves) = results
    if error is not None:
        assert same_error(our_error, error), f"eager raises {error!r}, we {our_error!r} ({ours})"
        return
    if isinstance(our_error, UnsupportedOperation):
        return
    if our_error is not None:
        raise AssertionError("raises") from our_error
    _, flags, grads = theirs
    _, our_flags, our_grads = ours
    assert our_flags == flags, f"requires_grad {our_flags}, eager {flags}"
    for i, (mine, his) in enumerate(zip(our_grads, grads, strict=True)):
        assert (mine is None) == (his is None), f"gradient {i}: {mine}, eager {his}"
        if mine is not None:
            assert_close(mine, his, exact=False, what=f"gradient {i}")
    for i, (mine, his) in enumerate(zip(our_leaves, leaves, strict=True)):
        assert (mine.grad is None) == (his.grad is None), f"second {i}: {mine.grad}, {his.grad}"
        if mine.grad is not None:
            assert_close(mine.grad, his.grad, exact=False, what=f"second derivative {i}")
