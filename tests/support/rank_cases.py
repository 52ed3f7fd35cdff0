"""Steps with collectives, for the processes of `ranks.py`: each function runs on every rank."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as distributed
import torch.distributed.nn.functional as forms

import tracejit
from tracejit.testing import fake_device

CALLS = 4  # of each step, the last ones in replay


def _all_reduce(x):
    distributed.all_reduce(x)
    return x * 2


def _asynchronous(x):
    work = distributed.all_reduce(x, op=distributed.ReduceOp.MAX, async_op=True)
    y = torch.exp(torch.ones(3))
    work.wait()
    return x + y


def _many(x):
    """Several on their way at once, in groups that are one."""
    parts = [x * i for i in range(1, 4)]
    works = [distributed.all_reduce(p, async_op=True) for p in parts]
    for work in works:
        work.wait()
    distributed.broadcast(parts[0], 1)
    return sum(parts)


def _broadcast(x):
    distributed.broadcast(x, 1)
    return x


def _reduce(x):
    distributed.reduce(x, 0)
    return x if distributed.get_rank() == 0 else x.new_zeros(1)


def _all_gather(x):
    out = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(out, x)
    return torch.cat(out)


def _all_gather_into_tensor(x):
    out = x.new_empty(distributed.get_world_size() * x.shape[0], x.shape[1])
    distributed.all_gather_into_tensor(out, x)
    return out


def _reduce_scatter_tensor(x):
    out = torch.empty_like(x)
    parts = [x * (i + 1) for i in range(distributed.get_world_size())]
    distributed.reduce_scatter_tensor(out, torch.cat(parts))
    return out


def _reduce_scatter(x):
    out = torch.empty_like(x)
    distributed.reduce_scatter(out, [x * (i + 1) for i in range(distributed.get_world_size())])
    return out


def _all_to_all_single(x):
    given = torch.cat([x * (i + 1) for i in range(distributed.get_world_size())])
    out = torch.empty_like(given)
    distributed.all_to_all_single(out, given)
    return out


def _uneven(x):
    """Rank 0 sends one row to rank 0 and four to 1; rank 1 sends two and three."""
    mine = distributed.get_rank()
    sent, received = ([1, 4], [1, 2]) if mine == 0 else ([2, 3], [4, 3])
    out = x.new_empty(sum(received), x.shape[1])
    distributed.all_to_all_single(out, x, received, sent)
    return out.sum(1)


def _all_to_all(x):
    count = distributed.get_world_size()
    out = [torch.empty_like(x) for _ in range(count)]
    distributed.all_to_all(out, [x * (i + 1) for i in range(count)])
    return out


def _gather(x):
    here = distributed.get_rank() == 1
    out = [torch.empty_like(x) for _ in range(distributed.get_world_size())] if here else None
    distributed.gather(x, out, dst=1)
    return torch.stack(out) if here else x


def _scatter(x):
    here = distributed.get_rank() == 1
    out = torch.zeros_like(x)
    given = [x * (i + 1) for i in range(distributed.get_world_size())] if here else None
    distributed.scatter(out, given, src=1)
    return out


def _all_asynchronous(x):
    """Every collective, each waited for after another one has begun."""
    count, mine, works = distributed.get_world_size(), distributed.get_rank(), []

    def begin(f, *args, **kwargs):
        works.append(f(*args, async_op=True, **kwargs))

    parts = [x * (i + 1) for i in range(count)]
    outs = [torch.zeros_like(x) for _ in range(8)]
    lists = [[torch.empty_like(x) for _ in range(count)] for _ in range(3)]
    whole = [x.new_empty(count * x.shape[0], x.shape[1]) for _ in range(2)]
    for out in outs[:4]:
        out += x
    begin(distributed.all_reduce, outs[0], distributed.ReduceOp.MIN)
    begin(distributed.broadcast, outs[1], 1)
    begin(distributed.reduce, outs[2], 1, distributed.ReduceOp.MAX)
    begin(distributed.all_gather, lists[0], x)
    begin(distributed.all_gather_into_tensor, whole[0], x)
    begin(distributed.reduce_scatter, outs[4], parts)
    begin(distributed.reduce_scatter_tensor, outs[5], torch.cat(parts))
    begin(distributed.all_to_all, lists[1], parts)
    begin(distributed.all_to_all_single, whole[1], torch.cat(parts))
    begin(distributed.gather, x, lists[2] if mine == 0 else None, 0)
    begin(distributed.scatter, outs[6], parts if mine == 1 else None, 1)
    begin(distributed.barrier)
    for work in works:
        work.wait()
    used = [*outs[:2], *outs[4:7], *lists[0], *lists[1], *(lists[2] if mine == 0 else ())]
    return [*used, *whole, *(outs[2:3] if mine == 1 else ())]


def _barrier(x):
    distributed.barrier()
    return x + 1


def _in_the_middle(x):
    """A view is reduced, and what is computed of the result is reduced again."""
    y = x * 2
    distributed.all_reduce(y[1:3])
    y = y.sin()
    distributed.all_reduce(y, op=distributed.ReduceOp.MIN)
    return y, x


PLAIN = {
    "all_reduce": _all_reduce,
    "async": _asynchronous,
    "many": _many,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "reduce_scatter": _reduce_scatter,
    "all_to_all_single": _all_to_all_single,
    "all_to_all": _all_to_all,
    "gather": _gather,
    "scatter": _scatter,
    "barrier": _barrier,
    "all asynchronous": _all_asynchronous,
    "in_the_middle": _in_the_middle,
}


def _form(f: Callable) -> Callable:
    """The gradient through a form of torch.distributed.nn.functional."""

    def step(x):
        y = x.detach().requires_grad_()
        f(y).square().sum().backward()
        return y.grad

    return step


def _count() -> int:
    return distributed.get_world_size()


def _empty(x: torch.Tensor) -> list:
    return [torch.empty_like(x) for _ in range(_count())]


def _scaled(y: torch.Tensor) -> list:
    return [y * (i + 2) for i in range(_count())]


FORMS = {
    "all_reduce": _form(lambda y: forms.all_reduce(y * 2)),
    "all_gather": _form(lambda y: torch.stack(forms.all_gather(y * 2))),
    "broadcast": _form(lambda y: forms.broadcast(y * 2, 1)),
    "reduce": _form(lambda y: forms.reduce(y * 2, 1)),
    "reduce_scatter": _form(lambda y: forms.reduce_scatter(torch.empty_like(y), _scaled(y))),
    "all_to_all": _form(lambda y: torch.stack(forms.all_to_all(_empty(y), _scaled(y)))),
    "all_to_all_single": _form(
        lambda y: forms.all_to_all_single(torch.cat(_scaled(y)).clone(), torch.cat(_scaled(y)))
    ),
    "gather": _form(lambda y: torch.stack(forms.gather(y * 2, 1))),
    "scatter": _form(lambda y: forms.scatter(_scaled(y), 1)),
}


def _reducing(op: str) -> Callable:
    kind = getattr(distributed.ReduceOp, op)

    def step(x):
        distributed.all_reduce(x, op=kind)
        return x

    return step


REDUCTIONS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
DTYPES = ("float64", "bfloat16", "float16", "int64", "int32", "uint8")


def same(step: Callable, x: torch.Tensor, backend: str = "auto") -> int:
    """Compare a step with eager, call by call; the number of replays."""
    compiled = tracejit.compile(step, on_unsupported="raise", backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some forms are deprecated
        for k in range(CALLS):
            a, b = x + k, x + k
            want, got = step(a), compiled(b)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
    return compiled.stats.replays


def plain(name: str, backend: str = "auto") -> int:
    torch.manual_seed(distributed.get_rank())
    return same(PLAIN[name], torch.randn(5, 3), backend)


def on_a_fake_device(name: str) -> int:
    with fake_device(compiled=False) as device:
        return plain(name, device.name)


def captured() -> str:
    """What is said where a caller captures a step with a collective."""
    with fake_device(compiled=False) as device:
        step = tracejit.compile(_all_reduce, on_unsupported="raise", backend=device.name)
        for _ in range(CALLS):
            step(torch.ones(3))
        try:
            with device.capture():
                step(torch.ones(3))
        except tracejit.errors.CaptureError as error:
            found = str(error)
        step(torch.ones(3))
        return found


def built() -> int:
    """How many launches a step with a collective has, built for a GPU that is not here."""

    def step(x):
        y = x * 2
        distributed.all_reduce(y)
        distributed.barrier()
        return y.exp()

    built = tracejit.compile(step, target="sm_90").build(torch.randn(40, 3))
    return len(built.plans[-1].launches)


def numbers() -> list[int]:
    """Collectives of one number on the CPU, which nobody needs, or one rank only."""

    def step(x):
        mean = x.mean()
        distributed.reduce(mean, 0)
        distributed.all_reduce(x.sum())
        distributed.barrier()
        return mean if distributed.get_rank() == 0 else x

    torch.manual_seed(distributed.get_rank())
    compiled = tracejit.compile(step, on_unsupported="raise")
    for _ in range(CALLS):
        x = torch.randn(5)
        torch.testing.assert_close(compiled(x), step(x))
    return [compiled.stats.replays, str(compiled._last.program.plan).count(" start ")]


def uneven() -> int:
    torch.manual_seed(distributed.get_rank())
    return same(_uneven, torch.randn(5, 3))


def form(name: str) -> int:
    torch.manual_seed(distributed.get_rank())
    return same(FORMS[name], torch.randn(5, 3))


def reduction(op: str) -> int:
    torch.manual_seed(distributed.get_rank())
    x = torch.randint(0, 99, (7,)) if op.startswith("B") else torch.randn(7)
    return same(_reducing(op), x)


def reduction_to_parts(op: str) -> int:
    """Reduced to one rank, and in parts to all of them."""
    kind = getattr(distributed.ReduceOp, op)

    def step(x):
        out, parts = torch.empty_like(x), torch.cat([x, x + 1])
        distributed.reduce_scatter_tensor(out, parts, kind)
        distributed.reduce(x, 0, kind)
        return out, x if distributed.get_rank() == 0 else out

    torch.manual_seed(distributed.get_rank())
    x = torch.randint(0, 99, (7,)) if op.startswith("B") else torch.randn(7)
    compiled = tracejit.compile(step, on_unsupported="raise")
    for _ in range(CALLS):
        try:
            want = step(x.clone())
        except (RuntimeError, ValueError) as error:  # gloo has none
            want = str(error)
        try:
            got = compiled(x.clone())
        except (RuntimeError, ValueError) as error:
            assert type(want) is str, error
            continue
        torch.testing.assert_close(got, want)
    return compiled.stats.replays or type(want) is str


def dtype(name: str) -> int:
    torch.manual_seed(distributed.get_rank())
    return same(_all_reduce, (torch.rand(123) * 9).to(getattr(torch, name)))


def groups() -> list[int]:
    """A group of each rank alone, and one of all, in one step."""
    alone = [distributed.new_group([i]) for i in range(_count())]
    all_of_them = distributed.new_group(range(_count()))
    mine = alone[distributed.get_rank()]
    other = alone[1 - distributed.get_rank()]

    def step(x):
        distributed.all_reduce(x, group=mine)
        distributed.all_reduce(x, group=other)  # of which it is no member
        distributed.all_reduce(x, group=all_of_them, op=distributed.ReduceOp.MAX)
        return x * distributed.get_world_size(mine)

    return same(step, torch.arange(4.0) + distributed.get_rank())


def averaging(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable:
    """A training step that averages its gradients by hand."""

    def step(x, branch=False):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        for p in model.parameters():
            distributed.all_reduce(p.grad)
            p.grad /= distributed.get_world_size()
        if branch:
            distributed.all_reduce(loss.detach())
        optimizer.step()
        return loss.detach()

    return step


# ---- faults


class World:
    """A model in training, whose state can be compared."""

    def __init__(self, backend: str = "auto") -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(8, 8)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        step = averaging(self.model, self.optimizer)
        self.step = tracejit.compile(step, on_unsupported="eager", backend=backend)
        self.x = torch.randn(4, 8)

    def state(self) -> list[torch.Tensor]:
        found = [*self.model.parameters()]
        found += [p.grad for p in found if p.grad is not None]
        for state in self.optimizer.state.values():
            found += [x for x in state.values() if isinstance(x, torch.Tensor)]
        return found

    def fails(self, *args: object) -> tuple[str, float]:
        """What a call raises, and after how many seconds; nothing may change."""
        before = [x.clone() for x in self.state()]
        started = time.perf_counter()
        try:
            self.step(*args)
        except RuntimeError as error:
            said = f"{type(error).__name__}: {error}"
        else:
            said = ""
        seconds = time.perf_counter() - started
        assert all(map(torch.equal, before, self.state())), f"the state has changed: {said}"
        return said, seconds


def another_branch(backend: str = "auto") -> tuple[str, float]:
    world = World(backend)
    for _ in range(3):
        world.step(world.x)
    found = world.fails(world.x, distributed.get_rank() == 1)
    world.step(world.x)  # they still go together
    return found


def another_branch_on_a_fake_device() -> tuple[str, float]:
    with fake_device(compiled=False) as device:
        return another_branch(device.name)


def another_rate() -> tuple[str, float]:
    world = World()
    for _ in range(3):
        world.step(world.x)
    (group,) = world.optimizer.param_groups
    group["lr"] = 0.1 + distributed.get_rank()
    found = world.fails(world.x)
    group["lr"] = 0.05
    world.step(world.x)
    return found


def another_shape() -> tuple[str, float]:
    """Of what is reduced: on one rank the second layer is wider."""

    def step(x):
        distributed.all_reduce(x)
        return x

    compiled, x = tracejit.compile(step), torch.ones(4)
    for _ in range(3):
        compiled(x)
    given = torch.ones(5 if distributed.get_rank() else 4)
    started = time.perf_counter()
    try:
        compiled(given)
    except RuntimeError as error:
        assert given.eq(1).all()
        compiled(x)
        return f"{type(error).__name__}: {error}", time.perf_counter() - started
    return "", 0.0


def an_exception() -> tuple[str, float]:
    """The step of one rank raises before its collectives."""
    world = World()
    for _ in range(3):
        world.step(world.x)
    found = world.fails(torch.ones(4, 7) if distributed.get_rank() else world.x)
    world.step(world.x)
    return found


def an_exception_after_a_value() -> tuple[str, float]:
    """All ranks have reduced a value, which Python reads; then the step of one raises. Its plans
    end after that value, those of the other go on."""
    world = World()

    def step(x):
        world.optimizer.zero_grad()
        loss = world.model(x).square().mean()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        if mean.item() > 1e6 and distributed.get_rank() == 1:
            raise ValueError(f"the loss is {mean.item():.0f}")
        loss.backward()
        for p in world.model.parameters():
            distributed.all_reduce(p.grad)
        world.optimizer.step()
        return loss.detach()

    world.step = tracejit.compile(step, on_unsupported="raise")
    for _ in range(5):
        world.step(world.x)
    assert world.step.stats.replays and world.step.stats.cuts == 1
    try:
        found = world.fails(world.x * 1e6)
    except ValueError as error:
        found = f"ValueError: {error}", 0.0
    world.step(world.x)
    return found


def eagerly() -> tuple[str, float]:
    """A rank falls back to eager, the other one does not."""
    world = World()
    for _ in range(3):
        world.step(world.x)
    world.model.register_forward_pre_hook(
        lambda module, args: args[0].to_sparse().to_dense() if distributed.get_rank() else None
    )
    return world.fails(world.x)


def killed(when: str) -> tuple[str, float]:
    """Rank 1 ends before, during or after a collective of a call."""
    world = World()
    for _ in range(3):
        world.step(world.x)
    if distributed.get_rank() == 1:
        if when == "before":
            os._exit(7)
        if when == "during":
            from tracejit.ir import process_groups

            def start(*args: object) -> object:
                """The ranks have agreed, and the other one begins, with nobody to answer."""
                waiting = process_groups.before()
                while waiting:
                    waiting.pop()()
                os._exit(7)

            import tracejit.runtime.collectives

            tracejit.runtime.collectives.process_groups.start = start
        world.step(world.x)
        os._exit(7)
    if when == "after":
        world.step(world.x)
    return world.fails(world.x)
