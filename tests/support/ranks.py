"""Ranks of a process group for tests: processes that run one function after another, together.
They are forked from a server that has imported torch and tracejit once.

    with Ranks(2) as ranks:
        results = ranks(module.function, *args)     # function(*args) on each rank

A function is found by its name in its module, and what it is given and returns is pickled. What it
raises is an AssertionError here, with the traceback of each rank.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

TIMEOUT = 8  # seconds, of a process group; what hangs is an error after that
PATIENCE = 240  # of a test, with imports and compilers on a busy machine


class Ranks:
    """So many processes, each with one thread, in a group over gloo."""

    def __init__(self, count: int):
        self.count = count
        self._rendezvous = tempfile.mkdtemp()
        # the server that processes are forked from finds what it loads in this way
        os.environ["PYTHONPATH"] = os.pathsep.join(x for x in sys.path if x)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["support.rank_cases", "support.rank_models"])
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            mine, its = context.Pipe()
            given = rank, count, f"{self._rendezvous}/store", its
            process = context.Process(target=_work, args=given, daemon=True)
            process.start()
            its.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it is gone
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()

    def __call__(self, function: Callable, *args: object) -> list:
        """The results of `function(*args)`, one for each rank."""
        found = self.ended(function, *args)
        failed = [f"rank {i}: {x}" for i, (ok, x) in enumerate(found) if not ok]
        assert not failed, "\n".join(failed)
        return [x for _, x in found]

    def ended(self, function: Callable, *args: object) -> list[tuple[bool, object]]:
        """How it ended on each rank: (True, the result), or (False, what is to be said)."""
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, args))
        found = []
        for pipe, process in zip(self._pipes, self.processes, strict=True):
            try:
                if not pipe.poll(PATIENCE):
                    found.append((False, "it hangs"))
                else:
                    found.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                process.join(5)
                found.append((False, f"the process has ended with {process.exitcode}"))
        return found


def _work(rank: int, count: int, store: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as distributed

    from support.c_flags import optimize
    from support.scope import WHOLE

    torch.set_num_threads(1)
    if not WHOLE:
        optimize(pytest.MonkeyPatch(), "-O0")
    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(store, count),
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    while (asked := pipe.recv()) is not None:
        module, name, args = asked
        try:
            function = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    os._exit(0)  # the engine's threads may wait for a rank that is gone
