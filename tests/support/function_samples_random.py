"""Samples of functions that draw random numbers, which are compared to the bit.

`outcome` in `function_checks.py` seeds torch's generator before each call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from support.function_samples import (
    BY_FUNCTION,
    ROWS,
    S,
    Sample,
    bare_name,
    bf16,
    f16,
    f64,
    i8,
    i32,
    i64,
    no,
    r,
    restart,
    row,
    u8,
    v,
)

functional, init = torch.nn.functional, torch.nn.init
restart()
_before = set(ROWS)


def targets(*args: object, **kwargs: object) -> list[Sample]:
    """Arguments for tensors of every layout: from 16 elements on, a contiguous one is filled in
    another way than others."""
    tensors = [
        r(5),
        r(),
        r(0),
        r(3, 7),
        r(41),
        r(4, 9).t(),
        r(5, 8)[:, 1:4],
        r(6, 5)[::2],
        r(64, 3),
    ]
    tensors += [r(2, 3, 5, 7).permute(0, 2, 3, 1), r(3, 1).expand(3, 4)]
    return [S(x, *args, **kwargs) for x in tensors]


def dtypes(*args: object, shapes: tuple = ((5,), (7, 5)), **kwargs: object) -> list[Sample]:
    """Arguments for tensors of the other floating-point dtypes."""
    return [S(r(*s, dtype=d), *args, **kwargs) for d in (f64, f16, bf16) for s in shapes]


row("uniform_", targets() + dtypes(-1.5, 2.0) + [S(r(5), to=3.0), S(r(5), 2.0, 1.0)])
row("normal_", targets() + dtypes(0.5, 2.0) + [S(r(5), std=3.0), S(r(17), 1), S(r(5), 0.0, -1.0)])
row("exponential_", targets() + dtypes(0.5) + [S(r(5), lambd=2.0), S(r(5), -1.0)])
row("log_normal_", targets() + dtypes(0.5, 2.0) + [S(r(5), std=0.5)])
row("cauchy_", targets() + dtypes(0.5, 2.0) + [S(r(5), sigma=0.5)])
row("geometric_", targets(0.3) + dtypes(0.7) + [S(r(5), p=0.5), S(r(5)), S(r(5), 1.5)])
_integers = [S(torch.empty(5, 3, dtype=d)) for d in (i64, i32, i8, u8)]
row(
    "random_",
    targets()
    + dtypes()
    + targets(7)
    + _integers
    + [S(s.args[0], -5 if s.args[0].dtype is not u8 else 3, 9) for s in _integers]
    + [S(r(5), to=4), S(r(5), **{"from": 2, "to": 9}), S(r(5), 4, 4)],
)
_chances = [r(5, low=0.0, high=1.0), r(3, 7, low=0.0, high=1.0), r(4, 6, low=0.0, high=1.0).t()]
row(
    "bernoulli_",
    targets()
    + targets(0.8)
    + dtypes(p=0.25)
    + [S(r(4, 5), _chances[0]), S(r(4, 5), r(4, 1, dtype=f64, low=0.0, high=1.0))]
    + [S(r(5, dtype=bf16), _chances[0]), S(torch.empty(5, dtype=i64), 0.5)]
    + [S(r(5), v(0.0, 1.0, 0.5, 1.0, 0.0)), S(r(5), 1.5), S(r(5), v(0.5, 2.0, 0.5, 0.1, 0.1))]
    + [S(r(5), _chances[1]), S(torch.empty(5, dtype=torch.bool), 0.5)],
)
row(
    "bernoulli",
    [S(x) for x in _chances]
    + [S(r(2, 5), 0.3), S(r(5), p=0.3), S(v(0.0, 1.0, 0.5)), S(v(-0.1)), S(v(float("nan")))]
    + [S(r(9, 3, dtype=d, low=0.0, high=1.0)) for d in (f64, f16, bf16)],
)
_sizes = [S(3, 5), S((17, 3)), S(()), S(0), S(5, dtype=f64), S(size=(2, 9)), S(21, dtype=bf16)]
row("rand randn", [*_sizes, S(7, requires_grad=True), S(5, dtype=f16), S(-1), S(5, dtype=i64)])
_like = [S(r(5)), S(r(4, 9).t()), S(r(6, 5)[::2, 1:3]), S(r(5), dtype=f64), S(r(19, dtype=bf16))]
_like += [S(r(3, 1).expand(3, 4)), S(r(3, 4).t(), memory_format=torch.contiguous_format)]
row("rand_like randn_like", _like)
row(
    "randint",
    [S(3, (5,)), S(-2, 9, (3, 7)), S(low=1, high=4, size=(5,)), S(7, (5,), dtype=f64)]
    + [S(1 << 40, (5,)), S(200, (9,), dtype=u8), S(3, 3, (5,)), S(high=5, size=(2, 3)), S(9, ())],
)
row(
    "randint_like",
    [S(r(5), 9), S(r(4, 3).t(), -4, 9), S(r(5), high=7), S(r(5, dtype=i64), 5, dtype=i32)],
)
row("randperm", [S(9), S(1), S(0), S(40), S(9, dtype=i32), S(9, dtype=f64), S(n=5)])
_deviations = [r(5, low=0.1), r(4, 5, low=0.0), r(5, dtype=f64, low=0.5)]
row(
    "normal",
    [S(r(5), _deviations[0]), S(r(5), _deviations[1]), S(r(5, 1), _deviations[0])]
    + [S(r(17), 2.0), S(r(5)), S(0.5, r(33, low=0.1)), S(std=_deviations[1]), S(r(4, 9).t(), 1.0)]
    + [S(0.5, 2.0, (5,)), S(0.0, 1.0, size=(3, 7)), S(r(5, dtype=f64), _deviations[2])]
    + [S(r(5, dtype=bf16), r(5, dtype=bf16, low=0.5)), S(r(5), v(1, 1, -1, 1, 1))],
    exact=False,
)
_weights = [r(5, low=0.0), r(3, 7, low=0.0), r(7, 3, low=0.0).t(), r(5, dtype=f64, low=0.1)]
row(
    "multinomial",
    [S(x, 1) for x in _weights]
    + [S(x, 3) for x in _weights]
    + [S(x, 9, True) for x in _weights]
    + [S(_weights[0], num_samples=1, replacement=True), S(v(0.0, 0.0), 1), S(v(-1.0, 2.0), 1)]
    + [S(v(0.0, 0.0, 1.0, 0.0), 1), S(_weights[0], 6), S(_weights[0], 0), S(r(2, 2, 2), 1)],
)
row("poisson", [S(r(5, low=0.0, high=9.0)), S(r(3, 7, low=0.0)), S(r(5, dtype=f64, low=0.0))])
row("_standard_gamma", [S(r(5, low=0.1)), S(r(3, 7, low=0.5))])
row(
    "_sample_dirichlet",
    [S(r(5, low=0.1)), S(r(3, 7, low=0.5)), S(r(2, 4, 3, dtype=f64, low=0.1).transpose(0, 1))],
)
row(
    "binomial",
    [
        S(r(5, low=0.0, high=9.0).round(), r(5, low=0.0, high=1.0)),
        S(r(3, 1, low=0.0, high=30.0).round(), r(4, low=0.1, high=0.9)),
        S(
            r(3, 4, dtype=f64, low=0.0, high=50.0).round().t(),
            r(4, 3, dtype=f64, low=0.0, high=1.0),
        ),
        # what eager refuses
        S(r(5, low=0.0), r(5, low=0.0, high=1.0).double()),
        S(r(5, low=0.0), r(4, low=0.0, high=1.0)),
        S(torch.arange(5), r(5, low=0.0, high=1.0)),
    ],
)
_rectified = [S(x, training=True) for x in (r(5), r(3, 7), r(0), r(5, dtype=f64))]
_rectified += [
    no(r(5, dtype=bf16), training=True),
    S(r(3, 7), 0.1, 0.9, True),
    S(r(5)),
    S(r(5), 0.2, 0.4, False),
]
row("rrelu rrelu_", _rectified)
BY_FUNCTION[functional.rrelu] = _rectified + [S(r(5), training=True, inplace=True)]
row(
    "gumbel_softmax",
    [S(r(3, 7), smooth=True), S(r(5), tau=0.5, smooth=True), S(r(3, 5), hard=True, smooth=True)]
    + [S(r(4, 3, 5), 2.0, dim=1, smooth=True), S(r(7, 3).t(), 0.7), S(r(5, dtype=f64))],
    exact=False,
)
row("constant_", [S(r(3, 5), 2.5), S(r(5, 3).t(), 0.0)])
row(
    "kaiming_uniform_",
    [S(r(3, 5)), S(r(9, 7), a=0.5), S(r(2, 3, 5), mode="fan_out", nonlinearity="relu"), S(r(5))],
)
BY_FUNCTION[init.uniform_] = [S(r(3, 5)), S(r(3, 9).t(), -1.0, 2.0), S(r(41), b=0.5)]
BY_FUNCTION[init.normal_] = [S(r(3, 5)), S(r(3, 9).t(), 1.0, 2.0), S(r(41), std=0.02)]

# ---- dropout

_dropped = [
    *(S(x, 0.3, True) for x in (r(5), r(3, 7), r(2, 3, 5, 7), r(0), r(2, 3, 4, 5, 3))),
    *(S(x, p, True) for x in (r(7, 5), r(3, 9, 5)) for p in (0.0, 1.0, 0.5, 0.99, -0.1, 1.1)),
    *(S(x, 0.2, True) for x in (r(4, 9).t(), r(2, 3, 5, 7).permute(0, 2, 3, 1))),
    *(S(x, 0.4, True) for x in (r(6, 5)[::2, 1:4], r(3, 1).expand(3, 4))),
    *(S(r(9, 5, dtype=d), 0.3, True) for d in (f64, f16, bf16)),
    S(r(2, 3, 4, 5), 0.5, False),
    S(v(float("nan"), float("inf"), -1.0, -0.0, 5.0), 0.5, True),
]
_whole = "dropout alpha_dropout dropout_ alpha_dropout_"
_dropped = [replace(s, smooth=True) for s in _dropped]
row(_whole, [*_dropped, no(torch.arange(5), 0.5, True)])
_features = [s for s in _dropped if s.args[0].dim() > 1]
row("feature_dropout feature_alpha_dropout feature_dropout_ feature_alpha_dropout_", _features)
row("dropout1d dropout2d dropout3d", [*_features, S(r(5), 0.5, True)])
for _name in (*["dropout", "alpha_dropout", "feature_alpha_dropout"], "dropout1d", "dropout2d"):
    _more = [S(s.args[0].clone(), p=0.4, training=True, inplace=True) for s in _features]
    BY_FUNCTION[getattr(functional, _name)] = ROWS[_name] + _more + [S(r(5, 3))]
BY_FUNCTION[functional.dropout3d] = ROWS["dropout3d"] + [S(r(3, 2, 5, 1), inplace=True)]

NAMES = set(ROWS) - _before


def draws(function: Callable) -> bool:
    """Whether the samples of a function stand in this file."""
    return bare_name(function) in NAMES
