"""Plans as CUDA graphs, on the fake device: the exact sequence, whole steps in lockstep, what
moves, what is refused. And planted faults are seen."""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

import tracejit
from support.fake import FAKE, log_of, trained, trained_on_streams, warm
from support.optimizer_checks import lockstep, training
from support.programs import PROGRAMS
from tracejit.errors import CaptureError, GraphError, LaunchError, TracejitWarning
from tracejit.runtime import fake_device as module
from tracejit.runtime import graphs, launched_plan, launchers
from tracejit.runtime.fake_clock import Fault
from tracejit.runtime.fake_device import FakeDevice, FakeEvent
from tracejit.runtime.fake_launch import FakeLaunch
from tracejit.runtime.graphs import Graph
from tracejit.runtime.launches import Table
from tracejit.testing import assert_equal_to_eager, fake_device

WARM = 8  # calls after which a step is a graph
LAUNCHED = "launch a graph"


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    with fake_device(compiled=False) as found:
        yield found


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Every plan, however small, becomes a graph in its second call."""
    monkeypatch.setattr(graphs, "CALLS", 1)
    monkeypatch.setattr(launched_plan, "MIN_LAUNCHES", 1)


def replayed(device: FakeDevice, call: Callable[[], object]) -> bool:
    """Whether a call is one graph and nothing else but the copy of its table."""
    found = log_of(device, call)
    own = [x for x in found if "of a graph" not in x and "copy" not in x and ": event" not in x]
    return [x.partition(": ")[2] for x in own] == [LAUNCHED]


# ---- the sequence


def test_golden_sequences(device, golden):
    """The call that makes the graph, those after it, and one in which a number has changed."""
    texts = []

    def tell(name: str, call: Callable[[], object]) -> None:
        texts.append("\n".join([f"# {name}", *log_of(device, call), ""]))

    step, _, optimizer = trained()
    step = warm(step, WARM - 3)
    tell("SGD: the last call without a graph", step)
    tell("SGD: the graph is made", step)
    tell("SGD: the graph again", step)
    optimizer.param_groups[0]["lr"] = 0.01
    tell("SGD with another learning rate", step)
    step, *_ = trained(torch.optim.Adam)
    tell("Adam, whose counters count", warm(step, WARM))
    step, *_ = trained()
    tell("SGD, whose loss is read", warm(lambda: step().item(), WARM))
    w = torch.randn(30, 30)

    def in_place() -> None:
        w.copy_((w @ w).softmax(0) @ w)

    tell("nothing moves", warm(in_place, WARM, fuse=False))
    golden("graph_sequences.txt", "\n".join(texts))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.sweep(5)
def test_programs(device, at_once, name):
    program = PROGRAMS[name]
    step, state = program.make(**program.small)
    options = {"state": state, "backend": FAKE, "require_graph": True}
    compiled = assert_equal_to_eager(step, calls=7, **options)
    assert compiled.stats.replays >= 3, compiled.explain_mode()
    assert sum(LAUNCHED in line for line in device.log) >= 2
    step, state = program.make(**program.small)
    assert_equal_to_eager(step, calls=5, mode="rerun", **options)


@pytest.mark.parametrize(
    ("name", "plans"), [("SGD", 1), ("AdamW", 2), ("Adagrad", 1), ("RMSprop", 2), ("Adafactor", 3)]
)
def test_optimizers(device, at_once, name, plans):
    make = training(lambda p: getattr(torch.optim, name)(p, lr=0.01))
    step = lockstep(make, compiles=plans, calls=11, backend=FAKE, mode="auto", require_graph=True)
    assert step.stats.replays >= 2, step.explain_mode()
    assert sum(LAUNCHED in line for line in device.log) >= 4


def test_two_streams_in_turn_give_the_same_bits(device):
    """Each stream trains a network of its own with one plan, and a graph of its own."""

    def run(streams: list[int]) -> list:
        device.log.clear()
        results = trained_on_streams(device, streams, fuse=False, require_graph=True)
        assert sum(LAUNCHED in line for line in device.log) >= 2 * 90
        return results

    apart, alone = run([device.stream(), device.stream()]), run([0, 0])
    for a, b in zip(apart, alone, strict=True):
        assert torch.equal(a, b)


# ---- what moves, and what the caller keeps


def test_results_are_the_callers_to_keep(device, at_once):
    x = torch.zeros(3)

    def step() -> torch.Tensor:
        x.add_(1)
        return x * 2

    compiled = tracejit.compile(step, backend=FAKE, require_graph=True)
    kept = [compiled() for _ in range(12)]
    assert [t[0].item() for t in kept] == [2.0 * (i + 1) for i in range(12)]
    assert replayed(device, compiled)


@pytest.mark.parametrize("fresh", [True, False])
def test_gradients_are_added_up(device, at_once, fresh):
    """In the `.grad` that is there, and in new ones, which the caller may have kept."""
    torch.manual_seed(1)
    w, x = torch.randn(8, 5, requires_grad=True), torch.randn(3, 8)
    v = w.detach().clone().requires_grad_()

    def step(w: torch.Tensor) -> torch.Tensor:
        loss = (x @ w).pow(2).mean()
        loss.backward()
        return loss.detach()

    compiled, kept = tracejit.compile(step, backend=FAKE, require_graph=True), []
    for call in range(14):
        torch.testing.assert_close(compiled(w), step(v))
        torch.testing.assert_close(w.grad, v.grad)
        if fresh or call % 5 == 4:
            kept.append((w.grad, v.grad))
            w.grad = v.grad = None
    for ours, theirs in kept:
        torch.testing.assert_close(ours, theirs)
    assert any(LAUNCHED in line for line in device.log)


def replace_data(p: torch.Tensor) -> None:
    p.data = p.data * 0.5


@pytest.mark.parametrize(
    "move",
    [
        replace_data,
        lambda p: setattr(p, "grad", p.grad.clone()),
        lambda p: p.data.set_(p.data.clone()),
    ],
    ids=["data", "grad", "storage"],
)
def test_what_stayed_may_move(device, at_once, move):
    """Each time, more is found through the table, until nothing is an argument of the capture."""

    def make() -> tuple:
        step, parameters, _ = trained(torch.optim.SGD, momentum=0.9)
        return step, parameters

    (eager, theirs), (step, mine) = make(), make()
    ours = tracejit.compile(step, backend=FAKE, require_graph=True)
    held = []
    for call in range(40):
        torch.testing.assert_close(ours(), eager())
        if call % 5 == 4:
            for parameters in (mine, theirs):
                p = parameters[call // 5 % len(parameters)]
                held.append((p.data, p.grad))  # where they were is not used again by chance
                move(p)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q)
    captures = sum(line.endswith(": capture") for line in device.log)
    assert sum(LAUNCHED in line for line in device.log) >= 15 and captures <= 12
    assert replayed(device, ours)


def test_arguments_that_move_with_each_call(device):
    torch.manual_seed(0)
    w = torch.randn(20, 20)

    def step(x: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.softmax(x @ w, 0) * scale

    compiled = tracejit.compile(step, backend=FAKE, fuse=False)
    held = [torch.randn(20, 20) for _ in range(20)]
    for call, x in enumerate(held):
        torch.testing.assert_close(compiled(x, 1.0 + call // 3), step(x, 1.0 + call // 3))
    assert replayed(device, lambda: compiled(held[3], 2.0))
    assert sum(line.endswith(": capture") for line in device.log) == 0


def test_several_shapes_and_alignments(device, at_once):
    """A graph for each plan, and for each way in which its inputs are aligned."""
    base, w = torch.randn(400), torch.randn(6, 3)
    step = tracejit.compile(lambda x: (x @ w).relu().sum(0), backend=FAKE, require_graph=True)
    for call in range(36):
        rows, start = (4, 9, 1)[call % 3], call % 2 + 4 * (call % 5)
        x = base[start : start + 6 * rows].view(rows, 6)
        torch.testing.assert_close(step(x), (x @ w).relu().sum(0))
    assert sum(LAUNCHED in line for line in device.log) >= 12


def test_a_call_in_the_middle_of_another(device, monkeypatch):
    """As a signal handler may make it: it has memory, and launches, of its own."""
    x = torch.randn(20, 20)

    def step(x: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.softmax(x @ x, 0) * scale

    compiled = tracejit.compile(step, backend=FAKE, fuse=False)
    for _ in range(WARM):
        compiled(x, 1.0)
    assert replayed(device, lambda: compiled(x, 1.0))
    replay, within = FakeDevice.replay, []

    def replays(self: FakeDevice, graph: object) -> None:
        if not within:
            within.append(None)
            within.append(compiled(x, 3.0))
        replay(self, graph)

    monkeypatch.setattr(FakeDevice, "replay", replays)
    for _ in range(WARM):
        within.clear()
        torch.testing.assert_close(compiled(x, 2.0), step(x, 2.0))
        if within:
            torch.testing.assert_close(within[1], step(x, 3.0))


def test_values_that_are_read_end_a_graph(device, at_once):
    """A graph for each segment."""
    x, w = torch.randn(12, 12), torch.zeros(12, 12)

    def step(limit: float) -> float:
        total = (x @ x).sum()
        if total.abs() > limit:
            w.add_(x * 2)
        return (w @ x).sum().item()

    compiled = tracejit.compile(step, backend=FAKE, require_graph=True)
    for call in range(12):
        limit, before = 0.0 if call % 2 else 1e9, w.clone()
        found = compiled(limit)
        ours = w.clone()
        w.copy_(before)
        assert found == pytest.approx(step(limit), rel=1e-4)
        torch.testing.assert_close(ours, w)
    found = log_of(device, lambda: compiled(0.0))
    assert sum(LAUNCHED in line for line in found) == 2


def test_backward_outside_the_step_is_a_graph(device, at_once):
    w, x = torch.randn(6, 4, requires_grad=True), torch.randn(5, 6)
    step = tracejit.compile(lambda: (x @ w).tanh().sum(), backend=FAKE, require_graph=True)
    for _ in range(8):
        w.grad = None
        loss = step()
        found = log_of(device, loss.backward)
        (expected,) = torch.autograd.grad((x @ w).tanh().sum(), w)
        torch.testing.assert_close(w.grad, expected)
    assert any(LAUNCHED in line for line in found)


def test_a_graph_is_made_and_launched_from_another_device(device):
    """By a thread whose current device is not that of the tensors."""
    step, *_ = trained()
    step = warm(step, 4)
    with device.elsewhere():
        for _ in range(WARM):
            step()
        assert replayed(device, step) and device.here() != device.number


def test_graphs_of_functions_that_are_gone_go(device, at_once, monkeypatch):
    monkeypatch.setattr(launchers, "MAX_LAUNCHERS", 2)
    x = torch.randn(30)
    step = warm(lambda: x * 2, WARM, require_graph=True)
    loaded = step._last.program.loaded
    for _ in range(5):  # each function has launchers of its own
        run = step._programs.kept[-1].program.function()
        for _ in range(4):
            run([x])
    (state,) = loaded._states.values()
    assert len(state.calls) <= 2


def test_a_graph_goes_with_its_step(device):
    step, *_ = trained()
    step = warm(step, WARM)
    assert replayed(device, step)
    loaded = step._last.program.loaded
    (state,) = loaded._states.values()
    held = [weakref.ref(loaded)]
    held += [weakref.ref(x) for x in state.calls if isinstance(x, launchers.Launcher)]
    del loaded, state
    gc.collect()
    gc.disable()
    try:
        step.reset()
        assert not any(x() for x in held)
    finally:
        gc.enable()


# ---- what is refused


def test_graphs_can_be_turned_off(device, monkeypatch):
    monkeypatch.setenv("TRACEJIT_GRAPHS", "0")
    step, *_ = trained()
    step = warm(step, 2 * WARM)
    assert not any(LAUNCHED in line for line in device.log)
    with pytest.raises(GraphError, match="TRACEJIT_GRAPHS=0"):
        tracejit.compile(trained()[0], backend=FAKE, require_graph=True)()


def test_a_few_launches_are_no_graph_unless_it_is_required(device):
    x = torch.randn(30)
    for required in (False, True):
        step = warm(lambda: (x * 2).sum(), WARM, require_graph=required)
        assert any(LAUNCHED in line for line in log_of(device, step)) == required


def test_there_are_no_graphs_on_the_cpu():
    x = torch.zeros(3)
    step = tracejit.compile(lambda: x.add_(1), require_graph=True)
    with pytest.raises(GraphError, match=r"step .* cannot run as a CUDA graph: it runs on cpu"):
        step()
    assert not x.any()


def fails(self: FakeDevice, give: Callable[[], None]) -> None:
    with self.capture():
        give()
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_failed_capture_is_said_once_and_changes_nothing(device, monkeypatch):
    monkeypatch.setattr(FakeDevice, "graph_of", fails)
    (eager, theirs, _), (step, mine, _) = trained(), trained()
    ours = tracejit.compile(step, backend=FAKE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2 * WARM):
            torch.testing.assert_close(ours(), eager())
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q)
        device.synchronize()
        with device.on(device.stream()):  # which would have a graph of its own
            for _ in range(WARM):
                ours()
        device.synchronize()
    texts = [str(w.message) for w in said if w.category is TracejitWarning]
    assert len(texts) == 1 and "operation not permitted" in texts[0], texts
    assert "launch" in log_of(device, ours)[-1]


def test_a_failed_capture_of_a_required_graph_raises_and_changes_nothing(device, monkeypatch):
    step, parameters, _ = trained()
    ours = tracejit.compile(step, backend=FAKE, require_graph=True)
    with monkeypatch.context() as patched:
        patched.setattr(FakeDevice, "graph_of", fails)
        with pytest.raises(GraphError, match="operation not permitted"):
            for _ in range(WARM):
                before = [p.detach().clone() for p in parameters]
                ours()
        for _ in range(3):
            with pytest.raises(GraphError, match="operation not permitted"):
                ours()
    for p, q in zip(parameters, before, strict=True):
        assert torch.equal(p, q)
    ours.reset()
    for _ in range(WARM):
        ours()
    assert replayed(device, ours)


def test_no_memory_for_the_copies_is_a_failed_capture(device, monkeypatch):
    step, *_ = trained()
    ours = warm(step, WARM - 4)

    def full(device: object, address: int, nbytes: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "_like", full)
    with pytest.warns(TracejitWarning, match="out of memory"):
        for _ in range(WARM):
            ours()


def test_a_graph_that_fails_says_so(device, monkeypatch):
    step, *_ = trained()
    step = warm(step, WARM)

    def replay(self: FakeDevice, graph: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(FakeDevice, "replay", replay)
        with pytest.raises(LaunchError, match="the CUDA graph of step 'step' failed on fake:sm_90"):
            step()
    step()


# ---- graphs of the caller's


def test_a_step_with_a_graph_joins_the_callers(device):
    """Kernel by kernel, with memory of that graph's; its own graph is left as it is."""
    x, out = torch.randn(40_000), torch.zeros(1)

    def step(scale: float) -> torch.Tensor:
        total = (x * scale).sum()
        out.copy_(total.reshape(1))
        return total

    compiled = tracejit.compile(step, backend=FAKE, require_graph=True)
    for _ in range(WARM):
        compiled(1.0)
    assert replayed(device, lambda: compiled(1.0))
    with device.capture() as graph:
        kept = compiled(3.0)
    assert not any("launch a graph" in text for text, _ in graph.work)
    for _ in range(2):
        x.add_(1)
        device.replay(graph)
        torch.testing.assert_close(out[0], (x * 3).sum())
        assert replayed(device, lambda: compiled(1.0))
        torch.testing.assert_close(out[0], x.sum())
        torch.testing.assert_close(kept, (x * 3).sum())


