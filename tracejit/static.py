"""A training step that is written down first and run later: placeholders, variables, `minimize`.

    with tracejit.Graph() as graph:
        x = graph.placeholder("x", (64, 20))
        w = graph.variable("w", torch.zeros(20, 5))
        loss = (x @ w).square().mean()
        graph.minimize(loss, torch.optim.SGD, lr=0.1)
    run = graph.compile(loss)
    for batch in batches:
        value = run(x=batch)

In: torch calls within `with`, on tensors that have shapes and no values (torch's meta device). Out:
a Python function of these calls (`graph.code`), compiled like any step: replayed, saved, drawn.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.overrides import TorchFunctionMode

from tracejit.capture.trace.tensor import tensors_of
from tracejit.compile import CompiledStep
from tracejit.compile import compile as compile_step
from tracejit.errors import StaticGraphError

_NAME = re.compile(r"[a-zA-Z]\w*")


class Graph:
    """A step in the making. Torch calls in `with graph:` are written down, and nothing is computed.

    placeholder(name, shape, dtype): what a call brings.
    variable(name, tensor):          what calls read and change; it gets gradients.
    minimize(loss, optimizer, …):    backward, and a step of an optimizer.
    assign(variable, value):         a value that a variable has from then on.
    compile(*fetches):               the function from placeholders to what is fetched.

    module(name, module):            a module whose parameters and buffers are variables.

    Tensors from outside take part as variables too. What is made of nothing (`torch.randn(3) / 2`)
    is made at once, and once, and so are a module's first weights. `torch.no_grad()` is written
    down with the calls within; autocast is not. Values cannot be read, since there are none:
    `.item()` and `if loss > 1:` raise what torch raises for meta tensors.
    """

    def __init__(self) -> None:
        self.variables: dict[str, torch.Tensor] = {}
        self._feeds: dict[str, torch.Tensor] = {}  # placeholders, without values
        self._lines: list[str] = []
        self._names: dict[int, str] = {}  # by the id of a tensor without values
        self._locals: set[str] = set()  # of the function
        self._kept: list[object] = []  # what has an id in use
        self._twins: dict[int, torch.Tensor] = {}  # without values, by the id of a real tensor
        self._made: set[int] = set()  # the memories of tensors that were made within `with`
        self._space: dict[str, object] = {"torch": torch}
        self._functions: dict[object, str] = {}
        self._mode = _Recorder(self)

    def __enter__(self) -> Graph:
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)

    # ---- what there is

    def placeholder(
        self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """A tensor that each call brings: `run(name=…)`. Raises StaticGraphError for a name that is
        taken or no identifier."""
        self._free(name)
        with torch._C.DisableTorchFunction():
            tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self._feeds[name] = tensor
        return self._named(tensor, name)

    def variable(self, name: str, tensor: torch.Tensor, *, trainable: bool = True) -> torch.Tensor:
        """A tensor that calls read and change, in place; `graph.variables[name]` is it."""
        self._free(name)
        with torch._C.DisableTorchFunction():
            if trainable and tensor.is_leaf and tensor.dtype.is_floating_point:
                tensor.requires_grad_()
        self.variables[name] = self._space[name] = tensor
        return self._twin(tensor, name)

    def module(self, name: str, module: torch.nn.Module) -> torch.nn.Module:
        """A module to call; `graph.variables["name_0_weight"]` is its parameter `0.weight`."""
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for path, tensor in tensors.items():
            if id(tensor) not in self._twins:
                self.variable(f"{name}_{path.replace('.', '_')}", tensor, trainable=False)
        return module

    def minimize(
        self,
        loss: torch.Tensor,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        variables: Sequence[torch.Tensor] | None = None,
        **options: object,
    ) -> torch.optim.Optimizer:
        """Have each call differentiate a loss, and do a step of an optimizer with these options on
        some variables, or on all that are trainable. Returns the optimizer: its learning rate may
        be changed between calls."""
        reals = {self._names[id(twin)]: real for real, twin in self._pairs()}
        wanted = reals.keys() if variables is None else map(self._name, variables)
        trained = [reals[name] for name in wanted if reals[name].requires_grad]
        if not trained:
            raise StaticGraphError(reason="there is no variable to train")
        with torch._C.DisableTorchFunction():
            made = optimizer(trained, **options)
        name = self._fresh("optimizer")
        self._space[name] = made
        self._lines += [f"{name}.zero_grad()", f"{self._name(loss)}.backward()", f"{name}.step()"]
        return made

    def assign(self, variable: torch.Tensor, value: torch.Tensor) -> None:
        """Have each call give a variable a value."""
        name, of = self._name(variable), self._name(value)
        self._lines += ["with torch.no_grad():", f"    {name}.copy_({of})"]

    # ---- what becomes of it

    @property
    def code(self) -> str:
        """The calls so far, as a Python function without its result."""
        return self._text(())

    def compile(self, *fetches: torch.Tensor, **options: object) -> CompiledStep:
        """The step: a function of the placeholders, in their order or by name, that returns what is
        fetched, one tensor or a tuple, without history: a variable is returned itself, and goes on
        changing. `options` are those of `tracejit.compile`."""
        text = self._text([self._name(x) for x in fetches])
        space = dict(self._space)
        space["check"] = self._checked(space)
        exec(compile(text, "<static graph>", "exec"), space)
        return compile_step(space["step"], **options)

    def _text(self, fetched: Sequence[str]) -> str:
        lines = [f"check({', '.join(self._feeds)})"] if self._feeds else []
        lines += self._lines
        results = ", ".join(f"{name}.detach()" for name in fetched)
        lines.append(f"return {results}" if results else "return None")
        body = "".join(f"    {line}\n" for line in lines)
        return f"def step({', '.join(self._feeds)}):\n{body}"

    def _checked(self, space: dict[str, object]) -> Callable:
        """A function that looks at what a call brings."""
        lines = []
        for name, t in self._feeds.items():
            space[f"refuse_{name}"] = _refusal(name, t)
            right = f"isinstance({name}, torch.Tensor) and {name}.shape == {tuple(t.shape)}"
            right += f" and {name}.dtype is {t.dtype}"
            lines.append(f"    if not ({right}): refuse_{name}({name})")
        text = f"def check({', '.join(self._feeds)}):\n" + "\n".join(lines or ["    pass"])
        exec(compile(text, "<static graph>", "exec"), space)
        return space["check"]

    # ---- names

    def _free(self, name: str) -> None:
        known = {*self._space, *self._feeds, *self._locals, "step", "check"}
        if not _NAME.fullmatch(name) or keyword.iskeyword(name) or name in known:
            raise StaticGraphError(reason=f"{name!r} is taken, or no name for a tensor")

    def _fresh(self, stem: str) -> str:
        """A name that nothing has."""
        stem, number = (stem if _NAME.fullmatch(stem) else "value"), 0
        taken = {*self._space, *self._feeds, *self._locals, "step", "check"}
        name = stem
        while name in taken:
            number += 1
            name = f"{stem}_{number}"
        return name

    def _named(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        self._names[id(tensor)] = name
        self._kept.append(tensor)
        return tensor

    def _name(self, tensor: torch.Tensor) -> str:
        name = self._names.get(id(tensor))
        if name is None:
            raise StaticGraphError(reason="a tensor is not of this graph")
        return name

    def _twin(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """A tensor without values that stands for a real one."""
        with torch._C.DisableTorchFunction():
            twin = torch.empty_strided(
                tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta"
            ).requires_grad_(tensor.requires_grad)
        self._twins[id(tensor)] = twin
        self._kept.append(tensor)
        return self._named(twin, name)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each variable, and what stands for it."""
        for name, tensor in self.variables.items():
            yield tensor, self._twins[id(tensor)]
            assert self._names[id(self._twins[id(tensor)])] == name

    # ---- calls

    def at_once(self, function: Callable, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a call works on nothing but what was made within `with`. Parameters that were are
        variables, unless this call initializes them."""
        first = (
            getattr(function, "__module__", "") == "torch.nn.init" or not torch.is_grad_enabled()
        )
        return all(
            _memory(x) in self._made and id(x) not in self._twins and (first or not x.requires_grad)
            for x in tensors
        )

    def made_here(self, found: object) -> object:
        """Remember what was made of nothing, or of what was."""
        for x in tensors_of(found):
            self._made.add(_memory(x))
            self._kept.append(x)
        return found

    def record(self, function: Callable, args: tuple, kwargs: dict) -> object:
        """Write a torch call down; returns its results, without values."""
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            reason = "autocast is on while it is written down; have it on around its calls instead"
            raise StaticGraphError(reason=reason)
        texts = [self._argument(x) for x in args]
        texts += [f"{k}={self._argument(x)}" for k, x in kwargs.items()]
        args, kwargs = self._without_values(args), self._without_values(kwargs)
        found = function(*args, **kwargs)
        line = f"{self._function(function)}({', '.join(texts)})"
        results = [x for x in tensors_of(found) if id(x) not in self._names]
        if results:
            name = self._fresh(f"v{len(self._names)}")
            self._locals.add(name)
            line = f"{name} = {line}"
            for x, path in _paths(found, name):
                if id(x) not in self._names:
                    self._named(x, path)
        elif not tensors_of(found) and found is not None:
            return found
        # else it may be in place
        self._lines.append(line if torch.is_grad_enabled() else f"with torch.no_grad(): {line}")
        return found

    def _function(self, function: Callable) -> str:
        """What a function is called in the code."""
        name = self._functions.get(function)
        if name is None:
            stem = getattr(function, "__name__", "function")
            stem = stem.strip("_") if stem.startswith("__") else stem
            name = self._functions[function] = self._fresh(stem)
            self._space[name] = function
        return name

    def _argument(self, x: object) -> str:
        if isinstance(x, torch.Tensor):
            return self._of_tensor(x)
        if isinstance(x, list | tuple):
            parts = ", ".join(map(self._argument, x))
            return f"[{parts}]" if isinstance(x, list) else f"({parts}{',' * (len(x) == 1)})"
        plain = type(x) in (bool, int, str) or (type(x) is float and math.isfinite(x))
        if x is None or x is ... or plain:
            return "..." if x is ... else repr(x)
        if isinstance(x, torch.device) and x.type == "meta":
            return f"{self._anchor()}.device"
        if type(x) is slice:
            return f"slice({', '.join(map(self._argument, (x.start, x.stop, x.step)))})"
        name = self._fresh(type(x).__name__)
        self._space[name] = x
        return name

    def _anchor(self) -> str:
        """A tensor that lies where tensors without values, and what is made beside them, will."""
        name = next(iter((*self._feeds, *self.variables)), None)
        if name is None:
            raise StaticGraphError(reason="a meta tensor is not of this graph")
        return name

    def _of_tensor(self, x: torch.Tensor) -> str:
        if id(x) in self._names:
            return self._names[id(x)]
        if x.is_meta:
            raise StaticGraphError(reason="a meta tensor is not of this graph")
        if id(x) not in self._twins:  # of a module, or a constant
            name = self._fresh("variable")
            self.variables[name] = self._space[name] = x
            self._twin(x, name)
        return self._names[id(self._twins[id(x)])]

    def _without_values(self, x: object) -> object:
        if isinstance(x, torch.Tensor):
            return self._twins.get(id(x), x)
        if isinstance(x, list | tuple):
            return type(x)(map(self._without_values, x))
        if isinstance(x, dict):
            return {k: self._without_values(v) for k, v in x.items()}
        return x


class _Recorder(TorchFunctionMode):
    """Hands torch calls to a graph."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        getter = getattr(function, "__name__", "") == "__get__"
        owner = getattr(function, "__self__", None)
        if getter and getattr(owner, "__name__", "") not in ("T", "mT", "H", "mH", "real"):
            return function(*args, **kwargs)  # shape, dtype, requires_grad
        beside = any(
            isinstance(x, torch.device) and x.type == "meta" for x in (*args, *kwargs.values())
        )  # `torch.zeros(3, device=x.device)`
        tensors = tensors_of((*args, *kwargs.values()))
        if not beside and self.graph.at_once(function, tensors):
            return self.graph.made_here(function(*args, **kwargs))
        return self.graph.record(function, args, kwargs)


def _refusal(name: str, tensor: torch.Tensor) -> Callable[[torch.Tensor], None]:
    wanted = f"{tensor.dtype} of shape {tuple(tensor.shape)}"

    def refuse(given: object) -> None:
        found = f"a {type(given).__name__}"
        if isinstance(given, torch.Tensor):
            found = f"{given.dtype} of shape {tuple(given.shape)}"
        raise StaticGraphError(reason=f"{name} is {found}, and was declared {wanted}")

    return refuse


def _memory(x: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return x.untyped_storage()._cdata


def _paths(x: object, name: str) -> Iterator[tuple[torch.Tensor, str]]:
    if isinstance(x, torch.Tensor):
        yield x, name
    elif isinstance(x, list | tuple):
        for i, item in enumerate(x):
            yield from _paths(item, f"{name}[{i}]")
