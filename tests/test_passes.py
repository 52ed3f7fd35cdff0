"""Passes: text in, text out for every rule; and on random graphs, the same bits in and out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from support.op_samples import SAMPLES, SPECIAL, Tensor
from tracejit import knobs
from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Builder, Graph, Result, Value, Write, verify
from tracejit.ir.interp import evaluate
from tracejit.ir.ops import BITS, OPS
from tracejit.ir.text import parse
from tracejit.ir.types import DType, Type, b1, bf16, f16, f32, f64, i32, round_to, u8
from tracejit.passes import PIPELINE, dce, optimize, simplify
from tracejit.passes.cone import cone
from tracejit.passes.segments import segments

HEADER = "f(%0: f32[4], %1: f32[4], %2: b1[4], %3: bf16[4], %4: i32[4], %5: f32[3,1,4], "
HEADER += "%6: f64[]@host, %7: b1[1], %8: i32[1,4]) {\n"
NEXT = 9  # the first value that a rule's text defines


def small(body: str) -> Graph:
    """A graph of the inputs above; the last value defined is returned."""
    lines = [line.strip() for line in body.strip().splitlines()]
    last = "" if lines[-1].startswith("return") else f"return {lines[-1].split(':')[0]}"
    return parse(HEADER + "\n".join([*lines, last, "}"]))


def full(number: int, kind: str, value: object, shape: str = "(4,)") -> str:
    dtype = kind.partition("[")[0]
    return f'%{number}: {kind} = full({value}, shape={shape}, dtype={dtype}, device="cpu")'


def rule(name: str, before: str, after: str):
    return pytest.param(before, after, id=name)


# Each row: what a graph computes before, what it computes once simplified and cleaned.
FOLD_CASES = [
    rule(
        "fold_exact: arithmetic of constants",
        f"{full(9, 'f32[4]', 0.1)}\n{full(10, 'f32[4]', 0.2)}\n%11: f32[4] = add(%9, %10)",
        full(9, "f32[4]", 0.30000001192092896),
    ),
    rule(
        "fold_exact: rounds to the dtype",
        f"{full(9, 'bf16[4]', 1.0)}\n%10: bf16[4] = add(%9, 0.001)",
        full(9, "bf16[4]", 1.0),
    ),
    rule(
        "fold_exact: a comparison gives a bool",
        f"{full(9, 'f32[4]', 'nan')}\n%10: b1[4] = eq(%9, %9)",
        full(9, "b1[4]", False),
    ),
    rule(
        "fold_exact: division by zero",
        f"{full(9, 'f32[4]', 1.0)}\n%10: f32[4] = div(%9, -0.0)",
        full(9, "f32[4]", "-inf"),
    ),
    rule(
        "fold_exact: a cast",
        f"{full(9, 'f32[4]', -2.75)}\n%10: i32[4] = cast(%9, dtype=i32)",
        full(9, "i32[4]", -2),
    ),
    rule(
        "fold_exact: not a cast that platforms differ on",
        f"{full(9, 'f32[4]', '1e10')}\n%10: i32[4] = cast(%9, dtype=i32)",
        f"{full(9, 'f32[4]', '1e10')}\n%10: i32[4] = cast(%9, dtype=i32)",
    ),
    rule(
        "fold_exact: not exp, whose last bit is the device's",
        f"{full(9, 'f32[4]', 2.0)}\n%10: f32[4] = exp(%9)",
        f"{full(9, 'f32[4]', 2.0)}\n%10: f32[4] = exp(%9)",
    ),
    rule(
        "fold_exact: not maximum, whose zero has no fixed sign",
        f"{full(9, 'f32[4]', 0.0)}\n%10: f32[4] = maximum(%9, -0.0)",
        f"{full(9, 'f32[4]', 0.0)}\n%10: f32[4] = maximum(%9, -0.0)",
    ),
    rule(
        "literal_operands: next to a tensor",
        f"{full(9, 'f32[4]', 2.5)}\n%10: f32[4] = sub(%9, %0)",
        "%9: f32[4] = sub(2.5, %0)",
    ),
    rule(
        "literal_operands: rounded to the dtype first",
        f"{full(9, 'bf16[4]', 0.1)}\n%10: bf16[4] = mul(%3, %9)",
        "%9: bf16[4] = mul(%3, 0.10009765625)",
    ),
    rule(
        "literal_operands: one tensor remains",
        f"{full(9, 'f32[4]', 2.0)}\n{full(10, 'f32[4]', 0.5)}\n%11: f32[4] = pow(%9, %10)",
        f"{full(9, 'f32[4]', 2.0)}\n%10: f32[4] = pow(%9, 0.5)",
    ),
    rule(
        "literal_operands: where keeps a branch and the condition",
        f"{full(9, 'f32[4]', 2.0)}\n{full(10, 'f32[4]', 0.5)}\n%11: f32[4] = where(%2, %9, %10)",
        f"{full(9, 'f32[4]', 2.0)}\n%10: f32[4] = where(%2, %9, 0.5)",
    ),
    rule(
        "literal_operands: not a runtime scalar",
        f"{full(9, 'f32[4]', '%6')}\n%10: f32[4] = add(%0, %9)",
        f"{full(9, 'f32[4]', '%6')}\n%10: f32[4] = add(%0, %9)",
    ),
    rule(
        "constant_condition: true",
        f"{full(9, 'b1[4]', True)}\n%10: f32[4] = where(%9, %0, %1)\n%11: f32[4] = neg(%10)",
        "%9: f32[4] = neg(%0)",
    ),
    rule(
        "constant_condition: false, of a literal",
        f"{full(9, 'b1[4]', False)}\n%10: f32[4] = where(%9, %0, 3.0)",
        full(9, "f32[4]", 3.0),
    ),
    rule(
        "constant_condition: of a runtime scalar",
        f"{full(9, 'b1[4]', True)}\n%10: f32[4] = where(%9, %6, %0)",
        full(9, "f32[4]", "%6"),
    ),
    rule(
        "moved_constant: reshape, expand, permute, slice",
        f"{full(9, 'f32[]', -0.0, '()')}\n%10: f32[1,1] = reshape(%9, shape=(1, 1))\n"
        "%11: f32[3,4] = expand(%10, shape=(3, 4))\n%12: f32[4,3] = permute(%11, axes=(1, 0))\n"
        "%13: f32[2,3] = slice(%12, starts=(0, 0), stops=(4, 3), steps=(2, 1))",
        full(9, "f32[2,3]", -0.0, "(2, 3)"),
    ),
    rule(
        "moved_constant: a runtime scalar",
        f"{full(9, 'f32[]', '%6', '()')}\n%10: f32[1] = reshape(%9, shape=(1,))",
        full(9, "f32[1]", "%6", "(1,)"),
    ),
    rule(
        "padded_constant",
        f"{full(9, 'f32[4]', 0.0)}\n"
        "%10: f32[9] = pad(%9, low=(1,), high=(1,), interior=(1,), value=0)",
        full(9, "f32[9]", 0.0, "(9,)"),
    ),
    rule(
        "padded_constant: not with a zero of another sign",
        f"{full(9, 'f32[4]', 0.0)}\n"
        "%10: f32[5] = pad(%9, low=(1,), high=(0,), interior=(0,), value=-0.0)",
        f"{full(9, 'f32[4]', 0.0)}\n"
        "%10: f32[5] = pad(%9, low=(1,), high=(0,), interior=(0,), value=-0.0)",
    ),
    rule(
        "extremum_of_constant",
        f"{full(9, 'f32[4]', -0.5)}\n%10: f32[] = reduce_max(%9, axes=(0,))",
        full(9, "f32[]", -0.5, "()"),
    ),
    rule(
        "sum_of_constant: small integers",
        f"{full(9, 'f32[3,4]', -2.0, '(3, 4)')}\n%10: f32[3] = reduce_sum(%9, axes=(1,))",
        full(9, "f32[3]", -8.0, "(3,)"),
    ),
    rule(
        "sum_of_constant: fractions, of the element as it is",
        f"{full(9, 'f32[3]', 0.1, '(3,)')}\n%10: f32[] = reduce_sum(%9, axes=(0,))",
        full(9, "f32[]", 0.30000001192092896, "()"),
    ),
    rule(
        "sum_of_constant: of nothing",
        f"{full(9, 'f32[4,0]', 'inf', '(4, 0)')}\n%10: f32[4] = reduce_sum(%9, axes=(1,))",
        full(9, "f32[4]", 0.0),
    ),
    rule(
        "sum_of_constant: not of integers that leave their dtype",
        f"{full(9, 'i32[4]', 2**30)}\n%10: i32[] = reduce_sum(%9, axes=(0,))",
        f"{full(9, 'i32[4]', 2**30)}\n%10: i32[] = reduce_sum(%9, axes=(0,))",
    ),
]

X = "return %0"
IDENTITY_CASES = [
    rule("identity_op", "%9: f32[4] = alias(%0)", X),
    rule("times_one: right", "%9: f32[4] = mul(%0, 1.0)", X),
    rule("times_one: left", "%9: f32[4] = mul(1, %0)", X),
    rule("times_one: a full", f"{full(9, 'f32[4]', 1.0)}\n%10: f32[4] = mul(%9, %0)", X),
    rule("times_one: of a runtime scalar", *["%9: f32[4] = mul(%0, %6)"] * 2),
    rule("right_one: div", "%9: f32[4] = div(%0, 1.0)", X),
    rule("right_one: not 1 / x", *["%9: f32[4] = div(1.0, %0)"] * 2),
    rule("right_one: pow", "%9: f32[4] = pow(%0, 1.0)", X),
    rule("right_one: not 1 ** x", *["%9: f32[4] = pow(1.0, %0)"] * 2),
    rule("twice: neg", "%9: f32[4] = neg(%0)\n%10: f32[4] = neg(%9)", X),
    rule("twice: not", "%9: b1[4] = not(%2)\n%10: b1[4] = not(%9)", "return %2"),
    rule("same_type: cast", "%9: f32[4] = cast(%0, dtype=f32)", X),
    rule("same_type: not a narrowing cast", *["%9: bf16[4] = cast(%0, dtype=bf16)"] * 2),
    rule("same_type: reshape", "%9: f32[4] = reshape(%0, shape=(4,))", X),
    rule("same_type: expand", "%9: f32[4] = expand(%0, shape=(4,))", X),
    rule(
        "composed: reshape",
        "%9: f32[2,2] = reshape(%0, shape=(2, 2))\n%10: f32[1,4] = reshape(%9, shape=(1, 4))",
        "%9: f32[1,4] = reshape(%0, shape=(1, 4))",
    ),
    rule(
        "composed: reshape there and back",
        "%9: f32[2,2] = reshape(%0, shape=(2, 2))\n%10: f32[4] = reshape(%9, shape=(4,))",
        X,
    ),
    rule(
        "composed: expand",
        "%9: i32[3,4] = expand(%8, shape=(3, 4))\n%10: i32[3,4] = expand(%9, shape=(3, 4))",
        "%9: i32[3,4] = expand(%8, shape=(3, 4))",
    ),
    rule("permute_in_order", "%9: f32[3,1,4] = permute(%5, axes=(0, 1, 2))", "return %5"),
    rule(
        "permute_composed",
        "%9: f32[4,3,1] = permute(%5, axes=(2, 0, 1))\n"
        "%10: f32[3,4,1] = permute(%9, axes=(1, 0, 2))",
        "%9: f32[3,4,1] = permute(%5, axes=(0, 2, 1))",
    ),
    rule(
        "permute_composed: there and back",
        "%9: f32[4,3,1] = permute(%5, axes=(2, 0, 1))\n"
        "%10: f32[3,1,4] = permute(%9, axes=(1, 2, 0))",
        "return %5",
    ),
    rule("slice_of_all", "%9: f32[4] = slice(%0, starts=(0,), stops=(4,), steps=(1,))", X),
    rule(
        "pad_by_nothing",
        "%9: f32[4] = pad(%0, low=(0,), high=(0,), interior=(0,), value=1.0)",
        X,
    ),
    rule("equal_branches: one value", "%9: f32[4] = where(%2, %0, %0)", X),
    rule(
        "equal_branches: equal nodes",
        "%9: f32[4] = exp(%0)\n%10: f32[4] = alias(%0)\n%11: f32[4] = exp(%10)\n"
        "%12: f32[4] = where(%2, %9, %11)",
        "%9: f32[4] = exp(%0)",
    ),
    rule(
        "equal_branches: equal constants",
        f"{full(9, 'f32[4]', 2.0)}\n%10: f32[4] = where(%2, %9, 2.0)",
        full(9, "f32[4]", 2.0),
    ),
    rule(
        "equal_branches: not zeros of two signs",
        f"{full(9, 'f32[4]', 0.0)}\n%10: f32[4] = where(%2, %9, -0.0)",
        f"{full(9, 'f32[4]', 0.0)}\n%10: f32[4] = where(%2, %9, -0.0)",
    ),
    rule(
        "reduce_nothing: extent 1",
        "%9: f32[3,4] = reduce_max(%5, axes=(1,))",
        "%9: f32[3,4] = reshape(%5, shape=(3, 4))",
    ),
    rule("reduce_nothing: no axes", "%9: f32[4] = reduce_min(%0, axes=())", X),
    rule(
        "reduce_nothing: a sum of integers",
        "%9: i32[4] = reduce_sum(%8, axes=(0,))",
        "%9: i32[4] = reshape(%8, shape=(4,))",
    ),
    rule(
        "reduce_nothing: not a float sum, whose -0.0 becomes 0.0",
        *["%9: f32[3,4] = reduce_sum(%5, axes=(1,))"] * 2,
    ),
    rule("not an identity: x + 0.0", *["%9: f32[4] = add(%0, 0.0)"] * 2),
    rule("not an identity: x * 0.0", *["%9: f32[4] = mul(%0, 0.0)"] * 2),
]

MERGE_CASES = [
    rule(
        "equal nodes",
        "%9: f32[4] = add(%0, %1)\n%10: f32[4] = add(%0, %1)\n%11: f32[4] = mul(%9, %10)",
        "%9: f32[4] = add(%0, %1)\n%10: f32[4] = mul(%9, %9)",
    ),
    rule(
        "attributes in any order",
        "%9: f32[2] = slice(%0, starts=(0,), stops=(2,), steps=(1,))\n"
        "%10: f32[2] = slice(%0, steps=(1,), stops=(2,), starts=(0,))\n%11: f32[2] = add(%9, %10)",
        "%9: f32[2] = slice(%0, starts=(0,), stops=(2,), steps=(1,))\n%10: f32[2] = add(%9, %9)",
    ),
    rule(
        "not literals that differ in the sign of zero",
        *["%9: f32[4] = mul(%0, 0.0)\n%10: f32[4] = mul(%0, -0.0)\n%11: f32[4] = add(%9, %10)"] * 2,
    ),
    rule(
        "not attributes that differ in the sign of zero",
        *[
            "%9: f32[5] = pad(%0, low=(1,), high=(0,), interior=(0,), value=0.0)\n"
            "%10: f32[5] = pad(%0, low=(1,), high=(0,), interior=(0,), value=-0.0)\n"
            "%11: f32[5] = add(%9, %10)"
        ]
        * 2,
    ),
    rule(
        "host arithmetic",
        "%9: f64[]@host = host_mul(%6, 2.0)\n%10: f64[]@host = host_mul(%6, 2.0)\n"
        "%11: f32[4] = mul(%0, %9)\n%12: f32[4] = mul(%11, %10)",
        "%9: f64[]@host = host_mul(%6, 2.0)\n%10: f32[4] = mul(%0, %9)\n%11: f32[4] = mul(%10, %9)",
    ),
]


@pytest.mark.parametrize("before, after", FOLD_CASES + IDENTITY_CASES + MERGE_CASES)
def test_rule(before: str, after: str):
    graph = small(before)
    verify(graph)
    assert str(dce(simplify(graph))) == str(small(after))


def test_merging_keeps_the_first_line():
    graph = simplify(
        small("%9: f32[4] = exp(%0)  # a.py:1\n%10: f32[4] = exp(%0)  # a.py:2\nreturn %9, %10")
    )
    assert [n.where for n in graph.nodes] == ["a.py:1"]
    assert graph.results[0] == graph.results[1]


def test_a_rewritten_node_keeps_its_line():
    graph = simplify(
        small(
            "%9: f32[2,2] = reshape(%0, shape=(2, 2))  # a.py:1\n"
            "%10: f32[1,4] = reshape(%9, shape=(1, 4))  # a.py:2"
        )
    )
    assert graph.nodes[-1].where == "a.py:2"


def test_dce_keeps_what_results_and_writes_read():
    text = """
    f(%0: f32[4], %1: f32[4], %2: f64[]@host) {
      %3: f32[4] = exp(%0)
      %4: f64[]@host = host_mul(%2, 2.0)
      %5: f32[4] = neg(%3)
      %6: f32[4] = mul(%1, %4)
      %7: f32[4] = add(%5, %6)
      return %5
      write %1 <- %6
    }"""
    after = """
    f(%0: f32[4], %1: f32[4], %2: f64[]@host) {
      %3: f32[4] = exp(%0)
      %4: f64[]@host = host_mul(%2, 2.0)
      %5: f32[4] = neg(%3)
      %6: f32[4] = mul(%1, %4)
      return %5
      write %1 <- %6
    }"""
    assert str(dce(parse(text))) == str(parse(after))


def test_a_cone_is_what_some_values_need_and_writes_nothing():
    graph = parse("""
    f(%0: f32[4], %1: f32[4], %2: f64[]@host, %3: f32[2,2] strides (1, 2)) {
      %4: f32[4] = exp(%0)
      %5: f64[]@host = host_mul(%2, 2.0)
      %6: f32[4] = neg(%4)
      %7: f32[4] = mul(%1, %5)
      %8: f32[4] = add(%6, %7)
      %9: b1[4] = gt(%7, 0.0)
      return %8
      write %1 <- %7
    }""")
    nine = graph.nodes[-1].out
    small, read = cone(graph, (nine,), "checks")
    assert str(small) == str(
        parse("""
    checks(%1: f32[4], %2: f64[]@host) {
      %5: f64[]@host = host_mul(%2, 2.0)
      %7: f32[4] = mul(%1, %5)
      %9: b1[4] = gt(%7, 0.0)
      return %9
    }""")
    )
    assert read == (1, 2)
    verify(small)
    given = graph.params[3]  # a value that nothing computes is copied, in its own layout
    copied, read = cone(graph, (nine, given.value, nine), "checks")
    assert read == (1, 2, 3) and copied.params[2] == given
    assert [r.value for r in copied.results] == [nine, given.value, nine]
    verify(copied)
    assert cone(graph, (), "nothing") == (Graph("nothing", (), (), (), ()), ())


def test_results_and_writes_follow_what_replaced_them():
    text = """
    f(%0: f32[4], %1: f32[4]) {
      %2: f32[4] = mul(%0, 1.0)
      %3: f32[4] = alias(%2)
      return %3 strides (1,)
      write %1 <- %2
    }"""
    after = """
    f(%0: f32[4], %1: f32[4]) {
      return %0 strides (1,)
      write %1 <- %0
    }"""
    assert str(optimize(parse(text))) == str(parse(after))


def test_passes_leave_their_input_alone():
    graph = small("%9: f32[4] = alias(%0)\n%10: f32[4] = neg(%9)\n%11: f32[4] = neg(%9)")
    before = str(graph)
    optimize(graph)
    assert str(graph) == before


# --- driver ------------------------------------------------------------------------------------


def test_optimize_shows_each_pass_and_returns_a_canonical_graph():
    seen = []
    graph = small("%9: f32[4] = exp(%0)\n%10: f32[4] = neg(%1)")
    result = optimize(graph, on_pass=lambda name, after: seen.append((name, len(after.nodes))))
    names = ("dce", "find_attention", "split_rows", "put_in_buckets")
    assert seen == [("roll_up", 2), ("simplify", 2), *((name, 1) for name in names)]
    assert [name for name, _ in seen] == [run.__name__ for run in PIPELINE]
    assert result == result.canonical()


def test_optimize_verifies_when_asked(monkeypatch):
    x, y = Value(0, Type(f32, (4,))), Value(1, Type(f32, (5,)))
    b = Builder()
    b.param(x.type)
    bad = b.graph("f", (Result(y),))
    monkeypatch.setenv("TRACEJIT_VERIFY", "1")
    assert knobs.verify()
    with pytest.raises(InvalidGraph):
        optimize(bad)


# --- random graphs -----------------------------------------------------------------------------

UNARY = {
    "f": ("neg", "abs", "sign", "sqrt", "exp", "tanh", "floor", "trunc", "alias"),
    "i": ("neg", "abs", "not", "alias"),
    "u": ("neg", "not", "alias"),
    "b": ("not", "alias"),
}
BINARY = {
    "f": ("add", "sub", "mul", "div", "mod", "eq", "lt"),
    "i": ("add", "sub", "mul", "and", "or", "xor", "ne", "ge"),
    "u": ("add", "sub", "mul", "and", "le"),
    "b": ("and", "or", "xor", "add", "mul", "eq"),
}
LITERALS = {
    "f": (1.0, 1, 0.0, 0.0, 0, -0.0, 0.1, -2.0, math.inf, math.nan),
    "i": (1, 0, -1, 3),
    "u": (1, 0, 255),
    "b": (True, False),
}
DTYPES = (f32, f64, bf16, f16, i32, u8, b1)


class RandomGraph:
    """Builds a graph of primitives that rules know, with many constants and repetitions."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.b = Builder()
        self.values: list[Value] = []
        for dtype in DTYPES:
            self.values += [self.b.param(Type(dtype, shape)) for shape in ((2, 3), (1, 3), (2, 3))]

    def pick(self, options):
        return options[self.rng.integers(len(options))]

    def like(self, kind: Type) -> Value:
        """A value of a type."""
        return self.pick([v for v in self.values if v.type == kind])

    def operand(self, kind: Type) -> object:
        """A value of a type, a literal, or a constant tensor."""
        choice = self.rng.random()
        if choice < 0.5:
            return self.like(kind)
        literal = self.pick(LITERALS[kind.dtype.kind])
        return literal if choice < 0.7 else self.full(literal, kind.shape, kind.dtype)

    def full(self, value: object, shape: tuple[int, ...], dtype: DType) -> Value:
        self.values.append(self.b.full(value, shape=shape, dtype=dtype, device="cpu"))
        return self.values[-1]

    def grow(self) -> None:
        """Append one primitive (and perhaps a constant that it reads)."""
        b, x = self.b, self.pick(self.values if self.rng.random() < 0.4 else self.values[-8:])
        kind, rank = x.type, len(x.type.shape)
        step = self.pick(("unary", "binary", "binary", "where", "cast", "move", "move", "reduce"))
        if step == "unary":
            y = b.emit(OPS[self.pick(UNARY[kind.dtype.kind])], x)
        elif step == "binary":
            args = (x, self.operand(kind)) if self.rng.random() < 0.5 else (self.operand(kind), x)
            y = b.emit(OPS[self.pick(BINARY[kind.dtype.kind])], *args)
            if kind.dtype.is_float and self.rng.random() < 0.1:
                y = b.pow(x, 1.0)
        elif step == "where":
            condition = Type(b1, kind.shape)
            known = any(v.type == condition for v in self.values)
            c = self.operand(condition) if known else True
            c = c if isinstance(c, Value) else self.full(c, kind.shape, b1)
            y = b.emit(OPS["where"], c, *self.pick(((x, self.operand(kind)), (x, x))))
        elif step == "cast":
            y = b.cast(x, dtype=self.pick((kind.dtype, f32, f64, bf16, b1)))
        elif step == "reduce":
            axes = self.pick(((), (0,), tuple(range(rank)))) if rank else ()
            name = self.pick(("reduce_sum", "reduce_max", "reduce_min"))
            y = b.emit(OPS[name], x, axes=axes)
        else:
            y = self.move(x, rank)
        self.values.append(y)

    def move(self, x: Value, rank: int) -> Value:
        b, shape = self.b, x.type.shape
        step = self.pick(("reshape", "permute", "expand", "slice", "pad"))
        if step == "reshape":
            return b.reshape(x, shape=self.pick((shape, (x.type.numel,), (1, x.type.numel))))
        if step == "permute":
            return b.permute(x, axes=tuple(int(a) for a in self.rng.permutation(rank)))
        if step == "expand":
            return b.expand(x, shape=tuple(self.pick((1, 2)) if n == 1 else n for n in shape))
        if step == "slice":
            starts = tuple(int(self.rng.integers(0, 2)) if n > 1 else 0 for n in shape)
            return b.slice(x, starts=starts, stops=shape, steps=(1,) * rank)
        low = tuple(int(self.rng.integers(0, 2)) for _ in shape)
        value = self.pick(LITERALS[x.type.dtype.kind])
        return b.pad(x, low=low, high=(0,) * rank, interior=(0,) * rank, value=value)

    def inputs(self) -> list[np.ndarray]:
        arrays = []
        for param in self.b.params:
            kind = param.value.type
            pool = (
                (*SPECIAL, -0.0, -0.0, -0.0, 0.5, -1.5, 3.0)
                if kind.dtype.is_float
                else LITERALS[kind.dtype.kind]
            )
            values = np.array([self.pick(pool) for _ in range(kind.numel)])
            arrays.append(round_to(values.astype(kind.dtype.compute), kind.dtype))
        return [a.reshape(p.value.type.shape) for a, p in zip(arrays, self.b.params, strict=True)]


