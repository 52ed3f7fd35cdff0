"""Pictures of steps as data: phases, modules, kernels, groups; drawings for papers."""

from __future__ import annotations

import os
import re
import struct
import xml.etree.ElementTree as ElementTree
from collections import Counter

import pytest
import torch

import tracejit
from examples import loss_outside, two_layer_autograd, two_layer_manual
from support.fake import FAKE, trained
from support.pictures import made_up, net_step, overlapping
from support.programs import PROGRAMS
from tracejit.pictures.collect import FREE
from tracejit.pictures.grouping import MOST, VIEWS, Group, hidden, tree, unfold
from tracejit.pictures.layered import layered, settle
from tracejit.pictures.picture import BACKWARD, FORWARD, LANES, UPDATE, Picture
from tracejit.pictures.scene import scene
from tracejit.testing import fake_device


def picture_of(step, *args, calls: int = 4) -> Picture:
    compiled = tracejit.compile(step)
    for _ in range(calls):
        compiled(*args)
    return compiled._picture("H200", measure=False)


def lane_of(picture: Picture) -> dict[str, str]:
    return {n.name: n.lane for n in picture.nodes}


# --- what is what -------------------------------------------------------------------------------

# of a two-layer net, in the order of its graph
FORWARD_OPS = ["matmul", "maximum", "matmul", "sub", "mul", "reduce_sum"]


@pytest.mark.parametrize("example", [two_layer_autograd, two_layer_manual])
def test_phases_of_the_two_layer_net(example):
    """Derivatives are told from the rest where autograd makes them and where they are written."""
    picture = picture_of(example.make_step()[0])
    of = {lane: [n.op for n in picture.nodes if n.lane == lane] for lane in LANES}
    assert [op for op in of[FORWARD] if op != "input"] == FORWARD_OPS
    assert Counter(of[BACKWARD])["matmul"] == 3 and "where" in of[BACKWARD]
    assert {"mul", "sub"} <= {*of[UPDATE]} <= {"mul", "sub", "full", "input"}
    written = [n.leaves for n in picture.nodes if n.op == "sub" and n.lane == UPDATE]
    assert sorted(written) == [("writes w1",), ("writes w2",)]
    (loss,) = (n for n in picture.nodes if n.op == "reduce_sum")
    assert loss.leaves == ("returned",) and loss.shape == () and loss.nbytes == 4
    (lr,) = (n for n in picture.nodes if n.name == "lr")
    assert lr.is_input and lr.lane == UPDATE and lr.type == "f64[]@host"


def test_a_net_is_drawn_by_modules():
    step, _ = net_step()
    picture = step._picture("H200", measure=False)
    ways = [n.module for n in picture.nodes if n.lane == FORWARD and n.op == "matmul"]
    block = ("model", "blocks", "0", "0")
    assert ways == [block, ("model", "blocks", "1", "0"), block, ("model", "head")]
    late = {n.module for n in picture.nodes if n.lane == BACKWARD and n.op == "matmul"}
    assert late == {block, ("model", "blocks", "1", "0"), ("model", "head")}
    kinds = {n.module: n.kind for n in picture.nodes if n.lane == FORWARD and n.module}
    assert kinds[block] == "Linear" and kinds["model", "blocks", "0", "1"] == "ReLU"
    updates = {n.module for n in picture.nodes if n.lane == UPDATE and "sqrt" in n.op}
    assert updates == {(*way, p) for way in late for p in ("weight", "bias")}
    lines = {n.line.number for n in picture.nodes if n.lane == BACKWARD}
    assert len(lines) == 1  # that of loss.backward()
    assert {n.line.file for n in picture.nodes} == {n.line.file for n in picture.nodes[:1]}


def test_second_models_and_critics():
    """A second forward pass that reads what was updated is one, not part of the update."""
    one = torch.nn.Linear(3, 3)
    other = torch.nn.Linear(3, 3)
    first = torch.optim.SGD(one.parameters(), lr=0.1)
    second = torch.optim.SGD(other.parameters(), lr=0.1)
    x = torch.randn(4, 3)

    def step():
        first.zero_grad()
        one(x).tanh().sum().backward()
        first.step()
        second.zero_grad()
        loss = one(other(x)).exp().sum()
        loss.backward()
        second.step()
        return loss

    lanes = Counter((n.op, n.lane) for n in picture_of(step).nodes)
    assert lanes["exp", FORWARD] == 1 and lanes["tanh", FORWARD] == 1
    assert lanes["matmul", FORWARD] == 3 and lanes["matmul", UPDATE] == 0


