"""`step.eject(path)`: a step as one Python file that needs torch and a C compiler, and no tracejit.

In: a SavedStep of one plan (`saved/save.py`), and its program as the C executor loads it. Out: the
text of the file: its kernels in C, the class `Step` whose calls check their arguments, compute the
step's numbers, call the kernels in their order and commit what the step changes, and a `main` that
tries it. Running it gives the bits that the step gives.
"""

from __future__ import annotations

import builtins
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.late import among, cuts_behind
from tracejit.capture.proof.guards import condition
from tracejit.capture.signature import Keyed, Listed
from tracejit.errors import CannotEject, TracejitError
from tracejit.export.eject_commit import Commit
from tracejit.export.eject_text import (
    SCRIPT,
    WIDE,
    call_of,
    flags,
    identifier,
    indented,
    kernel_text,
    listed,
    local_name,
    quoted,
)
from tracejit.ir.graph import Value
from tracejit.ir.hostcode import HostCode
from tracejit.ir.torch_types import TO_TORCH
from tracejit.ir.types import contiguous_strides
from tracejit.options import Options
from tracejit.pipeline import Pipeline, Stats
from tracejit.runtime.c_compiler import vector_bytes
from tracejit.runtime.memory import Memory
from tracejit.runtime.program import Program
from tracejit.saved.record import GivenNumber, GivenTensor, GivenValue, SavedPlan, SavedStep, Spec
from tracejit.schedule.plan import runs

PASTED = re.compile(r"\b(math|np)_(\w+)\(")
MOST_LINES = 3  # of the user's that are said of a kernel
BARE = re.compile(r"(?<![\w)])\((\d[\w.]*)\)")  # a number in parentheses


def eject(step: SavedStep, path: str | os.PathLike) -> None:
    """Write the file of a step's first plan. Raises CannotEject for what it cannot say, and OSError
    where the file cannot be written."""
    text = Ejected(step, Path(path).stem).text()
    Path(path).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class _Input:
    """An outside tensor: what it is called in a call, and what it has to be."""

    name: str
    spec: Spec


