"""Training with DistributedDataParallel, for the processes of `ranks.py`: compiled beside eager."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as distributed
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import tracejit
from tracejit.runtime import graphs, launched_plan
from tracejit.runtime.fake_clock import Fault
from tracejit.runtime.fake_device import Communicated
from tracejit.testing import fake_device

STEPS = 20
RELATIVE = 1e-5  # of parameters, by norm, after STEPS steps
RELATIVE_LOSS = 1e-4


class Block(nn.Module):
    """Of a small residual network."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.other = nn.BatchNorm2d(out)
        self.short = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x):
        y = self.other(self.second(F.relu(self.norm(self.first(x)))))
        return F.relu(y + self.short(x))


class Language(nn.Module):
    """One block of a transformer, its embedding tied to the logits."""

    def __init__(self, words: int = 31, width: int = 16):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(8, width)
        # without a bias: that of the keys has no gradient, and Adam would make steps of its noise
        self.norm, self.attend = nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=False)
        self.project, self.last = nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.logits = nn.Linear(width, words, bias=False)
        self.logits.weight = self.words.weight

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        q, k, v = (
            z.unflatten(-1, (2, -1)).transpose(1, 2)
            for z in self.attend(self.norm(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        return self.logits(x + self.down(F.gelu(self.up(self.last(x)))))


class Unused(nn.Module):
    """Half of it has no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.used(x)


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.Dropout(0.25), nn.Linear(32, 4)
    )


def _residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1),
        Block(4, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def _numbers(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 6), torch.randn(8, 4)


def _odd(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last batch of each epoch of five is smaller."""
    count = 5 if k % 5 == 4 else 8
    return torch.randn(count, 6), torch.randn(count, 4)


def _sometimes_infinite(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In the fourth and eleventh batch, on one rank."""
    x, y = _numbers(k)
    if k in (4, 11) and distributed.get_rank() == 1:
        y[0, 0] = torch.inf
    return x, y


def _images(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 8, 8), torch.randn(4, 4)


def _tokens(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.randint(0, 31, (4, 9))
    return found[:, :-1], found[:, 1:]


def _plain(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def _clipped(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss


def _predicting(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward()
    optimizer.step()
    return loss


def _accumulating(model, optimizer, x, y):
    """Two parts of a batch, the first one without communication."""
    optimizer.zero_grad()
    with model.no_sync():
        first = F.mse_loss(model(x[:4]), y[:4])
        first.backward()
    second = F.mse_loss(model(x[4:]), y[4:])
    second.backward()
    optimizer.step()
    return first + second


def _by_hand(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    for p in model.parameters():
        distributed.all_reduce(p.grad)
        p.grad /= distributed.get_world_size()
    optimizer.step()
    return loss


def _scaled(model, optimizer, x, y):
    """Gradients that are scaled; a step that all ranks skip where one has an infinite gradient."""
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    optimizer.scaler.scale(loss).backward()
    optimizer.scaler.step(optimizer)
    optimizer.scaler.update()
    return loss


def _watched(model, optimizer, x, y):
    """The mean loss of all ranks decides, and is logged with the norm of the gradients."""
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    mean = loss.detach().clone()
    distributed.all_reduce(mean, op=distributed.ReduceOp.AVG)
    if mean.item() > 1.0:
        loss = loss * 0.5
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if norm < 100.0:
        optimizer.step()
    _SEEN.append((mean.item(), norm.item()))
    return loss


_SEEN: list[tuple[float, float]] = []


def _adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def _with_a_scaler(parameters) -> torch.optim.Optimizer:
    optimizer = _sgd(parameters)
    optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    return optimizer


def _sharded(parameters) -> torch.optim.Optimizer:
    return ZeroRedundancyOptimizer(parameters, torch.optim.Adam, lr=1e-3)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module] = _mlp
    optimizer: Callable = _sgd
    step: Callable = _plain
    batch: Callable = _numbers
    wrapped: bool = True
    options: dict = field(default_factory=dict)


CASES = {
    "mlp with adamw and clipping": Case(optimizer=_adamw, step=_clipped),
    "small buckets": Case(optimizer=_adamw, options={"bucket_cap_mb": 0.0004}),
    "gradients as views": Case(options={"gradient_as_bucket_view": True}),
    "a static graph": Case(options={"static_graph": True}),
    "residual": Case(make=_residual, batch=_images),
    "language": Case(make=Language, optimizer=_adamw, step=_predicting, batch=_tokens),
    "accumulation": Case(step=_accumulating),
    "unused": Case(make=Unused, options={"find_unused_parameters": True}),
    "unused and accumulated": Case(
        make=Unused, step=_accumulating, options={"find_unused_parameters": True}
    ),
    "an odd last batch": Case(batch=_odd),
    "by hand": Case(step=_by_hand, wrapped=False),
    "zero": Case(optimizer=_sharded),
    "a scaler": Case(optimizer=_with_a_scaler, step=_scaled, batch=_sometimes_infinite),
    "decisions": Case(step=_watched, optimizer=_adamw),
}


def trained(name: str, backend: str = "auto", log: list[str] | None = None) -> dict[str, object]:
    """Train twice, eagerly and compiled; what is to be asserted. `log` is emptied before each
    call."""
    case = CASES[name]
    found = [_trained(case, kind, log) for kind in (None, backend)]
    (eager, losses, _), (ours, own, step) = found
    worst = 0.0
    for a, b in zip(eager.state_dict().values(), ours.state_dict().values(), strict=True):
        difference = (a.double() - b.double()).norm() / (a.double().norm() + 1e-12)
        worst = max(worst, float(difference))
    pairs = zip(eager.parameters(), ours.parameters(), strict=True)
    assert all((p.grad is None) == (q.grad is None) for p, q in pairs)
    loss = max(abs(a - b) / (abs(a) + 1e-6) for a, b in zip(losses, own, strict=True))
    flat = torch.cat([p.detach().flatten() for p in ours.parameters()])
    first = flat.clone()
    distributed.broadcast(first, 0)
    return {
        "difference": worst,
        "loss": loss,
        "same on ranks": torch.equal(flat, first),
        "replays": step.stats.replays,
        "why": step.explain_mode(),
        "collectives": str(step._last.program.plan).count(" start "),
    }


def trained_on_a_fake_device(name: str) -> dict[str, object]:
    """The same with memory, streams and events of a fake GPU; and what the last call gave it."""
    with fake_device(compiled=False) as device:
        return trained(name, device.name, device.log) | {"log": device.log}


@contextlib.contextmanager
def _graphs(calls: int, launches: int) -> Iterator[None]:
    """Graphs are made after so many calls, of so many launches at least."""
    before = graphs.CALLS, launched_plan.MIN_LAUNCHES
    graphs.CALLS, launched_plan.MIN_LAUNCHES = calls, launches
    try:
        yield
    finally:
        graphs.CALLS, launched_plan.MIN_LAUNCHES = before


def trained_by_graphs(name: str) -> dict[str, object]:
    """The same where each stretch of kernels becomes a graph in the second call of a plan."""
    with _graphs(1, 1):
        return trained_on_a_fake_device(name)


def trained_without_graphs(name: str) -> dict[str, object]:
    """The same, launched kernel by kernel."""
    with _graphs(1, 1 << 20):
        return trained_on_a_fake_device(name)


def without_events_between_graphs() -> str:
    """Nothing waits once two calls have run by graphs."""
    with _graphs(1, 1):
        return without_events(6)


def without_events(last: int = 0) -> str:
    """What a fake GPU says where nothing waits for what the ranks have reduced, from the
    `last` launches of graphs on."""

    def wait(self):
        if sum("launch a graph" in x for x in self.device.log) < last:
            _WAIT(self)

    Communicated.wait = wait
    try:
        with fake_device(compiled=False) as device:
            trained("small buckets", device.name)
    except Fault as fault:
        return str(fault)
    finally:
        Communicated.wait = _WAIT
    return ""


_WAIT = Communicated.wait


def _trained(
    case: Case, backend: str | None, log: list[str] | None = None
) -> tuple[nn.Module, list[float], Callable]:
    torch.manual_seed(0)
    model = case.make()
    if case.wrapped:
        model = DistributedDataParallel(model, **case.options)
    optimizer = case.optimizer(model.parameters())

    def step(x, y):
        return case.step(model, optimizer, x, y)

    called = step
    if backend is not None:
        called = tracejit.compile(step, on_unsupported="raise", backend=backend)
    torch.manual_seed(10 + distributed.get_rank())
    losses = []
    for k in range(STEPS):
        batch = case.batch(k)
        if log is not None:
            log.clear()
        losses.append(float(called(*batch).detach()))
    return model, losses, called


def explained() -> dict[str, object]:
    """The ledger of a step of DistributedDataParallel, beside its plan."""
    _, _, step = _trained(CASES["small buckets"], "auto")
    text = str(step._last.program.plan)
    return step.explain(measure=False).as_dict() | {"text": str(step.explain()), "plan": text}


def unused_by_mistake() -> str:
    """A parameter gets no gradient, and nobody has said that it may."""
    model = DistributedDataParallel(Unused())
    step = tracejit.compile(lambda x: model(x).sum().backward(), on_unsupported="raise")
    try:
        step(torch.ones(2, 6))
    except RuntimeError as error:
        assert all(p.grad is None for p in model.parameters())
        return str(error)
    return ""


class Chosen(nn.Module):
    """Parts of which each call uses some; nobody uses the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(6, 4) for _ in range(4))

    def forward(self, x, chosen):
        return sum(self.parts[i](x) for i in chosen)


def _chosen(k: int) -> tuple[int, ...]:
    """What a rank uses in the k-th call: the first one on all ranks, the others on one of them,
    on all, or on none."""
    if distributed.get_rank() == 0:
        return [(0, 1), (0,), (0, 1), (0,)][k % 4]
    return [(0,), (0,), (0,), (0, 2)][k % 4] if k < 20 else (0, 1)


def other_parameters(views: bool, device: bool) -> dict[str, object]:
    """Ranks use different parameters of one module, others in each call; compiled beside eager."""
    with fake_device(compiled=False) if device else contextlib.nullcontext() as found:
        backend = found.name if device else "auto"
        models = []
        for compiled in (False, True):
            torch.manual_seed(0)
            options = {"find_unused_parameters": True, "gradient_as_bucket_view": views}
            model = DistributedDataParallel(Chosen(), **options)
            optimizer = _sgd(model.parameters())
            kept = model.module.parts[3].weight
            kept.grad = torch.full_like(kept, 0.5)  # stays, since nobody uses it

            def step(x, chosen, model=model, optimizer=optimizer, kept=kept):
                for p in model.parameters():
                    if p is not kept:
                        p.grad = None
                model(x, chosen).square().mean().backward()
                optimizer.step()

            if compiled:
                step = tracejit.compile(step, on_unsupported="raise", backend=backend)
            torch.manual_seed(distributed.get_rank())
            grads = []
            for k in range(28):
                step(torch.randn(8, 6), _chosen(k))
                grads.append(
                    [None if p.grad is None else p.grad.clone() for p in model.parameters()]
                )
            models.append((model, grads))
    (eager, theirs), (ours, mine) = models
    for a, b in zip(theirs, mine, strict=True):
        for p, q in zip(a, b, strict=True):
            assert (p is None) == (q is None)
            assert p is None or torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (eager, ours)]
    first = flat[1].clone()
    distributed.broadcast(first, 0)
    return {
        "difference": float((flat[0] - flat[1]).norm() / flat[0].norm()),
        "same on ranks": torch.equal(flat[1], first),
        "replays": step.stats.replays,
        "why": step.explain_mode(),
    }


def asked_in_vain(how: str) -> tuple[str, float]:
    """A rank asks which parameters the others use; another one asks nothing, or has left."""
    mine = distributed.get_rank()
    asks = bool(mine) or how == "left"
    model = DistributedDataParallel(Chosen(), find_unused_parameters=asks)

    def step(x, bad):
        for p in model.parameters():
            p.grad = None
        model(x, (0,) if asks else (0, 1, 2, 3)).sum().backward()
        if bad:
            raise ValueError("bad")

    compiled = tracejit.compile(step, on_unsupported="raise")
    if how == "left":
        compiled(torch.ones(2, 6), False)
    before = [p.detach().clone() for p in model.parameters()]
    started = time.perf_counter()
    said = ""
    try:
        compiled(torch.ones(2, 6), how == "left" and mine == 1)
    except (RuntimeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    assert all(map(torch.equal, before, model.parameters()))
    return said, time.perf_counter() - started


def unsynced() -> str:
    """Gradients that an earlier call has accumulated: which these are is not known."""
    model = DistributedDataParallel(Chosen(), find_unused_parameters=True)

    def step(x):
        with model.no_sync():
            model(x, (0,)).sum().backward()

    try:
        tracejit.compile(step, on_unsupported="raise")(torch.ones(2, 6))
    except tracejit.errors.UnsupportedOperation as error:
        return str(error)
    return ""


def saved(path: str) -> str:
    """Why a step with collectives is not put in a file."""
    model = DistributedDataParallel(nn.Linear(3, 2))
    step = tracejit.compile(lambda x: model(x).sum().backward(), on_unsupported="raise")
    for _ in range(4):
        step(torch.ones(2, 3))
    try:
        step.save(f"{path}/{distributed.get_rank()}")
    except tracejit.errors.CannotSave as error:
        return str(error)
    return ""


def then_eagerly() -> float:
    """Eager steps before and after compiled ones, on one module."""
    models = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = DistributedDataParallel(_mlp().eval(), gradient_as_bucket_view=True)
        optimizer = _sgd(model.parameters())

        def plain(x, y, model=model, optimizer=optimizer):
            return _plain(model, optimizer, x, y)

        other = tracejit.compile(plain, on_unsupported="raise") if compiled else plain
        torch.manual_seed(distributed.get_rank())
        for f in (plain, plain, other, other, other, other, plain, plain, other):
            f(*_numbers(0))
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return float((models[0] - models[1]).norm() / models[0].norm())
