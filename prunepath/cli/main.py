"""The `prunepath` command line: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import sys
import warnings
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prunepath.config import (
    AUTOCASTS,
    BACKBONES,
    BACKENDS,
    CONTRIBUTIONS,
    PARTITIONS,
    SHRINK_CRITERIA,
    PrunePathConfig,
)
from prunepath.errors import CheckpointError, PrunePathError

# torch and transformers take seconds to import: each command imports them once its arguments are known to be
# good.


class _Group(typer.core.TyperGroup):
    def invoke(self, ctx):
        """An expected error is one sentence and exit code 2, whichever command meets it."""
        try:
            return super().invoke(ctx)
        except PrunePathError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a language model's feed-forward networks into experts, and choose per token how many run.",
)

Partition = Enum("Partition", {name: name for name in PARTITIONS}, type=str)
Contribution = Enum("Contribution", {name: name for name in CONTRIBUTIONS}, type=str)
Autocast = Enum("Autocast", {name: name for name in AUTOCASTS}, type=str)
BackendName = Enum("BackendName", {name: name for name in BACKENDS}, type=str)
ShrinkCriterion = Enum("ShrinkCriterion", {name: name for name in SHRINK_CRITERIA}, type=str)
Backbone = Enum("Backbone", {name: name for name in BACKBONES}, type=str)
DType = Enum("DType", {name: name for name in ("auto", "float32", "bfloat16", "float16")}, type=str)

_defaults = PrunePathConfig()
_ADDED = (
    ".router.weight",
    ".router.bias",
    ".center",
    ".mean_output",
    ".removed_output",
)  # what conversion and packing add

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or Hugging Face hub name.")]
DataOption = Annotated[
    list[str],
    typer.Option(
        "--data",
        help="Text file, folder, JSONL file, or datasets name such as name:split; repeatable.",
    ),
]
TextColumnOption = Annotated[str, typer.Option(help="JSONL field or dataset column that holds the text.")]
DTypeOption = Annotated[DType, typer.Option(help="Load the weights in this dtype; auto: as they are stored.")]
DeviceOption = Annotated[str | None, typer.Option(help="Device to work on, such as cpu or cuda:0.")]
GPUExpertsOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Keep at most so much of the experts on the GPU, the rest in host memory: 4GiB."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunepath {_version('prunepath')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Holds the options that stand before a command."""


