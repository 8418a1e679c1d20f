"""The report on the quality benchmark's cells: means, equal bytes, and the paired bootstrap."""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not (BENCHMARKS / "quality_report.py").is_file():
    pytest.skip("needs the source tree's benchmarks", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import quality_report as report  # noqa: E402

EXAMPLES = 200
SIZES = [10 + i % 5 for i in range(EXAMPLES)]


def result(budget, nats, right, rouge, read=None, seed=0):
    """Every example has its own difficulty, which all methods share: a paired comparison does not see it."""
    draws = np.random.default_rng(7)
    hard = draws.uniform(0.2, 3.0, EXAMPLES)
    noise = np.random.default_rng([int(1e4 * nats), seed]).normal(0, 0.02, EXAMPLES)
    tasks = {}
    for task in ("wikitext", "dolly", "gsm8k"):
        scores = (nats * hard * (1 + noise)).tolist()
        tasks[task] = {"value": sum(scores) / math.log(2) / sum(SIZES), "scores": scores, "sizes": SIZES}
    for task in ("mr", "boolq"):
        scores = (draws.permutation(EXAMPLES) < right * EXAMPLES).astype(float).tolist()
        tasks[task] = {"value": sum(scores) / EXAMPLES, "scores": scores}
    scores = (rouge * draws.uniform(0.5, 1.5, EXAMPLES)).tolist()
    tasks["e2e"] = {"value": sum(scores) / EXAMPLES, "scores": scores, "bleu": 20.0, "predictions": ["x"] * EXAMPLES}
    return {"budget": budget, "active": budget, "bytes": read or budget, "per_layer": [budget], "tasks": tasks}


def cell(method, results, tokens=0, seed=0):
    return {"method": method, "seed": seed, "tokens": tokens, "trained": tokens > 0, "results": results}


def cells(seed=0, tokens=0):
    return [
        cell("dense", [result(1.0, 1.0, 0.9, 0.6)], tokens, seed),
        cell("prunepath", [result(b, 1 + (1 - b) / 5, 0.8, 0.5, seed=seed) for b in (0.5, 0.25)], tokens, seed),
        cell("teal", [result(b, 1 + (1 - b) / 4, 0.7, 0.4, seed=seed) for b in (0.5, 0.25)], tokens, seed),
    ]


def write(out, some):
    (out / "cells").mkdir()
    for i, each in enumerate(some):
        (out / "cells" / f"{i}.json").write_text(json.dumps(each))
    report.write_report(out)


def test_means_are_over_seeds_and_against_dense_with_the_same_training():
    some = [*cells(), cell("dense", [result(1.0, 0.5, 0.95, 0.6)], tokens=1000)]
    some += [cell("teal", [result(0.5, nats, 0.85, 0.3)], 1000, seed) for seed, nats in enumerate((0.5, 0.7))]
    rows = {(row["method"], row["trained"], row["budget"]): row for row in report.averaged(report.rows_of(some))}
    row = rows["teal", 1000, 0.5]
    assert row["seeds"] == 2
    assert row["rise"] == pytest.approx(20.0, abs=0.5)
    assert row["accuracy_lost"] == pytest.approx(10.0)
    assert row["rouge_lost"] == pytest.approx(50.0)
    assert rows["prunepath", 0, 0.5]["rise"] == pytest.approx(10.0, abs=0.5)
    assert rows["dense", 1000, 1.0]["rise"] == 0.0


def test_equal_bytes_are_interpolated_and_not_extrapolated():
    rows = [{"bytes": share, "rise": 2.0 / share} for share in (0.25, 0.5, 0.8)]
    assert report.at_bytes(rows, 0.4) == pytest.approx(5.0)
    assert report.at_bytes(rows, 0.5) == pytest.approx(4.0)
    assert report.at_bytes(rows, 0.2) is None and report.at_bytes(rows, 0.9) is None
    assert report.at_bytes([{"bytes": 0.0, "rise": 99.0}, *rows], 0.2) is None  # no expert at all
    assert report.at_bytes([{"bytes": 0.5, "rise": 2.0}, {"bytes": 1.0, "rise": 0.0}], 0.75) == pytest.approx(
        0.83, abs=0.01
    )


def test_differences_are_those_of_the_means_with_paired_intervals():
    some = cells() + cells(seed=1)
    means = {(row["method"], row["budget"]): row for row in report.averaged(report.rows_of(some))}
    rows = report.differences(some)
    assert [(row["method"], row["budget"], row["seeds"]) for row in rows] == [("teal", 0.5, 2), ("teal", 0.25, 2)]
    for row in rows:
        theirs, ours = (means[method, row["budget"]] for method in ("teal", "prunepath"))
        assert row["rise"][0] == pytest.approx(theirs["rise"] - ours["rise"])
        assert row["accuracy"][0] == pytest.approx(ours["accuracy_lost"] - theirs["accuracy_lost"])
        assert row["rouge"][0] == pytest.approx(100 * (theirs["e2e"] - ours["e2e"]))
        for name in ("rise", "accuracy", "rouge"):
            value, low, high = row[name]
            assert low < value < high
    # Difficulties spread by 60 %, methods by 2 % around their difference of 2.5 and 3.75.
    assert rows[0]["rise"][2] - rows[0]["rise"][1] < 1.0
    assert report.differences(some) == rows


def test_the_interval_is_the_bootstraps():
    """Against the normal approximation, for one accuracy that differs in some examples."""
    generator = np.random.default_rng(0)
    ours, theirs = (generator.random((2, 1000)) < [[0.8], [0.75]]).astype(float)
    some = [
        cell(
            name, [{"budget": budget, "active": budget, "bytes": budget, "tasks": {"mr": {"scores": scores.tolist()}}}]
        )
        for name, budget, scores in (("dense", 1.0, ours), ("prunepath", 0.5, ours), ("teal", 0.5, theirs))
    ]
    (row,) = report.differences(some)
    value, low, high = row["accuracy"]
    error = 100 * (theirs - ours).std() / 1000**0.5
    assert value == pytest.approx(100 * (theirs - ours).mean())
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.15 * error)
    assert "rise" not in row and "rouge" not in row


