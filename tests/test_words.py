"""Metadata of many tensors read at once from memory: each change is seen, as without it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import tracejit
from tracejit.capture.effects import commit
from tracejit.capture.proof import many, places
from tracejit.capture.python import counters, memory, words
from tracejit.capture.python.counters import Bump, Containers, Elements
from tracejit.capture.python.words import Group


@pytest.fixture(autouse=True, params=["C", "numpy"])
def few(monkeypatch, request) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(memory, "native", lambda: None)
    elif memory.native() is None:
        pytest.skip("needs a C compiler")
    for module in (many, places, commit):
        monkeypatch.setattr(module, "MANY", 4)


class _Lazy(TorchFunctionMode):
    """Nobody gets a tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None


def test_this_python_and_torch_are_known():
    """Else replays are slower, and this says so."""
    assert words.known() and counters.numbered() and counters.counted()


@pytest.mark.parametrize(
    "under",
    [
        torch.no_grad,
        lambda: torch.device("meta"),
        torch.inference_mode,
        lambda: _default_dtype(torch.float64),
        lambda: FakeTensorMode(),
        lambda: _Lazy(),
    ],
    ids=["no_grad", "device", "inference", "dtype", "dispatch", "function"],
)
@pytest.mark.sweep(0.34)
def test_it_does_not_matter_when_that_is_found_out(under):
    with under():
        assert words.known.__wrapped__() and counters.counted.__wrapped__()


def test_a_bit_that_says_nothing():
    """torch leaves it as its allocator gave it, so equal tensors may differ in it."""
    group, x = Group.of([torch.zeros(3)]), torch.zeros(3)
    assert group is not None
    flags = ctypes.c_uint64.from_address(x._cdata + 8 * words._FLAGS[0])
    for _ in range(2):
        flags.value ^= 1 << 63
        assert group.addresses((x,)) == [x.data_ptr()]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class World:
    """Weights under Adam, and a step that updates them: five are 25 tensors, 5 of them counters."""

    def __init__(self, count: int = 5) -> None:
        torch.manual_seed(0)
        self.weights = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(count)]
        self.optimizer = torch.optim.Adam(self.weights, foreach=True)
        self.gradients()
        self.kept: list = []
        optimizer = self.optimizer

        def step() -> None:
            optimizer.step()

        self.step = step

    def gradients(self) -> None:
        for w in self.weights:
            w.grad = torch.randn(4, 4)

    @property
    def state(self) -> dict:
        return self.optimizer.state[self.weights[2]]


class Weight(torch.nn.Parameter):
    pass


def put(name: str, value: Callable[[torch.Tensor], object]) -> Callable[[World], None]:
    return lambda world: setattr(world.weights[2], name, value(world.weights[2]))


def entry(change: Callable[[torch.Tensor], object]) -> Callable[[World], None]:
    """Another tensor in the optimizer's state."""

    def act(world: World) -> None:
        before = world.state["exp_avg"]
        world.kept.append(before)  # so that no other has its memory
        world.state["exp_avg"] = change(before)

    return act


def swap(world: World) -> None:
    torch.utils.swap_tensors(world.weights[1], torch.nn.Parameter(torch.randn(4, 4).t()))


def replaced_parameter(world: World) -> None:
    new = torch.nn.Parameter(torch.randn(4, 4))
    new.grad = torch.randn(4, 4)
    world.optimizer.param_groups[0]["params"][2] = new


