"""Programs over numpy arrays as people write them, for `tracejit.compile`.

Each function makes a step, the arguments of its n-th call, and what the step changes.
"""

from __future__ import annotations

from types import SimpleNamespace as NS

import numpy as np


def R(seed=0):
    return np.random.RandomState(seed)


def minchar():
    r = R()
    V, H, T = 12, 10, 6
    Wxh, Whh, Why = r.randn(H, V) * 0.01, r.randn(H, H) * 0.01, r.randn(V, H) * 0.01
    bh, by = np.zeros((H, 1)), np.zeros((V, 1))
    mem = [np.zeros_like(p) for p in (Wxh, Whh, Why, bh, by)]

    def lossFun(inputs, targets, hprev):
        xs, hs, ys, ps = {}, {}, {}, {}
        hs[-1] = np.copy(hprev)
        loss = 0
        for t in range(len(inputs)):
            xs[t] = np.zeros((V, 1))
            xs[t][inputs[t]] = 1
            hs[t] = np.tanh(np.dot(Wxh, xs[t]) + np.dot(Whh, hs[t - 1]) + bh)
            ys[t] = np.dot(Why, hs[t]) + by
            ps[t] = np.exp(ys[t]) / np.sum(np.exp(ys[t]))
            loss += -np.log(ps[t][targets[t], 0])
        dWxh, dWhh, dWhy = np.zeros_like(Wxh), np.zeros_like(Whh), np.zeros_like(Why)
        dbh, dby = np.zeros_like(bh), np.zeros_like(by)
        dhnext = np.zeros_like(hs[0])
        for t in reversed(range(len(inputs))):
            dy = np.copy(ps[t])
            dy[targets[t]] -= 1
            dWhy += np.dot(dy, hs[t].T)
            dby += dy
            dh = np.dot(Why.T, dy) + dhnext
            dhraw = (1 - hs[t] * hs[t]) * dh
            dbh += dhraw
            dWxh += np.dot(dhraw, xs[t].T)
            dWhh += np.dot(dhraw, hs[t - 1].T)
            dhnext = np.dot(Whh.T, dhraw)
        for dparam in [dWxh, dWhh, dWhy, dbh, dby]:
            np.clip(dparam, -5, 5, out=dparam)
        return loss, dWxh, dWhh, dWhy, dbh, dby, hs[len(inputs) - 1]

    def step(inputs, targets, hprev):
        loss, *gs, h = lossFun(inputs, targets, hprev)
        for param, dparam, m in zip([Wxh, Whh, Why, bh, by], gs, mem, strict=True):
            m += dparam * dparam
            param += -0.1 * dparam / np.sqrt(m + 1e-8)
        return loss, h

    seq = [int(i) for i in r.randint(0, V, T + 1)]
    return (
        step,
        lambda i: (seq[:-1], seq[1:], np.zeros((H, 1)) + i * 0.01),
        lambda: [Wxh, Whh, Why, bh, by] + mem,
    )


def kmeans():
    r = R(1)
    X = r.randn(60, 3)
    C = X[:4].copy()

    def step(X):
        d = ((X[:, None, :] - C[None, :, :]) ** 2).sum(axis=2)
        lab = d.argmin(axis=1)
        for k in range(len(C)):
            m = lab == k
            C[k] = (X * m[:, None]).sum(0) / max(m.sum(), 1)
        return d.min(axis=1).mean(), lab

    return step, lambda i: (X + 0.01 * i,), lambda: [C]


def kmeans_masks():
    r = R(1)
    X = r.randn(60, 3)
    C = X[:4].copy()

    def step(X):
        d = np.linalg.norm(X[:, np.newaxis] - C, axis=2)
        lab = np.argmin(d, axis=1)
        for k in range(4):
            pts = X[lab == k]
            if len(pts) > 0:
                C[k] = pts.mean(axis=0)
        return lab

    return step, lambda i: (X + 0.01 * i,), lambda: [C]


