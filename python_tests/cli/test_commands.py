"""What each command does with good input, and that --json means JSON alone."""

import dataclasses
import importlib.metadata
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunepath
from prunepath.cli.app import app
from prunepath.config import FineTuning
from prunepath.ops import backend


def options(*values):
    return [str(value) for value in values]


CONVERT = options("--num-experts", 8, "--sequence-length", 32, "--partition-tokens", 256) + options(
    "--router-tokens", 512, "--calibration-tokens", 256
)


def test_convert_writes_a_checkpoint_that_loads_sparse_with_its_options(
    prunepath_command, dense_folder, corpus, tmp_path
):
    out = tmp_path / "deep" / "out"
    result = prunepath_command(
        "convert", dense_folder, out, "--data", corpus, *CONVERT, "--partition", "random", "--seed", 3
    )
    assert result.exit_code == 0, result.output
    assert str(out) in result.stdout
    model = AutoModelForCausalLM.from_pretrained(out)
    assert prunepath.is_sparse(model)
    config = model.config.quantization_config["config"]
    assert (config["num_experts"], config["partition"], config["seed"]) == (8, "random", 3)
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_a_conversion_goes_on_only_if_asked_to(prunepath_command, dense_folder, corpus, tmp_path):
    out, state = tmp_path / "out", tmp_path / ".out.routers"
    state.write_bytes(b"of another conversion")
    result = prunepath_command("convert", dense_folder, out, "--data", corpus, *CONVERT, "--resume")
    assert result.exit_code == 2 and "interrupted conversion" in result.output
    result = prunepath_command("convert", dense_folder, out, "--data", corpus, *CONVERT)
    assert result.exit_code == 0, result.output
    assert {entry.name for entry in tmp_path.iterdir()} == {"dense", "out"}


def test_experts_have_one_neuron_and_routers_the_rank_that_is_asked_for(
    prunepath_command, dense_folder, corpus, tmp_path
):
    out = tmp_path / "out"
    options = ["--router-rank", 4, *CONVERT[2:]]
    result = prunepath_command("convert", dense_folder, out, "--data", corpus, *options)
    assert result.exit_code == 0, result.output
    for ffn in prunepath.sparse_ffns(AutoModelForCausalLM.from_pretrained(out)).values():
        assert (ffn.expert_width, ffn.router.rank) == (1, 4)
    dense, sparse = load_file(dense_folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(dense[name], sparse[name]) for name in dense)


@pytest.mark.parametrize(("command", "kind"), [("convert", prunepath.PrunePathConfig), ("train", FineTuning)])
def test_every_field_of_a_configuration_is_an_option_with_its_default(command, kind):
    from typer.main import get_command

    parameters = {parameter.name: parameter for parameter in get_command(app).commands[command].params}
    for field in dataclasses.fields(kind):
        assert parameters[field.name].default == field.default, field.name
        assert parameters[field.name].help, field.name


@pytest.mark.parametrize("command", ["convert", "train", "eval", "report", "generate", "pack", "info", "demo"])
def test_every_command_explains_itself(prunepath_command, command):
    result = prunepath_command(command, "--help")
    assert result.exit_code == 0
    assert f"{command} [OPTIONS]" in result.stdout
    assert "--json" in result.stdout
    assert "`" not in result.stdout


