"""The proof of a replay as text: what a step can reach, what ran, what its bytecode reads, and
what its guard says after single changes."""

from __future__ import annotations

import enum
import functools
import io
import math
import operator
import os
import random
import re
import shlex
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType, ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

import tracejit
from support.proof_text import armed, guard_lines, source, trace, what_is_read, what_ran
from tracejit.capture.proof.watch import Seen
from tracejit.capture.python.bytecode import asks, compares, dynamic, scan

X = torch.ones(3)
SCALE, COUNT, NAMES = 0.5, 2, ["a"]


def helper(x, factor=2.0, *, shift=1):
    return x * factor + shift


# ---- from the heap to the lines of a guard

REACH: dict[str, Callable] = {}


def reach(build: Callable) -> Callable:
    """A function that returns a step, and its arguments."""
    REACH[build.__name__] = build
    return build


@pytest.mark.parametrize("name", REACH)
def test_golden_guard_lines(name, golden):
    build = REACH[name]
    made = build()
    step, *args = made if isinstance(made, tuple) else (made,)
    golden(f"proof/{name}.txt", source(build) + guard_lines(step, *args))


@reach
def values_in_a_closure():
    rate, count, name, pair = 0.1, 3, "a", (1, 0.5)
    return lambda x: x * rate * count * len(name) * pair[1], X


@reach
def names_of_a_module():
    return lambda x: functional.relu(x * SCALE + COUNT) * math.pi * len(NAMES), X


@reach
def a_name_that_is_not_defined():
    def step(x):
        try:
            return x * UNDEFINED
        except NameError:
            return x * 2

    return step, X


@reach
def a_variable_that_is_not_bound():
    if X is None:
        late = 1.0

    def step(x):
        try:
            return x * late
        except NameError:
            return x * 2

    return step, X


@reach
def a_function_with_defaults():
    return lambda x: helper(x), X


@reach
def containers_among_the_arguments():
    """They are made anew for each call."""
    return (
        lambda batch, pair: batch["x"] * pair[0] + batch["more"][1],
        {"x": X, "more": [1, X]},
        (2.0, 3),
    )


@reach
def containers_that_are_kept():
    """Those of objects are known by their identity."""
    config = SimpleNamespace(names=["a", "b"], table={"x": X}, other=7)
    return lambda x: x * len(config.names) + config.table["x"], X


@reach
def what_is_named_of_an_object():
    config = SimpleNamespace(scale=2.0, depth=2, unread=3)
    return lambda x: x * config.scale * config.depth, X


@reach
def any_attribute_of_an_object():
    config = SimpleNamespace(a=1, b=2)
    return lambda x: sum(x * getattr(config, "ab"[i]) for i in range(2)), X


class Config:
    gain = 2

    def __init__(self):
        self.depth = 3

    @property
    def scale(self):
        return self.depth * self.gain

    def apply(self, x):
        return x * self.scale


@reach
def a_class_with_a_method_and_a_property():
    config = Config()
    return lambda x: config.apply(x), X


@reach
def a_bound_method():
    return Config().apply, X


class Slotted:
    __slots__ = ("late", "scale")

    def __init__(self):
        self.scale = 2


@reach
def slots():
    config = Slotted()
    return lambda x: x * config.scale * (3 if hasattr(config, "late") else 1), X


@dataclass
class Batch:
    x: torch.Tensor
    weight: float = 1.0


@reach
def a_batch_that_is_a_dataclass():
    return lambda batch: batch.x * batch.weight, Batch(X)


@reach
def one_tensor_at_two_places():
    x, again = torch.ones(3), SimpleNamespace()
    again.x = x
    return lambda: x * again.x


@reach
def an_attribute_of_a_tensor():
    x = torch.ones(3)
    x.scale = 2
    return lambda: x * x.scale


@reach
def sets_keys_and_subclasses():
    table, options = {1: 2, (0, "a"): 3}, {"square"}
    ordered, queue = OrderedDict(a=1), deque([1, 2])
    return lambda x: x * table[1] * len(options) * ordered["a"] * queue[0], X


@reach
def partials_and_wrappers():
    @functools.wraps(helper)
    def wrapped(x):
        return partial(x)

    partial = functools.partial(helper, factor=3)
    return lambda x: wrapped(x), X


class Mode(enum.Enum):
    TRAIN = 1


@reach
def members_of_an_enum():
    mode = Mode.TRAIN
    return lambda x: x * 2 if mode is Mode.TRAIN else x * mode.value, X


