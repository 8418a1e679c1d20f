"""Several processes: any-budget training under DDP, a plain Trainer with gradient checkpointing, and FSDP2."""

import os
import subprocess
import sys

import pytest
import torch

_SCRIPT = """
import copy, sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments
import prunepath
from prunepath.train.any_budget import AnyBudget, AnyBudgetConfig
from prunepath.train.trainer import AnyBudgetTrainer

torch.set_num_threads(1)
folder = sys.argv[1]
sparse, rows = torch.load(f"{folder}/model.pt", weights_only=False)
dataset = [{"input_ids": row, "labels": row} for row in rows]
results = {}


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def arguments(**more):
    return TrainingArguments(output_dir=folder, use_cpu=True, ddp_backend="gloo", max_steps=3, report_to=[],
                             per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no", **more)


for name, kind, more in (
    ("any_budget", AnyBudgetTrainer, {}),
    ("any_budget_checkpointed", AnyBudgetTrainer, {"gradient_checkpointing": True}),
    ("plain_checkpointed", Trainer, {"gradient_checkpointing": True, "ddp_find_unused_parameters": False}),
):
    model = copy.deepcopy(sparse)
    kind(model, arguments(**more), train_dataset=dataset).train()
    results[name] = parameters(sparse), parameters(model)


def losses(evaluate, draw):
    model = prunepath.for_training(copy.deepcopy(sparse))
    prunepath.set_threshold(model, 0.9)
    any_budget = AnyBudget(model, AnyBudgetConfig(dense_share=0.0), seed=1)
    if draw:
        any_budget.attach()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    values = []
    for step in range(4):
        batch = rows[8 * step + 4 * dist.get_rank() :][:4]
        any_budget.draw()
        model.train()
        loss = model(input_ids=batch, labels=batch).loss
        if draw:
            loss = loss + any_budget.router_loss()
        values.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(input_ids=batch)
                model(input_ids=batch[:, :1])
    return values


for draw in (False, True):
    results[f"fsdp2_{draw}"] = losses(False, draw), losses(True, draw)
torch.save(results, f"{folder}/rank{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory, make_sparse, windows):
    """What each of two processes has found, by the name of the case."""
    folder = tmp_path_factory.mktemp("processes")
    model = make_sparse("llama", router_rank=8).requires_grad_(True)
    for ffn in model.modules():
        if hasattr(ffn, "router"):
            ffn.router.requires_grad_(False)
    torch.save((model, windows(64, 2)), folder / "model.pt")
    script = folder / "train.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    result = subprocess.run(
        [*command, str(script), str(folder)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", ["any_budget", "any_budget_checkpointed", "plain_checkpointed"])
def test_two_processes_train_one_model(results, case):
    (start0, end0), (start1, end1) = (each[case] for each in results)
    assert torch.equal(start0, start1) and torch.equal(end0, end1)
    assert not torch.equal(start0, end0)


def test_gradient_checkpointing_under_ddp_changes_nothing(results):
    torch.testing.assert_close(results[0]["any_budget_checkpointed"], results[0]["any_budget"])


@pytest.mark.parametrize("any_budget", [False, True])
def test_an_evaluation_leaves_training_under_fsdp2_as_it_is(results, any_budget):
    for each in results:
        plain, evaluated = each[f"fsdp2_{any_budget}"]
        assert plain == evaluated
        assert plain[-1] < plain[0]
