"""Hyperparameters of optimizers, and state variables, as runtime scalars for one trace.

The floats in the `param_groups` of every optimizer that the step can reach are replaced by
TracedFloats while the step's Python runs, and are plain floats again afterwards. What the step
itself stores there (`group["lr"] *= 0.9`) is kept, and listed in `stores`. An LR scheduler's
`step()` runs as it is, on plain floats; what it changes is a new runtime scalar after that.
`abort` puts optimizers and schedulers back as they were when the trace began.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import field
from functools import partial
from types import FunctionType, MethodType, ModuleType

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.overrides import TorchFunctionMode

from tracejit.capture.effects.effects import Callback
from tracejit.capture.effects.variables import (
    Holder,
    Record,
    Variable,
    Variables,
    holds_traced,
    plain_tuple,
)
from tracejit.capture.python.aborts import Memory, remember, scrub
from tracejit.capture.python.bytecode import contents
from tracejit.capture.python.kept import Kept
from tracejit.capture.trace.scalars import (
    Path,
    TracedFloat,
    TracedInt,
    is_runtime,
    is_traced,
    plain,
)
from tracejit.capture.trace.table import function_name
from tracejit.capture.trace.trace import Trace
from tracejit.records import dataclass

_WALKED = 5000  # objects looked at in search of optimizers
_WIDE = 1000  # containers with more items hold data


@dataclass(slots=True)
class _Entry:
    """One item of a param group: what it held, and the runtime scalars in its place."""

    original: object
    traced: object
    stored: bool = False  # the step itself put the runtime scalar there


@dataclass(slots=True)
class _Group:
    """A param group in use by the trace."""

    group: dict
    before: dict  # a copy of it
    entries: dict[str, _Entry] = field(default_factory=dict)


_NO_FLOATS = frozenset({bool, type(None), list, int, str, torch.Tensor})


def has_floats(x: object) -> bool:
    """Whether an item of a param group is made of runtime scalars while a trace runs."""
    if type(x) is tuple:
        return any(map(has_floats, x))
    return isinstance(x, float) and not isinstance(x, TracedFloat)  # numpy's float64 too


class Hyperparameters:
    """The optimizers and state variables of one trace."""

    def __init__(
        self, trace: Trace, variables: Sequence[Variable] = (), records: Sequence[Record] = ()
    ):
        self.trace = trace
        self.variables = Variables(variables, records)
        self.holders: list[Holder] = []  # which numbers come from, and values go to
        self.stores: list[tuple[int, object, object]] = []  # holder, key, what the step stored
        self.callbacks: list[Callback] = []
        # per callback the runtime scalars among its arguments, by position or name
        self.operands: list[dict[int | str, object]] = []
        self.inside = False  # a callback is running
        self._memory = Memory()
        self._computed = 0
        self._groups: dict[int, _Group] = {}
        self._optimizers: dict[int, tuple[Optimizer, list, dict]] = {}
        self._schedulers: dict[int, tuple[LRScheduler, dict]] = {}
        self._shown: list[list] = []  # rates of schedulers, as runtime scalars
        # ids of schedulers that a callback has stepped: all, and those that tell rates
        self._called: set[int] = set()
        self._stepped: set[int] = set()

    # ---- runtime scalars in place of floats, and back

    def start(self, found: list[object]) -> None:
        """Make runtime scalars of the floats of optimizers before the step runs. `found`
        has the objects that the step can reach; they are put back if the trace fails."""
        self._memory = remember(found)
        self.variables.start(self._scalar_of, self.trace.scalars.taken)
        for x in found:
            if isinstance(x, Optimizer):
                self._remember(x)
                self._substitute(x, self._entry)
            elif isinstance(x, LRScheduler):
                self._remember_scheduler(x)
        for scheduler, _ in self._schedulers.values():
            self._show_rates(scheduler)

    def _scalar_of(self, number: float, variable: Variable, *inner: int) -> object:
        path = "entry", self._holder(variable.holder), variable.key, *inner
        made = self.trace.scalar(number, path)
        inside = type(made) is TracedInt and made.live is not None  # an entry of a list
        return made.pin() if inside and made.live.pins_integers else made

    def _entry(self, group: dict, key: str) -> Path:
        """Where the floats of an item of a param group come from."""
        return "entry", self._holder(group), key

    def _holder(self, holder: Holder) -> int:
        for i, known in enumerate(self.holders):
            if known is holder:
                return i
        self.holders.append(holder)
        return len(self.holders) - 1

    def _remember(self, optimizer: Optimizer) -> None:
        if id(optimizer) not in self._optimizers:
            inner = {p: dict(s) for p, s in optimizer.state.items() if isinstance(s, dict)}
            self._optimizers[id(optimizer)] = optimizer, list(optimizer.param_groups), inner

    def _substitute(self, optimizer: Optimizer, path: Callable[[dict, str], Path | None]) -> None:
        """Make runtime scalars of the floats of an optimizer, of these paths; where there is none,
        it is the one that was there."""
        for group in optimizer.param_groups:
            known = self._groups.get(id(group))
            if known is None:
                known = self._groups[id(group)] = _Group(group, dict(group))
            for key, value in group.items():
                if type(value) in _NO_FLOATS:
                    continue
                if holds_traced(value) and not _live(value):
                    value = group[key] = plain_tuple(value)  # the user kept it from an earlier call
                if not has_floats(value):
                    continue
                place, entry = path(group, key), known.entries.get(key)
                if place is None and entry is not None and entry.original is value:
                    group[key] = entry.traced
                    continue
                place = place or self.computed()
                group[key] = self._traced(value, place)
                known.entries[key] = _Entry(value, group[key], stored=place[0] == "held")

    def _traced(self, x: object, path: Path) -> object:
        if type(x) is tuple:
            return tuple(self._traced(item, (*path, i)) for i, item in enumerate(x))
        return self.trace.scalar(float(x), path) if has_floats(x) else x

    def _restore(self) -> list[tuple[int, str, object]]:
        """Make all floats plain again; returns what the step stored of runtime scalars, and in
        their place."""
        stored = []
        for known in self._all_groups():
            for key, value in known.group.items():
                entry = known.entries.get(key)
                if entry is None and type(value) in _NO_FLOATS:
                    continue
                if entry is not None and value is entry.traced:
                    known.group[key] = entry.original
                elif holds_traced(value):
                    number = known.group[key] = plain_tuple(value)
                    entry = known.entries[key] = _Entry(number, value, stored=True)
                elif entry is not None:  # a number that Python has, perhaps the one from before
                    entry = known.entries[key] = _Entry(value, value, stored=True)
                if entry is not None and entry.stored and value is entry.traced:
                    stored.append((self._holder(known.group), key, value))
        return stored

    def _all_groups(self) -> Iterator[_Group]:
        """The known groups, and those that the step added."""
        for optimizer, *_ in self._optimizers.values():
            for group in optimizer.param_groups:
                self._groups.setdefault(id(group), _Group(group, dict(group)))
        return iter(tuple(self._groups.values()))

    def finish(self) -> None:
        """The step's Python has run: its objects hold plain numbers from now on."""
        self.stores = self._restore()
        for known in self._groups.values():
            known.entries.clear()
        scalars = self.trace.scalars
        stores, lost = self.variables.finish(scalars.texts)
        self.lose(lost)
        for holder, key, value in stores:
            self.stores.append((self._holder(holder), key, value))
        self._make_schedulers_plain()

    def lose(self, texts: Iterable[Kept]) -> None:
        """Texts of runtime scalars are not where they were to be found."""
        for kept in texts:
            self.trace.journal.lost_text((kept.code, kept.site.at))
            self.trace.scalars.taken(
                f"it keeps text of a number, at {kept.where}, in a place that is not known"
            )

    def computed(self) -> Path:
        """The path of one more float that Python computed in this call."""
        self._computed += 1
        return "computed", self._computed - 1

    # ---- events of the trace

    def profiled(self, args: tuple) -> None:
        """torch announces what it runs to a profiler: look for `Optimizer.step`."""
        if args and isinstance(args[0], str) and args[0].startswith("Optimizer.step#"):
            optimizer = _running_optimizer()
            if optimizer is not None and not self.inside:
                self._remember(optimizer)
                known = set() if self.callbacks else set(self._groups)

                def path(group: dict, key: str) -> Path:
                    kind, n = self.computed()
                    return ("held" if id(group) in known else kind), n

                self._substitute(optimizer, path)

    def call_back(self, step: Callable, scheduler: LRScheduler, args: tuple, kwargs: dict) -> None:
        """Run a scheduler's step on plain floats; what it changes is a new runtime scalar."""
        if isinstance(getattr(scheduler, "optimizer", None), Optimizer):
            self._remember(scheduler.optimizer)
        self._remember_scheduler(scheduler)
        self._called.update(map(id, with_inner(scheduler)))
        given = dict(enumerate(args)) | kwargs
        if step is _ON_PLATEAU:  # which asks its metric for `float` first of all
            given = {at: _number_in(x) for at, x in given.items()}
        self._restore()
        self._make_schedulers_plain()
        args = tuple(plain(given[i]) for i in range(len(args)))
        kwargs = {name: plain(given[name]) for name in kwargs}
        n = len(self.callbacks)
        self.operands.append({at: x for at, x in given.items() if is_runtime(x)})
        alone = of_torch_alone(scheduler)
        self.callbacks.append(Callback(MethodType(step, scheduler), args, kwargs, alone))
        self.inside = True
        touched = Touched()
        try:
            with nullcontext() if alone else touched:
                step(scheduler, *args, **kwargs)
        finally:
            self.inside = False
            if touched.by:
                self.trace.scalars.taken(
                    f"{type(scheduler).__name__} computes with tensors when it steps "
                    f"({touched.by}); step it outside the step"
                )
            for optimizer, *_ in tuple(self._optimizers.values()):
                self._substitute(optimizer, partial(self._after, n, only_rates(scheduler)))
            self._show_rates(scheduler)

    def stepped(self, scheduler: LRScheduler) -> bool:
        """Whether the trace has stepped a scheduler, and no callback is running."""
        return id(scheduler) in self._stepped and not self.inside

    def left(self, scheduler: LRScheduler) -> bool:
        """Whether a callback has run that may have changed a scheduler, and none is running."""
        return id(scheduler) in self._called and not self.inside

    def _show_rates(self, scheduler: LRScheduler) -> None:
        """A scheduler tells the rates of its groups: `get_last_lr()`."""
        rates = getattr(scheduler, "_last_lr", None)
        groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
        if type(rates) is not list or len(rates) != len(groups):
            return
        known = [self._groups.get(id(group)) for group in groups]
        entries = [None if group is None else group.entries.get("lr") for group in known]
        if all(e is not None and e.original == x for e, x in zip(entries, rates, strict=True)):
            self._shown.append(rates)
            rates[:] = [entry.traced for entry in entries]
            if self.callbacks:
                self._stepped.add(id(scheduler))

    def _make_schedulers_plain(self) -> None:
        for scheduler, _ in self._schedulers.values():  # also of one stepped by another name
            for name, value in vars(scheduler).items():
                if is_traced(value):
                    setattr(scheduler, name, plain(value))
                elif type(value) is list and any(map(is_traced, value)):
                    value[:] = map(plain, value)
        for rates in self._shown:
            rates[:] = map(plain, rates)
        self._shown.clear()

    def _after(self, n: int, rates: bool, group: dict, key: str) -> Path | None:
        if rates and key != "lr":
            return None
        known = self._groups[id(group)].entries.get(key)
        if known is not None and known.stored:  # the callback built on what the step had stored
            return "stored", self.computed()[1]
        return "after", n, self._entry(group, key)

    def _remember_scheduler(self, scheduler: LRScheduler) -> None:
        for x in with_inner(scheduler):
            self._schedulers.setdefault(id(x), (x, dict(vars(x))))

    def kept_in_state(self) -> set[int]:
        """The ids of the tensors that optimizers hold as their state, which no cycle of the step's
        objects does."""
        states = (optimizer.state.values() for optimizer, *_ in self._optimizers.values())
        return {id(x) for of in states for s in of if isinstance(s, dict) for x in s.values()}

    # ---- when the call fails

    def undo(self, proxies: list[torch.Tensor]) -> None:
        """Put param groups, optimizer state and schedulers back as they were, and take
        intermediates of the trace out of all that held them."""
        for handle in self.trace.registered:
            handle.remove()
        self._make_schedulers_plain()
        self.variables.undo()
        for known in self._groups.values():
            known.group.clear()
            known.group.update(known.before)
        for optimizer, groups, inner in self._optimizers.values():
            optimizer.param_groups[:] = groups
            for p in [p for p in optimizer.state if p not in inner]:
                del optimizer.state[p]
            for p, state in inner.items():
                optimizer.state[p].clear()
                optimizer.state[p].update(state)
        for scheduler, attributes in self._schedulers.values():
            vars(scheduler).clear()
            vars(scheduler).update(attributes)
        if proxies:
            scrub(proxies, self._memory)

    def abort(self) -> None:
        """The trace has failed: undo all that it did."""
        self.undo(self.trace.proxies or self.trace.journal.proxies())
        self.trace.journal.release()


