"""Loops over runs: stretches of an axis in which only its fastest digit moves.

Within a run, indices are linear in the loop's variable and most masks hold for one range of it: the
run has a part in which all hold, where statements need no masks, and the ends before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tracejit.codegen.c_body import Body
from tracejit.codegen.c_text import block, literal
from tracejit.codegen.language import Line
from tracejit.schedule.cpu.access import stride
from tracejit.schedule.cpu.digits import Digit, Digits
from tracejit.schedule.kernel import Bound, InBounds, Load, Operand, Statement


def digit_lines(digits: Sequence[Digit], position: str) -> list[Line]:
    """The digits of a position, as constants."""
    return [Line(f"const int64_t {d.name} = {_digit(d, position)};") for d in digits]


def _digit(d: Digit, position: str) -> str:
    text = f"({position})" if d.unit == 1 else f"({position}) / {d.unit}"
    return f"{text} % {d.extent}" if d.extent else text


def in_runs(
    axis: Digits, first: str, last: str, inner: Callable[[str, str], list[Line]]
) -> list[Line]:
    """Runs from position `first` to `last`; `inner(at, from)` are the lines of one: over `run`
    positions from `at`, whose fastest digit starts with `from`."""
    fastest, *slower = _closed(axis)
    name = axis.axis.name
    at, start = f"{name}_at", f"{name}_from"
    lines = [
        *digit_lines(slower, at),
        Line(f"const int64_t {start} = {_digit(fastest, at)};"),
    ]
    run = f"{last} - {at}"
    if slower:
        run = f"tj_least({fastest.extent} - {start}, {run})"
    lines += [Line(f"const int64_t run = {run};"), *inner(at, start), Line(f"{at} += run;")]
    return block(f"for (int64_t {at} = {first}; {at} < {last};)", lines)


def all_digits(axis: Digits, position: str) -> list[Line]:
    """All digits of a position."""
    return digit_lines(_closed(axis), position)


def _closed(axis: Digits) -> list[Digit]:
    """The digits; the slowest one needs no remainder."""
    *digits, last = axis.digits
    return [*digits, replace(last, extent=0)]


def values_of_run(
    body: Body,
    axis: Digits,
    start: str,
    statements: Sequence[Statement],
    value: Operand,
    target: str,
    text: str,
) -> list[Line]:
    """target[j] = the value at each place j of a run; `text` is the value as an operand. At the
    ends masked loads are zeros, where all masks say the same: a compiler has little to do there."""
    fastest = axis.digits[0].name
    here = Line(f"const int64_t {fastest} = {start} + j;")
    masks = [s.mask for s in statements if isinstance(s, Load | InBounds) and s.mask]
    opened = [{b for b in mask if _may_fail(body, b)} for mask in masks]
    bounds = list(dict.fromkeys(b for mask in masks for b in mask if _may_fail(body, b)))

    def loop(low: str, high: str, values: Sequence[Line]) -> list[Line]:
        lines = [here, *values, Line(f"{target}[j] = {text};")]
        return [
            Line("#pragma omp simd"),
            *block(f"for (int64_t j = {low}; j < {high}; j++)", lines),
        ]

    inside = body.lines(_without_mask(s) for s in statements)
    if not bounds:
        return loop("0", "run", inside)
    if not all(_is_range(b, fastest) for b in bounds):
        return loop("0", "run", body.lines(statements))
    lines = [Line("int64_t low = 0, high = run;")]
    for b in bounds:
        lines += _limits(body, b, fastest, start)
    only = len(statements) == 1 and isinstance(statements[0], Load) and statements[0].out == value
    if only:
        zero = "for (int64_t j = {}; j < {}; j++) " + f"{target}[j] = 0;"
        before, after = ([Line(zero.format(*ends))] for ends in (("0", "low"), ("high", "run")))
    else:
        equal = all(mask in (set(), set(bounds)) for mask in opened)
        ends = _outside(body, statements) if equal else body.lines(statements)
        before, after = loop("0", "low", ends), loop("high", "run", ends)
    lines += [
        Line("low = low < run ? low : run;"),
        Line("high = high > low ? high : low;"),
        *before,
        *loop("low", "high", inside),
        *after,
    ]
    return block("", lines)


def _may_fail(body: Body, b: Bound) -> bool:
    """Whether a bound is not implied by the ranges of its index."""
    return b.step != 1 or any(body.open_ends(b))


def _outside(body: Body, statements: Sequence[Statement]) -> list[Line]:
    """Statements where no mask holds that may not hold."""
    lines: list[Line] = []
    for s in statements:
        masked = isinstance(s, Load | InBounds) and any(_may_fail(body, b) for b in s.mask)
        lines += body.assign(s, literal(0, s.out.dtype)) if masked else body.lines([s])
    return lines


def _without_mask(s: Statement) -> Statement:
    return replace(s, mask=()) if isinstance(s, Load | InBounds) else s


def _is_range(b: Bound, name: str) -> bool:
    """Whether a bound holds for one range of an axis, from the first to the last place."""
    linear = all(atom == name or not _moves(atom, name) for atom, _ in b.index.terms)
    return b.step == 1 and linear and dict(b.index.terms).get(name, 0) >= 0


def _moves(atom: object, name: str) -> bool:
    return not isinstance(atom, str) and hasattr(atom, "index") and stride(atom.index, name) > 0


def _limits(body: Body, b: Bound, name: str, start: str) -> list[Line]:
    """Lines that narrow `low` and `high` to where a bound holds."""
    step = dict(b.index.terms).get(name, 0)
    first = body.index(b.index, {name: start})
    if step == 0:
        return [Line(f"if (!({body.condition((b,))})) high = 0;")]
    negative, beyond = body.open_ends(b)
    lines = [Line(f"const int64_t place = {first};")]
    if negative:
        least = "-place" if step == 1 else f"(-place + {step - 1}) / {step}"
        lines.append(Line(f"if (place < 0 && low < {least}) low = {least};"))
    if beyond:
        left = f"{b.high} - place"
        most = left if step == 1 else f"({left} + {step - 1}) / {step}"
        lines.append(Line(f"if (place >= {b.high}) high = 0;"))
        lines.append(Line(f"else if (high > {most}) high = {most};"))
    return block("", lines)
