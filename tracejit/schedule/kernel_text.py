"""Reads the text form of a Kernel, which its `str` gives; `canonical` is the kernel to cache by.

    kernel(b0: f32 r, b1: f32 rw; n0, b1_s0; s0) over (i0: n0) {
      stage (i1: n1) {
        dot v4: f32 over (k: nk) {
          v1: f32 = load b0[i0 * b0_s0 + k]
          v2: f32 = load b1[k * b1_sk + i1]
        } v1, v2                                  # step.py:9
        v5: f32 = load b2[i0 + d0] if 0 <= i0 + d0 < n1 and 0 <= i1 < 7 step 2
        v6: i64 = position i0 // d0 + i1 % 3
        v7: b1 = inbounds 0 <= i0 < 4
        v10: f32 = load b3[v6 * b3_sv + i1] if 0 <= v6 < n2
        v8: f32 = where(v7, v5, 0.0)
        store b1[i0 * b1_s0] <- v8
        v9: f32 = reduce_sum v8
      }
      stage (i2: n3) in order {
        v11: i64 = load b3[i2]
        store b1[v11 * b1_sv] += v9 if 0 <= v11 < n1
      }
    }

A stage that sorts ends with `v2: i64 = order v1`, `order v1 descending`, or `order v1 topk sorted`.
A Dot's statements are its two prologues, a first; `|` stands between them. Those of an Attend are
its sides, each with its value at the end:

        attend attention v9: f32 over (i1: n1, i2: n2, i3: n3, i4: n4) causal=True scale=0.125 {
          v1: f32 = load b0[i0 * b0_s0 + i1 * b0_s1 + i3]
          | v1
          …
          | 0.0
        }                                         # step.py:9

`kernel64` marks 64-bit indices. Comments are the user's lines. Kernels side by side stand in one
with their parameters' names there:

    kernel(b0: f32 r, b1: f32 w, b2: f32 w; n0_0, n0_1) side by side {
      part (b0, b1; n0_0) {
        kernel(b0: f32 r, b1: f32 w; n0) over () { … }
      }
      part (b0, b2; n0_1) { … }
    }

What the host computes is one line:

    kernel(b0: f32 r, b1: f32 r, b2: f32 w) by the host {
      call triangular_solve (2, 3, 3) (2, 3, 1) -> (2, 3, 1) upper=True transposed=False unit=False
    }

A collective is two of them, `start all_reduce (6,) -> (6,) by='SUM' …` and `wait all_reduce …`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import replace

from tracejit.errors import InvalidGraph
from tracejit.ir.literals import parse_literal
from tracejit.ir.ops import OPS
from tracejit.ir.types import DTYPES
from tracejit.schedule.kernel import (
    FOLDS,
    Atom,
    Attend,
    Axis,
    Bound,
    Buffer,
    Compute,
    Dot,
    FloorDiv,
    HostCall,
    InBounds,
    Index,
    Kernel,
    Load,
    Mask,
    Mod,
    Operand,
    Part,
    Position,
    Reduce,
    Scalar,
    Side,
    Size,
    Sort,
    Stage,
    Statement,
    Store,
    Var,
)


def canonical(kernel: Kernel) -> Kernel:
    """Variables numbered in order of definition, users' lines dropped: the kernel-cache key."""
    number: dict[int, int] = {}

    def var(v: Var) -> Var:
        return Var(number.setdefault(v.id, len(number)), v.dtype)

    def use(operand: Operand) -> Operand:
        return var(operand) if isinstance(operand, Var) else operand

    def index(i: Index) -> Index:
        return Index(tuple((atom_of(atom), c) for atom, c in i.terms), i.offset)

    def atom_of(atom: Atom) -> Atom:
        if isinstance(atom, FloorDiv | Mod):
            return replace(atom, index=index(atom.index))
        return var(atom) if isinstance(atom, Var) else atom

    def mask(m: Mask) -> Mask:
        return tuple(replace(bound, index=index(bound.index)) for bound in m)

    def statement(s: Statement) -> Statement:
        if isinstance(s, Store):
            at, inside = index(s.index), mask(s.mask)
            return Store(s.buffer, at, use(s.value), "", inside, s.fold)
        if isinstance(s, Load):
            at, inside = index(s.index), mask(s.mask)
            return Load(var(s.out), s.buffer, at, inside)
        if isinstance(s, InBounds):
            return replace(s, out=var(s.out), mask=mask(s.mask), where="")
        if isinstance(s, Position):
            return replace(s, out=var(s.out), index=index(s.index), where="")
        if isinstance(s, Compute):
            args = tuple(map(use, s.args))
            return Compute(var(s.out), s.op, args, s.attrs)
        if isinstance(s, Reduce | Sort):
            return replace(s, value=use(s.value), out=var(s.out), where="")
        raise InvalidGraph(reason=f"no statement of a kernel: {s!r}")

    def body(statements: tuple[Statement, ...]) -> tuple[Statement, ...]:
        return tuple(map(statement, statements))

    stages = []
    for stage in kernel.stages:
        dot = stage.dot
        if dot is not None:
            a, b = body(dot.a), body(dot.b)
            a_value, b_value = use(dot.a_value), use(dot.b_value)
            dot = Dot(var(dot.out), dot.k, a, a_value, b, b_value)
        attend = stage.attend
        if attend is not None:
            sides = tuple(Side(body(side.body), use(side.value)) for side in attend.sides)
            results = tuple((op, var(out)) for op, out in attend.results)
            attend = replace(attend, results=results, sides=sides, where="")
        stages.append(replace(stage, body=body(stage.body), dot=dot, attend=attend))
    alike = {id(part.kernel): part.kernel for part in kernel.parts}  # one in a foreach
    plain = {key: canonical(one) for key, one in alike.items()}
    parts = tuple(replace(part, kernel=plain[id(part.kernel)]) for part in kernel.parts)
    call = kernel.call and replace(kernel.call, where="")
    return replace(kernel, stages=tuple(stages), parts=parts, call=call)


