"""State and values as public training code keeps them: warm-up, averages, queues, replay buffers,
patience, logging, accumulation, annealing, curricula.

Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import partial
from math import cos, exp, pi, sqrt
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from support.worlds import Case, check, replaying, setting, table

CASES: dict[str, Case] = {}
case = table(CASES)

X = torch.linspace(-1, 2, 12).view(4, 3)
Y = torch.linspace(0, 1, 4).view(4, 1)
CALLS = 14
LOG = logging.getLogger("tests.adversarial_state")
MAX_NORM, WARMUP = 1.0, 5
GLOBAL_STEP = 0


training = replaying(case, CALLS, lambda i: (X + i * 0.05, Y - i * 0.05))  # batches differ


@pytest.fixture(autouse=True)
def restored():
    yield
    restore()


def restore():
    globals().update(GLOBAL_STEP=0)


def network(w, *, rate=0.1, momentum=0.0, out=1):
    """A small net with an optimizer, the same each time."""
    w.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out))
    with torch.no_grad():
        for k, p in enumerate(w.net.parameters()):
            p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p) * (k + 1))
    w.opt = torch.optim.SGD(w.net.parameters(), lr=rate, momentum=momentum)


def update(w, loss):
    w.opt.zero_grad()
    loss.backward()
    w.opt.step()
    return loss.detach()


# ---- the rate as a function of a counter


@training(changes={9: setting(n=0)})
def warm_up_and_cosine(w):
    network(w)
    w.n = 0

    def rate():
        if w.n < WARMUP:
            return 0.1 * (w.n + 1) / WARMUP
        return 0.05 * (1 + math.cos(math.pi * (w.n - WARMUP) / 20))

    def step(x, y):
        for group in w.opt.param_groups:
            group["lr"] = rate()
        w.n += 1
        return update(w, F.mse_loss(w.net(x), y))

    return step


@training()
def inverse_square_root_with_a_bare_sqrt(w):
    network(w)
    w.n = 0

    def step(x, y):
        w.n += 1
        w.opt.param_groups[0]["lr"] = 0.1 * min(1 / sqrt(w.n), w.n * WARMUP**-1.5)
        return update(w, F.mse_loss(w.net(x), y))

    return step


@training(changes={8: lambda w: w.rates.__setitem__(9, 0.5)})
def rates_from_a_list(w):
    network(w)
    w.rates, w.n = [0.1 / (k + 1) for k in range(20)], 0

    def step(x, y):
        w.opt.param_groups[0]["lr"] = w.rates[w.n]
        w.n += 1
        return update(w, F.mse_loss(w.net(x), y))

    return step


@training()
def rates_from_a_tuple_held_at_the_last(w):
    network(w)
    w.rates, w.n = (0.1, 0.05, 0.02, 0.01), 0

    def step(x, y):
        w.opt.param_groups[0]["lr"] = w.rates[min(w.n, len(w.rates) - 1)]
        w.n += 1
        return update(w, F.mse_loss(w.net(x), y))

    return step


@training()
def milestones(w):
    network(w)
    w.n, w.milestones = 0, {4, 8}

    def step(x, y):
        w.n += 1
        if w.n in w.milestones:
            for group in w.opt.param_groups:
                group["lr"] *= 0.1
        return update(w, F.mse_loss(w.net(x), y))

    return step


@training()
def rate_halved_every_five(w):
    network(w)
    w.n = 0

    def step(x, y):
        w.opt.param_groups[0]["lr"] = 0.1 * 0.5 ** (w.n // 5)
        w.n += 1
        return update(w, F.mse_loss(w.net(x), y))

    return step


@training()
def rate_by_a_closure(w):
    network(w)

    def schedule(total, floor=0.01):
        n = 0

        def following():
            nonlocal n
            n += 1
            return max(floor, 0.1 * (1 - n / total))

        return following

    rate = schedule(20)

    def step(x, y):
        w.opt.param_groups[0]["lr"] = rate()
        return update(w, F.mse_loss(w.net(x), y))

    return step


@training()
def rate_by_a_partial(w):
    network(w)
    w.n = 0

    def decayed(n, *, base, gamma):
        return base * gamma**n

    w.rate = partial(decayed, base=0.1, gamma=0.9)

    def step(x, y):
        w.opt.param_groups[0]["lr"] = w.rate(w.n)
        w.n += 1
        return update(w, F.mse_loss(w.net(x), y))

    return step


@training(changes={6: setting(fast=True), 9: setting(fast=False), 12: setting(rates=(0.2, 0.4))})
def rate_by_a_flag_set_outside(w):
    network(w)
    w.fast, w.rates = False, (0.01, 0.1)

    def step(x, y):
        w.opt.param_groups[0]["lr"] = w.rates[1] * 2 if w.fast else w.rates[0] * 2
        return update(w, F.mse_loss(w.net(x), y))

    return step


@training(calls=18)
def one_cycle_by_hand(w):
    network(w, momentum=0.9)
    w.n = 0

    def step(x, y):
        w.n += 1
        up = w.n <= 6
        t = w.n / 6 if up else (w.n - 6) / 10
        group = w.opt.param_groups[0]
        group["lr"] = 0.01 + 0.09 * (t if up else max(0.0, 1 - t))
        group["momentum"] = 0.95 - 0.1 * t if up else 0.85
        return update(w, F.mse_loss(w.net(x), y))

    return step


class Scheduled:
    """An optimizer with a schedule around it, as in translation models."""

    def __init__(self, optimizer, size=8, warm=4):
        self.optimizer, self.size, self.warm = optimizer, size, warm
        self._step, self._rate = 0, 0

    @property
    def rate(self):
        return self.size**-0.5 * min(self._step**-0.5, self._step * self.warm**-1.5)

    def step(self):
        self._step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self._rate = self.rate
        self.optimizer.step()
        self.optimizer.zero_grad()


@training(changes={9: lambda w: setattr(w.scheduled, "warm", 8)})
def rate_by_a_property(w):
    network(w)
    w.scheduled = Scheduled(w.opt)

    def step(x, y):
        loss = F.mse_loss(w.net(x), y)
        loss.backward()
        w.scheduled.step()
        return loss.detach()

    return step


# ---- averages


class Average:
    """An exponential average of a model's weights, with a decay that warms up."""

    def __init__(self, model, decay=0.99):
        self.model, self.decay, self.updates = model, decay, 0
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self):
        self.updates += 1
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in self.model.named_parameters():
            self.shadow[name].mul_(d).add_(p.detach(), alpha=1 - d)


