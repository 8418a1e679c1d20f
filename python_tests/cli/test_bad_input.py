"""Bad input is one clear sentence on standard error and exit code 2, and leaves nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM

import prunepath

FORMER_CONTENT = "something of the user's"


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def test_a_model_without_supported_ffns_is_named_with_the_supported_ones(refused, tokenizer, corpus, tmp_path):
    model = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(vocab_size=257, hidden_size=8, n_layer=1, n_head=1)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    message = refused("convert", model, tmp_path / "out", "--data", corpus)
    assert "Bloom" in message
    assert "Llama" in message
    assert not (tmp_path / "out").exists()


def test_experts_that_do_not_divide_the_width_are_refused_with_the_nearest_that_do(
    refused, dense_folder, corpus, tmp_path
):
    message = refused("convert", dense_folder, tmp_path / "out", "--data", corpus, "--num-experts", 12)
    for word in ("12", "64", "8", "16"):
        assert word in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("value", ["0", "1.01", "-0.5", "nan", "inf"])
@pytest.mark.parametrize("knob", ["budget", "threshold"])
@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_knob_out_of_range_is_refused_before_any_work(refused, corpus, command, knob, value):
    arguments = ("--data", corpus) if command == "eval" else ("prompt",)
    message = refused(command, "no/such/model", *arguments, f"--{knob}={value}")
    assert f"{knob} must be" in message
    assert f"got {value}" in message


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("convert", "--router-learning-rate"),
        ("train", "--learning-rate"),
        ("train", "--router-learning-rate"),
        ("train", "--distillation-weight"),
        ("generate", "--temperature"),
        ("generate", "--top-p"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_before_any_work(refused, corpus, command, option, value):
    arguments = ("prompt",) if command == "generate" else ("out", "--data", corpus)
    message = refused(command, "no/such/model", *arguments, f"{option}={value}")
    assert message == f"Error: {option} must be a finite number, got {value}."


def test_a_list_of_budgets_that_is_not_numbers_is_quoted(refused, corpus):
    message = refused("eval", "no/such/model", "--data", corpus, "--budget", "1.0,half")
    assert "'half'" in message
    assert "'1.0,half'" in message


def test_both_knobs_at_once_are_refused(refused, corpus):
    assert "got both" in refused("eval", "m", "--data", corpus, "--budget", "1", "--threshold", "1")
    assert "got both" in refused("generate", "m", "prompt", "--budget", "1", "--threshold", "1")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "holds none"), (b"\xff\xfe\x00", "UTF-8")],
    ids=["missing", "empty", "binary"],
)
@pytest.mark.parametrize("command", ["convert", "eval"])
def test_empty_or_unreadable_data_is_refused_before_the_model_is_loaded(refused, tmp_path, command, content, message):
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_bytes(content)
    arguments = ("no/such/model", tmp_path / "out") if command == "convert" else ("no/such/model",)
    sentence = refused(command, *arguments, "--data", data)
    assert message in sentence
    assert str(data) in sentence
    assert not (tmp_path / "out").exists()


def test_too_little_data_is_refused(refused, dense_folder, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("ab")
    refused("convert", dense_folder, tmp_path / "out", "--data", data, "--num-experts", 8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["convert", "demo"])
def test_an_output_folder_with_something_in_it_is_refused_before_any_work(refused, corpus, tmp_path, command):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text(FORMER_CONTENT)
    arguments = ("no/such/model", out, "--data", corpus) if command == "convert" else ("--out", out)
    assert str(out) in refused(command, *arguments)
    assert [entry.name for entry in out.iterdir()] == ["file"]
    assert (out / "file").read_text() == FORMER_CONTENT


def test_the_demo_says_how_to_go_on_when_it_has_run_before(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prunepath-demo").mkdir()
    (tmp_path / "prunepath-demo" / "tradeoff.json").write_text("{}")
    message = refused("demo")
    assert "remove it" in message
    assert "--out" in message


def test_an_output_path_that_is_a_file_is_refused(refused, corpus, tmp_path):
    out = tmp_path / "out"
    out.write_text(FORMER_CONTENT)
    assert str(out) in refused("convert", "no/such/model", out, "--data", corpus)
    assert out.read_text() == FORMER_CONTENT


@pytest.mark.parametrize("command", ["eval", "generate", "info"])
def test_a_truncated_checkpoint_is_refused(refused, sparse_folder, corpus, command):
    weights = sparse_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = {"eval": ("--data", corpus), "generate": ("prompt",), "info": ()}[command]
    assert str(sparse_folder) in refused(command, sparse_folder, *arguments)


def rewritten(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def drop_router(tensors):
    del tensors["model.layers.1.mlp.router.w_out"]


def shrink_router(tensors):
    name = "model.layers.1.mlp.router.w_out"
    tensors[name] = tensors[name][:4].clone()


def poison_router(tensors):
    tensors["model.layers.0.mlp.router.bias"][0] = float("nan")


def drop_weight(tensors):
    del tensors["model.layers.0.mlp.down_proj.weight"]


@pytest.mark.parametrize("change", [drop_router, shrink_router, poison_router, drop_weight])
def test_a_checkpoint_with_tampered_tensors_is_refused(refused, sparse_folder, change):
    rewritten(sparse_folder, change)
    message = refused("generate", sparse_folder, "prompt")
    assert "mlp." in message


@pytest.mark.parametrize(
    "changes",
    [{"thresholds": [0.5]}, {"thresholds": [0.5, 7.0]}, {"ffns": None}, {"config": {"num_experts": "many"}}],
)
def test_a_checkpoint_with_a_tampered_description_is_refused(refused, sparse_folder, changes):
    edit_config(sparse_folder, **changes)
    refused("generate", sparse_folder, "prompt")
    refused("info", sparse_folder)


def test_a_configuration_that_is_not_json_is_refused(refused, sparse_folder):
    (sparse_folder / "config.json").write_text('{"model_type": ')
    assert "config.json" in refused("info", sparse_folder)
    assert "config.json" in refused("generate", sparse_folder, "prompt")


@pytest.mark.parametrize("command", ["eval", "generate", "info"])
def test_a_format_version_from_the_future_is_refused(refused, sparse_folder, corpus, command):
    edit_config(sparse_folder, format_version=99)
    arguments = {"eval": ("--data", corpus), "generate": ("prompt",), "info": ()}[command]
    message = refused(command, sparse_folder, *arguments)
    assert "99" in message
    assert "upgrade" in message


def test_a_local_model_that_does_not_exist_is_refused(refused, corpus, tmp_path):
    missing = tmp_path / "missing"
    assert str(missing) in refused("convert", missing, tmp_path / "out", "--data", corpus)
    assert str(missing) in refused("eval", missing, "--data", corpus)
    assert str(missing) in refused("generate", missing, "prompt")
    assert str(missing) in refused("info", missing)


def test_a_folder_that_is_no_model_is_refused(refused, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "config.json" in refused("generate", tmp_path / "folder", "prompt")


def test_a_hub_name_that_cannot_be_reached_is_refused(refused, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert "prunepath-tests/no-such-model" in refused("generate", "prunepath-tests/no-such-model", "prompt")


def test_a_model_that_is_sparse_already_is_not_converted_again(refused, sparse_folder, corpus, tmp_path):
    assert "already" in refused("convert", sparse_folder, tmp_path / "out", "--data", corpus)
    assert not (tmp_path / "out").exists()


def test_a_dense_model_has_no_knob(refused, dense_folder, corpus):
    assert "dense model" in refused("eval", dense_folder, "--data", corpus, "--budget", "0.5")
    assert "dense model" in refused("generate", dense_folder, "prompt", "--threshold", "0.5")


def test_an_empty_prompt_is_refused(refused, dense_folder):
    assert "at least one token" in refused("generate", dense_folder, "")


def test_a_window_longer_than_the_model_allows_is_refused(refused, sparse_folder, corpus):
    message = refused("eval", sparse_folder, "--data", corpus, "--sequence-length", "129")
    assert "at most the model's 128" in message


def test_an_unknown_device_is_refused(refused, dense_folder):
    assert "'toaster'" in refused("generate", dense_folder, "prompt", "--device", "toaster")
    if not torch.cuda.is_available():
        assert "'cuda'" in refused("generate", dense_folder, "prompt", "--device", "cuda")


def test_a_missing_argument_is_a_usage_error(prunepath_command, corpus):
    result = prunepath_command("convert", "model", "--data", corpus)
    assert result.exit_code == 2
    assert "OUT" in result.stderr
    assert result.stdout == ""


def test_a_missing_native_library_is_one_sentence_that_says_how_to_get_it(dense_folder, corpus, tmp_path):
    package = Path(prunepath.__file__).parent
    shutil.copytree(
        package,
        tmp_path / "site" / "prunepath",
        ignore=shutil.ignore_patterns("_C.*", "_C_cuda.*", "__pycache__", "*.safetensors"),
    )
    result = subprocess.run(
        [sys.executable, "-m", "prunepath.cli", "convert", dense_folder, tmp_path / "out", "--data", corpus],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PRUNEPATH_BACKEND": "auto"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "_C is missing" in result.stderr.splitlines()[-1]
    assert "pip install" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
