"""One table of samples for every torch function that capture has a rule for.

`ROWS` maps a function's name, in each of its spellings, to the arguments that it is called with.
Tensors in samples are templates: `Sample.fresh` copies them, memory layout and sharing included.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from tracejit.capture import functions  # noqa: F401
from tracejit.capture.trace.table import RULES, function_name

nan, inf = math.nan, math.inf
f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
i64, i32, i16, i8, u8, b1 = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_random = torch.Generator().manual_seed(20)


@dataclass(frozen=True)
class Sample:
    """Arguments of one call. `smooth`: second derivatives are compared too."""

    args: tuple
    kwargs: dict = field(default_factory=dict)
    smooth: bool = False
    refused: bool = False  # eager has it, and a compiled step says that it has not

    def fresh(self) -> tuple[tuple, dict]:
        """Copies of the arguments; one template twice stays one tensor."""
        return copy.deepcopy((self.args, self.kwargs))

    def __str__(self) -> str:
        parts = [describe(a) for a in self.args]
        parts += [f"{k}={describe(v)}" for k, v in self.kwargs.items()]
        return "(" + ", ".join(parts) + ")"


def describe(x: object) -> str:
    """An argument for a test's name."""
    if isinstance(x, torch.Tensor):
        layout = "" if x.is_contiguous() else f":{list(x.stride())}"
        return f"{str(x.dtype)[6:]}{list(x.shape)}{layout}".replace(" ", "")
    return repr(x)


def S(*args: object, smooth: bool = False, **kwargs: object) -> Sample:
    return Sample(args, kwargs, smooth)


def no(*args: object, **kwargs: object) -> Sample:
    return Sample(args, kwargs, refused=True)


def r(*shape: int, dtype: torch.dtype = f32, low: float = -2.0, high: float = 2.0) -> torch.Tensor:
    """Random numbers: of integers also the ends of the range, of bools both."""
    if dtype is b1:
        return torch.rand(shape, generator=_random) < 0.5
    if not dtype.is_floating_point:
        first = 0 if dtype is u8 else -5
        return torch.randint(first, 9, shape, generator=_random).to(dtype)
    return (torch.rand(shape, generator=_random, dtype=f64) * (high - low) + low).to(dtype)


def v(*values: object, dtype: torch.dtype = f32) -> torch.Tensor:
    """A vector of given values."""
    return torch.tensor(values, dtype=dtype)


SPECIAL = (nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 100.0, -100.0, 3e38, 1e-40)
_pairs = [(a, b) for a in SPECIAL for b in SPECIAL]
SPECIAL_A = v(*(a for a, _ in _pairs))
SPECIAL_B = v(*(b for _, b in _pairs))


def layouts(dtype: torch.dtype = f32) -> list[torch.Tensor]:
    """Tensors of odd shapes and of every kind of memory layout."""
    return [
        r(dtype=dtype),
        r(0, dtype=dtype),
        r(1, dtype=dtype),
        r(5, dtype=dtype),
        r(123, dtype=dtype),
        r(3, 0, 2, dtype=dtype),
        r(4, 3, dtype=dtype).t(),
        r(2, 3, 4, dtype=dtype).permute(2, 0, 1),
        r(3, 1, dtype=dtype).expand(3, 4),
        r(6, 4, dtype=dtype)[::2, 1:3],
        r(5, 1, dtype=dtype).t(),
    ]


# --- operands ----------------------------------------------------------------------------------

