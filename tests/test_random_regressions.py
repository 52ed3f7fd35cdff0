"""Shrunk failures of the random programs, each under the name of what was wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

import tracejit
from support.random_check import compare
from support.random_text import randn
from tracejit.capture.trace.tensor import elementwise_strides
from tracejit.errors import AutogradError, UnsupportedOperation

pytestmark = pytest.mark.filterwarnings("ignore")

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def data(seed, *shape, dtype=F32):
    return lambda cast: cast(randn(seed, *shape), dtype)


def leaf(seed, *shape, dtype=F32):
    return lambda cast: cast(randn(seed, *shape), dtype).requires_grad_()


def check(step, *args, **options):
    """Compare on numpy, fused and not, with eager; each arg makes a tensor when given `cast`."""

    def make_args(cast):
        return [a(cast) if callable(a) else a for a in args]

    for fuse in (True, False):
        compare(step, make_args, backend="numpy", fuse=fuse, **options)


def test_copy_from_a_number():
    def step(x):
        x.copy_(0.25)
        x[0].copy_(2)

    check(step, data(1, 3))


def test_assigning_data_of_an_intermediate_keeps_its_history():
    def step(w):
        t = w * w
        t.data -= 0.1
        (t * t).sum().backward()
        return t

    check(step, leaf(1, 3))


def test_writing_a_tensor_of_one_element_from_a_view_of_itself():
    def step(w):
        t = w * 2
        t.view(1, 1)[...] = t
        t.sum().backward()
        return t

    check(step, leaf(1))


def test_writing_through_a_view_of_an_expanded_tensor_is_refused():
    def step(x):
        x.expand(3, 2)[1].mul_(0.5)
        return x

    with pytest.raises(UnsupportedOperation, match="Write to the tensor that was expanded"):
        check(step, data(1, 2))


def test_dividing_saves_its_operands_not_its_result():
    def step(w, x):
        t = x / w
        t.neg_()
        t.sum().backward()

    check(step, leaf(1, 3), data(2, 3))


def test_a_saved_tensor_written_through_data_is_refused():
    def step(w):
        t = w * 2
        loss = (t * t).sum()
        t.data.mul_(0.5)
        loss.backward()

    with pytest.raises(UnsupportedOperation, match="written through .data"):
        check(step, leaf(1, 3))


def test_power_of_a_scalar_in_float64():
    def step(x):
        return ((x.amin([], keepdim=True).abs() + 0.5) ** 1.5).sum()

    check(step, data(1, dtype=F64))


def test_copying_an_expanded_tensor_onto_itself():
    def step(x):
        t = (x * 1).expand(7, 3)
        t.copy_(t)
        return t

    check(step, data(1, 1, 3))


def test_subtracting_from_a_slice_of_one_column():
    def step(x):
        x[:, :1] -= 0.5
        x[:1] -= x[1:2]
        x[:1, :1] -= x[1, 0]

    check(step, data(1, 2, 3))
    check(step, data(1, 3, 2))


def test_a_freed_node_that_saved_nothing_runs_again():
    def step(w):
        t = w.unsqueeze(0)
        torch.autograd.grad((t**2).mean(), [w])
        (w.sum() + t.mean()).backward()

    check(step, leaf(1))
    check(step, leaf(1, 3))


def test_a_saved_operand_that_was_broadcast_is_checked():
    def broadcast(w, u):
        t = w * w
        loss = (t * u).sum()
        with torch.no_grad():
            t.sin_()
        loss.backward()

    def promoted(w, u):
        t = w * w
        loss = (t * u.double()).sum()
        with torch.no_grad():
            t.sin_()
        loss.backward()

    def linear(w, u):
        t = w * w
        loss = F.linear(t, u, t).sum()
        with torch.no_grad():
            t.sin_()
        loss.backward()

    def copied(w, u):
        t = w * w
        loss = (t.t().reshape(-1)[:2] * u).sum()
        with torch.no_grad():
            t.sin_()
        loss.backward()

    for step in (broadcast, promoted, linear, copied):
        check(step, leaf(1, 1, 2), leaf(2, 2, 2))


def test_a_view_under_no_grad_leaves_aliases_without_history():
    def step(w):
        y = w.detach() * 2
        d = w.detach()
        with torch.no_grad():
            w.view(-1).fill_(0.5)
        assert not d.requires_grad
        return y, d + 1

    check(step, leaf(1, 3, 2))


def test_a_detached_argument_beside_its_parameter():
    def step(w, y):
        t = y * 2
        with torch.no_grad():
            w.view(-1).fill_(0.5)
        return t

    def make_args(cast):
        w = leaf(1, 3, 2)(cast)
        return [w, w.detach()]

    compare(step, make_args, backend="numpy")


def test_views_returned_together_may_not_be_written_to():
    def write(w):
        (w * 1).unbind(0)[0].add_(1)

    def write_a_view(w):
        (w * 1).chunk(2)[0][:1].mul_(2)

    def write_with_history(w):
        w.detach().clone().split(1)[0].add_(w[:1])

    def read_after_the_base(w):
        t = w * 1
        a, _ = t.split([1, 1])
        t.mul_(2)
        a.sum().backward()

    def read_after_a_quiet_write(w):
        a, _ = w.unbind()
        with torch.no_grad():
            w.mul_(2)
        a.sum().backward()

    def read_made_quietly(w):
        t = w * 1
        with torch.no_grad():
            a = t[0]
            t.mul_(2)
        return a * 2

    steps = (write, write_a_view, write_with_history)
    for step in (*steps, read_after_the_base, read_after_a_quiet_write, read_made_quietly):
        with pytest.raises(RuntimeError, match="view"):
            step(leaf(1, 2, 3)(torch.Tensor.to))
        check(step, leaf(1, 2, 3))


def test_views_returned_together_may_be_written_to_where_nothing_differentiates():
    def step(w, x):
        x.unbind(0)[0].add_(1)
        t = w * 1
        a, b = t.unbind(0)
        with torch.no_grad():
            a.mul_(2)
        (w * 3).tensor_split(2)[0].mul_(2)
        t.sum().backward()
        return b.detach(), x

    check(step, leaf(1, 2, 3), data(2, 2, 3))


def test_einsum_without_a_common_sum_is_laid_out_as_a_product():
    def step(a, b):
        t = torch.einsum("ij,kj->jk", a, b)
        t.reshape(20).data.zero_()  # a copy in eager
        return t, torch.einsum("ij,kj->kj", a, b)

    check(step, data(1, 3, 4), data(2, 5, 4))


def test_a_normalized_single_row_into_a_matmul():
    def step(w, x):
        return F.rms_norm(torch.tril(w, -1), (7,)) @ x

    check(step, leaf(1, 1, 7), data(2, 7, 4), outside=True)


def test_two_matmuls_beside_a_full_reduction():
    def step(x, a, b, c, d):
        return (((a @ b) * x.double().sum((0, 1, 2), True)) + c @ d).tanh()

    check(
        step,
        data(1, 1, 2, 1),
        data(2, 1, 4),
        data(3, 4, 2),
        data(4, 1),
        leaf(5, 1, 1),
        outside=True,
    )


def test_a_running_sum_saves_nothing():
    def step(w):
        t = w.cumsum(0)
        t.tanh().sum().backward()
        (t - 0.5).square().mean().backward()
        (g,) = torch.autograd.grad((w.cumsum(-1) ** 2).sum(), [w], create_graph=True)
        (g**2).sum().backward()

    check(step, leaf(1, 5, 3))
    check(step, leaf(1, 5, 3, dtype=BF16), narrow=BF16)


def test_padding_by_nothing_keeps_the_layout():
    def step(x):
        return F.pad(x.mT, (0, 0)), F.pad(x.mT, (-1, 0)), F.pad(x[..., ::2], (0, -1))

    check(step, data(1, 2, 3, 4))


def twice(function):
    """A step that differentiates a function's result, and then the same result again."""

    def step(w):
        t = function(w.clone())
        t.sum().backward()
        t.sum().backward()

    return step


