"""Two outcomes of one call compared: the compiled step's and eager's.

    (ours, eager, the float64 run's if there is one, magnitudes) → Comparison

Most results need no float64 run: where ‖ours - eager‖ ≤ 16·eps·magnitude, the rule of
`equality.py` holds whatever that run gives, since ‖ours - f64‖ ≤ ‖ours - eager‖ + ‖eager - f64‖.
What it would decide is `open`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import field

import torch

from tracejit.equality import (
    EPS,
    LOSS_RELATIVE,
    MAGNITUDE_FACTOR,
    difference,
    in_parts,
    losses_agree,
)
from tracejit.errors import TracejitError
from tracejit.records import dataclass
from tracejit.verify.outcome import Made, Outcome, Seen

_NUMBER = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Difference:
    """A place where the compiled step left something else than eager."""

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@dataclass
class Comparison:
    """How two outcomes compare.

    open:    places that a float64 run would decide.
    error:   the largest ‖ours - eager‖ of a tensor over its magnitude, and its name.
    exactly: tensors with eager's very bits, of `tensors`.
    """

    differences: list[Difference] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    tensors: int = 0
    exactly: int = 0
    places: int = 0
    error: float = 0.0
    at: str = ""


def compare(
    ours: Outcome,
    eager: Outcome,
    exact: Outcome | None,
    norm_of: Callable[[int, torch.Tensor], float],
    *,
    keep_grads: bool = True,
) -> Comparison:
    """Compare what two calls have left behind. `norm_of(address, tensor)` is the magnitude of what
    lies there. Not `keep_grads`: gradients may be None."""
    c = _Compare(norm_of, exact is not None)
    if ours.error is not None or eager.error is not None:
        c.found.differences += _of_errors(ours.error, eager.error)
        return c.found
    names = dict.fromkeys((*eager.parts, *ours.parts))
    for name in names:
        if name.endswith(".grad") and not keep_grads and ours.parts.get(name) is None:
            continue
        a, b = ours.parts.get(name, _AS_BEFORE), eager.parts.get(name, _AS_BEFORE)
        if a is _AS_BEFORE or b is _AS_BEFORE:
            left, by = (b, "eager") if a is _AS_BEFORE else (a, "the compiled step")
            was = (eager if a is _AS_BEFORE else ours).was.get(name, _AS_BEFORE)
            if type(was) is not type(left):
                c.differs(name, f"only {by} changes it, to {_short(left)}")
                continue
            a, b = (was, b) if a is _AS_BEFORE else (a, was)
        x = None if exact is None else exact.parts.get(name)
        c.both(name, a, b, x)
    return c.found


_AS_BEFORE = object()


class _Compare:
    def __init__(self, norm_of: Callable[[int, torch.Tensor], float], sure: bool):
        self.found, self.norm_of, self.sure = Comparison(), norm_of, sure

    def differs(self, name: str, what: str) -> None:
        self.found.differences.append(Difference(name, what))

    def both(self, name: str, a: object, b: object, x: object) -> None:
        """Compare ours and eager's, of which the float64 run has x."""
        self.found.places += 1
        if isinstance(a, Seen) and isinstance(b, Seen):
            return self._tensors(name, a, b, x)
        if type(a) is not type(b):
            return self.differs(name, f"{_short(a)}, in eager {_short(b)}")
        if isinstance(a, Made):
            return self._made(name, a, b, x)
        if isinstance(a, tuple):
            if len(a) != len(b):
                return self.differs(name, f"{len(a)} items, in eager {len(b)}")
            if not (isinstance(x, tuple) and len(x) == len(b)):
                x = (None,) * len(b)
            for i, three in enumerate(zip(a, b, x, strict=True)):
                self.both(f"{name}[{i}]" if len(a) > 1 else name, *three)
            return None
        if isinstance(a, float):
            return self._numbers(name, a, b, x)
        if isinstance(a, str) and a != b and not _same_text(a, b):
            return self.differs(name, f"{_short(a)}, in eager {_short(b)}")
        if not isinstance(a, str) and a != b:
            return self.differs(name, f"{_short(a)}, in eager {_short(b)}")
        return None

    def _made(self, name: str, a: Made, b: Made, x: object) -> None:
        if a.cls != b.cls:
            return self.differs(name, f"a {a.cls}, in eager a {b.cls}")
        return self.both(name, a.parts, b.parts, x.parts if isinstance(x, Made) else None)

    def _numbers(self, name: str, a: float, b: float, x: object) -> None:
        if a == b or (math.isnan(a) and math.isnan(b)):
            return
        reference = x if isinstance(x, float) else b
        if losses_agree(a, b, b):
            return
        if isinstance(x, float) and math.isfinite(x):
            allowed = 4 * abs(b - x) + LOSS_RELATIVE * abs(x)
            if abs(a - reference) <= allowed:
                return
        elif not self.sure:
            self.found.open.append(name)
            return
        self.differs(name, f"{a!r}, in eager {b!r}")

    def _tensors(self, name: str, a: Seen, b: Seen, x: object) -> None:
        found = self.found
        found.tensors += 1
        one, two = a.data, b.data
        if (one.shape, one.dtype, one.device) != (two.shape, two.dtype, two.device):
            return self.differs(
                name,
                f"{list(one.shape)} {one.dtype}, in eager {list(two.shape)} {two.dtype}",
            )
        if a.requires_grad != b.requires_grad:
            return self.differs(
                name, f"requires_grad={a.requires_grad}, in eager {b.requires_grad}"
            )
        if torch.equal(one, two):
            found.exactly += 1
            return None
        if not (one.is_floating_point() or one.is_complex()):
            return self.differs(name, "differs from eager")
        reference = x.data if isinstance(x, Seen) and x.data.shape == two.shape else None
        one, two = in_parts(one), in_parts(two)
        reference = None if reference is None else in_parts(reference)
        finite = two.isfinite()
        zero = torch.zeros((), dtype=torch.float64)
        off = float(torch.where(finite, one.double() - two.double(), zero).norm())
        norm = float(torch.where(finite, two.double(), zero).norm())
        bound = MAGNITUDE_FACTOR * EPS[two.dtype]
        same = torch.equal(one.isfinite(), finite)
        size = norm if same and off <= bound * norm else self.norm_of(a.place, two)
        if off and size and off / size > found.error:
            found.error, found.at = off / size, name
        if same and off <= bound * size:  # NaN and infinities are compared there
            what = difference(one, two, two, size)
            return None if what is None else self.differs(name, what)
        if not self.sure:
            found.open.append(name)
            return None
        if reference is None:  # eager's own rounding is not known: as much as what is allowed
            size, reference = 4 * size, two
        what = difference(one, two, reference.double(), size)
        return None if what is None else self.differs(name, what)


