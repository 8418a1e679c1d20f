"""Writes docs/quality.md, .json, .csv and a plot from the cells of `benchmarks/quality.py`.

python benchmarks/quality_report.py quality/cells.json.xz docs
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import math
import sys
from pathlib import Path

import numpy as np

OURS = "prunepath"
BOUNDS = ("oracle-topk", "oracle-topmass", "random")
TARGETS = {0.5: 0.005, 0.25: 0.02, 0.1: 0.06}
"""Budget -> relative loss of quality that is aimed at, mean over tasks."""
TOLERANCE = 0.005
"""How far an active fraction may be from its budget."""
_RESAMPLES = 10_000


def example_scores(result: dict, task: dict) -> tuple[np.ndarray, np.ndarray]:
    """(score, weight) of each test example: a quality is the sum of scores over the sum of weights."""
    if task["metric"] == "bits_per_byte":
        return np.array(result["nll"]) / math.log(2), np.array(task["sizes"], dtype=float)
    if task["metric"] == "accuracy":
        scores = np.array(result["correct"], dtype=float)
    else:
        scores = np.array(rouge_l(result["predictions"], task["references"]))
    return scores, np.ones(len(scores))


def rouge_l(predictions: list[str], references: list[str]) -> list[float]:
    """ROUGE-L F1 of each pair, by the rouge-score package."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise SystemExit("expected the package rouge-score for summaries: pip install '.[bench]'.") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [scorer.score(r, p)["rougeL"].fmeasure for r, p in zip(references, predictions, strict=True)]


class Table:
    """All results: (task, method, finetuned, budget) -> seed -> result with its `scores` and `weights`."""

    def __init__(self, data: dict) -> None:
        self.data = data
        self.tasks: dict[str, dict] = {}
        self.methods: dict[str, bool] = {}
        self.results: dict[tuple[str, str, bool, float], dict[int, dict]] = {}
        for cell in data["cells"]:
            name, method = cell["task"], cell["method"]
            self.tasks[name] = data["tasks"][name]
            self.methods[method] = cell["one_checkpoint"]
            for result in cell["results"]:
                scores, weights = example_scores(result, self.tasks[name])
                key = (name, method, result["finetuned"], result["budget"])
                self.results.setdefault(key, {})[cell["seed"]] = {**result, "scores": scores, "weights": weights}

    @property
    def baselines(self) -> list[str]:
        return [m for m in self.methods if m not in (OURS, "dense", *BOUNDS)]

    def seeds(self, *keys: tuple) -> list[int]:
        """The seeds that all the keys have."""
        return sorted(set.intersection(*(set(self.results.get(key, ())) for key in keys)))

    def quality(self, key: tuple, seeds: list[int] | None = None) -> float | None:
        """The mean over seeds; None without any."""
        found = self.results.get(key, {})
        values = [_quality(found[seed]) for seed in (found if seeds is None else seeds)]
        return sum(values) / len(values) if values else None

    def loss(self, key: tuple, seed: int | None = None) -> float | None:
        """Share of the dense model's quality that is lost, against the dense model with the same extra training.

        Over the seeds that both have, or at one of them.
        """
        reference = (key[0], "dense", key[2], 1.0)
        seeds = [s for s in self.seeds(key, reference) if seed in (None, s)]
        value, dense = self.quality(key, seeds), self.quality(reference, seeds)
        if value is None or not dense:
            return None
        rise = value / dense - 1.0
        return rise if self.tasks[key[0]]["metric"] == "bits_per_byte" else -rise

    def mean_loss(self, method: str, finetuned: bool, budget: float, seed: int | None = None) -> float | None:
        """The mean of `loss` over tasks; None where one is missing."""
        losses = [self.loss((task, method, finetuned, budget), seed) for task in self.tasks]
        return None if None in losses else sum(losses) / len(losses)

    def spread(self, method: str, finetuned: bool, budget: float) -> float | None:
        """The standard deviation over seeds of `mean_loss`; None with fewer than two complete seeds."""
        seeds = self.seeds(*((task, method, finetuned, budget) for task in self.tasks))
        values = [self.mean_loss(method, finetuned, budget, seed) for seed in seeds]
        values = [value for value in values if value is not None]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def best_baseline(self, task: str, finetuned: bool, budget: float, *, one_checkpoint: bool = False) -> str | None:
        """The baseline that loses least; with `one_checkpoint`, out of those that serve all budgets with one."""
        baselines = [m for m in self.baselines if self.methods[m] or not one_checkpoint]
        losses = {m: self.loss((task, m, finetuned, budget)) for m in baselines}
        losses = {m: value for m, value in losses.items() if value is not None}
        return min(losses, key=losses.get) if losses else None

    def lead(self, task: str, other: str, finetuned: bool, budget: float) -> tuple[float, float] | None:
        """95 % interval of the lost share of quality, ours minus the other's, by a paired bootstrap.

        It draws examples and seeds, each with replacement; a seed's partition and data are the same for all methods.
        """
        keys = [(task, method, finetuned, budget) for method in (OURS, other)] + [(task, "dense", finetuned, 1.0)]
        seeds = self.seeds(*keys)
        if not seeds:
            return None
        ours, theirs, dense = (np.stack([self.results[key][seed]["scores"] for seed in seeds]) for key in keys)
        random = np.random.default_rng(0)
        # How often each is drawn.
        examples = random.multinomial(dense.shape[1], np.full(dense.shape[1], 1.0 / dense.shape[1]), _RESAMPLES)
        drawn = random.multinomial(len(seeds), np.full(len(seeds), 1.0 / len(seeds)), _RESAMPLES)
        gap, whole = (((examples @ values.T) * drawn).sum(1) for values in (ours - theirs, dense))
        sign = 1.0 if self.tasks[task]["metric"] == "bits_per_byte" else -1.0
        low, high = np.quantile(sign * gap / np.maximum(whole, 1e-12), (0.025, 0.975))
        return float(low), float(high)

    def missed(self) -> list[str]:
        """Where active fractions are not the budget's: the least and the most of those seeds' fractions."""
        lines = []
        for (task, method, tuned, budget), seeds in self.results.items():
            fractions = [result["active_fraction"] for result in seeds.values()]
            fractions = sorted(f for f in fractions if abs(f - budget) > TOLERANCE)
            if fractions:
                kind = "fine-tuned" if tuned else "not fine-tuned"
                span = " to ".join(dict.fromkeys(f"{f:.1%}" for f in (fractions[0], fractions[-1])))
                lines.append(f"{task}, {method}, {kind}, {budget:.0%}: {span} ({len(fractions)} of {len(seeds)} seeds)")
        return lines


