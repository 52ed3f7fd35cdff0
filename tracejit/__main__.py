"""`python -m tracejit`: what can be asked from a shell, about a step and about tracejit.

python -m tracejit explain examples/two_layer_autograd.py:make_step --html ledger.html
python -m tracejit report examples/two_layer_autograd.py:make_step --target sm_90
python -m tracejit build examples/two_layer_autograd.py:make_step --target sm_80,sm_90,sm_100
python -m tracejit save examples/two_layer_autograd.py:make_step -o two_layer.step
python -m tracejit eject examples/two_layer_autograd.py:make_step -o two_layer_step.py
python -m tracejit onnx examples/two_layer_autograd.py:make_step -o two_layer.onnx
python -m tracejit draw examples/two_layer_autograd.py:make_step -o page.html
python -m tracejit bisect examples/two_layer_autograd.py:make_step -o bisected.py
python -m tracejit replay-evidence step_0123456789ab.evidence
python -m tracejit cache --prune 100M
python -m tracejit ops cumsum
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch

from tracejit import commands as commands_of_files
from tracejit import knobs
from tracejit.bisecting import bisected
from tracejit.build import TargetedStep
from tracejit.compile import CompiledStep
from tracejit.compile import compile as compile_step
from tracejit.errors import TracejitError
from tracejit.gpus import ARCHES, GPUS
from tracejit.report import report
from tracejit.rows import limits
from tracejit.support import markdown, operations

CALLS = 3  # of the step before the report: enough to arm a replay

EXPLAIN = """\
Print the ledger of a step: what it costs, beside what it has to cost, and what holds it back. Where
it runs, launches before and after fusion, bytes against the minimum, operations, the time that it
should take on a GPU, what its kernels take here, what eager should take, the time that compiling
took and after how many calls it is paid for, memory, and each launch with the lines it comes from.
No GPU is needed. The step is called three times; `step.explain()` tells the same of your own calls,
and docs/ledger.md what each figure is.

exit status: 0, or 2 if there is nothing to explain."""

REPORT = """\
Compile every kernel of a step ahead of time and print what it became: registers, spills, shared
memory, CTAs per SM, share of 128-bit accesses, tensor core and FFMA counts, barriers, atomics,
instructions, compile time, the bytes that it has to move and those that it issues, operations, how
often the longest program waits for memory, bytes in flight per SM, waves and how evenly they load
the SMs, the time that it should take on the GPUs of the target, and the lines it comes from. No GPU
is needed. The step is called three times; its last plan is reported.

exit status: 0, or 1 if a kernel breaks a limit (it spills, it uses more shared memory than there
is, or a large contiguous fp32 stream moves less than 90% of its accesses in 128 bits), or 2 if
there is nothing to report."""

BUILD = """\
Compile a step for GPUs that need not be here, and store what a run on such a GPU then loads from
the disk caches: plans and sources under $TRACEJIT_CACHE, machine code under $TRITON_CACHE_DIR,
which has to lie at the same path there, with the same versions of tracejit and Triton. The step's
tensors, on the CPU or on torch's meta device, stand for those on the GPU. Nothing runs on tensors,
and what the calls change is put back.

exit status: 0, or 2 if the step cannot be built."""


DRAW = """\
Draw a step: its graph by modules, lines or kernels, forward, backward and update in three colours,
beside the code that it comes from and the kernels that it became, with what these cost. The end of
the file's name says what is written: .html a page that needs nothing else, .svg and .png the graph
with its groups folded, for a paper. With --tensorboard the graph is written where TensorBoard's
graph tab finds it. The step is called three times; `step.draw(path)` draws your own calls.

exit status: 0, or 2 if there is nothing to draw."""

BISECT = """\
Shrink a step that differs from eager, or that crashes the compiler or the process: call it four
times under verification, write down the torch calls of the call that is wrong, and leave out what
can be left out, and make sizes smaller, while it is wrong in the same way. What is left is printed,
as a program and as a graph, and the program is written to a file (docs/trust.md).

