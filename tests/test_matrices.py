"""Linear algebra in steps: calls of the host in plans, what is raised for values, whole trainings.

The functions one by one are in test_functions, the primitives in test_ops.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from torch import nn

import tracejit
from support.oracle import call
from tracejit.errors import BackendUnavailable, LinAlgError, UnsupportedOperation
from tracejit.ir.graph import Builder, Result, Write
from tracejit.ir.interp import evaluate
from tracejit.ir.types import Type, f32, f64
from tracejit.runtime import lapack
from tracejit.runtime.c_executor import CExecutor
from tracejit.runtime.numpy_executor import NumpyExecutor
from tracejit.runtime.program import Program
from tracejit.schedule import schedule
from tracejit.schedule.cpu.lower import lower
from tracejit.schedule.cpu.text import parse_cpu_plan
from tracejit.schedule.kernel import Kernel
from tracejit.schedule.plan import Plan
from tracejit.schedule.plan_text import parse_plan
from tracejit.schedule.traffic import bytes_moved, operations
from tracejit.testing import assert_equal_to_eager, fake_device

EXECUTORS = {"c": lambda: CExecutor(1), "numpy": NumpyExecutor}


def calls_of(plan: Plan) -> list[Kernel]:
    return [x.kernel for x in plan.launches if x.kernel.call is not None]


def spd(*shape: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(shape)
    return x @ x.swapaxes(-1, -2) + np.eye(shape[-1])


# --- plans -------------------------------------------------------------------------------------


def gaussian(n: int = 6):
    """exp of distances, its root, and a solution with it: kernels before, between and after."""
    b = Builder()
    b.line = "gp.py:7"
    a, y = b.param(Type(f64, (n, n))), b.param(Type(f64, (n, 2)))
    root = b.cholesky(b.add(b.mul(a, 0.5), b.full(0.0, shape=(n, n), dtype=f64, device="cpu")))
    x = b.triangular_solve(root, b.mul(y, 2.0), upper=False, transposed=False, unit=False)
    return b.graph("gp", (Result(b.reduce_sum(b.mul(x, x), axes=(0, 1))), Result(root)))


def test_a_plan_has_calls_of_the_host():
    plan = schedule(gaussian())
    assert [k.call.op.name for k in calls_of(plan)] == ["cholesky", "triangular_solve"]
    assert all(k.lines == ("gp.py:7",) and not k.stages for k in calls_of(plan))
    text = str(plan)
    assert "  call cholesky (6, 6) -> (6, 6)" in text
    assert "call triangular_solve (6, 6) (6, 2) -> (6, 2) upper=False transposed=False" in text
    assert str(parse_plan(text)) == text
    cpu = lower(plan, 32)
    assert str(parse_cpu_plan(str(cpu))) == str(cpu)
    assert operations(plan) >= 6**3 / 3 + 6 * 6 * 2
    whole = [8 * 2 * 36, 8 * (36 + 2 * 12)]
    assert [n for n, x in zip(bytes_moved(plan), plan.launches, strict=True) if x.kernel.call] == (
        whole
    )


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_plan_with_calls_is_its_graph(name):
    graph = gaussian()
    inputs = [spd(6, 6), np.random.default_rng(1).standard_normal((6, 2))]
    program = Program(schedule(graph), EXECUTORS[name]())
    ours = program.function()([torch.from_numpy(x.copy()) for x in inputs])
    for mine, right in zip(ours, evaluate(graph, inputs)[0], strict=True):
        np.testing.assert_allclose(mine.numpy(), right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("strides", [None, (1, 5), (12, 2)])
def test_operands_in_any_layout(name, strides):
    """What lies row by row is read where it is; anything else is copied first."""
    b = Builder()
    a = b.param(Type(f32, (5, 5)), strides)
    graph = b.graph("f", (Result(b.cholesky(a)),))
    x = torch.from_numpy(spd(5, 5).astype(np.float32))
    given = x if strides is None else torch.zeros(80).as_strided((5, 5), strides).copy_(x)
    plan = schedule(graph)
    copies = [x for x in plan.launches if x.kernel.call is None]
    assert len(copies) == 1 + (strides is not None)  # of the result, and of the operand
    (ours,) = Program(plan, EXECUTORS[name]()).function()([given])
    np.testing.assert_allclose(ours.numpy(), np.linalg.cholesky(x.numpy()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EXECUTORS)
def test_an_operand_is_read_before_it_is_overwritten(name):
    """a <- a + 1 and b <- root of a: the write waits for the call."""
    b = Builder()
    a, root = b.param(Type(f64, (4, 4))), b.param(Type(f64, (4, 4)))
    writes = (Write(a, b.add(a, 1.0)), Write(root, b.cholesky(a)))
    plan = schedule(b.graph("f", (), writes))
    x = torch.from_numpy(spd(4, 4))
    y, before = torch.zeros(4, 4, dtype=torch.float64), x.clone()
    Program(plan, EXECUTORS[name]()).function()([x, y])
    assert torch.equal(x, before + 1)
    np.testing.assert_allclose(y.numpy(), np.linalg.cholesky(before.numpy()), rtol=1e-12)


def test_memory_of_what_is_read_later_is_kept():
    """Two decompositions and what joins them: no two live values share a place."""
    b = Builder()
    a = b.param(Type(f64, (8, 8)))
    first = b.cholesky(b.add(a, 1.0))
    second = b.expm(b.mul(a, 0.01))
    third = b.matmul(first, second)
    graph = b.graph("f", (Result(b.add(third, first)), Result(b.lu(b.add(second, first)))))
    inputs = [spd(8, 8)]
    for executor in EXECUTORS.values():
        ours = Program(schedule(graph), executor()).function()([torch.from_numpy(inputs[0])])
        for mine, right in zip(ours, evaluate(graph, inputs)[0], strict=True):
            np.testing.assert_allclose(mine.numpy(), right, rtol=1e-10, atol=1e-10)


def test_wrong_factors_read_nothing_elsewhere():
    """As `explain` times a plan, on memory with any numbers."""
    b = Builder()
    factors, y = b.param(Type(f32, (3 * 3 + 6,))), b.param(Type(f32, (3, 2)))
    results = tuple(Result(b.lu_solve(factors, y, transposed=x)) for x in (False, True))
    program = Program(schedule(b.graph("f", results)), CExecutor(1)).function()
    for number in (1e9, -1e9, float("nan"), float("inf"), 2.5):
        program([torch.full((15,), number), torch.ones(3, 2)])


def test_reconstructions():
    """What eager's vectors cannot be compared with: the product is the matrix."""
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 5, 3)))
    s = torch.from_numpy(spd(2, 5, 5))

    def step(x, s):
        u, values, vt = torch.linalg.svd(x, full_matrices=False)
        full, _, _ = torch.linalg.svd(x)
        w, v = torch.linalg.eigh(s)
        q, r = torch.linalg.qr(x)
        p, low, up = torch.linalg.lu(x)
        return (
            (u * values[..., None, :]) @ vt,
            full.mT @ full,
            (v * w[..., None, :]) @ v.mT,
            q @ r,
            q.mT @ q,
            p @ low @ up,
        )

    for backend in ("c", "numpy"):
        compiled = tracejit.compile(step, backend=backend)
        for _ in range(4):
            product, eye, symmetric, qr, one, lu = compiled(x, s)
        assert compiled.explain_mode().startswith("replay")
        for found, right in ((product, x), (symmetric, s), (qr, x), (lu, x)):
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(eye, torch.eye(5).double().expand(2, 5, 5))
        torch.testing.assert_close(one, torch.eye(3).double().expand(2, 3, 3))


