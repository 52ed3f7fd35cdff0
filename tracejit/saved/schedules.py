"""Schedulers of learning rates that a saved step steps: torch's own, as data.

    a scheduler → Taken → SavedScheduler ↔ JSON;  SavedScheduler → Schedules: objects again

Only classes of torch are known, by their names and by what each attribute of theirs has to be, so
that nothing of a file is run: they are made without their `__init__`, over param groups that have
nothing but numbers. These are the numbers of the step, by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch.optim import lr_scheduler

from tracejit.capture.effects.effects import arguments_of
from tracejit.records import dataclass
from tracejit.saved.archive import Damaged
from tracejit.saved.fields import LIMIT, Item, number_text

Attributes = dict[str, str | tuple[str, ...]]
# What an attribute is: a number, one that is made a float (it is a base of powers), an int,
# a bool, numbers in a list, ints in a list, how often each int is there, phases, or nothing; or one
# of some texts.
_COMMON: Attributes = {
    "base_lrs": "numbers",
    "last_epoch": "int",
    "_step_count": "int",
    "_last_lr": "numbers",
    "_get_lr_called_within_step": "bool",
    "_is_initial": "bool",
}
_KINDS: dict[str, Attributes] = {
    "StepLR": {**_COMMON, "step_size": "int", "gamma": "float"},
    "MultiStepLR": {**_COMMON, "milestones": "counts", "gamma": "float"},
    "ConstantLR": {**_COMMON, "factor": "float", "total_iters": "int"},
    "LinearLR": {
        **_COMMON,
        **{"start_factor": "float", "end_factor": "float", "total_iters": "int"},
    },
    "ExponentialLR": {**_COMMON, "gamma": "float"},
    "PolynomialLR": {**_COMMON, "total_iters": "int", "power": "float"},
    "CosineAnnealingLR": {**_COMMON, "T_max": "number", "eta_min": "number"},
    "CosineAnnealingWarmRestarts": {
        **_COMMON,
        **{"T_0": "int", "T_i": "int", "T_mult": "int", "eta_min": "number", "T_cur": "number"},
    },
    "CyclicLR": {
        **_COMMON,
        **{"max_lrs": "numbers", "total_size": "float", "step_ratio": "float", "gamma": "float"},
        **{"mode": ("triangular", "triangular2", "exp_range"), "_scale_fn_custom": "none"},
        **{"scale_mode": ("cycle", "iterations"), "cycle_momentum": "bool", "use_beta1": "bool"},
        **{"base_momentums": "numbers", "max_momentums": "numbers"},
    },
    "OneCycleLR": {
        **_COMMON,
        **{"total_steps": "int", "_schedule_phases": "phases", "cycle_momentum": "bool"},
        **{"use_beta1": "bool", "_anneal_func_type": ("cos", "linear")},
    },
    "ReduceLROnPlateau": {
        **{"factor": "float", "min_lrs": "numbers", "patience": "int", "cooldown": "int"},
        **{"cooldown_counter": "int", "mode": ("min", "max"), "threshold": "float"},
        **{"threshold_mode": ("rel", "abs"), "best": "number", "num_bad_epochs": "int"},
        **{"mode_worse": "number", "eps": "float", "last_epoch": "int", "_last_lr": "numbers"},
    },
    "SequentialLR": {"_milestones": "ints", "last_epoch": "int", "_last_lr": "numbers"},
    "ChainedScheduler": {"_last_lr": "numbers"},
}
# what torch's schedulers hold that follows from these, or is read only when they are made
_DERIVED = {"optimizer", "_schedulers", "_scale_fn_ref", "default_min_lr", "verbose"}
_MOMENTA = ("use_beta1", "base_momentums", "max_momentums")  # not there without cycle_momentum
_WITHOUT = {"bool": False, "numbers": []}
_PLAIN = (bool, str, type(None))

Group = dict[str, object]  # key → ["number", name], ["numbers", names] or ["value", x]


class Unknown(Exception):
    """Why a scheduler cannot be kept as data."""


@dataclass(frozen=True, slots=True)
class SavedScheduler:
    """A scheduler of the class `kind` of torch; `optimizer` is which param groups it steps, and
    `inner` which schedulers it steps itself."""

    kind: str
    optimizer: int
    inner: tuple[int, ...]
    attributes: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class SavedSchedules:
    """Those of a step, in an order in which each comes after those that it steps; and the param
    groups of their optimizers, whose numbers are the step's, by name."""

    optimizers: tuple[tuple[Group, ...], ...] = ()
    schedulers: tuple[SavedScheduler, ...] = ()


