"""Whole training programs as people write them, small: reinforcement learning, GANs, teachers, …

Each case is compared with eager after every call, and says how it ends; see `support/worlds.py`.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from support.worlds import Case, X, check, table

CASES: dict[str, Case] = {}
case = table(CASES)

LABELS = torch.tensor([0, 2, 1, 2, 0])


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Another batch for each call."""
    return X + 0.1 * i, LABELS.roll(i)


# ---- reinforcement learning


def episode(i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, actions and rewards."""
    return X - 0.2 * i, LABELS.roll(i), torch.linspace(-1, 1 + 0.1 * i, 5)


@case("replay", args=episode)
def policy_gradient_with_a_baseline(w):
    w.policy = policy = mlp(4, 6, 3)
    w.opt = opt = torch.optim.Adam(policy.parameters(), lr=0.01)
    w.baseline = baseline = torch.zeros(())

    def step(states, actions, rewards):
        returns, total = [], torch.zeros(())
        for r in reversed(rewards.unbind()):
            total = r + 0.9 * total
            returns.insert(0, total)
        returns = torch.stack(returns)
        logp = F.log_softmax(policy(states), -1).gather(1, actions[:, None])[:, 0]
        loss = -(logp * (returns - baseline)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        baseline.lerp_(returns.mean(), 0.1)
        return loss.detach(), baseline.clone()

    return step


@case("replay", args=episode, backend="c")
def actor_critic_with_advantages(w):
    w.actor, w.critic = actor, critic = mlp(4, 6, 3), mlp(4, 6, 1)
    w.opt = opt = torch.optim.RMSprop([*actor.parameters(), *critic.parameters()], lr=0.01)

    def step(states, actions, rewards):
        values = critic(states)[:, 0]
        with torch.no_grad():
            advantage, out = torch.zeros(()), []
            following = torch.cat([values[1:], values.new_zeros(1)])
            for t in reversed(range(len(rewards))):
                delta = rewards[t] + 0.99 * following[t] - values[t]
                advantage = delta + 0.99 * 0.95 * advantage
                out.append(advantage)
            advantages = torch.stack(out[::-1])
            targets = advantages + values
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        logits = actor(states)
        logp = torch.log_softmax(logits, -1)
        entropy = -(logp.exp() * logp).sum(-1).mean()
        chosen = logp.gather(1, actions.unsqueeze(-1)).squeeze(-1)
        loss = -(chosen * advantages).mean() + 0.5 * F.mse_loss(values, targets) - 0.01 * entropy
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*actor.parameters(), *critic.parameters()], 0.5)
        opt.step()
        return loss.item(), entropy.item()

    return step


@case("replay with cuts", args=episode, calls=10)
def clipped_objective_with_an_early_stop(w):
    w.policy = policy = mlp(4, 6, 3)
    w.opt = opt = torch.optim.SGD(policy.parameters(), lr=0.5)

    def step(states, actions, rewards):
        with torch.no_grad():
            old = F.log_softmax(policy(states), -1).gather(1, actions[:, None])[:, 0]
        epochs = 0
        for _ in range(4):
            logp = F.log_softmax(policy(states), -1).gather(1, actions[:, None])[:, 0]
            ratio = (logp - old).exp()
            clipped = ratio.clamp(0.8, 1.2)
            loss = -torch.min(ratio * rewards, clipped * rewards).mean()
            kl = (old - logp).mean()
            if kl > 0.01:
                break
            opt.zero_grad()
            loss.backward()
            opt.step()
            epochs += 1
        return epochs, loss.detach()

    return step


@case("replay", args=episode)
def q_learning_with_a_slow_target(w):
    w.q, w.target = q, target = mlp(4, 6, 3), mlp(4, 6, 3)
    target.load_state_dict(q.state_dict())
    w.opt = opt = torch.optim.AdamW(q.parameters(), lr=0.01)

    def step(states, actions, rewards):
        done = (rewards > 0.5).float()
        with torch.no_grad():
            best = q(states.roll(1, 0)).argmax(1, keepdim=True)
            goal = rewards + 0.9 * (1 - done) * target(states.roll(1, 0)).gather(1, best)[:, 0]
        loss = F.smooth_l1_loss(q(states).gather(1, actions[:, None])[:, 0], goal)
        opt.zero_grad()
        loss.backward()
        opt.step()
        with torch.no_grad():
            for p, slow in zip(q.parameters(), target.parameters(), strict=True):
                slow.mul_(0.95).add_(p, alpha=0.05)
        return loss.detach()

    return step


@case("replay", args=episode)
def two_critics_and_a_temperature(w):
    w.actor, w.c1, w.c2 = actor, c1, c2 = mlp(4, 6, 1), mlp(5, 6, 1), mlp(5, 6, 1)
    w.log_alpha = log_alpha = torch.zeros(1, requires_grad=True)
    w.opts = opts = [
        torch.optim.Adam(actor.parameters(), lr=0.01),
        torch.optim.Adam([*c1.parameters(), *c2.parameters()], lr=0.01),
        torch.optim.Adam([log_alpha], lr=0.05),
    ]

    def step(states, actions, rewards):
        pair = torch.cat([states, actions[:, None].float()], 1)
        with torch.no_grad():
            goal = rewards[:, None] + 0.9 * torch.min(c1(pair), c2(pair))
        losses = [F.mse_loss(c1(pair), goal) + F.mse_loss(c2(pair), goal)]
        opts[1].zero_grad()
        losses[0].backward()
        opts[1].step()
        for p in (*c1.parameters(), *c2.parameters()):
            p.requires_grad_(False)
        action = torch.tanh(actor(states))
        pair = torch.cat([states, action], 1)
        logp = -(action**2).sum(1, keepdim=True)
        losses.append((log_alpha.exp().detach() * logp - torch.min(c1(pair), c2(pair))).mean())
        opts[0].zero_grad()
        losses[1].backward()
        opts[0].step()
        for p in (*c1.parameters(), *c2.parameters()):
            p.requires_grad_(True)
        losses.append(-(log_alpha * (logp.detach() + 1.0)).mean())
        opts[2].zero_grad()
        losses[2].backward()
        opts[2].step()
        return [x.item() for x in losses]

    return step


# ---- adversaries


def noise(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    return X + 0.1 * i, torch.linspace(-1, 1, 10 + 0 * i).reshape(5, 2) * (1 + i % 3)


@case("replay", args=noise, backend="c")
def generator_and_discriminator_in_turn(w):
    w.g, w.d = g, d = mlp(2, 6, 4), mlp(4, 6, 1)
    w.og = og = torch.optim.Adam(g.parameters(), lr=0.01, betas=(0.5, 0.999))
    w.od = od = torch.optim.Adam(d.parameters(), lr=0.01, betas=(0.5, 0.999))

    def step(real, z):
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        fake = g(z)
        od.zero_grad()
        loss_d = F.binary_cross_entropy_with_logits(d(real), ones)
        loss_d = loss_d + F.binary_cross_entropy_with_logits(d(fake.detach()), zeros)
        loss_d.backward()
        od.step()
        og.zero_grad()
        loss_g = F.binary_cross_entropy_with_logits(d(fake), ones)
        loss_g.backward()
        og.step()
        return {"d": loss_d.item(), "g": loss_g.item()}

    return step


@case("replay", args=lambda i: (*noise(i), i % 3 == 2), calls=12)
def critic_steps_between_generator_steps(w):
    w.g, w.d = g, d = mlp(2, 6, 4).double(), mlp(4, 6, 1).double()
    w.og = og = torch.optim.RMSprop(g.parameters(), lr=0.01)
    w.od = od = torch.optim.RMSprop(d.parameters(), lr=0.01)

    def step(real, z, train_generator):
        real, z = real.double(), z.double()
        d.requires_grad_(True)
        od.zero_grad()
        fake = g(z).detach()
        mix = torch.linspace(0, 1, len(real))[:, None]
        between = (mix * real + (1 - mix) * fake).requires_grad_(True)
        (gradient,) = torch.autograd.grad(d(between).sum(), between, create_graph=True)
        penalty = (gradient.norm(2, dim=1) - 1).pow(2).mean()
        loss = d(fake).mean() - d(real).mean() + 10 * penalty
        loss.backward()
        od.step()
        if train_generator:
            d.requires_grad_(False)
            og.zero_grad()
            (-d(g(z)).mean()).backward()
            og.step()
        return loss.detach(), penalty.detach()

    return step


@case("replay", args=batch)
def adversarial_examples_by_the_sign(w):
    w.net = net = mlp(4, 6, 3)
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x, y):
        attacked = x.clone()
        for _ in range(2):
            attacked.requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(net(attacked), y), attacked)
            moved = attacked.detach() + 0.05 * g.sign()
            attacked = torch.max(torch.min(moved, x + 0.1), x - 0.1)
        opt.zero_grad()
        loss = F.cross_entropy(net(attacked), y)
        loss.backward()
        opt.step()
        return loss.item()

    return step


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -ctx.strength * g, None


@case("replay", args=lambda i: (*batch(i), 2 / (1 + math.exp(-0.3 * i)) - 1))
def gradients_reversed_for_another_domain(w):
    w.body, w.label, w.domain = body, label, domain = mlp(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)
    w.opt = opt = torch.optim.SGD([p for m in (body, label, domain) for p in m.parameters()], 0.1)

    def step(x, y, strength):
        h = torch.tanh(body(x))
        which = domain(_Reversed.apply(h, strength))[:, 0]
        loss = F.cross_entropy(label(h), y)
        loss = loss + F.binary_cross_entropy_with_logits(which, (y > 0).float())
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach()

    return step


# ---- data and targets


@case("replay", args=lambda i: (*batch(i), 0.3 + 0.1 * (i % 4), torch.arange(5).roll(i)))
def mixed_examples(w):
    w.net = net = mlp(4, 6, 3)
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def step(x, y, lam, order):
        out = net(lam * x + (1 - lam) * x[order])
        loss = lam * F.cross_entropy(out, y) + (1 - lam) * F.cross_entropy(out, y[order])
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach(), (out.argmax(1) == y).float().mean()

    return step


@case("replay", args=batch, backend="c")
def labels_smoothed_by_hand(w):
    w.net = net = mlp(4, 6, 3)
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x, y):
        logp = net(x).log_softmax(-1)
        with torch.no_grad():
            soft = torch.full_like(logp, 0.1 / (logp.size(1) - 1))
            soft.scatter_(1, y.unsqueeze(1), 0.9)
        loss = (-soft * logp).sum(-1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach()

    return step


@case(
    "replay with cuts",
    args=batch,
    changes={4: lambda w: setattr(w, "threshold", 0.9)},
    calls=12,
)
def easy_examples_first(w):
    w.threshold = 1.2
    w.net = net = mlp(4, 6, 3)
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.01)

    def step(x, y):
        losses = F.cross_entropy(net(x), y, reduction="none")
        easy = losses.detach() < w.threshold
        if not easy.any():
            return None
        loss = losses[easy].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach(), easy.sum()

    return step


def bucket(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens padded to one of two lengths, and how many count."""
    long = 4 if i % 3 else 7
    return torch.arange(3 * long).reshape(3, long) % 9, torch.tensor([long, long - 1, long - 3])


@case("replay", args=bucket, calls=12)
def sequences_in_buckets(w):
    w.table, w.head = embed, head = nn.Embedding(9, 4), nn.Linear(4, 9)
    w.opt = opt = torch.optim.Adagrad([*embed.parameters(), *head.parameters()], lr=0.1)

    def step(tokens, lengths):
        mask = torch.arange(tokens.size(1))[None, :] < lengths[:, None]
        out = head(embed(tokens).cumsum(1))[:, :-1]
        losses = F.cross_entropy(out.transpose(1, 2), tokens[:, 1:], reduction="none")
        mask = mask[:, 1:].float()
        loss = (losses * mask).sum() / mask.sum().clamp(min=1)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach()

    return step


@case("replay", args=lambda i: (*batch(i), torch.tensor([0, 3, 7, 9, i % 10])))
def noise_by_a_schedule(w):
    betas = torch.linspace(1e-3, 0.2, 10)
    w.bars = bars = torch.cumprod(1 - betas, 0)
    w.net = net = mlp(5, 6, 4)
    w.opt = opt = torch.optim.AdamW(net.parameters(), lr=0.01)

    def step(x, y, t):
        eps = torch.sin(x * 7)
        a = bars[t][:, None]
        noisy = a.sqrt() * x + (1 - a).sqrt() * eps
        guess = net(torch.cat([noisy, t[:, None] / 10], 1))
        weights = (bars / (1 - bars)).clamp(max=5)[t]
        loss = (weights[:, None] * (guess - eps) ** 2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach()

    return step


# ---- teachers and averages


@case("replay", args=batch, changes={4: lambda w: setattr(w, "ramp", 0.7)})
def mean_teacher(w):
    w.ramp = 0.1
    w.student, w.teacher = student, teacher = mlp(4, 6, 3), mlp(4, 6, 3)
    teacher.load_state_dict(student.state_dict())
    for p in teacher.parameters():
        p.requires_grad_(False)
    w.opt = opt = torch.optim.SGD(student.parameters(), lr=0.1)

    @torch.no_grad()
    def follow(rate):
        for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
            q.mul_(rate).add_(p.detach(), alpha=1 - rate)

    def step(x, y):
        out = student(x)
        with torch.no_grad():
            goal = F.softmax(teacher(x + 0.01), -1)
        loss = F.cross_entropy(out, y) + w.ramp * F.mse_loss(F.softmax(out, -1), goal)
        opt.zero_grad()
        loss.backward()
        opt.step()
        follow(0.9)
        return loss.detach()

    return step


@case("replay", args=batch, changes={4: lambda w: setattr(w, "temperature", 4.0)})
def distilled_at_a_temperature(w):
    w.temperature = 2.0
    w.net, w.big = net, big = mlp(4, 5, 3), mlp(4, 9, 3).eval()
    w.opt = opt = torch.optim.Adam(net.parameters(), lr=0.01)

    def step(x, y):
        t = w.temperature
        with torch.no_grad():
            hint = F.log_softmax(big(x) / t, -1)
        out = net(x)
        soft = F.kl_div(F.log_softmax(out / t, -1), hint, log_target=True, reduction="batchmean")
        loss = 0.5 * F.cross_entropy(out, y) + 0.5 * t * t * soft
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach()

    return step


@case("replay", args=batch)
def averaged_model(w):
    w.net = net = mlp(4, 6, 3)
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.1)
    w.average = average = torch.optim.swa_utils.AveragedModel(net)

    def step(x, y):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        average.update_parameters(net)
        return loss.detach()

    return step


@case("replay with cuts", args=batch, calls=12)
def best_weights_kept(w):
    w.net = net = mlp(4, 6, 3)
    w.best = best = {"loss": torch.tensor(math.inf)}
    w.kept = kept = [torch.zeros_like(p) for p in net.parameters()]
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.3)

    def step(x, y):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        better = bool(loss < best["loss"])
        if better:
            best["loss"].copy_(loss.detach())
            with torch.no_grad():
                for k, p in zip(kept, net.parameters(), strict=True):
                    k.copy_(p)
        return loss.detach(), better

    return step


