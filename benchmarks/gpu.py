"""All that a first run on a GPU should tell, in one command that keeps to a budget.

    python -m benchmarks.gpu [--minutes 24] [--only PART]… [--resume] [--output FILE]

Most telling first: the device and its versions; each case in tiny sizes against eager; the most
telling cases of the table, with few contenders; the gpu tests; compute-sanitizer, where it is
installed; the other cases; the table with all peers. What fails, crashes or hangs stops nothing
else. The result file, benchmarks/results/gpu-<arch>.json, is written anew as each part ends and as
each item of a part ends: kernel, user's line and traceback of what failed are there. --resume goes
on where an earlier run of the same file stopped.

In the environment that has the GPU's torch (>= 2.9) and Triton (3.6 to 3.9):

    python -m pip install --no-deps -e . && python -m pip install pytest numpy
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.isolated import PATHS, ROOT, VARIABLE, clipped, kill, run_items
from benchmarks.machine import machine, write

RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 24.0
LEAST = 15.0  # seconds: with less left, no part begins
FEW = ("eager", "eager graph", "eager fused graph", "tracejit launches", "tracejit")
ROUNDS = 7
SANITIZED = ("two_layer_autograd", "chain_4m", "adam_5m", "softmax", "transformer_block")
_SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer",)


@dataclass(frozen=True)
class Part:
    """One part of the run.

    limit:  seconds that it may take.
    run:    (deadline of time.monotonic, note) -> what the result file has of it, with its "status".
        It may `note(item, result)` while it runs.
    """

    name: str
    limit: float
    run: Callable[[float, Callable[[str, Mapping], None]], Mapping]


class Report:
    """The result file, which is written anew at each change."""

    def __init__(self, path: Path, about: Mapping[str, object], *, resume: bool = False):
        self.path = path
        self.found: dict = {"parts": {}}
        if resume and path.exists():
            self.found = json.loads(path.read_text())
        self.found |= about
        self.save()

    def done(self, name: str) -> bool:
        """Whether a part has come to its end in an earlier run."""
        return self.found["parts"].get(name, {}).get("status") in ("passed", "failed", "absent")

    def put(self, name: str, result: Mapping) -> None:
        """What a part has told so far."""
        self.found["parts"][name] = dict(result)
        self.save()

    def save(self) -> None:
        """Write all."""
        write(self.path, self.found)


def run_parts(parts: Sequence[Part], report: Report, seconds: float) -> None:
    """Run parts in order within a budget; a part that raises is a failed one."""
    end = time.monotonic() + seconds
    for part in parts:
        left = end - time.monotonic()
        if report.done(part.name):
            continue
        if left < LEAST:
            report.put(part.name, {"status": "not begun", "text": "the budget is used up"})
            continue
        items: dict[str, Mapping] = {}

        def note(item: str, result: Mapping, items=items, part=part) -> None:
            items[item] = dict(result)
            report.put(part.name, {"status": "running", "items": items})

        begun = time.monotonic()
        try:
            result = dict(part.run(begun + min(left, part.limit), note))
        except Exception:
            result = {"status": "failed", "text": clipped(traceback.format_exc())}
        if items:
            result["items"] = items
        result["seconds"] = round(time.monotonic() - begun, 1)
        report.put(part.name, result)
        print(f"{part.name}: {result['status']}, {result['seconds']} s", flush=True)


# ---- what parts do


def command(
    arguments: Sequence[str],
    deadline: float,
    environment: Mapping[str, str] | None = None,
    root: Path = ROOT,
) -> dict[str, object]:
    """Run a command to its end, or to the deadline: its status, and what it said."""
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            arguments,
            cwd=root,
            env=os.environ | PATHS | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
            status = "failed" if child.returncode else "passed"
        except subprocess.TimeoutExpired:
            kill(child)
            status = "out of time"
        log.seek(0)
        found = {"status": status, "command": " ".join(Path(x).name for x in arguments)}
        return found | {"exit": child.returncode, "text": clipped(log.read())}


def isolated(
    items: Sequence[str],
    child: Callable[[Sequence[str]], Sequence[str]],
    limit: float,
    root: Path = ROOT,
) -> Callable[[float, Callable], Mapping]:
    """A part that runs items, each of which may fail, crash or hang."""

    def run(deadline: float, note: Callable[[str, Mapping], None]) -> Mapping:
        counts: dict[str, int] = {}

        def counted(item: str, result: Mapping) -> None:
            counts[result["status"]] = counts.get(result["status"], 0) + 1
            note(item, result)

        run_items(items, child, counted, deadline=deadline, limit=limit, root=root)
        late = {"not begun", "not finished"} & counts.keys()
        good = counts.keys() <= {"passed", "skipped"}
        return {"status": "passed" if good else "out of time" if late else "failed"} | counts

    return run


def smoke(device: str, cases: Sequence[str] | None = None) -> Callable:
    """Each case in tiny sizes against eager."""
    from benchmarks.cases import CASES

    def child(items: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "benchmarks.smoke", "--device", device, *items]

    return isolated(list(cases or CASES), child, 90.0)


def tests(paths: Sequence[str] = ("tests",), root: Path = ROOT) -> Callable:
    """The tests that need a GPU, in processes of their own after a failure of the device."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu"]
    pytest += ["-p", "benchmarks.pytest_lines", "--tb=short"]

    def run(deadline: float, note: Callable[[str, Mapping], None]) -> Mapping:
        with tempfile.TemporaryDirectory(prefix="tracejit-gpu-") as folder:
            lines = Path(folder, "lines")
            found = command(
                [*pytest, "--collect-only", *paths], deadline, {VARIABLE: str(lines)}, root
            )
            text = lines.read_text() if lines.exists() else ""
        items = [json.loads(line)["item"] for line in text.splitlines()]
        if not items:
            return found | {"status": "failed"}
        return isolated(items, lambda items: [*pytest, *items], 120.0, root)(deadline, note)

    return run


