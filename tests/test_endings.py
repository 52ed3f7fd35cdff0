"""The table of how adversarial cases end: that it is whole, and large enough."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from support.endings import ENDINGS, endings

HERE = Path(__file__).parent
# modules whose cases are about values, branches and Python state
OF_STATE = ("adversarial_values", "adversarial_state", "python_state", "python_places", "looked_up")


def test_the_table_is_large_enough():
    table = endings()
    assert len(table) >= 300 and set(table.values()) == set(ENDINGS)
    assert sum(module in OF_STATE for module, _ in table) >= 80
    replayed = sum(ending.startswith("replay") for ending in table.values())
    assert replayed >= 0.85 * len(table), Counter(table.values())


def test_each_row_is_of_a_case():
    modules = {module for module, _ in endings()}
    sources = {module: (HERE / f"test_{module}.py").read_text() for module in modules}
    gone = [
        f"{module}: {name}"
        for module, name in endings()
        if not re.search(rf'def {name}\(|"{name}"', sources[module])
    ]
    assert not gone, gone
