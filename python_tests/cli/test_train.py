"""`prunepath train`: fine-tunes a sparse checkpoint, goes on after an interruption, refuses what it cannot do."""

import json
import os
import subprocess
import sys

import pytest
import torch

import prunepath
from prunepath.train.finetune import FineTuning, finetune
from prunepath.train.trainer import AnyBudgetTrainer, is_router

OPTIONS = "--steps 4 --batch-size 2 --sequence-length 32".split()


def parameters(folder) -> dict[str, torch.Tensor]:
    model, _ = prunepath.load(folder)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("backbone", ["full", "lora", "frozen"])
def test_train_writes_an_ordinary_checkpoint(prunepath_command, sparse_folder, corpus, tmp_path, backbone):
    out = tmp_path / "trained"
    result = prunepath_command(
        "train", sparse_folder, out, "--data", corpus, *OPTIONS, "--backbone", backbone, "--json"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["budget"] for row in rows] == [1.0, 0.5, 0.25, 0.1]
    before, after = parameters(sparse_folder), parameters(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert any(map(is_router, changed))
    mlp = {name for name in before if ".mlp." in name and not is_router(name)}
    assert changed >= mlp if backbone != "frozen" else not changed & mlp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparse", "trained"]
    assert prunepath_command("eval", out, "--data", corpus, "--max-tokens", "200", "--json").exit_code == 0


def test_training_in_float32_keeps_the_checkpoint_s_dtype(prunepath_command, sparse_folder, corpus, tmp_path):
    model, tokenizer = prunepath.load(sparse_folder, dtype=torch.bfloat16)
    prunepath.save(model, tokenizer, tmp_path / "half")
    result = prunepath_command("train", tmp_path / "half", tmp_path / "out", "--data", corpus, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert {p.dtype for p in parameters(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.parametrize("backbone", ["full", "lora"])
def test_an_interrupted_run_goes_on(sparse_folder, corpus, tmp_path, monkeypatch, backbone):
    texts = corpus.read_text().splitlines()
    config = FineTuning(steps=6, batch_size=2, sequence_length=32, save_steps=3, learning_rate=1e-3, backbone=backbone)

    def run(folder, **options):
        model, tokenizer = prunepath.load(sparse_folder, dtype=torch.float32)
        return finetune(model, tokenizer, texts, config, folder=folder, **options)[0]

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        compute_loss, calls = AnyBudgetTrainer.compute_loss, []

        def interrupted(*arguments, **keywords):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return compute_loss(*arguments, **keywords)

        patch.setattr(AnyBudgetTrainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "part")
    assert (tmp_path / "part" / "checkpoint-3").is_dir()
    with pytest.raises(prunepath.PrunePathError, match="interrupted run"):
        run(tmp_path / "part")
    resumed = run(tmp_path / "part", resume=True)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_two_processes_write_one_checkpoint(sparse_folder, corpus, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    train = ["-m", "prunepath.cli", "train", str(sparse_folder), "trained", "--data", str(corpus), *OPTIONS, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run([*launch, *train], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(json.loads(result.stdout)["rows"]) == 4, "the first process alone says something"
    before, after = parameters(sparse_folder), parameters(tmp_path / "trained")
    assert [name for name in before if torch.equal(before[name].float(), after[name].float())] == []
    assert not (tmp_path / ".trained.training").exists()


def test_train_refuses_a_batch_that_processes_cannot_share(refused, sparse_folder, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    sentence = refused("train", sparse_folder, tmp_path / "out", "--data", corpus, *OPTIONS)
    assert "multiple of the 3 processes times gradient_accumulation_steps 1, got 2" in sentence


def test_a_step_may_take_several_passes(prunepath_command, refused, sparse_folder, corpus, tmp_path, monkeypatch):
    passes = []
    compute_loss = AnyBudgetTrainer.compute_loss

    def counting(trainer, model, inputs, *arguments, **keywords):
        if model.training:
            passes.append(len(inputs["input_ids"]))
        return compute_loss(trainer, model, inputs, *arguments, **keywords)

    monkeypatch.setattr(AnyBudgetTrainer, "compute_loss", counting)
    options = ["--data", corpus, *OPTIONS, "--gradient-accumulation-steps", "2", "--gradient-checkpointing"]
    options += ["--backbone", "lora", "--dtype", "bfloat16"]
    result = prunepath_command("train", sparse_folder, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert passes == [1] * 8
    refused("train", sparse_folder, tmp_path / "other", *options, "--batch-size", "3")


def test_fine_tuning_on_text_is_for_causal_models(sparse_folder, tmp_path):
    model, tokenizer = prunepath.load(sparse_folder)
    with pytest.raises(prunepath.PrunePathError, match=r"causal language model.*LlamaModel.*AnyBudgetTrainer"):
        model.model.config = model.config
        finetune(model.model, tokenizer, ["text"] * 99, folder=tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_train_refuses_a_dense_model(refused, dense_folder, corpus, tmp_path):
    sentence = refused("train", dense_folder, tmp_path / "out", "--data", corpus, *OPTIONS)
    assert "convert it first" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_train_refuses_a_learning_rate_of_zero(refused, sparse_folder, corpus, tmp_path):
    assert "learning_rate must be a finite number above 0, got 0.0" in refused(
        "train", sparse_folder, tmp_path / "out", "--data", corpus, "--learning-rate", "0"
    )