def logreg():
    r = R(2)
    X = r.randn(50, 5)
    y = (r.rand(50) > 0.5).astype(int)
    w = np.zeros(5)
    b = np.zeros(1)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    def step(X, y, lr=0.1, l2=1e-3):
        p = sigmoid(np.dot(X, w) + b)
        loss = -np.mean(
            y * np.log(p + 1e-12) + (1 - y) * np.log(1 - p + 1e-12)
        ) + 0.5 * l2 * np.sum(w**2)
        w[:] -= lr * (X.T @ (p - y) / len(y) + l2 * w)
        b[:] -= lr * np.mean(p - y)
        acc = np.mean((p > 0.5) == y)
        return loss, acc

    return step, lambda i: (X, y, 0.1 / (1 + i)), lambda: [w, b]


def softmax_reg():
    r = R(3)
    X = r.randn(40, 6)
    y = r.randint(0, 3, 40)
    W = r.randn(6, 3) * 0.01

    def step(X, y):
        s = X.dot(W)
        s -= np.max(s, axis=1, keepdims=True)
        p = np.exp(s)
        p /= np.sum(p, axis=1, keepdims=True)
        n = X.shape[0]
        loss = -np.sum(np.log(p[np.arange(n), y])) / n + 0.5 * 0.1 * np.sum(W * W)
        p[np.arange(n), y] -= 1
        p /= n
        dW = X.T.dot(p) + 0.1 * W
        W[...] = W - 0.5 * dW
        return loss

    return step, lambda i: (X, y), lambda: [W]


def adam_dicts():
    r = R(4)
    params = {
        "W1": r.randn(5, 8) * 0.1,
        "b1": np.zeros(8),
        "W2": r.randn(8, 1) * 0.1,
        "b2": np.zeros(1),
    }
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    state = {"t": 0}
    X = r.randn(20, 5)
    y = r.randn(20, 1)

    def step(X, y):
        a1 = X @ params["W1"] + params["b1"]
        h = np.maximum(0, a1)
        out = h @ params["W2"] + params["b2"]
        diff = out - y
        loss = (diff**2).mean()
        g = {}
        d = 2 * diff / diff.size
        g["W2"] = h.T @ d
        g["b2"] = d.sum(axis=0)
        dh = d @ params["W2"].T
        dh[a1 <= 0] = 0
        g["W1"] = X.T @ dh
        g["b1"] = dh.sum(0)
        state["t"] += 1
        t = state["t"]
        for k in params:
            m[k] = 0.9 * m[k] + 0.1 * g[k]
            v[k] = 0.999 * v[k] + 0.001 * (g[k] ** 2)
            mh = m[k] / (1 - 0.9**t)
            vh = v[k] / (1 - 0.999**t)
            params[k] -= 0.01 * mh / (np.sqrt(vh) + 1e-8)
        return loss

    return step, lambda i: (X, y), lambda: [*params.values(), *m.values(), *v.values(), state["t"]]


def conv_windows():
    r = R(5)
    X = r.randn(2, 3, 8, 8)
    K = r.randn(4, 3, 3, 3) * 0.1

    def step(X):
        cols = np.lib.stride_tricks.sliding_window_view(X, (3, 3), axis=(2, 3))
        out = np.tensordot(cols, K, axes=([1, 4, 5], [1, 2, 3])).transpose(0, 3, 1, 2)
        return np.maximum(out, 0).max(axis=(2, 3)).sum()

    return step, lambda i: (X + i,), lambda: [K]


def im2col_pad():
    r = R(5)
    X = r.randn(2, 3, 6, 6)
    K = r.randn(4, 27) * 0.1

    def step(X):
        Xp = np.pad(X, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="constant")
        N = X.shape[0]
        cols = np.zeros((N, 27, 36))
        i = 0
        for c in range(3):
            for a in range(3):
                for b in range(3):
                    cols[:, i, :] = Xp[:, c, a : a + 6, b : b + 6].reshape(N, -1)
                    i += 1
        out = K @ cols
        out = out.reshape(N, 4, 3, 2, 3, 2).max(axis=(3, 5))
        return out

    return step, lambda i: (X + i,), lambda: [K]


