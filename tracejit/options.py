"""What `tracejit.compile` was asked for, looked at once."""

from __future__ import annotations

from tracejit import knobs
from tracejit.records import dataclass
from tracejit.runtime.select import FAKES

MODES = ("auto", "rerun", "replay")
BACKENDS = ("auto", "c", "numpy", "triton", "interpret")
UNSUPPORTED = ("eager", "raise")
RANDOMNESS = ("eager", "fast")
REMAT = ("auto", "none")


def verified_calls(asked: object) -> tuple[int, float]:
    """How many calls of each plan are verified, and which share of the later ones. ValueError for
    what says neither."""
    if isinstance(asked, str) and asked.startswith("sample:"):
        try:
            share = float(asked.removeprefix("sample:"))
        except ValueError:
            share = -1.0
        if 0.0 < share <= 1.0:
            return 1, share
    elif isinstance(asked, int) and asked >= 0:
        return int(asked), 0.0
    raise ValueError(f'verify is a number of calls or "sample:0.001", not {asked!r}')


@dataclass(frozen=True)
class Options:
    """The options of a step, as `compile` explains them. Raises ValueError for what there is not.

    on_unsupported: None is what TRACEJIT_ON_UNSUPPORTED says.
    """

    mode: str = "auto"
    backend: str = "auto"
    fuse: bool = True
    keep_grads: bool = True
    on_unsupported: str | None = None
    require_graph: bool = False
    randomness: str = "eager"
    remat: str = "auto"
    device: str | None = None  # of the tensors that stand for numpy arrays
    verify: int | str | None = None  # calls of each plan, or "sample:0.001"; None as the knob says

    def __post_init__(self) -> None:
        if self.on_unsupported is None:
            object.__setattr__(self, "on_unsupported", knobs.on_unsupported())
        if self.verify is None:
            object.__setattr__(self, "verify", knobs.verified_calls())
        known = {"mode": MODES, "backend": (*BACKENDS, *FAKES), "on_unsupported": UNSUPPORTED}
        known |= {"randomness": RANDOMNESS, "remat": REMAT}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is one of {values}, not {getattr(self, name)!r}")
        verified_calls(self.verify)

    @property
    def falls_back(self) -> bool:
        """Whether what is refused runs eagerly."""
        return self.on_unsupported == "eager" and self.mode != "replay"