@training(changes={9: lambda w: setattr(w.average, "updates", 0)})
def average_with_a_warm_up(w):
    network(w)
    w.average = Average(w.net)

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.average.update()
        return loss

    return step


@training()
def average_with_a_ramp_by_exp(w):
    network(w)
    w.average = [p.detach().clone() for p in w.net.parameters()]
    w.updates = 0

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.updates += 1
        d = 0.999 * (1 - exp(-w.updates / 20))
        with torch.no_grad():
            for mean, p in zip(w.average, w.net.parameters(), strict=True):
                mean.lerp_(p, 1 - d)
        return loss

    return step


@training()
def average_after_a_start(w):
    network(w)
    w.average, w.n = None, 0

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.n += 1
        if w.n >= 4:
            flat = torch.cat([p.detach().flatten() for p in w.net.parameters()])
            w.average = flat if w.average is None else w.average + (flat - w.average) / (w.n - 3)
        return loss

    return step


@training()
def teacher_momentum_by_a_cosine(w):
    network(w)
    w.teacher = [p.detach().clone() for p in w.net.parameters()]
    w.n, w.total = 0, 50

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        tau = 1 - (1 - 0.99) * (cos(pi * w.n / w.total) + 1) / 2
        torch._foreach_mul_(w.teacher, tau)
        torch._foreach_add_(w.teacher, [p.detach() for p in w.net.parameters()], alpha=1 - tau)
        w.n += 1
        return loss

    return step


class RunningMeanStd:
    """Welford's running moments, as reinforcement learning normalizes observations."""

    def __init__(self, shape):
        self.mean, self.var, self.count = torch.zeros(shape), torch.ones(shape), 1e-4

    def update(self, x):
        mean, var, n = x.mean(0), x.var(0, unbiased=False), x.shape[0]
        delta, total = mean - self.mean, self.count + n
        self.mean = self.mean + delta * n / total
        m2 = self.var * self.count + var * n + delta**2 * self.count * n / total
        self.var, self.count = m2 / total, total


