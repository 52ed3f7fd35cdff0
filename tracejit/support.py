"""What a compiled step supports and what it refuses, as Markdown (docs/operations.md).

The functions come from the table of capture rules, the refusals from `capture/`, its tables and the
source where they are raised, dtypes and gradients from support.tsv, which the tests keep true.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import torch

from tracejit.capture import functions
from tracejit.capture.python import patches
from tracejit.capture.trace import tensor
from tracejit.capture.trace.table import RULES, Row, Rule, function_name
from tracejit.records import dataclass

HERE = Path(__file__).parent
FACTS = HERE / "support.tsv"


@dataclass(frozen=True)
class Operation:
    """One rule: its family (a module of capture/functions) and the torch functions that it serves.

    `dtypes` and `gradient` ("no", "yes", "twice": its gradient is tested as well) are None where a
    function computes nothing of which that could be said.
    """

    family: str
    functions: tuple[Callable, ...]
    dtypes: str | None = None
    gradient: str | None = None

    @property
    def name(self) -> str:
        """The first of its names that was registered: torch's own before the methods'."""
        return min((public_name(f) for f in self.functions), key=rank)

    @property
    def reads_values(self) -> bool:
        """Whether it gives Python the values of a tensor."""
        return self.family == "values"

    @property
    def row(self) -> Row | None:
        """Its formulas, if it is element-wise."""
        return RULES[self.functions[0]].row

    @property
    def names(self) -> str:
        """All of its names, those of one namespace together."""
        spaces: dict[str, list[str]] = {}
        for function in self.functions:
            space, _, bare = public_name(function).rpartition(".")
            if bare not in spaces.setdefault(space, []):
                spaces[space].append(bare)
        ordered = sorted(spaces.items(), key=lambda item: (item[0] == "Tensor", item[0]))
        return "; ".join(f"{space}: {' '.join(bare)}" for space, bare in ordered)


@cache
def _public() -> dict[Callable, str]:
    """What torch's public namespaces call their functions."""
    found: dict[Callable, str] = {}
    for space in (torch, torch.linalg, torch.special, torch.nn.functional):
        for name, value in vars(space).items():
            if callable(value) and not isinstance(value, type):
                found.setdefault(value, f"{space.__name__}.{name}")
    return found


def public_name(function: Callable) -> str:
    """A function as a user writes it; of an attribute's getter, the attribute."""
    return _public().get(function) or function_name(function)


def rank(name: str) -> tuple:
    """Orders names: torch's before methods, plain ones before operators and in-place forms."""
    return not name.startswith("torch."), "__" in name, name.endswith("_")


@cache
def operations() -> tuple[Operation, ...]:
    """All of them, by family and name."""
    by_rule: dict[Rule, list[Callable]] = {}
    for function, rule in RULES.items():
        by_rule.setdefault(rule.own, []).append(function)
    facts = {}
    for line in FACTS.read_text().splitlines():
        name, dtypes, gradient = line.split("\t")
        facts[name] = {"dtypes": dtypes, "gradient": gradient}
    by_name: dict[str, Operation] = {}
    for rule, served in by_rule.items():
        found = Operation(rule.family, tuple(served))
        same = by_name.get(found.name)  # as of an attribute's getter and setter
        by_name[found.name] = (
            found if same is None else replace(same, functions=same.functions + found.functions)
        )
    found = [replace(o, **facts.get(name, {})) for name, o in by_name.items()]
    return tuple(sorted(found, key=lambda o: (o.family, o.name.startswith("Tensor"), o.name)))