def eager_raises(step, *args):
    try:
        step(*(a(torch.Tensor.to) for a in args))
    except RuntimeError:
        return True
    return False


def check_both(step, *args, raises):
    """What eager does is known, so that the test says it, and the compiled step does the same."""
    assert eager_raises(step, *args) is raises
    check(step, *args)


def test_a_triangle_saves_no_mask():
    for function in (torch.tril, torch.triu, lambda x: x.tril(-1), torch.diag_embed):
        check_both(twice(function), leaf(1, 3, 3), raises=False)

    def masked(x):
        return x.masked_fill(x > 0, 0.5)

    check_both(twice(masked), leaf(1, 3, 3), raises=True)

    def twice_differentiated(w):
        (g,) = torch.autograd.grad((torch.tril(w) ** 3).sum(), [w], create_graph=True)
        (g**2).sum().backward()

    check(twice_differentiated, leaf(1, 3, 4))


def test_a_product_with_a_number_saves_the_number():
    for function in (
        lambda x: x * 1,
        lambda x: 2.0 * x,
        lambda x: x / 4,
        lambda x: 3 / x,
        lambda x: x.clone().mul_(0.5),
        lambda x: x**1,
        lambda x: x**0,
    ):
        check_both(twice(function), leaf(1, 3), raises=True)
    for function in (
        lambda x: x + 2.0,
        lambda x: 1 - x,
        lambda x: x.add(x, alpha=3),
        lambda x: x.mean(0),
        lambda x: torch.addmm(x, torch.ones(3, 3), torch.ones(3, 3), beta=0.5, alpha=2),
    ):
        check_both(twice(function), leaf(1, 3), raises=False)


