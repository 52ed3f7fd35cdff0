"""A picture as a graph event, which TensorBoard's graph tab shows.

In: a `Picture`. Out: an event file with a GraphDef, of TensorBoard's own classes. The scopes of its
names are modules, and phases but for the forward pass: `model/0/matmul_3`, `backward/model/0/…`. A
node has the attribute `_output_shapes`, its dtype, and as text its line and kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from tracejit.pictures.picture import FORWARD, Picture, PictureNode

_OPS = {"input": "Placeholder", "matmul": "MatMul"}  # that TensorBoard knows to draw
_TYPES = {  # dtypes in TensorFlow's numbering
    "f32": "DT_FLOAT",
    "f64": "DT_DOUBLE",
    "f16": "DT_HALF",
    "bf16": "DT_BFLOAT16",
    "i64": "DT_INT64",
    "i32": "DT_INT32",
    "i16": "DT_INT16",
    "i8": "DT_INT8",
    "u8": "DT_UINT8",
    "b1": "DT_BOOL",
}


def write(make: Callable[[], Picture], logdir: str | os.PathLike) -> None:
    """Write an event file into a folder. ImportError where TensorBoard is missing."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.graph_pb2 import GraphDef
        from tensorboard.compat.proto.versions_pb2 import VersionDef
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise ImportError(
            "the graph is written by TensorBoard, which is missing: pip install "
            "'tracejit[tensorboard]'"
        ) from error
    picture = make()
    graph = GraphDef(node=_nodes(picture), versions=VersionDef(producer=22))
    writer = EventFileWriter(os.fspath(logdir), filename_suffix=".graph")
    try:
        writer.add_event(Event(graph_def=graph.SerializeToString()))
    finally:
        writer.close()


def names(picture: Picture) -> list[str]:
    """A unique name in scopes for each node. Nothing is called like a scope."""
    found, taken = [], set()
    ways = set(map(_scope, picture.nodes))
    scopes = {"/".join(way[:k]) for way in ways for k in range(1, 1 + len(way))}
    for node in picture.nodes:
        own = node.name.removeprefix(".".join(node.module) + ".") if node.is_input else node.name
        base = "/".join((*_scope(node), _clean(own)))
        name, count = base, 1
        while name in taken or name in scopes:
            name, count = f"{base}_{count}", count + 1
        taken.add(name)
        found.append(name)
    return found


def _scope(node: PictureNode) -> tuple[str, ...]:
    way = tuple(map(_clean, node.module))
    return way if node.lane == FORWARD else (node.lane, *way)


def _clean(name: str) -> str:
    """A part of a name, which may have letters, digits and some signs: `state_w1_exp_avg`."""
    kept = "".join(c if c.isalnum() and c.isascii() or c in "._-" else "_" for c in name)
    kept = kept.strip("_") or "value"
    return kept if kept[0].isalnum() or kept[0] == "." else f"v{kept}"


def _nodes(picture: Picture) -> Iterator[object]:
    from tensorboard.compat.proto import types_pb2
    from tensorboard.compat.proto.attr_value_pb2 import AttrValue
    from tensorboard.compat.proto.node_def_pb2 import NodeDef
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    called = names(picture)
    kind, _, number = picture.device.partition(":")
    device = f"/device:{'GPU' if kind == 'cuda' else 'CPU'}:{number or 0}"
    for node, name in zip(picture.nodes, called, strict=True):
        dims = [TensorShapeProto.Dim(size=n) for n in node.shape]
        shapes = AttrValue.ListValue(shape=[TensorShapeProto(dim=dims)])
        attrs = {
            "_output_shapes": AttrValue(list=shapes),
            "dtype": AttrValue(type=getattr(types_pb2, _TYPES[node.dtype])),
        }
        texts = {"line": str(node.line or ""), "attributes": node.attrs, "class": node.kind}
        texts["kernels"] = ", ".join(picture.kernels[k].name for k in node.kernels)
        texts["becomes"] = ", ".join(node.leaves)
        attrs |= {key: AttrValue(s=text.encode()) for key, text in texts.items() if text}
        yield NodeDef(
            name=name,
            op=_OPS.get(node.op, node.op),
            input=[called[k] for k in node.operands],
            device=device,
            attr=attrs,
        )
