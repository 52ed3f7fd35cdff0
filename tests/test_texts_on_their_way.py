"""Texts of runtime scalars that go through variables, helper functions and dicts before they are
kept or returned. Each case is compared with eager after every call; see `support/worlds.py`.

Most are traps: texts that are equal by accident in the calls that are traced, and differ later.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from support.worlds import Case, World, check, replaying, same, table
from tracejit.capture.python.patterns import apart
from tracejit.ir.ops.host import host_format

CASES: dict[str, Case] = {}
case = table(CASES)

X = torch.linspace(-1, 2, 6)
state = replaying(case, 13, lambda i: (X + i * 0.1,))
JUMP = {9: lambda w: setattr(w.t, "n", 100)}


class Trainer:
    def __init__(self):
        self.n, self.m, self.name, self.tag, self.names, self.log = 0, 0, "k5", "", [], {}

    def called(self):
        return f"step {self.n}"

    @staticmethod
    def made_of(n):
        return f"{n:03d}!"


def trainer(w) -> Trainer:
    w.t = Trainer()
    return w.t


def tag(n: int) -> str:
    return f"step {n}"


def by_a_variable(n: int) -> str:
    text = f"<{n}>"
    return text


# ---- what is replayed


@state(changes=JUMP)
def a_key_in_a_variable(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        name = f"step {t.n}"
        out = {}
        out[name] = x * t.n
        return out

    return step


@state(changes=JUMP)
def keys_beside_plain_ones(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        out = {"loss": x.sum(), "n": t.n}
        with torch.no_grad():
            out[f"loss/{t.n}"] = x * 2
        out["last"] = x * 3
        out[f"acc/{t.n}"] = x * t.n
        return x, out

    return step


@state(changes=JUMP)
def a_new_dict_with_keys(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        return {f"loss/{t.n}": x * t.n, "n": t.n}, [{f"{t.n}": {"of": f"call {t.n}"}}]

    return step


@state(changes=JUMP)
def kept_by_a_variable(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        label = f"step {t.n}"
        for _ in range(3):
            x = x * 1.5
        if x.requires_grad:
            x = x * 2
        t.tag = label
        return x

    return step


@state(changes=JUMP)
def a_key_of_a_log(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        name = f"loss/{t.n}"
        y = x * t.n
        t.log[name] = y
        return y

    return step


@state(changes=JUMP)
def by_helpers(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.tag = tag(t.n)
        t.names.append(by_a_variable(t.n))
        return x, tag(t.n + 1)

    return step


@state(changes=JUMP)
def by_methods(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.tag = t.called()
        t.names.append(t.made_of(t.n))
        return x * t.n

    return step


@state(changes=JUMP)
def by_a_helper_and_a_variable(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        name = tag(2 * t.n)
        t.tag = name
        return {tag(t.n): x * t.n}

    return step


@state(changes=JUMP)
def returned_by_what_the_step_calls(w):
    t = trainer(w)

    def training_step(x):
        t.n += 1
        metrics = {"lr": 0.5, f"loss/{t.n}": x.sum()}
        return x * t.n, metrics, [f"{t.n}"]

    def step(x):
        return training_step(x)

    return step


# ---- traps


TRAPS: dict[str, Case] = {}
trap = table(TRAPS)("", calls=13, args=lambda i: (X + i * 0.1,))
# numbers that come again, and others
LIKE = {6: lambda w: vars(w.t).update(n=4), 9: lambda w: vars(w.t).update(n=4)}


@trap
def stored_on_one_way_only(w):
    """The place may hold the same text from before."""
    t = trainer(w)
    t.tag = "step 3"

    def step(x):
        t.n += 1
        name = f"step {t.n}"
        if t.m:
            t.tag = name
        return x * t.n

    return step


@trap
def stored_in_a_loop_that_ends_early(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        for k in (t.n, t.m + 3):
            name = f"{k}"
            if x is None:
                break
        t.tag = name
        return x * t.n

    return step


@trap
def the_variable_is_read_too(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        name = f"step {t.n}"
        t.tag = name
        return x * (3 if name == "step 7" else 2)

    return step


@trap
def the_key_is_looked_for(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        out = {}
        out[f"k{t.n}"] = x
        return x * len(out) if "k7" in out else x * 3

    return step


@trap
def a_key_like_a_plain_one(w):
    """In one call the two are one key."""
    t = trainer(w)

    def step(x):
        t.n += 1
        out = {"k3": x, "k5": x * 2}
        out[f"k{t.n}"] = x * 3
        return out

    return step


@trap
def a_key_like_one_that_is_not_told(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        out = {}
        out[t.name] = x
        out[f"k{t.n}"] = x * 3
        return out

    return step


@trap
def a_key_like_another_text(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        out = {f"{t.name}": x}
        out[f"k{t.n}"] = x * 3
        return out

    return step


@trap
def a_value_that_is_overwritten(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        out = {"a": f"{t.n}", "x": x}
        out["a"] = "5"
        return out

    return step


@trap
def a_value_that_is_overwritten_by_a_computed_key(w):
    t = trainer(w)
    t.name = "a"

    def step(x):
        t.n += 1
        out = {"a": f"{t.n}", "x": x}
        out[t.name] = "5"
        return out

    return step


@trap
def returned_on_one_way_only(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        out = {}
        out[f"{t.n}"] = x
        if t.m:
            return out
        return {"5": x * 2}

    return step


@trap
def what_the_dict_holds_is_read(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        out = {f"k{t.n}": x}
        for name in out:
            if name == "k7":
                x = x * 2
        return x

    return step


@trap
def a_dict_that_is_handed_on(w):
    t = trainer(w)

    def longest(names):
        return max(map(len, names))

    def step(x):
        t.n += 3
        out = {f"k{t.n}": x}
        return x * longest(out)

    return step


@trap
def compared_by_a_function_of_python(w):
    """The helper's text decides, and something else is kept."""
    t = trainer(w)

    def step(x):
        t.n += 1
        t.tag = max(("step 5", "step 7"), key=lambda name: tag(t.n) == name)
        return x * t.n

    return step


