"""Programs around language models as people write them: experts, preferences, policies, adapters,
state spaces with complex numbers, decoding. From one seed each trains as in eager, in replay."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tracejit
from tracejit.testing import losses_agree

Step = Callable[[int], Tensor]


def updated(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a, self.b = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)
        self.dropout = nn.Dropout(0.1)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(self.dropout(x))) * 2


def low_rank_adapters() -> Step:
    """Gradients of four batches, clipped, with a schedule."""
    model = nn.Sequential(Adapted(16, 32), nn.GELU(), Adapted(32, 5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    xs, ys = torch.randn(4, 8, 16), torch.randint(5, (4, 8))

    def step(call: int) -> Tensor:
        total = 0
        for x, y in zip(xs, ys, strict=True):
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1) / 4
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return total

    return step


def experts_over_all_tokens() -> Step:
    """Two of four experts weigh each token, with losses that balance and calm the gate."""
    gate, x, y = nn.Linear(16, 4, bias=False), torch.randn(24, 16), torch.randn(24, 16)
    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)) for _ in range(4)
    )
    optimizer = torch.optim.Adam([*gate.parameters(), *experts.parameters()], 1e-2)

    def step(call: int) -> Tensor:
        logits = gate(x)
        p = logits.softmax(-1)
        weights, chosen = p.topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e, expert in enumerate(experts):
            out = out + (weights * (chosen == e)).sum(-1, keepdim=True) * expert(x)
        share = F.one_hot(chosen[:, 0], 4).float().mean(0)
        balance = 4 * (share * p.mean(0)).sum()
        calm = torch.logsumexp(logits, -1).square().mean()
        return updated(F.mse_loss(out, y) + 0.01 * balance + 1e-3 * calm, optimizer)

    return step


def experts_over_their_tokens() -> Step:
    """Each expert sees the tokens that the gate has sent it, as in Mixtral."""
    gate, x, y = nn.Linear(16, 4, bias=False), torch.randn(24, 16), torch.randn(24, 16)
    experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
    optimizer = torch.optim.Adam([*gate.parameters(), *experts.parameters()], 1e-3)

    def step(call: int) -> Tensor:
        weights, chosen = gate(x).softmax(-1).topk(2, -1)
        mask, out = F.one_hot(chosen, 4).permute(2, 1, 0), torch.zeros_like(x)
        for e, expert in enumerate(experts):
            slot, token = torch.where(mask[e])
            current = expert(x[None, token].reshape(-1, 16)) * weights[token, slot, None]
            out.index_add_(0, token, current)
        return updated(F.mse_loss(out, y), optimizer)

    return step


def preferences() -> Step:
    """Direct preference optimization against a frozen reference."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 20))

    policy, reference = make(), make()
    reference.load_state_dict(policy.state_dict())
    reference.requires_grad_(False)
    optimizer = torch.optim.RMSprop(policy.parameters(), 1e-3)
    chosen, rejected = torch.randint(20, (2, 4, 9))
    mask = torch.arange(8) < torch.tensor([[8], [5], [7], [3]])

    def log_probability(model: nn.Module, tokens: Tensor) -> Tensor:
        logs = model(tokens[:, :-1]).log_softmax(-1)
        return (torch.gather(logs, 2, tokens[:, 1:, None]).squeeze(2) * mask).sum(-1)

    def step(call: int) -> Tensor:
        with torch.no_grad():
            before = log_probability(reference, chosen) - log_probability(reference, rejected)
        now = log_probability(policy, chosen) - log_probability(policy, rejected)
        return updated(-F.logsigmoid(0.1 * (now - before)).mean(), optimizer)

    return step


