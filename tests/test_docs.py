"""docs/passes.md: each pass gives what the document shows. docs/design.md: the files it names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from tracejit.errors import BackendUnavailable
from tracejit.ir.graph import Graph
from tracejit.ir.text import parse
from tracejit.passes import PIPELINE, dce
from tracejit.passes.attention import find_attention
from tracejit.passes.buckets import put_in_buckets
from tracejit.passes.fold import FOLD
from tracejit.passes.rewrite import rewrite, table
from tracejit.passes.roll import roll_up
from tracejit.passes.simplify import IDENTITIES
from tracejit.passes.vocabulary import split_rows
from tracejit.runtime.c_compiler import find_compiler
from tracejit.schedule import schedule
from tracejit.schedule.again import made_again
from tracejit.schedule.cpu.apart import deal_loops
from tracejit.schedule.cpu.attention import cut_attention
from tracejit.schedule.cpu.columns import fuse_columns
from tracejit.schedule.cpu.layout import place
from tracejit.schedule.cpu.loops import choose_loops
from tracejit.schedule.cpu.parts import deal_scattered
from tracejit.schedule.cpu.phases import write_out_phases
from tracejit.schedule.cpu.plan import CpuKernel, CpuLaunch
from tracejit.schedule.cpu.planes import copy_planes
from tracejit.schedule.cpu.rows import cache_rows
from tracejit.schedule.cpu.sorting import deal_sorted
from tracejit.schedule.cpu.taps import write_out_taps
from tracejit.schedule.cpu.text import parse_cpu_kernel
from tracejit.schedule.cpu.tiles import orient, tile
from tracejit.schedule.cpu.unpack import unpack
from tracejit.schedule.donate import Donors
from tracejit.schedule.fuse import Fuser
from tracejit.schedule.groups import Group
from tracejit.schedule.kernel_text import parse_kernel
from tracejit.schedule.memory import Lifetime, plan_arena
from tracejit.schedule.pack import pack
from tracejit.schedule.recompute import recompute
from tracejit.schedule.sizes import parametrize
from tracejit.schedule.tasks import Task, analyse

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tracejit"
PASSES_MD = ROOT / "docs" / "passes.md"
VECTOR_BYTES = 64


def rewritten(rules: dict) -> Callable[[str], Iterator[str]]:
    """The rewriting engine with some of its rules."""

    def run(text: str) -> Iterator[str]:
        yield str(rewrite(parse(text), table(rules)))

    return run


def on_graph(change: Callable[[Graph], Graph]) -> Callable[[str], Iterator[str]]:
    """A pass over a whole graph."""

    def run(text: str) -> Iterator[str]:
        yield str(change(parse(text)))

    return run


def tasks(text: str) -> Iterator[str]:
    """The origin of each value, and a task for each that is its own origin."""
    graph = parse(text)
    analysis = analyse(graph, fuse=True)
    lines = []
    for node in analysis.nodes:
        origin = analysis.origins[node.out.id]
        if analysis.is_task(node.out):
            lines.append(f"{node.out}: {described(analysis.task(0, node))}")
        else:
            lines.append(f"{node.out}: cheap, from {origin.main}, cost {origin.cost}")
    for result in graph.results:
        lines.append(described(analysis.store(0, analysis.resolve(result.value), "t", None)))
    yield "\n".join(lines)


def described(task: Task) -> str:
    """A task in some words: what it computes, and the origins that it reads."""
    read = ", ".join(dict.fromkeys(repr(d.origin) for d in task.demands))
    kind = f"store of {task.value}" if task.kind == "store" else task.kind
    return f"{kind} reads {read}" if read else kind


def groups(text: str) -> str:
    """The groups of a graph in launch order, each with its tasks."""
    graph = parse(text)
    results = [f"t{i}" for i in range(len(graph.results))]
    inputs = {p.value.id: f"in{i}" for i, p in enumerate(graph.params)}
    fusion = Fuser(graph, analyse(graph, fuse=True), fuse=True).run(results, inputs)
    stored = {id for id, (_, buffer) in fusion.realized.items() if not buffer}
    return "\n".join(group_text(group, stored) for group in fusion.groups)


def group_text(group: Group, stored: set[int]) -> str:
    found = []
    for task in sorted(group.tasks, key=lambda t: (t.kind == "store", t.order)):
        kept = " (stored for others)" if task.kind != "store" and task.value.id in stored else ""
        found.append(f"{task.kind} {task.value}{kept}")
    return f"kernel over {group.shape}: {', '.join(found)}"


def fused(text: str) -> Iterator[str]:
    yield groups(text)


def recomputed(text: str) -> Iterator[str]:
    with patch(f"{Fuser.__module__}.{recompute.__name__}", lambda *args: []):
        yield groups(text)
    yield groups(text)


def lowered(text: str) -> Iterator[str]:
    (launch,) = schedule(parse(text)).launches
    yield str(launch.kernel)


def sized(text: str) -> Iterator[str]:
    kernel, sizes = parametrize(parse_kernel(text))
    values = ", ".join(f"{n}={v}" for n, v in zip(kernel.sizes, sizes, strict=True))
    yield f"{kernel}\n{values}"


def plan_head(text: str) -> str:
    """A graph's plan without its kernels' texts and the sizes of launches."""
    lines = str(schedule(parse(text))).partition("\n  kernel ")[0].splitlines()
    return "\n".join(re.sub(r"; n.*\)", ")", line) for line in lines)


def packed(text: str) -> Iterator[str]:
    apart = lambda kernels, before, buffers: [[i] for i in range(len(kernels))]  # noqa: E731
    with patch(f"{schedule.__module__}.{pack.__name__}", apart):
        yield plan_head(text)
    yield plan_head(text)


def donated(text: str) -> Iterator[str]:
    with patch.object(Donors, "take", lambda self, store: None):
        yield plan_head(text)
    yield plan_head(text)


def arena(text: str) -> Iterator[str]:
    found = re.findall(r"(\w+): (\d+) bytes, launches (\d+) to (\d+)", text)
    lifetimes = [Lifetime(*map(int, numbers)) for _, *numbers in found]
    offsets, total = plan_arena(lifetimes)
    places = [f"{name}: at {at}" for (name, *_), at in zip(found, offsets, strict=True)]
    yield "\n".join([*places, f"arena: {total} bytes"])


def unpacked(text: str) -> Iterator[str]:
    plan = schedule(parse(text))
    (launch,) = plan.launches
    yield str(launch.kernel)
    yield "\n".join(f"call({', '.join(x.buffers)})\n{x.kernel}" for x in unpack(plan))


def column_sums(text: str) -> Iterator[str]:
    """Launches as `call(buffers)` and a kernel."""
    parts = re.split(r"call\(([^)]*)\)\n", text)[1:]
    launches = [
        CpuLaunch(CpuKernel(parse_kernel(kernel)), tuple(buffers.split(", ")), ())
        for buffers, kernel in zip(parts[::2], parts[1::2], strict=True)
    ]
    yield "\n".join(f"call({', '.join(x.buffers)})\n{x.kernel}" for x in fuse_columns(launches))


def dealt(text: str) -> Iterator[str]:
    """The launches of loops as `call(buffers) apart bytes` and a kernel."""
    plan = schedule(parse(text))
    launches, parts = deal_loops(plan, unpack(plan))
    inside = [launch for launch in launches if launch.loop is not None]
    heads = [f"call({', '.join(x.buffers)}) apart {', '.join(map(str, x.apart))}" for x in inside]
    calls = [f"{head}\n{x.kernel}" for head, x in zip(heads, inside, strict=True)]
    yield "\n".join([f"parts: {parts}", *calls])


def on_kernel(change: Callable[[CpuKernel], CpuKernel]) -> Callable[[str], Iterator[str]]:
    """A pass over one kernel of the CPU."""

    def run(text: str) -> Iterator[str]:
        yield str(change(parse_cpu_kernel(text)))

    return run


def tiled(text: str) -> Iterator[str]:
    lines = str(tile(parse_cpu_kernel(text), VECTOR_BYTES)).splitlines()
    yield "\n".join(line for line in lines if line.startswith("tiling"))


def attention(text: str) -> Iterator[str]:
    lines = str(cut_attention(parse_cpu_kernel(text), VECTOR_BYTES)).splitlines()
    yield "\n".join(line for line in lines if line.startswith("blocks"))


def placed(text: str) -> Iterator[str]:
    plan = schedule(parse(text))
    yield plan_head(text)
    yield str(place(plan, unpack(plan), ())).partition("\n  kernel ")[0]


# Each takes a section's first text and gives the others in their order.
EXAMPLES: dict[str, Callable[[str], Iterator[str]]] = {
    "roll_up": on_graph(lambda graph: roll_up(graph, few=1, many=1)),
    "fold": rewritten(FOLD),
    "simplify": rewritten(IDENTITIES),
    "cse": rewritten({}),
    "dce": on_graph(dce),
    "find_attention": on_graph(find_attention),
    "split_rows": on_graph(split_rows),
    "put_in_buckets": on_graph(put_in_buckets),
    "made_again": on_graph(made_again),
    "tasks": tasks,
    "fuse": fused,
    "recompute": recomputed,
    "donate": donated,
    "lower": lowered,
    "pack": packed,
    "memory": arena,
    "sizes": sized,
    "unpack": unpacked,
    "fuse_columns": column_sums,
    "deal_loops": dealt,
    "orient": on_kernel(orient),
    "write_out_phases": on_kernel(write_out_phases),
    "copy_planes": on_kernel(copy_planes),
    "write_out_taps": on_kernel(write_out_taps),
    "choose_loops": on_kernel(choose_loops),
    "deal_sorted": on_kernel(deal_sorted),
    "deal_scattered": on_kernel(deal_scattered),
    "cache_rows": on_kernel(cache_rows),
    "tile": tiled,
    "cut_attention": attention,
    "place": placed,
}
SECTION = re.compile(r"^### `(\w+)`[^\n]*\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(?:before|after|graph)\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def sections(text: str) -> dict[str, str]:
    return dict(SECTION.findall(text))


def test_every_pass_is_in_the_document():
    described = sections(PASSES_MD.read_text()).keys()
    assert described == EXAMPLES.keys()
    assert {run.__name__ for run in PIPELINE} <= described
    lowering = (ROOT / "tracejit/schedule/cpu/lower.py").read_text()
    imported = re.findall(r"from tracejit\.schedule\.cpu\.\w+ import (.*)", lowering)
    names = {name for line in imported for name in line.split(", ") if name.islower()}
    assert names <= described


@pytest.mark.parametrize("name", EXAMPLES)
def test_golden_texts_of_passes(name):
    """TRACEJIT_ACCEPT=1 puts what the pass gives in place of the texts after the first one."""
    document = PASSES_MD.read_text()
    section = sections(document)[name]
    first, *shown = BLOCK.findall(section)
    found = [text.rstrip() for text in EXAMPLES[name](first)]
    if os.environ.get("TRACEJIT_ACCEPT") == "1":
        texts = iter([first, *found])
        new = BLOCK.sub(lambda m: m[0].replace(m[1], next(texts)), section)
        PASSES_MD.write_text(document.replace(section, new))
        return
    assert shown == found, f"{PASSES_MD}: `make accept` rewrites it once this is what is wanted"


def test_files_that_the_documents_name_exist():
    """Names like `schedule/fuse.py` and `fuse.py` are of files of the repository."""
    folders = ("tracejit", "kernels", "tests", "benchmarks", "examples")
    files = [str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*.py")]
    for document in (PASSES_MD, ROOT / "docs" / "design.md"):
        for name in re.findall(r"(?<![*\w/])[\w/]+\.py\b", document.read_text()):
            assert any(f"/{file}".endswith(f"/{name}") for file in files), f"{document}: {name}"


CALLS = """
import json, sys, time, warnings
import torch, tracejit