@training(changes={8: lambda w: setattr(w.moments, "count", 2.0)})
def running_moments_of_observations(w):
    network(w)
    w.moments = RunningMeanStd(3)

    def step(x, y):
        w.moments.update(x)
        x = (x - w.moments.mean) / (w.moments.var + 1e-8).sqrt()
        return update(w, F.mse_loss(w.net(x), y))

    return step


class Meter:
    """The average meter of image classification scripts."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


@training("replay with cuts", changes={9: lambda w: w.losses.reset()})
def meters(w):
    network(w, out=3)
    w.losses, w.top1 = Meter(), Meter()

    def step(x, y):
        out = w.net(x)
        target = torch.tensor([0, 2, 1, 1])
        loss = update(w, F.cross_entropy(out, target))
        correct = (out.argmax(1) == target).sum().item()
        w.losses.update(loss.item(), x.size(0))
        w.top1.update(correct / x.size(0), x.size(0))
        return w.losses.avg, w.top1.avg

    return step


@training("replay with cuts")
def smoothed_loss_without_bias(w):
    network(w)
    w.mean, w.n = 0.0, 0

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y)).item()
        w.n += 1
        w.mean = 0.98 * w.mean + 0.02 * loss
        return w.mean / (1 - 0.98**w.n)

    return step


@training("replay with cuts")
def metrics_summed_in_a_defaultdict(w):
    network(w)
    w.metrics = defaultdict(float)

    def step(x, y):
        out = w.net(x)
        loss = update(w, F.mse_loss(out, y))
        w.metrics["loss"] += loss.item()
        w.metrics["mae"] += (out - y).abs().mean().item()
        w.metrics["samples"] += len(x)
        return loss

    return step


# ---- windows of what was


@training("replay with cuts", calls=28)
def losses_in_a_deque(w):
    network(w)
    w.window = deque(maxlen=4)

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y)).item()
        w.window.append(loss)
        return sum(w.window) / len(w.window)

    return step


@training()
def losses_in_a_ring_of_a_tensor(w):
    network(w)
    w.ring, w.n = torch.zeros(4), 0

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.ring[w.n % 4] = loss
        w.n += 1
        return w.ring.sum() / min(w.n, 4)

    return step


@training()
def gradients_of_the_last_steps(w):
    network(w)
    w.norms = deque([torch.zeros(())] * 3, maxlen=3)

    def step(x, y):
        w.opt.zero_grad()
        loss = F.mse_loss(w.net(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(w.net.parameters(), MAX_NORM)
        w.norms.append(norm)
        w.opt.step()
        return torch.stack(tuple(w.norms)).mean()

    return step


@training()
def history_whose_length_decides(w):
    network(w)
    w.history = []

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.history.append(loss.item())
        if len(w.history) >= 5:
            return loss * 2
        return loss

    return step


@training()
def last_and_first_of_a_history(w):
    network(w)
    w.history = []

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.history.append(loss.item())
        return w.history[-1] - w.history[0]

    return step


# ---- patience and the best so far


class EarlyStopping:
    """As people write it."""

    def __init__(self, patience=3, delta=0.0):
        self.patience, self.delta = patience, delta
        self.best, self.counter, self.stop = None, 0, False

    def __call__(self, loss):
        if self.best is None:
            self.best = loss
        elif loss > self.best - self.delta:
            self.counter += 1
            if self.counter >= self.patience:
                self.stop = True
        else:
            self.best, self.counter = loss, 0


@training("replay with cuts", calls=20)
def early_stopping(w):
    network(w)
    w.stopper = EarlyStopping()

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.stopper(loss.item())
        return loss, w.stopper.stop

    return step


@training("replay with cuts", calls=20)
def best_loss_as_a_tensor(w):
    network(w)
    w.best, w.since = torch.tensor(float("inf")), 0

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        if loss < w.best:
            w.best, w.since = loss, 0
        else:
            w.since += 1
        return w.since

    return step


@training(calls=20)
def best_loss_without_a_branch(w):
    network(w)
    w.best, w.bad = torch.full((), 1e9), torch.zeros((), dtype=torch.int64)

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        better = loss < w.best
        w.best = torch.where(better, loss, w.best)
        w.bad = torch.where(better, 0, w.bad + 1)
        return w.bad

    return step


@training("replay with cuts", calls=24)
def rate_cut_on_a_plateau(w):
    network(w)
    w.best, w.bad = float("inf"), 0

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        value = loss.item()
        if value < w.best * (1 - 1e-3):
            w.best, w.bad = value, 0
        else:
            w.bad += 1
        if w.bad > 2:
            w.opt.param_groups[0]["lr"] *= 0.5
            w.bad = 0
        return loss

    return step


# ---- accumulation


@training(calls=20)
def accumulated_by_a_counter(w):
    network(w)
    w.i, w.k = 0, 4

    def step(x, y):
        loss = F.mse_loss(w.net(x), y) / w.k
        loss.backward()
        if (w.i + 1) % w.k == 0:
            w.opt.step()
            w.opt.zero_grad()
        w.i += 1
        return loss.detach()

    return step


@training(calls=20, args=lambda i: (X + i * 0.05, Y, i))
def accumulated_by_the_batch_number(w):
    network(w)

    def step(x, y, i):
        loss = F.mse_loss(w.net(x), y) / 4
        loss.backward()
        if (i + 1) % 4 == 0:
            w.opt.step()
            w.opt.zero_grad()
        return loss.detach()

    return step


@training(calls=18, args=lambda i: (X + i * 0.05, Y, i // 6, i % 6))
def rate_by_the_epoch_and_the_batch(w):
    network(w)

    def step(x, y, epoch, batch):
        progress = (epoch * 6 + batch) / 18
        w.opt.param_groups[0]["lr"] = 0.1 * (1 - progress)
        return update(w, F.mse_loss(w.net(x), y))

    return step


@training("replay with cuts", calls=20)
def accumulated_losses_reported(w):
    network(w)
    w.i, w.running = 0, 0.0

    def step(x, y):
        loss = F.mse_loss(w.net(x), y)
        (loss / 2).backward()
        w.running += loss.item()
        w.i += 1
        report = None
        if w.i % 2 == 0:
            w.opt.step()
            w.opt.zero_grad()
            report, w.running = w.running / 2, 0.0
        return report

    return step


# ---- logging


@training()
def logged_below_the_level(w):
    network(w)
    w.n = 0

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.n += 1
        LOG.debug("step %d", w.n)
        LOG.debug(f"step {w.n}")
        return loss

    return step


@training(
    changes={
        8: lambda w: w.logger.setLevel(logging.INFO),
        9: lambda w: w.logger.setLevel(logging.WARNING),
    }
)
def text_logged_below_the_level(w):
    network(w)
    w.n, w.logger = 0, logging.Logger("steps", logging.WARNING)
    w.logger.addHandler(logging.NullHandler())

    class Reporter:
        def __init__(self):
            self.logger, self.scale = w.logger, 2.0

        def report(self, n, loss):
            self.logger.info(f"step {n}: {loss.item():.3f} of {self.scale!r}, rate {w.rate:8.2f}")
            self.logger.debug(f"{n}")
            w.logger.info(f"{n:3d}")

    w.reporter, w.rate = Reporter(), 0.0

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.n += 1
        w.rate += 0.5
        w.reporter.report(w.n, loss)
        return loss

    return step


@training("rerun")
def text_that_is_logged_and_kept(w):
    network(w)
    w.n = 0

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.n += 1
        text = f"step {w.n}"
        LOG.debug(text)
        w.text = text
        return loss

    return step


@training("replay with cuts")
def loss_logged_below_the_level(w):
    network(w)
    w.n = 0

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.n += 1
        LOG.debug("step %d loss %.3f", w.n, loss.item())
        return loss

    return step


@training(calls=20)
def printed_every_five(w):
    network(w)
    w.n = 0

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.n += 1
        if w.n % 5 == 0:
            print(f"step {w.n}: {loss.item():.4f}")
        return loss

    return step


@training("replay with cuts", calls=20)
def record_every_four(w):
    network(w)
    w.n, w.log = 0, []

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.n += 1
        if w.n % 4 == 0:
            w.log.append((w.n, loss.item()))
        return loss

    return step


@training("replay")
def name_of_a_step_in_the_result(w):
    network(w)
    w.n = 0

    def step(x, y):
        w.n += 1
        return {f"loss/{w.n}": update(w, F.mse_loss(w.net(x), y))}

    return step


@training()
def name_of_a_phase_in_the_result(w):
    network(w)
    w.phase, w.n = "train", 0

    def step(x, y):
        w.n += 1
        return {f"{w.phase}/loss": update(w, F.mse_loss(w.net(x), y)), "step": w.n}

    return step


# ---- scaling by hand


class LossScaler:
    """Dynamic loss scaling."""

    def __init__(self):
        self.scale, self.good, self.skipped = 2.0**8, 0, 0

    def step(self, optimizer, parameters):
        bad = any(not torch.isfinite(p.grad).all() for p in parameters)
        if bad:
            self.scale, self.good = self.scale / 2, 0
            self.skipped += 1
            return
        for p in parameters:
            p.grad.div_(self.scale)
        optimizer.step()
        self.good += 1
        if self.good % 4 == 0:
            self.scale *= 2


@training("replay with cuts", calls=20, changes={12: lambda w: w.scale_up()})
def loss_scaled_dynamically(w):
    network(w)
    w.scaler = LossScaler()
    w.scale_up = lambda: setattr(w.scaler, "scale", 1e38)

    def step(x, y):
        w.opt.zero_grad()
        loss = F.mse_loss(w.net(x), y)
        (loss * w.scaler.scale).backward()
        w.scaler.step(w.opt, [*w.net.parameters()])
        return loss.detach()

    return step


# ---- targets, phases and turns


@training(calls=20)
def target_synced_every_four(w):
    network(w)
    w.target = nn.Linear(3, 1)
    w.online = nn.Linear(3, 1)
    with torch.no_grad():
        w.target.weight.fill_(0.1), w.target.bias.zero_(), w.online.weight.fill_(0.2)
        w.online.bias.zero_()
    w.opt = torch.optim.SGD(w.online.parameters(), lr=0.1)
    w.updates = 0

    def step(x, y):
        with torch.no_grad():
            goal = y + 0.9 * w.target(x)
        loss = update(w, F.smooth_l1_loss(w.online(x), goal))
        w.updates += 1
        if w.updates % 4 == 0:
            w.target.load_state_dict(w.online.state_dict())
        return loss

    return step


@training(calls=20)
def actor_delayed(w):
    network(w)
    w.actor = nn.Linear(3, 1)
    with torch.no_grad():
        w.actor.weight.fill_(0.3), w.actor.bias.zero_()
    w.actor_opt = torch.optim.SGD(w.actor.parameters(), lr=0.1)
    w.total_it = 0

    def step(x, y):
        w.total_it += 1
        loss = update(w, F.mse_loss(w.net(x), y))
        if w.total_it % 2 == 0:
            actor_loss = -w.net(x * w.actor(x)).mean()
            w.actor_opt.zero_grad()
            actor_loss.backward()
            w.actor_opt.step()
        return loss

    return step


@training(calls=20)
def trained_in_turns_by_a_counter(w):
    network(w)
    w.n = 0
    w.critic = torch.ones(3, requires_grad=True)
    w.critic_opt = torch.optim.SGD([w.critic], lr=0.1)

    def step(x, y):
        w.n += 1
        if w.n % 3 != 0:
            w.critic_opt.zero_grad()
            loss = -(x * w.critic).mean()
            loss.backward()
            w.critic_opt.step()
            return loss.detach()
        return update(w, F.mse_loss(w.net(x), y))

    return step


@training()
def frozen_until_a_step(w):
    network(w)
    w.n = 0

    def step(x, y):
        w.n += 1
        hidden = w.net[1](w.net[0](x))
        if w.n < 5:
            hidden = hidden.detach()
        return update(w, F.mse_loss(w.net[2](hidden), y))

    return step


@training()
def curriculum_by_thresholds(w):
    network(w)
    w.n = 0

    def difficulty(n):
        return 1 if n < 3 else 2 if n < 6 else 3

    def step(x, y):
        w.n += 1
        k = difficulty(w.n)
        return update(w, F.mse_loss(w.net(F.pad(x[:, :k], (0, 3 - k))), y))

    return step


@training(calls=18)
def resolution_that_grows(w):
    network(w)
    w.n = 0

    def step(x, y):
        size = min(4, 2 + w.n // 4)
        w.n += 1
        return update(w, F.mse_loss(w.net(x[:size]), y[:size]))

    return step


# ---- annealing


@training()
def temperature_annealed(w):
    network(w, out=3)
    w.n = 0

    def step(x, y):
        tau = max(0.5, math.exp(-0.05 * w.n))
        w.n += 1
        weights = F.softmax(w.net(x) / tau, dim=-1)
        return update(w, -(weights * x).sum(-1).mean())

    return step


@training(changes={10: lambda w: setattr(w.anneal, "n", 0)})
def kl_annealed_in_cycles(w):
    network(w, out=2)

    @dataclass
    class Anneal:
        n: int = 0
        cycle: int = 6

        def beta(self):
            t = (self.n % self.cycle) / self.cycle
            self.n += 1
            return 1.0 if t > 0.5 else t * 2

    w.anneal = Anneal()

    def step(x, y):
        mean, log_var = w.net(x).chunk(2, -1)
        kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).mean()
        return update(w, F.mse_loss(mean, y) + w.anneal.beta() * kl)

    return step


@training()
def kl_annealed_by_a_sigmoid(w):
    network(w, out=2)
    w.n = 0

    def step(x, y):
        beta = 1 / (1 + exp(-0.25 * (w.n - 10)))
        w.n += 1
        mean, log_var = w.net(x).chunk(2, -1)
        return update(w, F.mse_loss(mean, y) + beta * (mean**2 + log_var**2).mean())

    return step


@training()
def epsilon_greedy_by_a_counter(w):
    network(w, out=3)
    w.steps_done = 0

    def step(x, y):
        eps = 0.05 + 0.85 * math.exp(-1.0 * w.steps_done / 30)
        w.steps_done += 1
        values = w.net(x)
        greedy = F.one_hot(values.argmax(1), 3).float()
        policy = (1 - eps) * greedy + eps / 3
        return update(w, F.mse_loss((policy * values).sum(1, keepdim=True), y))

    return step


@training()
def teacher_forced_by_a_counter(w):
    network(w, rate=0.01, out=3)
    w.n = 0

    def step(x, y):
        ratio = max(0.0, 1 - w.n / 8)
        w.n += 1
        seen, total = x, 0.0
        for k in range(3):
            out = w.net(seen)
            total = total + (out - x * (k + 1)).pow(2).mean()
            seen = x if k / 3 < ratio else out
        return update(w, total)

    return step


@training()
def betas_of_a_diffusion(w):
    network(w, out=3)
    betas = [1e-2 * (k + 1) for k in range(16)]
    w.alphas, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        w.alphas.append(product)
    w.t = 0

    def step(x, y):
        a = w.alphas[w.t]
        noise = x.flip(0)
        noisy = sqrt(a) * x + sqrt(1 - a) * noise
        w.t = (w.t + 1) % len(w.alphas)
        return update(w, F.mse_loss(w.net(noisy), noise))

    return step


@training()
def time_embedded(w):
    network(w, out=3)
    w.t = 0

    def step(x, y):
        t = torch.full((4,), w.t)
        phase = t[:, None] * torch.tensor([1.0, 0.1, 0.01])
        w.t += 1
        return update(w, F.mse_loss(w.net(x + phase.sin()), x))

    return step


@training()
def time_as_a_tensor(w):
    network(w, rate=0.01, out=3)
    w.t, w.table = 0, torch.linspace(0, 1, 60).view(20, 3)

    def step(x, y):
        t = torch.tensor([w.t])
        w.t += 1
        return update(w, F.mse_loss(w.net(x + F.embedding(t, w.table) + t.float() / 10), x))

    return step


# ---- queues and buffers


@dataclass
class Replay:
    """A replay buffer of reinforcement learning."""

    size: int
    states: torch.Tensor = field(init=False)
    rewards: torch.Tensor = field(init=False)
    position: int = 0
    full: bool = False

    def __post_init__(self):
        self.states, self.rewards = torch.zeros(self.size, 3), torch.zeros(self.size, 1)

    def add(self, state, reward):
        self.states[self.position] = state
        self.rewards[self.position] = reward
        self.position += 1
        if self.position == self.size:
            self.full, self.position = True, 0


@training(calls=18)
def replay_buffer(w):
    network(w)
    w.replay = Replay(5)
    w.index = torch.tensor([0, 3, 1, 4])

    def step(x, y):
        w.replay.add(x[0], y[1])
        return update(w, F.mse_loss(w.net(w.replay.states[w.index]), w.replay.rewards[w.index]))

    return step


@training(calls=18)
def replay_buffer_of_batches(w):
    network(w)
    w.states, w.at = torch.zeros(12, 3), 0

    def step(x, y):
        index = (torch.arange(4) + w.at) % 12
        w.states[index] = x
        w.at = (w.at + 4) % 12
        return update(w, F.mse_loss(w.net(w.states[:4]), y))

    return step


class Queue(nn.Module):
    """Keys of a contrastive model, with the pointer as a number."""

    def __init__(self, size=12):
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.arange(36.0).view(3, size) + 1, dim=0))
        self.size, self.pointer = size, 0

    @torch.no_grad()
    def enqueue(self, keys):
        n = keys.shape[0]
        if self.size % n:
            raise ValueError(n)
        self.queue[:, self.pointer : self.pointer + n] = keys.T
        self.pointer = (self.pointer + n) % self.size


@training(calls=18)
def contrastive_queue_with_a_number(w):
    network(w, out=3)
    w.memory = Queue()

    def step(x, y):
        q = F.normalize(w.net(x), dim=1)
        k = F.normalize(x, dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ w.memory.queue.clone()], 1) / 0.1
        loss = update(w, F.cross_entropy(logits, torch.zeros(4, dtype=torch.long)))
        w.memory.enqueue(k)
        return loss

    return step


class TensorQueue(nn.Module):
    """The same with the pointer in a buffer, as the paper's code has it."""

    def __init__(self, size=12):
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.arange(36.0).view(3, size) + 1, dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.size = size

    @torch.no_grad()
    def enqueue(self, keys):
        at = int(self.pointer)
        self.queue[:, at : at + keys.shape[0]] = keys.T
        self.pointer[0] = (at + keys.shape[0]) % self.size


