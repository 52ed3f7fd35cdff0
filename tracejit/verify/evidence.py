"""A file of evidence that a plan was wrong, which can be run again elsewhere: `replay-evidence`.

    a zip of   evidence.json   what differed, where it comes from, versions, digests of the inputs
               raw.txt         the captured graph, as text
               final.txt       the graph that was scheduled
               inputs.npz      the inputs of the run, where they are small

In: a run that differed from eager. Out: the file, and what it still shows. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tracejit import knobs
from tracejit.equality import array_of
from tracejit.errors import SavedFileError, TracejitError
from tracejit.ir.graph import Graph
from tracejit.ir.text import parse
from tracejit.ir.torch_types import TO_TORCH
from tracejit.passes import optimize
from tracejit.records import dataclass
from tracejit.runtime.program import Program
from tracejit.runtime.select import executor_for
from tracejit.schedule import schedule
from tracejit.verify.blame import Blame, of_kernels, of_passes

VERSION = 1
_SMALL = 64 << 20  # bytes of inputs that a file has
_MOST = 1 << 30  # bytes of an entry that is read
_DATE = (1980, 1, 1, 0, 0, 0)  # the same run gives the same file


@dataclass(frozen=True)
class Evidence:
    """What a file of evidence has. `inputs` is None where they were too large."""

    facts: dict
    raw: Graph
    final: Graph
    inputs: list[np.ndarray | float] | None


def write(
    step: str,
    how: str,
    differences: str,
    blame: Blame | None,
    graphs: tuple[Graph, Graph],
    inputs: Sequence[torch.Tensor | float],
    backend: str,
) -> Path:
    """Write evidence into the directory for dumps, or that of the cache; returns the file."""
    arrays = [np.asarray(array_of(x)) for x in inputs]
    facts = {
        "version": VERSION,
        "step": step,
        "how": how,
        "differences": differences,
        "blame": None if blame is None else vars(blame),
        "backend": backend,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "seed": torch.initial_seed(),
        "inputs": [{"digest": _digest(x), "shape": x.shape, "dtype": str(x.dtype)} for x in arrays],
    }
    entries = {"raw.txt": str(graphs[0]).encode(), "final.txt": str(graphs[1]).encode()}
    if sum(x.nbytes for x in arrays) <= _SMALL:
        held = io.BytesIO()
        np.savez(held, **{f"i{k}": x for k, x in enumerate(arrays)})
        entries["inputs.npz"] = held.getvalue()
    entries["evidence.json"] = json.dumps(facts, indent=1).encode()
    where = (knobs.dump_dir() or knobs.cache_dir()) / "evidence"
    where.mkdir(parents=True, exist_ok=True, mode=0o700)
    digest = hashlib.blake2b(entries["raw.txt"] + how.encode(), digest_size=6).hexdigest()
    path = where / f"{step}_{digest}.evidence"
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            file.writestr(zipfile.ZipInfo(name, _DATE), data)
    return path


def read(path: Path) -> Evidence:
    """What a file has. Raises SavedFileError for one that is no evidence, or damaged."""

    def refuse(reason: object) -> SavedFileError:
        return SavedFileError(path=path, reason=reason)

    try:
        with zipfile.ZipFile(path) as file:
            found = {}
            for info in file.infolist():
                if info.file_size > _MOST:
                    raise refuse(f"{info.filename} is too large")
                found[info.filename] = file.read(info)
        facts = json.loads(found["evidence.json"])
        if facts["version"] != VERSION:
            raise refuse(f"it is of version {facts['version']}, and this reads {VERSION}")
        raw, final = (parse(found[name].decode()) for name in ("raw.txt", "final.txt"))
        inputs = None
        if "inputs.npz" in found:
            with np.load(io.BytesIO(found["inputs.npz"]), allow_pickle=False) as arrays:
                inputs = [arrays[f"i{k}"] for k in range(len(facts["inputs"]))]
            for x, known in zip(inputs, facts["inputs"], strict=True):
                if _digest(x) != known["digest"]:
                    raise refuse("an input has another digest")
            pairs = zip(raw.params, inputs, strict=True)
            inputs = [float(x) if p.value.type.is_host else x for p, x in pairs]
    except SavedFileError:
        raise
    except (OSError, zipfile.BadZipFile):
        raise
    except (TracejitError, KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise refuse(f"it is no evidence: {error}") from None
    return Evidence(facts, raw, final, inputs)


def again(evidence: Evidence) -> Blame | None:
    """Run the passes, the schedule and the kernels once more on these inputs: what is wrong now."""
    if evidence.inputs is None:
        raise SavedFileError(path="the evidence", reason="it has no inputs: they were too large")
    backend = evidence.facts["backend"]
    executor = executor_for(backend if backend in ("c", "numpy") else "auto", "cpu", "highest")
    inputs = [
        x if isinstance(x, float) else torch.from_numpy(x).to(TO_TORCH[p.value.type.dtype])
        for p, x in zip(evidence.raw.params, evidence.inputs, strict=True)
    ]
    program = Program(schedule(evidence.final), executor)
    program.graph = evidence.final
    found = of_kernels(program, executor, inputs)
    return of_passes(evidence.raw, optimize(evidence.raw), inputs) if found is None else found


def _digest(x: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(x).tobytes(), digest_size=16).hexdigest()
