"""Writes the tables, the CSV and the plot of what `benchmarks/quality.py` found.

python benchmarks/quality_report.py DIR
"""

from __future__ import annotations

import collections
import csv
import json
import math
import sys
from pathlib import Path
from statistics import mean

BITS = ("wikitext", "dolly", "gsm8k")
ACCURACIES = ("mr", "subj", "banking77", "piqa", "winogrande", "boolq")
COLUMNS = ("method", "trained", "seed", "budget", "active", "bytes")


def load_rows(out: Path) -> list[dict]:
    """One row for each result: its method, training, seed, budget, active fraction, bytes read, and each task's value."""
    rows = []
    for path in sorted((out / "cells").glob("*.json")):
        cell = json.loads(path.read_text())
        for result in cell["results"]:
            row = {"method": cell["method"], "trained": cell["tokens"], "seed": cell["seed"]}
            row |= {name: result[name] for name in ("budget", "active", "bytes")}
            row |= {name: task["value"] for name, task in result["tasks"].items()}
            if "bleu" in result["tasks"].get("e2e", {}):
                row["bleu"] = result["tasks"]["e2e"]["bleu"]
            rows.append(row)
    return rows


def averaged(rows: list[dict]) -> list[dict]:
    """Means over seeds, and against dense with the same training: `rise`, `accuracy_lost`, `rouge_lost`."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["method"], row["trained"], row["budget"]].append(row)
    means = {}
    for key, group in groups.items():
        numbers = [name for name in group[0] if name not in ("method", "seed") and all(name in r for r in group)]
        means[key] = {"method": key[0], "seeds": len(group), **{name: mean(r[name] for r in group) for name in numbers}}
    for (_, trained, _), row in means.items():
        dense = means.get(("dense", trained, 1.0))
        if dense is None:
            continue
        bits = [row[name] / dense[name] - 1.0 for name in BITS if name in row and name in dense]
        points = [100.0 * (dense[name] - row[name]) for name in ACCURACIES if name in row and name in dense]
        row["rise"] = 100.0 * mean(bits) if bits else None
        row["accuracy_lost"] = mean(points) if points else None
        if "e2e" in row and dense.get("e2e"):
            row["rouge_lost"] = 100.0 * (1.0 - row["e2e"] / dense["e2e"])
    return sorted(means.values(), key=lambda r: (r["trained"], -r["budget"], r["bytes"]))


def at_bytes(rows: list[dict], share: float, name: str = "rise") -> float | None:
    """A method's value where it reads `share` of the dense bytes, between its two nearest budgets; None beyond them.

    A rise is nearly a power of the bytes, so logarithms are interpolated.
    """
    points = sorted((row["bytes"], row[name]) for row in rows if row.get(name) is not None)
    for (b0, v0), (b1, v1) in zip(points, points[1:], strict=False):
        if b0 <= share <= b1 and b1 > b0:
            weight = math.log(share / b0) / math.log(b1 / b0)
            if min(v0, v1) > 0:
                return math.exp((1 - weight) * math.log(v0) + weight * math.log(v1))
            return (1 - weight) * v0 + weight * v1
    return None


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def _number(value: float | None, form: str = ".1f") -> str:
    return "–" if value is None else format(value, form)


def write_report(out: Path) -> None:
    """`quality.csv`, `quality.json`, `quality.md` and `quality.png` in `out`, from its cells."""
    rows = load_rows(out)
    if not rows:
        print("no cells: nothing to report")
        return
    names = list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)]))
    with (out / "quality.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5f}" if isinstance(v, float) and k not in ("budget",) else v for k, v in row.items()} for row in rows
        )
    means = averaged(rows)
    about = json.loads((out / "about.json").read_text()) if (out / "about.json").exists() else {}
    (out / "quality.json").write_text(json.dumps({"about": about, "results": means}, indent=1))
    parts = []
    for trained in sorted({row["trained"] for row in means}):
        chosen = [row for row in means if row["trained"] == trained]
        tasks = [n for n in (*BITS, "e2e", "bleu", *ACCURACIES) if any(n in row for row in chosen)]
        title = f"## After {trained / 1e6:.1f} M tokens of training" if trained else "## Without training"
        header = ["method", "budget", "active %", "bytes %", "bits per byte +%", "accuracy −points", "ROUGE-L −%", "seeds"]
        lines = [
            [
                row["method"],
                f"{row['budget']:g}",
                _number(100 * row["active"]),
                _number(100 * row["bytes"]),
                _number(row.get("rise")),
                _number(row.get("accuracy_lost"), ".2f"),
                _number(row.get("rouge_lost"), ".2f"),
                str(row["seeds"]),
                *(_number(row.get(name), ".4f") for name in tasks),
            ]
            for row in chosen
        ]
        parts.append(f"{title}\n\n{_table([*header, *tasks], lines)}\n")
        methods = list(dict.fromkeys(row["method"] for row in chosen if row["method"] != "dense"))
        shares = (0.75, 0.5, 0.3, 0.25, 0.15)
        equal = [
            [m, *(_number(at_bytes([r for r in chosen if r["method"] == m], share)) for share in shares)] for m in methods
        ]
        header = ["bits per byte +%, at bytes read", *(f"{100 * share:g} %" for share in shares)]
        parts.append(_table(header, equal) + "\n")
    (out / "quality.md").write_text("\n".join(parts))
    _plot(means, out / "quality.png")


def _plot(means: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stages = sorted({row["trained"] for row in means})
    figure, axes = plt.subplots(1, len(stages), figsize=(7 * len(stages), 5), squeeze=False)
    for axis, trained in zip(axes[0], stages, strict=True):
        curves = collections.defaultdict(list)
        for row in means:
            if row["trained"] == trained and row["budget"] < 1 and (row.get("rise") or 0) > 0:
                curves[row["method"]].append((100 * row["bytes"], row["rise"]))
        for method, points in sorted(curves.items()):
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=method)
        axis.set(xlabel="FFN bytes read a token, % of dense", ylabel="rise in bits per byte, %", yscale="log")
        axis.set_title(f"{trained / 1e6:.1f} M tokens of training" if trained else "no training")
        if curves:
            axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
