from __future__ import annotations

import contextlib
import dataclasses
from typing import Annotated

import typer

from prunepath.cli.common import (
    GPUExpertsOption,
    JsonOption,
    ModelArgument,
    ModelOptions,
    check_fraction,
    import_prunepath,
)
from prunepath.cli.results import printing
from prunepath.errors import PrunePathError


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to go on from.")],
    options: ModelOptions,
    budget: Annotated[float | None, typer.Option(help="Active fraction to aim for, in (0, 1].")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Cumulative probability mass to cover, in (0, 1], in every layer.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many tokens; 0 means all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    report_memory: Annotated[
        bool, typer.Option("--report-memory", help="Also print resident, mapped and touched bytes.")
    ] = False,
    gpu_experts: GPUExpertsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate text.

    Without --budget or --threshold the checkpoint's stored thresholds apply.
    """
    if budget is not None and threshold is not None:
        raise PrunePathError("Expected --budget or --threshold, got both.")
    for name, value in (("budget", budget), ("threshold", threshold), ("top_p", top_p)):
        if value is not None:
            check_fraction(name, value)
    if temperature < 0:
        raise PrunePathError(f"temperature must be at least 0, got {temperature:g}.")
    with printing(as_json) as results:
        prunepath = import_prunepath()
        import torch

        loaded, tokenizer, offloading = options.load_offloaded(model, gpu_experts)
        sparse = prunepath.is_sparse(loaded)
        if not sparse and (budget is not None or threshold is not None):
            raise PrunePathError(f"{model} is a dense model, which has no budgets or thresholds: convert it first.")
        if budget is not None:
            prunepath.set_budget(loaded, budget)
        if threshold is not None:
            prunepath.set_threshold(loaded, threshold)
        inputs = tokenizer(prompt, return_tensors="pt", return_attention_mask=True).to(loaded.device)
        length = inputs["input_ids"].shape[1]
        if length == 0:
            raise PrunePathError("Expected a prompt of at least one token, got an empty one.")
        sampling = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k) if temperature else {}
        torch.manual_seed(seed)
        with prunepath.record_counts(loaded) if sparse else contextlib.nullcontext() as counts:
            ids = loaded.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                streamer=results.streamer(tokenizer),
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **(sampling or {"do_sample": False}),
            )[0]
        active, read = (counts.active_fraction, counts.read_fraction) if sparse else (1.0, 1.0)
        memory = {}
        if report_memory:
            from prunepath.eval.memory import report_memory as read_memory

            memory = {"memory": dataclasses.asdict(read_memory(loaded))}
        if offloading is not None:
            memory["gpu_experts"] = dataclasses.asdict(offloading)
        results.json(
            {
                "prompt": prompt,
                "text": tokenizer.decode(ids[length:], skip_special_tokens=True),
                "new_tokens": len(ids) - length,
                "budget": budget,
                "thresholds": prunepath.get_thresholds(loaded) if sparse else None,
                "active_fraction": active,
                "read_fraction": read,
                **memory,
            }
        )
        results.note(f"{len(ids) - length} tokens: {active:.1%} of FFN neurons active, {read:.1%} of FFN bytes read.")
        results.fields(memory)
