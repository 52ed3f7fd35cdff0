"""What a step cannot compile runs eagerly: as eager alone, from the state before the trace."""

from __future__ import annotations

import gc
import io
import itertools
import os
import random
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import tracejit
from support.worlds import Trainer, X, Y, picture, same
from tracejit import fallback
from tracejit.capture.python.snapshot import Known, Snapshot
from tracejit.errors import CannotFallBack, ShapeError, TracejitWarning, UnsupportedOperation

STEPS: dict = {}


def unsupported(x: torch.Tensor) -> torch.Tensor:
    """A function without a rule, whose result is a number again."""
    return torch.fft.fft(x.detach()).abs().sum() + x.sum()


def step_of(make):
    """A function that fills a namespace and returns a step of one number."""
    STEPS[make.__name__] = make
    return make


@step_of
def sparse(w):
    w.p = nn.Parameter(torch.ones(4, 2))
    return lambda n: (X.to_sparse() @ w.p).sum() * n


@step_of
def counter_of_an_object(w):
    w.n = 0

    def step(n):
        w.n += 1
        return unsupported(X * w.n)

    return step


@step_of
def list_append(w):
    w.kept = [0.0]

    def step(n):
        w.kept.append(X * n)
        return unsupported(w.kept[-1] * len(w.kept))

    return step


@step_of
def dict_entry(w):
    w.kept = {"a": 1}

    def step(n):
        w.kept[n] = X[0] * n
        w.kept["a"] += 1
        del w.kept[n]
        w.kept[f"at {n}"] = n
        return unsupported(X * w.kept["a"])

    return step


@step_of
def containers(w):
    w.recent, w.seen = deque([1, 2], maxlen=2), {1}
    w.ordered, w.by = OrderedDict(a=1, b=2), defaultdict(list)
    w.count, w.raw, w.numbers = Counter("a"), bytearray(b"ab"), np.zeros(3)

    def step(n):
        w.recent.append(X * n)
        w.seen.add(n)
        w.ordered.move_to_end("a")
        w.ordered[n] = len(w.ordered)
        w.by[n % 2].append(n)
        w.count[n] += 1
        w.raw.append(n)
        w.numbers[n % 3] += n
        return unsupported(X * len(w.by[n % 2]) * float(w.numbers.sum()))

    return step


@step_of
def nonlocal_variable(w):
    n_calls = 0

    def step(n):
        nonlocal n_calls
        n_calls += 1
        w.calls = n_calls
        return unsupported(X * n_calls)

    return step


@step_of
def global_variable(w):
    w.mine = CALLS_OF[id(w)] = 0

    def step(n):
        global LATEST
        CALLS_OF[id(w)] += 1
        LATEST = w.mine = CALLS_OF[id(w)]
        return unsupported(X * LATEST)

    return step


CALLS_OF: dict[int, int] = {}
LATEST = 0


@step_of
def attribute_of_a_function_and_a_class(w):
    class Mine:
        calls = 0
        __slots__ = ("n",)

    w.mine = Mine()

    def step(n):
        Mine.calls += 1
        w.mine.n = getattr(w.mine, "n", 0) + 1
        step.calls = getattr(step, "calls", 0) + 1
        w.seen = (Mine.calls, w.mine.n, step.calls)
        return unsupported(X * step.calls)

    return step


@step_of
def optimizer_state_made_lazily(w):
    w.t = Trainer(torch.optim.Adam)
    return lambda n: w.t.step(X * n, Y) + unsupported(w.t.model[0].weight.detach())


@step_of
def scheduler_stepped(w):
    w.t = Trainer(torch.optim.SGD)
    w.sched = torch.optim.lr_scheduler.StepLR(w.t.opt, 2, 0.5)

    def step(n):
        loss = w.t.step(X * n, Y)
        w.sched.step()
        return loss + unsupported(X)

    return step


@step_of
def numbers_drawn(w):
    w.own, w.numpys = random.Random(3), np.random.default_rng(5)
    w.torchs = torch.Generator().manual_seed(7)

    def step(n):
        drawn = [random.random(), np.random.rand(), w.own.random(), w.numpys.random()]
        return unsupported(X * sum(drawn)), *drawn

    return step


