"""Draw a report of run.py: per case, how many times as fast as eager each contender is.

    python -m benchmarks.plot [REPORT.json] [OUTPUT.svg]

Needs matplotlib (extra "bench"). Bars are medians, thin lines p20 to p80, black marks floors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def draw(report: dict, output: Path) -> None:
    """Write the picture of a report."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = {k: c for k, c in report["cases"].items() if "p50" in c["contenders"]["eager"]}
    names = list(dict.fromkeys(n for case in cases.values() for n in case["contenders"]))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.9 * len(cases)))
    height = 0.85 / len(names)
    for k, name in enumerate(names):
        places, ratios, errors = [], [], ([], [])
        for i, case in enumerate(cases.values()):
            row, eager = case["contenders"].get(name, {}), case["contenders"]["eager"]["p50"]
            if "p50" in row:
                places.append(i + k * height)
                ratios.append(eager / row["p50"])
                errors[0].append(ratios[-1] - eager / row["p80"])
                errors[1].append(eager / row["p20"] - ratios[-1])
        look = {"label": name, "color": f"C{k}", "error_kw": {"linewidth": 0.7}}
        axes.barh(places, ratios, height, xerr=errors, **look)
    for i, case in enumerate(cases.values()):
        if case["floor_us"]:
            at = case["contenders"]["eager"]["p50"] / case["floor_us"]
            axes.plot([at, at], [i - height / 2, i + 0.85 - height / 2], "k", linewidth=1.5)
    axes.axvline(1, color="grey", linewidth=0.7)
    axes.set_xscale("log")
    axes.set_yticks([i + 0.4 for i in range(len(cases))], cases)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as eager")
    axes.set_title(f"{report['device']}, {report['threads']} threads, {report['date']}")
    axes.legend(fontsize="small")
    figure.savefig(output, bbox_inches="tight")


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "cpu.json"
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".svg")
    draw(json.loads(source.read_text()), output)
    print(f"written to {output}")


if __name__ == "__main__":
    main()
