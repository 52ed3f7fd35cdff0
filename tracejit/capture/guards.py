"""Guards: generated Python that decides whether a call may be replayed, and fetches its inputs.

`arm` turns a Captured step and what its code reads into one function `guard(args, kwargs)`. It
returns (outside tensors, runtime scalars), or the text of the first condition that failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import CellType, FunctionType

import torch

from tracejit.capture.bind import Bound
from tracejit.capture.effects import Captured
from tracejit.capture.reads import DEFAULTS, Reads, analyze, is_tensor, is_value
from tracejit.capture.scalars import RELATIONS, TracedFloat, same_float
from tracejit.ir.graph import Arg
from tracejit.ir.hostcode import host_lines

Guard = Callable[[tuple, dict], tuple[list, list] | str]


@dataclass
class _Writer:
    """Collects the guard's lines and the objects that they refer to."""

    lines: list[str] = field(default_factory=list)
    names: dict[str, object] = field(default_factory=dict)
    tensors: dict[int, str] = field(default_factory=dict)  # id(tensor) -> expression
    scalars: dict[tuple, str] = field(default_factory=dict)  # path of a scalar -> expression

    def constant(self, value: object) -> str:
        name = f"k{len(self.names)}"
        self.names[name] = value
        return name

    def local(self, expression: str) -> str:
        name = f"x{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def check(self, condition: str, reason: str) -> None:
        self.lines.append(f"if not ({condition}): return {reason!r}")


def proof(function: FunctionType, bound: Bound, captured: Captured) -> tuple[Reads, list[str]]:
    """What the step reads, and the reasons (none when it is safe) not to replay it."""
    reads = analyze(function)
    reasons = list(reads.refusals)
    for store in reads.stores:
        now = store.fetch()
        if now is not store.value or not is_tensor(now):
            reasons.append(f"it rebinds {store.path} outside itself")
    if captured.escaped:
        reasons.append("it stores an intermediate tensor in a Python object")
    if not isinstance(captured.key[3], str):
        reasons.append("it returns an object that is neither a tensor nor a plain value")
    if any(t.__dict__ for t in captured.reals):
        reasons.append("a tensor that it uses carries Python attributes")
    for path, x in _leaves(bound):
        if not (is_value(x) or is_tensor(x) or isinstance(x, float)):
            reasons.append(f"argument {path} is an object of type {type(x).__name__}")
    return reads, list(dict.fromkeys(reasons))


def _leaves(bound: Bound):
    for i, x in enumerate(bound.args):
        yield from _leaf(f"{i}", x)
    for name, x in bound.kwargs.items():
        yield from _leaf(name, x)


def _leaf(path: str, x: object):
    if type(x) is tuple and not is_value(x):
        for i, item in enumerate(x):
            yield from _leaf(f"{path}[{i}]", item)
    else:
        yield path, x


def arm(
    function: FunctionType, bound: Bound, captured: Captured, reads: Reads
) -> tuple[Guard | None, str]:
    """The guard of a captured step, its text, or (None, reason)."""
    w = _Writer()
    w.names |= {"torch": torch, "grad_on": torch.is_grad_enabled, "same_float": same_float}
    w.names["default_dtype"] = torch.get_default_dtype
    w.names["precision"] = torch.get_float32_matmul_precision
    w.check(f"grad_on() is {torch.is_grad_enabled()}", "grad mode changed")
    w.check(f"default_dtype() is {w.constant(torch.get_default_dtype())}", "default dtype changed")
    w.check(
        f"precision() == {torch.get_float32_matmul_precision()!r}",
        "torch.get_float32_matmul_precision changed",
    )
    w.check(
        "not torch.is_autocast_enabled('cpu') and not torch.is_autocast_enabled('cuda')",
        "autocast is on",
    )
    w.names["default_device"] = torch.get_default_device
    device = w.constant(torch.get_default_device())
    w.check(f"default_device() == {device}", "the default device changed")
    w.names["saved_hooks"] = torch._C._autograd._top_saved_tensors_default_hooks
    w.check("saved_hooks(True) is None", "hooks on saved tensors are active")
    w.check(f"len(args) == {len(bound.args)}", "the number of arguments changed")
    names = w.constant(set(bound.kwargs))
    w.check(f"kwargs.keys() == {names}", "the keyword arguments changed")
    for i, x in enumerate(bound.args):
        _guard_leaf(w, w.local(f"args[{i}]"), x, ("arg", i), f"argument {i}")
    for name, x in bound.kwargs.items():
        _guard_leaf(w, w.local(f"kwargs[{name!r}]"), x, ("kwarg", name), f"argument {name}")
    _guard_reads(w, function, bound, reads)
    reason = _guard_tensors(w, captured)
    if reason:
        return None, reason
    missing = [path for path in bound.scalars if path not in w.scalars]
    if missing:
        return None, f"a runtime scalar has no path: {missing[0]}"
    scalars = ", ".join(w.scalars[path] for path in bound.scalars)
    w.lines.append(f"scalars = [{scalars}]")
    _guard_predicates(w, captured)
    tensors = ", ".join(w.tensors[id(t)] for t in captured.reals)
    w.lines.append(f"return [{tensors}], scalars")
    text = "def guard(args, kwargs):\n" + "\n".join(f"    {line}" for line in w.lines) + "\n"
    namespace = dict(w.names)
    exec(compile(text, "<tracejit guard>", "exec"), namespace)
    return namespace["guard"], text


