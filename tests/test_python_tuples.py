"""Numbers that a step keeps in tuples and small objects, a new one in each call.

Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

from collections import Counter, deque, namedtuple
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from support.worlds import Case, check, replaying, setting, table

CASES: dict[str, Case] = {}
case = table(CASES)

X = torch.linspace(-1, 2, 6)
CALLS = 14

state = replaying(case, CALLS, lambda i: (X + i * 0.1,))

Named = namedtuple("Named", "step loss")


@dataclass
class Run:
    step: int = 0
    mean: float = 0.0


@dataclass(frozen=True)
class Frozen:
    step: int = 0
    mean: float = 0.0

    def after(self, loss):
        return Frozen(self.step + 1, 0.9 * self.mean + 0.1 * loss)


# ---- tuples that are only stored


@state("replay with cuts")
def a_pair_of_what_was_read(w):
    w.last = None

    def step(x):
        w.last = (x.sum().item(), x.mean().item())
        return x * 2

    return step


@state("replay with cuts")
def pairs_in_a_full_deque(w):
    w.latest = deque(maxlen=3)

    def step(x):
        w.latest.append((len(w.latest), x.sum().item()))
        return x * 2

    return step


@state(changes={9: setting(last=(1, 2, 3)), 11: lambda w: setattr(w, "last", [1.0])})
def a_tuple_of_a_counter(w):
    w.n, w.last = 0, ()

    def step(x):
        w.n += 1
        w.last = (w.n, w.n * 0.5, "text", None)
        return x * w.n

    return step


# ---- tuples that are read


@state("replay with cuts", changes={10: setting(window=(1.0, 2.0, 3.0))})
def a_window(w):
    w.window = (0.0, 0.0, 0.0)

    def step(x):
        w.window = (*w.window[1:], x.sum().item())
        return x * sum(w.window)

    return step


@state("replay with cuts")
def a_window_that_grows_at_first(w):
    w.window = ()

    def step(x):
        w.window = (*w.window, x.sum().item())[-3:]
        return x * sum(w.window) * len(w.window)

    return step


@state(
    changes={9: setting(pair=(5, 0.25)), 11: setting(pair=(0.5, 1)), 12: setting(pair=(1, 2, 3))}
)
def a_pair_that_moves_on(w):
    w.pair = (0, 1.0)

    def step(x):
        n, scale, *rest = w.pair
        w.pair = (n + 1, scale * 0.5)
        return x * scale + n + len(rest)

    return step


@state(changes={10: setting(deep=((7, 0.5), ("b", 3)))})
def tuples_in_a_tuple(w):
    w.deep = ((0, 0.0), ("a", 1))

    def step(x):
        (n, mean), (name, k) = w.deep
        w.deep = ((n + 1, mean + 0.5), (name, k + n))
        return x * k + mean + (1.0 if name == "b" else 0.0)

    return step


@state()
def a_tuple_with_a_tensor(w):
    w.memory = (torch.zeros(6), 0)

    def step(x):
        h, n = w.memory
        w.memory = (h * 0.5 + x, n + 1)
        return w.memory[0].sum() + n

    return step


@state("replay with cuts")
def the_best_of_pairs(w):
    w.n, w.best = 0, (99.0, -1)

    def step(x):
        w.n += 1
        w.best = min(w.best, ((x - 0.7).square().sum().item(), w.n))
        return x * 2

    return step


@state()
def a_tuple_that_decides(w):
    w.pair = (0, 0.0)

    def step(x):
        n, offset = w.pair
        if n % 3 == 0:
            x = x * 2
        if w.pair == (4, 2.0):
            x = x - 1
        w.pair = (n + 1, offset + 0.5)
        return x + offset

    return step


@state("rerun")
def a_tuple_that_is_a_shape(w):
    w.pair = (1, 0.0)

    def step(x):
        n, offset = w.pair
        w.pair = (n + 1, offset + 0.5)
        return torch.ones(n).sum() * x + offset

    return step


@state("rerun")
def a_tuple_as_a_key(w):
    w.pair, w.seen = (0, 1), {}

    def step(x):
        w.seen[w.pair] = 1
        w.pair = (w.pair[0] + 1, w.pair[1])
        return x * len(w.seen)

    return step


# ---- objects


@state("replay with cuts", changes={11: setting(named=Named(2, 0.5))})
def a_tuple_with_names(w):
    w.named = Named(0, 0.0)

    def step(x):
        w.named = w.named._replace(step=w.named.step + 1, loss=x.sum().item())
        return x * w.named.step

    return step


@state("replay with cuts", changes={11: lambda w: setattr(w, "run", Run(3, 0.5))})
def a_dataclass_that_is_replaced(w):
    w.run = Run()

    def step(x):
        w.run = replace(w.run, step=w.run.step + 1, mean=x.mean().item())
        return x * w.run.step

    return step


@state("replay with cuts", changes={11: setting(run=Frozen(3, 0.5)), 12: setting(run=Run(3, 0.5))})
def a_frozen_dataclass(w):
    w.run = Frozen()

    def step(x):
        run = w.run
        w.run = Frozen(run.step + 1, 0.9 * run.mean + 0.1 * x.mean().item())
        return x * run.step + run.mean

    return step


@state("replay with cuts")
def a_dataclass_of_the_closure(w):
    run = Frozen()

    def step(x):
        nonlocal run
        run = run.after(x.mean().item())
        w.shown = run.mean
        return x * run.step

    return step


@state(changes={11: lambda w: vars(w.box["now"]).update(n=-3, more=1)})
def a_namespace_in_a_dict(w):
    w.box = {"now": SimpleNamespace(n=0, scale=1.0)}

    def step(x):
        now = w.box["now"]
        w.box["now"] = SimpleNamespace(n=now.n + 1, scale=now.scale * 0.5)
        return x * now.scale + now.n

    return step


@state(
    changes={
        9: lambda w: setattr(w, "counts", Counter(steps=3)),
        11: lambda w: setattr(w, "counts", Counter(a=1, steps=2)),
    }
)
def a_counter_of_names(w):
    w.counts = Counter()

    def step(x):
        w.counts["steps"] += 1
        w.counts.update(rows=len(x))
        return x * w.counts["steps"]

    return step


# ---- lists of numbers


@state("replay with cuts")
def a_tensor_as_a_list(w):
    w.means, w.all = None, []

    def step(x):
        a, b = x.view(2, 3).mean(1).tolist()
        w.means = x.view(2, 3).tolist()
        w.all.append((a, b))
        return x * a, b, x[:0].tolist()

    return step


@state("rerun", calls=6)
def a_long_tensor_as_a_list(w):
    w.all = None

    def step(x):
        w.all = x.repeat(4).tolist()
        return x * 2

    return step


@pytest.mark.parametrize("name", CASES)
def test_state(name):
    check(CASES[name])