def test_clipping_and_user_code_in_backward():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            return g.cosh()

    w = torch.randn(5, requires_grad=True)

    def step():
        w.grad = None
        loss = Twice.apply(w * 2.0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w], 1.0)
        with torch.no_grad():
            w.sub_(0.1 * w.grad)
        return loss

    lanes = {n.op: n.lane for n in picture_of(step).nodes}
    assert lanes["sin"] == FORWARD and lanes["sqrt"] == UPDATE
    cosh = [n.lane for n in picture_of(step).nodes if n.op in ("cosh", "exp")]
    assert cosh and set(cosh) == {BACKWARD}


def test_a_backward_outside_is_drawn_beside_the_forward():
    loss_fn, parameters = loss_outside.make_loss()
    compiled = tracejit.compile(loss_fn)
    batch = loss_outside.make_batch()
    for _ in range(3):
        compiled(*batch).backward()
    picture = compiled._picture("H200", measure=False)
    late = [n for n in picture.nodes if n.lane == BACKWARD]
    leaves = sorted(leaf for n in late for leaf in n.leaves)
    assert leaves == ["gradient of w1", "gradient of w2"]
    assert any(n.name == "gradient" and n.is_input for n in late)
    forward = {i for i, n in enumerate(picture.nodes) if n.lane == FORWARD}
    assert any(forward.intersection(n.operands) for n in late)  # what is kept for it
    assert {picture.nodes[k].lane for n in late for k in n.operands} == {FORWARD, BACKWARD}


def test_gradients_and_numbers_that_are_read():
    model = torch.nn.Linear(3, 2)

    def step(x):
        model.zero_grad()
        loss = model(x).sum()
        loss.backward()
        return loss.item()

    picture = picture_of(step, torch.randn(4, 3))
    leaves = {leaf for n in picture.nodes for leaf in n.leaves}
    assert leaves == {"read by Python", "gradient of model.weight", "gradient of model.bias"}


def test_segments_are_drawn_as_they_run():
    """What is read in the middle is a segment of its own, whose results the rest reads."""
    w = torch.randn(6, requires_grad=True)

    def step(x):
        loss = (x * w).pow(2).sum()
        if loss > 1e9:
            loss = loss * 2
        chosen = x[x > 0]
        loss.backward()
        with torch.no_grad():
            w.sub_(0.1 * w.grad)
            w.grad = None
        return loss, chosen.exp().sum()

    compiled, x = tracejit.compile(step), torch.randn(6)
    for _ in range(4):
        compiled(x)
    assert len(compiled.segments) == 3
    picture = compiled._picture("H200", measure=False)
    assert [k.text for k in picture.kernels] == compiled.kernels
    assert "it runs in 3 segments" in picture.notes[0]
    read = [n for n in picture.nodes if "read by Python" in n.leaves]
    assert len(read) == 2 and read[0].dtype == "b1"
    names = Counter(n.name for n in picture.nodes if n.is_input)
    assert names["x"] == names["w"] == 1  # one node, whichever segments read it
    late = [n for n in picture.nodes if n.lane == BACKWARD]
    behind = {picture.nodes[k].kernels for n in late for k in n.operands}
    assert behind > {n.kernels for n in late}  # what the first segment has computed
    assert [n.leaves for n in picture.nodes if n.op == "sub"] == [("writes w",)]


def test_checks_are_noted():
    table = torch.randn(10, 3)
    picture = picture_of(lambda i: table[(i * 2).long()].sum(), torch.tensor([1, 2]))
    assert picture.notes == ("values are checked before anything is written, which is not drawn",)


# --- kernels ------------------------------------------------------------------------------------


@pytest.mark.sweep(8)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_computed_node_has_its_kernels(name):
    """What costs anything is computed by some kernel; what costs nothing needs none."""
    step, _ = PROGRAMS[name].make()
    picture = picture_of(step)
    host = [n for n in picture.nodes if n.type.endswith("@host")]
    for node in picture.nodes:
        free = node.free or node.is_input or node in host
        assert free == (not node.kernels), node


