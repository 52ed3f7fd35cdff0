"""Collectives of torch.distributed inside a step: each is a node of the graph, in their order.

What eager does in place, a tensor's memory reduced or received into, is a new value of the tensor.
An asynchronous one has its value at once: the plan waits for it where it is first read, so the
`Work` that the step gets has nothing to wait for. The forms of torch.distributed.nn.functional are
autograd functions of torch's own Python, whose forward and backward call these rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as distributed

from tracejit.capture.functions.assembly import joined
from tracejit.capture.trace.active import current
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.tensor import Handle
from tracejit.capture.trace.trace import Trace
from tracejit.ir import process_groups
from tracejit.ir.graph import Builder, Value

Tensor = torch.Tensor
Group = object  # a process group

_REDUCTIONS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")


def _named(*names: str) -> list:
    """The functions of torch.distributed of these names, which not every version of torch has."""
    return [f for name in names if (f := getattr(distributed, name, None)) is not None]


class Work:
    """What an asynchronous collective returns inside a step. Its result is there when it is read.
    There is one object, which may outlive the step: by then all collectives have ended."""

    def wait(self, timeout: object = None) -> bool:
        """Nothing is left to wait for."""
        return True

    def is_completed(self) -> bool:
        """As one that has been waited for."""
        return True

    def is_success(self) -> bool:
        """As one that has been waited for."""
        return True

    def __getattr__(self, name: str) -> object:
        t = current()
        if t is None or name.startswith("__"):
            raise AttributeError(f"the Work of a compiled step has no {name}; call wait()")
        t.begin(distributed.Work.wait, ())
        raise t.unsupported(
            f"`{name}` of an asynchronous collective has no rule; call wait() and use the tensor"
        )


WORK = Work()
# what calls of torch.distributed are given, or return
ENGINE = frozenset({Work})
if distributed.is_available():
    ENGINE |= {distributed.ProcessGroup, type(distributed.ReduceOp.SUM)}
    ENGINE |= {distributed.Reducer, distributed.Logger}


# ---- what all have in common


def group_of(group: Group | None) -> Group:
    """A process group; the default one where none is named."""
    if group is None:
        return distributed.distributed_c10d._get_default_group()
    return group


def _is_member(group: Group | None) -> bool:
    return not distributed.distributed_c10d._rank_not_in_group(group)


def root_of(group: Group, rank: int | None, group_rank: int | None) -> int:
    """The rank within a group that is named by its global one, or within the group."""
    return distributed.distributed_c10d._canonicalize_group_rank(
        group, rank, group_rank, return_global=False
    )


def reduction(t: Trace, op: object) -> str:
    """The name of a reduction."""
    if op is None:
        return "SUM"
    op = getattr(op, "op", op)  # a ReduceOp holds its kind
    name = getattr(op, "name", str(op).rpartition(".")[2])
    if name not in _REDUCTIONS:
        raise t.unsupported(
            f"The reduction {name} has no rule; scale the tensor, and reduce by SUM or AVG"
        )
    return name


def communicate(t: Trace, name: str, group: Group, values: Sequence[Value], **attrs) -> Value:
    """The flat result of the next collective of the step. Operands keep their shapes, so that the
    kernels that compute them write them as they lie in memory."""
    number, t.collectives = t.collectives, t.collectives + 1
    if not process_groups.joins(attrs):
        t.alone.append(number)
    where = {"group": process_groups.name_of(group), "ranks": group.size(), "number": number}
    with t.untaped(), t.unchecked():
        return getattr(t.b, name)(*values, **attrs, **where)


def _take(t: Trace, flat: Value, *into: Handle) -> None:
    """Tensors receive the parts of a flat result, one after another."""
    at = 0
    for h in into:
        receive(t, h, _shaped(t, flat, at, h))
        at += h.numel


def _shaped(t: Trace, flat: Value, start: int, h: Handle) -> Value:
    """The part of a flat result that is a tensor's."""
    with t.untaped(), t.unchecked():
        if flat.type.shape != (h.numel,):
            flat = t.b.slice(flat, starts=(start,), stops=(start + h.numel,), steps=(1,))
        return t.b.reshape(flat, shape=h.shape)


def receive(t: Trace, h: Handle, value: Value) -> None:
    """A collective has written to a tensor."""
    if h.dtype is not value.type.dtype:
        raise t.shape_error("Invalid usage of tensors with different dtypes")

    def vjp(b: Builder, cotangents: tuple, needed: tuple) -> Sequence[Value | None]:
        raise t.unsupported(
            "A collective that works in place has no derivative; use the form of "
            "torch.distributed.nn.functional, or detach the tensor before"
        )

    if t.grad_on and t.requires_grad(h) and not t.is_leaf(h):
        value = t.derive(t.call[0].__name__, (t.read(h),), value, vjp)
        return t.write(h, value)
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        t.write(h, value)
    finally:
        torch._C._set_grad_enabled(before)


