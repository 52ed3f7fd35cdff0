"""The Effects of a step as lines of Python: what a call does once its plan has run.

In: a Captured step, and expressions of the plan's results and of the host results. Out: straight
lines that set `returned`. They read `reals`, the outside tensors, `holders`, and `call` (a `Call`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch

from tracejit.capture.effects.captured import Captured
from tracejit.capture.effects.effects import (
    Effects,
    Given,
    HostSlot,
    Joined,
    Made,
    Mapped,
    Place,
    Sequenced,
    Slot,
    Tree,
    instance_of,
)
from tracejit.capture.effects.outside import attach
from tracejit.capture.python.counters import Bump
from tracejit.capture.python.memory import MANY
from tracejit.capture.python.references import GRADIENT, count
from tracejit.capture.trace.tensor import TO_TORCH, TracedTensor
from tracejit.errors import LeakedTracer
from tracejit.ir import host_memory
from tracejit.ir.types import contiguous_strides

WORTH = 4096  # elements of a gradient from which its memory is looked after
_AFTERWARDS = "backward through the result of a compiled step is not possible: {reason}"
# what is done to the requires_grad of a tensor from outside; nodes may need it
_FLAGS = {
    "requires grad": "requires_grad_()",
    "frozen": "requires_grad_(False)",
    "detached": "detach_()",
}
_NO_NODE = "the step keeps no graph for it. Call backward inside the step"


# ---- gradients that the commit replaces


def reusable_gradients(captured: Captured) -> Callable[[Sequence[torch.Tensor]], list[int]] | None:
    """A function that finds, among the outside tensors, gradients whose memory the plan may reuse.

    The commit replaces these gradients, and nobody else holds them. So the plan may write the new
    ones there, as eager does when a step drops its gradients first. The function returns their
    storages. None if the commit replaces no large gradient.
    """
    effects = captured.effects
    owners = [
        index
        for index, source in effects.grads
        if source is not None and prod(effects.made[source].shape) >= WORTH
    ]
    if not owners:
        return None
    looked_at = _only_looked_at(captured)
    # the list of outside tensors holds those that were lifted
    wanted = [(index, int(looked_at.get(index, -1) >= 0)) for index in owners]

    def reusable(reals: Sequence[torch.Tensor]) -> list[int]:
        return [storage for i, more in wanted if (storage := _sole(reals[i], more))]

    return reusable


def _only_looked_at(captured: Captured) -> dict[int, int]:
    """The outside tensors whose `.grad` was looked at and serves for nothing, and where it is among
    them: -1 if it is not."""
    effects = captured.effects
    if effects.outside or captured.bounds:
        return {}
    used = {index for kind, index in captured.sources if kind == "tensor"}
    used.update(m.index for m in effects.made if m.kind in ("real", "alias"))
    used.update(effects.written, (i for i, _ in effects.host_writes))
    used.update(i for pairs in (effects.grads, effects.datas) for i, _ in pairs)
    return {i: grad for i, grad in captured.grads_read if grad is not None and grad not in used}


def _sole(owner: torch.Tensor, more: int) -> int:
    """The storage of a `.grad` that only its owner holds, in Python and in C++, and `more` that let
    go; else 0."""
    grad = owner.grad
    if grad is None or (count(grad) - more, grad._use_count()) != GRADIENT:
        return 0
    if type(grad) is not torch.Tensor or grad.layout is not torch.strided:
        return 0
    return grad.untyped_storage()._cdata


# ---- the commit


def may_repeat(effects: Effects) -> bool:
    """Whether to do the lines twice is as good as once, as it is where an interrupt comes between:
    not where proxies become real, and where lists grow."""
    return not effects.escaped and all(key is not ... for _, key, _ in effects.stores)


def take_lines(effects: Effects, names: dict[str, object]) -> list[str]:
    """Lines that take the memory of new numbers: before anything is written, since there may be
    none left."""
    lines = []
    for k, (dtype, _) in enumerate(effects.hosts):
        names |= {"new_number": new_number, f"dtype{k}": TO_TORCH[dtype]}
        lines.append(f"number{k} = new_number(dtype{k})")
    return lines


def commit_lines(
    captured: Captured,
    outputs: Sequence[str],
    host: Sequence[str],
    calls: Sequence[str] = (),
    *,
    cell: Callable[[int], str | None],
    elements: Callable[[Sequence[int]], str | None],
    grad_on: bool,
    names: dict[str, object],
) -> list[str]:
    """Lines that apply the effects.

    outputs, host: expressions of the plan's results and of the host results.
    calls:         lines that come before what is stored in Python's objects.
    cell:          an expression of the ctypes cell that is the element of an outside tensor, if the
        lines may use one. It is asked for what the host writes.
    elements:      the same for the elements of many (`counters.Elements`).
    grad_on:       every call is made in grad mode.
    names:         the namespace of the lines, which grows here. `backwards` is there already.
    """
    return _Lines(captured, outputs, host, calls, cell, elements, grad_on, names).all()


class _Lines:
    def __init__(
        self,
        captured: Captured,
        outputs: Sequence[str],
        host: Sequence[str],
        calls: Sequence[str],
        cell: Callable[[int], str | None],
        elements: Callable[[Sequence[int]], str | None],
        grad_on: bool,
        names: dict[str, object],
    ):
        self.graph, self.effects = captured.graph, captured.effects
        self.outputs, self.host, self.cell, self.elements = outputs, host, cell, elements
        self.calls = calls
        self.grad_on, self.names = grad_on, names
        self.lines: list[str] = []

    def all(self) -> list[str]:
        effects, lines = self.effects, self.lines
        written = [*effects.written]
        if len(written) >= MANY:
            self.names["bump"] = Bump(written)
            lines.append("bump(reals)")
        elif written:
            self.names["bump"] = torch._C._increment_version
            lines.append(f"bump([{', '.join(f'reals[{i}]' for i in written)}])")
        together: dict[str, list[int]] = {}
        for index, source in effects.host_writes:
            together.setdefault(self.host[source], []).append(index)
        filled: set[int] = set()
        for number, indices in together.items():
            elements = self.elements(indices) if len(indices) >= MANY else None
            if elements is not None:
                lines.append(f"{elements}.fill({number})")
                filled.update(indices)
        for index, source in effects.host_writes:
            if index in filled:
                continue
            cell = self.cell(index)
            if cell is not None:
                lines.append(f"{cell}.value = {self.host[source]}")
            else:
                self.names["write"] = host_memory.write
                lines.append(f"write(reals[{index}], {self.host[source]})")
        flags = [(f"reals[{i}].{_FLAGS[how]}", how == "requires grad") for i, how in effects.flags]
        lines += [line for line, before_nodes in flags if before_nodes]
        self._make()
        lines += [line for line, before_nodes in flags if not before_nodes]
        for index, source in effects.datas:
            lines.append(f"reals[{index}].data = m{source}")
        for index, source in effects.grads:
            lines.append(f"reals[{index}].grad = {'None' if source is None else f'm{source}'}")
        for index, source in effects.leaf_grads:
            lines.append(f"m{index}.grad = m{source}")
        for k, index in enumerate(effects.escaped):
            self.names["made_real"] = made_real
            lines.append(f"m{index} = made_real(call.escaped[{k}], m{index})")
        lines += self.calls
        for holder, key, tree in effects.stores:
            at, value = f"holders[{holder}]", self._tree(tree)
            if key is ...:
                lines.append(f"{at}.append({value})")
            else:
                place = ".cell_contents" if key is None else f"[{self._key(key)}]"
                lines.append(f"{at}{place} = {value}")
        lines.append(f"returned = {self._tree(effects.returned)}")
        return lines

    def _make(self) -> None:
        """The tensors to hand out. Those with an autograd node come after what they depend on."""
        effects, lines = self.effects, self.lines
        reasons, taken = dict(effects.reasons), set()
        with_node = {node.made for node in effects.outside}
        for k, (_, source) in enumerate(effects.hosts):
            self.names["write"] = host_memory.write
            lines.append(f"write(number{k}, {self.host[source]})")
        for i, m in enumerate(effects.made):
            if i in with_node or m.kind in ("view", "part"):
                continue
            tensor = self._tensor(m)
            again = tensor in taken and m.kind in ("output", "host")  # another one of its memory
            taken.add(tensor)
            lines.append(f"m{i} = {tensor}{'.detach()' * again}")
            if m.is_leaf:
                lines.append(f"m{i} = m{i}.data.requires_grad_()")
            elif m.requires_grad:
                self.names[f"refuse{i}"] = refusal(reasons.get(i))
                self._with_grad(f"m{i} = refuse{i}(m{i}.data.requires_grad_())")
        for k, node in enumerate(effects.outside):
            self.names |= {"attach": attach, f"run{k}": self.names["backwards"][k]}
            plain = f"{self._tensor(effects.made[node.made])}.detach()"
            inputs = [self._place(place) for place in node.inputs]
            saved = [self._place(place) for place in node.saved]
            hosts = [self.host[i] for i in node.hosts]
            listed = (f"[{', '.join(x)}]" for x in (inputs, saved, hosts))
            lines.append(f"m{node.made} = attach({plain}, {', '.join(listed)}, run{k})")
        for i, m in enumerate(effects.made):
            if m.kind in ("view", "part"):
                view = self._view(m)
                view += ".unsqueeze(0).unbind()[0]" * (m.kind == "part")
                self._with_grad(f"m{i} = m{m.index}.{view}")

    def _place(self, place: Place) -> str:
        kind, i = place
        return {"real": f"reals[{i}]", "made": f"m{i}"}.get(kind) or self.outputs[i]

    def _with_grad(self, line: str) -> None:
        """A line that runs in grad mode, whatever mode the caller is in."""
        self.names["enable_grad"] = torch.enable_grad
        self.lines.append(line if self.grad_on else f"with enable_grad(): {line}")

    def _view(self, m: Made) -> str:
        offset = self.host[m.offset.index] if isinstance(m.offset, HostSlot) else m.offset
        dtype = ""
        if m.bits is not None:
            dtype = f"dtype_{m.bits[1].name}"
            self.names[dtype] = TO_TORCH[m.bits[1]]
        return m.view(offset, dtype)

    def _tensor(self, m: Made) -> str:
        if m.kind == "real":
            return f"reals[{m.index}]"
        view = self._view(m)
        if m.kind == "alias":
            return f"reals[{m.index}].detach().{view}"
        if m.kind == "host":
            whole = (m.shape, m.strides, m.offset, m.bits) == ((), (), 0, None)
            return f"number{m.index}" if whole else f"number{m.index}.{view}"
        result = self.graph.results[m.index]
        shape = result.value.type.shape
        strides = result.strides or contiguous_strides(shape)
        if (m.shape, m.strides, m.offset, m.bits) == (shape, strides, 0, None):
            return self.outputs[m.index]
        return f"{self.outputs[m.index]}.{view}"

    def _tree(self, tree: Tree) -> str:
        """A structure as an expression."""
        match tree:
            case Slot(index):
                return f"m{index}"
            case HostSlot(index):
                return self.host[index]
            case Joined(items):
                parts = (repr(x) if type(x) is str else self.host[x.index] for x in items)
                return f"({' + '.join(parts)})"
            case Given(index):
                return f"call.given[{index}]"
            case Sequenced(kind, items):
                parts = [self._tree(x) for x in items]
                if kind == "list":
                    return f"[{', '.join(parts)}]"
                if kind == "tuple":
                    return f"({''.join(f'{p}, ' for p in parts)})"
                self.names["instance_of"] = instance_of
                return f"instance_of({self._tree(kind)}, [{', '.join(parts)}])"
            case Mapped(items):
                keys = [self._key(k) for k, _ in items]
                parts = [f"{k}: {self._tree(v)}" for k, (_, v) in zip(keys, items, strict=True)]
                return f"{{{', '.join(parts)}}}"
        raise AssertionError(tree)

    def _key(self, key: str | int | Given | Slot | Joined) -> str:
        return self._tree(key) if isinstance(key, (Given, Slot, Joined)) else repr(key)


# ---- what the lines call


def new_number(dtype: torch.dtype) -> torch.Tensor:
    """A new CPU tensor of no axes."""
    return torch.empty((), dtype=dtype, device="cpu")


def refusal(reason: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gives a tensor a node, which raises when backward reaches it and says why."""
    return torch._C._functions.DelayedError(_AFTERWARDS.format(reason=reason or _NO_NODE), 1)


def made_real(proxy: TracedTensor, real: torch.Tensor) -> torch.Tensor:
    """Turn a proxy that user objects hold into the tensor it stands for, in place. `real` is an
    empty shell afterwards."""
    proxy.__dict__.pop("handle", None)
    proxy.__dict__.pop("owner", None)
    proxy.__class__ = torch.Tensor
    try:
        torch._C._swap_tensor_impl(proxy, real)
    except RuntimeError as error:
        raise LeakedTracer(
            where="after the step",
            function="storing an intermediate in a Python object",
            reason=f"which cannot be made real ({error})",
            remedy="Return the tensor from the step and store it outside",
        ) from error
    return proxy
