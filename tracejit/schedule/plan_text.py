"""Reads the text form of a Plan, which its `str` gives.

    plan step on cpu arena 51200 {
      input  t0: f32[64,1000] <- 0
      output t5: f32[] = 0
      arena  t6: f32[64,100] at 0
      host   %6: f64[]@host <- 3
      host   %7: f64[]@host = host_mul(%6, 2.0)
      scalar %7
      launch k0(b0=t0, b1=t1, b2=t6; n0=64; s0=0)
      return t5
      write  t1
      kernel k0 {
        kernel(…) over () { … }
      }
    }

Numbers after `<-` and `=` are positions among the graph's params and results; scalars are listed in
slot order. Kernels used by several launches stand once.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Arg, Node, Value
from tracejit.ir.literals import parse_literal
from tracejit.ir.ops import OPS
from tracejit.ir.types import parse_type
from tracejit.schedule.kernel import Kernel
from tracejit.schedule.kernel_text import parse_kernel
from tracejit.schedule.plan import Launch, Plan, PlanBuffer

_HEADER = re.compile(r"plan ([\w<>]+) on (\S+) arena (\d+) \{\Z")
_BUFFER = re.compile(
    r"(input|output|arena)\s+(\w+): (\S+)(?: strides (\([^)]*\)))? (?:<-|=|at) (\d+)\Z"
)
_ROW = re.compile(r"row\s+(\w+): (\S+) of (\w+) at (\d+) step (-?\d+)\Z")
_LOOP = re.compile(r"loop\s+(\d+): (\d+) steps\Z")
_HOST_PARAM = re.compile(r"host\s+%(\d+): (\S+) <- (\d+)\Z")
_HOST = re.compile(r"host\s+%(\d+): (\S+) = (\w+)\((.*)\)\Z")
_LAUNCH = re.compile(r"launch (\w+)\((.*)\)(?: in loop (\d+))?\Z")
_KERNEL = re.compile(r"kernel (\w+) \{\Z")
_COMMUNICATES = re.compile(r"^ +(start|wait) ", re.MULTILINE)  # in a kernel; HostCall's text


def parse_plan(text: str) -> Plan:
    """Inverse of `str(plan)`."""
    lines = [line.rstrip() for line in text.strip().splitlines() if line.strip()]
    head = _HEADER.match(lines[0])
    if head is None or lines[-1].strip() != "}":
        raise InvalidGraph(reason="a plan's text is `plan name on device arena bytes {` … `}`")
    return _PlanParser(lines[1:-1]).plan(head[1], head[2], int(head[3]))


def stored_plan(text: str) -> Plan:
    """The plan whose `str` a text is, word for word. Its launches are read when one of them is
    looked at: a warm start that finds compiled kernels takes none."""
    lines = text.splitlines()
    apart = next((i for i, line in enumerate(lines) if _KERNEL.match(line.strip())), len(lines))
    counted = [line for line in lines[:apart] if not line.startswith("  launch ")]
    plan = parse_plan("\n".join([*counted, "}"]))
    launches = Launches(text, apart - len(counted))
    launches.plan = replace(plan, launches=launches)
    return launches.plan


def text_of(plan: Plan) -> str:
    """`str(plan)`, which takes no kernel of a stored plan."""
    launches = plan.launches
    whole = isinstance(launches, Launches) and launches.plan is plan
    return launches.plan_text if whole else str(plan)


def communicates(plan: Plan) -> bool:
    """Whether one of its launches is a collective."""
    if isinstance(plan.launches, Launches):
        return _COMMUNICATES.search(plan.launches.plan_text) is not None
    calls = (launch.kernel.call for launch in plan.launches)
    return any(call is not None and call.is_collective for call in calls)


class Launches(Sequence[Launch]):
    """The launches of a plan's text, as good as a tuple of them; and the plan, which is this one
    unless something of it was replaced."""

    plan: Plan

    def __init__(self, plan_text: str, count: int):
        self.plan_text, self._count = plan_text, count

    @cached_property
    def _read(self) -> tuple[Launch, ...]:
        return parse_plan(self.plan_text).launches

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: int | slice) -> Launch | tuple[Launch, ...]:
        return self._read[at]

    def __iter__(self) -> Iterator[Launch]:
        return iter(self._read)

    def __eq__(self, other: object) -> bool:
        return self._read == (other._read if isinstance(other, Launches) else other)

    def __hash__(self) -> int:
        return hash(self._read)


class _PlanParser:
    """Reads the lines of one plan."""

    def __init__(self, lines: list[str]):
        self.values: dict[str, Value] = {}
        self.kernels: dict[str, Kernel] = {}
        self.lines: list[tuple[str, str]] = []
        inside: list[str] | None = None
        for line in lines:
            found = _KERNEL.match(line.strip())
            if inside is None and found is not None:
                name, inside = found[1], []
            elif inside is None:
                code, _, where = line.partition("  # ")
                self.lines.append((code.strip(), where.strip()))
            elif line == "  }":
                self.kernels[name], inside = parse_kernel("\n".join(inside)), None
            else:
                inside.append(line)

    def plan(self, name: str, device: str, arena_bytes: int) -> Plan:
        buffers: list[PlanBuffer] = []
        host_params, host, scalars, launches, loops = [], [], [], [], []
        results: tuple[str, ...] = ()
        writes: tuple[str, ...] = ()
        for code, where in self.lines:
            if m := _BUFFER.match(code):
                buffers.append(_parse_buffer(m))
            elif m := _ROW.match(code):
                place = {"offset": int(m[4]), "of": m[3], "step": int(m[5])}
                buffers.append(PlanBuffer(m[1], "row", parse_type(m[2]), **place))
            elif m := _LOOP.match(code):
                loops.append(int(m[2]))
            elif m := _HOST_PARAM.match(code):
                host_params.append((self.define(m[1], m[2]), int(m[3])))
            elif m := _HOST.match(code):
                args = tuple(self.arg(part) for part in _items(m[4]))
                host.append(Node(OPS[m[3]], args, (), (self.define(m[1], m[2]),), where))
            elif code.startswith("scalar "):
                scalars.append(self.arg(code[7:]))
            elif m := _LAUNCH.match(code):
                launches.append(self.launch(m[1], m[2], m[3]))
            elif code.startswith("return "):
                results = tuple(_items(code[7:]))
            elif code.startswith("write "):
                writes = tuple(_items(code[6:]))
            else:
                raise InvalidGraph(reason=f"cannot read the line {code!r} of a plan")
        return Plan(
            name,
            tuple(buffers),
            tuple(launches),
            results,
            writes,
            tuple(host_params),
            tuple(host),
            tuple(scalars),
            arena_bytes,
            device,
            tuple(loops),
        )

    def define(self, number: str, type_text: str) -> Value:
        value = self.values[number] = Value(int(number), parse_type(type_text))
        return value

    def arg(self, text: str) -> Arg:
        text = text.strip()
        if text.startswith("%"):
            return self.values[text[1:]]
        return parse_literal(ast.parse(text, mode="eval").body)

    def launch(self, name: str, text: str, loop: str | None) -> Launch:
        lists = [[p.split("=")[1] for p in _items(part)] for part in text.split(";")]
        lists += [[]] * (3 - len(lists))
        buffers, sizes, scalars = lists
        return Launch(
            self.kernels[name],
            tuple(buffers),
            tuple(map(int, sizes)),
            tuple(map(int, scalars)),
            None if loop is None else int(loop),
        )


def _parse_buffer(m: re.Match) -> PlanBuffer:
    kind, number = m[1], int(m[5])
    strides = ast.literal_eval(m[4]) if m[4] else None
    offset, index = (number, 0) if kind == "arena" else (0, number)
    return PlanBuffer(m[2], kind, parse_type(m[3]), strides, index, offset)


def _items(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
