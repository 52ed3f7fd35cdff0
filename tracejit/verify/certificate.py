"""What was verified of a step: a `Certificate`, to print or as data."""

from __future__ import annotations

from dataclasses import asdict, field

from tracejit.records import dataclass


@dataclass
class Verified:
    """Calls of one plan that were compared with eager, all of them equal.

    plan:     a digest of the plan's graph; `how` it was run: "trace" (its Python ran under the
              tracer) or "replay".
    inputs:   the graph's inputs by name, with dtype and shape.
    calls:    how many; the `first` and the `last` one, in UTC.
    tensors:  how many were compared in the last call, and `exactly` of them with eager's very bits.
    places:   all that was compared: tensors, numbers, and what Python objects hold.
    error:    the largest ‖ours - eager‖ of a tensor in any of these calls, over the norm of eager's
              or, where terms cancel, that of the tensor recomputed with absolute values; and where.
    """

    plan: str
    how: str
    inputs: dict[str, str]
    calls: int = 0
    first: str = ""
    last: str = ""
    tensors: int = 0
    exactly: int = 0
    places: int = 0
    error: float = 0.0
    at: str = ""

    def __str__(self) -> str:
        worst = f"largest relative error {self.error:.1e} ({self.at})" if self.at else "to the bit"
        shapes = ", ".join(f"{k}: {v}" for k, v in list(self.inputs.items())[:6])
        more = len(self.inputs) - 6
        return (
            f"plan {self.plan}, {self.how}: {self.calls} call(s) equal to eager, {self.first} to "
            f"{self.last} UTC, {self.tensors} tensors ({self.exactly} to the bit) and "
            f"{self.places} places in all, {worst}; on {shapes}"
            + (f" and {more} more" if more > 0 else "")
        )


@dataclass
class Certificate:
    """What was verified of one step.

    asked:       what `compile` was told: a number of calls, or "sample:0.001".
    verified:    plans that were compared with eager, by how they ran.
    unverified:  why calls could not be compared.
    withdrawn:   what differed: these plans are not used any more.
    """

    step: str
    asked: object
    verified: list[Verified] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether something was verified, and nothing differed."""
        return bool(self.verified) and not self.withdrawn

    def as_dict(self) -> dict:
        """The same as plain data."""
        return asdict(self) | {"holds": self.holds}

    def __str__(self) -> str:
        lines = [f"{self.step}, verify={self.asked!r}"]
        lines += [f"  {x}" for x in self.verified] or ["  nothing was verified"]
        lines += [f"  not verified: {why}" for why in self.unverified]
        lines += [f"  withdrawn: {what}" for what in self.withdrawn]
        return "\n".join(lines)
