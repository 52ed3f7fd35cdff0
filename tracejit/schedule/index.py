"""Index arithmetic with concrete ints, and what movement primitives do to indices.

In: indices over the axes "i0", "i1", … of a domain and the extents of those axes. Out: indices in
one normal form (terms sorted, quotients and remainders split as far as the ranges allow), so that
two accesses of one element compare equal, and a Mask where a pad leaves its operand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from tracejit.ir.graph import Node
from tracejit.ir.types import contiguous_strides
from tracejit.schedule.kernel import Atom, Bound, FloorDiv, Index, Mask, Mod, Var

Ints = tuple[int, ...]
Indices = tuple[Index, ...]  # one index per dimension of a value
Extents = Mapping["str | Var", int]  # of a Var: one more than the largest index that it may be

ZERO = Index()


@lru_cache(4096)
def identity(shape: Ints) -> Indices:
    """The indices of a value's element at the point (i0, i1, …) of its own shape."""
    return tuple(Index(((f"i{k}", 1),)) if extent > 1 else ZERO for k, extent in enumerate(shape))


@lru_cache(4096)
def extents_of(shape: Ints) -> Extents:
    """Axis name → extent for a domain."""
    return {f"i{k}": extent for k, extent in enumerate(shape)}


@lru_cache(65536)
def _order(atom: Atom) -> tuple:
    """Sort key of atoms: axes by number, then quotients and remainders by their text."""
    if isinstance(atom, str):
        return (0, int(atom[1:]), "")
    return (1, 0, repr(atom))


def _make(terms: Mapping[Atom, int], offset: int) -> Index:
    """An index in normal form: quotient·divisor + remainder joined, zero terms dropped, sorted."""
    if len(terms) < 2:
        return Index(tuple([term for term in terms.items() if term[1]]), offset)
    if all(isinstance(atom, str) for atom in terms):
        kept = [(int(atom[1:]), atom, c) for atom, c in terms.items() if c]
        if len(kept) > 1:
            kept.sort()
        return Index(tuple((atom, c) for _, atom, c in kept), offset)
    terms = dict(terms)
    while (found := _joinable(terms)) is not None:
        remainder, quotient, whole = found
        factor = terms.pop(remainder)
        del terms[quotient]
        for atom, c in whole.terms:
            terms[atom] = terms.get(atom, 0) + c * factor
        offset += whole.offset * factor
    kept = [(atom, c) for atom, c in terms.items() if c]
    if len(kept) > 1:
        kept.sort(key=lambda term: _order(term[0]))
    return Index(tuple(kept), offset)


def _joinable(terms: Mapping[Atom, int]) -> tuple[Atom, Atom, Index] | None:
    """A remainder x % s and a quotient x // s whose sum, with their coefficients, is x."""
    for atom, c in terms.items():
        if not isinstance(atom, Mod) or not c:
            continue
        inner = atom.index
        quotient = FloorDiv(inner, atom.by)
        if len(inner.terms) == 1 and inner.offset == 0:
            (only, factor) = inner.terms[0]
            if factor == 1 and isinstance(only, FloorDiv):
                quotient = FloorDiv(only.index, only.by * atom.by)
        if terms.get(quotient) == c * atom.by:
            return atom, quotient, inner
    return None


def add(indices: Iterable[Index], offset: int = 0) -> Index:
    """The sum of indices and a constant."""
    terms: dict[Atom, int] = {}
    for index in indices:
        offset += index.offset
        for atom, c in index.terms:
            terms[atom] = terms.get(atom, 0) + c
    return _make(terms, offset)


def scale(index: Index, factor: int) -> Index:
    """index * factor"""
    if factor == 1:
        return index
    if factor == 0:
        return ZERO
    return Index(tuple((atom, c * factor) for atom, c in index.terms), index.offset * factor)


def bounds(index: Index, extents: Extents) -> tuple[int, int]:
    """The least and the greatest value (both inclusive) over the domain."""
    low = high = index.offset
    for atom, c in index.terms:
        if isinstance(atom, str | Var):
            first, last = 0, extents[atom] - 1
        else:
            first, last = bounds(atom.index, extents)
            if isinstance(atom, FloorDiv):
                first, last = first // atom.by, last // atom.by
            elif first < 0 or last >= atom.by:
                first, last = 0, atom.by - 1
        low += c * (first if c > 0 else last)
        high += c * (last if c > 0 else first)
    return low, high


