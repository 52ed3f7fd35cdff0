"""Ahead-of-time compilation for GPUs that need not be here, and facts read from the machine code.

In: a jit function with its argument types and constants. Out: `KernelFacts`, what the machine code
says about registers, spills, memory access widths and tensor cores; `check_limits` holds them
against limits. The tools (ptxas, cuobjdump) come with Triton.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import field, replace
from itertools import takewhile
from pathlib import Path

from tracejit.records import dataclass

MAX_SHARED_BYTES = 232448  # what one block may use on sm_90 and sm_100
TARGETS = (80, 90, 100)

Signature = Mapping[str, object]  # argument name -> "*fp32", "i32", or a tuple of these


@dataclass(frozen=True)
class KernelFacts:
    """Static facts of one compiled kernel; loads and stores count instructions, widths are bits."""

    name: str
    target: int
    registers: int
    stack_bytes: int
    spills: int  # instructions on local memory (LDL, STL): spills, and a table in each sin or cos
    shared_bytes: int
    loads: Mapping[int, int]  # global loads by width (LDG, and LDGSTS into shared memory)
    stores: Mapping[int, int]  # global stores by width (STG)
    streamed: Mapping[int, int]  # of these, what precedes the first atomic, tables left out
    wgmma: int  # HGMMA on sm_90, UTC*MMA on sm_100
    mma: int  # HMMA, IMMA, DMMA
    ffma: int
    barriers: int
    atomics: int
    instructions: int
    copies: int = 0  # of these loads, those that copy to shared memory by themselves (LDGSTS, TMA)
    tensor_memory: int = 0  # columns, on sm_100
    compile_seconds: float = field(default=0.0, compare=False)

    @property
    def wide_share(self) -> float:
        """Share of global loads and stores that move 128 bits or more; 1 when there are none."""
        accesses = Counter(self.loads) + Counter(self.stores)
        total = sum(accesses.values())
        return sum(n for width, n in accesses.items() if width >= 128) / total if total else 1.0

    def __str__(self) -> str:
        def widths(counts: Mapping[int, int]) -> str:
            return "+".join(f"{n}x{width}" for width, n in sorted(counts.items())) or "0"

        return (
            f"{self.name} sm_{self.target}: {self.registers} registers, {self.spills} spills, "
            f"{self.stack_bytes} B stack, {self.shared_bytes} B shared, "
            f"loads {widths(self.loads)}, stores {widths(self.stores)} "
            f"({self.wide_share:.0%} wide), {self.wgmma} wgmma, {self.mma} mma, {self.ffma} ffma, "
            f"{self.barriers} barriers, {self.atomics} atomics, {self.instructions} instructions"
        )


class LimitExceeded(AssertionError):
    """A kernel breaks limits; `violations` lists them."""

    def __init__(self, facts: KernelFacts, violations: list[str]):
        self.violations = violations
        super().__init__(f"{'; '.join(violations)} ({facts})")


def compile_for(
    jit_fn,
    signature: Signature,
    constexprs: Mapping[str, object],
    *,
    unaligned: frozenset[str] | set[str] = frozenset(),
    target: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
    enable_fp_fusion: bool = False,
) -> KernelFacts:
    """Compile `jit_fn` for sm_<target> and read the facts off its machine code.

    `signature` gives each runtime argument's type; a tuple argument takes a tuple of types.
    `constexprs` gives the others: numbers, strings, tuples, dtypes, jit functions. Every pointer
    counts as 16-byte aligned except those of the arguments named in `unaligned`.
    """
    keywords = {
        **constexprs,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": enable_fp_fusion,
        "enable_reflect_ftz": False,
    }
    return compile_launch(jit_fn, signature, keywords, unaligned=unaligned, target=target)


def compile_launch(
    jit_fn,
    signature: Signature,
    keywords: Mapping[str, object],
    *,
    unaligned: frozenset[str] | set[str] = frozenset(),
    target: int = 90,
) -> KernelFacts:
    """As `compile_for`, with constants and options together as a launch takes its `keywords`.

    Triton's disk cache is not read, so that `compile_seconds` is what compiling takes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    defaults = inspect.signature(jit_fn.fn).parameters
    constexprs = {
        n: keywords.get(n, defaults[n].default)
        for n in jit_fn.arg_names
        if n in keywords
        or (n not in signature and defaults[n].default is not inspect.Parameter.empty)
    }
    options = {n: value for n, value in keywords.items() if n not in constexprs}
    types = {n: "constexpr" if n in constexprs else signature[n] for n in jit_fn.arg_names}
    attrs = {
        path: [["tt.divisibility", 16]]
        for position, (name, kind) in enumerate(types.items())
        if name not in unaligned
        for path in _pointer_paths((position,), kind)
    }
    source = ASTSource(jit_fn, types, constexprs, attrs)
    started = time.perf_counter()
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    seconds = time.perf_counter() - started
    sass = disassemble(compiled.asm["cubin"])
    facts = parse_sass(sass, jit_fn.__name__, target, compiled.metadata.shared)
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return replace(facts, tensor_memory=tensor_memory, compile_seconds=seconds)