@dataclass(frozen=True, slots=True)
class SavedCallback:
    """A call of a scheduler's `step` in a plan, with plain arguments; the effects of the plan say
    which of them are numbers that it computes."""

    scheduler: int
    args: tuple
    kwargs: Mapping[str, object]


# ---- taking


class Taken:
    """Schedulers as they are found, and what is kept of each. `name(group, key, value)` gives the
    name of a number of a param group, whose key may go on with a position."""

    def __init__(self, name: Callable[[dict, tuple, int | float], str]):
        self._name = name
        self._objects: list[object] = []  # schedulers
        self._saved: list[SavedScheduler] = []
        self._optimizers: list[object] = []
        self._groups: list[tuple[Group, ...]] = []

    def schedules(self) -> SavedSchedules:
        """All of them."""
        return SavedSchedules(tuple(self._groups), tuple(self._saved))

    def scheduler(self, x: object) -> int:
        """The position of a scheduler. Raises Unknown."""
        for i, known in enumerate(self._objects):
            if known is x:
                return i
        check_known(x)
        kind = type(x).__name__
        inner = tuple(self.scheduler(s) for s in getattr(x, "_schedulers", ()))
        saved = SavedScheduler(kind, self._optimizer(x.optimizer), inner, taken(x))
        self._objects.append(x)
        self._saved.append(saved)
        return len(self._saved) - 1

    def _optimizer(self, x: object) -> int:
        for i, known in enumerate(self._optimizers):
            if known is x:
                return i
        self._optimizers.append(x)
        self._groups.append(tuple(map(self._group, x.param_groups)))
        return len(self._groups) - 1

    def _group(self, group: dict) -> Group:
        found: Group = {}
        for key, x in group.items():
            if key == "params":
                continue
            if type(x) in (int, float):
                found[key] = ["number", self._name(group, (key,), x)]
            elif type(x) is tuple and all(type(i) in (int, float) for i in x):
                names = [self._name(group, (key, k), i) for k, i in enumerate(x)]
                found[key] = ["numbers", names]
            elif type(x) in _PLAIN:
                found[key] = ["value", x]
            else:
                raise Unknown(f"its optimizer has a {key} of the class {type(x).__name__}")
        return found


def check_known(scheduler: object) -> None:
    """Raise Unknown unless a scheduler, and those in it, are torch's own and are data."""
    kind = type(scheduler).__name__
    if kind not in _KINDS or type(scheduler) is not getattr(lr_scheduler, kind, None):
        raise Unknown(f"{kind} is a schedule of functions of yours")
    taken(scheduler)
    for inner in getattr(scheduler, "_schedulers", ()):
        check_known(inner)


def taken(scheduler: object) -> dict[str, object]:
    """What a file keeps of a scheduler: its attributes. Raises Unknown."""
    kind = type(scheduler).__name__
    wanted = _KINDS[kind]
    for name in vars(scheduler).keys() - wanted.keys() - _DERIVED:
        if hasattr(type(scheduler), name):
            raise Unknown(f"{kind}.{name} is one of your own")
    found = {}
    for name, what in wanted.items():
        if name in _MOMENTA and not hasattr(scheduler, name):
            found[name] = _WITHOUT[what]
            continue
        x = getattr(scheduler, name)
        if what == "counts" and isinstance(x, Counter):
            x = [[k, x[k]] for k in sorted(x)]
        elif what == "float" and type(x) is int:
            x = float(x)
        elif what in ("numbers", "ints") and isinstance(x, tuple):
            x = [*x]
        found[name] = x
    written = attributes_json(found)
    try:
        again = _read_attributes(kind, Item(written, kind))
    except Damaged as error:
        raise Unknown(str(error)) from error
    return again


