"""What a call does once its plan is known, as one generated Python function.

In: what was captured, and its program. Out: a `Run`, straight lines that check indices, compute the
host's numbers, take memory for the outputs, run the plan and commit the effects. First runs, reruns
and replays all go through it. An exception leaves everything as before, or comes after all is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.commit import commit_lines, may_repeat, reusable_gradients, take_lines
from tracejit.capture.effects.effects import Call
from tracejit.capture.effects.late import among, cuts_behind, cuts_of_callbacks, left_by_callbacks
from tracejit.capture.proof.guards import Armed, Guard, condition
from tracejit.capture.proof.places import Places
from tracejit.capture.signature import Signature
from tracejit.capture.trace.bounds import MANY
from tracejit.capture.trace.cuts import Source
from tracejit.capture.trace.scalars import same_number
from tracejit.counters import Alike, counters_of
from tracejit.drawing import DrawLines
from tracejit.interrupts import hold, let_go, uninterrupted
from tracejit.ir import host_memory
from tracejit.ir.graph import Arg, Graph
from tracejit.ir.hostcode import HostCode, host_names
from tracejit.parts import Parts, Stage
from tracejit.records import dataclass
from tracejit.runtime.executor import Inlined
from tracejit.runtime.program import Program

# (outside tensors, runtime scalars, the tensors' addresses, holders of state variables, the call)
# -> the result
Function = Callable[[list, list, list, list, Call], object]


@dataclass
class Hooks:
    """`observer(final graph, inputs, outputs)` is called before a plan runs. It returns a function,
    which is called after the commit."""

    observer: Callable | None = None


@dataclass(frozen=True)
class Run:
    """What calls of one captured step do."""

    function: Function
    text: str
    captured: Captured
    parts: Parts | None = None  # the segments that it runs, where there are several


@dataclass(eq=False)
class Replay:
    """An armed replay of something compiled: its guard, the run for calls that the guard accepts,
    and the `Call` with all objects that a replay needs besides tensors and scalars. While calls of
    it are verified, others stand for the guard and the run."""

    guard: Guard
    guard_text: str
    run: Run
    compiled: object
    call: Call
    captured: Captured
    signature: Signature  # of the call that it was armed in

    @property
    def decides(self) -> bool:
        """Whether by values of tensors."""
        return self.captured.branches

    @property
    def cuts(self) -> int:
        """How many values it reads."""
        return len(self.captured.cuts)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What runs before the rest."""
        return () if self.run.parts is None else self.run.parts.stages

    def told(self, branches: int) -> str:
        """What is to be said of the values that the step reads."""
        if not self.cuts:
            return ""
        before = len(self.stages)
        text = f"; values read: {before} before the rest, {self.cuts - before} after it"
        return text + (f"; branches that values decide: {branches}" if branches else "")


class _Otherwise:
    """What a replay returns, with nothing changed, where a decision comes out otherwise."""

    def __repr__(self) -> str:
        return "<a decision came out otherwise>"


OTHERWISE = _Otherwise()


def generate(
    captured: Captured,
    program: Program,
    final: Graph,
    backwards: list,
    hooks: Hooks,
    armed: Armed | None = None,
    parts: Parts | None = None,
    *,
    checking: Callable | None = None,
) -> Run:
    """The function of a captured step: of traced calls, or of replays where `armed` is given.

    A replay makes the calls again that the trace made untraced (a scheduler's step), and uses
    the numbers that its guard has read. It reads the values that Python would read: those that it
    decides or computes by from `parts`, which run before the rest, others from the plan's results.
    It returns OTHERWISE, with nothing changed, where a decision comes out in another way; then
    the stages keep their results for another replay of the same call. A rerun has the results of
    its `parts` at hand. `checking(inputs, errors)` raises one of the errors of the step's checks;
    it is asked before anything is written, and once it is known that Python goes this way.
    """
    given = captured, program, final, backwards, hooks, armed, parts, checking
    text, names = _Writer(*given).all()
    exec(compile(text, "<tracejit run>", "exec"), names)
    if armed is not None and (alike := counters_of(captured, armed.places)):
        shorter, inner = _Writer(*given, alike=alike).all()
        exec(compile(shorter, "<tracejit run>", "exec"), inner)
        made = {"together": inner.pop("perform"), "apart": names.pop("perform")}
        names = made | {"alike": Alike(alike)}
        exec(_EITHER, names)
        text = f"{shorter}\n{text}\n{_EITHER}"
    return Run(names.pop("perform"), text, captured, parts)


# That many numbers, each with a local, are apart, must cost nothing where they are one.
_EITHER = """\
def perform(reals, scalars, addresses, holders, call):
    perform = together if alike(scalars) else apart
    return perform(reals, scalars, addresses, holders, call)
"""


