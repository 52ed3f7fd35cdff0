"""`tracejit.load`: a step from a file, which runs without the code that it was made of.

    a file  →  entries  →  SavedStep  →  LoadedStep: calls, as replays of its plans

Nothing of a file is run. Graphs and effects are parsed and looked at (`soundness.py`); plans and
kernels are made from them here, as for any step, when a call first needs them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tracejit.capture.trace import location
from tracejit.capture.trace.active import current
from tracejit.capture.trace.draws import default_generator
from tracejit.errors import CallError, SavedFileError, SideEffectError
from tracejit.forks import own_lock
from tracejit.options import Options
from tracejit.pipeline import Pipeline, Stats
from tracejit.run import OTHERWISE
from tracejit.runtime.cache import Bodies, provide
from tracejit.runtime.memory import Memory
from tracejit.saved import archive
from tracejit.saved.archive import Damaged
from tracejit.saved.devices import devices_of_state, moved
from tracejit.saved.loaded_plan import LoadedPlan, State
from tracejit.saved.manifest import entries_of, objects_of, step_of
from tracejit.saved.objects import gathered
from tracejit.saved.record import SavedGenerator, SavedStep
from tracejit.saved.schedules import Schedules
from tracejit.saved.tensors import copy_once

_LONGEST = 400  # of what an error quotes from a file


def load(
    path: str | os.PathLike,
    *,
    backend: str = "auto",
    device: str | torch.device | None = None,
    trust: bool = False,
) -> LoadedStep:
    """The step that `step.save(path)` has put in a file, with its parameters and its state.

    backend: as of `tracejit.compile`.
    device:  "cpu" or "cuda:0", for a step that was saved on another one.
    trust:   use the compiled objects of a file (`step.save(path, objects=True)`) even if it is not
        signed by this user's key: they are code, and whoever wrote the file can do what you can.

    Else no code of the file is run: its graphs are parsed and checked, and kernels are compiled
    from them, when a call first needs them. Raises SavedFileError for a file that is damaged, is no
    saved step, or was written by a later version; OSError where it cannot be read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            entries = archive.read(file)
        step = step_of(entries)
        objects, why = objects_of(entries, trust=trust)
        step = _placed(step if device is None else moved(step, device))
    except OSError:
        raise
    except Exception as error:  # whatever a reader comes by, the file is to blame
        reason = str(error) or type(error).__name__
        reason = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]} …"
        raise SavedFileError(path=path, reason=reason) from error
    loaded = LoadedStep(step, backend)
    if objects:
        weakref.finalize(loaded, provide(objects))
    if objects or why:
        counts = f"{len(objects)} of its compiled objects may be used"
        loaded.objects = f"its compiled objects are not used: {why}" if why else counts
    return loaded


def save(
    path: str | os.PathLike, step: SavedStep, *, objects: bool = False, backend: str = "auto"
) -> None:
    """Write a file, which appears as a whole or not at all; with compiled objects for a backend of
    this machine, if they are asked for. Raises OSError."""
    compiled = LoadedStep(step, backend).compiled() if objects else None
    archive.write(Path(path), entries_of(step, f"tracejit {_version()}", compiled))


def _version() -> str:
    try:
        return version("tracejit")
    except PackageNotFoundError:  # its sources, not installed
        return "of no version"


