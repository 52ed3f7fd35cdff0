"""What a step looks up by a counter, and what it reads of lists that grow: replayed, and anew.

Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections import deque
from types import SimpleNamespace

import pytest
import torch

import tracejit
from support.worlds import Case, check, replaying, setting, table
from tracejit.capture.python.uses import Named, used_only, uses

CASES: dict[str, Case] = {}
case = table(CASES)

X = torch.linspace(-1, 2, 6)
state = replaying(case, 13, lambda i: (X + i * 0.1,))
values = replaying(case, 13, lambda i: (X * math.cos(i) + i * 0.1,))  # that rise and fall

RATES = [0.1 / (k + 1) for k in range(20)]


# ---- tables


@state(changes={9: lambda w: w.rates.__setitem__(11, 7.0), 11: lambda w: w.rates.append(9.0)})
def list_at_a_counter(w):
    w.rates, w.n = [0.5**k for k in range(20)], 0

    def step(x):
        w.n += 1
        return x * w.rates[w.n]

    return step


@state("rerun", changes={8: lambda w: w.log["train"]["loss"].__setitem__(0, 50.0)})
def list_in_a_dict_of_a_dict(w):
    """It has no name by which it could be told that more is done with it than to append."""
    w.log = {"train": {"loss": []}}

    def step(x):
        losses = w.log["train"]["loss"]
        losses.append(x.sum().item())
        if w.log["train"]["loss"][0] > 40:
            return x * 2
        if len(w.log["train"]["loss"]) > 6:
            return x * 3
        return x

    return step


@state("rerun", changes={8: lambda w: w.log["loss"].__setitem__(0, 50.0)})
def list_in_a_dict_of_two_names(w):
    w.log = w.same = {"loss": []}

    def step(x):
        w.log["loss"].append(1.0)
        return x * 2 if w.same["loss"][0] > 40 else x

    return step


@state("rerun", changes={8: lambda w: w.log["loss"].__setitem__(0, 50.0)})
def list_in_a_dict_that_is_in_another_one_too(w):
    w.log = {"loss": []}
    w.all = {"log": w.log}

    def step(x):
        w.log["loss"].append(1.0)
        return x * 2 if w.all["log"]["loss"][0] > 40 else x

    return step


@state("rerun", changes={8: lambda w: w.logs[0]["loss"].__setitem__(0, 50.0)})
def list_in_a_dict_of_a_tuple(w):
    w.logs = ({"loss": []}, 1)

    def step(x):
        w.logs[0]["loss"].append(1.0)
        return x * 2 if w.logs[0]["loss"][0] > 40 else x

    return step


@state("rerun", changes={8: lambda w: w.log["loss"].__setitem__(0, 50.0)})
def list_in_a_dict_that_is_spelled(w):
    w.log = {"loss": []}

    def step(x):
        w.log["loss"].append(x.sum().item())
        if getattr(w, "log")["loss"][0] > 40:  # noqa: B009
            return x * 2
        return x

    return step


@state(changes={10: setting(rates=(3.0,) * 20)})
def tuple_at_a_counter(w):
    w.rates, w.n = tuple(0.5**k for k in range(20)), 0

    def step(x):
        rate = w.rates[w.n]
        w.n += 1
        return x * rate, rate

    return step


@state()
def global_list_at_a_counter(w):
    w.n = 0

    def step(x):
        w.n += 1
        return x * RATES[w.n]

    return step


@state()
def list_of_a_closure_at_its_counter(w):
    n, rates = 0, [1.5**-k for k in range(20)]

    def step(x):
        nonlocal n
        n += 1
        return x * rates[n] + rates[n - 1]

    return step


@state()
def list_of_a_class_at_a_counter(w):
    class Schedule:
        rates = [1 / (k + 1) for k in range(20)]

        def __init__(self):
            self.n = 0

        def next(self):
            self.n += 1
            return self.rates[self.n]

    w.schedule = Schedule()
    return lambda x: x * w.schedule.next()


@state()
def table_in_a_dict_at_a_counter_in_it(w):
    w.state = {"step": 0, "table": [0.9**k for k in range(20)]}

    def step(x):
        w.state["step"] += 1
        return x * w.state["table"][w.state["step"]]

    return step


@state()
def integers_at_a_counter(w):
    w.rows, w.n, w.table = [3, 1, 0, 2, 5, 4] * 3, 0, torch.arange(12.0).view(6, 2)

    def step(x):
        row = w.rows[w.n]
        w.n += 1
        return w.table[row] * x[0], row * 2, x * (row + 1)

    return step


@state(changes={11: setting(n=-3)})
def negative_and_computed_places(w):
    w.rates, w.n = [0.5**k for k in range(20)], 0

    def step(x):
        w.n += 1
        return x * w.rates[-w.n] + w.rates[w.n // 3] - w.rates[(w.n * 7) % 20]

    return step


@state()
def place_held_at_the_last(w):
    w.rates, w.n = (0.1, 0.05, 0.02, 0.01), 0

    def step(x):
        w.n += 1
        i = w.n if w.n < len(w.rates) else len(w.rates) - 1
        return x * w.rates[min(w.n, len(w.rates) - 1)] - w.rates[i]

    return step


@state()
def table_by_a_variable_of_the_function(w):
    w.rates, w.n = [0.5**k for k in range(20)], 0

    def step(x):
        w.n += 1
        rates = w.rates
        total = sum(rates) + max(rates)
        for k, rate in enumerate(rates):
            if k == 3:
                total += rate
        return x * rates[w.n] + total

    return step


@state(calls=16)
def place_behind_the_end(w):
    w.rates, w.n = [0.5**k for k in range(9)], 0

    def step(x):
        w.n += 1
        try:
            return x * w.rates[w.n]
        except IndexError:
            return x

    return step


@state()
def number_of_the_table_in_param_groups(w):
    w.p, w.n = torch.ones(6, requires_grad=True), 0
    w.opt = torch.optim.SGD([w.p], lr=1.0, momentum=0.5)
    w.rates = [0.1 / (k + 1) for k in range(20)]

    def step(x):
        w.opt.param_groups[0]["lr"] = w.rates[w.n]
        w.n += 1
        w.opt.zero_grad()
        (w.p * x).sum().backward()
        w.opt.step()
        return w.p.detach().clone()

    return step


@state(args=lambda i: (X, i))
def table_at_an_argument(w):
    w.rates = [0.5**k for k in range(20)]
    return lambda x, i: x * w.rates[i] + w.rates[i + 1]


@values()
def table_at_a_number_that_is_read(w):
    w.rates = [0.5**k for k in range(20)]

    def step(x):
        return x * w.rates[(x > 0.2).sum().item()]

    return step


@state()
def mixed_numbers_are_good_for_one(w):
    w.rates, w.n = [1, 0.5, 2], 0

    def step(x):
        rate = w.rates[w.n % 3]
        w.n += 1
        return x * rate, rate

    return step


@state()
def signs_of_zeros_and_large_numbers(w):
    w.rates, w.n = [0.0, -0.0, 1e308, -1e-320, 2.0**-1074] * 4, 0

    def step(x):
        rate = w.rates[w.n]
        w.n += 1
        return math.copysign(1.0, rate), rate, x * 0 + rate

    return step


@dataclasses.dataclass
class Schedule:
    rates: list
    n: int = 0


@state(args=lambda i: (X, Schedule([0.5**k for k in range(20)], i)))
def table_of_an_argument(w):
    return lambda x, schedule: x * schedule.rates[schedule.n]


@state("rerun")
def table_that_is_returned(w):
    w.rates, w.n = [0.5**k for k in range(20)], 0

    def step(x):
        w.n += 1
        return x * w.rates[w.n], w.rates

    return step


@state("rerun")
def table_that_is_compared_with_another(w):
    w.rates = w.others = [0.5**k for k in range(20)]
    w.n = 0

    def step(x):
        w.n += 1
        return x * w.rates[w.n], w.rates is w.others

    return step


@state("rerun")
def table_that_the_step_changes(w):
    w.rates, w.n = [0.5**k for k in range(20)], 0

    def step(x):
        w.n += 1
        w.rates[w.n] = 9.0
        return x * w.rates[w.n] + w.rates[w.n + 1]

    return step


SEEN = SimpleNamespace(w=None, kept=None)


def _kept(name):
    """Of a list that the step has by this name, by code that the step is not known to run."""
    x = vars(SEEN.w)[name]
    SEEN.kept = x
    x[0] = 5.0
    kinds = type(x) is list, isinstance(x, list), x == [*x], json.dumps(x).count(",")
    return *kinds, copy.deepcopy(x), {"x": x}


def _keep(name):
    return _kept(name)


@state("rerun", changes={9: setting(save=True), 10: setting(save=False)})
def table_that_a_rare_way_passes_on(w):
    w.rates, w.n, w.save, w.kept = [0.5**k for k in range(20)], 0, False, []
    SEEN.w = w

    def step(x):
        w.n += 1
        if w.save:
            w.kept = _keep("rates"), w.n
        return x * w.rates[w.n] + w.rates[0]

    return step


# ---- dicts and sets


@state(changes={8: lambda w: w.weights.update({9: 5.0}), 10: lambda w: w.weights.pop(12)})
def dict_at_a_counter(w):
    w.weights, w.n = {k: 1 / (k + 1) for k in range(20)}, 0

    def step(x):
        w.n += 1
        return x * w.weights[w.n] if w.n in w.weights else x

    return step


@state()
def dict_without_the_counter_raises(w):
    w.weights, w.n = {k: 1 / (k + 1) for k in range(0, 20, 2)}, 0

    def step(x):
        w.n += 1
        try:
            return x * w.weights[w.n]
        except KeyError:
            return x

    return step


@state(calls=16)
def dict_asked_with_a_default(w):
    w.rates, w.n, w.rate = {4: 0.5, 9: 0.1}, 0, 1.0

    def step(x):
        w.n += 1
        w.rate = w.rates.get(w.n, w.rate)
        return x * w.rate * (2 if w.rates.get(w.n) is None else 3)

    return step


@state(calls=22)
def curriculum_of_a_dict_of_stages(w):
    w.n, w.stage, w.stages = 0, "none", {2: "easy", 8: "hard"}

    def step(x):
        w.n += 1
        if w.n in w.stages:
            w.stage = w.stages[w.n]
        return x * {"none": 0, "easy": 1, "hard": 2}[w.stage]

    return step


@state(calls=16, changes={10: lambda w: w.milestones.add(12)})
def milestones_in_a_set(w):
    w.n, w.rate, w.milestones = 0, 1.0, {4, 8}

    def step(x):
        w.n += 1
        if w.n in w.milestones:
            w.rate *= 0.5
        return x * w.rate

    return step


@state(calls=16)
def milestones_in_the_code(w):
    w.n, w.rate = 0, 1.0

    def step(x):
        w.n += 1
        if w.n in {4, 8, 12}:
            w.rate *= 0.5
        if w.n not in {1, 2.0, 3, "x"}:
            w.rate += 1
        return x * w.rate

    return step


@state(calls=16)
def milestones_in_a_list_and_a_frozen_set(w):
    w.n, w.rate, w.list, w.frozen = 0, 1.0, [4, 8], frozenset({5, 9})

    def step(x):
        w.n += 1
        if w.n in w.list or w.n in w.frozen:
            w.rate *= 0.5
        return x * w.rate

    return step


# ---- lists that grow


@values(changes={6: lambda w: w.losses.clear(), 9: lambda w: setattr(w, "losses", [1.0, 2.0])})
def length_of_a_record(w):
    w.losses = []

    def step(x):
        w.losses.append(x.sum().item())
        return x * len(w.losses)

    return step


@values(calls=20, changes={14: lambda w: w.losses.clear()})
def length_that_decides(w):
    w.losses = []

    def step(x):
        w.losses.append(x.sum().item())
        if len(w.losses) > 4:
            return x * 2
        return x

    return step


@values(changes={9: lambda w: w.losses.append(100.0), 11: lambda w: w.losses.append(1)})
def last_entries(w):
    w.losses = []

    def step(x):
        loss = x.sum().item()
        worse = bool(w.losses) and loss > w.losses[-1]
        w.losses.append(loss)
        return x * 2 if worse else x, w.losses[-1], w.losses[0]

    return step


@values()
def entry_before_the_last(w):
    w.losses = [3.0, 4.0]

    def step(x):
        change = w.losses[-1] - w.losses[-2]
        w.losses.append(x.sum().item())
        return x * change, w.losses[-2], w.losses[-3]

    return step


@values(changes={8: lambda w: w.losses.__setitem__(3, 1000.0)})
def mean_of_all(w):
    w.losses = []

    def step(x):
        w.losses.append(x.sum().item())
        return sum(w.losses) / len(w.losses)

    return step


@values(calls=20, changes={12: lambda w: w.losses.__delitem__(slice(2, None))})
def mean_of_the_last_three(w):
    w.losses = []

    def step(x):
        w.losses.append(x.sum().item())
        last = w.losses[-3:]
        return sum(last) / len(last), x * 2

    return step


@values(calls=20)
def best_of_all(w):
    w.losses = []

    def step(x):
        w.losses.append(x.sum().item())
        return min(w.losses), max(w.losses), x * 2

    return step


@values(calls=20)
def plateau_of_the_latest_losses(w):
    w.losses, w.rate = [], 1.0

    def step(x):
        loss = x.square().mean().item()
        w.losses.append(loss)
        if len(w.losses) > 3 and min(w.losses[-3:]) > min(w.losses):
            w.rate *= 0.9
        return x * w.rate

    return step


@values()
def counter_beside_a_record(w):
    w.steps, w.n = [], 0

    def step(x):
        w.n += 2
        w.steps.append(w.n)
        return x * w.steps[-1] + len(w.steps), sum(w.steps)

    return step


@values()
def records_in_a_dict(w):
    w.log = {"loss": [], "rate": [], "seen": 0}

    def step(x):
        w.log["loss"].append(x.sum().item())
        w.log["rate"].append(0.5)
        w.log["seen"] += 1
        return x * len(w.log["loss"]), w.log["loss"][-1], w.log["seen"]

    return step


@values()
def tensor_just_appended(w):
    w.outputs = []

    def step(x):
        w.outputs.append(x * 2)
        return w.outputs[-1] + 1, len(w.outputs)

    return step


@values("rerun")
def tensors_of_earlier_calls(w):
    w.outputs = []

    def step(x):
        w.outputs.append(x * 2)
        return w.outputs[0] + 1

    return step


@values(calls=24)
def window_in_a_deque(w):
    w.losses = deque(maxlen=4)

    def step(x):
        w.losses.append(x.sum().item())
        return sum(w.losses) / len(w.losses), x * 2

    return step


@values("rerun")
def record_that_is_iterated(w):
    w.losses = []

    def step(x):
        w.losses.append(x.sum().item())
        return [loss * 2 for loss in w.losses]

    return step


@values(calls=24)
def record_that_is_cut_short(w):
    w.losses = []

    def step(x):
        w.losses.append(x.sum().item())
        if len(w.losses) > 3:
            w.losses.pop(0)
        return x * len(w.losses), w.losses[0]

    return step


@values("rerun")
def record_that_is_made_anew(w):
    w.losses = []

    def step(x):
        w.losses.append(x.sum().item())
        w.losses = w.losses[-5:]
        return x * len(w.losses), w.losses[0]

    return step


@values("rerun")
def record_under_two_names(w):
    w.losses = w.others = []

    def step(x):
        w.losses.append(x.sum().item())
        return x * len(w.others), w.losses[-1]

    return step


@values("rerun", changes={9: setting(full=True), 10: setting(full=False)})
def record_that_a_rare_way_returns(w):
    w.losses, w.full = [], False
    SEEN.w = w

    def step(x):
        w.losses.append(x.sum().item())
        if w.full:
            return _keep("losses"), len(w.losses)
        return x * len(w.losses)

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(2)
def test_case(name):
    check(CASES[name])


def test_one_plan_serves_all_entries():
    w = SimpleNamespace(n=0, rates=[0.5**k for k in range(200)])

    @tracejit.compile(on_unsupported="raise")
    def step(x):
        w.n += 1
        return x * w.rates[w.n]

    for i in range(100):
        assert torch.equal(step(X), X * 0.5 ** (i + 1))
    assert step.stats.replays > 90 and len(step.plans) <= 3
    w.n = 198
    step(X)
    for _ in range(2):
        with pytest.raises(IndexError, match="list index out of range"):
            step(X)
        w.n = 199
    assert type(w.rates) is list and w.n == 199


def test_the_list_is_the_users_own_after_an_error():
    rates, losses = [0.5**k for k in range(20)], []
    w = SimpleNamespace(n=0, rates=rates, losses=losses, fail=False)

    @tracejit.compile(on_unsupported="raise")
    def step(x):
        w.n += 1
        w.losses.append(x.sum().item())
        if w.fail:
            raise ValueError
        return x * w.rates[w.n] * len(w.losses)

    for _ in range(8):
        step(X)
    assert step.stats.replays
    w.fail = True
    with pytest.raises(ValueError):
        step(X)
    assert w.rates is rates and w.losses is losses and type(losses) is list
    assert len(losses) == 8 and w.n == 8 and {*map(type, losses)} == {float}


# ---- what code does with a name


def _code(self, x):
    first = self.read[x]
    if x in self.read and self.read is not None and self.read:
        first = self.read[0] + len(self.read)
    local = self.kept
    local[x] += 1
    self.grown.append(self.read[x if first else 2])
    self.log["a"].append(x)
    self.log["b"][-1].append(x)
    self.put = self.given
    return max(self.shown, key=x), {"k": self.item}


@pytest.mark.parametrize(
    ("named", "how"),
    [
        (("read",), {"subscript", "item", "contains", "is None", "test", "len()"}),
        (("kept",), {"store local"}),
        (("grown",), {"append"}),
        (("log",), {"item"}),
        (("log", "a"), {"append"}),
        (("log", "b"), {"subscript"}),
        (("given",), {"unknown"}),
        (("shown",), {"unknown"}),
        (("item",), {"unknown"}),
        (("put",), set()),
    ],
)
def test_uses(named, how):
    assert uses(_code.__code__).get(Named("attribute", *named), set()) == how


def test_uses_follow_variables_and_spelled_names():
    def spelled(self):
        return self.a[0], "a"

    def handled(self):
        try:
            return self.a[0]
        except IndexError as error:
            raise ValueError(self.b) from error
        finally:
            self.c.append(1)

    assert not used_only(_code.__code__, Named("attribute", "kept"), {"subscript"})
    assert not used_only(spelled.__code__, Named("attribute", "a"), {"item", "subscript"})
    assert used_only(handled.__code__, Named("attribute", "a"), {"item", "subscript"})
    assert not used_only(handled.__code__, Named("attribute", "b"), {"item", "subscript"})
    assert used_only(handled.__code__, Named("attribute", "c"), {"append"})


def test_two_histories_that_become_one():
    """Each is appended to by the name of the other too."""
    worlds = []
    for compiled in (True, False):
        w = SimpleNamespace(log={"loss": [], "count": []}, best=[], n=50.0)

        def step(x, w=w):
            w.n = w.n - 1.0
            w.log["loss"].append(w.n)
            w.log["count"].append(len(w.log["count"]))
            w.best = min(w.log["loss"][-1], sum(w.log["loss"])), w.log["loss"][-2:]
            return x * w.best[0]

        run = tracejit.compile(step, backend="numpy") if compiled else step
        for i in range(12):
            if i == 8:
                w.log["count"] = w.log["loss"]
            run(X)
            worlds.append((w.log["loss"][-1], len(w.log["loss"]), w.best))
    assert worlds[:12] == worlds[12:]


def test_integers_that_are_kept_where_nobody_looks_are_plain():
    """However late the first one comes; and soon nothing is searched for any more."""
    w = SimpleNamespace(seen=[], last=())

    @tracejit.compile(backend="numpy", on_unsupported="raise")
    def step(x):
        w.seen.append(float(len(w.seen)))
        w.last = (1, w.seen[-3:])
        return x * w.seen[-1]

    for i in range(40):
        if i > 12:
            w.seen.append(3)
        step(X)
        assert i < 13 or type(w.last[1][1]) is int
    assert step._recall.keeps_numbers