def random_graph(seed: int, size: int = 100) -> tuple[Graph, list[np.ndarray]]:
    made = RandomGraph(seed)
    for _ in range(size):
        made.grow()
    results = tuple(Result(v) for v in made.values if made.rng.random() < 0.5)
    target = made.b.params[0].value
    written = [v for v in made.values if v.type == target.type][-1]
    return made.b.graph("f", results, (Write(target, written),)), made.inputs()


@pytest.mark.parametrize("seed", range(150))
@pytest.mark.sweep(0.34)
def test_optimize_keeps_every_bit(seed: int):
    graph, inputs = random_graph(seed)
    verify(graph)
    optimized = optimize(graph)
    assert len(optimized.nodes) <= len(graph.nodes)
    before, after = evaluate(graph, inputs), evaluate(optimized, inputs)
    for old, new in zip([*before[0], *before[1]], [*after[0], *after[1]], strict=True):
        np.testing.assert_array_equal(old, new)
        if old.dtype.kind == "f":
            known = ~np.isnan(old)
            np.testing.assert_array_equal(np.signbit(old)[known], np.signbit(new)[known])


CONSTANTS = [0.0, -0.0, 1.0, -2.5]


@pytest.mark.parametrize("value", CONSTANTS)
@pytest.mark.parametrize("name", [n for n in SAMPLES if not n.startswith("host_")])
@pytest.mark.sweep(0.34)
def test_primitives_of_constants_keep_every_bit(name: str, value: float):
    """What reads constants alone is the constants that the primitive itself gives."""
    for sample in SAMPLES[name]:
        if not sample.is_float or sample.host:
            continue
        b = Builder()
        args = [
            b.full(value, shape=x.shape, dtype=x.dtype, device="cpu")
            if isinstance(x, Tensor)
            else x
            for x in sample.operands
        ]
        graph = b.graph("f", (Result(b.emit(OPS[name], *args, **sample.attrs)),))
        with np.errstate(all="ignore"):
            (before,), (after,) = evaluate(graph, [])[0], evaluate(optimize(graph), [])[0]
        np.testing.assert_array_equal(before, after, str(sample))
        if before.dtype.kind == "f" and OPS[name].exact is BITS:
            known = ~np.isnan(before)
            same = np.signbit(before)[known] == np.signbit(after)[known]
            assert same.all(), str(sample)