class Touched(TorchFunctionMode):
    """Notes which function of torch is called inside."""

    by = ""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.by = self.by or function_name(func)
        return func(*args, **(kwargs or {}))


def tells_rates(scheduler: LRScheduler) -> bool:
    """Whether what `get_last_lr()` tells are the rates of the scheduler's groups."""
    rates = getattr(scheduler, "_last_lr", None)
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
    if type(rates) is not list or not all(type(x) is float for x in rates):
        return False
    return rates == [group["lr"] for group in groups]


def with_inner(scheduler: LRScheduler) -> list[LRScheduler]:
    """A scheduler and those that it steps in turn, as SequentialLR and ChainedScheduler do."""
    found = [scheduler]
    for x in found:  # which grows
        found += getattr(x, "_schedulers", ())
    return found


def of_torch_alone(scheduler: LRScheduler) -> bool:
    """Whether a scheduler runs no code of the user's."""
    mine = type(scheduler).__module__ == LRScheduler.__module__
    inner = getattr(scheduler, "_schedulers", ())
    theirs = hasattr(scheduler, "lr_lambdas") or getattr(scheduler, "_scale_fn_custom", None)
    return mine and not theirs and all(map(of_torch_alone, inner))


def only_rates(scheduler: LRScheduler) -> bool:
    """Whether a scheduler's step sets learning rates and no other hyperparameters."""
    if isinstance(scheduler, (CyclicLR, OneCycleLR)) or not of_torch_alone(scheduler):
        return False
    return all(map(only_rates, getattr(scheduler, "_schedulers", ())))


