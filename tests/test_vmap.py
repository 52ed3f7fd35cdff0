"""`torch.vmap` in steps: masks of attention from functions of indices, and other simple functions.

See `support/worlds.py`.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn import functional
from torch.utils._pytree import tree_leaves

import tracejit
from support.oracle import traced
from support.worlds import Case, X, check, table
from tracejit.capture.trace.tensor import tensors_of

CASES: dict[str, Case] = {}
case = table(CASES)
IDS = torch.arange(6).reshape(2, 3)
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])


def laid_out(function, *sizes):
    """A mask from a function of row, head, query and key."""
    for axis in (3, 2, 1, 0):
        dims = tuple(0 if i == axis else None for i in range(4))
        function = torch.vmap(function, in_dims=dims, out_dims=0)
    with TransformGetItemToIndex():
        return function(*(torch.arange(n) for n in sizes))


def mask(function, *sizes):
    """A case: attention by a mask that is made in the step."""

    def build(w):
        w.x = torch.randn(2, 3, 5, 4, requires_grad=True)

        def step():
            seen = laid_out(function, *sizes)
            y = torch.nn.functional.scaled_dot_product_attention(w.x, w.x, w.x, attn_mask=seen)
            return seen, torch.autograd.grad(y.square().sum(), w.x)

        return step

    return build


def causal(b, h, q, kv):
    return kv <= q


def window(b, h, q, kv):
    return q.new_ones((), dtype=torch.bool) & (kv > q - 3) & (kv <= q)


def documents(b, h, q, kv):
    return (DOCUMENTS[b, q] == DOCUMENTS[b, kv]) & (kv <= q)


def of_heads(b, h, q, kv):
    return (kv <= q + h) & torch.where(h > 1, kv != 2, q >= 0) | (q == kv)


def chunks(b, h, q, kv):
    return (kv // 2 == q // 2).logical_and(kv <= q)


MASKS = {f.__name__: f for f in (causal, window, documents, of_heads, chunks)}


def compare(build):
    """Values, requires_grad and replays. Results are dense: eager's may be expanded."""
    torch.manual_seed(0)
    w = SimpleNamespace()
    step = build(w)
    compiled = tracejit.compile(step, on_unsupported="raise", backend="numpy")
    for _ in range(5):
        for ours, eager in zip(tensors_of(compiled()), tensors_of(step()), strict=True):
            assert ours.requires_grad == eager.requires_grad
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            w.x.add_(0.1)
    assert compiled.stats.replays, compiled.explain_mode()


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    compare(mask(MASKS[name], 2, 3, 5, 5))


def test_a_mask_costs_no_call_for_each_element():
    compiled = tracejit.compile(lambda: laid_out(window, 2, 3, 40, 50))
    torch.testing.assert_close(compiled(), laid_out(window, 2, 3, 40, 50))
    assert len(traced(lambda: laid_out(window, 2, 3, 40, 50))[0].graph.nodes) < 60


def of_x(function, **options):
    """A case: a function over the rows of a matrix, and its gradient."""

    def build(w):
        w.x = X.clone().requires_grad_()

        def step():
            out = torch.vmap(function, **options)(w.x)
            outs = out if isinstance(out, tuple) else (out,)
            return out, torch.autograd.grad(sum(y.float().sin().sum() for y in outs), w.x)

        return step

    return build


def written(x):
    x.reshape(2, 2).t().add_(1)
    x.unsqueeze(0).mul_(2)
    return x


