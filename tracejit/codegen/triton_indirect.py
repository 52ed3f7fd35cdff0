"""A generated kernel whose addresses lie in memory: what a CUDA graph launches.

A graph launches with the arguments of its capture. Tensors that lie elsewhere in the next call are
found through a table in device memory instead: the kernel that is there is called by another one,
which loads the addresses of some of its pointers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from tracejit.codegen.triton import Source
from tracejit.codegen.triton_text import MEMORY_TYPE


def indirect(source: Source, arguments: Sequence[str], aligned: Sequence[bool | None]) -> Source:
    """The source with a kernel around its own.

    arguments: the names of its kernel's.
    aligned:   per pointer to a buffer None where it stays an argument; else it is loaded from the
               table, and this tells whether it is a multiple of 16 bytes.

    The first argument of the kernel is the table, of int64, with these pointers in order; then come
    the other arguments as they were.
    """
    buffers = source.kernel.buffers
    loaded = [i for i, x in enumerate(aligned) if x is not None]
    kept = [name for i, name in enumerate(arguments) if i not in loaded]
    pointers = len(buffers) + source.has_scalars + ("workspace" in arguments)
    constants = set(arguments[pointers:])
    digest = hashlib.sha256(repr((source.text, aligned)).encode()).hexdigest()[:8]
    name = f"{source.name.rpartition('_')[0]}_indirect_{digest}"
    lines = ["", "", "@triton.jit", f"def {name}(", "    addresses,"]
    lines += [f"    {x}{': tl.constexpr' if x in constants else ''}," for x in kept]
    lines += ["):", f'    """{source.name}, with {len(loaded)} of its addresses in memory."""']
    for position, i in enumerate(loaded):
        at = f"addresses + {position}" if position else "addresses"
        pointer = f"tl.load({at}).to(tl.pointer_type({MEMORY_TYPE[buffers[i].dtype.name]}))"
        if aligned[i]:
            pointer = f"tl.multiple_of({pointer}, 16)"
        lines.append(f"    {arguments[i]} = {pointer}")
    lines.append(f"    {source.name}({', '.join(arguments)})")
    return replace(source, name=name, text=source.text + "\n".join(lines) + "\n")
