"""A random program as data and as the runnable Python text that a failure prints."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from inspect import getsource

import torch


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(seed, high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


PREAMBLE = "\n".join(
    ["import torch\nimport torch.nn.functional as F\n\n", getsource(randn), "", getsource(integers)]
)


@dataclass(frozen=True)
class Program:
    """A step with the tensors it is called on; `str` is its runnable text."""

    dtype: torch.dtype  # the narrowest floating-point dtype in it
    args: tuple[str, ...]  # `name = expression`, in order
    body: tuple[str, ...]
    returns: tuple[str, ...]
    outside: bool = False  # whether backward is called on what it returned

    def __str__(self) -> str:
        names = [line.split(" = ")[0] for line in self.args]
        make = [*self.args, f"return [{', '.join(names)}]"]
        body = [*self.body, f"return {', '.join(self.returns) or 'None'}"]
        return (
            PREAMBLE
            + "\n\ndef make_args(cast):\n    "
            + "\n    ".join(make)
            + f"\n\n\ndef step({', '.join(names)}):\n    "
            + "\n    ".join(body)
            + "\n"
        )

    def without(self, line: str) -> Program | None:
        """The program without one statement, argument or result, and all that needs it."""
        if line in self.returns:
            return replace(self, returns=tuple(r for r in self.returns if r != line))
        gone = defined(line)
        args, body = [], []
        for kept, lines in ((args, self.args), (body, self.body)):
            for other in lines:
                if other == line or gone & set(re.findall(r"\w+", other)):
                    gone |= defined(other)
                else:
                    kept.append(other)
        if len(args) + len(body) == len(self.args) + len(self.body):
            return None
        returns = tuple(r for r in self.returns if r not in gone)
        return replace(self, args=tuple(args), body=tuple(body), returns=returns)


def defined(line: str) -> set[str]:
    """The names that a statement binds."""
    match = re.match(r"(?:with .*:\n\s+)?([\w, ]+?),? = ", line)
    return set(re.split(r",\s*", match[1])) if match else set()
