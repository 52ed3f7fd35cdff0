"""What a step reads from Python, found in its bytecode: the proof that lets a replay be armed.

`analyze` walks the code of a function and of every user function that it names. Each global, cell
and default that the code can read is classified:

value    a number, string, bool, None, dtype, device, or a tuple of such: guarded by value
tensor   guarded by its metadata and fetched anew on every replay
callable torch functions with a capture rule, pure builtins, user functions, custom autograd
         functions: guarded by identity

Everything else (containers, objects, unknown callables, imports, attribute stores, generators) is a
refusal: the step then reruns its Python on every call, which is sound without any proof.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType

import torch
from torch.autograd.function import Function, FunctionMeta

from tracejit.capture.table import RULES

PURE_BUILTINS = frozenset(
    getattr(builtins, name)
    for name in (
        *("range", "len", "zip", "enumerate", "abs", "min", "max", "sum", "tuple", "list"),
        *("dict", "set", "frozenset", "float", "int", "bool", "isinstance", "issubclass"),
        *("reversed", "sorted", "any", "all", "round", "slice", "map", "filter", "pow", "divmod"),
        *("iter", "next", "type", "str", "callable", "NotImplementedError", "ValueError"),
        *("TypeError", "RuntimeError", "AssertionError", "IndexError", "KeyError", "Exception"),
    )
)
PURE_TORCH = frozenset(
    {
        *(torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.is_tensor),
        *(torch.is_grad_enabled, torch.get_default_dtype, torch.Tensor, torch.nn.Parameter),
        *(torch.Size, torch.device, torch.dtype),
    }
)
DEFAULTS = {True: "__defaults__", False: "__kwdefaults__"}  # by whether the default is positional
VALUE_TYPES = (int, float, bool, str, bytes, type(None), type(Ellipsis))
TORCH_VALUE_TYPES = (torch.dtype, torch.device, torch.Size, torch.memory_format)
TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
TENSOR_STORES = frozenset({"grad", "data", "requires_grad"})
_UNSAFE_ATTRIBUTES = frozenset(
    {"__dict__", "__globals__", "__code__", "__closure__", "__class__", "__defaults__"}
)


@dataclass(frozen=True)
class Read:
    """One outside name that the code reads: where it lives, and what kind of thing it holds."""

    kind: str  # "value", "tensor" or "callable"
    path: str  # as a person would name it: "lr", "torch.nn.functional.relu", "closure w1"
    holder: object  # a cell, a namespace dict, a module, or the function whose default it is
    key: object  # None for a cell, else the name (for a positional default: its index)
    value: object
    shadow: dict | None = None  # the globals that a builtin of this name would be shadowed in

    def fetch(self) -> object:
        """What the name holds now."""
        if isinstance(self.holder, CellType):
            return self.holder.cell_contents
        if isinstance(self.holder, (ModuleType, type)):
            return getattr(self.holder, self.key)
        if isinstance(self.holder, FunctionType):
            positional = isinstance(self.key, int)
            return getattr(self.holder, DEFAULTS[positional])[self.key]
        return self.holder[self.key]


@dataclass
class Reads:
    """All that a step can read and store outside itself, and why it cannot be replayed, if so."""

    reads: list[Read] = field(default_factory=list)
    stores: list[Read] = field(default_factory=list)  # outside names that the code rebinds
    refusals: list[str] = field(default_factory=list)
    contexts: set[CodeType] = field(default_factory=set)  # whose first argument is a ctx


def is_value(x: object) -> bool:
    """Whether x is a plain value that can be guarded by type and equality."""
    if type(x) is tuple:
        return all(map(is_value, x))
    return type(x) in VALUE_TYPES or type(x) in TORCH_VALUE_TYPES


def is_tensor(x: object) -> bool:
    """Whether x is a tensor of a kind that capture accepts."""
    return type(x) in TENSOR_TYPES


def analyze(function: FunctionType) -> Reads:
    """Everything that calling `function` can read from outside its arguments."""
    found = Reads()
    seen: set[FunctionType] = set()
    known: set[tuple[int, object]] = set()
    queue = [function]
    while queue:
        current = queue.pop()
        if current in seen:
            continue
        seen.add(current)
        for i, default in enumerate(current.__defaults__ or ()):
            _classify(found, known, queue, _default_path(current, i), current, i, default)
        for name, default in (current.__kwdefaults__ or {}).items():
            _classify(found, known, queue, name, current, name, default)
        cells = dict(zip(current.__code__.co_freevars, current.__closure__ or (), strict=True))
        for code in _codes(current.__code__):
            _scan(found, known, queue, current, code, cells)
    return found


def _default_path(function: FunctionType, i: int) -> str:
    code = function.__code__
    first = code.co_argcount - len(function.__defaults__ or ())
    return f"the default of {code.co_varnames[first + i]}"


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and all that are nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _at(code: CodeType, line: int | None) -> str:
    return f"{os.path.basename(code.co_filename)}:{line or code.co_firstlineno}"


_MISSING = object()


def _scan(
    found: Reads,
    known: set,
    queue: list[FunctionType],
    function: FunctionType,
    code: CodeType,
    cells: dict[str, CellType],
) -> None:
    if code.co_flags & 0x2A0 and code is function.__code__:
        found.refusals.append(f"{_at(code, None)}: it is a generator or coroutine")
        return
    instructions = list(dis.get_instructions(code))
    line: int | None = None
    for i, instruction in enumerate(instructions):
        if instruction.starts_line:
            position = instruction.positions
            line = position.lineno if position is not None else code.co_firstlineno
        name, opcode = instruction.argval, instruction.opname
        if opcode in ("LOAD_GLOBAL", "LOAD_NAME"):
            holder: object = function.__globals__
            value = function.__globals__.get(name, _MISSING)
            if value is _MISSING:
                holder = builtins
                value = getattr(builtins, name, _MISSING)
            if value is _MISSING:
                continue  # a NameError, or a name that the step itself defines first
            if holder is builtins and value in PURE_BUILTINS:
                builtin = Read("callable", name, builtins, name, value, function.__globals__)
                _add(found, known, builtin)
                continue
            _follow(found, known, queue, instructions, i, holder, name, value, _at(code, line))
        elif opcode in ("LOAD_DEREF", "LOAD_CLASSDEREF") and name in cells:
            try:
                value = cells[name].cell_contents
            except ValueError:
                continue
            _follow(found, known, queue, instructions, i, cells[name], name, value, _at(code, line))
        elif opcode in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            value = function.__globals__.get(name)
            found.stores.append(Read("store", name, function.__globals__, name, value))
        elif opcode in ("STORE_DEREF", "DELETE_DEREF") and name in cells:
            found.stores.append(Read("store", name, cells[name], None, cells[name].cell_contents))
        elif opcode in ("IMPORT_NAME", "IMPORT_FROM", "IMPORT_STAR"):
            found.refusals.append(f"{_at(code, line)}: it imports {name}")
        elif opcode == "STORE_ATTR" and code in found.contexts and _on_first(code, instructions, i):
            continue  # ctx.x = …: the context is dropped with the trace
        elif opcode in ("STORE_ATTR", "DELETE_ATTR") and name not in TENSOR_STORES:
            found.refusals.append(f"{_at(code, line)}: it sets the attribute {name!r}")
        elif opcode == "LOAD_CONST" and isinstance(name, complex):
            found.refusals.append(f"{_at(code, line)}: it computes with complex numbers")
        elif opcode == "BINARY_OP" and instruction.argrepr in ("%", "%="):
            if any(isinstance(c, str) and "%" in c for c in code.co_consts):
                # C code formats a runtime scalar without asking it
                found.refusals.append(f"{_at(code, line)}: it may format a string with %")
        elif opcode == "LOAD_BUILD_CLASS":
            found.refusals.append(f"{_at(code, line)}: it defines a class")
        elif opcode in ("LOAD_ATTR", "LOAD_METHOD") and name in _UNSAFE_ATTRIBUTES:
            found.refusals.append(f"{_at(code, line)}: it reads {name}")


def _follow(found, known, queue, instructions, i, holder, name, value, at) -> None:
    """Classify a loaded name, following attributes of modules: `torch.nn.functional.relu`."""
    path, key = str(name), None if isinstance(holder, CellType) else name
    i += 1
    while isinstance(value, ModuleType):
        if not isinstance(holder, ModuleType):
            _add(found, known, Read("callable", path, holder, key, value))
        if i >= len(instructions) or instructions[i].opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            found.refusals.append(f"{at}: it uses the module {path} as a value")
            return
        attribute = instructions[i].argval
        path = f"{path}.{attribute}"
        if not hasattr(value, attribute):
            return  # an AttributeError when it runs
        holder, key, value = value, attribute, getattr(value, attribute)
        i += 1
    if isinstance(value, FunctionMeta) and _attribute(instructions, i) == "apply":
        _add(found, known, Read("callable", path, holder, key, value))
        _custom_function(found, known, queue, path, value, at)
        return
    _classify(found, known, queue, path, holder, key, value, at)


def _attribute(instructions: list[dis.Instruction], i: int) -> str | None:
    """The attribute that instruction i loads from what was loaded before, if it does."""
    if i < len(instructions) and instructions[i].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        return instructions[i].argval
    return None


def _custom_function(found, known, queue, path: str, cls: FunctionMeta, at: str) -> None:
    """Classify what a call of a custom autograd function runs: the user's static methods."""
    if cls.apply.__func__ is not Function.apply.__func__:
        found.refusals.append(f"{at}: {path} has an apply of its own")
    boxed = "boxed_grads_call"
    _classify(found, known, queue, f"{path}.{boxed}", cls, boxed, getattr(cls, boxed, False))
    for name in ("forward", "setup_context", "backward", "vjp"):
        method = inspect.getattr_static(cls, name)
        function = getattr(cls, name)
        if function is getattr(Function, name):
            _add(found, known, Read("callable", f"{path}.{name}", cls, name, function))
            continue
        plain = isinstance(method, (staticmethod, FunctionType))
        if not plain or not isinstance(function, FunctionType):
            found.refusals.append(f"{at}: {path}.{name} is no plain static method")
            continue
        context = function.__code__.co_argcount and (
            name != "forward" or cls.setup_context is Function.setup_context
        )
        if context:
            found.contexts.add(function.__code__)
        _classify(found, known, queue, f"{path}.{name}", cls, name, function, at)


