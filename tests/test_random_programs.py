"""Random training-step programs against eager: fused, one kernel per primitive, C, interpreted.

A failure prints the program, shrunk and runnable, and belongs into test_random_regressions.py once
it is fixed. `make test` runs 40 programs, `make test-all` 2,300, `make fuzz` any number. A program
is written while it runs, each statement for what is there, so that a shrinker of the decisions
behind it would come to other programs: statements are dropped from the text instead.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from support.random_check import compare, is_refusal, loaded, outcome, shrink
from support.random_images import generate_images, generate_plain
from support.random_programs import generate
from support.random_text import Program
from support.scope import WHOLE
from tracejit.errors import SideEffectError
from tracejit.schedule.cpu import tiles, winograd

kind = winograd.Winograd
FUSED = {"backend": "numpy"}
UNFUSED = {"backend": "numpy", "fuse": False, "mode": "rerun"}  # later calls follow the first
C = {"backend": "c"}
INTERPRET = {"backend": "interpret"}
REFUSED_AT_MOST = 0.05
ILL_CONDITIONED_AT_MOST = 0.05

refusals: Counter[str] = Counter()


def check_seeds(
    seeds: range, *variants: dict, generate: Callable[[int], Program] = generate
) -> None:
    found = Counter()
    for seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about var of one element
            program = generate(seed)
        try:
            end, refused = outcome(program, variants)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        found[end] += 1
        refusals.update(reason.split(": ", 1)[-1] for reason in refused.values())
    print(dict(found), dict(refusals))
    assert found["refused"] <= REFUSED_AT_MOST * len(seeds) + 1, refusals
    assert found["ill-conditioned"] <= ILL_CONDITIONED_AT_MOST * len(seeds) + 1


@pytest.mark.parametrize("first", range(0, 210 if WHOLE else 15, 15))
def test_fused_unfused_and_eager_agree(first):
    check_seeds(range(first, first + 15), FUSED, UNFUSED)


def test_compiled_c_agrees():
    check_seeds(range(200, 260 if WHOLE else 208), C)


@pytest.mark.parametrize("first", range(0, 120 if WHOLE else 4, 4))
def test_programs_of_images_agree(first):
    check_seeds(range(first, first + 4), FUSED, UNFUSED, generate=generate_images)


@pytest.mark.parametrize("first", range(500, 530 if WHOLE else 502, 2))
def test_programs_of_images_agree_in_c(first):
    check_seeds(range(first, first + 2), C, generate=generate_images)


@pytest.mark.parametrize("first", range(600, 680 if WHOLE else 605, 5))
def test_programs_of_images_agree_by_transforms(first, monkeypatch, tmp_path):
    """However small their convolutions are."""
    monkeypatch.setenv("TRACEJIT_CACHE", str(tmp_path))  # plans of other thresholds
    monkeypatch.setattr(tiles, "NARROW", 1)
    for name, value in {"LEAST": 1, "LEAST_PIECES": 1, "WASTED": 9.0}.items():
        monkeypatch.setattr(winograd, name, value)
    found = []
    monkeypatch.setattr(winograd, "Winograd", lambda *args: found.append(kind(*args)) or found[-1])
    check_seeds(range(first, first + 5), C, generate=generate_plain)
    assert len(found) > 1


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1400, 50))
def test_many_programs_of_images(first):
    check_seeds(range(first, first + 50), FUSED, UNFUSED, C, generate=generate_images)


@pytest.mark.interpret
def test_programs_of_images_interpreted():
    check_seeds(range(3), INTERPRET, generate=generate_images)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 100))
def test_many_programs_on_every_backend(first):
    check_seeds(range(first, first + 100), FUSED, UNFUSED, C)


@pytest.mark.interpret
@pytest.mark.parametrize("first", range(0, 15, 5))
def test_interpreted_triton_agrees(first):
    """Triton's interpreter runs programs in shuffled order, with checked bounds and NaN in masked
    lanes."""
    check_seeds(range(first, first + 5), INTERPRET)


@pytest.mark.filterwarnings("ignore")
def test_programs_cover_the_language():
    """What the generator is meant to reach is in what it writes."""
    texts = "\n".join(str(generate(seed)) for seed in range(300))
    wanted = (
        "backward()",
        "autograd.grad",
        "create_graph",
        "retain_graph",
        ".grad=",
        "no_grad",
        ".data",
        "detach",
        "copy_",
        "requires_grad_",
        "where",
        "masked_fill",
        "mean(",
        "prod(",
        "var(",
        "amax",
        "argm",
        "cumsum",
        "softmax",
        "logsumexp",
        "view(",
        "t()",
        "transpose",
        "permute",
        "expand",
        "flip",
        "F.pad",
        "torch.cat",
        "torch.stack",
        "chunk",
        "split",
        "unbind",
        "squeeze",
        "gather",
        "index_select",
        "F.embedding",
        "@",
        "bmm",
        "F.linear",
        "einsum",
        "+=",
        "copy_",
        "bfloat16",
        "float64",
        "integers",
    )
    flat = texts.replace(" ", "")
    assert [w for w in wanted if w not in flat] == []


def test_the_comparison_sees_a_wrong_step():
    """Each kind of wrong result makes `compare` fail."""

    def make_args(cast):
        w = cast(torch.linspace(0.5, 2, 6, dtype=torch.float64), torch.float32).requires_grad_()
        return [w, cast(torch.ones(6), torch.float32)]

    calls = [0]

    def changing(number, right, wrong):
        """A step that runs `right` eagerly, and `wrong` where the compiled step is called."""

        def step(w, x):
            calls[0] += 1
            return (wrong if calls[0] == number else right)(w, x)

        return step

    def right(w, x):
        (w * w).sum().backward()
        return w * 2

    def value(w, x):
        (w * w).sum().backward()
        return w * 2.00001

    def gradient(w, x):
        (w * w * 1.00001).sum().backward()
        return w * 2

    def written(w, x):
        x[0] = 2
        (w * w).sum().backward()
        return w * 2

    def layout(w, x):
        (w * w).sum().backward()
        return (w * 2).view(2, 3).t().reshape(6)[:5]

    for wrong in (value, gradient, written, layout):
        calls[0] = 0
        with pytest.raises(AssertionError, match="call 0"):
            compare(changing(2, right, wrong), make_args, calls=1, backend="numpy")
    calls[0] = 0
    compare(changing(2, right, right), make_args, calls=1, backend="numpy")


def test_shrinking_keeps_only_what_fails():
    program = generate(7)
    target = program.body[-1]
    small = shrink(program, lambda p: target in p.body)
    assert target in small.body
    assert len(small.body) < len(program.body)
    assert small.returns == ()
    loaded(str(small), "shrunk")


def test_an_unsupported_call_counts_as_refused():
    def step(x):
        return torch.fft.fft(x)

    with pytest.raises(RuntimeError) as caught:
        compare(step, lambda cast: [cast(torch.ones(4), torch.float32)], backend="numpy")
    assert is_refusal(caught.value)


def test_a_change_that_a_compiled_step_cannot_make_counts_as_refused():
    """Seed 1006430: an argument would require grad afterwards."""

    def make_args(cast):
        w = cast(torch.ones(4), torch.float32).requires_grad_()
        return [w, w.detach()]

    def step(w, y):
        y.add_(w)

    with pytest.raises(SideEffectError) as caught:
        compare(step, make_args, backend="numpy")
    assert is_refusal(caught.value)