def gradcheck():
    r = R(6)
    W = r.randn(4, 3)
    x = r.randn(5, 4)

    def f(W):
        return np.sum(np.tanh(x.dot(W)) ** 2)

    def step(W):
        num = np.zeros_like(W)
        h = 1e-5
        it = np.nditer(W, flags=["multi_index"], op_flags=["readwrite"])
        while not it.finished:
            ix = it.multi_index
            old = W[ix]
            W[ix] = old + h
            fp = f(W)
            W[ix] = old - h
            fm = f(W)
            W[ix] = old
            num[ix] = (fp - fm) / (2 * h)
            it.iternext()
        t = np.tanh(x.dot(W))
        an = x.T.dot(2 * t * (1 - t**2))
        return np.max(np.abs(num - an) / np.maximum(1e-8, np.abs(num) + np.abs(an)))

    return step, lambda i: (W,), lambda: [W]


def gradcheck_ndindex():
    r = R(6)
    W = r.randn(3, 2)
    x = r.randn(5, 3)

    def f(W):
        return np.sum(np.tanh(x.dot(W)) ** 2)

    def step(W):
        num = np.zeros_like(W)
        h = 1e-5
        for i in range(W.shape[0]):
            for j in range(W.shape[1]):
                Wp = W.copy()
                Wp[i, j] += h
                Wm = W.copy()
                Wm[i, j] -= h
                num[i, j] = (f(Wp) - f(Wm)) / (2 * h)
        return num

    return step, lambda i: (W + i * 0.1,), lambda: [W]


class Linear:
    def __init__(s, i, o, r):
        s.W = r.randn(i, o) * np.sqrt(2 / i)
        s.b = np.zeros((1, o))
        s.vW = 0
        s.vb = 0

    def forward(s, x):
        s.x = x
        return np.dot(x, s.W) + s.b

    def backward(s, g):
        s.dW = np.dot(s.x.T, g) / len(g)
        s.db = np.sum(g, axis=0, keepdims=True) / g.shape[0]
        return np.dot(g, s.W.T)


class ReLU:
    def forward(s, x):
        s.mask = x <= 0
        out = x.copy()
        out[s.mask] = 0
        return out

    def backward(s, g):
        g[s.mask] = 0
        return g


class BN:
    def __init__(s, n):
        s.g = np.ones(n)
        s.b = np.zeros(n)
        s.rm = np.zeros(n)
        s.rv = np.ones(n)

    def forward(s, x):
        mu, var = x.mean(0), x.var(0)
        s.rm = 0.9 * s.rm + 0.1 * mu
        s.rv = 0.9 * s.rv + 0.1 * var
        s.std = np.sqrt(var + 1e-5)
        s.xh = (x - mu) / s.std
        return s.g * s.xh + s.b

    def backward(s, g):
        n = len(g)
        s.dg = (g * s.xh).sum(0)
        s.db = g.sum(0)
        dx = g * s.g
        return (n * dx - dx.sum(0) - s.xh * (dx * s.xh).sum(0)) / (n * s.std)


def classes_net():
    r = R(7)
    layers = [Linear(6, 10, r), BN(10), ReLU(), Linear(10, 3, r)]
    X = r.randn(16, 6)
    y = r.randint(0, 3, 16)
    onehot = np.eye(3)[y]
    hist = []

    def step(X, onehot, lr):
        out = X
        for layer in layers:
            out = layer.forward(out)
        e = np.exp(out - out.max(axis=1, keepdims=True))
        p = e / e.sum(axis=1, keepdims=True)
        loss = -(onehot * np.log(p)).sum(axis=1).mean()
        g = p - onehot
        for layer in reversed(layers):
            g = layer.backward(g)
        for layer in layers:
            if isinstance(layer, Linear):
                layer.vW = 0.9 * layer.vW - lr * layer.dW
                layer.vb = 0.9 * layer.vb - lr * layer.db
                layer.W += layer.vW
                layer.b += layer.vb
            elif hasattr(layer, "dg"):
                layer.g -= lr * layer.dg
                layer.b -= lr * layer.db
        hist.append(loss)
        return loss

    return (
        step,
        lambda i: (X, onehot, 0.1),
        lambda: (
            [a for layer in layers for a in vars(layer).values() if isinstance(a, np.ndarray)]
            + hist
        ),
    )