def _lifted(t: Trace, *tensors: Tensor) -> list[Handle]:
    found = []
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"Invalid function argument. Expected a torch.Tensor, not {type(tensor).__name__}"
            )
        h = t.lift(tensor)
        if h.device != "cpu" and not h.device.startswith("cuda"):
            raise t.unsupported(f"A collective on {h.device} has no rule")
        found.append(h)
    first = found[0]
    if any(h.dtype is not first.dtype for h in found):
        raise t.shape_error("Invalid usage of tensors with different dtypes")
    return found


def _ended(async_op: bool) -> Work | None:
    return WORK if async_op else None


# ---- in place


@rule(*_named("all_reduce"))
def all_reduce(
    t: Trace,
    tensor: Tensor,
    op: object = None,
    group: Group | None = None,
    async_op: bool = False,
) -> Work | None:
    """Reduce a tensor over the ranks."""
    (h,) = _lifted(t, tensor)
    if not _is_member(group):
        return None
    flat = communicate(t, "all_reduce", group_of(group), [t.read(h)], by=reduction(t, op))
    _take(t, flat, h)
    return _ended(async_op)


@rule(*_named("reduce"))
def reduce(
    t: Trace,
    tensor: Tensor,
    dst: int | None = None,
    op: object = None,
    group: Group | None = None,
    async_op: bool = False,
    group_dst: int | None = None,
) -> Work | None:
    """Reduce a tensor over the ranks to one of them."""
    (h,) = _lifted(t, tensor)
    if not _is_member(group):
        return None
    group = group_of(group)
    root = root_of(group, dst, group_dst)
    flat = communicate(t, "reduce_to", group, [t.read(h)], by=reduction(t, op), root=root)
    _take(t, flat, h)
    return _ended(async_op)


@rule(*_named("broadcast"))
def broadcast(
    t: Trace,
    tensor: Tensor,
    src: int | None = None,
    group: Group | None = None,
    async_op: bool = False,
    group_src: int | None = None,
) -> Work | None:
    """Take a tensor as one of the ranks has it."""
    (h,) = _lifted(t, tensor)
    if not _is_member(group):
        return None
    group = group_of(group)
    flat = communicate(t, "broadcast", group, [t.read(h)], root=root_of(group, src, group_src))
    _take(t, flat, h)
    return _ended(async_op)


# ---- gathered and scattered


def _check_alike(t: Trace, h: Handle, others: Sequence[Handle], ranks: int) -> None:
    if len(others) != ranks:
        raise t.shape_error(f"a list of {ranks} tensors is needed, one for each rank")
    if any(x.numel != h.numel for x in others):
        raise t.unsupported("Tensors of several sizes have no rule here; pad them to one size")


@rule(*_named("all_gather"))
def all_gather(
    t: Trace,
    tensor_list: Sequence[Tensor],
    tensor: Tensor,
    group: Group | None = None,
    async_op: bool = False,
) -> Work | None:
    """Take the tensors of all ranks."""
    h, *into = _lifted(t, tensor, *tensor_list)
    if not _is_member(group):
        return None
    group = group_of(group)
    _check_alike(t, h, into, group.size())
    flat = communicate(t, "all_gather", group, [t.read(h)])
    _take(t, flat, *into)
    return _ended(async_op)


@rule(*_named("all_gather_single", "all_gather_into_tensor"))
def all_gather_single(
    t: Trace,
    output_tensor: Tensor,
    input_tensor: Tensor,
    group: Group | None = None,
    async_op: bool = False,
) -> Work | None:
    """Take the tensors of all ranks, as one."""
    h, into = _lifted(t, input_tensor, output_tensor)
    if not _is_member(group):
        return None
    group = group_of(group)
    if into.numel != h.numel * group.size():
        raise t.shape_error(
            "output tensor size must be equal to world_size times input tensor size"
        )
    _take(t, communicate(t, "all_gather", group, [t.read(h)]), into)
    return _ended(async_op)


@rule(*_named("reduce_scatter"))
def reduce_scatter(
    t: Trace,
    output: Tensor,
    input_list: Sequence[Tensor],
    op: object = None,
    group: Group | None = None,
    async_op: bool = False,
) -> Work | None:
    """Take the own one of tensors that are reduced over the ranks."""
    into, *given = _lifted(t, output, *input_list)
    if not _is_member(group):
        return None
    group = group_of(group)
    _check_alike(t, into, given, group.size())
    whole = _joined(t, [t.read(h) for h in given])
    flat = communicate(t, "reduce_scatter", group, [whole], by=reduction(t, op))
    _take(t, flat, into)
    return _ended(async_op)


