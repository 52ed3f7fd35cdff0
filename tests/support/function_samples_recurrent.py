"""Samples of recurrent cells and sequences; importing this adds them to the table."""

from __future__ import annotations

from collections.abc import Callable

import torch

from support.function_samples import (
    S,
    Sample,
    bf16,
    f16,
    f64,
    i64,
    inf,
    nan,
    no,
    r,
    restart,
    row,
    v,
)

restart()

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
Tensors = list[torch.Tensor]


def w(*shape: int, low: float = -0.5, **kind) -> torch.Tensor:
    """Parameters as the modules have them: with larger ones rounding grows from step to step."""
    return r(*shape, low=low, high=0.5, **kind)


def cell(gates: int, *, rows: int = 3, x: int = 5, h: int = 4, bias: bool = True, **kind) -> tuple:
    """The arguments of a cell: an input [rows, x], state(s) [rows, h], the parameters."""
    hidden = r(rows, h, **kind)
    params = [w(gates * h, x, **kind), w(gates * h, h, **kind)]
    params += [w(gates * h, **kind), w(gates * h, **kind)] if bias else []
    return r(rows, x, **kind), (hidden, r(rows, h, **kind)) if gates == 4 else hidden, *params


def states(hx: object, change: Callable) -> object:
    """The state, or both of lstm, changed."""
    return tuple(map(change, hx)) if isinstance(hx, tuple) else change(hx)


def cells(gates: int) -> list[Sample]:
    input, hx, *params = cell(gates)
    bare = cell(gates, bias=False)
    return [
        S(input, hx, *params, smooth=True),
        S(*cell(gates, dtype=f64), smooth=True),
        S(*bare, smooth=True),
        S(*bare, None, r(gates * 4)),
        S(*bare, b_ih=r(gates * 4)),
        S(*cell(gates, rows=1, x=3, h=1)),
        S(*cell(gates, rows=1, x=7, h=3)),
        S(*cell(gates, rows=0)),
        S(*cell(gates, rows=33, x=9, h=11)),
        S(*cell(gates, dtype=bf16)),
        S(*cell(gates, dtype=f16, bias=False)),
        S(r(5, 3).t(), states(hx, lambda x: r(4, 3).t()), w(5, gates * 4).t(), *params[1:]),
        S(r(1, 5).expand(3, 5), states(hx, lambda x: r(6, 8)[::2, 1:5]), *params),
        S(v(nan, inf, -inf, 0, 1).expand(3, 5), hx, *params),
        S(input, states(hx, lambda x: r(2, 4)), *params),
        S(input, states(hx, lambda x: r(1, 4)), *params),
        S(input, states(hx, lambda x: r(3, 3)), *params),
        S(r(3, 6), hx, *params),
        S(r(5), states(hx, lambda x: r(4)), *params),
        S(input, hx, *params[:2], r(3), params[3]),
        S(r(3, 5), hx, r(4 * gates + 1, 5), r(4 * gates + 1, 4)),
        S(input, hx, *params[:2], params[2].double(), params[3]),
        S(input, states(hx, lambda x: r(3, 4, dtype=f64)), *params),
        S(*cell(gates, dtype=i64)),
    ]


def sequence(
    gates: int,
    *,
    steps: int = 3,
    rows: int = 2,
    x: int = 5,
    h: int = 4,
    layers: int = 1,
    bias: bool = True,
    both: bool = False,
    first: bool = False,
    projected: int = 0,
    dropout: float = 0.0,
    train: bool = True,
    **kind,
) -> tuple:
    """The arguments of a sequence, as the modules give them: `first` is batch_first."""
    directions, out = 1 + both, projected or h
    params: Tensors = []
    for k in range(layers * directions):
        features = x if k < directions else out * directions
        params += [w(gates * h, features, **kind), w(gates * h, out, **kind)]
        params += [w(gates * h, **kind), w(gates * h, **kind)] if bias else []
        params += [w(projected, h, **kind)] if projected else []
    hidden = r(layers * directions, rows, out, **kind)
    hx = (hidden, r(layers * directions, rows, h, **kind)) if gates == 4 else hidden
    input = r(*((rows, steps) if first else (steps, rows)), x, **kind)
    return input, hx, params, bias, layers, dropout, train, both, first


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return r(*x.mT.shape, dtype=x.dtype).mT