def test_a_runtime_scalar_is_no_saved_tensor():
    def added(w, s):
        t = w.add(w, alpha=s)
        t.sum().backward()
        t.sum().backward()

    def multiplied(w, s):
        t = w * s
        t.sum().backward()
        t.sum().backward()

    check(added, leaf(1, 3), 0.5)
    with pytest.raises(RuntimeError, match="second time"):
        multiplied(leaf(1, 3)(torch.Tensor.to), 0.5)
    check(multiplied, leaf(1, 3), 0.5)


def test_a_number_saved_before_a_backward_outside():
    def step(w, u):
        t = w * 1
        (t @ u).tanh().sum().backward()
        return t.t()

    check(step, leaf(1, 5, 1), leaf(2, 1, 1), outside=True)


def test_results_that_a_derivative_reads_may_not_be_written():
    def written(function):
        def step(w):
            t = function(w.clone())
            loss = t.sum()
            with torch.no_grad():
                t.zero_()
            loss.backward()

        return step

    for function in (
        lambda x: x.sum().amax([]),
        lambda x: x.sum().amin([], keepdim=True),
        lambda x: x.amax(0, keepdim=True),
        lambda x: x.std(0, keepdim=True),
        lambda x: x.prod(0),
        lambda x: x[:1].prod(0),
        torch.reciprocal,
    ):
        check_both(written(function), leaf(1, 3), raises=True)
    for function in (lambda x: 1 / x, lambda x: x.var(0, keepdim=True)):
        check_both(written(function), leaf(1, 3), raises=False)


def test_operands_that_only_torch_saves():
    def step(function):
        def written(w):
            t = w.clone()
            loss = function(t).sum()
            with torch.no_grad():
                t.zero_()
            loss.backward()

        return written

    index = torch.tensor([[0, 1], [1, 0]])
    for function in (
        lambda x: x.gather(0, index),
        lambda x: x.take_along_dim(index, 0),
        lambda x: x**1,
        lambda x: x[:1].prod(0),
    ):
        check_both(step(function), leaf(1, 2, 3), raises=True)
    for function in (lambda x: x.tril(), lambda x: x.index_select(0, index[0])):
        check_both(step(function), leaf(1, 2, 3), raises=False)
    check_both(twice(lambda x: x.sum().max(0).values), leaf(1, 3), raises=True)


def test_factors_that_are_saved_for_each_other():
    def step(function):
        def written(w, x, u):
            y, z = x * 1, u * 1
            loss = function(w * 1, y, z).sum()
            with torch.no_grad():
                y.zero_()
            loss.backward()
            (function(w * 1, y, z).sum() + 0).backward()

        return written

    plain = torch.addcmul, torch.addcdiv, torch.lerp
    for function in plain:
        check_both(step(function), leaf(1, 3), data(2, 3), data(3, 3), raises=False)
    for function in plain[:2]:
        check_both(step(function), leaf(1, 3), data(2, 3), leaf(3, 3), raises=True)
    for function, raises in zip(plain, (False, True, True), strict=True):
        both = twice(lambda x, function=function: function(x, torch.ones(3), torch.ones(3)))
        check_both(both, leaf(1, 3), raises=raises)