class Ejected:
    """The file of one plan; `module` is how it will be imported."""

    def __init__(self, step: SavedStep, module: str):
        self.step, self.module = step, module
        self.plan: SavedPlan = step.plans[0]
        paths = tuple((place.kind, place.key) for place in self.plan.scalars)
        self.captured: Captured = replace(self.plan.captured, paths=paths)
        self._refuse()
        self.program = self._program()
        self.taken: set[str] = {"self", "state", "numbers", "work", "launch", "torch", "ctypes"}
        self.inputs: list[_Input] = []
        self.code = HostCode()
        self.scalars: dict[Value, str] = {}

    # ---- what there is

    def _refuse(self) -> None:
        c = self.captured
        devices = {spec.device for _, spec in self.plan.tensors} - {"cpu"}
        if devices:
            raise self.refused(f"it runs on {devices.pop()}", "Eject a step of the CPU")
        if c.draws:
            raise self.refused("it draws random numbers", "Pass them to it as arguments")
        if c.early:
            where = c.cuts[c.early[0]].where
            remedy = "Return the value, and decide outside"
            raise self.refused(f"it computes with a value that Python reads at {where}", remedy)
        if c.checks is not None:
            reason = "it looks at values that it computes, which eager refuses out of range"
            raise self.refused(reason, "Check them before the step")
        if c.effects.escaped:
            raise self.refused("it keeps an intermediate in an object", "Return it")

    def refused(self, reason: str, remedy: str) -> CannotEject:
        return CannotEject(step=self.step.name, reason=reason, remedy=remedy)

    def _program(self) -> Program:
        options = Options(
            backend="c", fuse=self.step.options["fuse"], remat=self.step.options["remat"]
        )
        name = identifier(self.step.name, set())
        pipeline = Pipeline(name, f"the step {self.step.name}", Stats(), options)
        executor = pipeline.executor(self.captured.graph, self.step.options["precision"])
        program, _ = pipeline.build(self.captured.graph, executor, Memory())
        for kernel in program.loaded.plan.kernels.values():
            if kernel.kernel.call is not None:
                reason = f"it calls {kernel.kernel.call.op.name} of LAPACK"
                raise self.refused(reason, "Call that outside of the step")
        return program

    # ---- the file

    def text(self) -> str:
        """The whole file."""
        call = self._call()
        fields = {
            "name": self.step.name,
            "module": self.module,
            "arguments": ", ".join(a.name for a in self.plan.arguments),
            "source": kernel_text(self.program.loaded.plan, vector_bytes()),
            "state": self._state(),
            "numbers": listed(
                "NUMBERS = {", [f"{quoted(k)}: {v!r}," for k, v in self._numbers()], "}"
            ),
            "graded": listed("WITH_GRADIENT = [", [f"{quoted(x)}," for x in self._graded()], "]"),
            "kernels": "\n".join(self._kernels()),
            "work": max(self.program._arena_bytes, 1),
            "call": "\n".join(indented(call, 8)),
            "signature": self._signature(),
            "random": self._random(),
            "imports": self._imports(call),
            "flags": listed("FLAGS = [", [f"{flag!r}," for flag in flags()], "]"),
        }
        text = SCRIPT
        for name, value in fields.items():
            text = text.replace(f"<<{name}>>", str(value))
        return text

    def _imports(self, call: Sequence[str]) -> str:
        body = "\n".join(call)
        used = [f"import {m}" for m in ("math",) if f"{m}." in body]
        return "\n".join(["import ctypes", *used, "import subprocess", "import tempfile"])

    def _state(self) -> str:
        rows = []
        for name, tensor in self._own():
            shape = tuple(tensor.shape)
            grad = ", True" if tensor.requires_grad else ""
            rows.append(f"{quoted(name)}: ({shape}, {tensor.dtype}{grad}),")
        return listed("STATE = {", rows, "}")

    def _own(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the step, without gradients."""
        gradients = set(self.step.gradients.values())
        for name, tensor in self.step.tensors.items():
            if name not in gradients:
                if tensor.stride() != contiguous_strides(tuple(tensor.shape)):
                    reason = f"{name} has strides {tensor.stride()}"
                    raise self.refused(reason, "Make it contiguous")
                yield name, tensor

    def _numbers(self) -> list[tuple[str, int | float]]:
        return list(self.step.numbers.items())

    def _graded(self) -> Iterator[str]:
        """The tensors whose gradients are there."""
        for owner, grad in self.captured.grads_read:
            place = self.plan.tensors[owner][0]
            if grad is not None and place.kind == "state":
                yield place.key

    def _kernels(self) -> Iterator[str]:
        """A line for each kernel, with the user's lines that it computes."""
        loaded = self.program.loaded
        lines: dict[str, list[str]] = {}
        for call, where in zip(loaded.plan.calls, loaded.lines(), strict=True):
            lines.setdefault(call.kernel, []).extend(where)
        for number, name in enumerate(loaded.plan.kernels):
            where = list(dict.fromkeys(lines.get(name, [])))
            said = ", ".join(where[:MOST_LINES]) + ", …" * (len(where) > MOST_LINES)
            yield f"kernel{number} = LIBRARY.kernel{number}{f'  # {said}' if said else ''}"

    # ---- a call

    def _signature(self) -> str:
        by_place = [a.name for a in self.plan.arguments if a.positional]
        by_name = [a.name for a in self.plan.arguments if not a.positional]
        more = [f"{short}=None" for short in self._short().values()]
        parts = ["self", *by_place]
        if by_name or more:
            parts += ["*", *by_name, *more]
        line = f"    def __call__({', '.join(parts)}):"
        if len(line) <= WIDE:
            return line
        return listed("    def __call__(", [f"{p}," for p in parts], "    ):", 8)

    def _short(self) -> dict[str, str]:
        """What a number may be called in a call, by its name."""
        used = [place.key for place in self.plan.scalars if place.kind == "number"]
        taken = {a.name for a in self.plan.arguments} | {"self"}
        return {name: identifier(name.rpartition(".")[2], taken) for name in dict.fromkeys(used)}

    def _call(self) -> list[str]:
        """The body of a call."""
        lines = [*self._given(), *self._tensors(), *self._read_numbers()]
        lines += self._assertions()
        program, plan = self.program, self.program.plan
        layout = program.loaded.layout
        names = program.loaded.plan.addresses(plan.buffers)
        at: dict[str, str] = {}
        outputs = sorted((b for b in plan.buffers if b.kind == "output"), key=lambda b: b.index)
        for k, b in enumerate(outputs):
            kind = f"{tuple(b.type.shape)}, dtype={TO_TORCH[b.type.dtype]}"
            if b.strides is not None and b.strides != contiguous_strides(b.type.shape):
                lines.append(
                    f"out{k} = torch.empty_strided({tuple(b.type.shape)}, {tuple(b.strides)}, "
                    f"dtype={TO_TORCH[b.type.dtype]})"
                )
            else:
                lines.append(f"out{k} = torch.empty({kind})")
            at[b.name] = f"out{k}"
        params = self.captured.sources
        for b in plan.buffers:
            if b.kind == "input":
                at[b.name] = self.inputs[params[b.index][1]].name
        for i, place in layout.places.items():
            room = "work" if place.room is None else f"{at[names[place.room]]}.data_ptr()"
            at[names[i]] = f"{room} + {place.offset}" if place.offset else room
        given = {v: self._param(i) for v, i in plan.host_params}
        scalars = self.code.add(plan.host, plan.scalars, given)
        late = frozenset(self.captured.late)
        host = self._host(lambda of: not of & late)
        lines += self._new_code()
        if any(text.startswith("work") for text in at.values()):
            lines.append("work = self.work.data_ptr()")
        lines += self._launches(at, [self._pasted(x) for x in scalars])
        results = [f"out{program._results[i]}" for i in range(len(program._results))]
        lines += self._late(results)
        host |= self._host(lambda of: bool(of & late))
        lines += self._new_code()
        numbers = [host[i] for i in range(len(host))]
        commit = Commit(self.captured, [x.name for x in self.inputs], results, numbers)
        lines += commit.lines()
        if any("f32." in line for line in lines):
            lines.insert(0, "f32 = ctypes.c_float()  # rounds what is stored in it")
        used = [x for x in ("state", "numbers") if any(f"{x}[" in line for line in lines)]
        return [*(f"{x} = self.{x}" for x in used), *lines]

    def _param(self, index: int) -> str:
        kind, i = self.captured.sources[index]
        return self.scalars[self.captured.scalars[i]] if kind == "scalar" else self.inputs[i].name

    def _given(self) -> Iterator[str]:
        """Lines that look at the arguments; `self._found` says what of them is what."""
        self._found: dict[tuple[str, int], str] = {}
        for a in self.plan.arguments:
            self.taken.add(a.name)
            yield from self._tree(a.tree, a.name)

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
                yield f"assert {text} == {value!r}, {quoted(f'this file is for {text}={value!r}')}"
            case Listed(_, items):
                said = quoted(f"{text} has {len(items)} items")
                yield f"assert len({text}) == {len(items)}, {said}"
                for i, item in enumerate(items):
                    yield from self._tree(item, f"{text}[{i}]")
            case Keyed(items):
                for key, item in items:
                    of = quoted(key) if isinstance(key, str) else repr(key)
                    yield from self._tree(item, f"{text}[{of}]")

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
        short = self._short()
        read: set[str] = set()
        for k, (value, place) in enumerate(
            zip(self.captured.scalars, self.plan.scalars, strict=True)
        ):
            match place.kind:
                case "argument":
                    text = self._found["number", k]
                case "number":
                    text = short[place.key]
                    self.taken.add(text)
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
        later, said = c.decides, set()
        for p in c.predicates:
            if p in later:
                continue
            sides = self.code.add(c.host_nodes, [p.left, p.right], self.scalars)
            test = self._pasted(condition(p, *sides)).replace("same_number(", "same(")
            yield from self._new_code()
            if test not in said:
                said.add(test)
                yield f"assert {test}, {quoted(f'this file is for {test}')}"
        for b in c.bounds:
            tensor = self.inputs[b.index].name
            spec = self.plan.tensors[b.index][1]
            if (b.shape, b.strides, b.offset) != (spec.shape, spec.strides, 0):
                tensor = f"{tensor}.as_strided({b.shape}, {b.strides}, {b.offset})"
            kind = _builtin(b.error)
            message = quoted(str(b.error.fields["reason"]))
            yield f"within({tensor}, {b.low}, {b.high}, {b.ignore}, {kind}, {message})"

    _said = 0

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

    def _launches(self, at: dict[str, str], scalars: list[str]) -> Iterator[str]:
        loaded = self.program.loaded
        number = {name: k for k, name in enumerate(loaded.plan.kernels)}
        steps = {b.name: b.step for b in self.program.plan.buffers}
        for together in runs(loaded.plan.calls, lambda call: call.loop):
            times = loaded.plan.times(together[0])
            lines = []
            for call in together:
                places = [_moved(at[b], steps.get(b, 0) if times > 1 else 0) for b in call.buffers]
                given = [scalars[slot] for slot in call.scalars]
                working = at[call.working] if call.working else ""
                lines += call_of(number[call.kernel], places, given, working)
            if times > 1:
                yield f"for i in range({times}):"
                yield from indented(lines, 4)
            else:
                yield from lines

    # ---- a try

    def _random(self) -> str:
        """Arguments made up, a line each."""
        rows = [f"{quoted(a.name)}: {self._made_up(a.tree)}," for a in self.plan.arguments]
        return "\n".join(indented(listed("return {", rows, "}").splitlines(), 4))

    def _made_up(self, tree: object) -> str:
        match tree:
            case GivenTensor(None):
                return "torch.zeros(())"
            case GivenTensor(index):
                spec = self.plan.tensors[index][1]
                dtype = TO_TORCH[spec.dtype]
                made = "randn" if dtype.is_floating_point else "zeros"
                text = f"torch.{made}({spec.shape}, dtype={dtype})"
                if spec.strides != contiguous_strides(spec.shape):
                    text += f".as_strided({spec.shape}, {spec.strides})"
                return text
            case GivenNumber(_, whole):
                return "1" if whole else "1.0"
            case GivenValue(value):
                return repr(value)
            case Listed(kind, items):
                inner = ", ".join(map(self._made_up, items))
                return f"[{inner}]" if kind is list else f"({inner},)"
            case Keyed(items):
                return "{" + ", ".join(f"{k!r}: {self._made_up(v)}" for k, v in items) + "}"
        raise AssertionError(tree)


def _moved(place: str, step: int) -> str:
    return f"{place} + i * {step}" if step else place


def _builtin(error: TracejitError) -> str:
    """The first class of Python's own that an error belongs to."""
    names = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    return next(name for name in names if getattr(builtins, name, None) is not None)
