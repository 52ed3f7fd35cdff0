"""An ejected step's kernels in Triton: their source, with what of `kernels/` they call, and the
launches."""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from tracejit import kernels as library
from tracejit.export.eject_text import WIDE
from tracejit.ir.torch_types import TO_TORCH
from tracejit.kernels.costs import SMS
from tracejit.runtime.program import Program
from tracejit.runtime.triton_executor import TritonExecutor
from tracejit.runtime.triton_launch import LoadedLaunch, positions

_LIBDEVICE = "from triton.language.extra import libdevice"

_TEXT = '''
# What numerics need: no fused multiplications and additions, no flushing to zero.
OPTIONS = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
if environ.get("TRITON_INTERPRET") == "1":  # it takes no options
    OPTIONS = {}

# --- what kernels have in common


<<library>>


# --- the kernels, in the order of their first launches


<<sources>>


def part(tensor, offset, dtype):
    """The memory of a tensor from some bytes on."""
    return tensor.view(-1).view(torch.uint8)[offset:].view(dtype)
'''


class TritonKernels:
    """The kernels of programs of a Triton executor; see `eject_call.Kernels`."""

    needs = " and Triton, and a GPU (on the CPU: TRITON_INTERPRET=1)"
    imports = ("from os import environ",)
    begin = ()

    def __init__(self, programs: Sequence[Program], device: str):
        self._apart = {id(program): _apart(program) for program in programs}
        self.launched = [launch for found, _ in self._apart.values() for launch in found]
        self.sources: dict[str, str] = {}  # the name of each kernel's function, by its text
        for launch in self.launched:
            self.sources.setdefault(launch.source.text, f"kernel{len(self.sources)}")
        self.helpers, self.text = self._text()
        uses = "libdevice." in self.text
        self.others = ("import triton", "import triton.language as tl", *[_LIBDEVICE] * uses)
        on = "" if device == "cpu" else f', device="{device}"'
        self.on = on
        self.space = max(
            (one.workspace + one.geometry.workspace for one in self.launched), default=0
        )
        arena = max(8, *(program.arena_bytes for program in programs))
        self.fields = (f"self.work = torch.empty({arena}, dtype=torch.uint8{on})",)
        if self.space:
            zeros = f"self.space = torch.zeros({self.space}, dtype=torch.int8{on})"
            self.fields += (f"{zeros}  # partial sums and counters",)

    # ---- sources

    def _text(self) -> tuple[str, str]:
        """The functions of the library that are used, and all of the text."""
        needed: dict[str, str] = {}
        sources = []
        for text, name in self.sources.items():
            own = _functions(text)
            names = {f: f"{f}_{name}" for f in own[:-1]} | {own[-1]: name}
            imported = _imported(text)
            body = _renamed(_without_imports(text), names | imported)
            _need(sorted(set(imported.values()) & _words(body)), needed)
            _need(sorted(_words(body) & _library().keys()), needed)
            sources.append(body.strip())
        ordered = [needed[name] for name in _library() if name in needed]
        parts = {"library": "\n\n\n".join(ordered), "sources": "\n\n\n".join(sources)}
        found = _TEXT.strip()
        for name, value in parts.items():
            found = found.replace(f"<<{name}>>", value)
        return parts["library"], found

    # ---- launches

    def launches(
        self, program: Program, at: dict[str, str], scalars: Sequence[str]
    ) -> Iterator[str]:
        """The launches of a program, in their order."""
        plan = program.loaded.plan
        buffers, places = plan.buffers, program.loaded.layout.places
        launched, slots = self._apart[id(program)]
        if slots:
            numbers = ", ".join(scalars[slot] for slot in slots)
            yield f"table = torch.tensor([{numbers}], dtype=torch.float64{self.on})"

        def pointer(i: int) -> str:
            b = buffers[i]
            place = places.get(i)
            if place is None:
                return at[b.name]
            room = "self.work" if place.room is None else at[buffers[place.room].name]
            return f"part({room}, {place.offset}, {TO_TORCH[b.type.dtype]})"

        for launch in launched:
            given = [pointer(i) for i in launch.buffers]
            if launch.source.kernel.scalars:
                first = launch.first_scalar
                given.append(f"table[{first}:]" if first else "table")
            if launch.geometry.workspace:
                given.append(
                    f"self.space[{launch.workspace}:]" if launch.workspace else "self.space"
                )
            given += [f"{name}={value}" for name, value in launch.constants.items()]
            given.append(f"num_warps={launch.geometry.num_warps}")
            given.append(f"num_stages={launch.geometry.num_stages}")
            given.append("**OPTIONS")
            grid = ", ".join(map(str, launch.geometry.grid))
            head = f"{self.sources[launch.source.text]}[({grid},)]("
            line = f"{head}{', '.join(given)})"
            if len(line) + 8 <= WIDE:
                yield line
            else:
                yield from (head, *(f"    {x}," for x in given[:-1]), f"    {given[-1]},", ")")