@case("replay", args=batch, calls=12)
def contrastive_queue(w):
    w.q, w.k = q, k = mlp(4, 6, 3), mlp(4, 6, 3)
    w.queue = queue = F.normalize(torch.linspace(-1, 1, 45).reshape(3, 15), dim=0)
    w.at = at = torch.zeros(1, dtype=torch.int64)
    w.opt = opt = torch.optim.SGD(q.parameters(), lr=0.1)

    def step(x, y):
        with torch.no_grad():
            for a, b in zip(q.parameters(), k.parameters(), strict=True):
                b.copy_(b * 0.9 + a * 0.1)
            keys = F.normalize(k(x * 0.9), dim=1)
        queries = F.normalize(q(x), dim=1)
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ queue.clone().detach()], 1) / 0.2
        loss = F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64))
        opt.zero_grad()
        loss.backward()
        opt.step()
        start = int(at)
        queue[:, start : start + len(x)] = keys.T
        at[0] = (start + len(x)) % queue.shape[1]
        return loss.detach()

    return step


# ---- clusters, codes, structures


@case("replay", args=batch, backend="c")
def clusters_in_a_step(w):
    w.net = net = mlp(4, 6, 2)
    w.centers = centers = torch.linspace(-0.5, 0.5, 6).reshape(3, 2)
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.05)

    def step(x, y):
        h = net(x)
        with torch.no_grad():
            for _ in range(3):
                near = (h[:, None] - centers).pow(2).sum(-1).argmin(1)
                members = F.one_hot(near, 3).to(h.dtype)
                count = members.sum(0)[:, None]
                means = members.T @ h / count.clamp(min=1)
                centers.copy_(torch.where(count > 0, means, centers))
        loss = (h - centers[near]).pow(2).sum(1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach(), near

    return step


@case("replay", args=batch)
def codes_learnt_by_averages(w):
    w.enc, w.dec = enc, dec = mlp(4, 6, 2), mlp(2, 6, 4)
    w.book = book = torch.linspace(-1, 1, 8).reshape(4, 2)
    w.count, w.sums = count, sums = torch.ones(4), book.clone()
    w.opt = opt = torch.optim.Adam([*enc.parameters(), *dec.parameters()], lr=0.01)

    def step(x, y):
        z = enc(x)
        far = z.pow(2).sum(1, keepdim=True) - 2 * z @ book.t() + book.pow(2).sum(1)
        index = far.argmin(1)
        code = F.embedding(index, book)
        passed = z + (code - z).detach()
        loss = F.mse_loss(dec(passed), x) + 0.25 * F.mse_loss(z, code.detach())
        opt.zero_grad()
        loss.backward()
        opt.step()
        with torch.no_grad():
            hot = F.one_hot(index, 4).float()
            count.mul_(0.9).add_(hot.sum(0), alpha=0.1)
            sums.mul_(0.9).add_(hot.t() @ z.detach(), alpha=0.1)
            book.copy_(sums / (count[:, None] + 1e-5))
        return loss.detach(), index

    return step


@case("replay", args=batch)
def random_field_over_tags(w):
    w.emit = emit = mlp(4, 6, 3)
    w.move = move = nn.Parameter(torch.linspace(-0.5, 0.5, 9).reshape(3, 3))
    w.opt = opt = torch.optim.SGD([*emit.parameters(), move], lr=0.1)

    def best(scores):
        with torch.no_grad():
            at, back = scores[0], []
            for s in scores[1:]:
                top, where = (at[:, None] + move).max(0)
                back.append(where)
                at = top + s
            path = [at.argmax()]
            for where in reversed(back):
                path.append(where[path[-1]])
            return torch.stack(path[::-1])

    def step(x, y):
        scores = emit(x)
        alpha = scores[0]
        for s in scores[1:]:
            alpha = torch.logsumexp(alpha[:, None] + move, 0) + s
        gold = scores.gather(1, y[:, None]).sum() + move[y[:-1], y[1:]].sum()
        loss = torch.logsumexp(alpha, 0) - gold
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach(), best(scores)

    return step


@case("replay with cuts", args=lambda i: (X[i % 5],), calls=12)
def greedy_decoding_until_the_end(w):
    w.cell, w.out = cell, out = nn.GRUCell(3, 4), nn.Linear(4, 3)

    @torch.no_grad()
    def step(h):
        token, found = torch.zeros(3), []
        h = h[None]
        while len(found) < 5:
            h = cell(token[None], h)
            best = out(h)[0].argmax()
            found.append(best)
            if best.item() == 2:
                break
            token = F.one_hot(best, 3).float()
        return torch.stack(found), h

    return step


@case("replay with cuts", args=batch, calls=12)
def semi_hard_triplets(w):
    w.net = net = mlp(4, 6, 3)
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.02)

    def step(x, y):
        h = F.normalize(net(x), dim=1)
        far = 1 - h @ h.t()
        alike = y[:, None] == y[None]
        positive = torch.where(alike, far, torch.zeros_like(far)).max(1).values
        triplets = positive[:, None] - far + 0.5
        chosen = (~alike) & (triplets > 0)
        count = int(chosen.sum())
        loss = triplets[chosen].sum() / max(count, 1)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach(), count

    return step


