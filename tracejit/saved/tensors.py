"""Tensors as bytes, in the layout of the safetensors package, which reads what this writes.

    name → tensor  →  pack  →  8 bytes: the header's length; the header, in JSON; raw elements
                      unpack  →  name → tensor

The header says of each tensor its dtype, shape, and where its bytes are; they lie one after
another, row by row, little-endian, without gaps. Nothing but numbers comes out of such bytes.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Mapping

import torch

from tracejit.saved.archive import Damaged
from tracejit.saved.fields import Item, read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 100 << 20  # as in the safetensors package
MOST_AXES = 64
assert sys.byteorder == "little"


def pack(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The bytes of some tensors, wherever they are and however they are strided."""
    header, parts, at = {}, [], 0
    for name, tensor in tensors.items():
        part = raw(tensor)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(part)],
        }
        at += len(part)
        parts.append(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([_LENGTH.pack(len(text)), text, *parts])


def unpack(content: bytes) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU, row-major, on memory of their own. Raises Damaged."""
    if len(content) < _LENGTH.size:
        raise Damaged("it is too short")
    (length,) = _LENGTH.unpack(content[: _LENGTH.size])
    start = _LENGTH.size + length
    if length > _LONGEST_HEADER or start > len(content):
        raise Damaged(f"its header of {length} bytes is longer than it is")
    header = read_json(content[_LENGTH.size : start], "its header")
    found, at = {}, 0
    for name, entry in header.items().items():
        dtype, shape, stop = _entry(entry, at, len(content) - start)
        found[name] = _tensor(content, start + at, dtype, shape)
        at = stop
    if start + at != len(content):
        raise Damaged("it has more bytes than its tensors")
    return found


def _entry(entry: Item, at: int, room: int) -> tuple[torch.dtype, list[int], int]:
    """What the header says of one tensor: its dtype, shape, and where its bytes end."""
    said = entry.table("dtype", "shape", "data_offsets")
    dtype = DTYPES[said["dtype"].text(*DTYPES)]
    shape = said["shape"].wholes()
    if len(shape) > MOST_AXES:
        raise entry.wrong(f"a tensor of at most {MOST_AXES} axes")
    stop = at + dtype.itemsize * math.prod(shape)
    if said["data_offsets"].wholes() != (at, stop) or stop > room:
        raise entry.wrong(f"bytes {at} to {stop} of {room}")
    return dtype, list(shape), stop


def raw(tensor: torch.Tensor) -> bytes | memoryview:
    """The elements row by row, without a copy where they lie so."""
    plain = tensor.detach().cpu().contiguous()
    if not plain.numel():
        return b""
    row = plain.as_strided((plain.numel(),), (1,))  # one element may have any stride
    return row.view(torch.uint8).numpy().data


def _tensor(content: bytes, at: int, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    made = torch.empty(shape, dtype=dtype)
    if made.numel():
        flat = made.view(-1).view(torch.uint8)
        source = memoryview(content)[at : at + flat.numel()]
        if dtype is torch.bool and not {*bytes(source)} <= {0, 1}:
            raise Damaged("a truth value is neither 0 nor 1")
        flat.numpy()[:] = source
    return made