TENSOR_PAIRS = [
    S(r(5), r(5), smooth=True),
    S(r(3, 1), r(1, 4), smooth=True),
    S(r(123), r()),
    S(r(), r()),
    S(r(), r(3, 2)),
    S(r(), r(4, 3).t()),
    S(r(4, 3).t(), r(3, 4)),
    S(r(4, 3).t(), r(4, 3).t()),
    S(r(4, 3).t(), r(4)),
    S(r(2, 3, 4).permute(2, 0, 1), r(2, 1)),
    S(r(1).expand(3, 4), r(3, 4)),
    S(r(3, 1).expand(3, 4), r(1, 4).expand(3, 4)),
    S(r(6, 4)[::2, 1:3], r(3, 2)),
    S(r(0), r(1)),
    S(r(0, 3), r(3)),
    S(r(2, 0), r(1, 1)),
    S(r(5, dtype=f64), r(5), smooth=True),
    S(r(5, dtype=bf16), r(5)),
    S(r(5, dtype=bf16), r(5, dtype=bf16)),
    S(r(5, dtype=f16), r(5, dtype=bf16)),
    S(r(5, dtype=f16), r(5, dtype=f16)),
    S(r(5, dtype=i64), r(5)),
    S(r(5), r(5, dtype=i32)),
    S(r(5, dtype=i32), r(5, dtype=i64)),
    S(r(5, dtype=u8), r(5, dtype=i8)),
    S(r(5, dtype=i64), v(1, 2, 3, 5, 7, dtype=i64)),
    S(r(5, dtype=u8), v(1, 2, 3, 5, 255, dtype=u8)),
    S(r(5, dtype=b1), r(5)),
    S(r(5, dtype=b1), r(5, dtype=b1)),
    S(r(5, dtype=b1), v(1, 2, 3, 4, 5, dtype=u8)),
    S(r(3, dtype=f64), r()),
    S(r(3), r(dtype=f64)),
    S(r(dtype=f64), r(3)),
    S(r(3, dtype=i32), r(dtype=f64)),
    S(r(3, dtype=bf16), r()),
    S(torch.tensor(3), r(3, dtype=i32)),
    S(r(3), torch.tensor(3)),
    S(r(3, dtype=i32), torch.tensor(3)),
    S(r(3, dtype=b1), torch.tensor(3)),
    S(SPECIAL_A, SPECIAL_B),
    S(v(1, 2, 3), v(1, 2, 4)),
    S(r(3), r(4)),
    S(r(2, 3), r(3, 2)),
]
NUMBER_PAIRS = [
    S(r(3, 4), 2, smooth=True),
    S(r(3, 4), 2.5, smooth=True),
    S(r(3, 4), -1.5),
    S(r(3, 4), True),
    S(r(3, 4), 0),
    S(r(3, 4), 0.1),
    S(r(), 3),
    S(r(0), 1.5),
    S(r(4, 3).t(), -1),
    S(r(1).expand(3, 4), 2.0),
    S(r(123, dtype=bf16), 0.1),
    S(v(0.1, 0.2, dtype=bf16), 0.1),
    S(r(123, dtype=f16), 0.1),
    S(r(5, dtype=f64), 0.1),
    S(r(5, dtype=i64), 2),
    S(r(5, dtype=i32), 2.5),
    S(r(5, dtype=i32), -3),
    S(r(5, dtype=u8), 3),
    S(r(5, dtype=u8), True),
    S(r(5, dtype=u8), -1),
    S(r(5, dtype=i32), 2**40),
    S(r(5), 1e300),
    S(r(5, dtype=b1), 2),
    S(r(5, dtype=b1), 0.5),
    S(r(5, dtype=b1), True),
    S(r(dtype=i64), 2.5),
    S(v(*SPECIAL), 0.0),
    S(v(*SPECIAL), 1),
    S(v(*SPECIAL), -2.0),
    S(v(*SPECIAL), nan),
    S(v(*SPECIAL), inf),
]
BINARY = TENSOR_PAIRS + NUMBER_PAIRS
INTEGERS = [
    S(v(-7, -1, 0, 1, 6, dtype=i64), v(1, 2, 3, 0, 63, dtype=i64)),
    S(v(-7, -1, 0, 1, 6, dtype=i32), 3),
    S(v(7, 1, 0, 255, dtype=u8), v(1, 2, 3, 7, dtype=u8)),
    S(v(7, 1, 0, 127, dtype=i8), 1),
    S(r(3, 1, dtype=i64), r(4, dtype=i32).abs()),
    S(r(4, 3, dtype=i64).t(), torch.tensor(2)),
    S(r(5, dtype=b1), r(5, dtype=b1)),
    S(r(5, dtype=b1), True),
    S(r(5, dtype=b1), 1),
    S(r(5), r(5)),
    S(r(5, dtype=i64), 1.5),
]
SPECIALS = [S(v(*SPECIAL)), S(v(*SPECIAL, dtype=f64)), S(v(*SPECIAL[:11], dtype=bf16))]
UNARY = [
    S(r(5), smooth=True),
    S(r(7, low=0.1), smooth=True),
    *map(S, layouts()),
    *SPECIALS,
    S(r(123, dtype=f64, low=0.2), smooth=True),
    S(r(123, dtype=bf16)),
    S(r(123, dtype=f16)),
    *(S(r(7, dtype=d)) for d in (i64, i32, i16, i8, u8, b1)),
    S(r(dtype=i64)),
]


def reduction(extremum: bool = False) -> list[Sample]:
    x = r(3, 4, 5)
    rows = [
        S(x),
        S(x, 0),
        S(x, -1, True),
        S(x, dim=1),
        S(x, dim=-2, keepdim=True),
        S(r()),
        S(r(), 0),
        S(r(), -1, True),
        S(r(1), 0),
        S(r(123)),
        S(r(123, dtype=f64), 0),
        S(r(123, dtype=bf16), 0),
        S(r(8, dtype=f16)),
        S(r(5, dtype=i64)),
        S(r(5, dtype=i32), 0),
        S(r(5, dtype=u8)),
        S(r(5, dtype=b1)),
        S(r(2, 3, dtype=b1), 1),
        S(r(4, 3).t(), 0),
        S(r(2, 3, 4).permute(2, 0, 1), 1),
        S(r(3, 1).expand(3, 4), 1),
        S(r(0)),
        S(r(0, 3), 0),
        S(r(0, 3), 1),
        S(r(2, 0, 3), 1, True),
        S(v(1, nan, 2)),
        S(v(inf, -inf, 2)),
        S(v(2, 2, 1, 2)),
        S(v(2, 2, 1, 2).reshape(2, 2), 1),
        S(x, 3),
        S(x, -4),
        S(x, axis=1),
    ]
    return rows if extremum else [Sample(s.args, s.kwargs, smooth=True) for s in rows]