# ---- how gradients are used


@case("replay", args=lambda i: (*batch(i), i % 3 == 2), calls=12, backend="c")
def gradients_gathered_until_a_flag(w):
    w.net = net = mlp(4, 6, 3)
    w.opt = opt = torch.optim.AdamW(net.parameters(), lr=0.01)

    def step(x, y, last):
        loss = F.cross_entropy(net(x), y) / 3
        loss.backward()
        if last:
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            return loss.detach(), norm
        return loss.detach(), None

    return step


def _freeze(w):
    for p in w.net[0].parameters():
        p.requires_grad_(False)
        p.grad = None


def _thaw(w):
    w.net[0].requires_grad_(True)
    w.opt.param_groups[0]["lr"] = 0.002


@case("replay", args=batch, changes={3: _freeze, 7: _thaw}, calls=11)
def rates_by_layer_and_layers_thawed(w):
    w.net = net = mlp(4, 6, 5, 3)
    layers = [m for m in net if isinstance(m, nn.Linear)]
    groups = [
        {"params": m.parameters(), "lr": 0.1 * 0.5 ** (len(layers) - k)}
        for k, m in enumerate(layers)
    ]
    w.opt = opt = torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def step(x, y):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        return loss.detach()

    return step


def _untie(w):
    w.head.weight = nn.Parameter(w.embed.weight.detach().clone())
    w.opt.add_param_group({"params": [w.head.weight]})