def _number_in(x: object) -> object:
    """The number in a tensor of one element; anything else as it is."""
    return x.item() if isinstance(x, torch.Tensor) and x.numel() == 1 else x


def _live(x: object) -> bool:
    return any(map(_live, x)) if type(x) is tuple else is_runtime(x)


def _running_optimizer() -> Optimizer | None:
    """The optimizer whose `step` is being entered: torch's wrapper around it is on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == _OPTIMIZERS:
            found = frame.f_locals.get("self")
            if isinstance(found, Optimizer):
                return found
        frame = frame.f_back
    return None


_OPTIMIZERS = Optimizer.profile_hook_step.__code__.co_filename
_ON_PLATEAU = ReduceLROnPlateau.step


# ---- the search for optimizers


def within_reach(roots: list[object], names: Callable[[FunctionType], Sequence[str]]) -> list:
    """What is reachable from some objects, in the order of discovery.

    `names(function)` are the globals that a function's code names. Containers, closures, and the
    attributes of objects are followed, and hooks that run when the gradients of modules' parameters
    are there (an optimizer may be inside); tensors and modules of Python are not.
    """
    found: list[object] = []
    seen: set[int] = set()
    pending = list(reversed(roots))
    while pending and len(seen) < _WALKED:
        x = pending.pop()
        if id(x) in seen or isinstance(x, _LEAVES) or type(x) in _COMMON:
            continue
        seen.add(id(x))
        found.append(x)
        if not isinstance(x, Optimizer):
            pending += [part for part in reversed(_parts(x, names)) if type(part) not in _COMMON]
    return found


_LEAVES = (str, int, float, torch.Tensor, type)
_COMMON = frozenset({torch.nn.Parameter, torch.Tensor, type(None), bool, int, float, str})
_LIBRARIES = ("torch", "numpy", "tracejit")
_OF_ANY_MODULE = frozenset(vars(torch.nn.Module()))
_HOOKS = tuple(sorted(name for name in _OF_ANY_MODULE if name.endswith("_hooks")))


def _hooks_of_parameters(module: torch.nn.Module) -> list[dict]:
    """What runs once a gradient of a module's parameters is there."""
    found, pending, seen = [], [module], {id(module)}
    while pending:
        attributes = pending.pop().__dict__
        for p in attributes.get("_parameters", {}).values():  # not of a ScriptModule
            if p is not None and (hooks := p._post_accumulate_grad_hooks):
                found.append(hooks)
        for child in attributes.get("_modules", {}).values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                pending.append(child)
    return found


def _parts(x: object, names: Callable[[FunctionType], Sequence[str]]) -> list[object]:
    if isinstance(x, torch.nn.Module):
        attributes = x.__dict__
        parts = [attributes[name] for name in _HOOKS if attributes.get(name)]
        parts += _hooks_of_parameters(x)
        if not attributes.keys() <= _OF_ANY_MODULE:
            parts += [value for name, value in attributes.items() if name not in _OF_ANY_MODULE]
        return parts
    if isinstance(x, FunctionType):
        if (x.__module__ or "").partition(".")[0] in _LIBRARIES:
            return []
        parts = [contents(cell) for cell in x.__closure__ or ()]
        namespace = x.__globals__
        parts += [namespace.get(name) for name in names(x)]
        return parts + [*x.__defaults__] if x.__defaults__ else parts
    if isinstance(x, MethodType):
        return [x.__self__, x.__func__]
    if isinstance(x, partial):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, (list, tuple)):
        return list(x) if len(x) <= _WIDE else []
    if isinstance(x, dict):
        return list(x.values()) if len(x) <= _WIDE else []
    attributes = x.__dict__ if type(x).__dictoffset__ else None
    if isinstance(x, ModuleType) or not isinstance(attributes, dict):
        return []
    return [*attributes.values()]