SEVERAL = [
    S(r(3, 4, 5), (0, 2)),
    S(r(3, 4, 5), [1, -1], True),
    S(r(3, 4, 5), dim=(0, 1, 2), keepdim=True),
    S(r(3, 4, 5), ()),
    S(r(3, 4, 5), (1, 1)),
]
TYPED = [
    S(r(5), dtype=f64),
    S(r(5, dtype=i64), dtype=f32),
    S(r(5, dtype=bf16), 0, dtype=f32),
    S(r(5), dtype=i64),
    S(r(5, dtype=i64), 0, True, dtype=i32),
    S(r(5, dtype=b1), dtype=b1),
]
MATRICES = [
    S(r(3, 4), r(4, 5), smooth=True),
    S(r(4, 3).t(), r(5, 4).t()),
    S(r(1, 1), r(1, 1)),
    S(r(0, 4), r(4, 5)),
    S(r(3, 0), r(0, 5)),
    S(r(3, 4, dtype=f64), r(4, 5, dtype=f64), smooth=True),
    S(r(3, 4, dtype=bf16), r(4, 5, dtype=bf16)),
    S(r(3, 4, dtype=i64), r(4, 5, dtype=i64)),
    S(r(3, 4), r(4, 5, dtype=f64)),
    S(r(3, 4), r(5, 4)),
    S(r(6, 4)[::2], r(4, 1).expand(4, 5)),
]
VECTORS = [
    S(r(4), r(4), smooth=True),
    S(r(1), r(1)),
    S(r(0), r(0)),
    S(r(8)[::2], r(4)),
    S(r(4), r(5)),
    S(r(4, dtype=f64), r(4)),
]
MATMUL = [
    *MATRICES,
    *VECTORS,
    S(r(3, 4), r(4)),
    S(r(4), r(4, 5)),
    S(r(2, 3, 4), r(4, 5), smooth=True),
    S(r(2, 3, 4), r(4)),
    S(r(4), r(2, 4, 5)),
    S(r(2, 3, 4), r(2, 4, 5)),
    S(r(2, 1, 3, 4), r(3, 4, 5)),
    S(r(3, 4), r(2, 4, 5)),
    S(r(2, 4, 3).transpose(1, 2), r(4, 5)),
    S(r(2, 3, 4), r(3, 4, 5)),
    S(r(), r(3)),
    S(r(2, 3, 4), r(5, 6)),
]
CLAMP = [
    S(r(5), -1, 1),
    S(r(5), -1.0, 1.0),
    S(r(5), min=0),
    S(r(5), max=0.5),
    S(r(5), min=1.0, max=-1.0),
    S(v(0, 1, -1, 0.5), 0, 1),
    S(v(0, 1, -1, 0.5), min=1.0),
    S(v(*SPECIAL), -1.0, 1.0),
    S(v(*SPECIAL), min=nan),
    S(v(*SPECIAL), 0.0, inf),
    S(v(0.1, 0.2, dtype=bf16), 0.15, 0.3),
    S(r(4, 3).t(), 0.0),
    S(r(1).expand(3, 4), 0.0),
    S(r(0), 0.0),
    S(r(), 0.0),
    S(r(5, dtype=i64), 0, 3),
    S(r(5, dtype=i64), 0.5),
    S(r(5, dtype=i32), max=2.5),
    S(r(5, dtype=u8), 1, 3),
    S(r(5, dtype=b1), 0),
    S(r(5)),
    S(r(5), r(5), r(5)),
    S(r(5), min=r()),
    S(r(5), max=v(0, 0, 0, 0, 0)),
]
MASKS = [
    S(r(5), r(5, dtype=b1), 2.0),
    S(r(3, 4), r(4, dtype=b1), -1),
    S(r(4, 3).t(), r(3, 4, dtype=b1), 0.5),
    S(r(5, dtype=i64), r(5, dtype=b1), 2),
    S(r(5, dtype=i64), r(5, dtype=b1), 2.5),
    S(r(5), r(5, dtype=b1), r()),
    S(r(5), r(5, dtype=b1), r(dtype=f64)),
    S(r(5, dtype=i32), r(5, dtype=b1), r()),
    S(r(5), r(2, 5, dtype=b1), 1.0),
    S(r(5), r(5), 1.0),
    S(r(5), r(5, dtype=u8), 1.0),
    S(r(5), r(5, dtype=b1), r(1)),
    S(v(nan, inf, 1), v(True, False, True, dtype=b1), 0.0),
    S(r(5, dtype=b1), r(5, dtype=b1), True),
    S(r(5, dtype=bf16), r(5, dtype=b1), 0.1),
]
WHERE = [
    S(r(5, dtype=b1), r(5), r(5), smooth=True),
    S(r(3, 1, dtype=b1), r(4), r(3, 4)),
    S(r(5, dtype=b1), 1.0, r(5)),
    S(r(5, dtype=b1), r(5), 2),
    S(r(5, dtype=b1), 1.5, 2),
    S(r(5, dtype=b1), 1, 2),
    S(r(5, dtype=b1), True, False),
    S(r(dtype=b1), r(), r()),
    S(r(5, dtype=b1), r(5, dtype=i64), 2.5),
    S(r(5, dtype=b1), r(5, dtype=f64), r(5)),
    S(r(5, dtype=b1), r(5), r(dtype=f64)),
    S(r(3, 4, dtype=b1), r(4, 3).t(), r(4, 3).t()),
    S(r(3, dtype=b1), v(nan, 1, 2), v(0, nan, inf)),
    S(r(5), r(5), r(5)),
    S(r(5, dtype=u8), r(5), r(5)),
    S(r(5, dtype=b1), r(5), r(4)),
    S(r(5, dtype=b1), r(5, dtype=bf16), 0.1),
    S(r(0, dtype=b1), r(1), 2.0),
]
POW = [
    *(S(r(5, low=0.2), e, smooth=True) for e in (2, 3, 2.0, 0.5, 1, 0, -1, -2, -0.5, 2.5, 4)),
    *(S(v(*SPECIAL), e) for e in (2, 3, 0.5, -0.5, 1, 0, -1, -2, 2.5, 0.0, nan, inf)),
    *(S(r(5, dtype=d), e) for d in (bf16, f16, f64) for e in (2, 0.5, 2.5, -1)),
    *(S(r(5, dtype=i64), e) for e in (0, 1, 2, 3, 5, 2.0, 0.5, -1, -1.0, True)),
    *(S(r(5, dtype=u8), e) for e in (2, 3)),
    *(S(r(5, dtype=b1), e) for e in (0, 1, 2, 2.5)),
    S(r(4, 3).t(), 2),
    S(r(), 3),
    S(r(0), 2),
    S(r(5, low=0.2), r(5), smooth=True),
    S(r(3, 1, low=0.2), r(4)),
    S(SPECIAL_A, SPECIAL_B),
    S(v(0, 0, 0, 2, -2, -2), v(0, 2, -1, 0, 2, 1.5)),
    S(r(5, dtype=i64), v(0, 1, 2, 3, 4, dtype=i64)),
    S(v(2, 0, -1, 1, -1, dtype=i64), v(-1, -1, -1, -1, -2, dtype=i64)),
    S(r(5, dtype=i64), r(5)),
    S(r(3, low=0.2), r()),
    S(r(low=0.2), r(3)),
    S(r(5), r(4)),
]
REFLECTED_POW = [
    *(S(r(5), x) for x in (2, 2.0, 0.5, 0, 0.0, 1, -1.5)),
    *(S(v(*SPECIAL), x) for x in (2, 0, -2.0, inf)),
    S(r(5, dtype=i64).abs(), 2),
    S(r(5, dtype=i64), 2.5),
    S(r(5, dtype=bf16), 0.1),
    S(r(4, 3).t(), 2),
]
ALPHA = [
    S(r(5), r(5), alpha=2),
    S(r(5), r(5), alpha=0.1),
    S(r(5), 3.0, alpha=-2.5),
    S(r(5, dtype=i64), r(5, dtype=i64), alpha=2),
    S(r(5, dtype=i64), r(5, dtype=i64), alpha=2.5),
    S(r(5, dtype=bf16), r(5, dtype=bf16), alpha=0.1),
    S(r(5, dtype=i64), r(5), alpha=3),
    S(r(5, dtype=b1), r(5, dtype=b1), alpha=True),
    S(r(5, dtype=b1), r(5, dtype=b1), alpha=False),
]
ROUNDED = [
    S(r(123), r(123), rounding_mode="floor"),
    S(r(123), 0.3, rounding_mode="floor"),
    S(r(123), r(123), rounding_mode="trunc"),
    S(r(9, dtype=i64), 2, rounding_mode="floor"),
    S(r(9, dtype=i64), 2, rounding_mode="trunc"),
    S(r(9, dtype=i64), 2.0, rounding_mode="floor"),
    S(r(5), 2, rounding_mode="up"),
    S(SPECIAL_A, SPECIAL_B, rounding_mode="floor"),
    S(SPECIAL_A, SPECIAL_B, rounding_mode="trunc"),
]
VIEWED = layouts()
CASTS = [
    S(r(5)),
    S(v(nan, 1.5, -1.5, 0.0, 2.9)),
    S(r(4, 3).t()),
    S(r(3, 1).expand(3, 4)),
    S(r(5, dtype=f64)),
    S(r(5, dtype=bf16)),
    S(r(5, dtype=f16)),
    S(v(0, 1, 7, 100, dtype=i64)),
    S(v(0, 1, 200, 255, dtype=u8)),
    S(v(-1, 300, 70000, dtype=i32)),
    S(r(5, dtype=b1)),
    S(r()),
    S(r(0)),
]
IN_FLOAT_CASTS = [S(v(1e-8, 65504.0, 65520.0, 1e30, inf)), S(v(1.0039, 1.00391, 3e38))]
LIKE = [
    *map(S, layouts()),
    S(r(5, dtype=i64)),
    S(r(5, dtype=b1)),
    S(r(5), dtype=f64),
    S(r(5), dtype=i64),
    S(r(5), requires_grad=True),
    S(r(4, 3).t(), memory_format=torch.contiguous_format),
    S(r(4, 3).t(), device="cpu"),
]
SIZES = [
    S(3),
    S(2, 3),
    S((2, 3)),
    S([2, 0]),
    S(()),
    S(torch.Size([4])),
    S(3, dtype=f64),
    S(3, dtype=i64),
    S(3, dtype=b1),
    S(3, dtype=bf16),
    S(3, requires_grad=True),
    S(3, device="cpu"),
    S(-1),
    S(size=(2, 3)),
]