@rule(*_named("reduce_scatter_single", "reduce_scatter_tensor"))
def reduce_scatter_single(
    t: Trace,
    output: Tensor,
    input: Tensor,
    op: object = None,
    group: Group | None = None,
    async_op: bool = False,
) -> Work | None:
    """Take the own part of a tensor that is reduced over the ranks."""
    into, h = _lifted(t, output, input)
    if not _is_member(group):
        return None
    group = group_of(group)
    if h.numel != into.numel * group.size():
        raise t.shape_error("input tensor must be the same size as output size times world size")
    flat = communicate(t, "reduce_scatter", group, [t.read(h)], by=reduction(t, op))
    _take(t, flat, into)
    return _ended(async_op)


def _joined(t: Trace, values: Sequence[Value]) -> Value:
    """Values one after another, flat."""
    with t.untaped(), t.unchecked():
        return joined(t, [t.b.reshape(x, shape=(math.prod(x.type.shape),)) for x in values], 0)


@rule(*_named("all_to_all"))
def all_to_all(
    t: Trace,
    output_tensor_list: Sequence[Tensor],
    input_tensor_list: Sequence[Tensor],
    group: Group | None = None,
    async_op: bool = False,
) -> Work | None:
    """Send a tensor to each rank, and take one from each."""
    handles = _lifted(t, *output_tensor_list, *input_tensor_list)
    if not _is_member(group):
        return None
    group = group_of(group)
    into, given = handles[: len(output_tensor_list)], handles[len(output_tensor_list) :]
    if len(into) != group.size() or len(given) != group.size():
        raise t.shape_error(f"a list of {group.size()} tensors is needed, one for each rank")
    parts = {"sent": _text(h.numel for h in given), "received": _text(h.numel for h in into)}
    whole = _joined(t, [t.read(h) for h in given])
    flat = communicate(t, "all_to_all", group, [whole], **parts)
    _take(t, flat, *into)
    return _ended(async_op)


def _text(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


@rule(*_named("all_to_all_single"))
def all_to_all_single(
    t: Trace,
    output: Tensor,
    input: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: Group | None = None,
    async_op: bool = False,
) -> Work | None:
    """Send a part of a tensor to each rank, and take one from each."""
    into, h = _lifted(t, output, input)
    if not _is_member(group):
        return None
    group = group_of(group)
    ranks = group.size()

    def parts(of: Handle, sizes: Sequence[int] | None) -> str:
        rows = of.shape[0] if of.shape else 1
        if not sizes:
            if rows % ranks:
                raise t.shape_error("Tensor's dim 0 does not divide equally across group size")
            sizes = [rows // ranks] * ranks
        if len(sizes) != ranks or sum(sizes) != rows:
            raise t.shape_error("Split sizes doesn't match total dim 0 size")
        return _text(n * (of.numel // max(rows, 1)) for n in map(int, sizes))

    sizes = {"sent": parts(h, input_split_sizes), "received": parts(into, output_split_sizes)}
    flat = communicate(t, "all_to_all", group, [t.read(h)], **sizes)
    _take(t, flat, into)
    return _ended(async_op)


@rule(*_named("gather"))
def gather(
    t: Trace,
    tensor: Tensor,
    gather_list: Sequence[Tensor] | None = None,
    dst: int | None = None,
    group: Group | None = None,
    async_op: bool = False,
    group_dst: int | None = None,
) -> Work | None:
    """Let one rank take the tensors of all."""
    h, *into = _lifted(t, tensor, *(gather_list or ()))
    if not _is_member(group):
        return None
    group = group_of(group)
    if dst is None and group_dst is None:
        dst = 0
    root = root_of(group, dst, group_dst)
    here = group.rank() == root
    if here:
        _check_alike(t, h, into, group.size())
    elif into:
        raise t.shape_error("Argument ``gather_list`` must NOT be specified on non-destination")
    flat = communicate(t, "gather_ranks", group, [t.read(h)], root=root, here=here)
    _take(t, flat, *into)
    return _ended(async_op)


@rule(*_named("scatter"))
def scatter(
    t: Trace,
    tensor: Tensor,
    scatter_list: Sequence[Tensor] | None = None,
    src: int | None = None,
    group: Group | None = None,
    async_op: bool = False,
    group_src: int | None = None,
) -> Work | None:
    """Take one of the tensors that one rank has."""
    into, *given = _lifted(t, tensor, *(scatter_list or ()))
    if not _is_member(group):
        return None
    group = group_of(group)
    if src is None and group_src is None:
        src = 0
    root = root_of(group, src, group_src)
    here = group.rank() == root
    if here:
        _check_alike(t, into, given, group.size())
    elif given:
        raise t.shape_error("Argument ``scatter_list`` must NOT be specified on non-source")
    whole = _joined(t, [t.read(h) for h in given]) if here else t.read(into)
    flat = communicate(t, "scatter_ranks", group, [whole], root=root, here=here)
    _take(t, flat, into)
    return _ended(async_op)


# ---- called by patches: they do not pass a TorchFunctionMode


@rule(*_named("barrier"))
def barrier(t: Trace, group: Group) -> Work:
    """Wait for all ranks."""
    communicate(t, "barrier", group, [])
    return WORK
