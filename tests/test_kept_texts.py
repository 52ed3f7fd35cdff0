"""Texts of runtime scalars that a step keeps, returns or reads. Each case is compared with eager
after every call; see `support/worlds.py`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from support.worlds import Case, check, replaying, table

CASES: dict[str, Case] = {}
case = table(CASES)

X = torch.linspace(-1, 2, 6)
state = replaying(case, 13, lambda i: (X + i * 0.1,))


class Trainer:
    """What people count in."""

    tag = ""

    def __init__(self):
        self.n, self.m, self.rate, self.name, self.names = 0, 10, 0.5, "loss", []


def trainer(w) -> Trainer:
    w.trainer = Trainer()
    return w.trainer


# ---- kept in attributes


@state(
    changes={9: lambda w: setattr(w.trainer, "n", 100), 11: lambda w: setattr(w.trainer, "tag", 3)}
)
def attribute(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.tag = f"step {t.n}"
        return x * t.n

    return step


@state(changes={9: lambda w: setattr(w.trainer, "n", -7)})
def with_a_spec(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.rate *= 0.9
        t.tag = f"{t.n:03d}|{t.n:+,}|{t.n:>6}|{t.n:x}|{t.rate:.3f}|{t.rate!r}|{t.rate:8.2e}|{t.n:e}"
        return x * t.rate

    return step


@state()
def in_other_ways(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.a = str(t.n)
        t.b = "step " + str(t.n) + "!"
        t.c = "step %d of %03d: %s%%" % (t.n, t.m + t.n, t.n)  # noqa: UP031
        t.d = "{} of {:>5}, {!r}".format(t.n, t.m, t.n)  # noqa: UP032
        t.e = format(t.n, "04d")
        t.f = repr(t.n)
        t.g = "n" + f"{t.n}" + "m"
        return x * t.n

    return step


@state(
    changes={9: lambda w: setattr(w.trainer, "m", 3.0), 11: lambda w: setattr(w.trainer, "n", True)}
)
def of_two_counters(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.m += 2
        t.rate = t.n / t.m
        t.tag = f"{t.n}{t.m}:{t.rate}"
        return x * t.m

    return step


@state(
    changes={9: lambda w: setattr(w.trainer, "name", "5"), 10: lambda w: setattr(w.trainer, "m", 7)}
)
def with_what_is_guarded(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.tag = f"{t.name}/{t.n}"
        t.a = "{}/{}".format(t.n, t.m)  # noqa: UP032
        t.b = f"{t.n} of {len(t.names)}"
        return x * t.n

    return step


@state()
def in_a_loop_and_a_method(w):
    class Named(Trainer):
        def mark(self, k):
            self.inner.tag = f"{k}"

    w.trainer = t = Named()
    t.inner = Trainer()

    def step(x):
        for k in range(2):
            t.n += 1
            t.mark(t.n)
            t.tag = f"{k}: {t.n}"
        return x * t.n

    return step


class Slots:
    __slots__ = ("n", "tag")


class OfClass:
    n, tag = 0, ""


@state()
def in_slots_classes_and_modules(w):
    w.slots, w.model = Slots(), torch.nn.Linear(2, 2)
    w.slots.n, w.slots.tag, w.model.tag = 0, "", ""
    OfClass.n, OfClass.tag = 0, ""

    def step(x):
        w.slots.n += 1
        w.slots.tag = f"slot {w.slots.n}"
        OfClass.n += 2
        OfClass.tag = f"class {OfClass.n}"
        w.model.tag = f"module {OfClass.n + w.slots.n}"
        return x * w.slots.n

    return step


@state("replay with cuts")
def of_a_value(w):
    t, weight = trainer(w), torch.ones(6)

    def step(x):
        t.n += 1
        loss = (x * weight).sum()
        t.tag = f"loss {loss.item():.3f} at {t.n}"
        return loss

    return step


@state(changes={8: lambda w: w.log.update(tag="x")})
def as_items(w):
    w.n, w.log = 0, {"tag": ""}

    def step(x):
        w.n += 1
        w.log["tag"] = f"step {w.n}"
        return x * w.n

    return step


@state("rerun")
def of_a_namespace_that_is_compared(w):
    w.n, w.inner, w.other = 0, SimpleNamespace(tag=""), SimpleNamespace(tag="step 9")

    def step(x):
        w.n += 1
        w.inner.tag = f"step {w.n}"
        return x * (2 if w.inner == w.other else 3)

    return step


# ---- appended, and returned


@state(changes={9: lambda w: w.trainer.names.clear()})
def appended(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.names.append(f"{t.n:03d}")
        if t.n % 2:
            t.names.append(x.shape[0])
            t.names.append("n" + str(t.n))
        return x * t.n

    return step


@state("rerun")
def appended_and_looked_at(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.names.append(f"{t.n}")
        return x * (3 if t.names[-1] == "8" else 2)

    return step


@state("rerun")
def appended_to_a_list_with_another_name(w):
    t = trainer(w)
    w.alias = t.names

    def step(x):
        t.n += 1
        t.names.append(f"{t.n}")
        return x * (3 if "8" in w.alias else 2)

    return step


@state()
def returned(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        return x * t.n, f"step {t.n}", {"a": (str(t.n * 2), t.name), "b": [f"{t.n}!"]}

    return step


@state()
def returned_alone(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        return f"step {t.n}"

    return step


def the_same_counts(w) -> None:
    vars(w.trainer).update(n=4, name="5")


LIKE_THE_TEXT = dict.fromkeys(range(2, 9), the_same_counts)


@state(changes=LIKE_THE_TEXT, calls=16)
def returned_beside_the_same_text(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        return t.name, f"{t.n}"

    return step


@state("rerun", changes=LIKE_THE_TEXT, calls=16)
def appended_beside_another_text(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.names.append(f"{t.n}")
        t.names.append(t.name)
        return x * 2

    return step


@state(changes=LIKE_THE_TEXT, calls=16)
def returned_and_the_same_text_kept(w):
    t = trainer(w)
    t.last = ""

    def step(x):
        t.n += 1
        t.last = t.name
        return f"{t.n}"

    return step


@state(changes=LIKE_THE_TEXT, calls=16)
def kept_twice(w):
    """Two counters that have the same text for a while."""
    t, w.other = trainer(w), Trainer()

    def step(x):
        t.n += 1
        w.other.n += 1
        t.tag = f"{t.n}"
        w.other.tag = f"{w.other.n}"
        t.a = t.b = t.name
        return x * 2

    return step


# ---- read


@state("rerun")
def compared_in_the_same_call(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.tag = f"step {t.n}"
        return x * (3 if t.tag == "step 9" else 2)

    return step


@state("rerun")
def compared_in_the_next_call(w):
    t = trainer(w)

    def step(x):
        k = 3 if t.tag == "step 9" else 2
        t.n += 1
        t.tag = f"step {t.n}"
        return x * k

    return step


@state("rerun")
def read_by_a_name_that_is_computed(w):
    t = trainer(w)
    t.which = "tag"

    def step(x):
        t.n += 1
        t.tag = f"step {t.n}"
        return x * (3 if getattr(t, t.which) == "step 9" else 2)

    return step


@state("rerun")
def read_as_all_attributes(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.tag = f"step {t.n}"
        return x * (3 if "step 9" in vars(t).values() else 2)

    return step


@state("rerun")
def handed_on(w):
    t = trainer(w)
    t.last = ""

    def step(x):
        t.last = t.tag
        t.n += 1
        t.tag = f"step {t.n}"
        return x * 2

    return step


@state("rerun")
def in_a_variable_too(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.tag = tag = f"step {t.n}"
        return x * (3 if tag == "step 9" else 2)

    return step


@state("rerun")
def its_length(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        return x * len(f"{t.n}")

    return step


@state("rerun")
def as_a_key(w):
    t = trainer(w)
    t.seen, t.scale = {}, {"2": 2.0, "5": 5.0}

    def step(x):
        t.n += 1
        t.seen[f"step {t.n}"] = t.n
        return x * t.scale.get(str(t.n), 1.0)

    return step


@state()
def as_one_of_a_few_keys(w):
    t = trainer(w)
    t.scale = {"k0": 2.0, "k1": 3.0}

    def step(x):
        t.n = 1 - t.n
        return x * t.scale[f"k{t.n}"]

    return step


# ---- as keys


def of_logs(w) -> Trainer:
    t = trainer(w)
    t.log = {}
    return t


@state(
    changes={
        8: lambda w: setattr(w.trainer, "n", 2),
        9: lambda w: w.trainer.log.update({"loss/4": 0.5, "x": 1}),
        10: lambda w: w.trainer.log.clear(),
        11: lambda w: setattr(w.trainer, "log", {"y": 2}),
    },
    calls=16,
)
def as_new_keys(w):
    t = of_logs(w)

    def step(x):
        t.n += 1
        loss = (x * t.n).sum()
        t.log[f"loss/{t.n}"] = loss
        t.log["n/" + str(t.n)] = t.n * 2
        return loss

    return step


@state(changes={9: lambda w: w.trainer.log.clear()})
def as_the_same_key_twice(w):
    t = of_logs(w)

    def step(x):
        t.n += 1
        t.log[f"{t.n}"] = x * 2
        for k in range(2):
            t.log[f"{t.n}"] = k
        return x * t.n

    return step


@state("rerun")
def as_keys_that_are_looked_for(w):
    t = of_logs(w)

    def step(x):
        t.n += 1
        t.log[f"{t.n}"] = t.n
        return x * (3 if "8" in t.log else 2)

    return step


@state("rerun")
def as_keys_of_a_dict_that_is_read(w):
    t = of_logs(w)

    def step(x):
        t.n += 1
        t.log[f"{t.n}"] = t.n
        return x * len(t.log)

    return step


@state("rerun")
def as_keys_of_a_dict_with_another_name(w):
    t = of_logs(w)
    w.alias = t.log

    def step(x):
        t.n += 1
        t.log[f"{t.n}"] = t.n
        return x * (3 if "8" in w.alias else 2)

    return step


@state(changes={5: lambda w: setattr(w.trainer, "shown", w.trainer.log)})
def as_keys_of_two_dicts_that_become_one(w):
    """What is put there by the other name was taken back with the rest of a trace."""
    t = of_logs(w)
    t.m, t.shown = 1, {}

    def step(x):
        t.n += 1
        t.m = t.n * t.m % 7
        t.log[f"loss/{t.n}"] = x * t.n
        t.shown[f"{t.m}"] = t.n
        return x * 2

    return step


@state("rerun")
def as_keys_beside_a_plain_one(w):
    t = of_logs(w)

    def step(x):
        t.n += 1
        t.log[f"{t.n}"] = t.n
        t.log["last"] = f"{t.n}"
        return x * 2

    return step


@state("rerun")
def as_keys_in_a_variable(w):
    t = of_logs(w)

    def step(x):
        t.n += 1
        t.log[key := f"{t.n}"] = t.n
        return x * len(key)

    return step


@state(changes={7: lambda w: w.trainer.log.clear()})
def as_keys_that_cannot_be_followed(w):
    t = of_logs(w)

    def step(x):
        t.n = 1 - t.n
        t.log[f"{t.n:n}"] = 3
        return x * 2

    return step


@state(changes={7: lambda w: w.trainer.log.clear(), 9: lambda w: setattr(w.trainer, "name", "z")})
def as_a_key_that_stays(w):
    t = of_logs(w)

    def step(x):
        t.n += 1
        t.log[f"{t.name}"] = 3
        return x * t.n

    return step


@state()
def as_keys_of_what_is_returned(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        return {f"loss/{t.n}": x * 2}

    return step


# ---- put by others


@state(
    "rerun",
    changes={5: lambda w: setattr(w.trainer, "n", 4), 6: lambda w: setattr(w.trainer, "n", 4)},
)
def overwritten_by_another_text(w):
    t = trainer(w)
    t.name = "5"

    def step(x):
        t.n += 1
        t.tag = f"{t.n}"
        if t.m > 3:
            t.tag = t.name
        return x * 2

    return step


@state(changes={8: lambda w: setattr(w.trainer, "n", 3), 9: lambda w: setattr(w.trainer, "n", 3)})
def the_same_text_again(w):
    """The counter is set back, and the text stays what it was."""
    t = trainer(w)

    def step(x):
        t.n += 1
        t.tag = f"{t.n}"
        return x * 2

    return step


class Checked(Trainer):
    """Looks at what it is given."""

    def __setattr__(self, name, x):
        object.__setattr__(self, "nine", x == "step 9")
        object.__setattr__(self, name, x)


class Property(Trainer):
    nine = False

    @property
    def label(self):
        return ""

    @label.setter
    def label(self, x):
        self.nine = x == "step 9"


@state("rerun")
def where_a_class_looks_at_it(w):
    w.trainer = t = Checked()
    w.other = Property()

    def step(x):
        t.n += 1
        t.label = f"step {t.n}"
        w.other.label = f"step {t.n}"
        return x * (3 if t.nine or w.other.nine else 2)

    return step


# ---- made by others


class Shown:
    """Whose text is that of a counter."""

    def __init__(self, of):
        self.of = of

    def __format__(self, spec):
        return f"<{self.of.n}>"

    def __str__(self):
        return str(self.of.n)


class Whole(int):
    def __format__(self, spec):
        return "whole"


class Name(str):
    def __format__(self, spec):
        return self.upper()


@state("rerun")
def by_a_class(w):
    t = trainer(w)
    t.shown = Shown(t)

    def step(x):
        t.n += 1
        t.tag = f"{t.shown} {t.n}"
        t.a = str(t.shown)
        return x * 2

    return step


@state("rerun")
def of_subclasses(w):
    t = trainer(w)
    t.whole, t.label = Whole(3), Name("name")

    def step(x):
        t.n += 1
        t.a = f"{t.whole} {t.n}"
        t.b = f"{t.label} {t.n}"
        return x * 2

    return step


@state("rerun")
def of_containers(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.tag = f"{[t.n]}"
        t.a = str((t.n, 1))
        t.b = "%s" % [t.n]
        return x * 2

    return step


@state()
def by_a_function(w):
    t = trainer(w)

    def label():
        return f"step {t.n}"

    def step(x):
        t.n += 1
        t.tag = label()
        return x * 2

    return step


@state("rerun")
def by_the_locale(w):
    t = trainer(w)

    def step(x):
        t.n += 1000
        t.tag = f"{t.n:n}"
        return x * 2

    return step


@state(
    changes={
        6: lambda w: setattr(w.trainer, "spec", ">7"),
        9: lambda w: setattr(w.trainer, "spec", "x"),
    }
)
def by_another_spec(w):
    t = trainer(w)
    t.spec = "03d"

    def step(x):
        t.n += 1
        t.tag = f"{t.n:{t.spec}}"
        return x * 2

    return step


@state("rerun")
def a_spec_that_varies(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        t.tag = f"{1.5:{t.n}.2f}"
        return x * 2

    return step


@state("rerun")
def that_cannot_be_made(w):
    t = trainer(w)

    def step(x):
        t.n += 1
        try:
            t.tag = f"{t.n}{1 // 0}"
        except ZeroDivisionError:
            t.m = 3
        return x * 2

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(0.34)
def test_state(name):
    check(CASES[name])
