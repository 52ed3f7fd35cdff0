"""Whole steps with the Python that people put around training: counters, schedules, logs, queues.

Each case is compared with eager after every call, and says how it ends; see `support/worlds.py`.
"""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict, deque

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from support.worlds import Case, X, Y, check, table

CASES: dict[str, Case] = {}
case = table(CASES)


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Another batch on each call; losses rise and fall."""
    return X * (1 + 0.3 * math.cos(i)) - 0.05 * i, Y + 0.2 * math.sin(2 * i)


def network(inputs: int = 4, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


@case("replay with cuts", args=batch, calls=20)
def gan_whose_generator_is_updated_every_third_step(w):
    class Gan:
        def __init__(self):
            self.generator, self.critic = network(), network(3, 1)
            self.of_generator = torch.optim.Adam(self.generator.parameters(), 1e-2, (0.5, 0.9))
            self.of_critic = torch.optim.RMSprop(self.critic.parameters(), 1e-2)
            self.n, self.history = 0, {"critic": [], "generator": []}

        def step(self, noise, real):
            self.n += 1
            fake = self.generator(noise).detach()
            loss = self.critic(fake).mean() - self.critic(real).mean()
            self.of_critic.zero_grad()
            loss.backward()
            self.of_critic.step()
            with torch.no_grad():
                for p in self.critic.parameters():
                    p.clamp_(-0.5, 0.5)
            self.history["critic"].append(loss.item())
            if self.n % 3 == 0:
                loss = -self.critic(self.generator(noise)).mean()
                self.of_generator.zero_grad()
                loss.backward()
                self.of_generator.step()
                self.history["generator"].append(loss.item())
            return self.history["critic"][-1]

    w.gan = Gan()
    return w.gan.step


@case("rerun", args=lambda i: (X[0] * (1 + 0.1 * i), i % 3, 0.1 * i, X[1] - 0.1 * i), calls=14)
def deep_q_with_a_queue_of_memories(w):
    class Agent:
        def __init__(self):
            self.net, self.memory, self.n = network(), deque(maxlen=8), 0
            self.target = copy.deepcopy(self.net)
            self.opt = torch.optim.Adam(self.net.parameters(), 1e-2)

        def step(self, state, action, reward, after):
            self.memory.append((state, action, reward, after))
            self.n += 1
            if len(self.memory) < 4:
                return None
            states, actions, rewards, nexts = zip(*random.sample(self.memory, 4), strict=True)
            q = self.net(torch.stack(states)).gather(1, torch.tensor(actions)[:, None])
            with torch.no_grad():
                best = self.target(torch.stack(nexts)).max(1)[0]
            wanted = torch.tensor(rewards) + 0.9 * best
            loss = F.smooth_l1_loss(q[:, 0], wanted)
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
            if self.n % 5 == 0:
                self.target.load_state_dict(self.net.state_dict())
            return loss.item()

    w.agent = Agent()
    return w.agent.step


@case("replay", args=batch, calls=14)
def teacher_with_a_momentum_by_cosine(w):
    w.student, w.n, w.total = network(), 0, 40
    w.teacher = copy.deepcopy(w.student).requires_grad_(False)
    w.opt = torch.optim.AdamW(w.student.parameters(), 1e-2)
    w.momenta = [1 - 0.1 * (math.cos(math.pi * k / w.total) + 1) / 2 for k in range(w.total)]

    def step(x, y):
        loss = F.mse_loss(w.student(x), w.teacher(x + 0.1))
        w.opt.zero_grad()
        loss.backward()
        w.opt.step()
        momentum = w.momenta[w.n]
        late = 1 - 0.1 * (math.cos(math.pi * w.n / w.total) + 1) / 2
        with torch.no_grad():
            for p, q in zip(w.student.parameters(), w.teacher.parameters(), strict=True):
                q.mul_(momentum).add_(p, alpha=1 - late)
        w.n += 1
        return loss.detach(), momentum

    return step


@case("replay", args=batch, calls=24)
def early_stopping_on_an_object_with_a_history(w):
    class Stopper:
        def __init__(self, patience):
            self.patience, self.best, self.bad, self.stop = patience, None, 0, False
            self.history = []

        def __call__(self, loss):
            self.history.append(loss)
            if self.best is None or loss < self.best - 1e-3:
                self.best, self.bad = loss, 0
            else:
                self.bad += 1
                if self.bad >= self.patience:
                    self.stop = True
            return self.stop

    w.net, w.stopper = network(), Stopper(3)
    w.opt = torch.optim.SGD(w.net.parameters(), 0.1, momentum=0.9)

    def step(x, y):
        if w.stopper.stop:
            return None
        loss = F.mse_loss(w.net(x), y)
        w.opt.zero_grad()
        loss.backward()
        w.opt.step()
        return loss.detach(), w.stopper(loss.item()), len(w.stopper.history)

    return step


@case("replay", args=batch)
def mixup_by_a_random_number(w):
    w.net = network()
    w.opt = torch.optim.SGD(w.net.parameters(), 0.1)

    def step(x, y):
        lam = random.random()
        order = torch.arange(5).roll(1)
        mixed = lam * x + (1 - lam) * x[order]
        out = w.net(mixed)
        loss = lam * F.mse_loss(out, y) + (1 - lam) * F.mse_loss(out, y[order])
        w.opt.zero_grad()
        loss.backward()
        w.opt.step()
        return loss.detach()

    return step


@case("replay", args=batch, calls=24)
def curriculum_of_stages_by_step(w):
    class Curriculum:
        stages = {
            0: {"name": "short", "length": 2, "weight": 1.0},
            4: {"name": "long", "length": 3, "weight": 0.5},
            9: {"name": "whole", "length": 4, "weight": 0.25},
        }

        def __init__(self):
            self.n, self.stage = 0, None

        def advance(self):
            if self.n in self.stages:
                self.stage = self.stages[self.n]["name"]
            self.n += 1
            return self.stage

    w.net, w.curriculum = network(), Curriculum()
    w.opt = torch.optim.Adam(w.net.parameters(), 1e-2)
    lengths = {"short": 2, "long": 3, "whole": 4}

    def step(x, y):
        stage = w.curriculum.advance()
        n = lengths[stage]
        loss = F.mse_loss(w.net(x)[:n], y[:n])
        if stage == "whole":
            loss = loss + 0.01 * sum(p.square().sum() for p in w.net.parameters())
        w.opt.zero_grad()
        loss.backward()
        w.opt.step()
        return loss.detach(), stage

    return step


@case("replay", args=batch, calls=14)
def lion_with_a_warm_up_in_its_python_state(w):
    class Lion(torch.optim.Optimizer):
        def __init__(self, parameters, lr, warm_up):
            super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "decay": 0.01})
            self.warm_up, self.steps, self.norms = warm_up, 0, []

        @torch.no_grad()
        def step(self):
            self.steps += 1
            scale = self.warm_up[min(self.steps, len(self.warm_up)) - 1]
            for group in self.param_groups:
                a, b = group["betas"]
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if not state:
                        state["step"], state["m"] = 0, torch.zeros_like(p)
                    state["step"] += 1
                    m = state["m"]
                    p.mul_(1 - group["lr"] * group["decay"])
                    update = (m * a + p.grad * (1 - a)).sign()
                    p.add_(update, alpha=-group["lr"] * scale / math.sqrt(state["step"]))
                    m.mul_(b).add_(p.grad, alpha=1 - b)

    w.net = network()
    w.opt = Lion(w.net.parameters(), 0.05, [0.1, 0.2, 0.4, 0.8, 1.0])

    def step(x, y):
        loss = F.mse_loss(w.net(x), y)
        w.opt.zero_grad()
        loss.backward()
        w.opt.step()
        return loss.detach()

    return step


@case("replay", args=batch, calls=24)
def log_lines_every_five_steps(w):
    w.net, w.n, w.lines, w.meters = network(), 0, [], defaultdict(list)
    w.opt = torch.optim.SGD(w.net.parameters(), 0.1)

    def step(x, y):
        loss = F.mse_loss(w.net(x), y)
        w.opt.zero_grad()
        loss.backward()
        w.opt.step()
        w.n += 1
        w.meters["loss"].append(loss.item())
        if w.n % 5 == 0:
            last = w.meters["loss"][-5:]
            w.lines.append(f"step {w.n:4d} loss {sum(last) / len(last):.1f}")
            print(w.lines[-1])
        return loss.detach()

    return step


@case("replay", args=batch, calls=20)
def accumulated_gradients_by_counter(w):
    w.net, w.n, w.every, w.updates = network(), 0, 4, 0
    w.opt = torch.optim.Adam(w.net.parameters(), 1e-2)
    w.rates = [0.01 / (1 + k) for k in range(10)]

    def step(x, y):
        loss = F.mse_loss(w.net(x), y) / w.every
        loss.backward()
        w.n += 1
        if w.n % w.every == 0:
            nn.utils.clip_grad_norm_(w.net.parameters(), 0.5)
            for group in w.opt.param_groups:
                group["lr"] = w.rates[w.updates]
            w.opt.step()
            w.opt.zero_grad()
            w.updates += 1
        return loss.detach() * w.every

    return step


@case("replay with cuts", args=batch, calls=16)
def model_that_counts_its_calls_and_keeps_statistics(w):
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = network(), 0
            self.means, self.largest, self.last = [], [], None

        def forward(self, x):
            self.calls += 1
            h = self.inner(x)
            self.means.append(h.mean().item())
            self.largest.append(h.abs().max().item())
            self.last = h.detach()
            if self.calls > 3 and self.means[-1] > max(self.means[-3:]) - 1e-6:
                h = h * 0.9
            return h / (1 + 0.01 * self.calls)

    w.model = Counted()
    w.opt = torch.optim.SGD(w.model.parameters(), 0.1)

    def step(x, y):
        loss = F.mse_loss(w.model(x), y)
        w.opt.zero_grad()
        loss.backward()
        w.opt.step()
        return loss.detach(), sum(w.model.largest) / len(w.model.largest)

    return step


@case("replay with cuts", args=batch, calls=20)
def search_for_a_rate_that_stops(w):
    class Finder:
        def __init__(self, lowest, factor):
            self.rate, self.factor, self.best, self.n = lowest, factor, math.inf, 0
            self.rates, self.losses = [], []

        def update(self, opt, loss):
            self.n += 1
            self.rates.append(self.rate)
            smooth = loss if not self.losses else 0.9 * self.losses[-1] + 0.1 * loss
            self.losses.append(smooth)
            self.best = min(self.best, smooth)
            self.rate *= self.factor
            for group in opt.param_groups:
                group["lr"] = self.rate
            return smooth > 4 * self.best

    w.net, w.finder = network(), Finder(1e-4, 1.3)
    w.opt = torch.optim.SGD(w.net.parameters(), 1e-4)

    def step(x, y):
        loss = F.mse_loss(w.net(x), y)
        w.opt.zero_grad()
        loss.backward()
        w.opt.step()
        return w.finder.update(w.opt, loss.item())

    return step


@case("replay", args=batch, calls=20)
def warm_restarts_at_milestones(w):
    w.net, w.n, w.since, w.cycle, w.restarts = network(), 0, 0, 4, {4, 12}
    w.opt = torch.optim.SGD(w.net.parameters(), 0.1, momentum=0.9)

    def step(x, y):
        if w.n in w.restarts:
            w.since, w.cycle = 0, w.cycle * 2
            w.opt.state.clear()
        rate = 0.05 * (1 + math.cos(math.pi * min(w.since, w.cycle) / w.cycle))
        w.opt.param_groups[0]["lr"] = rate
        loss = F.mse_loss(w.net(x), y)
        w.opt.zero_grad()
        loss.backward()
        w.opt.step()
        w.n, w.since = w.n + 1, w.since + 1
        return loss.detach(), rate

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(2)
def test_case(name):
    check(CASES[name], rel=1e-4)
