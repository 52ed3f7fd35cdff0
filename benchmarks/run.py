"""Time every case under every contender, side by side, and print the table.

    python -m benchmarks.run [--case NAME]… [--contender NAME]… [--rounds 15] [--jax-python PATH]

Contenders: eager, eager with a fused optimizer, torch.compile of the step as users write it, the
same with backward traced in (`torch._dynamo.config.trace_autograd_ops`), JAX, NumPy, tracejit.
Each runs in a process of its own (worker.py). Processes start one after another; then they are
timed in rounds, in an order that turns from round to round. Before that, results are compared with
eager's: for a peer a difference is reported as "wrong"; for tracejit it ends the run.

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
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import CASES, Case, arrays_of
from benchmarks.numpy_steps import STEPS as NUMPY_CASES

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = (
    "eager",
    "eager fused",
    "torch.compile",
    "torch.compile traced",
    "jax",
    "numpy",
    "tracejit",
)
CACHING = ("torch.compile", "torch.compile traced", "jax", "tracejit")  # have a disk cache
REMEMBERING = ("eager", "tracejit")  # whose memory is measured
NUMBERS_RELATIVE = 1e-3  # returned numbers against eager's
STATE_RELATIVE = 1e-2  # tensors against eager's, by norm, as a part of how far they moved
PAUSE = 0.03  # seconds between turns, in which the last one's threads go to sleep
COLD_GOAL, CACHED_GOAL = 0.6, 0.15  # seconds of tracejit's first call


class Failed(Exception):
    """A contender that did not run, or ran wrong: one line that says what."""


class Process:
    """A worker, and the conversation with it."""

    def __init__(self, python: str, arguments: Sequence[str], files: Path, log: str):
        self.log = files / f"{log}.err"
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
            | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def receive(self) -> object:
        """The next answer; raises Failed when the worker has ended."""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            said = [s for s in self.log.read_text().splitlines() if s.strip()]
            errors = [s for s in said if not s.startswith(" ") and "Error" in s] or said
            raise Failed(f"failed: {errors[-1] if errors else 'no message'}")
        return json.loads(line)

    def ask(self) -> float:
        """One round."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.receive()

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()


def available(case_name: str, contender: str, device: str, pythons: dict[str, str]) -> bool:
    """Whether a contender has this case here."""
    if contender == "eager fused":
        return CASES[case_name].fused
    if contender == "numpy":
        return device == "cpu" and case_name in NUMPY_CASES
    if contender == "jax":
        return (
            device == "cpu" and "jax" in pythons and case_name != "dynamic_net"
        )  # Python in every call
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


def measure(
    case_name: str,
    contenders: Sequence[str],
    rounds: int,
    device: str,
    pythons: dict[str, str],
    small: bool = False,
) -> dict[str, dict]:
    """All contenders of a case: a row each, of figures or of what is wrong under "note"."""
    case = CASES[case_name]
    contenders = [c for c in contenders if available(case_name, c, device, pythons)]
    step, tensors = case.make_step(device="cpu", **(case.small if small else {}))
    start = [np.float64(0) if case.grads else t.detach().numpy().copy() for t in tensors]
    with tempfile.TemporaryDirectory(prefix="tracejit-bench-") as folder:
        files = Path(folder)
        np.savez(files / "start.npz", **arrays_of(step))

        def spawn(contender: str, *options: str) -> Process:
            arguments = [case_name, contender, device, folder, *options]
            python = pythons.get(contender, sys.executable)
            return Process(python, arguments + ["--small"] * small, files, contender)

        rows: dict[str, dict] = {}
        workers: dict[str, Process] = {}
        for contender in contenders:
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
                if contender in REMEMBERING:
                    memory = spawn(contender, "--memory")
                    rows[contender] |= memory.receive()
                    memory.close()
                workers[contender] = worker
            except Failed as error:
                if contender in ("eager", "tracejit"):
                    raise SystemExit(f"{case_name}: {contender} {error}") from None
                rows[contender] = {"note": str(error)}
                worker.close()
        times = turns(workers, rounds)
        for worker in workers.values():
            worker.close()
    return {
        name: row | quantiles(times[name]) if name in times else row for name, row in rows.items()
    }


