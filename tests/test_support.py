"""The support table: dtypes and gradients measured on the samples, and the document made of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from support.function_checks import (
    check_gradients,
    check_values,
    is_logic_in_place,
    outcome,
    same_error,
    step_of,
    tensors_of,
)
from support.function_samples import (
    ELSEWHERE,
    Sample,
    b1,
    bare_name,
    bf16,
    f16,
    f32,
    f64,
    i8,
    i16,
    i32,
    i64,
    of_ranks,
    samples_of,
    u8,
)
from support.oracle import call, captured_of
from support.scope import sampled
from tracejit import support
from tracejit.capture.trace.table import RULES
from tracejit.support import Operation, markdown, operations, refusals

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # eager's deprecations

ROOT = Path(__file__).parents[1]
FLOATS = {"f64": f64, "f32": f32, "f16": f16, "bf16": bf16}
INTS = {"i64": i64, "i32": i32, "i16": i16, "i8": i8, "u8": u8}
DTYPES = FLOATS | INTS | {"b1": b1}


def converted(sample: Sample, dtype: torch.dtype) -> Sample | None:
    """The sample with another dtype for its first tensor and for those that have the same."""
    first = tensors_of(sample.args)
    if not first:
        return None
    if dtype is first[0].dtype:
        return sample

    def change(x: object) -> object:
        if isinstance(x, (tuple, list)):
            return type(x)(change(item) for item in x)
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype is first[0].dtype else x

    kwargs = {k: change(v) for k, v in sample.kwargs.items()}
    return Sample(change(sample.args), kwargs)


def operations_measured() -> list[Operation]:
    """Those that compute or make views; for lists, the plain function says it."""
    return [
        o
        for o in operations()
        if not o.name.startswith("torch._")
        and not o.reads_values
        and bare_name(o.functions[0]) not in ELSEWHERE
        and not of_ranks(o.functions[0])
        and getattr(o.functions[0], "__name__", "") not in ("__set__", "__delete__")
    ]


def chosen(operation: Operation) -> tuple[Callable, list[Sample]]:
    """The function that is measured, and its samples that eager and capture accept."""
    function = min(operation.functions, key=lambda f: support.rank(support.public_name(f)))
    return function, [s for s in samples_of(function) if not s.refused]


def accepted(function: Callable, samples: list[Sample], dtype: torch.dtype) -> Iterator[Sample]:
    """Samples of a dtype, with elements, that eager computes and a trace takes."""
    for sample in samples:
        if any(not x.numel() for x in tensors_of(sample.args)):
            continue  # of any dtype for some functions
        other, error = outcome(converted, sample, dtype)
        if error is not None or other is None:
            continue
        args, kwargs = other.fresh()
        if outcome(lambda args=args, kwargs=kwargs: function(*args, **kwargs))[1] is not None:
            continue
        args, kwargs = other.fresh()
        step = lambda args=args, kwargs=kwargs: function(*args, **kwargs)  # noqa: E731
        if outcome(captured_of, step)[1] is None:
            yield other


def measured(operation: Operation) -> tuple[str, str]:
    """The dtypes whose results are eager's, and whether there is a gradient."""
    function, samples = chosen(operation)
    names = []
    for name, dtype in DTYPES.items():
        found = next(accepted(function, samples[:12], dtype), None)
        if found is not None:
            check_values(function, found)
            if dtype.is_floating_point and not is_logic_in_place(function):
                check_gradients(function, found)
            names.append(name)
    for group, members in (("ints", INTS), ("floats", FLOATS)):
        if all(name in names for name in members):
            names = [group, *(n for n in names if n not in members)]
    return " ".join(names) or "-", gradient_of(function, samples)


def gradient_of(function: Callable, samples: list[Sample]) -> str:
    for sample in [s for s in samples if s.smooth] + samples:
        if not any(x.is_floating_point() for x in tensors_of(sample.args)):
            continue
        for only_first in (False, True):
            results, error = outcome(step_of(function, sample, only_first=only_first))
            if error is None and any(g is not None for g in results[2]):
                check_gradients(function, sample)
                return "twice" if sample.smooth else "yes"
    return "no"


