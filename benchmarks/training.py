"""One harness for all methods: install, fine-tune, calibrate, evaluate, with the same data, steps and loss."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from baselines.base import Method, Settings
from tasks.base import Task
from tasks.models import warm_cosine
from torch import nn

from prunepath.nn.observers import padding_masks
from prunepath.train.any_budget import distillation_loss

DISTILLATION_WEIGHT = 1.0
ROUTER_RATE = 3.0
INSTALL_TOKENS = 65536
CALIBRATION_EXAMPLES = 96
_GENERATION_BATCH = 1152


def install(method_type: type[Method], dense: nn.Module, task: Task, settings: Settings, budget: float | None):
    """A method on a copy of the dense model, fitted on training data."""
    method = method_type(copy.deepcopy(dense), settings, budget)
    per_batch = max(1, min(32, task.count("train") // 4))
    wanted = max(4, INSTALL_TOKENS // (per_batch * task.splits["train"]["input_ids"].shape[1]))
    wanted = min(wanted, task.count("train") // per_batch)
    draws = task.random_batches(per_batch, settings.seed)
    method.install([next(draws) for _ in range(max(1, wanted))])
    return method


def finetune(
    method: Method, teacher: nn.Module, task: Task, *, steps: int, batch_size: int, rate: float, seed: int
) -> None:
    """Trains all of the method's parameters, the routers at `ROUTER_RATE` times the learning rate.

    The loss, for every method: the task's, plus distillation from the dense model that it started from, plus the
    method's own. On a GPU the student trains under autocast; `teacher` runs in its own dtype.
    """
    torch.manual_seed(seed)  # dropout
    model = method.model
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = method.trainable_parameters()
    routers = [p for p in parameters if _is_router(names.get(id(p), "router"))]
    backbone = [p for p in parameters if not _is_router(names.get(id(p), "router"))]
    cuda = parameters[0].is_cuda
    groups = [{"params": backbone, "lr": rate}, {"params": routers, "lr": ROUTER_RATE * rate}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=(0.9, 0.95), weight_decay=0.1, fused=cuda
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    batches = task.random_batches(batch_size, seed + 1000)
    model.train()
    with padding_masks(model):
        for step in range(steps):
            batch = next(batches)
            method.before_step(step / steps)
            with torch.no_grad():
                target = teacher(**task.inputs(batch)).logits
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
                outputs = model(**batch)
            loss = outputs.loss + method.auxiliary_loss()
            positions = task.scored_positions(batch["labels"])
            loss = loss + DISTILLATION_WEIGHT * distillation_loss(outputs.logits, target, positions)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def _is_router(name: str) -> bool:
    return "router" in name or "predictor" in name


def calibrate(method: Method, task: Task, batch_size: int) -> None:
    with torch.no_grad(), padding_masks(method.model):
        method.model.eval()
        method.calibrate(list(task.batches("validation", batch_size, CALIBRATION_EXAMPLES)))


@torch.no_grad()
def evaluate(
    method: Method,
    task: Task,
    split: str,
    budget: float,
    *,
    tokenizer=None,
    limit: int | None = None,
    calibrated: bool = True,
) -> dict:
    """Scores of each example at a budget, which each batch has thresholds of its own for where `calibrated` is false.

    Returns:
        `active_fraction`, `per_layer`, with experts `experts_per_token` (how many tokens ran 0, 1, … experts, over all
        FFNs), `nll` (nats of each example's labels), for `accuracy` also `correct`, and for
        `rouge_l` on the test split also `predictions`; `loss`, the mean nats a label.
    """
    model = method.model.eval()
    (method.set_budget if calibrated else method.set_batch_budget)(budget)
    result: dict[str, Any] = {"nll": [], "correct": [], "predictions": []}
    counts = torch.zeros((), dtype=torch.int64)
    with padding_masks(model):
        for batch in task.batches(split, 64, limit):
            logits = model(**task.inputs(batch)).logits
            labels = batch["labels"]
            result["nll"].append(task.losses(logits, labels))
            positions = task.scored_positions(labels)
            counts = counts + (len(labels) if positions is None else positions.sum())
            if task.metric == "accuracy":
                result["correct"].append((logits.argmax(-1) == labels).int())
        result["active_fraction"] = method.active_fraction()
        result["per_layer"] = method.per_layer()
        if method.counts is not None:
            result["experts_per_token"] = torch.stack(method.counts.histogram).sum(0).tolist()
        if task.metric == "rouge_l" and split == "test" and tokenizer is not None:
            for batch in task.batches(split, _GENERATION_BATCH, limit):
                ids = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=31,
                    do_sample=False,
                )
                result["predictions"] += tokenizer.batch_decode(
                    ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
    result["nll"] = [round(value, 3) for value in torch.cat(result["nll"]).tolist()]
    result["correct"] = torch.cat(result["correct"]).tolist() if result["correct"] else []
    result["loss"] = math.fsum(result["nll"]) / int(counts)
    return result
