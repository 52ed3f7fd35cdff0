"""docs/errors.md: an entry for each class of error and warning, made from the class itself.

A class says what it means (the first words of its docstring), what it is besides (its bases), how
its message begins (its template) and what to do (`advice`). The programs are docs/errors/CLASS.py,
and CLASS_kind.py where there are several kinds; they are run, and the page quotes what they raise.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import tracejit
from tracejit import errors
from tracejit.errors import OF_EAGER, TracejitError, TracejitWarning

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"
PROGRAMS = ROOT / "docs" / "errors"
HEAD = """\
# Errors and warnings

What each class means, a smallest program that raises it, what the message says, and what to do. All
derive from `tracejit.errors.TracejitError`; those that mirror an error of eager PyTorch derive from
its class too, so `except RuntimeError` around a step goes on working. A message quotes your line of
code with carets under the call, where the source is there and is what was compiled.

What a step may not do is refused by an `UnsupportedOperation`; [operations.md](operations.md) ends
with the list of these, each with its remedy. By default a refused call runs eagerly, with one
`TracejitWarning`; the programs ask for the error by `on_unsupported="raise"` where that makes the
difference.

The page is generated from the classes (`make accept`), and `tests/test_errors.py` runs the programs
(`docs/errors/`)."""
_SHOWN = 6  # lines of a message that are shown in full
_VARYING = (  # what differs between machines and runs, and what is shown instead
    (re.compile(r"(?<![\w/.])/[^\s:()']*/(?=[\w.]+)"), ""),  # folders
    (re.compile(r"\b\d\.\d+e[-+]\d+"), "…"),  # norms
    (re.compile(r"(?<=plan )[0-9a-f]{12}\b|(?<=step_)[0-9a-f]{12}\b"), "…"),  # digests
    (re.compile(r"(?<=_)[0-9a-f]{8}\b"), "…"),
    (re.compile(r"(?<=Make room in )/[^ ,]*"), "…"),  # where temporary files are
    (re.compile(r"(?<=cc )-O\d .*(?= ended with)"), "…"),  # a compiler's options
)


def classes() -> list[type]:
    """All classes of errors in the package, those of `errors.py` first, and the warning."""
    for module in pkgutil.walk_packages(tracejit.__path__, "tracejit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, pending = [], [TracejitError]
    while pending:
        below = pending.pop().__subclasses__()
        found += [kind for kind in below if kind not in found]
        pending += below
    found = [kind for kind in found if kind.__module__.startswith("tracejit.")]
    own = list(vars(errors).values())
    first = sorted((k for k in found if k in own), key=own.index)
    rest = sorted((k for k in found if k not in own), key=lambda kind: kind.__name__)
    return [*first, *rest, TracejitWarning]


def programs(kind: type) -> list[Path]:
    """The programs of a class."""
    return sorted(p for p in PROGRAMS.glob("*.py") if p.stem.partition("_")[0] == kind.__name__)


def raised(path: Path, folder: Path) -> str:
    """What a program raises or warns of, in a process of its own: `Class: message`."""
    code = (
        "import runpy, sys, warnings\n"
        "caught = warnings.catch_warnings(record=True)\n"
        "said = caught.__enter__()\n"
        "warnings.simplefilter('always')\n"
        "try:\n"
        f"    runpy.run_path({str(path)!r}, run_name='__main__')\n"
        "except BaseException as error:\n"
        "    found = error\n"
        "else:\n"
        "    from tracejit.errors import TracejitWarning\n"
        "    found = [w.message for w in said if isinstance(w.message, TracejitWarning)][-1]\n"
        "print('\\0' + type(found).__name__ + ': ' + str(found) + '\\0')\n"
    )
    environment = os.environ | {"TRACEJIT_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    environment.pop("TRACEJIT_ON_UNSUPPORTED", None)
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=300,
    )
    parts = done.stdout.split("\0")
    assert len(parts) == 3, done.stdout + done.stderr
    return parts[1]


def shown(said: str) -> str:
    """A message as the page has it: without what differs between machines."""
    for pattern, other in _VARYING:
        said = pattern.sub(other, said)
    lines = said.splitlines()
    if len(lines) > _SHOWN:
        kind, what, _ = lines[0].split(": ", 2)
        lines = [f"{kind}: {what}: …", "…", lines[-1]]
    return "\n".join(lines)


def meaning(kind: type) -> str:
    """The docstring of a class, as one paragraph."""
    return " ".join(inspect.getdoc(kind).split())


def entry(kind: type, said: dict[str, str]) -> str:
    """The entry of a class; `said` has what each program raises."""
    of = [b.__name__ for b in kind.__bases__ if b is not TracejitError]
    kinds = " and ".join(f"`{name}`" for name in of)
    said_of_eager = "eager" in meaning(kind).lower()
    eager = " Eager raises it too." if issubclass(kind, OF_EAGER) and not said_of_eager else ""
    lines = [
        f"## {kind.__name__}",
        "",
        meaning(kind) + eager + (f" Derives from {kinds}." if of else ""),
    ]
    for path in programs(kind):
        variant = path.stem.partition("_")[2].replace("_", " ")
        lines += ["", f"When it {variant}:"] if kind is TracejitWarning else []
        lines += ["", "```python", path.read_text().rstrip(), "```"]
        lines += ["", "```text", said[path.stem], "```"]
    return "\n".join([*lines, "", f"What to do: {kind.advice}"])


def page(said: dict[str, str]) -> str:
    """The whole page."""
    return "\n\n".join([HEAD, *(entry(kind, said) for kind in classes())]) + "\n"


def quoted_on_the_page() -> dict[str, str]:
    """What the page says that each program raises."""
    blocks = re.findall(r"```python\n(.*?)\n```\n\n```text\n(.*?)\n```", PAGE.read_text(), re.S)
    texts = {path.read_text().rstrip(): path.stem for path in PROGRAMS.glob("*.py")}
    return {texts[program]: said for program, said in blocks if program in texts}
