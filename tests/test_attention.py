"""Attention in compiled steps: torch's modules in all their options, and transformers whole."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tracejit
from support.attention_nets import NETS, make_step
from support.fake import FAKE
from support.function_samples import r
from tracejit.errors import AutogradError, UnsupportedOperation
from tracejit.report import report
from tracejit.rows import limits
from tracejit.testing import assert_equal_to_eager, fake_device, losses_agree

ROWS, LENGTH, WIDTH = 3, 5, 8

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True:UserWarning", "ignore:.*nested tensors:UserWarning"
)


# ---- whole programs


@pytest.mark.parametrize("net", NETS)
@pytest.mark.sweep(8)
def test_programs_train_like_eager_and_replay(net):
    """With dropout on: eager's own numbers."""
    steps = [make_step(net) for _ in range(2)]
    plain, compiled = steps[0][0], tracejit.compile(steps[1][0], on_unsupported="raise")
    losses = []
    for step in (plain, compiled):
        torch.manual_seed(1)
        losses.append([step().item() for _ in range(10)])
    for ours, eager in zip(losses[1], losses[0], strict=True):
        assert losses_agree(ours, eager, losses[0][0])
    assert compiled.stats.replays >= 7, compiled.explain_mode()
    assert len(set(losses[1])) == 10


@pytest.mark.parametrize("net", NETS)
@pytest.mark.sweep(8)
def test_programs_in_lockstep(net):
    step, state = make_step(net)
    compiled = assert_equal_to_eager(step, calls=4, state=state, on_unsupported="raise")
    assert compiled.stats.replays, compiled.explain_mode()


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("net", ["encoder", "decoder"])
def test_programs_interpreted(net):
    step, state = make_step(net)
    assert_equal_to_eager(step, calls=1, state=state, backend="interpret", on_unsupported="raise")


# ---- modules


def mha(**options: object) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)


def mask(rows: int, columns: int) -> torch.Tensor:
    """A mask that hides keys, all of them from the second query."""
    hidden = r(rows, columns, dtype=torch.bool)
    hidden[:, 0], hidden[1] = False, True
    return hidden


PADDING = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
PADDING[0, 3:], PADDING[2, 1:] = True, True
HOLES = PADDING.flip(1)
BLIND = PADDING.clone()
BLIND[1] = True
MASK = mask(LENGTH, LENGTH)


def layer(**options: object) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 12, 0.2, batch_first=True, **options)


def encoder(**options: object) -> Callable[[], nn.Module]:
    nested = options.pop("enable_nested_tensor", True)
    return lambda: nn.TransformerEncoder(layer(**options), 2, enable_nested_tensor=nested)


def decoder(**options: object) -> Callable[[], nn.Module]:
    made = {"batch_first": True, **options}
    return lambda: nn.TransformerDecoder(
        nn.TransformerDecoderLayer(WIDTH, 2, 12, 0.2, **made), 2, nn.LayerNorm(WIDTH)
    )


def attends(**options: object) -> Callable:
    return lambda m, x: m(x, x, x, **options)


def encodes(**options: object) -> Callable:
    return lambda m, x: m(x, **options)


def decodes(**options: object) -> Callable:
    return lambda m, x: m(x, x[:, :4] * 0.5, **options)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)
