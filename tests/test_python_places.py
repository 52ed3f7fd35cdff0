"""Counters that say where a tensor is read or written: a buffer's place, the bounds of a slice.

Each case is compared with eager after every call; see `support/worlds.py`.
"""

from __future__ import annotations

import pytest
import torch

from support.worlds import Case, Keywords, check, replaying, setting, table

CASES: dict[str, Case] = {}
case = table(CASES)

X = torch.linspace(-1, 2, 6)
CALLS = 12


state = replaying(case, CALLS, lambda i: (X + i * 0.1,))


# ---- reading


@state(changes={8: setting(n=2)})
def row_of_a_table(w):
    w.n, w.table = 0, torch.arange(60.0).view(20, 3)

    def step(x):
        w.n += 1
        return x.sum() * w.table[w.n]

    return step


@state(changes={8: setting(n=-18), 10: setting(n=-4)})
def number_of_a_table_from_its_end(w):
    w.n, w.table = 0, torch.arange(20.0)

    def step(x):
        w.n -= 1
        return x * w.table[w.n]

    return step


@state()
def row_of_a_parameter(w):
    w.n, w.p = 0, torch.arange(60.0).view(20, 3).requires_grad_()
    w.optimizer = torch.optim.SGD([w.p], lr=0.1, momentum=0.9)

    def step(x):
        w.n += 1
        w.optimizer.zero_grad()
        loss = (w.p[w.n] * x[:3]).pow(2).sum()
        loss.backward()
        w.optimizer.step()
        return loss.detach()

    return step


@state()
def element_of_a_matrix(w):
    w.n, w.table = 0, torch.arange(60.0).view(5, 12)

    def step(x):
        w.n = (w.n + 1) % 5
        return x * w.table[w.n, w.n + 2] + w.table[w.n][3 * w.n - 12] - w.table[..., w.n].sum()

    return step


@state()
def by_select_and_narrow(w):
    w.n, w.table = 0, torch.arange(60.0).view(5, 12)

    def step(x):
        w.n = (w.n + 1) % 5
        wide = w.table.narrow(1, w.n + 1, 6)
        return x * wide[2] + torch.narrow(w.table, 1, w.n - 6, 2).sum(), w.table.select(0, w.n) + 1

    return step


@state()
def slice_of_a_schedule(w):
    w.n, w.table = 0, torch.arange(60.0)

    def step(x):
        w.n += 1
        even = w.table[w.n : w.n + 12 : 2]
        return x * w.table[w.n : w.n + 6] + even, w.table[2 * w.n + 1 : w.n + w.n + 3].sum()

    return step


@state()
def positions_of_a_decoder(w):
    w.n = 0
    w.embedding = torch.nn.Parameter(torch.arange(48.0).view(16, 3) * 0.1)

    def step(x):
        at = w.embedding[None, w.n : w.n + 2]
        w.n += 1
        loss = (at * x.view(1, 2, 3)).tanh().sum()
        w.embedding.grad = None
        loss.backward()
        return loss.detach()

    return step


@state()
def image_of_a_batch(w):
    w.n, w.images = 0, torch.arange(96.0).view(12, 2, 2, 2)

    def step(x):
        image = w.images[w.n % 12]
        w.n += 5
        return torch.relu(image[None]).mean((2, 3)), image.permute(2, 0, 1).flatten() * 2

    return step


@state()
def integers_and_truth_values(w):
    w.n, w.labels = 0, torch.arange(20) % 7
    w.masks = (torch.arange(120).view(20, 6) % 3) == 0

    def step(x):
        w.n += 1
        return w.labels[w.n] + 1, x * w.masks[w.n], torch.where(w.masks[w.n], x, 0)

    return step


@state()
def place_that_was_read(w):
    w.table = torch.arange(60.0).view(20, 3)
    return lambda x: w.table[int(x.argmax().item())] * w.table[(x > 1).sum().item()]


# ---- writing


@state(changes={8: setting(n=1), 10: lambda w: w.buffer.zero_()})
def ring_buffer(w):
    w.n, w.buffer = 0, torch.zeros(4, 6)

    def step(x):
        w.buffer[w.n] = x
        w.n = (w.n + 1) % 4
        return w.buffer.mean(0)

    return step


