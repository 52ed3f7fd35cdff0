"""Samples of torch.distributions in a compiled step: eager's numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributions as D

import tracejit
from support.capture_checks import randn
from tracejit.errors import UnsupportedOperation

a, m = (randn(5, 3).abs() + 0.2).requires_grad_(), randn(5, 3).requires_grad_()
HALF = torch.tensor(0.5)

SAMPLES: dict[str, Callable] = {
    "Normal.rsample": lambda: D.Normal(m, a).rsample((2,)).sum(),
    "Normal.sample": lambda: D.Normal(m, a).sample().sum() + m.sum(),
    "Bernoulli": lambda: D.Bernoulli(logits=m).sample().sum() + m.sum(),
    "Categorical": lambda: D.Categorical(logits=m).sample((4,)).float().sum() + m.sum(),
    "OneHot": lambda: (D.OneHotCategorical(logits=m).sample() * m).sum(),
    "OneHotST": lambda: (D.OneHotCategoricalStraightThrough(logits=m).rsample() * m).sum(),
    "Uniform": lambda: D.Uniform(m, m + a).rsample().sum(),
    "Exponential": lambda: D.Exponential(a).rsample().sum(),
    "Laplace": lambda: D.Laplace(m, a).rsample().sum(),
    "Gumbel": lambda: D.Gumbel(m, a).rsample().sum(),
    "LogNormal": lambda: D.LogNormal(m, a).rsample().sum(),
    "Cauchy": lambda: D.Cauchy(m, a).rsample().tanh().sum(),
    "RelaxedBernoulli": lambda: D.RelaxedBernoulli(HALF, logits=m).rsample().sum(),
    "RelaxedOneHot": lambda: (D.RelaxedOneHotCategorical(HALF, logits=m).rsample() * m).sum(),
    "MVN": lambda: D.MultivariateNormal(m, torch.eye(3) * 2).rsample().sum(),
    "Poisson": lambda: D.Poisson(a).sample().sum() + m.sum(),
    "Geometric": lambda: D.Geometric(logits=m).sample().sum() + m.sum(),
    "Binomial": lambda: D.Binomial(5, logits=m).sample().sum() + m.sum(),
    "Multinomial": lambda: D.Multinomial(5, logits=m).sample().sum() + m.sum(),
    "Weibull": lambda: D.Weibull(a, a + 1).rsample().sum(),
    "HalfNormal": lambda: D.HalfNormal(a).rsample().sum(),
    "Independent kl": lambda: D.kl_divergence(
        D.Independent(D.Normal(m, a), 1), D.Independent(D.Normal(0 * m, a + 1), 1)
    ).sum(),
    "TanhNormal": lambda: (
        D.TransformedDistribution(D.Normal(m, a), [D.TanhTransform()]).rsample().sum()
    ),
    "Mixture": lambda: (
        D.MixtureSameFamily(D.Categorical(logits=m), D.Normal(m, a)).sample().sum() + m.sum()
    ),
    "VonMises": lambda: D.VonMises(m, a).sample().sum() + m.sum(),
    "Pareto": lambda: D.Pareto(a, a + 2).rsample().sum(),
}
REFUSED: dict[str, Callable] = {  # their derivatives have no rule
    "Gamma": lambda: D.Gamma(a, a).rsample().sum(),
    "Beta": lambda: D.Beta(a, a).rsample().sum(),
    "Dirichlet": lambda: (D.Dirichlet(a).rsample() * m).sum(),
    "StudentT": lambda: D.StudentT(a + 2, m, a).rsample().sum(),
}


def training(loss_of: Callable) -> Callable:
    def step():
        loss = loss_of()
        return [loss.detach(), *torch.autograd.grad(loss, (a, m), allow_unused=True)]

    return step


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.sweep(3)
def test_samples(name):
    """In replay, and with eager's state of the generator afterwards."""
    step = training(SAMPLES[name])
    compiled = tracejit.compile(step, on_unsupported="raise")
    for seed in range(4):
        torch.manual_seed(seed)
        eager, after = step(), torch.rand(2)
        torch.manual_seed(seed)
        torch.testing.assert_close(compiled(), eager, rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.rand(2), after)
    assert compiled.stats.replays or name == "VonMises"  # it samples until values are accepted


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    with pytest.raises(UnsupportedOperation):
        tracejit.compile(training(REFUSED[name]), on_unsupported="raise")()