def test_a_backend_is_of_the_process_and_not_of_the_checkpoint(
    prunepath_command, refused, sparse_folder, dense_folder, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(backend, "_chosen", backend._chosen)
    if not torch.cuda.is_available():
        assert "cuda" in refused("generate", sparse_folder, "Bird", "--backend", "cuda")
    out = tmp_path / "out"
    result = prunepath_command("convert", dense_folder, out, "--data", corpus, *CONVERT, "--backend", "reference")
    assert result.exit_code == 0, result.output
    assert backend._chosen == "reference"
    assert "backend" not in (out / "config.json").read_text()


def test_eval_prints_a_table_of_budgets(prunepath_command, sparse_folder, corpus):
    result = prunepath_command("eval", sparse_folder, "--data", corpus, "--budget", "1.0,0.5", "--max-tokens", 200)
    assert result.exit_code == 0, result.output
    for word in ("budget", "threshold", "active", "read", "ppl", "bits/byte", "1.00", "0.50", "100.0%"):
        assert word in result.stdout


def test_eval_at_budget_1_is_the_dense_model_and_falls_towards_small_budgets(
    prunepath_command, sparse_folder, dense_folder, corpus
):
    common = options("--data", corpus, "--max-tokens", 500, "--json")
    result = prunepath_command("eval", sparse_folder, *common)
    rows = json.loads(result.stdout)["rows"]
    assert [row["budget"] for row in rows] == [1.0, 0.5, 0.25, 0.1]
    dense = json.loads(prunepath_command("eval", dense_folder, *common).stdout)["rows"]
    assert len(dense) == 1
    assert dense[0]["tokens"] == rows[0]["tokens"] == 500
    assert rows[0]["bits_per_byte"] == pytest.approx(dense[0]["bits_per_byte"], abs=1e-5)
    fractions = [row["active_fraction"] for row in rows]
    assert fractions[0] == 1.0
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[-1] < 0.3
    assert all(row["read_fraction"] > row["active_fraction"] for row in rows), "routers are read too"
    assert dense[0]["read_fraction"] == 1.0


def test_eval_with_thresholds_and_a_plot(prunepath_command, sparse_folder, corpus, tmp_path):
    plot = tmp_path / "curve.png"
    arguments = options("--threshold", "1.0,0.8", "--max-tokens", 100, "--plot", plot, "--json")
    result = prunepath_command("eval", sparse_folder, "--data", corpus, *arguments)
    rows = json.loads(result.stdout)["rows"]
    assert [row["thresholds"] for row in rows] == [[1.0, 1.0], [0.8, 0.8]]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_generate_prints_prompt_and_continuation(prunepath_command, sparse_folder, dense_folder):
    result = prunepath_command("generate", sparse_folder, "Bird", "--budget", 1.0, "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Bird")
    dense = prunepath_command("generate", dense_folder, "Bird", "--max-new-tokens", 8)
    assert result.stdout == dense.stdout


def test_generate_samples_by_seed_and_reports_its_knob(prunepath_command, sparse_folder):
    def sample(seed, *knob):
        result = prunepath_command(
            "generate", sparse_folder, "Bird", *knob, "--temperature", 1.5, "--seed", seed, "--json"
        )
        return json.loads(result.stdout)

    first = sample(1, "--threshold", 0.5)
    assert first == sample(1, "--threshold", 0.5)
    assert first["text"] != sample(2, "--threshold", 0.5)["text"]
    assert first["thresholds"] == [0.5, 0.5]
    assert 0 < first["active_fraction"] < 1
    assert first["active_fraction"] < first["read_fraction"]


def test_info_describes_a_checkpoint(prunepath_command, sparse_folder, dense_folder):
    found = json.loads(prunepath_command("info", sparse_folder, "--json").stdout)
    assert (found["family"], found["layers"], found["sparse"]) == ("llama", 2, True)
    assert found["conversion"]["num_experts"] == 8
    assert len(found["thresholds"]) == 2
    assert "0.5" in found["budgets"]
    dense = json.loads(prunepath_command("info", dense_folder, "--json").stdout)
    assert dense["sparse"] is False
    assert found["parameters"] - found["router_parameters"] == dense["parameters"]
    text = prunepath_command("info", sparse_folder).stdout
    assert "num_experts: 8" in text


def test_info_describes_the_installation(prunepath_command):
    found = json.loads(prunepath_command("info", "--json").stdout)
    assert set(found["backends"]) == {"cpu", "cuda", "triton", "reference"}
    assert found["libraries"]["_C"] == "loaded"
    assert found["build"]["compiler"]
    assert found["cpu_features"]


def test_the_version_is_the_packages(prunepath_command):
    result = prunepath_command("--version")
    assert result.stdout == f"prunepath {prunepath.__version__}\n"
    try:
        installed = importlib.metadata.version("prunepath")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == prunepath.__version__


def test_a_real_process_prints_json_alone_on_standard_output(sparse_folder, corpus, tmp_path):
    command = [sys.executable, "-m", "prunepath.cli", "eval", str(sparse_folder), "--data", str(corpus)]
    command += ["--max-tokens", "50", "--budget", "0.5", "--json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["rows"][0]["tokens"] == 50
    assert "Traceback" not in result.stderr


def test_an_interrupt_while_saving_leaves_a_state_to_go_on_from(
    prunepath_command, dense_folder, corpus, tmp_path, monkeypatch
):
    from transformers import PreTrainedTokenizerFast

    def interrupt(self, folder, **kwargs):
        assert any(folder.iterdir()), "the model is written by now"
        raise KeyboardInterrupt

    arguments = ("convert", dense_folder, tmp_path / "out", "--data", corpus, *CONVERT)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupt)
        result = prunepath_command(*arguments)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Interrupted."
    assert {entry.name for entry in tmp_path.iterdir()} == {"dense", ".out.routers"}
    result = prunepath_command(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert {entry.name for entry in tmp_path.iterdir()} == {"dense", "out"}


def test_an_interrupt_at_any_moment_of_the_start_is_one_line(tmp_path):
    command = [sys.executable, "-c", "from prunepath.cli import main; print(flush=True); main()"]
    interrupted = 0
    # Most of these come while torch is imported, and some of them while its C++ imports.
    for delay in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0):
        process = subprocess.Popen([*command, "info"], cwd=tmp_path, stdout=-1, stderr=-1, text=True)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
        assert "Traceback" not in errors
        if not output:  # else it was done before
            interrupted += 1
            assert process.returncode == 130, errors
            assert errors.splitlines()[-1:] == ["Interrupted."]
    assert interrupted
