"""Python itself in a step: what names, containers, functions and classes can do between calls.

Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import itertools
import operator
import sys
import types
from types import SimpleNamespace

import pytest
import torch

import tracejit
from support.worlds import Case, check, table

CASES: dict[str, Case] = {}
case = table(CASES)

X = torch.linspace(-1, 2, 6)
SETTINGS = types.ModuleType("settings")
SETTINGS.scale, SETTINGS.names = 2, ["a"]
sys.modules["settings_of_the_user"] = SETTINGS
FLAG = 1


HALF = 0.5
COUNT = 2
TENSOR = torch.ones(3)
NUMBERS = [1.0, 2.0]


def helper_of_the_module(x):
    return x * COUNT


_helper = helper_of_the_module


@pytest.fixture(autouse=True)
def restored():
    yield
    restore()


def restore():
    SETTINGS.scale, SETTINGS.names = 2, ["a"]
    for name in ("extra", "late", "absent"):
        vars(SETTINGS).pop(name, None)
    for name in ("LATE", "len"):
        globals().pop(name, None)
    globals().update(FLAG=1, HALF=0.5, COUNT=2, TENSOR=torch.ones(3), NUMBERS=[1.0, 2.0])
    globals().update(helper_of_the_module=_helper)


def setting(name, value):
    return lambda w: setattr(SETTINGS, name, value)


def bind(name, value):
    return lambda w: globals().update({name: value})


# ---- attributes by other ways than their name


@case("replay", changes={3: lambda w: setattr(w.cfg, "scale1", 9.0)})
def attribute_by_a_computed_name(w):
    w.cfg = cfg = SimpleNamespace(scale0=1.0, scale1=2.0)
    return lambda: sum(X * getattr(cfg, f"scale{i}") for i in range(2))


@case("replay", changes={3: lambda w: setattr(w.cfg, "b", 9.0)})
def attribute_by_a_name_in_a_list(w):
    class Config:
        names = ["a", "b"]

        def __init__(self):
            self.a, self.b = 1.0, 2.0

    w.cfg = cfg = Config()
    return lambda: sum(X * getattr(cfg, name) for name in cfg.names)


@case("replay", changes={3: lambda w: setattr(w.cfg, "decay", 9.0)})
def attribute_by_a_global_constant(w):
    w.cfg = cfg = SimpleNamespace(decay=2.0)
    return lambda: X * getattr(cfg, WHICH)


WHICH = "decay"


@case("replay", changes={3: lambda w: setattr(w.cfg, "b", 9.0)})
def attribute_by_attrgetter_made_inside(w):
    w.cfg = cfg = SimpleNamespace(b=2.0)
    return lambda: X * operator.attrgetter("".join("b"))(cfg)


@case("rerun", changes={3: lambda w: setattr(w.cfg, "b", 9.0)})
def attribute_by_attrgetter_made_outside(w):
    w.cfg, get = SimpleNamespace(b=2.0), operator.attrgetter("b")
    cfg = w.cfg
    return lambda: X * get(cfg)


@case("replay", changes={3: lambda w: setattr(w.cfg, "b", 9.0)})
def attribute_by_vars(w):
    w.cfg = cfg = SimpleNamespace(b=2.0)
    return lambda: X * vars(cfg)["b"]


@case("replay", changes={3: lambda w: setattr(w.cfg, "b", 9.0)})
def attribute_by_the_dict(w):
    w.cfg = cfg = SimpleNamespace(b=2.0)
    return lambda: X * sum(cfg.__dict__.values())


@dataclasses.dataclass
class Pair:
    left: float = 1.0
    right: float = 2.0


@case("replay", changes={3: lambda w: setattr(w.cfg, "right", 9.0)})
def attributes_by_dataclass_functions(w):
    w.cfg = cfg = Pair()
    return lambda: X * sum(dataclasses.asdict(cfg).values())


@case("replay", changes={3: lambda w: setattr(w.cfg, "right", 9.0)})
def attributes_by_replace(w):
    w.cfg = cfg = Pair()

    def scale(pair):
        return pair.left + pair.right

    return lambda: X * scale(dataclasses.replace(cfg, left=3.0))


@case("replay", changes={3: lambda w: setattr(w.cfg, "right", 9.0)})
def attributes_by_match(w):
    w.cfg = cfg = Pair()

    def step():
        match cfg:
            case Pair(1.0, 2.0):
                return X * 2
            case Pair(left=1.0):
                return X * 3

    return step


@case("replay", changes={3: lambda w: setattr(w.cfg, "right", 9.0)})
def attribute_by_match_with_a_keyword(w):
    w.cfg = cfg = Pair()

    def step():
        match cfg:
            case Pair(right=2.0):
                return X * 2
        return X

    return step


@case("replay", changes={3: lambda w: setattr(w.cfg, "b", 9.0)})
def attributes_by_comparing_namespaces(w):
    w.cfg, other = SimpleNamespace(b=2.0), SimpleNamespace(b=2.0)
    cfg = w.cfg
    return lambda: X * (2 if cfg == other else 3)


@case("replay", changes={3: lambda w: setattr(w.cfg, "b", 9.0)})
def attributes_by_copying(w):
    class Config:
        b = 1.0

    w.cfg = cfg = Config()
    cfg.b = 2.0
    name = "b"
    return lambda: X * getattr(copy.copy(cfg), name)


@case(
    "replay",
    changes={3: lambda w: setattr(w.x, "gain", 9.0), 6: lambda w: setattr(w.x, "gain", 5.0)},
    calls=9,
)
def attribute_of_a_tensor_set_later(w):
    w.x = x = X.clone()
    return lambda: x * getattr(x, "gain", 1.0)


@case("replay", changes={3: lambda w: setattr(w.helper, "gain", 9.0)}, calls=8)
def attribute_of_a_function_set_later(w):
    def helper(x):
        return x * getattr(helper, "gain", 1.0)

    w.helper = helper
    return lambda: helper(X)


@case("replay")
def counter_on_the_step_itself(w):
    @tracejit.compile
    def step():
        step.calls += 1
        return X * step.calls

    step.calls = 0
    w.calls = lambda: step.calls
    return lambda: step()


@case("replay", changes={3: lambda w: w.set(9.0)})
def attribute_of_the_step_itself(w):
    @functools.partial(tracejit.compile, backend="numpy")
    def step():
        return X * step.gain

    step.gain = 2.0
    w.set = functools.partial(setattr, step, "gain")
    return lambda: step()


class Dynamic:
    def __init__(self, **found):
        self._found = found

    def __getattr__(self, name):
        return self._found[name]


@case("replay", changes={3: lambda w: w.cfg._found.update(b=9.0)})
def attribute_by_getattr_hook(w):
    w.cfg = cfg = Dynamic(b=2.0)
    return lambda: X * cfg.b


class Typed:
    def __init__(self, default):
        self.values, self.default = {}, default

    def __get__(self, instance, owner):
        return self if instance is None else self.values.get(id(instance), self.default)

    def __set__(self, instance, value):
        self.values[id(instance)] = value


@case("rerun", changes={3: lambda w: setattr(w.cfg, "b", 9.0)}, calls=9)
def attribute_by_a_descriptor(w):
    class Config:
        b = Typed(2.0)

    cfg = Config()
    w.cfg = cfg

    def step():
        return X * cfg.b

    return step


# ---- names


@case("replay", changes={3: bind("HALF", 4.0), 5: bind("HALF", 4)}, calls=9)
def global_float_that_becomes_an_int(w):
    n = torch.arange(3)
    return lambda: n * HALF


@case("replay", changes={3: bind("COUNT", 5), 6: bind("COUNT", 2)}, calls=9)
def global_int(w):
    return lambda: X * COUNT


@case(
    "replay",
    changes={3: bind("COUNT", 7), 6: bind("helper_of_the_module", lambda x: x - 100)},
    calls=11,
)
def global_helper_and_what_it_reads(w):
    return lambda: helper_of_the_module(X)


@case(
    "replay",
    changes={3: bind("TENSOR", torch.full((3,), 9.0)), 6: bind("TENSOR", torch.full((2, 3), 9.0))},
    calls=11,
)
def global_tensor_of_another_shape(w):
    return lambda: TENSOR * 2


@case("replay", changes={3: lambda w: NUMBERS.__setitem__(0, 50.0)})
def item_of_a_global_list(w):
    return lambda: X * NUMBERS[0]


@case("replay", changes={3: lambda w: w.config.update(scale=5.0)})
def item_of_a_dict(w):
    w.config = config = {"scale": 2.0}
    return lambda: X * config["scale"]


@case("replay", changes={3: bind("len", lambda x: 40)}, calls=8)
def builtin_shadowed(w):
    return lambda: X * len((1, 2))


@case("replay", changes={3: lambda w: setattr(SETTINGS, "late", 9.0)}, calls=9)
def import_inside(w):
    SETTINGS.late = 2.0

    def step():
        import math as m

        from settings_of_the_user import late

        return X * m.pi * late

    return step


@case("replay", changes={3: setting("absent", True)})
def import_of_what_is_not_there(w):
    SETTINGS.absent = False

    def step():
        if SETTINGS.absent:
            try:
                import not_there_at_all
            except ImportError:
                return X * 3
            return not_there_at_all.x
        return X * 2

    return step


HELD = 2.0


def _held():
    return HELD


@case("replay", changes={4: bind("HELD", 5.0), 6: bind("HELD", 2.0)}, calls=10)
def function_that_runs_late_beside_computed_names(w):
    """It computes what the step has computed without it, of a global that only it names."""
    w.cfg, w.n = SimpleNamespace(a=0, b=1), 0

    def step():
        w.n += getattr(w.cfg, "ab"[w.n > 0])
        w.n += 1
        return X * (_held() if w.n > 1 else 2.0)

    return step


@case("replay", changes={3: bind("LATE", 5.0)}, calls=8)
def global_defined_later(w):
    def step():
        try:
            return X * LATE
        except NameError:
            return X

    return step


@case("replay", changes={3: setting("extra", 5)}, calls=8)
def name_of_a_module_defined_later(w):
    def step():
        try:
            return X * SETTINGS.extra
        except AttributeError:
            return X

    return step


@case("replay", changes={3: lambda w: w.bind()}, calls=8)
def closure_bound_later(w):
    if X is None:
        late = None

    def bind():
        nonlocal late
        late = 5.0

    def step():
        try:
            return X * late
        except NameError:
            return X

    w.bind = bind
    return step


@case("replay", changes={3: setting("scale", 5)})
def constant_of_a_user_module(w):
    return lambda: X * SETTINGS.scale


@case("replay", changes={3: setting("scale", 5)})
def constant_of_a_module_in_an_attribute(w):
    holder = SimpleNamespace(settings=SETTINGS)
    return lambda: X * holder.settings.scale


@case("replay", changes={3: setting("scale", 5)})
def constant_of_a_module_in_a_closure(w):
    settings = SETTINGS
    return lambda: X * settings.scale


class Kind(enum.Enum):
    PLAIN = 1
    TABLE = {"scale": 2.0}


@case("replay", changes={3: lambda w: Kind.TABLE.value.update(scale=5.0)})
def value_of_an_enum_member(w):
    Kind.TABLE.value["scale"] = 2.0
    return lambda: X * Kind.TABLE.value["scale"]


@case("replay", changes={3: lambda w: setattr(Kind.PLAIN, "gain", 5.0)})
def attribute_of_an_enum_member(w):
    Kind.PLAIN.gain = 2.0
    return lambda: X * Kind.PLAIN.gain


@case("replay", changes={3: lambda w: w.t.set(5.0)})
def private_slot(w):
    class Slotted:
        __slots__ = ("__gain",)

        def set(self, gain):
            self.__gain = gain

        def step(self):
            return X * self.__gain

    w.t = t = Slotted()
    t.set(2.0)
    return t.step


@case("rerun", changes={3: lambda w: w.scaled.register(int, lambda n: n * 7)})
def single_dispatch(w):
    @functools.singledispatch
    def scaled(n):
        return n

    w.scaled = scaled
    return lambda: X * scaled(3)


@case("replay", changes={3: setting("names", ["a", "b"])})
def list_of_a_user_module_replaced(w):
    return lambda: X * len(SETTINGS.names)


@case("replay")
def global_counter(w):
    def step():
        global FLAG
        FLAG += 1
        return X * FLAG

    return step


def _count():
    global FLAG
    FLAG += 1
    return FLAG


@case("replay")
def global_counter_in_a_helper(w):
    return lambda: X * _count()


@case("replay")
def closure_counter(w):
    n = 0

    def step():
        nonlocal n
        n += 1
        return X * n

    return step


@case("replay")
def closure_float_changed_by_a_helper(w):
    rate = 1.0

    def decay():
        nonlocal rate
        rate *= 0.5

    def step():
        decay()
        return X * rate

    return step


@case("replay", changes={3: lambda w: globals().update(RATE=0.5)})
def global_float_read_by_a_helper_too(w):
    globals().update(RATE=0.1)
    return lambda: X * RATE + _rated(X)


@case("replay", changes={3: lambda w: w.set(0.25), 4: lambda w: w.set(-1.0)}, backend="c")
def closure_float(w):
    rate = 0.1
    w.x = x = X.clone()

    def set_rate(value):
        nonlocal rate
        rate = value

    def step():
        x.sub_(rate * x)
        return x.sum()

    w.set = set_rate
    return step


@case("replay", changes={3: lambda w: w.set(0.5)})
def closure_float_read_by_a_helper_too(w):
    rate = 0.1

    def set_rate(value):
        nonlocal rate
        rate = value

    def helper(x):
        return x + rate

    w.set = set_rate
    return lambda: helper(X) * rate


@case("replay")
def global_counter_in_a_helper_beside_a_float(w):
    globals().update(RATE=0.1)

    def step():
        _count()
        return X * FLAG * RATE

    return step


@case("replay")
def global_stored_beside_a_float(w):
    globals().update(RATE=0.1, LAST=0)

    def step():
        global LAST
        LAST = LATEST = len(w.seen)
        w.seen.append(LATEST)
        return X * RATE

    w.seen, w.last = [], lambda: LAST
    return lambda: (step(), w.last())


@case("replay")
def global_stored_by_the_step_beside_a_float(w):
    globals().update(RATE=0.1, LAST=0)
    w.seen, w.last = [], lambda: LAST

    def step():
        global LAST
        LAST = len(w.seen)
        w.seen.append(w.last())
        return X * RATE, w.last()

    return step


RATE = 0.1
LAST = 0


def _rated(x):
    return x + RATE


def _collect(x, found=[]):  # noqa: B006
    found.append(len(found))
    return x * len(found)


@case("rerun")
def mutable_default(w):
    _collect.__defaults__[0].clear()
    return lambda: _collect(X)


@case("rerun")
def generator_advanced(w):
    numbers = (i for i in range(100))
    return lambda: X * next(numbers)


@case("rerun")
def iterator_advanced(w):
    numbers = iter(range(100))
    return lambda: X * next(numbers)


@case("rerun")
def counter_of_itertools(w):
    numbers = itertools.count()
    return lambda: X * next(numbers)


# ---- functions and containers made in the step


@case("replay")
def containers_made_inside(w):
    def step():
        parts = [X * i for i in range(3)]
        parts.append(X)
        return {"sum": sum(parts)}

    return step


@case("replay")
def function_and_comprehension_inside(w):
    k = 3

    def step():
        def inner(y):
            return y * k

        return [inner(X + i) for i in range(k)]

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.sweep(2)
def test_python(name):
    check(CASES[name], restore)