class _Writer:
    """Writes the lines of one function, and collects the names that they use."""

    def __init__(
        self,
        captured: Captured,
        program: Program,
        final: Graph,
        backwards: list,
        hooks: Hooks,
        armed: Armed | None,
        parts: Parts | None,
        checking: Callable | None,
        alike: Sequence[int] = (),  # scalars that are all the same: it is computed with one of them
    ):
        self.captured, self.armed, self.parts = captured, armed, parts
        self.program = program if parts is None else parts.program
        self.places = None if armed is None else armed.places
        self.names = host_names() | {
            **{"final": final, "hooks": hooks, "backwards": backwards, "places": self.places},
            **{"uninterrupted": uninterrupted, "hold": hold, "let_go": let_go},
            **{"checking": checking, "OTHERWISE": OTHERWISE},
        }
        self.code = HostCode()
        self.of_c = of_c = getattr(program, "executor", "") == "c"
        self.draws = DrawLines(
            captured.draws, self.names, replayed=armed is not None, streamed=of_c
        )
        self.before: list[str] = []
        self._written = 0  # lines of `code` that stand in `before`
        self.one = dict.fromkeys(alike, next(iter(alike), None))
        self.scalars = {v: self._scalar(i) for i, v in enumerate(captured.scalars)}
        given = captured.scalars, captured.paths, captured.host_nodes
        self.behind = cuts_behind(*given, captured.operands)
        self.left = left_by_callbacks(*given, self.behind)
        self.on_callbacks = captured.decides_by_callbacks
        self.cut_scalars = {p[1]: i for i, p in enumerate(captured.paths) if p[0] == "cut"}

    def all(self) -> tuple[str, dict[str, object]]:
        captured, before, names = self.captured, self.before, self.names
        if self.armed is None:
            count = sum(cut.found for cut in captured.cuts)
            before += [f"found{k} = call.found[{k}]" for k in range(count)]
            before += self.draws.drawn(self._drawn())
        if self.armed is not None and captured.branches:
            self._stages()  # first: what is checked may stand behind a decision
            self._draw()
            self._checks(range(1))
            before += [*self._callbacks(1), *self._callbacks(2)]
            self._decide_by_callbacks()
            self._checks(range(1, 3))
        else:
            self._checks(range(1))
            before += self._callbacks(1)  # once indices are known to be right
            self._checks(range(1, 2))
            if self.parts is not None:
                self._stages()
            self._draw()
            before += self._callbacks(2)
            self._checks(range(2, 3))
        reusable = reusable_gradients(captured)
        if reusable is not None:
            names["reusable_gradients"] = reusable
            before.append("reusable = reusable_gradients(reals)")
        late = frozenset(() if self.armed is None else captured.late)
        host = self._host(lambda x: not among(self.behind, (x,)) & late)
        run, outputs = self._plan("()" if reusable is None else "reusable")
        inputs = [_input(*source) for source in captured.sources]
        before += [
            *self._code(),
            *run.gather,
            *take_lines(captured.effects, names),
            "seen = hooks.observer",
            "if seen is not None:",
            f"    seen = seen(final, [{', '.join(inputs)}], [{', '.join(outputs)}])",
        ]
        commit = self._late_numbers(late, outputs, host)
        calls = self._callbacks(3)
        host |= self._host(lambda x: x in self.left and bool(among(self.behind, (x,)) & late))
        commit += self._commit(outputs, host, [*calls, *self._code()])
        used = [x for x in ("cells", "elements") if any(f"{x}[" in line for line in commit)]
        held = run.ran is None or bool(calls) or not may_repeat(captured.effects)
        again = "again" in names  # what schedulers have done is taken back too
        undo = [
            *["again.take_back(remembered)"] * again,
            *self.draws.undo(),
            "call.undo()",
            "raise",
        ]
        lines = [
            *["remembered = again.remember()"] * again,
            *self.draws.begin(),
            "try:",
            *(f"    {name} = places.{name}" for name in used),  # where the guard has seen them
            *_indented(before),
            *_indented(["hold()"] * held),
            "except BaseException:",
            *_indented(self._forgotten()),
            *_indented(undo),
        ]
        work = [run.run, *commit]
        if held:
            if run.undone or run.ran is not None:
                failed = [*[f"if {run.ran}: raise"] * (run.ran is not None), *undo]
                work = ["try:", f"    {run.run}", "except BaseException:", *_indented(failed)]
                work += commit
            lines += ["try:", *_indented(work), "finally: let_go()"]
        else:
            ends = [f"if {run.ran}:", "    with uninterrupted():", *_indented(_indented(commit))]
            ends += ["else:", *_indented(undo[:-1]), "raise"]
            lines += ["try:", *_indented(work), "except BaseException:", *_indented(ends)]
        lines += ["if seen is not None:", "    seen()", "return returned"]
        text = "\n".join(
            ["def perform(reals, scalars, addresses, holders, call):", *_indented(lines), ""]
        )
        return text, names

    def _drawn(self) -> set[int]:
        """The draws that inputs are."""
        checks = self.captured.checks
        sources = [*self.captured.sources, *(() if checks is None else checks.sources)]
        sources += [source for cut in self.captured.cuts for source in cut.sources]
        return {k for of, k in sources if of == "draw"}

    def _checks(self, when: range) -> None:
        """Check the values of index tensors (0), and computed values: these as soon as what they
        are computed from is there, after the callbacks (1) or the stages (2)."""
        captured, before = self.captured, self.before
        if 0 in when:
            for i, bound in enumerate(captured.bounds):
                self.names[f"bound{i}"] = bound
                many = self.of_c and prod(bound.shape) >= MANY
                if many:
                    from tracejit.runtime.pool import within

                    self.names["within"] = within
                before.append(f"bound{i}.check(reals{', within' * many})")
        if captured.checks is not None and self._ready(captured.checks.sources) in when:
            self.names["errors"] = captured.checks.errors
            inputs = ", ".join(_input(*source) for source in captured.checks.sources)
            before.append(f"checking([{inputs}], errors)")

    def _ready(self, sources: Sequence[Source]) -> int:
        """When inputs are there: see `_checks`."""
        paths = self.captured.paths
        kinds = {of if of != "scalar" else paths[i][0] for of, i in sources}
        left = any(of == "scalar" and self.captured.scalars[i] in self.left for of, i in sources)
        if left or not kinds.isdisjoint(("cut", "found", "draw")):
            return 2
        return 1 if "after" in kinds else 0

    def _callbacks(self, when: int) -> list[str]:
        """Make the calls again that a replay makes, and read what they leave: those that are given
        no value of a tensor (1), those whose values the stages have computed (2), or the plan (3).
        """
        lines = []
        operands = self.captured.operands if self.armed is not None else ()
        if operands:
            self.names["again"] = again = self.armed.callbacks
        for n, of in enumerate(cuts_of_callbacks(self.behind, operands)):
            if when == (3 if not of.isdisjoint(self.captured.late) else 1 + bool(of)):
                nodes = self.captured.host_nodes
                arguments = self.code.add(nodes, operands[n], self.scalars)
                made = f"again({', '.join([str(n), 'scalars', *arguments])})"
                lines += self._code()
                if again.may_fail and when < 3:
                    lines.append(f"if {made}:")
                    lines += ["    again.put_back(remembered)", *self._leave()]
                else:
                    lines.append(made)
        return lines

    def _leave(self) -> list[str]:
        """Leave with nothing changed, in a block."""
        return _indented(self.draws.otherwise("True"))

    def _code(self) -> list[str]:
        """The lines of host arithmetic that do not stand anywhere yet."""
        lines = self.code.lines[self._written :]
        self._written = len(self.code.lines)
        return lines

    def _host(self, wanted: Callable[[Arg], bool]) -> dict[int, str]:
        """The expressions of those host results that are `wanted`, by position."""
        results = self.captured.effects.host
        chosen = [i for i, x in enumerate(results) if wanted(x)]
        found = self.code.add(self.captured.host_nodes, [results[i] for i in chosen], self.scalars)
        return dict(zip(chosen, found, strict=True))

    # ---- segments

    def _stages(self) -> None:
        """The results of the stages, which a rerun has at hand; a replay runs them, and takes the
        decisions on their values."""
        if self.parts is None:  # all decisions are on what callbacks leave
            return None
        if self.armed is None:
            parts = range(len(self.parts.stages))
            return self.before.extend(f"part{n} = call.parts[{n}]" for n in parts)
        self.names["same_number"] = same_number
        self.names["read"] = host_memory.read
        decides = self.captured.branches
        found = 0  # inputs so far that cuts have found
        for n, (k, stage) in enumerate(zip(self.parts.cuts, self.parts.stages, strict=True)):
            self.names[f"stage{n}"] = stage
            cut = self.captured.cuts[k]
            self._draw(cut.drawn)
            inputs = [
                _input(*cut.sources[i]) if of == "cone" else self._result(of, i)
                for of, i in stage.inputs
            ]
            run = "run_once" if decides else "run"
            self.before.append(f"part{n} = stage{n}.{run}([{', '.join(inputs)}])")
            if cut.count is None:
                number = f"stage{n}.read(part{n}[0])"
                self.before.append(f"scalars[{self.cut_scalars[k]}] = {number}")
                self._decide(k)
            else:
                self.names[f"search{n}"] = cut.search
                names = "".join(f"found{found + i}, " for i in range(cut.found))
                self.before.append(f"{names}= search{n}(part{n}[0])")
                other = f"len(found{found}) != {cut.count}"
                self.before += self.draws.otherwise(other)
                found += cut.found
        self.before += self._forgotten()

    def _forgotten(self) -> list[str]:
        """Lines after which the stages keep nothing of this call for other plans: the same inputs
        may hold something else in the next one."""
        if self.armed is None or self.parts is None or not self.captured.branches:
            return []
        return [f"stage{n}.kept = None" for n in range(len(self.parts.stages))]

    def _result(self, stage: Stage, index: int) -> str:
        """An expression of a stage's result."""
        return f"part{self.parts.stages.index(stage)}[{index}]"

    def _decide(self, cut: int) -> None:
        """Take the decisions that wait for no cut but this one and earlier ones."""
        for p in self.captured.predicates:
            of = among(self.behind, (p.left, p.right))
            if of and max(of) == cut and p not in self.on_callbacks:
                sides = self.code.add(self.captured.host_nodes, [p.left, p.right], self.scalars)
                self.before += self._code()
                self.before += self.draws.otherwise(f"not ({condition(p, *sides)})")

    def _decide_by_callbacks(self) -> None:
        """Take the decisions on what callbacks have left, which are taken back otherwise."""
        for p in self.on_callbacks:
            sides = self.code.add(self.captured.host_nodes, [p.left, p.right], self.scalars)
            self.before += [
                *self._code(),
                f"if not ({condition(p, *sides)}):",
                "    again.put_back(remembered)",
                *self._leave(),
            ]

    def _draw(self, count: int | None = None) -> None:
        """Make the draws up to a number of them, or all, that a replay has not made yet."""

        def numbers(operands: Sequence[Arg]) -> list[str]:
            found = self.code.add(self.captured.host_nodes, operands, self.scalars)
            self.before += self._code()
            return found

        for line in self.draws.lines(count, numbers):
            self.before.append(line)

    def _rest_inputs(self) -> list[str]:
        """Expressions of the inputs of the rest: addresses and floats."""
        sources = {}
        for of in (self.captured, *self.captured.cuts):
            values = (p.value for p in of.graph.params)
            sources.update(zip(values, of.sources, strict=True))
        return [
            self._given(*sources[x]) if of == "param" else f"{self._result(of, x)}.data_ptr()"
            for of, x in self.parts.inputs
        ]

    def _scalar(self, index: int) -> str:
        return f"scalars[{self.one.get(index, index)}]"

    def _given(self, kind: str, index: int) -> str:
        """An expression of an input for the plan: an address or a float."""
        if kind in _NAMED:
            return f"{kind}{index}.data_ptr()"
        return f"addresses[{index}]" if kind == "tensor" else self._scalar(index)

    def _plan(self, reusable: str) -> tuple[Inlined, list[str]]:
        """The run of the plan, and the expressions of the results of the step's graph."""
        if self.parts is None:
            params = [self._given(*source) for source in self.captured.sources]
        else:
            params = self._rest_inputs()
        run, outputs = self.program.inlined(params, reusable, self.code)
        self.names |= run.names
        if self.parts is not None:
            outputs = [
                outputs[i] if of == "rest" else self._result(of, i) for of, i in self.parts.results
            ]
        return run, outputs

    # ---- after the plan

    def _late_numbers(
        self, late: frozenset[int], outputs: list[str], host: dict[int, str]
    ) -> list[str]:
        """Read the values that Python would read from the plan's results, and compute with them."""
        lines = []
        if late:
            self.names["read"] = getattr(self.program.loaded, "read", host_memory.read)
        values = outputs[len(outputs) - len(late) :]
        for k, value in zip(sorted(late), values, strict=True):
            lines.append(f"scalars[{self.cut_scalars[k]}] = read({value})")
        behind, left = self.behind, self.left
        host |= self._host(lambda x: x not in left and bool(among(behind, (x,)) & late))
        return [*lines, *self._code()]

    def _commit(self, outputs: list[str], host: dict[int, str], last: list[str]) -> list[str]:
        return commit_lines(
            self.captured,
            outputs,
            [host[i] for i in range(len(host))],
            last,
            cell=lambda i: _cell(self.places, i),
            elements=lambda indices: _elements(self.places, indices),
            grad_on=self.armed is not None and torch.is_grad_enabled(),
            names=self.names,
        )


def _input(kind: str, index: int) -> str:
    """An expression of an input: a tensor or a float."""
    return f"{kind}{index}" if kind in _NAMED else f"{_LISTS[kind]}[{index}]"


_NAMED = ("found", "draw")
_LISTS = {"tensor": "reals", "scalar": "scalars"}


def _cell(places: Places | None, index: int) -> str | None:
    cell = None if places is None else places.cell(index)
    return None if cell is None else f"cells[{cell}]"


def _elements(places: Places | None, indices: Sequence[int]) -> str | None:
    many = None if places is None else places.many(indices)
    return None if many is None else f"elements[{many}]"


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
