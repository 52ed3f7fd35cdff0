"""Every rule of every primitive on every sample: inference, evaluation, derivatives, printing."""

from __future__ import annotations

import ast
import ctypes
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support.op_checks import (
    ACCUMULATING,
    EPS,
    INEXACT,
    ZERO_SIGN_OPEN,
    assert_same_numbers,
    assert_within,
    on_samples,
    run,
    summed_magnitude,
    tensors_of,
)
from support.op_samples import COLLECTIVES, REFERENCE, SAMPLES, Sample, Tensor, each_sample
from tracejit.codegen import c_text
from tracejit.codegen.c_prelude import C_FLAGS, C_PRELUDE, C_TYPES
from tracejit.codegen.language import PRINTED, Language
from tracejit.codegen.triton_text import TRITON
from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Builder, Graph, Node, Result, Value
from tracejit.ir.interp import evaluate, runnable
from tracejit.ir.ops import NO_GRAD, OPS, Exact, Op
from tracejit.ir.ops.matrix_derivatives import parts
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import Type, b1, f32, f64, i64, round_to, u8

MATRIX_ULPS = 256  # of the largest number in a decomposition or solution
ULPS = 4  # of functions that IEEE does not fix to the bit


def to_torch(array: np.ndarray, dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).to(TO_TORCH[dtype])


