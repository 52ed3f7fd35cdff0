"""Each case a few times in tiny sizes, compiled and eager side by side: the first look at a device.

    python -m benchmarks.smoke [CASE…] [--device cpu|cuda] [--large]

Prints a line for each; an error is shown with the kernel, the user's line and where it arose. It is
what compute-sanitizer runs. With --large the cases have their own sizes.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from benchmarks.cases import ALL, CASES
from benchmarks.isolated import Lines, fatal
from benchmarks.run import compare, started
from benchmarks.worker import CALLS, build_torch


def check(name: str, device: str, *, small: bool = True) -> None:
    """Raise where compiled calls of a case do not give what eager gives."""
    _, start = started(name, small=small)
    found = []
    for contender in ("eager", "tracejit"):
        made = build_torch(name, contender, device, small)
        numbers = [made.number(made.step()) for _ in range(CALLS)]
        found.append((numbers, made.state()))
    (numbers, state), ours = found
    compare(*ours, numbers, state, start)


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status, the number of cases that failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("case", nargs="*", choices=[*ALL, []], default=[])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--large", action="store_true", help="the cases' own sizes")
    options = parser.parse_args(arguments)
    lines, failed = Lines(), 0
    for name in options.case or CASES:
        lines.begin(name)
        begun = time.perf_counter()
        try:
            check(name, options.device, small=not options.large)
        except Exception as error:
            text, failed = traceback.format_exc(), failed + 1
            print(f"{name}: {type(error).__name__}: {error}\n{text}", flush=True)
            lines.end(name, "failed", text)
            if fatal(text):
                break
        else:
            print(f"{name}: equal to eager, {time.perf_counter() - begun:.1f} s", flush=True)
            lines.end(name, "passed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