def test_kernels_stand_at_their_lines_with_source_and_cost():
    step, _ = two_layer_autograd.make_step()
    compiled = tracejit.compile(step)
    for _ in range(4):
        compiled()
    picture = compiled._picture("H200", measure=True)
    assert [k.text for k in picture.kernels] == compiled.kernels
    for number, kernel in enumerate(picture.kernels):
        lines = {str(n.line) for n in picture.nodes if number in n.kernels}
        assert lines <= {*kernel.lines}
        assert kernel.name == f"k{number}" and dict(kernel.cost)["bytes"]
    assert sum(k.seconds for k in picture.kernels) > 0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
def test_kernels_of_a_gpu_that_is_not_here():
    pytest.importorskip("triton")
    with fake_device(compiled=False):
        step, _, _ = trained()
        compiled = tracejit.compile(step, backend=FAKE)
        for _ in range(4):
            compiled()
        picture = compiled._picture("H200", measure=True)
    assert {k.language for k in picture.kernels} == {"Triton"}
    assert all("@triton.jit" in k.text for k in picture.kernels)
    assert all("predicted" in dict(k.cost)["time on H200"] for k in picture.kernels)
    assert all(k.seconds > 0 for k in picture.kernels)
    assert {k for n in picture.nodes for k in n.kernels} == {*range(len(picture.kernels))}


def test_kernels_of_the_numpy_executor():
    step, _ = two_layer_autograd.make_step()
    compiled = tracejit.compile(step, backend="numpy")
    for _ in range(3):
        compiled()
    picture = compiled._picture("H200", measure=False)
    assert {k.language for k in picture.kernels} == {"IR"}
    assert all(int(dict(k.cost)["operations"].replace(",", "")) > 0 for k in picture.kernels)


def test_free_families_are_those_without_work():
    assert FREE == ("movement", "source", "order")


# --- groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("count, modules", [(10, True), (700, True), (2000, False)])
def test_groups_have_each_node_once_and_few_children(view, count, modules):
    picture = made_up(count, modules=modules)
    groups = tree(picture, view)
    assert sorted(i for g in groups for i in g.nodes()) == [*range(count)]

    def check(group: Group) -> None:
        assert 0 < len(group.children) <= MOST, group.label
        for child in group.children:
            if isinstance(child, Group):
                check(child)

    for group in groups:
        check(group)


def test_groups_follow_each_other():
    """Edges between the children of a group go forward: what is called twice is two groups."""
    step, _ = net_step()
    picture = step._picture("H200", measure=False)
    for view in ("module", "line"):
        groups = tree(picture, view)
        labels = [g.label for g in _all(groups)]
        assert view != "module" or "0 / 0 · 2" in labels or any("· 2" in x for x in labels)
        for group in _all(groups):
            order: dict[int, int] = {}
            for k, child in enumerate(group.children):
                some = [child] if isinstance(child, int) else child.nodes()
                order |= dict.fromkeys(some, k)
            for i, k in order.items():
                for a in picture.nodes[i].operands:
                    assert order.get(a, 0) <= k


def _all(groups):
    for group in groups:
        yield group
        yield from _all([c for c in group.children if isinstance(c, Group)])


def test_few_boxes_are_open_at_first():
    picture = made_up(2000)
    gone = hidden(picture, views=True)
    groups = tree(picture, "module")
    unfold(groups, 50, gone)

    def shown(group: Group) -> int:
        return sum(shown(c) if isinstance(c, Group) and c.open else 1 for c in group.children)

    assert all(g.open for g in groups) and 10 <= sum(map(shown, groups)) <= 50


# --- the layout, and drawings for papers ----------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_layout_has_no_overlap_and_edges_go_down(seed):
    picture = made_up(30, seed)
    boxes = [(40.0 + 7 * (i % 9), 20.0 + 5 * (i % 3)) for i in range(30)]
    edges = [(a, i) for i, n in enumerate(picture.nodes) for a in n.operands]
    found = layered(boxes, edges)
    rects = [(*p, *b) for p, b in zip(found.places, boxes, strict=True)]
    assert not overlapping(rects)
    assert all(x >= 0 and x + w <= found.w + 1e-6 and y >= 0 for x, y, w, _ in rects)
    for (a, b), route in zip(edges, found.routes, strict=True):
        assert rects[a][1] + rects[a][3] <= rects[b][1]
        ys = [y for _, y in route]
        assert ys == sorted(ys) and ys[0] == rects[a][1] + rects[a][3] and ys[-1] == rects[b][1]
        for (x0, y0), (x1, y1) in zip(route, route[1:], strict=False):
            if x0 == x1:  # past the boxes of a row
                past = (x0, y0, 0.01, y1 - y0)
                others = [r for i, r in enumerate(rects) if i not in (a, b)]
                assert not [r for r in others if overlapping([r, past])]