@training(calls=18)
def contrastive_queue_with_a_buffer(w):
    network(w, out=3)
    w.memory = TensorQueue()

    def step(x, y):
        q = F.normalize(w.net(x), dim=1)
        logits = q @ w.memory.queue.clone() / 0.1
        loss = update(w, F.cross_entropy(logits, torch.tensor([0, 3, 1, 2])))
        w.memory.enqueue(F.normalize(x, dim=1))
        return loss

    return step


@training(calls=18)
def memory_bank_by_batch(w):
    network(w, out=3)
    w.bank, w.batch = torch.zeros(4, 4, 3), 0

    def step(x, y):
        out = w.net(x)
        loss = F.mse_loss(out, x) + 0.1 * (out * w.bank[w.batch]).mean()
        loss = update(w, loss)
        w.bank[w.batch] = 0.5 * w.bank[w.batch] + 0.5 * out.detach()
        w.batch = (w.batch + 1) % 4
        return loss

    return step


@training(calls=18)
def cache_of_keys_of_a_decoder(w):
    network(w, out=3)
    w.cache, w.length = torch.zeros(20, 3), 0

    def step(x, y):
        out = w.net(x)
        w.cache[w.length] = out[0].detach()
        w.length += 1
        valid = torch.arange(20) < w.length
        scores = (w.cache @ x[0]).masked_fill(~valid, -1e9)
        return update(w, (scores.softmax(0) @ w.cache - out.mean(0)).pow(2).mean())

    return step


