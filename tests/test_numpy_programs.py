"""Programs over numpy arrays as people write them: equal to numpy in each call."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import tracejit
from support.numpy_programs import PROGRAMS

CALLS = 8
# why some calls run as the plain function, or are never replayed
SLOW = {
    "gradcheck": "np.nditer has no rule",
    "qlearn": "it returns places that Python reads",
    "word2vec": "it makes an array of Python's numbers",
}


def same(ours: object, theirs: object, at: str) -> None:
    assert type(ours) is type(theirs), at
    if isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs), at
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            same(a, b, f"{at}[{k}]")
        return
    if isinstance(theirs, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), at
    np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-10, err_msg=at)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program(name):
    """What it returns, what it was given, and what it changes."""
    (step, args, state), (plain, args_of_plain, state_of_plain) = PROGRAMS[name](), PROGRAMS[name]()
    fast = tracejit.compile(step, backend="numpy", on_unsupported="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(CALLS):
            given, theirs = args(i), args_of_plain(i)
            same(fast(*given), plain(*theirs), f"call {i}")
            same(given, theirs, f"arguments of call {i}")
            same(state(), state_of_plain(), f"state after call {i}")
    assert (fast.stats.replays > 0 and not fast.stats.eager) or name in SLOW