# ---- as JSON


def attributes_json(x: object) -> object:
    """Attributes as JSON has them."""
    if type(x) is float:
        return number_text(x)
    if isinstance(x, (list, tuple)):
        return [attributes_json(i) for i in x]
    return {k: attributes_json(i) for k, i in x.items()} if isinstance(x, dict) else x


def schedules_json(schedules: SavedSchedules) -> dict[str, object]:
    """What the manifest says of the schedules."""
    return {
        "optimizers": [list(groups) for groups in schedules.optimizers],
        "schedulers": [
            {
                "kind": s.kind,
                "optimizer": s.optimizer,
                "inner": list(s.inner),
                "attributes": attributes_json(s.attributes),
            }
            for s in schedules.schedulers
        ],
    }


def read_schedules(item: Item, numbers: Mapping[str, object]) -> SavedSchedules:
    """Schedules of a manifest, over these numbers of the step. Raises Damaged."""
    said = item.table("optimizers", "schedulers")
    optimizers = tuple(
        tuple(_read_group(group, numbers) for group in groups.rows())
        for groups in said["optimizers"].rows()
    )
    schedulers = []
    for i, row in enumerate(said["schedulers"].rows()):
        of = row.table("kind", "optimizer", "inner", "attributes")
        kind = of["kind"].text(*_KINDS)
        inner = of["inner"].wholes(below=i)
        if bool(inner) != (kind in ("SequentialLR", "ChainedScheduler")):
            raise row.wrong("a scheduler with others in it, if it is one of those")
        attributes = _read_attributes(kind, of["attributes"])
        if kind == "SequentialLR" and len(attributes["_milestones"]) + 1 != len(inner):
            raise row.wrong("schedulers one after another")
        optimizer = of["optimizer"].whole(below=len(optimizers))
        schedulers.append(SavedScheduler(kind, optimizer, inner, attributes))
    return SavedSchedules(optimizers, tuple(schedulers))


def _read_group(item: Item, numbers: Mapping[str, object]) -> Group:
    found: Group = {}
    for key, x in item.items().items():
        what, of = x.rows(2)
        match what.text("number", "numbers", "value"):
            case "number":
                found[key] = ["number", of.text(*numbers)]
            case "numbers":
                found[key] = ["numbers", [name.text(*numbers) for name in of.rows()]]
            case _:
                if type(of.value) not in _PLAIN:
                    raise of.wrong("a truth value, a text or nothing")
                found[key] = ["value", of.value]
    return found


def _read_attributes(kind: str, item: Item) -> dict[str, object]:
    wanted = _KINDS[kind]
    said = item.table(*wanted)
    return {name: _read(said[name], what) for name, what in wanted.items()}


def _read(item: Item, what: str | tuple[str, ...]) -> object:
    if isinstance(what, tuple):
        return item.text(*what)
    match what:
        case "number" | "float":
            x = item.number()
            if type(x) is int:
                x = item.whole(LIMIT, -LIMIT)
            return float(x) if what == "float" else x
        case "int":
            return item.whole(LIMIT, -LIMIT)
        case "bool":
            return item.flag()
        case "numbers":
            return [_read(x, "number") for x in item.rows()]
        case "ints":
            return [*item.wholes(least=-LIMIT)]
        case "counts":
            return [[*pair.wholes()] for pair in item.rows() if len(pair.rows(2)) == 2]
        case "phases":
            return [{key: _phase(x) for key, x in phase.items().items()} for phase in item.rows()]
    if item.value is not None:
        raise item.wrong("nothing")
    return None


def _phase(item: Item) -> object:
    return item.value if type(item.value) is str else _read(item, "number")


# ---- objects again


class _Optimizer:
    """What a scheduler asks of its optimizer: param groups, and that it has stepped."""

    _opt_called = True

    def __init__(self, groups: Sequence[Group]):
        self.sources = groups
        self.param_groups: list[dict] = [{} for _ in groups]

    def step(self) -> None:
        """A scheduler looks whether there is one."""

    step._wrapped_by_lr_sched = True