class LoadedStep:
    """A step from a file: `loaded(x, y)` does what the step did that was saved.

    Arguments are those of the step that was saved, by their places or names; objects such as
    models are left out. Plans are picked by the shapes and dtypes of tensors, and by plain values.
    The numbers that the step reads of its surroundings, such as learning rates, are `numbers`, and
    keyword arguments of a call that is to take others: `loaded(x, y, lr=0.01)`; a short name will
    do where only one number has it. What the step changes is `state_dict()` and `numbers`.

    Random numbers are drawn as by the running step: from torch's default generators of this
    process, or from generators of its own, whose states are in the file.

    `objects` says what became of the compiled objects of its file, if there are some.

    Safe to call from several threads; calls run one after another.
    """

    objects = "its file has no compiled objects"

    def __init__(self, step: SavedStep, backend: str = "auto"):
        options = Options(
            backend=backend,
            fuse=step.options["fuse"],
            remat=step.options["remat"],
            on_unsupported="raise",
        )
        self.name = self.__name__ = step.name
        self.stats = Stats()
        self._saved, self._backend = step, backend
        own_lock(self, "_lock", threading.RLock)
        self._state = _state_of(step)
        name = step.name if step.name.isidentifier() else "step"
        pipeline = Pipeline(name, f"the loaded step {step.name}", self.stats, options)
        self._pipeline = pipeline
        precision, memory = step.options["precision"], Memory()
        self._plans = [LoadedPlan(p, self._state, pipeline, precision, memory) for p in step.plans]

    def __repr__(self) -> str:
        calls = ", or ".join(dict.fromkeys(plan.call_text(self.name) for plan in self._plans))
        return f"<loaded step of {len(self._plans)} plan(s): {calls}>"

    # ---- calls

    def __call__(self, /, *args: object, **kwargs: object) -> object:
        """Do the step. Raises CallError where no plan takes such a call: nothing is changed then;
        and what the step raised for values that eager refuses."""
        if current() is not None:
            raise SideEffectError(
                where=location.full(),
                reason=f"the loaded step {self.name} is called inside a step that is being traced",
                remedy="Call it outside the compiled step",
            )
        if torch.is_inference_mode_enabled():
            raise CallError(step=self.name, reason="it cannot run in inference mode: use no_grad")
        with self._lock:
            reasons = []
            for plan in tuple(self._plans):
                run = plan.bind(args, kwargs)
                if type(run) is str:
                    reasons.append(run)
                    continue
                returned = run()
                if returned is OTHERWISE:
                    reasons.append(plan.otherwise())
                    continue
                if plan is not self._plans[0]:
                    self._plans.remove(plan)
                    self._plans.insert(0, plan)
                return returned
            raise CallError(step=self.name, reason=_together(reasons))

    # ---- state

    @property
    def numbers(self) -> dict[str, int | float]:
        """The numbers that the step reads of its surroundings, and assigns there, by name:
        `optimizer.param_groups[0].lr`. To be changed as one likes, by numbers."""
        return self._state.numbers

    @property
    def lists(self) -> dict[str, list]:
        """What calls have appended to lists of the step's surroundings since it was loaded, by the
        names of these: `losses`. To be cleared as one likes."""
        return self._state.lists

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters, buffers, optimizer state and other tensors of the step, by the names that
        they had in its code, and gradients that there are now, as `….grad`. They share memory with
        the step's own, as those of a module do, until the step replaces them."""
        with self._lock:
            return {name: tensor.detach() for name, tensor in self._named().items()}

    def _named(self) -> dict[str, torch.Tensor]:
        found = dict(self._state.tensors)
        for name, tensor in self._state.tensors.items():
            if tensor.is_leaf and tensor.grad is not None:
                found[f"{name}.grad"] = tensor.grad
        return found

    def load_state_dict(self, state: Mapping[str, torch.Tensor], *, strict: bool = True) -> None:
        """Copy tensors into the state, by name; gradients that are not given are cleared.

        Raises CallError, with nothing changed, for a tensor of another shape or dtype, or a name
        that there is not; and, unless `strict` is False, where one is missing. Then what is not
        given, and what has no place, is left alone.
        """
        with self._lock:
            tensors = self._state.tensors
            places = {**tensors, **{f"{name}.grad": t for name, t in tensors.items()}}
            unknown = sorted(state.keys() - places.keys())
            missing = sorted(tensors.keys() - state.keys())
            if strict and (unknown or missing):
                said = [f"there is no {x}" for x in unknown] + [f"{x} is missing" for x in missing]
                raise CallError(step=self.name, reason="; ".join(said[:8]))
            given = {name: x for name, x in state.items() if name in places}
            for name, x in given.items():
                if (x.shape, x.dtype) != (places[name].shape, places[name].dtype):
                    kinds = " and ".join(f"{t.dtype}{[*t.shape]}" for t in (x, places[name]))
                    raise CallError(step=self.name, reason=f"{name}: {kinds} do not match")
            with torch.no_grad():
                for name, tensor in tensors.items():
                    if name in given:
                        copy_once(tensor, given[name])
                    gradient = given.get(f"{name}.grad")
                    if strict or gradient is not None:
                        tensor.grad = _like(gradient, tensor)

    def zero_grad(self) -> None:
        """Clear all gradients, for a step that had it done outside."""
        with self._lock:
            for tensor in self._state.tensors.values():
                tensor.grad = None

    def compiled(self) -> Bodies:
        """What a file has of it besides, as entries of the disk cache: all of it is compiled."""
        with self._lock:
            precision = self._saved.options["precision"]
            return gathered(self._plans, self._pipeline, precision)

    def save(self, path: str | os.PathLike, *, objects: bool = False) -> None:
        """Put the step into a file again, as it is now; with compiled `objects`, if so. Raises
        OSError."""
        with self._lock:
            save(path, self._now(), objects=objects, backend=self._backend)

    def _now(self) -> SavedStep:
        named = self._named()
        gradients = {name: f"{name}.grad" for name in named if f"{name}.grad" in named}
        kept = {"tensors": named, "gradients": gradients, "numbers": dict(self.numbers)}
        kept["schedules"] = self._state.schedules.now()
        generators = [
            SavedGenerator(old.device, None if old.state is None else g.get_state())
            for old, g in zip(self._saved.generators, self._state.generators, strict=True)
        ]
        fields = {name: getattr(self._saved, name) for name in SavedStep.__dataclass_fields__}
        return SavedStep(**{**fields, **kept, "generators": tuple(generators)})


