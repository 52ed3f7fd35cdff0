"""How a contraction is cut: registers, tiles, threads, packed operands, scratch memory.

In: a Kernel whose first stage has a Dot, with plain numbers as sizes, and how wide the machine's
vectors are. Out: its `Tiling`; and `Contraction`, the kernel's geometry under a tiling, which the
printer of its tasks reads too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tracejit.ir.types import DType, f32, f64, i64
from tracejit.schedule.cpu.access import contiguity, stride
from tracejit.schedule.cpu.cost import GRAIN, MAX_CHUNKS, weight
from tracejit.schedule.cpu.digits import is_split
from tracejit.schedule.cpu.plan import LINE, CpuKernel, Tiling
from tracejit.schedule.cpu.registers import accumulators, blocking, few_registers, vectors_of
from tracejit.schedule.cpu.windows import Windows, windows_of
from tracejit.schedule.cpu.winograd import Winograd, winograd_of
from tracejit.schedule.kernel import Axis, Dot, Kernel, Load, Operand, Stage, Statement

STRIP_BYTES = 16 << 10  # of a strip of B that stays in the first cache under all rows of a tile
ROW_DEPTH = 8  # of k in a pass of a product of one row: so many rows of B are read side by side
PACKED_WIDTH = 64  # of n and of k, from which on A is packed, even if it could be read as it lies
PACKED_DEPTH = 256  # of k in a unit of packing
PACKED_ROWS = 16  # of A in a unit of packing
PACKED_ROWS_LEAST = 48  # of A, for which all of a B whose lines collide is packed
PACKED_ROWS_MANY = 256  # for which B is packed if its rows do not start lines (few registers)
NEAR_DEPTH = 128  # of k, up to which an A along m is read where it lies (few registers)
PACKED_BYTES = 128 << 10  # a larger B is packed, even if it could be read as it lies
NARROW = 8  # columns of the result, fewer than which are not worth vectors
PANEL_ROWS = 2048  # the most of a result whose tiles pack their own part of B
PANEL_COLUMNS = 128  # of such a tile
PANEL_TILE = 32 << 10  # and its elements
PANEL_DEPTH = 256  # of k that it packs at once
WINDOWS_ROWS = 6  # of a micro-kernel that reads A through windows: each has an address,
WINDOWS_COLUMNS = 64  # of a tile,
WINDOWS_TILE = 8 << 10  # its elements,
WINDOWS_BYTES = 512 << 10  # and the part of B under it
COPIED_AT_ONCE = 4096  # elements in a unit of copying
SLICED_BYTES = 64 << 10  # of a result whose k is dealt to threads
SUMS_GRAIN = 16384  # of their sums: threads have just been at work, so that a launch is cheap
SUMS_CHUNKS = 8
SLICED_WIDTH = 256  # rows and columns of one whose slices pack their operands pass by pass
ROWS_COLLIDE = 4096  # bytes between rows of which a cache does not hold a micro-kernel's
LINES_COLLIDE = 2048  # bytes between lines of which a cache does not hold a strip
SCRATCH = 2 << 20  # bytes of packed operands after which a batch is done in several rounds


def orient(kernel: CpuKernel) -> CpuKernel:
    """Exchange rows and columns of a contraction where the operand that becomes A is then read
    through windows, or where that lets the rest of the body go along memory: a linear layer's
    weight gradient is made for the transposed weight."""
    if not has_contraction(kernel.kernel):
        return kernel
    stage, *rest = kernel.kernel.stages
    *batch, m, n = stage.axes
    dot = stage.dot
    dot = replace(dot, a=dot.b, a_value=dot.b_value, b=dot.a, b_value=dot.a_value)
    turned = replace(stage, axes=(*batch, n, m), dot=dot)
    other = replace(kernel, kernel=replace(kernel.kernel, stages=(turned, *rest)))
    for either in (kernel, other):
        if by_winograd(either.kernel) is not None:
            return either
    here, there = by_windows(kernel.kernel), by_windows(other.kernel)
    if here is not None or there is not None:  # the side that is read more often
        return other if here is None or (there is not None and there.share < here.share) else kernel
    if _is_sliced(stage) and _lie_across(stage.dot, m, n):
        return other if m.extent > n.extent else kernel  # it is A that is packed
    if 1 in (m.extent, n.extent) or contiguity(m, stage.body) <= contiguity(n, stage.body):
        return kernel
    return other


def by_windows(kernel: Kernel) -> Windows | None:
    """The windows through which a contraction reads A, if it is to read so."""
    stage = kernel.stages[0]
    *batch, m, n = stage.axes
    acc = accumulator(stage.dot)
    if batch or acc is i64 or n.extent < NARROW or not m.extent * stage.dot.k.extent:
        return None
    found = windows_of(m, stage.dot.k, stage.dot.a)
    if found is None or not found.is_worth_a_copy(acc.itemsize):
        return None
    # what is read once is better packed as B, a tile of pixels at a time
    few = n.extent * stage.dot.k.extent <= PANEL_TILE
    return None if few and found.share >= 1 and found.runs_along_rows else found


def by_winograd(kernel: Kernel) -> Winograd | None:
    """The convolution that a contraction computes by transforms, if it is to do so."""
    windows, stage = by_windows(kernel), kernel.stages[0]
    return None if windows is None else winograd_of(windows, stage.dot, stage.axes[-1].extent)


def tile(kernel: CpuKernel, vector_bytes: int) -> CpuKernel:
    """Choose how a contraction is cut for registers, caches and threads, and what is packed."""
    if not has_contraction(kernel.kernel):
        return kernel
    return replace(kernel, tiling=_tiling(kernel.kernel, vector_bytes))


def has_contraction(kernel: Kernel) -> bool:
    """Whether a kernel's first stage starts with a contraction; no other stage has one."""
    return bool(kernel.stages) and kernel.stages[0].dot is not None