@case("replay", args=bucket, changes={6: _untie}, calls=13)
def weights_tied(w):
    w.embed, w.head = embed, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = embed.weight
    w.opt = opt = torch.optim.SGD(embed.parameters(), lr=0.1)

    def step(tokens, lengths):
        opt.zero_grad()
        loss = F.cross_entropy(head(embed(tokens)).flatten(0, 1), tokens.roll(1, 1).flatten())
        loss.backward()
        opt.step()
        return loss.detach(), head.weight is embed.weight

    return step


@case("rerun", args=batch)
def second_order_with_a_closure(w):
    w.net = net = mlp(4, 6, 3).double()
    w.opt = opt = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)

    def step(x, y):
        x = x.double()

        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        return opt.step(closure)

    return step


@case("replay", args=batch)
def sharpness_aware_steps(w):
    w.net = net = mlp(4, 6, 3)
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x, y):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
            moves = []
            for p in net.parameters():
                moves.append(p.grad * (0.05 / (norm + 1e-12)))
                p.add_(moves[-1])
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            for p, move in zip(net.parameters(), moves, strict=True):
                p.sub_(move)
        opt.step()
        return loss.detach()

    return step


@case("replay", args=batch)
def inner_step_differentiated(w):
    w.params = params = [
        nn.Parameter(torch.linspace(-0.5, 0.5, 12).reshape(4, 3)),
        nn.Parameter(torch.zeros(3)),
    ]
    w.opt = opt = torch.optim.Adam(params, lr=0.01)

    def step(x, y):
        inner = F.cross_entropy(x @ params[0] + params[1], y)
        grads = torch.autograd.grad(inner, params, create_graph=True)
        fast = [p - 0.4 * g for p, g in zip(params, grads, strict=True)]
        outer = F.cross_entropy((x + 0.1) @ fast[0] + fast[1], y)
        opt.zero_grad()
        outer.backward()
        opt.step()
        return inner.detach(), outer.detach()

    return step


