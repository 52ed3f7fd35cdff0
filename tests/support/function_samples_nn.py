"""Samples of the functions of neural networks: activations, softmax, losses, norms, statistics.

Importing this adds them to the table of `function_samples`; `NAMES` are the spellings added here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from support.function_samples import (
    BY_FUNCTION,
    ROWS,
    SPECIAL,
    SPECIALS,
    UNARY,
    S,
    Sample,
    bare_name,
    bf16,
    f16,
    f32,
    f64,
    i64,
    inf,
    layouts,
    nan,
    r,
    restart,
    row,
    u8,
    v,
)

functional = torch.nn.functional
_before = set(ROWS)
from support import (  # noqa: E402, F401
    function_samples_attention,
    function_samples_composed,
    function_samples_images,
    function_samples_matrices,
    function_samples_patches,
    function_samples_recurrent,
    function_samples_resampling,
)

restart()

# --- element-wise ------------------------------------------------------------------------------

# Away from where these functions have kinks.
SMOOTH = v(-3.7, -1.1, -0.4, 0.3, 1.7, 4.2)
ACTIVATED = [
    S(SMOOTH, smooth=True),
    S(SMOOTH.to(f64), smooth=True),
    *map(S, layouts()),
    *SPECIALS,
    S(r(123, dtype=f64)),
    S(r(123, dtype=bf16)),
    S(r(123, dtype=f16)),
    S(v(-3, 0, 3, 6, 1, -1, 0.5, -0.5, 20)),
    S(r(5, dtype=i64)),
]

# Vectorized eager loses the largest numbers in gelu, and NaN is 0 or not with the place it stands
# at in the gradients of clamped functions.
FINITE = [s for s in ACTIVATED if not (s.args[0].isinf() | (s.args[0].abs() > 1e38)).any()]
NUMBERS = [s for s in ACTIVATED if not s.args[0].isnan().any()]


def with_numbers(*rows: tuple) -> list[Sample]:
    """Inputs of several kinds with each row of further arguments."""
    inputs = (SMOOTH, r(4, 3).t(), r(123, dtype=bf16), v(*SPECIAL), r(7, dtype=f64), r())
    return [S(x, *more) for more in rows for x in inputs]


def inplace(samples: list[Sample], **named: object) -> list[Sample]:
    """A few of the samples, in place."""
    return [Sample(s.args, {**s.kwargs, "inplace": True}) for s in samples[2:9]]


for _name in ("erf", "expm1", "log1p", "log2", "log10", "exp2", "sinc"):
    row(f"{_name} {_name}_", UNARY, exact=False)
    if hasattr(torch.special, _name):
        row(f"special_{_name}", UNARY, exact=False)
row("special_expit", UNARY, exact=False)

row(
    "gelu gelu_",
    [*FINITE, *(Sample(s.args, {"approximate": "tanh"}, s.smooth) for s in ACTIVATED)],
    exact=False,
)
for _name in ("silu", "hardswish", "selu"):
    row(f"{_name} {_name}_", ACTIVATED, exact=False)
# Where mish has its minimum, near -1.19, the derivative of both is little more than rounding.
_one = Sample((torch.tensor(0.7),), smooth=True)
row("mish mish_", [*(s for s in ACTIVATED if s.args[0].ndim), _one], exact=False)
row("hardsigmoid hardsigmoid_", [Sample(s.args) for s in ACTIVATED], exact=False)
row("relu6 relu6_", NUMBERS, exact=False)
row("softsign log_sigmoid", ACTIVATED, exact=False)
row("tanhshrink", [s for s in ACTIVATED if s.args[0].ndim], exact=False)
row(
    "leaky_relu leaky_relu_",
    [*ACTIVATED, *with_numbers((0.2,), (0.0,), (1.5,)), S(r(5), negative_slope=0.3)],
    exact=False,
)
row("elu elu_", [*ACTIVATED, *with_numbers((0.7,), (2.0,)), S(r(5), alpha=0.3)], exact=False)
row("celu celu_", [*ACTIVATED, *with_numbers((0.5,), (2.0,)), S(r(5), alpha=0.3)], exact=False)
row(
    "hardtanh hardtanh_",
    [*NUMBERS, *with_numbers((-0.5, 0.75))[:3], S(r(5), min_val=-0.2), S(r(5), 1.0, -1.0)],
    exact=False,
)
row(
    "softplus",
    [*ACTIVATED, *with_numbers((2.0,), (0.5, 1.0)), S(r(5), beta=3, threshold=2)],
    exact=False,
)
row(
    "_threshold threshold threshold_",
    [*with_numbers((0.25, 20.0), (-1, 0)), S(r(5), threshold=0.0, value=1.0), S(r(0), 1.0, 2.0)],
)
row("hardshrink softshrink", [*NUMBERS, *with_numbers((0.25,))[:3], S(r(5), lambd=1.0)])
row(
    "prelu",
    [
        S(SMOOTH, v(0.25), smooth=True),
        S(r(2, 3, 4), r(3), smooth=True),
        S(r(2, 3), r(3)),
        S(r(2, 3), r(1)),
        S(r(5), r()),
        S(r(), r(1)),
        S(r(3, 2).t(), r(3)),
        S(r(2, 3, dtype=bf16), r(3, dtype=bf16)),
        S(r(2, 3), r(2)),
        S(r(0, 3), r(3)),
        S(v(*SPECIAL), r(1)),
    ],
    exact=False,
)
row(
    "glu",
    [
        S(r(4, 6), smooth=True),
        S(r(4, 6), 0),
        S(r(4, 6), dim=-2),
        S(r(2, 3, 4).permute(2, 0, 1), 0),
        S(r(5)),
        S(r()),
        S(r(0, 4)),
        S(r(8, dtype=bf16)),
        S(v(-100, 1, 100, -100, 100, -100)),
    ],
    exact=False,
)
row(
    "addcmul addcmul_ addcdiv addcdiv_",
    [
        S(r(5), r(5), r(5, low=0.5), smooth=True),
        S(r(5), r(5), r(5, low=0.5), value=0.3, smooth=True),
        S(r(3, 4), r(3, 1), r(4, low=0.5), value=-2),
        S(r(4, 3).t(), r(3, 4), r(3, 4, low=0.5)),
        S(r(5), r(5), r(5, low=0.5), value=1e-3),
        S(r(5, dtype=f64), r(5, dtype=f64), r(5, dtype=f64, low=0.5), value=0.1),
        S(r(9, dtype=bf16), r(9, dtype=bf16), r(9, dtype=bf16, low=0.5), value=0.1),
        S(r(), r(), r(low=0.5)),
        S(r(0), r(0), r(0)),
        S(r(3), r(4), r(3)),
        S(v(1, nan, inf), v(0, 1, -inf), v(0, 2, 1)),
    ],
    exact=False,
)
row(
    "lerp lerp_",
    [
        S(r(5), r(5), 0.3, smooth=True),
        S(r(5), r(5), 0.75),
        S(r(5), r(5), 2),
        S(r(3, 4), r(4), 0.1),
        S(r(4, 3).t(), r(3, 4), -0.5),
        S(r(5), r(5), v(-1, 0, 0.3, 0.5, 1.5), smooth=True),
        S(r(3, 4), r(3, 4), r()),
        S(r(3, 4), r(3, 1), r(4)),
        S(r(9, dtype=bf16), r(9, dtype=bf16), 0.1),
        S(r(5, dtype=f64), r(5, dtype=f64), 0.1),
        S(r(5, dtype=f64), r(5), 0.1),
        S(r(5, dtype=i64), r(5, dtype=i64), 0.5),
        S(r(), r(), 0.5),
        S(r(0), r(0), 0.5),
        S(v(1, nan, inf, 3e38), v(2, 1, -inf, -3e38), 0.25),
    ],
    exact=False,
)

# --- rows --------------------------------------------------------------------------------------

ROWWISE = [
    S(r(3, 5), 1, smooth=True),
    S(r(3, 5), 0, smooth=True),
    S(r(2, 3, 4), -2, smooth=True),
    S(r(2, 3, 4).permute(2, 0, 1), 1),
    S(r(4, 3).t(), 1),
    S(r(123), 0),
    S(r(1, 1), 1),
    S(r(), 0),
    S(r(), -1),
    S(r(0), 0),
    S(r(0, 3), 1),
    S(r(3, 0), 1),
    S(r(7, 11, dtype=f64), 1, smooth=True),
    S(r(7, 33, dtype=bf16), 1),
    S(r(7, 33, dtype=f16), 0),
    S(v(1, nan, 2), 0),
    S(v(1, -inf, 2), 0),
    S(v(1, inf, 2), 0),
    S(v(-inf, -inf), 0),
    S(v(1000, 999, -1000), 0),
    S(r(3, 5), 2),
    S(r(3, dtype=i64), 0),
    S(r(3, 1).expand(3, 4), 1),
]
TO_DTYPE = [
    S(r(3, 5), dim=1, dtype=f64),
    S(r(3, 5, dtype=bf16), dim=1, dtype=f32),
    S(r(3, 5, dtype=i64), dim=0, dtype=f32),
]
row("softmax special_softmax log_softmax special_log_softmax", [*ROWWISE, *TO_DTYPE], exact=False)
for _function in (functional.softmax, functional.log_softmax):
    BY_FUNCTION[_function] = [
        *ROWWISE,
        *TO_DTYPE,
        S(r(3, 5)),
        S(r(2, 3, 4)),
        S(r(5)),
        S(r(3, 5), 1, 3, f64),
    ]
row("softmin", BY_FUNCTION[functional.softmax], exact=False)
row(
    "logsumexp special_logsumexp",
    [
        *ROWWISE,
        S(r(2, 3, 4), (0, 2), smooth=True),
        S(r(2, 3, 4), [1, -1], True),
        S(r(2, 3, 4), dim=1, keepdim=True),
        S(r(3, 0), (0, 1)),
        S(r(), 0, True),
    ],
    exact=False,
)

# --- statistics --------------------------------------------------------------------------------

SPREADS = [
    S(r(3, 4, 5), smooth=True),
    S(r(3, 4, 5), 1, smooth=True),
    S(r(3, 4, 5), (0, 2), smooth=True),
    S(r(3, 4, 5), dim=[-1, 0], keepdim=True),
    S(r(3, 4), False),
    S(r(3, 4), True),
    S(r(3, 4), unbiased=False),
    S(r(3, 4), 0, False),
    S(r(3, 4), 0, True, True),
    S(r(3, 4), 0, unbiased=False, keepdim=True),
    S(r(3, 4), dim=1, correction=0),
    S(r(3, 4), dim=1, correction=2),
    S(r(3, 4), correction=0, keepdim=True),
    S(r(3, 4), dim=None, correction=1),
    S(r(3, 4), dim=0, correction=5),
    S(r(4, 3).t(), 0),
    S(r(123, dtype=f64, low=0.5), 0, smooth=True),
    S(r(123, dtype=bf16), 0),
    S(r(1), 0),
    S(r(1), 0, False),
    S(r()),
    S(r(0)),
    S(r(0, 3), 0),
    S(r(0, 3), 1),
    S(v(2, 2, 2)),
    S(v(1, nan, 2)),
    S(v(1, inf, 2)),
    S(torch.arange(12.0).reshape(3, 4) ** 2 + 1000, 1),  # means that float32 holds exactly
    S(r(3, 4), 2),
    S(r(5, dtype=i64)),
]
row("var std", SPREADS, exact=False)
# Eager's mean is NaN where an element is infinite.
row("var_mean std_mean", [s for s in SPREADS if not s.args[0].isinf().any()], exact=False)
NORMED = [
    S(r(3, 4, 5), smooth=True),
    S(r(3, 4, 5), 2, 1, smooth=True),
    S(r(3, 4, 5), 2, (0, 2), True),
    *(S(r(3, 4), p, 1) for p in (1, inf, -inf, 0, 3, 0.5, 1.5, -1.0)),
    S(r(3, 4), 3, smooth=True),
    S(r(3, 4), 1.5, 0, smooth=True),
    S(r(3, 4, 5), 2, dim=-1, keepdim=True),
    S(v(0, 0, 0)),
    S(v(0, 0, 0), 1),
    S(v(0, 0, 0), 3),
    S(v(0, 0, 0), inf),
    S(v(2, -2, 1), inf),
    S(v(1, nan, 2)),
    S(v(1, nan, 2), inf),
    S(v(1, inf, 2)),
    S(r(4, 3).t(), 2, 0),
    S(r(123, dtype=f64)),
    S(r(123, dtype=bf16)),
    S(r()),
    S(r(1), 2, 0),
    S(r(0)),
    S(r(0, 3), 2, 0),
    S(r(0, 3), inf, 0),
    S(r(3, 4), 2, 2),
    S(r(5, dtype=i64)),
    S(r(3, 4), dtype=f64),
]
row("linalg_vector_norm norm", [*NORMED, S(r(3, 4), 2, ())], exact=False)
row(
    "linalg_norm",
    [
        S(r(3, 4), smooth=True),
        S(r(5), 3),
        S(r(3, 4), None, 1),
        S(r(3, 4), 2, 1, True),
        S(r(3, 3), 1),
    ]
    + [S(r(3, 4), dim=(0, 1))]
    + [S(NORMED[-1].args[0], order) for order in ("fro", "nuc", 2, -2, inf)]
    + [S(torch.ones(2, 3, 4), 1, (0, 2)), S(torch.ones(2, 3, 4), 2), S(torch.ones(3), -inf)],
    exact=False,
)
for _function in (torch.norm, torch.Tensor.norm):
    BY_FUNCTION[_function] = [*NORMED, S(r(3, 4), "fro", (0, 1)), S(r(3, 4), p=None)]
    BY_FUNCTION[_function] += [S(NORMED[-1].args[0], "nuc"), S(torch.eye(3), "nuc", (1, 0), True)]
row(
    "normalize",
    [
        S(r(3, 4), smooth=True),
        S(r(3, 4), 2.0, 0),
        S(r(3, 4), p=1.0, dim=-1),
        S(r(3, 4), p=3.0, dim=-1),
        S(r(2, 3, 4), dim=(1, 2)),
        S(r(5), dim=0, eps=0.5),
        S(v(0, 0, 0), dim=0),
        S(r(4, 3).t()),
        S(r(3, 9, dtype=bf16)),
        S(r(0, 3)),
        S(r(5)),
    ],
    exact=False,
)
row(
    "cosine_similarity",
    [
        S(r(3, 4), r(3, 4), smooth=True),
        S(r(3, 4), r(4), -1),
        S(r(2, 3, 4), r(2, 3, 4), dim=-1),
        S(r(5), r(5), dim=0, eps=0.5),
        S(v(0, 0), v(1, 2), 0),
        S(r(3, 9, dtype=bf16), r(3, 9, dtype=bf16)),
        S(r(3, 4), r(3, 5)),
        S(r(0, 3), r(0, 3)),
    ],
    exact=False,
)
row(
    "pairwise_distance",
    [
        S(r(3, 4), r(3, 4), smooth=True),
        S(r(3, 4), r(4), 1.0),
        S(r(3, 4), r(3, 4), p=3.0, eps=1e-3, keepdim=True),
        S(r(5), r(5)),
    ],
    exact=False,
)
row(
    "dist",
    [S(r(3, 4), r(3, 4), smooth=True), S(r(3, 4), r(4), 1), S(r(5), r(5), p=inf)],
    exact=False,
)

# --- losses ------------------------------------------------------------------------------------

HOW = ({}, {"reduction": "sum"}, {"reduction": "none"})
LOSSES = [
    *(Sample((r(3, 4), r(3, 4)), how, True) for how in HOW),
    S(r(3, 4), r(3, 4), reduction="max"),
    S(r(4, 3).t(), r(3, 4), reduction="none"),
    S(r(5, dtype=f64), r(5, dtype=f64), smooth=True),
    S(r(33, dtype=bf16), r(33, dtype=bf16)),
    S(r(33, dtype=bf16), r(33, dtype=bf16), reduction="none"),
    S(r(), r()),
    S(r(0), r(0)),
    S(v(1, 2, 3.5), v(1, 3, 2.5)),
    S(v(1, nan, inf, 0), v(1, 3, 2, -inf), reduction="none"),
    S(r(3, 4), r(3, 4), size_average=False),
    S(r(3, 4), r(3, 4), reduce=False),
]
row(
    "l1_loss",
    [*LOSSES, S(r(3, 1), r(4)), S(r(3, 4), r(3, 4), weight=r(3, 4, low=0.1))],
    exact=False,
)
row(
    "smooth_l1_loss",
    [*LOSSES, *(S(r(5), r(5), beta=b) for b in (0.5, 2.0, 0, -1.0)), S(r(3, 1), r(4))],
    exact=False,
)
row(
    "huber_loss",
    [s for s in LOSSES if not {"size_average", "reduce"} & set(s.kwargs)]
    + [S(r(5), r(5), delta=d) for d in (0.5, 2.0, 0.0)],
    exact=False,
)
row(
    "soft_margin_loss",
    [
        Sample((s.args[0], s.args[1].sign().requires_grad_(False)), s.kwargs, s.smooth)
        for s in LOSSES
    ],
    exact=False,
)


def u(*shape: int, dtype: torch.dtype = f32) -> torch.Tensor:
    """Probabilities."""
    return r(*shape, dtype=dtype, low=0.05, high=0.95)


row(
    "binary_cross_entropy",
    [
        *(Sample((u(3, 4), u(3, 4)), how, True) for how in HOW),
        S(u(3, 4), u(3, 4), r(4, low=0.1)),
        S(u(3, 4), u(3, 4), weight=r(3, 4, low=0.1), reduction="none"),
        S(v(0, 1, 0, 1, 0.5), v(0, 1, 1, 0, 0), reduction="none"),
        S(v(0, 1, 0, 1, 0.5), v(0, 1, 1, 0, 0)),
        S(u(5, dtype=f64), u(5, dtype=f64)),
        S(u(33, dtype=bf16), u(33, dtype=bf16), reduction="none"),
        S(u(3), u(4)),
        S(u(3, 1), u(3)),
        S(u(5), u(5, dtype=f64)),
        S(u(0), u(0)),
        S(u(), u()),
    ],
    exact=False,
)
row(
    "binary_cross_entropy_with_logits",
    [
        *(Sample((r(3, 4), u(3, 4)), how, True) for how in HOW),
        S(r(3, 4), u(3, 4), r(4, low=0.1)),
        S(r(3, 4), u(3, 4), weight=r(3, 4, low=0.1), reduction="none"),
        S(r(3, 4), u(3, 4), pos_weight=r(4, low=0.1), smooth=True),
        S(r(3, 4), u(3, 4), pos_weight=r(1, low=0.1), weight=r(3, 1, low=0.1)),
        S(v(-200, 200, -200, 200, 0), v(0, 1, 1, 0, 0.5), reduction="none"),
        S(v(nan, inf, -inf, inf), v(0, 1, 1, 0), reduction="none"),
        S(r(5, dtype=f64), u(5, dtype=f64), smooth=True),
        S(r(33, dtype=bf16), u(33, dtype=bf16), reduction="none"),
        S(r(3), u(4)),
        S(r(0), u(0)),
        S(r(), u()),
    ],
    exact=False,
)
row(
    "kl_div",
    [
        *(Sample((r(3, 4, high=0.0), u(3, 4)), how, True) for how in HOW),
        S(r(3, 4, high=0.0), u(3, 4), reduction="batchmean", smooth=True),
        S(r(3, 4, high=0.0), r(3, 4, high=0.0), log_target=True, smooth=True),
        S(r(3, 4, high=0.0), r(3, 4, high=0.0), reduction="batchmean", log_target=True),
        S(r(4, high=0.0), v(0, 0.5, 0.5, 0), reduction="sum"),
        S(r(5, dtype=f64), u(5, dtype=f64)),
        S(r(3, 4, high=0.0), u(4)),
        S(r(), u()),
        S(r(0, 3), u(0, 3)),
    ],
    exact=False,
)


def classes(*values: int, dtype: torch.dtype = i64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def of_classes(logits) -> list[Sample]:
    """Inputs of every layout with class indices; `logits(*shape)` makes them."""
    six, weight = classes(0, 4, 2, 2, 1, 3), r(5, low=0.1)
    ignoring = classes(0, -100, 2, 2, -100, 3)
    return [
        *(Sample((logits(6, 5), six), how, True) for how in HOW),
        *(Sample((logits(6, 5), ignoring), how) for how in HOW),
        S(logits(6, 5), six, ignore_index=2),
        S(logits(6, 5), classes(2, 2, 2, 2, 2, 2), ignore_index=2),
        S(logits(6, 5), classes(2, 2, 2, 2, 2, 2), ignore_index=2, reduction="sum"),
        *(S(logits(6, 5), six, weight, **how) for how in HOW),
        *(S(logits(6, 5), ignoring, weight=weight, **how) for how in HOW),
        S(logits(5), torch.tensor(3)),
        S(logits(5), torch.tensor(3), weight),
        S(logits(5), torch.tensor(-100)),
        S(logits(5), torch.tensor(3), reduction="none"),
        *(S(logits(2, 5, 3), six.reshape(2, 3), **how) for how in HOW),
        S(logits(2, 5, 3), ignoring.reshape(2, 3), weight),
        S(logits(1, 5, 2, 3), six.reshape(1, 2, 3)),
        S(logits(5, 6).t(), six),
        S(logits(6, 5, dtype=f64), six, smooth=True),
        S(logits(6, 5, dtype=bf16), six),
        S(logits(6, 5, dtype=bf16), six, reduction="none"),
        S(logits(6, 5), six.to(u8)),
        S(logits(0, 5), classes()),
        S(logits(0, 5), classes(), reduction="sum"),
        S(logits(1, 5), classes(1)),
        S(logits(6, 5), classes(0, 1)),
        S(logits(6, 5), six, r(4)),
        S(logits(6, 5), six, reduction="all"),
        S(logits(6, 5), six, size_average=False),
    ]


row("nll_loss", of_classes(lambda *s, **k: r(*s, high=-0.1, **k)), exact=False)
_six = classes(0, 4, 2, 2, 1, 3)
row(
    "cross_entropy",
    [
        *of_classes(r),
        *(S(r(6, 5), _six, label_smoothing=0.1, smooth=True, **how) for how in HOW),
        *(S(r(6, 5), classes(0, -100, 2, 2, -100, 3), label_smoothing=0.2, **how) for how in HOW),
        *(S(r(6, 5), _six, r(5, low=0.1), label_smoothing=0.1, **how) for how in HOW),
        S(r(2, 5, 3), _six.reshape(2, 3), label_smoothing=0.3),
        S(r(6, 5), _six, label_smoothing=1.5),
        *(S(r(6, 5), u(6, 5), smooth=True, **how) for how in HOW),
        *(S(r(6, 5), u(6, 5), r(5, low=0.1), **how) for how in HOW),
        S(r(6, 5), u(6, 5), label_smoothing=0.1),
        S(r(2, 5, 3), u(2, 5, 3)),
        S(r(5), u(5)),
        S(r(6, 5, dtype=bf16), u(6, 5, dtype=bf16)),
        S(r(0, 5), u(0, 5)),
        S(r(5, 5), torch.ones(5, 5, dtype=i64)),
        S(v(1000, 0, -1000).reshape(1, 3), classes(2)),
    ],
    exact=False,
)

_spoken = r(7, 3, 5).log_softmax(-1)
_words = v(1, 2, 2, 3, -1, -1, -1, -1, -1, dtype=i64).reshape(3, 3)  # -1: behind the last one
_cannot = _spoken.masked_fill(torch.arange(5) == 2, -inf)


def spoken(lasts: tuple[int, ...], counts: tuple[int, ...], **how: object) -> list[Sample]:
    """The same lengths as numbers and as tensors, of labels in rows and one after another."""
    rows = [v(*n, dtype=i64) for n in (lasts, counts)]
    flat = torch.cat([row[:n] for row, n in zip(_words, counts, strict=True)])
    return [
        S(_spoken, _words, *rows, **how),
        S(_spoken, _words, lasts, list(counts), **how),
        S(_spoken, flat, *rows, **how),
        S(_spoken, flat, lasts, counts, **how),
    ]


def alignments(none: object, mean: object, total: object) -> list[Sample]:
    lengths = (v(7, 5, 4, dtype=i64), v(3, 1, 0, dtype=i64))
    return [
        S(_spoken, _words, *lengths),
        S(_spoken, _words, (7, 5, 4), (3, 1, 0)),
        *(s for how in (none, mean, total) for s in spoken((7, 5, 4), (3, 1, 0), reduction=how)),
        # no path: too few steps, or none
        *(
            s
            for how in (none, mean, total)
            for zero in (False, True)
            for s in spoken((3, 0, 0), (3, 1, 0), reduction=how, zero_infinity=zero)
        ),
        S(_spoken[:2], v(1, 2, 2, 3, dtype=i64), v(2, 2, 1, dtype=i64), lengths[1], reduction=none),
        S(_spoken[:1], _words, (1, 1, 1), (1, 1, 0), reduction=none),
        S(_spoken.double(), _words.int(), *lengths, blank=4, reduction=none),
        S(_spoken[:, 0], v(1, 2, dtype=i64), v(7, dtype=i64), v(2, dtype=i64), reduction=none),
        S(_spoken[:, 0], v(1, 2, dtype=i64), (6,), (2,), reduction=mean),
        S(_spoken[:, 0], _words[:1], v(7, dtype=i64)[0], v(3, dtype=i64)[0], reduction=total),
        S(_spoken, torch.zeros(3, 0, dtype=i64), (7, 5, 4), (0, 0, 0), reduction=none),
        S(_spoken.permute(1, 0, 2).contiguous().permute(1, 0, 2), _words, *lengths),
        S(r(7, 3, 5), _words, *lengths, reduction=none),  # no logarithms of probabilities
        S(_cannot, _words, *lengths, reduction=none),
        S(_cannot, _words.clamp(3), *lengths, reduction=none),
        S(_spoken, _words.clamp(0), (7, 5, 4), (3, 2, 3), reduction=none),  # blanks as labels
        S(_spoken, _words * 0, (7, 5, 4), (2, 1, 2), reduction=none),
        S(_spoken.bfloat16(), _words, *lengths),
        S(_spoken, _words, *lengths, blank=5),
        S(_spoken, _words, lengths[0].float(), lengths[1]),
        S(_spoken, _words, lengths[0][:2], lengths[1]),
        S(_spoken, _words, (7, 5, 8), (3, 1, 0)),
        S(_spoken, _words, (7, 5, 7), (3, 1, 4)),
        S(_spoken, v(1, 2, 2, dtype=i64), (7, 5, 7), (3, 1, 0)),
        S(_spoken[:0], _words, (0, 0, 0), (3, 1, 0)),
    ]


row("ctc_loss", alignments("none", "mean", "sum"), exact=False)
BY_FUNCTION[torch.ctc_loss] = alignments(0, 1, 2)

row(
    "linear_cross_entropy",
    [
        S(r(6, 3), r(5, 3), _six, smooth=True),
        S(r(6, 3), r(5, 3), _six, linear_bias=r(5), reduction="sum", smooth=True),
        S(r(6, 3), r(5, 3), _six, weight=r(5, low=0.1), reduction="none"),
        S(r(6, 3), r(5, 3), classes(0, -100, 2, 2, -100, 3), label_smoothing=0.2),
        S(r(6, 3), r(5, 3), _six, ignore_index=2),
        S(r(6, 3), r(5, 3), u(6, 5)),
        S(r(2, 3), r(5, 4, 3), _six.reshape(2, 3).repeat(1, 2)[:, :4], linear_bias=r(5, 4)),
        S(r(3), r(5, 3), torch.tensor(2)),
        S(r(6, 3, dtype=bf16), r(5, 3, dtype=bf16), _six),
        S(r(6, 3), r(5, 4), _six),
        S(r(4, 5), r(7, 5), v(0, 6, 2, 2, dtype=i64), smooth=True),
        S(r(4, 5), r(7, 5), v(0, 6, 2, 2, dtype=i64), linear_bias=r(7), reduction="sum"),
        S(r(5), r(7, 5), v(3, dtype=i64)[0], weight=r(7, low=0.1), label_smoothing=0.1),
        S(r(4, 5), r(7, 5), v(0, 6, -1, 2, dtype=i64), ignore_index=-1, reduction="none"),
        S(r(4, 5), r(7, 5), r(4, 7).softmax(-1)),
        S(r(4, 5), r(7, 3, 5), torch.ones(4, 3, dtype=i64)),
        S(r(4, 5), r(7, 4), v(0, 6, 2, 2, dtype=i64)),
    ],
    exact=False,
)

# --- normalization -----------------------------------------------------------------------------

row(
    "layer_norm",
    [
        S(r(3, 5), (5,), smooth=True),
        S(r(3, 5), (5,), r(5), r(5), smooth=True),
        S(r(3, 5), [5], r(5)),
        S(r(3, 5), [5], None, r(5), 1e-3),
        S(r(2, 3, 4), (3, 4), r(3, 4), r(3, 4), smooth=True),
        S(r(2, 3, 4), (2, 3, 4)),
        S(r(2, 3, 4).permute(2, 0, 1), (3,), r(3), r(3)),
        S(r(123), (123,), eps=0.1),
        S(r(7, 11, dtype=f64), (11,), r(11, dtype=f64), r(11, dtype=f64), smooth=True),
        S(r(7, 33, dtype=bf16), (33,), r(33, dtype=bf16), r(33, dtype=bf16)),
        S(r(7, 33, dtype=f16), (33,)),
        S(r(0, 5), (5,), r(5), r(5)),
        S(r(3, 5) + 3, (5,)),
        S(v(1, nan, 2), (3,)),
        S(v(2, 2, 2), (3,)),
        S(r(3, 5), (4,)),
        S(r(3, 5), (5,), r(4)),
        S(r(3, 5), ()),
        S(r(3, 5, dtype=i64), (5,)),
    ],
    exact=False,
)
row(
    "rms_norm",
    [
        S(r(3, 5), (5,), smooth=True),
        S(r(3, 5), (5,), r(5), smooth=True),
        S(r(3, 5), [5], r(5), 1e-3),
        S(r(2, 3, 4), (3, 4), r(3, 4)),
        S(r(7, 11, dtype=f64), (11,), r(11, dtype=f64), smooth=True),
        S(r(7, 33, dtype=bf16), (33,), r(33, dtype=bf16)),
        S(r(7, 33, dtype=f16), (33,), eps=1e-5),
        S(v(0, 0, 0), (3,)),
        S(r(3, 5), (4,)),
    ],
    exact=False,
)
row(
    "group_norm",
    [
        S(r(2, 6, 5), 3, smooth=True),
        S(r(2, 6, 5), 3, r(6), r(6), smooth=True),
        S(r(2, 6), 2, r(6), r(6)),
        S(r(2, 4, 3, 2), 4, r(4)),
        S(r(2, 4, 3, 2), 1, eps=1e-2),
        S(r(2, 6, 5, dtype=f64), 3, r(6, dtype=f64), r(6, dtype=f64)),
        S(r(2, 6, 5, dtype=bf16), 3, r(6, dtype=bf16), r(6, dtype=bf16)),
        S(r(2, 5, 6).transpose(1, 2), 3, r(6), r(6)),
        S(r(2, 6, 5), 4),
        S(r(2, 6, 5), 3, r(5)),
    ],
    exact=False,
)
_stats = (v(0.1, -0.2, 0.3), v(1.5, 0.7, 1.1))
BATCHES = [
    (r(4, 3), ()),
    (r(4, 3, 5), (r(3), r(3))),
    (r(2, 3, 2, 2), (r(3), None)),
    (r(3, 4).t(), (r(3), r(3))),
]
row(
    "batch_norm",
    [
        *(S(x, None, None, *p, training=True, smooth=True) for x, p in BATCHES),
        *(S(x, *_stats, *p) for x, p in BATCHES),
        S(r(4, 3), *_stats, r(3), r(3), False, 0.1, 1e-3),
        S(r(4, 3, dtype=f64), None, None, r(3, dtype=f64), r(3, dtype=f64), True, smooth=True),
        S(r(9, 3, dtype=bf16), None, None, r(3, dtype=bf16), r(3, dtype=bf16), True),
        S(r(9, 3, dtype=bf16), None, None, r(3), r(3), True),
        S(r(1, 3), None, None, training=True),
        S(r(4, 3), None, None),
        S(r(4, 3), None, None, r(4), training=True),
        S(r(4), None, None, training=True),
    ],
    exact=False,
)
BY_FUNCTION[torch.batch_norm] = [
    S(x, *(p or (None, None)), None, None, True, 0.1, 1e-5, False) for x, p in BATCHES
] + [S(r(4, 3), r(3), r(3), *_stats, False, 0.1, 1e-5, False)]
row(
    "instance_norm",
    [
        S(r(2, 3, 5), smooth=True),
        S(r(2, 3, 5), weight=r(3), bias=r(3), smooth=True),
        S(r(2, 3, 2, 2), None, None, r(3), None),
        S(r(2, 3, 5), *_stats, r(3), r(3), False),
        S(r(2, 3, 1)),
        S(r(2, 3, 5), weight=r(4)),
        S(r(2, 3, 5, dtype=f64), eps=1e-2),
    ],
    exact=False,
)
BY_FUNCTION[torch.instance_norm] = [
    S(r(2, 3, 5), r(3), r(3), None, None, True, 0.1, 1e-5, False),
    S(r(2, 3, 5), None, None, None, None, True, 0.1, 1e-5, False),
]
row(
    "_weight_norm",
    [
        S(r(6, 4), r(6, 1)),
        S(r(3, 4, 5), r(1, 4, 1), 1),
        S(r(1, 5), r(1, 1)),
        S(r(4, 3), torch.tensor(2.0), -1),
        S(r(3, 4, dtype=f64), r(3, 1, dtype=f64)),
    ],
    exact=False,
)
for _function, _name in ((torch.layer_norm, "layer_norm"), (torch.group_norm, "group_norm")):
    BY_FUNCTION[_function] = list(ROWS[_name])

# --- lists of tensors --------------------------------------------------------------------------


def pair(**kinds: object) -> list[torch.Tensor]:
    return [r(3, 4, low=0.2, **kinds), r(5, low=0.2, **kinds)]


_unary = """
    abs cos erf exp expm1 floor lgamma log log10 log1p log2 neg reciprocal rsqrt sigmoid sign sin
    sqrt tanh trunc
