"""A compiled step over numpy arrays.

    step(arrays) → tensors of the same memory → the *twin*, compiled as any step → arrays again

The twin has the code of the user's function, and tensors where that has arrays: among its arguments
(also in tuples, lists and dicts), in closure variables and in the globals that its code names. So
guards, replays and everything else of `compile.py` are about tensors. Only while the twin is traced
does the user's code run, and it sees Arrays then. What it does with them that no tensor can stand
for is refused, and the call runs as the plain function on the user's arrays (`on_unsupported`).
"""

from __future__ import annotations

import builtins
import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import CellType, FunctionType

import numpy as np
import torch

from tracejit.capture.bind import BoundCall, bind, unwrap
from tracejit.capture.names import name_of_tensor
from tracejit.capture.python.bytecode import contents, names_in
from tracejit.capture.python.snapshot import Snapshot
from tracejit.capture.trace.active import current
from tracejit.capture.trace.trace import Trace
from tracejit.compile import FRONTS, CompiledStep
from tracejit.errors import BackendUnavailable, CannotSave, UnsupportedOperation
from tracejit.numpy_front.at_once import NOT_SO, AtOnce, only_warns
from tracejit.numpy_front.core import BORN, ON, ArrayData, refuse
from tracejit.numpy_front.found import reads_arrays
from tracejit.numpy_front.places import NOWHERE, Places, Reached, is_holder, leads_nowhere
from tracejit.numpy_front.reductions import INSTEAD
from tracejit.numpy_front.seen import Seen, same_or_new
from tracejit.numpy_front.structure import Given, Layout, has, rebuilt, told
from tracejit.run import Replay
from tracejit.runtime.select import FAKES

_CHANGES = 8  # of what arguments are, after which calls run as the plain function
_MISSING = object()
_NONE_GIVEN = Given()


class Namespace(dict):
    """The globals of a function, of which some names stand for something else."""

    def __init__(self, of: dict):
        super().__init__()
        self.of = of

    def set(self, instead: dict[str, object]) -> None:
        """Put these in place of what the names say, and nothing else."""
        dict.clear(self)
        dict.__setitem__(self, "__builtins__", self.of.get("__builtins__", builtins))
        dict.update(self, instead)

    def __missing__(self, name: str) -> object:
        return self.of[name]

    def get(self, name: str, default: object = None) -> object:
        """As a dict's."""
        found = dict.get(self, name, _MISSING)
        return self.of.get(name, default) if found is _MISSING else found

    def __contains__(self, name: object) -> bool:
        return dict.__contains__(self, name) or name in self.of

    def copy(self) -> dict:
        """What there is by now."""
        return {**self.of, **dict.copy(self)}


class _Numpy:
    """The module numpy, while a step is traced: what makes arrays makes Arrays."""

    def __getattr__(self, name: str) -> object:
        if name == "random":
            raise refuse("np.random", "draw the numbers outside the step and pass them")
        found = getattr(np, name)
        return INSTEAD.get(found, found) if callable(found) and _hashable(found) else found


def _hashable(x: object) -> bool:
    return isinstance(x, (FunctionType, types.BuiltinFunctionType))


_NUMPY = _Numpy()


class _Reach(Snapshot):
    """Finds arrays that the step reaches in other ways."""

    def _array(self, x: np.ndarray, cls: type, pending: list[object]) -> None:
        raise refuse(
            "an array in an object, or of a function that the step calls",
            "pass it as an argument of the step, or name it as a variable of the step itself",
            x,
        )


class _Plain:
    """The result of a call that ran as the plain function."""

    __slots__ = ("result",)

    def __init__(self, result: object):
        self.result = result


