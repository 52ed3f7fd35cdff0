"""Collectives of torch.distributed, on memory: the one place that asks the engine to communicate.

In: which collective (a primitive of `ops/collectives.py` and its attributes), the addresses of its
operands and of its result, all row by row. Out: a `Started`, to be waited for. Nothing is computed
here: a process group moves and reduces what lies in memory.

Before the first collective of a run the ranks compare what they are about to do
(`runtime/agreement.py`): that is put in `before()`, and is called once.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Protocol

import torch

from tracejit.errors import CollectiveError
from tracejit.records import dataclass

Memory = tuple[int, int]  # an address, and how many bytes lie there

_local = threading.local()

_NOTHING = "torch.distributed is not initialized in this process"


def group_named(name: str) -> torch.distributed.ProcessGroup:
    """The process group of a name that `name_of` gave; CollectiveError where there is none."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise CollectiveError(what=f"a collective of group {name!r}", reason=_NOTHING)
    try:
        return torch.distributed.distributed_c10d._resolve_process_group(name)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CollectiveError(
            what=f"a collective of group {name!r}", reason="the process group is no more"
        ) from error


def name_of(group: torch.distributed.ProcessGroup) -> str:
    """The name of a process group, which is the same on all of its ranks."""
    return group.group_name


def timeout_of(group: torch.distributed.ProcessGroup) -> timedelta:
    """After what time a collective of a group is given up."""
    backend = None
    for kind in ("cpu", "cuda"):
        with suppress(RuntimeError):  # it has none for that
            backend = group._get_backend(torch.device(kind))
            break
    found = getattr(getattr(backend, "options", None), "_timeout", None)
    return found or torch.distributed.distributed_c10d.default_pg_timeout


def before() -> list[Callable[[], None]]:
    """What is still to be done before the next collective that this thread starts."""
    if not hasattr(_local, "before"):
        _local.before = []
    return _local.before


@contextmanager
def silent() -> Iterator[None]:
    """Collectives that this thread starts inside do nothing: where launches are only timed."""
    _local.silent = True
    try:
        yield
    finally:
        _local.silent = False


