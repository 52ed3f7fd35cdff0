"""A call of an ejected step, as the lines of `__call__`: whatever language its kernels are in.

In: a SavedPlan, and its kernels (`eject_c.py`, `eject_triton.py`). Out: lines that look at the
arguments, fetch the state, compute the step's numbers, take memory, launch, and commit.
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.late import among, cuts_behind
from tracejit.capture.proof.guards import condition
from tracejit.capture.signature import Fielded, Keyed, Listed
from tracejit.capture.trace.draws import Together
from tracejit.capture.trace.tensor import extent
from tracejit.errors import CannotEject, TracejitError
from tracejit.export.eject_commit import Commit, plain_text
from tracejit.export.eject_draws import draw_line, memory_line
from tracejit.export.eject_parts import EjectedParts
from tracejit.export.eject_text import (
    NAMED,
    WIDE,
    identifier,
    indented,
    is_reserved,
    listed,
    local_name,
    names_of,
    quoted,
)
from tracejit.ir.graph import Value
from tracejit.ir.hostcode import HostCode
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import contiguous_strides
from tracejit.parts import Stage
from tracejit.records import dataclass
from tracejit.runtime.program import Program
from tracejit.saved.record import GivenNumber, GivenTensor, GivenValue, SavedPlan, Spec

PASTED = re.compile(r"\b(math|np)_(\w+)\(")
BARE = re.compile(r"(?<![\w)])\((\d[\w.]*)\)")  # a number in parentheses


_OTHERWISE = {"eq": "ne", "ne": "eq"}  # of relations that do not hold


class Kernels(Protocol):
    """The kernels of programs in a language, as parts of the file.

    needs:   what the file needs besides torch, as text. imports: lines.
    text:    what stands before the class: sources, how they are compiled and launched.
    fields:  lines of `__init__`, which takes the memory of intermediates. begin: first lines of a
        call.
    """

    needs: str
    imports: Sequence[str]
    text: str
    fields: Sequence[str]
    begin: Sequence[str]

    def launches(
        self, program: Program, at: dict[str, str], scalars: Sequence[str]
    ) -> Iterator[str]:
        """The lines that run a program; `at` has an expression of a tensor for each buffer that is
        an input or an output."""


@dataclass(frozen=True)
class _Input:
    """An outside tensor: what it is called in a call, and what it has to be."""

    name: str
    spec: Spec


class CallText:
    """The call of one plan. `refused(reason, remedy)` makes an error."""

    def __init__(
        self,
        plan: SavedPlan,
        captured: Captured,
        parts: EjectedParts,
        kernels: Kernels,
        refused: Callable[[str, str], CannotEject],
        lists: Sequence[str],
    ):
        self.plan, self.captured, self.parts, self.lists = plan, captured, parts, lists
        self.kernels, self.refused = kernels, refused
        of_file = NAMED | names_of(kernels.text)
        arguments = [a.name for a in plan.arguments]
        kept = {
            name
            for name in arguments
            if name.isidentifier() and not keyword.iskeyword(name) and name not in of_file
        } | ({"state", "numbers"} & {*arguments})
        self.taken: set[str] = of_file | kept
        #: what the arguments are called: another name where the file has a use for theirs, or
        #: where they are parts of `*args`
        self.names = {
            name: name if name in kept else identifier(name, self.taken) for name in arguments
        }
        #: what they are called in the body, where calls have a use for their names
        self.local = {
            name: identifier(name, self.taken)
            if is_reserved(name) or name in ("state", "numbers")
            else name
            for name in self.names.values()
        }
        #: the classes of tuples with names that it returns, by their position among what is given
        self.kinds = {
            i: identifier(x.__name__, self.taken)
            for i, x in enumerate(captured.given)
            if isinstance(x, type) and hasattr(x, "_fields")
        }
        used = [place.key for place in plan.scalars if place.kind == "number"]
        #: what a number may be called in a call, by its name
        self.short = {
            name: identifier(name.rpartition(".")[2], self.taken) for name in dict.fromkeys(used)
        }
        self.inputs: list[_Input] = []
        self.code = HostCode()
        self.scalars: dict[Value, str] = {}
        self._said = 0  # lines of `code` that stand somewhere
        self._count = 0  # of outputs so far
        self._drawn = 0  # events of draws so far

    def signature(self) -> str:
        by_place = [self.names[a.name] for a in self.plan.arguments if a.positional]
        by_name = [self.names[a.name] for a in self.plan.arguments if not a.positional]
        more = [f"{short}=None" for short in self.short.values()]
        parts = ["self", *by_place]
        if by_name or more:
            parts += ["*", *by_name, *more]
        line = f"    def __call__({', '.join(parts)}):"
        if len(line) <= WIDE:
            return line
        return listed("    def __call__(", [f"{p}," for p in parts], "    ):", 8)

    def lines(self) -> list[str]:
        """The body of a call."""
        c = self.captured
        lines = [*self._given(), *self._tensors(), *self._read_numbers()]
        lines += self._assertions()
        results: dict[object, list[str]] = {}
        for k, stage in self._stages():
            lines += self._draws(c.cuts[k].drawn)
            of = c.cuts[k].sources
            inputs = [
                self._source(*of[i]) if at == "cone" else results[at][i] for at, i in stage.inputs
            ]
            more, results[stage] = self._run(stage.program, inputs)
            value = f"{results[stage][0]}.item()"
            truth = c.cuts[k].value.type.dtype.kind == "b"
            lines += [*more, f"read{k} = {f'float({value})' if truth else value}"]
            lines += self._decisions(lambda of, k=k: bool(of) and max(of) == k)
        lines += self._draws(len(c.draws))
        lines += self._checks()
        inputs = self.parts.inputs(c, self._source, results)
        late = frozenset(c.late)
        before = self._outputs(self.parts.rest)
        host = self._host(lambda of: not of & late)
        run, outputs = self._run(self.parts.rest, inputs, before)
        lines += run
        outputs = self.parts.results(outputs, results)
        lines += self._late(outputs)
        host |= self._host(lambda of: bool(of & late))
        lines += self._new_code()
        numbers = [host[i] for i in range(len(host))]
        commit = Commit(c, [x.name for x in self.inputs], outputs, numbers, self.kinds, self.lists)
        lines += commit.lines()
        if any("f32." in line for line in lines):
            lines.insert(0, "f32 = ctypes.c_float()  # rounds what is stored in it")
        used = [x for x in ("state", "numbers") if any(f"{x}[" in line for line in lines)]
        renamed = [f"{local} = {name}" for name, local in self.local.items() if local != name]
        fetched = [f"{x} = self.{x}" for x in used]
        return [*self.kernels.begin, *renamed, *fetched, *lines]

    def kind_lines(self) -> Iterator[str]:
        """Lines that define the classes of what it returns."""
        for i, name in self.kinds.items():
            kind = self.captured.given[i]
            fields = f"[{', '.join(map(quoted, kind._fields))}],"
            yield listed(f"{name} = namedtuple(", [f"{quoted(kind.__name__)},", fields], ")")

    def _stages(self) -> Iterator[tuple[int, Stage]]:
        """What comes before the rest: the cut that each ends with."""
        parts = self.parts.parts
        return iter(()) if parts is None else zip(parts.cuts, parts.stages, strict=True)

    def _outputs(self, program: Program) -> tuple[list[str], dict[str, str]]:
        """Lines that make the tensors of a program's outputs, and these by their buffers."""
        lines: list[str] = []
        at: dict[str, str] = {}
        outputs = (b for b in program.plan.buffers if b.kind == "output")
        for b in sorted(outputs, key=lambda b: b.index):
            at[b.name] = f"out{self._count}"
            self._count += 1
            shape, strides = tuple(b.type.shape), b.strides
            kind = f"dtype={TO_TORCH[b.type.dtype]}"
            if b.type.device != "cpu":
                kind += f", device={quoted(b.type.device)}"
            if strides is None or strides == contiguous_strides(shape):
                lines.append(f"{at[b.name]} = torch.empty({shape}, {kind})")
            else:
                made = f"torch.empty_strided({shape}, {tuple(strides)}, {kind})"
                lines.append(f"{at[b.name]} = {made}")
        return lines, at

    def _run(
        self,
        program: Program,
        inputs: Sequence[str],
        outputs: tuple[list[str], dict[str, str]] | None = None,
    ) -> tuple[list[str], list[str]]:
        """Lines that run a program, and its results; `inputs` has an expression per param."""
        lines, at = self._outputs(program) if outputs is None else outputs
        made, at = [*at.values()], dict(at)
        for b in program.plan.buffers:
            if b.kind == "input":
                at[b.name] = inputs[b.index]
        given = {v: inputs[i] for v, i in program.plan.host_params}
        scalars = self.code.add(program.plan.host, program.plan.scalars, given)
        lines = [*lines, *self._new_code()]
        lines += self.kernels.launches(program, at, [self._pasted(x) for x in scalars])
        return lines, [made[i] for i in program._results]

    def _source(self, kind: str, index: int) -> str:
        """An expression of an input of a graph."""
        if kind == "scalar":
            return self.scalars[self.captured.scalars[index]]
        return f"draw{index}" if kind == "draw" else self.inputs[index].name

    # ---- random numbers, and what eager refuses

    def _draws(self, count: int) -> Iterator[str]:
        """Lines that draw, up to so many of the step's events."""
        c = self.captured
        together = {k: e for k, e in enumerate(c.draws) if isinstance(e, Together)}
        rows = {k: f"draw{at}[{i}]" for at, e in together.items() for i, k in enumerate(e.rows)}
        if count and not self._drawn:
            yield from (memory_line(k, e) for k, e in together.items())
        while self._drawn < count:
            k, event = self._drawn, c.draws[self._drawn]
            self._drawn += 1
            if k in together:
                continue
            given = self.code.add(c.host_nodes, event.numbers, self.scalars)
            numbers = [self._pasted(x) for x in given]
            yield from self._new_code()
            yield draw_line(k, event, numbers, rows.get(k, ""))

    def _checks(self) -> Iterator[str]:
        """Lines that raise what eager raises for values that the step computes."""
        checks = self.captured.checks
        if checks is None:
            return
        run, results = self._run(self.parts.checks, [self._source(*x) for x in checks.sources])
        yield from run
        _, *found = results
        for shown, error in zip(checks.shown, checks.errors, strict=True):
            bad, value = found.pop(0), found.pop(0) if shown else None
            text = quoted(str(error.fields["reason"]))
            if value is not None:
                text += f'.replace("{{value}}", str({value}.item()))'
            yield f"if {bad}:"
            yield f"    raise {_builtin(error)}({text})"

    def _given(self) -> Iterator[str]:
        """Lines that look at the arguments; `self._found` says what of them is what."""
        self._found: dict[tuple[str, int], str] = {}
        for a in self.plan.arguments:
            yield from self._tree(a.tree, self.local[self.names[a.name]])

    def _tree(self, tree: object, text: str) -> Iterator[str]:
        match tree:
            case GivenTensor(index):
                if index is not None:
                    self._found["tensor", index] = text
                    spec = self.plan.tensors[index][1]
                    strides = spec.strides != contiguous_strides(spec.shape)
                    more = f", {spec.strides}" if strides else ""
                    kind = f"{spec.shape}, {TO_TORCH[spec.dtype]}{more}"
                    yield f"check({text}, {quoted(text)}, {kind})"
            case GivenNumber(index, whole):
                self._found["number", index] = text if whole else f"float({text})"
            case GivenValue(value):
                wanted = plain_text(value)
                test = f"same({text}, {wanted})" if value != value else f"{text} == {wanted}"
                yield f"assert {test}, {quoted(f'this file is for {text}={value!r}')}"
            case Listed(_, items):
                said = quoted(f"{text} has {len(items)} items")
                yield f"assert len({text}) == {len(items)}, {said}"
                for i, item in enumerate(items):
                    yield from self._tree(item, f"{text}[{i}]")
            case Keyed(items):
                for key, item in items:
                    of = quoted(key) if isinstance(key, str) else repr(key)
                    yield from self._tree(item, f"{text}[{of}]")
            case Fielded(_, items, listed):
                for i, (name, item) in enumerate(items):
                    yield from self._tree(item, f"{text}[{i}]" if listed else f"{text}.{name}")

    def _tensors(self) -> Iterator[str]:
        """A local for each outside tensor."""
        grads = {grad: owner for owner, grad in self.captured.grads_read if grad not in (None, -1)}
        for k, (place, spec) in enumerate(self.plan.tensors):
            if place.kind == "argument":
                text = self._found["tensor", k]
                name = text if text.isidentifier() else identifier(place.key, self.taken)
                if name != text:
                    yield f"{name} = {text}"
            elif place.kind == "state":
                name = identifier(local_name(place.key), self.taken)
                yield f"{name} = state[{quoted(place.key)}]"
            else:
                owner = self.inputs[grads[k]].name
                name = identifier(f"{owner}_grad", self.taken)
                yield f"{name} = {owner}.grad"
                yield f'check({name}, "{owner}.grad", {spec.shape}, {TO_TORCH[spec.dtype]})'
            self.inputs.append(_Input(name, spec))
        for owner, grad in self.captured.grads_read:
            if grad in (None, -1):
                is_ = "is" if grad is None else "is not"
                name = self.inputs[owner].name
                yield f'assert {name}.grad {is_} None, "{name}.grad {is_} None in this file"'

    def _read_numbers(self) -> Iterator[str]:
        read: set[str] = set()
        for k, (value, place) in enumerate(
            zip(self.captured.scalars, self.plan.scalars, strict=True)
        ):
            match place.kind:
                case "argument":
                    text = self._found["number", k]
                case "number":
                    text = self.short[place.key]
                    if text not in read:
                        read.add(text)
                        yield f"if {text} is None:"
                        yield f"    {text} = numbers[{quoted(place.key)}]"
                case "item":
                    text = identifier(f"{self.inputs[place.key].name}_now", self.taken)
                    yield f"{text} = {self.inputs[place.key].name}.item()"
                case "cut":
                    text = f"read{place.key}"
                case _:
                    text = f"({place.key!r})"
            self.scalars[value] = text

    def _assertions(self) -> Iterator[str]:
        """What the plan is for: the decisions on numbers, and the ranges of indices."""
        c = self.captured
        yield from self._decisions(lambda of: not of)
        for b in c.bounds:
            tensor = self.inputs[b.index].name
            spec = self.plan.tensors[b.index][1]
            if (b.shape, b.strides, b.offset) != (spec.shape, spec.strides, 0):
                tensor = f"{tensor}.as_strided({b.shape}, {b.strides}, {b.offset})"
            kind = _builtin(b.error)
            message = quoted(str(b.error.fields["reason"]))
            yield f"within({tensor}, {b.low}, {b.high}, {b.ignore}, {kind}, {message})"

    def _decisions(self, wanted: Callable[[frozenset[int]], bool]) -> Iterator[str]:
        """Assertions of the decisions that depend on `wanted` values that Python reads."""
        c = self.captured
        behind, said = cuts_behind(c.scalars, c.paths, c.host_nodes), set()
        for p in c.predicates:
            if not wanted(among(behind, (p.left, p.right))):
                continue
            sides = self.code.add(c.host_nodes, [p.left, p.right], self.scalars)
            if p.relation in _OTHERWISE and not p.outcome:
                p = replace(p, relation=_OTHERWISE[p.relation], outcome=True)
            test = self._pasted(condition(p, *sides)).replace("same_number(", "same(")
            yield from self._new_code()
            if test not in said:
                said.add(test)
                yield f"assert {test}, {quoted(f'this file is for {test}')}"

    def _new_code(self) -> Iterator[str]:
        """The lines of host arithmetic that do not stand anywhere yet."""
        for line in self.code.lines[self._said :]:
            yield self._pasted(line)
        self._said = len(self.code.lines)

    def _pasted(self, line: str) -> str:
        """A line of host arithmetic with functions by their own names."""
        if "np_" in line or "round_" in line:
            reason = f"it computes {line.strip()} on the host"
            raise self.refused(reason, "Do this arithmetic outside")
        return BARE.sub(r"\1", PASTED.sub(r"\1.\2(", line))

    def _host(self, wanted: Callable[[frozenset[int]], bool]) -> dict[int, str]:
        """The expressions of host results, by position: of those where what they depend on, the
        values that Python reads, is `wanted`."""
        c = self.captured
        behind = cuts_behind(c.scalars, c.paths, c.host_nodes)
        results = c.effects.host
        chosen = [i for i, x in enumerate(results) if wanted(among(behind, (x,)))]
        found = self.code.add(c.host_nodes, [results[i] for i in chosen], self.scalars)
        return {i: self._pasted(x) for i, x in zip(chosen, found, strict=True)}

    def _late(self, results: list[str]) -> Iterator[str]:
        """Values that Python reads from the results."""
        late = sorted(self.captured.late)
        for k, value in zip(late, results[len(results) - len(late) :], strict=True):
            yield f"read{k} = {value}.item()"

    # ---- a try

    def made_up(self) -> str:
        """Arguments made up, a line each."""
        rows = [
            f"{quoted(self.names[a.name])}: {self._made_up(a.tree)}," for a in self.plan.arguments
        ]
        return "\n".join(indented(listed("return {", rows, "}").splitlines(), 4))

    def _made_up(self, tree: object) -> str:
        match tree:
            case GivenTensor(None):
                return "torch.zeros(())"
            case GivenTensor(index):
                spec = self.plan.tensors[index][1]
                dtype = TO_TORCH[spec.dtype]
                made = "randn" if dtype.is_floating_point else "zeros"
                if spec.strides == contiguous_strides(spec.shape):
                    return f"torch.{made}({spec.shape}, dtype={dtype})"
                whole = f"torch.{made}({extent(spec.shape, spec.strides)}, dtype={dtype})"
                return f"{whole}.as_strided({spec.shape}, {spec.strides})"
            case GivenNumber(_, whole):
                return "1" if whole else "1.0"
            case GivenValue(value):
                return plain_text(value)
            case Listed(kind, items):
                inner = ", ".join(map(self._made_up, items))
                if kind is list:
                    return f"[{inner}]"
                return f"({inner},)" if items else "()"
            case Keyed(items):
                return "{" + ", ".join(f"{k!r}: {self._made_up(v)}" for k, v in items) + "}"
            case Fielded(_, items, True):
                return self._made_up(Listed(tuple, tuple(item for _, item in items)))
            case Fielded(_, items, False):
                inner = ", ".join(f"{name}={self._made_up(item)}" for name, item in items)
                return f"SimpleNamespace({inner})"
        raise AssertionError(tree)


def _builtin(error: TracejitError) -> str:
    """The first class of Python's own that an error belongs to."""
    names = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return next(name for name in names if getattr(builtins, name, None) is not None)
