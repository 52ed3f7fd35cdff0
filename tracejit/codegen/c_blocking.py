"""How a contraction is cut: registers, tiles, threads, packed operands, scratch memory.

In: a Kernel whose first stage has a Dot, with plain numbers as sizes, and what the machine's
vectors are like. Out: a `Contraction`, which the printers of its tasks read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tracejit.codegen.c_body import Body, extents_of
from tracejit.codegen.c_loops import GRAIN, Loop, contiguity, stride, unravelled, weight
from tracejit.codegen.c_text import product, value_type
from tracejit.codegen.language import Line
from tracejit.schedule.kernel import Axis, Kernel, Load, Operand, Statement

TILE_BYTES = 32 << 10  # of a tile of the result
TILE_COLUMNS = 256
WHOLE_DEPTH = 1024  # the longest k that a micro-kernel sums at once
DEPTH = 512  # of a longer k that it sums before it goes on
PACKED_DEPTH = 256  # of k in a unit of packing
PACKED_BYTES = 1 << 20  # of B, from which it is packed even where it could be read as it lies
SLICED_BYTES = 64 << 10  # of a result whose k is dealt to threads
SCRATCH = 8 << 20  # bytes of packed operands after which a batch is done in several rounds


@dataclass(frozen=True)
class Target:
    """The machine's vectors: bytes of a register, and accumulators to keep in registers."""

    vector_bytes: int = 64

    @property
    def accumulators(self) -> int:
        return 24 if self.vector_bytes == 64 else 12


@dataclass(frozen=True)
class Blocking:
    """Rows and vectors of a micro-kernel, rows and columns of a tile."""

    rows: int
    vectors: int
    tile_rows: int
    tile_columns: int


