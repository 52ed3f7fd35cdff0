"""Samples of torch.distributions in a compiled step: eager's numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import nn

import tracejit
from support.capture_checks import randn
from tracejit.testing import assert_equal_to_eager, losses_agree

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
    "Gamma": lambda: D.Gamma(a, a).rsample().sum(),
    "Beta": lambda: D.Beta(a, a).rsample().sum(),
    "Dirichlet": lambda: (D.Dirichlet(a).rsample() * m).sum(),
    "StudentT": lambda: D.StudentT(a + 2, m, a).rsample().sum(),
    "Chi2": lambda: (D.Chi2(a).rsample((3,)) * m).sum(),
    "Kumaraswamy": lambda: D.Kumaraswamy(a, a + 1).rsample().sum(),
    "FisherSnedecor": lambda: D.FisherSnedecor(a + 1, a + 2).rsample().log().sum(),
    "InverseGamma": lambda: D.InverseGamma(a + 2, a).rsample().log().sum(),
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


# ---- derivatives of samples by their parameters


def by_parameters(draw: Callable, *shapes: float) -> None:
    """Samples of parameters from small to large, and their gradients, in both precisions."""
    for dtype in (torch.float32, torch.float64):
        given = [
            (torch.logspace(-1.5, 2.5, 40, dtype=dtype) * scale).requires_grad_()
            for scale in shapes
        ]
        weight = torch.linspace(-1, 2, 40, dtype=dtype)

        def step(given=given, weight=weight):
            for x in given:
                x.grad = None
            sample = draw(*given)
            (sample.log() * weight).sum().backward()
            return sample.detach()

        torch.manual_seed(5)
        compiled = assert_equal_to_eager(step, calls=4, on_unsupported="raise")
        assert compiled.stats.replays, compiled.explain_mode()


def test_gamma_samples_of_all_sizes():
    by_parameters(lambda x: D.Gamma(x.expand(7, 40), 1.5).rsample(), 1.0)


def test_beta_samples_of_all_sizes():
    for scale in (0.1, 1.0, 10.0):
        by_parameters(lambda x, y: D.Beta(x.expand(7, 40), y.expand(7, 40)).rsample(), 1.0, scale)


def test_dirichlet_samples_of_all_sizes():
    def draw(x):
        return D.Dirichlet(x.expand(7, 40)[:, :36].reshape(7, 9, 4) + 0.05).rsample()

    def weighted(x):
        return torch.cat([draw(x).reshape(7, 36), x.new_ones(7, 4)], 1)

    by_parameters(weighted, 1.0)


def test_their_second_derivatives_are_as_unknown_as_in_eager():
    def step(x):
        (g,) = torch.autograd.grad(torch._standard_gamma(x).sum(), x, create_graph=True)
        g.sum().backward()

    x = torch.ones(3, requires_grad=True)
    for run in (step, tracejit.compile(step, on_unsupported="raise")):
        with pytest.raises(RuntimeError, match="_standard_gamma_grad.* not implemented"):
            run(x)
    with pytest.raises(RuntimeError, match="_sample_dirichlet"):
        tracejit.compile(lambda x: torch._sample_dirichlet(x).sum().backward())(x)


# ---- whole programs


def train(make: Callable, calls: int = 12) -> None:
    """From one seed the losses are eager's, in replay."""
    losses = []
    for compile in (lambda f: f, lambda f: tracejit.compile(f, on_unsupported="raise")):
        torch.manual_seed(0)
        step = compile(make())
        torch.manual_seed(1)
        losses.append([step().item() for _ in range(calls)])
    for ours, theirs in zip(*losses, strict=True):
        assert losses_agree(ours, theirs, losses[1][0])
    assert step.stats.replays >= calls - 4, step.explain_mode()


def test_a_beta_policy():
    """Soft actor critic's actor with actions in (0, 1)."""

    def make():
        actor = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 6))
        critic = nn.Sequential(nn.Linear(9, 32), nn.Tanh(), nn.Linear(32, 1))
        optimizer = torch.optim.Adam(actor.parameters(), lr=1e-2)
        states = torch.randn(20, 6)

        def step():
            alpha, beta = (F.softplus(actor(states)) + 1.0).chunk(2, -1)
            policy = D.Independent(D.Beta(alpha, beta), 1)
            action = policy.rsample()
            value = critic(torch.cat([states, action], -1)).squeeze(-1)
            loss = (0.1 * policy.log_prob(action.clamp(1e-4, 1 - 1e-4)) - value).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    train(make)


def test_a_variational_autoencoder_of_topics():
    """A Dirichlet between the encoder and the words, with its divergence from the prior."""

    def make():
        encoder, decoder = nn.Linear(30, 5), nn.Linear(5, 30, bias=False)
        optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
        words = torch.randint(4, (16, 30)).float()
        prior = D.Dirichlet(torch.full((5,), 0.3))

        def step():
            posterior = D.Dirichlet(F.softplus(encoder(words)) + 0.05)
            topics = posterior.rsample()
            seen = -(words * decoder(topics).log_softmax(-1)).sum(-1)
            loss = (seen + D.kl_divergence(posterior, prior)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    train(make)
