"""Capture against eager: functionalization, what a step returns and keeps, modes, metadata.

A step is run by eager and through the oracle on equal arguments; results, arguments, `.grad`,
layouts and sharing of memory must be equal afterwards.
"""

from __future__ import annotations

import copy
import operator
import threading
from collections import namedtuple

import pytest
import torch

from support.capture_checks import leaf, randn, same
from support.oracle import call, captured_of
from tracejit.errors import LeakedTracer, SideEffectError, TracejitError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of eager

FILE = __file__
Pair = namedtuple("Pair", "first second")


# --- views and writes --------------------------------------------------------------------------

X = randn(4, 6)


def _write_rows(x):
    x[::2] = 1.0
    x[1:, 3:].mul_(2.0)


def _write_through_views(x):
    v = x.t()[1:5].view(4, 2, 2) if False else x.t()[1:5]
    v[::2].add_(1.0)
    v.t()[0] = 5.0


def _write_reshaped(x):
    x.view(2, 2, 6)[1, :, ::3] = -1.0
    x.reshape(24)[5:9].zero_()
    x.unsqueeze(0).select(1, 2).fill_(9.0)
    x.flatten()[-1:].sub_(3.0)


def _write_permuted(x):
    y = x.view(2, 2, 3, 2).permute(3, 1, 0, 2)
    y[1].mul_(0.5)
    y.transpose(0, 2)[1, :, 0] += 1.0
    return y


def _views_see_writes(x):
    a, b = x[1], x.t()
    x.add_(1.0)
    first = a.sum()
    b[0].zero_()
    return a, b, first, a.sum(), x[1, 0]


def _two_names(x):
    y = x
    y += 1
    z = y[0]
    z *= 2
    return x is y, z


def _clone_keeps(x):
    y = x.clone()
    x.zero_()
    return y, x + y


def _data_and_detach(x):
    x.data.add_(1.0)
    d = x.detach()
    d[0] = 3.0
    return d, x.data


def _masked(x):
    x[x > 0.5] = 0.0
    x[torch.ones_like(x[:, 0]) > x[:, 0]] = -1.0
    y = x.clone()
    y[y < 0] = 2.0
    return y


def _swap_rows(x):
    first = x[0].clone()
    x[0] = x[1]
    x[1] = first


def _overlapping_source(x):
    x[1:].copy_(x[:-1].clone())
    x[:, 1:] += x[:, :-1].clone()


def _iadd_spellings(x):
    x[0] += 1
    x[1] -= 2.0
    x[2] *= x[0]
    x[3] /= 3
    x[:, 0] //= 1
    x[..., 1] **= 2
    x[:, ::2] %= 1.5


def _out(x):
    double = torch.mul(x, 2, out=torch.empty_like(x, dtype=torch.float64))
    kept = torch.maximum(x, -x, out=x)
    torch.sub(x[1:], 1.0, out=x[1:])
    return double, kept is x


def _chunks(x):
    for i, row in enumerate(x):
        row.mul_(i)
    a, b = x.t().unbind(0)[:2]
    a += b
    return len(x), a


def _expanded(x):
    row = x[:1].expand(4, 6)
    x[0, 0] = 7.0
    return row + 0.0, row


def _diagonal_steps(x):
    x[1::2][:, 1::2][..., None].squeeze(-1).zero_()
    x[slice(3, None)][-1][-1] = 8.0


def _out_of_several(x):
    pair = torch.empty(4), torch.empty(4, dtype=torch.int64)
    largest = torch.max(x, 1, out=pair)
    least, most = torch.empty(()), torch.empty(())
    torch.aminmax(x, out=(least, most))
    torch.sort(x, 0, out=(x, torch.empty(4, 6, dtype=torch.int64)))
    return largest[0] is pair[0], largest.indices, pair, least, most


@pytest.mark.parametrize(
    "step",
    [
        _out_of_several,
        _write_rows,
        _write_through_views,
        _write_reshaped,
        _write_permuted,
        _views_see_writes,
        _two_names,
        _clone_keeps,
        _data_and_detach,
        _masked,
        _swap_rows,
        _overlapping_source,
        _iadd_spellings,
        _out,
        _chunks,
        _expanded,
        _diagonal_steps,
    ],
)
@pytest.mark.parametrize(
    "x", [X, randn(6, 4).t(), randn(8, 12)[::2, ::2]], ids=["rows", "t", "steps"]
)
@pytest.mark.sweep(0.34)
def test_writes(step, x):
    try:
        step(copy.deepcopy(x))
    except RuntimeError as error:
        with pytest.raises(type(error)):
            call(step, copy.deepcopy(x))
        return
    same(step, x, calls=2)