@lru_cache(1024)
def blocking(m: int, n: int, k: int, lanes: int, accumulators: int, size: int) -> Blocking:
    """The micro-kernel that wastes least on m × n results, and the tile around it: tall and narrow
    where k is long, so that few passes are made over an operand that does not fit the cache."""
    wide = -(-n // lanes)
    best = None
    for vectors in range(1, min(4, wide) + 1):
        for rows in range(1, min(accumulators // vectors, 14, m) + 1):
            cost = sum(
                panels * strips * max(r * v, (r + v) / 1.6, 4.0) + panels * strips
                for r, panels in ((rows, m // rows), (m % rows, 1))
                for v, strips in ((vectors, wide // vectors), (wide % vectors, 1))
                if r and v
            )
            panels = -(-m // rows)
            if panels <= 16:  # they are dealt to threads: an even number of equal ones is best
                cost *= -(-panels // 2) * 2 * rows / m
            if best is None or cost < best[0]:
                best = cost, rows, vectors
    _, rows, vectors = best
    columns = wide * lanes
    strip = vectors * lanes
    columns = min(columns, strip if k > WHOLE_DEPTH else strip * max(1, TILE_COLUMNS // strip))
    tall = max(1, TILE_BYTES // size // columns // rows)
    return Blocking(rows, vectors, min(tall * rows, -(-m // rows) * rows), columns)


def oriented(kernel: Kernel) -> Kernel:
    """The kernel with rows and columns of its contraction exchanged, where that lets the rest of
    the body go along memory: a linear layer's weight gradient is made for the transposed weight."""
    stage = kernel.stages[0]
    *batch, m, n = stage.axes
    if 1 in (m.extent, n.extent) or contiguity(m, stage.body) <= contiguity(n, stage.body):
        return kernel
    dot = stage.dot
    dot = replace(dot, a=dot.b, a_value=dot.b_value, b=dot.a, b_value=dot.a_value)
    stage = replace(stage, axes=(*batch, n, m), dot=dot)
    return replace(kernel, stages=(stage, *kernel.stages[1:]))


class Contraction:
    """A kernel's stage that starts with a contraction, and all decisions about it."""

    def __init__(self, kernel: Kernel, name: str, target: Target):
        self.kernel = kernel = oriented(kernel)
        self.name = name
        self.stage = kernel.stages[0]
        self.dot = self.stage.dot
        *batch, self.m, self.n = self.stage.axes
        self.batch: tuple[Axis, ...] = tuple(batch)
        self.batches = product(a.extent for a in batch)
        self.k = self.dot.k
        self.body = Body(kernel, extents_of(kernel))
        dtype = self.dot.out.dtype
        self.type = "int64_t" if not dtype.is_float else value_type(dtype)
        self.size = 8 if self.type in ("int64_t", "double") else 4
        self.lanes = target.vector_bytes // self.size
        self.vector_bytes = target.vector_bytes
        m, n, k = self.m.extent, self.n.extent, self.k.extent
        self.blocking = blocking(
            max(m, 1), max(n, 1), k, self.lanes, target.accumulators, self.size
        )
        work = self.batches * m * n * k * 2 // self.lanes
        self.by_dots = self._by_dots()
        self.slices = 1 if self.by_dots else self._slices(work)
        if self.by_dots:
            self.blocking = Blocking(1, 1, m, n)
        if self.slices > 1:  # one tile
            b = self.blocking
            rows = -(-m // b.rows) * b.rows
            columns = -(-n // self.lanes) * self.lanes
            self.blocking = Blocking(b.rows, b.vectors, rows, columns)
        elif work // GRAIN > 1 and not self.by_dots:  # enough tiles for all threads
            self.blocking = self._cut(self.blocking, work)
        b = self.blocking
        self.row_tiles, self.column_tiles = -(-m // b.tile_rows), -(-n // b.tile_columns)
        self.work = work + self.batches * m * n * weight(self.stage.body)
        self.strip = b.vectors * self.lanes
        self.strips = -(-n // self.strip)
        self.a_load = self.plain(self.dot.a, self.dot.a_value)
        self.b_load = self.plain(self.dot.b, self.dot.b_value, self.n.name)
        if m >= 128 and k * n * self.size >= PACKED_BYTES:
            self.b_load = None
        # which strips of B are packed: all, the ragged last one, or none
        self.packed_from = 0 if self.b_load is None else n // self.strip
        if self.b_load is not None and sum(self.vectors_of(n % self.strip)) == n % self.strip:
            self.packed_from = self.strips
        self.a_by_rows = self._a_by_rows()
        self.deep = k > WHOLE_DEPTH and self.slices == 1  # k is summed in several passes
        self.rounds = -(-self.batches // self.round) if self.batches else 0

    def _by_dots(self) -> bool:
        """Whether each result is a loop over k of its own: a vector's product, along both sides."""
        narrow = 1 in (self.m.extent, self.n.extent)
        along = all(contiguity(self.k, side) > 0 for side in (self.dot.a, self.dot.b))
        return narrow and along and self.type != "int64_t" and not self.batch and self.batches > 0

    def _slices(self, work: int) -> int:
        """In how many parts k is dealt to threads, for results much smaller than the operands.

        A thread then reads its own part of the operands only, the part that it wrote itself where a
        later kernel of the same step updates them by rows.
        """
        m, n, k = self.m.extent, self.n.extent, self.k.extent
        if self.batch or k < 4 * max(m, n) or m * n * self.size > SLICED_BYTES or not m * n:
            return 1
        most = min(work // GRAIN, k // 128)
        return next((slices for slices in (8, 4, 2) if slices <= most), 1)

    def _cut(self, b: Blocking, work: int) -> Blocking:
        """Tiles small enough that there are several for each of a few threads."""
        wanted = min(work // GRAIN, 16)
        m, n = self.m.extent, self.n.extent
        rows = b.tile_rows
        columns = -(-n // b.tile_columns)
        while rows > b.rows and self.batches * -(-m // rows) * columns < wanted:
            rows = max(b.rows, -(-rows // 2 // b.rows) * b.rows)
        return Blocking(b.rows, b.vectors, rows, b.tile_columns)

    def plain(
        self, body: Sequence[Statement], value: Operand, unit: str | None = None
    ) -> Load | None:
        """The only statement of a side, if it is a load that a micro-kernel can do itself."""
        if len(body) != 1 or not isinstance(body[0], Load) or body[0].out != value:
            return None
        load = body[0]
        plain = (
            not load.mask
            and all(isinstance(atom, str) for atom, _ in load.index.terms)
            and value_type(load.out.dtype) == self.type
            and not load.out.dtype.narrow
        )
        if not plain or (unit is not None and stride(load.index, unit) != 1):
            return None
        return load

    def _a_by_rows(self) -> bool:
        """Whether packed A keeps k contiguous, as most of its loads have it."""
        k, m = contiguity(self.k, self.dot.a), contiguity(self.m, self.dot.a)
        return k >= m

    def vectors_of(self, columns: int) -> tuple[int, ...]:
        """The lanes of the vectors that hold some columns: whole ones, and one no longer than it
        takes, as short ones are done two at a time."""
        whole, rest = divmod(columns, self.lanes)
        short = max(16 // self.size, 1 << max(rest - 1, 0).bit_length())
        return (self.lanes,) * whole + ((short,) if rest else ())

    # --- scratch memory, in elements: A first, then the strips of B, per batch of a round

    @property
    def a_elements(self) -> int:
        if self.a_load is not None:
            return 0
        return -(-self.m.extent * self.k.extent // self.lanes) * self.lanes

    @property
    def b_elements(self) -> int:
        return (self.strips - self.packed_from) * self.strip * self.k.extent

    @property
    def per_batch(self) -> int:
        packs = self.a_load is None or self.packed_from < self.strips
        return max(self.a_elements + self.b_elements, self.lanes if packs else 0)

    @property
    def round(self) -> int:
        """How many batches are packed at once."""
        if not self.per_batch:
            return max(1, self.batches)
        return max(1, min(self.batches, SCRATCH // (self.per_batch * self.size)))

    @property
    def scratch_bytes(self) -> int:
        if not self.batches * self.m.extent * self.n.extent:
            return 0
        if self.by_dots:
            return self.m.extent * self.n.extent * self.size
        return (self.round * self.per_batch + self.slices_elements) * self.size

    @property
    def slices_elements(self) -> int:
        """The sums of the slices of k."""
        b = self.blocking
        return self.slices * b.tile_rows * b.tile_columns if self.slices > 1 else 0

    # --- batches

    def batch_of(self, unit: str, each: int) -> list[Line]:
        """`slot`, the batch of a unit's number in this round, and its axes."""
        if not self.batch:
            return []
        lines = [Line(f"const int64_t slot = {unit} / {each};")]
        index = "slot"
        if self.round < self.batches:
            index = f"(at->round * {self.round} + slot)"
            lines.append(Line(f"if ({index} >= {self.batches}) break;"))
        return lines + unravelled([Loop(axis) for axis in self.batch], index)

    @property
    def slot(self) -> str:
        """Where the packed operands of a unit's batch start, as a term of an address."""
        return f" + slot * {self.per_batch}" if self.batch else ""
