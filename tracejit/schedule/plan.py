"""The Plan: ordered kernel launches over buffers, and the host arithmetic that feeds them.

    plan step {
      input  t0: f32[64,1000] <- %0
      output t5: f32[]
      arena  t6: f32[64,100] at 0
      host   %7: f64[]@host = host_mul(%2, 2.0)
      scalar s0 = %7
      launch k0(b0=t0, b1=t1, b2=t6; n0=64, …; s0=0)
      kernel k0 = kernel(…) over () { … }
    }

Buffers name memory: an input's (read, or overwritten in place), a fresh output's, or a slice of the
plan's arena. `results` lists, for each Graph result in order, the output buffer that holds it.

The launches of a loop stand next to each other, and are repeated for each of its steps. What moves
from step to step is a row: a part of a buffer of the arena, and the bytes to the next step's.

      row    t7: f32[16,64] of t6 at 0 step 4096
      loop   0: 256 steps
      launch k0(b0=t7, …) in loop 0

`unrolled` is a plan without loops that does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from tracejit.ir.graph import Arg, Node, Value, print_arg
from tracejit.ir.literals import print_literal
from tracejit.ir.types import Type
from tracejit.records import dataclass
from tracejit.schedule.kernel import Kernel
from tracejit.schedule.wire import sent

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PlanBuffer:
    """Memory of a plan. `strides` in elements (None: row-major).

    kind "input": the `index`-th graph param's memory; "output": the `index`-th fresh output;
    "arena": bytes [offset, offset + nbytes) of the arena, `offset` a multiple of 128.
    "row": bytes [offset, offset + nbytes) of the arena buffer `of`; in each later step of a loop
    `step` bytes further.
    """

    name: str
    kind: str
    type: Type
    strides: tuple[int, ...] | None = None
    index: int = 0
    offset: int = 0
    of: str = ""
    step: int = 0


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with its bindings: buffer names, size values, and scalar-table slots, each in the
    order in which the kernel lists them. `loop`: the number of the loop that it is part of."""

    kernel: Kernel
    buffers: tuple[str, ...]
    sizes: tuple[int, ...]
    scalars: tuple[int, ...]
    loop: int | None = None

    def alone(self) -> tuple[Launch, ...]:
        """A launch for each kernel that runs side by side in this one; itself if it is only one."""
        kernel = self.kernel
        if not kernel.parts:
            return (self,)
        buffers = dict(zip((b.name for b in kernel.buffers), self.buffers, strict=True))
        sizes = dict(zip(kernel.sizes, self.sizes, strict=True))
        scalars = dict(zip(kernel.scalars, self.scalars, strict=True))
        return tuple(
            Launch(
                part.kernel,
                tuple(buffers[name] for name in part.buffers),
                tuple(sizes[name] for name in part.sizes),
                tuple(scalars[name] for name in part.scalars),
                self.loop,
            )
            for part in kernel.parts
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """A scheduled step. `host` nodes compute on the host; `scalars` are the table's slots."""

    name: str
    buffers: tuple[PlanBuffer, ...]
    launches: tuple[Launch, ...]
    results: tuple[str, ...]  # output buffer per Graph result
    writes: tuple[str, ...]  # input buffers overwritten in place
    host_params: tuple[tuple[Value, int], ...]  # host scalar inputs: value, graph param position
    host: tuple[Node, ...]
    scalars: tuple[Arg, ...]
    arena_bytes: int
    device: str
    loops: tuple[int, ...] = ()  # the steps of each

    def __str__(self) -> str:
        """Each kernel stands once, however many launches use it; `plan_text` reads it back."""
        lines = [f"plan {self.name} on {self.device} arena {self.arena_bytes} {{"]
        lines += [f"  {_buffer(b)}" for b in self.buffers]
        lines += [f"  host   {v}: {v.type} <- {position}" for v, position in self.host_params]
        for node in self.host:
            operands = ", ".join(map(print_arg, node.args))
            where = f"  # {node.where}" if node.where else ""
            left = f"{node.out}: {node.out.type}"
            lines.append(f"  host   {left} = {node.op.name}({operands}){where}")
        lines += [f"  scalar {print_arg(s)}" for s in self.scalars]
        lines += [f"  loop   {i}: {steps} steps" for i, steps in enumerate(self.loops)]
        kernels: dict[Kernel, str] = {}
        for launch in self.launches:
            name = kernels.setdefault(launch.kernel, f"k{len(kernels)}")
            inside = "" if launch.loop is None else f" in loop {launch.loop}"
            lines.append(f"  launch {name}({_bindings(launch)}){inside}{_sends(launch.kernel)}")
        if self.results:
            lines.append(f"  return {', '.join(self.results)}")
        if self.writes:
            lines.append(f"  write  {', '.join(self.writes)}")
        for kernel, name in kernels.items():
            lines.append(f"  kernel {name} {{")
            lines += [f"    {line}" for line in str(kernel).splitlines()]
            lines.append("  }")
        return "\n".join([*lines, "}"])

    def buffer(self, name: str) -> PlanBuffer:
        """The buffer of a name."""
        return next(b for b in self.buffers if b.name == name)

    def times(self, launch: Launch) -> int:
        """How often a launch runs."""
        return 1 if launch.loop is None else self.loops[launch.loop]


def runs(items: Iterable[T], loop_of: Callable[[T], int | None]) -> list[list[T]]:
    """What stands in one loop together, anything else alone."""
    found: list[list[T]] = []
    for item in items:
        loop = loop_of(item)
        if loop is not None and found and loop_of(found[-1][0]) == loop:
            found[-1].append(item)
        else:
            found.append([item])
    return found


def unrolled(plan: Plan) -> Plan:
    """The plan with the launches of its loops step by step: rows are buffers of the arena, those of
    later steps behind all others."""
    if not plan.loops and all(b.kind != "row" for b in plan.buffers):
        return plan
    at = {b.name: b.offset for b in plan.buffers if b.kind == "arena"}
    rows = {b.name: b for b in plan.buffers if b.kind == "row"}
    extra: dict[str, PlanBuffer] = {}

    def moved(name: str, step: int) -> str:
        row = rows.get(name)
        if row is None:
            return name
        new, place = f"{name}_{step}", at[row.of] + row.offset + step * row.step
        extra[new] = PlanBuffer(new, "arena", row.type, offset=place)
        return new

    launches: list[Launch] = []
    for together in runs(plan.launches, lambda launch: launch.loop):
        for step in range(plan.times(together[0])):
            for one in together:
                names = tuple(moved(name, step) for name in one.buffers)
                launches.append(replace(one, buffers=names, loop=None))
    buffers = (*(_as_arena(b, at) for b in plan.buffers), *extra.values())
    return replace(plan, buffers=buffers, launches=tuple(launches), loops=())


def by_launch(plan: Plan, seconds: Sequence[float]) -> list[float]:
    """What the launches of a plan took, of what those of the unrolled plan did."""
    rest, found = iter(seconds), []
    for together in runs(plan.launches, lambda launch: launch.loop):
        steps = range(plan.times(together[0]))
        found += map(sum, zip(*([next(rest) for _ in together] for _ in steps), strict=True))
    return found


def _as_arena(b: PlanBuffer, at: Mapping[str, int]) -> PlanBuffer:
    if b.kind != "row":
        return b
    return PlanBuffer(b.name, "arena", b.type, offset=at[b.of] + b.offset)


def _buffer(b: PlanBuffer) -> str:
    layout = "" if b.strides is None else f" strides {print_literal(b.strides)}"
    place = {
        "input": f"<- {b.index}",
        "output": f"= {b.index}",
        "arena": f"at {b.offset}",
        "row": f"of {b.of} at {b.offset} step {b.step}",
    }[b.kind]
    return f"{b.kind:<6} {b.name}: {b.type}{layout} {place}"


def _sends(kernel: Kernel) -> str:
    """What a rank sends in the collective that a launch starts, as a comment."""
    starts = kernel.call is not None and kernel.call.phase == "start"
    return f"  # sends {sent(kernel):,} bytes" if starts else ""


def _bindings(launch: Launch) -> str:
    kernel = launch.kernel
    names = [b.name for b in kernel.buffers], kernel.sizes, kernel.scalars
    values = launch.buffers, launch.sizes, launch.scalars
    lists = [
        ", ".join(f"{n}={v}" for n, v in zip(ns, vs, strict=True))
        for ns, vs in zip(names, values, strict=True)
    ]
    while lists and not lists[-1]:
        lists.pop()
    return "; ".join(lists)
