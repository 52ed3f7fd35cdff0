"""Models with encoders as their authors write them, tiny: BERT, T5, ViT, CLIP, and Whisper's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, WIDTH, HEADS, LENGTH = 37, 32, 4, 12
Tensor = torch.Tensor


# ---- BERT


class BertEmbeddings(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.position_embeddings = nn.Embedding(16, WIDTH)
        self.token_type_embeddings = nn.Embedding(2, WIDTH)
        self.LayerNorm, self.dropout = nn.LayerNorm(WIDTH, eps=1e-12), nn.Dropout(dropout)
        self.register_buffer("position_ids", torch.arange(16).expand((1, -1)), persistent=False)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        position_ids = self.position_ids[:, : input_ids.size()[1]]
        embeddings = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        embeddings += self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))


class BertSelfAttention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = HEADS, WIDTH // HEADS
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        shape = x.size()[:-1] + (self.num_attention_heads, self.attention_head_size)
        return x.view(shape).permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = (
            self.transpose_for_scores(project(hidden_states))
            for project in (self.query, self.key, self.value)
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        probs = self.dropout(nn.functional.softmax(scores + attention_mask, dim=-1))
        context = torch.matmul(probs, v).permute(0, 2, 1, 3).contiguous()
        return context.view(context.size()[:-2] + (WIDTH,))


class BertOutput(nn.Module):
    def __init__(self, inner: int, dropout: float) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, WIDTH), nn.LayerNorm(WIDTH, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertLayer(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention, self.attended = BertSelfAttention(dropout), BertOutput(WIDTH, dropout)
        self.intermediate, self.output = nn.Linear(WIDTH, 64), BertOutput(64, dropout)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.attended(self.attention(x, attention_mask), x)
        return self.output(F.gelu(self.intermediate(x)), x)


class Bert(nn.Module):
    """Masked tokens, and whether the second sentence follows the first."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(dropout)
        self.layer = nn.ModuleList([BertLayer(dropout) for _ in range(2)])
        self.pooler, self.seq_relationship = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.transform, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH, eps=1e-12)
        self.decoder = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.bias = nn.Parameter(torch.zeros(VOCABULARY))
        self.decoder.bias = self.bias
        self.decoder.weight = self.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        labels: Tensor,
        next_sentence_label: Tensor,
    ) -> Tensor:
        x = self.embeddings(input_ids, token_type_ids)
        mask = attention_mask[:, None, None, :].to(dtype=x.dtype)
        mask = (1.0 - mask) * torch.finfo(x.dtype).min
        for layer in self.layer:
            x = layer(x, mask)
        pooled = torch.tanh(self.pooler(x[:, 0]))
        scores = self.decoder(self.norm(F.gelu(self.transform(x))))
        loss = nn.CrossEntropyLoss()  # -100 index = padding token
        masked_lm_loss = loss(scores.view(-1, VOCABULARY), labels.view(-1))
        related = self.seq_relationship(pooled)
        return masked_lm_loss + loss(related.view(-1, 2), next_sentence_label.view(-1))


# ---- T5


class T5LayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(WIDTH)), 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


