"""Every capture rule in every spelling against eager: values, layout, errors, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from function_samples import (
    ELSEWHERE,
    EXACT,
    ROWS,
    SPELLED,
    Sample,
    bare_name,
    each_function,
    samples_of,
)
from function_samples_indexing import is_indexing  # its samples: test_functions_indexing
from function_samples_nn import is_nn  # its samples have their tests in test_functions_nn
from oracle import call

from tracejit.capture.trace.table import RULES, Row, function_name, rule
from tracejit.errors import UnsupportedOperation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # eager's deprecations

EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
ULPS = 8  # of the larger of the element and a typical element, where rounding may differ
ERRORS = (RuntimeError, TypeError, IndexError, ValueError, NotImplementedError)


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


def outcome(run: Callable, *args: object) -> tuple[object, Exception | None]:
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
    kinds = [k for k in (TypeError, IndexError, ValueError, RuntimeError) if isinstance(eager, k)]
    return ours is not None and any(isinstance(ours, k) for k in kinds)


def parameters(functions: list[Callable]) -> list:
    return [pytest.param(f, id=function_name(f)) for f in sorted(functions, key=function_name)]


OTHERS = [f for f in each_function() if not is_nn(f) and not is_indexing(f)]


def test_every_function_has_samples():
    assert [function_name(f) for f in each_function() if not samples_of(f)] == []
    names = {bare_name(f) for f in RULES}
    assert set(ROWS) <= names, set(ROWS) - names
    assert names >= ELSEWHERE, ELSEWHERE - names


def test_every_function_has_odd_shapes():
    """test_support runs the samples in every dtype."""
    for function in each_function():
        shapes = {x.shape for sample in samples_of(function) for x in tensors_of(sample.args)}
        odd = any(n % 2 for shape in shapes for n in shape)
        assert odd or not shapes, function_name(function)


def test_a_second_rule_is_an_error():
    first = RULES[torch.exp]
    with pytest.raises(
        ValueError, match=r"exp has two rules: tracejit\.\S*unary\S* and test_functions"
    ):
        rule(torch.exp)(lambda t, x: x)
    assert RULES[torch.exp] is first
    rule(torch.exp)(first.run)  # the same again is none


def test_a_rule_says_what_it_is_derived_from():
    plain, written = RULES[torch.exp2], RULES[torch.exp2_]
    assert (plain.family, plain.form, plain.of, plain.row.name) == ("unary", "", None, "exp2")
    assert (written.form, written.of) == ("in place", plain)
    flagged = RULES[torch.nn.functional.leaky_relu]
    assert (flagged.form, flagged.family, flagged.own.form) == ("signature", "activation", "")
    assert RULES[torch._foreach_abs_].of is RULES[torch.Tensor.abs_]
    assert RULES[torch.Tensor.tolist].needs_values and not plain.needs_values


def test_a_row_has_a_slope_for_each_input():
    with pytest.raises(ValueError, match="hypot has 2 inputs and 1 slopes"):
        Row("hypot", lambda t, x, y: x, (lambda t, g, y, *xs: g,), arity=2)


def test_empty():
    """Memory as it comes, of the shape, dtype and layout that eager gives it."""

    def step(x):
        made = (torch.empty(2, 3), torch.empty((0,), dtype=torch.int8), torch.empty_like(x))
        return *made, x.new_empty(4), x.new_empty((2, 1), dtype=torch.float64)

    for x in (torch.ones(3, 2).t(), torch.ones(5, dtype=torch.bfloat16)):
        for mine, his in zip(call(step, x), step(x), strict=True):
            assert (mine.shape, mine.dtype, mine.stride()) == (his.shape, his.dtype, his.stride())


@pytest.mark.parametrize("function", parameters(OTHERS))
def test_values(function: Callable):
    """Result, layout, aliasing, and what is left of the arguments equal eager's."""
    on_each_sample(check_values, function, samples_of(function))


def on_each_sample(check: Callable, function: Callable, samples: list[Sample]) -> None:
    """Run a check on every sample and report all failures together."""
    failures = []
    for sample in samples:
        try:
            check(function, sample)
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
        if "ZeroDivisionError" in str(error):
            return  # a zero among the divisors; a compiled step gives 0 there, as on a GPU
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


SCALED = [f for f in OTHERS if any(runtime_floats(s) for s in samples_of(f))]


@pytest.mark.parametrize("function", parameters(SCALED))
def test_runtime_scalars(function: Callable):
    """Floats that reach a function as arguments of the step give what literals give."""
    rows = [s for s in samples_of(function) if runtime_floats(s) and not s.refused]
    if SPELLED[bare_name(function)] == "pow":  # eager's rsqrt(-inf) is nan, its pow(-inf, -0.5) 0
        rows = [s for s in rows if runtime_floats(s) != [-0.5]]
    on_each_sample(check_runtime_scalars, function, rows)


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
        assert our_error is not None or "overflow" in str(error) or "Zero" in str(error), error
        return
    if isinstance(our_error, UnsupportedOperation):
        assert bare_name(function) in NEEDS_PLAIN_NUMBERS, our_error
        return
    if our_error is not None:
        raise AssertionError("raises") from our_error
    exact = is_exact(function, sample)
    for mine, theirs in zip(tensors_of(ours), tensors_of(expected), strict=True):
        assert_close(mine, theirs, exact=exact, what="result")
    for mine, theirs in zip(our_arguments, arguments, strict=True):
        assert_close(mine, theirs, exact=exact, what="argument afterwards")


NEEDS_PLAIN_NUMBERS = {"arange"}  # they decide a shape


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
DIFFERENTIABLE = [f for f in OTHERS if not is_logic_in_place(f)]


@pytest.mark.parametrize("function", parameters(DIFFERENTIABLE))
def test_gradients(function: Callable):
    on_each_sample(check_gradients, function, samples_of(function))


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