def test_no_graph_is_made_within_the_callers(device, at_once):
    """The call that would make it is captured as launches; a value is still refused."""
    step, *_ = trained()
    compiled = warm(step, 4)
    for state in compiled._last.program.loaded._states.values():
        for _, replays in state.calls.values():
            replays.graph = None
    with device.capture() as graph:
        compiled()
    assert not any("capture" in text or "graph" in text for text, _ in graph.work)
    reading = warm(lambda: step().item(), WARM)
    with device.capture(), pytest.raises(CaptureError, match="reads a value of a tensor"):
        reading()


# ---- planted faults: what would be wrong is seen


def train(device: FakeDevice) -> None:
    """Free runs of a network, compiled and eager, that are compared at each step."""
    (eager, theirs, _), (step, mine, _) = trained(torch.optim.Adam), trained(torch.optim.Adam)
    ours, kept = tracejit.compile(step, backend=FAKE, fuse=False), []
    for call in range(2 * WARM):
        found, expected = ours(), eager()
        torch.testing.assert_close(found, expected)
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q)
            kept.append((p.grad, q.grad.clone()))
        if call == WARM + 2:
            for p in (*mine, *theirs):
                kept.append((p.data, p.data.clone()))
                p.data = p.data.clone()
        for got, wanted in kept:
            torch.testing.assert_close(got, wanted)
    assert any(LAUNCHED in line for line in device.log)


