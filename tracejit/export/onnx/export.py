"""A traced call as an ONNX model.

In: a `Traced` step. Out: a model: its nodes translated (translate.py), or written as operators of
ONNX (composites.py), and its effects as outputs.

What the step changes is an input and an output: `run.py` has the runner that feeds it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tracejit.capture.effects.effects import (
    Given,
    HostSlot,
    Made,
    Mapped,
    Sequenced,
    Slot,
    Tree,
    is_named,
    slots,
)
from tracejit.export.onnx.composites import Composite, written
from tracejit.export.onnx.inputs import Inputs
from tracejit.export.onnx.model import model_of
from tracejit.export.onnx.placing import Layout, viewed
from tracejit.export.onnx.refusals import (
    FIRST,
    frozen_numbers,
    refuse_operations,
    refuse_what_no_file_keeps,
    stored_numbers,
)
from tracejit.export.onnx.step import Traced
from tracejit.export.onnx.translate import Translator
from tracejit.export.onnx.writer import Writer, held
from tracejit.ir.graph import Arg, Node, Value
from tracejit.ir.torch_types import TO_IR
from tracejit.ir.types import HOST_SCALAR, Type, contiguous_strides


def exported(t: Traced, version: str):
    """The model of a traced call."""
    return _Export(t).model(version)


class _Names(Translator):
    """A translator that finds the inputs of the graph where they are first read."""

    def __init__(self, export: _Export):
        super().__init__(export.w, {})
        self.export = export

    def name(self, value: Value) -> str:
        if value not in self.env and value not in self.small:
            self.env[value] = self.export.input(value)
        return super().name(value)


class _Export:
    """One traced call on its way to a model."""

    def __init__(self, t: Traced):
        self.t, self.c, self.effects = t, t.captured, t.captured.effects
        self.params = t.params()
        self.position = {i: v for v, (kind, i) in self.params.items() if kind == "tensor"}
        refuse_what_no_file_keeps(t)
        self.written = self._written()
        self.grads = self._grads()
        self.live = self._live(self._wanted())
        refuse_operations(node for node, _ in self.live)
        frozen = frozen_numbers(t, self.changed)
        self.w = Writer()
        self.inputs = Inputs(t, self.w, frozen, self.changed)
        self.names = _Names(self)
        self.outputs: list[tuple[str, Type]] = []
        self.state: dict[str, str] = {}

    # ---- what is changed

    @property
    def changed(self) -> frozenset[int]:
        """The outside tensors that are other ones after the call."""
        of_grads = (grad for _, grad, _ in self.grads if grad is not None)
        return frozenset((*self.written, *of_grads))

    def _written(self) -> dict[int, Arg | tuple[str, int]]:
        """The outside tensors that are written, and with what: a value of the graph, a host result,
        or a tensor made."""
        effects, found = self.effects, {}
        for write in self.c.graph.writes:
            found[self.params[write.target][1]] = write.value
        found |= {self._same(i): ("host", k) for i, k in effects.host_writes}
        found |= {self._same(i): ("made", k) for i, k in effects.datas}
        return found

    def _same(self, index: int) -> int:
        """An outside tensor, or the one of the same memory that the graph reads instead."""
        if index in self.position:
            return index
        reals = self.t.call.reals
        mine = reals[index]
        for other in self.position:
            x = reals[other]
            if (x.data_ptr(), x.shape, x.stride(), x.dtype) == (
                *(mine.data_ptr(), mine.shape, mine.stride(), mine.dtype),
            ) and x.numel():
                return other
        return index

    def _grads(self) -> list[tuple[int, int | None, int]]:
        """Gradients that the call leaves: whose, the input that it was, if any, and the tensor."""
        found, before = [], dict(self.c.grads_read)
        for index, made in self.effects.grads:
            was = before.get(index, -1)
            read = was is not None and was >= 0 and was in self.position
            if (was is None and made is not None) or (read and made is None):
                name = self.t.tensor_name(index)
                raise self.t.refuse(
                    f"the gradient of {name} is there in some calls and not in others, and they "
                    "differ in what they compute",
                    FIRST,
                )
            if made is not None:
                found.append((index, was if read else None, made))
        return found

    # ---- all of it

    def model(self, version: str):
        """The model."""
        for node, composite in self.live:
            self.w.line = node.where
            if composite is None:
                self.names.node(node)
            else:
                operands = [None if x is None else self.names.name(x) for x in composite.operands]
                self.names.env[node.out] = written(self.w, composite, operands)
        result = self._tree(self.effects.returned, "result")
        self._state()
        self._gradients()
        if not self.outputs:
            raise self.t.refuse("it returns no tensor and changes none", "Return what to compute")
        inputs = self.inputs
        data = {
            "step": self.t.name,
            "arguments": inputs.arguments(),
            "state": self.state,
            "result": result,
            "draws": inputs.draws,
            "constants": inputs.constants(),
        }
        metadata = {"tracejit": json.dumps(data)}
        order = {name: k for k, name in enumerate(data["arguments"])}
        inputs.inputs.sort(key=lambda named: order.get(named[0], len(order)))
        named = inputs.inputs, self.outputs, inputs.weights
        return model_of(self.w, _plain(self.t.name), *named, metadata, version)

    # ---- values

    def input(self, value: Value) -> str:
        """The name of an input of the graph, held."""
        kind, index = self.params[value]
        cut = self._cut(value)
        if cut is not None:
            one = self.w.reshape(self.names.name(cut), ())
            return self.w.cast(one, held(HOST_SCALAR.dtype))
        return self.inputs.of(kind, index)

    def _cut(self, value: Value) -> Value | None:
        """The value that Python reads, of the number that it reads it as."""
        kind, index = self.params.get(value, ("", 0))
        if kind != "scalar" or self.c.paths[index][0] != "cut":
            return None
        return self.c.cuts[self.c.paths[index][1]].value

    def host(self, k: int) -> str:
        """A host result."""
        return self.names.operand(self.effects.host[k], HOST_SCALAR.dtype)[0]

    def after(self, index: int) -> str:
        """What an outside tensor holds after the call."""
        index = self._same(index)
        if index not in self.written:
            return self.inputs.tensor(index)
        found = self.written[index]
        if isinstance(found, Value):
            return self.names.name(found)
        kind, k = found
        if kind == "made":
            return self.made(k)
        real = self.t.call.reals[index]
        number = self.w.cast(self.host(k), held(TO_IR[real.dtype]))
        return self.w.reshape(self.w.rounded(number, TO_IR[real.dtype]), tuple(real.shape))

    def made(self, index: int) -> str:
        """A tensor that is handed out."""
        m = root = self.effects.made[index]
        while root.kind in ("view", "part"):
            root = self.effects.made[root.index]
        if m.kind == "real":
            return self.after(m.index)
        if m.bits is not None:
            why = "it returns the bits of a tensor as numbers of another dtype"
            raise self.t.refuse(why, "Return the tensor itself")
        x, layout = self._memory(root)
        if isinstance(m.offset, HostSlot):
            raise self.t.refuse("it returns a view whose place is a number", "Return a clone")
        try:
            return viewed(self.w, x, layout, Layout(m.shape, m.strides, m.offset))
        except ValueError as error:
            raise self.t.refuse(f"it returns {error}", "Return a clone of it") from error

    def _memory(self, root: Made) -> tuple[str, Layout]:
        """What a tensor is a view of, and how that lies in memory."""
        if root.kind == "output":
            result = self.c.graph.results[root.index]
            shape = result.value.type.shape
            strides = result.strides or contiguous_strides(shape)
            return self.names.name(result.value), Layout(shape, strides)
        if root.kind == "host":
            dtype, k = self.effects.hosts[root.index]
            number = self.w.cast(self.host(k), held(dtype))
            return self.w.rounded(number, dtype), Layout((), ())
        real = self.t.call.reals[root.index]
        layout = Layout(tuple(real.shape), tuple(real.stride()), real.storage_offset())
        return self.after(root.index), layout

    def kind_of(self, index: int) -> Type:
        """The type of a tensor that is handed out."""
        m = root = self.effects.made[index]
        while root.kind in ("view", "part"):
            root = self.effects.made[root.index]
        if root.kind == "output":
            dtype = self.c.graph.results[root.index].value.type.dtype
        elif root.kind == "host":
            dtype = self.effects.hosts[root.index][0]
        else:
            dtype = TO_IR[self.t.call.reals[root.index].dtype]
        shape = tuple(self.t.call.reals[m.index].shape) if m.kind == "real" else m.shape
        return Type(dtype, shape)

    # ---- outputs

    def _output(self, x: str, name: str, kind: Type) -> str:
        found = self.w.output(x, name, kind.dtype)
        self.outputs.append((found, kind))
        return found

    def _tree(self, tree: Tree, name: str) -> object:
        """What is returned, as JSON: outputs by their names, and plain values."""
        match tree:
            case Slot(index):
                return {"output": self._output(self.made(index), name, self.kind_of(index))}
            case HostSlot(index):
                return {"output": self._output(self.host(index), name, HOST_SCALAR)}
            case Given(index):
                value = self.c.given[index]
                if type(value) in (bool, int, float, str, type(None)):
                    return {"value": value}
            case Sequenced(Given(index), (fields,)) if not is_named(self.c.given[index]):
                return self._tree(fields, name)  # an object of attributes
            case Sequenced(kind, items):
                rows = [self._tree(x, f"{name}[{i}]") for i, x in enumerate(items)]
                return {"list" if kind == "list" else "tuple": rows}
            case Mapped(items) if not any(isinstance(key, Given) for key, _ in items):
                return {"dict": [[key, self._tree(x, f"{name}[{key!r}]")] for key, x in items]}
        raise self.t.refuse(
            "it returns an object that is neither a tensor nor a plain value",
            "Return tensors, in tuples, lists or dicts",
        )

    def _state(self) -> None:
        """What the step changes, as outputs beside the inputs that it was."""
        for index in self.written:
            real = self.t.call.reals[index]
            self._next(
                self.inputs.input_of(index),
                self.after(index),
                Type(TO_IR[real.dtype], tuple(real.shape)),
            )
        for number, source in stored_numbers(self.t):
            self._next(self.inputs.number_of(number), self.host(source), HOST_SCALAR)

    def _next(self, name: str, x: str, kind: Type) -> None:
        self.state[name] = self._output(x, f"{name}.next", kind)

    def _gradients(self) -> None:
        """Gradients that are read again; and those of what the step does not change itself."""
        for owner, grad, made in self.grads:
            kind = self.kind_of(made)
            if grad is not None:
                if grad not in self.written:
                    self._next(self.inputs.input_of(grad), self.made(made), kind)
            elif owner not in self.written:
                self._output(self.made(made), f"{self.t.tensor_name(owner)}.grad", kind)

    # ---- which nodes are needed

    def _wanted(self) -> set[Value]:
        """The values that outputs are made of."""
        effects, made = self.effects, set(slots(self.effects.returned))
        made |= {k for _, k in effects.datas}
        made |= {
            k for owner, grad, k in self.grads if grad is not None or owner not in self.written
        }
        hosts = {*_host_slots(effects.returned), *(k for _, k in effects.host_writes)}
        hosts |= {k for _, k in stored_numbers(self.t)}
        found = {w.value for w in self.c.graph.writes}
        for index in made:
            root = effects.made[index]
            while root.kind in ("view", "part"):
                root = effects.made[root.index]
            if root.kind == "output":
                found.add(self.c.graph.results[root.index].value)
            elif root.kind == "host":
                hosts.add(effects.hosts[root.index][1])
        return found | {x for k in hosts if isinstance(x := effects.host[k], Value)}

    def _live(self, wanted: Iterable[Value]) -> list[tuple[Node, Composite | None]]:
        """The nodes that values are computed by, in order; operators in place of composites."""
        nodes = self.t.nodes()
        known = {*self.params, *(out for node in nodes for out in node.outs)}
        read: set[Value] = set()

        def add(values: Iterable[Value]) -> None:
            for value in values:
                read.add(value)
                cut = self._cut(value)
                if cut is not None:
                    read.add(cut)

        add(wanted)
        kept: list[tuple[Node, Composite | None]] = []
        for node in reversed(nodes):
            if node.out not in read:
                continue
            composite = self.t.composites.get(node.out)
            if composite is not None and not known.issuperset(composite.inputs):
                composite = None
            add(node.inputs if composite is None else composite.inputs)
            kept.append((node, composite))
        return kept[::-1]


def _host_slots(tree: Tree) -> Iterable[int]:
    match tree:
        case HostSlot(index):
            yield index
        case Sequenced(_, items):
            for item in items:
                yield from _host_slots(item)
        case Mapped(items):
            for _, item in items:
                yield from _host_slots(item)


def _plain(name: str) -> str:
    """A name of letters, for the graph."""
    return "".join(c if c.isalnum() else "_" for c in name)
