"""Random programs by the thousand, in shards: `make fuzz N=10000`.

    PYTHONPATH=tests python -m support.fuzz --programs 10000 [--processes 2] [--minutes 60]
        [--verify 2] [--first SEED] [--folder DIR] [--again]

A seed says which kind of program it is (KINDS): a training step against eager, or one of images,
two of three in C, and the third by numpy, fused and one kernel per primitive (`variants_of`); or a
sequence of calls with changes between them. Shards of seeds run in processes of their own. Each
seed that is over is a line in the folder, so a run that was stopped goes on where it was, and one
that asks for more programs does the rest. A mismatch is stored with its seed, what differed and the
shrunk program; a process that dies or hangs is one, too. `--again` runs the stored mismatches only.
Prints a summary; the exit status is 1 where there are mismatches.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SHARD = 100  # seeds of one process
HUNG = 300.0  # seconds without a seed that is over
FIRST = 1_000_000  # beyond all seeds that tests name
WRONG = ("mismatch", "died", "hung")
ENVIRONMENT = {
    "TRACEJIT_VERIFY": "1",
    "TRACEJIT_ON_UNSUPPORTED": "raise",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}

# ---- one seed


def kind_of(seed: int) -> str:
    """The kind of program that a seed is."""
    return KINDS[seed % len(KINDS)]


KINDS = (
    *("steps",) * 10,
    "images",
    *("calls",) * 5,
    *("calls in C", "lists", "nested", "tuples"),
)


def text_of(seed: int) -> str:
    """The program of a seed, as text."""
    from support import random_images, random_programs, sequences

    makers: dict[str, Callable] = {
        "steps": random_programs.generate,
        "images": random_images.generate_images,
    }
    return str(makers.get(kind_of(seed), lambda seed: sequences.generate(seed, **_how(seed)))(seed))


def _how(seed: int) -> dict[str, object]:
    """How the sequence of a seed is generated."""
    from support import sequence_parts_lists, sequence_parts_nested, sequence_parts_tuples

    of = {
        "lists": sequence_parts_lists.LISTS,
        "nested": sequence_parts_nested.NESTED,
        "tuples": sequence_parts_tuples.TUPLES,
    }.get(kind_of(seed))
    return {} if of is None else {"of": of, "calls": 14}


def variants_of(seed: int) -> list[dict[str, object]]:
    """The ways in which a step is compiled. All three for each seed would be twice as dear; numpy
    and C run the same plans."""
    if seed // len(KINDS) % 3:
        return [{"backend": "c"}]
    return [{"backend": "numpy"}, {"backend": "numpy", "fuse": False, "mode": "rerun"}]


def run_seed(seed: int, verify: int = 0) -> str:
    """How the program of a seed ends; AssertionError with the shrunk program where it differs."""
    from support import random_check, random_images, random_programs, sequences

    kind, more = kind_of(seed), {"verify": verify} if verify else {}
    if kind in ("steps", "images"):
        own = random_programs.generate if kind == "steps" else random_images.generate_images
        return random_check.outcome(own(seed), [v | more for v in variants_of(seed)])[0]
    backend = "c" if kind == "calls in C" else "numpy"
    return sequences.outcome(sequences.generate(seed, **_how(seed)), backend=backend, **more).kind


# ---- a process of its own, for some seeds


def shard(seeds: Sequence[int], folder: Path, verify: int) -> None:
    """Run seeds, and append what became of them to a file of this process."""
    import warnings

    import pytest
    import torch

    from support.c_flags import optimize

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimize(patch, "-O0")
        for seed in seeds:
            _append(folder / "begun.jsonl", {"seed": seed, "process": os.getpid()})
            began = time.monotonic()
            line: dict[str, object] = {"seed": seed, "kind": kind_of(seed)}
            try:
                line["outcome"] = run_seed(seed, verify)
            except Exception as error:
                line |= {"outcome": "mismatch", "error": str(error), "program": text_of(seed)}
                line["trace"] = traceback.format_exc(limit=-8)
            _append(folder / "done.jsonl", line | {"seconds": round(time.monotonic() - began, 2)})


def _append(path: Path, line: dict) -> None:
    """A line at the end of a file that other processes append to as well."""
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(line) + "\n").encode())


def lines_of(path: Path) -> Iterator[dict]:
    """The lines of such a file; one that was cut off is left out."""
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                continue


# ---- all of them


@dataclass
class Worker:
    """A process with its seeds."""

    process: subprocess.Popen
    seeds: list[int]
    cache: Path
    since: float
    over: int = 0


def fuzz(
    seeds: Sequence[int],
    folder: Path,
    *,
    processes: int = 1,
    verify: int = 0,
    minutes: float = float("inf"),
    hung: float = HUNG,
    shard_of: int = SHARD,
    run: Sequence[str] = (sys.executable, "-m", "support.fuzz"),
) -> None:
    """Run all seeds that the folder has nothing of, in shards."""
    folder.mkdir(parents=True, exist_ok=True)
    ended = {line["seed"] for line in lines_of(folder / "done.jsonl")}
    left = [seed for seed in seeds if seed not in ended]
    ends = time.monotonic() + 60 * minutes
    workers: list[Worker] = []
    try:
        while workers or (left and time.monotonic() < ends):
            while left and len(workers) < processes and time.monotonic() < ends:
                mine, left = left[:shard_of], left[shard_of:]
                workers.append(_start(mine, folder, verify, run))
            time.sleep(0.2)
            ended = {line["seed"] for line in lines_of(folder / "done.jsonl")}
            for worker in [*workers]:
                again = _watched(worker, ended, folder, hung, time.monotonic() >= ends)
                if again is not None:
                    workers.remove(worker)
                    left = again + left
    finally:
        for worker in workers:
            _end(worker)


def _start(seeds: list[int], folder: Path, verify: int, run: Sequence[str]) -> Worker:
    cache = folder / f"cache-{seeds[0]}"
    command = [*run, "--shard", *map(str, seeds), "--folder", str(folder), "--verify", str(verify)]
    environment = os.environ | ENVIRONMENT | {"TRACEJIT_CACHE": str(cache)}
    return Worker(subprocess.Popen(command, env=environment), seeds, cache, time.monotonic())


def _watched(
    worker: Worker, ended: set[int], folder: Path, hung: float, late: bool
) -> list[int] | None:
    """None while a worker goes on; else the seeds that it has left."""
    left = [seed for seed in worker.seeds if seed not in ended]
    over, now = len(worker.seeds) - len(left), time.monotonic()
    if over > worker.over:
        worker.over, worker.since = over, now
    code = worker.process.poll()
    if code is None and late:
        _end(worker)
        return left
    if code is None and now - worker.since < hung:
        return None
    _end(worker)
    if not left:
        return []
    how = "hung" if code is None else "died"
    line = {"seed": left[0], "kind": kind_of(left[0]), "outcome": how, "error": f"exit {code}"}
    _append(folder / "done.jsonl", line | {"program": _text_apart(left[0])})
    return left[1:]


def _text_apart(seed: int) -> str:
    """The program of a seed, made in a process of its own: what kills a process may do so while
    the program is made, which runs torch."""
    code = f"from support.fuzz import text_of; print(text_of({seed}), end='')"
    where = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code]
    made = subprocess.run(command, capture_output=True, text=True, env=where)
    return made.stdout or f"making it ends with exit {made.returncode}"


def _end(worker: Worker) -> None:
    if worker.process.poll() is None:
        worker.process.kill()
    worker.process.wait()
    shutil.rmtree(worker.cache, ignore_errors=True)


def summary(folder: Path) -> tuple[str, list[dict]]:
    """What became of the seeds in a folder, as text, and those that are wrong. The last line of a
    seed counts."""
    last = {line["seed"]: line for line in lines_of(folder / "done.jsonl")}
    wrong = [line for line in last.values() if line["outcome"] in WRONG]
    kinds = Counter((line["kind"], line["outcome"]) for line in last.values())
    text = [f"{len(last)} programs, {len(wrong)} mismatches"]
    for kind in dict.fromkeys(KINDS):
        found = [f"{n} {end}" for (k, end), n in sorted(kinds.items()) if k == kind]
        text += [f"  {kind}: {', '.join(found)}"] if found else []
    text += [
        f"  seed {x['seed']} ({x['kind']}, {x['outcome']}): {x['error'].splitlines()[0]}"
        for x in wrong
    ]
    return "\n".join(text), wrong


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--programs", type=int, default=1000, help="how many seeds (1000)")
    add("--first", type=int, default=FIRST, help=f"the first one ({FIRST})")
    add("--processes", type=int, default=1, help="at a time (1)")
    add("--minutes", type=float, default=float("inf"), help="end after so long")
    add("--verify", type=int, default=0, help="verify so many calls of each plan (0)")
    add("--folder", type=Path, default=Path("build/fuzz"), help="of the results (build/fuzz)")
    add("--again", action="store_true", help="run the stored mismatches once more")
    add("--shard", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    folder = options.folder
    if options.shard:
        shard(options.shard, folder, options.verify)
        return 0
    seeds: Sequence[int] = range(options.first, options.first + options.programs)
    into = folder
    if options.again:  # in a folder of their own, so that nothing is lost when it is stopped
        seeds = [line["seed"] for line in summary(folder)[1]]
        into = folder / "again"
        shutil.rmtree(into, ignore_errors=True)
    fuzz(
        seeds,
        into,
        processes=options.processes,
        verify=options.verify,
        minutes=options.minutes,
    )
    if options.again:
        for line in lines_of(into / "done.jsonl"):
            _append(folder / "done.jsonl", line)
    text, wrong = summary(folder)
    (folder / "mismatches.json").write_text(json.dumps(wrong, indent=1) + "\n")
    print(text)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
