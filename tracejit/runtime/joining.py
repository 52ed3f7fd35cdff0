"""`join()` of torch.distributed: a rank that has no more inputs, where others run compiled steps.

In eager such a rank does what the module's hooks say, which is what the reducer of the others does.
A compiled step has buckets of its own. So a rank that has joined listens to what the others are
about to do (`ir/exchange.py`), and takes part in it with zeros. Whether they run plans or eagerly
it learns by the sum in which they say that they have not joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.parallel import DistributedDataParallel

from tracejit.ir import exchange
from tracejit.ir.process_groups import failed

_c10d = getattr(torch._C, "_distributed_c10d", None)


def install() -> None:
    """Let `Join` of torch know of compiled steps, for the rest of the process."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.algorithms.join import Join

    if getattr(Join.__exit__, "of", None) is not _joined:
        Join.__exit__ = _joined(Join.__exit__)


def _joined(original: Callable) -> Callable:
    def __exit__(self: object, kind: type | None, *exception: object) -> None:
        if self._enable and not kind:
            shadow = _Shadow(self)
            self._join_hooks, self._get_num_nonjoined_procs = [shadow], shadow.count
        return original(self, kind, *exception)

    __exit__.of = _joined
    return __exit__


class _Shadow:
    """What a rank does after it has joined, in place of the hooks of its modules where others run
    plans."""

    def __init__(self, join: object):
        self.group, self.device = join._process_group, join._device
        self.hooks, self._count = list(join._join_hooks), join._get_num_nonjoined_procs
        self._compiled = False

    def count(self) -> int:
        """How many ranks have not joined; they tell that before each step."""
        found = int(self._count())
        exchange.check_alike(self.group, found)
        self._compiled = found >= exchange.COMPILED
        return found % exchange.COMPILED

    def main_hook(self) -> None:
        """Take part in one step of the others."""
        if not self._compiled:
            for hook in self.hooks:
                hook.main_hook()
            return
        while True:
            said, last = exchange.listen(self.group)
            if "uses" in said:
                continue
            if "does" in said:  # they run eagerly, or have failed
                return
            self._take_part(said["shadows"], last)
            if not said["goes on"]:
                return

    def _take_part(self, collectives: Sequence[dict], last: int) -> None:
        """Zeros are added to what modules reduce. Optimizers do what they do in eager."""
        own = [x for x in collectives if x["own"]]
        with torch.no_grad():
            try:
                begun = [self._begin(x, last) for x in own]
                for work, _ in begun:
                    work.wait()
            except RuntimeError as error:
                raise failed("a collective of a rank that has joined", error) from error
        if len(own) < len(collectives):
            for hook in self.hooks:
                if type(hook).__module__ != DistributedDataParallel.__module__:
                    hook.main_hook()

    def _begin(self, said: dict, last: int) -> tuple[object, torch.Tensor]:
        """What is under way, with the memory that it needs meanwhile."""
        dtype = getattr(torch, said["dtype"])
        zeros = torch.zeros(said["count"], dtype=dtype, device=self.device)
        if said["name"] != "broadcast":
            return self.group.allreduce([zeros], _c10d.AllreduceOptions()), zeros
        options = _c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = last, 0
        return self.group.broadcast([zeros], options), zeros

    def post_hook(self, is_last_joiner: bool) -> None:
        """All ranks have joined."""
        for hook in self.hooks:
            hook.post_hook(is_last_joiner)