@case("replay with cuts", args=batch, calls=12)
def conflicting_gradients_projected(w):
    w.net = net = mlp(4, 6, 3)
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x, y):
        params = list(net.parameters())
        out = net(x)
        tasks = [F.cross_entropy(out, y), (out[:, 0] - x.mean(1) * 3).pow(2).mean()]
        flat = [
            torch.cat([g.flatten() for g in torch.autograd.grad(t, params, retain_graph=True)])
            for t in tasks
        ]
        dot = flat[0] @ flat[1]
        conflict = False
        if dot < 0:
            conflict = True
            flat[0], flat[1] = (
                flat[0] - dot / flat[1].pow(2).sum() * flat[1],
                flat[1] - dot / flat[0].pow(2).sum() * flat[0],
            )
        total, at = flat[0] + flat[1], 0
        for p in params:
            p.grad = total[at : at + p.numel()].view_as(p).clone()
            at += p.numel()
        opt.step()
        return conflict, tasks[0].detach()

    return step


@case("replay with cuts", args=lambda i: (X * (30.0 if i in (3, 8) else 1.0), LABELS), calls=12)
def step_left_out_where_the_norm_is_large(w):
    w.net = net = mlp(4, 6, 3).double()
    w.opt = opt = torch.optim.Adam(net.parameters(), lr=0.01)

    def step(x, y):
        x = x.double()
        opt.zero_grad()
        loss = F.mse_loss(net(x), F.one_hot(y, 3) * x.abs().max())
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
        skipped = norm.item() > 5.0
        if not skipped:
            opt.step()
        return loss.item(), skipped

    return step


