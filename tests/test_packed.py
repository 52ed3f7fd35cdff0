"""Packed sequences: what is packed, run and padded again equals eager, with one plan for all
lengths that have the same maximum."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn

import tracejit
from support.scope import sampled
from tracejit.errors import ShapeError, UnsupportedOperation
from tracejit.testing import fake_device

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # eager's

ROWS, STEPS, WORDS, WIDTH, HIDDEN = 4, 6, 20, 5, 3
Batch = tuple[torch.Tensor, object]


def batches(*, longest: bool = True, ordered: bool = False, seed: int = 1) -> Iterator[Batch]:
    """Token ids [rows, steps] with their lengths, of which one is all steps if `longest`."""
    g = torch.Generator().manual_seed(seed)
    while True:
        lengths = torch.randint(1, STEPS + 1, (ROWS,), generator=g)
        if longest:
            lengths[int(torch.randint(ROWS, (1,), generator=g))] = STEPS
        if ordered:
            lengths = lengths.sort(descending=True).values
        tokens = torch.randint(1, WORDS, (ROWS, STEPS), generator=g)
        yield tokens.masked_fill(torch.arange(STEPS) >= lengths[:, None], 0), lengths


def compared(
    make: Callable[[], tuple[Callable, list[torch.Tensor]]],
    given: Callable[[], Iterator[tuple]],
    calls: int = 10,
    **options: object,
) -> tracejit.CompiledStep:
    """Run a step eagerly and compiled on the same batches: results and parameters are equal after
    each call, and random numbers come out as in eager."""
    (eager, theirs), (plain, ours) = make(), make()
    compiled = tracejit.compile(plain, **{"on_unsupported": "raise", **options})
    for call, (batch, again) in enumerate(zip(given(), given(), strict=True)):
        if call == calls:
            break
        torch.manual_seed(call)
        expected, drawn = eager(*batch), torch.rand(1)
        torch.manual_seed(call)
        found = compiled(*again)
        assert torch.equal(torch.rand(1), drawn), f"call {call}: other numbers were drawn"
        torch.testing.assert_close(found, expected, msg=lambda m, k=call: f"call {k}: {m}")
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    return compiled


class Classifier(nn.Module):
    """Sentiment of sentences of several lengths, from the last hidden state."""

    def __init__(self, network: type = nn.LSTM, **options: object) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.network = network(WIDTH, HIDDEN, batch_first=True, **options)
        self.head = nn.LazyLinear(2)

    def forward(self, tokens: torch.Tensor, lengths: object) -> torch.Tensor:
        packed = rnn.pack_padded_sequence(
            self.words(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        _, last = self.network(packed)
        hidden = last[0] if isinstance(last, tuple) else last
        return self.head(hidden.transpose(0, 1).flatten(1))


def training(make_model: Callable[[], nn.Module]) -> Callable:
    def make() -> tuple[Callable, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = make_model()
        tokens, lengths = next(batches())
        model(tokens, lengths)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

        def step(tokens: torch.Tensor, lengths: object) -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens, lengths), tokens[:, 0] % 2)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        return step, [*model.parameters()]

    return make


DEEP = {"num_layers": 2, "bidirectional": True}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Classifier(),
    "LSTM, deep, dropout": lambda: Classifier(**DEEP, dropout=0.4),
    "LSTM, projected": lambda: Classifier(proj_size=2, **DEEP),
    "GRU, deep": lambda: Classifier(nn.GRU, **DEEP),
    "GRU, three layers, dropout": lambda: Classifier(nn.GRU, num_layers=3, dropout=0.2),
    "RNN": lambda: Classifier(nn.RNN, bias=False),
    "RNN, relu, deep": lambda: Classifier(nn.RNN, nonlinearity="relu", **DEEP),
}
ALWAYS = ("LSTM", "LSTM, deep, dropout")


@pytest.mark.parametrize("name", [n for n in NETWORKS if n in ALWAYS or sampled(n, of=3)])
@pytest.mark.sweep(1)
def test_a_classifier_trains_like_eager_with_one_plan_for_all_lengths(name):
    compiled = compared(training(NETWORKS[name]), batches)
    assert compiled.stats.replays == 7, compiled.explain_mode()
    assert compiled.stats.compiles == 2  # the first call makes Adam's state
    assert len({tuple(n.tolist()) for (_, n), _ in zip(batches(), range(10), strict=False)}) > 5


def test_reruns_follow_other_lengths():
    compiled = compared(training(NETWORKS["LSTM, deep, dropout"]), batches, mode="rerun")
    assert compiled.stats.replays == 0
    assert compiled.stats.compiles == 2


def test_a_plan_for_each_longest_length():
    """Without `total_length` the longest sequence is a shape."""

    def shorter() -> Iterator[Batch]:
        return batches(longest=False)

    compiled = compared(training(NETWORKS["LSTM"]), shorter, calls=24)
    lengths = {int(n.max()) for (_, n), _ in zip(shorter(), range(24), strict=False)}
    assert len(lengths) > 1
    assert compiled.stats.replays > 10, compiled.explain_mode()
    assert compiled.stats.compiles <= len(lengths) + 1


def test_lengths_as_a_list():
    def listed() -> Iterator[tuple]:
        return ((tokens, lengths.tolist()) for tokens, lengths in batches())

    compared(training(NETWORKS["LSTM"]), listed)


def test_lengths_that_the_step_counts():
    class Counting(Classifier):
        def forward(self, tokens: torch.Tensor, lengths: object) -> torch.Tensor:
            return super().forward(tokens, (tokens != 0).sum(1).cpu())

    compiled = compared(training(Counting), batches)
    assert compiled.stats.replays == 7, compiled.explain_mode()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.sweep(1)
def test_under_autocast(dtype):
    """Eager rounds in other places than in float32: one call, compared loosely."""
    torch.manual_seed(0)
    model = Classifier(nn.GRU, num_layers=2)
    tokens, lengths = next(batches())
    model(tokens, lengths)

    def step() -> tuple:
        with torch.autocast("cpu", dtype):
            out = model(tokens, lengths)
        return out, *torch.autograd.grad(out.float().pow(2).sum(), [*model.parameters()])

    expected, found = step(), tracejit.compile(step, on_unsupported="raise")()
    for x, y in zip(found, expected, strict=True):
        assert x.dtype is y.dtype
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_on_the_fake_gpu(compiled):
    with fake_device(compiled=compiled):
        step = compared(training(NETWORKS["RNN"]), batches, 5, backend="fake:sm_90")
    assert step.stats.replays == 2, step.explain_mode()


# ---- outputs, states, and both layouts


def tagging(
    network: type, *, first: bool, total: int | None, ordered: bool, **options: object
) -> Callable:
    """A step on all outputs, with given states, that returns whatever eager shows."""

    def make() -> tuple[Callable, list[torch.Tensor]]:
        torch.manual_seed(0)
        words = nn.Embedding(WORDS, WIDTH)
        model = network(WIDTH, HIDDEN, batch_first=first, **options)
        layers = model.num_layers * (1 + model.bidirectional)
        state = torch.randn(layers, ROWS, HIDDEN, requires_grad=True)
        states = (state, torch.randn(layers, ROWS, HIDDEN)) if network is nn.LSTM else state
        parameters = [*words.parameters(), *model.parameters(), state]
        optimizer = torch.optim.SGD(parameters, lr=0.5)

        def step(tokens: torch.Tensor, lengths: torch.Tensor) -> tuple:
            optimizer.zero_grad()
            x = words(tokens if first else tokens.t())
            packed = rnn.pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=ordered)
            out, last = model(packed, states)
            padded, counts = rnn.pad_packed_sequence(
                out, batch_first=first, padding_value=-1.0, total_length=total
            )
            last = last if isinstance(last, tuple) else (last,)
            loss = padded.pow(3).mean() + sum(x.pow(2).mean() for x in last)
            loss.backward()
            optimizer.step()
            return loss.detach(), padded.detach(), counts, *(x.detach() for x in last)

        return step, parameters

    return make


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("total", [None, STEPS, STEPS + 2])
@pytest.mark.sweep(1)
def test_outputs_and_states_are_those_of_eager(first, ordered, total):
    def given() -> Iterator[Batch]:
        return batches(longest=total != STEPS, ordered=ordered)

    network = (nn.LSTM, nn.GRU, nn.RNN)[(total or 0) % 3 - first]
    options = DEEP if ordered else {}
    make = tagging(network, first=first, total=total, ordered=ordered, **options)
    compiled = compared(make, given, calls=6 if total != STEPS else 12)
    assert compiled.stats.eager == 0


def test_what_lies_past_an_end_does_not_matter():
    """Not even if it is not a number."""

    def make() -> tuple[Callable, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = nn.GRU(WIDTH, HIDDEN, **DEEP)
        parameters = [*model.parameters()]

        def step(x: torch.Tensor, lengths: torch.Tensor) -> tuple:
            x = x.clone().requires_grad_()
            packed = rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            out, last = model(packed)
            padded, _ = rnn.pad_packed_sequence(out)
            grads = torch.autograd.grad(padded.sum() + last.pow(2).sum(), [x, *parameters])
            return padded.detach(), last.detach(), *grads

        return step, parameters

    def given() -> Iterator[tuple]:
        for tokens, lengths in batches():
            x = torch.randn(STEPS, ROWS, WIDTH, generator=torch.Generator().manual_seed(3))
            x[tokens.t() == 0] = float("nan")
            yield x, lengths

    compared(make, given, calls=5)


# ---- the rows themselves


def of_rows(compute: Callable[[rnn.PackedSequence, nn.Module], object]) -> Callable:
    """A step that computes with the rows of a packed sequence."""

    def make() -> tuple[Callable, list[torch.Tensor]]:
        torch.manual_seed(0)
        words, model = nn.Embedding(WORDS, WIDTH), nn.GRU(WIDTH, WIDTH)
        parameters = [*words.parameters(), *model.parameters()]

        def step(tokens: torch.Tensor, lengths: torch.Tensor) -> object:
            for p in parameters:
                p.grad = None
            packed = rnn.pack_padded_sequence(
                tokens, lengths, batch_first=True, enforce_sorted=False
            )
            loss = compute(packed, words, model)
            loss.backward()
            return loss.detach(), [p.grad for p in parameters if p.grad is not None]

        return step, parameters

    return make


def embedded(packed: rnn.PackedSequence, words: nn.Module, model: nn.Module) -> torch.Tensor:
    rows = rnn.PackedSequence(words(packed.data), *packed[1:])
    out, _ = model(rows)
    return nn.functional.cross_entropy(out.data, packed.data % WIDTH)


def sized(packed: rnn.PackedSequence, words: nn.Module, model: nn.Module) -> torch.Tensor:
    out, _ = model(rnn.PackedSequence(words(packed.data), *packed[1:]))
    assert out.data.size(1) == WIDTH
    assert out.data.dim() == 2
    return out.data.sum() / out.data.size(0) + len(packed.data) * out.data.mean()


def written(packed: rnn.PackedSequence, words: nn.Module, model: nn.Module) -> torch.Tensor:
    out, _ = model(rnn.PackedSequence(words(packed.data), *packed[1:]))
    rows = out.data
    first = rows.sum()
    rows.mul_(2.0)
    padded, _ = rnn.pad_packed_sequence(out)
    return padded.pow(2).sum() + first


def counted_late(packed: rnn.PackedSequence, words: nn.Module, model: nn.Module) -> torch.Tensor:
    out, _ = model(rnn.PackedSequence(words(packed.data), *packed[1:]))
    with torch.no_grad():
        number = out.data.shape[0]
    return out.data.sum() / number


def with_labels(packed: rnn.PackedSequence, words: nn.Module, model: nn.Module) -> torch.Tensor:
    """What is packed twice by the same lengths."""
    tokens, lengths = rnn.pad_packed_sequence(packed, batch_first=True)
    again = rnn.pack_padded_sequence(tokens, lengths, True, enforce_sorted=False)
    labels = rnn.pack_padded_sequence(tokens % WIDTH, lengths, True, enforce_sorted=False)
    inputs = rnn.pack_padded_sequence(words(tokens), lengths, True, enforce_sorted=False)
    out, _ = model(inputs)
    return nn.functional.cross_entropy(out.data, labels.data) + (again.data % 2).float().mean()


@pytest.mark.parametrize("compute", [embedded, sized, written, counted_late, with_labels])
@pytest.mark.parametrize("mode", ["auto", "rerun"])
@pytest.mark.sweep(1)
def test_rows_can_be_used_by_themselves(compute, mode):
    """Then their number is part of the step."""
    compared(of_rows(compute), batches, calls=6, mode=mode)


def test_sequences_that_are_packed_from_a_list():
    def make() -> tuple[Callable, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = nn.LSTM(WIDTH, HIDDEN)

        def step(*sequences: torch.Tensor) -> tuple:
            out, (h, _) = model(rnn.pack_sequence(sequences, enforce_sorted=False))
            grads = torch.autograd.grad(h.pow(2).sum(), [*model.parameters()])
            rows = rnn.unpack_sequence(out)
            return h.detach(), *(x.detach() for x in rows), *grads

        return step, [*model.parameters()]

    def given() -> Iterator[tuple]:
        while True:
            yield tuple(torch.full((n, WIDTH), 0.1 * n) for n in (2, 5, 3))

    compared(make, given, calls=4)


def test_sequences_that_were_packed_outside():
    def make() -> tuple[Callable, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = nn.GRU(WIDTH, HIDDEN, bidirectional=True)

        def step(packed: rnn.PackedSequence) -> tuple:
            out, last = model(packed)
            padded, lengths = rnn.pad_packed_sequence(out)
            grads = torch.autograd.grad(padded.sum() + last.sum(), [*model.parameters()])
            return padded.detach(), lengths, *grads

        return step, [*model.parameters()]

    def given() -> Iterator[tuple]:
        for tokens, lengths in batches():
            x = nn.functional.one_hot(tokens % WIDTH, WIDTH).float()
            yield (rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False),)

    compared(make, given, calls=6)


# ---- what eager refuses


@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        ([3, 0, 2, 1], "has to be greater than 0"),
        ([3, 4, 2, 1], "sorted in decreasing order"),
        ([STEPS + 1, 4, 2, 1], "steps"),
    ],
)
def test_wrong_lengths_raise_and_change_nothing(lengths, reason):
    """Also in a replay, in which nobody has looked at them before."""
    model = nn.LSTM(WIDTH, HIDDEN, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x = torch.randn(ROWS, STEPS, WIDTH)

    @tracejit.compile(on_unsupported="raise")
    def step(lengths: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        _, (h, _) = model(rnn.pack_padded_sequence(x, lengths, batch_first=True))
        h.sum().backward()
        optimizer.step()
        return h.detach()

    for _ in range(4):
        step(torch.tensor([STEPS, 4, 2, 1]))
    assert step.stats.replays == 1
    before = [p.detach().clone() for p in model.parameters()]
    wrong = torch.tensor(lengths)
    with pytest.raises(RuntimeError):
        model(rnn.pack_padded_sequence(x, wrong, batch_first=True))
    with pytest.raises(ShapeError, match=reason):
        step(wrong)
    assert all(map(torch.equal, model.parameters(), before))
    step(torch.tensor([STEPS, 5, 3, 3]))


def test_a_packed_sequence_does_not_leave_the_step():
    model, x = nn.GRU(WIDTH, HIDDEN), torch.randn(STEPS, ROWS, WIDTH)

    def step(lengths: torch.Tensor) -> rnn.PackedSequence:
        return model(rnn.pack_padded_sequence(x, lengths))[0]

    lengths = torch.tensor([STEPS, 4, 2, 1])
    with pytest.raises(UnsupportedOperation, match="return what pad_packed_sequence"):
        tracejit.compile(step, on_unsupported="raise")(lengths)
    with pytest.warns(UserWarning, match="pad_packed_sequence"):
        found = tracejit.compile(step, on_unsupported="eager")(lengths)
    torch.testing.assert_close(found.data, step(lengths).data)
