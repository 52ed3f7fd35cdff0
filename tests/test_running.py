"""Running products, extrema, log-sums and recurrences: every bit of the extrema and their places,
gradients where elements are 0, long axes, and threads."""

from __future__ import annotations

import math
import os

import pytest
import torch

import tracejit

inf, nan = math.inf, math.nan
SPECIAL = [0.0, -0.0, 1.0, 1.0, -inf, 2.0, -0.0, 0.0, 2.0, inf, inf, -1.0, nan, 3.0, nan, inf]
EXECUTORS = ["c", "numpy", pytest.param("interpret", marks=pytest.mark.interpret)]


def compiled(step, executor: str):
    return tracejit.compile(step, on_unsupported="raise", backend=executor)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    if theirs.is_floating_point():
        known = ~theirs.isnan()
        assert torch.equal(ours.signbit()[known], theirs.signbit()[known])


def rows_of_specials(dtype: torch.dtype) -> torch.Tensor:
    """Special values in many orders; of integers and bools, small ones with ties."""
    generator = torch.Generator().manual_seed(0)
    if not dtype.is_floating_point:
        return torch.randint(0, 3, (7, 123), generator=generator).to(dtype)
    order = torch.randint(0, 12, (7, 123), generator=generator)
    return torch.tensor([*SPECIAL[:12], *SPECIAL], dtype=dtype)[order]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]
