"""Reads the text form of a CpuPlan, which `str` prints.

    cpu plan arena 8192 {
      loop 0: 256 steps in 2 parts
      works w0: 4096
      place t6 in t2 at 0
      place w0 at 128
      call k0(b0=t0, b1=t1; s0=0) in w0 loop 0 apart 2048, 0
      kernel k0 {
        outer: points in 18 chunks
        stage 0: i1 by 1024 in 1 chunks
        rows row0
        partials part0
        kernel(b0: f32 r, …, part0: f32 rw, row0: f32 rw; ; s0) over (i0: 300) { … }
        columns {
          outer: i0 by 256 in 1 chunks
          kernel(…) over (i0: 200) { … }
        }
      }
      kernel k1 {
        tiling vector_bytes=64, way='tiles', rows=6, …
        kernel(…) over () { … }
      }
    }

A nest is `axis by block in so many chunks`, `points` where no axis of its own is the vector loop.
Places are in an output, or in the arena; kernels that several calls have stand once.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from tracejit.errors import InvalidGraph
from tracejit.schedule.cpu.plan import Blocks, Call, CpuKernel, CpuPlan, Nest, Place, Tiling
from tracejit.schedule.kernel_text import canonical, parse_kernel


def identity(kernel: CpuKernel) -> str:
    """A text that kernels share if they differ in variables' numbers and the users' lines only."""
    return str(canonical_kernel(kernel))


def canonical_kernel(kernel: CpuKernel) -> CpuKernel:
    """The kernel with its variables numbered in order and without the users' lines."""
    columns = kernel.columns and canonical_kernel(kernel.columns)
    return replace(kernel, kernel=canonical(kernel.kernel), columns=columns)


_HEADER = re.compile(r"cpu plan arena (\d+) \{\Z")
_WORKS = re.compile(r"works (\w+): (\d+)\Z")
_PLACE = re.compile(r"place (\w+)(?: in (\w+))? at (\d+)\Z")
_CALL = re.compile(
    r"call (\w+)\(([^;)]*)(?:; ([^)]*))?\)(?: in (\w+))?(?: loop (\d+))?(?: apart (.+))?\Z"
)
_LOOP = re.compile(r"loop (\d+): (\d+) steps(?: in (\d+) parts)?\Z")
_KERNEL = re.compile(r"kernel (\w+) \{\Z")
_NEST = re.compile(r"(outer|stage (\d+)): (?:(\w+) by (\d+)|points) in (\d+) chunks\Z")


def parse_cpu_plan(text: str) -> CpuPlan:
    """Inverse of str. A kernel's text is read when the kernel is looked at."""
    first, *lines = text.strip().splitlines()
    head = _HEADER.match(first)
    if head is None or not lines or lines[-1] != "}":
        raise InvalidGraph(reason="a CPU plan's text is `cpu plan arena bytes {` … `}`")
    texts: dict[str, str] = {}
    calls, working, places, loops, parts = [], [], [], [], []
    rest = iter(lines[:-1])
    for line in rest:
        code = line.strip()
        if m := _KERNEL.match(code):
            texts[m[1]] = "\n".join(_block(rest, "  }"))
        elif m := _WORKS.match(code):
            working.append((m[1], int(m[2])))
        elif m := _LOOP.match(code):
            loops.append(int(m[2]))
            parts.append(int(m[3] or 1))
        elif m := _PLACE.match(code):
            places.append(Place(m[1], m[2] or "", int(m[3])))
        elif m := _CALL.match(code):
            scalars = tuple(map(int, _values(m[3])))
            loop = None if m[5] is None else int(m[5])
            apart = tuple(map(int, m[6].split(", "))) if m[6] else ()
            calls.append(Call(m[1], _values(m[2]), scalars, m[4] or "", loop, apart))
        else:
            raise InvalidGraph(reason=f"cannot read the line {code!r} of a CPU plan")
    missing = {call.kernel for call in calls} - texts.keys()
    if missing:
        raise InvalidGraph(reason=f"a CPU plan has no kernel {min(missing)}")
    lists = tuple(working), tuple(places), int(head[1]), tuple(loops), tuple(parts)
    return CpuPlan(tuple(calls), Kernels(texts), *lists)


class Kernels(Mapping):
    """Kernels by name, each parsed when it is looked at: to run a plan whose kernels are compiled
    takes none of them."""

    def __init__(self, texts: Mapping[str, str]):
        self._texts, self._parsed = texts, {}

    def __getitem__(self, name: str) -> CpuKernel:
        if name not in self._parsed:
            self._parsed[name] = parse_cpu_kernel(self._texts[name])
        return self._parsed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


def parse_cpu_kernel(text: str) -> CpuKernel:
    """Inverse of str."""
    lines = text.splitlines()
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    rest = iter([line[margin:] for line in lines if line.strip()])
    kernel = columns = outer = None
    cuts: dict[str, Tiling | Blocks] = {}
    inner: dict[int, Nest] = {}
    names = {"rows": (), "partials": ()}
    for line in rest:
        word = line.partition(" ")[0]
        if m := _NEST.match(line):
            nest = Nest(m[3] or "", int(m[4] or 1), int(m[5]))
            if m[2] is None:
                outer = nest
            else:
                inner[int(m[2])] = nest
        elif word in _CUTS:
            cuts[word] = _cut(_CUTS[word], line[len(word) + 1 :])
        elif word in names:
            names[word] = tuple(line[len(word) + 1 :].split(", "))
        elif word.startswith("kernel"):
            kernel = parse_kernel("\n".join([line, *_block(rest, "}"), "}"]))
        elif line == "columns {":
            columns = parse_cpu_kernel("\n".join(_block(rest, "}")))
        else:
            raise InvalidGraph(reason=f"cannot read the line {line!r} of a CPU kernel")
    if kernel is None:
        raise InvalidGraph(reason="a CPU kernel's text has no kernel")
    nests = tuple(inner.get(i) for i in range(len(kernel.stages)))
    return CpuKernel(kernel, columns, names["partials"], names["rows"], outer, nests, **cuts)


def _block(lines: Iterator[str], end: str) -> list[str]:
    """The lines up to one that ends a block."""
    found = []
    for line in lines:
        if line == end:
            return found
        found.append(line)
    raise InvalidGraph(reason="a CPU plan's text ends early")


def _values(text: str | None) -> tuple[str, ...]:
    return tuple(part.partition("=")[2] for part in (text or "").split(", ") if part)


_CUTS = {"tiling": Tiling, "blocks": Blocks}


def _cut(kind: type, text: str) -> Tiling | Blocks:
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        return kind(**{k.arg: ast.literal_eval(k.value) for k in call.keywords})
    except (SyntaxError, TypeError, ValueError) as error:
        raise InvalidGraph(
            reason=f"cannot read the {kind.__name__.lower()} {text!r}: {error}"
        ) from error
