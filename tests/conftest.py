"""What all tests share: verified passes, caches of their own, skips with a reason, golden files."""

from __future__ import annotations

import difflib
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"

_caches = tempfile.TemporaryDirectory(prefix="tracejit-tests-")
os.environ["TRACEJIT_VERIFY"] = "1"
os.environ["TRACEJIT_CACHE"] = f"{_caches.name}/tracejit"
os.environ["TRITON_CACHE_DIR"] = f"{_caches.name}/triton"


def pytest_unconfigure(config: pytest.Config) -> None:
    _caches.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("interpret") and not interpreting:
            item.add_marker(pytest.mark.skip(reason="runs with TRITON_INTERPRET=1 only"))
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def golden() -> Iterator[Callable[[str, str], None]]:
    """`golden(name, text)` compares with tests/golden/<name>; TRACEJIT_ACCEPT=1 rewrites it."""

    def check(name: str, text: str) -> None:
        path, text = GOLDEN / name, text.rstrip("\n") + "\n"
        if os.environ.get("TRACEJIT_ACCEPT") == "1":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"{path} does not exist; `make accept` writes it"
        rows = difflib.unified_diff(
            path.read_text().splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm=""
        )
        diff = "\n".join(rows)
        assert not diff, f"{diff}\n`make accept` rewrites the file once this is what is wanted"

    yield check


def pytest_collection_finish(session: pytest.Session) -> None:
    """Thousands of collected tests are no part of a user's heap: gc, which aborts of a trace use to
    find what holds an intermediate, does not look at them again. Nor at the objects of Dynamo,
    which some of torch's eager functions import."""
    if len(session.items) > 200:
        import torch._dynamo  # noqa: F401
    gc.collect()
    gc.freeze()
