"""Language models whole, as their authors write them: dropout, clipping, schedules, in replay."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from functools import partial

import pytest
import torch
from torch import nn

import tracejit
from examples import gpt
from support import encoder_nets, language_nets
from support.language_nets import LENGTH, VOCABULARY
from support.scope import WHOLE
from tracejit.testing import assert_equal_to_eager, losses_agree

Tensor = torch.Tensor
Batch = tuple[Tensor, ...]


def tokens(*, padded: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, which of them are there, and themselves as labels, -100 where there is none."""
    x = torch.randint(1, VOCABULARY, (3, LENGTH))
    mask = torch.ones_like(x)
    if padded:
        mask[0, 9:] = mask[2, 5:] = 0
    return x * mask, mask, x.masked_fill(mask == 0, -100)


def masked_tokens() -> Batch:
    """BERT's: two sentences, of whose tokens some are to be found."""
    x, mask, labels = tokens()
    kinds = (torch.arange(LENGTH) > 5).long().expand(3, -1)
    asked = torch.rand(x.shape) < 0.4
    asked[1, 0] = True
    return x, mask, kinds, labels.where(asked, -100), torch.tensor([0, 1, 1])


def images(*labels: Tensor) -> Batch:
    return (torch.randn(3, 3, 12, 12), *labels)


def classes(*shape: int) -> Tensor:
    return torch.randint(5, shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "gpt2": (language_nets.GPT2, tokens),
    "llama": (lambda: language_nets.Llama("llama"), tokens),
    "mistral": (lambda: language_nets.Llama("mistral"), tokens),
    "qwen3": (lambda: language_nets.Llama("qwen3"), tokens),
    "mamba": (language_nets.Mamba, lambda: tokens(padded=False)[::2]),
    "bert": (encoder_nets.Bert, masked_tokens),
    "t5": (encoder_nets.T5, tokens),
    "vit": (encoder_nets.ViT, lambda: images(classes(3))),
    "clip": (encoder_nets.CLIP, lambda: (tokens()[0], *images())),
    "whisper": (encoder_nets.Whisper, lambda: (torch.randn(2, 6, 24), classes(2, 12))),
}


def groups_of(model: nn.Module) -> list[dict]:
    """Parameters with weight decay, and without: biases and norms."""
    plain = ("bias", "norm", "ln_", "LayerNorm")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    without = [p for n, p in named if any(word in n for word in plain)]
    decayed = [p for n, p in named if not any(word in n for word in plain)]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": without, "weight_decay": 0.0}]