# ---- the library


def _apart(program: Program) -> tuple[list[LoadedLaunch], list[int]]:
    """The launches of a program, and the slots of their scalars in order. Rows of a foreach are
    launched one by one: whoever reads the file need not know of tables of addresses. Sums are then
    folded in other places."""
    loaded, executor = program.loaded, TritonExecutor("triton")
    where, workspace = positions(loaded.plan), 0
    found: list[LoadedLaunch] = []
    slots: list[int] = []
    for launch in loaded.launched:
        rows = [launch]
        if launch.launch.kernel.foreach:
            rows = [executor.load_launch(x, where, 0, SMS) for x in launch.launch.alone()]
        for one in rows:
            if one.geometry.grid[0]:
                found.append(replace(one, first_scalar=len(slots), workspace=workspace))
                slots += one.launch.scalars
                workspace += -(-one.geometry.workspace // 16) * 16
    return found, slots


@cache
def _library() -> dict[str, tuple[str, frozenset[str]]]:
    """The functions and constants of `kernels/`: their text under the names that they have in a
    file, and the names that it uses."""
    texts: dict[str, str] = {}
    for path in sorted(Path(library.__path__[0]).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "import triton" not in text:
            continue
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                texts[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                texts[node.targets[0].id] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    names = {name: f"tj_{name}" for name in texts}
    found = {}
    for name, text in texts.items():
        body = _renamed(text, names)
        found[names[name]] = body, frozenset(_words(body) & set(names.values()))
    return found


def _need(names: Sequence[str], found: dict[str, str]) -> None:
    """Add what these need of the library, and what that needs."""
    for name in names:
        if name not in found:
            text, used = _library()[name]
            found[name] = text
            _need(sorted(used), found)


def _imported(text: str) -> dict[str, str]:
    """The names that a source imports from the library one by one, and what they are in a file."""
    found: dict[str, str] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tracejit.kernels."):
            found |= {a.asname or a.name: f"tj_{a.name}" for a in node.names}
    return found


def _without_imports(text: str) -> str:
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for k in range(node.lineno - 1, node.end_lineno):
                lines[k] = ""
    return "\n".join(lines)


def _functions(text: str) -> list[str]:
    """The functions of a source; the kernel is the last one."""
    return [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))


def _renamed(text: str, names: dict[str, str]) -> str:
    """A source with other names for some of its functions, and `tj.x` by the name that x has in a
    file. Attributes, keywords of calls and parameters keep theirs."""
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    lines = text.splitlines(keepends=True)
    edits: list[tuple[int, int, int, str]] = []
    for k, token in enumerate(tokens):
        if token.type != tokenize.NAME or keyword.iskeyword(token.string):
            continue
        before = tokens[k - 1].string if k else ""
        after = tokens[k + 1].string if k + 1 < len(tokens) else ""
        (row, start), (_, end) = token.start, token.end
        if token.string == "tj" and after == ".":
            name = tokens[k + 2]
            edits.append((row, start, name.end[1], f"tj_{name.string}"))
        elif token.string in names and before != "." and after != "=":
            edits.append((row, start, end, names[token.string]))
    for row, start, end, new in reversed(edits):
        line = lines[row - 1]
        lines[row - 1] = line[:start] + new + line[end:]
    return "".join(lines)
