"""The model and the configuration of a step, changed between calls.

Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from support.worlds import Case, Trainer, X, Y, check, on_trainer, table, trainer

CASES: dict[str, Case] = {}
case = table(CASES)

# ---- the model


@case("replay", changes={3: on_trainer(lambda t: t.model[1].eval())})
def batch_norm_frozen(w):
    w.t = Trainer()
    w.t.model[1] = nn.BatchNorm1d(6)
    return w.t.step


def _fresh(layer):
    return nn.Parameter(torch.full_like(layer.weight, 0.3))


@case(
    "replay",
    changes={3: on_trainer(lambda t: setattr(t.model[0], "weight", _fresh(t.model[0])))},
    calls=9,
)
def parameter_replaced(w):
    return trainer(w)


@case(
    "replay",
    changes={3: on_trainer(lambda t: setattr(t.model[0].weight, "data", torch.ones(6, 4)))},
    calls=9,
)
def data_of_a_parameter_replaced(w):
    return trainer(w, momentum=0.9)


@case("replay", changes={3: on_trainer(lambda t: t.model.double().float())}, calls=9)
def model_moved_and_back(w):
    return trainer(w)


@case("replay", changes={3: on_trainer(lambda t: t.model.append(nn.Linear(3, 3)))}, calls=9)
def layer_added(w):
    return trainer(w)


@case("replay", changes={3: on_trainer(lambda t: t.model.__delitem__(1))}, calls=9)
def layer_removed(w):
    return trainer(w)


@case(
    "replay",
    changes={3: on_trainer(lambda t: setattr(t, "model", copy.deepcopy(t.model)))},
    calls=9,
)
def model_copied(w):
    return trainer(w)


@case("replay", changes={3: on_trainer(lambda t: setattr(t.model[2], "bias", None))}, calls=9)
def bias_removed(w):
    return trainer(w)


@case(
    "replay",
    changes={3: on_trainer(lambda t: setattr(t.model[2], "weight", t.model[0].weight))},
    calls=9,
)
def weights_tied_later(w):
    w.t = Trainer()
    w.t.model[0], w.t.model[2] = nn.Linear(4, 4), nn.Linear(4, 4)
    w.t.opt = torch.optim.SGD(w.t.model.parameters(), lr=0.1)
    w.t.head = nn.Linear(4, 3)
    w.t.loss = lambda x, y: (w.t.head(w.t.model(x)) - y).pow(2).mean()
    return w.t.step


@case(
    "replay", changes={3: on_trainer(lambda t: t.frozen.__setitem__(0, t.model[0].weight))}, calls=9
)
def list_of_tensors_compared_by_identity(w):
    class Mine(Trainer):
        def step(self):
            self.model.zero_grad()
            self.loss(X, Y).backward()
            with torch.no_grad():
                for p in self.model.parameters():
                    if not any(p is q for q in self.frozen):
                        p -= 0.1 * p.grad

    w.t = Mine()
    w.t.frozen = [torch.ones(6, 4)]
    return w.t.step


@case(
    "replay",
    changes={3: on_trainer(lambda t: t.model.register_forward_hook(lambda m, a, out: out * 3))},
    calls=9,
)
def forward_hook_added(w):
    return trainer(w)


@case("replay", changes={3: lambda w: w.remove()}, calls=9)
def forward_hook_removed(w):
    step = trainer(w)
    handle = w.t.model[0].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    w.remove = lambda: handle.remove()
    return step


@case(
    "replay",
    changes={3: on_trainer(lambda t: t.model[0].weight.register_hook(lambda g: g * 2))},
    calls=9,
)
def tensor_hook_added(w):
    return trainer(w)


@case(
    "replay",
    changes={
        3: on_trainer(lambda t: t.model[1].register_full_backward_hook(lambda m, a, b: (a[0] * 2,)))
    },
    calls=9,
)
def backward_hook_added(w):
    return trainer(w)


@case(
    "replay",
    changes={
        5: on_trainer(lambda t: t.opt.register_step_post_hook(lambda o, a, k: t.seen.append(1)))
    },
    calls=9,
)
def optimizer_hook_added(w):
    step = trainer(w)
    w.t.seen = []
    return step


def _replace_gradient(t):
    t.model[0].weight.grad = torch.full((6, 4), 7.0)


@case(
    "replay",
    changes={
        3: on_trainer(lambda t: t.model[0].weight.grad.mul_(5.0)),
        5: on_trainer(_replace_gradient),
        7: on_trainer(lambda t: t.model.zero_grad()),
    },
    calls=12,
)
def gradients_accumulate_and_are_edited_replaced_and_cleared(w):
    w.t = t = Trainer()

    def step():
        t.loss(X, Y).backward()

    return step


@case("replay", changes={3: lambda w: w.opts.reverse()}, calls=9)
def optimizers_in_a_list_reordered(w):
    w.p = torch.ones(3, requires_grad=True)
    w.opts = [torch.optim.SGD([w.p], lr=0.1), torch.optim.Adam([w.p], lr=0.1)]

    def step():
        for opt in w.opts:
            opt.zero_grad()
            w.p.pow(2).sum().backward()
            opt.step()

    return step


# ---- containers of modules, buffers


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.gains = nn.ParameterList([nn.Parameter(torch.ones(4)) for _ in range(3)])
        self.register_buffer("seen", torch.zeros(4))
        self.route, self.depth, self.names = "a", 2, ["layer0", "layer1"]
        self.layer0, self.layer1 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.parts[self.route](x)
        for layer, gain in zip(self.layers[: self.depth], self.gains, strict=False):
            h = torch.tanh(layer(h)) * gain
        for name in self.names:
            h = getattr(self, name)(h)
        self.seen += h.detach().mean(0)
        return h


def branches(w):
    w.m = m = Branches()

    def step():
        m.zero_grad()
        loss = m(X).pow(2).mean()
        loss.backward()
        return loss.detach()

    return step


@case("replay", changes={3: lambda w: setattr(w.m, "route", "b")}, calls=9)
def routed_through_a_module_dict(w):
    return branches(w)


@case(
    "replay",
    changes={3: lambda w: setattr(w.m, "depth", 3), 6: lambda w: setattr(w.m, "depth", 1)},
    calls=11,
)
def depth_attribute(w):
    return branches(w)


@case("replay", changes={3: lambda w: w.m.names.reverse()}, calls=9)
def layers_found_by_name(w):
    return branches(w)


@case("replay", changes={3: lambda w: w.m.seen.zero_()})
def buffer_edited(w):
    return branches(w)


@case("replay", changes={3: lambda w: w.m.layers.insert(0, nn.Linear(4, 4))}, calls=9)
def module_list_inserted(w):
    return branches(w)


# ---- configuration


@dataclass
class Config:
    scale: float = 2.0
    depth: int = 1
    names: tuple = ("a",)


@dataclass(frozen=True)
class Frozen:
    scale: float = 2.0


@case(
    "replay",
    changes={3: lambda w: setattr(w.cfg, "scale", 5.0), 5: lambda w: setattr(w.cfg, "depth", 2)},
    calls=9,
)
def dataclass_configuration(w):
    w.cfg = cfg = Config()
    return lambda: X * cfg.scale * cfg.depth


@case("replay", changes={3: lambda w: setattr(w, "cfg", Frozen(7.0))}, calls=9)
def configuration_replaced(w):
    w.cfg = Frozen()
    return lambda: X * w.cfg.scale


@case("rerun", changes={3: lambda w: w.ref().__setitem__("k", 5.0), 5: lambda w: w.drop()})
def weak_reference(w):
    class Settings(dict):
        pass

    settings = [Settings(k=2.0)]
    w.ref, w.drop = weakref.ref(settings[0]), settings.clear
    ref = w.ref
    return lambda: X * ref()["k"] if ref() is not None else X


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::tracejit.errors.TracejitWarning")
@pytest.mark.sweep(3)
def test_models(name):
    check(CASES[name])
