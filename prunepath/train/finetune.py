"""Any-budget fine-tuning from texts: the whole recipe behind `prunepath train`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunepath.budgets import set_budget
from prunepath.checkpoint.description import description_of
from prunepath.config import FineTuning
from prunepath.conversion.batches import mean_loss
from prunepath.conversion.convert import calibrate
from prunepath.conversion.tokens import sample_windows
from prunepath.errors import PrunePathError
from prunepath.nn import for_inference
from prunepath.train.any_budget import AnyBudgetConfig, is_router

REPORTED_BUDGETS = (1.0, 0.5, 0.25, 0.1)
_HELD_OUT_TOKENS = 16384
_SETTINGS = "settings.json"


def finetune(
    model: nn.Module,
    tokenizer: Any | None,
    texts: Iterable,
    config: FineTuning | None = None,
    *,
    folder: str | os.PathLike,
    any_budget: AnyBudgetConfig | None = None,
    teacher: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    resume: bool = False,
    progress: bool = False,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Fine-tunes a sparse causal language model at budgets drawn at random, and calibrates its budgets anew.

    Under `accelerate launch` or `torchrun` all processes train one model together, and the first alone calibrates and
    measures it: `is_first_process` says which one has the result.

    Args:
        model: a sparse model, on the device to work on; changed in place.
        tokenizer: its tokenizer; None if `texts` are token ids.
        texts: training data, as for `prunepath.convert`. Some of it is held out to calibrate and to report on.
        config: see `FineTuning`.
        folder: where the state of the training is kept. Remove it when the result is safe.
        any_budget: which budgets are drawn.
        teacher: the dense model; None is `model` as it is now, with all its experts.
        dtype: what the trained model is cast to before it is calibrated; None leaves it as it is.
        resume: go on with the interrupted run in `folder`, if there is one.
        progress: show progress bars.

    Returns:
        The model, and for each budget of `REPORTED_BUDGETS` a dict of `budget`, `loss_before` and `loss_after`: mean
        nats a token on held-out windows.

    Raises:
        PrunePathError: a dense model or one of another kind, a GPU that is not the first, too little data, a missing
            package, or another run's state in `folder`.
    """
    config = config or FineTuning()
    sparsity = description_of(model).config
    _check_packages(config)
    _check_model(model)
    _windows_of_a_pass(config)
    folder = Path(folder)
    wanted = config.steps * config.batch_size * config.sequence_length
    held_out_tokens = _HELD_OUT_TOKENS + sparsity.calibration_tokens
    windows = sample_windows(texts, tokenizer, config.sequence_length, wanted + held_out_tokens, config.seed)
    length = windows.shape[1]
    # Of little data, a quarter is held out for each.
    report, calibration = (
        max(1, min(tokens // length, len(windows) // 4)) for tokens in (_HELD_OUT_TOKENS, sparsity.calibration_tokens)
    )
    held_out, calibrating, training = windows.split([report, calibration, len(windows) - report - calibration])

    before = []
    if is_first_process():
        _prepare_folder(folder, config, resume)
        before = _losses(model, held_out)
    trained = _prepare_backbone(model, config)
    _train(trained, training, config, folder, any_budget, teacher, progress)
    if config.backbone == "lora":
        model = for_inference(trained.merge_and_unload())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_router(name))
    model.eval()
    if not is_first_process():
        return model, []
    model.to(dtype)
    calibrate(model, None, list(calibrating), progress=progress)
    after = _losses(model, held_out)
    return model, [
        {"budget": budget, "loss_before": b, "loss_after": a}
        for budget, b, a in zip(REPORTED_BUDGETS, before, after, strict=True)
    ]


def is_first_process() -> bool:
    """Whether this process was started alone, or as the first by `accelerate launch` or `torchrun`."""
    return os.environ.get("RANK", "0") == "0"


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_model(model: nn.Module) -> None:
    from prunepath.train.trainer import predicts_next

    if not predicts_next(model):
        raise PrunePathError(
            f"Expected a causal language model to fine-tune on text, got {type(model).__name__}: train it on its own "
            "task with prunepath.train.trainer.AnyBudgetTrainer."
        )
    device = next(model.parameters()).device
    if device.type == "cuda" and device.index and _num_processes() == 1:
        raise PrunePathError(
            f"Expected a model on the first GPU, where transformers' Trainer trains, got {device}: choose the GPU with "
            "CUDA_VISIBLE_DEVICES."
        )


def _windows_of_a_pass(config: FineTuning) -> int:
    windows, rest = divmod(config.batch_size, _num_processes() * config.gradient_accumulation_steps)
    if rest:
        raise PrunePathError(
            f"batch_size must be a multiple of the {_num_processes()} processes times gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps}, got {config.batch_size}."
        )
    return windows


def _check_packages(config: FineTuning) -> None:
    for package in ("accelerate", *(("peft",) if config.backbone == "lora" else ())):
        try:
            __import__(package)
        except ImportError as error:
            raise PrunePathError(
                f"Expected the package {package}, which fine-tuning needs, but it cannot be imported: "
                "pip install 'prunepath[train]'."
            ) from error


def _prepare_folder(folder: Path, config: FineTuning, resume: bool) -> None:
    """Makes `folder`, or checks that the run in it had the same settings."""
    settings = json.dumps(dataclasses.asdict(config), indent=2)
    written = folder / _SETTINGS
    if not folder.exists():
        folder.mkdir(parents=True)
        written.write_text(settings, encoding="utf-8")
    elif not resume:
        raise PrunePathError(f"There is an interrupted run in {folder}: go on with resume (--resume), or remove it.")
    elif not written.is_file() or written.read_text(encoding="utf-8") != settings:
        raise PrunePathError(f"Expected the settings of the interrupted run, which {written} tells, to go on with it.")


def _prepare_backbone(model: nn.Module, config: FineTuning) -> nn.Module:
    """The model to train, with gradients for what is to learn beside the routers."""
    if config.backbone != "lora":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(config.backbone == "full" and not is_router(name))
        return model
    import peft

    torch.manual_seed(config.seed)  # of the low-rank updates' first weights
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            target_modules="all-linear",
            modules_to_save=["router"],
        ),
    )


