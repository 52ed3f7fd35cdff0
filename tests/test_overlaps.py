"""Calls that write to memory which they also read: what eager raises we raise, what it leaves open
is refused, and all the others are equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tracejit
from tracejit.errors import UnsupportedOperation

INDEX, ZEROS = torch.arange(5), torch.zeros(5, 5, dtype=torch.int64)
# a tensor of memory, and what is read of it: dense or not, a part of it, the same, another
READ: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "the same": lambda x: x.view(5, 5),
    "transposed": lambda x: x.t(),
    "a row": lambda x: x[0],
    "a row of two axes": lambda x: x[1:2],
    "a column": lambda x: x[:, :1],
    "an expanded row": lambda x: x[0].expand(5, 5),
    "an element": lambda x: x[0, 0],
    "diagonal": lambda x: x.diagonal(),
}
# writes to x, reading y of the same memory; z has memory of its own
IN_PLACE: dict[str, Callable] = {
    "add": lambda x, y, z: x.add_(y),
    "+=": lambda x, y, z: x.__iadd__(y),
    "by name": lambda x, y, z: x.sub_(other=y),
    "mul": lambda x, y, z: x.mul_(y),
    "pow": lambda x, y, z: x.abs_().pow_(y),
    "atan2": lambda x, y, z: x.atan2_(y),
    "eq": lambda x, y, z: x.eq_(y),
    "clamp": lambda x, y, z: x.clamp_(min=y),
    "addcmul": lambda x, y, z: x.addcmul_(z, y),
    "lerp": lambda x, y, z: x.lerp_(y, 0.5),
    "lerp by": lambda x, y, z: x.lerp_(z, y),
    "copy": lambda x, y, z: x.copy_(y),
    "x[:] =": lambda x, y, z: x.__setitem__(slice(None), y),
    "x[i] =": lambda x, y, z: x.__setitem__(INDEX, y),
    "x[mask] =": lambda x, y, z: x.__setitem__(z > 0, y if y.numel() == 1 else 0.5),
    "x[mask of rows] =": lambda x, y, z: x.__setitem__(z[0] > -9, y),
    "index_put": lambda x, y, z: x.index_put_((INDEX,), y),
    "index_copy": lambda x, y, z: x.index_copy_(0, INDEX, y),
    "index_add": lambda x, y, z: x.index_add_(0, INDEX, y),
    "scatter": lambda x, y, z: x.scatter_(0, ZEROS, y),
    "scatter_add": lambda x, y, z: x.scatter_add_(0, ZEROS, y),
    "masked_fill": lambda x, y, z: x.masked_fill_(z > 0, y if not y.ndim else 0.5),
    "index_fill": lambda x, y, z: x.index_fill_(0, INDEX[:2], y if not y.ndim else 0.5),
    "masked_scatter": lambda x, y, z: x.masked_scatter_(z > 0, y),
    "fill": lambda x, y, z: x.fill_(y),
    "addmm": lambda x, y, z: x.addmm_(y, z),
    "addr": lambda x, y, z: x.addr_(y, z[0]),
    "foreach add": lambda x, y, z: torch._foreach_add_([x], [y]),
    "foreach copy": lambda x, y, z: torch._foreach_copy_([x], [y]),
    "rows": lambda x, y, z: x[1:].add_(x[:-1]),
    "halves": lambda x, y, z: x[:, :2].add_(x[:, 3:]),
    "columns": lambda x, y, z: x[:, :3].add_(x[:, 2:]),
    "row by row": lambda x, y, z: x[0].add_(x[1]),
    "one row": lambda x, y, z: x[:1].add_(x[0]),
    "odd and even": lambda x, y, z: x[:, ::2].mul_(x[:, 1::2][:, :1]),
}
OUT: dict[str, Callable] = {
    "add": lambda x, y, z: torch.add(y, z, out=x),
    "exp": lambda x, y, z: torch.exp(y, out=x),
    "clamp": lambda x, y, z: torch.clamp(y, 0.0, 1.0, out=x),
    "where": lambda x, y, z: torch.where(z > 0, y, z, out=x),
    "lt": lambda x, y, z: torch.lt(y, z, out=x),
    "mm": lambda x, y, z: torch.mm(y, z, out=x),
    "sum": lambda x, y, z: torch.sum(y, 0, out=x[4]),
    "gather": lambda x, y, z: torch.gather(y, 0, ZEROS, out=x),
    "index_select": lambda x, y, z: torch.index_select(y, 0, INDEX, out=x),
    "cat": lambda x, y, z: torch.cat([y], out=x),
    "tril": lambda x, y, z: torch.tril(y, out=x),
    "softmax": lambda x, y, z: torch.softmax(y, 0, out=x),
}
CALLS = [(f"{name}", f) for name, f in IN_PLACE.items()]
CALLS += [(f"{name}, out=", f) for name, f in OUT.items()]


def made() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(5, 5, generator=generator), torch.randn(5, 5, generator=generator)


def outcome(step: Callable) -> tuple[torch.Tensor, type | None]:
    x, z = made()
    try:
        step(x, z)
    except UnsupportedOperation:
        raise
    except Exception as error:
        return x, next(c for c in type(error).__mro__ if c.__module__ == "builtins")
    return x, None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", [f for _, f in CALLS], ids=[name for name, _ in CALLS])
def test_a_call_that_reads_what_it_writes(call: Callable):
    """For each operand: an error of eager's class, equal to what eager gives of a copy, or refused;
    refused only where eager itself gives something else than of a copy, or out= has no rule."""
    for what, read in READ.items():

        def step(x, z, read=read):
            call(x, read(x), z)

        def of_a_copy(x, z, read=read):
            call(x, read(x).clone(), z)

        eager, error = outcome(step)
        try:
            ours, raised = outcome(tracejit.compile(step, backend="numpy"))
        except UnsupportedOperation as refusal:
            reasons = ("elements that it also reads", "out= has", "has no rule", "rule for")
            assert any(reason in str(refusal) for reason in reasons), (what, refusal)
            continue
        wrong = error is not None and outcome(of_a_copy)[1] is not None  # of a copy too
        assert (raised and error) if wrong else raised is error, (what, raised, error)
        if error is None:
            torch.testing.assert_close(ours, eager, msg=what)


def test_halves_of_a_tensor_are_not_taken_for_one():
    """Columns lie between each other in memory, and share none of it."""

    @tracejit.compile(backend="numpy")
    def step(x):
        x[:, :2] += x[:, 2:4]
        x[:, ::2].mul_(x[:, 1::2])

    x = torch.arange(24.0).view(4, 6)
    expected = x.clone()
    expected[:, :2] += expected[:, 2:4].clone()
    expected[:, ::2] *= expected[:, 1::2].clone()
    step(x)
    assert torch.equal(x, expected)
