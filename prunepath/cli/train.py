from __future__ import annotations

import shutil
from typing import Annotated

import typer

from prunepath.cli.common import (
    JsonOption,
    ModelOptions,
    OutArgument,
    ResumeOption,
    SparseArgument,
    TextOptions,
    import_prunepath,
    state_beside,
)
from prunepath.cli.results import printing
from prunepath.config import FineTuning
from prunepath.errors import PrunePathError


def train(
    model: SparseArgument,
    out: OutArgument,
    texts: TextOptions,
    config: FineTuning,
    teacher: Annotated[
        str | None, typer.Option(help="Dense model to learn from.", show_default="SPARSE with all its experts")
    ] = None,
    resume: ResumeOption = False,
    options: ModelOptions = ModelOptions(dtype="float32"),
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a sparse model at random budgets, and write OUT.

    One checkpoint serves all budgets afterwards. Its weights have the dtype of those of SPARSE.
    """
    from prunepath.checkpoint.folders import check_output_folder

    out = check_output_folder(out)
    data = texts.load()
    with printing(as_json) as results:
        prunepath = import_prunepath()
        import transformers

        from prunepath.train.finetune import finetune, is_first_process

        loaded, tokenizer = options.load(model)
        if not prunepath.is_sparse(loaded):
            raise PrunePathError(f"Expected a sparse checkpoint to fine-tune, but {model} is dense: convert it first.")
        folder = state_beside(out, "training")
        trained, rows = finetune(
            loaded,
            tokenizer,
            data,
            config,
            folder=folder,
            teacher=None if teacher is None else options.load(teacher)[0],
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
        results.text(f"Try: prunepath eval {out} --data {texts.data[0]}")