CHANGES: dict[str, Callable[[World], object]] = {
    "nothing": lambda world: None,
    "values": lambda world: world.weights[2].data.add_(1),
    "new gradients": World.gradients,
    "a gradient of another layout": put("grad", lambda w: torch.randn(4, 4).t()),
    "a gradient that is a view": put("grad", lambda w: torch.randn(5, 4)[1:]),
    "no gradient": put("grad", lambda w: None),
    "data elsewhere": put("data", lambda w: w.data.clone()),
    "data turned in place": put("data", lambda w: w.data.t()),
    "data of another dtype": lambda world: world.weights[2].data.set_(
        torch.zeros(4, 4).untyped_storage(), 0, (4, 2), (2, 1)
    ),
    "data of more axes": put("data", lambda w: w.data.view(4, 2, 2)),
    "another name of the data turned": lambda world: world.weights[2].data.t_(),
    "state turned": lambda world: world.state["exp_avg"].t_(),
    "state with an axis more": lambda world: world.state["exp_avg_sq"].unsqueeze_(0),
    "state in other memory": lambda world: world.state["exp_avg"].set_(torch.ones(4, 4)),
    "state that is smaller": lambda world: world.state["exp_avg"].resize_(2, 4),
    "state that requires grad": lambda world: world.state["exp_avg"].requires_grad_(),
    "state with a node": lambda world: world.state["exp_avg"].mul_(world.weights[0]),
    "state that is negated": entry(lambda x: torch._neg_view(x)),
    "other state": entry(lambda x: x.clone()),
    "other state, transposed": entry(lambda x: x.clone().t()),
    "other state, of doubles": entry(lambda x: x.double()),
    "other state, elsewhere": entry(lambda x: x.to("meta")),
    "other state, of a class": entry(lambda x: Weight(x, requires_grad=False)),
    "less state": lambda world: world.state.pop("exp_avg_sq"),
    "more state": lambda world: world.state.update(more=1),
    "state replaced": lambda world: world.optimizer.state.update(
        {world.weights[2]: {**world.state}}
    ),
    "no state": lambda world: world.optimizer.state.pop(world.weights[2]),
    "no more grad": lambda world: world.weights[2].requires_grad_(False),
    "a hook": lambda world: world.weights[2].register_hook(lambda g: g),
    "a hook behind": lambda world: world.weights[2].register_post_accumulate_grad_hook(print),
    "a name": put("note", lambda w: 1),
    "a class": put("__class__", lambda w: Weight),
    "swapped": swap,
    "a parameter": replaced_parameter,
    "one tensor twice": lambda world: world.state.update(exp_avg=world.state["exp_avg_sq"]),
}


def new_gradient(change: Callable[[torch.Tensor], object]) -> Callable[[World], None]:
    """Another gradient, most likely in the memory of the old one, which is let go."""

    def act(world: World) -> None:
        weight = world.weights[2]
        weight.grad = None
        weight.grad = torch.randn(4, 4)
        change(weight.grad)

    return act


def exchanged(world: World) -> None:
    one, other = world.weights[1:3]
    one.grad, other.grad = other.grad, one.grad


CHANGES |= {
    "a gradient in another's memory": new_gradient(lambda g: None),
    "such a gradient, turned": new_gradient(lambda g: g.t_()),
    "such a gradient, smaller": new_gradient(lambda g: g.resize_(2, 4)),
    "such a gradient with a name": new_gradient(lambda g: setattr(g, "note", 1)),
    "such a gradient, of a class": new_gradient(lambda g: setattr(g, "__class__", Weight)),
    "a gradient turned": lambda world: world.weights[2].grad.t_(),
    "a gradient in other memory": lambda world: world.weights[2].grad.set_(torch.ones(4, 4)),
    "a gradient with a name": lambda world: setattr(world.weights[2].grad, "note", 1),
    "a gradient that requires grad": lambda world: world.weights[2].grad.requires_grad_(),
    "two gradients exchanged": exchanged,
    "a gradient of two weights": lambda world: setattr(
        world.weights[1], "grad", world.weights[2].grad
    ),
    "a counter": lambda world: world.state["step"].add_(5),
    "another counter": lambda world: world.state.update(step=torch.tensor(7.0)),
    "a counter of doubles": lambda world: world.state.update(step=torch.tensor(7.0).double()),
    "a counter that is not a number": lambda world: world.state["step"].fill_(float("nan")),
    "another rate": lambda world: world.optimizer.param_groups[0].update(lr=0.5),
    "no gradients": lambda world: world.optimizer.zero_grad(),
}


def knows_again(replay: object) -> bool:
    """Whether a guard fetches no tensor if all are as they were."""
    last = replay.guard.__globals__["group"]._last
    return last is not None and last.items is not None