@reach
def what_has_no_line():
    numbers, array, ref = iter([1, 2]), np.ones(2), weakref.ref(X)
    form = "%d"
    return lambda x: x * next(numbers) * int(array[0]) * len(ref()) * len(form % 3), X


# ---- what a guard says


@dataclass
class World:
    """What the step below reads, to be changed."""

    x: torch.Tensor
    w: torch.Tensor
    config: SimpleNamespace
    step: Callable
    helper: Callable
    args: tuple = (0.25,)
    kwargs: dict | None = None


class Settings:
    gain = 2


def world() -> World:
    x, w = torch.ones(2, 3), torch.ones(3, requires_grad=True)
    config = SimpleNamespace(scale=2.0, names=["a"], table={"k": 1}, settings=Settings())
    config.settings.depth = 1

    def inner(y):
        return y * config.table["k"]

    def step(rate):
        y = torch.tanh(x * w) * rate if rate < 0.5 else x * w
        y = inner(y) * config.scale * len(config.names) * config.settings.depth
        y = y * config.settings.gain
        y.sum().backward()
        return y.detach()

    return World(x, w, config, step, inner)


def other_code() -> CodeType:
    config = None
    return (lambda y: (y, config)).__code__


def slid(n: int) -> torch.Tensor:
    """Contiguous memory that begins n elements after where torch begins."""
    return torch.ones(6 + n)[n:].view(2, 3)


def to(**values: object) -> Callable[[World], None]:
    return lambda w: vars(w).update(values)


def with_config(**values: object) -> Callable[[World], None]:
    return lambda w: vars(w.config).update(values)


X_WAS = "x was float32[2, 3], strides [3, 1], on cpu and is "
W_WAS = "w was float32[3], strides [1], on cpu, a leaf that requires grad and is "

CHANGES: dict[str, tuple[Callable[[World], object], str]] = {
    # arguments
    "nothing": (lambda w: None, ""),
    "another float": (to(args=(0.3,)), ""),
    "a decision": (to(args=(0.75,)), "a decision on a runtime scalar (lt) came out otherwise"),
    "an int for a float": (to(args=(1,)), "argument rate was 0.25 and is 1 now"),
    "more arguments": (to(args=(0.25, 1)), "the number of arguments changed"),
    "keywords": (to(kwargs={"a": 1}), "the keyword arguments changed"),
    # tensors
    "values": (lambda w: w.x.fill_(7.0), ""),
    "shape": (
        lambda w: setattr(w.x, "data", torch.ones(4, 3)),
        X_WAS + "float32[4, 3], strides [3, 1], on cpu now",
    ),
    "strides": (
        lambda w: setattr(w.x, "data", torch.ones(3, 2).t()),
        X_WAS + "float32[2, 3], strides [1, 2], on cpu now",
    ),
    "dtype": (
        lambda w: setattr(w.x, "data", torch.ones(2, 3).double()),
        X_WAS + "float64[2, 3], strides [3, 1], on cpu now",
    ),
    "alignment": (lambda w: setattr(w.x, "data", slid(1)), "the alignment of an input changed"),
    "memory elsewhere": (lambda w: setattr(w.x, "data", slid(4)), ""),
    "shared memory": (lambda w: setattr(w.w, "data", w.x.data[0]), "two inputs share memory now"),
    "requires grad": (
        lambda w: w.x.requires_grad_(),
        X_WAS + "float32[2, 3], strides [3, 1], on cpu, a leaf that requires grad now",
    ),
    "frozen": (
        lambda w: w.w.requires_grad_(False),
        W_WAS + "float32[3], strides [1], on cpu now",
    ),
    "a hook": (
        lambda w: w.w.register_hook(lambda g: g),
        W_WAS + "float32[3], strides [1], on cpu, a leaf that requires grad, with a hook now",
    ),
    "a gradient": (
        lambda w: setattr(w.w, "grad", torch.ones(3)),
        "a .grad that was None when traced is set",
    ),
    # what Python can reach
    "a float that is no argument": (with_config(scale=5.0), "config.scale was 2.0 and is 5.0 now"),
    "a new attribute": (with_config(more=1), "config has other attributes now"),
    "a lost attribute": (lambda w: delattr(w.config, "scale"), "config has other attributes now"),
    "an attribute of another order": (
        lambda w: vars(w.config).update(scale=vars(w.config).pop("scale")),
        "config has other attributes now",
    ),
    "a longer list": (
        lambda w: w.config.names.append("b"),
        "config.names was a list of 1 and is a list of 2 now",
    ),
    "another item": (
        lambda w: w.config.names.__setitem__(0, "b"),
        "config.names[0] was 'a' and is 'b' now",
    ),
    "another list with the same items": (with_config(names=["a"]), ""),
    "another key": (
        lambda w: w.config.table.update(m=2),
        "config.table was a dict of 1 and is a dict of 2 now",
    ),
    "a lost key": (
        lambda w: w.config.table.clear(),
        "config.table was a dict of 1 and is a dict of 0 now",
    ),
    "another number": (
        lambda w: w.config.table.update(k=2),
        "config.table['k'] was 1 and is 2 now",
    ),
    "True for 1": (
        lambda w: w.config.table.update(k=True),
        "config.table['k'] was 1 and is True now",
    ),
    "another object": (with_config(settings=Settings()), "config.settings is another Settings now"),
    "an attribute of an object": (
        lambda w: setattr(w.config.settings, "depth", 2),
        "config.settings.depth was 1 and is 2 now",
    ),
    "an attribute of its class": (
        lambda w: setattr(Settings, "gain", 3),
        "Settings.gain was 2 and is 3 now",
    ),
    "a method of its class": (
        lambda w: setattr(Settings, "__getattr__", None),
        "the class Settings changed",
    ),
    "the code of a helper": (
        lambda w: setattr(w.helper, "__code__", other_code()),
        "the code of inner changed",
    ),
    # torch
    "grad mode": (lambda w: torch.set_grad_enabled(False), "grad mode changed"),
    "default dtype": (lambda w: torch.set_default_dtype(torch.float64), "default dtype changed"),
    "a replaced function": (
        lambda w: setattr(torch, "tanh", torch.sin),
        "torch.tanh was _VariableFunctionsClass.tanh and is _VariableFunctionsClass.sin now",
    ),
    "a hook of all modules": (
        lambda w: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
        "torch's _global_forward_hooks changed",
    ),
}


