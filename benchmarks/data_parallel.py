"""Two processes of one thread each that train together over gloo: compiled, eager, torch.compile.

    python -m benchmarks.data_parallel [--case ddp_mlp|ddp_gpt]… [--rounds 7] [--calls 10]
                                       [--contender eager|tracejit|torch.compile]… [--output FILE]

Each contender has a model of its own in DistributedDataParallel, from the same start. A round is
some calls of each in turn, in the same pair of processes; a time is the median of rounds, and that
of the slower rank. The losses of all calls have to agree with eager's, or there is no time.

How much of the reduction is hidden: what the launches of our plan wait for collectives, beside what
the same collectives take when nothing runs beside them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import tracejit
from benchmarks.machine import machine, write
from benchmarks.steps import trained
from examples.gpt import GPT, adamw
from tracejit.ir import process_groups
from tracejit.ir.process_groups import Started
from tracejit.runtime.collectives import Collective

RANKS = 2
RELATIVE = 1e-4  # of a loss
WARM = 6  # calls before the first round: the last ones are replayed
CONTENDERS = ("eager", "tracejit", "torch.compile")


def ddp_mlp() -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable]:
    """The classifier of `benchmarks/steps.py`, with AdamW."""
    model = torch.nn.Sequential(
        *(torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512), torch.nn.ReLU()),
        torch.nn.Linear(512, 10),
    )
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
    x = torch.randn(128, 784, generator=_mine())
    labels = torch.randint(0, 10, (128,), generator=_mine())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return wrapped, optimizer, lambda: F.cross_entropy(wrapped(x), labels)


def ddp_gpt() -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable]:
    """The GPT of `benchmarks/language_steps.py`, its head tied."""
    vocabulary, length = 512, 64
    model = GPT(vocabulary, length, 4, 128, 4)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
    x, y = (torch.randint(vocabulary, (4, length), generator=_mine()) for _ in range(2))
    optimizer = adamw(model, lr=1e-5)
    return wrapped, optimizer, lambda: F.cross_entropy(wrapped(x).view(-1, vocabulary), y.view(-1))


CASES = {"ddp_mlp": ddp_mlp, "ddp_gpt": ddp_gpt}


def _mine() -> torch.Generator:
    """Each rank has data of its own."""
    return torch.Generator().manual_seed(10 + distributed.get_rank())


def build(case: str, contender: str) -> Callable[[], torch.Tensor]:
    """A step of a model of its own."""
    torch.manual_seed(0)
    model, optimizer, loss_of = CASES[case]()
    if contender == "torch.compile":
        loss_of = torch.compile(loss_of)

    step = trained(loss_of, model, optimizer)
    return tracejit.compile(step, on_unsupported="raise") if contender == "tracejit" else step


class Waits:
    """While it is entered, sums up how long launches wait for collectives. With `alone`, a
    collective is waited for where it is started, so nothing hides it."""

    def __init__(self, alone: bool):
        self.alone, self.seconds = alone, 0.0

    def __enter__(self) -> Waits:
        self._wait, self._start = Started.wait, Collective.start
        wait, start = self._wait, self._start

        def timed(started: Started) -> None:
            begun = time.perf_counter()
            wait(started)
            self.seconds += time.perf_counter() - begun

        def begin(collective: Collective, addresses: Sequence[int]) -> Started:
            while process_groups.before():  # the ranks compare their plans
                process_groups.before().pop()()
            distributed.barrier()  # a rank that comes late is not what a collective takes
            begun = time.perf_counter()
            found = start(collective, addresses)
            wait(found)
            self.seconds += time.perf_counter() - begun
            return found

        if self.alone:
            Collective.start = begin
        else:
            Started.wait = timed
        return self

    def __exit__(self, *exception: object) -> None:
        Started.wait, Collective.start = self._wait, self._start


def hidden(step: Callable, calls: int) -> dict[str, float]:
    """Seconds a call that launches wait for collectives, those that these take alone, and the share
    that is hidden."""
    found = {}
    for name, alone in (("waited", False), ("alone", True)):
        with Waits(alone) as waits:
            for _ in range(calls):
                step()
        found[name] = waits.seconds / calls
    return found | {"share": max(0.0, 1.0 - found["waited"] / found["alone"])}


def measure(case: str, contenders: Sequence[str], rounds: int, calls: int) -> dict[str, object]:
    """On one rank: times, losses, and what is hidden."""
    steps, losses, refused = {}, {}, {}
    for name in contenders:
        try:
            steps[name] = build(case, name)
            losses[name] = [float(steps[name]().detach()) for _ in range(WARM)]
        except Exception as error:
            if name != "torch.compile":
                raise
            steps.pop(name, None)
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            distributed.barrier()
            begun = time.perf_counter()
            for _ in range(calls):
                loss = step()
            times[name].append((time.perf_counter() - begun) / calls)
            losses[name].append(float(loss.detach()))
    found = {"times": times, "losses": losses, "refused": refused}
    if "tracejit" in steps:
        assert steps["tracejit"].stats.replays >= rounds * calls
        distributed.barrier()
        found["hidden"] = hidden(steps["tracejit"], calls)
    return found


def _work(rank: int, count: int, store: str, measure: Callable, asked: tuple, pipe: object) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, count), rank=rank, world_size=count
    )
    pipe.send(measure(*asked))
    distributed.barrier()
    os._exit(0)


def on_ranks(count: int, measure: Callable, *asked: object) -> list[dict]:
    """What `measure(*asked)` finds on each of so many ranks, processes of one thread each."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = []
        for rank in range(count):
            mine, its = context.Pipe()
            given = rank, count, f"{folder}/store", measure, asked, its
            context.Process(target=_work, args=given, daemon=True).start()
            its.close()
            pipes.append(mine)
        return [pipe.recv() for pipe in pipes]


