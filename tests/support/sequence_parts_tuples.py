"""Parts of random training programs that keep numbers in tuples and small objects, a new one in
each call: pairs, tuples with names, dataclasses, namespaces; see `sequence_parts.py`."""

from __future__ import annotations

from support.sequence_parts import Part

TUPLES = (
    Part(
        "pairs",
        ("w.last, w.pair, w.window = None, (0, 1.0), collections.deque(maxlen=3)",),
        loss=("loss = loss * w.pair[1] + w.pair[0]",),
        after=(
            "w.last = (loss.item(), w.pair[0])",
            "w.window.append((w.pair[0], loss.item()))",
            "w.pair = (w.pair[0] + 1, w.pair[1] * 0.5 + 0.25)",
        ),
        changes=(
            "w.pair = ($n, $f)",
            "w.pair = ($f, $n)",
            "w.pair = ($n, $f, $f)",
            "w.pair = [$n, $f]",
            "w.pair = (w.pair[0], True)",
            "w.last = ($n,)",
            "w.last = w.pair",
            "w.window.clear()",
            "w.window.append(($n, $f))",
            "w.window = collections.deque([($n, $f), w.pair], maxlen=2)",
        ),
    ),
    Part(
        "tuples that decide",
        ("w.best, w.state, w.seen = (99.0, -1), ('warm', (0, 0.5)), ()",),
        loss=(
            "kind, (k, scale) = w.state",
            "loss = loss * scale if kind == 'warm' else loss * 2.0",
        ),
        after=(
            "w.best = min(w.best, (loss.item(), k))",
            "w.seen = (*w.seen, float(k))[-3:]",
            "w.state = ('warm' if k % 4 else 'cold', (k + 1, 0.5 + 0.01 * sum(w.seen)))",
        ),
        changes=(
            "w.best = ($f, $n)",
            "w.best = (w.best[0],)",
            "w.state = ('warm', ($n, $f))",
            "w.state = ('cold', ($n, $n))",
            "w.state = ('other', ($f, 1.0))",
            "w.seen = ($f,)",
            "w.seen = ($f, $n, $f)",
        ),
    ),
    Part(
        "objects that are replaced",
        (
            "w.run, w.box = Run(0, 1.0), {'now': types.SimpleNamespace(n=0, mean=0.0)}",
            "w.named = Named(0, 0.0)",
        ),
        loss=("loss = loss * w.run.scale + w.box['now'].n + w.named.mean",),
        after=(
            "w.run = dataclasses.replace(w.run, n=w.run.n + 1, scale=w.run.scale * 0.9)",
            "now = w.box['now']",
            "w.box['now'] = types.SimpleNamespace(n=now.n + 2, mean=loss.item())",
            "w.named = w.named._replace(n=w.named.n + 1, mean=w.named.mean * 0.5 + w.run.n)",
        ),
        changes=(
            "w.run = Run($n, $f)",
            "w.run.scale = $f",
            "w.run.n = $f",
            "w.run.more = $n",
            "w.kept = w.run",
            "w.box['now'] = types.SimpleNamespace(n=$n, mean=$f)",
            "w.box['now'].n = $n",
            "w.box['now'].other = $f",
            "w.box = {'now': w.box['now']}",
            "w.named = Named($n, $f)",
            "w.named = Named($f, $n)",
            "w.named = Named(True, $f)",
        ),
    ),
    Part(
        "counts",
        ("w.counts = collections.Counter(steps=0)",),
        loss=("loss = loss * (1.0 + 0.1 * w.counts['steps'])",),
        after=("w.counts['steps'] += 1",),
        changes=(
            "w.counts['steps'] = $n",
            "w.counts['steps'] = $f",
            "w.counts['other'] += 1",
            "w.counts = collections.Counter(steps=$n)",
            "w.counts = {'steps': $n}",
            "del w.counts['steps']",
        ),
    ),
)
