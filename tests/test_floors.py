"""The house rules: who may import whom, what `import tracejit` loads, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A unit is a module or a package directly under tracejit; it imports from floors below its own.
FLOORS = {
    "tracejit": 5,
    "bisecting": 5,
    "build": 5,
    "captured": 5,
    "closures": 5,
    "commands": 5,
    "compile": 5,
    "counters": 5,
    "drawing": 5,
    "equality": 5,
    "explain": 5,
    "export": 5,
    "fallback": 5,
    "remarks": 5,
    "options": 5,
    "inspection": 5,
    "many_calls": 5,
    "ledger": 5,
    "numpy_front": 5,
    "parts": 5,
    "pipeline": 5,
    "programs": 5,
    "run": 5,
    "static": 5,
    "testing": 5,
    "report": 5,
    "pictures": 5,
    "roofline": 5,
    "rows": 5,
    "scaling": 5,
    "saved": 5,
    "support": 5,
    "verify": 5,
    "__main__": 5,
    "capture": 4,
    "codegen": 4,
    "runtime": 4,
    "aot": 4,
    "autodiff": 3,
    "passes": 3,
    "schedule": 3,
    "ledger_page": 2,
    "interrupts": 2,
    "forks": 1,
    "garbage": 1,
    "progress": 2,
    "weighing": 2,
    "kinds": 2,
    "ir": 2,
    "kernels": 1,
    "gpus": 1,
    "links": 1,
    "records": 0,
    "tables": 1,
    "knobs": 1,
    "errors": 1,
    "quotes": 1,
}
SAME_FLOOR = {
    ("kernels", "gpus"),  # the model of tiles and splits
    ("runtime", "codegen"),  # a Step is built from sources
    ("tracejit", "compile"),  # the entry points
    ("tracejit", "captured"),
    ("captured", "compile"),  # a compiled step is captured as the step that it wraps
    ("errors", "quotes"),
    ("compile", "tracejit"),  # the version
    ("compile", "build"),
    ("compile", "closures"),
    ("compile", "fallback"),
    ("compile", "programs"),
    ("compile", "remarks"),
    ("compile", "options"),
    ("pipeline", "options"),
    ("programs", "options"),
    ("programs", "pipeline"),
    ("compile", "pipeline"),
    ("inspection", "pipeline"),
    ("build", "options"),
    ("remarks", "pipeline"),
    ("compile", "run"),
    ("compile", "parts"),
    ("compile", "inspection"),
    ("inspection", "many_calls"),
    ("many_calls", "run"),
    ("inspection", "explain"),
    ("inspection", "fallback"),
    ("inspection", "ledger"),
    ("inspection", "programs"),
    ("inspection", "remarks"),
    ("inspection", "run"),
    ("inspection", "pictures"),
    ("pictures", "ledger"),
    ("pictures", "parts"),
    ("pictures", "pipeline"),
    ("explain", "ledger"),
    ("explain", "report"),
    ("explain", "roofline"),
    ("explain", "rows"),
    ("explain", "scaling"),
    ("scaling", "ledger"),
    ("programs", "parts"),
    ("run", "parts"),
    ("run", "counters"),
    ("run", "drawing"),
    ("programs", "run"),
    ("__main__", "build"),
    ("__main__", "bisecting"),
    ("bisecting", "compile"),
    ("bisecting", "options"),
    ("bisecting", "testing"),
    ("bisecting", "verify"),
    ("__main__", "commands"),
    ("__main__", "compile"),
    ("commands", "compile"),
    ("commands", "verify"),
    ("__main__", "report"),
    ("__main__", "rows"),
    ("__main__", "support"),
    ("__main__", "testing"),
    ("testing", "compile"),
    ("testing", "equality"),
    ("compile", "verify"),
    ("verify", "equality"),
    ("verify", "run"),
    ("verify", "programs"),
    ("verify", "fallback"),
    ("verify", "options"),
    ("verify", "pipeline"),
    ("verify", "remarks"),
    ("verify", "pictures"),
    ("report", "roofline"),
    ("report", "rows"),
    ("rows", "roofline"),
    ("tracejit", "testing"),
    ("tracejit", "saved"),
    ("tracejit", "static"),
    ("static", "compile"),
    ("inspection", "options"),
    ("numpy_front", "compile"),  # its step is a compiled step
    ("numpy_front", "options"),
    ("numpy_front", "run"),
    ("tracejit", "numpy_front"),
    ("inspection", "saved"),
    ("inspection", "export"),
    ("export", "options"),
    ("export", "parts"),
    ("export", "pipeline"),
    ("tracejit", "export"),
    ("export", "captured"),
    ("export", "saved"),
    ("commands", "export"),
    ("saved", "options"),
    ("saved", "parts"),
    ("saved", "pipeline"),
    ("saved", "run"),
}


# The rooms of capture/: a room imports from rooms below its own.
ROOMS = {
    "capture": 6,  # the modules beside the rooms
    "proof": 5,
    "follow": 5,
    "effects": 4,
    "python": 3,
    "functions": 2,
    "trace": 1,
}


def source_files() -> dict[str, Path]:
    """Every file by its dotted module name; kernels/ is installed as tracejit.kernels."""
    files = {}
    for folder, prefix in (("tracejit", "tracejit"), ("kernels", "tracejit.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            files[name] = path
    return files


FILES = source_files()


def unit(module: str) -> str:
    """What of tracejit a module belongs to; the package's own __init__ is "tracejit"."""
    return (module.split(".") + ["tracejit"])[1] if "." in module else "tracejit"