def _tiling(kernel: Kernel, vector_bytes: int) -> Tiling:
    """The tiling of a kernel's contraction."""
    stage = kernel.stages[0]
    *batch, m_axis, n_axis = stage.axes
    m, n, k = m_axis.extent, n_axis.extent, stage.dot.k.extent
    batches, acc = math.prod(a.extent for a in batch), accumulator(stage.dot)
    lanes, size = vector_bytes // acc.itemsize, acc.itemsize
    windows = by_windows(kernel)
    panels = windows is None and _by_panels(stage.dot, m_axis, n_axis)
    # a panel is packed strip by strip: a strip of several vectors reads whole lines of a cache
    most_rows = WINDOWS_ROWS if windows is not None or panels else 14
    sums = accumulators(vector_bytes)
    winograd = by_winograd(kernel)
    if winograd is not None:
        return _for_winograd(kernel, winograd, vector_bytes)
    work = batches * m * n * k * 2 // lanes
    undealt = panels or (windows is not None and m + n > SLICED_WIDTH)
    way, slices = "tiles", 1 if undealt else _slices(stage, lanes)
    dealt = slices == 1 or not few_registers(sums)
    cut = blocking(max(m, 1), max(n, 1), lanes, sums, size, most_rows, dealt)
    if _by_dots(stage.axes, stage.dot, batches):
        way, cut = "dots", (1, 1, m, n)
    elif panels:
        way, cut = "panels", _for_panels(cut, batches, m, n, work, cut[1] * lanes)
    elif not batch and slices == 1 and windows is not None:
        way, cut = "windows", _for_windows(cut, m, n, k, work, lanes, size)
    if slices > 1:  # one tile
        rows, vectors, *_ = cut
        way, cut = "slices", (rows, vectors, -(-m // rows) * rows, -(-n // lanes) * lanes)
    elif work // GRAIN > 1 and way == "tiles":  # enough tiles for all threads
        cut = _for_threads(cut, batches, m, n, work)
    too_deep = k * cut[1] * vector_bytes > STRIP_BYTES
    deep = (too_deep and slices == 1) or way in ("panels", "windows")
    deep = deep or (slices > 1 and windows is not None)
    a, packed_from = _packed(stage.dot, m_axis, n_axis, cut[1], lanes, few_registers(sums))
    if way == "panels" or (way == "slices" and deep):
        packed_from = -(-n // (cut[1] * lanes))
    elif way == "windows":
        a, packed_from = "copied" if _plain_image(windows, stage.dot) is None else "direct", 0
    tiling = Tiling(vector_bytes, way, *cut, slices, a, packed_from, deep, batches, 1, 1)
    whole = Contraction(kernel, tiling)
    round_ = max(1, batches)
    if whole.per_batch:
        round_ = max(1, min(batches, SCRATCH // (whole.per_batch * size)))
    tiling = replace(tiling, round=round_)
    cost = work + batches * m * n * weight(stage.body)
    chunks, pack_chunks = _chunks(Contraction(kernel, tiling), cost)
    return replace(tiling, chunks=chunks, pack_chunks=pack_chunks)


def accumulator(dot: Dot) -> DType:
    """The dtype that a contraction sums in."""
    if not dot.out.dtype.is_float:
        return i64
    return f64 if dot.out.dtype is f64 else f32


def plain(body: Sequence[Statement], value: Operand, acc: DType, unit: str = "") -> Load | None:
    """The only statement of a side, if it is a load that a micro-kernel can do itself; with `unit`
    one that walks this axis element by element."""
    if len(body) != 1 or not isinstance(body[0], Load) or body[0].out != value:
        return None
    load = body[0]
    by_axes = all(isinstance(atom, str) for atom, _ in load.index.terms)
    if load.mask or not by_axes or load.out.dtype is not acc:
        return None
    return load if not unit or (unit, 1) in load.index.terms else None  # not backwards


def _plain_image(windows: Windows, dot: Dot) -> Load | None:
    """The load that windows can read where it lies."""
    return plain(windows.apart, dot.a_value, accumulator(dot))


def _by_dots(axes: Sequence[Axis], dot: Dot, batches: int) -> bool:
    """Whether each result is a loop over k of its own: a vector's product, along both sides."""
    narrow = 1 in (axes[-2].extent, axes[-1].extent)
    along = all(contiguity(dot.k, side) > 0 for side in (dot.a, dot.b))
    return narrow and along and accumulator(dot) is not i64 and len(axes) == 2 and batches > 0


def _by_panels(dot: Dot, m: Axis, n: Axis) -> bool:
    """Whether each tile packs its own part of B: what is read at quotients and remainders of the
    axes (the windows of an image) is many times larger packed than where it lies."""
    if accumulator(dot) is i64 or not m.extent * n.extent * dot.k.extent:
        return False
    if m.extent < PACKED_ROWS_LEAST and _collides(dot) and n.extent >= PANEL_ROWS:
        return True
    return m.extent <= PANEL_ROWS and is_split((n, dot.k), dot.b)


def _collides(dot: Dot) -> bool:
    """Whether lines of B that a micro-kernel reads one after another drive each other out of a
    cache."""
    step = _step(dot.b, dot.k) * accumulator(dot).itemsize
    return dot.k.extent >= 128 and step % LINES_COLLIDE == 0


def _for_panels(
    cut: tuple[int, int, int, int], batches: int, m: int, n: int, work: int, strip: int
) -> tuple[int, int, int, int]:
    """Tiles of all rows, so that nothing is packed twice, and as many columns as stay in the second
    cache; fewer if there were too few tiles for threads."""
    rows, vectors, *_ = cut
    tall = -(-m // rows) * rows
    strips = max(1, min(PANEL_TILE // (tall * strip), PANEL_COLUMNS // strip, -(-n // strip)))
    wanted = min(work // GRAIN, 16)
    while strips > 1 and batches * -(-n // (strips * strip)) < wanted:
        strips = -(-strips // 2)
    tiles = -(-n // (strips * strip))
    strips = -(-n // (tiles * strip))  # as many tiles, of one size
    return rows, vectors, tall, strips * strip


def _for_windows(
    cut: tuple[int, ...], m: int, n: int, k: int, work: int, lanes: int, size: int
) -> tuple[int, int, int, int]:
    """Tiles under whose columns B stays in the second cache, and tall ones where that is narrow."""
    rows, vectors, *_ = cut
    strip = vectors * lanes
    columns = min(WINDOWS_COLUMNS, WINDOWS_BYTES // size // k, -(-n // lanes) * lanes)
    columns = max(1, columns // strip) * strip
    tall = max(1, WINDOWS_TILE // columns // rows) * rows
    cut = rows, vectors, min(tall, -(-m // rows) * rows), columns
    return _for_threads(cut, 1, m, n, work)


def _for_winograd(kernel: Kernel, w: Winograd, vector_bytes: int) -> Tiling:
    """The tiling of a convolution by transforms: a tile is a unit under one strip."""
    stage = kernel.stages[0]
    lanes = vector_bytes // 4
    rows, vectors, *_ = blocking(w.products[0], w.columns, lanes, accumulators(vector_bytes), 4)
    image = _plain_image(by_windows(kernel), stage.dot)
    a = "direct" if image is not None and w.steps_as_in(image.index) else "copied"
    tiling = Tiling(
        vector_bytes, "winograd", rows, vectors, w.rows, vectors * lanes, 1, a, 0, True, 1, 1, 1
    )
    c = Contraction(kernel, tiling)
    cost = c.per_batch * (weight((*stage.dot.a, *stage.dot.b)) + 2)
    packs = max(1, min(c.a_units + c.b_units, cost // GRAIN, MAX_CHUNKS))
    return replace(tiling, chunks=w.chunks, pack_chunks=packs)


def _is_sliced(stage: Stage) -> bool:
    """Whether k of a product of floats is dealt to threads on any machine; its operands are read
    through no windows."""
    *_, m, n = stage.axes
    acc = accumulator(stage.dot)
    if acc is i64 or 1 in (m.extent, n.extent):
        return False
    return _slices(stage, LINE // acc.itemsize) > 1 and not _by_panels(stage.dot, m, n)


def _lie_across(dot: Dot, m: Axis, n: Axis) -> bool:
    """Whether both operands lie along their own axes, not along k."""
    along_m = contiguity(m, dot.a) > contiguity(dot.k, dot.a)
    return along_m and contiguity(n, dot.b) > contiguity(dot.k, dot.b)


def _slices(stage: Stage, lanes: int) -> int:
    """In how many parts k is dealt to threads, for results much smaller than the operands.

    A thread then reads its own part of the operands only, the part that it wrote itself where a
    later kernel of the same step updates them by rows.
    """
    *batch, m, n = (a.extent for a in stage.axes)
    k, size = stage.dot.k.extent, accumulator(stage.dot).itemsize
    unfit = k < 4 * max(m, n) or m * n * size > SLICED_BYTES or not m * n
    if batch or unfit or _by_dots(stage.axes, stage.dot, 1):
        return 1
    most = min(m * n * k * 2 // lanes // GRAIN, k // 128)
    return next((slices for slices in (8, 4, 2) if slices <= most), 1)


def _for_threads(
    cut: tuple[int, int, int, int], batches: int, m: int, n: int, work: int
) -> tuple[int, int, int, int]:
    """Tiles small enough that there are several for each of a few threads."""
    wanted = min(work // GRAIN, 16)
    rows, vectors, tall, wide = cut
    columns = -(-n // wide)
    while tall > rows and batches * -(-m // tall) * columns < wanted:
        tall = max(rows, -(-tall // 2 // rows) * rows)
    return rows, vectors, tall, wide


def _packed(dot: Dot, m: Axis, n: Axis, vectors: int, lanes: int, few: bool) -> tuple[str, int]:
    """How A is read, and which strips of B are packed: all, the ragged last one, or none. `few`:
    there are few registers."""
    acc, k, strip = accumulator(dot), dot.k, vectors * lanes
    a = "direct"
    if plain(dot.a, dot.a_value, acc) is None:  # in the order that most of its loads have
        a = "rows" if contiguity(k, dot.a) >= contiguity(m, dot.a) else "strips"
    elif n.extent >= PACKED_WIDTH and k.extent >= PACKED_WIDTH:  # enough products for each element
        if contiguity(m, dot.a) > contiguity(k, dot.a):
            near = few and k.extent <= NEAR_DEPTH and not _drives_out(dot, k.extent)
            a = "direct" if near else "strips"
        elif _step(dot.a, m) * acc.itemsize % ROWS_COLLIDE == 0:
            a = "rows"
    large = m.extent >= 128 and k.extent * n.extent * acc.itemsize >= PACKED_BYTES
    large = large or (_collides(dot) and m.extent >= PACKED_ROWS_LEAST)
    if few and m.extent >= PACKED_ROWS_MANY:  # each vector of B that is in two lines is read often
        large = large or _step(dot.b, k) * acc.itemsize % LINE != 0
    if large or plain(dot.b, dot.b_value, acc, n.name) is None:
        return a, 0
    rest = n.extent % strip
    if sum(vectors_of(rest, lanes, acc.itemsize)) == rest:
        return a, -(-n.extent // strip)
    return a, n.extent // strip


def _drives_out(dot: Dot, lines: int) -> bool:
    """Whether so many lines of A, one for each of k, drive each other out of a cache of 8 ways of
    4096 bytes."""
    step = _step(dot.a, dot.k) * accumulator(dot).itemsize
    return lines > 8 * (4096 // math.gcd(step, 4096))


def _step(body: Sequence[Statement], axis: Axis) -> int:
    """The longest step of the loads of a side along an axis."""
    return max((stride(s.index, axis.name) for s in body if isinstance(s, Load)), default=0) or 1


def _chunks(c: Contraction, work: int) -> tuple[int, int]:
    """In how many chunks the tiles or dots are dealt, and the units of packing."""
    tiles = c.row_tiles * c.column_tiles
    if c.tiling.way == "dots":
        count = c.m.extent * c.n.extent
        return max(1, min(count, work // GRAIN, MAX_CHUNKS)), 1
    if c.tiling.way == "slices":  # the sums of all slices, by rows
        cost = c.m.extent * c.n.extent * (2 * c.tiling.slices + weight(c.stage.body))
        chunks = min(c.m.extent, cost // SUMS_GRAIN, SUMS_CHUNKS)
        return chunks + chunks % 2 if 1 < chunks < c.m.extent else max(1, chunks), 1
    chunks = max(1, min(c.round * tiles, work // max(c.rounds, 1) // GRAIN, MAX_CHUNKS))
    if chunks > 1:
        chunks = min(c.round * tiles, MAX_CHUNKS)
    units = c.round * (c.a_units + c.b_units)
    cost = c.round * c.per_batch * (weight((*c.dot.a, *c.dot.b)) + 2)
    return chunks, max(1, min(units, cost // GRAIN, MAX_CHUNKS))


class Contraction:
    """The geometry of a kernel's contraction under a tiling."""

    def __init__(self, kernel: Kernel, tiling: Tiling):
        self.kernel, self.tiling = kernel, tiling
        self.stage = kernel.stages[0]
        self.dot = self.stage.dot
        *batch, self.m, self.n = self.stage.axes
        self.batch: tuple[Axis, ...] = tuple(batch)
        self.batches = math.prod(a.extent for a in batch)
        self.k = self.dot.k
        self.acc = accumulator(self.dot)
        self.size = self.acc.itemsize
        self.lanes = tiling.vector_bytes // self.size
        self.row_tiles = -(-self.m.extent // tiling.tile_rows) if tiling.tile_rows else 0
        self.column_tiles = -(-self.n.extent // tiling.tile_columns) if tiling.tile_columns else 0
        self.strip = tiling.vectors * self.lanes
        self.strips = -(-self.n.extent // self.strip)
        self.round = tiling.round
        self.rounds = -(-self.batches // self.round) if self.batches else 0
        self.windows = by_windows(kernel) if tiling.way in ("windows", "winograd") else None
        self.winograd = by_winograd(kernel) if tiling.way == "winograd" else None

    @property
    def slices_of_panels(self) -> bool:
        """Whether each slice of k packs both operands pass by pass."""
        return self.tiling.way == "slices" and self.tiling.deep

    # --- units of packing, per batch

    @property
    def a_units(self) -> int:
        if not self.a_elements:
            return 0
        if self.windows is not None:
            return -(-self.copied_lines // self.lines_at_once)
        rows = self.m if self.tiling.a == "rows" else self.k
        return -(-rows.extent // PACKED_ROWS)

    @property
    def copied_lines(self) -> int:
        """Of what windows read: stretches of its fastest plane."""
        return math.prod(p.extent for p in self.windows.planes[:-1])

    @property
    def lines_at_once(self) -> int:
        return max(1, COPIED_AT_ONCE // self.windows.planes[-1].extent)

    @property
    def k_parts(self) -> int:
        return max(1, -(-self.k.extent // PACKED_DEPTH))

    @property
    def transforms_b(self) -> bool:
        """Whether B is transformed block by block while it is packed, and lies nowhere as it is."""
        return self.winograd is not None and self.winograd.in_k

    @property
    def b_units(self) -> int:
        if self.transforms_b:
            return 0
        return (self.strips - self.tiling.packed_from) * self.k_parts

    # --- scratch memory, in elements: A first, then the strips of B, per batch of a round

    @property
    def a_elements(self) -> int:
        if self.tiling.a == "direct" or self.slices_of_panels:
            return 0
        if self.windows is not None:
            return -(-self.windows.elements // self.lanes) * self.lanes
        rows = self.m.extent
        if self.tiling.a == "strips":
            rows = -(-rows // self.tiling.rows) * self.tiling.rows
        return -(-rows * self.a_step // self.lanes) * self.lanes

    @property
    def a_step(self) -> int:
        """From one row of packed A to the next, with a gap where rows would collide."""
        k = self.k.extent
        gap = self.tiling.a == "rows" and k * self.size % ROWS_COLLIDE == 0
        return k + LINE // self.size if gap else k

    @property
    def depth(self) -> int:
        """Of k that is summed at once where that is in `passes`, which are equal."""
        if self.tiling.way != "tiles" and (self.tiling.deep or self.tiling.way != "slices"):
            return PANEL_DEPTH
        if self.m.extent == 1 and self.tiling.packed_from:
            return ROW_DEPTH
        extent = -(-self.k.extent // self.tiling.slices)
        whole = max(1, STRIP_BYTES // self.strip_line)
        return -(-extent // -(-extent // whole))

    @property
    def strip_line(self) -> int:
        """The bytes of a cache that a strip of B takes for each of k: where it lies, a line more
        than its own."""
        own = self.strip * self.size
        split = self.tiling.packed_from and _step(self.dot.b, self.k) * self.size % LINE
        return own + LINE if split and self.few_registers else own

    @property
    def few_registers(self) -> bool:
        return few_registers(accumulators(self.tiling.vector_bytes))

    @property
    def passes(self) -> bool:
        """Whether k, or a slice of it, is summed in several passes."""
        if self.tiling.deep or self.tiling.way != "slices" or not self.few_registers:
            return self.tiling.deep
        return self.depth * self.tiling.slices < self.k.extent

    @property
    def b_elements(self) -> int:
        if self.transforms_b:
            return 0
        return (self.strips - self.tiling.packed_from) * self.strip * self.k.extent

    @property
    def table_elements(self) -> int:
        """Two tables of places, of the rows and of k, of 32 bits each."""
        if self.tiling.way != "windows":
            return 0
        return -(-(self.m.extent + self.k.extent) * 4 // self.size // self.lanes) * self.lanes

    @property
    def per_batch(self) -> int:
        packs = self.tiling.a != "direct" or self.tiling.packed_from < self.strips
        elements = self.a_elements + self.b_elements + self.table_elements
        return max(elements, self.lanes if packs else 0)

    @property
    def slices_elements(self) -> int:
        """The sums of the slices of k."""
        t = self.tiling
        return t.slices * t.tile_rows * t.tile_columns if t.way == "slices" else 0

    @property
    def scratch_bytes(self) -> int:
        if not self.batches * self.m.extent * self.n.extent:
            return 0
        if self.tiling.way == "dots":
            return self.m.extent * self.n.extent * self.size
        more = self.slices_elements
        if self.winograd is not None:
            strips = self.strips, self.strip
            more = self.winograd.shared_elements(*strips)
            more += self.tiling.chunks * self.winograd.chunk_elements(*strips)
        return (self.round * self.per_batch + more) * self.size