@case("replay", args=lambda i: (*batch(i), float(i)), calls=9)
def rate_by_a_formula_of_the_step(w):
    w.net = net = mlp(4, 6, 3)
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x, y, n):
        warm = min(1.0, (n + 1) / 4)
        for group in opt.param_groups:
            group["lr"] = 0.1 * warm * 0.5 * (1 + math.cos(math.pi * n / 20))
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        return loss.detach(), opt.param_groups[0]["lr"]

    return step


@case("replay", args=batch)
def tasks_weighted_by_their_uncertainty(w):
    w.body, w.heads = body, heads = mlp(4, 6), nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 1)])
    w.logs = logs = nn.Parameter(torch.zeros(2))
    w.opt = opt = torch.optim.Adam([*body.parameters(), *heads.parameters(), logs], lr=0.01)

    def step(x, y):
        h = torch.tanh(body(x))
        losses = [F.cross_entropy(heads[0](h), y), F.mse_loss(heads[1](h)[:, 0], x.mean(1))]
        total = sum(torch.exp(-s) * loss + s for s, loss in zip(logs, losses, strict=True))
        opt.zero_grad()
        total.backward()
        opt.step()
        return total.detach(), [loss.detach() for loss in losses]

    return step


@case("replay", args=batch)
def penalty_for_what_was_learnt_before(w):
    w.net = net = mlp(4, 6, 3)
    w.fisher = fisher = {n: torch.full_like(p, 0.5) for n, p in net.named_parameters()}
    w.before = before = {n: p.detach().clone() for n, p in net.named_parameters()}
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x, y):
        loss = F.cross_entropy(net(x), y)
        for name, p in net.named_parameters():
            loss = loss + 0.1 * (fisher[name] * (p - before[name]) ** 2).sum()
        opt.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in net.named_parameters():
                fisher[name].mul_(0.9).add_(p.grad**2, alpha=0.1)
        opt.step()
        return loss.detach()

    return step