def make_step(name: str) -> tuple[Callable[..., Tensor], Batch, nn.Module]:
    """A training step, a batch for it, and its model."""
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model, given = make(), batch()
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / 3, 1.0) * 0.5 * (1 + math.cos(math.pi * n / 20))
    )

    def step(*batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.detach()

    return step, given, model


def train(step: Callable[..., Tensor], batches: Iterable[Batch]) -> list[float]:
    torch.manual_seed(1)  # of dropout
    return [step(*batch).item() for batch in batches]


def check_losses(ours: list[float], eager: list[float]) -> None:
    for mine, theirs in zip(ours, eager, strict=True):
        assert losses_agree(mine, theirs, eager[0])
    assert len(set(ours)) == len(ours)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sweep(12)
def test_models_train_like_eager_and_replay(name):
    """From one seed, with eager's own numbers for dropout."""
    plain, batch, _ = make_step(name)
    eager = train(plain, [batch] * 10)
    step, batch, _ = make_step(name)
    compiled = tracejit.compile(step, on_unsupported="raise")
    check_losses(train(compiled, [batch] * 10), eager)
    assert compiled.stats.replays >= 7, compiled.explain_mode()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sweep(10)
def test_models_in_lockstep(name):
    step, batch, model = make_step(name)
    state = [*model.parameters()]
    compiled = assert_equal_to_eager(
        step, lambda: batch, calls=4, state=state, on_unsupported="raise", backend="numpy"
    )
    assert compiled.stats.replays, compiled.explain_mode()


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_example_trains_like_eager(bf16, capsys):
    """From one seed, with dropout, clipping and a schedule that cycles betas too."""
    sizes = {"batch": 4, "layers": 2, "width": 16, "dropout": 0.1}
    ours, eager = gpt.main(steps=100, bf16=bf16, eager=True, **sizes)
    if bf16:  # one rounding another way is 2^-8 of a value
        assert ours == pytest.approx(eager, rel=2**-8)
    else:
        check_losses(ours, eager)
    assert "replay: 1 plan(s) armed" in capsys.readouterr().out


# ---- nanoGPT's loop


class NanoRun:
    """nanoGPT's `train.py`, its loop's body as the step: rates by a counter, accumulation, autocast
    or none, a scaler that is off, messages every few steps, and checkpoints."""

    warmup_iters, lr_decay_iters, learning_rate, min_lr = 4, 30, 6e-4, 6e-5
    log_interval, eval_interval, gradient_accumulation_steps, grad_clip = 5, 16, 2, 1.0

    def __init__(self, ctx: object) -> None:
        torch.manual_seed(0)
        self.ctx, self.model = ctx, language_nets.NanoGPT(layers=2 if WHOLE else 1)
        self.optimizer = self.model.configure_optimizers(0.1, self.learning_rate)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.iter_num, self.running, self.checkpoint = 0, -1.0, None
        self.data = torch.randint(VOCABULARY, (8, 2, 3, LENGTH))

    def get_lr(self, it: int) -> float:
        """Cosine with warm-up, from 100% to 10%."""
        if it < self.warmup_iters:
            return self.learning_rate * (it + 1) / (self.warmup_iters + 1)
        if it > self.lr_decay_iters:
            return self.min_lr
        decay_ratio = (it - self.warmup_iters) / (self.lr_decay_iters - self.warmup_iters)
        assert 0 <= decay_ratio <= 1
        coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
        return self.min_lr + coeff * (self.learning_rate - self.min_lr)

    def step(self, batches: Tensor) -> Tensor:
        lr = self.get_lr(self.iter_num)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = lr
        for micro_step in range(self.gradient_accumulation_steps):
            with self.ctx:
                _, loss = self.model(batches[micro_step][0], batches[micro_step][1])
                loss = loss / self.gradient_accumulation_steps
            self.scaler.scale(loss).backward()
        if self.grad_clip != 0.0:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.iter_num % self.log_interval == 0:
            lossf = loss.item() * self.gradient_accumulation_steps
            self.running = lossf if self.running == -1.0 else 0.9 * self.running + 0.1 * lossf
            print(f"iter {self.iter_num}: loss {lossf:.4f}, mfu {self.running * 100:.1f}%")
            print("iter %d: lr %.3e" % (self.iter_num, lr))  # noqa: UP031
        if self.iter_num % self.eval_interval == 0 and self.iter_num > 0:
            model = {name: x.clone() for name, x in self.model.state_dict().items()}
            self.checkpoint = {"model": model, "iter_num": self.iter_num}
        self.iter_num += 1
        return loss.detach()


def run_of_nanogpt(of: NanoRun, step: Callable[..., Tensor]) -> tuple[list[float], str]:
    """The losses of 20 steps, and what they print, to the digits that rounding leaves alone."""
    torch.manual_seed(1)
    printed = io.StringIO()
    with redirect_stdout(printed):
        losses = [step(of.data[[i % 8, (i + 1) % 8]]).item() for i in range(20)]
    return losses, re.sub(r"(loss|mfu) (\d+\.\d)\d*", r"\1 \2", printed.getvalue())


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_loop_of_nanogpt(bf16):
    """What is printed keeps those calls in rerun; all others replay."""
    context = partial(torch.amp.autocast, "cpu", torch.bfloat16) if bf16 else nullcontext
    plain = NanoRun(context())
    eager, said = run_of_nanogpt(plain, plain.step)
    mine = NanoRun(context())
    compiled = tracejit.compile(mine.step, on_unsupported="raise")
    ours, says = run_of_nanogpt(mine, compiled)
    for a, b in zip(ours, eager, strict=True):
        assert abs(a - b) <= (1e-3 if bf16 else 1e-5) * b
    assert bf16 or says == said
    assert mine.iter_num == plain.iter_num == 20
    assert mine.checkpoint["iter_num"] == plain.checkpoint["iter_num"] == 16
    for name, x in plain.checkpoint["model"].items():
        assert torch.allclose(mine.checkpoint["model"][name], x, atol=2e-3 if bf16 else 1e-5)
    assert compiled.stats.replays >= 6, compiled.explain_retraces()