DTYPES += [torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.sweep(0.17)
def test_extrema_and_their_places_are_those_of_eager(dtype: torch.dtype, executor: str):
    def step(x, y, z):
        found = [f(v, d) for f in (torch.cummax, torch.cummin) for v, d in ((x, 1), (x, 0))]
        found += [f(v, 0) for f in (torch.cummax, torch.cummin) for v in (y, z, x.t())]
        return [part for pair in found for part in pair]

    x = rows_of_specials(dtype)
    y = torch.tensor(SPECIAL).to(dtype) if dtype.is_floating_point else x[0, :1]
    z = x[0, ::2]
    for ours, theirs in zip(compiled(step, executor)(x, y, z), step(x, y, z), strict=True):
        same_bits(ours, theirs)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_products_and_log_sums_of_special_values(executor: str):
    rows = [SPECIAL, SPECIAL[:12], [1.0, 2.0, inf, 3.0], [-inf, -inf, 1.0], [inf, inf], [5.0], []]
    xs = [torch.tensor(row) for row in rows]

    def step(*xs):
        return [y for x in xs for y in (x.cumprod(0), x.logcumsumexp(0))]

    for ours, theirs in zip(compiled(step, executor)(*xs), step(*xs), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("executor", ["c", "numpy"])
@pytest.mark.parametrize("zeros", [(), (3,), (0,), (2, 6), (9,), tuple(range(10))], ids=str)
@pytest.mark.sweep(0.17)
def test_the_gradient_of_products_with_zeros(zeros: tuple[int, ...], executor: str):
    """To second order: each product's derivative by a factor that is 0 is that of the others."""
    x = torch.linspace(-1.5, 2, 10, dtype=torch.float64).cos()
    x[list(zeros)] = 0.0
    weights = torch.linspace(-1, 2, 10, dtype=torch.float64)

    def step(x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad((x.cumprod(0) * weights).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad((g * weights.sin()).sum(), x)
        return g.detach(), h

    for ours, theirs in zip(compiled(step, executor)(x), step(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_products_that_underflow_before_others_that_overflow():
    x = torch.tensor([1e-20] * 4 + [1e20] * 4)

    def step(x):
        x = x.detach().requires_grad_()
        x.cumprod(0).sum().backward()
        return x.grad

    ours, theirs = compiled(step, "c")(x), step(x)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs)


FUNCTIONS = ["cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"]


@pytest.mark.parametrize("shape, dim", [((1 << 20,), 0), ((512, 300), 0), ((300, 513), 1)])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.sweep(0.17)
def test_long_axes_are_as_near_as_eager_and_alike_for_all_threads(name, shape, dim):
    """float32 is combined in float64, as in eager: a million elements lose nothing."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = 1 + x * 1e-3 if name == "cumprod" else x

    def step(x):
        y = getattr(x, name)(dim)
        return y if isinstance(y, torch.Tensor) else y.values

    call = compiled(step, "c")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = call(x).clone()
        torch.set_num_threads(2)
        two = call(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)
    exact = step(x.double())
    if len(shape) == 1:  # the carried value is rounded where it is stored, and nowhere else
        torch.testing.assert_close(one.double(), exact, rtol=1e-6, atol=1e-6)
    near = 1e-4 if dim == 0 and len(shape) > 1 else 1e-5  # columns side by side: rounded each time
    torch.testing.assert_close(one, step(x), rtol=near, atol=near)


def test_work_is_linear():
    def step(x):
        x = x.detach().requires_grad_()
        total = x.cumprod(0).sum() + x.logcumsumexp(0).sum() + x.cummax(0).values.sum()
        total.backward()
        return x.grad

    sizes = [len(tracejit.capture(step, torch.ones(n)).graph.nodes) for n in (64, 1 << 16)]
    assert sizes[0] == sizes[1]


LONG = """step(%0: {dtype}[{shape}]) {{
  %1: {dtype}[{shape}] = {name}(%0, axis={axis}{combine})
  return %1
}}"""
STRETCHED = [
    ("cumsum", "", "f32", (215,), 0),
    ("cumsum", "", "i64", (192,), 0),
    ("cumsum", "", "f64", (201, 3), 0),
    ("accumulate", "max", "f32", (2, 215), 1),
    ("accumulate", "min", "f16", (215, 2), 0),
    ("accumulate", "min", "u8", (215,), 0),
    ("accumulate", "logaddexp", "f32", (215,), 0),
]


@pytest.mark.interpret
@pytest.mark.parametrize("name, combine, dtype, shape, axis", STRETCHED)
def test_long_rows_are_cut_into_stretches(name, combine, dtype, shape, axis, monkeypatch):
    """On a GPU: with the very extrema, signs of zeros and NaN that they have as one."""
    import numpy as np

    from support.interpret_checks import run
    from tracejit.ir.interp import evaluate
    from tracejit.ir.text import parse
    from tracejit.schedule import stretches

    stretched = stretches.stretched
    how = f', combine="{combine}"' if combine else ""
    sizes = ",".join(map(str, shape))
    graph = parse(LONG.format(name=name, combine=how, dtype=dtype, shape=sizes, axis=axis))
    assert stretched(graph) == graph
    monkeypatch.setattr(stretches, "SHORT", 64)
    assert len(stretched(graph).nodes) > 4
    rng = np.random.default_rng(0)
    kinds = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "i64": np.int64}
    x = rng.integers(0, 200, shape).astype(kinds.get(dtype, np.uint8))
    if combine in ("max", "min"):  # zeros of both signs, long runs of equal ones, NaN at the end
        x = np.where(rng.random(shape) < 0.5, x * 0, -0.0 * x) if dtype != "u8" else x % 7 + 3
        x = x.astype(kinds.get(dtype, np.uint8))
        if dtype != "u8":
            x.reshape(-1)[-9] = np.nan
    elif combine == "logaddexp":
        x = (x / 10).astype(np.float32)
        x[:4] = -np.inf
    for form in (graph, stretched(graph)):
        (expected,), _ = evaluate(graph, [x])
        (result,), _, _ = run(form, [x])
        exact = dtype not in ("f32",) or combine == "max"
        np.testing.assert_allclose(result, expected, rtol=0 if exact else 1e-6)
        if expected.dtype.kind == "f":
            signs = np.signbit(result) == np.signbit(expected)
            assert (signs | np.isnan(expected)).all()


@pytest.mark.interpret
def test_products_whose_parts_leave_the_range():
    """A tree would multiply factors by each other that meet a 0 first: no NaN comes of it, and
    nothing that comes back from underflow is lost."""
    wild = [[0.0] + [1e38] * 30, [1e-30] * 12 + [1e30] * 12, [1e38] * 9 + [0.0] * 3 + [2.0]]
    wild += [[inf, 2.0, 0.0, 3.0], [-0.0] + [1e38] * 40, [2.0] * 5 + [nan] + [1.0] * 5]
    xs = [torch.tensor(row, dtype=torch.float64).requires_grad_() for row in wild]

    def step(*xs):
        xs = [x.detach().requires_grad_() for x in xs]
        ys = [x.cumprod(0) for x in xs]
        total = sum(y[:2].sum() for y in ys)
        return [*(y.detach() for y in ys), *torch.autograd.grad(total, xs)]

    found, known = compiled(step, "interpret")(*xs), compiled(step, "numpy")(*xs)
    for ours, theirs in zip(found, known, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["cumsum", "cumprod", "logcumsumexp", "cummax"])
@pytest.mark.sweep(0.34)
def test_rows_of_several_tiles_carry_on(name: str):
    """Along either axis, with gradients; that of an extremum is no running result."""
    x = 1 + torch.randn(3, 3000, generator=torch.Generator().manual_seed(1)) * 1e-2
    weights = torch.linspace(-1, 1, 3000)

    def step(x, y):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        found = [getattr(x, name)(1), getattr(y, name)(0)]
        values = [z if isinstance(z, torch.Tensor) else z[0] for z in found]
        values[1] = values[1].t()
        found = [z.detach() for z in values]
        if name == "cummax":
            return found
        return found + list(torch.autograd.grad(sum((z * weights).sum() for z in values), (x, y)))

    found = compiled(step, "interpret")(x, x.t().contiguous())
    for ours, theirs in zip(found, step(x, x.t().contiguous()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("name", ["cumsum", "mul", "max", "logaddexp", "recurrence"])
@pytest.mark.sweep(5)
def test_scans_spill_nothing(name: str, target: int):
    """Rows, columns and half types, each in accesses that are wide."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("compiles, so it needs a process without the interpreter")
    pytest.importorskip("triton")
    from support.machine_code import facts

    known = name in ("cumsum", "recurrence")
    op = name if known else "accumulate"
    how = "" if known else f', combine="{name}"'
    kinds = [("f32", "64,1000", 1), ("f32", "1000,300", 0), ("f64", "300,1000", 1)]
    kinds += [("bf16", "64,1000", 1)] * (name == "max")
    for dtype, shape, axis in kinds:
        args = ", ".join(["%0", "%1"][: 1 + (name == "recurrence")])
        params = ", ".join(f"{arg}: {dtype}[{shape}]" for arg in args.split(", "))
        text = f"%2: {dtype}[{shape}] = {op}({args}, axis={axis}{how})"
        form, found = facts(f"step({params}) {{\n  {text}\n  return %2\n}}", target)
        assert form == "scan" and not found.spills, (dtype, shape, found.spills)
        assert min(found.stores) >= 64, found.stores
