"""Memory handed on: a kernel that reads a value for the last time may write its own in that place.

In: the groups, and which values lie where. Out: for a value that needs memory of the arena, a value
whose memory it can take. That one lies in the arena and is last read by the kernel that makes the
new one, each element just where the new one's element is stored. The gradient of an
activation then takes no more memory than the activation.
"""

from __future__ import annotations

from dataclasses import field

from tracejit.ir.graph import Value
from tracejit.records import dataclass
from tracejit.schedule.groups import Groups, placed
from tracejit.schedule.tasks import Task


@dataclass(slots=True)
class Donors:
    """The values that lie in the arena, each the last in its buffer."""

    groups: Groups
    buffers: dict[int, tuple[Value, str]] = field(default_factory=dict)  # by origin

    def add(self, origin: Value, value: Value, buffer: str) -> None:
        """`value`, which is read in its origin's stead, lies in a buffer of its own."""
        self.buffers[origin.id] = value, buffer

    def take(self, store: Task) -> tuple[str, Value] | None:
        """The buffer of a value that ends where `store` stores its own, and that value's origin."""
        group = store.group
        if group.dot is not None and group.inner is not None:
            return None  # the product is there in the first stage only
        for demand in (d for task in group.tasks for d in task.demands):
            value, buffer = self.buffers.get(demand.origin.id, (None, ""))
            if value is not None and self._ends(demand.origin, value, store):
                del self.buffers[demand.origin.id]
                return buffer, demand.origin
        return None

    def _ends(self, origin: Value, value: Value, store: Task) -> bool:
        """Whether `store` may overwrite a value: its own group reads each element only where it
        stores, and all other readers run before."""
        if not value.type == origin.type == store.value.type:
            return False
        for task, demand in self.groups.consumers.get(origin.id, ()):
            if task.group is not store.group:
                if not self.groups.runs_before(task.group, store.group):
                    return False
            else:
                here = demand.aligned and not demand.mask
                if not here or placed(demand.indices, task) != store.place:
                    return False
        return True