def sanitizer(device: str, tool: str, cases: Sequence[str] = SANITIZED) -> Callable:
    """Small cases under a tool of compute-sanitizer."""

    def run(deadline: float, note: Callable[[str, Mapping], None]) -> Mapping:
        places = (shutil.which("compute-sanitizer"), *_SANITIZERS)
        program = next((p for p in places if p and Path(p).exists()), None)
        if program is None:
            return {"status": "absent", "text": "compute-sanitizer is not installed"}
        arguments = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        smoke_of = [sys.executable, "-m", "benchmarks.smoke", "--device", device, *cases]
        off = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        return command([*arguments, *smoke_of], deadline, off)

    return run


def table(
    case: str,
    device: str,
    contenders: Sequence[str] = (),
    *,
    small: bool = False,
    limit: float = 60.0,
) -> Callable:
    """A case of the table."""

    def run(deadline: float, note: Callable[[str, Mapping], None]) -> Mapping:
        with tempfile.TemporaryDirectory(prefix="tracejit-gpu-") as folder:
            output = Path(folder, "found.json")
            arguments = [sys.executable, "-m", "benchmarks.run", "--device", device]
            arguments += ["--case", case, "--rounds", str(ROUNDS), "--limit", str(limit)]
            arguments += ["--output", str(output), *["--small"] * small]
            for contender in contenders:
                arguments += ["--contender", contender]
            result = command(arguments, deadline)
            if output.exists():
                found = json.loads(output.read_text())
                kept = ("copy_bandwidth_gb_s", "missed", "failed")
                result |= found["cases"][case] | {k: found[k] for k in kept}
            return result

    return run


def parts_of(device: str, *, small: bool = False) -> list[Part]:
    """All parts, the most telling first."""
    from benchmarks.cases import TELLING, cases_of

    names = cases_of("cuda")
    few = [c for c in FEW if c != "eager"]

    def row(name: str) -> Part:
        return Part(f"table: {name}", 100.0, table(name, device, few, small=small))

    def peers(name: str) -> Part:
        run = table(name, device, small=small, limit=150.0)
        return Part(f"table with peers: {name}", 300.0, run)

    return [
        Part("smoke", 240.0, smoke(device)),
        *map(row, TELLING[:4]),
        Part("tests", 420.0, tests()),
        Part("memcheck", 120.0, sanitizer(device, "memcheck")),
        *map(row, TELLING[4:8]),
        *map(peers, TELLING[:3]),
        Part("racecheck", 100.0, sanitizer(device, "racecheck")),
        *map(row, names[8:]),
        *map(peers, TELLING[3:]),
    ]


def about(device: str) -> dict[str, object]:
    """The device and versions; whatever goes wrong is part of the answer."""
    try:
        return machine(device)
    except Exception:
        return machine() | {"device_error": clipped(traceback.format_exc())}


def main(arguments: Sequence[str] | None = None) -> dict:
    """Run; returns what the result file has."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", action="append", metavar="PART", help="parts that begin so")
    parser.add_argument("--resume", action="store_true", help="go on with the result file")
    parser.add_argument("--output", type=Path, help="the result file")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="cpu: to see that it runs"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    found = about(options.device)
    if options.device == "cuda" and "arch" not in found:
        said = str(found.get("device_error", "")).strip().splitlines()
        parser.error(f"there is no CUDA device here: {said[-1] if said else 'none was found'}")
    path = options.output or RESULTS / f"gpu-{found.get('arch', 'cpu')}.json"
    parts = parts_of(options.device, small=options.small)
    if options.only:
        parts = [p for p in parts if p.name.startswith(tuple(options.only))]
        if not parts:
            names = ", ".join(p.name for p in parts_of(options.device))
            parser.error(f"no part begins with {' or '.join(options.only)}; there are {names}")
    given = ["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
    report = Report(path, found | {"command": " ".join(given)}, resume=options.resume)
    run_parts(parts, report, 60.0 * options.minutes - (time.monotonic() - begun))
    print(f"written to {path}")
    return report.found


if __name__ == "__main__":
    done = main()["parts"].values()
    raise SystemExit(0 if all(part["status"] in ("passed", "absent") for part in done) else 1)
