"""Graph, Kernel and Plan texts parse back to equal objects, for whole programs and functions."""

from __future__ import annotations

import pytest

import tracejit
from support.function_checks import outcome, step_of
from support.function_samples import each_function, samples_of
from support.oracle import captured_of
from support.programs import CALLS, PROGRAMS
from tracejit.capture.effects.captured import graph_key
from tracejit.capture.trace.table import function_name
from tracejit.ir.graph import Graph
from tracejit.ir.text import parse
from tracejit.passes import optimize
from tracejit.schedule import schedule
from tracejit.schedule.kernel_text import parse_kernel
from tracejit.schedule.plan import Plan
from tracejit.schedule.plan_text import parse_plan

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # eager's deprecations


def check_graph(graph: Graph) -> None:
    """Equal up to the numbers of values, which a text counts anew."""
    again = parse(str(graph))
    assert str(again) == str(graph)
    assert graph_key(again) == graph_key(graph)
    assert [n.where for n in again.nodes] == [n.where for n in graph.nodes]
    assert parse(str(again)) == again


def check_plan(plan: Plan) -> None:
    text = str(plan)
    again = parse_plan(text)
    assert again == plan and str(again) == text
    for launch in plan.launches:
        kernel = parse_kernel(str(launch.kernel))
        assert kernel == launch.kernel and str(kernel) == str(launch.kernel)


def check(graph: Graph) -> None:
    """The texts of a graph and of all that it becomes."""
    check_graph(graph)
    final = optimize(graph)
    check_graph(final)
    check_plan(schedule(final))
    check_plan(schedule(final, fuse=False))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.sweep(8)
def test_programs(name):
    step, _ = PROGRAMS[name].make(**PROGRAMS[name].small)
    captured = captured_of(step)
    check(captured.graph)
    for node in captured.effects.outside:
        check(node.graph)
    compiled = tracejit.compile(step)
    for _ in range(CALLS):
        compiled()
    check_graph(compiled.graph)
    for plan in compiled.plans:
        check_plan(plan)


PARTS = [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 20))]


@pytest.mark.parametrize("part", PARTS)
def test_functions(part):
    """The first sample of every function that eager accepts, with its gradient if it has one."""
    checked, failures = 0, []
    for function in each_function()[part::20]:
        for sample in samples_of(function):
            captured, error = outcome(captured_of, step_of(function, sample))
            if error is not None:
                continue
            try:
                check(captured.graph)
            except AssertionError as found:
                failures.append(f"{function_name(function)}{sample}: {found}")
            checked += 1
            break
    assert not failures, "\n\n".join(failures)
    assert checked > 25
