"""Names for the inputs of a captured step, as the user's code calls them.

In: the function, the arguments of the call, and what its trace left behind, with optimizers as they
were before it. Out: one name per parameter of the graph:

    x, batch['ids'], xs[0]                         arguments
    w1, model.0.weight                             closure variables, globals, modules' tensors
    model.0.weight.grad                            the gradient of a named tensor
    optimizer.state[model.0.weight].exp_avg        optimizer state
    optimizer.param_groups[0].lr, scale            runtime scalars
    found.0, draw.0                                what cuts have found; random numbers
    input_3                                        where nothing leads to an input

A tensor with several names gets the first in this order: arguments, closure variables, globals, and
an optimizer's own names last. Among these, a short way comes before a long one.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import CellType, FunctionType, MethodType, ModuleType

import torch
from torch.optim import Optimizer

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import Call
from tracejit.capture.effects.variables import Attributes
from tracejit.capture.python.bytecode import contents, names_in
from tracejit.capture.trace.scalars import Path

_LOOKED_AT = 5000  # objects, in search of tensors
_WIDE = 1000  # containers with more items hold data
_LEAVES = (str, bytes, int, float, complex, type, ModuleType, type(None))
_LIBRARIES = ("torch", "numpy", "tracejit", "builtins")
_OF_ANY_MODULE = frozenset(vars(torch.nn.Module()))


def names_of_inputs(
    function: FunctionType, args: tuple, kwargs: dict, captured: Captured, call: Call
) -> tuple[str, ...]:
    """A unique name for each parameter of the captured graph."""
    found = Names(function, args, kwargs)
    taken: set[str] = set()
    names = []
    for k, (kind, index) in enumerate(captured.sources):
        if kind == "tensor":
            name = found.tensors.get(id(call.reals[index]))
        elif kind in ("found", "draw"):
            name = f"{kind}.{index}"
        else:
            name = found.scalar(captured.paths[index], call)
        if name is None or name in taken:
            name = f"input_{k}"
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return tuple(names)


def name_of_tensor(
    function: FunctionType, args: tuple, kwargs: dict, tensor: torch.Tensor
) -> str | None:
    """The name of a tensor that a call can reach."""
    return Names(function, args, kwargs).tensors.get(id(tensor))


def names_of_arguments(function: FunctionType, args: tuple, kwargs: dict) -> dict[Path, str]:
    """Where each argument of a call comes from, and its parameter's name; defaults included."""
    code = function.__code__
    positional = code.co_varnames[: code.co_argcount]
    more = code.co_argcount + code.co_kwonlyargcount
    by_name = code.co_varnames[code.co_posonlyargcount : more]
    stars = list(code.co_varnames[more:])
    rest = stars.pop(0) if code.co_flags & CO_VARARGS else "args"
    keywords = stars.pop(0) if code.co_flags & CO_VARKEYWORDS else "kwargs"
    names: dict[Path, str] = {}
    for i in range(len(args)):
        beyond = i - len(positional)
        names["arg", i] = positional[i] if beyond < 0 else f"{rest}[{beyond}]"
    for name in kwargs:
        names["kwarg", name] = name if name in by_name else f"{keywords}[{name!r}]"
    given = {*names.values()}
    defaults = function.__defaults__ or ()
    for i, name in enumerate(positional[len(positional) - len(defaults) :]):
        if name not in given:
            names["default", i] = name
    for name in function.__kwdefaults__ or ():
        if name not in given:
            names["kwdefault", name] = name
    return names