_LISTS = r"\(([^;)]*)(?:;([^;)]*))?(?:;([^;)]*))?\)"
_HEADER = re.compile(
    rf"kernel(64)?{_LISTS} (?:over \((.*)\)|side by side|(for each)|by the host) \{{\Z"
)
_PART = re.compile(rf"part {_LISTS} \{{\Z")
_HOST_CALL = re.compile(r"(call|start|wait) (\w+) (.*?)-> (\([^)]*\))((?: \w+=\S+)*)\Z")
_SHAPE = re.compile(r"\([^)]*\)")
_END = re.compile(r"\}\Z")
_STAGE = re.compile(r"stage \((.*)\)( in order)? \{\Z")
_DOT = re.compile(r"dot v(\d+): (\w+) over \((.*)\) \{\Z")
_DOT_END = re.compile(r"\} (.+), (.+)\Z")
_ATTEND = re.compile(r"attend (.+) over \((.*)\) causal=(\w+) scale=(\S+) \{\Z")
_RESULT = re.compile(r"(\w+) v(\d+): (\w+)\Z")
_VALUE = re.compile(r"\| (.+)\Z")
_STORE = re.compile(r"store (\w+)\[(.*)\] (<-|\+=|\*=|max=|min=) (.+?)(?: if (.*))?\Z")
_DEFINE = re.compile(r"v(\d+): (\w+) = (.*)\Z")
_LOAD = re.compile(r"load (\w+)\[(.*?)\](?: if (.*))?\Z")
_CALL = re.compile(r"(\w+)\((.*)\)\Z")
_BOUND = re.compile(r"0 <= (.*) < (\w+)(?: step (\w+))?\Z")


def parse_kernel(text: str) -> Kernel:
    """Inverse of `str(kernel)`."""
    return _Parser(text).kernel()