@step_of
def dropout(w):
    w.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    w.drawing = torch.Generator().manual_seed(7)
    w.opt = torch.optim.SGD(w.net.parameters(), lr=1e-5)

    def step(n):
        w.opt.zero_grad()
        loss = unsupported(w.net(X * n).square())
        loss.backward()
        w.opt.step()
        return loss, torch.rand(2), torch.rand(2, generator=w.drawing)

    return step


@step_of
def batch_norm_statistics(w):
    w.net = nn.BatchNorm1d(4)
    return lambda n: unsupported(w.net(X * n))


@step_of
def list_iterator(w):
    w.at = iter([1, 2, 3, 4, 5, 6, 7, 8])
    return lambda n: unsupported(X * next(w.at))


@step_of
def buffer_written(w):
    out = io.StringIO()

    def step(n):
        out.write(f"{n} ")
        w.text = out.getvalue()
        return unsupported(X * n)

    return step


@step_of
def refusal_caught(w):
    """The step takes another path when the function is refused; eager does not."""

    def step(n):
        try:
            return unsupported(X * n)
        except Exception:
            return X.sum() * 0

    return step


@step_of
def torch_class_asked(w):
    """No refusal: the trace itself makes the step raise."""

    def step(n):
        w.before = n
        y = X * n
        if type(y) is not torch.Tensor and type(y.detach()) is not torch.Tensor:
            raise TypeError("a tensor, please")
        return unsupported(y)

    return step


def worlds(make, **options):
    """Two copies of a world: eager, and compiled with the fallback."""
    made = []
    for compiled in (False, True):
        torch.manual_seed(0)
        w = SimpleNamespace()
        step = make(w)
        if compiled:
            step = tracejit.compile(step, on_unsupported="eager", backend="numpy", **options)
        made.append((w, step))
    return made


def call(world, i: int) -> list:
    """A picture of a world after a call, with the random numbers that come next."""
    w, step = world
    torch.manual_seed(i)
    random.seed(i)
    np.random.seed(i)
    try:
        returned = step(i + 1)
    except (ValueError, StopIteration) as error:
        returned = repr(error)
    following = torch.rand(1), random.random(), np.random.rand()
    return picture((w, returned, following))


@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.sweep(2)
def test_a_call_that_cannot_be_compiled_equals_eager(name):
    eager, ours = worlds(STEPS[name])
    for i in range(6):
        same(call(ours, i), call(eager, i), f"call {i}")
    _, step = ours
    assert step.stats.eager == 6 and step.stats.replays == 0, step.stats
    assert step.explain_mode().startswith("eager: "), step.explain_mode()
    assert step.stats.traces == 3  # calls 0, 2 and 5: after 1 and 2 eager calls


# ---- what is raised


@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
def test_user_exceptions_leave_what_eager_leaves():
    """The step's own exception, before and after something unsupported, and from an iterator."""

    def make(w):
        w.t, w.n, w.at = Trainer(torch.optim.Adam), 0, iter([1.0, 2.0])

        def step(n):
            w.n += n
            loss = w.t.step(X * n, Y)
            if n == 2:
                raise ValueError("a bad batch")
            if n == 3:
                loss = loss + unsupported(X)
            if n == 4:
                unsupported(X)
                raise ValueError("another")
            return loss, next(w.at) if n > 4 else None

        return step

    eager, ours = worlds(make)
    for i in range(7):
        same(call(ours, i), call(eager, i), f"call {i}")
    assert ours[1].stats.eager > 2


def test_what_eager_raises_is_raised_as_ever():
    step = tracejit.compile(lambda x: x @ x, on_unsupported="eager", backend="numpy")
    with pytest.raises(ShapeError):
        step(torch.ones(2, 3))
    assert step.stats.eager == 0