def test_without_faults_it_trains(device):
    train(device)


def no_copies(monkeypatch) -> None:
    """The warm-up works on what is the user's: its update happens twice."""
    monkeypatch.setattr(graphs, "_like", lambda device, address, nbytes: _There(address, nbytes))
    monkeypatch.setattr(FakeDevice, "duplicate", lambda self, target, address: None)


class _There:
    def __init__(self, address: int, nbytes: int):
        self.data_ptr = lambda: address


def a_stale_table(monkeypatch) -> None:
    """Addresses are not refreshed."""
    table = Table.__call__

    def stale(self: Table, words: bytes | None, bases: tuple) -> bytes | None:
        if self.bases is not None:
            self.bases = bases
        return table(self, words, bases)

    monkeypatch.setattr(Table, "__call__", stale)


def what_moved_is_not_asked(monkeypatch) -> None:
    monkeypatch.setattr(Graph, "fits", lambda self, bases: True)


def outputs_stay(monkeypatch) -> None:
    """Outputs are arguments of the capture, wherever new ones are."""
    init = graphs.Replays.__init__
    monkeypatch.setattr(
        graphs.Replays,
        "__init__",
        lambda self, maker: init(self, replace(maker, fresh=frozenset())),
    )
    monkeypatch.setattr(graphs.Replays, "_note", lambda self, before, now: None)
    what_moved_is_not_asked(monkeypatch)


