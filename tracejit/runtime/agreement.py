"""Ranks stay together: before each run of a plan with collectives the ranks compare what they do.

Guards, retraces and decisions are each rank's own, so ranks can come to one call with different
plans. Each rank sends a digest of its plan's collectives, and of the numbers that must be the same
on all of them, to the others, over a group of its own on the CPU. That goes on while the plan
computes; it is waited for before the first collective. Where digests differ, all ranks raise, with
what each was about to do, and nothing has been communicated or written.

What a rank must have in common with others: the collectives of a group, in their order; and the
runtime scalars, such as a learning rate, that have a part in what is written beside the result of a
collective: it would be the same on all ranks but for them.
"""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Sequence
from datetime import timedelta

import torch

from tracejit.errors import CollectiveError, RanksDiffer
from tracejit.ir import process_groups
from tracejit.ir.graph import Graph
from tracejit.ir.process_groups import failed
from tracejit.schedule.collectives import collectives_of
from tracejit.schedule.plan import Plan

_PATIENCE = timedelta(seconds=10)  # of a rank that fails anyway
# by name of a group: the group, and the one over which its ranks compare
_beside: dict[str, tuple[object, object]] = {}


def numbers_in_common(graph: Graph) -> tuple[int, ...]:
    """The positions of the runtime scalars that ranks must have in common."""
    bit: dict[object, int] = {}
    for position, param in enumerate(graph.params):
        if param.value.type.is_host:
            bit[param.value] = 1 << position
    reduced: set[object] = set()
    for node in graph.nodes:
        found = 0
        if not node.is_ordered:
            for value in node.inputs:
                found |= bit.get(value, 0)
        for out in node.outs:
            bit[out] = found
        if node.is_ordered or not reduced.isdisjoint(node.inputs):
            reduced.update(node.outs)
    common = 0
    for write in graph.writes:
        if write.value in reduced:
            common |= bit.get(write.value, 0)
    return tuple(i for i in range(len(graph.params)) if common >> i & 1)


class Agreement:
    """What the ranks compare before a run of one plan."""

    def __init__(self, plan: Plan, positions: Sequence[int], names: Sequence[str] = ()):
        self.step, self.positions = plan.name, tuple(positions)
        self.goes_on = False  # the call has another plan to run afterwards
        self.names = [names[i] if i < len(names) else f"number {i}" for i in self.positions]
        self.sequences: dict[str, list[str]] = {}
        self.ranks: dict[str, int] = {}
        for group, ranks, what, where in collectives_of(plan):
            self.ranks[group] = ranks
            self.sequences.setdefault(group, []).append(f"{what} ({where})" if where else what)
        self._digests = {
            group: _digest("\n".join([self.step, *map(_bare, sequence)]).encode())
            for group, sequence in self.sequences.items()
        }
        self._pack = struct.Struct(f"{len(self.positions)}d").pack
        self._groups: dict[str, object] = {}  # as they were at the first run

    def begin(self, *numbers: float) -> None:
        """Send what this rank is about to do; before the first collective it is compared."""
        packed = self._pack(*numbers)
        _count()
        _exchanges.goes_on = self.goes_on
        before = process_groups.before()
        before.clear()
        exchanges = []
        for group, digest in self._digests.items():
            found = self._group(group)
            if found.size() > 1:
                exchanges.append((group, _Exchange(found, _digest(digest + packed))))
        before.append(lambda: self._compare(exchanges, numbers))

    def otherwise(self, what: str, *, fails: bool = False) -> None:
        """Say that this rank does not run a plan in this call, but `what`; return if no rank does.
        RanksDiffer where others do, unless this one `fails` anyway."""
        _count()
        try:
            for group in self._digests:
                exchange = _Exchange(self._group(group), _digest(f"{self.step}\n{what}".encode()))
                if exchange.differs(_PATIENCE if fails else None):
                    self._raise(group, exchange, {"does": what})
        except (CollectiveError, RanksDiffer):
            if not fails:
                raise

    def _group(self, name: str) -> object:
        """A group that is still the one of the first run, with as many ranks as the plan is for."""
        group = process_groups.group_named(name)
        if group.size() != self.ranks[name]:
            raise CollectiveError(
                what=f"{self.step} on process group {name!r}",
                reason=f"it was compiled for {self.ranks[name]} ranks, and the group has "
                f"{group.size()}; compile the step in this world",
            )
        if self._groups.setdefault(name, group) is not group:
            raise CollectiveError(
                what=f"{self.step} on process group {name!r}",
                reason="it is another group than the step was compiled for; call step.reset()",
            )
        return group

    def _compare(self, exchanges: Sequence[tuple[str, _Exchange]], numbers: tuple) -> None:
        found = [(group, exchange) for group, exchange in exchanges if exchange.differs()]
        for group, exchange in found:
            said = {
                "collectives": self.sequences[group],
                "numbers": dict(zip(self.names, map(repr, map(float, numbers)), strict=True)),
            }
            self._raise(group, exchange, said)

    def _raise(self, group: str, exchange: _Exchange, said: dict) -> None:
        said["step"] = self.step
        reason = difference([json.loads(x) for x in exchange.texts(json.dumps(said))])
        raise RanksDiffer(step=self.step, group=group, reason=reason)


