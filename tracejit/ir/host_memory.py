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
_C_TYPES = {torch.float64: ctypes.c_double, torch.float32: ctypes.c_float}
_BITS = ctypes.c_uint16


def cell_type(tensor: torch.Tensor) -> type | None:
    """The ctypes type of a CPU tensor's elements; None for what ctypes cannot read as a float."""
    return _C_TYPES.get(tensor.dtype) if tensor.is_cpu else None


def read(tensor: torch.Tensor) -> float:
    """The element of a floating-point tensor of one element."""
    if tensor.device.type != "cpu":
        return tensor.item()
    c_type = _C_TYPES.get(tensor.dtype)
    if c_type is not None:
        return c_type.from_address(tensor.data_ptr()).value
    bits = _BITS.from_address(tensor.data_ptr()).value
    if tensor.dtype is torch.bfloat16:
        return float(bits_to_float(np.uint16(bits)))
    return struct.unpack("e", struct.pack("H", bits))[0]


def write(tensor: torch.Tensor, number: float) -> None:
    """Overwrite the element of a floating-point CPU tensor of one element, rounded to its dtype."""
    c_type = _C_TYPES.get(tensor.dtype)
    if c_type is not None:
        c_type.from_address(tensor.data_ptr()).value = number
    elif tensor.dtype is torch.bfloat16:
        _BITS.from_address(tensor.data_ptr()).value = int(float_to_bits(np.float32(number)))
    else:
        with np.errstate(over="ignore"):
            _BITS.from_address(tensor.data_ptr()).value = int(np.float16(number).view(np.uint16))
