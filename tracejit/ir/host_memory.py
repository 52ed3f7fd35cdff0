"""The one element of a tensor: on the CPU read and written in its memory, without a torch function.

Reading it from a GPU copies it and waits for the device, as `.item()` does.
"""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import torch

from tracejit.ir.types import bits_to_float, float_to_bits

# float16 and bfloat16 have no C type
_C_TYPES = {
    torch.float64: ctypes.c_double,
    torch.float32: ctypes.c_float,
    torch.int64: ctypes.c_int64,
    torch.int32: ctypes.c_int32,
    torch.int16: ctypes.c_int16,
    torch.int8: ctypes.c_int8,
    torch.uint8: ctypes.c_uint8,
}
_BITS = ctypes.c_uint16


def cell_type(tensor: torch.Tensor) -> type | None:
    """The ctypes type of a CPU tensor's elements; None for what ctypes cannot read."""
    return _C_TYPES.get(tensor.dtype) if tensor.is_cpu else None


def read(tensor: torch.Tensor) -> float:
    """The element of a tensor of one element: an int of an integer tensor, else a float."""
    if tensor.device.type != "cpu":
        number = tensor.item()
        return float(number) if type(number) is bool else number
    c_type = _C_TYPES.get(tensor.dtype)
    if c_type is not None:
        return c_type.from_address(tensor.data_ptr()).value
    if tensor.dtype is torch.bool:
        return float(ctypes.c_bool.from_address(tensor.data_ptr()).value)
    bits = _BITS.from_address(tensor.data_ptr()).value
    if tensor.dtype is torch.bfloat16:
        return float(bits_to_float(np.uint16(bits)))
    return struct.unpack("e", struct.pack("H", bits))[0]


def write(tensor: torch.Tensor, number: float) -> None:
    """Overwrite the element of a CPU tensor of one element: a float rounded to its dtype, or an
    int."""
    c_type = _C_TYPES.get(tensor.dtype)
    if c_type is not None:
        c_type.from_address(tensor.data_ptr()).value = number
    elif tensor.dtype is torch.bfloat16:
        _BITS.from_address(tensor.data_ptr()).value = int(float_to_bits(np.float32(number)))
    else:
        with np.errstate(over="ignore"):
            _BITS.from_address(tensor.data_ptr()).value = int(np.float16(number).view(np.uint16))
