"""How long a launch should take on a GPU, by what it issues, and what holds it back.

In: the `Work` of a launch, how many of its programs an SM holds at a time, a `Gpu`. Out: a
`Prediction`: the launch itself, and then the longest of four times, as if everything else was
hidden behind it. No kernel has been timed for this: it says which launch is far from what the
hardware can do, and why.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracejit.codegen.work import Work
from tracejit.gpus import BALANCE, IN_FLIGHT, LATENCY, LAUNCH, LONG, Gpu
from tracejit.records import dataclass

MOST_ISSUED = 4  # times the bytes that a kernel without a contraction has to move


@dataclass(frozen=True)
class Prediction:
    """Seconds of a launch, and what they are: "memory", "cache", "arithmetic" or "waiting"; or
    "launch", where that takes longest."""

    seconds: float
    bound: str


@dataclass(frozen=True)
class Filling:
    """How the programs of a launch fill a GPU.

    per_sm:    programs that one SM holds at a time.
    waves:     how often all SMs are filled; below 1 some stay empty, or hold fewer than they could.
    balance:   the share of the SMs' time that is used if all programs take equally long: the SM
        that gets most of them decides.
    in_flight: bytes per SM that are waited for at a time, on average over all SMs, by those
        programs that wait most often.
    steps:     how often the longest program waits.
    """

    per_sm: int
    waves: float
    balance: float
    in_flight: float
    steps: int


def filling(works: Sequence[Work], gpu: Gpu, per_sm: int, *, copies: bool) -> Filling:
    """How a launch fills a GPU. `copies`: the hardware loads ahead in its loops by itself."""
    programs, slots = sum(w.programs for w in works), gpu.sms * max(1, per_sm)
    if not programs:
        return Filling(per_sm, 0.0, 1.0, 0.0, 0)
    longest = max(works, key=lambda w: (w.steps, w.programs))
    waiting = longest.waiting * (longest.ahead if copies else 1)
    return Filling(
        per_sm=per_sm,
        waves=programs / slots,
        balance=programs / (gpu.sms * -(-programs // gpu.sms)),
        in_flight=min(longest.programs, slots) * waiting / gpu.sms,
        steps=longest.steps,
    )


def predict(
    works: Sequence[Work],
    gpu: Gpu,
    per_sm: int,
    minimum_bytes: int,
    *,
    precision: str,
    copies: bool,
    tensor: bool | None = None,
) -> Prediction:
    """How long a launch takes.

    memory      its unique addresses at the speed of memory
    cache       what it issues at the speed of the L2 cache
    arithmetic  products at the rate of the unit that computes them, other operations at half that
                of fp32 (which counts an FMA as two), divided by the balance between SMs
    waiting     the steps of the longest program, or of all programs dealt to what the SMs hold at
                a time, each the latency of memory; fewer where tiles are loaded ahead

    `precision` is of fp32 contractions; `tensor`: whether the machine code has instructions of
    tensor cores, where it is known.
    """
    filled = filling(works, gpu, per_sm, copies=copies)
    arithmetic = sum(
        w.products / rate(w.operands, gpu, precision, tensor) + w.operations / (gpu.fp32 / 2)
        for w in works
    )
    steps = [w.steps / (w.ahead if copies else 1) for w in works]
    dealt = sum(w.programs * n for w, n in zip(works, steps, strict=True))
    dealt /= gpu.sms * max(1, per_sm)
    times = {
        "memory": minimum_bytes / gpu.bandwidth,
        "cache": sum(w.issued for w in works) / gpu.l2_bandwidth,
        "arithmetic": arithmetic / filled.balance,
        "waiting": LATENCY * max(dealt, *steps),
    }
    bound = max(times, key=times.get)
    return Prediction(LAUNCH + times[bound], bound if times[bound] >= LAUNCH else "launch")


def rate(operands: str, gpu: Gpu, precision: str, tensor: bool | None) -> float:
    """Operations per second of products of a dtype ("" for no products)."""
    if operands == "f64":
        return gpu.fp64
    peak = {"bf16": gpu.half, "f16": gpu.half}.get(operands, gpu.fp32)
    if operands == "f32" and precision != "ieee":
        peak = gpu.tf32 / (3 if precision == "tf32x3" else 1)
    return peak if tensor is not False else min(peak, gpu.fp32)


def fall_short(
    works: Sequence[Work], part_bytes: Sequence[int], filled: Filling
) -> list[tuple[str, float, float]]:
    """What keeps a launch from using its GPU: of what there is too little or too much, the number,
    its limit. `part_bytes` are what each of its kernels has to move.

    issued     A kernel without a contraction or attention issues at most MOST_ISSUED times the
               bytes that it has to move. In a launch of several, each has to.
    in flight  Where a program waits LONG times or more, IN_FLIGHT bytes per SM are under way.
    balance    The SMs are busy for BALANCE of the time, if all programs take equally long. Launches
               that are over in one round of short programs are left out: they take the latency of
               a few loads, however they are spread.
    """
    found = []
    ratios = [
        w.issued / max(1, least)
        for w, least in zip(works, part_bytes, strict=True)
        if w.form not in ("matmul", "attention")
    ]
    if max(ratios, default=0) > MOST_ISSUED:
        found.append(("issued", max(ratios), MOST_ISSUED))
    if filled.steps >= LONG and filled.in_flight < IN_FLIGHT:
        found.append(("in flight", filled.in_flight, IN_FLIGHT))
    if (filled.steps >= LONG or filled.waves > 1) and filled.balance < BALANCE:
        found.append(("balance", filled.balance, BALANCE))
    return found


def said(what: str, number: float, limit: float) -> str:
    """A shortfall in words."""
    form = {"issued": "{:.1f} times the minimum", "balance": "{:.0%}", "spills": "{:.0f}"}
    shown = form.get(what, "{:,.0f} bytes per SM")
    return f"{what} {shown.format(number)}, limit {shown.format(limit)}"
