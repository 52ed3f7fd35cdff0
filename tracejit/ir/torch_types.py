"""IR dtypes ↔ torch dtypes."""

from __future__ import annotations

import torch

from tracejit.ir import types
from tracejit.ir.types import DType

TO_IR: dict[torch.dtype, DType] = {
    torch.float64: types.f64,
    torch.float32: types.f32,
    torch.float16: types.f16,
    torch.bfloat16: types.bf16,
    torch.int64: types.i64,
    torch.int32: types.i32,
    torch.int16: types.i16,
    torch.int8: types.i8,
    torch.uint8: types.u8,
    torch.bool: types.b1,
}
COMPLEX_TO_IR: dict[torch.dtype, DType] = {
    torch.complex64: types.c64,
    torch.complex128: types.c128,
}
TO_TORCH = {ir: dtype for dtype, ir in (TO_IR | COMPLEX_TO_IR).items()}
