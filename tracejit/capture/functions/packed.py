"""Packed sequences: the steps of sequences of several lengths, one after another, without padding.

How many rows a packed sequence has is the sum of the lengths, which varies with each batch. So it
is kept as [steps, sequences, …] beside a mask, and what recurrent networks and padding make of it
depends on the number of steps only. That is found out in the middle of the step (`trace/cuts.py`),
as the longest length. Whatever else looks at the rows makes their number part of the step as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar

import torch

from tracejit.capture.functions import masks
from tracejit.capture.functions.assembly import joined
from tracejit.capture.functions.common import cast, check_range, expand, literal
from tracejit.capture.functions.composites import composed
from tracejit.capture.functions.dropout import dropout, scaled
from tracejit.capture.functions.movement import select, transpose
from tracejit.capture.functions.sampling import sampled, sampling
from tracejit.capture.functions.values import int_
from tracejit.capture.trace import location
from tracejit.capture.trace.cuts import Selected, searched, selected_by
from tracejit.capture.trace.scalars import plain
from tracejit.capture.trace.table import RULES, rule
from tracejit.capture.trace.tensor import Handle, Ragged, TracedTensor
from tracejit.capture.trace.trace import Trace
from tracejit.errors import ShapeError
from tracejit.ir.graph import Value
from tracejit.ir.types import Type, i64
from tracejit.records import dataclass

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """The search of `pack_padded_sequence`: how many of the sequences each step has."""

    steps: int  # of the padded sequences
    where: str = field(compare=False)  # of the first call that has asked
    function: str
    remedy: ClassVar[str] = "The longest length is a shape: make batches of few different ones"

    def __call__(self, lengths: Tensor) -> tuple[Tensor]:
        """The one tensor, i64[the longest length]. Raises what eager does for wrong lengths."""
        found = lengths.tolist()
        if min(found) <= 0:
            raise self._error(
                "Length of all samples has to be greater than 0, but found an element in "
                "'lengths' that is <= 0"
            )
        if found != sorted(found, reverse=True):
            raise self._error(
                "`lengths` array must be sorted in decreasing order when `enforce_sorted` is True. "
                "You can pass `enforce_sorted=False` to pack_padded_sequence and/or pack_sequence"
            )
        if found[0] > self.steps:
            raise self._error(f"a length is {found[0]}, and the sequences have {self.steps} steps")
        return ((lengths > torch.arange(found[0])[:, None]).sum(1),)

    def _error(self, reason: str) -> ShapeError:
        return ShapeError(
            where=self.where, function=self.function, reason=reason, shapes="the lengths"
        )


@dataclass(eq=False, slots=True)
class Batches:
    """How many sequences each step has: where there are some, b1[steps, sequences], and rows whose
    number is known, as [steps, sequences, …], with the count of writes when they were."""

    handle: Handle
    sizes: Value
    mask: Value
    total: int | None = None  # of the call that is traced
    first: Handle | None = None  # what was packed first by these sizes
    counted: dict[Handle, tuple[int, Value]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.mask.type.shape[0]

    @property
    def sequences(self) -> int:
        return self.mask.type.shape[1]

    def marks(self, t: Trace, like: Value) -> Value:
        """The mask as numbers, [steps, sequences, 1], in the dtype of a value."""
        with t.untaped():
            whole = t.b.reshape(self.mask, shape=(*self.mask.type.shape, 1))
            return cast(t, whole, like.type.dtype)

    def where(self, t: Trace, x: Value, otherwise: object) -> Value:
        """x [steps, sequences, …] where there are sequences, and a number elsewhere."""
        mask = self.mask
        with t.untaped():
            shape = (*mask.type.shape, *(1,) * (len(x.type.shape) - 2))
            mask = expand(t, t.b.reshape(mask, shape=shape), x.type.shape)
        return t.b.where(mask, x, otherwise)

    def selected(self, t: Trace) -> Selected:
        """Which of all places are rows: makes the number of rows part of the step."""
        with t.untaped():
            return selected_by(t, self.mask)


def batches(t: Trace, batch_sizes: Tensor, sequences: int | None = None) -> Batches:
    """Those of a tensor of batch sizes, and of so many sequences."""
    h = t.lift(batch_sizes)
    if len(h.shape) != 1 or not h.shape[0] or h.dtype is not i64:
        raise t.shape_error("Expected batch_sizes to be a vector of int64 with an element or more")
    sizes = t.read(h)
    known = t.packed.get(sizes)
    if known is None:
        if sequences is None:
            sequences = int_(t, select(t, batch_sizes, 0, 0))
        shape = (h.shape[0], sequences)
        with t.untaped():
            numbers = t.b.iota(axis=1, shape=shape, dtype=i64, device=h.device)
            rows = t.b.reshape(sizes, shape=(shape[0], 1))
            mask = t.b.lt(numbers, expand(t, rows, shape))
        known = t.packed[sizes] = Batches(h, sizes, mask)
    if sequences not in (None, known.sequences):
        raise t.shape_error(f"Expected {known.sequences} sequences, got {sequences}")
    return known


def rows_of(t: Trace, of: Batches, padded: Value, same: Handle | None) -> TracedTensor:
    """The packed rows of [steps, sequences, …]; `same` has as many rows, if any tensor has."""
    count = of.total if same is None else same.shape[0]
    shape = (count, *padded.type.shape[2:])
    value = t.b.value(Type(padded.type.dtype, shape, padded.type.device))
    made = t.fresh(value)

    def counted(handle: Handle) -> None:
        """Make their number part of the step."""
        if not t.scalars.active:
            t.call = (torch.nn.utils.rnn.PackedSequence, (), {})
            raise t.unsupported(
                "A packed sequence does not leave the step: return what pad_packed_sequence makes "
                "of it"
            )
        with t.unchecked():
            selected = of.selected(t)
            before = torch.is_grad_enabled()
            torch._C._set_grad_enabled(True)
            try:
                rows = masks.rows(t, masks.matrix(t, padded, 2), selected)
                found = t.b.reshape(rows, shape=shape)
            finally:
                torch._C._set_grad_enabled(before)
        handle.ragged, handle.storage.value, handle.family.value = None, found, found
        of.counted[handle] = handle.storage.writes, padded

    if same is not None and same.ragged is None:  # it is part of the step already
        counted(made.handle)
    else:
        made.handle.ragged = Ragged(padded, of.sizes, counted, same)
    return made


def padded_of(t: Trace, of: Batches, data: Tensor) -> Value:
    """The rows of a packed sequence as [steps, sequences, …]: what lies past an end is unknown."""
    h = t.peek(data)
    if h.ragged is not None and h.ragged.sizes is of.sizes:
        return h.ragged.padded
    h = t.lift(data)
    writes, padded = of.counted.get(h, (None, None))
    if padded is not None and writes == h.storage.writes:
        return padded
    rows, selected = masks.matrix(t, t.read(h), 1), of.selected(t)
    if selected.positions.type.shape[0] != h.shape[0]:
        raise t.shape_error(
            f"batch_sizes are of {selected.positions.type.shape[0]} rows, the data has {h.shape[0]}"
        )
    shape = (of.steps * of.sequences, rows.type.shape[1])
    with t.untaped():
        zeros = t.b.full(0, shape=shape, dtype=h.dtype, device=h.device)
    whole = masks.replaced(t, zeros, rows, selected)
    return t.b.reshape(whole, shape=(of.steps, of.sequences, *h.shape[1:]))


def dropped(t: Trace, of: Batches, x: Tensor, p: float, train: bool) -> Tensor:
    """Dropout of [steps, sequences, features]: eager draws for the packed rows, one by one."""
    p, h = plain(p), t.lift(x)
    if not train or not 0 < p < 1 or t.fast_random:
        return dropout(t, x, p, train)
    search = sampling(t, of.handle, "packed_mask", None, 1 - p, of.sequences, h.shape[2])
    with t.untaped():
        mask = cast(t, sampled(t, of.handle.tensor, h.shape, search), h.dtype)
        noise = scaled(t, t.fresh(mask), 1 - p)
    return RULES[Tensor.mul].run(t, x, noise)


# ---- torch functions


@rule(torch._pack_padded_sequence)
def pack(
    t: Trace, input: Tensor, lengths: Tensor, batch_first: bool
) -> tuple[TracedTensor, TracedTensor]:
    """Rows step by step, and how many sequences each step has."""
    h, n = t.lift(input), t.lift(lengths)
    if n.device != "cpu":
        raise t.shape_error("'lengths' argument should be a 1D CPU int64 tensor")
    if h.device != "cpu":
        raise t.unsupported(
            "Packed sequences on a GPU have no rule. Pass the padded batch, and take no loss where "
            "it is padding"
        )
    if len(h.shape) < 2 or not h.numel:
        raise t.shape_error("Cannot pack empty tensors.")
    x = transpose(t, input, 0, 1) if batch_first else input
    steps, sequences = t.lift(x).shape[:2]
    if n.shape != (sequences,) or n.dtype is not i64:
        raise t.shape_error(
            f"Expected `len(lengths)` to be equal to batch_size, but got {list(n.shape)} (batch_"
            f"size={sequences})"
        )
    search = BatchSizes(steps, location.full(), "torch.nn.utils.rnn.pack_padded_sequence")
    with t.untaped():
        (sizes,) = searched(t, t.read(n), search)
    of = t.packed.get(sizes)
    made = t.fresh(sizes)
    mine = t.read(made.handle)  # another value, if something was packed by these before
    t.firsts[mine] = sequences
    t.ranges[mine] = 1, sequences
    if of is None:
        of = batches(t, made, sequences)
        of.total = int(next(x for v, x in t.found if v is sizes).sum())
    t.packed[sizes] = t.packed[mine] = of
    padded = t.read(t.lift(x))
    if of.steps < steps:
        low, high = (0,) * len(padded.type.shape), (of.steps, *padded.type.shape[1:])
        padded = t.b.slice(padded, starts=low, stops=high, steps=(1,) * len(high))
    data = rows_of(t, of, of.where(t, padded, literal(0, h.dtype)), of.first)
    of.first = of.first or data.handle
    return data, made


@rule(torch._pad_packed_sequence)
def pad(
    t: Trace,
    data: Tensor,
    batch_sizes: Tensor,
    batch_first: bool,
    padding_value: float,
    total_length: int,
) -> tuple[Tensor, TracedTensor]:
    """The sequences padded to a length, and their lengths."""
    of = batches(t, batch_sizes)
    padded = of.where(t, padded_of(t, of, data), literal(padding_value, t.peek(data).dtype))
    more = total_length - of.steps if total_length > 0 else 0
    if more < 0:
        raise t.shape_error(
            "Expected total_length to be at least the length of the longest sequence in input, but "
            f"got total_length={total_length} and max sequence length being {of.steps}"
        )
    if more:
        shape = (more, *padded.type.shape[1:])
        with t.untaped():
            value = literal(padding_value, padded.type.dtype)
            rest = t.b.full(value, shape=shape, dtype=padded.type.dtype, device=padded.type.device)
        padded = joined(t, [padded, rest], 0)
    with t.untaped():
        lengths = t.b.reduce_sum(cast(t, of.mask, i64), axes=(0,))
    t.ranges[lengths] = 1, of.steps
    out = t.fresh(padded)
    return transpose(t, out, 0, 1) if batch_first else out, t.fresh(lengths)


@composed(torch._C._nn.pad_sequence)
def pad_sequence(
    t: Trace,
    sequences: Sequence[Tensor],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> Tensor:
    """Sequences [steps, …] padded to the longest, along a new axis."""
    if not sequences:
        raise t.shape_error("received an empty list of sequences")
    if padding_side not in ("left", "right"):
        raise t.shape_error(f"Expected padding_side to be left or right, but got {padding_side}")
    first, longest = sequences[0], max(x.shape[0] for x in sequences)
    check_range(t, padding_value, t.lift(first).dtype)
    padded = []
    for x in sequences:
        more = longest - x.shape[0]
        whole = x.to(first.dtype).expand(x.shape[0], *first.shape[1:])
        sides = (more, 0) if padding_side == "left" else (0, more)
        widths = (0,) * (2 * first.dim() - 2) + sides
        padded.append(torch.nn.functional.pad(whole, widths, value=padding_value))
    return torch.stack(padded, 0 if batch_first else 1)