def after(first: Callable[[], torch.Tensor], rows: Sequence[Sample]) -> list[Sample]:
    """The rows with a tensor before their arguments."""
    return [Sample((first(), *s.args), s.kwargs) for s in rows]


INDICES = [
    (r(5), 0),
    (r(5), -1),
    (r(5), 5),
    (r(5), -6),
    (r(5), slice(1, 4)),
    (r(5), slice(None, None, 2)),
    (r(5), slice(-3, 100)),
    (r(5), slice(4, 1)),
    (r(5), slice(None, None, -1)),
    (r(5), slice(None)),
    (r(5), ...),
    (r(5), None),
    (r(), ...),
    (r(), None),
    (r(), 0),
    (r(3, 4), 1),
    (r(3, 4), (1, 2)),
    (r(3, 4), (slice(None), 2)),
    (r(3, 4), (..., -1)),
    (r(3, 4), (..., None)),
    (r(3, 4), (None, ..., 0, None)),
    (r(3, 4), (0, None, slice(1, 3))),
    (r(3, 4), (0, 0, 0)),
    (r(3, 4), (slice(0, 0), 1)),
    (r(2, 3, 4), (..., 1, slice(None, None, 3))),
    (r(2, 3, 4), (1, ..., None, 2)),
    (r(4, 3).t(), (slice(1, None), slice(None, None, 2))),
    (r(3, 1).expand(3, 4), (slice(None), 1)),
    (r(3, 4), ()),
    (r(3, 4), (slice(None), None, None, 1)),
    (r(3, 4, dtype=i64), (1, slice(0, 4, 3))),
]
ADVANCED = [
    (r(3, 4), [0, 1]),
    (r(3, 4), True),
    (r(3, 4), (slice(None), [0, 1])),
    (r(3, 4), r(3, dtype=b1)),
    (r(3, 4), v(0, 1, dtype=i64)),
    (r(3, 4), torch.tensor(1)),
]
ASSIGNED = [
    S(r(5), 1, 2.0),
    S(r(5), slice(None, None, 2), 7),
    S(r(5), slice(1, 4), r(3)),
    S(r(5), slice(1, 4), r(1)),
    S(r(5), slice(1, 4), r()),
    S(r(5), slice(1, 4), r(1, 3)),
    S(r(5), slice(1, 4), r(4)),
    S(r(5), ..., r(5)),
    S(r(5), slice(None), r(5, dtype=f64)),
    S(r(5, dtype=i64), slice(None), v(1.5, -2.5, 0, 9, 3)),
    S(r(5, dtype=i64), 0, 2.7),
    S(r(5, dtype=b1), 0, 3),
    S(r(), ..., 2.0),
    S(r(3, 4), (slice(None), 1), r(3)),
    S(r(3, 4), (slice(None), slice(1, None, 2)), r(2)),
    S(r(3, 4), (0, None), r(1, 4)),
    S(r(4, 3).t(), (1, slice(2)), 0),
    S(r(3, 4), r(3, 4, dtype=b1), 0),
    S(r(3, 4), r(3, dtype=b1), -1.5),
    S(r(3, 4), r(3, 4, dtype=b1), r()),
    S(r(3, 4), r(3, 4, dtype=b1), r(1)),
    S(r(3, 4), r(4, dtype=b1), 0),
    S(r(3, 4), (r(3, dtype=b1),), 2),
    S(r(3, 4), (slice(None), r(4, dtype=b1)), 2),
    S(r(3, 4), (..., r(4, dtype=b1)), 2),
    S(r(3, 4), r(3, 4, dtype=b1), r(12)),
    no(r(3, 4), [0, 2], 1.0),
    S(r(3, 4), 3, 1.0),
    S(r(1).expand(3), slice(None), 1.0),
    S(r(0), slice(None), 1.0),
    S(r(5), slice(2, 2), 1.0),
    S(r(3, 4, dtype=i64), r(3, 4, dtype=b1), 2.5),
]

