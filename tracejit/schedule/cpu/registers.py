"""How many vectors a micro-kernel keeps in registers, and in which block of the result.

In: the sizes of a product, the lanes of a vector, how many vectors of sums there is room for. Out:
the block that wastes least, and the tile around it.
"""

from __future__ import annotations

from functools import lru_cache

TILE_BYTES = 32 << 10  # of a tile of the result
TILE_COLUMNS = 128
ROW_BYTES = 2 << 10  # of a tile that is one row: B is read once, and long stretches come fastest


def accumulators(vector_bytes: int) -> int:
    """How many vectors a micro-kernel may keep sums in."""
    return 24 if vector_bytes == 64 else 12


def keeps_b(rows: int, vectors: int, sums: int) -> bool:
    """Whether a micro-kernel has registers for its vectors of B too, beside the sums and one of A;
    else each row loads them again. `sums`: as many as `accumulators` says."""
    return rows > 1 and rows * vectors + vectors < (16 if few_registers(sums) else 32)


def few_registers(sums: int) -> bool:
    """Whether there are 16 vector registers, so that few products share a load: their loads and the
    time until a sum is there bound micro-kernels, and the caches what they read."""
    return sums == 12


def _loads(rows: int, vectors: int, sums: int) -> float:
    """What the loads of a micro-kernel cost for each of k, a product and sum being 1."""
    if rows > 1 and not keeps_b(rows, vectors, sums):
        return rows * vectors + rows
    # two of either start in a cycle; with 32 registers an element of A is an operand of its product
    return (rows + vectors) / (1.0 if few_registers(sums) else 1.6)


@lru_cache(1024)
def blocking(
    m: int, n: int, lanes: int, sums: int, size: int, most_rows: int = 14, dealt: bool = True
) -> tuple[int, ...]:
    """(rows and vectors of the micro-kernel, rows and columns of the tile around it).

    The micro-kernel is the one that wastes least on m × n results. `dealt`: rows are dealt to
    threads.
    """
    wide = -(-n // lanes)
    least = 8.0 if few_registers(sums) else 4.0  # products until the sum of the first is there
    best = None
    for vectors in range(1, min(4, wide) + 1):
        for rows in range(1, min(sums // vectors, most_rows, m) + 1):
            cost = sum(
                panels * strips * max(r * v, _loads(r, v, sums), least) + panels * strips
                for r, panels in ((rows, m // rows), (m % rows, 1))
                for v, strips in ((vectors, wide // vectors), (wide % vectors, 1))
                if r and v
            )
            panels = -(-m // rows)
            if dealt and panels <= 16:  # an even number of equal ones is best
                cost *= -(-panels // 2) * 2 * rows / m
            if best is None or cost < best[0]:
                best = cost, rows, vectors
    _, rows, vectors = best
    columns = wide * lanes
    strip = vectors * lanes
    most = TILE_COLUMNS if m > 1 else max(TILE_COLUMNS, ROW_BYTES // size)
    columns = min(columns, strip * max(1, most // strip))
    tall = max(1, TILE_BYTES // size // columns // rows)
    return rows, vectors, min(tall * rows, -(-m // rows) * rows), columns


def vectors_of(columns: int, lanes: int, size: int) -> tuple[int, ...]:
    """The lanes of the vectors that hold some columns: whole vectors, then the shortest one that
    holds the rest. Short ones are cheaper, because they are done two at a time."""
    whole, rest = divmod(columns, lanes)
    short = max(16 // size, 1 << max(rest - 1, 0).bit_length())
    return (lanes,) * whole + ((short,) if rest else ())