def sequences(gates: int, **narrow: float) -> list[Sample]:
    # In float64: eager's float32 lstm does not look at shapes, and writes outside of its memory.
    input, hx, params, *rest = sequence(gates, dtype=f64)
    deep = {"layers": 2, "both": True}
    batches = torch.tensor([2, 2, 1])
    found = [
        S(*sequence(gates, dtype=f64), smooth=True),
        S(*sequence(gates, dtype=f64, bias=False, first=True, **deep), smooth=True),
        S(*sequence(gates)),
        S(*sequence(gates, bias=False)),
        S(*sequence(gates, both=True, steps=5)),
        S(*sequence(gates, layers=3)),
        S(*sequence(gates, **deep)),
        S(*sequence(gates, first=True, rows=3, steps=5, **deep)),
        S(*sequence(gates, steps=1, rows=1, x=1, h=1)),
        S(*sequence(gates, steps=1, rows=7, **deep)),
        S(*sequence(gates, rows=1, first=True)),
        S(*sequence(gates, rows=0, **deep)),
        S(*sequence(gates, dtype=bf16, **narrow)),
        S(*sequence(gates, dtype=f16, bias=False, **narrow)),
        S(r(5, 2, 3, dtype=f64).permute(2, 1, 0), hx, params, *rest),
        S(r(1, 2, 5, dtype=f64).expand(3, 2, 5), states(hx, _transposed), params, *rest),
        S(input, hx, [w(5, 4 * gates, dtype=f64).t(), *params[1:]], *rest),
        S(*sequence(gates, dropout=0.5, train=False, **deep)),
        S(*sequence(gates, dropout=0.5)),
        S(*sequence(gates, steps=0)),
        S(r(3, 2, 6, dtype=f64), hx, params, *rest),
        S(input, states(hx, lambda x: r(1, 3, 4, dtype=f64)), params, *rest),
        S(input, hx, params[:3], *rest),
        S(input, hx, [], *rest),
        S(input, hx, params * 2, *rest),
        S(input, hx, params, True, 2, *rest[2:]),
        S(input, states(hx, lambda x: r(1, 2, 4)), params, *rest),
        S(*sequence(gates, dtype=i64)),
        S(*sequence(gates, dropout=0.5, **deep)),
        S(*sequence(gates, dropout=1.0, layers=2)),
        S(r(5, 5, dtype=f64), batches, hx, params, *rest[:-1], smooth=True),
        S(r(4, 5, dtype=f64), batches, hx, params, *rest[:-1]),
    ]
    for k, wrong in ((0, (3, 5)), (1, (4 * gates, 3)), (1, (3, 4)), (2, (3,)), (3, (3,))):
        found.append(S(input, hx, [*params[:k], w(*wrong, dtype=f64), *params[k + 1 :]], *rest))
    found.append(S(input, hx, [params[0], params[1].float(), *params[2:]], *rest))
    flat = r(3, 5, dtype=f64), hx, params, *rest
    found.append(S(*flat) if gates == 3 else no(*flat))  # the others take it as it comes
    if gates == 4:
        found += [
            S(*sequence(4, projected=3, dtype=f64), smooth=True),
            S(*sequence(4, projected=3, first=True, **deep)),
            S(*sequence(4, projected=1, bias=False, rows=5)),
            S(input, hx[:1], params, *rest),
        ]
    return found


for _name, _gates in GATES.items():
    row(f"{_name}_cell", cells(_gates), exact=False)
    _narrow = {"low": 0.1} if _name == "rnn_relu" else {}  # rounding decides at the kink
    row(_name, sequences(_gates, **_narrow), exact=False)
row("_pack_padded_sequence", [no(r(3, 2, 5), torch.tensor([3, 1]), False)])
_sizes = torch.tensor([3, 2, 1, 1])
row(
    "_pad_packed_sequence",
    [
        S(r(7, 5), _sizes, False, 0.0, 4, smooth=True),
        S(r(7, 2, 3), _sizes, True, -1.5, 6),
        S(r(7, dtype=i64), _sizes, False, 2, -1),
        S(r(7, 1, dtype=bf16), _sizes, True, inf, 4),
        S(r(1, 5), torch.tensor([1]), False, 0.0, 1),
        S(r(7, 5), _sizes, False, 0.0, 3),
        S(r(6, 5), _sizes, False, 0.0, 4),
    ],
)
row(
    "pad_sequence",
    [
        S([r(2, 5), r(4, 5), r(1, 5)], smooth=True),
        S([r(2, 5), r(0, 5)], True, 1.5),
        S([r(3), r(1), r(2)], padding_side="left", padding_value=nan),
        S([r(2, 3, dtype=bf16), r(1, 3)], True),
        S([r(3, dtype=i64), r(2)], False, 7),
        S([r(3, 2), r(2, 1)]),
        S([r(3, 2), r(2, 4)]),
        S([]),
    ],
)
