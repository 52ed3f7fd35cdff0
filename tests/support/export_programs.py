"""Training steps as people write them, for every export.

Each function makes a step and the arguments of its n-th call; numbers are drawn from torch's
default generator.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn


def vae():
    enc, mu, lv, dec = (
        nn.Linear(12, 16),
        nn.Linear(16, 4),
        nn.Linear(16, 4),
        nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12), nn.Sigmoid()),
    )
    ps = [*enc.parameters(), *mu.parameters(), *lv.parameters(), *dec.parameters()]
    o = torch.optim.Adam(ps, 1e-2)

    def step(x, beta=0.5):
        h = enc(x).relu()
        m, logits = mu(h), lv(h)
        z = m + torch.randn_like(m) * (0.5 * logits).exp()
        r = dec(z)
        rec = F.binary_cross_entropy(r, x, reduction="sum")
        kl = -0.5 * (1 + logits - m.pow(2) - logits.exp()).sum()
        loss = (rec + beta * kl) / len(x)
        o.zero_grad()
        loss.backward()
        o.step()
        return {"loss": loss.item(), "kl": kl.detach()}

    return step, lambda i: (torch.rand(6, 12),)


def gan():
    G = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 5))
    D = nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    og, od = (
        torch.optim.Adam(G.parameters(), 1e-2, betas=(0.5, 0.999)),
        torch.optim.Adam(D.parameters(), 1e-2, betas=(0.5, 0.999)),
    )

    def step(x, z):
        od.zero_grad()
        fake = G(z)
        b = F.binary_cross_entropy_with_logits
        ld = b(D(x), torch.ones(len(x), 1)) + b(D(fake.detach()), torch.zeros(len(x), 1))
        ld.backward()
        od.step()
        og.zero_grad()
        lg = b(D(fake), torch.ones(len(x), 1))
        lg.backward()
        og.step()
        return ld.item(), lg.item()

    return step, lambda i: (torch.randn(6, 5), torch.randn(6, 3))


def unet():
    d, m, u, o = (
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ConvTranspose2d(8, 4, 2, 2),
        nn.Conv2d(8, 1, 1),
    )
    net = nn.ModuleList([d, m, u, o])
    gn = nn.GroupNorm(2, 8)
    opt = torch.optim.RMSprop([*net.parameters(), *gn.parameters()], 1e-3, momentum=0.9)

    def step(x, y):
        a = F.silu(d(x))
        b = F.silu(gn(m(a)))
        c = torch.cat([a, u(b)], 1)
        p = o(c)
        inter = (p.sigmoid() * y).sum()
        dice = 1 - (2 * inter + 1) / (p.sigmoid().sum() + y.sum() + 1)
        loss = F.binary_cross_entropy_with_logits(p, y) + dice
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        return loss.detach()

    return step, lambda i: (torch.randn(2, 2, 8, 8), (torch.rand(2, 1, 8, 8) > 0.5).float())


def gru_lm():
    emb, rnn, head = (
        nn.Embedding(11, 6),
        nn.GRU(6, 8, num_layers=2, batch_first=True),
        nn.Linear(8, 11),
    )
    ps = [*emb.parameters(), *rnn.parameters(), *head.parameters()]
    o = torch.optim.AdamW(ps, 1e-2)

    def step(x, h):
        out, h2 = rnn(emb(x[:, :-1]), h)
        loss = F.cross_entropy(head(out).flatten(0, 1), x[:, 1:].flatten())
        o.zero_grad()
        loss.backward()
        n = nn.utils.clip_grad_norm_(ps, 1.0)
        o.step()
        return loss.detach(), h2.detach(), n

    return step, lambda i: (torch.randint(0, 11, (3, 7)), torch.zeros(2, 3, 8))


def ema_model():
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    ema = copy.deepcopy(net)
    for p in ema.parameters():
        p.requires_grad_(False)
    o = torch.optim.SGD(net.parameters(), 0.1, nesterov=True, momentum=0.9)

    def step(x, y):
        o.zero_grad()
        loss = F.smooth_l1_loss(net(x), y)
        loss.backward()
        o.step()
        with torch.no_grad():
            for a, b in zip(ema.parameters(), net.parameters(), strict=True):
                a.mul_(0.99).add_(b, alpha=0.01)
            c = F.mse_loss(ema(x), y)
        return loss.item(), c

    return step, lambda i: (torch.randn(4, 5), torch.randn(4, 2))


def contrastive():
    f = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    t = nn.Parameter(torch.tensor(0.07).log().neg())
    o = torch.optim.Adam([*f.parameters(), t], 1e-2)

    def step(a, b):
        za, zb = F.normalize(f(a), dim=-1), F.normalize(f(b), dim=-1)
        logits = za @ zb.T * t.exp().clamp(max=100)
        y = torch.arange(len(a))
        loss = (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2
        o.zero_grad()
        loss.backward()
        o.step()
        return loss, (logits.argmax(1) == y).float().mean()

    return step, lambda i: (torch.randn(5, 6), torch.randn(5, 6))


def dqn():
    q, tq = (
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
    )
    tq.load_state_dict(q.state_dict())
    o = torch.optim.Adam(q.parameters(), 1e-2)

    def step(s, a, r, s2, done):
        with torch.no_grad():
            tgt = r + 0.99 * tq(s2).max(1).values * (1 - done)
        qa = q(s).gather(1, a[:, None]).squeeze(1)
        loss = F.huber_loss(qa, tgt)
        o.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(q.parameters(), 0.5)
        o.step()
        with torch.no_grad():
            for x, y in zip(tq.parameters(), q.parameters(), strict=True):
                x.lerp_(y, 0.05)
        return loss.item()

    return step, lambda i: (
        torch.randn(6, 4),
        torch.randint(0, 3, (6,)),
        torch.randn(6),
        torch.randn(6, 4),
        (torch.rand(6) > 0.8).float(),
    )


def accumulation():
    net = nn.Linear(4, 2)
    o = torch.optim.SGD(net.parameters(), 0.1)
    st = {"i": 0}

    def step(x, y):
        loss = F.mse_loss(net(x), y) / 2
        loss.backward()
        st["i"] += 1
        if st["i"] % 2 == 0:
            o.step()
            o.zero_grad()
        return loss.detach()

    return step, lambda i: (torch.randn(4, 4), torch.randn(4, 2))


def mixture_of_experts():
    gate = nn.Linear(6, 3)
    ex = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
    o = torch.optim.AdamW([*gate.parameters(), *ex.parameters()], 1e-2)

    def step(x, y):
        w = gate(x).softmax(-1)
        v, k = w.topk(2, -1)
        outs = torch.stack([e(x) for e in ex], 1)
        p = (outs.gather(1, k[..., None].expand(-1, -1, 6)) * v[..., None]).sum(1)
        aux = (w.mean(0) ** 2).sum() * 3
        loss = F.l1_loss(p, y) + 0.01 * aux
        o.zero_grad()
        loss.backward()
        o.step()
        return loss.detach()

    return step, lambda i: (torch.randn(5, 6), torch.randn(5, 6))


def vit():
    pe = nn.Conv2d(3, 8, 4, 4)
    cls = nn.Parameter(torch.zeros(1, 1, 8))
    pos = nn.Parameter(torch.randn(1, 5, 8) * 0.02)
    enc = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    hd = nn.Linear(8, 4)
    ps = [*pe.parameters(), cls, pos, *enc.parameters(), *hd.parameters()]
    o = torch.optim.AdamW(ps, 1e-3, weight_decay=0.05)

    def step(x, y):
        t = pe(x).flatten(2).transpose(1, 2)
        t = torch.cat([cls.expand(len(x), -1, -1), t], 1) + pos
        loss = F.cross_entropy(hd(enc(t)[:, 0]), y, label_smoothing=0.1)
        o.zero_grad()
        loss.backward()
        o.step()
        return loss.item()

    return step, lambda i: (torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2,)))


def mixup_ce():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    o = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def step(x, y, lam):
        perm = torch.randperm(len(x))
        xm = lam * x + (1 - lam) * x[perm]
        out = net(xm)
        loss = lam * F.cross_entropy(out, y) + (1 - lam) * F.cross_entropy(out, y[perm])
        o.zero_grad()
        loss.backward()
        o.step()
        return loss.detach(), out.argmax(1)

    return step, lambda i: (torch.randn(4, 1, 6, 6), torch.randint(0, 3, (4,)), 0.3 + 0.05 * i)


def gnn():
    W1, W2 = nn.Linear(4, 8), nn.Linear(8, 2)
    o = torch.optim.Adam([*W1.parameters(), *W2.parameters()], 1e-2)
    src, dst = torch.randint(0, 9, (20,)), torch.randint(0, 9, (20,))

    def agg(h):
        return torch.zeros(9, h.shape[1]).index_add_(0, dst, h[src])

    def step(x, y, m):
        h = F.elu(W1(agg(x) + x))
        out = W2(agg(h) + h)
        logits = F.cross_entropy(out, y, reduction="none")
        loss = (logits * m).sum() / m.sum().clamp(min=1)
        o.zero_grad()
        loss.backward()
        o.step()
        return loss.item()

    return step, lambda i: (
        torch.randn(9, 4),
        torch.randint(0, 2, (9,)),
        (torch.rand(9) > 0.3).float(),
    )


PROGRAMS = {
    f.__name__: f
    for f in (
        vae,
        gan,
        unet,
        gru_lm,
        ema_model,
        contrastive,
        dqn,
        accumulation,
        mixture_of_experts,
        vit,
        mixup_ce,
        gnn,
    )
}
