"""Writes between a torch function and its backward: where eager refuses, and where we do.

A case is a sample of a function, which of its tensors require grad, which of its arguments and
results is written to once it was called, and how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from support.function_checks import ERRORS, is_in_place, writes_its_leaf
from support.function_samples import Sample
from support.function_samples_matrices import signless
from tracejit.capture.trace.tensor import tensors_of
from tracejit.capture.trace.versions import RESULT, Saved, parameters
from tracejit.errors import AutogradError, UnsupportedOperation

SAVED = "modified by an inplace operation"


@dataclass(frozen=True)
class Case:
    """`grads`: which floating-point tensors require grad, in order. `written`: which tensor, of the
    arguments and then the results; `how`: "quietly" under no_grad, or "with history"."""

    function: Callable
    sample: Sample
    grads: tuple[int, ...]
    written: int
    how: str = "quietly"


class Run:
    """One run of a case: `call`, then `write`, then `backward`."""

    def __init__(self, case: Case):
        self.case = case
        self.args, self.kwargs = case.sample.fresh()
        floats = [x for _, x in self.given() if x.is_floating_point()]
        for i in case.grads:
            floats[i].requires_grad_()
        self.in_place = is_in_place(case.function)

    def given(self) -> Iterator[tuple[int | str, torch.Tensor]]:
        """The tensors among the arguments, each with the place of its argument."""
        for i, x in enumerate(self.args):
            yield from ((i, x) for x in tensors_of(x))
        names = parameters(self.case.function)
        for name, x in self.kwargs.items():
            place = names.index(name) if name in names else name
            yield from ((place, x) for x in tensors_of(x))

    def call(self) -> list[torch.Tensor]:
        """Call the function; its results that a backward can start at."""
        args = self.args
        if self.in_place:
            args = (args[0].clone(), *args[1:])
        self.out = signless(self.case.function)(*args, **self.kwargs)
        results = tensors_of(args[0] if self.in_place else self.out)
        self.places = [
            (place, args[0] if self.in_place and x is self.args[0] else x)
            for place, x in self.given()
        ]
        self.places += [(f"r{i}", x) for i, x in enumerate(tensors_of(self.out))]
        self.tensors: list[torch.Tensor] = []
        for _, x in self.places:
            if not any(x is y for y in self.tensors):
                self.tensors.append(x)
        return [x for x in results if x.is_floating_point() and x.requires_grad]

    def write(self) -> None:
        """Write what is there already."""
        x = self.tensors[self.case.written]
        if self.case.how == "with history":
            x.mul_(1)
        else:
            with torch.no_grad():
                x.copy_(x.clone())


def inside(run: Run) -> Callable[[], None]:
    """The step that does all of it."""

    def step() -> None:
        roots = run.call()
        run.write()
        backward(roots)

    return step


def backward(roots: list[torch.Tensor]) -> None:
    torch.autograd.backward(roots, [torch.ones_like(x).contiguous() for x in roots])


def ended(run: Callable[[], object]) -> tuple[str, Exception | None]:
    """How something ends: "ok", "saved" where what was saved was written to, "refused" where we do
    not support it, "raises" otherwise."""
    torch.default_generator.manual_seed(11)
    try:
        run()
    except UnsupportedOperation as error:
        return "refused", error
    except ERRORS as error:
        if "is not supported inside a compiled step" in str(error):
            return "refused", error
        return ("saved" if SAVED in str(error) else "raises"), error
    return "ok", None


def sets_of_grads(count: int) -> list[tuple[int, ...]]:
    """All, and each alone."""
    return [tuple(range(count)), *((i,) for i in range(count) if count > 1)] if count else []


def cases(function: Callable, sample: Sample) -> Iterator[Case]:
    """The cases of a sample that eager can call, write, and go backward through otherwise."""
    args, kwargs = sample.fresh()
    if sample.refused or writes_its_leaf(function, args, kwargs):
        return
    if is_in_place(function) and not isinstance(args[0], torch.Tensor):
        return
    floats = [x for x in tensors_of((*args, *kwargs.values())) if x.is_floating_point()]
    for grads in sets_of_grads(len(floats)):
        run = Run(Case(function, sample, grads, 0))
        roots: list[torch.Tensor] = []
        how, _ = ended(lambda run=run, roots=roots: (roots.extend(run.call()), backward(roots)))
        if how != "ok" or not roots:
            continue
        given = [x for _, x in run.given()]
        for i, x in enumerate(run.tensors):
            yield Case(function, sample, grads, i)
            if not any(x is y for y in given):
                yield Case(function, sample, grads, i, "with history")


def in_eager(case: Case) -> tuple[str, Exception | None] | None:
    """How a case ends in eager; None if the tensor cannot be written to."""
    run, roots = Run(case), []
    if ended(lambda: (roots.extend(run.call()), run.write()))[0] != "ok":
        return None
    return ended(lambda: backward(roots))


def is_same(ours: tuple[str, Exception | None], eager: tuple[str, Exception | None]) -> bool:
    """Whether a case ends alike, or is refused as what we do not support."""
    if ours[0] == "refused" or ours[0] == eager[0] == "ok":
        return True
    return eager[0] != "ok" and isinstance(ours[1], AutogradError)


def listed(saved: Saved, run: Run) -> bool:
    """Whether the tensor that is written to is one that torch saves by our table."""
    x = run.tensors[run.case.written]
    places = {place for place, y in run.places if y is x}
    required = {place for place, y in run.given() if y.requires_grad}
    return any(
        (when is None or when in required) and any(_is_at(p, place) for p in places)
        for place, when in saved.places
    )


def _is_at(found: int | str, place: int) -> bool:
    """Whether a tensor's place is one of the table's."""
    if place >= 0:
        return found == place
    is_result = isinstance(found, str) and found[0] == "r" and found[1:].isdigit()
    return is_result and (place == RESULT or int(found[1:]) == -2 - place)
