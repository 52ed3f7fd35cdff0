"""Complex tensors in whole steps: values, layouts, sharing and gradients are eager's, in replay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import tracejit
from support.capture_checks import sharing
from tracejit.errors import CannotExport, CannotSave, SideEffectError, UnsupportedOperation
from tracejit.testing import assert_equal_to_eager, assert_trains_like_eager

Tensor = torch.Tensor
C64, C128 = torch.complex64, torch.complex128


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


def check(step: Callable, *args: object, calls: int = 4, **options: object) -> None:
    """Equal to eager by the rule of `testing`, and replayed."""
    options = {"on_unsupported": "raise"} | options
    compiled = assert_equal_to_eager(step, lambda: args, calls=calls, **options)
    assert compiled.stats.replays, compiled.explain_mode()
    ours, theirs = compiled(*args), step(*args)
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert (a.dtype, a.stride(), a.is_conj()) == (b.dtype, b.stride(), b.is_conj())
    assert sharing([*leaves(ours), *args]) == sharing([*leaves(theirs), *args])


def leaves(tree: object) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


# ---- rotary positions, as Llama's reference code has them


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: (dim // 2)].float() / dim))
    t = torch.arange(end, device=freqs.device)
    freqs = torch.outer(t, freqs).float()
    return torch.polar(torch.ones_like(freqs), freqs)


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    ndim = x.ndim
    assert 0 <= 1 < ndim
    assert freqs_cis.shape == (x.shape[1], x.shape[-1])
    shape = [d if i == 1 or i == ndim - 1 else 1 for i, d in enumerate(x.shape)]
    return freqs_cis.view(*shape)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    xq_ = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    xk_ = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    freqs_cis = reshape_for_broadcast(freqs_cis, xq_)
    xq_out = torch.view_as_real(xq_ * freqs_cis).flatten(3)
    xk_out = torch.view_as_real(xk_ * freqs_cis).flatten(3)
    return xq_out.type_as(xq), xk_out.type_as(xk)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return norm.type_as(x) * self.weight


class Block(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        for name in ("wq", "wk", "wv", "wo"):
            setattr(self, name, nn.Linear(dim, dim, bias=False))
        self.w1, self.w2, self.w3 = (
            nn.Linear(a, b, bias=False) for a, b in ((dim, 48), (48, dim), (dim, 48))
        )
        self.attention_norm, self.ffn_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor) -> Tensor:
        bsz, seqlen, _ = x.shape
        h = self.attention_norm(x)
        xq, xk, xv = (w(h).view(bsz, seqlen, self.heads, -1) for w in (self.wq, self.wk, self.wv))
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis=freqs_cis)
        xq, keys, values = (v.transpose(1, 2) for v in (xq, xk, xv))
        scores = torch.matmul(xq, keys.transpose(2, 3)) / self.head_dim**0.5 + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        out = torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        x = x + self.wo(out)
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Llama(nn.Module):
    """The table as a buffer, a plain attribute, or computed in each call; blocks checkpointed."""

    def __init__(self, table: str) -> None:
        super().__init__()
        self.tok_embeddings, self.table = nn.Embedding(23, 32), table
        self.layers = nn.ModuleList([Block() for _ in range(2)])
        self.norm, self.output = RMSNorm(32), nn.Linear(32, 23, bias=False)
        freqs = precompute_freqs_cis(8, 24)
        if table in ("buffer", "checkpointed"):
            self.register_buffer("freqs_cis", freqs, persistent=False)
        else:
            self.freqs_cis = freqs

    def forward(self, tokens: Tensor, start: int = 0) -> Tensor:
        seqlen, h = tokens.shape[1], self.tok_embeddings(tokens)
        if self.table == "computed":
            freqs_cis = precompute_freqs_cis(8, 24)[start : start + seqlen]
        else:
            self.freqs_cis = self.freqs_cis.to(h.device)
            freqs_cis = self.freqs_cis[start : start + seqlen]
        mask = torch.triu(torch.full((seqlen, seqlen), float("-inf")), diagonal=1).type_as(h)
        for layer in self.layers:
            if self.table == "checkpointed":
                h = torch.utils.checkpoint.checkpoint(
                    layer, h, freqs_cis, mask, use_reentrant=False
                )
            else:
                h = layer(h, freqs_cis, mask)
        return self.output(self.norm(h)).float()


def training(table: str, autocast: bool = False) -> tuple[Callable, Llama]:
    torch.manual_seed(0)
    model = Llama(table)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(tokens: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step, model


@pytest.mark.parametrize("table", ["buffer", "attribute", "computed", "checkpointed"])
def test_llama_as_its_authors_wrote_it(table):
    torch.manual_seed(1)
    tokens = torch.randint(23, (3, 17))

    def make() -> tuple[Callable, list[Tensor]]:
        step, model = training(table)
        return lambda: step(tokens), list(model.parameters())

    compiled, *_ = assert_trains_like_eager(make, calls=10, on_unsupported="raise")
    assert compiled.stats.replays >= 7, compiled.explain_mode()


def test_llama_under_autocast_learns_as_in_eager():
    torch.manual_seed(1)
    batches = [torch.randint(23, (3, 17)) for _ in range(8)]
    losses = []
    for compile in (lambda f: f, lambda f: tracejit.compile(f, on_unsupported="raise")):
        step, _ = training("buffer", autocast=True)
        run = compile(step)
        losses.append([run(tokens).item() for tokens in batches * 2])
    for ours, theirs in zip(*losses, strict=True):
        assert abs(ours - theirs) < 2e-2 * theirs
    assert run.stats.replays >= 12, run.explain_mode()


def test_a_place_in_the_table_that_moves():
    """Decoding: the table is read from a place that each call brings."""
    torch.manual_seed(1)
    model = Llama("buffer")

    def step(tokens, start):
        return model(tokens, start).sum()

    compiled = tracejit.compile(step, on_unsupported="raise")
    tokens = torch.randint(23, (2, 5))
    for start in (0, 3, 5, 9, 4, 7):
        torch.testing.assert_close(compiled(tokens, start), step(tokens, start))
    assert compiled.stats.replays, compiled.explain_mode()


# ---- each function

Z = torch.view_as_complex(randn(3, 5, 2))
W = torch.view_as_complex(randn(5, 2) + 0.5)
X = randn(3, 5)


def parts(z: Tensor) -> Tensor:
    return torch.view_as_real(z)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "mul": lambda z, w, x: (z * w, w * z, z * x, x * z, z * 2, 0.5 * z, torch.multiply(z, w)),
    "add": lambda z, w, x: (z + w, z + x, x + z, z + 2, 0.5 + z, torch.add(z, w, alpha=2)),
    "sub": lambda z, w, x: (z - w, z - x, x - z, z - 2, 0.5 - z, torch.sub(z, w, alpha=0.5)),
    "div": lambda z, w, x: (z / w, w / z, z / 2, z / x, x / w, 0.5 / z, z.reciprocal()),
    "numbers": lambda z, w, x: (z * 1j, 2j + z, x * (1 - 2j), z / 2j, x + 1j),
    "conj": lambda z, w, x: (
        (z.conj() * w).clone(),
        torch.conj(z).conj(),
        z.conj().resolve_conj(),
        z.resolve_conj(),
        torch.conj_physical(z),
        z.conj().imag.clone(),
        z.conj()[1].clone(),
        z.conj().is_conj(),
        z.conj().conj().is_conj(),
    ),
    "parts": lambda z, w, x: (z.real, z.imag, torch.real(z), torch.imag(z), torch.view_as_real(z)),
    "unary": lambda z, w, x: (-z, z.square(), z.exp(), (z.imag * 1j).exp()),
    "to real": lambda z, w, x: (z.abs(), torch.abs(w), z.angle(), abs(z)),
    "made": lambda z, w, x: (
        torch.complex(x, x + 1),
        torch.complex(x, x[0]),
        torch.polar(x.abs(), x),
        torch.polar(x.T, x.T),
        torch.complex(x.double(), x.double()),
        torch.polar(-x, x * 3),
    ),
    "shapes": lambda z, w, x: (
        z.view(15),
        z.reshape(5, 3),
        z.T.reshape(-1),
        z[None, :, 1:],
        z[..., ::2],
        z[1],
        z.unsqueeze(1).expand(-1, 4, -1).clone(),
        z.transpose(0, 1),
        z.permute(1, 0).contiguous(),
        z.flatten(),
        torch.flatten(z.T),
        torch.reshape(z, (1, 15)),
        z.squeeze(),
        z.unflatten(1, (1, 5)),
        z.split(2)[1],
        z.chunk(2, 1)[0],
        z.unbind(1)[2],
        z.select(1, -1),
        z.narrow(1, 1, 3),
        z.movedim(0, 1),
        z.clone(),
        z.detach(),
        z.repeat(2, 1),
        z.view_as(z),
        z.to(torch.complex64),
        z.to("cpu"),
        z.mT,
    ),
    "joined": lambda z, w, x: (
        torch.cat([z, w[None]]),
        torch.stack([z, z.conj()], -1),
        z[torch.tensor([2, 0, 0])],
        z[:, torch.tensor([1, 1])],
        z[..., torch.tensor([1, -1])],
        z.index_select(-1, torch.tensor([4, 0])),
    ),
    "sums": lambda z, w, x: (z.sum(), z.sum(-1), z.mean(0, keepdim=True), torch.sum(z, (0, 1))),
    "told": lambda z, w, x: (
        torch.tensor([z.is_complex(), x.is_complex(), z.is_floating_point(), z.is_contiguous()]),
        torch.tensor([z.dim(), z.numel(), len(z), z.element_size(), z.stride(0), z.size(1)]),
        torch.tensor(z.dtype is torch.complex64 and z.device == x.device and z.shape == x.shape),
    ),
    "dtypes": lambda z, w, x: (
        z * torch.ones(5, dtype=torch.float64),
        z * torch.ones((), dtype=torch.float64),
        z * torch.arange(5),
        z + (torch.arange(5) > 2),
    ),
}


@pytest.mark.sweep(0.25)
@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, backend):
    """Of tensors from outside, and of what a step has made. Numbers that are complex keep a step in
    rerun, as the C code of Python may read a runtime scalar beside them."""
    function = FUNCTIONS[name]

    def inside(x, y):
        z = torch.view_as_complex(torch.stack([x, y], -1))
        return function(z * W, z[0] + W, x)

    for step, given in ((function, (Z, W, X)), (inside, (X, randn(3, 5) + 1))):
        compiled = assert_equal_to_eager(
            step, lambda given=given: given, calls=4, on_unsupported="raise", backend=backend
        )
        assert bool(compiled.stats.replays) == (name not in ("numbers", "unary"))
        ours, theirs = leaves(compiled(*given)), leaves(step(*given))
        for a, b in zip(ours, theirs, strict=True):
            assert (a.dtype, a.stride(), a.storage_offset(), a.is_conj()) == (
                *(b.dtype, b.stride(), b.storage_offset(), b.is_conj()),
            )
        assert sharing([*ours, *given]) == sharing([*theirs, *given])


SMOOTH: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mul": lambda z, w, x: z * w,
    "mul by reals": lambda z, w, x: z * x * 3,
    "mul by itself": lambda z, w, x: z * z,
    "add": lambda z, w, x: z + w * 2 - x,
    "div": lambda z, w, x: z / w + x / z,
    "exp": lambda z, w, x: z.exp() * w,
    "conj": lambda z, w, x: z.conj() * w + torch.conj_physical(z) * x,
    "parts": lambda z, w, x: torch.complex(z.imag * x, (z * w).real),
    "abs": lambda z, w, x: z.abs() * w,
    "abs at zero": lambda z, w, x: (z * (x > 0)).abs() * w,
    "angle": lambda z, w, x: z.angle() * w,
    "polar": lambda z, w, x: torch.polar(x, z.real) * w + torch.polar(x.abs(), w.imag),
    "shapes": lambda z, w, x: z.T.reshape(3, 5)[1:, None] * w[:3, None] + z[:1, torch.arange(5)],
    "joined": lambda z, w, x: torch.stack([torch.cat([z, w[None]]).sum(0), z.mean(0)]) * w,
}


@pytest.mark.sweep(0.25)
@pytest.mark.parametrize("name", SMOOTH)
def test_gradients(name):
    """Of real leaves, in both precisions; the second derivative too."""
    for dtype in (torch.float32, torch.float64):
        a, b = (t.to(dtype).requires_grad_() for t in (randn(3, 5, 2), randn(5, 2) + 0.5))
        x = randn(3, 5).to(dtype).requires_grad_()
        weight = randn(1).to(dtype)

        def step(a, b, x, weight=weight):
            for leaf in (a, b, x):
                leaf.grad = None
            out = parts(SMOOTH[name](torch.view_as_complex(a), torch.view_as_complex(b), x))
            (out.sin() * weight).sum().backward()
            return out.detach()

        def twice(a, b, x):
            out = parts(SMOOTH[name](torch.view_as_complex(a), torch.view_as_complex(b), x))
            got = torch.autograd.grad(
                out.sin().sum(), (a, b, x), create_graph=True, allow_unused=True
            )
            total = sum((g * g).sum() for g in got if g is not None)
            return torch.autograd.grad(total, (a, b, x), allow_unused=True)

        check(step, a, b, x)
        if "abs" not in name and "angle" not in name and "polar" not in name:
            assert_equal_to_eager(
                twice, lambda given=(a, b, x): given, calls=1, on_unsupported="raise"
            )


def test_memory_is_shared_and_written():
    """Views of pairs and of complex numbers see what is written to either, also outside."""
    table, real = Z.clone(), randn(4, 2)

    def step(table, real):
        y = torch.view_as_complex(real * 2)
        y[1] = table[0, 0]
        y[2:].mul_(2)
        y.real.add_(1)
        z = torch.view_as_complex(real)
        z += y
        table[1] = y[0]
        table[2, 1:].conj().copy_(y)
        table[0].imag.zero_()
        return y, torch.view_as_real(y), torch.view_as_complex(real), table[1], y.conj().conj()

    both = []
    compiled = tracejit.compile(step, on_unsupported="raise")
    for run in (step, compiled):
        given = [table.clone(), real.clone()]
        for _ in range(4):
            out = leaves(run(*given))
        versions = [x._version for x in given]
        both.append(([*out, *given], versions))
    (theirs, then), (ours, now) = both
    assert sharing(ours) == sharing(theirs) and all(now) and all(then)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert compiled.stats.replays, compiled.explain_mode()


def test_state_and_values_of_complex_numbers():
    """A complex tensor that the step keeps for the next call; a number computed of one."""

    class Memory:
        held = torch.zeros(5, dtype=C64)

    def make() -> Callable:
        memory = Memory()

        def step(x):
            z = torch.complex(x, -x) + memory.held * 0.5
            memory.held = z
            return z.abs().max().item(), z

        return step

    plain, compiled = make(), tracejit.compile(make(), on_unsupported="raise")
    for k in range(6):
        (a, ours), (b, theirs) = compiled(X[0] + k), plain(X[0] + k)
        assert abs(a - b) < 1e-5 * abs(b)
        torch.testing.assert_close(ours, theirs)


# ---- what is refused, and what eager rejects


def test_a_returned_complex_tensor_has_no_backward():
    x = X.clone().requires_grad_()
    compiled = tracejit.compile(lambda x: torch.complex(x, x) * 2, on_unsupported="raise")
    for _ in range(4):
        out = compiled(x)
        assert out.requires_grad
        with pytest.raises(RuntimeError, match="complex tensor leaves the step"):
            out.abs().sum().backward()


def test_a_lazy_conjugate_does_not_leave_the_step():
    for step in (lambda z: z.conj(), lambda z: (z * 2).conj()):
        with pytest.raises(SideEffectError, match="resolve_conj"):
            tracejit.compile(step, on_unsupported="raise")(Z)


REFUSED = {
    "matmul": lambda z, x: z @ z.T,
    "fft": lambda z, x: torch.fft.fft(z),
    "a cast": lambda z, x: z.to(torch.complex128),
    "of a real tensor": lambda z, x: x.to(torch.complex64),
    "half": lambda z, x: torch.complex(x.half(), x.half()),
    "mixed": lambda z, x: torch.cat([z, x]),
    "where": lambda z, x: torch.where(x > 0, z, z),
    "bits": lambda z, x: z.view(torch.float32),
    "a module": lambda z, x: F.linear(z, z),
    "values": lambda z, x: z.sum().item(),
    "as a list": lambda z, x: z.tolist(),
    "writing by a mask": lambda z, x: z.__setitem__(x > 0, 0),
    "backward": lambda z, x: torch.autograd.backward(z, z),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_functions_are_refused(name):
    for step, given in (
        (REFUSED[name], Z),
        (lambda z, x: REFUSED[name](z * 1, x), Z.clone()),
    ):
        with pytest.raises(UnsupportedOperation, match="complex|Complex"):
            tracejit.compile(step, on_unsupported="raise")(given, X)


REJECTED = {
    "a wrong last axis": lambda z, x: torch.view_as_complex(x),
    "an odd place": lambda z, x: torch.view_as_complex(x.flatten()[1:13].view(6, 2)),
    "an odd stride": lambda z, x: torch.view_as_complex(x[:, :2]),
    "a strided last axis": lambda z, x: torch.view_as_complex(x.T[1:3].T[..., :2].mT.mT[:, ::1]),
    "integers": lambda z, x: torch.view_as_complex(torch.zeros(3, 2, dtype=torch.int64)),
    "no axes": lambda z, x: torch.view_as_complex(x[0, 0]),
    "of a complex one": lambda z, x: torch.view_as_complex(z),
    "of a real one": lambda z, x: torch.view_as_real(x),
    "the imaginary part of a real one": lambda z, x: x.imag,
    "a conjugate": lambda z, x: torch.view_as_real(z.conj()),
    "into a real one": lambda z, x: x.mul_(z),
    "two dtypes": lambda z, x: torch.complex(x, x.double()),
    "shapes": lambda z, x: z * z[:, :3],
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_eager_rejects(name):
    with pytest.raises(RuntimeError) as theirs:
        REJECTED[name](Z.clone(), X.clone())
    with pytest.raises(type(theirs.value)) as ours:
        tracejit.compile(REJECTED[name], on_unsupported="raise")(Z.clone(), X.clone())
    assert not isinstance(ours.value, UnsupportedOperation)


def test_a_complex_leaf_is_refused():
    z = Z.clone().requires_grad_()
    with pytest.raises(UnsupportedOperation, match="let its real and imaginary parts require one"):
        tracejit.compile(lambda z: z.abs().sum(), on_unsupported="raise")(z)


def test_eager_notices_what_is_written_between():
    """A factor that is changed in place before its backward is an error, as in eager."""

    def step(x, other):
        z = torch.complex(x, x)
        factor = torch.complex(other, other)
        out = z * factor
        factor.mul_(2)
        out.abs().sum().backward()

    for run in (step, tracejit.compile(step, on_unsupported="raise")):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(X.clone().requires_grad_(), X)


def test_a_step_with_complex_numbers_falls_back():
    def step(z, x):
        return torch.linalg.vector_norm(z @ z.mT.conj()) * x

    with pytest.warns(UserWarning, match="complex"):
        ours = tracejit.compile(step, on_unsupported="eager")(Z, X)
    torch.testing.assert_close(ours, step(Z, X))


def test_files_keep_no_complex_tensors(tmp_path):
    def reads(z, x):
        return (z * x).abs()

    def returns(x):
        return torch.complex(x, x)

    for step, given in ((reads, (Z, X)), (returns, (X,))):
        compiled = tracejit.compile(step, on_unsupported="raise")
        for _ in range(4):
            compiled(*given)
        with pytest.raises(CannotSave, match="complex tensors. Give it and return"):
            compiled.save(tmp_path / "step")
        with pytest.raises(CannotExport, match="complex tensors"):
            tracejit.to_onnx(step, tmp_path / "step.onnx", *given)


def test_verified_calls_compare_complex_tensors():
    compiled = tracejit.compile(lambda z, x: (z * x, z), verify=1, on_unsupported="raise")
    for _ in range(5):
        compiled(Z, X)
    assert compiled.certificate().holds