# Functions whose second derivative is not compared: it is zero, or undefined at kinks.
ONCE = {
    "torch.amax": "ties share the gradient",
    "torch.amin": "ties share the gradient",
    "torch.clamp": "piecewise linear",
    "torch.nn.functional.hardsigmoid": "piecewise linear",
    "torch.threshold": "piecewise linear",
    "torch.masked_fill": "selects",
    "Tensor.__setitem__": "selects",
    "Tensor.bfloat16": "rounds",
    "Tensor.half": "rounds",
    "Tensor.fill_": "the old value has gradient zero",
    "torch.zero_": "the old value has gradient zero",
    "torch.grid_sampler": "eager has no second derivative",
    "torch.grid_sampler_2d": "eager has no second derivative",
    "torch.index_reduce": "ties share the gradient",
    "torch.copysign": "piecewise linear",
    "torch.nextafter": "piecewise linear",
    "torch.nn.functional.grid_sample": "eager has no second derivative",
    "torch.cdist": "eager has no second derivative",
    "torch.pdist": "eager has no second derivative",
    "torch.nn.functional.multi_margin_loss": "eager has no second derivative",
    "torch.nn.functional.multilabel_margin_loss": "eager has no second derivative",
    "torch.cross": "of its samples' second derivatives rounding is left",
    "torch.linalg.cross": "of its samples' second derivatives rounding is left",
    "Tensor.fill_diagonal_": "the old value has gradient zero",
    "torch.rrelu": "piecewise linear",
    "torch.frexp": "piecewise linear",
    "torch.as_strided_scatter": "linear",
    "torch.ctc_loss": "eager has no second derivative",
    "torch.nn.functional.ctc_loss": "eager has no second derivative",
    "torch.segment_reduce": "eager has no second derivative",
    "torch.rrelu_": "piecewise linear",
    "torch.nn.functional.rrelu": "piecewise linear",
}
_methods = [
    "bernoulli_",
    "cauchy_",
    "exponential_",
    "geometric_",
    "log_normal_",
    "normal_",
    "random_",
    "uniform_",
]
_drawn = [f"Tensor.{name}" for name in _methods]
_drawn += [f"torch.nn.init.{name}" for name in ("kaiming_uniform_", "normal_", "uniform_")]
_drawn += ["torch.bernoulli", "torch.normal", "torch.poisson", "torch.nn.init.constant_"]
ONCE |= dict.fromkeys(_drawn, "the old value, or what it is drawn from, has gradient zero")


def test_smooth_functions_are_differentiated_twice(facts):
    once = {name for name, (_, gradient) in facts.items() if gradient == "yes"}
    assert once == set(ONCE) & set(facts)
    assert set(ONCE) <= {o.name for o in operations_measured()}


@pytest.fixture(scope="module")
def facts() -> dict[str, tuple[str, str]]:
    accepting = os.environ.get("TRACEJIT_ACCEPT") == "1"
    return {
        o.name: measured(o) for o in operations_measured() if accepting or sampled(o.name, of=8)
    }


@pytest.mark.sweep(8)
@pytest.mark.parametrize("name", [o.name for o in operations_measured()])
def test_dtypes_that_eager_rejects(name: str):
    """Where eager raises for a dtype, a compiled step raises an error of that kind, or refuses."""
    operation = next(o for o in operations_measured() if o.name == name)
    function, samples = chosen(operation)
    samples = [s for s in samples[:3] if all(x.numel() for x in tensors_of(s.args))]
    for dtype in DTYPES.values():
        for sample in samples:
            other, error = outcome(converted, sample, dtype)
            if error is not None or other is None:
                continue
            args, kwargs = other.fresh()
            error = outcome(lambda a=args, k=kwargs: function(*a, **k))[1]
            if error is None:
                continue
            args, kwargs = other.fresh()
            ours = outcome(call, lambda *_, a=args, k=kwargs: function(*a, **k))[1]
            assert ours is not None and same_error(ours, error), f"{dtype}: {error!r}, not {ours!r}"
            break


def test_golden_support_table(facts):
    """dtypes and gradients as measured; TRACEJIT_ACCEPT=1 rewrites the table."""
    text = "".join("\t".join((name, *row)) + "\n" for name, row in sorted(facts.items()))
    if os.environ.get("TRACEJIT_ACCEPT") == "1":
        support.FACTS.write_text(text)
        operations.cache_clear()
    now = set(support.FACTS.read_text().splitlines())
    assert now >= set(text.splitlines()), "`make accept` rewrites tracejit/support.tsv"
    listed = {line.partition("\t")[0] for line in now}
    assert listed == {o.name for o in operations_measured()}, "`make accept` rewrites the table"


def test_golden_document():
    """docs/operations.md is what `python -m tracejit ops` prints."""
    path, text = ROOT / "docs" / "operations.md", markdown()
    if os.environ.get("TRACEJIT_ACCEPT") == "1":
        path.write_text(text)
    assert path.read_text() == text, "`make accept` rewrites docs/operations.md"


def test_every_rule_is_listed_once():
    listed = [f for o in operations() for f in o.functions]
    assert len(listed) == len(set(listed)) and set(listed) == set(RULES)
    text = markdown()
    assert all(o.names in text or o.name in text for o in operations())


def test_refusals_come_from_the_source():
    said = {r.text for r in refusals()}
    assert "A convolution of no channels or no elements has no rule" in said and len(said) > 50
    assert any("TorchScript" in text for text in said)
    assert "The memory format {…} has no rule" in said
    assert all(r.function for r in refusals())


def test_the_command_line(capsys):
    from tracejit.__main__ import main

    assert main(["ops"]) == 0
    assert capsys.readouterr().out == markdown()
    assert main(["ops", "log_softmax"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("torch: log_softmax; torch.nn.functional: log_softmax; ")
    assert "dtypes: floats   gradient: twice" in out
    assert main(["ops", "leaky_relu"]) == 0
    assert "gradient: twice   element-wise, straight between its kinks" in capsys.readouterr().out
    assert main(["ops", "ldl_factor"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "no supported torch function has 'ldl_factor'" in captured.err