def _guard_leaf(w: _Writer, at: str, x: object, path: tuple, name: str) -> None:
    """Guard one argument, default or outside name that holds x (a TracedFloat: a scalar)."""
    if isinstance(x, TracedFloat):
        w.check(f"type({at}) is float", f"{name} is no float any more")
        w.scalars[path] = at
    elif is_tensor(x):
        w.check(f"type({at}) is {w.constant(type(x))}", f"{name} has another type")
        w.tensors.setdefault(id(x), at)
    elif type(x) is tuple and not is_value(x):
        w.check(f"type({at}) is tuple and len({at}) == {len(x)}", f"{name} has another length")
        for i, item in enumerate(x):
            _guard_leaf(w, w.local(f"{at}[{i}]"), item, (*path, i), f"{name}[{i}]")
    elif type(x) is float:
        k = w.constant(x)
        w.check(f"type({at}) is float and same_float({at}, {k})", f"{name} is not {x!r} any more")
    else:
        k = w.constant(x)
        if x is None or x is True or x is False or x is ...:
            w.check(f"{at} is {x!r}", f"{name} is not {x!r} any more")
        else:
            kind = w.constant(type(x))
            same = f"type({at}) is {kind} and {at} == {k}"
            if type(x) is tuple:  # 1 == 1.0 == True inside
                same += f" and repr({at}) == {repr(x)!r}"
            w.check(same, f"{name} is not {x!r} any more")