def _of_errors(ours: Exception | None, eager: Exception | None) -> list[Difference]:
    if ours is not None and eager is not None:
        if isinstance(ours, type(eager)) or isinstance(eager, type(ours)):
            return []
        return [Difference("what is raised", f"{ours!r}, in eager {eager!r}")]
    which, error = ("eager", eager) if ours is None else ("the compiled step", ours)
    said = error.text if isinstance(error, TracejitError) else error
    return [Difference("what is raised", f"only {which} raises {type(error).__name__}: {said}")]


def _same_text(a: str, b: str) -> bool:
    """Whether texts differ in numbers alone, by rounding."""
    if _NUMBER.sub("#", a) != _NUMBER.sub("#", b):
        return False
    for x, y in zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=True):
        digits = len(x.partition(".")[2]) if "e" not in x.lower() else 0
        last = 10.0**-digits if digits else 0.0
        if abs(float(x) - float(y)) > LOSS_RELATIVE * abs(float(y)) + 1.001 * last:
            return False
    return True


def _short(x: object) -> str:
    if isinstance(x, Seen):
        return f"a tensor {list(x.data.shape)} {x.data.dtype}"
    if isinstance(x, Made):
        return f"a {x.cls}"
    text = "nothing" if x is None else repr(x)
    return text if len(text) < 80 else f"{text[:77]}..."