"""
for _name in _unary.split():
    row(f"_foreach_{_name} _foreach_{_name}_", [S(pair()), S(pair(dtype=bf16))], exact=False)
row("_foreach_zero_ _foreach_clone", [S(pair())])
row("_foreach_max", [S(pair())])
row("_foreach_norm", [S(pair()), S(pair(), 1), S(pair(), ord=inf)], exact=False)
row("_foreach_copy_", [S(pair(), pair()), S(pair(), pair(dtype=f64))])
_numbers = [S(pair(), 0.3), S(pair(), 2), S(pair(), [0.3, 2.0]), S(pair(), pair())]
row(
    "_foreach_add _foreach_add_ _foreach_sub _foreach_sub_",
    [*_numbers, S(pair(), pair(), alpha=0.1), S(pair(), pair()[:1])],
    exact=False,
)
row(
    "_foreach_mul _foreach_mul_ _foreach_div _foreach_div_",
    [*_numbers, S(pair(), torch.tensor(3))],
    exact=False,
)
row("_foreach_pow _foreach_pow_", [*_numbers], exact=False)
row(
    "_foreach_maximum _foreach_maximum_ _foreach_minimum _foreach_minimum_"
    " _foreach_clamp_max _foreach_clamp_max_ _foreach_clamp_min _foreach_clamp_min_",
    _numbers,
)
row(
    "_foreach_lerp _foreach_lerp_",
    [S(pair(), pair(), 0.3), S(pair(), pair(), pair()), S(pair(), pair(), [0.1, 0.7])],
    exact=False,
)
row(
    "_foreach_addcmul _foreach_addcmul_ _foreach_addcdiv _foreach_addcdiv_",
    [
        S(pair(), pair(), pair()),
        S(pair(), pair(), pair(), 0.3),
        S(pair(), pair(), pair(), value=-0.3),
        S(pair(), pair(), pair(), [0.3, 0.4]),
    ],
    exact=False,
)
row("_foreach_mm", [S([r(3, 4), r(2, 5)], [r(4, 2), r(5, 1)])], exact=False)

# The Python functions of torch.nn.functional take `inplace` too.
for _name in (
    "silu",
    "mish",
    "hardsigmoid",
    "hardswish",
    "relu6",
    "selu",
    "elu",
    "celu",
    "hardtanh",
):
    _function = getattr(functional, _name)
    BY_FUNCTION[_function] = ROWS[_name] + inplace(ROWS[_name])
BY_FUNCTION[functional.leaky_relu] = ROWS["leaky_relu"] + inplace(ROWS["leaky_relu"])

NAMES = set(ROWS) - _before


def is_nn(function: Callable) -> bool:
    """Whether the samples of a function stand in this file."""
    return bare_name(function) in NAMES