x23, x234 = r(2, 3), r(2, 3, 4)
RESHAPED = [
    *(
        S(x234, s)
        for s in ((24,), (6, 4), (2, 12), (-1, 4), (2, 3, 2, 2), (1, 24), (5, 5), (-1, -1))
    ),
    S(x234, 4, 6),
    S(x234, -1),
    S(x234, [4, -1]),
    S(x23.t(), 6),
    S(x23.t(), (3, 2, 1)),
    S(r(2, 3, 4).permute(2, 0, 1), 4, 6),
    S(r(2, 3, 4).permute(2, 0, 1), 8, 3),
    S(r(3, 1).expand(3, 4), 3, 2, 2),
    S(r(3, 1).expand(3, 4), 12),
    S(r(6, 4)[::2], 12),
    S(r(6, 4)[::2], 3, 2, 2),
    S(r(), 1, 1),
    S(r(), ()),
    S(r(1), ()),
    S(r(0, 3), 3, 0),
    S(r(0), -1),
    S(r(0, 3), 0, -1),
    S(x234, -2, 12),
]
IN_ONE_ARGUMENT = [s for s in RESHAPED if len(s.args) == 2 and not isinstance(s.args[1], int)]

ROWS: dict[str, list[Sample]] = {}
EXACT: set[str] = set()  # results are compared to the bit
SPELLED: dict[str, str] = {}  # spelling: the main name of its row


def row(names: str, samples: Sequence[Sample], *, exact: bool = True) -> None:
    """Give these spellings of a function their samples."""
    spelled = names.split()
    for name in spelled:
        assert name not in ROWS, name
        ROWS[name] = list(samples)
        SPELLED[name] = spelled[0]
        if exact:
            EXACT.add(name)


row("add __add__ __radd__ __iadd__ add_", BINARY)
row("sub __sub__ __rsub__ rsub subtract __isub__ sub_ subtract_", BINARY)
row("mul __mul__ __rmul__ multiply __imul__ mul_ multiply_", BINARY)
row("div __truediv__ __div__ divide true_divide __idiv__ div_ divide_ true_divide_", BINARY)
row("__rdiv__", NUMBER_PAIRS)
row("reciprocal reciprocal_", UNARY)
row("floor_divide __floordiv__ __rfloordiv__ __ifloordiv__ floor_divide_", BINARY)
# Vectorized eager gives NaN for quotients beyond 2**24 or so.
row(
    "remainder __mod__ __rmod__ __imod__ remainder_",
    [s for s in BINARY if s.args[0] is not SPECIAL_A]
    + [S(v(nan, inf, -inf, 1, -1, -0.5, 0, 5, -5), v(1, 1, 1, inf, inf, 0, 2, -3, 3))],
)
row("pow pow_", POW, exact=False)
row("__rpow__", [*REFLECTED_POW, S(r(5), 2.5, smooth=True)], exact=False)
row("maximum minimum", TENSOR_PAIRS)
row("eq __eq__ eq_", BINARY)
row("ne __ne__ not_equal ne_ not_equal_", BINARY)
row("lt __lt__ less lt_ less_", BINARY)
row("le __le__ less_equal le_ less_equal_", BINARY)
row("gt __gt__ greater gt_ greater_", BINARY)
row("ge __ge__ greater_equal ge_ greater_equal_", BINARY)
row("bitwise_and __and__ __rand__ __iand__ bitwise_and_", INTEGERS)
row("bitwise_or __or__ __ror__ __ior__ bitwise_or_", INTEGERS)
row("bitwise_xor __xor__ __rxor__ __ixor__ bitwise_xor_", INTEGERS)
row(
    "bitwise_left_shift __lshift__ __rlshift__ __ilshift__ bitwise_left_shift_",
    [*INTEGERS, S(v(1, 2, dtype=i64), v(64, -1, dtype=i64)), S(v(1, 2, dtype=i32), 40)],
)
row(
    "bitwise_right_shift __rshift__ __rrshift__ __irshift__ bitwise_right_shift_",
    [*INTEGERS, S(v(1, -2, dtype=i64), v(64, -1, dtype=i64)), S(v(-1, 2, dtype=i32), 40)],
)
row("logical_and logical_and_", TENSOR_PAIRS)
row("logical_or logical_or_", TENSOR_PAIRS)
row("logical_xor logical_xor_", TENSOR_PAIRS)
row("bitwise_not __invert__ bitwise_not_", UNARY)
row("logical_not logical_not_", UNARY)
row("clamp clip clamp_ clip_", CLAMP)
row("clamp_min clamp_min_", [*NUMBER_PAIRS, S(v(0, 1, 2), 1), S(r(5), r(5))])
row("clamp_max clamp_max_", [*NUMBER_PAIRS, S(v(0, 1, 2), 1), S(r(5), r(5))])
row(
    "masked_fill masked_fill_",
    [
        *MASKS,
        S(r(4, 3).t(), r(3, 4, dtype=b1), 1.0),
        S(r(2, 3, 4).transpose(0, 2), r(3, 2, dtype=b1), 0),
    ],
)
row("where", WHERE)
row("copy_", [s for s in TENSOR_PAIRS if s.args[0].is_contiguous()])
row(
    "fill_",
    [S(x, n) for x in (r(5), r(4, 3).t(), r(), r(0), r(5, dtype=i64)) for n in (2, 2.5, True)]
    + [S(r(5), r()), S(r(5), r(1)), S(r(5, dtype=b1), 3), S(r(3, dtype=i64), nan)],
)
row("zero_", [S(r(5)), S(r(4, 3).t()), S(r(5, dtype=b1)), no(r(1).expand(3))])

