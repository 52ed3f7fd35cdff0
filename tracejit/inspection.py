"""What a compiled step tells of itself: its plans, kernels, guards, what they cost, and why."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import FunctionType
from typing import TYPE_CHECKING

import torch

from tracejit.capture.effects.eager import EagerCost
from tracejit.capture.signature import Thing
from tracejit.fallback import Fallback
from tracejit.ir.graph import Graph
from tracejit.many_calls import ManyCalls
from tracejit.options import Options
from tracejit.pipeline import Backward, Stats
from tracejit.programs import Compiled, Programs
from tracejit.remarks import Remarks
from tracejit.run import Replay, Run
from tracejit.runtime.program import Program
from tracejit.schedule import schedule
from tracejit.schedule.plan import Plan

if TYPE_CHECKING:
    from tracejit.capture.proof.prover import Prover
    from tracejit.explain import Subject
    from tracejit.ledger import Ledger
    from tracejit.pictures.picture import Picture
    from tracejit.saved.record import SavedStep


class Inspected(ManyCalls):
    """The part of a compiled step that says what was compiled. `compile.py` has the rest, which
    keeps these."""

    __name__: str
    stats: Stats
    options: Options
    _function: FunctionType
    _lock: threading.RLock
    _last: Compiled | None
    _last_run: Run | None
    _programs: Programs
    _replays: list[Replay]
    _fallback: Fallback | None
    _prover: Prover
    _remarks: Remarks

    def save(self, path: str | os.PathLike, *, objects: bool = False, of: object = None) -> None:
        """Put the step into a file, from which `tracejit.load(path)` runs it without its code.

        The file has every plan that a call would replay now (one for each set of shapes), the
        parameters, buffers, gradients and optimizer state as they are, and the numbers that the
        step reads: learning rates, counters. See docs/saving.md.

        objects: whether to put compiled kernels into it too, for this kind of machine. A load uses
            them if the file is signed by the key in the user's cache directory, as it is now.
        of: the object whose method the step is, where there are several; `trainer.step.save(path)`
            gives it.

        Raises CannotSave for what a file cannot keep, such as a step that is not replayed: its
        Python decides what it does; and OSError where the file cannot be written.
        """
        from tracejit.saved.loaded import save

        with self._lock:
            saved = self._saved(self._replays_of(of))
            save(path, saved, objects=objects, backend=self.options.backend)

    def eject(self, path: str | os.PathLike, *, of: object = None) -> None:
        """Write the plan that ran last as one Python file that needs torch, and a C compiler on the
        CPU, Triton on a GPU: its kernels, the order of their launches, and what a call checks and
        changes. See docs/ejecting.md.

        Raises CannotEject for what such a file cannot do, CannotSave for a step that is not
        replayed, and OSError where the file cannot be written.
        """
        from tracejit.export.eject import eject

        with self._lock:
            eject(self._saved(self._replays_of(of)[:1]), path, self.options.backend)

    def _replays_of(self, instance: object) -> list[Replay]:
        """The replays as they would be made of calls for an object; as they are for None."""
        if instance is None:
            return self._replays
        return [
            replace(
                r, signature=replace(r.signature, args=(Thing(instance), *r.signature.args[1:]))
            )
            for r in self._replays
            if r.signature.args and isinstance(r.signature.args[0], Thing)
        ]

    def _saved(self, replays: list[Replay]) -> SavedStep:
        """What a file keeps of the step."""
        from tracejit.saved.save import Saving, saved_step

        saving = Saving(self._programs.name, self._function)
        options = {
            "fuse": self.options.fuse,
            "remat": self.options.remat,
            "precision": torch.get_float32_matmul_precision(),
        }
        return saved_step(saving, replays, options, self.explain_mode)

    @property
    def graph(self) -> Graph | None:
        """The final IR of the plan that ran last."""
        return None if self._last is None else self._last.final

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs of `graph`, as the user's code calls them: `model.0.weight`."""
        return () if self._last is None else self._last.names

    @property
    def plans(self) -> list[Plan]:
        """Every plan, the one that ran last at the end."""
        return [c.program.plan for c in self._programs.kept]

    @property
    def plan_on_gpu(self) -> Plan | None:
        """The plan that ran last, as a GPU would get it."""
        if not self._programs.kept:
            return None
        program, fuse = self._programs.kept[-1].program, self.options.fuse
        return schedule(program.graph, fuse=fuse, again=self.options.remat == "auto", gpu=True)

    @property
    def segments(self) -> list[Plan]:
        """The plans that the last call ran, in turn: several where the step reads values before
        the rest of it."""
        return [program.plan for program in self._ran_programs()]

    def _ran_programs(self) -> list[Program]:
        if self._last is None:
            return []
        parts = self._last_run.parts
        if parts is None:
            return [self._last.program]
        return [*(stage.program for stage in parts.stages), parts.program]

    @property
    def backward_plans(self) -> list[Plan]:
        """The plans that backward outside the step has run, of the plan that ran last."""
        if self._last is None:
            return []
        return [b.program.plan for b in self._last.backwards if b.program is not None]

    @property
    def kernels(self) -> list[str]:
        """The source of each kernel of the plan that ran last, as its executor runs it: C, Triton,
        or for numpy the kernel itself."""
        return [s.text for program in self._ran_programs() for s in program.loaded.sources]

    @property
    def guards(self) -> list[str]:
        """The source of the guard of each armed replay, the one that ran last first."""
        return [replay.guard_text for replay in self._replays]

    def explain_mode(self) -> str:
        """ "replay", "rerun" or "eager", and why calls are not replayed, or not even compiled."""
        fallback = self._fallback
        some = ""
        if fallback is not None and fallback.why and not self._replays:
            return f"eager: {fallback.why}"
        if fallback is not None and fallback.ever:
            some = f"; some calls ran eagerly: {fallback.ever}"
        if self._replays:
            read = self._replays[0].told(self.stats.branches)
            return f"replay: {len(self._replays)} plan(s) armed{read}{some}"
        return f"rerun: {self._prover.why}{some}"

    def explain_retraces(self) -> list[str]:
        """Why calls were not replayed although a replay was armed, the latest last: what changed,
        from what to what, and whether a plan was found or built."""
        return list(self._remarks.retraces)

    def explain(
        self,
        gpu: str = "H200",
        *,
        eager_seconds: float | None = None,
        machine_code: bool = False,
        measure: bool = True,
    ) -> Ledger:
        """What the step costs, beside what it has to cost, and what holds it back: a `Ledger`, to
        print, as data, or as a page. Of the plans that the last call ran.

        gpu:           whose time is predicted, one of `gpus.GPUS`; no such GPU is needed.
        eager_seconds: what a call takes without tracejit, as you have measured it; else what eager
                       should take on the GPU is predicted.
        machine_code:  compile the launches for the GPU, which takes Triton and a second each, and
                       predict by that; else registers and shared memory are guessed.
        measure:       time kernels that run natively, on memory of their own, if there is enough.

        Raises ValueError for a step that was not called.
        """
        from tracejit.explain import explain

        options = {"eager_seconds": eager_seconds, "machine_code": machine_code, "measure": measure}
        with self._lock:
            last = self._last
            if last is None and not self.stats.eager:
                raise ValueError(f"{self.__name__} has no plan yet: call it before it is explained")
            programs = []
            if last is not None:
                checks = [] if last.checking is None else [last.checking.program]
                programs = [*checks, *self._ran_programs(), *(b.program for b in self._outside())]
            return explain(self._subject(programs), gpu, **options)

    def _outside(self) -> list[Backward]:
        """The backwards outside the step that have run, of the plan that ran last."""
        return [b for b in self._last.backwards if b.program is not None]

    def _subject(self, programs: Sequence[Program]) -> Subject:
        """What a ledger tells of, for these programs."""
        from tracejit.explain import Subject

        last, graphs, backend, eager = self._last, [], "eager", EagerCost()
        if last is not None:
            graphs = [last.final, *(b.graph for b in self._outside())]
            backend, eager = last.backend, last.eager
        return Subject(
            *(self.__name__, self.explain_mode(), self.explain_retraces()),
            *(graphs, programs, backend, self.stats.seconds, eager),
        )

    def draw(
        self,
        path: str | os.PathLike,
        *,
        gpu: str = "H200",
        measure: bool = True,
    ) -> None:
        """Draw the plan that ran last into a file, as the end of its name says.

        .html: a page that needs nothing else: the graph by modules, lines or kernels, beside the
               code that it comes from and the kernels that it became, with what these cost.
        .svg:  the graph with its groups folded, for a paper; `.png` the same, by matplotlib, which
               is in the extra `pictures`.

        gpu:     whose time is predicted, one of `gpus.GPUS`.
        measure: time kernels that run natively, on memory of their own, if there is enough.

        Raises ValueError for a step that was not called, or that runs eagerly, and for other ends;
        ImportError where matplotlib is missing, OSError where the file cannot be written.
        """
        from tracejit.pictures.files import write

        write(lambda: self._picture(gpu, measure), path)

    def to_tensorboard(self, logdir: str | os.PathLike) -> None:
        """Write the graph of the plan that ran last where TensorBoard finds it: its graph tab shows
        it by modules, with shapes and devices. Needs the extra `tensorboard`.

        Raises ValueError for a step that was not called, or that runs eagerly; ImportError where
        TensorBoard is missing, OSError where the files cannot be written.
        """
        from tracejit.pictures.tensorboard import write

        write(lambda: self._picture("H200", measure=False), logdir)

    def _picture(self, gpu: str, measure: bool) -> Picture:
        """The picture of the plan that ran last."""
        from tracejit.explain import explain
        from tracejit.pictures.collect import Drawn, picture
        from tracejit.pictures.sections import Sections

        with self._lock:
            last, run = self._last, self._last_run
            if last is None:
                if self.stats.eager:
                    why = self.explain_mode()
                    raise ValueError(f"{self.__name__} has no plan that could be drawn: {why}")
                raise ValueError(f"{self.__name__} has no plan yet: call it before it is drawn")
            backwards = [(i, b) for i, b in enumerate(last.backwards) if b.program is not None]
            made = Sections(run.captured, last.names, last.program, run.parts, backwards).found
            notes = []
            if run.parts is not None:
                notes.append(
                    "Python reads values in the middle of the step, so it runs in "
                    f"{len(run.parts.stages) + 1} segments"
                )
            if last.checking is not None:
                notes.append("values are checked before anything is written, which is not drawn")
            ledger = explain(self._subject([x.program for x in made]), gpu, measure=measure)
            code = self._function.__code__
            return picture(Drawn(self.__name__, made, code, ledger, notes))

    def _note(self, failed: str, *, built: bool) -> None:
        """Keep why a call was not replayed."""
        if failed:
            text = f"{failed}; {'a new plan was built' if built else 'its plan was there'}"
            self._programs.pipeline.report(f"not replayed: {text}")
            self._remarks.retraced(text)
        if built:
            self._prover.built()
        self._remarks.warn_of_many(self._programs.varying)

    def _warn_of_rerun(self) -> None:
        why, self._prover.warning = self._prover.warning, ""
        if why:
            self._remarks.warn("rerun", f"reruns its Python on every call, which is slower: {why}")


class BoundStep(functools.partial):
    """A step that is a method, of one object: `trainer.step`. It has what the step has; `save` and
    `eject` keep what it does for this object."""

    def __getattr__(self, name: str) -> object:
        return getattr(self.func, name)

    def run(self, k: int, data: Iterable) -> list:
        """As `ManyCalls.run`, with this object."""
        return self.func.run(k, data, of=self.args)

    def save(self, path: str | os.PathLike, *, objects: bool = False) -> None:
        """As `Inspected.save`, of the plans for this object."""
        self.func.save(path, objects=objects, of=self.args[0])

    def eject(self, path: str | os.PathLike) -> None:
        """As `Inspected.eject`, of the plan for this object that ran last."""
        self.func.eject(path, of=self.args[0])
