"""What collectives put on the wire, what of it is hidden, and the efficiency with more ranks."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from tracejit.gpus import GPUS
from tracejit.ir.text import parse
from tracejit.links import CLUSTERS, ETHERNET, RANKS, Link, link_of
from tracejit.passes import optimize
from tracejit.report import report
from tracejit.scaling import (
    Timed,
    collective_costs,
    efficiencies,
    efficiency,
    hidden_share,
    passages,
    world_of,
)
from tracejit.schedule import schedule
from tracejit.schedule.plan_text import parse_plan
from tracejit.schedule.wire import sent, steps, whole

# Of 4 ranks: the name, the type of what is sent, what else is said; what the collective is about,
# what a rank sends, and in how many steps.
GROUP = "group='0', ranks=4, number=0"
WIRE = {
    "all_reduce": ("f32[10]", "by='SUM'", 40, 60, 6),
    "broadcast": ("f32[10]", "root=1", 40, 40, 3),
    "reduce_to": ("f64[10]", "by='SUM', root=1", 80, 80, 3),
    "all_gather": ("f32[10]", "", 160, 120, 3),
    "reduce_scatter": ("f32[12]", "by='SUM'", 48, 36, 3),
    "all_to_all": ("f32[8]", "sent='2,2,2,2', received='2,2,2,2'", 32, 24, 3),
    "gather_ranks": ("f32[10]", "root=0, here=True", 160, 120, 3),
    "scatter_ranks": ("f32[12]", "root=0, here=True", 48, 36, 3),
}


def plan_of(text: str):
    return schedule(optimize(parse(text)))


def started(plan) -> list:
    kernels = [x.kernel for x in plan.launches]
    return [k for k in kernels if k.call is not None and k.call.phase == "start"]


def collective(name: str, group: str = GROUP):
    kind, said, *_ = WIRE[name]
    attrs = f"{said}, {group}" if said else group
    results = {"all_gather": 40, "reduce_scatter": 3, "gather_ranks": 40, "scatter_ranks": 3}
    count = results.get(name, int(kind[4:-1]))
    out = f"{kind[:3]}[{count}]"
    return plan_of(f"""
    f(%0: {kind}) {{
      %1: {kind} = exp(%0)
      %2: {out} = {name}(%1, {attrs})
      return %2
    }}""")


@pytest.mark.parametrize("name", WIRE)
def test_bytes_on_the_wire(name: str):
    """By the formulas of a ring; the dump of the plan says so, and is read back."""
    plan = collective(name)
    (kernel,) = started(plan)
    *_, about, sends, count = WIRE[name]
    assert (whole(kernel), sent(kernel), steps(kernel)) == (about, sends, count)
    assert f"# sends {sends} bytes" in str(plan)
    assert str(parse_plan(str(plan))) == str(plan)


@pytest.mark.parametrize("here", [True, False])
def test_the_root_and_the_others_say_the_same(here: bool):
    """What a scatter is about does not depend on which rank tells it."""
    operand = "f32[12]" if here else "f32[3]"
    (kernel,) = started(
        plan_of(f"""
    f(%0: {operand}) {{
      %1: f32[3] = scatter_ranks(%0, root=0, here={here}, {GROUP})
      return %1
    }}""")
    )
    assert (whole(kernel), sent(kernel)) == (48, 36)


def test_a_barrier_sends_nothing_and_takes_steps():
    (kernel,) = started(
        plan_of(f"""
    f(%0: f32[4]) {{
      %1: f32[4] = exp(%0)
      %2: u8[1] = barrier({GROUP})
      return %1
    }}""")
    )
    assert (sent(kernel), steps(kernel), sent(kernel, 9), steps(kernel, 9)) == (0, 6, 0, 16)


@pytest.mark.parametrize("name", WIRE)
def test_ranks_that_there_are_not(name: str):
    """One rank sends nothing; more never send less, nor in fewer steps."""
    (kernel,) = started(collective(name))
    assert sent(kernel, 1) == steps(kernel, 1) == 0
    found = [(sent(kernel, n), steps(kernel, n)) for n in range(1, 1025)]
    assert found == sorted(found) and found[3] == (sent(kernel), steps(kernel))
    bound = whole(kernel) * (2 if name == "all_reduce" else 1)
    assert found[-1][0] <= bound < found[-1][0] + 1 + bound / 512


# ---- what is hidden


LINK = Link("a link", 100.0, 0.5)  # bytes a second, seconds a step
TWO = """
f(%0: f32[50], %1: f32[100]) {
  %2: f32[50] = all_reduce(%0, by='SUM', group='0', ranks=2, number=0, of='0')
  %3: f32[100] = all_reduce(%1, by='SUM', group='0', ranks=2, number=1, of='1')
  write %0 <- %2
  write %1 <- %3
}"""


def timeline(*seconds: float, text: str = TWO) -> list[Timed]:
    """Launches of so many seconds before, between and after the halves of two collectives."""
    plan = plan_of(text)
    halves = [x.kernel for x in plan.launches if x.kernel.call is not None]
    other = started(plan)[0]
    other = replace(other, call=None)
    found = [Timed(other, seconds[0])]
    for half, after in zip(halves, seconds[1:], strict=True):
        found += [Timed(half, 0.0), Timed(other, after)]
    return found


def test_what_launches_wait_for():
    """By hand: the first takes 200 / 100 + 2 steps of 0.5 = 3 seconds, the second 4 + 1 = 5. They
    start after 1 and 3 seconds, so they end after 4 and 9; the first is asked for after 3.5, the
    second after 4 + 2."""
    first, second = passages(timeline(1, 2, 0.5, 2, 7), (LINK,), 2, 2)
    assert (first.seconds, second.seconds) == (3, 5)
    assert (first.waited, second.waited) == (0.5, 3)
    assert (first.launches, second.launches) == (2, 2)
    assert (first.beside, second.beside) == (2.5, 2.5)
    assert (first.hidden, second.hidden) == (1 - 0.5 / 3, 1 - 3 / 5)
    assert hidden_share(timeline(1, 2, 0.5, 2, 7), (LINK,), 2) == 1 - 3.5 / 8
    assert efficiency(timeline(1, 2, 0.5, 2, 7), (LINK,), 2) == 12.5 / (12.5 + 3.5)


def test_all_is_hidden_or_nothing():
    assert hidden_share(timeline(1, 0, 100, 0, 1), (LINK,), 2) == 1
    assert efficiency(timeline(1, 0, 100, 0, 1), (LINK,), 2) == 1
    assert hidden_share(timeline(5, 0, 0, 0, 5), (LINK,), 2) == 0
    assert efficiency(timeline(5, 0, 0, 0, 6), (LINK,), 2) == 11 / (11 + 8)
    costs = collective_costs(timeline(5, 0, 0, 0, 5), (LINK,))
    assert [x.hidden for x in costs] == [0, 0] and [x.sent for x in costs] == [200, 400]


# ---- more ranks


@pytest.mark.parametrize("cluster", [*CLUSTERS.values(), ETHERNET, (LINK,)])
def test_efficiency_falls_from_one(cluster: tuple[Link, ...]):
    launches = timeline(1e-5, 2e-6, 1e-6, 1e-6, 3e-6)
    assert efficiency(launches, cluster, 1) == 1.0 and hidden_share(launches, cluster, 1) is None
    found = [efficiency(launches, cluster, n) for n in range(1, 1025)]
    assert all(a >= b > 0 for a, b in zip(found, found[1:], strict=False))
    assert found[1023] < 1


def test_the_formula_of_the_ring():
    """Without anything beside it: 2 (n-1) steps, and 2 (n-1)/n of the bytes, over each link."""
    launches = timeline(1.0, 0, 0, 0, 0)
    for cluster in (CLUSTERS["H100"], ETHERNET):
        for n in RANKS:
            link = link_of(cluster, n)
            took = 4 * (n - 1) * link.latency + 2 * (n - 1) / n * 600 / link.bandwidth
            assert efficiency(launches, cluster, n) == pytest.approx(1 / (1 + took), rel=1e-9)


def test_groups_that_are_not_of_all_ranks_do_not_grow():
    first = "ranks=2, number=0"
    mixed = timeline(1, 0, 0, 0, 0, text=TWO.replace(first, "ranks=4, number=0"))
    assert world_of(mixed) == 4
    large, small = passages(mixed, (LINK,), 4, 8)
    assert large.seconds == 7 + 3.5 and small.seconds == 4 + 1
    assert [p.seconds for p in passages(mixed, (LINK,), 4, 2)] == [3, 5]


def test_links_of_clusters():
    assert set(CLUSTERS) == set(GPUS) and RANKS[-1] == 1024
    for cluster in CLUSTERS.values():
        assert [link_of(cluster, n) for n in (2, 8)] == [cluster[0]] * 2
        assert link_of(cluster, 9) is cluster[-1] and cluster[0].bandwidth > cluster[1].bandwidth
    assert len(efficiencies(timeline(1, 0, 0, 0, 0), ETHERNET)) == 2 * len(RANKS)
    assert efficiencies([x for x in timeline(1, 0, 0, 0, 0) if not x.is_collective], ETHERNET) == []


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
def test_the_report():
    pytest.importorskip("triton")
    found = report(
        plan_of(TWO.replace("write %1 <- %3", "%4: f32[100] = exp(%3)\n  write %1 <- %4"))
    )
    assert [(x.collective, x.ranks, x.bytes) for x in found.sends] == [
        ("all_reduce", 2, 200),
        ("all_reduce", 2, 400),
    ]
    assert "all_reduce of 2 ranks: 200 bytes" in str(found)
    assert [x["bytes"] for x in found.as_dict()["collectives"]] == [200, 400]
