"""Python state that a step assigns: counters, averages, memories and records, in every kind of
place. Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import OrderedDict, defaultdict, deque, namedtuple
from types import SimpleNamespace

import pytest
import torch

import tracejit
from support.oracle import call
from support.worlds import Case, check, replaying, setting, table
from tracejit.capture.trace.scalars import TracedFloat, TracedInt

CASES: dict[str, Case] = {}
case = table(CASES)

X = torch.linspace(-1, 2, 6)
CALLS = 11


state = replaying(case, CALLS, lambda i: (X + i * 0.1,))

TOTAL, RATE = 0, 1.0


@pytest.fixture(autouse=True)
def restored():
    yield
    restore()


def restore():
    globals().update(TOTAL=0, RATE=1.0)


class Slotted:
    __slots__ = ("n",)


class Trainer:
    """What people count in."""

    count = 0

    def __init__(self):
        self.step, self.rate, self.seen = 0, 1.0, False


# ---- counters


@state(changes={7: setting(n=100)})
def attribute(w):
    w.n = 0

    def step(x):
        w.n += 1
        return x * (1 - 0.9**w.n)

    return step


@state(changes={8: lambda w: w.trainer.__dict__.update(step=3)})
def attribute_of_an_object(w):
    w.trainer = Trainer()

    def step(x):
        w.trainer.step += 1
        w.trainer.rate *= 0.9
        return x * w.trainer.rate / w.trainer.step

    return step


@state(changes={6: lambda w: w.state.update(step=0), 8: lambda w: w.state.update(step=2.5)})
def item_of_a_dict(w):
    w.state = {"step": 0}

    def step(x):
        w.state["step"] += 1
        return x * math.sqrt(w.state["step"])

    return step


@state(changes={6: lambda w: w.state.pop("step"), 8: lambda w: w.state.update(more=1)})
def item_of_a_defaultdict(w):
    w.state = defaultdict(int)

    def step(x):
        w.state["step"] += 1
        return x * w.state["step"]

    return step


@state()
def item_of_an_ordered_dict(w):
    w.state = OrderedDict(a=1, b=0.5)

    def step(x):
        w.state["a"], w.state["b"] = w.state["a"] * 2, w.state["b"] + 1
        return x * w.state["a"] - w.state["b"]

    return step


@state(changes={7: lambda w: w.counts.__setitem__(0, 50), 9: lambda w: w.counts.append(1)})
def item_of_a_list(w):
    w.counts = [0, 1.5]

    def step(x):
        w.counts[0] += 1
        w.counts[1] *= 0.5
        return x / w.counts[0] + w.counts[1]

    return step


@state()
def variable_of_a_closure(w):
    n, rate = 0, 1.0

    def step(x):
        nonlocal n, rate
        n += 1
        rate *= 0.99
        return x * n * rate

    return step


@state(changes={7: lambda w: globals().update(TOTAL=40)})
def global_names(w):
    def step(x):
        global TOTAL, RATE
        TOTAL += 1
        RATE = RATE * 0.5 + 0.1
        return x * TOTAL + RATE

    return step


def _tick():
    global TOTAL
    TOTAL += 1
    return TOTAL


@state()
def counted_by_a_helper(w):
    return lambda x: x * _tick()


@state()
def attribute_of_the_function(w):
    def step(x):
        step.calls += 1
        return x * step.calls

    step.calls = 0
    w.function = step
    return step


@state()
def attribute_of_the_compiled_step(w):
    w.inner = tracejit.compile(lambda x: x * 2)
    w.inner.calls = 0

    def step(x):
        w.inner.calls += 1
        return w.inner(x) * w.inner.calls

    return step


@state()
def counter_that_is_returned(w):
    w.n = 0

    def step(x):
        w.n += 1
        return x.sum(), w.n, w.n / 2, {"step": w.n}

    return step


@state(changes={8: setting(n=0)})
def counter_that_decides(w):
    w.n = 0

    def step(x):
        w.n += 1
        return x * 2 if w.n % 2 == 0 else x - 1

    return step


@state(calls=16)
def every_fourth_call(w):
    w.n, w.p = 0, torch.ones(6)

    def step(x):
        w.n += 1
        if w.n % 4 == 0:
            w.p.mul_(0.5)
        return x * w.p

    return step


@state()
def warm_up(w):
    w.n = 0

    def step(x):
        w.n += 1
        return x * min(1.0, w.n / 5) * 0.5 * (1 + math.cos(math.pi * min(w.n, 9) / 9))

    return step


@state()
def powers_of_integers(w):
    w.n = 0

    def step(x):
        w.n += 1
        return x * (2**w.n) - (w.n**2) // 3 + w.n**-1 + (-w.n) % 4

    return step


@state()
def counter_as_an_index(w):
    w.n, w.table = 0, torch.arange(20.0)

    def step(x):
        w.n += 1
        return x * w.table[w.n]

    return step


@state()
def counter_in_a_text(w):
    w.n, w.text = 0, ""

    def step(x):
        w.n += 1
        w.text = f"step {w.n}"
        return x * 2

    return step


@state(calls=16)
def counter_as_a_number_of_turns(w):
    w.n = 0

    def step(x):
        w.n = (w.n + 1) % 3
        for _ in range(w.n):
            x = x * 2
        return x

    return step


@state(calls=14)
def counter_that_starts_again(w):
    w.n = 0

    def step(x):
        w.n += 1
        if w.n == 3:
            w.n = 0
        return x + w.n

    return step


@state(changes={8: lambda w: setattr(w.kind, "count", 20)})
def counter_of_a_class(w):
    class Counted:
        count = 0

    w.kind = Counted

    def step(x):
        Counted.count += 1
        return x * Counted.count

    return step


@state()
def counter_of_a_class_by_an_object(w):
    class Model:
        calls, total, last = 0, 0.0, None

        def __call__(self, x):
            type(self).calls += 1
            self.__class__.total += x.sum().item()
            Model.last = x * self.calls
            return self.last + Model.total

    w.model = Model()
    w.read = lambda: (Model.calls, Model.total, Model.last)
    return lambda x: (w.model(x), w.read())


@state()
def counter_of_a_class_that_an_object_takes_over(w):
    class Model:
        calls = 0

    w.model = Model()

    def step(x):
        w.model.calls += 1
        return x * w.model.calls + Model.calls

    return step


@state(changes={7: lambda w: setattr(w.slotted, "n", 9), 9: lambda w: delattr(w.slotted, "last")})
def tensors_and_flags_in_slots(w):
    class State:
        __slots__ = ("n", "last", "phase", "__hidden")

        def __init__(self):
            self.n, self.last, self.phase, self.__hidden = 0, torch.zeros(6), "warm", 1.5

        def advance(self, x):
            self.n += 1
            self.__hidden = self.__hidden * 0.5 + 1
            self.phase = {"warm": "hot", "hot": "warm"}[self.phase]
            last = getattr(self, "last", None)
            self.last = x if last is None else last * 0.5 + x
            return self.last * self.__hidden / self.n

    w.slotted = State()

    def step(x):
        y = w.slotted.advance(x)
        return y * 2 if w.slotted.phase == "hot" else y

    return step


@dataclasses.dataclass(slots=True)
class Progress:
    n: int = 0
    last: object = None


@state(changes={7: lambda w: setattr(w, "b", w.a), 10: lambda w: setattr(w, "b", Progress(3))})
def two_with_slots_that_become_one(w):
    w.a, w.b = Progress(), Progress(10)

    def step(x):
        w.a.n += 1
        w.b.n += 1
        w.a.last = x * w.b.n
        return w.a.last * w.a.n

    return step


@state(args=lambda i: (X, Progress(i)))
def slots_of_an_argument(w):
    def step(x, progress):
        progress.n += 1
        progress.last = x * progress.n
        return progress.last + 1

    return step


@state("rerun")
def slot_that_is_a_size(w):
    w.slotted, w.table = Slotted(), torch.arange(20.0)
    w.slotted.n = 0

    def step(x):
        w.slotted.n += 1
        return w.table[: w.slotted.n].sum() * x

    return step


@state(calls=18, changes={14: setting(n=2)})
def turn_among_a_few(w):
    w.n, w.names, w.seen = 0, ["one", "two", "three"], [0, 0, 0]

    def step(x):
        name = w.names[w.n % 3]
        w.seen[w.n % 3] += 1
        w.n += 1
        return x * {"one": 1, "two": 2, "three": 3}[name], f"{name}{w.n % 3}"

    return step


@state("replay", calls=28)
def a_queue_that_fills_up(w):
    w.queue = deque(maxlen=6)

    def step(x):
        w.queue.append(x)
        return sum(w.queue)

    return step


@state(changes={8: lambda w: setattr(w.slotted, "n", 20)})
def counter_in_a_slot(w):
    w.slotted = slotted = Slotted()
    slotted.n = 0

    def step(x):
        slotted.n += 1
        return x * slotted.n

    return step


@state()
def float_that_becomes_an_integer(w):
    w.total = 0

    def step(x):
        w.total += 0.5
        return x * w.total

    return step


@state("replay", changes={6: setting(n=True), 8: setting(n=None), 9: setting(n=2)})
def counter_of_another_type(w):
    w.n = 0

    def step(x):
        w.n = 1 if w.n is None else w.n + 1
        return x * w.n

    return step


@state()
def a_flag_that_flips(w):
    w.flag = False

    def step(x):
        w.flag = not w.flag
        return x + 1 if w.flag else x - 1

    return step


@state(changes={7: setting(phase="cool")})
def a_phase_by_name(w):
    w.phase = "warm"

    def step(x):
        w.phase = {"warm": "hot", "hot": "cool", "cool": "warm"}[w.phase]
        return x * {"warm": 1, "hot": 2, "cool": 3}[w.phase]

    return step


@state()
def set_once(w):
    w.ready = False

    def step(x):
        if not w.ready:
            w.ready, w.scale = True, 2.0
        return x * w.scale

    return step


# ---- numbers that are computed


@state()
def best_so_far(w):
    w.best = math.inf

    def step(x):
        loss = (x - 0.5).pow(2).mean()
        if loss.item() < w.best:
            w.best = loss.item()
        return loss, w.best

    return step


@state(changes={7: setting(total=0.0)})
def running_mean(w):
    w.total, w.count = 0.0, 0

    def step(x):
        loss = x.pow(2).mean()
        w.total += loss.item()
        w.count += x.shape[0]
        return loss, w.total / w.count

    return step


@state()
def accuracy(w):
    w.correct, w.count = 0, 0

    def step(x):
        w.correct += (x > 0.3).sum().item()
        w.count += x.numel()
        return x * 2, w.correct / w.count, w.correct

    return step


@state()
def moving_average_of_a_number(w):
    w.average = None

    def step(x):
        loss = x.abs().sum().item()
        w.average = loss if w.average is None else 0.9 * w.average + 0.1 * loss
        return x / w.average

    return step


@state(calls=24)
def patience(w):
    w.best, w.bad, w.rate = math.inf, 0, 0.1

    def step(x):
        loss = (x.sum() - 5).abs().item()
        if loss < w.best - 0.5:
            w.best, w.bad = loss, 0
        else:
            w.bad += 1
        if w.bad > 1:
            w.rate, w.bad = w.rate * 0.5, 0
        return x * w.rate

    return step


# ---- tensors


@state(changes={6: lambda w: setattr(w, "h", torch.ones(6)), 8: lambda w: w.h.mul_(3)})
def hidden_state(w):
    w.h = torch.zeros(6)

    def step(x):
        w.h = torch.tanh(x + 0.5 * w.h)
        return w.h.sum()

    return step


@state(changes={7: setting(h=None)})
def hidden_state_made_when_missing(w):
    w.h = None

    def step(x):
        h = torch.zeros_like(x) if w.h is None else w.h
        w.h = torch.tanh(x + 0.5 * h)
        return w.h * 2

    return step


@state(changes={7: lambda w: w.shadow.update(a=torch.full((6,), 9.0))})
def averages_in_a_dict(w):
    w.shadow = {"a": torch.zeros(6), "b": torch.zeros(())}

    def step(x):
        w.shadow["a"] = 0.9 * w.shadow["a"] + 0.1 * x
        w.shadow["b"] = w.shadow["b"] + w.shadow["a"].sum()
        return w.shadow["b"]

    return step


@state()
def averages_of_parameters_by_name(w):
    w.model = torch.nn.Linear(6, 2)
    with torch.no_grad():
        for i, p in enumerate(w.model.parameters()):
            p.copy_(torch.arange(p.numel()).view_as(p) * 0.1 + i)
    w.shadow = {name: p.detach().clone() for name, p in w.model.named_parameters()}

    def step(x):
        loss = w.model(x).pow(2).sum()
        loss.backward()
        with torch.no_grad():
            for name, p in w.model.named_parameters():
                p -= 0.01 * p.grad
                p.grad = None
                w.shadow[name] = 0.9 * w.shadow[name] + 0.1 * p
        return loss.detach()

    return step


@state()
def averages_by_parameter(w):
    w.p = torch.ones(6, requires_grad=True)
    w.momentum = {w.p: torch.zeros(6)}

    def step(x):
        (w.p * x).sum().backward()
        with torch.no_grad():
            w.momentum[w.p] = 0.9 * w.momentum[w.p] + w.p.grad
            w.p -= 0.1 * w.momentum[w.p]
            w.p.grad = None
        return w.p.sum()

    return step


@state()
def items_of_a_list(w):
    w.memory = [torch.zeros(6), torch.ones(6)]

    def step(x):
        w.memory[0], w.memory[1] = w.memory[1], x * 2 + w.memory[0]
        return w.memory[0] - w.memory[1]

    return step


@state(changes={8: lambda w: w.memory.clear()})
def the_last_three(w):
    w.memory = deque(maxlen=3)

    def step(x):
        w.memory.append(x * 2)
        return torch.stack(list(w.memory)).sum(0)

    return step


@state()
def first_in_first_out(w):
    w.memory = [torch.zeros(6), torch.ones(6)]

    def step(x):
        w.memory.pop(0)
        w.memory.append(x.exp())
        return w.memory[0] + w.memory[1]

    return step


@state()
def buffer_of_a_module(w):
    class Meter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.count = self.count + 1
            self.mean = self.mean + (x - self.mean) / self.count
            return self.mean

    w.meter = Meter()
    return lambda x: w.meter(x)


@state()
def tensor_of_a_closure(w):
    h = torch.zeros(6)

    def step(x):
        nonlocal h
        h = h * 0.5 + x
        return h.sum()

    return step


@state()
def one_tensor_in_two_places(w):
    w.a = w.b = torch.zeros(6)

    def step(x):
        w.a = w.b = w.a + x
        return w.b * 2

    return step


@state()
def a_result_that_is_kept(w):
    w.last = torch.zeros(())

    def step(x):
        loss = (x - w.last).pow(2).mean()
        w.last = loss
        return loss

    return step


@state()
def a_view_that_is_kept(w):
    w.row = torch.zeros(3)

    def step(x):
        table = (x * 2).view(2, 3)
        w.row = table[1] + w.row
        return table

    return step


@state()
def integers_that_are_kept(w):
    w.best = torch.zeros(2, dtype=torch.int64)

    def step(x):
        w.best = torch.stack([x.argmax(), (x * w.best.sum()).argmin()])
        return w.best

    return step


# ---- records


@state(changes={6: lambda w: w.losses.clear(), 8: lambda w: setattr(w, "losses", [])})
def list_of_losses(w):
    w.losses = []

    def step(x):
        loss = x.pow(2).mean()
        w.losses.append(loss.item())
        return loss

    return step


@state()
def list_of_tensors(w):
    w.outputs = []

    def step(x):
        y = x.exp()
        w.outputs.append(y.detach())
        return y * 2

    return step


@state()
def lists_in_a_dict(w):
    w.log = {"loss": [], "count": [], "step": []}
    w.n = 0

    def step(x):
        w.n += 1
        w.log["loss"].append(x.sum().item())
        w.log["count"].append((x > 0).sum().item())
        w.log["step"].append(w.n)
        return x * 2

    return step


@state()
def list_of_a_closure(w):
    w.seen = seen = []

    def step(x):
        seen.append((x.sum().item(), "sum"))
        return x + 1

    return step


@state()
def list_whose_length_is_read(w):
    w.losses = []

    def step(x):
        w.losses.append(x.sum().item())
        return x * len(w.losses)

    return step


@state("rerun")
def list_under_two_names(w):
    w.losses = w.others = []

    def step(x):
        w.losses.append(1)
        w.others.append(x.sum().item())
        return x * 2

    return step


@state("rerun")
def list_that_is_passed_on(w):
    w.losses = []

    def add(items, item):
        items.append(item)

    def step(x):
        add(w.losses, x.sum().item())
        return x * 2

    return step


# ---- arguments and results


@state(args=lambda i: ({"x": X + i, "n": i},))
def a_new_dict_for_each_call(w):
    def step(batch):
        batch["x"] = batch["x"] * 2
        batch["n"] += 1
        return batch["x"] * batch["n"]

    return step


@state(args=lambda i: ())
def a_dict_that_is_passed_each_time(w):
    w.state = {"step": 0, "m": torch.zeros(6)}

    def update(state, x):
        state["step"] += 1
        state["m"] = state["m"] * 0.9 + x
        return state["m"] / state["step"]

    return lambda: update(w.state, X)


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    weight: float = 1.0


@state(args=lambda i: (Batch(X + i, 0.5 * i),))
def a_dataclass_for_each_call(w):
    return lambda batch: batch.x * batch.weight


Moments = namedtuple("Moments", "mean square")


@state()
def a_named_tuple_that_is_kept(w):
    w.moments = Moments(torch.zeros(6), torch.zeros(6))

    def step(x):
        w.moments = Moments(w.moments.mean * 0.9 + x, w.moments.square * 0.9 + x * x)
        return w.moments.mean / (w.moments.square + 1).sqrt()

    return step


# ---- lists and dicts that are made anew


@state(changes={7: lambda w: w.stats.update(more=1), 9: lambda w: setattr(w, "stats", None)})
def a_new_dict_each_time(w):
    w.stats = {}

    def step(x):
        loss = x.pow(2).mean()
        w.stats = {"loss": loss.item(), "output": loss.detach(), "parts": [x.sum(), 1]}
        return loss

    return step


@state(changes={8: lambda w: w.cache.append(torch.ones(6))})
def a_new_list_that_is_read(w):
    w.cache = [torch.zeros(6)]

    def step(x):
        y = x + sum(w.cache)
        w.cache = [y * 0.5]
        return y

    return step


@state()
def a_cache_that_is_emptied(w):
    w.cache = defaultdict(list)

    def step(x):
        w.cache["x"].append(x)
        y = sum(w.cache["x"]) * 2
        w.cache = defaultdict(list)
        return y

    return step


@state(calls=14)
def a_scaler_of_gradients(w):
    w.p = torch.ones(6, requires_grad=True)
    w.optimizer = torch.optim.SGD([w.p], lr=0.1)
    w.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)

    def step(x):
        w.optimizer.zero_grad()
        loss = (w.p * x).pow(2).mean()
        w.scaler.scale(loss).backward()
        w.scaler.step(w.optimizer)
        w.scaler.update()
        return loss.detach()

    return step


# ---- two places that become one


@state(changes={7: lambda w: setattr(w, "b", w.a)})
def two_dicts_that_become_one(w):
    w.a, w.b = {"n": 0}, {"n": 10}

    def step(x):
        w.a["n"] += 1
        w.b["n"] += 1
        return x * w.a["n"] + w.b["n"]

    return step


@state(changes={7: lambda w: setattr(w, "b", w.a), 9: lambda w: setattr(w, "b", {"n": 3})})
def a_dict_that_is_read_becomes_the_one_that_is_assigned(w):
    w.a, w.b = {"n": 0}, {"n": 10}

    def step(x):
        w.a["n"] += 1
        return x * w.b["n"]

    return step


@state(changes={7: lambda w: setattr(w, "b", w.a)})
def two_records_that_become_one(w):
    w.a, w.b = [], []

    def step(x):
        w.a.append(x.sum().item())
        w.b.append(1)
        return x * 2

    return step


# ---- schedulers


def _scheduled(w, scheduler):
    w.n, w.p = 0, torch.ones(6, requires_grad=True)
    w.optimizer = torch.optim.SGD([w.p], lr=0.1)
    w.scheduler = scheduler(w.optimizer)

    def step(x):
        w.optimizer.zero_grad()
        (w.p * x).sum().backward()
        w.optimizer.step()
        w.n += 1
        w.scheduler.step()
        return w.p * w.n

    return step


@state()
def counter_beside_a_scheduler(w):
    return _scheduled(w, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9))


@state("rerun")
def counter_that_a_scheduler_reads(w):
    return _scheduled(w, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**w.n))


# ---- optimizers of one's own


class Own:
    """Adam as people write it."""

    def __init__(self, parameters):
        self.parameters, self.step_count = list(parameters), 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self):
        self.step_count += 1
        for i, p in enumerate(self.parameters):
            self.m[i] = 0.9 * self.m[i] + 0.1 * p.grad
            self.v[i] = 0.99 * self.v[i] + 0.01 * p.grad**2
            m = self.m[i] / (1 - 0.9**self.step_count)
            v = self.v[i] / (1 - 0.99**self.step_count)
            p -= 0.05 * m / (v.sqrt() + 1e-8)
            p.grad = None


@state(changes={7: lambda w: setattr(w.optimizer, "step_count", 0)})
def adam_with_a_counter(w):
    w.p, w.q = torch.ones(6, requires_grad=True), torch.ones((), requires_grad=True)
    w.optimizer = Own([w.p, w.q])

    def step(x):
        loss = (w.p * x + w.q).pow(2).mean()
        loss.backward()
        w.optimizer.step()
        return loss.detach()

    return step


class Lazy(torch.optim.Optimizer):
    """An optimizer whose state is made in its first step, with a plain counter."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["m"] = 0, torch.zeros_like(p)
                state["step"] += 1
                state["m"].lerp_(p.grad, 0.1)
                p.add_(state["m"].sign(), alpha=-group["lr"] / state["step"] ** 0.5)


