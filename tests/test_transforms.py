"""`torch.func`: grad, vjp, jvp and what is made of them, alone and under vmap; gradients by sample.

What eager computes for a batch by its rules, a step computes by calls on whole batches
(`python/batching.py`): each of these is compared on batches of inputs and of weights.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp
from torch.nn import functional
from torch.utils._pytree import tree_leaves

import tracejit
from support.capture_checks import leaf, randn
from support.scope import sampled
from tracejit.errors import AutogradError, TracejitWarning, UnsupportedOperation

BATCH = 5


def compare(
    step: Callable[[], object], calls: int = 5, changed: tuple = (), tolerance: float = 1e-5
) -> tracejit.CompiledStep:
    """Values, requires_grad and replays. The tensors in `changed` differ in each call."""
    compiled = tracejit.compile(step, on_unsupported="raise", backend="numpy")
    for _ in range(calls):
        ours, eager = compiled(), step()
        for x, y in zip(tree_leaves(ours), tree_leaves(eager), strict=True):
            assert (x.requires_grad, x.dtype) == (y.requires_grad, y.dtype)
            torch.testing.assert_close(x, y, rtol=10 * tolerance, atol=tolerance)
        with torch.no_grad():
            for x in changed:
                x.mul_(0.9)
    assert compiled.stats.replays == calls - 2, compiled.explain_mode()
    return compiled


# ---- transforms of functions of tensors

x, M = randn(3), randn(4, 3)
r, w = leaf(3), randn(3).mul(2).requires_grad_()


def wave(x: torch.Tensor) -> torch.Tensor:
    return M @ x.sin()


def without_grad(step: Callable[[], object]) -> object:
    with torch.no_grad():
        return step()


def both(made: tuple, *cotangents: object) -> tuple:
    """What `vjp` gives, with its function called."""
    out, pull, *aux = made
    return out, pull(*cotangents), pull(*cotangents), aux


def quiet_part(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        c = x.square()
    return (x * w - c).sum()


def pulled(y: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda g: torch.autograd.grad(y, w, g, retain_graph=True)[0])(torch.eye(3))


TRANSFORMS: dict[str, Callable[[], object]] = {
    "grad": lambda: grad(lambda x: (x * x * x).sum())(x),
    "of what requires grad": lambda: grad(lambda x: (x * x * x).sum())(r),
    "through a closure": lambda: grad(lambda x: (x * x * w).sum())(x),
    "differentiated once more": lambda: torch.autograd.grad(
        grad(lambda x: (x * x * w).sum())(r).sum(), [w, r]
    ),
    "grad of grad": lambda: grad(
        lambda y: grad(lambda x: (x.sin() * y.cos()).sum())(y * 2).square().sum()
    )(x),
    "an outer variable": lambda: grad(lambda y: grad(lambda x: (x * y * y).sum())(x).sum())(r),
    "several arguments": lambda: grad(lambda a, b: (a * b * b).sum(), argnums=(1, 0))(x, r),
    "the last argument": lambda: grad(lambda a, b: (a * b * b).sum(), argnums=-1)(x, r),
    "a dict": lambda: grad(lambda d: (d["a"] * d["b"]).sum())({"a": x, "b": r}),
    "with its value": lambda: grad_and_value(lambda x: x.exp().sum())(x),
    "with more": lambda: grad(lambda x: (x.exp().sum(), (x.sin(), w * 2)), has_aux=True)(x),
    "with value and more": lambda: grad_and_value(lambda x: (x.exp().sum(), x), has_aux=True)(r),
    "a keyword": lambda: grad(lambda x, k: (x * k).sum())(x, k=r),
    "not used": lambda: grad(lambda x: torch.ones(()))(x),
    "under no_grad": lambda: without_grad(lambda: grad(lambda x: (x * x * w).sum())(r)),
    "no_grad within": lambda: grad(quiet_part)(r),
    "a view": lambda: grad(lambda x: x.view(2, 2).pow(3).sum())(M.view(3, 4)[1]),
    "vjp": lambda: both(vjp(wave, x), torch.ones(4)),
    "vjp of several": lambda: both(
        vjp(lambda a, b: (a * b, {"s": a.sin().sum()}), x, r), (x, {"s": torch.ones(())})
    ),
    "vjp with more": lambda: both(vjp(lambda x: (x * w, x.cos()), r, has_aux=True), x),
    "vjp under no_grad": lambda: without_grad(lambda: both(vjp(lambda x: w * x, r), x)),
    "jacrev": lambda: jacrev(wave)(x),
    "jacrev in chunks": lambda: jacrev(wave, chunk_size=2)(x),
    "jacrev one by one": lambda: jacrev(wave, chunk_size=1)(r),
    "jacrev of several": lambda: jacrev(lambda x, y: (M @ x * y.sum(), y * x), argnums=(0, 1))(
        x, r
    ),
    "jacrev with more": lambda: jacrev(lambda x: (x.exp(), x), has_aux=True)(x),
    "jvp": lambda: jvp(wave, (x,), (x * 2,)),
    "jvp of several": lambda: jvp(lambda a, b: (a * b, a.sin().sum(), b * 1), (x, r), (x, x)),
    "jvp with more": lambda: jvp(lambda x: (x.exp(), x.sin()), (x,), (x,), has_aux=True),
    "jvp of a constant": lambda: jvp(lambda x: torch.ones(2), (x,), (x,)),
    "jacfwd": lambda: jacfwd(wave)(x),
    "jacfwd of several": lambda: jacfwd(lambda x, y: M @ x * y.sum(), argnums=(0, 1))(x, x),
    "hessian": lambda: hessian(lambda x: wave(x).pow(2).sum())(x),
    "hessian by reverse mode": lambda: jacrev(jacrev(lambda x: wave(x).pow(2).sum()))(x),
    "hessian by grad": lambda: jacfwd(grad(lambda x: wave(x).pow(3).sum()))(x),
    "under vmap": lambda: torch.vmap(grad(lambda x: x.sin().sum()))(M),
    "under vmap, by what all share": lambda: torch.vmap(
        grad(lambda a, b: (a * b).sum(), argnums=(0, 1)), in_dims=(None, 0)
    )(x, M),
    "under vmap, with values": lambda: torch.vmap(grad_and_value(lambda x: x.cos().prod()))(M),
    "vjp under vmap": lambda: torch.vmap(lambda x, g: vjp(torch.sin, x)[1](g)[0])(M, M * 2),
    "jacobians under vmap": lambda: torch.vmap(jacrev(lambda x: x.sin() * x.sum()))(M),
    "of vmap": lambda: grad(lambda x: torch.vmap(lambda m: (m * x).sin())(M).sum())(x),
    "autograd under vmap": lambda: pulled(w.sin()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.sweep(0.34)
def test_transforms(name):
    compare(TRANSFORMS[name], changed=(x, M))


def test_reruns():
    """A rerun follows transforms by the calls that they make."""

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(grad(lambda v: (v * w).sin().sum()))(x)

    compiled = tracejit.compile(step, mode="rerun", on_unsupported="raise", backend="numpy")
    for k in range(4):
        given = M * (1 + k)
        torch.testing.assert_close(compiled(given), step(given))
    assert compiled.stats.compiles == 1


# ---- what is computed for whole batches

images, tokens = randn(BATCH, 2, 4, 6), torch.arange(BATCH * 3).reshape(BATCH, 3) % 4
sentences, classes = randn(BATCH, 3, 4), torch.arange(BATCH) % 4
WEIGHTS = {n: randn(BATCH, *n) for n in ((4,), (3,), (2,), (3, 4), (4, 4), (4, 3))}
kernels, taps, boxes = randn(BATCH, 3, 2, 3, 3), randn(BATCH, 4, 3, 2), randn(BATCH, 2, 1, 2, 2)
F = functional

FUNCTIONS: dict[str, tuple] = {
    "linear": (F.linear, sentences, WEIGHTS[3, 4], WEIGHTS[3,]),
    "linear of a row": (F.linear, WEIGHTS[4,], WEIGHTS[3, 4], WEIGHTS[3,]),
    "linear of images": (F.linear, images, randn(BATCH, 2, 6)),
    "products": (torch.matmul, sentences, WEIGHTS[4, 3]),
    "of rows and matrices": (torch.matmul, WEIGHTS[4,], WEIGHTS[4, 3]),
    "of matrices and columns": (lambda a, b: a @ b, sentences, WEIGHTS[4,]),
    "of rows": (torch.dot, WEIGHTS[4,], WEIGHTS[4,]),
    "of stacks": (torch.matmul, images, randn(BATCH, 6, 2)),
    "bmm": (torch.bmm, images, images.mT),
    "outer": (torch.outer, WEIGHTS[4,], WEIGHTS[3,]),
    "einsum": (lambda a, b: torch.einsum("ij,kj->ik", a, b), sentences, WEIGHTS[3, 4]),
    "attention": (
        lambda q, k: F.scaled_dot_product_attention(q, k, q, is_causal=True),
        sentences,
        sentences.cos(),
    ),
    "conv2d": (lambda x, k, b: F.conv2d(x, k, b, padding=1), images, kernels, WEIGHTS[3,]),
    "conv2d of batches": (F.conv2d, images.unsqueeze(1), kernels),
    "conv2d with groups": (lambda x, k: F.conv2d(x, k, groups=2), images, boxes),
    "conv1d": (lambda x, k: F.conv1d(x.mT[:3], k, stride=2), sentences, taps),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), images),
    "max_pool2d of batches": (lambda x: F.max_pool2d(x, 2), images.unsqueeze(1)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), images),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 2), sentences),
    "embedding": (lambda i, t: F.embedding(i, t, padding_idx=1), tokens, WEIGHTS[4, 3]),
    "embedding of one row": (F.embedding, classes, WEIGHTS[4, 3]),
    "layer_norm": (lambda x, a, b: F.layer_norm(x, (4,), a, b), sentences, *[WEIGHTS[4,]] * 2),
    "rms_norm": (lambda x, a: F.rms_norm(x, (4,), a), sentences, WEIGHTS[4,]),
    "group_norm": (
        lambda x, a: F.group_norm(x, 2, a, a.sin()),
        images.unsqueeze(1),
        WEIGHTS[2,],
    ),
    "cross_entropy": (F.cross_entropy, WEIGHTS[4,], classes),
    "cross_entropy of rows": (lambda x, y: F.cross_entropy(x, y), sentences, tokens),
    "cross_entropy, ignoring": (
        lambda x, y: F.cross_entropy(x, y, ignore_index=2, label_smoothing=0.1),
        sentences,
        tokens,
    ),
    "cross_entropy with weights": (
        lambda x, y: F.cross_entropy(x, y, weight=torch.tensor([1.0, 2.0, 0.5, 1.0])),
        sentences,
        tokens,
    ),
    "cross_entropy, summed": (
        lambda x, y: F.cross_entropy(x, y, reduction="sum"),
        sentences,
        tokens,
    ),
    "nll_loss": (lambda x, y: F.nll_loss(x.log_softmax(-1), y), sentences, tokens),
    "mse_loss": (F.mse_loss, sentences, sentences.sin()),
    "mse_loss of numbers": (lambda x, y: F.mse_loss(x.sum(), y.mean()), sentences, sentences),
    "binary_cross_entropy_with_logits": (
        lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid(), reduction="sum"),
        sentences,
        sentences,
    ),
    "huber_loss": (lambda x, y: F.huber_loss(x, y, delta=0.5), sentences, sentences.cos()),
    "sums": (lambda x: (x.sum(), x.sum(-1), x.mean((0, 1)), x.mean(0, keepdim=True)), sentences),
    "largest": (lambda x: (x.amax(-1), x.max(0).values, x.max(), x.logsumexp(0)), sentences),
    "places": (lambda x: (x.argmax(-1), x.topk(2).indices, x.sort(0).values), sentences),
    "var": (lambda x: (x.var(-1), x.std(0, unbiased=False), x.var()), sentences),
    "softmax": (lambda x: (x.softmax(-1), F.log_softmax(x, 0), x.cumsum(0)), sentences),
    "norms": (
        lambda x: (x.norm(), x.norm(dim=-1), torch.linalg.vector_norm(x), F.normalize(x)),
        sentences,
    ),
    "pieces": (
        lambda x: (x.chunk(2)[1], x.split([1, 3], -1)[1], *x.unbind(1), x.narrow(0, 1, 2)),
        sentences,
    ),
    "shapes": (
        lambda x: (x.flatten(), x.flatten(0, 0), x[None].squeeze(0), x.unflatten(1, (2, 2))),
        sentences,
    ),
    "more shapes": (
        lambda x: (x.movedim(0, 1), x[:, :3].diagonal(), x[None].squeeze(), x.flip(0)),
        sentences,
    ),
    "joined": (lambda x, y: (torch.cat([x, y], -1), torch.stack([x, y], 1)), *[sentences] * 2),
    "pad": (lambda x: F.pad(x, (1, 2), value=3.0), sentences),
    "gather": (lambda x, i: x.gather(1, i[:, None]), sentences, tokens),
    "one_hot": (lambda i: F.one_hot(i, 4) * 2, tokens),
    "dropout in evaluation": (lambda x: F.dropout(x, 0.5, training=False) * 2, sentences),
}


def differentiable(x: torch.Tensor) -> bool:
    return x.is_floating_point()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.sweep(0.34)
def test_functions_of_batches(name):
    """Values, and gradients by each input of its own."""
    function, *inputs = FUNCTIONS[name]
    places = tuple(i for i, v in enumerate(inputs) if differentiable(v))

    def loss(*given: torch.Tensor) -> tuple:
        out = function(*given)
        floats = [y for y in tree_leaves(out) if y.is_floating_point()]
        return sum((y * (1 + k)).sin().sum() for k, y in enumerate(floats)), out

    def step() -> object:
        if not places:
            return torch.vmap(function)(*inputs)
        return torch.vmap(grad(loss, argnums=places, has_aux=True))(*inputs)

    compare(step, 4, tolerance=1e-4)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if sampled(n, of=3)])
def test_functions_of_a_batch_and_what_all_share(name):
    function, *inputs = FUNCTIONS[name]
    for alone in range(len(inputs)):
        dims = tuple(0 if i == alone else None for i in range(len(inputs)))
        given = [v if i == alone else v[0] for i, v in enumerate(inputs)]
        compare(lambda d=dims, g=given: torch.vmap(function, d)(*g), 4, tolerance=1e-4)


def test_a_batch_costs_no_call_for_each_element():
    def launches(count: int) -> int:
        rows, weights = randn(count, 6), randn(4, 6)
        step = tracejit.compile(
            lambda: torch.vmap(
                grad(lambda w, x: F.cross_entropy(F.layer_norm(w @ x, (4,)), torch.tensor(1))),
                in_dims=(None, 0),
            )(weights, rows)
        )
        step()
        return len(step.plans[-1].launches)

    assert launches(3) == launches(100) < 8


# ---- gradients by sample


class Sentence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.words(ids)).mean(1))


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "perceptron": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3)),
        randn(BATCH, 4),
    ),
    "convolutions": lambda: (
        nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
        ),
        randn(BATCH, 1, 8, 8),
    ),
    "transformer": lambda: (Sentence(), torch.arange(BATCH * 5).reshape(BATCH, 5) % 7),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # eager's
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sweep(1)
def test_training_with_gradients_clipped_by_sample(name):
    """As differentially private training does it, without its noise."""

    def make() -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
        targets = torch.arange(BATCH) % 3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)

        def loss(parameters: dict, sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            out = functional_call(model, parameters, (sample.unsqueeze(0),))
            return F.cross_entropy(out, target.unsqueeze(0))

        by_sample = torch.vmap(grad_and_value(loss), in_dims=(None, 0, 0))

        def step() -> torch.Tensor:
            parameters = {k: p.detach() for k, p in model.named_parameters()}
            gradients, losses = by_sample(parameters, inputs, targets)
            squares = sum(g.flatten(1).square().sum(1) for g in gradients.values())
            factors = (0.5 / squares.sqrt()).clamp(max=1.0)
            for k, p in model.named_parameters():
                p.grad = torch.einsum("b...,b->...", gradients[k], factors) / BATCH
            optimizer.step()
            return losses.mean()

        return step, [*model.parameters()]

    (eager, theirs), (plain, ours) = make(), make()
    compiled = tracejit.compile(plain, on_unsupported="raise")
    for _ in range(10):
        torch.testing.assert_close(compiled(), eager(), rtol=1e-4, atol=1e-5)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert compiled.stats.replays >= 7, compiled.explain_mode()


# ---- what eager rejects, and what is refused


def written(x: torch.Tensor) -> torch.Tensor:
    x.detach().mul_(2)
    return x.sum()


@pytest.mark.parametrize(
    ("step", "kind", "says"),
    [
        (lambda: grad(lambda x: x * 2)(x), RuntimeError, "return a scalar Tensor"),
        (lambda: grad(lambda x: 3.0)(x), RuntimeError, "to return a Tensor"),
        (lambda: grad(lambda x: x.sum(), has_aux=True)(x), RuntimeError, "should be a tuple"),
        (lambda: grad(lambda x: x.sum())(torch.arange(3)), RuntimeError, "floating point"),
        (lambda: grad(lambda x: x.add_(1).sum())(x), RuntimeError, "leaf"),
        (lambda: vjp(wave, x)[1]((x, x)), RuntimeError, "pytree structure"),
        (lambda: jvp(wave, x, (x,)), RuntimeError, "primals to be a tuple"),
        (lambda: jvp(wave, (x,), x), RuntimeError, "same python structure"),
        (lambda: jvp(lambda x: M, (x,), (x,), strict=True), RuntimeError, "strict"),
    ],
)
def test_what_eager_rejects(step, kind, says):
    for run in (step, tracejit.compile(step, on_unsupported="raise")):
        with pytest.raises(kind, match=says):
            run()


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (lambda: grad(written)(x), "write to a clone"),
        (lambda: jacrev(lambda x: x.repeat(30))(x), "batches of up to 64"),
        (lambda: torch.func.functionalize(lambda x: x.sin())(x), "functionalize"),
        (
            lambda: torch.vmap(lambda v: torch.autograd.grad((w * v).sum(), w)[0])(M),
            "not of the batch",
        ),
    ],
)
def test_what_is_refused(step, says):
    with pytest.raises(UnsupportedOperation, match=says):
        tracejit.compile(step, on_unsupported="raise")()


def test_what_is_refused_is_run_by_eager():
    given = x.clone()
    with pytest.warns(TracejitWarning, match="write to a clone"):
        found = tracejit.compile(lambda: grad(written)(given), on_unsupported="eager")()
    torch.testing.assert_close(found, torch.ones(3))
    torch.testing.assert_close(given, x * 2)


def test_a_second_backward_of_what_was_freed():
    def step() -> torch.Tensor:
        _, pull = vjp(lambda x: x.sin().exp(), x)
        pull(x, retain_graph=False)
        return pull(x)[0]

    with pytest.raises(RuntimeError):
        step()
    with pytest.raises((AutogradError, RuntimeError)):
        tracejit.compile(step, on_unsupported="raise")()


# ---- what is returned of what a function is differentiated by


def _inner(y: torch.Tensor) -> torch.Tensor:
    def outer(t: torch.Tensor) -> tuple:
        slope, same = grad(lambda s: (s.sin().sum(), s), has_aux=True)(t)
        return slope.sum(), same

    return grad(outer, has_aux=True)(y)[1]


def _of_jvp(y: torch.Tensor) -> torch.Tensor:
    return torch.func.jvp(lambda t: t, (y,), (torch.ones_like(y),))[0]


RETURNED: dict[str, Callable] = {
    "grad": lambda y: grad(lambda t: (t.sin().sum(), t), has_aux=True)(y)[1],
    "with value": lambda y: grad_and_value(lambda t: (t.sin().sum(), t), has_aux=True)(y)[1][1],
    "vjp": lambda y: vjp(lambda t: t, y)[0],
    "aux of vjp": lambda y: vjp(lambda t: (t.sin(), t), y, has_aux=True)[2],
    "jvp": _of_jvp,
    "jacrev": lambda y: torch.func.jacrev(lambda t: (t.sin(), t), has_aux=True)(y)[1],
    "jacfwd": lambda y: torch.func.jacfwd(lambda t: (t.sin(), t), has_aux=True)(y)[1],
    "inner level": _inner,
    "under no_grad": lambda y: without_grad(lambda: RETURNED["grad"](y)),
    "view": lambda y: grad(lambda t: (t.sin().sum(), t.mT[1:, 2:]), has_aux=True)(y)[1],
    "vmap": lambda y: torch.vmap(RETURNED["grad"])(y),
    "view in vmap": lambda y: torch.vmap(RETURNED["row"])(y),
    "row": lambda y: grad(lambda t: (t.sin().sum(), t[1:]), has_aux=True)(y)[1],
    "itself": lambda y: torch.vmap(
        grad(lambda t: (t.sin().sum(), t.flatten(0, 0)), has_aux=True),
    )(y)[1],
    "no view": lambda y: grad(lambda t: (t.sin().sum(), t * 2), has_aux=True)(y)[1],
}


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_of_an_argument_is_its_memory(name, leaf):
    """The very tensor, or a view of it; later writes are seen there."""
    function = RETURNED[name]
    y = torch.randn(4, 3, requires_grad=leaf)

    def seen(out: torch.Tensor) -> tuple:
        same = out.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
        place = (out.storage_offset(), out.stride()) if same else None
        return out is y, same, place, out.shape, out.requires_grad

    compiled = tracejit.compile(function, on_unsupported="raise", backend="numpy")
    expected = function(y)
    for _ in range(4):
        ours = compiled(y)
        assert seen(ours) == seen(expected)
        torch.testing.assert_close(ours, expected)
