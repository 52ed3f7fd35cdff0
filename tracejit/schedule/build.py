"""schedule: Graph → Plan. Fusion decides the kernels, lowering writes them, packing the launches,
and memory is laid out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from tracejit.errors import InvalidGraph
from tracejit.ir.graph import Graph, Node, Value
from tracejit.schedule.again import made_again
from tracejit.schedule.collectives import Turn, half, in_place, is_collective, turns
from tracejit.schedule.donate import Donors
from tracejit.schedule.foreach import Foreach, gathered, lowered_foreach
from tracejit.schedule.fuse import Fuser, Fusion
from tracejit.schedule.host_calls import lower_call
from tracejit.schedule.images import Arranged, arranged
from tracejit.schedule.layouts import Layouts
from tracejit.schedule.loops import Loop, beginning, lower_loop, repeated
from tracejit.schedule.lower import Lowered, arena_store, lower
from tracejit.schedule.memory import Lifetime, plan_arena
from tracejit.schedule.pack import pack, side_by_side
from tracejit.schedule.parts import parted
from tracejit.schedule.pieces import stored_together
from tracejit.schedule.plan import Launch, Plan, PlanBuffer
from tracejit.schedule.row_sums import sums_of_rows
from tracejit.schedule.sizes import parametrize
from tracejit.schedule.stretches import stretched
from tracejit.schedule.tasks import Analysis, analyse
from tracejit.schedule.values import Memory


def schedule(
    graph: Graph,
    *,
    fuse: bool = True,
    again: bool = True,
    body: bool = False,
    gpu: bool | None = None,
) -> Plan:
    """The launches that compute a graph, or the `body` of a loop; without `fuse`, one kernel per
    computing node. `again`: what costs fewer bytes to compute again is not stored. `gpu`: as a GPU
    wants it, by default where the graph is on one."""
    for write in graph.writes:
        if write.target.type.is_host:
            raise InvalidGraph(reason=f"write to the host scalar {write.target}: it has no memory")
    buffers = _outer_buffers(graph)
    inputs = {graph.params[b.index].value.id: b.name for b in buffers if b.kind == "input"}
    results = tuple(b.name for b in buffers if b.kind == "output")
    gpu = _device(graph) != "cpu" if gpu is None else gpu
    graph = sums_of_rows(stretched(graph)) if gpu else graph
    graph = graph if gpu or body or not (fuse and again) else made_again(graph)
    images = arranged(graph) if gpu else Arranged(graph, frozenset(), {})
    graph = images.graph
    graph = parted(graph, Layouts(graph.nodes, images.last).last) if gpu else graph
    analysis = analyse(graph, fuse, body=body, copies=images.copies)
    layouts = Layouts(analysis.nodes, images.last)
    # what batch norm makes is read by several kernels, in float32 also where images are narrow
    gather = gpu and fuse and not body
    fuser = Fuser(graph, analysis, fuse, again, maps=bool(images.last), gather=gather, gpu=gpu)
    fusion = fuser.run(list(results), inputs)
    memory = Memory(dict(inputs), {b.name: b for b in buffers})
    order = turns(fusion.groups, fuser.groups)
    _locate(fusion, memory, fuser, layouts)
    lowered = [_lowered(turn, analysis, memory, fuse, again, gpu) for turn in order]
    if gather:
        lowered = stored_together(lowered, memory)
    launches = _packed(lowered, order, memory, gather) if fuse else [[one] for one in lowered]
    arena_bytes = _lay_out(launches, memory)
    scalars = _scalars(lowered)
    host, host_params = _host_part(graph, scalars)
    slots = {value.id: slot for slot, value in enumerate(scalars)}
    calls, loops = _launches(launches, slots)
    writes = tuple(
        inputs[w.target.id] for w in graph.writes if analysis.resolve(w.value) is not w.target
    )
    return Plan(
        name=graph.name,
        buffers=tuple(memory.buffers.values()),
        launches=calls,
        results=results,
        writes=writes,
        host_params=host_params,
        host=host,
        scalars=tuple(scalars),
        arena_bytes=arena_bytes,
        device=_device(graph),
        loops=loops,
    )


def _lowered(
    turn: Turn, analysis: Analysis, memory: Memory, fuse: bool, again: bool, gpu: bool
) -> Lowered | Loop:
    """The kernel of a group, or the launches of a loop."""
    group = turn.group
    if group.apart is None:
        return lower(group, analysis, memory, gpu=gpu)
    if group.apart.kind == "host":
        call = lower_call(group, memory)
        return half(call, turn.phase) if turn.phase else call
    node = group.apart.node
    begin = schedule(beginning(node), fuse=fuse, gpu=gpu)
    body = schedule(repeated(node), fuse=fuse, again=again, body=True, gpu=gpu)
    return lower_loop(group, memory, begin, body)


def _outer_buffers(graph: Graph) -> list[PlanBuffer]:
    """Buffers of tensor inputs and of results, named t0, t1, …"""
    buffers: list[PlanBuffer] = []
    for position, param in enumerate(graph.params):
        if not param.value.type.is_host:
            name = f"t{len(buffers)}"
            buffers.append(
                PlanBuffer(name, "input", param.value.type, param.strides, index=position)
            )
    for position, result in enumerate(graph.results):
        name = f"t{len(buffers)}"
        buffers.append(PlanBuffer(name, "output", result.value.type, result.strides, position))
    return buffers


def _locate(fusion: Fusion, memory: Memory, fuser: Fuser, layouts: Layouts) -> None:
    """Give every realized value a buffer. A value without one gets a store: in a new buffer of the
    arena, or in that of a value which ends in the same kernel (`donate.py`)."""
    position = {group.id: i for i, group in enumerate(fusion.groups)}
    origins = {id: fuser.analysis.origins[id].main for id in fusion.realized}
    often = Counter(origin.id for origin in origins.values())
    donors = Donors(fuser.groups)

    def launched(item: tuple) -> int:
        return position[fusion.tasks[origins[item[0]].id].group.id]

    for group in filter(is_collective, fusion.groups):  # they happen, whoever reads the result
        value = group.apart.value
        fusion.realized.setdefault(value.id, (value, ""))
        origins[value.id] = value

    for id, (value, buffer) in sorted(fusion.realized.items(), key=launched):
        if not buffer:
            origin = origins[id]
            producer = fusion.tasks[origin.id]
            store = arena_store(producer, value, "", fuser.tick())
            buffer, store.target = donors.take(store) or ("", None)
            if not buffer and (buffer := in_place(producer, memory.located, fuser.groups)):
                donors.buffers.pop(producer.demands[0].origin.id, None)
            if not buffer:
                buffer = f"t{len(memory.buffers)}"
                strides = layouts.strides_of(value)
                memory.buffers[buffer] = PlanBuffer(buffer, "arena", value.type, strides)
            store.buffer = buffer
            producer.group.tasks.append(store)
            if often[origin.id] == 1:
                donors.add(origin, value, buffer)
        memory.located[id] = buffer


def _packed(
    lowered: list[Lowered | Loop], order: list[Turn], memory: Memory, gather: bool
) -> list[list[Lowered | Loop | Foreach]]:
    """The kernels of each launch; those that do the same to other memory are one where a GPU wants
    to `gather` them."""
    before = [set(turn.before) for turn in order]
    items, before = gathered(lowered, before) if gather else (lowered, before)
    launches = pack(items, before, memory.buffers)
    return [[items[i] for i in launch] for launch in launches]


def _lay_out(launches: list[list[Lowered | Loop | Foreach]], memory: Memory) -> int:
    """Set the offsets of arena buffers by liveness; returns the arena's size in bytes."""
    spans: dict[str, tuple[int, int]] = {}
    for position, launch in enumerate(launches):
        used = (memory.buffers[name] for one in launch for name in one.buffers)
        for name in (b.of or b.name for b in used):
            first, _ = spans.get(name, (position, position))
            spans[name] = (first, position)
    arena = [b for b in memory.buffers.values() if b.kind == "arena"]
    offsets, total = plan_arena([Lifetime(b.type.nbytes, *spans[b.name]) for b in arena])
    for buffer, offset in zip(arena, offsets, strict=True):
        memory.buffers[buffer.name] = replace(buffer, offset=offset)
    return total