def _on_first(code: CodeType, instructions: list[dis.Instruction], i: int) -> bool:
    """Whether the attribute that instruction i stores is one of the first argument."""
    loaded = instructions[i - 1]
    return loaded.opname == "LOAD_FAST" and loaded.argval == code.co_varnames[0]


def _add(found: Reads, known: set, read: Read) -> None:
    identity = (id(read.holder), read.key, id(read.shadow))
    if identity not in known:
        known.add(identity)
        found.reads.append(read)


def _classify(found, known, queue, path, holder, key, value, at="") -> None:
    prefix = f"{at}: " if at else ""
    if isinstance(value, str) and "%" in value:
        found.refusals.append(f"{prefix}it reads {path}, a string that % may format")
    elif is_value(value):
        _add(found, known, Read("value", path, holder, key, value))
    elif is_tensor(value):
        _add(found, known, Read("tensor", path, holder, key, value))
    elif _is_pure_callable(value):
        _add(found, known, Read("callable", path, holder, key, value))
    elif isinstance(value, FunctionType) and not _is_library(value):
        _add(found, known, Read("callable", path, holder, key, value))
        queue.append(value)
    elif _is_apply(value):
        _add(found, known, Read("callable", path, holder, key, value))
        _custom_function(found, known, queue, path, value.__self__, at)
    else:
        what = "calls" if callable(value) else "reads"
        kind = type(value).__name__
        if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
            found.refusals.append(f"{prefix}it {what} {path}, which is not known to be pure")
        else:
            found.refusals.append(f"{prefix}it {what} {path}, an object of type {kind}")


def _is_apply(value: object) -> bool:
    """Whether this is `SomeFunction.apply` of a custom autograd function."""
    return (
        isinstance(value, MethodType)
        and isinstance(value.__self__, FunctionMeta)
        and value.__func__ is Function.apply.__func__
    )


def _is_pure_callable(value: object) -> bool:
    try:
        return value in PURE_BUILTINS or value in PURE_TORCH or value in RULES
    except TypeError:
        return False


def _is_library(function: FunctionType) -> bool:
    """Functions of torch and the standard library are not followed: they must be in the table."""
    module = (getattr(function, "__module__", None) or "").partition(".")[0]
    if module in ("torch", "numpy", "tracejit"):
        return True
    return os.path.dirname(function.__code__.co_filename).startswith(os.path.dirname(os.__file__))
