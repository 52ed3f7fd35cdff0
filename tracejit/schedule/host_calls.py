"""A call of the host in a plan: what a library computes, such as a decomposition by LAPACK.

In: a group that is one, and where the values around it lie. Out: a kernel that is nothing but the
call. Its operands are read whole, row by row; what is not memory that lies so is copied before, by
the kernel that computes it where there is one.
"""

from __future__ import annotations

from tracejit.schedule.groups import Group
from tracejit.schedule.kernel import Buffer, HostCall, Kernel
from tracejit.schedule.lower import Lowered
from tracejit.schedule.values import Memory


def lower_call(group: Group, memory: Memory) -> Lowered:
    """The kernel of a call of the host."""
    node = group.apart.node
    (result,) = (memory.located[t.value.id] for t in group.tasks if t.kind == "store")
    operands = node.inputs
    buffers = [Buffer(f"b{i}", x.type.dtype, "r") for i, x in enumerate(operands)]
    buffers.append(Buffer(f"b{len(operands)}", node.out.type.dtype, "w"))
    shapes = tuple(x.type.shape for x in (*operands, node.out))
    call = HostCall(node.op, node.attrs, shapes, node.where)
    kernel = Kernel(tuple(buffers), (), (), (), (), call=call)
    return Lowered(kernel, (*(memory.located[x.id] for x in operands), result), ())
