"""Which torch call of a step a rule of capture gets wrong, or the derivative of which.

    the step, eagerly and traced, both under a `Probe` → what each call gave, and the gradient that
    arrived there → the first call that differs

A Probe is a mode of torch's: it sees each torch call of the user's code and of optimizers. The
trace is of the step under the probe, and returns all that the probe has seen, so that the IR's
evaluator gives the values; no pass, schedule or kernel takes part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import field

import numpy as np
import torch
from torch.overrides import TorchFunctionMode, resolve_name

from tracejit.capture.capture import capture_call
from tracejit.capture.trace import location
from tracejit.capture.trace.tensor import tensors_of
from tracejit.equality import EPS, array_of
from tracejit.ir.magnitudes import magnitudes
from tracejit.ir.on_tensors import results_on_numpy
from tracejit.records import dataclass
from tracejit.verify.before import Before
from tracejit.verify.blame import Blame
from tracejit.verify.runs import eagerly

_SURELY, _OFF = 2.0**14, 256.0  # eps of its norm that a value may be off
_MOST = 5000  # calls that are looked at


@dataclass
class Called:
    """One torch call: its function, the user's line, the places of what it took and gave."""

    name: str
    line: str
    took: list[int]
    gave: list[int]


@dataclass
class Log:
    """What a probe has seen: calls, the values that they gave, and the gradients there."""

    calls: list[Called] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    grads: dict[int, torch.Tensor] = field(default_factory=dict)  # of values, by place
    kept: list[object] = field(default_factory=list)
    at: dict[int, int] = field(default_factory=dict)  # id of a tensor -> place of its value
    leaves: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    of_leaves: dict[str, torch.Tensor] = field(default_factory=dict)
    readers: dict[str, list[int]] = field(default_factory=dict)  # of leaves: calls

    def flat(self) -> list[torch.Tensor]:
        """All tensors in a fixed order."""
        grads = [self.grads[i] for i in sorted(self.grads)]
        return [*self.values, *grads, *(self.of_leaves[k] for k in sorted(self.of_leaves))]


class Probe(TorchFunctionMode):
    """Notes each torch call in a log."""

    def __init__(self, log: Log):
        super().__init__()
        self.log = log
        self._names = {id(t): name for name, t in log.leaves}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        log = self.log
        if len(log.calls) >= _MOST:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        line = location.full()
        given = tensors_of((args, tuple(kwargs.values())))
        took = [log.at[id(t)] for t in given if id(t) in log.at]
        out = func(*args, **kwargs)
        if name in _SILENT:
            return out
        leaf = {self._names[id(t)] for t in given if id(t) in self._names}
        made = tensors_of(out) if out is not None else tensors_of(args[:1])
        call = Called(_name(func), line, took, [])
        for t in made:
            call.gave.append(len(log.values))
            self._note(t)
        for each in leaf:
            log.readers.setdefault(each, []).append(len(log.calls))
        log.calls.append(call)
        if name == "grad":
            inputs = kwargs.get("inputs", args[1] if len(args) > 1 else ())
            for t, g in zip(tensors_of(inputs), made, strict=False):
                if id(t) in self._names:
                    log.of_leaves[self._names[id(t)]] = g.detach().clone()
        if name == "backward":
            for label, t in log.leaves:
                if t.is_leaf and t.grad is not None:
                    log.of_leaves[label] = t.grad.detach().clone()
        return out

    def _note(self, t: torch.Tensor) -> None:
        log = self.log
        place = len(log.values)
        log.values.append(t.detach().clone())
        log.kept.append(t)
        log.at[id(t)] = place
        if t.requires_grad and not t.is_leaf and t.is_floating_point():

            def arrived(g: torch.Tensor, place: int = place) -> None:
                log.grads[place] = g.detach().clone()

            t.register_hook(arrived)


# functions whose float64 in eager is exact to so much of its norm only: an expansion near x = a
_INEXACT = dict.fromkeys(("igamma", "igammac", "gammainc", "gammaincc"), 1e-8)
_BACKWARD = ("backward", "grad")
_SILENT = frozenset({"detach", "register_hook", "requires_grad_", "__get__", "size", "dim", "item"})


def _name(func: Callable) -> str:
    try:
        return resolve_name(func) or getattr(func, "__name__", str(func))
    except Exception:
        return getattr(func, "__name__", str(func))


