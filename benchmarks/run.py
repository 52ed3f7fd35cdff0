"""Time every case under every contender, side by side, and print the table.

    python -m benchmarks.run [--device cpu|cuda] [--case NAME]… [--contender NAME]… [--rounds 15]
                             [--limit 300] [--jax-python PATH] [--output FILE]

Contenders: eager, eager with a fused optimizer, eager with images channels last, torch.compile of
the step as users write it, the same with backward traced in (`torch._dynamo.config.
trace_autograd_ops`), JAX, NumPy, tracejit; on a GPU also the whole eager step in one CUDA graph,
captured by hand, with and without a fused optimizer, torch.compile in two more modes, and tracejit
without graphs of its own (there are more cases, too, in sizes that fill it). Each runs in a process
of its own (worker.py). Processes start one after another; then they are timed in rounds, in an
order that turns from round to round.
Before that, results are compared with eager's: a difference is reported as "wrong". What fails, is
wrong or takes longer than the limit for an answer is a row that says so, with the end of what its
process said in the report; the others go on. If that is tracejit or eager, the exit status is 1.

How to read the table, one row per contender:
  p20 p50 p80  microseconds per call, over the rounds
  ratio        eager's median over this one's: above 1 is faster than eager
  cold cached  seconds of the first call, imports of the compiler included: with an empty disk
               cache, and in a second process
  peak MiB     memory beyond the step's own tensors: allocated by torch, and resident
The row "floor" is the time of the case's matrix products in BLAS, one by one, plus that of moving
its bytes at copy bandwidth, both measured in this run: where to go, not a proof of a limit.
Below the table stands where tracejit misses its goals.

A run of all cases and contenders writes benchmarks/results/<device>.json; any other run does with
--output. JAX may live in an environment of its own: --jax-python or $TRACEJIT_BENCH_JAX_PYTHON.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import ALL, Case, arrays_of, cases_of
from benchmarks.clock import PAUSE
from benchmarks.machine import machine, write
from benchmarks.numpy_steps import STEPS as NUMPY_CASES
from benchmarks.worker import sampled

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = (
    "eager",
    "eager fused",
    "eager channels_last",
    "eager graph",
    "eager fused graph",
    "torch.compile",
    "torch.compile traced",
    "torch.compile reduce-overhead",
    "torch.compile max-autotune",
    "jax",
    "numpy",
    "tracejit launches",
    "tracejit",
)
OF_GPUS = {
    *("eager graph", "eager fused graph", "tracejit launches"),
    *("torch.compile reduce-overhead", "torch.compile max-autotune"),
}
CACHING = ("torch.compile", "torch.compile traced", "jax", "tracejit")  # have a disk cache
OURS = ("eager", "tracejit", "tracejit launches")  # are not to fail
REMEMBERING = ("eager", "tracejit")  # whose memory is measured
NUMBERS_RELATIVE = 1e-3  # returned numbers against eager's
STATE_RELATIVE = 1e-2  # tensors against eager's, by norm, as a part of how far they moved
FIRST_CALL = {"cold": 0.6, "cached": 0.15}  # goals for tracejit's, in seconds
FIRST_CALL_OF = {  # large models
    "resnet": {"cold": 6.0, "cached": 1.0},
    "gpt": {"cold": 1.5, "cached": 0.5},
    "gpt_384": {"cold": 4.0, "cached": 0.8},
    "lstm_256": {"cold": 2.0, "cached": 0.15},
}


SAID = 6000  # characters of what a failed process said last


class Failed(Exception):
    """A contender that did not run, or ran wrong: one line that says what."""


class Process:
    """A worker, and the conversation with it. An answer takes `limit` seconds at most."""

    def __init__(
        self,
        python: str,
        arguments: Sequence[str],
        files: Path,
        log: str,
        limit: float,
        environment: dict[str, str],
    ):
        self.log, self.limit = files / f"{log}.err", limit
        caches = {
            "TRACEJIT_CACHE": "tracejit",
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "JAX_COMPILATION_CACHE_DIR": "jax",
        }
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", *arguments],
            cwd=ROOT,
            env=os.environ
            | {name: str(files / folder) for name, folder in caches.items()}
            | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # as torch's
            | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def receive(self) -> object:
        """The next answer; raises Failed when the worker has ended, or does not answer."""
        if not select.select([self.process.stdout], [], [], self.limit)[0]:
            self.process.kill()
            self.process.wait()
            raise Failed(f"failed: no answer in {self.limit:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            said = [s for s in self.log.read_text().splitlines() if s.strip()]
            errors = [s for s in said if not s.startswith(" ") and "Error" in s] or said
            raise Failed(f"failed: {errors[-1] if errors else 'no message'}")
        return json.loads(line)

    def ask(self) -> float:
        """One round."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, which receive tells
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return self.receive()

    def said(self) -> str:
        """The end of what it said to stderr."""
        return self.log.read_text(errors="replace")[-SAID:]

    def close(self) -> None:
        """Let it end; it is given as long as for an answer."""
        try:
            self.process.communicate(timeout=self.limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


def available(case_name: str, contender: str, device: str, pythons: dict[str, str]) -> bool:
    """Whether a contender has this case here."""
    case = ALL[case_name]
    if contender in OF_GPUS and device != "cuda":
        return False
    if "fused" in contender and not case.optimizer:
        return False
    if "channels_last" in contender and not case.images:
        return False
    if "graph" in contender and case.reads:
        return False
    if contender == "numpy":
        return device == "cpu" and case_name in NUMPY_CASES
    if contender == "jax":
        return "jax" in pythons and case.jax
    return True


def compare(numbers: Sequence, state: Sequence, eager: Sequence, wanted: Sequence, start: Sequence):
    """Raise Failed unless a contender's numbers and tensors are eager's."""
    for call, (a, b) in enumerate(zip(numbers, eager, strict=True)):
        if a != b and not abs(a - b) <= NUMBERS_RELATIVE * abs(b):
            raise Failed(f"wrong: call {call} returned {a:.6g}, in eager {b:.6g}")
    for i, (a, b, first) in enumerate(zip(state, wanted, start, strict=True)):
        moved = float(np.linalg.norm(b.astype(np.float64) - first))
        off = float(np.linalg.norm(a.astype(np.float64) - b))
        if not off <= STATE_RELATIVE * moved:
            raise Failed(f"wrong: tensor {i} is off by {off / moved:.2g} of how far eager moved it")


def started(case_name: str, *, small: bool) -> tuple[Callable, list]:
    """A fresh step on the CPU, and of each tensor that it changes where that starts."""
    case = ALL[case_name]
    step, tensors = case.made("cpu", small=small)
    return step, [
        np.float64(0) if case.grads else sampled(t.detach()).numpy().copy() for t in tensors
    ]


def measure(
    case_name: str,
    contenders: Sequence[str],
    rounds: int,
    device: str,
    pythons: dict[str, str],
    small: bool = False,
    limit: float = 300.0,
) -> dict[str, dict]:
    """All contenders of a case: a row each, of figures; or of what is wrong under "note", and the
    end of what was said about it under "said"."""
    contenders = [c for c in contenders if available(case_name, c, device, pythons)]
    step, start = started(case_name, small=small)
    with tempfile.TemporaryDirectory(prefix="tracejit-bench-") as folder:
        files = Path(folder)
        if not {"jax", "numpy"}.isdisjoint(contenders):
            np.savez(files / "start.npz", **arrays_of(step))

        def spawn(contender: str, *options: str) -> Process:
            arguments = [case_name, contender, device, folder, *options]
            python = pythons.get(contender, sys.executable)
            more = {"TRACEJIT_GRAPHS": "0"} if contender == "tracejit launches" else {}
            arguments += ["--small"] * small
            log = "-".join((contender, *options))
            return Process(python, arguments, files, log, limit, more)

        def failed(worker: Process, error: Failed) -> dict[str, str]:
            worker.close()
            return {"note": str(error), "said": worker.said()}

        rows: dict[str, dict] = {}
        workers: dict[str, Process] = {}
        for contender in contenders:
            if contender != "eager" and "note" in rows["eager"]:
                break  # with nothing to compare it to
            try:
                first_calls = {}
                for kind in ("cold", "cached")[: 1 + (contender in CACHING)]:
                    worker = spawn(contender)
                    ready = worker.receive()
                    first_calls[f"{kind}_s"] = ready["first_call_s"]
                    if kind == "cold" and contender in CACHING:
                        worker.close()
                state = _load(files / f"{contender}.npz")
                if contender == "eager":
                    eager, wanted = ready["numbers"], state
                compare(ready["numbers"], state, eager, wanted, start)
                rows[contender] = first_calls
                workers[contender] = worker
            except Failed as error:
                rows[contender] = failed(worker, error)
        for contender in [c for c in REMEMBERING if c in workers]:
            memory = spawn(contender, "--memory")
            try:
                rows[contender] |= memory.receive()
            except Failed as error:
                rows[contender]["memory_note"] = str(error)
            memory.close()
        times, errors = turns(workers, rounds)
        for contender, worker in workers.items():
            if contender in errors:
                rows[contender] = failed(worker, errors[contender])
            else:
                worker.close()
    return {
        name: row | quantiles(times[name]) if name in times else row for name, row in rows.items()
    }


def turns(
    workers: dict[str, Process], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Failed]]:
    """Seconds per call, a list per worker with an entry per round; and what befell those that did
    not come to the end."""
    times: dict[str, list[float]] = {name: [] for name in workers}
    errors: dict[str, Failed] = {}
    order = list(workers)
    for _ in range(rounds):
        for name in [x for x in order if x not in errors]:
            time.sleep(PAUSE)
            try:
                times[name].append(workers[name].ask())
            except Failed as error:
                errors[name] = error
                del times[name]
        order.append(order.pop(0)) if order else None
    return times, errors


