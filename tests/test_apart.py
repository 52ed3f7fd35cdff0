"""Loops whose rows are independent are dealt to threads as a whole; others are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from support.plan_checks import PlanChecks, make_inputs
from tracejit.ir.text import parse
from tracejit.runtime.c_executor import CExecutor
from tracejit.schedule import schedule
from tracejit.schedule.cpu import apart
from tracejit.schedule.cpu.lower import lower
from tracejit.schedule.cpu.plan import CpuPlan
from tracejit.schedule.cpu.text import parse_cpu_plan
from tracejit.testing import assert_trains_like_eager


def recurrence(step: str = "", rows: int = 32, width: int = 32, steps: int = 64) -> str:
    """A layer of tanh; `step` makes %9 of the product %4, where it is more."""
    h = f"f32[{rows},{width}]"
    size = rows * width * (steps + 1)
    body = step.format(h=h, rows=rows, width=width) or f"%9: {h} = alias(%4)"
    inner = "\n".join(f"        {line.strip()}" for line in body.splitlines())
    return f"""
    step(%0: {h}, %1: f32[{steps},{rows},{width}], %2: f32[{width},{width}]) {{
      %3: f32[{size}] = scan(%0, %1, %2, body=body0, carried=1, sliced=1, steps={steps}, reverse=False)
      return %3
      body body0(%0: {h}, %1: {h}, %2: f32[{width},{width}]) {{
        %21: {h} = matmul(%0, %2)
        %3: {h} = mul(%21, 0.1)
        %4: {h} = add(%3, %1)
{inner}
        %20: {h} = tanh(%9)
        return %20
      }}
    }}"""  # noqa: E501


def lowered(text: str) -> CpuPlan:
    return lower(schedule(parse(text)), 32)


INDEPENDENT = {
    "a layer": "",
    "the norm of a row": """%5: f32[{rows}] = reduce_sum(%4, axes=(1,))
        %6: f32[{rows},1] = reshape(%5, shape=({rows}, 1))
        %7: {h} = expand(%6, shape=({rows}, {width}))
        %8: {h} = mul(%7, 0.01)
        %9: {h} = sub(%4, %8)""",
    "a row backwards": "%9: {h} = flip(%4, axes=(1,))",
    "half of a row": """%5: f32[{rows},16] = slice(%4, starts=(0, 8), stops=({rows}, 24), steps=(1, 1))
        %6: {h} = pad(%5, low=(0, 16), high=(0, 0), interior=(0, 0), value=0.0)
        %9: {h} = add(%4, %6)""",  # noqa: E501
    "another product": """%5: {h} = tanh(%4)
        %8: {h} = matmul(%5, %2)
        %9: {h} = mul(%8, 0.1)""",
}
TOGETHER = {
    "the mean of rows": """%5: f32[{width}] = reduce_sum(%4, axes=(0,))
        %8: f32[1,{width}] = reshape(%5, shape=(1, {width}))
        %6: {h} = expand(%8, shape=({rows}, {width}))
        %7: {h} = mul(%6, 0.03)
        %9: {h} = sub(%4, %7)""",
    "rows in another order": "%9: {h} = flip(%0, axes=(0,))",
    "the first row": """%5: f32[1,{width}] = slice(%0, starts=(0, 0), stops=(1, {width}), steps=(1, 1))
        %6: {h} = expand(%5, shape=({rows}, {width}))
        %9: {h} = add(%4, %6)""",  # noqa: E501
    "a product of the rows": "%8: {h} = matmul(%2, %0)\n %9: {h} = mul(%8, 0.1)",
    "columns as rows": """%5: f32[{width},{rows}] = permute(%0, axes=(1, 0))
        %9: {h} = add(%4, %5)""",
    "the sum of all": """%5: f32[] = reduce_sum(%4, axes=(0, 1))
        %8: f32[1,1] = reshape(%5, shape=(1, 1))
        %6: {h} = expand(%8, shape=({rows}, {width}))
        %7: {h} = mul(%6, 0.001)
        %9: {h} = sub(%4, %7)""",
    "the number of the row": """%5: {h} = iota(axis=0, shape=({rows}, {width}), dtype=f32, device='cpu')
        %6: {h} = mul(%5, 0.01)
        %9: {h} = add(%4, %6)""",  # noqa: E501
    "a row of zeros before": """%5: f32[31,{width}] = slice(%4, starts=(0, 0), stops=(31, {width}), steps=(1, 1))
        %9: {h} = pad(%5, low=(1, 0), high=(0, 0), interior=(0, 0), value=0.0)""",  # noqa: E501
}


def check(text: str, monkeypatch: pytest.MonkeyPatch, folder) -> CpuPlan:
    """The plan gives the values of the IR, and the very same bits as one whose loops are whole, on
    one thread and on more."""
    graph, plan = parse(text), schedule(parse(text))
    PlanChecks(CExecutor(3)).check(graph, plan)
    inputs, found = make_inputs(graph), []
    for threads, parts in ((1, apart.PARTS), (3, apart.PARTS), (2, ())):
        with monkeypatch.context() as patch:
            patch.setenv("TRACEJIT_CACHE", str(folder / f"{len(parts)}"))
            patch.setattr(apart, "PARTS", parts)
            found.append(PlanChecks(CExecutor(threads)).run(plan, graph, inputs)[0])
    for other in found[1:]:
        for mine, his in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(mine, his)
    return lowered(text)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_rows_that_are_independent_are_dealt(name, monkeypatch, tmp_path):
    plan = check(recurrence(INDEPENDENT[name]), monkeypatch, tmp_path)
    assert plan.parts == (4,)
    assert all(len(call.apart) == len(call.buffers) for call in plan.calls if call.loop == 0)
    assert str(parse_cpu_plan(str(plan))) == str(plan)


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_that_know_of_each_other_are_not(name, monkeypatch, tmp_path):
    plan = check(recurrence(TOGETHER[name]), monkeypatch, tmp_path)
    assert plan.parts == (1,)


def test_parts_work_in_memory_of_their_own(monkeypatch, tmp_path):
    """A product of a computed weight packs it; in each part for itself."""
    text = recurrence("""%5: f32[{width},{width}] = mul(%2, 0.5)
        %9: {h} = matmul(%4, %5)""")
    plan = check(text, monkeypatch, tmp_path)
    calls = [call for call in plan.calls if call.loop == 0]
    assert plan.parts == (4,) and any(call.working for call in calls)
    sizes = dict(plan.working)
    places = {p.memory: p.offset for p in plan.places}
    used = [(places[call.working], 4 * sizes[call.working]) for call in calls if call.working]
    used += [(p.offset, 0) for p in plan.places if not p.memory.startswith("w")]
    for start, nbytes in used:
        assert not any(start < other < start + nbytes for other, _ in used)


@pytest.mark.parametrize(
    ("rows", "width", "steps", "parts"),
    [
        (16, 32, 256, 2),  # eight rows each
        (64, 32, 64, 8),
        (2, 64, 256, 2),  # a row each
        (6, 64, 256, 2),
        (7, 64, 256, 1),  # rows that cannot be dealt evenly
        (1, 64, 256, 1),
        (8, 4, 8, 1),  # little work
        (128, 256, 16, 1),  # each product is work enough for threads
        (32, 512, 16, 1),  # and a weight of 1 MiB that each part would read
    ],
)
def test_how_many_parts(rows, width, steps, parts):
    assert lowered(recurrence("", rows, width, steps)).parts == (parts,)


class Cell(nn.Module):
    """A recurrent cell as people write it, whose state is normalized."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.to_hidden, self.again, self.norm = nn.Linear(8, 32), nn.Linear(32, 32), norm

    def forward(self, x):
        h = x.new_zeros(x.shape[1], 32)
        for t in range(x.shape[0]):
            h = torch.tanh(self.norm(self.to_hidden(x[t]) + self.again(h)))
        return h


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_cells_train_like_eager(norm):
    def make():
        torch.manual_seed(0)
        x, y, model = torch.randn(40, 16, 8), torch.randn(16, 32), Cell(norm(32))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def step():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        return step, list(model.parameters())

    assert_trains_like_eager(make, calls=8)
