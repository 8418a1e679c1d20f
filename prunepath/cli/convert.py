from __future__ import annotations

from typing import Annotated

import typer

from prunepath.cli.common import (
    JsonOption,
    ModelArgument,
    ModelOptions,
    OutArgument,
    ResumeOption,
    TextOptions,
    import_prunepath,
    state_beside,
)
from prunepath.cli.info import describe_checkpoint
from prunepath.cli.results import printing
from prunepath.config import PrunePathConfig
from prunepath.errors import PrunePathError


def convert(
    model: ModelArgument,
    out: OutArgument,
    texts: TextOptions,
    config: PrunePathConfig,
    options: ModelOptions,
    low_memory: Annotated[
        bool,
        typer.Option("--low-memory", help="Read one layer at a time, from file to file; a stopped run goes on."),
    ] = False,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a dense model sparse, and write OUT.

    Neurons are grouped to experts, routers are trained, and budgets are turned into thresholds.
    """
    from prunepath.checkpoint.folders import check_output_folder

    out = check_output_folder(out)
    if low_memory and (options.dtype != "auto" or options.device not in (None, "cpu")):
        raise PrunePathError("Expected neither --dtype nor --device with --low-memory, which works on the CPU.")
    data = texts.load()
    with printing(as_json) as results:
        prunepath = import_prunepath()
        if low_memory:
            from prunepath.checkpoint.loading import load_tokenizer
            from prunepath.conversion.streaming import convert_streaming

            options.choose_backend()
            convert_streaming(model, out, load_tokenizer(model), data, config, progress=True)
        else:
            dense, tokenizer = options.load(model)
            if prunepath.is_sparse(dense):
                raise PrunePathError(f"Expected a dense model to convert, but {model} is sparse already.")
            state = state_beside(out, "routers")
            if not resume:
                state.unlink(missing_ok=True)
            prunepath.convert(dense, tokenizer, data, config, progress=True, state=state)
            prunepath.save(dense, tokenizer, out)
            state.unlink(missing_ok=True)
        summary = describe_checkpoint(out)
        results.json(summary)
        routers = summary["calibration"].get("routers", [])
        results.table([{"ffn": index, **row} for index, row in enumerate(routers)])
        results.text(f"Wrote {out}: {summary['layers']} sparse FFNs.")
        results.text(f'Try: prunepath generate {out} "Once upon a time" --budget 0.25')
