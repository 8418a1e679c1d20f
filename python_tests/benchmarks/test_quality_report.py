"""The report of the quality benchmark, from cells whose outcome is known."""

import csv
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not (BENCHMARKS / "quality_report.py").is_file():
    pytest.skip("needs the benchmarks folder of the source tree", allow_module_level=True)
sys.path.append(str(BENCHMARKS))  # where the benchmarks import each other from; prunepath itself is not there

import quality_report as report  # noqa: E402

EXAMPLES = 200
BASE = np.random.default_rng(0).uniform(50, 150, EXAMPLES)
NOISE = np.random.default_rng(1).normal(0, 1, EXAMPLES)


def result(budget: float, finetuned: bool, nll: np.ndarray, active: float | None = None) -> dict:
    return {
        "budget": budget,
        "finetuned": finetuned,
        "active_fraction": budget if active is None else active,
        "per_layer": [0.9 * budget, 1.1 * budget],
        "experts_per_token": [0, 10, 20, 10, 0],
        "nll": nll.tolist(),
        "correct": [],
        "predictions": [],
    }


def cells(rises: dict[str, float], seed: int = 0) -> list[dict]:
    """Methods whose loss at every budget is the dense one's times 1 + rise."""
    dense = [result(1.0, tuned, BASE) for tuned in (False, True)]
    rows = [{"task": "lm", "method": "dense", "seed": seed, "one_checkpoint": True, "results": dense}]
    for method, rise in rises.items():
        results = [result(b, tuned, BASE * (1 + rise) + NOISE) for b in (0.5, 0.25, 0.1) for tuned in (False, True)]
        one = not method.startswith("static")
        rows.append({"task": "lm", "method": method, "seed": seed, "one_checkpoint": one, "results": results})
    return rows


def data(rows: list[dict]) -> dict:
    task = {"family": "llama", "metric": "bits_per_byte", "examples": {"test": EXAMPLES}, "sha256": {}}
    return {
        "command": "python benchmarks/quality.py --out here",
        "settings": {"steps": 3},
        "asked": {"tasks": ["lm"], "methods": sorted({row["method"] for row in rows}), "seeds": [0]},
        "machine": "a machine",
        "date": "2026-01-02",
        "versions": {"torch": "2"},
        "tasks": {"lm": {**task, "sizes": [100] * EXAMPLES, "references": []}},
        "cells": rows,
    }


def written(tmp_path, rows: list[dict]) -> str:
    source = tmp_path / "cells.json.xz"
    source.write_bytes(lzma.compress(json.dumps(data(rows)).encode()))
    report.write_report(source, tmp_path / "docs")
    return (tmp_path / "docs" / "quality.md").read_text()


def test_losses_are_relative_to_the_dense_model():
    table = report.Table(data(cells({"prunepath": 0.04, "topk": 0.08})))
    for budget in report.TARGETS:
        assert table.mean_loss("prunepath", True, budget) == pytest.approx(0.04, abs=2e-3)
        assert table.best_baseline("lm", True, budget) == "topk"


def test_ahead_level_and_behind():
    for ours, theirs, expected in ((0.02, 0.05, "ahead of"), (0.05, 0.02, "behind"), (0.03, 0.03, "level with")):
        table = report.Table(data(cells({"prunepath": ours, "topk": theirs, "oracle-topk": 0.0})))
        assert report.verdict(table.lead("lm", "topk", True, 0.25)) == expected
    assert report.verdict(None) == "–"


def test_better_is_higher_for_accuracy():
    rows = cells({"prunepath": 0.0, "topk": 0.0})
    correct = {"dense": 0.8, "prunepath": 0.7, "topk": 0.6}
    for cell in rows:
        for entry in cell["results"]:
            entry["correct"] = (np.arange(EXAMPLES) < correct[cell["method"]] * EXAMPLES).astype(int).tolist()
    values = data(rows)
    values["tasks"]["lm"]["metric"] = "accuracy"
    table = report.Table(values)
    assert table.loss(("lm", "prunepath", True, 0.25)) == pytest.approx(0.125)
    assert report.verdict(table.lead("lm", "topk", True, 0.25)) == "ahead of"