@pytest.mark.parametrize("mode", ["auto", "rerun"])
def test_a_file_is_not_written_to_twice(tmp_path, mode):
    log = (tmp_path / "log").open("w")

    def step(x):
        log.write("call ")
        return unsupported(x)

    compiled = tracejit.compile(step, on_unsupported="eager", mode=mode)
    with pytest.raises(CannotFallBack, match="TextIOWrapper, which cannot be set") as caught:
        compiled(X)
    assert "fft_fft" in str(caught.value)
    for _ in range(3):
        assert torch.equal(compiled(X), step(X))
    log.close()
    assert (tmp_path / "log").read_text() == "call " * 7
    assert compiled.stats.traces == 1 and compiled.stats.eager == 3


def test_what_the_environment_gave_is_not_asked_for_twice():
    def step(x):
        return unsupported(x * os.urandom(1)[0])

    compiled = tracejit.compile(step, on_unsupported="eager")
    with pytest.raises(CannotFallBack, match=r"test_fallback.py:\d+: it calls posix.urandom"):
        compiled(X)
    compiled(X)
    assert compiled.stats.eager == 1


def test_objects_that_cannot_be_looked_into(monkeypatch):
    """All works but the fallback of the call that is refused."""

    def closed(roots):
        raise RuntimeError("a user's property")

    monkeypatch.setattr(fallback, "Snapshot", closed)
    step = tracejit.compile(lambda x: x * 2, on_unsupported="eager")
    for _ in range(5):
        assert torch.equal(step(X), X * 2)
    assert step.stats.replays > 0
    step = tracejit.compile(unsupported, on_unsupported="eager")
    with pytest.raises(CannotFallBack, match="of which it has no copy"):
        step(X)
    assert torch.equal(step(X), unsupported(X))