@trap
def a_helper_that_keeps_its_text(w):
    t = trainer(w)
    seen = []

    def keeping(n):
        text = f"step {n}"
        seen.append(text)
        return text

    def step(x):
        t.n += 1
        t.tag = keeping(t.n)
        return x * (3 if seen[-1] == "step 7" else 2)

    return step


@trap
def a_helper_that_returns_something_else_too(w):
    t = trainer(w)

    def of(n):
        if n > 6:
            return "step 5"
        return f"step {n}"

    def step(x):
        t.n += 1
        t.tag = of(t.n)
        return x * 2

    return step


@trap
def a_helper_whose_text_is_read(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        return x * (3 if tag(t.n) == "step 7" else len(tag(t.n)))

    return step


@trap
def a_helper_that_makes_a_part(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.tag = f"{tag(t.n)}/{t.m}" + tag(t.n)
        return x * t.n

    return step


@trap
def a_cached_helper(w):
    t = trainer(w)

    @functools.cache
    def of(n):
        return f"step {n}"

    def step(x):
        t.n += 1
        t.tag = of(t.n)
        return x * 2

    return step


@trap
def texts_put_in_another_order(w):
    """Equal in the calls that are traced."""
    t = trainer(w)

    def step(x):
        t.n += 1
        t.m += 1 if t.n < 5 else 2
        first, second = f"{t.n}", f"{t.m}"
        t.log[second] = x
        t.log[first] = x * 2
        return x

    return step


@trap
def texts_appended_in_another_order(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.m += 1 if t.n < 5 else 2
        first = f"{t.n}"
        second = f"{t.m}"
        t.names.append(second)
        t.names.append(first)
        return x

    return step


@trap
def caught_in_between(w):
    t = trainer(w)
    t.tag = "step 3"

    def step(x):
        t.n += 1
        try:
            name = f"step {t.n}"
            if t.m == 0:
                raise KeyError
            t.tag = name
        except KeyError:
            pass
        return x * t.n

    return step


@trap
def seen_by_its_frame(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        name = f"step {t.n}"
        seen = locals()["name"] == "step 7"
        t.tag = name
        return x * (3 if seen else 2)

    return step


@trap
def kept_in_two_places(w):
    t = trainer(w)
    w.seen = SimpleNamespace(tag="")

    def step(x):
        t.n += 1
        name = f"step {t.n}"
        t.tag = name
        w.seen.tag = name
        return x * t.n

    return step


@trap
def returned_by_what_the_step_calls_and_read(w):
    t = trainer(w)

    def training_step(x):
        t.n += 1
        return {f"loss/{t.n}": x * 2}

    def step(x):
        found = training_step(x)
        if "loss/7" in found:
            return {"loss/7": x * 3}
        return found

    return step


@trap
def returned_by_one_of_two(w):
    t = trainer(w)

    def training_step(x):
        t.n += 1
        return {f"{t.n}": x * 2}

    def step(x):
        found = training_step(x)
        if t.m:
            return found
        return {"5": x}

    return step


@trap
def by_a_helper_of_a_helper(w):
    t = trainer(w)

    def twice(n):
        return tag(2 * n)

    def step(x):
        t.n += 1
        t.tag = twice(t.n)
        return x * t.n

    return step


@pytest.mark.parametrize("name", CASES)
def test_state(name):
    check(CASES[name])


@pytest.mark.parametrize("changes", [{}, LIKE, JUMP], ids=["counting", "like", "jump"])
@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.sweep(0.17)
def test_a_trap_keeps_no_text(name, changes):
    """All calls are as eager's, and no replay makes a text of a runtime scalar."""
    trap = replace(TRAPS[name], changes=changes)
    eager = World(trap, None)
    expected = [eager.call(i) for i in range(trap.calls)]
    ours = World(trap, "auto")
    for i, theirs in enumerate(expected):
        same(ours.call(i), theirs, f"call {i}")
    nodes = [node for r in ours.step._replays for node in r.captured.host_nodes]
    assert not any(node.op is host_format for node in nodes)


@pytest.mark.parametrize(
    ("a", "b", "never"),
    [
        (("loss",), ("loss/", None), True),
        (("loss/3",), ("loss/", None), False),
        (("k5",), ("k", None), False),
        (("k5",), (None,), False),
        (("a", None), ("b", None), True),
        (("a", None), ("ab", None), False),
        ((None, "x"), (None, "y"), True),
        ((None, "x"), (None, "yx"), False),
        (("aba",), ("ab", None, "ba"), True),
        (("abba",), ("ab", None, "ba"), False),
        (("a",), ("a",), False),
        (("a", "b"), ("ab",), False),
        (("a",), ("ab",), True),
        (("a", None, "b"), ("c", None, "b"), True),
    ],
)
def test_which_texts_are_never_equal(a, b, never):
    assert apart(a, b) is apart(b, a) is never