def together(case: str, *asked: object) -> dict[str, object]:
    """What the ranks have measured, as one: the slower rank's median counts."""
    ranks = on_ranks(RANKS, measure, case, *asked)
    for rank in ranks:
        _compare(rank["losses"])
    names = list(ranks[0]["times"])
    medians = {n: max(statistics.median(r["times"][n]) for r in ranks) for n in names}
    shares = [r["hidden"] for r in ranks if "hidden" in r]
    return {"seconds": medians, "refused": ranks[0]["refused"], "hidden": shares}


def _compare(losses: dict[str, list[float]]) -> None:
    for name, found in losses.items():
        for a, b in zip(losses.get("eager", found), found, strict=True):
            if abs(a - b) > RELATIVE * max(abs(a), 1e-6):
                raise AssertionError(f"{name} has a loss of {b}, and eager of {a}")


def main() -> None:
    """Measure, print, and write a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--contender", action="append", choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--output")
    options = parser.parse_args()
    figures: dict[str, object] = {}
    for case in options.case or CASES:
        contenders = options.contender or CONTENDERS
        found = figures[case] = together(case, contenders, options.rounds, options.calls)
        eager = found["seconds"].get("eager")
        for name, seconds in found["seconds"].items():
            beside = f"  {eager / seconds:.2f} × eager" if eager else ""
            print(f"{case:8}  {name:14} {seconds * 1e3:9.3f} ms{beside}")
        for name, why in found["refused"].items():
            print(f"{case:8}  {name:14} cannot run: {why}")
        for rank, x in enumerate(found["hidden"]):
            print(
                f"{case:8}  rank {rank}: {x['share']:.0%} of the reduction hidden "
                f"({x['waited'] * 1e3:.3f} ms waited, {x['alone'] * 1e3:.3f} ms alone)"
            )
    if options.output:
        write(options.output, {"machine": machine(), "cases": figures})


if __name__ == "__main__":
    main()