@state(calls=13)
def lion_with_a_counter(w):
    w.p = torch.ones(6, requires_grad=True)
    w.optimizer = Lazy([w.p])

    def step(x):
        w.optimizer.zero_grad()
        loss = (w.p * x).pow(2).mean()
        loss.backward()
        w.optimizer.step()
        return loss.detach()

    return step


@state(calls=20)
def accumulation_by_a_counter(w):
    w.p, w.n = torch.ones(6, requires_grad=True), 0
    w.optimizer = torch.optim.SGD([w.p], lr=0.1, momentum=0.9)

    def step(x):
        loss = (w.p * x).pow(2).mean()
        (loss / 2).backward()
        w.n += 1
        if w.n % 2 == 0:
            w.optimizer.step()
            w.optimizer.zero_grad()
        return loss.detach()

    return step


@state()
def polynomial_rate(w):
    w.p, w.n = torch.ones(6, requires_grad=True), 0
    w.optimizer = torch.optim.SGD([w.p], lr=0.1)

    def step(x):
        for group in w.optimizer.param_groups:
            group["lr"] = 0.1 * (1 - w.n / 100) ** 0.9
        w.n += 1
        w.optimizer.zero_grad()
        (w.p * x).pow(2).mean().backward()
        w.optimizer.step()
        return w.p.sum()

    return step