def told(change: Callable[[World], object], twice: bool) -> tuple:
    """What the guard of an armed step says after a change, and where it finds the tensors."""
    world = World()
    step = tracejit.compile(world.step, backend="numpy")
    for _ in range(8):
        step()
    replay = step._replays[-1]
    assert step.stats.replays >= 5
    if words.known():
        assert knows_again(replay) == (memory.native() is not None)
    change(world)
    for _ in range(1 + twice):
        found = replay.guard((), {})
    if isinstance(found, str):
        return found, None
    reals, numbers, addresses, _ = found
    assert addresses == [t.data_ptr() for t in reals]
    now = world.weights + [world.state[k] for k in ("exp_avg", "exp_avg_sq")]
    now += [w.grad for w in world.weights]
    assert {id(t) for t in now} <= {id(t) for t in reals}
    return "", numbers


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.sweep(16)
def test_guards_say_the_same_with_words_and_without(monkeypatch, name, twice):
    """And so they do when they are asked again."""
    found = told(CHANGES[name], twice)
    monkeypatch.setattr(words, "known", lambda: False)
    monkeypatch.setattr(counters, "numbered", lambda: False)
    plain = told(CHANGES[name], twice)
    assert (found[0] == "") == (plain[0] == ""), (found, plain)
    assert found[1] == plain[1] or name == "a counter that is not a number"
    assert [*map(str, found[1] or ())] == [*map(str, plain[1] or ())]


def test_words_are_what_guards_go_by(monkeypatch):
    """The lines for each tensor do not run while nothing changes; new gradients are no change."""
    world = World()
    step = tracejit.compile(world.step, backend="numpy")
    for _ in range(5):
        step()
    learns = Group.learn
    monkeypatch.setattr(Group, "learn", lambda self, tensors: pytest.fail("asked one by one"))
    replays = step.stats.replays
    for _ in range(4):
        world.gradients()
        step()
    assert step.stats.replays == replays + 4
    monkeypatch.setattr(Group, "learn", learns)


def test_what_stays_is_not_fetched(monkeypatch):
    """Nor is what a call gets held when it is over: not the gradients, and no count goes wrong."""
    world, seen = World(), []
    step = tracejit.compile(world.step, backend="numpy")
    for _ in range(8):
        step()
    replay = step._replays[-1]
    if memory.native() is None:
        assert not knows_again(replay)
        return
    tensors = [*world.weights, *(x for s in world.optimizer.state.values() for x in s.values())]
    tensors += [w.grad for w in world.weights]
    before = [*map(sys.getrefcount, tensors)]
    with monkeypatch.context() as patched:
        patched.setattr(Group, "addresses", lambda *given: pytest.fail("fetched"))
        for _ in range(5):
            step()
            seen.append(replay.guard((), {})[0])
    assert all(len(x) == 25 for x in seen) and {id(t) for t in tensors} == {*map(id, seen[0])} | {
        id(s["step"]) for s in world.optimizer.state.values()
    }
    counts = [*map(sys.getrefcount, tensors)]
    assert counts == [n + len(seen) for n in before]
    seen.clear()
    assert [*map(sys.getrefcount, tensors)] == before
    del tensors
    gc.collect()
    gone = [weakref.ref(w.grad) for w in world.weights]
    world.optimizer.zero_grad()
    assert not any(ref() is not None for ref in gone)
    world.gradients()
    replays = step.stats.replays
    step()
    assert step.stats.replays == replays + 1 and knows_again(replay) is False


@pytest.mark.sweep(1)
def test_frames_do_not_grow_with_the_number_of_tensors():
    """CPython asks the system for memory in each call of a function that has a thousand locals."""

    def sizes(count: int) -> list[int]:
        world = World(count)
        step = tracejit.compile(world.step, backend="numpy")
        for _ in range(5):
            step()
        replay = step._replays[-1]
        run = replay.run.function
        codes = [f.__code__ for f in (replay.guard, run, run.__globals__["together"])]
        return [code.co_nlocals + code.co_stacksize for code in codes]

    few, many_ = sizes(9), sizes(40)
    assert all(b <= a + 2 for a, b in zip(few, many_, strict=True)), (few, many_)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.sweep(1)
def test_training_in_lockstep(monkeypatch, known):
    """With changes between the calls."""
    if not known:
        monkeypatch.setattr(words, "known", lambda: False)
        for name in ("numbered", "counted"):
            monkeypatch.setattr(counters, name, lambda: False)
    eager, ours = World(), World()
    step = tracejit.compile(ours.step, backend="numpy")
    names = ["nothing", "values", "new gradients", "other state", "data elsewhere", "no gradient"]
    names += ["state in other memory", "a gradient of another layout", "data turned in place"]
    names += ["a counter", "another counter", "another rate"]
    for call in range(40):
        for world in (eager, ours):
            torch.manual_seed(call)
            if call > 4:
                CHANGES[names[call % len(names)]](world)
            if call % 4 == 0:
                world.gradients()
        eager.step()
        step()
        for a, b in zip(ours.weights, eager.weights, strict=True):
            torch.testing.assert_close(a, b)
        for name in ("exp_avg", "step"):
            torch.testing.assert_close(ours.state[name], eager.state[name])
    assert step.stats.replays >= 12, step.explain_retraces()