Case = tuple[Callable[[], nn.Module], Callable]
MODULES: dict[str, Case] = {
    "mha": (mha(), attends()),
    "mha, no weights": (mha(dropout=0.3), attends(need_weights=False)),
    "mha, weights of heads": (mha(), attends(average_attn_weights=False)),
    "mha, padding": (mha(), attends(key_padding_mask=PADDING)),
    "mha, blind": (mha(), attends(key_padding_mask=BLIND, need_weights=False)),
    "mha, masked": (mha(), attends(attn_mask=MASK, need_weights=False)),
    "mha, both": (mha(), attends(attn_mask=MASK, key_padding_mask=PADDING)),
    "mha, float mask": (mha(), attends(attn_mask=r(LENGTH, LENGTH), need_weights=False)),
    "mha, causal": (mha(), attends(attn_mask=CAUSAL, is_causal=True, need_weights=False)),
    "mha, mask of heads": (mha(), attends(attn_mask=r(2 * ROWS, LENGTH, LENGTH))),
    "mha, seq first": (lambda: nn.MultiheadAttention(WIDTH, 2, 0.1), attends()),
    "mha, bias of keys": (mha(add_bias_kv=True), attends(key_padding_mask=PADDING)),
    "mha, zero": (mha(add_zero_attn=True), attends(attn_mask=MASK, need_weights=False)),
    "mha, no bias": (mha(bias=False), attends()),
    "mha, odd heads": (lambda: nn.MultiheadAttention(WIDTH, 1, batch_first=True), attends()),
    "mha, apart": (mha(kdim=3, vdim=2), lambda m, x: m(x, x[:, :4, :3], x[:, :4, 2:4])),
    "mha, cross": (mha(), lambda m, x: m(x, x[:, :3], x[:, :3] * 2)),
    "mha, one sequence": (mha(), lambda m, x: m(x[0], x[0], x[0], key_padding_mask=PADDING[0])),
    "layer": (layer, encodes()),
    "layer, gelu, first": (lambda: layer(norm_first=True, activation="gelu"), encodes()),
    "layer, silu": (lambda: layer(activation=F.silu), encodes(src_mask=CAUSAL, is_causal=True)),
    "layer, blind": (layer, encodes(src_key_padding_mask=BLIND)),
    "layer, masked": (layer, encodes(src_mask=MASK)),
    "layer, both": (layer, encodes(src_mask=MASK, src_key_padding_mask=PADDING)),
    "encoder": (encoder(), encodes()),
    "encoder, padding": (encoder(), encodes(src_key_padding_mask=PADDING)),
    "encoder, holes": (encoder(), encodes(src_key_padding_mask=HOLES)),
    "encoder, causal": (encoder(norm_first=True), encodes(mask=CAUSAL)),
    "encoder, plain": (
        encoder(enable_nested_tensor=False),
        encodes(src_key_padding_mask=PADDING),
    ),
    "decoder": (decoder(), decodes()),
    "decoder, causal": (decoder(norm_first=True), decodes(tgt_mask=CAUSAL, tgt_is_causal=True)),
    "decoder, padding": (
        decoder(activation="gelu"),
        decodes(tgt_key_padding_mask=PADDING, memory_key_padding_mask=PADDING[:, :4]),
    ),
    "transformer": (
        lambda: nn.Transformer(WIDTH, 2, 1, 1, 12, 0.1, batch_first=True),
        lambda m, x: m(x, x * 2, tgt_mask=CAUSAL),
    ),
}


def close(ours: torch.Tensor, eager: torch.Tensor, within: float, **options: bool) -> None:
    """Whether a tensor is eager's, in parts of its largest element."""
    atol = within * float(1 + eager.detach().nan_to_num().abs().max())
    torch.testing.assert_close(ours, eager, equal_nan=True, atol=atol, rtol=0, **options)


def compare(step: Callable, x: torch.Tensor, *, strides: bool) -> None:
    """What a step returns, over some calls with eager's random numbers."""
    compiled = tracejit.compile(step, on_unsupported="raise")
    for call in range(4):
        found = []
        for run in (step, compiled):
            torch.manual_seed(call)
            found.append(run(x * (1 + call)))
        for eager, ours in zip(*found, strict=True):
            within = {"atol": 1e-5 * float(1 + eager.nan_to_num().abs().max()), "rtol": 1e-5}
            torch.testing.assert_close(ours, eager, equal_nan=True, check_stride=strides, **within)
    assert compiled.stats.replays, compiled.explain_mode()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.sweep(16)