def turns(workers: dict[str, Process], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, a list per worker with an entry per round."""
    times: dict[str, list[float]] = {name: [] for name in workers}
    order = list(workers)
    for _ in range(rounds):
        for name in order:
            time.sleep(PAUSE)
            times[name].append(workers[name].ask())
        order.append(order.pop(0))
    return times


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


def copy_bandwidth(device: str, nbytes: int = 1 << 28) -> float:
    """Bytes read plus written per second by a large copy on all threads."""
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
    if ours is None:
        return found
    for name, row in rows.items():
        if "p50" in row and ours["p50"] > row["p50"] + (row["p80"] - row["p20"]):
            found.append(f"{name} is faster: {row['p50']:.0f} µs, tracejit {ours['p50']:.0f} µs")
    for kind, goal in (("cold", COLD_GOAL), ("cached", CACHED_GOAL)):
        if ours[f"{kind}_s"] > goal:
            found.append(f"{kind} first call {ours[f'{kind}_s']:.2f} s, goal {goal} s")
    theirs = rows.get("eager", {}).get("allocated_bytes")
    if theirs is not None and ours["allocated_bytes"] > theirs:
        found.append(f"peak memory {ours['allocated_bytes']} bytes, in eager {theirs}")
    return [f"{case_name}: {text}" for text in found]


HEADER = (
    f"{'case':18s} {'contender':20s} {'p20':>9s} {'p50 µs':>9s} {'p80':>9s} {'ratio':>6s} "
    f"{'cold s':>7s} {'cached':>7s} {'peak MiB':>9s} {'resident':>9s}"
)


def table(case_name: str, rows: dict[str, dict], floor_us: float) -> str:
    """The lines of one case."""

    def cell(value: float | None, width: int, digits: int, unit: float = 1) -> str:
        return " " * width if value is None else f"{value / unit:{width}.{digits}f}"

    base, lines = rows["eager"]["p50"], []
    for name, row in rows.items():
        line = f"{case_name:18s} {name:20s} "
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
        lines.append(f"{case_name:18s} {'floor':20s} {' '.join(parts)}")
    return "\n".join(lines)


def find_jax(python: str) -> dict[str, str]:
    """{"jax": python} where that interpreter has JAX; says so where it has not."""
    probe = subprocess.run([python, "-c", "import jax"], capture_output=True)
    if probe.returncode:
        print(f"jax is left out: {python} does not have it (--jax-python, extra 'bench')")
        return {}
    return {"jax": python}


def main(arguments: Sequence[str] | None = None) -> dict:
    """Run; returns the report that --output writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--contender", choices=CONTENDERS, action="append")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument(
        "--jax-python", default=os.environ.get("TRACEJIT_BENCH_JAX_PYTHON", sys.executable)
    )
    options = parser.parse_args(arguments)
    contenders = [c for c in CONTENDERS if c in ("eager", *(options.contender or CONTENDERS))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pythons = find_jax(options.jax_python) if "jax" in contenders else {}
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    print(f"{name}, {torch.get_num_threads()} threads, copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    print(HEADER, flush=True)
    results, missed = {}, []
    for case_name in options.case or CASES:
        case = CASES[case_name]
        rows = measure(case_name, contenders, options.rounds, device, pythons, options.small)
        least = 0.0 if options.small else floor(case, bandwidth, device) * 1e6
        print(table(case_name, rows, least), flush=True)
        results[case_name] = {"contenders": rows, "floor_us": least}
        missed += shortfalls(case_name, rows)
    print("\n".join(missed) if missed else "tracejit meets its goals in every case")
    report = {
        "date": date.today().isoformat(),
        "device": name,
        "threads": torch.get_num_threads(),
        "copy_bandwidth_gb_s": bandwidth / 1e9,
        "versions": _versions(pythons),
        "command": " ".join(["python -m benchmarks.run", *(arguments or sys.argv[1:])]),
        "rounds": options.rounds,
        "cases": results,
        "missed": missed,
    }
    whole = not (options.case or options.contender or options.small)
    at = options.output or (ROOT / "benchmarks" / "results" / f"{device}.json" if whole else None)
    if at:
        at.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {at}")
    return report


def _versions(pythons: dict[str, str]) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if "jax" in pythons:
        command = [pythons["jax"], "-c", "import jax; print(jax.__version__)"]
        found["jax"] = subprocess.check_output(command, text=True).strip()
    return found


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