class T5Attention(nn.Module):
    def __init__(self, is_decoder: bool, has_bias: bool, dropout: float) -> None:
        super().__init__()
        self.is_decoder, self.n_heads, self.d_kv, self.dropout = is_decoder, HEADS, 8, dropout
        self.num_buckets, self.max_distance = 8, 16
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.has_bias = has_bias
        if has_bias:
            self.relative_attention_bias = nn.Embedding(self.num_buckets, self.n_heads)

    def _relative_position_bucket(self, relative_position: Tensor) -> Tensor:
        num_buckets, relative_buckets = self.num_buckets, 0
        if not self.is_decoder:
            num_buckets //= 2
            relative_buckets += (relative_position > 0).to(torch.long) * num_buckets
            relative_position = torch.abs(relative_position)
        else:
            relative_position = -torch.min(relative_position, torch.zeros_like(relative_position))
        max_exact = num_buckets // 2
        is_small = relative_position < max_exact
        if_large = max_exact + (
            torch.log(relative_position.float() / max_exact)
            / math.log(self.max_distance / max_exact)
            * (num_buckets - max_exact)
        ).to(torch.long)
        if_large = torch.min(if_large, torch.full_like(if_large, num_buckets - 1))
        relative_buckets += torch.where(is_small, relative_position, if_large)
        return relative_buckets

    def compute_bias(self, query_length: int, key_length: int) -> Tensor:
        context_position = torch.arange(query_length, dtype=torch.long)[:, None]
        memory_position = torch.arange(key_length, dtype=torch.long)[None, :]
        bucket = self._relative_position_bucket(memory_position - context_position)
        return self.relative_attention_bias(bucket).permute([2, 0, 1]).unsqueeze(0)

    def forward(
        self, x: Tensor, mask: Tensor, memory: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows = x.shape[0]
        seen = x if memory is None else memory
        q, k, v = (
            project(y).view(rows, -1, self.n_heads, self.d_kv).transpose(1, 2)
            for project, y in ((self.q, x), (self.k, seen), (self.v, seen))
        )
        scores = torch.matmul(q, k.transpose(3, 2))
        if bias is None:
            if self.has_bias:
                bias = self.compute_bias(q.shape[2], k.shape[2])
            else:
                bias = torch.zeros(
                    (1, self.n_heads, q.shape[2], k.shape[2]), device=x.device, dtype=scores.dtype
                )
            bias = bias + mask[:, :, :, : k.shape[2]]
        scores += bias
        weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        weights = nn.functional.dropout(weights, p=self.dropout, training=self.training)
        out = torch.matmul(weights, v).transpose(1, 2).contiguous().view(rows, -1, WIDTH)
        return self.o(out), bias


class T5Block(nn.Module):
    def __init__(self, is_decoder: bool, has_bias: bool, dropout: float) -> None:
        super().__init__()
        self.attention = T5Attention(is_decoder, has_bias, dropout)
        self.cross = T5Attention(is_decoder, False, dropout) if is_decoder else None
        self.norms = nn.ModuleList([T5LayerNorm() for _ in range(3)])
        self.wi_0, self.wi_1 = (nn.Linear(WIDTH, 48, bias=False) for _ in range(2))
        self.wo, self.dropout = nn.Linear(48, WIDTH, bias=False), nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor, biases: tuple, memory: Tensor | None, memory_mask: Tensor
    ) -> tuple[Tensor, tuple]:
        attended, bias = self.attention(self.norms[0](x), mask, None, biases[0])
        x, cross_bias = x + self.dropout(attended), biases[1]
        if self.cross is not None:
            attended, cross_bias = self.cross(self.norms[1](x), memory_mask, memory, cross_bias)
            x = x + self.dropout(attended)
        if x.dtype == torch.float16:
            limit = torch.where(
                torch.isinf(x).any(), torch.finfo(x.dtype).max - 1000, torch.finfo(x.dtype).max
            )
            x = torch.clamp(x, min=-limit, max=limit)
        y = self.norms[2](x)
        y = F.gelu(self.wi_0(y), approximate="tanh") * self.wi_1(y)
        if isinstance(self.wo.weight, Tensor) and y.dtype != self.wo.weight.dtype:
            y = y.to(self.wo.weight.dtype)
        return x + self.dropout(self.wo(self.dropout(y))), (bias, cross_bias)