@state()
def buffers_of_several_kinds(w):
    w.n, w.size = 0, 0
    w.states, w.actions = torch.zeros(5, 6), torch.zeros(5, dtype=torch.int64)
    w.rewards, w.done = torch.zeros(5, 1), torch.zeros(5, dtype=torch.bool)

    def step(x):
        w.states[w.n].copy_(x * 2)
        w.actions[w.n] = 3
        w.rewards[w.n, 0] = x.sum()
        w.done[w.n] = x[0] > 0
        w.n = (w.n + 1) % 5
        w.size = min(w.size + 1, 5)
        return w.states.sum() / w.size

    return step


@state()
def queue_of_keys(w):
    w.queue, w.at = torch.arange(48.0).view(2, 24), 0

    def step(x):
        keys = torch.nn.functional.normalize(x.view(3, 2), dim=1)
        scores = keys @ w.queue.clone()
        w.queue[:, w.at : w.at + 3] = keys.T
        w.at = (w.at + 3) % 24
        return scores.sum(0)

    return step


@state()
def counts_by_place(w):
    w.n, w.counts = 0, torch.zeros(5, dtype=torch.int64)

    def step(x):
        w.counts[w.n % 5] += 1
        w.counts[w.n % 3] *= 2
        w.n += 1
        return w.counts.float() * x[:5]

    return step


@state()
def history_with_a_count(w):
    w.n, w.losses = 0, torch.zeros(20)

    def step(x):
        loss = x.pow(2).mean()
        w.losses[w.n] = loss
        w.losses[w.n + 1] = w.n
        w.n += 1
        return loss

    return step


@state()
def gradient_through_a_written_place(w):
    w.n, w.p = 0, torch.ones(6, requires_grad=True)

    def step(x):
        out = torch.zeros(4, 6)
        out[w.n] = w.p * x
        out[(w.n + 1) % 4] = out[w.n] * 2
        w.n = (w.n + 1) % 4
        w.p.grad = None
        (out**2).sum().backward()
        return out.detach()

    return step


@state()
def window_that_is_written_in_place(w):
    w.n, w.buffer, w.p = 0, torch.zeros(12), torch.ones(6, requires_grad=True)

    def step(x):
        scratch = (w.p * x).repeat(2)
        scratch[w.n : w.n + 3].mul_(3)
        w.buffer[w.n : w.n + 3].add_(x[:3], alpha=2)
        w.n = (w.n + 1) % 8
        w.p.grad = None
        scratch.pow(2).sum().backward()
        return scratch.detach()

    return step


# ---- a view stays a view


@state()
def view_that_sees_a_later_write(w):
    w.n, w.buffer = 0, torch.arange(20.0).view(5, 4)

    def step(x):
        row = w.buffer[w.n]
        w.buffer.add_(1)
        before = row * 2
        row.mul_(0.5)
        w.n = (w.n + 1) % 5
        return before, w.buffer + 1, row + 0

    return step


@state(changes={9: lambda w: w.row.fill_(7)})
def view_that_is_returned_and_kept(w):
    w.n, w.buffer, w.row = 0, torch.arange(40.0).view(10, 4), None

    def step(x):
        w.buffer.mul_(0.5)
        w.row = w.buffer[w.n % 10, 1:]
        w.n += 1
        return w.row, w.buffer[w.n % 5 : w.n % 5 + 2].T

    return step


@state()
def place_of_a_view(w):
    w.n, w.buffer = 0, torch.arange(40.0).view(10, 4)

    def step(x):
        row = w.buffer[w.n]
        w.n = (w.n + 1) % 10
        return x * row.storage_offset()

    return step


@state()
def view_with_history_that_is_returned(w):
    w.n, w.p = 0, torch.arange(40.0).view(10, 4).requires_grad_()

    def step(x):
        w.n = (w.n + 1) % 10
        return (w.p * 2)[w.n], w.p[w.n] * 3

    return step


@state()
def row_from_another_row(w):
    w.n, w.buffer = 1, torch.arange(40.0).view(10, 4)

    def step(x):
        w.buffer[w.n] = w.buffer[w.n - 1]
        w.buffer[w.n - 1].mul_(2).add_(w.buffer[0])
        w.n = 1 + w.n % 9
        return w.buffer.sum()

    return step


