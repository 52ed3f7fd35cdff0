"""`step.explain()`: what a step costs, as text, as data and as a page."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tracejit
from examples import two_layer_autograd
from support.fake import FAKE, trained
from support.programs import PROGRAMS
from tracejit.errors import BackendUnavailable
from tracejit.gpus import EAGER, GPUS, REPLAY
from tracejit.ledger import KernelCost, LaunchCost, Ledger, Memory
from tracejit.report import report
from tracejit.runtime.c_compiler import find_compiler
from tracejit.schedule.traffic import bytes_moved
from tracejit.testing import fake_device

DOCUMENT = Path(__file__).parents[1] / "docs" / "ledger.md"


def has_c() -> bool:
    try:
        find_compiler()
    except BackendUnavailable:
        return False
    return True


def ledger_of(step, *args, calls=4, options=None, **asked) -> Ledger:
    compiled = tracejit.compile(step, **(options or {}))
    for _ in range(calls):
        compiled(*args)
    return compiled.explain(**asked)


# --- the figures --------------------------------------------------------------------------------


def test_figures_by_hand():
    """A product, an activation and a sum: 4 operations of which 2 kernels or fewer are made."""

    def step(x, w):
        y = (x @ w).relu()
        return y, y.sum()

    found = ledger_of(step, torch.randn(64, 32), torch.randn(32, 48))
    assert found.step == "step" and found.mode.startswith("replay: 1 plan(s) armed")
    assert found.launches_before_fusion == 3 >= 2 * len(found.launches)
    assert found.flops == 2 * 64 * 32 * 48 + 64 * 48 + 64 * 48
    assert found.bytes_minimum == 4 * (64 * 32 + 32 * 48 + 64 * 48 + 1) == found.bytes_moved
    assert found.bytes_issued == sum(x.issued_bytes for x in found.launches) > found.bytes_moved
    assert found.memory.inputs == 4 * (64 * 32 + 32 * 48)
    assert found.memory.outputs == 4 * (64 * 48 + 1) and found.memory.eager_saved == 0
    assert found.memory.peak == found.memory.outputs + found.memory.arena
    here = Path(__file__).name
    assert all(line.startswith(f"{here}:") for x in found.launches for line in x.lines)
    assert found.predicted_seconds == sum(x.seconds for x in found.launches)
    assert found.eager_operations == 3  # of small sizes: the host decides
    assert found.eager_seconds == 3 * EAGER and not found.eager_given
    assert found.compile_seconds.keys() == {"capture", "passes", "schedule", "load"}
    spent = sum(found.compile_seconds.values())
    host = REPLAY[0] + REPLAY[1] * len(found.launches)  # longer than its kernels
    assert found.predicted_seconds < host
    saved = found.eager_seconds - host
    assert 0 <= found.pays_back_after - spent / saved < 1
    assert found.holds_back == ()


def test_a_step_moves_what_its_plan_moves():
    step, _ = two_layer_autograd.make_step()
    compiled = tracejit.compile(step)
    for _ in range(4):
        compiled()
    found = compiled.explain(measure=False)
    (plan,) = compiled.segments
    assert len(found.launches) == len(plan.launches) == 4 < found.launches_before_fusion
    assert [x.bytes for x in found.launches] == list(bytes_moved(plan))
    assert found.bytes_minimum < found.bytes_moved < found.bytes_issued
    assert not any("in flight" in text for text in found.holds_back)  # k is cut into splits


def test_other_gpus():
    step, _, _ = trained()
    compiled = tracejit.compile(step)
    for _ in range(4):
        compiled()
    found = {name: compiled.explain(name, measure=False) for name in GPUS}
    assert all(one.gpu == name for name, one in found.items())
    assert compiled.explain(measure=False).gpu == "H200"
    with pytest.raises(ValueError, match="gpu is one of A100, H100, H200, B200, not 'V100'"):
        compiled.explain("V100")


def test_seconds_of_eager_that_are_given():
    x = torch.randn(1000)
    slow = ledger_of(lambda x: x.exp(), x, eager_seconds=10.0)
    assert slow.eager_given and slow.eager_seconds == 10.0 and slow.pays_back_after == 1
    assert "eager" in str(slow) and "10 s, as given" in str(slow)
    assert f"by {'measured' if has_c() else 'predicted'} times" in str(slow)
    never = ledger_of(lambda x: x.exp(), x, eager_seconds=0.0)
    assert never.pays_back_after is None and "never, by " in str(never)


def test_nothing_of_the_users_is_touched():
    step, leaves, _ = trained(torch.optim.Adam, lr=0.1)
    compiled = tracejit.compile(step)
    other, same, _ = trained(torch.optim.Adam, lr=0.1)
    plain = tracejit.compile(other)
    for _ in range(5):
        compiled(), plain()
    before = [w.clone() for w in leaves], repr(compiled.stats)
    grads = [w.grad.data_ptr() for w in leaves]
    compiled.explain()
    assert repr(compiled.stats) == before[1]
    assert all(map(torch.equal, leaves, before[0]))
    assert [w.grad.data_ptr() for w in leaves] == grads
    assert torch.equal(compiled(), plain()) and all(map(torch.equal, leaves, same))


# --- what runs here -----------------------------------------------------------------------------


@pytest.mark.skipif(not has_c(), reason="needs a C compiler")
def test_kernels_of_the_c_executor_are_timed():
    step, _ = PROGRAMS["layer norm"].make()
    found = ledger_of(step)
    assert (found.device, found.backend) == ("cpu", "c")
    assert len(found.launches) == 2 and len(found.kernels) == 1  # fused further on the CPU
    (kernel,) = found.kernels
    assert kernel.measured > 0 and found.measured_seconds == kernel.measured
    assert kernel.lines == tuple(dict.fromkeys(n for x in found.launches for n in x.lines))
    assert "measured on cpu by c, kernels alone" in str(found)
    unmeasured = ledger_of(step, measure=False)
    assert unmeasured.measured_seconds is None and unmeasured.kernels[0].measured is None
    assert "measured on" not in str(unmeasured)


@pytest.mark.skipif(not has_c(), reason="needs a C compiler")
def test_nothing_is_timed_where_memory_is_short(monkeypatch):
    monkeypatch.setattr("tracejit.runtime.trial._free_bytes", lambda device: 1 << 20)
    found = ledger_of(lambda x: x.exp(), torch.randn(1 << 18))
    assert found.measured_seconds is None and found.kernels[0].measured is None


def test_numpy_is_not_timed():
    found = ledger_of(lambda x: x.exp().sum(), torch.randn(100), options={"backend": "numpy"})
    assert found.backend == "numpy" and found.measured_seconds is None
    assert [k.kernel for k in found.kernels] == ["kernel0"] and found.kernels[0].lines


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
def test_a_fake_device_is_not_timed():
    pytest.importorskip("triton")
    with fake_device(compiled=False):
        step, _, _ = trained()
        found = ledger_of(step, options={"backend": FAKE})
    assert found.backend == FAKE and found.measured_seconds is None
    assert [k.kernel for k in found.kernels] == [x.kernel for x in found.launches]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
@pytest.mark.slow
def test_machine_code_gives_the_figures_of_the_report():
    pytest.importorskip("triton")
    step, _ = two_layer_autograd.make_step()
    compiled = tracejit.compile(step)
    for _ in range(4):
        compiled()
    found = compiled.explain("H100", machine_code=True, measure=False)
    rows = report(compiled, target=90).rows
    assert [x.kernel for x in found.launches] == [row.name for row in rows]
    assert [x.seconds for x in found.launches] == [row.predicted["H100"].seconds for row in rows]
    guessed = compiled.explain("H100", measure=False)
    assert guessed.predicted_seconds == pytest.approx(found.predicted_seconds, rel=0.2)


# --- other steps --------------------------------------------------------------------------------


def test_segments_and_checks_are_counted():
    """A value that decides comes before the rest, and an index that the step computes is checked
    first: each has launches of its own."""
    x, at = torch.randn(40, 8), torch.arange(5)

    def step(x, at):
        if x.sum() > 1e9:
            return x
        return x[at * 2].exp()

    compiled = tracejit.compile(step)
    for _ in range(5):
        compiled(x, at)
    found = compiled.explain(measure=False)
    assert "values read: 1 before the rest" in found.mode
    assert len(compiled.segments) == 2
    segments = sum(len(plan.launches) for plan in compiled.segments)
    assert len(found.launches) == segments + 1  # and the checks
    assert found.bytes_moved > sum(sum(bytes_moved(plan)) for plan in compiled.segments)


def test_backward_outside_counts_once_it_has_run():
    w = torch.randn(30, 20, requires_grad=True)

    @tracejit.compile
    def loss_fn(x):
        return (x @ w).exp().sum()

    x = torch.randn(10, 30)
    for _ in range(4):
        loss = loss_fn(x)
    forward = loss_fn.explain(measure=False)
    loss.backward()
    both = loss_fn.explain(measure=False)
    assert len(both.launches) > len(forward.launches) and both.flops > forward.flops


def test_a_rerun_says_why():
    def step(x):
        time.time()
        return x * 2.0

    with pytest.warns(tracejit.errors.TracejitWarning):
        found = ledger_of(step, torch.randn(5))
    assert found.mode.startswith("rerun: ") and len(found.holds_back) == 1
    assert "time" in found.holds_back[0] and found.launches
    assert found.pays_back_after is None and "not known: each call runs" in str(found)


def test_a_retrace_is_said():
    compiled = tracejit.compile(lambda x: x * 2.0)
    for n in (5, 5, 5, 6, 6, 6):
        compiled(torch.randn(n))
    found = compiled.explain(measure=False)
    assert any(text.startswith("not replayed: ") for text in found.holds_back)


def test_a_step_that_runs_eagerly_has_no_figures():
    def step(x):
        return torch.fft.fft(x).real

    compiled = tracejit.compile(step, on_unsupported="eager")
    with pytest.raises(ValueError, match="step has no plan yet: call it before it is explained"):
        compiled.explain()
    with pytest.warns(tracejit.errors.TracejitWarning):
        compiled(torch.randn(8))
    found = compiled.explain()
    assert found.mode.startswith("eager: ") and found.backend == "eager"
    assert found.launches == () and found.pays_back_after is None
    assert len(found.holds_back) == 1 and "fft" in found.holds_back[0]
    assert str(found).splitlines()[0] == "step step" and "eager: " in str(found)


def test_a_step_without_launches():
    found = ledger_of(lambda x: x[:3], torch.randn(5))
    assert found.predicted_seconds == sum(x.seconds for x in found.launches)
    empty = ledger_of(lambda x: x * 2.0, torch.randn(0, 3))
    assert empty.launches == () and empty.bytes_moved == 0 and str(empty)


# --- eager ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eager_of_large_sizes_takes_what_it_moves_and_multiplies():
    """A GELU is one operation, though it is many primitives; what it is made of is not memory."""
    x = torch.zeros(2048, 2048)
    found = ledger_of(lambda x: torch.nn.functional.gelu(x).sum(), x, calls=1, measure=False)
    assert found.eager_operations == 2 < found.launches_before_fusion
    assert found.eager_seconds == pytest.approx((3 * x.nbytes + 4) / GPUS["H200"].bandwidth)
    product = ledger_of(lambda x: x @ x, x, calls=1, measure=False)
    moved, computed = 2 * x.nbytes / GPUS["H200"].bandwidth, 2 * 2048**3 / GPUS["H200"].fp32
    assert product.eager_seconds == pytest.approx(moved + computed)


class Computed(TorchDispatchMode):
    """Counts the operators that compute: no views, no allocation."""

    FREE = ("view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "detach")
    FREE += ("alias", "empty_like", "empty", "unsqueeze", "squeeze", "split", "zeros", "as_strided")
    FREE += ("ones_like", "ones", "zeros_like", "lift_fresh", "is_same_size", "new_empty_strided")
    FREE += ("_unsafe_view", "split_with_sizes", "unbind", "_reshape_alias", "new_zeros", "full")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in self.FREE
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n in PROGRAMS if not n.startswith("8")])
@pytest.mark.sweep(8)
def test_eager_is_not_made_slower_than_it_is(name):
    """Operations are at most what eager's dispatcher sees, and not far below."""
    step, _ = PROGRAMS[name].make()
    step()
    with Computed() as seen:
        step()
    found = ledger_of(step, measure=False).eager_operations
    assert 0.3 * seen.count <= found <= seen.count, (found, seen.count)