@pytest.fixture
def restored():
    yield
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.nn.modules.module._global_forward_hooks.clear()
    torch.tanh = TANH
    Settings.gain = 2
    if "__getattr__" in vars(Settings):
        del Settings.__getattr__


TANH = torch.tanh


def guard_after(change: Callable[[World], object]) -> str:
    """What the guard of the world's step says after a change; empty if it accepts the call."""
    w = world()
    guard = armed(w.step, *w.args).guard
    found = guard(w.args, {})
    assert type(found) is tuple, found
    change(w)
    found = guard(w.args, w.kwargs or {})
    return found if type(found) is str else ""


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.sweep(0.17)
def test_a_guard_says_what_changed(name, restored):
    change, reason = CHANGES[name]
    assert guard_after(change) == reason


# ---- what ran

RAN: dict[str, tuple[Callable, list[str]]] = {}


def ran(*lines: str) -> Callable:
    """A step of one tensor, and what a watched trace sees of it."""

    def register(step: Callable) -> Callable:
        RAN[step.__name__] = step, [*lines]
        return step

    return register


@pytest.mark.parametrize("name", RAN)
def test_what_ran(name):
    step, lines = RAN[name]
    found = re.sub(", which is not known to be pure: .*", "", what_ran(step, torch.ones(3)))
    assert found.splitlines() == lines


@ran("runs torch_and_a_helper, helper")
def torch_and_a_helper(x):
    return functional.gelu(helper(x)).sum()


@ran("runs a_module_of_torch", "of torch.nn.functional: linear")
def a_module_of_torch(x):
    return LINEAR(x)


LINEAR = torch.nn.Linear(3, 3)


@ran("runs pure_python, <genexpr>")
def pure_python(x):
    sizes = sorted({len(x.shape), 3}, reverse=True)
    return sum(x * operator.mul(n, round(2.5)) for n in sizes if isinstance(n, int))


@ran("runs a_clock", "refused: line 1: it calls time.perf_counter")
def a_clock(x):
    return x * (time.perf_counter() > 0)


class Ticking:
    """Its arithmetic asks the clock."""

    def __radd__(self, number):
        return number * (time.perf_counter() > 0)

    __gt__ = __radd__


@pytest.mark.parametrize("symbol", [operator.add, operator.lt])
def test_what_ran_beside_a_number(symbol):
    def step(x):
        return x * symbol(SCALE * 2.0, Ticking())

    found = what_ran(step, torch.ones(3))
    assert "Ticking.__radd__" in found
    assert "it calls time.perf_counter" in found


