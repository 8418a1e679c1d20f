"""A trade-off curve has one honest row a point, and leaves the model as it was."""

import json
import subprocess
import sys

import pytest
import torch

import prunepath
from prunepath.errors import PrunePathError
from prunepath.eval.plots import plot_tradeoff
from prunepath.eval.tradeoff import tradeoff

PROMPT = torch.tensor([[5, 6, 7]])


def test_budgets_give_rows_with_falling_active_fractions(dense, sparse, tokenizer, texts):
    prunepath.set_threshold(sparse, [0.5, 0.25])
    done = []
    rows = tradeoff(
        sparse,
        tokenizer,
        iter(texts[:4]),  # read once and used for every row
        budgets=[1.0, 0.5, 0.25],
        sequence_length=32,
        dense=dense,
        prompt=PROMPT,
        new_tokens=3,
        repeats=1,
        on_row=done.append,
    )
    assert rows == done
    assert [row["budget"] for row in rows] == [1.0, 0.5, 0.25]
    assert rows[0]["active_fraction"] == 1.0
    assert 1.0 > rows[1]["active_fraction"] > rows[2]["active_fraction"] > 0
    assert rows[0]["thresholds"] == [1.0, 1.0]
    assert len({row["tokens"] for row in rows}) == 1
    assert all(row["tokens_per_second"] > 0 and row["dense_tokens_per_second"] > 0 for row in rows)
    assert json.loads(json.dumps(rows)) == rows
    assert prunepath.get_thresholds(sparse) == [0.5, 0.25]


def test_thresholds_give_rows_without_budget_and_without_a_dense_model_no_speed(sparse, tokenizer, texts):
    rows = tradeoff(sparse, tokenizer, texts[:2], thresholds=[1.0, 0.5], sequence_length=32, max_tokens=100)
    assert [row["thresholds"] for row in rows] == [[1.0, 1.0], [0.5, 0.5]]
    assert [row["budget"] for row in rows] == [None, None]
    assert [row["tokens"] for row in rows] == [100, 100]
    assert rows[0]["tokens_per_second"] is None


@pytest.mark.parametrize("points", [{}, {"budgets": [1.0], "thresholds": [1.0]}])
def test_exactly_one_kind_of_point_is_expected(sparse, tokenizer, texts, points):
    with pytest.raises(PrunePathError, match="either budgets or thresholds"):
        tradeoff(sparse, tokenizer, texts, sequence_length=32, **points)


def row(active, **changes):
    values = {"active_fraction": active, "perplexity": 9.0, "bits_per_byte": 2.0}
    return values | {"tokens_per_second": 30.0, "dense_tokens_per_second": 20.0} | changes


@pytest.mark.parametrize("changes", [{}, {"tokens_per_second": None}, {"bits_per_byte": None}])
def test_plots_are_written_whole(tmp_path, changes):
    path = tmp_path / "curve.png"
    plot_tradeoff([row(0.5, **changes), row(1.0, **changes)], path, title="title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["curve.png"]


def test_a_plot_of_nothing_is_refused(tmp_path):
    with pytest.raises(PrunePathError, match="at least one row"):
        plot_tradeoff([], tmp_path / "curve.png")
    assert not any(tmp_path.iterdir())


def test_only_drawing_needs_matplotlib(tmp_path):
    code = (
        "import sys, prunepath.eval.decode, prunepath.eval.perplexity;"
        "import prunepath.eval.plots, prunepath.eval.tradeoff;"
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