def _quality(result: dict) -> float:
    return float(result["scores"].sum() / result["weights"].sum())


def verdict(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "–"
    return "ahead of" if interval[1] < 0 else "behind" if interval[0] > 0 else "level with"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f} %"


def coverage(data: dict) -> str:
    """Which of the cells that were asked for are missing, one line for each task and set of seeds; "" if none is."""
    found = {(cell["task"], cell["method"], cell["seed"]) for cell in data["cells"]}
    asked = data["asked"]
    lines = []
    for task in asked["tasks"]:
        missing = {
            seed: [method for method in asked["methods"] if (task, method, seed) not in found]
            for seed in asked["seeds"]
        }
        for seed, methods in missing.items():
            if methods:
                text = "all methods" if methods == asked["methods"] else ", ".join(methods)
                lines.append(f"- {task}, seed {seed}: {text}\n")
    if not lines:
        return ""
    wanted = len(asked["tasks"]) * len(asked["methods"]) * len(asked["seeds"])
    return (
        f"\n## Not measured\n\n{len(found)} of {wanted} cells (task, method, seed) ended within the time limit. Without"
        f" further seeds, intervals show the spread over test examples alone. Missing:\n\n{''.join(lines)}"
    )


def render(table: Table, notes: str) -> str:
    data, out = table.data, io.StringIO()
    names = list(table.tasks)

    def row(*cells: str) -> None:
        out.write(f"| {' | '.join(cells)} |\n")

    def head(*cells: str) -> None:
        row(*cells)
        row(*["---"] * len(cells))

    settings = ", ".join(f"{name} {value}" for name, value in data["settings"].items())
    versions = ", ".join(f"{name} {value}" for name, value in data["versions"].items())
    out.write(
        "# Quality at equal active fractions\n\nWritten by `benchmarks/quality_report.py` from measured cells."
        f" Command:\n\n    {data['command']}\n\n{data['machine']}, {data['date']}; {versions}; {settings}.\n\n"
        "Every method starts from the same dense model of a task and gets the same data, steps, trainable backbone,\n"
        "distillation from the dense model and search over learning rates (on validation data). Numbers are the share\n"
        "of the dense model's quality that is lost (rise in bits per byte, drop in accuracy or ROUGE-L), that model\n"
        "having had the same extra training: lower is better. Methods are compared on the seeds that both have, and\n"
        "intervals are of a paired bootstrap over test examples and seeds.\n\n"
    )
    head("task", "model", "metric", "test examples", "dense", "dense with extra training")
    for name, task in table.tasks.items():
        dense = [table.quality((name, "dense", tuned, 1.0)) for tuned in (False, True)]
        values = ["–" if value is None else f"{value:.4f}" for value in dense]
        row(name, task["family"], task["metric"], str(task["examples"]["test"]), *values)
    out.write(coverage(data))
    out.write("\n## Targets\n\n")
    head(
        *("budget", "lost at most", "lost", "reached", "against the best baseline of each task (95 % interval)"),
        "against the best with one checkpoint for all budgets, as PrunePath has",
    )
    for budget, target in TARGETS.items():
        lost = table.mean_loss(OURS, True, budget)
        reached = "–" if lost is None else "yes" if lost <= target else "no"
        columns = []
        for one_checkpoint in (False, True):
            leads = []
            for name in names:
                best = table.best_baseline(name, True, budget, one_checkpoint=one_checkpoint)
                interval = table.lead(name, best, True, budget) if best else None
                text = "–" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"
                leads.append(f"{name}: {verdict(interval)} {best} ({text})" if best else f"{name}: –")
            columns.append("; ".join(leads))
        row(f"{budget:.0%}", f"{target:.1%}", percent(lost), reached, *columns)
    for tuned in (True, False):
        out.write(f"\n## {'With' if tuned else 'Without'} fine-tuning\n")
        for budget in TARGETS:
            out.write(f"\nBudget {budget:.0%}:\n\n")
            head("method", "checkpoints", "seeds", *names, "mean")
            shown = [OURS, *table.baselines, *(m for m in BOUNDS if m in table.methods)]
            best = {name: table.best_baseline(name, tuned, budget) for name in names}
            for method in shown:
                seeds = {len(table.results.get((name, method, tuned, budget), {})) for name in names}
                cells = []
                for name in names:
                    text = percent(table.loss((name, method, tuned, budget)))
                    cells.append(f"*{text}*" if best[name] == method else text)
                label = f"**{method}**" if method == OURS else f"{method} (bound)" if method in BOUNDS else method
                kind = "one" if table.methods.get(method, True) else "one per budget"
                count = "–".join(str(n) for n in sorted({min(seeds), max(seeds)}))
                mean, spread = percent(table.mean_loss(method, tuned, budget)), table.spread(method, tuned, budget)
                row(label, kind, count, *cells, mean if spread is None else f"{mean} ± {100 * spread:.1f}")
    out.write(
        "\nIn italics: the best baseline of a task. ±: the standard deviation of the mean over seeds.\n\n"
        "## How the budget adapts\n\n"
    )
    head(
        "task", "budget", "experts per token (5th, 50th, 95th percentile)", "active fraction of the FFNs, least to most"
    )
    for name in names:
        for budget in TARGETS:
            result = next(iter(table.results.get((name, OURS, True, budget), {}).values()), None)
            if result is not None and result["experts_per_token"]:
                shares = np.cumsum(result["experts_per_token"]) / sum(result["experts_per_token"])
                points = ", ".join(str(int(np.searchsorted(shares, q))) for q in (0.05, 0.5, 0.95))
                layers = result["per_layer"]
                row(name, f"{budget:.0%}", points, f"{min(layers):.1%} to {max(layers):.1%}")
    missed = table.missed()
    out.write(f"\n## Budgets missed by more than {100 * TOLERANCE:g} points\n\n")
    out.write("".join(f"- {line}\n" for line in missed) or "None.\n")
    out.write("\n![Quality lost over the active fraction, for every task](quality.png)\n")
    if notes:
        out.write(f"\n## What was tried and did not work\n\n{notes.strip()}\n")
    return out.getvalue()


