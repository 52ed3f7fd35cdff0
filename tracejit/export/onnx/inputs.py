"""What a model reads: arguments, weights, state, numbers, random numbers; and which of them are its
inputs.

Inputs are the arguments, and what a run may want to replace: all that the step changes, gradients
that it reads, and runtime scalars. Each of these but the arguments has the value of now as default.
Weights that the step leaves alone are constants of the model.
"""

from __future__ import annotations

from dataclasses import field

import torch

from tracejit.capture.trace.draws import Draw, Together
from tracejit.export.onnx.step import Traced
from tracejit.export.onnx.writer import Writer, element, held, is_narrower
from tracejit.ir.graph import Value
from tracejit.ir.torch_types import TO_IR
from tracejit.ir.types import HOST_SCALAR, DType, Type, f64
from tracejit.records import dataclass
from tracejit.saved.tensors import raw

LIMIT = (1 << 31) - (1 << 20)  # bytes of a file that protobuf writes and reads
_FREE = ("arg", "kwarg", "cell", "global", "default", "kwdefault", "entry")


@dataclass
class Inputs:
    """The inputs and weights of a model, as they are asked for."""

    traced: Traced
    w: Writer
    frozen: frozenset[int]  # runtime scalars that decisions depend on
    changed: frozenset[int]  # outside tensors that the step changes
    inputs: list[tuple[str, Type]] = field(default_factory=list)
    weights: list = field(default_factory=list)
    draws: list[dict] = field(default_factory=list)
    _tensors: dict[int, tuple[str, str]] = field(default_factory=dict)  # its name; as held
    _scalars: dict[int, tuple[str, str]] = field(default_factory=dict)
    _bytes: int = 0

    def of(self, kind: str, index: int) -> str:
        """The value of an input of the graph, held."""
        match kind:
            case "tensor":
                return self.tensor(index)
            case "scalar":
                return self.scalar(index)
            case "draw":
                return self.draw(index)
        raise AssertionError(kind)

    def arguments(self) -> list[str]:
        """The arguments, in their order, as inputs; also those that nothing reads."""
        names, taken = [], {id(x): k for k, x in enumerate(self.traced.call.reals)}
        paths = self.traced.captured.paths
        for path, x in self.traced.arguments:
            if not isinstance(x, torch.Tensor):
                k = paths.index(path) if path in paths else None
                names += [] if k is None or k in self.frozen else [self.number_of(k)]
            elif id(x) in taken:
                names.append(self.input_of(taken[id(x)]))
            else:
                known = self.traced.names.tensors.get(id(x))
                names.append(self.w.name(self.traced.shown(known, f"argument_{len(names)}")))
                self.inputs.append((names[-1], Type(TO_IR[x.dtype], tuple(x.shape))))
        return names

    # ---- tensors

    def input_of(self, index: int) -> str:
        """The name of the input, or the weight, that an outside tensor is."""
        self.tensor(index)
        return self._tensors[index][0]

    def tensor(self, index: int) -> str:
        """The value that an outside tensor has before the step, held."""
        if index not in self._tensors:
            real = self.traced.call.reals[index]
            kind = Type(TO_IR[real.dtype], tuple(real.shape))
            name = self.w.name(self.traced.tensor_name(index))
            argument, changed = self.traced.is_argument(real), index in self.changed
            if argument or changed:
                self.inputs.append((name, kind))
            if changed or not argument:
                self._weight(name, real)
            self._tensors[index] = name, self._held(name, kind.dtype)
        return self._tensors[index][1]

    def _held(self, name: str, dtype: DType) -> str:
        self.w.line = ""
        return self.w.cast(name, held(dtype)) if is_narrower(dtype) else name

    def _weight(self, name: str, real: torch.Tensor) -> None:
        from onnx import helper

        if real.is_meta:
            raise self.traced.refuse(f"{name} has no values (it is on the device meta)", "Load it")
        self._bytes += real.numel() * real.element_size()
        if self._bytes > LIMIT:
            raise self.traced.refuse(
                "its weights have more than 2 GB, which one file of ONNX cannot hold",
                "Export a part of it",
            )
        to, content = element(TO_IR[real.dtype]), bytes(raw(real))
        self.weights.append(helper.make_tensor(name, to, tuple(real.shape), content, raw=True))

    # ---- numbers

    def number_of(self, index: int) -> str:
        """The name of the input that a runtime scalar is."""
        self.scalar(index)
        return self._scalars[index][0]

    def scalar(self, index: int) -> str:
        """A runtime scalar: float64 of no axes."""
        if index not in self._scalars:
            self._scalars[index] = self._scalar(index)
        return self._scalars[index][1]

    def _scalar(self, index: int) -> tuple[str, str]:
        from onnx import helper

        t, w = self.traced, self.w
        path, now = t.captured.paths[index], t.call.scalars[index]
        match path:
            case "item", k:
                one = w.reshape(self.tensor(k), ())
                return "", w.cast(one, held(f64))
            case "held", _:
                return "", w.constant(now, held(f64))
        if path[0] not in _FREE:
            raise t.refuse(
                f"a number of it comes from where no file can read it ({path[0]})",
                "Pass the number as an argument",
            )
        if index in self.frozen:
            return "", w.constant(now, held(f64))
        name = w.name(self._number_name(index))
        self.inputs.append((name, HOST_SCALAR))
        self.weights.append(helper.make_tensor(name, element(f64), (), [float(now)]))
        return name, name

    def _number_name(self, index: int) -> str:
        t = self.traced
        return t.shown(t.names.scalar(t.captured.paths[index], t.call), f"number_{index}")

    def constants(self) -> dict[str, float]:
        """The numbers that are no inputs, since decisions depend on them."""
        paths, now = self.traced.captured.paths, self.traced.call.scalars
        return {self._number_name(k): now[k] for k in sorted(self.frozen) if paths[k][0] in _FREE}

    # ---- random numbers

    def draw(self, index: int) -> str:
        """What is drawn by the `index`-th event: an input without default."""
        event = self.traced.captured.draws[index]
        name = self.w.name(f"draw.{index}")
        self.inputs.append((name, event.type))
        dtype = event.type.dtype
        if isinstance(event, Together):  # of one kind
            event = self.traced.captured.draws[event.rows[0]]
        assert isinstance(event, Draw)
        numbers = [None if isinstance(x, Value) else x for x in event.numbers]
        with_names = dict(zip(event.names, numbers, strict=True))
        self.draws.append({"input": name, "fill": event.fill, "numbers": with_names})
        found = self._held(name, dtype)
        self._tensors[-1 - index] = name, found
        return found
