"""The writer of an ONNX graph: nodes one after another, constants once each, names that are unique.

Values of the IR are *held* in tensors of the dtypes in which they are computed: bf16 and f16 as
float32, whole numbers of less than 64 bits as int32. So all operators see dtypes that runtimes
know, and `rounded` brings a result back among the numbers of its own dtype. Only inputs and outputs
of the model have the narrow dtypes themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tracejit.ir.types import DType, Type, b1, bf16, f16, f32, f64, i8, i16, i32, i64, u8

OPSET = 20  # of the default domain: the first with Gelu, known to onnxruntime from 1.17 on
IR_VERSION = 9

_HELD = {
    **{f64: np.float64, f32: np.float32, f16: np.float32, bf16: np.float32},
    **{i64: np.int64, i32: np.int32, i16: np.int32, i8: np.int32, u8: np.int32, b1: np.bool_},
}
# names of TensorProto.DataType
_ELEMENT = {
    **{f64: "DOUBLE", f32: "FLOAT", f16: "FLOAT16", bf16: "BFLOAT16", i64: "INT64", i32: "INT32"},
    **{i16: "INT16", i8: "INT8", u8: "UINT8", b1: "BOOL"},
}


def held(dtype: DType) -> np.dtype:
    """The dtype in which values are computed, and lie between nodes."""
    return np.dtype(_HELD[dtype])


def is_narrower(dtype: DType) -> bool:
    """Whether values are held in a wider dtype than their own."""
    return dtype in (f16, bf16, i16, i8, u8)


def element(dtype: DType) -> int:
    """The number that ONNX has for a dtype."""
    import onnx

    return onnx.TensorProto.DataType.Value(_ELEMENT[dtype])


class Writer:
    """One graph; `w.Add(a, b)` appends a node of one output and returns its name."""

    def __init__(self, outer: Writer | None = None):
        """`outer`: the graph in whose node this one is the body; it keeps the constants."""
        self.nodes: list = []
        self.line = "" if outer is None else outer.line  # the user's, of the next nodes
        self.taken: set[str] = set() if outer is None else outer.taken
        self.constants: dict[str, object] = {} if outer is None else outer.constants
        self._known: dict[tuple, str] = {} if outer is None else outer._known
        self._counts: dict[str, int] = {} if outer is None else outer._counts

    def name(self, wanted: str) -> str:
        """A name that nothing has yet; numbered, unless it is free."""
        found = wanted
        while found in self.taken:
            self._counts[wanted] = self._counts.get(wanted, 0) + 1
            found = f"{wanted}_{self._counts[wanted]}"
        self.taken.add(found)
        return found

    def several(self, kind: str, inputs: Sequence[str], outputs: int, **attrs: object) -> list[str]:
        """Append a node of several outputs."""
        from onnx import helper

        at = self.name(kind.lower())
        names = [at, *(self.name(f"{at}.{k}") for k in range(1, outputs))]
        node = helper.make_node(kind, inputs, names, name=at, **attrs)
        if self.line:
            node.doc_string = self.line
        self.nodes.append(node)
        return names

    def __getattr__(self, kind: str) -> Callable[..., str]:
        if not kind[0].isupper():
            raise AttributeError(kind)

        def append(*inputs: str, **attrs: object) -> str:
            return self.several(kind, inputs, 1, **attrs)[0]

        self.__dict__[kind] = append
        return append

    def constant(self, value: object, dtype: np.dtype | type) -> str:
        """An array as a constant of the model."""
        from onnx import numpy_helper

        array = np.asarray(value, dtype, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self.name("constant")
            self.constants[self._known[key]] = numpy_helper.from_array(array, self._known[key])
        return self._known[key]

    def ints(self, *values: int) -> str:
        """A row of int64, as operators take shapes and axes."""
        return self.constant(values, np.int64)

    def cast(self, x: str, dtype: np.dtype | type | DType) -> str:
        """The elements in another dtype."""
        from onnx import helper

        if isinstance(dtype, DType):
            return self.Cast(x, to=element(dtype))
        return self.Cast(x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def output(self, x: str, wanted: str, dtype: DType) -> str:
        """A held value as an output of the model, in its own dtype; returns its name there."""
        from onnx import helper

        self.line = ""
        name, attrs = self.name(wanted), {"to": element(dtype)} if is_narrower(dtype) else {}
        kind = "Cast" if attrs else "Identity"
        self.nodes.append(helper.make_node(kind, [x], [name], name=f"output.{name}", **attrs))
        return name

    def rounded(self, x: str, dtype: DType) -> str:
        """A held result among the numbers of its own dtype: rounded, or its low bits."""
        return self.cast(self.cast(x, dtype), held(dtype)) if is_narrower(dtype) else x

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """Another shape of the same number of elements."""
        return self.Reshape(x, self.ints(*shape), allowzero=1)

    def full(self, x: str, shape: Sequence[int]) -> str:
        """A tensor of one element, everywhere."""
        return self.Expand(x, self.ints(*shape)) if shape else x

    def filled(self, value: float, shape: Sequence[int], dtype: np.dtype | type) -> str:
        """A number, everywhere."""
        return self.full(self.constant(value, dtype), shape)

    def row(self, values: np.ndarray, axis: int, rank: int) -> str:
        """A constant row along one of so many axes."""
        shape = [1] * rank
        shape[axis] = len(values)
        return self.constant(values.reshape(shape), values.dtype)

    def part(self, x: str, axis: int, start: int, stop: int) -> str:
        """A stretch along an axis."""
        return self.Slice(x, self.ints(start), self.ints(stop), self.ints(axis))

    def where(self, condition: str, a: str, b: str, dtype: np.dtype | type) -> str:
        """A choice of each element. (onnxruntime has no Where of bools.)"""
        if np.dtype(dtype) == np.bool_:
            return self.Or(self.And(condition, a), self.And(self.Not(condition), b))
        return self.Where(condition, a, b)


def info(name: str, kind: Type):
    """What the model says of an input or output, which has its own dtype."""
    from onnx import helper

    return helper.make_tensor_value_info(name, element(kind.dtype), kind.shape)


Named = Sequence[tuple[str, Type]]


def body_of(w: Writer, inputs: Named, outputs: Named):
    """What has been written, as the body of a node. Its inputs and outputs are held."""
    from onnx import helper

    def infos(named: Named) -> list:
        kinds = ((name, helper.np_dtype_to_tensor_dtype(held(t.dtype)), t) for name, t in named)
        return [helper.make_tensor_value_info(name, to, t.shape) for name, to, t in kinds]

    return helper.make_graph(w.nodes, "body", infos(inputs), infos(outputs))
