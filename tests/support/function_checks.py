"""A torch function in a step against eager: values, layout, aliasing, errors, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from support import (  # noqa: F401  all samples
    function_samples_elementwise,
    function_samples_forms,
    function_samples_indexing,
    function_samples_nn,
    function_samples_random,
)
from support.function_samples import (
    EXACT,
    SPELLED,
    Sample,
    bare_name,
)
from support.function_samples_matrices import signless
from support.oracle import call
from support.scope import sampled
from tracejit.capture.trace.table import function_name
from tracejit.capture.trace.tensor import tensors_of
from tracejit.errors import UnsupportedOperation

EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
ULPS = 8  # of the larger of the element and a typical element, where rounding may differ
ERRORS = (RuntimeError, TypeError, IndexError, ValueError, AssertionError)


def assert_close(
    ours: torch.Tensor,
    eager: torch.Tensor,
    *,
    exact: bool,
    what: str,
    eps: float = 0.0,
    ulps: int = ULPS,
) -> None:
    """The one comparison of numbers: to the bit (any NaN equals any NaN), or within ULPS.

    `eps` is that of the narrowest dtype that took part.
    """
    assert ours.dtype is eager.dtype, f"{what}: dtype {ours.dtype}, eager {eager.dtype}"
    assert ours.shape == eager.shape, f"{what}: shape {ours.shape}, eager {eager.shape}"
    ours, eager = ours.detach(), eager.detach()
    if exact or not eager.dtype.is_floating_point:
        same = (ours == eager) | (ours != ours) & (eager != eager)
    else:
        a, b = ours.double(), eager.double()
        ordinary = b[b.abs() < 1e4].abs()
        typical = ordinary.max() if ordinary.numel() else torch.tensor(0.0)
        tolerance = ulps * max(EPS[eager.dtype], eps) * torch.maximum(b.abs(), typical)
        same = (a == b) | ((a - b).abs() <= tolerance) | (a != a) & (b != b)
    assert same.all(), f"{what}:\n{ours}\neager:\n{eager}"


def is_in_place(function: Callable) -> bool:
    name = bare_name(function)
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name != "__invert__")
    return name.endswith("_")


def outcome(run: Callable, *args: object) -> tuple[object, Exception | None]:
    torch.default_generator.manual_seed(11)
    try:
        return run(*args), None
    except ERRORS as error:
        return None, error


def runtime_floats(sample: Sample) -> list[float]:
    """The floats among the arguments of a sample, in order."""
    return [x for x in (*sample.args, *sample.kwargs.values()) if type(x) is float]


def same_error(ours: Exception | None, eager: Exception) -> bool:
    if isinstance(ours, UnsupportedOperation):
        return True
    kinds = (TypeError, IndexError, ValueError, RuntimeError, NotImplementedError)
    return ours is not None and all(isinstance(ours, k) for k in kinds if isinstance(eager, k))


def parameters(functions: list[Callable]) -> list:
    return [pytest.param(f, id=function_name(f)) for f in sorted(functions, key=function_name)]


def on_each_sample(check: Callable, function: Callable, samples: list[Sample]) -> None:
    """Run a check on every sample and report all failures together. In `make test` that is the
    first sample of a function and one in three of the others, one in five for gradients."""
    name = function_name(function)
    of = 5 if check is check_gradients else 3
    samples = [s for i, s in enumerate(samples) if i == 0 or sampled(f"{name} {i}", of)]
    failures = []
    for sample in samples:
        try:
            check(function, sample)
        except AssertionError as error:
            failures.append(f"{name}{sample}: {error}")
    assert not failures, "\n\n".join(failures)


def check_values(function: Callable, sample: Sample) -> None:
    function = signless(function)
    args, kwargs = sample.fresh()
    versions = [x._version for x in tensors_of(args)]
    expected, error = outcome(lambda: function(*args, **kwargs))
    our_args, kwargs = sample.fresh()
    ours, our_error = outcome(lambda: call(lambda *tensors: function(*our_args, **kwargs)))
    if error is not None:
        assert same_error(our_error, error), f"eager raises {error!r}, we {our_error!r} ({ours})"
        return
    if our_error is not None and isinstance(our_error, UnsupportedOperation):
        assert sample.refused, our_error
        return
    assert not sample.refused, "is not refused"
    if our_error is not None:
        raise AssertionError("raises") from our_error
    exact = is_exact(function, sample)
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


def check_runtime_scalars(function: Callable, sample: Sample) -> None:
    def run(how: Callable) -> tuple:
        args, kwargs = sample.fresh()
        values, names = list(args), list(kwargs)

        def step(*scalars: float) -> object:
            scalars, given = iter(scalars), lambda x: next(scalars) if type(x) is float else x
            now = [given(x) for x in values]
            return function(*now, **{k: given(kwargs[k]) for k in names})

        result, error = outcome(lambda: how(step, *runtime_floats(sample)))
        return result, error, tensors_of(args)

    expected, error, arguments = run(lambda step, *xs: step(*xs))
    ours, our_error, our_arguments = run(call)
    if error is not None:
        assert our_error is not None or "overflow" in str(error), error
        return
    if our_error is not None:
        raise AssertionError("raises") from our_error
    exact = is_exact(function, sample)
    for mine, theirs in zip(tensors_of(ours), tensors_of(expected), strict=True):
        assert_close(mine, theirs, exact=exact, what="result")
    for mine, theirs in zip(our_arguments, arguments, strict=True):
        assert_close(mine, theirs, exact=exact, what="argument afterwards")


def is_exact(function: Callable, sample: Sample) -> bool:
    """Eager fuses alpha's product with the sum, and keeps a 0-d factor of bf16 in its own dtype."""
    dtypes = {x.dtype for x in tensors_of(sample.args)}
    mixed = len(dtypes) > 1 and bool(dtypes & {torch.bfloat16, torch.float16})
    return bare_name(function) in EXACT and "alpha" not in sample.kwargs and not mixed