for _name in ("neg", "abs", "sign", "floor", "trunc", "fix", "relu", "square"):
    _more = {"neg": "negative negative_", "abs": "absolute absolute_"}.get(_name, "")
    row(f"{_name} {_name}_ {_more}", UNARY)
for _name in ("exp", "log", "sin", "cos", "tanh", "sigmoid", "rsqrt"):
    row(f"{_name} {_name}_", UNARY, exact=False)
row("sqrt sqrt_", UNARY, exact=False)
row("isnan", UNARY)
row("isinf", UNARY)
row("isfinite", UNARY)
row(
    "isclose",
    [
        S(r(5), r(5)),
        S(r(4, 3).t(), r(3, 1)),
        S(v(1, 2, nan, inf, -inf, inf), v(1, 2.00001, nan, inf, -inf, -inf)),
        S(v(1, 2, nan, inf), v(1.1, 2.1, nan, 1), 0.05, 0.02, equal_nan=True),
        S(v(1, 2, nan), v(1, 2, nan), rtol=0.0, atol=0.0),
        S(r(5, dtype=i64), r(5, dtype=i64), atol=1.0),
        S(r(0), r(0)),
        S(r(), r(5)),
    ],
)
row("positive", UNARY)

row("sum", [*reduction(), *SEVERAL, *TYPED], exact=False)
row("mean", [*reduction(), *SEVERAL, *TYPED], exact=False)
row("amax amin", [*reduction(True), *SEVERAL])
row("max min", [*reduction(True), S(r(5), r(5)), S(r(3, 1), r(4)), S(v(1, 2, nan), v(1, 3, 2))])
row("any all", [*reduction(True), *SEVERAL, S(v(0.0, nan)), S(v(0.0, 0.0)), S(v(1.0, 2.0))])
row("_is_any_true _is_all_true", [S(x) for x in (r(5, dtype=b1), r(dtype=b1), r(0, 3, dtype=b1))])
row(
    "mse_loss",
    [
        S(r(3, 4), r(3, 4), smooth=True),
        S(r(3, 4), r(3, 4), reduction="sum", smooth=True),
        S(r(3, 4), r(3, 4), reduction="none"),
        S(r(5, dtype=f64), r(5, dtype=f64)),
        S(r(5, dtype=bf16), r(5, dtype=bf16)),
        S(r(), r()),
        S(r(0), r(0)),
        S(r(3), r(3), reduction="max"),
    ],
    exact=False,
)

row("mm", MATRICES, exact=False)
row("matmul linalg_matmul __matmul__ __rmatmul__", MATMUL, exact=False)
row("bmm", [s for s in MATMUL if s.args[0].ndim == 3] + [S(r(0, 2, 3), r(0, 3, 2))], exact=False)
row("mv", [S(r(3, 4), r(4)), S(r(4, 3).t(), r(4)), S(r(3, 4), r(3)), S(r(4), r(4))], exact=False)
row("dot vdot", [*VECTORS, S(r(2, 2), r(2, 2))], exact=False)
row(
    "linear",
    [
        S(r(3, 4), r(5, 4), smooth=True),
        S(r(3, 4), r(5, 4), r(5), smooth=True),
        S(r(2, 3, 4), r(5, 4), r(5)),
        S(r(4), r(5, 4), r(5)),
        S(r(4), r(5, 4)),
        S(r(3, 4), r(4)),
        S(r(0, 4), r(5, 4), r(5)),
        S(r(3, 4, dtype=bf16), r(5, 4, dtype=bf16)),
        S(r(3, 4), r(4, 5)),
    ],
    exact=False,
)
row(
    "addmm addmm_",
    [
        S(r(5), r(3, 4), r(4, 5), smooth=True),
        S(r(3, 5), r(3, 4), r(4, 5), beta=0.5, alpha=2),
        S(r(), r(3, 4), r(4, 5)),
        S(r(5), r(3, 4), r(4, 5), beta=0),
        S(v(nan).expand(5), r(3, 4), r(4, 5), beta=0),
        S(r(2, 3, 5), r(3, 4), r(4, 5)),
        S(r(4), r(3, 4), r(4, 5)),
        S(r(5, dtype=i32), r(3, 4, dtype=i32), r(4, 5, dtype=i32), beta=2, alpha=3),
    ],
    exact=False,
)