@state()
def rows_that_change_places(w):
    w.n, w.buffer = 0, torch.arange(40.0).view(10, 4)

    def step(x):
        i, j = w.n % 10, (w.n + 3) % 10
        first = w.buffer[i].clone()
        w.buffer[i] = w.buffer[j]
        w.buffer[j] = first
        w.n += 1
        return w.buffer.clone()

    return step


# ---- next to other indices


@state()
def place_next_to_indices(w):
    w.n, w.buffer = 0, torch.arange(120.0).view(5, 4, 6)
    index = torch.tensor([3, 0, 1])

    def step(x):
        w.n = (w.n + 1) % 5
        w.buffer[w.n, index] = x
        return w.buffer[w.n, index, 2], w.buffer[w.n][:, index], w.buffer[w.n, x.argmax() % 4] + 0

    return step


# ---- next to tensors of integers


@state(changes={9: setting(n=-5)})
def arithmetic_with_indices(w):
    w.n, w.table = 0, torch.arange(24.0).view(12, 2)
    index, small = torch.arange(3), torch.tensor([1, 2, 3], dtype=torch.int32)

    def step(x):
        w.n += 1
        w.table[(index + w.n) % 12] += 1
        w.table[(w.n * index) % 12, 0] = x[:3]
        return w.table.clone(), w.n - small, small * w.n + 1, (index == 1) * w.n, index / w.n

    return step


@state()
def comparisons_with_positions(w):
    w.n, position = 0, torch.arange(6)

    def step(x):
        w.n += 1
        mask = (position < w.n) & (w.n - 3 <= position)
        return x.masked_fill(~mask, 0.0), position.ne(w.n), torch.ge(position, w.n).sum()

    return step


@state(changes={9: setting(n=100)})
def numbers_in_new_tensors(w):
    w.n, w.last, w.small = 0, torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)

    def step(x):
        w.n += 3
        w.last.fill_(w.n)
        w.last[1] = w.n + 1
        w.small += w.n
        time = torch.full((6,), w.n), torch.tensor(w.n), torch.tensor([w.n, 2 * w.n, 7])
        half = torch.full((2,), w.n, dtype=torch.float32), torch.tensor([w.n, 0.5])
        return time, half, x * time[0] + time[2].sum(), torch.full_like(w.last, w.n)

    return step


@state(changes={8: setting(n=2**40), 9: setting(n=2**60), 10: setting(n=3)})
def numbers_too_large_for_a_float(w):
    w.n, position = 0, torch.arange(6)

    def step(x):
        w.n += 1
        return position + w.n, torch.full((2,), w.n)

    return step


@state("rerun")
def numbers_next_to_narrow_integers(w):
    w.n, pixels = 0, torch.arange(250, 256).to(torch.uint8)

    def step(x):
        w.n += 1
        return pixels + w.n

    return step


# ---- integers among the arguments


@state(args=lambda i: (X, i, {"epoch": i // 4}))
def number_of_the_batch(w):
    w.table = torch.arange(60.0).view(20, 3)
    return lambda x, i, batch: x[:3] * w.table[i] * 0.9**i + i


@state(args=lambda i: (X, Keywords(i=i)), calls=16)
def number_of_the_batch_by_name(w):
    w.p = torch.ones(6, requires_grad=True)

    def step(x, *, i):
        (w.p * x).sum().backward()
        if (i + 1) % 4 == 0:
            w.p.grad = None
            return x * i
        return w.p.grad.clone()

    return step


@state(args=lambda i: (X, i if i < 8 else i + 0.5 if i < 10 else True))
def number_of_another_type(w):
    return lambda x, i: x * i


@state("replay", args=lambda i: (X, 1 + i % 3), calls=14)
def number_that_is_a_size(w):
    return lambda x, n: x[:n] * 2


# ---- what is no place


@state("rerun")
def slice_of_a_length_that_changes(w):
    w.n, w.table = 0, torch.arange(20.0)

    def step(x):
        w.n += 1
        return w.table[: w.n].mean() * x

    return step


@state()
def counter_that_leaves_the_table(w):
    w.n, w.table = 0, torch.arange(8.0)

    def step(x):
        w.n += 1
        try:
            return x * w.table[w.n]
        except IndexError:
            return x

    return step


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sweep(2)
def test_state(name):
    check(CASES[name])