SAVED = [name for name in PROGRAMS if not name.startswith(("5 sgd f", "5 sgd s", "8"))]


def kept_by_eager(step, leaves) -> int:
    """Bytes of the storages that eager saves for backward, those from outside left out."""
    outside = {t.untyped_storage()._cdata for t in leaves}
    outside |= {t.untyped_storage()._cdata for t in tensors_within(step)}
    found, held = {}, []

    def pack(t):
        storage = t.untyped_storage()
        held.append(storage)  # so that its address is not used again
        if storage._cdata not in outside:
            found[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(found.values())


def tensors_within(x, depth=4):
    """The tensors that a closure leads to."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, torch.nn.Module):
        yield from (*x.parameters(), *x.buffers())
    elif isinstance(x, (list, tuple)) and depth:
        for item in x:
            yield from tensors_within(item, depth - 1)
    elif depth:
        for cell in getattr(x, "__closure__", None) or ():
            yield from tensors_within(cell.cell_contents, depth - 1)


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.sweep(4)
def test_what_eager_keeps_for_its_backward(name):
    """Formulas read what eager saves, but for statistics of rows, which they compute again."""
    step, leaves = PROGRAMS[name].make()
    eager = kept_by_eager(step, leaves)
    ours = ledger_of(step, measure=False, calls=2).memory.eager_saved
    assert abs(ours - eager) <= 0.08 * eager + 4096, (ours, eager)


# --- as data and as a page ----------------------------------------------------------------------


def test_the_document_lists_the_keys():
    text = DOCUMENT.read_text()
    rows = re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE)
    keys = [key for row in rows for key in re.findall(r"`(\w+)`", row)]
    found = ledger_of(lambda x: x.exp(), torch.randn(9)).as_dict()
    assert sorted(keys) == sorted(found)
    for title, kind in (("A launch", LaunchCost), ("A kernel", KernelCost), ("`memory`", Memory)):
        paragraph = re.search(rf"^{title}: .*?(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL)[0]
        named = set(re.findall(r"`(\w+)`", paragraph)) - {"memory"}
        assert named == {field.name for field in fields(kind)}, title


def test_plain_data():
    step, _ = PROGRAMS["softmax"].make()
    found = ledger_of(step)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["launches"][0]["kernel"] == found.launches[0].kernel
    assert plain["memory"]["inputs"] == found.memory.inputs
    assert plain["launches"][0]["lines"] == list(found.launches[0].lines)


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects them with their attributes and text."""

    VOID = ("meta",)

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def test_the_page(tmp_path):
    x = torch.randn(300, 200)
    compiled = tracejit.compile(lambda x: x.softmax(-1).exp().sum(0))  # its name is to be escaped
    for _ in range(4):
        compiled(x)
    found = compiled.explain()
    found.html(tmp_path / "step.html")
    text = (tmp_path / "step.html").read_text("utf-8")
    page = Page(text)
    assert page.text.count("step <lambda>") == 2 and "<lambda>" not in text
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href"} & set(page.attributes)
    assert "http" not in text and "url(" not in text and "@import" not in text
    said = "\n".join(page.text)
    for name, value in found.summary():
        assert name in said and value in said
    rows = len(found.launches) + len(found.kernels)
    assert text.count('class="bar"') == rows
    for line in (*found.launches, *found.kernels):
        assert line.kernel in page.text
    widths = [float(w) for w in re.findall(r'style="width: ([\d.]+)rem"', text)]
    assert max(widths) == 12.0 and min(widths) >= 0.0


def test_the_page_of_a_step_without_figures(tmp_path):
    compiled = tracejit.compile(lambda x: torch.fft.fft(x).real, on_unsupported="eager")
    with pytest.warns(tracejit.errors.TracejitWarning):
        compiled(torch.randn(8))
    compiled.explain().html(str(tmp_path / "step.html"))
    assert "eager: " in "".join(Page((tmp_path / "step.html").read_text("utf-8")).text)
