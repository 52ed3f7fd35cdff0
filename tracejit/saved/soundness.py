"""Whether a step that was read from a file is one: nothing in it may lead out of its memory.

In: a SavedStep as it was parsed. Out: nothing, or an error. Types of graphs are inferred anew,
every position is looked at, and every view is within its memory. So what is compiled and run later
is no more than a step: it reads and writes its own tensors and the arguments of the call.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Sequence

import torch

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.late import among, cuts_behind
from tracejit.capture.signature import leaves
from tracejit.capture.trace.draws import Draw, Keep, Restore, Seed, Together
from tracejit.capture.trace.tensor import extent, is_dense
from tracejit.errors import TracejitError
from tracejit.ir.graph import Arg, Graph, Param, Value
from tracejit.ir.torch_types import TO_IR
from tracejit.ir.types import Type, contiguous_strides
from tracejit.saved.archive import Damaged
from tracejit.saved.plans import operands
from tracejit.saved.record import (
    GivenNumber,
    GivenTensor,
    SavedPlan,
    SavedStep,
    Spec,
)
from tracejit.saved.sound_effects import check_effects
from tracejit.saved.sound_graphs import (
    DEVICE,
    NAME,
    check_graph,
    check_layout,
    check_view,
    layout,
    need,
)

MOST_LISTS = 1000
_FILLS = {  # the methods of tensors that draw, and their arguments by name
    "bernoulli_": {"p"},
    "uniform_": {"from", "to"},
    "normal_": {"mean", "std"},
    "exponential_": {"lambd"},
    "log_normal_": {"mean", "std"},
    "cauchy_": {"median", "sigma"},
    "geometric_": {"p"},
    "random_": {"from", "to"},
    "randperm": {"n"},
}


def check_step(step: SavedStep) -> None:
    """Raise Damaged or InvalidGraph unless everything in a step fits together."""
    need(NAME.fullmatch(step.name), f"no step is named {step.name[:50]!r}")
    need(step.plans, "it has no plan")
    for name, grad in step.gradients.items():
        tensor, grad = step.tensors[name], step.tensors[grad]
        need((tensor.dtype, tensor.shape) == (grad.dtype, grad.shape), f"the gradient of {name}")
    need(len({*step.gradients.values()}) == len(step.gradients), "one gradient of two tensors")
    need(len({*step.lists}) == len(step.lists) <= MOST_LISTS, "lists have names of their own")
    need(step.asked.keys() <= step.numbers.keys(), "there is no number that it asks for")
    for generator in step.generators:
        need(DEVICE.fullmatch(generator.device), f"no device is named {generator.device[:50]!r}")
    for i, plan in enumerate(step.plans):
        try:
            _Plan(step, plan).check()
        except Damaged as error:
            raise Damaged(f"plan {i}: {error}") from error


class _Plan:
    def __init__(self, step: SavedStep, plan: SavedPlan):
        self.step, self.plan, self.captured = step, plan, plan.captured
        self.specs = [spec for _, spec in plan.tensors]
        self.found: dict[int, tuple] = {}  # what graphs take of what is found by value

    def check(self) -> None:
        c = self.captured
        check_graph(c.graph)
        self._tensors()
        self._arguments()
        self._scalars()
        self._draws()
        self._callbacks()
        need(c.graph.name == self.step.name, "its graph has another name than the step")
        self._sources(c.sources, c.graph)
        self._bounds()
        self._cuts()
        if c.checks is not None:
            self._checks()
        check_effects(self.step, self.plan)

    # ---- inputs

    def _tensors(self) -> None:
        state, seen = self.step.tensors, set()
        for k, (place, spec) in enumerate(self.plan.tensors):
            _check_spec(spec)
            if place.kind == "state":
                need(place.key in state, f"there is no tensor {place.key!r}")
                need(_spec_of(state[place.key], spec) == spec, f"{place.key!r} is no {spec}")
                need(place.key not in seen, f"{place.key!r} is there twice")
                seen.add(place.key)
            elif place.kind == "grad":
                owner = place.key < len(self.specs) and self.plan.tensors[place.key][0]
                need(owner and owner.kind != "grad", "a gradient of a gradient")
                need((place.key, k) in self.captured.grads_read, "a gradient is not read")
            else:
                need(place.kind == "argument", f"no tensor comes from a {place.kind}")
        owners = [i for i, _ in self.captured.grads_read]
        need(len({*owners}) == len(owners), "a gradient is read twice")
        for owner, grad in self.captured.grads_read:
            need(owner < len(self.specs), "there is no owner of a gradient")
            need(grad is None or grad < len(self.specs), "there is no such gradient")
            place = None if grad in (None, -1) else self.plan.tensors[grad][0]
            need(place is None or (place.kind, place.key) == ("grad", owner), "no gradient of it")

    def _arguments(self) -> None:
        names = [a.name for a in self.plan.arguments]
        need(len({*names}) == len(names), "two arguments have one name")
        firsts = [a.positional for a in self.plan.arguments]
        need(firsts == sorted(firsts, reverse=True), "an argument by place comes after one by name")
        tensors, numbers = [], []
        for leaf in (x for a in self.plan.arguments for x in leaves(a.tree)):
            if isinstance(leaf, GivenTensor) and leaf.index is not None:
                tensors.append(leaf.index)
            elif isinstance(leaf, GivenNumber):
                numbers.append(leaf.index)
        for given, listed in (
            (tensors, [place for place, _ in self.plan.tensors]),
            (numbers, self.plan.scalars),
        ):
            wanted = [i for i, place in enumerate(listed) if place.kind == "argument"]
            need(sorted(given) == wanted, "arguments and inputs do not match")

    def _scalars(self) -> None:
        c = self.captured
        need(len(c.scalars) == len(self.plan.scalars), "there are other runtime scalars")
        host = _host_graph(c)
        check_graph(host)
        need(all(n.op.family == "host" for n in c.host_nodes), "no arithmetic of the host")
        known = {*c.scalars, *(out for node in c.host_nodes for out in node.outs)}
        for x in operands(c):
            need(x in known if isinstance(x, Value) else type(x) in (bool, int, float), f"no {x}")
        for place in self.plan.scalars:
            if place.kind == "number":
                need(place.key in self.step.numbers, f"there is no number {place.key!r}")
            elif place.kind == "after":
                n, name = place.key
                need(n < len(self.plan.callbacks), "there is no such call of a scheduler")
                need(name in self.step.numbers, f"there is no number {name!r}")
            elif place.kind == "item":
                need(place.key < len(self.specs), "there is no such tensor")
                one = self.specs[place.key]
                need(one.shape.count(1) == len(one.shape), "a number of several elements")
            else:
                need(place.kind in ("argument", "cut", "constant"), f"no number of a {place.kind}")
        cuts = [place.key for place in self.plan.scalars if place.kind == "cut"]
        read = [k for k, cut in enumerate(c.cuts) if cut.search is None]
        need(sorted(cuts) == read, "the numbers that are read do not match")

    def _callbacks(self) -> None:
        """The calls of schedulers: with no numbers but those that the effects name."""
        callbacks, operands = self.plan.callbacks, self.captured.effects.callbacks
        need(len(callbacks) == len(operands), "calls of schedulers do not match")
        for callback, places in zip(callbacks, operands, strict=True):
            need(callback.scheduler < len(self.step.schedules.schedulers), "there is no scheduler")
            need(len(callback.args) + len(callback.kwargs) <= 2, "arguments of a scheduler")
            for at, k in places:
                known = (
                    at in callback.kwargs if type(at) is str else at in range(len(callback.args))
                )
                need(known and 0 <= k < len(self.captured.effects.host), "numbers of a scheduler")

    def _draws(self) -> None:
        events = self.captured.draws
        need(all(g < len(self.step.generators) for g in self.plan.generators), "no generator")
        for k, event in enumerate(events):
            need(event.generator < len(self.plan.generators), "there is no such generator")
            generator = self.step.generators[self.plan.generators[event.generator]]
            match event:
                case Seed():
                    need(len(event.numbers) == 1, "a seed is one number")
                    need(generator.state is None, "a seed is for torch's own generators")
                case Keep():
                    need(not event.numbers, "to keep a state takes no number")
                case Restore():
                    kept = event.kept < k and events[event.kept]
                    need(isinstance(kept, Keep), "a state is restored that was not kept")
                    need(kept.generator == event.generator, "a state of another generator")
                case Draw():
                    self._draw(event, generator.device)
                case Together():
                    self._together(k, event)

    def _draw(self, draw: Draw, device: str) -> None:
        names = draw.names
        need(draw.fill in _FILLS and {*names} <= _FILLS[draw.fill], f"no draw {draw.fill[:50]!r}")
        need(len(names) == len(draw.numbers) == len({*names}), "numbers and names of a draw")
        check_layout(draw.type, draw.strides)
        need(is_dense(draw.type.shape, draw.strides), "a draw in memory with gaps")
        need(draw.type.device == device, "a draw on another device than its generator")
        if draw.fill == "randperm":
            need(draw.numbers == draw.type.shape and draw.type.dtype.kind == "i", "a permutation")
            need(type(draw.numbers[0]) is int, "a permutation")

    def _together(self, k: int, event: Together) -> None:
        """Rows of one kind, each of which one draw fills, and nothing is drawn after them."""
        draws = self.captured.draws
        need(all(isinstance(x, Together) for x in draws[k:]), "rows are put together too early")
        need(event.rows and all(row < k for row in event.rows), "there is no such row")
        rows = [draws[row] for row in event.rows]
        need(all(isinstance(x, Draw) and x.fill != "randperm" for x in rows), "no such rows")
        others = (x.rows for x in draws[k + 1 :])
        taken = [*event.rows, *(row for more in others for row in more)]
        need(len({*taken}) == len(taken), "a row lies at two places")
        one = rows[0]
        need(all(x.generator == event.generator for x in rows), "rows of several generators")
        need(all((x.type, x.strides) == (one.type, one.strides) for x in rows), "rows differ")
        kind = Type(one.type.dtype, (len(rows), *one.type.shape), one.type.device)
        strides = (one.type.numel, *one.strides)
        need((event.type, tuple(event.strides)) == (kind, strides), "no memory of these rows")
        need(not event.numbers, "rows take no number")

    def _sources(self, sources: Sequence[tuple[str, int]], graph: Graph) -> None:
        """Each param of a graph is what its source gives."""
        need(len(sources) == len(graph.params), "sources and params of a graph")
        for (kind, index), param in zip(sources, graph.params, strict=True):
            if kind == "scalar":
                need(index < len(self.plan.scalars), "there is no such number")
                need(param.value.type.is_host, "a number goes where a tensor is wanted")
                continue
            if kind == "draw":
                draws = self.captured.draws
                drawn = index < len(draws) and draws[index]
                need(isinstance(drawn, (Draw, Together)), "there is no such draw")
                found = drawn.type, drawn.strides
            elif kind == "found":
                need(index < sum(cut.found for cut in self.captured.cuts), "nothing is found so")
                found = self.found.setdefault(index, layout(param))
                need(found[1] == contiguous_strides(found[0].shape), "what is found has gaps")
            else:
                need(kind == "tensor" and index < len(self.specs), "there is no such tensor")
                spec = self.specs[index]
                found = Type(spec.dtype, spec.shape, spec.device), spec.strides
            need(found == layout(param), f"an input is {found}, not {layout(param)}")
        written = {write.target for write in graph.writes}
        for (kind, index), param in zip(sources, graph.params, strict=True):
            if param.value in written:
                need(kind == "tensor", "only tensors are written to")
                spec = self.specs[index]
                need(_apart(spec.shape, spec.strides), "a written tensor overlaps itself")
        tensors = [index for kind, index in sources if kind == "tensor"]
        need(len({*tensors}) == len(tensors), "a tensor is two inputs")

    def _cuts(self) -> None:
        """What Python reads: before the rest, by graphs of their own; late, as the last results,
        and then nothing depends on it but what is returned."""
        c, results = self.captured, self.captured.graph.results
        need([*c.late] == sorted({*c.late}), "an order of late numbers")
        need(all(k < len(c.cuts) for k in c.late), "there is no such number")
        need(all(c.cuts[k].search is None for k in c.late), "no element is found so late")
        need(len(c.late) <= len(results), "numbers that no result has")
        for result in results[len(results) - len(c.late) :]:
            need(result.value.type.numel == 1, "a number of several elements")
        for k in c.early:
            cut = c.cuts[k]
            check_graph(cut.graph)
            self._sources(cut.sources, cut.graph)
            one = cut.search is not None or cut.value.type.numel == 1
            need(not cut.graph.writes and one, "what is read is one number")
            found = [index for kind, index in cut.sources if kind == "found"]
            before = sum(other.found for other in c.cuts[:k])
            need(all(index < before for index in found), "an element is found before it is sought")
            need(cut.drawn <= len(c.draws), "there are not so many draws")
            draws = [index for kind, index in cut.sources if kind == "draw"]
            need(all(index < cut.drawn for index in draws), "a number of a later draw")
            behind = self._behind({i for kind, i in cut.sources if kind == "scalar"})
            need(all(x < k for x in behind), "a number is read of a later one")
        graphs = [*c.sources, *(c.checks.sources if c.checks else ())]
        used = self._behind({i for kind, i in graphs if kind == "scalar"})
        used |= self._behind_args(x for event in c.draws for x in event.numbers)
        used |= self._behind_args(x for p in c.predicates for x in (p.left, p.right))
        need(used.isdisjoint(c.late), "a late number is used by the plan")

    def _behind(self, scalars: Collection[int]) -> set[int]:
        """The cuts that runtime scalars are."""
        places = (self.plan.scalars[i] for i in scalars)
        return {place.key for place in places if place.kind == "cut"}

    def _behind_args(self, args: Iterable[Arg]) -> set[int]:
        c = self.captured
        paths = [(place.kind, place.key) for place in self.plan.scalars]
        return {*among(cuts_behind(c.scalars, paths, c.host_nodes), args)}

    def _bounds(self) -> None:
        for b in self.captured.bounds:
            need(b.index < len(self.specs), "there is no such tensor")
            spec = self.specs[b.index]
            need(spec.dtype.kind in "iu" and spec.device == "cpu", "bounds of no integers")
            check_view(b.shape, b.strides, b.offset, extent(spec.shape, spec.strides))
            _check_error(b.error)

    def _checks(self) -> None:
        checks = self.captured.checks
        check_graph(checks.graph)
        self._sources(checks.sources, checks.graph)
        need(not checks.graph.writes, "checks write nothing")
        need(len(checks.shown) == len(checks.errors) > 0, "checks and their errors")
        results = [result.value.type for result in checks.graph.results]
        need(len(results) == 1 + len(checks.shown) + sum(checks.shown), "results of checks")
        need(all(t.shape == () for t in results), "a check is one number")
        for error in checks.errors:
            _check_error(error)


def _host_graph(c: Captured) -> Graph:
    return Graph("host", tuple(map(Param, c.scalars)), c.host_nodes, (), ())


def _spec_of(tensor: torch.Tensor, like: Spec) -> Spec:
    """The spec of a tensor of the state, on the device of another."""
    geometry = tuple(tensor.shape), tensor.stride()
    return Spec(TO_IR[tensor.dtype], *geometry, like.device, tensor.requires_grad)


def _check_spec(spec: Spec) -> None:
    check_layout(Type(spec.dtype, spec.shape, spec.device), spec.strides)
    need(not spec.requires_grad or spec.dtype.is_float, f"{spec}")


def _apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether no two elements of a tensor are surely in one place; what cannot be told is not."""
    reach = 1
    for stride, size in sorted((st, n) for st, n in zip(strides, shape, strict=True) if n != 1):
        if stride < reach:
            return 0 in shape
        reach = stride * size
    return True


def _check_error(error: TracejitError) -> None:
    """The one thing that an error may show is a value."""
    template = error.fields.get("reason", "")
    try:
        shown = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(template)]
    except ValueError as wrong:
        raise Damaged(f"an error reads {template[:50]!r}") from wrong
    need(all(x in ((None, None, None), ("value", "", None)) for x in shown), "what an error shows")
