"""Language models that are benchmarked, each with AdamW in its step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.steps import Made, trained
from examples.gpt import GPT, adamw


def gpt(
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    vocabulary: int = 512,
    batch: int = 4,
    length: int = 64,
    device: str = "cpu",
    **options: bool,
) -> Made:
    """A GPT with causal attention and a tied head."""
    torch.manual_seed(0)
    model = GPT(vocabulary, length, layers, width, heads).to(device)
    x = torch.randint(vocabulary, (batch, length)).to(device)
    y = torch.randint(vocabulary, (batch, length)).to(device)

    def loss_of() -> torch.Tensor:
        return F.cross_entropy(model(x).view(-1, vocabulary), y.view(-1))

    step = trained(loss_of, model, adamw(model, lr=1e-5, **options))
    return step, _compared(model)


def _compared(model: nn.Module) -> list[nn.Parameter]:
    """The parameters, but for biases of queries, keys and values: no gradient reaches those of
    keys, and what Adam makes of their rounding errors is nothing but noise."""
    names = ("qkv.bias", "in_proj_bias")
    return [p for name, p in model.named_parameters() if not name.endswith(names)]


class Bert(nn.Module):
    """BERT: embeddings of words, places and sentences, post-norm layers of attention with a mask of
    padding, a transform, and a head that is tied to the words."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int):
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.sentences, self.norm = nn.Embedding(2, width), nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, x: torch.Tensor, sentence: torch.Tensor, padded: torch.Tensor):
        places = torch.arange(x.shape[1], device=x.device)
        h = self.norm(self.words(x) + self.places(places) + self.sentences(sentence))
        h = self.transform(self.layers(h, src_key_padding_mask=padded))
        return F.linear(h, self.words.weight, self.bias)


def bert(
    layers: int = 2,
    width: int = 128,
    heads: int = 2,
    vocabulary: int = 30522,
    batch: int = 8,
    length: int = 64,
    device: str = "cpu",
    **options: bool,
) -> Made:
    """BERT-tiny, that learns one in seven tokens of lines of which some are padded."""
    torch.manual_seed(0)
    model = Bert(layers, width, heads, vocabulary, length).to(device)
    x = torch.randint(vocabulary, (batch, length))
    padded = torch.arange(length) >= torch.randint(length // 2, length, (batch, 1))
    labels = torch.where((torch.rand(x.shape) < 1 / 7) & ~padded, x, -100)
    sentence = (torch.arange(length) > length // 3).long().expand(batch, length).contiguous()
    x, padded, labels, sentence = (t.to(device) for t in (x, padded, labels, sentence))

    def loss_of() -> torch.Tensor:
        logits = model(x, sentence, padded)
        return F.cross_entropy(logits.view(-1, vocabulary), labels.view(-1), ignore_index=-100)

    step = trained(loss_of, model, adamw(model, lr=1e-5, **options))
    return step, _compared(model)


class Cells(nn.Module):
    """LSTM cells in a loop over time that Python runs."""

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(features, hidden), nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, outputs = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state[0])
        return self.out(torch.stack(outputs, 1))


def cells(
    steps: int = 256,
    batch: int = 8,
    features: int = 64,
    hidden: int = 64,
    device: str = "cpu",
    **options: bool,
) -> Made:
    """A recurrent network whose loop over time is written out."""
    torch.manual_seed(0)
    model = Cells(features, hidden).to(device)
    x, y = (torch.randn(batch, steps, n).to(device) for n in (features, 1))
    optimizer = adamw(model, lr=1e-5, **options)
    return trained(lambda: F.mse_loss(model(x), y), model, optimizer), [*model.parameters()]
