"""The only kernel of a graph, compiled ahead of time: its form and what its machine code says."""

import pytest

from tracejit.aot import TARGETS, compile_for
from tracejit.codegen.triton import emit
from tracejit.codegen.triton_indirect import indirect
from tracejit.ir.text import parse
from tracejit.runtime.triton_launch import TRITON_NAME
from tracejit.runtime.triton_source import import_source
from tracejit.schedule import schedule

each_target = pytest.mark.parametrize("target", TARGETS)
# sm_90 in every run of the tests, the others in `test-all`
mostly_90 = pytest.mark.parametrize(
    "target", [t if t == 90 else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS]
)


def only_launch(text):
    """The launch of a graph that becomes one kernel."""
    (launch,) = schedule(parse(text)).launches
    return launch


def facts(text, target=90, precision="ieee", in_memory=False):
    """The form of a graph's only kernel, and what its machine code says; with its addresses
    `in_memory`, as in a CUDA graph."""
    launch = only_launch(text)
    source = emit(launch.kernel, launch.sizes, precision=precision)
    shape = source.geometry(launch.sizes)
    pointers = {b.name: f"*{TRITON_NAME[b.dtype.name]}" for b in launch.kernel.buffers}
    pointers |= {"scalars": "*fp64"} if launch.kernel.scalars else {}
    pointers |= {"workspace": "*i8"} if shape.workspace else {}
    sizes = dict(zip(launch.kernel.sizes, launch.sizes, strict=True))
    if in_memory:
        kept = list(pointers.items())[len(launch.kernel.buffers) :]
        arguments = [*pointers, *sizes, *shape.constants]
        source = indirect(source, arguments, [True] * len(launch.kernel.buffers))
        pointers = {"addresses": "*i64", **dict(kept)}
    found = compile_for(
        import_source(source),
        pointers,
        sizes | dict(shape.constants),
        target=target,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    return source.name.rpartition("_")[0], found