def _scalars(lowered: list[Lowered | Loop]) -> list[Value]:
    """The host values that kernels read, in order of first use."""
    found = {value.id: value for one in lowered for value in one.scalars}
    return list(found.values())


def _host_part(
    graph: Graph, scalars: list[Value]
) -> tuple[tuple[Node, ...], tuple[tuple[Value, int], ...]]:
    """The host nodes and host inputs that the scalars need."""
    live = {value.id for value in scalars}
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        if node.op.family == "host" and node.out.id in live:
            live.update(v.id for v in node.inputs)
            nodes.append(node)
    params = tuple(
        (param.value, position)
        for position, param in enumerate(graph.params)
        if param.value.id in live
    )
    return tuple(reversed(nodes)), params


def _launches(
    packed: list[list[Lowered | Loop | Foreach]], slots: dict[int, int]
) -> tuple[tuple[Launch, ...], tuple[int, ...]]:
    """The launches of a plan, and the steps of its loops."""
    launches: list[Launch] = []
    loops: list[int] = []
    for together in packed:
        if isinstance(loop := together[0], Loop):
            number = len(loops)
            loops.append(loop.steps)
            launches += [x if x.loop is None else replace(x, loop=number) for x in loop.launches]
        else:
            launches.append(_launch(together, slots))
    return tuple(launches), tuple(loops)


def _launch(kernels: list[Lowered | Foreach], slots: dict[int, int]) -> Launch:
    """The launch of one kernel, or of several side by side."""
    named, values = [], []
    for one in kernels:
        if isinstance(one, Foreach):
            one, sizes = lowered_foreach(one)
        else:
            kernel, sizes = parametrize(one.kernel)
            one = replace(one, kernel=kernel)
        named.append(one)
        values.append(sizes)
    if len(named) == 1:
        (lowered,), (sizes,) = named, values
    else:
        lowered, sizes = side_by_side(named, values)
    slots_of = tuple(slots[v.id] for v in lowered.scalars)
    return Launch(lowered.kernel, lowered.buffers, sizes, slots_of)


def _device(graph: Graph) -> str:
    """The device of the graph's tensors."""
    for param in graph.params:
        if not param.value.type.is_host:
            return param.value.type.device
    for node in graph.nodes:
        if not node.out.type.is_host:
            return node.out.type.device
    return "cpu"