def test_what_words_cannot_tell_is_left_to_torch():
    x = torch.zeros(3, 4)
    assert Group.of([x, torch.zeros(5)]) is not None
    view, node = torch.zeros(4, 4)[1:], torch.zeros(2, requires_grad=True) * 2
    deep, empty = torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(0, 3)
    hooked = torch.zeros(2, requires_grad=True)
    hooked.register_hook(lambda g: g)
    noted = torch.zeros(2)
    noted.note = 1
    for other in (view, node, deep, empty, hooked, noted, Weight(torch.zeros(2))):
        assert Group.of([x, other]) is None


def test_attributes_that_are_set_later_are_seen():
    """Into a dict that was there already, or that was not."""
    for touch in (True, False):
        x, y = torch.zeros(3, 4), torch.zeros(3, 4)
        group = Group.of([x])
        if touch:
            assert not y.__dict__
        assert group.addresses((y,)) == [y.data_ptr()]
        y.note = 1
        assert group.addresses((y,)) is None
        x.note = 1
        assert group.addresses((x,)) is None


def test_tensors_without_attributes_get_no_dict_for_them():
    """Each would be looked into in each call."""
    world = World()
    step = tracejit.compile(world.step, backend="numpy")  # a trace that is refused is undone
    for _ in range(5):
        step()
    assert step.stats.replays >= 2
    tensors = [*world.weights, *(w.grad for w in world.weights)]
    of = np.array([*map(id, tensors)])
    assert not memory.at(of, (words._DICT,)).any()
    tensors[3].note = 1
    assert memory.at(of, (words._DICT, words._VALUES)).any()
    assert words.attributes(tensors[3]) == {"note": 1} and words.attributes(tensors[4]) == {}


def test_data_that_is_shared_until_it_is_written_is_seen():
    x = torch.zeros(3, 4)
    group = Group.of([x])
    assert group.addresses((x,)) == [x.data_ptr()]
    other = torch._lazy_clone(x)
    assert group.addresses((x,)) is None and other.sum() == 0


def test_memory_that_moves_is_seen():
    x = torch.zeros(3, 4)
    group = Group.of([x])
    for _ in range(3):
        assert group.addresses((x,)) == group.addresses((x,)) == [x.data_ptr()]
        x.untyped_storage().resize_(1 << 20)
        x.untyped_storage().resize_(1 << 24)
    assert group.addresses((x,)) == [x.data_ptr()]


def test_dicts_have_numbers():
    first, second = {"a": 1}, {"b": 2}
    dicts = Containers.of([first, second])
    before = dicts.now()
    assert dicts.now() == before
    second["b"] = 3
    assert dicts.now() != before
    second["b"] = 2
    assert dicts.now() != before


def test_what_lists_hold_is_seen():
    first, second, items = [torch.zeros(2)], [], [object() for _ in range(9)]
    lists = Containers.of([], [first, second])
    changes = [
        lambda: second.append(items[0]),
        lambda: second.extend(items),
        lambda: second.reverse(),
        lambda: second.__setitem__(3, items[0]),
        lambda: second.pop(),
        lambda: first.clear(),
        lambda: second.clear(),
        lambda: first.append(items[1]),
    ]
    for change in changes:
        before = lists.now()
        assert lists.now() == before
        change()
        assert lists.now() != before


def test_a_schedule_does_not_ask_of_all_dicts():
    """The group in which it sets the rate is asked each time, and alone."""
    world = World()
    step = tracejit.compile(world.step, backend="numpy")
    for _ in range(5):
        step()
    dicts = step._replays[-1].guard.__globals__["containers"]
    step()
    kept, replays = dicts.kept, step.stats.replays
    for call in range(4):
        world.optimizer.param_groups[0]["lr"] = 0.1 * 0.9**call
        step()
        assert dicts.kept is kept
    assert step.stats.replays == replays + 4
    world.state["note"] = 1
    step()
    assert dicts.kept is kept and step.stats.replays == replays + 4  # which is another key


# ---- what is written


def versions(tensors: tuple) -> list[int]:
    return [t._version for t in tensors]