@pytest.mark.parametrize("plant", [no_copies, a_stale_table, what_moved_is_not_asked, outputs_stay])
def test_wrong_numbers_are_seen(device, monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises((AssertionError, Fault)):
        train(device)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda d: d.synchronize(), "waiting for the device while a graph is captured"),
        (lambda d: d.event().wait(), "waiting for an event while a graph is captured"),
        (lambda d: d.pinned(8), "allocating pinned memory while a graph is captured"),
        (lambda d: d.upload(d.allocate(4), torch.zeros(1)), "a pageable copy while a graph"),
        (lambda d: elsewhere(d, lambda: d.allocate(4)), "outside the pool of the graph"),
        (lambda d: elsewhere(d, lambda: d.uses(torch.zeros(1))), "the graph of another stream"),
        (lambda d: d.replay(module.Graph()), "replaying a graph while a graph is captured"),
        (lambda d: d.event().record(), "an event for the host while a graph is captured"),
    ],
    ids=["sync", "host read", "pinned", "pageable", "pool", "stream", "replay", "event"],
)
@pytest.mark.sweep(2)
def test_what_a_capture_does_not_take_is_seen(device, monkeypatch, what, message):
    """Where a launch of the capture does it."""
    call = FakeLaunch.__call__

    def calls(self: FakeLaunch, *given: object) -> None:
        if device.capturing():
            what(device)
        call(self, *given)

    monkeypatch.setattr(FakeLaunch, "__call__", calls)
    with pytest.raises(Fault, match=message):
        train(device)