def from_torch(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (
        tensor.float().numpy()
        if tensor.dtype in (torch.bfloat16, torch.float16)
        else (tensor.numpy())
    )


def torch_operands(sample: Sample, arrays: list) -> list:
    return [
        to_torch(a, x.dtype) if isinstance(x, Tensor) else a
        for x, a in zip(sample.operands, arrays, strict=True)
    ]


# --- completeness, inference, evaluation -------------------------------------------------------


def test_every_op_has_samples_and_a_reference():
    assert SAMPLES.keys() == OPS.keys()
    assert REFERENCE.keys() == OPS.keys()


@on_samples(each_sample())
@pytest.mark.sweep(0.17)
def test_infer_agrees_with_eval(name: str, sample: Sample):
    graph = sample.graph(name)
    arrays = sample.build()
    with np.errstate(all="ignore"):
        raw = OPS[name].eval(*arrays, **runnable(sample.attrs))
    kind = graph.nodes[0].out.type
    if kind.is_host:
        assert isinstance(raw, str if name == "host_format" else (float, int))
        return
    assert np.shape(raw) == kind.shape
    raw_kind = np.asarray(raw).dtype.kind
    assert raw_kind == kind.dtype.kind or (raw_kind == "i" and kind.dtype.kind == "u")
    result = run(graph, *tensors_of(sample, arrays))
    assert (result.shape, result.dtype) == (kind.shape, kind.dtype.compute)
    assert_same_numbers(round_to(result, kind.dtype), result)


def divides_integers_by_zero(name: str, sample: Sample) -> bool:
    """Eager raises on these; here they are 0."""
    divides = name in ("floordiv", "mod", "fmod") and not sample.is_float
    return divides and np.any(np.equal(sample.build()[1], 0))


@on_samples(each_sample(where=lambda name, sample: not divides_integers_by_zero(name, sample)))
@pytest.mark.sweep(0.17)
def test_eval_against_torch(name: str, sample: Sample):
    arrays = sample.build()
    theirs = REFERENCE[name](*torch_operands(sample, arrays), **sample.attrs)
    graph = sample.graph(name)
    ours = run(graph, *tensors_of(sample, arrays))
    kind = graph.nodes[0].out.type
    if kind.is_host:
        assert ours == theirs
        return
    assert theirs.dtype == TO_TORCH[kind.dtype]
    theirs = from_torch(theirs)
    eps = EPS.get(kind.dtype.name, 0.0)
    if name in ACCUMULATING and kind.dtype.is_float:
        magnitude = summed_magnitude(name, arrays, sample.attrs)
        assert_within(ours, theirs, 16 * max(eps, EPS["f32"]) * magnitude + eps * np.abs(theirs))
    elif name in INEXACT | {"sqrt"} and kind.dtype.is_float:  # eager's sqrt may be off by an ulp
        assert_within(
            ours,
            theirs,
            max(ULPS * EPS["f64" if kind.dtype is f64 else "f32"], eps) * np.abs(theirs) + 1e-30,
        )
    elif OPS[name].family == "matrices":
        if name in ("eigh", "svd"):  # eager's vectors may point the other way; see test_matrices
            ours, theirs = (either_way(name, sample, x) for x in (ours, theirs))
        assert_within(ours, theirs, MATRIX_ULPS * eps * (1 + np.max(np.abs(theirs))))
    elif name == "scan":  # each step has a product, of small numbers
        assert_within(ours, theirs, 8 * eps * (1 + np.abs(theirs)))
    elif name == "floordiv" and kind.dtype.narrow:  # eager rounds between its steps, or does not
        assert_within(ours, theirs, eps * np.abs(theirs))
    else:
        assert_same_numbers(ours, theirs, zero_sign=name not in ZERO_SIGN_OPEN)


def either_way(name: str, sample: Sample, flat: np.ndarray) -> np.ndarray:
    """What of a decomposition is the same whatever the signs of its vectors; of a full one that has
    vectors without a value, the values."""
    m, n = sample.tensors[0].shape[-2:]
    if sample.attrs.get("full") and m != n:
        shapes = parts(name, m, n, **sample.attrs)
        return flat[..., math.prod(shapes[0]) : math.prod(shapes[0]) + shapes[1][0]]
    return np.abs(flat)


@pytest.mark.parametrize("name", ["floordiv", "mod", "fmod"])
def test_integer_division_by_zero_is_zero(name: str):
    x = np.array([5, -5, 0])
    with np.errstate(divide="ignore"):
        assert OPS[name].eval(x, np.zeros(3, np.int64)).tolist() == [0, 0, 0]


def test_integers_to_negative_powers():
    x, z = np.array([2, -1, 1, 0, -1, -3]), np.array([-1, -3, -2, -1, -2, 3])
    theirs = torch.from_numpy(x) ** torch.from_numpy(z)
    np.testing.assert_array_equal(OPS["pow"].eval(x, z), theirs.numpy())


# --- derivatives -------------------------------------------------------------------------------

SMOOTH_AT = ("normal", "positive", "triangle")
DIFFERENTIABLE = {
    name
    for name, op in OPS.items()
    if any(rule is not NO_GRAD for rule in op.vjp) and op.family not in ("source", "loop")
}
# of symmetric matrices; and those that who emits them differentiates
DIFFERENTIABLE -= {"cholesky", "eigh", "lu_solve", "geqrf", *COLLECTIVES}


def vjp_graph(name: str, sample: Sample, dtype=None) -> tuple[Graph, list[int]]:
    """Inputs, then the cotangent in; cotangents of the operands at these positions out."""
    b = Builder()
    args, y = sample.emit(b, name, dtype)
    g = b.param(y.type)
    results, positions = [], []
    for i, (arg, rule) in enumerate(zip(args, OPS[name].rules(len(args)), strict=True)):
        if isinstance(arg, Value) and arg.type.dtype.is_float and rule is not NO_GRAD:
            results.append(Result(rule(b, g, y, *args, **sample.attrs)))
            positions.append(i)
    return b.graph("vjp", tuple(results)), positions


def backward(b: Builder, nodes: list[Node], seed: dict[Value, Value]) -> dict[Value, Value]:
    """Reverse mode over recorded nodes, by the primitives' own rules."""
    found = dict(seed)
    for node in reversed(nodes):
        if node.out not in found:
            continue
        for arg, rule in zip(node.args, node.op.rules(len(node.args)), strict=True):
            if isinstance(arg, Value) and arg.type.dtype.is_float and rule is not NO_GRAD:
                c = rule(b, found[node.out], node.out, *node.args, **dict(node.attrs))
                found[arg] = b.add(found[arg], c) if arg in found else c
    return found


def second_order_graph(name: str, sample: Sample) -> Graph:
    """Inputs, cotangent g, then cotangents w of the first cotangents; d<w, vjp> / d(inputs) out."""
    b = Builder()
    args, y = sample.emit(b, name, f64)
    g = b.param(y.type)
    recorded = list(b.nodes)
    b.on_emit = recorded.append
    floats = [a for a in args if isinstance(a, Value) and a.type.dtype.is_float]
    seed = {}
    firsts = []
    for arg, rule in zip(args, OPS[name].rules(len(args)), strict=True):
        if arg in floats and rule is not NO_GRAD:
            firsts.append(rule(b, g, y, *args, **sample.attrs))
    b.on_emit = None
    for first in firsts:
        w = b.param(first.type)
        seed[first] = b.add(seed[first], w) if first in seed else w
    found = backward(b, recorded, seed)
    zero = [b.full(0.0, shape=a.type.shape, dtype=f64, device="cpu") for a in (*floats, g)]
    results = (found.get(a, z) for a, z in zip((*floats, g), zero, strict=True))
    return b.graph("second", tuple(map(Result, results)))


def varied(name: str, sample: Sample) -> tuple[Tensor, ...]:
    """The operands of a sample, without an index in range."""
    in_range = name in ("gather", "scatter") and sample.tensors[1].fill != "normal"
    return (*sample.tensors[:1], *sample.tensors[2:]) if in_range else sample.tensors


def is_smooth(name: str, sample: Sample) -> bool:
    """Whether finite differences make sense: f32 recipe, run in float64, away from kinks."""
    return (
        name in DIFFERENTIABLE
        and all(t.dtype in (f32, b1) and t.fill in SMOOTH_AT for t in varied(name, sample))
        and sample.attrs.get("dtype", f32).is_float
        and not sample.host
        and not sample.attrs.get("full")  # vectors without a value
        and math.isfinite(sample.attrs.get("value", 0.0))
        and all(x is not False and not (x == -2.0 and name == "pow") for x in sample.operands[:1])
    )


def wide_inputs(sample: Sample, seed: int = 0) -> list[np.ndarray]:
    """The tensors of a sample in float64."""
    arrays = tensors_of(sample, sample.build(seed))
    return [a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays]


def check_directional(f: Callable, xs: list[np.ndarray], gradients: list[np.ndarray], rng) -> None:
    """sum(gradient * direction) against a central difference of the scalar function f."""
    directions = [rng.standard_normal(x.shape) if x.dtype.kind == "f" else None for x in xs]
    step = 1e-6

    def at(t: float) -> float:
        return f([x if v is None else x + t * v for x, v in zip(xs, directions, strict=True)])

    numeric = (at(step) - at(-step)) / (2 * step)
    moving = [v for v in directions if v is not None]
    terms = [np.sum(g * v) for g, v in zip(gradients, moving, strict=True)]
    scale = sum(np.sum(np.abs(g * v)) for g, v in zip(gradients, moving, strict=True))
    assert abs(sum(terms) - numeric) <= 1e-6 * (1 + scale) + 1e-5 * abs(numeric)


# Rounding has no finite difference; it is compared with autograd below.
SMOOTH = each_sample(where=lambda name, sample: is_smooth(name, sample) and name != "cast")


@on_samples(SMOOTH)
def test_vjp_against_finite_differences(name: str, sample: Sample):
    rng = np.random.default_rng(0)
    xs = wide_inputs(sample)
    graph, _ = vjp_graph(name, sample, f64)
    g = rng.standard_normal(graph.params[-1].value.type.shape)
    b = Builder()
    forward = b.graph("f", (Result(sample.emit(b, name, f64)[1]),))
    gradients, _ = evaluate(graph, [*xs, g])
    check_directional(lambda at: np.sum(g * run(forward, *at)), xs, gradients, rng)


@on_samples(SMOOTH)
def test_second_derivatives_against_finite_differences(name: str, sample: Sample):
    rng = np.random.default_rng(1)
    first, _ = vjp_graph(name, sample, f64)
    xs = [*wide_inputs(sample), rng.standard_normal(first.params[-1].value.type.shape)]
    ws = [rng.standard_normal(r.value.type.shape) for r in first.results]
    second = second_order_graph(name, sample)
    gradients, _ = evaluate(second, [*xs, *ws])

    def f(at: list[np.ndarray]) -> float:
        cotangents, _ = evaluate(first, at)
        return sum(np.sum(w * c) for w, c in zip(ws, cotangents, strict=True))

    check_directional(f, xs, gradients, rng)


AUTOGRAD = each_sample(
    where=lambda name, sample: (
        (name in DIFFERENTIABLE or name == "cholesky")
        and name != "svd"  # of which eager's vectors may point the other way
        and any(t.dtype in (f32, f64) for t in sample.tensors)
        and all(t.dtype in (f32, f64, b1) for t in varied(name, sample))
        and sample.attrs.get("dtype", f32).is_float
    )
)


@on_samples(AUTOGRAD)
@pytest.mark.sweep(0.17)
def test_vjp_against_autograd(name: str, sample: Sample):
    arrays = sample.build()
    graph, positions = vjp_graph(name, sample)
    rng = np.random.default_rng(2)
    kind = graph.params[-1].value.type
    g = round_to(rng.uniform(0.5, 2.0, kind.shape), kind.dtype)
    ours, _ = evaluate(graph, [*tensors_of(sample, arrays), g])
    operands = torch_operands(sample, arrays)
    leaves = [operands[i].requires_grad_() for i in positions]
    y = REFERENCE[name](*operands, **sample.attrs)
    theirs = torch.autograd.grad(y, leaves, to_torch(g, kind.dtype), allow_unused=True)
    for mine, leaf, their in zip(ours, leaves, theirs, strict=True):
        their = torch.zeros_like(leaf) if their is None else their
        eps = torch.finfo(leaf.dtype).eps
        want = from_torch(their)
        allowed = 8 * eps * np.abs(want) + 1e-30
        if name in ("matmul", "expand") or OPS[name].family == "attention":
            allowed = allowed + 64 * eps * (1 + np.sum(np.abs(g)))
        elif OPS[name].family == "matrices":
            allowed = allowed + MATRIX_ULPS * eps * (1 + np.max(np.abs(want))) * len(want)
        elif name in ("accumulate", "recurrence"):  # sums whose terms cancel
            allowed = allowed + 64 * eps * np.max(np.abs(want), initial=0)
        elif name in ("tanh", "expm1"):  # 1 - y * y and y + 1 cancel
            allowed = allowed + 8 * eps * g
        assert_within(mine, want, allowed)


# --- malformed uses ----------------------------------------------------------------------------


def types(**kinds: Type) -> dict[str, Type]:
    return kinds


X = Type(f32, (3, 5))
HOW = {"causal": False, "scale": 1.0}
N = Type(i64, (3, 5))
U = Type(u8, (3, 5))
C = Type(b1, (3, 5))
H = Type(f64, (), "host")
AT = {"shape": (3, 5), "dtype": f32, "device": "cpu"}

MALFORMED = [
    ("add", (X,), {}),
    ("add", (X, X, X), {}),
    ("add", (1.0, 2.0), {}),
    ("add", (H, 2.0), {}),
    ("add", (X, Type(f32, (5, 3))), {}),
    ("add", (X, Type(f64, (3, 5))), {}),
    ("add", (X, Type(f32, (3, 5), "cuda:0")), {}),
    ("add", (X, X), {"axis": 1}),
    ("add", (N, 0.5), {}),
    ("add", (N, H), {}),
    ("add", (C, 1), {}),
    ("add", (U, 256), {}),
    ("add", (U, -1), {}),
    ("eq", (N, 0.5), {}),
    ("neg", (C,), {}),
    ("sub", (C, C), {}),
    ("abs", (C,), {}),
    ("exp", (N,), {}),
    ("div", (N, N), {}),
    ("floor", (N,), {}),
    ("not", (X,), {}),
    ("and", (X, X), {}),
    ("shl", (C, C), {}),
    ("philox", (C, C), {}),
    ("pow", (C, C), {}),
    ("floordiv", (C, C), {}),
    ("where", (X, X, X), {}),
    ("where", (True, X, X), {}),
    ("where", (C, 1.0, 2.0), {}),
    ("where", (C, X, N), {}),
    ("where", (C, Type(f32, (5,)), 0.0), {}),
    ("cast", (X,), {}),
    ("cast", (X,), {"dtype": "f32"}),
    ("cast", (2.0,), {"dtype": f32}),
    ("cast", (H,), {"dtype": f32}),
    ("reshape", (X,), {"shape": (4, 4)}),
    ("reshape", (X,), {"shape": (-3, -5)}),
    ("reshape", (2.0,), {"shape": ()}),
    ("permute", (X,), {"axes": (0, 0)}),
    ("permute", (X,), {"axes": (0,)}),
    ("permute", (X,), {"axes": (0, -1)}),
    ("expand", (X,), {"shape": (3, 6)}),
    ("expand", (X,), {"shape": (1, 3, 5)}),
    ("slice", (X,), {"starts": (0,), "stops": (3,), "steps": (1,)}),
    ("slice", (X,), {"starts": (0, 0), "stops": (4, 5), "steps": (1, 1)}),
    ("slice", (X,), {"starts": (2, 0), "stops": (1, 5), "steps": (1, 1)}),
    ("slice", (X,), {"starts": (0, 0), "stops": (3, 5), "steps": (1, 0)}),
    ("pad", (X,), {"low": (0,), "high": (0,), "interior": (0,), "value": 0}),
    ("pad", (X,), {"low": (0, -1), "high": (0, 0), "interior": (0, 0), "value": 0}),
    ("pad", (X,), {"low": (0, 0), "high": (0, 0), "interior": (0, 0), "value": None}),
    ("reduce_sum", (X,), {"axes": (2,)}),
    ("reduce_sum", (X,), {"axes": (0, 0)}),
    ("reduce_sum", (X,), {"axes": (-1,)}),
    ("reduce_max", (Type(f32, (0, 3)),), {"axes": (0,)}),
    ("reduce_min", (X,), {"axes": (2,)}),
    ("window", (X,), {"axes": (0, 0), "stride": 1, "dilation": 1, "count": 1}),
    ("window", (X,), {"axes": (0, 1), "stride": 1, "dilation": 1, "count": 9}),
    ("unwindow", (X,), {"axes": (0, 1), "stride": 0, "dilation": 1, "length": 9}),
    ("unwindow", (X,), {"axes": (0, 1), "stride": 1, "dilation": 1, "length": 1}),
    ("flip", (X,), {"axes": (0, 0)}),
    ("flip", (X,), {"axes": (-1,)}),
    ("gather", (X, X), {"axis": 0}),
    ("gather", (X, N), {"axis": 2}),
    ("gather", (X, Type(i64, (4, 4))), {"axis": 0}),
    ("gather", (X, Type(i64, (3,))), {"axis": 0}),
    ("scatter", (X, X, X), {"axis": 0, "combine": "last"}),
    ("scatter", (C, N, C), {"axis": 0, "combine": "add"}),
    ("scatter", (X, N, X), {"axis": 0, "combine": "sub"}),
    ("scatter", (X, N, C), {"axis": 0, "combine": "last"}),
    ("matmul", (X, X), {}),
    ("matmul", (X, Type(f64, (5, 4))), {}),
    ("matmul", (X, Type(f32, (5,))), {}),
    ("matmul", (Type(f32, (2, 3, 5)), Type(f32, (1, 5, 3))), {}),
    ("matmul", (C, Type(b1, (5, 3))), {}),
    ("matmul", (X, 2.0), {}),
    ("attention", (X, X, X, X), HOW),  # a bias that has another shape than scores
    ("attention", (X, X, C, 0.0), HOW),
    ("attention", (X, X, 1.0, 0.0), HOW),
    ("attention", (X, X, X, 1.0), HOW),
    ("attention", (X, Type(f64, (3, 5)), X, 0.0), HOW),
    ("attention", (X, X, X, 0.0), {"causal": False}),
    ("attention", (X, X, X, 0.0, X), HOW),  # noise that has another shape than scores
    ("attention", (X, X, X), HOW),
    ("attention", (X, X, X, 0.0, Type(f32, (3, 3)), Type(f32, (3, 3))), HOW),
    ("attention_lse", (N, N, 0.0), HOW),
    ("attention_lse", (Type(f32, (0, 5)), X, 0.0), HOW),
    ("attention_lse", (Type(f32, (2, 3, 5)), Type(f32, (1, 3, 5)), 0.0), HOW),
    ("attention_dq", (X, X, X, 0.0, X, Type(f32, (3,)), X), HOW),
    ("attention_dk", (X, X, X, 0.0, Type(f32, (3,)), Type(f32, (3,)), N), HOW),
    ("full", (X,), AT),
    ("full", (1.0,), {"shape": (3,)}),
    ("full", (1.0,), AT | {"shape": (-1,)}),
    ("iota", (), AT | {"axis": 2}),
    ("iota", (), AT | {"axis": 0, "shape": ()}),
    ("host_add", (H, X), {}),
    ("host_neg", (H, H), {}),
]


@pytest.mark.parametrize("name, operands, attrs", MALFORMED, ids=lambda x: str(x))
def test_malformed_uses_are_refused(name: str, operands: tuple, attrs: dict):
    b = Builder()
    args = [b.param(x) if isinstance(x, Type) else x for x in operands]
    with pytest.raises(InvalidGraph):
        b.emit(OPS[name], *args, **attrs)


# --- templates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("language", [c_text.C, TRITON], ids=lambda language: language.name)
def test_a_table_without_an_entry_is_refused(language: Language):
    """A table has an entry for each primitive that is printed, and no other."""
    assert language.templates.keys() == PRINTED
    short = {name: text for name, text in language.templates.items() if name != "exp"}
    for wrong in (short, {**language.templates, "matmul": "{0}"}):
        with pytest.raises(InvalidGraph, match=r"table and OPS differ: \['(exp|matmul)'\]"):
            replace(language, templates=wrong)


def test_triton_templates_call_helpers_that_exist():
    tree = ast.parse(Path("kernels/device.py").resolve().read_text())
    helpers = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for name, template in TRITON.templates.items():
        for text in template.values() if isinstance(template, dict) else [template]:
            missing = set(re.findall(r"\btj\.(\w+)", text)) - helpers
            assert not missing, f"{name} calls {missing}, which kernels/device.py lacks"


def test_an_op_without_a_fact_is_refused():
    facts = {"cost": 1, "exact": Exact.BITS, "rounds": True, "host": None}
    for fact in facts:
        with pytest.raises(TypeError, match=fact):
            others = {name: value for name, value in facts.items() if name != fact}
            Op("new", "elementwise", np.exp, np.exp, (NO_GRAD,), **others)
    assert "new" not in OPS


def c_variants() -> list[tuple[str, Sample]]:
    """Element-wise samples whose operands are all tensors, each function once."""
    return each_sample(
        where=lambda name, sample: (
            OPS[name].family == "elementwise"
            and len(sample.tensors) == len(sample.operands)
            and sample.tensors[0].shape not in ((), (0,))
        )
    )


def c_function(name: str, sample: Sample) -> tuple[str, str]:
    """(its name, its text) of a C loop that applies the template to arrays."""
    op = OPS[name]
    result = sample.graph(name).nodes[0].out.type.dtype
    operand = sample.tensors[-1].dtype
    letters = "xyz"[: len(sample.tensors)]
    target = C_TYPES[result.name]
    text = c_text.C.template(op, operand, result)
    text = text.replace("{f}", "" if operand is f64 else "f").replace("{T}", target)
    text = text.format(*(f"{c}[i]" for c in letters))
    label = "_".join(["op", name, *(t.dtype.name for t in sample.tensors), result.name])
    inputs = ", ".join(
        f"const {C_TYPES[t.dtype.name]}* {c}" for t, c in zip(sample.tensors, letters, strict=True)
    )
    signature = f"void {label}({inputs}, {target}* out, int64_t n)"
    return label, f"{signature} {{ for (int64_t i = 0; i < n; i++) out[i] = {text}; }}"


@pytest.fixture(scope="module")
def c_library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("c")
    functions = dict(c_function(name, sample) for name, sample in c_variants())
    (folder / "ops.c").write_text(C_PRELUDE + "\n".join(functions.values()) + "\n")
    command = [compiler, "-O1", *C_FLAGS, "-Wall", "-Werror", "-Wno-unused-function"]
    command += ["-shared", "-fPIC", "-o", "ops.so", "ops.c", "-lm"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "ops.so"))


