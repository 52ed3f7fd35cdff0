"""Foreach launches in Triton's interpreter, programs in shuffled order, against eager."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("interprets, so it needs TRITON_INTERPRET=1", allow_module_level=True)

import tracejit
from support.foreach_steps import OPTIMIZERS, SIZES, Updates, close
from tracejit.codegen import triton_foreach

pytestmark = pytest.mark.interpret

BF16 = torch.bfloat16


def check(name: str, calls: int = 3, **options: object) -> None:
    """The compiled step does what eager does."""
    ours, eager = Updates(name, **options), Updates(name, **options)
    compiled = tracejit.compile(ours.step, backend="interpret", on_unsupported="raise")
    for _ in range(calls):
        compiled()
        eager.step()
    assert any(launch.kernel.foreach for launch in compiled.plans[-1].launches)
    assert close(ours.tensors, eager.tensors)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_odd_sizes(name, offset):
    check(name, offset=offset)


@pytest.mark.parametrize("foreach", [False, True])
def test_clipped(foreach):
    check("AdamW", clip=0.5, foreach=foreach, offset=3)


def test_two_dtypes():
    sizes = [*SIZES, *SIZES[::-1]]
    check("Adam", sizes=sizes, dtypes=(torch.float32, BF16), clip=0.5)


def test_half_types_that_are_not_aligned():
    check("SGD", dtypes=(BF16,), offset=1)


def test_200_tensors():
    check("Adam", calls=1, sizes=[*range(3, 203)])


def test_large_tensors(monkeypatch):
    """Several tiles a chunk, and several chunks folded."""
    monkeypatch.setattr(triton_foreach, "MANY", 8)
    check("SGD", calls=2, sizes=[100_003, 22_000, *[9] * 7], clip=0.5)