@case("replay", args=batch)
def weight_normed_by_a_power_iteration(w):
    w.weight = weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
    w.u = u = F.normalize(torch.ones(3), dim=0)
    w.opt = opt = torch.optim.SGD([weight], lr=0.1)

    def step(x, y):
        with torch.no_grad():
            v = F.normalize(weight.t() @ u, dim=0)
            u.copy_(F.normalize(weight @ v, dim=0))
        sigma = torch.dot(u.clone(), weight @ v)
        loss = F.cross_entropy(F.linear(x, weight / sigma), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach(), sigma.detach()

    return step


@case("replay", args=batch, calls=9)
def slow_weights_every_third_step(w):
    w.net = net = mlp(4, 6, 3)
    w.slow = slow = [p.detach().clone() for p in net.parameters()]
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.1)
    w.state = state = {"n": 0}

    def step(x, y):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        state["n"] += 1
        if state["n"] % 3 == 0:
            with torch.no_grad():
                for p, s in zip(net.parameters(), slow, strict=True):
                    s.add_(p - s, alpha=0.5)
                    p.copy_(s)
        return loss.detach()

    return step


@case("replay with cuts", args=lambda i: (X * (3.0 if i == 4 else 0.3), LABELS), calls=12)
def loss_scaled_by_hand(w):
    w.net = net = mlp(4, 6, 3)
    w.scale = scale = torch.tensor(1e38)
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x, y):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        (loss * scale).backward()
        finite = all(torch.isfinite(p.grad).all() for p in net.parameters())
        if finite:
            for p in net.parameters():
                p.grad.div_(scale)
            opt.step()
            scale.mul_(1.5)
        else:
            scale.mul_(0.5)
        return loss.detach(), finite

    return step


