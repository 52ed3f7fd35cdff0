"""What all tests share: verified passes, caches of their own, skips with a reason, golden files."""

from __future__ import annotations

import gc
import os
import tempfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.golden import Golden
    from support.plan_checks import PlanChecks
    from tracejit.runtime.executor import Executor

pytest.register_assert_rewrite("support")
gc.set_threshold(20_000, 20, 20)  # tests make objects by the million, and gc takes its part of each

os.environ["TRACEJIT_VERIFY"] = "1"
os.environ["TRACEJIT_ON_UNSUPPORTED"] = "raise"  # so that nothing hides; see test_fallback.py
# One process for each core is at work, and a thread that spins takes time from the other one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
_caches = None
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the caches of the process they are of
    _caches = tempfile.TemporaryDirectory(prefix="tracejit-tests-")
    os.environ["TRACEJIT_CACHE"] = f"{_caches.name}/tracejit"
    os.environ["TRITON_CACHE_DIR"] = f"{_caches.name}/triton"


def pytest_unconfigure(config: pytest.Config) -> None:
    if _caches is not None:
        _caches.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from support.scope import WHOLE, sample
    from support.verified import why_not

    sweeps: dict[object, list[pytest.Item]] = {}  # the cases of each test function
    for item in items:
        if item.get_closest_marker("sweep") and (WHOLE or not item.get_closest_marker("slow")):
            sweeps.setdefault((item.path, item.originalname), []).append(item)
    left: set[pytest.Item] = set()
    for cases in sweeps.values():
        left.update(cases)
        left.difference_update(sample(cases, *cases[0].get_closest_marker("sweep").args))
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    verifying = os.environ.get("TRACEJIT_VERIFY_CALLS")
    for item in items:
        why = why_not(item.nodeid.rpartition("/")[2]) if verifying else ""
        if why:
            item.add_marker(pytest.mark.skip(reason=why))
        if item.get_closest_marker("interpret") and not interpreting:
            item.add_marker(pytest.mark.skip(reason="runs with TRITON_INTERPRET=1 only"))
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def golden() -> Golden:
    """`golden(name, text)`; fixtures import late, once the environment is set."""
    from support.golden import Golden

    return Golden()


@pytest.fixture(autouse=True, scope="session")
def quick_compilations():
    """`make test` compiles C with -O0, but where a test is of that code; `make test-all` as users
    do."""
    from support.c_flags import optimize
    from support.scope import WHOLE

    with pytest.MonkeyPatch.context() as patch:
        if not WHOLE:
            optimize(patch, "-O0")
        yield


@pytest.fixture(params=["numpy", "c"])
def executor(request, monkeypatch) -> Executor:
    """Each executor of the CPU in turn, C kernels compiled with -O0; a module about one executor
    has a fixture of its own under this name."""
    if request.param == "numpy":
        from tracejit.runtime.numpy_executor import NumpyExecutor

        return NumpyExecutor()
    from support.c_flags import optimize
    from tracejit.errors import BackendUnavailable
    from tracejit.runtime import c_compiler
    from tracejit.runtime.c_executor import CExecutor

    try:
        c_compiler.find_compiler()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    optimize(monkeypatch, "-O0")
    return CExecutor(2)


@pytest.fixture
def plans(executor: Executor) -> PlanChecks:
    """Checks of plans that the executor runs."""
    from support.plan_checks import PlanChecks

    return PlanChecks(executor)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Thousands of collected tests are no part of a user's heap: gc, which aborts of a trace use to
    find what holds an intermediate, does not look at them again. Nor at the objects of Dynamo,
    which some of torch's eager functions import."""
    if len(session.items) > 200:
        import torch._dynamo  # noqa: F401
    _settle()


@pytest.fixture(autouse=True, scope="module")
def heap_of_one_module():
    """What the tests of a module leave behind, kernels and plans in caches, is no part of the heap
    of the next: gc would look at it again and again."""
    yield
    _settle()


def _settle() -> None:
    gc.collect()
    gc.freeze()