# ---- the step's own generators


@state("rerun")
def numbers_of_an_iterator(w):
    numbers = itertools.count()
    return lambda x: x * next(numbers)


# ---- failures


def _fails(w):
    w.fail = True


@state()
def a_counter_beside_an_error_that_is_caught(w):
    w.n = 0

    def step(x):
        w.n += 1
        try:
            if w.n % 3 == 0:
                raise ValueError
        except ValueError:
            return x * 0
        return x * w.n

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(3)
def test_state(name):
    check(CASES[name], restore)


def test_an_error_leaves_variables_as_they_were():
    w = SimpleNamespace(n=0, h=torch.zeros(3), log=[], fail=False)

    @tracejit.compile(on_unsupported="raise")
    def step(x):
        w.n += 1
        w.h = w.h + x
        w.log.append(x.sum().item())
        if w.fail:
            raise ValueError("no")
        return w.h * w.n

    for _ in range(8):
        step(torch.ones(3))
    assert step.stats.replays
    before, h, length = w.n, w.h, len(w.log)
    w.fail = True
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            step(torch.ones(3))
        assert (w.n, len(w.log)) == (before, length) and w.h is h and type(w.n) is int
    w.fail = False
    step(torch.ones(3))
    assert w.n == before + 1 and torch.equal(w.h, torch.full((3,), 9.0))