def elsewhere(device: FakeDevice, work: Callable[[], object]) -> None:
    with device.on(0):
        work()


def test_a_capture_on_the_default_stream_is_seen(device, monkeypatch):
    monkeypatch.setattr(FakeDevice, "current_stream", lambda self: 0)
    with pytest.raises(Fault, match="default stream"):
        device.graph_of(lambda: None)


def test_a_warm_up_that_nobody_waits_for_is_seen(device, monkeypatch):
    hold = FakeEvent.hold
    monkeypatch.setattr(
        FakeEvent, "hold", lambda self: hold(self) if device.current_stream() else None
    )
    with pytest.raises(Fault, match="no event between"):
        train(device)


def test_a_warm_up_that_does_not_wait_is_seen(device, monkeypatch):
    hold = FakeEvent.hold
    monkeypatch.setattr(
        FakeEvent, "hold", lambda self: None if device.current_stream() else hold(self)
    )
    with pytest.raises(Fault, match="no event between"):
        train(device)


def test_a_table_that_is_filled_too_early_is_seen(device, monkeypatch):
    """The slots of the ring are used again without a wait."""
    monkeypatch.setattr(FakeEvent, "wait", lambda self: None)
    with pytest.raises(Fault, match="changed pinned memory"):
        train(device)


def test_memory_of_a_graph_that_is_given_back_is_seen(device, monkeypatch):
    """The counters and the table must last as long as the graph."""
    init = Graph.__init__

    def forgets(self: Graph, *given: object) -> None:
        init(self, *given)
        self._state._memory = (None, None)
        self._state._copy = lambda target, words: None

    monkeypatch.setattr(Graph, "__init__", forgets)
    with pytest.raises((Fault, AssertionError)):
        train(device)


# ---- through Triton's compiler

compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs a process without the interpreter"
)


@compiles
@pytest.mark.parametrize("name", ["2 zero_", "softmax"])
def test_programs_that_triton_compiles(at_once, name):
    pytest.importorskip("triton")
    with fake_device() as device:
        program = PROGRAMS[name]
        step, state = program.make(**program.small)
        assert_equal_to_eager(step, calls=6, state=state, backend=FAKE, require_graph=True)
        assert any(LAUNCHED in line for line in device.log)
