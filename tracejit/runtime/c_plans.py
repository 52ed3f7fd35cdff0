"""Plan → CpuPlan, through the disk cache.

An entry holds the digests of the plan's kernels, by which their compiled functions are found, and
the CpuPlan's text. Of that text a warm start reads how kernels are called and where they work; a
kernel's own text is parsed only where it must be printed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tracejit import knobs
from tracejit.errors import TracejitError
from tracejit.records import dataclass
from tracejit.runtime.cache import DiskCache, digest_of, sha256
from tracejit.schedule.cpu.plan import CpuKernel, CpuPlan
from tracejit.schedule.cpu.text import identity, parse_cpu_plan
from tracejit.schedule.plan import Plan
from tracejit.schedule.plan_text import text_of


@dataclass(frozen=True)
class Lowered:
    """A CpuPlan, and a digest of each of its kernels, by name, that is the same for kernels which
    differ in variables' numbers and the users' lines only."""

    plan: CpuPlan
    digests: Mapping[str, str]


Meet = Callable[[CpuKernel, str], object]  # what is done with a kernel and its digest


def lowered(plan: Plan, vector_bytes: int, meet: Meet = lambda kernel, digest: None) -> Lowered:
    """The lowered plan for the C executor, from the disk cache if it is there. Where it is made,
    `meet` sees each kernel as soon as it is lowered."""
    cache, key = DiskCache(), _key(plan, vector_bytes)
    body = cache.get("cpu", key)
    found = None if body is None else _parsed(body)
    return found or _made(plan, vector_bytes, cache, key, meet)


def lowered_anew(plan: Plan, vector_bytes: int, meet: Meet) -> Lowered:
    """The same where what the cache has turned out to be unreadable: made, and put there."""
    return _made(plan, vector_bytes, DiskCache(), _key(plan, vector_bytes), meet)


def _key(plan: Plan, vector_bytes: int) -> str:
    return f"{digest_of('ir', 'schedule')} vectors={vector_bytes}\n{sha256(text_of(plan))}"


def _made(plan: Plan, vector_bytes: int, cache: DiskCache, key: str, meet: Meet) -> Lowered:
    from tracejit.schedule.cpu.lower import lower  # a warm start lowers nothing
    from tracejit.schedule.cpu.sound import check_cpu_plan

    found: dict[CpuKernel, str] = {}

    def met(kernel: CpuKernel) -> None:
        found[kernel] = sha256(identity(kernel))
        meet(kernel, found[kernel])

    cpu_plan = lower(plan, vector_bytes, met)
    if knobs.verify():
        check_cpu_plan(plan, cpu_plan)
    digests = {name: found[kernel] for name, kernel in cpu_plan.kernels.items()}
    cache.store("cpu", key, f"{' '.join(digests.values())}\n{cpu_plan}")
    return Lowered(cpu_plan, digests)


def _parsed(body: str) -> Lowered | None:
    """An entry's plan; None where it cannot be read."""
    digests, _, text = body.partition("\n")
    try:
        plan = parse_cpu_plan(text)
        return Lowered(plan, dict(zip(plan.kernels, digests.split(), strict=True)))
    except (TracejitError, ValueError):
        return None
