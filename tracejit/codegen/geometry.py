"""How a Triton kernel is launched for given sizes: grid, block sizes, warps, workspace.

Also decides what the text of a kernel depends on of the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from tracejit.codegen.row_passes import row_unit
from tracejit.codegen.triton_attention import attention_of
from tracejit.codegen.triton_foreach import WARPS, chunks_of, constants_of, workspace_of
from tracejit.codegen.triton_forms import HEADER_BYTES, PARTIAL_BYTES, can_persist, form_of
from tracejit.codegen.triton_matmul import contraction, variant_of
from tracejit.codegen.triton_scatter import scatter_of
from tracejit.ir.ops import OPS
from tracejit.kernels.costs import SMS, accumulators
from tracejit.kernels.tiles import attention_tiles, tiles, workspace
from tracejit.records import dataclass
from tracejit.schedule.kernel import (
    Attend,
    Axis,
    Compute,
    FloorDiv,
    Index,
    Kernel,
    Load,
    Mod,
    Reduce,
    Statement,
    Store,
    Var,
)

BLOCK = 1024  # elements of a flat tile: 8 a thread, so that fp32 moves in two 128-bit accesses
SMALL = 1 << 17  # domains below this many elements take smaller tiles, to fill more of the GPU
LONG_ROW = 256  # elements of a row from which on its ends are apart
MAX_PROGRAMS = 1024  # of a full reduction: bounds the partials that the last program folds
MAX_TILE = 8192  # elements of a rows tile
WIDE = 512  # outer points of a scatter that one index serves
IDS = 512  # indices that a program looks through at a time
TAKEN = 2  # of them that it takes, if it can be so few
TILE_COLUMNS = 128  # of a tile of rows with numbers for each column
COLUMNS = 32  # outer points side by side where the outer axis is the contiguous one
RANKED = 128  # elements of a row whose places a program finds
NETWORK = 8192  # elements of a longer row that a program sorts at most
COMPARED = 32  # elements that they are compared with at a time
WIDE_RUN = 16  # channels of an image that are loaded together
FILLED = 256  # programs that keep a GPU busy
ARITHMETIC = 48  # operations of an epilogue that is long, as that of a GELU is


@dataclass(frozen=True)
class Geometry:
    """One launch's grid, constants and options; `workspace` in bytes."""

    grid: tuple[int]
    constants: Mapping[str, int]
    num_warps: int
    num_stages: int = 3
    workspace: int = 0


def geometry(
    kernel: Kernel,
    sizes: Sequence[int],
    precision: str,
    variants: Sequence[str],
    max_tile: int = MAX_TILE,
    sms: int = SMS,
) -> Geometry:
    """The launch of a kernel for the values of its sizes, on a GPU of so many SMs; `max_tile`
    bounds elements per tile."""
    if kernel.foreach:
        return _foreach(kernel, tuple(sizes))
    parts = list(_each(kernel, sizes, max_tile))
    plans = [_alone(*part, precision, sms, how) for part, how in zip(parts, variants, strict=True)]
    if not kernel.parts:
        return plans[0]
    dots = [p for (k, *_), p in zip(parts, plans, strict=True) if form_of(k) == "matmul"]
    warps = max(plan.num_warps for plan in dots or plans)
    constants: dict[str, int] = {}
    programs = workspace = 0
    for i, (part, how) in enumerate(zip(parts, variants, strict=True)):
        plan = _alone(*part, precision, sms, how, warps)
        constants |= {f"{name}_{i}": value for name, value in plan.constants.items()}
        constants[f"FIRST_{i}"] = programs
        programs += plan.grid[0]
        if plan.workspace:
            constants[f"WORKSPACE_{i}"] = workspace
            workspace += cdiv(plan.workspace, HEADER_BYTES) * HEADER_BYTES
    products = [contraction(k) for k, _, _ in parts if form_of(k) == "matmul"]
    stages = _stages(dots, [c.dtype.itemsize for c in products])
    return Geometry((programs,), constants, warps, stages, workspace)


def _stages(dots: Sequence[Geometry], itemsizes: Sequence[int]) -> int:
    """The most stages that one of some products has with which none of the others needs more shared
    memory than one of them does alone."""
    if not dots:
        return 3
    each = [
        (d.constants["BLOCK_M"] + d.constants["BLOCK_N"]) * d.constants["BLOCK_K"] * size
        for d, size in zip(dots, itemsizes, strict=True)
    ]
    most = max(n * d.num_stages for n, d in zip(each, dots, strict=True))
    wanted = sorted({d.num_stages for d in dots}, reverse=True)
    return next(n for n in wanted if n * max(each) <= most)