def rows(table: Table) -> list[dict]:
    """One flat row for each result and seed."""
    return [
        {
            "task": task,
            "method": method,
            "finetuned": tuned,
            "budget": budget,
            "seed": seed,
            "metric": table.tasks[task]["metric"],
            "quality": _quality(result),
            "active_fraction": result["active_fraction"],
        }
        for (task, method, tuned, budget), seeds in table.results.items()
        for seed, result in seeds.items()
    ]


def plot(table: Table, path: Path) -> None:
    """The trade-off curve of every method on every task, with fine-tuning."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(table.tasks), figsize=(4 * len(table.tasks), 4), squeeze=False)
    methods = [OURS, *sorted(table.baselines), *BOUNDS]
    for axis, name in zip(axes[0], table.tasks, strict=True):
        for i, method in enumerate(methods):
            points = [(budget, table.loss((name, method, True, budget))) for budget in TARGETS]
            points = [(100 * budget, 100 * loss) for budget, loss in points if loss is not None]
            if points:
                style = {"color": "black", "marker": "o", "linewidth": 2} if method == OURS else {"color": f"C{i - 1}"}
                axis.plot(*zip(*points, strict=True), ":" if method in BOUNDS else "-", label=method, **style)
        axis.set(title=name, xlabel="active FFN neurons, %", ylabel="quality lost, %")
        axis.grid(alpha=0.3)
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.tight_layout(rect=(0, 0, 1, 0.87))
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncols=7, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(results: Path, docs: Path) -> None:
    """Writes quality.md, quality.json, quality.csv and quality.png into `docs`."""
    data = json.loads(lzma.decompress(results.read_bytes()))
    if not data["cells"]:
        raise SystemExit(f"expected finished cells in {results}, got none.")
    table = Table(data)
    notes = docs / "quality-notes.md"
    docs.mkdir(parents=True, exist_ok=True)
    flat = rows(table)
    text = render(table, notes.read_text(encoding="utf-8") if notes.is_file() else "")
    summary = {name: data[name] for name in ("command", "settings", "machine", "date", "versions")}
    summary["tasks"] = {
        name: {k: v for k, v in task.items() if k not in ("sizes", "references")} for name, task in table.tasks.items()
    }
    summary["rows"] = flat
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    for name, content in (
        ("quality.csv", stream.getvalue()),
        ("quality.json", json.dumps(summary, indent=1) + "\n"),
        ("quality.md", text),
    ):
        temporary = docs / f".{name}"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(docs / name)
    plot(table, docs / "quality.png")


if __name__ == "__main__":
    write_report(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "docs"))
