"""Recurrent modules in whole training steps: equal to eager, replayed, with few launches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import tracejit
from support.capture_checks import randn, same
from support.oracle import call
from support.scope import sampled
from tracejit.testing import assert_equal_to_eager, assert_trains_like_eager

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # eager's

STEPS, ROWS, FEATURES, HIDDEN = 5, 3, 7, 4


class Folded(nn.Module):
    """A cell in a loop over the steps."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        state, outputs = None, []
        for row in x:
            state = self.cell(row, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs), None


ALWAYS = ("LSTM", "GRU, deep")
DEEP = {"num_layers": 2, "bidirectional": True}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: nn.RNN(FEATURES, HIDDEN),
    "RNN, relu, deep": lambda: nn.RNN(FEATURES, HIDDEN, nonlinearity="relu", **DEEP),
    "LSTM": lambda: nn.LSTM(FEATURES, HIDDEN, batch_first=True),
    "LSTM, deep": lambda: nn.LSTM(FEATURES, HIDDEN, **DEEP),
    "LSTM, projected": lambda: nn.LSTM(FEATURES, HIDDEN, proj_size=2, **DEEP),
    "GRU": lambda: nn.GRU(FEATURES, HIDDEN, bias=False),
    "GRU, deep": lambda: nn.GRU(FEATURES, HIDDEN, batch_first=True, **DEEP),
    "RNNCell": lambda: Folded(nn.RNNCell(FEATURES, HIDDEN)),
    "LSTMCell": lambda: Folded(nn.LSTMCell(FEATURES, HIDDEN)),
    "GRUCell": lambda: Folded(nn.GRUCell(FEATURES, HIDDEN, bias=False)),
}


def training(make: Callable[[], nn.Module]) -> Callable:
    """Makes a training step with an optimizer, and its parameters."""

    def make_step() -> tuple[Callable[[], torch.Tensor], list[nn.Parameter]]:
        torch.manual_seed(0)
        model, x = make(), randn(STEPS, ROWS, FEATURES)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        target = randn(*model(x)[0].shape)

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x)[0] - target).pow(2).mean()
            loss.backward()
            optimizer.step()
            return loss

        return step, list(model.parameters())

    return make_step


@pytest.mark.parametrize("name", [n for n in MODULES if n in ALWAYS or sampled(n, of=3)])
def test_modules_train_like_eager_and_replay(name):
    compiled, *_ = assert_trains_like_eager(training(MODULES[name]), calls=10)
    assert compiled.stats.replays == 7, compiled.explain_mode()


@pytest.mark.parametrize("name", ["RNN, relu, deep", "LSTM, deep", "GRU, deep"])
@pytest.mark.sweep(3)
def test_modules_in_lockstep(name):
    step, parameters = training(MODULES[name])()
    assert_equal_to_eager(step, calls=4, state=parameters)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_modules_interpreted(name):
    step, parameters = training(MODULES[name])()
    assert_equal_to_eager(step, calls=1, state=parameters, backend="interpret")


