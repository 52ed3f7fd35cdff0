"""A launch as numpy steps over raw memory: `Run`.

An affine load is a strided view of memory (no copy); masks, quotients and remainders go through
index arrays computed when the plan is loaded. Stages run in order, in blocks along the leading axis
that keep temporaries in the cache. bf16 and f16 are computed in float32 and rounded once per
operation; full reductions add the blocks' sums in float64.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tracejit.ir.ops.indexing import argsorted
from tracejit.ir.types import (
    bf16,
    contiguous_strides,
    float_to_bits,
    round_to,
)
from tracejit.runtime.collectives import Collective, run_alone
from tracejit.runtime.numpy_arrays import (
    At,
    Dims,
    Values,
    View,
    block_of,
    copied,
    decoder,
    fold,
    index_array,
    mask_array,
    per_block,
    reduce_block,
    span,
    spread,
    stored,
)
from tracejit.schedule.kernel import (
    Axis,
    Compute,
    Dot,
    InBounds,
    Index,
    Load,
    Mask,
    Operand,
    Position,
    Reduce,
    Scalar,
    Sort,
    Stage,
    Statement,
    Store,
    Var,
    axes_of_result,
)
from tracejit.schedule.plan import Launch, PlanBuffer
from tracejit.schedule.sizes import substitute

Step = Callable[[list, int, int], None]  # (slots, first, last) of one block of the leading axis


FOLDED = {"": None, "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


class Run:
    """One launch: slots hold constants, scalars, views of memory, and the values of variables."""

    def __init__(self, launch: Launch, buffers: dict[str, PlanBuffer], positions: list[int]):
        bound = dict(zip(launch.kernel.sizes, launch.sizes, strict=True))
        self.kernel = substitute(launch.kernel, bound)
        if self.kernel.sort is not None and not self.kernel.axes:
            self.kernel = replace(self.kernel, axes=(Axis("whole", 1),))  # all is one block
        self.positions = positions
        self.types = [buffers[name] for name in launch.buffers]
        self.memory = [ctypes.c_char * span(b) for b in self.types]
        self.number = {b.name: i for i, b in enumerate(self.kernel.buffers)}
        self.template: list[object] = []
        self.views: list[View] = []
        self.vars: dict[int, int] = {}
        self.scalars: list[tuple[int, int]] = []
        self.scalar_slots: dict[str, int] = {}
        for name, slot in zip(self.kernel.scalars, launch.scalars, strict=True):
            self.scalar_slots[name] = self.slot()
            self.scalars.append((self.scalar_slots[name], slot))
        self.reduced: dict[int, int] = {}  # slots of reduced values, by variable
        self.stages = [_StageSteps(self, stage) for stage in self.kernel.stages]
        if self.kernel.call is not None:
            for i, shape in enumerate(self.kernel.call.shapes):
                dtype = stored(self.kernel.buffers[i].dtype)
                strides = tuple(n * dtype.itemsize for n in contiguous_strides(shape))
                self.views.append(View(self.slot(), i, dtype, shape, strides, 0))
        call = self.kernel.call
        self.collective = Collective.of(self.kernel) if call and call.is_collective else None
        axes = self.kernel.axes
        self.extent = axes[0].extent if axes else 1
        widest = max((math.prod(a.extent for a in s.axes) for s in self.kernel.stages), default=1)
        row = math.prod(a.extent for a in axes[1:]) * widest
        self.step = block_of(self.extent, row)
        self.addresses: tuple[int, ...] = ()
        self.slots: list[object] = []

    def slot(self, content: object = None) -> int:
        """A new slot."""
        self.template.append(content)
        return len(self.template) - 1

    def __call__(self, addresses: Sequence[int], scalars: Sequence[float]) -> None:
        mine = tuple([addresses[i] for i in self.positions])
        if mine != self.addresses:
            self.slots = self._bind(mine)
            self.addresses = mine
        slots = self.slots.copy()
        for slot, i in self.scalars:
            slots[slot] = float(scalars[i])
        if self.collective is not None:
            return run_alone(self.collective, mine)
        if self.kernel.call is not None:
            *operands, result = (slots[v.slot] for v in self.views)
            call = self.kernel.call
            result[...] = call.op.eval(*operands, **dict(call.attrs))
            return
        if self.stages and self.stages[0].step_by_step:
            (stage,) = self.stages
            for i in range(stage.dims[0].extent):
                for step in stage.steps:
                    step(slots, i, i + 1)
            return
        if not self.kernel.axes:
            for stage in self.stages:
                stage.run_alone(slots)
            return
        for first in range(0, self.extent, self.step):
            last = min(first + self.step, self.extent)
            for stage in self.stages:
                for step in stage.steps:
                    step(slots, first, last)

    def _bind(self, addresses: tuple[int, ...]) -> list[object]:
        """Slots with the views of the buffers at these addresses."""
        memory = [kind.from_address(a) for kind, a in zip(self.memory, addresses, strict=True)]
        slots = self.template.copy()
        for v in self.views:
            slots[v.slot] = np.ndarray(v.shape, v.dtype, memory[v.buffer], v.offset, v.strides)
        return slots


class _StageSteps:
    """The steps of one stage, over the kernel's outer axes and the stage's own."""

    def __init__(self, run: Run, stage: Stage):
        self.run = run
        # A running sum: the axis that it goes along leads, and is walked point by point.
        self.step_by_step = stage.in_order and not stage.body[-1].mask and bool(stage.axes)
        lead = stage.axes if self.step_by_step else ()
        self.dims: Dims = lead + run.kernel.axes + stage.axes[len(lead) :]
        self.outer = len(run.kernel.axes)
        self.steps: list[Step] = []
        self.partials: list[tuple[Reduce, int, int]] = []  # reduction, slot of partials, of result
        self.before: list[Callable[[list], None]] = []
        self.copied = copied(stage.body)
        self.aliases: dict[int, int] = {}
        if stage.attend is not None:
            self._attend(stage)
            self.extent = self.block = 1
            return
        if stage.dot is not None:
            self._dot(stage.dot, stage.axes)
        for statement in stage.body:
            self.steps.append(self._statement(statement, self.dims))
        self.extent = stage.axes[0].extent if stage.axes else 1
        self.block = block_of(self.extent, math.prod(a.extent for a in stage.axes[1:]))

    def run_alone(self, slots: list) -> None:
        """Run a stage of a kernel without outer axes, block by block, folding reductions."""
        for prepare in self.before:
            prepare(slots)
        for _, partials, _ in self.partials:
            slots[partials] = []
        for first in range(0, self.extent, self.block):
            last = min(first + self.block, self.extent)
            for step in self.steps:
                step(slots, first, last)
        for reduce, partials, result in self.partials:
            slots[result] = fold(reduce, slots[partials])

    def _statement(self, s: Statement, dims: Dims) -> Step:
        if isinstance(s, Load):
            return self._load(s, dims)
        if isinstance(s, Compute):
            return self._compute(s)
        if isinstance(s, Store):
            return self._store(s, dims)
        if isinstance(s, Reduce):
            return self._reduce(s)
        if isinstance(s, Sort):
            return self._sort(s)
        out = self._define(s.out)
        if isinstance(s, Position):
            position = self._positions(s.index, dims)

            def step(slots: list, first: int, last: int) -> None:
                slots[out] = round_to(position(slots, first, last), s.out.dtype)

            return step
        assert isinstance(s, InBounds)
        inside = self._inside(s.mask, dims)

        def step(slots: list, first: int, last: int) -> None:
            slots[out] = inside(slots, first, last)

        return step

    def _positions(self, index: Index, dims: Dims, mask: Mask = ()) -> At:
        """The index at the points of a block, 0 where the mask does not hold."""
        slots_of = self._atoms(index, *(b.index for b in mask))

        def make(first: int, last: int, values: Values) -> np.ndarray:
            found = index_array(index, dims, first, last, values)
            if not mask:
                return found
            return np.where(mask_array(mask, dims, first, last, values), found, 0)

        return per_block(make, dims, slots_of)

    def _inside(self, mask: Mask, dims: Dims) -> At:
        """Whether the mask holds at the points of a block."""
        slots_of = self._atoms(*(b.index for b in mask))

        def make(first: int, last: int, values: Values) -> np.ndarray:
            return mask_array(mask, dims, first, last, values)

        return per_block(make, dims, slots_of)

    def _atoms(self, *indices: Index) -> dict[Var, int]:
        """The slots of the variables that stand in indices."""
        found: dict[Var, int] = {}
        for index in indices:
            for atom, _ in index.terms:
                if isinstance(atom, Var):
                    found[atom] = self._operand(atom)
                elif not isinstance(atom, str):
                    found |= self._atoms(atom.index)
        return found

    def _define(self, var: Var) -> int:
        slot = self.run.slot()
        self.run.vars[var.id] = slot
        return slot

    def _operand(self, operand: Operand) -> int:
        """The slot of an operand; reduced values get one of this stage's rank."""
        run = self.run
        if isinstance(operand, Scalar):
            return run.scalar_slots[operand.name]
        if not isinstance(operand, Var):
            return run.slot(operand)
        if operand.id not in run.reduced or not self.outer:
            return run.vars[operand.id]
        if operand.id not in self.aliases:
            source, alias = run.reduced[operand.id], run.slot()
            tail = (1,) * (len(self.dims) - self.outer)

            def step(slots: list, first: int, last: int) -> None:
                slots[alias] = slots[source].reshape(slots[source].shape + tail)

            self.steps.append(step)
            self.aliases[operand.id] = alias
        return self.aliases[operand.id]

    def _view(self, buffer: str, index: Index, dims: Dims) -> int | None:
        """The slot of a strided view of an affine access; None where there is no such view."""
        if not all(isinstance(atom, str) for atom, _ in index.terms):
            return None
        step = dict(index.terms)
        number = self.run.number[buffer]
        plain = self.run.types[number].type.dtype
        size = plain.itemsize
        shape = tuple(a.extent if a.name in step else 1 for a in dims)
        strides = tuple(step.get(a.name, 0) * size for a in dims)
        slot = self.run.slot()
        self.run.views.append(
            View(slot, number, stored(plain), shape, strides, index.offset * size)
        )
        return slot

    def _flat(self, buffer: str) -> int:
        """The slot of a buffer's whole memory as one dimension."""
        number = self.run.number[buffer]
        dtype = self.run.types[number].type.dtype
        slot = self.run.slot()
        count = span(self.run.types[number]) // dtype.itemsize
        self.run.views.append(View(slot, number, stored(dtype), (count,), (dtype.itemsize,), 0))
        return slot

    def _load(self, s: Load, dims: Dims) -> Step:
        out = self._define(s.out)
        decode = decoder(s.out.dtype)
        view = None if s.mask else self._view(s.buffer, s.index, dims)
        if view is None:
            return self._gather(s, dims, out, decode)
        copied = s.buffer in self.copied
        whole = not dims or dims[0].name not in dict(s.index.terms)

        def step(slots: list, first: int, last: int) -> None:
            found = slots[view]
            if not whole:
                found = found[first:last]
            if copied:
                found = found.copy()
            slots[out] = found if decode is None else decode(found)

        return step

    def _gather(self, s: Load, dims: Dims, out: int, decode: Callable | None) -> Step:
        flat, inside = self._flat(s.buffer), self._inside(s.mask, dims)
        position = self._positions(s.index, dims, s.mask)

        def step(slots: list, first: int, last: int) -> None:
            found = slots[flat][position(slots, first, last)]
            if decode is not None:
                found = decode(found)
            if s.mask:
                found = np.where(inside(slots, first, last), found, s.out.dtype.compute.type(0))
            slots[out] = found

        return step

    def _store(self, s: Store, dims: Dims) -> Step:
        value = self._operand(s.value)
        if s.mask:
            return self._scatter_inside(s, dims, value)
        view = self._view(s.buffer, s.index, dims)
        narrow = self.run.types[self.run.number[s.buffer]].type.dtype is bf16
        if view is None:
            return self._scatter(s, dims, value, narrow)
        whole = not dims or dims[0].name not in dict(s.index.terms)

        def step(slots: list, first: int, last: int) -> None:
            target, given = slots[view], slots[value]
            if not whole:
                target = target[first:last]
            target[...] = float_to_bits(given) if narrow else given

        return step

    def _scatter(self, s: Store, dims: Dims, value: int, narrow: bool) -> Step:
        flat, position = self._flat(s.buffer), self._positions(s.index, dims)

        def step(slots: list, first: int, last: int) -> None:
            given = slots[value]
            slots[flat][position(slots, first, last)] = float_to_bits(given) if narrow else given

        return step

    def _scatter_inside(self, s: Store, dims: Dims, value: int) -> Step:
        """The store of a stage that runs in order: numpy's assignment and `add.at` go from one
        element to the next, the axis in order last but within a place."""
        flat, inside = self._flat(s.buffer), self._inside(s.mask, dims)
        position = self._positions(s.index, dims, s.mask)
        dtype = self.run.types[self.run.number[s.buffer]].type.dtype
        shape = tuple(a.extent for a in dims[1:])
        fold = FOLDED[s.fold]

        def step(slots: list, first: int, last: int) -> None:
            block = (last - first, *shape) if dims else ()
            at = spread(position(slots, first, last), block)
            held = spread(inside(slots, first, last), block)
            at, given = at[held], spread(slots[value], block)[held]
            memory = slots[flat]
            if not s.fold:
                memory[at] = float_to_bits(given) if dtype is bf16 else given
            elif not dtype.narrow:
                fold.at(memory, at, given)
            else:
                decode = decoder(dtype)
                for place, term in zip(at, given, strict=True):  # rounded at each addition
                    total = round_to(fold(decode(memory[place]), term), dtype)
                    memory[place] = float_to_bits(total) if dtype is bf16 else total

        return step

    def _compute(self, s: Compute) -> Step:
        args = [self._operand(a) for a in s.args]
        out, dtype, compute = self._define(s.out), s.out.dtype, s.out.dtype.compute
        if s.op.name == "full":
            (arg,) = args

            def step(slots: list, first: int, last: int) -> None:
                slots[out] = round_to(np.asarray(slots[arg]), dtype)

            return step
        eval, attrs = s.op.eval, dict(s.attrs)
        narrow = dtype.narrow

        def step(slots: list, first: int, last: int) -> None:
            found = eval(*[slots[a] for a in args], **attrs)
            if narrow:
                found = round_to(found, dtype)
            elif found.dtype != compute:
                found = found.astype(compute)
            slots[out] = found

        return step

    def _reduce(self, s: Reduce) -> Step:
        value = self._operand(s.value)
        out = self._define(s.out)
        outer, dims = self.outer, self.dims
        axes = tuple(range(outer, len(dims)))
        inner = tuple(a.extent for a in dims[outer:])
        if not outer:
            partials = self.run.slot()
            self.partials.append((s, partials, out))
            tail = inner[1:]

            def step(slots: list, first: int, last: int) -> None:
                found = spread(slots[value], (last - first, *tail))
                slots[partials].append(reduce_block(s, found, axes))

            return step
        self.run.reduced[s.out.id] = out
        middle = tuple(a.extent for a in dims[1:outer])

        def step(slots: list, first: int, last: int) -> None:
            found = spread(slots[value], (last - first, *middle, *inner))
            slots[out] = round_to(reduce_block(s, found, axes), s.out.dtype)

        return step

    def _sort(self, s: Sort) -> Step:
        value, out = self._operand(s.value), self._define(s.out)
        shape = tuple(a.extent for a in self.dims[1:])
        counts = tuple(a.extent for a in self.run.kernel.stages[1].axes)

        def step(slots: list, first: int, last: int) -> None:
            given = spread(slots[value], (last - first, *shape))
            found = argsorted(given, -1, *(counts or (1,)), s.descending, s.topk)
            slots[out] = found if counts else found[..., 0]

        return step

    def _attend(self, stage: Stage) -> None:
        """Evaluate the operands whole, then the results by their primitives, and store them. An
        axis of extent 1 leads, so that all is one block."""
        attend, whole = stage.attend, Axis("whole", 1)
        batch = (whole, *stage.axes)
        for side, over in zip(attend.sides, attend.over, strict=True):
            for s in side.body:
                self.steps.append(self._statement(s, (*batch, *over)))
        slots_of = [self._operand(side.value) for side in attend.sides]
        shapes = [tuple(a.extent for a in (*batch, *over)) for over in attend.over]
        how = {"causal": attend.causal, "scale": attend.scale}
        outs = {op: (self._define(var), var.dtype) for op, var in attend.results}

        def step(slots: list, first: int, last: int) -> None:
            given = [slots[i] for i in slots_of]
            given = [spread(x, s) if np.ndim(x) else x for x, s in zip(given, shapes, strict=True)]
            for op, (out, dtype) in outs.items():
                args = [*given[:2], given[3]] if op.name == "attention_lse" else given
                slots[out] = round_to(op.eval(*args, **how), dtype)

        self.steps.append(step)
        names = {var: op.name for op, var in attend.results}
        for s in stage.body:
            own = axes_of_result(attend, names[s.value])
            self.steps.append(self._store(s, (*batch, *own)))

    def _dot(self, dot: Dot, axes: Dims) -> None:
        """Compute the contraction as a whole before the blocks of its epilogue."""
        *batch, m, n = axes
        sides = []
        for body, value, dims in (
            (dot.a, dot.a_value, (*batch, m, dot.k)),
            (dot.b, dot.b_value, (*batch, dot.k, n)),
        ):
            steps = [self._statement(s, dims) for s in body]
            sides.append((steps, self._operand(value), tuple(a.extent for a in dims)))
        product, out = self.run.slot(), self._define(dot.out)
        dtype = dot.out.dtype

        def prepare(slots: list) -> None:
            operands = []
            for steps, value, shape in sides:
                for step in steps:
                    step(slots, 0, shape[0])
                operands.append(spread(slots[value], shape))
            slots[product] = round_to(np.matmul(*operands), dtype)

        def step(slots: list, first: int, last: int) -> None:
            slots[out] = slots[product][first:last]

        self.before.append(prepare)
        self.steps.append(step)