def variants(
    kernel: Kernel,
    sizes: Sequence[int],
    max_tile: int = MAX_TILE,
    precision: str = "ieee",
    sms: int = SMS,
) -> tuple[str, ...]:
    """What the sizes demand of the text of a kernel, or of each of its parts; "" if nothing.

    "looped": rows that do not fit one tile, whose inner elements are walked block by block;
    "peeled": large rows, one to a program, that begin or end within a 128-bit access, alike in all
    buffers; also "looped_peeled";
    "network": rows to sort that are long, and fit a tile;
    "ragged": a large flat domain that ends within a 128-bit access;
    "tiled": element-wise work on large rows with numbers for each column;
    "even_mnk": a product whose tiles end where its m, n and k do, or some of these: no masks;
    "split": a product of which several programs compute a tile, each for a stretch of k;
    "pieces": one whose epilogue goes over a tile in several. Also "even_k_split" and the like.
    """
    if kernel.foreach:
        return ("",)
    return tuple(_variant(*part, precision, sms) for part in _each(kernel, sizes, max_tile))


def _variant(kernel: Kernel, bound: Mapping, max_tile: int, precision: str, sms: int) -> str:
    form = form_of(kernel)
    if form == "matmul":
        return _product_variant(kernel, bound, _tiles_of(kernel, bound, precision, sms))
    if form == "rows":
        outer, inner = _numel(kernel.axes, bound), _inner_numel(kernel, bound)
        block_o, block_i = _rows_tile(kernel, outer, inner, False, max_tile)
        fits = can_persist(kernel) and block_o * block_i <= _tile_limit(kernel, max_tile)
        how = [] if fits else ["looped"]
        block_o, _ = _rows_tile(kernel, outer, inner, not fits, max_tile)
        if (
            block_o == 1
            and inner >= LONG_ROW
            and outer * inner >= SMALL
            and row_unit(kernel, bound)
        ):
            how.append("peeled")
        return "_".join(how)
    if form == "sort":
        inner = _inner_numel(kernel, bound)
        return "network" if RANKED < power_of_two(inner) <= min(NETWORK, max_tile) else ""
    if form == "pointwise" and _has_columns(kernel, bound):
        return "tiled"
    if form in ("pointwise", "reduce"):
        axes = kernel.axes or kernel.stages[0].axes
        numel = _numel(axes, bound)
        wide = min(8, 16 // min(b.dtype.itemsize for b in kernel.buffers))  # elements an access
        if len(axes) == 1 and numel >= SMALL and numel % wide:
            return "ragged"
    return ""


def _product_variant(kernel: Kernel, bound: Mapping, chosen: Mapping[str, int]) -> str:
    c, even = contraction(kernel), ""
    for name, axis in (("m", c.m), ("n", c.n), ("k", c.dot.k)):
        even += name * (_numel([axis], bound) % chosen[f"BLOCK_{name.upper()}"] == 0)
    return variant_of(even, chosen["SPLITS"] > 1, chosen["PIECES"] > 1)


def _each(
    kernel: Kernel, sizes: Sequence[int], max_tile: int
) -> Iterator[tuple[Kernel, dict[str, int], int]]:
    """A kernel, or each of its parts, with the values of its sizes and the limit of its tiles:
    beside a matmul, what its four warps can hold."""
    bound = dict(zip(kernel.sizes, sizes, strict=True))
    if not kernel.parts:
        yield kernel, bound, max_tile
    if any(form_of(part.kernel) == "matmul" for part in kernel.parts):
        max_tile = min(max_tile, MAX_TILE // 2)
    for part in kernel.parts:
        values = (bound[name] for name in part.sizes)
        yield part.kernel, dict(zip(part.kernel.sizes, values, strict=True)), max_tile


def _alone(
    kernel: Kernel,
    bound: Mapping,
    max_tile: int,
    precision: str,
    sms: int,
    how: str,
    warps: int = 0,
) -> Geometry:
    """The launch of one kernel, a variant; with `warps`, in tiles that so many warps move in wide
    accesses."""
    form = form_of(kernel)
    if form == "matmul":
        return _matmul(kernel, bound, precision, sms)
    if form == "attention":
        return _attention(kernel, bound, precision)
    if form == "pointwise":
        return _pointwise(kernel, bound, max_tile, warps, how)
    if form == "reduce":
        return _reduce(kernel, bound, max_tile, warps)
    if form == "scatter":
        return _scatter(kernel, bound, max_tile)
    outer, inner = _numel(kernel.axes, bound), _inner_numel(kernel, bound)
    if form == "sort" and how == "network":
        block = power_of_two(inner)
        return Geometry((outer,), {"BLOCK": block}, _warps(block))
    if form == "sort":
        block = min(power_of_two(inner), RANKED, max_tile)
        others = max(1, min(power_of_two(inner), max_tile // block, COMPARED))
        blocks = outer * cdiv(inner, block)
        return Geometry((blocks,), {"BLOCK": block, "OTHERS": others}, _warps(block * others))
    looped, share = "looped" in how, 8
    if form == "scan":
        looped, share = True, _scanned(kernel)
        max_tile = min(max_tile, MAX_TILE // 8 * share)
    block_o, block_i = _rows_tile(kernel, outer, inner, looped, max_tile)
    unit = {"UNIT": row_unit(kernel, bound)} if "peeled" in how else {}
    return Geometry(
        grid=(cdiv(outer, block_o),),
        constants={"BLOCK_O": block_o, "BLOCK_I": block_i} | unit,
        num_warps=_warps(block_o * block_i, share),
    )


def _foreach(kernel: Kernel, sizes: tuple[int, ...]) -> Geometry:
    """The launch for rows that are aligned; with the chunks that are not moved in wide accesses."""
    whole, rest = chunks_of(kernel, sizes)
    constants = constants_of(kernel, sizes, len(whole) > 0)
    programs, work = len(whole) + len(rest), workspace_of(kernel, sizes)
    return Geometry((programs,), constants, WARPS, workspace=work)


def _scanned(kernel: Kernel) -> int:
    """How many elements of a running result a thread takes: of log-sums few, as each is a lot of
    code."""
    if any(getattr(s, "op", None) is OPS["log1p"] for s in kernel.stages[-1].body):
        return 2
    return 8 if all(b.dtype.itemsize < 8 for b in kernel.buffers) else 4


def _flat_block(numel: int, max_tile: int, warps: int) -> int:
    """Elements of a flat tile: at least 4 for each thread of `warps`."""
    block = BLOCK if numel >= SMALL else BLOCK // 4
    return min(max(block, 128 * warps), max_tile)


def _has_columns(kernel: Kernel, bound: Mapping) -> bool:
    """Whether what lies along the last axis is stored, numbers for each column are loaded, and a
    tile wastes little."""
    if len(kernel.axes) < 2 or _numel(kernel.axes, bound) < SMALL:
        return False
    last = {kernel.axes[-1].name}
    columns = _numel(kernel.axes[-1:], bound)
    block = min(power_of_two(columns), TILE_COLUMNS)
    if columns < COLUMNS or 4 * cdiv(columns, block) * block > 5 * columns:
        return False
    accesses = [s for s in kernel.statements if isinstance(s, Load | Store)]
    stored = all(_unit_axes(s.index) == last for s in accesses if isinstance(s, Store))
    return stored and any(
        _axis_names(s.index) == last and not s.mask for s in accesses if isinstance(s, Load)
    )


def _pointwise(kernel: Kernel, bound: Mapping, max_tile: int, warps: int, how: str) -> Geometry:
    if not kernel.axes:
        return Geometry(grid=(1,), constants={}, num_warps=1)
    numel = _numel(kernel.axes, bound)
    if how == "tiled":
        columns = _numel(kernel.axes[-1:], bound)
        block_i = min(power_of_two(columns), TILE_COLUMNS, max_tile)
        block_o = max(1, min(2 * BLOCK, max_tile) // block_i)
        tiles = cdiv(numel // columns, block_o) * cdiv(columns, block_i)
        constants = {"BLOCK_O": block_o, "BLOCK_I": block_i}
        return Geometry((tiles,), constants, _warps(block_o * block_i))
    block = _flat_block(numel, max_tile, warps)
    return Geometry((cdiv(numel, block),), {"BLOCK": block}, _warps(block))


def _reduce(kernel: Kernel, bound: Mapping, max_tile: int, warps: int) -> Geometry:
    first = kernel.stages[0]
    numel = _numel(first.axes, bound)
    block = _flat_block(numel, max_tile, warps)
    blocks = max(1, cdiv(numel, block))
    steps = cdiv(blocks, MAX_PROGRAMS)
    programs = cdiv(blocks, steps)
    return Geometry(
        grid=(programs,),
        constants={"BLOCK": block, "PROGRAMS": programs, "STEPS": steps},
        num_warps=_warps(block),
        workspace=_workspace(first.body, programs),
    )


def _matmul(kernel: Kernel, bound: Mapping, precision: str, sms: int) -> Geometry:
    c = contraction(kernel)
    m, n, batch = (_numel(axes, bound) for axes in ([c.m], [c.n], c.batch))
    chosen = dict(_tiles_of(kernel, bound, precision, sms))
    options = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
    tiles = batch * cdiv(m, chosen["BLOCK_M"]) * cdiv(n, chosen["BLOCK_N"])
    finished = tiles * chosen["PIECES"] * accumulators(chosen["BLOCK_N"])
    nbytes = _workspace(c.stage.body, finished)
    if chosen["PIECES"] == 1:
        del chosen["PIECES"]
    if chosen["SPLITS"] == 1:
        del chosen["SPLITS"], chosen["GROUP"]
        return Geometry((tiles,), chosen, workspace=nbytes, **options)
    places = workspace(chosen, tiles, c.total, max(nbytes, HEADER_BYTES))
    end = places.pop("END")
    return Geometry((tiles * chosen["SPLITS"],), chosen | places, workspace=end, **options)


def _tiles_of(kernel: Kernel, bound: Mapping, precision: str, sms: int) -> Mapping[str, int]:
    """The tile of a product, and into how many stretches its k is cut."""
    c = contraction(kernel)
    m, n, k = (_numel([axis], bound) for axis in (c.m, c.n, c.dot.k))
    weight = sum(isinstance(s, Load) for s in c.stage.body)
    long = sum(s.op.cost for s in c.stage.body if isinstance(s, Compute)) > ARITHMETIC
    windows = [s for s in (*c.dot.a, *c.dot.b) if _is_taken_apart(s)]
    last = all(_is_wide(s, bound) for s in windows)
    how = ("last" if last else "apart") if windows else ""
    batch = _numel(c.batch, bound)
    return tiles(m, n, k, c.dtype.name, precision, weight, how, batch, sms, long)


def _is_taken_apart(s: Statement) -> bool:
    """Whether a statement loads at quotients or remainders of axes, and masked by them."""
    if not isinstance(s, Load) or not s.mask:
        return False
    atoms = [atom for b in (s.index, *(bound.index for bound in s.mask)) for atom, _ in b.terms]
    return any(isinstance(atom, FloorDiv | Mod) for atom in atoms)


def _is_wide(s: Load, bound: Mapping) -> bool:
    """Whether what a load reads lies side by side along an axis of the tile, WIDE_RUN elements at
    least."""
    units = [atom for atom, c in s.index.terms if c == 1 and not isinstance(atom, Var)]
    if len(units) != 1:
        return False
    (unit,) = units
    return isinstance(unit, str) or (
        isinstance(unit, Mod)
        and isinstance(unit.index.terms[0][0], str)
        and bound.get(unit.by, unit.by) >= WIDE_RUN
    )


def _keys_twice(attend: Attend) -> bool:
    """Whether the values are the keys: a gradient of scores that are dropped."""
    _, k, v, *_ = attend.sides
    read = [{s.buffer for s in side.body if isinstance(s, Load)} for side in (k, v)]
    return read[0] == read[1]


def _attention(kernel: Kernel, bound: Mapping, precision: str) -> Geometry:
    a = attention_of(kernel)
    attend = a.attend
    m, n, c, d = (_numel([axis], bound) for axis in attend.axes)
    how = attend.is_forward, attend.is_noisy
    chosen = dict(attention_tiles(m, n, c, d, a.dtype.name, precision, *how))
    options = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
    if attend.is_forward and precision == "ieee" and a.dtype.name == "f32" and _keys_twice(attend):
        options["num_stages"] = 1  # there is little to load ahead, and with two stages it spills
    blocks, names = 0, {op.name for op, _ in attend.results}
    if attend.is_forward or "attention_dq" in names:
        blocks += cdiv(m, chosen["BLOCK_M"])
    if names & {"attention_dk", "attention_dv"}:
        blocks += cdiv(n, chosen["BLOCK_N"])
    return Geometry((_numel(a.batch, bound) * blocks,), chosen, **options)


def _scatter(kernel: Kernel, bound: Mapping, max_tile: int) -> Geometry:
    s, outer = scatter_of(kernel), _numel(kernel.axes, bound)
    block = min(power_of_two(outer), WIDE if s.shared else COLUMNS, max_tile)
    blocks, size = cdiv(outer, block), bound.get(s.places, s.places)
    constants = {"BLOCK": block}
    parts = 1
    if s.shared:
        indices = _numel(s.stage.axes, bound)
        most = (size + indices) * block // (2 * max(1, indices))  # that read no more than values
        parts = max(1, min(max(cdiv(FILLED, blocks), indices // TAKEN), most))
    if s.chooses:
        constants["IDS"] = min(power_of_two(indices), IDS, max_tile)
    reach = cdiv(size, min(size, parts))
    parts = cdiv(size, reach)
    constants |= {"PARTS": parts, "RANGE": reach}
    return Geometry((blocks * parts,), constants, max(_warps(block), 4 if s.chooses else 1))


def _rows_tile(
    kernel: Kernel, outer: int, inner: int, looped: bool, max_tile: int
) -> tuple[int, int]:
    """BLOCK_O and BLOCK_I: wide along the contiguous axis, narrow enough to fill the GPU."""
    limit = _tile_limit(kernel, max_tile)
    block_i = power_of_two(inner)
    if outer_is_contiguous(kernel):
        least, block_o = 8, COLUMNS
        block_i = min(block_i, max(1, limit // 4 // block_o)) if looped else block_i
    else:
        block_i = min(block_i, max(1, limit // 4)) if looped else block_i
        least, block_o = 1, max(1, BLOCK // block_i)
    block_o = min(block_o, power_of_two(outer), max_tile)
    while block_o > least and (cdiv(outer, block_o) < FILLED or block_o * block_i > limit):
        block_o //= 2
    return block_o, block_i


def _tile_limit(kernel: Kernel, max_tile: int) -> int:
    """Elements of a tile whose values still fit the registers: fewer, the more values it holds."""
    loads = {
        (s.buffer, s.index)
        for stage in kernel.stages
        if stage.axes
        for s in stage.body
        if isinstance(s, Load)
    }
    return min(max_tile, MAX_TILE if len(loads) <= 3 else MAX_TILE // 2)


def outer_is_contiguous(kernel: Kernel) -> bool:
    """Whether neighbours in memory lie along an outer axis, for most of the accesses that go along
    the most axes."""
    outer = {axis.name for axis in kernel.axes}
    votes: dict[int, int] = {}  # by the number of axes that an access goes along: the most decide
    for stage in kernel.stages:
        inner = {axis.name for axis in stage.axes}
        for s in stage.body:
            if not isinstance(s, Load | Store):
                continue
            names = _axis_names(s.index)
            if names & outer and names & inner:
                unit = _unit_axes(s.index)
                vote = bool(unit & outer) - bool(unit & inner)
                votes[len(names)] = votes.get(len(names), 0) + vote
    return bool(votes) and votes[max(votes)] > 0


def _unit_axes(index: Index) -> set[str]:
    """The axes that move an index by 1."""
    units = {a for a, coefficient in index.terms if coefficient == 1 and not isinstance(a, Var)}
    return {name for a in units for name in ({a} if isinstance(a, str) else _unit_axes(a.index))}


def _axis_names(index: Index) -> set[str]:
    """All axes that an index depends on."""
    atoms = {atom for atom, _ in index.terms if not isinstance(atom, Var)}
    return {name for a in atoms for name in ({a} if isinstance(a, str) else _axis_names(a.index))}


def _workspace(body: Sequence, programs: int) -> int:
    reductions = sum(isinstance(s, Reduce) for s in body)
    return HEADER_BYTES + PARTIAL_BYTES * programs * reductions if reductions else 0


def _inner_numel(kernel: Kernel, bound: Mapping) -> int:
    return max(_numel(stage.axes, bound) for stage in kernel.stages if stage.axes)


def _numel(axes: Sequence[Axis], bound: Mapping) -> int:
    return math.prod(bound.get(a.extent, a.extent) for a in axes)


def _warps(elements: int, share: int = 8) -> int:
    """`share` elements a thread, in 1 to 8 warps."""
    return min(8, max(1, elements // (32 * share)))


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
