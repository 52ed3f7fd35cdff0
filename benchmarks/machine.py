"""What figures were measured on: the device, its driver, and the versions of what ran."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import date
from pathlib import Path

PACKAGES = ("torch", "triton", "numpy", "tracejit")


def machine(device: str = "cpu") -> dict[str, object]:
    """The device's name, driver, and versions, as plain data. torch is imported for a GPU only."""
    found = {
        "date": date.today().isoformat(),
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
    }
    found["commit"] = commit()
    return found | (gpu() if device == "cuda" else {})


def commit() -> str | None:
    """The commit of the sources, where git knows it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    return None


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu() -> dict[str, object]:
    """The current GPU."""
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": found.name,
        "arch": f"sm_{found.major}{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "driver": driver(),
        "cuda": torch.version.cuda,
    }


def driver() -> str:
    """The version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known ({error})"
    return (done.stdout or done.stderr).strip().partition("\n")[0]


def write(path: str | Path, figures: Mapping[str, object]) -> None:
    """Write figures as JSON, all at once: a reader, or the end of the process, sees no half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(figures, indent=1) + "\n")
    temporary.replace(path)