# ---- state on classes, in slots, behind properties


class Counted:
    total = 0

    def __init__(self):
        type(self).total = 0
        self.scale = 0.5

    def apply(self, x):
        type(self).total += 1
        return x * self.scale / self.total


@training(changes={9: lambda w: setattr(Counted, "total", 100)})
def counter_on_the_class(w):
    w.counted = Counted()
    return lambda x, y: w.counted.apply(x) + y


class Slotted:
    __slots__ = ("best", "n")

    def __init__(self):
        self.n, self.best = 0, 1e9


@training("replay with cuts", changes={9: lambda w: setattr(w.slotted, "n", 50)})
def counter_and_best_in_slots(w):
    w.slotted = Slotted()

    def step(x, y):
        w.slotted.n += 1
        loss = (x.pow(2).mean() - 1).abs()
        if loss.item() < w.slotted.best:
            w.slotted.best = loss.item()
        return x / w.slotted.n

    return step


@dataclass(slots=True)
class TrainState:
    step: int = 0
    loss: float = 0.0
    last: object = None


@training("replay with cuts")
def dataclass_with_slots(w):
    network(w)
    w.train = TrainState()

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.train.step += 1
        w.train.loss = 0.9 * w.train.loss + 0.1 * loss.item()
        w.train.last = loss
        return loss * w.train.step

    return step


