"""Trees of groups over the nodes of a picture: by module, by user line, by kernel.

A group is open or folded to one box. No group has more than MOST children: longer ones are cut into
stretches. The children of a group are in the order of their first nodes, which is one in which
nothing comes before its operands, except where a kernel or a parameter collects what lies apart.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import field
from itertools import groupby

from tracejit.pictures.picture import FORWARD, LANES, UPDATE, Picture, PictureNode
from tracejit.records import dataclass

MOST = 40
FEW = 12  # children from which on nodes of one line become a group
VIEWS = ("module", "line", "kernel")

LAST = ("line", "part")  # kinds of groups that are opened after all others

Step = tuple[Hashable, str]  # what tells a group from its neighbours, and its label
Ways = Sequence[tuple[Step, ...]]


@dataclass
class Group:
    """A group with its children: groups, and numbers of nodes. `kind` says what it stands for:
    "lane", "module", "function", "line", "kernel" or "part"."""

    label: str
    kind: str
    lane: str
    children: list[Group | int] = field(default_factory=list)
    open: bool = False

    def nodes(self) -> list[int]:
        """All nodes in it."""
        found: list[int] = []
        for child in self.children:
            found += [child] if isinstance(child, int) else child.nodes()
        return found


def tree(picture: Picture, view: str) -> list[Group]:
    """The outermost groups of a view: a lane for each phase, or one for all kernels."""
    nodes = picture.nodes
    if view == "kernel":
        whole = Group("kernels", "lane", FORWARD)
        _fill_kernels(whole, picture)
        return [_cut(whole, nodes)]
    found = []
    for name in LANES:
        here = [i for i, n in enumerate(nodes) if n.lane == name]
        if not here:
            continue
        lane = Group(name, "lane", name)
        way = _by_line if view == "line" else _by_module(picture)
        ways = [way(nodes[i]) for i in here]
        kinds = ("function", "line", "module") if view == "line" else ("module",)
        if name == UPDATE and view == "module":
            _collect(lane, here, ways, nodes)
        else:
            _nest(lane, here, ways, kinds, 0)
        found.append(_cut(lane, nodes))
    return found


# ---- what a node belongs to


def _by_module(picture: Picture) -> Callable[[PictureNode], tuple[Step, ...]]:
    """By modules; what stands in none, by its function, if that is not the step itself."""
    home = "" if picture.home is None else picture.home.function

    def way(node: PictureNode) -> tuple[Step, ...]:
        if node.module:
            return tuple((part, part) for part in node.module)
        function = "" if node.line is None else node.line.function
        if not function or function == home or node.lane != FORWARD:
            return ()
        return ((function, f"{_short(function)}()"),)

    return way


def _by_line(node: PictureNode) -> tuple[Step, ...]:
    if node.line is None:
        return ()
    name = _short(node.line.function)
    where = (str(node.line), str(node.line))
    modules = tuple((part, part) for part in node.module)
    return ((node.line.function, f"{name}()"), where, *modules) if name else (where, *modules)


def _short(function: str) -> str:
    """`GPT.forward` of `make.<locals>.GPT.forward`."""
    return function.rpartition("<locals>.")[2]


# ---- groups


def _nest(into: Group, nodes: Sequence[int], ways: Ways, kinds: Sequence[str], depth: int) -> None:
    """Fill a group with runs of nodes that go the same way: what is called twice is two groups, so
    no group comes before and after another."""
    seen: dict[str, int] = {}
    pairs = list(zip(nodes, ways, strict=True))
    for step, run in groupby(pairs, lambda pair: pair[1][depth] if len(pair[1]) > depth else None):
        some = list(run)
        if step is None:
            into.children += [i for i, _ in some]
            continue
        label = step[1]
        seen[label] = seen.get(label, 0) + 1
        label = label if seen[label] == 1 else f"{label} · {seen[label]}"
        group = Group(label, kinds[min(depth, len(kinds) - 1)], into.lane)
        _nest(group, [i for i, _ in some], [w for _, w in some], kinds, depth + 1)
        into.children.append(group)


def _collect(
    into: Group, nodes: Sequence[int], ways: Ways, of: Sequence[PictureNode], depth: int = 0
) -> None:
    """Fill a group with what belongs to each parameter, wherever it stands: nothing that is for one
    alone leads to what is for another."""
    groups: dict[Hashable, list[int]] = {}
    ways_of = dict(zip(nodes, ways, strict=True))
    for i in nodes:
        way = ways_of[i]
        if len(way) > depth:
            step = way[depth]
            if step not in groups:
                groups[step] = []
                into.children.append(Group(step[1], "module", into.lane))
            groups[step].append(i)
        else:
            into.children.append(i)
    made = [child for child in into.children if isinstance(child, Group)]
    for group, some in zip(made, groups.values(), strict=True):
        _collect(group, some, [ways_of[i] for i in some], of, depth + 1)
    into.children = _in_order(into.children, of)


def _in_order(children: Sequence[Group | int], nodes: Sequence[PictureNode]) -> list[Group | int]:
    """The children so that each comes after what it reads, else in the order that they have."""
    inside = [[c] if isinstance(c, int) else c.nodes() for c in children]
    child_of = {i: k for k, some in enumerate(inside) for i in some}
    waits = [
        {child_of[a] for i in some for a in nodes[i].operands if a in child_of} - {k}
        for k, some in enumerate(inside)
    ]
    found: list[int] = []
    left = list(range(len(children)))
    while left:
        ready = next((k for k in left if not waits[k].intersection(left)), left[0])
        left.remove(ready)
        found.append(ready)
    return [children[k] for k in found]


def _fill_kernels(whole: Group, picture: Picture) -> None:
    """A group for each kernel. What none computes stands with what reads it first; an input, and
    what nothing reads, stands alone."""
    nodes = picture.nodes
    home: list[int] = [n.kernels[0] if n.kernels else -1 for n in nodes]
    for i in reversed(range(len(nodes))):
        for k in nodes[i].operands:
            if not nodes[k].kernels and not nodes[k].is_input and home[i] >= 0:
                home[k] = home[i]
    first = [len(picture.kernels)] * len(nodes)  # of the kernels that read it
    for i, node in enumerate(nodes):
        readers = node.kernels or ((home[i],) if home[i] >= 0 else ())
        for k in node.operands:
            first[k] = min(first[k], *readers) if readers else first[k]
    groups: dict[int, Group] = {}
    alone: list[int] = []
    for i, number in enumerate(home):
        if number < 0:
            alone.append(i)
        elif number in groups:
            groups[number].children.append(i)
        else:
            groups[number] = Group(picture.kernels[number].name, "kernel", nodes[i].lane, [i])
    alone.sort(key=first.__getitem__)
    for number, group in sorted(groups.items()):  # as they run
        while alone and first[alone[0]] <= number:
            whole.children.append(alone.pop(0))
        whole.children.append(group)
    whole.children += alone


def _cut(group: Group, nodes: Sequence[PictureNode]) -> Group:
    """The group with at most MOST children, by stretches of the same line, then of equal length;
    a group with nothing but one group in it is that one."""
    children: list[Group | int] = []
    for child in group.children:
        children.append(child if isinstance(child, int) else _cut(child, nodes))
    if len(children) == 1 and isinstance(children[0], Group) and group.kind != "lane":
        only = children[0]
        between = "" if only.label.startswith("·") else " / "
        label = f"{group.label}{between}{only.label}"
        return Group(label, only.kind, only.lane, only.children)
    if len(children) > FEW and group.kind != "line":
        children = _by_stretches(children, nodes, group.lane)
    while len(children) > MOST:
        size = max(2, math.ceil(len(children) / math.ceil(math.sqrt(len(children)))))
        parts = [children[i : i + size] for i in range(0, len(children), size)]
        first, made = 1, []
        for part in parts:
            last = first + sum(1 if isinstance(c, int) else len(c.nodes()) for c in part) - 1
            of = [c.label for c in part if isinstance(c, Group) and c.kind == "kernel"]
            label = f"{of[0]}–{of[-1]}" if of else f"{first}–{last}"
            made.append(Group(label, "part", group.lane, part))
            first = last + 1
        children = made
    return Group(group.label, group.kind, group.lane, children)


def _by_stretches(
    children: Sequence[Group | int], nodes: Sequence[PictureNode], lane: str
) -> list[Group | int]:
    """Nodes next to each other that stand on the same line as a group, if there are several."""

    def line(child: Group | int) -> str | None:
        return str(nodes[child].line) if isinstance(child, int) else None

    found: list[Group | int] = []
    for text, run in groupby(children, line):
        some = list(run)
        if text is None or len(some) < 4:
            found += some
        else:
            found.append(Group(text, "line", lane, some))
    return [*children] if len(found) == 1 else found


def hidden(picture: Picture, *, views: bool) -> list[bool]:
    """Which nodes are not shown where views and constants are not; what is left behind is."""
    return [not views and node.free and not node.leaves for node in picture.nodes]


def without(groups: Sequence[Group], gone: Sequence[bool]) -> list[Group]:
    """The groups without some nodes, and without groups that have no others."""
    found = []
    for group in groups:
        children: list[Group | int] = []
        for child in group.children:
            if isinstance(child, Group):
                children += without([child], gone)
            elif not gone[child]:
                children.append(child)
        if children:
            found.append(Group(group.label, group.kind, group.lane, children, group.open))
    return found


def unfold(groups: Sequence[Group], most: int, gone: Sequence[bool]) -> None:
    """Open lanes, then groups, as long as no more than `most` boxes are shown without nodes that
    are `gone`: modules before lines and stretches, those of updates last, outer groups before
    inner ones, and small ones first."""

    def width(group: Group) -> int:
        return sum(isinstance(c, Group) or not gone[c] for c in group.children)

    waiting: list[tuple] = []
    count = itertools.count()  # among equals, the first one

    def open_up(group: Group, depth: int) -> None:
        group.open = True
        for child in group.children:
            if isinstance(child, Group):
                last, update = child.kind in LAST, child.lane == UPDATE
                key = last, update, depth, width(child), next(count)
                heapq.heappush(waiting, (*key, child))

    shown = 0
    for group in groups:
        shown += width(group)
        open_up(group, 1)
    while waiting:
        *_, depth, more, _, group = heapq.heappop(waiting)
        if shown + more - 1 <= most:
            shown += more - 1
            open_up(group, depth + 1)
