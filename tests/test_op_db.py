"""torch's own database of operators through a compiled step: each passes as it did, none is wrong.

`tests/golden/op_db.tsv` says what becomes of each entry: pass, refused (by an error of ours), or
none (eager has no result for its samples that can be compared). TRACEJIT_ACCEPT=1 rewrites it.
"""

from __future__ import annotations

import os

import pytest

from support.golden import FOLDER
from support.op_db import DTYPES, Outcome, operators, outcome_of

pytest.importorskip("expecttest", reason="torch's database of operators imports expecttest")

TABLE = FOLDER / "op_db.tsv"
ACCEPTING = os.environ.get("TRACEJIT_ACCEPT") == "1"
GOAL = 480  # entries that pass


def listed() -> dict[str, str]:
    rows = TABLE.read_text().splitlines() if TABLE.exists() else []
    return dict(row.split("\t") for row in rows)


LISTED = listed()


@pytest.mark.sweep(24)
@pytest.mark.parametrize("name", LISTED)
def test_operator(name: str):
    """The samples of an entry give what eager gives, with gradients, or are refused as listed."""
    found = outcome_of(operators()[name])
    assert found.kind == LISTED[name], found.reason


def test_none_is_wrong():
    """What is listed: `make accept` cannot make a wrong result or a foreign error a known one."""
    kinds = list(LISTED.values())
    assert set(kinds) <= {"pass", "refused", "none"}
    assert kinds.count("pass") >= GOAL


@pytest.mark.slow
def test_golden_operators():
    """The table lists each entry that torch ships, and is rewritten when accepting."""
    entries = operators()
    if not ACCEPTING:
        assert list(LISTED) == sorted(entries)
        return
    found: dict[str, Outcome] = {name: outcome_of(entries[name]) for name in sorted(entries)}
    bad = {name: o for name, o in found.items() if o.kind in ("wrong", "error")}
    assert not bad, bad
    lost = [n for n, o in found.items() if LISTED.get(n) == "pass" and o.kind != "pass"]
    assert not lost, f"passed before: {lost}"
    TABLE.write_text("".join(f"{name}\t{o.kind}\n" for name, o in found.items()))


def test_another_result_is_noticed():
    """A function that is off by a little, or laid out otherwise, is wrong."""
    import torch

    from support.op_db import Case, difference, outcome

    x = torch.linspace(-1, 1, 12, requires_grad=True).reshape(3, 4).detach().requires_grad_()
    calls = []

    def off(y: torch.Tensor) -> torch.Tensor:
        calls.append(y)
        return y * (1.0 if len(calls) % 2 else 1.001)

    assert outcome(Case(off, (x,), {}), backend="numpy").kind == "wrong"
    assert outcome(Case(torch.exp, (x,), {}), backend="numpy").kind == "pass"
    assert "strides" in difference(x.t().contiguous(), x.t(), strides=True)
    assert "dtype" in difference(x, x.double()) and "shape" in difference(x, x[:2])
    assert "structure" in difference((x,), [x, x]) and not difference([x], [x.clone()])
    assert DTYPES[0] is torch.float32
