"""Predicted times of launches, and what keeps them from using a GPU, by numbers made up here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tracejit.aot import KernelFacts
from tracejit.codegen.work import Work
from tracejit.gpus import ARCHES, GPUS, LATENCY, LAUNCH
from tracejit.report import Report
from tracejit.roofline import filling, predict, rate
from tracejit.rows import Row, limits, shortfalls

H200 = GPUS["H200"]
MOVED = 13_200 * 6144
STREAM = Work("pointwise", 13_200, MOVED * 2 // 3, MOVED // 3, 1 << 20, steps=1, waiting=4096.0)


def predicted(*works: Work, per_sm: int = 8, minimum: int = MOVED, **known):
    options = {"precision": "ieee", "copies": False} | known
    return predict(works, H200, per_sm, minimum, **options)


def test_gpus_are_of_known_targets():
    assert list(GPUS) == ["A100", "H100", "H200", "B200"]
    for gpu in GPUS.values():
        assert gpu.target in ARCHES
        assert gpu.fp64 < gpu.fp32 < gpu.tf32 < gpu.half and gpu.l2_bandwidth > gpu.bandwidth


def test_each_bound():
    memory = predicted(STREAM)
    assert memory.bound == "memory"
    assert memory.seconds == pytest.approx(LAUNCH + MOVED / 4.8e12)
    again = replace(STREAM, loaded=1 << 30)
    assert predicted(again).bound == "cache"
    assert predicted(again).seconds == pytest.approx(
        LAUNCH + ((1 << 30) + MOVED // 3) / (32 * 132 * 1.83e9)
    )
    costly = replace(STREAM, operations=10**10)
    assert predicted(costly).bound == "arithmetic"
    assert predicted(costly).seconds == pytest.approx(LAUNCH + 10**10 / 33.5e12)
    serial = replace(STREAM, programs=8, steps=100)
    assert predicted(serial) == predicted(replace(serial, programs=132 * 8))
    assert predicted(serial).bound == "waiting"
    assert predicted(serial).seconds == pytest.approx(LAUNCH + 100 * LATENCY)
    small = replace(STREAM, programs=1, loaded=4, stored=4, operations=1, steps=0)
    assert predicted(small, minimum=8).bound == "launch"


def test_programs_beyond_what_the_sms_hold_wait_too():
    serial = replace(STREAM, steps=100)
    assert predicted(serial, per_sm=8).seconds == pytest.approx(LAUNCH + 12.5 * 100 * LATENCY)
    assert predicted(serial, per_sm=4).seconds == pytest.approx(LAUNCH + 25 * 100 * LATENCY)
    ahead = replace(serial, ahead=2)
    assert predicted(ahead) == predicted(serial)
    assert predicted(ahead, copies=True).seconds == pytest.approx(LAUNCH + 625 * LATENCY)


def test_products_take_the_rate_of_their_unit():
    assert rate("f32", H200, "ieee", None) == H200.fp32
    assert rate("f32", H200, "tf32", None) == H200.tf32
    assert rate("f32", H200, "tf32x3", True) == H200.tf32 / 3
    assert rate("f32", H200, "tf32", False) == H200.fp32  # no such instruction in the code
    assert rate("bf16", H200, "ieee", True) == rate("f16", H200, "ieee", None) == H200.half
    assert rate("f64", H200, "ieee", True) == H200.fp64
    assert rate("i64", H200, "ieee", None) == H200.fp32
    product = Work("matmul", 132, products=10**10, operands="bf16")
    assert predicted(product, minimum=0).seconds == pytest.approx(LAUNCH + 10**10 / H200.half)
    uneven = replace(product, programs=144)  # 12 SMs have two
    found = predicted(uneven, minimum=0).seconds - LAUNCH
    assert found == pytest.approx(10**10 / H200.half / (144 / 264))


def test_waves_and_balance():
    for programs, waves, balance in ((192, 1.45, 0.73), (144, 1.09, 0.55), (8, 0.06, 0.06)):
        found = filling([replace(STREAM, programs=programs)], H200, 1, copies=False)
        assert (round(found.waves, 2), round(found.balance, 2)) == (waves, balance)
    assert filling([Work("rows", 0)], H200, 8, copies=False).balance == 1.0


def test_bytes_in_flight_are_those_of_the_longest_programs():
    columns = Work("rows", 96, steps=64, waiting=2048.0)  # 4096 × 768, in 96 programs
    assert filling([columns], H200, 32, copies=False).in_flight == pytest.approx(96 * 2048 / 132)
    both = filling([STREAM, columns], H200, 32, copies=False)
    assert both.steps == 64 and both.in_flight == pytest.approx(96 * 2048 / 132)
    assert filling([STREAM], H200, 8, copies=False).in_flight == 8 * 4096
    product = Work("matmul", 132, steps=9, waiting=8192.0, ahead=3)
    assert filling([product], H200, 1, copies=True).in_flight == 3 * 8192
    assert filling([product], H200, 1, copies=False).in_flight == 8192


# --- shortfalls -----------------------------------------------------------------------------------

FACTS = KernelFacts(
    *("kernel_1", 90, 32, 0, 0, 0, {128: 1}, {128: 1}, {128: 2}),
    **{"wgmma": 0, "mma": 0, "ffma": 0, "barriers": 0, "atomics": 0, "instructions": 9},
)


def short(
    *works: Work, least: int = MOVED // 4, per_sm: int = 8, **facts
) -> list[tuple[str, float]]:
    """What is found of a launch of kernels that each have to move so many bytes."""
    row = Row(
        *("kernel_1", "form", replace(FACTS, **facts), 4, per_sm, least, ("net.py:1",)),
        stream_share=None,
        has_tables=False,
        works=works,
        part_bytes=(least,) * len(works),
        filled=filling(works, H200, per_sm, copies=False),
        predicted={},
    )
    found = shortfalls(Report("step", 90, "ieee", "", (row,)))
    assert all(one.launch == 0 and one.kernel == "kernel_1" for one in found)
    return [(one.what, one.number) for one in found]


def test_issued_bytes():
    assert short(STREAM) == []  # four times
    assert short(STREAM, least=MOVED // 5) == [("issued", 5.0)]
    assert short(replace(STREAM, form="matmul"), least=1) == []
    twice = short(replace(STREAM, form="matmul"), STREAM, least=MOVED // 6)
    assert twice == [("issued", 6.0)]  # each kernel of a launch for itself


def test_bytes_in_flight():
    long = Work("rows", 132 * 8, 3 << 20, 0, 0, steps=8, waiting=2048.0)
    assert short(long) == []
    assert short(replace(long, waiting=2047.0)) == [("in flight", 8 * 2047.0)]
    assert short(replace(long, waiting=1.0, steps=7)) == []


def test_balance():
    whole = Work("rows", 132 * 9, 3 << 20, 0, 0, steps=1, waiting=4096.0)
    assert short(whole) == []
    assert short(replace(whole, programs=140), per_sm=1) == [("balance", 140 / 264)]
    assert short(replace(whole, programs=140), per_sm=8) == []  # all at once, and short
    few = replace(whole, programs=100, steps=9, waiting=1e6)
    assert short(few) == [("balance", 100 / 132)]


def test_spills():
    assert short(STREAM, spills=3) == [("spills", 3)]


def test_shortfalls_are_said_in_words_and_break_no_limit():
    columns = Work("rows", 96, 3 << 20, 0, 0, steps=64, waiting=2048.0)
    row = Row(
        *("rows_1", "rows", FACTS, 4, 8, 100_000, ("net.py:1",), None, False, (columns,)),
        part_bytes=(100_000,),
        filled=filling([columns], H200, 8, copies=False),
        predicted={"H200": predicted(columns), "H100": predicted(columns)},
    )
    found = Report("step", 90, "ieee", "", (row,))
    assert limits(found) == []
    assert str(found).splitlines()[-3:] == [
        "0: rows_1: issued 31.5 times the minimum, limit 4.0 times the minimum",
        "0: rows_1: in flight 1,489 bytes per SM, limit 16,384 bytes per SM",
        "0: rows_1: balance 73%, limit 80%",
    ]
    plain = found.as_dict()
    assert [s["what"] for s in plain["shortfalls"]] == ["issued", "in flight", "balance"]
    (launch,) = plain["launches"]
    assert launch["issued_bytes"] == 3 << 20 and launch["filled"]["steps"] == 64
    assert launch["predicted"]["H200"]["bound"] == "waiting"
