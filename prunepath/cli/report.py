from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunepath.cli.common import (
    BatchSizeOption,
    JsonOption,
    ModelOptions,
    SequenceLengthOption,
    SparseArgument,
    TextOptions,
    check_picture,
    parse_fractions,
    sleep_while_waiting,
    window_length,
)
from prunepath.cli.results import printing


def report(
    model: SparseArgument,
    texts: TextOptions,
    options: ModelOptions,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    budget: Annotated[str, typer.Option(help="Budgets in (0, 1], separated by commas.")] = "0.75,0.5,0.25,0.1",
    sequence_length: SequenceLengthOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Measure on this many tokens at most.")] = 4096,
    batch_size: BatchSizeOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Show a sparse model on one HTML page.

    It has quality, experts per token, layers and tokens at each budget, and needs no network.
    """
    budgets = parse_fractions("budget", budget)
    check_picture("out", out)
    data = texts.load()
    with printing(as_json) as results:
        sleep_while_waiting()
        from prunepath.eval.report import measure, write_report

        loaded, tokenizer = options.load(model)
        numbers = measure(
            loaded,
            tokenizer,
            data,
            name=model,
            budgets=budgets,
            sequence_length=window_length(loaded, sequence_length),
            max_tokens=max_tokens,
            batch_size=batch_size,
            progress=True,
        )
        write_report(numbers, out)
        results.json(numbers)
        results.table(numbers["rows"])
        results.text(f"Wrote {out}.")
