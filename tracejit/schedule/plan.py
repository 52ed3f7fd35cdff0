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

from tracejit.ir.graph import Arg, Node, Value
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
        from tracejit.schedule.plan_text import print_plan

        return print_plan(self)

    def buffer(self, name: str) -> PlanBuffer:
        """The buffer of a name."""
        return next(b for b in self.buffers if b.name == name)