# --- refusals ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """One place in capture/ that raises a refusal: its module and function, and the error's text,
    with {…} where values are filled in."""

    module: str
    function: str
    text: str


@cache
def refusals() -> tuple[Refusal, ...]:
    """All that `capture/` refuses though eager has it, in the order of the source.

    Where a refusal is raised, its text stands in the source; the others are tables.
    """
    found = []
    for path in sorted((HERE / "capture").rglob("*.py")):
        for function, text in _raised(ast.parse(path.read_text()), ""):
            found.append(Refusal(path.stem, function, text))
    for owner, _, remedy in patches.REFUSED:
        found.append(Refusal("patches", owner.__name__.rpartition(".")[2], remedy))
    for text in tensor.PROBLEMS.values():
        said = re.sub(r"{\w+}", "{…}", text)
        found.append(Refusal("tensor", "an input", said[0].upper() + said[1:]))
    return tuple(dict.fromkeys(found))


def _raised(tree: ast.AST, function: str) -> Iterator[tuple[str, str]]:
    """Calls of `unsupported(remedy)`, and of an error class by keyword, with texts of their own."""
    for node in ast.iter_child_nodes(tree):
        name = node.name if isinstance(node, ast.FunctionDef) else function
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = called or getattr(node.func, "id", "")
            given = {k.arg: _text(k.value) for k in node.keywords}
            if called == "unsupported" and node.args and _text(node.args[0]):
                yield function, _text(node.args[0])
            if called in ("SideEffectError", "ValueDependentError", "UnsupportedOperation"):
                parts = [given.get(k) for k in ("reason", "remedy")]
                if any(parts):
                    yield function, ". ".join(p[0].upper() + p[1:] for p in parts if p)
        yield from _raised(node, name)


def _text(tree: ast.expr) -> str | None:
    """A string as the source has it; what is filled in becomes {…}."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        return tree.value
    if isinstance(tree, ast.JoinedStr):
        return "".join(p.value if isinstance(p, ast.Constant) else "{…}" for p in tree.values)
    return None


# --- text -------------------------------------------------------------------------------------

HEAD = """\
# What a compiled step supports

Written by `python -m tracejit ops`; `make accept` renews it.

**dtypes**: of the first tensor, where eager takes them on a CPU too and gives equal results;
*floats* are f64, f32, f16, bf16, *ints* i64, i32, i16, i8, u8. **gradient**: *twice* where the
second derivative is tested too.

A call that cannot be compiled is not lost: by default it runs eagerly, as the plain function, from
the state before it, with one warning for each cause. With `on_unsupported="raise"` (or
`TRACEJIT_ON_UNSUPPORTED=raise`, or `mode="replay"`) it raises. What eager rejects raises the same
class of error either way. See supported.md."""

REFUSED_HEAD = """\
## What is refused

A torch function that is not listed above is refused with `UnsupportedOperation`, which names the
function, the shapes and the user's line: rewrite it with listed functions, or move it out of the
step. Until then the call runs eagerly. Of what is listed, these uses are refused, with this
advice:"""

VALUES = """\
### Values

These give Python the values of a tensor. What they need is computed when they are called, and the
trace goes on. A number that is only returned is read after the plan; one that Python decides by, or
computes with, before the rest of it; text, lists and arrays keep the step in rerun."""


def markdown() -> str:
    """All operations by family, and all refusals."""
    lines = [HEAD]
    public = [o for o in operations() if not (o.reads_values or o.name.startswith("torch._"))]
    for family in dict.fromkeys(o.family for o in public):
        title = import_module(f"{functions.__name__}.{family}").__doc__.splitlines()[0]
        lines += ["", f"## {family}", "", title, ""]
        lines += ["| function | dtypes | gradient |", "| --- | --- | --- |"]
        for o in public:
            if o.family == family:
                cells = (o.names.replace("|", "\\|"), o.dtypes or "", o.gradient or "")
                lines.append("| " + " | ".join(cells) + " |")
    private = sorted(o.name for o in operations() if o.name.startswith("torch._"))
    lines += ["", "## Functions that torch itself calls", "", " ".join(f"`{n}`" for n in private)]
    lines += ["", REFUSED_HEAD, ""]
    for refusal in refusals():
        lines.append(f"- `{refusal.module}.{refusal.function}`: {refusal.text}")
    lines += ["", VALUES, ""]
    lines += [" ".join(f"`{o.names}`" for o in operations() if o.reads_values)]
    return "\n".join(lines) + "\n"