row("T mT H mH", [S(x) for x in VIEWED if x.ndim in (0, 1, 2)] + [S(x234)])
row("t", [*map(S, VIEWED)])
row(
    "transpose swapaxes swapdims",
    [S(x234, a, b) for a, b in ((0, 1), (-1, 0), (1, 1), (0, 3), (-4, 0))] + [S(r(), 0, -1)],
)
row(
    "permute",
    [S(x234, p) for p in ((2, 0, 1), (0, -1, 1), [1, 0, 2], (0, 1), (0, 0, 1))] + [S(r(), ())],
)
row("view reshape", IN_ONE_ARGUMENT)
row(
    "flatten",
    [
        *map(S, VIEWED),
        S(x234, 1),
        S(x234, 0, 1),
        S(x234, start_dim=-2),
        S(x234, 2, 1),
        S(x234, 1, 1),
        S(x234, 3),
    ],
)
row("unsqueeze", [S(x, d) for x in VIEWED for d in (0, -1)] + [S(x23, 1), S(x23, 3), S(x23, -4)])
row(
    "squeeze",
    [
        *map(S, VIEWED),
        *(S(r(1, 3, 1), d) for d in (0, 1, -1, (0, 2), (0, 1), 3)),
        S(r(), 0),
    ],
)
row(
    "expand broadcast_to",
    [
        S(r(3, 1), (3, 4)),
        S(r(3, 1), (2, -1, 4)),
        S(r(3), [2, 3]),
        S(r(), (2, 2)),
        S(r(), ()),
        S(r(1), (0,)),
        S(r(3), (4,)),
        S(r(3), (-1, 3)),
        S(r(2, 3), (3,)),
        S(r(4, 1, 3).transpose(0, 2), (3, 5, 4)),
    ],
)
row("expand_as", [S(r(3, 1), r(3, 4)), S(r(3), r(4))])
row("view_as reshape_as", [S(x234, r(6, 4)), S(x23.t(), r(6)), S(x23, r(5))])
row(
    "select",
    [S(x234, d, i) for d, i in ((0, 1), (-1, -1), (1, 0), (1, 3), (3, 0))] + [S(r(), 0, 0)],
)
row(
    "narrow",
    [S(x234, *a) for a in ((0, 0, 1), (-1, 1, 2), (1, -2, 2), (1, 2, 2), (1, 3, 0), (2, 0, -1))],
)
row("unbind", [S(x234), S(x234, 1), S(x234, -1), S(r(0, 2)), S(r()), S(x23, 2)])
row("clone", [*map(S, VIEWED), S(r(4, 3).t(), memory_format=torch.contiguous_format)])
row("contiguous", [*map(S, VIEWED)])
row("detach detach_", [*map(S, VIEWED)])
row("cpu", [*map(S, VIEWED)])
row("data", [*map(S, VIEWED)])
row("__getitem__", [S(x, i) for x, i in INDICES] + [no(x, i) for x, i in ADVANCED])
row("__setitem__", ASSIGNED)
row("broadcast_tensors", [S(r(3, 1), r(4)), S(r()), S(r(3), r(4)), S(r(2, 1), r(), r(1, 2))])

row("zeros ones", SIZES)
row("zeros_like ones_like", LIKE)
row(
    "new_zeros new_ones",
    after(lambda: r(3, dtype=f64), SIZES) + after(lambda: r(2, dtype=i32), SIZES[:3]),
)
_full = [
    S((2, 3), 2.5),
    S((2,), 3),
    S((), True),
    S((2,), 1.5, dtype=i64),
    S([2], nan),
    S((2,), 1, dtype=b1),
]
_full += [S((2,), 0.1, dtype=bf16), S((2,), 2, dtype=f64), S((2,), -1, dtype=u8)]
row("full", [*_full, S(2, 1.0), S((2,), fill_value=3.0), S((2,), 1.0, requires_grad=True)])
row("full_like", [Sample((*s.args, 2.5), s.kwargs) for s in LIKE] + [S(r(3), 2, dtype=i64)])
row(
    "new_tensor",
    [S(r(3), 0.5), S(r(3), [1, 2.5, 3]), S(r(5, dtype=i64), 3), S(r(3), [[1]], dtype=i64)],
)
row("new_full", after(lambda: r(3), _full) + after(lambda: r(2, dtype=i64), _full))
row(
    "tensor scalar_tensor",
    [S(2), S(2.5), S(True), S(nan), S(2, dtype=f32), S(2.5, dtype=i64), S(2.5, requires_grad=True)],
)
row(
    "arange",
    [
        S(5),
        S(1, 6),
        S(1, 10, 3),
        S(10, 1, -2),
        S(0.5, 3),
        S(0, 1, 0.1),
        S(5, dtype=f32),
        S(2, 5, dtype=bf16),
        S(0),
        S(5, 1),
        S(1, 5, 0),
        S(5.0, requires_grad=True),
        S(1, 2.5, 0.25, dtype=f64),
        S(end=4),
        S(0, 7, step=2),
        S(0.0, -8.000001, -4.0, dtype=i64),
        *(S(0.5, 5.7, 1.5, dtype=d) for d in (i64, i32, u8)),
        S(0, 5, 0.5, dtype=i64),
        S(5, 0.5, dtype=i64),
    ],
)
row(
    "to",
    [
        S(r(5), f64),
        S(r(5), f32),
        S(r(5), torch.int64),
        S(r(5), dtype=bf16),
        S(r(4, 3).t(), f64),
        S(r(5), "cpu"),
        S(r(5), torch.device("cpu"), f64),
        S(r(5), "cpu", f16, True, True),
        S(r(5), r(3, dtype=f64)),
        S(r(5), f32, copy=True),
        S(r(4, 3).t(), f32, copy=True),
        S(r(5), f64, non_blocking=True, copy=False),
        S(r(3, dtype=b1), f32),
        S(r(3, dtype=u8), i8),
        S(r(5), f32, False, True),
    ],
)
row("type", [S(r(5), f64), S(r(5), f32), no(r(5))])
row("type_as", [S(r(5), r(2, dtype=f64)), S(r(5), r(2)), S(r(5), r(2, dtype=i64))])
row("double float bfloat16 half", [*CASTS, *IN_FLOAT_CASTS])
row("long int bool", CASTS)
row("short char byte", [s for s in CASTS if not s.args[0].isnan().any()])