def test_the_constant_gradient_of_a_product_of_one_depends_on_it():
    def step(w):
        w[:, :1].prod(1).sum().backward(create_graph=True)
        flags = w.grad.requires_grad
        return torch.zeros(int(flags) + 1)

    assert step(leaf(1, 2, 3)(torch.Tensor.to)).shape == (2,)
    check(step, leaf(1, 2, 3))
    check(step, leaf(1, 2, 1))


@pytest.mark.parametrize("number", [0.1, 0.37, -1e5 - 0.3])
def test_the_spread_of_equal_numbers_is_exactly_zero(number):
    def step(w):
        with torch.no_grad():
            w.copy_(number)
        w.std([1, 2]).sum().backward()
        return w.var(0), *torch.std_mean(w.detach(), dim=1)

    check(step, leaf(1, 5, 7, 3))


def test_what_is_read_through_data_is_not_of_the_tensors_counter():
    """Seed 1000103 of `make fuzz`: eager silently uses what was written since, so that is refused;
    it was taken for an error of eager's."""

    def step(x, w):
        t = x.logsumexp(-2)
        y = t.data * w
        with torch.no_grad():
            t.sub_(t.detach())
        y.sum().backward()
        return w.grad.clone()

    x, w = data(1, 5, 7)(torch.Tensor.to), leaf(2, 1, 7)(torch.Tensor.to)
    with pytest.raises(UnsupportedOperation, match="through .data since"):
        tracejit.compile(step, backend="numpy", on_unsupported="raise")(x, w)
    assert tracejit.compile(step, backend="numpy", on_unsupported="eager")(x, w).eq(0).all()

    def raises(x, w):
        t = w.exp()
        y = t * t.data
        with torch.no_grad():
            t.sub_(1)
        y.sum().backward()

    with pytest.raises(RuntimeError, match="modified by an inplace"):
        raises(x, w)
    with pytest.raises((AutogradError, UnsupportedOperation)):
        tracejit.compile(raises, backend="numpy", on_unsupported="raise")(x, w)


def test_the_second_derivative_of_an_empty_mean():
    def step(w):
        (F.softplus(w - w.mean(0, keepdim=True)) - 0.5).square().mean().backward(create_graph=True)

    check(step, leaf(1, 1, 0, dtype=BF16))


def test_the_gradient_of_a_mean_of_many_equal_cotangents():
    def step(w, x):
        (w - F.layer_norm(x, x.shape[-1:])).mean().backward()

    def make_args(cast):
        return [leaf(1, 1)(cast), data(2, 33, 33)(cast)]

    compare(step, make_args, backend="c")


def test_a_transposed_convolution_without_a_result():
    """Eager takes it or not, by the library that it asks."""

    def step(x, w):
        return F.conv_transpose2d(x, w, padding=(1, 0), groups=3)

    x, w = randn(1, 2, 3, 2, 2).float(), randn(2, 3, 2, 1, 3).float()
    with pytest.raises(UnsupportedOperation, match="depends on the library"):
        tracejit.compile(step, on_unsupported="raise")(x, w)
    falling_back = tracejit.compile(step, on_unsupported="eager")
    assert falling_back(x, w).shape == (2, 6, 0, 4)
    assert falling_back.stats.eager == 1


def test_axes_of_one_element_order_a_result_as_in_eager():
    def step(x, y):
        return x == y, x + y

    for strides in ((1, 1), (1, 33)):
        x, y = randn(1, 33, 1, 1).float(), randn(2, 33, 1).float()
        x = x.as_strided((33, 1, 1), (1, 1, 33))
        y = y.as_strided((33, 1), strides)
        for ours, eager in zip(tracejit.compile(step)(x, y), step(x, y), strict=True):
            assert ours.stride() == eager.stride()
            assert torch.equal(ours, eager)


def _laid_out_somehow(rng: random.Random, shape: Sequence[int]) -> torch.Tensor:
    order = rng.sample(range(len(shape)), len(shape))
    memory = torch.zeros([2 * shape[i] for i in order])
    if rng.random() < 0.7:
        memory = torch.zeros([shape[i] for i in order])
    else:
        memory = memory[tuple(slice(0, None, 2) for _ in order)]
    return memory.permute([order.index(i) for i in range(len(shape))])


