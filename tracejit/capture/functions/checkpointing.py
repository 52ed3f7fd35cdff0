"""`torch.utils.checkpoint`: its Python runs once, and what its backward reads is computed again.

That is right as long as running it again would change nothing: a function that writes to tensors or
Python state from before, or draws numbers that eager would draw anew, is refused. Its beginning and
end are calls of this rule, which `python/checkpoints.py` makes; `trace/revisits.py` has the rest.
"""

from __future__ import annotations

from torch.utils import checkpoint as torch_checkpoint

from tracejit.capture.trace.draws import Called
from tracejit.capture.trace.state import Checkpoint, Region
from tracejit.capture.trace.table import rule
from tracejit.capture.trace.trace import Trace
from tracejit.passes.checkpoints import computed


@rule(torch_checkpoint.checkpoint)
def boundary(t: Trace, which: str, preserve: bool, products: bool, effect: str = "") -> None:
    """A checkpointed function begins, ends, or is left by an exception; `products`: those of
    matrices are kept for its backward."""
    if which == "begin":
        before = [*t.inputs.storages, *(p.handle.storage for p in t.proxies)]
        counts = {s: s.writes for s in before}
        t.checkpoints.append(Checkpoint(counts, len(t.draws.events), t.b.next_id))
        return
    begun = t.checkpoints.pop()
    if which == "left":  # by an exception
        return
    if effect:
        raise t.unsupported(
            f"A checkpointed function assigns to what outlives it ({effect}), which eager does "
            "once more in its backward; leave it out of checkpoint"
        )
    written = any(s.writes != count for s, count in begun.writes.items())
    if written or any(s.writes for s in t.inputs.storages if s not in begun.writes):
        raise t.unsupported(
            "A checkpointed function writes to a tensor from outside of it, which eager does once "
            "more in its backward (a batch norm's statistics are such); leave it out of checkpoint"
        )
    if not preserve and len(t.draws.events) > begun.draws:
        raise t.unsupported(
            "With preserve_rng_state=False eager draws other numbers in its backward; leave it out"
        )
    if any(isinstance(event, Called) for event in t.draws.events[begun.draws :]):
        raise t.unsupported(
            "A checkpointed function draws a number from random or numpy.random, and eager draws "
            "another one in its backward; draw it before, and pass it as an argument"
        )
    nbytes = 0
    for node in reversed(t.b.nodes):
        if node.out.id < begun.first:
            break
        nbytes += computed(node)
    t.regions.append(Region(begun.first, t.b.next_id, nbytes, products))
