"""The driver of the quality benchmark, on a tiny model and two tasks of a few examples."""

import fcntl
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not (BENCHMARKS / "quality.py").is_file():
    pytest.skip("needs the source tree's benchmarks", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import quality  # noqa: E402
from baselines import METHODS  # noqa: E402
from tasks import TASKS  # noqa: E402

from prunepath.demo.run import model_folder  # noqa: E402
from prunepath.errors import PrunePathError  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(model, data)"""
    model, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    with model_folder() as path:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.save_pretrained(model)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    (data / "lm").mkdir()
    for name in ("wikitext2-train-1MB", "wikipedia-plain", "wikitext2-valid", "wikitext2-test-raw"):
        text = " ".join(f"{name} {i * i}" for i in range(300))
        (data / "lm" / f"{name}.txt").write_text(text)
    (data / "nlu").mkdir()
    with zipfile.ZipFile(data / TASKS["mr"].archive, "w") as file:
        for name, word in zip(TASKS["mr"].files, ("bad", "good"), strict=True):
            file.writestr(name, "\n".join(f"{word} film {i}" for i in range(60)))
    return model, data


@pytest.fixture
def run(folders, tmp_path, monkeypatch):
    """Runs the command with options; its folder."""
    model, data = folders
    monkeypatch.setattr(quality, "TASKS", {name: TASKS[name] for name in ("wikitext", "mr")})

    def run(*options):
        fixed = ["--model", model, "--data", data, "--out", tmp_path, "--device", "cpu", "--seeds", "0"]
        sizes = ["--tokens-per-step", 512, "--install-tokens", 1024, "--calibration-tokens", 512, "--limit", 5]
        options = ["--budgets", "0.5", *options] if "--budgets" not in options else options
        monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, [*fixed, *sizes, *options])])
        quality.main()
        return tmp_path

    return run


def names_of(out):
    return sorted(path.name for path in (out / "cells").iterdir())


def test_methods_are_measured_before_and_after_training_and_not_again(run, capsys, monkeypatch):
    out = run("--tokens", 1024, "--methods", "dense,static-wanda,cats")
    names = ["cats.plain.0.json", "cats.trained.0.json", "dense.plain.0.json", "dense.trained.0.json"]
    names += ["static-wanda-0.5.plain.0.json", "static-wanda-0.5.trained.0.json"]
    assert names_of(out) == names
    cells = {name: json.loads((out / "cells" / name).read_text()) for name in names}
    for name, cell in cells.items():
        assert cell["tokens"] == (1024 if "trained" in name else 0)
        assert ("losses" in cell) == ("trained" in name)
        assert [found["budget"] for found in cell["results"]] == {"d": [1.0], "c": [1.0, 0.5], "s": [0.5]}[name[0]]
        for found in cell["results"]:
            assert found["active"] == pytest.approx(found["budget"], abs=0.05)
            scores = {task: values["scores"] for task, values in found["tasks"].items()}
            assert set(scores) == {"wikitext", "mr"} and len(scores["mr"]) == 5
    dense, cats = (cells[f"{name}.plain.0.json"]["results"] for name in ("dense", "cats"))
    assert cats[0]["tasks"]["wikitext"]["scores"] == pytest.approx(dense[0]["tasks"]["wikitext"]["scores"], rel=1e-3)
    trained = cells["dense.trained.0.json"]["results"]
    assert trained[0]["tasks"]["wikitext"]["value"] < dense[0]["tasks"]["wikitext"]["value"]
    for name in ("quality.csv", "quality.json", "quality.md", "quality.png"):
        assert (out / name).stat().st_size > 100

    # What is there is not computed again; what is not there is.
    (out / "cells" / "cats.trained.0.json").unlink()
    times = {name: (out / "cells" / name).stat().st_mtime_ns for name in names_of(out)}
    for name in ("dense", "static-wanda"):
        monkeypatch.setattr(METHODS[name], "install", None)
    capsys.readouterr()
    run("--tokens", 1024, "--methods", "dense,static-wanda,cats")
    assert names_of(out) == names
    assert {name: (out / "cells" / name).stat().st_mtime_ns for name in times} == times
    printed = capsys.readouterr().out
    assert "cats seed 0: installed" in printed and "trained 2 steps" in printed
    assert printed.count("budget 0.5:") == 1  # after training alone


def test_a_failing_method_leaves_the_others_results(run, tmp_path, monkeypatch):
    def fail(self, batches):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(METHODS["static-wanda"], "install", fail)
    with pytest.raises(SystemExit, match="static-wanda seed 0: RuntimeError: no such luck"):
        run("--no-training", "--methods", "dense,static-wanda,cats")
    assert names_of(tmp_path) == ["cats.plain.0.json", "dense.plain.0.json"]
    assert "| cats | 0.5 |" in (tmp_path / "quality.md").read_text()


def test_what_another_process_computes_is_left_to_it(run, tmp_path):
    (tmp_path / "cells").mkdir()
    with (tmp_path / "cells" / "cats.plain.0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("--no-training", "--methods", "dense,cats")
    assert names_of(tmp_path) == ["cats.plain.0.lock", "dense.plain.0.json"]
    run("--no-training", "--methods", "dense,cats")
    assert names_of(tmp_path) == ["cats.plain.0.json", "dense.plain.0.json"]


def test_results_of_other_settings_are_not_mixed(run):
    out = run("--no-training", "--methods", "dense")
    with pytest.raises(PrunePathError, match=r"Expected budgets \[0\.5\], as the other results .* got \[0\.25\]"):
        run("--no-training", "--methods", "dense", "--budgets", "0.25")
    run("--tokens", 512, "--methods", "dense")  # the same before training
    assert names_of(out) == ["dense.plain.0.json", "dense.trained.0.json"]
    with pytest.raises(PrunePathError, match="Expected tokens 512"):
        run("--tokens", 1024, "--methods", "dense")


def test_bounds_are_not_trained_and_heads_are_there_for_training_on_unmeasured_tasks(run):
    out = run("--tokens", 8192, "--only-trained", "--tasks", "wikitext", "--methods", "dense,oracle-topmass")
    assert names_of(out) == ["dense.trained.0.json", "oracle-topmass.plain.0.json"]


def test_unknown_names_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--methods", "dense,denser")
    assert "expected names among dense, static-mean" in capsys.readouterr().err