def test_seeds_are_averaged():
    table = report.Table(data(cells({"prunepath": 0.02}) + cells({"prunepath": 0.06}, seed=1)))
    assert table.loss(("lm", "prunepath", True, 0.25)) == pytest.approx(0.04, abs=2e-3)


def test_a_lead_that_depends_on_the_seed_is_none():
    same = cells({"prunepath": 0.02, "topk": 0.05})
    table = report.Table(data(same + cells({"prunepath": 0.02, "topk": 0.05}, seed=1)))
    assert report.verdict(table.lead("lm", "topk", True, 0.25)) == "ahead of"
    table = report.Table(data(same + cells({"prunepath": 0.05, "topk": 0.04}, seed=1)))
    assert report.verdict(table.lead("lm", "topk", True, 0.25)) == "level with"
    assert table.loss(("lm", "prunepath", True, 0.25)) < table.loss(("lm", "topk", True, 0.25))


def test_methods_are_compared_on_the_seeds_that_both_have():
    rows = cells({"prunepath": 0.02, "topk": 0.05}) + cells({"prunepath": 0.9}, seed=1)
    table = report.Table(data(rows))
    assert report.verdict(table.lead("lm", "topk", True, 0.25)) == "ahead of"


def test_the_spread_is_over_seeds(tmp_path):
    rows = [*cells({"prunepath": 0.02}), *cells({"prunepath": 0.04}, seed=1), *cells({"prunepath": 0.06}, seed=2)]
    table = report.Table(data(rows))
    assert table.spread("prunepath", True, 0.25) == pytest.approx(0.02, abs=1e-3)
    assert report.Table(data(rows[:2])).spread("prunepath", True, 0.25) is None
    assert " % ± 2.0 |" in written(tmp_path, rows)


def test_the_document_says_what_was_reached_and_what_was_missed(tmp_path):
    rows = cells({"prunepath": 0.04, "topk": 0.08, "static-flap": 0.09, "random": 0.5})
    rows[1]["results"][0]["active_fraction"] = 0.52
    text = written(tmp_path, rows)
    targets = text[text.index("## Targets") : text.index("## With fine-tuning")]
    verdicts = [line.split(" | ")[3] for line in targets.splitlines() if "% | " in line]
    assert verdicts == ["no", "no", "yes"]
    assert "lm: ahead of topk" in targets and "random" not in targets
    assert "| **prunepath** | one | 1 |" in text and "| static-flap | one per budget | 1 |" in text
    assert "random (bound)" in text
    assert "- lm, prunepath, not fine-tuned, 50%: 52.0%" in text
    assert "python benchmarks/quality.py --out here" in text and "2026-01-02" in text
    with (tmp_path / "docs" / "quality.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 + 4 * 6
    assert json.loads((tmp_path / "docs" / "quality.json").read_text())["machine"] == "a machine"
    assert (tmp_path / "docs" / "quality.png").stat().st_size > 1000


def test_the_best_with_one_checkpoint_is_named_beside_the_best():
    table = report.Table(data(cells({"prunepath": 0.04, "topk": 0.08, "static-flap": 0.02})))
    assert table.best_baseline("lm", True, 0.25) == "static-flap"
    assert table.best_baseline("lm", True, 0.25, one_checkpoint=True) == "topk"


def test_cells_that_were_asked_for_and_not_measured_are_named():
    values = data(cells({"prunepath": 0.04, "topk": 0.08}))
    assert report.coverage(values) == ""
    values["asked"] = {"tasks": ["lm"], "methods": ["dense", "prunepath", "topk", "lte"], "seeds": [0, 1]}
    text = report.coverage(values)
    assert "3 of 8 cells" in text
    assert text.endswith("- lm, seed 0: lte\n- lm, seed 1: all methods\n")


def test_missing_cells_are_dashes(tmp_path):
    text = written(tmp_path, cells({"topk": 0.08}))
    assert "| **prunepath** | one | 0 | – | – |" in text


def test_rouge_l():
    pytest.importorskip("rouge_score")
    same, none = report.rouge_l(["Return the area.", "xyz"], ["Return the area.", "Close the file."])
    assert same == 1.0 and none == 0.0
