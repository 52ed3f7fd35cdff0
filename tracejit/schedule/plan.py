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
"""

from __future__ import annotations

from dataclasses import dataclass

from tracejit.ir.graph import Arg, Node, Value, print_arg
from tracejit.ir.literals import print_literal
from tracejit.ir.types import Type
from tracejit.schedule.kernel import Kernel


@dataclass(frozen=True, slots=True)
class PlanBuffer:
    """Memory of a plan. `strides` in elements (None: row-major).

    kind "input": the `index`-th graph param's memory; "output": the `index`-th fresh output;
    "arena": bytes [offset, offset + nbytes) of the arena, `offset` a multiple of 128.
    """

    name: str
    kind: str
    type: Type
    strides: tuple[int, ...] | None = None
    index: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with its bindings: buffer names, size values, and scalar-table slots, each in the
    order in which the kernel lists them."""

    kernel: Kernel
    buffers: tuple[str, ...]
    sizes: tuple[int, ...]
    scalars: tuple[int, ...]

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
        kernels: dict[Kernel, str] = {}
        for launch in self.launches:
            name = kernels.setdefault(launch.kernel, f"k{len(kernels)}")
            lines.append(f"  launch {name}({_bindings(launch)})")
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


def _buffer(b: PlanBuffer) -> str:
    layout = "" if b.strides is None else f" strides {print_literal(b.strides)}"
    place = {"input": f"<- {b.index}", "output": f"= {b.index}", "arena": f"at {b.offset}"}[b.kind]
    return f"{b.kind:<6} {b.name}: {b.type}{layout} {place}"


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
