"""What a step is called with: numbers, strings, tensors that coincide, batches in containers.

Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from support.worlds import Case, Keywords, Trainer, X, Y, check, table

CASES: dict[str, Case] = {}
case = table(CASES)

ONES = torch.ones(3)

# ---- floats


@case("replay", args=lambda i: (0.1 * i,), backend="c")
def float_argument(w):
    return lambda a: ONES * a + a**2


@case("replay", args=lambda i: ((0.1 * i, 2.0),))
def float_in_a_tuple(w):
    return lambda pair: ONES * pair[0] + pair[1]


@case("replay", args=lambda i: (0.5 * i,))
def float_returned(w):
    return lambda a: (ONES * a, a * 2, "name", 3)


@case("replay", args=lambda i: (0.0 if i < 4 else -0.0,), calls=8)
def zero_against_negative_zero(w):
    return lambda a: 1.0 / (ONES * a)


@case("replay", args=lambda i: (0.5 * i,))
def max_of_floats(w):
    return lambda a: ONES * max(a, 1.2)


@case("replay", args=lambda i: (0.1 * i,), calls=9)
def branch_on_a_float(w):
    return lambda a: ONES * a if a > 0.35 else ONES - a


@case("replay", args=lambda i: (float(i // 3),), calls=9)
def loop_count_from_a_float(w):
    def step(a):
        y = ONES
        for _ in range(int(a)):
            y = y * 2
        return y

    return step


@case("replay", args=lambda i: (1.0 + 0.5 * (i // 3),), calls=9)
def f_string(w):
    return lambda a: ONES * (2 if f"{a:.1f}" == "1.5" else 3)


@case("rerun", args=lambda i: (0.5 * i,))
def percent_formatting(w):
    return lambda a: ONES * (2 if "%.1f" % a == "1.5" else 3)  # noqa: UP031


FORM = "%.1f"


def form():
    return "%.1f"


@case("rerun", args=lambda i: (0.5 * i,))
def percent_formatting_by_a_template_elsewhere(w):
    return lambda a: ONES * (2 if FORM % a == "1.5" else 3)


@case("rerun", args=lambda i: (0.5 * i,))
def percent_formatting_by_a_template_that_is_returned(w):
    return lambda a: ONES * (2 if form() % a == "1.5" else 3)


@case("rerun", args=lambda i: (0.5 * i,))
def percent_formatting_by_a_template_that_is_made(w):
    digits = 1
    return lambda a: ONES * (2 if f"%.{digits}f" % a == "1.5" else 3)


@case("rerun", args=lambda i: (0.5 * i,))
def percent_formatting_of_what_is_in_a_tuple(w):
    def step(a):
        text = "%5.1f and %g"
        text = text % (a, a)
        return ONES * (2 if "1.5" in text else 3)

    return step


@case("replay", args=lambda i: (0.5 * i,))
def percent_formatting_on_a_path_not_taken(w):
    w.loud = False

    def step(a):
        if w.loud:
            print("%.1f" % a)  # noqa: UP031
        return ONES * (a % 1.5)

    return step


@case("replay", args=lambda i: (0.1 + i,))
def math_sqrt_of_a_float(w):
    return lambda a: ONES * math.sqrt(a)


@case("rerun", args=lambda i: (0.5 * i,))
def complex_arithmetic(w):
    return lambda a: ONES * (1j - a).real


@case("rerun", args=lambda i: (0.5 + i,), calls=6)
def type_of_a_runtime_scalar(w):
    return lambda rate: X * rate if type(rate) is float else X


@case("rerun", args=lambda i: (np.float64(0.5 + i),))
def numpy_scalar(w):
    return lambda rate: X * rate


# ---- other plain values


@case("replay", args=lambda i: (i // 3,), calls=9)
def int_argument(w):
    return lambda n: ONES * n


@case("replay", args=lambda i: (i % 2 == 0,), calls=9)
def bool_argument(w):
    return lambda flag: ONES + 1 if flag else ONES - 1


@case("replay", args=lambda i: (1 if i < 4 else True,), calls=9)
def one_against_true(w):
    return lambda n: ONES * 2 if n is True else ONES * 1


@case("replay", args=lambda i: ("add" if i < 4 else "mul",), calls=9)
def string_argument(w):
    return lambda how: X + X if how == "add" else X * X


@case("replay", args=lambda i: (Mode.TRAIN if i < 4 else Mode.TEST,), calls=9)
def enum_argument(w):
    w.t = t = Trainer()
    return lambda mode: t.step() if mode is Mode.TRAIN else t.loss(X, Y).detach()


class Mode(enum.Enum):
    TRAIN = 1
    TEST = 2


@case("replay", args=lambda i: (Keywords(scale=1.0 + i, n=i // 4),), calls=9)
def keyword_arguments(w):
    return lambda scale=1.0, *, n=0: X * scale + n


# ---- tensors


@case("replay", args=lambda i: (None if i < 4 else torch.ones(3),), calls=9)
def none_then_tensor(w):
    return lambda y: ONES * 1 if y is None else ONES + y


_shared = torch.ones(4)


@case("replay", args=lambda i: (_shared, _shared) if i > 3 else (_shared, torch.ones(4)), calls=9)
def two_arguments_become_one(w):
    def step(a, b):
        a = a.clone()
        return a.add_(b) * b

    return step


@case("replay", args=lambda i: (_shared, _shared if 3 < i < 7 else _shared.view(4)), calls=10)
def a_view_of_it_all_is_another_tensor(w):
    return lambda a, b: (a + b, a is b)


@case("replay", args=lambda i: (torch.arange(12.0)[4 * (i // 3) : 4 * (i // 3) + 4],), calls=9)
def where_a_view_starts(w):
    return lambda x: x * x.storage_offset()


# ---- batches


def batch_of(i):
    return torch.full((3, 4), 0.1 * i), torch.full((3, 3), 0.2 * i)


@case("replay", args=lambda i: ({"x": batch_of(i)[0], "y": batch_of(i)[1]},))
def dict_batches(w):
    w.t = t = Trainer()

    def step(batch):
        return t.step(batch["x"], batch["y"])

    return step


@case("replay", args=lambda i: ({"xs": [*batch_of(i)], "n": {"k": (i // 4, "a")}},), calls=9)
def nested_batches(w):
    w.t = t = Trainer()

    def step(batch):
        x, y = batch["xs"]
        return t.step(x, y) * batch["n"]["k"][0]

    return step


Batch = namedtuple("Batch", ["x", "y"])


@dataclass
class Example:
    x: torch.Tensor
    y: torch.Tensor
    weight: float = 1.0
    tags: list = field(default_factory=list)


@case("replay", args=lambda i: (Batch(*batch_of(i)),))
def namedtuple_batches(w):
    w.t = t = Trainer()
    return lambda batch: t.step(batch.x, batch.y)


@case("replay", args=lambda i: (Example(*batch_of(i), tags=["a"] * (i // 4)),), calls=9)
def dataclass_batches(w):
    w.t = t = Trainer()
    return lambda b: t.step(b.x, b.y) * b.weight + len(b.tags)


class Encoding(dict):
    def __getattr__(self, name):
        return self[name]


@case("replay", args=lambda i: (Encoding(x=batch_of(i)[0], y=batch_of(i)[1]),))
def batches_of_a_dict_subclass(w):
    w.t = t = Trainer()
    return lambda batch: t.step(batch.x, batch["y"])


@case("replay", args=lambda i: (OrderedDict(x=batch_of(i)[0], y=batch_of(i)[1]),))
def ordered_dict_batches(w):
    w.t = t = Trainer()
    return lambda batch: t.step(*batch.values())


def _keywords(i):
    x, y = batch_of(i + 1)
    found = {"a": x, "b": x * 2} if i < 4 else {"b": x, "a": x * 2}
    return (Keywords(found),)


@case("replay", args=_keywords, calls=9)
def keyword_arguments_in_another_order(w):
    return lambda **kw: torch.cat([*kw.values()]).flatten() * torch.arange(24)


@case("replay", args=lambda i: (*batch_of(i), 2.0)[: 2 + i // 4], calls=9)
def more_arguments(w):
    w.t = t = Trainer()

    def step(*args, **kwargs):
        t.weight = 1.0
        return t.step(*args[:2]) * len(args)

    return step


# ---- arguments that overlap in memory


def shifted(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A series, and the same one step later; at times the second is a copy, or a third one."""
    series = torch.arange(12.0) + i
    later = [series, series, series.clone(), series + 0][i // 2 % 4]
    return series[:-1], later[1:]


@case("replay", args=shifted, calls=16)
def inputs_and_targets_of_one_series(w):
    w.weight = weight = torch.nn.Parameter(torch.ones(11))

    def step(x, y):
        weight.grad = None
        loss = (x * weight - y).pow(2).mean()
        loss.backward()
        return loss.detach()

    return step


def viewed(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    buffer = torch.arange(12.0) + i
    return buffer.view(3, 4), [buffer[2:9], buffer.view(torch.int32)[1:8]][i // 4 % 2]


@case("replay", args=viewed, calls=12, backend="c")
def views_of_one_buffer(w):
    return lambda a, b: (a.sum(0) * 2, b * 3, a[0] + b[:4])


@case("refused: the other one changes too", says="overlaps in memory", args=shifted)
def one_of_two_that_overlap_is_written(w):
    def step(x, y):
        x.add_(1)
        return y * 2

    return step


@case("refused: the other one changes too", says="overlaps in memory", args=shifted)
def one_of_two_that_overlap_is_written_after_both_are_read(w):
    def step(x, y):
        z = x * y
        y.mul_(2)
        return z

    return step


@case("replay", args=lambda i: ((z := torch.arange(8.0) + i)[:4], z.view(torch.int32)[4:]))
def parts_of_one_buffer_that_are_apart(w):
    def step(x, y):
        x.add_(1)
        return x * y

    return step


def of_numpy(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """From the third call on the second tensor lies where the first one does, though torch knows
    nothing of it."""
    array = np.arange(12.0, dtype=np.float32) + i
    other = array if i >= 3 else array.copy()
    return torch.from_numpy(array[1:]), torch.from_numpy(other[:-1])


@case("rerun", args=lambda i: of_numpy(3 + i))
def arrays_that_overlap_are_read(w):
    return lambda x, y: (x - y).sum()


@case("refused: the other one changes too", says="overlaps in memory", args=of_numpy)
def array_that_overlaps_is_written(w):
    def step(x, y):
        x.add_(1)
        return y * 2

    return step


@case(
    "refused: the other one changes too",
    says="overlaps in memory",
    args=lambda i: ((x := torch.arange(4.0) + i), torch.from_dlpack(x if i >= 3 else x + 0)),
)
def tensor_that_is_one_by_dlpack_is_written(w):
    def step(x, y):
        x.add_(1)
        return y * 2

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.sweep(2)
def test_arguments(name):
    check(CASES[name])
