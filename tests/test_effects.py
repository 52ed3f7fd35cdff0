"""Effects as data: what each kind of step leaves behind, and a text form that parses back."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from support.oracle import captured_of, traced
from support.programs import PROGRAMS
from tracejit.capture.effects.effects import (
    Effects,
    Given,
    HostSlot,
    Joined,
    Made,
    Sequenced,
    Slot,
    rebuilt,
)
from tracejit.capture.effects.text import parse_effects
from tracejit.errors import InvalidGraph

Pair = namedtuple("Pair", "loss count")


def check(effects: Effects) -> None:
    """The text parses back to the same effects."""
    text = str(effects)
    again = parse_effects(text)
    assert str(again) == text
    for node, same in zip(effects.outside, again.outside, strict=True):
        assert str(same.graph) == str(node.graph)
    for name in set(Effects.__dataclass_fields__) - {"outside"}:
        assert getattr(again, name) == getattr(effects, name), name


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_text_of_a_program_parses_back(name):
    step, _ = PROGRAMS[name].make(**PROGRAMS[name].small)
    check(captured_of(step).effects)


def returned_structures(x, scale):
    loss = (x * scale).sum()
    return {"pair": Pair(loss, 3), "list": [loss, "it's"], ("key", 1): (x, scale * 2, None)}


def writes_and_gradients(x, scale):
    x.grad = None
    with torch.no_grad():
        x.mul_(scale)
    x.grad = torch.zeros_like(x)
    return x.grad, x[1:], x.t()


def a_leaf_and_a_view(x, scale):
    made = torch.zeros(2, requires_grad=True)
    made.sum().backward()
    y = made * 2
    return made, y, y[:1], x.detach()


def moved_data(x, scale):
    x.data = x.data * 2
    return x.requires_grad


def flags(x, scale):
    (x * scale).sum().backward()
    x.requires_grad_(False)
    y = torch.zeros_like(x)
    return y.requires_grad_(), y.requires_grad_(False)


STEPS = [returned_structures, writes_and_gradients, a_leaf_and_a_view, moved_data, flags]


@pytest.mark.parametrize("step", STEPS)
def test_the_text_of_each_kind_of_effect_parses_back(step):
    check(captured_of(step, torch.randn(2, 2, requires_grad=True), 0.5).effects)


def test_escapes_and_stores():
    w = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    kept = []

    def step():
        optimizer.zero_grad()
        w.sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
        kept.append(w * 2)

    captured, call = traced(step)
    check(captured.effects)
    assert captured.effects.stores == ((0, "lr", HostSlot(0)),)
    assert call.holders[0] is optimizer.param_groups[0]
    assert len(call.escaped) == len(captured.effects.escaped) == 2  # kept, and the momentum


def test_texts_of_numbers():
    text = Joined(("it's \n\"", HostSlot(0), "{}", HostSlot(1)))
    stores = ((0, "tag", text), (1, ..., Joined((HostSlot(1),))), (1, 3, Joined(("#",))))
    effects = Effects(stores=stores, returned=Sequenced("tuple", (text, Given(0))))
    check(effects)
    assert rebuilt(text, [], ["a", "b"], []) == ("it's \n\"", "a", "{}", "b")


def test_what_is_returned_is_told_by_position():
    captured, call = traced(returned_structures, torch.ones(2), 2.0)
    (pair, items, last) = (item for _, item in captured.effects.returned.items)
    assert pair == Sequenced(Given(0), (Slot(0), Given(1)))
    assert items == Sequenced("list", (Slot(0), Given(2)))
    assert last.items[1] == HostSlot(0)
    assert call.given[:3] == [Pair, 3, "it's"]


def test_text_in_text_out():
    text = """effects {
  host %0, 0.5, nan
  written 0, 2
  write real 2 <- host 0
  store 0 'lr' <- h1
  number 0 = f32 host 1
  made 0 = output 0 (64, 10) strides (10, 1) offset 0 requires_grad
  made 1 = real 2
  made 2 = host 0 () strides () offset 0
  made 3 = view 0 (64,) strides (10,) offset 3
  made 4 = alias 2 (64,) strides (1,) offset h1
  node 0 inputs (('real', 0),) saved (('output', 1),) hosts (0,) {
    step_backward(%0: f32[2], %1: f32[2]) {
      %2: f32[2] = mul(%0, %1)
      return %2
    }
  }
  no node 3 because "it's a view"
  data 0 <- made 0
  grad 0 <- made 0
  grad 1 <- none
  leaf grad 0 <- made 3
  escaped 0
  callback
  callback 0 <- host 1, 'epoch' <- host 0
  return {'a': (m0, ), g0: [h0, g1(m1, m2)], 3: ()}
}"""
    assert str(parse_effects(text)) == text
    assert parse_effects(text).made[1] == Made("real", 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "effects {",
        "effects {\n}",
        "effects {\n  return m0\n  return m1\n}",
        "effects {\n  something 1\n  return m0\n}",
        "effects {\n  made 0 = output x\n  return m0\n}",
        "effects {\n  return q0\n}",
        "effects {\n  return __import__('os')\n}",
        "effects {\n  node 0 inputs () saved () hosts () {\n  return m0\n}",
    ],
)
def test_what_is_no_text_of_effects_is_refused(text):
    with pytest.raises(InvalidGraph):
        parse_effects(text)