def proximal_policy() -> Step:
    """Actions are drawn, advantages found backwards in time, ratios clipped."""
    net, actor, critic = (
        nn.Sequential(nn.Linear(4, 32), nn.Tanh()),
        nn.Linear(32, 3),
        nn.Linear(32, 1),
    )
    parameters = [*net.parameters(), *actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    states, rewards = torch.randn(12, 5, 4), torch.randn(12, 5)

    def step(call: int) -> Tensor:
        with torch.no_grad():
            h = net(states)
            policy = torch.distributions.Categorical(logits=actor(h))
            action = policy.sample()
            old, value = policy.log_prob(action), critic(h).squeeze(-1)
            advantage, last = torch.zeros_like(rewards), torch.zeros(5)
            for t in reversed(range(12)):
                following = value[t + 1] if t < 11 else torch.zeros(5)
                last = rewards[t] + 0.99 * following - value[t] + 0.99 * 0.95 * last
                advantage[t] = last
            returns = advantage + value
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        h = net(states)
        policy = torch.distributions.Categorical(logits=actor(h))
        ratio = (policy.log_prob(action) - old).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        error = F.mse_loss(critic(h).squeeze(-1), returns)
        loss = -gain + 0.5 * error - 0.01 * policy.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        return loss.detach()

    return step


def diagonal_state_space() -> Step:
    """S4D: the kernel of a convolution from complex exponentials; parameters are their parts."""
    heads, states, length = 4, 8, 20
    C = nn.Parameter(torch.randn(heads, states, 2))
    log_real = nn.Parameter(torch.log(0.5 * torch.ones(heads, states)))
    imaginary = nn.Parameter(math.pi * torch.arange(states).repeat(heads, 1).float())
    log_dt = nn.Parameter(torch.rand(heads) - 4)
    optimizer = torch.optim.AdamW([C, log_real, imaginary, log_dt], 1e-2)
    u = torch.randn(2, heads, length)

    def step(call: int) -> Tensor:
        A = torch.complex(-log_real.exp(), imaginary)
        dtA = A * log_dt.exp().unsqueeze(-1)
        times = dtA.unsqueeze(-1) * torch.arange(length)
        weights = torch.view_as_complex(C) * (torch.exp(dtA) - 1.0) / A
        kernel = 2 * (weights.unsqueeze(-1) * torch.exp(times)).sum(1).real
        y = F.conv1d(F.pad(u, (length - 1, 0)), kernel.flip(-1).unsqueeze(1), groups=heads)
        return updated((y - u).square().mean(), optimizer)

    return step


def linear_biases() -> Step:
    """ALiBi over a window of tokens, with tied weights."""
    embedding, qkv, norm = nn.Embedding(31, 32), nn.Linear(32, 96), nn.LayerNorm(32)
    modules = nn.ModuleList([embedding, qkv, norm])
    optimizer = torch.optim.AdamW(modules.parameters(), 1e-2)
    tokens = torch.randint(31, (3, 17))
    slopes = torch.tensor([2.0 ** -(2 * (i + 1)) for i in range(4)])

    def step(call: int) -> Tensor:
        x = embedding(tokens[:, :-1])
        q, k, v = qkv(norm(x)).view(3, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)
        place = torch.arange(16)
        distance = place[None] - place[:, None]
        bias = slopes[:, None, None] * distance
        bias = bias.masked_fill((distance > 0) | (distance < -6), float("-inf"))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + out.transpose(1, 2).reshape(3, 16, 32)
        logits = F.linear(x, embedding.weight)
        return updated(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), optimizer)

    return step


PROGRAMS = (
    *(low_rank_adapters, experts_over_all_tokens, experts_over_their_tokens, preferences),
    *(proximal_policy, diagonal_state_space, linear_biases),
)


def losses_of(step: Step, calls: int) -> list[float]:
    torch.manual_seed(1)
    return [float(step(call)) for call in range(calls)]


@pytest.mark.sweep(0.17)
@pytest.mark.parametrize("make", PROGRAMS)
def test_trains_like_eager(make: Callable[[], Step]):
    torch.manual_seed(0)
    eager = losses_of(make(), 8)
    torch.manual_seed(0)
    step = tracejit.compile(make(), on_unsupported="raise")
    for ours, theirs in zip(losses_of(step, 8), eager, strict=True):
        assert losses_agree(ours, theirs, eager[0])
    assert step.explain_mode().startswith("replay"), step.explain_mode()


class Cached(nn.Module):
    """Attention that keeps the keys and values of earlier calls, with complex rotations."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(2, 16, 4, 8))
        angles = torch.outer(torch.arange(16.0), 1 / 1e4 ** (torch.arange(0, 8, 2) / 8))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def turned(self, x: Tensor, start: int) -> Tensor:
        turns = self.turns[start : start + x.shape[1]].view(1, x.shape[1], 1, 4)
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], 4, 2))
        return torch.view_as_real(pairs * turns).flatten(3).type_as(x)

    def forward(self, x: Tensor, start: int) -> Tensor:
        stop = start + x.shape[1]
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).unbind(2)
        q, k = self.turned(q, start), self.turned(k, start)
        self.keys[:, start:stop], self.values[:, start:stop] = k, v
        keys, values = (c[:, :stop].transpose(1, 2) for c in (self.keys, self.values))
        weights = (q.transpose(1, 2) @ keys.transpose(2, 3) / 8**0.5).softmax(-1)
        return self.out((weights @ values).transpose(1, 2).flatten(2))


def test_decoding_with_a_cache():
    """Each length is a plan of its own."""
    x, outs, caches = torch.randn(2, 16, 32), [], []
    for compile in (lambda f: f, lambda f: tracejit.compile(f, on_unsupported="raise")):
        torch.manual_seed(0)
        model = Cached()

        @compile
        @torch.no_grad()
        def step(token: Tensor, start: int, model: Cached = model) -> Tensor:
            return model(token, start)

        outs.append([step(x[:, t : t + 1], t) for _ in range(3) for t in range(5)])
        caches.append(model.keys.clone())
    for ours, theirs in zip(*reversed(outs), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*caches)