BITS = [
    S(r(3, 4), i32),
    S(r(3, 4), torch.int16),
    S(r(3, 4), f64),
    S(x23, f32),
    no(r(4), torch.bool),
]
BITS = [*BITS, S(r(3, 4), f64), S(r(4, 3).t(), dtype=i32), S(r(3, 4), torch.bfloat16)]
# Spellings whose arguments differ from those of the function of that name.
BY_FUNCTION: dict[Callable, list[Sample]] = {
    torch.add: BINARY + ALPHA,
    torch.Tensor.add: BINARY + ALPHA,
    torch.Tensor.add_: BINARY + ALPHA,
    torch.sub: BINARY + ALPHA,
    torch.Tensor.sub_: BINARY + ALPHA,
    torch.div: BINARY + ROUNDED,
    torch.Tensor.div_: BINARY + ROUNDED,
    torch.pow: POW + [Sample(s.args[::-1], s.kwargs) for s in REFLECTED_POW],
    torch.rsub: BINARY + ALPHA,
    torch.Tensor.where: [
        S(s.args[1], s.args[0], *s.args[2:]) for s in WHERE if s.args[1] is not True
    ],
    torch.Tensor.view: RESHAPED + [S(x234, size=(6, 4)), *BITS],
    torch.Tensor.reshape: RESHAPED + [S(x23, shape=(3, 2))],
    torch.Tensor.permute: [
        S(x234, 2, 0, 1),
        S(x234, (2, 0, 1)),
        S(x234, -1, 0),
        S(x23, dims=[1, 0]),
    ],
    torch.Tensor.expand: ROWS["expand"] + [S(r(3, 1), 3, 4), S(r(3), 2, -1), S(r(3), size=(2, 3))],
    torch.nn.functional.relu: UNARY + [S(r(5), inplace=True), S(r(5), True)],
    torch.broadcast_tensors: ROWS["broadcast_tensors"],
}

# Metadata, autograd, requests for values, memory as it comes, views in place, and whole optimizers:
# their own tests say what they answer.
_elsewhere = """
    checkpoint
    as_strided_ squeeze_ swapaxes_ swapdims_ t_ transpose_ unsqueeze_
    empty empty_like new new_empty _amp_foreach_non_finite_check_and_unscale_ _amp_update_scale_
    _fused_adagrad_ _fused_adam_ _fused_adamw_ _fused_sgd_
    __array__ __bool__ __complex__ __contains__ __dlpack__ __float__ __format__ __hash__
    __index__ __int__ __iter__ __len__ __repr__ _set_grad_enabled allclose backward data_ptr
    device dim dtype element_size equal grad grad_fn is_complex is_conj is_contiguous is_cpu
    is_cuda is_floating_point is_signed is_inference is_leaf is_meta is_mkldnn is_neg is_nested
    is_nonzero is_quantized is_same_size is_sparse is_sparse_csr item itemsize layout nbytes ndim
    complex imag polar view_as_complex view_as_real
    can_cast ndimension nelement numel numpy promote_types requires_grad requires_grad_
    result_type retain_grad
    register_hook register_post_accumulate_grad_hook retains_grad shape size
    storage_offset stride tolist
"""
ELSEWHERE = set(_elsewhere.split())


def bare_name(function: Callable) -> str:
    """The name of a torch function without its namespace."""
    return function_name(function).rpartition(".")[2]


# Smooth, or linear, wherever their samples are: all of these are differentiated twice.
_smooth = """
    T mT H mH as_tensor atleast_1d atleast_2d atleast_3d batch_norm bmm broadcast_tensors
    broadcast_to chunk clone constant_pad_nd contiguous cpu double dsplit expand expand_as
    flatten fliplr flipud float hsplit instance_norm mv narrow permute reshape reshape_as select
    split_with_sizes squeeze t to transpose type type_as unbind unsqueeze view view_as vsplit
    where
    adjoint alias_copy conj conj_physical conj_physical_ diagflat diagonal_copy expand_copy fill
    linalg_diagonal linalg_vander native_group_norm native_layer_norm permute_copy put put_ ravel
    real resolve_conj resolve_neg select_copy slice_copy split_copy split_with_sizes_copy
    squeeze_copy sum_to_size t_copy transpose_copy unbind_copy unfold_copy unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze_copy view_copy
"""
SMOOTH = set(_smooth.split())


def samples_of(function: Callable) -> list[Sample]:
    """The samples of one spelling; empty when there are none."""
    found = BY_FUNCTION.get(function)
    found = ROWS.get(bare_name(function), []) if found is None else found
    if bare_name(function) in SMOOTH:
        return [replace(s, smooth=not s.refused) for s in found]
    return found


def each_function() -> list[Callable]:
    """The functions of the table that compute or make views."""
    return [
        f for f in RULES if bare_name(f) not in ELSEWHERE and not _is_setter(f) and not of_ranks(f)
    ]


def of_ranks(function: Callable) -> bool:
    """Whether the ranks of a process group call it together: see test_collectives."""
    return RULES[function].family in ("collectives", "data_parallel")


def _is_setter(function: Callable) -> bool:
    return getattr(function, "__name__", "") in ("__set__", "__delete__")


_state = _random.get_state()


def restart() -> None:
    """Further tables of samples start here, so that their numbers do not depend on each other."""
    _random.set_state(_state)
