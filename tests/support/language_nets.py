"""Causal language models as their authors write them, tiny: GPT-2, Llama, Mistral, Qwen3, nanoGPT,
and a selective scan."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, HEADS, LENGTH = 37, 32, 4, 12
Tensor = torch.Tensor


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Each place says the next token."""
    logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    return nn.CrossEntropyLoss()(logits.view(-1, logits.size(-1)), labels.view(-1))


# ---- GPT-2


class Conv1D(nn.Module):
    """A linear layer with its weight transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        size_out = x.size()[:-1] + (self.nf,)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class NewGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class GPT2Attention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        causal = torch.tril(torch.ones((LENGTH, LENGTH), dtype=torch.bool))
        self.register_buffer("bias", causal.view(1, 1, LENGTH, LENGTH), persistent=False)
        self.num_heads, self.head_dim, self.split_size = HEADS, WIDTH // HEADS, WIDTH
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.c_attn(hidden_states).split(self.split_size, dim=2)
        shape = (*query.shape[:-1], -1, self.head_dim)
        query, key, value = (x.view(shape).transpose(1, 2) for x in (query, key, value))
        weights = torch.matmul(query, key.transpose(-1, -2))
        weights = weights / torch.full(
            [], value.size(-1) ** 0.5, dtype=weights.dtype, device=weights.device
        )
        query_length, key_length = query.size(-2), key.size(-2)
        causal = self.bias[:, :, key_length - query_length : key_length, :key_length]
        mask_value = torch.finfo(weights.dtype).min
        mask_value = torch.full([], mask_value, dtype=weights.dtype, device=weights.device)
        weights = torch.where(causal, weights.to(weights.dtype), mask_value)
        weights = weights + attention_mask
        weights = nn.functional.softmax(weights, dim=-1).type(value.dtype)
        weights = self.attn_dropout(weights)
        out = torch.matmul(weights, value).transpose(1, 2)
        out = out.reshape(*out.shape[:-2], -1).contiguous()
        return self.resid_dropout(self.c_proj(out)), weights


class GPT2Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(WIDTH, eps=1e-5) for _ in range(2))
        self.attn = GPT2Attention(dropout)
        self.c_fc, self.c_proj = Conv1D(4 * WIDTH, WIDTH), Conv1D(WIDTH, 4 * WIDTH)
        self.act, self.dropout = NewGELU(), nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        residual = hidden_states
        attended, _ = self.attn(self.ln_1(hidden_states), attention_mask)
        hidden_states = residual + attended
        fed = self.dropout(self.c_proj(self.act(self.c_fc(self.ln_2(hidden_states)))))
        return hidden_states + fed


class GPT2(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList([GPT2Block(dropout) for _ in range(2)])
        self.ln_f = nn.LayerNorm(WIDTH, eps=1e-5)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.data.normal_(mean=0.0, std=0.02 / math.sqrt(2 * len(self.h)))
        self.lm_head.weight = self.wte.weight

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=0.02)
        elif isinstance(module, nn.LayerNorm):
            module.bias.data.zero_()
            module.weight.data.fill_(1.0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        input_ids = input_ids.view(-1, input_ids.size()[-1])
        position_ids = torch.arange(0, input_ids.shape[-1], dtype=torch.long).unsqueeze(0)
        embeds = self.wte(input_ids)
        hidden_states = self.drop(embeds + self.wpe(position_ids).to(embeds.device))
        mask = attention_mask.view(input_ids.shape[0], -1)[:, None, None, :]
        mask = (1.0 - mask.to(dtype=embeds.dtype)) * torch.finfo(embeds.dtype).min
        for block in self.h:
            hidden_states = block(hidden_states, mask)
        return shifted_loss(self.lm_head(self.ln_f(hidden_states)), labels)


# ---- Llama, Mistral, Qwen3


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class RotaryEmbedding(nn.Module):
    inv_freq: Tensor

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        places = torch.arange(0, dim, 2, dtype=torch.int64).to(dtype=torch.float)
        self.register_buffer("inv_freq", 1.0 / (base ** (places / dim)), persistent=False)
        self.attention_scaling = 1.0

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1)
        position_ids = position_ids[:, None, :].float()
        with torch.autocast(device_type=x.device.type, enabled=False):
            freqs = (inv_freq.float() @ position_ids.float()).transpose(1, 2)
            emb = torch.cat((freqs, freqs), dim=-1)
            cos, sin = emb.cos() * self.attention_scaling, emb.sin() * self.attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def repeat_kv(hidden_states: Tensor, n_rep: int) -> Tensor:
    batch, heads, length, width = hidden_states.shape
    if n_rep == 1:
        return hidden_states
    hidden_states = hidden_states[:, :, None, :, :].expand(batch, heads, n_rep, length, width)
    return hidden_states.reshape(batch, heads * n_rep, length, width)


def causal_mask(x: Tensor, window: int | None, padding: Tensor) -> Tensor:
    """A float mask [rows, 1, length, length]: the future, what is too far back, and padding."""
    length, min_dtype = x.shape[1], torch.finfo(x.dtype).min
    place = torch.arange(length, device=x.device)
    mask = torch.full((length, length), fill_value=min_dtype, dtype=x.dtype, device=x.device)
    hidden = place > place.reshape(-1, 1)
    if window is not None:
        hidden.bitwise_or_(place <= (place.reshape(-1, 1) - window))
    mask *= hidden
    mask = mask[None, None, :, :].expand(x.shape[0], 1, -1, -1)
    mask = mask.clone()
    padded = mask[:, :, :, :length] + padding[:, None, None, :].to(x.dtype)
    mask[:, :, :, :length] = mask[:, :, :, :length].masked_fill(padded == 0, min_dtype)
    return mask


def vmapped_mask(x: Tensor, window: int | None, padding: Tensor) -> Tensor:
    """A mask of bools, from functions of four indices that torch.vmap lays out."""
    padding = padding.bool()

    def mask_function(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = q.new_ones((), dtype=torch.bool) & (kv <= q)
        seen = seen if window is None else seen & (kv > q - window)
        return seen & padding[b, kv]

    for axis in (3, 2, 1, 0):
        dims = tuple(0 if i == axis else None for i in range(4))
        mask_function = torch.vmap(mask_function, in_dims=dims, out_dims=0)
    rows, heads, length = (torch.arange(n, device=x.device) for n in (x.shape[0], 1, x.shape[1]))
    with TransformGetItemToIndex():
        return mask_function(rows, heads, length, length)


class LlamaAttention(nn.Module):
    """Grouped queries; written out, or torch's function; with norms of queries and keys or not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head_dim, self.num_key_value_heads = kind, WIDTH // HEADS, 2
        self.num_key_value_groups = HEADS // 2
        self.scaling, self.attention_dropout = (
            self.head_dim**-0.5,
            0.1 if kind == "mistral" else 0.0,
        )
        for name, heads in (("q", HEADS), ("k", 2), ("v", 2)):
            self.add_module(f"{name}_proj", nn.Linear(WIDTH, heads * self.head_dim, bias=False))
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        if kind == "qwen3":
            self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)

    def forward(self, hidden_states: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        q, k = (p(hidden_states).view(hidden_shape) for p in (self.q_proj, self.k_proj))
        if self.kind == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        v = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *tables)
        p = self.attention_dropout if self.training else 0.0
        if self.kind == "llama":
            k, v = (repeat_kv(x, self.num_key_value_groups) for x in (k, v))
            weights = torch.matmul(q, k.transpose(2, 3)) * self.scaling
            weights = weights + mask[:, :, :, : k.shape[-2]]
            weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
            weights = nn.functional.dropout(weights, p=p, training=self.training)
            out = torch.matmul(weights, v).transpose(1, 2).contiguous()
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=p, scale=self.scaling, enable_gqa=True
            )
            out = out.transpose(1, 2).contiguous()
        return self.o_proj(out.reshape(*input_shape, -1).contiguous())


class LlamaMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 48, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(48, WIDTH, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.self_attn, self.mlp = LlamaAttention(kind), LlamaMLP()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(WIDTH), RMSNorm(WIDTH)

    def forward(self, hidden_states: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.self_attn(self.input_layernorm(hidden_states), tables, mask)
        hidden_states = residual + hidden_states
        residual = hidden_states
        return residual + self.mlp(self.post_attention_layernorm(hidden_states))


class Llama(nn.Module):
    """ "llama"; "mistral", which sees some tokens back only; "qwen3", whose tables are tied."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.window = kind, 5 if kind == "mistral" else None
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.layers = nn.ModuleList([LlamaLayer(kind) for _ in range(2)])
        self.norm, self.rotary_emb = RMSNorm(WIDTH), RotaryEmbedding(WIDTH // HEADS)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if kind == "qwen3":
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        hidden_states = self.embed_tokens(input_ids)
        position_ids = torch.arange(hidden_states.shape[1], device=input_ids.device).unsqueeze(0)
        make = vmapped_mask if self.kind == "qwen3" else causal_mask
        mask = make(hidden_states, self.window, attention_mask)
        tables = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, tables, mask)
        logits = self.lm_head(self.norm(hidden_states)).float()
        labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return (
            nn.functional.cross_entropy(
                logits.view(-1, VOCABULARY), labels.view(-1), ignore_index=-100, reduction="sum"
            )
            / (labels != -100).sum()
        )


# ---- a selective scan


class MambaMixer(nn.Module):
    """A state space whose step sizes and matrices depend on the input, one step after another."""

    def __init__(self, states: int = 4, rank: int = 2) -> None:
        super().__init__()
        inner = 2 * WIDTH
        self.inner, self.states, self.rank = inner, states, rank
        self.in_proj = nn.Linear(WIDTH, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj, self.out_proj = nn.Linear(rank, inner), nn.Linear(inner, WIDTH, bias=False)
        A = torch.arange(1, states + 1, dtype=torch.float32)[None, :].expand(inner, -1).contiguous()
        self.A_log, self.D = nn.Parameter(torch.log(A)), nn.Parameter(torch.ones(inner))

    def forward(self, input_states: Tensor) -> Tensor:
        batch, length, _ = input_states.shape
        hidden, gate = self.in_proj(input_states).transpose(1, 2).chunk(2, dim=1)
        hidden = F.silu(self.conv1d(hidden)[..., :length])
        parameters = self.x_proj(hidden.transpose(1, 2))
        dt, B, C = torch.split(parameters, [self.rank, self.states, self.states], dim=-1)
        dt = F.softplus(self.dt_proj(dt)).transpose(1, 2)
        A = -torch.exp(self.A_log.float())
        discrete_A = torch.exp(A[None, :, None, :] * dt[:, :, :, None])
        discrete_B = dt[:, :, :, None] * B[:, None, :, :].float()
        deltaB_u = discrete_B * hidden[:, :, :, None].float()
        state = torch.zeros((batch, self.inner, self.states), dtype=hidden.dtype)
        outputs = []
        for i in range(length):
            state = discrete_A[:, :, i, :] * state + deltaB_u[:, :, i, :]
            outputs.append(torch.matmul(state.to(hidden.dtype), C[:, i, :].unsqueeze(-1))[:, :, 0])
        scanned = torch.stack(outputs, dim=-1)
        scanned = scanned + hidden * self.D[None, :, None]
        return self.out_proj((scanned * F.silu(gate)).transpose(1, 2))


class Mamba(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.mixers = nn.ModuleList([MambaMixer() for _ in range(2)])
        self.norms = nn.ModuleList([RMSNorm(WIDTH) for _ in range(3)])
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden_states = self.embeddings(input_ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            hidden_states = hidden_states + mixer(norm(hidden_states.to(norm.weight.dtype)))
        return shifted_loss(self.lm_head(self.norms[-1](hidden_states)), labels)


# ---- nanoGPT


class CausalSelfAttention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.resid_dropout, self.dropout = nn.Dropout(dropout), dropout

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, HEADS, C // HEADS).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0, is_causal=True
        )
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class NanoBlock(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.attn = CausalSelfAttention(dropout)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH, bias=False),
            nn.GELU(),
            nn.Linear(4 * WIDTH, WIDTH, bias=False),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, dropout: float = 0.1, layers: int = 2) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(LENGTH, WIDTH),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList([NanoBlock(dropout) for _ in range(layers)]),
                "ln_f": nn.LayerNorm(WIDTH, bias=False),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for p in self.parameters():
            if p.dim() >= 2:
                torch.nn.init.normal_(p, mean=0.0, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        _, t = idx.size()
        assert t <= LENGTH, f"Cannot forward sequence of length {t}"
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = checkpoint(block, x, use_reentrant=False)
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss

    def configure_optimizers(self, weight_decay: float, lr: float) -> torch.optim.Optimizer:
        params = {n: p for n, p in self.named_parameters() if p.requires_grad}
        decay = [p for n, p in params.items() if p.dim() >= 2]
        nodecay = [p for n, p in params.items() if p.dim() < 2]
        groups = [
            {"params": decay, "weight_decay": weight_decay},
            {"params": nodecay, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
