"""Named sizes: a Kernel's concrete ints become parameters, and back.

One kernel text then serves many shapes. Extents are n0, n1, … after their axes (nk for k), strides
`b0_s1` (buffer, axis; `b0_sv` of a value), offsets `b0_o`, negative coefficients m, m_1, …, all
others (divisors, bounds) d0, d1, …; the coefficient 1 and the offset 0 stay literal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tracejit.schedule.axes import accessing
from tracejit.schedule.kernel import (
    Axis,
    Bound,
    FloorDiv,
    InBounds,
    Index,
    Kernel,
    Load,
    Mask,
    Mod,
    Position,
    Side,
    Size,
    Stage,
    Statement,
    Store,
    Var,
)


def parametrize(kernel: Kernel) -> tuple[Kernel, tuple[int, ...]]:
    """The kernel with named sizes, and their values in the order of `kernel.sizes`."""
    naming = _Naming()
    kernel = _rewrite(kernel, naming)
    order = sorted(naming.sizes, key=lambda name: name[0] != "n")
    kernel = replace(kernel, sizes=tuple(order))
    return kernel, tuple(naming.sizes[name] for name in order)


def substitute(kernel: Kernel, sizes: Mapping[str, int]) -> Kernel:
    """The kernel with its named sizes replaced by ints."""
    return replace(_rewrite(kernel, _Binding(sizes)), sizes=())


def is_negative(coefficient: Size) -> bool:
    """Whether the coefficient of an index is negative; its name says so too."""
    if isinstance(coefficient, str):
        return coefficient.startswith("m")
    return coefficient < 0


class _Naming:
    """Gives every int of a kernel a name."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self._others: dict[int, str] = {}

    def _named(self, wanted: str, value: int) -> str:
        """`wanted`, or with a suffix where that name already stands for another value."""
        name, count = wanted, 0
        while self.sizes.setdefault(name, value) != value:
            count += 1
            name = f"{wanted}_{count}"
        return name

    def extent(self, axis: Axis) -> Size:
        return self._named("nk" if axis.name == "k" else f"n{axis.name[1:]}", axis.extent)

    def coefficient(self, buffer: str | None, atom: object, value: int) -> Size:
        if value == 1:
            return 1
        if buffer is not None and isinstance(atom, str | Var):
            along = "v" if isinstance(atom, Var) else "k" if atom == "k" else atom[1:]
            return self._named(f"{buffer}_s{along}", value)
        if value < 0:
            return self._named("m", value)
        return self.other(value)

    def offset(self, buffer: str | None, value: int) -> Size:
        if value == 0:
            return 0
        return self.other(value) if buffer is None else self._named(f"{buffer}_o", value)

    def other(self, value: int) -> Size:
        if value not in self._others:
            self._others[value] = f"d{len(self._others)}"
            self.sizes[self._others[value]] = value
        return self._others[value]

    def step(self, value: int) -> Size:
        return 1 if value == 1 else self.other(value)


class _Binding:
    """Replaces every name by its value."""

    def __init__(self, sizes: Mapping[str, int]):
        self._sizes = sizes

    def other(self, size: Size) -> int:
        return self._sizes[size] if isinstance(size, str) else size

    step = other

    def extent(self, axis: Axis) -> int:
        return self.other(axis.extent)

    def coefficient(self, buffer: str | None, atom: object, size: Size) -> int:
        return self.other(size)

    def offset(self, buffer: str | None, size: Size) -> int:
        return self.other(size)


def _rewrite(kernel: Kernel, sizes: _Naming | _Binding) -> Kernel:
    """The kernel with every size passed through `sizes`, in the order of its text."""

    def index(i: Index, buffer: str | None = None) -> Index:
        terms = []
        for atom, c in i.terms:
            new = atom
            if isinstance(atom, FloorDiv):
                new = FloorDiv(index(atom.index), sizes.other(atom.by))
            elif isinstance(atom, Mod):
                new = Mod(index(atom.index), sizes.other(atom.by))
            terms.append((new, sizes.coefficient(buffer, atom, c)))
        return Index(tuple(terms), sizes.offset(buffer, i.offset))

    def mask(m: Mask) -> Mask:
        return tuple(Bound(index(b.index), sizes.other(b.high), sizes.step(b.step)) for b in m)

    def statement(s: Statement) -> Statement:
        if isinstance(s, Load | Store):
            return accessing(s, index(s.index, s.buffer), mask(s.mask))
        if isinstance(s, Position):
            return Position(s.out, index(s.index), s.where)
        if isinstance(s, InBounds):
            return replace(s, mask=mask(s.mask))
        return s

    def axis(a: Axis) -> Axis:
        return Axis(a.name, sizes.extent(a))

    def stage(s: Stage) -> Stage:
        axes, dot = tuple(map(axis, s.axes)), s.dot
        if dot is not None:
            a, b = (tuple(map(statement, side)) for side in (dot.a, dot.b))
            dot = replace(dot, k=axis(dot.k), a=a, b=b)
        attend = s.attend
        if attend is not None:
            m, n, c, d = map(axis, attend.axes)
            sides = tuple(Side(tuple(map(statement, x.body)), x.value) for x in attend.sides)
            attend = replace(attend, m=m, n=n, c=c, d=d, sides=sides)
        return replace(s, axes=axes, body=tuple(map(statement, s.body)), dot=dot, attend=attend)

    return replace(
        kernel, axes=tuple(map(axis, kernel.axes)), stages=tuple(map(stage, kernel.stages))
    )