exit status: 0 if nothing differs, 1 if something does, or 2 if the step cannot be called."""


class Refused(Exception):
    """What the user has to correct, in one sentence."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    if "function" in options:
        return print_operations(options.function)
    prog = f"python -m tracejit {options.command}"
    try:
        return options.run(options)
    except (Refused, TracejitError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{prog}: error: the file cannot be written: {error}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
        file, name = options.step
        print(f"{prog}: error: {file}:{name} raised the above", file=sys.stderr)
    return 2


def called(step: CompiledStep) -> CompiledStep:
    """The step, after enough calls to tell what it is."""
    for _ in range(CALLS):
        step()
    return step


def print_report(options: argparse.Namespace) -> int:
    """What a step's kernels are; 1 if one breaks a limit."""
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints
        step = called(load_step(*options.step))
    found = report(step, target=options.target)
    violations = limits(found)
    print(json.dumps(found.as_dict(), indent=2) if options.json else found)
    for violation in violations:
        print(f"limit broken: {violation}", file=sys.stderr)
    return 1 if violations else 0


def print_ledger(options: argparse.Namespace) -> int:
    """What a step costs: a table, JSON, or a page that is written to a file."""
    asked = {"eager_seconds": options.eager_seconds, "machine_code": options.machine_code}
    with contextlib.redirect_stdout(sys.stderr):
        step = called(load_step(*options.step))
        ledger = step.explain(options.gpu, **asked)
    if options.html is not None:
        try:
            ledger.html(options.html)
        except OSError as error:
            raise Refused(f"the page cannot be written: {error}") from None
        print(f"written to {options.html}")
    else:
        print(json.dumps(ledger.as_dict(), indent=2) if options.json else ledger)
    return 0


def draw(options: argparse.Namespace) -> int:
    """A picture of a step, in a file or for TensorBoard."""
    if options.output is None and options.tensorboard is None:
        raise Refused("say where to draw to: -o page.html, or --tensorboard LOGDIR")
    with contextlib.redirect_stdout(sys.stderr):
        step = called(load_step(*options.step))
    try:
        if options.output is not None:
            step.draw(options.output, gpu=options.gpu)
        if options.tensorboard is not None:
            step.to_tensorboard(options.tensorboard)
    except (ImportError, OSError, ValueError) as error:
        raise Refused(f"the picture cannot be drawn: {error}") from None
    for path in filter(None, (options.output, options.tensorboard)):
        print(f"written to {path}")
    return 0


def bisect(options: argparse.Namespace) -> int:
    """Shrink a step that is wrong; 1 if it is."""
    torch.set_num_threads(1)  # threads do not live on in children
    with contextlib.redirect_stdout(sys.stderr):
        found = bisected(load_step(*options.step), options.seconds, options.output)
    if found.wrong is None:
        print(f"nothing differs{f' ({found.note})' if found.note else ''}")
        return 0
    print(f"call {found.wrong.call + 1}: {found.wrong.what}")
    if found.note:
        print(f"note: {found.note}")
    if found.graph:
        print(f"\nthe graph, {found.nodes[1]} of {found.nodes[0]} nodes:\n{found.graph}")
    if found.program:
        options.output.write_text(found.program)
        if found.data:
            torch.save(list(found.data), options.output.with_suffix(".pt"))
        of = f", {found.calls[1]} of {found.calls[0]} torch calls" * bool(found.calls[0])
        print(f"\nthe program{of}, in {options.output}:\n{found.program}", end="")
    return 1


def print_build(options: argparse.Namespace) -> int:
    """What has been built of a step, for each target."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        step = load_step(*options.step)
        given = {name: getattr(step.options, name) for name in ("mode", "fuse", "keep_grads")}
        for number in options.target:
            targeted = compile_step(step.__wrapped__, target=f"sm_{number}", **given)
            print(targeted.build(), file=out, flush=True)
    print(f"plans and sources are in {knobs.cache_dir()}, machine code is in {machine_code()}")
    return 0


def machine_code() -> str:
    """Where Triton keeps it."""
    from triton import knobs

    return knobs.cache.dir


def print_operations(name: str | None) -> int:
    """docs/operations.md, or the operations whose names contain `name`; 1 if there are none."""
    if name is None:
        print(markdown(), end="")
        return 0
    found = [o for o in operations() if name in o.names]
    for o in found:
        kind = "" if o.row is None else "   element-wise"
        kind += ", straight between its kinks" if o.row is not None and o.row.flat else ""
        print(f"{o.names}\n    dtypes: {o.dtypes or '-'}   gradient: {o.gradient or '-'}{kind}")
    if not found:
        print(f"no supported torch function has {name!r} in its name", file=sys.stderr)
    return 0 if found else 1


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tracejit",
        description="Ask about a compiled training step.",
        epilog=examples(""),
        formatter_class=shape,
    )
    parser.add_argument("--version", action="version", version=f"tracejit {version('tracejit')}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)

    def add_command(name: str, run: Callable, help: str, description: str):
        added = commands.add_parser(
            name,
            help=help,
            description=description,
            epilog=examples(name),
            formatter_class=shape,
        )
        added.add_argument(
            "step",
            metavar="FILE:STEP",
            type=file_and_name,
            help="a Python file, and the name in it of a compiled step, of a function without "
            "arguments, or of a factory that returns one of these, alone or first in a tuple",
        )
        added.set_defaults(run=run)
        return added

    costs = "print what a step costs, beside what it has to cost, and what holds it back"
    added = add_command("explain", print_ledger, costs, EXPLAIN)
    added.add_argument(
        "--gpu", choices=GPUS, default="H200", help="whose time is predicted; default H200"
    )
    added.add_argument(
        "--eager-seconds",
        type=float,
        metavar="S",
        help="what a call takes without tracejit, as you have measured it; else it is predicted",
    )
    added.add_argument(
        "--machine-code",
        action="store_true",
        help="compile the launches for the GPU, a second each, and predict by that",
    )
    form = added.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, not text")
    form.add_argument("--html", type=Path, metavar="PAGE", help="write a page that stands alone")
    shown = "draw the graph of a step: a page, a picture for a paper, or for TensorBoard"
    added = add_command("draw", draw, shown, DRAW)
    ends = "the file to write: .html, .svg or .png"
    added.add_argument("-o", "--output", type=Path, metavar="PAGE", help=ends)
    added.add_argument("--tensorboard", type=Path, metavar="LOGDIR", help="a folder of its logs")
    added.add_argument(
        "--gpu", choices=GPUS, default="H200", help="whose time is predicted; default H200"
    )
    shrunk = "shrink a step that differs from eager, or crashes, to a small program and graph"
    added = add_command("bisect", bisect, shrunk, BISECT)
    added.add_argument(
        *("-o", "--output"),
        **{"type": Path, "default": Path("bisected.py"), "metavar": "PROGRAM"},
        help="the program's file; default bisected.py",
    )
    added.add_argument(
        "--seconds", type=float, default=120.0, metavar="S", help="for so long; default 120"
    )
    known = f"{', '.join(f'sm_{t}' for t in ARCHES)}; default sm_90"
    judge = "judge every kernel of a step by its machine code, without a GPU"
    added = add_command("report", print_report, judge, REPORT)
    added.add_argument("--target", help=known, type=target, default=90, metavar="SM")
    added.add_argument("--json", action="store_true", help="print JSON, not a table")
    ahead = "compile a step for GPUs that need not be here, into the disk caches"
    added = add_command("build", print_build, ahead, BUILD)
    added.add_argument("--target", help=known, type=targets, default=[90], metavar="SM,…")
    commands_of_files.add_to(
        add_command, commands, examples, lambda options: called(load_step(*options.step))
    )
    listed = "list the torch functions that a step may call, and what is refused"
    ops_parser = commands.add_parser(
        "ops", help=listed, epilog=examples("ops"), formatter_class=shape
    )
    ops_parser.add_argument("function", nargs="?", help="only those with this in their names")
    return parser


def examples(command: str) -> str:
    """How a command is called, or all of them, from the head of this file."""
    begin = f"python -m tracejit {command}"
    found = [line for line in (__doc__ or "").splitlines() if line.startswith(begin)]
    return "\n  ".join([f"example{'s' * (len(found) > 1)}:", *found])


def file_and_name(text: str) -> tuple[Path, str]:
    """`FILE:STEP` taken apart."""
    file, _, name = text.rpartition(":")
    if not file or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form FILE:STEP")
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {file}")
    return Path(file), name


def target(text: str) -> int:
    """`sm_90` as 90."""
    number = text.removeprefix("sm_")
    if not number.isdigit() or int(number) not in ARCHES:
        known = ", ".join(f"sm_{t}" for t in ARCHES)
        raise argparse.ArgumentTypeError(f"{text} is not one of {known}")
    return int(number)


def targets(text: str) -> list[int]:
    """`sm_80,sm_90` as [80, 90]."""
    return list(dict.fromkeys(target(part) for part in text.split(",")))


def load_step(file: Path, name: str) -> CompiledStep:
    """The compiled step that FILE:STEP stands for; a factory is called."""
    module = import_file(file)
    found = getattr(module, name, None)
    if found is None:
        own = (n for n, v in vars(module).items() if callable(v) and _is_from(v, module))
        raise Refused(f"{file} has no {name}; it defines {', '.join(own) or 'no functions'}")
    if not callable(found):
        raise Refused(f"{name} in {file} is no function but of type {type(found).__name__}")
    if isinstance(found, CompiledStep):
        return found
    if isinstance(found, TargetedStep):
        return compile_step(found.__wrapped__)
    missing = [
        p.name
        for p in inspect.signature(found).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if missing:
        raise Refused(
            f"{name} takes arguments ({', '.join(missing)}); write a function without any, "
            "such as make_step, that makes them and returns a step to be called without arguments"
        )
    made = found()
    made = made[0] if isinstance(made, tuple) and made else made
    step = made if callable(made) else found  # a step returns tensors, a factory a function
    step = step.__wrapped__ if isinstance(step, TargetedStep) else step
    return step if isinstance(step, CompiledStep) else compile_step(step)


def import_file(file: Path) -> ModuleType:
    """Run a file as a module that finds its neighbours, as a script does."""
    spec = importlib.util.spec_from_file_location(f"reported_{file.stem}", file)
    if spec is None:
        raise Refused(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _is_from(value: Callable, module: ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__


if __name__ == "__main__":
    raise SystemExit(main())