def imports(module: str, path: Path) -> list[tuple[int, str]]:
    """(line, module of tracejit) for every import in a file, in functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                known = inner in FILES or any(name.startswith(f"{inner}.") for name in FILES)
                found.append((node.lineno, inner if known else base))
    return [(line, name) for line, name in found if name.split(".")[0] == "tracejit"]


def test_every_file_stands_on_a_floor():
    assert {unit(module) for module in FILES} <= FLOORS.keys()


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str):
    here = unit(module)
    wrong = []
    for line, target in imports(module, FILES[module]):
        there = unit(target)
        below = there in FLOORS and FLOORS[there] < FLOORS[here]
        if not below and there != here and (here, there) not in SAME_FLOOR:
            wrong.append(f"{FILES[module].relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, f"floor {FLOORS[here]}: {wrong}"


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of a graph that are more than one node."""
    reached = {}
    for node in graph:
        reached[node], ahead = set(), [node]
        while ahead:
            new = graph[ahead.pop()] - reached[node]
            reached[node] |= new
            ahead += new
    rounds = {frozenset(other for other in reached[n] if n in reached[other]) for n in graph}
    return sorted((set(r) for r in rounds if len(r) > 1), key=sorted)


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a", "e"}}
    assert circles(graph) == [{"a", "b", "c"}, {"d", "e"}]


def test_no_import_circle():
    """Each file's own import lines count, late ones and those for type checkers too."""
    graph = {
        module: {name for _, name in imports(module, path)} & FILES.keys() - {module}
        for module, path in FILES.items()
    }
    wrong = []
    for circle in circles(graph):
        lines = (f"{m} -> {', '.join(sorted(graph[m] & circle))}" for m in sorted(circle))
        wrong.append("\n".join(lines))
    assert not wrong, "import circles:\n" + "\n\n".join(wrong)


def room(module: str) -> str:
    """The room of a module of capture/."""
    _, _, *rest = module.split(".")
    return rest[0] if rest and rest[0] in ROOMS else "capture"


@pytest.mark.parametrize("module", [m for m in FILES if unit(m) == "capture"])
def test_rooms_of_capture_import_downward(module: str):
    here, wrong = room(module), []
    for line, target in imports(module, FILES[module]):
        there = room(target)
        if unit(target) == "capture" and there != here and ROOMS[there] >= ROOMS[here]:
            wrong.append(f"line {line} imports {target}")
    assert not wrong, f"room {here}: {wrong}"


def test_the_package_only_re_exports():
    tree = ast.parse(FILES["tracejit"].read_text())
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    within = [x for node in tree.body if isinstance(node, ast.With) for x in node.body]
    body = [*within, *(node for node in tree.body if not isinstance(node, ast.With))]
    assert all(isinstance(node, allowed) for node in body)
    for node in body:
        if isinstance(node, ast.Assign):
            assert all(isinstance(t, ast.Name) and t.id.startswith("__") for t in node.targets)


def test_importing_tracejit_stays_light():
    heavy = ("torch._dynamo", "torch._inductor", "sympy", "triton")
    code = f"import sys, tracejit; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


TESTS = ROOT / "tests"


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("*.py")), ids=lambda p: str(p.relative_to(TESTS))
)
def test_what_tests_share_is_in_the_support_package(path: Path):
    """No file of tests/ imports a test module or stands beside them as a helper."""
    assert path.parent.name == "support" or path.stem == "conftest" or path.stem.startswith("test_")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(alias.name for alias in node.names)}
    here = {p.stem for p in TESTS.glob("*.py")}
    assert not {name for name in found if name.rpartition(".")[2] in here}


def test_the_tracer_only_intercepts():
    """What a trace records is the Trace's; the mode that hands calls to it stays small."""
    from tracejit.capture.tracer import Tracer

    with Tracer() as tracer:
        assert len(vars(tracer)) < 20


MOST_LINES = 500


@pytest.mark.parametrize("module", FILES)
def test_no_file_is_too_long(module: str):
    assert len(FILES[module].read_text().splitlines()) <= MOST_LINES