def test_python_has_plain_numbers_after_every_call():
    w = SimpleNamespace(n=0, total=0.0, seen=[], by_step={}, kinds=set(), pair=None, queue=deque())
    w.pairs, w.named, w.slotted = [], {}, Slotted()

    def step(x):
        w.n += 1
        w.total += x.sum().item()
        w.seen.append(w.n)
        w.queue.append(x.sum().item())
        w.by_step[w.n] = w.total
        w.kinds.add(w.n % 2)
        w.pairs.append((w.n, x.sum().item()))
        w.named["last"] = (1, (Moments(w.n, None), "x"))
        w.slotted.n = w.n
        w.late = (x > 0).sum().item()
        return x * len(w.seen)

    compiled = tracejit.compile(step)
    for i in range(4):
        compiled(torch.ones(3) * i)
        everything = [*vars(w).values(), *w.seen, *w.by_step, *w.by_step.values(), *w.kinds]
        everything += [*w.queue, *itertools.chain(*w.pairs), w.named["last"][1][0][0], w.slotted.n]
        assert not any(type(x) in (TracedFloat, TracedInt) for x in everything), i


def test_numbers_that_a_step_keeps_each_time_are_plain_integers_at_last():
    kept = []

    @tracejit.compile
    def step(x):
        kept.append((x > 0).sum().item())
        return x * len(kept)

    for i in range(12):
        step(torch.arange(5.0) - i)
    assert kept == [4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0] or kept == [
        max(0, 4 - i) for i in range(12)
    ]
    assert {type(n) for n in kept} == {int}


def test_one_call_gives_plain_numbers():
    assert call(lambda x: [round(x), {"n": round(x) * 2}], 2.5) == [2, {"n": 4}]
