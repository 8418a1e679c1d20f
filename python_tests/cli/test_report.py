"""`prunepath report` writes one page, whole or not at all, and prints its numbers."""

import json

import pytest


def test_report_writes_a_page_and_prints_the_table(prunepath_command, sparse_folder, corpus, tmp_path):
    out = tmp_path / "page.html"
    result = prunepath_command("report", sparse_folder, "--data", corpus, "--out", out, "--max-tokens", 300)
    assert result.exit_code == 0, result.output
    assert str(out) in result.stdout
    assert "bits/byte" in result.stdout
    page = out.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert str(sparse_folder) in page


def test_report_prints_its_numbers_as_json(prunepath_command, sparse_folder, corpus, tmp_path):
    out = tmp_path / "page.html"
    arguments = ("--out", out, "--max-tokens", 300, "--budget", "0.5,0.25", "--json")
    numbers = json.loads(prunepath_command("report", sparse_folder, "--data", corpus, *arguments).stdout)
    assert [row["budget"] for row in numbers["rows"]] == [1.0, 0.5, 0.25]
    assert all(row["tokens"] == 300 for row in numbers["rows"])
    assert numbers["passage"]["pieces"]
    assert out.is_file()


def test_a_model_without_a_knob_is_refused_and_nothing_is_written(
    refused, dense_folder, sparse_folder, corpus, tmp_path
):
    out = tmp_path / "page.html"
    assert "dense" in refused("report", dense_folder, "--data", corpus, "--out", out)
    path = sparse_folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["budgets"] = {}
    path.write_text(json.dumps(config))
    assert "calibrate" in refused("report", sparse_folder, "--data", corpus, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("place", ["folder", "missing/page.html"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(refused, corpus, tmp_path, place):
    (tmp_path / "folder").mkdir()
    assert place in refused("report", "no/such/model", "--data", corpus, "--out", tmp_path / place)


def test_a_budget_out_of_range_is_refused_before_any_work(refused, corpus):
    assert "budget must be in (0, 1], got 1.5" in refused(
        "report", "no/such/model", "--data", corpus, "--budget", "1.5"
    )


def test_a_failure_while_writing_leaves_the_former_page(
    prunepath_command, sparse_folder, corpus, tmp_path, monkeypatch
):
    import jinja2

    out = tmp_path / "page.html"
    out.write_text("former")

    def fail(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(jinja2.Template, "render", fail)
    result = prunepath_command("report", sparse_folder, "--data", corpus, "--out", out, "--max-tokens", 100)
    assert result.exit_code != 0
    assert out.read_text() == "former"
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".page")]