def test_a_warning_that_is_an_error_comes_before_the_eager_run():
    ran = []

    def step(x):
        ran.append(1)
        return unsupported(x)

    compiled = tracejit.compile(step, on_unsupported="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TracejitWarning):
            compiled(X)
    assert not ran
    compiled(X)
    assert ran == [1]


def test_a_generator_is_not_advanced_twice():
    batches = (X * n for n in itertools.count())
    step = tracejit.compile(lambda: unsupported(next(batches)), on_unsupported="eager")
    with pytest.raises(CannotFallBack, match="advances a generator"):
        step()
    assert torch.equal(step(), unsupported(X))
    untouched = [batches]
    step = tracejit.compile(lambda x: unsupported(x * len(untouched)), on_unsupported="eager")
    with pytest.warns(TracejitWarning):
        assert torch.equal(step(X), unsupported(X))


def test_refusals_are_raised_where_that_was_asked_for(monkeypatch):
    for options in ({"on_unsupported": "raise"}, {"on_unsupported": "eager", "mode": "replay"}, {}):
        with pytest.raises(UnsupportedOperation):
            tracejit.compile(unsupported, **options)(X)
    monkeypatch.delenv("TRACEJIT_ON_UNSUPPORTED")
    with pytest.warns(TracejitWarning):
        tracejit.compile(unsupported)(X)
    with pytest.raises(ValueError, match="on_unsupported is one of"):
        tracejit.compile(unsupported, on_unsupported="ignore")


# ---- which calls


def test_one_warning_for_each_cause():
    def step(x, other):
        return torch.fft.fft(x).abs() if other else torch.fft.ifft(x).abs()

    compiled = tracejit.compile(step, on_unsupported="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            compiled(X, True)
            compiled(X, False)
    said = [str(w.message) for w in caught if w.category is TracejitWarning]
    assert len(said) == 2
    for text, function in zip(said, ("fft_fft", "fft_ifft"), strict=True):
        line = step.__code__.co_firstlineno + 1
        assert f"test_fallback.py:{line}: " in text and function in text
        assert "Rewrite it with supported functions" in text
    assert compiled.explain_mode().startswith("eager: ")


@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
def test_calls_of_another_kind_are_compiled_and_replayed():
    """Evaluation replays while training falls back; another shape, and another branch too."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    flag = SimpleNamespace(on=False)

    def step(x):
        y = net(x)
        return unsupported(y) if flag.on or net.training else y

    compiled = tracejit.compile(step, on_unsupported="eager")
    for i in range(24):
        net.train(i % 2 == 0)
        torch.manual_seed(i)
        ours = compiled(X)
        torch.manual_seed(i)
        torch.testing.assert_close(ours, step(X))
    assert compiled.stats.replays >= 8 and compiled.stats.eager == 12, compiled.stats
    assert compiled.explain_mode().startswith("replay: 1 plan(s) armed; some calls ran eagerly: ")
    net.eval()
    replays = compiled.stats.replays
    for i in range(12):
        flag.on = i % 2 == 0
        torch.testing.assert_close(compiled(X), step(X))
    assert compiled.stats.replays == replays + 6


@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
def test_eager_calls_double_between_traces_and_halve_after_a_trace():
    refuses = SimpleNamespace(yes=True)
    compiled = tracejit.compile(
        lambda x: unsupported(x) if refuses.yes else x.sum(), on_unsupported="eager", mode="rerun"
    )
    traced = []
    for i in range(40):
        before = compiled.stats.traces
        compiled(X)
        if compiled.stats.traces > before:
            traced.append(i)
    assert traced == [0, 2, 5, 10, 19, 36]
    refuses.yes = False
    for _ in range(90):  # of which some are timed
        compiled(X)
    before = compiled.stats.eager
    for _ in range(9):
        compiled(X)
    assert compiled.stats.eager == before
    assert compiled.explain_mode().startswith("rerun: ")


@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.parametrize("made", [False, True])
def test_a_known_way_that_ends_in_a_refusal(made):
    """The trace was answered from earlier ones, then left them: what it changed before is put
    back, unless it is held by something that no earlier trace could reach."""

    def make(w):
        w.n, w.kept = 0, {"all": []}

        def step(i):
            w.n += 1
            random.random()
            y = X * 2
            w.kept["all"].append(w.n)
            if made:
                w.kept[i] = [w.n]
            if i == 7:
                w.n += 10
                return unsupported(y)
            return y

        return step

    eager, ours = worlds(make, mode="rerun")
    for i in range(9):
        if made and i == 6:
            with pytest.raises(CannotFallBack, match="objects that it made itself"):
                call(ours, i)
            return
        same(call(ours, i), call(eager, i), f"call {i}")
    assert ours[1].stats.eager == 2 and ours[1].stats.compiles == 1


def test_models_among_the_arguments_are_not_kept_alive():
    """The copies of followed traces begin at what the step itself holds."""
    step = tracejit.compile(lambda m, x: m(x).sum(), on_unsupported="eager", mode="rerun")
    model = nn.Linear(4, 2)
    for _ in range(4):
        step(model, X)
    gone = weakref.ref(model.weight)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
def test_compiled_steps_inside_one_that_falls_back():
    state = SimpleNamespace(n=0)

    @tracejit.compile(on_unsupported="eager")
    def inner(x):
        return (x * x).sum()

    @tracejit.compile(on_unsupported="eager")
    def outer(x):
        state.n += 1
        return inner(x) + unsupported(x) * state.n

    for i in range(8):
        expected = (X * X).sum() + unsupported(X) * (i + 1)
        torch.testing.assert_close(outer(X), expected)
    assert inner.stats.replays > 0 and outer.stats.eager == 8 and state.n == 8


@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
def test_what_a_hook_of_the_process_did_is_undone():
    """No name of the step leads there."""
    net, seen, totals = nn.Linear(4, 3), [], {"calls": 0}

    def hook(module, args, y):
        totals["calls"] += 1
        seen.append(y.detach().clone())

    compiled = tracejit.compile(lambda n: unsupported(net(X * n)), on_unsupported="eager")
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TracejitWarning)
            for n in range(4):
                compiled(n)
    finally:
        handle.remove()
    assert totals == {"calls": 4} and len(seen) == 4
    for n, y in enumerate(seen):
        torch.testing.assert_close(y, net(X * n).detach())


def test_backward_through_the_result_of_an_eager_call():
    w = torch.ones(4, requires_grad=True)
    step = tracejit.compile(lambda x: unsupported(x @ w) * w.sum(), on_unsupported="eager")
    step(X).backward()
    ours, w.grad = w.grad, None
    step.__wrapped__(X).backward()
    assert torch.equal(ours, w.grad)


# ---- snapshots


class Slotted:
    """An object without a dict."""

    __slots__ = ("a", "b")


def random_graph(rng: random.Random) -> list:
    """Containers and objects that hold each other, in cycles too."""
    makers = (list, dict, set, deque, OrderedDict, SimpleNamespace, Slotted)
    makers += (bytearray, lambda: defaultdict(list), Counter)
    nodes = [rng.choice(makers)() for _ in range(rng.randrange(1, 12))]
    for _ in range(30):
        change(rng, nodes)
    return nodes


def change(rng: random.Random, nodes: list) -> None:
    """One change of one of the objects."""
    x, value = rng.choice(nodes), rng.choice([*nodes, rng.randrange(9), "text", None, 2.5])
    key = rng.choice("abcd")
    match x:
        case list() | deque() | bytearray():
            value = rng.randrange(9) if isinstance(x, bytearray) else value
            if x and rng.random() < 0.4:
                x.pop()
            elif x and rng.random() < 0.4:
                x[rng.randrange(len(x))] = value
            else:
                x.append(value)
        case dict():
            if x and rng.random() < 0.3:
                x.popitem()
            else:
                x[key] = value
            if isinstance(x, OrderedDict) and key in x:
                x.move_to_end(key, last=False)
        case set():
            x ^= {key}
        case _ if rng.random() < 0.3 and hasattr(x, "a"):
            del x.a
        case _:
            setattr(x, rng.choice("ab"), value)


def looks(nodes: list) -> list:
    """What each object holds, by identity and in its order."""
    found = []
    for x in nodes:
        if isinstance(x, OrderedDict):
            found.append([(k, id(v)) for k, v in x.items()])
        elif isinstance(x, dict):
            found.append([(k, id(v)) for k, v in dict.items(x)])
        elif isinstance(x, (list, deque, bytearray)):
            found.append([*map(id, x)])
        elif isinstance(x, set):
            found.append(sorted(x))
        else:
            found.append([(k, id(getattr(x, k, found))) for k in "ab" if hasattr(x, k)])
    return found


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.sweep(0.34)
def test_a_snapshot_of_a_random_graph_is_restored(seed):
    rng = random.Random(seed)
    nodes = random_graph(rng)
    known = Known(Snapshot([nodes]))
    for _ in range(3):
        for _ in range(rng.choice((0, 3))):
            change(rng, nodes)
        before = looks(nodes)
        snapshots = Snapshot([nodes]), known.again([nodes])
        for snapshot in snapshots:
            for _ in range(20):
                change(rng, nodes)
            nodes.append("one more")
            assert not snapshot.obstacles()
            snapshot.restore()
            assert looks(nodes) == before


def test_generators_are_known_to_have_moved_or_not():
    def count(items):
        for x in items:
            yield None if x else 0

    moved, still, rewound = count([1, 0, 1]), count([1, 1]), iter([1, 2, 3])
    next(moved), next(still), next(rewound)
    again = count([1, 1, 1])
    next(again)
    snapshot = Snapshot(
        [[moved, again, still, rewound, zip([1], [2], strict=True), itertools.count()]]
    )
    assert snapshot.obstacles() == []
    next(rewound), next(again)  # the second by the iterator that it is at
    assert snapshot.obstacles() == []
    snapshot.restore()
    assert next(rewound) == 2 and next(again) is None
    next(moved)
    assert snapshot.obstacles() == ["it advances a generator, which cannot be set back"]
    assert next(still) is None and [*again] == [None]


# ---- where every trace makes a plan


def test_a_step_that_makes_a_plan_on_every_call_runs_eagerly_between_tries():
    config, x = SimpleNamespace(n=0), torch.ones(100)
    step = tracejit.compile(lambda: x[: config.n] * 2, backend="numpy", on_unsupported="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(80):
            config.n = i
            assert torch.equal(step(), x[:i] * 2)
    (warning,) = [w for w in caught if w.category is TracejitWarning]
    assert "has made 9 plans" in str(warning.message)
    assert (step.stats.compiles, step.stats.eager) == (15, 65)
    assert step.explain_mode().startswith("eager: each trace makes another plan")
    for _ in range(300):  # once it goes the same way again, it is replayed
        assert torch.equal(step(), x[:79] * 2)
    assert step.explain_mode().startswith("replay") and step.stats.compiles == 16


@pytest.mark.parametrize("mode", ["auto", "rerun"])
@pytest.mark.sweep(2)
def test_a_second_order_optimizer_runs_eagerly(mode):
    def make(compiled):
        torch.manual_seed(0)
        net = nn.Linear(4, 3).double()
        opt = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=2)

        def step():
            def closure():
                opt.zero_grad()
                loss = (net(X.double()) - Y).square().mean()
                loss.backward()
                return loss

            return opt.step(closure)

        options = {"mode": mode, "backend": "numpy", "on_unsupported": "eager"}
        return net, tracejit.compile(step, **options) if compiled else step

    (net, step), (twin, eager) = make(True), make(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        for _ in range(15):
            torch.testing.assert_close(step(), eager())
    torch.testing.assert_close(net.weight, twin.weight)
    assert step.stats.eager == 15 and step.stats.compiles == 0
    assert "The closure is compiled by itself" in step.explain_mode()


def test_a_call_that_saves_a_checkpoint_runs_eagerly(tmp_path):
    """The file is not opened before it is known that the call cannot be traced."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(x, path):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        if path is not None:
            torch.save(model.state_dict(), path)
        return loss.detach()

    step = tracejit.compile(train, on_unsupported="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(8):
            path = tmp_path / f"{i}.pt" if i in (0, 6) else None
            step(torch.ones(4, 3), path)
            if path is not None:
                saved = torch.load(path)
                torch.testing.assert_close(saved["weight"], model.weight.detach())
    assert step.stats.eager == 2, step.stats


def test_an_array_that_shares_memory_with_what_is_written():
    """A compiled step writes at its end, and numpy would read what was there before."""
    array = np.zeros(5, np.float32)
    t = torch.from_numpy(array)

    def add(x):
        t.add_(x)
        return t * 2, float(array.sum())

    step = tracejit.compile(add, on_unsupported="eager")
    with pytest.warns(TracejitWarning, match="shares that it writes to"):
        for i in range(4):
            doubled, total = step(torch.full((5,), float(i)))
            assert (doubled[0].item(), total) == (2 * sum(range(i + 1)), 5 * sum(range(i + 1)))
    read = tracejit.compile(lambda x: t * x, on_unsupported="raise")  # which writes to nothing
    assert read(torch.ones(5))[0].item() == 6


def test_a_class_and_a_global_that_were_given_intermediates_are_put_back():
    """What takes intermediates out of the user's containers leaves the copies alone."""
    global _given

    class Holder:
        calls, last = 0, None

    def step(x):
        global _given
        Holder.calls += 1
        Holder.last = _given = x * Holder.calls
        return torch.special.bessel_j1(Holder.last) + made_by_user_code(x)

    def made_by_user_code(x):
        return x.apply_(lambda v: v)

    _given = None
    step = tracejit.compile(step, on_unsupported="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracejitWarning)
        step(torch.ones(2))
    assert step.stats.eager == 1 and Holder.calls == 1
    assert Holder.last.tolist() == _given.tolist() == [1.0, 1.0]


def test_an_argument_that_comes_to_require_grad():
    """As in eager the argument has a history afterwards, its parameter other values, and a backward
    goes through both; a warning names the line."""

    def step(w, y):
        y.add_(w)
        return (y * y).sum()

    def call(run):
        w = torch.arange(1.0, 5.0, requires_grad=True)
        found = []
        for _ in range(3):
            y = w.detach()
            loss = run(w, y)
            (loss + y.sum()).backward()
            found += [loss.detach(), y.detach().clone(), w.grad.clone(), w.detach().clone()]
            found.append(torch.tensor(float(y.requires_grad and not y.is_leaf)))
        return found

    compiled = tracejit.compile(step, on_unsupported="eager")
    with pytest.warns(TracejitWarning, match=r"eagerly.*would require grad") as warned:
        ours = call(compiled)
    assert len(warned) == 1 and "y.add_(w)" in str(warned[0].message)
    torch.testing.assert_close(ours, call(step), rtol=0, atol=0)