FUNCTIONS = {
    "a chain": (lambda x: (x * 2 + 1).sin().clamp(min=0.1), {}),
    "along the other axis": (lambda x: x * x, {"in_dims": 1, "out_dims": 1}),
    "back to front": (lambda x: x.exp(), {"in_dims": -1, "out_dims": -1}),
    "a sum": (lambda x: x.sum() * x, {}),
    "a softmax": (lambda x: x.softmax(0), {}),
    "products": (lambda x: torch.outer(x, x) @ x, {}),
    "a norm": (lambda x: torch.nn.functional.layer_norm(x, (4,)), {}),
    "a running sum": (lambda x: x.cumsum(0), {}),
    "views": (lambda x: (x[None].expand(3, -1).permute(1, 0) * x.view(4, 1)).transpose(0, 1), {}),
    "a view that is written to": (lambda x: written(x * 1), {}),
    "a mean and its square root": (lambda x: torch.sqrt(x.square().mean() + 1), {}),
    "two results": (lambda x: (x.cos(), x.mean()), {}),
    "two results, in two places": (lambda x: (x.cos(), x.mean()), {"out_dims": (1, 0)}),
    "a row": (lambda x: x[1:] * x[0], {}),
    "not of the batch": (lambda x: (torch.ones(2), x.sum()), {}),
    "with a wider tensor": (lambda x: x * torch.arange(12.0).reshape(3, 4), {}),
    "with a matrix": (lambda x: torch.arange(12.0).reshape(3, 4) @ x, {}),
    "shapes": (lambda x: x.reshape(2, 2).t() * x.shape[0] + x.dim(), {}),
    "in place": (lambda x: (x * 1).add_(2).mul_(x), {}),
    "like it": (lambda x: torch.zeros_like(x) + x.new_ones(3, 1) * x, {}),
    "new tensors": (lambda x: x.new_zeros(4).add_(x) * x.new_full((2, 1), 3.0), {}),
    "views of reordered axes": (lambda x: x.view(2, 2).permute(-1, 0) - x.view(2, 2).T, {}),
    "one in another": (lambda x: torch.vmap(lambda y: y * x)(x), {}),
    "in chunks": (lambda x: x.sin(), {"chunk_size": 2}),
    "by a decorator": (torch.func.vmap(lambda x: x.tanh()), {}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.sweep(0.34)
def test_functions(name):
    function, options = FUNCTIONS[name]
    compare(of_x(function, **options))


@case("replay")
def indices_of_rows(w):
    w.x = X.clone().requires_grad_()

    def step():
        def chosen(row, i):
            return row[i], w.x[i]

        with TransformGetItemToIndex():
            return torch.vmap(chosen)(w.x, torch.tensor([3, 0, 1, 2, 1]))

    return step


@case("refused: draws", says="draws numbers under vmap")
def a_gumbel_softmax(w):
    return lambda: torch.vmap(functional.gumbel_softmax, randomness="different")(X)


@case("refused: draws", says="draws numbers under vmap")
def attention_of_what_all_share(w):
    def shared(x):
        y = X.reshape(1, *X.shape)
        return x.sum() * functional.scaled_dot_product_attention(y, y, y, dropout_p=0.5)

    return lambda: torch.vmap(shared, randomness="same")(X)


@case("refused: it would be a copy", says="gives a view")
def other_views(w):
    return lambda: torch.vmap(lambda x: x.unfold(0, 2, 1))(X)


@case("refused: arguments that are not known", says="for these arguments")
def other_arguments(w):
    return lambda: torch.vmap(lambda x: x.view(torch.int32))(X)


@case("refused: a write", says="no rule under vmap")
def items(w):
    def zeroed(x):
        x = x * 1
        x[0] = 0
        return x

    return lambda: torch.vmap(zeroed)(X)


@case("refused: too many calls", says="batches of up to 64")
def large_batches(w):
    w.x = torch.randn(65, 4)
    return lambda: torch.vmap(lambda x: x.cummax(0).values)(w.x)


@pytest.mark.parametrize("name", CASES)
def test_vmap(name):
    check(CASES[name])


# ---- random numbers: eager's, of inputs that are dense, and that are not

WIDE, LAST = torch.rand(3, 5, 40) + 0.1, torch.rand(5, 40, 3) + 0.1
CHANNELS = torch.rand(3, 4, 2, 3, 2, 5)  # of a batch of 4 × 2 channels of volumes

DRAWS = {
    "dropout": lambda x: functional.dropout(x, 0.4),
    "dropout, by its other name": lambda x: torch.dropout(x, 0.4, True),
    "dropout in place": lambda x: functional.dropout(x * 1, 0.4, inplace=True),
    "dropout of nothing": lambda x: functional.dropout(x, 0.0) + functional.dropout(x, 0.5, False),
    "dropout of all": lambda x: functional.dropout(x, 1.0),
    "dropout of what all share": lambda x: x + functional.dropout(WIDE[0], 0.3),
    "rand": lambda x: x + torch.rand(40) + torch.rand((5, 1)) + torch.rand(size=(5, 40)),
    "randn": lambda x: x * torch.randn(5, 40),
    "randint": lambda x: x * torch.randint(9, (40,)) + torch.randint(-3, 2, size=(5, 1)),
    "normal": lambda x: x * torch.normal(1.0, 2.0, (40,)),
    "randperm": lambda x: x[:, torch.randperm(40)],
    "likes": lambda x: x * torch.rand_like(x) + torch.randn_like(x) + torch.randint_like(x, 9),
    "likes of what all share": lambda x: x * torch.randn_like(WIDE[0]),
    "bernoulli": lambda x: x * torch.bernoulli(x * 0.5),
    "multinomial": lambda x: x.sum() * torch.multinomial(x, 3) + torch.multinomial(x[0], 3),
    "in place": lambda x: x * x.clone().normal_() + torch.empty_like(x).uniform_(0.1, 0.2),
    "channels": lambda x: (
        functional.dropout1d(x.reshape(4, 5, 10), 0.4).flatten()
        + functional.dropout1d(x.reshape(5, 40), 0.4).flatten()
        + functional.dropout2d(x.reshape(2, 5, 4, 5), 0.4).flatten()
        + functional.dropout3d(x.reshape(5, 2, 4, 5), 0.4).flatten()
    ),
    "attention": lambda x: functional.scaled_dot_product_attention(
        x.view(1, 5, 40), x.view(1, 5, 40), x.view(1, 5, 40), dropout_p=0.5
    ),
}


@pytest.mark.parametrize("randomness", ["different", "same", "error"])
@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers(name, randomness):
    """The same numbers as eager's, or the same error; the second call goes on with the stream."""

    def step(x, axis):
        drawn = torch.vmap(DRAWS[name], in_dims=axis, randomness=randomness)
        y = drawn(x)
        return y.detach(), torch.autograd.grad((y * y).sum(), x)

    turned = WIDE.transpose(1, 2).contiguous().transpose(1, 2)
    for x, axis in ((WIDE, 0), (LAST, 2), (turned, 0)):
        if randomness == "same" and (name == "attention" or (name == "likes" and x is turned)):
            with pytest.raises(
                tracejit.errors.UnsupportedOperation, match="draws numbers under vmap"
            ):
                tracejit.compile(step, on_unsupported="raise")(x.requires_grad_(), axis)
            continue
        x = x.clone().requires_grad_()
        compiled = tracejit.compile(step, on_unsupported="raise", backend="numpy")
        torch.manual_seed(4)
        try:
            expected = [step(x, axis) for _ in range(4)]
        except RuntimeError as error:
            with pytest.raises(RuntimeError) as raised:
                compiled(x, axis)
            assert str(raised.value)[:60] in str(error)
            continue
        after = torch.get_rng_state()
        torch.manual_seed(4)
        for of_eager in expected:
            for a, b in zip(tree_leaves(compiled(x, axis)), tree_leaves(of_eager), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.get_rng_state(), after)
        assert compiled.stats.replays, compiled.explain_mode()


@pytest.mark.parametrize("outer", ["different", "same"])
@pytest.mark.parametrize("inner", ["different", "same"])
def test_random_numbers_of_batches_of_batches(outer, inner):
    def drawn(x):
        return functional.dropout(x, 0.5) + torch.randn(4) + functional.dropout(X[0, :1], 0.5)

    def step():
        of_each = torch.vmap(drawn, randomness=inner)
        return torch.vmap(of_each, randomness=outer)(CHANNELS[:, :, 0, 0, 0, :4])

    compiled = tracejit.compile(step, on_unsupported="raise", backend="numpy")
    torch.manual_seed(3)
    expected = [step() for _ in range(3)]
    torch.manual_seed(3)
    for of_eager in expected:
        torch.testing.assert_close(compiled(), of_eager)


@pytest.mark.parametrize(
    ("function", "options", "says"),
    [
        (lambda x: x, {"in_dims": 5}, "dimensionality"),
        (lambda x: 3, {}, "must only return Tensors"),
        (lambda x: x, {"out_dims": None}, "out_dim is None"),
        (lambda x: x, {"out_dims": (0, 0)}, "not compatible"),
    ],
)
def test_what_eager_rejects(function, options, says):
    def step():
        return torch.vmap(function, **options)(X)

    for run in (step, tracejit.compile(step)):
        with pytest.raises(ValueError, match=says):
            run()
