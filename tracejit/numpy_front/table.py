"""The table of what the front end has rules for, as Markdown (docs/numpy.md).

`python -m tracejit.numpy_front.table` prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from tracejit.numpy_front.array import METHODS, OPERATORS
from tracejit.numpy_front.functions import FUNCTIONS
from tracejit.numpy_front.reductions import INSTEAD
from tracejit.numpy_front.ufuncs import UFUNCS

START, END = "<!-- table -->\n", "<!-- end of table -->\n"


def names(functions: Iterable[Callable]) -> list[str]:
    """What numpy calls functions, each by its own name."""
    found = set()
    for function in functions:
        name = function.__name__
        modules = {"np": np, "np.linalg": np.linalg}
        modules["np.lib.stride_tricks"] = np.lib.stride_tricks
        at = [module for module, of in modules.items() if getattr(of, name, None) is function]
        found.add(f"{(at or ['np'])[0]}.{name}")
    return sorted(found)


def markdown() -> str:
    """The table."""
    rows = {
        "element-wise": names([*UFUNCS, np.matmul]),
        "of arrays": names(FUNCTIONS),
        "that make arrays": names(INSTEAD),
        "methods of these": ["np.add.at", "np.subtract.at"],
        "methods": sorted(METHODS),
        "operators, also reflected and in place": [f"__{name}__" for name in OPERATORS],
    }
    lines = ["| | |", "|---|---|"]
    lines += [f"| {what} | {', '.join(f'`{x}`' for x in of)} |" for what, of in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