def lstm():
    r = R(8)
    D, H, T = 3, 5, 4
    W = r.randn(D + H, 4 * H) * 0.1
    b = np.zeros(4 * H)
    Wo = r.randn(H, 1) * 0.1

    def sig(z):
        return 1.0 / (1.0 + np.exp(-z))

    X = r.randn(T, 2, D)
    Y = r.randn(2, 1)

    def step(X, Y):
        h, c = np.zeros((2, H)), np.zeros((2, H))
        cache = []
        for t in range(T):
            z = np.hstack((X[t], h))
            a = z @ W + b
            i, f, o, g = np.split(a, 4, axis=1)
            i, f, o, g = sig(i), sig(f), sig(o), np.tanh(g)
            cp = c
            c = f * cp + i * g
            h = o * np.tanh(c)
            cache.append((z, i, f, o, g, cp, c))
        d = h @ Wo - Y
        loss = np.square(d).mean()
        dWo = h.T @ d
        dh = d @ Wo.T
        dc = np.zeros_like(c)
        dW = np.zeros_like(W)
        db = np.zeros_like(b)
        for z, i, f, o, g, cp, c in cache[::-1]:
            tc = np.tanh(c)
            dc = dc + dh * o * (1 - tc**2)
            da = np.concatenate(
                [
                    dc * g * i * (1 - i),
                    dc * cp * f * (1 - f),
                    dh * tc * o * (1 - o),
                    dc * i * (1 - g**2),
                ],
                axis=1,
            )
            dW += z.T @ da
            db += da.sum(0)
            dz = da @ W.T
            dh = dz[:, D:]
            dc = dc * f
        for p, g in ((W, dW), (b, db), (Wo, dWo)):
            p -= 0.1 * g
        return loss

    return step, lambda i: (X, Y), lambda: [W, b, Wo]


def pca_power():
    r = R(9)
    X = r.randn(30, 6)
    v = np.ones(6) / np.sqrt(6)

    def step(X):
        Xc = X - X.mean(axis=0)
        C = Xc.T @ Xc / (len(X) - 1)
        for _ in range(5):
            u = C @ v
            v[:] = u / np.linalg.norm(u)
        return v @ C @ v

    return step, lambda i: (X,), lambda: [v]


def qlearn():
    Q = np.zeros((5, 3))

    def step(s, a, r, s2, alpha):
        td = r + 0.9 * np.max(Q[s2]) - Q[s, a]
        Q[s, a] += alpha * td
        return td, int(np.argmax(Q[s]))

    return step, lambda i: (i % 5, i % 3, float(i % 2), (i + 1) % 5, 0.5 / (1 + i)), lambda: [Q]


def attention():
    r = R(10)
    X = r.randn(2, 5, 8)
    Wq, Wk, Wv = (r.randn(8, 8) * 0.3 for _ in range(3))
    mask = np.triu(np.ones((5, 5), dtype=bool), k=1)

    def softmax(x, axis=-1):
        e = np.exp(x - np.max(x, axis=axis, keepdims=True))
        return e / np.sum(e, axis=axis, keepdims=True)

    def step(X):
        q, k, v = X @ Wq, X @ Wk, X @ Wv
        s = q @ k.swapaxes(-1, -2) / np.sqrt(8)
        s = np.where(mask, -np.inf, s)
        w = softmax(s)
        o = np.matmul(w, v)
        mu = o.mean(-1, keepdims=True)
        sd = o.std(-1, keepdims=True)
        return (o - mu) / (sd + 1e-5)

    return step, lambda i: (X + i * 0.01,), lambda: []


def gmm():
    r = R(11)
    X = r.randn(40, 2)
    mu = r.randn(3, 2)
    pi = np.ones(3) / 3
    var = np.ones(3)

    def step(X):
        d = ((X[:, None] - mu) ** 2).sum(-1)
        lp = np.log(pi) - d / (2 * var) - np.log(2 * np.pi * var)
        mx = lp.max(1, keepdims=True)
        lse = mx + np.log(np.exp(lp - mx).sum(1, keepdims=True))
        g = np.exp(lp - lse)
        n = g.sum(0)
        mu[:] = g.T @ X / n[:, None]
        var[:] = (g * d).sum(0) / (2 * n)
        pi[:] = n / n.sum()
        return lse.sum()

    return step, lambda i: (X,), lambda: [mu, pi, var]