class Progress:
    def __init__(self, total):
        self._n, self._total = 0, total

    @property
    def fraction(self):
        return self._n / self._total

    @property
    def n(self):
        return self._n

    @n.setter
    def n(self, value):
        self._n = min(value, self._total)


@training(changes={9: lambda w: setattr(w.progress, "n", 3)})
def counter_behind_a_property(w):
    w.progress = Progress(10)

    def step(x, y):
        w.progress.n += 1
        return x * w.progress.fraction

    return step


@training("rerun")
def number_of_items_as_a_divisor(w):
    w.kept = []

    def step(x, y):
        w.kept.append(x.mean())
        return sum(w.kept) / len(w.kept)

    return step


# ---- wider state


@training("replay with cuts", changes={10: lambda w: w.state["stats"].update(best=0.0)})
def nested_state(w):
    network(w)
    w.state = {"step": 0, "stats": {"best": math.inf, "seen": [0, 0]}, "ema": None}

    def step(x, y):
        loss = update(w, F.mse_loss(w.net(x), y))
        w.state["step"] += 1
        w.state["stats"]["best"] = min(w.state["stats"]["best"], loss.item())
        w.state["stats"]["seen"][w.state["step"] % 2] += len(x)
        w.state["ema"] = loss if w.state["ema"] is None else w.state["ema"] * 0.9 + loss * 0.1
        return w.state["ema"]

    return step


