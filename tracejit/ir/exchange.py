"""What ranks tell each other beside their collectives: digests, and texts where those differ.

Each process group has a group of its own on the CPU for that, over gloo. All ranks of a group come
to the same exchanges in the same order, whatever they are about to do: to run a plan, to ask which
parameters the others use, to run eagerly, or to leave with an exception. So an exchange always
tells who does something else.

In a call a question is asked once: a trace that begins anew, or another replay of the same call,
finds the answer in `answers`.

Under `join()` of torch.distributed a rank that has no more inputs has joined: it has nothing to do
in a call but to listen, and to take part in the collectives of the others (`runtime/joining.py`).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch

from tracejit.errors import CollectiveError, InputsExhausted, RanksDiffer
from tracejit.ir import process_groups
from tracejit.ir.process_groups import failed

_PATIENCE = timedelta(seconds=10)  # of a rank that fails anyway
# by name of a group: the group, and the one over which its ranks tell each other
_beside: dict[str, tuple[object, object]] = {}
_exchanges = threading.local()
_JOIN = "join"
# by thread: what the ranks have answered in the call under way, by group and question
answers: dict[int, dict[tuple[object, object], object]] = {}
# by group and number of the question: the parameters that some rank has used. That of a rank that
# has joined stays, and grows, as it does in eager: these parameters get gradients of zeros
_used: dict[tuple[object, int], str] = {}


# ---- what a call has told


def begin_call() -> None:
    """A call of a compiled step begins: nothing has been asked in it."""
    answers.pop(threading.get_ident(), None)


def told() -> int:
    """How often this thread has told other ranks what it does."""
    return getattr(_exchanges, "count", 0)


def awaited(before: int) -> bool:
    """Whether other ranks wait for this thread in a call, since `told` said `before`."""
    return told() == before or getattr(_exchanges, "goes_on", False)


def tell(*, goes_on: bool) -> None:
    """This thread tells other ranks what it does; whether the call `goes_on` to another plan."""
    _exchanges.count, _exchanges.goes_on = told() + 1, goes_on


def asked() -> list[object]:
    """The groups whose ranks have been asked in the call under way."""
    return list(dict.fromkeys(group for group, _ in answers.get(threading.get_ident(), ())))


def otherwise(groups: Sequence[object], step: str, what: str, *, fails: bool) -> None:
    """Say that this rank does not run a plan in this call, but `what`; return if no rank does.
    RanksDiffer where others do, unless this one `fails` anyway."""
    tell(goes_on=False)
    try:
        for group in groups:
            mine = Exchange(group, digest(f"{step}\n{what}".encode()))
            mine.settle(step, lambda: {"does": what}, _PATIENCE if fails else None)
    except (CollectiveError, RanksDiffer):
        if not fails:
            raise


def used(group: object, step: str, mine: str, number: int) -> str:
    """Which parameters of a module the ranks use in this call: "1" for each that all of them use,
    "x" for some of them, "0" for none. `mine` has "1" for each that this one uses, else "0"; it is
    the `number`-th time that a call asks."""
    known = answers.setdefault(threading.get_ident(), {})
    if (group, number) not in known:
        asks = f"asks which of {len(mine)} parameters the others use"
        tell(goes_on=True)
        exchange = Exchange(group, digest(f"{asks}\n{mine}".encode()))
        maps, differs = [mine], exchange.differs()
        if differs or exchange.joined:
            said = exchange.said({"does": asks, "step": step, "uses": mine, "number": number})
            if any(x.get("does") != asks for x in said):
                exchange.disagree(step, said)
            maps = [x["uses"] for x in said]
            none = "0" * len(mine)
            maps += [x["used"].get(str(number), none) for x in exchange.of_joined]
        known[group, number] = _joint(maps)
        _used[group, number] = known[group, number].replace("x", "1")
    return known[group, number]


def _joint(maps: Sequence[str]) -> str:
    """Per parameter "1" if all maps have it, "x" if some do, "0" if none has."""
    return "".join("x" if len(set(of)) > 1 else of[0] for of in zip(*maps, strict=True))


# ---- ranks that have joined

EAGERLY = "runs the step eagerly"
# What a rank adds to the number of those that have not joined, where it runs a compiled step: all
# ranks learn by one sum, which eager makes as well, how many there are of both.
COMPILED = 4096


def announce(group: object, device: str, *, throws: bool) -> None:
    """Tell ranks that have joined, once in a call, that this one has not: as eager does it, which
    `throws` where some rank has."""
    known = answers.setdefault(threading.get_ident(), {})
    if group.size() == 1 or (group, _JOIN) in known:
        return
    found = summed(group, 1 + COMPILED, device)
    check_alike(group, found)
    if throws and summed(group, 0, device):
        raise InputsExhausted()
    known[group, _JOIN] = found


def check_alike(group: object, found: int) -> None:
    """RanksDiffer where some of the ranks that have not joined run compiled steps, and some do
    not."""
    active, compiled = found % COMPILED, found // COMPILED
    if compiled not in (0, active):
        reason = f"{compiled} of the {active} that have not joined run a plan, the others eagerly"
        name = process_groups.name_of(group)
        raise RanksDiffer(step="a step under join()", group=name, reason=reason)


def summed(group: object, number: int, device: str) -> int:
    """A number, summed over the ranks of a group."""
    options = torch._C._distributed_c10d.AllreduceOptions()
    with torch._C.DisableTorchFunction(), torch.no_grad():
        mine = torch.full((1,), float(number), device=device)
        try:
            group.allreduce([mine], options).wait()
        except RuntimeError as error:
            raise failed("the count of ranks that have not joined", error) from error
        return int(mine.item())


def listen(group: object) -> tuple[dict, int]:
    """What the ranks that have not joined are about to do, as one of them says it, and the last of
    these. RanksDiffer where they do not agree, or have failed."""
    exchange = Exchange(group, digest(_JOIN.encode()))
    differs = exchange.differs()
    known = {str(n): x for (of, n), x in _used.items() if of is group}
    said = exchange.said({"used": known})
    ends = said[0].get("does", EAGERLY) != EAGERLY and "uses" not in said[0]
    if ends or (differs and not all("uses" in x for x in said)):
        exchange.disagree("a step under join()", said)
    if "uses" in said[0]:
        number, maps = said[0]["number"], [x["uses"] for x in said]
        maps.append(_used.get((group, number), "0" * len(maps[0])))
        _used[group, number] = _joint(maps).replace("x", "1")
    return said[0], exchange.active[-1]


# ---- exchanges


def digest(what: bytes) -> bytes:
    """That of what ranks must have in common."""
    return hashlib.blake2b(what, digest_size=8).digest()


class Exchange:
    """A digest on its way to the other ranks of a group."""

    def __init__(self, group: object, mine: bytes):
        self._group, self._beside = group, beside(group)
        ranks = self._beside.size()
        self.active = list(range(ranks))  # the ranks that have not joined, once it is known
        self.of_joined: list[dict] = []  # what the others say
        self._all = torch.empty(ranks, dtype=torch.int64)
        self._mine = torch.tensor([_number(mine)])
        self._work = self._gather(list(self._all.view(ranks, 1)), self._mine)

    @property
    def joined(self) -> bool:
        """Whether a rank has joined, which wants to hear what the others do."""
        return len(self.active) < self._beside.size()

    def differs(self, patience: timedelta | None = None) -> bool:
        """Whether the ranks have sent different digests: all of them get the same answer."""
        self._wait(self._work, patience)
        found = self._all.tolist()
        if _JOINED in found:
            self.active = [i for i, x in enumerate(found) if x != _JOINED]
            found = [found[i] for i in self.active]
        return found.count(found[0]) != len(found)

    def settle(
        self, step: str, mine: Callable[[], dict], patience: timedelta | None = None
    ) -> None:
        """Raise, on all ranks, what they are about to do if that is not the same."""
        differs = self.differs(patience)
        if differs or self.joined:
            said = self.said({**mine(), "step": step})
            if differs:
                self.disagree(step, said)

    def said(self, mine: dict) -> list[dict]:
        """What the ranks say that have not joined; all ranks must ask for it."""
        texts = [json.loads(text) for text in self._texts(json.dumps(mine))]
        self.of_joined = [x for i, x in enumerate(texts) if i not in self.active]
        return [{**texts[i], "rank": i} for i in self.active]

    def disagree(self, step: str, said: Sequence[dict]) -> None:
        """Raise, on all ranks, what they have said that is not the same."""
        name = process_groups.name_of(self._group)
        raise RanksDiffer(step=step, group=name, reason=difference(said))

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

    def _texts(self, mine: str) -> list[str]:
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


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little", signed=True)


_JOINED = _number(digest(_JOIN.encode()))
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
    other = next((x for x in said if _told(x) != _told(first)), None)
    if other is None and "does" in first:
        return f"rank {first['rank']} {first['does']}, and others wait for it under join()"
    if other is None:
        return "they say the same, but their digests differ"
    zero, rank = first["rank"], other["rank"]
    for word in ("does", "step"):
        if first.get(word) != other.get(word):
            mine, its = (x.get(word) or "runs its plan" for x in (first, other))
            return f"rank {zero} {_of(word, mine)}, rank {rank} {_of(word, its)}"
    one, two = first["collectives"], other["collectives"]
    if list(map(bare, one)) != list(map(bare, two)):
        at = next(
            (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if bare(a) != bare(b)),
            min(len(one), len(two)),
        )
        return (
            f"rank {zero} has {len(one)} collectives and rank {rank} has {len(two)}; number {at} "
            f"is {_shown(one, at)} on rank {zero}, and {_shown(two, at)} on rank {rank}. A rank "
            "has traced another branch, or was given other shapes"
        )
    for name, number in first["numbers"].items():
        its = other["numbers"].get(name)
        if its != number:
            return (
                f"{name} is {number} on rank {zero}, and {its} on rank {rank}; "
                "it has a part in what is written together with what the ranks have reduced, so "
                "their tensors would no longer be the same"
            )
    return f"rank {zero} has the numbers {first['numbers']}, rank {rank} {other['numbers']}"


def _told(said: dict) -> dict:
    return {**said, "rank": 0, "collectives": list(map(bare, said.get("collectives", ())))}


def bare(collective: str) -> str:
    """What is said of a collective, without the user's line."""
    return collective.partition(" (")[0]


def _of(word: str, what: str) -> str:
    return what if word == "does" else f"calls {what}"


def _shown(sequence: Sequence[str], at: int) -> str:
    return sequence[at] if at < len(sequence) else "nothing"