def disassemble(cubin: bytes) -> str:
    """Resource usage and SASS of a cubin, as cuobjdump prints them."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse_sass(sass: str, name: str, target: int, shared_bytes: int) -> KernelFacts:
    """Count what `disassemble` printed."""
    usage = dict(re.findall(r"\b(REG|STACK):(\d+)", sass))
    opcodes = [op.split(".") for op in _INSTRUCTION.findall(sass)]
    opcodes = [op for op in opcodes if op[0] != "NOP"]
    count = Counter(op[0] for op in opcodes)
    loads = Counter(_width(op) for op in opcodes if op[0] in ("LDG", "LDGSTS"))
    stores = Counter(_width(op) for op in opcodes if op[0] == "STG")
    before = takewhile(lambda op: op[0] not in _ATOMICS, opcodes)
    streamed = Counter(_width(op) for op in before if op[0] in _GLOBAL and "CONSTANT" not in op)
    return KernelFacts(
        name=name,
        target=target,
        registers=int(usage["REG"]),
        stack_bytes=int(usage["STACK"]),
        spills=count["LDL"] + count["STL"],
        shared_bytes=shared_bytes,
        loads=dict(sorted(loads.items())),
        stores=dict(sorted(stores.items())),
        streamed=dict(sorted(streamed.items())),
        wgmma=count["HGMMA"] + sum(n for op, n in count.items() if re.fullmatch("UTC.*MMA", op)),
        mma=count["HMMA"] + count["IMMA"] + count["DMMA"],
        ffma=count["FFMA"] + count["FFMA2"],
        barriers=count["BAR"],
        atomics=sum(count[op] for op in _ATOMICS),
        instructions=len(opcodes),
        copies=count["LDGSTS"] + count["UTMALDG"],
    )


def check_limits(
    facts: KernelFacts,
    *,
    want_wide: float | None = None,
    want_wgmma: bool = False,
    max_spills: int = 0,
    max_shared: int = MAX_SHARED_BYTES,
) -> None:
    """Raise `LimitExceeded` if the kernel spills, uses too much shared memory, moves a smaller
    share than `want_wide` of its global accesses in 128 bits, or lacks wanted wgmma."""
    violations = []
    if facts.spills > max_spills:
        violations.append(f"{facts.spills} spill instructions, limit {max_spills}")
    if facts.shared_bytes > max_shared:
        violations.append(f"{facts.shared_bytes} bytes of shared memory, limit {max_shared}")
    if want_wide is not None and facts.wide_share < want_wide:
        violations.append(f"{facts.wide_share:.0%} of accesses are wide, wanted {want_wide:.0%}")
    if want_wgmma and not facts.wgmma:
        violations.append("no wgmma")
    if violations:
        raise LimitExceeded(facts, violations)


_ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")
_GLOBAL = ("LDG", "LDGSTS", "STG")

# "        /*00a0*/              @!P0 LDG.E.128 R4, ..." -> "LDG.E.128"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def _width(opcode: list[str]) -> int:
    """Bits that one thread moves with a load or store; 32 is what SASS leaves unsaid."""
    for part in opcode[1:]:
        if part in ("64", "128"):
            return int(part)
        if part in ("U8", "S8"):
            return 8
        if part in ("U16", "S16"):
            return 16
        if part.endswith("256"):
            return 256
    return 32


def _pointer_paths(path: tuple[int, ...], kind: object) -> list[tuple[int, ...]]:
    """Paths of the pointers within one argument of the given type."""
    if isinstance(kind, tuple):
        return [p for i, part in enumerate(kind) for p in _pointer_paths((*path, i), part)]
    return [path] if isinstance(kind, str) and kind.startswith("*") else []
