"""Commands of `python -m tracejit` that write a step to a file, and the one about the disk cache.

`add_to(…)` puts them on the command line, which `__main__.py` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tracejit.compile import CompiledStep
from tracejit.errors import SavedFileError
from tracejit.export.onnx.api import to_onnx
from tracejit.export.onnx.writer import OPSET
from tracejit.runtime.cache import DiskCache
from tracejit.verify.blame import Blame
from tracejit.verify.evidence import again, read

SAVE = """\
Save a step: its plans, parameters and optimizer state in one file, from which tracejit.load runs it
without its code (docs/saving.md). The step is called three times before, so that it is replayed:
what is saved is the state after these calls.

exit status: 0, or 2 if the step cannot be saved."""

EJECT = """\
Write a step as one Python file that needs torch, and a C compiler or Triton, but no tracejit: its
kernels, the order of their launches, and what a call checks and changes (docs/ejecting.md). The
step is called three times before.

exit status: 0, or 2 if the step cannot be ejected."""

ONNX = """\
Write a step as an ONNX model: forward, backward and optimizer, with weights and state as inputs
that have their values as defaults, and as outputs. The step is called three times before, so that
optimizers have their state. tracejit/export/onnx/run.py, which needs onnxruntime and numpy alone,
runs the model and feeds the state back (docs/export.md).

exit status: 0, or 2 if the step cannot be exported."""

EVIDENCE = """\
Run again what a verified call has found wrong (docs/trust.md): the passes, the schedule and the
kernels of the graph in a file of evidence, on the inputs in it, with this version of tracejit.

exit status: 0 if nothing differs any more, 1 if something does, or 2 if the file cannot be read."""

CACHE = """\
Say what is in tracejit's disk cache, $TRACEJIT_CACHE: how many entries of each kind, and how large
they are. --prune removes the least recently used entries beyond a size, and what crashes left
behind; a plan or kernel that is missing is made again when a step needs it. Triton's own cache of
machine code is not touched."""

KINDS = {
    "plan": "scheduled plans",
    "cpu": "plans lowered for the CPU",
    "kernel": "digests of C kernels",
    "c": "compiled C",
    "triton": "generated Triton",
}
_UNITS = {"k": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_to(
    add_step_command: Callable[..., argparse.ArgumentParser],
    commands: argparse._SubParsersAction,
    examples: Callable[[str], str],
    called: Callable[[argparse.Namespace], CompiledStep],
) -> None:
    """Put the commands on the command line. `called` gives the step that options name, after its
    first calls."""

    def add(name: str, help: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help,
            description=text,
            epilog=examples(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def write(method: str) -> Callable[[argparse.Namespace], int]:
        def run(options: argparse.Namespace) -> int:
            more = {"objects": True} if getattr(options, "objects", False) else {}
            with contextlib.redirect_stdout(sys.stderr):
                getattr(called(options), method)(options.output, **more)
            print(f"written to {options.output}: {options.output.stat().st_size} bytes")
            return 0

        return run

    def write_onnx(options: argparse.Namespace) -> int:
        with contextlib.redirect_stdout(sys.stderr):
            graph = to_onnx(called(options), options.output).graph
        print(f"written to {options.output}: {len(graph.node)} nodes of opset {OPSET}")
        for kind, named in (("inputs", graph.input), ("outputs", graph.output)):
            print(f"{kind}: {', '.join(x.name for x in named) or 'none'}")
        return 0

    for name, run, help, text, default in (
        (
            *("save", write("save"), "put a step into a file that runs without its code"),
            *(SAVE, "saved.step"),
        ),
        (
            *("eject", write("eject"), "write a step as one file of Python that runs alone"),
            *(EJECT, "ejected.py"),
        ),
        ("onnx", write_onnx, "write a step as an ONNX model", ONNX, "step.onnx"),
    ):
        added = add_step_command(name, run, help, text)
        added.add_argument(
            *("-o", "--output"),
            **{"type": Path, "default": Path(default), "metavar": "PATH"},
            help=f"the file; default {default}",
        )
        if name == "save":
            text = "put compiled kernels into the file too, signed for this user (docs/saving.md)"
            added.add_argument("--objects", action="store_true", help=text)
    evidence = add("replay-evidence", "run again what a verified call has found wrong", EVIDENCE)
    evidence.add_argument("file", type=Path, metavar="FILE")
    evidence.set_defaults(run=replay_evidence)
    cache = add("cache", "list the disk cache, or prune it", CACHE)
    cache.add_argument(
        "--prune",
        type=size,
        metavar="SIZE",
        help="keep at most so many bytes, such as 0, 500k, 100M or 1G",
    )
    cache.set_defaults(run=print_cache)


def replay_evidence(options: argparse.Namespace) -> int:
    """What a file of evidence says, and what is wrong now."""
    try:
        found = read(options.file)
    except (OSError, zipfile.BadZipFile) as error:
        raise SavedFileError(path=options.file, reason=error) from None
    facts = found.facts
    print(f"{facts['step']}: a {facts['how']} differed from eager in {facts['differences']}")
    print(f"then: {Blame(**facts['blame'])}" if facts["blame"] else "then: nothing was blamed")
    blame = again(found)
    print(f"now:  {blame or 'passes, schedule and kernels are right for these inputs'}")
    return 0 if blame is None else 1


def size(text: str) -> int:
    """A number of bytes, as people write it."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "")
    if not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 0, 500k, 100M or 1G")
    return int(number) * _UNITS.get(unit, 1)


def print_cache(options: argparse.Namespace) -> int:
    """What there is in the cache, after it was pruned."""
    cache = DiskCache()
    removed = None
    if options.prune is not None:
        before = sum(found.nbytes for found in cache.entries())
        DiskCache(max_bytes=options.prune).sweep()
        removed = before - sum(found.nbytes for found in cache.entries())
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for entry in cache.entries():
        counts[entry.kind] += 1
        sizes[entry.kind] += entry.nbytes
    print(f"{cache.root}")
    for kind in sorted(counts):
        said = KINDS.get(kind, kind)
        print(f"  {said:26s} {counts[kind]:6d} entries  {sizes[kind] / (1 << 20):9.2f} MiB")
    total = f"{sum(counts.values())} entries, {sum(sizes.values()) / (1 << 20):.2f} MiB"
    print(f"{total}, of {cache.max_bytes / (1 << 20):.0f} MiB at most")
    if removed is not None:
        print(f"removed {removed / (1 << 20):.2f} MiB")
    return 0