def test_centers_are_as_near_as_they_can_be():
    assert settle([10, 10], [0, 100], [1, 1]) == [0, 100]
    assert settle([10, 10], [0, 0], [1, 1]) == [-14, 14]  # 10 and a gap of 18 apart
    assert settle([10, 10], [0, 0], [3, 1]) == [-7, 21]
    assert layered([], []).places == []


@pytest.mark.parametrize("count", [1, 10, 300, 2000])
def test_a_drawing_has_no_overlap_of_boxes_and_labels(count):
    drawn = scene(made_up(count), 48, views=count < 60)
    boxes = [
        (r.x, r.y, r.w, r.h) for r in drawn.rects if r.style in ("node", "input", "free", "folded")
    ]
    assert boxes and not overlapping(boxes)
    assert all(x >= 0 and y >= 0 and x + w <= drawn.w and y + h <= drawn.h for x, y, w, h in boxes)
    labels = [t for t in drawn.texts if t.style == "edge" and re.search("·", t.text)]
    rects = [(t.x - 3.05 * len(t.text), t.y - 9.5, 6.1 * len(t.text), 12.0) for t in labels]
    assert not overlapping(rects)
    assert not [p for p in overlapping([*rects, *boxes]) if p[0] in rects or p[1] in rects]


def test_svg(tmp_path):
    step, _ = net_step()
    step.draw(tmp_path / "step.svg", measure=False)
    root = ElementTree.parse(tmp_path / "step.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = ["".join(t.itertext()) for t in root.iter(f"{space}text")]
    assert {"forward", "backward", "update", "model", "blocks"} <= {*texts}
    boxes = [r for r in root.iter(f"{space}rect") if r.get("class") == "box"]
    assert len(boxes) >= 20
    w, h = float(root.get("width")), float(root.get("height"))
    for r in boxes:
        assert float(r.get("x")) + float(r.get("width")) < w
        assert float(r.get("y")) + float(r.get("height")) < h
    assert "href" not in (tmp_path / "step.svg").read_text()


def test_png(tmp_path):
    pytest.importorskip("matplotlib", reason="PNGs are drawn by matplotlib")
    step, _ = two_layer_autograd.make_step()
    compiled = tracejit.compile(step)
    compiled()
    compiled.draw(tmp_path / "step.png", measure=False)
    data = (tmp_path / "step.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    w, h = struct.unpack(">2I", data[16:24])
    drawn = scene(compiled._picture("H200", measure=False), 48, views=True)
    assert abs(w / h - (drawn.w + 24) / (drawn.h + 24)) < 0.01 and w > 1000


# --- what is refused ------------------------------------------------------------------------------


def test_what_cannot_be_drawn(tmp_path):
    step = tracejit.compile(lambda x: x.exp())
    for draw in (step.draw, step.to_tensorboard):
        with pytest.raises(ValueError, match="has no plan yet: call it before it is drawn"):
            draw(tmp_path / "x.html")
    step(torch.ones(3))
    with pytest.raises(ValueError, match=r"ends with .html, .svg, .png, not '.pdf'"):
        step.draw(tmp_path / "x.pdf")
    with pytest.raises(ValueError, match="not 'picture'"):
        step.draw(tmp_path / "picture")
    with pytest.raises(ValueError, match="gpu is one of"):
        step.draw(tmp_path / "x.html", gpu="V100")
    with pytest.raises(FileNotFoundError):
        step.draw(tmp_path / "none" / "x.svg")
    assert not [*tmp_path.iterdir()]
    eager = tracejit.compile(lambda x: torch.fft.rfft(x).abs(), on_unsupported="eager")
    with pytest.warns(UserWarning):
        eager(torch.ones(8))
    if eager.explain_mode().startswith("eager"):
        with pytest.raises(ValueError, match="has no plan that could be drawn: eager: "):
            eager.draw(tmp_path / "x.html")


def test_drawing_changes_nothing(tmp_path):
    step, model = net_step()
    same, other = net_step()
    before, stats = [p.clone() for p in model.parameters()], repr(step.stats)
    step.draw(tmp_path / "step.html")
    assert repr(step.stats) == stats
    assert all(map(torch.equal, model.parameters(), before))
    assert torch.equal(step(), same()) and all(
        map(torch.equal, model.parameters(), other.parameters())
    )