_exchanges = threading.local()


def told() -> int:
    """How often this thread has told other ranks what it does."""
    return getattr(_exchanges, "count", 0)


def awaited(before: int) -> bool:
    """Whether other ranks wait for this thread in a call, since `told` said `before`."""
    return told() == before or getattr(_exchanges, "goes_on", False)


def _count() -> None:
    _exchanges.count = told() + 1


def _digest(what: bytes) -> bytes:
    return hashlib.blake2b(what, digest_size=8).digest()


class _Exchange:
    """A digest on its way to the other ranks of a group."""

    def __init__(self, group: object, digest: bytes):
        self._beside = beside(group)
        ranks = self._beside.size()
        self._all = torch.empty(ranks, dtype=torch.int64)
        self._mine = torch.tensor([int.from_bytes(digest, "little", signed=True)])
        self._work = self._gather(list(self._all.view(ranks, 1)), self._mine)

    def _gather(self, rows: list[torch.Tensor], mine: torch.Tensor) -> object:
        options = torch._C._distributed_c10d.AllgatherOptions()
        with torch._C.DisableTorchFunction(), torch.no_grad():
            try:
                return self._beside.allgather([rows], [mine], options)
            except RuntimeError as error:
                raise failed(_WHAT, error) from error

    def _wait(self, work: object, patience: timedelta | None = None) -> None:
        try:
            work.wait() if patience is None else work.wait(patience)
        except RuntimeError as error:
            raise failed(_WHAT, error) from error

    def differs(self, patience: timedelta | None = None) -> bool:
        """Whether the ranks have sent different digests: all of them get the same answer."""
        self._wait(self._work, patience)
        found = self._all.tolist()
        return found.count(found[0]) != len(found)

    def texts(self, mine: str) -> list[str]:
        """The texts of all ranks, which all of them must ask for."""
        given = torch.frombuffer(bytearray(mine.encode()), dtype=torch.uint8)
        ranks = self._beside.size()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
        self._wait(self._gather(sizes, torch.tensor([given.numel()])))
        longest = max(int(n) for n in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: given.numel()] = given
        rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(ranks)]
        self._wait(self._gather(rows, padded))
        counts = map(int, sizes)
        return [bytes(row[:n].tolist()).decode() for row, n in zip(rows, counts, strict=True)]


_WHAT = "the comparison of what the ranks are about to do"


def beside(group: object) -> object:
    """The group over which the ranks of a group compare: made when all of them ask for it first."""
    name = process_groups.name_of(group)
    known = _beside.get(name)
    if known is None or known[0] is not group:
        distributed = torch.distributed
        ranks = distributed.get_process_group_ranks(group)
        timeout = process_groups.timeout_of(group)
        try:
            made = distributed.new_group(
                ranks, timeout=timeout, backend="gloo", use_local_synchronization=True
            )
        except RuntimeError as error:
            raise CollectiveError(
                what=f"the first run of a compiled step with collectives of group {name!r}",
                reason=f"not all of its ranks came to it within {timeout}: {error}",
            ) from error
        known = _beside[name] = group, made
    return known[1]


def difference(said: Sequence[dict]) -> str:
    """In words, what the ranks have said that is not the same."""
    first = said[0]
    rank = next((i for i, other in enumerate(said) if _told(other) != _told(first)), None)
    if rank is None:
        return "they say the same, but their digests differ"
    other = said[rank]
    for word in ("step", "does"):
        if first.get(word) != other.get(word):
            mine, its = (x.get(word) or "runs its plan" for x in (first, other))
            return f"rank 0 {_of(word, mine)}, rank {rank} {_of(word, its)}"
    one, two = first["collectives"], other["collectives"]
    if list(map(_bare, one)) != list(map(_bare, two)):
        at = next(
            (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if _bare(a) != _bare(b)),
            min(len(one), len(two)),
        )
        return (
            f"rank 0 has {len(one)} collectives and rank {rank} has {len(two)}; number {at} is "
            f"{_shown(one, at)} on rank 0, and {_shown(two, at)} on rank {rank}. A rank has traced "
            "another branch, or was given other shapes"
        )
    for name, number in first["numbers"].items():
        if other["numbers"].get(name) != number:
            return (
                f"{name} is {number} on rank 0, and {other['numbers'].get(name)} on rank {rank}; "
                "it has a part in what is written together with what the ranks have reduced, so "
                "their tensors would no longer be the same"
            )
    return f"rank 0 has the numbers {first['numbers']}, rank {rank} {other['numbers']}"


def _told(said: dict) -> dict:
    return {**said, "collectives": list(map(_bare, said.get("collectives", ())))}


def _bare(collective: str) -> str:
    return collective.partition(" (")[0]


def _of(word: str, what: str) -> str:
    return what if word == "does" else f"calls {what}"


def _shown(sequence: Sequence[str], at: int) -> str:
    return sequence[at] if at < len(sequence) else "nothing"
