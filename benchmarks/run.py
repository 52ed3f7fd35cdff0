"""Time each case in eager and compiled: own processes, interleaved rounds, medians, floors beside.

    python -m benchmarks.run [--rounds 15] [--case NAME]

Writes benchmarks/results/<device>.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import CASES, Case

CONTENDERS = ("eager", "tracejit")
WARMUP, SECONDS_PER_ROUND = 5, 0.3


def worker(case_name: str, contender: str, device: str) -> None:
    """Serve one contender: a line in, a JSON line out."""
    step, _ = CASES[case_name].make_step(device=device)
    started = time.perf_counter()
    if contender == "tracejit":
        import tracejit

        step = tracejit.compile(step)
    losses = [step().item()]
    first_call = time.perf_counter() - started
    losses += [step().item() for _ in range(WARMUP)]

    def timed(count: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / count

    count = max(1, int(SECONDS_PER_ROUND / timed(3)))
    print(json.dumps({"losses": losses, "first_call": first_call}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed(count)), flush=True)


def floor(case: Case, bandwidth: float) -> float:
    """Seconds no version can beat: its GEMMs by numpy's BLAS plus its bytes at copy speed."""
    total = case.bytes / bandwidth
    for m, k, n in case.gemms:
        a, b = np.ones((m, k), np.float32), np.ones((k, n), np.float32)
        out = np.empty((m, n), np.float32)
        total += _best(lambda a=a, b=b, out=out: np.matmul(a, b, out=out))
    return total


def copy_bandwidth(nbytes: int = 1 << 27) -> float:
    """Bytes read plus written per second by a large copy."""
    source, target = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)
    return 2 * nbytes / _best(lambda: np.copyto(target, source), 5)


def _best(run, repeats: int = 30) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def quantiles(times: list[float]) -> dict[str, float]:
    """p20, p50, p80 in microseconds."""
    cuts = statistics.quantiles([t * 1e6 for t in times], n=10)
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def measure(case_name: str, rounds: int, device: str) -> dict:
    """All contenders of a case, round by round."""
    workers = {}
    for contender in CONTENDERS:
        command = [sys.executable, "-m", "benchmarks.run", "--worker", case_name, contender, device]
        workers[contender] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    ready = {name: json.loads(w.stdout.readline()) for name, w in workers.items()}
    reference = ready["eager"]["losses"]
    for name, answer in ready.items():
        if not np.allclose(answer["losses"], reference, rtol=1e-3):
            raise SystemExit(f"{case_name}: losses of {name} differ from eager's: {answer}")
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, w in workers.items():
            w.stdin.write("go\n")
            w.stdin.flush()
            times[name].append(json.loads(w.stdout.readline()))
    for w in workers.values():
        w.stdin.close()
        w.wait()
    return {
        name: quantiles(times[name]) | {"first_call_s": ready[name]["first_call"]}
        for name in workers
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    bandwidth = copy_bandwidth()
    results = {}
    print(f"{name}, {torch.get_num_threads()} threads, copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    print(f"{'case':22s} {'contender':10s} {'p20':>9s} {'p50 µs':>9s} {'p80':>9s} {'ratio':>6s}")
    for case_name in options.case or CASES:
        found = measure(case_name, options.rounds, device)
        least = floor(CASES[case_name], bandwidth) * 1e6 if device == "cpu" else None
        base = found["eager"]["p50"]
        for contender, row in found.items():
            row["ratio"] = base / row["p50"]
            print(
                f"{case_name:22s} {contender:10s} {row['p20']:9.1f} {row['p50']:9.1f} "
                f"{row['p80']:9.1f} {row['ratio']:6.2f}"
            )
        if least is not None:
            print(f"{case_name:22s} {'floor':10s} {'':9s} {least:9.1f} {'':9s} {base / least:6.2f}")
        results[case_name] = {"contenders": found, "floor_us": least}
    at = Path(__file__).parent / "results" / f"{device}.json"
    report = {
        "date": date.today().isoformat(),
        "device": name,
        "threads": torch.get_num_threads(),
        "copy_bandwidth_gb_s": bandwidth / 1e9,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "python": platform.python_version(),
        "command": "python -m benchmarks.run",
        "cases": results,
    }
    at.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {at.relative_to(Path.cwd()) if at.is_relative_to(Path.cwd()) else at}")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