def test_strides_of_element_wise_results():
    """Random shapes and layouts of one, two and three operands, against eager."""
    rng = random.Random(0)
    for _ in range(4000):
        sizes = (1, 1, 2, 3, 5, 0) if rng.random() < 0.1 else (1, 2, 3)
        shape = [rng.choice(sizes) for _ in range(rng.randint(0, 5))]
        operands = []
        for _ in range(rng.choice((1, 2, 2, 3))):
            own = [1 if rng.random() < 0.3 else n for n in shape]
            first = rng.randint(0, len(own)) if rng.random() < 0.3 else 0
            operands.append(_laid_out_somehow(rng, own[first:]))
        function = {1: torch.sin, 2: torch.eq, 3: torch.addcmul}[len(operands)]
        eager = function(*operands)
        given = [(tuple(x.shape), x.stride()) for x in operands]
        assert elementwise_strides(tuple(eager.shape), given) == eager.stride(), given


def test_nothing_gathered_has_a_gradient_with_history():
    """Seed 5006121."""

    def step(w, i):
        (w.gather(1, i) - 0.5).square().mean().backward(create_graph=True)
        return w.grad.requires_grad, w.gather(-1, i)

    w, i = torch.ones(3, 3, requires_grad=True), torch.zeros(3, 0, dtype=torch.int64)
    flag, found = tracejit.compile(step)(w, i)
    assert flag and found.shape == (3, 0) and torch.equal(w.grad, torch.zeros(3, 3))