def test_gradients_of_modules(name, mode):
    torch.manual_seed(0)
    make, use = MODULES[name]
    module = make().train(mode == "train")

    def step(x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        out = use(module, x)
        outs = [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None]
        # squares of what layer norm returns add up to a constant, whose gradient is rounding errors
        total = sum(torch.where(y.isnan(), 0.0, y).sin().sum() for y in outs)
        grads = torch.autograd.grad(total, [x, *module.parameters()])
        return [*(y.detach() for y in outs), *grads]

    compare(step, r(ROWS, LENGTH, WIDTH), strides=False)


NESTED = {"encoder, padding"}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.sweep(8)
def test_modules_in_evaluation_without_gradients(name):
    """Where eager takes native functions: NaN where a query sees no key, and their strides."""
    torch.manual_seed(0)
    make, use = MODULES[name]
    module = make().eval()

    def step(x: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            out = use(module, x)
        return [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None]

    if name in NESTED:
        with pytest.raises(UnsupportedOperation, match="enable_nested_tensor=False"):
            tracejit.compile(step, on_unsupported="raise")(r(ROWS, LENGTH, WIDTH))
    else:
        compare(step, r(ROWS, LENGTH, WIDTH), strides=True)


def test_an_encoder_with_a_nested_tensor_falls_back():
    module = encoder()().eval()

    def step(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return module(x, src_key_padding_mask=padding)

    compiled, x = tracejit.compile(step, on_unsupported="eager"), r(ROWS, LENGTH, WIDTH)
    with pytest.warns(UserWarning, match="enable_nested_tensor=False"):
        torch.testing.assert_close(compiled(x, PADDING), step(x, PADDING))


def test_a_mask_that_is_aligned_in_one_call_and_not_in_the_next():
    """The check is a decision on values; with gradients both go the same way."""
    module = encoder()().eval()

    def step(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return module(x, src_key_padding_mask=padding).detach()

    compiled, x = tracejit.compile(step, on_unsupported="raise"), r(ROWS, LENGTH, WIDTH)
    for padding in (PADDING, PADDING, HOLES, PADDING, HOLES, HOLES, PADDING):
        torch.testing.assert_close(compiled(x, padding), step(x, padding))


# ---- one function


def test_eager_refuses_what_it_has_saved():
    """The fused implementation saves its operands and its result."""
    for which in range(4):

        def step(*xs: torch.Tensor, which: int = which) -> torch.Tensor:
            q, k, v = (x * 1.0 for x in xs)
            y = F.scaled_dot_product_attention(q, k, v)
            (q, k, v, y)[which].add_(1)
            y.sum().backward()
            return y

        xs = [r(1, 2, 3, 4).requires_grad_() for _ in range(3)]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            step(*xs)
        with pytest.raises(AutogradError):
            tracejit.compile(step, on_unsupported="raise")(*xs)


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_scale_that_changes(dtype, backend):
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> list[torch.Tensor]:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (q, k, v))]

    compiled = tracejit.compile(step, backend=backend, on_unsupported="raise")
    for call in range(5):
        xs, scale = (
            [r(2, 3, 17, 8, dtype=dtype).requires_grad_() for _ in range(3)],
            0.1 + 0.2 * call,
        )
        for ours, eager in zip(compiled(*xs, scale), step(*xs, scale), strict=True):
            close(ours, eager, 0.03 if dtype.itemsize == 2 else 1e-5)
    assert compiled.stats.replays >= 2
    assert len(compiled.kernels) >= 1


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
@pytest.mark.parametrize("target", [80, 90, 100])
def test_kernels_keep_the_limits_on_a_gpu(target):
    """No spills, among others: forward and backward, with a mask and without."""
    pytest.importorskip("triton")
    q, k, v = (r(2, 4, 128, 64).requires_grad_() for _ in range(3))
    for options in ({"is_causal": True}, {"attn_mask": r(128, 128)}):

        def step(options: dict = options) -> list[torch.Tensor]:
            y = F.scaled_dot_product_attention(q, k, v, **options)
            return [y.detach(), *torch.autograd.grad(y.square().sum(), (q, k, v))]

        compiled = tracejit.compile(step, on_unsupported="raise")
        compiled()
        found = report(compiled, target=target)
        assert found.rows and not list(limits(found))
        assert not sum(row.facts.spills for row in found.rows)


# ---- steps of more than one block


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [r(*s, dtype=dtype).requires_grad_() for s in shapes]


def blind(rows: int, columns: int) -> torch.Tensor:
    """A mask that shows a few keys, and none to some queries."""
    seen = torch.rand(rows, columns, generator=torch.Generator().manual_seed(3)) < 0.3
    seen[::7] = False
    return seen


def far(rows: int, columns: int) -> torch.Tensor:
    """What is added to scores: less the further off, -inf for some keys."""
    distance = torch.arange(rows)[:, None] - torch.arange(columns)
    return (-0.1 * distance.abs()).masked_fill(distance % 5 == 0, -math.inf)


def alike(*shape: int) -> tuple[tuple[int, ...], ...]:
    return (shape,) * 3


BLOCKS: dict[str, tuple[tuple, dict]] = {
    "causal": (alike(2, 3, 123, 16), {"is_causal": True}),
    "more keys, causal": (((1, 2, 70, 8), (1, 2, 130, 8), (1, 2, 130, 8)), {"is_causal": True}),
    "more queries, causal": (((1, 2, 130, 8), (1, 2, 5, 8), (1, 2, 5, 8)), {"is_causal": True}),
    "one query": (((2, 2, 1, 8), (2, 2, 123, 8), (2, 2, 123, 8)), {}),
    "one key": (((2, 2, 123, 8), (2, 2, 1, 8), (2, 2, 1, 8)), {}),
    "values of another width": (((2, 70, 5), (2, 90, 5), (2, 90, 33)), {}),
    "a bool mask": (alike(2, 2, 123, 8), {"attn_mask": blind(123, 123)}),
    "a float mask": (alike(2, 2, 70, 8), {"attn_mask": far(70, 70)}),
    "a mask of padding": (alike(3, 2, 70, 8), {"attn_mask": blind(3, 70)[:, None, None]}),
    "a mask of each head": (alike(2, 3, 70, 8), {"attn_mask": far(70, 70).repeat(2, 3, 1, 1)}),
    "queries that share heads": (
        ((2, 6, 70, 8), (2, 2, 70, 8), (2, 2, 70, 8)),
        {"enable_gqa": True, "is_causal": True},
    ),
    "a batch that broadcasts": (((3, 2, 70, 8), (1, 2, 66, 8), (2, 66, 8)), {}),
    "no batch": (alike(70, 8), {"is_causal": True}),
    "a scale": (alike(2, 2, 66, 8), {"scale": -3.0}),
    "a batch of nothing": (alike(0, 2, 70, 8), {}),
    "no queries": (((2, 2, 0, 8), (2, 2, 70, 8), (2, 2, 70, 8)), {}),
    "no keys": (((2, 2, 70, 8), (2, 2, 0, 8), (2, 2, 0, 8)), {}),
}


def attention_step(*qkv: torch.Tensor, **options: object) -> list[torch.Tensor]:
    """Attention and its gradients."""
    y = F.scaled_dot_product_attention(*qkv, **options)
    seed = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, qkv, seed)]


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.sweep(3)
def test_steps_of_blocks(name, backend):
    shapes, options = BLOCKS[name]
    compiled = assert_equal_to_eager(
        lambda *qkv: attention_step(*qkv, **options),
        lambda: leaves(*shapes),
        calls=4,
        backend=backend,
        on_unsupported="raise",
    )
    assert compiled.stats.replays, compiled.explain_mode()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "a bool mask", "values of another width"])