def sgd_minibatch():
    r = R(12)
    X = r.randn(100, 4)
    y = X @ r.randn(4) + 0.1
    w = np.zeros(4)

    def step(idx, lr):
        xb, yb = X[idx], y[idx]
        e = xb @ w - yb
        g = 2 * xb.T @ e / len(idx)
        np.subtract(w, lr * g, out=w)
        return np.mean(np.abs(e))

    perm = [R(k).permutation(100)[:10] for k in range(5)]
    return step, lambda i: (perm[i % 5], 0.1 * 0.9**i), lambda: [w]


def heat():
    u = np.zeros((12, 12))
    u[0] = 1.0

    def step(k):
        u[1:-1, 1:-1] += k * (
            u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1]
        )
        return u.sum()

    return step, lambda i: (0.1,), lambda: [u]


def life():
    g = (R(13).rand(10, 10) > 0.6).astype(np.int64)

    def step():
        n = sum(
            np.roll(np.roll(g, i, 0), j, 1)
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            if (i, j) != (0, 0)
        )
        g[:] = ((n == 3) | ((g == 1) & (n == 2))).astype(g.dtype)
        return g.sum()

    return step, lambda i: (), lambda: [g]


def word2vec():
    r = R(14)
    Win, Wout = r.randn(20, 5) * 0.1, r.randn(20, 5) * 0.1

    def step(center, ctx, neg):
        v = Win[center]
        idx = np.concatenate(([ctx], neg))
        u = Wout[idx]
        lab = np.zeros(len(idx))
        lab[0] = 1
        p = 1 / (1 + np.exp(-u.dot(v)))
        e = p - lab
        gv = e.dot(u)
        np.add.at(Wout, idx, -0.1 * np.outer(e, v))
        Win[center] -= 0.1 * gv
        return -np.log(p[0]) - np.log(1 - p[1:]).sum()

    return (
        step,
        lambda i: (i % 20, (i * 3) % 20, np.array([1, 4, (i * 7) % 20, 4])),
        lambda: [Win, Wout],
    )


def rmsprop_namespace():
    r = R(15)
    p = NS(w=r.randn(4, 2), b=np.zeros(2))
    c = NS(w=np.zeros((4, 2)), b=np.zeros(2))
    X = r.randn(9, 4)
    Y = r.randn(9, 2)

    def step(X, Y):
        d = X @ p.w + p.b - Y
        for n, g in (("w", X.T @ d / 9), ("b", d.mean(0))):
            cc = getattr(c, n)
            cc *= 0.99
            cc += 0.01 * g * g
            q = getattr(p, n)
            q -= 0.01 * g / (np.sqrt(cc) + 1e-8)
        return np.linalg.norm(d)

    return step, lambda i: (X, Y), lambda: [p.w, p.b, c.w, c.b]


def dropout_outside():
    r = R(16)
    W = r.randn(5, 4)
    X = r.randn(7, 5)

    def step(X, mask):
        h = np.tanh(X @ W) * mask / 0.8
        W[:] -= 0.01 * X.T @ ((h - 1) * mask * (1 - np.tanh(X @ W) ** 2))
        return h.mean(axis=0)

    return step, lambda i: (X, (R(i).rand(7, 4) < 0.8)), lambda: [W]


PROGRAMS = {
    f.__name__: f
    for f in (
        minchar,
        kmeans,
        kmeans_masks,
        logreg,
        softmax_reg,
        adam_dicts,
        conv_windows,
        im2col_pad,
        gradcheck_ndindex,
        classes_net,
        lstm,
        pca_power,
        attention,
        gmm,
        sgd_minibatch,
        heat,
        life,
        word2vec,
        rmsprop_namespace,
        dropout_outside,
        qlearn,
        gradcheck,
    )
}