def of_rules(
    before: Before, names: dict[int, str], function: Callable, args: tuple, kwargs: dict
) -> Blame | None:
    """Blame for a torch call that the captured graph computes otherwise than eager, or whose
    derivative; None where there is none, or the step cannot be looked at in this way. The state is
    that before the call, and is so afterwards."""
    leaves = [
        (names.get(id(t), f"tensor {i}"), t)
        for i, t in enumerate(before.tensors)
        if t.is_leaf and t.requires_grad
    ]
    try:
        eager = Log(leaves=leaves)
        with Probe(eager), eagerly():
            function(*args, **kwargs)
        wanted = [t.detach().clone() for t in eager.flat()]
        before.restore()
        ours = Log(leaves=leaves)

        def probed(*args, **kwargs):
            with Probe(ours):
                function(*args, **kwargs)
            return ours.flat()

        done = capture_call(probed, args, kwargs)
        places, labels = sorted(ours.grads), sorted(ours.of_leaves)  # before they are scrubbed
        graph = done.captured.graph
        inputs = [
            done.call.reals[i] if kind == "tensor" else done.call.scalars[i]
            for kind, i in done.captured.sources
            if kind in ("tensor", "scalar")
        ]
        if len(inputs) != len(graph.params):
            return None
        found = results_on_numpy(graph, inputs)
        grown = magnitudes(graph, [array_of(x) for x in inputs])
        sizes = [float(np.linalg.norm(grown[r.value])) for r in graph.results]
        effects, pairs = done.captured.effects, list(zip(found, sizes, strict=True))
        made = [effects.made[slot.index] for slot in effects.returned.items]
        values = [
            pairs[m.index] if m.kind == "output" and found[m.index].shape == m.shape else None
            for m in made
        ]
        done.call.undo()
    except Exception:  # eager or the trace takes the step otherwise under a probe
        return None
    finally:
        before.restore()
    return _first(eager, ours.calls, wanted, values, places, labels)


def _first(
    eager: Log,
    calls: Sequence[Called],
    wanted: Sequence[torch.Tensor],
    found: Sequence[tuple | None],
    places: Sequence[int],
    labels: Sequence[str],
) -> Blame | None:
    """Blame by what the evaluator gives for the trace's `calls`, for gradients at `places` and of
    leaves with these `labels`."""
    count = len(eager.values)
    shape = [(c.name, len(c.gave)) for c in eager.calls]
    if shape != [(c.name, len(c.gave)) for c in calls]:
        for a, b in zip(eager.calls, calls, strict=False):
            if (a.name, len(a.gave)) != (b.name, len(b.gave)):
                what = f"the trace calls {b.name} where eager calls {a.name}"
                return Blame("rules", what, a.line)
        return None
    if len(found) != count + len(places) + len(labels):
        return None
    gradients = dict(zip(places, found[count:], strict=False))
    leaves = dict(zip(labels, found[count + len(places) :], strict=True))
    for factor in (_SURELY, _OFF):
        wrong = [_far(a, b, factor) for a, b in zip(found[:count], wanted[:count], strict=True)]
        names = [call.name.rpartition(".")[2] for call in eager.calls]
        backwards = [k for k, name in enumerate(names) if name in _BACKWARD]
        forward = backwards[0] if backwards else len(names)
        for call in eager.calls[:forward]:
            if any(wrong[i] for i in call.gave):
                what = f"{call.name} is computed otherwise than by eager"
                pairs = [(found[i], wanted[i]) for i in call.gave if wrong[i]]
                return Blame("rules", what, call.line, free=_free(call, wrong, pairs))
        off = {
            p
            for p in sorted(eager.grads.keys() & gradients.keys())
            if _far(gradients[p], eager.grads[p], factor)
        }
        for place in sorted(off, reverse=True):  # in the order of the backward pass
            users = [c for c in eager.calls if place in c.took]
            right = [c for c in users if not off.intersection(c.gave)]
            call = (right or users or [_giver(eager, place)])[0]
            return Blame("rules", f"the derivative of {call.name} is not eager's", call.line)
        for label in sorted(eager.of_leaves.keys() & leaves.keys()):
            readers = [eager.calls[i] for i in eager.readers.get(label, ())]
            if readers and _far(leaves[label], eager.of_leaves[label], factor):
                what = f"the derivative of {readers[0].name} by {label} is not eager's"
                return Blame("rules", what, readers[0].line)
        for call in eager.calls[forward:]:
            if any(wrong[i] for i in call.gave):
                return Blame("rules", f"{call.name} is computed otherwise than by eager", call.line)
    return None


def _free(call: Called, wrong: Sequence[bool], pairs: Sequence[tuple]) -> str:
    """Why what a call gives may be another than eager's, which is as right. `pairs`: ours and
    eager's where they differ."""
    name = call.name.rpartition(".")[2]
    if name == "mode" and not wrong[call.gave[0]]:
        return "torch leaves open at which of equal elements it finds a mode"
    if name in _INEXACT and not any(_far(a, b, _INEXACT[name] / EPS[b.dtype]) for a, b in pairs):
        return f"torch's own float64 of {name} is exact to {_INEXACT[name]:.0e} only"
    return ""


def _giver(log: Log, place: int) -> Called:
    return next(c for c in log.calls if place in c.gave)


def _far(ours: tuple[torch.Tensor, float] | None, b: torch.Tensor, factor: float) -> bool:
    if ours is None:
        return False
    a, size = ours
    if a.shape != b.shape:
        return True
    if not b.is_floating_point():
        return not torch.equal(a.to(b.dtype), b)
    x, y = a.double(), b.double()
    finite = y.isfinite()
    if not torch.equal(x.isfinite(), finite):
        return True
    zero = torch.zeros((), dtype=torch.float64)
    off, norm = (torch.where(finite, z, zero).norm() for z in (x - y, y))
    grown = off > 16 * EPS[b.dtype] * size or not math.isfinite(size)
    return bool(off > factor * EPS[b.dtype] * norm + 1e-30 and grown)