def is_logic_in_place(function: Callable) -> bool:
    """Comparisons and logic written into a float tensor: gradients are zero or, in eager, wrong."""
    return is_in_place(function) and SPELLED.get(bare_name(function)) in LOGIC


LOGIC = {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor"}
LOGIC |= {"logical_not"}


def gradient_step(function: Callable, args: tuple, kwargs: dict, second: bool) -> Callable:
    """A step that differentiates the sum of the results times fixed cotangents, twice if asked."""
    inplace, function = is_in_place(function), signless(function)

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
        return out, flags, list(grads)

    return step


_ORDER = torch.randperm(400, generator=torch.Generator().manual_seed(3))
_WEIGHTS = torch.linspace(-1.3, 1.7, 400, dtype=torch.float64)[_ORDER]


def weights(x: torch.Tensor) -> torch.Tensor:
    """A fixed cotangent of a tensor's shape and dtype."""
    return WEIGHTS[x.dtype][: x.numel()].reshape(x.shape)


WEIGHTS = {dtype: _WEIGHTS.to(dtype) for dtype in EPS}


def writes_its_leaf(function: Callable, args: tuple, kwargs: dict) -> bool:
    """F.relu(x, inplace=True), which eager refuses for a leaf."""
    return function is torch.nn.functional.relu and bool(kwargs or args[1:])


def step_of(function: Callable, sample: Sample, *, only_first: bool = False) -> Callable:
    """A step that calls the function, and differentiates it where that can be."""
    args, kwargs = sample.fresh()
    if is_in_place(function) and not isinstance(args[0], torch.Tensor):
        return lambda: function(*args, **kwargs)
    if not (writes_its_leaf(function, args, kwargs) or is_logic_in_place(function)):
        floats = [x for x in tensors_of(args) if x.is_floating_point()]
        for x in floats[:1] if only_first else floats:
            x.requires_grad_()
    return gradient_step(function, args, kwargs, second=False)


# Eager's gradient at NaN is NaN in the elements that a vector of the CPU holds, else that at +inf.
OPEN_AT_NAN = {"elu", "selu", "celu", "hardswish"}


def check_gradients(function: Callable, sample: Sample, *, only_first: bool = False) -> None:
    """First and, of smooth samples, second derivatives equal eager's.

    Where eager has none for all floating-point tensors, those for the first alone are compared too.
    """
    results = []
    for run in (lambda step: step(), call):
        args, kwargs = sample.fresh()
        floats = [x for x in tensors_of(args) if x.is_floating_point()]
        if not floats or writes_its_leaf(function, args, kwargs):
            return
        for x in floats[:1] if only_first else floats:
            x.requires_grad_()
        step = gradient_step(function, args, kwargs, sample.smooth)
        results.append((*outcome(run, step), floats))
    (theirs, error, leaves), (ours, our_error, our_leaves) = results
    if error is not None:
        if "Autograd not support dtype" in str(error):
            return  # a compiled step gives an integer tensor without gradient
        assert same_error(our_error, error), f"eager raises {error!r}, we {our_error!r} ({ours})"
        if not only_first and len(leaves) > 1:
            check_gradients(function, sample, only_first=True)
        return
    if isinstance(our_error, UnsupportedOperation):
        assert sample.refused, our_error
        return
    if our_error is not None:
        raise AssertionError("raises") from our_error
    _, flags, grads = theirs
    _, our_flags, our_grads = ours
    eps = max(EPS[x.dtype] for x in leaves)
    assert our_flags == flags, f"requires_grad {our_flags}, eager {flags}"
    for i, (mine, his) in enumerate(zip(our_grads, grads, strict=True)):
        assert (mine is None) == (his is None), f"gradient {i}: {mine}, eager {his}"
        if mine is not None:
            if SPELLED.get(bare_name(function)) in OPEN_AT_NAN:
                mine, his = (g.where(~leaves[i].isnan(), 0) for g in (mine, his))
            assert_close(mine, his, exact=False, what=f"gradient {i}", eps=eps, ulps=4 * ULPS)
    for i, (mine, his) in enumerate(zip(our_leaves, leaves, strict=True)):
        assert (mine.grad is None) == (his.grad is None), f"second {i}: {mine.grad}, {his.grad}"
        if mine.grad is not None:
            assert_close(
                mine.grad,
                his.grad,
                exact=False,
                what=f"second derivative {i}",
                eps=eps,
                ulps=4 * ULPS,
            )