warnings.simplefilter("ignore")
model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

def step(x, y):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss

def impure(x, y):  # stays in rerun
    time.time()
    return step(x, y)

def files(call, watch):
    found = {}
    def see(frame, event, arg):
        found[frame.f_code.co_filename] = None
    watch(see)
    call()
    watch(None)
    return list(found)

x, y = torch.randn(8, 20), torch.randn(8, 5)
replayed, rerun = tracejit.compile(step), tracejit.compile(impure)
found = {"First call": files(lambda: replayed(x, y), sys.settrace)}  # the proof uses the profiler
for _ in range(5):
    replayed(x, y), rerun(x, y)
found["Rerun"] = files(lambda: rerun(x, y), sys.setprofile)
found["Replay"] = files(lambda: replayed(x, y), sys.setprofile)
modes = replayed.explain_mode(), rerun.explain_mode()
assert modes[0].startswith("replay") and modes[1].startswith("rerun"), modes
print(json.dumps(found))
"""
MOST_FILES = {"First call": 40, "Rerun": 15, "Replay": 8}


@pytest.mark.slow
def test_files_that_a_call_passes():
    """design.md follows a call: each file named there runs in it; in a replay no other one does."""
    try:
        find_compiler()
    except BackendUnavailable:
        pytest.skip("the document tells of the C executor")
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    ran = {
        call: {str(Path(f).relative_to(PACKAGE)) for f in files if f.startswith(f"{PACKAGE}/")}
        for call, files in json.loads(done.stdout).items()
    }
    design = (ROOT / "docs" / "design.md").read_text()
    for call, most in MOST_FILES.items():
        text = re.search(rf"^\*\*{call}: .*?(?=^\*\*|^The text|\Z)", design, re.M | re.S)[0]
        named = set(re.findall(r"`([\w/]+\.py)`", text))
        said = int(re.search(r"\((?:the )?(\d+) files", text)[1])
        assert len(named) == said <= most, sorted(named)
        assert named <= ran[call], f"{call} does not pass {sorted(named - ran[call])}"
    assert named == ran["Replay"]