@pytest.mark.parametrize("seed", range(150))
@pytest.mark.sweep(0.34)
def test_optimize_has_nothing_left_to_do(seed: int):
    optimized = optimize(random_graph(seed)[0])
    assert str(optimize(optimized)) == str(optimized)


# ---- segments

WHOLE = """step(%0: f32[4], %1: f32[4]) {
  %2: f32[4] = mul(%0, %0)
  %3: f32[2,2] = reshape(%2, shape=(2, 2))
  %4: f32[] = reduce_sum(%2, axes=(0,))
  %5: f32[4] = exp(%1)
  %6: f32[4] = add(%2, %5)
  return %6, %3, %4
  write %1 <- %5
}"""


def test_segments_carry_what_is_computed_and_repeat_what_is_free():
    whole = parse(WHOLE)
    value = whole.nodes[2].out
    first, rest = segments(whole, [cone(whole, [value], "value")[0]])
    assert str(first.graph) == (
        "value(%0: f32[4]) {\n  %1: f32[4] = mul(%0, %0)\n"
        "  %2: f32[] = reduce_sum(%1, axes=(0,))\n  return %2\n}"
    )
    assert first.carried == {} and set(rest.carried.values()) == {0}
    assert list(rest.carried) == [whole.nodes[0].out, value]
    assert str(rest.graph) == (
        "step(%0: f32[4], %1: f32[4], %2: f32[]) {\n  %3: f32[2,2] = reshape(%1, shape=(2, 2))\n"
        "  %4: f32[4] = exp(%0)\n  %5: f32[4] = add(%1, %4)\n  return %5, %3, %2\n"
        "  write %0 <- %4\n}"
    )
    verify(first.graph)
    verify(rest.graph)


def test_segments_in_turn():
    """A later value that stands on an earlier one reads what that has computed."""
    whole = parse(WHOLE)
    nodes = whole.nodes
    cones = [cone(whole, [v], "value")[0] for v in (nodes[2].out, nodes[4].out)]
    first, second, rest = segments(whole, cones)
    assert second.carried == {nodes[0].out: 0}
    assert rest.carried[nodes[4].out] == 1 and rest.carried[nodes[3].out] == 1
    assert [n.op.name for n in rest.graph.nodes] == ["reshape"]


def test_a_value_that_is_an_input():
    whole = parse(WHOLE)
    first, rest = segments(whole, [cone(whole, [whole.params[0].value], "value")[0]])
    assert not first.graph.nodes and rest.carried == {} and len(rest.graph.nodes) == 5
