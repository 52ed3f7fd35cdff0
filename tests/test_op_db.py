"""torch's own databases of operators, modules and optimizers through a compiled step: each entry
passes as it did, none is wrong.

`tests/golden/op_db.tsv` says what becomes of each operator, `op_db_dtypes.tsv` of its samples in
float64, bfloat16, int64 and bool, `module_db.tsv` of each module: pass, refused (by an error of
ours), or none (eager has no result for its samples that can be compared). TRACEJIT_ACCEPT=1
rewrites them. `optimizer_db.tsv` says of each setting of an optimizer whether its trainings are
replayed, or its Python is run in each call (rerun); SparseAdam, whose gradients are sparse, is
none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import FunctionType

import pytest
import torch

from support.golden import FOLDER
from support.op_db import (
    DTYPES,
    FURTHER,
    modules,
    operators,
    outcome_of,
    outcome_of_module,
)
from support.optimizer_db import optimizers, settings
from support.optimizer_db import outcome_of as outcome_of_setting

pytest.importorskip("expecttest", reason="torch's database of operators imports expecttest")

ACCEPTING = os.environ.get("TRACEJIT_ACCEPT") == "1"


def listed(name: str) -> dict[str, str]:
    """What a table says of each entry."""
    path = FOLDER / name
    rows = path.read_text().splitlines() if path.exists() else []
    return dict(row.split("\t", 1) for row in rows)


OPERATORS, MODULES = listed("op_db.tsv"), listed("module_db.tsv")
FURTHER_OF = {name: kinds.split() for name, kinds in listed("op_db_dtypes.tsv").items()}
OPTIMIZERS = listed("optimizer_db.tsv")


@pytest.mark.sweep(48)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str):
    """The samples of an entry give what eager gives, with gradients, or are refused as listed."""
    found = outcome_of(operators()[name])
    assert found.kind == OPERATORS[name], found.reason


@pytest.mark.sweep(24)
@pytest.mark.parametrize("name", MODULES)
def test_module(name: str):
    """So do those of a module, in training and not, with the gradients of its parameters."""
    found = outcome_of_module(modules()[name])
    assert found.kind == MODULES[name], found.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", FURTHER_OF)
def test_operator_in_further_dtypes(name: str):
    """So do samples of other dtypes: where an entry has one, each is as listed."""
    entry = operators()[name]
    found = [outcome_of(entry, dtype=dtype) for dtype in FURTHER]
    assert [o.kind for o in found] == FURTHER_OF[name], [o.reason for o in found]


@pytest.mark.sweep(16)
@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind != "none"])
def test_optimizer(name: str):
    """A setting of an optimizer trains as eager does, in lockstep, without a fallback."""
    optimizer, _, how = name.partition(": ")
    found = outcome_of_setting(dict(settings(optimizers()[optimizer]))[how], "numpy")
    assert found.kind == OPTIMIZERS[name], found.reason


def test_golden_optimizers():
    """The table lists each optimizer and setting that torch ships; all but sparse ones train, and
    all are replayed whose steps do not branch on values."""
    found = [f"{name}: {how}" for name, entry in optimizers().items() for how, _ in settings(entry)]
    assert [name for name, kind in OPTIMIZERS.items() if kind != "none"] == found
    assert {name for name, kind in OPTIMIZERS.items() if kind == "none"} == {"SparseAdam"}
    assert {name.partition(":")[0] for name, k in OPTIMIZERS.items() if k == "rerun"} == {"LBFGS"}
    assert set(OPTIMIZERS.values()) == {"replay", "rerun", "none"}


@pytest.mark.parametrize(
    ("table", "least"), [(OPERATORS, 626), (MODULES, 110), (listed("op_db_dtypes.tsv"), 1830)]
)
def test_none_is_wrong(table: dict[str, str], least: int):
    """What is listed: `make accept` cannot make a wrong result or a foreign error a known one."""
    kinds = [kind for row in table.values() for kind in row.split()]
    assert set(kinds) <= {"pass", "refused", "none"}
    assert kinds.count("pass") >= least


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "entries", "run"),
    [("op_db.tsv", operators, outcome_of), ("module_db.tsv", modules, outcome_of_module)],
)
def test_golden_databases(name: str, entries: Callable, run: Callable):
    """The tables list each entry that torch ships, and are rewritten when accepting."""
    found, before = entries(), listed(name)
    if not ACCEPTING:
        assert list(before) == sorted(found)
        return
    outcomes = {entry: run(found[entry]) for entry in sorted(found)}
    bad = {entry: o for entry, o in outcomes.items() if o.kind in ("wrong", "error")}
    assert not bad, bad
    lost = [n for n, o in outcomes.items() if before.get(n) == "pass" and o.kind != "pass"]
    assert not lost, f"passed before: {lost}"
    (FOLDER / name).write_text("".join(f"{n}\t{o.kind}\n" for n, o in outcomes.items()))


@pytest.mark.slow
def test_golden_dtypes():
    """The table of further dtypes lists each entry too, and is rewritten when accepting."""
    entries = operators()
    if not ACCEPTING:
        assert list(FURTHER_OF) == sorted(entries)
        return
    rows = []
    for name in sorted(entries):
        found = [outcome_of(entries[name], dtype=dtype) for dtype in FURTHER]
        assert not {o.kind for o in found} & {"wrong", "error"}, (name, found)
        rows.append("\t".join([name, *(o.kind for o in found)]))
    (FOLDER / "op_db_dtypes.tsv").write_text("\n".join(rows) + "\n")


def test_another_result_is_noticed():
    """A function that is off by a little, or laid out otherwise, is wrong."""
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


def test_torch_is_as_before():
    """Importing the databases leaves no trace in torch, by which other tests would go."""
    operators(), modules()
    for kind in (torch._C.ScriptFunction, torch._C.ScriptMethod):
        assert not isinstance(kind.__call__, FunctionType)
    assert torch.backends.__allow_nonbracketed_mutation_flag