def _load(path: Path) -> list[np.ndarray]:
    with np.load(path) as file:
        return [file[name] for name in file.files]


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """p20, p50, p80 in microseconds."""
    p20, p50, p80 = np.quantile([t * 1e6 for t in times], (0.2, 0.5, 0.8))
    return {"p20": float(p20), "p50": float(p50), "p80": float(p80)}


def floor(case: Case, bandwidth: float, device: str) -> float:
    """Seconds of the case's matrix products and bytes."""
    total = case.bytes / bandwidth
    for count, m, k, n in case.gemms:
        a, b = (np.ones(shape, np.float32) for shape in ((m, k), (k, n)))
        out = np.empty((m, n), np.float32)
        if device == "cuda":
            a, b, out = (torch.from_numpy(x).to(device) for x in (a, b, out))
        product = np.matmul if device == "cpu" else torch.mm
        total += count * median_seconds(lambda: product(a, b, out=out), device)  # noqa: B023
    return total


def copy_bandwidth(device: str) -> float:
    """Bytes read plus written per second by a copy of more than caches hold."""
    nbytes = 1 << (30 if device == "cuda" else 28)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median_seconds(lambda: target.copy_(source), device)


def median_seconds(call: Callable[[], object], device: str, repeats: int = 30) -> float:
    """The median time of a call, several in a row where it is short."""

    def timed(count: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / count

    count = max(1, int(1e-3 / timed(2)))
    return statistics.median(timed(count) for _ in range(repeats))


def shortfalls(case_name: str, rows: dict[str, dict]) -> list[str]:
    """Where tracejit misses its goals in one case."""
    found, ours = [], rows.get("tracejit")
    if ours is None or "note" in ours:
        return found
    for name, row in rows.items():
        if "p50" in row and ours["p50"] > row["p50"] + (row["p80"] - row["p20"]):
            found.append(f"{name} is faster: {row['p50']:.0f} µs, tracejit {ours['p50']:.0f} µs")
    for kind, goal in FIRST_CALL_OF.get(case_name, FIRST_CALL).items():
        if ours[f"{kind}_s"] > goal:
            found.append(f"{kind} first call {ours[f'{kind}_s']:.2f} s, goal {goal} s")
    # what oneDNN works in for convolutions is allocated by itself: resident memory has it
    images = case_name in ALL and ALL[case_name].images
    counted = "rss_bytes" if images else "allocated_bytes"
    needed, theirs = (x.get(counted) for x in (ours, rows.get("eager", {})))
    if None not in (needed, theirs) and needed > theirs:
        found.append(f"peak memory {needed} bytes, in eager {theirs}")
    return [f"{case_name}: {text}" for text in found]


HEADER = (
    f"{'case':18s} {'contender':30s} {'p20':>9s} {'p50 µs':>9s} {'p80':>9s} {'ratio':>6s} "
    f"{'cold s':>7s} {'cached':>7s} {'peak MiB':>9s} {'resident':>9s}"
)


def table(case_name: str, rows: dict[str, dict], floor_us: float) -> str:
    """The lines of one case."""

    def cell(value: float | None, width: int, digits: int, unit: float = 1) -> str:
        return " " * width if value is None else f"{value / unit:{width}.{digits}f}"

    base, lines = rows["eager"].get("p50", 0), []
    for name, row in rows.items():
        line = f"{case_name:18s} {name:30s} "
        if "note" in row:
            lines.append(line + row["note"][:100])
            continue
        parts = [cell(row[q], 9, 1) for q in ("p20", "p50", "p80")]
        parts.append(cell(base / row["p50"], 6, 2))
        parts += [cell(row.get(f"{kind}_s"), 7, 2) for kind in ("cold", "cached")]
        parts += [cell(row.get(f"{k}_bytes"), 9, 2, 2**20) for k in ("allocated", "rss")]
        lines.append((line + " ".join(parts)).rstrip())
    if floor_us:
        parts = [" " * 9, cell(floor_us, 9, 1), " " * 9, cell(base / floor_us, 6, 2)]
        lines.append(f"{case_name:18s} {'floor':30s} {' '.join(parts)}")
    return "\n".join(lines)


def find_jax(python: str, device: str) -> dict[str, str]:
    """{"jax": python} where that interpreter has JAX for the device; says so where it has not."""
    platform = {"cuda": "gpu"}.get(device, device)
    code = "import jax; print(jax.default_backend())"
    probe = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if probe.returncode or probe.stdout.strip() != platform:
        has = probe.stdout.strip() if not probe.returncode else "none"
        print(f"jax is left out: {python} has {has} (--jax-python, extra 'bench')")
        return {}
    return {"jax": python}


def main(arguments: Sequence[str] | None = None) -> dict:
    """Run; returns the report that --output writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each answer")
    parser.add_argument("--case", choices=ALL, action="append")
    parser.add_argument("--contender", choices=CONTENDERS, action="append")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument(
        "--jax-python", default=os.environ.get("TRACEJIT_BENCH_JAX_PYTHON", sys.executable)
    )
    options = parser.parse_args(arguments)
    for folder in ("tracejit", "kernels"):  # as installed: else it is part of first calls
        compileall.compile_dir(ROOT / folder, quiet=2)
    contenders = [c for c in CONTENDERS if c in ("eager", *(options.contender or CONTENDERS))]
    there = torch.cuda.is_available()
    device = options.device or ("cuda" if there else "cpu")
    if device == "cuda" and not there:
        parser.error("there is no CUDA device; torch.cuda.is_available() is False")
    pythons = find_jax(options.jax_python, device) if "jax" in contenders else {}
    bandwidth = copy_bandwidth(device)
    about = machine(device)
    about["versions"] |= _jax_version(pythons)
    threads = torch.get_num_threads()
    print(f"{about['device']}, {threads} threads, copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    print(HEADER, flush=True)
    results, missed, failed = {}, [], []
    for case_name in options.case or cases_of(device):
        case = ALL[case_name]
        given = options.rounds, device, pythons, options.small, options.limit
        rows = measure(case_name, contenders, *given)
        least = 0.0 if options.small else floor(case, bandwidth, device) * 1e6
        print(table(case_name, rows, least), flush=True)
        results[case_name] = {"contenders": rows, "floor_us": least}
        missed += shortfalls(case_name, rows)
        failed += [f"{case_name}: {c} {rows[c]['note']}" for c in OURS if "note" in rows.get(c, {})]
    print("\n".join([*failed, *missed]) or "tracejit meets its goals in every case")
    report = about | {
        "threads": threads,
        "copy_bandwidth_gb_s": bandwidth / 1e9,
        "command": " ".join(["python -m benchmarks.run", *(arguments or sys.argv[1:])]),
        "rounds": options.rounds,
        "cases": results,
        "missed": missed,
        "failed": failed,
    }
    whole = not (options.case or options.contender or options.small)
    at = options.output or (ROOT / "benchmarks" / "results" / f"{device}.json" if whole else None)
    if at:
        write(at, report)
        print(f"written to {at}")
    return report


def _jax_version(pythons: dict[str, str]) -> dict[str, str]:
    if "jax" not in pythons:
        return {}
    command = [pythons["jax"], "-c", "import jax; print(jax.__version__)"]
    return {"jax": subprocess.check_output(command, text=True).strip()}


if __name__ == "__main__":
    raise SystemExit(1 if main()["failed"] else 0)
