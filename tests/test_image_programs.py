"""Steps as people write them around images and sequences of two lengths: a diffusion model, a
variational autoencoder, a contrastive pair of encoders, segmentation, mixed images, translation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tracejit
from tracejit.testing import losses_agree

Step = Callable[..., Tensor]
PROGRAMS: dict[str, tuple[Callable[[], tuple[Step, list[tuple]]], int]] = {}


def program(replays: int) -> Callable:
    """A function that makes a step and its batches; of 12 calls so many are to be replayed."""

    def register(make: Callable) -> Callable:
        PROGRAMS[make.__name__] = make, replays
        return make

    return register


def updated(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


class Residual(nn.Module):
    """Two convolutions; the time scales and shifts what lies between."""

    def __init__(self, before: int, after: int, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, before), nn.GroupNorm(2, after)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.time, self.drop = nn.Linear(width, 2 * after), nn.Dropout(0.1)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.conv2(self.drop(F.silu(h))) + self.skip(x)


class Denoiser(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.down, self.middle, self.up = Residual(4, 8), Residual(8, 8), Residual(16, 4)
        self.smaller = nn.Conv2d(8, 8, 3, 2, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10000) * torch.arange(self.width // 2) / (self.width // 2))
        angles = t[:, None].float() * rates[None]
        time = self.embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        high = self.down(self.first(x), time)
        low = self.smaller(high)
        tokens = low.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        low = self.middle(tokens.transpose(1, 2).reshape(low.shape), time)
        low = F.interpolate(low, scale_factor=2, mode="nearest")
        return self.last(self.up(torch.cat([low, high], dim=1), time))


@program(replays=7)
def diffusion_with_an_average():
    """The average's decay rises with the steps."""
    model = Denoiser()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 50), 0)
    state = {"steps": 0}

    def step(x: Tensor) -> Tensor:
        t, noise = torch.randint(0, 50, (x.shape[0],)), torch.randn_like(x)
        share = kept[t].view(-1, 1, 1, 1)
        noisy = share.sqrt() * x + (1 - share).sqrt() * noise
        loss = F.mse_loss(model(noisy, t), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state["steps"] += 1
        decay = min(0.999, (10 + state["steps"]) / (20 + state["steps"]))
        with torch.no_grad():
            for mean, p in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(p, 1 - decay)
        return loss.detach() + sum(p.abs().sum() for p in average.parameters())

    return step, [(torch.rand(3, 2, 8, 8) * 2 - 1,) for _ in range(2)]


@program(replays=8)
def autoencoder_with_a_warm_up():
    encode = nn.Sequential(
        *(nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 8, 4, 2, 1)),
        *(nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(8 * 9, 10)),
    )
    decode = nn.Sequential(
        *(nn.Linear(5, 8 * 9), nn.Unflatten(1, (8, 3, 3)), nn.ConvTranspose2d(8, 4, 4, 2, 1)),
        *(nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 1, 4, 2, 1)),
    )
    optimizer = torch.optim.Adam([*encode.parameters(), *decode.parameters()], lr=1e-3)
    state = {"steps": 0}

    def step(x: Tensor) -> Tensor:
        mean, log_variance = encode(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        wrong = F.binary_cross_entropy_with_logits(decode(z), x, reduction="sum") / x.shape[0]
        far = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(1).mean()
        weight = min(1.0, state["steps"] / 20)
        state["steps"] += 1
        return updated(wrong + weight * far, optimizer)

    return step, [(torch.rand(4, 1, 12, 12),) for _ in range(2)]


@program(replays=8)
def images_and_texts():
    image = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 12),
    )
    words, text = nn.EmbeddingBag(31, 16, mode="mean", padding_idx=0), nn.Linear(16, 12)
    scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    weights = [*image.parameters(), *words.parameters(), *text.parameters()]
    decayed = {"params": [p for p in weights if p.dim() > 1], "weight_decay": 0.2}
    others = {"params": [p for p in weights if p.dim() < 2] + [scale], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, others], lr=1e-3, betas=(0.9, 0.98), eps=1e-6)

    def step(x: Tensor, ids: Tensor) -> Tensor:
        a, b = F.normalize(image(x), dim=-1), F.normalize(text(words(ids)), dim=-1)
        logits, own = scale.exp() * a @ b.t(), torch.arange(len(x))
        loss = updated(
            (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2, optimizer
        )
        with torch.no_grad():
            scale.clamp_(0, math.log(100))
        right = (logits.argmax(1) == own).float().mean().item()
        return loss + right + scale.detach()

    return step, [(torch.randn(5, 3, 8, 8), torch.randint(0, 31, (5, 6))) for _ in range(3)]


@program(replays=6)
def segmentation_scored_by_overlap():
    """How many pixels have a class is part of the plan: two batches, two plans."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)),
        *(nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 4, 1)),
    )
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = torch.tensor([0.2, 1.0, 1.0, 2.0])

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        logits = net(x)
        shares, known = logits.softmax(1), (y >= 0)[:, None]
        given = F.one_hot(y.clamp(min=0), 4).permute(0, 3, 1, 2).to(shares)
        both = (shares * given * known).sum((0, 2, 3))
        all_ = ((shares + given) * known).sum((0, 2, 3))
        loss = 1 - ((2 * both + 1) / (all_ + 1))[1:].mean()
        loss = loss + F.cross_entropy(logits, y, weight=weight, ignore_index=-1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_value_(net.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        seen = y >= 0
        pairs = torch.bincount(y[seen] * 4 + logits.argmax(1)[seen], minlength=16).view(4, 4)
        union = pairs.sum(0) + pairs.sum(1) - pairs.diag()
        return loss.detach() + (pairs.diag() / union.clamp(min=1)).mean()

    batches = [(torch.randn(2, 3, 8, 8), torch.randint(-1, 4, (2, 8, 8))) for _ in range(2)]
    return step, batches


@program(replays=0)
def images_with_a_part_of_others():
    """The size of the part is drawn: each is another plan, so the calls are rerun."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(8, 10),
        ),
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, nesterov=True)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)

    def step(x: Tensor, y: Tensor) -> Tensor:
        share, order = np.random.beta(1.0, 1.0), torch.randperm(x.size(0))
        height, width = x.size(2), x.size(3)
        h, w = int(height * np.sqrt(1 - share)), int(width * np.sqrt(1 - share))
        row, column = np.random.randint(height), np.random.randint(width)
        top, bottom = np.clip(row - h // 2, 0, height), np.clip(row + h // 2, 0, height)
        left, right = np.clip(column - w // 2, 0, width), np.clip(column + w // 2, 0, width)
        x = x.clone()
        x[:, :, top:bottom, left:right] = x[order, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
        out = net(x)
        return updated(share * loss_of(out, y) + (1 - share) * loss_of(out, y[order]), optimizer)

    return step, [(torch.randn(6, 3, 8, 8), torch.randint(10, (6,)))]


class Translator(nn.Module):
    def __init__(self, words: int = 23, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.encode = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.bridge, self.keys = nn.Linear(2 * width, width), nn.Linear(2 * width, width)
        self.cell, self.out = nn.GRUCell(3 * width, width), nn.Linear(3 * width, words)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor, given: float) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(source), lengths, batch_first=True, enforce_sorted=False
        )
        states, last = self.encode(packed)
        states, _ = nn.utils.rnn.pad_packed_sequence(
            states, batch_first=True, total_length=source.shape[1]
        )
        h = self.bridge(torch.cat([last[0], last[1]], dim=-1)).tanh()
        word, found = target[:, 0], []
        for t in range(1, target.shape[1]):
            scores = torch.bmm(self.keys(states), h.unsqueeze(2)).squeeze(2)
            shares = scores.masked_fill(source == 0, -1e9).softmax(-1)
            seen = torch.bmm(shares.unsqueeze(1), states).squeeze(1)
            h = self.cell(torch.cat([self.embed(word), seen], dim=-1), h)
            found.append(self.out(torch.cat([h, seen], dim=-1)))
            word = torch.where(torch.rand(()) < given, target[:, t], found[-1].argmax(-1))
        return torch.stack(found, dim=1)


@program(replays=8)
def translation_with_given_words():
    model = Translator()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def step(source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        logits = model(source, lengths, target, 0.5).transpose(1, 2)
        return updated(F.cross_entropy(logits, target[:, 1:], ignore_index=0), optimizer)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.tensor([7, 3, 5, 7])[torch.randperm(4)]
        source = torch.randint(1, 23, (4, 7)) * (torch.arange(7) < lengths[:, None])
        return source, lengths, torch.randint(1, 23, (4, 6))

    return step, [batch() for _ in range(2)]


def losses_of(make: Callable, *, compiled: bool) -> tuple[list[float], object, Tensor]:
    torch.manual_seed(0)
    np.random.seed(0)
    step, batches = make()
    if compiled:
        step = tracejit.compile(step, on_unsupported="raise", backend="numpy")
    torch.manual_seed(1)
    losses = [float(step(*batches[i % len(batches)])) for i in range(12)]
    return losses, step, torch.get_rng_state()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name.startswith("diffusion") else [])
        for name in PROGRAMS
    ],
)
def test_trains_like_eager(name):
    make, replays = PROGRAMS[name]
    eager, _, after = losses_of(make, compiled=False)
    ours, compiled, state = losses_of(make, compiled=True)
    for mine, theirs in zip(ours, eager, strict=True):
        assert losses_agree(mine, theirs, eager[0])
    assert len(set(ours)) == len(ours)
    assert torch.equal(state, after)
    assert compiled.stats.replays >= replays, compiled.explain_retraces()