class Schedules:
    """Schedulers of torch over the numbers of a loaded step."""

    def __init__(self, saved: SavedSchedules, numbers: dict[str, int | float]):
        self.saved, self.numbers = saved, numbers
        self._optimizers = [_Optimizer(groups) for groups in saved.optimizers]
        self.schedulers: list = []
        for s in saved.schedulers:
            self.schedulers.append(self._made(s))

    def _made(self, s: SavedScheduler) -> object:
        kind = getattr(lr_scheduler, s.kind)
        made = kind.__new__(kind)
        given = dict(s.attributes)
        if "milestones" in given:
            given["milestones"] = Counter(dict(given["milestones"]))
        if "_schedule_phases" in given:
            given["_schedule_phases"] = [dict(phase) for phase in given["_schedule_phases"]]
        given = {name: [*x] if type(x) is list else x for name, x in given.items()}
        vars(made).update(given, optimizer=self._optimizers[s.optimizer])
        if s.inner:
            made._schedulers = [self.schedulers[i] for i in s.inner]
        if s.kind == "CyclicLR":
            made._init_scale_fn()
        return made

    def step(self, callback: SavedCallback, args: Sequence, kwargs: Mapping[str, object]) -> None:
        """Make a call of a scheduler's step: the numbers change."""
        for optimizer in self._optimizers:
            for group, sources in zip(optimizer.param_groups, optimizer.sources, strict=True):
                for key, (what, of) in sources.items():
                    group[key] = self._held(what, of)
        self.schedulers[callback.scheduler].step(*args, **kwargs)
        for optimizer in self._optimizers:
            for group, sources in zip(optimizer.param_groups, optimizer.sources, strict=True):
                for key, (what, of) in sources.items():
                    if what == "number":
                        self.numbers[of] = group[key]
                    elif what == "numbers":
                        self.numbers.update(zip(of, group[key], strict=True))

    def _held(self, what: str, of: object) -> object:
        if what == "number":
            return self.numbers[of]
        return tuple([self.numbers[name] for name in of]) if what == "numbers" else of

    def now(self) -> SavedSchedules:
        """What a file keeps of them now."""
        schedulers = tuple(
            SavedScheduler(s.kind, s.optimizer, s.inner, taken(x))
            for s, x in zip(self.saved.schedulers, self.schedulers, strict=True)
        )
        return SavedSchedules(self.saved.optimizers, schedulers)

    def remembered(self) -> Callable[[], None]:
        """A function that puts schedulers and numbers back as they are now."""
        before = [(x, {**vars(x)}) for x in self.schedulers]
        numbers = dict(self.numbers)

        def put_back() -> None:
            for x, attributes in before:
                vars(x).clear()
                vars(x).update(attributes)
            self.numbers.clear()
            self.numbers.update(numbers)

        return put_back


class Stepping:
    """The calls that a plan of a loaded step makes of its schedulers: what `run.py` calls."""

    may_fail = False

    def __init__(
        self,
        schedules: Schedules,
        callbacks: Sequence[SavedCallback],
        operands: Sequence[Sequence[tuple[int | str, int]]],
        left: Sequence[tuple[int, int, str]],
    ):
        """operands: of the effects, per callback. left: (scalar, callback, number): a scalar that
        is a number as a callback leaves it."""
        self._schedules, self._callbacks = schedules, callbacks
        self._places = [[at for at, _ in places] for places in operands]
        self._left = left

    def remember(self) -> Callable[[], None]:
        """What `put_back` takes."""
        return self._schedules.remembered()

    @staticmethod
    def put_back(remembered: Callable[[], None]) -> None:
        """The calls have not been made."""
        remembered()

    take_back = put_back

    def __call__(self, n: int, scalars: list, *numbers: float) -> bool:
        """Make the n-th call, with these numbers among its arguments; fill in what it leaves."""
        callback = self._callbacks[n]
        args, kwargs = arguments_of(callback.args, callback.kwargs, self._places[n], numbers)
        self._schedules.step(callback, args, kwargs)
        for i, of, name in self._left:
            if of == n:
                scalars[i] = float(self._schedules.numbers[name])
        return False
