"""The state before a call, to make the same call once more.

In: a step's function and the arguments of a call. `Before` has Python's state and the generators
(`Snapshot`), and a copy of the memory of all tensors that the step can reach. `obstacles` says what
cannot be put back, `restore` puts the rest back, in place: every object stays the one that it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch.nn.parameter import UninitializedTensorMixin

from tracejit.capture.python.saved_tensors import SavedTensor
from tracejit.capture.python.snapshot import Snapshot

# The history that a compiled step gives to its results: a backward through it only raises.
_REFUSING = type(
    torch._C._functions.DelayedError(b"", 1)(torch.ones(1, requires_grad=True)).grad_fn
)
_SHARE = 0.5  # of the memory that is free, at most, for copies


class Looked(Snapshot):
    """A snapshot that notes generators, and whose attributes a dict or a list is."""

    def __init__(self, roots: Sequence[object]):
        self.generators: list[object] = []
        self.owners: dict[int, str] = {}  # id of a dict of attributes -> the class of its object
        super().__init__(roots)

    def _random(self, x: object, cls: type, pending: list[object]) -> None:
        self.generators.append(x)
        super()._random(x, cls, pending)

    def _object(self, x: object, cls: type, pending: list[object]) -> None:
        if cls.__dictoffset__ and type(x.__dict__) is dict:
            self.owners[id(x.__dict__)] = cls.__name__
            for name, held in x.__dict__.items():
                if isinstance(held, (dict, list, set)):
                    self.owners.setdefault(id(held), f"{cls.__name__}.{name}")
        super()._object(x, cls, pending)


class Before:
    """All that a call can read and change, as it is now."""

    def __init__(self, roots: Sequence[object]):
        self.roots = roots
        self.snapshot = Looked(roots)
        found = {id(t): t for t in self.snapshot.tensors}
        for t in tuple(found.values()):
            if t.is_leaf and t.grad is not None:
                found.setdefault(id(t.grad), t.grad)
        self.tensors = list(found.values())
        self.index = {id(t): i for i, t in enumerate(self.tensors)}
        self._why = _unusual(self.tensors)
        self._saved: list[SavedTensor] = []
        self._memory: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        if self._why:
            return
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in self.tensors}
        needed = sum(x.nbytes() for x in storages.values())
        if needed > _SHARE * _free_bytes():
            self._why = f"copies of its tensors take {needed / (1 << 30):.1f} GiB"
            return
        self._saved = [SavedTensor(t) for t in self.tensors]
        self._memory = [(x, x.clone()) for x in storages.values()]

    def obstacles(self) -> list[str]:
        """What has changed, or may change, and cannot be put back."""
        found = self.snapshot.obstacles()
        return found + ([self._why] if self._why else [])

    def restore(self) -> None:
        """Put all back as it was."""
        with torch.no_grad():
            for storage, copy in self._memory:
                storage.copy_(copy)
            for saved in self._saved:
                saved.restore()
            self.snapshot.restore()


def _unusual(tensors: Sequence[torch.Tensor]) -> str:
    """Why a call with these tensors cannot be made twice; "" if it can."""
    for t in tensors:
        if isinstance(t, UninitializedTensorMixin):
            return "it can reach a parameter of a lazy module that has no shape yet"
        if t.layout is not torch.strided or t.is_meta or t.is_quantized:
            return f"it can reach a tensor that is {t.layout}, quantized or on the meta device"
        if t.is_inference():
            return "it can reach a tensor of inference mode"
        if t.grad_fn is not None and not isinstance(t.grad_fn, _REFUSING):
            return "it can reach a tensor with a history of eager's, which a backward uses up"
    return ""


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
