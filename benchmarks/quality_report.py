"""Writes the tables, the CSV and the plot of what `benchmarks/quality.py` found.

python benchmarks/quality_report.py DIR
"""

from __future__ import annotations

import collections
import csv
import functools
import itertools
import json
import math
import sys
from pathlib import Path
from statistics import mean

import numpy as np

from prunepath.eval.files import replacing, write_json

BITS = ("wikitext", "dolly", "gsm8k")
ACCURACIES = ("mr", "subj", "banking77", "piqa", "winogrande", "boolq")
EXTRA = {"e2e": ("bleu",), "answers": ("tokens", "ended", "running", "seconds")}
COLUMNS = ("method", "trained", "seed", "budget", "active", "bytes")
OURS = "prunepath"
RESAMPLES = 1000
SHARES = (0.75, 0.5, 0.3, 0.25, 0.15)  # of the dense bytes, where methods are compared


def load_cells(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]


def rows_of(cells: list[dict]) -> list[dict]:
    """One row for each result: method, tokens of training, seed, budget, active fraction, bytes read, tasks' values."""
    rows = []
    for cell in cells:
        for result in cell["results"]:
            row = {"method": cell["method"], "trained": cell["tokens"], "seed": cell["seed"]}
            row |= {name: result[name] for name in ("budget", "active", "bytes")}
            row |= {name: task["value"] for name, task in result["tasks"].items()}
            for task, names in EXTRA.items():
                row |= {name: result["tasks"][task][name] for name in names if task in result["tasks"]}
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
    for (b0, v0), (b1, v1) in itertools.pairwise(points):
        if b0 <= share <= b1 and 0 < b0 < b1:
            weight = math.log(share / b0) / math.log(b1 / b0)
            if min(v0, v1) > 0:
                return math.exp((1 - weight) * math.log(v0) + weight * math.log(v1))
            return (1 - weight) * v0 + weight * v1
    return None


def differences(cells: list[dict]) -> list[dict]:
    """How each method differs from PrunePath at the same budget: positive where the method's number is higher.

    `rise` is the difference of the mean rises of bits per byte, in % of dense, `accuracy` and `rouge` those of means,
    in points. Each is [difference, lower, upper] with a 95 % interval of the paired bootstrap: each task's examples are
    drawn `RESAMPLES` times, the same for all methods, from scores that are means over the seeds that both have.
    """
    scores = collections.defaultdict(dict)
    for cell in cells:
        for result in cell["results"]:
            found = {task: np.array(values["scores"]) for task, values in result["tasks"].items()}
            scores[cell["tokens"], result["budget"], cell["method"]][cell["seed"]] = found

    @functools.cache
    def measured(key: tuple, seeds: tuple, tasks: tuple) -> dict[str, np.ndarray]:
        dense = (key[0], 1.0, "dense")
        means = {
            task: [weights(task, len(values)) @ values for values in (mean_of(k, seeds, task) for k in (key, dense))]
            for task in tasks
        }
        found = {
            "rise": [100.0 * means[task][0] / means[task][1] for task in BITS if task in means],
            "accuracy": [100.0 * means[task][0] for task in ACCURACIES if task in means],
            "rouge": [100.0 * means["e2e"][0]] if "e2e" in means else [],
        }
        return {name: np.mean(values, axis=0) for name, values in found.items() if values}

    def mean_of(key: tuple, seeds: tuple, task: str) -> np.ndarray:
        return np.mean([scores[key][seed][task] for seed in seeds], axis=0)

    @functools.cache
    def weights(task: str, count: int) -> np.ndarray:
        """[1 + RESAMPLES, count]: the weight of each example in the mean, in the first row all the same."""
        draws = np.random.default_rng(list(task.encode())).multinomial(count, np.full(count, 1 / count), RESAMPLES)
        return np.concatenate([np.ones((1, count)), draws]) / count

    rows = []
    for key, theirs in scores.items():
        trained, budget, method = key
        others = [theirs, scores.get((trained, budget, OURS), {}), scores.get((trained, 1.0, "dense"), {})]
        seeds = tuple(sorted(set.intersection(*(set(each) for each in others))))
        if method == OURS or budget >= 1.0 or not seeds:
            continue
        tasks = tuple(sorted(set.intersection(*(set(each[seed]) for each in others for seed in seeds))))
        ours = measured((trained, budget, OURS), seeds, tasks)
        row = {"method": method, "trained": trained, "budget": budget, "seeds": len(seeds)}
        for name, values in measured(key, seeds, tasks).items():
            difference = values - ours[name]
            row[name] = [difference[0].item(), *np.quantile(difference[1:], (0.025, 0.975)).tolist()]
        rows.append(row)
    return sorted(rows, key=lambda row: (row["trained"], -row["budget"], row["method"]))


