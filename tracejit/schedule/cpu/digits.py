"""Axes of a contraction taken apart: the digits of a position, so that indices divide nothing.

A contraction over sliding windows reads at quotients and remainders of its axes: of n, the image,
the row and the column of a pixel; of k, the channel and the tap. Such an axis is a number of mixed
radices. In: statements over the axes of a contraction. Out: the same over digits, whose indices are
sums of digits times strides wherever the divisors of an axis divide each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tracejit.records import dataclass
from tracejit.schedule.axes import map_statements
from tracejit.schedule.cpu.access import axes_of, places, stride, values_in
from tracejit.schedule.index import add, divmod_index, scale
from tracejit.schedule.kernel import (
    Axis,
    FloorDiv,
    Index,
    Load,
    Mod,
    Statement,
    Var,
)

UNKNOWN = 1 << 40  # the extent of an axis of which nothing more is known
FIRST = 100  # of the numbers of digits: an axis has at most as many as these are apart


@dataclass(frozen=True, slots=True)
class Digit:
    """position // unit % extent; `name` is that of an axis."""

    name: str
    unit: int
    extent: int


@dataclass(frozen=True, slots=True)
class Digits:
    """An axis and the digits of its positions, the fastest first."""

    axis: Axis
    digits: tuple[Digit, ...]

    @property
    def index(self) -> Index:
        """The axis as an index over its digits."""
        return add([Index(((d.name, d.unit),)) for d in self.digits])


def is_split(axes: Sequence[Axis], statements: Sequence[Statement]) -> bool:
    """Whether quotients or remainders of one of the axes take part in an index."""
    return any(len(d.digits) > 1 for d in taken_apart(axes, statements))


def taken_apart(axes: Sequence[Axis], statements: Sequence[Statement]) -> tuple[Digits, ...]:
    """The digits of each axis that the statements' indices ask for. Neighbours that all indices
    move by as if they were one digit, such as row and column of an image, are one."""
    found: dict[str, set[int]] = {a.name: set() for a in axes}
    for s in statements:
        for index in places(s):
            for name, unit in _units(index):
                if name in found:
                    found[name].add(unit)
    numbered = [(a, FIRST * (1 + k)) for k, a in enumerate(axes)]
    apart = tuple(_digits(a, found[a.name], first) for a, first in numbered)
    if all(len(d.digits) == 1 for d in apart):
        return apart
    others = {name: UNKNOWN for s in statements for i in places(s) for name in axes_of(i)}
    known = others | {a.name: a.extent for a in axes}
    indices = [i for s in over_digits(statements, apart, known) for i in places(s)]
    return tuple(
        _digits(a, {d.unit for d in _joined(whole, indices)}, first)
        for (a, first), whole in zip(numbered, apart, strict=True)
    )


def over_digits(
    statements: Sequence[Statement], axes: Sequence[Digits], extents: Mapping[str, int]
) -> tuple[Statement, ...]:
    """The statements with these axes replaced by their digits; `extents` are those of all axes."""
    gathered = {v: UNKNOWN for s in statements for i in places(s) for v in values_in(i)}
    known = {**gathered, **extents, **extents_of(axes)}
    by_name = {d.axis.name: d.index for d in axes}

    def change(index: Index) -> Index:
        parts = []
        for atom, c in index.terms:
            part = Index(((atom, 1),))
            if isinstance(atom, str):
                part = by_name.get(atom, part)
            elif not isinstance(atom, Var):
                quotient, remainder = divmod_index(change(atom.index), atom.by, known)
                part = quotient if isinstance(atom, FloorDiv) else remainder
            parts.append(scale(part, c))
        return add(parts, index.offset)

    return map_statements(statements, change)


def extents_of(axes: Iterable[Digits]) -> dict[str, int]:
    return {d.name: d.extent for axis in axes for d in axis.digits}


def _joined(axis: Digits, indices: Sequence[Index]) -> list[Digit]:
    """The digits at which runs end: some index does not go on there from the digit below."""
    kept = list(axis.digits[:1])
    for below, digit in zip(axis.digits, axis.digits[1:], strict=False):
        for index in indices:
            steps = dict(index.terms)
            nested = [atom.index for atom in steps if isinstance(atom, FloorDiv | Mod)]
            within = any({below.name, digit.name} & axes_of(i) for i in nested)
            if within or steps.get(digit.name, 0) != steps.get(below.name, 0) * below.extent:
                kept.append(digit)
                break
    return kept


def run_score(axis: Digits, statements: Sequence[Statement], most: int) -> float:
    """How long the stretches are that a loop over at most so many places of the axis reads from
    memory in one go."""
    fastest = axis.digits[0]
    steps = [stride(s.index, fastest.name) for s in statements if isinstance(s, Load)]
    return min(fastest.extent, most) * sum(1 / step for step in steps if step)


def _digits(axis: Axis, units: set[int], first: int) -> Digits:
    """Digits at these units, or one for the whole axis where they do not divide each other."""
    starts = sorted({1} | {u for u in units if 1 < u < axis.extent})
    ends = [*starts[1:], axis.extent]
    if len(starts) >= FIRST or any(b % a for a, b in zip(starts, ends, strict=True)):
        starts, ends = [1], [axis.extent]
    return Digits(
        axis,
        tuple(
            Digit(f"i{first + k}", a, b // a)
            for k, (a, b) in enumerate(zip(starts, ends, strict=True))
        ),
    )


def _units(index: Index) -> Iterator[tuple[str, int]]:
    """(axis, unit) where a digit of an axis starts or ends, for the quotients and remainders of an
    index."""
    for atom, _ in index.terms:
        if isinstance(atom, FloorDiv | Mod):
            span = _span(atom)
            if span is None:
                yield from _units(atom.index)
            else:
                name, low, high = span
                yield from ((name, unit) for unit in (low, high) if unit is not None)


def _span(atom: object) -> tuple[str, int, int | None] | None:
    """(axis, unit, end) of an atom that is the digits of one axis from a unit to an end."""
    if isinstance(atom, str):
        return atom, 1, None
    if isinstance(atom, Var) or len(atom.index.terms) != 1 or atom.index.offset:
        return None
    ((inner, c),) = atom.index.terms
    below = _span(inner) if c == 1 else None
    if below is None:
        return None
    name, low, high = below
    by = low * atom.by
    return (name, by, high) if isinstance(atom, FloorDiv) else (name, low, by)