def _train(
    model: nn.Module,
    windows: torch.Tensor,
    config: FineTuning,
    folder: Path,
    any_budget: AnyBudgetConfig | None,
    teacher: nn.Module | None,
    progress: bool,
) -> None:
    from transformers import TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from prunepath.train.trainer import AnyBudgetTrainer

    device = next(model.parameters()).device.type
    has_bfloat16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    trainer = AnyBudgetTrainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=config.steps,
            per_device_train_batch_size=_windows_of_a_pass(config),
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            gradient_checkpointing=config.gradient_checkpointing,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, config.steps // 20),
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=has_bfloat16,
            tf32=has_bfloat16 or None,  # of the routers, which compute in float32
            use_cpu=device == "cpu",
            ddp_backend="gloo" if device == "cpu" and _num_processes() > 1 else None,
            save_steps=config.save_steps,
            save_total_limit=1,
            report_to=[],
            seed=config.seed,
            disable_tqdm=not progress,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in windows],
        teacher=teacher,
        any_budget=any_budget,
        distillation_weight=config.distillation_weight,
        router_learning_rate=config.router_learning_rate,
    )
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None  # the first process makes the folder
    trainer.train(resume_from_checkpoint=checkpoint)


def _losses(model: nn.Module, windows: torch.Tensor) -> list[float]:
    """Mean loss at each of `REPORTED_BUDGETS`; the model is dense afterwards."""
    device = next(model.parameters()).device
    batches = [{"input_ids": part, "labels": part} for part in windows.to(device).split(4)]
    was_training = model.training
    model.eval()
    losses = []
    for budget in REPORTED_BUDGETS:
        set_budget(model, budget)
        losses.append(mean_loss(model, batches))
    set_budget(model, 1.0)
    model.train(was_training)
    return losses
