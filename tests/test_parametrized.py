"""Modules whose parameters are computed: functional calls, parametrizations, old-style norms.

See `support/worlds.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from support.worlds import Case, X, check, table

CASES: dict[str, Case] = {}
case = table(CASES)


def training(w, module):
    w.module = module
    w.opt = torch.optim.SGD(module.parameters(), lr=0.01)

    def step():
        w.opt.zero_grad()
        loss = module(X).square().sum()
        loss.backward()
        w.opt.step()
        return loss.detach()

    return step


@case("replay")
def functional_call(w):
    w.module = nn.Linear(4, 3)
    w.given = {k: p.detach().clone().requires_grad_() for k, p in w.module.named_parameters()}

    def step():
        out = torch.func.functional_call(w.module, w.given, (X,)).square().sum()
        return out.detach(), torch.autograd.grad(out, [*w.given.values()])

    return step


@case("replay")
def weight_norm(w):
    return training(w, parametrizations.weight_norm(nn.Linear(4, 3)))


@case("replay")
def spectral_norm(w):
    return training(w, parametrizations.spectral_norm(nn.Linear(4, 3)))


@case("replay", calls=9)
def old_weight_norm(w):
    return training(w, nn.utils.weight_norm(nn.Linear(4, 3)))


@case("replay", calls=9)
def old_spectral_norm(w):
    return training(w, nn.utils.spectral_norm(nn.Linear(4, 3)))


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T


@case("replay")
def a_parametrization_of_its_own(w):
    module = nn.Linear(4, 4)
    parametrize.register_parametrization(module, "weight", Symmetric())
    return training(w, module)


@case("replay")
def a_cached_parametrization(w):
    module = nn.Linear(4, 4)
    parametrize.register_parametrization(module, "weight", Symmetric())
    step = training(w, module)

    def cached():
        with parametrize.cached():
            return step()

    return cached


@case("replay")
def questions_about_compilers(w):
    def step():
        torch._check(X.shape[0] == 5, lambda: "five rows")
        asked = torch.compiler.is_compiling(), torch.jit.is_tracing(), torch.jit.is_scripting()
        return X * (0 if any(asked) else 2), asked

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrized(name):
    check(CASES[name])
