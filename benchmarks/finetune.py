"""Times fine-tuning at any budget, and reads its memory, beside plain fine-tuning with the same distillation.

    python benchmarks/finetune.py --device cpu --model qwen2.5-0.5b --quick
    python benchmarks/finetune.py --device cuda --model qwen2.5-0.5b
    python benchmarks/finetune.py --device cuda --model llama-3-8b --lora-rank 16 --windows 16 --passes 8 \\
        --gradient-checkpointing

Both train a model of a real shape with random weights, the same ones, on the same random tokens, by transformers'
Trainer under bfloat16 autocast: the dense model with distillation from itself, and the sparse one by `AnyBudgetTrainer`
as `prunepath train` does. Before anything is timed the sparse model has to have the dense one's loss with all its
experts. Tokens/s are of the steps after the first two, whose budgets are drawn as ever. Memory is what torch had
allocated at most on the GPU, with weights, teacher, optimiser and activations.
"""

from __future__ import annotations

import argparse
import gc
import math
import tempfile
import time
from pathlib import Path

import torch
from common import machine, today
from decode import MODELS, TOLERANCES, build
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import prunepath
from prunepath.eval.files import write_json
from prunepath.train.any_budget import distillation_loss, is_router
from prunepath.train.trainer import AnyBudgetTrainer, dense_teacher, predicted_positions

WARM_UP_STEPS = 2


class Distilled(Trainer):
    """Plain fine-tuning: the model's own loss, and the divergence from a frozen teacher."""

    def __init__(self, model: nn.Module, arguments: TrainingArguments, *, teacher: nn.Module, **keywords) -> None:
        super().__init__(model, arguments, **keywords)
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher

    def compute_loss(self, model, inputs, return_outputs=False, **keywords):
        loss, outputs = super().compute_loss(model, inputs, True, **keywords)
        with torch.no_grad(), self.accelerator.autocast():
            logits = self.teacher(**inputs).logits
        positions = predicted_positions(self.teacher, inputs, outputs.logits)
        loss = loss + distillation_loss(outputs.logits, logits, positions)
        return (loss, outputs) if return_outputs else loss


class Clock(TrainerCallback):
    """When each step ended, once the device had done it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, arguments, state, control, **_) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def prepare(args: argparse.Namespace, *, sparse: bool) -> nn.Module:
    dtype = getattr(torch, args.dtype)
    config = prunepath.PrunePathConfig() if sparse else None
    return build(args.model, args.layers, dtype, torch.device(args.device), config)


def train(args: argparse.Namespace, model: nn.Module, windows: torch.Tensor) -> dict:
    """Trains a model, and measures that."""
    sparse = prunepath.is_sparse(model)
    cuda = args.device == "cuda"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not args.lora_rank and not is_router(name))
    # Before adapters surround the model, so that the teacher computes none.
    teacher = None if sparse else dense_teacher(model, share_frozen=True)
    if args.lora_rank:
        import peft

        kept = {"modules_to_save": ["router"]} if sparse else {}
        config = peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear", **kept)
        model = peft.get_peft_model(model, config)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.windows // args.passes,
            gradient_accumulation_steps=args.passes,
            gradient_checkpointing=args.gradient_checkpointing,
            learning_rate=1e-5,
            bf16=cuda,
            tf32=cuda or None,
            use_cpu=not cuda,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_nan_inf_filter=False,
        )
        data = {"train_dataset": [{"input_ids": row, "labels": row} for row in windows], "callbacks": [clock]}
        kind = AnyBudgetTrainer if sparse else Distilled
        trainer = kind(model, arguments, teacher=teacher, **data)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        mean_loss = trainer.train().training_loss
    if not math.isfinite(mean_loss):
        raise SystemExit(f"Expected a finite loss, got {mean_loss}.")
    steps = len(clock.ends) - WARM_UP_STEPS
    seconds = (clock.ends[-1] - clock.ends[WARM_UP_STEPS - 1]) / steps
    return {
        "model": args.model,
        "kind": "any budget" if sparse else "dense, distilled",
        "tokens_per_second": args.windows * args.length / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


@torch.no_grad()
def loss(model: nn.Module, window: torch.Tensor) -> float:
    return model(input_ids=window, labels=window).loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=list(MODELS), default="qwen2.5-0.5b", help="its shape; weights are random")
    parser.add_argument("--layers", type=int, help="of the model, fewer than it has")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights; bfloat16 with LoRA unless given")
    parser.add_argument("--lora-rank", type=int, default=0, help="0 trains all weights")
    parser.add_argument("--windows", type=int, default=16, help="of a step")
    parser.add_argument("--passes", type=int, default=1, help="a step's windows are divided into")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two layers, few tokens: to see that it runs")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.windows, args.passes, args.length, args.steps = 2, 2, 1, 32, 4
    if args.windows % args.passes or args.steps <= WARM_UP_STEPS:
        parser.error(f"expected --windows a multiple of --passes, and more than {WARM_UP_STEPS} --steps")
    args.dtype = args.dtype or ("bfloat16" if args.lora_rank else "float32")
    generator = torch.Generator().manual_seed(0)
    vocabulary = MODELS[args.model]["vocab_size"]
    windows = torch.randint(vocabulary, (args.windows * args.steps, args.length), generator=generator)

    rows, losses = [], []
    for sparse in (False, True):
        model = prepare(args, sparse=sparse)
        losses.append(loss(model, windows[:1].to(args.device)))
        if abs(losses[-1] - losses[0]) > TOLERANCES[args.dtype]:
            raise SystemExit(f"Expected the dense model's loss {losses[0]:.4f} of all experts, got {losses[-1]:.4f}.")
        rows.append(train(args, model, windows))
        print(rows[-1], flush=True)
        del model
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()

    console = Console(width=max(Console().width, 100))
    console.print(f"{machine(args.device)}, {today()}: {vars(args)}", highlight=False, soft_wrap=True)
    table = Table("model", "training", "tokens/s", "of plain", "GB at most")
    for row in rows:
        share_of_plain = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        memory = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
        table.add_row(row["model"], row["kind"], f"{row['tokens_per_second']:.0f}", f"{share_of_plain:.0%}", memory)
    console.print(table)
    if args.json:
        write_json(args.json, {"machine": machine(args.device), "date": today(), "rows": rows})


if __name__ == "__main__":
    main()