def test_the_same_tensor_twice():
    def step(x, y):
        x.add_(1.0)
        return y * 2

    x = randn(3)
    same(step, x, x)


def test_aliases_made_outside():
    base = randn(3, 4)

    def step(a, b):
        a.mul_(2.0)
        b[0] = 1.0
        return a + b

    same(step, base, base.detach())


def test_aliases_of_a_parameter():
    w = torch.nn.Parameter(randn(3))

    def step(w, data):
        loss = (w * w).sum()
        loss.backward()
        data -= 0.1 * w.grad
        return loss.detach()

    same(step, w, w.data, calls=3)


# --- what a step returns -----------------------------------------------------------------------


def test_returned_structures():
    def step(x):
        y = x * 2
        return {"a": [y, y], "b": Pair(y, 3), "c": (y.t(), None, "s"), "d": {}, 4: x, "e": x[0]}

    found = same(step, randn(2, 3))
    assert found["a"][0] is found["a"][1] is found["b"].first


def test_returned_views_share_memory():
    def step(x):
        y = x + 1
        return y, y[0], y.t(), y.detach(), y[1:, ::2], x.view(-1), x.data, y.view(3, 2)

    same(step, randn(2, 3))


def test_returned_layouts():
    def step(x):
        return x.t() * 2, x.t().contiguous(), x.expand(3, 2, 3), (x.t() + x.t()).clone(), x.sum()

    same(step, randn(2, 3))


@pytest.mark.parametrize("x", [randn(2), leaf(2)])
def test_returned_inputs(x):
    same(lambda x: (x + 1, x), x)


def test_returned_requires_grad():
    def step(w, x):
        with torch.no_grad():
            quiet = w * 2
        return w * x, quiet, w.detach(), x * 2

    w, x = leaf(2), randn(2)
    found = same(step, w, x)
    assert found[0].grad_fn is not None and found[1].grad_fn is None
    found[0].sum().backward()


def test_returned_leaves():
    def step(x):
        made = torch.zeros(2, requires_grad=True)
        (made * x).sum().backward()
        return made, made.grad

    found = same(step, randn(2))
    assert found[0].grad is found[1]


def test_an_untouched_input_is_returned():
    same(lambda x, y: (y, x + 1), randn(2), leaf(3))


def test_nothing_returned():
    assert same(lambda x: None, randn(2)) is None


# --- effects on Python objects -----------------------------------------------------------------


def test_intermediates_kept_outside_become_real():
    class Box:
        pass

    kept, box = [], Box()

    def step(x):
        y = x * 2
        kept.append(y)
        box.last = y[0]
        return y + 1

    x = randn(3)
    call(step, x)
    assert type(kept[0]) is torch.Tensor and type(box.last) is torch.Tensor
    torch.testing.assert_close(kept[0], x * 2)
    torch.testing.assert_close(box.last * 1, (x * 2)[0])


def test_an_intermediate_is_useless_after_a_failed_trace():
    def step(x):
        raise KeyError(x * 2)

    with pytest.raises(KeyError) as caught:
        call(step, randn(3))
    kept = caught.value.args
    with pytest.raises(LeakedTracer):
        kept[0] + 1
    with pytest.raises(LeakedTracer):
        captured_of(lambda: kept[0] + 1)


# --- modes, threads ----------------------------------------------------------------------------


def test_modes_are_restored_after_an_exception():
    def step(x):
        torch.set_grad_enabled(False)
        raise KeyError

    with pytest.raises(KeyError):
        call(step, randn(2))
    assert torch.is_grad_enabled()
    assert torch.overrides._get_current_function_mode_stack() == []


def test_leaving_grad_mode_changed_is_refused():
    def step(x):
        torch.set_grad_enabled(False)
        return x * 2

    with pytest.raises(SideEffectError):
        call(step, randn(2))
    assert torch.is_grad_enabled()