def divmod_index(index: Index, by: int, extents: Extents) -> tuple[Index, Index]:
    """(index // by, index % by), simplified by ranges; `by` is positive."""
    if by == 1:
        return index, ZERO
    low, high = bounds(index, extents)
    if low // by == high // by:
        return Index((), low // by), add([index], -(low // by) * by)
    whole = {atom: c // by for atom, c in index.terms if c % by == 0}
    rest = [(atom, c) for atom, c in index.terms if c % by]
    whole_offset, offset = divmod(index.offset, by)
    if any(c < 0 for _, c in rest):  # what is divided stays positive: C and Triton truncate
        below = bounds(Index(tuple(rest), offset), extents)[0] // by
        whole_offset, offset = whole_offset + below, offset - below * by
    quotient = Index(tuple(whole.items()), whole_offset)
    inner_quotient, remainder = _split(rest, offset, by, extents)
    return add([quotient, inner_quotient]), remainder


def _split(
    terms: list[tuple[Atom, int]], offset: int, by: int, extents: Extents
) -> tuple[Index, Index]:
    """divmod of a sum: (g·A + r) // (g·s) is A // s where 0 <= r < g, for the largest such g."""
    terms.sort(key=lambda term: (-abs(term[1]), _order(term[0])))
    common = by
    for count in range(len(terms) + 1):
        if count:
            common = math.gcd(common, terms[count - 1][1])
        if common == 1:
            break
        high_offset, low_offset = divmod(offset, common)
        rest = _make(dict(terms[count:]), low_offset)
        low, high = bounds(rest, extents)
        if low >= 0 and high < common:
            head = _make({atom: c // common for atom, c in terms[:count]}, high_offset)
            quotient, remainder = divmod_index(head, by // common, extents)
            return quotient, add([scale(remainder, common), rest])
    index = _make(dict(terms), offset)
    if len(index.terms) == 1 and index.offset == 0 and index.terms[0][1] == 1:
        atom = index.terms[0][0]
        if isinstance(atom, FloorDiv):
            quotient, _ = divmod_index(atom.index, atom.by * by, extents)
            return quotient, Index(((Mod(index, by), 1),))
        if isinstance(atom, Mod) and atom.by % by == 0:
            below, remainder = divmod_index(atom.index, by, extents)
            _, quotient = divmod_index(below, atom.by // by, extents)
            return quotient, remainder
    return Index(((FloorDiv(index, by), 1),)), Index(((Mod(index, by), 1),))


def substitute(index: Index, axes: Sequence[Index], extents: Extents) -> Index:
    """The index with axis "ik" replaced by axes[k], an index over a domain of `extents`."""
    parts = []
    for atom, c in index.terms:
        if isinstance(atom, str):
            part = axes[int(atom[1:])]
        elif isinstance(atom, Var):
            part = Index(((atom, 1),))
        else:
            below = substitute(atom.index, axes, extents)
            both = divmod_index(below, atom.by, extents)
            part = both[0] if isinstance(atom, FloorDiv) else both[1]
        parts.append(scale(part, c))
    return add(parts, index.offset)


def flatten(indices: Indices, strides: Ints) -> Index:
    """The linear index of an element: the sum of indices times strides."""
    return add([scale(i, s) for i, s in zip(indices, strides, strict=True)])


def unflatten(index: Index, shape: Ints, extents: Extents) -> Indices:
    """The indices, per dimension of `shape`, of the element at a row-major position."""
    out = []
    for extent in reversed(shape[1:]):
        index, remainder = divmod_index(index, extent, extents)
        out.append(remainder)
    return (*((index,) if shape else ()), *reversed(out))


def reindex(indices: Indices, shape: Ints, new: Ints, extents: Extents) -> Indices:
    """Indices into `shape` as indices of the same element of its row-major reshape to `new`.

    Works block by block: a block is the shortest run of dimensions of equal element count on both
    sides, so that untouched dimensions keep their index as it is.
    """
    out: list[Index] = []
    i = j = 0
    while i < len(shape) or j < len(new):
        start, first = i, j
        here = there = 1
        if i < len(shape):
            here, i = shape[i], i + 1
        if j < len(new):
            there, j = new[j], j + 1
        while here != there:
            if here < there:
                here, i = here * shape[i], i + 1
            else:
                there, j = there * new[j], j + 1
        block, wanted = shape[start:i], new[first:j]
        if len(wanted) == len(block) == 1:
            out.append(indices[start])
        elif wanted:
            flat = flatten(indices[start:i], contiguous_strides(block))
            out.extend(unflatten(flat, wanted, extents))
    return tuple(out)


def operand_indices(node: Node, indices: Indices, extents: Extents) -> tuple[Indices, Mask]:
    """Where a movement node's result at `indices` reads its operand, and when it does at all."""
    name, shape = node.op.name, node.args[0].type.shape
    if name == "reshape":
        return reindex(indices, node.out.type.shape, shape, extents), ()
    if name == "permute":
        back = sorted(zip(node.attr("axes"), indices, strict=True), key=lambda pair: pair[0])
        return tuple(index for _, index in back), ()
    if name == "expand":
        return tuple(i if n > 1 else ZERO for i, n in zip(indices, shape, strict=True)), ()
    if name == "slice":
        rows = zip(indices, node.attr("starts"), node.attr("steps"), strict=True)
        return tuple(add([scale(index, step)], low) for index, low, step in rows), ()
    if name == "flip":
        flipped = node.attr("axes")
        rows = enumerate(zip(indices, shape, strict=True))
        return tuple(
            add([scale(index, -1)], n - 1) if k in flipped else index for k, (index, n) in rows
        ), ()
    if name in ("window", "unwindow"):
        return _windowed(node, indices, extents)
    assert name == "pad", name
    out, mask = [], []
    rows = zip(indices, shape, node.attr("low"), node.attr("interior"), strict=True)
    for index, size, low, gap in rows:
        index = add([index], -low)
        span = (size - 1) * (gap + 1) + 1
        first, last = bounds(index, extents)
        if gap or first < 0 or last >= span:
            mask.append(Bound(index, span, gap + 1))
        out.append(divmod_index(index, gap + 1, extents)[0])
    return tuple(out), tuple(mask)


def _windowed(node: Node, indices: Indices, extents: Extents) -> tuple[Indices, Mask]:
    """`operand_indices` of the sliding windows: the place of a tap, or the window that has it."""
    along, taps = node.attr("axes")
    stride, dilation = node.attr("stride"), node.attr("dilation")
    out, tap = list(indices), indices[taps]
    if node.op.name == "window":
        out[along] = add([scale(indices[along], stride), scale(tap, dilation)])
        return tuple(out), ()
    count = node.args[0].type.shape[along]
    place = add([indices[along], scale(tap, -dilation)])
    span = (count - 1) * stride + 1
    first, last = bounds(place, extents)
    out[along] = divmod_index(place, stride, extents)[0]
    if stride == 1 and first >= 0 and last < span:
        return tuple(out), ()
    return tuple(out), (Bound(place, span, stride),)


def invert(indices: Indices, value_shape: Ints, shape: Ints, place: Indices, extents: Extents):
    """Solve `indices(point of shape) = place` for the point, or None where that has no solution.

    `indices` read a value of `value_shape` from a domain `shape`; the solution exists when they are
    a bijection of mixed radices: permutations, and merges of adjacent axes.
    """
    solved: dict[str, Index] = {}
    own = extents_of(shape)
    for index, size, position in zip(indices, value_shape, place, strict=True):
        if index.offset or not all(isinstance(atom, str) for atom, _ in index.terms):
            return None
        step = 1
        for atom, c in sorted(index.terms, key=lambda term: term[1]):
            if c != step or atom in solved:
                return None
            quotient, _ = divmod_index(position, step, extents)
            step *= own[atom]
            solved[atom] = (
                quotient if step == size else divmod_index(quotient, own[atom], extents)[1]
            )
        if step != size:
            return None
    if any(n > 1 and f"i{k}" not in solved for k, n in enumerate(shape)):
        return None
    return tuple(solved.get(f"i{k}", ZERO) for k in range(len(shape)))