def _interval(values: list[float] | None) -> str:
    return "–" if values is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*values)


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def _number(value: float | None, form: str = ".1f") -> str:
    return "–" if value is None else format(value, form)


def write_report(out: Path) -> None:
    """`quality.csv`, `quality.json`, `quality.md` and `quality.png` in `out`, from its cells."""
    cells = load_cells(out)
    if not cells:
        print("no cells: nothing to report")
        return
    rows = rows_of(cells)
    with replacing(out / "quality.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])))
        writer.writeheader()
        rounded = ("active", "bytes", "bleu", "e2e", *BITS, *ACCURACIES)
        writer.writerows({k: f"{v:.5f}" if k in rounded else v for k, v in row.items()} for row in rows)
    means, compared = averaged(rows), differences(cells)
    about = json.loads((out / "about.json").read_text()) if (out / "about.json").exists() else {}
    values = {"about": about, "results": means, "differences": compared}
    write_json(out / "quality.json", values)
    parts = [f"{name}: {value}  " for name, value in about.items()]
    for trained in sorted({row["trained"] for row in means}):
        parts.append(f"\n## After {_millions(trained)} of training\n" if trained else "\n## Without training\n")
        chosen = [row for row in means if row["trained"] == trained]
        parts += [_results(chosen), "", _at_equal_bytes(chosen)]
        if any("tokens" in row for row in chosen):
            parts += ["\n### Time to an answer\n", _answers(chosen)]
        chosen = [row for row in compared if row["trained"] == trained]
        if chosen:
            parts += ["\n### Difference from PrunePath at the same active fraction\n", _differences(chosen)]
    with replacing(out / "quality.md") as path:
        path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    _plot(means, out / "quality.png")


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.3g} M tokens"


def _results(rows: list[dict]) -> str:
    tasks = [name for name in (*BITS, "e2e", "bleu", *ACCURACIES) if any(name in row for row in rows)]
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
        for row in rows
    ]
    return _table([*header, *tasks], lines)


def _at_equal_bytes(rows: list[dict]) -> str:
    curves = collections.defaultdict(list)
    for row in rows:
        if row["method"] != "dense":
            curves[row["method"]].append(row)
    lines = [[method, *(_number(at_bytes(curve, share)) for share in SHARES)] for method, curve in curves.items()]
    return _table(["bits per byte +%, at bytes read", *(f"{100 * share:g} %" for share in SHARES)], lines)


def _answers(rows: list[dict]) -> str:
    lines = [
        [
            row["method"],
            f"{row['budget']:g}",
            _number(row["tokens"]),
            *(_number(100 * row[name]) for name in ("ended", "running", "answers")),
            _number(row["seconds"], ".2f"),
        ]
        for row in rows
        if "tokens" in row
    ]
    header = ["method", "budget", "tokens", "ended %", "repeating %", "GSM8K right %", "seconds, one at a time"]
    return _table(header, lines)


def _differences(rows: list[dict]) -> str:
    lines = [
        [row["method"], f"{row['budget']:g}", *(_interval(row.get(n)) for n in ("rise", "accuracy", "rouge"))]
        for row in rows
    ]
    header = ["method", "budget", "rise of bits per byte, % of dense", "accuracy, points", "ROUGE-L, points"]
    return (
        "The method's number less PrunePath's, with the 95 % interval of a paired bootstrap over examples. A higher "
        f"rise is worse, higher accuracy and ROUGE-L are better.\n\n{_table(header, lines)}"
    )


def _plot(means: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stages = sorted({row["trained"] for row in means})
    names = sorted({row["method"] for row in means})
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)} | {OURS: "black"}
    figure, axes = plt.subplots(1, len(stages), figsize=(7 * len(stages), 5), squeeze=False)
    for axis, trained in zip(axes[0], stages, strict=True):
        curves = collections.defaultdict(list)
        for row in means:
            if row["trained"] == trained and row["budget"] < 1 and (row.get("rise") or 0) > 0:
                curves[row["method"]].append((100 * row["bytes"], row["rise"]))
        for method, points in sorted(curves.items()):
            style = {"color": colours[method], "linewidth": 3 if method == OURS else 1.5}
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=method, **style)
        axis.set(xlabel="FFN bytes read a token, % of dense", ylabel="rise in bits per byte, %", yscale="log")
        axis.set_title(f"{_millions(trained)} of training" if trained else "no training")
        if curves:
            axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
