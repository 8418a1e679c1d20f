"""The demo's folder is whole, its JSON alone, and its dense row the dense model. (The real model runs in .ci/run.)"""

import contextlib
import json

import pytest
from transformers import AutoModelForCausalLM

import prunepath
from prunepath.demo import run as demo


@pytest.fixture
def small_demo(dense_folder, corpus, monkeypatch):
    """The demo on a tiny random model and a short text, wherever the package is installed."""
    monkeypatch.setattr(demo, "model_folder", lambda: contextlib.nullcontext(dense_folder))
    monkeypatch.setattr(demo, "stdlib_texts", lambda split: [corpus.read_text()])
    config = prunepath.PrunePathConfig(
        num_experts=8, sequence_length=32, partition_tokens=256, router_tokens=512, calibration_tokens=256
    )
    monkeypatch.setattr(demo, "CONFIG", config)
    for name, value in (("SEQUENCE_LENGTH", 32), ("HELD_OUT_TOKENS", 200), ("DECODE_TOKENS", 3)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 4)
    return demo


def test_the_demo_writes_its_folder_and_prints_the_same_json(small_demo, prunepath_command, tmp_path):
    out = tmp_path / "deep" / "out"
    result = prunepath_command("demo", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads((out / "tradeoff.json").read_text())
    assert (out / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    assert prunepath.is_sparse(AutoModelForCausalLM.from_pretrained(out))
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]

    assert [row["budget"] for row in printed["rows"]] == list(small_demo.BUDGETS)
    assert printed["rows"][0]["bits_per_byte"] == pytest.approx(printed["model"]["bits_per_byte"], abs=1e-4)
    assert printed["rows"][0]["active_fraction"] == 1.0
    assert all(row["tokens_per_second"] > 0 for row in printed["rows"])
    assert [sample["budget"] for sample in printed["samples"]] == list(small_demo.SAMPLE_BUDGETS)
    assert printed["machine"]["cores"] >= 1
    assert printed["seconds"] > 0


def test_the_demo_prints_one_table_and_what_to_try_next(small_demo, prunepath_command, tmp_path):
    result = prunepath_command("demo", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for word in ("read", "tok/s", "dense tok/s", "bits/byte", "Budget 0.25:", small_demo.PROMPT, "prunepath generate"):
        assert word in result.stdout


def test_a_demo_that_fails_leaves_nothing(small_demo, prunepath_command, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        assert any(tmp_path.glob(".out*")), "the work is under way in a folder beside the output"
        raise KeyboardInterrupt

    monkeypatch.setattr(small_demo, "plot_tradeoff", fail)
    result = prunepath_command("demo", "--out", tmp_path / "out")
    assert result.exit_code != 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]


def test_held_out_samples_are_whole_lines(monkeypatch):
    monkeypatch.setattr(demo, "HELD_OUT_CHARACTERS", 10)
    assert demo._beginning("abc\ndef\nghijkl\nm") == "abc\ndef\n"
    assert demo._beginning("short\n") == "short\n"


def test_the_package_has_the_model():
    with demo.model_folder() as folder:
        assert (folder / "model.safetensors").stat().st_size < 16e6
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