class Names:
    """The names of all tensors and param groups that a call can reach, by identity."""

    def __init__(self, function: FunctionType, args: tuple, kwargs: dict):
        self.root = function
        self.tensors: dict[int, str] = {}
        self.groups: dict[int, str] = {}
        self.arguments = names_of_arguments(function, args, kwargs)
        self._named: list[tuple[torch.Tensor, str]] = []
        self._holders: dict[int, str] = {}  # containers, cells; dicts of attributes with a dot
        self._optimizers: list[tuple[Optimizer, str]] = []
        self._seen: dict[int, object] = {}  # kept, so that an id stays its object's
        self._pending: deque[tuple[object, str]] = deque()
        values = {"arg": args, "kwarg": kwargs}
        values |= {"default": function.__defaults__, "kwdefault": function.__kwdefaults__}
        for (kind, at), name in self.arguments.items():
            self._pending.append((values[kind][at], name))
        self._variables(function, "")
        self._walk()
        self._gradients()
        for optimizer, place in self._optimizers:
            self._optimizer(optimizer, place)
        self._walk()

    def scalar(self, path: Path, call: Call) -> str | None:
        """The name of a runtime scalar."""
        match path:
            case "arg" | "kwarg" | "default" | "kwdefault" as kind, at, *inner:
                name = self.arguments.get((kind, at))
            case "cell" | "global", name, *inner:
                pass
            case "entry", n, key, *inner:
                name = self.entry(call.holders[n], key)
            case "item", k, *inner:
                tensor = self.tensors.get(id(call.reals[k]))
                name = tensor and f"{tensor}.item()"
            case "after", n, before:
                before, inner = self.scalar(before, call), ()
                name = before and f"{before}.after_{n}"
            case kind, n, *inner:
                name = f"{kind}_{n}"
        return name and name + "".join(f"[{i}]" for i in inner)

    def entry(self, holder: object, key: object) -> str | None:
        """The name of a place in a param group, a container, or what else a step assigns to."""
        of = self.groups.get(id(holder))
        if of is not None:
            return f"{of}.{key}"
        of = self._holders.get(id(holder.owner if isinstance(holder, Attributes) else holder))
        if of is None or isinstance(holder, CellType):
            return of
        if isinstance(holder, Attributes) or of.endswith("."):
            return f"{of.removesuffix('.')}.{key}".lstrip(".")
        return f"{of}[{key!r}]"

    def _walk(self) -> None:
        while self._pending and len(self._seen) < _LOOKED_AT:
            x, place = self._pending.popleft()
            if isinstance(x, torch.Tensor):
                self._give(x, place)
            elif not isinstance(x, _LEAVES) and id(x) not in self._seen:
                self._seen[id(x)] = x
                self._holders.setdefault(id(x), place)
                if type(x).__dictoffset__:
                    self._holders.setdefault(id(x.__dict__), f"{place}.")
                self._parts(x, place)

    def _give(self, tensor: torch.Tensor, name: str) -> None:
        if id(tensor) not in self.tensors:
            self.tensors[id(tensor)] = name
            self._named.append((tensor, name))

    def _parts(self, x: object, place: str) -> None:
        """Look at what an object holds, after all that is nearer."""
        add = self._pending.append
        if isinstance(x, torch.nn.Module):
            self._module(x, place)
        elif isinstance(x, Optimizer):
            self._optimizers.append((x, place))
        elif isinstance(x, FunctionType):
            if (x.__module__ or "").partition(".")[0] not in _LIBRARIES:
                self._variables(x, f"{place}.")
        elif isinstance(x, MethodType):
            add((x.__self__, f"{place}.__self__"))
            add((x.__func__, place))
        elif isinstance(x, partial):
            add((x.func, f"{place}.func"))
            add((x.args, f"{place}.args"))
            add((x.keywords, f"{place}.keywords"))
        elif isinstance(x, (list, tuple)) and len(x) <= _WIDE:
            fields = getattr(x, "_fields", ())
            for i, item in enumerate(x):
                add((item, f"{place}.{fields[i]}" if fields else f"{place}[{i}]"))
        elif isinstance(x, dict) and len(x) <= _WIDE:
            for key, item in [*x.items()]:
                if isinstance(key, (str, int)):
                    add((item, f"{place}[{key!r}]"))
        elif type(x).__dictoffset__ and isinstance(x.__dict__, dict):
            for name, item in [*x.__dict__.items()]:
                add((item, f"{place}.{name}"))

    def _variables(self, function: FunctionType, scope: str) -> None:
        """The closure variables and globals of a function. Globals that the step's own module has
        need no `scope` in front."""
        add = self._pending.append
        cells = function.__closure__ or ()
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
            self._holders.setdefault(id(cell), f"{scope}{name}")
            add((contents(cell), f"{scope}{name}"))
        namespace = function.__globals__
        self._holders.setdefault(id(namespace), ".")
        scope = "" if namespace is self.root.__globals__ else scope
        for name in names_in(function.__code__).globals:
            add((namespace.get(name), f"{scope}{name}"))

    def _module(self, module: torch.nn.Module, place: str) -> None:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self._give(tensor, f"{place}.{name}")
        for path, inner in module.named_modules():
            at = f"{place}.{path}" if path else place
            for name, item in [*vars(inner).items()]:
                if name not in _OF_ANY_MODULE:
                    self._pending.append((item, f"{at}.{name}"))

    def _gradients(self) -> None:
        """The `.grad` of what has a name."""
        for tensor, name in tuple(self._named):
            if tensor.is_leaf and tensor.grad is not None:
                self._give(tensor.grad, f"{name}.grad")

    def _optimizer(self, optimizer: Optimizer, place: str) -> None:
        """Param groups and state. Parameters that nothing else leads to are named by their place in
        a group."""
        for i, group in enumerate(optimizer.param_groups):
            at = f"{place}.param_groups[{i}]"
            self.groups.setdefault(id(group), at)
            for k, p in enumerate(group["params"]):
                self._give(p, f"{at}.params[{k}]")
            for key, item in group.items():
                if key != "params":
                    self._pending.append((item, f"{at}.{key}"))
        self._gradients()
        for p, state in optimizer.state.items():
            if isinstance(p, torch.Tensor) and isinstance(state, dict):
                name = self.tensors.get(id(p), "?")
                for key, item in state.items():
                    self._pending.append((item, f"{place}.state[{name}].{key}"))
