"""Modules, optimizers and user objects in a step, with everything about them changed between calls.

Every case is compared with eager after every call, and the table says in which mode it ends; see
`support/worlds.py`. What plain functions and Python itself can do is in test_adversarial_python.py.
"""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from torch import nn

from support.worlds import Case, Trainer, X, check, on_trainer, table, trainer

CASES: dict[str, Case] = {}
case = table(CASES)

# ---- hyperparameters


@case("replay", changes={3: on_trainer(lambda t: t.opt.param_groups[0].update(lr=0.01))})
def learning_rate(w):
    return trainer(w)


@case(
    "replay", changes={3: on_trainer(lambda t: t.opt.param_groups[0].update(lr=torch.tensor(0.5)))}
)
def learning_rate_becomes_a_tensor(w):
    return trainer(w)


@case(
    "replay", changes={4: on_trainer(lambda t: t.opt.param_groups[0].update(momentum=0.0))}, calls=9
)
def momentum_switched_off(w):
    return trainer(w, momentum=0.9)


@case(
    "replay",
    changes={4: on_trainer(lambda t: t.opt.param_groups[0].update(nesterov=True))},
    calls=9,
)
def nesterov_switched_on(w):
    return trainer(w, momentum=0.9)


@case(
    "replay",
    changes={4: on_trainer(lambda t: t.opt.param_groups[0].update(weight_decay=0.3))},
    calls=9,
)
def weight_decay_switched_on(w):
    return trainer(w)


@case(
    "replay",
    changes={4: on_trainer(lambda t: t.opt.param_groups[0].update(maximize=True))},
    calls=9,
)
def maximize_switched_on(w):
    return trainer(w)


@case("replay", changes={4: lambda w: w.opt.param_groups[0].update(betas=(0.5, 0.6))}, calls=9)
def betas(w):
    w.p = torch.ones(3, requires_grad=True)
    w.opt = torch.optim.Adam([w.p], lr=0.1)

    def step():
        w.opt.zero_grad()
        w.p.pow(2).sum().backward()
        w.opt.step()

    return step


def _split_groups(t):
    t.opt.param_groups[0]["params"] = [*t.model[0].parameters()]
    t.opt.add_param_group({"params": [*t.model[2].parameters()], "lr": 0.5})


@case("replay", changes={4: on_trainer(_split_groups)}, calls=9)
def groups_split(w):
    return trainer(w)


@case("replay", changes={4: on_trainer(lambda t: t.opt.param_groups[0]["params"].pop())}, calls=9)
def parameter_removed_from_a_group(w):
    return trainer(w)


@case(
    "replay", changes={4: on_trainer(lambda t: t.opt.param_groups[0]["params"].reverse())}, calls=9
)
def parameters_of_a_group_in_another_order(w):
    return trainer(w, momentum=0.5)


def _another_optimizer(t):
    t.opt = torch.optim.Adam(t.model.parameters(), lr=0.02)


@case("replay", changes={4: on_trainer(_another_optimizer)}, calls=9)
def optimizer_replaced(w):
    return trainer(w)


@case("replay", changes={4: on_trainer(lambda t: t.opt.state.clear())}, calls=9)
def optimizer_state_cleared(w):
    return trainer(w, momentum=0.9)


@case(
    "replay",
    changes={4: lambda w: w.t.opt.state[w.t.model[0].weight]["momentum_buffer"].zero_()},
    calls=9,
)
def momentum_edited(w):
    return trainer(w, momentum=0.9)


# ---- attributes of the trainer, its class, its instance


@case("replay", changes={3: on_trainer(lambda t: setattr(t, "weight", 3.0))})
def attribute_of_the_trainer(w):
    return trainer(w)


@case("replay", changes={3: lambda w: setattr(w.cls, "scale", 2.0)})
def class_attribute(w):
    class Mine(Trainer):
        scale = 1.0

    w.cls, w.t = Mine, Mine()
    return w.t.step


@case("replay", changes={3: on_trainer(lambda t: setattr(t, "scale", 4.0))})
def class_attribute_shadowed_by_the_instance(w):
    return trainer(w)


@case("replay", changes={3: lambda w: setattr(w.cls, "scale", 4.0)})
def class_attribute_shadowed_by_a_subclass(w):
    class Mine(Trainer):
        pass

    w.cls, w.t = Mine, Mine()
    return w.t.step


def _patched(self, x, y):
    return (self.model(x) - y).abs().mean()


@case(
    "replay",
    changes={3: on_trainer(lambda t: setattr(t, "loss", MethodType(_patched, t)))},
    calls=9,
)
def method_replaced_on_the_instance(w):
    return trainer(w)


@case("replay", changes={3: lambda w: setattr(w.cls, "loss", _patched)}, calls=9)
def method_replaced_on_the_class(w):
    class Mine(Trainer):
        def loss(self, x, y):
            return super().loss(x, y) * 2

    w.cls, w.t = Mine, Mine()
    return w.t.step


@case("replay", changes={3: lambda w: setattr(w.t, "__class__", w.cls)}, calls=9)
def class_of_the_trainer_replaced(w):
    class Mine(Trainer):
        def loss(self, x, y):
            return super().loss(x, y) * 2

    w.cls, w.t = Mine, Trainer()
    return w.t.step


class Cubed(Trainer):
    def loss(self, x, y):
        return super().loss(x, y) ** 3


