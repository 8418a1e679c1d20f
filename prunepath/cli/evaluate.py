from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from prunepath.cli.common import (
    BatchSizeOption,
    GPUExpertsOption,
    JsonOption,
    ModelArgument,
    ModelOptions,
    SequenceLengthOption,
    TextOptions,
    check_picture,
    import_prunepath,
    parse_fractions,
    sleep_while_waiting,
    window_length,
)
from prunepath.cli.results import printing
from prunepath.errors import PrunePathError


def evaluate(
    model: ModelArgument,
    texts: TextOptions,
    options: ModelOptions,
    budget: Annotated[
        str | None,
        typer.Option(help="Budgets in (0, 1], separated by commas.", show_default="1.0,0.5,0.25,0.1"),
    ] = None,
    threshold: Annotated[
        str | None, typer.Option(help="Thresholds in (0, 1] for all layers, separated by commas.")
    ] = None,
    sequence_length: SequenceLengthOption = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after this many tokens.")] = None,
    batch_size: BatchSizeOption = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw the trade-off curve into this picture.")] = None,
    gpu_experts: GPUExpertsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure quality and bytes read on held-out text.

    A row has perplexity, bits per byte, the share of FFN neurons that a token computes, and the bytes of FFN weights
    that it reads, those of the routers included, as a share of the dense model's.
    """
    if budget is not None and threshold is not None:
        raise PrunePathError("Expected --budget or --threshold, got both.")
    budgets = None if budget is None else parse_fractions("budget", budget)
    thresholds = None if threshold is None else parse_fractions("threshold", threshold)
    if plot is not None:
        check_picture("plot", plot)
    data = texts.load()
    with printing(as_json) as results:
        sleep_while_waiting()
        prunepath = import_prunepath()
        from prunepath.eval.plots import plot_tradeoff
        from prunepath.eval.tradeoff import dense_row, tradeoff

        loaded, tokenizer, offloading = options.load_offloaded(model, gpu_experts)
        shared = dict(
            sequence_length=window_length(loaded, sequence_length),
            max_tokens=max_tokens,
            batch_size=batch_size,
            progress=True,
        )
        if prunepath.is_sparse(loaded):
            if budgets is None and thresholds is None:
                budgets = [1.0, 0.5, 0.25, 0.1]
            rows = tradeoff(loaded, tokenizer, data, budgets=budgets, thresholds=thresholds, **shared)
        elif budgets is not None or thresholds is not None:
            raise PrunePathError(f"{model} is a dense model, which has no budgets or thresholds: convert it first.")
        else:
            rows = [dense_row(loaded, tokenizer, data, **shared)]
        if plot is not None:
            plot_tradeoff(rows, plot, title=model)
        memory = {} if offloading is None else {"gpu_experts": dataclasses.asdict(offloading)}
        results.json({"model": model, "rows": rows, **memory})
        results.table(rows)
        results.fields(memory)