def test_strides_of_results_with_a_number():
    """Seed 5002146: to most functions a number is a tensor without axes, so that axes of one
    element are ordered as they lie; to others it is a parameter."""

    def step(x, i):
        return (
            *(x + 1, torch.add(x, 1, alpha=2), x - 1, 1 - x, x * 2, x / 2, 2 / x, x // 2, x % 2),
            *(torch.remainder(3, x), torch.fmod(x, 2), x == 1, x < 1, x <= 1, torch.xlogy(2, x)),
            *(torch.where(x > 0, x, 0.0), torch.where(x > 0, 1.0, 0.0), torch.copysign(x, -1.0)),
            *(x**2, x**2.5, 2**x, x.float_power(2), x.clamp(0, 1), x.clamp_min(0), x.square()),
            *(x.lerp(x, 0.5), F.leaky_relu(x), F.hardtanh(x), x.masked_fill(x > 0, 2.0), -x),
            *(i & 1, 1 & i, i << 1, 1 << i, i // 2, i * 2.0, i % 2, i**2, i == 2),
        )

    x = torch.empty_strided((1, 1, 7), (1, 1, 1)).fill_(3)
    given = x, x.long()
    results = zip(tracejit.compile(step)(*given), step(*given), strict=True)
    for number, (ours, eager) in enumerate(results):
        assert ours.stride() == eager.stride(), number
        assert torch.allclose(ours, eager)


@pytest.mark.parametrize("n", [2, 3, 16, 40])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_product_with_what_is_read_backwards(n, dtype):
    """Seed 2005002: an operand that is walked backwards was loaded forwards."""

    def step(w, m):
        (F.linear(w.flip(0), m) * 0.25).mean().backward()
        (m @ m.flip(1)).square().mean().backward()

    def make_args(cast):
        return [leaf(1, n, dtype=dtype)(cast), leaf(2, n, n, dtype=dtype)(cast)]

    compare(step, make_args, backend="c")


def test_a_product_next_to_what_is_gathered_from_repeated_memory():
    """Seed 4000586: a position that a load has found, and a remainder of it, in a product."""
    rows = torch.randint(2, (1, 5), generator=torch.Generator().manual_seed(1))
    columns = torch.randint(10, (1, 5), generator=torch.Generator().manual_seed(2))

    def step(x, bias, w):
        return F.linear(x, w, bias.repeat(2, 2)[rows, columns]).triu()

    args = [data(1, 1, 7), data(2, 1, 5), data(3, 5, 7)]
    check(step, *args)
    compare(step, lambda cast: [a(cast) for a in args], backend="c")


def test_differences_along_an_empty_axis_are_the_tensor_itself():
    """Seed 4005000: torch returns what it was given."""

    def step(w):
        d = w.diff(dim=0)
        assert d is w
        (d + 1).sum().backward()
        return d.grad.detach().clone(), w.diff(dim=1), w.diff(n=0)

    check(step, lambda cast: cast(torch.zeros(0, 3), F32).requires_grad_())


WRITES = {  # what eager does: the same, or an order of its own, or an error
    "even from odd": (lambda x: x[:, ::2].add_(x[:, 1::2]), "same"),
    "left": (lambda x: x[:, :-1].copy_(x[:, 1:]), "same"),
    "left, added": (lambda x: x[:, :-1].add_(x[:, 1:]), "same"),
    "onto itself": (lambda x: x[:, 1:].mul_(x[:, 1:]), "same"),
    "halves": (lambda x: x[:3].sub_(x[3:]), "same"),
    "another column": (lambda x: x[:, 0].copy_(x[:, 1]), "same"),
    "right": (lambda x: x[:, 1:].copy_(x[:, :-1]), "order"),
    "right, added": (lambda x: x[:, 1:].add_(x[:, :-1]), "order"),
    "first column": (lambda x: x.sub_(x[:, :1]), "order"),
    "diagonal": (lambda x: x.__iadd__(x.diagonal()), "order"),
    "row and column": (lambda x: x[0].add_(x[:, 0]), "order"),
    "by name": (lambda x: x.add_(other=x.diagonal()), "order"),
    "transposed": (lambda x: x.add_(x.T), "error"),
    "one row": (lambda x: x.add_(x[0]), "error"),
    "rows": (lambda x: x[1:].copy_(x[:-1]), "error"),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("grad", [False, True])
def test_writes_that_read_the_same_memory(name, grad):
    """Seed 4004267: what eager reads of memory that it is writing to depends on its loops."""
    write, how = WRITES[name]

    def step(x):
        y = x * 1.5
        write(y)
        return y

    x = randn(1, 6, 6).float().requires_grad_(grad)
    compiled = tracejit.compile(step, on_unsupported="raise")
    if how == "same":
        for _ in range(3):
            assert torch.equal(compiled(x).detach(), step(x).detach())
        return
    with pytest.raises(UnsupportedOperation if how == "order" else RuntimeError):
        compiled(x)
    if how == "error":
        with pytest.raises(RuntimeError, match="refer to a single memory location"):
            step(x)


def test_a_view_without_elements_that_was_written_gives_a_gradient_without_history():
    """To eager it is an `as_strided` of its base then (seed 2009823)."""

    def written(w):
        u = (w * 2)[1:1]
        with torch.no_grad():
            u.copy_(u)
        u.tanh().sum().backward(create_graph=True)

    def base_written(w):
        t = w * 2
        u = t[:, 3:]
        t.add_(1)
        (u.exp().sum() + 0 * u.sum()).backward(create_graph=True)

    def not_written(w):
        (w * 2)[1:1].tanh().sum().backward(create_graph=True)

    def made_after(w):
        t = w * 2
        t.add_(1)
        t[1:1].tanh().sum().backward(create_graph=True)

    for step in (written, base_written, not_written, made_after):
        check(step, leaf(1, 1, 3))


def test_axes_of_one_element_order_the_memory_of_an_einsum():
    """Axes that an operand lacks stand behind its own, with stride 1 (seed 2005403)."""
    shapes = {
        "ij,kj->ijk": ((5, 1), (5, 1)),
        "ij,kj->jik": ((5, 1), (3, 1)),
        "i,j->ij": ((5,), (3,)),
        "ij,ik->ijk": ((1, 5), (1, 3)),
        "ij,jk,k->ikj": ((5, 1), (1, 4), (4,)),
    }
    for equation, (first, *others) in shapes.items():
        for turned in (False, True):
            arrays = [randn(k, *s) for k, s in enumerate((first, *others))]
            if turned:  # in memory
                arrays = [a.mT.contiguous().mT if a.ndim > 1 else a for a in arrays]

            def step(*xs, equation=equation):
                return torch.einsum(equation, *xs)

            ours = tracejit.compile(step, backend="numpy")(*arrays)
            eager = step(*arrays)
            kept = [k for k, n in enumerate(eager.shape) if n > 1]
            assert [ours.stride(k) for k in kept] == [eager.stride(k) for k in kept], equation
            torch.testing.assert_close(ours, eager)
