"""Parts of random training programs that look something up in lists, dicts and sets, or in lists
that grow: see `sequence_parts.py`."""

from __future__ import annotations

from support.sequence_parts import Part

LISTS = (
    Part(
        "table",
        ("w.rates, w.n = [0.9**k for k in range(24)], 0", "w.same = w.rates"),
        loss=("w.n += 1", "loss = loss * w.rates[w.n]"),
        changes=(
            "w.n = $n",
            "w.n = -$n",
            "w.rates[w.n + 1] = $f",
            "w.rates[w.n + $n] = $n",
            "w.rates = [$f] * 24",
            "w.rates = tuple(w.rates)",
            "w.rates = {k: $f for k in range(24)}",
            "w.rates = torch.arange(24.0)",
            "w.same[w.n + 2] = $f",
            "w.rates = w.same",
            "w.rates.insert(0, $f)",
        ),
    ),
    Part(
        "table at the end",
        ("w.betas, w.t = (0.5, 0.25, 0.125), 0",),
        after=(
            "for group in w.opt.param_groups:",
            "    group['lr'] = w.betas[min(w.t, len(w.betas) - 1)]",
            "w.t += 1",
        ),
        changes=("w.t = $n", "w.betas += ($f,)", "w.betas = w.betas[:2]", "w.betas = [$f, 0.5]"),
    ),
    Part(
        "stages",
        (
            "w.stages, w.marks, w.m, w.stage = {2: 0.5, 5: 2.0, 9: 3.0}, {3, 7}, 0, 1.0",
            "w.names = {1: 'a', 4: 'b', 'c': 'd'}",
            "w.name = ''",
        ),
        loss=(
            "w.m += 1",
            "w.stage = w.stages.get(w.m, w.stage)",
            "if w.m in w.marks or w.m in {6, 11}:",
            "    w.stage = w.stage * 0.5",
            "if w.m in w.names:",
            "    w.name = w.names[w.m]",
            "loss = loss * w.stage + (1.0 if w.name == 'b' else 0.0)",
        ),
        changes=(
            "w.m = $n",
            "w.stages[w.m + 1] = $f",
            "w.stages.pop(5, None)",
            "w.stages = {}",
            "w.marks.add(w.m + 1)",
            "w.marks = [w.m + 2]",
            "w.names[w.m + 1] = 'b'",
            "w.stage = $f",
        ),
    ),
    Part(
        "history",
        ("w.seen, w.scale = [], 1.0",),
        after=(
            "worse = len(w.seen) > 3 and w.seen[-1] > w.seen[-2]",
            "w.seen.append(float(len(w.seen)) + w.scale)",
            "w.scale = w.scale * (0.5 if worse else 1.0) + 0.01 * (sum(w.seen) / len(w.seen))",
            "w.low = min(w.seen), max(w.seen), w.seen[0], w.seen[-3:]",
        ),
        loss=("loss = loss * w.scale",),
        changes=(
            "w.seen.clear()",
            "w.seen = []",
            "w.seen = [$f, 1.0, $f, 2.0]",
            "w.seen.append($f)",
            "w.seen.append($n)",
            "w.seen.pop() if w.seen else None",
            "w.seen.insert(0, $f)",
            "w.seen[:] = w.seen[-2:]",
            "w.scale = $f",
        ),
    ),
    Part(
        "history of losses",
        ("w.history, w.factor = {'loss': []}, 1.0",),
        after=(
            "w.history['loss'].append(loss.item())",
            "if len(w.history['loss']) > 2 and w.history['loss'][-1] > w.history['loss'][-2]:",
            "    w.factor = w.factor * 0.5",
        ),
        loss=("loss = loss * w.factor",),
        changes=(
            "w.history['loss'].append($f)",
            "w.history = {'loss': [$f, 0.0, 0.0]}",
            "w.history['loss'].clear()",
            "w.factor = $f",
        ),
    ),
)