# --- values that eager refuses -----------------------------------------------------------------

EYE = torch.eye(3)
SINGULAR = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [1.0, 1.0, 1.0]])
UNKNOWN = torch.full((3, 3), float("nan"))
VALUES = {
    "cholesky": (torch.linalg.cholesky, -EYE),
    "cholesky of NaN": (torch.linalg.cholesky, UNKNOWN),
    "a batch": (lambda a: torch.linalg.cholesky(torch.stack([EYE, a])), -EYE),
    "checked": (lambda a: torch.linalg.cholesky_ex(a, check_errors=True)[0], -EYE),
    "inv": (torch.linalg.inv, SINGULAR),
    "solve": (lambda a: torch.linalg.solve(a, EYE), SINGULAR),
    "solve of a batch": (lambda a: torch.linalg.solve(torch.stack([EYE, a]), EYE), SINGULAR),
    "lu_factor": (lambda a: torch.linalg.lu_factor(a)[0], SINGULAR),
    "cholesky_inverse": (torch.cholesky_inverse, torch.zeros(3, 3)),
    "eigh": (lambda a: torch.linalg.eigh(a)[0], UNKNOWN),
    "eigvalsh": (torch.linalg.eigvalsh, UNKNOWN),
    "svd": (lambda a: torch.linalg.svd(a)[1], UNKNOWN),
    "pinv": (torch.linalg.pinv, UNKNOWN),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("when", ["at first", "in replay"])
@pytest.mark.sweep(2)
def test_refused_values_raise_before_anything_is_written(name, when):
    function, bad = VALUES[name]
    counter, weight = torch.zeros(3), torch.ones(3, requires_grad=True)

    def step(a):
        counter.add_(1)
        (weight.sum() * 2).backward()
        return function(a)

    compiled = tracejit.compile(step)
    for _ in range(5 if when == "in replay" else 0):
        weight.grad = None
        compiled(EYE)
    state = counter.clone(), None if weight.grad is None else weight.grad.clone()
    with pytest.raises(RuntimeError) as theirs:
        function(bad)
    for _ in range(2):
        with pytest.raises(torch.linalg.LinAlgError) as ours:
            compiled(bad)
        assert isinstance(ours.value, LinAlgError) and __file__ in str(ours.value)
        assert str(theirs.value).rstrip(".").partition(" (error code")[0] in str(ours.value)
        assert torch.equal(counter, state[0])
        assert (weight.grad is None) == (state[1] is None)
    weight.grad = None
    compiled(EYE)
    assert torch.equal(counter, state[0] + 1)


def test_a_step_that_catches_the_error_goes_on():
    """As eager: jitter on the diagonal until there is a root; each outcome is a path of its own."""
    total = torch.zeros(())

    def step(a):
        for jitter in (0.0, 1.0, 10.0):
            try:
                root = torch.linalg.cholesky(a + jitter * EYE)
                break
            except torch.linalg.LinAlgError:
                pass
        total.add_(root.sum())
        return root

    compiled = tracejit.compile(step)
    for _ in range(4):
        for a in (EYE, -0.5 * EYE, -5.0 * EYE):
            before = total.clone()
            ours = compiled(a)
            gained = total - before
            total.copy_(before)
            theirs = step(a)
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(gained, total - before)
    assert compiled.explain_mode().startswith("replay: 3 plan(s) armed")


def test_determinants_of_singular_matrices_have_eagers_gradient():
    for a in (SINGULAR, torch.zeros(2, 2), torch.ones(3, 3)):
        results = []
        for run in (lambda step: step(), call):
            leaf = a.clone().requires_grad_()
            results.append(run(lambda leaf=leaf: torch.autograd.grad(torch.linalg.det(leaf), leaf)))
        torch.testing.assert_close(results[0], results[1])


def test_equal_values_have_gradients_as_long_as_no_vector_is_read():
    """Eigenvalues and singular values that are equal: eager's derivative has no 0 / 0."""

    def step(a):
        total = torch.linalg.eigh(a)[0].sum() + torch.linalg.svd(a)[1].sum()
        total = total + torch.linalg.eigvalsh(a).sum() + torch.linalg.matrix_norm(a, "nuc")
        return torch.autograd.grad(total, a)[0]

    a = torch.eye(3, requires_grad=True)
    torch.testing.assert_close(call(step, a), step(a))
    assert call(step, a).isfinite().all()


# --- where there is no LAPACK ------------------------------------------------------------------


def test_a_gpu_refuses():
    """With the user's line, before anything is compiled or written."""
    x = torch.eye(3)
    with fake_device(compiled=False):
        compiled = tracejit.compile(
            lambda x: torch.linalg.inv(x) + 1, backend="fake:sm_90", on_unsupported="raise"
        )
        with pytest.raises(UnsupportedOperation, match=r"test_matrices.py:\d+.*CPU only"):
            compiled(x)
        eager = tracejit.compile(
            lambda x: torch.linalg.inv(x) + 1, backend="fake:sm_90", on_unsupported="eager"
        )
        with pytest.warns(tracejit.errors.TracejitWarning):
            assert torch.equal(eager(x), torch.linalg.inv(x) + 1)
    with pytest.raises(tracejit.errors.TracejitError, match="CPU only"):
        tracejit.compile(lambda x: torch.linalg.inv(x), target="sm_90").build(
            torch.empty(3, 3, device="meta")
        )


def test_a_numpy_without_lapack_is_said(monkeypatch):
    lapack.routines.cache_clear()
    monkeypatch.setattr(lapack, "_SPELLINGS", (("none_{}", True),))
    try:
        with pytest.raises(BackendUnavailable, match='backend="numpy"'):
            lapack.routines()
    finally:
        lapack.routines.cache_clear()


def test_libraries_with_32_bit_integers():
    """The table says how wide integers are: rows that getrf swaps are read so."""
    b = Builder()
    graph = b.graph("f", (Result(b.lu(b.param(Type(f64, (5, 5))))),))
    plan = Program(schedule(graph), CExecutor(1))
    x = np.random.default_rng(5).standard_normal((5, 5))
    kernels = plan.loaded._kernels.values()
    kernel = next(k for k in kernels if hasattr(k.library, "tj_lapack"))
    addresses, wide = lapack.routines()
    assert wide  # numpy's wheels
    table = (ctypes.c_void_p * len(addresses)).in_dll(kernel.library, "tj_lapack")

    @ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 6)
    def narrow(m, n, a, lda, swaps, info):
        """dgetrf with integers of 32 bits."""
        known = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 6)(addresses[11])
        size = ctypes.c_int32.from_address(m).value
        big = (ctypes.c_int64 * size)()
        sizes = [ctypes.c_int64(ctypes.c_int32.from_address(k).value) for k in (m, n, lda)]
        at = [ctypes.addressof(k) for k in sizes]
        known(at[0], at[1], a, at[2], ctypes.addressof(big), info)
        (ctypes.c_int32 * size).from_address(swaps)[:] = list(big)

    table[11] = ctypes.cast(narrow, ctypes.c_void_p).value
    ctypes.c_int64.in_dll(kernel.library, "tj_wide").value = 0
    try:
        (ours,) = plan.function()([torch.from_numpy(x)])
    finally:
        lapack.provide(kernel.library)
    np.testing.assert_allclose(ours.numpy(), evaluate(graph, [x])[0][0], rtol=1e-12, atol=1e-12)