class T5Stack(nn.Module):
    def __init__(self, embed_tokens: nn.Embedding, is_decoder: bool, dropout: float) -> None:
        super().__init__()
        self.embed_tokens, self.is_decoder = embed_tokens, is_decoder
        self.block = nn.ModuleList([T5Block(is_decoder, i == 0, dropout) for i in range(2)])
        self.final_layer_norm, self.dropout = T5LayerNorm(), nn.Dropout(dropout)

    def forward(
        self, input_ids: Tensor, mask: Tensor, memory: Tensor | None, memory_mask: Tensor
    ) -> Tensor:
        x, biases = self.dropout(self.embed_tokens(input_ids)), (None, None)
        for block in self.block:
            x, biases = block(x, mask, biases, memory, memory_mask)
        return self.dropout(self.final_layer_norm(x))


class T5(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.shared = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = T5Stack(self.shared, False, dropout)
        self.decoder = T5Stack(self.shared, True, dropout)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def _shift_right(self, input_ids: Tensor) -> Tensor:
        shifted = input_ids.new_zeros(input_ids.shape)
        shifted[..., 1:] = input_ids[..., :-1].clone()
        shifted[..., 0] = 0
        shifted.masked_fill_(shifted == -100, 0)
        return shifted

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        dtype = self.shared.weight.dtype
        low = torch.finfo(dtype).min
        mask = (1.0 - attention_mask[:, None, None, :].to(dtype)) * low
        memory = self.encoder(input_ids, mask, None, mask)
        ids = self._shift_right(labels)
        place = torch.arange(ids.shape[1])
        causal = place[None, None, :].repeat(ids.shape[0], ids.shape[1], 1) <= place[None, :, None]
        causal = (1.0 - causal[:, None, :, :].to(dtype)) * low
        logits = self.lm_head(self.decoder(ids, causal, memory, mask))
        loss = nn.CrossEntropyLoss(ignore_index=-100)
        return loss(logits.view(-1, logits.size(-1)), labels.view(-1))


# ---- ViT and CLIP


class Encoder(nn.Module):
    """Blocks that normalize first. `quick`: CLIP's gelu. `bias`: of keys (Whisper has none)."""

    def __init__(self, dropout: float, *, quick: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.p, self.quick = dropout, quick
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "layer_norm1": nn.LayerNorm(WIDTH),
                    "layer_norm2": nn.LayerNorm(WIDTH),
                    "q_proj": nn.Linear(WIDTH, WIDTH),
                    "k_proj": nn.Linear(WIDTH, WIDTH, bias=bias),
                    "v_proj": nn.Linear(WIDTH, WIDTH),
                    "out_proj": nn.Linear(WIDTH, WIDTH),
                    "fc1": nn.Linear(WIDTH, 64),
                    "fc2": nn.Linear(64, WIDTH),
                }
            )
            for _ in range(2)
        )

    def dropout(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, p=self.p, training=self.training)

    def attend(self, m: nn.ModuleDict, x: Tensor, mask: Tensor | None) -> Tensor:
        rows, length, width = x.size()

        def heads(y: Tensor) -> Tensor:
            y = y.view(rows, -1, HEADS, width // HEADS).transpose(1, 2).contiguous()
            return y.view(rows * HEADS, -1, width // HEADS)

        q = heads(m["q_proj"](x) * (width // HEADS) ** -0.5)
        k, v = heads(m["k_proj"](x)), heads(m["v_proj"](x))
        weights = torch.bmm(q, k.transpose(1, 2))
        if mask is not None:
            weights = weights.view(rows, HEADS, length, length) + mask
            weights = weights.view(rows * HEADS, length, length)
        weights = self.dropout(nn.functional.softmax(weights, dim=-1))
        out = torch.bmm(weights, v).view(rows, HEADS, length, -1).transpose(1, 2)
        return m["out_proj"](out.reshape(rows, length, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for m in self.layers:
            x = x + self.dropout(self.attend(m, m["layer_norm1"](x), mask))
            y = m["fc1"](m["layer_norm2"](x))
            y = y * torch.sigmoid(1.702 * y) if self.quick else F.gelu(y)
            x = x + self.dropout(m["fc2"](self.dropout(y)))
        return x


class Patches(nn.Module):
    """Images as patches behind a class token, with embeddings of their places."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, WIDTH, kernel_size=4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position_embeddings = nn.Parameter(torch.randn(1, 10, WIDTH))
        nn.init.trunc_normal_(self.position_embeddings.data, mean=0.0, std=0.02)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.projection(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x + self.position_embeddings


class ViT(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embeddings, self.dropout = Patches(), nn.Dropout(dropout)
        self.encoder = Encoder(dropout)
        self.layernorm, self.classifier = nn.LayerNorm(WIDTH, eps=1e-12), nn.Linear(WIDTH, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        x = self.layernorm(self.encoder(self.dropout(self.embeddings(pixel_values))))
        return F.cross_entropy(self.classifier(x[:, 0, :]), labels, label_smoothing=0.1)


class CLIP(nn.Module):
    """A tower for texts, read at their last token, and one for images."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position_embedding = nn.Embedding(16, WIDTH)
        self.register_buffer("position_ids", torch.arange(16).expand((1, -1)), persistent=False)
        self.text, self.vision = Encoder(0.0, quick=True), Encoder(0.0, quick=True)
        self.final_layer_norm, self.post_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.patches, self.pre_layernorm = Patches(), nn.LayerNorm(WIDTH)
        self.text_projection = nn.Linear(WIDTH, 16, bias=False)
        self.visual_projection = nn.Linear(WIDTH, 16, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        x = self.token_embedding(input_ids)
        x = x + self.position_embedding(self.position_ids[:, : input_ids.shape[-1]])
        length = input_ids.shape[-1]
        mask = torch.full((length, length), float("-inf"), device=x.device).triu_(1)
        x = self.final_layer_norm(self.text(x, mask[None, None]))
        last = input_ids.to(dtype=torch.int, device=x.device).argmax(dim=-1)
        text = self.text_projection(x[torch.arange(x.shape[0], device=x.device), last])
        image = self.vision(self.pre_layernorm(self.patches(pixel_values)))
        image = self.visual_projection(self.post_layernorm(image[:, 0, :]))
        image = image / image.norm(p=2, dim=-1, keepdim=True)
        text = text / torch.pow(torch.sum(torch.pow(text, 2), dim=-1, keepdim=True), 0.5)
        logits = torch.matmul(text, image.t()) * self.logit_scale.exp().clamp(max=100.0)
        here = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, here) + F.cross_entropy(logits.t(), here)) / 2.0


# ---- Whisper's encoder


def sinusoids(length: int, channels: int, max_timescale: float = 10000) -> Tensor:
    log_timescale_increment = math.log(max_timescale) / (channels // 2 - 1)
    inv_timescales = torch.exp(-log_timescale_increment * torch.arange(channels // 2))
    scaled_time = torch.arange(length).view(-1, 1) * inv_timescales.view(1, -1)
    return torch.cat([scaled_time.sin(), scaled_time.cos()], dim=1)


class Whisper(nn.Module):
    """Sounds as frames of a spectrum; a head says a class of each frame."""

    def __init__(self, dropout: float = 0.1, bins: int = 6, frames: int = 24) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(bins, WIDTH, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(frames // 2, WIDTH)
        self.embed_positions.requires_grad_(False)
        with torch.no_grad():
            self.embed_positions.weight.copy_(sinusoids(frames // 2, WIDTH))
        self.p, self.encoder = dropout, Encoder(dropout, bias=False)
        self.layer_norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, input_features: Tensor, labels: Tensor) -> Tensor:
        x = nn.functional.gelu(self.conv1(input_features))
        x = nn.functional.gelu(self.conv2(x)).permute(0, 2, 1)
        all_positions = torch.arange(self.embed_positions.num_embeddings, device=x.device)
        x = nn.functional.dropout(x + self.embed_positions(all_positions), self.p, self.training)
        logits = self.head(self.layer_norm(self.encoder(x)))
        return F.cross_entropy(logits.transpose(1, 2), labels)
