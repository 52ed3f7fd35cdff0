"""The IR: text that parses back, canonical form, verifier, reference evaluator, rounding."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from support.op_checks import on_samples
from support.op_samples import Sample, each_sample
from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Builder, Graph, Node, Param, Result, Value, Write, verify
from tracejit.ir.interp import evaluate
from tracejit.ir.ops import OPS
from tracejit.ir.text import parse
from tracejit.ir.types import (
    DTYPES,
    Type,
    bf16,
    contiguous_strides,
    f16,
    f32,
    parse_type,
    round_to,
)

STEP = """
step(%0: f32[64,1000] strides (1, 64), %1: f32[1000,10], %2: f64[]@host) {
  %3: f32[64,10] = matmul(%0, %1)        # net.py:12
  %4: f32[64,10] = maximum(%3, 0.0)      # net.py:13
  %5: f32[] = reduce_sum(%4, axes=(0, 1))  # net.py:14
  %6: f64[]@host = host_mul(%2, -0.5)
  %7: f32[1000,10] = mul(%1, %6)
  return %5, %4 strides (1, 64)
  write %1 <- %7
}"""


# --- text --------------------------------------------------------------------------------------


def same_graph(text: str, graph: Graph) -> None:
    again = parse(text)
    assert str(again) == text
    assert again == graph.canonical() or "nan" in text  # nan != nan


@on_samples(each_sample())
def test_every_sample_prints_and_parses_back(name: str, sample: Sample):
    graph = sample.graph(name)
    same_graph(str(graph), graph)
    verify(parse(str(graph)))


def test_text_of_a_step_parses_back():
    graph = parse(STEP)
    verify(graph)
    text = str(graph)
    assert parse(text) == graph
    assert str(parse(text)) == text
    assert graph.params[0].strides == (1, 64)
    assert graph.results[1].strides == (1, 64)
    assert [n.where for n in graph.nodes] == ["net.py:12", "net.py:13", "net.py:14", "", ""]
    assert graph.writes == (Write(graph.params[1].value, graph.nodes[-1].out),)
    assert graph.params[2].value.type.is_host


@pytest.mark.parametrize("literal", [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3, True])
def test_literals_keep_their_bits(literal: float):
    b = Builder()
    x = b.full(literal, shape=(2,), dtype=f32, device="cpu")
    graph = b.graph("f", (Result(x),))
    again = parse(str(graph)).nodes[0].args[0]
    assert type(again) is type(literal)
    assert repr(again) == repr(literal)


def test_a_node_with_several_results_parses_back():
    x, y = Value(1, Type(f32, (3,))), Value(2, Type(DTYPES["i64"], (3,), "cuda:0"))
    node = Node(OPS["alias"], (Value(0, Type(f32, (3,))),), (), (x, y), "net.py:3")
    graph = Graph("f", (Param(node.args[0]),), (node,), (Result(y), Result(x)), ())
    same_graph(str(graph), graph)


def test_a_graph_without_anything_parses_back():
    graph = Builder().graph("empty")
    assert str(graph) == "empty() {\n}"
    assert parse(str(graph)) == graph


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f() {",
        "f(%0: f32[3]) {\n  %1: f32[3] = neg(%2)\n}",
        "f(%0: f32[3]) {\n  %0: f32[3] = neg(%0)\n}",
        "f(%0: f32[3]) {\n  %1: f32[3] = conjure(%0)\n}",
        "f(%0: f32[3]) {\n  %1: f32[3] = neg(%0\n}",
        "f(%0: f32[3]) {\n  %1: f33[3] = neg(%0)\n}",
        "f(%0: f32[3]) {\n  %1: f32[3] = add(%0, x)\n}",
        "f(%0: f32[3]) {\n  %1: f32[3] = add(%0, 1 1)\n}",
        "f(%0: f32[3]) {\n  what is this\n}",
        "f(%0: f32[3]) {\n  return %4\n}",
        "f(%0: f32[3]) {\n  write %0 <- %4\n}",
    ],
)
def test_text_that_is_no_graph_is_refused(text: str):
    with pytest.raises(InvalidGraph):
        parse(text)


def test_types_print_and_parse_back():
    for text in ("f32[]", "bf16[64,1000]", "i64[0]@cuda:1", "f64[]@host"):
        assert str(parse_type(text)) == text
    for text in ("f32", "f32[-1]", "q8[3]", "f32[3"):
        with pytest.raises(InvalidGraph):
            parse_type(text)


# --- values ------------------------------------------------------------------------------------


def test_canonical_graphs_are_equal_whatever_the_numbers():
    def build(first_id: int) -> Graph:
        b = Builder(first_id)
        x = b.param(Type(f32, (5,)))
        return b.graph("f", (Result(b.add(x, b.exp(x))),), (Write(x, b.neg(x)),))

    assert build(0) != build(7)
    assert build(0).canonical() == build(7).canonical()
    assert str(build(0)) == str(build(7))
    assert build(7).canonical().canonical() == build(7).canonical()


def test_dtypes_and_ops_stay_single_objects():
    graph = parse(STEP)
    for again in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert again == graph
        assert again.nodes[0].op is OPS["matmul"]
        assert again.params[0].value.type.dtype is f32


def test_strides_of_row_major_memory():
    assert contiguous_strides((2, 3, 4)) == (12, 4, 1)
    assert contiguous_strides((3, 0, 2)) == torch.empty(3, 0, 2).stride()
    assert contiguous_strides(()) == ()


def test_builder_refuses_a_name_that_is_no_primitive():
    with pytest.raises(AttributeError):
        Builder().conjure()


# --- verifier ----------------------------------------------------------------------------------

X = Value(0, Type(f32, (3, 5)))
Y = Value(1, Type(f32, (3, 5)))
NEG = Node(OPS["neg"], (X,), (), (Y,))
GOOD = Graph("f", (Param(X),), (NEG,), (Result(Y),), (Write(X, Y),))
WRONG_TYPE = Value(1, Type(f32, (5, 3)))

MALFORMED = {
    "reads before definition": replace(GOOD, nodes=(replace(NEG, args=(Value(9, X.type),)),)),
    "reads itself": replace(GOOD, nodes=(replace(NEG, args=(Y,)),)),
    "reads with another type": replace(
        GOOD, nodes=(replace(NEG, args=(Value(0, Type(f32, (3, 6))),)),)
    ),
    "defined twice": replace(GOOD, nodes=(NEG, NEG)),
    "number taken by an input": replace(GOOD, nodes=(replace(NEG, outs=(X,)),)),
    "two inputs of one number": replace(GOOD, params=(Param(X), Param(X))),
    "one number, two types": replace(
        GOOD, nodes=(NEG, Node(OPS["reshape"], (X,), (("shape", (5, 3)),), (WRONG_TYPE,)))
    ),
    "wrong result type": replace(GOOD, nodes=(replace(NEG, outs=(WRONG_TYPE,)),)),
    "too many results": replace(GOOD, nodes=(replace(NEG, outs=(Y, Value(2, Y.type))),)),
    "no results": replace(GOOD, nodes=(replace(NEG, outs=()),)),
    "too many operands": replace(GOOD, nodes=(replace(NEG, args=(X, X)),)),
    "unknown attribute": replace(GOOD, nodes=(replace(NEG, attrs=(("axis", 1),)),)),
    "undefined result": replace(GOOD, results=(Result(Value(9, X.type)),)),
    "undefined value written": replace(GOOD, writes=(Write(X, Value(9, X.type)),)),
    "write to no input": replace(GOOD, writes=(Write(Y, Y),)),
    "written twice": replace(GOOD, writes=(Write(X, Y), Write(X, Y))),
    "write of another type": replace(
        GOOD,
        nodes=(Node(OPS["permute"], (X,), (("axes", (1, 0)),), (WRONG_TYPE,)),),
        results=(),
        writes=(Write(X, WRONG_TYPE),),
    ),
    "input strides of another rank": replace(GOOD, params=(Param(X, (1,)),)),
    "result strides of another rank": replace(GOOD, results=(Result(Y, (1, 3, 15)),)),
}


def test_verify_accepts_a_good_graph():
    verify(GOOD)
    verify(parse(STEP))


@pytest.mark.parametrize("graph", MALFORMED.values(), ids=MALFORMED)
def test_verify_refuses(graph: Graph):
    with pytest.raises(InvalidGraph):
        verify(graph)


# --- reference evaluator -----------------------------------------------------------------------


def test_evaluate_a_step():
    graph = parse(STEP)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 1000), np.float32)
    w = rng.standard_normal((1000, 10), np.float32)
    (loss, hidden), (new_w,) = evaluate(graph, [x, w, 0.25])
    np.testing.assert_array_equal(hidden, np.maximum(x @ w, 0))
    assert loss.shape == ()
    assert loss == np.float32(hidden.astype(np.float64).sum())
    np.testing.assert_array_equal(new_w, w * np.float32(-0.125))


def test_evaluate_rounds_narrow_floats_after_every_node():
    graph = parse("""
    f(%0: bf16[], %1: bf16[3]) {
      %2: bf16[] = exp(%0)
      %3: bf16[1] = reshape(%2, shape=(1,))
      %4: bf16[3] = expand(%3, shape=(3,))
      %5: bf16[3] = mul(%4, %1)
      %6: bf16[3] = add(%5, 0.1)
      %7: bf16[] = reduce_max(%6, axes=(0,))
      return %6
      write %0 <- %7
    }""")
    verify(graph)
    x = torch.tensor(1.5, dtype=torch.bfloat16)
    y = torch.tensor([0.3, -7.0, 100.0], dtype=torch.bfloat16)
    (ours,), (top,) = evaluate(graph, [x.float().numpy(), y.float().numpy()])
    theirs = x.exp() * y + 0.1
    np.testing.assert_array_equal(ours, theirs.float().numpy())
    assert top.shape == ()
    assert top == theirs.max().item()


def test_evaluate_wants_as_many_inputs_as_params():
    with pytest.raises(ValueError):
        evaluate(parse(STEP), [np.zeros((64, 1000))])


# --- rounding ----------------------------------------------------------------------------------

BITS = np.random.default_rng(0).integers(0, 2**32, 50_000, np.uint32)
EDGES = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8, 65504, 65520, 3.4e38, 1e-45],
    np.float32,
)


@pytest.mark.parametrize("dtype, torch_dtype", [(bf16, torch.bfloat16), (f16, torch.float16)])
def test_rounding_is_torchs(dtype, torch_dtype):
    values = np.concatenate([BITS.view(np.float32), EDGES])
    ours = round_to(values, dtype)
    theirs = torch.from_numpy(values).to(torch_dtype).float().numpy()
    np.testing.assert_array_equal(ours, theirs)
    known = ~np.isnan(values)
    np.testing.assert_array_equal(np.signbit(ours)[known], np.signbit(theirs)[known])
    np.testing.assert_array_equal(round_to(ours, dtype), ours)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5)])
def test_rounding_keeps_the_shape(shape: tuple[int, ...]):
    for dtype in DTYPES.values():
        assert round_to(np.ones(shape), dtype).shape == shape
        assert round_to(np.ones((5, 3), np.float32).T, dtype).shape == (3, 5)
