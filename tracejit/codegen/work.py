"""What a Triton launch issues: bytes, operations, and how often its programs wait for memory.

In: the `Source` of a kernel, the values of its sizes, its `Geometry`. Out: a `Work` for each kernel
that runs in the launch. Counted is what the printed text does, by printing it: trip counts times
accesses of each program, also where several programs or passes read the same addresses. A lane
that is masked off moves no bytes, but it takes part in the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tracejit.codegen.attention_work import per_score, walk
from tracejit.codegen.counted import Blocks, Count, Total, Work, inside, numel
from tracejit.codegen.geometry import Geometry, cdiv
from tracejit.codegen.triton import Source
from tracejit.codegen.triton_attention import Attention, attention, attention_of, functions_of
from tracejit.codegen.triton_body import Dims
from tracejit.codegen.triton_foreach import chunks_of, foreach, is_reduced, words_of
from tracejit.codegen.triton_forms import FOLD_BLOCK, form_of, pointwise, reduce
from tracejit.codegen.triton_matmul import contraction, matmul
from tracejit.codegen.triton_rows import ENDS, rows
from tracejit.codegen.triton_scan import scan
from tracejit.codegen.triton_scatter import scatter, scatter_of
from tracejit.codegen.triton_sort import sort
from tracejit.codegen.triton_text import fold_of
from tracejit.kernels.costs import accumulators, at_once
from tracejit.kernels.tiles import dot_path
from tracejit.schedule.foreach import columns_of, rows_of
from tracejit.schedule.kernel import (
    Kernel,
    Reduce,
    Statement,
)

PER_INDEX = 16  # operations that tell whether an index is a program's, and how many are before
PER_COMPARISON = 8  # operations that tell which of two elements stands first
WORD_BYTES = 8  # of an address, or of what a table says of a chunk
_COUNTER_BYTES = 4  # of what tells the last program of a full reduction
_FOLD_BYTES = {"tl.float64": 8, "tl.int64": 8, "tl.float32": 4, "tl.int32": 4}


def work(source: Source, sizes: Sequence[int], shape: Geometry) -> tuple[Work, ...]:
    """The work of a launch: of its kernel, or of each kernel that runs side by side in it."""
    kernel = source.kernel
    values = dict(zip(kernel.sizes, sizes, strict=True))
    if not kernel.parts:
        return (_alone(kernel, values, shape, source),)
    if kernel.foreach:
        return (_of_rows(kernel, sizes, shape),)
    found = []
    for i, part in enumerate(kernel.parts):
        own = dict(zip(part.kernel.sizes, (values[n] for n in part.sizes), strict=True))
        constants = {
            name.removesuffix(f"_{i}"): value
            for name, value in shape.constants.items()
            if name.endswith(f"_{i}")
        }
        programs = shape.constants.get(f"FIRST_{i + 1}", shape.grid[0]) - constants["FIRST"]
        alone = replace(shape, grid=(programs,), constants=constants)
        found.append(_alone(part.kernel, own, alone, source, i))
    return tuple(found)


def _alone(
    kernel: Kernel, sizes: Mapping[str, int], shape: Geometry, source: Source, part: int = 0
) -> Work:
    """The work of a kernel, or of a part of a launch."""
    form, programs = form_of(kernel), shape.grid[0]
    if not programs:
        return Work(form, 0)
    bodies: list[Count] = []

    def make(kernel: Kernel) -> Count:
        bodies.append(Count(kernel, sizes))
        return bodies[-1]

    if form == "scatter":
        scatter(kernel, make=make)
        return _scattered(kernel, sizes, shape, *bodies)
    if form == "sort":
        sort(kernel, source.variants[part], make=make)
        return _sorted(kernel, sizes, shape, *bodies)
    if form == "scan":
        scan(kernel, make=make)
        return _scanned(kernel, sizes, shape, *bodies)
    variant = source.variants[part]
    if form == "matmul":
        matmul(kernel, source.precision, variant, make=make)
        return _contraction(kernel, sizes, shape, bodies)
    if form == "attention":
        attention(kernel, source.precision, make=make)
        return _attended(attention_of(kernel), sizes, shape, bodies)
    printer = {"pointwise": pointwise, "reduce": reduce, "rows": rows}[form]
    printer(kernel, variant, make=make)
    (body,) = bodies
    constants, total = shape.constants, Total()
    for section in body.sections:
        dims, extents, trips = section.dims, {}, 1
        if "x" in dims:
            trips = constants.get("STEPS", 1)
            extents["x"] = Blocks(numel(dims["x"], sizes), programs * trips, constants["BLOCK"])
        if "o" in dims:
            extents["o"] = Blocks(numel(dims["o"], sizes), programs, constants["BLOCK_O"])
        if "i" in dims:
            inner, ends = numel(dims["i"], sizes), constants.get("UNIT", 1) - 1
            trips = cdiv(inner, constants["BLOCK_I"]) if "looped" in variant else 1
            extents["i"] = Blocks(inner - ends, trips, constants["BLOCK_I"])
            if section.block == ENDS:
                trips, extents["i"] = 1, Blocks(ends, 1, 2 * constants["UNIT"])
        if variant == "tiled" and dims:
            columns = numel(dims["i"], sizes)
            across = cdiv(columns, constants["BLOCK_I"])
            extents["i"] = Blocks(columns, across, constants["BLOCK_I"])
            extents["o"] = replace(extents["o"], count=programs // across)
        many = form == "reduce" and not dims  # the tail, which only the last program runs
        total.add(body, section, extents, 1 if many else programs * trips, trips)
    total.loaded += body.scalar_bytes * programs
    waiting = total.waiting(programs)
    if form == "reduce":
        _fold(total, kernel.stages[0].body, programs)
    return total.work(form, programs, waiting)


def _of_rows(kernel: Kernel, sizes: Sequence[int], shape: Geometry) -> Work:
    """The work of a foreach: of all chunks. A program waits for its chunk, then for addresses."""
    programs, constants = shape.grid[0], shape.constants
    if not programs:
        return Work("foreach", 0)
    columns, bodies = columns_of(kernel), []

    def make(inner: Kernel) -> Count:
        bodies.append(Count(inner, {"n0": max(rows_of(kernel, sizes))}))
        return bodies[-1]

    foreach(kernel, make=make)
    (body,) = bodies
    chunks = np.concatenate(chunks_of(kernel, sizes))
    steps, total = constants["STEPS"], Total()
    elements = int((chunks[:, 2] - chunks[:, 1]).sum())
    extents = {"x": Blocks(elements, programs * steps, constants["BLOCK"])}
    for section in body.sections:
        many = programs * steps if section.dims else columns.rows  # the rest of a reduced row
        total.add(body, section, extents, many, steps if section.dims else 1)
    total.loaded += (body.scalar_bytes + WORD_BYTES * words_of(kernel)) * programs
    total.steps += 2
    waiting = total.waiting(programs)
    if is_reduced(kernel):
        counts = np.bincount(chunks[:, 0], minlength=columns.rows)
        steps = total.steps + cdiv(int(counts.max()), FOLD_BLOCK)
        for count in counts.tolist():
            _fold(total, columns.kernel.stages[0].body, count)
        total.steps = steps
    return total.work("foreach", programs, waiting)


def _scattered(kernel: Kernel, sizes: Mapping[str, int], shape: Geometry, body: Count) -> Work:
    """The work of a scatter: each program goes over all indices, each source is taken once."""
    s, constants, programs = scatter_of(kernel), shape.constants, shape.grid[0]
    blocks = programs // constants["PARTS"]
    extents = {"x": Blocks(numel(kernel.axes, sizes), blocks, constants["BLOCK"])}
    indices, total = numel(s.stage.axes, sizes), Total()
    sections = [section for section in body.sections if section.dims]
    if s.before is not None:
        size = sizes.get(s.places, s.places)
        total.add(body, sections.pop(0), extents, size * blocks, constants["RANGE"])
    choosing, storing = sections
    if s.chooses:
        trips = cdiv(indices, constants["IDS"])
        ids = Blocks(indices, trips, constants["IDS"])
        total.add(body, choosing, {"t": ids}, trips * programs, trips)
        total.operations += trips * programs * constants["IDS"] * PER_INDEX
    else:
        total.add(body, choosing, extents, indices * programs, indices)
    total.add(body, storing, extents, indices * blocks, cdiv(indices, constants["PARTS"]))
    total.loaded += body.scalar_bytes * programs
    return total.work("scatter", programs, total.waiting(programs))


def _scanned(kernel: Kernel, sizes: Mapping[str, int], shape: Geometry, body: Count) -> Work:
    """The work of a running result: a tree over each tile takes as many combinations for each
    element as it has levels."""
    programs, total, constants = shape.grid[0], Total(), shape.constants
    block_o, block_i = constants["BLOCK_O"], constants["BLOCK_I"]
    row = numel(kernel.stages[0].axes, sizes)
    trips = cdiv(row, block_i)
    extents = {
        "o": Blocks(numel(kernel.axes, sizes), programs, block_o),
        "i": Blocks(row, trips, block_i),
    }
    for section in (s for s in body.sections if s.dims):
        total.add(body, section, extents, trips * programs, trips)
    total.operations += trips * programs * block_o * block_i * max(1, block_i.bit_length() - 1)
    total.loaded += body.scalar_bytes * programs
    return total.work("scan", programs, total.waiting(programs))


def _sorted(kernel: Kernel, sizes: Mapping[str, int], shape: Geometry, body: Count) -> Work:
    """The work of sorting: each program compares its elements with all of their row, or in as many
    steps as a network has."""
    programs, total, constants = shape.grid[0], Total(), shape.constants
    rows, row = numel(kernel.axes, sizes), numel(kernel.stages[0].axes, sizes)
    count = numel(kernel.stages[1].axes, sizes)
    block, others = constants["BLOCK"], constants.get("OTHERS", 0)
    if not others:
        mine, stored = (section for section in body.sections if section.dims)
        total.add(body, mine, {"x": Blocks(row, 1, block)}, programs, 1)
        total.add(body, stored, {"x": Blocks(count, 1, block)}, programs, 0)
        bits = block.bit_length() - 1
        total.operations += rows * block * (bits * (bits + 1) // 2) * PER_COMPARISON
        return total.work("sort", programs, total.waiting(programs))
    blocks, trips = cdiv(row, block), cdiv(row, others)
    mine, other, stored = (section for section in body.sections if section.dims)
    total.add(body, mine, {"x": Blocks(row, blocks, block)}, programs, 1)
    total.add(body, other, {"y": Blocks(row, trips, others)}, programs * trips, trips)
    total.add(body, stored, {"x": Blocks(count, blocks, block)}, programs, 0)
    total.operations += rows * blocks * trips * block * others * PER_COMPARISON
    total.loaded += body.scalar_bytes * programs
    return total.work("sort", programs, total.waiting(programs))


def _contraction(
    kernel: Kernel, sizes: Mapping[str, int], shape: Geometry, bodies: Sequence[Count]
) -> Work:
    """The work of a matmul: its loop over k, and its epilogue."""
    c, constants, programs = contraction(kernel), shape.constants, shape.grid[0]
    extents = {}
    for name, axis in (("m", c.m), ("n", c.n), ("k", c.dot.k)):
        block, n = constants[f"BLOCK_{name.upper()}"], numel([axis], sizes)
        extents[name] = Blocks(n, cdiv(n, block), block)
    splits = constants.get("SPLITS", 1)
    trips, tiles = cdiv(extents["k"].count, splits), programs // splits
    extents["k"] = replace(extents["k"], count=trips * splits)
    loop, total = Total(), Total()
    depths = []
    for body in bodies[:2]:
        before = loop.steps
        for section in body.sections:
            loop.add(body, section, extents, programs * trips, trips)
        depths.append(loop.steps - before)
        loop.loaded += body.scalar_bytes * programs * trips
    total.steps = max(depths)  # neither operand waits for the other
    epilogue, n = bodies[2], extents["n"]
    pieces = constants.get("PIECES", 1) * accumulators(n.block)
    apart = extents | {"n": Blocks(n.elements, n.count * pieces, n.block // pieces)}
    for section in epilogue.sections:
        total.add(epilogue, section, apart, tiles * pieces if section.dims else 1, pieces)
    total.loaded += epilogue.scalar_bytes * tiles * pieces
    _fold(total, c.stage.body, tiles * pieces)
    if splits > 1:
        _fold_tiles(total, constants, tiles, c.total)
    tile = math.prod(extents[name].block for name in "mnk")
    tensor = dot_path(c.dtype.name) == "tensor"
    return Work(
        form="matmul",
        programs=programs,
        loaded=loop.loaded + total.loaded,
        stored=total.stored,
        operations=loop.operations + total.operations,
        products=2 * tile * programs * trips,
        operands=c.dtype.name,
        steps=total.steps,
        waiting=loop.loaded / programs / max(1, *depths),
        ahead=max(1, min(shape.num_stages - 1, trips)) if tensor else 1,
    )


def _attended(
    a: Attention, sizes: Mapping[str, int], shape: Geometry, bodies: Sequence[Count]
) -> Work:
    """The work of attention: of each function, for the blocks that it is called for."""
    constants, programs, total = shape.constants, shape.grid[0], Total()
    extents = {x: numel([axis], sizes) for x, axis in zip("mncd", a.attend.axes, strict=True)}
    blocks = {x: constants[f"BLOCK_{x.upper()}"] for x in extents}
    batches, found = numel(a.batch, sizes), walk(a, extents["m"], extents["n"], constants)
    depth = 1
    for name, body in zip(functions_of(a), bodies, strict=True):
        pairs = found.calls[name]

        def elements(dims: Dims, pairs: Sequence[tuple[int, int]] = pairs) -> int:
            """All that exist of what varies over some dims."""
            wide = math.prod(extents[x] for x in dims if x in "cd")
            ends = {x: extents[x] - blocks[x] for x in "mn"}
            parts = (
                math.prod(
                    blocks[x] + min(0, ends[x] - at * blocks[x])
                    for x, at in zip("mn", pair, strict=True)
                    if x in dims
                )
                for pair in pairs
            )
            return batches * wide * sum(parts)

        for section in body.sections:
            for size, dims, mask in section.loads:
                total.loaded += size * inside(elements(dims), mask, body.extents)
            for size, dims in section.stores:
                total.stored += size * elements(dims)
            for dims, cost in section.operations.items():
                tile = math.prod(blocks[x] for x in dims)
                total.operations += cost * batches * len(pairs) * tile
            depth = max(depth, section.depth)
        total.loaded += body.scalar_bytes * batches * len(pairs)
    total.operations += batches * found.scores * per_score(a.dtype) * blocks["m"] * blocks["n"]
    tensor = dot_path(a.dtype.name) == "tensor"
    steps = (found.trips + 1) * depth
    return Work(
        form="attention",
        programs=programs,
        loaded=total.loaded,
        stored=total.stored,
        operations=total.operations,
        products=batches * found.products,
        operands=a.dtype.name,
        steps=steps,
        waiting=total.loaded / programs / max(1, steps),
        ahead=max(1, min(shape.num_stages - 1, found.trips)) if tensor else 1,
    )


def _fold_tiles(total: Total, constants: Mapping[str, int], tiles: int, itemsize: int) -> None:
    """Add what splits of k take in the end: each program stores its partial tile and counts itself
    in; the last one of a group loads those of its group, the last of all their sums."""
    splits, group = constants["SPLITS"], constants["GROUP"]
    size = constants["BLOCK_M"] * constants["BLOCK_N"]
    groups = cdiv(splits, group)
    levels = [group] if groups == 1 else [group, groups]
    counts = splits if groups == 1 else splits + groups
    resets = groups + (groups > 1)
    total.stored += tiles * (itemsize * size * counts + _COUNTER_BYTES * (counts + resets))
    total.loaded += tiles * (itemsize * size + _COUNTER_BYTES) * counts
    total.operations += tiles * size * counts
    total.steps += sum(1 + cdiv(n, at_once(size)) for n in levels)  # the counter; partial tiles


def _fold(total: Total, body: Iterable[Statement], programs: int) -> None:
    """Add what a full reduction takes in the end: each program publishes its partials, the last one
    to count itself in reads them all (`kernels/reduce.py`)."""
    reductions = [s for s in body if isinstance(s, Reduce)]
    for s in reductions:
        fold = fold_of(s)
        size, trips = _FOLD_BYTES[fold.type], cdiv(programs, FOLD_BLOCK)
        total.stored += size * programs
        total.loaded += size * (programs if fold.kind == "sum" else trips * FOLD_BLOCK)
        total.operations += trips * FOLD_BLOCK
        total.steps += trips
    if reductions:
        total.loaded += _COUNTER_BYTES * programs
        total.stored += _COUNTER_BYTES * (programs + 1)