@ran("runs much_arithmetic")
def much_arithmetic(x):
    """What notes the functions that run hears little of what numbers and tensors do."""
    rate = SCALE
    for _ in range(50):
        rate = -rate / 2.0 + 1.0
        x = x * rate
    return x


def test_little_is_heard_of_rules_and_numbers(monkeypatch):
    heard = Counter()
    profile = Seen.profile

    def counted(seen: Seen, frame: FrameType, event: str, arg: object) -> None:
        heard[event] += 1
        profile(seen, frame, event, arg)

    monkeypatch.setattr(Seen, "profile", counted)
    trace(much_arithmetic, torch.ones(3), watched=True)
    print(heard)
    assert 600 < heard.total() < 5000  # of 200 operations


@ran(
    "runs chance",
    "refused: line 1: it calls random.choice",
)
def chance(x):
    return x * random.random() * random.choice([1, 2])


@ran("runs chance_of_torch", "refused: line 2: it calls torch._C.Generator.manual_seed")
def chance_of_torch(x):
    torch.manual_seed(0)
    torch.default_generator.manual_seed(0)
    return x * 2


@ran("runs output", "refused: line 1: it calls print")
def output(x):
    print(end="", file=SILENT)
    return x * 2


@ran("runs files", "refused: line 1: it calls genericpath.exists")
def files(x):
    return x * os.path.exists("a")


@ran("runs arrays")
def arrays(x):
    return x * float(np.ones(2).sum())


@ran("runs spelled_out_attributes")
def spelled_out_attributes(x):
    return x * getattr(SETTINGS, "depth", 1)


@ran("runs computed_attributes", "computes names of attributes")
def computed_attributes(x):
    return x * getattr(SETTINGS, "de" + "pth"[:3])


SETTINGS = SimpleNamespace(depth=2)
SILENT = io.StringIO()


@ran("runs identities", "refused: line 1: it calls id", "refused: line 1: it calls hash")
def identities(x):
    return x * (id(x) > 0) * hash("a")


@ran("runs what_is_called_by_what_is_refused", "refused: line 1: it calls shlex.split")
def what_is_called_by_what_is_refused(x):
    return x * len(shlex.split(" a"))


def test_what_ran_is_joined():
    """The names of two traces are those of either, and cover both."""
    (_, first, _), (_, second, _) = (
        trace(step, torch.ones(3), watched=True) for step in (torch_and_a_helper, pure_python)
    )
    assert not first.covers(second) and not second.covers(first)
    both = first.joined(second)
    assert both.covers(first) and both.covers(second)
    assert both.names() == first.names() | second.names()


# ---- what bytecode reads

READS: dict[str, tuple[Callable, list[str], str]] = {}


def reads(*lines: str, notes: str = "") -> Callable:
    """A function, the outside names that its code spells out, and what else its code may do."""

    def register(function: Callable) -> Callable:
        READS[function.__name__] = function, [*lines], notes
        return function

    return register


@pytest.mark.parametrize("name", READS)
def test_what_bytecode_reads(name):
    function, lines, notes = READS[name]
    assert what_is_read(scan(function), function).splitlines() == lines
    code = function.__code__
    found = {"dynamic": dynamic(code), "asks": asks(code), "compares": compares(code)}
    assert " ".join(what for what, so in found.items() if so) == notes


@reads(
    "torch: the module torch",
    "torch.nn: the module torch.nn",
    "torch.nn.functional: the module torch.nn.functional",
    "torch.nn.functional.relu: relu",
    "math: the module math",
    "math.pi: 3.141592653589793",
)
def modules_as_far_as_they_are_spelled(x):
    return torch.nn.functional.relu(x) * math.pi


@reads("len: builtin", "NAMES: ['a']", "SCALE: 0.5")
def builtins_and_globals(x):
    return len(NAMES) * SCALE


@reads("COUNT: 2")
def nested_code(x):
    return [(lambda y: y * COUNT)(y) for y in x]


@reads("UNDEFINED: missing", "math: the module math", "math.undefined: missing")
def undefined(x):
    return UNDEFINED * math.undefined  # noqa: F821


@reads(
    "helper: helper", "math: the module math", "refused: line 1: it uses the module math as a value"
)
def a_module_as_a_value(x):
    return helper(math)


@reads("math: the module math", "refused: line 1: it stores into the module math as a value")
def storing_into_a_module(x):
    math.scale = 3


