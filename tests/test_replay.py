"""Never stale: everything that may change between calls of a step, checked against eager.

Each case is a step and a list of changes made between calls, run over an eager copy and a compiled
copy of the same state. The table says in which mode the case ends.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import tracejit

GLOBAL_FLOAT = 0.5
GLOBAL_INT = 2
GLOBAL_TENSOR = torch.ones(3)
GLOBAL_LIST = [1.0, 2.0]


def global_helper(x):
    return x * GLOBAL_INT


NAMES = ("GLOBAL_FLOAT", "GLOBAL_INT", "GLOBAL_TENSOR", "GLOBAL_LIST", "global_helper")


class World:
    """One copy of a case: its step, called `steps` times with changes in between."""

    def __init__(self, build, compiled: bool):
        torch.manual_seed(0)
        self.state = SimpleNamespace()
        step = build(self.state)
        self.step = tracejit.compile(step) if compiled else step


def both(build, changes=(), calls=6, args=lambda i: ()):
    """Run a case in eager and compiled; returns the compiled step."""
    changes = dict(changes)
    saved = {name: globals()[name] for name in NAMES}
    outputs = []
    for compiled in (False, True):
        world = World(build, compiled)
        seen = []
        for i in range(calls):
            if i in changes:
                changes[i](world.state)
            returned = world.step(*args(i))
            seen.append(_flat(returned) + _flat(list(vars(world.state).values())))
        outputs.append(seen)
        globals().update(saved)
        globals().pop("len", None)
        torch.set_default_dtype(torch.float32)
    for i, (a, b) in enumerate(zip(*outputs, strict=True)):
        assert len(a) == len(b), i
        for x, y in zip(a, b, strict=True):
            if isinstance(x, torch.Tensor):
                torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6, equal_nan=True, msg=str(i))
            else:
                assert x == y or (x != x and y != y), (i, x, y)
    return world.step


def _flat(x) -> list:
    if isinstance(x, torch.Tensor):
        found = [x.detach().clone()]
        if x.is_leaf:
            found.append(None if x.grad is None else x.grad.detach().clone())
        return found
    if isinstance(x, (list, tuple)):
        return [item for part in x for item in _flat(part)]
    if isinstance(x, dict):
        return [item for part in x.values() for item in _flat(part)]
    return [x] if isinstance(x, (int, float, str, type(None))) else []


CASES = {}


def case(mode, *, changes=(), calls=6, args=lambda i: ()):
    def register(build):
        CASES[build.__name__] = (build, mode, changes, calls, args)
        return build

    return register


def set_global(name, value):
    return lambda state: globals().__setitem__(name, value)


@case("replay", changes={3: lambda s: s.set(0.25), 4: lambda s: s.set(-1.0)})
def closure_float(s):
    lr, w = 0.1, torch.ones(3)
    s.w = w

    def set_lr(value):
        nonlocal lr
        lr = value

    s.set = set_lr

    def step():
        w.sub_(lr * w)
        return w.sum()

    return step


@case("replay", changes={3: set_global("GLOBAL_FLOAT", 4.0)})
def global_float(s):
    x = torch.ones(3)
    return lambda: x * GLOBAL_FLOAT


@case("replay", changes={3: set_global("GLOBAL_FLOAT", 4)})
def global_float_becomes_int(s):
    x = torch.ones(3, dtype=torch.int64)
    return lambda: x * GLOBAL_FLOAT


@case("replay", changes={3: set_global("GLOBAL_INT", 5), 5: set_global("GLOBAL_INT", 2)}, calls=8)
def global_int(s):
    x = torch.ones(3)
    return lambda: x * GLOBAL_INT


@case("replay", changes={3: set_global("GLOBAL_INT", 7)}, calls=8)
def global_int_read_by_a_helper(s):
    x = torch.ones(3)
    return lambda: global_helper(x)


@case("replay", changes={3: set_global("global_helper", lambda x: x - 100)}, calls=8)
def helper_replaced(s):
    x = torch.ones(3)
    return lambda: global_helper(x)


@case("replay", changes={3: set_global("GLOBAL_TENSOR", torch.full((3,), 9.0))})
def global_tensor_replaced(s):
    return lambda: GLOBAL_TENSOR * 2


@case("replay", changes={3: set_global("GLOBAL_TENSOR", torch.full((2, 3), 9.0))}, calls=8)
def global_tensor_of_another_shape(s):
    return lambda: GLOBAL_TENSOR * 2


@case("replay", changes={3: lambda s: GLOBAL_LIST.__setitem__(0, 50.0)})
def global_list_element(s):
    GLOBAL_LIST[0] = 1.0
    x = torch.ones(3)
    return lambda: x * GLOBAL_LIST[0]


@case("replay", args=lambda i: (0.1 * i,))
def float_argument(s):
    x = torch.ones(3)
    return lambda a: x * a + a**2


@case("replay", args=lambda i: ((0.1 * i, 2.0),))
def float_in_a_tuple(s):
    x = torch.ones(3)
    return lambda pair: x * pair[0] + pair[1]


@case("replay", args=lambda i: (i // 3,), calls=9)
def int_argument(s):
    x = torch.ones(3)
    return lambda n: x * n


@case("replay", args=lambda i: (i % 2 == 0,), calls=9)
def bool_argument(s):
    x = torch.ones(3)
    return lambda flag: x + 1 if flag else x - 1


@case("replay", args=lambda i: (1 if i < 4 else True,), calls=9)
def one_against_true(s):
    x = torch.ones(3)
    return lambda n: x * 2 if n is True else x


@case("replay", args=lambda i: (0.0 if i < 4 else -0.0,), calls=8)
def zero_against_negative_zero(s):
    x = torch.ones(3)
    return lambda a: 1.0 / (x * a)


@case("replay", args=lambda i: ("add" if i < 4 else "mul",), calls=9)
def string_argument(s):
    x = torch.full((3,), 3.0)
    return lambda how: x + x if how == "add" else x * x


@case("replay", args=lambda i: (None if i < 4 else torch.ones(3),), calls=9)
def none_then_tensor(s):
    x = torch.ones(3)
    return lambda y: x if y is None else x + y


@case("replay", args=lambda i: (0.1 * i,), calls=9)
def branch_on_a_float(s):
    x = torch.ones(3)
    return lambda a: x * a if a > 0.35 else x - a


@case("replay", args=lambda i: (float(i // 3),), calls=9)
def loop_count_from_a_float(s):
    x = torch.ones(3)

    def step(a):
        y = x
        for _ in range(int(a)):
            y = y * 2
        return y

    return step


@case("rerun", args=lambda i: (0.1 + i,))
def math_sqrt_of_a_float(s):
    x = torch.ones(3)
    return lambda a: x * math.sqrt(a)


@case("replay", args=lambda i: (0.5 * i,))
def max_of_floats(s):
    x = torch.ones(3)
    return lambda a: x * max(a, 1.2)


@case("replay", args=lambda i: (0.5 * i,))
def float_returned(s):
    x = torch.ones(3)
    return lambda a: (x * a, a * 2, "name", 3)


@case("rerun")
def counter_attribute(s):
    x, holder = torch.ones(3), SimpleNamespace(n=0)

    def step():
        holder.n += 1
        return x * holder.n

    return step


@case("rerun")
def counter_nonlocal(s):
    x, n = torch.ones(3), 0

    def step():
        nonlocal n
        n += 1
        return x * n

    return step


@case("rerun")
def list_append(s):
    x, kept = torch.ones(3), []
    s.kept = kept

    def step():
        kept.append((x * len(kept)).sum())
        return x * 2

    return step


@case("replay", changes={3: lambda s: setattr(s.config, "scale", 5.0)})
def attribute_of_an_object(s):
    x, config = torch.ones(3), SimpleNamespace(scale=2.0)
    s.config = config
    return lambda: x * config.scale


@case("replay", changes={3: lambda s: s.config.update(scale=5.0)})
def dict_item(s):
    x, config = torch.ones(3), {"scale": 2.0}
    s.config = config
    return lambda: x * config["scale"]


@case("replay", changes={4: lambda s: s.w.grad.mul_(3.0)})
def gradient_edited_by_the_user(s):
    s.w = w = torch.ones(3, requires_grad=True)

    def step():
        (w * w).sum().backward()

    return step


@case("replay", changes={4: lambda s: setattr(s.w, "grad", None)}, calls=9)
def gradient_cleared_by_the_user(s):
    s.w = w = torch.ones(3, requires_grad=True)

    def step():
        (w * w).sum().backward()

    return step


@case("replay", changes={4: lambda s: setattr(s.w, "grad", torch.full((3,), 7.0))}, calls=9)
def gradient_replaced_by_the_user(s):
    s.w = w = torch.ones(3, requires_grad=True)

    def step():
        (w * w).sum().backward()

    return step


@case("replay", changes={4: lambda s: s.w.requires_grad_(False)}, calls=9)
def parameter_frozen(s):
    s.w = w = torch.ones(3, requires_grad=True)
    s.v = v = torch.full((3,), 2.0, requires_grad=True)

    def step():
        loss = (w * v).sum()
        loss.backward()
        return loss

    return step


@case("replay", changes={4: lambda s: setattr(s.w, "data", torch.full((3,), 5.0))})
def data_replaced(s):
    s.w = w = torch.ones(3)

    def step():
        w.add_(1.0)
        return w * 2

    return step


@case("replay", changes={4: lambda s: setattr(s.w, "data", torch.full((2, 2), 5.0))}, calls=9)
def data_of_another_shape(s):
    s.w = w = torch.ones(3)
    return lambda: w * 2


@case("replay", changes={4: lambda s: s.w.data.mul_(10.0)})
def data_edited(s):
    s.w = w = torch.ones(3)
    return lambda: w * 2


@case("replay", args=lambda i: (torch.ones(2 + i // 4),), calls=12)
def odd_last_batch(s):
    return lambda x: (x * 2).sum()


_shared = torch.ones(4)


@case("replay", args=lambda i: (_shared, _shared) if i > 3 else (_shared, torch.ones(4)), calls=9)
def two_arguments_become_one(s):
    def step(a, b):
        a = a.clone()
        return a.add_(b) * b

    return step


@case("replay", changes={4: lambda s: torch.set_default_dtype(torch.float64)}, calls=8)
def default_dtype_changed(s):
    torch.set_default_dtype(torch.float32)
    x = torch.ones(3, dtype=torch.int64)
    return lambda: x / 2


def _defaulted(x, scale=2.0, *, shift=1):
    return x * scale + shift


@case("replay", changes={4: lambda s: setattr(_defaulted, "__defaults__", (5.0,))}, calls=8)
def defaults_of_a_helper(s):
    _defaulted.__defaults__ = (2.0,)
    x = torch.ones(3)
    return lambda: _defaulted(x)


@case("rerun")
def imports_inside(s):
    x = torch.ones(3)

    def step():
        import math as m

        return x * m.pi

    return step


@case("rerun")
def random_python(s):
    import random

    random.seed(0)
    x = torch.ones(3)
    return lambda: x * random.random()


@case("rerun")
def iterator_advanced(s):
    x, numbers = torch.ones(3), iter(range(100))
    return lambda: x * next(numbers)


@case("rerun")
def environment(s):
    import os

    x = torch.ones(3)
    return lambda: x * len(os.environ)


@case("replay", changes={3: lambda s: setattr(s.x, "scale", 5.0)})
def attribute_of_a_tensor(s):
    s.x = x = torch.ones(3)
    x.scale = 2.0
    return lambda: x * x.scale


@case("replay", changes={3: set_global("len", lambda x: 40)}, calls=8)
def builtin_shadowed(s):
    globals().pop("len", None)
    x = torch.ones(3)
    return lambda: x * len((1, 2))


@case("rerun", args=lambda i: (0.5 * i,))
def percent_formatting(s):
    x = torch.ones(3)
    return lambda a: x * (2 if "%.1f" % a == "1.5" else 3)  # noqa: UP031


@case("rerun", args=lambda i: (0.5 * i,))
def complex_arithmetic(s):
    x = torch.ones(3)
    return lambda a: x * (1j - a).real


@case("replay", args=lambda i: (1.0 + 0.5 * (i // 3),), calls=9)
def f_string(s):
    x = torch.ones(3)
    return lambda a: x * (2 if f"{a:.1f}" == "1.5" else 3)


@case("replay")
def local_containers(s):
    x = torch.ones(3)

    def step():
        parts = [x * i for i in range(3)]
        parts.append(x)
        total = {"sum": sum(parts)}
        return total

    return step


@case("replay")
def nested_function_and_comprehension(s):
    x, k = torch.ones(3), 3

    def step():
        def inner(y):
            return y * k

        return [inner(x + i) for i in range(k)]

    return step


@case("replay")
def returned_views_and_aliases(s):
    x = torch.arange(6.0)

    def step():
        y = x * 2
        return y, y.view(2, 3), y[::2], x, x.view(3, 2).t()

    return step


@case("replay")
def no_grad_block(s):
    s.w = w = torch.ones(3, requires_grad=True)

    def step():
        with torch.no_grad():
            w.mul_(0.5)
        return w.detach().sum()

    return step


@pytest.mark.parametrize("name", CASES)
def test_equal_to_eager_whatever_changes(name):
    build, mode, changes, calls, args = CASES[name]
    try:
        step = both(build, changes, calls, args)
    finally:
        torch.set_default_dtype(torch.float32)
    assert step.explain_mode().startswith(mode), step.explain_mode()
    if mode == "replay":
        assert step.stats.replays > 0
    else:
        assert step.stats.replays == 0


def test_a_changed_float_never_retraces():
    x = torch.ones(3)
    step = tracejit.compile(lambda lr: x * lr)
    for i in range(50):
        assert torch.allclose(step(0.01 * i), x * (0.01 * i))
    assert step.stats.traces == 2 and step.stats.compiles == 1


def test_grad_mode_around_the_call_is_guarded():
    w = torch.ones(3, requires_grad=True)
    step = tracejit.compile(lambda: w * 2)
    for _ in range(3):
        assert step().requires_grad
    with torch.no_grad():
        for _ in range(3):
            assert not step().requires_grad
    assert step().requires_grad


def test_a_hook_added_later_is_refused():
    w = torch.ones(3, requires_grad=True)

    @tracejit.compile
    def step():
        (w * 2).sum().backward()

    for _ in range(4):
        step()
    w.register_hook(lambda g: g * 100)
    with pytest.raises(tracejit.errors.UnsupportedOperation, match="hook"):
        step()


def test_autocast_around_the_call_is_refused():
    x = torch.ones(3, 3)
    step = tracejit.compile(lambda: x @ x)
    for _ in range(3):
        step()
    with torch.autocast("cpu"), pytest.raises(tracejit.errors.UnsupportedOperation):
        step()
    assert step().dtype is torch.float32


def test_random_depth_is_traced_each_time_and_plans_are_found_again():
    import random

    random.seed(0)
    x, w = torch.ones(2, 2), torch.full((2, 2), 0.5)

    def step():
        h = x
        for _ in range(random.randint(1, 3)):
            h = (h @ w).clamp(min=0)
        return h.sum()

    compiled = tracejit.compile(step)
    state = random.getstate()
    ours = [compiled().item() for _ in range(20)]
    random.setstate(state)
    assert ours == [step().item() for _ in range(20)]
    assert compiled.stats.compiles == 3 and compiled.stats.replays == 0
    assert compiled.stats.reruns == 17


@pytest.mark.parametrize("mode", ["rerun", "auto"])
def test_a_leaf_made_inside_is_returned_with_its_gradient(mode):
    x = torch.randn(2)

    @tracejit.compile(mode=mode, backend="numpy")
    def step(scale: float) -> torch.Tensor:
        made = torch.zeros(2, requires_grad=True)
        ((made * x).sum() * scale).backward()
        return made

    for i in range(6):
        made = step(i + 1.0)
        assert made.is_leaf and made.requires_grad
        torch.testing.assert_close(made.grad, x * (i + 1))
    assert (step.stats.replays > 0) == (mode == "auto"), step.explain_mode()


def test_two_tensors_of_one_memory_are_not_one_tensor():
    """A replay made for a tensor and a view of it all is not for the same tensor twice."""

    def step(a: torch.Tensor, b: torch.Tensor) -> tuple:
        return a + b, a is b

    compiled = tracejit.compile(step, backend="numpy")
    x = torch.arange(4.0)
    for _ in range(4):
        assert compiled(x, x.view(4))[1] is False
    assert compiled.stats.replays
    assert compiled(x, x)[1] is True
    assert compiled(x, x.view(4))[1] is False