def _guard_reads(w: _Writer, function: FunctionType, bound: Bound, reads: Reads) -> None:
    """Guard everything that the code reads from cells, globals, defaults and modules."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    scalars = {}
    for path in bound.scalars:
        if path[0] == "cell":
            scalars[(id(cells[path[1]]), None)] = path
        elif path[0] == "global":
            scalars[(id(function.__globals__), path[1])] = path
        elif path[0] == "default" and len(path) == 2 or path[0] == "kwdefault" and len(path) == 2:
            scalars[(id(function), path[1])] = path
    counted: set[tuple[int, bool]] = set()
    for read in reads.reads:
        holder = w.constant(read.holder)
        if isinstance(read.holder, CellType):
            expression = f"{holder}.cell_contents"
        elif isinstance(read.holder, dict):
            expression = f"{holder}.get({read.key!r})"
        elif isinstance(read.holder, FunctionType):
            positional = isinstance(read.key, int)
            defaults = f"{holder}.{DEFAULTS[positional]}"
            if (id(read.holder), positional) not in counted:
                counted.add((id(read.holder), positional))
                count = len(getattr(read.holder, DEFAULTS[positional]))
                w.check(f"len({defaults} or ()) == {count}", "the defaults of a function changed")
            expression = f"{defaults}[{read.key!r}]"
        else:
            expression = f"{holder}.{read.key}"
        if read.shadow is not None:
            shadow = w.constant(read.shadow)
            w.check(f"{read.key!r} not in {shadow}", f"{read.path} is a global name now")
        at = w.local(expression)
        path = scalars.get((id(read.holder), read.key))
        if path is not None:
            w.check(f"type({at}) is float", f"{read.path} is no float any more")
            w.scalars[path] = at
        elif read.kind == "callable":
            w.check(f"{at} is {w.constant(read.value)}", f"{read.path} was replaced")
        else:
            _guard_leaf(w, at, read.value, ("read", read.path), read.path)


def _guard_tensors(w: _Writer, captured: Captured) -> str:
    """Guard the metadata of every outside tensor; returns a reason if one cannot be reached."""
    grad_of = {g: i for i, g in captured.grads_read if g is not None}
    for i, tensor in enumerate(captured.reals):
        at = w.tensors.get(id(tensor))
        if at is None and i in grad_of:
            owner = w.tensors.get(id(captured.reals[grad_of[i]]))
            if owner is not None:
                at = w.local(f"{owner}.grad")
                w.check(f"{at} is not None", "a .grad that the step reads is None")
                w.tensors[id(tensor)] = at
        if at is None:
            return f"a tensor of shape {list(tensor.shape)} comes from a place that is not guarded"
        _guard_tensor(w, at, tensor, i)
    for i, grad in captured.grads_read:
        at = w.tensors[id(captured.reals[i])]
        if grad is None:
            w.check(f"{at}.grad is None", "a .grad that was None when traced is set")
        elif grad < 0:
            w.check(f"{at}.grad is not None", "a .grad that the step asks for is None")
        elif w.tensors[id(captured.reals[grad])] != f"{at}.grad":
            w.check(f"{at}.grad is {w.tensors[id(captured.reals[grad])]}", "a .grad was replaced")
    _guard_aliasing(w, captured)
    return ""


def _guard_tensor(w: _Writer, at: str, tensor: torch.Tensor, i: int) -> None:
    k = w.constant
    what = f"input tensor {i} of shape {list(tensor.shape)}"
    w.check(
        f"{at}.shape == {k(tensor.shape)} and {at}.dtype is {k(tensor.dtype)} and "
        f"{at}.stride() == {tensor.stride()} and {at}.device == {k(tensor.device)}",
        f"{what} changed its shape, dtype, strides or device",
    )
    w.check(f"{at}.requires_grad is {tensor.requires_grad}", f"{what} changed requires_grad")
    aligned = tensor.data_ptr() % 16 == 0
    w.check(f"({at}.data_ptr() % 16 == 0) is {aligned}", f"{what} changed its alignment")
    w.check(f"{at}.is_neg() is False", f"{what} has its negative bit set")
    if tensor.requires_grad:
        w.check(
            f"{at}._backward_hooks is None and {at}._post_accumulate_grad_hooks is None",
            f"{what} has a hook",
        )
        w.check(f"{at}.is_leaf is {tensor.is_leaf}", f"{what} is a leaf now, or no leaf any more")


def _guard_aliasing(w: _Writer, captured: Captured) -> None:
    """The inputs share memory with each other exactly as they did."""
    storages = [t.untyped_storage()._cdata for t in captured.reals]
    first = {}
    pattern = tuple(first.setdefault(s, len(first)) for s in storages)
    names = [f"{w.tensors[id(t)]}.untyped_storage()._cdata" for t in captured.reals]
    if len(first) == len(storages):
        if len(storages) > 1:
            unique = f"len({{{', '.join(names)}}}) == {len(storages)}"
            w.check(unique, "two inputs share memory now")
        return
    w.names["pattern_of"] = _pattern
    w.check(f"pattern_of(({', '.join(names)},)) == {pattern}", "inputs share memory otherwise")
    offsets = tuple(t.storage_offset() for t in captured.reals)
    found = ", ".join(f"{w.tensors[id(t)]}.storage_offset()" for t in captured.reals)
    w.check(f"({found},) == {offsets}", "inputs overlap otherwise")


def _pattern(storages: tuple[int, ...]) -> tuple[int, ...]:
    first: dict[int, int] = {}
    return tuple(first.setdefault(s, len(first)) for s in storages)


def _guard_predicates(w: _Writer, captured: Captured) -> None:
    """Every decision that Python took on a runtime scalar must come out the same."""
    wanted: list[Arg] = []
    for predicate in captured.predicates:
        wanted += (predicate.left, predicate.right)
    names = {v: f"scalars[{i}]" for i, v in enumerate(captured.scalar_values)}
    lines, found = host_lines(captured.graph.nodes, wanted, names)
    w.lines += lines
    for i, predicate in enumerate(captured.predicates):
        w.names[f"relation_{predicate.relation}"] = RELATIONS[predicate.relation]
        left, right = found[2 * i], found[2 * i + 1]
        w.check(
            f"relation_{predicate.relation}({left}, {right}) is {predicate.outcome}",
            f"a decision on a runtime scalar ({predicate.relation}) came out otherwise",
        )