@app.command()
def convert(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the sparse checkpoint to; new or empty.")],
    data: DataOption,
    text_column: TextColumnOption = "text",
    num_experts: Annotated[
        int, typer.Option(min=1, help="Experts of every FFN; must divide its intermediate size.")
    ] = _defaults.num_experts,
    partition: Annotated[Partition, typer.Option(help="How neurons are grouped.")] = _defaults.partition,
    center: Annotated[
        bool | None,
        typer.Option(
            "--center/--no-center",
            help="Whether a skipped expert gives its mean instead of zero.",
            show_default="the better of both",
        ),
    ] = _defaults.center,
    min_experts: Annotated[int, typer.Option(min=1, help="Experts that run for every token.")] = _defaults.min_experts,
    max_experts: Annotated[
        int, typer.Option(min=0, help="Experts that run at most; 0 means all.")
    ] = _defaults.max_experts,
    seed: Annotated[int, typer.Option(help="Of the partition and the routers' first weights.")] = _defaults.seed,
    sequence_length: Annotated[
        int, typer.Option(min=1, help="Tokens of a calibration window.")
    ] = _defaults.sequence_length,
    partition_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that group the neurons.")
    ] = _defaults.partition_tokens,
    router_tokens: Annotated[int, typer.Option(min=1, help="Tokens that train the routers.")] = _defaults.router_tokens,
    router_learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of the routers.")
    ] = _defaults.router_learning_rate,
    calibration_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that turn budgets into thresholds.")
    ] = _defaults.calibration_tokens,
    contribution: Annotated[
        Contribution, typer.Option(help="What routers predict: shares of the FFN's output, or of what the loss minds.")
    ] = _defaults.contribution,
    autocast: Annotated[
        Autocast, typer.Option(help="Run the backbone in this precision while converting.")
    ] = _defaults.autocast,
    backend: Annotated[BackendName, typer.Option(help="What runs the sparse FFNs.")] = _defaults.backend,
    low_memory: Annotated[
        bool,
        typer.Option("--low-memory", help="Read one layer at a time, from file to file; a stopped run goes on."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")] = False,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a dense model sparse: partition its FFNs, train routers, calibrate budgets, write OUT."""
    from prunepath.checkpoint.folders import check_output_folder

    config = PrunePathConfig(
        num_experts=num_experts,
        partition=partition.value,
        center=center,
        min_experts=min_experts,
        max_experts=max_experts,
        seed=seed,
        sequence_length=sequence_length,
        partition_tokens=partition_tokens,
        router_tokens=router_tokens,
        router_learning_rate=router_learning_rate,
        calibration_tokens=calibration_tokens,
        contribution=contribution.value,
        autocast=autocast.value,
        backend=backend.value,
    )
    check_output_folder(out)
    if low_memory and (dtype is not DType.auto or device not in (None, "cpu")):
        raise PrunePathError("Expected neither --dtype nor --device with --low-memory, which works on the CPU.")
    texts = _texts(data, text_column)
    with _results(as_json) as results:
        prunepath = _import_prunepath()
        if low_memory:
            from prunepath.checkpoint.loading import load_tokenizer
            from prunepath.conversion.streaming import convert_streaming

            convert_streaming(model, out, load_tokenizer(model), texts, config, progress=True)
            _show_conversion(results, out, config)
            return
        dense, tokenizer = _load(prunepath, model, dtype, device)
        if prunepath.is_sparse(dense):
            raise PrunePathError(f"Expected a dense model to convert, but {model} is a PrunePath checkpoint already.")
        state = out.absolute().with_name(f".{out.name}.routers")
        if not resume:
            state.unlink(missing_ok=True)
        sparse = prunepath.convert(dense, tokenizer, texts, config, progress=True, state=state)
        prunepath.save(sparse, tokenizer, out)
        _show_conversion(results, out, config)


@app.command("eval")
def evaluate(
    model: ModelArgument,
    data: DataOption,
    budget: Annotated[
        str | None,
        typer.Option(help="Budgets in (0, 1], separated by commas.", show_default="1.0,0.5,0.25,0.1"),
    ] = None,
    threshold: Annotated[
        str | None, typer.Option(help="Thresholds in (0, 1] for all layers, separated by commas.")
    ] = None,
    text_column: TextColumnOption = "text",
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a window.", show_default="512, or the model's limit if less"),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after this many tokens.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of one forward pass.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw the trade-off curve into this picture.")] = None,
    gpu_experts: GPUExpertsOption = None,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity, bits per byte and active fraction on held-out text along the knob."""
    if budget is not None and threshold is not None:
        raise PrunePathError("Expected --budget or --threshold, got both.")
    budgets = None if budget is None else _fractions("budget", budget)
    thresholds = None if threshold is None else _fractions("threshold", threshold)
    if plot is not None and not plot.absolute().parent.is_dir():
        raise PrunePathError(f"The folder of the picture {plot} does not exist.")
    texts = _texts(data, text_column)
    with _results(as_json) as results:
        prunepath = _import_prunepath()
        from prunepath.eval.perplexity import evaluate as evaluate_dense
        from prunepath.eval.plots import plot_tradeoff
        from prunepath.eval.tradeoff import tradeoff

        loaded, tokenizer, cache = _load_offloaded(prunepath, model, dtype, device, gpu_experts)
        shared = dict(
            sequence_length=_window(loaded, sequence_length),
            max_tokens=max_tokens,
            batch_size=batch_size,
            progress=True,
        )
        if prunepath.is_sparse(loaded):
            if budgets is None and thresholds is None:
                budgets = [1.0, 0.5, 0.25, 0.1]
            rows = tradeoff(loaded, tokenizer, texts, budgets=budgets, thresholds=thresholds, **shared)
        elif budgets is not None or thresholds is not None:
            raise PrunePathError(f"{model} is a dense model, which has no budgets or thresholds: convert it first.")
        else:
            result = evaluate_dense(loaded, tokenizer, texts, **shared)
            rows = [
                {"budget": None, "threshold": None, "thresholds": [], "active_fraction": 1.0}
                | {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
                | {"tokens": result.tokens, "bytes": result.bytes}
                | {"tokens_per_second": None, "dense_tokens_per_second": None}
            ]
        if plot is not None:
            plot_tradeoff(rows, plot, title=model)
        memory = {} if cache is None else {"gpu_experts": _cache_fields(cache)}
        results.json({"model": model, "rows": rows, **memory})
        results.table(rows)
        results.fields(memory)


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    budget: Annotated[float | None, typer.Option(help="Active fraction to aim for, in (0, 1].")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Cumulative probability mass to cover, in (0, 1], in every layer.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many tokens; 0 means all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    report_memory: Annotated[
        bool, typer.Option("--report-memory", help="Also print resident, mapped and touched bytes.")
    ] = False,
    resident_experts: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Keep at most so much of a packed checkpoint's experts in memory: 4GiB, or all.",
            show_default="twice the --budget's share",
        ),
    ] = None,
    gpu_experts: GPUExpertsOption = None,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate text. Without --budget or --threshold the checkpoint's stored thresholds apply."""
    if budget is not None and threshold is not None:
        raise PrunePathError("Expected --budget or --threshold, got both.")
    for name, value in (("budget", budget), ("threshold", threshold), ("top_p", top_p)):
        if value is not None:
            _check_fraction(name, value)
    limit = None if resident_experts in (None, "all") else _size("resident-experts", resident_experts)
    if limit is not None and gpu_experts is not None:
        raise PrunePathError("Expected --resident-experts or --gpu-experts, got both.")
    with _results(as_json) as results:
        prunepath = _import_prunepath()
        import torch

        loaded, tokenizer, cache = _load_offloaded(prunepath, model, dtype, device, gpu_experts)
        sparse = prunepath.is_sparse(loaded)
        if not sparse and (budget is not None or threshold is not None):
            raise PrunePathError(f"{model} is a dense model, which has no budgets or thresholds: convert it first.")
        if budget is not None:
            prunepath.set_budget(loaded, budget)
        if threshold is not None:
            prunepath.set_threshold(loaded, threshold)
        if resident_experts is None and budget is not None:
            from prunepath.checkpoint.packing import resident_limit

            limit = resident_limit(loaded, budget)
            if limit is not None:
                results.note(f"Keeping {limit / 1e6:.1f} MB of experts in memory (--resident-experts).")
        if limit is not None:
            from prunepath.checkpoint.packing import limit_resident_experts

            limit_resident_experts(loaded, limit)
        inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
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
        active = counts.active_fraction if sparse else 1.0
        memory = {}
        if report_memory:
            from prunepath.eval.memory import report_memory as read_memory

            memory = {"memory": dataclasses.asdict(read_memory(loaded))}
        if cache is not None:
            memory["gpu_experts"] = _cache_fields(cache)
        results.json(
            {
                "prompt": prompt,
                "text": tokenizer.decode(ids[length:], skip_special_tokens=True),
                "new_tokens": len(ids) - length,
                "budget": budget,
                "thresholds": prunepath.get_thresholds(loaded) if sparse else None,
                "active_fraction": active,
                **memory,
            }
        )
        results.note(f"{len(ids) - length} tokens, {active:.1%} of FFN neurons active.")
        results.fields(memory)


@app.command()
def train(
    model: Annotated[str, typer.Argument(metavar="SPARSE", help="Sparse checkpoint folder or hub name.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write the trained checkpoint to; new or empty.")
    ],
    data: DataOption,
    text_column: TextColumnOption = "text",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a step, of all processes together.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the backbone.")] = 3e-4,
    router_learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of the routers.", show_default="3 times the backbone's")
    ] = None,
    backbone: Annotated[
        Backbone, typer.Option(help="What trains beside the routers: all weights, low-rank updates, or nothing.")
    ] = Backbone.full,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the low-rank updates.")] = 16,
    distill: Annotated[float, typer.Option(min=0, help="Weight of distillation from the teacher.")] = 1.0,
    teacher: Annotated[
        str | None, typer.Option(help="Dense model to learn from.", show_default="SPARSE with all its experts")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the data's order and the drawn budgets.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    dtype: Annotated[
        DType, typer.Option(help="Train the weights in this dtype; OUT has SPARSE's. auto: as they are stored.")
    ] = DType.float32,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a sparse model at random budgets, so that one checkpoint serves all of them, and write OUT."""
    import transformers

    from prunepath.checkpoint.folders import check_output_folder
    from prunepath.train.finetune import FineTuning, finetune, is_first_process

    config = FineTuning(
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        router_learning_rate=router_learning_rate,
        backbone=backbone.value,
        lora_rank=lora_rank,
        distillation_weight=distill,
        seed=seed,
    )
    out = check_output_folder(out)
    texts = _texts(data, text_column)
    with _results(as_json) as results:
        prunepath = _import_prunepath()
        loaded, tokenizer = _load(prunepath, model, dtype, device)
        if not prunepath.is_sparse(loaded):
            raise PrunePathError(f"Expected a sparse checkpoint to fine-tune, but {model} is dense: convert it first.")
        dense = None if teacher is None else _load(prunepath, teacher, dtype, device)[0]
        folder = out.absolute().parent / f".{out.name}.training"
        trained, rows = finetune(
            loaded,
            tokenizer,
            texts,
            config,
            folder=folder,
            teacher=dense,
            dtype=transformers.AutoConfig.from_pretrained(model).dtype,
            resume=resume,
            progress=True,
        )
        if not is_first_process():
            return
        prunepath.save(trained, tokenizer, out)
        shutil.rmtree(folder, ignore_errors=True)
        results.json({"model": model, "out": str(out), "rows": rows})
        results.table(rows)
        results.text(f"Wrote {out}.")
        results.text(f"Try: prunepath eval {out} --data {data[0]}")


@app.command()
def report(
    model: Annotated[str, typer.Argument(metavar="SPARSE", help="Sparse checkpoint folder or hub name.")],
    data: DataOption,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    budget: Annotated[str, typer.Option(help="Budgets in (0, 1], separated by commas.")] = "0.75,0.5,0.25,0.1",
    text_column: TextColumnOption = "text",
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a window.", show_default="512, or the model's limit if less"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Measure on this many tokens at most.")] = 16384,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of one forward pass.")] = 1,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show quality, experts per token, layers and tokens along the knob, on one HTML page that needs no network."""
    budgets = _fractions("budget", budget)
    if out.is_dir():
        raise PrunePathError(f"Expected --out to be a file to write the report to, but {out} is a folder.")
    if not out.absolute().parent.is_dir():
        raise PrunePathError(f"The folder of the report {out} does not exist.")
    texts = _texts(data, text_column)
    with _results(as_json) as results:
        prunepath = _import_prunepath()
        from prunepath.eval.report import measure, write_report

        loaded, tokenizer = _load(prunepath, model, dtype, device)
        numbers = measure(
            loaded,
            tokenizer,
            texts,
            name=model,
            budgets=budgets,
            sequence_length=_window(loaded, sequence_length),
            max_tokens=max_tokens,
            batch_size=batch_size,
            progress=True,
        )
        write_report(numbers, out)
        results.json(numbers)
        results.table(numbers["rows"])
        results.text(f"Wrote {out}.")


@app.command()
def pack(
    model: Annotated[Path, typer.Argument(metavar="SPARSE", help="Sparse checkpoint folder.")],
    out: Annotated[
        Path, typer.Argument(metavar="PACKED", help="Folder to write the packed checkpoint to; new or empty.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Write SPARSE anew so that its experts are used straight from the file, and only those that run."""
    from prunepath.checkpoint.folders import check_output_folder

    check_output_folder(out)
    with _results(as_json) as results:
        _import_prunepath()
        from prunepath.checkpoint.packing import pack as pack_checkpoint

        sizes = pack_checkpoint(model, out)
        results.json({"model": str(model), "out": str(out), **sizes})
        if not sizes["aligned"]:
            results.note("Experts are no whole pages: some come into memory with their neighbours.")
        results.text(f"Wrote {out}: {sizes['expert_bytes'] / 1e6:.1f} MB of experts.")
        results.text(f'Try: prunepath generate {out} "Once upon a time" --budget 0.25 --report-memory')


@app.command()
def shrink(
    model: Annotated[str, typer.Argument(metavar="SPARSE", help="Sparse checkpoint folder or hub name.")],
    out: Annotated[
        Path, typer.Argument(metavar="SMALLER", help="Folder to write the smaller checkpoint to; new or empty.")
    ],
    data: DataOption,
    budget: Annotated[float, typer.Option(help="Active fraction that the model is to be used at, in (0, 1].")] = 0.25,
    by: Annotated[
        ShrinkCriterion,
        typer.Option(help="What an expert's rate is: tokens that run it, or what it changes the loss by."),
    ] = ShrinkCriterion.loss,
    rate: Annotated[float | None, typer.Option(min=0, help="Remove experts below this rate, instead of:")] = None,
    max_rise: Annotated[
        float, typer.Option(min=0, help="The smallest model whose held-out loss rises by at most this part.")
    ] = 0.01,
    fold: Annotated[
        bool | None,
        typer.Option(
            "--fold/--no-fold",
            help="Whether a removed expert leaves its mean instead of zero.",
            show_default="where skipped ones do",
        ),
    ] = None,
    refit_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens on which the experts left take over what they can; 0 leaves their weights as they are.",
            show_default="65536",
        ),
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Fill FFNs with zeros to one width, for transformers without prunepath.")
    ] = False,
    text_column: TextColumnOption = "text",
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove the experts that a budget hardly uses, for good; show what that costs, then write SMALLER."""
    from prunepath.checkpoint.folders import check_output_folder

    _check_fraction("budget", budget)
    check_output_folder(out)
    texts = _texts(data, text_column)
    with _results(as_json) as results:
        prunepath = _import_prunepath()
        from prunepath.shrinking import REFIT_TOKENS, Plan

        from prunepath.checkpoint.description import description_of

        loaded, tokenizer = _load(prunepath, model, dtype, device)
        if not prunepath.is_sparse(loaded):
            raise PrunePathError(f"Expected a sparse checkpoint to shrink, but {model} is dense: convert it first.")
        if pad and (description_of(loaded).centered if fold is None else fold):
            raise PrunePathError("Expected --no-fold with --pad: a plain FFN has no place for folded means.")
        refit = REFIT_TOKENS if refit_tokens is None else refit_tokens
        plan = Plan(loaded, tokenizer, texts, budget, by=by.value, fold=fold, refit_tokens=refit, progress=True)
        chosen = plan.choose(rate=rate, max_rise=max_rise)
        rows = [
            {
                "rate": candidate.rate,
                "experts": sum(map(len, candidate.kept)),
                "ffn_share": candidate.share,
                "ffn_megabytes": candidate.ffn_bytes / 1e6,
                "loss": candidate.loss,
                "rise": candidate.rise,
                "chosen": candidate is chosen,
            }
            for candidate in plan.candidates
        ]
        results.table(rows)
        if len(plan.candidates) < 2 or chosen is plan.candidates[0]:
            results.json({"model": model, "out": None, "rows": rows})
            wanted = f"a rise of {max_rise:.1%}" if rate is None else f"a rate of {rate:g}"
            raise PrunePathError(
                f"Expected experts that can go within {wanted}, but there are none: nothing is written."
            )
        plan.apply(chosen, pad=pad, progress=True)
        prunepath.save(loaded, tokenizer, out)
        results.json({"model": model, "out": str(out), "rows": rows, "experts": [len(kept) for kept in chosen.kept]})
        results.text(f"Wrote {out}: {chosen.share:.1%} of the FFNs' bytes, {chosen.ffn_bytes / 1e6:.1f} MB.")
        results.text(f'Try: prunepath generate {out} "Once upon a time" --budget {budget:g}')


@app.command()
def info(
    out: Annotated[str | None, typer.Argument(metavar="[OUT]", help="Checkpoint folder to describe.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Describe this installation (versions, backends, CPU features, build), or a checkpoint."""
    with _results(as_json) as results:
        description = _installation() if out is None else _describe(out)
        results.json(description)
        results.fields(description)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, tradeoff.json and tradeoff.png.")] = Path(
        "prunepath-demo"
    ),
    as_json: JsonOption = False,
) -> None:
    """Convert the embedded model and show the trade-off; needs no network and at most a few minutes."""
    from prunepath.checkpoint.folders import check_output_folder

    try:
        check_output_folder(out)
    except PrunePathError as error:
        raise PrunePathError(f"{str(error).rstrip('.')}; remove it, or name another folder with --out.") from None
    with _results(as_json) as results:
        _import_prunepath()
        from prunepath.demo.run import run

        outcome = run(out, progress=results.note)
        results.json(outcome)
        results.table(outcome["rows"])
        for sample in outcome["samples"]:
            results.text(f"\nBudget {sample['budget']:g}:")
            results.text(sample["prompt"] + sample["text"])
        results.text(f"\nWrote the checkpoint, tradeoff.json and tradeoff.png to {out} in {outcome['seconds']:.0f} s.")
        results.text(f'Try: prunepath generate {out} "def main(" --budget 0.25')


def _show_conversion(results: _Results, out: Path, config: PrunePathConfig) -> None:
    summary = _describe(out)
    results.json(summary)
    results.routers(summary["calibration"]["routers"])
    results.text(f"Wrote {out}: {summary['layers']} FFNs of {config.num_experts} experts.")
    results.text(f'Try: prunepath generate {out} "Once upon a time" --budget 0.25')


class _Results:
    """Prints a command's results, either for people or as one JSON value, on the real standard output."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stdout = sys.stdout

    def json(self, value: object) -> None:
        if self.as_json:
            print(json.dumps(_finite(value), indent=2, allow_nan=False), file=self.stdout)

    def text(self, line: str) -> None:
        if not self.as_json:
            print(line, file=self.stdout, flush=True)

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def table(self, rows: list[dict]) -> None:
        if self.as_json:
            return
        from rich import box
        from rich.table import Table

        columns = {
            "budget": ("budget", "{:.2f}"),
            "threshold": ("threshold", "{:.3f}"),
            "active_fraction": ("active", "{:.1%}"),
            "perplexity": ("ppl", "{:.3f}"),
            "bits_per_byte": ("bits/byte", "{:.4f}"),
            "tokens_per_second": ("sparse tok/s", "{:.1f}"),
            "dense_tokens_per_second": ("dense tok/s", "{:.1f}"),
            "rate": ("rate", "{:.4f}"),
            "experts": ("experts", "{}"),
            "ffn_share": ("FFN bytes", "{:.1%}"),
            "ffn_megabytes": ("MB", "{:.1f}"),
            "loss": ("loss", "{:.4f}"),
            "rise": ("rise", "{:+.2%}"),
            "loss_before": ("loss before", "{:.4f}"),
            "loss_after": ("after", "{:.4f}"),
        }
        columns = {name: column for name, column in columns.items() if any(row.get(name) is not None for row in rows)}
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # fits in 80 columns
        for title, _ in columns.values():
            table.add_column(title, justify="right")
        for row in rows:
            cells = (form.format(row[name]) if row[name] is not None else "-" for name, (_, form) in columns.items())
            table.add_row(*cells)
        Console(file=self.stdout).print(table)

    def routers(self, rows: list[dict]) -> None:
        """How well each FFN's router predicts."""
        if self.as_json:
            return
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for title in ("FFN", "router KL (nats)", "recall at 25 %"):
            table.add_column(title, justify="right")
        for index, row in enumerate(rows):
            table.add_row(str(index), f"{row['kl']:.4f}", f"{row['recall']:.1%}")
        Console(file=self.stdout).print(table)

    def fields(self, value: dict) -> None:
        if self.as_json:
            return
        for name, field in value.items():
            if isinstance(field, dict):
                self.text(f"{name}:")
                for key, entry in field.items():
                    self.text(f"  {key}: {_plain(entry)}")
            else:
                self.text(f"{name}: {_plain(field)}")

    def streamer(self, tokenizer):
        """Prints generated text as it comes; None with --json."""
        if self.as_json:
            return None
        from transformers import TextStreamer

        results = self

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                print(text, end="\n" if stream_end else "", file=results.stdout, flush=True)

        return Streamer(tokenizer, skip_prompt=False, skip_special_tokens=True)


@contextlib.contextmanager
def _results(as_json: bool) -> Iterator[_Results]:
    results = _Results(as_json)
    # Whatever a library prints is not a result.
    with contextlib.redirect_stdout(sys.stderr):
        yield results


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(entry) for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _finite(value: object) -> object:
    """JSON has no infinity (the perplexity of a ruined model) and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise PrunePathError(f"{name} must be in (0, 1], got {value:g}.")


def _fractions(name: str, text: str) -> list[float]:
    values = []
    for part in text.split(","):
        try:
            values.append(float(part))
        except ValueError:
            raise PrunePathError(
                f"{name} must be numbers in (0, 1] separated by commas, got {part.strip()!r} in {text!r}."
            ) from None
        _check_fraction(name, values[-1])
    return values


def _size(name: str, text: str) -> int:
    """Bytes of a size such as 4GiB, 500MB or 1048576."""
    units = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
    units |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    try:
        size = float(number) * units[text.strip()[len(number) :].lower()]
        if not 0 < size < 1 << 62:
            raise ValueError
    except (ValueError, KeyError):
        raise PrunePathError(f"{name} must be a size such as 4GiB or 500MB, got {text!r}.") from None
    return int(size)


def _window(model, sequence_length: int | None) -> int:
    """The tokens of an evaluation window: those asked for, or 512, if the model takes so many."""
    limit = getattr(model.config, "max_position_embeddings", None) or 512
    if sequence_length is not None and sequence_length > limit:
        raise PrunePathError(f"sequence_length must be at most the model's {limit}, got {sequence_length}.")
    return sequence_length or min(512, limit)


def _texts(data: list[str], text_column: str):
    from prunepath.data import load_texts

    return load_texts(data, text_column=text_column)


def _import_prunepath():
    """The Python interface, with transformers kept from talking over the results."""
    import transformers

    import prunepath

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return prunepath


def _load(prunepath, name: str, dtype: DType, device: str | None):
    if device is not None:
        _check_device(device)
    return prunepath.load(name, dtype=dtype.value, device=device)


def _load_offloaded(prunepath, name: str, dtype: DType, device: str | None, gpu_experts: str | None):
    """(model, tokenizer, cache), the cache None unless experts are to be kept on a GPU."""
    if gpu_experts is None:
        return *_load(prunepath, name, dtype, device), None
    from prunepath.memory.offload import offload_experts

    size, device = _size("gpu-experts", gpu_experts), device or "cuda"
    if device.partition(":")[0] == "cpu":
        raise PrunePathError("Expected a GPU to hold experts for --gpu-experts, got --device cpu.")
    _check_device(device)
    loaded, tokenizer = _load(prunepath, name, dtype, None)
    return loaded, tokenizer, offload_experts(loaded, size, device)


def _cache_fields(cache) -> dict:
    return {"slots": cache.slots, **dataclasses.asdict(cache.statistics), "hit_rate": cache.statistics.hit_rate}


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    # torch raises RuntimeError or AssertionError, as the device is unknown or its driver is missing.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise PrunePathError(f"The device {device!r} cannot be used: {reason}.") from error


def _installation() -> dict:
    import platform

    import torch

    from prunepath import native, ops

    try:
        from prunepath import _host
    except ImportError as error:
        build, features = {"missing": str(error)}, {}
    else:
        build, features = _host.build_info(), _host.cpu_features()
    return {
        "prunepath": _version("prunepath"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "libraries": {"_C": native.error() or "loaded", "_C_cuda": native.cuda_error() or "loaded"},
        "backends": ops.backends(),
        "cpu_kernel": ops.cpu_kernel() if ops.backends()["cpu"] == "available" else None,
        "cpu_features": features,
        "build": build,
    }


def _describe(path: str | Path) -> dict:
    """A checkpoint as its folder tells it, without loading the weights."""
    from safetensors import SafetensorError, safe_open

    from prunepath.checkpoint.description import QUANT_METHOD, SparseDescription
    from prunepath.checkpoint.loading import read_model_config

    folder = Path(path)
    config = read_model_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"Expected weights in {folder}, but it has no .safetensors file.")
    weights, added, packed = 0, 0, False
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                packed = packed or (tensors.metadata() or {}).get("prunepath") == "experts"
                for name in tensors.keys():
                    if name.startswith("padding."):
                        continue
                    size = math.prod(tensors.get_slice(name).get_shape())
                    weights += size
                    added += size if name.endswith(_ADDED) else 0
        except SafetensorError as error:
            raise CheckpointError(f"Expected {file} to be a whole safetensors file, but: {error}.") from error
    description = {
        "path": str(folder),
        "architecture": ", ".join(config.get("architectures") or ["unknown"]),
        "family": config.get("model_type"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "parameters": weights,
        "megabytes": sum(file.stat().st_size for file in files) / 1e6,
        "sparse": False,
    }
    sparsity = config.get("quantization_config")
    if not isinstance(sparsity, dict) or sparsity.get("quant_method") != QUANT_METHOD:
        return description
    sparse = SparseDescription.from_dict(sparsity)
    return description | {
        "sparse": True,
        "format_version": sparsity["format_version"],
        "layers": len(sparse.ffns),
        "added_parameters": added,
        "centered": sparse.centered,
        "packed": packed,
        "shrinking": None if sparse.shrinking is None else dataclasses.asdict(sparse.shrinking),
        "conversion": dataclasses.asdict(sparse.config),
        "calibration": sparse.calibration,
        "thresholds": sparse.thresholds,
        "budgets": {f"{budget:g}": values for budget, values in sorted(sparse.budgets.items(), reverse=True)},
    }


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Entry point of the `prunepath` command."""
    warnings.showwarning = lambda message, *rest, **more: typer.echo(f"Warning: {message}", err=True)
    app()


if __name__ == "__main__":
    main()
