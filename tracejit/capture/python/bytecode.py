"""The outside names that a function's bytecode reads, and what in it forbids a replay.

`scan` looks at one function and the code nested in it; what the names hold, and the functions among
them, are followed by `heap.py`. Chains of modules are followed here, as far as the code spells them
out: `torch.nn.functional.relu` is a read of that function.
"""

from __future__ import annotations

import builtins
import dis
import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import field
from itertools import chain
from types import CellType, CodeType, FunctionType, ModuleType

import numpy as np
import torch

from tracejit.capture.python.doubts import Doubt, doubts
from tracejit.records import dataclass

VALUE_TYPES = (int, float, bool, str, bytes, type(None), type(Ellipsis), range, slice)
VALUE_TYPES += (np.bool_, np.float16, np.float32, np.float64, np.uint8, np.int32, np.int64)
TORCH_VALUE_TYPES = (torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout)
TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_CODES = 10_000  # whose names are remembered


@dataclass(frozen=True)
class Read:
    """One outside name: `key` of a namespace (a dict of globals, or a module), and its value."""

    path: str  # as a person would name it: "lr", "torch.nn.functional.relu"
    holder: object  # the dict of globals, or the module
    key: str
    value: object
    builtin: bool = False  # found in builtins, because `holder` has no such name
    missing: bool = False  # nowhere: reading it is an error, which the code may catch


@dataclass
class Scanned:
    """What the code of one function reads and does."""

    reads: list[Read] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)  # whether or not they run
    doubts: list[Doubt] = field(default_factory=list)  # if they run


def is_value(x: object) -> bool:
    """Whether x is a plain value that can be guarded by type and equality."""
    if type(x) is tuple:
        return all(map(is_value, x))
    return type(x) in VALUE_TYPES or type(x) in TORCH_VALUE_TYPES


def is_tensor(x: object) -> bool:
    """Whether x is a tensor of a kind that capture accepts."""
    return type(x) in TENSOR_TYPES


def codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and all that are nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def contents(cell: CellType) -> object:
    """What a closure's variable holds; None while it holds nothing."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


_BY_NAME = frozenset({"getattr", "hasattr", "setattr", "delattr"})
_DYNAMIC = frozenset(
    {
        *("vars", "__dict__", "attrgetter", "methodcaller", "__reduce_ex__"),
        *("__getattribute__", "__setattr__", "__delattr__"),
    }
)
_ASKING = frozenset({"getattr", "hasattr", "AttributeError", "Exception", "suppress"})


@functools.cache
def dynamic(code: CodeType) -> bool:
    """Whether code may reach attributes by names that it does not spell out."""
    constants = {c for c in code.co_consts if type(c) is str}
    if not _DYNAMIC.isdisjoint({*code.co_names, *constants}):
        return True
    instructions = list(dis.get_instructions(code))
    return any(
        (x.opname == "MATCH_CLASS" and x.arg)  # by position: __match_args__ names them
        or (x.opname.startswith("LOAD_") and x.argval in _BY_NAME and not _named(instructions, i))
        for i, x in enumerate(instructions)
    )


def _named(instructions: list[dis.Instruction], i: int) -> bool:
    """Whether the function loaded at i is called with a constant as its second argument."""
    depth, constant = 0, False
    for x in instructions[i + 1 :]:
        if constant and x.opname in ("PRECALL", "CALL") and depth == x.arg:
            return True
        depth += dis.stack_effect(x.opcode, x.arg, jump=False)
        if constant and depth < 3:
            return False  # the constant is a part of something
        if depth == 2:
            constant = x.opname == "LOAD_CONST"
            if not constant:
                return False
    return False


def asks(code: CodeType) -> bool:
    """Whether code may notice that an object has no attribute of some name."""
    return not _ASKING.isdisjoint(code.co_names)


@functools.cache
def compares(code: CodeType) -> bool:
    """Whether code compares objects, which for a SimpleNamespace reads all of it."""
    return any(x.opname in ("COMPARE_OP", "CONTAINS_OP") for x in dis.get_instructions(code))


_STORES = ("STORE_ATTR", "STORE_GLOBAL", "STORE_NAME", "STORE_DEREF", "STORE_FAST")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


def line_of(path: str, among: Iterable[CodeType], *, stored: bool = False) -> str:
    """Where code names the last part of a path, or stores there: "file:line: "; empty if it does
    not."""
    names = _IDENTIFIER.findall(path)
    if not names:
        return ""
    found = ""
    for code in among:
        instructions = [*dis.get_instructions(code)]
        for i, x in enumerate(instructions):
            if type(x.argval) is not str or x.argval != names[-1]:
                continue
            line = x.positions.lineno if x.positions is not None else None
            after = instructions[i + 1].opname if i + 1 < len(instructions) else ""
            if not stored or x.opname in _STORES or after == "STORE_SUBSCR":
                return f"{_at(code, line)}: "
            found = found or f"{_at(code, line)}: "
    return found


def scan(function: FunctionType) -> Scanned:
    """Read the bytecode of a user function."""
    found = Scanned()
    for code in codes(function.__code__):
        _scan(found, function, code)
    return found


def _at(code: CodeType, line: int | None) -> str:
    return f"{os.path.basename(code.co_filename)}:{line or code.co_firstlineno}"


_MISSING = object()


def _scan(found: Scanned, function: FunctionType, code: CodeType) -> None:
    instructions = list(dis.get_instructions(code))
    namespace = function.__globals__
    line: int | None = None
    for i, instruction in enumerate(instructions):
        if instruction.starts_line:
            position = instruction.positions
            line = position.lineno if position is not None else code.co_firstlineno
        name, opcode = instruction.argval, instruction.opname
        if opcode in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = namespace.get(name, _MISSING)
            if value is not _MISSING:
                _chain(found, instructions, i, namespace, name, value, _at(code, line))
            elif hasattr(builtins, name):
                value = getattr(builtins, name)
                found.reads.append(Read(name, namespace, name, value, builtin=True))
            else:
                found.reads.append(Read(name, namespace, name, None, missing=True))
        elif opcode in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            if name not in namespace:
                found.refusals.append(f"{_at(code, line)}: it makes the global name {name!r}")
            else:
                found.reads.append(Read(name, namespace, name, namespace[name]))
        elif opcode == "IMPORT_NAME":
            why = _import(found, function, instructions, i, _at(code, line))
            if why:
                found.doubts.append(Doubt(code, instruction.starts_line or line, why))
    found.doubts += doubts(code)


def _import(
    found: Scanned, function: FunctionType, instructions: list[dis.Instruction], i: int, at: str
) -> str:
    """Record what an import statement gives: a module that is there already, whose attributes are
    followed where the code spells them out. Returns why that cannot be said, if it cannot."""
    name, level, names = (
        instructions[i].argval,
        instructions[i - 2].argval,
        instructions[i - 1].argval,
    )
    why = f"it imports {name}"
    if level:
        package = function.__globals__.get("__package__") or ""
        parts = package.split(".")[: len(package.split(".")) - level + 1]
        name = ".".join([*parts, *([name] if name else [])])
    module = sys.modules.get(name)
    if type(module) is not ModuleType:
        return why
    root = name.partition(".")[0]
    reads = [Read(name, sys.modules, name, module)]
    if names is None and root != name:
        module = sys.modules[root]
        reads.append(Read(root, sys.modules, root, module))
        name = root
    local: list[tuple[str, Read]] = []  # what a variable of the code holds from now on
    here, k = Read(name, sys.modules, name, module), i + 1
    for k in range(i + 1, len(instructions)):
        x = instructions[k]
        if x.opname == "IMPORT_FROM":
            value = getattr(module, x.argval, None)
            if value is None:
                return why
            here = Read(f"{name}.{x.argval}", module, x.argval, value)
            reads.append(here)
            if names is None:
                name, module = here.path, value
        elif x.opname == "STORE_FAST":
            local.append((x.argval, here))
        elif x.opname not in ("SWAP", "POP_TOP", "EXTENDED_ARG"):
            break
        if x.opname == "STORE_FAST" and names is None:
            break
    if not local or len(local) != len(names or (root,)):
        return why  # into a variable of a closure, or of the module; or all names
    found.reads += reads
    for variable, read in local:
        if isinstance(read.value, ModuleType):
            for j, x in enumerate(instructions):
                if x.opname == "LOAD_FAST" and x.argval == variable:
                    _chain(found, instructions, j, read.holder, read.key, read.value, at, read.path)
    return ""


def _chain(
    found: Scanned,
    instructions: list[dis.Instruction],
    i: int,
    holder: object,
    key: str,
    value: object,
    at: str,
    path: str = "",
) -> None:
    """Record the name that instruction i loads, and its attributes as long as it is a module."""
    path = path or key
    found.reads.append(Read(path, holder, key, value))
    while isinstance(value, ModuleType):
        i += 1
        opcode = instructions[i].opname if i < len(instructions) else ""
        if opcode not in ("LOAD_ATTR", "LOAD_METHOD"):
            what = "stores into" if opcode in ("STORE_ATTR", "DELETE_ATTR") else "uses"
            found.refusals.append(f"{at}: it {what} the module {path} as a value")
            return
        key = instructions[i].argval
        path = f"{path}.{key}"
        if key == "__dict__":
            found.refusals.append(f"{at}: it reads {path}")
            return
        if not hasattr(value, key):
            found.reads.append(Read(path, value, key, None, missing=True))
            return
        holder, value = value, getattr(value, key)
        found.reads.append(Read(path, holder, key, value))


@dataclass(frozen=True, slots=True)
class Names:
    """What the code of a function, and what is nested in it, names."""

    code: CodeType
    globals: tuple[str, ...]
    stores_globals: bool
    stored: frozenset[str]  # globals and cells
    asks_for_float: bool  # it may ask whether something's class is float itself


_names: dict[int, Names] = {}  # by identity: a code's hash takes long


def names_in(code: CodeType) -> Names:
    """The names that a code object and what is nested in it read and store."""
    found = _names.get(id(code))
    if found is None:
        if len(_names) >= _CODES:
            _names.clear()
        instructions = [*chain.from_iterable(map(dis.get_instructions, codes(code)))]

        def names(*opcodes: str) -> frozenset[str]:
            return frozenset(i.argval for i in instructions if i.opname in opcodes)

        stores = names("STORE_GLOBAL", "DELETE_GLOBAL")
        used = {name for c in codes(code) for name in c.co_names}
        found = _names[id(code)] = Names(
            code,
            tuple(sorted(names("LOAD_GLOBAL", "LOAD_NAME"))),
            bool(stores),
            stores | names("STORE_DEREF", "DELETE_DEREF"),
            "float" in used and not used.isdisjoint({"type", "__class__"}),
        )
    return found