@pytest.mark.sweep(3)
def test_steps_of_blocks_in_other_dtypes(name, dtype):
    shapes, options = BLOCKS[name]
    assert_equal_to_eager(
        lambda *qkv: attention_step(*qkv, **options),
        lambda: leaves(*shapes, dtype=dtype),
        on_unsupported="raise",
    )


def test_one_projection_of_queries_keys_and_values():
    """They are read where they lie, and the only buffers are of its size."""
    batch, length, heads, width = 2, 70, 3, 8

    def step(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        qkv = (x @ w).view(batch, length, 3, heads, width).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(), is_causal=True)
        y = y.transpose(1, 2).reshape(batch, length, heads * width)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, w))]

    size = heads * width
    compiled = assert_equal_to_eager(
        step, lambda: leaves((batch, length, size), (size, 3 * size)), on_unsupported="raise"
    )
    (plan,) = compiled.plans
    assert max(b.type.numel for b in plan.buffers) == batch * length * 3 * size


def test_second_derivatives_of_blocks():
    def step(*qkv: torch.Tensor) -> list[torch.Tensor]:
        y = F.scaled_dot_product_attention(*qkv, is_causal=True)
        first = torch.autograd.grad(y.square().sum(), qkv, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), qkv))

    compiled = tracejit.compile(step, on_unsupported="raise")
    qkv = leaves(*alike(1, 2, 70, 8), dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = step(*qkv)
    for ours, eager in zip(compiled(*qkv), theirs, strict=True):
        close(ours, eager, 1e-10)


def test_a_result_with_history_keeps_the_log_sums():
    def step(*qkv: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*qkv, is_causal=True)

    compiled = tracejit.compile(step, on_unsupported="raise")
    for _ in range(4):
        qkv = leaves(*alike(2, 2, 70, 8))
        ours, eager = (torch.autograd.grad(f(*qkv).square().sum(), qkv) for f in (compiled, step))
        for x, y in zip(ours, eager, strict=True):
            close(x, y, 1e-5)


@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_what_is_not_a_number_stays_where_it_is_seen(place):
    """Queries that see no NaN have none; where a mask hides it, as eager has it in its block."""
    qkv = leaves(*alike(1, 1, 70, 8))
    with torch.no_grad():
        qkv["qkv".index(place)][0, 0, 69] = math.nan

    def step(*qkv: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(*qkv, is_causal=True)

    ours, eager = tracejit.compile(step, on_unsupported="raise")(*qkv), step(*qkv)
    assert ours[0, 0, 69].isnan().all() and eager[0, 0, 69].isnan().all()
    if place != "v":  # 0 · NaN
        torch.testing.assert_close(ours[0, 0, :69], eager[0, 0, :69])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_fake_device(dtype):
    pytest.importorskip("triton")
    shapes, options = BLOCKS["causal"]
    with fake_device(compiled=False) as device:
        compiled = assert_equal_to_eager(
            lambda *qkv: attention_step(*qkv, **options),
            lambda: leaves(*shapes, dtype=dtype),
            calls=4,
            backend=FAKE,
            on_unsupported="raise",
        )
    assert compiled.stats.replays >= 1, compiled.explain_mode()
    assert any("attention" in line for line in device.log)