@reads("COUNT: 2")
def storing_a_global(x):
    global COUNT
    COUNT = 3


@reads("refused: line 1: it makes the global name 'MADE_HERE'")
def making_a_global(x):
    global MADE_HERE
    MADE_HERE = 3


@reads(
    "os: the module os",
    "os: the module os",
    "os.curdir: '.'",
    "os: the module os",
    "os.sep: '/'",
)
def imports(x):
    import os
    from os import sep

    return os.curdir + sep


@reads(
    "os.path: the module posixpath",
    "os: the module os",
    "os.path: the module posixpath",
    "os.path: the module posixpath",
    "os.path.sep: '/'",
)
def imports_by_another_name(x):
    import os.path as p

    return p.sep


@reads("refused if it runs: it imports not_there")
def imports_what_is_not_there(x):
    import not_there

    return not_there.x


@reads("refused if it runs: it imports os")
def imports_for_nested_code(x):
    import os

    return lambda: os.sep


@reads(
    "os: the module os",
    "os.path: the module posixpath",
    "os.path: the module posixpath",
    "refused: line 1: it uses the module os.path as a value",
)
def imports_a_module_as_a_value(x):
    from os import path

    return path


@reads("__name__: 'test_proof'", "refused if it runs: it defines a class")
def classes(x):
    class Local:
        pass

    return Local


@reads("refused if it runs: it computes with complex numbers")
def complex_numbers(x):
    return x * 1j


@reads("refused if it runs: it may format a string with %")
def formatting(x):
    return "%.1f" % x  # noqa: UP031


@reads()
def formatting_that_asks(x):
    return "%s %d" % (x, x)  # noqa: UP031


@reads("refused if it runs: it may format a string with %")
def remainder_of_something(x):
    return x.a % 2


@reads("refused if it runs: it reads cell_contents")
def the_contents_of_a_cell(x):
    return x.cell_contents


@reads(notes="dynamic")
def the_dict_of_an_object(x):
    return x.__dict__


@reads("hasattr: builtin", "getattr: builtin", notes="asks")
def attributes_by_constant_names(x):
    return getattr(x, "a", 1) if hasattr(x, "b") else None


@reads("getattr: builtin", "NAMES: ['a']", notes="dynamic asks")
def attributes_by_computed_names(x):
    return getattr(x, NAMES[0])


@reads("vars: builtin", notes="dynamic")
def attributes_of_all_kinds(x):
    return vars(x)


@reads(
    "operator: the module operator",
    "operator.attrgetter: attrgetter",
    "NAMES: ['a']",
    notes="dynamic",
)
def a_getter(x):
    return operator.attrgetter(*NAMES)(x)


@reads("Batch: Batch", notes="dynamic compares")
def patterns_by_position(x):
    match x:
        case Batch(y, 1.0):
            return y


@reads("Batch: Batch", notes="compares")
def patterns_by_name(x):
    match x:
        case Batch(weight=1.0):
            return x


@reads("AttributeError: builtin", "NAMES: ['a']", notes="asks compares")
def errors_that_ask(x):
    try:
        return x.late
    except AttributeError:
        return x in NAMES


@pytest.mark.parametrize("kind", ["functions", "classes"])
def test_what_leads_to_more_than_the_stack_is_deep(kind):
    """A thousand functions, or classes, each of which names the next one."""
    text = "def f{i}(x):\n    return x * factor if x is not None else f{next}(x)\n"
    if kind == "classes":
        inner = "return f{next}(x) if x is None else x * factor"
        text = f"class f{{i}}:\n    def __new__(cls, x):\n        {inner}\n"
    module = ModuleType("a_long_way")
    vars(module).update(factor=2.0, f1000=None)
    lines = [text.format(i=i, next=i + 1) for i in range(1000)]
    lines.append("def step(x, options):\n    return f0(x) + options.shift\n")
    exec(compile("\n".join(lines), "a_long_way.py", "exec"), vars(module))
    # what holds floats and tensors is looked at before it is known what runs
    options = SimpleNamespace(shift=1.0, last=torch.zeros(3))
    compiled = tracejit.compile(module.step, on_unsupported="raise")
    for i in range(6):
        options.shift += 1
        assert compiled(X, options).tolist() == (2 * X + i + 2).tolist()
    assert compiled.stats.replays >= 2, compiled.explain_mode()
    module.factor = 5.0
    assert compiled(X, options).tolist() == (5 * X + 7).tolist()
