"""`step.eject(path)`: a step as one Python file that runs without tracejit.

In: a SavedStep (`saved/save.py`). Out: the text of a file: the kernels of its first plan in C or
Triton, the class `Step` whose calls check their arguments, compute the step's numbers, launch the
kernels in their order and commit what the step changes, and a `main` that tries it. Running it
gives the bits that the step gives.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from tracejit.capture.effects.captured import Captured
from tracejit.errors import CannotEject
from tracejit.export.eject_c import CKernels
from tracejit.export.eject_call import CallText, Kernels
from tracejit.export.eject_commit import plain_text
from tracejit.export.eject_parts import EjectedParts, parts_of
from tracejit.export.eject_text import SCRIPT, identifier, indented, listed, quoted
from tracejit.export.eject_triton import TritonKernels
from tracejit.ir.types import contiguous_strides
from tracejit.options import Options
from tracejit.pipeline import Pipeline, Stats
from tracejit.saved.record import SavedPlan, SavedStep


def eject(step: SavedStep, path: str | os.PathLike, backend: str = "auto") -> None:
    """Write the file of a step's first plan, for a backend of `tracejit.compile`. Raises
    CannotEject for what it cannot say, and OSError where the file cannot be written."""
    text = Ejected(step, Path(path).stem, backend).text()
    Path(path).write_text(text, encoding="utf-8")


class Ejected:
    """The file of one plan; `module` is how it will be imported."""

    def __init__(self, step: SavedStep, module: str, backend: str):
        self.step, self.module, self.backend = step, module, backend
        self.plan: SavedPlan = step.plans[0]
        paths = tuple((place.kind, place.key) for place in self.plan.scalars)
        self.captured: Captured = replace(self.plan.captured, paths=paths)
        self.device = next((spec.device for _, spec in self.plan.tensors), "cpu")
        self._refuse()
        self.parts = self._parts()
        self.kernels = self._kernels()

    # ---- what there is

    def _refuse(self) -> None:
        c = self.captured
        for event in c.draws:
            if self.step.generators[self.plan.generators[event.generator]].state is not None:
                remedy = "Draw from torch's own, which torch.manual_seed rules"
                raise self.refused("it draws from a generator of yours", remedy)
        for cut in c.cuts:
            if cut.search is not None:
                remedy = "Compute with all elements, as torch.where does"
                raise self.refused(
                    f"it depends on how many elements it finds at {cut.where}", remedy
                )
        if c.effects.callbacks or self.step.asked:
            remedy = "Step it outside, and give calls its rate: lr=…"
            raise self.refused("it steps a learning-rate scheduler", remedy)
        if c.effects.escaped:
            raise self.refused("it keeps an intermediate in an object", "Return it")

    def refused(self, reason: str, remedy: str) -> CannotEject:
        return CannotEject(step=self.step.name, reason=reason, remedy=remedy)

    def _parts(self) -> EjectedParts:
        """The programs of a call."""
        chosen = {name: self.step.options[name] for name in ("fuse", "remat")}
        options = Options(backend=self.backend, **chosen)
        name = identifier(self.step.name, set())
        pipeline = Pipeline(name, f"the step {self.step.name}", Stats(), options)
        executor = pipeline.executor(self.captured.graph, self.step.options["precision"])
        parts = parts_of(self.captured, pipeline, executor)
        for program in parts.programs:
            for launch in program.plan.launches:
                if launch.kernel.call is not None:
                    reason = f"it calls {launch.kernel.call.op.name} of LAPACK"
                    raise self.refused(reason, "Call that outside of the step")
        return parts

    def _kernels(self) -> Kernels:
        if self.parts.rest.executor == "c":
            return CKernels(self.parts.programs)
        if hasattr(self.parts.rest.loaded, "launched"):
            return TritonKernels(self.parts.programs, self.device)
        raise self.refused("it runs on numpy", 'Compile it with backend="c"')

    # ---- the file

    def text(self) -> str:
        """The whole file."""
        own = self.kernels, self.refused, self.step.lists
        call = CallText(self.plan, self.captured, self.parts, *own)
        lines = call.lines()
        numbers = [f"{quoted(k)}: {plain_text(v)}," for k, v in self.step.numbers.items()]
        imports = {*self.kernels.imports, "from sys import argv"}
        for module in ("ctypes", "math"):
            if any(f"{module}." in line for line in lines):
                imports.add(f"import {module}")
        made_up = call.made_up()
        if "SimpleNamespace(" in made_up:
            imports.add("from types import SimpleNamespace")
        if call.kinds:
            imports.add("from collections import namedtuple")
        own = sorted(imports, key=lambda x: (x.startswith("from "), x))
        lists = [f"{quoted(name)}: []," for name in self.step.lists]
        if lists:
            lists = listed("self.lists = {", lists, "}  # what calls append").splitlines()
        fields = {
            "name": self.step.name,
            "module": self.module,
            "needs": self.kernels.needs,
            "arguments": ", ".join(call.names.values()),
            "imports": "\n".join(own),
            "others": "\n".join(["import torch", *self.kernels.others]),
            "state": self._state(),
            "graded": listed("WITH_GRADIENT = [", [f"{quoted(x)}," for x in self._graded()], "]"),
            "numbers": listed("NUMBERS = {", numbers, "}"),
            "kinds": "".join(f"\n{line}" for line in call.kind_lines()),
            "kernels": self.kernels.text,
            "fields": "\n".join(indented([*self.kernels.fields, *lists], 8)),
            "signature": call.signature(),
            "call": "\n".join(indented(lines, 8)),
            "made_up": made_up,
            "device": "" if self.device == "cpu" else f", device={quoted(self.device)}",
        }
        text = SCRIPT
        for name, value in fields.items():
            text = text.replace(f"<<{name}>>", value)
        return text

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

    def _graded(self) -> Iterator[str]:
        """The tensors whose gradients are there."""
        for owner, grad in self.captured.grads_read:
            place = self.plan.tensors[owner][0]
            if grad is not None and place.kind == "state":
                yield place.key