class _Parser:
    """Reads one kernel line by line."""

    def __init__(self, text: str):
        self.lines: list[tuple[str, str]] = []
        for line in text.strip().splitlines():
            code, _, where = line.partition("  # ")
            if code.strip():
                self.lines.append((code.strip(), where.strip()))
        self.at = 0
        self.vars: dict[str, Var] = {}
        self.sizes: tuple[str, ...] = ()

    def peek(self) -> str:
        """The next line, which stays next."""
        if self.at == len(self.lines):
            raise InvalidGraph(reason="a kernel's text ends early")
        return self.lines[self.at][0]

    def next(self, pattern: re.Pattern | None = None) -> tuple[re.Match | str, str]:
        """The next line, matched against a pattern if one is given, and its comment."""
        code, where = self.peek(), self.lines[self.at][1]
        self.at += 1
        if pattern is None:
            return code, where
        found = pattern.match(code)
        if found is None:
            raise InvalidGraph(reason=f"cannot read the line {code!r} of a kernel")
        return found, where

    def kernel(self) -> Kernel:
        head, _ = self.next(_HEADER)
        self.vars = {}
        buffers = []
        for part in _items(head[2]):
            name, dtype, access = re.fullmatch(r"(\w+): (\w+) (\w+)", part).groups()
            buffers.append(Buffer(name, DTYPES[dtype], access))
        sizes = self.sizes = tuple(_items(head[3]))
        axes = self.axes(head[5] or "")
        stages, parts, call, lists = [], [], None, []
        while not self.peek().startswith("}"):
            if self.peek().startswith(("call ", "start ", "wait ")):
                call = self.host_call()
            elif head[5] is None:
                found, _ = self.next(_PART)
                lists.append([tuple(_items(found[i])) for i in (1, 2, 3)])
                if not self.peek().startswith("}"):  # a foreach has its kernel in the last part
                    kernel = self.kernel()
                    parts += [Part(kernel, *one) for one in lists]
                    lists = []
                self.next(_END)
            else:
                found, _ = self.next(_STAGE)
                stages.append(self.stage(self.axes(found[1]), found[2] is not None))
        self.next(_END)
        return Kernel(
            tuple(buffers),
            sizes,
            tuple(_items(head[4])),
            axes,
            tuple(stages),
            head[1] is not None,
            tuple(parts),
            call,
            head[6] is not None,
        )

    def host_call(self) -> HostCall:
        found, where = self.next(_HOST_CALL)
        shapes = [ast.literal_eval(x) for x in (*_SHAPE.findall(found[3]), found[4])]
        attrs = [part.split("=", 1) for part in found[5].split()]
        values = [(k, parse_literal(ast.parse(v, mode="eval").body)) for k, v in attrs]
        phase = "" if found[1] == "call" else found[1]
        return HostCall(_op(found[2]), tuple(values), tuple(shapes), where, phase)

    def stage(self, axes: tuple[Axis, ...], in_order: bool) -> Stage:
        dot = None
        if self.peek().startswith("dot "):
            found, _ = self.next(_DOT)
            (k,) = self.axes(found[3])
            a = self.body("|")
            b = self.body("} ", consume=False)
            end, where = self.next(_DOT_END)
            values = self.operand(end[1]), self.operand(end[2])
            out = self.define(found[1], found[2])
            dot = Dot(out, k, a, values[0], b, values[1], where)
        attend = self.attend() if self.peek().startswith("attend ") else None
        return Stage(axes, self.body("}"), dot, in_order, attend)

    def attend(self) -> Attend:
        found, _ = self.next(_ATTEND)
        sides = []
        while not self.peek().startswith("}"):
            body = self.body("|", consume=False)
            value, _ = self.next(_VALUE)
            sides.append(Side(body, self.operand(value[1])))
        _, where = self.next(_END)
        results = []
        for text in _items(found[1]):
            name, number, dtype = _RESULT.match(text).groups()
            results.append((_op(name), self.define(number, dtype)))
        causal, scale = (
            found[3] == "True",
            float(parse_literal(ast.parse(found[4], mode="eval").body)),
        )
        return Attend(tuple(results), *self.axes(found[2]), causal, scale, tuple(sides), where)

    def body(self, end: str, consume: bool = True) -> tuple[Statement, ...]:
        out = []
        while not self.peek().startswith(end):
            code, where = self.next()
            out.append(self.statement(code, where))
        self.at += consume
        return tuple(out)

    def statement(self, code: str, where: str) -> Statement:
        if found := _STORE.match(code):
            at, value = self.index(found[2]), self.operand(found[4])
            mask = self.mask(found[5] or "true")
            fold = next(name for name, sign in FOLDS.items() if sign == found[3])
            return Store(found[1], at, value, where, mask, fold)
        found = _DEFINE.match(code)
        if found is None:
            raise InvalidGraph(reason=f"cannot read the line {code!r} of a kernel")
        right = found[3]
        if load := _LOAD.match(right):
            index, mask = self.index(load[2]), self.mask(load[3] or "true")
            return Load(self.define(found[1], found[2]), load[1], index, mask, where)
        if call := _CALL.match(right):
            inside = right.removeprefix(call[1])  # `and`, `or`, `not` are keywords to Python
            tree = ast.parse(f"call{inside}", mode="eval").body
            args = tuple(self.operand_tree(a) for a in tree.args)
            attrs = tuple((k.arg, parse_literal(k.value)) for k in tree.keywords)
            return Compute(self.define(found[1], found[2]), _op(call[1]), args, attrs, where)
        name, _, rest = right.partition(" ")
        if name == "position":
            return Position(self.define(found[1], found[2]), self.index(rest), where)
        if name == "inbounds":
            return InBounds(self.define(found[1], found[2]), self.mask(rest), where)
        if name == "order":
            value, *how = rest.split(" ")
            topk = how[how.index("topk") + 1] if "topk" in how else ""
            out = self.define(found[1], found[2])
            return Sort(out, self.operand(value), "descending" in how, topk, where)
        value = self.operand(rest)
        return Reduce(self.define(found[1], found[2]), _op(name), value, where)

    def define(self, number: str, dtype: str) -> Var:
        var = self.vars[f"v{number}"] = Var(int(number), DTYPES[dtype])
        return var

    def axes(self, text: str) -> tuple[Axis, ...]:
        pairs = [part.split(": ") for part in _items(text)]
        return tuple(Axis(name, self.size(extent)) for name, extent in pairs)

    def size(self, text: str) -> Size:
        return text if text in self.sizes else int(text)

    def operand(self, text: str) -> Operand:
        return self.operand_tree(ast.parse(text, mode="eval").body)

    def operand_tree(self, tree: ast.expr) -> Operand:
        if isinstance(tree, ast.Name):
            if tree.id in self.vars:
                return self.vars[tree.id]
            if re.fullmatch(r"s\d+", tree.id):
                return Scalar(tree.id)
        return parse_literal(tree)

    def mask(self, text: str) -> Mask:
        if text == "true":
            return ()
        out = []
        for part in text.split(" and "):
            found = _BOUND.match(part)
            if found is None:
                raise InvalidGraph(reason=f"cannot read the bound {part!r} of a kernel")
            step = self.size(found[3]) if found[3] else 1
            out.append(Bound(self.index(found[1]), self.size(found[2]), step))
        return tuple(out)

    def index(self, text: str) -> Index:
        return self.index_tree(ast.parse(text, mode="eval").body)

    def index_tree(self, tree: ast.expr) -> Index:
        parts = []
        while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
            parts.append(tree.right)
            tree = tree.left
        parts.append(tree)
        terms: list = []
        offset: Size = 0
        for part in reversed(parts):
            size = self.constant(part)
            if size is not None:
                offset = size
            elif isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mult):
                terms.append((self.atom(part.left), self.constant(part.right)))
            else:
                terms.append((self.atom(part), 1))
        return Index(tuple(terms), offset)

    def constant(self, tree: ast.expr) -> Size | None:
        """A size's name or an int; None for anything else."""
        if isinstance(tree, ast.Name):
            return tree.id if tree.id in self.sizes else None
        if isinstance(tree, ast.Constant | ast.UnaryOp):
            return ast.literal_eval(tree)
        return None

    def atom(self, tree: ast.expr):
        if isinstance(tree, ast.Name):
            return self.vars.get(tree.id, tree.id)
        kind = FloorDiv if isinstance(tree.op, ast.FloorDiv) else Mod
        return kind(self.index_tree(tree.left), self.constant(tree.right))


def _items(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _op(name: str):
    if name not in OPS:
        raise InvalidGraph(reason=f"no primitive named {name!r}")
    return OPS[name]
