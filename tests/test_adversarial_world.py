"""Functions and containers in a step, and the world outside it: output, clocks, files, chance.

Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import sys
import threading
import time
import warnings
from collections import ChainMap, Counter, UserDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch.nn import functional

import tracejit
from support.worlds import Case, check, table
from tracejit.errors import TracejitWarning

CASES: dict[str, Case] = {}
case = table(CASES)

X = torch.linspace(-1, 2, 6)


# ---- functions


@case("replay", changes={3: lambda w: w.config.update(scale=7.0)})
def partial(w):
    w.config = config = {"scale": 2.0}

    def scaled(config, x, *, shift):
        return x * config["scale"] + shift

    helper = functools.partial(scaled, config, shift=1.0)
    return lambda: helper(X)


@case("replay")
def cached_function(w):
    calls = w.calls = []

    @functools.lru_cache
    def factor(n):
        calls.append(n)
        return n + len(calls)

    return lambda: X * factor(3)


@case(
    "replay",
    changes={3: lambda w: vars(w.cfg).pop("scale") and setattr(w.cfg, "base", 5.0)},
    calls=9,
)
def cached_property(w):
    class Config:
        base = 2.0

        @functools.cached_property
        def scale(self):
            return self.base * 2

    w.cfg = cfg = Config()
    return lambda: X * cfg.scale


@case("replay")
def generator_inside(w):
    def pieces(x):
        for i in range(3):
            yield x * i

    return lambda: sum(pieces(X))


@case("replay", changes={3: lambda w: w.factors.append(5.0)})
def closures_made_in_a_loop(w):
    w.factors = factors = [1.0, 2.0]
    helpers = [lambda x, i=i: x * factors[i] + len(factors) for i in range(2)]
    return lambda: sum(h(X) for h in helpers)


@case("replay", changes={3: lambda w: w.state.update(on=False)})
def context_manager(w):
    w.state = state = {"on": True}

    @contextlib.contextmanager
    def scaled(x):
        yield x * 2 if state["on"] else x

    def step():
        with scaled(X) as y, torch.no_grad():
            return y + 1

    return step


@case("replay", changes={3: lambda w: w.state.update(fail=False)})
def exception_caught(w):
    w.state = state = {"fail": True}

    def risky(x):
        if state["fail"]:
            raise ValueError("no")
        return x * 2

    def step():
        try:
            return risky(X)
        except ValueError as error:
            return X + len(str(error))
        finally:
            state.get("fail")

    return step


@case("refused: eager goes on with what has no rule", says="eigvals")
def refusal_swallowed_by_the_step(w):
    def step():
        try:
            return X * torch.linalg.eigvals(X.T @ X).abs()
        except Exception:
            return X

    return step


@case("refused: eager goes on with what has no rule", says="fft")
def refusal_suppressed_by_the_step(w):
    def step():
        factor = 2.0
        with contextlib.suppress(RuntimeError):
            factor = torch.fft.fft(X).abs().sum()
        return X * factor

    return step


def _decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) * wrapper.gain

    wrapper.gain = 2.0
    return wrapper


@case("replay", changes={3: lambda w: setattr(w.helper, "gain", 5.0)})
def decorated_helper(w):
    @_decorated
    @torch.no_grad()
    def helper(x):
        return x + 1

    w.helper = helper
    return lambda: helper(X)


@case(
    "replay",
    changes={
        3: lambda w: setattr(w.helper, "__defaults__", (5.0,)),
        6: lambda w: setattr(w.helper, "__kwdefaults__", {"shift": 4.0}),
    },
    calls=10,
)
def defaults(w):
    def helper(x, scale=2.0, *, shift=1.0):
        return x * scale + shift

    w.helper = helper
    return lambda: helper(X)


# ---- containers


@case("replay", changes={3: lambda w: w.queue.append(9.0)}, calls=9)
def deque_of_numbers(w):
    w.queue = queue = deque([1.0, 2.0], maxlen=2)
    return lambda: X * queue[0] + sum(queue)


@case("rerun")
def deque_of_losses(w):
    w.queue = queue = deque(maxlen=2)

    def step():
        loss = (X * len(queue)).sum()
        queue.append(loss)
        return loss

    return step


@case("replay", changes={3: lambda w: w.options.add("square")})
def set_of_strings(w):
    w.options = options = {"double"}
    return lambda: (X**2 if "square" in options else X) * (2 if "double" in options else 1)


@case("replay", changes={3: lambda w: w.table.__setitem__("z", 9)}, calls=9)
def default_dict(w):
    w.table = table = defaultdict(int, a=1)
    return lambda: X * table["z"] + table["a"]


@case("replay", changes={3: lambda w: w.table.move_to_end("a")}, calls=9)
def order_of_a_dict(w):
    from collections import OrderedDict

    w.table = table = OrderedDict(a=1.0, b=2.0)

    def step():
        y = X
        for value in table.values():
            y = (y + value) * value
        return y

    return step


class Registry(dict):
    def scale(self):
        return sum(self.values())


class Names(list):
    pass


@case(
    "replay",
    changes={3: lambda w: w.registry.update(c=9.0), 5: lambda w: w.names.append("x")},
    calls=9,
)
def subclasses_of_containers(w):
    w.registry, w.names = registry, names = Registry(a=1.0, b=2.0), Names(["u"])
    return lambda: X * registry.scale() + len(names)


@case("replay", changes={3: lambda w: w.user.update(a=9.0)}, calls=9)
def user_dict(w):
    w.user = user = UserDict(a=2.0)
    return lambda: X * user["a"]


@case("replay", changes={3: lambda w: w.over.update(a=9.0)}, calls=9)
def chain_map(w):
    w.over = over = {}
    chain = ChainMap(over, {"a": 2.0})
    return lambda: X * chain["a"]


@case("replay", changes={3: lambda w: w.counts.update("aab")}, calls=9)
def counter(w):
    w.counts = counts = Counter("ab")
    return lambda: X * counts["a"]


@case("rerun", changes={3: lambda w: w.array.__setitem__(0, 9.0)})
def numpy_array(w):
    w.array = array = np.array([2.0, 3.0])
    return lambda: X * float(array[0])


@case("replay", changes={3: lambda w: w.table.__setitem__(1, 9.0)})
def keys_that_are_no_strings(w):
    w.table = table = {1: 2.0, False: 3.0, (1, "a"): 4.0, None: 5.0}
    return lambda: X * table[1] + table[(1, "a")]


@case("replay", changes={3: lambda w: w.pair.__setitem__(0, (5.0, ("a", 2)))})
def nested_tuples(w):
    w.pair = pair = [(1.0, ("a", 1))]
    return lambda: X * pair[0][0] + pair[0][1][1]


# ---- the world outside


@case("rerun")
def printing(w):
    def step():
        y = X * 2
        print("step", tuple(y.shape))
        return y

    return step


@case("rerun")
def writing_to_standard_output(w):
    def step():
        sys.stdout.write("x")
        return X * 2

    return step


@case("rerun")
def clock(w):
    return lambda: X * (time.time() > 0)


@case("rerun", changes={3: lambda w: os.environ.update(TRACEJIT_TEST_SCALE="5")})
def environment(w):
    os.environ.pop("TRACEJIT_TEST_SCALE", None)
    return lambda: X * float(os.environ.get("TRACEJIT_TEST_SCALE", "2"))


@case("rerun")
def files(w):
    def step():
        with open(__file__) as file:
            return X * len(file.read(10))

    return step


@case("replay")
def random_of_python(w):
    return lambda: X * random.random()


@case("rerun")
def choice_of_python(w):
    return lambda: X * random.choice([1, 2, 3])


@case("rerun")
def random_of_an_object(w):
    own = random.Random(0)
    return lambda: X * own.randint(0, 9)


@case("rerun")
def random_of_a_subclass(w):
    class Own(random.Random):
        pass

    own = Own(0)
    return lambda: X * own.random()


@case("rerun")
def random_of_numpy(w):
    own = np.random.default_rng(0)
    return lambda: X * float(own.random())


@case("rerun")
def thread_local(w):
    local = threading.local()
    local.scale = 2.0

    def step():
        local.scale += 1.0
        return X * local.scale

    return step


@case("rerun", changes={3: lambda w: w.set(5.0)})
def frame_of_the_caller(w):
    scale = 2.0

    def inner():
        return X * sys._getframe(1).f_locals["scale"]

    def outer(scale):
        return inner()

    def step():
        return outer(w.now)

    w.now, w.set = scale, lambda value: setattr(w, "now", value)
    return step


# ---- torch's own functions, replaced between calls


def halved(params: list, *args: object, **kwargs: object) -> None:
    for p in params:
        p.mul_(0.5)


PATCHES = {  # what is replaced, by what
    "of a module": (functional, "gelu", lambda x, **options: x * 7),
    "of a loss": (functional, "mse_loss", lambda x, y, **options: (x * y).sum()),
    "of C": (torch, "tanh", lambda x: x * 5),
    "inherited method": (torch.Tensor, "exp", lambda x: x * 3),
    "method": (torch.Tensor, "norm", lambda x: x.abs().sum()),
    "operator": (torch.Tensor, "__add__", lambda x, y: torch.sub(x, y)),
    "method of a module": (torch.nn.Linear, "forward", lambda self, x: x - self.weight[0]),
    "of an optimizer": (sys.modules["torch.optim.sgd"], "sgd", halved),
    "helper": (torch.nn.utils.clip_grad, "_get_total_norm", lambda *a, **k: torch.tensor(5.0)),
}


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.sweep(2)
def test_a_replaced_function_of_torch_is_noticed(name, monkeypatch):
    """And the original one, when it is back."""
    owner, attribute, mine = PATCHES[name]

    def make():
        torch.manual_seed(0)
        layers = torch.nn.Linear(6, 6), torch.nn.GELU(), torch.nn.Tanh(), torch.nn.Linear(6, 6)
        model, loss_of = torch.nn.Sequential(*layers), torch.nn.MSELoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            optimizer.zero_grad()
            y = model(X)
            loss = loss_of(y, X * y) + y.exp().norm()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        return step

    eager, step = make(), tracejit.compile(make(), backend="numpy")
    losses = []
    for call in range(12):
        if call == 4:
            assert step.stats.replays
            monkeypatch.setattr(owner, attribute, mine)
        if call == 8:
            monkeypatch.undo()
        losses.append(eager())
        torch.testing.assert_close(step(), losses[-1])
    unpatched = make()
    assert not torch.equal(torch.stack([unpatched() for _ in losses]), torch.stack(losses))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.sweep(0.17)
def test_world(name):
    check(CASES[name])


@pytest.mark.parametrize("name", ["printing", "clock", "files", "choice_of_python"])
def test_the_reason_of_a_rerun_is_one_warning_that_names_the_line(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(CASES[name])
    mine = [str(c.message) for c in caught if issubclass(c.category, TracejitWarning)]
    assert len(mine) == 1
    assert re.search(
        r"reruns its Python on every call.*test_adversarial_world\.py:\d+: it", mine[0]
    )