@on_samples(c_variants())
@pytest.mark.sweep(0.17)
def test_c_templates_against_eval(name: str, sample: Sample, c_library: ctypes.CDLL):
    arrays = [np.ascontiguousarray(a) for a in sample.build()]
    graph = sample.graph(name)
    kind = graph.nodes[0].out.type.dtype
    want = run(graph, *arrays)
    out = np.empty(want.shape, kind.compute)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*arrays, out)]
    getattr(c_library, c_function(name, sample)[0])(*pointers, ctypes.c_int64(out.size))
    ours = round_to(out, kind)
    if name in INEXACT and kind.is_float:
        ulps = max(ULPS * EPS["f64" if kind is f64 else "f32"], EPS[kind.name] * kind.narrow)
        assert_within(ours, want, ulps * np.abs(want) + 1e-30)
    else:
        assert_same_numbers(ours, want, zero_sign=name not in ZERO_SIGN_OPEN)


def test_second_order_of_a_chain():
    """d2/dx2 of sum(tanh(x) ** 3) against the closed form."""
    b = Builder()
    x = b.param(Type(f64, (5,)))
    recorded: list[Node] = []
    b.on_emit = recorded.append
    y = b.reduce_sum(b.pow(b.tanh(x), 3.0), axes=(0,))
    one = b.full(1.0, shape=(), dtype=f64, device="cpu")
    first = backward(b, list(recorded), {y: one})[x]
    again = b.full(1.0, shape=(5,), dtype=f64, device="cpu")
    second = backward(b, list(recorded), {first: again})[x]
    graph = b.graph("f", (Result(second),))
    at = np.array([-1.0, -0.3, 0.0, 0.4, 2.0])
    t = np.tanh(at)
    s = 1 - t * t
    np.testing.assert_allclose(run(graph, at), 6 * t * s * s - 6 * t**3 * s, atol=1e-12)
    assert math.isfinite(float(np.sum(t)))
