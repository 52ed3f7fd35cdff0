"""Small transformers, in the manner of those that people train, and a step for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Made = tuple[Callable[[], object], list[torch.Tensor]]
VOCABULARY, WIDTH, HEADS = 19, 16, 4


class Encoder(nn.Module):
    """A classifier of padded sequences: the mean of what nn.TransformerEncoder makes."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(12, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout, "gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH))
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = x == 0
        y = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        y = self.encoder(y, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(y.dtype)
        return self.out((y * kept).sum(1) / kept.sum(1))


class CausalBlock(nn.Module):
    """A block of GPT-2: normalized first, one projection for queries, keys and values."""

    def __init__(self, dropout: float, written_out: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout, self.written_out = dropout, written_out
        self.register_buffer("mask", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        p = self.dropout if self.training else 0.0
        if not self.written_out:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        n = q.shape[2]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / k.shape[-1] ** 0.5)
        scores = scores.masked_fill(self.mask[:, :, :n, :n] == 0, float("-inf"))
        return F.dropout(F.softmax(scores, dim=-1), p) @ v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, n, width = x.shape
        q, k, v = self.qkv(self.ln1(x)).split(width, dim=2)
        q, k, v = (y.view(rows, n, HEADS, width // HEADS).transpose(1, 2) for y in (q, k, v))
        y = self.attend(q, k, v).transpose(1, 2).contiguous().view(rows, n, width)
        x = x + F.dropout(self.proj(y), self.dropout, self.training)
        y = self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))
        return x + F.dropout(y, self.dropout, self.training)


class Decoder(nn.Module):
    """A language model whose last projection is the table of its tokens."""

    def __init__(self, dropout: float, written_out: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(CausalBlock(dropout, written_out) for _ in range(2))
        self.ln, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            y = block(y)
        return self.head(self.ln(y))


class Seq2Seq(nn.Module):
    """nn.Transformer between two embeddings."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(
            WIDTH, HEADS, 1, 1, 2 * WIDTH, dropout, batch_first=True, norm_first=True
        )
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        target = x.flip(1)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=x.device)
        padding = torch.zeros_like(mask[: x.shape[0], : x.shape[1]]).masked_fill(x == 0, -torch.inf)
        y = self.transformer(
            self.tokens(x),
            self.tokens(target),
            tgt_mask=mask,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return self.out(y)


class ViT(nn.Module):
    """Patches by a convolution, a class token, encoder blocks of nn.MultiheadAttention."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token, self.places = (
            nn.Parameter(torch.randn(1, n, WIDTH) * 0.02) for n in (1, 1 + 2 * 3)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, HEADS, dropout, batch_first=True) for _ in range(2)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)) for _ in range(2)
        )
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.places
        for k, (attention, mlp) in enumerate(zip(self.attention, self.mlps, strict=True)):
            z = self.norms[2 * k](y)
            y = y + attention(z, z, z, need_weights=False)[0]
            y = y + mlp(self.norms[2 * k + 1](y))
        return self.out(y[:, 0])


NETS: dict[str, Callable[[float], nn.Module]] = {
    "encoder": Encoder,
    "decoder": Decoder,
    "decoder, written out": lambda dropout: Decoder(dropout, written_out=True),
    "seq2seq": Seq2Seq,
    "vit": ViT,
}


def batch(net: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a network is given, and what it is to say."""
    if net == "vit":
        return torch.randn(3, 3, 8, 12), torch.randint(0, 5, (3,))
    x = torch.randint(1, VOCABULARY, (3, 7))
    if net in ("encoder", "seq2seq"):
        x[0, 5:], x[2, 3:] = 0, 0  # padding
    return x, torch.randint(0, 5, (3,)) if net == "encoder" else x.roll(-1, 1)


def make_step(net: str, *, dropout: float = 0.1, lr: float = 1e-3) -> Made:
    """A training step on one batch with AdamW and clipping, and the tensors that it changes."""
    torch.manual_seed(0)
    model, (x, y) = NETS[net](dropout), batch(net)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss

    torch.manual_seed(1)  # of dropout
    return step, parameters