class NumpyStep(CompiledStep):
    """A step whose arguments and variables are numpy arrays, and whose results are such."""

    _comparable = False

    def reset(self) -> None:
        """Forget every plan, replay and count."""
        with self._lock:
            self._users = unwrap(self._step)[0]
            self._layouts: list[Layout] = []  # of results: a trace returns which one it is
            self._form: list | None = None
            self._given: tuple[Given, tuple, dict] | None = None
            self._reach: _Reach | None = None  # what a trace can change
            self._changes = getattr(self, "_changes", 0)
            self._at_once: dict[Replay, AtOnce | None] = {}
            self._function = self._twin()
            super().reset()
            self._own |= {"_users", "_layouts", "_form", "_given", "_changes", "_names", "_cells"}
            self._own |= {"_space", "_reach", "_places", "_at_once"}

    def _twin(self) -> FunctionType:
        users = self._users
        self._names = names_in(users.__code__).globals
        self._space = Namespace(users.__globals__)
        self._space.set({})
        cells, self._cells = [], []  # the user's, and the twin's if it is another
        for cell in users.__closure__ or ():
            mine, value = cell, contents(cell)
            if not is_holder(value) and Given().convert(value) is not value:
                mine = CellType(None)
            self._cells.append((cell, mine))
            cells.append(mine)
        twin = FunctionType(users.__code__, self._space, users.__name__, None, tuple(cells))
        twin.__qualname__, twin.__module__ = users.__qualname__, users.__module__
        twin.__dict__.update(users.__dict__)
        return twin

    @property
    def _place(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What copies a tensor to the device that the step was asked to run on."""
        device = self.options.device
        if device is None or device == "cpu":
            return None
        there = "cpu" if self.options.backend in FAKES else device  # whose memory stands for it
        if there != "cpu" and not torch.cuda.is_available():
            raise BackendUnavailable(
                backend=device,
                reason="torch finds no GPU",
                remedy="Leave out device=, to run on the CPU",
            )

        def copied(x: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=there).copy_(x)

        return copied

    # ---- calls

    def __call__(self, *args: object, **kwargs: object) -> object:
        if torch._C._len_torch_function_stack() and current() is not None:
            return self._inside(*args, **kwargs)
        with self._lock:
            if self._replays and not kwargs:
                returned = self._made_at_once(args)
                if returned is not NOT_SO:
                    return returned
            replays = self.stats.replays
            given, taken = self._take(args, kwargs)
            if given.form != self._form:
                if self._form is not None:  # guards do not see what these are
                    self._changes += 1
                    self.reset()
                    given, taken = self._take(args, kwargs)
                self._form = given.form
            self._given = given, args, kwargs
            try:
                why = self._unfit(given)
                if why is not None:
                    returned = self._refused(why)
                else:
                    self._places.put()
                    returned = super().__call__(*taken[0], **taken[1])
                    given.brought_back()
            except BaseException:
                if self._reach is not None and not self.options.falls_back:
                    self._reach.restore()  # else Arrays of a trace stay in objects of the user's
                raise
            finally:
                self._places.take_back(_array_of)
                self._given = self._reach = None
            if type(returned) is _Plain:
                return returned.result
            if self.stats.replays > replays and not (kwargs or self._bound_to or given.form):
                self._keep_at_once(args)
            return self._rebuilt(returned, given)

    def _made_at_once(self, args: tuple) -> object:
        """The result of a call like one that the latest replay has made; else NOT_SO."""
        replay = self._replays[0]
        at_once = self._at_once.get(replay)
        ready = at_once is not None and replay.run is self._last_run
        if not ready or self._hooks.observer is not None:
            return NOT_SO
        returned = at_once(args)
        if returned is NOT_SO:
            return NOT_SO
        self.stats.replays += 1
        return self._rebuilt(returned, _NONE_GIVEN)

    def _keep_at_once(self, args: tuple) -> None:
        replay, known = self._replays[0], self._at_once
        if replay not in known and self._place is None:
            self._at_once = {r: known[r] for r in self._replays if r in known}
            self._at_once[replay] = AtOnce.of(self._users, self._names, replay, args)

    def _rebuilt(self, returned: tuple, given: Given) -> object:
        layout, *leaves = returned
        leaves.reverse()
        return rebuilt(self._layouts[layout], leaves, given, {})

    def _inside(self, *args: object, **kwargs: object) -> object:
        """A call by another compiled step: a part of its trace."""
        return self._step(*args, **kwargs)

    def _take(self, args: tuple, kwargs: dict) -> tuple[Given, tuple[tuple, dict]]:
        """This call's arrays as tensors, in its arguments and in the twin's variables."""
        given, users, twin = Given(self._place), self._users, self._function
        taken = tuple([given.convert(x) for x in args])
        named = {name: given.convert(x) for name, x in kwargs.items()} if kwargs else kwargs
        for cell, mine in self._cells:
            value = contents(cell)
            found = value if is_holder(value) else given.convert(value)
            if mine is not cell:
                mine.cell_contents = found
            elif found is not value:  # it has become an array
                self.reset()
                return self._take(args, kwargs)
        instead = {}
        for name in self._names:
            value = users.__globals__.get(name)
            found = value if value is np or is_holder(value) else given.convert(value)
            if found is not value:
                instead[name] = found
        self._space.set(instead)
        twin.__code__ = users.__code__
        twin.__defaults__ = given.convert(users.__defaults__)
        twin.__kwdefaults__ = given.convert(users.__kwdefaults__)
        roots = [*self._bound_to, *args, *kwargs.values()]
        self._places = NOWHERE
        if not leads_nowhere(roots, users):
            self._places = Places(Reached(roots, users), given.convert)
        return given, (taken, named)

    def _unfit(self, given: Given) -> tuple[str, str, object] | None:
        """What keeps this call from being traced or replayed: what, what to do, operands."""
        if given.problem is not None:
            what, array = given.problem
            return what, "convert it outside the step, for example with np.ascontiguousarray", array
        if not only_warns():
            return "np.seterr or np.errstate that does more than warn", "leave it out", None
        if self._changes > _CHANGES:
            return (
                "arguments that are now arrays, now scalars, now read-only",
                "pass the same kind in each call",
                None,
            )
        return None

    def _refused(self, why: tuple[str, str, object]) -> object:
        what, remedy, operand = why
        error = UnsupportedOperation(
            where=f"{self._users.__code__.co_filename}:{self._users.__code__.co_firstlineno}",
            function=what,
            shapes="numpy" if operand is None else f"{operand.dtype} of shape {operand.shape}",
            remedy=f"{remedy[0].upper()}{remedy[1:]}.",
        )
        if not self.options.falls_back:
            raise error
        self._remarks.warn(
            what, f"runs as the plain function, which is slower: {error}".rstrip(".")
        )
        self.stats.eager += 1
        return self._plain()

    def _plain(self, *args: object, **kwargs: object) -> object:
        _, args, kwargs = self._given
        self._places.restore()
        return _Plain(self._users(*self._bound_to, *args, **kwargs))

    def _saved(self, replays: list) -> None:
        raise CannotSave(
            step=self.__name__,
            reason="its arguments and results are numpy arrays, and a file takes tensors",
            remedy="Write the step over tensors: torch.from_numpy(x) has the memory of an array x",
        )

    # ---- traces

    def _bind(self, trace: Trace, args: tuple, kwargs: dict) -> BoundCall:
        given, twin = self._given[0], self._function
        for f in (twin, *_helpers(twin)):
            if "type" in names_in(f.__code__).globals:
                raise refuse(f"type(x), which {f.__name__} asks for", "ask with isinstance instead")
        self._reach = _Reach((twin, args, kwargs))
        BORN.arrays.clear()
        seen = Seen(given, self._places.known)
        cells = tuple([same_or_new(seen, cell) for cell in twin.__closure__ or ()])
        instead = {name: seen.of(x) for name, x in dict.items(self._space)}
        for name in self._names:
            value = instead.get(name, twin.__globals__.get(name))
            if value is np:
                instead[name] = _NUMPY
            elif _hashable(value) and value in INSTEAD:
                instead[name] = INSTEAD[value]
        space = Namespace(self._space)
        space.set(instead)
        function = FunctionType(twin.__code__, space, twin.__name__, None, cells)
        function.__qualname__ = twin.__qualname__
        function.__defaults__ = twin.__defaults__
        function.__kwdefaults__ = twin.__kwdefaults__
        stored = names_in(twin.__code__).stored
        stored = {x: dict.get(space, x) for x in names_in(twin.__code__).stored}
        pairs = zip(cells, twin.__closure__ or (), strict=True)
        before = [(mine, mine.cell_contents) for mine, other in pairs if mine is not other]
        bound = bind(trace, function, args, kwargs, self._prover.integers)
        trace.name_of = partial(name_of_tensor, twin, args, kwargs)
        bound.function = _Traced(self, bound.function, seen, before, stored, space)
        return bound

    def _run(self, function: Callable, args: tuple, kwargs: dict) -> object:
        """Run the user's code on Arrays."""
        return function(*args, **kwargs)


def _takes(step: CompiledStep, args: tuple, kwargs: dict) -> bool:
    """Make a step one over numpy arrays, from now on, if it is."""
    if type(step) is not CompiledStep or not reads_arrays(step._function, args, kwargs):
        if step.options.device is not None and type(step) is CompiledStep:
            raise ValueError("device= is for steps over numpy arrays: tensors are where they are")
        return False
    step.__class__ = NumpyStep
    step.reset()
    return True


FRONTS.append(_takes)


def _array_of(tensor: torch.Tensor) -> object:
    """What numpy has in place of a tensor that a call has made."""
    found = tensor.detach().cpu().numpy()
    return found if tensor.ndim else found[()]


def _is_array(x: object) -> bool:
    return isinstance(x, ArrayData)


def _helpers(twin: FunctionType) -> Iterator[FunctionType]:
    """The user functions that a step names."""
    names = names_in(twin.__code__).globals
    for x in (*map(contents, twin.__closure__ or ()), *map(twin.__globals__.get, names)):
        if type(x) is FunctionType and not (x.__module__ or "").startswith(("numpy", "tracejit")):
            yield x


class _Traced:
    """The user's function in a trace: takes tensors, and returns a layout and leaves.

    variables, stored: closure variables and globals that must hold afterwards what they hold.
    """

    def __init__(
        self,
        step: NumpyStep,
        inner: FunctionType,
        seen: Seen,
        variables: list[tuple[CellType, object]],
        stored: dict[str, object],
        space: Namespace,
    ):
        self._step, self._inner, self._seen = step, inner, seen
        self._variables, self._stored, self._space = variables, stored, space

    def __call__(self, *args: object, **kwargs: object) -> tuple:
        inner, seen = self._inner, self._seen
        inner.__defaults__ = seen.of(inner.__defaults__)
        inner.__kwdefaults__ = seen.of(inner.__kwdefaults__)
        step = self._step
        ON.device = None if step.options.backend in FAKES else step.options.device
        try:
            step._places.put(seen.of)
            result = step._run(inner, seen.of(args), seen.of(kwargs))
        finally:
            ON.device = None
            rebound = step._places.traced(seen.of)
        if rebound:
            raise _rebound(rebound)
        if has(result, _is_tensor, 0) and step._places.leads_back(result):
            raise _returned()
        self._check()
        leaves: list[object] = []
        arrays: list[ArrayData] = []
        layout = told(result, _is_array, self._refuse_returned, arrays, leaves)
        _refuse_copies(arrays)
        step, space = self._step, weakref.ref(self._space)
        del result, inner, seen, arrays
        self.__dict__.clear()
        # functions that were made in the trace have its globals
        if space() is not None or any(ref() is not None for ref in BORN.arrays):
            raise refuse(
                "keeping an array, or a function, in an object or variable outside the step",
                "return the array, or write into one that is there: kept[...] = x",
            )
        if layout not in step._layouts:
            step._layouts.append(layout)
        return (step._layouts.index(layout), *leaves)

    def _check(self) -> None:
        """Refuse what has put another array in a variable or container."""
        for cell, before in self._variables:
            if contents(cell) is not before:
                raise _rebound("a closure variable")
        for name, before in self._stored.items():
            if dict.get(self._space, name) is not before:
                raise _rebound(f"the global {name}")
        for made, copy in self._seen.containers:
            if not _alike(made, copy):
                raise _rebound("an item of a list or dict")

    def _refuse_returned(self, x: object) -> None:
        if any(x is made for made, _ in self._seen.containers):
            raise _returned()


def _refuse_copies(arrays: list[ArrayData]) -> None:
    """Refuse to return a copy, where numpy has a view of what the caller has too."""
    roots = {id(x.root) for x in arrays}
    for x in arrays:
        of = x.root.of
        while of is not None:
            if of.outside or id(of) in roots:
                raise refuse(
                    "returning what is a view in numpy and a copy here (reversed, reshaped, …)",
                    "return a copy of it: x[::-1].copy()",
                    x,
                )
            of = of.of


def _alike(x: object, y: object) -> bool:
    if len(x) != len(y):
        return False
    if type(x) is dict:
        return all(a is b for a, b in zip((*x, *x.values()), (*y, *y.values()), strict=True))
    return all(a is b for a, b in zip(x, y, strict=True))


def _is_tensor(x: object) -> bool:
    return isinstance(x, torch.Tensor)


def _returned() -> UnsupportedOperation:
    return refuse("returning a list or dict of arrays that the step was given", "return the arrays")


def _rebound(what: str) -> UnsupportedOperation:
    return refuse(
        f"binding {what} to another array",
        "write into the array that is there: w[...] = new, or return the new one",
    )