def test_writes_are_counted(monkeypatch):
    """In memory, as torch counts them, and not in tensors that are not written."""
    monkeypatch.setattr(torch._C, "_increment_version", lambda tensors: pytest.fail("by torch"))
    weight = torch.nn.Parameter(torch.zeros(3))
    tensors = (torch.zeros(2), weight, torch.zeros(4)[1:], torch.zeros(1), torch.zeros(5) * 2)
    before, bump = versions(tensors), Bump([0, 1, 2, 4])
    for n in range(1, 4):
        bump(tensors)
        assert versions(tensors) == [v + n * (i != 3) for i, v in enumerate(before)]
    saved = torch.zeros(3, requires_grad=True)
    y = (weight * saved).sum()
    Bump([0])((weight,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_what_cannot_be_counted_in_memory_is_left_to_torch(monkeypatch):
    x, y = torch.zeros(2), torch.zeros(3)
    Bump([0, 1])([x, y])  # a list is no tuple
    assert versions((x, y)) == [1, 1]
    with monkeypatch.context() as patched:
        patched.setattr(counters, "counted", lambda: False)
        Bump([0, 1])((x, y))
    assert versions((x, y)) == [2, 2]
    with torch.inference_mode():
        z = torch.zeros(2)
    Bump([0, 1])((x, z))  # which has no count
    assert versions((x, y)) == [3, 2]


def test_a_step_counts_what_it_writes():
    eager, ours = World(), World()
    step = tracejit.compile(ours.step, backend="numpy")
    for call in range(8):
        before = [versions((*w.weights, *w.state.values())) for w in (eager, ours)]
        eager.step()
        step()
        after = [versions((*w.weights, *w.state.values())) for w in (eager, ours)]
        if call:  # there was a state before
            changed = [
                [a < b for a, b in zip(*x, strict=True)] for x in zip(before, after, strict=True)
            ]
            assert changed[0] == changed[1] == [True] * 8
    assert step.stats.replays >= 4


def test_counters_of_several_groups():
    """Which stand apart among the numbers of a step, and may part."""

    def make() -> tuple:
        torch.manual_seed(1)
        weights = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(11)]
        for w in weights:
            w.grad = torch.randn(3, 2)
        groups = [{"params": weights[:5]}, {"params": weights[5:], "lr": 0.3, "betas": (0.5, 0.6)}]
        optimizer = torch.optim.Adam(groups, foreach=True)
        return weights, optimizer, lambda: optimizer.step() and None

    (theirs, their_optimizer, eager), (mine, optimizer, step) = make(), make()
    ours = tracejit.compile(step, backend="numpy")
    for call in range(12):
        for o, weights in ((their_optimizer, theirs), (optimizer, mine)):
            if call in (6, 8):  # one is ahead of the others, and they are all alike again
                o.state[weights[7]]["step"] += 3 if call == 6 else -3
        eager()
        ours()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)
            assert optimizer.state[a]["step"] == their_optimizer.state[b]["step"]
    assert ours.stats.replays >= 8
    assert ".read()" in ours.guards[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elements_are_read_and_set(dtype):
    tensors = [torch.tensor(float(i), dtype=dtype) for i in range(5)]
    kind = ctypes.c_float if dtype is torch.float32 else ctypes.c_double
    found = Elements(np.array([t.data_ptr() for t in tensors]), kind)
    assert found.read() == [0.0, 1.0, 2.0, 3.0, 4.0] and type(found.read()[0]) is float
    for number in (0.1, -0.0, float("inf"), float("nan"), 1e300):
        found.fill(number)
        rounded = kind(number).value
        assert {*map(repr, found.read())} == {repr(rounded)} == {repr(t.item()) for t in tensors}
        assert len({*map(id, found.read())}) == 1  # one object for all
    tensors[3].fill_(-0.0)
    tensors[4].fill_(0.0)
    assert [*map(repr, found.read()[3:])] == ["-0.0", "0.0"]


def test_elements_that_are_not_aligned():
    memory = torch.zeros(21, dtype=torch.uint8)
    at = memory.data_ptr() + 1
    found = Elements(np.array([at, at + 8]), ctypes.c_float)
    found.fill(2.5)
    ctypes.c_float.from_address(at + 8).value = -1.0
    assert found.read() == [2.5, -1.0]
    assert ctypes.c_float.from_address(at).value == 2.5 and memory[0] == 0