def test_state_carried_by_the_caller():
    """Truncated backpropagation: each call gets the last one's state, detached."""

    def make():
        torch.manual_seed(0)
        model = nn.LSTM(FEATURES, HIDDEN, num_layers=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step(x, target, h, c):
            optimizer.zero_grad()
            out, (h, c) = model(x, (h, c))
            loss = (out - target).pow(2).mean()
            loss.backward()
            optimizer.step()
            return loss.detach(), h.detach(), c.detach()

        return step

    ours, theirs = tracejit.compile(make()), make()
    state = mine = (torch.zeros(2, ROWS, HIDDEN),) * 2
    for i in range(10):
        x, target = randn(STEPS, ROWS, FEATURES) + i, randn(STEPS, ROWS, HIDDEN)
        loss, *state = theirs(x, target, *state)
        our_loss, *mine = ours(x, target, *mine)
        torch.testing.assert_close((our_loss, *mine), (loss, *state))
    assert ours.stats.replays >= 7, ours.explain_mode()


def test_state_on_the_object_is_replayed():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.h = nn.GRU(FEATURES, HIDDEN), torch.zeros(1, ROWS, HIDDEN)

        def forward(self, x):
            out, h = self.rnn(x, self.h)
            self.h = h.detach()
            return out, h

    make_step = training(Stateful)
    compiled, *_ = assert_trains_like_eager(make_step, calls=10)
    assert compiled.stats.replays >= 5, compiled.explain_mode()


def test_unbatched_input_and_a_state():
    for make in (MODULES["LSTM, deep"], MODULES["GRU, deep"], MODULES["RNN"]):
        torch.manual_seed(0)
        model = make()
        layers = model.num_layers * (1 + model.bidirectional)
        h = randn(layers, HIDDEN).requires_grad_()
        leaves = [h, *model.parameters()]
        hx = (h, randn(layers, HIDDEN)) if model.mode == "LSTM" else h

        def step(x, hx, model=model, leaves=leaves):
            out, after = model(x, hx)
            last = after[0] if isinstance(after, tuple) else after
            return out, *torch.autograd.grad((out.sum() * last.sum()), leaves)

        x = randn(STEPS, FEATURES)
        for ours, theirs in zip(call(step, x, hx), step(x, hx), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_frozen_weights_and_no_grad():
    model = nn.LSTM(FEATURES, HIDDEN)
    model.weight_hh_l0.requires_grad_(False)
    model.bias_ih_l0.requires_grad_(False)
    others = [p for p in model.parameters() if p.requires_grad]

    def step(x):
        with torch.no_grad():
            first = model(x)[0]
        return first, *torch.autograd.grad(model(x + first.sum())[0].sum(), others)

    x = randn(STEPS, ROWS, FEATURES)
    for ours, theirs in zip(call(step, x), step(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_flattening_parameters_is_known_to_be_pure():
    model, x = nn.GRU(FEATURES, HIDDEN), randn(STEPS, ROWS, FEATURES)

    def step():
        model.flatten_parameters()
        return model(x)[0].sum()

    compiled = assert_equal_to_eager(step, calls=5)
    assert compiled.stats.replays == 3, compiled.explain_mode()


def test_a_weight_replaced_between_calls_is_used():
    model, x = nn.GRU(FEATURES, HIDDEN), randn(STEPS, ROWS, FEATURES)
    compiled = tracejit.compile(lambda: model(x)[0])
    for _ in range(4):
        compiled()
    model.weight_hh_l0 = nn.Parameter(torch.zeros(3 * HIDDEN, HIDDEN))
    for _ in range(4):
        torch.testing.assert_close(compiled(), model(x)[0])


def test_a_written_weight_is_refused_by_backward_as_in_eager():
    def step(x, h, w_ih, w_hh, changed):
        out, last = torch.rnn_tanh(x, h, [w_ih, w_hh], False, 1, 0.0, True, False, False)
        with torch.no_grad():
            (x, h, w_ih, w_hh)[changed].mul_(2)
        (out.sum() + last.sum()).backward()

    shapes = (STEPS, ROWS, FEATURES), (1, ROWS, HIDDEN), (HIDDEN, FEATURES), (HIDDEN, HIDDEN)
    for changed in range(4):
        for run in (lambda step, *args: step(*args), call):
            args = [randn(*s).requires_grad_() for s in shapes]
            with pytest.raises(RuntimeError, match="modified (by an )?in-?place"):
                run(step, *args, changed)


def test_backward_outside():
    torch.manual_seed(0)
    model, x = nn.LSTM(FEATURES, HIDDEN, **DEEP), randn(STEPS, ROWS, FEATURES)
    compiled = tracejit.compile(lambda x: model(x)[0].pow(2).sum())
    for _ in range(4):
        found = []
        for loss_of in (compiled, compiled.__wrapped__):
            model.zero_grad()
            loss_of(x).backward()
            found.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*found)


def test_second_derivatives():
    """As for a gradient penalty: through the weights' single products too."""

    def step(x, *params):
        out, *_ = torch.gru(
            x, torch.zeros(1, 2, 3).double(), params, True, 1, 0.0, True, False, False
        )
        grads = torch.autograd.grad(out.sum(), [x, *params], create_graph=True)
        sum(g.pow(2).sum() for g in grads).backward()
        return grads[0].detach()

    params = [randn(9, 4), randn(9, 3), randn(9), randn(9)]
    same(step, *(p.double().requires_grad_() for p in (randn(4, 2, 4), *params)))


# ---- launches

# Of forward, backward and update at each of many steps; the rest does not grow with them.
PER_STEP = {nn.RNN: 2, nn.LSTM: 4, nn.GRU: 4}


@pytest.mark.parametrize("module", PER_STEP, ids=lambda m: m.__name__)
def test_launches(module):
    def launches(steps: int) -> int:
        model, x = module(FEATURES, HIDDEN), randn(steps, ROWS, FEATURES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            optimizer.zero_grad()
            model(x)[0].pow(2).mean().backward()
            optimizer.step()

        compiled = tracejit.compile(step)
        compiled()
        return len(compiled.plans[-1].launches)

    few, more = launches(6), launches(12)
    assert more - few <= PER_STEP[module] * 6 + 2, (few, more)
    assert few <= PER_STEP[module] * 6 + 8, few