@training()
def global_step(w):
    network(w)

    def step(x, y):
        global GLOBAL_STEP
        GLOBAL_STEP += 1
        loss = F.mse_loss(w.net(x), y) * min(1.0, GLOBAL_STEP / 10)
        return update(w, loss)

    return step


@training()
def counters_in_a_namespace_of_arguments(w):
    network(w)
    w.args = SimpleNamespace(step=0, warm=5, rate=0.1)

    def step(x, y):
        w.args.step += 1
        w.opt.param_groups[0]["lr"] = w.args.rate * min(1, w.args.step / w.args.warm)
        return update(w, F.mse_loss(w.net(x), y))

    return step


@training()
def turns_taken_by_a_list_of_tasks(w):
    network(w)
    w.tasks, w.n = ["mse", "l1", "huber"], 0

    def step(x, y):
        task = w.tasks[w.n % len(w.tasks)]
        w.n += 1
        losses = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}
        return update(w, losses[task](w.net(x), y))

    return step


@training()
def weights_of_tasks_from_a_dict_by_step(w):
    network(w)
    w.weights, w.n = {k: 1 / (k + 1) for k in range(20)}, 0

    def step(x, y):
        scale = w.weights[w.n]
        w.n += 1
        return update(w, F.mse_loss(w.net(x), y) * scale)

    return step


@training("replay with cuts")
def weights_of_tasks_from_their_losses(w):
    network(w)
    w.previous, w.weights = None, [1.0, 1.0]

    def step(x, y):
        out = w.net(x)
        losses = [F.mse_loss(out, y), F.l1_loss(out, y)]
        values = [loss.item() for loss in losses]
        if w.previous is not None:
            ratios = [exp(a / b / 2) for a, b in zip(values, w.previous, strict=True)]
            w.weights = [2 * r / sum(ratios) for r in ratios]
        w.previous = values
        return update(w, sum(k * loss for k, loss in zip(w.weights, losses, strict=True)))

    return step


@training(calls=18)
def rows_in_an_order(w):
    w.order, w.n = [3, 1, 0, 2], 0

    def step(x, y):
        row = w.order[w.n % 4]
        w.n += 1
        return x[row] * 2

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(6)
def test_case(name):
    check(CASES[name], restore, rel=1e-4)  # losses are sums in float32


def test_a_logger_above_the_level_is_asked():
    assert not LOG.isEnabledFor(logging.DEBUG)
