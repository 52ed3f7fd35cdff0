"""What a Triton launch issues: bytes, operations, and how often its programs wait for memory.

In: the `Source` of a kernel, the values of its sizes, its `Geometry`. Out: a `Work` for each kernel
that runs in the launch. Counted is what the printed text does, by printing it: trip counts times
accesses of each program, also where several programs or passes read the same addresses. A lane
that is masked off moves no bytes, but it takes part in the arithmetic.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tracejit.codegen.attention_work import PER_SCORE, walk
from tracejit.codegen.geometry import Geometry, cdiv
from tracejit.codegen.language import Line
from tracejit.codegen.statements import all_statements
from tracejit.codegen.triton import Source
from tracejit.codegen.triton_attention import Attention, attention, attention_of, functions_of
from tracejit.codegen.triton_body import Body, Dims
from tracejit.codegen.triton_foreach import chunks_of, foreach, is_reduced, words_of
from tracejit.codegen.triton_forms import FOLD_BLOCK, form_of, pointwise, reduce
from tracejit.codegen.triton_matmul import contraction, matmul
from tracejit.codegen.triton_rows import ENDS, rows
from tracejit.codegen.triton_scan import scan
from tracejit.codegen.triton_scatter import scatter, scatter_of
from tracejit.codegen.triton_sort import sort
from tracejit.codegen.triton_text import Dim, fold_of
from tracejit.ir.ops import OPS
from tracejit.kernels.tiles import dot_path
from tracejit.schedule.cpu.access import axes_of, extents_of, has_value, variables
from tracejit.schedule.foreach import columns_of, rows_of
from tracejit.schedule.kernel import (
    Axis,
    Compute,
    Kernel,
    Load,
    Mask,
    Reduce,
    Statement,
    Store,
    Var,
)
from tracejit.schedule.sizes import substitute
from tracejit.schedule.traffic import ENUMERATED, points_inside

PER_ONLINE = 6  # operations besides the exponential that take a value into a sum of such
PER_INDEX = 16  # operations that tell whether an index is a program's, and how many are before
PER_COMPARISON = 8  # operations that tell which of two elements stands first
WORD_BYTES = 8  # of an address, or of what a table says of a chunk
_SCALAR_BYTES = 8  # of a runtime scalar in the table
_COUNTER_BYTES = 4  # of what tells the last program of a full reduction
_FOLD_BYTES = {"tl.float64": 8, "tl.int64": 8, "tl.float32": 4, "tl.int32": 4}


@dataclass(frozen=True)
class Work:
    """What the programs of one kernel issue together.

    loaded, stored: bytes, those of runtime scalars and of a reduction's partials included.
    operations: of element-wise work and reductions; an addition is 1, others as their Op says.
    products: multiplications and additions of a contraction, 2 for each product of whole tiles.
    operands: the dtype of the contraction's operands, "" without one.
    steps:    how often the longest program waits for memory, one time after another: the trips of
        its loops, each as often as the place of a load depends on what was loaded.
    waiting:  bytes that a program waits for at a time, on average.
    ahead:    how many trips of a loop may be loaded at a time, if the hardware copies by itself.
    """

    form: str
    programs: int
    loaded: int = 0
    stored: int = 0
    operations: int = 0
    products: int = 0
    operands: str = ""
    steps: int = 0
    waiting: float = 0.0
    ahead: int = 1

    @property
    def issued(self) -> int:
        """Bytes loaded and stored."""
        return self.loaded + self.stored


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
    bodies: list[_Count] = []

    def make(kernel: Kernel) -> _Count:
        bodies.append(_Count(kernel, sizes))
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
        matmul(kernel, source.precision, make=make)
        return _contraction(kernel, sizes, shape, bodies)
    if form == "attention":
        attention(kernel, source.precision, make=make)
        return _attended(attention_of(kernel), sizes, shape, bodies)
    printer = {"pointwise": pointwise, "reduce": reduce, "rows": rows}[form]
    printer(kernel, variant, make=make)
    (body,) = bodies
    constants, total = shape.constants, _Total()
    for section in body.sections:
        dims, extents, trips = section.dims, {}, 1
        if "x" in dims:
            trips = constants.get("STEPS", 1)
            extents["x"] = _Blocks(_numel(dims["x"], sizes), programs * trips, constants["BLOCK"])
        if "o" in dims:
            extents["o"] = _Blocks(_numel(dims["o"], sizes), programs, constants["BLOCK_O"])
        if "i" in dims:
            inner, ends = _numel(dims["i"], sizes), constants.get("UNIT", 1) - 1
            trips = cdiv(inner, constants["BLOCK_I"]) if "looped" in variant else 1
            extents["i"] = _Blocks(inner - ends, trips, constants["BLOCK_I"])
            if section.block == ENDS:
                trips, extents["i"] = 1, _Blocks(ends, 1, 2 * constants["UNIT"])
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

    def make(inner: Kernel) -> _Count:
        bodies.append(_Count(inner, {"n0": max(rows_of(kernel, sizes))}))
        return bodies[-1]

    foreach(kernel, make=make)
    (body,) = bodies
    chunks = np.concatenate(chunks_of(kernel, sizes))
    steps, total = constants["STEPS"], _Total()
    elements = int((chunks[:, 2] - chunks[:, 1]).sum())
    extents = {"x": _Blocks(elements, programs * steps, constants["BLOCK"])}
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


def _scattered(kernel: Kernel, sizes: Mapping[str, int], shape: Geometry, body: _Count) -> Work:
    """The work of a scatter: each program goes over all indices, each source is taken once."""
    s, constants, programs = scatter_of(kernel), shape.constants, shape.grid[0]
    blocks = programs // constants["PARTS"]
    extents = {"x": _Blocks(_numel(kernel.axes, sizes), blocks, constants["BLOCK"])}
    indices, total = _numel(s.stage.axes, sizes), _Total()
    sections = [section for section in body.sections if section.dims]
    if s.before is not None:
        size = sizes.get(s.places, s.places)
        total.add(body, sections.pop(0), extents, size * blocks, constants["RANGE"])
    choosing, storing = sections
    if s.chooses:
        trips = cdiv(indices, constants["IDS"])
        ids = _Blocks(indices, trips, constants["IDS"])
        total.add(body, choosing, {"t": ids}, trips * programs, trips)
        total.operations += trips * programs * constants["IDS"] * PER_INDEX
    else:
        total.add(body, choosing, extents, indices * programs, indices)
    total.add(body, storing, extents, indices * blocks, cdiv(indices, constants["PARTS"]))
    total.loaded += body.scalar_bytes * programs
    return total.work("scatter", programs, total.waiting(programs))


def _scanned(kernel: Kernel, sizes: Mapping[str, int], shape: Geometry, body: _Count) -> Work:
    """The work of a running result: a tree over each tile takes as many combinations for each
    element as it has levels."""
    programs, total, constants = shape.grid[0], _Total(), shape.constants
    block_o, block_i = constants["BLOCK_O"], constants["BLOCK_I"]
    row = _numel(kernel.stages[0].axes, sizes)
    trips = cdiv(row, block_i)
    extents = {
        "o": _Blocks(_numel(kernel.axes, sizes), programs, block_o),
        "i": _Blocks(row, trips, block_i),
    }
    for section in (s for s in body.sections if s.dims):
        total.add(body, section, extents, trips * programs, trips)
    total.operations += trips * programs * block_o * block_i * max(1, block_i.bit_length() - 1)
    total.loaded += body.scalar_bytes * programs
    return total.work("scan", programs, total.waiting(programs))


def _sorted(kernel: Kernel, sizes: Mapping[str, int], shape: Geometry, body: _Count) -> Work:
    """The work of sorting: each program compares its elements with all of their row, or in as many
    steps as a network has."""
    programs, total, constants = shape.grid[0], _Total(), shape.constants
    rows, row = _numel(kernel.axes, sizes), _numel(kernel.stages[0].axes, sizes)
    count = _numel(kernel.stages[1].axes, sizes)
    block, others = constants["BLOCK"], constants.get("OTHERS", 0)
    if not others:
        mine, stored = (section for section in body.sections if section.dims)
        total.add(body, mine, {"x": _Blocks(row, 1, block)}, programs, 1)
        total.add(body, stored, {"x": _Blocks(count, 1, block)}, programs, 0)
        bits = block.bit_length() - 1
        total.operations += rows * block * (bits * (bits + 1) // 2) * PER_COMPARISON
        return total.work("sort", programs, total.waiting(programs))
    blocks, trips = cdiv(row, block), cdiv(row, others)
    mine, other, stored = (section for section in body.sections if section.dims)
    total.add(body, mine, {"x": _Blocks(row, blocks, block)}, programs, 1)
    total.add(body, other, {"y": _Blocks(row, trips, others)}, programs * trips, trips)
    total.add(body, stored, {"x": _Blocks(count, blocks, block)}, programs, 0)
    total.operations += rows * blocks * trips * block * others * PER_COMPARISON
    total.loaded += body.scalar_bytes * programs
    return total.work("sort", programs, total.waiting(programs))


def _contraction(
    kernel: Kernel, sizes: Mapping[str, int], shape: Geometry, bodies: Sequence[_Count]
) -> Work:
    """The work of a matmul: its loop over k, and its epilogue."""
    c, constants, programs = contraction(kernel), shape.constants, shape.grid[0]
    extents = {}
    for name, axis in (("m", c.m), ("n", c.n), ("k", c.dot.k)):
        block, n = constants[f"BLOCK_{name.upper()}"], _numel([axis], sizes)
        extents[name] = _Blocks(n, cdiv(n, block), block)
    trips = extents["k"].count
    loop, total = _Total(), _Total()
    depths = []
    for body in bodies[:2]:
        before = loop.steps
        for section in body.sections:
            loop.add(body, section, extents, programs * trips, trips)
        depths.append(loop.steps - before)
        loop.loaded += body.scalar_bytes * programs * trips
    total.steps = max(depths)  # neither operand waits for the other
    epilogue = bodies[2]
    for section in epilogue.sections:
        total.add(epilogue, section, extents, programs if section.dims else 1, 1)
    total.loaded += epilogue.scalar_bytes * programs
    _fold(total, c.stage.body, programs)
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
    a: Attention, sizes: Mapping[str, int], shape: Geometry, bodies: Sequence[_Count]
) -> Work:
    """The work of attention: of each function, for the blocks that it is called for."""
    constants, programs, total = shape.constants, shape.grid[0], _Total()
    extents = {x: _numel([axis], sizes) for x, axis in zip("mncd", a.attend.axes, strict=True)}
    blocks = {x: constants[f"BLOCK_{x.upper()}"] for x in extents}
    batches, found = _numel(a.batch, sizes), walk(a, extents["m"], extents["n"], constants)
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
                total.loaded += size * _inside(elements(dims), mask, body.extents)
            for size, dims in section.stores:
                total.stored += size * elements(dims)
            for dims, cost in section.operations.items():
                tile = math.prod(blocks[x] for x in dims)
                total.operations += cost * batches * len(pairs) * tile
            depth = max(depth, section.depth)
        total.loaded += body.scalar_bytes * batches * len(pairs)
    total.operations += batches * found.scores * PER_SCORE * blocks["m"] * blocks["n"]
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


def _fold(total: _Total, body: Iterable[Statement], programs: int) -> None:
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


# --- counting what is printed -----------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """A dim of a tile: its elements, in how many blocks they are walked, elements of a block."""

    elements: int
    count: int
    block: int


@dataclass
class _Section:
    """What was printed while the tile had these dims; `block` is that of the last one."""

    dims: Mapping[str, Sequence[Axis]]
    block: str = ""
    loads: list[tuple[int, Dims, Mask]] = field(default_factory=list)  # bytes of an element, …
    stores: list[tuple[int, Dims]] = field(default_factory=list)
    operations: Counter[Dims] = field(default_factory=Counter)
    depth: int = 0  # how many loads wait one for another


class _Count(Body):
    """Prints statements as a Body does, and keeps what was printed over which dims."""

    def __init__(self, kernel: Kernel, sizes: Mapping[str, int]):
        super().__init__(kernel)
        self._section = _Section({})
        self.sections = [self._section]
        self._depths: dict[int, int] = {}  # of the loads that a value is made of
        plain = substitute(kernel, sizes)
        self.extents = extents_of(plain)
        here, there = map(_loads, (kernel, plain))
        self._masks = {id(s): t.mask for s, t in zip(here, there, strict=True)}

    @property
    def scalar_bytes(self) -> int:
        """Of the runtime scalars that the function reads."""
        return _SCALAR_BYTES * len(self.used_scalars)

    def enter(self, *dims: Dim) -> None:
        super().enter(*dims)
        self._begin()

    def leave(self, dim: Dim, mark: tuple | None = None) -> None:
        super().leave(dim, mark)
        self._begin()

    def _begin(self) -> None:
        dims = {name: dim.axes for name, dim in self.dims.items()}
        self._section = _Section(dims, next((d.block for d in reversed(self.dims.values())), ""))
        if not any(dim.full for dim in self.dims.values()):  # else printed again with a mask
            self.sections.append(self._section)

    def lines_of(self, s: Statement) -> list[Line]:
        if not isinstance(s, Store):
            self._depths[s.out.id] = self._depth(s) + isinstance(s, Load)
        return super().lines_of(s)

    def given(self, out: Var) -> None:
        self._depths.pop(out.id, None)
        super().given(out)

    def _depth(self, s: Statement) -> int:
        return max((self._depths.get(v.id, 0) for v in variables(s)), default=0)

    def load_text(self, s: Load, zero_outside: bool = False) -> tuple[list[Line], str]:
        size = self.buffers[s.buffer].itemsize
        self._section.loads.append((size, self.load_dims(s), self._masks[id(s)]))
        self._section.depth = max(self._section.depth, self._depth(s) + 1)
        return super().load_text(s, zero_outside)

    def store(self, s: Store) -> list[Line]:
        size, dims = self.buffers[s.buffer].itemsize, frozenset(self.dims)
        self._section.stores.append((size, dims))
        if s.fold:
            self._section.loads.append((size, dims, ()))
            there = self._depth(replace(s, value=0))  # it waits for its place, not for the value
            self._section.depth = max(self._section.depth, there + 1)
        return super().store(s)

    def compute(self, s: Compute) -> list[Line]:
        lines = super().compute(s)
        if lines:  # else it has a name already
            self._section.operations[self.value_dims(s.out)] += s.op.cost
        return lines

    def reduced_value(self, reduce: Reduce, over: Dims) -> str:
        self._section.operations[frozenset(self.dims)] += 1
        return super().reduced_value(reduce, over)

    def online(self, most: str, total: str, value: str) -> str:
        self._section.operations[frozenset(self.dims)] += OPS["exp"].cost + PER_ONLINE
        return super().online(most, total, value)


def _loads(kernel: Kernel) -> list[Load]:
    return [s for s in all_statements(kernel) if isinstance(s, Load)]


@dataclass
class _Total:
    """Bytes and operations of all programs, steps of one."""

    loaded: int = 0
    stored: int = 0
    operations: int = 0
    steps: int = 0

    def waiting(self, programs: int) -> float:
        """Bytes that a program waits for at a time."""
        return self.loaded / programs / max(1, self.steps)

    def work(self, form: str, programs: int, waiting: float) -> Work:
        """All of it, without a contraction's products."""
        return Work(
            form,
            programs,
            self.loaded,
            self.stored,
            self.operations,
            steps=self.steps,
            waiting=waiting,
        )

    def add(
        self, body: _Count, section: _Section, blocks: Mapping[str, _Blocks], tiles: int, trips: int
    ) -> None:
        """Add a section of which so many tiles are computed, by so many trips of a program."""

        def elements(dims: Dims) -> int:
            """All that exist, over all tiles, of what varies over some dims."""
            others = tiles // math.prod(blocks[d].count for d in dims)
            return others * math.prod(blocks[d].elements for d in dims)

        for size, dims, mask in section.loads:
            self.loaded += size * _inside(elements(dims), mask, body.extents)
        for size, dims in section.stores:
            self.stored += size * elements(dims)
        for dims, cost in section.operations.items():
            self.operations += cost * tiles * math.prod(blocks[d].block for d in dims)
        self.steps += trips * section.depth


def _inside(points: int, mask: Mask, extents: Mapping[str, int]) -> int:
    """Those of some points where a mask holds; all, where values decide or there are too many."""
    bounds = tuple(b for b in mask if not has_value(b.index))
    axes = tuple(Axis(n, extents[n]) for n in sorted({n for b in bounds for n in axes_of(b.index)}))
    total = math.prod(a.extent for a in axes)
    if not bounds or not 0 < total <= ENUMERATED:
        return points
    return points * points_inside(bounds, axes) // total


def _numel(axes: Sequence[Axis], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.get(a.extent, a.extent) for a in axes)
