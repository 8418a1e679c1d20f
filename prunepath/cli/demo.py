from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunepath.cli.common import JsonOption, import_prunepath
from prunepath.cli.results import printing
from prunepath.errors import PrunePathError


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, tradeoff.json and tradeoff.png.")] = Path(
        "prunepath-demo"
    ),
    as_json: JsonOption = False,
) -> None:
    """Convert the embedded model and show the trade-off.

    It needs no network and at most a few minutes.
    """
    from prunepath.checkpoint.folders import check_output_folder

    try:
        check_output_folder(out)
    except PrunePathError as error:
        raise PrunePathError(f"{str(error).rstrip('.')}; remove it, or name another folder with --out.") from None
    with printing(as_json) as results:
        import_prunepath()
        from prunepath.demo.run import run

        outcome = run(out, progress=results.note)
        results.json(outcome)
        results.table(outcome["rows"])
        for sample in outcome["samples"]:
            results.text(f"\nBudget {sample['budget']:g}:")
            results.text(sample["prompt"] + sample["text"])
        results.text(f"\nWrote the checkpoint, tradeoff.json and tradeoff.png to {out} in {outcome['seconds']:.0f} s.")
        results.text(f'Try: prunepath generate {out} "def main(" --budget 0.25')