def test_two_threads_trace_at_once():
    failures = []

    def work(k: int) -> None:
        def step(w, x):
            h = w * x
            for _ in range(k):
                h = h.tanh() * 2 + w
            h.sum().backward()
            return h

        try:
            for _ in range(10):
                same(step, leaf(3), randn(3))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in (3, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


# --- what tensors say of themselves ------------------------------------------------------------


def _metadata(x):
    y = x.t()
    return (
        [tuple(x.shape), y.size(), y.size(0), y.stride(), y.stride(-1), y.dim(), y.ndim, len(y)],
        [y.numel(), y.nelement(), torch.numel(y), y.dtype, y.device, y.layout, y.is_cuda, y.is_cpu],
        [y.is_contiguous(), x.is_contiguous(), y.element_size(), y.itemsize, y.nbytes],
        [x[1:].storage_offset(), x.is_floating_point(), torch.is_floating_point(y), x.is_leaf],
        [x.is_same_size(y), x.requires_grad, x.grad is None, x.grad_fn is None, y.is_complex()],
        [torch.is_complex(x), x.is_sparse, x.is_quantized, x.is_nested, x.is_meta, x.is_conj()],
        [
            x.is_neg(),
            x.is_inference(),
            x.is_mkldnn,
            x.is_sparse_csr,
            torch.is_conj(x),
            x.ndimension(),
        ],
        [torch.result_type(x, 1.0), torch.is_neg(x), torch.is_inference(x), torch.is_tensor(x)],
        [torch.promote_types(x.dtype, torch.half), torch.can_cast(x.dtype, torch.int8)],
        [hash(x) == hash(x), x in {x: 1}, [r.shape[0] for r in x], isinstance(x, torch.Tensor)],
    )


@pytest.mark.parametrize("x", [randn(2, 3), randn(3, 2).t(), leaf(3, 3), torch.ones(2, 2).long()])
def test_metadata(x):
    mine, theirs = call(_metadata, x), _metadata(x)
    assert mine == theirs


@pytest.mark.parametrize("x", [randn(2, 3), randn(3)], ids=str)
def test_metadata_of_intermediates(x):
    def step(x):
        y = x * 2
        return y.shape, y.stride(), y.is_contiguous(), y.requires_grad, y.is_leaf, y.grad, len(y)

    assert call(step, x) == step(x)


def test_len_and_iteration_of_a_scalar():
    for step in (lambda x: len(x.sum()), lambda x: list(x.sum())):
        with pytest.raises(TypeError, match="0-d tensor"):
            call(step, randn(2))


_VALUES = [
    lambda x: x.item(),
    lambda x: bool(x),
    lambda x: int(x),
    lambda x: float(x),
    lambda x: x.tolist(),
    lambda x: x.numpy(),
    lambda x: repr(x),
    lambda x: f"{x}",
    lambda x: f"{x:.3f}",
    lambda x: 1 in x,
    lambda x: [0, 1, 2, 3][x.long()],
    lambda x: torch.nonzero(x),
    lambda x: x.nonzero(),
    lambda x: torch.equal(x, x),
    lambda x: x.equal(x),
    lambda x: torch.allclose(x, x),
    lambda x: x.is_nonzero(),
    lambda x: torch.is_nonzero(x),
    lambda x: x.__array__(),
]


@pytest.mark.parametrize("i", range(len(_VALUES)))
def test_values_are_read(i):
    for step in (lambda x: _VALUES[i](x.sum()), lambda x: _VALUES[i](x[0] * 1)):
        mine, theirs = call(step, torch.ones(3)), step(torch.ones(3))
        assert type(mine) is type(theirs)
        same = torch.equal if isinstance(theirs, torch.Tensor) else operator.eq
        assert same(mine, theirs)


@pytest.mark.parametrize("read", [complex, lambda x: x.data_ptr(), lambda x: x.__dlpack__()])
def test_values_are_refused(read):
    with pytest.raises(TracejitError, match=rf"{FILE}:\d+"):
        call(lambda x: read(x.sum()), torch.ones(3))


def test_an_intermediate_has_all_methods_of_a_tensor():
    """None is hidden by what the tracer notes of it."""
    from tracejit.capture.trace.tensor import TracedTensor

    noted = {n for n in {**vars(TracedTensor), **TracedTensor.__annotations__} if n[:2] != "__"}
    assert not noted & set(dir(torch.Tensor))
    x = torch.arange(9.0).reshape(3, 3)
    assert call(lambda x: (x + 1).trace(), x) == 15.0