# --- whole steps -------------------------------------------------------------------------------


def gaussian_process():
    """The marginal likelihood, trained: cholesky, a solution with it, log of the determinant."""
    torch.manual_seed(0)
    x = torch.rand(12, 3)
    y = torch.sin(x.sum(1)) + 0.1 * torch.randn(12)
    parameters = [nn.Parameter(torch.tensor(n)) for n in ([0.1, 0.0, -0.1], 0.0, -2.0)]
    optimizer = torch.optim.Adam(parameters, lr=0.05)

    def step(x, y):
        optimizer.zero_grad()
        scales, height, noise = (p.exp() for p in parameters)
        z = x / scales
        distances = ((z[:, None] - z[None]) ** 2).sum(-1)
        covariance = height * torch.exp(-0.5 * distances) + noise * torch.eye(12)
        root = torch.linalg.cholesky(covariance)
        weights = torch.cholesky_solve(y[:, None], root)[:, 0]
        loss = 0.5 * (y * weights).sum() + torch.log(torch.diagonal(root)).sum()
        loss.backward()
        optimizer.step()
        return loss

    return step, (x, y)


def spectral_normalisation():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 7)), nn.Tanh(), nn.Linear(7, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean() + torch.linalg.matrix_norm(model[2].weight, 2)
        loss.backward()
        optimizer.step()
        return loss

    return step, (torch.randn(4, 5),)


def orthogonal(shape: tuple[int, int], mapping: str | None):
    torch.manual_seed(0)
    model = nn.utils.parametrizations.orthogonal(nn.Linear(*shape), orthogonal_map=mapping)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step, (torch.randn(4, shape[0]),)


def inverse_roots():
    """Shampoo: the fourth roots of two matrices that grow, by their eigenvectors."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 4))
    left, right = torch.eye(5), torch.eye(4)
    target = torch.randn(8, 4)

    def root(a):
        values, vectors = torch.linalg.eigh(a)
        return (vectors * values.clamp(min=1e-6) ** -0.25) @ vectors.mT

    def step(x):
        loss = (x @ weight - target).square().mean()
        (g,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            left.add_(g @ g.mT)
            right.add_(g.mT @ g)
            weight.sub_(0.1 * root(left) @ g @ root(right))
        return loss

    return step, (torch.randn(8, 5),)


def whitening():
    """Rows with the unit matrix as covariance, by its eigenvectors, and backward through them."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = torch.randn(16, 4)

    def step(x):
        optimizer.zero_grad()
        h = model(x)
        h = h - h.mean(0)
        values, vectors = torch.linalg.eigh(h.mT @ h / 16 + 1e-3 * torch.eye(4))
        white = h @ (vectors * values.rsqrt()) @ vectors.mT
        loss = (white - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step, (torch.randn(16, 6),)


def systems():
    """Solutions and determinants of a batch of small matrices."""
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(7, 3, 3) * 0.3 + 2 * torch.eye(3))
    b = torch.randn(7, 3, 2)

    def step(b):
        loss = torch.linalg.solve(a, b).square().sum() - torch.logdet(a).sum()
        loss = loss + torch.linalg.inv(a).square().mean()
        (g,) = torch.autograd.grad(loss, a)
        with torch.no_grad():
            a.sub_(0.001 * g)
        return loss

    return step, (b,)


STEPS = {
    "gaussian_process": gaussian_process,
    "spectral_normalisation": spectral_normalisation,
    "orthogonal": lambda: orthogonal((4, 6), None),
    "orthogonal_by_exp": lambda: orthogonal((5, 5), "matrix_exp"),
    "orthogonal_by_cayley": lambda: orthogonal((5, 5), "cayley"),
    "inverse_roots": inverse_roots,
    "whitening": whitening,
    "systems": systems,
}


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.sweep(2)
def test_steps_train_like_eager_in_replay(name, backend):
    step, args = STEPS[name]()
    options = {"backend": backend, "on_unsupported": "raise"}
    compiled = assert_equal_to_eager(step, lambda: args, calls=5, **options)
    assert compiled.explain_mode().startswith("replay")
    assert any(calls_of(plan) for plan in compiled.plans) or name.startswith("spectral")


def test_a_check_and_the_rest_share_one_factorization():
    """What a check has computed is not computed again."""
    step, args = gaussian_process()
    compiled = tracejit.compile(step)
    for _ in range(4):
        compiled(*args)
    found = [x.kernel for x in compiled.explain(measure=False).launches]
    assert found.count("host_cholesky") == 1 and found.count("host_triangular_solve") <= 6


def test_the_ledger_counts_calls_of_the_host():
    def step(a):
        return torch.linalg.matrix_exp(a).sum()

    compiled = tracejit.compile(step)
    for _ in range(4):
        compiled(torch.eye(9))
    found = compiled.explain()
    (cost,) = [x for x in found.launches if x.kernel == "host_expm"]
    assert cost.bytes == 2 * 81 * 4 and cost.operations >= 2 * 9**3 and cost.lines
    assert any("LAPACK runs on the CPU only" in reason for reason in found.holds_back)
    assert any(x.bytes == 2 * 81 * 4 for x in found.kernels)
    assert "host_expm" in str(found)