def _placed(step: SavedStep) -> SavedStep:
    """The step with its tensors where its plans want them."""
    places = devices_of_state(step)
    if any(place != "cpu" for place in places.values()) and not torch.cuda.is_available():
        raise Damaged("its tensors are on a GPU, and here is none that torch can use; device='cpu'")
    tensors = {}
    for name, tensor in step.tensors.items():
        there = tensor.detach().to(places.get(name, "cpu"))
        tensors[name] = there.requires_grad_(tensor.requires_grad)
    return replace(step, tensors=tensors)


def _state_of(step: SavedStep) -> State:
    """The tensors, numbers and generators of a step, for it to change."""
    gradients = {*step.gradients.values()}
    for name, grad in step.gradients.items():
        step.tensors[name].grad = step.tensors[grad]
    tensors = {name: tensor for name, tensor in step.tensors.items() if name not in gradients}
    generators = []
    for saved in step.generators:
        if saved.state is None:
            generators.append(default_generator(saved.device))
        else:
            generators.append(torch.Generator(saved.device))
            generators[-1].set_state(saved.state)
    numbers = dict(step.numbers)
    lists: dict[str, list] = {name: [] for name in step.lists}
    schedules = Schedules(step.schedules, numbers)
    return State(tensors, numbers, generators, schedules, lists, step.asked)


def _like(gradient: torch.Tensor | None, tensor: torch.Tensor) -> torch.Tensor | None:
    """A copy of a gradient, laid out as its tensor."""
    if gradient is None:
        return None
    return torch.empty_like(tensor, requires_grad=False).copy_(gradient)


def _together(reasons: list[str]) -> str:
    """Why no plan takes a call."""
    different = list(dict.fromkeys(reasons))
    if len(different) == 1:
        return different[0]
    listed = "".join(f"\n  {reason}" for reason in different[:8])
    return f"none of its {len(reasons)} plans takes this call:{listed}"
