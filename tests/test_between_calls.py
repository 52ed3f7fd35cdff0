"""Random training programs whose Python state changes at random between calls, against eager.

Attributes, containers, hyperparameters, modes, flags, hooks, shapes, memory, frozen parameters,
functions, classes and optimizers change before calls of a step; the compiled step must go on as
eager does. A failure prints the program, shrunk and runnable, and belongs into NAMED once it is
mended. `make test` runs 20 sequences, `make test-all` 2,000 more, `make fuzz` any number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from support import sequences
from support.sequence_parts import VALUES
from support.sequence_parts_lists import LISTS
from support.sequence_parts_nested import NESTED
from support.sequence_parts_tuples import TUPLES
from support.sequences import Change, Outcome, Sequence, fails, generate, outcome, run, shrink
from tracejit.capture.proof import heap, many
from tracejit.capture.proof.guard_text import GuardText

REFUSED_AT_MOST = 0.1
REPLAYED_AT_LEAST = 1.2  # calls of eight, on average: the first three are traced, as changes are


@pytest.fixture(autouse=True)
def one_thread():
    """The programs are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def outcomes(seeds: range, **how: object) -> Iterator[Outcome]:
    """Of the sequences of some seeds. One that fails is shrunk, and told with its seed."""
    for seed in seeds:
        try:
            yield outcome(generate(seed, **how))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def check_seeds(seeds: range) -> None:
    found, why, replays = Counter(), Counter(), 0
    for end in outcomes(seeds):
        found[end.kind] += 1
        why[end.why] += 1
        replays += end.replays
    print(dict(found), replays, why)
    assert found["refused"] <= REFUSED_AT_MOST * len(seeds) + 1, why
    assert replays >= REPLAYED_AT_LEAST * len(seeds)


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(10, 100, 10))]
)
def test_the_compiled_step_goes_on_as_eager(first):
    check_seeds(range(first, first + 10))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 50))
def test_many_sequences(first):
    check_seeds(range(first, first + 50))


def check_replayed(seeds: range, of: tuple) -> None:
    """Sequences made of some parts, of which some calls are replayed."""
    replays = sum(end.replays for end in outcomes(seeds, of=of, calls=14))
    assert replays >= len(seeds)


@pytest.mark.parametrize(
    "seeds", [range(3), pytest.param(range(3, 16), marks=pytest.mark.slow)], ids=str
)
def test_what_is_looked_up(seeds):
    check_replayed(seeds, LISTS)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(5000, 5400, 50))
def test_much_that_is_looked_up(first):
    check_replayed(range(first, first + 50), LISTS)


@pytest.mark.parametrize(
    "seeds", [range(7005, 7008), pytest.param(range(7000, 7028), marks=pytest.mark.slow)], ids=str
)
def test_what_is_nested(seeds):
    check_replayed(seeds, NESTED)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(8000, 8400, 50))
def test_much_that_is_nested(first):
    check_replayed(range(first, first + 50), NESTED)


@pytest.mark.parametrize(
    "seeds", [range(9000, 9003), pytest.param(range(9003, 9028), marks=pytest.mark.slow)], ids=str
)
def test_what_is_replaced_whole(seeds):
    check_replayed(seeds, TUPLES)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10000, 10400, 50))
def test_much_that_is_replaced_whole(first):
    check_replayed(range(first, first + 50), TUPLES)


@pytest.mark.parametrize("first", range(0, 8, 4))
def test_decisions_by_values(first):
    """Which are refused, as a trace has no values; none goes another way than eager."""
    kinds = {run(generate(seed, of=VALUES)).kind for seed in range(first, first + 4)}
    assert kinds <= {"refused", "raises", "diverges", "equal"}


# ---- the comparison can fail


# lines that a guard no longer has; a part and a change that show it
FAULTS = {
    "numbers": (r"same_value\(", "dictionary", "w.options['power'] = 3"),
    "strings": (r"same_value\(", "flag", "w.mode = 'sin'"),
    "floats": (r"same_number\(", "function", "w.helper.__defaults__ = (3.0,)"),
    "flags": (r" is (True|False|None)$", "flag", "w.flag = False"),
    "functions": (r"^\S+ is k\d+$", "function", "w.act = torch.sigmoid"),
    "code": (r"__code__ is", "function", "w.helper.__code__ = w.another.__code__"),
    "keys": (r"^\[\*", "attribute", "w.cfg.scale = 3.0"),
    "lengths": (r"^len\(", "list of tensors", "w.terms.append(torch.ones(3))"),
    "classes": (r"^\S+ is k\d+$", "class", "w.Scaled.__call__ = lambda self, h: h + self.part"),
    "grad mode": ("grad_on", "flag", "d.around = 'no_grad'"),
    "default dtype": ("default_dtype", "default dtype", "torch.set_default_dtype(torch.float32)"),
    "decisions": (r"scalars\[0\] >", "decided by a float", "d.gain = 1.5"),
}


def without(monkeypatch, pattern: str) -> None:
    """Leave out the lines of guards whose condition matches."""
    for name in ("check", "expect"):
        add = getattr(GuardText, name)

        def some(self, condition, *rest, add=add):
            if not re.search(pattern, condition):
                add(self, condition, *rest)

        monkeypatch.setattr(GuardText, name, some)


def changed_once(part: str, line: str) -> Sequence:
    """A small program in which one thing changes, once its replay is armed."""
    parts = {p.name: p for p in (*sequences.MODELS, *sequences.OPTIMIZERS, *sequences.PARTS)}
    chosen = (parts["plain"], parts["SGD"], parts[part])
    return Sequence(chosen, (Change(6, line),), calls=7)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.sweep(2)
def test_a_guard_without_a_line_is_found_out(fault, monkeypatch):
    pattern, part, line = FAULTS[fault]
    assert run(changed_once(part, line)).kind == "equal"
    without(monkeypatch, pattern)
    assert fails(changed_once(part, line))


def test_hooks_that_no_guard_looks_at_are_found_out(monkeypatch):
    sequence = changed_once("flag", "[*w.model.parameters()][0].register_hook(lambda g: g * 2)")
    assert run(sequence).kind == "equal"
    for module in (heap, many):
        monkeypatch.setattr(module, "HOOKS_OF_TENSORS", ())
    assert fails(sequence)


def test_random_sequences_find_a_fault(monkeypatch):
    without(monkeypatch, FAULTS["functions"][0])
    assert any(fails(generate(seed)) for seed in range(40))


def test_shrinking_keeps_only_what_fails(monkeypatch):
    fault = changed_once("flag", "w.flag = False")
    clipping = next(p for p in sequences.PARTS if p.name == "clipping")
    more = Change(7, "w.clip = 0.01", "clipping")
    large = Sequence((*fault.parts, clipping), (*fault.changes, more), calls=8)
    without(monkeypatch, FAULTS["flags"][0])
    assert shrink(large, fails) == fault


def test_every_part_and_change_takes_part():
    """What a program may be made of, and what may change, is in some program."""
    drawn = [generate(seed) for seed in range(3000)]
    assert {p.name for s in drawn for p in s.parts} == {
        p.name for p in (*sequences.MODELS, *sequences.OPTIMIZERS, *sequences.PARTS)
    }
    texts = {c.line for s in drawn for c in s.changes}
    for line in (line for lines in sequences.ALWAYS.values() for line in lines):
        head = line.partition("$")[0]
        assert any(text.startswith(head) for text in texts), line