@case("replay", args=lambda i: (X[None] + 0.1 * i, torch.zeros(1, 1, 6) + 0.01 * i), calls=8)
def state_carried_from_call_to_call(w):
    w.rnn, w.head = rnn, head = nn.RNN(4, 6, batch_first=True), nn.Linear(6, 4)
    w.opt = opt = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=0.01)

    def step(x, h):
        h = h.detach()
        out, h = rnn(x[:, :-1], h)
        loss = F.mse_loss(head(out), x[:, 1:])
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach(), h.detach()

    return step


@case("replay", args=batch, changes={4: lambda w: setattr(w, "mask", None)}, calls=9)
def connections_pruned_by_a_mask(w):
    w.net = net = mlp(4, 6, 3)
    w.mask = (net[0].weight.detach().abs() > 0.2).float()
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x, y):
        if w.mask is not None:
            with torch.no_grad():
                net[0].weight.mul_(w.mask)
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        if w.mask is not None:
            net[0].weight.grad *= w.mask
        opt.step()
        return loss.detach(), (net[0].weight == 0).sum()

    return step


@case("replay", args=lambda i: (*batch(i), [True, i % 2 == 0, i % 3 == 0, True]), calls=14)
def teacher_forced_by_flags(w):
    w.cell, w.out = cell, out = nn.GRUCell(3, 6), nn.Linear(6, 3)
    w.opt = opt = torch.optim.SGD([*cell.parameters(), *out.parameters()], lr=0.1)

    def step(x, y, forced):
        h, token, loss = torch.zeros(1, 6), torch.zeros(1, 3), 0.0
        for k, force in enumerate(forced):
            h = cell(token, h)
            logits = out(h)
            loss = loss + F.cross_entropy(logits, y[k : k + 1])
            token = F.one_hot(y[k : k + 1], 3).float() if force else logits.softmax(-1).detach()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach()

    return step


@case("replay", args=batch)
def focal_loss_with_counts(w):
    w.net = net = mlp(4, 6, 3)
    w.counts = counts = torch.ones(3)
    w.opt = opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(x, y):
        counts.mul_(0.9).add_(torch.bincount(y, minlength=3), alpha=0.1)
        weights = (1 / counts) / (1 / counts).sum()
        p = net(x).softmax(-1).gather(1, y[:, None])[:, 0]
        loss = (-weights[y] * (1 - p) ** 2 * p.log()).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(4)
@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
def test_programs(name):
    check(CASES[name])