class Space(Protocol):
    """Where the memory of a collective lies."""

    of_barrier: Mapping[str, object]  # options of a barrier there

    def tensor(self, memory: Memory, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor of memory that somebody else keeps."""

    def copy(self, to: int, memory: Memory) -> None:
        """Copy bytes to an address."""


class _Host:
    """The memory of this process."""

    of_barrier: Mapping[str, object] = {}

    def tensor(self, memory: Memory, dtype: torch.dtype) -> torch.Tensor:
        address, nbytes = memory
        if not nbytes:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=dtype)

    def copy(self, to: int, memory: Memory) -> None:
        ctypes.memmove(to, *memory)


HOST = _Host()


@dataclass(slots=True)
class Started:
    """A collective that is under way. It holds the tensors that stand for its memory."""

    what: str
    work: torch.distributed.Work | None
    tensors: Sequence[torch.Tensor]

    def wait(self) -> None:
        """Until the result is there; CollectiveError where the engine fails."""
        work, self.work = self.work, None
        if work is None:
            return
        try:
            work.wait()
        except RuntimeError as error:
            raise failed(self.what, error) from error


def failed(what: str, error: Exception) -> CollectiveError:
    """The error for a collective that the engine gives up."""
    first = str(error).strip().splitlines()
    return CollectiveError(what=what, reason=first[0] if first else type(error).__name__)


def start(
    name: str,
    attrs: Mapping[str, object],
    dtype: torch.dtype,
    operands: Sequence[Memory],
    result: Memory,
    where: str = "",
    space: Space = HOST,
) -> Started:
    """Start a collective. Operands are read until it is waited for. In a group of one rank the
    result is what is sent, and the engine is not asked. On a GPU it comes behind what was given to
    the current stream, and to wait for it holds that stream, not the host."""
    if getattr(_local, "silent", False):
        return Started(name, None, ())
    if attrs["ranks"] == 1:  # nobody is there to communicate with
        _put_together(operands, result, space)
        return Started(name, None, ())
    waiting = before()
    while waiting:
        waiting.pop()()
    what = f"{name} ({where})" if where else name
    group = group_named(attrs["group"])
    distributed = torch._C._distributed_c10d
    if name == "barrier":
        opts = _options(distributed.BarrierOptions, **space.of_barrier)
        return _begun(what, lambda: group.barrier(opts), ())
    out = space.tensor(result, dtype)
    if name in IN_PLACE:
        _put_together(operands, result, space)
        if name == "all_reduce":
            opts = _options(distributed.AllreduceOptions, reduceOp=_reduction(attrs))
            return _begun(what, lambda: group.allreduce([out], opts), (out,))
        if name == "reduce_to":
            opts = _options(
                distributed.ReduceOptions, reduceOp=_reduction(attrs), rootRank=attrs["root"]
            )
            return _begun(what, lambda: group.reduce([out], opts), (out,))
        opts = _options(distributed.BroadcastOptions, rootRank=_root(attrs), rootTensor=0)
        return _begun(what, lambda: group.broadcast([out], opts), (out,))
    ranks = attrs["ranks"]
    mine = space.tensor(operands[0], dtype)
    held = (out, mine)
    if name == "all_gather":
        opts = _options(distributed.AllgatherOptions)
        rows = list(out.view(ranks, -1)) if out.numel() else [out] * ranks
        return _begun(what, lambda: group.allgather([rows], [mine], opts), (*held, *rows))
    if name == "reduce_scatter":
        opts = _options(distributed.ReduceScatterOptions, reduceOp=_reduction(attrs))
        rows = list(mine.view(ranks, -1)) if mine.numel() else [mine] * ranks
        return _begun(what, lambda: group.reduce_scatter([out], [rows], opts), (*held, *rows))
    if name == "all_to_all":
        opts = _options(distributed.AllToAllOptions)
        sizes = [_numbers(attrs["received"]), _numbers(attrs["sent"])]
        return _begun(what, lambda: group.all_to_all_single(out, mine, *sizes, opts), held)
    here = attrs["here"]
    if name == "gather_ranks":
        opts = _options(distributed.GatherOptions, rootRank=attrs["root"])
        rows = list(out.view(ranks, -1)) if here else []
        given = [rows] if here else []
        if not here:
            _put_together(operands, result, space)
        return _begun(what, lambda: group.gather(given, [mine], opts), (*held, *rows))
    assert name == "scatter_ranks", name
    opts = _options(distributed.ScatterOptions, rootRank=attrs["root"])
    rows = list(mine.view(ranks, -1)) if here else []
    given = [rows] if here else []
    return _begun(what, lambda: group.scatter([out], given, opts), (*held, *rows))


# Under `join()` collectives of a module say so: a reduction at the end of what it is `of`, and a
# broadcast by its root, which is the last rank that has not joined.
JOINS, THROWS = "join", "join!"
_ROOTS = {-1: JOINS, -2: THROWS}


def joins(attrs: Mapping[str, object]) -> str:
    """Under which kind of `join()` a collective is; empty if under none."""
    found = _ROOTS.get(attrs.get("root"), "")
    of = str(attrs.get("of", ""))
    return found or next((x for x in (JOINS, THROWS) if of.endswith(x)), "")


def place(device: str) -> str:
    """Where ranks tell that they have not joined, for tensors of a device: where torch has them."""
    return "cuda" if device.startswith("cuda") else "cpu"


def last_active(*, throws: bool) -> int:
    """The root of a broadcast under `join()`."""
    return -2 if throws else -1


def note_active(group: str, ranks: Sequence[int]) -> None:
    """Which ranks of a group have not joined, by what they have told each other last."""
    if not hasattr(_local, "last"):
        _local.last = {}
    _local.last[group] = ranks[-1]


def _root(attrs: Mapping[str, object]) -> int:
    root = attrs["root"]
    return root if root >= 0 else _local.last[attrs["group"]]


IN_PLACE = (
    "all_reduce",
    "broadcast",
    "reduce_to",
)  # they work on their operands, one after another


def _begun(what: str, call: Callable, tensors: Sequence[torch.Tensor]) -> Started:
    try:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return Started(what, call(), tensors)
    except (RuntimeError, ValueError) as error:
        raise failed(what, error) from error


def _options(kind: type, **fields: object) -> object:
    made = kind()
    for name, value in fields.items():
        setattr(made, name, value)
    made.asyncOp = True
    return made


def _reduction(attrs: Mapping[str, object]) -> object:
    return getattr(torch.distributed.ReduceOp, attrs["by"])


def _numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")] if text else []


def _put_together(operands: Sequence[Memory], result: Memory, space: Space) -> None:
    """Copy operands one after another to where the result will be, unless they lie there."""
    at, _ = result
    for address, nbytes in operands:
        if nbytes and address != at:
            space.copy(at, (address, nbytes))
        at += nbytes