@case("replay", changes={3: lambda w: setattr(w.cls, "__bases__", (Cubed,))}, calls=9)
def base_class_replaced(w):
    class Mine(Trainer):
        def loss(self, x, y):
            return super().loss(x, y)

    w.cls, w.t = Mine, Mine()
    return w.t.step


def _other_code(self, x, y):
    return (self.model(x) - y).pow(4).sum()


@case("replay", changes={3: lambda w: setattr(w.f, "__code__", _other_code.__code__)}, calls=9)
def code_of_a_method_replaced(w):
    class Mine(Trainer):
        def loss(self, x, y):
            return (self.model(x) - y).pow(2).mean()

    w.t, w.f = Mine(), Mine.loss
    return w.t.step


@case("replay", changes={3: on_trainer(lambda t: setattr(t, "_gain", 5.0))})
def property_of_the_trainer(w):
    class Mine(Trainer):
        _gain = 1.0

        @property
        def gain(self):
            return self._gain * 2

        def loss(self, x, y):
            return super().loss(x, y) * self.gain

    w.t = Mine()
    w.t._gain = 2.0
    return w.t.step


@case("replay", changes={3: on_trainer(lambda t: setattr(t, "gain", 5.0))})
def slots(w):
    class Slotted:
        __slots__ = ("gain", "model", "late")

        def step(self):
            loss = self.model(X).pow(2).mean() * self.gain
            loss.backward()
            return loss.detach()

    w.t = t = Slotted()
    t.gain, t.model = 2.0, nn.Linear(4, 3)
    return t.step


@case("replay", changes={3: on_trainer(lambda t: setattr(t, "late", 5.0))}, calls=9)
def slot_filled_later(w):
    class Slotted:
        __slots__ = ("late", "model")

        def step(self):
            return self.model(X).sum().detach() * (self.late if hasattr(self, "late") else 1)

    w.t = t = Slotted()
    t.model = nn.Linear(4, 3)
    return t.step


@case("replay")
def attribute_counter(w):
    class Mine(Trainer):
        seen = 0

        def step(self):
            self.seen += 1
            return super().step() * self.seen

    w.t = Mine()
    return w.t.step


@case("replay")
def class_counter(w):
    class Mine(Trainer):
        seen = 0

        def step(self):
            type(self).seen += 1
            return super().step() * self.seen

    w.t = Mine()
    return w.t.step


@case("replay")
def exponential_average_rebound(w):
    class Mine(Trainer):
        ema = 0.0

        def step(self):
            loss = super().step()
            self.ema = 0.9 * self.ema + 0.1 * loss
            return self.ema

    w.t = Mine()
    return w.t.step


@case("replay")
def tensors_swapped_by_the_step(w):
    class Mine(Trainer):
        def step(self):
            self.a, self.b = self.b, self.a
            self.a.add_(1.0)
            return super().step() + self.a.sum()

    w.t = Mine()
    w.t.a, w.t.b = torch.zeros(2), torch.ones(2)
    return w.t.step


@case("replay", args=lambda i: (torch.full((2, 4), 0.1 * i), torch.ones(2, 3)))
def batch_remembered(w):
    class Mine(Trainer):
        last = None

        def step(self, x, y):
            self.last = x
            return super().step(x, y)

    w.t = Mine()
    return w.t.step


@case("replay")
def parameters_swapped_by_the_step(w):
    class Mine(Trainer):
        def step(self):
            loss = super().step()
            a, b = self.model[0], self.model[2]
            a.weight, b.extra = b.extra, a.weight
            return loss

    w.t = Mine()
    w.t.model[2].extra = nn.Parameter(torch.ones(6, 4))
    return w.t.step


@case("replay")
def history_of_losses(w):
    class Mine(Trainer):
        def step(self):
            self.losses.append(super().step())
            return self.losses[-1]

    w.t = Mine()
    w.t.losses = []
    return w.t.step


@case("rerun")
def history_kept_by_a_bound_append(w):
    kept = w.kept = []
    append, t = kept.append, Trainer()
    w.t = t

    def step():
        append(len(t.model))
        return t.step()

    return step


@case("rerun")
def history_of_losses_returned(w):
    class Mine(Trainer):
        def step(self):
            self.losses.append(super().step())
            return self.losses

    w.t = Mine()
    w.t.losses = []

    def step():
        found = w.t.step()
        return found is w.t.losses, found

    return step


@case("rerun")
def its_own_list_returned(w):
    w.losses = losses = []

    def step():
        losses.append((X * len(losses)).sum())
        return losses

    return step


@case("rerun", changes={3: lambda w: w.cfg.update(a=9)})
def its_own_dict_returned(w):
    w.cfg = cfg = {"a": 1, "x": torch.ones(2)}

    def step():
        cfg["x"].add_(1.0)
        return cfg["x"] * cfg["a"], cfg

    return step


@case("replay")
def fresh_containers_returned(w):
    w.t = t = Trainer()

    def step():
        parts = [t.step(), X * 2]
        return {"parts": parts, "more": {"list": [X + 1, {"x": X}]}}, [parts[0]]

    return step


@case("replay")
def its_parameters_returned(w):
    w.t = t = Trainer()
    return lambda: (t.step(), [*t.model.parameters()], t.model[0].weight.grad)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(4)
@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
def test_trainers(name):
    check(CASES[name])