def test_equal_methods_do_not_differ():
    some = cells()
    some[2]["results"] = some[1]["results"]
    for row in report.differences(some):
        assert row["rise"] == row["accuracy"] == row["rouge"] == [0.0, 0.0, 0.0]


def test_only_seeds_that_both_have_are_compared():
    some = [*cells(), *cells(seed=1)]
    wild = cell("teal", [result(0.5, 9.0, 0.1, 0.1)], seed=2)
    assert report.differences([*some, wild]) == report.differences(some)
    assert report.differences([each for each in cells() if each["method"] != "prunepath"]) == []


def test_all_files_are_written(tmp_path):
    (tmp_path / "about.json").write_text(json.dumps({"command": "python benchmarks/quality.py --out here"}))
    write(tmp_path, [*cells(), *cells(tokens=2_000_000)])
    with (tmp_path / "quality.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 10 and set(report.COLUMNS) < set(lines[0]) and float(lines[0]["bleu"]) == 20.0
    values = json.loads((tmp_path / "quality.json").read_text())
    assert len(values["results"]) == 10 and len(values["differences"]) == 4
    text = (tmp_path / "quality.md").read_text()
    assert "python benchmarks/quality.py --out here" in text
    assert "## Without training" in text and "## After 2 M tokens of training" in text
    difference = "{:+.2f} ({:+.2f} to {:+.2f})".format(*values["differences"][0]["rise"])
    assert f"| teal | 0.5 | {difference} |" in text
    assert text.count("### Difference from PrunePath at the same active fraction") == 2
    assert (tmp_path / "quality.png").stat().st_size > 1000


def test_missing_numbers_are_dashes(tmp_path):
    some = cells()
    for each in some:
        for found in each["results"]:
            found["tasks"] = {"mr": found["tasks"]["mr"]}
    write(tmp_path, some)
    assert "| teal | 0.5 | 50.0 | 50.0 | – | 20.00 | – | 1 | 0.7000 |" in (tmp_path / "quality.md").read_text()


def test_nothing_is_written_without_cells(tmp_path, capsys):
    write(tmp_path, [])
    assert "no cells" in capsys.readouterr().out
    assert not (tmp_path / "quality.md").exists()
