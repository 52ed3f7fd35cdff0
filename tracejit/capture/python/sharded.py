"""Modules sharded by `fully_shard` (FSDP2) in a step: refused before their hooks change anything.

Their parameters are DTensors, which have no rules. The hook that comes before such a module's
forward pass first reads `_training_state` of its state, and writes to it then. So that attribute is
a property while a step is traced; a hook itself is bound, and cannot be replaced.
"""

from __future__ import annotations

import sys

from tracejit.capture.trace.active import current

_MODULE = "torch.distributed.fsdp._fully_shard._fsdp_state"
_NAME = "_training_state"


class _TrainingState:
    """The attribute, which a traced step may not read."""

    def __get__(self, state: object, owner: type) -> object:
        if state is None:
            return self
        if (t := current()) is not None:
            t.begin(sys.modules["torch.distributed.fsdp"].fully_shard, ())
            raise t.unsupported(
                "The parameters of a sharded module are DTensors, which have no rule; leave the "
                "step eager, or use DistributedDataParallel, with ZeroRedundancyOptimizer to shard "
                "the optimizer's state"
            )
        try:
            return vars(state)[_NAME]
        except KeyError:
            raise AttributeError(_NAME) from None

    def __set__(self, state: object, value: object) -> None:
        vars(state)[_NAME] = value


def added() -> list[tuple[object, str, object]]:
    """(owner, name, what stands there while a step is traced), if FSDP2 is in use."""
    kind = getattr(sys.modules.get(_MODULE), "FSDPState", None)
    return [] if kind is None else [(kind, _NAME, _TrainingState())]
